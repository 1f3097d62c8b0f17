"""A clock that leaves out what the machine itself took, so that a bound holds on a machine that stalls."""

from __future__ import annotations

import os
import threading
import time
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

READ_EVERY_S = 0.01
SETTLED_AFTER_S = 0.02
"""The kernel counts a stall at its next tick, at most 10 ms after the stall."""
NS_PER_S = 1e9


class Reading(NamedTuple):
    """How much the machine had taken in all, and from when to when that was read, in seconds."""

    began_at: float
    ended_at: float
    taken_s: float


class FairClock:
    """Tells how long something took, less the time in which the machine did not let run what was ready to run.

    That time is counted by the kernel, and not by a thread that may be late for the very reason that a test looks for:
    how long threads of this process and of those that are watched stood in the queue for a processor, and how long the
    processors were taken from the whole machine. Sleeping, polling, waiting for a lock or for the GIL and being busy
    are not left out, so that a bound finds them. Results are only good for upper bounds: a processor may be taken while
    the code under test sleeps. Where nothing is counted, nothing is left out.

    Args:
        proc: where the kernel's counts are.
    """

    def __init__(self, proc: Path = Path("/proc")) -> None:
        self._proc = proc
        self._processes = ["self"]
        self._queued_ns: dict[str, int] = {}
        self._readings: list[Reading] = []
        self._lock = threading.Lock()
        self._ended = threading.Event()
        self._reader = threading.Thread(target=self._read_on, name="fair-clock", daemon=True)

    def __enter__(self) -> FairClock:
        self._read()
        self._reader.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        self._reader.join()

    def watch(self, process_id: int) -> None:
        """Leave out what the machine takes from another process, too."""
        self._processes.append(str(process_id))
        self._read()

    def elapsed_s(self, began_at: float, ended_at: float | None = None) -> float:
        """Return the seconds between two moments of `time.monotonic()`, of which the second is now unless it is given.

        Both have to lie behind the start of the clock.
        """
        if ended_at is None:
            ended_at = time.monotonic()
        time.sleep(max(0.0, ended_at + SETTLED_AFTER_S - time.monotonic()))
        self._read()
        before = max(reading for reading in self._readings if reading.ended_at <= began_at)
        behind = min(reading for reading in self._readings if reading.began_at >= ended_at + SETTLED_AFTER_S)
        return ended_at - began_at - (behind.taken_s - before.taken_s)

    def _read(self) -> None:
        with self._lock:
            began_at = time.monotonic()
            for process in self._processes:
                self._read_queued(self._proc / process / "task")
            taken_s = sum(self._queued_ns.values()) / NS_PER_S + self._stolen_s()
            self._readings.append(Reading(began_at, time.monotonic(), taken_s))

    def _read_queued(self, threads: Path) -> None:
        own = str(self._reader.native_id)
        # A thread, or the whole process, may end meanwhile, or this is no Linux.
        with suppress(OSError, IndexError):
            for thread in os.listdir(threads):
                with suppress(OSError, IndexError):
                    if thread != own:
                        self._queued_ns[thread] = int((threads / thread / "schedstat").read_bytes().split()[1])

    def _stolen_s(self) -> float:
        with suppress(OSError, IndexError), (self._proc / "stat").open(encoding="ascii") as counts:
            return int(counts.readline().split()[8]) / os.sysconf("SC_CLK_TCK")
        return 0.0

    def _read_on(self) -> None:
        # A thread that ends takes its count with it, so that it has to be read while the thread lives.
        while not self._ended.wait(READ_EVERY_S):
            self._read()
