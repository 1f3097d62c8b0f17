"""Rests: a service that nobody calls is stopped, and the next call starts it again; no call is lost or fails."""

from __future__ import annotations

import asyncio
import gc
import os
import random
import sys
import threading
import time
import weakref
from functools import partial
from typing import TYPE_CHECKING, Any

import pytest
from support.recording_services import Notes, Numbered, Recorded

from sage import (
    BaseService,
    Cleanliness,
    GraphError,
    JobError,
    Line,
    LocalEnvironment,
    MapFunction,
    Outcome,
    Rate,
    ServiceError,
    ServiceOptions,
    ServiceTimeoutError,
    ServiceUnavailableError,
    aio,
)
from sage._processes import process
from sage.testing import assert_clean, simulate

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from sage import JobReport
    from sage._runtime.backend import Backend

IDLE_S = 0.05
SOON_S = 30.0
STOPPED = 'service "llm" has stopped and takes no more calls'
UP = [sys.executable, "-c", "import signal; print('up', flush=True); signal.pause()"]


@pytest.fixture(autouse=True)
def nothing_left() -> Iterator[None]:
    with assert_clean(within_s=5.0, ignore=["temporary *", "shared memory *"]):
        yield
        gc.collect()


def until(is_so: Callable[[], object]) -> None:
    """Wait for something that another thread or process brings about."""
    due, pause = time.monotonic() + SOON_S, threading.Event()
    while not is_so():
        assert time.monotonic() < due
        pause.wait(0.002)


def run(env: LocalEnvironment) -> JobReport:
    job = env.submit(autostop=True)
    assert job.report is not None
    return job.report


def check_sound(report: JobReport, lines: list[str], name: str = "llm") -> None:
    """Check that no call failed, that the job is clean, and that each instance was ended once."""
    found = report.service(name)
    assert (report.state, report.cleanliness, report.errors) == (Outcome.COMPLETED, Cleanliness.CLEAN, ())
    assert (found.errors, found.state, found.restarts) == (0, "stopped", 0)
    hooks = [f"{name}.{hook} {number}" for number in range(1, found.built_count + 1) for hook in HOOKS]
    assert lines == hooks
    assert found.built_count - 1 <= found.rested <= found.built_count


HOOKS = ("build", "stop", "cleanup")


@pytest.mark.parametrize("host", ["inline", "process"])
def test_a_service_that_nobody_calls_rests_and_the_next_call_starts_it_again(tmp_path: Path, host: Any) -> None:
    notes = Notes(tmp_path / "notes")
    env = LocalEnvironment("resting")
    options = ServiceOptions(host=host, idle_stop_s=IDLE_S)
    llm = env.register_service("llm", Numbered, notes, options=options)

    def ask(number: int) -> int:
        if number == 2:
            until(lambda: "llm.cleanup 1" in notes.lines())
        return int(llm.process(number))

    answers: list[int] = []
    env.from_batch([1, 2, 3]).map(ask).sink(answers.append)
    job = env.submit(autostop=True)
    assert job.report is not None
    assert answers == [1, 2, 3]
    check_sound(job.report, notes.lines())
    assert job.report.service("llm").calls == 3
    assert 'service "llm": stopped ' in str(job.report)
    states = [event.after for event in job.events() if event.name == "llm"]
    begin = ["starting", "ready", "draining", "stopping", "cleaning", "resting"]
    assert states[: len(begin) + 2] == [*begin, "starting", "ready"]


def test_a_process_that_rests_has_ended(tmp_path: Path) -> None:
    notes = Notes(tmp_path / "notes")
    env = LocalEnvironment("resting")
    options = ServiceOptions(host="process", idle_stop_s=IDLE_S)
    llm = env.register_service("llm", Pid, notes, options=options)

    def ask(_: int) -> bool:
        first = llm.process()
        until(lambda: process(first) is None)
        return bool(llm.process() == first)

    answers: list[bool] = []
    env.from_batch([1]).map(ask).sink(answers.append)
    check_sound(run(env), notes.lines())
    assert answers == [False]


class Pid(Numbered):
    """Says in which process it runs."""

    def process(self, data: object = None) -> int:
        return os.getpid()


