"""The checkpoints of a job in a folder: an SQLite file that one program at a time may write."""

from __future__ import annotations

import fcntl
import hashlib
import os
import sqlite3
import stat
import time
import uuid
from contextlib import suppress
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from sage._descriptors import OpenFile
from sage._forks import useless_after_fork
from sage._runtime.checkpoints import Row
from sage.errors import CheckpointError, describe, hint

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

VERSION = 2
"""The form of the file; it is changed with the form of what operators write."""

FILE = "checkpoints.sqlite"

SCHEMA = """
CREATE TABLE IF NOT EXISTS about (name TEXT PRIMARY KEY, value) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS checkpoints (number INTEGER PRIMARY KEY, made_at REAL, graph TEXT, checksum BLOB);
CREATE TABLE IF NOT EXISTS parts (
    number INTEGER, operator TEXT, place INTEGER, records INTEGER, body BLOB, since INTEGER, changes BLOB
);
CREATE INDEX IF NOT EXISTS parts_of ON parts (number);
"""

FRESH_HINT = 'submit(resume="never"), or sage run FILE --fresh, begins anew and deletes the checkpoints.'


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """A complete checkpoint.

    Attributes:
        number: its number; 0 stands for the beginning of a job.
        graph: the operators that the job had, by name, each with its kind and its parallelism.
        rows: the states of those that had one.
        changes: the changes of keyed states by operator and index, the oldest first.
    """

    number: int
    graph: dict[str, tuple[str, int]]
    rows: tuple[Row, ...]
    changes: dict[tuple[str, int], list[bytes]] = field(default_factory=dict)

    @property
    def records(self) -> int:
        """How many records were done."""
        return max(0, sum(row.records for row in self.rows))


class CheckpointStore:
    """The checkpoints of one job in a folder, which no other program can use meanwhile.

    Attributes:
        key: names the job; another one after the checkpoints were deleted.
        skipped: the numbers of damaged checkpoints that `load` left out.
    """

    def __init__(self, folder: str) -> None:
        self._folder = folder
        self._lock = _locked(folder)
        useless_after_fork(self)
        self.skipped: list[int] = []
        try:
            path = os.path.join(folder, FILE)
            os.close(
                os.open(path, os.O_RDWR | os.O_CREAT, 0o600)
            )  # the folder may have been there, and be open to read
            self._file = sqlite3.connect(path, isolation_level=None, check_same_thread=False)
            self._file.execute("PRAGMA synchronous = FULL")
            self._file.executescript(SCHEMA)
            self._begin()
        except (sqlite3.Error, OSError) as error:
            self.close()
            raise self._failed("be opened", error) from error
        except BaseException:
            self.close()
            raise

    def _begin(self) -> None:
        """Check the version, and count the epoch, so that a program that still holds an older one cannot write."""
        with self._file:
            self._file.execute("BEGIN IMMEDIATE")
            about = dict(self._file.execute("SELECT name, value FROM about").fetchall())
            if about.get("version", VERSION) != VERSION:
                text = f'checkpoints in "{self._folder}" have version {about["version"]}; this SAGE reads {VERSION}'
                raise hint(
                    CheckpointError(text, fault="external"),
                    "Use the SAGE that wrote them, or delete the folder to begin anew.",
                )
            self.key: str = about.get("key", uuid.uuid4().hex[:12])
            self._epoch = about.get("epoch", 0) + 1
            values = [("version", VERSION), ("key", self.key), ("epoch", self._epoch)]
            self._file.executemany("INSERT OR REPLACE INTO about VALUES (?, ?)", values)

    def clear(self) -> None:
        """Delete all checkpoints, and begin another job."""
        self.key = uuid.uuid4().hex[:12]
        try:
            with self._file:
                self._file.execute("BEGIN IMMEDIATE")
                self._file.execute("DELETE FROM parts")
                self._file.execute("DELETE FROM checkpoints")
                self._file.execute("INSERT OR REPLACE INTO about VALUES ('key', ?)", (self.key,))
        except sqlite3.Error as error:
            raise self._failed("be written", error) from error

    def load(self) -> Checkpoint | None:
        """Return the last checkpoint that is whole, or None without any.

        Raises:
            CheckpointError: all of them are damaged, or the file is.
        """
        try:
            numbers = self._file.execute("SELECT number, graph FROM checkpoints ORDER BY number DESC")
            for number, graph in numbers.fetchall():
                changes: dict[tuple[str, int], list[bytes]] = {}
                rows = self._rows(number)
                if rows is not None and self._has_changes(number, rows, changes):
                    return Checkpoint(number, _graph(graph), tuple(rows), changes)
                self.skipped.append(number)
        except sqlite3.Error as error:
            raise self._failed("be read", error) from error
        if self.skipped:
            text = f'all checkpoints in "{self._folder}" are damaged: {", ".join(map(str, self.skipped))}'
            raise hint(CheckpointError(text, fault="external"), FRESH_HINT)
        return None

    def _rows(self, number: int) -> list[Row] | None:
        """Return the rows of a checkpoint, or None if it is damaged or not there."""
        about = self._file.execute("SELECT graph, checksum FROM checkpoints WHERE number = ?", (number,)).fetchone()
        columns = "operator, place, records, body, since, changes"
        found = self._file.execute(f"SELECT {columns} FROM parts WHERE number = ? ORDER BY rowid", (number,))
        rows = [Row(*row) for row in found.fetchall()]
        return rows if about is not None and _checksum(number, about[0], rows) == about[1] else None

    def _has_changes(self, number: int, rows: list[Row], changes: dict[tuple[str, int], list[bytes]]) -> bool:
        """Collect the changes of keyed states up to a checkpoint, and return whether they are whole."""
        since = {(row.operator, row.index): row.since for row in rows if row.since is not None}
        changes.update({key: [] for key in since})
        for earlier in range(min(since.values(), default=number), number + 1):
            found = rows if earlier == number else self._rows(earlier)
            there = {(row.operator, row.index): row.changes for row in found or ()}
            for key, first in since.items():
                body = there.get(key)
                if earlier >= first:
                    if body is None:
                        return False
                    if body:
                        changes[key].append(body)
        return True

    def write(self, number: int, graph: dict[str, tuple[str, int]], rows: Sequence[Row], keep: int) -> None:
        """Add a checkpoint in one transaction, which also deletes those that are not kept.

        Raises:
            CheckpointError: it cannot be written, or another program has taken the folder over.
        """
        text = "".join(f"{kind}\t{parallelism}\t{name}\n" for name, (kind, parallelism) in graph.items())
        try:
            with self._file:
                self._file.execute("BEGIN IMMEDIATE")
                (epoch,) = self._file.execute("SELECT value FROM about WHERE name = 'epoch'").fetchone()
                if epoch != self._epoch:
                    text = f'checkpoints in "{self._folder}" were taken over by another program'
                    raise CheckpointError(text, fault="external")
                # Those after a damaged one that was left out, and those that are too old and not needed by a later one.
                oldest = number - keep + 1
                (needed,) = self._file.execute("SELECT min(since) FROM parts WHERE number = ?", (oldest,)).fetchone()
                first = oldest if needed is None else min(needed, oldest)
                for table in ("parts", "checkpoints"):
                    self._file.execute(f"DELETE FROM {table} WHERE number >= ? OR number < ?", (number, first))
                plain = [(number, *_columns(row)) for row in rows]
                self._file.executemany("INSERT INTO parts VALUES (?, ?, ?, ?, ?, ?, ?)", plain)
                values = (number, time.time(), text, _checksum(number, text, rows))
                self._file.execute("INSERT INTO checkpoints VALUES (?, ?, ?, ?)", values)
        except sqlite3.Error as error:
            raise self._failed("be written", error) from error

    def close(self) -> None:
        """Leave the folder to the next program."""
        if hasattr(self, "_file"):
            self._file.close()
        self._let_go()

    def _let_go(self) -> None:
        self._lock.close()

    def _after_fork_in_child(self) -> None:
        self._let_go()

    def _failed(self, done: str, error: sqlite3.Error | OSError) -> CheckpointError:
        text = f'checkpoints in "{self._folder}" cannot {done}: {describe(error)}'
        failed = CheckpointError(text, fault="external")
        is_damaged = isinstance(error, sqlite3.DatabaseError) and not isinstance(error, sqlite3.OperationalError)
        return (
            hint(failed, FRESH_HINT.replace("and", "after you have deleted the folder, and")) if is_damaged else failed
        )


