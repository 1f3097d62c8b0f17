"""Vectors in one SQLite file, searched in memory."""

from __future__ import annotations

import json
import sqlite3
import threading
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from sage.errors import ServiceError, hint
from sage.services.extras import load
from sage.services.log_hold import LogHold, warn_if_left
from sage.services.numpy_store import Shelf
from sage.services.sqlite_file import PROBLEMS, checked_path, problem_of
from sage.services.vector_rows import Rows, squares_of
from sage.services.vector_store import Shape, VectorStore, closed_error, with_hint_of_room

if TYPE_CHECKING:
    import os
    from collections.abc import Collection, Iterator, Mapping, Sequence

    from sage.services.filters import Condition
    from sage.services.vector_rows import Vectors
    from sage.services.vector_store import Entry, Hit, Metric

APPLICATION_ID = 0x53414745
"""Marks the file as one of SAGE: the four letters."""

SCHEMA = """
CREATE TABLE IF NOT EXISTS collections (
    number INTEGER PRIMARY KEY, name TEXT UNIQUE NOT NULL, dimension INTEGER NOT NULL, metric TEXT NOT NULL
);
CREATE TABLE IF NOT EXISTS entries (
    collection INTEGER NOT NULL, id TEXT NOT NULL, vector BLOB NOT NULL, document TEXT, metadata TEXT,
    UNIQUE (collection, id)
);
"""
UPSERT = """
INSERT INTO entries (collection, id, vector, document, metadata) VALUES (?, ?, ?, ?, ?)
ON CONFLICT (collection, id) DO UPDATE SET
    vector = excluded.vector, document = excluded.document, metadata = excluded.metadata
"""

IN_MEMORY = "NumpyStore keeps vectors in memory."

METADATA = json.JSONEncoder(ensure_ascii=False)
"""One for all rows: `json.dumps` would make one for each."""