def test_a_command_that_rests_is_started_when_its_address_is_read() -> None:
    env = LocalEnvironment("resting")
    server = env.register_command("server", UP, ready=Line("up"), options=ServiceOptions(idle_stop_s=IDLE_S))

    def pids(_: int) -> tuple[int, int]:
        first = int(server.pid)
        until(lambda: process(first) is None)
        second = int(server.pid)
        assert process(second) is not None
        assert "up" in server.output()
        return first, second

    answers: list[tuple[int, int]] = []
    env.from_batch([1]).map(pids).sink(answers.append)
    report = run(env)
    assert (report.state, report.cleanliness, report.errors) == (Outcome.COMPLETED, Cleanliness.CLEAN, ())
    assert len({*answers[0]}) == 2
    assert report.service("server").rested >= 1


def test_an_instance_in_the_process_of_the_job_is_forgotten_while_it_rests() -> None:
    """Also when a function has its method since its `open`."""
    alive: list[weakref.ref[Model]] = []

    class Model(BaseService):
        def __init__(self) -> None:
            alive.append(weakref.ref(self))

        def process(self, number: int) -> int:
            return number + len(alive)

    env = LocalEnvironment("resting")
    llm = env.register_service("llm", Model, options=ServiceOptions(idle_stop_s=IDLE_S))

    def pause(number: int) -> int:
        if number == 20:
            until(lambda: gc.collect() is not None and alive[0]() is None)
        return number

    answers: list[int] = []
    env.from_batch([10, 20]).rebalance().map(pause).map(llm.process).sink(answers.append)
    run(env)
    assert answers == [11, 22]


class PausingCaller(MapFunction):
    """Calls directly, with a time-out or on another thread, after pauses about as long as it takes until a rest."""

    def __init__(self, notes: Notes, idle_s: float) -> None:
        self.notes, self.idle_s = notes, idle_s
        self.pause = threading.Event()

    def execute(self, data: int) -> Any:
        if data == 0:
            until(lambda: "llm.cleanup 1" in self.notes.lines())
        self.pause.wait(random.Random(data).uniform(0.5, 2) * self.idle_s)
        if data % 3 == 0:
            return self.call_service("llm", data, timeout=SOON_S)
        if data % 3 == 1:
            return self.call_service_async("llm", data).result()
        return self.call_service("llm", data)


@pytest.mark.parametrize("host", ["inline", "process"])
def test_a_call_that_comes_as_a_rest_begins_is_not_lost(tmp_path: Path, host: Any) -> None:
    idle_s, calls = (0.004, 60) if host == "inline" else (0.02, 12)
    notes = Notes(tmp_path / "notes")
    env = LocalEnvironment("race")
    options = ServiceOptions(host=host, idle_stop_s=idle_s, concurrency=2)
    env.register_service("llm", Numbered, notes, options=options)
    answers: list[int] = []
    env.from_batch(range(calls)).map(PausingCaller, notes, idle_s, parallelism=2).sink(answers.append)
    report = run(env)
    assert sorted(answers) == list(range(calls))
    assert report.service("llm").calls == calls
    check_sound(report, notes.lines())
    assert report.service("llm").rested > 0


@pytest.mark.parametrize("call_timeout_s", [None, SOON_S])
def test_no_call_is_lost_on_any_schedule(call_timeout_s: float | None) -> None:
    rests: list[int] = []

    def program(backend: Callable[[], Backend]) -> None:
        env = LocalEnvironment("schedules", backend=backend)
        journal: list[str] = []
        options = ServiceOptions(idle_stop_s=0.1, call_timeout_s=call_timeout_s)
        llm = env.register_service("llm", Numbered, journal, options=options)
        answers: list[int] = []

        async def wait(number: int) -> int:
            await asyncio.sleep(random.Random(number).uniform(0.05, 0.3))
            return number

        env.from_batch(range(12)).map_async(wait, concurrency=2).map(llm.process, parallelism=2).sink(answers.append)
        report = run(env)
        assert sorted(answers) == list(range(12))
        assert report.service("llm").calls == 12
        check_sound(report, journal)
        rests.append(report.service("llm").rested)

    simulate(program, seeds=range(40))
    assert sum(rests) > 40


