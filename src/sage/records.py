"""What travels between tasks: batches of records and the end of a stream."""

from __future__ import annotations

from itertools import chain, compress, repeat
from time import perf_counter
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

BATCH_RECORDS_MAX = 2048
"""No operator takes more records than this at once, so that a stop or a slow record waits for little.

With twice as many, a chain of cheap functions gains 2 %; with half as many it loses 5 %.
"""


class Batch:
    """Records that travel together, with their keys and requests in parallel lists where the stream has them.

    A batch and its lists are never changed once it was handed on: a stream used twice sends the same batch to both
    branches.

    Attributes:
        values: the records, plain Python objects; a list, or a range, as making a list of its numbers takes time.
        keys: the key of each record, or None for a stream without keys.
        requests: the service request that each record belongs to, or None outside a served pipeline.
    """

    __slots__ = ("keys", "requests", "values")

    def __init__(
        self,
        values: Sequence[Any],
        keys: list[Any] | None = None,
        requests: list[Any] | None = None,
    ) -> None:
        self.values = values
        self.keys = keys
        self.requests = requests

    def __len__(self) -> int:
        return len(self.values)

    def slice(self, start: int, stop: int | None = None) -> Batch:
        """Return the records from `start` to before `stop`."""
        return self._each(lambda lane: lane[start:stop])

    def stride(self, start: int, step: int) -> Batch:
        """Return every `step`-th record from `start` on."""
        return self._each(lambda lane: lane[start::step])

    def select(self, mask: Sequence[Any]) -> Batch:
        """Return the records whose place in `mask` is true."""
        return self._each(lambda lane: list(compress(lane, mask)))

    def pick(self, places: list[int]) -> Batch:
        """Return the records at `places`, in that order."""
        return self._each(lambda lane: [lane[place] for place in places])

    def replace(self, values: Sequence[Any]) -> Batch:
        """Return a batch of as many other values with the same keys and requests."""
        return Batch(values, self.keys, self.requests)

    def expand(self, values: list[Any], counts: list[int]) -> Batch:
        """Return `values` as a batch in which record i of this one stands `counts[i]` times."""

        def spread(lane: list[Any]) -> list[Any]:
            return list(chain.from_iterable(map(repeat, lane, counts)))

        return Batch(
            values,
            None if self.keys is None else spread(self.keys),
            None if self.requests is None else spread(self.requests),
        )

    def _each(self, change: Callable[[Any], Any]) -> Batch:
        return Batch(
            change(self.values),
            None if self.keys is None else change(self.keys),
            None if self.requests is None else change(self.requests),
        )


class EndOfStream:
    """The last element of a producer: nothing of it follows."""

    __slots__ = ()

    def __len__(self) -> int:
        return 0


END_OF_STREAM = EndOfStream()

Element = Batch | EndOfStream


class Span:
    """What a task is reading just now, which another thread may cut short.

    Costs of records differ by a factor of a million, and reading a clock for each would cost a fifth of the speed. An
    iterator ends where its list ends, also for one thread when another has just read the rest of it: so a watch beside
    the tasks takes away the rest of a batch that takes long, what was done goes on, and the rest waits for the next
    step. `list.extend` of an iterator over a list is one uninterrupted step of the interpreter, so that no record is
    seen by both, or by none.
    """

    __slots__ = ("_work", "cancelled", "is_cut", "started_at")

    def __init__(self) -> None:
        # In one attribute, since a cut must never put the records of one reading to the rest of another.
        self._work: tuple[Iterator[Any], list[Any]] = (iter(()), [])
        self.started_at: float | None = None
        self.cancelled = False
        self.is_cut = False

    def begin(self, values: Sequence[Any]) -> Iterator[Any]:
        """Return an iterator over `values`, which is not changed."""
        reading = iter(values)
        self._work = (reading, [])
        self.is_cut = False
        self.started_at = perf_counter()
        if self.cancelled:
            self.cut()
        return reading

    def end(self) -> list[Any]:
        """Say that nothing is read any more, and return what was not."""
        self.started_at = None
        reading, left = self._work
        left.extend(reading)
        return left

    def cut(self) -> None:
        """End the reading after the record it is at. Any thread may call it at any time."""
        self.is_cut = True
        reading, left = self._work
        left.extend(reading)
