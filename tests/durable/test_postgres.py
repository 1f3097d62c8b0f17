"""PostgreSQL as a source and a sink: what differs from SQLite, servers that cannot be used, and kills on both sides."""

from __future__ import annotations

import random
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from contextlib import closing
from typing import TYPE_CHECKING, Any

import pytest
from support.docs_pages import ROOT, blocks_of
from support.postgres_server import IN_ADDRESS, PASSWORD, execute, needs_postgres, server

from sage import ConnectorError, Durable, FunctionError, GraphError, LocalEnvironment, Retry
from sage.connectors import PostgresSink, PostgresTable

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable
    from pathlib import Path

pytestmark = needs_postgres

COUNT = 600


@pytest.fixture
def address(tmp_path: Path) -> str:
    """Return the address of an empty schema with one table."""
    address = server().address(tmp_path)
    execute(address, "CREATE TABLE orders (id INTEGER PRIMARY KEY, name TEXT NOT NULL, price NUMERIC)")
    return address


def read(address: str, position: Any = None, records_max: int = 100, **options: Any) -> tuple[list[Any], Any]:
    """Return the values of all rows from a position on, and the position after them."""
    source = PostgresTable(address, **{"table": "orders", "by": "id", **options})
    found: list[Any] = []
    try:
        source.open(position)
        while (rows := source.read(records_max)) is not None:
            assert len(rows) <= records_max
            found += [tuple(row.values()) for row in rows]
    finally:
        source.close()
    return found, source.position()


def run(address: str, rows: Iterable[Any], *, durable: Durable | None = None, **options: Any) -> None:
    env = LocalEnvironment("job", durable=durable)
    env.from_batch(list(rows), name="rows").sink(PostgresSink(address, "orders", **options), name="out")
    env.run()


@pytest.mark.parametrize(
    ("kind", "values"),
    [
        ("real", [0.1, 0.2]),
        ("double precision", [0.1, 1e300]),
        ("numeric", ["1.0", "2.00"]),
        ("timestamptz", ["2026-01-01 00:00:00.123456+00", "2026-01-02"]),
        ("char(5)", ["a", "b "]),
        ("uuid", [f"{number}" * 32 for number in range(1, 3)]),
        ("jsonb", ['{"a": 1}', '{"a": 2}']),
    ],
)
@pytest.mark.parametrize("is_unique", [False, True])
def test_the_position_is_a_value_of_any_kind(address: str, kind: str, values: list[Any], is_unique: bool) -> None:
    execute(address, f"CREATE TABLE kinds (at {kind} {'UNIQUE' if is_unique else ''})")
    for value in values:
        execute(address, f"INSERT INTO kinds VALUES ('{value}')")
    found, position = read(address, table="kinds", by="at", records_max=1)
    assert len(found) == 2
    assert read(address, position, table="kinds", by="at") == ([], position)


def test_values_without_a_place_are_refused(address: str) -> None:
    execute(address, "INSERT INTO orders VALUES (1, 'a', 'NaN')")
    with pytest.raises(ConnectorError, match='a row has NaN in the column "price"') as caught:
        read(address, by="price")
    assert "leaves such rows out" in caught.value.__notes__[0]
    execute(address, "INSERT INTO orders VALUES (2, 'a', NULL)")
    with pytest.raises(ConnectorError, match='a row has NULL in the column "price"'):
        read(address, by="price")


def test_a_row_that_changes_is_not_read_again_if_its_value_is_unique(address: str) -> None:
    execute(address, "INSERT INTO orders VALUES (1, 'a', 1), (2, 'b', 1)")
    _, position = read(address)
    execute(address, "UPDATE orders SET price = 5")
    assert read(address, position)[0] == []
    _, position = read(address, by="price")
    execute(address, "CREATE UNIQUE INDEX part_of_it ON orders (price) WHERE id < 2")
    execute(address, "INSERT INTO orders VALUES (3, 'c', 5)")
    assert [row[0] for row in read(address, position, by="price")[0]] == [3]


