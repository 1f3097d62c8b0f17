"""Kafka as a source and a sink: positions that are gone, transactions that were left, servers that cannot be used."""

from __future__ import annotations

import json
import subprocess
import sys
from contextlib import closing, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from support import brokers
from support.docs_pages import ROOT, blocks_of

from sage import ConnectorError, Durable, FunctionError, GraphError, LocalEnvironment
from sage.connectors import KafkaRecord, KafkaSink, KafkaTopic

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

pytestmark = brokers.needs_kafka

SECRET = "open sesame"
LOGIN = {"security.protocol": "SASL_PLAINTEXT", "sasl.mechanism": "PLAIN", "sasl.username": "ann"}


@pytest.fixture
def topic(tmp_path: Path) -> str:
    return brokers.topic(tmp_path)


def read(topic: str, position: Any = None, **options: Any) -> tuple[list[Any], Any]:
    """Return the values of all messages from a position on, and the position after them."""
    source = KafkaTopic(brokers.kafka(), topic, **options)
    found: list[Any] = []
    with closing(source):
        source.open(position)
        while (records := source.read(2)) is not None:
            found += [record.value for record in records]
    return found, source.position()


def read_all(source: KafkaTopic, found: list[Any]) -> None:
    while (records := source.read(10)) is not None:
        found += records


def write(topic: str, *values: object, partition: int = 0) -> None:
    brokers.produce(topic, [json.dumps(value).encode() for value in values], partition=partition)


def opened(topic: str, checkpoint: int = 0, **options: Any) -> KafkaSink:
    sink = KafkaSink(brokers.kafka(), topic, **options)
    sink.open(f"part-{topic}", checkpoint)
    return sink


