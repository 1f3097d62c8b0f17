"""Locks on files and folders that a service has open, which also show whether their last user closed them."""

from __future__ import annotations

import fcntl
import logging
import os
from contextlib import suppress

from sage._descriptors import OpenFile, file_of
from sage._processes import described, process
from sage.errors import ServiceError, hint

log = logging.getLogger(__name__)

MARK = ".sage-open"
"""The file that is in a folder while a store is open, with the id of its process."""


class HeldPath:
    """The files that a service has open, as they were when it opened them.

    A program goes on writing to a file that was removed, and nobody can ever read it again. A removed file that is
    open keeps its number, so a new one in its place has another.
    """

    def __init__(self, what: str, *paths: str) -> None:
        self._what = what
        self._known = {path: file_of(path) for path in paths}

    def check(self) -> None:
        """Refuse to go on with files that are gone."""
        for path, known in self._known.items():
            if file_of(path) != known:
                self.fail()

    def fail(self) -> None:
        """Raise the error for files that are gone."""
        error = ServiceError(f"{self._what} was removed or replaced while it was open", fault="external")
        raise hint(error, "Writes since then are lost. Put the file back if you can, and start the service again.")


class WalLock:
    """Holds the write-ahead log of an open file, so that whoever opens the file too does not take it for left behind.

    The lock is on the log and not on the file, whose own locks SQLite would lose with any descriptor that is closed. No
    file is left of it, and it ends with the process, however that ends. Call `warn_if_left` before the file is
    opened, and the constructor when it is: in between, another opener takes the log for left behind.
    """

    def __init__(self, path: str) -> None:
        self._file: OpenFile | None = None
        # If the file cannot be written, it has no log.
        with suppress(OSError):
            self._file = OpenFile(os.open(f"{path}-wal", os.O_RDONLY | os.O_CLOEXEC))
            fcntl.flock(self._file.descriptor, fcntl.LOCK_SH)

    @property
    def is_lost(self) -> bool:
        """Whether the log was removed while the file is open: commits that only the log holds would be lost."""
        return self._file is not None and os.fstat(self._file.descriptor).st_nlink == 0

    def close(self) -> None:
        """Let the log go; call it after the file is closed. A second call does nothing."""
        file, self._file = self._file, None
        if file is not None:
            _unlock(file)


def warn_if_left(path: str) -> None:
    """Say so in the log if a program ended without closing the file."""
    try:
        with open(f"{path}-wal", "rb") as file:
            if not os.fstat(file.fileno()).st_size:
                return
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:  # it does not exist, or it is held
        return
    log.warning("file was not closed: what was being written then may be missing path=%s", path)


class FolderLock:
    """Holds a folder for one store, among all programs of the machine, from the constructor to `close`.

    The lock is on the folder itself: no file is left of it, and it ends with the process, however that ends.
    """

    def __init__(self, path: str, what: str) -> None:
        self.path = path
        self._what = what
        self._mark = os.path.join(path, MARK)
        try:
            os.makedirs(path, exist_ok=True)
            self._file = OpenFile(os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC))
        except OSError as error:
            raise ServiceError(f'cannot open the {what} "{path}": {error}', fault="external") from error
        try:
            self._take(what)
        except BaseException:
            self._file.close()
            raise
        self.hold()

    def hold(self, *names: str) -> None:
        """Note the files in the folder that must stay there until `close`; call it when they are there."""
        paths = [os.path.join(self.path, name) for name in ("", *names)]
        self._held = HeldPath(f'{self._what} "{self.path}"', *paths)

    def check(self) -> None:
        """Refuse to go on with a folder that was removed or replaced, or that lacks one of the files of `hold`."""
        self._held.check()

    def discard(self, name: str) -> None:
        """Remove the lock file that a library leaves in the folder, unless another program holds it past this lock."""
        with suppress(OSError), open(os.path.join(self.path, name), "rb") as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            os.unlink(file.name)

    def close(self) -> None:
        """Let the folder go. Call it once, after everything in it is closed."""
        if self._file.is_open:
            with suppress(FileNotFoundError):
                os.unlink(MARK, dir_fd=self._file.descriptor)  # not that of another folder in its place
        _unlock(self._file)

    def _take(self, what: str) -> None:
        try:
            fcntl.flock(self._file.descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            marked = self._marked() or ""
            holder = process(int(marked)) if marked.isdecimal() else None
            whom = "another process" if holder is None else described(holder)
            error = ServiceError(f'{what} "{self.path}" is in use by {whom}')
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


def _unlock(file: OpenFile) -> None:
    if file.is_open:
        # A child that was forked has the descriptor too, and must not keep the lock.
        fcntl.flock(file.descriptor, fcntl.LOCK_UN)
        file.close()
