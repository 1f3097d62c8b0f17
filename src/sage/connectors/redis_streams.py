"""Redis Streams: entries as records, and records as entries that are added together with their checkpoint."""

from __future__ import annotations

from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple, cast

from sage._arguments import check_count, check_seconds, check_text
from sage._extras import load
from sage.connectors.brokers import FORMATS, POLL_S, BrokerSink, BrokerSource, check_choice, decode, encode
from sage.errors import ConnectorError, ServiceError, hint, short
from sage.services.stores.redis import RedisServer, text_of

if TYPE_CHECKING:
    import os
    from collections.abc import Iterator, Mapping

Raw = list[bytes]
"""An entry to be written: names and values in turn."""
Found = tuple[bytes, "Mapping[bytes, bytes]"]
START = "0-0"

ADD = """
local stream, commits, part, number, length = KEYS[1], KEYS[2], ARGV[1], tonumber(ARGV[2]), ARGV[3]
if number > 0 and tonumber(redis.call('HGET', commits, part) or '0') >= number then return 0 end
local at = 4
while at <= #ARGV do
    local last = at + tonumber(ARGV[at])
    if length == '' then
        redis.call('XADD', stream, '*', unpack(ARGV, at + 1, last))
    else
        redis.call('XADD', stream, 'MAXLEN', '~', length, '*', unpack(ARGV, at + 1, last))
    end
    at = last + 1
end
if number > 0 then redis.call('HSET', commits, part, number) end
return 1"""
"""Adds the entries of a checkpoint and notes its number, unless it is noted; nothing runs on the server in between."""
FIELDS_MAX = 3_000
"""Lua passes about eight thousand values at once."""


@dataclass(frozen=True, slots=True)
class RedisEntry:
    """An entry of a stream.

    Attributes:
        fields: names and values.
        id: as the server gave it; a sink does not look at it.
    """

    fields: dict[str, Any]
    id: str = ""


class Position(NamedTuple):
    """The last entry that was read, and how many entries were added up to it."""

    id: str
    read: int


class _State(NamedTuple):
    """The state of a stream: how many entries it has had and has, and the last id that it gave."""

    added: int
    length: int
    last: str


class _Stream:
    """A stream of a server, whose errors name it."""

    def __init__(
        self,
        owner: str,
        url: str | None,
        stream: str,
        password: str | None,
        password_file: str | os.PathLike[str] | None,
        timeout_s: float,
    ) -> None:
        load("redis", "redis")
        if url is not None:
            check_text(f"{owner}: url", url, f'Give one: {owner}("redis://localhost:6379/0", "orders").')
        check_text(f"{owner}: stream", stream, f'Give its name: {owner}("redis://localhost:6379/0", "orders").')
        check_seconds(f"{owner}: timeout_s is", timeout_s, may_be_zero=False)
        self.name = stream
        self.server = RedisServer(url, password, password_file, timeout_s)

    @property
    def place(self) -> str:
        """The name of the stream, and its server, without a secret."""
        return f'stream "{self.name}" at "{self.server.place}"'

    @contextmanager
    def naming(self) -> Iterator[None]:
        """Let errors name the stream."""
        try:
            with self.server.naming():
                yield
        except ServiceError as error:
            failed = ConnectorError(f'stream "{self.name}": {error}', fault="external")
            for note in getattr(error, "__notes__", ()):
                failed.add_note(note)
            raise failed from error.__cause__

    def connect(self) -> str:
        """Connect to the server, and return the kind of value that is there: "stream", or "none"."""
        with self.naming():
            self.server.connect()
            kind = text_of(self.server.client.type(self.name))
        if kind not in ("stream", "none"):
            error = ConnectorError(f"{self.place} is a value of the kind {kind}", fault="external")
            raise hint(error, "Name another key.")
        return kind

    def gone(self) -> ConnectorError:
        """Return the error for a stream that is not there."""
        error = ConnectorError(f"{self.place} is not there", fault="external")
        return hint(error, "It is made by its first entry: XADD. Is the number of the database right?")

    def state(self) -> _State:
        """Return the state of the stream, which is there."""
        with self.naming():
            found = self.server.client.xinfo_stream(self.name)
        length = int(found["length"])
        return _State(int(found.get("entries-added", length)), length, text_of(found["last-generated-id"]))


