"""Parquet: rows as dicts, in files of columns with types."""

from __future__ import annotations

from contextlib import contextmanager
from typing import TYPE_CHECKING, BinaryIO

from sage._arguments import names_of
from sage._extras import load
from sage.connectors.csv import Row
from sage.connectors.files import FileFormat, Files, FileSink, FileWriter, naming
from sage.errors import ConnectorError, GraphError, describe, hint, short

if TYPE_CHECKING:
    import os
    from collections.abc import Iterator, Sequence

    import pyarrow

GROUP_ROWS = 50_000
"""How many rows are in memory until they are written as a group."""
BATCH_ROWS = 1_000

COMPRESSIONS = ("none", "snappy", "gzip", "brotli", "zstd", "lz4")


class Parquet(Files[Row]):
    """Reads the rows in all files of a pattern as dicts, file by file in the order of their names.

    It ends after the last file. Its position is the number of rows read of each file, so that a durable job that runs
    again reads only rows that are new; groups of rows that were read are passed over.

    Args:
        pattern: the files, such as "in/*.parquet"; `**` stands for any folders, and a folder for all files below it.
        columns: the columns to read; None for all of them.
    """

    def __init__(self, pattern: str | os.PathLike[str], *, columns: Sequence[str] | None = None) -> None:
        super().__init__(pattern, ".parquet")
        load("pyarrow.parquet", "parquet")
        self._columns: list[str] | None = None
        if columns is not None:
            self._columns = list(names_of("Parquet: a column", columns, 'Name them: columns=["id", "name"].'))
        self._file: BinaryIO | None = None
        self._batches: Iterator[pyarrow.RecordBatch] = iter(())
        self._rest: pyarrow.RecordBatch | None = None

    def _check(self, path: str, size: int, read: int) -> None:  # noqa: ARG002  (it counts in rows)
        with _reading(path), self._place.read(path) as file:
            parquet = _opened(file)
            names, count = parquet.schema_arrow.names, parquet.metadata.num_rows
        for column in self._columns or ():
            if column not in names:
                error = ConnectorError(f'file "{path}" has no column {column!r}', fault="external")
                raise hint(error, f"There are: {', '.join(map(repr, names))}.")
        if count < read:
            error = ConnectorError(f'file "{path}" has {count:,} rows, and {read:,} were read before', fault="external")
            raise hint(error, "Give other contents another name; a durable job reads on where it stopped.")

    def read(self, records_max: int) -> list[Row] | None:
        """Return the next rows."""
        rows: list[Row] = []
        while len(rows) < records_max and self._left:
            path = self._left[0]
            try:
                with _reading(path):
                    batch = self._next(path)
                    if batch is None:
                        self._close_file()
                        self._left.popleft()
                        continue
                    count = min(records_max - len(rows), batch.num_rows)
                    rows += batch.slice(0, count).to_pylist()
                    self._rest = batch.slice(count)
                    self._offsets[path] += count
            except ConnectorError:
                self._close_file()  # a retry begins the file anew, at its position
                if rows:
                    break  # those before it go on first
                raise
        return rows if rows or self._left else None

    def _next(self, path: str) -> pyarrow.RecordBatch | None:
        """Return the next rows of a file, at least one; None at its end."""
        if self._file is None:
            self._begin(path)
        while self._rest is None or self._rest.num_rows == 0:
            self._rest = next(self._batches, None)
            if self._rest is None:
                return None
        return self._rest

    def _begin(self, path: str) -> None:
        """Open a file at its position."""
        skipped = self._offsets.setdefault(path, 0)
        self._file = self._place.read(path)
        file = _opened(self._file)
        sizes = [file.metadata.row_group(group).num_rows for group in range(file.num_row_groups)]
        group = 0
        while group < len(sizes) and skipped >= sizes[group]:
            skipped -= sizes[group]
            group += 1
        # A group at a time, so that those before a damaged one can be read. The library's threads would stay for the
        # life of the process, and be taken for left by the job.
        self._batches = (
            batch
            for place in range(group, len(sizes))
            for batch in file.iter_batches(BATCH_ROWS, row_groups=[place], columns=self._columns, use_threads=False)
        )
        while skipped:
            batch = next(self._batches)
            self._rest = batch.slice(skipped)
            skipped -= batch.num_rows - self._rest.num_rows

    def _close_file(self) -> None:
        file, self._file, self._rest, self._batches = self._file, None, None, iter(())
        if file is not None:
            file.close()

    def close(self) -> None:
        """Close the file that is being read."""
        self._close_file()
        self._place.close()


def _opened(file: BinaryIO) -> pyarrow.parquet.ParquetFile:
    return load("pyarrow.parquet", "parquet").ParquetFile(file, pre_buffer=False)


