"""Calls that wait for a service: how long, for whom it is measured, and what the report says of it."""

from __future__ import annotations

import asyncio
import json
import threading
from typing import TYPE_CHECKING, Any, Literal

import pytest

from sage import JobReport, LocalEnvironment, ServiceOptions
from sage._hosts.call_threads import CallThreads
from sage._hosts.gate import ConcurrentGate, Gate, SerialGate
from sage._hosts.waits import Waits
from sage._ray.shipping import outline
from sage._runtime.backend import CallWaits
from sage.report import Cleanliness, OperatorReport, Outcome, ServiceReport
from sage.testing import ManualClock, StepBackend

if TYPE_CHECKING:
    from collections.abc import Callable

    from sage._runtime.backend import Backend

SOON_S = 10.0


class SeenClock(ManualClock):
    """Stands still, and lets whoever waits know that it was read."""

    def __init__(self) -> None:
        super().__init__()
        self.was_read = threading.Event()

    def __call__(self) -> float:
        self.was_read.set()
        return super().__call__()


class Calling:
    """A call on a thread of its own, which ends when it is let go on."""

    def __init__(self, bound: Callable[..., Any]) -> None:
        self.is_inside, self.go_on = threading.Event(), threading.Event()
        self.thread = threading.Thread(target=lambda: bound(self), daemon=True)
        self.thread.start()

    def end(self) -> None:
        assert self.is_inside.wait(SOON_S)
        self.go_on.set()
        self.thread.join(SOON_S)
        assert not self.thread.is_alive()


def inside(call: Calling, *_: Any) -> None:
    call.is_inside.set()
    assert call.go_on.wait(SOON_S)


def away(*_: Any) -> str:
    return "away"


def waits_of(clock: ManualClock, *, is_serial: bool = True) -> Waits:
    return Waits(clock, is_serial=is_serial)


MAKES: dict[str, Callable[[Waits], Gate]] = {
    "serial": SerialGate,
    "one place": lambda waits: ConcurrentGate(1, waits=waits),
    "one call at a time behind it": lambda waits: ConcurrentGate(None, waits=waits),
}


@pytest.mark.parametrize("make", MAKES.values(), ids=MAKES)
def test_a_call_that_waits_for_another_is_measured_until_it_leaves(make: Callable[[Waits], Gate]) -> None:
    clock = SeenClock()
    waits = waits_of(clock)
    gate = make(waits)
    gate.is_open = True
    bound = gate.bind(inside, away)
    first = Calling(bound)
    assert first.is_inside.wait(SOON_S)
    assert not clock.was_read.is_set()
    second = Calling(bound)
    assert clock.was_read.wait(SOON_S)
    clock.advance(3)
    first.end()
    assert second.is_inside.wait(SOON_S)
    clock.advance(2)
    second.end()
    assert waits.total() == CallWaits(1, 3.0, 5.0)


@pytest.mark.parametrize("make", MAKES.values(), ids=MAKES)
def test_calls_that_do_not_wait_are_not_measured(make: Callable[[Waits], Gate]) -> None:
    clock = SeenClock()
    waits = waits_of(clock)
    gate = make(waits)
    gate.is_open = True
    bound = gate.bind(lambda *numbers: numbers, away)
    assert [bound(1), bound(1, 2), bound()] == [(1,), (1, 2), ()]
    assert not clock.was_read.is_set()
    assert waits.total() == CallWaits()


def test_coroutines_wait_for_one_of_several_places() -> None:
    clock = ManualClock()
    waits = waits_of(clock, is_serial=False)
    gate = ConcurrentGate(2, waits=waits)
    gate.is_open = True

    async def program() -> None:
        doors = [asyncio.Event() for _ in range(4)]

        async def otherwise(*_: Any) -> None:
            raise AssertionError("the gate is open")

        async def inside(door: asyncio.Event) -> None:
            await door.wait()

        bound = gate.bind_coroutine(inside, otherwise)
        calls = [asyncio.create_task(bound(door)) for door in doors]
        await asyncio.sleep(0)
        clock.advance(3)
        calls.pop().cancel()  # one that nobody waits for any more
        doors[0].set()
        await calls[0]
        await asyncio.sleep(0.01)
        clock.advance(4)
        for door in doors:
            door.set()
        await asyncio.gather(*calls)

    asyncio.run(program())
    assert waits.total() == CallWaits(2, 3.0, 3.0)


def test_calls_with_a_time_out_wait_for_a_thread() -> None:
    clock = SeenClock()
    waits = waits_of(clock)
    threads = CallThreads("service", 1, waits)
    begun, go_on = threading.Event(), threading.Event()

    def wait() -> None:
        begun.set()
        assert go_on.wait(SOON_S)

    first = threads.submit("m", wait, None)
    second = threads.submit("m", lambda: clock.advance(2), None)
    third = threads.submit("m", lambda: None, None)
    assert begun.wait(SOON_S)
    third.cancel()
    clock.advance(3)
    go_on.set()
    for future in (first, second):
        future.result(SOON_S)
    threads.drain(SOON_S)
    threads.close()
    assert waits.total() == CallWaits(2, 3.0, 5.0)


