"""The inputs of sources: sequences, iterables, users' functions, and users' own `Source` objects."""

from __future__ import annotations

import inspect
from functools import partial
from itertools import islice
from typing import TYPE_CHECKING

from sage._iterables import why_not_records
from sage._operators.awaited import AwaitedSource
from sage._operators.holding_source import HoldingSource
from sage._operators.operator import Operator
from sage.connector import Source
from sage.errors import FunctionError, describe, hint, is_held_back, short
from sage.functions import StopSignal, is_coroutine_function
from sage.records import Batch
from sage.serving import RequestSource

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Iterator, Sequence
    from types import GeneratorType
    from typing import Never

    from sage._plan.logical import Node
    from sage.records import BatchReading
    from sage.serving import PipelineBridge


class SourceSample:
    """The first records of a source, in groups: each is read when all records of the one before have left the job.

    Args:
        sizes: how many records each group has.
        observe: called before each group, and after the last one.

    Attributes:
        left: how many records of the group are still to be read.
    """

    def __init__(self, sizes: Iterable[int], observe: Callable[[], None]) -> None:
        self._sizes = iter(sizes)
        self._observe = observe
        self.left = 0

    def begin(self) -> bool:
        """Begin the next group, and return whether there is one; nothing is in flight."""
        self._observe()
        self.left = next(self._sizes, 0)
        return self.left > 0


class SequenceSource(Source):
    """A list, tuple or range, of which each parallel task reads every n-th record."""

    def __init__(self, values: Sequence[object], index: int, step: int) -> None:
        self._values = values if step == 1 else values[index::step]
        self._at = 0

    def read(self, records_max: int) -> Sequence[object] | None:
        records = self._values[self._at : self._at + records_max]
        self._at += len(records)
        return records or None

    def skip(self, count: int) -> None:
        """Go on after so many records."""
        self._at = count


class IterableSource(HoldingSource):
    """Any other iterable, read record by record, so that a slow one hands on each record."""

    def __init__(self, values: object, span: BatchReading) -> None:
        self._values = values
        self._span = span
        self._iterator: Iterator[object] = iter(())

    def open(self) -> None:
        """Begin to iterate; a callable is called for its iterable first."""
        values = self._values() if callable(self._values) else self._values
        found = why_not_records(values)
        if found is not None:
            what, note = found
            raise hint(TypeError(f"it returned {short(values)}, {what} and not a collection of records"), note)
        if not hasattr(values, "__iter__"):
            error = TypeError(f"it returned {short(values)}, which is not iterable")
            raise hint(error, "A BatchFunction class, or from_source, calls a function for one record at a time.")
        self._iterator = iter(values)
        self.generator = self._iterator if inspect.isgenerator(self._iterator) else None

    def read(self, records_max: int) -> list[object] | None:
        """Return records until there are enough or the span is cut."""
        self.raise_held()
        # The turns stand first in the zip: when they end, no record has been taken that nobody gets.
        turns = self._span.begin([None] * records_max)
        records: list[object] = []
        try:
            for _, record in zip(turns, self._iterator, strict=False):
                records.append(record)
        except BaseException as error:  # the records before it go on first
            if not records:
                raise
            self.held_error = error
            return records
        finally:
            self._span.end()
        if not records and not self._span.is_cut:
            return None
        return records

    def skip(self, count: int) -> None:
        """Read so many records and drop them."""
        found = sum(1 for _ in islice(self._iterator, count))
        if found < count:
            error = ValueError(f"it gave {found:,} records, and had given {count:,} before the restart")
            raise hint(error, "A durable job reads an iterable again and drops the records that it had.")


class FunctionSource(HoldingSource):
    """A function that is called for each record."""

    def __init__(self, call: Callable[[], object], span: BatchReading, *, none_ends: bool) -> None:
        self._call = call
        self._span = span
        self._none_ends = none_ends
        self._ended = False

    def read(self, records_max: int) -> list[object] | None:
        """Return records until there are enough, there is nothing now, or the span is cut."""
        self.raise_held()
        if self._ended:
            return None
        call = self._call
        records: list[object] = []
        turns = self._span.begin([None] * records_max)
        try:
            for _ in turns:
                record = call()
                if record is None or isinstance(record, StopSignal):
                    self._ended = self._none_ends or record is not None
                    break
                records.append(record)
        except BaseException as error:  # the records before it go on first
            if not records:
                raise
            self.held_error = error
        finally:
            self._span.end()
        return None if self._ended and not records else records