def _columns(row: Row) -> tuple[str, int, int, bytes, int | None, bytes | None]:
    return row.operator, row.index, row.records, row.body, row.since, row.changes


def _checksum(number: int, graph: str, rows: Iterable[Row]) -> bytes:
    digest = hashlib.sha256(f"{number}\n{graph}".encode())
    for row in rows:
        changes = row.changes or b""
        sizes = f"{len(row.body)}\n{row.since}\n{len(changes)}"
        digest.update(f"\n{row.operator}\n{row.index}\n{row.records}\n{sizes}\n".encode())
        digest.update(row.body)
        digest.update(changes)
    return digest.digest()


def _graph(text: str) -> dict[str, tuple[str, int]]:
    lines = (line.split("\t", 2) for line in text.splitlines())
    return {name: (kind, int(parallelism)) for kind, parallelism, name in lines}


def _locked(folder: str) -> OpenFile:
    """Make the folder if needed, and return the file of its lock, which the system frees if the process dies.

    Raises:
        CheckpointError: it cannot be used, somebody else may write into it, or another program holds it.
    """
    try:
        with suppress(FileExistsError):
            os.makedirs(folder, 0o700)
        status = os.stat(folder)
        if status.st_uid != os.geteuid() or stat.S_IMODE(status.st_mode) & 0o022:
            error = CheckpointError(f'folder "{folder}" can be written by other users', fault="external")
            raise hint(error, f"Checkpoints are pickles, which can run any code: chmod 700 {folder}")
        lock = os.open(os.path.join(folder, "lock"), os.O_RDWR | os.O_CREAT, 0o600)
    except OSError as error:
        text = f'folder "{folder}" cannot be used for checkpoints: {describe(error)}'
        raise CheckpointError(text, fault="external") from error
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        pid = os.pread(lock, 32, 0).decode(errors="replace").strip()
        os.close(lock)
        refused = CheckpointError(f'folder "{folder}" is in use by process {pid or "unknown"}', fault="external")
        raise hint(refused, "Wait for its end or stop it; a folder holds one job.") from error
    os.ftruncate(lock, 0)
    os.pwrite(lock, f"{os.getpid()}\n".encode(), 0)
    return OpenFile(lock)
