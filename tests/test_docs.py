"""The code blocks of the README and of the docs run, and what the docs say of names and numbers is so."""

from __future__ import annotations

import re
import tomllib
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
from pages import PAGES, PAGES_WITH_CODE, ROOT, blocks_of, check_blocks

import sage
from sage._runtime.lifecycle import Limits
from sage._runtime.states import JOB_NEXT, SERVICE_NEXT, TASK_NEXT
from sage.service import ServiceOptions

PLAIN_PAGES = [page for page in PAGES_WITH_CODE if page.parent.name != "ready-made"]
"""The pages on ready-made services take extras to run, and are run with the tests of these."""

IDS = [page.relative_to(ROOT).as_posix() for page in PAGES]

LINK = re.compile(r"\]\((?!https?://)([^)#]+)(#[^)]*)?\)")


@pytest.mark.parametrize("page", PLAIN_PAGES, ids=lambda page: page.name)
def test_the_code_blocks_run(page: Path, tmp_path: Path) -> None:
    check_blocks(page, tmp_path)


@pytest.mark.parametrize("page", PAGES, ids=IDS)
def test_the_links_lead_somewhere(page: Path) -> None:
    targets = [page.parent / match.group(1) for match in LINK.finditer(page.read_text(encoding="utf-8"))]
    assert [target for target in targets if not target.exists()] == []


def test_every_page_is_in_the_navigation() -> None:
    """Decisions are listed on the page of contents, so that the navigation stays short."""
    listed = str(tomllib.loads((ROOT / "zensical.toml").read_text(encoding="utf-8"))["project"]["nav"])
    contents = (ROOT / "docs" / "index.md").read_text(encoding="utf-8")
    assert [
        name for name in IDS if f"'{name}'" not in listed and f"({name.removeprefix('docs/')})" not in contents
    ] == []


def test_the_blocks_are_found() -> None:
    """A fence that the pattern misses would be code that no test runs."""
    for page in PAGES:
        fences = page.read_text(encoding="utf-8").count("```python")
        assert len(blocks_of(page)) == fences, page.name
    assert len(blocks_of(ROOT / "docs" / "tutorial.md")) > 10


def test_every_public_name_is_described() -> None:
    text = "\n".join(page.read_text(encoding="utf-8") for page in PAGES)
    assert [name for name in sage.__all__ if f"`{name}`" not in text] == []


@pytest.mark.parametrize(
    ("subject", "table"),
    [("job", JOB_NEXT), ("task", TASK_NEXT), ("service", SERVICE_NEXT)],
    ids=["job", "task", "service"],
)
def test_the_table_of_states_is_that_of_the_code(subject: str, table: dict[str, frozenset[str]]) -> None:
    text = (ROOT / "docs" / "lifecycle.md").read_text(encoding="utf-8")
    rows = text.split(f"| {subject} | may be followed by |")[1].split("\n\n")[0].splitlines()[2:]
    found: dict[str, set[str]] = {}
    for row in rows:
        _, before, after, _ = row.split("|")
        for state in re.findall(r"`(\w+)`", before):
            found[state] = set(re.findall(r"`(\w+)`", after))
    assert found == {str(state): set(map(str, following)) for state, following in table.items()}


@pytest.mark.parametrize("settings", [Limits(), ServiceOptions()], ids=["Limits", "ServiceOptions"])
def test_the_table_of_defaults_is_that_of_the_code(settings: Any) -> None:
    text = (ROOT / "docs" / "lifecycle.md").read_text(encoding="utf-8")
    rows = dict(re.findall(r"^\| `(\w+)` \| `([^`]*)` \|", text, re.MULTILINE))
    expected = {field.name: repr(getattr(settings, field.name)) for field in fields(settings)}
    shared = {name for name in expected if name in rows}
    assert shared == set(expected)
    by_section = text.split("### Options of a service")
    section = by_section[1] if isinstance(settings, ServiceOptions) else by_section[0]
    found = dict(re.findall(r"^\| `(\w+)` \| `([^`]*)` \|", section, re.MULTILINE))
    assert {name: found.get(name) for name in expected} == expected
