"""Documents become passages: by tokens with an overlap, or by headings, paragraphs and sentences."""

from __future__ import annotations

import re
import unicodedata
from bisect import bisect_left
from functools import cache
from itertools import groupby
from typing import TYPE_CHECKING, NamedTuple

from sage.errors import GraphError
from sage.functions import FlatMapFunction
from sage.rag.documents import Document, Passage
from sage.rag.structure import entries_of, lines_of, markdown_blocks, plain_blocks

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from sage.rag.documents import Block

    Span = tuple[int, int]
    SpansOf = Callable[[str], Sequence[Span]]
    Cut = Callable[[str, int, int], Iterator[Span]]

LETTERS_MAX = 20
"""No token of a language with spaces is longer; most have four letters."""

TOKENS_MAX = 200
"""Small models of embeddings read 256 tokens of their own, of which a word has 1.2 in the mean."""

# Languages that write without spaces have a token for each letter, and no token is longer than 20 letters.
UNSPACED = (
    "\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0003ffff"
)
SPACED_TOKEN = re.compile(r"\w{1,20}|[^\w\s]")
UNSPACED_LETTER = re.compile(f"[{UNSPACED}]")
TOKEN = re.compile(rf"[{UNSPACED}]|[^\W{UNSPACED}]{{1,20}}|[^\w\s]")
# The vowels of Thai and Lao that are letters, and still stand behind another one; joiners and colours of signs.
MORE_MARKS = "\u0e30\u0e32\u0e33\u0e45\u0eb0\u0eb2\u0eb3\u200c\u200d\U0001f3fb-\U0001f3ff"
MARKED_PLANES = [(0x300, 0x20000), (0xE0100, 0xE01F0)]
SENTENCE_END = re.compile(
    r"""(?<![.!?\u2026\u061f\u06d4\u0964\u0965])[.!?\u2026\u061f\u06d4\u0964\u0965]++["'\u2019\u201d\u00bb)\]*_]*+\s+"""
    r"""|[\u3002\uff01\uff1f]++["'\u2019\u201d\u300d\u300f)\uff09]*+\s*"""
)
# A full stop ends no sentence behind a short form, and behind the number of an item.
SHORT_FORM = re.compile(
    r"(?:\b(?:Mr|Mrs|Ms|Dr|Prof|St|vs|etc|cf|No|Fig|e\.g|i\.e|approx|[A-Z])"
    r"|(?:^|\n)[ \t]*+(?:\d{1,9}|[a-z]|[ivxlc]{1,6}))\.\Z"
)
SLUG_DROPS = re.compile(r"[^\w\- ]")


def token_spans(text: str) -> list[Span]:
    """Return where the tokens of `text` begin and end: words, signs, and letters of languages without spaces.

    Marks belong to the letter or sign before them, so that no token begins with the vowel sign of a letter.
    """
    return [match.span() for match in pattern_of(text).finditer(text)]


def pattern_of(text: str) -> re.Pattern[str]:
    """Return the pattern that finds the tokens of a text; the simplest one that does, as it is the fastest."""
    if text.isascii():
        return SPACED_TOKEN
    mark, marked_token = _mark_patterns()
    if mark.search(text):
        return marked_token
    return TOKEN if UNSPACED_LETTER.search(text) else SPACED_TOKEN


@cache
def _mark_patterns() -> tuple[re.Pattern[str], re.Pattern[str]]:
    """Return the patterns of a mark and of a token with its marks: signs above, below or behind a letter."""
    points = [point for first, end in MARKED_PLANES for point in range(first, end)]
    marks = [point for point in points if unicodedata.category(chr(point)) in ("Mn", "Mc", "Me")]
    runs = groupby(enumerate(marks), key=lambda pair: pair[1] - pair[0])
    bounds = [(run[0][1], run[-1][1]) for run in (list(group) for _, group in runs)]
    mark = "".join(f"{chr(first)}-{chr(last)}" for first, last in bounds) + MORE_MARKS
    sign = rf"[^\w\s](?:[{mark}]|(?<=\u200d)[^\w\s])*+"
    token = rf"[{UNSPACED}][{mark}]*+|(?:[^\W{UNSPACED}{mark}][{mark}]*+){{1,20}}|{sign}|[{mark}]++"
    return re.compile(f"[{mark}]"), re.compile(token)


class Tokens:
    """Counts the tokens of parts of one text."""

    def __init__(self, text: str, spans_of: SpansOf) -> None:
        self._text = text
        # The project's own tokens are found part by part, which takes a third of the time.
        self._pattern = pattern_of(text) if spans_of is token_spans else None
        self._spans: Sequence[Span] = [] if self._pattern is not None else spans_of(text)
        self._starts = [start for start, _ in self._spans]

    def count(self, start: int, end: int) -> int:
        """Return how many tokens begin in a part."""
        if self._pattern is not None:
            return len(self._pattern.findall(self._text, start, end))
        return bisect_left(self._starts, end) - bisect_left(self._starts, start)

    def starts(self, start: int, end: int) -> list[int]:
        """Return where the tokens of a part begin."""
        if self._pattern is not None:
            return [match.start() for match in self._pattern.finditer(self._text, start, end)]
        return self._starts[bisect_left(self._starts, start) : bisect_left(self._starts, end)]


class Section(NamedTuple):
    """One heading and the blocks under it, down to the next one."""

    slug: str
    heading: str
    blocks: list[Block]


