"""Sources that wait: coroutines are cancelled where they await, and others can ask whether they are to end."""

from __future__ import annotations

import asyncio
import socket
import threading
import time
from typing import TYPE_CHECKING, Any

import pytest

from sage import (
    BatchFunction,
    FunctionError,
    GraphError,
    JobError,
    LocalEnvironment,
    MapFunction,
    Outcome,
    Retry,
    SourceFunction,
    StopSignal,
)

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable

    from support.fair_clock import FairClock

    from sage import JobReport
    from sage._runtime.backend import Backend

    Backends = Callable[[], Backend]


async def numbers(count: int, pause_s: float = 0.0) -> AsyncIterator[int]:
    for number in range(count):
        await asyncio.sleep(pause_s)
        yield number


class Numbers:
    """An asynchronous iterable that is no generator."""

    def __aiter__(self) -> AsyncIterator[int]:
        return numbers(5)


class CountAsync(BatchFunction):
    def __init__(self, count: int) -> None:
        self.left = list(range(count))

    async def execute(self) -> Any:
        await asyncio.sleep(0)
        return self.left.pop(0) if self.left else None


class Now(SourceFunction):
    """Gives a number at every second call, and then the end."""

    def __init__(self) -> None:
        self.calls = 0

    async def execute(self) -> Any:
        self.calls += 1
        if self.calls == 9:
            return StopSignal()
        return self.calls // 2 if self.calls % 2 == 0 else None


@pytest.mark.parametrize("pause_s", [0.0, 0.001])
def test_an_asynchronous_generator_is_read_to_its_end(pause_s: float, backend: Backends) -> None:
    arrived: list[Any] = []
    env = LocalEnvironment("numbers", backend=backend)
    env.from_batch(numbers, 50, pause_s).map(lambda number: number + 1).sink(arrived.append)
    report = env.submit(autostop=True).report
    assert arrived == list(range(1, 51))
    assert report is not None
    assert report.operators[0].records_out == 50


@pytest.mark.parametrize(
    ("build", "expected"),
    [
        (lambda env: env.from_batch(numbers(5)), [0, 1, 2, 3, 4]),
        (lambda env: env.from_batch(Numbers()), [0, 1, 2, 3, 4]),
        (lambda env: env.from_source(numbers, 5), [0, 1, 2, 3, 4]),
        (lambda env: env.from_source(numbers, 5, delay=0.001), [0, 1, 2, 3, 4]),
        (lambda env: env.from_source(numbers, 5, lockstep=True), [0, 1, 2, 3, 4]),
        (lambda env: env.from_batch(CountAsync, 5), [0, 1, 2, 3, 4]),
        (lambda env: env.from_source(Now), [1, 2, 3, 4]),
    ],
)
def test_every_source_that_awaits(build: Any, expected: list[int], backend: Backends) -> None:
    arrived: list[int] = []
    env = LocalEnvironment("sources", backend=backend)
    build(env).sink(arrived.append)
    env.submit(autostop=True)
    assert arrived == expected


def test_none_is_data_where_the_source_is_bounded_and_nothing_now_elsewhere(backend: Backends) -> None:
    async def some() -> AsyncIterator[int | None]:
        for one in (1, None, 3):
            yield one

    for begin, expected in (("from_batch", [1, None, 3]), ("from_source", [1, 3])):
        arrived: list[Any] = []
        env = LocalEnvironment("nothing", backend=backend)
        getattr(env, begin)(some).sink(arrived.append)
        env.submit(autostop=True)
        assert arrived == expected


def stopped_after_first(
    source: Any, waits: threading.Event, *, cancel: bool = False
) -> tuple[JobReport, float, list[Any]]:
    """Stop a job when its first record has arrived and its source waits; return its report, and when the stop began."""
    first = threading.Event()
    arrived: list[Any] = []

    def take(record: Any) -> None:
        arrived.append(record)
        first.set()

    env = LocalEnvironment("waits")
    env.from_source(source).sink(take)
    job = env.submit()
    assert first.wait(30)
    assert waits.wait(30)
    began_at = time.monotonic()
    job.stop(drain=False if cancel else None)
    assert job.report is not None
    return job.report, began_at, arrived