def _key(id_: str) -> tuple[int, ...]:
    """Return an id as the server orders it."""
    return tuple(map(int, id_.split("-")))


class RedisStream(BrokerSource[Found, RedisEntry]):
    """Reads the entries of a stream in order.

    It reads up to the last entry that was there when it was opened, or goes on for ever. Its position is the id of the
    last entry that it has read; no consumer group is used or changed.

    Args:
        url: "redis://host:port/database", "rediss://..." or "unix:///path"; without one it is that of REDIS_URL.
        stream: its key.
        format: of the values of fields: "text", "json" or "bytes".
        follow: whether to go on when all entries have been read.
        begin: where to begin without a position: "earliest" or "latest".
        lost: where to go on if the stream has dropped entries that were not read: "earliest", "latest", or "fail".
        bad_values: "fail", or "skip" to leave out entries that are not in the format, and count them.
        password: without one it is in `password_file`, in REDIS_PASSWORD, or in the url.
        password_file: a file that holds only the password.
        timeout_s: bound of connecting and of each answer, in seconds.
    """

    def __init__(
        self,
        url: str | None,
        stream: str,
        *,
        format: str = "text",
        follow: bool = False,
        begin: str = "earliest",
        lost: str = "fail",
        bad_values: str = "fail",
        password: str | None = None,
        password_file: str | os.PathLike[str] | None = None,
        timeout_s: float = 10.0,
    ) -> None:
        super().__init__(follow=follow, begin=begin, lost=lost, bad_values=bad_values)
        check_choice("RedisStream: format", format, FORMATS)
        self._format = format
        self._stream = _Stream("RedisStream", url, stream, password, password_file, timeout_s)
        self._last = Position(START, 0)
        self._end = START

    def open(self, position: Position | None = None) -> None:
        """Connect to the server, and look whether the stream has the position.

        Raises:
            ConnectorError: the server or the stream is not there, or it has dropped entries that were not read.
        """
        stream = self._stream
        self._left.clear()
        if stream.connect() == "none":
            raise stream.gone()
        state = stream.state()
        dropped = state.added - state.length
        earliest, latest = Position(START, dropped), Position(state.last, state.added)
        self._end = state.last
        if position is None:
            self._last = earliest if self._begin == "earliest" else latest
            return
        self._last = Position(*position)
        is_new = _key(state.last) < _key(self._last.id)
        if not is_new and dropped <= self._last.read:
            return
        if self._lost == "fail":
            text = f"begins before {self._last.id}, where the job was" if is_new else "has dropped entries unread: "
            text += "" if is_new else f"{self._last.read:,} were read, and {dropped:,} are gone"
            raise self._gone(f"{stream.place} {text}")
        self._last = earliest if self._lost == "earliest" else latest

    def _fetch(self, records_max: int) -> list[Found] | None:
        stream, last = self._stream, self._last.id
        if not self._follows and _key(last) >= _key(self._end):
            return None
        with stream.naming():
            client = stream.server.client
            end = "+" if self._follows else self._end
            found = client.xrange(stream.name, f"({last}", end, records_max)
            # Only to wait, as its answer has another form with each version of the protocol.
            if not found and self._follows and client.xread({stream.name: last}, 1, block=round(POLL_S * 1_000)):
                found = client.xrange(stream.name, f"({last}", end, records_max)
            if found:
                return cast("list[Found]", found)
            if not client.exists(stream.name):
                raise stream.gone()
        if self._follows:
            return []
        self._last = Position(self._end, self._last.read)  # the rest was deleted meanwhile
        return None

    def _records(self, message: Found) -> Iterator[RedisEntry]:
        id_, fields = message
        values = {str(decode("text", name)): decode(self._format, value) for name, value in fields.items()}
        yield RedisEntry(values, text_of(id_))

    def _pass(self, message: Found) -> None:
        self._last = Position(text_of(message[0]), self._last.read + 1)

    def _place(self, message: Found) -> str:
        return f"{self._stream.place}, entry {text_of(message[0])}"

    def position(self) -> Position:
        """Return the last id, and how many entries were added up to it."""
        return self._last

    def close(self) -> None:
        """Close the connection."""
        self._stream.server.close()


