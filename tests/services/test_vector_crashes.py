"""What vector stores keep when the program is killed or the disk is full, and what they say of it."""

from __future__ import annotations

import json
import os
from typing import TYPE_CHECKING

import numpy as np
import pytest
from services.kept import killed_after, output_of, program
from support.vector_stores import KEPT, Place, ids_of, vectors_of

if TYPE_CHECKING:
    from pathlib import Path

ROWS = 50

# How a store of each kind is made, and what a batch of it is, also by programs of their own.
MADE = """
import json, logging, os, resource, signal, sys
from sage import LocalEnvironment
from sage.errors import ServiceError
from sage.services.vectors.chroma import ChromaStore
from sage.services.vectors.milvus import MilvusStore
from sage.services.vectors.sqlite import SqliteStore
from support.vector_stores import vectors_of

kind, path = sys.argv[1:3]
made = {"sqlite": SqliteStore, "chroma": ChromaStore, "milvus": MilvusStore}[kind]

def batch_of(number, rows=50):
    return [f"{number}-{row}" for row in range(rows)], vectors_of(rows, 64, seed=number)

def write(store, number):
    ids, vectors = batch_of(number)
    store.upsert(ids, vectors, documents=[f"text {one} " * 20 for one in ids])
    return number
"""

INGEST = (
    MADE
    + """
import itertools

env = LocalEnvironment("ingest")
store = env.register_service("store", made, path)
different = int(sys.argv[3])

def ingest(numbers):
    written = [write(store, number % different) for number in numbers]
    print(*written, sep="\\n", flush=True)  # here, as results may go on together
    return written

numbers = env.from_batch(itertools.count())
numbers.map_batches(ingest, max_records=1).sink(lambda number: None)
env.submit(autostop=True)
"""
)


@pytest.fixture(params=KEPT)
def kind(request: pytest.FixtureRequest) -> str:
    name: str = request.param
    return name


@pytest.fixture
def kept(kind: str, tmp_path: Path, servers: object) -> Place:
    """The place of a store of programs that end, as seen from here."""
    return Place(kind, tmp_path, servers)  # type: ignore[arg-type]


def whole(store: object, numbers: range) -> list[int]:
    """Return how many rows of each batch are there, each with its own vector."""
    found = []
    for number in numbers:
        entries = store.get([f"{number}-{row}" for row in range(ROWS)])  # type: ignore[attr-defined]
        there = [(row, entry.vector) for row, entry in enumerate(entries) if entry is not None]
        vectors = vectors_of(ROWS, 64, seed=number)
        assert all(np.allclose(vector, vectors[row], atol=1e-4) for row, vector in there)
        found.append(len(there))
    return found


ALL_DIFFERENT = 1_000_000


