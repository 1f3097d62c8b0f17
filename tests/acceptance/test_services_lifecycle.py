"""Services are up before the first record, and down before anyone who waits is told that the job is over."""

from __future__ import annotations

import contextlib
import itertools
import os
import re
import subprocess
import sys
import threading
import time
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import pytest
from support.recording_services import Broken, Journal, Notes, Recorded, SlowlyMarked, assert_same, report_of

import sage
from sage import (
    BaseService,
    Cleanliness,
    CleanupError,
    CleanupTimeoutError,
    FunctionError,
    JobError,
    JobErrorGroup,
    LocalEnvironment,
    MapFunction,
    Outcome,
    ServiceOptions,
    SinkFunction,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from support.fair_clock import FairClock

    from sage._runtime.backend import Backend

    MakeBackend = Callable[[], Backend]
    Host = Literal["inline", "process"]

PROMPTLY_S = 0.5


def ends(journal: Journal) -> list[str]:
    """Return only the hooks that end services."""
    return [entry for entry in journal if ".stop" in entry or ".cleanup" in entry]


def run_script(folder: Path, text: str) -> subprocess.CompletedProcess[str]:
    """Run a program as a user does, in a process of its own."""
    script = folder / "program.py"
    script.write_text(text)
    environment = {**os.environ, "PYTHONPATH": str(Path(sage.__file__).parents[1])}
    return subprocess.run(
        [sys.executable, str(script)], cwd=folder, env=environment, capture_output=True, text=True, timeout=30
    )


# --- the end of a job -------------------------------------------------------------------------------------------------


def test_cleanup_is_over_when_submit_returns(backend: MakeBackend, host: Host, tmp_path: Path) -> None:
    """The marker of the cleanup stands there when submit returns."""
    marker, arrived = tmp_path / "marker", list[int]()
    env = LocalEnvironment(backend=backend)
    adder = env.register_service("adder", SlowlyMarked, marker, 0.2, options=ServiceOptions(host=host))
    env.from_batch([1, 2, 3]).map(adder.process).sink(arrived.append)
    job = env.submit(autostop=True)
    assert marker.read_text() == "cleaned\n"
    assert arrived == [2, 3, 4]
    assert job.report is not None
    assert (job.report.state, job.report.cleanliness) == (Outcome.COMPLETED, Cleanliness.CLEAN)
    assert job.report.service("adder").calls == 3


PROGRAM = """
from sage import BaseService, BatchFunction, LocalEnvironment, MapFunction, ServiceOptions, SinkFunction

class Numbers(BatchFunction):
    def __init__(self):
        super().__init__()
        self.left = [1, 2, 3]
    def execute(self):
        return self.left.pop(0) if self.left else None

class Adder(BaseService):
    def add(self, x):
        return x + 1
    def cleanup(self):
        import time
        time.sleep(0.3)
        with open("marker", "a") as file:
            file.write("cleaned\\n")

class Add(MapFunction):
    def execute(self, data):
        return self.call_service("adder", data, method="add")

class Show(SinkFunction):
    def execute(self, data):
        print(data)

env = LocalEnvironment("program")
env.register_service("adder", Adder, options=ServiceOptions(host={host!r}))
env.from_batch(Numbers).map(Add).sink(Show)
env.submit(autostop=True)
"""


def test_a_script_whose_last_statement_is_submit(host: Host, tmp_path: Path) -> None:
    """The process does not end before the cleanup, which happens once."""
    done = run_script(tmp_path, PROGRAM.replace("{host!r}", repr(host)))
    assert (done.returncode, done.stdout, done.stderr) == (0, "2\n3\n4\n", "")
    assert (tmp_path / "marker").read_text() == "cleaned\n"


WAYS = {
    "the source ends": Outcome.COMPLETED,
    "a map fails": Outcome.FAILED,
    "stop": Outcome.STOPPED,
    "cancel": Outcome.CANCELLED,
}


@pytest.mark.parametrize("way", WAYS)
def test_every_service_ends_once_in_reverse_order(backend: MakeBackend, host: Host, journal: Notes, way: str) -> None:
    """Whatever ends the job, also a stop from one of its own tasks."""
    arrived = list[int]()
    env = LocalEnvironment(backend=backend)
    for name in ("a", "b", "c"):
        env.register_service(name, Recorded, journal, options=ServiceOptions(host=host))

    class Step(MapFunction):
        def execute(self, data: int) -> int:
            assert [self.call_service(name, data) for name in ("c", "a", "b")] == [data] * 3
            if data == 5 and way == "a map fails":
                raise ValueError("five")
            if data == 5 and way == "stop":
                env.stop()
            if data == 5 and way == "cancel":
                env.jobmanager.jobs[env.env_uuid].cancel()
            return data

    numbers = itertools.count()
    stream = env.from_batch(range(10)) if way == "the source ends" else env.from_source(lambda: next(numbers))
    stream.map(Step).sink(arrived.append)
    with pytest.raises(FunctionError, match="five") if way == "a map fails" else contextlib.nullcontext():
        env.submit(autostop=True)
    assert ends(journal) == ["c.stop", "c.cleanup", "b.stop", "b.cleanup", "a.stop", "a.cleanup"]
    assert report_of(env).state is WAYS[way]
    assert report_of(env).cleanliness is Cleanliness.CLEAN


@pytest.mark.parametrize("declared", [True, False])
def test_a_service_ends_before_what_it_requires(
    backend: MakeBackend, host: Host, journal: Notes, declared: bool
) -> None:
    """A requires B requires C, in whatever order they are registered."""
    env = LocalEnvironment(backend=backend)
    if declared:
        env.register_service("a", Recorded, journal, options=ServiceOptions(host=host, depends_on=["b"]))
        env.register_service("b", Recorded, journal, options=ServiceOptions(host=host, depends_on=["c"]))
        env.register_service("c", Recorded, journal, options=ServiceOptions(host=host))
    else:
        c = env.register_service("c", Recorded, journal, options=ServiceOptions(host=host))
        b = env.register_service("b", Recorded, journal, c, options=ServiceOptions(host=host))
        env.register_service("a", Recorded, journal, b.process, options=ServiceOptions(host=host))
    env.from_batch([1]).sink(lambda data: journal.append("record"))
    env.submit(autostop=True)
    hooks = ("build", "setup", "start")
    starts = [f"{name}.{hook}" for name in "cba" for hook in hooks]
    assert journal == [*starts, "record", *(f"{name}.{hook}" for name in "abc" for hook in ("stop", "cleanup"))]


def test_no_service_stops_during_a_call() -> None:
    """One task fails while the calls of the others run; stop and cleanup come after them."""
    journal, in_call = list[str](), threading.Barrier(3)

    class Slow(Recorded):
        def work(self, data: int) -> int:
            self.calls_running += 1
            in_call.wait(10)
            if data == 0:
                self.calls_running -= 1
                raise ValueError("zero")
            time.sleep(0.2)
            self.note("answer")
            self.calls_running -= 1
            return data

    env = LocalEnvironment()
    slow = env.register_service("slow", Slow, journal, options=ServiceOptions(concurrency=None))
    env.from_batch([0, 1, 2]).keyby(lambda data: data, strategy="round_robin").map(slow.work, parallelism=3).sink(print)
    with pytest.raises(JobError, match="zero"):
        env.submit(autostop=True)
    assert ends(journal) == ["slow.stop", "slow.cleanup"]
    assert len([entry for entry in journal if "answer" in entry]) == 2
    assert journal.index("slow.stop") > max(place for place, entry in enumerate(journal) if "answer" in entry)


def test_no_service_stops_before_an_asynchronous_call_that_nobody_waits_for(host: Host, journal: Notes) -> None:
    """A call that the last record left behind ends before stop and cleanup."""

    class Slow(Recorded):
        def work(self) -> None:
            time.sleep(0.2)
            self.journal.append("answer")

    class Leave(MapFunction):
        def execute(self, data: int) -> int:
            self.call_service_async("slow", method="work")
            return data

    env = LocalEnvironment()
    env.register_service("slow", Slow, journal, options=ServiceOptions(host=host))
    env.from_batch([1]).map(Leave).sink(lambda data: None)
    env.submit(autostop=True)
    assert journal[3:] == ["answer", "slow.stop", "slow.cleanup"]


def test_submit_returns_after_a_slow_cleanup(host: Host, journal: Notes, clock: FairClock) -> None:
    """A service that a sink calls takes 4 s to clean up."""

    class Slow(BaseService):
        def cleanup(self) -> None:
            time.sleep(4.0)
            journal.append(str(time.monotonic()))  # the same clock in every process

        def process(self, data: int) -> None:
            pass

    class Store(SinkFunction):
        def execute(self, data: int) -> None:
            self.call_service("slow", data)

    env = LocalEnvironment()
    env.register_service("slow", Slow, options=ServiceOptions(host=host))
    env.from_batch([1, 2, 3]).sink(Store)
    job = env.submit(autostop=True)
    returned_at = time.monotonic()
    [over_at] = [float(line) for line in journal]
    assert returned_at >= over_at
    assert clock.elapsed_s(over_at, returned_at) < PROMPTLY_S
    assert job.report is not None
    [cleanup] = [hook for hook in job.report.service("slow").hooks if hook.hook == "cleanup"]
    assert cleanup.outcome == "ok"
    assert cleanup.duration_s >= 4.0


# --- cleanups that go wrong -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "error", [OSError("disk full"), SystemExit(3), KeyboardInterrupt("enough"), GeneratorExit("over")], ids=repr
)
@pytest.mark.parametrize("hook", ["stop", "cleanup"])
def test_a_hook_that_raises_does_not_stop_the_others(
    backend: MakeBackend, host: Host, journal: Notes, hook: str, error: BaseException
) -> None:
    """Everything else is cleaned, and the error arrives in report and group."""
    arrived = list[int]()
    env = LocalEnvironment("jobs", backend=backend)
    env.register_service("a", Recorded, journal, options=ServiceOptions(host=host))
    env.register_service("b", Broken, journal, hook, error, options=ServiceOptions(host=host))
    env.register_service("c", Recorded, journal, options=ServiceOptions(host=host))
    env.from_batch([1, 2, 3]).sink(arrived.append)
    with pytest.raises(JobErrorGroup, match='job "jobs" COMPLETED and DIRTY') as caught:
        env.submit(autostop=True)
    assert ends(journal) == ["c.stop", "c.cleanup", "b.stop", "b.cleanup", "a.stop", "a.cleanup"]
    assert arrived == [1, 2, 3]
    [inner] = caught.value.exceptions
    assert isinstance(inner, CleanupError)
    assert inner.service == "b"
    assert_same(inner.__cause__, error, host)
    assert str(inner) == f'service "b" failed in {hook}: {type(error).__name__}: {error}'
    report = report_of(env)
    assert (report.state, report.cleanliness) == (Outcome.COMPLETED, Cleanliness.DIRTY)
    assert report.errors == (inner,)
    assert report.service("b").state == "cleanup_failed"
    [failed] = [entry for entry in report.service("b").hooks if entry.outcome == "error"]
    assert (failed.hook, failed.error) == (hook, f"{type(error).__name__}: {error}")
    assert [report.service(name).state for name in "ac"] == ["stopped", "stopped"]
    assert "COMPLETED and DIRTY" in str(report)


