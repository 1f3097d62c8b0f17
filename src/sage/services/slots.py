"""A limit on how much runs at once, for the coroutines of several event loops together."""

from __future__ import annotations

import threading
from collections import deque
from concurrent.futures import Future


class Slots:
    """A number of places that are taken and given back; who comes first is served first.

    Args:
        slots_max: how many there are.
    """

    def __init__(self, slots_max: int) -> None:
        self._free = slots_max
        self._waiting: deque[Future[None]] = deque()
        self._lock = threading.Lock()

    def take(self) -> Future[None]:
        """Return a future that is done when a slot was taken; `leave` must follow, whatever comes of the waiting.

        A coroutine waits for it by `asyncio.wrap_future`, as the one that leaves may belong to another loop.
        """
        future: Future[None] = Future()
        with self._lock:
            if self._free > 0:
                self._free -= 1
                future.set_result(None)
            else:
                self._waiting.append(future)
        return future

    def leave(self, future: Future[None]) -> None:
        """Give a slot back, or give up waiting for it."""
        if future.cancel() or future.cancelled():
            return
        with self._lock:
            while self._waiting:
                following = self._waiting.popleft()
                # One that was cancelled is passed over; from here on this one cannot be cancelled.
                if following.set_running_or_notify_cancel():
                    following.set_result(None)
                    return
            self._free += 1
