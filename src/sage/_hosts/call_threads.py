"""Threads of one service for calls with a time-out and for asynchronous calls."""

from __future__ import annotations

import threading
from queue import Empty, SimpleQueue
from typing import TYPE_CHECKING, Any

from sage._calls import CallFuture
from sage._runtime.inside import carried
from sage.errors import ServiceUnavailableError

if TYPE_CHECKING:
    from collections.abc import Callable

CALL_THREADS_MAX = 32


class CallThreads:
    """Threads that are started as calls come, up to a limit, and end with the service.

    They are daemons, unlike those of the standard library's pool: a call that never returns must not keep the
    interpreter from its exit.
    """

    def __init__(self, service: str, threads_max: int | None) -> None:
        self._service = service
        self._threads_max = min(threads_max or CALL_THREADS_MAX, CALL_THREADS_MAX)
        self._queue: SimpleQueue[tuple[CallFuture, Callable[[], Any]] | None] = SimpleQueue()
        self._threads: list[threading.Thread] = []
        self._waiting = 0
        self._open = 0
        self._lock = threading.Lock()
        self._all_done = threading.Condition(self._lock)
        self._closed = False

    def submit(self, method: str, function: Callable[[], Any], timeout_s: float | None) -> CallFuture:
        """Have a call made and return its future."""
        future = CallFuture(self._service, method, timeout_s)
        with self._lock:
            if self._closed:
                raise ServiceUnavailableError(f'service "{self._service}" has stopped', service=self._service)
            self._open += 1
            self._queue.put((future, carried(function)))
            if self._waiting < self._queue.qsize() and len(self._threads) < self._threads_max:
                name = f"{self._service}-call-{len(self._threads)}"
                thread = threading.Thread(target=self._work, name=name, daemon=True)
                self._threads.append(thread)
                thread.start()
        return future

    def drain(self, timeout_s: float) -> bool:
        """Wait until every call that was taken in has ended."""
        with self._lock:
            return self._all_done.wait_for(lambda: self._open == 0, max(timeout_s, 0))

    def close(self) -> None:
        """Cancel what has not begun and end the threads; one that never returns is left behind."""
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
        """Cancel what has not begun."""
        while True:
            try:
                entry = self._queue.get_nowait()
            except Empty:
                return
            if entry is None:
                continue
            entry[0].cancel()
            with self._lock:
                self._open -= 1
                if self._open == 0:
                    self._all_done.notify_all()

    def _work(self) -> None:
        while True:
            with self._lock:
                self._waiting += 1
            entry = self._queue.get()
            with self._lock:
                self._waiting -= 1
            if entry is None:
                return
            future, function = entry
            if future.set_running_or_notify_cancel():
                try:
                    result = function()
                except BaseException as error:  # the caller owns it, through the future
                    future.set_exception(error)
                else:
                    future.set_result(result)
            with self._lock:
                self._open -= 1
                if self._open == 0:
                    self._all_done.notify_all()
