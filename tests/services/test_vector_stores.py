"""What every vector store does, with the real engines. A Milvus server is stood in for by Milvus Lite as a server."""

from __future__ import annotations

import os
import threading
import traceback
from collections import Counter
from contextlib import suppress
from fnmatch import fnmatch
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from support.filter_strategies import FIELDS, TEXTS, metadatas, reference, wheres
from support.vector_stores import KEPT, Place, ids_of, vectors_of, wait_for

from sage import LocalEnvironment, ServiceOptions
from sage._extras import load
from sage.errors import ServiceError, ServiceUnavailableError
from sage.services.vectors.chroma import ChromaStore
from sage.services.vectors.contract import DuplicateIdError, Hit, UnknownCollectionError, VectorStore
from sage.services.vectors.numpy import NumpyStore
from sage.testing import assert_clean

if TYPE_CHECKING:
    from collections.abc import Sequence

    from sage.services.vectors.filters import Metadata

EXACT = 2e-5

STRANGE = (
    *("it's", 'say "x"', "both '\"", "back\\slash", "back\\", "\\", "\\'", "\\n", "\\u0041", "{x}", "%s", " "),
    *("new\nline", "\r\n", "tab\t", "zero\0", "a\0b", "\0", "\x01\x1f\x7f\x85", "\u2028", "\uffff", "日本", "😀"),
    *("x'] or id not in ['", 'x"] or id not in ["', "a/b~1", "a.b", "[0]", "#", "#tag", "#document", "chroma:"),
    *("chroma:title", "chroma:document", "chroma:uri", "Chroma:x", "document"),
    *("sage:", "sage:x", "sage:#", "sage:sage:chroma:title"),
)
"""What engines might take for a part of their languages, or for names of their own."""


def fill(store: VectorStore, count: int = 50, **more: Any) -> None:
    numbers = range(count)
    store.upsert(
        ids_of(count),
        vectors_of(count),
        documents=[f"text {number}" for number in numbers],
        metadatas=[{"n": number, "even": number % 2 == 0, "word": f"w{number % 3}"} for number in numbers],
        **more,
    )


def same_hits(found: Sequence[Hit], expected: Sequence[Hit]) -> None:
    assert [hit.score for hit in found] == pytest.approx([hit.score for hit in expected], abs=EXACT)
    assert [(hit.id, hit.document, hit.metadata) for hit in found] == [
        (hit.id, hit.document, hit.metadata) for hit in expected
    ]


def exact(**more: Any) -> NumpyStore:
    store = NumpyStore(**more)
    store.setup()
    return store


def test_what_is_added_is_there(place: Place) -> None:
    with place.opened() as store:
        store.add(["a", "b"], [[1, 2, 3], [4, 5, 6]], documents=["one", None], metadatas=[{"x": 1.5, "y": True}, {}])
        first, missing, second = store.get(["a", "nobody", "b"])
        assert missing is None
        assert first is not None
        assert second is not None
        assert first.vector == pytest.approx([1, 2, 3], abs=EXACT)
        assert (str(first.vector.dtype), first.vector.shape) == ("float32", (3,))
        assert (first.id, first.document, first.metadata) == ("a", "one", {"x": 1.5, "y": True})
        assert (second.document, second.metadata) == (None, {})
        assert store.count() == 2
        assert store.get([]) == []


def test_what_was_given_belongs_to_the_caller(place: Place) -> None:
    vectors = np.array([[1, 2]], dtype=np.float32)
    texts, metadata = ["first"], {"a": "b"}
    with place.opened() as store:
        store.add(["a"], vectors, documents=texts, metadatas=[metadata])
        vectors[0, 0] = 9
        texts[0] = metadata["a"] = "changed"
        store.get(["a"])[0].metadata["a"] = "changed"  # type: ignore[union-attr, index]
        store.search([1, 2])[0].metadata["a"] = "changed"  # type: ignore[index]
        (entry,) = store.get(["a"])
        assert entry is not None
        assert (entry.vector.tolist(), entry.document, entry.metadata) == ([1, 2], "first", {"a": "b"})


def test_an_id_that_is_known_is_not_added_again(place: Place) -> None:
    with place.opened() as store:
        store.add(["a", "b"], [[1, 2], [3, 4]])
        with pytest.raises(DuplicateIdError, match=f"collection \"{place.name}\" has id 'b' already") as caught:
            store.add(["c", "b"], [[5, 6], [7, 8]])
        assert caught.value.__notes__ == ["upsert() takes the place of what is there."]
        assert store.count() == 2
        assert store.get(["c"]) == [None]