def test_two_of_three_cleanups_raise(backend: MakeBackend, host: Host, journal: Notes) -> None:
    """Both errors are in the group, and the third service is cleaned."""
    env = LocalEnvironment(backend=backend)
    env.register_service("a", Broken, journal, "cleanup", OSError("first"), options=ServiceOptions(host=host))
    env.register_service("b", Recorded, journal, options=ServiceOptions(host=host))
    env.register_service("c", Broken, journal, "cleanup", OSError("last"), options=ServiceOptions(host=host))
    env.from_batch([1]).sink(lambda data: None)
    with pytest.raises(JobErrorGroup) as caught:
        env.submit(autostop=True)
    assert [str(error.__cause__) for error in caught.value.exceptions] == ["last", "first"]
    assert all(isinstance(error, CleanupError) for error in caught.value.exceptions)
    assert Counter(ends(journal)) == Counter(f"{name}.{hook}" for name in "abc" for hook in ("stop", "cleanup"))
    assert report_of(env).state is Outcome.COMPLETED


def test_the_job_and_a_cleanup_fail(backend: MakeBackend, host: Host, journal: Notes) -> None:
    """Nothing is lost, and the cause of the end comes first."""
    env = LocalEnvironment(backend=backend)
    env.register_service("memory", Broken, journal, "cleanup", OSError("disk full"), options=ServiceOptions(host=host))

    def fail(data: int) -> int:
        raise ValueError("bad record")

    env.from_batch([1]).map(fail, name="fail").sink(lambda data: None)
    with pytest.raises(JobErrorGroup, match="FAILED and DIRTY") as caught:
        env.submit(autostop=True)
    first, second = caught.value.exceptions
    assert isinstance(first, FunctionError)
    assert (first.operator, str(first.__cause__)) == ("fail", "bad record")
    assert isinstance(second, CleanupError)
    assert (second.service, str(second.__cause__)) == ("memory", "disk full")
    assert report_of(env).errors == (first, second)
    assert (report_of(env).state, report_of(env).cleanliness) == (Outcome.FAILED, Cleanliness.DIRTY)


