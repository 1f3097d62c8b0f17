"""The checkpoints of a job in a folder: an SQLite file that one program at a time may write, and any may read."""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import shutil
import sqlite3
import stat
import tempfile
import time
import uuid
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from sage._descriptors import OpenFile
from sage._forks import useless_after_fork
from sage._runtime.accounts import Counts
from sage._runtime.checkpoints import Row
from sage.errors import CheckpointError, describe, hint

if TYPE_CHECKING:
    from collections.abc import Iterable

VERSION = 4
"""The form of the file; it is changed with the form of what operators write."""

FILE = "checkpoints.sqlite"
SOURCE = "source"

SCHEMA = """
CREATE TABLE IF NOT EXISTS about (name TEXT PRIMARY KEY, value) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS checkpoints (
    number INTEGER PRIMARY KEY, made_at REAL, graph TEXT, accounts TEXT, checksum BLOB
);
CREATE TABLE IF NOT EXISTS parts (
    number INTEGER, operator TEXT, place INTEGER, records INTEGER, body BLOB, since INTEGER, changes BLOB,
    keys INTEGER, held INTEGER
);
CREATE INDEX IF NOT EXISTS parts_of ON parts (number);
"""

LISTED = "SELECT number, made_at, graph, accounts, checksum FROM checkpoints ORDER BY number"
ROW_COLUMNS = "operator, place, records, body, since, changes, keys, held"

BUSY_TIMEOUT_S = 60.0
"""How long a program waits while another one reads or writes the file, in seconds."""

FRESH_HINT = 'submit(resume="never"), or sage run FILE --fresh, begins anew and deletes the checkpoints.'


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """A complete checkpoint.

    Attributes:
        number: its number; 0 stands for the beginning of a job.
        graph: the operators that the job had, by name, each with its kind and its parallelism.
        rows: the states of those that had one.
        changes: the changes of keyed states by operator and index, the oldest first.
        accounts: the records of each operator up to here, by its name, over all runs.
    """

    number: int
    graph: dict[str, tuple[str, int]]
    rows: tuple[Row, ...]
    changes: dict[tuple[str, int], list[bytes]] = field(default_factory=dict)
    accounts: dict[str, Counts] = field(default_factory=dict)

    @property
    def records(self) -> int:
        """How many records were done."""
        return max(0, sum(row.records for row in self.rows))


@dataclass(frozen=True, slots=True)
class Part:
    """A row without its contents.

    Attributes:
        operator: the name of the operator.
        index: which of the parallel tasks.
        records: how many records are done by it; negative if they wait in it.
        keys: how many keys it has, or None if it keeps nothing by key.
        size_bytes: how many bytes the row takes.
        since: the number of the first checkpoint that is needed for the values of its keys, or None without any.
        has_changes: whether the row has the changes of its keys.
        position: the place of a source, pickled as its whole state is; empty for any other operator.
    """

    operator: str
    index: int
    records: int
    keys: int | None
    size_bytes: int
    since: int | None
    has_changes: bool
    position: bytes


@dataclass(frozen=True, slots=True)
class StoredCheckpoint:
    """What is known about a checkpoint without its contents.

    Attributes:
        made_at: when it was written, as `time.time` gives it.
        graph: the operators that the job had, by name, each with its kind and its parallelism.
        parts: its rows.
        problem: why the job cannot go on from it; empty if it can.
    """

    number: int
    made_at: float
    graph: dict[str, tuple[str, int]]
    parts: tuple[Part, ...]
    problem: str


