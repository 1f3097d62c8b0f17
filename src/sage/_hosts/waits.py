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
            self._count += 1
            self._begin_busy(now_s)
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
            self._end_busy(self.now())

    def _begin_busy(self, now_s: float) -> None:
        if self._open == 0:
            self._busy_at = now_s
        self._open += 1

    def _end_busy(self, now_s: float) -> None:
        self._open -= 1
        if self._open == 0:
            self._busy_s += now_s - self._busy_at


class Crowd:
    """The calls at a service that makes one at a time by itself, so that all the others wait behind their gate.

    The times that they wait add up to the integral of their number over time, so no call is measured on its own.

    Attributes:
        is_there: whether any call has come during another one since the service last had none.
    """

    def __init__(self, waits: Waits) -> None:
        self.is_there = False
        self._waits = waits
        self._changed_at = 0.0

    def changed(self, before: int, *, has_come: bool) -> None:
        """Note that a call has come, or leaves, where there were so many `before`; the gate's lock is held."""
        waits = self._waits
        with waits._lock:
            now_s = waits.now()
            if not self.is_there:
                self.is_there = True
                waits._begin_busy(now_s)
            elif before > 1:
                waits._waited_s += (before - 1) * (now_s - self._changed_at)
            self._changed_at = now_s
            if has_come:
                waits._count += 1
            elif before == 1:
                self.is_there = False
                waits._end_busy(now_s)


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
