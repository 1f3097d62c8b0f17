"""How many records wait before an operator: as many as the user says, or as it works through in about a second."""

from __future__ import annotations

import asyncio
import threading
import time
from typing import TYPE_CHECKING, Any

import pytest

from sage import GraphError, LocalEnvironment, MapFunction, Outcome

if TYPE_CHECKING:
    from collections.abc import Callable

    from sage import DataStream
    from sage._runtime.backend import Backend

    Backends = Callable[[], Backend]

CALL_S = 0.02
CONCURRENCY = 4


class Counted:
    """Counts the records that were read and the calls that began, and keeps the largest difference."""

    def __init__(self, calls: int) -> None:
        self.read = 0
        self.begun = 0
        self.waiting_most = 0
        self.enough = threading.Event()
        self._calls = calls
        self._lock = threading.Lock()

    def source(self) -> int:
        self.read += 1
        return self.read

    def begin(self) -> None:
        with self._lock:
            self.begun += 1
            self.waiting_most = max(self.waiting_most, self.read - self.begun)
        if self.begun >= self._calls:
            self.enough.set()

    def slow(self, record: int) -> int:
        self.begin()
        time.sleep(CALL_S)
        return record

    async def slow_async(self, record: int) -> int:
        self.begin()
        await asyncio.sleep(CALL_S)
        return record

    def slow_batch(self, batch: list[int]) -> list[int]:
        for _ in batch:
            self.begin()
        time.sleep(CALL_S)
        return batch


# What is built, and how many records it works through in a second.
WAYS: dict[str, tuple[Callable[[DataStream, Counted, dict[str, Any]], DataStream], float]] = {
    "map": (lambda stream, counted, more: stream.rebalance().map(counted.slow, parallelism=2, **more), 2 / CALL_S),
    "map_async": (
        lambda stream, counted, more: stream.map_async(counted.slow_async, concurrency=CONCURRENCY, **more),
        CONCURRENCY / CALL_S,
    ),
    "map_batches": (
        lambda stream, counted, more: stream.map_batches(counted.slow_batch, max_records=3, **more),
        3 / CALL_S,
    ),
    "keyed": (
        lambda stream, counted, more: stream.keyby(lambda record: record).map(counted.slow, parallelism=2, **more),
        2 / CALL_S,
    ),
    "behind a flatmap": (
        lambda stream, counted, more: stream.flatmap(lambda record: [record]).map_async(
            counted.slow_async, concurrency=CONCURRENCY, **more
        ),
        CONCURRENCY / CALL_S,
    ),
}


def most_waiting(way: str, calls: int, **more: Any) -> int:
    """Run an endless source until so many calls were made, and return the most records that waited before them."""
    counted = Counted(calls)
    env = LocalEnvironment("queues")
    WAYS[way][0](env.from_source(counted.source), counted, more).sink(lambda _: None)
    job = env.submit()
    assert counted.enough.wait(30)
    env.stop()
    assert job.report is not None
    assert job.report.state is Outcome.STOPPED
    return counted.waiting_most


@pytest.mark.parametrize("way", WAYS)
def test_about_a_second_of_work_waits(way: str) -> None:
    assert most_waiting(way, 100) <= 1.5 * WAYS[way][1] + 4 * CONCURRENCY


@pytest.mark.parametrize("way", WAYS)
def test_before_anything_is_known_hardly_more_waits_than_runs(way: str) -> None:
    assert most_waiting(way, 1) <= 6 * CONCURRENCY


@pytest.mark.parametrize("capacity", [1, 5, 16])
@pytest.mark.parametrize("way", WAYS)
def test_no_more_wait_than_the_user_says(way: str, capacity: int) -> None:
    tasks = 2 if way in ("map", "keyed") else 1
    in_hand = 2 * CONCURRENCY  # those that run, and those that their tasks have just taken or are about to give
    assert most_waiting(way, 60, capacity=capacity) <= tasks * capacity + in_hand


def test_an_operator_with_a_capacity_has_a_queue_of_its_own() -> None:
    env = LocalEnvironment("own")
    env.from_batch([1]).map(str, name="text").map(len, name="length", capacity=10).sink(lambda _: None, name="show")
    assert "chain 1: length -> show" in env.explain()


@pytest.mark.parametrize("capacity", [1, 2, 7, 5000])
def test_results_do_not_depend_on_the_capacity(capacity: int, backend: Backends) -> None:
    arrived: list[int] = []
    env = LocalEnvironment("same", backend=backend)
    (
        env.from_batch(range(1000))
        .map(lambda number: number + 1, capacity=capacity)
        .flatmap(lambda number: [number, number], parallelism=2, capacity=capacity)
        .keyby(lambda number: number % 7, capacity=capacity)
        .reduce(lambda one, other: one + other, parallelism=3, capacity=capacity)
        .filter(lambda _: True, capacity=capacity)
        .sink(arrived.append, capacity=capacity)
    )
    env.submit(autostop=True)
    assert len(arrived) == 2000


class Bounded(MapFunction):
    def __init__(self, capacity: int) -> None:
        self.capacity = capacity

    def execute(self, data: int) -> int:
        return min(data, self.capacity)


class Doubled(MapFunction):
    def execute(self, data: int) -> int:
        return 2 * data


def test_a_function_class_that_takes_a_capacity_gets_it() -> None:
    arrived: list[int] = []
    env = LocalEnvironment("classes")
    env.from_batch([1, 9]).map(Bounded, capacity=5).map(Doubled, capacity=3).sink(arrived.append)
    env.submit(autostop=True)
    assert arrived == [2, 10]


@pytest.mark.parametrize("capacity", [0, -1, 1.5, "many", True])
def test_a_capacity_that_cannot_work_is_refused(capacity: Any) -> None:
    stream = LocalEnvironment("wrong").from_batch([1])
    with pytest.raises(GraphError, match=r"map: capacity is .*, which is not a positive number"):
        stream.map(str, capacity=capacity)
