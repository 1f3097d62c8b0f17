"""Documents become passages: by tokens with an overlap, or by headings, paragraphs and sentences."""

from __future__ import annotations

import re
from bisect import bisect_left
from typing import TYPE_CHECKING, NamedTuple

from sage.errors import GraphError
from sage.functions import FlatMapFunction
from sage.rag.documents import Document, Passage

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    Span = tuple[int, int]
    Tokens = Callable[[str], Sequence[Span]]

TOKENS_MAX = 200
"""Small models of embeddings read 256 tokens of their own, of which a word has 1.2 in the mean."""

# Languages that write without spaces have a token for each letter, and no token is longer than 20 letters.
UNSPACED = "\u0e00-\u0e7f\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff"
TOKEN = re.compile(rf"[{UNSPACED}]|(?:(?![{UNSPACED}])\w){{1,20}}|[^\w\s]")
HEADING = re.compile(r"(#{1,6})[ \t]+(.+?)[ \t]*#*[ \t]*")
UNDERLINE = re.compile(r"(=+|-{2,})[ \t]*")
FENCE = re.compile(r"[ ]{0,3}(`{3,}|~{3,})")
SENTENCE_END = re.compile(r"""[.!?]+["')\]*_]*\s+|[\u3002\uff01\uff1f]+\s*""")
# What ends with a full stop and does not end a sentence.
SHORT_FORM = re.compile(r"(?:\b(?:Mr|Mrs|Ms|Dr|Prof|St|vs|etc|cf|No|Fig|e\.g|i\.e|approx|[A-Z]))\.\s*$")
SLUG_DROPS = re.compile(r"[^\w\- ]")


def token_spans(text: str) -> list[Span]:
    """Return where the tokens of `text` begin and end: words, signs, and letters of languages without spaces."""
    return [match.span() for match in TOKEN.finditer(text)]


class Block(NamedTuple):
    """A run of lines that belong together: a paragraph, a list, a table or a piece of code."""

    start: int
    end: int
    is_prose: bool


class Section(NamedTuple):
    """What stands under one heading, down to the next one."""

    slug: str
    heading: str
    blocks: list[Block]


class SplitByTokens(FlatMapFunction):
    """Cuts documents into windows of tokens that overlap, whatever they contain.

    Args:
        tokens_max: the size of a window.
        overlap: how many tokens a window shares with the one before it.
        tokens: returns where the tokens of a text begin and end; those of a model count as it does.

    Raises:
        GraphError: the overlap is not smaller than the window.
    """

    def __init__(self, tokens_max: int = TOKENS_MAX, *, overlap: int = 40, tokens: Tokens = token_spans) -> None:
        if not 0 <= overlap < tokens_max:
            raise GraphError(f"SplitByTokens: overlap is {overlap}, not from 0 to below tokens_max={tokens_max}")
        self._tokens_max = tokens_max
        self._overlap = overlap
        self._tokens = tokens

    def execute(self, data: Document) -> Iterator[Passage]:
        """Yield the windows of a document in order; none of a document without a token."""
        spans = self._tokens(data.text)
        step = self._tokens_max - self._overlap
        # A window that began within the overlap of the one before it would hold nothing new.
        for number, first in enumerate(range(0, max(1, len(spans) - self._overlap), step), 1):
            window = spans[first : first + self._tokens_max]
            if window:
                start, end = window[0][0], window[-1][1]
                yield passage_of(data, start, end, number=number)


class SplitByStructure(FlatMapFunction):
    """Cuts documents at their headings, and what is too long under one between paragraphs, then sentences.

    Headings are those of Markdown. A paragraph, a list, a table and a piece of code stay whole where they fit. The id
    of a passage is that of the document with the anchor of its heading, as web pages of Markdown have it, and a number
    from the second on: "guide.md#keys", "guide.md#keys~2".

    Args:
        tokens_max: the size that no passage exceeds.
        tokens: returns where the tokens of a text begin and end; those of a model count as it does.

    Raises:
        GraphError: `tokens_max` is below 1.
    """

    def __init__(self, tokens_max: int = TOKENS_MAX, *, tokens: Tokens = token_spans) -> None:
        if tokens_max < 1:
            raise GraphError(f"SplitByStructure: tokens_max is {tokens_max}, but a passage has at least 1 token")
        self._tokens_max = tokens_max
        self._tokens = tokens

    def execute(self, data: Document) -> Iterator[Passage]:
        """Yield the passages of a document in order; a heading with nothing under it yields none."""
        starts = [start for start, _ in self._tokens(data.text)]
        for section in sections_of(data.text):
            for number, (start, end) in enumerate(self._packed(data.text, section.blocks, starts), 1):
                yield passage_of(data, start, end, section.slug, number, section.heading)

    def _packed(self, text: str, blocks: list[Block], starts: list[int]) -> Iterator[Span]:
        """Yield spans of as many neighbours as fit."""
        begin = end = None
        for block in blocks:
            for start, stop in self._pieces(text, block, starts):
                if begin is not None and end is not None and self._count(starts, begin, stop) > self._tokens_max:
                    yield begin, end
                    begin = None
                begin = start if begin is None else begin
                end = stop
        if begin is not None and end is not None:
            yield begin, end

    def _pieces(self, text: str, block: Block, starts: list[int]) -> Iterator[Span]:
        """Yield a block whole if it fits, or else its sentences or lines, or else windows of tokens."""
        if self._count(starts, block.start, block.end) <= self._tokens_max:
            yield block.start, block.end
            return
        cut = sentences_of if block.is_prose else lines_of
        for start, end in cut(text, block.start, block.end):
            first, last = bisect_left(starts, start), bisect_left(starts, end)
            if last - first <= self._tokens_max:
                yield start, end
                continue
            for at in range(first, last, self._tokens_max):
                following = at + self._tokens_max
                stop = starts[following] if following < last else end
                from_ = start if at == first else starts[at]
                yield from_, from_ + len(text[from_:stop].rstrip())

    @staticmethod
    def _count(starts: list[int], start: int, end: int) -> int:
        return bisect_left(starts, end) - bisect_left(starts, start)


