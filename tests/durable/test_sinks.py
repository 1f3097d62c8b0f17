"""The contract of sinks with transactions, for each ready-made one: records appear with their checkpoint, and once."""

from __future__ import annotations

import copy
import pickle
import shutil
import sqlite3
from collections import Counter
from contextlib import closing, suppress
from typing import TYPE_CHECKING, Any, NamedTuple

import pytest
from support import brokers
from support.needs import needs_parquet
from support.object_server import needs_objects, objects
from support.postgres_server import execute, needs_postgres, server

from sage import ConnectorError, Durable, FunctionError, LocalEnvironment
from sage.connectors import (
    Csv,
    CsvFiles,
    JsonLines,
    JsonLinesFiles,
    KafkaSink,
    Parquet,
    ParquetFiles,
    PostgresSink,
    PostgresTable,
    RedisStreamSink,
    SqliteSink,
    SqliteTable,
    Text,
    TextFiles,
)
from sage.testing import simulate

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from sage import Source, TransactionalSink
    from sage._runtime.backend import Backend

TEXTS = ["", "plain", "ä ß €", 'a "quoted" word', "a, b", "one\nand two\r\nand three", " spaces ", "\\", "\r"]


def value(number: int) -> dict[str, str]:
    return {"id": str(number), "text": TEXTS[number % len(TEXTS)]}


def line(number: int) -> str:
    return f"{number} {TEXTS[number % len(TEXTS)].splitlines()[:1]}"


def rows_in(folder: Path, **options: Any) -> SqliteSink:
    """Return a sink for a table, which is made if it is not there."""
    with closing(sqlite3.connect(folder / "rows.db")) as database:
        database.execute("CREATE TABLE IF NOT EXISTS rows (id TEXT PRIMARY KEY, text TEXT NOT NULL)")
    return SqliteSink(folder / "rows.db", "rows", **options)


def rows_in_postgres(folder: Path, **options: Any) -> PostgresSink:
    address = server().address(folder)
    execute(address, "CREATE TABLE IF NOT EXISTS rows (id TEXT PRIMARY KEY, text TEXT NOT NULL)")
    return PostgresSink(address, "rows", **options)


def back_from_postgres(folder: Path) -> PostgresTable:
    return PostgresTable(server().address(folder), "rows", by="id")


def share(folder: Path, other: Path) -> None:
    """Let the sinks of another folder find the same rows: transactions are not among them until their commit."""
    server().share(folder, other)


def copy_objects(folder: Path, other: Path) -> None:
    objects().copy(folder, other)


class Case(NamedTuple):
    """A sink: how it is made, its record for a number, one that it cannot write, how it is read back, and copied."""

    sink: Callable[[Path], TransactionalSink[Any]]
    record: Callable[[int], Any]
    refused: Any
    source: Callable[[Path], Source[Any]]
    copy: Callable[[Path, Path], object] = shutil.copytree


SINKS = {
    "JsonLinesFiles": Case(
        lambda folder: JsonLinesFiles(folder / "out"), value, {1}, lambda folder: JsonLines(folder / "out" / "*.jsonl")
    ),
    "TextFiles": Case(
        lambda folder: TextFiles(folder / "out"), line, "a\nb", lambda folder: Text(folder / "out" / "*.txt")
    ),
    "CsvFiles": Case(
        lambda folder: CsvFiles(folder / "out"), value, {"id": 1}, lambda folder: Csv(folder / "out" / "*.csv")
    ),
    "CsvFiles in folders": Case(
        lambda folder: CsvFiles(folder / "out", partition_by="text", file_bytes_max=20),
        value,
        {"id": 1},
        lambda folder: Csv(folder / "out"),
    ),
    "ParquetFiles": Case(
        lambda folder: ParquetFiles(folder / "out"), value, {"name": 1}, lambda folder: Parquet(folder / "out")
    ),
    "ParquetFiles in folders": Case(
        lambda folder: ParquetFiles(folder / "out", partition_by=["text", "id"], file_bytes_max=20),
        value,
        {"id": 1},
        lambda folder: Parquet(folder / "out"),
    ),
    "Objects, JsonLinesFiles": Case(
        lambda folder: JsonLinesFiles(objects().url(folder)),
        value,
        {1},
        lambda folder: JsonLines(f"{objects().url(folder)}/*.jsonl"),
        copy_objects,
    ),
    "Objects, CsvFiles in folders": Case(
        lambda folder: CsvFiles(objects().url(folder), partition_by="text", file_bytes_max=20),
        value,
        {"id": 1},
        lambda folder: Csv(objects().url(folder)),
        copy_objects,
    ),
    "SqliteSink": Case(rows_in, value, {"name": 1}, lambda folder: SqliteTable(folder / "rows.db", "rows", by="id")),
    "SqliteSink with a key": Case(
        lambda folder: rows_in(folder, key="id"),
        value,
        {"text": "no key"},
        lambda folder: SqliteTable(folder / "rows.db", "rows", by="id"),
    ),
    "PostgresSink": Case(rows_in_postgres, value, {"name": 1}, back_from_postgres, share),
    "PostgresSink with a key": Case(
        lambda folder: rows_in_postgres(folder, key="id"), value, {"text": "no key"}, back_from_postgres, share
    ),
    "KafkaSink": Case(
        lambda folder: KafkaSink(brokers.kafka(), brokers.topic(folder)),
        value,
        {1},
        lambda folder: brokers.KafkaValues(brokers.kafka(), brokers.topic(folder)),
        brokers.share,
    ),
    "RedisStreamSink": Case(
        lambda folder: RedisStreamSink(brokers.redis(), brokers.stream(folder)),
        value,
        {"id": None},
        lambda folder: brokers.RedisValues(brokers.redis(), brokers.stream(folder)),
        brokers.share,
    ),
}


