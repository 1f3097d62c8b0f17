"""Vectors in one SQLite file, searched in memory."""

from __future__ import annotations

import json
import threading
from contextlib import contextmanager
from typing import TYPE_CHECKING

from sage._extras import load
from sage.errors import ServiceError
from sage.services._shared.sqlite_file import SqliteFile, checked_path
from sage.services.vectors.contract import Shape, closed_error, with_hint_of_room
from sage.services.vectors.numpy import Shelf, ShelfStore
from sage.services.vectors.rows import Rows, squares_of

if TYPE_CHECKING:
    import os
    import sqlite3
    from collections.abc import Collection, Iterator, Mapping, Sequence

    from sage.services.vectors.contract import Metric

SCHEMA = """
CREATE TABLE IF NOT EXISTS collections (
    number INTEGER PRIMARY KEY, name TEXT UNIQUE NOT NULL, dimension INTEGER NOT NULL, metric TEXT NOT NULL
);
CREATE TABLE IF NOT EXISTS entries (
    collection INTEGER NOT NULL, id TEXT NOT NULL, vector BLOB NOT NULL, document TEXT, metadata TEXT,
    UNIQUE (collection, id)
)
"""
UPSERT = """
INSERT INTO entries (collection, id, vector, document, metadata) VALUES (?, ?, ?, ?, ?)
ON CONFLICT (collection, id) DO UPDATE SET
    vector = excluded.vector, document = excluded.document, metadata = excluded.metadata
"""

IN_MEMORY = "NumpyStore keeps vectors in memory."

METADATA = json.JSONEncoder(ensure_ascii=False)
"""One for all rows: `json.dumps` would make one for each."""


class SqliteStore(ShelfStore):
    """A vector store in one file that needs no server: exact, and the best choice up to some hundred thousand entries.

    A collection is read into memory when it is first used, with 4 bytes for each number of a vector, and searched
    there. Each write is a transaction. Several programs may use the same file: the others see a write in their next
    call. After a crash of the machine, rather than of the program, the last writes without `flush` may be missing.

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
        self._file = SqliteFile(self.path, "vectors", 1, SCHEMA, is_ours=True, timeout_s=timeout_s)
        self._lock = threading.RLock()
        self._shelves: dict[str, Shelf] = {}
        self._numbers: dict[str, int] = {}
        self._seen: tuple[sqlite3.Connection, int] | None = None

    def setup(self) -> None:
        """Open the file.

        Raises:
            ServiceError: it cannot be opened, or is not a file of a vector store.
            ValueError: the store's own collection has another dimension or metric.
            MissingExtraError: numpy is not installed.
        """
        load("numpy", "vector")
        self._file.open()
        self._check_own_collection()

    def cleanup(self) -> None:
        """Close the file; SQLite removes its extra files when the last program has closed it."""
        with self._lock:
            self._shelves, self._seen = {}, None
            self._file.close()

    def health(self) -> bool:
        """Return whether the file can be read."""
        return self._file.health()

    def describe(self) -> Mapping[str, object]:
        """Return the settings that a person may see."""
        return {**super().describe(), "path": self.path}

    def _check_place(self) -> None:
        if self._file.is_open:
            self._file.check_held()

    @contextmanager
    def _using(self, *, writing: bool = False) -> Iterator[sqlite3.Connection]:
        """Lend a connection, with nothing in memory that another program has changed in the file since."""
        with self._lock:
            if not self._file.is_open:
                raise closed_error(self)
            try:
                with self._file.writing() if writing else self._file.reading() as connection:
                    # From here on, nobody else changes the file, or this connection does not see it.
                    seen = connection, connection.execute("PRAGMA data_version").fetchone()[0]
                    if seen != self._seen:
                        self._seen, self._shelves, self._numbers = seen, {}, {}
                    yield connection
            except ServiceError as error:
                raise with_hint_of_room(error) from error.__cause__

    def _shelf(self, connection: sqlite3.Connection, name: str) -> Shelf | None:
        """Return a collection as the file has it, or None if it does not exist."""
        if name in self._shelves:
            return self._shelves[name]
        row = connection.execute("SELECT number, dimension, metric FROM collections WHERE name = ?", (name,)).fetchone()
        if row is None:
            return None
        shelf = Shelf(Shape(row[1], row[2]))
        cursor = connection.execute(
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
        with self._using() as connection:
            shelf = self._shelf(connection, name)
            yield Shelf(Shape(1, self.metric)) if shelf is None else shelf

    def _shape(self, name: str) -> Shape | None:
        with self._using() as connection:
            shelf = self._shelf(connection, name)
            return None if shelf is None else shelf.shape

    def _create(self, name: str, shape: Shape) -> None:
        with self._using(writing=True) as connection:
            connection.execute(
                "INSERT INTO collections (name, dimension, metric) VALUES (?, ?, ?) ON CONFLICT DO NOTHING",
                (name, shape.dimension, shape.metric),
            )

    def _write(self, name: str, rows: Rows) -> None:
        with self._lock:
            with self._using(writing=True) as connection:
                shelf = self._shelf(connection, name)
                if shelf is None:
                    raise ServiceError(f'collection "{name}" was removed by another program', fault="external")
                number = self._numbers[name]
                connection.executemany(UPSERT, [(number, *row) for row in _columns(rows)])
            shelf.put(rows)

    def _remove(self, name: str, ids: Sequence[str]) -> None:
        with self._lock:
            with self._using(writing=True) as connection:
                shelf = self._shelf(connection, name)
                present = [] if shelf is None else shelf.known(ids)
                values = [(self._numbers[name], one) for one in present]
                connection.executemany("DELETE FROM entries WHERE collection = ? AND id = ?", values)
            if shelf is not None:
                shelf.remove(present)

    def _names(self) -> Collection[str]:
        with self._using() as connection:
            return [name for (name,) in connection.execute("SELECT name FROM collections")]

    def _discard(self, name: str) -> None:
        with self._lock:
            with self._using(writing=True) as connection:
                chosen = "(SELECT number FROM collections WHERE name = ?)"
                connection.execute(f"DELETE FROM entries WHERE collection = {chosen}", (name,))
                connection.execute("DELETE FROM collections WHERE name = ?", (name,))
            self._shelves.pop(name, None)

    def _flush(self) -> None:
        self._file.checkpoint()


def _columns(rows: Rows) -> Iterator[tuple[str, bytes, str | None, str | None]]:
    np = load("numpy", "vector")
    width = 4 * rows.vectors.shape[1]
    # Little-endian on every machine, so that the file can be carried to another one.
    whole = np.ascontiguousarray(rows.vectors, dtype="<f4").tobytes()
    for place, (one, document, metadata) in enumerate(zip(rows.ids, rows.documents, rows.metadatas, strict=True)):
        text = METADATA.encode(metadata) if metadata else None
        yield one, whole[place * width : (place + 1) * width], document, text


def _rows_of(found: Sequence[tuple[object, ...]], dimension: int) -> Rows:
    np = load("numpy", "vector")
    ids, vectors, documents, metadatas = zip(*found, strict=True)
    array = np.frombuffer(b"".join(vectors), dtype="<f4").astype(np.float32).reshape(len(ids), dimension)
    return Rows(ids, array, squares_of(array), documents, [json.loads(text) if text else {} for text in metadatas])
