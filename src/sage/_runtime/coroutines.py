"""One event loop for each job, for coroutine functions and coroutine methods of services."""

from __future__ import annotations

import sys
import threading
import traceback
from contextlib import nullcontext, suppress
from typing import TYPE_CHECKING, Protocol, TypeVar

from sage._calls import refuse_on_foreign_loop
from sage._current_job import carried, here
from sage._forks import leave_if_forked, useless_after_fork
from sage._logs import log_of
from sage.errors import ServiceUnavailableError

if TYPE_CHECKING:
    import asyncio
    from collections.abc import Callable, Coroutine
    from concurrent.futures import Future
    from contextlib import AbstractContextManager

T = TypeVar("T")

CLOSE_S = 1.0
"""How long coroutines may take to end when the loop is closed, and then its thread."""

log = log_of("sage.dispatcher")

AIO_HINT = "Write `await aio(handle).method(...)` there."


def is_on_loop() -> bool:
    """Return whether this is the thread of a job's loop, on which nothing may wait for a coroutine."""
    return here.loop is not None


class LoopBackend(Protocol):
    """The part of a backend that an event loop needs."""

    def event_loop(self) -> asyncio.AbstractEventLoop:
        """Return a new loop for the coroutines of a job, which is run on a thread of its own."""

    def loop_going_on(self) -> AbstractContextManager[None]:
        """Return a context that keeps the loop going while a thread waits for it."""


class CoroutineLoop:
    """An asyncio loop on a thread of its own, started by the first coroutine.

    Args:
        name: the name of the thread.
        backend: makes the loop, so that tests can decide when it goes on; by default it is one of the standard library.
    """

    def __init__(self, name: str, backend: LoopBackend | None = None) -> None:
        self._name = name
        self._backend = backend
        self._lock = threading.Lock()
        self._loop: asyncio.AbstractEventLoop | None = None
        self._thread: threading.Thread | None = None
        self._running: dict[Callable[[], bool], bool] = {}
        self._cancel_count = dict.fromkeys((False, True), 0)
        self._is_closed = False

    def run(self, coroutine: Coroutine[object, object, T]) -> T:
        """Run a coroutine to its end and return its result; any thread but the loop's own may call it."""
        is_of_task = here.is_task
        cancels = self._cancel_count[is_of_task]
        future = self.start(coroutine)
        self._running[future.cancel] = is_of_task
        if cancels != self._cancel_count[is_of_task]:  # which came before it was there to be seen
            future.cancel()
        try:
            with self.going_on():
                return future.result()
        finally:
            del self._running[future.cancel]

    def run_to_end(self, coroutine: Coroutine[object, object, T]) -> T:
        """Run a coroutine that closes something, which a cancel of the job does not end."""
        with self.going_on():
            return self.start(coroutine).result()

    def start(self, coroutine: Coroutine[object, object, T]) -> Future[T]:
        """Start a coroutine and return its future, which a thread may wait for or cancel."""
        import asyncio  # importing it takes longer than a small job

        try:
            loop = self._started()
        except BaseException:
            coroutine.close()
            raise
        return asyncio.run_coroutine_threadsafe(coroutine, loop)

    def begin(self) -> None:
        """Start the loop now, so that it cannot fail later; RuntimeError if it is closed, or without more threads."""
        self._started()

    def answer(self, coroutine: Coroutine[object, object, object]) -> object:
        """Run a coroutine for whoever asks: a thread gets its result, and a coroutine something to await."""
        caller = here.loop
        if caller is None:
            try:
                refuse_on_foreign_loop("the answer of a service", AIO_HINT)
            except RuntimeError:
                coroutine.close()
                raise
            return self.run(coroutine)
        if caller is self:
            return coroutine
        import asyncio

        return asyncio.wrap_future(self.start(coroutine))

    def post(self, callback: Callable[[], None]) -> None:
        """Have the loop call `callback` soon; when it is closed, nothing is called any more."""
        with suppress(RuntimeError):
            self._started().call_soon_threadsafe(callback)

    def cancel(self, *, only_of_tasks: bool = False) -> None:
        """Cancel every coroutine that a thread waits for, or only those for which a thread waits for a task."""
        kinds = {True} if only_of_tasks else {False, True}
        for is_of_task in kinds:
            self._cancel_count[is_of_task] += 1
        for cancel, is_of_task in self._running.copy().items():
            if is_of_task in kinds:
                cancel()

    def close(self) -> tuple[tuple[str, str], ...]:
        """Cancel the coroutines, and stop the loop and its thread; a thread that user code blocks is left behind.

        Returns:
            A description of coroutines that do not end, and their stacks.
        """
        with self._lock:
            loop, thread = self._loop, self._thread
        if loop is None or thread is None:
            return ()
        left: list[tuple[str, str]] = []
        with self.going_on():
            loop.call_soon_threadsafe(loop.create_task, _end(loop, left))
            thread.join(3 * CLOSE_S)
        if thread.is_alive():
            log.error("event loop left behind thread=%r", thread.name)
            return (
                (f'thread "{thread.name}", as a coroutine or a task of its own blocks the event loop', _stack(thread)),
            )
        with self._lock:
            self._is_closed = True
            self._loop = self._thread = None  # a job that has ended is remembered for long
        return tuple(left)

    def _started(self) -> asyncio.AbstractEventLoop:
        """Return the loop, which is started if it was not; RuntimeError says that it is closed."""
        with self._lock:
            if self._is_closed:
                raise RuntimeError("the event loop of the job is closed")
            if self._loop is None:
                import asyncio

                loop = asyncio.new_event_loop() if self._backend is None else self._backend.event_loop()
                useless_after_fork(self)
                work = carried(self._turn)
                thread = threading.Thread(target=work, name=f"{self._name}-loop", daemon=True)
                self._loop = loop
                try:
                    thread.start()
                except BaseException:
                    self._loop = None
                    loop.close()
                    raise
                self._thread = thread
            return self._loop

    def _after_fork_in_child(self) -> None:
        """Let no coroutine go on in a copy; the loop ends when the one that was forked in comes back to it."""
        self._lock = threading.Lock()
        self._is_closed = True
        if self._loop is not None and here.loop is self:
            self._loop.stop()

    def _turn(self) -> None:
        assert self._loop is not None
        here.loop = self
        self._loop.run_forever()
        leave_if_forked()
        self._loop.close()  # here, as one that was left behind may end later

    def going_on(self) -> AbstractContextManager[None]:
        """Return a context that keeps the loop going while a thread waits for coroutines."""
        return nullcontext() if self._backend is None else self._backend.loop_going_on()


