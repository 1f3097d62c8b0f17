"""Measure how well keywords, vectors and both fused find the passages that answer the labelled questions.

The documents are a copy of the documentation of version 0.1 in corpus/, so that figures stay comparable while the
documentation changes. Each line of questions.jsonl has a question, the document that answers it, and a quote: the
passage with the quote is the one to be found. A label is left out and counted if no single passage has its quote.

`--half` takes every other label: settings were chosen with the odd lines, so the even ones show how they do on
questions that they were not chosen for.
"""

import argparse
import json
from collections import defaultdict
from collections.abc import Iterator
from functools import partial
from pathlib import Path

from ask import EMBEDDINGS, WEIGHTS

from sage import LocalEnvironment, ProcessFunction
from sage.rag import Evaluate, Files, Index, KeywordIndex, Load, Passage, Question, Retrieve, Scores, SplitByStructure
from sage.services import NumpyStore

HERE = Path(__file__).resolve().parent
DOCS = HERE / "corpus" / "docs"
MARK, MARK_END = "<!-- quality -->", "<!-- end of quality -->"
HALVES = {"odd": slice(0, None, 2), "even": slice(1, None, 2), "all": slice(None)}
SHOWN = [("minilm", "odd"), ("minilm", "even"), ("minilm", "all"), ("hashing", "all")]
"""What stands on the page: embeddings, and lines of the labels."""


class Ask(ProcessFunction):
    """Takes in the passages; when it has them all, emits the questions whose labels hold."""

    def __init__(self, labels: list[dict[str, str]]) -> None:
        self.labels = labels
        self.texts: defaultdict[str, dict[str, str]] = defaultdict(dict)

    def execute(self, data: Passage) -> None:
        self.texts[data.document][data.id] = " ".join(data.text.split())

    def finish(self) -> Iterator[Question]:
        for label in self.labels:
            quote = " ".join(label["quote"].split())
            found = frozenset(id_ for id_, text in self.texts[label["document"]].items() if quote in text)
            if len(found) == 1:
                yield Question(label["question"], expected=found)


def labels_of(half: str) -> list[dict[str, str]]:
    """Return the labels, or every other one."""
    lines = (HERE / "questions.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line) for line in lines[HALVES[half]]]


def measure(labels: list[dict[str, str]], embeddings: str, k: int, weights: tuple[float, float]) -> dict[str, Scores]:
    """Return the scores of each way to find passages."""
    scores: dict[str, Scores] = {}
    env = LocalEnvironment("measure retrieval")
    keywords = env.register_service("keywords", KeywordIndex)
    vectors = env.register_service("vectors", NumpyStore)
    model = env.register_service("embeddings", EMBEDDINGS[embeddings])
    asked = (
        env.from_batch(Files, DOCS, HERE / "fables.md", name="files")
        .flatmap(Load, name="load")
        .flatmap(SplitByStructure, name="split")
        .map_batches(Index, keywords=keywords, vectors=vectors, embeddings=model, max_records=64, name="index")
        .process(Ask, labels, name="ask")
    )
    ways = {
        "keywords": Retrieve(k, keywords=keywords),
        "vectors": Retrieve(k, vectors=vectors, embeddings=model),
        "hybrid": Retrieve(k, keywords=keywords, vectors=vectors, embeddings=model, weights=weights),
    }
    for name, way in ways.items():
        found = asked.map_batches(way, max_records=64, name=name)
        found.process(Evaluate, k, name=f"score {name}").sink(partial(scores.__setitem__, name))
    env.run()
    return {name: scores[name] for name in ways}


def table(scores: dict[str, Scores], labels: int, k: int) -> str:
    """Return the scores as a table of Markdown."""
    asked = next(iter(scores.values())).questions
    lines = [f"{asked} questions, {labels - asked} labels left out", "", f"| way | recall@{k} | MRR |", "|---|---|---|"]
    lines += [f"| {name} | {each.recall or 0:.3f} | {each.mrr or 0:.3f} |" for name, each in scores.items()]
    return "\n".join(lines)


def put_into(page: Path, text: str) -> None:
    """Replace what stands between the marks of a page.

    Raises:
        SystemExit: it has none.
    """
    before, found, rest = page.read_text(encoding="utf-8").partition(MARK)
    _, closed, after = rest.partition(MARK_END)
    if not found or not closed:
        raise SystemExit(f"{page} has no lines {MARK} and {MARK_END}")
    page.write_text(f"{before}{MARK}\n\n{text}\n\n{MARK_END}{after}", encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description="Measure how well passages are found.")
    parser.add_argument("--embeddings", choices=EMBEDDINGS, default="minilm", help="what turns texts into vectors")
    parser.add_argument("--half", choices=HALVES, default="all", help="which lines of the labels")
    parser.add_argument("--weight", type=float, help="of the vectors, where keywords have 1; that of the application")
    parser.add_argument("--top", type=int, default=5, help="how many passages of each question count")
    parser.add_argument("--page", type=Path, help="put tables of every embeddings into this page")
    options = parser.parse_args()
    tables = []
    for embeddings, half in SHOWN if options.page else [(options.embeddings, options.half)]:
        labels = labels_of(half)
        weights = WEIGHTS[embeddings] if options.weight is None else (1.0, options.weight)
        scores = measure(labels, embeddings, options.top, weights)
        lines = "" if half == "all" else f", {half} lines"
        tables.append(f"`{EMBEDDINGS[embeddings].__name__}`{lines}, {table(scores, len(labels), options.top)}")
    if options.page:
        put_into(options.page, "\n\n".join(tables))
    print("\n\n".join(tables))


if __name__ == "__main__":
    main()
