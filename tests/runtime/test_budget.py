"""Budgets: a job ends when it has used up a limit, with everything that was done before, and nothing begun after."""

from __future__ import annotations

import asyncio
import logging
import subprocess
import sys
import threading
import urllib.request
from contextlib import suppress
from typing import TYPE_CHECKING, Any, Literal

import pytest

from sage import (
    BaseService,
    Cleanliness,
    GraphError,
    HeldBackError,
    Http,
    LocalEnvironment,
    Outcome,
    ProcessFunction,
    Retry,
    ServiceOptions,
    SourceFunction,
    UnknownServiceError,
    UnsupportedPlanError,
)
from sage.testing import StepBackend

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from sage._runtime.backend import Backend
    from sage.report import JobReport

Host = Literal["inline", "process"]


class Model(BaseService):
    """Uses two tokens for each prompt and one for each answer."""

    def ask(self, prompt: int) -> int:
        self.ctx.used(prompt_tokens=2, completion_tokens=1)
        return prompt + 1


class AwaitedModel(BaseService):
    async def ask(self, prompt: int) -> int:
        await asyncio.sleep(1)
        self.ctx.used(prompt_tokens=2, completion_tokens=1)
        return prompt + 1


def asked(
    backend: Callable[[], Backend], host: Host, records: int = 100, **limits: Any
) -> tuple[list[int], JobReport, list[int]]:
    """Return the answers to so many prompts under limits, with the report, and the dead letters."""
    env = LocalEnvironment("asked", backend=backend)
    env.limit(**limits)
    model = env.register_service("llm", Model, options=ServiceOptions(host=host))
    answers: list[int] = []
    letters: list[int] = []
    dead = env.dead_letters()
    policy = Retry(attempts_max=5, backoff_s=(0.001, 0.001), then=dead)
    env.from_batch(range(records)).map(model.ask, on_error=policy, name="ask").sink(answers.append)
    dead.sink(lambda letter: letters.append(letter.value))
    return answers, env.run(), letters


def is_clean_stop(report: JobReport, why: str) -> bool:
    return (report.state, report.cleanliness, report.why) == (Outcome.STOPPED, Cleanliness.CLEAN, why)


def test_calls_beyond_the_limit_are_not_begun(backend: Callable[[], Backend], host: Host) -> None:
    answers, report, letters = asked(backend, host, calls={"llm": 30})
    assert answers == list(range(1, 31))
    assert is_clean_stop(report, 'budget: calls of "llm", 30 of 30')
    assert (letters, report.errors, report.operator("ask").failed) == ([], (), 0)
    assert (report.service("llm").calls, report.service("llm").errors) == (30, 0)
    assert report.undelivered > 0


def test_a_job_that_needs_all_its_calls_completes(backend: Callable[[], Backend], host: Host) -> None:
    answers, report, _ = asked(backend, host, calls={"llm": 100}, tokens=301, wall_s=1000, failures=0.5)
    assert answers == list(range(1, 101))
    assert report.state is Outcome.COMPLETED


def test_tokens_are_counted_before_the_next_call(backend: Callable[[], Backend], host: Host) -> None:
    answers, report, _ = asked(backend, host, tokens=29)
    assert answers == list(range(1, 11))
    assert is_clean_stop(report, "budget: tokens, 30 of 29")


def test_the_cost_is_that_of_prompts_and_answers(backend: Callable[[], Backend], host: Host) -> None:
    answers, report, _ = asked(backend, host, cost=(1_000_000, 2_000_000, 20))
    assert answers == [1, 2, 3, 4, 5]
    assert is_clean_stop(report, "budget: cost, 20 of 20")


def test_calls_that_run_end_and_no_other_begins() -> None:
    env = LocalEnvironment("awaited", backend=lambda: StepBackend(1))
    env.limit(tokens=9)
    model = env.register_service("llm", AwaitedModel, options=ServiceOptions(concurrency=4))
    answers: list[int] = []
    env.from_batch(range(100)).map_async(model.ask, concurrency=8).sink(answers.append)
    report = env.run()
    assert 3 <= len(answers) <= 3 + 8
    assert report.service("llm").calls == len(answers)
    assert is_clean_stop(report, "budget: tokens, 9 of 9")


SERVER = """
import sys
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
class Answer(BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200)
        self.end_headers()
    def log_message(self, *_): pass
ThreadingHTTPServer(("127.0.0.1", int(sys.argv[1])), Answer).serve_forever()
"""


