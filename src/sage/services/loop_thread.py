"""An event loop of a service's own, for threads that wait for coroutines and can be let go at any moment."""

from __future__ import annotations

import asyncio
import threading
from concurrent.futures import CancelledError
from typing import TYPE_CHECKING, Any, TypeVar

from sage.errors import ServiceUnavailableError

if TYPE_CHECKING:
    from collections.abc import Coroutine
    from concurrent.futures import Future

T = TypeVar("T")


class LoopThread:
    """A loop that runs on a thread from its making until `close`.

    A thread that blocks in a system call cannot be woken; one that waits here for a coroutine can.

    Args:
        name: the thread's name.
    """

    def __init__(self, name: str) -> None:
        self._lock = threading.Lock()
        self._running: set[Future[Any]] = set()
        self._is_closed = False
        self._started = threading.Event()
        self._thread = threading.Thread(target=lambda: asyncio.run(self._live()), name=name, daemon=True)
        self._thread.start()
        self._started.wait()

    def run(self, coroutine: Coroutine[Any, Any, T]) -> T:
        """Run a coroutine to its end and return its result; any thread but the loop's own may call it.

        Raises:
            ServiceUnavailableError: the loop was closed, or `cancel` was called meanwhile.
        """
        with self._lock:
            if self._is_closed:
                coroutine.close()
                raise ServiceUnavailableError("the service was closed before it could answer")
            future = asyncio.run_coroutine_threadsafe(coroutine, self._loop)
            self._running.add(future)
        try:
            return future.result()
        except CancelledError:
            raise ServiceUnavailableError("the service was stopped before there was an answer") from None
        finally:
            with self._lock:
                self._running.discard(future)
            future.cancel()  # Whoever was interrupted wants no answer any more.

    def cancel(self) -> None:
        """Cancel what runs; whoever waits for it is told."""
        with self._lock:
            running = tuple(self._running)
        for future in running:
            future.cancel()

    def close(self) -> None:
        """Cancel what runs, and end the loop with its asynchronous generators and its thread. Does nothing twice."""
        with self._lock:
            if not self._is_closed:
                self._is_closed = True
                self._loop.call_soon_threadsafe(self._closing.set)
        self._thread.join()

    async def _live(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._closing = asyncio.Event()
        self._started.set()
        await self._closing.wait()
