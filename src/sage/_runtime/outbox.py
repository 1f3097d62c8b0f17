"""The outgoing side of a task: batches that wait for room in the channels behind it."""

from __future__ import annotations

from collections import deque
from typing import TYPE_CHECKING

from sage._runtime.channel import ends
from sage._runtime.partition import count_copies
from sage.records import BATCH_RECORDS_MAX, END_OF_STREAM

if TYPE_CHECKING:
    from collections.abc import Callable

    from sage._runtime.pace import Pace
    from sage._runtime.partition import Outlet
    from sage.records import Batch, Element


class Outbox:
    """Splits batches over the consumers of a task, and puts them into their channels in order.

    Attributes:
        outlets: where the records of each operator go, by its place in the chain.
        queue: the outlet, the number of its channel, and the element to put there.
    """

    def __init__(self, pace: Pace) -> None:
        self.outlets: dict[int, tuple[Outlet, ...]] = {}
        self.queue: deque[tuple[Outlet, int, Element]] = deque()
        self._pace = pace
        self._has_ended = False
        self._deliveries: list[Callable[[], bool]] | None = None
        self._refused_count = 0  # records with a key that cannot be used, with all that came in their batch

    def put(
        self,
        place: int,
        batch: Batch,
        cannot_send: Callable[[int, Batch, Exception], BaseException | None],
        *,
        letters: bool,
    ) -> list[BaseException]:
        """Queue a batch for the consumers of the operator at `place`, and return the errors that fail the job.

        Args:
            place: the operator's place in the chain.
            batch: its records.
            cannot_send: called with `place`, a record that cannot travel, and why; returns an error that fails the job.
            letters: whether they are dead letters.
        """
        failed: list[BaseException] = []

        def refuse(record: Batch, error: Exception) -> bool:
            failure = cannot_send(place, record, error)
            failed.extend([] if failure is None else [failure])
            return failure is None

        outlets = [outlet for outlet in self.outlets.get(place, ()) if outlet.letters is letters]
        if outlets:
            self._pace.has_emitted(len(batch), batch.bytes_count)
        count_copies(batch, outlets)
        fits = len(batch) <= BATCH_RECORDS_MAX
        for number, outlet in enumerate(outlets):
            if fits and outlet.takes_whole:
                self.queue.append((outlet, 0, batch))
                continue
            try:
                parts = list(outlet.partitioner.split(batch))
            except BaseException:
                self._refused_count += len(batch) * sum(one.partitioner.copies for one in outlets[number:])
                raise
            for target, part in parts:
                channel = outlet.channels[target]
                for portion in part.portions(channel.portion if channel.is_remote else BATCH_RECORDS_MAX):
                    self.queue.append((outlet, target, channel.prepare(portion, refuse)))
        return failed

    def flush(self, wake: Callable[[], None]) -> bool:
        """Put queued batches into the channels, and return whether all of them fit; if not, `wake` is called later."""
        queue = self.queue
        while queue:
            outlet, target, element = queue[0]
            channel = outlet.channels[target]
            rest = channel.put_portion(outlet.port, element, wake, force=outlet.feedback)
            if rest is element:
                return False
            if rest is not None:
                queue[0] = outlet, target, rest
                continue
            queue.popleft()
            if outlet.enters is not None and ends(element):
                outlet.enters.add(-1)
        return True

    def end(self) -> None:
        """Queue the end of the stream for every consumer. Does nothing twice."""
        if not self._has_ended:
            self._has_ended = True
            self.send(END_OF_STREAM)

    def send(self, element: Element) -> None:
        """Queue an element for every consumer."""
        for outlet in self._all():
            self.queue.extend((outlet, target, element) for target in range(len(outlet.channels)))

    def is_delivered(self, wake: Callable[[], None]) -> bool:
        """Return whether everything has reached its consumers, so that nothing of this task can be lost any more."""
        if self._deliveries is None:
            self._deliveries = [channel.when_delivered(wake) for outlet in self._all() for channel in outlet.channels]
        return all(is_delivered() for is_delivered in self._deliveries)

    def drop(self, wake: Callable[[], None]) -> int:
        """Forget the queue, and return how many records were in it."""
        if self.queue:
            outlet, target, _ = self.queue[0]
            outlet.channels[target].give_up(wake)
        dropped = sum(len(element) for _, _, element in self.queue) + self._refused_count
        self.queue.clear()
        self._refused_count = 0
        return dropped

    def _all(self) -> list[Outlet]:
        return [outlet for outlets in self.outlets.values() for outlet in outlets]