class Meeting(BaseService):
    """Ends a call only when as many run as may, so that so many are in flight when the limit is reached."""

    def __init__(self, calls: int, url: Any = None) -> None:
        self.calls, self.url = threading.Barrier(calls), url

    def ask(self, prompt: int) -> int:
        if self.url is not None:
            with urllib.request.urlopen(str(self.url.resolve())) as answer:
                answer.read()
        with suppress(threading.BrokenBarrierError):
            self.calls.wait(0.2)
        self.ctx.used(prompt_tokens=2, completion_tokens=1)
        return prompt + 1


@pytest.mark.parametrize("way", ["inline", "process", "command", "replicas"])
def test_a_token_budget_is_overshot_by_the_calls_in_flight_at_most(way: str) -> None:
    """The limit is reached by the first answer of a round of calls; on Ray, tests/ray/test_budget.py has this."""
    env = LocalEnvironment("overshot")
    env.limit(tokens=10)
    url = None
    if way == "command":
        words = [sys.executable, "-c", SERVER, "{port}"]
        url = env.register_command("server", words, ready=Http("/")).url
    in_flight = 4
    host: Host = "process" if way in ("process", "replicas") else "inline"
    replicas = 2 if way == "replicas" else 1
    options = ServiceOptions(host=host, concurrency=in_flight // replicas, replicas=replicas)
    model = env.register_service("llm", Meeting, in_flight // replicas, url, options=options)
    answers: list[int] = []
    env.from_batch(range(100)).map(model.ask, parallelism=2 * in_flight).sink(answers.append)
    report = env.run()
    used = 3 * len(answers)
    assert report.service("llm").calls == len(answers)
    assert 10 <= used <= 10 + 3 * in_flight
    assert report.why.startswith("budget: tokens, 1")
    assert (report.state, report.cleanliness) == (Outcome.STOPPED, Cleanliness.CLEAN)


def test_the_time_of_a_job_is_limited(caplog: pytest.LogCaptureFixture) -> None:
    env = LocalEnvironment("slow", backend=lambda: StepBackend(2))
    env.limit(wall_s=10)
    answers: list[int] = []

    async def slow(number: int) -> int:
        await asyncio.sleep(3)
        return number

    env.from_batch(range(100)).map_async(slow, concurrency=2).sink(answers.append)
    with caplog.at_level(logging.WARNING, "sage.job"):
        report = env.run()
    assert answers == list(range(len(answers)))
    assert 6 <= len(answers) <= 8
    assert is_clean_stop(report, "budget: wall_s, 10 of 10")
    told = {id(record): record.getMessage() for record in caplog.records}  # pytest may be handed a record twice
    assert list(told.values()) == ["80% of the budget is used: wall_s, 8 of 10"]


def test_the_share_of_failures_is_limited() -> None:
    env = LocalEnvironment("failing", backend=lambda: StepBackend(2))
    env.limit(failures=0.05)
    done: list[int] = []

    async def fragile(number: int) -> int:
        await asyncio.sleep(0.1)
        if number % 10 == 9:
            raise ValueError("fragile")
        return number

    env.from_batch(range(1000)).map_async(fragile, concurrency=2, on_error="skip", name="fragile").sink(done.append)
    report = env.run()
    assert report.state is Outcome.STOPPED
    assert report.why.startswith('budget: failures of "fragile", 0.0')
    assert 5 <= report.operator("fragile").failed <= 8


def test_few_failures_among_many_records_are_fine() -> None:
    env = LocalEnvironment("failing", backend=lambda: StepBackend(2))
    env.limit(failures=0.05)
    done: list[float] = []
    env.from_batch([0, *range(50), 0]).map(lambda n: 1 / n, on_error="skip").sink(done.append)
    assert env.run().state is Outcome.COMPLETED
    assert len(done) == 49


def test_code_that_calls_a_service_through_others_is_given_back_too(backend: Callable[[], Backend]) -> None:
    class Count(SourceFunction[int]):
        def execute(self) -> int:
            return int(self.call_service("llm", 1, method="ask"))

    class Last(ProcessFunction[int, int]):
        def execute(self, record: int) -> list[int]:
            try:
                return [self.call_service("llm", record, method="ask")]
            except HeldBackError as error:
                raise ValueError("no answer") from error

        def finish(self) -> Any:
            yield 0
            yield self.call_service("llm", 1, method="ask")

    env = LocalEnvironment("through others", backend=backend)
    env.limit(calls={"llm": 20})
    env.register_service("llm", Model)
    answers: list[int] = []
    env.from_source(Count).process(Last).sink(answers.append)
    report = env.run()
    assert is_clean_stop(report, 'budget: calls of "llm", 20 of 20')
    assert set(answers) <= {0, 3}


def test_a_service_in_its_own_process_that_calls_another_is_held_back(
    backend: Callable[[], Backend], host: Host
) -> None:
    class Chain(BaseService):
        def __init__(self, model: Model) -> None:
            self.model = model

        def ask(self, prompt: int) -> int:
            return self.model.ask(prompt)

    env = LocalEnvironment("chain", backend=backend)
    env.limit(calls={"llm": 7})
    model = env.register_service("llm", Model)
    chain = env.register_service("chain", Chain, model, options=ServiceOptions(host=host))
    answers: list[int] = []
    env.from_batch(range(100)).map(chain.ask).sink(answers.append)
    report = env.run()
    assert answers == list(range(1, 8))
    assert is_clean_stop(report, 'budget: calls of "llm", 7 of 7')


def test_each_job_has_its_own_budget(host: Host) -> None:
    env = LocalEnvironment("twice")
    env.limit(tokens=9)
    model = env.register_service("llm", Model, options=ServiceOptions(host=host))
    answers: list[int] = []
    env.from_batch(range(100)).map(model.ask).sink(answers.append)
    for number in (1, 2):
        assert is_clean_stop(env.run(keep_services=True), "budget: tokens, 9 of 9")
        assert answers == [1, 2, 3] * number
    env.limit()
    assert env.run().state is Outcome.COMPLETED
    assert len(answers) == 6 + 100
    env.close()


@pytest.mark.parametrize(
    ("limits", "text"),
    [
        ({"wall_s": 0}, "limit: wall_s is 0"),
        ({"calls": {"llm": 0}}, "limit: calls of 'llm' are 0, which is not a positive number"),
        ({"calls": 10}, "limit: calls is 10"),
        ({"tokens": 1.5}, "limit: tokens is 1.5, which is not a positive number"),
        ({"cost": (1, 2)}, r"limit: cost is \(1, 2\)"),
        ({"cost": (1, 2, 0)}, r"limit: cost is \(1, 2, 0\)"),
        ({"cost": (1, float("nan"), 3)}, r"limit: cost is \(1, nan, 3\)"),
        ({"failures": 5}, "limit: failures is 5"),
    ],
)
def test_limits_that_cannot_work_are_refused(limits: dict[str, Any], text: str) -> None:
    with pytest.raises(GraphError, match=text):
        LocalEnvironment("wrong").limit(**limits)


def test_limits_that_a_job_cannot_hold_are_refused() -> None:
    env = LocalEnvironment("wrong")
    env.limit(calls={"lm": 3})
    model = env.register_service("llm", Model, options=ServiceOptions(shared=True))
    env.from_batch([1]).map(model.ask).sink(print)
    with pytest.raises(UnknownServiceError, match='uses service "lm", which is not registered'):
        env.run()
    env.limit(tokens=3)
    with pytest.raises(UnsupportedPlanError, match='limits tokens, which service "llm" uses for others too'):
        env.run()


def test_sage_run_exits_with_3(tmp_path: Path) -> None:
    program = tmp_path / "program.py"
    program.write_text(
        "from sage import LocalEnvironment\n"
        "class Model:\n"
        "    def ask(self, prompt):\n"
        "        return prompt\n"
        "env = LocalEnvironment('limited')\n"
        "model = env.register_service('llm', Model)\n"
        "env.limit(calls={'llm': 3})\n"
        "env.from_batch(range(10)).map(model.ask).print()\n"
        "env.run()\n"
    )
    ran = subprocess.run(
        [sys.executable, "-m", "sage", "run", str(program)], capture_output=True, text=True, cwd=tmp_path, check=False
    )
    assert (ran.returncode, ran.stdout) == (3, "0\n1\n2\n")
    assert 'job "limited": STOPPED and CLEAN after ' in ran.stderr
    assert '(budget: calls of "llm", 3 of 3)' in ran.stderr
