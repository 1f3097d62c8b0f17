"""Channels: bounded queues of batches from many producers to one consumer."""

from __future__ import annotations

import threading
from collections import deque
from typing import TYPE_CHECKING

from sage.records import EndOfStream

if TYPE_CHECKING:
    from collections.abc import Callable

    from sage.records import Element

CHANNEL_RECORDS_MAX = 4096


class InFlight:
    """Counts what is on its way inside a part of the graph: a feedback loop, or all of a job in lockstep.

    Whoever puts an element into a channel of that part counts it, and its consumer takes it off when everything that
    followed from it was put on in turn. So the count is zero exactly when nothing is left, with no guess about time.
    """

    def __init__(self, count: int = 0) -> None:
        self._count = count
        self._lock = threading.Lock()
        self._waiting: list[Callable[[], None]] = []

    def when_zero(self, wake: Callable[[], None]) -> None:
        """Call `wake` each time the count falls to zero."""
        self._waiting.append(wake)

    def add(self, count: int) -> None:
        """Count elements that are about to be put (positive) or that are done with (negative)."""
        with self._lock:
            self._count += count
            is_zero = self._count == 0
        if is_zero:
            for wake in self._waiting:
                wake()

    @property
    def is_zero(self) -> bool:
        """Whether nothing is on its way."""
        return self._count == 0


class Channel:
    """Joins tasks: many producers put, one task gets. First in, first out for each producer.

    The bound is in records: an element is taken in while fewer than `capacity_records` wait, so at most one batch more
    than that is held.

    Attributes:
        counters: count what is on its way here; see `InFlight`.
        wake_consumer: called when there is something to get.
        undelivered: how many records were put after it was closed.
        enters: the counter of a loop that is entered here from other processes; whoever puts for them counts the end
            of each of their streams off it.
    """

    def __init__(self, capacity_records: int = CHANNEL_RECORDS_MAX) -> None:
        self._capacity_records = capacity_records
        self._elements: deque[tuple[int, Element]] = deque()
        self._records = 0
        self._lock = threading.Lock()
        self._closed = False
        self._waiting: list[Callable[[], None]] = []
        self.counters: tuple[InFlight, ...] = ()
        self.wake_consumer: Callable[[], None] = _nobody
        self.undelivered = 0
        self.enters: InFlight | None = None

    def put_nowait(self, port: int, element: Element, wake: Callable[[], None], *, force: bool = False) -> bool:
        """Put an element for an input of the consumer and return whether there was room.

        Args:
            port: the input.
            element: what travels.
            wake: called once there is room, if there was none.
            force: whether to put it in any case, as feedback does: a loop that waits for itself would never end.
        """
        with self._lock:
            if self._closed:
                self.undelivered += len(element)
                return True
            if self._records >= self._capacity_records and not force:
                self._waiting.append(wake)
                return False
            for counter in self.counters:
                counter.add(1)
            was_empty = not self._elements
            self._elements.append((port, element))
            self._records += len(element)
        if was_empty:
            self.wake_consumer()
        return True

    def get_nowait(self) -> tuple[int, Element] | None:
        """Return the next element with its input, or None if there is none."""
        with self._lock:
            if not self._elements:
                return None
            taken = self._elements.popleft()
            self._records -= len(taken[1])
            if not self._waiting or self._records >= self._capacity_records:
                return taken
            waiting, self._waiting = self._waiting, []
        for wake in waiting:
            wake()
        return taken

    def close(self) -> int:
        """Drop what waits and whatever is put from now on, and return how many records were dropped."""
        with self._lock:
            dropped = list(self._elements)
            self._elements.clear()
            self._records = 0
            self._closed = True
            waiting, self._waiting = self._waiting, []
        for counter in self.counters:
            counter.add(-len(dropped))
        for wake in waiting:
            wake()
        return sum(len(element) for _, element in dropped)

    @property
    def fill(self) -> float:
        """How full the channel is, from 0 to about 1."""
        return self._records / self._capacity_records


def _nobody() -> None:
    """Stand for the consumer until there is one."""


def ends(element: Element) -> bool:
    """Return whether an element is the last of its producer."""
    return isinstance(element, EndOfStream)
