"""Threads of one service for calls with a time-out and for asynchronous calls."""

from __future__ import annotations

import threading
from queue import Empty, SimpleQueue
from typing import TYPE_CHECKING

from sage._calls import CallFuture
from sage._current_job import carried
from sage._forks import leave_if_forked
from sage.errors import ServiceError, ServiceUnavailableError

if TYPE_CHECKING:
    from collections.abc import Callable

    from sage._hosts.waits import Wait, Waits

CALL_THREADS_MAX = 32


class CallThreads:
    """Threads that are started as calls come, up to a limit, and end with the service.

    They are daemons, unlike those of the standard library's pool: a call that never returns must not keep the
    interpreter from its exit.
    """

    def __init__(self, service: str, threads_max: int | None, waits: Waits | None = None) -> None:
        self._service = service
        self._waits = waits
        self._threads_max = min(threads_max or CALL_THREADS_MAX, CALL_THREADS_MAX)
        self._queue: SimpleQueue[tuple[CallFuture, Callable[[], object]] | None] = SimpleQueue()
        self._threads: list[threading.Thread] = []
        self._open = 0  # calls that were taken in and have not ended
        self._load = 0  # those of them that need a thread, or have one
        self._lock = threading.Lock()
        self._all_done = threading.Condition(self._lock)
        self._closed = False

    def submit(self, method: str, function: Callable[[], object], timeout_s: float | None) -> CallFuture:
        """Have a call made and return its future."""
        future = CallFuture(self._service, method, timeout_s)
        with self._lock:
            if self._closed:
                raise ServiceUnavailableError(f'service "{self._service}" has stopped', service=self._service)
            self._open += 1
            self._load += 1
            if self._waits is not None and self._load > self._threads_max:
                function = _measured(self._waits.begin(), future, function)
            self._queue.put((future, carried(function)))
            # Counted, and not seen by which threads wait: one that is about to take a call waits no more.
            if len(self._threads) < min(self._load, self._threads_max):
                name = f"{self._service}-call-{len(self._threads)}"
                self._start_thread(name)
        return future

    def _start_thread(self, name: str) -> None:
        thread = threading.Thread(target=self._work, name=name, daemon=True)
        try:
            thread.start()
        except RuntimeError as error:
            if self._threads:
                return  # they take the call when they are free
            self._queue.get()
            self._open -= 1
            self._load -= 1
            text = f'service "{self._service}" cannot be called: {error}'
            raise ServiceError(text, service=self._service, fault="external") from error
        self._threads.append(thread)

    @property
    def is_busy(self) -> bool:
        """Whether a call that was taken in has not ended."""
        return self._open > 0

    def drain(self, timeout_s: float) -> bool:
        """Wait until every call that was taken in has ended."""
        with self._lock:
            return self._all_done.wait_for(lambda: self._open == 0, max(timeout_s, 0))

    def close(self) -> None:
        """Cancel waiting calls and end the threads; one that never returns is left behind."""
        with self._lock:
            self._closed = True
            idle = self._open == 0
            threads = list(self._threads)
        self.cancel_waiting()
        for _ in threads:
            self._queue.put(None)
        if idle:
            for thread in threads:
                thread.join()

    def cancel_waiting(self) -> None:
        while True:
            try:
                entry = self._queue.get_nowait()
            except Empty:
                return
            if entry is None:
                continue
            entry[0].cancel()
            self._returned()
            self._ended()

    def _work(self) -> None:
        while (entry := self._queue.get()) is not None:
            future, function = entry
            if not future.set_running_or_notify_cancel():
                self._returned()
            else:
                try:
                    result = future.make(function)
                except BaseException as error:  # the caller owns it, through the future
                    leave_if_forked(error)
                    self._returned()
                    future.set_exception(error)
                else:
                    leave_if_forked()
                    self._returned()
                    future.set_result(result)
            self._ended()

    def _returned(self) -> None:
        """Note that a thread is free for the next call, which may come as soon as this one's future is set."""
        with self._lock:
            self._load -= 1

    def _ended(self) -> None:
        with self._lock:
            self._open -= 1
            if self._open == 0:
                self._all_done.notify_all()


def _measured(wait: Wait, future: CallFuture, function: Callable[[], object]) -> Callable[[], object]:
    """Return a call that says when a thread is free for it; it leaves with its future."""
    future.add_done_callback(lambda _: wait.end())

    def call() -> object:
        wait.found()
        return function()

    return call
