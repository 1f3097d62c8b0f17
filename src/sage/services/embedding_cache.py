"""Where embeddings are kept that were computed before: in memory or in an SQLite file, bounded in entries."""

from __future__ import annotations

import logging
import os
import sqlite3
import threading
from collections import OrderedDict
from contextlib import closing, suppress
from typing import TYPE_CHECKING, Protocol

from sage.errors import ServiceError, describe, hint

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

log = logging.getLogger(__name__)

BUSY_TIMEOUT_S = 10.0
"""How long to wait for another process that writes into the same file."""

KEYS_MAX = 500
"""How many keys one statement names; some builds of SQLite take no more than 999 parameters."""

SCHEMA = """
CREATE TABLE IF NOT EXISTS embeddings (
    model TEXT NOT NULL, key BLOB NOT NULL, vector BLOB NOT NULL, used INTEGER NOT NULL, PRIMARY KEY (model, key)
) WITHOUT ROWID;
CREATE INDEX IF NOT EXISTS embeddings_by_use ON embeddings (model, used);
"""


class EmbeddingCache(Protocol):
    """Keeps vectors by key and drops those first that were not used for longest; any thread may call it."""

    @property
    def place(self) -> str:
        """Where it keeps them, for people to read."""

    def get_many(self, keys: Iterable[bytes]) -> dict[bytes, bytes]:
        """Return the vectors that are known, as bytes, by key."""

    def put_many(self, vectors: Mapping[bytes, bytes]) -> None:
        """Keep vectors, and drop others where there are too many."""

    def close(self) -> None:
        """Give up what it holds. Does nothing twice."""


class MemoryCache:
    """Keeps vectors for as long as the service lives.

    Args:
        entries_max: how many vectors it keeps; 0 keeps none.
    """

    def __init__(self, entries_max: int) -> None:
        self._entries_max = entries_max
        self._vectors: OrderedDict[bytes, bytes] = OrderedDict()
        self._lock = threading.Lock()

    @property
    def place(self) -> str:
        """Where it keeps them, for people to read."""
        return "memory"

    def get_many(self, keys: Iterable[bytes]) -> dict[bytes, bytes]:
        """Return the vectors that are known, as bytes, by key."""
        found: dict[bytes, bytes] = {}
        with self._lock:
            for key in keys:
                vector = self._vectors.get(key)
                if vector is not None:
                    self._vectors.move_to_end(key)
                    found[key] = vector
        return found

    def put_many(self, vectors: Mapping[bytes, bytes]) -> None:
        """Keep vectors, and drop those that were not used for longest where there are too many."""
        with self._lock:
            for key, vector in vectors.items():
                self._vectors[key] = vector
                self._vectors.move_to_end(key)
            while len(self._vectors) > self._entries_max:
                self._vectors.popitem(last=False)

    def close(self) -> None:
        """Forget everything."""
        with self._lock:
            self._vectors.clear()


