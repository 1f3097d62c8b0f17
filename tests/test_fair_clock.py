"""The clock of the other tests leaves out what the kernel counts as taken, and only that."""

from __future__ import annotations

import os
import time
from pathlib import Path

import pytest
from fair_clock import FairClock

TICKS_PER_S = os.sysconf("SC_CLK_TCK")


def count(proc: Path, process: str, thread: int, queued_s: float) -> Path:
    """Write what the kernel counts of a thread: time on a processor, time in the queue, and turns; in nanoseconds."""
    file = proc / process / "task" / str(thread) / "schedstat"
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(f"9000000000 {queued_s * 1e9:.0f} 7\n")
    return file


def stolen(proc: Path, seconds: float) -> None:
    (proc / "stat").write_text(f"cpu  1 0 2 3 4 0 5 {seconds * TICKS_PER_S:.0f} 0 0\ncpu0 1 0 2 3 4 0 5 6 0 0\n")


def test_what_is_taken_is_left_out(tmp_path: Path) -> None:
    """Queues of all threads, and stolen processors; not what another process waited for."""
    stolen(tmp_path, 3)
    count(tmp_path, "self", 1, 4)
    clock = FairClock(tmp_path)
    began_at, really_began_at = clock(), time.monotonic()
    stolen(tmp_path, 10)
    count(tmp_path, "self", 1, 24)
    count(tmp_path, "self", 2, 100)
    count(tmp_path, "77", 77, 5000)
    assert clock() - began_at == pytest.approx(time.monotonic() - really_began_at - 127, abs=2)


def test_a_watched_process_counts(tmp_path: Path) -> None:
    stolen(tmp_path, 0)
    count(tmp_path, "77", 78, 50)
    clock = FairClock(tmp_path)
    began_at, really_began_at = clock(), time.monotonic()
    clock.watch(77)
    assert clock() - began_at == pytest.approx(time.monotonic() - really_began_at - 50, abs=2)


def test_what_a_thread_that_ended_waited_for_stays_left_out(tmp_path: Path) -> None:
    """Otherwise the clock would jump ahead when a thread ends."""
    stolen(tmp_path, 0)
    file = count(tmp_path, "self", 2, 50)
    clock = FairClock(tmp_path)
    began_at, really_began_at = clock(), time.monotonic()
    file.unlink()
    file.parent.rmdir()
    assert clock() - began_at == pytest.approx(time.monotonic() - really_began_at, abs=2)


def test_where_nothing_is_counted_it_is_an_ordinary_clock(tmp_path: Path) -> None:
    assert FairClock(tmp_path / "none")() == pytest.approx(time.monotonic(), abs=2)