class SplitByTokens(FlatMapFunction):
    """Cuts documents into windows of tokens that overlap, regardless of their content.

    Args:
        tokens_max: the size of a window.
        overlap: how many tokens a window shares with the one before it.
        tokens: returns where the tokens of a text begin and end; those of a model count as it does.

    Raises:
        GraphError: the overlap is not smaller than the window.
    """

    def __init__(self, tokens_max: int = TOKENS_MAX, *, overlap: int = 40, tokens: SpansOf = token_spans) -> None:
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
    """Cuts documents at their headings, and long sections between paragraphs, then sentences.

    Headings are those of the document's format; in Markdown, those of CommonMark. A paragraph, a list, a table and a
    piece of code stay whole where they fit. The id of a passage is that of the document with the anchor of its heading,
    as web pages of Markdown have it, and a number from the second on: "guide.md#keys", "guide.md#keys~2".

    Args:
        tokens_max: the size that no passage exceeds.
        tokens: returns where the tokens of a text begin and end; those of a model count as it does.

    Raises:
        GraphError: `tokens_max` is below 1.
    """

    def __init__(self, tokens_max: int = TOKENS_MAX, *, tokens: SpansOf = token_spans) -> None:
        if tokens_max < 1:
            raise GraphError(f"SplitByStructure: tokens_max is {tokens_max}, but a passage has at least 1 token")
        self._tokens_max = tokens_max
        self._tokens = tokens

    def execute(self, data: Document) -> Iterator[Passage]:
        """Yield the passages of a document in order; a heading with nothing under it is a passage itself."""
        tokens = Tokens(data.text, self._tokens)
        for section in sections_of(data.text, blocks_of(data)):
            for number, (start, end) in enumerate(self._packed(data.text, section.blocks, tokens), 1):
                yield passage_of(data, start, end, section.slug, number, section.heading)

    def _packed(self, text: str, blocks: list[Block], tokens: Tokens) -> Iterator[Span]:
        """Yield spans of as many neighbours as fit."""
        begin, end, held = 0, 0, 0
        for block in blocks:
            cuts = (sentences_of, lines_of) if block.is_prose else (entries_of, sentences_of, lines_of)
            for start, stop, count in self._pieces(text, block.start, block.end, cuts, tokens):
                if held and held + count > self._tokens_max:
                    yield begin, end
                    held = 0
                begin, end, held = begin if held else start, stop, held + count
        if held:
            yield begin, end

    def _pieces(
        self, text: str, start: int, end: int, cuts: tuple[Cut, ...], tokens: Tokens
    ) -> Iterator[tuple[int, int, int]]:
        """Yield a part whole with the number of its tokens if it fits, or else the pieces that the first cut makes."""
        # A part that is far too long need not be counted to its end.
        enough = start + LETTERS_MAX * (self._tokens_max + 1)
        count = tokens.count(start, min(end, enough))
        if count <= self._tokens_max and enough < end:
            count = tokens.count(start, end)
        if count <= self._tokens_max:
            if count:
                yield start, end, count
        elif cuts:
            for begin, stop in cuts[0](text, start, end):
                yield from self._pieces(text, begin, stop, cuts[1:], tokens)
        else:
            starts = [*tokens.starts(start, end), end]
            for at in range(0, len(starts) - 1, self._tokens_max):
                after = min(at + self._tokens_max, len(starts) - 1)
                begin = start if at == 0 else starts[at]
                yield begin, begin + len(text[begin : starts[after]].rstrip()), after - at


def passage_of(document: Document, start: int, end: int, slug: str = "", number: int = 1, heading: str = "") -> Passage:
    """Return a part of a document with the id that its place gives it."""
    id_ = document.id + (f"#{slug}" if slug else "") + (f"~{number}" if number > 1 else "")
    text = document.text[start:end]
    return Passage(id_, text, document.id, start, end, heading, document.metadata, document.origin)


def blocks_of(document: Document) -> Sequence[Block]:
    """Return the headings and blocks of a document: those of its outline, or by its format where the text is new."""
    outline = document.outline
    if outline is not None and outline.text == document.text:
        return outline.blocks
    format_ = (document.origin or document.metadata).get("format", "markdown")
    return markdown_blocks(document.text) if format_ in ("markdown", "html") else plain_blocks(document.text)


def sections_of(text: str, blocks: Sequence[Block]) -> Iterator[Section]:
    """Yield the sections of a text, the part before the first heading first.

    A heading with no block and no deeper heading under it is the block of its own section, under the ones above it.
    """
    path: list[Block] = []
    slugs: dict[str, int] = {}
    found: list[Block] = []
    slug = ""
    for block in [*blocks, None]:
        if block is not None and not block.level:
            found.append(block)
            continue
        if not found and path and (block is None or block.level <= path[-1].level):
            found = [path.pop()._replace(level=0)]
        if found:
            yield Section(slug, " > ".join(_name(text, above) for above in path), found)
        if block is not None:
            path = [*(above for above in path if above.level < block.level), block]
            slug = _slug(_name(text, block), slugs)
            found = []


def _name(text: str, heading: Block) -> str:
    return " ".join(text[heading.start : heading.end].split())


def _slug(name: str, used: dict[str, int]) -> str:
    slug = SLUG_DROPS.sub("", name.lower()).strip().replace(" ", "-") or "section"
    name = slug
    while name in used:
        used[slug] += 1
        name = f"{slug}-{used[slug]}"
    used[name] = 0
    return name


def sentences_of(text: str, start: int, end: int) -> Iterator[Span]:
    """Yield where the sentences of a part of `text` begin and end."""
    begin = start
    for match in SENTENCE_END.finditer(text, start, end):
        if match.end() < end and SHORT_FORM.search(text[max(begin, match.start() - 12) : match.start() + 1]):
            continue
        yield begin, begin + len(text[begin : match.end()].rstrip())
        begin = match.end()
    if begin < end and not text[begin:end].isspace():
        yield begin, begin + len(text[begin:end].rstrip())