def test_upsert_takes_the_place_of_what_was_there(place: Place) -> None:
    with place.opened() as store:
        store.upsert(["a", "b"], [[1, 2], [3, 4]], documents=["x", "y"], metadatas=[{"m": 1, "n": 2}, {"n": 3}])
        store.upsert(
            ["b", "a", "c"], [[5, 6], [1, 0], [0, 1]], documents=[None, "z", None], metadatas=[{}, {"o": 1}, {}]
        )
        found = store.get(["a", "b", "c"])
        assert [(entry.document, entry.metadata) for entry in found if entry] == [
            ("z", {"o": 1}),
            (None, {}),
            (None, {}),
        ]
        assert [entry.vector.tolist() for entry in found if entry] == [
            pytest.approx([1, 0], abs=EXACT),
            pytest.approx([5, 6], abs=EXACT),
            pytest.approx([0, 1], abs=EXACT),
        ]
        assert store.count() == 3
        assert [hit.id for hit in store.search([1, 0.1], 3)] == ["a", "b", "c"]


def test_delete_says_how_many_there_were(place: Place) -> None:
    with place.opened() as store:
        fill(store, 10)
        assert store.delete(["id1", "nobody", "id2", "id1"]) == 2
        assert store.delete(["id1"]) == 0
        assert store.delete([]) == 0
        assert store.delete(where={"even": True}) == 4
        assert store.delete(["id3", "id5", "id7"], where={"n": {"$gt": 4}}) == 2
        assert [entry is not None for entry in store.get(ids_of(10))] == [n in (3, 9) for n in range(10)]
        assert [hit.id for hit in store.search(vectors_of(10)[4], 10)] != []
        assert store.delete(where={}) == 2
        assert store.count() == 0
        assert store.search(vectors_of(1)[0]) == []
        fill(store, 5)
        assert store.count() == 5


@pytest.mark.parametrize("metric", ["cosine", "dot", "l2"])
def test_results_are_those_of_the_reference(place: Place, metric: Any) -> None:
    expected = exact(metric=metric)
    fill(expected)
    queries = vectors_of(7, seed=1)
    with place.opened(metric=metric) as store:
        fill(store)
        for k in (1, 5, 50, 80):
            for found, right in zip(store.search_batch(queries, k), expected.search_batch(queries, k), strict=True):
                same_hits(found, right)
        same_hits(store.search(queries[0], 3), expected.search(queries[0], 3))
        where = {"even": True, "n": {"$lt": 20}}
        for found, right in zip(
            store.search_batch(queries, 20, where=where), expected.search_batch(queries, 20, where=where), strict=True
        ):
            assert len(found) == 10
            same_hits(found, right)
        assert store.search_batch(np.empty((0, 8)), 3) == []


def test_nearly_all_of_a_larger_collection_is_found(place: Place) -> None:
    expected = exact()
    queries = vectors_of(20, 32, seed=1)
    with place.opened() as store:
        for start in range(0, 2_000, 250):
            part = vectors_of(2_000, 32)[start : start + 250]
            expected.upsert(ids_of(250, start), part)
            store.upsert(ids_of(250, start), part)
        pairs = zip(store.search_batch(queries), expected.search_batch(queries), strict=True)
        shares = [len({hit.id for hit in found} & {hit.id for hit in right}) / 10 for found, right in pairs]
        assert np.mean(shares) > (0.9 if place.kind.startswith("chroma") else 0.999)
        assert store.count() == 2_000


def strange() -> st.SearchStrategy[str]:
    """Draw what can be an id, a text and the name of a field."""
    return st.one_of(st.sampled_from(STRANGE), st.text(min_size=1).filter(lambda text: not text.startswith("$")))


