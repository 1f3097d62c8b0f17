"""Measure how well keywords, vectors and both fused find the passages that answer the labelled questions.

Each line of questions.jsonl has a question, the id of the passage that answers it, and a quote from that passage. A
label whose passage does not have its quote any more, because the text was changed, is left out and counted.
"""

import argparse
import json
from collections.abc import Iterator
from pathlib import Path

from sage import LocalEnvironment, ProcessFunction
from sage.rag.documents import Passage
from sage.rag.evaluation import Evaluate, Scores
from sage.rag.keywords import KeywordIndex
from sage.rag.loaders import Files, Load
from sage.rag.retrieval import Index, Question, Retrieve
from sage.rag.splitters import SplitByStructure
from sage.services.embeddings import HashingEmbeddings
from sage.services.minilm import MiniLMEmbeddings
from sage.services.numpy_store import NumpyStore

HERE = Path(__file__).resolve().parent
DOCS = HERE.parents[1] / "docs"
MARK, MARK_END = "<!-- quality -->", "<!-- end of quality -->"
EMBEDDINGS = {"hashing": HashingEmbeddings, "minilm": MiniLMEmbeddings}


class Ask(ProcessFunction):
    """Takes in the passages; when it has them all, emits the questions whose labels hold."""

    def __init__(self, questions: Path) -> None:
        self.questions = questions
        self.texts: dict[str, str] = {}

    def execute(self, data: Passage) -> None:
        self.texts[data.id] = " ".join(data.text.split())

    def finish(self) -> Iterator[Question]:
        for line in self.questions.read_text(encoding="utf-8").splitlines():
            label = json.loads(line)
            if " ".join(label["quote"].split()) in self.texts.get(label["passage"], ""):
                yield Question(label["question"], expected=frozenset([label["passage"]]))


def measure(embeddings: str, k: int, questions: Path = HERE / "questions.jsonl") -> dict[str, Scores]:
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
        .process(Ask, questions, name="ask")
    )
    ways = {
        "keywords": Retrieve(k, keywords=keywords),
        "vectors": Retrieve(k, vectors=vectors, embeddings=model),
        "hybrid": Retrieve(k, keywords=keywords, vectors=vectors, embeddings=model),
    }
    for name, way in ways.items():
        found = asked.map_batches(way, max_records=64, name=name)
        found.process(Evaluate, k, name=f"score {name}").sink(lambda each, name=name: scores.update({name: each}))
    env.submit(autostop=True)
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
    parser.add_argument("--top", type=int, default=5, help="how many passages of each question count")
    parser.add_argument("--page", type=Path, help="measure every embeddings, and put the tables into this page")
    options = parser.parse_args()
    labels = len((HERE / "questions.jsonl").read_text(encoding="utf-8").splitlines())
    chosen = list(EMBEDDINGS) if options.page else [options.embeddings]
    tables = {name: table(measure(name, options.top), labels, options.top) for name in chosen}
    if options.page:
        put_into(options.page, "\n\n".join(f"`{EMBEDDINGS[name].__name__}`, {text}" for name, text in tables.items()))
    print("\n\n".join(tables.values()))


if __name__ == "__main__":
    main()
