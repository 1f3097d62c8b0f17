"""Values that can be iterated over, but into something other than records: letters, names of columns, keys."""

from __future__ import annotations

import os
from collections.abc import Mapping


def why_not_records(value: object) -> tuple[str, str] | None:
    """Return the kind of a value and how to pass its records, or None if its elements may be records."""
    name = type(value).__name__
    if isinstance(value, str):
        return f"a {name}", "Write [text] for one record, open(path) for the lines of a file, list(text) for letters."
    if isinstance(value, bytes | bytearray | memoryview):
        return f"a {name}", "Write [data] for one record, list(data) for numbers."
    if isinstance(value, os.PathLike):
        return "a path", "Write open(path) for the lines of the file, [path] for one record."
    if isinstance(value, Mapping):
        return f"a {name}", "Write mapping.items() for its pairs, list(mapping) for its keys, [mapping] for one record."
    if hasattr(value, "columns") and len(getattr(value, "shape", ())) == 2:  # of pandas, polars, pyarrow and others
        return f"a {name}", f"Write {_rows_of(value)} for its rows, [table] for one record."
    return None


def _rows_of(table: object) -> str:
    if hasattr(table, "iter_rows"):
        return "table.iter_rows(named=True)"
    return "table.to_pylist()" if hasattr(table, "to_pylist") else 'table.to_dict("records")'
