"""The pages of the docs, and their code blocks, run as a reader would run them."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]

FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
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


def check_blocks(page: Path, folder: Path) -> None:
    """Run the blocks of a page and compare what they print with what the page says."""
    blocks = blocks_of(page)
    for block, printed in zip(blocks, run_page(page, blocks, folder), strict=True):
        if block.expected is not None:
            assert plain(printed) == plain(block.expected), f"{page.name}:{block.line}"


PAGES_WITH_CODE = [page for page in PAGES if blocks_of(page)]

EXTRAS_MARK = "<!-- takes extras -->"
PAGES_WITH_EXTRAS = [
    page
    for page in PAGES_WITH_CODE
    if page.parent.name == "ready-made" or EXTRAS_MARK in page.read_text(encoding="utf-8")
]
"""The pages whose blocks take extras to run; they are run with the tests of the ready-made services."""
