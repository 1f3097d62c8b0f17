"""The application in examples/rag: every store, conversation, interruption, and the quality of its retrieval."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
from rag.filled import is_filled
from rag.small_pdf import pdf_of
from support.vector_stores import wait_for

from sage.testing import assert_clean

EXAMPLE = Path(__file__).resolve().parents[2] / "examples" / "rag"
SOURCE = Path(__file__).resolve().parents[2] / "src"

GUIDE = """\
# Guide

## Keys

Records of the same key go to the same task.

## Stopping

A stop drains the records that are in flight.
"""


def environment(folder: Path, *paths: Path) -> dict[str, str]:
    """Return an environment in which temporary files are those of the program alone."""
    found = os.pathsep.join(map(str, [*paths, SOURCE]))
    temporary = folder / "tmp"
    temporary.mkdir(exist_ok=True)
    return {**os.environ, "PYTHONPATH": found, "TMPDIR": str(temporary)}


def ask(
    folder: Path, *args: str | Path, typed: str | None = None, code: int = 0, path: Path | None = None
) -> subprocess.CompletedProcess[str]:
    """Run the application and see that it leaves nothing in the folder for temporary files."""
    with assert_clean(within_s=5.0, ignore="shared memory *"):
        ended = subprocess.run(
            [sys.executable, "-W", "error::ResourceWarning", EXAMPLE / "ask.py", *args],
            input=typed or "",
            capture_output=True,
            text=True,
            timeout=200,
            cwd=folder,
            env=environment(folder, *([] if path is None else [path])),
        )
    assert ended.returncode == code, ended.stderr
    left = [path.name for path in (folder / "tmp").iterdir() if not path.name.startswith("sage-")]
    assert left == []
    return ended


@pytest.fixture
def docs(tmp_path: Path) -> Path:
    folder = tmp_path / "docs"
    folder.mkdir()
    (folder / "guide.md").write_text(GUIDE, "utf-8")
    (tmp_path / "questions.txt").write_text("Which task does a key go to?\n\nAnd what drains?\n", "utf-8")
    return folder


STORES = ["memory", "sqlite", *(pytest.param(name, marks=pytest.mark.slow) for name in ("chroma", "milvus"))]


@pytest.mark.timeout(300)
@pytest.mark.parametrize("store", STORES)
def test_every_store_answers_and_ends_clean(docs: Path, store: str) -> None:
    folder = docs.parent
    for first_line in ("2 passages of 1 documents are new", "0 passages of 0 documents are new"):
        ended = ask(
            folder, "--docs", docs, "--questions", "questions.txt", "--store", store, "--top", "1", "--keep", "kept"
        )
        assert "left out" not in ended.stderr
        lines = [line.strip() for line in ended.stdout.splitlines() if line.strip()]
        assert lines[:7] == [
            "2 passages of 1 documents are new" if store == "memory" else first_line,
            "Which task does a key go to?",
            "Guide > Keys: Records of the same key go to the same task. [1]",
            "[1] guide.md#keys",
            "And what drains?",
            "Guide > Stopping: A stop drains the records that are in flight. [1]",
            "[1] guide.md#stopping",
        ]
        assert 'job "ask": COMPLETED and CLEAN' in ended.stdout


def test_without_a_folder_to_keep_nothing_is_left(docs: Path) -> None:
    before = {path.name for path in docs.parent.iterdir()} | {"tmp"}
    ask(docs.parent, "--docs", docs, "--questions", "questions.txt")
    assert {path.name for path in docs.parent.iterdir()} == before


def test_this_projects_docs_are_asked(tmp_path: Path) -> None:
    ended = ask(tmp_path)
    questions = (EXAMPLE / "questions.txt").read_text("utf-8").splitlines()
    assert [line for line in ended.stdout.splitlines() if line in questions] == questions
    assert re.search(r"answer +1 +5 +5 +0 ", ended.stdout)


def test_questions_are_typed(docs: Path) -> None:
    typed = "Which task does a key go to?\nWhat drains?\n\nnot read\n"
    ended = ask(docs.parent, "--docs", docs, "--interactive", "--store", "memory", "--top", "1", typed=typed)
    assert ended.stdout.count("[1] guide.md#keys") == ended.stdout.count("[1] guide.md#stopping") == 1
    assert "not read" not in ended.stdout
    assert 'job "ask": STOPPED and CLEAN' in ended.stdout


def test_a_conversation_goes_on_in_the_next_run(docs: Path) -> None:
    base: list[str | Path] = ["--docs", docs, "--interactive", "--keep", "kept", "--top", "1", "--session"]
    begun = {"one": ("What drains?", "guide.md#stopping"), "other": ("What does a key do?", "guide.md#keys")}
    for session, (question, passage) in begun.items():
        assert passage in ask(docs.parent, *base, session, typed=f"{question}\n").stdout
    for session, (_, passage) in begun.items():
        assert passage in ask(docs.parent, *base, session, typed="Which records does it mean?\n").stdout


def test_what_cannot_be_read_is_named_and_the_rest_is_asked(docs: Path) -> None:
    (docs / "broken.pdf").write_bytes(pdf_of("text")[:100])
    (docs / "report.pdf").write_bytes(pdf_of("The loom costs thirty coins."))
    lines = [
        '{"text": "Tape costs two coins. \\ud800"}',
        "no json",
        '{"text": "x", "score": NaN}',
        '{"text": "x", "$x": 1}',
    ]
    (docs / "list.jsonl").write_text("\n".join(lines), "utf-8")
    (docs / "page.html").write_text("<h1>Hours</h1><p>The shop opens at nine.</p>", "utf-8")
    (docs.parent / "questions.txt").write_text(
        "What costs the loom?\nWhat costs tape?\nWhen opens the shop?\n", "utf-8"
    )
    ended = ask(docs.parent, "--docs", docs, "--questions", "questions.txt", "--top", "1")
    assert re.findall(r"left out: (.*)", ended.stderr) == [
        'file "broken.pdf": is no PDF that can be read: '
        "PdfiumError: Failed to load document (PDFium: Data format error).",
        'file "list.jsonl", line 2: is not JSON: Expecting value: line 1 column 1 (char 0)',
        "file \"list.jsonl\", line 3: the field 'score' is nan, which is not finite",
        "file \"list.jsonl\", line 4: a field cannot have the name '$x'",
    ]
    assert re.findall(r"\[1\] (\w+\.\S+)", ended.stdout) == [
        "report.pdf#page=1",
        "list.jsonl#line=1",
        "page.html#hours",
    ]


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_what_the_store_refuses_is_named_and_the_rest_is_asked(docs: Path) -> None:
    names = [*(f"part-{number}" for number in range(100)), "i" * 66_000]
    (docs / "list.jsonl").write_text("".join(f'{{"id": "{name}", "text": "It is."}}\n' for name in names), "utf-8")
    ended = ask(docs.parent, "--docs", docs, "--questions", "questions.txt", "--store", "milvus", "--top", "1")
    assert re.search("left out: list.jsonl#i{66000}: .* exceeds max_length=65535", ended.stderr)
    assert "[1] guide.md#keys" in ended.stdout


def test_files_of_one_name_in_two_folders_are_both_asked(docs: Path) -> None:
    other = docs.parent / "other"
    other.mkdir()
    (other / "guide.md").write_text("# Prices\n\nTape costs two coins.\n", "utf-8")
    (docs.parent / "questions.txt").write_text("Which task does a key go to?\nWhat costs tape?\n", "utf-8")
    ended = ask(docs.parent, "--docs", docs, other, "--questions", "questions.txt", "--top", "1")
    assert ended.stdout.startswith("3 passages of 2 documents are new\n")
    assert re.findall(r"\[1\] (\w+/\S+)", ended.stdout) == ["docs/guide.md#keys", "other/guide.md#prices"]


def test_what_is_gone_or_empty_is_cited_no_more(docs: Path) -> None:
    for name in ("gone", "empty"):
        (docs / f"{name}.md").write_text(f"It is {name}.", "utf-8")
    (docs.parent / "questions.txt").write_text("What is gone?\nWhat is empty?\n", "utf-8")
    words: list[str | Path] = ["--docs", docs, "--keep", "kept", "--questions", "questions.txt", "--top", "9"]
    assert re.findall(r"\[1\] (\w+\.md)\n", ask(docs.parent, *words).stdout) == ["gone.md", "empty.md"]
    (docs / "gone.md").unlink()
    (docs / "empty.md").write_text("", "utf-8")
    ended = ask(docs.parent, *words)
    assert ended.stdout.startswith("0 passages of 0 documents are new\n")
    assert "gone.md" not in ended.stdout
    assert "empty.md" not in ended.stdout


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--docs", "none"], "none does not exist; name folders or files with --docs"),
        (["--questions", "none"], "file none does not exist; name one with --questions"),
        (
            ["--questions", "latin.txt"],
            "latin.txt cannot be read: 'utf-8' codec can't decode byte 0xe9 in position 3: unexpected end of data; "
            "name a file of UTF-8 text with --questions",
        ),
        (["--keep", "latin.txt"], "latin.txt is not a folder; name one with --keep"),
        (["--top", "0"], "--top is 0, but at least 1 passage must be asked for"),
    ],
)
def test_what_is_missing_is_named(tmp_path: Path, args: list[str], message: str) -> None:
    (tmp_path / "latin.txt").write_bytes(b"caf\xe9")
    ended = ask(tmp_path, *args, code=1)
    assert (ended.stdout, ended.stderr.strip()) == ("", message)


@pytest.mark.parametrize(
    ("store", "module", "extra"),
    [("memory", "numpy", "vector"), ("chroma", "chromadb", "chroma"), ("milvus", "pymilvus", "milvus")],
)
def test_a_missing_extra_is_named_with_what_installs_it(docs: Path, store: str, module: str, extra: str) -> None:
    (docs.parent / f"{module}.py").write_text(f"raise ImportError(\"No module named '{module}'\")\n", "utf-8")
    ended = ask(docs.parent, "--docs", docs, "--store", store, code=1, path=docs.parent)
    assert f'module "{module}" of the extra "{extra}" cannot be imported: No module named' in ended.stderr
    assert f'Install it with: pip install "sage-dataflow[{extra}]"' in ended.stderr.splitlines()
    assert "Traceback" not in ended.stderr


NOTES = """
from ask import notes_of
error = ValueError("itself is its cause, as those of pymilvus are")
error.__cause__ = error
error.add_note("help")
print(*notes_of(ExceptionGroup("several", [error])))
"""


def test_an_error_that_is_its_own_cause_has_its_notes_once(tmp_path: Path) -> None:
    words = [sys.executable, "-c", NOTES]
    environment_ = environment(tmp_path, EXAMPLE)
    ended = subprocess.run(words, env=environment_, capture_output=True, text=True, check=False)
    assert (ended.stdout, ended.stderr) == ("help\n", "")


@pytest.mark.timeout(300)
@pytest.mark.parametrize("store", STORES[1:])
def test_ctrl_c_while_it_indexes(docs: Path, store: str) -> None:
    kept = docs.parent / "kept"
    code, out, errors = ended_while_it_indexes(docs, store, kept, signal.SIGINT)
    assert (code, errors) == (130, "")
    assert "passages of" not in out
    assert list((docs.parent / "tmp").iterdir()) == []
    assert marks_in(kept) == []
    ended = asked_again(docs, store, kept)
    assert "[1] guide.md#keys" in ended.stdout
    assert "was not closed" not in ended.stderr


@pytest.mark.timeout(300)
@pytest.mark.parametrize("store", STORES[1:])
def test_sigkill_while_it_indexes(docs: Path, store: str) -> None:
    kept = docs.parent / "kept"
    code, _, _ = ended_while_it_indexes(docs, store, kept, signal.SIGKILL)
    assert code == -signal.SIGKILL
    assert marks_in(kept) != []
    ended = asked_again(docs, store, kept)
    assert "[1] guide.md#keys" in ended.stdout
    assert "was not closed: what was being written then may be missing" in ended.stderr
    assert marks_in(kept) == []
    assert counts_in(kept, store) == "2 2"
    assert "was not closed" not in asked_again(docs, store, kept).stderr


def ended_while_it_indexes(docs: Path, store: str, kept: Path, by: signal.Signals) -> tuple[int, str, str]:
    """End the application by a signal when its index has a passage; return its code and what it has printed."""
    for number in range(400):
        (docs / f"more{number}.md").write_text(f"# Part {number}\n\nIt says {number}.\n" * 20, "utf-8")
    with assert_clean(within_s=5.0, ignore="shared memory *"):
        program = subprocess.Popen(
            [sys.executable, EXAMPLE / "ask.py", "--docs", docs, "--store", store, "--keep", kept],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            cwd=docs.parent,
            env=environment(docs.parent),
        )
        wait_for(lambda: is_filled(kept / f"words_{store}_hashing.db"), "a passage in the index")
        program.send_signal(by)
        out, errors = program.communicate(timeout=60)
    for path in docs.glob("more*.md"):
        path.unlink()
    return program.returncode, out, errors


def asked_again(docs: Path, store: str, kept: Path) -> subprocess.CompletedProcess[str]:
    return ask(
        docs.parent, "--docs", docs, "--store", store, "--keep", kept, "--top", "1", "--questions", "questions.txt"
    )


def marks_in(kept: Path) -> list[str]:
    """Return the files that are in a store only while it is open."""
    return sorted(path.name for path in kept.rglob("*") if path.name.endswith(("-wal", "-shm", ".sage-open")))


COUNT = """
import sys
from sage.rag.keywords import KeywordIndex
from sage.services.vectors.chroma import ChromaStore
from sage.services.vectors.milvus import MilvusStore
from sage.services.vectors.sqlite import SqliteStore

