"""JSON Lines: one value a line."""

from __future__ import annotations

import base64
import json
import math
import pickle
from typing import TYPE_CHECKING, Any

from sage.connectors.files import FileSink, FileSource, Format, Lines
from sage.errors import ConnectorError, describe, hint, short

if TYPE_CHECKING:
    import os
    from collections.abc import Iterator, Mapping, Sequence


TEXT_LENGTH_MAX = 1_000
"""How long the text of a value is at most that JSON does not have."""

DEPTH_MAX = 100
INTEGERS_END = 1 << 1_000
"""Python refuses to read and write much longer numbers as text."""


def as_json(name: str, value: object) -> dict[str, object]:
    """Return a value under a name, or, if JSON does not have it, as text for a person and pickled in base64."""
    if _is_json(value):
        return {name: value}
    found: dict[str, object] = {f"{name}_text": short(value, TEXT_LENGTH_MAX).encode(errors="replace").decode()}
    try:
        pickled = pickle.dumps(value, pickle.HIGHEST_PROTOCOL)
    except Exception:  # of the user's classes
        return found
    return {**found, f"{name}_pickled": base64.b64encode(pickled).decode()}


def from_json(name: str, values: Mapping[str, Any]) -> Any:
    """Return the value that `as_json` put there. This may unpickle it, which can run code.

    Raises:
        ConnectorError: it was not pickled, or cannot be unpickled.
    """
    if name in values:
        return values[name]
    text = f"{name} {values.get(f'{name}_text')}"
    if f"{name}_pickled" not in values:
        raise ConnectorError(f"{text} could not be pickled, so only its text is there", fault="user")
    try:
        return pickle.loads(base64.b64decode(values[f"{name}_pickled"]))
    except Exception as error:
        raise ConnectorError(f"{text} cannot be unpickled: {describe(error)}") from error


def _is_json(value: Any, depth: int = 0) -> bool:
    """Return whether JSON gives the value back as it is."""
    kind = type(value)
    if kind is str:
        return bool(value.encode(errors="replace").decode() == value)
    if kind is int:
        return bool(-INTEGERS_END < value < INTEGERS_END)
    if kind is float:
        return math.isfinite(value)
    if depth == DEPTH_MAX:
        return False
    if kind is list:
        return all(_is_json(one, depth + 1) for one in value)
    if kind is dict:
        return all(type(key) is str and _is_json(key) and _is_json(one, depth + 1) for key, one in value.items())
    return value is None or kind is bool


class JsonFormat(Format):
    """A value a line; empty lines are passed over."""

    suffix = ".jsonl"

    def decode(self, lines: Lines, header: object) -> Iterator[object]:  # noqa: ARG002
        """Yield the values."""
        for line in lines:
            if line.strip():
                try:
                    value = json.loads(line)
                except (ValueError, RecursionError) as error:
                    raise ValueError("is not JSON") from error
                yield value

    def encode(self, record: object) -> bytes:
        """Return the line of a value."""
        try:
            return f"{json.dumps(record, ensure_ascii=False)}\n".encode()
        except (TypeError, ValueError) as error:
            refused = ConnectorError(f"record {short(record)} cannot be written as JSON: {describe(error)}")
            raise hint(refused, "Map it to dicts, lists, texts and numbers before the sink.") from error


class JsonLines(FileSource):
    """Reads the values in all files of a pattern, one value a line, file by file in the order of their names.

    It ends after the last file. Its position is the number of bytes read of each file, so that a durable job that runs
    again reads only lines that are new, at the end of a file or in further files. A last line without a line end counts
    as a line.

    Args:
        pattern: the files, such as "in/*.jsonl"; `**` stands for any folders, and a folder for all files below it.
        bad_lines: "fail" ends the job at a line that is not JSON; "skip" leaves it out, and the report counts it.
    """

    def __init__(self, pattern: str | os.PathLike[str], *, bad_lines: str = "fail") -> None:
        super().__init__(pattern, JsonFormat(), bad_lines)


class JsonLinesFiles(FileSink):
    """Writes values into files of a folder, one value a line; a file appears when its checkpoint is complete.

    Until then its name begins with a dot. Nothing changes in a file that has appeared. In the order of their names, the
    files of one task have its records in order.

    Args:
        folder: the folder; made if it is not there.
        partition_by: columns whose values name the folders in which records stand, as in "out/day=5".
        file_bytes_max: about how large a file gets before another one is begun, in bytes.
    """

    def __init__(
        self,
        folder: str | os.PathLike[str],
        *,
        partition_by: str | Sequence[str] = (),
        file_bytes_max: int | None = None,
    ) -> None:
        super().__init__(folder, JsonFormat(), partition_by=partition_by, file_bytes_max=file_bytes_max)
