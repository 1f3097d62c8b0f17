"""Errors that end a command with their text."""

from __future__ import annotations

import sys
from contextlib import contextmanager
from typing import TYPE_CHECKING

import click

from sage.errors import SageError

if TYPE_CHECKING:
    from collections.abc import Iterator


@contextmanager
def said_to_a_person(exit_code: int = 1) -> Iterator[None]:
    """Let an error of ours end the command with its text and its notes instead of a traceback."""
    try:
        yield
    except (SageError, PermissionError) as error:
        click.ClickException("\n".join([str(error), *getattr(error, "__notes__", ())])).show()
        sys.exit(exit_code)
