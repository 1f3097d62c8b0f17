"""HTML becomes text: headings as Markdown has them, one paragraph for each block, code in fences."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

from sage._extras import load
from sage.rag.documents import Block, DocumentError, Outline

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping, Sequence

DEPTH_MAX = 2000
"""How deep tags may be nested: the time for an end tag that closes nothing grows with the depth."""

UNSEEN = frozenset(["iframe", "math", "nav", "noscript", "object", "script", "style", "svg", "template", "title"])
HEADINGS = frozenset(["h1", "h2", "h3", "h4", "h5", "h6"])
BLOCKS = [
    *("address", "article", "aside", "blockquote", "caption", "center", "dd", "details", "dir", "div", "dl", "dt"),
    *("fieldset", "figcaption", "figure", "footer", "form", "header", "hgroup", "hr", "legend", "main", "menu", "ol"),
    *("p", "search", "section", "select", "summary", "textarea", "ul"),
]
# Marks that no text has: between blocks, lines, rows and cells, before headings, and before the number of a piece of
# code.
BLOCK, LINE, CODE, CELL, ROW, HEADING = "\x02", "\x03", "\x04", "\x05", "\x06", "\x07"
MARKS = re.compile("[\x00-\x08]")
# The marks before and after an element.
MARKS_OF = {
    **dict.fromkeys(BLOCKS, (BLOCK, BLOCK)),
    **dict.fromkeys(["table", "tbody", "tfoot", "thead", "tr"], (ROW, ROW)),
    **{name: (f"{BLOCK}{HEADING}{name[1]}", BLOCK) for name in HEADINGS},
    "br": (LINE, ""),
    "li": (LINE, ""),
    "option": (LINE, ""),
    "td": (CELL, ""),
    "th": (CELL, ""),
}
ROW_LETTERS_MAX = 1000
"""A longer row, or one with headings or code, lays out a page; its cells are read one after the other."""


class Reader:
    """Collects the text of a page from the events of a parser; no tree is built, so that depth costs nothing."""

    def __init__(self, unseen: frozenset[str]) -> None:
        self.parts: list[str] = []
        self.code: list[str] = []
        self.title = ""
        self.is_too_deep = False
        self._unseen = unseen
        self._hidden: list[str] = []
        self._depth = 0
        self._items: list[int] = []
        self._code_at: int | None = None

    def start(self, tag: str, attributes: Mapping[str, str]) -> None:
        """Take the beginning of an element."""
        self._depth += 1
        if self._depth > DEPTH_MAX:
            self.is_too_deep = True
            raise RecursionError
        tag = tag.rpartition(":")[2]
        if self._hidden or tag in self._unseen:
            self._hidden.append(tag)
        elif tag == "br" and self._code_at is not None:
            self.parts.append("\n")
        elif tag == "pre" and self._code_at is None:
            self._code_at = len(self.parts)
        elif tag in ("ol", "ul", "menu"):
            self._items.append(_number(attributes.get("start")) if tag == "ol" else -1)
            self.parts.append(BLOCK)
        elif tag == "li":
            self.parts.append(f"{LINE}{self._marker()} ")
        elif tag in MARKS_OF:
            self.parts.append(MARKS_OF[tag][0])

    def end(self, tag: str) -> None:
        """Take the end of an element; the parser gives one for each that it has begun."""
        self._depth -= 1
        tag = tag.rpartition(":")[2]
        if self._hidden:
            self._hidden.pop()
        elif tag == "pre" and self._code_at is not None:
            self.code.append(MARKS.sub("", "".join(self.parts[self._code_at :])).strip("\n"))
            self.parts[self._code_at :] = [f"{BLOCK}{CODE}{len(self.code) - 1}{BLOCK}"]
            self._code_at = None
        elif tag in MARKS_OF:
            self.parts.append(MARKS_OF[tag][1])
            if tag in ("ol", "ul", "menu") and self._items:
                self._items.pop()

    def data(self, text: str) -> None:
        """Take text."""
        if not self._hidden:
            self.parts.append(MARKS.sub(" ", text))
        elif self._hidden == ["title"]:
            self.title += text

    def comment(self, text: str) -> None:
        """Take a comment, which nobody sees."""

    def close(self) -> Reader:
        """Return itself: the parser hands it on."""
        return self

    def _marker(self) -> str:
        if not self._items or self._items[-1] < 0:
            return "-"
        self._items[-1] += 1
        return f"{self._items[-1] - 1}."


def html_text(file: str, page: str) -> tuple[str, Outline]:
    """Return the title of a page, and its text with its headings and blocks."""
    etree = load("lxml.etree", "html")
    # Browsers show the content of an element that is never closed.
    tags = page.lower()
    closed = (tag for tag in UNSEEN if tags.count(f"<{tag}") <= tags.count(f"</{tag}"))
    reader = Reader(frozenset(["script", "style", "title", *closed]))
    parser = etree.HTMLParser(target=reader, huge_tree=True, encoding="utf-8")
    try:
        parser.feed(page.encode("utf-8", "replace"))
        parser.close()
    except (RecursionError, etree.XMLSyntaxError) as error:
        # The parser says so of a page without anything in it, too.
        if reader.is_too_deep:
            raise DocumentError(file, "its tags are nested too deeply") from error
    return " ".join(reader.title.split()), assembled(_blocks("".join(reader.parts), reader.code))


def assembled(blocks: Iterable[tuple[int, bool, str]]) -> Outline:
    """Return blocks, given as level, whether it is prose, and text, as one text with their places."""
    text: list[str] = []
    placed: list[Block] = []
    at = 0
    for level, is_prose, body in blocks:
        before = f"{'#' * level} " if level else ""
        placed.append(Block(at + len(before), at + len(before) + len(body), level, is_prose))
        text.append(before + body)
        at += len(before) + len(body) + 2
    return Outline("\n\n".join(text), tuple(placed))


def _blocks(text: str, code: Sequence[str]) -> Iterator[tuple[int, bool, str]]:
    for row in text.split(ROW):
        line = _row(row) if CELL in row else None
        parts = row.replace(CELL, BLOCK).split(BLOCK) if line is None else [line]
        for part in parts:
            if part.startswith(CODE):
                body = code[int(part[1:])]
                # A fence that the code has itself would end it.
                fence = "`" * max([3, *(len(run) + 1 for run in re.findall("`{3,}", body))])
                if body.strip():
                    yield 0, False, f"{fence}\n{body}\n{fence}"
            elif part.startswith(HEADING):
                if words := " ".join(part[2:].replace(LINE, " ").split()):
                    yield int(part[1]), True, words
            else:
                lines = [" ".join(line.split()) for line in part.split(LINE)]
                lines = [line for line in lines if line and line != "-"]
                if lines:
                    yield 0, not (CELL in row or lines[0].startswith("- ") or len(lines) > 1), "\n".join(lines)


def _row(row: str) -> str | None:
    """Return a row of a table as one line; None for one that lays out a page."""
    if HEADING in row or CODE in row or len(row) > ROW_LETTERS_MAX:
        return None
    cells = [" ".join(cell.replace(BLOCK, " ").replace(LINE, " ").split()) for cell in row.split(CELL)]
    return " | ".join(cells if cells[0] else cells[1:]).strip() if any(cells) else ""


def _number(start: str | None) -> int:
    return int(start) if start and start.isascii() and start.isdigit() and len(start) < 10 else 1
