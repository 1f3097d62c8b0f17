"""Memories whose vectors an index finds: the stand-in, and the vector stores that are used for it."""

from __future__ import annotations

from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, Any

import numpy
import pytest
from services.kept import Shelf, Words, left_clean

from sage.services.memory.memory import Memory, Recollection, Weights
from sage.services.models.embeddings import HashingEmbeddings
from sage.services.vectors.chroma import ChromaStore
from sage.services.vectors.sqlite import SqliteStore
from sage.testing import ManualClock

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from support.vector_stores import Servers

INDEXES: dict[str, Callable[[Path], Any]] = {
    "shelf": lambda _: Shelf(),
    "sqlite": lambda folder: SqliteStore(folder / "index.db"),
    "chroma": lambda folder: ChromaStore(folder / "index"),
}
EMBEDDINGS: dict[str, Callable[[], Any]] = {"words": lambda: Words(256), "hashing": lambda: HashingEmbeddings(256)}


@pytest.fixture(params=list(INDEXES))
def index(request: pytest.FixtureRequest, tmp_path: Path, servers: Servers) -> Any:
    """An index that is not open yet; what its library keeps from the first use on, is there already."""
    return INDEXES[request.param](tmp_path)


@pytest.fixture(params=list(EMBEDDINGS))
def embeddings(request: pytest.FixtureRequest) -> Any:
    return EMBEDDINGS[request.param]()


@pytest.fixture
def clock() -> ManualClock:
    return ManualClock(1_700_000_000.0)


@contextmanager
def opened(path: Path, embeddings: Any, index: Any = None, **settings: Any) -> Iterator[Memory]:
    """Use a memory with its embeddings and its index, and see that all of them leave nothing."""
    memory = Memory(path, embeddings, index=index, **settings)
    with left_clean(), ExitStack() as stack:
        for service in (embeddings, index, memory):
            if hasattr(service, "setup"):
                stack.callback(service.cleanup)
                service.setup()
        yield memory


def texts(recollections: list[Recollection]) -> list[str]:
    return [found.text for found in recollections]


def test_one_that_is_new_is_given_everything(tmp_path: Path, embeddings: Any, index: Any) -> None:
    with opened(tmp_path / "memory.db", embeddings) as memory:
        memory.remember_many(["one cat", "two dogs"])
    for turn in range(2):
        with opened(tmp_path / "memory.db", embeddings, index) as memory:
            assert index.count() == 2
            assert texts(memory.recall("cat", k=1)) == ["one cat"]
            if turn == 0:  # what an index has lost, it is given again
                index.delete([found.id for found in memory.recall("dogs")])


def test_one_that_raises_loses_nothing(tmp_path: Path) -> None:
    index, words = Shelf(), Words()
    with opened(tmp_path / "memory.db", words, index) as memory:
        memory.remember("one cat")
        index.is_broken = True
        with pytest.raises(OSError, match="the shelf is broken"):
            memory.remember("two dogs")
        assert texts(memory.recall("dogs", k=1)) == ["two dogs"]
        index.is_broken = False
    with opened(tmp_path / "memory.db", words, index):
        assert index.count() == 2


def test_what_it_has_too_much_is_removed_when_it_is_seen(tmp_path: Path, embeddings: Any, index: Any) -> None:
    with opened(tmp_path / "memory.db", embeddings, index) as memory:
        index.upsert(["gone"], numpy.ones((1, 256), numpy.float32), metadatas=[{"session": "default"}])
        memory.remember("one cat")
        assert index.count() == 2
        assert texts(memory.recall("cat")) == ["one cat"]
        assert index.count() == 1


def test_it_forgets_too(tmp_path: Path, embeddings: Any, index: Any, clock: ManualClock) -> None:
    with opened(tmp_path / "memory.db", embeddings, index, clock=clock) as memory:
        name = memory.remember("one")
        memory.remember("two", ttl_s=1)
        memory.remember("three", ttl_s=5)
        memory.forget([name])
        clock.advance(2)
        memory.expire()
        assert index.count() == 1
        clock.advance(5)
        memory.remember("four")
        assert index.count() == 1


def test_it_finds_the_same_as_a_memory_without_one(
    tmp_path: Path, embeddings: Any, index: Any, clock: ManualClock
) -> None:
    said = [f"{animal} number {number} sleeps" for number in range(40) for animal in ("cat", "dog", "cow")]
    found: list[list[tuple[str, float]]] = []
    for name, chosen in (("alone.db", None), ("indexed.db", index)):
        with opened(tmp_path / name, embeddings, chosen, clock=clock) as memory:
            memory.remember_many(said, session="ann")
            memory.remember_many(["the dog number 7 barks"], session="bob")
            hits = memory.recall("dog number 7", k=1, session="ann", weights=Weights(recency=0, importance=0))
            hits += memory.recall("barks", k=1, session=None, weights=Weights(recency=0, importance=0))
            found.append([(hit.text, round(hit.relevance, 4)) for hit in hits])
    assert [text for text, _ in found[0]] == ["dog number 7 sleeps", "the dog number 7 barks"]
    assert found[0] == found[1]


def test_vectors_of_zeros_are_recalled_without_it(tmp_path: Path, index: Any, clock: ManualClock) -> None:
    """They have no cosine, so that an index refuses them; recency and importance bring them to mind."""
    words = Words()
    for turn in range(2):  # again with what the first turn has left
        with opened(tmp_path / "memory.db", words, index, clock=clock) as memory:
            memory.remember_many(["a cat", "?!"], importance=0.1)
            memory.remember("!!!", importance=1)
            assert index.count() == turn + 1
            found = memory.recall("cat", k=10)
            assert sorted(texts(found)) == sorted(["a cat", "?!", "!!!"] * (turn + 1))
            assert {one.relevance for one in found if one.text != "a cat"} == {0}
            clock.advance(1)


def test_a_query_of_zeros_does_not_ask_it(tmp_path: Path, index: Any) -> None:
    with opened(tmp_path / "memory.db", Words(), index) as memory:
        assert memory.recall("...") == []
        memory.remember("a cat", importance=0.2)
        memory.remember("a dog", importance=1, session="bob")
        assert texts(memory.recall("...")) == ["a cat"]
        assert texts(memory.recall("...", session=None)) == ["a dog", "a cat"]