@pytest.mark.parametrize("call_timeout_s", [None, SOON_S])
def test_others_go_on_while_a_function_waits_for_a_call_that_it_began_before(call_timeout_s: float | None) -> None:
    class Ask(MapFunction):
        def execute(self, data: int) -> Any:
            return self.call_service_async("llm", data).result()

    def program(backend: Callable[[], Backend]) -> None:
        env = LocalEnvironment("schedules", backend=backend)
        journal: list[str] = []
        options = ServiceOptions(idle_stop_s=0.1, call_timeout_s=call_timeout_s)
        env.register_service("llm", Numbered, journal, options=options)
        answers: list[int] = []

        async def wait(number: int) -> int:
            await asyncio.sleep(0.3)
            return number

        env.from_batch(range(4)).map_async(wait, concurrency=1).map(Ask).sink(answers.append)
        report = run(env)
        assert sorted(answers) == list(range(4))
        assert report.service("llm").rested > 0
        check_sound(report, journal)

    simulate(program, seeds=range(20))


class Awaited(Numbered):
    """Has a coroutine method, and one that is not."""

    async def ask(self, number: int) -> int:
        await asyncio.sleep(0)
        return number + self.ctx.incarnation

    def ask_plainly(self, number: int) -> int:
        return number + self.ctx.incarnation


def test_coroutines_wait_for_a_service_that_rests() -> None:
    env = LocalEnvironment("awaited")
    journal: list[str] = []
    llm = env.register_service("llm", Awaited, journal, options=ServiceOptions(idle_stop_s=IDLE_S, concurrency=4))

    async def ask(number: int) -> int:
        first: int = await llm.ask(number)
        while f"llm.cleanup {first - number}" not in journal:
            await asyncio.sleep(0.001)
        second: int = await (llm.ask(number) if number % 2 else aio(llm).ask_plainly(number))
        return second - first

    answers: list[int] = []
    env.from_batch(range(4)).map_async(ask, concurrency=4).sink(answers.append)
    check_sound(run(env), journal)
    assert min(answers) >= 1
    assert len(answers) == 4


def test_a_coroutine_method_is_one_while_the_service_rests_although_only_its_object_can_tell() -> None:
    env = LocalEnvironment("factory")
    journal: list[str] = []
    llm = env.register_service("llm", partial(Awaited), journal, options=ServiceOptions(idle_stop_s=IDLE_S))

    async def ask(number: int) -> int:
        while "llm.cleanup 1" not in journal:
            await asyncio.sleep(0.001)
        answer: int = await llm.ask(number)
        return answer

    answers: list[int] = []
    env.from_batch([7]).map_async(ask).sink(answers.append)
    report = run(env)
    assert (answers, report.errors, report.cleanliness) == ([9], (), Cleanliness.CLEAN)


class Held(Numbered):
    """Stays in the start of every instance but the first until it is let go on."""

    def __init__(self, journal: list[str], gate: threading.Event) -> None:
        super().__init__(journal)
        self.gate = gate

    def setup(self) -> None:
        if self.number > 1:
            self.gate.wait(SOON_S)
        self.note("set up")


def test_a_call_waits_for_the_start_within_its_own_time() -> None:
    journal: list[str] = []
    gate = threading.Event()
    env = LocalEnvironment("late")
    env.register_service("llm", Held, journal, gate, options=ServiceOptions(idle_stop_s=IDLE_S))

    class Ask(MapFunction):
        def execute(self, data: int) -> Any:
            until(lambda: "llm.cleanup 1" in journal)
            with pytest.raises(ServiceTimeoutError, match="did not answer process"):
                self.call_service("llm", data, timeout=0.05)
            gate.set()
            return self.call_service("llm", data, timeout=SOON_S)

    answers: list[int] = []
    env.from_batch([7]).map(Ask).sink(answers.append)
    report = run(env)
    assert (answers, report.errors, report.cleanliness) == ([7], (), Cleanliness.CLEAN)


def test_a_call_that_nobody_waits_for_yet_needs_no_second_thread_after_the_start() -> None:
    """There is only one, as the service makes one call at a time."""
    journal: list[str] = []
    env = LocalEnvironment("asynchronous")
    env.register_service("llm", Numbered, journal, options=ServiceOptions(idle_stop_s=IDLE_S, call_timeout_s=SOON_S))

    class Ask(MapFunction):
        def execute(self, data: int) -> Any:
            until(lambda: "llm.cleanup 1" in journal)
            return self.call_service_async("llm", data).result()

    answers: list[int] = []
    env.from_batch([7]).map(Ask).sink(answers.append)
    check_sound(run(env), journal)
    assert answers == [7]


