"""Separated values: one dict a row, with the names of the columns as keys."""

from __future__ import annotations

import csv
import io
from typing import TYPE_CHECKING, Any

from sage.connectors.files import FileSink, FileSource, Format, Lines, check_encoding
from sage.errors import ConnectorError, GraphError, describe, hint, short

if TYPE_CHECKING:
    import os
    from collections.abc import Iterator, Sequence

Row = dict[str, Any]


class CsvFormat(Format[Row]):
    """Rows as the `csv` module reads and writes them. A row whose text has line breaks takes several lines.

    Args:
        owner: the class that errors name.
        columns: the names of the columns; None if the first row of each file has them.
        encoding: the encoding.
        options: the options of the `csv` module.
    """

    suffix = ".csv"

    def __init__(self, owner: str, columns: Sequence[str] | None, encoding: str, options: dict[str, Any]) -> None:
        check_encoding(owner, encoding)
        if isinstance(columns, str) or (columns is not None and not columns):
            raise hint(GraphError(f"{owner}: columns is {short(columns)}"), 'Name them: columns=["id", "name"].')
        self._columns = None if columns is None else tuple(columns)
        self._encoding = encoding
        self._options = {"strict": True, **options}
        try:
            csv.reader([], **self._options)
            if self._columns is not None:
                _check_columns(self._columns)
        except (TypeError, ValueError, csv.Error) as error:
            note = 'It takes options of the csv module, such as delimiter=";", and columns=["id", "name"].'
            raise hint(GraphError(f"{owner}: {error}"), note) from error
        if "lineterminator" in options:
            fixed = GraphError(f"{owner}: lineterminator cannot be set")
            raise hint(fixed, "Rows are read with any end of a line, and written with CR LF.")

    def begin(self, lines: Lines) -> tuple[str, ...]:
        """Return the names of the columns."""
        if self._columns is not None:
            return self._columns
        columns = tuple(next(filter(None, self._rows(lines)), ()))
        _check_columns(columns)
        return columns

    def decode(self, lines: Lines, header: tuple[str, ...]) -> Iterator[Row]:
        """Yield the rows as dicts; empty lines are passed over."""
        for row in self._rows(lines):
            if len(row) == len(header):
                yield dict(zip(header, row, strict=True))
            elif row:
                raise ValueError(f"has {len(row):,} values for {len(header):,} columns")

    def _rows(self, lines: Lines) -> Iterator[list[str]]:
        rows = csv.reader((line.decode(self._encoding) for line in lines), **self._options)
        while True:
            start = lines.offset
            try:
                row = next(rows)
            except StopIteration:
                return
            except (UnicodeError, ValueError, csv.Error) as error:
                # Only its first line is passed over: after a quote too many, the next line is in order again.
                lines.seek(start)
                next(lines, None)
                raise ValueError(f"is not CSV in {self._encoding}, {error}") from error
            lines.start = start
            yield row

    def head(self, record: Row) -> bytes:  # noqa: ARG002
        """Return the row with the names of the columns."""
        assert self._columns is not None
        return self._line(self._columns)

    def encode(self, record: Row) -> bytes:
        """Return the row of a dict; the first one gives the columns, unless they were given."""
        given: object = record
        if self._columns is None and isinstance(given, dict) and given:
            self._columns = tuple(given)
        columns = self._columns
        if not isinstance(given, dict) or columns is None or given.keys() != set(columns):
            wanted = "" if columns is None else f": {short(list(columns))}"
            error = ConnectorError(f"record {short(record)} is not a dict with the columns{wanted}")
            raise hint(error, "Map it to a dict with a value for each column; all rows of a file have the same ones.")
        try:
            return self._line([record[column] for column in columns])
        except (UnicodeError, csv.Error) as error:
            refused = ConnectorError(f"record {short(record)} cannot be written as CSV: {describe(error)}")
            raise hint(refused, "Give an escapechar, or an encoding that has all of its characters.") from error

    def _line(self, values: Sequence[object]) -> bytes:
        text = io.StringIO(newline="")
        csv.writer(text, **self._options).writerow(values)
        return text.getvalue().encode(self._encoding)


def _check_columns(columns: tuple[str, ...]) -> None:
    for column in columns:
        if not isinstance(column, str):
            raise ValueError(f"has a column {short(column)}, which is not a string")
        if columns.count(column) > 1:
            raise ValueError(f"has two columns {short(column)}")


class Csv(FileSource[Row]):
    """Reads the rows in all files of a pattern as dicts, file by file in the order of their names.

    It ends after the last file, and goes on as `JsonLines` does; its position is never inside a quoted text. All values
    are strings, unless `quoting=csv.QUOTE_NONNUMERIC` says otherwise.

    Args:
        pattern: the files, such as "in/*.csv"; `**` stands for any folders, and a folder for all files below it.
        columns: the names of the columns; None if the first row of each file has them.
        encoding: their encoding, which extends ASCII.
        bad_lines: "fail" ends the job at a line that is not CSV, or has too few or too many values; "skip" leaves it
            out, and the report counts it.
        **options: options of the `csv` module, such as `delimiter=";"`; `strict` is True if you do not set it.
    """

    def __init__(
        self,
        pattern: str | os.PathLike[str],
        *,
        columns: Sequence[str] | None = None,
        encoding: str = "utf-8",
        bad_lines: str = "fail",
        **options: Any,
    ) -> None:
        super().__init__(pattern, CsvFormat("Csv", columns, encoding, options), bad_lines)


class CsvFiles(FileSink[Row]):
    """Writes dicts into files of a folder, one a row; a file appears when its checkpoint is complete.

    The first row of each file has the names of the columns. A value that is not a string is written as its `str`, and
    None as nothing.

    Args:
        folder: the folder; made if it is not there.
        columns: the names of the columns, in order; None for those of the first record.
        encoding: the encoding of the files, which extends ASCII.
        partition_by: columns whose values name the folders in which records stand, as in "out/day=5".
        file_bytes_max: about how large a file gets before another one is begun, in bytes.
        **options: options of the `csv` module, such as `delimiter=";"`.
    """

    def __init__(
        self,
        folder: str | os.PathLike[str],
        *,
        columns: Sequence[str] | None = None,
        encoding: str = "utf-8",
        partition_by: str | Sequence[str] = (),
        file_bytes_max: int | None = None,
        **options: Any,
    ) -> None:
        format = CsvFormat("CsvFiles", columns, encoding, options)
        super().__init__(folder, format, partition_by=partition_by, file_bytes_max=file_bytes_max)