@pytest.mark.parametrize("cancel", [False, True])
def test_a_stop_cancels_a_generator_where_it_awaits(cancel: bool, clock: FairClock) -> None:
    notes: list[str] = []
    waits = threading.Event()

    async def events() -> AsyncIterator[int]:
        try:
            yield 1
            waits.set()
            await asyncio.Event().wait()
        except asyncio.CancelledError:
            notes.append("cancelled")
            raise
        finally:
            notes.append("closed")

    report, began_at, arrived = stopped_after_first(events, waits, cancel=cancel)
    assert clock.elapsed_s(began_at) < 1
    assert (report.state, report.cleanliness) == (Outcome.CANCELLED if cancel else Outcome.STOPPED, "clean")
    assert notes == ["cancelled", "closed"]
    assert arrived == [1]


def test_a_stop_cancels_execute_where_it_awaits_and_closes_the_function(clock: FairClock) -> None:
    notes: list[str] = []
    waits = threading.Event()

    class Events(SourceFunction):
        is_first = True

        async def execute(self) -> Any:
            if self.is_first:
                self.is_first = False
                return 1
            try:
                waits.set()
                await asyncio.Event().wait()
            finally:
                notes.append("cancelled")

        def close(self) -> None:
            notes.append("close")

    report, began_at, _ = stopped_after_first(Events, waits)
    assert clock.elapsed_s(began_at) < 1
    assert report.state is Outcome.STOPPED
    assert notes == ["cancelled", "close"]


def test_what_was_given_before_a_stop_still_arrives() -> None:
    arrived: list[int] = []
    given: list[int] = []
    env = LocalEnvironment("given")

    async def fast() -> AsyncIterator[int]:
        while True:
            given.append(len(given))
            yield given[-1]
            if len(given) % 100 == 0:
                await asyncio.sleep(0.001)

    env.from_source(fast).sink(arrived.append)
    job = env.submit()
    while len(arrived) < 1000:
        time.sleep(0.001)
    env.stop()
    assert job.report is not None
    assert arrived == list(range(len(arrived)))
    assert len(given) - len(arrived) <= 1
    assert job.report.undelivered == 0


def test_an_error_comes_after_the_records_before_it(backend: Backends) -> None:
    arrived: list[int] = []

    async def fails() -> AsyncIterator[int]:
        yield 1
        yield 2
        raise LookupError("gone")

    env = LocalEnvironment("fails", backend=backend)
    env.from_batch(fails).sink(arrived.append)
    with pytest.raises(FunctionError, match=r'source "fails" failed: LookupError: gone'):
        env.submit(autostop=True)
    assert arrived == [1, 2]


def test_a_close_that_awaits_is_not_cancelled_with_its_job() -> None:
    closed: list[int] = []

    class Fails(MapFunction):
        def execute(self, data: int) -> int:
            raise LookupError(data)

        async def close(self) -> None:  # type: ignore[override]
            await asyncio.sleep(0.02)
            closed.append(self.ctx.parallel_index)

    env = LocalEnvironment("closes")
    env.from_batch(range(100)).rebalance().map(Fails, parallelism=4).sink(lambda _: None)
    with pytest.raises(JobError) as caught:
        env.submit(autostop=True)
    assert "CancelledError" not in str(caught.value)
    assert sorted(closed) == [0, 1, 2, 3]


def test_a_coroutine_that_fails_is_tried_again(backend: Backends) -> None:
    arrived: list[int] = []
    calls = 0

    class Shaky(BatchFunction):
        async def execute(self) -> Any:
            nonlocal calls
            calls += 1
            if calls in (2, 3):
                raise ConnectionError("not now")
            return calls if calls < 6 else None

    env = LocalEnvironment("shaky", backend=backend)
    env.from_batch(Shaky, on_error=Retry(3, (0.001, 0.001))).sink(arrived.append)
    env.submit(autostop=True)
    assert arrived == [1, 4, 5]


