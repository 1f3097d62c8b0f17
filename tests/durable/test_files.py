"""Files as sources and sinks: files that grow, lines that cannot be read, and options that cannot work."""

from __future__ import annotations

import csv
import json
import logging
import os
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sage import ConnectorError, Durable, FunctionError, GraphError, LocalEnvironment, Retry
from sage.connectors import Csv, CsvFiles, JsonLines, JsonLinesFiles, Text, TextFiles

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from sage.connectors.files import FileSink, FileSource


def read(source: FileSource[Any], position: dict[str, int] | None = None, records_max: int = 100) -> tuple[Any, Any]:
    """Return all records from a position on, and the position after them."""
    source.open(position)
    found: list[Any] = []
    try:
        while (records := source.read(records_max)) is not None:
            assert len(records) <= records_max
            found += records
    finally:
        source.close()
    return found, source.position()


@pytest.mark.parametrize("records_max", [1, 2, 100])
@pytest.mark.parametrize("end", ["\n", "\r\n"])
@pytest.mark.parametrize("last", ["", "{end}", "{end}{end}"])
def test_a_run_gives_the_lines_that_are_new(tmp_path: Path, records_max: int, end: str, last: str) -> None:
    file, pattern = tmp_path / "1.jsonl", tmp_path / "*.jsonl"
    file.write_bytes(f"1{end}{end}[2]{last.format(end=end)}".encode())
    found, position = read(JsonLines(pattern), records_max=records_max)
    assert found == [1, [2]]
    assert read(JsonLines(pattern), position) == ([], position)
    with file.open("ab") as more:
        more.write(f"{end if not last else ''}3{end}".encode())
    (tmp_path / "2.jsonl").write_text('"4"')
    assert read(JsonLines(pattern), position)[0] == [3, "4"]


@pytest.mark.parametrize("end", ["\n", "\r\n"])
def test_the_end_of_a_last_line_is_not_an_empty_line(tmp_path: Path, end: str) -> None:
    file = tmp_path / "1.txt"
    file.write_bytes(f"one{end}{end}two".encode())
    found, position = read(Text(file))
    assert found == ["one", "", "two"]
    with file.open("ab") as more:
        more.write(f"{end}{end}three".encode())
    assert read(Text(file), position)[0] == ["", "three"]


def test_a_file_of_which_only_the_header_was_there(tmp_path: Path) -> None:
    file = tmp_path / "1.csv"
    file.write_text("")
    found, position = read(Csv(file))
    file.write_text("id,name")
    found, position = read(Csv(file), position)
    assert found == []
    file.write_text("id,name\n\n1,ann")
    found, position = read(Csv(file), position)
    assert found == [{"id": "1", "name": "ann"}]
    file.write_text("id,name\n\n1,ann\n2,bob\n")
    assert read(Csv(file), position)[0] == [{"id": "2", "name": "bob"}]


@pytest.mark.parametrize("kind", [JsonLines, Text, Csv])
def test_a_line_that_has_grown_is_refused(tmp_path: Path, kind: Callable[[Path], FileSource[Any]]) -> None:
    """Its rest would be taken for a record of its own: 123 was read as 12, and is 3 now."""
    file = tmp_path / "1"
    file.write_text("1\n12")
    _, position = read(kind(file))
    file.write_text("1\n123\n")
    with pytest.raises(ConnectorError, match="goes on inside a line that was read before, at byte 4") as caught:
        read(kind(file), position)
    assert "Write whole lines" in caught.value.__notes__[0]


@pytest.mark.parametrize("kind", [JsonLines, Text, Csv])
def test_a_file_that_has_shrunk_is_refused(tmp_path: Path, kind: Callable[[Path], FileSource[Any]]) -> None:
    file = tmp_path / "1"
    file.write_text("1\n2\n")
    _, position = read(kind(file))
    file.write_text("5\n")
    with pytest.raises(ConnectorError, match="has 2 bytes, and 4 were read before") as caught:
        read(kind(file), position)
    assert "another name" in caught.value.__notes__[0]


