"""The code blocks of the README and of the docs run, and what the docs say of names and numbers is so."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from dataclasses import fields
from pathlib import Path
from typing import Any, NamedTuple

import pytest

import sage
from sage._runtime.lifecycle import Limits
from sage._runtime.states import JOB_NEXT, SERVICE_NEXT, TASK_NEXT
from sage.service import ServiceOptions

ROOT = Path(__file__).resolve().parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
IDS = [page.relative_to(ROOT).as_posix() for page in PAGES]

FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
LINK = re.compile(r"\]\((?!https?://)([^)#]+)(#[^)]*)?\)")
DURATION = re.compile(r"[\d.,]+ (us|ms|s)\b")

# Runs in a fresh interpreter, so that a page leaves no threads, signal handlers or loggers behind for another test.
RUN_BLOCKS = """
import io, json, sys
from contextlib import redirect_stdout

path, blocks = json.load(sys.stdin)
names, printed = {"__name__": "__main__"}, []
for line, code in blocks:
    out = io.StringIO()
    with redirect_stdout(out):
        exec(compile("\\n" * line + code, path, "exec"), names)
    printed.append(out.getvalue())
print(json.dumps(printed))
"""


class Block(NamedTuple):
    """A python block of a page, with the text block that stands right behind it, if there is one."""

    line: int
    code: str
    expected: str | None


def blocks_of(page: Path) -> list[Block]:
    text = page.read_text(encoding="utf-8")
    found = list(FENCE.finditer(text))
    blocks = []
    for place, fence in enumerate(found):
        if fence.group(1) != "python":
            continue
        behind = found[place + 1] if place + 1 < len(found) else None
        follows = behind is not None and behind.group(1) == "text" and not text[fence.end() : behind.start()].strip()
        expected = behind.group(2) if behind is not None and follows else None
        blocks.append(Block(text[: fence.start(2)].count("\n"), fence.group(2), expected))
    return blocks


def plain(text: str) -> list[str]:
    """Return lines that do not depend on how fast the machine is, nor on the width of columns."""
    return [" ".join(DURATION.sub("0 s", line).split()) for line in text.strip().splitlines()]


def run_page(page: Path, blocks: list[Block], folder: Path) -> list[str]:
    path = os.pathsep.join([str(ROOT / "src"), os.environ.get("PYTHONPATH", "")])
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", RUN_BLOCKS],
        input=json.dumps([str(page), [(block.line, block.code) for block in blocks]]),
        capture_output=True,
        text=True,
        cwd=folder,
        # Other programs of this machine leave files in the shared folder for temporary ones meanwhile.
        env={**os.environ, "PYTHONPATH": path, "TMPDIR": str(folder)},
    )
    assert done.returncode == 0, done.stderr
    printed: list[str] = json.loads(done.stdout.splitlines()[-1])
    return printed


@pytest.mark.parametrize("page", [page for page in PAGES if blocks_of(page)], ids=lambda page: page.name)
def test_the_code_blocks_run(page: Path, tmp_path: Path) -> None:
    blocks = blocks_of(page)
    for block, printed in zip(blocks, run_page(page, blocks, tmp_path), strict=True):
        if block.expected is not None:
            assert plain(printed) == plain(block.expected), f"{page.name}:{block.line}"


@pytest.mark.parametrize("page", PAGES, ids=IDS)
def test_the_links_lead_somewhere(page: Path) -> None:
    targets = [page.parent / match.group(1) for match in LINK.finditer(page.read_text(encoding="utf-8"))]
    assert [target for target in targets if not target.exists()] == []


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
