"""A job that was stopped asks for nothing twice: the records that waited for a call are kept for the next run."""

from __future__ import annotations

import json
import threading
import time
from collections import Counter
from typing import TYPE_CHECKING, Any

import pytest

from sage import LocalEnvironment
from sage.connectors import JsonLinesFiles
from sage.testing import StepBackend

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from sage import DataStream, JobReport
    from sage._runtime.backend import Backend
    from sage._runtime.job import Job

COUNT = 50
LIMIT = 20

CALL_S = 0.02
"""How long a call takes that a stop holds back."""


class Model:
    def __init__(self, asked: list[int]) -> None:
        self.asked = asked

    def ask(self, number: int) -> int:
        self.asked.append(number)
        return number * 2

    async def ask_soon(self, number: int) -> int:
        return self.ask(number)

    def ask_many(self, numbers: list[int]) -> list[int]:
        return [self.ask(number) for number in numbers]


def test_records_in_a_loop_wait_for_the_next_run(tmp_path: Path) -> None:
    arrived = threading.Semaphore(0)

    def build() -> LocalEnvironment:
        env = LocalEnvironment("job", durable=tmp_path / "state")
        loop = env.from_future("loop")
        pairs = env.from_batch([[1_000, key] for key in range(3)], name="pairs").union(loop)
        less = pairs.map(lambda pair: [pair[0] - 1, pair[1]]).tap(lambda _: arrived.release())
        less.filter(lambda pair: pair[0] > 0).fill_future(loop)
        less.sink(JsonLinesFiles(tmp_path / "out"), name="out")
        return env

    job = build().submit()
    for _ in range(10):
        assert arrived.acquire(timeout=30)
    job.stop()
    assert (job.report.state, job.report.waiting, job.report.undelivered) == ("stopped", 3, 0)
    report = build().submit(autostop=True).report
    assert (report.state, report.is_accounted) == ("completed", True)
    rows = [json.loads(line) for path in (tmp_path / "out").glob("*.jsonl") for line in path.read_text().splitlines()]
    assert sorted(rows) == [[left, key] for left in range(1_000) for key in range(3)]


def by_map(stream: DataStream[int], model: Any) -> DataStream[int]:
    return stream.map(lambda number: number + 0).map(model.ask)


def by_coroutine(stream: DataStream[int], model: Any) -> DataStream[int]:
    return stream.map_async(model.ask_soon, concurrency=4)


def by_unordered_coroutine(stream: DataStream[int], model: Any) -> DataStream[int]:
    return stream.map_async(model.ask_soon, concurrency=4, ordered=False)


def by_batch(stream: DataStream[int], model: Any) -> DataStream[int]:
    return stream.map_batches(model.ask_many, max_records=1)


def by_comap(stream: DataStream[int], model: Any) -> DataStream[int]:
    """Records that wait must come back by the input that they came from."""

    def ask_of(rest: int) -> Callable[[int], int]:
        def ask(number: int) -> int:
            assert number % 2 == rest
            answer: int = model.ask(number)
            return answer

        return ask

    even, odd = stream.filter(lambda number: number % 2 == 0), stream.filter(lambda number: number % 2 == 1)
    return even.connect(odd).comap(ask_of(0), ask_of(1))


@pytest.mark.parametrize("ask", [by_map, by_coroutine, by_unordered_coroutine, by_batch, by_comap])
def test_after_a_budget_the_next_run_asks_for_the_rest(
    ask: Callable[[DataStream[int], Any], DataStream[int]], tmp_path: Path, backend: Callable[[], Backend]
) -> None:
    asked: list[int] = []

    def run(**limits: Any) -> JobReport:
        env = LocalEnvironment("job", backend=backend, durable=tmp_path / "state")
        model = env.register_service("model", Model, asked)
        ask(env.from_batch(range(COUNT), name="numbers"), model).sink(JsonLinesFiles(tmp_path / "out"))
        env.limit(**limits)
        return env.submit(autostop=True).report

    def results() -> Counter[int]:
        paths = (tmp_path / "out").glob("*.jsonl")
        return Counter(json.loads(line) for path in paths for line in path.read_text("utf-8").splitlines())

    stopped = run(calls={"model": LIMIT})
    assert stopped.state == "stopped"
    assert stopped.undelivered == 0
    assert results() == Counter(number * 2 for number in asked)
    assert len(asked) == LIMIT
    assert stopped.waiting > 0
    assert f"{stopped.waiting} records wait for the next run: {stopped.waiting} before " in str(stopped)
    done = f"resumed from checkpoint 1 ({LIMIT} records done)"
    last = run()
    assert last.notes == ((done,) if stopped.operator("numbers").records_in < COUNT else (done, NOTHING_NEW))
    assert (stopped.is_accounted, last.is_accounted, last.waiting) == (True, True, 0)
    assert [one.earlier_in for one in last.operators] == [one.records_in for one in stopped.operators]
    assert last.operators[-1].earlier_in + last.operators[-1].records_in == COUNT
    assert Counter(asked) == Counter(range(COUNT))
    assert results() == Counter(range(0, 2 * COUNT, 2))


@pytest.mark.parametrize("way", ["map", "batches"])
def test_after_a_stop_the_next_run_makes_the_calls_that_were_held_back(way: str, tmp_path: Path) -> None:
    asked: list[int] = []
    has_begun = threading.Event()

    def ask(number: int) -> int:
        asked.append(number)
        time.sleep(CALL_S)
        if len(asked) == LIMIT:
            has_begun.set()
        return number * 2

    def run() -> Job:
        env = LocalEnvironment("job", durable=tmp_path / "state")
        numbers = env.from_batch(range(COUNT), name="numbers").map(lambda number: number, parallelism=2)
        results = (
            numbers.map(ask, name="ask")
            if way == "map"
            else numbers.map_batches(lambda many: [ask(number) for number in many], max_records=2, name="ask")
        )
        results.sink(JsonLinesFiles(tmp_path / "out"))
        return env.submit()

    job = run()
    assert has_begun.wait(30)
    job.stop()
    report = job.report
    assert (report.state, report.undelivered) == ("stopped", 0)
    assert len(asked) < COUNT
    run().wait()
    assert Counter(asked) == Counter(range(COUNT))
    lines = [line for path in (tmp_path / "out").glob("*.jsonl") for line in path.read_text("utf-8").splitlines()]
    assert Counter(map(json.loads, lines)) == Counter(range(0, 2 * COUNT, 2))


@pytest.mark.parametrize("seed", range(20, 40))
def test_records_that_are_given_back_make_room_for_the_end_of_the_stream(seed: int) -> None:
    """In any job: nothing else woke the task, so it waited until the time to drain was over."""
    asked: list[int] = []
    env = LocalEnvironment("job", backend=lambda: StepBackend(seed))
    model: Any = env.register_service("model", Model, asked)
    env.from_batch(range(COUNT)).map_async(model.ask_soon, concurrency=4).sink(lambda _: None)
    env.limit(calls={"model": LIMIT})
    report = env.run()
    assert report.state == "stopped"
    assert report.running_s < 5.0


NOTHING_NEW = "nothing new: the sources have no further records"
