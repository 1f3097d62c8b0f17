"""SQLite as a source and a sink: equal values, keys, and databases that cannot be used."""

from __future__ import annotations

import os
import shutil
import sqlite3
from contextlib import closing
from typing import TYPE_CHECKING, Any

import pytest

from sage import ConnectorError, Durable, FunctionError, GraphError, LocalEnvironment
from sage.connectors import SqliteSink, SqliteTable

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable
    from pathlib import Path


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """Return a database with one table."""
    path = tmp_path / "orders.db"
    execute(path, "CREATE TABLE orders (id INTEGER PRIMARY KEY, name TEXT NOT NULL COLLATE NOCASE, price)")
    return path


def execute(path: Path, command: str, *values: Any) -> list[Any]:
    with closing(sqlite3.connect(path)) as database, database:
        return database.execute(command, values).fetchall()


def insert(path: Path, *rows: tuple[Any, ...]) -> None:
    with closing(sqlite3.connect(path)) as database, database:
        database.executemany("INSERT INTO orders VALUES (?, ?, ?)", rows)


def read(path: Path, position: Any = None, records_max: int = 100, **options: Any) -> tuple[list[Any], Any]:
    """Return the values of all rows from a position on, and the position after them."""
    source = SqliteTable(path, **{"table": "orders", "by": "id", **options})
    source.open(position)
    found: list[Any] = []
    try:
        while (rows := source.read(records_max)) is not None:
            assert len(rows) <= records_max
            found += [tuple(row.values()) for row in rows]
    finally:
        source.close()
    return found, source.position()


@pytest.mark.parametrize("records_max", [1, 2, 3, 100])
def test_rows_with_the_value_of_the_last_one_are_not_lost(path: Path, records_max: int) -> None:
    insert(path, (1, "a", 5), (2, "b", 5), (3, "c", 5.0), (9, "d", 7))
    options: dict[str, Any] = {"query": "SELECT name, price FROM orders", "table": None, "by": "price"}
    found, position = read(path, records_max=records_max, **options)
    assert sorted(found) == [("a", 5), ("b", 5), ("c", 5), ("d", 7)]
    insert(path, (4, "d", 7), (5, "d", 7), (6, "e", 8), (7, "early", 6))
    found, position = read(path, position, records_max, **options)
    assert found == [("d", 7), ("d", 7), ("e", 8)]
    assert read(path, position, records_max, **options) == ([], position)


@pytest.mark.parametrize("by", ["id", "name"])
def test_a_row_that_changes_is_not_read_again_if_its_value_is_unique(path: Path, by: str) -> None:
    """Otherwise, a job that notes in the table what it has done with a row would have its last row forever."""
    execute(path, "CREATE UNIQUE INDEX one_name ON orders (name)")
    insert(path, (1, "a", 0), (2, "b", 0))
    found, position = read(path, by=by)
    assert len(found) == 2
    execute(path, "UPDATE orders SET price = 5")
    assert read(path, position, by=by) == ([], position)
    insert(path, (3, "c", 0))
    assert read(path, position, by=by)[0] == [(3, "c", 0)]


@pytest.mark.parametrize(
    "index", ["UNIQUE INDEX one ON orders (price, name)", "UNIQUE INDEX one ON orders (price) WHERE id < 3"]
)
def test_an_index_of_more_or_less_does_not_make_a_column_unique(path: Path, index: str) -> None:
    execute(path, f"CREATE {index}")
    insert(path, (1, "a", 7), (2, "b", 8))
    _, position = read(path, by="price")
    insert(path, (3, "c", 8))
    assert read(path, position, by="price")[0] == [(3, "c", 8)]


def test_values_that_only_the_table_takes_for_equal(path: Path) -> None:
    insert(path, (1, "b", 0), (2, "B", 0), (3, "a", 0), (4, "A", 0))
    found, position = read(path, records_max=1, by="name")
    assert [row[1] for row in found] == ["A", "B", "a", "b"]
    assert read(path, position, by="name") == ([], position)


@pytest.mark.parametrize("values", [[1, 2.5, 3], ["2026-01-01", "2026-01-02"], [b"\x00", b"\x01"], [-5, "x", b"y"]])
def test_any_values_with_an_order(path: Path, values: list[Any]) -> None:
    insert(path, *((id_, "name", value) for id_, value in enumerate(reversed(values))))
    assert [row[2] for row in read(path, records_max=1, by="price")[0]] == values


