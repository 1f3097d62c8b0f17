"""Parquet: groups of rows, types of columns, and files that cannot be used."""

from __future__ import annotations

import datetime
import random
import signal
import subprocess
import sys
from collections import Counter
from typing import TYPE_CHECKING, Any

import pytest
from support.needs import needs_parquet

from sage import ConnectorError, FunctionError, GraphError, LocalEnvironment
from sage.connectors import Parquet, ParquetFiles
from sage.connectors import parquet as module

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

pytestmark = needs_parquet

COUNT = 2_000


def write(path: Path, rows: list[dict[str, Any]], **options: Any) -> None:
    pyarrow: Any = pytest.importorskip("pyarrow")
    pytest.importorskip("pyarrow.parquet").write_table(pyarrow.Table.from_pylist(rows), path, **options)


def read(pattern: Path, position: Any = None, records_max: int = 100, **options: Any) -> tuple[list[Any], Any]:
    """Return all rows from a position on, and the position after them."""
    source = Parquet(pattern, **options)
    found: list[Any] = []
    try:
        source.open(position)
        while (rows := source.read(records_max)) is not None:
            assert len(rows) <= records_max
            found += rows
    finally:
        source.close()
    return found, source.position()


def run(folder: Path, rows: list[Any], **options: Any) -> None:
    env = LocalEnvironment("job")
    env.from_batch(rows).sink(ParquetFiles(folder, **options), name="out")
    env.run()


ROWS = [
    {
        "id": number,
        "price": number / 4,
        "name": "ä" * (number % 3),
        "raw": b"\x00",
        "at": datetime.datetime(2026, 1, 2, 3, 4, 5, 6, datetime.UTC),
        "day": datetime.date(2026, 1, 2),
        "tags": ["a", None],
        "deep": {"a": {"b": [1, 2]}},
        "none": None,
    }
    for number in range(7)
]


@pytest.mark.parametrize("compression", module.COMPRESSIONS)
def test_values_come_back_with_their_types(compression: str, tmp_path: Path) -> None:
    run(tmp_path / "out", ROWS, compression=compression)
    assert read(tmp_path / "out")[0] == ROWS


def test_a_schema_gives_the_types(tmp_path: Path) -> None:
    pyarrow: Any = pytest.importorskip("pyarrow")
    schema = pyarrow.schema([("id", pyarrow.int8()), ("name", pyarrow.string())])
    run(tmp_path / "out", [{"id": 1}, {"name": "a"}], schema=schema)
    assert read(tmp_path / "out")[0] == [{"id": 1, "name": None}, {"id": None, "name": "a"}]
    (path,) = (tmp_path / "out").iterdir()
    assert pytest.importorskip("pyarrow.parquet").read_schema(path) == schema


@pytest.mark.parametrize("group_rows", [1, 2, 3, 100])
def test_groups_that_were_read_are_passed_over(group_rows: int, tmp_path: Path) -> None:
    write(tmp_path / "1.parquet", ROWS, row_group_size=group_rows)
    for begin in range(8):
        position = {str(tmp_path / "1.parquet"): begin}
        assert read(tmp_path, position, records_max=2, columns=["id"])[0] == [
            {"id": number} for number in range(begin, 7)
        ]


def test_a_large_file_is_read_on_inside_a_batch(tmp_path: Path) -> None:
    write(tmp_path / "1.parquet", [{"id": number} for number in range(5_000)])
    for begin in (999, 1_000, 1_001, 4_321):
        found, position = read(tmp_path, {str(tmp_path / "1.parquet"): begin}, records_max=700)
        assert [row["id"] for row in found] == list(range(begin, 5_000))
        assert position == {str(tmp_path / "1.parquet"): 5_000}


def test_empty_files(tmp_path: Path) -> None:
    pyarrow: Any = pytest.importorskip("pyarrow")
    parquet: Any = pytest.importorskip("pyarrow.parquet")
    parquet.write_table(pyarrow.table({"id": pyarrow.array([], pyarrow.int8())}), tmp_path / "1.parquet")
    write(tmp_path / "2.parquet", [{"id": 1}])
    found, position = read(tmp_path)
    assert found == [{"id": 1}]
    assert sorted(position.values()) == [0, 1]


