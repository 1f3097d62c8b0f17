"""SQLite: rows of a table as records, and records as rows that are committed together with their checkpoint."""

from __future__ import annotations

import os
import sqlite3
from collections import Counter
from collections.abc import Iterable
from contextlib import contextmanager
from itertools import groupby
from operator import itemgetter
from typing import TYPE_CHECKING, Any
from urllib.parse import quote

from sage._arguments import check_seconds, check_text, path_of
from sage.connector import Source, TransactionalSink
from sage.errors import ConnectorError, GraphError, describe, hint, short

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

Row = dict[str, Any]
Cells = tuple[tuple[str, ...], tuple[Any, ...]]
"""The columns of a row, and their values."""

STORABLE = (str, int, float, bytes, type(None))

HINTS = {
    sqlite3.SQLITE_BUSY: "End the other program's transaction, or wait longer for it with wait_s=.",
    sqlite3.SQLITE_CANTOPEN: "This user must be allowed to read and write it, and its folder.",
    sqlite3.SQLITE_READONLY: "This user must be allowed to write it, and its folder.",
    sqlite3.SQLITE_NOTADB: "Name another file.",
    sqlite3.SQLITE_CORRUPT: "Restore it from a backup; the command `sqlite3 FILE .recover` may help.",
    sqlite3.SQLITE_FULL: "Make room on the disk.",
}

COMMITS = """CREATE TABLE IF NOT EXISTS sage_commits (
    part TEXT PRIMARY KEY,
    checkpoint INTEGER NOT NULL,
    committed_at TEXT NOT NULL
)"""
IS_UNIQUE = """
SELECT 1 FROM pragma_table_info(:table) WHERE pk GROUP BY pk > 0 HAVING count(*) = 1 AND name = :column
UNION ALL
SELECT 1 FROM pragma_index_list(:table) AS found, pragma_index_info(found.name) AS part
WHERE "unique" AND NOT partial GROUP BY found.name HAVING count(*) = 1 AND part.name = :column"""
COMMITTED = "SELECT checkpoint FROM sage_commits WHERE part = ?"
COMMIT = "INSERT OR REPLACE INTO sage_commits VALUES (?, ?, datetime('now'))"


def _quoted(name: str) -> str:
    doubled = name.replace('"', '""')
    return f'"{doubled}"'


class _Database:
    """A database file, which is there already, and one connection to it."""

    def __init__(self, owner: str, path: str | os.PathLike[str], wait_s: float) -> None:
        self.path = path_of(f"{owner}: path", path, f'Name a file: {owner}("orders.db", ...).')
        check_seconds(f"{owner}: wait_s is", wait_s)
        self._wait_s = wait_s

    def open(self) -> sqlite3.Connection:
        """Connect to it.

        Raises:
            ConnectorError: it is not there, or cannot be used.
        """
        if not os.path.isfile(self.path):
            error = ConnectorError(f'no database "{self.path}"', fault="external")
            raise hint(error, f"Make it with its tables first. The program runs in {os.getcwd()}.")
        with self.naming():
            # For writing even to read, as a transaction that a kill has left has to be undone first. SQLite opens a
            # file that this user may not write for reading only.
            address = f"file:{quote(os.path.abspath(self.path))}?mode=rw"
            return sqlite3.connect(address, timeout=self._wait_s, isolation_level=None, uri=True)

    @contextmanager
    def naming(self) -> Iterator[None]:
        """Let errors name the database."""
        try:
            yield
        except sqlite3.Error as error:
            failed = ConnectorError(f'database "{self.path}": {error}', fault="external")
            note = HINTS.get(getattr(error, "sqlite_errorcode", 0) & 0xFF)
            raise hint(failed, note) if note else failed from error

    def lacks(self, thing: str, there: Iterable[str]) -> ConnectorError:
        """Return the error for a table or column that is not there, with those that are."""
        names = ", ".join(map(_quoted, there)) or "none"
        return hint(ConnectorError(f'database "{self.path}" has no {thing}', fault="external"), f"There are: {names}.")

    def tables(self, connection: sqlite3.Connection) -> list[str]:
        """Return the names of the tables and views."""
        names = "SELECT name FROM sqlite_master WHERE type IN ('table', 'view') ORDER BY name"
        return [name for (name,) in connection.execute(names)]


