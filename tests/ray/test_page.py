"""The program of docs/ray.md, on a Ray of its own."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.ray

PAGE = Path(__file__).parents[2] / "docs" / "ray.md"


def test_the_program_of_the_page_runs(short_folder: Path) -> None:
    """With no address it starts a Ray of its own, which is gone at the end with all the rest."""
    match = re.search(r"```py\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL)
    assert match is not None
    program = short_folder / "program.py"
    program.write_text(match.group(1))
    done = subprocess.run([sys.executable, program], capture_output=True, text=True, timeout=180)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == "['Does it work? Yes.', 'Is it so? Yes.']"