@contextmanager
def _reading(path: str) -> Iterator[None]:
    """Let errors name a file."""
    try:
        with naming(f'file "{path}"', "read"):
            yield
    except (load("pyarrow", "parquet").ArrowException, ValueError) as error:
        failed = ConnectorError(f'file "{path}" cannot be read as Parquet: {describe(error)}', fault="external")
        raise hint(failed, "Is it whole? Write elsewhere, and rename the file when it is complete.") from error


class _ParquetFormat(FileFormat[Row]):
    """Groups of rows, each column with one type."""

    suffix = ".parquet"

    def __init__(self, schema: pyarrow.Schema | None, compression: str) -> None:
        load("pyarrow.parquet", "parquet")
        if schema is not None and not isinstance(schema, load("pyarrow", "parquet").Schema):
            error = GraphError(f"ParquetFiles: schema is {short(schema)}")
            raise hint(error, 'Give pyarrow.schema([("id", pyarrow.int64()), ("name", pyarrow.string())]).')
        if compression not in COMPRESSIONS:
            error = GraphError(f"ParquetFiles: compression is {short(compression)}")
            raise hint(error, f"Give one of {', '.join(COMPRESSIONS)}.")
        self.schema = schema
        self.compression = compression

    def writer(self, file: BinaryIO) -> FileWriter[Row]:
        """Return a writer for an empty file."""
        return _ParquetWriter(file, self)


class _ParquetWriter(FileWriter[Row]):
    """Writes groups of rows."""

    def __init__(self, file: BinaryIO, format: _ParquetFormat) -> None:
        self._file = file
        self._compression = format.compression
        self._schema = format.schema
        self._names = None if format.schema is None else frozenset(format.schema.names)
        self._rows: list[Row] = []
        self._writer: pyarrow.parquet.ParquetWriter | None = None

    def write(self, records: Sequence[Row]) -> None:
        """Add records, and write a group when there are enough."""
        for record in records:
            given: object = record
            if self._names is None and isinstance(given, dict) and given:
                self._names = frozenset(given)
            if not isinstance(given, dict) or not given or self._names is None or not self._names.issuperset(given):
                wanted = "" if self._names is None else f" with the columns: {short(sorted(map(str, self._names)))}"
                error = ConnectorError(f"record {short(record)} is not a dict{wanted}")
                raise hint(error, "All rows of a file have columns of its first one, or of schema=.")
        self._rows += records
        if len(self._rows) >= GROUP_ROWS:
            self._write_group()

    def _write_group(self) -> None:
        rows, self._rows = self._rows, []
        if not rows:
            return
        table = self._table(rows)
        if self._writer is None:
            self._schema = table.schema
            new = load("pyarrow.parquet", "parquet").ParquetWriter
            self._writer = new(self._file, table.schema, compression=self._compression)
        self._writer.write_table(table)

    def finish(self) -> None:
        """Write the rows that are in memory, and the end of the file."""
        self._write_group()
        if self._writer is not None:
            self._writer.close()

    def _table(self, rows: list[Row]) -> pyarrow.Table:
        arrow = load("pyarrow", "parquet")
        refused = (arrow.ArrowException, TypeError, ValueError, OverflowError)
        try:
            return arrow.Table.from_pylist(rows, schema=self._schema)
        except refused as error:
            fine, wrong = 0, len(rows)  # so many of the first rows make a table, and so many do not
            while wrong - fine > 1:
                middle = (fine + wrong) // 2
                try:
                    arrow.Table.from_pylist(rows[:middle], schema=self._schema)
                    fine = middle
                except refused:
                    wrong = middle
            text = f"record {short(rows[wrong - 1])} cannot be written as Parquet: {describe(error)}"
            note = "A column has one type in all rows of a file: that of schema=, or else that of its first rows."
            raise hint(ConnectorError(text), note) from error


class ParquetFiles(FileSink[Row]):
    """Writes dicts into files of a folder, one a row; a file appears when its checkpoint is complete.

    Rows are written in groups, and are in memory until then. A column that a dict does not have is empty in its row.

    Args:
        folder: the folder; made if it is not there.
        schema: the columns and their types; None for those of the first rows of each file.
        compression: "none", "snappy", "gzip", "brotli", "zstd" or "lz4".
        partition_by: columns whose values name the folders in which records stand, as in "out/day=5".
        file_bytes_max: about how large a file gets before another one is begun, in bytes; a group is never divided.
    """

    def __init__(
        self,
        folder: str | os.PathLike[str],
        *,
        schema: pyarrow.Schema | None = None,
        compression: str = "zstd",
        partition_by: str | Sequence[str] = (),
        file_bytes_max: int | None = None,
    ) -> None:
        format = _ParquetFormat(schema, compression)
        super().__init__(folder, format, partition_by=partition_by, file_bytes_max=file_bytes_max)
