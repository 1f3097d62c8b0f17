"""Vector stores in a pipeline, against the libraries under them called in a loop with the same batches."""

from __future__ import annotations

import gc
import json
import sqlite3
import tempfile
from functools import partial
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from time import perf_counter
from typing import TYPE_CHECKING, Any, Protocol

from benchmarks.measure import Figure, Scale, at_least
from sage import LocalEnvironment, ServiceOptions

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

DIMENSION = 384
INGEST_MAX, QUERY_MAX = 500, 100
"""How many chunks are written, and how many queries are asked, in one call."""

K = 10
ROUNDS_MIN = 3

FILL_S = 1.0
"""How long a batch may take to fill: more than it ever does, so that both sides have the same batches."""

Chunk = tuple[str, Any, str, dict[str, Any]]


class Side(Protocol):
    """A way to store chunks and to answer queries: opens in `ingest` and closes in `query`."""

    def ingest(self, chunks: list[Chunk]) -> None:
        """Open, and store everything."""

    def query(self, queries: list[Any], out: list[Any]) -> None:
        """Answer everything, and close."""


def stores(scale: Scale) -> Iterator[Figure]:
    """Ten thousand chunks stored and a thousand queries answered, for each store."""
    if find_spec("numpy") is None:
        print("numpy is not installed: the cases of vector stores are left out")
        return
    import numpy

    chunks = chunks_of(scale.records // 100)
    queries = list(numpy.random.default_rng(1).normal(size=(scale.records // 1_000, DIMENSION)).astype(numpy.float32))
    for name, (library, plain, module) in LIBRARIES.items():
        if find_spec(library) is None:
            print(f"{library} is not installed: its cases are left out")
            continue
        sides: Sequence[Callable[[Path], Side]] = (plain, partial(Piped, module, name))
        ratios = compared(max(scale.rounds // 3, ROUNDS_MIN), sides, chunks, queries)
        yield at_least(f"{name}: ingest", f"of the rate of {plain.word}", 0.9, [ratio for ratio, _ in ratios])
        yield at_least(f"{name}: queries", f"of the rate of {plain.word}", 0.9, [ratio for _, ratio in ratios])


def compared(
    rounds: int, sides: Sequence[Callable[[Path], Side]], chunks: list[Chunk], queries: list[Any]
) -> list[tuple[float, float]]:
    """Return for each round the rates of the second side as parts of the first one's: of storing, and of answering.

    They take turns and begin each round in the other order; a first round is not counted.
    """
    ratios = []
    for number in range(rounds + 1):
        taken: dict[int, tuple[float, float]] = {}
        answers: list[int] = []
        for place in (0, 1) if number % 2 == 0 else (1, 0):
            with tempfile.TemporaryDirectory(prefix="sage-benchmarks-") as folder:
                out: list[Any] = []
                side = sides[place](Path(folder, "store"))
                taken[place] = seconds(partial(side.ingest, chunks)), seconds(partial(side.query, queries, out))
                answers.append(len(out))
        assert answers == [len(queries)] * 2, f"some queries have no answer: {answers}"
        ratios.append((taken[0][0] / taken[1][0], taken[0][1] / taken[1][1]))
    return ratios[1:]


def seconds(work: Callable[[], None]) -> float:
    gc.collect()
    began_at = perf_counter()
    work()
    return perf_counter() - began_at


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
        self._storing, self._storing_store = self._job("storing")
        self._answering, self._answering_store = self._job("answering")

    def _job(self, name: str) -> tuple[LocalEnvironment, Any]:
        env = LocalEnvironment(name)
        options = ServiceOptions(shared=True, concurrency=None)
        return env, env.register_service("store", self._chosen, *self._arguments, options=options)

    def ingest(self, chunks: list[Chunk]) -> None:
        """Store everything by `map_batches`, and leave the store open."""
        stored: list[Any] = []

        def put(batch: list[Chunk]) -> list[Chunk]:
            ids, vectors, texts, metadatas = columns(batch)
            self._storing_store.upsert(ids, vectors, documents=texts, metadatas=metadatas)
            return batch

        stream = self._storing.from_batch(chunks).map_batches(put, max_records=INGEST_MAX, max_wait_s=FILL_S)
        stream.sink(stored.append)
        self._storing.submit(autostop=True, keep_services=True)
        assert len(stored) == len(chunks)

    def query(self, queries: list[Any], out: list[Any]) -> None:
        """Answer everything by `map_batches`, and close the store."""
        import numpy

        def search(batch: list[Any]) -> Any:
            return self._answering_store.search_batch(numpy.array(batch), K)

        stream = self._answering.from_batch(queries).map_batches(search, max_records=QUERY_MAX, max_wait_s=FILL_S)
        stream.sink(out.append)
        self._answering.submit(autostop=True)
        self._storing.close()


class Plain:
    """What a program without SAGE would do with numpy: a matrix, and lists beside it."""

    word = "numpy"

    def __init__(self, path: Path) -> None:
        self.path = path

    def ingest(self, chunks: list[Chunk]) -> None:
        """Copy vectors into a matrix."""
        import numpy

        self.rows: list[tuple[str, str, dict[str, Any]]] = []
        self.vectors = numpy.empty((0, DIMENSION), dtype=numpy.float32)
        for batch in batches(chunks, INGEST_MAX):
            self.keep(*columns(batch))

    def keep(self, ids: list[str], vectors: Any, texts: list[str], metadatas: list[dict[str, Any]]) -> None:
        import numpy

        count = len(self.rows)
        if count + len(ids) > len(self.vectors):
            grown = numpy.empty((2 * (count + len(ids)), DIMENSION), dtype=numpy.float32)
            grown[:count] = self.vectors[:count]
            self.vectors = grown
        lengths = numpy.linalg.norm(vectors, axis=1, keepdims=True)
        self.vectors[count : count + len(ids)] = vectors / lengths
        self.rows += zip(ids, texts, metadatas, strict=True)

    def query(self, queries: list[Any], out: list[Any]) -> None:
        """Compare with every vector."""
        import numpy

        rows, vectors = self.rows, self.vectors[: len(self.rows)]
        for batch in batches(queries, QUERY_MAX):
            asked = numpy.array(batch)
            scores = (asked / numpy.linalg.norm(asked, axis=1, keepdims=True)) @ vectors.T
            best = numpy.argpartition(-scores, K - 1, axis=1)[:, :K]
            found = numpy.take_along_axis(scores, best, axis=1)
            for places, values in zip(best.tolist(), found.tolist(), strict=True):
                order = sorted(zip(values, places, strict=True), reverse=True)
                out.append([(score, *rows[place]) for score, place in order])


class PlainSqlite(Plain):
    """The same, with a row in SQLite for each chunk: one transaction for each batch, as safe as that of the store."""

    word = "sqlite3 and numpy"

    def ingest(self, chunks: list[Chunk]) -> None:
        """Write each batch, and copy it into the matrix."""
        self._database = sqlite3.connect(self.path, isolation_level=None)
        self._database.execute("PRAGMA journal_mode = WAL")
        self._database.execute("PRAGMA synchronous = NORMAL")
        self._database.execute("CREATE TABLE chunks (id TEXT PRIMARY KEY, vector BLOB, text TEXT, metadata TEXT)")
        super().ingest(chunks)

    def query(self, queries: list[Any], out: list[Any]) -> None:
        """Compare with every vector, and close the file."""
        super().query(queries, out)
        self._database.close()

    def keep(self, ids: list[str], vectors: Any, texts: list[str], metadatas: list[dict[str, Any]]) -> None:
        self._database.execute("BEGIN IMMEDIATE")
        rows = zip(ids, (vector.tobytes() for vector in vectors), texts, map(json.dumps, metadatas), strict=True)
        self._database.executemany("INSERT OR REPLACE INTO chunks VALUES (?, ?, ?, ?)", rows)
        self._database.execute("COMMIT")
        super().keep(ids, vectors, texts, metadatas)


class PlainChroma:
    """The client of Chroma, embedded."""

    word = "chromadb"

    def __init__(self, path: Path) -> None:
        self._path = path

    def ingest(self, chunks: list[Chunk]) -> None:
        """Upsert each batch."""
        import chromadb

        settings = chromadb.Settings(anonymized_telemetry=False)
        self._client = chromadb.PersistentClient(path=self._path, settings=settings)
        space: Any = {"hnsw": {"space": "cosine"}}
        self._collection = self._client.create_collection("chunks", embedding_function=None, configuration=space)
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
        self._client.close()


class PlainMilvus:
    """The client of Milvus Lite."""

    word = "pymilvus"

    def __init__(self, path: Path) -> None:
        self._path = str(path.with_suffix(".db"))

    def ingest(self, chunks: list[Chunk]) -> None:
        """Upsert each batch."""
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
        for batch in batches(chunks, INGEST_MAX):
            rows = [dict(zip(("id", "vector", "text", "metadata"), chunk, strict=True)) for chunk in batch]
            self._client.upsert("chunks", rows)

    def query(self, queries: list[Any], out: list[Any]) -> None:
        """Ask each batch at once, after a flush."""
        from milvus_lite.server_manager import server_manager_instance

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
        self._client.close()
        server_manager_instance.release_server(self._path)


LIBRARIES: dict[str, tuple[str, Any, str]] = {
    "NumpyStore": ("numpy", Plain, "numpy_store"),
    "SqliteStore": ("numpy", PlainSqlite, "sqlite_store"),
    "ChromaStore": ("chromadb", PlainChroma, "chroma"),
    "MilvusStore": ("milvus_lite", PlainMilvus, "milvus"),
}
"""What each store needs, what it is compared with, and where it is."""