@pytest.mark.parametrize("way", ["inline", "process", "awaited"])
def test_a_call_that_starts_a_service_takes_one_turn_of_its_rate(tmp_path: Path, way: Any) -> None:
    notes = Notes(tmp_path / "notes")
    env = LocalEnvironment("rate")
    rate = Rate(requests_per_minute=20, burst=2)
    host: Any = "process" if way == "process" else "inline"
    options = ServiceOptions(host=host, idle_stop_s=IDLE_S, rate=rate, concurrency=2)
    llm = env.register_service("llm", Lingering, notes, tmp_path / "go", options=options)

    def ask(number: int) -> int:
        llm.process(number)
        until(lambda: "llm.stopping 1" in notes.lines())
        (tmp_path / "go").touch()
        until(lambda: "llm.cleanup 1" in notes.lines())
        return int(llm.process(number))

    async def ask_awaited(number: int) -> int:
        await llm.ask(number)
        while "llm.stopping 1" not in notes.lines():
            await asyncio.sleep(0.001)
        second = asyncio.ensure_future(llm.ask(number))
        await asyncio.sleep(0)
        (tmp_path / "go").touch()
        answer: int = await second
        return answer

    stream = env.from_batch([7])
    (stream.map_async(ask_awaited) if way == "awaited" else stream.map(ask)).sink(abs)
    service = run(env).service("llm")
    assert (service.calls, service.rate_waits) == (2, 0)


class Lingering(Numbered):
    """Stays in the stop of every instance until there is a file."""

    def __init__(self, journal: Any, go: Path) -> None:
        super().__init__(journal)
        self.go = go

    def process(self, data: Any) -> Any:
        self.note("call")
        return data

    async def ask(self, data: int) -> int:
        await asyncio.sleep(0)
        return data

    def stop(self) -> None:
        self.note("stopping")
        until(self.go.exists)
        super().stop()


@pytest.mark.parametrize("drain", [True, False])
def test_no_call_is_made_while_an_instance_ends_although_the_job_is_stopped(tmp_path: Path, drain: bool) -> None:
    """Not one that another call keeps from its thread until then, either; in a drain, the next instance makes them."""
    journal: list[str] = []
    env = LocalEnvironment("stopped")
    options = ServiceOptions(idle_stop_s=IDLE_S)
    env.register_service("llm", Lingering, journal, tmp_path / "go", options=options)
    outcomes: list[str] = []

    class Ask(MapFunction):
        def execute(self, data: int) -> int:
            until(lambda: "llm.stopping 1" in journal)
            calls = [self.call_service_async("llm", data) for _ in range(2)]
            env.stop(drain)
            if drain:
                (tmp_path / "go").touch()
            for call in calls:
                try:
                    outcomes.append(str(call.result()))
                except ServiceUnavailableError as error:
                    outcomes.append(str(error))
            (tmp_path / "go").touch()
            return data

    env.from_batch([1]).map(Ask).sink(abs)
    report = env.submit().wait()
    state = Outcome.STOPPED if drain else Outcome.CANCELLED
    assert (report.state, report.cleanliness, report.errors) == (state, Cleanliness.CLEAN, ())
    assert outcomes == ["1" if drain else STOPPED] * 2
    first, *later = (["llm.build 1", "llm.stopping 1", "llm.stop 1", "llm.cleanup 1"], "llm.build 2", "llm.call 2")
    assert journal[:4] == first
    assert journal[4:7] == ([*later, "llm.call 2"] if drain else [])


def test_a_service_rests_between_two_checks_of_its_health_however_long_they_take() -> None:
    journal: list[str] = []
    env = LocalEnvironment("checked")
    options = ServiceOptions(idle_stop_s=2 * IDLE_S, health_interval_s=0.01)
    env.register_service("llm", Checked, journal, options=options)

    def wait(number: int) -> int:
        until(lambda: "llm.cleanup 1" in journal)
        return number

    env.from_batch([1]).map(wait).sink(abs)
    check_sound(run(env), journal)


