"""Plain text: one string a line."""

from __future__ import annotations

from typing import TYPE_CHECKING

from sage.connectors.files import FileSink, FileSource, Format, Lines, check_encoding
from sage.errors import ConnectorError, describe, hint, short

if TYPE_CHECKING:
    import os
    from collections.abc import Iterator


class TextFormat(Format[str]):
    """A string a line, without the end of the line; an empty line is an empty string."""

    suffix = ".txt"

    def __init__(self, encoding: str) -> None:
        self._encoding = encoding

    def decode(self, lines: Lines, header: object) -> Iterator[str]:  # noqa: ARG002
        """Yield the lines."""
        for line in lines:
            try:
                text = line.removesuffix(b"\n").removesuffix(b"\r").decode(self._encoding)
            except UnicodeError as error:
                raise ValueError(f"is not {self._encoding}") from error
            yield text

    def encode(self, record: str) -> bytes:
        """Return the line of a string."""
        given: object = record
        if not isinstance(given, str) or "\n" in record or record.endswith("\r"):
            error = ConnectorError(f"record {short(record)} is not one line of text")
            raise hint(error, "Map it to a string without line breaks before the sink.")
        try:
            return f"{record}\n".encode(self._encoding)
        except UnicodeError as error:
            refused = ConnectorError(f"record {short(record)} cannot be written as {self._encoding}: {describe(error)}")
            raise hint(refused, 'Give another encoding, such as "utf-8".') from error


class Text(FileSource[str]):
    """Reads the lines in all files of a pattern as strings, file by file in the order of their names.

    It ends after the last file, and goes on as `JsonLines` does. An empty line is an empty string.

    Args:
        pattern: the files, such as "in/*.txt"; `**` stands for any folders, and a folder for all files below it.
        encoding: their encoding, which extends ASCII.
        bad_lines: "fail" ends the job at a line that is not in this encoding; "skip" leaves it out, and the report
            counts it.
    """

    def __init__(self, pattern: str | os.PathLike[str], *, encoding: str = "utf-8", bad_lines: str = "fail") -> None:
        check_encoding("Text", encoding)
        super().__init__(pattern, TextFormat(encoding), bad_lines)


class TextFiles(FileSink[str]):
    """Writes strings into files of a folder, one a line; a file appears when its checkpoint is complete.

    Args:
        folder: the folder; made if it is not there.
        encoding: the encoding of the files, which extends ASCII.
        file_bytes_max: about how large a file gets before another one is begun, in bytes.
    """

    def __init__(
        self, folder: str | os.PathLike[str], *, encoding: str = "utf-8", file_bytes_max: int | None = None
    ) -> None:
        check_encoding("TextFiles", encoding)
        super().__init__(folder, TextFormat(encoding), file_bytes_max=file_bytes_max)
