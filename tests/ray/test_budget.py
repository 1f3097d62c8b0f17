"""Budgets of jobs on a cluster: the master counts for all processes, and ends the job as on one machine."""

from __future__ import annotations

import asyncio
import logging
import os
import re
import signal
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import pytest
from support.ray_jobs import Ticks, master_pid, wait_until

import sage
from sage import BaseService, Cleanliness, JobError, Outcome, RemoteEnvironment, Retry, ServiceOptions
from sage._processes import process

if TYPE_CHECKING:
    from support.ray_nodes import GivenCluster

    from sage import JobReport

pytestmark = [pytest.mark.ray, pytest.mark.usefixtures("no_actor_is_left")]

CALLERS = 2
PROGRAM = """
import sys
from sage import RemoteEnvironment
class Model:
    def ask(self, prompt):
        return prompt
env = RemoteEnvironment("limited", address=sys.argv[1])
model = env.register_service("llm", Model)
env.limit(calls={"llm": 3})
env.from_batch(range(10)).map(model.ask).print()
env.run()
"""


class Model(BaseService):
    """Uses two tokens for each prompt and one for each answer."""

    def ask(self, prompt: int) -> int:
        self.ctx.used(prompt_tokens=2, completion_tokens=1)
        return prompt + 1


class AwaitedModel(BaseService):
    async def ask(self, prompt: int) -> int:
        await asyncio.sleep(0.01)
        self.ctx.used(prompt_tokens=2, completion_tokens=1)
        return prompt + 1