kept, store = sys.argv[1:]
vectors = {"sqlite": SqliteStore, "chroma": ChromaStore, "milvus": MilvusStore}[store]
name = {"sqlite": "vectors.db", "chroma": "chroma", "milvus": "milvus.db"}[store]
stores = [KeywordIndex(f"{kept}/words_{store}_hashing.db"), vectors(f"{kept}/{name}", collection="docs_hashing")]
for each in stores:
    each.setup()
print(*(each.count() for each in stores))
for each in stores:
    each.cleanup()
"""


def counts_in(kept: Path, store: str) -> str:
    """Return how many passages are in the two indexes; some libraries leave something behind in their process."""
    words: list[str | Path] = [sys.executable, "-c", COUNT, kept, store]
    environment_ = environment(kept.parent)
    return subprocess.run(words, env=environment_, capture_output=True, text=True, check=True).stdout.strip()


def test_ctrl_c_while_it_waits_for_a_question(docs: Path) -> None:
    with assert_clean(within_s=5.0, ignore="shared memory *"):
        program = subprocess.Popen(
            [sys.executable, EXAMPLE / "ask.py", "--docs", docs, "--interactive", "--store", "sqlite", "--top", "1"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            cwd=docs.parent,
            env=environment(docs.parent),
        )
        assert program.stdin is not None
        assert program.stdout is not None
        program.stdin.write("What drains?\n")
        program.stdin.flush()
        # The answer is there, so that it waits for the next question now.
        assert any("[1] guide.md#stopping" in line for line in program.stdout)
        program.send_signal(signal.SIGINT)
        _, errors = program.communicate(timeout=30)
    assert (program.returncode, errors) == (130, "")
    assert list((docs.parent / "tmp").iterdir()) == []


LABELS = [json.loads(line) for line in (EXAMPLE / "questions.jsonl").read_text("utf-8").splitlines()]


def test_the_labels_are_whole() -> None:
    assert len(LABELS) >= 200
    assert all(set(label) == {"question", "document", "quote"} for label in LABELS)
    assert len({label["question"] for label in LABELS}) == len(LABELS)


def measured(*args: str) -> tuple[int, dict[str, tuple[float, float]]]:
    """Return how many questions were asked, and recall and MRR of each way to find passages."""
    with tempfile.TemporaryDirectory() as folder:
        ended = subprocess.run(
            [sys.executable, EXAMPLE / "measure.py", *args],
            capture_output=True,
            text=True,
            timeout=500,
            env=environment(Path(folder)),
        )
    assert ended.returncode == 0, ended.stderr
    print(ended.stdout)
    rows = re.findall(r"^\| (\w+) \| ([\d.]+) \| ([\d.]+) \|$", ended.stdout, re.MULTILINE)
    return int(ended.stdout.split()[1]), {name: (float(found), float(rank)) for name, found, rank in rows}


LABELLED = """
import json, sys
from ask import Passage
from measure import Ask
label = {"question": "When?", "document": "a.md", "quote": "at  nine"}
for texts in json.loads(sys.argv[1]):
    asked = Ask([label])
    for number, text in enumerate(texts):
        asked.execute(Passage(f"a.md~{number}", text, "a.md"))
        asked.execute(Passage(f"b.md~{number}", "at nine", "b.md"))
    print(*(question.expected for question in asked.finish()))
