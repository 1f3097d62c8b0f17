"""HTML becomes text: headings as Markdown has them, one paragraph for each block, code in fences."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any

from sage.rag.documents import DocumentError
from sage.services.extras import load

if TYPE_CHECKING:
    from collections.abc import Callable

UNSEEN = frozenset(
    ["script", "style", "template", "noscript", "head", "svg", "iframe", "object", "nav"],
)
HEADINGS = frozenset(["h1", "h2", "h3", "h4", "h5", "h6"])
BLOCKS = [
    *("address", "article", "aside", "blockquote", "caption", "dd", "details", "div", "dl", "dt", "fieldset"),
    *("figcaption", "figure", "footer", "form", "header", "hr", "legend", "main", "ol", "p", "section", "select"),
    *("summary", "table", "tbody", "textarea", "thead", "tr", "ul"),
]
# Marks that no text has: between blocks, between lines, before cells, and around the number of a piece of code.
BLOCK, LINE, CODE, CELL = "\x02", "\x03", "\x04", "\x05"
MARKS = re.compile("[\x00-\x08]")
# What stands before and after what is in a tag. Where the end of a tag may be left out, nothing stands there.
MARKS_OF = {
    **dict.fromkeys(BLOCKS, (BLOCK, BLOCK)),
    "br": (LINE, ""),
    "li": (f"{LINE}- ", ""),
    "option": (LINE, ""),
    "td": (CELL, ""),
    "th": (CELL, ""),
}


def html_text(file: str, content: bytes, decode: Callable[[str | None], str]) -> tuple[str, str]:
    """Return the title and the text of a page.

    Args:
        file: names the page in errors.
        content: the page as it was stored.
        decode: returns it as text, by the encoding that it declares, or None.

    Raises:
        DocumentError: the page cannot be parsed.
        ServiceError: beautifulsoup4 is not installed.
    """
    bs4 = load("bs4", "html")
    dammit = load("bs4.dammit", "html")
    declared = dammit.EncodingDetector.find_declared_encoding(content, is_html=True)
    text = MARKS.sub(" ", decode(declared))
    try:
        page = bs4.BeautifulSoup(text, "html.parser")
        title = " ".join(page.title.get_text().split()) if page.title else ""
        return title, _text(page, (str, bs4.NavigableString, bs4.CData))
    except RecursionError as error:
        raise DocumentError(file, "its tags are nested too deeply") from error


def _text(page: Any, texts: tuple[type, ...]) -> str:
    """Return the text of a parsed page; `texts` are the types of what a reader sees.

    It takes one step for each tag and changes nothing, as tags may be nested as deeply as a broken program wrote them.
    """
    code: list[str] = []
    parts: list[str] = []
    waiting = [page]
    while waiting:
        node = waiting.pop()
        if isinstance(node, str):
            if type(node) in texts:
                parts.append(node)
        elif node.name == "pre":
            code.append(node.get_text().strip("\n"))
            parts.append(f"{BLOCK}{CODE}{len(code) - 1}{CODE}{BLOCK}")
        elif node.name in HEADINGS:
            words = " ".join(node.get_text(" " if node.br else "").split())
            parts.append(f"{BLOCK}{'#' * int(node.name[1])} {words}{BLOCK}" if words else BLOCK)
        elif node.name not in UNSEEN:
            before, after = MARKS_OF.get(node.name, ("", ""))
            parts.append(before)
            waiting += [after, *reversed(node.contents)]
    blocks = []
    for block in "".join(parts).split(BLOCK):
        lines = (_line(line.split(CELL)) for line in block.split(LINE))
        blocks.append("\n".join(line for line in lines if line and line != "-"))
    text = "\n\n".join(block for block in blocks if block)
    return re.sub(f"{CODE}(\\d+){CODE}", lambda found: f"```\n{code[int(found[1])]}\n```", text)


def _line(cells: list[str]) -> str:
    """Return a line of text, or a row of a table; nothing stands before its first cell."""
    words = [" ".join(cell.split()) for cell in cells]
    return " | ".join(words if words[0] else words[1:]).strip() if any(words) else ""