@contextmanager
def process_of(*words: str) -> Iterator[tuple[subprocess.Popen[str], str]]:
    """Run a server in a process of its own, and give its first line."""
    with subprocess.Popen([sys.executable, *words], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as server:
        assert server.stdout is not None
        try:
            yield server, server.stdout.readline().strip()
        finally:
            server.kill()


def test_a_position_that_the_topic_has_dropped_is_named(topic: str) -> None:
    write(topic, 1, 2, 3, 4)
    _, position = read(topic)
    assert position == {0: 4, 1: 0, 2: 0}
    position[0] = 1
    assert read(topic, position)[0] == [2, 3, 4]
    brokers.ask(f"drop-{topic}-3")
    with pytest.raises(ConnectorError, match="partition 0 has the offsets 3 to 4, and 1 is next") as caught:
        read(topic, position)
    assert 'lost="earliest"' in caught.value.__notes__[0]
    assert read(topic, position, lost="earliest")[0] == [4]
    assert read(topic, position, lost="latest")[0] == []


@pytest.mark.parametrize("lost", ["fail", "earliest"])
def test_a_position_that_is_gone_while_it_is_read_is_named(lost: str, topic: str) -> None:
    write(topic, 1, 2, 3)
    source = KafkaTopic(brokers.kafka(), topic, lost=lost, follow=True)
    found: list[Any] = []
    with closing(source):
        source.open()
        while len(found) < 3:
            found += source.read(10) or ()
        brokers.ask(f"gone-{topic}")
        brokers.ask(f"make-{topic}-3")
        write(topic, 4)
        if lost == "fail":
            with pytest.raises(ConnectorError, match=f'topic "{topic}" .*, partition 0: offset 3 is gone') as caught:
                [source.read(1) for _ in range(100)]
            assert 'lost="earliest"' in caught.value.__notes__[0]
        else:
            while len(found) < 4:
                found += source.read(10) or ()
            assert found[-1].value == 4
            assert source.position()[0] == 1


def test_a_topic_that_was_made_anew_is_named(topic: str) -> None:
    write(topic, 1, 2, partition=2)
    _, position = read(topic)
    brokers.ask(f"gone-{topic}")
    brokers.ask(f"make-{topic}-3")
    with pytest.raises(ConnectorError, match="partition 2 has the offsets 0 to 0, and 2 is next"):
        read(topic, position)
    brokers.ask(f"gone-{topic}")
    brokers.ask(f"make-{topic}-1")
    with pytest.raises(ConnectorError, match=r"had a partition \d, and has 1 partitions now"):
        read(topic, position)
    write(topic, 5)
    assert read(topic, position, lost="earliest")[0] == [5]


def test_a_source_may_begin_at_new_messages_but_reads_all_of_a_new_partition(topic: str) -> None:
    write(topic, 1)
    found, position = read(topic, begin="latest")
    assert (found, position) == ([], {0: 1, 1: 0, 2: 0})
    write(topic, 2, partition=1)
    assert read(topic, {0: 1}, begin="latest")[0] == [2]


def test_a_source_that_ends_leaves_later_messages_to_the_next_run(topic: str) -> None:
    write(topic, 1, 2)
    source = KafkaTopic(brokers.kafka(), topic)
    found: list[Any] = []
    with closing(source):
        source.open()
        write(topic, 3)
        while (records := source.read(10)) is not None:
            found += [record.value for record in records]
    assert found == [1, 2]
    assert read(topic, source.position())[0] == [3]


def test_a_source_that_follows_reads_on_until_the_job_is_stopped(topic: str, tmp_path: Path) -> None:
    write(topic, 0)
    found: list[Any] = []

    def note(record: KafkaRecord) -> None:
        found.append(record.value)
        if len(found) < 3:
            write(topic, len(found), partition=len(found))
        else:
            job.stop()

    env = LocalEnvironment("job", durable=Durable(tmp_path / "state", interval_s=0.02))
    env.from_source(KafkaTopic(brokers.kafka(), topic, follow=True)).sink(note)
    job = env.submit()
    job.wait(timeout_s=20)
    assert found == [0, 1, 2]


def test_a_topic_that_vanishes_fails_the_job(topic: str) -> None:
    write(topic, 1)
    env = LocalEnvironment("job")
    source = KafkaTopic(brokers.kafka(), topic, follow=True)
    env.from_source(source, name="in").sink(lambda _: brokers.ask(f"gone-{topic}"))
    with pytest.raises(FunctionError, match=f'source "in" failed: .*topic "{topic}" at .*is not there'):
        env.submit().wait(timeout_s=20)


def test_a_server_that_dies_fails_the_job(tmp_path: Path) -> None:
    port = brokers.free_port()
    with process_of(str(Path(brokers.__file__).with_name("kafka_broker.py")), str(port)) as (server, line):
        assert line == "ready"
        brokers.ask("make-mortal-1", f"127.0.0.1:{port}")
        source = KafkaTopic(f"127.0.0.1:{port}", "mortal", follow=True, timeout_s=0.5)
        with closing(source):
            source.open()
            assert source.read(1) == []
            server.kill()
            with pytest.raises(ConnectorError, match=r'^topic "mortal" at .*') as caught:
                [source.read(1) for _ in range(100)]
    assert "Are the servers running" in caught.value.__notes__[0]


def test_a_value_that_cannot_be_read_is_named_or_left_out(topic: str) -> None:
    brokers.produce(topic, [b"1", b"{", b"3", b"\xff", b"5"], partition=1)
    source = KafkaTopic(brokers.kafka(), topic)
    with closing(source):
        source.open()
        found: list[Any] = []
        with pytest.raises(ConnectorError, match=r", partition 1, offset 1: the value is not JSON") as caught:
            read_all(source, found)
        assert "bad_values" in caught.value.__notes__[0]
        with pytest.raises(ConnectorError, match="offset 1: the value is not JSON"):
            source.read(10)
    assert [record.value for record in found] == [1]
    assert source.position()[1] == 1
    env = LocalEnvironment("job")
    values: list[Any] = []
    rows = env.from_source(KafkaTopic(brokers.kafka(), topic, bad_values="skip"), name="in")
    rows.map(lambda record: record.value).sink(values.append)
    report = env.submit(autostop=True).report
    assert values == [1, 3, 5]
    assert report.operator("in").failed == 2


def test_keys_headers_times_and_tombstones_come_back(topic: str) -> None:
    given = [
        KafkaRecord({"a": [1, None]}, b"k", (("h", b"\0"), ("h", None)), 1_700_000_000_123),
        KafkaRecord(None, b"k"),
        KafkaRecord("ä", b"k", timestamp_ms=5),
    ]
    env = LocalEnvironment("job")
    env.from_batch(given).sink(KafkaSink(brokers.kafka(), topic))
    env.run()
    source = KafkaTopic(brokers.kafka(), topic)
    with closing(source):
        source.open()
        found: list[KafkaRecord] = []
        while (records := source.read(10)) is not None:
            found += records
    assert [(one.value, one.key, one.headers) for one in found] == [(one.value, one.key, one.headers) for one in given]
    assert [one.timestamp_ms for one in found][::2] == [1_700_000_000_123, 5]
    assert found[1].timestamp_ms
    assert [one.offset for one in found] == [0, 1, 2]
    assert len({one.partition for one in found}) == 1


def test_rows_of_one_key_are_in_one_partition(topic: str) -> None:
    rows = [{"user": user, "n": number} for number in range(20) for user in ("ann", "bob", "eve")]
    env = LocalEnvironment("job")
    env.from_batch(rows).sink(KafkaSink(brokers.kafka(), topic, key=lambda row: row["user"]))
    env.run()
    source = KafkaTopic(brokers.kafka(), topic)
    with closing(source):
        source.open()
        found: dict[tuple[bytes | None, int], list[int]] = {}
        while (records := source.read(10)) is not None:
            for record in records:
                found.setdefault((record.key, record.partition), []).append(record.value["n"])
    assert {key for key, _ in found} == {b"ann", b"bob", b"eve"}
    assert list(found.values()) == [list(range(20))] * 3


REFUSED: dict[str, tuple[object, dict[str, Any]]] = {
    "cannot be written as json: TypeError": ({1}, {}),
    "cannot be written as text: TypeError: it is of type int": (1, {"format": "text"}),
    "cannot be written as bytes: TypeError: it is of type dict": ({}, {"format": "bytes"}),
    "has the key 5": ("a", {"key": lambda row: 5}),
    "has about 1,000,5.. bytes as a message": ("x" * 1_000_000, {}),
    r"has the key '\\ud800'": (KafkaRecord(1, "\ud800"), {}),  # type: ignore[arg-type]
    r"has the key bytearray": (KafkaRecord(1, bytearray(b"k")), {}),  # type: ignore[arg-type]
    r"has the headers {'h': b'1'}": (KafkaRecord(1, None, {"h": b"1"}), {}),  # type: ignore[arg-type]
    r"has the header '\\ud800'": (KafkaRecord(1, None, (("\ud800", b"1"),)), {}),
    "has the header 5": (KafkaRecord(1, None, (("h", 5),)), {}),  # type: ignore[arg-type]
    "has the time 1.5": (KafkaRecord(1, timestamp_ms=1.5), {}),  # type: ignore[arg-type]
    "has the time 9223372036854775808": (KafkaRecord(1, timestamp_ms=1 << 63), {}),
}


@pytest.mark.parametrize("message", REFUSED)
def test_a_record_that_cannot_be_written_is_named(message: str, topic: str) -> None:
    record, options = REFUSED[message]
    with (
        closing(opened(topic, **options)) as sink,
        pytest.raises(ConnectorError, match=f"record .* {message}") as caught,
    ):
        sink.write([record])
    assert caught.value.__notes__
    assert read(topic)[0] == []


def test_what_a_killed_program_had_sent_is_not_read(topic: str) -> None:
    """Its transaction is open on the server, and holds readers up, until the sink is opened again."""
    from confluent_kafka import Producer

    killed = Producer({"bootstrap.servers": brokers.kafka(), "transactional.id": f"sage-part-{topic}"})
    killed.init_transactions(10.0)
    killed.begin_transaction()
    killed.produce(topic, b"1")
    assert killed.flush(10.0) == 0
    assert read(topic)[0] == []
    with closing(opened(topic)) as sink:
        sink.begin()
        sink.write([2])
        sink.commit(sink.prepare(1) or (0, []))
    assert read(topic)[0] == [2]


def test_a_program_that_lost_its_place_writes_nothing(topic: str) -> None:
    with closing(opened(topic)) as first, closing(opened(topic)) as second:
        second.begin()
        second.write([1])
        second.commit(second.prepare(1) or (0, []))
        with pytest.raises(ConnectorError, match="fenced by a newer instance"):
            first.begin()
    assert read(topic)[0] == [1]


def test_a_commit_that_the_servers_have_forgotten_is_refused(topic: str) -> None:
    with closing(opened(topic, 5)) as sink:
        with pytest.raises(ConnectorError, match="do not know any more whether they have checkpoint 5") as caught:
            sink.commit((5, [(b"1", None, (), 0)]))
        assert "offsets.retention.minutes" in caught.value.__notes__[0]
    with closing(opened(topic, 5)) as added_to_the_job:
        added_to_the_job.begin()
        added_to_the_job.commit((6, [(b"1", None, (), 0)]))
    assert read(topic)[0] == [1]


def test_messages_of_a_checkpoint_that_was_left_out_are_refused(topic: str) -> None:
    with closing(opened(topic)) as sink:
        sink.begin()
        sink.write([1])
        sink.commit(sink.prepare(9) or (0, []))
    sink = KafkaSink(brokers.kafka(), topic)
    with closing(sink), pytest.raises(ConnectorError, match=r"has records of checkpoint 9, .* from checkpoint 8"):
        sink.open(f"part-{topic}", 8)


def use_source(servers: str, topic: str, **options: Any) -> None:
    with closing(KafkaTopic(servers, topic, timeout_s=2.0, **options)) as source:
        source.open()


def use_sink(servers: str, topic: str, **options: Any) -> None:
    with closing(KafkaSink(servers, topic, timeout_s=2.0, **options)) as sink:
        sink.open("part", 0)


@pytest.mark.parametrize("use", [use_source, use_sink])
def test_servers_that_cannot_be_used_are_named_without_the_password(use: Callable[..., None]) -> None:
    with pytest.raises(ConnectorError, match=r'^topic "it" at "127\.0\.0\.1:1": .*Connection refused') as caught:
        use("127.0.0.1:1", "it")
    assert "Are the servers running" in caught.value.__notes__[0]
    servers = brokers.kafka("ann", SECRET)
    for password in ("wr0ng", SECRET):
        with pytest.raises(ConnectorError, match=f'^topic "it" at "{servers}"') as caught:
            use(servers, "it", settings={**LOGIN, "sasl.password": password})
        assert ("the password is wrong" if password != SECRET else "is not there") in str(caught.value)
        shown = f"{caught.value!r} {caught.value.__notes__} {caught.value.__cause__!r}"
        assert not any(secret in shown for secret in (SECRET, "wr0ng"))


@pytest.mark.parametrize("use", [use_source, use_sink])
def test_a_topic_that_is_not_there_is_named_with_those_that_are(use: Callable[..., None], topic: str) -> None:
    with pytest.raises(ConnectorError, match=r'^topic "tpoic" at .* is not there') as caught:
        use(brokers.kafka(), "tpoic")
    assert "There are: " in caught.value.__notes__[0]


def test_no_secret_is_in_what_a_job_shows_or_keeps(topic: str, tmp_path: Path) -> None:
    settings = {"sasl.password": SECRET}
    write(topic, 1)
    env = LocalEnvironment("job", durable=tmp_path / "state")
    rows = env.from_source(KafkaTopic(brokers.kafka(), topic, settings=settings), name="in")
    rows.sink(KafkaSink(brokers.kafka(), brokers.topic(tmp_path / "out"), settings=settings), name="out")
    shown = str(env.explain())
    assert '"out" gets each record exactly once, if it is read with isolation.level=read_committed' in shown
    env.run()
    kept = b"".join(path.read_bytes() for path in (tmp_path / "state").rglob("*") if path.is_file())
    assert SECRET not in shown
    assert SECRET.encode() not in kept


def test_a_setting_that_the_library_refuses_is_named() -> None:
    with pytest.raises(ConnectorError, match=r'No such configuration property: "no\.such"'):
        use_source("127.0.0.1:1", "it", settings={"no.such": 1})


WRONG: dict[str, Callable[[], object]] = {
    "KafkaTopic: servers is 5": lambda: KafkaTopic(5, "t"),  # type: ignore[arg-type]
    "KafkaTopic: topic is ''": lambda: KafkaTopic("s", ""),
    "KafkaTopic: begin is 'now'": lambda: KafkaTopic("s", "t", begin="now"),
    "KafkaTopic: lost is 'skip'": lambda: KafkaTopic("s", "t", lost="skip"),
    'KafkaTopic: "group.id" is in settings': lambda: KafkaTopic("s", "t", settings={"group.id": "g"}),
    "KafkaSink: format is 'avro'": lambda: KafkaSink("s", "t", format="avro"),
    "KafkaSink: key is 'user'": lambda: KafkaSink("s", "t", key="user"),  # type: ignore[arg-type]
    "KafkaSink: timeout_s is 0": lambda: KafkaSink("s", "t", timeout_s=0),
}


@pytest.mark.parametrize("message", WRONG)
def test_an_option_that_cannot_work_is_refused_where_it_is_given(message: str) -> None:
    with pytest.raises(GraphError, match=message) as caught:
        WRONG[message]()
    assert caught.value.__notes__


MOCK = """
import sys
from confluent_kafka import Producer
producer = Producer({"test.mock.num.brokers": 3, "log_level": 0})
print(",".join(f"{one.host}:{one.port}" for one in producer.list_topics(timeout=10).brokers.values()), flush=True)
for topic in ("in", "out"):
    producer.list_topics(topic, timeout=10)
sys.stdin.read()
"""


def test_the_mock_cluster_of_the_library_serves_both(tmp_path: Path) -> None:
    """It has another hand, three servers, and transactions whose messages can be seen at once."""
    from confluent_kafka import Producer

    with process_of("-c", MOCK) as (_, servers):
        producer = Producer({"bootstrap.servers": servers})
        for number in range(200):
            producer.produce("in", json.dumps(number).encode())
        assert producer.flush(10.0) == 0
        producer.close()
        found: list[Any] = []
        for run in ("durable", None):
            env = LocalEnvironment("job", durable=run and Durable(tmp_path / run, interval_s=0.02))
            rows = env.from_source(KafkaTopic(servers, "in"), name="in")
            rows.map(lambda record: record.value).sink(KafkaSink(servers, "out"), name="out")
            env.run()
        env = LocalEnvironment("back")
        env.from_source(KafkaTopic(servers, "out")).map(lambda record: record.value).sink(found.append)
        env.run()
    assert sorted(found) == sorted([*range(200)] * 2)


def test_the_program_of_the_docs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (block,) = [
        block for block in blocks_of(ROOT / "docs/ready-made/connectors.md") if "def sort_orders(" in block.code
    ]
    names: dict[str, Any] = {"LocalEnvironment": LocalEnvironment}
    exec(block.code, names)
    for name in ("orders", "large-orders"):
        brokers.ask(f"make-{name}-3")
    for price in (5, 9, 8):
        write("orders", {"user": "ann", "price": price})
        names["sort_orders"](brokers.kafka())
    assert [row["price"] for row in read("large-orders")[0]] == [9, 8]