def test_many_rows_are_written_in_groups(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "GROUP_ROWS", 100)
    rows = [{"id": number} for number in range(1_000)]
    for name, bytes_max in (("one", None), ("many", 1)):
        sink = ParquetFiles(tmp_path / name, file_bytes_max=bytes_max)
        sink.open("part", 0)
        for begin in range(0, 1_000, 50):
            sink.write(rows[begin : begin + 50])
        sink.commit(sink.prepare(1) or [])
        assert read(tmp_path / name)[0] == rows
    (path,) = (tmp_path / "one").iterdir()
    assert pytest.importorskip("pyarrow.parquet").ParquetFile(path).num_row_groups == 10
    assert len(list((tmp_path / "many").iterdir())) == 10


BAD: dict[str, tuple[Callable[[Path], object], str, str]] = {
    "text": (lambda path: path.write_text("id\n1\n" * 9), "cannot be read as Parquet: ArrowInvalid", "Is it whole?"),
    "empty": (lambda path: path.write_bytes(b""), "cannot be read as Parquet: ArrowInvalid", "Is it whole?"),
    "cut off": (lambda path: path.write_bytes(path.read_bytes()[:-9]), "cannot be read as Parquet", "Is it whole?"),
    "no column": (lambda path: write(path, [{"idd": 1}]), "has no column 'id'", "There are: 'idd'."),
    "fewer rows": (lambda path: write(path, ROWS[:3]), "has 3 rows, and 5 were read before", "another name"),
}


@pytest.mark.parametrize("name", BAD)
def test_a_file_that_cannot_be_read_is_named_before_anything_is_read(name: str, tmp_path: Path) -> None:
    spoil, message, note = BAD[name]
    write(tmp_path / "1.parquet", ROWS)
    write(tmp_path / "2.parquet", ROWS)
    spoil(tmp_path / "2.parquet")
    source = Parquet(tmp_path, columns=["id"])
    with pytest.raises(ConnectorError, match=f'file "{tmp_path / "2.parquet"}" {message}') as caught:
        source.open({str(tmp_path / "2.parquet"): 5})
    assert note in caught.value.__notes__[0]
    source.close()


def test_a_group_that_is_damaged_is_named_after_those_before_it(tmp_path: Path) -> None:
    path = tmp_path / "1.parquet"
    write(path, ROWS, row_group_size=4, compression="zstd", use_dictionary=False)
    whole = path.read_bytes()
    column = pytest.importorskip("pyarrow.parquet").ParquetFile(path).metadata.row_group(1).column(0)
    begin = column.data_page_offset
    path.write_bytes(
        whole[:begin] + b"\xff" * column.total_compressed_size + whole[begin + column.total_compressed_size :]
    )
    source = Parquet(path, columns=["id"])
    source.open()
    assert source.read(100) == [{"id": number} for number in range(4)]
    for _ in range(2):
        with pytest.raises(ConnectorError, match=f'file "{path}" cannot be read'):
            source.read(100)
        assert source.position() == {str(path): 4}
    path.write_bytes(whole)
    assert source.read(100) == [{"id": number} for number in range(4, 7)]
    assert source.read(100) is None
    source.close()


