"""One event loop for each job, for coroutine functions and coroutine methods of services."""

from __future__ import annotations

import threading
from contextlib import nullcontext, suppress
from typing import TYPE_CHECKING, Any

from sage._logs import log_of
from sage._runtime.inside import carried

if TYPE_CHECKING:
    import asyncio
    from collections.abc import Callable, Coroutine
    from concurrent.futures import Future
    from contextlib import AbstractContextManager

    from sage._runtime.backend import Backend

CLOSE_S = 1.0
"""How long coroutines may take to end when the loop is closed, and then its thread."""

log = log_of("sage.dispatcher")

_here = threading.local()


def is_on_loop() -> bool:
    """Return whether this is the thread of a job's loop, on which nothing may wait for a coroutine."""
    return getattr(_here, "loop", None) is not None


class CoroutineLoop:
    """An asyncio loop on a thread of its own, started by the first coroutine.

    Args:
        name: what the thread is named after.
        backend: makes the loop, so that tests can decide when it goes on; by default it is one of the standard library.
    """

    def __init__(self, name: str, backend: Backend | None = None) -> None:
        self._name = name
        self._backend = backend
        self._lock = threading.Lock()
        self._loop: asyncio.AbstractEventLoop | None = None
        self._thread: threading.Thread | None = None
        self._running: set[Future[Any]] = set()
        self._is_closed = False

    def run(self, coroutine: Coroutine[Any, Any, Any]) -> Any:
        """Run a coroutine to its end and return its result; any thread but the loop's own may call it."""
        future = self.start(coroutine)
        self._running.add(future)
        try:
            with self.going_on():
                return future.result()
        finally:
            self._running.discard(future)

    def start(self, coroutine: Coroutine[Any, Any, Any]) -> Future[Any]:
        """Start a coroutine and return what a thread may wait for or cancel."""
        import asyncio  # importing it takes longer than a small job

        return asyncio.run_coroutine_threadsafe(coroutine, self._started())

    def answer(self, coroutine: Coroutine[Any, Any, Any]) -> Any:
        """Run a coroutine for whoever asks: a thread gets its result, and a coroutine something to await."""
        caller: CoroutineLoop | None = getattr(_here, "loop", None)
        if caller is None:
            return self.run(coroutine)
        if caller is self:
            return coroutine
        import asyncio

        return asyncio.wrap_future(self.start(coroutine))

    def post(self, callback: Callable[[], None]) -> None:
        """Have the loop call `callback` soon; when it is closed, nothing is called any more."""
        with suppress(RuntimeError):
            self._started().call_soon_threadsafe(callback)

    def cancel(self) -> None:
        """Cancel every coroutine that a thread waits for."""
        for future in tuple(self._running):
            future.cancel()

    def close(self) -> None:
        """Cancel what runs, and stop the loop and its thread; one that user code blocks is left behind."""
        with self._lock:
            loop, thread = self._loop, self._thread
        if loop is None or thread is None:
            return
        with self.going_on():
            loop.call_soon_threadsafe(loop.create_task, _end(loop))
            thread.join(3 * CLOSE_S)
        if thread.is_alive():
            log.error("event loop left behind thread=%r", thread.name)
            return
        with self._lock:
            self._is_closed = True
            self._loop = self._thread = None  # a job that has ended is remembered for long

    def _started(self) -> asyncio.AbstractEventLoop:
        """Return the loop, which is started if it was not; RuntimeError says that it is closed."""
        with self._lock:
            if self._is_closed:
                raise RuntimeError("the event loop of the job is closed")
            if self._loop is None:
                import asyncio

                self._loop = asyncio.new_event_loop() if self._backend is None else self._backend.event_loop()
                work = carried(self._turn)
                self._thread = threading.Thread(target=work, name=f"{self._name}-loop", daemon=True)
                self._thread.start()
            return self._loop

    def _turn(self) -> None:
        assert self._loop is not None
        _here.loop = self
        self._loop.run_forever()
        self._loop.close()  # here, as one that was left behind may end later

    def going_on(self) -> AbstractContextManager[None]:
        """Return what keeps the loop going while a thread waits for what coroutines do."""
        return nullcontext() if self._backend is None else self._backend.loop_going_on()


async def _end(loop: asyncio.AbstractEventLoop) -> None:
    import asyncio

    others = [task for task in asyncio.all_tasks() if task is not asyncio.current_task()]
    for task in others:
        task.cancel()
    if others:
        _, left = await asyncio.wait(others, timeout=CLOSE_S)
        for task in left:
            log.error("coroutine does not end: %r", task)
    with suppress(TimeoutError):
        async with asyncio.timeout(CLOSE_S):
            await loop.shutdown_asyncgens()
    loop.stop()
