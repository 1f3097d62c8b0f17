"""Every record arrives, and every job ends."""

from __future__ import annotations

import os
import subprocess
import sys
import time
import tracemalloc
from collections import Counter, defaultdict
from typing import TYPE_CHECKING, Any

import pytest

from sage import (
    BaseCoMapFunction,
    BaseJoinFunction,
    BatchFunction,
    FunctionError,
    GraphError,
    LocalEnvironment,
    MapFunction,
    Outcome,
    SinkFunction,
    SourceFunction,
)
from sage.testing import run

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from sage._runtime.backend import Backend
    from sage.stream import DataStream

    Backends = Callable[[], Backend]


class SlowInstance(MapFunction):
    """Takes its time in the first of its parallel tasks."""

    def execute(self, data: int) -> int:
        if self.ctx.parallel_index == 0:
            time.sleep(0.001)
        return data


def test_a_slow_parallel_instance_loses_nothing(backend: Backends) -> None:
    """100 records through parallelism 1, 3 and 1 again are exactly 100."""
    arrived = run(
        range(100),
        lambda stream: stream.map(lambda x: x).map(SlowInstance, parallelism=3).map(lambda x: x),
        backend=backend,
    )
    assert sorted(arrived) == list(range(100))


class Sides(BaseCoMapFunction):
    def map0(self, data: int) -> tuple[str, int]:
        return "few", data

    def map1(self, data: int) -> tuple[str, int]:
        return "many", data


def test_a_comap_of_uneven_inputs_ends_with_the_longer_one(backend: Backends) -> None:
    """3 and 60 records give 63 results."""
    arrived: list[tuple[str, int]] = []
    env = LocalEnvironment("test", backend=backend)
    env.from_batch(range(3)).connect(env.from_batch(range(60))).comap(Sides).sink(arrived.append)
    env.submit(autostop=True)
    assert len(arrived) == 63
    assert [number for side, number in arrived if side == "few"] == list(range(3))
    assert [number for side, number in arrived if side == "many"] == list(range(60))


def test_a_union_of_a_fast_and_a_slow_source_gives_all_of_both(backend: Backends) -> None:
    """The end of the fast source does not end the slow one."""

    def slow() -> Iterator[int]:
        for number in range(20):
            time.sleep(0.001)
            yield number

    arrived: list[int] = []
    env = LocalEnvironment("test", backend=backend)
    env.from_batch(range(100, 1100)).union(env.from_batch(slow)).sink(arrived.append)
    env.submit(autostop=True)
    assert [number for number in arrived if number < 100] == list(range(20))
    assert [number for number in arrived if number >= 100] == list(range(100, 1100))


class Match(BaseJoinFunction):
    """Pairs records of one key, one of each side."""

    def __init__(self) -> None:
        self._seen: tuple[dict[Any, list[Any]], ...] = (defaultdict(list), defaultdict(list))

    def execute(self, payload: Any, key: Any, tag: int) -> list[Any]:
        self._seen[tag][key].append(payload)
        others = self._seen[1 - tag][key]
        return [(payload, other) if tag == 0 else (other, payload) for other in others]


@pytest.mark.parametrize("names", [("Left", "Right"), ("A", "A"), ("_x", "Source"), ("BatchFunction", "Übergröße")])
def test_a_join_ends_whatever_its_sources_are_called(backend: Backends, names: tuple[str, str]) -> None:
    """With all matches."""

    def source(name: str, count: int) -> type[BatchFunction]:
        def execute(self: Any) -> tuple[int, int] | None:
            self.at = getattr(self, "at", -1) + 1
            return (self.at % 5, self.at) if self.at < count else None

        return type(name, (BatchFunction,), {"execute": execute})

    arrived: list[Any] = []
    env = LocalEnvironment("test", backend=backend)
    left, right = (env.from_batch(source(name, count)) for name, count in zip(names, (10, 25), strict=True))
    left.connect(right).keyby(lambda pair: pair[0]).join(Match, parallelism=2).sink(arrived.append)
    env.submit(autostop=True)
    expected = [((a % 5, a), (b % 5, b)) for a in range(10) for b in range(25) if a % 5 == b % 5]
    assert sorted(arrived) == sorted(expected)


