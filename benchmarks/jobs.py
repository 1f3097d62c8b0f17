"""What a job costs beside its records: start, stop, import, memory, and how long a slow record waits."""

from __future__ import annotations

import os
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from concurrent.futures import Future
from functools import partial
from queue import Queue, SimpleQueue
from typing import TYPE_CHECKING

from benchmarks.measure import Figure, Scale, alternated, at_least, at_most
from benchmarks.throughput import has_bytewax
from sage import BaseService, LocalEnvironment

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

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


LOW_RATE_S = 0.001
FUSED_P50_MAX_MS = 0.05


def low_rate(scale: Scale) -> Iterator[Figure]:
    """A source that gives a record each millisecond: how long each takes to the sink, against threads with queues."""
    count = min(1_000, scale.records // 100)
    for operators in (1, 5, 20):
        fused = _late_by_sage(count, operators, channels=False)
        yield at_most(f"record each ms, {operators} fused, p50", "ms", FUSED_P50_MAX_MS, [statistics.median(fused)])
        ours = _late_by_sage(count, operators, channels=True)
        by_hand = _late_by_queues(count, operators)
        ratio = statistics.median(ours) / statistics.median(by_hand)
        yield at_most(f"record each ms, {operators} channels, p50", "times threads with queues", 2, [ratio])
        if has_bytewax():
            ratio = _p99(fused) / _p99(_late_by_bytewax(count, operators))
            yield at_most(f"record each ms, {operators} fused, p99", "times bytewax", 2, [ratio])


def _p99(late: list[float]) -> float:
    return statistics.quantiles(late, n=100)[-1]


def _each_ms(count: int) -> Iterator[float]:
    for _ in range(count):
        time.sleep(LOW_RATE_S)
        yield time.perf_counter()


def _late_by_sage(count: int, operators: int, *, channels: bool) -> list[float]:
    late: list[float] = []
    env = LocalEnvironment("low rate")
    stream = env.from_batch(lambda: _each_ms(count))
    for number in range(operators):
        stream = stream.map(lambda value: value, parallelism=1 + (number + 1) % 2 if channels else 1)
    stream.sink(lambda left_at: late.append(1_000 * (time.perf_counter() - left_at)))
    env.submit(autostop=True)
    return late


def _late_by_bytewax(count: int, operators: int) -> list[float]:
    from bytewax import operators as op
    from bytewax.dataflow import Dataflow
    from bytewax.testing import TestingSink, TestingSource, run_main

    late: list[float] = []
    flow = Dataflow("low_rate")
    stream = op.input("values", flow, TestingSource(_each_ms(count)))
    for number in range(operators):
        stream = op.map(f"map{number}", stream, lambda value: value)
    arrived = op.map("arrived", stream, lambda left_at: late.append(1_000 * (time.perf_counter() - left_at)))
    op.output("out", arrived, TestingSink([]))
    run_main(flow)
    return late


def _late_by_queues(count: int, operators: int) -> list[float]:
    late: list[float] = []
    queues: list[Queue[float | None]] = [Queue() for _ in range(operators + 1)]

    def work(place: int) -> None:
        while (value := queues[place].get()) is not None:
            if place < operators:
                queues[place + 1].put(value)
            else:
                late.append(1_000 * (time.perf_counter() - value))
        if place < operators:
            queues[place + 1].put(None)

    threads = [threading.Thread(target=work, args=(place,)) for place in range(operators + 1)]
    for thread in threads:
        thread.start()
    for value in _each_ms(count):
        queues[0].put(value)
    queues[0].put(None)
    for thread in threads:
        thread.join()
    return late


SERVED = ((1, 0.5), (10, 0.7), (100, 0.9))
"""How many threads call a served pipeline at once, and the target."""


def served(scale: Scale) -> Iterator[Figure]:
    """Calls of a served pipeline, against a thread with a queue whose answers are futures."""
    calls = scale.records // 100
    requests: SimpleQueue[tuple[int, Future[int]] | None] = SimpleQueue()

    def work() -> None:
        while (request := requests.get()) is not None:
            value, answer = request
            answer.set_result(abs(value))

    def ask(value: int) -> int:
        answer = Future[int]()
        requests.put((value, answer))
        return answer.result()

    def call_all(call: Callable[[int], int], callers: int) -> None:
        def call_some() -> None:
            for value in range(calls // callers):
                call(value)

        threads = [threading.Thread(target=call_some) for _ in range(callers)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()

    thread = threading.Thread(target=work)
    thread.start()
    env = LocalEnvironment("served")
    pipeline = env.serve("absolute", lambda values: values.map(abs))
    job = env.submit()
    for callers, target in SERVED:
        sides = (partial(call_all, ask, callers), partial(call_all, lambda value: pipeline.process(value), callers))
        ratios = [seconds[0] / seconds[1] for seconds in alternated(scale.rounds, *sides)]
        yield at_least(f"served pipeline, {callers} at once", "of a queue and a future", target, ratios)
    requests.put(None)
    thread.join()
    job.stop()


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