class SqliteCache:
    """Keeps vectors in a file, for the next run too; several processes may use the same file.

    Where the file fails later, as on a full disk, the log says so once, and vectors are kept in memory from then on:
    nobody's work ends because something cannot be kept.

    Args:
        path: the file; it is made where it is missing, its folder is not.
        model: what computes the vectors. Those of other models in the same file are left alone.
        entries_max: how many vectors of this model it keeps.

    Raises:
        ServiceError: the file cannot be opened or is none of SQLite.
    """

    def __init__(self, path: str | os.PathLike[str], model: str, entries_max: int) -> None:
        self._path = os.fspath(path)
        self._model = model
        self._entries_max = entries_max
        self._lock = threading.Lock()
        self._connection: sqlite3.Connection | None = None
        self._instead: MemoryCache | None = None
        connection = None
        try:
            # Every statement runs under the lock, whichever thread runs it.
            connection = sqlite3.connect(
                self._path, timeout=BUSY_TIMEOUT_S, check_same_thread=False, isolation_level=None
            )
            connection.execute("PRAGMA journal_mode = WAL")
            # What a crash of the machine loses here is computed again.
            connection.execute("PRAGMA synchronous = NORMAL")
            connection.executescript(SCHEMA)
        except sqlite3.Error as error:
            if connection is not None:
                connection.close()
            failure = ServiceError(f"the embedding cache {self._path!r} cannot be used: {describe(error)}")
            raise hint(
                failure, "Its folder must be there and the file must be one of SQLite; it may be removed."
            ) from None
        self._connection = connection

    def get_many(self, keys: Iterable[bytes]) -> dict[bytes, bytes]:
        """Return the vectors that are known, as bytes, by key."""
        wanted = list(keys)
        with self._lock:
            if self._instead is None:
                try:
                    return self._read(wanted)
                except sqlite3.Error as error:
                    self._instead = self._given_up(error)
            return self._instead.get_many(wanted)

    def put_many(self, vectors: Mapping[bytes, bytes]) -> None:
        """Keep vectors, and drop those of this model that were not used for longest where there are too many."""
        with self._lock:
            if self._instead is None:
                try:
                    return self._write(vectors)
                except sqlite3.Error as error:
                    self._instead = self._given_up(error)
            return self._instead.put_many(vectors)

    def close(self) -> None:
        """Close the file."""
        with self._lock:
            if self._connection is not None:
                self._connection.close()
                self._connection = None

    @property
    def place(self) -> str:
        """Where it keeps them, for people to read."""
        return self._path if self._instead is None else f"memory, as {self._path} failed"

    def _read(self, wanted: list[bytes]) -> dict[bytes, bytes]:
        found: dict[bytes, bytes] = {}
        with closing(self._open().cursor()) as cursor, Transaction(cursor):
            for begin in range(0, len(wanted), KEYS_MAX):
                some = wanted[begin : begin + KEYS_MAX]
                marks = ",".join("?" * len(some))
                where = f"WHERE model = ? AND key IN ({marks})"
                rows = cursor.execute(f"SELECT key, vector FROM embeddings {where}", (self._model, *some))
                found.update(rows.fetchall())
                cursor.execute(f"UPDATE embeddings SET used = ? {where}", (self._next_use(cursor), self._model, *some))
        return found

    def _write(self, vectors: Mapping[bytes, bytes]) -> None:
        with closing(self._open().cursor()) as cursor, Transaction(cursor):
            use = self._next_use(cursor)
            cursor.executemany(
                "INSERT OR REPLACE INTO embeddings VALUES (?, ?, ?, ?)",
                [(self._model, key, vector, use) for key, vector in vectors.items()],
            )
            (count,) = cursor.execute("SELECT COUNT(*) FROM embeddings WHERE model = ?", (self._model,)).fetchone()
            cursor.execute(
                "DELETE FROM embeddings WHERE model = ? AND key IN "
                "(SELECT key FROM embeddings WHERE model = ? ORDER BY used LIMIT ?)",
                (self._model, self._model, max(count - self._entries_max, 0)),
            )

    def _given_up(self, error: sqlite3.Error) -> MemoryCache:
        """Close the file and return what takes its place."""
        text = "embedding cache given up, vectors are kept in memory path=%s error=%s"
        log.warning(text, self._path, describe(error))
        connection, self._connection = self._connection, None
        if connection is not None:
            with suppress(sqlite3.Error):  # what was open ends with the connection
                connection.close()
        return MemoryCache(self._entries_max)

    def _open(self) -> sqlite3.Connection:
        if self._connection is None:
            raise ServiceError(f"the embedding cache {self._path!r} is closed")
        return self._connection

    def _next_use(self, cursor: sqlite3.Cursor) -> int:
        query = "SELECT COALESCE(MAX(used), 0) + 1 FROM embeddings WHERE model = ?"
        number: int = cursor.execute(query, (self._model,)).fetchone()[0]
        return number


class Transaction:
    """A transaction that writes: committed at the end of the block, and taken back where the block raises."""

    def __init__(self, cursor: sqlite3.Cursor) -> None:
        self._cursor = cursor

    def __enter__(self) -> None:
        self._cursor.execute("BEGIN IMMEDIATE")

    def __exit__(self, type_: type[BaseException] | None, *_: object) -> None:
        self._cursor.execute("COMMIT" if type_ is None else "ROLLBACK")
