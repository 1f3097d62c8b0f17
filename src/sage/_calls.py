"""The future of a call of a service, for threads that wait for it and coroutines that await it."""

from __future__ import annotations

import sys
import time
from concurrent.futures import Future
from typing import TYPE_CHECKING, Any, TypeVar

from sage._current_job import here
from sage.errors import ServiceTimeoutError, hint

if TYPE_CHECKING:
    from collections.abc import Callable, Generator


T = TypeVar("T")


def function_of(attribute: object) -> Callable[..., object]:
    """Return an attribute of a service that is to be called.

    Raises:
        TypeError: it cannot be called.
    """
    if not callable(attribute):
        raise TypeError(f"{type(attribute).__name__!r} object is not callable")
    return attribute


def refuse_on_foreign_loop(waits_for: str, instead: str) -> None:
    """Refuse to wait on the thread of an event loop of the program, which nothing else could go on in meanwhile.

    Raises:
        RuntimeError: this is such a thread, and not that of a job's loop.
    """
    # It may not be imported, or another thread may be about to; no loop runs here then.
    running_loop = getattr(sys.modules.get("asyncio"), "_get_running_loop", None)
    if running_loop is None or running_loop() is None or here.loop is not None:
        return
    raise hint(RuntimeError(f"{waits_for} is waited for on a running event loop, which that would block"), instead)


def current_call(service: str) -> CallFuture | None:
    """Return the call of a service that this thread makes for somebody who waits for its future, or None.

    If that call is given up, its own calls of other services go on, as the call itself does in Python.
    """
    found = here.call
    return found if isinstance(found, CallFuture) and found._service == service else None


def not_in_time(service: str, method: str, timeout_s: float | None) -> ServiceTimeoutError:
    """Return the error of a call whose time is over."""
    text = f'service "{service}" did not answer {method} within {timeout_s:g} s'
    return ServiceTimeoutError(text, service=service, fault="external")


class CallFuture(Future[object]):
    """The future of a call, which fails with `ServiceTimeoutError` when its time is over; a coroutine may await it.

    Attributes:
        before_wait: waits for the start of the service, so many seconds at most, on each thread that waits for the
            answer: its job may have other tasks go on meanwhile.
    """

    before_wait: Callable[[float | None], object] | None = None

    def __init__(self, service: str, method: str, timeout_s: float | None) -> None:
        super().__init__()
        self._service = service
        self._method = method
        self._timeout_s = timeout_s
        self._due = None if timeout_s is None else time.monotonic() + timeout_s
        self._on_given_up: Callable[[], None] | None = None
        self._is_given_up = False

    def make(self, function: Callable[[], T]) -> T:
        """Call a function on this thread, as the call of this future."""
        here.call = self
        try:
            return function()
        finally:
            here.call = None
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
        """Return the call's exception; see `concurrent.futures.Future.exception`."""
        self._wait(timeout)
        return super().exception(0 if self.done() else timeout)

    def _wait(self, timeout: float | None) -> None:
        if self.before_wait is not None and not self.done():
            left_s = None if self._due is None else max(self._due - time.monotonic(), 0)
            self.before_wait(min((bound for bound in (timeout, left_s) if bound is not None), default=None))
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

    def __await__(self) -> Generator[object, None, Any]:
        return self._awaited().__await__()

    async def _awaited(self) -> object:
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
