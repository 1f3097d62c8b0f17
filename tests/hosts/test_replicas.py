"""Replicas: which one makes a call, what happens to calls when one dies, and that each is cleaned up once."""

from __future__ import annotations

import gc
import os
import signal
import sys
import threading
from collections import Counter
from typing import TYPE_CHECKING, Any

import pytest
from support.recording_services import Notes, Recorded, report_of

from sage import (
    BaseService,
    Cleanliness,
    FunctionError,
    GraphError,
    HeldBackError,
    Line,
    LocalEnvironment,
    Outcome,
    ServiceError,
    ServiceOptions,
    ServiceUnavailableError,
)
from sage.testing import StepBackend, assert_clean

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from sage import JobReport

SOON_S = 20.0
NAMES = ["llm[1]", "llm[2]", "llm[3]", "llm[4]"]


@pytest.fixture(autouse=True)
def nothing_left() -> Iterator[None]:
    with assert_clean(within_s=5.0, ignore=["temporary *", "shared memory *"]):
        yield
        gc.collect()


class Worker(BaseService):
    """Says who it is; the first call with `deadly` kills its process, in each instance with `forever`."""

    def __init__(self, notes: Notes | None = None, deadly: object = None, forever: bool = False) -> None:
        self.notes, self.deadly, self.forever = notes, deadly, forever
        self.note("build")

    def note(self, hook: str) -> None:
        if self.notes is not None:
            self.notes.append(f"{self.name}.{hook}")

    def process(self, data: Any) -> tuple[str, int, Any]:
        if data == self.deadly and self.notes is not None and (self.forever or "died" not in self.notes.lines()):
            self.notes.append("died")
            os.kill(os.getpid(), signal.SIGKILL)
        return self.name, os.getpid(), data

    async def later(self, data: Any) -> tuple[str, Any]:
        return self.name, data

    def stop(self) -> None:
        self.note("stop")

    def cleanup(self) -> None:
        self.note("cleanup")


class Meeting(BaseService):
    """Answers only while as many replicas answer as were expected; `gate` is in the process of the test."""

    gate = threading.Barrier(4)

    def process(self, data: Any) -> str:
        self.gate.wait(SOON_S)
        return self.name


def run(env: LocalEnvironment) -> JobReport:
    job = env.submit(autostop=True)
    assert job.report is not None
    return job.report


# --- which one --------------------------------------------------------------------------------------------------------


def test_calls_at_once_go_to_different_replicas() -> None:
    """Each call waits until all four replicas have one, so that the job ends only if none of them has two."""
    env = LocalEnvironment("several")
    llm = env.register_service("llm", Meeting, options=ServiceOptions(replicas=4))
    seen: list[str] = []
    env.from_batch(range(64)).map(llm, parallelism=4).sink(seen.append)
    report = run(env)
    assert sorted(Counter(seen)) == NAMES
    assert [service.name for service in report.services] == [*NAMES, "llm"]
    assert report.service("llm").calls == 64
    assert sum(report.service(name).calls for name in NAMES) == 64
    assert (report.service("llm").host, report.service("llm[2]").state) == ("replicas", "stopped")
    assert report.service("llm[2]").hooks[0].hook == "build"


def test_calls_one_after_the_other_go_round() -> None:
    env = LocalEnvironment("round")
    llm = env.register_service("llm", Worker, options=ServiceOptions(replicas=3))
    seen: list[str] = []
    env.from_batch(range(30)).map(lambda number: llm.process(number)[0]).sink(seen.append)
    run(env)
    assert Counter(seen) == dict.fromkeys(NAMES[:3], 10)


def test_calls_that_are_awaited_are_shared_too() -> None:
    env = LocalEnvironment("awaited")
    llm = env.register_service("llm", Worker, options=ServiceOptions(replicas=2))

    async def ask(number: int) -> tuple[str, int]:
        answer: tuple[str, int] = await llm.later(number)
        return answer

    seen: list[tuple[str, int]] = []
    env.from_batch(range(20)).map_async(ask, concurrency=4).sink(seen.append)
    report = run(env)
    assert sorted(number for _, number in seen) == list(range(20))
    assert min(report.service(name).calls for name in NAMES[:2]) > 0


