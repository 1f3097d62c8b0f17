"""Vector stores in a pipeline, against the libraries under them called in a loop with the same batches.

Compared are the rates while records flow. What a job takes to begin and to end is the same for ten records and ten
million; it is measured by `short-jobs` and `stop`, and printed here beside the rates.
"""

from __future__ import annotations

import ctypes
import gc
import json
import sqlite3
import tempfile
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from statistics import median
from time import perf_counter
from typing import TYPE_CHECKING, Any, Protocol

from benchmarks.measure import Figure, Scale, at_least
from sage import LocalEnvironment, ServiceOptions

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from sage._runtime.job import Job

DIMENSION = 384
INGEST_MAX, QUERY_MAX = 500, 100
"""How many chunks are written, and how many queries are asked, in one call."""

K = 10

FILL_S = 1.0
"""How long a batch may take to fill: more than it ever does, so that both sides have the same batches."""

Chunk = tuple[str, Any, str, dict[str, Any]]


class Side(Protocol):
    """A way to store chunks and to answer queries."""

    def open(self) -> None:
        """Open the store."""

    def ingest(self, chunks: list[Chunk]) -> Job | None:
        """Store everything, and return the job that did it."""

    def query(self, queries: list[Any], out: list[Any]) -> Job | None:
        """Answer everything, and return the job that did it."""

    def close(self) -> None:
        """Close the store."""


@dataclass(frozen=True, slots=True)
class Taken:
    """What a side took for one thing, in seconds.

    Attributes:
        flowing_s: while records flowed.
        whole_s: with the begin and the end of the job.
    """

    flowing_s: float
    whole_s: float


