"""A Redis server, and a key-value store in it."""

from __future__ import annotations

import os
import re
import sys
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar
from urllib.parse import unquote, unquote_plus

from sage._extras import load
from sage.command import own_value
from sage.errors import ServiceError, ServiceTimeoutError, ServiceUnavailableError, hint, short
from sage.services._shared.address import PARTS, QUOTED, redact_url, text_about
from sage.services._shared.secret import redact, redacted_cause
from sage.services._shared.validation import is_number
from sage.services.stores.key_value import KeyValueStore, counter_overflow, no_counter

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping

    import redis

    from sage.service import ServiceMethod

T = TypeVar("T")

SCAN_COUNT = 1_000
"""How many keys the server looks at before it answers other clients in between."""

WHOLE = re.compile(r"-?[1-9]\d+", re.ASCII)

GLOB = re.compile(r"([*?\[\]\\^-])")


class RedisServer:
    """A connection to a server, whose errors name it, and show no secret.

    Attributes:
        place: the address without name and password.
    """

    def __init__(
        self,
        url: str | ServiceMethod | None,
        password: str | None,
        password_file: str | os.PathLike[str] | None,
        timeout_s: float,
    ) -> None:
        if password is not None and not isinstance(password, str):
            raise TypeError(f"the password is of type {type(password).__name__}, not a string")
        if not is_number(timeout_s, 0, sys.float_info.max) or not timeout_s:
            raise ValueError(f"timeout_s is {short(timeout_s)}, not a number of seconds above 0")
        self._url = url
        self._password = password
        self._password_file = password_file
        self._timeout_s = timeout_s
        self._client: redis.Redis | None = None
        self.place = redact_url(url) if isinstance(url, str) else ""
        self._secrets: tuple[str, ...] = ()

    def connect(self) -> None:
        """Connect.

        Raises:
            MissingExtraError: the package redis is not installed.
            ServiceError: the server cannot be reached, refuses the password, or the url cannot be used.
        """
        load("redis", "redis")
        url = own_value(self._url) if self._url is not None else setting("REDIS_URL")
        if url is None:
            error = ServiceError("redis has no url")
            raise hint(error, 'Give one such as "redis://127.0.0.1:6379/0", or set REDIS_URL or REDIS_URL_FILE.')
        url = url.strip()
        password = self._password
        if password is None and self._password_file is not None:
            password = secret_in(self._password_file)
        elif password is None:
            password = setting("REDIS_PASSWORD")
        self.place = redact_url(url)
        self._secrets = tuple(filter(None, (password, *secrets_in(url))))
        refused = self._refused(url, password)
        if refused is not None:
            # Raised outside of a handler, so that the library's error, which may quote the password, stays behind.
            wrong = ServiceError(f'redis cannot use the url "{self.place}"{refused}')
            raise hint(wrong, f"It begins with redis://, rediss:// or unix://, and its port ends at 65535. {QUOTED}")

    def _refused(self, url: str, password: str | None) -> str | None:
        """Connect, or return the problem of the url, without secrets."""
        parts = PARTS.fullmatch(url)
        if parts is None:
            return ", which is not an address"
        database = (parts["path"] or "").replace("/", "")
        if url.startswith("redis") and database and not database.isdecimal():
            return ", whose database is not a number"  # The library would take database 0.
        module, retry = load("redis", "redis"), load("redis.retry", "redis")
        backoff = load("redis.backoff", "redis")
        settings: dict[str, str] = {} if password is None else {"password": password}
        try:
            self._client = module.Redis.from_url(
                url,
                socket_timeout=self._timeout_s,
                socket_connect_timeout=self._timeout_s,
                # Only this code knows which calls may be retried; the library would count increments twice.
                retry=retry.Retry(backoff.NoBackoff(), 0),
                **settings,
            )
            if password is not None:
                # The one in the url would come before the one that was given.
                self._client.connection_pool.connection_kwargs["password"] = password
            with self.naming():
                self._client.ping()
        except (TypeError, ValueError) as error:  # the first for a setting in the url that it does not know
            text = "" if self._secrets else text_about(url, error)
            return f": {text}" if text else ""
        return None

    def close(self) -> None:
        """Close all connections."""
        client, self._client = self._client, None
        if client is not None:
            client.close()
            client.connection_pool.disconnect()

    @property
    def client(self) -> redis.Redis:
        """The client; ServiceUnavailableError if it is not connected."""
        if self._client is None:
            error = ServiceUnavailableError(f'redis at "{self.place}" is not connected')
            raise hint(error, "Outside a job, call setup() first and cleanup() last.")
        return self._client

    @contextmanager
    def naming(self) -> Iterator[None]:
        """Raise the library's errors as errors that name the server but no secret."""
        errors = load("redis.exceptions", "redis")
        where = f'redis at "{self.place}"'
        try:
            yield
        except errors.AuthenticationError as error:
            told = ServiceError(f"{where} refuses the password: {self._scrubbed(error)}", fault="external")
            raise hint(told, "Give password= or password_file=, or set REDIS_PASSWORD.") from None
        except errors.TimeoutError as error:
            text = f"{where} gave no answer within {self._timeout_s:g} s"
            raise ServiceTimeoutError(text, fault="external") from redacted_cause(error, *self._secrets)
        except errors.ConnectionError as error:
            lost = ServiceUnavailableError(f"{where} cannot be reached: {self._scrubbed(error)}", fault="external")
            cause = redacted_cause(error, *self._secrets)
            raise hint(lost, "Is the server running, and is the url right?") from cause
        except errors.RedisError as error:
            refused = ServiceError(f"{where} refused: {self._scrubbed(error)}", fault="external")
            raise refused from redacted_cause(error, *self._secrets)

    def _scrubbed(self, error: Exception) -> str:
        return redact(str(error), *self._secrets)