def test_close_raises_in_three_tasks(backend: MakeBackend, host: Host, journal: Notes) -> None:
    """All three errors are in the group, and the services are cleaned."""

    class Close(MapFunction):
        def execute(self, data: int) -> int:
            return data

        def close(self) -> None:
            raise OSError(f"close {self.ctx.parallel_index}")

    env = LocalEnvironment(backend=backend)
    env.register_service("memory", Recorded, journal, options=ServiceOptions(host=host))
    env.from_batch(range(9)).rebalance().map(Close, parallelism=3).sink(lambda data: None)
    with pytest.raises(JobErrorGroup) as caught:
        env.submit(autostop=True)
    assert sorted(str(error.__cause__) for error in caught.value.exceptions) == ["close 0", "close 1", "close 2"]
    assert ends(journal) == ["memory.stop", "memory.cleanup"]


@pytest.fixture
def released() -> Iterator[threading.Event]:
    """Return what hanging hooks wait for, so that their threads end with the test."""
    event = threading.Event()
    yield event
    event.set()


class Hanging(Recorded):
    """Does not come back from one of its hooks."""

    def __init__(self, journal: Journal, hook: str, released: threading.Event) -> None:
        self.hook, self.released = hook, released
        super().__init__(journal)

    def note(self, hook: str) -> None:
        super().note(hook)
        if hook == self.hook:
            self.hang_here()

    def hang_here(self) -> None:
        self.released.wait()


