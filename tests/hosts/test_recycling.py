"""Recycling: a new process is ready before the old one ends, no call waits, and none is lost or made twice."""

from __future__ import annotations

import gc
import os
import time
from collections import Counter
from typing import TYPE_CHECKING, Any

import pytest
from support.recording_services import Notes

from sage import BaseService, Cleanliness, GraphError, LocalEnvironment, Outcome, ServiceOptions
from sage._processes import resident_bytes
from sage.testing import assert_clean

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from sage import JobReport

SOON_S = 40.0
"""How long a test makes calls at most until something has happened that takes a moment."""


@pytest.fixture(autouse=True)
def nothing_left() -> Iterator[None]:
    with assert_clean(within_s=5.0, ignore=["temporary *", "shared memory *"]):
        yield
        gc.collect()


class Leaking(BaseService):
    """Keeps some bytes of each call, and notes hooks and calls; the builds of the numbers in `fails` raise."""

    def __init__(self, notes: Notes, leak_bytes: int = 0, fails: tuple[int, ...] = ()) -> None:
        self.notes, self.leak_bytes = notes, leak_bytes
        self.kept: list[bytes] = []
        self.instance = f"{self.name} {self.ctx.incarnation}"
        self.notes.append(f"build {self.instance}")
        if sum(line.startswith("build") for line in notes.lines()) in fails:
            raise OSError("no memory")

    def process(self, data: object) -> int:
        self.kept.append(b"x" * self.leak_bytes)
        self.notes.append(f"call {data}")
        return os.getpid()

    def start(self) -> None:
        self.notes.append(f"start {self.instance}")

    def stop(self) -> None:
        self.notes.append(f"stop {self.instance}")

    def cleanup(self) -> None:
        self.notes.append(f"cleanup {self.instance}")


def options(**others: Any) -> ServiceOptions:
    return ServiceOptions(host="process", **others)


def run(env: LocalEnvironment) -> JobReport:
    job = env.submit(autostop=True)
    assert job.report is not None
    return job.report


def until(ask: Callable[[int], int], is_over: Callable[[list[int]], bool]) -> list[int]:
    """Call again and again until the answers are those that are waited for."""
    answers: list[int] = []
    due = time.monotonic() + SOON_S
    while not is_over(answers):
        assert time.monotonic() < due
        answers.append(ask(len(answers)))
    return answers


def in_job(notes: Notes, is_over: Callable[[list[int]], bool], given: ServiceOptions, **more: Any) -> JobReport:
    """Run a job that calls the service until `is_over`, and check that each call was made once."""
    env = LocalEnvironment("recycling")
    llm = env.register_service("llm", Leaking, notes, options=given, **more)
    counts: list[int] = []
    env.from_batch([1]).map(lambda _: len(until(llm.process, is_over))).sink(counts.append)
    report = run(env)
    assert Counter(line for line in notes if line.startswith("call")) == {f"call {n}": 1 for n in range(counts[0])}
    assert report.service("llm").calls == counts[0]
    return report


def has_changed(answers: list[int]) -> bool:
    return answers[-1:] != answers[:1] and len(set(answers)) > 2


def test_calls_go_on_while_processes_change_and_each_is_made_once(tmp_path: Path) -> None:
    """Callers on several threads; every process that was built is stopped and cleaned once."""
    notes = Notes(tmp_path / "notes")
    env = LocalEnvironment("many calls")
    llm = env.register_service("llm", Leaking, notes, options=options(replicas=2, recycle_calls=40))
    seen: list[tuple[int, int]] = []

    def ask(number: int) -> tuple[int, int]:
        # The last record waits until enough processes have had their turn.
        if number == 399:
            until(lambda more: int(llm.process(f"more {more}")), lambda _: notes.lines().count("stop llm[1] 1") == 1)
        return number, llm.process(number)

    env.from_batch(range(400)).map(ask, parallelism=4).sink(seen.append)
    report = run(env)
    assert (report.state, report.cleanliness, report.errors) == (Outcome.COMPLETED, Cleanliness.CLEAN, ())
    assert sorted(number for number, _ in seen) == list(range(400))
    lines = Counter(notes.lines())
    assert all(lines[f"call {number}"] == 1 for number in range(400))
    instances = [line.removeprefix("build ") for line in lines if line.startswith("build")]
    assert len(instances) >= 3
    assert [lines[f"cleanup {instance}"] for instance in instances] == [1] * len(instances)
    llm_report = report.service("llm")
    assert (llm_report.recycled > 0, llm_report.errors) == (True, 0)
    assert f'service "llm": {llm_report.recycled} process' in str(report)


