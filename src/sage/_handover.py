"""From a job to the program that runs it: records are handed over one by one, by a thread of the job."""

from __future__ import annotations

import threading
from collections import deque
from typing import TYPE_CHECKING, Generic

from sage._types import T

if TYPE_CHECKING:
    from collections.abc import Iterator

RECORDS_MAX = 256
"""How many records wait for the program at most; the sink waits when there are as many."""


class Handover(Generic[T]):
    """A bounded queue whose both ends may leave.

    Attributes:
        records_max: how many records wait at most, or None if the program takes them only when the job has ended.
    """

    def __init__(self) -> None:
        self.records_max: int | None = RECORDS_MAX
        self._records: deque[T] = deque()
        self._changed = threading.Condition()
        self._is_ended = False
        self._is_left = False

    def put(self, record: T) -> None:
        """Add a record, as soon as there is room; nothing happens when the program has left."""
        with self._changed:
            self._changed.wait_for(lambda: self._is_left or self._has_room())
            if not self._is_left:
                self._records.append(record)
                self._changed.notify_all()

    def end(self, _: object = None) -> None:
        """Say that no record follows."""
        with self._changed:
            self._is_ended = True
            self._changed.notify_all()

    def leave(self) -> None:
        """Say that nobody takes the records any more."""
        with self._changed:
            self._is_left = True
            self._records.clear()
            self._changed.notify_all()

    def __iter__(self) -> Iterator[T]:
        """Yield the records until the end."""
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._records or self._is_ended)
                taken = list(self._records)
                self._records.clear()
                self._changed.notify_all()
            if not taken:
                return
            yield from taken

    def _has_room(self) -> bool:
        return self.records_max is None or len(self._records) < self.records_max