def test_columns_that_come_and_go(address: str) -> None:
    execute(address, "INSERT INTO orders VALUES (1, 'a', 1)")
    _, unique = read(address)
    _, position = read(address, by="price")
    execute(address, "ALTER TABLE orders ADD COLUMN note TEXT")
    execute(address, "INSERT INTO orders VALUES (2, 'b', 1, 'new')")
    assert [row[3] for row in read(address, unique)[0]] == ["new"]
    with pytest.raises(ConnectorError, match='"orders" had 3 columns, and has 4 now') as caught:
        read(address, position, by="price")
    assert "Name the columns in query=" in caught.value.__notes__[0]


def test_a_table_in_another_schema(address: str, tmp_path: Path) -> None:
    other = server().address(tmp_path / "other")
    ((schema,),) = execute(other, "SELECT current_schema()")
    execute(other, 'CREATE TABLE "50% off" (id INTEGER)')
    name = f"{schema}.50% off"
    env = LocalEnvironment("job")
    env.from_batch([{"id": 5}]).sink(PostgresSink(address, name))
    env.run()
    assert read(address, table=name)[0] == [(5,)]
    with pytest.raises(ConnectorError, match='has no table "missing"') as caught:
        read(address, table="missing")
    assert f'"{name}"' in caught.value.__notes__[0]


def test_values_of_many_kinds_come_back(address: str) -> None:
    execute(address, "CREATE TABLE kinds (id INTEGER, tags TEXT[], doc JSONB, raw BYTEA, at DATE, yes BOOLEAN)")
    query = "SELECT id, tags, doc, raw, at::text, yes FROM kinds"
    row = {
        "id": 1,
        "tags": ["a\tb", "\\N", None],
        "doc": {"a": [1, "\n"]},
        "raw": b"\x00\\",
        "at": "2026-01-02",
        "yes": True,
    }
    for key in ((), ("id",)):
        execute(address, "CREATE UNIQUE INDEX IF NOT EXISTS one ON kinds (id)")
        env = LocalEnvironment("job")
        env.from_batch([row]).sink(PostgresSink(address, "kinds", key=key))
        env.run()
        assert read(address, table=None, query=query)[0] == [tuple(row.values())]


def test_what_copy_cannot_write_is_inserted(address: str) -> None:
    """A view, and a table with rules for its rows."""
    rows = [{"id": 1, "name": "ann", "price": 1}, {"id": 2, "name": "bob"}]
    execute(address, "ALTER TABLE orders RENAME TO kept")
    execute(address, "CREATE VIEW orders AS SELECT * FROM kept")
    run(address, rows)
    assert execute(address, "SELECT name FROM kept ORDER BY id") == [("ann",), ("bob",)]
    execute(address, "DROP VIEW orders")
    execute(address, "ALTER TABLE kept RENAME TO orders")
    execute(address, "CREATE POLICY all_of_them ON orders USING (true)")
    execute(address, "ALTER TABLE orders ENABLE ROW LEVEL SECURITY, FORCE ROW LEVEL SECURITY")
    run(address, [{"id": 3, "name": "eve"}])
    assert execute(address, "SELECT count(*) FROM orders") == [(3,)]


@pytest.mark.parametrize("encoding", ["LATIN1", "SQL_ASCII"])
def test_a_database_with_another_encoding(address: str, encoding: str) -> None:
    database = f"in_{encoding}".lower()
    made = f"CREATE DATABASE {database} OWNER sage ENCODING '{encoding}' TEMPLATE template0 LOCALE 'C'"
    server().execute(made, database="postgres")
    there = f"{address.partition('/shop')[0]}/{database}"
    execute(f"{there}?client_encoding=UTF8", 'CREATE SCHEMA sage CREATE TABLE orders (id INTEGER, "größe" TEXT)')
    there += "?options=-csearch_path%3Dsage"
    rows = [{"id": 1, "größe": "ü"}, {"id": 2, "größe": "klein"}]
    run(there, rows)
    assert read(there)[0] == [(1, "ü"), (2, "klein")]


