"""Operators that keep something for each key."""

from __future__ import annotations

from copy import deepcopy
from itertools import compress, islice
from operator import not_
from typing import TYPE_CHECKING

from sage._operators.operator import InlineCode, Operator
from sage._operators.per_record import DROP, NOTHING, FlatMap, drop_requests
from sage.errors import hint, short
from sage.records import BATCH_RECORDS_MAX, Batch
from sage.state import Removed

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Sequence

    from sage._operators.operator import OperatorContext
    from sage._plan.logical import Node
    from sage.observability import OperatorMetrics


DURABLE_LINES = (
    "if key in {state}.young:",
    "    value = {call}({state}.young[key], value)",
    "elif key in {state}.old:",
    "    value = {call}({state}.old[key], value)",
    "{state}.young[key] = value",
)


class Keeping(Operator):
    """Keeps a value for each key, in one dict for each task, and may emit them at the end."""

    def __init__(self, node: Node, surroundings: OperatorContext) -> None:
        super().__init__(node, surroundings)
        self._combined: dict[object, object] = {}
        self._emit_each: bool = node.settings["emit_each"]
        self._last: Iterator[tuple[object, object]] = iter(())

    def at_end(self, key: object, value: object) -> object:  # noqa: ARG002
        """Return the record to emit at the end for a key and its value."""
        return value

    def finish(self) -> Batch | None:
        """Return a record for each key, in the order in which the keys came, if only the last is wanted.

        They come in parts, so that the first go on before the last of many have been looked at.
        """
        if self._emit_each:
            return None
        if not self.more:
            self._last = iter(self._combined.items()) if self.keyed is None else self.keyed.unsettled()
        part = list(islice(self._last, BATCH_RECORDS_MAX))
        self.more = len(part) == BATCH_RECORDS_MAX
        if not self.more and self.keyed is not None:
            self.keyed.settle()
        return Batch([self.at_end(*item) for item in part], [key for key, _ in part]) if part else None


class Reduce(Keeping):
    """Combines the records of each key."""

    def __init__(self, node: Node, surroundings: OperatorContext) -> None:
        super().__init__(node, surroundings)
        self._before: dict[object, object] = {}

    def prepare(self) -> None:
        """Bind the function, and load the values of a durable job."""
        self._call = self.callable_of()
        self._keys: Iterator[object] = iter(())
        if self.recovery is not None:
            from sage._operators.keyed_state import KeyedState

            self.keyed = KeyedState(self.recovery.since, self.recovery.changes)
            self._combined, self._before = self.keyed.young, self.keyed.old

    def process(self, batch: Batch, port: int) -> Batch:  # noqa: ARG002
        """Return the combined value so far after each record."""
        self._keys = iter(batch.keys or ())
        results: list[object] = []
        done = self.apply(batch, self._combine_each if self._emit_each else self._combine_last, self._call, results)
        if self._emit_each:
            return done.replace(results)
        if done.requests is not None:
            drop_requests(done.requests)
        return NOTHING

    def inlined(self, *, has_key: bool) -> InlineCode | None:
        """Return the call, if the key is there and the function does not look at it."""
        if not has_key or self._sees_keys:
            return None
        if self.keyed is None:
            lines = ("if key in {state}:", "    value = {call}({state}[key], value)", "{state}[key] = value")
            return InlineCode(lines, self._call, self._combined, gives=self._emit_each)
        return InlineCode(DURABLE_LINES, self._call, self.keyed, gives=self._emit_each)

    def _combine_each(self, records: Iterable[object], function: Callable[..., object], out: list[object]) -> None:
        """Combine, and add the combined value so far after each record."""
        combined, before = self._combined, self._before
        for value, key in zip(records, self._keys, strict=False):
            if key in combined:
                value = function(combined[key], value)
            elif before and key in before:
                value = function(before[key], value)
            combined[key] = value
            out.append(value)

    def _combine_last(self, records: Iterable[object], function: Callable[..., object], out: list[object]) -> None:  # noqa: ARG002
        """Combine, and add nothing."""
        combined, before = self._combined, self._before
        for value, key in zip(records, self._keys, strict=False):
            if key in combined:
                value = function(combined[key], value)
            elif before and key in before:
                value = function(before[key], value)
            combined[key] = value


class States(dict[object, object]):
    """The states by key; that of a new key is a copy of the initial one.

    Args:
        initial: the initial state.
        old: further states by key, which those in this dict replace.

    Attributes:
        unseen: the keys of earlier runs of which no record has come in this one, if somebody wants to know them.
    """

    __slots__ = ("_initial", "_old", "unseen")

    def __init__(self, initial: object, old: dict[object, object]) -> None:
        super().__init__()
        self._initial = initial
        self._old = old
        self.unseen: dict[object, None] = {}

    def __missing__(self, key: object) -> object:
        return self._old[key] if key in self._old else deepcopy(self._initial)

    def check_pair(self, pair: object) -> None:
        """Raise TypeError if it is not one."""
        if not isinstance(pair, tuple) or len(pair) != 2:
            raise not_a_pair(pair)


def not_a_pair(result: object) -> TypeError:
    """Return the error for what a function returned that is not a pair."""
    error = TypeError(f"{short(result)} is not a pair of the new state and a result")
    return hint(error, "Return (state, result).")