def test_calls_with_a_time_out_and_by_name_are_shared_too() -> None:
    env = LocalEnvironment("by name")
    env.register_service("llm", Worker, options=ServiceOptions(replicas=2, call_timeout_s=SOON_S, host="process"))

    class Ask(BaseService):
        def process(self, number: int) -> list[Any]:
            first = self.call_service("llm", number)
            future = self.call_service_async("llm", number, timeout=SOON_S)
            return [first[2], future.result()[2], self.call_service("llm", number, method="later")[1]]

    ask = env.register_service("ask", Ask)
    seen: list[list[int]] = []
    env.from_batch(range(4)).map(ask).sink(seen.append)
    report = run(env)
    assert seen == [[number] * 3 for number in range(4)]
    assert (report.service("llm").calls, report.service("llm").errors) == (12, 0)


def test_a_key_keeps_its_replica_and_only_the_keys_of_a_lost_one_move(tmp_path: Path) -> None:
    notes = Notes(tmp_path / "notes")
    env = LocalEnvironment("keys")
    options = ServiceOptions(replicas=3, host="process", affinity=lambda data: data[0])
    llm = env.register_service("llm", Worker, notes, deadly=("a", "die"), options=options)
    keys = [*"abcdefghijklmnopqrstuvwxyz"]

    def ask(_: object) -> list[dict[str, str]]:
        before = {key: llm.process((key, 1))[0] for key in keys}
        again = {key: llm.process((key, 2))[0] for key in keys}
        with pytest.raises(
            ServiceUnavailableError, match=f'service "{before["a"]}" has no process any more'.replace("[", r"\[")
        ):
            llm.process(("a", "die"))
        return [before, again, {key: llm.process((key, 3))[0] for key in keys}]

    seen: list[dict[str, str]] = []
    env.from_batch([1]).flatmap(ask).sink(seen.append)
    report = run(env)
    before, again, after = seen
    assert before == again
    assert set(before.values()) == set(NAMES[:3])
    lost = before["a"]
    assert {key for key in keys if before[key] != after[key]} == {key for key in keys if before[key] == lost}
    assert report.service(lost).state == "lost"


# --- deaths -----------------------------------------------------------------------------------------------------------


def test_a_replica_that_dies_takes_only_its_own_call_along(tmp_path: Path) -> None:
    env = LocalEnvironment("one dies")
    options = ServiceOptions(replicas=3, host="process")
    llm = env.register_service("llm", Worker, Notes(tmp_path / "notes"), deadly=7, options=options)
    seen: list[int] = []
    letters = env.dead_letters()
    failed: list[Any] = []
    env.from_batch(range(60)).map(llm, parallelism=6, on_error=letters).sink(lambda answer: seen.append(answer[2]))
    letters.sink(failed.append)
    report = run(env)
    assert (report.state, report.cleanliness) == (Outcome.COMPLETED, Cleanliness.DIRTY)
    assert sorted(seen) == [number for number in range(60) if number != 7]
    [letter] = failed
    assert letter.value == 7
    assert sorted(report.service(name).state for name in NAMES[:3]) == ["lost", "stopped", "stopped"]
    assert "was ended by SIGKILL" in str(report)


def test_an_idempotent_call_is_made_again_by_another_replica(tmp_path: Path) -> None:
    notes = Notes(tmp_path / "notes")
    env = LocalEnvironment("idempotent")
    options = ServiceOptions(
        replicas=3,
        host="process",
        idempotent=True,
        restart="on_failure",
        backoff_s=(0.01, 0.01),
        drain_timeout_s=SOON_S,
    )
    llm = env.register_service("llm", Worker, notes, deadly=7, options=options)
    seen: list[int] = []
    env.from_batch(range(60)).map(llm, parallelism=6).sink(lambda answer: seen.append(answer[2]))
    report = run(env)
    assert report.state is Outcome.COMPLETED
    assert sorted(seen) == list(range(60))
    assert (report.service("llm").calls, report.service("llm").errors) == (60, 0)
    # The others are stopped and cleaned once each; the dead one again, if its next instance came in time.
    lines = Counter(notes.lines())
    deaths = {name: report.service(name).errors for name in NAMES[:3]}
    assert sorted(deaths.values()) == [0, 0, 1]
    for name, died in deaths.items():
        # The next instance of the dead one may have been on its start when the job ended.
        assert lines[f"{name}.cleanup"] == lines[f"{name}.build"] - died
        assert died or (lines[f"{name}.stop"], lines[f"{name}.cleanup"]) == (1, 1)


