"""Records per second: pipelines against the loop that calls the same functions, and against bytewax if it is there."""

from __future__ import annotations

import asyncio
import random
import threading
from functools import partial
from typing import TYPE_CHECKING, Any

from benchmarks.measure import Figure, Scale, alternated, at_least, at_most
from sage import LocalEnvironment, MapFunction

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Sequence

    from sage import ServiceHandle

WORDS_PER_LINE = 10
VOCABULARY = 5_000

Pair = tuple[str, int]


def scaled(value: int) -> int:
    return value * 3 + 1


def is_wanted(value: int) -> bool:
    return value % 2 == 0


def shifted(value: int) -> int:
    return value - 7


def chain_by_loop(values: range, out: list[int]) -> None:
    """What a program without a runtime would do."""
    append = out.append
    for value in values:
        wanted = scaled(value)
        if is_wanted(wanted):
            append(shifted(wanted))


def chain_by_sage(values: range, out: list[int]) -> None:
    env = LocalEnvironment("chain")
    env.from_batch(values).map(scaled).filter(is_wanted).map(shifted).sink(out.append)
    env.submit(autostop=True)


def chain_by_bytewax(values: range, out: list[int], *, batch: int) -> None:
    from bytewax import operators as op
    from bytewax.dataflow import Dataflow
    from bytewax.testing import TestingSink, TestingSource, run_main

    flow = Dataflow("chain")
    stream = op.input("values", flow, TestingSource(values, batch_size=batch))
    stream = op.map("scaled", stream, scaled)
    stream = op.filter("is_wanted", stream, is_wanted)
    stream = op.map("shifted", stream, shifted)
    op.output("out", stream, TestingSink(out))
    run_main(flow)


BYTEWAX_BATCHES = {"bytewax": 1, "bytewax in batches": 1_000}
"""How many records its source gives at once: one is its default, and what its documentation shows."""


def chain(scale: Scale) -> Iterator[Figure]:
    """Map, filter, map and sink."""
    yield from _against_both(
        "map, filter, map, sink",
        scale,
        range(scale.records),
        (chain_by_loop, chain_by_sage),
        chain_by_bytewax,
        of_loop=0.85,
        of_bytewax=2.4,
    )


def pairs(line: str) -> list[Pair]:
    return [(word, 1) for word in line.split()]


def word(pair: Pair) -> str:
    return pair[0]


def added(left: Pair, right: Pair) -> Pair:
    return left[0], left[1] + right[1]


def count_by_loop(lines: list[str], out: list[Pair]) -> None:
    counts: dict[str, Pair] = {}
    for line in lines:
        for pair in pairs(line):
            key = word(pair)
            counts[key] = added(counts[key], pair) if key in counts else pair
    out.extend(counts.values())


def count_by_sage(lines: list[str], out: list[Pair]) -> None:
    env = LocalEnvironment("count")
    env.from_batch(lines).flatmap(pairs).keyby(word).reduce(added, emit="last").sink(out.append)
    env.submit(autostop=True)


def count_by_bytewax(lines: list[str], out: list[Any], *, batch: int) -> None:
    from bytewax import operators as op
    from bytewax.dataflow import Dataflow
    from bytewax.testing import TestingSink, TestingSource, run_main

    flow = Dataflow("count")
    stream = op.input("lines", flow, TestingSource(lines, batch_size=batch))
    words = op.flat_map("pairs", stream, pairs)
    keyed = op.key_on("word", words, word)
    op.output("out", op.reduce_final("added", keyed, added), TestingSink(out))
    run_main(flow)


