"""The runtime's own log, whose handlers cannot hold a job up: they are called on a thread of their own."""

from __future__ import annotations

import atexit
import logging
import os
import threading
from collections import deque
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Mapping

RECORDS_MAX = 10_000
"""How many log records wait for their handlers at most."""

PATIENCE_S = 1.0
"""How long handlers are waited for where they are behind; from then on they count as stuck, until they go on."""

LINGER_S = 0.05
"""How long the thread stays without anything to do."""


class Log(logging.LoggerAdapter[logging.Logger]):
    """A logger whose records are handled on the log's thread; every module of the runtime has one."""

    def log(self, level: int, msg: object, *args: object, **kwargs: object) -> None:
        """Make a record and leave it to the thread."""
        if not self.isEnabledFor(level):
            return
        error = kwargs.get("exc_info")
        file, line, function, _ = self.logger.findCaller(stacklevel=2)
        record = self.logger.makeRecord(
            self.logger.name,
            level,
            file,
            line,
            str(msg) % args if args else msg,  # now, because its subject may change
            (),
            (type(error), error, error.__traceback__) if isinstance(error, BaseException) else None,
            function,
            self.extra,
        )
        _thread.put(self.logger, record)


def log_of(name: str, extra: Mapping[str, object] | None = None) -> Log:
    """Return the log of this name, and the fields of each of its records."""
    return Log(logging.getLogger(name), extra)


def forward(values: dict[str, object]) -> None:
    """Log a record that another process made, if it is wanted in this one."""
    record = logging.makeLogRecord(values)
    logger = logging.getLogger(record.name)
    if logger.isEnabledFor(record.levelno):
        _thread.put(logger, record)


def flush() -> None:
    """Wait until all log records are handled and the thread has ended, but not for handlers that are stuck."""
    _thread.flush()


class LogThread:
    """Calls handlers, one record after another; it is there only while there is something to do.

    A handler of the program may block forever, for example when it writes to a pipe without a reader. Records that no
    longer fit are then dropped and counted, so that the job does not wait.
    """

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._waiting: deque[tuple[logging.Logger, logging.LogRecord]] = deque()
        self._thread: threading.Thread | None = None
        self._put = self._handled = self._dropped = self._flushes = 0
        self._is_stuck = False

    def put(self, logger: logging.Logger, record: logging.LogRecord) -> None:
        """Have a record handled soon."""
        with self._changed:
            if not self._has_room() and (self._is_stuck or not self._changed.wait_for(self._has_room, PATIENCE_S)):
                self._is_stuck = True
                self._dropped += 1
                return
            self._waiting.append((logger, record))
            self._put += 1
            self._changed.notify_all()
            has_thread = self._thread is not None or self._start()
        if not has_thread:
            self._work()

    def flush(self) -> None:
        """Wait until the records so far are handled, and the thread has ended if nobody else needs it."""
        with self._changed:
            thread, last = self._thread, self._put
            if thread is None or thread is threading.current_thread() or self._is_stuck:
                return
            self._flushes += 1
            self._changed.notify_all()
            is_done = self._changed.wait_for(
                lambda: self._handled >= last and (bool(self._waiting) or self._thread is not thread), PATIENCE_S
            )
            self._flushes -= 1
            self._is_stuck = not is_done
            is_over = self._thread is not thread
        if is_over:
            thread.join(PATIENCE_S)

    def _start(self) -> bool:
        """Start the thread and return whether there is one: the system may have no more, or the interpreter may end."""
        thread = threading.Thread(target=self._work, name="sage-log", daemon=True)
        try:
            thread.start()
        except RuntimeError:
            return False
        self._thread = thread
        return True

    def _has_room(self) -> bool:
        return len(self._waiting) < RECORDS_MAX

    def _work(self) -> None:
        while (entry := self._next()) is not None:
            logger, record = entry
            try:
                logger.handle(record)
            except Exception:  # of a handler that does not see to its own; it must not take the others along
                logging.Handler().handleError(record)
            with self._changed:
                self._handled += 1
                self._is_stuck = False
                dropped, self._dropped = self._dropped, 0
                self._changed.notify_all()
            if dropped:
                logging.getLogger("sage.dispatcher").warning("log records dropped count=%d", dropped)

    def _next(self) -> tuple[logging.Logger, logging.LogRecord] | None:
        with self._changed:
            self._changed.wait_for(lambda: self._waiting or self._flushes, LINGER_S)
            if self._waiting:
                return self._waiting.popleft()
            self._thread = None
            self._changed.notify_all()
            return None


_thread = LogThread()


def _after_fork_in_child() -> None:
    global _thread
    _thread = LogThread()


os.register_at_fork(after_in_child=_after_fork_in_child)
atexit.register(flush)
