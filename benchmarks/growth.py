"""How time and memory grow with the number of services, operators and jobs, beside the same thing written by hand.

`python -m benchmarks.growth` prints every size of every case; `python -m benchmarks.growth NAME ...` only these cases.
A further case is one more line in `GROWTH`.
"""

from __future__ import annotations

import argparse
import gc
import json
import math
import os
import statistics
import subprocess
import sys
import threading
from collections import deque
from dataclasses import dataclass, field
from functools import partial
from graphlib import TopologicalSorter
from itertools import islice
from time import perf_counter, sleep
from typing import TYPE_CHECKING
from zlib import crc32

from benchmarks.jobs import Idle
from benchmarks.measure import QUICK, Figure, Scale, alternated, at_least, at_most
from sage import LocalEnvironment, ServiceOptions

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

EXPONENT_MAX = 1.1
ROUNDS = 5
LONG_S = 60.0
MEMORY_LEAST_MB = 4.0
"""Less counts as this much: the interpreter takes memory from the system in steps."""


@dataclass(frozen=True, slots=True)
class Case:
    """One thing that is grown. Both functions do all the work for `n` and return what is worth measuring, in seconds.

    Attributes:
        name: the case's name.
        unit: what `n` counts.
        ours: does it with SAGE.
        by_hand: does the same as a person would without SAGE.
        sizes: every `n`, in ascending order.
        least: how much of the speed of `by_hand` there has to be, by `n`; empty if only growth counts.
        exponent_max: the most that time and memory may grow with.
    """

    name: str
    unit: str
    ours: Callable[[int], float]
    by_hand: Callable[[int], float]
    sizes: tuple[int, ...]
    least: Mapping[int, float] = field(default_factory=dict)
    exponent_max: float = EXPONENT_MAX


@dataclass(frozen=True, slots=True)
class Point:
    """What one size took: the least of the seconds, and the median of the peak memory above the one before, in MB."""

    size: int
    seconds: float
    peak_mb: float


Pair = tuple[Point, Point]
"""The point of SAGE, and that of what is written by hand."""


# --- services ---------------------------------------------------------------------------------------------------------


def none_before(number: int) -> tuple[int, ...]:  # noqa: ARG001
    """No service depends on another: they stop one after the other."""
    return ()


def one_before(number: int) -> tuple[int, ...]:
    """Each depends on the one before it."""
    return (number - 1,) if number else ()


def first_of_all(number: int) -> tuple[int, ...]:
    """All depend on the first."""
    return (0,) if number else ()


def level_before(number: int) -> tuple[int, ...]:
    """Levels of ten, of which each depends on three of the level before."""
    level = number // 10
    return tuple((level - 1) * 10 + (number + step) % 10 for step in range(3)) if level else ()


def services(requires: Callable[[int], tuple[int, ...]]) -> Callable[[int], float]:
    """Return a job with one record and `n` services, from submit to its return."""

    def run(n: int) -> float:
        env = LocalEnvironment("services")
        for number in range(n):
            names = [f"s{other}" for other in requires(number)]
            env.register_service(f"s{number}", Idle, options=ServiceOptions(depends_on=names))
        env.from_batch([1]).sink(int)
        return seconds_of(lambda: env.submit(autostop=True))

    return run


def services_by_hand(requires: Callable[[int], tuple[int, ...]]) -> Callable[[int], float]:
    """Return the same with a plain object for each service, and a thread for each, as one may hang."""

    def work() -> None:
        one = Idle()
        one.setup()
        one.start()
        one.stop()
        one.cleanup()

    def run(n: int) -> float:
        def all_of_it() -> None:
            order = TopologicalSorter({number: requires(number) for number in range(n)}).static_order()
            for _ in order:
                thread = threading.Thread(target=work)
                thread.start()
                thread.join()

        return seconds_of(all_of_it)

    return run


# --- operators --------------------------------------------------------------------------------------------------------


def chain_of(env: LocalEnvironment, n: int) -> None:
    """One operator after the other."""
    stream = env.from_batch([1])
    for _ in range(n):
        stream = stream.map(abs)
    stream.sink(int)


def fan_of(env: LocalEnvironment, n: int) -> None:
    """One stream into n sinks."""
    stream = env.from_batch([1])
    for _ in range(n):
        stream.sink(int)


