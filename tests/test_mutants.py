"""The table of mistakes still fits the sources. Whether the tests notice them, `python tests/mutants.py` shows."""

from __future__ import annotations

import pytest
from mutant_table import MUTANTS
from mutants import complaints

KNOWN = MUTANTS[0]


def test_every_edit_applies_and_names_a_test_that_exists() -> None:
    found = list(complaints(MUTANTS))
    if found:
        pytest.fail("\n".join(found), pytrace=False)


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        ({"old": "such a text nobody wrote"}, "its old text is 0 times in"),
        ({"old": "self"}, "its old text is "),
        ({"new": "def"}, "is not Python any more"),
        ({"test": "tests/test_of_nothing.py::test_it"}, "tests/test_of_nothing.py is missing"),
        ({"test": "tests/test_mutants.py::test_of_nothing"}, "test_of_nothing is missing in tests/test_mutants.py"),
    ],
)
def test_a_row_that_has_rotted_is_named(change: dict[str, str], complaint: str) -> None:
    [found] = complaints([KNOWN._replace(**change)])
    assert found.startswith(f"{KNOWN.name}: ")
    assert complaint in found
