"""What a job costs beside its records: start, stop, import, memory, and how long a slow record waits."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import threading
import time
from typing import TYPE_CHECKING

from benchmarks.measure import Figure, Scale, alternated, at_most
from sage import BaseService, LocalEnvironment

if TYPE_CHECKING:
    from collections.abc import Iterator

CHEAP_RECORDS = 10_000
SLOW_AFTER_CHEAP_S = 0.2
COMPILED = tempfile.TemporaryDirectory(prefix="sage-benchmarks-")


class Idle(BaseService):
    """A service with every hook and nothing in them."""

    def setup(self) -> None:
        """Do nothing."""

    def start(self) -> None:
        """Do nothing."""

    def stop(self) -> None:
        """Do nothing."""

    def cleanup(self) -> None:
        """Do nothing."""


def two_threads() -> None:
    """The unit of the cases in this file."""
    threads = [threading.Thread(target=int) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


def one_record() -> None:
    env = LocalEnvironment("one record")
    env.from_batch([1]).map(abs).sink(int)
    env.submit(autostop=True)


def five_tasks() -> None:
    """Five operators, of which each has two consumers or shares its producer, so that none are fused."""
    env = LocalEnvironment("five tasks")
    for name in ("first", "second"):
        env.register_service(name, Idle)
    values = env.from_batch([1])
    values.sink(int)
    mapped = values.map(abs)
    mapped.sink(int)
    mapped.sink(int)
    env.submit(autostop=True)


def short_jobs(scale: Scale) -> Iterator[Figure]:
    """A job of one record, against threads that do nothing."""
    unit = "times two threads"
    taken = alternated(scale.short_rounds, two_threads, one_record, five_tasks)
    yield at_most("job of one record", unit, 20, [seconds[1] / seconds[0] for seconds in taken])
    yield at_most("5 unfused operators, 2 services", unit, 60, [seconds[2] / seconds[0] for seconds in taken])


def stopping(scale: Scale) -> Iterator[Figure]:
    """From the last record to the return of submit, in a healthy job with three services."""
    left_at: list[float] = []

    def job() -> None:
        env = LocalEnvironment("stop")
        for name in ("first", "second", "third"):
            env.register_service(name, Idle)
        seen = 0.0

        def see(_: int) -> None:
            nonlocal seen
            seen = time.perf_counter()

        env.from_batch(range(1_000)).sink(see)
        env.submit(autostop=True)
        left_at.append(time.perf_counter() - seen)

    taken = alternated(scale.short_rounds, two_threads, job)
    ratios = [left / seconds[0] for left, seconds in zip(left_at[1:], taken, strict=True)]
    yield at_most("stop with 3 services", "times two threads", 30, ratios)


def _python(program: str) -> str:
    """Run a program in a fresh interpreter that finds the same modules, and return what it prints."""
    # Compiled modules are kept, as where the package is installed, even if the environment says otherwise.
    environment = {**os.environ, "PYTHONDONTWRITEBYTECODE": "", "PYTHONPYCACHEPREFIX": COMPILED.name}
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, sys.path))
    command = [sys.executable, "-c", program]
    return subprocess.run(command, check=True, capture_output=True, text=True, env=environment).stdout


def importing(scale: Scale) -> Iterator[Figure]:
    """The import as a process, against an empty one: of the package alone, and with what every program needs of it."""
    rounds = max(7, scale.short_rounds // 8)
    programs = ("pass", "import sage", "from sage import LocalEnvironment")
    taken = alternated(rounds, *(lambda program=program: _python(program) for program in programs))
    for place, program in enumerate(programs[1:], start=1):
        ratios = [seconds[place] / seconds[0] for seconds in taken]
        yield at_most(program, "times python -c pass", 4, ratios)


# The high-water mark of the address space, where there is one: what getrusage tells of a process begins with the mark
# of the one that started it.
PEAK = """
def peak():
    try:
        with open("/proc/self/status") as status:
            return next(int(line.split()[1]) / 1024 for line in status if line.startswith("VmHWM"))
    except OSError:
        import resource, sys
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2**20 if sys.platform == "darwin" else 2**10)
"""
CHAIN = """
from collections import deque
from sage import LocalEnvironment
env = LocalEnvironment("memory")
stream = env.from_batch(range({records})).map(lambda x: x * 3 + 1).filter(lambda x: x % 2 == 0).map(lambda x: x - 7)
stream.sink(deque(maxlen=1).append)
env.submit(autostop=True)
"""


def memory(scale: Scale) -> Iterator[Figure]:
    """The highest resident memory of map, filter, map and sink, above an empty interpreter."""
    above = []
    for _ in range(5):
        empty = float(_python(PEAK + "print(peak())"))
        full = float(_python(PEAK + CHAIN.format(records=scale.records) + "print(peak())"))
        above.append(full - empty)
    yield at_most("memory of map, filter, map, sink", "MB above an empty interpreter", 15, above)


def latency(scale: Scale) -> Iterator[Figure]:
    """How long a slow record takes to the sink: alone, among equals, and after many cheap ones; and a cancel."""
    slow_s = scale.slow_s

    def reached(values: list[float]) -> list[float]:
        """Return the time from the start of each slow record to its arrival."""
        began: list[float] = []
        arrived: list[float] = []

        def work(value: float) -> float:
            if value:
                began.append(time.perf_counter())
                time.sleep(value)
            return value

        env = LocalEnvironment("latency")
        slow = env.from_batch(values).map(work).filter(bool)
        slow.sink(lambda _: arrived.append(time.perf_counter()))
        env.submit(autostop=True)
        return [end - start for start, end in zip(began, arrived, strict=True)]

    alone = reached([slow_s])
    equals = reached([slow_s] * 5)
    after = reached([0.0] * CHEAP_RECORDS + [SLOW_AFTER_CHEAP_S] * 5)
    unit = "s beyond its own time, worst"
    yield at_most(f"a record of {slow_s:g} s alone", unit, 0.1, [max(alone) - slow_s])
    yield at_most(f"5 records of {slow_s:g} s", unit, 0.1, [max(equals) - slow_s])
    yield at_most(f"{SLOW_AFTER_CHEAP_S:g} s after 10,000 cheap", unit, 0.1, [max(after) - SLOW_AFTER_CHEAP_S])
    yield at_most("cancel among slow records", "s beyond one record's time, worst", 0.1, [max(_cancels())])


def _cancels() -> list[float]:
    over = []
    for _ in range(5):
        is_slow = threading.Event()

        def work(value: int, is_slow: threading.Event = is_slow) -> None:
            if value >= CHEAP_RECORDS:
                is_slow.set()
                time.sleep(SLOW_AFTER_CHEAP_S)

        env = LocalEnvironment("cancel")
        env.from_batch(range(CHEAP_RECORDS + 50)).sink(work)
        job = env.submit()
        is_slow.wait()
        asked_at = time.perf_counter()
        job.cancel()
        over.append(time.perf_counter() - asked_at - SLOW_AFTER_CHEAP_S)
    return over
