"""What a service measures of itself: calls, errors, how long they took and how much they handled at once."""

from __future__ import annotations

import threading
from collections import deque
from contextlib import contextmanager
from dataclasses import dataclass
from time import perf_counter
from typing import TYPE_CHECKING

from sage.service import BaseService

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

LATENCIES_KEPT_MAX = 1_024
"""Percentiles are those of the last so many calls of a method."""


@dataclass(frozen=True, slots=True)
class Measure:
    """What is known of one method.

    Attributes:
        calls: how many calls ended.
        errors: how many of them raised.
        items: how many items they were given together: texts, vectors, keys or tokens.
        batch_max: the most items of one call.
        p50_s: the median time of the last calls, in seconds.
        p95_s: the time that 95 of 100 of the last calls kept.
        p99_s: the time that 99 of 100 of the last calls kept.
    """

    calls: int
    errors: int
    items: int
    batch_max: int
    p50_s: float
    p95_s: float
    p99_s: float


class Tally:
    """The running counts of one method."""

    __slots__ = ("batch_max", "calls", "errors", "items", "latencies_s")

    def __init__(self) -> None:
        self.calls = 0
        self.errors = 0
        self.items = 0
        self.batch_max = 0
        self.latencies_s: deque[float] = deque(maxlen=LATENCIES_KEPT_MAX)

    def measure(self) -> Measure:
        """Return the counts with the percentiles."""
        ordered = sorted(self.latencies_s)
        p50_s, p95_s, p99_s = (
            ordered[int(share * (len(ordered) - 1))] if ordered else 0.0 for share in (0.5, 0.95, 0.99)
        )
        return Measure(self.calls, self.errors, self.items, self.batch_max, p50_s, p95_s, p99_s)


class Call:
    """A call that is measured.

    Attributes:
        items: how many items it is given; set it where that is known only after a look at them.
    """

    __slots__ = ("items",)

    def __init__(self, items: int) -> None:
        self.items = items


class MeasuredService(BaseService):
    """A service that measures its methods and describes itself; the ready-made services derive from it.

    A subclass sees to it that its constructor only keeps settings: what can fail or takes time belongs into `setup`,
    and what `setup` opened is closed in `cleanup`, as far as it got.
    """

    def __init__(self) -> None:
        self._tallies: dict[str, Tally] = {}
        self._tallies_lock = threading.Lock()

    def measures(self) -> dict[str, Measure]:
        """Return what was measured so far, by method."""
        with self._tallies_lock:
            return {name: tally.measure() for name, tally in sorted(self._tallies.items())}

    def describe(self) -> Mapping[str, object]:
        """Return the settings that a person may see: no key, no token and no password."""
        return {"service": type(self).__name__}

    def health(self) -> bool:
        """Return whether the service can be used."""
        return True

    @contextmanager
    def measured(self, method: str, items: int = 1) -> Iterator[Call]:
        """Measure what runs inside as one call; checks of what it is given belong inside, as they may refuse it.

        Args:
            method: the method's name.
            items: how many items the call was given.
        """
        call = Call(items)
        started_at = perf_counter()
        failed = True
        try:
            yield call
            failed = False
        finally:
            elapsed_s = perf_counter() - started_at
            with self._tallies_lock:
                tally = self._tallies.setdefault(method, Tally())
                tally.calls += 1
                tally.errors += failed
                tally.items += call.items
                tally.batch_max = max(tally.batch_max, call.items)
                tally.latencies_s.append(elapsed_s)

    def counted(self, what: str, items: int = 1) -> None:
        """Count something that takes no time of its own, such as tokens, retries or hits of a cache.

        Args:
            what: the name that `measures` has it under.
            items: how many there were at once.
        """
        with self._tallies_lock:
            tally = self._tallies.setdefault(what, Tally())
            tally.calls += 1
            tally.items += items
            tally.batch_max = max(tally.batch_max, items)
