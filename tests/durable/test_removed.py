"""`changed(removed=)` over the runs of a durable job: which keys are gone, and when that cannot be known."""

from __future__ import annotations

from contextlib import suppress
from typing import TYPE_CHECKING

import pytest

from sage import BaseService, Durable, FunctionError, LocalEnvironment, Source, UnsupportedPlanError
from sage._operators import keyed_state
from sage.connectors import JsonLinesFiles
from sage.testing import simulate

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from sage import DataStream, JobReport
    from sage._runtime.backend import Backend

Row = tuple[str, int]

FIRST: list[Row] = [("a", 1), ("b", 1), ("c", 1), ("d", 1)]
THEN: list[Row] = [("d", 1), ("b", 2), ("e", 1)]


@pytest.fixture(autouse=True)
def _short_sweeps(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let a checkpoint write few keys that have not changed: there are few keys."""
    monkeypatch.setattr(keyed_state, "SWEEP_MIN", 1)
    monkeypatch.setattr(keyed_state, "SWEEP_FACTOR", 0)


def key_of(row: Row) -> str:
    return row[0]


def gone(key: str) -> str:
    return f"{key} is gone"


def as_it_is(row: Row) -> Row:
    return row


class Table:
    """A table that is read in several runs.

    Args:
        folder: where the checkpoints are.
        backend: the backend of the jobs.
    """

    def __init__(self, folder: Path, backend: Callable[[], Backend] | None = None) -> None:
        self._folder = folder
        self._backend = backend
        self.rows: list[Row | str] = []
        self.report: JobReport | None = None

    def run(self, rows: list[Row] | Source[Row], parallelism: int = 1) -> list[Row | str]:
        """Return the records that pass in a run."""
        self.rows = []
        env = LocalEnvironment("table", backend=self._backend, durable=Durable(self._folder / "state"))
        stream: DataStream[Row]
        stream = env.from_source(rows, name="rows") if isinstance(rows, Source) else env.from_batch(rows, name="rows")
        stream = stream.map(checked, name="checked", on_error="skip").map_batches(lambda batch: batch, name="batches")
        keyed = stream.keyby(key_of, name="keys", parallelism=parallelism)
        changed = keyed.changed(removed=gone, name="changed", parallelism=parallelism)
        changed.sink(self.rows.append, name="sink")
        self.report = env.submit(autostop=True).report
        assert self.report.is_accounted
        return sorted(self.rows, key=str)


def checked(row: Row) -> Row:
    if row[1] < 0:
        raise ValueError(row)
    return row


@pytest.mark.parametrize("parallelism", [1, 3])
def test_each_run_reads_everything_and_tells_what_is_new_different_or_gone(
    tmp_path: Path, backend: Callable[[], Backend], parallelism: int
) -> None:
    table = Table(tmp_path, backend)
    assert table.run(FIRST, parallelism) == FIRST
    assert table.run(THEN, parallelism) == [("b", 2), ("e", 1), "a is gone", "c is gone"]
    assert table.run(THEN, parallelism) == []
    assert table.run([*THEN, ("a", 1)], parallelism) == [("a", 1)]
    assert table.run([], parallelism) == ["a is gone", "b is gone", "d is gone", "e is gone"]
    assert table.run([], parallelism) == []


class Positioned(Source[Row]):
    """Goes on where it was, unless somebody reads it from the beginning."""

    def __init__(self, rows: list[Row]) -> None:
        self.rows = rows

    def open(self, position: int | None = None) -> None:
        self.at = position or 0

    def read(self, records_max: int) -> list[Row] | None:
        records = self.rows[self.at : self.at + 1]
        self.at += 1
        return records or None

    def position(self) -> int:
        return self.at


def test_a_source_with_a_position_is_read_from_its_beginning_too(tmp_path: Path) -> None:
    table = Table(tmp_path)
    assert table.run(Positioned(FIRST)) == FIRST
    assert table.run(Positioned(THEN)) == [("b", 2), ("e", 1), "a is gone", "c is gone"]


def test_nothing_is_gone_if_a_record_failed_before_it_was_seen(tmp_path: Path) -> None:
    table = Table(tmp_path)
    assert table.run([*FIRST, ("x", -1)]) == FIRST
    assert table.report is not None
    assert not any("removed" in note for note in table.report.notes)  # nothing was there before
    assert table.run([("a", 1), ("b", -1)]) == []
    assert table.report.notes[-1] == '"changed" calls no key removed, because records before it failed: 1'
    assert table.run([("a", 1), ("b", 1)]) == ["c is gone", "d is gone"]


def test_nothing_is_gone_if_the_job_was_stopped_or_failed(tmp_path: Path) -> None:
    class Stops(Positioned):
        def read(self, records_max: int) -> list[Row] | None:
            if self.at == 1:
                env.stop()
                return []
            return super().read(records_max)

    class Fails(Positioned):
        def read(self, records_max: int) -> list[Row] | None:
            if self.at == 1:
                raise ValueError(records_max)
            return super().read(records_max)

    rows: list[Row | str] = []
    table = Table(tmp_path)
    assert table.run(FIRST) == FIRST
    for source in (Stops(FIRST), Fails(FIRST)):
        env = LocalEnvironment("table", durable=Durable(tmp_path / "state"))
        stream = env.from_source(source, name="rows").map(checked, name="checked")
        stream.keyby(key_of, name="keys").changed(removed=gone, name="changed").sink(rows.append, name="sink")
        job = env.submit()
        with suppress(FunctionError):
            job.wait()
        assert job.report is not None
        assert job.report.operator("keys").records_in == 1
    assert rows == []
    assert table.run(THEN) == [("b", 2), ("e", 1), "a is gone", "c is gone"]


class Model(BaseService):
    """Notes each call."""

    asked: list[Row]

    def ask(self, row: Row) -> Row:
        self.asked.append(row)
        return row


def test_records_that_waited_before_it_are_read_again_and_not_kept(tmp_path: Path) -> None:
    def run(given: list[Row], calls_max: int = 100) -> tuple[list[Row | str], JobReport]:
        Model.asked = []
        rows: list[Row | str] = []
        env = LocalEnvironment("table", durable=Durable(tmp_path / "state"))
        model = env.register_service("model", Model)
        env.limit(calls={"model": calls_max})
        stream: DataStream[Row] = env.from_batch(given, name="rows").map(model.ask, name="ask")
        stream.keyby(key_of, name="keys").changed(removed=gone, name="changed").sink(rows.append, name="sink")
        return rows, env.submit(autostop=True).report

    rows, report = run(FIRST, calls_max=1)
    assert rows == [("a", 1)]
    assert report.waiting == len(FIRST) - 1
    rows, report = run([("b", 2)])
    assert rows == [("b", 2), "a is gone"]
    assert Model.asked == [("b", 2)]
    assert (report.is_accounted, report.waiting) == (True, 0)


def test_records_that_waited_in_it_are_read_again_and_not_kept(tmp_path: Path) -> None:
    def run(given: list[Row], calls_max: int = 100) -> list[Row | str]:
        def ask(row: Row) -> Row:
            answer: Row = model.ask(row)
            return answer

        Model.asked = []
        rows: list[Row | str] = []
        env = LocalEnvironment("table", durable=Durable(tmp_path / "state"))
        model = env.register_service("model", Model)
        env.limit(calls={"model": calls_max})
        stream: DataStream[Row] = env.from_batch(given, name="rows")
        changed = stream.keyby(key_of, name="keys").changed(fingerprint=ask, removed=gone, name="changed")
        changed.sink(rows.append, name="sink")
        report = env.submit(autostop=True).report
        assert report.is_accounted is True
        assert report.waiting == max(len(given) - calls_max, 0)
        return rows

    assert run(FIRST, calls_max=1) == [("a", 1)]
    assert run([("b", 2)]) == [("b", 2), "a is gone"]


def test_a_job_that_is_not_durable_has_no_earlier_runs() -> None:
    rows: list[Row | str] = []
    env = LocalEnvironment("table")
    env.from_batch(FIRST).keyby(key_of).changed(removed=gone).sink(rows.append)
    env.run()
    assert rows == FIRST


@pytest.mark.parametrize("fused", [True, False])
def test_what_is_gone_survives_crashes(fused: bool) -> None:
    """Two tables one after the other, in two jobs of which each may be killed at any moment."""

    def program(backend: Callable[[], Backend], folder: Path) -> list[str]:
        for number, rows in enumerate([FIRST, THEN, [("b", 2)], [("a", 1), *THEN]]):
            done = folder / f"done-{number}"
            if done.exists():
                continue
            env = LocalEnvironment("table", backend=backend, durable=Durable(folder / "state", interval_s=0.002))
            stream: DataStream[Row] = env.from_source(Positioned(rows), name="rows")
            stream = stream.map(as_it_is, name="map") if fused else stream.map_batches(lambda rows: rows, name="map")
            changed = stream.keyby(key_of, name="keys").changed(removed=gone, name="changed")
            changed.sink(JsonLinesFiles(folder / "out"), name="out")
            env.run()
            done.touch()
        return sorted(line for path in folder.glob("out/*") for line in path.read_text("utf-8").splitlines())

    simulate(program, seeds=range(8), crashes=3)


def test_an_operator_with_a_state_before_it_is_refused(tmp_path: Path) -> None:
    env = LocalEnvironment("table", durable=tmp_path / "state")
    keyed = env.from_batch(FIRST, name="rows").keyby(key_of, name="keys")
    keyed.distinct(name="once").changed(removed=gone, name="changed").sink(print)
    with pytest.raises(UnsupportedPlanError, match='"once" keeps a state, and stands before "changed"') as refused:
        env.run()
    assert refused.value.__notes__ == ["Put it after changed(removed=...), or leave removed= out."]


def test_a_sink_beside_it_is_told_that_records_come_again(tmp_path: Path) -> None:
    env = LocalEnvironment("table", durable=tmp_path / "state")
    rows = env.from_source(Positioned(FIRST), name="rows")
    rows.sink(print, name="beside")
    rows.keyby(key_of).changed(removed=gone).sink(JsonLinesFiles(tmp_path / "out"), name="behind")
    text = env.explain()
    again = 'records of "rows" again in each run: it is read for changed(removed=...)'
    assert f'over a restart, "beside" gets each record at least once; {again}' in text
    assert 'over a restart, "behind" gets each record exactly once\n' in f"{text}\n"
