"""A clock that leaves out what the machine itself took, so that a bound holds on a machine that stalls."""

from __future__ import annotations

import os
import threading
import time
from contextlib import suppress
from pathlib import Path

READ_EVERY_S = 0.01
NS_PER_S = 1e9


class FairClock:
    """Tells the time in seconds, less the time in which the machine did not let run what was ready to run.

    That time is counted by the kernel, and not by a thread that may be late for the very reason that a test looks for:
    how long threads of this process and of those that are watched stood in the queue for a processor, and how long the
    processors were taken from the whole machine. Sleeping, polling, waiting for a lock or for the GIL and being busy
    are not left out, so that a bound finds them. Times are only good for upper bounds: a processor may be taken while
    the code under test sleeps, which then seems to sleep for less. Where nothing is counted it is an ordinary clock.

    Args:
        proc: where the kernel's counts are.
    """

    def __init__(self, proc: Path = Path("/proc")) -> None:
        self._proc = proc
        self._processes = ["self"]
        self._queued_ns: dict[str, int] = {}
        self._lock = threading.Lock()
        self._ended = threading.Event()
        self._reader = threading.Thread(target=self._read_on, name="fair-clock", daemon=True)

    def __enter__(self) -> FairClock:
        self._reader.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        self._reader.join()

    def __call__(self) -> float:
        """Return the time; only differences of times have a meaning."""
        now = time.monotonic()
        return now - self._taken_s()

    def watch(self, process_id: int) -> None:
        """Leave out what the machine takes from another process, too."""
        self._processes.append(str(process_id))

    def _taken_s(self) -> float:
        """Return how many seconds the machine took until now; the counts of threads that ended are kept."""
        with self._lock:
            for process in self._processes:
                self._read_queued(self._proc / process / "task")
            return sum(self._queued_ns.values()) / NS_PER_S + self._stolen_s()

    def _read_queued(self, threads: Path) -> None:
        own = str(self._reader.native_id)
        # A thread, or the whole process, may end meanwhile, or this is no Linux.
        with suppress(OSError):
            for thread in os.listdir(threads):
                with suppress(OSError):
                    if thread != own:
                        self._queued_ns[thread] = int((threads / thread / "schedstat").read_bytes().split()[1])

    def _stolen_s(self) -> float:
        with suppress(OSError), (self._proc / "stat").open(encoding="ascii") as counts:
            return int(counts.readline().split()[8]) / os.sysconf("SC_CLK_TCK")
        return 0.0

    def _read_on(self) -> None:
        # A thread that ends takes its count with it, so that it has to be read while the thread lives.
        while not self._ended.wait(READ_EVERY_S):
            self._taken_s()
