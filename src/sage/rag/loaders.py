"""Files become documents: text, Markdown, HTML, PDF and JSON Lines."""

from __future__ import annotations

import json
import os
import re
from collections import defaultdict
from dataclasses import dataclass
from itertools import count
from pathlib import Path, PurePath
from typing import TYPE_CHECKING, BinaryIO

from sage.connector import Source
from sage.errors import GraphError, describe, hint, short
from sage.functions import FlatMapFunction
from sage.rag.documents import Document, DocumentError, Value
from sage.rag.markup import html_text
from sage.services.embeddings import well_formed
from sage.services.filters import problem_of

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

FORMATS = {
    ".txt": "text",
    ".md": "markdown",
    ".markdown": "markdown",
    ".html": "html",
    ".htm": "html",
    ".pdf": "pdf",
    ".jsonl": "jsonl",
}
"""The format of a file, by the end of its name in small letters."""

AMBIGUOUS = re.compile("[#~]|%(?=23|25|7E)")
"""What a splitter puts between the parts of an id, and what stands for it in an id that was given."""

FILE_BYTES_MAX = 64 * 1024 * 1024
LINE_BYTES_MAX = 1024 * 1024


@dataclass(frozen=True, slots=True)
class Raw:
    """What a source found and nobody has parsed: a file, or one line of a file of JSON Lines.

    Attributes:
        path: the file.
        name: the file as it is named in ids and errors, see `Files`.
        line: the number of the line, counted from 1; None for a whole file.
        content: the line without its end, where there is one.
        problem: why it could not be read; `Load` raises it, so that its `on_error` decides.
    """

    path: Path
    name: str
    line: int | None = None
    content: bytes = b""
    problem: str = ""


class Files(Source):
    """Finds the files of folders, in the order of their names; `Load` behind it turns them into documents.

    A folder is searched to its bottom; names that begin with a dot and links to folders are left out, and so are files
    of formats that are not known. A file that is named itself is taken whatever it is. Nothing is parsed here, so one
    broken file fails in `Load`, where `on_error` can skip it. Run it in one task: each would find every file.

    A file is named relative to the folder that it was found in. Where there are several places, the name of the folder
    stands before that, with as much of its path as makes the places differ, so that no two files have one name. A file
    that is in two places is taken once.

    Args:
        places: folders and files.
        line_bytes_max: the longest line of JSON Lines that is taken, in bytes.

    Raises:
        GraphError: there is no place.
        DocumentError: from `open`, if a place does not exist.
    """

    def __init__(self, *places: str | os.PathLike[str], line_bytes_max: int = LINE_BYTES_MAX) -> None:
        if not places:
            raise hint(GraphError("Files() names no folder and no file"), "Write Files(folder), or several of them.")
        self._places = tuple(Path(place) for place in places)
        self._line_bytes_max = line_bytes_max
        self._found: Iterator[Raw] = iter(())
        self._seen: set[str] = set()

    def open(self) -> None:
        """Look whether every place is there."""
        for place in self._places:
            if not place.exists():
                raise DocumentError(str(place), "there is no such file or folder")
        self._seen.clear()
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
        for place, above in zip(self._places, names_of(self._places), strict=True):
            if not place.is_dir():
                yield from self._open(place, above)
                continue
            refused: list[OSError] = []
            for folder, folders, files in os.walk(place, onerror=refused.append):
                folders[:] = sorted(name for name in folders if not name.startswith("."))
                for name in sorted(files):
                    path = Path(folder, name)
                    if path.suffix.lower() in FORMATS and not name.startswith("."):
                        yield from self._open(path, above / path.relative_to(place))
            for error in refused:
                yield Raw(place, str(error.filename or place), problem=f"cannot be read: {error.strerror or error}")

    def _open(self, path: Path, named: PurePath) -> Iterator[Raw]:
        place = os.path.abspath(path)
        if place in self._seen:
            return
        self._seen.add(place)
        name = text_of(named)
        if FORMATS.get(path.suffix.lower()) != "jsonl":
            yield Raw(path, name)
            return
        try:
            with path.open("rb") as file:
                yield from self._lines(path, name, file)
        except OSError as error:
            yield Raw(path, name, problem=f"cannot be read: {error.strerror or error}")

    def _lines(self, path: Path, name: str, file: BinaryIO) -> Iterator[Raw]:
        number = 0
        while line := file.readline(self._line_bytes_max + 2):
            number += 1
            length = len(line.rstrip(b"\r\n"))
            if length <= self._line_bytes_max:
                if length:
                    yield Raw(path, name, number, line[:length])
                continue
            # The rest is passed over in pieces of the same bound, as one line may be larger than the memory.
            while not line.endswith(b"\n") and (line := file.readline(self._line_bytes_max)):
                length += len(line.rstrip(b"\r\n"))
            yield Raw(path, name, number, problem=too_long(length, self._line_bytes_max))


