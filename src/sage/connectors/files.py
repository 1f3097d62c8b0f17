"""Records in files, whatever their format: sources that read on from the last run, and sinks of files that appear."""

from __future__ import annotations

import glob
import logging
import os
from abc import ABC, abstractmethod
from collections import deque
from contextlib import contextmanager, suppress
from copy import copy
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, Generic

from sage._arguments import path_of
from sage._types import T
from sage.connector import Source, TransactionalSink
from sage.errors import ConnectorError, GraphError, describe, hint, short

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

logger = logging.getLogger(__name__)

READ_BYTES = 1 << 20
LINE_END = b"\n"
BYTE_ORDER_MARK = b"\xef\xbb\xbf"

BAD_LINES = ("fail", "skip")

PREPARED = ".prepared"
"""The end of the name of a file that has not appeared, so that patterns for the others do not find it."""


@contextmanager
def _naming(place: str, done: str) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise ConnectorError(f"{place} cannot be {done}: {describe(error)}", fault="external") from error


def check_encoding(owner: str, encoding: str) -> None:
    """Refuse an encoding that is unknown, or in which a line end has other bytes than in ASCII.

    Raises:
        GraphError: the encoding cannot be used; `owner` names the class.
    """
    try:
        is_usable = "\n".encode(encoding) == LINE_END
    except (LookupError, TypeError, ValueError):
        is_usable = False
    if not is_usable:
        error = GraphError(f"{owner}: encoding is {short(encoding)}, which does not divide a file into lines")
        raise hint(
            error, 'Give one that extends ASCII, such as "utf-8" or "latin-1"; a mark at the beginning is dropped.'
        )


class Lines:
    """The lines of one file, each with its end.

    Attributes:
        path: the file.
        start: the byte at which the last line begins.
        offset: the byte at which the next line begins.
    """

    def __init__(self, path: str) -> None:
        self.path = path
        self.start = self.offset = 0
        self._counted = 0, 1
        self._file: BinaryIO = open(path, "rb", READ_BYTES)  # noqa: SIM115  (closed by `close`)

    def __iter__(self) -> Lines:
        return self

    def __next__(self) -> bytes:
        self.start = self.offset
        line = self._file.readline()
        self.offset += len(line)
        if not self.start:
            line = line.removeprefix(BYTE_ORDER_MARK)
        if not line:
            raise StopIteration
        return line

    def seek(self, offset: int) -> None:
        """Go on at a byte."""
        self._file.seek(offset)
        self.start = self.offset = offset

    def go_on(self, offset: int) -> None:
        """Go on at the position of an earlier run; if its last line had no end, the end is passed over.

        Raises:
            ConnectorError: the line has grown.
        """
        self.seek(offset - 1)
        if self._file.read(1) == LINE_END:
            self.seek(offset)
            return
        self.seek(offset)
        if next(self, b"").strip(b"\r\n"):
            text = f'file "{self.path}" goes on inside a line that was read before, at byte {offset:,}'
            error = ConnectorError(text, fault="external")
            raise hint(error, "Write whole lines, or write elsewhere and rename the file when it is complete.")

    def number(self) -> int:
        """Return the number of the last line, from 1, and count on from the last time."""
        at, number = self._counted
        self._file.seek(at)
        while at < self.start and (data := self._file.read(min(READ_BYTES, self.start - at))):
            number += data.count(LINE_END)
            at += len(data)
        self._counted = at, number
        self._file.seek(self.offset)
        return number

    def close(self) -> None:
        """Close the file."""
        self._file.close()


class Format(ABC, Generic[T]):
    """How the records of a file are written. Its methods raise a ValueError whose text follows on the line's number.

    Attributes:
        suffix: the end of the names of files.
    """

    suffix: str

    def begin(self, lines: Lines) -> Any:
        """Read the beginning of a file, and return the `header` for `decode`."""

    @abstractmethod
    def decode(self, lines: Lines, header: Any) -> Iterator[T]:
        """Yield the records, having read no line behind each; after an error, `lines.start` is where it begins."""

    def head(self, record: T) -> bytes:  # noqa: ARG002
        """Return the beginning of a file whose first record is this one."""
        return b""

    @abstractmethod
    def encode(self, record: T) -> bytes:
        """Return the lines of a record.

        Raises:
            ConnectorError: the record cannot be written in this format.
        """


