"""Evaluation: how well passages are found, and how near answers come to right ones."""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import dataclass
from typing import TYPE_CHECKING

from sage.errors import GraphError
from sage.functions import ProcessFunction
from sage.rag.citations import MARK
from sage.rag.generation import Answered
from sage.services.models.embeddings import words_of

if TYPE_CHECKING:
    from collections.abc import Collection, Sequence

    from sage.rag.retrieval import Retrieved

ARTICLES = re.compile(r"\b(?:a|an|the)\b")


@dataclass(frozen=True, slots=True)
class Scores:
    """Means over questions; None if no question has the data for it.

    Attributes:
        questions: how many questions there were.
        k: how many passages of each count.
        recall: which part of the expected passages is among the first `k`.
        mrr: the mean reciprocal rank of the first expected passage, 0 where it is not among the first `k`.
        f1: the token F1 of answers and references.
        cited: which part of the answers names an expected passage.
    """

    questions: int
    k: int
    recall: float | None
    mrr: float | None
    f1: float | None = None
    cited: float | None = None


class Evaluate(ProcessFunction):
    """Compares results and answers with those that the questions expect; emits `Scores` at the end.

    Records are `Retrieved` or `Answered`. A question without `expected` does not count for retrieval, and one without
    `reference` not for the overlap. It must run in one task: each task emits scores of its own records.

    Args:
        k: how many passages of each question count.

    Raises:
        GraphError: `k` is below 1.
    """

    def __init__(self, k: int = 5) -> None:
        if k < 1:
            raise GraphError(f"Evaluate: k is {k}, but at least 1 passage must count")
        self._k = k
        self._questions = 0
        self._recalls: list[float] = []
        self._ranks: list[float] = []
        self._overlaps: list[float] = []
        self._cited: list[float] = []

    def execute(self, data: Retrieved | Answered) -> None:
        """Score one question."""
        question = data.question
        ids = [found.passage.id for found in data.found[: self._k]]
        self._questions += 1
        if question.expected:
            self._recalls.append(recall(question.expected, ids))
            self._ranks.append(reciprocal_rank(question.expected, ids))
        if isinstance(data, Answered):
            if question.reference:
                self._overlaps.append(token_f1(data.text, question.reference))
            if question.expected:
                named = {citation.passage for citation in data.citations}
                self._cited.append(float(bool(named & question.expected)))

    def finish(self) -> list[Scores]:
        """Return the scores."""
        means = (_mean(values) for values in (self._recalls, self._ranks, self._overlaps, self._cited))
        return [Scores(self._questions, self._k, *means)]


def recall(expected: Collection[str], found: Sequence[str]) -> float:
    """Return which part of the expected ids was found, from 0 to 1; `expected` has at least one."""
    wanted = set(expected)
    return len(wanted & set(found)) / len(wanted)


def reciprocal_rank(expected: Collection[str], found: Sequence[str]) -> float:
    """Return 1 divided by the rank of the first expected id, or 0 without one."""
    return next((1.0 / rank for rank, id_ in enumerate(found, 1) if id_ in expected), 0.0)


def token_f1(answer: str, reference: str) -> float:
    """Return the harmonic mean of precision and recall of an answer's words, from 0 to 1.

    Case, signs, articles and marks of citations do not count; a word counts as often as it is in both.
    """
    given, right = (words_of(ARTICLES.sub(" ", MARK.sub(" ", text).lower())) for text in (answer, reference))
    common = sum((Counter(given) & Counter(right)).values())
    if not given or not right:
        return float(given == right)
    return 2.0 * common / (len(given) + len(right))


def _mean(values: Sequence[float]) -> float | None:
    return sum(values) / len(values) if values else None