def test_an_asynchronous_iterator_is_read_once() -> None:
    env = LocalEnvironment("once")
    env.from_batch(numbers(2)).sink(lambda _: None)
    env.submit(autostop=True)
    with pytest.raises(GraphError, match="read"):
        env.submit(autostop=True)


def test_a_source_that_waits_by_its_context_is_woken(clock: FairClock) -> None:
    seen: list[Any] = []
    waits = threading.Event()

    class Polls(SourceFunction):
        is_first = True

        def execute(self) -> Any:
            if self.is_first:
                self.is_first = False
                seen.append((self.ctx.is_stopping, self.ctx.wait(0.001)))
                return 1
            waits.set()
            seen.append((self.ctx.wait(600), self.ctx.is_stopping))
            return None

    report, began_at, _ = stopped_after_first(Polls, waits)
    assert clock.elapsed_s(began_at) < 1
    assert report.state is Outcome.STOPPED
    assert seen == [(False, True), (False, True)]


def test_a_function_that_waits_by_its_context_is_woken(clock: FairClock) -> None:
    begun = threading.Event()

    class Waits(MapFunction):
        def execute(self, data: int) -> int:
            begun.set()
            self.ctx.wait(600)
            return data

    arrived: list[int] = []
    env = LocalEnvironment("waits")
    env.from_batch([1, 2]).rebalance().map(Waits, parallelism=2).sink(arrived.append)
    env.submit()
    assert begun.wait(30)
    began_at = time.monotonic()
    env.stop()
    assert clock.elapsed_s(began_at) < 1
    assert 1 <= len(arrived) <= 2


def test_a_wait_takes_virtual_time_under_the_step_backend() -> None:
    from sage.testing import StepBackend

    backend = StepBackend(1)
    env = LocalEnvironment("virtual", backend=lambda: backend)

    class Slowly(BatchFunction):
        left = 3

        def execute(self) -> Any:
            self.left -= 1
            return self.left if self.ctx.wait(3600) and self.left >= 0 else None

    arrived: list[int] = []
    env.from_batch(Slowly).sink(arrived.append)
    env.submit(autostop=True)
    assert arrived == [2, 1, 0]
    assert backend.now() >= 3 * 3600


@pytest.mark.parametrize("seconds", [-1, float("inf"), "long", None])
def test_a_wait_that_cannot_be_is_refused(seconds: Any) -> None:
    class Wrong(BatchFunction):
        def execute(self) -> Any:
            return self.ctx.wait(seconds)

    env = LocalEnvironment("wrong")
    env.from_batch(Wrong).sink(lambda _: None)
    with pytest.raises(FunctionError, match=r"ctx\.wait: seconds is"):
        env.submit(autostop=True)


def test_a_source_that_blocks_is_abandoned_and_named_with_its_stack(clock: FairClock) -> None:
    ours, theirs = socket.socketpair()

    class Receives(SourceFunction):
        is_first = True

        def execute(self) -> Any:
            if self.is_first:
                self.is_first = False
                return b"first"
            return ours.recv(1) or StopSignal()

    try:
        first = threading.Event()
        env = LocalEnvironment("blocks", drain_timeout_s=0.5)
        env.from_source(Receives, name="socket").sink(lambda _: first.set())
        job = env.submit()
        assert first.wait(30)
        began_at = time.monotonic()
        with pytest.raises(Exception, match="socket"):
            env.stop()
        assert clock.elapsed_s(began_at) < 3
        assert job.report is not None
        task = job.report.tasks[0]
        assert task.state == "abandoned"
        assert task.stack is not None
        assert "ours.recv(1)" in task.stack
    finally:
        theirs.close()
        ours.close()
