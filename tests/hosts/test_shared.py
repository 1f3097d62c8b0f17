"""Services that environments of one process share: one instance, cleaned up once, by whoever is the last."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from support.recording_services import Broken, Recorded, report_of

import sage
from sage import (
    BaseService,
    Cleanliness,
    GraphError,
    JobError,
    LocalEnvironment,
    MapFunction,
    Outcome,
    ServiceOptions,
)
from sage.testing import assert_clean

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from sage._runtime.backend import Backend
    from sage._runtime.job import Job

    MakeBackend = Callable[[], Backend]

SOON_S = 20.0
"""Bound of every wait for something that happens at once on an idle machine."""

WHOLE_LIFE = ["memory.build", "memory.setup", "memory.start", "memory.stop", "memory.cleanup"]


@pytest.fixture(autouse=True)
def nothing_left() -> Iterator[None]:
    """Fail a test that leaves a thread, a process or a descriptor behind."""
    # Other programs of this machine leave files in the shared folder for temporary ones meanwhile.
    with assert_clean(ignore=("temporary file *", "temporary folder *", "shared memory *")):
        yield


def shared(**options: Any) -> ServiceOptions:
    return ServiceOptions(shared=True, **options)


class Ask(MapFunction):
    def execute(self, data: Any) -> Any:
        return self.call_service("memory", data)


class Quiet(BaseService):
    def __init__(self, *args: Any) -> None:
        self.args = args

    def process(self, data: Any) -> Any:
        return data


class Endless:
    """A stream that goes on until it is told to end, and says when the first record has come through."""

    def __init__(self, env: LocalEnvironment, *, once: bool = False) -> None:
        self.once = once
        self.flows = threading.Event()
        self.ends = threading.Event()
        env.from_source(self.read, delay=0.001).map(Ask).sink(self.take)

    def read(self) -> Any:
        if self.ends.is_set():
            return sage.StopSignal("the end")
        return None if self.once and self.flows.is_set() else 1

    def take(self, _: Any) -> None:
        self.flows.set()

    def wait(self) -> None:
        assert self.flows.wait(SOON_S)


def environment(name: str, target: Any, *args: Any, options: ServiceOptions | None = None) -> LocalEnvironment:
    env = LocalEnvironment(name)
    env.register_service("memory", target, *args, options=options or shared())
    return env


def two_running(
    target: Any, *args: Any, options: ServiceOptions | None = None, once: bool = False
) -> tuple[Job, Endless, Job, Endless]:
    """Run two environments that share a service, both with records flowing."""
    found: list[Any] = []
    for name in ("first", "second"):
        env = environment(name, target, *args, options=options)
        stream = Endless(env, once=once)
        found += [env.submit(), stream]
        stream.wait()
    return tuple(found)


def test_one_environment_alone(backend: MakeBackend) -> None:
    journal: list[str] = []
    taken: list[int] = []
    env = LocalEnvironment("alone", backend=backend)
    env.register_service("memory", Recorded, journal, options=shared())
    env.from_batch([1, 2, 3]).map(Ask).sink(taken.append)
    job = env.submit(autostop=True)
    assert taken == [1, 2, 3]
    assert journal == WHOLE_LIFE
    assert job.report is not None
    report = job.report.service("memory")
    assert (report.state, report.calls, report.released) == ("stopped", 3, False)
    assert job.report.cleanliness is Cleanliness.CLEAN


def test_two_environments_have_one_instance_and_the_last_one_cleans_it() -> None:
    journal: list[str] = []
    first, _, second, stream = two_running(Recorded, journal)
    first.stop()
    assert journal == WHOLE_LIFE[:3]
    assert first.report is not None
    report = first.report.service("memory")
    assert (report.state, report.released) == ("stopped", True)
    assert "released" in str(first.report)
    assert first.report.cleanliness is Cleanliness.CLEAN
    assert second.state == "running"
    stream.ends.set()
    second.wait()
    assert journal == WHOLE_LIFE
    assert second.report is not None
    assert not second.report.service("memory").released


def test_cancelling_one_leaves_the_other_alone() -> None:
    journal: list[str] = []
    first, _, second, stream = two_running(Recorded, journal)
    first.cancel()
    assert journal == WHOLE_LIFE[:3]
    stream.flows.clear()
    stream.wait()
    stream.ends.set()
    second.wait()
    assert journal == WHOLE_LIFE


def test_one_after_the_other_builds_anew() -> None:
    journal: list[str] = []
    for _ in range(2):
        env = environment("again", Recorded, journal)
        env.from_batch([1]).map(Ask).sink(lambda _: None)
        env.submit(autostop=True)
    assert journal == WHOLE_LIFE * 2


def test_a_limit_of_calls_holds_over_all_environments() -> None:
    class Narrow(BaseService):
        def __init__(self) -> None:
            self.inside = 0
            self.lock = threading.Lock()

        def process(self, data: Any) -> Any:
            with self.lock:
                self.inside += 1
                seen.append(self.inside)
            time.sleep(0.001)  # the work
            with self.lock:
                self.inside -= 1
            return data

    seen: list[int] = []
    first, _, second, _ = two_running(Narrow, options=shared(concurrency=1))
    first.stop()
    second.stop()
    assert set(seen) == {1}


def test_twenty_threads_at_once() -> None:
    journal: list[str] = []
    taken: list[int] = []
    barrier = threading.Barrier(20)
    errors: list[BaseException] = []

    def run() -> None:
        env = environment("one of many", Recorded, journal, options=shared(concurrency=None))
        env.from_batch([1, 2, 3]).map(Ask).sink(taken.append)
        barrier.wait(SOON_S)
        try:
            env.submit(autostop=True)
        except BaseException as error:  # shown below
            errors.append(error)

    threads = [threading.Thread(target=run) for _ in range(20)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(SOON_S * 3)
    assert not errors
    assert sorted(taken) == sorted([1, 2, 3] * 20)
    # However many instances followed each other, no two overlapped, and each was cleaned up once.
    hooks = [entry.removesuffix(" during a call") for entry in journal]
    assert hooks == WHOLE_LIFE * (len(hooks) // len(WHOLE_LIFE))
    assert hooks == journal


@pytest.mark.parametrize(
    ("args", "options", "different"),
    [
        ((Quiet, "other"), {}, "argument 0"),
        ((Recorded, "secret"), {}, "class or function"),
        ((Quiet, "secret", 1), {}, "number or names of arguments"),
        ((Quiet, "secret"), {"concurrency": 7}, "option concurrency"),
    ],
)
def test_what_differs_is_named_at_submit(args: tuple[Any, ...], options: dict[str, Any], different: str) -> None:
    env = environment("first", Quiet, "secret")
    stream = Endless(env)
    job = env.submit()
    stream.wait()
    other = environment("second", *args, options=shared(**options))
    other.from_batch([1]).sink(lambda _: None)
    with pytest.raises(GraphError, match=f'"memory" is shared, and runs already with another {different}') as caught:
        other.submit(autostop=True)
    assert "secret" not in str(caught.value)
    assert "Register it with the same settings in all environments" in caught.value.__notes__[0]
    job.stop()


def test_what_belongs_to_one_environment_is_refused() -> None:
    env = LocalEnvironment("mixed")
    own = env.register_service("own", Quiet)
    env.register_service("memory", Quiet, own, options=shared())
    env.from_batch([1]).sink(lambda _: None)
    with pytest.raises(GraphError, match='"memory" is shared, and cannot depend on "own" of one environment'):
        env.submit(autostop=True)
    env.register_service("memory", Quiet, options=shared(depends_on=["own"], replace=True))
    with pytest.raises(GraphError, match="cannot depend on"):
        env.submit(autostop=True)


def test_a_failing_start_fails_whoever_waits_for_it() -> None:
    begins, goes_on = threading.Event(), threading.Event()

    class Late(Recorded):
        def setup(self) -> None:
            self.note("setup")
            begins.set()
            assert goes_on.wait(SOON_S)
            raise ValueError("no disk")

    journal: list[str] = []
    first = environment("first", Late, journal)
    second = environment("second", Late, journal)
    for env in (first, second):
        env.from_batch([1]).sink(lambda _: None)
    jobs = [first.submit()]
    assert begins.wait(SOON_S)
    jobs.append(second.submit())
    goes_on.set()
    for job in jobs:
        with pytest.raises(JobError, match="no disk"):
            job.wait()
        assert job.report is not None
        assert job.report.state is Outcome.FAILED
        assert job.report.cleanliness is Cleanliness.CLEAN
        assert job.report.service("memory").state == "failed_start"
    hooks = ["memory.build", "memory.setup", "memory.cleanup"]
    assert journal in (hooks, hooks * 2)  # the second may have come when the first start had failed already


def test_an_error_of_the_cleanup_is_in_the_report_of_the_last() -> None:
    first, _, second, _ = two_running(Broken, [], "cleanup", ValueError("disk full"))
    first.stop()
    assert first.report is not None
    assert first.report.cleanliness is Cleanliness.CLEAN
    with pytest.raises(JobError, match="disk full"):
        second.stop()
    assert second.report is not None
    assert second.report.cleanliness is Cleanliness.DIRTY
    assert second.report.service("memory").state == "cleanup_failed"


def test_a_kept_one_counts_until_the_environment_is_closed() -> None:
    journal: list[str] = []
    keeping = environment("keeping", Recorded, journal)
    keeping.from_batch([1]).map(Ask).sink(lambda _: None)
    keeping.submit(autostop=True, keep_services=True)
    assert report_of(keeping).service("memory").state == "kept"
    other = environment("other", Recorded, journal)
    other.from_batch([1]).map(Ask).sink(lambda _: None)
    other.submit(autostop=True)
    assert journal == WHOLE_LIFE[:3]
    assert report_of(other).service("memory").released
    keeping.submit(autostop=True)
    assert journal == WHOLE_LIFE[:3]
    keeping.close()
    assert journal == WHOLE_LIFE


class Sick(Recorded):
    """Fails its health check on demand."""

    is_well = threading.Event()

    def health(self) -> bool:
        return self.is_well.is_set()


def test_a_failure_for_good_fails_every_job_and_is_cleaned_once() -> None:
    Sick.is_well.set()
    journal: list[str] = []
    first, _, second, _ = two_running(Sick, journal, options=shared(health_interval_s=0.01))
    Sick.is_well.clear()
    for job in (first, second):
        with pytest.raises(JobError) as caught:
            job.wait(SOON_S)
        assert 'service "memory" failed' in str(caught.value) or "takes no more calls" in str(caught.value)
        assert job.report is not None
        assert job.report.state is Outcome.FAILED
        assert job.report.cleanliness is Cleanliness.CLEAN
    assert journal == WHOLE_LIFE


def test_what_may_be_absent_fails_without_its_job() -> None:
    Sick.is_well.set()
    journal: list[str] = []
    options = shared(health_interval_s=0.01, required=False)
    env = environment("does without", Sick, journal, options=options)
    ends = threading.Event()
    env.from_source(lambda: sage.StopSignal("the end") if ends.is_set() else None, delay=0.001).sink(lambda _: None)
    job = env.submit()
    wait_until(lambda: "memory.start" in journal and job.state == "running")
    Sick.is_well.clear()
    wait_until(lambda: "memory" not in job.dispatcher.services)
    ends.set()
    report = job.wait(SOON_S)
    assert report.state is Outcome.COMPLETED
    assert report.service("memory").state == "failed"
    assert "failed for all who share it" in str(report.errors[0])
    assert journal == WHOLE_LIFE


def test_a_restart_goes_on_inside_for_all() -> None:
    class Once(Recorded):
        def health(self) -> bool:
            return journal.count("memory.build") > 1 or not fails.is_set()

    fails = threading.Event()
    journal: list[str] = []
    options = shared(health_interval_s=0.01, restart="on_failure", backoff_s=(0.01, 0.01))
    first, one, second, two = two_running(Once, journal, options=options)
    fails.set()
    wait_until(lambda: journal.count("memory.start") == 2)
    for stream in (one, two):
        stream.flows.clear()
        stream.wait()
    first.stop()
    second.stop()
    assert journal == WHOLE_LIFE * 2


def wait_until(condition: Callable[[], bool]) -> None:
    due = time.monotonic() + SOON_S
    while not condition():
        assert time.monotonic() < due
        time.sleep(0.005)


class Remote(BaseService):
    """Runs in a process of its own, and can be told to die there."""

    def __init__(self, journal: str) -> None:
        self.journal = Path(journal)
        self.note("build")

    def note(self, hook: str) -> None:
        with self.journal.open("a") as file:
            file.write(f"{hook}\n")

    def cleanup(self) -> None:
        self.note("cleanup")

    def process(self, data: Any) -> Any:
        return data

    def pid(self) -> int:
        return os.getpid()


def test_a_process_is_shared_as_well(tmp_path: Path) -> None:
    journal = tmp_path / "journal"
    first, _, second, _ = two_running(Remote, str(journal), options=shared(host="process"))
    first.stop()
    assert journal.read_text().split() == ["build"]
    second.stop()
    assert journal.read_text().split() == ["build", "cleanup"]
    reports = [job.report.service("memory") for job in (first, second)]
    assert [(report.host, report.released, report.exit_code) for report in reports] == [
        ("process", True, None),
        ("process", False, 0),
    ]
    assert len({report.pid for report in reports}) == 1


def test_the_death_of_its_process_is_told_to_every_job(tmp_path: Path) -> None:
    journal = tmp_path / "journal"
    first, _, second, _ = two_running(Remote, str(journal), options=shared(host="process"), once=True)
    host = first.dispatcher.supervisor.hosts["memory"]
    pid = host.facts().pid
    assert pid is not None
    os.kill(pid, signal.SIGKILL)
    for job in (first, second):
        with pytest.raises(JobError):
            job.wait(SOON_S)
        assert job.report is not None
        assert job.report.state is Outcome.FAILED
        assert job.report.cleanliness is Cleanliness.DIRTY
        assert job.report.service("memory").state == "lost"
    assert journal.read_text().split() == ["build"]


def test_a_kill_takes_an_instance_along_that_nobody_else_uses() -> None:
    hangs, goes_on = threading.Event(), threading.Event()

    class Hanging(Recorded):
        def cleanup(self) -> None:
            self.note("cleanup")
            hangs.set()
            goes_on.wait(SOON_S)

    journal: list[str] = []
    first, _, second, _ = two_running(Hanging, journal)
    for _ in range(3):
        first._interrupt(signal.SIGINT)
    with pytest.raises(JobError):
        first.wait(SOON_S)
    assert journal == WHOLE_LIFE[:3]
    second._interrupt(signal.SIGINT)
    assert hangs.wait(SOON_S)
    for _ in range(2):
        second._interrupt(signal.SIGINT)
    try:
        with pytest.raises(JobError, match="did not end its cleanup in time"):
            second.wait(SOON_S)
    finally:
        goes_on.set()
    assert journal == WHOLE_LIFE
    assert second.report is not None
    assert second.report.service("memory").state == "abandoned"


def test_a_cleanup_that_hangs_is_bounded_by_its_own_options() -> None:
    goes_on = threading.Event()

    class Hanging(Recorded):
        def cleanup(self) -> None:
            self.note("cleanup")
            goes_on.wait(SOON_S)

    env = environment("hangs", Hanging, [], options=shared(stop_timeout_s=0.2))
    env.from_batch([1]).map(Ask).sink(lambda _: None)
    try:
        with pytest.raises(JobError, match="did not end its cleanup in time and was abandoned"):
            env.submit(autostop=True)
    finally:
        goes_on.set()
    assert report_of(env).cleanliness is Cleanliness.DIRTY


def test_calls_with_a_bound_and_attributes() -> None:
    class Slow(BaseService):
        size = 3

        def process(self, data: Any) -> Any:
            goes_on.wait(SOON_S)
            return data

    goes_on = threading.Event()
    env = LocalEnvironment("bounded")
    handle = env.register_service("memory", Slow, options=shared(call_timeout_s=0.05))
    taken: list[Any] = []

    def ask(data: int) -> Any:
        try:
            return handle.process(data)
        except sage.ServiceTimeoutError:
            goes_on.set()
            return handle.size

    env.from_batch([1]).map(ask).sink(taken.append)
    env.submit(autostop=True)
    assert taken == [3]


PROGRAM = """
import os, sys
from sage import BaseService, LocalEnvironment, ServiceOptions

