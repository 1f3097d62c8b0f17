"""The RAG application in a pipeline, from files to answers, against plain loops over the same functions."""

from __future__ import annotations

import json
from contextlib import ExitStack
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmarks.measure import Figure, Scale, alternated, at_least
from sage import LocalEnvironment, ServiceOptions
from sage.rag import Files, Generate, Index, KeywordIndex, Load, Question, Retrieve, SplitByStructure
from sage.services import ExtractiveLLM, HashingEmbeddings, NumpyStore

if TYPE_CHECKING:
    from collections.abc import Iterator

EXAMPLE = Path(__file__).resolve().parents[1] / "examples" / "rag"
PLACES = (EXAMPLE.parents[1] / "docs", EXAMPLE / "fables.md")
INDEX_MAX, ASK_MAX = 64, 16
"""How many passages are stored, and how many questions are searched for, in one call."""

TOP = 4
FILL_S = 1.0
ROUNDS_MIN = 3

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
        files, load, split = Files(*PLACES), Load(), SplitByStructure()
        files.open()
        stack.callback(files.close)
        passages = []
        while (found := files.read(64)) is not None:
            for raw in found:
                for document in load.execute(raw):
                    passages += split.execute(document)
        index = Index(**services)
        for start in range(0, len(passages), INDEX_MAX):
            index.execute(passages[start : start + INDEX_MAX])
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
