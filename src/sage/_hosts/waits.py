"""How long calls of a service waited for their turn, measured on the path of the calls that wait alone."""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING

from sage._runtime.backend import CallWaits

if TYPE_CHECKING:
    from collections.abc import Callable


class Waits:
    """Adds up the calls of one service that found all its places taken; any thread may use it.

    Args:
        now: the clock, in seconds.
        is_serial: whether the service makes one call at a time.
    """

    def __init__(self, now: Callable[[], float], *, is_serial: bool) -> None:
        self.is_serial = is_serial
        self.now = now
        self._lock = threading.Lock()
        self.clear()

    def clear(self) -> None:
        """Begin anew: another job uses the service from now on."""
        self._count = self._open = 0
        self._waited_s = self._busy_s = self._busy_at = 0.0

    def begin(self) -> Wait:
        """Count a call that has to wait."""
        with self._lock:
            now_s = self.now()
            if self._open == 0:
                self._busy_at = now_s
            self._open += 1
            self._count += 1
        return Wait(self, now_s)

    def total(self) -> CallWaits:
        """Return the sums so far."""
        with self._lock:
            going_on_s = self.now() - self._busy_at if self._open else 0.0
            return CallWaits(self._count, self._waited_s, self._busy_s + going_on_s)

    def _add(self, waited_s: float) -> None:
        with self._lock:
            self._waited_s += max(waited_s, 0.0)

    def _end(self) -> None:
        with self._lock:
            self._open -= 1
            if self._open == 0:
                self._busy_s += self.now() - self._busy_at


class Wait:
    """One call that has to wait. The service is busy until it has its place or, if it is serial, until it leaves."""

    __slots__ = ("_began_at", "_is_over", "_waits")

    def __init__(self, waits: Waits, began_at: float) -> None:
        self._waits = waits
        self._began_at = began_at
        self._is_over = False

    def found(self, at: float | None = None) -> None:
        """Add the time until the call got its place, at that moment or now."""
        waits = self._waits
        waits._add((waits.now() if at is None else at) - self._began_at)
        if not waits.is_serial:
            self.end()

    def end(self) -> None:
        """Let the call leave, with or without having had a place. Does nothing twice."""
        if not self._is_over:
            self._is_over = True
            self._waits._end()
