"""Where the blocks of a text are: those of Markdown by the rules of CommonMark, those of plain text by empty lines."""

from __future__ import annotations

import re
from functools import cache
from typing import TYPE_CHECKING, Any

from sage._extras import load
from sage.rag.documents import Block

if TYPE_CHECKING:
    from collections.abc import Iterator

    Span = tuple[int, int]

ITEM = re.compile(r"[ \t]*+(?:[-*+\u2022\u25e6\u2023\u2043][ \t]|(?:\d{1,9}|[A-Za-z]|[ivxlc]{1,6})[.)][ \t]|\|)")
"""The beginning of a line that is an item of a list or a row of a table."""

LINE_END = re.compile("\r\n?|\n")


def with_line_feeds(text: str) -> str:
    """Return a text with the line ends of Unix: files of other systems end their lines with a carriage return."""
    return LINE_END.sub("\n", text) if "\r" in text else text


def markdown_blocks(text: str) -> tuple[Block, ...]:
    """Return the headings and blocks of a Markdown text. A heading in a list or a quotation is part of that."""
    starts = [0, *(match.end() for match in LINE_END.finditer(text)), len(text)]
    blocks: list[Block] = []
    covered = 0
    tokens = _parser().parse(text)
    for number, token in enumerate(tokens):
        if token.level or token.map is None or token.map[0] < covered:
            continue
        first, covered = token.map
        start, end = trimmed(text, starts[first], starts[covered])
        if token.type == "heading_open":
            content = tokens[number + 1].content
            if token.markup[0] == "#":
                start = text.find(content, start + len(token.markup), end)
                end = start + len(content)
            else:
                start, end = trimmed(text, starts[first], starts[covered - 1])
            if content:
                blocks.append(Block(start, end, int(token.tag[1])))
            continue
        is_prose = token.type == "paragraph_open"
        # A list or a piece of code right under its paragraph is introduced by it.
        if blocks and not blocks[-1].level and not _has_empty_line(text, blocks[-1].end, start):
            before = blocks.pop()
            start, is_prose = before.start, is_prose and before.is_prose
        blocks.append(Block(start, end, 0, is_prose))
    return tuple(blocks)


def plain_blocks(text: str) -> tuple[Block, ...]:
    """Return the paragraphs of a plain text; one that has a line of a list or a table is cut between lines."""
    blocks: list[Block] = []
    begin, end, is_prose = None, 0, True
    for start, stop in lines_of(text, 0, len(text), blank=True):
        if text[start:stop].isspace() or start == stop:
            if begin is not None:
                blocks.append(Block(begin, end, 0, is_prose))
            begin, is_prose = None, True
            continue
        begin, end = start if begin is None else begin, stop
        is_prose = is_prose and ITEM.match(text, start, stop) is None
    if begin is not None:
        blocks.append(Block(begin, end, 0, is_prose))
    return tuple(blocks)


def title_of(text: str, blocks: tuple[Block, ...]) -> str:
    """Return the text of a heading that a document begins with, or nothing."""
    return " ".join(text[blocks[0].start : blocks[0].end].split()) if blocks and blocks[0].level else ""


def lines_of(text: str, start: int, end: int, *, blank: bool = False) -> Iterator[Span]:
    """Yield where the lines of a part of `text` begin and end, without their ends; blank ones only if asked."""
    while start < end:
        stop = text.find("\n", start, end)
        stop = end if stop < 0 else stop
        if blank or not (start == stop or text[start:stop].isspace()):
            yield start, stop
        start = stop + 1


def entries_of(text: str, start: int, end: int) -> Iterator[Span]:
    """Yield the items of a list or the rows of a table with the lines that go on with them, or else each line."""
    lines = list(lines_of(text, start, end))
    firsts = [place for place, (begin, stop) in enumerate(lines) if ITEM.match(text, begin, stop)]
    if not firsts:
        yield from lines
        return
    bounds = sorted({0, *firsts})
    for first, after in zip(bounds, [*bounds[1:], len(lines)], strict=True):
        yield lines[first][0], lines[after - 1][1]


def trimmed(text: str, start: int, end: int) -> Span:
    """Return a part of a text without the space around it, but with that before its first line."""
    part = text[start:end]
    stripped = part.rstrip()
    before = len(stripped) - len(stripped.lstrip())
    return start + stripped.rfind("\n", 0, before) + 1, start + len(stripped)


def _has_empty_line(text: str, start: int, end: int) -> bool:
    return len(LINE_END.findall(text, start, end)) > 1


@cache
def _parser() -> Any:
    """Return a parser of blocks: the text in them stays as it was written, and nothing is taken for a definition."""
    parser = load("markdown_it", "rag").MarkdownIt("commonmark").enable("table")
    return parser.disable(["inline", "reference"])
