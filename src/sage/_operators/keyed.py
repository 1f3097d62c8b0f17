"""Operators that keep something for each key."""

from __future__ import annotations

from itertools import islice
from typing import TYPE_CHECKING, Any

from sage._operators.fused import InlineCode
from sage._operators.operator import Operator
from sage._operators.per_record import NOTHING, FlatMap, drop_requests
from sage.records import BATCH_RECORDS_MAX, Batch

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator

    from sage._operators.operator import OperatorContext
    from sage._plan.logical import Node


DURABLE_LINES = (
    "if key in {state}.young:",
    "    value = {call}({state}.young[key], value)",
    "elif key in {state}.old:",
    "    value = {call}({state}.old[key], value)",
    "{state}.young[key] = value",
)


class Reduce(Operator):
    """Combines the records of each key, in one dict for each task."""

    def __init__(self, node: Node, surroundings: OperatorContext) -> None:
        super().__init__(node, surroundings)
        self._combined: dict[Any, Any] = {}
        self._before: dict[Any, Any] = {}
        self._emit_each: bool = node.settings["emit_each"]
        self._last: Iterator[tuple[Any, Any]] = iter(())

    def prepare(self) -> None:
        """Bind the function, and load the values of a durable job."""
        self._call = self.callable_of()
        self._keys: Iterator[Any] = iter(())
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

    def finish(self) -> Batch | None:
        """Return the combined value of each key, in the order in which the keys came, if only the last is wanted.

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
        return Batch([value for _, value in part], [key for key, _ in part]) if part else None


class Join(FlatMap):
    """Calls the function with each record, its key and its input; the function keeps records for later matches."""

    def process(self, batch: Batch, port: int) -> Batch:
        """Return the matches."""
        self.port = port
        call = self._call
        keys = iter(batch.keys or ())
        return self._flatten(batch, lambda value: call(value, next(keys), port))
