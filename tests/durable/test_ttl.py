"""States with `ttl_s`: values that were not written for that long are gone, in memory and in checkpoints."""

from __future__ import annotations

import pickle
from contextlib import closing
from typing import TYPE_CHECKING, Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from support.numbers import lines

from sage import Durable, GraphError, ListState, LocalEnvironment, MapState, ProcessFunction, Source, ValueState
from sage._operators.keyed_state import KeyedState, each_pickle
from sage._runtime.checkpoint_store import FILE, CheckpointReader
from sage.connectors import JsonLinesFiles
from sage.state import Dated, Values, ValuesInMemory
from sage.testing import ManualClock, StepBackend, simulate

if TYPE_CHECKING:
    from collections import Counter
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from sage._runtime.backend import Backend

TTL_S = 10.0


class Hand:
    """Tells the key of the record in hand."""

    key: object = None


class Visits(ProcessFunction[int, Any]):
    """Has each kind of state, and reads and changes it in several ways."""

    count = ValueState(0, ttl_s=TTL_S)
    seen = ListState[int](ttl_s=TTL_S)
    latest = MapState[str, int](ttl_s=TTL_S)
    ever = ValueState(0)

    def execute(self, data: int) -> list[Any]:
        self.ever.value += 1
        self.count.value += 1
        self.seen.append(data)
        before = self.latest.get("at")
        self.latest["at"] = data
        return [[self.count.value, [*self.seen], before, self.ever.value]]


def there(values: Values) -> dict[object, Any]:
    """Return the values that are in memory, also those that have ended."""
    both = {**values.old, **values.young}
    return {place: value for place, value in both.items() if isinstance(value, Dated)}


STEPS = st.lists(
    st.one_of(
        st.tuples(st.just("wait"), st.integers(0, 12)),
        st.tuples(st.sampled_from(["read", "assign", "append"]), st.integers(0, 4)),
        st.tuples(st.sampled_from(["checkpoint", "restart"]), st.none()),
    ),
    max_size=60,
)


@given(steps=STEPS, is_durable=st.booleans())
def test_values_end_as_in_a_dict_of_times_and_leave_memory(steps: Any, is_durable: bool) -> None:
    clock, hand = ManualClock(0.0), Hand()
    bodies: list[bytes] = []
    values: Values = KeyedState() if is_durable else ValuesInMemory()
    number = 0
    function, expiries = bound(values, hand, clock)
    written: dict[tuple[str, int], tuple[Any, float]] = {}

    def wanted(state: str, key: int, default: Any) -> Any:
        value, at = written.get((state, key), (default, -100.0))
        return value if clock() < at + TTL_S else default

    for what, argument in steps:
        for expiry in expiries:
            expiry.go_on(3)
        hand.key = argument
        match what:
            case "wait":
                clock.advance(argument)
            case "read":
                assert function.count.value == wanted("count", argument, 0)
                assert [*function.seen] == wanted("seen", argument, [])
            case "assign":
                function.count.value = number = number + 1
                written["count", argument] = (number, clock())
            case "append":
                function.seen.append(1)
                written["seen", argument] = ([*wanted("seen", argument, []), 1], clock())
            case "checkpoint" | "restart" if isinstance(values, KeyedState):
                since, body = values.take(len(bodies) + 1).take()
                bodies.append(body)
                loaded = KeyedState(since, [one for some in bodies[since - 1 :] for one in each_pickle(some)])
                assert there(loaded) == there(values)
                if what == "restart":
                    values = loaded
                    function, expiries = bound(values, hand, clock)
    for _ in range(3):
        for expiry in expiries:
            expiry.go_on(100)
        clock.advance(TTL_S)
    assert there(values) == {}


def bound(values: Values, hand: Hand, clock: Callable[[], float]) -> tuple[Visits, list[Any]]:
    function = Visits()
    states = [vars(Visits)[name] for name in ("count", "seen")]
    return function, [state.bind(function, values, hand, clock) for state in states]