class Checked(Numbered):
    def health(self) -> bool:
        threading.Event().wait(IDLE_S)
        return True


@pytest.mark.parametrize("by_rate", [False, True])
def test_a_call_that_runs_or_waits_keeps_a_service_from_its_rest(by_rate: bool) -> None:
    """One that takes long and one that waits behind it, or one that waits for the rate."""
    env = LocalEnvironment("busy")
    journal: list[str] = []
    rate = Rate(requests_per_minute=60 / (6 * IDLE_S)) if by_rate else None
    options = ServiceOptions(idle_stop_s=IDLE_S, rate=rate)
    llm = env.register_service("llm", Slow, journal, 0 if by_rate else 6 * IDLE_S, options=options)
    both = threading.Barrier(2)

    def ask(number: int) -> int:
        both.wait(SOON_S)
        return int(llm.process(number))

    env.from_batch([1, 2]).map(ask, parallelism=2).sink(abs)
    report = run(env)
    assert (report.errors, report.service("llm").calls) == ((), 2)
    first = journal.index("llm.call")
    assert journal[first + 1] == "llm.returned"
    assert journal[first + 2 : first + 4] == ["llm.call", "llm.returned"]


class Slow(Recorded):
    """Takes its time for a call."""

    def __init__(self, journal: list[str], call_s: float) -> None:
        super().__init__(journal)
        self.call_s = call_s

    def process(self, data: int) -> int:
        self.note("call")
        threading.Event().wait(self.call_s)
        self.note("returned")
        return data


class Storing(Numbered):
    """Calls another service in its cleanup."""

    def cleanup(self) -> None:
        self.note(f"stored by {self.call_service('store', 1)}")
        super().cleanup()


def test_a_service_that_another_one_needs_does_not_rest() -> None:
    journal: list[str] = []
    env = LocalEnvironment("needed")
    resting = ServiceOptions(idle_stop_s=IDLE_S)
    env.register_service("store", Numbered, journal, options=resting)
    depends = ServiceOptions(idle_stop_s=IDLE_S, depends_on=["store"])
    env.register_service("memory", Storing, journal, options=depends)

    def wait(number: int) -> int:
        until(lambda: "memory.cleanup 1" in journal)
        return number

    env.from_batch([1]).map(wait).sink(abs)
    report = run(env)
    assert (report.errors, report.cleanliness) == ((), Cleanliness.CLEAN)
    assert (report.service("store").rested, report.service("memory").rested) == (0, 1)
    assert journal == [
        "store.build 1",
        "memory.build 1",
        "memory.stop 1",
        "memory.stored by 1 1",
        "memory.cleanup 1",
        "store.stop 1",
        "store.cleanup 1",
    ]


def test_a_job_that_is_stopped_while_a_service_rests_ends_clean() -> None:
    journal: list[str] = []
    env = LocalEnvironment("stopped")
    llm = env.register_service("llm", Numbered, journal, options=ServiceOptions(idle_stop_s=IDLE_S))
    env.from_source(lambda: 1, delay=0.01).filter(lambda _: False).map(llm.process).sink(abs)
    job = env.submit()
    until(lambda: "llm.cleanup 1" in journal)
    job.stop()
    report = job.wait()
    assert (report.state, report.cleanliness, report.errors) == (Outcome.STOPPED, Cleanliness.CLEAN, ())
    assert journal == ["llm.build 1", "llm.stop 1", "llm.cleanup 1"]
    assert (report.service("llm").state, report.service("llm").rested) == ("stopped", 1)


@pytest.mark.parametrize("host", ["inline", "process"])
@pytest.mark.parametrize("drain", [True, None])
def test_a_service_that_rests_is_started_for_the_calls_on_their_way_as_the_job_is_stopped(
    tmp_path: Path, host: Any, drain: bool | None
) -> None:
    """Every record that was taken in before the stop arrives."""
    notes = Notes(tmp_path / "notes")
    env = LocalEnvironment("drained")
    llm = env.register_service("llm", Numbered, notes, options=ServiceOptions(host=host, idle_stop_s=IDLE_S))

    def stop(numbers: list[int]) -> list[int]:
        until(lambda: "llm.cleanup 1" in notes.lines())
        env.stop(drain)
        return numbers

    answers: list[int] = []
    env.from_batch([[1, 2, 3]]).flatmap(stop).map(llm.process).sink(answers.append)
    report = env.submit().wait()
    assert (report.state, report.cleanliness, report.errors) == (Outcome.STOPPED, Cleanliness.CLEAN, ())
    # A start makes the function that waits for it a costly one, and only a drain goes on with calls of those.
    assert answers == [1, 2, 3][: 3 if drain else max(len(answers), 1)]
    assert (len(answers) + report.undelivered, report.service("llm").errors) == (3, 0)
    assert notes.lines() == [f"llm.{hook} {number}" for number in (1, 2) for hook in HOOKS]