@pytest.mark.parametrize("records", [[1, None, 3], [None], [0, "", False, [], {}, None, (), 0.0, b""]])
def test_none_and_falsy_records_are_records(backend: Backends, records: list[Any]) -> None:
    """Through every operator that hands records on, in any distribution."""
    arrived = run(records, lambda stream: stream.map(lambda x: x).filter(lambda x: True).rebalance(), backend=backend)
    assert [repr(record) for record in arrived] == [repr(record) for record in records]
    spread = run(records, lambda stream: stream.keyby(repr).map(lambda x: x, parallelism=3), backend=backend)
    assert sorted(map(repr, spread)) == sorted(map(repr, records))


def test_none_is_data_in_every_iterable(backend: Backends) -> None:
    """A generator may yield None, and a flat map, a comap of callables and a reduce may give it."""

    def some() -> Iterator[int | None]:
        yield from (1, None, 3)

    assert run(some(), lambda stream: stream, backend=backend) == [1, None, 3]
    assert run([1], lambda stream: stream.flatmap(lambda x: [None, x, None]), backend=backend) == [None, 1, None]
    numbers: list[int | None] = [1, 2]
    reduced = run(numbers, lambda stream: stream.keyby(lambda x: None).reduce(lambda a, b: None), backend=backend)
    assert reduced == [1, None]