def test_a_row_with_a_key_takes_the_place_of_another(address: str) -> None:
    execute(address, "INSERT INTO orders VALUES (1, 'a', 10), (2, 'b', 20)")
    run(address, [{"id": 1, "price": 11, "name": "a"}, {"id": 3, "name": "c"}, {"id": 3, "name": "d"}], key="id")
    assert [(row[0], row[1]) for row in read(address)[0]] == [(1, "a"), (2, "b"), (3, "d")]


REFUSED: dict[str, tuple[object, str]] = {
    "is not a row of table": (["id"], "Map it to a dict"),
    "has 'nmae', which is not a column of table": ({"id": 1, "nmae": "a"}, 'Its columns are: "id", "name", "price".'),
    "lacks 'id', a key of table": ({"name": "a"}, 'Its columns are: "id"'),
    "cannot be written .*violates not-null constraint": ({"id": 1}, "Nothing of its checkpoint"),
    "cannot be written .*out of range": ({"id": 1 << 40, "name": "a"}, "Nothing of its checkpoint"),
    "cannot be written .*(NUL|0x00)": ({"id": 1, "name": "\0"}, "Nothing of its checkpoint"),
    "cannot be written .*UnicodeEncodeError": ({"id": 1, "name": "\ud800"}, "Nothing of its checkpoint"),
    "cannot be written .*cannot adapt type 'object'": ({"id": 1, "name": object()}, "Nothing of its checkpoint"),
    "cannot be written .*invalid input syntax": ({"id": 1, "name": "a", "price": "x"}, "Nothing of its checkpoint"),
}


@pytest.mark.parametrize("message", REFUSED)
def test_a_record_that_cannot_be_written_is_named_and_nothing_is_written(
    message: str, address: str, tmp_path: Path
) -> None:
    record, note = REFUSED[message]
    durable = Durable(tmp_path / "state", interval_s=100)
    rows = [{"id": 7, "name": "a"}, record, {"id": 8, "name": "a"}]
    for key in ["id"] if "lacks" in message else ["id", ()]:
        with pytest.raises(FunctionError, match=rf'operator "out" failed .*record .*{message}') as caught:
            run(address, rows, durable=durable, key=key)
        assert caught.value.__cause__ is not None
        assert note in caught.value.__cause__.__notes__[0]
        assert read(address)[0] == []
    run(address, [rows[0], {"id": 1, "name": "b"}, rows[2]], durable=durable)
    assert [row[0] for row in read(address)[0]] == [1, 7, 8]


def test_a_rule_that_is_looked_at_with_the_commit_is_broken_before(address: str) -> None:
    execute(address, "ALTER TABLE orders ADD COLUMN of INTEGER REFERENCES orders DEFERRABLE INITIALLY DEFERRED")
    run(address, [{"id": 1, "name": "a", "of": 2}, {"id": 2, "name": "b", "of": 1}])
    with pytest.raises(FunctionError, match="violates foreign key constraint"):
        run(address, [{"id": 3, "name": "a", "of": 4}])


def opened(address: str, checkpoint: int = 0, **options: Any) -> PostgresSink:
    sink = PostgresSink(address, "orders", **options)
    sink.open("part", checkpoint)
    return sink


def test_a_commit_waits_for_the_one_that_a_killed_program_has_sent(address: str) -> None:
    """The server may go on with it for a moment; both would look, find nothing, and insert the rows."""
    import psycopg

    with closing(opened(address, 1)) as sink, closing(psycopg.connect(address)) as killed:
        sink.write([{"id": 1, "name": "a"}])
        token = sink.prepare(1)
        assert token is not None
        killed.execute("INSERT INTO sage_commits VALUES ('part', 1, 'now')")
        killed.execute("INSERT INTO orders VALUES (1, 'a')")
        late = threading.Thread(target=sink.commit, args=(token,))
        late.start()
        due = time.monotonic() + 10
        while server().execute("SELECT 1 FROM pg_locks WHERE NOT granted") == []:
            assert time.monotonic() < due
        killed.commit()
        late.join()
    assert len(read(address)[0]) == 1