class CheckpointReader:
    """Reads the checkpoints in a folder, also while a job makes more: it takes no lock, and changes nothing.

    Attributes:
        skipped: the numbers of damaged checkpoints that `load` left out.

    Raises:
        CheckpointError: the folder has none, or its file cannot be read.
    """

    _file: sqlite3.Connection

    def __init__(self, folder: str) -> None:
        self._folder = folder
        self._copy: str | None = None
        self.skipped: list[int] = []
        path = os.path.join(folder, FILE)
        if not os.path.isfile(path):
            error = CheckpointError(f'folder "{folder}" has no checkpoints: {FILE} is not there', fault="user")
            raise hint(error, 'Give the folder of a durable job, such as "state" for durable="state".')
        try:
            self._file = _opened_to_read(path)
            try:
                version = self._version()
            except sqlite3.OperationalError as error:
                if error.sqlite_errorname != "SQLITE_READONLY_ROLLBACK":
                    raise
                self._file.close()
                self._file = _opened_to_read(self._copied(path))
                version = self._version()
            if version not in (None, VERSION):
                raise _other_version(folder, version)
        except (sqlite3.Error, OSError) as error:
            self.close()
            raise self._failed("be read", error) from error
        except BaseException:
            self.close()
            raise

    def _version(self) -> int | None:
        """Return the version of the file, or None if its program has not written anything yet."""
        if not self._file.execute("SELECT 1 FROM sqlite_master WHERE name = 'parts_of'").fetchall():
            return None
        return next((row[0] for row in self._file.execute("SELECT value FROM about WHERE name = 'version'")), None)

    def _copied(self, path: str) -> str:
        """Copy the file of a program that was killed while it wrote, whose unfinished write has to be undone first."""
        self._copy = tempfile.mkdtemp(prefix="sage-state-")
        for name in (FILE, f"{FILE}-journal"):
            with suppress(FileNotFoundError):  # a program that goes on has just undone it
                shutil.copyfile(os.path.join(os.path.dirname(path), name), os.path.join(self._copy, name))
        copy = os.path.join(self._copy, FILE)
        undoing = sqlite3.connect(copy)
        undoing.execute("SELECT 1 FROM sqlite_master").fetchall()
        undoing.close()
        return copy

    def survey(self) -> list[StoredCheckpoint]:
        """Return all checkpoints, the oldest first, after verifying each. Nothing is unpickled.

        Raises:
            CheckpointError: the file is damaged.
        """
        found: list[StoredCheckpoint] = []
        verified: dict[tuple[int, str, int], Part] = {}
        try:
            if self._version() is None:
                return []
            listed = self._file.execute(LISTED).fetchall()
            for number, made_at, graph, accounts, checksum in listed:
                rows = self._all_rows(number)
                operators = _graph(graph)
                parts = tuple(_part(row, operators) for row in rows)
                problem = "" if _checksum(number, graph, accounts, rows) == checksum else "the checksum does not match"
                if not problem:
                    verified.update(((number, part.operator, part.index), part) for part in parts)
                    problem = _missing_changes(number, parts, verified)
                found.append(StoredCheckpoint(number, made_at, operators, parts, problem))
            still_there = set(self._file.execute(LISTED).fetchall())
        except sqlite3.Error as error:
            raise self._failed("be read", error) from error
        # A job that runs deletes old ones.
        return [one for one, about in zip(found, listed, strict=True) if about in still_there]

    def load(self) -> Checkpoint | None:
        """Return the last checkpoint that is whole, or None without any.

        Raises:
            CheckpointError: all of them are damaged, or the file is.
        """
        try:
            if self._version() is None:
                return None
            listed = self._file.execute(LISTED).fetchall()
            for number, _, graph, accounts, _ in reversed(listed):
                changes: dict[tuple[str, int], list[bytes]] = {}
                rows = self._rows(number)
                if rows is not None and self._has_changes(number, rows, changes):
                    return Checkpoint(number, _graph(graph), tuple(rows), changes, _accounts(accounts))
                self.skipped.append(number)
            if self.skipped and listed != self._file.execute(LISTED).fetchall():
                self.skipped.clear()  # those that were left out are not there any more: a job has made others
                return self.load()
        except sqlite3.Error as error:
            raise self._failed("be read", error) from error
        if self.skipped:
            text = f'all checkpoints in "{self._folder}" are damaged: {", ".join(map(str, self.skipped))}'
            raise hint(CheckpointError(text, fault="external"), FRESH_HINT)
        return None

    def _rows(self, number: int) -> list[Row] | None:
        """Return the rows of a checkpoint, or None if it is damaged or not there."""
        query = "SELECT graph, accounts, checksum FROM checkpoints WHERE number = ?"
        about = self._file.execute(query, (number,)).fetchone()
        rows = self._all_rows(number)
        return rows if about is not None and _checksum(number, about[0], about[1], rows) == about[2] else None

    def _all_rows(self, number: int) -> list[Row]:
        """Return the rows of a checkpoint, read one by one: nothing can be written during a query."""
        query = "SELECT rowid, number FROM parts WHERE number = ? ORDER BY rowid"
        places = self._file.execute(query, (number,)).fetchall()
        query = f"SELECT {ROW_COLUMNS} FROM parts WHERE rowid = ? AND number = ?"
        return [Row(*row) for place in places for row in self._file.execute(query, place).fetchall()]

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

    def close(self) -> None:
        """Close the file."""
        if hasattr(self, "_file"):
            self._file.close()
        if self._copy is not None:
            shutil.rmtree(self._copy, ignore_errors=True)

    def _failed(self, done: str, error: sqlite3.Error | OSError) -> CheckpointError:
        text = f'checkpoints in "{self._folder}" cannot {done}: {describe(error)}'
        failed = CheckpointError(text, fault="external")
        is_damaged = isinstance(error, sqlite3.DatabaseError) and not isinstance(error, sqlite3.OperationalError)
        return (
            hint(failed, FRESH_HINT.replace("and", "after you have deleted the folder, and")) if is_damaged else failed
        )


