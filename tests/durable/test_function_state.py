"""State of keys and of functions over the runs of a durable job."""

from __future__ import annotations

import json
import sqlite3
import threading
from contextlib import closing
from operator import add
from typing import TYPE_CHECKING, Any

import pytest

from sage import CheckpointError, Durable, GraphError, JobError, LocalEnvironment, MapFunction, Source
from sage.connectors import JsonLinesFiles
from sage.testing import StepBackend

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from sage import DataStream, JobReport
    from sage._runtime.backend import Backend


class Folder:
    """A durable job, run again and again, and the rows that each run adds."""

    def __init__(self, path: Path, backend: Callable[[], Backend]) -> None:
        self.path = path
        self._backend = backend
        self.report: JobReport | None = None

    def rows(self) -> list[Any]:
        paths = sorted((self.path / "out").glob("*.jsonl"))
        return [json.loads(line) for path in paths for line in path.read_text("utf-8").splitlines()]

    def run(self, records: list[Any], build: Callable[[DataStream[Any]], DataStream[Any]]) -> list[Any]:
        before = self.rows()
        env = LocalEnvironment("job", backend=self._backend, durable=self.path / "state")
        build(env.from_batch(records, name="records")).sink(JsonLinesFiles(self.path / "out"), name="out")
        self.report = env.submit(autostop=True).report
        after = self.rows()
        for row in before:
            after.remove(row)
        return after


@pytest.fixture
def job(tmp_path: Path, backend: Callable[[], Backend]) -> Folder:
    return Folder(tmp_path, backend)


def totals(stream: DataStream[Any], emit: Any = "last", parallelism: int = 1) -> DataStream[Any]:
    keyed = stream.keyby(lambda pair: pair[0])
    return keyed.reduce(
        lambda one, other: [one[0], one[1] + other[1]], emit=emit, parallelism=parallelism, name="totals"
    )


@pytest.mark.parametrize("parallelism", [1, 3])
def test_totals_go_on_and_only_those_that_changed_come_again(job: Folder, parallelism: int) -> None:
    records = [["a", 1], ["b", 2], ["a", 3]]

    def build(stream: DataStream[Any]) -> DataStream[Any]:
        return totals(stream, parallelism=parallelism)

    assert sorted(job.run(records, build)) == [["a", 4], ["b", 2]]
    assert job.run(records, build) == []
    assert sorted(job.run([*records, ["b", 5], ["c", 6]], build)) == [["b", 7], ["c", 6]]
    assert job.run([*records, ["b", 5], ["c", 6], ["a", 1]], build) == [["a", 5]]


def test_each_combined_value_goes_on_from_the_one_before(job: Folder) -> None:
    def build(stream: DataStream[Any]) -> DataStream[Any]:
        return totals(stream, emit="each")

    assert job.run([["a", 1], ["a", 2]], build) == [["a", 1], ["a", 3]]
    assert job.run([["a", 1], ["a", 2], ["a", 4]], build) == [["a", 7]]


class Ticks(Source[int]):
    """Gives 0 to 4, and then nothing until it may end."""

    def __init__(self, *, may_end: bool) -> None:
        self.may_end = may_end

    def open(self, position: Any = None) -> None:
        self.at = 0 if position is None else position

    def read(self, records_max: int) -> list[int] | None:
        if self.at == 5:
            return None if self.may_end else []
        self.at += 1
        return [self.at - 1]

    def position(self) -> int:
        return self.at


def test_after_a_stop_totals_wait_for_the_end_of_the_stream(tmp_path: Path) -> None:
    arrived = threading.Semaphore(0)

    def build(*, may_end: bool) -> LocalEnvironment:
        env = LocalEnvironment("job", durable=tmp_path / "state")
        ticks = env.from_source(Ticks(may_end=may_end), name="ticks").tap(lambda _: arrived.release())
        ticks.keyby(lambda _: "all").reduce(add, emit="last").sink(JsonLinesFiles(tmp_path / "out"))
        return env

    job = build(may_end=False).submit()
    for _ in range(5):
        assert arrived.acquire(timeout=30)
    job.stop()
    assert job.report.state == "stopped"
    assert list((tmp_path / "out").glob("*.jsonl")) == []
    build(may_end=True).run()
    (path,) = (tmp_path / "out").glob("*.jsonl")
    assert path.read_text("utf-8") == "10\n"


