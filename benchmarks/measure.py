"""How a case is measured: sides alternated in one process, medians, and the spread."""

from __future__ import annotations

import gc
import statistics
from dataclasses import dataclass
from time import perf_counter
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence


@dataclass(frozen=True, slots=True)
class Scale:
    """How much is measured.

    Attributes:
        records: records of a throughput case.
        rounds: how often each side of a throughput case runs.
        short_rounds: how often each side runs where a run takes milliseconds.
        slow_s: what a slow record takes, in seconds.
    """

    records: int
    rounds: int
    short_rounds: int
    slow_s: float


FULL = Scale(records=1_000_000, rounds=9, short_rounds=200, slow_s=1.0)
QUICK = Scale(records=100_000, rounds=5, short_rounds=30, slow_s=0.2)


@dataclass(frozen=True, slots=True)
class Figure:
    """What came of a case.

    Attributes:
        case: what was measured.
        unit: what the number counts, such as "of the loop".
        measured: the median.
        low: the lower quartile.
        high: the upper quartile.
        target: the bound.
        bound: whether the target is a least or a most.
    """

    case: str
    unit: str
    measured: float
    low: float
    high: float
    target: float
    bound: Literal["at least", "at most"]

    @property
    def is_met(self) -> bool:
        """Whether the median keeps the target."""
        return self.measured >= self.target if self.bound == "at least" else self.measured <= self.target


def at_least(case: str, unit: str, target: float, samples: Sequence[float]) -> Figure:
    """Return the figure of a case that should not be below its target."""
    return Figure(case, unit, *spread(samples), target, "at least")


def at_most(case: str, unit: str, target: float, samples: Sequence[float]) -> Figure:
    """Return the figure of a case that should not be above its target."""
    return Figure(case, unit, *spread(samples), target, "at most")


def spread(samples: Sequence[float]) -> tuple[float, float, float]:
    """Return the median and both quartiles."""
    if len(samples) < 2:
        return samples[0], samples[0], samples[0]
    low, middle, high = statistics.quantiles(samples, n=4, method="inclusive")
    return middle, low, high


def timed(side: Callable[[], object]) -> float:
    """Return how long a call takes, in seconds; garbage of the one before is collected first."""
    gc.collect()
    started_at = perf_counter()
    side()
    return perf_counter() - started_at


def alternated(rounds: int, *sides: Callable[[], object]) -> list[tuple[float, ...]]:
    """Return the seconds of every side in every round.

    The sides take turns and begin each round in the other order, so that what else runs on the machine, a frequency
    that changes or a cache that was just filled meets all of them alike. A first round is not counted.
    """
    for side in sides:
        side()
    taken = []
    for number in range(rounds):
        order = range(len(sides)) if number % 2 == 0 else range(len(sides) - 1, -1, -1)
        seconds = {place: timed(sides[place]) for place in order}
        taken.append(tuple(seconds[place] for place in range(len(sides))))
    return taken
