"""A SQLite file that a service keeps its data in: opened in `setup`, closed in `cleanup`, used from any thread."""

from __future__ import annotations

import os
import sqlite3
import threading
import time
from contextlib import contextmanager, nullcontext, suppress
from typing import TYPE_CHECKING

from sage.errors import ServiceError, ServiceUnavailableError, hint, short
from sage.services._shared.locks import HeldPath, WalLock, warn_if_left
from sage.services._shared.measures import MeasuredService

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

BUSY_TIMEOUT_S = 5.0
"""How long a call waits for another program that writes to the file."""

RETRY_S = 0.005
"""The pause between two attempts of calls for which SQLite does not wait itself."""

IDLE_CONNECTIONS_MAX = 8
"""Each call has a connection to itself; so many stay open between calls, as opening one costs more than most calls."""

PROBLEMS = {
    sqlite3.SQLITE_NOTADB: ("is not an SQLite database", "Name another file, or move this one away."),
    sqlite3.SQLITE_CORRUPT: ("is damaged", "Restore it from a backup; the command `sqlite3 FILE .recover` may help."),
    sqlite3.SQLITE_CANTOPEN: ("cannot be opened", "Its folder must be there, and this user must be allowed to write."),
    sqlite3.SQLITE_PERM: ("cannot be opened", "This user must be allowed to read and write it, and its folder."),
    sqlite3.SQLITE_READONLY: ("cannot be written", "This user must be allowed to write it, and its folder."),
    sqlite3.SQLITE_IOERR: ("cannot be read or written", "Is the disk full, or a limit of the size of files reached?"),
    sqlite3.SQLITE_FULL: ("cannot be written", "Make room on the disk."),
    sqlite3.SQLITE_BUSY: ("is in use by another program", "End that program, or name another file."),
    sqlite3.SQLITE_LOCKED: ("is in use by another program", "End that program, or name another file."),
}


OLD_MARK = 0x53414745
"""Marked a file of vectors, by its application id, before the table of kinds did."""

ON_DISK = "Name a file; one in a tempfile.TemporaryDirectory() is gone with the folder."