class FileSource(Source[T]):
    """Reads the records in all files of a pattern, file by file in the order of their names.

    It ends after the last file. Its position is the number of bytes read of each file, so that a durable job that runs
    again reads only records that are new, at the end of a file or in further files. A last line without a line end
    counts as a line.

    Args:
        pattern: the files, such as "in/*.jsonl"; `**` stands for any folders.
        format: their format.
        bad_lines: "fail", or "skip" to leave out lines that are not in this format, and count them.
    """

    def __init__(self, pattern: str | os.PathLike[str], format: Format[T], bad_lines: str) -> None:
        owner = type(self).__name__
        self._pattern = path_of(f"{owner}: pattern", pattern, f'Name files: {owner}("in/*").')
        if bad_lines not in BAD_LINES:
            raise hint(GraphError(f"{owner}: bad_lines is {short(bad_lines)}"), 'Give "fail" or "skip".')
        self._format = format
        self._skips = bad_lines == "skip"
        self._offsets: dict[str, int] = {}
        self._left: deque[str] = deque()
        self._lines: Lines | None = None
        self._header: Any = None
        self._records: Iterator[T] = iter(())

    def open(self, position: dict[str, int] | None = None) -> None:
        """Find the files.

        Raises:
            ConnectorError: a file is shorter than it was, a line that was read has grown, or no file matches, and none
                ever did.
        """
        self._offsets = dict(position or {})
        self._left = deque(sorted(filter(os.path.isfile, glob.glob(self._pattern, recursive=True))))
        if not self._left and not self._offsets:
            error = ConnectorError(f'no file matches "{self._pattern}"', fault="external")
            raise hint(error, f"The program runs in {os.getcwd()}.")
        for path in self._left:
            read = self._offsets.get(path, 0)
            with _naming(f'file "{path}"', "read"):
                size = os.path.getsize(path)
                if size < read:
                    text = f'file "{path}" has {size:,} bytes, and {read:,} were read before'
                    error = ConnectorError(text, fault="external")
                    raise hint(error, "Give other contents another name; a durable job reads on where it stopped.")
                if 0 < read < size:
                    lines = Lines(path)
                    try:
                        lines.go_on(read)
                    finally:
                        lines.close()

    def read(self, records_max: int) -> list[T] | None:
        """Return the next records."""
        records: list[T] = []
        bad_count = 0
        while len(records) + bad_count < records_max and (self._lines is not None or self._left):
            path = self._left[0] if self._lines is None else self._lines.path
            is_bad = False
            try:
                with _naming(f'file "{path}"', "read"):
                    lines = self._lines or self._begin(path)
                    try:
                        self._read_on(lines, records, records_max - bad_count)
                    except ValueError as error:
                        is_bad = True
                        self._records = self._format.decode(lines, self._header)
                        if not self._skips:
                            note = 'Correct the line, or leave such lines out with bad_lines="skip".'
                            raise self._failure(lines, error, note) from error
                        bad_count += 1
                        self._skip(lines, error)
                    finally:
                        self._offsets[path] = lines.offset
            except ConnectorError:
                if records:
                    break  # those before it go on first
                raise
            if not is_bad and len(records) + bad_count < records_max:
                self.close()
        return records if records or self._lines is not None or self._left else None

    def _read_on(self, lines: Lines, records: list[T], records_max: int) -> None:
        """Add the next records until there are so many."""
        offset = lines.offset
        try:
            for record in islice(self._records, records_max - len(records)):
                records.append(record)
                offset = lines.offset
        except OSError:
            lines.seek(offset)  # a retry goes on there
            self._records = self._format.decode(lines, self._header)
            raise

    def _begin(self, path: str) -> Lines:
        """Open the next file at its position."""
        lines = Lines(path)
        try:
            try:
                self._header = self._format.begin(lines)
            except ValueError as error:
                raise self._failure(lines, error, "The first row has the names of the columns.") from error
            offset = self._offsets.get(path, 0)
            if offset:
                lines.go_on(offset)
        except BaseException:
            lines.close()
            raise
        self._lines = lines
        self._records = self._format.decode(lines, self._header)
        self._left.popleft()
        return lines

    def _failure(self, lines: Lines, error: ValueError, note: str) -> ConnectorError:
        number = lines.number()
        lines.seek(lines.start)
        line = next(lines, b"")
        lines.seek(lines.start)
        return hint(
            ConnectorError(f'file "{lines.path}", line {number:,} {error}: {short(line)}', fault="external"), note
        )

    def _skip(self, lines: Lines, error: ValueError) -> None:
        level = logging.DEBUG if self.skipped else logging.WARNING
        self.skipped += 1
        if logger.isEnabledFor(level):
            more = "" if level == logging.DEBUG else "; the report counts all such lines"
            logger.log(level, 'skipped: file "%s", line %d %s%s', lines.path, lines.number(), error, more)

    def position(self) -> dict[str, int]:
        """Return how many bytes of each file were read."""
        return dict(self._offsets)

    def close(self) -> None:
        """Close the file that is being read."""
        if self._lines is not None:
            self._lines.close()
            self._lines = None


