"""Operators that keep something for each key."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from sage._operators.fused import Inlined
from sage._operators.operator import Operator
from sage._operators.per_record import NOTHING, FlatMap, drop_requests
from sage.records import Batch

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator

    from sage._operators.operator import Surroundings
    from sage._plan.logical import Node


class Reduce(Operator):
    """Combines the records of each key, in one dict for each task."""

    def __init__(self, node: Node, surroundings: Surroundings) -> None:
        super().__init__(node, surroundings)
        self._combined: dict[Any, Any] = {}
        self._emit_each: bool = node.settings["emit_each"]

    def prepare(self) -> None:
        """Bind the function."""
        self._call = self.callable_of()
        self._keys: Iterator[Any] = iter(())

    def process(self, batch: Batch, port: int) -> Batch:  # noqa: ARG002
        """Return what was combined so far, after each record."""
        self._keys = iter(batch.keys or ())
        results: list[Any] = []
        done = self.apply(batch, self._combine_each if self._emit_each else self._combine_last, self._call, results)
        if self._emit_each:
            return done.replace(results)
        if done.requests is not None:
            drop_requests(done.requests)
        return NOTHING

    def inlined(self, *, has_key: bool) -> Inlined | None:
        """Return the call, if the key is there and the function does not look at it."""
        if not has_key or self._sees_keys:
            return None
        lines = ("if key in {state}:", "    value = {call}({state}[key], value)", "{state}[key] = value")
        return Inlined(lines, self._call, self._combined, gives=self._emit_each)

    def _combine_each(self, records: Iterable[Any], function: Callable[..., Any], out: list[Any]) -> None:
        """Combine, and add what was combined so far after each record."""
        combined = self._combined
        for value, key in zip(records, self._keys, strict=False):
            if key in combined:
                value = function(combined[key], value)
            combined[key] = value
            out.append(value)

    def _combine_last(self, records: Iterable[Any], function: Callable[..., Any], out: list[Any]) -> None:  # noqa: ARG002
        """Combine, and add nothing."""
        combined = self._combined
        for value, key in zip(records, self._keys, strict=False):
            if key in combined:
                value = function(combined[key], value)
            combined[key] = value

    def finish(self) -> Batch | None:
        """Return the combined value of each key, in the order in which the keys came, if only the last is wanted."""
        if self._emit_each:
            return None
        return Batch(list(self._combined.values()), list(self._combined))


class Join(FlatMap):
    """Calls the function with each record, its key and its input; the function keeps what it needs to match."""

    def process(self, batch: Batch, port: int) -> Batch:
        """Return the matches."""
        call = self._call
        keys = iter(batch.keys or ())
        return self._flatten(batch, lambda value: call(value, next(keys), port))