BAD: dict[str, tuple[Callable[..., FileSource[Any]], bytes, list[Any], str]] = {
    "not JSON": (JsonLines, b"1\n\n{3\n4\n", [1, 4], r"line 3 is not JSON: b'\{3\\n'"),
    "nested too deep": (JsonLines, b"1\n\n" + b"[" * 200_000 + b"\n4\n", [1, 4], "line 3 is not JSON"),
    "not text": (Text, b"1\n\n\xff\n4\n", ["1", "", "4"], r"line 3 is not utf-8: b'\\xff\\n'"),
    "an open quote": (Csv, b'a\n1\n"3\n4\n', [{"a": "1"}, {"a": "4"}], "line 3 is not CSV in utf-8, unexpected end"),
    "text after a quote": (Csv, b'a\n1\n"3"5\n4\n', [{"a": "1"}, {"a": "4"}], "line 3 is not CSV in utf-8, ',' exp"),
    "too many values": (Csv, b'a\n1\n3,"\n"\n4\n', [{"a": "1"}, {"a": "4"}], "line 3 has 2 values for 1 columns"),
}


@pytest.mark.parametrize("name", BAD)
def test_a_bad_line_is_named_after_those_before_it(name: str, tmp_path: Path) -> None:
    kind, text, records, message = BAD[name]
    (tmp_path / "1").write_bytes(text)
    source = kind(tmp_path / "1")
    source.open()
    assert source.read(100) == records[:-1]
    position = source.position()
    for _ in range(2):
        with pytest.raises(ConnectorError, match=message) as caught:
            source.read(100)
        assert f'file "{tmp_path / "1"}"' in str(caught.value)
        assert 'bad_lines="skip"' in caught.value.__notes__[0]
        assert source.position() == position
    source.close()


