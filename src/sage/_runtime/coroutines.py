"""One event loop for each job, for coroutine functions and coroutine methods of services."""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING, Any

from sage._runtime.inside import carried

if TYPE_CHECKING:
    import asyncio
    from collections.abc import Coroutine
    from concurrent.futures import Future


class CoroutineLoop:
    """An asyncio loop on a thread of its own, started by the first coroutine."""

    def __init__(self, name: str) -> None:
        self._name = name
        self._lock = threading.Lock()
        self._loop: asyncio.AbstractEventLoop | None = None
        self._thread: threading.Thread | None = None
        self._running: set[Future[Any]] = set()

    def run(self, coroutine: Coroutine[Any, Any, Any]) -> Any:
        """Run a coroutine to its end and return its result; any thread but the loop's own may call it."""
        import asyncio  # importing it takes longer than a small job

        with self._lock:
            if self._loop is None:
                self._loop = asyncio.new_event_loop()
                work = carried(self._loop.run_forever)
                self._thread = threading.Thread(target=work, name=f"{self._name}-loop", daemon=True)
                self._thread.start()
        future = asyncio.run_coroutine_threadsafe(coroutine, self._loop)
        self._running.add(future)
        try:
            return future.result()
        finally:
            self._running.discard(future)

    def cancel(self) -> None:
        """Cancel every coroutine that runs."""
        for future in tuple(self._running):
            future.cancel()

    def close(self) -> None:
        """Stop the loop and its thread."""
        with self._lock:
            loop, thread = self._loop, self._thread
        if loop is None or thread is None:
            return
        import asyncio

        async def end() -> None:
            others = [task for task in asyncio.all_tasks() if task is not asyncio.current_task()]
            for task in others:
                task.cancel()
            await asyncio.gather(*others, return_exceptions=True)
            await loop.shutdown_asyncgens()
            loop.stop()

        loop.call_soon_threadsafe(loop.create_task, end())
        thread.join()
        loop.close()
        self._thread = None