LINES = {
    "result": (
        "pair = {call}({state}[key], value)",
        "if pair.__class__ is not tuple or len(pair) != 2:",
        "    {state}.check_pair(pair)",
        "{state}[key], value = pair",
    ),
    "record": ("new, kept = {call}({state}[key], value)", "if not kept:", *DROP, "{state}[key] = new"),
    "pair": ("{state}[key], value = {call}({state}[key], value)", "value = (key, value)"),
}
"""How to work on one record, by the form in which the operator emits."""


class StatefulMap(Keeping):
    """Calls the function with the state of the key and the record; it returns the new state and a result.

    The operator emits the result, or the record if the result is true, or the pair of key and result, or only at the
    end the pair of each key and its last result. A record that is not emitted because its result is false does not
    change the state.
    """

    def prepare(self) -> None:
        """Bind the function, and load the states of a durable job."""
        self._call = self.callable_of()
        self._form: str = self.node.settings["form"]
        self._lines = LINES[self._form]
        self._result: Callable[[object], object] = self.node.settings["result"]
        self._keys: Iterator[object] = iter(())
        old: dict[object, object] = {}
        if self.recovery is not None:
            from sage._operators.keyed_state import KeyedState

            self.keyed = KeyedState(self.recovery.since, self.recovery.changes)
            old = self.keyed.old
        self._states = self._combined = States(self.node.settings["initial"], old)
        if self.keyed is not None:
            self.keyed.young = self._states

    def process(self, batch: Batch, port: int) -> Batch:  # noqa: ARG002
        """Return the results, or the records that stay."""
        self._keys = iter(batch.keys or ())
        results: list[object] = []
        if self._form == "record":
            done = self.apply(batch, self._verdicts, self._call, results)
            if done.requests is not None:
                drop_requests(compress(done.requests, map(not_, results)))
            return done.select(results)
        done = self.apply(batch, self._results, self._call, results)
        if self._emit_each:
            pairs = self._form == "pair" and done.keys is not None
            return done.replace([*zip(done.keys or (), results, strict=True)] if pairs else results)
        if done.requests is not None:
            drop_requests(done.requests)
        return NOTHING

    def inlined(self, *, has_key: bool) -> InlineCode | None:
        """Return the call, if the key is there and the function does not look at it."""
        if not has_key or self._sees_keys:
            return None
        return InlineCode(self._lines, self._call, self._states, gives=self._emit_each)

    def at_end(self, key: object, value: object) -> object:
        """Return the key and its last result."""
        return key, self._result(value)

    def _results(self, records: Iterable[object], function: Callable[..., object], out: list[object]) -> None:
        """Add the results."""
        states = self._states
        for value, key in zip(records, self._keys, strict=False):
            pair = function(states[key], value)
            if not isinstance(pair, tuple) or len(pair) != 2:
                raise not_a_pair(pair)
            states[key], result = pair
            out.append(result)

    def _verdicts(
        self, records: Iterable[object], function: Callable[..., tuple[object, bool]], out: list[object]
    ) -> None:
        """Add for each record whether it stays."""
        states = self._states
        for value, key in zip(records, self._keys, strict=False):
            new, kept = function(states[key], value)
            if kept:
                states[key] = new
            out.append(kept)


class Changed(StatefulMap):
    """Lets records pass that have changed, and at the end gives a record for each key of which none has come.

    Attributes:
        before: the counts of all operators before it, which tell whether it has seen all records.
        unseen_failed: how many records failed before it, so that no key counts as removed.
    """

    def __init__(self, node: Node, surroundings: OperatorContext) -> None:
        super().__init__(node, surroundings)
        self.before: Sequence[OperatorMetrics] = ()
        self.unseen_failed = 0
        self._gone: Iterator[object] = iter(())

    def prepare(self) -> None:
        """Load the states of a durable job; all of their keys may be gone."""
        super().prepare()
        self._lines = ("{state}.unseen.pop(key, None)", *self._lines)
        self._removed: Callable[[object], object] = self.node.settings["removed"]
        if self.keyed is not None:
            self._states.unseen = dict.fromkeys(self.keyed.old)

    def finish(self) -> Batch | None:
        """Return a record for each key that is gone, and take these keys out, in parts."""
        if not self.more:
            self.unseen_failed = sum(one.failed for one in self.before) if self._states.unseen else 0
            self._gone = iter(() if self.unseen_failed else self._states.unseen)
        part = list(islice(self._gone, BATCH_RECORDS_MAX))
        self.more = len(part) == BATCH_RECORDS_MAX
        gone = [self._removed(key) for key in part]
        self._states.update(dict.fromkeys(part, Removed.REMOVED))
        return Batch(gone, part) if part else None

    def _verdicts(
        self, records: Iterable[object], function: Callable[..., tuple[object, bool]], out: list[object]
    ) -> None:
        """Add for each record whether it stays, and note its key."""
        states, unseen = self._states, self._states.unseen
        for value, key in zip(records, self._keys, strict=False):
            unseen.pop(key, None)
            new, kept = function(states[key], value)
            if kept:
                states[key] = new
            out.append(kept)


class Join(FlatMap):
    """Calls the function with each record, its key and its input; the function keeps records for later matches."""

    may_be_cut = False

    def process(self, batch: Batch, port: int) -> Batch:
        self.port = port
        call = self._call
        keys = iter(batch.keys or ())
        return self._flatten(batch, lambda value: call(value, next(keys), port))
