"""Tells a SQLite file that another program has open from one that a program was killed with."""

from __future__ import annotations

import fcntl
import logging
import os
from contextlib import suppress

log = logging.getLogger(__name__)


class LogHold:
    """Holds the write-ahead log of an open file, so that whoever opens the file too does not take it for left behind.

    The lock is on the log and not on the file, whose own locks SQLite would lose with any descriptor that is closed. No
    file is left of it, and it ends with the process, however that ends. Call `warn_if_left` before the file is
    opened, and the constructor when it is: in between, another opener takes the log for left behind.

    Args:
        path: the database.
    """

    def __init__(self, path: str) -> None:
        self._descriptor: int | None = None
        # There is no log where the file cannot be written.
        with suppress(OSError):
            self._descriptor = os.open(f"{path}-wal", os.O_RDONLY | os.O_CLOEXEC)
            fcntl.flock(self._descriptor, fcntl.LOCK_SH)

    def close(self) -> None:
        """Let the log go; call it after the file is closed. A second call does nothing."""
        descriptor, self._descriptor = self._descriptor, None
        if descriptor is not None:
            # A child that was forked has the descriptor too, and must not keep the lock.
            fcntl.flock(descriptor, fcntl.LOCK_UN)
            os.close(descriptor)


def warn_if_left(path: str) -> None:
    """Say so in the log if a program ended without closing the file.

    Args:
        path: the database; it may not be there.
    """
    try:
        with open(f"{path}-wal", "rb") as file:
            if not os.fstat(file.fileno()).st_size:
                return
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:  # there is none, or it is held
        return
    log.warning("file was not closed: what was being written then may be missing path=%s", path)