def union_of(env: LocalEnvironment, n: int) -> None:
    """n streams into one."""
    first, *others = (env.from_batch([1]) for _ in range(n))
    first.union(*others).sink(int)


def planned(build: Callable[[LocalEnvironment, int], None], *, explained: bool = False) -> Callable[[int], float]:
    """Return the time that it takes to plan a graph of `n` operators, or to write its plan as well."""

    def run(n: int) -> float:
        env = LocalEnvironment("operators")

        def work() -> None:
            build(env, n)
            if explained:
                env.explain()
            else:
                env._plan(env._graph())

        return seconds_of(work)

    return run


def sorted_by_hand(n: int) -> float:
    """Put `n` nodes that each have one before into order, with the standard library."""

    def work() -> None:
        nodes = {number: {"name": f"map-{number}", "inputs": (number - 1,) if number else ()} for number in range(n)}
        tuple(TopologicalSorter({number: node["inputs"] for number, node in nodes.items()}).static_order())

    return seconds_of(work)


# --- jobs -------------------------------------------------------------------------------------------------------------


def many_jobs(n: int) -> float:
    """Run `n` jobs of one record, one after the other, each with an environment and a service of its own."""

    def work() -> None:
        for _ in range(n):
            env = LocalEnvironment("job")
            env.register_service("idle", Idle)
            env.from_batch([1]).sink(int)
            env.submit(autostop=True)

    return seconds_of(work)


def many_jobs_of_one(n: int) -> float:
    """Run one environment's job `n` times, with ten services that are kept from one to the next."""
    env = LocalEnvironment("job")
    for number in range(10):
        env.register_service(f"kept{number}", Idle)
    env.from_batch([1]).sink(int)

    def work() -> None:
        for _ in range(n):
            env.submit(autostop=True, keep_services=True)

    seconds = seconds_of(work)
    env.close()
    return seconds


def threads_by_hand(n: int) -> float:
    """Start and join two threads, `n` times."""

    def work() -> None:
        for _ in range(n):
            threads = [threading.Thread(target=int) for _ in range(2)]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()

    return seconds_of(work)


# --- records ----------------------------------------------------------------------------------------------------------

RECORDS = 1_000_000


def next_of(value: int) -> int:
    """Do next to nothing with a record."""
    return value + 1


DELIVERIES = 10 * RECORDS
"""By hand these take a second. In a tenth of it, half of a job of a hundred branches is its begin and its end."""


