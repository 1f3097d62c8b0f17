"""Finds files: those of folders, and the lines of JSON Lines; `Load` reads their contents."""

from __future__ import annotations

import hashlib
import json
import logging
import os
from collections import Counter
from dataclasses import dataclass, field, replace
from io import TextIOWrapper
from itertools import count
from pathlib import Path, PurePath
from typing import TYPE_CHECKING, TextIO

from sage.connector import Source
from sage.errors import GraphError, hint
from sage.rag.documents import DocumentError

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from sage.rag.indexed_files import IndexedFiles
    from sage.service import ServiceHandle

    Indexed = ServiceHandle[IndexedFiles] | IndexedFiles

FORMATS = {
    **dict.fromkeys((".txt", ".text"), "text"),
    **dict.fromkeys((".md", ".markdown"), "markdown"),
    **dict.fromkeys((".html", ".htm", ".xhtml"), "html"),
    **dict.fromkeys((".csv", ".tsv"), "csv"),
    **dict.fromkeys((".jsonl", ".ndjson"), "jsonl"),
    **{f".{name}": name for name in ("pdf", "docx", "pptx", "xlsx", "epub")},
}
"""The format of a file, by the end of its name in lowercase."""

LINE_BYTES_MAX = 1024 * 1024
NAMES_SHOWN_MAX = 20

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Raw:
    """A file, or one line of a file of JSON Lines, that nobody has parsed."""

    path: Path
    name: str
    line: int | None = None
    content: bytes = b""
    problem: str = ""
    encoding: str = ""
    fingerprint: str = ""
    indexed: Indexed | None = field(default=None, compare=False)


