"""Every example runs, prints what it promises and exits with 0."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).resolve().parents[1] / "examples"

EXPECTED = {
    "ask_the_docs.py": ['job "ask the docs": COMPLETED and CLEAN'],
    "command_service.py": ["this is a.txt", "this is b.txt", "web server: stopped"],
    "feedback_loop.py": ["6 reaches 1 after 8 steps", "7 reaches 1 after 16 steps", "27 reaches 1 after 111 steps"],
    "hello.py": ["Hello, Ada!", "Hello, Grace!", "Hello, Alan!"],
    "serve_pipeline.py": [
        "Apple: one apple is 3 coins",
        "plum: not for sale",
        "PEAR: one pear is 4 coins",
        "prices are closed",
    ],
    "word_count.py": ["4  the", "3  is", "2  be", "2  to", "1  a"],
}

GUIDE = """\
# Guide

## Services

A service is stopped after the last call, and then it is cleaned up.

```python
# This is no heading.
```

## Keys

Records of the same key go to the same task.
"""


def run(name: str, *args: str | Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-W", "error", EXAMPLES / name, *args]
    return subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=50)


def test_every_example_is_expected() -> None:
    assert {path.name for path in EXAMPLES.glob("*.py")} == set(EXPECTED)


@pytest.mark.parametrize("name", EXPECTED)
def test_it_runs(name: str) -> None:
    """Acceptance 43: nothing but the program itself prints."""
    ended = run(name)
    assert ended.returncode == 0, ended.stderr
    assert ended.stderr == ""
    lines = ended.stdout.splitlines()
    if name == "ask_the_docs.py":
        assert EXPECTED[name][0] in ended.stdout
    else:
        assert lines == EXPECTED[name]


@pytest.mark.parametrize("name", [name for name in EXPECTED if name != "ask_the_docs.py"])
def test_it_is_short(name: str) -> None:
    assert len((EXAMPLES / name).read_text(encoding="utf-8").splitlines()) < 50


class TestAskTheDocs:
    def test_every_question_about_the_docs_is_answered(self) -> None:
        questions = (EXAMPLES / "questions.txt").read_text(encoding="utf-8").splitlines()
        ended = run("ask_the_docs.py", "--top", "1")
        assert len(questions) == 8
        assert [line for line in ended.stdout.splitlines() if line in questions] == questions
        assert "nothing found" not in ended.stdout
        assert re.search(r"answer +1 +8 +8 +0 ", ended.stdout)

    def test_the_passage_under_the_right_heading_answers(self, tmp_path: Path) -> None:
        (tmp_path / "deep").mkdir()
        (tmp_path / "deep" / "guide.md").write_text(GUIDE, encoding="utf-8")
        questions = tmp_path / "questions.txt"
        questions.write_text('Which task gets a "key"?\n\nWhen is the service cleaned?\nWhat is it?\n', "utf-8")
        ended = run("ask_the_docs.py", "--docs", tmp_path, "--questions", questions, "--top", "1")
        assert ended.returncode == 0, ended.stderr
        answers, report = ended.stdout.split('job "ask the docs"')
        assert [line.strip() for line in answers.splitlines() if line] == [
            'Which task gets a "key"?',
            "deep/guide.md, Keys:",
            "Records of the same key go to the same task.",
            "When is the service cleaned?",
            "deep/guide.md, Services:",
            "A service is stopped after the last call, and then it is cleaned up.",
            "What is it?",
            "nothing found",
        ]
        assert re.search(r"index +stopped +5 +0 ", report)

    def test_what_is_missing_is_named(self, tmp_path: Path) -> None:
        for args, text in (
            (("--docs", tmp_path / "none"), f"there is no folder {tmp_path / 'none'}; name one with --docs"),
            (("--docs", tmp_path), f"there are no Markdown files in {tmp_path}"),
            (("--questions", tmp_path), f"there is no file {tmp_path}; name one with --questions"),
            (("--top", "0"), "--top is 0, but at least 1 passage must be asked for"),
        ):
            ended = run("ask_the_docs.py", *args)
            assert ended.returncode == 1
            assert ended.stderr.strip() == text
            assert ended.stdout == ""