MARKS = {
    "ParquetFiles": needs_parquet,
    "PostgresSink": needs_postgres,
    "KafkaSink": brokers.needs_kafka,
    "RedisStreamSink": brokers.needs_redis,
    "Objects,": needs_objects,
}


@pytest.fixture(params=[pytest.param(name, marks=MARKS.get(name.split()[0], ())) for name in SINKS])
def case(request: pytest.FixtureRequest) -> Case:
    return SINKS[request.param]


def rows(case: Case, folder: Path) -> Counter[str]:
    """Return all records that can be seen."""
    source = case.source(folder)
    found: list[Any] = []
    with suppress(ConnectorError):  # nothing is there
        source.open()
    while records := source.read(100):
        found += records
    source.close()
    return Counter(map(repr, found))


def records(case: Case, *numbers: int) -> list[Any]:
    return [case.record(number) for number in numbers]


def wanted(case: Case, *numbers: int) -> Counter[str]:
    return Counter(map(repr, records(case, *numbers)))


def opened(case: Case, folder: Path, checkpoint: int = 0, part: str = "key-out-0") -> TransactionalSink[Any]:
    sink = copy.deepcopy(case.sink(folder))
    sink.open(part, checkpoint)
    return sink


def test_records_appear_with_the_commit_and_once(case: Case, tmp_path: Path) -> None:
    sink = opened(case, tmp_path)
    sink.begin()
    sink.write(records(case, 1, 2))
    sink.write(records(case, 3))
    assert rows(case, tmp_path) == Counter()
    token = sink.prepare(1)
    sink.begin()
    sink.write(records(case, 4))
    assert rows(case, tmp_path) == Counter()
    for _ in range(2):
        sink.commit(token)
        assert rows(case, tmp_path) == wanted(case, 1, 2, 3)
    sink.abort()
    sink.close()
    assert rows(case, tmp_path) == wanted(case, 1, 2, 3)


def test_another_process_commits_a_token(case: Case, tmp_path: Path) -> None:
    first = opened(case, tmp_path)
    first.begin()
    first.write(records(case, 1, 2))
    token = pickle.loads(pickle.dumps(first.prepare(7)))
    first.close()
    for _ in range(2):
        second = opened(case, tmp_path, 7)
        second.commit(token)
        second.begin()
        second.abort()
        second.close()
        assert rows(case, tmp_path) == wanted(case, 1, 2)


def test_a_checkpoint_that_was_not_complete_leaves_nothing(case: Case, tmp_path: Path) -> None:
    killed, left = tmp_path / "killed", tmp_path / "left"
    killed.mkdir()
    first = opened(case, killed)
    first.begin()
    first.write(records(case, 1))
    first.commit(first.prepare(1))
    first.begin()
    first.write(records(case, 2))
    first.prepare(2)
    first.begin()
    first.write(records(case, 3))
    case.copy(killed, left)
    first.abort()
    first.close()
    second = opened(case, left, 1)
    second.begin()
    second.write(records(case, 2, 3))
    second.commit(second.prepare(2))
    second.begin()
    second.abort()
    second.close()
    assert rows(case, left) == wanted(case, 1, 2, 3)


def test_an_empty_transaction_has_no_token(case: Case, tmp_path: Path) -> None:
    sink = opened(case, tmp_path)
    sink.begin()
    assert sink.prepare(1) is None
    sink.begin()
    sink.abort()
    sink.close()
    assert rows(case, tmp_path) == Counter()


def test_parts_do_not_touch_each_other(case: Case, tmp_path: Path) -> None:
    sinks = [opened(case, tmp_path, part=f"key-out-{index}") for index in (0, 1, 10)]
    tokens = []
    for number, sink in enumerate(sinks):
        sink.begin()
        sink.write(records(case, number))
        tokens.append(sink.prepare(3))
    opened(case, tmp_path, 2, part="key-out-1").close()
    for sink, token in (*zip(sinks[::2], tokens[::2], strict=True),):
        sink.commit(token)
    for sink in sinks:
        sink.close()
    assert rows(case, tmp_path) == wanted(case, 0, 2)


def test_a_job_that_is_not_durable_writes_all_or_nothing(case: Case, tmp_path: Path) -> None:
    numbers = range(30)
    env = LocalEnvironment("job")
    env.from_batch(records(case, *numbers)).sink(case.sink(tmp_path), name="out")
    env.run()
    assert rows(case, tmp_path) == wanted(case, *numbers)
    env = LocalEnvironment("job")
    env.from_batch([*records(case, 31, 32), case.refused]).sink(case.sink(tmp_path), name="out")
    with pytest.raises(FunctionError, match='operator "out" failed on a batch up to record') as caught:
        env.run()
    assert repr(case.refused) in str(caught.value)
    assert caught.value.__cause__ is not None
    assert caught.value.__cause__.__notes__
    assert rows(case, tmp_path) == wanted(case, *numbers)


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=MARKS.get(name.split()[0], ()))
        for name, case in SINKS.items()
        if case.copy is shutil.copytree
    ],
)
def test_a_job_that_is_killed_anywhere_writes_each_record_once(name: str) -> None:
    """A server does not go back with its folder, so the tests of each server kill whole programs."""
    case = SINKS[name]
    numbers = range(40)

    def program(backend: Callable[[], Backend], folder: Path) -> Counter[str]:
        env = LocalEnvironment("job", backend=backend, durable=Durable(folder / "state", interval_s=0.002))
        stream = env.from_batch(records(case, *numbers), name="in").rebalance()
        stream.sink(case.sink(folder), name="out", parallelism=2)
        env.run()
        found = rows(case, folder)
        assert found == wanted(case, *numbers)
        return found

    simulate(program, seeds=range(5), crashes=2)
