"""Records in files, whatever their format: sources that read on from the last run, and sinks of files that appear."""

from __future__ import annotations

import logging
import os
import re
from abc import ABC, abstractmethod
from collections import deque
from contextlib import contextmanager, suppress
from copy import copy
from itertools import islice
from typing import TYPE_CHECKING, Any, BinaryIO, Generic, NamedTuple
from urllib.parse import quote

from sage._arguments import check_count, names_of, path_of
from sage._types import T
from sage.connector import Source, TransactionalSink
from sage.connectors.places import place_of
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

NO_VALUE = "__HIVE_DEFAULT_PARTITION__"
"""The folder of records whose value is None or empty, as other programs name it."""

NAME_BYTES_MAX = 255
"""How long file systems let the name of a folder be."""

OPEN_MAX = 64
"""How many files a task writes at once; for further folders, it ends the file that was used least recently."""


@contextmanager
def naming(place: str, done: str) -> Iterator[None]:
    """Let errors of the system name a file or a folder."""
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
        path: the name of the file.
        start: the byte at which the last line begins.
        offset: the byte at which the next line begins.
    """

    def __init__(self, path: str, file: BinaryIO) -> None:
        self.path = path
        self.start = self.offset = 0
        self._counted = 0, 1
        self._file = file

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


class FileWriter(ABC, Generic[T]):
    """Writes the records of one file."""

    @abstractmethod
    def write(self, records: Sequence[T]) -> None:
        """Add records, at least one.

        Raises:
            ConnectorError: a record cannot be written in this format.
        """

    def finish(self) -> None:
        """Write what is still in memory, and the end of the file; raises as `write` does."""


class FileFormat(ABC, Generic[T]):
    """How records are written into files.

    Attributes:
        suffix: the end of the names of files.
    """

    suffix: str

    @abstractmethod
    def writer(self, file: BinaryIO) -> FileWriter[T]:
        """Return a writer for an empty file."""


class Format(FileFormat[T]):
    """How the records of a file of lines are written.

    Its methods raise a ValueError whose text follows on the line's number.
    """

    def writer(self, file: BinaryIO) -> FileWriter[T]:
        """Return a writer for an empty file."""
        return LinesWriter(self, file)

    def begin(self, lines: Lines) -> object:
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


class LinesWriter(FileWriter[T]):
    """Writes lines."""

    def __init__(self, format: Format[T], file: BinaryIO) -> None:
        self._format = format
        self._file = file
        self._is_empty = True

    def write(self, records: Sequence[T]) -> None:
        """Add the lines of records."""
        lines = b"".join(map(self._format.encode, records))
        if self._is_empty:
            lines = self._format.head(records[0]) + lines
            if lines.startswith(BYTE_ORDER_MARK):  # a source drops the first one
                lines = BYTE_ORDER_MARK + lines
            self._is_empty = False
        self._file.write(lines)


class Files(Source[T]):
    """Reads the files of a pattern in the order of their names; its position says how much of each was read."""

    def __init__(self, pattern: str | os.PathLike[str], suffix: str) -> None:
        owner = type(self).__name__
        self._pattern = path_of(f"{owner}: pattern", pattern, f'Name files: {owner}("in/*").')
        self._place = place_of(self._pattern)
        self._suffix = suffix
        self._offsets: dict[str, int] = {}
        self._left: deque[str] = deque()

    def open(self, position: dict[str, int] | None = None) -> None:
        """Find the files, and look whether they go on where they were read.

        Raises:
            ConnectorError: a file does not have any more what was read, or no file matches, and none ever did.
        """
        self._offsets = dict(position or {})
        with naming(f'"{self._pattern}"', "looked through"):
            self._place.open()
            sizes = self._place.find(self._suffix)
        self._left = deque(sizes)
        if not self._left and not self._offsets:
            error = ConnectorError(f'no file matches "{self._pattern}"', fault="external")
            raise hint(error, self._place.note)
        for path, size in sizes.items():
            with naming(f'file "{path}"', "read"):
                self._check(path, size, self._offsets.get(path, 0))

    @abstractmethod
    def _check(self, path: str, size: int, read: int) -> None:
        """Raise a ConnectorError if a file cannot be read on from there."""

    def position(self) -> dict[str, int]:
        """Return how much of each file was read."""
        return dict(self._offsets)


class FileSource(Files[T]):
    """Reads the records in all files of a pattern, file by file in the order of their names.

    It ends after the last file. Its position is the number of bytes read of each file, so that a durable job that runs
    again reads only records that are new, at the end of a file or in further files. A last line without a line end
    counts as a line.

    Args:
        pattern: the files, such as "in/*.jsonl"; `**` stands for any folders, and a folder for all files below it.
        format: their format.
        bad_lines: "fail", or "skip" to leave out lines that are not in this format, and count them.
    """

    def __init__(self, pattern: str | os.PathLike[str], format: Format[T], bad_lines: str) -> None:
        super().__init__(pattern, format.suffix)
        if bad_lines not in BAD_LINES:
            owner = type(self).__name__
            raise hint(GraphError(f"{owner}: bad_lines is {short(bad_lines)}"), 'Give "fail" or "skip".')
        self._format = format
        self._skips = bad_lines == "skip"
        self._lines: Lines | None = None
        self._header: object = None
        self._records: Iterator[T] = iter(())

    def _check(self, path: str, size: int, read: int) -> None:
        if size < read:
            text = f'file "{path}" has {size:,} bytes, and {read:,} were read before'
            error = ConnectorError(text, fault="external")
            raise hint(error, "Give other contents another name; a durable job reads on where it stopped.")
        if 0 < read < size:
            lines = self._lines_of(path)
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
                with naming(f'file "{path}"', "read"):
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
                self._close_lines()
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

    def _lines_of(self, path: str) -> Lines:
        return Lines(path, self._place.read(path))

    def _begin(self, path: str) -> Lines:
        """Open the next file at its position."""
        lines = self._lines_of(path)
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

    def _close_lines(self) -> None:
        if self._lines is not None:
            self._lines.close()
            self._lines = None

    def close(self) -> None:
        """Close the file that is being read."""
        self._close_lines()
        self._place.close()


class Part(NamedTuple, Generic[T]):
    """A file that is being written."""

    name: str
    file: BinaryIO
    writer: FileWriter[T]


class FileSink(TransactionalSink[T]):
    """Writes records into files of a folder; a file appears when its checkpoint is complete.

    Until then its name begins with a dot. Nothing changes in a file that has appeared. In the order of their names, the
    files of one task have its records in order.

    Args:
        folder: the folder; made if it is not there.
        format: the format of the files.
        partition_by: columns whose values name the folders below it in which records stand, as in "day=5/city=Rome".
        file_bytes_max: about how large a file gets before another one is begun, in bytes.
    """

    def __init__(
        self,
        folder: str | os.PathLike[str],
        format: FileFormat[T],
        *,
        partition_by: str | Sequence[str] = (),
        file_bytes_max: int | None = None,
    ) -> None:
        owner = type(self).__name__
        self._folder = path_of(f"{owner}: folder", folder, f'Name a folder: {owner}("out").')
        self._place = place_of(self._folder)
        advice = 'Give names of columns: partition_by=["day", "city"].'
        self._partition_by = names_of(f"{owner}: a column of partition_by", partition_by, advice)
        if file_bytes_max is not None:
            check_count(f"{owner}: file_bytes_max is", file_bytes_max)
        self._bytes_max = file_bytes_max
        self._format = self._writer = format
        self._part = ""
        self._parts: dict[str, Part[T]] = {}
        self._ended: list[tuple[str, str]] = []

    def open(self, part: str, checkpoint: int) -> None:
        """Make the folder, and remove files of this part that belong to no checkpoint."""
        self._part = part
        self._writer = copy(self._format)  # it may remember the first record, and the sink may serve another job later
        own = re.compile(rf"\.{re.escape(part)}\.\d+\.writing")
        with naming(f'folder "{self._folder}"', "written into"):
            self._place.open()
            self._place.prepare()
            for full in self._place.names():
                name = os.path.basename(full).removeprefix(".").removesuffix(PREPARED)
                begin, _, numbers = name.removesuffix(self._format.suffix).rpartition("-")
                number, _, _ = numbers.partition(".")
                is_later = begin == part and number.isdecimal() and int(number) > checkpoint
                if is_later or own.fullmatch(full):
                    self._place.remove(full)

    def write(self, batch: Sequence[T]) -> None:
        """Add the records to files.

        Raises:
            ConnectorError: a record cannot be written in this format, or a file cannot be written.
        """
        by_folder: dict[str, list[T]] = {}
        for record in batch if self._partition_by else ():
            by_folder.setdefault(self._folder_of(record), []).append(record)
        with naming(f'folder "{self._folder}"', "written into"):
            for folder, records in by_folder.items() if self._partition_by else [("", batch)]:
                part = self._parts.pop(folder, None) or self._begin()
                self._parts[folder] = part
                part.writer.write(records)
                if self._bytes_max is not None and part.file.tell() >= self._bytes_max:
                    self._end(folder)
                elif len(self._parts) > OPEN_MAX:
                    self._end(next(iter(self._parts)))

    def _folder_of(self, record: object) -> str:
        names = []
        for column in self._partition_by:
            if not isinstance(record, dict) or column not in record:
                error = ConnectorError(f"record {short(record)} has no {column!r}, which names its folder")
                raise hint(error, "Map it to a dict with a value for each column of partition_by.")
            value = "" if record[column] is None else str(record[column])
            # Not an error here: the format refuses characters that it cannot write.
            name = f"{quote(column, safe=' ')}={quote(value, safe=' ', errors='replace') or NO_VALUE}"
            if len(name) > NAME_BYTES_MAX:
                text = f"record {short(record)} has a value in {column!r} that is too long for the name of its folder"
                note = f'"{quote(column, safe=" ")}=" and the value may take {NAME_BYTES_MAX} bytes; other characters '
                raise hint(ConnectorError(text), f"{note}than ASCII take several. Use a column with short values.")
            names.append(name)
        return os.path.join(*names)

    def _begin(self) -> Part[T]:
        name = f".{self._part}.{len(self._parts) + len(self._ended)}.writing"
        file = self._place.begin(name)
        return Part(name, file, self._writer.writer(file))

    def _end(self, folder: str) -> None:
        """Make a file durable."""
        part = self._parts[folder]
        part.writer.finish()
        self._place.finish(part.file, part.name)
        del self._parts[folder]
        self._ended.append((part.name, folder))

    def prepare(self, number: int) -> list[str] | None:
        """Make the files durable, and return the names that they will have."""
        names = []
        with naming(f'folder "{self._folder}"', "written into"):
            for folder in list(self._parts):
                self._end(folder)
            is_divided = self._partition_by or self._bytes_max is not None
            for place, (written, folder) in enumerate(self._ended):
                piece = f".{place:05}" if is_divided else ""
                name = os.path.join(folder, f"{self._part}-{number:08}{piece}{self._format.suffix}")
                names.append(name)
                self._place.rename(written, prepared_name(name))
            self._ended = []
            self._place.sync(names)
        return names or None

    def commit(self, token: Sequence[str]) -> None:
        """Give the files their names."""
        with naming(f'folder "{self._folder}"', "written into"):
            for name in token:
                # If it is not there any more, it has its name already, or somebody has taken it on from there.
                with suppress(FileNotFoundError):
                    self._place.rename(prepared_name(name), name)
            self._place.sync(token)

    def abort(self) -> None:
        """Remove the files that were not prepared."""
        parts, self._parts = self._parts, {}
        ended, self._ended = self._ended, []
        with naming(f'folder "{self._folder}"', "written into"):
            for part in parts.values():
                self._place.discard(part.file, part.name)
            for name, _ in ended:
                self._place.remove(name)

    def close(self) -> None:
        """Let go of the folder."""
        self._place.close()


def prepared_name(name: str) -> str:
    """Return the name of a file that is whole, and has not appeared yet."""
    folder, file = os.path.split(name)
    return os.path.join(folder, f".{file}{PREPARED}")
