"""Feedback loops: they end when nothing is left in them, or when the job is stopped."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest

from sage import FunctionError, GraphError, LocalEnvironment, Outcome, ProcessFunction

if TYPE_CHECKING:
    from collections.abc import Callable

    from sage._runtime.backend import Backend

    Backends = Callable[[], Backend]


def down(first: int) -> list[int]:
    return list(range(first - 1, -1, -1))


@pytest.mark.parametrize("parallelism", [1, 3])
def test_a_loop_ends_when_its_data_die_out(backend: Backends, parallelism: int) -> None:
    arrived: list[int] = []
    env = LocalEnvironment("test", backend=backend)
    loop = env.from_future("loop")
    lower = env.from_batch([3, 10, 0, 7]).union(loop).filter(lambda number: number > 0)
    less = lower.map(lambda number: number - 1, parallelism=parallelism)
    less.fill_future(loop)
    less.sink(arrived.append)
    job = env.submit(autostop=True)
    assert sorted(arrived) == sorted(number for first in (3, 10, 0, 7) for number in down(first))
    assert job.report is not None
    assert (job.report.state, job.report.undelivered) == (Outcome.COMPLETED, 0)


def test_a_loop_may_multiply_its_records(backend: Backends) -> None:
    arrived: list[str] = []
    env = LocalEnvironment("test", backend=backend)
    loop = env.from_future("loop")
    grown = env.from_batch([""]).union(loop).flatmap(lambda text: [text + "a", text + "b"])
    grown.filter(lambda text: len(text) < 8).fill_future(loop)
    grown.sink(arrived.append)
    env.submit(autostop=True)
    assert len(arrived) == len(set(arrived)) == sum(2**length for length in range(1, 9))


def test_a_crawler_visits_each_page_once(backend: Backends) -> None:
    links = {0: [1, 2], 1: [2, 3], 2: [0, 3, 4], 3: [], 4: [4, 5], 5: [0]}
    visited: list[int] = []

    class Once(ProcessFunction):
        def __init__(self) -> None:
            self._seen: set[int] = set()

        def execute(self, data: int) -> list[int]:
            if data in self._seen:
                return []
            self._seen.add(data)
            return [data]

    env = LocalEnvironment("test", backend=backend)
    found = env.from_future("found links")
    pages = env.from_batch([0]).union(found).process(Once)
    pages.flatmap(lambda page: links[page]).fill_future(found)
    pages.sink(visited.append)
    env.submit(autostop=True)
    assert sorted(visited) == [0, 1, 2, 3, 4, 5]


def test_two_loops_of_one_job(backend: Backends) -> None:
    arrived: list[int] = []
    env = LocalEnvironment("test", backend=backend)
    inner, outer = env.from_future("inner"), env.from_future("outer")
    halves = env.from_batch([40]).union(outer).union(inner).map(lambda number: number // 2)
    halves.filter(lambda number: number > 2 and number % 2 == 0).fill_future(inner)
    halves.filter(lambda number: number > 2 and number % 2 == 1).map(lambda number: number - 1).fill_future(outer)
    halves.sink(arrived.append)
    env.submit(autostop=True)
    assert arrived == [20, 10, 5, 2]


def test_an_empty_loop_ends(backend: Backends) -> None:
    arrived: list[Any] = []
    env = LocalEnvironment("test", backend=backend)
    loop = env.from_future("loop")
    around = env.from_batch([]).union(loop).map(lambda number: number)
    around.fill_future(loop)
    around.sink(arrived.append)
    env.submit(autostop=True)
    assert arrived == []


@pytest.mark.in_one_process
def test_an_endless_loop_ends_by_stop(backend: Backends) -> None:
    turns = 0
    env = LocalEnvironment("test", backend=backend, drain_timeout_s=0.1)
    loop = env.from_future("loop")

    def turn(number: int) -> int:
        nonlocal turns
        turns += 1
        if turns == 500:
            env.stop()
        return number

    around = env.from_batch(range(5)).union(loop).map(turn)
    around.fill_future(loop)
    job = env.submit(autostop=True)
    assert turns >= 500
    assert job.report is not None
    assert job.report.state in (Outcome.STOPPED, Outcome.CANCELLED)


def test_a_failure_in_a_loop_ends_the_job(backend: Backends) -> None:
    env = LocalEnvironment("test", backend=backend)
    loop = env.from_future("loop")
    around = env.from_batch([5]).union(loop).map(lambda number: 10 // number - 0 * number and number - 1, name="around")
    around.fill_future(loop)
    with pytest.raises(FunctionError, match='operator "around" failed on record 0: ZeroDivisionError'):
        env.submit(autostop=True)


def test_a_full_loop_does_not_lock_up(backend: Backends) -> None:
    """More records go round at once than any channel holds."""
    arrived = 0
    env = LocalEnvironment("test", backend=backend)
    loop = env.from_future("loop")

    def count(pair: tuple[int, int]) -> None:
        nonlocal arrived
        arrived += 1

    around = env.from_batch([(number, 3) for number in range(6000)]).union(loop)
    less = around.map(lambda pair: (pair[0], pair[1] - 1)).filter(lambda pair: pair[1] >= 0)
    less.fill_future(loop)
    less.sink(count)
    env.submit(autostop=True)
    assert arrived == 18_000


def test_a_future_that_is_never_filled_is_refused(backend: Backends) -> None:
    env = LocalEnvironment("test", backend=backend)
    env.from_batch([1]).union(env.from_future("later")).sink(lambda x: None)
    with pytest.raises(GraphError, match='future "later" is never filled') as caught:
        env.submit(autostop=True)
    assert "fill_future" in caught.value.__notes__[0]


def test_a_future_that_is_filled_twice_is_refused() -> None:
    env = LocalEnvironment("test")
    loop = env.from_future("later")
    stream = env.from_batch([1])
    stream.fill_future(loop)
    with pytest.raises(GraphError, match='future "later" is filled twice'):
        stream.fill_future(loop)
    with pytest.raises(GraphError, match="it is not a future"):
        stream.fill_future(stream)


def test_an_operator_that_emits_at_the_end_cannot_be_in_a_loop(backend: Backends) -> None:
    env = LocalEnvironment("test", backend=backend)
    loop = env.from_future("loop")
    summed = env.from_batch([1]).union(loop).keyby(lambda x: x).reduce(max, emit="last", name="sum")
    summed.fill_future(loop)
    with pytest.raises(GraphError, match='operator "sum" emits when its input ends, but it is part of a loop'):
        env.submit(autostop=True)
