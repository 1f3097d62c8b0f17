"""Citations: which passages an answer names, and whether these support it."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING

from sage.errors import SageError, hint, short
from sage.rag.splitters import sentences_of
from sage.services.models.embeddings import FREQUENT_WORDS, words_of

if TYPE_CHECKING:
    from collections.abc import Sequence

    from sage.rag.documents import Passage

MARK = re.compile(r"\[(\d{1,4}(?:\s*,\s*\d{1,4})*)\]")
# A mark behind the full stop belongs to the sentence before it.
LATE_MARKS = re.compile(r"([.!?\u3002\uff01\uff1f]+[\"')]*)((?:\s*\[\d{1,4}(?:\s*,\s*\d{1,4})*\])+)")


class CitationError(SageError):
    """An answer names no passage, one that it was not given, or one that says something else."""


@dataclass(frozen=True, slots=True)
class Citation:
    """A passage that a sentence of an answer names."""

    number: int
    passage: str | None
    sentence: str
    overlap: float


def citations_of(answer: str, passages: Sequence[Passage]) -> tuple[Citation, ...]:
    """Return the citations of an answer, in their order."""
    text = LATE_MARKS.sub(r"\2\1", answer)
    citations = []
    for start, end in sentences_of(text, 0, len(text)):
        marked = text[start:end]
        sentence = " ".join(MARK.sub("", marked).split())
        numbers = [int(number) for mark in MARK.findall(marked) for number in mark.split(",")]
        for number in dict.fromkeys(numbers):
            known = passages[number - 1] if 1 <= number <= len(passages) else None
            overlap = 0.0 if known is None else overlap_of(sentence, known.searchable)
            citations.append(Citation(number, known.id if known else None, sentence, overlap))
    return tuple(citations)


def overlap_of(sentence: str, source: str) -> float:
    """Return which part of the telling words of a sentence a source has, from 0 to 1; 1 for a sentence without any."""
    words = {word for word in words_of(sentence) if word not in FREQUENT_WORDS}
    return len(words & set(words_of(source))) / len(words) if words else 1.0


def check_citations(
    answer: str, citations: Sequence[Citation], *, overlap_min: float = 0.0, may_lack: bool = False
) -> None:
    """Refuse an answer whose citations cannot be right."""
    if not citations and not may_lack:
        raise hint(CitationError(f"the answer {short(answer)} names no passage"), "The prompt has to ask for it.")
    best: dict[str, float] = {}
    for citation in citations:
        if citation.passage is None:
            raise CitationError(f"the answer names passage [{citation.number}], which it was not given")
        best[citation.sentence] = max(best.get(citation.sentence, 0.0), citation.overlap)
    for sentence, overlap in best.items():
        if overlap < overlap_min:
            problem = f"has {overlap:.0%} of its words in the passages that it names, not {overlap_min:.0%}"
            raise CitationError(f"the sentence {short(sentence)} {problem}")
