"""The command line: run, watch and explain a program."""

from __future__ import annotations

import sys


def main(prog_name: str | None = None) -> None:
    """Run the command `sage`. `sage exec` skips the imports of the other commands, to start quickly."""
    words = sys.argv[3:] if sys.argv[2:3] == ["--"] else sys.argv[2:]
    if sys.argv[1:2] == ["exec"] and words and not words[0].startswith("-"):
        from sage._control.supervisor import run
        from sage._processes import leave

        leave(run(words))
    from sage._control.cli import main as commands

    commands(prog_name=prog_name)