class SqliteStore(VectorStore):
    """A vector store in one file that needs no server: exact, and the best choice up to some hundred thousand entries.

    A collection is read into memory when it is first used, with 4 bytes for each number of a vector, and searched
    there. Each write is a transaction. Several programs may use the same file: what one wrote, the others see in their
    next call. After a crash of the machine, rather than of the program, the last writes without `flush` may be missing.

    Args:
        path: the file; it is made, but not its folder.
        dimension: see `VectorStore`.
        metric: see `VectorStore`.
        collection: see `VectorStore`.
        timeout_s: how long a write waits for another program's, in seconds.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        dimension: int | None = None,
        *,
        metric: Metric = "cosine",
        collection: str = "default",
        timeout_s: float = 10.0,
    ) -> None:
        super().__init__(dimension, metric=metric, collection=collection)
        self.path = checked_path(path, IN_MEMORY)
        self.timeout_s = timeout_s
        self._database: sqlite3.Connection | None = None
        self._hold: LogHold | None = None
        self._lock = threading.RLock()
        self._shelves: dict[str, Shelf] = {}
        self._numbers: dict[str, int] = {}
        self._seen = -1

    def setup(self) -> None:
        """Open the file.

        Raises:
            ServiceError: it cannot be opened, or is no file of a vector store.
            ValueError: the store's own collection has another dimension or metric.
            MissingExtraError: numpy is not installed.
        """
        load("numpy", "vector")
        warn_if_left(self.path)
        with self._told():
            self._database = sqlite3.connect(
                self.path, timeout=self.timeout_s, isolation_level=None, check_same_thread=False
            )
            self._prepare(self._database)
            self._hold = LogHold(self.path)
        self._check_own_collection()

    def cleanup(self) -> None:
        """Close the file; what SQLite keeps beside it is gone when the last program has closed it."""
        with self._lock:
            database, self._database = self._database, None
            hold, self._hold = self._hold, None
            self._shelves = {}
            if database is not None:
                database.close()
            if hold is not None:
                hold.close()

    def health(self) -> bool:
        """Return whether the file can be read."""
        with self._lock:
            try:
                self._open.execute("SELECT count(*) FROM collections").fetchone()
            except (ServiceError, sqlite3.Error):
                return False
            return True

    def describe(self) -> Mapping[str, object]:
        """Return the settings that a person may see."""
        return {**super().describe(), "path": self.path}

    @property
    def _open(self) -> sqlite3.Connection:
        if self._database is None:
            raise closed_error(self)
        return self._database

    def _prepare(self, database: sqlite3.Connection) -> None:
        (mark,) = database.execute("PRAGMA application_id").fetchone()
        (tables,) = database.execute("SELECT count(*) FROM sqlite_master").fetchone()
        if mark != APPLICATION_ID and (mark or tables):
            error = ServiceError(f'file "{self.path}" is a database of another program')
            raise hint(error, PROBLEMS[sqlite3.SQLITE_NOTADB][1])
        database.execute("PRAGMA journal_mode = WAL")
        database.execute("PRAGMA synchronous = NORMAL")
        if mark != APPLICATION_ID:
            database.execute(f"PRAGMA application_id = {APPLICATION_ID}")
            database.executescript(SCHEMA)

    @contextmanager
    def _told(self) -> Iterator[None]:
        """Tell what SQLite says with the file that it says it of; close the file if it was not open before."""
        was_open = self._database is not None
        try:
            yield
        except (sqlite3.Error, ServiceError) as error:
            if not was_open:
                self.cleanup()
            if isinstance(error, ServiceError):
                raise
            raise with_hint_of_room(problem_of(self.path, error)) from error

    @contextmanager
    def _transaction(self) -> Iterator[sqlite3.Connection]:
        """Write all or nothing, and know which version of the file memory agrees with then."""
        with self._lock, self._told():
            database = self._open
            database.execute("BEGIN IMMEDIATE")
            try:
                # The lock on the file is held from here on, so that nobody else changes it any more.
                self._forget_old()
                yield database
                database.execute("COMMIT")
            except BaseException:
                if database.in_transaction:
                    database.execute("ROLLBACK")
                raise

    def _forget_old(self) -> None:
        """Drop what is in memory if another program has changed the file."""
        (seen,) = self._open.execute("PRAGMA data_version").fetchone()
        if seen != self._seen:
            self._seen = seen
            self._shelves = {}
            self._numbers = {}

    def _shelf(self, name: str) -> Shelf | None:
        """Return a collection as the file has it, or None if there is none. The caller holds the lock."""
        self._forget_old()
        if name in self._shelves:
            return self._shelves[name]
        database = self._open
        row = database.execute("SELECT number, dimension, metric FROM collections WHERE name = ?", (name,)).fetchone()
        if row is None:
            return None
        shelf = Shelf(Shape(row[1], row[2]))
        cursor = database.execute(
            "SELECT id, vector, document, metadata FROM entries WHERE collection = ? ORDER BY rowid", (row[0],)
        )
        while found := cursor.fetchmany(10_000):
            shelf.put(_rows_of(found, row[1]))
        self._numbers[name] = row[0]
        self._shelves[name] = shelf
        return shelf

    @contextmanager
    def _reading(self, name: str) -> Iterator[Shelf]:
        """Give a collection that was there a moment ago; another program may have removed it since."""
        with self._lock, self._told():
            shelf = self._shelf(name)
            yield Shelf(Shape(1, self.metric)) if shelf is None else shelf

    def _shape(self, name: str) -> Shape | None:
        with self._lock, self._told():
            shelf = self._shelf(name)
            return None if shelf is None else shelf.shape

    def _create(self, name: str, shape: Shape) -> None:
        with self._transaction() as database:
            database.execute(
                "INSERT INTO collections (name, dimension, metric) VALUES (?, ?, ?) ON CONFLICT DO NOTHING",
                (name, shape.dimension, shape.metric),
            )

    def _write(self, name: str, rows: Rows) -> None:
        with self._lock:
            with self._transaction() as database:
                shelf = self._shelf(name)
                if shelf is None:
                    raise ServiceError(f'collection "{name}" was removed by another program', fault="external")
                number = self._numbers[name]
                database.executemany(UPSERT, [(number, *row) for row in _columns(rows)])
            shelf.put(rows)

    def _remove(self, name: str, ids: Sequence[str]) -> None:
        with self._lock:
            with self._transaction() as database:
                shelf = self._shelf(name)
                present = [] if shelf is None else shelf.known(ids)
                values = [(self._numbers[name], one) for one in present]
                database.executemany("DELETE FROM entries WHERE collection = ? AND id = ?", values)
            if shelf is not None:
                shelf.remove(present)

    def _known(self, name: str, ids: Sequence[str]) -> list[str]:
        with self._reading(name) as shelf:
            return shelf.known(ids)

    def _matching(self, name: str, condition: Condition) -> list[str]:
        with self._reading(name) as shelf:
            return shelf.matching(condition)

    def _nearest(self, name: str, vectors: Vectors, k: int, condition: Condition) -> list[list[Hit]]:
        with self._reading(name) as shelf:
            found = shelf
        return found.nearest(vectors, k, condition)

    def _fetch(self, name: str, ids: Sequence[str]) -> dict[str, Entry]:
        with self._reading(name) as shelf:
            return shelf.fetch(ids)

    def _count(self, name: str, condition: Condition) -> int:
        with self._reading(name) as shelf:
            return shelf.count(condition)

    def _names(self) -> Collection[str]:
        with self._lock, self._told():
            return [name for (name,) in self._open.execute("SELECT name FROM collections")]

    def _discard(self, name: str) -> None:
        with self._lock:
            with self._transaction() as database:
                chosen = "(SELECT number FROM collections WHERE name = ?)"
                database.execute(f"DELETE FROM entries WHERE collection = {chosen}", (name,))
                database.execute("DELETE FROM collections WHERE name = ?", (name,))
            self._shelves.pop(name, None)

    def _flush(self) -> None:
        with self._lock, self._told():
            self._open.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchone()


def _columns(rows: Rows) -> Iterator[tuple[str, bytes, str | None, str | None]]:
    np = load("numpy", "vector")
    width = 4 * rows.vectors.shape[1]
    # Little-endian whatever the machine, so that the file can be carried to another one.
    whole = np.ascontiguousarray(rows.vectors, dtype="<f4").tobytes()
    for place, (one, document, metadata) in enumerate(zip(rows.ids, rows.documents, rows.metadatas, strict=True)):
        text = METADATA.encode(metadata) if metadata else None
        yield one, whole[place * width : (place + 1) * width], document, text


def _rows_of(found: Sequence[tuple[Any, ...]], dimension: int) -> Rows:
    np = load("numpy", "vector")
    ids, vectors, documents, metadatas = zip(*found, strict=True)
    array = np.frombuffer(b"".join(vectors), dtype="<f4").astype(np.float32).reshape(len(ids), dimension)
    return Rows(ids, array, squares_of(array), documents, [json.loads(text) if text else {} for text in metadatas])