@pytest.mark.parametrize("hook", ["stop", "cleanup"])
def test_a_hook_that_never_returns_is_abandoned(hook: str, released: threading.Event, clock: FairClock) -> None:
    """It costs its bound, and the others and its own cleanup get their turn."""
    journal = list[str]()
    env = LocalEnvironment()
    env.register_service("a", Recorded, journal)
    env.register_service("b", Hanging, journal, hook, released, options=ServiceOptions(stop_timeout_s=0.3))
    env.register_service("c", Recorded, journal)
    env.from_batch([1]).sink(lambda data: None)
    began_at = time.monotonic()
    with pytest.raises(JobErrorGroup, match="COMPLETED and DIRTY") as caught:
        env.submit(autostop=True)
    assert clock.elapsed_s(began_at) < 0.3 + 1.0
    assert ends(journal) == ["c.stop", "c.cleanup", "b.stop", "b.cleanup", "a.stop", "a.cleanup"]
    [error] = caught.value.exceptions
    assert isinstance(error, CleanupTimeoutError)
    assert str(error) == f'service "b" did not end its {hook} in time and was abandoned'
    assert error.service == "b"
    assert "hang_here" in "\n".join(error.__notes__)
    report = report_of(env)
    assert (report.state, report.cleanliness) == (Outcome.COMPLETED, Cleanliness.DIRTY)
    assert report.service("b").state == "abandoned"
    assert "hang_here" in (report.service("b").stack or "")
    assert "DIRTY" in str(report)
    assert re.search(rf"{hook} [0-9.]+ m?s ABANDONED", str(report))


