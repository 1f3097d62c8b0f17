"""Functions for the stream methods that are made of others."""

from __future__ import annotations

import random
from typing import TYPE_CHECKING, Any

from sage.functions import FilterFunction, is_coroutine_function

if TYPE_CHECKING:
    from collections.abc import Callable


def passing_on(function: Callable[[Any], Any]) -> Callable[[object], object]:
    """Return a function that calls `function` with a record and returns the record."""
    if is_coroutine_function(function):

        async def tap_async(record: object) -> object:
            await function(record)
            return record

        return tap_async

    def tap(record: object) -> object:
        function(record)
        return record

    return tap


class Limit(FilterFunction[Any]):
    """Lets the first records pass."""

    def __init__(self, count: int) -> None:
        self.left = count

    def execute(self, data: object, /) -> bool:  # noqa: ARG002
        """Return whether there were fewer records before."""
        self.left -= 1
        return self.left >= 0

    def snapshot(self) -> int:
        """Return how many may pass."""
        return self.left

    def restore(self, left: int) -> None:
        """Go on from a checkpoint."""
        self.left = left


class Sample(FilterFunction[Any]):
    """Lets a random part of the records pass; the same part each time if there is a seed."""

    def __init__(self, fraction: float, seed: int | None) -> None:
        self.fraction = fraction
        self.seed = seed

    def open(self) -> None:
        """Begin to draw; parallel tasks draw differently."""
        seed = None if self.seed is None else f"{self.seed} {self.ctx.parallel_index}"
        self._generator = random.Random(seed)
        self.random = self._generator.random

    def execute(self, data: object, /) -> bool:  # noqa: ARG002
        """Draw for one record."""
        return self.random() < self.fraction

    def snapshot(self) -> object:
        """Return the state of the generator."""
        return self._generator.getstate()

    def restore(self, state: Any) -> None:
        """Go on from a checkpoint."""
        self._generator.setstate(state)