def test_rows_of_a_checkpoint_that_was_left_out_are_refused_without_a_key(address: str) -> None:
    with closing(opened(address)) as sink:
        sink.write([{"id": 1, "name": "a"}])
        sink.commit(sink.prepare(9) or (0, []))
    with pytest.raises(ConnectorError, match="has rows of checkpoint 9, and the job goes on from checkpoint 8"):
        sink_of(address, checkpoint=8)
    with closing(opened(address, 8, key="id")) as sink:
        sink.write([{"id": 1, "name": "b"}])
        sink.commit(sink.prepare(9) or (0, []))
    assert read(address)[0][0][1] == "b"


def source_of(address: str, **options: Any) -> None:
    read(address, **options)


def sink_of(address: str, table: str = "orders", checkpoint: int = 0, **options: Any) -> None:
    sink = PostgresSink(address, table, **options)
    try:
        sink.open("part", checkpoint)
    finally:
        sink.close()


UNUSABLE: dict[str, tuple[Callable[[str], None], str, str]] = {
    "no server": (lambda it: source_of(it.replace(f":{server().port}", ":1")), "Connection refused", "Is the server"),
    "password": (lambda it: sink_of(it.replace(IN_ADDRESS, "wr0ng")), "password authentication failed", "PGPASSWORD"),
    "no password": (lambda it: sink_of(it.replace(f":{IN_ADDRESS}", "")), "no password supplied", "PGPASSWORD"),
    "no user": (lambda it: source_of(it.replace("//sage:", "//eve:")), "no pg_hba.conf entry", "Is the server"),
    "no database": (lambda it: source_of(it.replace("/shop", "/ship")), 'database "ship" does not exist', ""),
    "no table": (lambda it: source_of(it, table="odrers"), 'has no table "odrers"', '"orders"'),
    "no table to write": (lambda it: sink_of(it, "odrers"), 'has no table "odrers"', '"orders"'),
    "no column": (lambda it: source_of(it, by="at"), 'has no column "at" in "orders"', '"id", "name", "price"'),
    "no key": (lambda it: sink_of(it, key="at"), 'has no column "at" in "orders"', '"id", "name", "price"'),
    "not unique": (lambda it: sink_of(it, key=["name"]), '"name" is not a key of "orders"', "CREATE UNIQUE INDEX"),
    "no syntax": (lambda it: source_of(it, table=None, query="SELECT FROM WHERE"), "syntax error", ""),
    "a query that writes": (
        lambda it: source_of(it, table=None, query="DELETE FROM orders RETURNING id"),
        "syntax error",
        "",
    ),
    "no right": (lambda it: source_of(it, table="pg_catalog.pg_authid", by="oid"), "permission denied", "GRANT"),
    "time": (
        lambda it: source_of(it, table=None, query="SELECT 1 AS id FROM pg_sleep(9)", timeout_s=0.1),
        "statement timeout",
        "timeout_s=",
    ),
}


@pytest.mark.parametrize("name", UNUSABLE)
def test_a_server_that_cannot_be_used_is_named_without_the_password(name: str, address: str) -> None:
    use, message, note = UNUSABLE[name]
    with pytest.raises(ConnectorError) as caught:
        use(address)
    text = str(caught.value)
    assert text.startswith(f'database "{"ship" if name == "no database" else "shop"}" at "127.0.0.1:')
    assert message in text
    assert note in "".join(getattr(caught.value, "__notes__", ()))
    assert not any(secret in f"{caught.value!r} {caught.value.__cause__!r}" for secret in (PASSWORD, "wr0ng"))


WRONG: dict[str, Callable[[], object]] = {
    "PostgresTable: address is 5": lambda: PostgresTable(5, "orders", by="id"),  # type: ignore[arg-type]
    "PostgresTable: it reads one table or one query": lambda: PostgresTable("dbname=shop", by="id"),
    "PostgresTable: by is None": lambda: PostgresTable("dbname=shop", "orders", by=None),  # type: ignore[arg-type]
    "PostgresSink: table is ''": lambda: PostgresSink("dbname=shop", ""),
    "PostgresSink: a column of key is 5": lambda: PostgresSink("dbname=shop", "orders", key=[5]),  # type: ignore[list-item]
    "PostgresSink: timeout_s is 0": lambda: PostgresSink("dbname=shop", "orders", timeout_s=0),
}