class CheckpointStore(CheckpointReader):
    """The checkpoints of one job in a folder, which no other program can use meanwhile.

    Attributes:
        key: names the job; another one after the checkpoints were deleted.
    """

    def __init__(self, folder: str) -> None:
        self._folder = folder
        self._copy = None
        self._lock = _locked(folder)
        useless_after_fork(self)
        self.skipped: list[int] = []
        try:
            path = os.path.join(folder, FILE)
            # The folder may have been there, and be open to read.
            os.close(os.open(path, os.O_RDWR | os.O_CREAT, 0o600))
            self._file = sqlite3.connect(path, timeout=BUSY_TIMEOUT_S, isolation_level=None, check_same_thread=False)
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
                raise _other_version(self._folder, about["version"])
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
                self._file.execute("DELETE FROM about WHERE name = 'settled'")
                self._file.execute("INSERT OR REPLACE INTO about VALUES ('key', ?)", (self.key,))
        except sqlite3.Error as error:
            raise self._failed("be written", error) from error

    def write(self, made: Checkpoint, keep: int) -> None:
        """Add a checkpoint in one transaction, which also deletes those that are not kept.

        The changes of keyed states are in its rows.

        Raises:
            CheckpointError: it cannot be written, or another program has taken the folder over.
        """
        number, rows = made.number, made.rows
        graph = "".join(f"{kind}\t{parallelism}\t{name}\n" for name, (kind, parallelism) in made.graph.items())
        accounts = json.dumps(made.accounts)
        try:
            with self._file:
                self._file.execute("BEGIN IMMEDIATE")
                self._check_epoch()
                self._file.execute("DELETE FROM about WHERE name = 'settled'")  # this number may come a second time
                # Those after a damaged one that was left out, and those that are too old and not needed by a later one.
                oldest = number - keep + 1
                (needed,) = self._file.execute("SELECT min(since) FROM parts WHERE number = ?", (oldest,)).fetchone()
                first = oldest if needed is None else min(needed, oldest)
                for table in ("parts", "checkpoints"):
                    self._file.execute(f"DELETE FROM {table} WHERE number >= ? OR number < ?", (number, first))
                plain = [(number, *_columns(row)) for row in rows]
                self._file.executemany("INSERT INTO parts VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?)", plain)
                values = (number, time.time(), graph, accounts, _checksum(number, graph, accounts, rows))
                self._file.execute("INSERT INTO checkpoints VALUES (?, ?, ?, ?, ?)", values)
        except sqlite3.Error as error:
            raise self._failed("be written", error) from error

    def settle(self) -> None:
        """Note that the job has ended, and that its sinks have committed all of its checkpoints.

        If that fails, the next run commits the last one again, as after a kill.
        """
        with suppress(sqlite3.Error, CheckpointError), self._file:
            self._file.execute("BEGIN IMMEDIATE")
            self._check_epoch()
            self._file.execute("INSERT OR REPLACE INTO about SELECT 'settled', max(number) FROM checkpoints")

    def is_settled(self, number: int) -> bool:
        """Return whether the sinks are known to have committed this checkpoint."""
        try:
            found = self._file.execute("SELECT value FROM about WHERE name = 'settled'").fetchall()
        except sqlite3.Error as error:
            raise self._failed("be read", error) from error
        return found == [(number,)]

    def drop(self, operator: str) -> None:
        """Take the state of an operator out of the last checkpoint that is whole.

        Raises:
            CheckpointError: it has none there, it cannot be written, or another program has taken the folder over.
        """
        found = self.load()
        rows = () if found is None else found.rows
        left = [row for row in rows if row.operator != operator]
        if found is None or len(left) == len(rows):
            raise no_state(operator, found)
        number = found.number
        try:
            with self._file:
                self._file.execute("BEGIN IMMEDIATE")
                self._check_epoch()
                query = "SELECT graph, accounts FROM checkpoints WHERE number = ?"
                graph, accounts = self._file.execute(query, (number,)).fetchone()
                self._file.execute("DELETE FROM parts WHERE number = ? AND operator = ?", (number, operator))
                values = (_checksum(number, graph, accounts, left), number)
                self._file.execute("UPDATE checkpoints SET checksum = ? WHERE number = ?", values)
        except sqlite3.Error as error:
            raise self._failed("be written", error) from error

    def _check_epoch(self) -> None:
        (epoch,) = self._file.execute("SELECT value FROM about WHERE name = 'epoch'").fetchone()
        if epoch != self._epoch:
            text = f'checkpoints in "{self._folder}" were taken over by another program'
            raise CheckpointError(text, fault="external")

    def close(self) -> None:
        """Leave the folder to the next program."""
        super().close()
        self._let_go()

    def _let_go(self) -> None:
        self._lock.close()

    def _after_fork_in_child(self) -> None:
        self._let_go()