def renamed(value: Any, names: dict[str, str]) -> Any:
    """Return metadata or a filter with other texts and names of fields."""
    match value:
        case dict():
            return {names.get(key, key): renamed(inner, names) for key, inner in value.items()}
        case list():
            return [renamed(inner, names) for inner in value]
        case str():
            return names.get(value, value)
    return value


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_filters_hold_as_the_reference_says(place: Place, filtered: VectorStore, data: st.DataObject) -> None:
    names = data.draw(st.dictionaries(st.sampled_from(FIELDS + TEXTS), strange(), max_size=3))
    known = [renamed(one, names) for one in data.draw(st.lists(metadatas(), min_size=6, max_size=6))]
    ids = ids_of(6)
    filtered.upsert(ids, np.eye(6) + 0.1, metadatas=known)
    for _ in range(4):
        where = renamed(data.draw(wheres()), names)
        held = {one for one, metadata in zip(ids, known, strict=True) if reference(where, metadata)}
        assert {hit.id for hit in filtered.search(np.ones(6), 6, where=where)} == held
        assert filtered.count(where=where) == len(held)
    assert [entry and entry.metadata for entry in filtered.get(ids)] == known


LARGE = (2**53, 2.0**53, 2**53 + 1, 2**63 - 1, 2.0**63, -(2**63), -(2.0**63), 1e300, -1e300)
SMALL = (-2, -1.5, -1, -0.5, 0, -0.0, 1e-300, 0.5, 1, 1.0, 1.5, 2)


@pytest.mark.parametrize("numbers", [LARGE, SMALL], ids=["large", "small"])
def test_filters_do_not_round_numbers(filtered: VectorStore, numbers: tuple[float, ...]) -> None:
    """Python compares integers with floats exactly; an engine that makes one of the other finds what is not there."""
    ids = ids_of(len(numbers))
    filtered.upsert(ids, np.eye(len(numbers)) + 0.1, metadatas=[{"n": value} for value in numbers])
    for value in numbers:
        for name in ("$eq", "$ne", "$in", "$nin", "$lt", "$lte", "$gt", "$gte"):
            where: Any = {"n": {name: [value, 1] if name.endswith("in") else value}}
            held = {one for one, kept in zip(ids, numbers, strict=True) if reference(where, {"n": kept})}
            assert {hit.id for hit in filtered.search(np.ones(len(ids)), len(ids), where=where)} == held, where
            assert filtered.count(where=where) == len(held)


def test_any_text_is_a_field_and_a_value(filtered: VectorStore) -> None:
    count = len(STRANGE)
    ids, texts = ids_of(count), STRANGE[::-1]
    known: list[Metadata] = [{name: text, "all": text} for name, text in zip(STRANGE, texts, strict=True)]
    filtered.upsert(ids, np.eye(count) + 0.1, metadatas=known)
    assert [entry and entry.metadata for entry in filtered.get(ids)] == known
    assert {hit.id: hit.metadata for hit in filtered.search(np.ones(count), count)} == dict(
        zip(ids, known, strict=True)
    )
    for one, name, text in zip(ids, STRANGE, texts, strict=True):
        for where in ({name: text}, {name: {"$in": [text, 3]}}, {"all": {"$gte": text, "$lte": text}}):
            assert [hit.id for hit in filtered.search(np.ones(count), count, where=where)] == [one], where
        assert filtered.count(where={name: {"$ne": text}}) == count - 1
    assert filtered.delete(where={"all": {"$in": list(STRANGE[1:])}}) == count - 1
    assert filtered.count() == 1


