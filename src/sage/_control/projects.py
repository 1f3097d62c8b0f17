"""New projects: folders with a pipeline, a config and tests that pass, made from templates."""

from __future__ import annotations

import re
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING

from sage.errors import ControlError, hint

if TYPE_CHECKING:
    from collections.abc import Iterator
    from importlib.resources.abc import Traversable

NAME = re.compile(r"[A-Za-z][A-Za-z0-9_.-]{0,98}[A-Za-z0-9]|[A-Za-z]", re.ASCII)
"""The pattern of a valid distribution name."""

SUFFIX = ".in"
HIDDEN = {"gitignore": ".gitignore"}


def make_project(template: str, folder: Path) -> list[Path]:
    """Make a project in a new folder, whose name is the project's, and return its files."""
    name = folder.absolute().name
    if not NAME.fullmatch(name):
        error = ControlError(f'"{name}" cannot be the name of a project')
        raise hint(error, "It has letters, digits, dots, hyphens and underscores, and begins with a letter.")
    made = []
    try:
        if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
            raise hint(ControlError(f'"{folder}" is there already'), "Choose another name, or an empty folder.")
        for path, text in _files(resources.files("sage._control") / "templates" / template):
            target = folder / path
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_text(text.replace("@NAME@", name), encoding="utf-8")
            made.append(target)
    except OSError as error:
        raise ControlError(f'"{folder}" cannot be written: {error.strerror or error}') from error
    return made


def _files(folder: Traversable, above: Path = Path()) -> Iterator[tuple[Path, str]]:
    """Yield path and text of the files of a template; their own suffix keeps tools from taking them for programs."""
    for entry in sorted(folder.iterdir(), key=lambda entry: entry.name):
        if entry.is_dir():
            yield from _files(entry, above / entry.name)
        elif entry.name.endswith(SUFFIX):
            name = entry.name.removesuffix(SUFFIX)
            yield above / HIDDEN.get(name, name), entry.read_text(encoding="utf-8")
