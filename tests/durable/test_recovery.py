"""A job that was killed at any step and ran again has written exactly what one undisturbed run would have."""

from __future__ import annotations

import json
import random
from collections import Counter
from functools import partial
from typing import TYPE_CHECKING, Literal

import pytest
from support.numbers import Numbers

from sage import (
    BaseCoMapFunction,
    BaseJoinFunction,
    Durable,
    ListState,
    LocalEnvironment,
    MapState,
    ProcessFunction,
    ValueState,
)
from sage._backends.threads import ThreadsBackend
from sage._operators import keyed_state, per_record
from sage.connectors import JsonLines, JsonLinesFiles
from sage.testing import StepBackend, simulate

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from sage import DataStream, DeadLetter, JobReport
    from sage._runtime.backend import Backend

    Build = Callable[[LocalEnvironment, int, Path], None]

CRASHES = 2


@pytest.fixture(autouse=True)
def _short_sweeps(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let a checkpoint write few keys that have not changed: the graphs have few keys."""
    monkeypatch.setattr(keyed_state, "SWEEP_MIN", 1)
    monkeypatch.setattr(keyed_state, "SWEEP_FACTOR", 0)


async def plus_one(record: int) -> int:
    return record + 1


async def times_three(record: int) -> int:
    import asyncio

    await asyncio.sleep(record % 5 * 0.001)
    return record * 3


def numbers(count: int) -> Iterator[int]:
    yield from range(count)


def source(env: LocalEnvironment, rng: random.Random, folder: Path, place: int) -> DataStream[int]:
    count = rng.randrange(0, 60)
    match rng.randrange(4):
        case 0:
            return env.from_batch([*range(count)], parallelism=rng.choice([1, 1, 3]), name=f"list {place}")
        case 1:
            return env.from_batch(range(count), name=f"range {place}")
        case 2:
            return env.from_batch(numbers, count, name=f"generator {place}")
    inputs = folder.parent / f"in-{place}"
    inputs.mkdir(exist_ok=True)
    for part in range(2):
        lines = [f"{number}\n" for number in range(part, count, 2)]
        (inputs / f"{part}.jsonl").write_text("".join(lines), encoding="utf-8")
    return env.from_source(JsonLines(inputs / "*.jsonl"), lockstep=rng.random() < 0.2, name=f"lines {place}")


def refuse(record: int) -> int:
    if record % 4 == 3:
        raise ValueError(record)
    return record


def tag(record: int) -> tuple[int, int]:
    return record % 20, 1


def added(left: tuple[int, int], right: tuple[int, int]) -> tuple[int, int]:
    return left[0], left[1] + right[1]


def flat(pair: tuple[int, int]) -> int:
    return pair[0] * 1000 + pair[1]


def numbered(count: int, record: int) -> tuple[int, int]:
    return count + 1, record % 3 * 1000 + count


def stateful(stream: DataStream[int], rng: random.Random, parallelism: int) -> DataStream[int]:
    """Add an operator with a state for each key, whose records do not depend on the order."""
    keyed = stream.keyby(lambda record: record % 20)
    emit: Literal["each", "last"] = rng.choice(["each", "last"])
    match rng.randrange(5):
        case 0:
            return stream.keyby(lambda record: record % 3).stateful_map(numbered, 0, parallelism=parallelism)
        case 1:
            return keyed.count(emit=emit, parallelism=parallelism).map(flat)
        case 2:
            return keyed.top_k(3, emit="last", parallelism=parallelism).flatmap(lambda pair: pair[1])
        case 3:
            return stream.keyby(lambda record: record).distinct(parallelism=parallelism)
    return stream.keyby(lambda record: record).changed(parallelism=parallelism)


class Numbering(ProcessFunction[int, int]):
    """Numbers the records of each key: a lost or a doubled state shows."""

    def __init__(self) -> None:
        self.counts: dict[int, int] = {}

    def execute(self, data: int) -> list[int]:
        key = data % 3
        self.counts[key] = self.counts.get(key, 0) + 1
        return [key * 1000 + self.counts[key]]

    def snapshot(self) -> dict[int, int]:
        return self.counts

    def restore(self, counts: dict[int, int]) -> None:
        self.counts = counts


class Counting(ProcessFunction[int, int]):
    """Does the same with a state of each key."""

    count = ValueState(0)

    def execute(self, data: int) -> list[int]:
        self.count.value += 1
        return [data % 3 * 1000 + self.count.value]


class Lasting(ProcessFunction[int, int]):
    """Does the same with states that last for a long time."""

    count = ValueState(0, ttl_s=1e6)
    seen = ListState[int](ttl_s=1e6)
    latest = MapState[str, int](ttl_s=1e6)

    def execute(self, data: int) -> list[int]:
        self.count.value += 1
        self.seen.append(data)
        self.latest["count"] = self.latest.get("count", 0) + 1
        assert self.count.value == len(self.seen) == self.latest["count"]
        return [data % 3 * 1000 + self.count.value]


class Apart(BaseCoMapFunction):
    """Numbers the records of each input."""

    def __init__(self) -> None:
        self.counts = [0, 0]

    def numbered(self, port: int) -> int:
        self.counts[port] += 1
        return port * 1000 + self.counts[port]

    def map0(self, _: int) -> int:
        return self.numbered(0)

    def map1(self, _: int) -> int:
        return self.numbered(1)

    def snapshot(self) -> list[int]:
        return self.counts

    def restore(self, counts: list[int]) -> None:
        self.counts = counts


class Pairs(BaseJoinFunction[int, int, int]):
    """Gives each pair of records with the same key once."""

    def __init__(self) -> None:
        self.seen: dict[tuple[int, int], list[int]] = {}

    def execute(self, payload: int, key: int, tag: int) -> list[int]:
        self.seen.setdefault((key, tag), []).append(payload)
        return [payload + other for other in self.seen.get((key, 1 - tag), [])]

    def snapshot(self) -> dict[tuple[int, int], list[int]]:
        return self.seen

    def restore(self, seen: dict[tuple[int, int], list[int]]) -> None:
        self.seen = seen


def together(first: DataStream[int], second: DataStream[int], rng: random.Random) -> DataStream[int]:
    parallelism = rng.choice([1, 2])
    match rng.randrange(3):
        case 0:
            return first.union(second)
        case 1:
            return first.connect(second).comap(Apart)
    both = first.connect(second).keyby(lambda record: record % 20, lambda record: record % 20)
    return both.join(Pairs, parallelism=parallelism)


def once_less(pair: tuple[int, int]) -> tuple[int, int]:
    return pair[0] - 1, pair[1] + 5


async def once_less_soon(pair: tuple[int, int]) -> tuple[int, int]:
    import asyncio

    await asyncio.sleep(pair[1] % 3 * 0.001)
    return once_less(pair)


def around(env: LocalEnvironment, stream: DataStream[int], rng: random.Random, name: str) -> DataStream[int]:
    """Let each record go round a loop up to three times."""
    loop = env.from_future(name)
    pairs = stream.map(lambda record: (record % 4, record)).union(loop)
    parallelism = rng.choice([1, 1, 2])
    match rng.randrange(4):
        case 0:
            less = pairs.map(once_less, parallelism=parallelism)
        case 1:
            less = pairs.map_async(once_less_soon, concurrency=rng.choice([1, 3]), ordered=rng.random() < 0.5)
        case 2:
            less = pairs.map_batches(lambda some: [*map(once_less, some)], max_records=3, max_wait_s=0.1)
        case _:
            less = pairs.keyby(lambda pair: pair[1] % 3).flatmap(
                lambda pair: [once_less(pair)], parallelism=parallelism
            )
    less.filter(lambda pair: pair[0] > 0).fill_future(loop)
    return less.filter(lambda pair: pair[0] <= 0).map(lambda pair: pair[1])


def grow(stream: DataStream[int], rng: random.Random, letters: DataStream[DeadLetter]) -> DataStream[int]:
    parallelism = rng.choice([1, 1, 2, 3])
    match rng.randrange(14):
        case 0:
            return stream.map(lambda record: record + 7, parallelism=parallelism)
        case 1:
            return stream.filter(lambda record: record % 3 != 1, parallelism=parallelism)
        case 2:
            return stream.flatmap(lambda record: [record] * (record % 3), parallelism=parallelism)
        case 3:
            return stream.flatmap(lambda record: (record + step for step in range(record % 4)))
        case 4:
            return stream.keyby(lambda record: record % 4).map(lambda record: record * 2, parallelism=parallelism)
        case 5:
            asked = rng.choice([plus_one, times_three])
            return stream.map_async(
                asked, concurrency=rng.choice([1, 3, 8]), ordered=rng.random() < 0.5, parallelism=parallelism
            )
        case 6:
            return stream.map_batches(
                lambda records: [record - 1 for record in records],
                max_records=rng.choice([1, 4, 9]),
                max_wait_s=rng.choice([0.0, 0.1]),
                parallelism=parallelism,
            )
        case 7:
            return stream.map(refuse, on_error=letters, parallelism=parallelism)
        case 8 | 9:
            keyed = stream.map(tag).keyby(lambda pair: pair[0])
            emit: Literal["each", "last"] = rng.choice(["each", "last"])
            return keyed.reduce(added, emit=emit, parallelism=parallelism).map(flat)
        case 10:
            function = rng.choice([Numbering, Counting, Lasting])
            return stream.keyby(lambda record: record % 3).process(function, parallelism=parallelism)
        case 11 | 12:
            return stateful(stream, rng, parallelism)
    return stream.rebalance()


def build(env: LocalEnvironment, seed: int, folder: Path) -> None:
    """Build the same random graph for the same seed."""
    rng = random.Random(f"graph {seed}")
    letters = env.dead_letters()
    letters.map(lambda letter: letter.value).sink(JsonLinesFiles(folder / "out" / "letters"), name="letters")
    streams = [source(env, rng, folder, place) for place in range(rng.choice([1, 1, 2, 3]))]
    for number in range(rng.randrange(1, 5)):
        streams = [grow(stream, rng, letters) for stream in streams]
        if len(streams) > 1 and rng.random() < 0.5:
            first, second, *others = streams
            streams = [together(first, second, rng), *others]
        elif rng.random() < 0.2:
            streams.append(streams[0])
        if rng.random() < 0.2:
            streams[0] = around(env, streams[0], rng, f"loop {number}")
    for place, stream in enumerate(streams):
        stream.sink(JsonLinesFiles(folder / "out" / str(place)), name=f"out {place}", parallelism=rng.choice([1, 1, 2]))


def build_batches(env: LocalEnvironment, seed: int, folder: Path) -> None:
    """Build a pipeline that nearly always holds records."""
    numbers = env.from_batch(range(40 + seed % 7), name="numbers")
    batches = numbers.map_batches(lambda records: [record * 2 for record in records], max_records=7, max_wait_s=1.0)
    batches.sink(JsonLinesFiles(folder / "out" / "rows"))


def run(seed: int, folder: Path, backend: Callable[[], Backend], build: Build = build) -> JobReport:
    durable = Durable(
        folder / "state", interval_s=random.Random(f"interval {seed}").choice([0.001, 0.004, 0.02]), keep=2
    )
    env = LocalEnvironment("random", backend=backend, durable=durable)
    build(env, seed, folder)
    return env.submit(autostop=True).report


def written(folder: Path) -> dict[str, Counter[int]]:
    return {
        out.name: Counter(
            json.loads(line) for path in sorted(out.glob("*.jsonl")) for line in path.read_text("utf-8").splitlines()
        )
        for out in sorted((folder / "out").iterdir())
    }


def expected(seed: int, folder: Path, build: Build) -> tuple[dict[str, Counter[int]], dict[str, int]]:
    """Return all rows of an undisturbed job, and how many records each operator took."""
    env = LocalEnvironment("random", backend=lambda: StepBackend(seed))
    build(env, seed, folder)
    report = env.submit(autostop=True).report
    return written(folder), {one.name: one.records_in for one in report.operators}


def check(seed: int, folder: Path, build: Build = build) -> int:
    """Kill a random graph at random steps, run each again, and return how many were resumed from a checkpoint."""
    wanted, taken = expected(seed, folder / str(seed), build)
    resumed = 0

    def program(backend: Callable[[], Backend], disturbed: Path) -> dict[str, Counter[int]]:
        nonlocal resumed
        report = run(seed, disturbed, backend, build)
        assert report.is_accounted is True, report
        assert {one.name: one.earlier_in + one.records_in for one in report.operators} == taken, report
        resumed += any(note.startswith("resumed from checkpoint") for note in report.notes)
        assert written(disturbed) == wanted, report
        if seed % 5 == 0:
            run(seed, disturbed, partial(StepBackend, seed), build)  # there is nothing new, so nothing comes again
        return written(disturbed)

    simulate(program, seeds=[seed], crashes=CRASHES)
    return resumed


@pytest.mark.timeout(120)  # five graphs, of which each runs seven times
@pytest.mark.parametrize(
    "first", [*range(0, 20, 5), *(pytest.param(n, marks=pytest.mark.proof) for n in range(20, 140, 5))]
)
def test_recovered_equals_undisturbed(first: int, folder: Path) -> None:
    assert sum(check(seed, folder) for seed in range(first, first + 5)) > 2


@pytest.mark.parametrize("first", [0, *(pytest.param(n, marks=pytest.mark.proof) for n in range(20, 100, 20))])
def test_threads_write_each_row_once(first: int, folder: Path) -> None:
    for seed in range(first, first + 20):
        one = folder / str(seed)
        one.mkdir()
        wanted, taken = expected(seed, one / "undisturbed", build)
        (one / "threads").mkdir()
        report = run(seed, one / "threads", ThreadsBackend)
        assert written(one / "threads") == wanted, f"seed {seed}: {report}"
        assert {one.name: one.records_in for one in report.operators} == taken, report


def build_long(env: LocalEnvironment, seed: int, folder: Path) -> None:
    """Build a pipeline that is nearly always in the middle of the results of a record."""
    rng = random.Random(f"long {seed}")

    def several(record: int) -> Iterator[int]:
        for step in range(record * 60):
            yield record * 1_000 + step

    stream = env.from_batch([1, 7, 2, 0, 5, 3], name="numbers")
    if rng.random() < 0.5:
        stream = stream.keyby(lambda record: record % 2)
    long = stream.flatmap(several, parallelism=rng.choice([1, 1, 2]), name="several")
    pairs = long.map(lambda number: number + 1).flatmap(lambda number: iter([number] * (number % 3)), name="pairs")
    pairs.sink(JsonLinesFiles(folder / "out" / "rows"), name="rows")


@pytest.mark.timeout(120)
@pytest.mark.parametrize("first", [0, *(pytest.param(n, marks=pytest.mark.proof) for n in range(10, 100, 10))])
def test_a_record_with_many_results_is_cut_in_the_middle(
    first: int, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(per_record, "READING_MAX_S", 0.0)
    assert sum(check(seed, folder, build_long) for seed in range(first, first + 10)) > 5


class CountingResults(ProcessFunction[int, int]):
    """Has a state that each result changes, so its results cannot be read again."""

    count = ValueState(0)

    def execute(self, data: int) -> Iterator[int]:
        for _ in range(data * 20):
            self.count.value += 1
            yield data % 2 * 1000 + self.count.value


def build_counting(env: LocalEnvironment, seed: int, folder: Path) -> None:
    keyed = env.from_batch([1, 7, 2, 0, 5, 3], name="numbers").keyby(lambda record: record % 2)
    keyed.process(CountingResults, name="counting").sink(JsonLinesFiles(folder / "out" / "rows"), name="rows")


def build_unpicklable(env: LocalEnvironment, seed: int, folder: Path) -> None:
    later = env.from_batch([1, 7, 2], name="numbers").map(lambda record: lambda: range(record * 40), name="later")
    results = later.flatmap(lambda make: iter(make()), name="results")
    results.sink(JsonLinesFiles(folder / "out" / "rows"), name="rows")


@pytest.mark.parametrize("build", [build_counting, build_unpicklable])
def test_results_that_cannot_be_read_again_are_waited_for(
    build: Build, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(per_record, "READING_MAX_S", 0.0)
    assert sum(check(seed, folder, build) for seed in range(10)) > 5


def build_lockstep(env: LocalEnvironment, seed: int, folder: Path) -> None:
    """Build a job with one record at a time, which counts those on their way."""
    on_their_way: set[int] = set()

    def begin(record: int) -> int:
        assert not on_their_way
        on_their_way.add(record)
        return record

    async def waits(record: int) -> int:
        import asyncio

        await asyncio.sleep(0.001)
        return record

    source = env.from_source(Numbers(), lockstep=True, name="numbers").map(begin)
    waited = source.map_async(waits, concurrency=4).keyby(lambda record: record % 3).map(str, parallelism=2).map(int)
    waited.tap(on_their_way.discard).sink(JsonLinesFiles(folder / "out" / "rows"), name="rows")


def test_a_source_in_lockstep_stays_in_lockstep(folder: Path) -> None:
    assert sum(check(seed, folder, build_lockstep) for seed in range(10)) > 5


def build_loop(env: LocalEnvironment, seed: int, folder: Path) -> None:
    """Build a loop that nearly always has records on their way back."""
    rng = random.Random(f"loop {seed}")
    stream = env.from_batch(range(30), name="numbers")
    for number in range(rng.choice([1, 1, 2])):
        stream = around(env, stream, rng, f"loop {number}")
    stream.sink(JsonLinesFiles(folder / "out" / "rows"), name="rows")


async def once_less_late(pair: tuple[int, int]) -> tuple[int, int]:
    import asyncio

    await asyncio.sleep(0.1)
    return once_less(pair)


def build_slow_loop(env: LocalEnvironment, seed: int, folder: Path) -> None:
    """Build a loop that has records long after its source has ended."""
    loop = env.from_future("loop")
    pairs = env.from_batch([(2, 1), (2, 2), (3, 3)], name="numbers").union(loop)
    less = pairs.map_async(once_less_late, concurrency=1 + seed % 3, name="late")
    less.filter(lambda pair: pair[0] > 0).fill_future(loop)
    less.map(flat).sink(JsonLinesFiles(folder / "out" / "rows"), name="rows")


def test_a_loop_goes_on_after_its_source_has_ended(folder: Path) -> None:
    assert sum(check(seed, folder, build_slow_loop) for seed in range(10)) > 5


@pytest.mark.timeout(120)
@pytest.mark.parametrize("first", [0, *(pytest.param(n, marks=pytest.mark.proof) for n in range(10, 100, 10))])
def test_records_on_their_way_round_a_loop_are_in_the_checkpoint(first: int, folder: Path) -> None:
    assert sum(check(seed, folder, build_loop) for seed in range(first, first + 10)) > 5


def test_records_that_wait_for_a_batch_are_in_the_checkpoint(folder: Path) -> None:
    assert sum(check(seed, folder, build_batches) for seed in range(10)) > 5
