"""Gates of services one by one: who gets through, who waits, and who hears that it may go on."""

from __future__ import annotations

import asyncio
import threading
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import pytest

from sage._hosts.gate import ConcurrentGate, Gate, SerialGate

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

SOON_S = 10.0
FOREVER_S = 3600.0

AWAY = "sent away"


def opened(gate: Gate) -> Gate:
    gate.is_open = True
    return gate


def shared(calls_max: int | None, **others: Any) -> ConcurrentGate:
    gate = ConcurrentGate(calls_max, **others)
    gate.is_open = True
    return gate


def away(*_: Any) -> Any:
    return AWAY


async def away_awaited(*_: Any) -> Any:
    return AWAY


class Call:
    """A call on a thread of its own that is inside its gate until it is let go on."""

    def __init__(self, gate: Gate) -> None:
        self.is_inside, self.go_on = threading.Event(), threading.Event()
        self.answer: Any = None
        bound = gate.bind(self.run, away)
        self.thread = threading.Thread(target=lambda: self.take(bound(1)), daemon=True)
        self.thread.start()

    def run(self, number: int) -> int:
        self.is_inside.set()
        assert self.go_on.wait(SOON_S)
        return number

    def take(self, answer: Any) -> None:
        self.answer = answer

    def end(self) -> Any:
        self.go_on.set()
        self.thread.join(SOON_S)
        assert not self.thread.is_alive()
        return self.answer


MAKES: list[Callable[[], Gate]] = [SerialGate, lambda: ConcurrentGate(1), lambda: ConcurrentGate(None)]


@pytest.mark.parametrize("make", MAKES)
def test_a_drain_says_whether_a_call_still_runs(make: Callable[[], Gate]) -> None:
    gate = opened(make())
    assert gate.drain(0)
    call = Call(gate)
    assert call.is_inside.wait(SOON_S)
    gate.close()
    assert not gate.drain(0)
    assert call.end() == 1
    assert gate.drain(0)


@pytest.mark.parametrize("make", MAKES)
def test_a_drain_hears_of_the_end_of_the_last_call(make: Callable[[], Gate]) -> None:
    for _ in range(20):
        gate = opened(make())
        call = Call(gate)
        assert call.is_inside.wait(SOON_S)
        drained: list[bool] = []
        begins = threading.Event()

        def drain(gate: Gate = gate, drained: list[bool] = drained, begins: threading.Event = begins) -> None:
            begins.set()
            drained.append(gate.drain(FOREVER_S))

        draining = threading.Thread(target=drain, daemon=True)
        draining.start()
        assert begins.wait(SOON_S)
        call.end()
        draining.join(SOON_S)
        assert drained == [True]


@pytest.mark.parametrize("make", MAKES)
def test_a_closed_gate_lets_only_through_what_may_pass(make: Callable[[], Gate]) -> None:
    gate = make()
    assert gate.bind(lambda number: number, away)(1) == AWAY
    assert gate.bind(lambda *numbers: numbers, away)(1, 2) == AWAY
    assert gate.bind(lambda number: number, away, passes_closed=True)(1) == 1
    assert gate.bind(lambda *numbers: numbers, away, passes_closed=True)(1, 2) == (1, 2)
    assert (gate.call_count, gate.error_count) == (2, 0)


@pytest.mark.parametrize("make", MAKES)
@pytest.mark.parametrize("args", [(0,), (0, 1)])
def test_calls_and_errors_are_counted_and_free_their_place(make: Callable[[], Gate], args: tuple[int, ...]) -> None:
    gate = opened(make())
    divide = gate.bind(lambda by, number=1: number / by, away)
    for count in (1, 2):
        with pytest.raises(ZeroDivisionError):
            divide(*args)
        assert (gate.call_count, gate.error_count) == (count, count)
    assert gate.drain(0)
    assert divide(1) == 1
    assert (gate.call_count, gate.error_count) == (3, 2)


@pytest.mark.parametrize("make", MAKES)
def test_a_service_that_calls_itself_gets_through_and_keeps_its_place(make: Callable[[], Gate]) -> None:
    gate = opened(make())
    other_drains: list[bool] = []
    arrived: list[list[int]] = []

    def countdown(number: int) -> list[int]:
        rest = bound(number - 1) if number else []
        looking = threading.Thread(target=lambda: other_drains.append(gate.drain(0)))
        looking.start()
        looking.join()
        return [number, *rest]

    bound = gate.bind(countdown, away)
    calling = threading.Thread(target=lambda: arrived.append(bound(2)), daemon=True)
    calling.start()
    calling.join(SOON_S)
    assert arrived == [[2, 1, 0]]
    assert other_drains == [False] * 3
    assert gate.drain(0)


