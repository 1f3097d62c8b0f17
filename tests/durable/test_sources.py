"""The contract of sources with positions, for each ready-made one: nothing is lost and nothing comes twice."""

from __future__ import annotations

import csv
import json
import pickle
import sqlite3
from collections import Counter
from contextlib import closing
from typing import TYPE_CHECKING, Any, NamedTuple

import pytest
from support import brokers
from support.needs import needs_parquet
from support.postgres_server import execute, needs_postgres, server

from sage import ConnectorError, Durable, LocalEnvironment
from sage.connectors import Csv, JsonLines, JsonLinesFiles, Parquet, PostgresTable, SqliteTable, Text
from sage.testing import simulate

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from pathlib import Path

    from sage import Source
    from sage._runtime.backend import Backend

TEXTS = ["", "plain", "ä ß €", 'a "quoted" word', "a, b", "one\nand two\r\nand three", " spaces ", "\\"]


def value(number: int) -> dict[str, str]:
    return {"id": str(number), "text": TEXTS[number % len(TEXTS)]}


def line(number: int) -> str:
    return f"{number} {TEXTS[number % len(TEXTS)].splitlines()[:1]}"


def append_json(folder: Path, numbers: Sequence[int]) -> None:
    with (folder / f"{min(numbers) // 10}.jsonl").open("a", encoding="utf-8") as file:
        file.writelines(f"{json.dumps(value(number))}\n" for number in numbers)


def append_text(folder: Path, numbers: Sequence[int]) -> None:
    with (folder / f"{min(numbers) // 10}.txt").open("a", encoding="utf-8") as file:
        file.writelines(f"{line(number)}\n" for number in numbers)


def append_csv(folder: Path, numbers: Sequence[int]) -> None:
    path = folder / f"{min(numbers) // 10}.csv"
    is_new = not path.exists()
    with path.open("a", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, ["id", "text"])
        if is_new:
            writer.writeheader()
        writer.writerows(map(value, numbers))


def append_parquet(folder: Path, numbers: Sequence[int]) -> None:
    """Write a new file with groups of three rows: a file of this format does not grow."""
    pyarrow: Any = pytest.importorskip("pyarrow")
    parquet: Any = pytest.importorskip("pyarrow.parquet")
    rows = pyarrow.Table.from_pylist(list(map(value, numbers)))
    parquet.write_table(rows, folder / f"{min(numbers):03}.parquet", row_group_size=3)


def append_rows(folder: Path, numbers: Sequence[int]) -> None:
    with closing(sqlite3.connect(folder / "a b?.db")) as database, database:
        database.execute("CREATE TABLE IF NOT EXISTS rows (at INTEGER, id TEXT, text TEXT)")
        database.executemany(
            "INSERT INTO rows VALUES (:at, :id, :text)", [ticket(number) for number in sorted(numbers, reverse=True)]
        )


def append_to_postgres(folder: Path, numbers: Sequence[int]) -> None:
    address = server().address(folder)
    execute(address, "CREATE TABLE IF NOT EXISTS rows (at INTEGER, id TEXT, text TEXT)")
    for number in sorted(numbers, reverse=True):
        execute(address, "INSERT INTO rows VALUES ($1, $2, $3)", *ticket(number).values())


def append_to_kafka(folder: Path, numbers: Sequence[int]) -> None:
    brokers.produce(brokers.topic(folder), [json.dumps(value(number)).encode() for number in numbers])


def append_to_redis(folder: Path, numbers: Sequence[int]) -> None:
    brokers.add(brokers.stream(folder), list(map(value, numbers)))


def postgres(folder: Path, **options: Any) -> PostgresTable:
    return PostgresTable(server().address(folder), **options, by="at")