def no_state(operator: str, found: Checkpoint | None) -> CheckpointError:
    """Return the error for an operator without a state in a checkpoint."""
    where = "any checkpoint" if found is None else f"checkpoint {found.number}"
    error = CheckpointError(f'operator "{operator}" has no state in {where}', fault="user")
    names = sorted({row.operator for row in found.rows}) if found is not None else []
    return hint(error, f"These have one: {', '.join(names) or 'none'}.")


def _columns(row: Row) -> tuple[str, int, int, bytes, int | None, bytes | None, int | None, int]:
    return row.operator, row.index, row.records, row.body, row.since, row.changes, row.keys, row.held


def _checksum(number: int, graph: str, accounts: str, rows: Iterable[Row]) -> bytes:
    digest = hashlib.sha256(f"{number}\n{graph}\n{accounts}".encode())
    for row in rows:
        changes = row.changes or b""
        sizes = f"{len(row.body)}\n{row.since}\n{len(changes)}\n{row.keys}\n{row.held}"
        digest.update(f"\n{row.operator}\n{row.index}\n{row.records}\n{sizes}\n".encode())
        digest.update(row.body)
        digest.update(changes)
    return digest.digest()


def _part(row: Row, graph: dict[str, tuple[str, int]]) -> Part:
    size_bytes = len(row.body) + len(row.changes or b"")
    position = row.body if graph.get(row.operator, ("",))[0] == SOURCE else b""
    has_changes = row.changes is not None
    return Part(row.operator, row.index, row.records, row.keys, size_bytes, row.since, has_changes, position)


def _missing_changes(number: int, parts: Iterable[Part], verified: dict[tuple[int, str, int], Part]) -> str:
    """Return which changes of keys a checkpoint needs and cannot have; empty if all are there."""
    for part in parts:
        for earlier in range(number if part.since is None else part.since, number):
            needed = verified.get((earlier, part.operator, part.index))
            if needed is None or not needed.has_changes:
                return f'it needs the keys of "{part.operator}" in checkpoint {earlier}, which is damaged or missing'
    return ""


def _opened_to_read(path: str) -> sqlite3.Connection:
    address = f"{Path(path).absolute().as_uri()}?mode=ro"
    return sqlite3.connect(address, timeout=BUSY_TIMEOUT_S, isolation_level=None, uri=True)


def _other_version(folder: str, version: object) -> CheckpointError:
    error = CheckpointError(
        f'checkpoints in "{folder}" have version {version}; this SAGE reads {VERSION}', fault="external"
    )
    return hint(error, "Use the SAGE that wrote them, or delete the folder to begin anew.")


def _graph(text: str) -> dict[str, tuple[str, int]]:
    lines = (line.split("\t", 2) for line in text.splitlines())
    return {name: (kind, int(parallelism)) for kind, parallelism, name in lines}


def _accounts(text: str) -> dict[str, Counts]:
    return {name: Counts(*numbers) for name, numbers in json.loads(text).items()}


def check_is_private(folder: str) -> None:
    """Raise CheckpointError for a folder into which somebody else may have written, before it is unpickled."""
    status = os.stat(folder)
    if status.st_uid != os.geteuid() or stat.S_IMODE(status.st_mode) & 0o022:
        error = CheckpointError(f'folder "{folder}" can be written by other users', fault="external")
        raise hint(error, f"Checkpoints are pickles, which can run any code: chmod 700 {folder}")


def _locked(folder: str) -> OpenFile:
    """Make the folder if needed, and return the file of its lock, which the system frees if the process dies.

    Raises:
        CheckpointError: it cannot be used, somebody else may write into it, or another program holds it.
    """
    try:
        with suppress(FileExistsError):
            os.makedirs(folder, 0o700)
        check_is_private(folder)
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