class Slow:
    async def ask(self, number: int) -> int:
        await asyncio.sleep(1)
        return number + 1


def test_the_report_names_a_service_that_kept_its_callers_waiting() -> None:
    env = LocalEnvironment("slow", backend=lambda: StepBackend(3))
    slow = env.register_service("llm", Slow)
    arrived: list[int] = []
    env.from_batch(range(20)).map_async(slow.ask, concurrency=8).sink(arrived.append)
    report = env.run()
    assert arrived == list(range(1, 21))
    waits = report.service("llm").waits
    assert waits > 8
    line = report.bottleneck
    assert line is not None
    assert line.startswith('service "llm" was busy ')
    assert f" of the time, {waits} calls waited " in line
    assert line.endswith(" s in all; its concurrency is 1 (set ServiceOptions(concurrency=...) if it can take more)")
    assert f"bottleneck: {line}" in str(report).splitlines()
    saved = json.loads(json.dumps(report.to_dict()))
    assert saved["bottleneck"] == line
    assert JobReport.from_dict(saved).bottleneck == line


def test_the_report_names_the_concurrency_of_map_async() -> None:
    env = LocalEnvironment("slow", backend=lambda: StepBackend(3))
    arrived: list[int] = []
    env.from_batch(range(200)).map_async(Slow().ask, concurrency=2, name="ask", capacity=2).sink(arrived.append)
    line = env.run().bottleneck
    assert arrived == list(range(1, 201))
    assert line is not None
    assert line.startswith('operator "ask" was busy ')
    assert line.endswith("; its concurrency is 2 (set concurrency=...)")


def test_the_master_of_a_job_knows_the_concurrency_of_map_async() -> None:
    env = LocalEnvironment("outlined")
    env.from_batch(range(20)).map_async(Slow().ask, concurrency=3).sink(print)
    assert [node.settings for node in outline(env._graph()).nodes.values()] == [{}, {"concurrency": 3}, {}]


def test_a_quick_job_has_no_bottleneck(backend: Callable[[], Backend], host: Literal["inline", "process"]) -> None:
    class Quick:
        def double(self, number: int) -> int:
            return 2 * number

    env = LocalEnvironment("quick", backend=backend)
    quick = env.register_service("quick", Quick, options=ServiceOptions(host=host))
    arrived: list[int] = []
    env.from_batch(range(100), parallelism=2).map(quick.double, parallelism=2).sink(arrived.append)
    report = env.run()
    assert sorted(arrived) == list(range(0, 200, 2))
    assert report.bottleneck is None
    assert "bottleneck" not in str(report)
    assert report.to_dict()["bottleneck"] is None


def report_of(*, running_s: float = 100.0, **parts: Any) -> JobReport:
    ends = ("all sources ended", 1.0, 2.0, 101.0)
    return JobReport("1", "j", Outcome.COMPLETED, Cleanliness.CLEAN, *ends, running_s=running_s, **parts)


def service(busy_s: float, waited_s: float, name: str = "llm") -> ServiceReport:
    return ServiceReport(name, "stopped", (), 9, 0, 0, waits=4812, waited_s=waited_s, busy_s=busy_s, concurrency=1)


BUSY_MAP = OperatorReport("embed", "map", 2, 10, 10, 0, 190.0, waited_s=80.0)


def test_the_bottleneck_is_what_most_was_waited_for() -> None:
    line = report_of(services=(service(99.0, 31.0), service(90.0, 20.0, "other")), operators=(BUSY_MAP,)).bottleneck
    assert line is not None
    told = 'service "llm" was busy 99 % of the time, 4,812 calls waited 31.0 s in all; its concurrency is 1'
    assert line.startswith(told)


def test_an_operator_that_is_waited_for_is_named_with_its_parallelism() -> None:
    line = report_of(services=(service(20.0, 31.0),), operators=(BUSY_MAP,)).bottleneck
    assert line is not None
    told = 'operator "embed" was busy 95 % of the time, tasks waited 80.0 s in all to send it records; '
    assert line.startswith(f"{told}its parallelism is 2 (set parallelism=")


@pytest.mark.parametrize(
    "report",
    [
        report_of(services=(service(79.0, 31.0),)),
        report_of(services=(service(99.0, 5.0),)),
        report_of(services=(service(2.9, 2.9),), running_s=2.9),
        report_of(operators=(OperatorReport("read", "source", 1, 10, 10, 0, 100.0, waited_s=80.0),)),
        report_of(operators=(OperatorReport("embed", "map", 2, 10, 10, 0, 100.0, waited_s=80.0),)),
    ],
    ids=["not busy", "short waits", "quick", "a source", "one of two tasks idle"],
)
def test_what_nobody_would_notice_is_not_named(report: JobReport) -> None:
    assert report.bottleneck is None