def test_a_thread_that_waits_for_its_place_gets_it_or_hears_of_the_close() -> None:
    for ends in ("leave", "close") * 10:
        waits = threading.Event()

        @contextmanager
        def going_on(waits: threading.Event = waits) -> Iterator[None]:
            waits.set()
            yield

        gate = shared(1, going_on=going_on)
        first = Call(gate)
        assert first.is_inside.wait(SOON_S)
        second = Call(gate)
        assert waits.wait(SOON_S)
        assert not second.is_inside.is_set()
        if ends == "leave":
            assert first.end() == 1
            assert second.is_inside.wait(SOON_S)
            assert second.end() == 1
        else:
            gate.close()
            second.thread.join(SOON_S)
            assert second.answer == AWAY
            assert not second.is_inside.is_set()
            assert first.end() == 1


class Calls:
    """Calls of coroutines, each inside its gate until its event is set."""

    def __init__(self, gate: ConcurrentGate) -> None:
        self.inside: list[int] = []
        self.go_on = [asyncio.Event() for _ in range(4)]
        self.bound = gate.bind_coroutine(self.run, away_awaited)

    async def run(self, number: int) -> int:
        self.inside.append(number)
        await self.go_on[number].wait()
        return number

    def start(self, number: int) -> asyncio.Task[Any]:
        return asyncio.ensure_future(self.bound(number))


async def turns() -> None:
    """Let everything that can go on do so."""
    for _ in range(20):
        await asyncio.sleep(0)


def test_coroutines_wait_for_their_place_in_order() -> None:
    async def main() -> None:
        gate = shared(2)
        calls = Calls(gate)
        tasks = [calls.start(number) for number in range(4)]
        await turns()
        assert calls.inside == [0, 1]
        calls.go_on[1].set()
        await turns()
        assert calls.inside == [0, 1, 2]
        for event in calls.go_on:
            event.set()
        async with asyncio.timeout(SOON_S):
            assert await asyncio.gather(*tasks) == [0, 1, 2, 3]
        assert gate.drain(0)
        assert gate.call_count == 4

    asyncio.run(main())


@pytest.mark.parametrize("has_its_turn", [False, True])
def test_one_that_is_cancelled_when_its_turn_has_come_passes_it_on(has_its_turn: bool) -> None:
    async def main() -> None:
        calls = Calls(gate := shared(1))

        async def first() -> None:
            await calls.bound(0)
            if has_its_turn:
                await asyncio.sleep(0)
            second.cancel()

        running = asyncio.ensure_future(first())
        await turns()
        second, third = calls.start(1), calls.start(2)
        await turns()
        for event in calls.go_on:
            event.set()
        async with asyncio.timeout(SOON_S):
            assert await third == 2
            await running
        assert calls.inside == [0, 2]
        assert second.cancelled()
        assert gate.drain(0)

    asyncio.run(main())


def test_one_that_is_cancelled_while_it_waits_takes_no_turn_of_another() -> None:
    async def main() -> None:
        calls = Calls(gate := shared(1))
        first, second, third = (calls.start(number) for number in range(3))
        await turns()
        second.cancel()
        await turns()
        assert calls.inside == [0]
        calls.go_on[0].set()
        calls.go_on[2].set()
        async with asyncio.timeout(SOON_S):
            assert [await first, await third] == [0, 2]
        assert gate.drain(0)

    asyncio.run(main())


def test_coroutines_that_wait_are_sent_away_when_the_gate_closes() -> None:
    async def main() -> None:
        calls = Calls(gate := shared(1))
        first, second, third = (calls.start(number) for number in range(3))
        await turns()
        gate.close()
        async with asyncio.timeout(SOON_S):
            assert [await second, await third] == [AWAY, AWAY]
        assert not gate.drain(0)
        calls.go_on[0].set()
        assert await first == 0
        assert (gate.drain(0), gate.call_count) == (True, 1)

    asyncio.run(main())


def test_a_coroutine_that_calls_its_own_service_needs_no_second_place() -> None:
    async def main() -> None:
        gate = shared(1)

        async def countdown(number: int) -> list[int]:
            return [number, *(await bound(number - 1) if number else [])]

        bound = gate.bind_coroutine(countdown, away_awaited)
        async with asyncio.timeout(SOON_S):
            assert await bound(2) == [2, 1, 0]
        assert gate.drain(0)

    asyncio.run(main())


def test_a_coroutine_that_raises_is_counted_and_frees_its_place() -> None:
    async def main() -> None:
        gate = shared(1)

        async def fail(number: int) -> None:
            raise ValueError(number)

        bound = gate.bind_coroutine(fail, away_awaited)
        for number in range(2):
            async with asyncio.timeout(SOON_S):
                with pytest.raises(ValueError, match=str(number)):
                    await bound(number)
        assert (gate.call_count, gate.error_count, gate.drain(0)) == (2, 2, True)

    asyncio.run(main())