def branches(n: int) -> float:
    """Send ten million records in all through `n` branches of one stream."""
    env = LocalEnvironment("branches")
    stream = env.from_batch(range(DELIVERIES // n))
    for _ in range(n):
        stream.map(next_of).sink(deque[int](maxlen=1).append)
    return seconds_of(lambda: env.submit(autostop=True))


def branches_by_hand(n: int) -> float:
    """Do the same in a loop."""
    outs = [deque[int](maxlen=1).append for _ in range(n)]

    def work() -> None:
        for value in range(DELIVERIES // n):
            for out in outs:
                out(next_of(value))

    return seconds_of(work)


def sources(n: int) -> float:
    """Read a million records in all from `n` sources into one operator."""
    env = LocalEnvironment("sources")
    first, *others = (env.from_batch(range(RECORDS // n)) for _ in range(n))
    (first.union(*others) if others else first).map(next_of).sink(deque[int](maxlen=1).append)
    return seconds_of(lambda: env.submit(autostop=True))


def sources_by_hand(n: int) -> float:
    """Do the same in a loop."""
    out = deque[int](maxlen=1).append

    def work() -> None:
        for _ in range(n):
            for value in range(RECORDS // n):
                out(next_of(value))

    return seconds_of(work)


def key_of(pair: tuple[str, int]) -> str:
    """Return the key."""
    return pair[0]


def added(left: tuple[str, int], right: tuple[str, int]) -> tuple[str, int]:
    """Count."""
    return left[0], left[1] + right[1]


def keys(n: int) -> float:
    """Count `n` keys that each come once, in two tasks."""
    pairs = [(f"key{number}", 1) for number in range(n)]
    env = LocalEnvironment("keys")
    counted = env.from_batch(pairs).keyby(key_of).reduce(added, emit="last", parallelism=2)
    counted.sink(deque[tuple[str, int]](maxlen=1).append)
    return seconds_of(lambda: env.submit(autostop=True))


def keys_by_hand(n: int) -> float:
    """Do the same with a dict."""
    pairs = [(f"key{number}", 1) for number in range(n)]
    out = deque[tuple[str, int]](maxlen=1).append

    def work() -> None:
        counted: dict[str, tuple[str, int]] = {}
        for pair in pairs:
            key = key_of(pair)
            counted[key] = added(counted[key], pair) if key in counted else pair
        for pair in counted.values():
            out(pair)

    return seconds_of(work)


# --- sizes of records -------------------------------------------------------------------------------------------------

BYTES_OF_ALL = 1 << 28
RECORDS_LEAST, RECORDS_MOST = 30, 1_000_000


def records_of_bytes(n: int) -> Iterator[bytes]:
    """Yield records of `n` bytes, a quarter of a GB in all if that is neither few nor many."""
    for number in range(max(RECORDS_LEAST, min(RECORDS_MOST, BYTES_OF_ALL // n))):
        yield bytes([number % 256]) * n


def read_once(record: bytes) -> bytes:
    """Read all bytes of a record, and hand it on."""
    crc32(record)
    return record


def record_sizes(n: int) -> float:
    """Send records of `n` bytes through a chain."""
    env = LocalEnvironment("sizes")
    stream = env.from_batch(records_of_bytes(n)).map(read_once).map(read_once)
    stream.sink(deque[bytes](maxlen=1).append)
    return seconds_of(lambda: env.submit(autostop=True))


def record_sizes_by_hand(n: int) -> float:
    """Do the same in a loop."""
    out = deque[bytes](maxlen=1).append

    def work() -> None:
        for record in records_of_bytes(n):
            out(read_once(read_once(record)))

    return seconds_of(work)


def large_records(scale: Scale) -> Iterator[Figure]:
    """Records of which few fit into the processor's cache, through a chain."""
    for size in (100_000, 1_000_000):
        sides = (partial(record_sizes_by_hand, size), partial(record_sizes, size))
        ratios = [seconds[0] / seconds[1] for seconds in alternated(scale.rounds, *sides)]
        yield at_least(f"records of {size // 1_000} KB through a chain", "of the loop", 0.8, ratios)


def slow_one(records: list[bytes]) -> list[bytes]:
    """Take a while for a batch."""
    sleep(0.0005 * len(records))
    return records


def queued_sizes(n: int) -> float:
    """Send records of `n` bytes to an operator that is slower than their source: the queue before it is full."""
    env = LocalEnvironment("queue")
    records = islice(records_of_bytes(n), 1_000)
    env.from_batch(records).map_batches(slow_one, max_records=1).sink(deque[bytes](maxlen=1).append)
    return seconds_of(lambda: env.submit(autostop=True))


def queued_sizes_by_hand(n: int) -> float:
    """Do the same in a loop, without a queue."""
    out = deque[bytes](maxlen=1).append

    def work() -> None:
        for record in islice(records_of_bytes(n), 1_000):
            out(slow_one([record])[0])

    return seconds_of(work)


# --- the table --------------------------------------------------------------------------------------------------------

SERVICES = (10, 30, 100, 300, 1_000)
OPERATORS = (10, 100, 300, 1_000, 3_000)
JOBS = (1, 10, 100, 1_000, 5_000)
KEYS = (1_000, 10_000, 100_000, 1_000_000, 5_000_000)
BYTES = (10, 1_000, 100_000, 1_000_000, 10_000_000)

GROWTH = {
    case.name: case
    for case in (
        Case("services", "services", services(none_before), services_by_hand(none_before), SERVICES),
        Case("services-chain", "services", services(one_before), services_by_hand(one_before), SERVICES),
        Case("services-fan", "services", services(first_of_all), services_by_hand(first_of_all), SERVICES),
        Case("services-levels", "services", services(level_before), services_by_hand(level_before), SERVICES),
        Case("plan-chain", "operators", planned(chain_of), sorted_by_hand, OPERATORS),
        Case("plan-fan", "operators", planned(fan_of), sorted_by_hand, OPERATORS),
        Case("plan-union", "operators", planned(union_of), sorted_by_hand, OPERATORS),
        Case("explain-chain", "operators", planned(chain_of, explained=True), sorted_by_hand, OPERATORS),
        Case("explain-fan", "operators", planned(fan_of, explained=True), sorted_by_hand, OPERATORS),
        Case("jobs", "jobs", many_jobs, threads_by_hand, JOBS),
        Case("branches", "branches", branches, branches_by_hand, (1, 10, 100, 500), {1: 0.5, 100: 0.5}),
        Case("sources", "sources", sources, sources_by_hand, (1, 10, 200, 1_000), {1: 0.5, 200: 0.5}),
        Case("keys", "keys", keys, keys_by_hand, KEYS, {1_000_000: 0.3, 5_000_000: 0.3}),
        Case("record-sizes", "bytes", record_sizes, record_sizes_by_hand, BYTES, dict.fromkeys(BYTES, 0.8)),
        Case("queued-sizes", "bytes", queued_sizes, queued_sizes_by_hand, BYTES),
        Case("jobs-of-one", "jobs", many_jobs_of_one, threads_by_hand, JOBS),
    )
}


# --- how it is measured -----------------------------------------------------------------------------------------------


def seconds_of(work: Callable[[], object]) -> float:
    """Return how long a call takes; what is made before, for it, does not count."""
    gc.collect()
    started_at = perf_counter()
    work()
    return perf_counter() - started_at


def measured(case: Case, sizes: Sequence[int], rounds: int) -> list[Pair]:
    """Measure both sides at each size in turn, each time in a process of its own that sees nothing of the one before.

    A round goes over all sizes, so that a machine that is slow for a while is slow for all of them, and the least time
    counts, as other programs only ever add to it. A size that has taken `LONG_S` in all is not repeated.
    """
    sides = ("ours", "by hand")
    found: dict[tuple[int, str], list[tuple[float, float]]] = {(size, side): [] for size in sizes for side in sides}
    spent = dict.fromkeys(sizes, 0.0)
    for _ in range(rounds):
        for size in (size for size in sizes if spent[size] <= LONG_S):
            began_at = perf_counter()
            for side in sides:
                command = [sys.executable, "-m", "benchmarks.growth", "--one", case.name, side, str(size)]
                environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
                result = json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE, env=environment).stdout)
                found[size, side].append((result["seconds"], result["peak_mb"]))
            spent[size] += perf_counter() - began_at
    return [(_point(size, found[size, "ours"]), _point(size, found[size, "by hand"])) for size in sizes]


def _point(size: int, runs: Sequence[tuple[float, float]]) -> Point:
    seconds, peaks_mb = zip(*runs, strict=True)
    return Point(size, min(seconds), statistics.median(peaks_mb))


def one(name: str, side: str, size: int) -> None:
    """Print what one run takes, as JSON. The smallest size runs before, so that nothing is imported meanwhile."""
    case = GROWTH[name]
    run = case.ours if side == "ours" else case.by_hand
    run(case.sizes[0])
    gc.collect()
    gc.freeze()  # or one size pays for a collection of all that was imported, and a smaller one does not
    before = _status("VmRSS")
    with open("/proc/self/clear_refs", "w", encoding="ascii") as file:
        file.write("5")  # the peak begins here
    seconds = run(size)
    print(json.dumps({"seconds": seconds, "peak_mb": max(_status("VmHWM") - before, 0.0)}))


def _status(field: str) -> float:
    with open("/proc/self/status", encoding="ascii") as file:
        return next(int(line.split()[1]) / 1024 for line in file if line.startswith(f"{field}:"))


def exponent(sizes: Sequence[int], values: Sequence[float]) -> float:
    """Return the exponent that values grow with: over all sizes, or over the last tenfold if that is more."""
    points = [(math.log(size), math.log(value)) for size, value in zip(sizes, values, strict=True)]
    if len(points) < 2:
        return 0.0
    last = [point for point, size in zip(points, sizes, strict=True) if size * 10 >= sizes[-1]]
    spans = (points, last if len(last) > 1 else points[-2:])
    return max(statistics.linear_regression(*zip(*span, strict=True)).slope for span in spans)


def exponents_of_time(points: Sequence[Pair]) -> list[float]:
    """Return the exponents of both sides."""
    return [exponent([one.size for one in side], [one.seconds for one in side]) for side in zip(*points, strict=True)]


def figures_of(case: Case, points: Sequence[Pair]) -> Iterator[Figure]:
    """Return the exponents of a case, and how it does beside the other side."""
    sizes = [ours.size for ours, _ in points]
    time, _ = exponents_of_time(points)
    yield at_most(f"{case.name}: time", "exponent of growth", case.exponent_max, [time])
    memory = exponent(sizes, [max(ours.peak_mb, MEMORY_LEAST_MB) for ours, _ in points])
    yield at_most(f"{case.name}: memory", "exponent of growth", case.exponent_max, [memory])
    for ours, by_hand in points:
        if ours.size in case.least:
            unit = f"of what is written by hand, {ours.size} {case.unit}"
            yield at_least(case.name, unit, case.least[ours.size], [by_hand.seconds / ours.seconds])


MEASURED: dict[str, Sequence[Pair]] = {}
"""What `growth` has measured, for the plot and the table: the points of each case."""


def growth(scale: Scale) -> Iterator[Figure]:
    """Every case: the exponents of time and memory."""
    for case in GROWTH.values():
        sizes = case.sizes[:-1] if scale is QUICK else case.sizes
        MEASURED[case.name] = measured(case, sizes, 1 if scale is QUICK else ROUNDS)
        yield from figures_of(case, MEASURED[case.name])


def both_ends() -> Iterator[str]:
    """Yield the rows of a table: both ends of each case that was measured, beside what is written by hand."""
    yield "| case | n | SAGE, s | by hand, s | SAGE, MB | by hand, MB | exponent of time | by hand |"
    yield "|---|---|---|---|---|---|---|---|"
    for name, points in MEASURED.items():
        cells = zip(*(_cells(*points[place]) for place in (0, -1)), strict=True)
        columns = [" to ".join(both) for both in cells]
        exponents = " | ".join(f"{one:.3f}" for one in exponents_of_time(points))
        yield f"| {name} ({GROWTH[name].unit}) | {' | '.join(columns)} | {exponents} |"


def _cells(ours: Point, by_hand: Point) -> Iterable[str]:
    seconds = (f"{point.seconds:.3g}" for point in (ours, by_hand))
    return f"{ours.size:,}", *seconds, *(f"{point.peak_mb:.0f}" for point in (ours, by_hand))


ROW = "{:<18} {:>8} {:<10} {:>11} {:>9} {:>12} {:>9} {:>8}"


def main(arguments: Sequence[str] | None = None) -> int:
    """Print the figures of every size, and return 1 if an exponent is above its bound."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.growth", description=__doc__)
    parser.add_argument("cases", nargs="*", metavar="case", help=f"one of {', '.join(GROWTH)}; all by default")
    parser.add_argument("--rounds", type=int, default=ROUNDS, help="how often each size is measured")
    parser.add_argument("--most", type=int, default=sys.maxsize, metavar="N", help="leave larger sizes out")
    parser.add_argument("--one", nargs=3, metavar=("CASE", "SIDE", "N"), help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.one:
        one(options.one[0], options.one[1], int(options.one[2]))
        return 0
    unknown = set(options.cases) - GROWTH.keys()
    if unknown:
        parser.error(f"unknown case {', '.join(sorted(unknown))}; there are {', '.join(GROWTH)}")
    print(ROW.format("case", "n", "", "seconds", "peak MB", "by hand, s", "peak MB", "ratio"), flush=True)
    is_met = True
    for name in options.cases or GROWTH:
        case = GROWTH[name]
        points = measured(case, [size for size in case.sizes if size <= options.most], options.rounds)
        for ours, by_hand in points:
            cells = [f"{ours.seconds:.5f}", f"{ours.peak_mb:.1f}", f"{by_hand.seconds:.5f}", f"{by_hand.peak_mb:.1f}"]
            ratio = f"{by_hand.seconds / ours.seconds:.3g}"
            print(ROW.format(name, ours.size, case.unit, *cells, ratio), flush=True)
        for figure in figures_of(case, points):
            print(
                f"  {figure.case}, {figure.unit}: {figure.measured:.2f} ({figure.bound} {figure.target:g})", flush=True
            )
            is_met &= figure.is_met
    return 0 if is_met else 1


if __name__ == "__main__":
    sys.exit(main())