class Noted(BaseService):
    def __init__(self):
        print("build", flush=True)
    def cleanup(self):
        print("cleanup", flush=True)

def env_of(name):
    env = LocalEnvironment(name)
    env.register_service("memory", Noted, options=ServiceOptions(shared=True))
    return env

keeping = env_of("keeping")
keeping.from_batch([1]).sink(lambda record: None)
keeping.submit(autostop=True, keep_services=True)
running = env_of("running")
running.from_source(lambda: None, delay=0.01).sink(lambda record: None)
job = running.submit()
child = os.fork()
if child == 0:
    own = env_of("of the child")
    own.from_batch([1]).sink(lambda record: None)
    own.submit(autostop=True)
    os._exit(0)
os.waitpid(child, 0)
print("exit", flush=True)
"""


def test_at_the_end_of_the_interpreter_it_is_cleaned_once(tmp_path: Path) -> None:
    """A forked child has an instance of its own."""
    script = tmp_path / "program.py"
    script.write_text(PROGRAM)
    environ = {**os.environ, "PYTHONPATH": str(Path(sage.__file__).parents[1])}
    result = subprocess.run(
        [sys.executable, "-W", "ignore", str(script)], env=environ, capture_output=True, text=True, timeout=60
    )
    assert result.returncode == 0, result.stderr
    assert result.stdout.split() == ["build", "build", "cleanup", "exit", "cleanup"], result.stderr