def test_others_may_write_while_a_source_reads(path: Path) -> None:
    insert(path, *((number, "a", 0) for number in range(10)))
    source = SqliteTable(path, "orders", by="id")
    source.open()
    assert source.read(3) == [{"id": number, "name": "a", "price": 0} for number in range(3)]
    insert(path, (10, "b", 0))
    rest = source.read(100)
    assert rest is not None
    assert [row["id"] for row in rest] == list(range(3, 11))
    source.close()


def test_a_transaction_that_a_kill_has_left_is_undone(path: Path) -> None:
    insert(path, *((number, "a", 0) for number in range(1000)))
    left = path.with_name("left.db")
    with closing(sqlite3.connect(path, isolation_level=None)) as killed:
        killed.execute("PRAGMA cache_size = 2")  # so that changes are in the file before the commit
        killed.execute("BEGIN")
        killed.execute("UPDATE orders SET price = 1")
        shutil.copy(path, left)
        shutil.copy(f"{path}-journal", f"{left}-journal")
        killed.execute("ROLLBACK")
    assert {row[2] for row in read(left)[0]} == {0}


def test_a_query_that_writes_is_refused(path: Path) -> None:
    with pytest.raises(ConnectorError, match="syntax error"):
        source_of(path, table=None, query="DELETE FROM orders RETURNING id")


def source_of(path: Path, **options: Any) -> None:
    source = SqliteTable(path, **{"table": "orders", "by": "id", **options})
    try:
        source.open()
    finally:
        source.close()


def sink_of(path: Path, table: str = "orders", **options: Any) -> None:
    sink = SqliteSink(path, table, **options)
    try:
        sink.open("part", 0)
    finally:
        sink.close()


UNUSABLE: dict[str, tuple[Callable[[Path], None], str, str]] = {
    "no table": (lambda path: source_of(path, table="odrers"), 'has no table "odrers"', 'There are: "orders"'),
    "no table to write": (lambda path: sink_of(path, "odrers"), 'has no table "odrers"', 'There are: "orders"'),
    "no column": (
        lambda path: source_of(path, by="at"),
        'has no column "at" in "orders"',
        'There are: "id", "name", "price"',
    ),
    "no key": (lambda path: sink_of(path, key="at"), 'has no column "at" in "orders"', '"id", "name", "price"'),
    "not unique": (
        lambda path: sink_of(path, key=["name", "price"]),
        '"name", "price" is not a key of "orders"',
        'CREATE UNIQUE INDEX name ON "orders" ("name", "price")',
    ),
    "NULL": (lambda path: source_of(path, by="price"), 'a row has NULL in the column "price"', "another column"),
}


@pytest.mark.parametrize("name", UNUSABLE)
def test_a_database_that_does_not_fit_is_named_with_what_it_has(name: str, path: Path) -> None:
    use, message, note = UNUSABLE[name]
    insert(path, (1, "a", None))
    with pytest.raises(ConnectorError) as caught:
        use(path)
    assert str(caught.value).startswith(f'database "{path}"')
    assert message in str(caught.value)
    assert note in caught.value.__notes__[0]


def test_a_query_that_is_wrong_is_named(path: Path) -> None:
    with pytest.raises(ConnectorError, match=rf'database "{path}": near "FROM": syntax error'):
        source_of(path, table=None, query="SELECT FROM orders")


@pytest.mark.parametrize("use", [source_of, sink_of])
def test_a_file_that_is_not_a_database_is_named(use: Callable[[Path], None], tmp_path: Path) -> None:
    file = tmp_path / "text.db"
    file.write_text("no database" * 1_000)
    with pytest.raises(ConnectorError, match=rf'database "{file}": file is not a database') as caught:
        use(file)
    assert caught.value.__notes__ == ["Name another file."]
    with pytest.raises(ConnectorError, match=rf'no database "{tmp_path / "missing.db"}"') as caught:
        use(tmp_path / "missing.db")
    assert "The program runs in" in caught.value.__notes__[0]
    assert not (tmp_path / "missing.db").exists()


@pytest.mark.parametrize("use", [source_of, sink_of])
def test_a_database_that_another_program_has_locked_is_named(use: Callable[..., None], path: Path) -> None:
    with closing(sqlite3.connect(path, isolation_level=None)) as other:
        other.execute("BEGIN EXCLUSIVE")
        with pytest.raises(ConnectorError, match=rf'database "{path}": database is locked') as caught:
            use(path, wait_s=0)
        assert "wait_s=" in caught.value.__notes__[0]
    use(path, wait_s=0)


@pytest.mark.parametrize("place", ["file", "folder"])
def test_a_place_without_permission_is_named(place: str, path: Path) -> None:
    locked = path if place == "file" else path.parent
    locked.chmod(0o500)
    if os.access(locked, os.W_OK):
        pytest.skip("this user may write everything")
    with pytest.raises(ConnectorError, match=rf'database "{path}": ') as caught:
        sink_of(path)
    locked.chmod(0o700)
    assert "This user must be allowed to" in caught.value.__notes__[0]


