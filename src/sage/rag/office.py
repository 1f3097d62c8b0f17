"""The text of office files: the paragraphs of documents, the slides of presentations and the rows of tables."""

from __future__ import annotations

import csv
import warnings
import zipfile
from datetime import date, datetime, time
from io import BytesIO, StringIO
from itertools import groupby
from typing import TYPE_CHECKING, Any, NamedTuple

from sage._extras import load
from sage.rag.markup import ROW_LETTERS_MAX

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping, Sequence
    from xml.etree.ElementTree import Element  # those of lxml have the same methods

    from sage.rag.documents import Value

    Part = tuple[int, bool, str]

W = "{http://schemas.openxmlformats.org/wordprocessingml/2006/main}"
# The older form of a drawing beside the newer one, and text that was deleted or is computed.
UNREAD = {
    "{http://schemas.openxmlformats.org/markup-compatibility/2006}Fallback",
    *(W + name for name in ("del", "moveFrom", "instrText", "pPr", "rPr")),
}
SIGNS = {W + "tab": "\t", W + "br": "\n", W + "cr": "\n", W + "noBreakHyphen": "-"}
OLD_OFFICE = b"\xd0\xcf\x11\xe0\xa1\xb1\x1a\xe1"
MEDIA = tuple(f".{name}" for name in "png jpg jpeg gif bmp tiff emf wmf wav mp3 mp4 ttf otf".split())  # noqa: SIM905
DELIMITERS = ",;\t|"


class UnreadableError(ValueError):
    """A file is broken, encrypted or too large."""


class Row(NamedTuple):
    """A row of a table, by the names in the table's first row."""

    line: int
    fields: Sequence[tuple[str, Value]]

    def text(self) -> str:
        """Return the row as text: a line for each value, after its name."""
        return "\n".join(f"{name}: {value}" if name else str(value) for name, value in self.fields)


def opened(content: bytes, bytes_max: int) -> zipfile.ZipFile:
    """Return the archive that a file of this kind is."""
    if content.startswith(OLD_OFFICE):
        raise UnreadableError("is encrypted, or has an older format")
    archive = zipfile.ZipFile(BytesIO(content))
    size = sum(entry.file_size for entry in archive.infolist() if not entry.filename.lower().endswith(MEDIA))
    if size > bytes_max:
        raise UnreadableError(f"unpacks to {size:,} bytes, at most {bytes_max:,} are taken")
    return archive


def document_parts(content: bytes) -> tuple[str, list[Part]]:
    """Return the title of a Word document, and its headings and blocks as level, whether it is prose, and text."""
    document = load("docx", "office").Document(BytesIO(content))
    levels = _heading_levels(document.styles.element)
    found = list(_paragraphs(document.element.body, levels))
    for relation in document.part.rels.values():
        if not relation.is_external and relation.reltype.endswith(("/footnotes", "/endnotes")):
            notes = load("lxml.etree", "office").fromstring(relation.target_part.blob)
            found += [part for note in notes if note.get(W + "type") is None for part in _paragraphs(note, {})]
    return str(document.core_properties.title or ""), _joined(found)


def _heading_levels(styles: Element) -> dict[str, int]:
    """Return the level of the headings by the id of their style; titles have the first one."""
    levels: dict[str, int] = {}
    bases: dict[str, str] = {}
    for style in styles.iter(W + "style"):
        id_ = style.get(W + "styleId") or ""
        name = style.find(W + "name")
        named = (name.get(W + "val") or "").lower() if name is not None else ""
        outline = style.find(f"{W}pPr/{W}outlineLvl")
        base = style.find(W + "basedOn")
        bases[id_] = base.get(W + "val") or "" if base is not None else ""
        if named == "title":
            levels[id_] = 1
        elif named.startswith("heading ") and named[8:].isdigit():
            levels[id_] = int(named[8:]) + 1
        elif outline is not None and (number := outline.get(W + "val") or "").isdigit():
            # The tenth level is that of text.
            levels[id_] = (int(number) + 2) % 11
    for id_ in bases:
        above, seen = id_, set[str]()
        while above and above not in levels and above not in seen:
            seen.add(above)
            above = bases.get(above, "")
        levels.setdefault(id_, levels.get(above, 0))
    return levels


def _paragraphs(within: Element, levels: Mapping[str, int]) -> Iterator[tuple[int, bool, str]]:
    """Yield the paragraphs and rows in an element: level, whether it is an item or a row, and text."""
    for child in within:
        tag: object = child.tag  # that of a comment is not a string
        if tag == W + "p":
            boxes: list[Element] = []
            text = "".join(_text(child, boxes)).strip()
            style = child.find(f"{W}pPr/{W}pStyle")
            name = "" if style is None else style.get(W + "val") or ""
            is_item = child.find(f"{W}pPr/{W}numPr") is not None or name.startswith("List")
            level = levels.get(name, 0)
            if text:
                yield (
                    (level, False, " ".join(text.split())) if level else (0, is_item, f"- {text}" if is_item else text)
                )
            for box in boxes:
                yield from _paragraphs(box, levels)
        elif tag == W + "tr":
            cells = [list(_paragraphs(cell, levels)) for cell in child.iter(W + "tc")]
            row = " | ".join(" ".join(" ".join(text.split()) for _, _, text in cell) for cell in cells)
            if len(row) > ROW_LETTERS_MAX:
                yield from (part for cell in cells for part in cell)
            elif row.strip(" |"):
                yield 0, True, row
        elif isinstance(tag, str) and tag not in UNREAD:
            yield from _paragraphs(child, levels)


