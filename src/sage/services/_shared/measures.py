"""The measurements of a service: calls, errors, how long they took and how much they handled at once."""

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
    """The measurements of one method.

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

    def __init__(self) -> None:
        self.calls = self.errors = self.items = self.batch_max = 0
        self.latencies_s: deque[float] = deque(maxlen=LATENCIES_KEPT_MAX)

    def add(self, items: int, *, failed: bool = False, latency_s: float | None = None) -> None:
        """Count a call."""
        self.calls += 1
        self.errors += failed
        self.items += items
        self.batch_max = max(self.batch_max, items)
        if latency_s is not None:
            self.latencies_s.append(latency_s)

    def measure(self) -> Measure:
        """Return the counts with the percentiles."""
        ordered = sorted(self.latencies_s) or [0.0]
        p50_s, p95_s, p99_s = (ordered[int(share * (len(ordered) - 1))] for share in (0.5, 0.95, 0.99))
        return Measure(self.calls, self.errors, self.items, self.batch_max, p50_s, p95_s, p99_s)


@dataclass(slots=True)
class Call:
    """A call that is measured; set `items` where it is known only after a look at them."""

    items: int


class MeasuredService(BaseService):
    """A service that measures its methods and describes itself; the ready-made services derive from it.

    The constructor of a subclass only keeps settings: work that can fail or takes time belongs in `setup`, and
    `cleanup` closes everything that `setup` has opened.
    """

    def __init__(self) -> None:
        self._tallies: dict[str, Tally] = {}
        self._tallies_lock = threading.Lock()

    def measures(self) -> dict[str, Measure]:
        """Return the measurements so far, by method."""
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
        """Measure the block as one call; checks of arguments belong inside, because they may refuse the call.

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
                self._tallies.setdefault(method, Tally()).add(call.items, failed=failed, latency_s=elapsed_s)

    def counted(self, what: str, items: int = 1) -> None:
        """Count something that takes no time of its own, such as tokens, retries or hits of a cache.

        Args:
            what: its name in `measures`.
            items: how many there were at once.
        """
        with self._tallies_lock:
            self._tallies.setdefault(what, Tally()).add(items)