@pytest.mark.parametrize("drain", [True, False])
def test_a_call_that_waits_for_the_start_is_made_in_a_drain_and_fails_at_once_in_a_cancel(drain: bool) -> None:
    journal: list[str] = []
    gate = threading.Event()
    env = LocalEnvironment("stopped")
    env.register_service("llm", Held, journal, gate, options=ServiceOptions(idle_stop_s=IDLE_S))
    outcomes: list[str] = []

    class Ask(MapFunction):
        def execute(self, data: int) -> int:
            until(lambda: "llm.cleanup 1" in journal)
            answer = self.call_service_async("llm", data)
            until(lambda: "llm.build 2" in journal)
            env.stop(drain)
            if drain:
                gate.set()
            try:
                outcomes.append(str(answer.result()))
            except ServiceUnavailableError as error:
                outcomes.append(str(error))
                gate.set()
            return data

    env.from_batch([1]).map(Ask).sink(abs)
    report = env.submit().wait()
    state, outcome = (Outcome.STOPPED, "1") if drain else (Outcome.CANCELLED, STOPPED)
    assert outcomes == [outcome]
    assert (report.state, report.cleanliness, report.errors) == (state, Cleanliness.CLEAN, ())
    assert journal[-2:] == (["llm.stop 2", "llm.cleanup 2"] if drain else ["llm.set up 2", "llm.cleanup 2"])


class FailsLater(Numbered):
    """Cannot be built the second time, nor the third with `twice`."""

    def __init__(self, journal: list[str], *, twice: bool = False) -> None:
        super().__init__(journal)
        if self.number in ((2, 3) if twice else (2,)):
            raise OSError("no memory")


@pytest.mark.parametrize("how", ["required", "restarted", "optional"])
def test_a_start_that_fails_after_a_rest_counts_as_at_a_restart(how: str) -> None:
    journal: list[str] = []
    env = LocalEnvironment("failing")
    options = ServiceOptions(
        idle_stop_s=IDLE_S,
        required=how != "optional",
        restart="on_failure" if how == "restarted" else "never",
        backoff_s=(0.01, 0.01),
    )
    llm = env.register_service("llm", FailsLater, journal, options=options)
    outcomes: list[str] = []

    def ask(number: int) -> int:
        until(lambda: "llm.cleanup 1" in journal)
        try:
            outcomes.append(str(llm.process(number)))
        except ServiceUnavailableError as error:
            outcomes.append(str(error))
        return number

    env.from_batch([7]).map(ask).sink(abs)
    if how == "required":
        with pytest.raises(JobError, match='service "llm" failed to be built: OSError: no memory'):
            env.submit(autostop=True)
    else:
        report = run(env)
        assert report.service("llm").restarts == (how == "restarted")
    assert outcomes == (["7"] if how == "restarted" else [STOPPED])
    assert [line for line in journal if line.startswith("llm.build")][:2] == ["llm.build 1", "llm.build 2"]


def test_a_service_that_rests_at_the_end_of_its_job_is_not_kept() -> None:
    journal: list[str] = []
    env = LocalEnvironment("kept")
    env.register_service("llm", Numbered, journal, options=ServiceOptions(idle_stop_s=IDLE_S))

    def wait(number: int) -> int:
        until(lambda: journal.count("llm.cleanup 1") == 1)
        return number

    env.from_batch([1]).map(wait).sink(abs)
    with env:
        first = env.submit(autostop=True, keep_services=True).wait()
        assert first.service("llm").state == "stopped"
        env.submit(autostop=True, keep_services=True)
    assert journal == [f"llm.{hook} {number}" for number in (1, 2) for hook in HOOKS]


