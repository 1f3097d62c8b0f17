"""Redis Streams as a source and a sink: entries that are gone, values that cannot be read, servers without use."""

from __future__ import annotations

from contextlib import closing
from typing import TYPE_CHECKING, Any

import pytest
from support import brokers
from support.docs_pages import ROOT, blocks_of

from sage import ConnectorError, Durable, FunctionError, GraphError, LocalEnvironment
from sage.connectors import RedisEntry, RedisStream, RedisStreamSink
from sage.services.stores.redis import text_of

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    import redis

pytestmark = brokers.needs_redis


@pytest.fixture
def stream(tmp_path: Path) -> str:
    return brokers.stream(tmp_path)


@pytest.fixture
def client() -> Iterator[redis.Redis]:
    import redis

    with redis.Redis.from_url(brokers.redis()) as client:
        yield client


def read(stream: str, position: Any = None, **options: Any) -> tuple[list[Any], Any]:
    """Return the fields of all entries from a position on, and the position after them."""
    source = RedisStream(brokers.redis(), stream, **options)
    found: list[Any] = []
    with closing(source):
        source.open(position)
        while (entries := source.read(2)) is not None:
            found += [entry.fields for entry in entries]
    return found, source.position()


def numbers(*values: int) -> list[dict[str, str]]:
    return [{"n": str(value)} for value in values]


def opened(stream: str, checkpoint: int = 0, **options: Any) -> RedisStreamSink:
    sink = RedisStreamSink(brokers.redis(), stream, **options)
    sink.open("part", checkpoint)
    return sink


def test_entries_that_were_dropped_unread_are_missed(stream: str, client: redis.Redis) -> None:
    brokers.add(stream, numbers(1, 2))
    _, position = read(stream)
    brokers.add(stream, numbers(3, 4, 5))
    client.xtrim(stream, maxlen=3, approximate=False)  # those that were read
    assert read(stream, position)[0] == numbers(3, 4, 5)
    client.xtrim(stream, maxlen=1, approximate=False)
    with pytest.raises(ConnectorError, match="has dropped entries unread: 2 were read, and 4 are gone") as caught:
        read(stream, position)
    assert 'lost="earliest"' in caught.value.__notes__[0]
    assert read(stream, position, lost="earliest")[0] == numbers(5)
    found, position = read(stream, position, lost="latest")
    assert found == []
    brokers.add(stream, numbers(6))
    assert read(stream, position)[0] == numbers(6)


def test_entries_that_somebody_deleted_are_not_missed(stream: str, client: redis.Redis) -> None:
    ids: list[Any] = [client.xadd(stream, {"n": number}) for number in range(1, 5)]
    client.xdel(stream, ids[1], ids[3])
    found, position = read(stream)
    assert found == numbers(1, 3)
    client.xtrim(stream, maxlen=0, approximate=False)
    assert read(stream, position)[0] == []


def test_a_stream_that_was_made_anew_is_named(stream: str, client: redis.Redis) -> None:
    brokers.add(stream, numbers(1))
    _, position = read(stream)
    client.delete(stream)
    with pytest.raises(ConnectorError, match=f'stream "{stream}" at .* is not there'):
        read(stream, position)
    client.xadd(stream, {"n": 2}, id="5-1")
    with pytest.raises(ConnectorError, match=r"begins before \d+-\d+, where the job was"):
        read(stream, position)
    assert read(stream, position, lost="earliest")[0] == numbers(2)


def test_a_source_may_begin_at_new_entries(stream: str) -> None:
    brokers.add(stream, numbers(1))
    found, position = read(stream, begin="latest")
    assert found == []
    brokers.add(stream, numbers(2))
    assert read(stream, position, begin="latest")[0] == numbers(2)


def test_a_source_that_follows_reads_on_until_the_job_is_stopped(stream: str, tmp_path: Path) -> None:
    brokers.add(stream, numbers(1))
    found: list[Any] = []

    def note(entry: RedisEntry) -> None:
        found.append(entry.fields)
        if len(found) < 3:
            brokers.add(stream, numbers(len(found) + 1))
        else:
            job.stop()

    env = LocalEnvironment("job", durable=Durable(tmp_path / "state", interval_s=0.02))
    env.from_source(RedisStream(brokers.redis(), stream, follow=True)).sink(note)
    job = env.submit()
    job.wait(timeout_s=20)
    assert found == numbers(1, 2, 3)


