"""Gates: how many calls of one instance of a service may run at once, and whether any may at all."""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    from collections.abc import Callable


class Gate(Protocol):
    """Lets calls through to one instance of a service until it is closed.

    Attributes:
        is_open: whether calls are let through.
        call_count: how many calls were let through.
        error_count: how many of them raised.
    """

    is_open: bool
    call_count: int
    error_count: int

    def bind(
        self, method: Callable[..., Any], otherwise: Callable[..., Any], *, passes_closed: bool = False
    ) -> Callable[..., Any]:
        """Return `method` behind the gate; a call that finds it closed goes to `otherwise`, unless it may pass."""

    def close(self) -> None:
        """Let nothing more through."""

    def drain(self, timeout_s: float) -> bool:
        """Wait until no call runs and return whether that is so."""


class SerialGate:
    """One call at a time. A service that calls itself gets through, as the lock is reentrant."""

    def __init__(self) -> None:
        self.is_open = False
        self.call_count = 0
        self.error_count = 0
        self._lock = threading.RLock()

    def bind(
        self, method: Callable[..., Any], otherwise: Callable[..., Any], *, passes_closed: bool = False
    ) -> Callable[..., Any]:
        """Return `method` behind the lock."""
        # The hot path of services: one lock, one test and a plain call, about as long as the call itself.
        lock = self._lock

        def call(*args: Any, **kwargs: Any) -> Any:
            with lock:
                if self.is_open or passes_closed:
                    self.call_count += 1
                    try:
                        return method(*args, **kwargs)
                    except BaseException:
                        self.error_count += 1
                        raise
            return otherwise(*args, **kwargs)

        return call

    def close(self) -> None:
        """Let nothing more through; what waits for the lock finds the gate closed."""
        self.is_open = False

    def drain(self, timeout_s: float) -> bool:
        """Wait until no call runs."""
        if not self._lock.acquire(timeout=max(timeout_s, 0)):
            return False
        self._lock.release()
        return True


class SharedGate:
    """Several calls at a time, up to a limit or without one."""

    def __init__(self, calls_max: int | None) -> None:
        self.is_open = False
        self.call_count = 0
        self.error_count = 0
        self._calls_max = calls_max
        self._running: dict[int, int] = {}
        self._waiting = 0
        self._lock = threading.Lock()
        self._changed = threading.Condition(self._lock)

    def bind(
        self, method: Callable[..., Any], otherwise: Callable[..., Any], *, passes_closed: bool = False
    ) -> Callable[..., Any]:
        """Return `method` behind the limit."""

        def call(*args: Any, **kwargs: Any) -> Any:
            me = threading.get_ident()
            if not self._enter(me, passes_closed):
                return otherwise(*args, **kwargs)
            try:
                return method(*args, **kwargs)
            except BaseException:
                self.error_count += 1
                raise
            finally:
                self._leave(me)

        return call

    def close(self) -> None:
        """Let nothing more through, and send away what waits."""
        with self._lock:
            self.is_open = False
            self._changed.notify_all()

    def drain(self, timeout_s: float) -> bool:
        """Wait until no call runs."""
        with self._lock:
            self._waiting += 1
            try:
                return self._changed.wait_for(lambda: not self._running, max(timeout_s, 0))
            finally:
                self._waiting -= 1

    def _enter(self, me: int, passes_closed: bool) -> bool:
        with self._lock:
            if self._calls_max is not None and me not in self._running:
                # A thread that is inside already, because the service calls itself, needs no place of its own.
                while (self.is_open or passes_closed) and len(self._running) >= self._calls_max:
                    self._waiting += 1
                    self._changed.wait()
                    self._waiting -= 1
            if not self.is_open and not passes_closed:
                return False
            self._running[me] = self._running.get(me, 0) + 1
            self.call_count += 1
            return True

    def _leave(self, me: int) -> None:
        with self._lock:
            depth = self._running[me] - 1
            if depth:
                self._running[me] = depth
            else:
                del self._running[me]
                if self._waiting:
                    self._changed.notify_all()