def ticket(number: int) -> dict[str, Any]:
    """Seven rows in a row have the same time."""
    return {"at": number // 7, **value(number)}


class Case(NamedTuple):
    """A source: how records get to where it reads, how it is made, and its record for a number."""

    append: Callable[[Path, Sequence[int]], None]
    source: Callable[[Path], Source[Any]]
    record: Callable[[int], Any]
    is_ordered: bool = True


SOURCES = {
    "JsonLines": Case(append_json, lambda folder: JsonLines(folder / "*.jsonl"), value),
    "Text": Case(append_text, lambda folder: Text(folder / "*.txt"), line),
    "Csv": Case(append_csv, lambda folder: Csv(folder / "*.csv"), value),
    "Parquet": Case(append_parquet, lambda folder: Parquet(folder), value),
    "SqliteTable": Case(
        append_rows, lambda folder: SqliteTable(folder / "a b?.db", "rows", by="at"), ticket, is_ordered=False
    ),
    "SqliteTable of a query": Case(
        append_rows,
        lambda folder: SqliteTable(folder / "a b?.db", query="SELECT * FROM rows -- all of them\n;", by="at"),
        ticket,
        is_ordered=False,
    ),
    "PostgresTable": Case(append_to_postgres, lambda folder: postgres(folder, table="rows"), ticket, is_ordered=False),
    "PostgresTable of a query": Case(
        append_to_postgres,
        lambda folder: postgres(folder, query="SELECT * FROM rows WHERE text NOT LIKE '%100%' -- all of them\n;"),
        ticket,
        is_ordered=False,
    ),
    "KafkaTopic": Case(
        append_to_kafka,
        lambda folder: brokers.KafkaValues(brokers.kafka(), brokers.topic(folder, has_to_be_there=False)),
        value,
        is_ordered=False,
    ),
    "RedisStream": Case(
        append_to_redis, lambda folder: brokers.RedisValues(brokers.redis(), brokers.stream(folder)), value
    ),
}


MARKS = {
    "Parquet": needs_parquet,
    "PostgresTable": needs_postgres,
    "KafkaTopic": brokers.needs_kafka,
    "RedisStream": brokers.needs_redis,
}


@pytest.fixture(params=[pytest.param(name, marks=MARKS.get(name.split()[0], ())) for name in SOURCES])
def case(request: pytest.FixtureRequest) -> Case:
    return SOURCES[request.param]


def read(source: Source[Any], position: Any = None, records_max: int = 100, reads: int = 100) -> tuple[list[Any], Any]:
    """Return the records of so many reads from a position on, and the position after them."""
    open_at: Any = source.open
    found: list[Any] = []
    try:
        open_at(pickle.loads(pickle.dumps(position)))
        while reads and (records := source.read(records_max)) is not None:
            assert len(records) <= records_max
            found += records
            reads -= bool(records)  # a server may have nothing yet
        return found, source.position()
    finally:
        source.close()


def same(case: Case, found: list[Any], wanted: list[Any]) -> bool:
    """Return whether the records are the same, in any order if the source has no order among some."""
    return found == wanted if case.is_ordered else Counter(map(repr, found)) == Counter(map(repr, wanted))


def fill(case: Case, folder: Path, count: int) -> list[Any]:
    for begin in range(0, count, 10):
        case.append(folder, range(begin, min(begin + 10, count)))
    return [case.record(number) for number in range(count)]


@pytest.mark.parametrize("records_max", [1, 3, 100])
def test_all_records_come_once_in_order(case: Case, records_max: int, tmp_path: Path) -> None:
    wanted = fill(case, tmp_path, 25)
    assert same(case, read(case.source(tmp_path), records_max=records_max)[0], wanted)


def test_from_any_position_the_rest_comes(case: Case, tmp_path: Path) -> None:
    wanted = fill(case, tmp_path, 25)
    for cut in range(26):
        first, position = read(case.source(tmp_path), records_max=1, reads=cut)
        rest, _ = read(case.source(tmp_path), position, records_max=7)
        assert len(first) == cut
        assert same(case, first + rest, wanted)


def test_after_the_end_only_new_records_come(case: Case, tmp_path: Path) -> None:
    wanted = fill(case, tmp_path, 15)
    _, position = read(case.source(tmp_path))
    assert read(case.source(tmp_path), position) == ([], position)
    case.append(tmp_path, range(15, 18))
    case.append(tmp_path, range(20, 23))
    wanted = [case.record(number) for number in (15, 16, 17, 20, 21, 22)]
    found, position = read(case.source(tmp_path), position)
    assert same(case, found, wanted)
    assert read(case.source(tmp_path), position) == ([], position)


def test_a_source_that_was_opened_is_closed_without_a_read(case: Case, tmp_path: Path) -> None:
    fill(case, tmp_path, 3)
    source = case.source(tmp_path)
    source.open()
    source.close()


def test_nothing_to_read_from_is_an_error_that_says_where_it_looked(case: Case, tmp_path: Path) -> None:
    with pytest.raises(ConnectorError, match=r"^no (file|database)|has no table|does not exist|is not there") as caught:
        read(case.source(tmp_path))
    assert any(
        any(word in note for word in ("The program runs in", "There are: ", "search_path", "XADD"))
        for note in caught.value.__notes__
    )


def test_a_job_that_is_killed_anywhere_has_each_record_once(case: Case, tmp_path: Path) -> None:
    wanted = Counter(json.dumps(record, ensure_ascii=False) for record in fill(case, tmp_path, 25))

    def program(backend: Callable[[], Backend], folder: Path) -> Counter[str]:
        env = LocalEnvironment("job", backend=backend, durable=Durable(folder / "state", interval_s=0.002))
        env.from_source(case.source(tmp_path), name="in").sink(JsonLinesFiles(folder / "out"), name="out")
        env.run()
        texts = [path.read_text("utf-8") for path in (folder / "out").iterdir()]
        found = Counter(line for text in texts for line in text.splitlines())
        assert found == wanted
        return found

    simulate(program, seeds=range(5), crashes=2)