def lines_of(scale: Scale) -> list[str]:
    """Return lines of words, of which some are frequent."""
    dice = random.Random(54)
    return [
        " ".join(f"word{int(VOCABULARY * dice.random() ** 3)}" for _ in range(WORDS_PER_LINE))
        for _ in range(scale.records // WORDS_PER_LINE)
    ]


def word_count(scale: Scale) -> Iterator[Figure]:
    """Flat map, key and reduce; the records are the words."""
    yield from _against_both(
        "word count",
        scale,
        lines_of(scale),
        (count_by_loop, count_by_sage),
        count_by_bytewax,
        of_loop=0.6,
        of_bytewax=6.0,
    )


def _against_both(
    case: str,
    scale: Scale,
    values: Any,
    ways: tuple[Callable[[Any, list[Any]], None], ...],
    by_bytewax: Callable[..., None],
    *,
    of_loop: float,
    of_bytewax: float,
) -> Iterator[Figure]:
    """Measure the second way against the first, and against bytewax if it is there."""
    results: list[list[Any]] = []
    for way in ways:
        results.append([])
        way(values, results[-1])
    assert sorted(results[0]) == sorted(results[1]), f"{case}: the pipeline gives something else than the loop"
    by_loop, by_sage = (lambda way=way: way(values, []) for way in ways)
    taken = alternated(scale.rounds, by_loop, by_sage)
    yield at_least(case, "of the loop", of_loop, [seconds[0] / seconds[1] for seconds in taken])
    # Apart from the loop, as what bytewax leaves in the caches and in memory slows whoever comes next.
    for name, batch in (BYTEWAX_BATCHES if has_bytewax() else {}).items():
        taken = alternated(scale.rounds // 3, by_sage, lambda batch=batch: by_bytewax(values, [], batch=batch))
        yield at_least(case, f"times {name}", of_bytewax, [seconds[1] / seconds[0] for seconds in taken])


def has_bytewax() -> bool:
    """Whether bytewax is installed; there is none for Python 3.13 and later."""
    try:
        import bytewax  # noqa: F401
    except ImportError:
        return False
    return True


class Memory:
    """A service as small as one can be, so that nothing but the way to it is measured."""

    def __init__(self) -> None:
        self.last = 0

    def note(self, value: int) -> int:
        self.last = value
        return value


class NotingByName(MapFunction):
    """Calls the service the way older programs do."""

    def execute(self, data: int) -> int:
        answer: int = self.call_service("memory", data, method="note")
        return answer


def service_call(scale: Scale) -> Iterator[Figure]:
    """A call of a service for each record, beyond the record's own cost, in direct calls under a lock."""
    values = list(range(scale.records))
    memory, lock = Memory(), threading.Lock()

    def nothing() -> None:
        for value in values:
            _ = value

    def direct() -> None:
        note = memory.note
        for value in values:
            with lock:
                note(value)

    def with_map(build: Callable[[ServiceHandle[Any]], Any]) -> None:
        env = LocalEnvironment("calls")
        handle = env.register_service("memory", Memory)
        env.from_batch(values).map(build(handle)).sink(_forget)
        env.submit(autostop=True)

    def plain() -> None:
        with_map(lambda _: lambda value: value)

    def through_handle() -> None:
        with_map(lambda handle: lambda value: handle.note(value))

    def as_function() -> None:
        with_map(lambda handle: handle.note)

    def by_name() -> None:
        with_map(lambda _: NotingByName)

    taken = alternated(scale.rounds, nothing, direct, plain, through_handle, as_function, by_name)
    for place, case in enumerate(("handle.method(x)", "map(handle.method)", "self.call_service"), start=3):
        units = [(seconds[place] - seconds[2]) / (seconds[1] - seconds[0]) for seconds in taken]
        yield at_most(f"service call: {case}", "direct calls", 3, units)


def _forget(value: object) -> None:
    """Take in a record."""


AWAITS = 1_000
AWAITS_AT_A_TIME = 100
AWAIT_S = 0.01


async def awaited(value: int) -> int:
    await asyncio.sleep(AWAIT_S)
    return value


def await_by_gather() -> None:
    """What a program without a runtime would do."""

    async def everything() -> list[int]:
        places = asyncio.Semaphore(AWAITS_AT_A_TIME)

        async def one(value: int) -> int:
            async with places:
                return await awaited(value)

        return await asyncio.gather(*map(one, range(AWAITS)))

    assert asyncio.run(everything()) == list(range(AWAITS))


def await_by_sage(*, ordered: bool) -> None:
    out: list[int] = []
    env = LocalEnvironment("awaits")
    stream = env.from_batch(range(AWAITS))
    stream.map_async(awaited, concurrency=AWAITS_AT_A_TIME, ordered=ordered).sink(out.append)
    env.submit(autostop=True)
    assert (out if ordered else sorted(out)) == list(range(AWAITS))


def awaits(scale: Scale) -> Iterator[Figure]:
    """A thousand awaits of 10 ms, 100 at a time, against gather with a semaphore."""
    rounds = max(scale.rounds, scale.short_rounds // 5)
    ordered, unordered = (lambda ordered=ordered: await_by_sage(ordered=ordered) for ordered in (True, False))
    taken = alternated(rounds, await_by_gather, ordered, unordered)
    for place, case in enumerate(("1,000 awaits, in order", "1,000 awaits, as they come"), start=1):
        ratios = [seconds[place] / seconds[0] for seconds in taken]
        yield at_most(case, "times asyncio.gather", 1.1, ratios)


def scaled_all(values: list[int]) -> list[int]:
    return [scaled(value) for value in values]


def batches_by_loop(values: list[int], out: list[int], *, size: int) -> None:
    """What a program without a runtime would do."""
    append = out.append
    for start in range(0, len(values), size):
        for value in scaled_all(values[start : start + size]):
            append(value)


def batches_by_sage(values: list[int], out: list[int], *, size: int) -> None:
    env = LocalEnvironment("batches")
    env.from_batch(values).map_batches(scaled_all, max_records=size).sink(out.append)
    env.submit(autostop=True)


def batches(scale: Scale) -> Iterator[Figure]:
    """A function that gets many records at once, against a loop over slices."""
    values = list(range(scale.records))
    for size, target in ((8, 0.5), (512, 0.8)):
        ways = (partial(batches_by_loop, size=size), partial(batches_by_sage, size=size))
        yield of_the_loop(f"map_batches of {size}", scale, values, ways, target)


RECORDS_PER_RECORD = 10


def several(value: int) -> list[int]:
    return [value + number for number in range(RECORDS_PER_RECORD)]


def several_in_turn(value: int) -> Iterator[int]:
    for number in range(RECORDS_PER_RECORD):
        yield value + number


def flat_map_by_loop(values: range, out: list[int], *, function: Callable[[int], Iterable[int]]) -> None:
    """What a program without a runtime would do."""
    append = out.append
    for value in values:
        for one in function(value):
            append(scaled(one))


def flat_map_by_sage(values: range, out: list[int], *, function: Callable[[int], Iterable[int]]) -> None:
    env = LocalEnvironment("flat map")
    env.from_batch(values).flatmap(function).map(scaled).sink(out.append)
    env.submit(autostop=True)


def flat_map(scale: Scale) -> Iterator[Figure]:
    """Ten records out for each record in, as a list and from a generator."""
    values = range(scale.records // RECORDS_PER_RECORD)
    for name, function in (("a list", several), ("a generator", several_in_turn)):
        ways = (partial(flat_map_by_loop, function=function), partial(flat_map_by_sage, function=function))
        yield of_the_loop(f"flat map, {name} of {RECORDS_PER_RECORD}", scale, values, ways, 0.8)


def of_the_loop(
    case: str, scale: Scale, values: Any, ways: Sequence[Callable[[Any, list[Any]], None]], target: float
) -> Figure:
    """Measure the second way against the first, once both have given the same."""
    results: list[list[Any]] = [[], []]
    for way, out in zip(ways, results, strict=True):
        way(values, out)
    assert results[0] == results[1], f"{case}: the pipeline gives something else than the loop"
    taken = alternated(scale.rounds, *(lambda way=way: way(values, []) for way in ways))
    return at_least(case, "of the loop", target, [seconds[0] / seconds[1] for seconds in taken])