def test_a_value_that_is_only_read_ends_and_one_that_is_written_lasts() -> None:
    clock, hand = ManualClock(0.0), Hand()
    values = ValuesInMemory()
    function, expiries = bound(values, hand, clock)
    for hand.key in ("read", "written"):
        function.count.value = 5
    for _ in range(10):
        clock.advance(4)
        for expiry in expiries:
            expiry.go_on(10)
        hand.key = "read"
        read = function.count.value
        hand.key = "written"
        function.count.value += 0
        assert function.count.value == 5
    assert read == 0


def test_a_value_does_not_end_between_two_looks_at_it_in_one_call() -> None:
    clock, hand = ManualClock(0.0), Hand()
    function, (_, seen) = bound(ValuesInMemory(), hand, clock)
    function.seen.append(1)
    clock.advance(9)
    seen.go_on(10)
    assert len(function.seen) == 1
    clock.advance(2)
    assert function.seen[0] == 1
    seen.go_on(10)
    assert [*function.seen] == []


def test_a_clock_that_was_set_back_between_two_runs_keeps_a_value_for_its_time_and_no_longer() -> None:
    hand, values = Hand(), KeyedState()
    function, _ = bound(values, hand, ManualClock(1_000_000.0))
    function.count.value = 7
    since, body = values.take(1).take()
    clock = ManualClock(50.0)
    function, (count, _) = bound(KeyedState(since, each_pickle(body)), hand, clock)
    clock.advance(TTL_S - 1)
    count.go_on(10)
    assert function.count.value == 7
    clock.advance(1)
    count.go_on(10)
    assert function.count.value == 0


class Steps(Source[list[int]]):
    """Gives a key and a time each, and moves the clock to that time first."""

    def __init__(self, records: list[list[int]], clock: ManualClock) -> None:
        self.records = records
        self.clock = clock

    def open(self, position: Any = None) -> None:
        self.at = position or 0

    def read(self, records_max: int) -> list[list[int]] | None:
        if self.at == len(self.records):
            return None
        self.clock.now_s = max(self.clock.now_s, 1000.0 + self.records[self.at][1])
        self.at += 1
        return [self.records[self.at - 1]]

    def position(self) -> int:
        return self.at


def job(
    folder: Path, backend: Callable[[], Backend], records: list[list[int]], function: type = Visits, began_s: float = 0
) -> Counter[str]:
    """Run a job on the times of its records: it is one task, so each record is through before the next one comes."""
    made = backend()
    assert isinstance(made, StepBackend)
    made.clock.advance(began_s)
    env = LocalEnvironment("job", backend=lambda: made, durable=Durable(folder / "state", interval_s=0.002))
    keyed = env.from_source(Steps(records, made.clock), name="steps").keyby(lambda record: record[0])
    visits = keyed.map(lambda record: record[1]).process(function, name="visits")
    visits.sink(JsonLinesFiles(folder / "out"), name="out")
    env.run()
    return lines(folder)


PHASES = [[key, phase] for phase in (0, 4, 8, 30, 34, 47) for key in (0, 1, 0, 2)][:-2]


def began_at(folder: Path) -> float:
    """Return the time of the last record that the last checkpoint has, from which a run goes on in these tests."""
    if not (folder / "state" / FILE).exists():
        return 0
    with closing(CheckpointReader(str(folder / "state"))) as reader:
        found = reader.load()
    rows = [] if found is None else [row for row in found.rows if row.operator == "steps"]
    position = pickle.loads(rows[0].body)[0][1] if rows else 0
    return float(PHASES[position - 1][1]) if position else 0


@pytest.mark.parametrize(
    "seeds", [range(12), pytest.param(range(12, 250), marks=[pytest.mark.proof, pytest.mark.timeout(300)])]
)
def test_values_end_at_the_same_records_over_crashes(seeds: range) -> None:
    def run(backend: Callable[[], Backend], folder: Path) -> Counter[str]:
        return job(folder, backend, PHASES, began_s=began_at(folder))

    simulate(run, seeds=seeds, crashes=2)