def stores(scale: Scale) -> Iterator[Figure]:
    """Ten thousand chunks stored and a thousand queries answered, for each store."""
    if find_spec("numpy") is None:
        print("numpy is not installed: the cases of vector stores are left out")
        return
    import numpy

    chunks = chunks_of(scale.records // 100)
    queries = list(numpy.random.default_rng(1).normal(size=(scale.records // 1_000, DIMENSION)).astype(numpy.float32))
    for name, case in CASES.items():
        if find_spec(case.package) is None:
            print(f"{case.package} is not installed: its cases are left out")
            continue
        sides = (case.bare, partial(Piped, case.module, name), *case.others)
        rounds = compared(scale.rounds, sides, chunks, queries)
        for place, what in enumerate(("ingest", "queries")):
            plain, piped, *others = ([taken[place] for taken in side] for side in zip(*rounds, strict=True))
            rates = [one.flowing_s / other.flowing_s for one, other in zip(plain, piped, strict=True)]
            yield at_least(f"{name}: {what}", f"of the rate of {case.bare.word}", 0.9, rates)
            whole = median(one.whole_s / other.whole_s for one, other in zip(plain, piped, strict=True))
            around_s = median(one.whole_s - one.flowing_s for one in piped)
            print(f"{name}: {what}: {whole:.2f} with the {around_s * 1e3:.1f} ms in which the job begins and ends")
            for side, taken in zip(case.others, others, strict=True):
                rate = median(one.flowing_s / other.flowing_s for one, other in zip(taken, piped, strict=True))
                print(f"{name}: {what}: {rate:.2f} of the rate of {side.word}")


def compared(
    rounds: int, sides: Sequence[Callable[[Path], Side]], chunks: list[Chunk], queries: list[Any]
) -> list[list[tuple[Taken, Taken]]]:
    """Return for each round what each side took, to store and to answer.

    They take turns and begin each round in the other order; a first round is not counted.
    """
    counted = []
    for number in range(rounds + 1):
        taken: dict[int, tuple[Taken, Taken]] = {}
        for place in range(len(sides)) if number % 2 == 0 else range(len(sides) - 1, -1, -1):
            with tempfile.TemporaryDirectory(prefix="sage-benchmarks-") as folder:
                taken[place] = taken_by(sides[place](Path(folder, "store")), chunks, queries)
        counted.append([taken[place] for place in range(len(sides))])
    return counted[1:]


def taken_by(side: Side, chunks: list[Chunk], queries: list[Any]) -> tuple[Taken, Taken]:
    out: list[Any] = []
    side.open()
    ingest = taken_for(partial(side.ingest, chunks))
    answer = taken_for(partial(side.query, queries, out))
    side.close()
    assert len(out) == len(queries), f"{len(queries) - len(out)} queries have no answer"
    return ingest, answer


def taken_for(work: Callable[[], Job | None]) -> Taken:
    gc.collect()
    give_back_memory()
    began_at = perf_counter()
    job = work()
    whole_s = perf_counter() - began_at
    return Taken(whole_s if job is None else flowing(job), whole_s)


def give_back_memory() -> None:
    """Let each measurement begin with as little memory as a program that has just begun.

    What is freed stays with the thread that had it, where the C library is that of GNU. The main thread, which runs
    the loops, would write into the pages of the round before, and the thread of a task, which is new, into new ones:
    for ten thousand vectors they cost half as much as everything else.
    """
    with suppress(AttributeError):  # other systems have no such function
        ctypes.CDLL(None).malloc_trim(0)


def flowing(job: Job) -> float:
    """Return for how many seconds records flowed: from the moment when they may until the last task is through."""
    events = job.events()
    began_at = next(event.at for event in events if event.subject == "job" and event.after == "running")
    return max(event.at for event in events if event.subject == "task" and event.before == "running") - began_at


def chunks_of(count: int) -> list[Chunk]:
    """Return chunks as a splitter and a model would give them: id, vector, text and metadata."""
    import numpy

    vectors = numpy.random.default_rng(54).normal(size=(count, DIMENSION)).astype(numpy.float32)
    text = "A stop drains what is in flight, and what is left then is counted. " * 6
    return [
        (f"guide{number // 10}.md#{number % 10}", vector, f"{number}: {text}", {"document": f"guide{number // 10}.md"})
        for number, vector in enumerate(vectors)
    ]


def columns(batch: list[Chunk]) -> tuple[list[str], Any, list[str], list[dict[str, Any]]]:
    import numpy

    ids, vectors, texts, metadatas = zip(*batch, strict=True)
    return list(ids), numpy.array(vectors), list(texts), list(metadatas)


def batches(values: list[Any], size: int) -> Iterator[list[Any]]:
    for start in range(0, len(values), size):
        yield values[start : start + size]


class Piped:
    """A job that stores and a job that answers, which share the store."""

    def __init__(self, module: str, name: str, path: Path) -> None:
        self._chosen = getattr(import_module(f"sage.services.{module}"), name)
        self._arguments = () if name == "NumpyStore" else (path,)

    def open(self) -> None:
        """Register the store, which the first job opens before its records flow."""
        self._storing, self._storing_store = self._registered("storing")
        self._answering, self._answering_store = self._registered("answering")

    def _registered(self, name: str) -> tuple[LocalEnvironment, Any]:
        env = LocalEnvironment(name)
        options = ServiceOptions(shared=True, concurrency=None)
        return env, env.register_service("store", self._chosen, *self._arguments, options=options)

    def ingest(self, chunks: list[Chunk]) -> Job:
        """Store everything by `map_batches`, and leave the store open."""
        stored: list[Any] = []

        def put(batch: list[Chunk]) -> list[Chunk]:
            ids, vectors, texts, metadatas = columns(batch)
            self._storing_store.upsert(ids, vectors, documents=texts, metadatas=metadatas)
            return batch

        stream = self._storing.from_batch(chunks).map_batches(put, max_records=INGEST_MAX, max_wait_s=FILL_S)
        stream.sink(stored.append)
        job = self._storing.submit(autostop=True, keep_services=True)
        assert len(stored) == len(chunks)
        return job

    def query(self, queries: list[Any], out: list[Any]) -> Job:
        """Answer everything by `map_batches`."""
        import numpy

        def search(batch: list[Any]) -> Any:
            return self._answering_store.search_batch(numpy.array(batch), K)

        stream = self._answering.from_batch(queries).map_batches(search, max_records=QUERY_MAX, max_wait_s=FILL_S)
        stream.sink(out.append)
        return self._answering.submit(autostop=True)

    def close(self) -> None:
        """Close the store."""
        self._storing.close()


class Called:
    """The store itself, which is its own library, called in a loop."""

    word = "the store in a loop"

    def __init__(self, path: Path) -> None:
        self._path = path
        self._store: Any = None

    def made(self) -> Any:
        """Return a store that is not open."""
        from sage.services import NumpyStore

        return NumpyStore()

    def open(self) -> None:
        """Open the store."""
        self._store = self.made()
        self._store.setup()

    def ingest(self, chunks: list[Chunk]) -> None:
        """Upsert each batch."""
        for batch in batches(chunks, INGEST_MAX):
            ids, vectors, texts, metadatas = columns(batch)
            self._store.upsert(ids, vectors, documents=texts, metadatas=metadatas)

    def query(self, queries: list[Any], out: list[Any]) -> None:
        """Ask each batch at once."""
        import numpy

        for batch in batches(queries, QUERY_MAX):
            out += self._store.search_batch(numpy.array(batch), K)

    def close(self) -> None:
        """Close the store."""
        self._store.cleanup()


class CalledSqlite(Called):
    """The same in a file."""

    def made(self) -> Any:
        """Return a store that is not open."""
        from sage.services import SqliteStore

        return SqliteStore(self._path)


class Plain:
    """What a program without SAGE would write with numpy: a matrix with a row for each id, and nothing is checked."""

    word = "a matrix by hand"

    def __init__(self, path: Path) -> None:
        self.path = path

    def open(self) -> None:
        """Begin with nothing."""
        import numpy

        self.places: dict[str, int] = {}
        self.rows: dict[str, tuple[str, dict[str, Any]]] = {}
        self.vectors = numpy.empty((0, DIMENSION), dtype=numpy.float32)

    def ingest(self, chunks: list[Chunk]) -> None:
        """Keep each batch."""
        for batch in batches(chunks, INGEST_MAX):
            self.keep(*columns(batch))

    def keep(self, ids: list[str], vectors: Any, texts: list[str], metadatas: list[dict[str, Any]]) -> None:
        """Upsert a batch, as the other libraries do: an id that is written again has its new row."""
        import numpy

        places = [self.places.setdefault(one, len(self.places)) for one in ids]
        if len(self.places) > len(self.vectors):
            grown = numpy.empty((4 * len(self.places), DIMENSION), dtype=numpy.float32)
            grown[: len(self.vectors)] = self.vectors
            self.vectors = grown
        self.vectors[places] = vectors / numpy.linalg.norm(vectors, axis=1, keepdims=True)
        self.rows.update(zip(ids, zip(texts, metadatas, strict=True), strict=True))

    def query(self, queries: list[Any], out: list[Any]) -> None:
        """Compare with every vector."""
        import numpy

        rows, vectors = list(self.rows.items()), self.vectors[: len(self.rows)]
        for batch in batches(queries, QUERY_MAX):
            asked = numpy.array(batch)
            scores = (asked / numpy.linalg.norm(asked, axis=1, keepdims=True)) @ vectors.T
            best = numpy.argpartition(-scores, K - 1, axis=1)[:, :K]
            found = numpy.take_along_axis(scores, best, axis=1)
            for places, values in zip(best.tolist(), found.tolist(), strict=True):
                order = sorted(zip(values, places, strict=True), reverse=True)
                out.append([(score, *rows[place]) for score, place in order])

    def close(self) -> None:
        """Nothing is left to close."""


class PlainSqlite(Plain):
    """The same, with a row in SQLite for each chunk: one transaction for each batch, as safe as that of the store."""

    word = "sqlite3 and a matrix by hand"

    def open(self) -> None:
        """Open the file."""
        super().open()
        self._database = sqlite3.connect(self.path, isolation_level=None)
        self._database.execute("PRAGMA journal_mode = WAL")
        self._database.execute("PRAGMA synchronous = NORMAL")
        self._database.execute("CREATE TABLE chunks (id TEXT PRIMARY KEY, vector BLOB, text TEXT, metadata TEXT)")

    def keep(self, ids: list[str], vectors: Any, texts: list[str], metadatas: list[dict[str, Any]]) -> None:
        """Write a batch, and keep it in memory, where it is searched."""
        self._database.execute("BEGIN IMMEDIATE")
        rows = zip(ids, (vector.tobytes() for vector in vectors), texts, map(json.dumps, metadatas), strict=True)
        self._database.executemany("INSERT OR REPLACE INTO chunks VALUES (?, ?, ?, ?)", rows)
        self._database.execute("COMMIT")
        super().keep(ids, vectors, texts, metadatas)

    def close(self) -> None:
        """Close the file."""
        self._database.close()


class PlainChroma:
    """The client of Chroma, embedded."""

    word = "chromadb"

    def __init__(self, path: Path) -> None:
        self._path = path

    def open(self) -> None:
        """Open the folder, and make a collection."""
        import chromadb

        settings = chromadb.Settings(anonymized_telemetry=False)
        self._client = chromadb.PersistentClient(path=self._path, settings=settings)
        space: Any = {"hnsw": {"space": "cosine"}}
        self._collection = self._client.create_collection("chunks", embedding_function=None, configuration=space)

    def ingest(self, chunks: list[Chunk]) -> None:
        """Upsert each batch."""
        for batch in batches(chunks, INGEST_MAX):
            ids, vectors, texts, metadatas = columns(batch)
            self._collection.upsert(ids=ids, embeddings=vectors, documents=texts, metadatas=metadatas)  # type: ignore[arg-type]

    def query(self, queries: list[Any], out: list[Any]) -> None:
        """Ask each batch at once."""
        import numpy

        for batch in batches(queries, QUERY_MAX):
            found = self._collection.query(
                query_embeddings=numpy.array(batch), n_results=K, include=["metadatas", "documents", "distances"]
            )
            out += found["ids"]

    def close(self) -> None:
        """Close the folder."""
        self._client.close()


class PlainMilvus:
    """The client of Milvus Lite."""

    word = "pymilvus"

    def __init__(self, path: Path) -> None:
        self._path = str(path.with_suffix(".db"))

    def open(self) -> None:
        """Open the file, and make a collection."""
        from pymilvus import DataType, MilvusClient

        self._client = MilvusClient(self._path)
        schema = self._client.create_schema(auto_id=False, enable_dynamic_field=False)
        schema.add_field("id", DataType.VARCHAR, max_length=65_535, is_primary=True)
        schema.add_field("vector", DataType.FLOAT_VECTOR, dim=DIMENSION)
        schema.add_field("text", DataType.VARCHAR, max_length=65_535)
        schema.add_field("metadata", DataType.JSON)
        index = self._client.prepare_index_params()
        index.add_index("vector", index_type="FLAT", metric_type="COSINE")
        self._client.create_collection("chunks", schema=schema, index_params=index, consistency_level="Strong")

    def ingest(self, chunks: list[Chunk]) -> None:
        """Upsert each batch."""
        for batch in batches(chunks, INGEST_MAX):
            rows = [dict(zip(("id", "vector", "text", "metadata"), chunk, strict=True)) for chunk in batch]
            self._client.upsert("chunks", rows)

    def query(self, queries: list[Any], out: list[Any]) -> None:
        """Ask each batch at once, after a flush."""
        self._client.flush("chunks")
        for batch in batches(queries, QUERY_MAX):
            answers = self._client.search(
                "chunks",
                data=batch,
                limit=K,
                output_fields=["text", "metadata"],
                search_params={"metric_type": "COSINE"},
            )
            # Nothing of a hit is decoded before it is read, as a program does that uses it.
            out += [[(hit["id"], hit["distance"], hit["text"], hit["metadata"]) for hit in hits] for hits in answers]

    def close(self) -> None:
        """Close the file, and the server of Milvus Lite behind it."""
        from milvus_lite.server_manager import server_manager_instance

        self._client.close()
        server_manager_instance.release_server(self._path)


@dataclass(frozen=True, slots=True)
class Case:
    """What a store is compared with.

    Attributes:
        package: what has to be installed.
        module: where the store is.
        bare: the library under the store, whose rate is the measure.
        others: what is shown beside it.
    """

    package: str
    module: str
    bare: Any
    others: tuple[Any, ...] = ()


CASES = {
    "NumpyStore": Case("numpy", "numpy_store", Called, (Plain,)),
    "SqliteStore": Case("numpy", "sqlite_store", CalledSqlite, (PlainSqlite,)),
    "ChromaStore": Case("chromadb", "chroma", PlainChroma),
    "MilvusStore": Case("milvus_lite", "milvus", PlainMilvus),
}
