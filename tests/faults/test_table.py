"""The page about faults says what the tests show, and the matrix has every row that it should have."""

from __future__ import annotations

import re
from pathlib import Path

from faults import deeds
from faults.matrix import DEADLY, HOSTS, PLACES, ROWS, STARTING, WAYS, expected, table

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "faults.md").read_text(encoding="utf-8")
NAMED = re.compile(r"\[`([^`]+)`\]\(\.\./(tests/[^)]+\.py)\)")
# Not by `ast`, which takes seconds for these files, and of which CPython 3.11 loses its count of the depth at times.
DEFINED = re.compile(r"^ *def (\w+)\(", re.MULTILINE)


def test_the_matrix_of_the_page_is_that_of_the_tests() -> None:
    shown = PAGE.split("<!-- matrix -->\n")[1].split("<!-- end of matrix -->")[0]
    assert shown == table()


def test_the_deeds_of_the_page_are_those_of_the_tests() -> None:
    shown = PAGE.split("<!-- deeds -->\n")[1].split("<!-- end of deeds -->")[0]
    assert shown == deeds.table()


def test_every_test_that_the_page_names_is_there() -> None:
    named = NAMED.findall(PAGE)
    assert len(named) > 80
    texts = {file: (ROOT / file).read_text(encoding="utf-8") for _, file in named}
    there = {(name, file) for file, text in texts.items() for name in DEFINED.findall(text)}
    there |= {(Path(file).name, file) for file in texts}
    assert [f"{file}::{name}" for name, file in named if (name, file) not in there] == []


def test_no_case_is_forgotten() -> None:
    """Every number from 1 to 133 stands in a table, as a number or inside a range."""
    cells = re.findall(r"^\| ([\d, to]+) \|", PAGE, re.MULTILINE)
    seen: set[int] = set()
    for part in ", ".join(cells).split(", "):
        first, _, last = part.partition(" to ")
        seen |= set(range(int(first), int(last or first) + 1))
    assert sorted(set(range(1, 134)) - seen) == []


def test_every_fault_is_in_every_place() -> None:
    for host, places in HOSTS.items():
        assert places.keys() == set(PLACES) if host != "command" else places.keys() < set(PLACES)
        for place, faults in places.items():
            found = {row.fault for row in ROWS if (row.host, row.place) == (host, place)}
            assert found == set(faults), (host, place)
    for fault in ("raises", *DEADLY):
        assert {row.way for row in ROWS if (row.place, row.fault) == ("stop", fault)} == set(WAYS)


def test_whoever_was_built_and_lives_is_cleaned_up_once() -> None:
    """The rule behind the rows: it holds unless the process is gone, or was stopped in its tracks.

    A command has no cleanup, and is told to stop once if it lives; one that was stopped is woken.
    """
    for row in ROWS:
        must = expected(row)
        if row.host == "command":
            is_gone = row.fault in DEADLY and row.place != "stop"
            assert must.marks.count("faulty.stop") == (0 if is_gone else 1), row
            continue
        cleanups = must.marks.count("faulty.cleanup")
        is_gone = row.fault in (*DEADLY, "stopped") and row.place != "cleanup"
        is_unbuilt = row.place == STARTING[0] and row.fault != "slow"
        assert cleanups == (0 if is_gone or is_unbuilt else 1), row
