"""Records that a store cannot take: the error names the record, and the rest goes on by the policy of the operator."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from support.vector_stores import vectors_of

from sage import DeadLetter, FunctionError, JobErrorGroup, LocalEnvironment, ServiceOptions
from sage.testing import assert_clean

if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import TypeAlias

    from support.vector_stores import Place

    from sage.services.vectors.contract import VectorStore

    Made: TypeAlias = tuple[type[VectorStore], dict[str, Any]]

DIMENSION = 8


def records() -> list[tuple[str, Any]]:
    """Return vectors with their ids, every other one of which no store can take."""
    good = vectors_of(4, DIMENSION)
    holed = good[0].copy()
    holed[3] = np.nan
    return [
        ("good0", good[0]),
        ("short", good[0][:5]),
        ("good1", good[1]),
        ("holed", holed),
        ("good2", good[2]),
        ("", good[2]),
        ("good3", good[3]),
        ("empty", np.zeros(DIMENSION)),
    ]


def problems(name: str) -> dict[str, str]:
    """Return what is said of each bad record of a collection."""
    return {
        "short": f"collection \"{name}\" has vectors of dimension 8, not 5, from id 'short' on",
        "holed": "the vector of id 'holed' has a value that is not finite",
        "": "id 0 is '', which is empty",
        "empty": "the vector of id 'empty' is all zeros and has no cosine",
    }


@pytest.fixture
def made(place: Place) -> Made:
    """Return how the store is made; a server is started by the first who asks."""
    return place.arguments


def ingest(env: LocalEnvironment, made: Made) -> Callable[[tuple[str, Any]], str]:
    chosen, arguments = made
    store = env.register_service("store", chosen, **arguments, options=ServiceOptions(concurrency=None))

    def put(record: tuple[str, Any]) -> str:
        store.upsert([record[0]], [record[1]])
        (hit,) = store.search(record[1], 1)
        return str(hit.id)

    return put


def test_the_rest_goes_on(place: Place, made: Made) -> None:
    letters: list[DeadLetter] = []
    arrived: list[str] = []
    with assert_clean(ignore=["shared memory *"]):
        env = LocalEnvironment("bad vectors")
        failed = env.dead_letters("failed")
        env.from_batch(records()).map(ingest(env, made), name="ingest", on_error=failed).sink(arrived.append)
        failed.sink(letters.append)
        report = env.submit(autostop=True).wait()
    assert arrived == ["good0", "good1", "good2", "good3"]
    assert {letter.value[0]: str(letter.error) for letter in letters} == problems(place.name)
    assert report.service("store").state == "stopped"


def test_it_is_skipped_and_counted(made: Made) -> None:
    arrived: list[str] = []
    with assert_clean(ignore=["shared memory *"]):
        env = LocalEnvironment("bad vectors")
        env.from_batch(records()).map(ingest(env, made), name="ingest", on_error="skip").sink(arrived.append)
        report = env.submit(autostop=True).wait()
    assert arrived == ["good0", "good1", "good2", "good3"]
    assert report.operator("ingest").failed == 4


def test_without_a_policy_the_job_fails_and_names_the_record(made: Made) -> None:
    arrived: list[str] = []
    with assert_clean(ignore=["shared memory *"]):
        env = LocalEnvironment("bad vectors")
        env.from_batch(records()).map(ingest(env, made), name="ingest").sink(arrived.append)
        with pytest.raises((FunctionError, JobErrorGroup)) as caught:
            env.submit(autostop=True)
    assert arrived in ([], ["good0"])
    said = f"{caught.value} {caught.value.__cause__}"
    assert 'operator "ingest"' in said
    assert "'short'" in said


def test_a_batch_fails_as_a_whole_and_the_next_one_goes_on(place: Place, made: Made) -> None:
    letters: list[DeadLetter] = []
    arrived: list[str] = []
    with assert_clean(ignore=["shared memory *"]):
        env = LocalEnvironment("bad batches")
        chosen, arguments = made
        store = env.register_service("store", chosen, **arguments, options=ServiceOptions(concurrency=None))

        def put(batch: list[tuple[str, Any]]) -> list[str]:
            ids = [one for one, _ in batch]
            store.upsert(ids, [vector for _, vector in batch])
            return [one for one, entry in zip(ids, store.get(ids), strict=True) if entry is not None]

        good = [(f"good{number}", vector) for number, vector in enumerate(vectors_of(6, DIMENSION))]
        batches = [*good[:2], good[2], records()[3], *good[3:5]]
        failed = env.dead_letters("failed")
        env.from_batch(batches).map_batches(put, max_records=2, name="ingest", on_error=failed).sink(arrived.append)
        failed.sink(letters.append)
        env.submit(autostop=True)
    assert arrived == ["good0", "good1", "good3", "good4"]
    assert [letter.value[0] for letter in letters] == ["good2", "holed"]
    assert {str(letter.error) for letter in letters} == {problems(place.name)["holed"]}