WRONG: dict[str, Callable[[], object]] = {
    "SqliteTable: path is ''": lambda: SqliteTable("", "orders", by="id"),
    "SqliteTable: it reads one table or one query": lambda: SqliteTable("orders.db", by="id"),
    "SqliteSink: path is 5": lambda: SqliteSink(5, "orders"),  # type: ignore[arg-type]
    "SqliteTable: table is 5": lambda: SqliteTable("orders.db", 5, by="id"),  # type: ignore[arg-type]
    "SqliteTable: query is ''": lambda: SqliteTable("orders.db", query="", by="id"),
    "SqliteTable: by is None": lambda: SqliteTable("orders.db", "orders", by=None),  # type: ignore[arg-type]
    "SqliteSink: table is None": lambda: SqliteSink("orders.db", None),  # type: ignore[arg-type]
    "SqliteSink: a column of key is 5": lambda: SqliteSink("orders.db", "orders", key=5),  # type: ignore[arg-type]
    "SqliteSink: a column of key is ''": lambda: SqliteSink("orders.db", "orders", key=["id", ""]),
    "SqliteSink: wait_s is -1": lambda: SqliteSink("orders.db", "orders", wait_s=-1),
}


@pytest.mark.parametrize("message", WRONG)
def test_an_option_that_cannot_work_is_refused_where_it_is_given(message: str) -> None:
    with pytest.raises(GraphError, match=message) as caught:
        WRONG[message]()
    assert caught.value.__notes__


def test_a_table_that_has_vanished_is_named(path: Path) -> None:
    insert(path, (1, "a", 0), (2, "b", 0))
    source = SqliteTable(path, "orders", by="id")
    source.open()
    source.read(1)
    sink = SqliteSink(path, "orders")
    sink.open("part", 0)
    sink.write([{"id": 3, "name": "c"}])
    execute(path, "DROP TABLE orders")
    for use in (lambda: source.read(1), lambda: sink.prepare(1)):
        with pytest.raises(ConnectorError, match=rf'database "{path}": .*no such table: orders'):
            use()
    source.close()
    sink.close()


def run(path: Path, rows: Iterable[Any], *, durable: Durable | None = None, **options: Any) -> None:
    env = LocalEnvironment("job", durable=durable)
    env.from_batch(list(rows), name="rows").sink(SqliteSink(path, "orders", **options), name="out")
    env.run()


REFUSED: dict[str, tuple[object, str]] = {
    "is not a row of table": (["id"], "Map it to a dict"),
    "has 'nmae', which is not a column of table": ({"id": 1, "nmae": "a"}, 'Its columns are: "id", "name", "price".'),
    "lacks 'id', a key of table": ({"name": "a"}, 'Its columns are: "id"'),
    "has a list in 'price'": ({"id": 1, "name": "a", "price": [5]}, "json.dumps"),
    "cannot be written .*NOT NULL constraint failed: orders.name": ({"id": 1}, "Nothing of its checkpoint"),
    "cannot be written .*OverflowError": ({"id": 1 << 64, "name": "a"}, "Nothing of its checkpoint"),
    "cannot be written .*UnicodeEncodeError": ({"id": 1, "name": "\ud800"}, "Nothing of its checkpoint"),
}


@pytest.mark.parametrize("message", REFUSED)
@pytest.mark.parametrize("is_durable", [False, True])
def test_a_record_that_cannot_be_written_is_named_and_nothing_is_written(
    message: str, is_durable: bool, path: Path
) -> None:
    record, note = REFUSED[message]
    durable = Durable(path.parent / "state", interval_s=100) if is_durable else None
    rows = [{"id": 7, "name": "a"}, record, {"id": 8, "name": "a"}]
    with pytest.raises(FunctionError, match=rf'operator "out" failed .*record .*{message}') as caught:
        run(path, rows, durable=durable, key="id")
    assert caught.value.__cause__ is not None
    assert note in caught.value.__cause__.__notes__[0]
    assert execute(path, "SELECT * FROM orders") == []
    # Corrected, the next run writes all of them.
    run(path, [rows[0], {"id": 1, "name": "b"}, rows[2]], durable=durable, key="id")
    assert execute(path, "SELECT id, name FROM orders") == [(1, "b"), (7, "a"), (8, "a")]