def _text(node: Element, boxes: list[Element]) -> Iterator[str]:
    """Yield the pieces of a paragraph's text, and collect the text boxes in it."""
    for child in node:
        tag: object = child.tag
        if tag == W + "t":
            yield child.text or ""
        elif child.tag in SIGNS:
            yield SIGNS[child.tag]
        elif tag == W + "txbxContent":
            boxes.append(child)
        elif isinstance(tag, str) and tag not in UNREAD:
            yield from _text(child, boxes)


def _joined(parts: Iterable[Part]) -> list[Part]:
    """Return parts with the items and rows that follow each other as one block."""
    joined: list[Part] = []
    for is_line, group in groupby(parts, key=lambda part: part[1]):
        if is_line:
            joined.append((0, False, "\n".join(text for _, _, text in group)))
        else:
            joined += [(level, True, text) for level, _, text in group]
    return joined


def slide_parts(content: bytes) -> tuple[str, list[list[Part]]]:
    """Return the title of a presentation, and the blocks of each of its slides, with the notes of the speaker."""
    presentation = load("pptx", "office").Presentation(BytesIO(content))
    slides = []
    for slide in presentation.slides:
        title = slide.shapes.title
        parts = [part for shape in slide.shapes for part in _shape(shape, None if title is None else title.shape_id)]
        if slide.has_notes_slide and slide.notes_slide.notes_text_frame is not None:
            parts.append((0, True, slide.notes_slide.notes_text_frame.text.strip()))
        headings = [part for part in parts if part[0]]
        slides.append([part for part in [*headings, *(part for part in parts if not part[0])] if part[2]])
    return str(presentation.core_properties.title or ""), slides


def _shape(shape: Any, title: int | None) -> Iterator[Part]:
    if getattr(shape, "shapes", None) is not None:
        for inner in shape.shapes:
            yield from _shape(inner, title)
    elif getattr(shape, "has_table", False):
        rows = [" | ".join(" ".join(cell.text.split()) for cell in row.cells) for row in shape.table.rows]
        yield 0, False, "\n".join(row for row in rows if row.strip(" |"))
    elif shape.has_text_frame:
        lines = [" ".join(paragraph.text.split()) for paragraph in shape.text_frame.paragraphs]
        if shape.shape_id == title:
            yield 1, True, " ".join(line for line in lines if line)
        else:
            yield 0, len(lines) == 1, "\n".join(line for line in lines if line)


def sheet_rows(content: bytes) -> Iterator[tuple[str, list[Row]]]:
    """Yield the sheets of a workbook with their rows: the values that were computed last, not the formulas."""
    with warnings.catch_warnings():
        # It says which features it does not keep when it writes.
        warnings.simplefilter("ignore")
        book = load("openpyxl", "office").load_workbook(BytesIO(content), read_only=True, data_only=True)
        try:
            for sheet in book.worksheets:
                # The size that a file states is often wrong.
                sheet.reset_dimensions()
                rows = ([_value(cell) for cell in row] for row in sheet.iter_rows(values_only=True))
                yield sheet.title, list(rows_of(enumerate(rows, 1)))
        finally:
            book.close()


def table_rows(text: str, delimiter: str | None = None) -> Iterator[Row]:
    """Yield the rows of a text of separated values; the separator is found in the first line."""
    if delimiter is None:
        first = next((line for line in text.split("\n") if line.strip()), "")
        bare = "".join(first.split('"')[::2])
        delimiter = max(DELIMITERS, key=bare.count)
    reader = csv.reader(StringIO(text, newline=""), delimiter=delimiter)

    def lines() -> Iterator[tuple[int, list[Value]]]:
        line = 1
        try:
            for row in reader:
                yield line, [value.strip() for value in row]
                line = reader.line_num + 1
        except csv.Error as error:
            raise UnreadableError(f"line {line}: {error}") from error

    yield from rows_of(lines())


def rows_of(lines: Iterable[tuple[int, list[Value]]]) -> Iterator[Row]:
    """Yield rows by the names in the first one that is not empty; if it is the only one, that one itself."""
    names: list[str] | None = None
    first: Row | None = None
    for line, values in lines:
        if not any(value != "" for value in values):
            continue
        if names is None:
            names = _distinct([" ".join(str(value).split()) for value in values])
            first = Row(line, [("", value) for value in values if value != ""])
            continue
        first = None
        named = [*names, *[""] * (len(values) - len(names))]
        yield Row(line, [(name, value) for name, value in zip(named, values, strict=False) if value != ""])
    if first is not None:
        yield first


def _distinct(names: list[str]) -> list[str]:
    """Return names of columns, with a number behind those that an earlier column has."""
    counts: dict[str, int] = {}
    for place, name in enumerate(names):
        counts[name] = counts.get(name, 0) + 1
        if name and counts[name] > 1:
            names[place] = f"{name} ({counts[name]})"
    return names


def _value(cell: object) -> Value:
    if isinstance(cell, datetime) and cell.time() == time.min:
        cell = cell.date()
    if isinstance(cell, datetime | date | time):
        return cell.isoformat()
    if isinstance(cell, float) and cell.is_integer() and abs(cell) < 2**53:
        return int(cell)
    return cell if isinstance(cell, bool | int | float) else "" if cell is None else str(cell).strip()
