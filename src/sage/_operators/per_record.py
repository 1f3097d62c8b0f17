"""Operators that look at one record at a time."""

from __future__ import annotations

from itertools import compress, islice
from operator import not_
from typing import TYPE_CHECKING, Any

from sage._iterables import why_not_records
from sage._operators.keys import NEED_NO_CHECK, into_keys
from sage._operators.operator import InlineCode, Operator, into_list
from sage.errors import HeldBackError, hint, short
from sage.functions import FlatMapFunction
from sage.records import BATCH_RECORDS_MAX, Batch

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator

    from sage._operators.operator import OperatorContext
    from sage._plan.logical import Node
    from sage.records import RecordRequest

NOTHING = Batch([])

READING_MAX_S = 30.0
"""How long a checkpoint waits for the results of one record, in seconds."""

DROP = ("    {dropped} += 1", "    continue")
"""The end of an `if` of `InlineCode` lines."""


def drop_requests(requests: Iterable[RecordRequest | None]) -> None:
    """Tell requests that a record of theirs has ended without an answer."""
    for request in requests:
        if request is not None:
            request.drop()


def still_wanted(batch: Batch) -> Batch:
    """Return the records of requests that nobody gave up; the others end here."""
    mask = [request is None or not request.is_given_up for request in batch.requests or ()]
    if all(mask):
        return batch
    drop_requests(compress(batch.requests or (), map(not_, mask)))
    return batch.select(mask)


def without_none(batch: Batch, results: list[object]) -> Batch:
    """Return the results that are not None, with the keys and requests of their records."""
    mask = [result is not None for result in results]
    if all(mask):
        return batch.replace(results)
    if batch.requests is not None:
        drop_requests(compress(batch.requests, map(not_, mask)))
    return batch.replace(results).select(mask)


class Pass(Operator):
    """Hands every record on: unions, futures, dead letters, and changes of distribution."""

    keeps_records = True

    def process(self, batch: Batch, port: int) -> Batch:  # noqa: ARG002
        self.metrics.records_in += len(batch)
        return batch


class Map(Operator):
    """One record out for each record in."""

    def prepare(self) -> None:
        """Bind the function; a function class drops a record by returning None, a plain callable's None is data."""
        self._call = self.callable_of()
        self._drops_none = self.is_function_class

    def process(self, batch: Batch, port: int) -> Batch:  # noqa: ARG002
        results: list[object] = []
        batch = self.apply(batch, into_list, self._call, results)
        return without_none(batch, results) if self._drops_none else batch.replace(results)

    def inlined(self, *, has_key: bool) -> InlineCode | None:
        """Return the call, and the drop if there is one."""
        if has_key and self._sees_keys:
            return None
        dropping = ("if value is None:", *DROP) if self._drops_none else ()
        return InlineCode(("value = {call}(value)", *dropping), self._call)


def keeping(records: Iterable[object], function: Callable[..., object], out: list[object]) -> None:
    """Add the records for which the function says so."""
    for value in records:
        if function(value):
            out.append(value)


def verdicts(records: Iterable[object], function: Callable[..., object], out: list[object]) -> None:
    """Add for each record whether it is kept."""
    for value in records:
        out.append(True if function(value) else False)  # noqa: SIM210  (a name less to look up than bool)


class Filter(Operator):
    """Keeps the records for which the function says so."""

    keeps_records = True

    def prepare(self) -> None:
        self._call = self.callable_of()

    def process(self, batch: Batch, port: int) -> Batch:  # noqa: ARG002
        kept: list[object] = []
        if batch.keys is None and batch.requests is None:
            self.apply(batch, keeping, self._call, kept)
            return Batch(kept)
        batch = self.apply(batch, verdicts, self._call, kept)
        if batch.requests is not None:
            drop_requests(compress(batch.requests, map(not_, kept)))
        return batch.select(kept)

    def inlined(self, *, has_key: bool) -> InlineCode | None:
        if has_key and self._sees_keys:
            return None
        return InlineCode(("if not {call}(value):", *DROP), self._call)


def for_effect(records: Iterable[object], function: Callable[..., object], out: list[object]) -> None:  # noqa: ARG001
    """Call the function and add nothing."""
    for value in records:
        function(value)


class Sink(Operator):
    """Hands each record to the function; nothing goes on.

    An interrupt does not keep it from further calls: a record that has come as far as here may have cost a lot.
    """

    is_costly = False

    def prepare(self) -> None:
        self._call = self.callable_of()

    def process(self, batch: Batch, port: int) -> Batch:  # noqa: ARG002
        """Return nothing."""
        batch = self.apply(batch, for_effect, self._call, [])
        if batch.requests is not None:
            drop_requests(batch.requests)
        return NOTHING

    def inlined(self, *, has_key: bool) -> InlineCode | None:
        return None if has_key and self._sees_keys else InlineCode(("{call}(value)",), self._call, gives=False)


