"""What durable jobs cost: checkpoints while records flow, and the start from one."""

from __future__ import annotations

import pickle
import shutil
import tempfile
from contextlib import contextmanager, suppress
from datetime import timedelta
from pathlib import Path
from time import perf_counter
from typing import TYPE_CHECKING

from benchmarks.measure import Figure, Scale, alternated, at_least, at_most
from benchmarks.throughput import has_bytewax, is_wanted, scaled, shifted
from sage import Durable, LocalEnvironment

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

CHAIN_FACTOR = 20
"""How many times the records of other cases: a checkpoint each second has to come several times."""

ROUNDS = 5
SHORT_INTERVAL_S = 0.2
GAPS_FACTOR = 2
"""How often each key comes while gaps are measured, all together."""


@contextmanager
def empty_folder() -> Iterator[Path]:
    """Return a folder on the disk that is there for one run."""
    folder = Path(tempfile.mkdtemp(prefix="sage-benchmarks-"))
    try:
        yield folder
    finally:
        shutil.rmtree(folder)


def size_of(folder: Path) -> int:
    """Return how many bytes the files of a folder have; a journal may vanish meanwhile."""
    size = 0
    for path in folder.iterdir():
        with suppress(FileNotFoundError):
            size += path.stat().st_size
    return size


def chain(values: Iterable[int], durable: Durable | None = None) -> None:
    env = LocalEnvironment("chain", durable=durable)
    env.from_batch(values).map(scaled).filter(is_wanted).map(shifted).sink(int)
    env.submit(autostop=True)


def durable_chain(values: Iterable[int]) -> None:
    with empty_folder() as folder:
        chain(values, Durable(folder / "state", interval_s=1.0))


def ignore(_: object) -> None:
    pass


def count(events: Iterable[int], keys: int, durable: Durable | None = None) -> None:
    """Count events by key; each key is first an integer, so that the key costs little."""
    env = LocalEnvironment("count", durable=durable)
    env.from_batch(events).keyby(lambda event: event % keys).count().sink(ignore)
    env.submit(autostop=True)


def durable_count(events: Iterable[int], keys: int) -> None:
    with empty_folder() as folder:
        count(events, keys, Durable(folder / "state", interval_s=1.0))


def count_by_bytewax(events: range, keys: int) -> None:
    """Count by a stateful map with its recovery store, in batches of 1,000, with an epoch each second."""
    from bytewax import operators as op
    from bytewax.dataflow import Dataflow
    from bytewax.recovery import RecoveryConfig, init_db_dir
    from bytewax.testing import TestingSink, TestingSource, run_main

    with empty_folder() as folder:
        init_db_dir(folder, 1)
        flow = Dataflow("count")
        stream = op.input("events", flow, TestingSource(events, batch_size=1_000))
        keyed = op.key_on("key", stream, lambda event: str(event % keys))
        counts = op.stateful_map("count", keyed, lambda state, _: ((state or 0) + 1, (state or 0) + 1))
        op.output("out", counts, TestingSink([]))
        run_main(flow, epoch_interval=timedelta(seconds=1), recovery_config=RecoveryConfig(str(folder)))


def gaps(keys: int, durable: Durable | None) -> float:
    """Return the longest time between two batches at the sink of a count, in seconds, once all keys are there."""
    longest = last = 0.0
    seen = 0

    def arrived(pairs: list[tuple[int, int]]) -> list[tuple[int, int]]:
        nonlocal longest, last, seen
        now = perf_counter()
        seen += len(pairs)
        if seen > keys:
            longest = max(longest, now - last)
        last = now
        return pairs

    env = LocalEnvironment("gaps", durable=durable)
    counts = env.from_batch(range(keys * (1 + GAPS_FACTOR))).keyby(lambda event: event % keys).count()
    counts.map_batches(arrived, max_records=500, max_wait_s=0.0).sink(ignore)
    env.submit(autostop=True)
    return longest


