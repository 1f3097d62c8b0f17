"""Small real files of every kind, made by the libraries that write them."""

from __future__ import annotations

import json
import warnings
import zipfile
from io import BytesIO
from typing import Any

from rag.small_pdf import pdf_of

CONTAINER = """<?xml version="1.0"?><container xmlns="urn:oasis:names:tc:opendocument:xmlns:container" version="1.0">
<rootfiles><rootfile full-path="OEBPS/book.opf" media-type="application/oebps-package+xml"/></rootfiles></container>"""


def docx_of(*parts: tuple[str, str], table: list[list[str]] | None = None) -> bytes:
    """Return a Word document of paragraphs, given as style and text, and of a table behind them."""
    import docx

    document = docx.Document()
    for style, text in parts:
        document.add_paragraph(text, style=style)
    if table:
        made = document.add_table(len(table), len(table[0]))
        for number, row in enumerate(table):
            for place, text in enumerate(row):
                made.cell(number, place).text = text
    return _saved(document)


def pptx_of(*slides: tuple[str, str], notes: str = "") -> bytes:
    """Return a presentation of slides, given as title and text; the first one has the notes."""
    import pptx

    presentation = pptx.Presentation()
    for title, text in slides:
        slide = presentation.slides.add_slide(presentation.slide_layouts[1])
        slide.shapes.title.text = title
        slide.placeholders[1].text = text
        if notes and len(presentation.slides) == 1:
            slide.notes_slide.notes_text_frame.text = notes
    return _saved(presentation)


def xlsx_of(**sheets: list[list[Any]]) -> bytes:
    """Return a workbook of sheets with rows."""
    import openpyxl

    book = openpyxl.Workbook()
    book.remove(book.active)
    for name, rows in sheets.items():
        sheet = book.create_sheet(name)
        for row in rows:
            sheet.append(row)
    return _saved(book)


def epub_of(title: str, *chapters: str, more: dict[str, str] | None = None) -> bytes:
    """Return a book of chapters, given as pages of HTML, and of other files."""
    numbers = range(1, len(chapters) + 1)
    items = "".join(f'<item id="c{n}" href="text/c%20{n}.xhtml" media-type="application/xhtml+xml"/>' for n in numbers)
    spine = "".join(f'<itemref idref="c{n}"/>' for n in numbers)
    package = (
        '<?xml version="1.0"?><package xmlns="http://www.idpf.org/2007/opf" xmlns:dc="http://purl.org/dc/elements/1.1/">'
        f"<metadata><dc:title>{title}</dc:title></metadata><manifest>{items}</manifest><spine>{spine}</spine></package>"
    )
    target = BytesIO()
    with zipfile.ZipFile(target, "w") as archive:
        archive.writestr("mimetype", "application/epub+zip")
        archive.writestr("META-INF/container.xml", CONTAINER)
        archive.writestr("OEBPS/book.opf", package)
        for number, chapter in enumerate(chapters, 1):
            archive.writestr(f"OEBPS/text/c {number}.xhtml", chapter)
        for name, text in (more or {}).items():
            archive.writestr(name, text)
    return target.getvalue()


def encrypted_pdf(*pages: str, algorithm: str, user: str = "", owner: str = "owner") -> bytes:
    """Return a PDF that its user may read with the password `user`."""
    import pypdf

    writer = pypdf.PdfWriter(BytesIO(pdf_of(*pages)))
    writer.encrypt(user, owner, algorithm=algorithm)
    target = BytesIO()
    writer.write(target)
    return target.getvalue()


def one_of_each() -> dict[str, bytes]:
    """Return a small file of each format by the end of its name; each has the words "nine coins"."""
    page = "<!doctype html><title>T</title><h1>Shop</h1><p>It takes nine coins.<table><tr><td>a<td>b</table>"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return {
            ".txt": b"The tape.\r\n\r\nIt takes nine coins.",
            ".md": b"---\ntitle: Guide\n---\n# Shop\n\nIt takes nine coins.\n\n- one\n- two\n",
            ".html": page.encode(),
            ".pdf": pdf_of("It takes nine coins.", "", "More."),
            ".docx": docx_of(("Heading 1", "Shop"), ("Normal", "It takes nine coins."), table=[["a", "b"]]),
            ".pptx": pptx_of(("Shop", "It takes nine coins.")),
            ".xlsx": xlsx_of(Prices=[["item", "price"], ["tape", "nine coins"]]),
            ".epub": epub_of("Shop", "<html><body><h1>One</h1><p>It takes nine coins.</p></body></html>"),
            ".csv": b"item,price\ntape,nine coins\n",
            ".tsv": b"item\tprice\ntape\tnine coins\n",
            ".jsonl": json.dumps({"id": 1, "text": "It takes nine coins."}).encode(),
        }


def _saved(made: Any) -> bytes:
    target = BytesIO()
    made.save(target)
    return target.getvalue()