def passage_of(document: Document, start: int, end: int, slug: str = "", number: int = 1, heading: str = "") -> Passage:
    """Return a part of a document with the id that its place gives it."""
    anchor = f"#{slug}" if slug else ""
    count = f"~{number}" if number > 1 else ""
    text = document.text[start:end]
    return Passage(f"{document.id}{anchor}{count}", text, document.id, start, end, heading, document.metadata)


def sections_of(text: str) -> Iterator[Section]:
    """Yield the sections of a Markdown text, the part before the first heading first; those without text too."""
    path: list[tuple[int, str]] = []
    slugs: dict[str, int] = {}
    blocks: list[Block] = []
    slug = ""
    for kind, start, end in _lines_with_kind(text):
        if isinstance(kind, int):
            yield Section(slug, " > ".join(name for _, name in path), blocks)
            blocks = []
            name = text[start:end]
            path = [*((level, above) for level, above in path if level < kind), (kind, name)]
            slug = _slug(name, slugs)
        elif kind != "blank":
            blocks.append(Block(start, end, kind == "prose"))
    yield Section(slug, " > ".join(name for _, name in path), blocks)


def _slug(name: str, used: dict[str, int]) -> str:
    slug = SLUG_DROPS.sub("", name.lower()).strip().replace(" ", "-") or "section"
    name = slug
    while name in used:
        used[slug] += 1
        name = f"{slug}-{used[slug]}"
    used[name] = 0
    return name


def _lines_with_kind(text: str) -> Iterator[tuple[str | int, int, int]]:
    """Yield blocks and headings as kind, start and end; the kind of a heading is its level."""
    fence = ""
    begin: int | None = None
    end = 0
    is_prose = True
    for start, stop in [*lines_of(text, 0, len(text), blank=True), (len(text), len(text))]:
        line = text[start:stop]
        if fence:
            end = stop
            if line.strip().startswith(fence) and not line.strip().strip(fence[0]):
                fence = ""
            continue
        opening, heading = FENCE.match(line), HEADING.fullmatch(line)
        underline = UNDERLINE.fullmatch(line) if begin is not None and "\n" not in text[begin:end] else None
        if underline and is_prose and begin is not None and not _is_row(text[begin:end]):
            yield (1 if line[0] == "=" else 2), begin, end
            begin = None
            continue
        # A fence begins a block of its own, unless it stands right under its paragraph, which introduces it.
        if begin is not None and (heading or not line.strip()):
            yield ("prose" if is_prose else "lines"), begin, end
            begin = None
        if heading:
            yield len(heading[1]), start + heading.start(2), start + heading.end(2)
        elif line.strip():
            if begin is None:
                begin, is_prose = start, not _is_row(line)
            end = stop
            if opening:
                fence, is_prose = opening[1], False
    if begin is not None:
        yield ("prose" if is_prose else "lines"), begin, end


def _is_row(line: str) -> bool:
    return line.lstrip().startswith(("|", "- ", "* ", "+ ")) or line.startswith("    ")


def lines_of(text: str, start: int, end: int, *, blank: bool = False) -> Iterator[Span]:
    """Yield where the lines of a part of `text` begin and end, without their ends; blank ones only if asked."""
    while start < end:
        stop = text.find("\n", start, end)
        stop = end if stop < 0 else stop
        if blank or text[start:stop].strip():
            yield start, stop
        start = stop + 1


def sentences_of(text: str, start: int, end: int) -> Iterator[Span]:
    """Yield where the sentences of a part of `text` begin and end."""
    begin = start
    for match in SENTENCE_END.finditer(text, start, end):
        if SHORT_FORM.search(text[max(begin, match.start() - 8) : match.end()]) and match.end() < end:
            continue
        yield begin, begin + len(text[begin : match.end()].rstrip())
        begin = match.end()
    if text[begin:end].strip():
        yield begin, begin + len(text[begin:end].rstrip())