class FileSink(TransactionalSink[T]):
    """Writes records into files of a folder; a file appears when its checkpoint is complete.

    Until then its name begins with a dot. Nothing changes in a file that has appeared. In the order of their names, the
    files of one task have its records in order.

    Args:
        folder: the folder; made if it is not there.
        format: the format of the files.
    """

    def __init__(self, folder: str | os.PathLike[str], format: Format[T]) -> None:
        owner = type(self).__name__
        self._folder = Path(path_of(f"{owner}: folder", folder, f'Name a folder: {owner}("out").'))
        self._format = self._writer = format
        self._part = ""
        self._file: BinaryIO | None = None

    def open(self, part: str, checkpoint: int) -> None:
        """Make the folder, and remove files of this part that belong to no checkpoint."""
        self._part = part
        self._writer = copy(self._format)  # it may remember the first record, and the sink may serve another job later
        with _naming(f'folder "{self._folder}"', "written into"):
            self._folder.mkdir(parents=True, exist_ok=True)
            self._writing.touch()
            self._writing.unlink()
        for path in self._folder.iterdir():
            name = path.name.removeprefix(".").removesuffix(PREPARED).removesuffix(self._format.suffix)
            begin, _, number = name.rpartition("-")
            if begin == part and number.isdecimal() and int(number) > checkpoint:
                path.unlink()

    @property
    def _writing(self) -> Path:
        return self._folder / f".{self._part}.writing"

    def _prepared(self, name: str) -> Path:
        return self._folder / f".{name}{PREPARED}"

    def write(self, batch: Sequence[T]) -> None:
        """Add the records to the file.

        Raises:
            ConnectorError: a record cannot be written in this format, or the file cannot be written.
        """
        lines = b"".join(map(self._writer.encode, batch))
        with _naming(f'folder "{self._folder}"', "written into"):
            if self._file is None:
                self._file = self._writing.open("wb")
                lines = self._writer.head(batch[0]) + lines
                if lines.startswith(BYTE_ORDER_MARK):  # a source drops the first one
                    lines = BYTE_ORDER_MARK + lines
            self._file.write(lines)

    def prepare(self, number: int) -> str | None:
        """Write the file through to the disk, and return the name that it will have."""
        if self._file is None:
            return None
        file, self._file = self._file, None
        name = f"{self._part}-{number:08}{self._format.suffix}"
        with _naming(f'folder "{self._folder}"', "written into"):
            with file:
                file.flush()
                os.fsync(file.fileno())
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
            file, self._file = self._file, None
            with suppress(OSError):  # of a full disk, which the write has told of
                file.close()
            self._writing.unlink(missing_ok=True)

    def _sync(self) -> None:
        """Write the names of the folder through to the disk."""
        folder = os.open(self._folder, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)
