"""Operators that keep something for each key."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from sage._operators.operator import Operator
from sage._operators.per_record import NOTHING, FlatMap, drop_requests
from sage.records import Batch

if TYPE_CHECKING:
    from collections.abc import Iterator

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

    def process(self, batch: Batch, port: int) -> Batch:  # noqa: ARG002
        """Return what was combined so far, after each record."""
        combined, combine, context = self._combined, self._call, self.context
        keys = iter(batch.keys or ())

        def loop(reading: Iterator[Any], results: list[Any]) -> None:
            # A call for each record would cost more than what is done for it here.
            for value, key in zip(reading, keys, strict=False):
                context.key = key
                if key in combined:
                    value = combine(combined[key], value)
                combined[key] = value
                results.append(value)

        done, results = self.apply(combine, batch, loop)
        if self._emit_each:
            return done.replace(results)
        if done.requests is not None:
            drop_requests(done.requests)
        return NOTHING

    def finish(self) -> Batch | None:
        """Return the combined value of each key, in the order in which the keys came, if only the last is wanted."""
        if self._emit_each:
            return None
        return Batch(list(self._combined.values()), list(self._combined))


class Join(FlatMap):
    """Calls the function with each record, its key and its input; the function keeps what it needs to match."""

    def process(self, batch: Batch, port: int) -> Batch:
        """Return the matches."""
        call, take = self._call, self._take
        keys = iter(batch.keys or ())
        return self._flatten(lambda value: take(call(value, next(keys), port)), batch)