class RedisKeyValue(KeyValueStore):
    """Keeps everything in a Redis server, which ends times to live by itself.

    The server's settings decide which data survives its restart. A call whose connection breaks is tried
    once more if that can change nothing: increments and deletions are not.

    Args:
        url: "redis://host:port/database", "rediss://..." or "unix:///path"; the attribute `url` of a command's handle
            may be given as it is. Without one it is that of the variable REDIS_URL, or in the file that REDIS_URL_FILE
            names.
        password: without one it is in `password_file`, in REDIS_PASSWORD, in the file that REDIS_PASSWORD_FILE names,
            or in the url.
        password_file: a file that holds only the password.
        prefix: the prefix of the server's keys; the store sees and counts only these.
        timeout_s: bound of connecting and of each answer, in seconds.
    """

    def __init__(
        self,
        url: str | ServiceMethod | None = None,
        *,
        password: str | None = None,
        password_file: str | os.PathLike[str] | None = None,
        prefix: str = "sage:",
        timeout_s: float = 5.0,
    ) -> None:
        super().__init__()
        self._server = RedisServer(url, password, password_file, timeout_s)
        self._prefix = prefix
        self._timeout_s = timeout_s

    def setup(self) -> None:
        """Connect.

        Raises:
            MissingExtraError: the package redis is not installed.
            ServiceError: the server cannot be reached, refuses the password, or the url cannot be used.
        """
        self._server.connect()

    def cleanup(self) -> None:
        """Close all connections."""
        self._server.close()

    def health(self) -> bool:
        """Return whether the server answers."""
        try:
            with self._server.naming():
                return bool(self._server.client.ping())
        except ServiceError:
            return False

    def describe(self) -> Mapping[str, object]:
        """Return the settings that a person may see; the url stands there without name and password."""
        return {**super().describe(), "url": self._server.place, "prefix": self._prefix, "timeout_s": self._timeout_s}

    def _get_many(self, keys: list[str]) -> dict[str, str]:
        if not keys:
            return {}
        kept = [self._prefix + key for key in keys]
        found = self._twice(lambda client: client.mget(kept))
        return {key: text_of(value) for key, value in zip(keys, found, strict=True) if value is not None}

    def _put_many(self, entries: dict[str, str], ttl_s: float | None) -> None:
        milliseconds = None if ttl_s is None else max(1, round(ttl_s * 1000))
        if len(entries) == 1:
            [(key, text)] = entries.items()
            self._twice(lambda client: client.set(self._prefix + key, text, px=milliseconds))
            return
        with self._server.naming(), self._server.client.pipeline(transaction=True) as pipeline:
            for key, text in entries.items():
                pipeline.set(self._prefix + key, text, px=milliseconds)
            pipeline.execute()

    def _delete(self, key: str) -> bool:
        with self._server.naming():
            return bool(self._server.client.delete(self._prefix + key))

    def _increment(self, key: str, by: int) -> int:
        try:
            with self._server.naming():
                total = self._server.client.incrby(self._prefix + key, by)
        except ServiceError as error:
            cause = str(error.__cause__ or error).rpartition(" refused: ")[2]
            if "overflow" in cause:
                raise counter_overflow(key, by) from None
            if "not an integer" in cause:
                text = self._get_many([key]).get(key, "gone")
                # The server takes a whole number of more than 64 bits for none.
                raise (counter_overflow(key, by) if WHOLE.fullmatch(text) else no_counter(key, text)) from None
            raise
        return int(total)

    def _keys(self, prefix: str) -> list[str]:
        return sorted(self._scan(prefix))

    def _count(self) -> int:
        return len(self._scan(""))

    def _expire(self) -> int:
        return 0

    def _scan(self, prefix: str) -> set[str]:
        pattern = GLOB.sub(r"\\\1", self._prefix + prefix) + "*"
        with self._server.naming():
            # A scan may name a key twice while the server's table grows.
            found = set(self._server.client.scan_iter(match=pattern.encode(), count=SCAN_COUNT))
        return {text_of(key)[len(self._prefix) :] for key in found}

    def _twice(self, command: Callable[[redis.Redis], T]) -> T:
        """Run a command that may run twice, and do so if the connection broke."""
        try:
            with self._server.naming():
                return command(self._server.client)
        except ServiceUnavailableError:
            with self._server.naming():
                return command(self._server.client)


def setting(variable: str) -> str | None:
    """Return the value of an environment variable, or the content of the file that VARIABLE_FILE names."""
    value = os.environ.get(variable)
    if value:
        return value
    file = os.environ.get(f"{variable}_FILE")
    return secret_in(file) if file else None


def secret_in(file: str | os.PathLike[str]) -> str:
    """Return the content of a file, without the end of its line."""
    try:
        return Path(file).read_text(encoding="utf-8").rstrip("\r\n")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is not text"
        raise ServiceError(f'file "{os.fspath(file)}" cannot be read: {reason}') from None


def secrets_in(url: str) -> tuple[str, ...]:
    """Return the secret parts of a url, both encoded and decoded."""
    rest = url.partition("://")[2]
    authority, _, _ = rest.partition("/")
    user, _, _ = authority.rpartition("@")
    password = user.partition(":")[2]
    query = [part.partition("=")[2] for part in rest.partition("?")[2].split("&") if part.startswith("password=")]
    return tuple(found for text in (password, *query) if text for found in (text, unquote(text), unquote_plus(text)))


def text_of(value: bytes | str) -> str:
    """Return the server's stored form as text."""
    return value.decode(errors="replace") if isinstance(value, bytes) else value
