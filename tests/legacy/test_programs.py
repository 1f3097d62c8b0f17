"""Programs as users wrote them in 2025 run unchanged and give what they were meant to give."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
import time
from collections import Counter
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from support.fair_clock import FairClock

PROGRAMS = Path(__file__).parent / "programs"
SOURCE = Path(__file__).resolve().parents[2] / "src"


def run(name: str) -> Any:
    """Import a program and return what its `main()` returns."""
    spec = importlib.util.spec_from_file_location(f"legacy_{name}", PROGRAMS / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    program = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(program)
    return program.main()


def test_hello_world(capsys: pytest.CaptureFixture[str]) -> None:
    greetings = [f"HELLO, WORLD! #{number}" for number in range(1, 6)]
    assert run("hello_world") == greetings
    assert capsys.readouterr().out.splitlines() == greetings


@pytest.mark.parametrize("name", sorted(path.stem for path in PROGRAMS.glob("*.py")))
def test_each_program_is_a_script_too(name: str) -> None:
    """The exit code is 0 and nothing but the program itself writes anything."""
    script = [sys.executable, "-W", "error", str(PROGRAMS / f"{name}.py")]
    environment = {**os.environ, "PYTHONPATH": str(SOURCE)}
    done = subprocess.run(script, env=environment, capture_output=True, text=True, timeout=50)
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    assert len(done.stdout.splitlines()) == (5 if name == "hello_world" else 0)


def test_hello_service_world() -> None:
    """A constructor that does not call super works; cleanup is over when submit returns."""
    said, hooks = run("hello_service_world")
    assert said == ["Good day! #2", "Good day! #1", "Good day! #0"]
    assert hooks == ["setup", "stop", "cleanup"]


def test_word_count_by_key() -> None:
    """The records of one word meet in one task."""
    counts, tasks_of = run("word_count")
    once = dict.fromkeys(["or", "not", "that", "is", "the", "question", "sleep", "dream"], 1)
    assert counts == {"to": 4, "be": 2, **once}
    assert {word: len(tasks) for word, tasks in tasks_of.items()} == dict.fromkeys(counts, 1)


def test_connected_streams() -> None:
    """A union has all of the fast and of the slow stream."""
    seen = run("connected_streams")
    assert [value for value in seen if value >= 1000] == list(range(1000, 1200, 10))
    assert [value for value in seen if value < 1000] == [0, 10, 30]


def test_comap_of_two_inputs() -> None:
    """The longer input arrives to its end."""
    results = run("comap_two")
    assert [result for result in results if result.startswith("hot")] == ["hot 31", "hot 35"]
    assert [result for result in results if not result.startswith("hot")] == [f"pressure {n}" for n in range(1, 61)]


def test_comap_of_three_inputs() -> None:
    results = run("comap_three")
    assert sorted(results) == sorted(
        chain(
            [("login", user) for user in ("ann", "bob", "cid")],
            [("order", "ann")] * 2,
            [("logout", "bob")],
        )
    )


def test_join() -> None:
    """It ends, with all matches, whatever the classes of the sources are called."""
    assert sorted(run("join_orders")) == [("ann", "ink"), ("bob", "jam"), ("bob", "tea")]


def test_feedback_loop() -> None:
    """It ends by itself when the data have died out, and has processed every record."""
    assert Counter(run("feedback_loop")) == Counter([2, 1, 0, 0, 4, 3, 2, 1, 0])


def test_pipeline_as_service() -> None:
    """The pipeline answers until it is told to shut down."""
    answers, is_closed = run("pipeline_as_service")
    assert answers[:-1] == [{"result": number**2, "original": number} for number in range(1, 6)]
    assert answers[-1] == {"status": "shutdown_ack"}
    assert is_closed is True


def test_pipeline_as_service_of_own_classes() -> None:
    """Classes of any name answer, and may call services themselves; the job ends."""
    decisions, closed = run("own_pipeline_service")
    assert decisions == [
        (1, "tea", True, "Reply", "aet"),
        (2, "tea", False, "Reply", "aet"),
        (3, "ink", True, "Reply", "kni"),
    ]
    assert closed == [True, True]


def test_an_error_in_the_pipeline_reaches_the_caller(clock: FairClock) -> None:
    """Promptly, as the error that it is; the source's poll interval of 5 s delays no answer."""
    began_at = time.monotonic()
    outcomes = run("failing_pipeline_service")
    assert clock.elapsed_s(began_at) < 2.0
    assert outcomes == [
        {"quotient": 4},
        "ZeroDivisionError: integer division or modulo by zero",
        {"quotient": 3},
    ]


def test_lockstep() -> None:
    assert run("lockstep") == [f"{what} {number}" for number in range(1, 5) for what in ("sent", "done")]