class SqliteTable(Source[Row]):
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
        self._database = _Database("SqliteTable", path, wait_s)
        if (table is None) == (query is None):
            error = GraphError("SqliteTable: it reads one table or one query")
            raise hint(error, 'Give a table, or query="SELECT ...", and not both.')
        given = {"by": by} | ({"table": table} if query is None else {"query": query})
        for name, value in given.items():
            check_text(f"SqliteTable: {name}", value, 'Give a string: SqliteTable("orders.db", "orders", by="id").')
        self._table = table
        self._rows = _quoted(table) if table is not None else f"({str(query).strip().rstrip(';')}\n)"
        self._by = by
        self._connection: sqlite3.Connection | None = None
        self._names: list[str] = []
        self._place = 0
        self._is_unique = False
        self._last: Any = None
        self._seen: list[tuple[Any, ...]] = []

    def open(self, position: tuple[Any, list[tuple[Any, ...]]] | None = None) -> None:
        """Connect to the database.

        Raises:
            ConnectorError: the database, the table or the column is missing or cannot be read.
        """
        if position is not None:
            self._last, self._seen = position
        database = self._database
        connection = self._connection = database.open()
        with database.naming():
            tables = database.tables(connection)
            if self._table is not None and self._table not in tables:
                raise database.lacks(f"table {_quoted(self._table)}", tables)
            found = connection.execute(f"SELECT * FROM {self._rows} LIMIT 0")
            names = self._names = [column[0] for column in found.description]
            if self._by not in names:
                raise database.lacks(f"column {_quoted(self._by)} in {self._rows.strip()}", names)
            self._place = names.index(self._by)
            place = {"table": self._table, "column": self._by}
            self._is_unique = connection.execute(IS_UNIQUE, place).fetchone() is not None
            empty = connection.execute(f"SELECT 1 FROM {self._rows} WHERE {_quoted(self._by)} IS NULL LIMIT 1")
            if empty.fetchone() is not None:
                text = (
                    f'database "{database.path}": a row has NULL in the column {_quoted(self._by)}, so it has no place'
                )
                raise hint(ConnectorError(text, fault="external"), "Choose another column, or a query that fills it.")

    def read(self, records_max: int) -> list[Row] | None:
        """Return the next rows."""
        assert self._connection is not None
        by = f"{_quoted(self._by)} COLLATE BINARY"  # values that are equal here must be equal in Python, too
        # A row that has changed cannot be told from a new one, unless there is only one with its value.
        sign, known = (">", []) if self._is_unique else (">=", self._seen)
        where, values = ("", []) if not self._seen else (f"WHERE {by} {sign} ?", [self._last])
        command = f"SELECT * FROM {self._rows} {where} ORDER BY {by} LIMIT ?"
        with self._database.naming():
            found = self._connection.execute(command, [*values, records_max + len(known)]).fetchall()
        seen = Counter(known)
        rows = []
        for row in found:
            if seen[row] > 0:
                seen[row] -= 1
            else:
                rows.append(row)
        if not rows:
            return None
        last = rows[-1][self._place]
        before = self._seen if self._seen and self._last == last else []
        self._last, self._seen = last, before + [row for row in rows if row[self._place] == last]
        return [dict(zip(self._names, row, strict=True)) for row in rows]

    def position(self) -> tuple[Any, list[tuple[Any, ...]]]:
        """Return the last value of the column, and the rows with this value."""
        return self._last, self._seen

    def close(self) -> None:
        """Close the connection."""
        if self._connection is not None:
            self._connection.close()
            self._connection = None