def _stack(thread: threading.Thread) -> str:
    """Return where a thread stands, from the callback on that the event loop has called last."""
    frame = sys._current_frames().get(thread.ident or 0)
    stack = traceback.extract_stack(frame) if frame is not None else []
    begin = max((place for place, entry in enumerate(stack) if _is_of_loop(entry)), default=-1)
    return "".join(traceback.format_list(stack[begin + 1 :])).rstrip()


def _is_of_loop(entry: traceback.FrameSummary) -> bool:
    return entry.name in ("_run", "_run_once") and "asyncio" in entry.filename


async def _end(loop: asyncio.AbstractEventLoop, left_behind: list[tuple[str, str]]) -> None:
    import asyncio

    others = [task for task in asyncio.all_tasks() if task is not asyncio.current_task()]
    for task in others:
        task.cancel()
    if others:
        _, left = await asyncio.wait(others, timeout=CLOSE_S)
        for task in left:
            log.error("coroutine does not end: %r", task)
            stack = "".join(
                traceback.format_list(
                    traceback.StackSummary.extract((frame, frame.f_lineno) for frame in task.get_stack())
                )
            )
            left_behind.append(
                (f'asyncio task "{task.get_name()}", which does not end when it is cancelled', stack.rstrip())
            )
    with suppress(TimeoutError):
        async with asyncio.timeout(CLOSE_S):
            await loop.shutdown_asyncgens()
    loop.stop()


def is_cancellation(error: BaseException) -> bool:
    """Return whether an error only says that a coroutine or a served pipeline was cancelled with its job."""
    cause = error.__cause__ or error
    return isinstance(cause, ServiceUnavailableError) or type(cause).__name__ == "CancelledError"
