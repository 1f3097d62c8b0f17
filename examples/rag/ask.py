"""Ask a folder of documents: index it, answer questions in batch or one after the other, and remember the conversation.

Everything runs on this machine by default: passages are found by keywords and by hashed vectors, and the answer is made
of sentences of the passages. `--embeddings minilm` and `--llm openai` take models. With `--keep FOLDER`, index and
conversation are there for the next run, which reads only the files that have changed.
"""

import argparse
import logging
import sys
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from sage import DeadLetter, LocalEnvironment, SageError, ServiceOptions
from sage.rag import (
    Answered,
    Converse,
    Files,
    Generate,
    Index,
    IndexedFiles,
    KeywordIndex,
    Load,
    Passage,
    Prune,
    Retrieve,
    SplitByStructure,
)
from sage.services import (
    ChromaStore,
    ExtractiveLLM,
    HashingEmbeddings,
    Memory,
    MilvusStore,
    MiniLMEmbeddings,
    NumpyStore,
    OpenAILLM,
    SqliteStore,
)

OPENAI_URL = "https://api.openai.com/v1"
HERE = Path(__file__).resolve().parent
EMBEDDINGS = {"hashing": HashingEmbeddings, "minilm": MiniLMEmbeddings}
# Of keywords and vectors. Hashed vectors know only words, as keywords do, and less well, so that they count for less.
WEIGHTS = {"hashing": (1.0, 0.4), "minilm": (1.0, 1.0)}

# Two environments use the index, so the first one builds it and the last one cleans it up.
SHARED = ServiceOptions(shared=True, concurrency=None)

Services = dict[str, Any]


def register_index(env: LocalEnvironment, options: argparse.Namespace, folder: Path) -> Services:
    """Register what holds the passages and return the handles."""
    # The vectors of two models must not meet in one collection.
    collection = f"docs_{options.embeddings}"
    vectors: tuple[Any, ...] = {
        "memory": (NumpyStore,),
        "sqlite": (SqliteStore, folder / "vectors.db"),
        "chroma": (ChromaStore, folder / "chroma"),
        "milvus": (MilvusStore, folder / "milvus.db"),
    }[options.store]
    words = () if options.store == "memory" else (folder / f"words_{options.store}_{options.embeddings}.db",)
    return {
        "keywords": env.register_service("keywords", KeywordIndex, *words, options=SHARED),
        "vectors": env.register_service("vectors", *vectors, collection=collection, options=SHARED),
        "embeddings": env.register_service("embeddings", EMBEDDINGS[options.embeddings], options=SHARED),
    }


def index(env: LocalEnvironment, options: argparse.Namespace, folder: Path) -> None:
    """Read, split and store the documents. What is refused is named on standard error, and the rest goes on."""
    services = register_index(env, options, folder)
    known = None if options.store == "memory" else folder / f"files_{options.store}_{options.embeddings}.db"
    indexed = env.register_service("files", IndexedFiles, known, services["keywords"], services["vectors"])
    unread = env.dead_letters("unread")
    stored: list[str] = []
    (
        env.from_batch(Files, *options.docs, indexed=indexed, name="files")
        .flatmap(Load, name="load", on_error=unread)
        .flatmap(SplitByStructure, name="split")
        .map_batches(Index(**services, indexed=indexed), max_records=64, name="index", on_error=unread)
        .process(Prune, indexed, name="prune")
        .sink(lambda passage: stored.append(passage.document), name="count")
    )
    unread.sink(complain, name="complain")
    env.run(keep_services=True)
    print(f"{len(stored)} passages of {len(set(stored))} documents are new")


def complain(letter: DeadLetter) -> None:
    # Of a batch of passages that could not be stored, the error is one, so that each passage is named beside it.
    name = f"{letter.value.id}: " if isinstance(letter.value, Passage) else ""
    print(f"left out: {name}{letter.error}", file=sys.stderr)


def converse(env: LocalEnvironment, options: argparse.Namespace, services: Services, folder: Path) -> Converse:
    """Register model and memory, and return what answers a question."""
    memory = env.register_service("memory", Memory, folder / "memory.db", services["embeddings"])
    if options.llm == "openai":
        llm: OpenAILLM | ExtractiveLLM = env.register_service(
            "llm", OpenAILLM, options.model, base_url=options.base_url, api_key_env="OPENAI_API_KEY"
        )
    else:
        llm = env.register_service("llm", ExtractiveLLM)
    retrieve = Retrieve(options.top, **services, weights=WEIGHTS[options.embeddings])
    return Converse(retrieve, Generate(llm), memory, session=options.session)


def show(answer: Answered) -> None:
    print(f"\n{answer.question.text}\n  {answer.text}")
    for citation in {each.number: each for each in answer.citations}.values():
        print(f"  [{citation.number}] {citation.passage or 'no such passage'}")


def answer_all(env: LocalEnvironment, answering: Converse, questions: list[str]) -> str:
    """Answer a list of questions in one job and return its report."""
    env.from_batch(questions, name="questions").map(answering, name="answer").sink(show, name="show")
    return str(env.run())