def rows(counted: Counter[str]) -> Iterator[str]:
    yield from sorted(counted.elements())


def test_values_end_between_two_runs(tmp_path: Path) -> None:
    records = [[0, 0], [0, 1]]
    assert [*rows(job(tmp_path, StepBackend, records))] == ["[1, [0], null, 1]", "[2, [0, 1], 0, 2]"]
    records += [[0, 5]]
    before = job(tmp_path, StepBackend, records)
    assert "[3, [0, 1, 5], 1, 3]" in before
    records += [[0, 60]]
    assert [*rows(job(tmp_path, StepBackend, records) - before)] == ["[1, [60], null, 4]"]


def test_checkpoints_lose_the_values_that_ended(tmp_path: Path) -> None:
    records = [[key, key // 4] for key in range(400)]
    assert sum(job(tmp_path, StepBackend, records, LastsShortly).values()) == 400
    with closing(CheckpointReader(str(tmp_path / "state"))) as reader:
        found = reader.load()
    assert found is not None
    (row,) = [row for row in found.rows if row.operator == "visits"]
    assert row.keys is not None
    # A value is looked at when its time is over, and then again, if it was written meanwhile.
    assert row.keys <= 4 * 2 * TTL_S + 4
    loaded = KeyedState(row.since, [one for body in found.changes["visits", 0] for one in each_pickle(body)])
    assert len(loaded.old) == row.keys


class LastsShortly(ProcessFunction[int, int]):
    count = ValueState(0, ttl_s=TTL_S)

    def execute(self, data: int) -> list[int]:
        self.count.value += 1
        return [self.count.value]


class Sizes(ProcessFunction[int, int]):
    count = ValueState(0, ttl_s=TTL_S)

    def execute(self, data: int) -> list[int]:
        self.count.value += 1
        return [len(self.count._young)]


def test_the_memory_of_a_job_that_is_not_durable_is_freed() -> None:
    backend = StepBackend()
    env = LocalEnvironment("job", backend=lambda: backend)
    records = [[key, key // 4] for key in range(400)]
    keyed = env.from_source(Steps(records, backend.clock)).keyby(lambda record: record[0])
    sizes = keyed.map(lambda record: record[1]).process(Sizes).collect()
    assert len(sizes) == 400
    assert max(sizes) <= 4 * TTL_S + 4


class LastsForever(ProcessFunction[int, int]):
    count = ValueState(0)

    def execute(self, data: int) -> list[int]:
        self.count.value += 1
        return [self.count.value]


def test_a_ttl_may_come_and_go_between_runs(tmp_path: Path) -> None:
    records = [[0, 0]]
    job(tmp_path, StepBackend, records, LastsForever)
    records += [[0, 1]]
    assert "2" in job(tmp_path, StepBackend, records, LastsShortly, began_s=100)  # as if it was written just now
    records += [[0, 2]]
    assert "3" in job(tmp_path, StepBackend, records, LastsForever, began_s=200)
    records += [[0, 3]]
    assert "4" in job(tmp_path, StepBackend, records, LastsShortly, began_s=300)
    records += [[0, 50]]
    counts = job(tmp_path, StepBackend, records, LastsShortly, began_s=400)
    assert sorted(counts.elements()) == ["1", "1", "2", "3", "4"]


@pytest.mark.parametrize("ttl_s", [0, -1, "an hour", float("inf"), True])
def test_a_ttl_that_is_not_a_time_is_refused(ttl_s: Any) -> None:
    for make in (lambda: ValueState(0, ttl_s=ttl_s), lambda: ListState(ttl_s=ttl_s), lambda: MapState(ttl_s=ttl_s)):
        with pytest.raises(GraphError, match=r"State: ttl_s is "):
            make()
