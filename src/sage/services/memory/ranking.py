"""Which memories come to mind: similarity, recency and importance, weighed and added.

The formula is that of Park et al., "Generative Agents: Interactive Simulacra of Human Behavior" (2023,
arXiv:2304.03442, section 4.1): score = a * recency + b * importance + c * relevance, where all weights are 1. Relevance
is the cosine of the vectors, scaled so that the lowest of all candidates has 0 and the highest 1. Recency falls
exponentially with the time since a memory was last recalled; the paper's factor of 0.995 an hour is a half-life of
138.3 hours.

Two things differ. The paper scales recency and importance among the candidates too, with the effect that a second
between two memories counts as much as a month unless there is a third; here they are from 0 to 1 by themselves, and
stay so. And the paper has a language model rate the importance; here the caller does.
"""

from __future__ import annotations

import math
import sys
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, NamedTuple

from sage._extras import load
from sage.errors import short
from sage.services._shared.validation import is_number

if TYPE_CHECKING:
    from collections.abc import Sequence

    import numpy
    from numpy.typing import NDArray

    Floats = NDArray[numpy.float32]

HALF_LIFE_S = 3600 * math.log(0.5) / math.log(0.995)
"""The half-life of the paper's factor, in seconds: 5.76 days."""


@dataclass(frozen=True, slots=True)
class Weights:
    """How much each of the three counts; those of the paper are 1 each.

    Attributes:
        relevance: of the similarity of the query and the memory, compared with the others.
        recency: of how lately it was recalled, or made.
        importance: of the importance given by the caller.
    """

    relevance: float = 1.0
    recency: float = 1.0
    importance: float = 1.0

    def __post_init__(self) -> None:
        """Refuse a value that cannot be a weight."""
        for field in fields(self):
            value = getattr(self, field.name)
            if not is_number(value, 0, sys.float_info.max):
                raise ValueError(f"the weight of {field.name} is {short(value)}, not a number of at least 0")
        if self.relevance + self.recency + self.importance == 0:
            raise ValueError("all three weights are 0, so that no memory would be better than another")


class Candidate(NamedTuple):
    """The parts of a memory's score."""

    number: int
    importance: float
    recalled_at: float
    vector: bytes


class Score(NamedTuple):
    """How well a memory did; the parts are those before they were scaled and weighed."""

    number: int
    score: float
    relevance: float
    recency: float
    importance: float


def best(
    query: Floats, candidates: Sequence[Candidate], k: int, *, now: float, half_life_s: float, weights: Weights
) -> list[Score]:
    """Return the `k` best candidates, the best first; of equals the one that was made last."""
    if not candidates:
        return []
    numpy = load("numpy", "vector")
    vectors = numpy.frombuffer(b"".join(candidate.vector for candidate in candidates), numpy.float32)
    relevance = cosines(query, vectors.reshape(len(candidates), -1))
    ages_s = now - numpy.array([candidate.recalled_at for candidate in candidates])
    # A clock that was set back would make some memories younger than new.
    recency = 0.5 ** (numpy.maximum(ages_s, 0.0) / half_life_s)
    importance = numpy.array([candidate.importance for candidate in candidates])
    total = weights.relevance * scaled(relevance) + weights.recency * recency + weights.importance * importance
    numbers = [candidate.number for candidate in candidates]
    order = numpy.lexsort((-numpy.array(numbers), -total))[:k]
    parts = (total, relevance, recency, importance)
    return [Score(numbers[place], *(float(part[place]) for part in parts)) for place in order.tolist()]


def cosines(query: Floats, vectors: Floats) -> Floats:
    """Return the cosine of a vector with each of several; 0 where one has no length."""
    numpy = load("numpy", "vector")
    lengths = numpy.linalg.norm(vectors, axis=1) * numpy.linalg.norm(query)
    products = vectors @ query
    found: Floats = numpy.divide(products, lengths, out=numpy.zeros(len(vectors)), where=lengths > 0)
    return found


def scaled(values: Floats) -> Floats:
    """Return values from 0 for the lowest to 1 for the highest; 0.5 for all of them if they are equal."""
    low, high = float(values.min()), float(values.max())
    # Cosines of equal vectors may differ in their last digit, which must not count as a whole point.
    if high - low < 1e-6:
        return values * 0 + 0.5
    return (values - low) / (high - low)