@pytest.mark.parametrize("name", BAD)
@pytest.mark.parametrize("records_max", [1, 2, 100])
def test_bad_lines_are_skipped_and_counted(
    name: str, records_max: int, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    kind, text, records, _ = BAD[name]
    (tmp_path / "1").write_bytes(text)
    (tmp_path / "2").write_bytes(text)
    source = kind(tmp_path / "*", bad_lines="skip")
    with caplog.at_level(logging.WARNING, "sage.connectors"):
        found, position = read(source, records_max=records_max)
    assert (found, source.skipped) == (records * 2, 2)
    (warning,) = caplog.messages
    assert warning.startswith(f'skipped: file "{tmp_path / "1"}", line 3 ')
    assert position == {str(path): len(text) for path in tmp_path.iterdir()}


def test_a_job_reports_the_lines_that_its_source_skipped(tmp_path: Path) -> None:
    (tmp_path / "1").write_text("1\n{\n2\n[\n")
    source = JsonLines(tmp_path / "1", bad_lines="skip")
    for _ in range(2):  # one source may serve jobs one after the other
        found: list[int] = []
        env = LocalEnvironment("job")
        env.from_source(source, name="in").sink(found.append)
        report = env.submit(autostop=True).report
        assert found == [1, 2]
        (counts,) = [operator for operator in report.operators if operator.name == "in"]
        assert (counts.records_in, counts.records_out, counts.failed) == (2, 2, 2)


def test_a_retry_does_not_pass_over_a_bad_line(tmp_path: Path) -> None:
    (tmp_path / "1").write_text("1\n{\n2\n")
    env = LocalEnvironment("job")
    retry = Retry(attempts_max=3, backoff_s=(0, 0))
    env.from_source(JsonLines(tmp_path / "1"), name="in", on_error=retry).sink(print)
    with pytest.raises(FunctionError, match=r'source "in" failed after 3 attempts: .* line 2 is not JSON'):
        env.run()


def test_a_byte_order_mark_is_dropped(tmp_path: Path) -> None:
    (tmp_path / "1").write_bytes(b"\xef\xbb\xbfid,name\n1,ann\n")
    assert read(Csv(tmp_path / "1"))[0] == [{"id": "1", "name": "ann"}]
    assert read(Text(tmp_path / "1"))[0] == ["id,name", "1,ann"]


def test_options_of_the_csv_module(tmp_path: Path) -> None:
    (tmp_path / "1").write_bytes("'ä';2\n".encode("latin-1"))
    options: dict[str, Any] = {"delimiter": ";", "quotechar": "'", "quoting": csv.QUOTE_NONNUMERIC}
    source = Csv(tmp_path / "1", columns=["a", "b"], encoding="latin-1", **options)
    assert read(source)[0] == [{"a": "ä", "b": 2.0}]
    env = LocalEnvironment("job")
    sink = CsvFiles(tmp_path / "out", columns=["b", "a"], encoding="latin-1", **options)
    env.from_batch([{"a": "ä", "b": 2}]).sink(sink)
    env.run()
    (path,) = (tmp_path / "out").iterdir()
    assert path.read_bytes().decode("latin-1") == "'b';'a'\r\n2;'ä'\r\n"


TEXTS = st.text(st.sampled_from("ab\",;\n\r\\'\t\0ä \ufeff\u2028"), max_size=6)
DIALECTS: list[dict[str, Any]] = [
    {},
    {"delimiter": ";", "quotechar": "'"},
    {"quoting": csv.QUOTE_ALL},
    {"escapechar": "\\", "doublequote": False},
]


def assert_comes_back(sink: FileSink[Any], source: Callable[[], FileSource[Any]], records: list[Any]) -> None:
    """Write the records, and read them back with a new source for each."""
    sink.open("part", 0)
    sink.write(records)
    token = sink.prepare(1)
    assert token is not None
    sink.commit(token)
    sink.close()
    position = None
    for record in records:
        reading = source()
        reading.open(position)
        assert reading.read(1) == [record]
        position = reading.position()
        reading.close()
    assert read(source(), position)[0] == []


@given(
    rows=st.lists(st.fixed_dictionaries({"\ufeffa": TEXTS, "b\n": TEXTS}), min_size=1, max_size=6),
    dialect=st.sampled_from(DIALECTS),
)
@settings(deadline=None)
def test_any_rows_come_back_from_any_position(rows: list[Any], dialect: dict[str, Any]) -> None:
    with TemporaryDirectory() as name:
        assert_comes_back(CsvFiles(name, **dialect), lambda: Csv(f"{name}/*.csv", **dialect), rows)


@given(lines=st.lists(TEXTS.map(lambda text: text.replace("\n", "").rstrip("\r")), min_size=1, max_size=6))
@settings(deadline=None)
def test_any_lines_come_back_from_any_position(lines: list[str]) -> None:
    with TemporaryDirectory() as name:
        assert_comes_back(TextFiles(name), lambda: Text(f"{name}/*.txt"), lines)


@pytest.mark.parametrize(
    ("header", "message"),
    [("a,b,a", "line 1 has two columns 'a'"), ('"a', "line 1 is not CSV in utf-8, unexpected end of data")],
)
def test_a_header_that_cannot_be_used_is_named(header: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "1").write_text(f"{header}\n1,2,3\n")
    source = Csv(tmp_path / "1", bad_lines="skip")
    source.open()
    for _ in range(2):
        with pytest.raises(ConnectorError, match=message) as caught:
            source.read(100)
        assert "names of the columns" in caught.value.__notes__[0]
    source.close()


def test_a_header_needs_a_value_in_each_row(tmp_path: Path) -> None:
    (tmp_path / "1").write_text("a,b\n1\n")
    with pytest.raises(ConnectorError, match="line 2 has 1 values for 2 columns: b'1"):
        read(Csv(tmp_path / "1"))


WRONG: dict[str, tuple[Callable[[], object], str]] = {
    "pattern": (lambda: Text(""), "Text: pattern is ''"),
    "folder": (lambda: JsonLinesFiles(5), "JsonLinesFiles: folder is 5"),  # type: ignore[arg-type]
    "no folder": (lambda: CsvFiles(""), "CsvFiles: folder is ''"),
    "bad_lines": (lambda: Csv("*", bad_lines="ignore"), "Csv: bad_lines is 'ignore'"),
    "encoding": (lambda: Text("*", encoding="utf-16"), "Text: encoding is 'utf-16', which does not divide"),
    "no encoding": (lambda: Text("*", encoding="undefined"), "Text: encoding is 'undefined'"),
    "unknown encoding": (lambda: TextFiles("out", encoding="klingon"), "TextFiles: encoding is 'klingon'"),
    "option": (lambda: Csv("*", separator=";"), "Csv: .*'separator'"),
    "delimiter": (lambda: CsvFiles("out", delimiter=";;"), 'CsvFiles: "delimiter" must be a 1-character string'),
    "line end": (lambda: CsvFiles("out", lineterminator="\n"), "CsvFiles: lineterminator cannot be set"),
    "columns": (lambda: CsvFiles("out", columns=["a", "a"]), "CsvFiles: has two columns 'a'"),
    "no list": (lambda: Csv("*", columns="id"), "Csv: columns is 'id'"),
    "no columns": (lambda: CsvFiles("out", columns=[]), r"CsvFiles: columns is \[\]"),
    "no column": (lambda: CsvFiles("out", partition_by=[""]), "CsvFiles: a column of partition_by is ''"),
    "no size": (lambda: TextFiles("out", file_bytes_max=0), "TextFiles: file_bytes_max is 0"),
    "no names": (lambda: Csv("*", columns=[1]), "Csv: has a column 1, which is not a string"),  # type: ignore[list-item]
}


@pytest.mark.parametrize("name", WRONG)
def test_an_option_that_cannot_work_is_refused_where_it_is_given(name: str) -> None:
    make, message = WRONG[name]
    with pytest.raises(GraphError, match=message) as caught:
        make()
    assert caught.value.__notes__


def test_no_file_is_an_error_unless_there_was_one(tmp_path: Path) -> None:
    pattern = tmp_path / "*.jsonl"
    with pytest.raises(ConnectorError, match="no file matches") as caught:
        read(JsonLines(pattern))
    assert "The program runs in" in caught.value.__notes__[0]
    file = tmp_path / "1.jsonl"
    file.write_text("1\n")
    (tmp_path / "2.jsonl").mkdir()
    _, position = read(JsonLines(pattern))
    file.unlink()
    assert read(JsonLines(pattern), position) == ([], position)


def test_a_file_that_goes_before_its_turn_is_named(tmp_path: Path) -> None:
    (tmp_path / "1").write_text("1\n")
    source = Text(tmp_path / "*")
    source.open()
    (tmp_path / "1").unlink()
    with pytest.raises(ConnectorError, match=f'file "{tmp_path / "1"}" cannot be read: FileNotFoundError'):
        source.read(1)


def test_records_before_a_file_that_cannot_be_opened_are_not_lost(tmp_path: Path) -> None:
    for name in "12":
        (tmp_path / name).write_text(f"{name}\n")
    source = Text(tmp_path / "*")
    source.open()
    (tmp_path / "2").rename(tmp_path / "away")
    assert source.read(100) == ["1"]
    with pytest.raises(ConnectorError, match="cannot be read: FileNotFoundError"):
        source.read(100)
    (tmp_path / "away").rename(tmp_path / "2")
    assert source.read(100) == ["2"]
    assert source.read(100) is None
    source.close()


@pytest.mark.parametrize("kind", [Csv, JsonLines])
def test_a_read_that_fails_is_repeated_from_the_last_record(
    kind: Callable[[Path], FileSource[Any]], tmp_path: Path
) -> None:
    path = tmp_path / "1"
    rows = [{"id": f"{number}\n" * 200} for number in range(5_000)]
    write = "id\n" + "".join(f'"{row["id"]}"\n' for row in rows)
    path.write_text(write if kind is Csv else "".join(f"{json.dumps(row)}\n" for row in rows))
    source = kind(path)
    source.open()
    found = source.read(1) or []
    assert source._lines is not None
    descriptor = source._lines._file.fileno()
    kept, folder = os.dup(descriptor), os.open(tmp_path, os.O_RDONLY)
    os.dup2(folder, descriptor)  # a folder cannot be read
    with pytest.raises(ConnectorError, match="cannot be read: IsADirectoryError"):  # noqa: PT012
        while True:
            found += source.read(100) or []
    os.dup2(kept, descriptor)
    os.lseek(descriptor, source.position()[str(path)], os.SEEK_SET)
    while (records := source.read(100)) is not None:
        found += records
    assert found == rows
    source.close()
    os.close(kept)
    os.close(folder)


REFUSED: dict[str, tuple[Callable[[Path], Any], object, str, str]] = {
    "JSON": (JsonLinesFiles, {3}, r"record \{3\} cannot be written as JSON: TypeError", "Map it to dicts"),
    "two lines": (TextFiles, "a\nb", r"record 'a\\nb' is not one line of text", "without line breaks"),
    "a number": (TextFiles, 3, "record 3 is not one line of text", "Map it to a string"),
    "encoding": (lambda folder: TextFiles(folder, encoding="ascii"), "ä", "record 'ä' cannot be written", "utf-8"),
    "columns": (
        lambda folder: CsvFiles(folder, columns=["a", "b"]),
        {"a": 1, "c": 2},
        r"record \{'a': 1, 'c': 2\} is not a dict with the columns: \['a', 'b'\]",
        "a value for each column",
    ),
    "no dict": (CsvFiles, 3, "record 3 is not a dict with the columns", "a value for each column"),
    "no folder": (
        lambda folder: JsonLinesFiles(folder, partition_by="day"),
        {"id": 1},
        r"record \{'id': 1\} has no 'day', which names its folder",
        "partition_by",
    ),
    "long folder": (
        lambda folder: JsonLinesFiles(folder, partition_by="day"),
        {"day": "é" * 60},
        "record {'day': 'é+'} has a value in 'day' that is too long for the name of its folder",
        '"day=" and the value may take 255 bytes',
    ),
    "no character": (
        lambda folder: JsonLinesFiles(folder, partition_by="day"),
        {"day": "\ud800"},
        "cannot be written as JSON: UnicodeEncodeError",
        "Map it",
    ),
    "escape": (
        lambda folder: CsvFiles(folder, quoting=csv.QUOTE_NONE),
        {"a": ","},
        "record {'a': ','} cannot be written as CSV: Error: need to escape",
        "escapechar",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_a_record_that_cannot_be_written_is_named(name: str, tmp_path: Path) -> None:
    sink, record, message, note = REFUSED[name]
    env = LocalEnvironment("job")
    env.from_batch([record]).sink(sink(tmp_path), name="out")
    with pytest.raises(FunctionError, match=r'operator "out" failed on a batch up to record .*: ') as caught:
        env.submit(autostop=True)
    cause = caught.value.__cause__
    assert isinstance(cause, ConnectorError)
    with pytest.raises(ConnectorError, match=message):
        raise cause
    assert note in cause.__notes__[0]
    assert list(tmp_path.iterdir()) == []


def test_files_that_a_kill_has_left_do_not_disturb_a_sink_whose_name_begins_theirs(tmp_path: Path) -> None:
    killed = TextFiles(tmp_path)
    killed.open("job-out-0-0", 0)
    killed.write(["one"])
    sink = TextFiles(tmp_path)
    sink.open("job-out-0", 0)
    sink.write(["two"])
    sink.commit(sink.prepare(1) or "")
    assert (tmp_path / "job-out-0-00000001.txt").read_text() == "two\n"
    killed.abort()


def test_values_name_the_folders_of_records(tmp_path: Path) -> None:
    rows = [{"day": day, "city/x": city} for day in (1, None) for city in ("Rom a", "", "a/b", "..")]
    env = LocalEnvironment("job")
    env.from_batch(rows).sink(JsonLinesFiles(tmp_path, partition_by=["day", "city/x"]))
    env.run()
    none = "__HIVE_DEFAULT_PARTITION__"
    assert {path.parent.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("*.jsonl")} == {
        f"day={day}/city%2Fx={city}" for day in ("1", none) for city in ("Rom a", none, "a%2Fb", "..")
    }
    found = read(JsonLines(tmp_path))[0]
    assert sorted(map(repr, found)) == sorted(map(repr, rows))


def test_a_task_writes_into_more_folders_than_it_has_files_open(tmp_path: Path) -> None:
    rows = [{"id": number, "day": number % 150} for number in range(600)]
    sink = JsonLinesFiles(tmp_path, partition_by="day")
    sink.open("part", 0)
    open_max = 0
    for begin in range(0, 600, 10):
        sink.write(rows[begin : begin + 10])
        open_max = max(open_max, len(sink._parts))
    sink.commit(sink.prepare(1) or [])
    sink.close()
    assert open_max == 64
    found = read(JsonLines(tmp_path))[0]
    assert sorted(row["id"] for row in found) == list(range(600))
    assert not list(tmp_path.rglob(".*"))


def test_a_large_file_is_followed_by_another_one(tmp_path: Path) -> None:
    sink = TextFiles(tmp_path, file_bytes_max=10)
    sink.open("part", 0)
    for number in range(6):
        sink.write([f"line {number}"])
    sink.commit(sink.prepare(1) or [])
    assert [path.name for path in sorted(tmp_path.iterdir())] == [f"part-00000001.0000{piece}.txt" for piece in "012"]
    assert read(Text(tmp_path))[0] == [f"line {number}" for number in range(6)]
    sink.write(["line 6"] * 3)
    sink.abort()
    assert len(list(tmp_path.iterdir())) == 3


def test_files_of_a_later_checkpoint_are_removed_from_all_folders(tmp_path: Path) -> None:
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "part-00000009.00000.jsonl").touch()
    killed = []
    for number in (1, 2):
        sink = JsonLinesFiles(tmp_path, partition_by="day")
        killed.append(sink)
        sink.open("part", number - 1)
        sink.write([{"day": day, "number": number} for day in (1, 2)])
        token = sink.prepare(number) or []
        sink.commit(token[:1])
        sink.write([{"day": 3, "number": number}])
        JsonLinesFiles(tmp_path).open("part", 1)
    assert {path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("*") if path.is_file()} == {
        "other/part-00000009.00000.jsonl",
        "day=1/part-00000001.00000.jsonl",
        "day=2/.part-00000001.00001.jsonl.prepared",
    }
    for sink in killed:
        sink.abort()


def test_a_sink_that_serves_a_second_job_takes_the_columns_anew(tmp_path: Path) -> None:
    sink = CsvFiles(tmp_path)
    for row in ({"a": 1}, {"b": 2}):
        env = LocalEnvironment("job")
        env.from_batch([row]).sink(sink)
        env.run()
    assert sorted(path.read_text().split() for path in tmp_path.iterdir()) == [["a", "1"], ["b", "2"]]


def test_a_sink_may_have_a_long_name(tmp_path: Path) -> None:
    for records in (["a"], ["a", "b"]):
        env = LocalEnvironment("job", durable=tmp_path / "state")
        env.from_batch(records, name="records").sink(TextFiles(tmp_path / "out"), name="ä" * 100)
        env.run()
    assert read(Text(tmp_path / "out" / "*.txt"))[0] == ["a", "b"]


def test_a_folder_that_cannot_be_made_is_named_before_anything_is_read(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    seen: list[str] = []

    def note(record: str) -> str:
        seen.append(record)
        return record

    env = LocalEnvironment("job", durable=Durable(tmp_path / "state"))
    env.from_batch(["a"]).map(note).sink(TextFiles(tmp_path / "file" / "out"), name="out")
    with pytest.raises(FunctionError, match=r'operator "out" .*file/out" cannot be written into: NotADirectoryError'):
        env.run()
    assert seen == []


def test_a_place_without_permission_is_named(tmp_path: Path) -> None:
    file, folder = tmp_path / "1", tmp_path / "folder"
    file.touch(0o000)
    folder.mkdir(0o500)
    if os.access(file, os.R_OK):
        pytest.skip("this user may read everything")
    source = Text(file)
    source.open()
    with pytest.raises(ConnectorError, match=f'file "{file}" cannot be read: PermissionError'):
        source.read(1)
    with pytest.raises(ConnectorError, match=f'folder "{folder}" cannot be written into: PermissionError'):
        TextFiles(folder).open("part", 0)