class SqliteFile:
    """One file, in write-ahead mode: readers go on while one writes, and a commit survives the end of the process.

    Committed data survives SIGKILL, and an uncommitted transaction is undone when the file is opened again. The loss of
    power can undo the last commits, but leaves the file whole. Several services may share a file, and several programs
    too, unless it is exclusive. Every call has a connection of its own for as long as it takes; `close` closes those
    that are idle, and a call that is still running then closes its own.

    Args:
        path: the file; it is made if it is not there, its folder is not.
        kind: its content, as a word; one file can hold several kinds.
        version: of the tables; a file that holds a newer one is refused.
        schema: statements that make the tables and may run again.
        is_exclusive: whether no other program, and no other service, may use the file meanwhile.
        is_in_memory: whether it is a database in memory instead, which one call at a time uses and `close` forgets.
        is_ours: whether a database with tables of another program is refused.
        timeout_s: how long a call waits for another program that writes to the file.
    """

    def __init__(
        self,
        path: object,
        kind: str,
        version: int,
        schema: str,
        *,
        is_in_memory: bool = False,
        is_exclusive: bool = False,
        is_ours: bool = False,
        timeout_s: float = BUSY_TIMEOUT_S,
    ) -> None:
        self.path = ":memory:" if is_in_memory else checked_path(path)
        self._name = f"the {kind} in memory" if is_in_memory else f'file "{self.path}"'
        self._kind = kind
        self._version = version
        self._schema = schema
        self._is_in_memory = is_in_memory
        self._is_exclusive = is_exclusive
        self._is_ours = is_ours
        # Whoever has an exclusive file keeps it, so that waiting for long is in vain.
        self._timeout_s = timeout_s / 10 if is_exclusive else timeout_s
        self._idle: list[sqlite3.Connection] = []
        self._hold: WalLock | None = None
        self._held = HeldPath("")
        self._lock = threading.Lock()
        self._write_lock = threading.Lock()
        self._openings = 0
        self.is_open = False

    @property
    def place(self) -> str:
        """Where the data are, for people to read."""
        return "memory" if self._is_in_memory else self.path

    def open(self) -> None:
        """Open the file and make its tables; if a program ended without closing it, the log says so."""
        if os.path.exists(self.path) and not os.access(self.path, os.W_OK):
            # SQLite would call it an error of the disk where the file is exclusive.
            what, note = PROBLEMS[sqlite3.SQLITE_READONLY]
            raise hint(ServiceError(f"{self._name} {what}: no permission", fault="external"), note)
        if not self._is_in_memory:
            warn_if_left(self.path)
        with self._lock:
            self._openings += 1
            self.is_open = True
            self._held = HeldPath("")
        try:
            with self.writing() as connection:
                self._make_tables(connection)
                if not self._is_in_memory:
                    self._hold = WalLock(self.path)
                    self._held = HeldPath(self._name, self.path)
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """Close every connection that is not in use; a second call does nothing."""
        with self._lock:
            self.is_open = False
            idle, self._idle = self._idle, []
            hold, self._hold = self._hold, None
        for connection in idle:
            connection.close()
        if hold is not None:
            hold.close()

    @contextmanager
    def reading(self) -> Iterator[sqlite3.Connection]:
        """Lend a connection for statements that see the file as it is at the first of them."""
        with self._write_lock if self._is_in_memory else nullcontext(), self._borrowed() as connection:
            connection.execute("BEGIN")
            yield connection

    @contextmanager
    def writing(self) -> Iterator[sqlite3.Connection]:
        """Lend a connection for statements that take effect together at the end of the block, or not at all.

        A file that was removed is an error too, also if that happened while the block ran.
        """
        # SQLite lets the writers of one process wait by polling; a lock is faster and serves all of them.
        with self._write_lock, self._borrowed() as connection:
            connection.execute("BEGIN IMMEDIATE")
            yield connection
            connection.execute("COMMIT")
            self.check_held()

    def checkpoint(self) -> None:
        """Bring all commits from the log into the file, and both to the disk."""
        with self._write_lock, self._borrowed() as connection:
            connection.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchone()

    def health(self) -> bool:
        """Return whether the file can be read."""
        with suppress(ServiceError), self.reading() as connection:
            return bool(connection.execute("SELECT 1").fetchone())
        return False

    @contextmanager
    def _borrowed(self) -> Iterator[sqlite3.Connection]:
        with self._lock:
            if not self.is_open:
                error = ServiceUnavailableError(f"{self._name} is not open")
                raise hint(error, "Outside a job, call setup() first and cleanup() last.")
            opening = self._openings
            connection = self._idle.pop() if self._idle else None
        try:
            self.check_held()
            connection = connection or self._connect()
            yield connection
        except sqlite3.DatabaseError as error:
            # Misuse of the module, which would be a bug of ours, has no code and is raised unchanged.
            if getattr(error, "sqlite_errorcode", None) is None:
                raise
            raise self._problem_of(error) from error
        finally:
            if connection is not None:
                self._take_back(connection, opening)

    def check_held(self) -> None:
        """Refuse a file that was removed or replaced; a new connection would make an empty one in its place."""
        self._held.check()
        hold = self._hold
        if hold is not None and hold.is_lost:
            self._held.fail()

    def _connect(self) -> sqlite3.Connection:
        connection = sqlite3.connect(self.path, timeout=self._timeout_s, isolation_level=None, check_same_thread=False)
        try:
            if self._is_exclusive:
                connection.execute("PRAGMA locking_mode = EXCLUSIVE")
            if self._is_ours and self._hold is None:
                names = {name for (name,) in connection.execute("SELECT name FROM sqlite_master")}
                (mark,) = connection.execute("PRAGMA application_id").fetchone()
                if mark != OLD_MARK and names and "sage_kinds" not in names:
                    error = ServiceError(f"{self._name} is a database of another program")
                    raise hint(error, PROBLEMS[sqlite3.SQLITE_NOTADB][1])
            self._write_ahead(connection)
            connection.execute("PRAGMA synchronous = NORMAL")
        except BaseException:
            connection.close()
            raise
        return connection

    def _write_ahead(self, connection: sqlite3.Connection) -> None:
        """Switch to write-ahead mode; where two programs do so at once, SQLite refuses one of them without waiting."""
        due = time.monotonic() + self._timeout_s
        while True:
            try:
                connection.execute("PRAGMA journal_mode = WAL").fetchall()
                return
            except sqlite3.OperationalError as error:
                if error.sqlite_errorcode & 0xFF != sqlite3.SQLITE_BUSY or time.monotonic() > due:
                    raise
            threading.Event().wait(RETRY_S)

    def _take_back(self, connection: sqlite3.Connection, opening: int) -> None:
        with suppress(sqlite3.Error):  # the error of the block is the one to tell, and a broken connection is closed
            if connection.in_transaction:
                connection.execute("ROLLBACK")
        with self._lock:
            is_wanted = self.is_open and opening == self._openings and len(self._idle) < IDLE_CONNECTIONS_MAX
            if is_wanted and not connection.in_transaction:
                self._idle.append(connection)
                return
        connection.close()

    def _make_tables(self, connection: sqlite3.Connection) -> None:
        connection.execute("CREATE TABLE IF NOT EXISTS sage_kinds (kind TEXT PRIMARY KEY, version INTEGER NOT NULL)")
        found = connection.execute("SELECT version FROM sage_kinds WHERE kind = ?", (self._kind,)).fetchone()
        if found is not None and found[0] > self._version:
            text = f'{self._name} holds version {found[0]} of "{self._kind}", newer than {self._version}'
            raise hint(ServiceError(text), "A newer SAGE wrote it; install that one, or name another file.")
        for statement in self._schema.split(";"):
            connection.execute(statement)
        row = (self._kind, self._version)
        connection.execute("INSERT OR REPLACE INTO sage_kinds (kind, version) VALUES (?, ?)", row)

    def _problem_of(self, error: sqlite3.Error) -> ServiceError:
        """Return SQLite's message about the file as the error of a service, with a hint where there is one."""
        what, note = PROBLEMS.get((error.sqlite_errorcode or 0) & 0xFF, ("cannot be used", ""))
        problem = ServiceError(f"{self._name} {what}: {error}", fault="external")
        return hint(problem, note) if note else problem


class FileService(MeasuredService):
    """A service that keeps its data in a SQLite file."""

    def __init__(self, file: SqliteFile) -> None:
        super().__init__()
        self._file = file

    def setup(self) -> None:
        """Open the file.

        Raises:
            ServiceError: it cannot be opened, or is not a database.
        """
        self._file.open()

    def cleanup(self) -> None:
        """Close the file."""
        self._file.close()

    def health(self) -> bool:
        """Return whether the file can be read."""
        return self._file.health()

    def describe(self) -> Mapping[str, object]:
        """Return the settings that a person may see."""
        return {**super().describe(), "path": self._file.place}


def checked_path(path: object, note: str = ON_DISK, *, what: str = "path") -> str:
    """Return the path of a file from the root on."""
    if not isinstance(path, str | bytes | os.PathLike):
        raise TypeError(f"{what} is {short(path)}, not a path")
    name = os.fsdecode(path)
    if name in ("", ":memory:"):
        raise hint(ValueError(f'{what} is "{name}", which SQLite does not treat as a file'), note)
    return os.path.abspath(name)
