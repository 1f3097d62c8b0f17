"""Ask a folder of Markdown files: read, split, index and answer, as one pipeline around one service.

The index is a service, an SQLite full-text table in memory. When the last passage is in it, the operator that fills it
emits the questions, so that none is answered from half of the files.
"""

import argparse
import re
import sqlite3
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from sage import BaseService, LocalEnvironment, ProcessFunction, ServiceHandle

HERE = Path(__file__).resolve().parent
PASSAGE_CHARACTERS_MAX = 700
HEADING = re.compile(r"#{1,6}\s+(.*?)\s*#*")
COMMON_WORDS = (
    "a after and are at be by can do does for from happens how i if in is it its of on or that the then there to was"
    " what when where which who why will with"
)


@dataclass(frozen=True)
class Passage:
    file: str
    heading: str
    text: str


@dataclass(frozen=True)
class Answer:
    question: str
    passages: list[Passage]


class PassageIndex(BaseService):
    """Finds passages by their words."""

    def setup(self) -> None:
        # Tasks call from their own threads, one at a time, and the hooks run on another one.
        self.database = sqlite3.connect(":memory:", check_same_thread=False)
        self.database.execute(
            "CREATE VIRTUAL TABLE passages USING fts5(file UNINDEXED, heading, text, tokenize='porter unicode61')"
        )

    def add(self, passage: Passage) -> None:
        row = (passage.file, passage.heading, passage.text)
        self.database.execute("INSERT INTO passages VALUES (?, ?, ?)", row)

    def search(self, question: str, top: int) -> list[Passage]:
        words = [word for word in re.findall(r"\w+", question.lower()) if word not in COMMON_WORDS.split()]
        if not words:
            return []
        rows = self.database.execute(
            "SELECT file, heading, snippet(passages, 2, '', '', ' ... ', 40) FROM passages WHERE passages MATCH ?"
            " ORDER BY bm25(passages, 0.0, 3.0, 1.0) LIMIT ?",
            (" OR ".join(f'"{word}"' for word in words), top),
        )
        return [Passage(*row) for row in rows]

    def cleanup(self) -> None:
        self.database.close()


class Fill(ProcessFunction):
    """Puts passages into the index and emits the questions when it has them all."""

    def __init__(self, index: ServiceHandle[PassageIndex], questions: list[str]) -> None:
        self.index = index
        self.questions = questions

    def execute(self, data: Passage) -> None:
        self.index.add(data)

    def finish(self) -> list[str]:
        return self.questions


def split(folder: Path, file: Path) -> Iterator[Passage]:
    """Yield the prose of a file in passages: one under each heading, or several where there is much."""
    name, heading, in_code = str(file.relative_to(folder)), file.stem, False
    lines: list[str] = []

    def passage() -> Iterator[Passage]:
        text = " ".join(" ".join(lines).split())
        lines.clear()
        if text:
            yield Passage(name, heading, text)

    for line in file.read_text(encoding="utf-8").splitlines():
        if line.lstrip().startswith("```"):
            in_code = not in_code
            continue
        if in_code:
            continue
        match = HEADING.fullmatch(line)
        # A long table or list has no empty line to be cut at.
        is_between = not line.strip() or line.startswith(("|", "- ", "* "))
        if match or (is_between and sum(map(len, lines)) > PASSAGE_CHARACTERS_MAX):
            yield from passage()
        if match:
            heading = match[1]
        else:
            lines.append(line)
    yield from passage()


def show(answer: Answer) -> None:
    print(answer.question)
    for passage in answer.passages:
        print(f"  {passage.file}, {passage.heading}:\n    {passage.text.strip()}")
    if not answer.passages:
        print("  nothing found")
    print()


def ask(docs: Path, questions: list[str], top: int) -> str:
    """Answer the questions on standard output and return the report of the job."""
    env = LocalEnvironment("ask the docs")
    index = env.register_service("index", PassageIndex)
    (
        env.from_batch(sorted(docs.rglob("*.md")), name="files")
        .flatmap(lambda file: split(docs, file), name="split")
        .process(Fill, index, questions, name="fill")
        .map(lambda question: Answer(question, index.search(question, top)), name="answer")
        .sink(show, name="show")
    )
    return str(env.submit(autostop=True).report)


def main() -> None:
    parser = argparse.ArgumentParser(description="Ask a folder of Markdown files.")
    parser.add_argument("--docs", type=Path, default=HERE.parent / "docs", help="the folder")
    parser.add_argument("--questions", type=Path, default=HERE / "questions.txt", help="a file, one question a line")
    parser.add_argument("--top", type=int, default=2, help="how many passages answer a question")
    options = parser.parse_args()
    if not options.docs.is_dir():
        sys.exit(f"there is no folder {options.docs}; name one with --docs")
    if next(options.docs.rglob("*.md"), None) is None:
        sys.exit(f"there are no Markdown files in {options.docs}")
    if not options.questions.is_file():
        sys.exit(f"there is no file {options.questions}; name one with --questions")
    if options.top < 1:
        sys.exit(f"--top is {options.top}, but at least 1 passage must be asked for")
    questions = [line.strip() for line in options.questions.read_text(encoding="utf-8").splitlines() if line.strip()]
    print(ask(options.docs, questions, options.top))


if __name__ == "__main__":
    main()