def test_a_stream_that_vanishes_fails_the_job(stream: str, client: redis.Redis) -> None:
    brokers.add(stream, numbers(1))
    env = LocalEnvironment("job")
    env.from_source(RedisStream(brokers.redis(), stream, follow=True), name="in").sink(lambda _: client.delete(stream))
    with pytest.raises(FunctionError, match=f'source "in" failed: .*stream "{stream}" at .* is not there'):
        env.submit().wait(timeout_s=20)


BAD: dict[str, tuple[str, bytes, str]] = {
    "not JSON": ("json", b"{1", "the value is not JSON"),
    "not text": ("text", b"\xff", "the value is not text in UTF-8"),
}


@pytest.mark.parametrize("name", BAD)
def test_a_value_that_cannot_be_read_is_named_or_left_out(name: str, stream: str, client: redis.Redis) -> None:
    format, bad, message = BAD[name]
    values = [b"1", bad, b"3", bad, b"5"]
    ids = [text_of(client.xadd(stream, {"n": value})) for value in values]
    source = RedisStream(brokers.redis(), stream, format=format)
    with closing(source):
        source.open()
        assert [entry.id for entry in source.read(10) or ()] == ids[:1]
        for _ in range(2):
            with pytest.raises(ConnectorError, match=rf'^stream ".*", entry {ids[1]}: {message}') as caught:
                source.read(10)
        assert "bad_values" in caught.value.__notes__[0]
        assert source.position().id == ids[0]
    env = LocalEnvironment("job")
    found: list[str] = []
    skipping = RedisStream(brokers.redis(), stream, format=format, bad_values="skip")
    env.from_source(skipping, name="in").map(lambda entry: entry.id).sink(found.append)
    report = env.submit(autostop=True).report
    assert found == [ids[0], ids[2], ids[4]]
    assert report.operator("in").failed == 2
    assert [value["n"] for value in read(stream, format="bytes")[0]] == values


def test_values_of_all_formats_come_back(stream: str) -> None:
    rows: dict[str, tuple[Any, Any]] = {
        "json": ({"a": [1, None], "ä b": "x"},) * 2,
        "text": ({"a": "ä", "b": 5, "c": 0.5}, {"a": "ä", "b": "5", "c": "0.5"}),
        "bytes": ({"a": b"\xff\0"},) * 2,
    }
    for format, (given, back) in rows.items():
        env = LocalEnvironment("job")
        records = [given, RedisEntry(given, "1-1")]
        env.from_batch(records).sink(RedisStreamSink(brokers.redis(), f"{stream} {format}", format=format))
        env.run()
        assert read(f"{stream} {format}", format=format)[0] == [back, back]


def test_old_entries_are_dropped_beyond_a_length(stream: str, client: redis.Redis) -> None:
    client.config_set("stream-node-max-entries", 10)
    sink = opened(stream, length_max=5)
    with closing(sink):
        sink.write(numbers(*range(100)))
        sink.commit(sink.prepare(1) or (0, []))
    assert 5 <= client.xlen(stream) < 30


REFUSED: dict[str, object] = {
    "is not an entry of stream": ["id"],
    "is not an entry": {},
    "cannot be written as text: TypeError: it is of type bool": {"a": True},
    "cannot be written as text: UnicodeEncodeError": {"a": "\ud800"},
    "has 3,001 fields": {str(number): "" for number in range(3_001)},
}


@pytest.mark.parametrize("message", REFUSED)
def test_a_record_that_cannot_be_written_is_named(message: str, stream: str, client: redis.Redis) -> None:
    with closing(opened(stream)) as sink:
        with pytest.raises(ConnectorError, match=f"^record .* {message}") as caught:
            sink.write([{"a": "1"}, REFUSED[message]])
        assert caught.value.__notes__
    assert not client.exists(stream)


def test_entries_of_a_checkpoint_that_was_left_out_are_refused(stream: str) -> None:
    with closing(opened(stream)) as sink:
        sink.write(numbers(1))
        sink.commit(sink.prepare(9) or (0, []))
    sink = RedisStreamSink(brokers.redis(), stream)
    with closing(sink), pytest.raises(ConnectorError, match=r"has records of checkpoint 9, .* from checkpoint 8"):
        sink.open("part", 8)


