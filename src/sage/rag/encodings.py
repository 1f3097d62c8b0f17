"""Bytes become text: as a file declares, by the mark at its beginning, or by the letters that make sense."""

from __future__ import annotations

import codecs
import re
from typing import TYPE_CHECKING

from sage._extras import load
from sage.errors import hint
from sage.rag.documents import DocumentError

if TYPE_CHECKING:
    from typing import NoReturn

BYTE_ORDER_MARKS = [
    (codecs.BOM_UTF32_LE, "utf-32"),
    (codecs.BOM_UTF32_BE, "utf-32"),
    (codecs.BOM_UTF8, "utf-8-sig"),
    (codecs.BOM_UTF16_LE, "utf-16"),
    (codecs.BOM_UTF16_BE, "utf-16"),
]
DECLARED_BYTES = 1024
"""How far browsers look for the declaration of a page's encoding."""

COMMENT = re.compile(rb"<!--.*?(?:-->|\Z)", re.DOTALL)
DECLARED = re.compile(
    rb"""<meta[\s/][^>]*?charset\s*=\s*["']?\s*([^\s"'/>;]+)|^\s*<\?xml[^>]*?encoding\s*=\s*["']([^"'>]+)""",
    re.IGNORECASE,
)
# Browsers read these as the larger sets of characters that programs write under their names.
WIDER = {
    "gbk": "gb18030",
    "shift_jis": "cp932",
    "euc-kr": "cp949",
    "big5": "big5hkscs",
    "utf-16le": "utf-8",
    "utf-16be": "utf-8",
    "x-user-defined": "cp1252",
    "macintosh": "mac_roman",
    "x-mac-cyrillic": "mac_cyrillic",
    "iso-8859-8-i": "iso8859_8",
    "windows-874": "cp874",
}
SAMPLE_BYTES = 16 * 1024
CONFIDENCE_MIN = 0.05


def text_of(file: str, content: bytes, encoding: str | None, line: int | None = None) -> tuple[str, str]:
    """Return content as text, and its encoding."""
    known = encoding or marked(content) or "utf-8"
    # A byte order mark is not part of the text.
    known = "utf-8-sig" if known.lower() in ("utf-8", "utf8") else known
    try:
        return content.decode(known), known.removesuffix("-sig")
    except LookupError as error:
        raise DocumentError(file, f'the encoding "{known}" is not known') from error
    except UnicodeDecodeError as error:
        if encoding is not None or marked(content):
            _refuse(file, content, known.removesuffix("-sig"), error, line)
        first = error
    found = detected(content, first.start)
    try:
        return content.decode(found), found
    except (UnicodeDecodeError, LookupError):
        _refuse(file, content, "utf-8", first, line)


def page_text(content: bytes, encoding: str | None) -> tuple[str, str, int]:
    """Return a page of HTML as text, its encoding, and how many bytes were not characters, as browsers find them.

    A mark at the beginning counts most, then the declaration in the page, then `encoding`. As in browsers, bytes that
    are not characters become U+FFFD.
    """
    name = marked(content) or declared(content) or encoding
    if name is None:
        try:
            return content.decode("utf-8"), "utf-8", 0
        except UnicodeDecodeError as error:
            name = detected(content, error.start)
    try:
        return content.decode(name), name.removesuffix("-sig"), 0
    except UnicodeDecodeError:
        text = content.decode(name, "replace")
        return text, name.removesuffix("-sig"), text.count("\ufffd")


def marked(content: bytes) -> str | None:
    """Return the encoding that the first bytes say: a mark of the byte order, or the zeros of wide characters."""
    for mark, name in BYTE_ORDER_MARKS:
        if content.startswith(mark):
            return name
    first = content[:4]
    if len(first) >= 2 and len(content) % 2 == 0 and first.count(0) * 2 == len(first) and first[0] != first[1]:
        return "utf-16-be" if first[0] == 0 else "utf-16-le"
    return None


def declared(content: bytes) -> str | None:
    """Return the encoding that a page of HTML declares, by the standard of browsers, or None."""
    found = DECLARED.search(COMMENT.sub(b"", content[:DECLARED_BYTES]))
    if found is None:
        return None
    label = (found[1] or found[2]).decode("ascii", "replace")
    encoding = load("webencodings", "html").lookup(label)
    return None if encoding is None else WIDER.get(encoding.name, encoding.name)


def detected(content: bytes, at: int) -> str:
    """Return the encoding in which bytes are most likely to be a text; `at` is where they are not UTF-8.

    A few letters tell little: then it is the one that browsers take for pages that declare none.
    """
    start = content.rfind(b"\n", 0, max(0, at - 1024)) + 1
    start = start if at - start < SAMPLE_BYTES // 2 else at
    chardet = load("chardet", "html")
    found = chardet.detect(content[start : start + SAMPLE_BYTES], encoding_era=chardet.EncodingEra.MODERN_WEB)
    return (
        str(found["encoding"]).lower() if found["encoding"] and found["confidence"] > CONFIDENCE_MIN else "windows-1252"
    )


def _refuse(file: str, content: bytes, encoding: str, error: UnicodeDecodeError, line: int | None) -> NoReturn:
    number = line or content.count(b"\n", 0, error.start) + 1
    refused = DocumentError(file, f"is not {encoding}: byte 0x{content[error.start]:02x}", number)
    raise hint(refused, "Save it as UTF-8, or give its encoding: Load(encoding=...).") from error