class Reply(Operator):
    """Answers each request with the record that came of it."""

    is_costly = False

    def process(self, batch: Batch, port: int) -> Batch:  # noqa: ARG002
        """Return nothing."""
        self.metrics.records_in += len(batch)
        for request, answer in zip(batch.requests or (), batch.values, strict=False):
            if request is not None:
                request.answer(answer)
        drop_requests(batch.requests or ())
        return NOTHING


class KeyBy(Operator):
    """Gives each record its key."""

    keeps_records = True

    def prepare(self) -> None:
        self._call = self.callable_of()

    def process(self, batch: Batch, port: int) -> Batch:  # noqa: ARG002
        keys: list[object] = []
        batch = self.apply(batch, into_keys, self._call, keys)
        return Batch(batch.values, keys, batch.requests)

    def inlined(self, *, has_key: bool) -> InlineCode | None:
        if has_key and self._sees_keys:
            return None
        lines = ("key = {call}(value)", "if key.__class__ not in {state}:", "    {state}.check(key)")
        return InlineCode(lines, self._call, NEED_NO_CHECK, sets_key=True)


class CoMap(Operator):
    """One function for each input."""

    def prepare(self) -> None:
        """Bind `map0`, `map1`, ... or the callables that were given."""
        inputs = range(len(self.node.inputs))
        if isinstance(self._function, tuple):
            functions, self._drops_none = self._function, False
            self._calls = []
            for self._function in functions:
                self._calls.append(self.callable_of())
            self._function = functions
        else:
            self._calls = [self.callable_of(f"map{port}") for port in inputs]
            self._drops_none = True

    def process(self, batch: Batch, port: int) -> Batch:
        self.port = port
        results: list[object] = []
        batch = self.apply(batch, into_list, self._calls[port], results)
        return without_none(batch, results) if self._drops_none else batch.replace(results)