@pytest.mark.parametrize("message", WRONG)
def test_an_option_that_cannot_work_is_refused_where_it_is_given(message: str) -> None:
    with pytest.raises(GraphError, match=message) as caught:
        WRONG[message]()
    assert caught.value.__notes__


@pytest.mark.parametrize(
    "wrong",
    [
        "postgresql://ann:s3c/ret@localhost/shop",
        "postgresql://ann:s3c@ret@localhost/shop",
        "postgresql://ann:s3c ret@localhost/shop",
        "postgresql://ann:%s3c@localhost/shop",
        "host=localhost password=a s3c",
        "mysql://ann:s3c@localhost/shop",
        "s3c",
    ],
)
def test_an_address_that_cannot_be_read_is_refused_without_showing_it(wrong: str) -> None:
    with pytest.raises(GraphError, match="PostgresSink: the address cannot be read") as caught:
        PostgresSink(wrong, "orders")
    assert "%40" in caught.value.__notes__[0]
    assert caught.value.__cause__ is None
    assert caught.value.__context__ is None


def test_no_secret_is_in_what_a_job_shows_or_keeps(address: str, tmp_path: Path) -> None:
    env = LocalEnvironment("job", durable=tmp_path / "state")
    env.from_source(PostgresTable(address, "orders", by="id"), name="in").sink(PostgresSink(address, "orders"))
    shown = [str(env.explain())]
    execute(address, "INSERT INTO orders VALUES (1, 'a')")
    with pytest.raises(FunctionError) as caught:  # it inserts the rows that it reads
        env.run()
    shown += [repr(error) for error in (caught.value, caught.value.__cause__)]
    kept = b"".join(path.read_bytes() for path in (tmp_path / "state").rglob("*") if path.is_file())
    for secret in (PASSWORD, IN_ADDRESS):
        assert secret not in "".join(shown)
        assert secret.encode() not in kept


def test_a_table_that_has_vanished_is_named(address: str) -> None:
    execute(address, "INSERT INTO orders VALUES (1, 'a'), (2, 'b')")
    source = PostgresTable(address, "orders", by="id")
    source.open()
    source.read(1)
    with closing(source), closing(opened(address)) as sink:
        sink.write([{"id": 3, "name": "c"}])
        execute(address, "DROP TABLE orders")
        for use in (lambda: source.read(1), lambda: sink.prepare(1)):
            with pytest.raises(ConnectorError, match=r'^database "shop" at .*"orders" does not exist'):
                use()


def test_a_source_with_retries_goes_on_after_its_connection_was_cut(address: str) -> None:
    execute(address, "INSERT INTO orders SELECT number, 'a' FROM generate_series(1, 3000) AS number")
    found: list[int] = []

    def note(row: dict[str, Any]) -> None:
        if len(found) == 1_000:
            cut = "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE application_name = 'sage'"
            assert server().execute(cut)
        found.append(row["id"])

    env = LocalEnvironment("job")
    rows = env.from_source(PostgresTable(address, "orders", by="id"), name="in", on_error=Retry(3, (0.01, 0.1)))
    rows.sink(note)
    env.run()
    assert found == list(range(1, 3001))