def test_calls_wait_while_all_replicas_are_restarted(tmp_path: Path) -> None:
    notes = Notes(tmp_path / "notes")
    env = LocalEnvironment("all are gone")
    options = ServiceOptions(host="process", idempotent=True, restart="on_failure", backoff_s=(0.01, 0.01))
    llm = env.register_service("llm", Worker, notes, deadly=3, options=options)
    seen: list[int] = []
    env.from_batch(range(20)).map(llm, parallelism=3).sink(lambda answer: seen.append(answer[2]))
    report = run(env)
    assert sorted(seen) == list(range(20))
    assert (report.service("llm").errors, report.service("llm[1]").restarts) == (0, 1)
    assert notes.lines() == ["llm[1].build", "died", "llm[1].build", "llm[1].stop", "llm[1].cleanup"]


def test_a_call_that_kills_its_replicas_does_not_kill_all_of_them(tmp_path: Path) -> None:
    notes = Notes(tmp_path / "notes")
    env = LocalEnvironment("deadly")
    options = ServiceOptions(replicas=4, host="process", idempotent=True)
    llm = env.register_service("llm", Worker, notes, deadly=7, forever=True, options=options)
    env.from_batch([1, 7]).map(llm).sink(print)
    with pytest.raises(BaseException, match="has no process any more") as caught:
        env.submit(autostop=True)
    assert notes.lines().count("died") == 3
    assert any(isinstance(error, FunctionError) for error in _leaves(caught.value))
    assert sorted(report_of(env).service(name).state for name in NAMES) == ["lost", "lost", "lost", "stopped"]


def _leaves(error: BaseException) -> list[BaseException]:
    return [leaf for one in error.exceptions for leaf in _leaves(one)] if isinstance(error, ExceptionGroup) else [error]


def test_a_job_with_fewer_replicas_than_it_needs_fails(tmp_path: Path) -> None:
    env = LocalEnvironment("too few")
    options = ServiceOptions(replicas=2, replicas_min=2, host="process")
    llm = env.register_service("llm", Worker, Notes(tmp_path / "notes"), deadly=7, options=options)
    env.from_batch(range(10)).map(llm, on_error="skip").sink(print)
    with pytest.raises(BaseException, match='service "llm" failed as 1 of its 2 replicas are left') as caught:
        env.submit(autostop=True)
    [error] = [error for error in _leaves(caught.value) if isinstance(error, ServiceError)]
    assert "replicas_min is 2; the last one was" in str(error)
    assert report_of(env).state is Outcome.FAILED


def test_a_job_begins_with_the_replicas_that_could_be_had() -> None:
    def build() -> Worker:
        built.append(1)
        if len(built) == 2:
            raise OSError("no memory")
        return Worker()

    built: list[int] = []
    env = LocalEnvironment("one is missing", backend=StepBackend)
    llm = env.register_service("llm", build, options=ServiceOptions(replicas=3, replicas_min=2))
    seen: list[Any] = []
    env.from_batch(range(4)).map(llm).sink(seen.append)
    report = run(env)
    assert (report.state, len(seen)) == (Outcome.COMPLETED, 4)
    states = sorted(report.service(name).state for name in NAMES[:3])
    assert states == ["failed_start", "stopped", "stopped"]


# --- the lifecycle ----------------------------------------------------------------------------------------------------


class Using(Recorded):
    """A service that needs the replicas."""

    def process(self, data: Any) -> Any:
        return self.call_service("llm", data)


def program(env: LocalEnvironment, journal: Any, end: str, host: Any) -> None:
    """Run a job with three replicas and a service that uses them, ended in one of the ways."""
    llm = env.register_service("llm", Recorded, journal, options=ServiceOptions(replicas=3, host=host))
    env.register_service("user", Using, journal, options=ServiceOptions(depends_on=["llm"]))

    def work(number: int) -> int:
        if number == 20 and end == "fail":
            raise ValueError("twenty")
        if number == 20 and end in ("stop", "cancel"):
            getattr(env._job, end)() if end == "cancel" else env.stop()
        answer: int = llm.process(number)
        return answer

    stream = env.from_batch(range(50)).map(work)
    stream.map(lambda number: number).sink(lambda _: None)
    if end == "fail":
        with pytest.raises(FunctionError, match="twenty"):
            env.submit(autostop=True)
    else:
        env.submit(autostop=True)


def check(journal: Any) -> None:
    lines = list(journal)
    for name in ("llm[1]", "llm[2]", "llm[3]", "user"):
        own = [line.removeprefix(f"{name}.") for line in lines if line.startswith(f"{name}.")]
        assert own == ["build", "setup", "start", "stop", "cleanup"], lines
    ends = [place for place, line in enumerate(lines) if line.endswith((".stop", ".cleanup"))]
    assert [lines[place] for place in ends[:2]] == ["user.stop", "user.cleanup"], lines


