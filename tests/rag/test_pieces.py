"""Pieces of passages: they find the passage, and a budget is filled with the parts around them."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as some

from sage import GraphError, LocalEnvironment
from sage.rag.documents import Passage
from sage.rag.pieces import excerpt, owners_of, pieces_of, spans_of, tokens_in
from sage.rag.retrieval import Index, Question, Retrieve, Retrieved
from sage.services.models.embeddings import HashingEmbeddings
from sage.services.vectors.contract import Hit
from sage.services.vectors.numpy import NumpyStore

SENTENCES = [f"Sentence number {number} is about the {word}." for number, word in enumerate(["loom", "tape", "rope"])]
BEFORE, BEHIND = ["Nothing of interest is said here at all."] * 12, ["More of the same follows."] * 12
LONG = " ".join([*BEFORE, SENTENCES[1], *BEHIND])
PASSAGES = [
    Passage("long", LONG, "book.md", 0, len(LONG), "Book"),
    Passage("loom", SENTENCES[0], "book.md", 0, len(SENTENCES[0]), "Book"),
]


def asked(question: str, *, piece_tokens: int | None = 20, **settings: Any) -> Retrieved:
    """Index the passages and ask one question."""
    env = LocalEnvironment("pieces")
    store = env.register_service("store", NumpyStore)
    model = env.register_service("model", HashingEmbeddings)
    indexed = env.from_batch(PASSAGES).map_batches(
        Index(vectors=store, embeddings=model, piece_tokens=piece_tokens), max_records=8, max_wait_s=1.0
    )
    indexed.sink(lambda _: None)
    env.submit(autostop=True, keep_services=True)
    with env:
        return Retrieve(vectors=store, embeddings=model, **settings).execute(Question(question))


def test_a_piece_finds_its_passage_and_the_passage_comes_whole() -> None:
    found = asked("Which sentence is about the tape?", k=1).found
    assert [each.passage for each in found] == [PASSAGES[0]]
    whole = asked("Which sentence is about the tape?", k=1, piece_tokens=None).found
    assert [each.passage.id for each in whole] == ["loom"], "one sentence is lost in the vector of a long passage"


def test_a_budget_is_filled_with_the_parts_around_the_pieces() -> None:
    found = asked("Which sentence is about the tape?", budget_tokens=170).found
    assert [each.passage.id for each in found] == ["long", "loom"]
    assert SENTENCES[1] in found[0].passage.text
    assert len(found[0].passage.text) < 0.8 * len(LONG)
    assert sum(tokens_in(each.passage.text) for each in found) <= 170
    assert asked("Which sentence is about the tape?", budget_tokens=5).found == ()


def test_indexing_again_replaces_passages_with_their_pieces() -> None:
    """The pieces of an older version are not found any more."""
    store, model = NumpyStore(), HashingEmbeddings()
    for service in (store, model):
        service.setup()
    Index(vectors=store, embeddings=model, piece_tokens=20).execute(PASSAGES)
    assert store.count() > 10
    Index(vectors=store, embeddings=model, piece_tokens=20).execute([PASSAGES[1]])
    assert store.ids() == ["loom"]
    for service in (store, model):
        service.cleanup()


@pytest.mark.parametrize("settings", [{"budget_tokens": 0}, {"k": 0}])
def test_numbers_that_cannot_work_are_refused(settings: dict[str, int]) -> None:
    with pytest.raises(GraphError, match=f"Retrieve: {next(iter(settings))} is 0"):
        asked("why?", **settings)
    with pytest.raises(GraphError, match="Index: piece_tokens is 0"):
        Index(vectors=NumpyStore(), embeddings=HashingEmbeddings(), piece_tokens=0)


def test_owners_come_once_in_the_order_of_their_best_hit() -> None:
    piece: dict[str, Any] = {"sage:passage": "a", "sage:piece_start": 5, "sage:piece_end": 9}
    hits = [Hit("a piece 2", 0.9, "x", piece), Hit("b", 0.8, "y", {}), Hit("a", 0.7, "z", {}), Hit("c", 0.1, "y", {})]
    assert owners_of(hits) == [("a", [(5, 9)]), ("b", []), ("c", [])]


def test_a_short_passage_has_no_pieces() -> None:
    assert pieces_of(Passage("p", "One. Two.", "d"), 50) == []
    assert excerpt("One. Two.", [(0, 4)], best=1) == "One. Two."


TEXTS = some.lists(some.sampled_from([*SENTENCES, "Short.", "\n\n", "- item\n", "x" * 300]), max_size=30).map(" ".join)


@given(TEXTS, some.integers(1, 60))
def test_pieces_are_parts_of_the_text_in_order_within_the_bound(text: str, tokens_max: int) -> None:
    spans = spans_of(text, tokens_max)
    assert all(0 <= start < end <= len(text) for start, end in spans)
    assert all(end <= begin for (_, end), (begin, _) in pairwise(spans))
    assert all(tokens_in(text[start:end]) <= tokens_max for start, end in spans)
    assert "".join(text[start:end] for start, end in spans).split() == [] or spans


@given(TEXTS, some.lists(some.tuples(some.integers(0, 900), some.integers(1, 60)), max_size=4))
def test_an_excerpt_is_made_of_the_text_and_has_the_best_piece(text: str, found: list[tuple[int, int]]) -> None:
    spans = [(start, start + length) for start, length in found]
    part = excerpt(text, spans, best=2)
    for line in part.replace("[...] ", "").split("\n"):
        assert line.strip() in text
    if spans and spans[0][1] <= len(text) and text[slice(*spans[0])].strip():
        assert any(word in part for word in text[slice(*spans[0])].split())


class KnowsMeanings(HashingEmbeddings):
    """Stands for a model whose vectors are worth pieces."""

    def piece_tokens(self) -> int | None:
        return 20


@pytest.mark.parametrize(("model", "count"), [(HashingEmbeddings, 2), (KnowsMeanings, 13)])
def test_the_model_decides_whether_pieces_get_vectors(model: type[HashingEmbeddings], count: int) -> None:
    env = LocalEnvironment("decided")
    store = env.register_service("store", NumpyStore)
    embeddings = env.register_service("model", model)
    env.from_batch(PASSAGES).map_batches(Index(vectors=store, embeddings=embeddings)).sink(lambda _: None)
    env.submit(autostop=True, keep_services=True)
    with env:
        assert store.count() == count