"""


def test_a_label_holds_as_long_as_one_passage_has_its_quote(tmp_path: Path) -> None:
    texts = [["at nine"], ["at ten", "it opens at\nnine."], ["at ten"], ["at nine", "at nine"], []]
    words = [sys.executable, "-c", LABELLED, json.dumps(texts)]
    ended = subprocess.run(words, env=environment(tmp_path, EXAMPLE), capture_output=True, text=True, check=False)
    assert (ended.stdout.split("\n"), ended.stderr) == (
        ["frozenset({'a.md~0'})", "frozenset({'a.md~1'})", "", "", "", ""],
        "",
    )


EMBEDDINGS = [("hashing", 0.57), pytest.param("minilm", 0.74, marks=pytest.mark.slow)]


@pytest.mark.timeout(600)
@pytest.mark.parametrize(("embeddings", "recall"), EMBEDDINGS)
def test_both_ways_together_are_at_least_as_good_as_either(embeddings: str, recall: float) -> None:
    questions, scores = measured("--embeddings", embeddings)
    assert questions >= 200
    assert list(scores) == ["keywords", "vectors", "hybrid"]
    for number in (0, 1):
        assert scores["hybrid"][number] >= max(scores["keywords"][number], scores["vectors"][number])
    assert scores["hybrid"][0] >= recall


@pytest.mark.parametrize("embeddings", ["HashingEmbeddings", "MiniLMEmbeddings"])
def test_the_page_shows_both_ways_together_as_at_least_as_good(embeddings: str) -> None:
    page = (EXAMPLE.parents[1] / "docs" / "ready-made" / "rag.md").read_text("utf-8")
    table = re.split(rf"`{embeddings}`, (?=\d)", page)[1].partition("`")[0].partition("<!-- end of quality -->")[0]
    assert int(table.split()[0]) >= 200
    found = re.findall(r"^\| (\w+) \| ([\d.]+) \| ([\d.]+) \|$", table, re.MULTILINE)
    rows = {name: (float(recall), float(rank)) for name, recall, rank in found}
    assert list(rows) == ["keywords", "vectors", "hybrid"]
    assert all(
        both >= max(one, other) for both, one, other in zip(rows["hybrid"], *list(rows.values())[:2], strict=True)
    )


class Updates:
    """Runs `update.py` on a folder of documents."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.docs = folder / "docs"
        self.docs.mkdir()
        for name, text in (("tape", "Tape costs two coins."), ("hours", "We open at nine."), ("glue", "Glue dries.")):
            self.write(name, text)

    def write(self, name: str, text: str) -> None:
        # In one step, as the program may read the folder meanwhile.
        new = self.folder / "new"
        new.write_text(text, encoding="utf-8")
        new.replace(self.docs / f"{name}.md")

    def start(self, *args: str) -> subprocess.Popen[str]:
        return subprocess.Popen(
            [sys.executable, "-u", "-W", "error", EXAMPLE / "update.py", "docs", "kept", "How much is tape?", *args],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            cwd=self.folder,
            env=environment(self.folder),
        )

    def run(self) -> list[str]:
        printed, errors = self.start().communicate(timeout=60)
        assert errors == ""
        return printed.splitlines()


def test_each_run_embeds_only_what_is_new_or_changed_and_takes_out_what_is_gone(tmp_path: Path) -> None:
    updates = Updates(tmp_path)
    assert updates.run() == ["embedded: glue.md, hours.md, tape.md", "found: Tape costs two coins."]
    updates.write("tape", "Tape costs three coins.")
    updates.write("string", "String is sold by the yard.")
    (updates.docs / "glue.md").unlink()
    assert updates.run() == ["embedded: string.md, tape.md", "found: Tape costs three coins."]
    (updates.docs / "tape.md").unlink()
    embedded, found = updates.run()
    assert embedded == "embedded: nothing"
    assert "coins" not in found


def test_a_folder_is_looked_at_every_few_seconds(tmp_path: Path) -> None:
    updates = Updates(tmp_path)
    program = updates.start("--every", "0.1")
    try:
        assert program.stdout is not None
        assert next(program.stdout) == "embedded: glue.md, hours.md, tape.md\n"
        updates.write("tape", "Tape costs four coins.")
        later = list(iter(program.stdout.readline, "found: Tape costs four coins.\n"))
        assert later.count("embedded: tape.md\n") == 1
    finally:
        program.send_signal(signal.SIGINT)
        program.communicate(timeout=60)
