"""States of keys over crashes and over the runs of a durable job."""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING, Any

import pytest
from support.numbers import Numbers, lines

from sage import (
    BatchFunction,
    CheckpointError,
    Durable,
    FunctionError,
    JobError,
    ListState,
    LocalEnvironment,
    MapFunction,
    MapState,
    ProcessFunction,
    ValueState,
)
from sage._operators import keyed_state
from sage.connectors import JsonLinesFiles
from sage.testing import simulate

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from sage import DataStream
    from sage._runtime.backend import Backend

    Build = Callable[[DataStream[int]], DataStream[Any]]


@pytest.fixture(autouse=True)
def _short_sweeps(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let a checkpoint write few keys that have not changed: there are few keys."""
    monkeypatch.setattr(keyed_state, "SWEEP_MIN", 1)
    monkeypatch.setattr(keyed_state, "SWEEP_FACTOR", 0)


def rest(number: int) -> int:
    return number % 3


def collect(seen: list[int], number: int) -> tuple[list[int], list[int]]:
    """Change the state in place."""
    seen.append(number)
    return seen, [*seen]


def add(total: int, number: int) -> int:
    return total + number


class Session(ProcessFunction[int, Any]):
    """Has each kind of state, which it replaces, changes in place, and only reads and then changes."""

    count = ValueState(0)
    seen = ListState[int]()
    latest = MapState[str, int]()
    groups = ValueState(list[list[int]]())

    def execute(self, data: int) -> list[Any]:
        self.count.value += 1
        self.seen.append(data)
        before = self.latest.get("number")
        self.latest["number"] = data
        self.groups.value.append([data])
        return [[self.count.value, list(self.seen), before, list(self.groups.value)]]


BUILDS: dict[str, Build] = {
    "stateful_map": lambda stream: stream.keyby(rest).stateful_map(lambda old, new: (new, [old, new]), 0),
    "in place": lambda stream: stream.keyby(rest).stateful_map(collect, list[int]()),
    "process": lambda stream: stream.keyby(rest).process(Session),
    "parallel process": lambda stream: stream.keyby(rest).process(Session, parallelism=2),
    "count": lambda stream: stream.keyby(rest).count(),
    "last count": lambda stream: stream.keyby(rest).count(emit="last"),
    "aggregate": lambda stream: stream.keyby(rest).aggregate(0, add, lambda total: -total, emit="last", parallelism=2),
    "top_k": lambda stream: stream.keyby(rest).top_k(2),
    "distinct": lambda stream: stream.keyby(lambda number: number // 2).distinct(),
    "changed": lambda stream: stream.keyby(lambda _: 0).changed(fingerprint=lambda number: number // 3),
}


def job(folder: Path, backend: Callable[[], Backend] | None, build: Build, source: Any = Numbers) -> Counter[str]:
    """Run it, and return the rows of all runs."""
    env = LocalEnvironment("job", backend=backend, durable=Durable(folder / "state", interval_s=0.002))
    build(env.from_source(source(), name="numbers")).sink(JsonLinesFiles(folder / "out"), name="out")
    env.run()
    return lines(folder)


@pytest.mark.parametrize("build", BUILDS.values(), ids=BUILDS.keys())
def test_a_state_survives_crashes(build: Build) -> None:
    simulate(lambda backend, folder: job(folder, backend, build), seeds=range(12), crashes=2)


def test_a_state_that_does_not_take_part_is_found() -> None:
    def build(stream: DataStream[int]) -> DataStream[Any]:
        seen: Counter[int] = Counter()

        def count(_: int, number: int) -> tuple[int, int]:
            seen[number % 3] += 1
            return 0, seen[number % 3]

        return stream.keyby(rest).stateful_map(count, 0)

    with pytest.raises(AssertionError, match=r"when it was killed before step \d+"):
        simulate(lambda backend, folder: job(folder, backend, build), seeds=range(50), crashes=2)


class SharesADefault(ProcessFunction[int, Any]):
    """Takes what one key has for the default of all."""

    shared: list[int] = []  # noqa: RUF012
    seen = ValueState(list[int]())

    def execute(self, data: int) -> list[Any]:
        self.seen.value = self.seen.value or self.shared
        self.seen.value.append(data)
        return [list(self.seen.value)]


class ChangesWithoutTheState(ProcessFunction[int, Any]):
    """Keeps the value itself, so that a checkpoint does not know of later changes."""

    seen = ValueState(list[int]())

    def __init__(self) -> None:
        self.lists: dict[int, list[int]] = {}

    def execute(self, data: int) -> list[Any]:
        key = self.ctx.get_key()
        if key not in self.lists:
            self.lists[key] = self.seen.value
        self.lists[key].append(data)
        return [list(self.lists[key])]


@pytest.mark.parametrize("wrong", [SharesADefault, ChangesWithoutTheState])
def test_a_state_that_goes_around_the_attribute_is_found(wrong: Any) -> None:
    def run(backend: Callable[[], Backend], folder: Path) -> Counter[str]:
        wrong.shared = []  # as in a process of its own
        return job(folder, backend, lambda stream: stream.keyby(rest).process(wrong))

    with pytest.raises(AssertionError, match=r"when it was killed before step \d+"):
        simulate(run, seeds=range(50), crashes=2)


class SnapshotsAKey(MapFunction[int, int]):
    count = ValueState(0)

    def execute(self, data: int) -> int:
        self.count.value += 1
        return data

    def snapshot(self) -> int:
        return self.count.value

    def restore(self, count: int) -> None:
        raise AssertionError


def test_a_state_is_not_there_in_a_snapshot_which_belongs_to_no_key(tmp_path: Path) -> None:
    env = LocalEnvironment("job", durable=tmp_path / "state")
    env.from_batch([1, 2], name="numbers").keyby(lambda x: x).map(SnapshotsAKey, name="counted").sink(print)
    with pytest.raises(FunctionError, match=r'"counted" .*a state of a key is used while no record is in hand'):
        env.run()


class Forgetful(ProcessFunction[int, int]):
    def execute(self, data: int) -> list[int]:
        return [data]


def test_states_that_a_function_has_no_more_are_named(tmp_path: Path) -> None:
    def build(function: Any) -> Build:
        return lambda stream: stream.keyby(rest).process(function, name="session")

    job(tmp_path, None, build(Session))
    with pytest.raises((CheckpointError, JobError), match='"session" has states of keys in the checkpoint, and its'):
        job(tmp_path, None, build(Forgetful))
    job(tmp_path, None, build(Session))


TABLE: list[list[list[Any]]] = [
    [["a", 1], ["b", 1]],
    [["a", 1], ["b", 2], ["c", 1]],
    [["a", 1], ["b", 2], ["c", 1]],
    [["a", 3], ["c", 1]],
]


@pytest.mark.parametrize("options", [{}, {"fingerprint": str}])
def test_only_rows_that_are_new_or_different_since_the_last_run_pass(
    tmp_path: Path, backend: Callable[[], Backend], options: Any
) -> None:
    def added(rows: list[list[Any]]) -> Counter[str]:
        before = lines(tmp_path)

        class Table(BatchFunction[list[Any]]):
            """Reads the whole table in each run."""

            def open(self) -> None:
                self.rows = iter(rows)

            def execute(self) -> list[Any] | None:
                return next(self.rows, None)

        env = LocalEnvironment("job", backend=backend, durable=Durable(tmp_path / "state"))
        changed = env.from_batch(Table, name="table").keyby(lambda row: row[0]).changed(**options)
        changed.sink(JsonLinesFiles(tmp_path / "out"), name="out")
        env.run()
        return lines(tmp_path) - before

    found = [added(rows) for rows in TABLE]
    assert found[0] == Counter(['["a", 1]', '["b", 1]'])
    assert found[1] == Counter(['["b", 2]', '["c", 1]'])
    assert found[2] == Counter()
    assert found[3] == Counter(['["a", 3]'])