def test_a_loop_whose_data_die_out_ends(backend: Backends) -> None:
    """With every record processed."""
    arrived: list[int] = []
    env = LocalEnvironment("test", backend=backend)
    loop = env.from_future("halves")
    halved = env.from_batch([8, 5, 1, 64]).union(loop).map(lambda number: number // 2)
    halved.filter(lambda number: number > 0).fill_future(loop)
    halved.sink(arrived.append)
    env.submit(autostop=True)
    assert sorted(arrived) == sorted([4, 2, 1, 0, 2, 1, 0, 0, 32, 16, 8, 4, 2, 1, 0])


def test_a_loop_that_never_dies_out_ends_by_stop(backend: Backends) -> None:
    """Here a sink ends it after 1,000 turns."""
    turns: list[int] = []
    env = LocalEnvironment("test", backend=backend, drain_timeout_s=0.2)
    loop = env.from_future("round and round")
    around = env.from_batch([1]).union(loop).map(lambda number: number + 1)
    around.fill_future(loop)

    def count(number: int) -> None:
        turns.append(number)
        if len(turns) == 1000:
            env.stop()

    around.sink(count)
    job = env.submit(autostop=True)
    assert len(turns) >= 1000
    assert turns == list(range(2, len(turns) + 2))
    assert job.report is not None
    assert job.report.state in (Outcome.STOPPED, Outcome.CANCELLED)


class Cleaned:
    """A service that says when it is cleaned."""

    def __init__(self, cleaned: list[str]) -> None:
        self._cleaned = cleaned

    def close(self) -> None:
        self._cleaned.append("closed")


@pytest.mark.parametrize("records", [[], (), range(0), set(), iter([])], ids=lambda records: type(records).__name__)
def test_an_empty_source_ends(backend: Backends, records: Any) -> None:
    """And its services are cleaned."""
    cleaned: list[str] = []
    arrived: list[Any] = []
    env = LocalEnvironment("test", backend=backend)
    env.register_service("any", Cleaned, cleaned)
    # An iterator is read once only, and the parameter is shared by all runs of this test; empty it stays empty.
    env.from_batch(records).map(lambda x: x).sink(arrived.append)
    env.submit(autostop=True)
    assert (arrived, cleaned) == ([], ["closed"])


def test_no_sink_and_a_source_only_end(backend: Backends) -> None:
    """The records are read all the same, and the services are cleaned."""
    builds: list[Callable[[DataStream], DataStream]] = [
        lambda stream: stream,
        lambda stream: stream.map(lambda x: x).filter(lambda x: True),
    ]
    for build in builds:
        cleaned: list[str] = []
        read: list[int] = []

        def numbers(read: list[int] = read) -> Iterator[int]:
            for number in range(10):
                read.append(number)
                yield number

        env = LocalEnvironment("test", backend=backend)
        env.register_service("any", Cleaned, cleaned)
        build(env.from_batch(numbers))
        job = env.submit(autostop=True)
        assert job.report is not None
        assert job.report.state is Outcome.COMPLETED
        assert (read, cleaned) == (list(range(10)), ["closed"])


def test_services_without_a_pipeline_are_refused(backend: Backends) -> None:
    """Clearly, and before any of them is built."""
    built: list[str] = []
    env = LocalEnvironment("empty", backend=backend)
    env.register_service("any", lambda: built.append("built"))
    with pytest.raises(GraphError, match='environment "empty" has no pipeline'):
        env.submit(autostop=True)
    assert built == []
    env.close()


def test_a_slow_sink_holds_a_fast_source_back() -> None:
    """Memory stays flat, and nothing is lost once the sink is quicker again.

    The sink takes 10 ms for each of its first 100 records only: in that second, a source that was not held back would
    have read all 50,000 records, of 2 KiB each.
    """
    read = 0
    ahead: list[int] = []
    arrived = 0

    def records() -> Iterator[bytes]:
        nonlocal read
        for number in range(50_000):
            read += 1
            yield number.to_bytes(2048, "big")

    def slow(record: bytes) -> None:
        nonlocal arrived
        assert int.from_bytes(record, "big") == arrived
        arrived += 1
        if arrived <= 100:
            time.sleep(0.01)
            ahead.append(read - arrived)

    env = LocalEnvironment("test")
    first = env.from_batch(records)
    first.sink(slow)
    first.filter(lambda record: False)  # a second branch, so that the sink is no part of the source's own task
    tracemalloc.start()
    try:
        env.submit(autostop=True)
        _, peak_bytes = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert arrived == 50_000
    assert max(ahead) < 15_000
    assert peak_bytes < 40 * 2**20


class CountedClose(SinkFunction):
    """Writes down what happens to it, and when told to fails or stops the job."""

    def __init__(self, happened: list[Any], act: Callable[[], None]) -> None:
        self._happened = happened
        self._act = act

    def execute(self, data: int) -> None:
        self._happened.append(data)
        if data == 3:
            self._act()

    def close(self) -> None:
        self._happened.append("close")


def test_a_sink_is_closed_after_the_last_record(backend: Backends) -> None:
    """Once, on success."""
    happened: list[Any] = []
    env = LocalEnvironment("test", backend=backend)
    env.from_batch(range(6)).sink(CountedClose, happened, lambda: None)
    env.submit(autostop=True)
    assert happened == [*range(6), "close"]


def test_a_sink_is_closed_after_a_failure_of_its_own(backend: Backends) -> None:
    """Once."""

    def fail() -> None:
        raise ValueError("no room")

    happened: list[Any] = []
    env = LocalEnvironment("test", backend=backend)
    env.from_batch(range(6)).sink(CountedClose, happened, fail)
    with pytest.raises(FunctionError, match="failed on record 3: ValueError: no room"):
        env.submit(autostop=True)
    assert happened == [0, 1, 2, 3, "close"]


def test_a_sink_is_closed_after_a_failure_elsewhere(backend: Backends) -> None:
    """Once if it was opened, which another branch may have prevented."""
    happened: list[Any] = []
    env = LocalEnvironment("test", backend=backend)
    stream = env.from_batch(range(6))
    stream.map(lambda number: number).sink(CountedClose, happened, lambda: None)
    stream.map(lambda number: 1 // (number - 3))
    with pytest.raises(FunctionError, match="failed on record 3: ZeroDivisionError"):
        env.submit(autostop=True)
    assert happened == [*range(len(happened) - 1), "close"]


def test_a_sink_is_closed_after_a_stop(backend: Backends) -> None:
    """Once, with every record that was read before it."""

    class Ticks(SourceFunction):
        def __init__(self) -> None:
            self._at = -1

        def execute(self) -> int:
            self._at += 1
            return self._at

    happened: list[Any] = []
    env = LocalEnvironment("test", backend=backend)
    env.from_source(Ticks).sink(CountedClose, happened, env.stop)
    env.submit(autostop=True)
    assert happened == [*range(len(happened) - 1), "close"]
    assert len(happened) > 4


def test_a_sink_is_closed_after_ctrl_c() -> None:
    """Once; the program ends as interrupted programs do."""
    program = (
        "import os, signal\n"
        "from sage import LocalEnvironment, SinkFunction\n"
        "class Show(SinkFunction):\n"
        "    def execute(self, data):\n"
        "        if data == 3:\n"
        "            print('interrupted', flush=True)\n"
        "            os.kill(os.getpid(), signal.SIGINT)\n"
        "    def close(self):\n"
        "        print('close', flush=True)\n"
        "numbers = iter(range(10**12))\n"
        "env = LocalEnvironment('script')\n"
        "env.from_source(lambda: next(numbers)).sink(Show)\n"
        "env.submit(autostop=True)\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=30)
    assert done.stdout.splitlines() == ["interrupted", "close"]
    assert "KeyboardInterrupt" in done.stderr
    assert done.returncode in (130, -2)


def test_both_branches_of_a_stream_get_all_records_in_order(backend: Backends) -> None:
    """Two sinks on one stream, and two sinks behind operators of their own."""
    seen: list[list[int]] = [[], [], [], []]
    env = LocalEnvironment("test", backend=backend)
    stream = env.from_batch(range(500))
    stream.sink(seen[0].append).sink(seen[1].append)
    stream.map(lambda number: -number).sink(seen[2].append)
    stream.filter(lambda number: number % 2 == 0).sink(seen[3].append)
    env.submit(autostop=True)
    assert seen[0] == seen[1] == list(range(500))
    assert seen[2] == [-number for number in range(500)]
    assert seen[3] == list(range(0, 500, 2))


class Place(MapFunction):
    """Says in which task a record is."""

    def execute(self, data: Any) -> tuple[str, int]:
        return repr(self.ctx.get_key()), self.ctx.parallel_index


KEYS = (0, "", False, None, "a", 1.0, (1, "x"))

PLACES = """
from sage import LocalEnvironment, MapFunction
class Place(MapFunction):
    def execute(self, data):
        return repr(self.ctx.get_key()), self.ctx.parallel_index
seen = set()
env = LocalEnvironment("places")
keys = (0, "", False, None, "a", 1.0, (1, "x"))
env.from_batch(keys * 20).keyby(lambda key: key).map(Place, parallelism=4).sink(seen.add)
env.submit(autostop=True)
print(sorted(seen))
"""


def places(backend: Backends) -> list[tuple[str, int]]:
    found = run(KEYS * 20, lambda stream: stream.keyby(lambda key: key).map(Place, parallelism=4), backend=backend)
    assert len(found) == 20 * len(KEYS)
    return sorted(set(found))


def test_each_key_lives_in_one_task(backend: Backends) -> None:
    """Keys of all types, falsy ones included; keys that are equal in Python are one key."""
    found = places(backend)
    assert [key for key, _ in found] == sorted(repr(key) for key in KEYS)
    assert dict(found)["0"] == dict(found)["False"]
    assert found == places(backend)


def test_each_key_lives_in_the_same_task_in_every_process(backend: Backends) -> None:
    """Python's own hash of strings differs from process to process; the place of a key does not."""
    for seed in ("1", "2"):
        done = subprocess.run(
            [sys.executable, "-c", PLACES],
            capture_output=True,
            text=True,
            timeout=30,
            check=True,
            env={**os.environ, "PYTHONHASHSEED": seed},
        )
        assert done.stdout.strip() == repr(places(backend))


class Producer(BatchFunction):
    """Gives records of three keys in turn, numbered for each producer."""

    def __init__(self) -> None:
        self._at = -1

    def execute(self) -> tuple[int, int, int] | None:
        self._at += 1
        return (self.ctx.parallel_index, self._at % 3, self._at) if self._at < 100 else None


def test_records_of_one_key_keep_their_order_for_each_producer(backend: Backends) -> None:
    """From three producers over four tasks."""
    arrived: list[tuple[int, int, int]] = []
    env = LocalEnvironment("test", backend=backend)
    keyed = env.from_batch(Producer, parallelism=3).keyby(lambda record: record[1], parallelism=3)
    keyed.map(lambda record: record, parallelism=4).sink(arrived.append)
    env.submit(autostop=True)
    assert Counter(producer for producer, _, _ in arrived) == {0: 100, 1: 100, 2: 100}
    numbers: dict[tuple[int, int], list[int]] = defaultdict(list)
    for producer, key, number in arrived:
        numbers[producer, key].append(number)
    assert len(numbers) == 9
    for found in numbers.values():
        assert found == sorted(found)
