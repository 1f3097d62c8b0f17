"""The code blocks of the README and of the docs run, and what the docs say of names and numbers is so."""

from __future__ import annotations

import builtins
import importlib
import re
import tomllib
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
from support.docs_pages import PAGES, PAGES_WITH_CODE, PAGES_WITH_EXTRAS, ROOT, blocks_of, check_blocks

import sage
from sage._runtime.lifecycle import Limits
from sage._runtime.states import JOB_NEXT, SERVICE_NEXT, TASK_NEXT
from sage.service import ServiceOptions

PLAIN_PAGES = [page for page in PAGES_WITH_CODE if page not in PAGES_WITH_EXTRAS]

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
    assert [name for name in vars(sage)["__all__"] if f"`{name}`" not in text] == []
    reference = (ROOT / "docs" / "reference.md").read_text(encoding="utf-8")
    assert [name for name in vars(sage)["__all__"] if f"::: sage.{name}\n" not in reference] == []


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


NAMED = re.compile(r"`([A-Za-z_][\w.]*)`|\(`(?:[\w/]+)\.py`\)")
MODULES = re.compile(r"\(`([\w/]+)\.py`\)")


def test_the_life_of_a_record_names_what_is_there() -> None:
    """Each name between backticks is in a module that the page names, in a class of one, or in the page's example."""
    text = (ROOT / "docs/life-of-a-record.md").read_text("utf-8")
    example = set(re.findall(r"\w+", "".join(re.findall(r"```.*?```", text, re.DOTALL))))
    walk = re.sub(r"```.*?```", "", text, flags=re.DOTALL)
    modules = [importlib.import_module("sage." + path.replace("/", ".")) for path in MODULES.findall(walk)]
    owners: dict[str, Any] = {module.__name__.rpartition(".")[2]: module for module in modules}
    for module in modules:
        owners |= {name: value for name, value in vars(module).items() if isinstance(value, type)}
    known = example.union(owners, dir(builtins), JOB_NEXT, *(dir(owner) for owner in owners.values()))
    names = [name for name in NAMED.findall(walk) if name]
    missing = [name for name in names if not all(part in known for part in name.split("."))]
    qualified = [name.split(".") for name in names if name.count(".") == 1]
    missing += [f"{owner}.{name}" for owner, name in qualified if owner in owners and not hasattr(owners[owner], name)]
    assert names
    assert missing == []
