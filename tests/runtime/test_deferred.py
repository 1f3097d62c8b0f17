"""What a service leaves to its teardown: deferred callbacks, work in hand, and more time."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable

import pytest

import sage
from sage.service import ServiceContext


def run(cls: Callable[..., object], *args: object, **options: float) -> sage.JobReport:
    """Run a job with one service and return its report, whether or not it failed."""
    env = sage.LocalEnvironment("deferred")
    env.register_service("it", cls, *args, options=sage.ServiceOptions(**options))  # type: ignore[arg-type]
    env.from_batch([1]).sink(lambda _: None)
    job = env.submit()
    try:
        return job.wait(20)
    except sage.JobError:
        assert job.report is not None
        return job.report


class Deferring(sage.BaseService):
    """Defers in its constructor, and fails where it is told to."""

    def __init__(self, seen: list[str], fails: str = "") -> None:
        self.seen, self.fails = seen, fails
        self.ctx.defer(lambda: self.note("first"))
        self.ctx.defer(lambda: self.note("second"))
        self.note("constructor")

    def note(self, what: str) -> None:
        self.seen.append(what)
        if what == self.fails:
            raise RuntimeError(f"{what} failed")

    def stop(self) -> None:
        self.note("stop")

    def cleanup(self) -> None:
        self.note("cleanup")


def test_what_was_deferred_is_called_after_the_cleanup_the_last_first() -> None:
    seen: list[str] = []
    report = run(Deferring, seen)
    assert seen == ["constructor", "stop", "cleanup", "second", "first"]
    assert report.cleanliness == "clean"


def test_what_was_deferred_is_called_if_the_constructor_raised_half_way() -> None:
    seen: list[str] = []
    report = run(Deferring, seen, "constructor")
    assert seen == ["constructor", "second", "first"]
    assert report.service("it").state == "failed_start"
    assert [hook.hook for hook in report.service("it").hooks] == ["build", "cleanup"]


@pytest.mark.parametrize("fails", ["cleanup", "second", "first"])
def test_a_deferred_callback_that_raises_is_an_error_of_the_cleanup(fails: str) -> None:
    seen: list[str] = []
    report = run(Deferring, seen, fails)
    assert seen == ["constructor", "stop", "cleanup", "second", "first"]
    assert report.service("it").state == "cleanup_failed"
    assert str(report.errors[0]) == f'service "it" failed in cleanup: RuntimeError: {fails} failed'


def test_a_class_without_a_cleanup_gets_one_by_deferring() -> None:
    seen: list[str] = []

    class Plain(sage.BaseService):
        def setup(self) -> None:
            async def close() -> None:
                seen.append("closed")

            self.ctx.defer(close)

    report = run(Plain)
    assert seen == ["closed"]
    assert [hook.hook for hook in report.service("it").hooks] == ["build", "setup", "drain", "cleanup"]


def test_work_that_a_service_took_in_is_ended_before_it_stops() -> None:
    seen: list[object] = []

    class Queued(sage.BaseService):
        def __init__(self) -> None:
            self.work: queue.Queue[int | None] = queue.Queue()
            self.thread = threading.Thread(target=self.do)

        def start(self) -> None:
            for number in range(3):
                self.work.put(number)
            self.thread.start()

        def do(self) -> None:
            while (number := self.work.get()) is not None:
                seen.append(number)

        def drain(self) -> None:
            self.work.put(None)
            self.thread.join()
            seen.append("drained")

        def stop(self) -> None:
            seen.append("stop")

    assert run(Queued).cleanliness == "clean"
    assert seen == [0, 1, 2, "drained", "stop"]


def test_a_drain_of_any_other_kind_is_a_method_like_others() -> None:
    seen: list[str] = []

    class Sink(sage.BaseService):
        def drain(self, how: str) -> None:
            seen.append(how)

    class Pipe:
        def drain(self) -> None:
            seen.append("a pipe")

    assert run(Sink).cleanliness == "clean"
    assert run(Pipe).cleanliness == "clean"
    assert seen == []


def test_a_hook_that_asks_for_more_time_gets_it() -> None:
    class Slow(sage.BaseService):
        def cleanup(self) -> None:
            self.ctx.extend_timeout(30)
            threading.Event().wait(1.0)

    report = run(Slow, stop_timeout_s=0.5)
    assert (report.service("it").state, report.cleanliness) == ("stopped", "clean")


def test_what_a_context_is_told_wrongly_is_refused() -> None:
    context = ServiceContext("it", {})
    with pytest.raises(ValueError, match="negative number of seconds"):
        context.extend_timeout(-1)
    with pytest.raises(ValueError, match='takes "module:function"'):
        context.on_lost("shutil.rmtree")
    with pytest.raises(ValueError, match="cannot be written as JSON"):
        context.on_lost("shutil:rmtree", [object()])
    with pytest.raises(sage.UnsupportedPlanError, match="keeps no journal"):
        context.own_path("/tmp/x")
