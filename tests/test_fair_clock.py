"""The clock of the other tests leaves out what the kernel counts as taken, and only that."""

from __future__ import annotations

import os
import time
from typing import TYPE_CHECKING

import pytest
from support.fair_clock import FairClock

if TYPE_CHECKING:
    from pathlib import Path

TICKS_PER_S = os.sysconf("SC_CLK_TCK")


def queue(proc: Path, process: str, thread: int, queued_s: float) -> Path:
    """Write what the kernel counts of a thread: time on a processor, time in the queue, and turns; in nanoseconds."""
    file = proc / process / "task" / str(thread) / "schedstat"
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(f"9000000000 {queued_s * 1e9:.0f} 7\n")
    return file


def steal(proc: Path, seconds: float) -> None:
    proc.joinpath("stat").write_text(f"cpu  1 0 2 3 4 0 5 {seconds * TICKS_PER_S:.0f} 0 0\ncpu0 1 0 2 3 4 0 5 6 0 0\n")


def test_what_is_taken_is_left_out(tmp_path: Path) -> None:
    """Queues of all threads, and stolen processors; not what a process waited for that is not watched."""
    steal(tmp_path, 3)
    queue(tmp_path, "self", 1, 4)
    with FairClock(tmp_path) as clock:
        began_at = time.monotonic()
        steal(tmp_path, 10)
        queue(tmp_path, "self", 1, 24)
        queue(tmp_path, "self", 2, 100)
        queue(tmp_path, "77", 77, 5000)
        ended_at = time.monotonic()
        assert clock.elapsed_s(began_at, ended_at) == pytest.approx(ended_at - began_at - 127)


def test_what_is_taken_later_counts(tmp_path: Path) -> None:
    steal(tmp_path, 10)
    with FairClock(tmp_path) as clock:
        began_at = time.monotonic()
        ended_at = time.monotonic()
        assert clock.elapsed_s(began_at, ended_at) == pytest.approx(ended_at - began_at)
        steal(tmp_path, 20)
        assert clock.elapsed_s(began_at, ended_at) == pytest.approx(ended_at - began_at)


def test_what_a_watched_process_waited_for_is_left_out_from_then_on(tmp_path: Path) -> None:
    queue(tmp_path, "77", 78, 50)
    with FairClock(tmp_path) as clock:
        clock.watch(77)
        began_at = time.monotonic()
        queue(tmp_path, "77", 78, 54)
        ended_at = time.monotonic()
        assert clock.elapsed_s(began_at, ended_at) == pytest.approx(ended_at - began_at - 4)


def test_what_a_thread_that_ended_waited_for_stays_left_out(tmp_path: Path) -> None:
    """Otherwise its end would take away what others waited for."""
    file = queue(tmp_path, "self", 2, 50)
    with FairClock(tmp_path) as clock:
        began_at = time.monotonic()
        file.unlink()
        file.parent.rmdir()
        queue(tmp_path, "self", 3, 4)
        ended_at = time.monotonic()
        assert clock.elapsed_s(began_at, ended_at) == pytest.approx(ended_at - began_at - 4)


def test_without_counts_nothing_is_left_out(tmp_path: Path) -> None:
    with FairClock(tmp_path / "none") as clock:
        began_at = time.monotonic()
        assert clock.elapsed_s(began_at, began_at + 0.01) == pytest.approx(0.01)
