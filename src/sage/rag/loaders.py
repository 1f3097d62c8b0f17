"""Files become documents: text, Markdown, HTML, PDF, office files, books, and tables and JSON Lines by the row."""

from __future__ import annotations

import json
import logging
import os
import re
from collections import defaultdict
from pathlib import Path, PurePath
from typing import TYPE_CHECKING

from sage.errors import SageError, describe, hint, short
from sage.functions import FlatMapFunction
from sage.rag import front_matter, office, pages
from sage.rag.documents import Document, DocumentError, Outline, Value
from sage.rag.encodings import page_text, text_of
from sage.rag.files import FORMATS, LINE_BYTES_MAX, Files, Raw, too_long
from sage.rag.markup import assembled, html_text
from sage.rag.office import Row, UnreadableError
from sage.rag.structure import markdown_blocks, plain_blocks, title_of, with_line_feeds
from sage.services.models.embeddings import well_formed
from sage.services.vectors.filters import problem_of

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping

__all__ = ["Files", "Load", "Raw"]

AMBIGUOUS = re.compile("[#~]|%(?=23|25|7E)")
"""The characters that a splitter puts between the parts of an id, and their replacements in a given id."""

FILE_BYTES_MAX = 64 * 1024 * 1024
OURS = "sage:"

log = logging.getLogger(__name__)


