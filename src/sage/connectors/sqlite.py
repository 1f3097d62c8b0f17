"""SQLite: rows of a table as records, and records as rows that are committed together with their checkpoint."""

from __future__ import annotations

import os
import sqlite3
from contextlib import contextmanager
from typing import TYPE_CHECKING
from urllib.parse import quote

from sage._arguments import check_seconds, path_of
from sage.connectors.tables import Database, Found, TableSink, TableSource, Values
from sage.errors import ConnectorError, hint

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence

HINTS = {
    sqlite3.SQLITE_BUSY: "End the other program's transaction, or wait longer for it with wait_s=.",
    sqlite3.SQLITE_CANTOPEN: "This user must be allowed to read and write it, and its folder.",
    sqlite3.SQLITE_READONLY: "This user must be allowed to write it, and its folder.",
    sqlite3.SQLITE_NOTADB: "Name another file.",
    sqlite3.SQLITE_CORRUPT: "Restore it from a backup; the command `sqlite3 FILE .recover` may help.",
    sqlite3.SQLITE_FULL: "Make room on the disk.",
}

IS_UNIQUE = """
SELECT 1 FROM pragma_table_info(?1) WHERE pk GROUP BY pk > 0 HAVING count(*) = 1 AND name = ?2
UNION ALL
SELECT 1 FROM pragma_index_list(?1) AS found, pragma_index_info(found.name) AS part
WHERE "unique" AND NOT partial GROUP BY found.name HAVING count(*) = 1 AND part.name = ?2"""


class _SqliteDatabase(Database):
    """A database file, which is there already."""

    mark = "?"
    order = " COLLATE BINARY"  # values that are equal here must be equal in Python, too
    storable = (str, int, float, bytes, type(None))
    advice = "SQLite stores strings, numbers, bytes and None; json.dumps makes a string of others."
    row_errors = (sqlite3.Error, UnicodeError, OverflowError)

    def __init__(self, owner: str, path: str | os.PathLike[str], wait_s: float) -> None:
        self._path = path_of(f"{owner}: path", path, f'Name a file: {owner}("orders.db", ...).')
        self.place = f'database "{self._path}"'
        check_seconds(f"{owner}: wait_s is", wait_s)
        self._wait_s = wait_s
        self._connection: sqlite3.Connection | None = None

    def open(self) -> None:
        """Connect to it."""
        if not os.path.isfile(self._path):
            error = ConnectorError(f"no {self.place}", fault="external")
            raise hint(error, f"Make it with its tables first. The program runs in {os.getcwd()}.")
        with self.naming():
            # For writing even to read, as a transaction that a kill has left has to be undone first. SQLite opens a
            # file that this user may not write for reading only.
            address = f"file:{quote(os.path.abspath(self._path))}?mode=rw"
            self._connection = sqlite3.connect(address, timeout=self._wait_s, isolation_level=None, uri=True)
            self._connection.execute("PRAGMA synchronous = FULL")

    @property
    def _connected(self) -> sqlite3.Connection:
        assert self._connection is not None
        return self._connection

    def close(self) -> None:
        """Close the connection."""
        if self._connection is not None:
            self._connection.close()
            self._connection = None

    @contextmanager
    def naming(self) -> Iterator[None]:
        """Let errors name the database."""
        try:
            yield
        except sqlite3.Error as error:
            failed = ConnectorError(f"{self.place}: {error}", fault="external")
            note = HINTS.get(getattr(error, "sqlite_errorcode", 0) & 0xFF)
            raise hint(failed, note) if note else failed from error

    @contextmanager
    def transaction(self, *, commits: bool = True) -> Iterator[None]:
        """Hold the lock for writing, and undo everything after an error, or if nothing is to stay."""
        connection = self._connected
        connection.execute("BEGIN IMMEDIATE")
        try:
            yield
            if commits:
                connection.execute("COMMIT")
        finally:
            if connection.in_transaction:
                connection.execute("ROLLBACK")

    def select(self, command: str, values: Sequence[object] = ()) -> Found:
        """Return what a query finds. No transaction stays open, so that others can write."""
        found = self._connected.execute(command, tuple(values))
        return Found([column[0] for column in found.description], found.fetchall())

    def execute(self, command: str, values: Sequence[object] = ()) -> int:
        """Run a command."""
        return self._connected.execute(command, tuple(values)).rowcount

    def insert(self, command: str, rows: Iterable[Values]) -> None:
        """Insert rows."""
        self._connected.executemany(command, rows)

    def tables(self) -> list[str]:
        """Return the names of the tables and views."""
        names = "SELECT name FROM sqlite_master WHERE type IN ('table', 'view') ORDER BY name"
        return [str(name) for (name,) in self.select(names).rows]

    def columns(self, table: str) -> list[str]:
        """Return the names of the columns."""
        return [str(name) for (name,) in self.select("SELECT name FROM pragma_table_info(?1)", [table]).rows]

    def is_unique(self, table: str, column: str) -> bool:
        """Return whether each value of a column stands in one row only."""
        return bool(self.select(IS_UNIQUE, [table, column]).rows)


class SqliteTable(TableSource):
    """Reads the rows of a table, or of a query, as dicts in the order of a column whose values rise.

    It ends after the last row. Its position is the last value of the column and the rows with this value, so that a
    durable job that runs again reads only rows that are new, also if they have the same value. A row that comes later
    with a smaller value is not read, nor one that changes, if the column of the table is unique. No transaction stays
    open between two reads, so that others can write.

    Args:
        path: the database.
        table: a table or a view.
        query: a SELECT in its place.
        by: the column, such as an id or a time; an index makes reading it fast. Many rows with one value cost time and
            memory.
        wait_s: how long a read waits for another program that keeps the database locked, in seconds.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        table: str | None = None,
        *,
        query: str | None = None,
        by: str,
        wait_s: float = 5.0,
    ) -> None:
        database = _SqliteDatabase("SqliteTable", path, wait_s)
        super().__init__(database, table, query, by, 'SqliteTable("orders.db", "orders", by="id").')


class SqliteSink(TableSink):
    """Writes dicts as rows of a table; the rows of a checkpoint appear in one transaction, and exactly once.

    The same transaction writes the number of the checkpoint into the table `sage_commits`, so that the database itself
    says which rows it has. The rows of a checkpoint are kept in memory and in the checkpoint until then. They are tried
    before the checkpoint is complete, so that a row that breaks a rule of the table fails the job and is in none.

    Args:
        path: the database.
        table: the table; it must be there, and have a column for each key of the dicts.
        key: one or more columns with a unique index; a row takes the place of the row with the same values in them.
        wait_s: how long it waits for another program that keeps the database locked, in seconds.
    """

    def __init__(
        self, path: str | os.PathLike[str], table: str, *, key: str | Sequence[str] = (), wait_s: float = 5.0
    ) -> None:
        database = _SqliteDatabase("SqliteSink", path, wait_s)
        super().__init__(database, table, key, 'SqliteSink("orders.db", "orders").')
