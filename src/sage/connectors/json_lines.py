"""JSON Lines: one value a line, in files that are read from where the last run stopped, or appear with checkpoints."""

from __future__ import annotations

import base64
import glob
import json
import math
import os
import pickle
from collections import deque
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

from sage.connector import Source, TransactionalSink
from sage.errors import ConnectorError, describe, hint, short

if TYPE_CHECKING:
    from collections.abc import Sequence

READ_BYTES = 1 << 20
LINE_END, CARRIAGE_RETURN = b"\n\r"

TEXT_LENGTH_MAX = 1_000
"""How long the text of a value is at most that JSON does not have."""

DEPTH_MAX = 100
INTEGERS_END = 1 << 1_000
"""Python refuses to read and write much longer numbers as text."""

PREPARED = ".prepared"
"""The end of the name of a file that has not appeared, so that patterns for the others do not find it."""


class JsonLines(Source[Any]):
    """Reads the values in all files of a pattern, file by file in the order of their names.

    It ends after the last file. Its position is the number of bytes read of each file, so that a durable job that runs
    again reads only lines that are new, at the end of a file or in further files. A last line without a line end counts
    as a line.

    Args:
        pattern: the files, such as "in/*.jsonl"; `**` stands for any folders.
    """

    def __init__(self, pattern: str | os.PathLike[str]) -> None:
        self._pattern = os.fspath(pattern)
        self._offsets: dict[str, int] = {}
        self._left: deque[str] = deque()
        self._file: BinaryIO | None = None
        self._path = ""

    def open(self, position: dict[str, int] | None = None) -> None:
        """Find the files.

        Raises:
            ConnectorError: a file is shorter than it was, a line that was read has grown, or no file matches, and none
                ever did.
        """
        self._offsets = dict(position or {})
        self._left = deque(sorted(glob.glob(self._pattern, recursive=True)))
        if not self._left and not self._offsets:
            error = ConnectorError(f'no file matches "{self._pattern}"', fault="external")
            raise hint(error, f"The program runs in {os.getcwd()}.")
        for path in self._left:
            size, read = os.path.getsize(path), self._offsets.get(path, 0)
            if size < read:
                text = f'file "{path}" has {size:,} bytes, and {read:,} were read before'
                error = ConnectorError(text, fault="external")
                raise hint(error, "Give other contents another name; a durable job reads on where it stopped.")
            if 0 < read < size and _is_inside_a_line(path, read):
                text = f'file "{path}" goes on inside a line that was read before, at byte {read:,}'
                error = ConnectorError(text, fault="external")
                raise hint(error, "Write whole lines, or write elsewhere and rename the file when it is complete.")

    def read(self, records_max: int) -> list[Any] | None:
        """Return the values of the next lines."""
        records: list[Any] = []
        while len(records) < records_max:
            if self._file is None:
                if not self._left:
                    break
                self._path = self._left.popleft()
                self._file = open(self._path, "rb", READ_BYTES)  # noqa: SIM115  (closed by `close`)
                self._file.seek(self._offsets.get(self._path, 0))
            line = self._file.readline()
            if not line:
                self._file.close()
                self._file = None
                continue
            if line.strip():
                try:
                    records.append(json.loads(line))
                except ValueError as error:
                    if records:
                        self._file.seek(-len(line), os.SEEK_CUR)  # those before it go on first
                        break
                    offset = self._offsets.get(self._path, 0)
                    text = f'file "{self._path}" has a line that is not JSON at byte {offset:,}: {short(line)}'
                    raise ConnectorError(text, fault="external") from error
            self._offsets[self._path] = self._offsets.get(self._path, 0) + len(line)
        return records or None

    def position(self) -> dict[str, int]:
        """Return how many bytes of each file were read."""
        return dict(self._offsets)

    def close(self) -> None:
        """Close the file that is being read."""
        if self._file is not None:
            self._file.close()


def _is_inside_a_line(path: str, offset: int) -> bool:
    with open(path, "rb") as file:
        file.seek(offset - 1)
        before, *after = file.read(2)
    return before != LINE_END and after[0] not in (LINE_END, CARRIAGE_RETURN)


def as_json(name: str, value: Any) -> dict[str, Any]:
    """Return a value under a name, or, if JSON does not have it, as text for a person and pickled in base64."""
    if _is_json(value):
        return {name: value}
    found = {f"{name}_text": short(value, TEXT_LENGTH_MAX).encode(errors="replace").decode()}
    try:
        pickled = pickle.dumps(value, pickle.HIGHEST_PROTOCOL)
    except Exception:  # of the user's classes
        return found
    return {**found, f"{name}_pickled": base64.b64encode(pickled).decode()}


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


def _line(value: object) -> str:
    try:
        return f"{json.dumps(value, ensure_ascii=False)}\n"
    except (TypeError, ValueError) as error:
        refused = ConnectorError(f"record {short(value)} cannot be written as JSON: {describe(error)}")
        raise hint(refused, "Map it to dicts, lists, texts and numbers before the sink.") from error


class JsonLinesFiles(TransactionalSink[Any]):
    """Writes values into files of a folder, one value a line; a file appears when its checkpoint is complete.

    Until then its name begins with a dot. Nothing changes in a file that has appeared. In the order of their names, the
    files of one task have its records in order.

    Args:
        folder: the folder; made if it is not there.
    """

    def __init__(self, folder: str | os.PathLike[str]) -> None:
        self._folder = Path(folder)
        self._part = ""
        self._file: BinaryIO | None = None

    def open(self, part: str, checkpoint: int) -> None:
        """Make the folder, and remove files of this part that belong to no checkpoint."""
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            text = f'folder "{self._folder}" cannot be written into: {describe(error)}'
            raise ConnectorError(text, fault="external") from error
        self._part = part
        self._writing.unlink(missing_ok=True)
        for path in self._folder.iterdir():
            name = path.name.removeprefix(".").removesuffix(PREPARED).removesuffix(".jsonl")
            begin, _, number = name.rpartition("-")
            if begin == part and int(number) > checkpoint:
                path.unlink()

    @property
    def _writing(self) -> Path:
        return self._folder / f".{self._part}.writing"

    def _prepared(self, name: str) -> Path:
        return self._folder / f".{name}{PREPARED}"

    def write(self, batch: Sequence[Any]) -> None:
        """Add a line for each value.

        Raises:
            ConnectorError: a value is not JSON.
        """
        if self._file is None:
            self._file = self._writing.open("wb")
        self._file.write("".join(map(_line, batch)).encode())

    def prepare(self, number: int) -> str | None:
        """Write the file through to the disk, and return the name that it will have."""
        if self._file is None:
            return None
        file, self._file = self._file, None
        with file:
            file.flush()
            os.fsync(file.fileno())
        name = f"{self._part}-{number:08}.jsonl"
        self._writing.replace(self._prepared(name))
        self._sync()
        return name

    def commit(self, token: str) -> None:
        """Give the file its name."""
        # If it is not there any more, it has its name already, or somebody has taken it on from there.
        with suppress(FileNotFoundError):
            self._prepared(token).replace(self._folder / token)
        self._sync()

    def abort(self) -> None:
        """Remove the file that was not prepared."""
        if self._file is not None:
            self._file.close()
            self._file = None
            self._writing.unlink(missing_ok=True)

    def _sync(self) -> None:
        """Write the names of the folder through to the disk."""
        folder = os.open(self._folder, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)