def test_the_successor_is_ready_before_the_old_one_ends(tmp_path: Path) -> None:
    notes = Notes(tmp_path / "notes")
    report = in_job(notes, has_changed, options(recycle_calls=5))
    lines = [line for line in notes if not line.startswith("call")]
    assert lines.index("start llm[2] 1") < lines.index("stop llm[1] 1") < lines.index("cleanup llm[1] 1")
    assert lines.index("cleanup llm[1] 1") < lines.index("build llm[1] 2")
    assert (report.cleanliness, [service.name for service in report.services]) == ("clean", ["llm[1]", "llm[2]", "llm"])


def test_a_process_that_uses_much_memory_is_recycled(tmp_path: Path) -> None:
    peaks: list[int] = []

    def is_over(answers: list[int]) -> bool:
        peaks.extend(resident_bytes(pid) for pid in answers[-1:])
        return has_changed(answers)

    limit_mb = 100
    report = in_job(Notes(tmp_path / "notes"), is_over, options(recycle_rss_mb=limit_mb), leak_bytes=500_000)
    assert report.service("llm").recycled >= 2
    assert max(peaks) > limit_mb * 1_000_000


def test_an_old_process_is_recycled(tmp_path: Path) -> None:
    report = in_job(Notes(tmp_path / "notes"), has_changed, options(recycle_age_s=0.2))
    assert report.service("llm").recycled >= 2


def test_a_successor_that_does_not_start_is_tried_again_and_the_old_one_goes_on(tmp_path: Path) -> None:
    notes = Notes(tmp_path / "notes")
    given = options(recycle_calls=5, backoff_s=(0.01, 0.01))
    report = in_job(notes, lambda answers: len(set(answers)) > 1, given, fails=(2,))
    assert report.state is Outcome.COMPLETED
    assert "no memory" in str(report)
    assert [line for line in notes if line.startswith("build")][:3] == [
        "build llm[1] 1",
        "build llm[2] 1",
        "build llm[2] 2",
    ]


def test_keys_keep_together_when_their_process_is_recycled(tmp_path: Path) -> None:
    env = LocalEnvironment("keys")
    given = options(replicas=2, recycle_calls=100, affinity=lambda key: key)
    llm = env.register_service("llm", Leaking, Notes(tmp_path / "notes"), options=given)
    keys = range(20)

    def ask(_: object) -> list[dict[int, int]]:
        rounds: list[dict[int, int]] = []
        due = time.monotonic() + SOON_S
        while len({pid for one in rounds for pid in one.values()}) < 4:
            assert time.monotonic() < due
            rounds.append({key: llm.process(key) for key in keys})
        return rounds

    rounds: list[dict[int, int]] = []
    env.from_batch([1]).flatmap(ask).sink(rounds.append)
    run(env)
    places = rounds[0]
    assert len(set(places.values())) == 2
    for pid in {pid for one in rounds for pid in one.values()}:
        assert len({places[key] for one in rounds for key in keys if one[key] == pid}) == 1


@pytest.mark.parametrize(
    ("given", "text"),
    [
        ({"recycle_calls": 0, "host": "process"}, "recycle_calls is 0, which is not a positive number"),
        ({"recycle_rss_mb": 0, "host": "process"}, "recycle_rss_mb is 0"),
        ({"recycle_age_s": -1, "host": "process"}, "recycle_age_s is -1"),
        ({"recycle_age_s": 1}, "host is None, but only a process of its own can be recycled"),
        ({"recycle_calls": 1, "host": "inline"}, "host is 'inline', but only a process of its own can be recycled"),
    ],
)
def test_options_that_cannot_work_are_refused_with_a_hint(given: dict[str, Any], text: str) -> None:
    with pytest.raises(GraphError) as caught:
        ServiceOptions(**given)
    assert text in str(caught.value)
    assert caught.value.__notes__