class FlatMap(Operator):
    """Any number of records out for each record in.

    A returned list or tuple is taken at once. Anything else is read as far as there is room, so that a generator may be
    long or endless: the operator cuts its own span, and `resume` reads on. A record that fails gives nothing, except
    results of a long generator that went on already.

    When a batch is full, the rest of the input waits. A function that makes ten records of one would
    otherwise fill the processor's cache ten times over before anybody reads them, which takes a third of the speed.
    """

    def __init__(self, node: Node, surroundings: OperatorContext) -> None:
        super().__init__(node, surroundings)
        self._reading: Iterator[object] | None = None
        self._origin = NOTHING
        self._counts: list[int] = []
        self._most = BATCH_RECORDS_MAX
        self._given = 0  # how many results of the last record have gone on
        self._began_at = 0.0

    def prepare(self) -> None:
        call = self.callable_of()
        self._call = self._collecting(call) if isinstance(self._function, FlatMapFunction) else call

    def process(self, batch: Batch, port: int) -> Batch:  # noqa: ARG002
        """Return the results of the records, as far as they were read."""
        self._given = 0
        return self._flatten(batch, self._call)

    def resume(self) -> Batch:
        """Continue reading the results of the last record."""
        self.more = False
        reading = self._reading
        request = None if self._origin.requests is None else self._origin.requests[0]
        if request is not None and request.is_given_up:
            close = getattr(reading, "close", None)  # a generator has one
            if close is not None:
                close()
            request.drop()
            return NOTHING
        self.metrics.records_in -= 1  # the record was counted when its reading began
        return self._flatten(self._origin, self._read_again if reading is None else lambda _: reading)

    @property
    def may_be_cut(self) -> bool:
        """Whether the results of the last record can be read again; a state would be changed by that a second time."""
        is_long = self._reading is not None and self.now() - self._began_at >= READING_MAX_S
        return is_long and not self.takes_part and not self._has_states

    def snapshot(self, number: int) -> tuple[object, int]:  # noqa: ARG002
        """Return the last record, if its results are being read, and how many of them have gone on."""
        return ((self._origin, self._given) if self.more else None), 0

    def recover(self) -> None:
        """Go on with the results of the last record."""
        assert self.recovery is not None
        if self.recovery.state is not None:
            self._origin, self._given = self.recovery.state
            self.more = True

    def _read_again(self, value: object) -> Iterator[object]:
        """Call the function again, and leave out the results that have gone on."""
        result: Any = self._call(value)
        return islice(() if result is None else result, self._given, None)

    def _flatten(self, batch: Batch, call: Callable[[object], object]) -> Batch:
        out: list[object] = []
        counts: list[int] = []
        self._counts = counts
        self._reading = None
        # The piece of a streamed answer goes on at once: the next one may take long.
        is_streamed = any(request is not None and request.is_streamed for request in batch.requests or ())
        self._most = 1 if is_streamed else BATCH_RECORDS_MAX
        is_plain = batch.keys is None and batch.requests is None
        done = self.apply(batch, self._take_all if is_plain else self._take_counted, call, out)
        if self._reading is not None:
            self.more = True
            self._origin = done.slice(len(done) - 1)
        if is_plain:
            return Batch(out)
        if done.requests is not None:
            for request, count in zip(done.requests, counts, strict=True):
                if request is not None:
                    request.add(count)
            drop_requests(done.requests[:-1] if self.more else done.requests)
        return done.expand(out, counts)

    def _take_all(self, records: Iterable[object], function: Callable[..., object], out: list[object]) -> None:
        """Add the results of each record."""
        for value in records:
            result = function(value)
            if type(result) is list:
                out.extend(result)
            else:
                self._take(result, out)
            if len(out) >= self._most:
                self.span.cut()

    def _take_counted(self, records: Iterable[object], function: Callable[..., object], out: list[object]) -> None:
        """Add and count the results of each record."""
        for value in records:
            before = len(out)
            self._take(function(value), out)
            self._counts.append(len(out) - before)
            if len(out) >= self._most:
                self.span.cut()

    def _take(self, result: Any, out: list[object]) -> None:
        """Add the results of one record to the output, up to a bound."""
        before = len(out)
        if isinstance(result, list | tuple):
            out.extend(result)
        elif result is not None:
            if not hasattr(result, "__next__"):
                refuse_single(result)
            reading = iter(result)
            try:
                for value in reading:
                    out.append(value)
                    if len(out) >= self._most or self.span.is_cut:
                        self._reading = reading
                        if not self._given:
                            self._began_at = self.now()
                        self._given += len(out) - before
                        self.span.cut()
                        break
            except BaseException:
                del out[before:]
                raise

    def _collecting(self, call: Callable[..., Any]) -> Callable[..., object]:
        function = self._function

        def collect(*args: object) -> object:
            function._collected = None
            result = call(*args)
            if result is not None and not isinstance(result, list | tuple):
                if not hasattr(result, "__next__"):
                    refuse_single(result)
                return self._interleaved(iter(result))
            collected, function._collected = function._collected, None
            return [*collected, *(result or ())] if collected else result

        return collect

    def _interleaved(self, result: Iterator[object]) -> Iterator[object]:
        """Yield the records of `result` and those collected meanwhile, in the order in which they were given."""
        function = self._function
        for value in result:
            collected, function._collected = function._collected, None
            yield from collected or ()
            yield value
        collected, function._collected = function._collected, None
        yield from collected or ()


def refuse_single(result: object) -> None:
    """Raise TypeError for a result of a function that would be taken apart into something other than records."""
    found = why_not_records(result)
    if found is not None:
        what, note = found
        raise hint(TypeError(f"{what} is one record and not a list of records"), note)
    if not hasattr(result, "__iter__") and not hasattr(result, "__getitem__"):
        error = TypeError(f"{short(result)} is one record and not a list of records")
        raise hint(error, "Return a list, or yield the records; map() gives one record for each.")


class Process(FlatMap):
    """A flat map that may also emit at the end."""

    def __init__(self, node: Node, surroundings: OperatorContext) -> None:
        super().__init__(node, surroundings)
        self._last: Iterator[object] = iter(())

    def finish(self) -> Batch | None:
        """Return the records of the function's `finish`, as far as there is room; the rest is read in further calls."""
        if not self.more:
            self.forget_key()
            finishing = getattr(self._function, "finish", None)
            result: Any = None if finishing is None else self._collecting(lambda: self._call_now(finishing))()
            if result is None:
                return None
            self._last = iter(result)
        # The turns stand first in the zip: when they end, no record has been taken that nobody gets.
        turns = self.span.begin([None] * BATCH_RECORDS_MAX)
        out: list[object] = []
        try:
            for _, value in zip(turns, self._last, strict=False):
                out.append(value)
        except HeldBackError:
            self._last = iter(())  # no further call begins, so the rest is not known
        finally:
            self.span.end()
        self.more = self.span.is_cut or len(out) == BATCH_RECORDS_MAX
        return Batch(out)
