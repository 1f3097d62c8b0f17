"""Ask the documentation of this project, or any folder of documents: every answer is made of its sentences.

Nothing is downloaded. The first job reads the documents into an index, which is a service; the second one finds the
passages for each question and quotes an answer from them. `examples/rag/ask.py` takes vectors and real models.
"""

import argparse
import sys
import tempfile
import textwrap
from pathlib import Path

from sage import LocalEnvironment
from sage.rag import Answered, Files, Generate, Index, KeywordIndex, Load, Retrieve, SplitByStructure
from sage.services import ExtractiveLLM

HERE = Path(__file__).resolve().parent
WIDTH = 100


def read(folder: Path, words: Path) -> str:
    """Put the documents of a folder into an index and return the report of the job."""
    env = LocalEnvironment("read the documents")
    index = env.register_service("index", KeywordIndex, words)
    documents = env.from_batch(Files, folder, name="files").flatmap(Load, name="load")
    passages = documents.flatmap(SplitByStructure, name="split")
    passages.map_batches(Index, keywords=index, name="index").sink(lambda _: None, name="done")
    return str(env.run())


def answer(questions: list[str], words: Path, top: int) -> str:
    """Answer questions on standard output and return the report of the job."""
    env = LocalEnvironment("answer the questions")
    index = env.register_service("index", KeywordIndex, words)
    model = env.register_service("model", ExtractiveLLM)
    found = env.from_batch(questions, name="questions").map(Retrieve, top, keywords=index, name="find")
    found.map(Generate, model, name="answer").sink(show, name="show")
    return str(env.run())


def show(answered: Answered) -> None:
    print(answered.question.text)
    print(textwrap.fill(answered.text, WIDTH, initial_indent="  ", subsequent_indent="  "))
    for citation in {each.number: each for each in answered.citations}.values():
        print(f"  [{citation.number}] {citation.passage}")
    print()


def main() -> None:
    parser = argparse.ArgumentParser(description="Ask a folder of documents.")
    parser.add_argument("--docs", type=Path, default=HERE.parent / "docs", help="the folder")
    parser.add_argument("--questions", type=Path, default=HERE / "questions.txt", help="a file, one question a line")
    parser.add_argument("--top", type=int, default=3, help="how many passages an answer is made of")
    options = parser.parse_args()
    if not options.docs.is_dir():
        sys.exit(f"folder {options.docs} does not exist; name one with --docs")
    if not options.questions.is_file():
        sys.exit(f"file {options.questions} does not exist; name one with --questions")
    if options.top < 1:
        sys.exit(f"--top is {options.top}, but at least 1 passage must be asked for")
    questions = [line.strip() for line in options.questions.read_text(encoding="utf-8").splitlines() if line.strip()]
    with tempfile.TemporaryDirectory() as folder:
        reports = [read(options.docs, Path(folder) / "words.db")]
        reports.append(answer(questions, Path(folder) / "words.db", options.top))
    print(*reports, sep="\n\n")


if __name__ == "__main__":
    main()
