"""`sage letters`, as it is installed, on the files of real jobs."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import textwrap
from typing import TYPE_CHECKING

import pytest

from sage._control.letter_replay import LetterReplay
from sage.connectors.dead_letters import StoredLetter
from sage.report import Cleanliness, JobReport, Outcome

if TYPE_CHECKING:
    from pathlib import Path

SAGE = [sys.executable, "-m", "sage"]
ENVIRONMENT = {name: value for name, value in os.environ.items() if not name.startswith("SAGE_")}

PROGRAM = """
    import os, sys
    from sage import LocalEnvironment, MapFunction, ValueState
    from sage.connectors import JsonLinesFiles

    class Counted(MapFunction):
        count = ValueState(0)
        def execute(self, text):
            self.count.value += 1
            return text

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


def written(folder: Path, name: str = "out") -> list[object]:
    paths = sorted((folder / name).glob("*.jsonl"))
    return sorted(json.loads(line) for path in paths for line in path.read_text("utf-8").splitlines())


def program(folder: Path, text: str) -> None:
    (folder / "program.py").write_text(textwrap.dedent(text), encoding="utf-8")


@pytest.mark.parametrize("durable", [["durable"], []])
def test_replay_puts_letters_in_at_their_operators(durable: list[str], tmp_path: Path) -> None:
    program(tmp_path, PROGRAM)
    sage(tmp_path, "run", "program.py", *durable)
    assert written(tmp_path) == ["A", "B"]
    text = sage(tmp_path, "letters", "replay", "failed.jsonl", "program.py", *durable)
    assert "4 dead letters put back in, of which 4 failed again" in text
    assert len(rows(sage(tmp_path, "letters", "list", "failed.jsonl"))) == 4
    assert written(tmp_path) == ["A", "B"]
    (tmp_path / "repaired").touch()
    text = sage(tmp_path, "letters", "replay", "failed.jsonl", "program.py", *durable)
    assert "4 dead letters put back in, of which 2 failed again" in text
    assert written(tmp_path) == ["A", "B", "BAD1", "BAD2"]
    left = rows(sage(tmp_path, "letters", "list", "failed.jsonl"))
    assert sorted(row[1:] for row in left) == [
        ("check", "LookupError: BAD1X", '"BAD1X"'),
        ("check", "LookupError: X", '"X"'),
    ]
    if durable:  # the job's own runs are not touched
        sage(tmp_path, "run", "program.py", *durable)
        assert written(tmp_path) == ["A", "B", "BAD1", "BAD2"]


def test_replay_takes_some_letters(failed: Path) -> None:
    (failed / "repaired").touch()
    listed = rows(sage(failed, "letters", "list", "failed.jsonl"))
    number = next(row[0] for row in listed if row[3] == '"bad2"')
    text = sage(failed, "letters", "replay", "failed.jsonl", "--number", number, "program.py", "durable")
    assert "1 dead letter put back in, of which 0 failed again" in text
    assert written(failed) == ["A", "B", "BAD2"]
    sage(failed, "letters", "replay", "--operator", "check", "failed.jsonl", "program.py", "durable")
    assert len(rows(sage(failed, "letters", "list", "failed.jsonl"))) == 3
    text = sage(failed, "letters", "replay", "--operator", "nothing", "failed.jsonl", "program.py", "durable")
    assert text == "no dead letters\n"


KEYED = """
    import os
    from dataclasses import dataclass
    from sage import LocalEnvironment, MapFunction
    from sage.connectors import JsonLinesFiles

    @dataclass(frozen=True)
    class Order:
        user: str
        price: int

    class Priced(MapFunction):
        def execute(self, order):
            if not os.path.exists("repaired"):
                raise ValueError(order.user)
            return [self.ctx.get_key().upper(), order.price]

    env = LocalEnvironment("orders")
    letters = env.dead_letters(store="failed.jsonl")
    orders = env.from_batch([Order("ann", 1), Order("bob", 2)], parallelism=2, name="orders")
    keyed = orders.keyby(lambda order: order.user)
    keyed.map(Priced, name="priced", parallelism=2, on_error=letters).sink(JsonLinesFiles("out"))
    keyed.map(lambda order: order.price).sink(JsonLinesFiles("others"))
    env.submit(autostop=True)
"""


def test_replay_keeps_keys_and_classes_of_the_program(tmp_path: Path) -> None:
    program(tmp_path, KEYED)
    sage(tmp_path, "run", "program.py")
    text = sage(tmp_path, "letters", "show", "failed.jsonl", "1")
    assert "record, which JSON does not have; it is also pickled:\n  Order(user=" in text
    assert written(tmp_path, "others") == [1, 2]
    (tmp_path / "repaired").touch()
    sage(tmp_path, "letters", "replay", "failed.jsonl", "program.py")
    assert written(tmp_path) == [["ANN", 1], ["BOB", 2]]
    assert written(tmp_path, "others") == [1, 2]
    assert (tmp_path / "failed.jsonl").read_bytes() == b""


