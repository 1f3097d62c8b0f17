"""Keep an index up to date: each run embeds only files that are new or changed, and takes out those that are gone."""

import argparse
import time
from pathlib import Path
from typing import Any

from sage import LocalEnvironment
from sage.rag import Files, Index, IndexedFiles, KeywordIndex, Load, Prune, Retrieve, SplitByStructure
from sage.services import HashingEmbeddings, SqliteStore

Services = dict[str, Any]


def services_of(env: LocalEnvironment, kept: Path) -> Services:
    """Register the services that hold the index in the folder `kept`."""
    return {
        "keywords": env.register_service("keywords", KeywordIndex, kept / "words.db"),
        "vectors": env.register_service("vectors", SqliteStore, kept / "vectors.db"),
        "embeddings": env.register_service("embeddings", HashingEmbeddings),
    }


def update(docs: Path, kept: Path) -> None:
    """Bring the index up to date."""
    env = LocalEnvironment("update")
    services = services_of(env, kept)
    indexed = env.register_service(
        "indexed", IndexedFiles, kept / "files.db", services["keywords"], services["vectors"]
    )
    passages = env.from_batch(Files, docs, indexed=indexed).flatmap(Load).flatmap(SplitByStructure)
    stored = passages.map_batches(Index(**services, indexed=indexed)).process(Prune, indexed)
    names: set[str] = set()
    stored.sink(lambda passage: names.add(passage.document))
    env.run()
    print("embedded:", ", ".join(sorted(names)) or "nothing")


def ask(question: str, kept: Path) -> None:
    """Find the best passage for a question."""
    env = LocalEnvironment("ask")
    retrieved = env.from_batch([question]).map(Retrieve(1, **services_of(env, kept)))
    retrieved.sink(lambda one: print("found:", *(best.passage.text for best in one.found)))
    env.run()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("docs", type=Path, help="the folder of documents")
    parser.add_argument("kept", type=Path, help="the folder of the index")
    parser.add_argument("question", nargs="?", default="How much is the tape?")
    parser.add_argument("--every", type=float, metavar="SECONDS", help="look again so often, until Ctrl-C")
    options = parser.parse_args()
    options.kept.mkdir(parents=True, exist_ok=True)
    while True:
        update(options.docs, options.kept)
        ask(options.question, options.kept)
        if options.every is None:
            break
        time.sleep(options.every)


if __name__ == "__main__":
    main()