@pytest.mark.parametrize("batches", [1, 60])
def test_a_program_that_is_killed_loses_at_most_the_batch_in_flight(
    kind: str, kept: Place, batches: int, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    said = killed_after(batches, INGEST, kind, str(kept.path), str(ALL_DIFFERENT), folder=tmp_path)
    assert list(map(int, said)) == list(range(len(said)))
    with kept.opened(collection="default") as store:
        assert "was not closed: what was being written then may be missing" in caplog.text
        caplog.clear()
        counts = whole(store, range(len(said) + 2))
        assert counts[: len(said)] == [ROWS] * len(said)
        assert counts[-1] == 0
        assert store.count() == sum(counts)
        hits = store.search_batch(vectors_of(ROWS, 64, seed=len(said) - 1), 1)
        assert [hit.id for hit, *_ in hits] == [f"{len(said) - 1}-{row}" for row in range(ROWS)]
        store.upsert(ids_of(3), vectors_of(3, 64, seed=ALL_DIFFERENT))
    with kept.opened(collection="default") as store:
        assert store.count() == sum(counts) + 3
    assert "closed" not in caplog.text
    assert not (kept.path / "LOCK").exists()


def test_a_program_that_is_killed_while_it_writes_the_same_again_loses_at_most_that_batch(
    kind: str, kept: Place, tmp_path: Path
) -> None:
    said = killed_after(40, INGEST, kind, str(kept.path), "3", folder=tmp_path)
    in_flight = len(said) % 3
    with kept.opened(collection="default") as store:
        counts = whole(store, range(3))
        assert all(count == ROWS for number, count in enumerate(counts) if number != in_flight), (in_flight, counts)
        assert store.count() == sum(counts)
        for number in range(3):  # what may be missing is written again, as the next run of a pipeline does
            store.upsert([f"{number}-{row}" for row in range(ROWS)], vectors_of(ROWS, 64, seed=number))
        assert whole(store, range(3)) == [ROWS] * 3
        for number in range(3):
            hits = store.search_batch(vectors_of(ROWS, 64, seed=number), 1)
            assert [hit.id for hit, *_ in hits] == [f"{number}-{row}" for row in range(ROWS)]


def test_a_program_that_has_it_open_is_not_taken_for_one_that_was_killed(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    place = Place("sqlite", tmp_path, None)  # type: ignore[arg-type]
    with place.opened() as first:
        first.upsert(ids_of(3), vectors_of(3))
        second = place.store()
        second.setup()
        assert second.count() == 3
        second.cleanup()
    assert caplog.messages == []


FULL = (
    MADE
    + """
resource_of = resource.getrlimit(resource.RLIMIT_FSIZE)

def limit(size):
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, resource_of[1]))

def told(what, function):
    try:
        print(json.dumps([what, function()]), flush=True)
    except ServiceError as error:
        print(json.dumps([what, "failed", str(error), getattr(error, "__notes__", [])]), flush=True)

def fill():
    for number in range(1, 400):
        try:
            write(store, number)
        except ServiceError as error:
            told("error", lambda: (_ for _ in ()).throw(error))
            return number
    return "no limit"

size, end = int(sys.argv[3]), sys.argv[4]
store = made(path)
store.setup()
write(store, 0)
limit(size)
failed = fill()
told("failed", lambda: failed)
told("there", lambda: sum(entry is not None for entry in store.get([f"{failed - 1}-{row}" for row in range(50)])))
told("again", lambda: write(store, 1_000))
limit(resource_of[0])
told("more", lambda: write(store, 1_001))
told("found", lambda: [hit.id for hit in store.search(vectors_of(50, 64, seed=0)[3], 1)])
told("health", store.health)
if end == "kill":
    os.kill(os.getpid(), signal.SIGSTOP)
store.cleanup()
"""
)


def outcome(lines: list[str]) -> dict[str, list[object]]:
    found: dict[str, list[object]] = {}
    for name, *rest in map(json.loads, lines):
        found[name] = rest
    return found


@pytest.mark.parametrize("size", [60_000, 1_000_000])
@pytest.mark.parametrize("end", ["close", "kill"])
def test_a_full_disk_loses_nothing_that_was_stored(
    kind: str, kept: Place, size: int, end: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """The call that failed is told, and the store goes on when there is room again, whether or not it is closed."""
    if kind != "milvus":
        size += 400_000  # The files are as large when they are new.
    arguments = [FULL, kind, str(kept.path), str(size), end]
    lines = (
        killed_when_stopped(*arguments, folder=tmp_path) if end == "kill" else output_of(*arguments, folder=tmp_path)
    )
    told = outcome(lines)
    assert told["error"][0] == "failed"
    assert str(kept.path) in str(told["error"][1])
    assert "Is the disk full?" in str(told["error"][2])
    number = told["failed"][0]
    assert isinstance(number, int)
    assert told["there"] in ([ROWS], ["failed", *told["there"][1:]])
    assert told["more"] == [1_001]
    assert told["found"] == [["0-3"]]
    assert told["health"] == [True]
    with kept.opened(collection="default") as store:
        assert whole(store, range(number)) == [ROWS] * number
        assert whole(store, range(1_001, 1_002)) == [ROWS]
        again = whole(store, range(1_000, 1_001))
        assert again == [ROWS] or told["again"][0] == "failed"
        assert store.count() == sum(whole(store, range(number + 1))) + again[0] + ROWS
        hits = store.search_batch(vectors_of(ROWS, 64, seed=1_001), 1)
        assert [hit.id for hit, *_ in hits] == [f"1001-{row}" for row in range(ROWS)]
    assert ("was not closed" in caplog.text) == (end == "kill")


def killed_when_stopped(text: str, *words: str, folder: Path) -> list[str]:
    """Run a program until it stops itself, kill it, and return the lines it printed."""
    with program(text, *words, folder=folder) as child:
        _, status = os.waitpid(child.pid, os.WUNTRACED)
        assert os.WIFSTOPPED(status), child.communicate()
        child.kill()
        out, _ = child.communicate(timeout=30)
    return out.splitlines()
