"""Tables of databases: rows as records by a column that rises, and records as rows, committed with their checkpoint."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import Counter
from itertools import groupby
from operator import itemgetter
from typing import TYPE_CHECKING, Any, NamedTuple

from sage._arguments import check_text, names_of
from sage.connector import Source, TransactionalSink
from sage.errors import ConnectorError, GraphError, describe, hint, short

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence
    from contextlib import AbstractContextManager

Row = dict[str, Any]
Values = tuple[object, ...]
Cells = tuple[tuple[str, ...], Values]
"""The columns of a row, and their values."""
Position = tuple[object, list[Values]]
"""The last value of the column, and the rows with this value."""

COMMITS = """CREATE TABLE IF NOT EXISTS sage_commits (
    part TEXT PRIMARY KEY,
    checkpoint INTEGER NOT NULL,
    committed_at TEXT NOT NULL
)"""


def quoted(name: str) -> str:
    """Return a name as SQL has it."""
    doubled = name.replace('"', '""')
    return f'"{doubled}"'


class Found(NamedTuple):
    """The result of a query."""

    columns: list[str]
    rows: list[Values]


class Database(ABC):
    """A database with at most one connection, and its own ways to say things.

    Attributes:
        place: names it in errors, without a secret.
        mark: the character before the number of a value in a command.
        order: the end of an ORDER BY for values that are equal only if Python takes them for equal.
        storable: the classes of values that it stores.
        advice: what to do with other values.
    """

    place: str
    mark: str
    order: str = ""
    storable: tuple[type, ...] = (object,)
    advice: str = ""

    @abstractmethod
    def open(self) -> None:
        """Connect to it.

        Raises:
            ConnectorError: it is not there, or cannot be used.
        """

    @abstractmethod
    def close(self) -> None:
        """Close the connection."""

    @property
    @abstractmethod
    def row_errors(self) -> tuple[type[Exception], ...]:
        """The errors that may be about a single row."""

    @abstractmethod
    def naming(self) -> AbstractContextManager[None]:
        """Let errors name the database."""

    @abstractmethod
    def transaction(self, *, commits: bool = True) -> AbstractContextManager[None]:
        """Keep everything in the block or nothing; with `commits` False nothing."""

    @abstractmethod
    def select(self, command: str, values: Sequence[object] = ()) -> Found:
        """Return what a query finds."""

    @abstractmethod
    def execute(self, command: str, values: Sequence[object] = ()) -> int:
        """Run a command, and return how many rows it changed."""

    @abstractmethod
    def insert(self, command: str, rows: Iterable[Values]) -> None:
        """Insert rows by a command."""

    @abstractmethod
    def tables(self) -> list[str]:
        """Return the names of the tables and views."""

    @abstractmethod
    def columns(self, table: str) -> list[str]:
        """Return the names of the columns that can be written; none if the table is not there."""

    @abstractmethod
    def is_unique(self, table: str, column: str) -> bool:
        """Return whether each value of a column stands in one row only."""

    def quoted(self, table: str) -> str:
        """Return the name of a table as SQL has it."""
        return quoted(table)

    def make(self, command: str) -> None:
        """Make a table, also if another task does so at the same time."""
        with self.transaction():
            self.execute(command)

    def error(self, text: str, note: str) -> ConnectorError:
        """Return an error that names the database."""
        return hint(ConnectorError(f"{self.place}{text}", fault="external"), note)

    def lacks(self, thing: str, there: Iterable[str]) -> ConnectorError:
        """Return the error for a table or column that is not there, with those that are."""
        return self.error(f" has no {thing}", f"There are: {', '.join(map(quoted, there)) or 'none'}.")


class TableSource(Source[Row]):
    """Reads the rows of a table, or of a query, as dicts in the order of a column whose values rise."""

    def __init__(self, database: Database, table: str | None, query: str | None, by: str, example: str) -> None:
        owner = type(self).__name__
        self._database = database
        if (table is None) == (query is None):
            error = GraphError(f"{owner}: it reads one table or one query")
            raise hint(error, 'Give a table, or query="SELECT ...", and not both.')
        given = {"by": by} | ({"table": table} if query is None else {"query": query})
        for name, value in given.items():
            check_text(f"{owner}: {name}", value, f"Give a string: {example}")
        self._table = table
        self._rows = database.quoted(table) if table is not None else f"({str(query).strip().rstrip(';')}\n)"
        self._by = by
        self._is_unique = False
        self._last: object = None
        self._seen: list[Values] = []

    def open(self, position: Position | None = None) -> None:
        """Connect to the database.

        Raises:
            ConnectorError: the database, the table or the column is missing or cannot be read.
        """
        if position is not None:
            self._last, self._seen = position
        database = self._database
        database.open()
        with database.naming():
            if self._table is not None and not database.columns(self._table):
                raise database.lacks(f"table {self._rows}", database.tables())
            names = database.select(f"SELECT * FROM {self._rows} AS found LIMIT 0").columns
            if self._by not in names:
                raise database.lacks(f"column {quoted(self._by)} in {self._rows.strip()}", names)
            self._is_unique = self._table is not None and database.is_unique(self._table, self._by)
            empty = f"SELECT 1 FROM {self._rows} AS found WHERE {quoted(self._by)} IS NULL LIMIT 1"
            if database.select(empty).rows:
                text = f": a row has NULL in the column {quoted(self._by)}, so it has no place"
                raise database.error(text, "Choose another column, or a query that fills it.")

    def read(self, records_max: int) -> list[Row] | None:
        """Return the next rows."""
        by, mark = f"{quoted(self._by)}{self._database.order}", self._database.mark
        # A row that has changed cannot be told from a new one, unless there is only one with its value.
        sign, known = (">", []) if self._is_unique else (">=", self._seen)
        where, values = ("", []) if not self._seen else (f"WHERE {by} {sign} {mark}2", [self._last])
        command = f"SELECT * FROM {self._rows} AS found {where} ORDER BY {by} LIMIT {mark}1"
        with self._database.naming():
            found = self._database.select(command, [records_max + len(known), *values])
        if known and len(known[0]) != len(found.columns):
            text = f": {self._rows.strip()} had {len(known[0])} columns, and has {len(found.columns)} now"
            note = (
                "Rows that were read cannot be told from new ones. Name the columns in query=, or read by a unique one."
            )
            raise self._database.error(text, note)
        # Values such as lists have no hash.
        seen = Counter(map(repr, known))
        rows = []
        for row in found.rows:
            if seen[repr(row)] > 0:
                seen[repr(row)] -= 1
            else:
                rows.append(row)
        rows = rows[:records_max]  # rows with the same value have any order, so known ones may be behind these
        if not rows:
            return None
        place = found.columns.index(self._by)
        last = rows[-1][place]
        if last != last:
            text = f": a row has {last} in the column {quoted(self._by)}, so it has no place"
            raise self._database.error(text, "Choose another column, or a query that leaves such rows out.")
        before = self._seen if self._seen and self._last == last else []
        self._last, self._seen = last, before + [row for row in rows if row[place] == last]
        return [dict(zip(found.columns, row, strict=True)) for row in rows]

    def position(self) -> Position:
        """Return the last value of the column, and the rows with this value."""
        return self._last, self._seen

    def close(self) -> None:
        """Close the connection."""
        self._database.close()


class TableSink(TransactionalSink[Row]):
    """Writes dicts as rows of a table; the rows of a checkpoint appear in one transaction, and exactly once."""

    def __init__(self, database: Database, table: str, key: str | Sequence[str], example: str) -> None:
        owner = type(self).__name__
        self._database = database
        check_text(f"{owner}: table", table, f"Give its name: {example}")
        self._table = table
        advice = 'Give names of columns: key=["user", "day"].'
        self._key = names_of(f"{owner}: a column of key", key, advice)
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
        database.open()
        with database.naming():
            self._columns = dict.fromkeys(database.columns(self._table))
            if not self._columns:
                raise database.lacks(f"table {database.quoted(self._table)}", database.tables())
            for column in self._key:
                if column not in self._columns:
                    raise database.lacks(f"column {quoted(column)} in {database.quoted(self._table)}", self._columns)
            self._check_key()
            if self.durable:
                if not database.columns("sage_commits"):
                    database.make(COMMITS)
                found = f"SELECT checkpoint FROM sage_commits WHERE part = {database.mark}1"
                for (committed,) in database.select(found, [part]).rows:
                    if isinstance(committed, int) and committed > checkpoint:
                        self._take_back(committed, checkpoint)

    def _check_key(self) -> None:
        database = self._database
        columns = tuple(self._columns)
        with database.transaction(commits=False):
            database.select(f"EXPLAIN {self._insert(columns)}", [None] * len(columns))
            try:
                database.select(f"EXPLAIN {self._insert(columns)}{self._replacing(columns)}", [None] * len(columns))
            except database.row_errors as error:
                names = ", ".join(map(quoted, self._key))
                table = database.quoted(self._table)
                note = f"CREATE UNIQUE INDEX name ON {table} ({names}) makes it one."
                raise database.error(f": {names} is not a key of {table}: {describe(error)}", note) from error

    def _take_back(self, committed: int, checkpoint: int) -> None:
        """Let rows with a key be written once more; others would come twice."""
        if self._key:
            mark = self._database.mark
            command = f"UPDATE sage_commits SET checkpoint = {mark}1 WHERE part = {mark}2"
            self._database.execute(command, [checkpoint, self._part])
            return
        text = (
            f": {self._database.quoted(self._table)} has rows of checkpoint {committed}, and the job "
            f"goes on from checkpoint {checkpoint}, so that rows would come twice"
        )
        note = (
            "A damaged checkpoint was left out. Delete the rows that came after the one before it, and then the row "
            f"of the part '{self._part}' in sage_commits. With key=, rows that come again replace themselves."
        )
        raise self._database.error(text, note)

    def write(self, batch: Sequence[Row]) -> None:
        """Keep the rows for the transaction.

        Raises:
            ConnectorError: a record is not a dict, has a key that is not a column, or a value that is not stored.
        """
        self._written += map(self._cells, batch)

    def _cells(self, record: object) -> Cells:
        table = f"table {self._database.quoted(self._table)}"
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
            raise hint(error, f"Its columns are: {', '.join(map(quoted, self._columns))}.")
        for column, value in record.items():
            if not isinstance(value, self._database.storable):
                error = ConnectorError(f"record {short(record)} has a {type(value).__name__} in {column!r}")
                raise hint(error, self._database.advice)
        return tuple(record), tuple(record.values())

    def prepare(self, number: int) -> tuple[int, list[Cells]] | None:
        """Return the rows, after they were tried."""
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
        database = self._database
        with database.naming():
            try:
                with database.transaction(commits=number is not None):
                    if number is None or not self.durable or self._claim(number):
                        self._put(rows)
            except database.row_errors:
                with database.transaction(commits=False):
                    for row in rows:
                        self._try(row, note)
                raise

    def _claim(self, number: int) -> bool:
        """Note the checkpoint, and return whether the database did not have it.

        One command does both: after a kill, the database may still be at work on the commit of the program that is
        gone, and then the command waits for it.
        """
        one, two = f"{self._database.mark}1", f"{self._database.mark}2"
        command = (
            f"INSERT INTO sage_commits VALUES ({one}, {two}, CURRENT_TIMESTAMP) ON CONFLICT (part) DO UPDATE SET "
            "checkpoint = excluded.checkpoint, committed_at = excluded.committed_at "
            "WHERE sage_commits.checkpoint < excluded.checkpoint"
        )
        return self._database.execute(command, [self._part, number]) > 0

    def _try(self, row: Cells, note: str) -> None:
        try:
            self._put([row])
        except self._database.row_errors as error:
            record = short(dict(zip(*row, strict=True)))
            table = self._database.quoted(self._table)
            text = f"{self._database.place}: record {record} cannot be written into table {table}: {describe(error)}"
            raise hint(ConnectorError(text), note) from error

    def _put(self, rows: list[Cells]) -> None:
        for columns, alike in groupby(rows, itemgetter(0)):
            command = f"{self._insert(columns)}{self._replacing(columns)}"
            self._database.insert(command, map(itemgetter(1), alike))

    def _insert(self, columns: tuple[str, ...]) -> str:
        names = ", ".join(map(quoted, columns))
        marks = ", ".join(f"{self._database.mark}{place}" for place in range(1, len(columns) + 1))
        return f"INSERT INTO {self._database.quoted(self._table)} ({names}) VALUES ({marks})"

    def _replacing(self, columns: tuple[str, ...]) -> str:
        """Return the end of the command by which a row takes the place of the one with its key."""
        if not self._key:
            return ""
        news = ", ".join(f"{quoted(name)} = excluded.{quoted(name)}" for name in columns if name not in self._key)
        action = f"UPDATE SET {news}" if news else "NOTHING"
        return f" ON CONFLICT ({', '.join(map(quoted, self._key))}) DO {action}"

    def abort(self) -> None:
        """Forget the rows that were not prepared."""
        self._written = []

    def close(self) -> None:
        """Close the connection."""
        self._database.close()