class MortalModel(Model):
    """Its process dies once, as soon as its file can be made."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def ask(self, prompt: int) -> int:
        if prompt == 9 and not self._path.exists():
            self._path.touch()
            os.kill(os.getpid(), signal.SIGKILL)
        return super().ask(prompt)


def is_clean_stop(report: JobReport, why: str) -> bool:
    return (report.state, report.cleanliness, report.why) == (Outcome.STOPPED, Cleanliness.CLEAN, why)


@pytest.mark.parametrize("host", ["process", "inline"])
def test_calls_of_all_processes_are_counted_together(
    ray_address: str, host: Literal["process", "inline"], caplog: pytest.LogCaptureFixture
) -> None:
    env = RemoteEnvironment("asked", address=ray_address)
    env.limit(calls={"llm": 30})
    model = env.register_service("llm", Model, options=ServiceOptions(host=host))
    answers: list[int] = []
    letters: list[int] = []
    dead = env.dead_letters()
    policy = Retry(attempts_max=5, backoff_s=(0.001, 0.001), then=dead)
    asked = env.from_batch(range(100)).map(model.ask, parallelism=CALLERS, on_error=policy, name="ask")
    asked.sink(answers.append)
    dead.sink(lambda letter: letters.append(letter.value), at="driver")
    with caplog.at_level(logging.WARNING, "sage.job"):
        report = env.run()
    assert len(set(answers)) == 30
    assert is_clean_stop(report, 'budget: calls of "llm", 30 of 30')
    assert (letters, report.errors, report.operator("ask").failed) == ([], (), 0)
    assert (report.service("llm").calls, report.service("llm").errors) == (30, 0)
    assert report.undelivered > 0
    told = {id(record): record.getMessage() for record in caplog.records}
    (warning,) = told.values()
    assert re.fullmatch(r'80% of the budget is used: calls of "llm", 2[45] of 30', warning)


def test_a_job_that_needs_all_its_calls_completes(ray_address: str) -> None:
    env = RemoteEnvironment("enough", address=ray_address)
    env.limit(calls={"llm": 100}, tokens=301, cost=(1, 2, 3), wall_s=1000, failures=0.5)
    model = env.register_service("llm", Model)
    answers: list[int] = []
    env.from_batch(range(100)).map(model.ask, parallelism=CALLERS).sink(answers.append)
    assert env.run().state is Outcome.COMPLETED
    assert sorted(answers) == list(range(1, 101))


@pytest.mark.parametrize("limits", [{"tokens": 29}, {"cost": (1_000_000, 2_000_000, 40)}])
def test_only_calls_that_run_go_beyond_tokens_and_cost(ray_address: str, limits: dict[str, Any]) -> None:
    env = RemoteEnvironment("tokens", address=ray_address)
    env.limit(**limits)
    model = env.register_service("llm", Model, options=ServiceOptions(concurrency=CALLERS))
    answers: list[int] = []
    env.from_batch(range(100)).map(model.ask, parallelism=CALLERS).sink(answers.append)
    report = env.run()
    assert 10 <= len(answers) <= 10 + CALLERS - 1
    assert report.service("llm").calls == len(answers)
    (name,) = limits
    assert report.why.startswith(f"budget: {name}, ")
    assert is_clean_stop(report, report.why)


def test_calls_that_are_awaited_are_counted_too(ray_address: str) -> None:
    env = RemoteEnvironment("awaited", address=ray_address)
    env.limit(tokens=30, calls={"llm": 1000})
    model = env.register_service("llm", AwaitedModel, options=ServiceOptions(concurrency=4))
    answers: list[int] = []
    env.from_batch(range(100)).map_async(model.ask, concurrency=8).sink(answers.append)
    report = env.run()
    assert 10 <= len(answers) <= 10 + 4 - 1
    assert report.service("llm").calls == len(answers)
    assert is_clean_stop(report, "budget: tokens, 30 of 30")


def test_the_count_outlives_the_process_of_a_service(ray_address: str, tmp_path: Path) -> None:
    env = RemoteEnvironment("mortal", address=ray_address)
    env.limit(calls={"llm": 30})
    asked = ServiceOptions(restart="on_failure", backoff_s=(0.05, 0.1))
    model = env.register_service("llm", MortalModel, tmp_path / "died", options=asked)
    answers: list[int] = []
    env.from_batch(range(100)).map(model.ask, on_error=Retry(attempts_max=2)).sink(answers.append)
    report = env.run()
    assert report.service("llm").restarts == 1
    assert answers == list(range(1, 30))  # the call that was lost with the process counts
    assert report.why == 'budget: calls of "llm", 30 of 30'
    assert report.state is Outcome.STOPPED


@pytest.mark.parametrize("wall_s", [4, 0.01])
def test_the_time_of_a_job_is_limited_with_its_start(ray_address: str, wall_s: float) -> None:
    env = RemoteEnvironment("slow", address=ray_address)
    env.limit(wall_s=wall_s)
    arrived: list[int] = []
    env.from_source(Ticks).sink(arrived.append)
    report = env.run()
    assert arrived == list(range(len(arrived)))
    assert is_clean_stop(report, f"budget: wall_s, {wall_s} of {wall_s}")


def test_the_share_of_failures_is_limited(ray_address: str) -> None:
    env = RemoteEnvironment("failing", address=ray_address)
    env.limit(failures=0.05)

    def fragile(number: int) -> int:
        if number % 10 == 9:
            raise ValueError("fragile")
        return number

    stream = env.from_source(Ticks).map(fragile, on_error="skip", name="fragile", parallelism=CALLERS)
    stream.sink(abs)
    report = env.run()
    assert report.state is Outcome.STOPPED
    assert report.why.startswith('budget: failures of "fragile", 0.')
    assert report.operator("fragile").failed >= 5


def test_a_job_whose_master_is_lost_has_failed_and_asks_no_more(ray_address: str) -> None:
    """The count goes with the master, and so do the tasks that call."""
    env = RemoteEnvironment("lost", address=ray_address)
    env.limit(calls={"llm": 1_000_000})
    model = env.register_service("llm", Model)
    answers: list[int] = []
    env.from_source(Ticks).map(model.ask).sink(answers.append)
    job = env.submit()
    wait_until(lambda: bool(answers))
    pid = master_pid()
    os.kill(pid, signal.SIGKILL)
    with pytest.raises(JobError, match='the master of job "lost" was lost'):
        job.wait()
    wait_until(lambda: process(pid) is None)
    assert job.report.state is Outcome.FAILED


def test_sage_run_exits_with_3(ray_address: str, given: GivenCluster, tmp_path: Path) -> None:
    program = tmp_path / "program.py"
    program.write_text(PROGRAM)
    environment = {**os.environ, **given.variables, "PYTHONPATH": str(Path(sage.__file__).parents[1])}
    words = [sys.executable, "-m", "sage", "run", str(program), ray_address]
    ran = subprocess.run(words, env=environment, capture_output=True, text=True, cwd=tmp_path, check=False, timeout=120)
    assert (ran.returncode, ran.stdout) == (3, "0\n1\n2\n"), ran.stderr
    assert 'job "limited": STOPPED and CLEAN after ' in ran.stderr
    assert '(budget: calls of "llm", 3 of 3)' in ran.stderr
