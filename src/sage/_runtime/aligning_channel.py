"""A channel of a durable job: it holds back the producers that are ahead until the barrier of the others has come."""

from __future__ import annotations

from collections import deque
from itertools import islice
from typing import TYPE_CHECKING

from sage._runtime.channel import Channel, ends
from sage.records import Barrier, Batch

if TYPE_CHECKING:
    from collections.abc import Callable

    from sage.records import Element


class AligningChannel(Channel):
    """Passes a barrier on when all producers have sent it, between the records before it and those behind.

    Elements of a producer that has sent the barrier are held back in a room of their own, as large as the first, so
    that those that are behind always have theirs. A producer is known by its `wake`.

    Attributes:
        producers: how many streams lead here that have not ended; set before the first element comes.
    """

    def __init__(self, capacity_records: int, now: Callable[[], float]) -> None:
        super().__init__(capacity_records, now=now)
        self.producers = 0
        self._barriers = 0
        self._ahead: set[Callable[[], None]] = set()
        self._held: deque[tuple[int, Element, int]] = deque()
        self._held_records = self._held_bytes = 0
        self._held_up: dict[Callable[[], None], None] = {}
        self._waited_for: Barrier | None = None

    def put_nowait(self, port: int, element: Element, wake: Callable[[], None], *, force: bool = False) -> bool:
        """Put an element for an input of the consumer and return whether there was room."""
        if isinstance(element, Barrier):
            with self._lock:
                self._barriers += 1
                self._ahead.add(wake)
            self._align(element)
            return True
        with self._lock:
            if wake in self._ahead and not self._closed:
                return self._hold_back(port, element, wake, force=force)
        # Only the producer itself puts itself ahead, and it is here.
        if not super().put_nowait(port, element, wake, force=force):
            return False
        if ends(element):
            with self._lock:
                self.producers -= 1
            self._align(None)
        return True

    @property
    def has_barrier(self) -> bool:
        """Whether the barrier is the next element."""
        return bool(self._elements) and isinstance(self._elements[0][1], Barrier)

    def take_barrier(self) -> int | None:
        """Take out the barrier that is the next element, and return its number, or None if it is another element."""
        if not self.has_barrier:
            return None
        with self._lock:
            _, barrier, _ = self._elements.popleft()
        assert isinstance(barrier, Barrier)
        return barrier.number

    def take_barrier_from_behind(self) -> list[tuple[int, Batch]] | None:
        """Take out the barrier, and return the batches before it, which stay; None if it has not come yet."""
        with self._lock:
            for place, (_, element, _) in enumerate(self._elements):
                if isinstance(element, Barrier):
                    before = list(islice(self._elements, place))
                    del self._elements[place]
                    return [(port, batch) for port, batch, _ in before if isinstance(batch, Batch)]
        return None

    def get_nowait(self) -> tuple[int, Element] | None:
        """Return the next element with its input, or None if it is empty or a barrier comes next."""
        # One that is empty now may get a barrier in the next moment, which only `take_barrier` may take.
        if self.is_empty or self.has_barrier:
            return None
        return super().get_nowait()

    def close(self) -> int:
        with self._lock:
            held = sum(len(element) for _, element, _ in self._held)
            held_up, self._held_up = self._held_up, {}
            count = len(self._held)
            self._held.clear()
            self._ahead.clear()
        for counter in self.counters:
            counter.add(-count)
        dropped = super().close()
        for wake in held_up:
            wake()
        return dropped + held

    def _hold_back(self, port: int, element: Element, wake: Callable[[], None], *, force: bool) -> bool:
        """Keep an element behind the barrier, if there is room or it has to be; called under the lock."""
        size = element.bytes_count
        is_full = self._held_records >= self._capacity_records or self._held_bytes + size > self._capacity_bytes
        if self._held and is_full and not force:
            self._held_up[wake] = None
            return False
        for counter in self.counters:
            counter.add(1)
        self._held.append((port, element, size))
        self._held_records += len(element)
        self._held_bytes += size
        return True

    def _align(self, barrier: Barrier | None) -> None:
        """Let the barrier and everything behind it through, if all producers have sent it or have ended."""
        with self._lock:
            barrier = self._waited_for = self._waited_for if barrier is None else barrier
            if barrier is None or self._barriers < self.producers or self._closed:
                return
            self._elements.append((0, barrier, 0))
            self._elements += self._held
            self._records += self._held_records
            self._bytes += self._held_bytes
            self.producers -= sum(ends(element) for _, element, _ in self._held)
            self._barriers = self._held_records = self._held_bytes = 0
            self._held.clear()
            self._ahead.clear()
            held_up, self._held_up, self._waited_for = self._held_up, {}, None
        self.wake_consumer()
        for wake in held_up:
            wake()
