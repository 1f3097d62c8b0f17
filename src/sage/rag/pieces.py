"""Small pieces of passages: the vector of a few sentences matches a question better than that of a whole passage.

An index keeps a vector for each passage and for each of its pieces. The pieces find the passage, and a model gets the
passage, or the part of it around those pieces ("small to big" retrieval).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

from sage.rag.documents import Document, Passage
from sage.rag.splitters import SplitByStructure, token_spans
from sage.services.models.embeddings import PIECE_TOKENS

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from sage.rag.splitters import Span
    from sage.services.vectors.contract import Hit

PASSAGE, START, END = "sage:passage", "sage:piece_start", "sage:piece_end"
"""The metadata of a piece in an index: the id of its passage, and where it stands there, in characters."""


class Owner(NamedTuple):
    """A passage that was found by its own vector or by those of its pieces."""

    id: str
    spans: list[Span]


def pieces_of(passage: Passage, tokens_max: int) -> list[Span]:
    """Return where the pieces of a passage stand in its text; none if it is not larger than one piece."""
    spans = spans_of(passage.text, tokens_max)
    return spans if len(spans) > 1 else []


def spans_of(text: str, tokens_max: int) -> list[Span]:
    """Return where a text is cut into parts of at most `tokens_max` tokens: between paragraphs, then sentences."""
    return [(part.start, part.end) for part in SplitByStructure(tokens_max).execute(Document("", text))]


def owners_of(hits: Iterable[Hit]) -> list[Owner]:
    """Return the passages of hits, which are passages or pieces, each once and in the order of its best hit."""
    owners: dict[str, Owner] = {}
    for hit in hits:
        id_ = str(hit.metadata.get(PASSAGE, hit.id))
        owner = owners.setdefault(id_, Owner(id_, []))
        start, end = hit.metadata.get(START), hit.metadata.get(END)
        if isinstance(start, int | float) and isinstance(end, int | float):
            owner.spans.append((int(start), int(end)))
    return list(owners.values())


def excerpt(text: str, found: Sequence[Span], *, best: int) -> str:
    """Return the part of a passage around the best of its pieces that were found: these and their neighbours."""
    spans = spans_of(text, PIECE_TOKENS)
    kept = {
        place
        for start, end in found[:best]
        for number, (begin, stop) in enumerate(spans)
        if begin < end and start < stop
        for place in (number - 1, number, number + 1)
    }
    if not kept:
        return text
    parts: list[str] = []
    last = None
    for number, (start, end) in enumerate(spans):
        if number in kept:
            parts.append(text[start:end] if last == number - 1 or last is None else f"[...] {text[start:end]}")
            last = number
    return "\n".join(parts)


def tokens_in(text: str) -> int:
    """Return how many tokens a text has, as splitters count them."""
    return len(token_spans(text))