def test_a_row_with_a_key_takes_the_place_of_another(path: Path) -> None:
    insert(path, (1, "a", 10), (2, "b", 20))
    run(path, [{"id": 1, "price": 11, "name": "a"}, {"id": 3, "name": "c"}, {"id": 3, "name": "d"}], key="id")
    assert execute(path, "SELECT * FROM orders") == [(1, "a", 11), (2, "b", 20), (3, "d", None)]
    execute(path, "CREATE TABLE tags (name TEXT UNIQUE)")
    env = LocalEnvironment("job")
    env.from_batch([{"name": "x"}] * 2).sink(SqliteSink(path, "tags", key=["name"]))
    env.run()
    assert execute(path, "SELECT * FROM tags") == [("x",)]


def test_without_a_key_a_second_row_is_refused(path: Path) -> None:
    with pytest.raises(FunctionError, match=r"record {'id': 1, 'name': 'b'} .*UNIQUE constraint failed: orders.id"):
        run(path, [{"id": 1, "name": "a"}, {"id": 1, "name": "b"}])
    assert execute(path, "SELECT * FROM orders") == []


def test_the_database_says_which_checkpoint_it_has(path: Path) -> None:
    durable = Durable(path.parent / "state", interval_s=100)
    run(path, [{"id": 1, "name": "a"}], durable=durable)
    ((part, checkpoint),) = execute(path, "SELECT part, checkpoint FROM sage_commits")
    assert part.endswith("-out-0")
    run(path, [{"id": 1, "name": "a"}, {"id": 2, "name": "b"}], durable=durable)
    ((again, later),) = execute(path, "SELECT part, checkpoint FROM sage_commits")
    assert again == part
    assert later > checkpoint > 0
    assert execute(path, "SELECT id FROM orders") == [(1,), (2,)]


def written(path: Path, number: int, *rows: dict[str, Any], checkpoint: int, key: str = "") -> None:
    sink = SqliteSink(path, "orders", key=key or ())
    try:
        sink.open("part", checkpoint)
        sink.begin()
        sink.write(rows)
        sink.commit(sink.prepare(number) or (number, []))
    finally:
        sink.close()


def test_rows_of_a_checkpoint_that_was_left_out_are_refused_without_a_key(path: Path) -> None:
    written(path, 8, {"id": 1, "name": "a"}, checkpoint=7)
    written(path, 9, {"id": 2, "name": "b"}, checkpoint=8)
    with pytest.raises(
        ConnectorError, match="has rows of checkpoint 9, and the job goes on from checkpoint 8"
    ) as caught:
        written(path, 9, {"id": 3, "name": "b"}, checkpoint=8)
    assert "Delete the rows" in caught.value.__notes__[0]
    assert execute(path, "SELECT id FROM orders") == [(1,), (2,)]
    written(path, 9, {"id": 2, "name": "c"}, {"id": 3, "name": "d"}, checkpoint=8, key="id")
    assert execute(path, "SELECT id, name FROM orders") == [(1, "a"), (2, "c"), (3, "d")]


def test_a_commit_that_found_the_database_locked_comes_in_the_next_run(path: Path) -> None:
    sink = SqliteSink(path, "orders", wait_s=0)
    sink.open("part", 0)
    sink.write([{"id": 1, "name": "a"}])
    token = sink.prepare(1)
    assert token is not None
    with closing(sqlite3.connect(path, isolation_level=None)) as other:
        other.execute("BEGIN IMMEDIATE")
        with pytest.raises(ConnectorError, match="database is locked"):
            sink.commit(token)
    for _ in range(2):
        sink.commit(token)
    sink.close()
    assert execute(path, "SELECT id FROM orders") == [(1,)]


def test_a_row_that_another_one_excludes_at_the_commit_is_named(path: Path) -> None:
    sink = SqliteSink(path, "orders")
    sink.open("part", 0)
    sink.write([{"id": 1, "name": "a"}, {"id": 2, "name": "b"}])
    token = sink.prepare(1)
    assert token is not None
    insert(path, (2, "other", 0))
    with pytest.raises(ConnectorError, match=r"record {'id': 2, 'name': 'b'} .*UNIQUE constraint failed") as caught:
        sink.commit(token)
    assert "If a row of another task or program excludes it" in caught.value.__notes__[0]
    assert execute(path, "SELECT id FROM orders") == [(2,)]
    execute(path, "DELETE FROM orders")
    sink.commit(token)
    sink.close()
    assert execute(path, "SELECT id FROM orders") == [(1,), (2,)]


def test_a_job_that_is_not_durable_leaves_no_commit(path: Path) -> None:
    for number in (1, 2):
        run(path, [{"id": number, "name": "a"}])
    assert execute(path, "SELECT id FROM orders") == [(1,), (2,)]
    assert execute(path, "SELECT name FROM sqlite_master WHERE name = 'sage_commits'") == []