class Numbered(MapFunction[Any, Any]):
    def __init__(self) -> None:
        self.count = 0

    def execute(self, data: Any) -> Any:
        self.count += 1
        return [self.count, data]

    def snapshot(self) -> int:
        return self.count

    def restore(self, count: int) -> None:
        self.count = count


class Forgetful(MapFunction[Any, Any]):
    def execute(self, data: Any) -> Any:
        return data


def test_a_function_with_snapshot_and_restore_goes_on(job: Folder) -> None:
    assert job.run(["a", "b"], lambda stream: stream.map(Numbered, name="numbered")) == [[1, "a"], [2, "b"]]
    assert job.run(["a", "b", "c"], lambda stream: stream.map(Numbered, name="numbered")) == [[3, "c"]]
    with pytest.raises(JobError, match='function of operator "numbered" has a state in the checkpoint, and no restore'):
        job.run(["a", "b", "c", "d"], lambda stream: stream.map(Forgetful, name="numbered"))
    assert job.run(["a", "b", "c", "d"], lambda stream: stream.map(Numbered, name="numbered")) == [[4, "d"]]


class Unpicklable(Numbered):
    def snapshot(self) -> Any:
        return threading.Lock()


def test_a_state_that_cannot_be_pickled_is_named(job: Folder) -> None:
    with pytest.raises(JobError, match=r'operator "numbered" has a state that cannot be pickled: TypeError: .*lock'):
        job.run(["a"], lambda stream: stream.map(Unpicklable, name="numbered"))


def test_a_limit_counts_over_all_runs(job: Folder) -> None:
    assert job.run([1, 2], lambda stream: stream.limit(3)) == [1, 2]
    assert job.run([1, 2, 3, 4, 5], lambda stream: stream.limit(3)) == [3]
    assert job.run([1, 2, 3, 4, 5, 6], lambda stream: stream.limit(3)) == []


def test_a_sample_draws_as_in_one_run(job: Folder, tmp_path: Path, backend: Callable[[], Backend]) -> None:
    whole = Folder(tmp_path / "whole", backend).run([*range(100)], lambda stream: stream.sample(0.5, seed=1))
    parts = [job.run([*range(count)], lambda stream: stream.sample(0.5, seed=1)) for count in (30, 60, 100)]
    assert [record for part in parts for record in part] == whole


def test_a_class_that_is_gone_is_named(job: Folder, monkeypatch: pytest.MonkeyPatch) -> None:
    def build(stream: DataStream[Any]) -> DataStream[Any]:
        return stream.keyby(lambda _: 0).reduce(lambda one, _: one, emit="last", name="first").map(str)

    assert job.run([Moved()], build) == ["moved"]
    monkeypatch.delattr(f"{__name__}.Moved")
    with pytest.raises(CheckpointError, match='state of operator "first" cannot be unpickled: AttributeError'):
        job.run([1, 2], build)


class Moved:
    def __str__(self) -> str:
        return "moved"


class Overlapping(Numbered):
    async def execute(self, data: Any) -> Any:
        return data


def test_a_state_that_overlapping_calls_change_is_refused(job: Folder) -> None:
    with pytest.raises(GraphError, match=r'"asks" is a map_async whose function has snapshot\(\) and restore\(\)'):
        job.run(["a"], lambda stream: stream.map_async(Overlapping, concurrency=2, name="asks"))
    assert not (job.path / "state").exists()


class EndsEarly(Source[Any]):
    """Gives many keys and ends, long before the other source."""

    def open(self, position: Any = None) -> None:
        self.at = position or 0

    def read(self, records_max: int) -> list[Any] | None:
        first, self.at = self.at, min(2_000, self.at + records_max)
        return [[str(number), 1] for number in range(first, self.at)] or None

    def position(self) -> int:
        return self.at


def test_the_values_of_a_task_that_ended_are_written_once(tmp_path: Path) -> None:
    env = LocalEnvironment("job", backend=lambda: StepBackend(1), durable=Durable(tmp_path / "state", interval_s=0.002))
    totals(env.from_source(EndsEarly(), name="early")).sink(print)
    env.from_batch(range(400), name="late").map_batches(lambda some: some, max_records=1).sink(lambda _: None)
    env.run()
    with closing(sqlite3.connect(tmp_path / "state" / "checkpoints.sqlite")) as file, file:
        sizes = [row[0] for row in file.execute("SELECT length(changes) FROM parts WHERE changes IS NOT NULL")]
    file.close()
    assert len(sizes) > 1
    assert sizes[-1] == 0 < max(sizes)
