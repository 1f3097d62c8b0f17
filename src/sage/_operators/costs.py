"""The duration of an operator's calls: a stop holds costly ones back, and queues are as long as a second of work."""

from __future__ import annotations

from collections import deque
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable

COSTLY_S = 0.010
"""A function is costly if a record of it, or a batch of one that takes batches, takes longer than this."""

CALLS_SEEN = 5
"""How many of the latest measurements decide: their median ignores two that something else delayed."""


FIRST_FACTOR = 4
"""A single measurement has to be so many times as high, as something else may have delayed it; each further one less.

A thread that waits for the interpreter's lock is not known to wait for a processor, although who holds it may.
"""


class Costs:
    """The latest measurements of one operator.

    Args:
        running_s: returns the part of a time in which the calling thread was not kept waiting for a processor.
    """

    __slots__ = ("_latest", "_running_s", "_took_long")

    def __init__(self, running_s: Callable[[float], float]) -> None:
        self._running_s = running_s
        self._latest: deque[float] = deque(maxlen=CALLS_SEEN)
        self._took_long = False

    def begins(self) -> None:
        """Say that calls begin, so that what the thread waited before them is not taken off them."""
        if self._took_long or not self._latest:
            self._running_s(0.0)

    def measured(self, calls: int, elapsed_s: float) -> None:
        """Say how long some calls took, one after another, on this thread."""
        each_s = elapsed_s / (calls or 1)
        self._took_long = each_s > COSTLY_S
        if each_s > COSTLY_S:  # only now, as to ask the system costs as much as many cheap calls
            each_s = self._running_s(elapsed_s) / (calls or 1)
        self._latest.append(each_s)

    @property
    def typical_s(self) -> float | None:
        """The median of the measurements in seconds, or None before the first; of two, the lower one."""
        latest = sorted(self._latest)
        return latest[(len(latest) - 1) // 2] if latest else None

    @property
    def are_high(self) -> bool:
        """Whether a call takes long, as far as that is known."""
        missing = CALLS_SEEN - len(self._latest)
        clearly = 1 + (FIRST_FACTOR - 1) * missing / (CALLS_SEEN - 1)
        return (self.typical_s or 0.0) > COSTLY_S * clearly
