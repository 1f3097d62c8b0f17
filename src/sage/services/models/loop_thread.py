"""An event loop of a service's own, for threads that wait for coroutines and can be let go at any moment."""

from __future__ import annotations

import asyncio
import threading
from concurrent.futures import CancelledError
from typing import TYPE_CHECKING, TypeVar

from sage.errors import ServiceUnavailableError

if TYPE_CHECKING:
    from collections.abc import Coroutine

T = TypeVar("T")

ENDED = "the service was stopped before there was an answer"


class LoopThread:
    """A loop that runs on a thread from its making until `close`.

    A thread that blocks in a system call cannot be woken; one that waits here for a coroutine can.
    """

    def __init__(self, name: str) -> None:
        self._lock = threading.Lock()
        self._tasks: set[asyncio.Task[object]] = set()
        self._is_ended = False
        self._started = threading.Event()
        self._thread = threading.Thread(target=lambda: asyncio.run(self._live()), name=name, daemon=True)
        self._thread.start()
        self._started.wait()

    def run(self, coroutine: Coroutine[object, object, T]) -> T:
        """Run a coroutine to its end and return its result; any thread but the loop's own may call it."""
        with self._lock:
            if self._is_ended:
                coroutine.close()
                raise ServiceUnavailableError(ENDED)
            future = asyncio.run_coroutine_threadsafe(self._listed(coroutine), self._loop)
        try:
            return future.result()
        except CancelledError:
            raise ServiceUnavailableError(ENDED) from None
        finally:
            if not future.done():  # Whoever was interrupted wants no answer any more.
                future.cancel()

    def end(self) -> None:
        """Cancel running calls and refuse new ones; waiters learn when they have ended. A second call does nothing."""
        with self._lock:
            if not self._is_ended:
                self._is_ended = True
                self._loop.call_soon_threadsafe(self._cancel_all)

    def close(self) -> None:
        """End the loop with its asynchronous generators and its thread. Does nothing twice."""
        self.end()
        if self._thread.is_alive():
            self._loop.call_soon_threadsafe(self._closing.set)
            self._thread.join()

    async def _live(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._closing = asyncio.Event()
        self._started.set()
        await self._closing.wait()

    async def _listed(self, coroutine: Coroutine[object, object, T]) -> T:
        task = asyncio.current_task()
        assert task is not None
        self._tasks.add(task)
        try:
            return await coroutine
        finally:
            self._tasks.discard(task)

    def _cancel_all(self) -> None:
        # The tasks and not the futures that threads wait for: those would be over before their tasks are.
        for task in self._tasks:
            task.cancel()