def answer_each(env: LocalEnvironment, answering: Converse, lines: Iterable[str]) -> str:
    """Answer what is typed, line by line, by a served pipeline and return the report of its job."""
    ask = env.serve("ask", lambda requests: requests.map(answering, name="answer"))
    # A pipeline that only answers requests ends when everything else has: this keeps the job until it is stopped.
    env.from_source(lambda: None, name="wait", delay=0.1).sink(lambda _: None, name="nothing")
    job = env.submit()
    for line in lines:
        if not line.strip():
            break
        try:
            show(ask.process(line.strip()))
        except (SageError, ValueError) as error:
            print(f"  {error}")
    job.stop()
    return str(job.report)


def typed() -> Iterable[str]:
    """Yield lines of standard input until its end, with a prompt on a terminal."""
    while True:
        print("\nquestion (empty to end): " if sys.stdin.isatty() else "", end="", flush=True)
        line = sys.stdin.readline()
        if not line:
            return
        yield line


def run(options: argparse.Namespace) -> None:
    """Index, answer and clean up."""
    with ExitStack() as stack:
        folder = options.keep or Path(stack.enter_context(tempfile.TemporaryDirectory()))
        folder.mkdir(parents=True, exist_ok=True)
        indexing = stack.enter_context(LocalEnvironment("index"))
        index(indexing, options, folder)
        # The first environment keeps the index until its end, so that this one finds it filled.
        asking = stack.enter_context(LocalEnvironment("ask"))
        answering = converse(asking, options, register_index(asking, options, folder), folder)
        if options.interactive:
            report = answer_each(asking, answering, typed())
        else:
            report = answer_all(asking, answering, options.lines)
    print(f"\n{report}")


def lines_of(path: Path) -> list[str]:
    """Return the lines of a file that are not blank, or end the program."""
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, ValueError) as error:
        sys.exit(f"{path} cannot be read: {error}; name a file of UTF-8 text with --questions")
    return [line.strip() for line in lines if line.strip()]


def parsed() -> argparse.Namespace:
    """Return the options, or end the program with what is wrong."""
    parser = argparse.ArgumentParser(description="Ask a folder of documents.")
    docs = [HERE.parents[1] / "docs"]
    parser.add_argument("--docs", type=Path, nargs="+", default=docs, help="folders and files; this project's docs")
    parser.add_argument("--questions", type=Path, default=HERE / "questions.txt", help="a file, one question a line")
    parser.add_argument("--interactive", action="store_true", help="read questions from standard input")
    parser.add_argument("--store", choices=["memory", "sqlite", "chroma", "milvus"], default="sqlite")
    parser.add_argument("--embeddings", choices=EMBEDDINGS, default="hashing")
    parser.add_argument("--llm", choices=["extractive", "openai"], default="extractive")
    parser.add_argument("--base-url", default=OPENAI_URL, help="of a server that speaks the protocol of OpenAI")
    parser.add_argument("--model", default="gpt-4o-mini", help="for --llm openai; the key is in OPENAI_API_KEY")
    parser.add_argument("--top", type=int, default=4, help="how many passages answer a question")
    parser.add_argument("--session", default="default", help="which conversation goes on")
    parser.add_argument("--keep", type=Path, help="a folder for index and memory; without it they are gone at the end")
    options = parser.parse_args()
    missing = [str(path) for path in options.docs if not path.exists()]
    if missing:
        sys.exit(f"{missing[0]} does not exist; name folders or files with --docs")
    if not options.interactive and not options.questions.is_file():
        sys.exit(f"file {options.questions} does not exist; name one with --questions")
    options.lines = [] if options.interactive else lines_of(options.questions)
    if options.keep and options.keep.exists() and not options.keep.is_dir():
        sys.exit(f"{options.keep} is not a folder; name one with --keep")
    if options.top < 1:
        sys.exit(f"--top is {options.top}, but at least 1 passage must be asked for")
    return options


def notes_of(error: BaseException) -> Iterator[str]:
    """Yield what may help: the notes of an error, and of those that it came from."""
    # The errors of some libraries are causes of themselves.
    found: list[BaseException | None] = [error]
    for each in found:
        if each is not None:
            yield from getattr(each, "__notes__", ())
            found += [cause for cause in (each.__cause__, *getattr(each, "exceptions", ())) if cause not in found]


def show_warnings() -> None:
    """Write what SAGE has to tell to standard error, such as that a store was not closed the last time."""
    handler = logging.StreamHandler()
    # An error is raised too, and told at the end.
    handler.addFilter(lambda record: record.exc_info is None)
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s: %(message)s", handlers=[handler])


def main() -> None:
    show_warnings()
    try:
        run(parsed())
    except SageError as error:
        sys.exit("\n".join([str(error), *dict.fromkeys(notes_of(error))]))
    except KeyboardInterrupt:
        sys.exit(130)


if __name__ == "__main__":
    main()