def test_replay_keeps_the_input_of_an_operator_with_two(tmp_path: Path) -> None:
    program(
        tmp_path,
        """
        import os
        from sage import BaseCoMapFunction, LocalEnvironment
        from sage.connectors import JsonLinesFiles

        class Tagged(BaseCoMapFunction):
            def map0(self, record):
                return ["first", record]
            def map1(self, record):
                if not os.path.exists("repaired"):
                    raise ValueError(record)
                return ["second", record]

        env = LocalEnvironment("two")
        letters = env.dead_letters(store="failed.jsonl")
        first, second = env.from_batch([1], name="one"), env.from_batch([2], name="two")
        first.connect(second).comap(Tagged, name="tagged", on_error=letters).sink(JsonLinesFiles("out"))
        env.run()
        """,
    )
    sage(tmp_path, "run", "program.py")
    assert written(tmp_path) == [["first", 1]]
    (tmp_path / "repaired").touch()
    sage(tmp_path, "letters", "replay", "failed.jsonl", "program.py")
    assert written(tmp_path) == [["first", 1], ["second", 2]]


def test_the_letters_that_went_through_are_not_looked_for_one_by_one(tmp_path: Path) -> None:
    compared = 0

    class Id(str):
        __slots__ = ()

        def __eq__(self, other: object) -> bool:
            nonlocal compared
            compared += 1
            return str.__eq__(self, other)

        __hash__ = str.__hash__

    letters = [StoredLetter(Id(number), {"job": f"job {number % 2}", "operator": "o"}) for number in range(100)]
    file = tmp_path / "failed.jsonl"
    file.write_text("".join(f"{json.dumps({'id': one.id, **one.values})}\n" for one in letters))
    replay = LetterReplay(str(file), letters)
    report = JobReport("id", "job 1", Outcome.COMPLETED, Cleanliness.CLEAN, "", 0.0, 0.0, 0.0)
    line = replay.finish([report])
    assert line.startswith("50 dead letters put back in, of which 0 failed again; 50 dead letters left")
    assert replay.left == letters[::2]
    assert len(file.read_text().splitlines()) == 50
    assert compared < 500


def test_letters_stay_if_the_job_fails(failed: Path) -> None:
    text = (failed / "program.py").read_text(encoding="utf-8")
    (failed / "program.py").write_text(
        text.replace("raise LookupError(text)", 'raise SystemError("broken")').replace(
            'name="check", on_error=letters', 'name="checked"'
        ),
        encoding="utf-8",
    )
    sage(failed, "letters", "drop", "failed.jsonl", "--operator", "check", "--yes")
    before = (failed / "failed.jsonl").read_bytes()
    (failed / "repaired").touch()
    text = sage(failed, "letters", "replay", "failed.jsonl", "program.py", "durable", code=1)
    assert "SystemError: broken" in text
    assert '0 dead letters put back in, of which 0 failed again; 3 dead letters left, as job "texts" has not' in text
    assert (failed / "failed.jsonl").read_bytes() == before
    assert written(failed) == ["A", "B"]


@pytest.mark.parametrize(
    ("found", "put", "message"),
    [
        ('name="check"', 'name="other"', 'a dead letter failed in operator "check", which job "texts" does not have'),
        ('store="failed.jsonl"', 'store="else.jsonl"', 'does not store its dead letters in "'),
        ('name="check", on_error=letters', 'name="check"', 'operator "check" does not store its dead letters in "'),
        (
            'name="check", on_error=letters)',
            'name="check", on_error=letters).keyby(len).reduce(max, name="longest")',
            'reach "longest", which keeps a state',
        ),
        (
            'name="check", on_error=letters)',
            'name="check", on_error=letters).keyby(len).map(Counted, name="counted")',
            'reach "counted", which keeps a state',
        ),
        (
            'LocalEnvironment("texts"',
            'LocalEnvironment("other"',
            '4 dead letters left, as job "texts" has not completed',
        ),
    ],
)
def test_a_program_that_does_not_fit_is_refused(found: str, put: str, message: str, failed: Path) -> None:
    path = failed / "program.py"
    path.write_text(path.read_text(encoding="utf-8").replace(found, put), encoding="utf-8")
    before = (failed / "failed.jsonl").read_bytes()
    assert message in sage(failed, "letters", "replay", "failed.jsonl", "program.py", "durable", code=1)
    assert (failed / "failed.jsonl").read_bytes() == before
    assert written(failed) == ["A", "B"]