class Load(FlatMapFunction):
    """Parses what `Files` found. What cannot be read raises `DocumentError`, so `on_error="skip"` goes on without it.

    A file of text, Markdown or HTML is one document, whose id is its name. A page of a PDF is one, "NAME#page=3", and a
    line of JSON Lines, "NAME#ID" by the field `id_field`, or else "NAME#line=3"; the other fields that are texts,
    numbers or booleans are its metadata. "#" and "~" in an ID become "%23" and "%7E", as they stand between the parts
    of the ids of passages. Records may also be paths, as text or `Path`.

    Of lines of one file with the same id, the first one counts, and the others cannot be read; that is found where one
    task loads all of the file. Halves of characters, which no index can write, become "?".

    Args:
        encoding: of text, Markdown and JSON Lines, and of HTML that declares none.
        file_bytes_max: the largest file that is read, in bytes.
        line_bytes_max: the longest line of text and Markdown, in bytes: a longer one shows that a file is no text.
        text_field: the field of JSON Lines that has the text.
        id_field: the field of JSON Lines that names the document.
    """

    def __init__(
        self,
        *,
        encoding: str = "utf-8",
        file_bytes_max: int = FILE_BYTES_MAX,
        line_bytes_max: int = LINE_BYTES_MAX,
        text_field: str = "text",
        id_field: str = "id",
    ) -> None:
        # A mark of the byte order is no part of the text.
        self._encoding = "utf-8-sig" if encoding.lower() in ("utf-8", "utf8") else encoding
        self._file_bytes_max = file_bytes_max
        self._line_bytes_max = line_bytes_max
        self._text_field = text_field
        self._id_field = id_field
        # Which line has an id, for each file.
        self._lines: defaultdict[Path, dict[str, int | None]] = defaultdict(dict)

    def execute(self, data: Raw | str | Path) -> Iterator[Document]:
        """Yield the documents of a file or of a line.

        Raises:
            DocumentError: it cannot be read, is too large, is broken, or has another encoding; a line has the id of
                another one, or something that no index can keep.
            ServiceError: the package that reads this format is not installed.
        """
        for document in self._documents(data):
            yield mended(document)

    def _documents(self, data: Raw | str | Path) -> Iterator[Document]:
        if not isinstance(data, Raw):
            path = Path(data)
            if FORMATS.get(path.suffix.lower()) == "jsonl":
                self._lines.pop(path, None)
                for raw in Files(path)._open(path, PurePath(path.name)):
                    yield self._record(raw)
                return
            data = Raw(path, text_of(PurePath(path.name)))
        if data.problem:
            raise DocumentError(data.name, data.problem, data.line)
        match FORMATS.get(data.path.suffix.lower()):
            case "jsonl":
                yield self._record(data)
            case "pdf":
                yield from self._pages(data)
            case "html":
                yield self._html(data)
            case "text" | "markdown" as format_:
                text = self._text(data)
                yield Document(data.name, text, self._metadata(data, format_, title=first_heading(text)))
            case _:
                error = DocumentError(data.name, f'files that end with "{data.path.suffix}" are not known')
                raise hint(error, f"Known are {', '.join(sorted(FORMATS))}; convert it, or leave it out.")

    @staticmethod
    def _metadata(raw: Raw, format_: str, **more: Value) -> dict[str, Value]:
        return {"file": raw.name, "format": format_, **{name: value for name, value in more.items() if value != ""}}

    def _bytes(self, raw: Raw) -> bytes:
        try:
            with raw.path.open("rb") as file:
                content = file.read(self._file_bytes_max + 1)
                size = max(len(content), os.fstat(file.fileno()).st_size)
        except OSError as error:
            raise DocumentError(raw.name, f"cannot be read: {error.strerror or error}") from error
        if size > self._file_bytes_max:
            raise DocumentError(raw.name, f"the file has {size:,} bytes, at most {self._file_bytes_max:,} are taken")
        return content

    def _decoded(self, raw: Raw, content: bytes, encoding: str, line: int | None = None) -> str:
        try:
            return content.decode(encoding)
        except UnicodeDecodeError as error:
            number = line or content.count(b"\n", 0, error.start) + 1
            problem = f"is not {encoding.removesuffix('-sig')}: byte 0x{content[error.start]:02x}"
            mended = DocumentError(raw.name, problem, number)
            raise hint(mended, "Save it as UTF-8, or name its encoding: Load(encoding=...).") from error
        except LookupError as error:
            raise DocumentError(raw.name, f'the encoding "{encoding}" is not known') from error

    def _text(self, raw: Raw) -> str:
        content = self._bytes(raw)
        for number, line in enumerate(content.split(b"\n"), 1):
            if len(line) > self._line_bytes_max:
                raise DocumentError(raw.name, too_long(len(line), self._line_bytes_max), number)
        return self._decoded(raw, content, self._encoding).replace("\r\n", "\n")

    def _record(self, raw: Raw) -> Document:
        if raw.problem:
            raise DocumentError(raw.name, raw.problem, raw.line)
        try:
            record = json.loads(self._decoded(raw, raw.content, self._encoding, raw.line))
        except (ValueError, RecursionError) as error:
            raise DocumentError(raw.name, f"is no JSON: {error}", raw.line) from error
        if not isinstance(record, dict):
            raise DocumentError(raw.name, f"is no JSON object but a {type(record).__name__}", raw.line)
        text = record.pop(self._text_field, None)
        if not isinstance(text, str):
            raise DocumentError(raw.name, f'has no text in the field "{self._text_field}"', raw.line)
        id_ = record.pop(self._id_field, None)
        name = well_formed(f"line={raw.line}" if id_ is None else AMBIGUOUS.sub(quoted, str(id_)))
        fields = self._fields(raw, record)
        first = self._lines[raw.path].setdefault(name, raw.line)
        # A line that is tried again is not another one.
        if first != raw.line:
            raise DocumentError(raw.name, f"has the id {short(name)}, as line {first} has", raw.line)
        return Document(f"{raw.name}#{name}", text, {**fields, **self._metadata(raw, "jsonl", line=raw.line or 0)})

    @staticmethod
    def _fields(raw: Raw, record: dict[str, object]) -> dict[str, Value]:
        """Return what an index can keep of the fields of a line; lists, objects and null are left out."""
        fields = {name: value for name, value in record.items() if isinstance(value, str | int | float)}
        for name, value in fields.items():
            if not name or name.startswith("$"):
                raise DocumentError(raw.name, f"a field cannot have the name {short(name)}", raw.line)
            if not isinstance(value, str) and (problem := problem_of(value)):
                raise DocumentError(raw.name, f"the field {short(name)} is {short(value)}, which {problem}", raw.line)
        return fields

    def _html(self, raw: Raw) -> Document:
        content = self._bytes(raw)
        title, text = html_text(raw.name, content, lambda found: self._decoded(raw, content, found or self._encoding))
        return Document(raw.name, text, self._metadata(raw, "html", title=title))

    def _pages(self, raw: Raw) -> Iterator[Document]:
        from io import BytesIO

        from sage.services.extras import load

        pypdf = load("pypdf", "pdf")
        content = self._bytes(raw)
        try:
            reader = pypdf.PdfReader(BytesIO(content))
            if reader.is_encrypted and not reader.decrypt(""):
                raise DocumentError(raw.name, "is encrypted")
            texts = [page.extract_text().strip() for page in reader.pages]
            title = str((reader.metadata and reader.metadata.title) or "")
        except DocumentError:
            raise
        except Exception as error:  # a broken file makes the parser fail in whatever place it has reached
            raise DocumentError(raw.name, f"is no PDF that can be read: {describe(error)}") from error
        if not any(texts):
            blank = DocumentError(raw.name, f"has no text on any of its {len(texts)} pages")
            raise hint(blank, "Pages that are pictures need a text recognition first.")
        for number, text in enumerate(texts, 1):
            if text:
                yield Document(f"{raw.name}#page={number}", text, self._metadata(raw, "pdf", title=title, page=number))


def quoted(found: re.Match[str]) -> str:
    """Return a sign as addresses of web pages have it."""
    return f"%{ord(found[0]):02X}"


def names_of(places: Sequence[Path]) -> list[PurePath]:
    """Return what stands before the names of the files of each place: nothing where there is one folder.

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


def mended(document: Document) -> Document:
    """Return a document in which "?" stands for halves of characters, as broken PDF files and JSON have them."""
    metadata = {
        well_formed(name): well_formed(value) if isinstance(value, str) else value
        for name, value in document.metadata.items()
    }
    return Document(well_formed(document.id), well_formed(document.text), metadata)


def too_long(length: int, length_max: int) -> str:
    """Return what is wrong with a line of so many bytes."""
    return f"the line has {length:,} bytes, at most {length_max:,} are taken"


def first_heading(text: str) -> str:
    """Return the text of the first line if that is a Markdown heading, or nothing."""
    line = text.lstrip().partition("\n")[0]
    return line.lstrip("#").strip().rstrip("#").strip() if line.startswith("#") else ""
