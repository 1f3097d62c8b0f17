"""Records move on as they come: a slow one delays nobody who is done."""

from __future__ import annotations

import threading
import time
from typing import TYPE_CHECKING

import pytest

from sage import LocalEnvironment, Outcome

if TYPE_CHECKING:
    from support.fair_clock import FairClock


@pytest.mark.slow
def test_a_record_is_at_the_sink_before_the_next_one_is_done(clock: FairClock) -> None:
    """Five records through a map of 1 s each arrive one by one."""
    at: list[float] = []

    def work(number: int) -> int:
        time.sleep(1)
        return number

    env = LocalEnvironment("test")
    env.from_batch(range(5)).map(work).sink(lambda number: at.append(time.monotonic()))
    began = time.monotonic()
    env.submit(autostop=True)
    for number, moment in enumerate(at, 1):
        assert moment - began >= number - 0.01
        assert clock.elapsed_s(began, moment) < number + 0.5
    assert len(at) == 5


def test_a_slow_record_among_cheap_ones_goes_on_at_once(clock: FairClock) -> None:
    """After 10,000 cheap records, each slow one's result is at the sink within 0.1 s of its end.

    The sink is in the map's own task in one run, and in a task of its own in the other.
    """
    for parallelism in (1, 2):
        done: dict[int, float] = {}
        arrived: dict[int, float] = {}

        def work(number: int, done: dict[int, float] = done) -> int:
            if number >= 10_000:
                time.sleep(0.2)
                done[number] = time.monotonic()
            return number

        def arrive(number: int, done: dict[int, float] = done, arrived: dict[int, float] = arrived) -> None:
            if number in done:
                arrived[number] = time.monotonic()

        env = LocalEnvironment("test")
        env.from_batch(range(10_005)).map(work, parallelism=parallelism).sink(arrive)
        env.submit(autostop=True)
        assert sorted(arrived) == sorted(done) == list(range(10_000, 10_005))
        assert max(clock.elapsed_s(done[number], arrived[number]) for number in done) < 0.1


def test_a_cancel_during_slow_records_is_noticed_within_one_record(clock: FairClock) -> None:
    """Within the 0.2 s of the record in hand and 0.1 s more."""
    is_slow = threading.Event()
    worked: list[int] = []

    def work(number: int) -> int:
        if number >= 10_000:
            is_slow.set()
            time.sleep(0.2)
            worked.append(number)
        return number

    env = LocalEnvironment("test")
    env.from_batch(range(10_100)).map(work).sink(lambda number: None)
    job = env.submit()
    assert is_slow.wait(20)
    began = time.monotonic()
    job.cancel()
    assert clock.elapsed_s(began) < 0.2 + 0.1
    assert len(worked) <= 2
    assert job.report is not None
    assert job.report.state is Outcome.CANCELLED