class GeneratorSource(FunctionSource):
    """A generator that may have nothing now, as a function may; where it ends, the source does."""

    def __init__(self, generator: GeneratorType[object, Never, object], span: BatchReading) -> None:
        super().__init__(partial(next, generator, StopSignal()), span, none_ends=False)
        self.generator = generator

    def skip(self, count: int) -> None:
        """Read so many records and drop them, and with them each None between them."""
        while count > 0:
            record = self._call()
            if isinstance(record, StopSignal):
                self._ended = True
                return
            count -= record is not None


def is_positioned(kind: type) -> bool:
    """Return whether a class is a source with positions."""
    return issubclass(kind, Source) and kind.position is not Source.position


def goes_on(node: Node) -> bool:
    """Return whether a source of a durable job goes on where it was, after a restart."""
    assert node.function is not None
    target = node.function.target
    kind = node.function.owner
    if issubclass(kind, Source):
        return is_positioned(kind)
    if hasattr(target, "execute") or inspect.isasyncgenfunction(target) or hasattr(target, "__aiter__"):
        return False
    if not node.settings["bounded"]:
        return inspect.isgeneratorfunction(target)
    return not isinstance(target, set | frozenset)  # the order of a set is another one in each process


class Reader(Operator):
    """The operator of a source: it reads instead of processing.

    Attributes:
        ended: whether nothing follows.
        is_told: whether its task is woken when there is something to read.
        may_wait: whether a read may take long, as that of anything but a sequence.
        sample: the groups in which its first records are read, or None if all are read.
    """

    source: Source
    ended = False
    is_told = False
    may_wait = True
    delay_s: float | None = None
    bridge: PipelineBridge | None = None
    sample: SourceSample | None = None
    _read_before = _skipped = 0

    def prepare(self) -> None:
        """Build the source around the user's argument and open it."""
        self.delay_s = self.node.settings.get("delay_s")
        self.bridge = self.node.settings.get("bridge")
        self.sample = self.node.settings.get("sample")
        self._positions: dict[int, object] = {}
        self.source = self._source()
        self.source.durable = self.recovery is not None
        self.source.skipped = 0  # it may have served another job before
        is_awaited = isinstance(self.source, AwaitedSource)
        self.is_told = is_awaited or isinstance(self.source, RequestSource)
        self.may_wait = not is_awaited and not isinstance(self.source, SequenceSource)
        state = None if self.recovery is None else self.recovery.state
        if state is None:
            self.source.open()
            return
        self._read_before, position = state
        if is_positioned(type(self.source)):
            open_at: Callable[..., None] = self.source.open
            open_at(position)
        else:
            self.source.open()
            if isinstance(self.source, SequenceSource | IterableSource | GeneratorSource):
                self.source.skip(self._read_before)

    def snapshot(self, number: int) -> tuple[object, int]:
        """Return how many records were read, and the position, if the source has one."""
        count = self._read_before + self.metrics.records_in
        if not is_positioned(type(self.source)):
            return (count, None), count
        position = self._positions[number] = self.source.position()
        return (count, position), count

    def committed(self, number: int) -> None:
        """Tell the source that a checkpoint has what was read up to its position."""
        while self._positions and min(self._positions) < number:
            del self._positions[min(self._positions)]
        if number in self._positions:
            self.source.committed(self._positions.pop(number))

    def _source(self) -> Source:
        target = self._function
        bounded: bool = self.node.settings["bounded"]
        if isinstance(target, Source):
            return target
        if inspect.isasyncgenfunction(target) or hasattr(target, "__aiter__"):
            values = aiter(target() if inspect.isasyncgenfunction(target) else target)
            return self._awaited(values.__anext__, values)
        call = self.target_of()
        if self.bridge is None and is_coroutine_function(call) and (not bounded or hasattr(target, "execute")):
            return self._awaited(call)
        if hasattr(target, "execute"):
            return FunctionSource(self.callable_of(), self.span, none_ends=bounded)
        if not bounded and inspect.isgeneratorfunction(target):
            return GeneratorSource(target(), self.span)
        if not bounded:
            return FunctionSource(self.callable_of(), self.span, none_ends=False)
        if isinstance(target, list | tuple | range):
            return SequenceSource(target, self.context.parallel_index, self.context.parallelism)
        return IterableSource(self.callable_of() if callable(target) else target, self.span)

    def _awaited(
        self, give: Callable[[], Awaitable[object]], values: AsyncIterator[object] | None = None
    ) -> AwaitedSource:
        bounded: bool = self.node.settings["bounded"]
        return AwaitedSource(give, self._surroundings, lambda: self.wake(), none_ends=bounded, values=values)

    @property
    def is_idle(self) -> bool:
        """Whether a read would find nothing, and the task is woken when that changes."""
        return isinstance(self.source, RequestSource) and self.source.is_idle

    def stop(self) -> bool:
        """Cancel the source's await, and return whether the source has ended."""
        return not isinstance(self.source, AwaitedSource) or self.source.stop()

    def read(self, records_max: int) -> Batch:
        """Return the next records; none when there is nothing now, when the source ended, or when it is to try again.

        A failure is left in `failure`, and a pause before the next attempt in `wake_at`.
        """
        if self.sample is not None:
            if not self.sample.left and not self.sample.begin():
                self.ended = True
                return Batch([])
            records_max = min(records_max, self.sample.left)
        try:
            # A function that waits for requests must not keep those it has taken while it waits for another one.
            waits = self.bridge is not None and isinstance(self.source, FunctionSource)
            records = self.source.read(1 if waits else records_max)
        except BaseException as error:  # every failure of a source is owned here
            self._failed(error)
            return Batch([])
        finally:
            self.metrics.failed += self.source.skipped - self._skipped
            self._skipped = self.source.skipped
        self._attempts = 0
        if records is None or (not records and self.bridge is not None and self.bridge.is_over):
            self.ended = True
            return Batch([])
        batch = Batch(records if type(records) in (list, range) else list(records))
        if self.sample is not None:
            batch = batch.slice(0, records_max)  # also if the source gives more
            self.sample.left -= len(batch)
        if self.bridge is not None and len(batch):
            batch.requests = self.bridge.taken(len(batch))
        self.metrics.records_in += len(batch)
        self.metrics.records_out += len(batch)
        return batch

    def _failed(self, error: BaseException) -> None:
        if is_held_back(error):
            self.ended = True
            return
        has_ended = isinstance(self.source, HoldingSource) and self.source.has_ended
        retry = None if has_ended else self.node.on_error.retry
        self._attempts += 1
        if isinstance(error, Exception) and retry is not None and self._attempts < retry.attempts_max:
            self.wake_at = self._surroundings.now() + retry.pause_s(self._attempts)
            return
        self.failure = self._blamed(error)
        if has_ended and self.node.on_error.retry is not None:
            hint(self.failure, "A generator cannot go on after an error; the execute() of a function class can.")

    def overtaken(self) -> FunctionError | None:
        """Return the error that the source holds, and that nobody will ask for any more."""
        source = getattr(self, "source", None)
        if not isinstance(source, HoldingSource) or source.held_error is None:
            return None
        error, source.held_error = source.held_error, None
        return None if is_held_back(error) else self._blamed(error)

    def _blamed(self, error: BaseException) -> FunctionError:
        self.metrics.failed += 1
        times = f" after {self._attempts} attempts" if self._attempts > 1 else ""
        blamed = FunctionError(f'source "{self.node.name}" failed{times}: {describe(error)}', operator=self.node.name)
        blamed.__cause__ = error
        return blamed

    def close(self) -> None:
        """Close the source, and the user's function behind it."""
        try:
            if hasattr(self, "source"):
                self.source.close()
        finally:
            super().close()
