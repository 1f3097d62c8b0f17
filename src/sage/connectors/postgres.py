"""PostgreSQL: rows of a table as records, and records as rows that are committed together with their checkpoint."""

from __future__ import annotations

import os
from contextlib import contextmanager
from itertools import groupby
from operator import itemgetter
from typing import TYPE_CHECKING

from sage._arguments import check_seconds, check_text
from sage._extras import load
from sage.connectors.tables import Cells, Database, Found, TableSink, TableSource, Values, quoted
from sage.errors import ConnectorError, GraphError, hint

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence

    import psycopg

URL = ("postgresql://", "postgres://")
EXAMPLE = "postgresql://ann@localhost:5432/shop"

HINTS = {
    "28000": "The server's pg_hba.conf must let this user in.",
    "3D000": "Make it with its tables first.",
    "42P01": "A name without a schema is looked for in those of search_path.",
    "42501": "Let an owner GRANT it to the user of the address.",
    "57014": "Another program may hold a lock, or the column of by= needs an index. Or wait longer with timeout_s=.",
}
REACH = (
    "Is the server running, and are address, user and password right? Without a password in the address, that of "
    "PGPASSWORD or of the file ~/.pgpass is taken."
)

TABLES = """
SELECT CASE WHEN table_schema = current_schema() THEN '' ELSE table_schema || '.' END || table_name
FROM information_schema.tables WHERE table_schema NOT IN ('pg_catalog', 'information_schema') ORDER BY 1"""
COLUMNS = """
SELECT attname::text FROM pg_attribute
WHERE attrelid = to_regclass($1) AND attnum > 0 AND NOT attisdropped AND attgenerated = '' AND attidentity <> 'a'
ORDER BY attnum"""
IS_UNIQUE = """
SELECT 1 FROM pg_index JOIN pg_attribute ON attrelid = indrelid AND attnum = indkey[0]
WHERE indrelid = to_regclass($1) AND attname = $2
AND indisunique AND indisvalid AND indpred IS NULL AND indnkeyatts = 1"""
CAN_COPY = """
SELECT relkind IN ('r', 'p', 'f') AND NOT row_security_active(oid) FROM pg_class WHERE oid = to_regclass($1)"""
ONE_BY_ONE = 7_243_001
"""The number of a lock for tasks that make the same table; any would do."""


class _PostgresDatabase(Database):
    """A database of a server. After a connection has broken, the next command makes another."""

    mark = "$"

    def __init__(self, owner: str, address: str, timeout_s: float) -> None:
        advice = f'Name a database: {owner}("{EXAMPLE}", ...).'
        check_text(f"{owner}: address", address, advice)
        check_seconds(f"{owner}: timeout_s is", timeout_s, may_be_zero=False)
        conninfo = load("psycopg.conninfo", "postgres")
        given: dict[str, object] | None = None
        _, is_url, rest = address.partition("://")
        first, _, path = rest.partition("/")
        # The library would take what comes before a slash or an @ of a password for a part of the server's name.
        if not is_url or (address.startswith(URL) and first.count("@") < 2 and "@" not in path):
            try:
                given = conninfo.conninfo_to_dict(address)
            except load("psycopg", "postgres").Error:
                given = None
        if given is None:
            # The library's error stays behind, because it may show a part of the password.
            wrong = GraphError(f"{owner}: the address cannot be read")
            raise hint(wrong, f"{advice} In a password, / @ : % are written as %2F %40 %3A %25.")
        self._address = address
        self._timeout_s = timeout_s
        self._password = str(given.get("password") or "")
        name = given.get("dbname") or given.get("service") or os.environ.get("PGDATABASE", "of the environment")
        host = given.get("host") or given.get("hostaddr")
        port = f":{given['port']}" if "port" in given else ""
        self.place = f'database "{name}"' + (f' at "{host}{port}"' if host else "")
        self._connection: psycopg.Connection[Values] | None = None

    def open(self) -> None:
        """Connect to it."""
        with self.naming():
            self._connected()

    def _connected(self) -> psycopg.Connection[Values]:
        if self._connection is None or self._connection.closed:
            driver = load("psycopg", "postgres")
            milliseconds = max(1, round(self._timeout_s * 1_000))
            connection: psycopg.Connection[Values] = driver.connect(
                self._address,
                autocommit=True,
                client_encoding="UTF8",  # commands have it, whatever the encoding of the database
                cursor_factory=driver.RawCursor,  # values are $1, so that a % in a query is only a %
                connect_timeout=max(2, round(self._timeout_s)),
                tcp_user_timeout=milliseconds,
                fallback_application_name="sage",
            )
            self._connection = connection
            connection.execute("SELECT set_config('statement_timeout', $1, false)", [str(milliseconds)])
            connection.adapters.register_dumper(dict, load("psycopg.types.json", "postgres").JsonbDumper)
            # As text without a type, so that 0.1 of a column of four bytes is found again.
            connection.adapters.register_dumper(float, _float_dumper())
        return self._connection

    def close(self) -> None:
        """Close the connection."""
        if self._connection is not None:
            self._connection.close()
            self._connection = None

    @property
    def row_errors(self) -> tuple[type[Exception], ...]:
        """All that the server and the driver say, but what is about the connection or a lock."""
        driver = load("psycopg", "postgres")
        raised = load("psycopg.errors", "postgres").RaiseException
        names = ("DataError", "IntegrityError", "InternalError", "NotSupportedError", "ProgrammingError")
        return (raised, UnicodeError, OverflowError, *(getattr(driver, name) for name in names))

    @contextmanager
    def naming(self) -> Iterator[None]:
        """Let errors name the database."""
        try:
            yield
        except load("psycopg", "postgres").Error as error:
            text = " ".join(str(error).split())
            code = error.sqlstate
            note = HINTS.get(code or "", REACH if code is None or code.startswith(("08", "28", "57P")) else "")
            is_secret = bool(self._password) and self._password in text
            shown = text.replace(self._password, "***") if is_secret else text
            failed = ConnectorError(f"{self.place}: {shown}", fault="external")
            raise hint(failed, note) if note else failed from None if is_secret else error

    @contextmanager
    def transaction(self, *, commits: bool = True) -> Iterator[None]:
        """Undo everything after an error, or if nothing is to stay."""
        with self._connected().transaction(force_rollback=not commits):
            yield
            if not commits:
                self.execute("SET CONSTRAINTS ALL IMMEDIATE")  # the server would look at some with the commit only

    def select(self, command: str, values: Sequence[object] = ()) -> Found:
        """Return what a query finds."""
        found = self._connected().execute(command.encode(), values)
        return Found([column.name for column in found.description or ()], found.fetchall())

    def execute(self, command: str, values: Sequence[object] = ()) -> int:
        """Run a command."""
        count: int = self._connected().execute(command.encode(), values).rowcount
        return count

    def insert(self, command: str, rows: Iterable[Values]) -> None:
        """Insert rows."""
        with self._connected().cursor() as cursor:
            cursor.executemany(command.encode(), rows)

    def can_copy(self, table: str) -> bool:
        """Return whether COPY may write the table; most views, and rules for rows, exclude it."""
        return self.select(CAN_COPY, [self.quoted(table)]).rows == [(True,)]

    def copy(self, table: str, columns: tuple[str, ...], rows: Iterable[Values]) -> None:
        """Insert rows by COPY, which is several times faster."""
        command = f"COPY {self.quoted(table)} ({', '.join(map(quoted, columns))}) FROM STDIN"
        with self._connected().cursor() as cursor, cursor.copy(command.encode()) as copy:
            for row in rows:
                copy.write_row(row)

    def tables(self) -> list[str]:
        """Return the names of the tables and views, with the schema if it is not the first one."""
        return [str(name) for (name,) in self.select(TABLES).rows]

    def columns(self, table: str) -> list[str]:
        """Return the names of the columns that can be written."""
        return [str(name) for (name,) in self.select(COLUMNS, [self.quoted(table)]).rows]

    def is_unique(self, table: str, column: str) -> bool:
        """Return whether each value of a column stands in one row only."""
        return bool(self.select(IS_UNIQUE, [self.quoted(table), column]).rows)

    def quoted(self, table: str) -> str:
        """Return the name of a table, which may have its schema before a dot."""
        return ".".join(map(quoted, table.split(".")))

    def make(self, command: str) -> None:
        """Make a table; two at once would be an error also with IF NOT EXISTS."""
        with self.transaction():
            self.execute("SELECT pg_advisory_xact_lock($1)", [ONE_BY_ONE])
            self.execute(command)