@settings(max_examples=20, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@example(ids=list(STRANGE))
@given(ids=st.lists(strange(), unique=True, min_size=1, max_size=20))
def test_any_text_is_an_id(place: Place, filtered: VectorStore, ids: list[str]) -> None:
    filtered.upsert(["plain", *ids], np.ones((len(ids) + 1, 2)))
    count = filtered.count()
    assert [entry and entry.id for entry in filtered.get(ids)] == ids
    for one in ids:
        with pytest.raises(DuplicateIdError):
            filtered.add([one], [[1, 1]])
    filtered.upsert(ids, np.ones((len(ids), 2)), documents=ids)
    assert {hit.id: hit.document for hit in filtered.search([1, 1], count)} == {
        "plain": None,
        **{one: one for one in ids},
    }
    assert filtered.delete(ids[:1]) == 1
    assert [entry and entry.id for entry in filtered.get(ids)] == [None, *ids[1:]]
    assert filtered.delete(ids) == count - 2 == len(ids) - 1
    assert [entry and entry.id for entry in filtered.get(["plain", *ids])] == ["plain", *[None] * len(ids)]


@pytest.mark.parametrize("one", [text for text in STRANGE if "not in" in text])
def test_an_id_is_no_filter(filtered: VectorStore, one: str) -> None:
    filtered.upsert(["a", "b"], [[1, 2], [3, 4]])
    assert filtered.get([one]) == [None]
    assert filtered.delete([one]) == 0
    filtered.upsert([one], [[5, 6]])
    assert filtered.delete([one]) == 1
    assert filtered.count() == 2


@pytest.mark.parametrize("place", ["chroma"], indirect=True)
def test_other_programs_find_fields_by_their_names(place: Place) -> None:
    with place.opened() as store:
        store.upsert(["a"], [[1, 2]], metadatas=[{"title": "x", "sage:x": 1, "#tag": 2}])
    client = load("chromadb", "chroma").PersistentClient(str(place.path))
    collection = client.get_collection(place.name)
    assert collection.get()["metadatas"] == [{"title": "x", "sage:x": 1, "sage:#tag": 2}]
    collection.add(ids=["b"], embeddings=[[1, 2]], metadatas=[{"title": "y", "sage:y": 3}])
    client.close()
    with place.opened() as store:
        found = store.get(["a", "b"])
    assert [entry and entry.metadata for entry in found] == [
        {"title": "x", "sage:x": 1, "#tag": 2},
        {"title": "y", "sage:y": 3},
    ]


@pytest.fixture
def filtered(place: Place) -> Any:
    with place.opened() as store:
        yield store


def test_metadata_is_taken_as_other_programs_have_it(filtered: VectorStore) -> None:
    """None, lists, and scalars and arrays of numpy become plain values; the same ones are found with filters."""
    given: list[dict[str, Any]] = [
        {"none": None, "tags": ["new", "red"], "n": np.int64(3), "f": np.float32(0.5), "yes": np.bool_(True)},
        {"tags": ("old",), "sizes": np.array([1, 2]), "t": np.str_("text"), "one": np.array(4)},
        {"mixed": [1, 2.5], "flags": [True, False]},
        {"none": None},
    ]
    expected: list[Metadata] = [
        {"tags": ["new", "red"], "n": 3, "f": 0.5, "yes": True},
        {"tags": ["old"], "sizes": [1, 2], "t": "text", "one": 4},
        {"mixed": [1, 2.5], "flags": [True, False]},
        {},
    ]
    ids = ids_of(4)
    filtered.upsert(ids, np.eye(4) + 0.1, metadatas=given)
    assert [entry and entry.metadata for entry in filtered.get(ids)] == expected
    assert all(type(value) in (str, int, float, bool, list) for one in expected for value in one.values())
    for where, held in (
        ({"tags": {"$contains": "new"}}, [0]),
        ({"tags": {"$contains": np.str_("old")}}, [1]),
        ({"sizes": {"$contains": np.int32(2)}}, [1]),
        ({"sizes": {"$contains": 2.0}}, [1]),
        ({"sizes": {"$contains": True}}, []),
        ({"mixed": {"$contains": 1}}, [2]),
        ({"flags": {"$contains": False}}, [2]),
        ({"tags": {"$not_contains": "new"}}, [1, 2, 3]),
        ({"tags": "new"}, []),
        ({"tags": {"$exists": True}}, [0, 1]),
        ({"none": {"$exists": False}}, [0, 1, 2, 3]),
        ({"n": np.float64(3)}, [0]),
        ({"n": {"$gte": np.int8(3)}, "yes": np.bool_(True)}, [0]),
    ):
        assert sorted(filtered.ids(where=where)) == [ids[place] for place in held], where
        assert {entry.id for entry in filtered.get(where=where)} == {ids[place] for place in held}
        assert {hit.id for hit in filtered.search(np.ones(4), 4, where=where)} == {ids[place] for place in held}


def test_entries_are_listed_and_read_by_a_filter(filtered: VectorStore) -> None:
    assert filtered.ids() == []
    assert filtered.get(where={}) == []
    fill(filtered, 9)
    assert sorted(filtered.ids()) == ids_of(9)
    assert sorted(entry.id for entry in filtered.get(where={})) == ids_of(9)
    found = filtered.get(["id2", "id1", "gone", "id2"], where={"even": True})
    assert [entry and entry.id for entry in found] == ["id2", None, None, "id2"]
    assert [entry.document for entry in filtered.get(where={"n": 3})] == ["text 3"]
    with pytest.raises(ValueError, match="get is given neither ids nor a filter"):
        filtered.get()  # type: ignore[call-overload]
    with pytest.raises(UnknownCollectionError):
        filtered.ids(collection="other")


@pytest.mark.parametrize("name", ["my-docs", "v1.2_docs", "0-first", "a_x2d_b", "a-b_x2d_c", "a.-_b", "Docs--2"])
def test_a_collection_has_the_name_that_it_is_given(place: Place, name: str) -> None:
    given = f"{name}-{place.name}" if name[0].isdigit() else f"{place.name}.{name}"
    with place.opened() as store:
        store.upsert(["a"], [[1, 2]], collection=given)
        assert given in store.collections()
        assert store.ids(collection=given) == ["a"]
        store.flush()
    if place.kind != "numpy":
        with place.opened() as store:
            assert [hit.id for hit in store.search([1, 2], collection=given)] == ["a"]
            assert store.drop(given) is True
            assert given not in store.collections()


@pytest.mark.parametrize("place", ["chroma"], indirect=True)
def test_a_collection_of_another_program_is_read_as_it_is(place: Place) -> None:
    client = load("chromadb", "chroma").PersistentClient(str(place.path))
    made = client.create_collection("my-old-docs", embedding_function=None)
    metadatas: Any = [{"page": 1, "tags": ["x", "y"]}, {"page": 2}, None]
    made.add(
        ids=["a", "b", "c"], embeddings=[[1, 2], [3, 4], [5, 6]], documents=["one", "two", "three"], metadatas=metadatas
    )
    client.close()
    with place.opened(collection="my-old-docs", metric="l2") as store:
        assert [entry.metadata for entry in store.get(where={})] == [{"page": 1, "tags": ["x", "y"]}, {"page": 2}, {}]
        assert store.ids(where={"tags": {"$contains": "y"}}) == ["a"]
        assert store.ids(where={"page": {"$exists": False}}) == ["c"]
        assert [(hit.id, hit.document) for hit in store.search([3, 4], 1)] == [("b", "two")]
        store.upsert(["d"], [[7, 8]], metadatas=[{"tags": ["y"]}])
        assert store.count(where={"tags": {"$contains": "y"}}) == 2


def test_collections_are_apart(place: Place) -> None:
    other = f"{place.name}x"
    with place.opened() as store:
        assert store.count() == 0
        assert store.search([1, 2]) == []
        assert store.get(["a"]) == [None]
        assert store.delete(["a"]) == 0
        assert place.name not in store.collections()
        store.upsert(["a"], [[1, 2]])
        store.upsert(["a", "b"], [[1, 2, 3], [4, 5, 6]], collection=other)
        assert {place.name, other} <= set(store.collections())
        assert (store.count(), store.count(collection=other)) == (1, 2)
        assert len(store.search([1, 2, 3], collection=other)) == 2
        assert store.drop(other) is True
        assert store.drop(other) is False
        assert other not in store.collections()
        with pytest.raises(UnknownCollectionError, match=f'collection "{other}" does not exist') as caught:
            store.search([1, 2, 3], collection=other)
        assert place.name in caught.value.__notes__[0]
        store.upsert(["c"], [[1.0, 2, 3, 4]], collection=other)
        assert store.count(collection=other) == 1
        assert store.count() == 1


@pytest.mark.parametrize(
    ("ids", "vectors", "more", "kind", "message"),
    [
        (["x"], [[1, 2, 3]], {}, ValueError, "has vectors of dimension 2, not 3, from id 'x' on"),
        (
            ["x", "y"],
            [[1, 2], [float("nan"), 1]],
            {},
            ValueError,
            "the vector of id 'y' has a value that is not finite",
        ),
        (["x"], [[1e300, 1]], {}, ValueError, "the vector of id 'x' has a value that is not finite"),
        (["x"], [[0, 0]], {}, ValueError, "the vector of id 'x' is all zeros and has no cosine"),
        (["x", "y"], [[1, 2], [1e30, 0]], {}, ValueError, "the vector of id 'y' is too long: the square of its length"),
        (["x", "y"], [[1, 2], [0, 1e-30]], {}, ValueError, "the vector of id 'y' is too short: the square of its"),
        (["x", ""], [[1, 2], [3, 4]], {}, ValueError, "id 1 is '', which is empty"),
        (["x", "y", "x"], [[1, 2]] * 3, {}, DuplicateIdError, "id 'x' is given twice"),
        ([1], [[1, 2]], {}, TypeError, "id 0 is 1, of type int and not a string"),
        ("xy", [[1, 2]], {}, TypeError, "ids is 'xy', a string and not a list"),
        (["x", "y"], [[1, 2]], {}, ValueError, "there are 2 ids and 1 vectors"),
        (["x"], [1, 2], {}, ValueError, "there are 1 ids and 2 vectors"),
        (["x", "y"], [1, 2], {}, ValueError, r"the vectors have shape \(2,\), not \(n, dimension\)"),
        (["x", "y"], [[1, 2], [1]], {}, ValueError, "the vectors are not an array of numbers"),
        (["x"], [["1", "2"]], {}, ValueError, "the vectors are not an array of numbers, but of <U1"),
        (["x"], [[1j, 2]], {}, ValueError, "the vectors are not an array of numbers, but of complex128"),
        (["x"], [[1, 2]], {"documents": ["a", "b"]}, ValueError, "there are 1 ids and 2 documents"),
        (["x"], [[1, 2]], {"documents": "a"}, TypeError, "documents is 'a', a string and not a list"),
        (["x"], [[1, 2]], {"documents": [3]}, TypeError, "the document of id 'x' is of type int"),
        (["x"], [[1, 2]], {"metadatas": [3]}, TypeError, "the metadata of id 'x' is 3, not a mapping"),
        (
            ["x"],
            [[1, 2]],
            {"metadatas": [{"a": {}}]},
            TypeError,
            "the metadata of id 'x' has 'a': {}, which is of type",
        ),
        (
            ["x"],
            [[1, 2]],
            {"metadatas": [{"a": []}]},
            ValueError,
            r"the metadata of id 'x' has 'a': \[\], which is empty",
        ),
        (
            ["x"],
            [[1, 2]],
            {"metadatas": [{"a": [1, "b"]}]},
            ValueError,
            "which has values of different kinds: number, te",
        ),
        (["x"], [[1, 2]], {"metadatas": [{"a": [[1]]}]}, ValueError, "which has a list in it"),
        (["x"], [[1, 2]], {"metadatas": [{"a": [1, None]}]}, ValueError, "which has a value that is of type NoneType"),
        (["x"], [[1, 2]], {"metadatas": [{"a": float("nan")}]}, ValueError, "'a': nan, which is not finite"),
        (["x"], [[1, 2]], {"metadatas": [{"": 1}]}, ValueError, "the metadata of id 'x' has the field ''"),
        (
            ["x", "y"],
            [[1, 2], [1, 2]],
            {"metadatas": [{"a": "b"}, {"a": "b", "\ud800": "c"}]},
            ValueError,
            "the metadata of id 'y' has the field",
        ),
        (
            ["x", "y", "z"],
            [[1, 2], [1, 2], [1, 2]],
            {"metadatas": [{"a": "b"}, None, {"a": "\ud800"}]},
            ValueError,
            "the metadata of id 'z' has 'a': .*, which has half of a surrogate pair",
        ),
        (["x", "y"], [[1, 2], [1, 2]], {"metadatas": [{"a": "b"}, "ab"]}, TypeError, "id 'y' is 'ab', not a mapping"),
        (["x"], [[1, 2]], {"metadatas": [{"$a": 1}]}, ValueError, "the metadata of id 'x' has the field"),
        (["x"], [[1, 2]], {"collection": "no spaces"}, ValueError, "a collection cannot have the name 'no spaces'"),
    ],
)
def test_bad_rows_are_refused_and_nothing_is_stored(
    place: Place, ids: Any, vectors: Any, more: Any, kind: type[Exception], message: str
) -> None:
    with place.opened() as store:
        store.upsert(["a"], [[1, 2]])
        for write in (store.add, store.upsert):
            with pytest.raises(kind, match=message):
                write(ids, vectors, **more)
        assert store.count() == 1
        store.upsert([], [])


def test_bad_searches_are_refused(place: Place) -> None:
    with place.opened(dimension=2) as store:
        for _ in range(2):
            with pytest.raises(ValueError, match=f'collection "{place.name}" has vectors of dimension 2, not 3'):
                store.search([1, 2, 3])
            with pytest.raises(ValueError, match="vector 1 of the search has a value that is not finite"):
                store.search_batch(np.array([[1, 2], [np.nan, 2]]))
            with pytest.raises(ValueError, match="vector 0 of the search is all zeros and has no cosine"):
                store.search([0, 0])
            with pytest.raises(ValueError, match=r"the vector of a search has shape \(1, 2\), not \(dimension,\)"):
                store.search([[1, 2]])
            with pytest.raises(ValueError, match="k is 0, not a whole number from 1 on"):
                store.search([1, 2], 0)
            with pytest.raises(ValueError, match=r"has the unknown operator '\$like'"):
                store.search([1, 2], where={"a": {"$like": "x"}})
            with pytest.raises(ValueError, match="delete is given neither ids nor a filter"):
                store.delete()
            store.upsert(["a"], [[1, 2]])


def test_a_store_that_is_not_open_says_so(place: Place) -> None:
    store = place.store()
    with pytest.raises(ServiceUnavailableError, match="Store is not open"):
        store.count()
    assert store.health() is False
    store.cleanup()


def test_the_settings_are_checked(place: Place) -> None:
    with pytest.raises(ValueError, match="the dimension is 0, not a whole number from 1 on"):
        place.store(dimension=0)
    with pytest.raises(ValueError, match="the metric is 'manhattan'"):
        place.store(metric="manhattan")
    with pytest.raises(ValueError, match="a collection cannot have the name ''"):
        place.store(collection="")


@pytest.mark.parametrize("token", ["HUNTER\n", "", "HUNTER\0", "\x7fHUNTER", "HUNTERé", " HUNTER", "HUNTER "])
def test_a_token_that_no_header_can_hold_is_refused_and_not_shown(token: str) -> None:
    with pytest.raises(ValueError, match="the token cannot be sent in a header") as caught:
        ChromaStore(url="http://127.0.0.1:1", token=token)
    told = "".join(traceback.format_exception(caught.value)) + repr(caught.value)
    assert "HUNTER" not in told


def test_it_describes_and_measures_itself(place: Place) -> None:
    with place.opened(dimension=8) as store:
        fill(store)
        store.search_batch(vectors_of(3))
        with pytest.raises(ValueError, match="dimension 8, not 2"):
            store.search([1, 2])
        measures = store.measures()
        assert (measures["upsert"].calls, measures["upsert"].items) == (1, 50)
        assert (measures["search_batch"].batch_max, measures["search"].errors) == (3, 1)
        described = store.describe()
        assert (described["collection"], described["dimension"], described["metric"]) == (place.name, 8, "cosine")
        assert store.health() is True


def test_many_threads_may_use_it(place: Place) -> None:
    def work(number: int) -> None:
        try:
            for turn in range(4):
                first = 100 * number + 10 * turn
                store.upsert(ids_of(10, first), vectors_of(10, seed=first))
                assert store.search(vectors_of(10, seed=first)[3], 1)[0].id == f"id{first + 3}"
                store.delete(ids_of(5, first))
        except BaseException as error:  # it is raised again where the test sees it
            errors.append(error)

    errors: list[BaseException] = []
    with place.opened() as store:
        threads = [threading.Thread(target=work, args=(number,)) for number in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert errors == []
        assert store.count() == 4 * 4 * 5


def test_it_is_searched_while_entries_are_replaced(place: Place) -> None:
    """A search sees each entry as it was or as it is, or not at all, and never fails."""
    count, step = 1_200, 300
    is_over = threading.Event()
    errors: list[BaseException] = []

    def look(seed: int) -> None:
        try:
            while not is_over.is_set():
                for hits in store.search_batch(vectors_of(20, 32, seed=seed), 10):
                    assert len({hit.id for hit in hits}) == len(hits) <= 10
        except BaseException as error:  # it is raised again where the test sees it
            errors.append(error)

    with place.opened() as store:
        for turn in range(5):
            if turn == 1:
                threads = [threading.Thread(target=look, args=(seed,)) for seed in range(2)]
                for thread in threads:
                    thread.start()
            for start in range(0, count, step):
                store.upsert(ids_of(step, start), vectors_of(step, 32, seed=start))
        is_over.set()
        for thread in threads:
            thread.join()
        assert errors == []
        assert store.count() == count


def test_it_opens_again_with_everything(place: Place) -> None:
    if place.kind == "numpy":
        pytest.skip("it keeps nothing")
    expected = exact()
    fill(expected)
    with place.opened() as store:
        fill(store)
        store.flush()
        store.delete(["id7"])
        expected.delete(["id7"])
    for _ in range(2):
        with place.opened() as store:
            assert store.count() == 49
            same_hits(store.search(vectors_of(1, seed=9)[0], 49), expected.search(vectors_of(1, seed=9)[0], 49))
            assert store.count(where={"word": "w1"}) == expected.count(where={"word": "w1"})
    with (
        pytest.raises(ValueError, match=f'collection "{place.name}" has vectors of dimension 8, not 9'),
        place.opened(dimension=9),
    ):
        pass
    with (
        pytest.raises(ValueError, match=f'collection "{place.name}" was made for the metric "cosine"'),
        place.opened(metric="l2"),
    ):
        pass


DATA = {
    "sqlite": ["store.db"],
    "chroma": ["store.db/chroma.sqlite3", "store.db/????????-*/*.bin"],
    "milvus": ["store.db/collections/*"],
}
"""The files that are data, by the kind of store; beside them none may be left."""


def threads_and_descriptors() -> Counter[str]:
    """Count those of this process, also the threads that Python does not know, by what they are."""
    found = Counter({"thread": len(os.listdir("/proc/self/task"))})
    for name in os.listdir("/proc/self/fd"):
        with suppress(FileNotFoundError):  # the one that the folder is read with
            found[os.readlink(f"/proc/self/fd/{name}").partition("[")[0]] += 1
    return found


def test_nothing_is_left_but_its_data(place: Place) -> None:
    """What libraries keep from their first use on is in the docstrings of the stores.

    The pools of gRPC replace a thread with another, and start one more when the machine is slow, whenever they like.
    So what counts is that nothing grows with the openings.
    """
    counts: list[Counter[str]] = []
    openings = 4

    def grown() -> Counter[str]:
        return threads_and_descriptors() - counts[1]

    for _ in range(2 + openings):
        with place.opened() as store:
            fill(store)
            store.search(vectors_of(1)[0])
            store.delete(["id7"])
        if place.kind in KEPT:
            left = [path.relative_to(place.path.parent).as_posix() for path in place.path.parent.rglob("*")]
            files = [name for name in left if not (place.path.parent / name).is_dir()]
            data = [name for name in files if any(fnmatch(name, pattern) for pattern in DATA[place.kind])]
            assert sorted(files) == sorted(data)
            assert data
        counts.append(threads_and_descriptors())
    wait_for(lambda: max(grown().values(), default=0) < openings, "the end of threads and connections")


@pytest.mark.parametrize("host", ["inline", "process"])
def test_two_jobs_use_it_one_after_the_other(place: Place, host: Any) -> None:
    if place.kind == "numpy":
        pytest.skip("it keeps nothing")
    chosen, arguments = place.arguments
    with assert_clean(ignore=["shared memory *"]):
        for turn in range(2):
            env = LocalEnvironment(f"job {turn}")
            options = ServiceOptions(host=host, concurrency=None)
            store = env.register_service("store", chosen, **arguments, options=options)
            found: list[tuple[int, str]] = []

            def ingest(number: int, store: Any = store) -> int:
                store.upsert([f"id{number}"], vectors_of(1, seed=number), documents=[f"text {number}"])
                return number

            def look(number: int, store: Any = store, turn: int = turn) -> tuple[int, str]:
                first = store.search(vectors_of(1, seed=number % 10)[0], 1)[0]
                return number, first.document

            env.from_batch(range(10 * turn, 10 * turn + 10)).map(ingest).map(look).sink(found.append)
            report = env.submit(autostop=True).wait()
            assert report.service("store").state == "stopped"
            assert found == [(number, f"text {number % 10}") for number in range(10 * turn, 10 * turn + 10)]
    with place.opened() as opened:
        assert opened.count() == 20


@pytest.mark.parametrize("place", [kind for kind in KEPT if kind != "sqlite"], indirect=True)
def test_a_folder_is_for_one_store_at_a_time(place: Place) -> None:
    with place.opened() as store:
        fill(store)
        second = place.store()
        with pytest.raises(ServiceError, match=r'folder ".*store\.db" is in use by process \d+'):
            second.setup()
        second.cleanup()
        assert store.count() == 50


def test_a_store_of_this_machine_is_asked_without_a_proxy(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where the engine runs in this process and is asked through a port."""
    given = dict.fromkeys(("HTTP_PROXY", "http_proxy", "HTTPS_PROXY", "ALL_PROXY"), "http://127.0.0.1:9")
    place.store()  # a server is started before
    for name, value in given.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("NO_PROXY", "example.com")
    monkeypatch.delenv("no_proxy", raising=False)
    with place.opened() as store:
        store.upsert(["a"], [[1, 2]])
        assert [hit.id for hit in store.search([1, 2])] == ["a"]
        assert store.health()
    assert os.environ["NO_PROXY"] == "example.com"
    assert "no_proxy" not in os.environ