REFUSED: dict[str, tuple[list[object], str, str]] = {
    "no dict": ([3], r"record 3 is not a dict", "All rows of a file"),
    "empty": ([{}], r"record \{\} is not a dict", "All rows of a file"),
    "unknown": (
        [{"a": 1}, {"b": 2}],
        r"record \{'b': 2\} is not a dict with the columns: \['a'\]",
        "All rows of a file",
    ),
    "two types": ([{"a": None}, {"a": 1}, {"a": "x"}, {"a": 2}], r"record \{'a': 'x'\} cannot be written", "schema="),
    "too large": ([{"a": 1}, {"a": 1 << 70}], r"record \{'a': 1180591620717411303424\} cannot", "one type"),
    "no type": ([{"a": 1j}], r"record \{'a': 1j\} cannot be written as Parquet: ArrowInvalid", "one type"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_a_record_that_cannot_be_written_is_named(name: str, tmp_path: Path) -> None:
    rows, message, note = REFUSED[name]
    with pytest.raises(FunctionError, match=message) as caught:
        run(tmp_path / "out", rows)
    errors: list[BaseException | None] = [caught.value, caught.value.__cause__]
    assert any(note in text for error in errors for text in getattr(error, "__notes__", ()))
    assert list((tmp_path / "out").iterdir()) == []


WRONG: dict[str, Callable[[], object]] = {
    "Parquet: pattern is ''": lambda: Parquet(""),
    "Parquet: a column is 5": lambda: Parquet("in", columns=[5]),  # type: ignore[list-item]
    "ParquetFiles: folder is 5": lambda: ParquetFiles(5),  # type: ignore[arg-type]
    "ParquetFiles: schema is {'id': 'int'}": lambda: ParquetFiles("out", schema={"id": "int"}),
    "ParquetFiles: compression is 'zip'": lambda: ParquetFiles("out", compression="zip"),
    "ParquetFiles: a column of partition_by is 5": lambda: ParquetFiles("out", partition_by=[5]),  # type: ignore[list-item]
    "ParquetFiles: file_bytes_max is 0": lambda: ParquetFiles("out", file_bytes_max=0),
}


@pytest.mark.parametrize("message", WRONG)
def test_an_option_that_cannot_work_is_refused_where_it_is_given(message: str) -> None:
    with pytest.raises(GraphError, match=message) as caught:
        WRONG[message]()
    assert caught.value.__notes__


def test_other_programs_find_the_folders(tmp_path: Path) -> None:
    run(tmp_path / "out", [{"day": number % 2, "id": number} for number in range(6)], partition_by="day")
    dataset: Any = pytest.importorskip("pyarrow.dataset")
    found = dataset.dataset(tmp_path / "out", format="parquet", partitioning=None)
    assert sorted(found.to_table(filter=dataset.field("day") == 1)["id"].to_pylist()) == [1, 3, 5]
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["day=0", "day=1"]


PROGRAM = """
import signal, sys, time
from sage import Durable, LocalEnvironment
from sage.connectors import Parquet, ParquetFiles

def slow(row):
    time.sleep(0.0003)
    return {"id": row["id"], "day": row["id"] % 3}

env = LocalEnvironment("copy", durable=Durable("state", interval_s=0.02))
rows = env.from_source(Parquet("in"), name="rows").map(slow)
rows.sink(ParquetFiles("out", partition_by="day", file_bytes_max=1_000), name="out")
if len(sys.argv) > 1:
    signal.setitimer(signal.ITIMER_REAL, float(sys.argv[1]))  # the system ends the process, wherever it is
print(env.submit(autostop=True).report, flush=True)
"""


@pytest.mark.timeout(180)  # starts four programs
@pytest.mark.parametrize("seed", [0, *(pytest.param(seed, marks=pytest.mark.proof) for seed in range(1, 7))])
def test_each_row_once_whenever_the_program_is_killed(seed: int, tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    for part in range(4):
        rows = [{"id": number} for number in range(part, COUNT, 4)]
        write(tmp_path / "in" / f"{part}.parquet", rows, row_group_size=70)

    def run_program(*until: str) -> tuple[int, str]:
        command = [sys.executable, "-W", "error", "-c", PROGRAM, *until]
        ended = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=50)
        return ended.returncode, ended.stdout + ended.stderr

    moments = random.Random(seed)
    kills = 0
    for moment in (moments.uniform(0.3, 0.8), moments.uniform(0.3, 1.0), moments.uniform(0.3, 1.0)):
        code, output = run_program(str(moment))
        assert code in (0, -signal.SIGALRM), output
        kills += code != 0
    assert kills > 0
    code, output = run_program()
    assert code == 0, output
    found = read(tmp_path / "out")[0]
    assert Counter(row["id"] for row in found) == Counter(range(COUNT)), output
    assert all(row["day"] == row["id"] % 3 for row in found)
    assert not list((tmp_path / "out").rglob(".*"))