class SqliteSink(TransactionalSink[Row]):
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
        self._database = _Database("SqliteSink", path, wait_s)
        self._table = table
        check_text("SqliteSink: table", table, 'Give its name: SqliteSink("orders.db", "orders").')
        given: Any = key
        is_one = isinstance(given, str) or not isinstance(given, Iterable)
        self._key: tuple[str, ...] = (given,) if is_one else tuple(given)
        for column in self._key:
            check_text("SqliteSink: a column of key", column, 'Give names of columns: key=["user", "day"].')
        self._connection: sqlite3.Connection | None = None
        self._columns: dict[str, None] = {}
        self._part = ""
        self._written: list[Cells] = []

    def open(self, part: str, checkpoint: int) -> None:
        """Connect to the database, and look which checkpoint of this part it has.

        Raises:
            ConnectorError: the database, the table or the key is missing, the database cannot be written, or it has
                rows of a later checkpoint, which cannot be told from others without a key.
        """
        self._part = part
        database = self._database
        connection = self._connection = database.open()
        with database.naming():
            connection.execute("PRAGMA synchronous = FULL")
            found = connection.execute("SELECT name FROM pragma_table_info(?)", [self._table])
            self._columns = {name: None for (name,) in found}
            if not self._columns:
                raise database.lacks(f"table {_quoted(self._table)}", database.tables(connection))
            for column in self._key:
                if column not in self._columns:
                    raise database.lacks(f"column {_quoted(column)} in {_quoted(self._table)}", self._columns)
            self._check_key(connection)
            with _transaction(connection):
                connection.execute(COMMITS)
                (committed,) = connection.execute(COMMITTED, [part]).fetchone() or (0,)
                if committed > checkpoint:
                    self._take_back(connection, committed, checkpoint)

    def _check_key(self, connection: sqlite3.Connection) -> None:
        try:
            connection.execute(f"EXPLAIN {self._insert(tuple(self._columns))}", [None] * len(self._columns))
        except sqlite3.OperationalError as error:
            if not self._key:
                raise
            names = ", ".join(map(_quoted, self._key))
            text = f'database "{self._database.path}": {names} is not a key of {_quoted(self._table)}: {error}'
            note = f"CREATE UNIQUE INDEX name ON {_quoted(self._table)} ({names}) makes it one."
            raise hint(ConnectorError(text, fault="external"), note) from error

    def _take_back(self, connection: sqlite3.Connection, committed: int, checkpoint: int) -> None:
        """Let rows with a key be written once more; others would come twice."""
        if self._key:
            connection.execute(COMMIT, [self._part, checkpoint])
            return
        text = (
            f'database "{self._database.path}": {_quoted(self._table)} has rows of checkpoint {committed}, and the job '
            f"goes on from checkpoint {checkpoint}, so that rows would come twice"
        )
        note = (
            "A damaged checkpoint was left out. Delete the rows that came after the one before it, and then the row "
            f"of the part '{self._part}' in sage_commits. With key=, rows that come again replace themselves."
        )
        raise hint(ConnectorError(text, fault="external"), note)

    def write(self, batch: Sequence[Row]) -> None:
        """Keep the rows for the transaction.

        Raises:
            ConnectorError: a record is not a dict, has a key that is not a column, or a value that is not stored.
        """
        self._written += map(self._cells, batch)

    def _cells(self, record: object) -> Cells:
        table = f"table {_quoted(self._table)}"
        if not isinstance(record, dict) or not record:
            error = ConnectorError(f"record {short(record)} is not a row of {table}")
            raise hint(error, "Map it to a dict with a value for each column before the sink.")
        unknown = [column for column in record if column not in self._columns]
        missing = [column for column in self._key if column not in record]
        if unknown or missing:
            text = (
                f"has {short(unknown[0])}, which is not a column of" if unknown else f"lacks {missing[0]!r}, a key of"
            )
            error = ConnectorError(f"record {short(record)} {text} {table}")
            raise hint(error, f"Its columns are: {', '.join(map(_quoted, self._columns))}.")
        for column, value in record.items():
            if not isinstance(value, STORABLE):
                error = ConnectorError(f"record {short(record)} has a {type(value).__name__} in {column!r}")
                raise hint(
                    error, "SQLite stores strings, numbers, bytes and None; json.dumps makes a string of others."
                )
        return tuple(record), tuple(record.values())

    def prepare(self, number: int) -> tuple[int, list[Cells]] | None:
        """Return the rows, after they were tried."""
        assert self._connection is not None
        rows, self._written = self._written, []
        if not rows:
            return None
        self._put_all(rows, None, "Nothing of its checkpoint was written. Correct it before the sink.")
        return number, rows

    def commit(self, token: tuple[int, list[Cells]]) -> None:
        """Insert the rows, unless the database has this checkpoint."""
        number, rows = token
        note = "The next run tries again. If a row of another task or program excludes it, remove that row before."
        self._put_all(rows, number, note)

    def _put_all(self, rows: list[Cells], number: int | None, note: str) -> None:
        """Insert the rows of a checkpoint, unless the database has it; without a number, only try."""
        assert self._connection is not None
        connection = self._connection
        with self._database.naming(), _transaction(connection, commits=number is not None):
            if number is not None:
                (committed,) = connection.execute(COMMITTED, [self._part]).fetchone() or (0,)
                if committed >= number:
                    return
                connection.execute(COMMIT, [self._part, number])
            try:
                self._put(rows)
            except (sqlite3.Error, UnicodeError, OverflowError):
                if connection.in_transaction:
                    connection.execute("ROLLBACK")
                with _transaction(connection, commits=False):
                    for row in rows:
                        self._try(row, note)
                raise

    def _try(self, row: Cells, note: str) -> None:
        try:
            self._put([row])
        except (sqlite3.Error, UnicodeError, OverflowError) as error:
            record = short(dict(zip(*row, strict=True)))
            text = f"record {record} cannot be written into table {_quoted(self._table)}: {describe(error)}"
            raise hint(ConnectorError(f'database "{self._database.path}": {text}'), note) from error

    def _put(self, rows: list[Cells]) -> None:
        assert self._connection is not None
        for columns, alike in groupby(rows, itemgetter(0)):
            self._connection.executemany(self._insert(columns), map(itemgetter(1), alike))

    def _insert(self, columns: tuple[str, ...]) -> str:
        names = ", ".join(map(_quoted, columns))
        command = f"INSERT INTO {_quoted(self._table)} ({names}) VALUES ({', '.join('?' * len(columns))})"
        if not self._key:
            return command
        news = ", ".join(f"{_quoted(name)} = excluded.{_quoted(name)}" for name in columns if name not in self._key)
        action = f"UPDATE SET {news}" if news else "NOTHING"
        return f"{command} ON CONFLICT ({', '.join(map(_quoted, self._key))}) DO {action}"

    def abort(self) -> None:
        """Forget the rows that were not prepared."""
        self._written = []

    def close(self) -> None:
        """Close the connection."""
        if self._connection is not None:
            self._connection.close()
            self._connection = None


@contextmanager
def _transaction(connection: sqlite3.Connection, *, commits: bool = True) -> Iterator[None]:
    """Hold the lock for writing, and undo everything after an error, or if nothing is to stay."""
    connection.execute("BEGIN IMMEDIATE")
    try:
        yield
        if commits:
            connection.execute("COMMIT")
    finally:
        if connection.in_transaction:
            connection.execute("ROLLBACK")