ENDS = ["sources end", "stop", "fail"]


@pytest.mark.parametrize("end", ENDS)
def test_each_replica_is_cleaned_once_and_in_order_on_every_schedule(end: str) -> None:
    for seed in range(25):
        journal: list[str] = []
        program(LocalEnvironment("seeded", backend=lambda: StepBackend(seed)), journal, end, None)  # noqa: B023
        check(journal)


@pytest.mark.parametrize("end", ENDS)
def test_each_replica_in_a_process_is_cleaned_once_and_in_order(end: str, tmp_path: Path) -> None:
    notes = Notes(tmp_path / "notes")
    program(LocalEnvironment("processes"), notes, end, "process")
    check(notes)


# --- rate, budget, commands -------------------------------------------------------------------------------------------


def test_a_budget_counts_the_calls_of_all_replicas_together() -> None:
    env = LocalEnvironment("budget", backend=StepBackend)
    llm = env.register_service("llm", Worker, options=ServiceOptions(replicas=2))
    env.limit(calls={"llm": 5})
    seen: list[Any] = []
    env.from_batch(range(50)).map(llm).sink(seen.append)
    report = run(env)
    assert (report.state, len(seen), report.service("llm").calls) == (Outcome.STOPPED, 5, 5)
    assert report.why.startswith('budget: calls of "llm"')
    assert not any(isinstance(error, HeldBackError) for error in report.errors)


def test_each_replica_of_a_command_has_a_port_of_its_own() -> None:
    env = LocalEnvironment("commands")
    words = [sys.executable, "-c", "import signal; print('up {port}', flush=True); signal.pause()"]
    web = env.register_command("web", words, ready=Line("up"), exit_codes=[-15], options=ServiceOptions(replicas=2))
    seen: list[str] = []
    env.from_batch(range(4)).map(lambda _: web.url).sink(seen.append)
    report = run(env)
    assert sorted(Counter(seen).values()) == [2, 2]
    assert [report.service(f"web[{number}]").host for number in (1, 2)] == ["command", "command"]
    assert report.cleanliness is Cleanliness.CLEAN


# --- refused ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"replicas": 0}, "replicas is 0, which is not a positive number"),
        ({"replicas": 2, "replicas_min": 3}, "replicas_min is 3, with replicas=2"),
        ({"replicas": 2, "affinity": "key"}, "affinity is 'key', which is not callable"),
        ({"replicas": 2, "shared": True}, "replicas and shared do not go together"),
    ],
)
def test_options_that_cannot_work_are_refused_with_a_hint(options: dict[str, Any], text: str) -> None:
    with pytest.raises(GraphError) as caught:
        ServiceOptions(**options)
    assert text in str(caught.value)
    assert caught.value.__notes__


def test_replicas_cannot_be_kept() -> None:
    env = LocalEnvironment("kept")
    env.register_service("llm", Worker, options=ServiceOptions(replicas=2))
    env.from_batch([1]).sink(print)
    with pytest.raises(GraphError, match='service "llm" has replicas, and cannot be kept') as caught:
        env.submit(autostop=True, keep_services=["llm"])
    assert "keep_services" in caught.value.__notes__[0]


def test_a_fixed_port_cannot_be_shared_by_replicas() -> None:
    env = LocalEnvironment("port")
    env.register_command("web", ["sleep", "9"], port=8123, options=ServiceOptions(replicas=2))
    env.from_batch([1]).sink(print)
    with pytest.raises(GraphError, match='service "web" has 2 replicas, which cannot share port 8123') as caught:
        env.submit(autostop=True)
    assert "{port}" in caught.value.__notes__[0]


def test_a_service_cannot_have_the_name_of_a_replica() -> None:
    env = LocalEnvironment("names")
    env.register_service("llm", Worker, options=ServiceOptions(replicas=2))
    env.register_service("llm[2]", Worker)
    env.from_batch([1]).sink(print)
    with pytest.raises(GraphError, match=r'service "llm\[2\]" has the name of a replica of service "llm"'):
        env.submit(autostop=True)


def test_a_replica_that_calls_its_own_service_is_refused() -> None:
    class Calling(BaseService):
        def process(self, data: Any) -> Any:
            return self.call_service("llm", data)

    env = LocalEnvironment("circle")
    llm = env.register_service("llm", Calling, options=ServiceOptions(replicas=2))
    env.from_batch([1]).map(llm).sink(print)
    with pytest.raises(FunctionError, match="services call each other in a circle"):
        env.submit(autostop=True)
