"""Whether a program has begun to fill an index that it keeps."""

from __future__ import annotations

import sqlite3
from contextlib import closing
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pathlib import Path


def is_filled(path: Path) -> bool:
    """Return whether a keyword index has anything in it."""
    try:
        with closing(sqlite3.connect(f"file:{path}?mode=ro", uri=True)) as database:
            return bool(database.execute("SELECT count(*) FROM keyword_entries").fetchone()[0])
    except sqlite3.Error:
        return False
