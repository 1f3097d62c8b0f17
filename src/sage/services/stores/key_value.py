"""Key-value stores: the contract, and the one that keeps everything in a SQLite file."""

from __future__ import annotations

import time
from abc import abstractmethod
from typing import TYPE_CHECKING, Any

from sage.errors import hint, short
from sage.services._shared.measures import MeasuredService
from sage.services._shared.sqlite_file import FileService, SqliteFile
from sage.services._shared.validation import checked_text, checked_ttl, json_text, json_value

if TYPE_CHECKING:
    import os
    from collections.abc import Callable, Iterable, Mapping

COUNTER_MIN, COUNTER_MAX = -(2**63), 2**63 - 1
"""The range of a counter; the bounds are those of Redis, so that all stores have the same."""

EXPIRED_AT_ONCE_MAX = 100
"""How many expired entries a write removes besides, so that they go away without anybody calling `expire`."""


class KeyValueStore(MeasuredService):
    """Values by key, each with a time to live if it is given one. Keys are strings, values are those of JSON.

    A read returns exactly the value that was written: a value that JSON would change, such as a tuple or a dict with
    numbers as keys, is refused. Each call takes effect as a whole or not at all, those of many keys included. An entry
    whose time to live is over is not there for any method. All methods may be called from any number of threads.

    An implementation has the methods that begin with an underscore; they are given checked arguments, and values as
    text.
    """

    def process(self, key: str) -> Any:
        """Return the result of `get`."""
        return self.get(key)

    def get(self, key: str, default: object = None) -> Any:
        """Return the value of a key, or `default`.

        Raises:
            TypeError: the key is not a string.
        """
        with self.measured("get"):
            checked_text("key", key)
            found = self._get_many([key])
            return json_value(key, found[key]) if key in found else default

    def get_many(self, keys: Iterable[str]) -> dict[str, Any]:
        """Return the values of those of the keys that are there."""
        with self.measured("get_many") as call:
            wanted = [checked_text("key", key) for key in _no_string("get_many", keys)]
            call.items = len(wanted)
            found = self._get_many(wanted)
            return {key: json_value(key, text) for key, text in found.items()}

    def put(self, key: str, value: object, *, ttl_s: float | None = None) -> None:
        """Set the value of a key, and its time to live; an earlier one of either is gone.

        Args:
            key: any string.
            value: a JSON value.
            ttl_s: the time to live in seconds; forever without one.

        Raises:
            TypeError: the key is not a string, or the value cannot be written as JSON.
            ValueError: the time to live is not above 0.
        """
        with self.measured("put"):
            entries = {checked_text("key", key): json_text(key, value)}
            self._put_many(entries, checked_ttl(ttl_s))

    def put_many(self, entries: Mapping[str, object], *, ttl_s: float | None = None) -> None:
        """Set the values of several keys at once, all of them with the same time to live."""
        with self.measured("put_many") as call:
            texts = {checked_text("key", key): json_text(key, value) for key, value in entries.items()}
            call.items = len(texts)
            checked_ttl(ttl_s)
            if texts:
                self._put_many(texts, ttl_s)

    def delete(self, key: str) -> bool:
        """Remove a key, and return whether it was there."""
        with self.measured("delete"):
            return self._delete(checked_text("key", key))

    def increment(self, key: str, by: int = 1) -> int:
        """Add to the whole number of a key and return the sum; a key that is not there counts as 0.

        The time to live does not change. Parallel calls each count.

        Raises:
            TypeError: the value, or `by`, is not a whole number.
            OverflowError: the value or the sum does not fit into 64 bits.
        """
        with self.measured("increment"):
            checked_text("key", key)
            if type(by) is not int:
                raise TypeError(f"increment({short(key)}) by {short(by)}, which is not a whole number")
            if not COUNTER_MIN <= by <= COUNTER_MAX:
                raise counter_overflow(key, by)
            return self._increment(key, by)

    def keys(self, prefix: str = "") -> list[str]:
        """Return the keys that begin with `prefix`, in order."""
        with self.measured("keys"):
            return self._keys(checked_text("key", prefix))

    def count(self) -> int:
        """Return how many keys there are."""
        with self.measured("count"):
            return self._count()

    def expire(self) -> int:
        """Remove all entries whose time to live is over, and return how many it removed.

        Nothing reads them anyway; a store that removes them by itself has none.
        """
        with self.measured("expire"):
            return self._expire()

    @abstractmethod
    def setup(self) -> None:
        """Open the store.

        Raises:
            ServiceError: it cannot be opened.
        """

    @abstractmethod
    def cleanup(self) -> None:
        """Close the store; a second call does nothing."""

    @abstractmethod
    def _get_many(self, keys: list[str]) -> dict[str, str]:
        """Return the texts of those keys that are there."""

    @abstractmethod
    def _put_many(self, entries: dict[str, str], ttl_s: float | None) -> None:
        """Set texts."""

    @abstractmethod
    def _delete(self, key: str) -> bool:
        """Remove a key and return whether it was there."""

    @abstractmethod
    def _increment(self, key: str, by: int) -> int:
        """Add to a number and return the sum."""

    @abstractmethod
    def _keys(self, prefix: str) -> list[str]:
        """Return keys in order."""

    @abstractmethod
    def _count(self) -> int:
        """Return how many keys there are."""

    @abstractmethod
    def _expire(self) -> int:
        """Remove expired values, and return their number."""


