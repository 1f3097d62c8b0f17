"""The future of a call of a service, for threads that wait for it and coroutines that await it."""

from __future__ import annotations

import threading
import time
from concurrent.futures import Future
from typing import TYPE_CHECKING, Any

from sage.errors import ServiceTimeoutError

if TYPE_CHECKING:
    from collections.abc import Callable, Generator

_here = threading.local()


def current_call(service: str) -> CallFuture | None:
    """Return the call of a service that this thread makes for somebody who waits for its future, or None.

    What that call asks of other services goes on when it is given up, as the call itself does in Python.
    """
    found: CallFuture | None = getattr(_here, "call", None)
    return found if found is not None and found._service == service else None


def not_in_time(service: str, method: str, timeout_s: float | None) -> ServiceTimeoutError:
    """Return the error of a call whose time is over."""
    text = f'service "{service}" did not answer {method} within {timeout_s:g} s'
    return ServiceTimeoutError(text, service=service, fault="external")


class CallFuture(Future[Any]):
    """The future of a call, which fails with `ServiceTimeoutError` when its time is over; a coroutine may await it."""

    def __init__(self, service: str, method: str, timeout_s: float | None) -> None:
        super().__init__()
        self._service = service
        self._method = method
        self._timeout_s = timeout_s
        self._due = None if timeout_s is None else time.monotonic() + timeout_s
        self._on_given_up: Callable[[], None] | None = None
        self._is_given_up = False

    def make(self, function: Callable[[], Any]) -> Any:
        """Call a function on this thread, as the call of this future."""
        _here.call = self
        try:
            return function()
        finally:
            _here.call = None
            self._on_given_up = None

    def when_given_up(self, action: Callable[[], None]) -> None:
        """Have `action` called when nobody waits for the answer any more, while the call is made."""
        self._on_given_up = action
        if self._is_given_up:
            action()

    def cancel(self) -> bool:
        """Cancel a call that has not begun; of one that is made, tell that nobody waits for it any more."""
        if super().cancel():
            return True
        self._is_given_up = True
        action = self._on_given_up
        if action is not None and not self.done():
            action()
        return False

    def result(self, timeout: float | None = None) -> Any:
        """Return the answer; see `concurrent.futures.Future.result`."""
        self._wait(timeout)
        return super().result(0 if self.done() else timeout)

    def exception(self, timeout: float | None = None) -> BaseException | None:
        """Return what the call raised; see `concurrent.futures.Future.exception`."""
        self._wait(timeout)
        return super().exception(0 if self.done() else timeout)

    def _wait(self, timeout: float | None) -> None:
        if self._due is None or self.done():
            return
        left = self._due - time.monotonic()
        if timeout is not None and timeout < left:
            return
        with self._condition:
            if self._condition.wait_for(self.done, max(left, 0)):
                return
        self.cancel()
        raise not_in_time(self._service, self._method, self._timeout_s)

    def __await__(self) -> Generator[Any, None, Any]:
        return self._awaited().__await__()

    async def _awaited(self) -> Any:
        import asyncio

        left_s = None if self._due is None else self._due - time.monotonic()
        bound = asyncio.timeout(left_s)
        try:
            async with bound:
                return await asyncio.wrap_future(self)
        except TimeoutError:
            if not bound.expired():
                raise
            raise not_in_time(self._service, self._method, self._timeout_s) from None
