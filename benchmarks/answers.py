"""The RAG application in a pipeline, from files to answers, against plain loops over the same functions."""

from __future__ import annotations

import json
import random
from contextlib import ExitStack
from importlib.util import find_spec
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

from benchmarks.measure import Figure, Scale, alternated, at_least
from sage import LocalEnvironment, ServiceOptions
from sage.rag import Files, Generate, Index, KeywordIndex, Load, Question, Retrieve, SplitByStructure
from sage.services import ExtractiveLLM, HashingEmbeddings, NumpyStore, SqliteStore

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from sage.rag import Passage

EXAMPLE = Path(__file__).resolve().parents[1] / "examples" / "rag"
PLACES = (EXAMPLE.parents[1] / "docs", EXAMPLE / "fables.md")
INDEX_MAX, ASK_MAX = 64, 16
"""How many passages are stored, and how many questions are searched for, in one call."""

TOP = 4
FILL_S = 1.0
ROUNDS_MIN = 3
RECORDS_PER_FILE = 500
PARTS_MAX = 12

Answer = tuple[str, str]


def questions() -> list[str]:
    with (EXAMPLE / "questions.jsonl").open(encoding="utf-8") as file:
        return [json.loads(line)["question"] for line in file]


def answers(scale: Scale) -> Iterator[Figure]:
    """Index the documentation and answer two hundred questions about it."""
    if find_spec("numpy") is None:
        print("numpy is not installed: the case of the RAG application is left out")
        return
    asked = questions()
    by_hand, piped = by_loops(asked), by_sage(asked)
    assert sorted(by_hand) == sorted(piped), "the pipeline gives other answers than the loops"
    rounds = max(scale.rounds // 2, ROUNDS_MIN)
    taken = alternated(rounds, lambda: by_loops(asked), lambda: by_sage(asked))
    ratios = [seconds[0] / seconds[1] for seconds in taken]
    yield at_least("RAG: index the docs, 200 answers", "of plain loops", 0.9, ratios)


def by_loops(asked: list[str]) -> list[Answer]:
    """What a program without a runtime would do with the same classes."""
    services: dict[str, Any] = {
        "keywords": KeywordIndex(),
        "vectors": NumpyStore(),
        "embeddings": HashingEmbeddings(),
    }
    llm = ExtractiveLLM()
    with ExitStack() as stack:
        for service in [*services.values(), llm]:
            for hook in ("setup", "start"):
                getattr(service, hook, int)()
            for hook in ("cleanup", "stop"):
                stack.callback(getattr(service, hook, int))
        index_by_loops(PLACES, services)
        retrieve, generate = Retrieve(TOP, **services), Generate(llm)
        out = []
        for start in range(0, len(asked), ASK_MAX):
            batch = [Question(text) for text in asked[start : start + ASK_MAX]]
            for retrieved in retrieve.execute(batch):
                answer = generate.execute(retrieved)
                out.append((answer.question.text, answer.text))
        return out


def by_sage(asked: list[str]) -> list[Answer]:
    """The same as two jobs, of which the second one uses the services of the first."""
    shared = ServiceOptions(shared=True, concurrency=None)
    classes = {"keywords": KeywordIndex, "vectors": NumpyStore, "embeddings": HashingEmbeddings}

    def registered(env: LocalEnvironment) -> dict[str, Any]:
        return {name: env.register_service(name, cls, options=shared) for name, cls in classes.items()}

    out: list[Answer] = []
    with LocalEnvironment("index") as indexing, LocalEnvironment("answer") as answering:
        services = registered(indexing)
        passages = indexing.from_batch(Files, *PLACES).flatmap(Load).flatmap(SplitByStructure)
        stored = passages.map_batches(Index(**services), max_records=INDEX_MAX, max_wait_s=FILL_S)
        stored.sink(lambda _: None)
        indexing.submit(autostop=True, keep_services=True)
        services = registered(answering)
        llm = answering.register_service("llm", ExtractiveLLM, options=ServiceOptions(concurrency=None))
        retrieved = answering.from_batch(asked).map_batches(
            Retrieve(TOP, **services), max_records=ASK_MAX, max_wait_s=FILL_S
        )
        retrieved.map(Generate, llm).sink(lambda answer: out.append((answer.question.text, answer.text)))
        answering.submit(autostop=True)
    return out


def index_by_loops(places: Sequence[Path], services: dict[str, Any]) -> int:
    """Store the passages of files and return how many there are."""
    files, load, split = Files(*places), Load(), SplitByStructure()
    passages: list[Passage] = []
    files.open()
    while (found := files.read(64)) is not None:
        for raw in found:
            for document in load.execute(raw):
                passages += split.execute(document)
    files.close()
    index = Index(**services)
    for start in range(0, len(passages), INDEX_MAX):
        index.execute(passages[start : start + INDEX_MAX])
    return len(passages)


def ingest(scale: Scale) -> Iterator[Figure]:
    """Read files of several formats into a keyword index and a vector store on the disk, with hashed vectors."""
    if find_spec("numpy") is None or find_spec("lxml") is None:
        print("numpy or lxml is not installed: the case of reading files is left out")
        return
    count = scale.records // RECORDS_PER_FILE
    with TemporaryDirectory() as name:
        folder = Path(name, "files")
        make_files(folder, count)
        numbers = iter(range(1_000))

        def fresh() -> dict[str, tuple[type[Any], Path]]:
            number = next(numbers)
            return {
                "keywords": (KeywordIndex, Path(name, f"words{number}.db")),
                "vectors": (SqliteStore, Path(name, f"vectors{number}.db")),
            }

        def by_hand() -> int:
            services = {key: cls(path) for key, (cls, path) in fresh().items()}
            services["embeddings"] = HashingEmbeddings()
            with ExitStack() as stack:
                for service in services.values():
                    service.setup()
                    stack.callback(service.cleanup)
                return index_by_loops([folder], services)

        def piped() -> int:
            out: list[str] = []
            env = LocalEnvironment("ingest")
            services = {key: env.register_service(key, cls, path) for key, (cls, path) in fresh().items()}
            services["embeddings"] = env.register_service("embeddings", HashingEmbeddings)
            passages = env.from_batch(Files, folder).flatmap(Load).flatmap(SplitByStructure)
            stored = passages.map_batches(Index(**services), max_records=INDEX_MAX, max_wait_s=FILL_S)
            stored.sink(lambda passage: out.append(passage.id))
            env.submit(autostop=True)
            return len(out)

        assert by_hand() == piped(), "the pipeline stores other passages than the loops"
        taken = alternated(ROUNDS_MIN, by_hand, piped)
    loops_s, sage_s = (median(side) for side in zip(*taken, strict=True))
    print(f"{count:,} files in {sage_s:.2f} s, by plain loops in {loops_s:.2f} s")
    ratios = [seconds[0] / seconds[1] for seconds in taken]
    yield at_least(f"RAG: ingest of {count:,} files", "of plain loops", 0.9, ratios)


def make_files(folder: Path, count: int) -> None:
    """Write as many files of Markdown, text, HTML, separated values and JSON Lines, the same ones each time."""
    pages = sorted(EXAMPLE.parents[1].joinpath("docs").rglob("*.md"))
    parts = [part for page in pages for part in page.read_text(encoding="utf-8").split("\n\n")]
    chosen = random.Random(7)
    folder.mkdir()
    for number in range(count):
        few = chosen.sample(parts, chosen.randint(3, PARTS_MAX))
        rows = [{"id": place, "text": part, "year": 2000 + place} for place, part in enumerate(few)]
        kind, text = (
            ("md", "\n\n".join(f"## Part {place}\n\n{part}" for place, part in enumerate(few))),
            ("txt", "\n\n".join(few)),
            ("html", "".join(f"<h2>Part {row['id']}</h2><p>{row['text']}</p>" for row in rows)),
            ("csv", "year,words\n" + "\n".join(f"{row['year']},{len(few[row['id']].split())}" for row in rows)),
            ("jsonl", "\n".join(map(json.dumps, rows))),
        )[number % 5]
        folder.joinpath(f"{number}.{kind}").write_text(text, encoding="utf-8")
