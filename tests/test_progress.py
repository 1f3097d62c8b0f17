"""How far a job is, in numbers and as a line."""

from __future__ import annotations

import io
import threading
from typing import TYPE_CHECKING

import pytest

from sage import LocalEnvironment
from sage._progress import ProgressLine, Rates, part_done, time_left
from sage.testing import ManualClock, assert_clean

if TYPE_CHECKING:
    from collections.abc import Iterator


@pytest.mark.parametrize(
    ("count", "length", "part"),
    [(0, 10, 0.0), (5, 10, 0.5), (10, 10, 1.0), (12, 10, 1.0), (0, 0, 1.0), (7, None, None)],
)
def test_a_part_is_never_more_than_all(count: int, length: int | None, part: float | None) -> None:
    assert part_done(count, length) == part


@pytest.mark.parametrize(
    ("count", "length", "rate", "left"),
    [
        (0, 10, 100.0, "100.0 ms"),
        (90, 100, 1.0, "10 s"),
        (0, 600, 1.0, "10 min"),
        (0, 7_500, 1.0, "2 h 5 min"),
        (0, 10, 0.0, ""),
        (10, 10, 1.0, ""),
        (12, 10, 1.0, ""),
        (3, None, 1.0, ""),
    ],
)
def test_the_time_left(count: int, length: int | None, rate: float, left: str) -> None:
    assert time_left(count, length, rate) == left


def test_a_rate_is_smoothed() -> None:
    clock = ManualClock()
    rates = Rates(clock)
    assert rates.rate("a", 0) == 0.0
    clock.advance(2.0)
    assert rates.rate("a", 20) == 10.0
    clock.advance(1.0)
    assert rates.rate("a", 50) == 20.0
    assert rates.rate("b", 50) == 0.0


def test_submit_writes_a_line_at_the_end_where_there_is_no_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    with assert_clean():
        env = LocalEnvironment("shown")
        env.from_batch([1, 0, 2]).map(lambda x: 1 // x, on_error="skip").sink(lambda x: None)
        env.run(progress=True)
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("shown: over, 3 of 3 records (100%), ")
    assert line.endswith("/s, 1 failed")


def test_nothing_is_written_unless_it_is_asked_for(capsys: pytest.CaptureFixture[str]) -> None:
    env = LocalEnvironment("quiet")
    env.from_batch([1]).sink(lambda x: None)
    env.run(progress=True)
    capsys.readouterr()
    env.run()
    assert capsys.readouterr().err == ""


def test_a_source_of_unknown_length_has_no_percent(capsys: pytest.CaptureFixture[str]) -> None:
    def numbers() -> Iterator[int]:
        yield from [1, 2]

    env = LocalEnvironment("unknown")
    env.from_batch([1]).union(env.from_batch(numbers)).sink(lambda x: None)
    env.submit(autostop=True, progress=True)
    assert capsys.readouterr().err.startswith("unknown: over, 3 records, ")


class Terminal(io.StringIO):
    """Says when something was written."""

    def __init__(self) -> None:
        super().__init__()
        self.written = threading.Event()

    def isatty(self) -> bool:
        return True

    def write(self, text: str) -> int:
        self.written.set()
        return super().write(text)


def test_a_terminal_has_one_line_that_changes() -> None:
    terminal = Terminal()
    goes_on = threading.Event()

    def wait(number: int) -> int:
        goes_on.wait(20)
        return number

    env = LocalEnvironment("terminal")
    env.from_batch(range(4)).map(lambda x: x, parallelism=2).map(wait).sink(lambda x: None)
    job = env.submit()
    try:
        line = ProgressLine(job, terminal)
        line.start()
        assert terminal.written.wait(20)
        assert "fullest queue " in line.text()
    finally:
        goes_on.set()
    job.wait()
    lines = terminal.getvalue().split("\r")
    assert lines[1].startswith("terminal: running, 4 of 4 records (100%), ")
    assert lines[-1].startswith("terminal: over, ")
    assert lines[-1].endswith("\n")
    assert terminal.getvalue().count("\n") == 1


def test_a_terminal_that_is_gone_does_not_matter() -> None:
    closed = io.StringIO()
    closed.close()
    env = LocalEnvironment("gone")
    env.from_source(lambda: None).sink(lambda x: None)
    job = env.submit()
    ProgressLine(job, closed).start()
    job.stop()