def _float_dumper() -> type:
    dumper: type = load("psycopg.types.numeric", "postgres").FloatDumper
    return type("UntypedFloatDumper", (dumper,), {"oid": 0})


class PostgresTable(TableSource):
    """Reads the rows of a table, or of a query, as dicts in the order of a column whose values rise.

    It ends after the last row, and goes on as `SqliteTable` does. A row appears with the commit of its transaction, so
    one with a smaller value may come later, and is not read. If several programs write at once, leave rows out that are
    too young: `query="SELECT * FROM orders WHERE at < now() - interval '1 minute'"`.

    Args:
        address: the database, such as "postgresql://ann@localhost:5432/shop". Parts that it does not have, such as the
            password, come from PGPASSWORD and the other variables and files of PostgreSQL's own programs.
        table: a table or a view, if need be with its schema: "sales.orders".
        query: a SELECT in its place.
        by: the column, such as an id or a time; an index makes reading it fast. Many rows with one value cost time and
            memory.
        timeout_s: bound of connecting, and of each read, in seconds.
    """

    def __init__(
        self, address: str, table: str | None = None, *, query: str | None = None, by: str, timeout_s: float = 10.0
    ) -> None:
        database = _PostgresDatabase("PostgresTable", address, timeout_s)
        super().__init__(database, table, query, by, f'PostgresTable("{EXAMPLE}", "orders", by="id").')


class PostgresSink(TableSink):
    """Writes dicts as rows of a table; the rows of a checkpoint appear in one transaction, and exactly once.

    It keeps and tries rows as `SqliteSink` does, and writes the number of the checkpoint into the table `sage_commits`
    of the same database. A dict as a value is written as JSON, and a list as an array.

    Args:
        address: the database, as for `PostgresTable`.
        table: the table; it must be there, and have a column for each key of the dicts.
        key: one or more columns with a unique index; a row takes the place of the row with the same values in them.
        timeout_s: bound of connecting, and of each command, in seconds.
    """

    _database: _PostgresDatabase

    def __init__(self, address: str, table: str, *, key: str | Sequence[str] = (), timeout_s: float = 10.0) -> None:
        database = _PostgresDatabase("PostgresSink", address, timeout_s)
        super().__init__(database, table, key, f'PostgresSink("{EXAMPLE}", "orders").')
        self._copies = False

    def open(self, part: str, checkpoint: int) -> None:
        """Connect to the database, and look which checkpoint of this part it has; raises as `TableSink.open` does."""
        super().open(part, checkpoint)
        with self._database.naming():
            self._copies = not self._key and self._database.can_copy(self._table)

    def _put(self, rows: list[Cells]) -> None:
        if not self._copies:
            super()._put(rows)
            return
        for columns, alike in groupby(rows, itemgetter(0)):
            self._database.copy(self._table, columns, map(itemgetter(1), alike))
