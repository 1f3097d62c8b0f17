"""`submit(restarts=)`: after a failure, tasks go on from the last checkpoint within the run, and services stay up."""

from __future__ import annotations

import asyncio
import gc
import random
import threading
import time
import weakref
from collections import Counter
from typing import TYPE_CHECKING, Any

import pytest
from durable.test_recovery import build, expected, written
from support.numbers import COUNT, Numbers, lines

from sage import (
    BaseService,
    Durable,
    FunctionError,
    GraphError,
    JobErrorGroup,
    LocalEnvironment,
    MapFunction,
    Outcome,
    Restart,
    Retry,
    ServiceOptions,
    TransactionalSink,
)
from sage._operators import keyed_state
from sage._runtime.states import JobState, Phase
from sage.connectors import JsonLinesFiles
from sage.testing import StepBackend, simulate

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence
    from pathlib import Path

    from sage import DataStream, JobReport
    from sage._runtime.backend import Backend, SupervisedJob

AT_ONCE = Restart(restarts_max=3, backoff_s=(0.0, 0.0))


@pytest.fixture(autouse=True)
def _short_sweeps(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let a checkpoint write few keys that have not changed: the graphs have few keys."""
    monkeypatch.setattr(keyed_state, "SWEEP_MIN", 1)
    monkeypatch.setattr(keyed_state, "SWEEP_FACTOR", 0)


class FaultyBackend(StepBackend):
    """Lets some task fail before some of the steps of a job."""

    def __init__(self, seed: int, faults: int) -> None:
        super().__init__(seed)
        self._faults = random.Random(f"faults {seed}")
        self._steps = sorted(self._faults.randrange(150) for _ in range(faults))
        self._step_count = 0
        self.failed: list[str] = []

    def turn(self, supervisor: SupervisedJob) -> None:
        self._step_count += 1
        running = [task for task in self._tasks if task.phase in (Phase.RUNNING, Phase.FINISHING)]
        is_due = bool(self._steps) and self._step_count >= self._steps[0]
        if is_due and running and supervisor.state.job is JobState.RUNNING:
            self._steps.pop(0)
            task = self._faults.choice(running)
            task.chain.failures.append(RuntimeError("a fault"))
            task.wake()
            self.failed.append(task.name)
        super().turn(supervisor)


@pytest.mark.timeout(120)
@pytest.mark.parametrize(
    "first", [*range(0, 40, 20), *(pytest.param(n, marks=pytest.mark.proof) for n in range(40, 200, 20))]
)
def test_recovered_equals_undisturbed(first: int, folder: Path) -> None:
    restarts = 0
    for seed in range(first, first + 20):
        wanted, taken = expected(seed, folder / str(seed), build)
        disturbed = folder / str(seed) / "disturbed"
        disturbed.mkdir()
        backend = FaultyBackend(seed, faults=1 + seed % 3)
        env = LocalEnvironment("random", backend=lambda: backend, durable=Durable(disturbed / "state", 0.004))  # noqa: B023
        build(env, seed, disturbed)
        report = env.submit(autostop=True, restarts=AT_ONCE).report
        assert report.state is Outcome.COMPLETED
        assert bool(backend.failed) <= report.restarts <= len(backend.failed)  # two may fail at a time
        assert report.is_accounted is True
        assert {one.name: one.earlier_in + one.records_in for one in report.operators} == taken
        assert written(disturbed) == wanted, f"seed {seed}, {backend.failed}: {report}"
        restarts += report.restarts
    assert restarts > 10


def numbered(count: int, record: int) -> tuple[int, list[int]]:
    return count + 1, [record, count]


def test_failures_and_kills_together_lose_nothing_either() -> None:
    def program(backend: Callable[[], Backend], folder: Path) -> Counter[str]:
        calls = 0

        def fails_sometimes(number: int) -> int:
            nonlocal calls
            calls += 1
            if calls in (4, 9):
                raise ValueError(number)
            return number

        env = LocalEnvironment("job", backend=backend, durable=Durable(folder / "state", interval_s=0.002))
        stream = env.from_source(Numbers(), name="numbers").map(fails_sometimes, name="fails")
        counted = stream.keyby(lambda number: number % 2, name="keys").stateful_map(numbered, 0, name="counted")
        counted.sink(JsonLinesFiles(folder / "out"), name="out")
        env.submit(autostop=True, restarts=AT_ONCE)
        return lines(folder)

    simulate(program, seeds=range(6), crashes=3)


class Model(BaseService):
    """Answers, but not each call; a list of its hooks and calls belongs to the test."""

    def __init__(self, seen: list[str], failing: set[int]) -> None:
        self.seen = seen
        self.failing = failing
        self.calls = 0

    def setup(self) -> None:
        self.seen.append("setup")

    def cleanup(self) -> None:
        self.seen.append("cleanup")

    def ask(self, number: int) -> int:
        self.calls += 1
        if self.calls in self.failing:
            raise ValueError(f"call {self.calls}")
        return number


def asking(
    folder: Path,
    failing: set[int],
    restarts: Restart | None = AT_ONCE,
    ask: Callable[[DataStream[int], Any], DataStream[int]] = lambda stream, model: stream.map(model.ask, name="ask"),
    backend: Callable[[], Backend] | None = None,
) -> tuple[JobReport, list[str], FunctionError | None]:
    seen: list[str] = []
    env = LocalEnvironment("job", backend=backend, durable=Durable(folder / "state", interval_s=0.01))
    model = env.register_service("model", Model, seen, failing)
    asked = ask(env.from_source(Numbers(), name="numbers"), model)
    asked.sink(JsonLinesFiles(folder / "out"), name="out")
    job = env.submit(restarts=restarts)
    try:
        return job.wait(), seen, None
    except FunctionError as error:
        return job.report, seen, error


def test_services_stay_up_and_the_report_says_how_often_and_why(tmp_path: Path, backend: Callable[[], Backend]) -> None:
    report, seen, error = asking(tmp_path, {3, 8}, backend=backend)
    assert error is None
    assert seen == ["setup", "cleanup"]
    assert (report.state, report.restarts) == (Outcome.COMPLETED, 2)
    assert [note.split(":")[0] for note in report.notes] == ["restart 1", "restart 2"]
    assert 'operator "ask" failed on record 3: ValueError: call 3' in report.notes[0]
    assert "call 8" in report.notes[1]
    assert report.errors == ()
    assert lines(tmp_path) == Counter(map(str, range(1, COUNT + 1)))
    assert type(report).from_dict(report.to_dict()).restarts == 2


def test_over_the_limit_the_job_fails_with_the_last_error(tmp_path: Path) -> None:
    report, seen, error = asking(tmp_path, set(range(2, 100)), Restart(2, backoff_s=(0.0, 0.0)))
    assert str(error).endswith("ValueError: call 4")
    assert (report.state, report.restarts) == (Outcome.FAILED, 2)
    assert seen == ["setup", "cleanup"]
    again, _, _ = asking(tmp_path, set())
    assert again.is_accounted is True
    assert lines(tmp_path) == Counter(map(str, range(1, COUNT + 1)))


def test_restarts_that_are_long_ago_do_not_count(tmp_path: Path) -> None:
    restart = Restart(1, restart_window_s=0.001, backoff_s=(0.02, 0.02))
    report, _, error = asking(tmp_path, {2, 4, 6, 8}, restart)
    assert error is None
    assert report.restarts == 4


def test_without_restarts_the_first_failure_fails_the_job(tmp_path: Path) -> None:
    report, _, error = asking(tmp_path, {2}, None)
    assert str(error).endswith("call 2")
    assert (report.state, report.restarts) == (Outcome.FAILED, 0)


def by_coroutine(stream: DataStream[int], model: Any) -> DataStream[int]:
    async def ask(number: int) -> int:
        answer: int = model.ask(number)
        return answer

    return stream.map_async(ask, concurrency=3, name="ask")


def by_batch(stream: DataStream[int], model: Any) -> DataStream[int]:
    return stream.map_batches(lambda numbers: [model.ask(number) for number in numbers], max_records=4, name="ask")


@pytest.mark.parametrize("ask", [by_coroutine, by_batch])
def test_operators_that_hold_records_start_again(
    tmp_path: Path, ask: Callable[[DataStream[int], Any], DataStream[int]], backend: Callable[[], Backend]
) -> None:
    report, _, error = asking(tmp_path, {3, 8}, ask=ask, backend=backend)
    assert error is None
    assert 1 <= report.restarts <= 2  # both calls may fail before the first failure has ended the others
    assert report.is_accounted is True
    assert lines(tmp_path) == Counter(map(str, range(1, COUNT + 1)))


class Unready(TransactionalSink[int]):
    """Cannot prepare its first checkpoint, nor be opened after that once."""

    trouble: list[str]
    rows: list[int]

    def open(self, part: str, checkpoint: int) -> None:
        if self.trouble == ["prepare"]:
            self.trouble.append("open")
            raise OSError("open")
        self.batch: list[int] = []

    def write(self, records: Sequence[int]) -> None:
        self.batch += records

    def prepare(self, number: int) -> object:
        if not self.trouble:
            self.trouble.append("prepare")
            raise OSError("prepare")
        token, self.batch = self.batch, []
        return token

    def commit(self, token: object) -> None:
        assert isinstance(token, list)
        self.rows.extend(row for row in token if row not in self.rows)  # it may be committed again


def test_a_sink_that_fails_between_records_starts_again(tmp_path: Path) -> None:
    class Sink(Unready):
        trouble: list[str] = []  # noqa: RUF012
        rows: list[int] = []  # noqa: RUF012

    env = LocalEnvironment("job", durable=Durable(tmp_path / "state", interval_s=0.001))
    env.from_source(Numbers(), name="numbers").sink(Sink(), name="out")
    report = env.submit(autostop=True, restarts=AT_ONCE).report
    assert report.restarts == 2
    assert "failed to prepare checkpoint 1: OSError: prepare" in report.notes[0]
    assert "failed to open: OSError: open" in report.notes[1]
    assert Sink.rows == [*range(1, COUNT + 1)]


class Commits(Unready):
    """Tells of each commit that has rows."""

    trouble: list[str] = ["none"]  # noqa: RUF012
    rows: list[int] = []  # noqa: RUF012

    def commit(self, token: object) -> None:
        super().commit(token)
        if self.rows:
            committed.set()


committed = threading.Event()


def test_calls_that_a_checkpoint_has_are_not_made_again(tmp_path: Path) -> None:
    class Waits(Numbers):
        """Goes on after the first numbers once a checkpoint has them."""

        def read(self, records_max: int) -> list[int] | None:
            return [] if self.at == 6 and not committed.is_set() else super().read(records_max)

    asked: list[int] = []

    def ask(number: int) -> int:
        asked.append(number)
        if asked == [1, 2, 3, 4, 5, 6, 7]:
            raise ValueError(number)
        return number

    committed.clear()
    Commits.rows.clear()
    env = LocalEnvironment("job", durable=Durable(tmp_path / "state", interval_s=0.01))
    env.from_source(Waits(), name="numbers").map(ask, name="ask").sink(Commits(), name="out")
    report = env.submit(autostop=True, restarts=AT_ONCE).report
    assert report.restarts == 1
    assert asked == [1, 2, 3, 4, 5, 6, 7, *range(7, COUNT + 1)]
    assert Commits.rows == [*range(1, COUNT + 1)]
    assert report.is_accounted is True


class Counted(MapFunction[int, list[int]]):
    """Has a state that is not in checkpoints, so that each task begins with a new one."""

    def __init__(self) -> None:
        self.count = 0

    def execute(self, data: int) -> list[int]:
        self.count += 1
        return [data, self.count]


def test_an_instance_of_yours_is_copied_for_each_start(tmp_path: Path) -> None:
    failed: list[int] = []

    def fail_once(pair: list[int]) -> list[int]:
        if pair[0] == 5 and not failed:
            failed.append(1)
            raise ValueError(pair)
        return pair

    env = LocalEnvironment("job", durable=Durable(tmp_path / "state", interval_s=100))
    stream = env.from_source(Numbers(), name="numbers").map(Counted(), name="counted").map(fail_once, name="once")
    stream.sink(JsonLinesFiles(tmp_path / "out"), name="out")
    env.submit(autostop=True, restarts=AT_ONCE)
    assert lines(tmp_path) == Counter(f"[{number}, {number}]" for number in range(1, COUNT + 1))


def test_a_stop_during_the_pause_ends_the_job_at_once(tmp_path: Path) -> None:
    env = LocalEnvironment("job", durable=Durable(tmp_path / "state"))
    env.from_source(Numbers(), name="numbers").map(lambda number: 1 / 0, name="fails").sink(print, name="out")
    job = env.submit(restarts=Restart(backoff_s=(600, 600)))
    while job.state is not JobState.RESTARTING or job.dispatcher.tasks:
        time.sleep(0.001)
    job.stop()
    assert job.report.state is Outcome.STOPPED
    assert 'restart 1: operator "fails" failed on record 1' in job.report.notes[0]
    assert job.report.is_accounted is True


def test_a_task_that_does_not_end_is_not_joined_by_a_second_one(tmp_path: Path) -> None:
    hangs, goes_on = threading.Event(), threading.Event()

    def hang(number: int) -> int:
        if number == 3:
            hangs.set()
            goes_on.wait()
        return number

    def fail(number: int) -> int:
        if hangs.wait() and number == 3:
            raise ValueError(number)
        return number

    env = LocalEnvironment("job", durable=Durable(tmp_path / "state"), drain_timeout_s=0.05)
    source = env.from_source(Numbers(), name="numbers")
    source.map(hang, name="hangs").sink(print, name="one")
    source.map(fail, name="fails").sink(print, name="other")
    job = env.submit(restarts=AT_ONCE)
    try:
        with pytest.raises(JobErrorGroup, match='FAILED and DIRTY: operator "fails" failed on record 3'):
            job.wait()
    finally:
        goes_on.set()
    assert job.report.state is Outcome.FAILED
    assert {type(error).__name__ for error in job.report.errors} == {"FunctionError", "CleanupTimeoutError"}


class Answering(BaseService):
    """Gets sick after the first answer, and comes back slowly."""

    built = 0
    is_sick = threading.Event()

    def __init__(self, goes_on: threading.Event) -> None:
        self.goes_on = goes_on

    def setup(self) -> None:
        Answering.built += 1
        assert self.built == 1 or self.goes_on.wait(30)

    def health(self) -> bool:
        return self.built > 1 or not self.is_sick.is_set()

    def ask(self, number: int) -> int:
        return number


def test_a_call_that_waits_for_its_service_does_not_fail_the_job(tmp_path: Path) -> None:
    Answering.built = 0
    Answering.is_sick.clear()
    waits, may_start = threading.Event(), threading.Event()
    failed: list[int] = []

    def ask(number: int) -> int:
        if number == 2 and not failed:
            Answering.is_sick.set()
            while job.dispatcher.services["model"] != "starting":
                time.sleep(0.001)
            waits.set()
        answer: int = model.ask(number)
        return answer

    def fail(number: int) -> int:
        if number == 2 and not failed:
            assert waits.wait(30)
            failed.append(number)
            raise ValueError(number)
        return number

    env = LocalEnvironment("job", durable=Durable(tmp_path / "state"), drain_timeout_s=0.2)
    options = ServiceOptions(restart="on_failure", health_interval_s=0.01, backoff_s=(0.01, 0.01))
    model = env.register_service("model", Answering, may_start, options=options)
    source = env.from_source(Numbers(), name="numbers")
    source.map(ask, name="ask").sink(JsonLinesFiles(tmp_path / "out"), name="out")
    source.map(fail, name="fails").sink(print, name="other")
    job = env.submit(restarts=AT_ONCE)
    while job.state is not JobState.RESTARTING or "fails -> other" in job.dispatcher.tasks:
        time.sleep(0.001)
    threading.Timer(0.5, may_start.set).start()  # more than the time that a task has to end
    report = job.wait()
    assert (report.state, report.restarts) == (Outcome.COMPLETED, 1)
    assert lines(tmp_path) == Counter(map(str, range(1, COUNT + 1)))


class Checked(BaseService):
    """Has a health check that takes until the tasks have started again, and a call that hangs once."""

    is_checked = threading.Event()
    hangs = threading.Event()
    has_restarted = threading.Event()

    async def health(self) -> bool:
        self.is_checked.set()
        while not self.has_restarted.is_set():
            await asyncio.sleep(0.001)
        return True

    async def ask(self, number: int) -> int:
        if number == 2 and not self.hangs.is_set():
            self.hangs.set()
            await asyncio.sleep(1_000)
        return number


@pytest.mark.parametrize("call_timeout_s", [None, 2_000.0])
def test_calls_of_tasks_are_cancelled_and_hooks_of_services_are_not(
    tmp_path: Path, call_timeout_s: float | None
) -> None:
    for event in (Checked.is_checked, Checked.hangs, Checked.has_restarted):
        event.clear()
    failed: list[int] = []

    def fail_once(number: int) -> int:
        if number == 2:
            if not failed:
                assert Checked.is_checked.wait(30)
                assert Checked.hangs.wait(30)
                failed.append(number)
                raise ValueError(number)
            Checked.has_restarted.set()
        return number

    env = LocalEnvironment("job", durable=Durable(tmp_path / "state"))
    options = ServiceOptions(health_interval_s=0.01, call_timeout_s=call_timeout_s)
    model: Any = env.register_service("model", Checked, options=options)
    source = env.from_source(Numbers(), name="numbers")
    source.map(lambda number: model.ask(number), name="ask").sink(JsonLinesFiles(tmp_path / "out"), name="out")
    source.map(fail_once, name="fails").sink(print, name="other")
    report = env.submit(autostop=True, restarts=AT_ONCE).report
    assert (report.state, report.restarts) == (Outcome.COMPLETED, 1)
    assert lines(tmp_path) == Counter(map(str, range(1, COUNT + 1)))


class Large:
    """Stands for what a task needs memory for."""


class Keeps(MapFunction[int, int]):
    """Has something large, and fails 5 times."""

    alive: weakref.WeakSet[Large]
    counts: list[int]

    def open(self) -> None:
        large = self.large = Large()
        self.alive.add(large)

    def execute(self, data: int) -> int:
        self.counts.append(len(self.alive))
        if len(self.counts) <= 5:
            raise ValueError(data)
        return data


def test_the_tasks_before_a_restart_are_let_go(tmp_path: Path) -> None:
    Keeps.alive, Keeps.counts = weakref.WeakSet(), []
    env = LocalEnvironment("job", durable=Durable(tmp_path / "state"))
    source = env.from_source(Numbers(), name="numbers")
    source.map(lambda number: gc.collect() and number, name="collects").map(Keeps, name="keeps").sink(print, name="out")
    restart = Restart(1, restart_window_s=1e-9, backoff_s=(0.0, 0.0))
    assert env.submit(autostop=True, restarts=restart).report.restarts == 5
    assert set(Keeps.counts) == {1}


def numbers() -> Iterator[int]:
    yield 1


def test_it_is_refused_where_it_cannot_work(tmp_path: Path) -> None:
    env = LocalEnvironment("job")
    env.from_batch([1]).sink(print)
    with pytest.raises(GraphError, match='environment "job" is not durable, and restarts is Restart') as refused:
        env.submit(restarts=AT_ONCE)
    assert refused.value.__notes__ == ['Tasks start again from a checkpoint: LocalEnvironment(..., durable="state").']
    with pytest.raises(GraphError, match="submit: restarts is 3"):
        env.submit(restarts=3)  # type: ignore[arg-type]
    with pytest.raises(GraphError, match="restarts is Retry"):
        env.submit(restarts=Retry())  # type: ignore[arg-type]
    env = LocalEnvironment("job", durable=tmp_path / "state")
    env.from_batch(numbers(), name="numbers").sink(print)
    with pytest.raises(GraphError, match='source "numbers" is an iterator, which cannot be read again') as refused:
        env.submit(restarts=AT_ONCE)
    assert refused.value.__notes__ == ["Give the function that makes it, or leave restarts= out."]


@pytest.mark.parametrize(
    ("settings", "text"),
    [
        ({"restarts_max": 0}, "Restart: restarts_max is 0"),
        ({"restart_window_s": 0}, "Restart: restart_window_s is 0"),
        ({"backoff_s": 1}, "Restart: backoff_s is 1"),
    ],
)
def test_settings_that_cannot_work_are_refused(settings: Any, text: str) -> None:
    with pytest.raises(GraphError, match=text):
        Restart(**settings)
