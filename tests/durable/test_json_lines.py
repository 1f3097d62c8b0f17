"""JSON Lines as a source of durable jobs: files that grow, and files that cannot be read on."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest

from sage import ConnectorError, FunctionError, LocalEnvironment
from sage.connectors import JsonLines, JsonLinesFiles

if TYPE_CHECKING:
    from pathlib import Path


def read(pattern: Path, position: dict[str, int] | None = None, records_max: int = 100) -> tuple[list[Any], Any]:
    """Return all records from a position on, and the position after them."""
    source = JsonLines(pattern)
    source.open(position)
    found: list[Any] = []
    try:
        while records := source.read(records_max):
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
    found, position = read(pattern, records_max=records_max)
    assert found == [1, [2]]
    assert read(pattern, position) == ([], position)
    with file.open("ab") as more:
        more.write(f"{end if not last else ''}3{end}".encode())
    (tmp_path / "2.jsonl").write_text('"4"')
    assert read(pattern, position)[0] == [3, "4"]


def test_a_line_that_has_grown_is_refused(tmp_path: Path) -> None:
    """Its rest would be taken for a record of its own: 123 was read as 12, and is 3 now."""
    file = tmp_path / "1.jsonl"
    file.write_text("1\n12")
    _, position = read(file)
    file.write_text("1\n123\n")
    with pytest.raises(ConnectorError, match="goes on inside a line that was read before, at byte 4") as caught:
        read(file, position)
    assert "Write whole lines" in caught.value.__notes__[0]


def test_a_file_that_has_shrunk_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "1.jsonl"
    file.write_text("1\n2\n")
    _, position = read(file)
    file.write_text("5\n")
    with pytest.raises(ConnectorError, match="has 2 bytes, and 4 were read before") as caught:
        read(file, position)
    assert "another name" in caught.value.__notes__[0]


def test_a_line_that_is_no_json_is_named_after_those_before_it(tmp_path: Path) -> None:
    file = tmp_path / "1.jsonl"
    file.write_text("1\n2\n{3\n")
    source = JsonLines(file)
    source.open()
    assert source.read(100) == [1, 2]
    with pytest.raises(ConnectorError, match=r"1.jsonl\" has a line that is not JSON at byte 4: b'\{3"):
        source.read(100)
    source.close()


def test_no_file_is_an_error_unless_there_was_one(tmp_path: Path) -> None:
    pattern = tmp_path / "*.jsonl"
    with pytest.raises(ConnectorError, match="no file matches") as caught:
        read(pattern)
    assert "The program runs in" in caught.value.__notes__[0]
    file = tmp_path / "1.jsonl"
    file.write_text("1\n")
    _, position = read(pattern)
    file.unlink()
    assert read(pattern, position) == ([], position)


def test_a_value_that_is_no_json_is_named(tmp_path: Path) -> None:
    env = LocalEnvironment("job")
    env.from_batch([1, 2, {3}, 4, 5]).sink(JsonLinesFiles(tmp_path), name="out")
    with pytest.raises(FunctionError, match=r'operator "out" failed on a batch up to record \d: ') as caught:
        env.submit(autostop=True)
    assert "record {3} cannot be written as JSON: TypeError" in str(caught.value)
    assert "Map it to dicts" in caught.value.__cause__.__notes__[0]  # type: ignore[union-attr]
    assert list(tmp_path.iterdir()) == []