class RedisStreamSink(BrokerSink[Raw]):
    """Adds records to a stream as entries; those of a checkpoint appear in one step, and exactly once.

    The entries of a checkpoint are in memory and in the checkpoint until then. A script adds them and notes the number
    of the checkpoint in the hash "{STREAM}:sage_commits", and the server runs nothing in between. So the server itself
    says which entries it has, as far as its settings let it keep them: with `appendfsync always`, it keeps them all.

    Args:
        url: "redis://host:port/database", "rediss://..." or "unix:///path"; without one it is that of REDIS_URL.
        stream: its key; it is made by the first entry.
        format: of the values of fields: "text", which takes strings and numbers, "json" or "bytes".
        length_max: how many entries the stream keeps at least; older ones are dropped. None keeps all.
        password: without one it is in `password_file`, in REDIS_PASSWORD, or in the url.
        password_file: a file that holds only the password.
        timeout_s: bound of connecting and of each commit, in seconds.
    """

    def __init__(
        self,
        url: str | None,
        stream: str,
        *,
        format: str = "text",
        length_max: int | None = None,
        password: str | None = None,
        password_file: str | os.PathLike[str] | None = None,
        timeout_s: float = 10.0,
    ) -> None:
        super().__init__()
        check_choice("RedisStreamSink: format", format, FORMATS)
        if length_max is not None:
            check_count("RedisStreamSink: length_max is", length_max)
        self._format = format
        self._length = b"" if length_max is None else b"%d" % length_max
        self._stream = _Stream("RedisStreamSink", url, stream, password, password_file, timeout_s)
        # The braces keep both keys on one server of a cluster.
        self._commits = f"{stream}:sage_commits" if "{" in stream else f"{{{stream}}}:sage_commits"
        self._part = ""

    def open(self, part: str, checkpoint: int) -> None:
        """Connect to the server, and look which checkpoint of this part it has.

        Raises:
            ConnectorError: the server is not there, or it has entries of a later checkpoint.
        """
        self._part = part
        stream = self._stream
        stream.connect()
        if self.durable:
            with stream.naming():
                committed = int(stream.server.client.hget(self._commits, part) or 0)
            if committed > checkpoint:
                raise self._later(stream.place, committed, checkpoint)

    def _raw(self, record: object) -> Raw:
        fields = record.fields if isinstance(record, RedisEntry) else record
        if not isinstance(fields, dict) or not fields or not all(isinstance(name, str) for name in fields):
            error = ConnectorError(f"record {short(record)} is not an entry of {self._stream.place}")
            raise hint(error, "Map it to a dict with a string as the name of each value before the sink.")
        if len(fields) > FIELDS_MAX:
            error = ConnectorError(
                f"record {short(record)} has {len(fields):,} fields, and {FIELDS_MAX:,} are possible"
            )
            raise hint(error, "Put several values into one field, with format='json'.")
        parts = []
        for name, value in fields.items():
            is_number = self._format == "text" and isinstance(value, int | float) and not isinstance(value, bool)
            parts += [encode("text", name, record), encode(self._format, str(value) if is_number else value, record)]
        return parts

    def commit(self, token: tuple[int, list[Raw]]) -> None:
        """Add the entries, unless the server has this checkpoint."""
        number, entries = token
        values = [self._part.encode(), b"%d" % (number if self.durable else 0), self._length]
        for entry in entries:
            values += [b"%d" % len(entry), *entry]
        with self._stream.naming():
            self._stream.server.client.eval(ADD, 2, self._stream.name, self._commits, *values)

    def close(self) -> None:
        """Close the connection."""
        self._stream.server.close()