def restart(keys: int) -> tuple[float, float]:
    """Return how long a job with so many keys takes to its first new record, and the unpickling of the same dict."""
    with empty_folder() as folder:
        state = Durable(folder / "state", interval_s=60.0)
        count(range(keys), keys, state)
        body = pickle.dumps(dict.fromkeys(range(keys), 1), pickle.HIGHEST_PROTOCOL)
        began_at = perf_counter()
        first_at: list[float] = []

        def note(pair: tuple[int, int]) -> tuple[int, int]:
            if not first_at:
                first_at.append(perf_counter())
            return pair

        env = LocalEnvironment("count", durable=state)
        env.from_batch(range(keys + 1)).keyby(lambda event: event % keys).count().sink(note)
        env.submit(autostop=True)
        taken_s = first_at[0] - began_at
        began_at = perf_counter()
        pickle.loads(body)
        return taken_s, perf_counter() - began_at


def ledger(records: int) -> tuple[float, float]:
    """Return the size of what a batch leaves, in MB, and how long a run takes that finds nothing new, in seconds."""
    with empty_folder() as folder:
        state = Durable(folder / "state", interval_s=1.0)
        chain(range(records), state)
        size = size_of(folder / "state")
        began_at = perf_counter()
        chain(range(records), state)
        return size / 1e6, perf_counter() - began_at


def growth_of_folder(scale: Scale) -> float:
    """Return how large a folder is at the end of a stream with 10,000 keys, compared with a third of the way."""
    with empty_folder() as folder:
        sizes: list[int] = []
        keys = scale.records // 100

        def look(pair: tuple[int, int]) -> tuple[int, int]:
            if pair[0] == 0:
                sizes.append(size_of(folder / "state"))
            return pair

        env = LocalEnvironment("long", durable=Durable(folder / "state", interval_s=SHORT_INTERVAL_S / 4))
        events = range(scale.records * CHAIN_FACTOR // 4)
        env.from_batch(events).keyby(lambda event: event % keys).count().sink(look)
        env.submit(autostop=True)
        return max(sizes[-len(sizes) // 3 :]) / max(sizes[len(sizes) // 3 : -len(sizes) // 3])


def durable(scale: Scale) -> Iterator[Figure]:
    """Each line of the table of durable jobs."""
    values = range(scale.records * CHAIN_FACTOR)
    taken = alternated(ROUNDS, lambda: chain(values), lambda: durable_chain(values))
    ratios = [plain / durable for plain, durable in taken]
    yield at_least("chain with a checkpoint each second", "of the same without", 0.97, ratios)
    events, keys = range(scale.records * 2), scale.records // 10
    sides = [lambda: count(events, keys), lambda: durable_count(events, keys)]
    taken = alternated(ROUNDS, *sides, *([lambda: count_by_bytewax(events, keys)] if has_bytewax() else []))
    case = "count by key with a checkpoint each second"
    yield at_least(case, "of the same without", 0.9, [seconds[0] / seconds[1] for seconds in taken])
    if has_bytewax():
        yield at_least(case, "times bytewax with its store", 3, [seconds[2] / seconds[1] for seconds in taken])
    longest = []
    for _ in range(ROUNDS):
        with empty_folder() as folder:
            longest.append(gaps(scale.records, Durable(folder / "state", interval_s=SHORT_INTERVAL_S)) * 1e3)
    yield at_most("1M keys, longest gap between two batches", "ms", 20, longest)
    starts = [restart(scale.records) for _ in range(ROUNDS)]
    ratios = [taken_s / unpickled_s for taken_s, unpickled_s in starts]
    yield at_most("1M keys, restart to the first new record", "times unpickling a dict", 1.5, ratios)
    left = [ledger(scale.records) for _ in range(ROUNDS)]
    yield at_most("a batch that is done, its folder", "MB", 1, [size for size, _ in left])
    yield at_most("a batch that is done, run again", "s", 0.1, [taken_s for _, taken_s in left])
    yield at_most("folder of a long stream of 10,000 keys", "times that of a third", 1.1, [growth_of_folder(scale)])
