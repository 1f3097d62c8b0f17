"""Where embeddings are kept that were computed before: in memory or in an SQLite file, bounded in entries."""

from __future__ import annotations

import logging
import os
import threading
from collections import OrderedDict
from typing import TYPE_CHECKING, Protocol, TypeVar

from sage.errors import ServiceError, describe, hint
from sage.services._shared.sqlite_file import SqliteFile

if TYPE_CHECKING:
    import sqlite3
    from collections.abc import Callable, Iterable, Mapping

T = TypeVar("T")

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
        """Release the vectors. A second call does nothing."""


class MemoryCache:
    """Keeps vectors for as long as the service lives."""

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
        model: the name of the model. Those of other models in the same file are left alone.
        entries_max: how many vectors of this model it keeps.
    """

    def __init__(self, path: str | os.PathLike[str], model: str, entries_max: int) -> None:
        self._path = os.fspath(path)
        self._model = model
        self._entries_max = entries_max
        self._lock = threading.Lock()
        self._instead: MemoryCache | None = None
        self._file = SqliteFile(path, "embeddings", 1, SCHEMA, timeout_s=BUSY_TIMEOUT_S)
        try:
            self._file.open()
        except ServiceError as error:
            failure = ServiceError(f"the embedding cache {self._path!r} cannot be used: {error}")
            raise hint(
                failure, "Its folder must be there and the file must be one of SQLite; it may be removed."
            ) from None

    def get_many(self, keys: Iterable[bytes]) -> dict[bytes, bytes]:
        """Return the vectors that are known, as bytes, by key."""
        wanted = list(keys)

        def read(connection: sqlite3.Connection) -> dict[bytes, bytes]:
            found: dict[bytes, bytes] = {}
            for begin in range(0, len(wanted), KEYS_MAX):
                some = (self._model, *wanted[begin : begin + KEYS_MAX])
                where = f"WHERE model = ? AND key IN ({','.join('?' * (len(some) - 1))})"
                found.update(connection.execute(f"SELECT key, vector FROM embeddings {where}", some).fetchall())
                connection.execute(f"UPDATE embeddings SET used = ? {where}", (self._next_use(connection), *some))
            return found

        return self._in_file(read, lambda memory: memory.get_many(wanted))

    def put_many(self, vectors: Mapping[bytes, bytes]) -> None:
        """Keep vectors, and drop those of this model that were not used for longest where there are too many."""

        def write(connection: sqlite3.Connection) -> None:
            use = self._next_use(connection)
            rows = [(self._model, key, vector, use) for key, vector in vectors.items()]
            connection.executemany("INSERT OR REPLACE INTO embeddings VALUES (?, ?, ?, ?)", rows)
            (count,) = connection.execute("SELECT COUNT(*) FROM embeddings WHERE model = ?", (self._model,)).fetchone()
            connection.execute(
                "DELETE FROM embeddings WHERE model = ? AND key IN "
                "(SELECT key FROM embeddings WHERE model = ? ORDER BY used LIMIT ?)",
                (self._model, self._model, max(count - self._entries_max, 0)),
            )

        self._in_file(write, lambda memory: memory.put_many(vectors))

    def close(self) -> None:
        """Close the file."""
        self._file.close()

    @property
    def place(self) -> str:
        """Where it keeps them, for people to read."""
        return self._path if self._instead is None else f"memory, as {self._path} failed"

    def _in_file(self, work: Callable[[sqlite3.Connection], T], instead: Callable[[MemoryCache], T]) -> T:
        """Return the result of `work`, or that of `instead` once the file has failed."""
        if self._instead is None:
            try:
                with self._file.writing() as connection:
                    return work(connection)
            except ServiceError as error:
                with self._lock:
                    if self._instead is None:
                        if not self._file.is_open:
                            raise
                        text = "embedding cache given up, vectors are kept in memory path=%s error=%s"
                        log.warning(text, self._path, describe(error.__cause__ or error))
                        self._instead = MemoryCache(self._entries_max)
                        self._file.close()
        return instead(self._instead)

    def _next_use(self, connection: sqlite3.Connection) -> int:
        query = "SELECT COALESCE(MAX(used), 0) + 1 FROM embeddings WHERE model = ?"
        return int(connection.execute(query, (self._model,)).fetchone()[0])
