"""A folder that one store uses at a time, and that shows whether its last user has closed it."""

from __future__ import annotations

import fcntl
import logging
import os
from contextlib import suppress

from sage.errors import ServiceError, hint

log = logging.getLogger(__name__)

MARK = ".sage-open"
"""The file that is in a folder while a store is open, with the id of its process."""


class OpenFolder:
    """Holds a folder for one store, among all programs of the machine, from the constructor to `close`.

    The lock is on the folder itself: no file is left of it, and it ends with the process, however that ends.

    Args:
        path: the folder, which is made if it is not there.
        what: what is kept in it, for messages.

    Raises:
        ServiceError: another store or program has it open, or it cannot be used.
    """

    def __init__(self, path: str, what: str) -> None:
        self.path = path
        self._mark = os.path.join(path, MARK)
        try:
            os.makedirs(path, exist_ok=True)
            self._descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        except OSError as error:
            raise ServiceError(f'cannot open the {what} "{path}": {error}', fault="external") from error
        try:
            self._take(what)
        except BaseException:
            os.close(self._descriptor)
            raise

    def discard(self, name: str) -> None:
        """Remove the lock file that a library leaves in the folder, unless another program holds it past this lock."""
        with suppress(OSError), open(os.path.join(self.path, name), "rb") as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            os.unlink(file.name)

    def close(self) -> None:
        """Let the folder go. Call it once, after everything in it is closed."""
        with suppress(FileNotFoundError):
            os.unlink(self._mark)
        # A child that was forked has the descriptor too, and must not keep the lock.
        fcntl.flock(self._descriptor, fcntl.LOCK_UN)
        os.close(self._descriptor)

    def _take(self, what: str) -> None:
        try:
            fcntl.flock(self._descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            error = ServiceError(f'{what} "{self.path}" is in use by process {self._marked() or "unknown"}')
            raise hint(error, "One store at a time may have it open; several programs need a server.") from None
        if (pid := self._marked()) is not None:
            text = "store was not closed: what was being written then may be missing path=%s pid=%s"
            log.warning(text, self.path, pid)
        try:
            with open(self._mark, "w", encoding="ascii") as file:
                file.write(str(os.getpid()))
        except OSError as error:
            raise ServiceError(f'cannot write to the {what} "{self.path}": {error}', fault="external") from error

    def _marked(self) -> str | None:
        try:
            with open(self._mark, encoding="ascii", errors="replace") as file:
                return file.read(32) or None
        except FileNotFoundError:
            return None
