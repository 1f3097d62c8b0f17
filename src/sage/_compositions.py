"""Functions for the stream methods that are made of others."""

from __future__ import annotations

import random
import sys
from copy import deepcopy
from typing import TYPE_CHECKING, Any

from sage.functions import FilterFunction, is_coroutine_function

if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import TypeAlias

    from sage._types import T, V

    Before: TypeAlias = tuple[object] | None


def passing_on(function: Callable[[T], object]) -> Callable[[T], object]:
    """Return a function that calls `function` with a record and returns the record."""
    if is_coroutine_function(function):

        async def tap_async(record: T) -> T:
            await function(record)
            return record

        return tap_async

    def tap(record: T) -> T:
        function(record)
        return record

    return tap


class Limit(FilterFunction[object]):
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


class Sample(FilterFunction[object]):
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
        return self.random() < self.fraction

    def snapshot(self) -> object:
        """Return the state of the generator."""
        return self._generator.getstate()

    def restore(self, state: tuple[int, tuple[int, ...], float | None]) -> None:
        """Go on from a checkpoint."""
        self._generator.setstate(state)


def count(before: int, _: object) -> tuple[int, int]:
    """Count a record."""
    before += 1
    return before, before


def aggregating(add: Callable[[V, T], V], result: Callable[[V], object]) -> Callable[[V, T], tuple[V, object]]:
    """Return a function that adds a record and makes the result."""

    def aggregate(before: V, record: T) -> tuple[V, object]:
        after = add(before, record)
        return after, after if result is itself else result(after)

    return aggregate


def keeping_top(k: int, by: Callable[[T], Any]) -> Callable[[list[T], T], list[T]]:
    """Return a function that adds a record to a list of the `k` greatest, the first of equal ones first."""

    def top_k(best: list[T], record: T) -> list[T]:
        if len(best) == k and not by(best[-1]) < by(record):
            return best
        return sorted([*best, record], key=by, reverse=True)[:k]

    return top_k


def distinct(seen: bool, _: object) -> tuple[bool, bool]:
    """Say whether the record is the first of its key."""
    return True, not seen


def comparing(fingerprint: Callable[[T], object]) -> Callable[[Before, T], tuple[Before, bool]]:
    """Return a function that says whether a record differs from the one before."""

    def changed(before: Before, record: T) -> tuple[Before, bool]:
        after = (fingerprint(record),)
        if after == before:
            return before, False
        return deepcopy(after), True  # the record goes on, and may be changed there

    return changed


def itself(value: T) -> T:
    return value


def printing(prefix: str, separator: str, colored: bool) -> Callable[[object], None]:
    """Return a function that prints a record after a prefix, which is dimmed on a terminal."""

    def show(record: object) -> None:
        if not prefix:
            print(record)
        elif colored and sys.stdout.isatty():
            print(f"\x1b[2m{prefix}{separator}\x1b[0m{record}")
        else:
            print(f"{prefix}{separator}{record}")

    show.__name__ = "print"
    return show
