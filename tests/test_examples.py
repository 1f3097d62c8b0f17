"""Every example runs, prints what it promises and exits with 0."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).resolve().parents[1] / "examples"

EXPECTED = {
    "ask_the_docs.py": ['job "answer the questions": COMPLETED and CLEAN'],
    "command_service.py": ["this is a.txt", "this is b.txt", "web server: stopped"],
    "feedback_loop.py": ["6 reaches 1 after 8 steps", "7 reaches 1 after 16 steps", "27 reaches 1 after 111 steps"],
    "hello.py": ["Hello, Ada!", "Hello, Grace!", "Hello, Alan!"],
    "serve_pipeline.py": [
        "Apple: one apple is 3 coins",
        "plum: not for sale",
        "PEAR: one pear is 4 coins",
        "prices are closed",
    ],
    "survive_a_kill.py": ["killed", "ended by itself", "400 lines, 400 different rows"],
    "word_count.py": ["4  the", "3  is", "2  be", "2  to", "1  a"],
}

NEED_A_SERVER = {"agent.py"}
"""Those that are run with the tests of the services, which have a server for them."""

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
    assert {path.name for path in EXAMPLES.glob("*.py")} == set(EXPECTED) | NEED_A_SERVER


@pytest.mark.parametrize("name", EXPECTED)
def test_it_runs(name: str) -> None:
    """Nothing but the program itself prints."""
    ended = run(name)
    assert ended.returncode == 0, ended.stderr
    assert ended.stderr == ""
    lines = ended.stdout.splitlines()
    if name == "ask_the_docs.py":
        assert EXPECTED[name][0] in ended.stdout
    else:
        assert lines == EXPECTED[name]


@pytest.mark.parametrize("name", [name for name in [*EXPECTED, *NEED_A_SERVER] if name != "ask_the_docs.py"])
def test_it_is_short(name: str) -> None:
    assert len((EXAMPLES / name).read_text(encoding="utf-8").splitlines()) < 50


class TestAskTheDocs:
    def test_every_question_about_the_docs_is_answered(self) -> None:
        questions = (EXAMPLES / "questions.txt").read_text(encoding="utf-8").splitlines()
        ended = run("ask_the_docs.py", "--top", "1")
        assert len(questions) == 8
        assert [line for line in ended.stdout.splitlines() if line in questions] == questions
        assert "The context does not say." not in ended.stdout
        assert ended.stdout.count("  [1] ") + ended.stdout.count("  [2] ") >= len(questions)
        assert re.search(r"answer +1 +8 +8 +0 ", ended.stdout)

    def test_the_passage_under_the_right_heading_answers(self, tmp_path: Path) -> None:
        (tmp_path / "docs" / "deep").mkdir(parents=True)
        (tmp_path / "docs" / "deep" / "guide.md").write_text(GUIDE, encoding="utf-8")
        questions = tmp_path / "questions.txt"
        questions.write_text('Which task gets a "key"?\n\nWhen is the service cleaned?\nWhat is it?\n', "utf-8")
        ended = run("ask_the_docs.py", "--docs", tmp_path / "docs", "--questions", questions, "--top", "1")
        assert ended.returncode == 0, ended.stderr
        answers, report = ended.stdout.split('job "read the documents"')
        assert [line.strip() for line in answers.splitlines() if line] == [
            'Which task gets a "key"?',
            "Guide > Keys: Records of the same key go to the same task. [1]",
            "[1] deep/guide.md#keys",
            "When is the service cleaned?",
            "Guide > Services: A service is stopped after the last call, and then it is cleaned up. [1]",
            "[1] deep/guide.md#services",
            "What is it?",
            "The context does not say.",
        ]
        assert re.search(r"index +stopped ", report)

    def test_what_is_missing_is_named(self, tmp_path: Path) -> None:
        for args, text in (
            (("--docs", tmp_path / "none"), f"folder {tmp_path / 'none'} does not exist; name one with --docs"),
            (("--questions", tmp_path), f"file {tmp_path} does not exist; name one with --questions"),
            (("--top", "0"), "--top is 0, but at least 1 passage must be asked for"),
        ):
            ended = run("ask_the_docs.py", *args)
            assert ended.returncode == 1
            assert ended.stderr.strip() == text
            assert ended.stdout == ""