class Load(FlatMapFunction):
    """Parses the files that `Files` found; `on_error="skip"` skips those that cannot be read (`DocumentError`).

    A file of text, Markdown, HTML or Word is one document, whose id is its name. Of other files, each part is one: a
    page of a PDF, "NAME#page=3", a slide, "NAME#slide=3", a chapter of a book, "NAME#chapter=3", and a row of a sheet,
    "NAME#sheet=Prices/line=3", of separated values or of JSON Lines, "NAME#ID" by the field `id_field`, or else
    "NAME#line=3". The log names and counts pages, slides and chapters that have no text. "#" and "~" in an ID become
    "%23" and "%7E", as they stand between the parts of the ids of passages. Records may also be paths, as text or
    `Path`.

    A row is a document by its field `text_field`; in a table without such a column, all of its columns are the text,
    each after its name. Its fields that are texts, numbers or booleans, and those in the front matter of Markdown, are
    its metadata. They take precedence over "file", "format" and the others that the loader adds, which `origin` and an
    index, as "sage:file" and so on, keep beside them.

    Of rows of one file with the same id, the first one counts, and the others cannot be read; that is found where one
    task loads all of the file. Halves of characters, which no index can write, become "?".

    Args:
        encoding: the only one of text, Markdown, tables and JSON Lines, and of HTML that declares none; None for the
            one that is found, see `sage.rag.encodings`.
        file_bytes_max: the largest file that is read, and the largest text that is unpacked from one, in bytes.
        line_bytes_max: the longest line of text and Markdown, in bytes: a longer one shows that a file is not text.
        text_field: the field of rows that has the text.
        id_field: the field of rows that names the document.
    """

    def __init__(
        self,
        *,
        encoding: str | None = None,
        file_bytes_max: int = FILE_BYTES_MAX,
        line_bytes_max: int = LINE_BYTES_MAX,
        text_field: str = "text",
        id_field: str = "id",
    ) -> None:
        self._encoding = encoding
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
        raws = [data] if isinstance(data, Raw) else self._raws(Path(data))
        for raw in raws:
            try:
                document = None
                for document in self._documents(raw):
                    if not document.text.strip():
                        log.warning("a document has no text: %s", document.id)
                    yield document
                if document is None:
                    log.warning("a file has no text: %s", raw.name)
            except DocumentError:
                if raw.indexed is not None:
                    raw.indexed.failed(raw.name)
                raise

    def _raws(self, path: Path) -> Iterator[Raw]:
        self._lines.pop(path, None)
        return Files(path)._open(path, PurePath(path.name))

    def _documents(self, raw: Raw) -> Iterator[Document]:
        if raw.problem:
            raise DocumentError(raw.name, raw.problem, raw.line)
        format_ = FORMATS.get(raw.path.suffix.lower())
        try:
            match format_:
                case "jsonl":
                    yield self._record(raw)
                case "text" | "markdown":
                    yield self._text(raw, format_)
                case "html":
                    yield self._html(raw)
                case "csv":
                    yield from self._table(raw)
                case "docx":
                    yield from self._docx(raw, self._bytes(raw))
                case "pptx":
                    yield from self._pptx(raw, self._bytes(raw))
                case "xlsx":
                    yield from self._xlsx(raw, self._bytes(raw))
                case "epub":
                    yield from self._epub(raw, self._bytes(raw))
                case "pdf":
                    yield from self._pdf(raw, self._bytes(raw))
                case _:
                    error = DocumentError(raw.name, f'files that end with "{raw.path.suffix}" are not known')
                    raise hint(error, f"Known are {', '.join(sorted(FORMATS))}; convert it, or leave it out.")
        except UnreadableError as error:
            raise DocumentError(raw.name, str(error)) from error
        except (SageError, MemoryError):
            raise
        except Exception as error:  # a broken file makes its parser fail at any place
            raise DocumentError(
                raw.name, f"is no {str(format_).upper()} that can be read: {describe(error)}"
            ) from error

    def _document(
        self, raw: Raw, id_: str, outline: Outline, more: Mapping[str, Value], fields: Mapping[str, Value] | None = None
    ) -> Document:
        """Return a document; its own metadata takes precedence, and ours is separate."""
        found = {"file": raw.name, "format": FORMATS[raw.path.suffix.lower()], **more, "fingerprint": raw.fingerprint}
        origin = {name: mended(value) for name, value in found.items() if value != ""}
        shown = {name: value for name, value in origin.items() if name != "fingerprint"}
        metadata = {**shown, **{well_formed(name): mended(value) for name, value in (fields or {}).items()}}
        text = well_formed(outline.text)
        return Document(well_formed(id_), text, metadata, origin, Outline(text, outline.blocks))

    def _parts(self, raw: Raw, kind: str, title: str, parts: Iterable[tuple[str, Outline]]) -> Iterator[Document]:
        """Yield a document for each page, slide or chapter, and report those that have no text."""
        listed = list(parts)
        empty = [number for number, (_, outline) in enumerate(listed, 1) if not outline.text.strip()]
        if len(empty) == len(listed):
            error = DocumentError(raw.name, f"does not have text on any of its {len(listed)} {kind}s")
            raise hint(error, "Pages that are pictures need text recognition first.")
        if empty:
            text = "%ss have no text: file=%s count=%d of=%d: %s"
            log.warning(text, kind, raw.name, len(empty), len(listed), ", ".join(map(str, empty)))
        for number, (own, outline) in enumerate(listed, 1):
            if outline.text.strip():
                yield self._document(raw, f"{raw.name}#{kind}={number}", outline, {"title": own or title, kind: number})

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

    def _text(self, raw: Raw, format_: str) -> Document:
        content = self._bytes(raw)
        text, encoding = text_of(raw.name, content, self._encoding)
        text = with_line_feeds(text)
        for number, line in enumerate(text.split("\n"), 1):
            if len(line) > self._line_bytes_max:
                raise DocumentError(
                    raw.name, too_long(len(line.encode("utf-8", "replace")), self._line_bytes_max), number
                )
        fields: Mapping[str, Value] = {}
        if format_ == "markdown":
            fields, text = front_matter.parted(text)
            fields = kept_fields(raw, fields)
        blocks = markdown_blocks(text) if format_ == "markdown" else plain_blocks(text)
        more = {"title": title_of(text, blocks), "encoding": unusual(encoding)}
        return self._document(raw, raw.name, Outline(text, blocks), more, fields)

    def _record(self, raw: Raw) -> Document:
        try:
            record = json.loads(text_of(raw.name, raw.content, raw.encoding or self._encoding, raw.line)[0])
        except (ValueError, RecursionError) as error:
            raise DocumentError(raw.name, f"is not JSON: {error}", raw.line) from error
        if not isinstance(record, dict):
            raise DocumentError(raw.name, f"is not a JSON object but a {type(record).__name__}", raw.line)
        text = record.pop(self._text_field, None)
        if not isinstance(text, str):
            raise DocumentError(raw.name, f'has no text in the field "{self._text_field}"', raw.line)
        id_ = record.pop(self._id_field, None)
        return self._row(raw, raw.line or 0, id_, text, kept_fields(raw, record, raw.line))

    def _row(
        self, raw: Raw, line: int, id_: object, text: str, fields: Mapping[str, Value], sheet: str = ""
    ) -> Document:
        given = f"line={line}" if id_ is None else AMBIGUOUS.sub(quoted, str(id_))
        name = well_formed(f"sheet={AMBIGUOUS.sub(quoted, sheet)}/{given}" if sheet else given)
        first = self._lines[raw.path].setdefault(name, line)
        # A line that is tried again is not another one.
        if first != line:
            raise DocumentError(raw.name, f"has the id {short(name)}, as line {first} has", line)
        text = with_line_feeds(text)
        outline = Outline(text, plain_blocks(text))
        return self._document(raw, f"{raw.name}#{name}", outline, {"line": line, "sheet": sheet}, fields)

    def _rows(self, raw: Raw, rows: Iterable[Row], sheet: str = "") -> Iterator[Document]:
        for row in rows:
            values = dict(row.fields)
            fields = {
                name: value
                for name, value in values.items()
                if name
                and not name.startswith(("$", OURS))
                and not (isinstance(value, int | float) and problem_of(value))
            }
            text, id_ = fields.pop(self._text_field, None), fields.pop(self._id_field, None)
            yield self._row(raw, row.line, id_, row.text() if text is None else str(text), fields, sheet)

    def _table(self, raw: Raw) -> Iterator[Document]:
        text, _ = text_of(raw.name, self._bytes(raw), self._encoding)
        self._lines.pop(raw.path, None)
        delimiter = "\t" if raw.path.suffix.lower() == ".tsv" else None
        yield from self._rows(raw, office.table_rows(with_line_feeds(text), delimiter))

    def _xlsx(self, raw: Raw, content: bytes) -> Iterator[Document]:
        office.opened(content, self._file_bytes_max).close()
        self._lines.pop(raw.path, None)
        sheets = list(office.sheet_rows(content))
        if not any(rows for _, rows in sheets):
            raise DocumentError(raw.name, f"does not have text on any of its {len(sheets)} sheets")
        for sheet, rows in sheets:
            yield from self._rows(raw, rows, sheet)

    def _html(self, raw: Raw) -> Document:
        page, encoding, broken = page_text(self._bytes(raw), self._encoding)
        if broken:
            log.warning("bytes are not characters of %s: file=%s count=%d", encoding, raw.name, broken)
        title, outline = html_text(raw.name, page)
        return self._document(raw, raw.name, outline, {"title": title, "encoding": unusual(encoding)})

    def _docx(self, raw: Raw, content: bytes) -> Iterator[Document]:
        office.opened(content, self._file_bytes_max).close()
        title, parts = office.document_parts(content)
        yield self._document(raw, raw.name, assembled(parts), {"title": title})

    def _pptx(self, raw: Raw, content: bytes) -> Iterator[Document]:
        office.opened(content, self._file_bytes_max).close()
        title, slides = office.slide_parts(content)
        yield from self._parts(raw, "slide", title, [("", assembled(parts)) for parts in slides])

    def _epub(self, raw: Raw, content: bytes) -> Iterator[Document]:
        with office.opened(content, self._file_bytes_max) as archive:
            title, chapters = pages.book_chapters(archive)
        found = (html_text(raw.name, page_text(chapter, None)[0]) for chapter in chapters)
        yield from self._parts(raw, "chapter", title, found)

    def _pdf(self, raw: Raw, content: bytes) -> Iterator[Document]:
        title, texts = pages.pdf_pages(content)
        stripped = (with_line_feeds(text).strip() for text in texts)
        yield from self._parts(raw, "page", title, [("", Outline(text, plain_blocks(text))) for text in stripped])


def kept_fields(raw: Raw, record: Mapping[str, object], line: int | None = None) -> dict[str, Value]:
    """Return the fields of a document that an index can store; lists, objects and null are left out."""
    fields = {name: value for name, value in record.items() if isinstance(value, str | int | float)}
    for name, value in fields.items():
        if not name or name.startswith(("$", OURS)):
            raise DocumentError(raw.name, f"a field cannot have the name {short(name)}", line)
        if not isinstance(value, str) and (problem := problem_of(value)):
            raise DocumentError(raw.name, f"the field {short(name)} is {short(value)}, which {problem}", line)
    return fields


def unusual(encoding: str) -> str:
    """Return an encoding that a reader may want to know, or nothing."""
    return "" if encoding in ("utf-8", "ascii") else encoding


def quoted(found: re.Match[str]) -> str:
    """Return a sign as addresses of web pages have it."""
    return f"%{ord(found[0]):02X}"


def mended(value: Value) -> Value:
    """Return a value in which "?" stands for halves of characters, as broken PDF files and JSON have them."""
    return well_formed(value) if isinstance(value, str) else value