# --- which services there are -----------------------------------------------------------------------------------------


def test_a_service_that_nobody_calls_is_cleaned(backend: MakeBackend, host: Host, journal: Notes) -> None:
    """Started and cleaned, as any other."""
    env = LocalEnvironment(backend=backend)
    env.register_service("idle", Recorded, journal, options=ServiceOptions(host=host))
    env.from_batch([1, 2]).sink(lambda data: None)
    env.submit(autostop=True)
    assert journal == ["idle.build", "idle.setup", "idle.start", "idle.stop", "idle.cleanup"]
    assert report_of(env).service("idle").calls == 0


def plain_services(journal: Journal) -> dict[str, Callable[..., Any]]:
    """Return services in every form but the usual one; each writes when it is opened and closed."""

    class OnlyClose:
        def process(self, data: int) -> int:
            return data + 1

        def close(self) -> None:
            journal.append("closed")

    class OnlyShutdown:
        def process(self, data: int) -> int:
            return data + 1

        def shutdown(self) -> None:
            journal.append("closed")

    class Managed:
        def __enter__(self) -> Managed:
            journal.append("entered")
            return self

        def __exit__(self, *_: object) -> None:
            journal.append("closed")

        def process(self, data: int) -> int:
            return data + 1

    class WithoutSuper(BaseService):
        def __init__(self) -> None:
            self.amount = 1

        def process(self, data: int) -> int:
            assert self.name == "adder"
            return data + self.amount

        def cleanup(self) -> None:
            journal.append("closed")

    class Coroutines:
        async def process(self, data: int) -> int:
            return data + 1

        async def cleanup(self) -> None:
            journal.append("closed")

    @contextlib.contextmanager
    def generated() -> Iterator[OnlyShutdown]:
        journal.append("entered")
        yield OnlyShutdown()
        journal.append("closed")

    return {
        "close": OnlyClose,
        "shutdown": OnlyShutdown,
        "context manager": Managed,
        "constructor without super": WithoutSuper,
        "function": lambda: OnlyClose(),
        "coroutines": Coroutines,
        "generator as context manager": generated,
    }


@pytest.mark.parametrize("form", plain_services([]))
def test_a_service_of_any_form_works_and_is_closed(backend: MakeBackend, host: Host, journal: Notes, form: str) -> None:
    """No form needs anything of ours, and each is closed at the end, once."""
    arrived = list[int]()
    env = LocalEnvironment(backend=backend)
    adder = env.register_service("adder", plain_services(journal)[form], options=ServiceOptions(host=host))
    env.from_batch([1, 2]).map(adder).sink(arrived.append)
    env.submit(autostop=True)
    assert arrived == [2, 3]
    assert journal == (["entered", "closed"] if "context manager" in form else ["closed"])
    assert report_of(env).cleanliness is Cleanliness.CLEAN