def test_the_program_of_the_docs(address: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (block,) = [block for block in blocks_of(ROOT / "docs/ready-made/connectors.md") if "mark_orders" in block.code]
    names: dict[str, Any] = {"LocalEnvironment": LocalEnvironment}
    exec(block.code, names)
    execute(address, "CREATE TABLE marks (order_id INTEGER, is_large BOOLEAN)")
    for number, price in enumerate((5, 9)):
        execute(address, "INSERT INTO orders VALUES ($1, 'a', $2)", number, price)
        names["mark_orders"](address)
    assert execute(address, "SELECT * FROM marks") == [(0, False), (1, True)]


PROGRAM = """
import asyncio, signal, sys
from sage import Durable, LocalEnvironment
from sage.connectors import PostgresSink, PostgresTable

async def ask(row):
    await asyncio.sleep(0.01 * (row["id"] % 5))
    return {"id": row["id"], "answer": row["id"] * 2}

address = sys.argv[1]
env = LocalEnvironment("embed", durable=Durable("state", interval_s=0.02))
rows = env.from_source(PostgresTable(address, "rows", by="day"), name="rows")
answers = rows.map_async(ask, concurrency=16, capacity=16, name="ask")
answers.sink(PostgresSink(address, "answers"), name="all", parallelism=2)
answers.sink(PostgresSink(address, "latest", key="id"), name="latest")
if len(sys.argv) > 2:
    signal.setitimer(signal.ITIMER_REAL, float(sys.argv[2]))  # the system ends the process, wherever it is
print(env.submit(autostop=True).report, flush=True)
"""


def start(folder: Path, address: str, *until: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-W", "error", "-c", PROGRAM, address, *until]
    return subprocess.Popen(command, cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def finish(program: subprocess.Popen[str]) -> tuple[int, str]:
    output, _ = program.communicate(timeout=50)
    return program.returncode, output


def fill(folder: Path) -> str:
    address = server().address(folder)
    execute(address, "CREATE TABLE rows (id INTEGER, day INTEGER)")
    execute(address, "CREATE TABLE answers (id INTEGER, answer INTEGER)")
    execute(address, "CREATE TABLE latest (id INTEGER UNIQUE, answer INTEGER)")
    execute(address, f"INSERT INTO rows SELECT id, id / 50 FROM generate_series(0, {COUNT - 1}) AS id")
    return address


def rows_of(address: str, table: str) -> Counter[tuple[object, ...]]:
    return Counter(execute(address, f"SELECT id, answer FROM {table}"))


def check(folder: Path, address: str) -> None:
    """Run the program to its end, and look whether each row is there once."""
    code, output = finish(start(folder, address))
    assert code == 0, output
    wanted = Counter((number, number * 2) for number in range(COUNT))
    assert rows_of(address, "answers") == rows_of(address, "latest") == wanted, output


@pytest.mark.timeout(180)  # starts four programs
@pytest.mark.parametrize("seed", [0, *(pytest.param(seed, marks=pytest.mark.proof) for seed in range(1, 7))])
def test_each_row_once_whenever_the_program_is_killed(seed: int, tmp_path: Path) -> None:
    address = fill(tmp_path)
    moments = random.Random(seed)
    kills = 0
    for moment in (moments.uniform(0.01, 0.4), moments.uniform(0.3, 1.0), moments.uniform(0.3, 1.0)):
        code, output = finish(start(tmp_path, address, str(moment)))
        assert code in (0, -signal.SIGALRM), output
        assert max(rows_of(address, "answers").values(), default=1) == 1
        kills += code != 0
    assert kills > 0
    check(tmp_path, address)


@pytest.mark.timeout(180)  # starts four programs
@pytest.mark.parametrize("seed", [0, *(pytest.param(seed, marks=pytest.mark.proof) for seed in range(1, 7))])
def test_each_row_once_whenever_the_server_is_killed(seed: int, tmp_path: Path) -> None:
    address = fill(tmp_path)
    moments = random.Random(seed)
    failures = 0
    for _ in range(3):
        before = rows_of(address, "answers")
        program = start(tmp_path, address)
        while rows_of(address, "answers") == before and program.poll() is None:
            threading.Event().wait(0.01)
        threading.Event().wait(moments.uniform(0.0, 0.3))
        server().kill()
        code, output = finish(program)
        server().wait()
        if code != 0:
            failures += 1
            assert 'database "shop" at "127.0.0.1:' in output
            assert PASSWORD not in output
        assert max(rows_of(address, "answers").values(), default=1) == 1
    assert failures > 0
    check(tmp_path, address)
