"""`sage letters`, as it is installed, on the files of real jobs."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import textwrap
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from pathlib import Path

SAGE = [sys.executable, "-m", "sage"]
ENVIRONMENT = {name: value for name, value in os.environ.items() if not name.startswith("SAGE_")}

PROGRAM = """
    import os, sys
    from sage import LocalEnvironment
    from sage.connectors import JsonLinesFiles

    def parse(text):
        if text.startswith("bad") and not os.path.exists("repaired"):
            raise ValueError(f"cannot parse {text}")
        return text.upper()

    def check(text):
        if text.endswith("X"):
            raise LookupError(text)
        return text

    env = LocalEnvironment("texts", durable="state" if "durable" in sys.argv else None)
    letters = env.dead_letters(store="failed.jsonl")
    texts = env.from_batch(["a", "bad1", "b", "bad2", "x", "bad1x"], name="texts")
    parsed = texts.map(parse, name="parse", on_error=letters)
    parsed.map(check, name="check", on_error=letters).sink(JsonLinesFiles("out"), name="out")
    env.run()
"""


def sage(folder: Path, *words: str, text: str = "", code: int = 0) -> str:
    """Run the command in a folder and return both of its outputs."""
    done = subprocess.run(
        [*SAGE, *words], cwd=folder, env=ENVIRONMENT, input=text, capture_output=True, text=True, timeout=60
    )
    assert done.returncode == code, done.stdout + done.stderr
    return done.stdout + done.stderr


def rows(text: str) -> list[tuple[str, ...]]:
    """Return the operator, the error and the record of each line of `list`."""
    cells = [re.split(" {2,}", line.strip()) for line in text.splitlines()[1:]]
    return [(row[0], row[2], row[4], row[5]) for row in cells]


@pytest.fixture
def failed(tmp_path: Path) -> Path:
    """Run a job with dead letters, and return its folder."""
    (tmp_path / "program.py").write_text(textwrap.dedent(PROGRAM), encoding="utf-8")
    sage(tmp_path, "run", "program.py", "durable")
    return tmp_path


def test_list_and_show(failed: Path) -> None:
    text = sage(failed, "letters", "list", "failed.jsonl")
    assert sorted(row[1:] for row in rows(text)) == [
        ("check", "LookupError: X", '"X"'),
        ("parse", "ValueError: cannot parse bad1", '"bad1"'),
        ("parse", "ValueError: cannot parse bad1x", '"bad1x"'),
        ("parse", "ValueError: cannot parse bad2", '"bad2"'),
    ]
    assert len(rows(sage(failed, "letters", "list", "failed.jsonl", "--operator", "check"))) == 1
    number = next(row[0] for row in rows(text) if row[3] == '"bad2"')
    text = sage(failed, "letters", "show", "failed.jsonl", number)
    assert "operator: parse" in text
    assert 'record:\n  "bad2"\n' in text
    assert "    raise ValueError" in text
    text = sage(failed, "letters", "show", "failed.jsonl", "5", code=1)
    assert text.startswith("Error: failed.jsonl has no dead letter 5\nIt has 4 dead letters; sage letters list")


def test_drop_takes_out_some_or_all(failed: Path) -> None:
    text = sage(failed, "letters", "drop", "failed.jsonl", text="n\n", code=1)
    assert "Take 4 dead letters out of failed.jsonl? [y/N]: " in text
    text = sage(failed, "letters", "drop", "failed.jsonl", "--operator", "check", text="y\n")
    assert "1 dead letter taken out of failed.jsonl" in text
    sage(failed, "letters", "drop", "failed.jsonl", "2", "--yes")
    assert [row[1] for row in rows(sage(failed, "letters", "list", "failed.jsonl"))] == ["parse", "parse"]
    sage(failed, "letters", "drop", "failed.jsonl", "--yes")
    assert sage(failed, "letters", "list", "failed.jsonl") == "no dead letters\n"
    assert (failed / "failed.jsonl").read_bytes() == b""
    assert "no dead letters" in sage(failed, "letters", "list", "failed.jsonl")
    sage(failed, "run", "program.py", "durable")  # letters that were dropped do not come again
    assert (failed / "failed.jsonl").read_bytes() == b""


def test_lines_that_are_something_else_are_counted_and_stay(failed: Path) -> None:
    with (failed / "failed.jsonl").open("a", encoding="utf-8") as file:
        file.write("[1]\n")
    assert "1 lines of failed.jsonl are not dead letters and were left out" in sage(
        failed, "letters", "drop", "failed.jsonl", "--yes"
    )
    assert (failed / "failed.jsonl").read_text(encoding="utf-8") == "[1]\n"