class SqliteKeyValue(FileService, KeyValueStore):
    """Keeps everything in a SQLite file, which survives a restart, and SIGKILL without the write in flight.

    Several programs may use one file.

    Args:
        path: the file; it is made if it is not there.
        clock: returns the time, in seconds since the epoch; times to live use it.
    """

    def __init__(self, path: str | os.PathLike[str], *, clock: Callable[[], float] = time.time) -> None:
        super().__init__(SqliteFile(path, "key_value", 1, SCHEMA))
        self._clock = clock

    def _get_many(self, keys: list[str]) -> dict[str, str]:
        found: dict[str, str] = {}
        now = self._clock()
        with self._file.reading() as connection:
            for key in keys:
                row = connection.execute(f"SELECT value FROM key_value WHERE key = ? AND {LIVE}", (key, now)).fetchone()
                if row is not None:
                    found[key] = row[0]
        return found

    def _put_many(self, entries: dict[str, str], ttl_s: float | None) -> None:
        now = self._clock()
        expires_at = None if ttl_s is None else now + ttl_s
        with self._file.writing() as connection:
            rows = [(key, text, expires_at) for key, text in entries.items()]
            connection.executemany(PUT, rows)
            connection.execute(f"{EXPIRE} LIMIT {EXPIRED_AT_ONCE_MAX})", (now,))

    def _delete(self, key: str) -> bool:
        with self._file.writing() as connection:
            done = connection.execute(f"DELETE FROM key_value WHERE key = ? AND {LIVE}", (key, self._clock()))
            return done.rowcount > 0

    def _increment(self, key: str, by: int) -> int:
        now = self._clock()
        with self._file.writing() as connection:
            select = f"SELECT value, expires_at FROM key_value WHERE key = ? AND {LIVE}"
            text, expires_at = connection.execute(select, (key, now)).fetchone() or ("0", None)
            value = json_value(key, text)
            if type(value) is not int:
                raise no_counter(key, text)
            total = value + by
            if not (COUNTER_MIN <= value <= COUNTER_MAX and COUNTER_MIN <= total <= COUNTER_MAX):
                raise counter_overflow(key, by)
            connection.execute(PUT, (key, str(total), expires_at))
        return total

    def _keys(self, prefix: str) -> list[str]:
        bound = _behind(prefix)
        where, arguments = ("AND key < ?", [bound]) if bound is not None else ("", [])
        select = f"SELECT key FROM key_value WHERE key >= ? AND {LIVE} {where} ORDER BY key"
        with self._file.reading() as connection:
            rows = connection.execute(select, (prefix, self._clock(), *arguments))
            return [key for (key,) in rows.fetchall()]

    def _count(self) -> int:
        with self._file.reading() as connection:
            row = connection.execute(f"SELECT count(*) FROM key_value WHERE {LIVE}", (self._clock(),)).fetchone()
        return int(row[0])

    def _expire(self) -> int:
        with self._file.writing() as connection:
            return connection.execute(f"{EXPIRE})", (self._clock(),)).rowcount


SCHEMA = """
CREATE TABLE IF NOT EXISTS key_value (key TEXT PRIMARY KEY, value TEXT NOT NULL, expires_at REAL);
CREATE INDEX IF NOT EXISTS key_value_expiry ON key_value (expires_at) WHERE expires_at IS NOT NULL
"""

PUT = "INSERT OR REPLACE INTO key_value (key, value, expires_at) VALUES (?, ?, ?)"
LIVE = "(expires_at IS NULL OR expires_at > ?)"
EXPIRE = "DELETE FROM key_value WHERE rowid IN (SELECT rowid FROM key_value WHERE expires_at <= ?"


def no_counter(key: str, text: str) -> TypeError:
    """Return the error for a counter whose value is not an integer."""
    return TypeError(f"increment({short(key)}): its value is {short(text)}, which is not a whole number")


def counter_overflow(key: str, by: int) -> OverflowError:
    """Return the error for a sum that is too large."""
    return OverflowError(f"increment({short(key)}) by {by} does not fit into 64 bits")


def _no_string(method: str, keys: Iterable[str]) -> Iterable[str]:
    if isinstance(keys, str):
        raise hint(TypeError(f"{method}({short(keys)}) takes a list of keys"), f"Write {method}([{short(keys)}]).")
    return keys


def _behind(prefix: str) -> str | None:
    """Return the first string behind all that begin with `prefix`, or None if nothing can be."""
    kept = prefix.rstrip("\U0010ffff")
    if not kept:
        return None
    following = ord(kept[-1]) + 1
    return kept[:-1] + chr(0xE000 if following == 0xD800 else following)