@pytest.mark.parametrize(
    ("given", "text"),
    [
        ({"idle_stop_s": 0}, "service option idle_stop_s is 0"),
        ({"idle_stop_s": -1.5}, "service option idle_stop_s is -1.5"),
        ({"idle_stop_s": "60"}, "service option idle_stop_s is '60'"),
        ({"idle_stop_s": True}, "service option idle_stop_s is True"),
        ({"idle_stop_s": float("inf")}, "service option idle_stop_s is inf"),
        ({"idle_stop_s": 1, "replicas": 2}, "service options idle_stop_s and replicas do not go together"),
        ({"idle_stop_s": 1, "idempotent": True}, "service options idle_stop_s and idempotent do not go together"),
        (
            {"idle_stop_s": 1, "recycle_calls": 1, "host": "process"},
            "service options idle_stop_s and recycle_calls do not go together",
        ),
        ({"idle_stop_s": 1, "shared": True}, "service options idle_stop_s and shared do not go together"),
        ({"idle_stop_s": 1, "host": "ray"}, 'service options idle_stop_s and host="ray" do not go together'),
    ],
)
def test_options_that_cannot_work_are_refused_with_a_hint(given: dict[str, Any], text: str) -> None:
    with pytest.raises(GraphError) as caught:
        ServiceOptions(**given)
    assert text in str(caught.value)
    assert caught.value.__notes__


@pytest.mark.parametrize("call_timeout_s", [None, SOON_S])
def test_a_coroutine_that_would_block_the_event_loop_until_the_start_is_told(call_timeout_s: float | None) -> None:
    journal: list[str] = []
    env = LocalEnvironment("blocking")
    options = ServiceOptions(idle_stop_s=IDLE_S, call_timeout_s=call_timeout_s)
    llm = env.register_service("llm", Awaited, journal, options=options)

    async def ask(number: int) -> str:
        while "llm.cleanup 1" not in journal:
            await asyncio.sleep(0.001)
        with pytest.raises(ServiceError) as caught:
            llm.ask_plainly(number)
        assert "Write `await aio(handle).method(...)` there." in caught.value.__notes__[0]
        return str(caught.value)

    answers: list[str] = []
    env.from_batch([1]).map_async(ask).sink(answers.append)
    run(env)
    assert answers == ['service "llm" rests, and a coroutine must not block the event loop for its start']


def test_a_coroutine_that_calls_a_service_which_could_not_be_started_again_is_told_so() -> None:
    journal: list[str] = []
    methods: list[Callable[[int], int]] = []
    env = LocalEnvironment("failing")
    options = ServiceOptions(idle_stop_s=IDLE_S, required=False)
    llm = env.register_service("llm", FailsLater, journal, options=options)
    errors: list[str] = []

    def find(number: int) -> int:
        methods.append(llm.process)
        return number

    async def ask(number: int) -> int:
        while "llm.cleanup 1" not in journal:
            await asyncio.sleep(0.001)
        with pytest.raises(ServiceUnavailableError):
            await aio(llm).process(number)
        with pytest.raises(ServiceUnavailableError) as caught:
            methods[0](number)
        errors.append(str(caught.value))
        return number

    env.from_batch([1]).map(find).map_async(ask).sink(abs)
    run(env)
    assert errors == [STOPPED]


def test_a_recorded_service_may_rest_and_its_replay_does_not(tmp_path: Path) -> None:
    journal: list[str] = []
    reports: list[JobReport] = []
    for record in (True, False):
        env = LocalEnvironment("cassette")
        llm = env.register_service("llm", Numbered, journal, options=ServiceOptions(idle_stop_s=IDLE_S))
        (env.record_calls if record else env.replay_calls)(str(tmp_path / "calls.db"))

        def ask(number: int) -> int:
            if number == 2:
                until(lambda: "llm.cleanup 1" in journal)
            return int(llm.process(number))  # noqa: B023

        answers: list[int] = []
        env.from_batch([1, 2]).map(ask).sink(answers.append)
        reports.append(run(env))
        assert answers == [1, 2]
    recorded, replayed = (report.service("llm") for report in reports)
    assert (recorded.rested > 0, recorded.calls, recorded.errors) == (True, 2, 0)
    assert (replayed.rested, replayed.built_count, replayed.errors) == (0, 1, 0)
