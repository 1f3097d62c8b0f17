"""The contents of channels: batches of records and the end of a stream."""

from __future__ import annotations

from itertools import chain, compress, repeat
from time import perf_counter
from typing import TYPE_CHECKING, Protocol, TypeVar

from sage._sizes import size_of_all

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

X = TypeVar("X")

BATCH_RECORDS_MAX = 2048
"""No operator takes more records than this at once, so that a stop or a slow record waits for little.

With twice as many, a chain of cheap functions gains 2 %; with half as many it loses 5 %.
"""

BATCH_BYTES_MAX = 512 << 10
"""A task that has emitted a larger batch takes fewer records next time."""


class RecordRequest(Protocol):
    """The call of a served pipeline that a record belongs to; it counts the records that came of it."""

    is_streamed: bool
    is_given_up: bool

    def add(self, count: int) -> None:
        """Count records that came of one of this request's."""

    def drop(self) -> None:
        """Count off a record that has ended."""

    def answer(self, record: object) -> None:
        """Give a record that arrived at the end."""

    def fail(self, error: BaseException) -> None:
        """Give an error instead of an answer."""


class Change(Protocol):
    """Picks from a lane of a batch, whatever it holds."""

    def __call__(self, lane: Sequence[X], /) -> Sequence[X]:
        """Return the part of the lane that remains."""


class Batch:
    """Records that travel together, with their keys and requests in parallel lists where the stream has them.

    A batch and its lists are never changed once it was handed on: a stream used twice sends the same batch to both
    branches.

    Attributes:
        values: the records, plain Python objects; a list, or a range, as making a list of its numbers takes time.
        keys: the key of each record, or None for a stream without keys.
        requests: the service request that each record belongs to, or None outside a served pipeline.
    """

    __slots__ = ("_bytes_count", "keys", "requests", "values")

    def __init__(
        self,
        values: Sequence[object],
        keys: Sequence[object] | None = None,
        requests: Sequence[RecordRequest | None] | None = None,
    ) -> None:
        self.values = values
        self.keys = keys
        self.requests = requests
        self._bytes_count = -1

    def __len__(self) -> int:
        return len(self.values)

    def __repr__(self) -> str:
        return f"Batch({self.values!r})"

    @property
    def bytes_count(self) -> int:
        """About how many bytes the records take."""
        if self._bytes_count < 0:
            self._bytes_count = size_of_all(self.values)
        return self._bytes_count

    def slice(self, start: int, stop: int | None = None) -> Batch:
        """Return the records from `start` to before `stop`."""
        return self._each(lambda lane: lane[start:stop])

    def portions(self, records_max: int) -> Iterator[Batch]:
        """Yield the records as batches of at most so many."""
        if len(self.values) <= records_max:
            yield self
            return
        for start in range(0, len(self.values), records_max):
            yield self.slice(start, start + records_max)

    def parts(self, first: int) -> Iterator[Batch]:
        """Yield the records in parts that grow from `first` on, up to a full batch.

        Whoever cannot take as much cuts a part again. If all parts had the size of the first, they would stay as small
        to the end; if one rest was cut again each time, it would be copied as often.
        """
        start, size = 0, first
        while start < len(self):
            yield self.slice(start, start + size)
            start, size = start + size, min(size * 4, BATCH_RECORDS_MAX)

    def stride(self, start: int, step: int) -> Batch:
        """Return every `step`-th record from `start` on."""
        return self._each(lambda lane: lane[start::step])

    def select(self, mask: Sequence[object]) -> Batch:
        """Return the records whose place in `mask` is true."""
        return self._each(lambda lane: list(compress(lane, mask)))

    def pick(self, places: list[int]) -> Batch:
        """Return the records at `places`, in that order."""
        return self._each(lambda lane: [lane[place] for place in places])

    def replace(self, values: Sequence[object]) -> Batch:
        """Return a batch of as many other values with the same keys and requests."""
        return Batch(values, self.keys, self.requests)

    def expand(self, values: list[object], counts: list[int]) -> Batch:
        """Return `values` as a batch in which record i of this one stands `counts[i]` times."""

        def spread(lane: Sequence[X]) -> list[X]:
            return list(chain.from_iterable(map(repeat, lane, counts)))

        return Batch(
            values,
            None if self.keys is None else spread(self.keys),
            None if self.requests is None else spread(self.requests),
        )

    def _each(self, change: Change) -> Batch:
        return Batch(
            change(self.values),
            None if self.keys is None else change(self.keys),
            None if self.requests is None else change(self.requests),
        )


class EndOfStream:
    """The last element of a producer: nothing of it follows."""

    __slots__ = ()
    bytes_count = 0

    def __len__(self) -> int:
        return 0


END_OF_STREAM = EndOfStream()


class Barrier:
    """Parts the records that belong to a checkpoint from those that follow.

    Attributes:
        number: the number of the checkpoint.
    """

    __slots__ = ("number",)
    bytes_count = 0

    def __init__(self, number: int) -> None:
        self.number = number

    def __len__(self) -> int:
        return 0


class Element(Protocol):
    """An element of a channel: a batch, in any of its forms, a barrier, or the end of a stream."""

    @property
    def bytes_count(self) -> int:
        """About how many bytes it takes."""

    def __len__(self) -> int:
        """Return how many records it has."""


class BatchReading:
    """The records that a task is currently reading, which another thread may cut short.

    Costs of records differ by a factor of a million, and reading a clock for each would cost a fifth of the speed. An
    iterator ends where its list ends, also for one thread when another has just read the rest of it: so a watch beside
    the tasks takes away the rest of a slow batch; the finished records move on, and the rest waits for the next step.
    `list.extend` of an iterator over a list is one uninterrupted step of the interpreter, so that no record is seen by
    both, or by none.
    """

    __slots__ = ("_work", "cancelled", "is_cut", "started_at")

    def __init__(self) -> None:
        # In one attribute, since a cut must never put the records of one reading to the rest of another.
        self._work: tuple[Iterator[object], list[object]] = (iter(()), [])
        self.started_at: float | None = None
        self.cancelled = False
        self.is_cut = False

    def begin(self, values: Sequence[object]) -> Iterator[object]:
        """Return an iterator over `values`, which is not changed."""
        reading = iter(values)
        self._work = (reading, [])
        self.is_cut = False
        self.started_at = perf_counter()
        if self.cancelled:
            self.cut()
        return reading

    def end(self) -> list[object]:
        """Stop reading, and return the unread records."""
        self.started_at = None
        reading, left = self._work
        left.extend(reading)
        return left

    def cut(self) -> None:
        """End the reading after the record it is at. Any thread may call it at any time."""
        self.is_cut = True
        reading, left = self._work
        left.extend(reading)
