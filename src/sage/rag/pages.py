"""The text of files that have pages or chapters: PDF and EPUB."""

from __future__ import annotations

import posixpath
import threading
from contextlib import closing
from typing import TYPE_CHECKING
from urllib.parse import unquote
from xml.etree import ElementTree

from sage._extras import load
from sage.rag.office import UnreadableError

if TYPE_CHECKING:
    from collections.abc import Iterator
    from zipfile import ZipFile

PASSWORD_ERROR = 4
"""The number that PDFium gives to an error of the password."""

# PDFium is not made for several threads, even with different documents.
_pdfium = threading.Lock()


def pdf_pages(content: bytes) -> tuple[str, list[str]]:
    """Return the title of a PDF file and the text of each page."""
    pdfium = load("pypdfium2", "pdf")
    with _pdfium:
        try:
            document = pdfium.PdfDocument(content)
        except pdfium.PdfiumError as error:
            if error.err_code == PASSWORD_ERROR:
                raise UnreadableError("is encrypted") from error
            raise
        try:
            title = document.get_metadata_value("Title")
            pages: list[str] = []
            for number in range(len(document)):
                with closing(document[number]) as page, closing(page.get_textpage()) as text_page:
                    # It marks the hyphens at which a word was divided, and has joined the word.
                    pages.append(str(text_page.get_text_bounded()).replace("\ufffe", "").replace("\x02", ""))
            return str(title or "").strip(), pages
        finally:
            document.close()


def book_chapters(archive: ZipFile) -> tuple[str, list[bytes]]:
    """Return the title of a book in EPUB and its chapters as pages of HTML, in the order of reading.

    A chapter that is listed and not there is empty.
    """
    container = ElementTree.fromstring(archive.read("META-INF/container.xml"))
    place = next((unquote(node.get("full-path") or "") for node in _named(container, "rootfile")), "")
    if place not in archive.namelist():
        raise UnreadableError("has no list of its chapters")
    package = ElementTree.fromstring(archive.read(place))
    title = next((node.text or "" for node in _named(package, "title")), "")
    files = {node.get("id"): node.get("href") or "" for node in _named(package, "item")}
    folder = posixpath.dirname(place)
    wanted = [files.get(node.get("idref"), "") for node in _named(package, "itemref")]
    names = [posixpath.normpath(posixpath.join(folder, unquote(href.partition("#")[0]))) for href in wanted if href]
    known = set(archive.namelist())
    if "META-INF/encryption.xml" in known:
        rights = ElementTree.fromstring(archive.read("META-INF/encryption.xml"))
        if {unquote(node.get("URI") or "") for node in _named(rights, "CipherReference")} & set(names):
            raise UnreadableError("is encrypted")
    return " ".join(title.split()), [archive.read(name) if name in known else b"" for name in dict.fromkeys(names)]


def _named(root: ElementTree.Element, name: str) -> Iterator[ElementTree.Element]:
    """Yield the elements of a name, in any namespace."""
    return (node for node in root.iter() if node.tag.rpartition("}")[2] == name)
