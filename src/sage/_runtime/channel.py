"""Channels: bounded queues of batches from many producers to one consumer."""

from __future__ import annotations

import threading
import time
from collections import deque
from typing import TYPE_CHECKING

from sage.records import BATCH_RECORDS_MAX, Batch, EndOfStream

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from sage._operators.operator import Operator
    from sage.records import Element

CHANNEL_RECORDS_MAX = 4096
CHANNEL_BYTES_MAX = 16 << 20

FOLLOW_EVERY = 16
"""At one step of so many of a fast consumer, its channel may become shorter."""

PORTIONS = 8
"""A channel that holds less than the most is filled in at least so many portions."""


class InFlight:
    """Counts the records in flight inside a part of the graph: a feedback loop, or all of a job in lockstep.

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

    It is bounded in records and in bytes: an element is taken in while fewer than `capacity_records` wait, and if all
    of them take at most `capacity_bytes` with it; an empty channel takes in any element.

    Attributes:
        follows_work: whether it holds about a second of its consumer's work, because the user did not set a capacity.
        portion: how many records one element should have at most, so that the bound holds.
        is_remote: whether batches go to another process, in a form that cannot be cut.
        counters: count the records in flight here; see `InFlight`.
        wake_consumer: called when there is something to get.
        undelivered: how many records were put after it was closed.
        waited_s: for how long producers waited for room, all together, in seconds.
        enters: the counter of a loop that is entered here from other processes; whoever puts for them counts the end
            of each of their streams off it.
    """

    is_remote = False

    def __init__(
        self,
        capacity_records: int = CHANNEL_RECORDS_MAX,
        capacity_bytes: int = CHANNEL_BYTES_MAX,
        now: Callable[[], float] = time.monotonic,
    ) -> None:
        self._largest = self._capacity_records = capacity_records
        self.portion = _portion(capacity_records)
        self.follows_work = False
        self._steps = -1
        self._capacity_bytes = capacity_bytes
        self._elements: deque[tuple[int, Element, int]] = deque()
        self._records = 0
        self._bytes = 0
        self._lock = threading.Lock()
        self._closed = False
        # A dict for its order. They are woken one after the other, each by the one before that has put its element: if
        # all of a thousand were woken for the room of one, they would do nothing else.
        self._waiting: dict[Callable[[], None], None] = {}
        self.counters: tuple[InFlight, ...] = ()
        self.wake_consumer: Callable[[], None] = _nobody
        self.undelivered = 0
        self.waited_s = 0.0
        self._now = now
        self._waiting_since: dict[Callable[[], None], float] = {}
        self.enters: InFlight | None = None

    def prepare(self, batch: Batch, refuse: Callable[[Batch, Exception], bool]) -> Element:  # noqa: ARG002
        """Return a batch in the form in which it is put, without the records that cannot travel.

        Args:
            batch: the records.
            refuse: called with each record that cannot travel, and why; returns whether those behind it follow.
        """
        return batch

    def when_delivered(self, wake: Callable[[], None]) -> Callable[[], bool]:  # noqa: ARG002
        """Return a check whether all batches so far have reached the consumer; then `wake` is called."""
        return _always

    def put_nowait(self, port: int, element: Element, wake: Callable[[], None], *, force: bool = False) -> bool:
        """Put an element for an input of the consumer and return whether there was room.

        Args:
            port: the input.
            element: the batch or the end of the stream.
            wake: called once there is room again; equal for every call of one producer.
            force: whether to put it in any case, as feedback does: a loop that waits for itself would never end.
        """
        size = element.bytes_count
        with self._lock:
            if self._closed:
                self.undelivered += len(element)
                return True
            if not force and not self._has_room(size):
                self._waiting[wake] = None
                self._waiting_since.setdefault(wake, self._now())
                return False
            if self._waiting_since and (since := self._waiting_since.pop(wake, None)) is not None:
                self.waited_s += self._now() - since
            self._waiting.pop(wake, None)
            for counter in self.counters:
                counter.add(1)
            was_empty = not self._elements
            self._elements.append((port, element, size))
            self._records += len(element)
            self._bytes += size
            next_one = self._next_waiting()
        if was_empty:
            self.wake_consumer()
        if next_one is not None:
            next_one()
        return True

    def put_portion(
        self, port: int, element: Element, wake: Callable[[], None], *, force: bool = False
    ) -> Element | None:
        """Put as much of an element as one should have, and return the rest: all of it if the channel is full, or None.

        It is cut here, since a portion may be one record until the consumer has shown how fast it is, and as the room
        in bytes is known here.
        """
        part, rest = element, None
        if isinstance(element, Batch) and not force:
            count, size, room = len(element), element.bytes_count, self._capacity_bytes - self._bytes
            fitting = self.portion if size <= room else min(self.portion, max(1, count * room // size))
            if count > fitting:
                part, rest = element.slice(0, fitting), element.slice(fitting)
        return rest if self.put_nowait(port, part, wake, force=force) else element

    def get_nowait(self) -> tuple[int, Element] | None:
        """Return the next element with its input, or None if it is empty."""
        with self._lock:
            if not self._elements:
                return None
            port, element, size = self._elements.popleft()
            self._records -= len(element)
            self._bytes -= size
            next_one = self._next_waiting()
        if next_one is not None:
            next_one()
        return port, element

    def _next_waiting(self) -> Callable[[], None] | None:
        """Take out the first who waits for room, if there is room; called under the lock."""
        if not self._waiting or not self._has_room(1):
            return None
        wake = next(iter(self._waiting))
        del self._waiting[wake]
        return wake

    def give_up(self, wake: Callable[[], None]) -> None:
        """Let a producer that may have been woken put nothing more, and wake the next one in its place."""
        with self._lock:
            self._waiting.pop(wake, None)
            next_one = self._next_waiting()
        if next_one is not None:
            next_one()

    def close(self) -> int:
        """Drop waiting and later elements, and return how many records were dropped."""
        with self._lock:
            dropped = list(self._elements)
            self._elements.clear()
            self._records = self._bytes = 0
            self._closed = True
            waiting, self._waiting = self._waiting, {}
        for counter in self.counters:
            counter.add(-len(dropped))
        for wake in waiting:
            wake()
        return sum(len(element) for _, element, _ in dropped)

    def follow(self, operators: Sequence[Operator]) -> None:
        """Follow the work of the consumer after one of its steps; at most steps of a fast one nothing is to be done."""
        self._steps += 1
        if not self.follows_work or (self.portion == BATCH_RECORDS_MAX and self._steps % FOLLOW_EVERY):
            return
        self.resize(min(self._largest, a_second_of(operators)))

    def resize(self, records: int) -> None:
        """Change the bound in records."""
        if records == self._capacity_records:
            return
        with self._lock:
            self._capacity_records = records
            self.portion = _portion(records)
            next_one = self._next_waiting()
        if next_one is not None:
            next_one()

    @property
    def capacity_records(self) -> int:
        """The bound in records as it stands."""
        return self._capacity_records

    @property
    def is_empty(self) -> bool:
        """Whether there is nothing to get."""
        return not self._elements

    @property
    def fill(self) -> float:
        """How full the channel is, from 0 to about 1."""
        return max(self._records / self._capacity_records, self._bytes / self._capacity_bytes)

    def _has_room(self, size: int) -> bool:
        fits = self._bytes + size <= self._capacity_bytes or not self._elements
        return fits and self._records < self._capacity_records


def _portion(records: int) -> int:
    return BATCH_RECORDS_MAX if records >= CHANNEL_RECORDS_MAX else max(1, records // PORTIONS)


def a_second_of(operators: Sequence[Operator]) -> int:
    """Return how many records a chain works through in about a second, and at least twice as many as it has in hand."""
    least = 2 * operators[0].concurrency
    if operators[0].costs.typical_s is None:
        return least
    record_s = sum([operator.record_s for operator in operators])
    return CHANNEL_RECORDS_MAX if record_s * CHANNEL_RECORDS_MAX < 1 else max(least, int(1 / record_s))


def _nobody() -> None:
    """Stand for the consumer until there is one."""


def _always() -> bool:
    return True


def ends(element: Element) -> bool:
    """Return whether an element is the last of its producer."""
    return isinstance(element, EndOfStream)
