"""Memories and turns as JSON Lines: a line that identifies the file, then one for each."""

from __future__ import annotations

import json
import os
import sys
import types
from contextlib import suppress
from dataclasses import asdict, dataclass, fields
from typing import TYPE_CHECKING, Any, get_args, get_origin, get_type_hints

from sage.errors import ServiceError, hint, short
from sage.services.vectors.filters import problem_of

if TYPE_CHECKING:
    from collections.abc import Iterable

VERSION = 1

FLOAT32_MAX = (2 - 2**-23) * 2.0**127
"""The largest number that a vector can have."""


@dataclass(frozen=True, slots=True)
class MemoryLine:
    """A memory; moments are seconds since the epoch."""

    id: str
    session: str
    text: str
    importance: float
    created_at: float
    recalled_at: float
    expires_at: float | None
    metadata: dict[str, object]
    vector: list[float]


@dataclass(frozen=True, slots=True)
class TurnLine:
    """A turn of a conversation."""

    id: str
    session: str
    role: str
    content: str
    at: float


KINDS: dict[str, type[MemoryLine | TurnLine]] = {"memory": MemoryLine, "turn": TurnLine}
HINTS = {kind: get_type_hints(kind) for kind in KINDS.values()}
NAMES = {kind: name for name, kind in KINDS.items()}


def write(path: str | os.PathLike[str], model: str | None, lines: Iterable[MemoryLine | TurnLine]) -> int:
    """Write lines to a file that is there when it is complete, and not before; return how many."""
    path = os.path.abspath(os.fspath(path))
    partial = f"{path}.{os.getpid()}.partial"
    count = 0
    try:
        try:
            with open(partial, "w", encoding="utf-8") as file:
                file.write(json.dumps({"kind": "sage-memory", "version": VERSION, "model": model}) + "\n")
                for line in lines:
                    file.write(json.dumps({"kind": NAMES[type(line)], **asdict(line)}) + "\n")
                    count += 1
                file.flush()
                os.fsync(file.fileno())
            os.replace(partial, path)
        except BaseException:
            with suppress(OSError):
                os.unlink(partial)
            raise
    except OSError as error:
        raise ServiceError(f'file "{path}" cannot be written: {error.strerror}', fault="external") from error
    return count


def read(path: str | os.PathLike[str]) -> tuple[str | None, list[MemoryLine | TurnLine]]:
    """Return the model and the lines of a file."""
    path = os.path.abspath(os.fspath(path))
    lines: list[MemoryLine | TurnLine] = []
    try:
        with open(path, encoding="utf-8") as file:
            first = _object(path, 1, file.readline())
            if first.get("kind") != "sage-memory":
                raise hint(_broken(path, 1, "it is not an export of a memory"), "Use a file that Memory.export wrote.")
            if first.get("version") != VERSION:
                raise _broken(path, 1, f"it has version {short(first.get('version'))}, not {VERSION}")
            model = first.get("model")
            if not isinstance(model, str | None):
                raise _broken(path, 1, f'its "model" is {short(model)}')
            for number, text in enumerate(file, 2):
                if text.strip():
                    lines.append(_line(path, number, _object(path, number, text)))
    except OSError as error:
        raise ServiceError(f'file "{path}" cannot be read: {error.strerror}', fault="external") from error
    except UnicodeDecodeError as error:
        raise ServiceError(f'file "{path}" is not a text file: {error.reason}') from error
    return model, lines


def _object(path: str, number: int, text: str) -> dict[str, object]:
    try:
        found = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise _broken(path, number, f"it is not JSON: {error}") from None
    if not isinstance(found, dict):
        raise _broken(path, number, f"it is {short(found)}, not an object")
    return found


def _line(path: str, number: int, found: dict[str, Any]) -> MemoryLine | TurnLine:
    kind = KINDS.get(str(found.pop("kind", None)))
    if kind is None:
        raise _broken(path, number, 'its kind is neither "memory" nor "turn"')
    names = [field.name for field in fields(kind)]
    if found.keys() != set(names):
        odd = ", ".join(f'"{name}"' for name in sorted(found.keys() ^ set(names)))
        raise _broken(path, number, f"it lacks, or has extra, {odd}")
    for name in names:
        if not _fits(found[name], HINTS[kind][name]):
            raise _broken(path, number, f'its "{name}" is {short(found[name])}')
    if not 0 <= found.get("importance", 0) <= 1:
        raise _broken(path, number, f'its "importance" is {found["importance"]}, not from 0 to 1')
    # SQLite takes whole numbers of 64 bits only.
    whole = {name: float(found[name]) for name in names if isinstance(found[name], int)}
    return kind(**{**found, **whole})


def _fits(value: object, hinted: object) -> bool:
    """Return whether a value of JSON has the type that a field is hinted with."""
    if hinted is float:
        return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) <= sys.float_info.max
    if isinstance(hinted, types.UnionType):
        return any(_fits(value, part) for part in get_args(hinted))
    if get_origin(hinted) is list:
        return (
            isinstance(value, list)
            and bool(value)
            and all(_fits(part, float) and abs(part) <= FLOAT32_MAX for part in value)
        )
    if hinted is str:
        return isinstance(value, str) and problem_of(value) is None
    kind = get_origin(hinted) or hinted
    return isinstance(kind, type) and isinstance(value, kind)


def _broken(path: str, number: int, what: str) -> ServiceError:
    return ServiceError(f'file "{path}" cannot be imported: line {number}: {what}')