class Files(Source):
    """Finds the files of folders, in the order of their names; `Load` behind it turns them into documents.

    A folder is searched to its bottom; names that begin with a dot and links to folders are left out. So are files of
    unknown formats, and a warning in the log counts and names them at the end. A file that is named itself is always
    taken. Nothing is parsed here, so one broken file fails in `Load`, where `on_error` can skip it. Run it in one task:
    each would find every file.

    A file is named relative to the folder that it was found in. Where there are several places, the name of the folder
    stands before that, with as much of its path as makes the places differ, so that no two files have one name. A file
    that is in two places is taken once.

    Args:
        places: folders and files.
        line_bytes_max: the longest line of JSON Lines that is taken, in bytes.
        unknown: "skip" leaves files of unknown formats out; "refuse" hands them on, so that `Load` refuses each.
        indexed: knows the files that are in an index; those that are unchanged since are left out.

    Raises:
        GraphError: no folder or file is given, or `unknown` has another value.
        DocumentError: from `open`, if a place does not exist.
    """

    def __init__(
        self,
        *places: str | os.PathLike[str],
        line_bytes_max: int = LINE_BYTES_MAX,
        unknown: str = "skip",
        indexed: Indexed | None = None,
    ) -> None:
        if not places:
            raise hint(GraphError("Files() names no folder and no file"), "Write Files(folder), or several of them.")
        if unknown not in ("skip", "refuse"):
            raise hint(GraphError(f"Files: unknown is {unknown!r}"), 'It is "skip" or "refuse".')
        self._places = tuple(Path(place) for place in places)
        self._line_bytes_max = line_bytes_max
        self._refuses_unknown = unknown == "refuse"
        self._indexed = indexed
        self._found: Iterator[Raw] = iter(())
        self._seen: set[str] = set()
        self._unknown: list[str] = []

    def open(self) -> None:
        """Look whether every place is there."""
        for place in self._places:
            if not place.exists():
                raise DocumentError(str(place), "the file or folder does not exist")
        self._seen.clear()
        self._unknown.clear()
        self._found = self._find()

    def read(self, records_max: int) -> list[Raw] | None:
        """Return the next files or lines."""
        found = [raw for _, raw in zip(range(records_max), self._found, strict=False)]
        return found or None

    def close(self) -> None:
        """Close the file that is being read."""
        closing = getattr(self._found, "close", None)
        if closing is not None:
            closing()

    def _find(self) -> Iterator[Raw]:
        is_whole = True
        for place, above in zip(self._places, names_of(self._places), strict=True):
            if not place.is_dir():
                yield from self._open(place, above)
                continue
            refused: list[OSError] = []
            for folder, folders, files in os.walk(place, onerror=refused.append):
                folders[:] = sorted(name for name in folders if not name.startswith("."))
                for name in sorted(files):
                    path = Path(folder, name)
                    if name.startswith("."):
                        continue
                    if path.suffix.lower() in FORMATS or self._refuses_unknown:
                        yield from self._open(path, above / path.relative_to(place))
                    else:
                        self._unknown.append(text_of(above / path.relative_to(place)))
            for error in refused:
                is_whole = False
                yield Raw(place, str(error.filename or place), problem=f"cannot be read: {error.strerror or error}")
        self._report_unknown()
        if self._indexed is not None and is_whole:
            self._indexed.found_all()

    def _report_unknown(self) -> None:
        if self._unknown:
            kinds = Counter(PurePath(name).suffix.lower() or "(none)" for name in self._unknown)
            shown = ", ".join(f"{kind} {number}" for kind, number in kinds.most_common())
            more = len(self._unknown) - NAMES_SHOWN_MAX
            names = ", ".join(self._unknown[:NAMES_SHOWN_MAX]) + (f" and {more} more" if more > 0 else "")
            log.warning("files of unknown formats are left out: count=%d (%s): %s", len(self._unknown), shown, names)

    def _open(self, path: Path, named: PurePath) -> Iterator[Raw]:
        place = os.path.abspath(path)
        if place in self._seen:
            return
        self._seen.add(place)
        raw = Raw(path, text_of(named), indexed=self._indexed)
        try:
            if self._indexed is not None:
                with path.open("rb") as file:
                    fingerprint = hashlib.file_digest(file, lambda: hashlib.blake2b(digest_size=16)).hexdigest()
                if self._indexed.is_unchanged(raw.name, fingerprint):
                    return
                raw = Raw(path, raw.name, fingerprint=fingerprint, indexed=self._indexed)
            if FORMATS.get(path.suffix.lower()) == "jsonl":
                yield from self._lines(raw)
            else:
                yield raw
        except OSError as error:
            yield Raw(path, raw.name, problem=f"cannot be read: {error.strerror or error}", indexed=self._indexed)

    def _lines(self, raw: Raw) -> Iterator[Raw]:
        """Yield the lines of a file: those of wide characters in UTF-8, others as they are, for `Load` to decode."""
        with raw.path.open("rb") as file:
            wide = json.detect_encoding(file.read(4))
            file.seek(0)
            encoding = "" if wide.startswith("utf-8") else wide
            given = "utf-8" if encoding else ""
            is_empty = True
            with TextIOWrapper(file, encoding or "latin-1", errors="replace", newline=None) as lines:
                for number, line, problem in self._numbered(lines):
                    content = line.encode("utf-8" if encoding else "latin-1", "replace")
                    if problem or content.strip(b"\xef\xbb\xbf \t\v\f"):
                        is_empty = False
                        yield replace(raw, line=number, content=content, problem=problem, encoding=given)
        if is_empty:
            log.warning("a file has no text: %s", raw.name)

    def _numbered(self, lines: TextIO) -> Iterator[tuple[int, str, str]]:
        number = 0
        while line := lines.readline(self._line_bytes_max + 1):
            number += 1
            length = len(line.rstrip("\n"))
            if length <= self._line_bytes_max:
                yield number, line[:length], ""
                continue
            # The rest is passed over in pieces of the same bound, as one line may be larger than the memory.
            while not line.endswith("\n") and (line := lines.readline(self._line_bytes_max)):
                length += len(line.rstrip("\n"))
            yield number, "", too_long(length, self._line_bytes_max)


def names_of(places: Sequence[Path]) -> list[PurePath]:
    """Return the prefix of the files' names for each place: empty for a single folder.

    All of them have the same number of parts, so that no file of one place has the name of a file of another.
    """
    parts = [Path(os.path.abspath(place)).parts for place in places]
    distinct = set(parts)
    if len(distinct) == 1 and places[0].is_dir():
        return [PurePath()] * len(places)
    depth = next(depth for depth in count(1) if len({each[-depth:] for each in distinct}) == len(distinct))
    return [PurePath(*each[-depth:]) for each in parts]


def text_of(name: PurePath) -> str:
    """Return the name of a file as a text that can be written: bytes of another encoding are shown as they are."""
    return name.as_posix().encode("utf-8", "backslashreplace").decode()


def too_long(length: int, length_max: int) -> str:
    """Return the problem of a line of so many bytes."""
    return f"the line has {length:,} bytes, at most {length_max:,} are taken"
