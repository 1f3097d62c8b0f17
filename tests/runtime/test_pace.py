"""How many records a task asks for at once: a record that is there does not wait for those after it."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

from sage import LocalEnvironment, StopSignal
from sage._backends.threads import ThreadsBackend
from sage._runtime.pace import READ_S, TimedPace
from sage.records import BATCH_RECORDS_MAX
from sage.testing import StepBackend

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

CHEAP_S = 1e-7


class Clock:
    """Time that only reading takes, and a source whose record `i` takes `costs(i)` seconds."""

    def __init__(self, costs: Callable[[int], float]) -> None:
        self.costs = costs
        self.now = 0.0
        self.count = 0
        self.waited_s: list[float] = []
        """How long each record lay in the hands of the reader while it read further ones."""

    def reads(self, pace: TimedPace, records: int) -> list[int]:
        """Read as a task does, and return how many records each read gave."""
        sizes = []
        while self.count < records:
            size = pace.read_limit()
            began_at = self.now
            given_at = []
            for _ in range(size):
                self.now += self.costs(self.count)
                given_at.append(self.now)
                self.count += 1
            self.waited_s += [self.now - at for at in given_at]
            pace.has_read(size, began_at, self.now)
            pace.measured(size, self.now - began_at)
            sizes.append(size)
        return sizes


def test_a_source_of_a_record_each_millisecond_is_asked_for_one() -> None:
    clock = Clock(lambda _: 0.001)
    assert set(clock.reads(TimedPace(), 1_000)) == {1}


def test_a_fast_source_fills_batches() -> None:
    sizes = Clock(lambda _: CHEAP_S).reads(TimedPace(), 100_000)
    assert max(sizes) == BATCH_RECORDS_MAX
    assert len(sizes) < 100


def test_no_record_waits_longer_than_the_bound_in_a_source_of_steady_cost() -> None:
    for cost_s in (1e-6, 1e-5, 1e-4, 2e-4):
        clock = Clock(lambda _, cost_s=cost_s: cost_s)  # type: ignore[misc]
        clock.reads(TimedPace(), 10_000)
        late = sorted(clock.waited_s)[int(len(clock.waited_s) * 0.99)]
        assert late <= 4 * READ_S, cost_s  # a read may be four times too large once, when it was last fast enough


def test_a_source_of_bursts_keeps_no_end_of_a_burst_until_the_next() -> None:
    for burst, pause_s in ((10, 0.001), (20, 0.01), (100, 0.1)):
        # A record alone takes a step of some microseconds, which is what ends the careful time.
        clock = Clock(lambda place, burst=burst, pause_s=pause_s: 1e-5 if place % burst else pause_s)  # type: ignore[misc]
        clock.reads(TimedPace(), burst * 50)
        kept = sum(waited_s > pause_s / 2 for waited_s in clock.waited_s)
        assert kept <= 5, (burst, pause_s)


def test_a_source_that_waits_now_and_then_is_still_read_in_batches() -> None:
    # Reading a file: a block of 10,000 records, then a millisecond for the next block.
    clock = Clock(lambda place: CHEAP_S if place % 10_000 else 0.001)
    sizes = clock.reads(TimedPace(), 1_000_000)
    assert 1_000_000 / len(sizes) > 100


def test_each_record_is_at_the_sink_before_the_source_waits_for_the_next() -> None:
    arrived: list[int] = []
    kept: list[int] = []

    def source() -> Iterator[int]:
        for value in range(50):
            time.sleep(0.001)
            kept.append(value - len(arrived))
            yield value

    env = LocalEnvironment("slow source")
    env.from_batch(source).map(lambda value: value + 1).sink(arrived.append)
    env.submit(autostop=True)
    assert arrived == list(range(1, 51))
    assert kept == [0] * 50


def test_a_source_that_is_polled_gives_a_record_soon_after_it_is_there() -> None:
    backend = StepBackend(1)
    due = [backend.now() + 0.2 * place for place in range(1, 51)]
    late: list[float] = []

    def poll() -> float | StopSignal | None:
        if not due:
            return StopSignal()
        return due.pop(0) if backend.now() >= due[0] else None

    env = LocalEnvironment("polled", backend=lambda: backend)
    env.from_source(poll).sink(lambda due_at: late.append(backend.now() - due_at))
    env.submit(autostop=True)
    assert len(late) == 50
    assert max(late) <= 0.2 / 6  # an eighth of the time between two records, and some steps of a millisecond


class Noting(ThreadsBackend):
    """Notes what each task says of its steps."""

    def __init__(self) -> None:
        super().__init__()
        self.steps: list[list[tuple[int, float]]] = []

    def pace(self) -> TimedPace:
        steps: list[tuple[int, float]] = []
        self.steps.append(steps)

        class Noted(TimedPace):
            def measured(self, records: int, elapsed_s: float) -> None:
                steps.append((records, elapsed_s))
                super().measured(records, elapsed_s)

        return Noted()


def test_to_hand_a_list_to_many_branches_is_not_taken_for_slow_records() -> None:
    """The time goes into the channels, and is as long for one record as for a full batch."""
    backend = Noting()
    env = LocalEnvironment("branches", backend=lambda: backend)
    stream = env.from_batch(range(5_000))
    for _ in range(20):
        stream.map(abs).sink(lambda _: None)
    env.submit(autostop=True)
    source = [steps for steps in backend.steps if all(elapsed_s == 0.0 for _, elapsed_s in steps)]
    assert [sum(records for records, _ in steps) for steps in source] == [5_000]