def use_source(url: str, stream: str) -> None:
    with closing(RedisStream(url, stream)) as source:
        source.open()


def use_sink(url: str, stream: str) -> None:
    with closing(RedisStreamSink(url, stream)) as sink:
        sink.open("part", 0)


UNUSABLE: dict[str, tuple[Callable[[str], str], str, str]] = {
    "no server": (lambda url: f"{url.rpartition(':')[0]}:1/0", "cannot be reached", "Is the server running"),
    "password": (lambda url: url.replace(brokers.IN_URL, "wr0ng"), "refuses the password", "REDIS_PASSWORD"),
    "no password": (lambda url: f"redis://{url.partition('@')[2]}", "refuses the password", "REDIS_PASSWORD"),
    "database": (lambda url: f"{url}x", "whose database is not a number", "It begins with redis://"),
}


@pytest.mark.parametrize("name", UNUSABLE)
@pytest.mark.parametrize("use", [use_source, use_sink])
def test_a_server_that_cannot_be_used_is_named_without_the_password(
    name: str, use: Callable[[str, str], None], stream: str
) -> None:
    change, message, note = UNUSABLE[name]
    with pytest.raises(ConnectorError, match=rf'^stream "{stream}": redis .*{message}') as caught:
        use(change(brokers.redis()), stream)
    assert note in caught.value.__notes__[0]
    shown = f"{caught.value!r} {caught.value.__cause__!r} {caught.value.__context__!r}"
    assert not any(secret in shown for secret in (brokers.PASSWORD, brokers.IN_URL, "wr0ng"))


def test_a_key_that_is_not_a_stream_is_refused(stream: str, client: redis.Redis) -> None:
    client.set(stream, "1")
    for use in (use_source, use_sink):
        with pytest.raises(ConnectorError, match=f'stream "{stream}" at .* is a value of the kind string'):
            use(brokers.redis(), stream)


def test_no_secret_is_in_what_a_job_shows_or_keeps(stream: str, tmp_path: Path) -> None:
    brokers.add(stream, numbers(1))
    env = LocalEnvironment("job", durable=tmp_path / "state")
    entries = env.from_source(RedisStream(brokers.redis(), stream), name="in")
    entries.sink(RedisStreamSink(brokers.redis(), f"{stream} out"), name="out")
    shown = str(env.explain())
    assert '"out" gets each record exactly once' in shown
    env.run()
    kept = b"".join(path.read_bytes() for path in (tmp_path / "state").rglob("*") if path.is_file())
    for secret in (brokers.PASSWORD, brokers.IN_URL):
        assert secret not in shown
        assert secret.encode() not in kept


WRONG: dict[str, Callable[[], object]] = {
    "RedisStream: url is 5": lambda: RedisStream(5, "s"),  # type: ignore[arg-type]
    "RedisStream: stream is ''": lambda: RedisStream(None, ""),
    "RedisStream: begin is 'now'": lambda: RedisStream(None, "s", begin="now"),
    "RedisStream: lost is 'skip'": lambda: RedisStream(None, "s", lost="skip"),
    "RedisStream: bad_values is 5": lambda: RedisStream(None, "s", bad_values=5),  # type: ignore[arg-type]
    "RedisStreamSink: format is 'avro'": lambda: RedisStreamSink(None, "s", format="avro"),
    "RedisStreamSink: length_max is 0": lambda: RedisStreamSink(None, "s", length_max=0),
    "RedisStreamSink: timeout_s is 0": lambda: RedisStreamSink(None, "s", timeout_s=0),
}


@pytest.mark.parametrize("message", WRONG)
def test_an_option_that_cannot_work_is_refused_where_it_is_given(message: str) -> None:
    with pytest.raises(GraphError, match=message) as caught:
        WRONG[message]()
    assert caught.value.__notes__


def test_the_program_of_the_docs(client: redis.Redis, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (block,) = [block for block in blocks_of(ROOT / "docs/ready-made/connectors.md") if "def double(" in block.code]
    names: dict[str, Any] = {"LocalEnvironment": LocalEnvironment}
    exec(block.code, names)
    for number in (1, 2):
        client.xadd("numbers", {"n": number})
        names["double"](brokers.redis())
    assert read("doubles")[0] == numbers(2, 4)
