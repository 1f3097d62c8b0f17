"""How errors come back to the program, and how a job's result can be asked for."""

from __future__ import annotations

import subprocess
import sys
import threading
import time
from typing import TYPE_CHECKING, Any

import pytest

from sage import (
    BatchFunction,
    DeadLetter,
    FunctionError,
    GraphError,
    JobError,
    JobErrorGroup,
    LocalEnvironment,
    MapFunction,
    Outcome,
    Retry,
    SinkFunction,
    SourceFunction,
    UnknownServiceError,
)
from sage.testing import run

if TYPE_CHECKING:
    from collections.abc import Callable

    from support.fair_clock import FairClock

    from sage._runtime.backend import Backend

    Backends = Callable[[], Backend]

PROMPTLY_S = 0.5


class Memory:
    """A service that says when it is cleaned."""

    def __init__(self, cleaned: list[str]) -> None:
        self._cleaned = cleaned

    def recall(self, query: str) -> str:
        return f"found {query}"

    def forget(self, query: str) -> None:
        raise KeyError(query)

    def cleanup(self) -> None:
        self._cleaned.append("memory")


def fail_on_two(number: int) -> int:
    if number == 2:
        raise ValueError("two is too many")
    return number * 10


def notes_of(error: BaseException) -> str:
    return "\n".join(getattr(error, "__notes__", ()))


def test_a_failing_map_fails_the_job_with_operator_record_and_original(backend: Backends) -> None:
    """The error names all three, and the services are cleaned before it is raised."""
    cleaned: list[str] = []
    env = LocalEnvironment("test", backend=backend)
    env.register_service("memory", Memory, cleaned)
    env.from_batch([1, 2, 3]).map(fail_on_two, name="double").sink(lambda record: None)
    with pytest.raises(FunctionError) as caught:
        env.submit(autostop=True)
    assert str(caught.value) == 'operator "double" failed on record 2: ValueError: two is too many'
    assert caught.value.operator == "double"
    assert caught.value.record == "2"
    assert caught.value.job == "test"
    assert isinstance(caught.value.__cause__, ValueError)
    assert cleaned == ["memory"]


def test_an_error_that_nobody_catches_gives_exit_code_1() -> None:
    """The traceback of the program names the original error."""
    program = (
        "from sage import LocalEnvironment\n"
        "env = LocalEnvironment('script')\n"
        "env.from_batch([4, 2, 0]).map(lambda number: 8 // number, name='divide').sink(lambda record: None)\n"
        "env.submit(autostop=True)\n"
        "print('not reached')\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=30)
    assert done.returncode == 1
    assert done.stdout == ""
    assert "ZeroDivisionError" in done.stderr
    assert 'operator "divide" failed on record 0' in done.stderr


def test_what_came_before_the_failed_record_arrives(backend: Backends) -> None:
    """A failure does not take back what is done; record 3 never arrives."""
    arrived: list[int] = []
    env = LocalEnvironment("test", backend=backend)
    env.from_batch([1, 2, 3]).map(fail_on_two).sink(arrived.append)
    with pytest.raises(FunctionError):
        env.submit(autostop=True)
    assert 30 not in arrived
    assert set(arrived) <= {10}


def test_a_skipped_record_is_counted_and_the_others_arrive(backend: Backends) -> None:
    """Policy `skip`."""
    arrived: list[int] = []
    env = LocalEnvironment("test", backend=backend)
    env.from_batch([1, 2, 3]).map(fail_on_two, name="double", on_error="skip").sink(arrived.append)
    job = env.submit(autostop=True)
    assert arrived == [10, 30]
    assert job.report is not None
    assert job.report.state is Outcome.COMPLETED
    assert job.report.operator("double").failed == 1
    assert job.report.operator("double").records_in == 3
    assert job.report.operator("double").records_out == 2


def test_a_dead_letter_carries_the_record_and_its_error(backend: Backends) -> None:
    """Policy dead letter."""
    arrived: list[int] = []
    letters: list[DeadLetter] = []
    env = LocalEnvironment("test", backend=backend)
    dead = env.dead_letters()
    env.from_batch([1, 2, 3]).map(fail_on_two, name="double", on_error=dead).sink(arrived.append)
    dead.sink(letters.append)
    job = env.submit(autostop=True)
    assert arrived == [10, 30]
    (letter,) = letters
    assert (letter.value, letter.operator, letter.attempts) == (2, "double", 1)
    assert isinstance(letter.error, ValueError)
    assert job.report is not None
    assert job.report.operator("double").failed == 1


class BadConstructor(MapFunction):
    def __init__(self) -> None:
        raise OSError("no model on disk")

    def execute(self, data: Any) -> Any:
        return data


class BadOpen(MapFunction):
    def open(self) -> None:
        raise OSError("no model on disk")

    def execute(self, data: Any) -> Any:
        return data


class Recorder(SinkFunction):
    def __init__(self, happened: list[str]) -> None:
        self._happened = happened

    def open(self) -> None:
        self._happened.append("open")

    def execute(self, data: Any) -> None:
        self._happened.append(f"record {data}")

    def close(self) -> None:
        self._happened.append("close")


@pytest.mark.sage_clean(within_s=0.0)
@pytest.mark.parametrize("function", [BadConstructor, BadOpen])
def test_a_function_that_cannot_start_leaves_nothing(backend: Backends, function: type[MapFunction]) -> None:
    """The original is the cause, no record was processed, and what was opened is closed."""
    happened: list[str] = []
    cleaned: list[str] = []
    env = LocalEnvironment("test", backend=backend)
    env.register_service("memory", Memory, cleaned)
    stream = env.from_batch([1, 2, 3])
    stream.map(function, name="model").sink(lambda record: None)
    stream.sink(Recorder, happened)
    with pytest.raises(JobError) as caught:
        env.submit(autostop=True)
    assert 'operator "model"' in str(caught.value)
    assert "no model on disk" in str(caught.value)
    assert isinstance(caught.value.__cause__, OSError)
    assert happened in ([], ["open", "close"])
    assert cleaned == ["memory"]


@pytest.mark.parametrize("function", [BadConstructor, BadOpen])
def test_a_function_that_cannot_start_is_told_promptly(function: type[MapFunction], clock: FairClock) -> None:
    """Nobody waits for the source, which has no end."""
    env = LocalEnvironment("test")
    env.from_source(Ticks).map(function, name="model").sink(print_nothing)
    began_at = time.monotonic()
    with pytest.raises(FunctionError, match="no model on disk"):
        env.submit(autostop=True)
    assert clock.elapsed_s(began_at) < PROMPTLY_S


class Broken(BatchFunction):
    """A source that always raises, and counts how often it was asked."""

    calls = 0

    def execute(self) -> Any:
        type(self).calls += 1
        raise ConnectionError("the feed is down")


def test_a_source_that_always_raises_ends_the_job(backend: Backends) -> None:
    """Without a policy it is asked once."""

    class Feed(Broken):
        calls = 0

    env = LocalEnvironment("test", backend=backend)
    env.from_batch(Feed, name="feed").sink(lambda record: None)
    with pytest.raises(FunctionError, match='source "feed" failed: ConnectionError: the feed is down') as caught:
        env.submit(autostop=True)
    assert isinstance(caught.value.__cause__, ConnectionError)
    assert Feed.calls == 1


def test_a_source_is_retried_a_limited_number_of_times(backend: Backends) -> None:
    """Only because the policy says so."""

    class Feed(Broken):
        calls = 0

    env = LocalEnvironment("test", backend=backend)
    retry = Retry(attempts_max=4, backoff_s=(0.001, 0.002))
    env.from_batch(Feed, name="feed", on_error=retry).sink(lambda record: None)
    with pytest.raises(FunctionError, match='source "feed" failed after 4 attempts: ConnectionError'):
        env.submit(autostop=True)
    assert Feed.calls == 4


def test_a_source_that_recovers_loses_nothing(backend: Backends) -> None:
    """The attempts are counted anew after each success."""

    class Flaky(BatchFunction):
        def __init__(self) -> None:
            self._calls = 0

        def execute(self) -> int | None:
            self._calls += 1
            if self._calls % 2:
                raise ConnectionError("again, please")
            return self._calls // 2 if self._calls <= 20 else None

    arrived: list[int] = []
    env = LocalEnvironment("test", backend=backend)
    env.from_batch(Flaky, on_error=Retry(attempts_max=2, backoff_s=(0.001, 0.001))).sink(arrived.append)
    env.submit(autostop=True)
    assert arrived == list(range(1, 11))


def test_a_generator_that_raises_is_an_error_and_no_end(backend: Backends) -> None:
    """The records before the error have gone on."""
    arrived: list[int] = []

    def numbers() -> Any:
        yield from range(5)
        raise ConnectionError("the feed is down")

    env = LocalEnvironment("test", backend=backend)
    env.from_batch(numbers).sink(arrived.append)
    with pytest.raises(FunctionError, match='source "numbers" failed: ConnectionError'):
        env.submit(autostop=True)
    assert arrived == list(range(len(arrived)))


@pytest.mark.parametrize("is_bounded", [True, False])
def test_a_generator_that_raises_is_not_tried_again(backend: Backends, is_bounded: bool) -> None:
    """It is over then, which another attempt would take for a good end."""

    def numbers() -> Any:
        yield from range(5)
        raise ConnectionError("the feed is down")

    env = LocalEnvironment("test", backend=backend)
    begin = env.from_batch if is_bounded else env.from_source
    begin(numbers, on_error=Retry(3, (0.001, 0.001))).sink(lambda record: None)
    with pytest.raises(FunctionError, match='source "numbers" failed: ConnectionError') as caught:
        env.submit(autostop=True)
    assert "A generator cannot go on after an error" in caught.value.__notes__[0]


class Ticks(SourceFunction):
    """An endless source."""

    def __init__(self) -> None:
        self._count = 0

    def execute(self) -> int:
        self._count += 1
        return self._count


def test_a_completed_job_is_known_by_its_id(backend: Backends) -> None:
    """Completed, with counts per operator and times."""
    env = LocalEnvironment("test", backend=backend)
    env.from_batch([1, 2, 3, 4], name="numbers").filter(lambda number: number > 1, name="few").sink(print_nothing)
    job = env.submit(autostop=True)
    status = env.jobmanager.get_job_status(job.id)
    assert status["status"] == "completed"
    operators = {operator["name"]: operator for operator in status["report"]["operators"]}
    assert operators["numbers"]["records_out"] == 4
    assert (operators["few"]["records_in"], operators["few"]["records_out"]) == (4, 3)
    assert operators["print_nothing"]["records_in"] == 3
    assert status["report"]["started_at"] <= status["report"]["ended_at"]
    assert status["report"]["duration_s"] >= 0
    assert env.jobmanager.jobs[job.id] is job
    assert str(job) == job.id


def print_nothing(record: Any) -> None:
    """Take in a record."""


def test_a_failed_job_is_known_by_its_id(backend: Backends) -> None:
    """Failed, with the error in the report."""
    env = LocalEnvironment("test", backend=backend)
    env.from_batch([1, 2, 3]).map(fail_on_two, name="double").sink(print_nothing)
    with pytest.raises(FunctionError):
        env.submit(autostop=True)
    status = env.jobmanager.get_job_status(env.env_uuid)
    assert status["status"] == "failed"
    assert status["report"]["errors"][0]["cause"] == "ValueError: two is too many"
    assert 'operator "double"' in status["report"]["why"]


@pytest.mark.parametrize(("drain", "outcome"), [(True, "stopped"), (False, "cancelled")])
def test_a_job_that_was_ended_says_how(backend: Backends, drain: bool, outcome: str) -> None:
    """Stopped or cancelled."""
    env = LocalEnvironment("test", backend=backend)
    env.from_source(Ticks).sink(print_nothing)
    job = env.submit()
    job.stop(drain=drain)
    assert job.report is not None
    assert job.state == outcome
    assert env.jobmanager.get_job_status(job.id)["status"] == outcome
    assert job.report.why.startswith("stop()" if drain else "cancel()")


def test_a_job_that_is_waited_for_from_inside_says_so(backend: Backends) -> None:
    """A job that waited for its own end would never end."""
    env = LocalEnvironment("test", backend=backend)

    def wait(record: int) -> None:
        env.jobmanager.jobs[env.env_uuid].wait(60.0)

    env.from_batch([1]).sink(wait, name="impatient")
    with pytest.raises(
        FunctionError, match='"impatient" failed on record 1: JobError: job "test" is waited for'
    ) as caught:
        env.submit(autostop=True)
    assert "job.stop() returns at once" in caught.value.__cause__.__notes__[0]  # type: ignore[union-attr]


@pytest.mark.parametrize(("timeout_s", "error"), [("soon", ValueError), ([1], TypeError)])
def test_a_time_that_is_none_does_not_end_a_job(timeout_s: Any, error: type[Exception]) -> None:
    with LocalEnvironment("test") as env:
        env.from_source(Ticks, delay=0.001).sink(lambda record: None)
        job = env.submit()
        with pytest.raises(error):
            job.wait(timeout_s)
        with pytest.raises(TimeoutError):
            job.wait(float("nan"))
        with pytest.raises(TimeoutError):
            job.wait(-1)
        assert job.is_running
    assert str(job.events()[0]) == "job: new -> starting"
    assert job.wait(float("inf")).state == "stopped"


def test_a_report_prints_as_a_table(backend: Backends) -> None:
    """The report names state, operators and counts."""
    env = LocalEnvironment("tea shop", backend=backend)
    env.from_batch(range(1200), name="orders").sink(print_nothing)
    text = str(env.submit(autostop=True).report)
    assert text.startswith('job "tea shop": COMPLETED and CLEAN after ')
    assert "1,200" in text
    assert "orders" in text


def test_an_unknown_service_is_found_at_submit(backend: Backends) -> None:
    """Seen in the function's code, it is a `GraphError` and nothing was started."""

    class Ask(MapFunction):
        def execute(self, data: str) -> Any:
            return self.call_service("memry", data, method="recall")

    cleaned: list[str] = []
    env = LocalEnvironment("test", backend=backend)
    env.register_service("memory", Memory, cleaned)
    env.from_batch(["tea"]).map(Ask, name="ask").sink(print_nothing)
    with pytest.raises(GraphError) as caught:
        env.submit(autostop=True)
    assert str(caught.value) == 'operator "ask" uses service "memry", which is not registered'
    assert '"memory"' in notes_of(caught.value)
    assert cleaned == []


def test_an_unknown_method_is_found_at_submit(backend: Backends) -> None:
    """The note lists the methods that there are."""
    cleaned: list[str] = []
    env = LocalEnvironment("test", backend=backend)
    memory: Any = env.register_service("memory", Memory, cleaned)
    env.from_batch(["tea"]).map(lambda query: memory.remember(query), name="ask").sink(print_nothing)
    with pytest.raises(GraphError) as caught:
        env.submit(autostop=True)
    assert str(caught.value) == 'operator "ask" uses "remember" of service "memory", which it lacks'
    assert "recall" in notes_of(caught.value)
    assert cleaned == []


def test_an_unknown_service_that_nobody_could_see_is_an_immediate_error(backend: Backends) -> None:
    """The error lists the known services."""

    class Ask(MapFunction):
        def __init__(self, name: str) -> None:
            self._name = name

        def execute(self, data: str) -> Any:
            return self.call_service(self._name, data, method="recall")

    env = LocalEnvironment("test", backend=backend)
    env.register_service("memory", Memory, [])
    env.from_batch(["tea"]).map(Ask, "memry").sink(print_nothing)
    with pytest.raises(FunctionError, match='uses service "memry", which is not registered') as caught:
        env.submit(autostop=True)
    assert isinstance(caught.value.__cause__, UnknownServiceError)
    assert 'Registered: "memory".' in notes_of(caught.value.__cause__)


def test_an_unknown_method_that_nobody_could_see_is_an_immediate_error(backend: Backends) -> None:
    """The error lists the known methods."""

    class Ask(MapFunction):
        def execute(self, data: str) -> Any:
            return self.call_service("memory", data, method=data)

    env = LocalEnvironment("test", backend=backend)
    env.register_service("memory", Memory, [])
    env.from_batch(["remember"]).map(Ask).sink(print_nothing)
    with pytest.raises(FunctionError) as caught:
        env.submit(autostop=True)
    cause = caught.value.__cause__
    assert isinstance(cause, UnknownServiceError)
    assert "remember" in str(cause)
    assert "recall" in f"{cause}\n{notes_of(cause)}"


def test_an_error_of_a_service_is_caught_as_what_it_is(backend: Backends) -> None:
    """`KeyError("x")` raised in a service is a `KeyError("x")` at its caller."""
    env = LocalEnvironment("test", backend=backend)
    memory = env.register_service("memory", Memory, [])
    caught: list[KeyError] = []
    arrived: list[str] = []

    def ask(query: str) -> str:
        try:
            memory.forget(query)
        except KeyError as error:
            caught.append(error)
        return query

    env.from_batch(["x"]).map(ask).sink(arrived.append)
    env.submit(autostop=True)
    assert arrived == ["x"]
    assert [error.args for error in caught] == [("x",)]


def test_an_error_of_a_service_that_nobody_catches_fails_the_job_as_the_cause(backend: Backends) -> None:
    """The operator's error has the service's own as its cause."""
    env = LocalEnvironment("test", backend=backend)
    memory = env.register_service("memory", Memory, [])
    env.from_batch(["x"]).map(memory.forget, name="forget").sink(print_nothing)
    with pytest.raises(FunctionError, match="operator \"forget\" failed on record 'x': KeyError: 'x'") as caught:
        env.submit(autostop=True)
    assert isinstance(caught.value.__cause__, KeyError)


def test_two_tasks_that_fail_at_once_are_both_reported() -> None:
    """Both errors are in the group that submit raises."""
    together = threading.Barrier(2)

    def left(record: int) -> None:
        together.wait(10)
        raise ValueError("left")

    def right(record: int) -> None:
        together.wait(10)
        raise KeyError("right")

    env = LocalEnvironment("test")
    stream = env.from_batch([1])
    stream.map(left).sink(print_nothing)
    stream.map(right).sink(print_nothing)
    with pytest.raises(JobErrorGroup) as caught:
        env.submit(autostop=True)
    assert {error.operator for error in caught.value.exceptions if isinstance(error, FunctionError)} == {
        "left",
        "right",
    }
    assert {type(error.__cause__) for error in caught.value.exceptions} == {ValueError, KeyError}
    assert isinstance(caught.value, JobError)


def test_an_error_of_a_source_is_told_though_a_record_before_it_fails_the_job_first() -> None:
    """The source has raised already, while what it read before is still on its way."""
    asked = iter(range(10))

    def numbers() -> int:
        number = next(asked)
        if number == 3:  # in the second batch, behind records 1 and 2
            raise KeyError("source")
        return number

    def work(number: int) -> None:
        if number == 1:
            raise ValueError("sink")

    env = LocalEnvironment("test")
    env.from_source(numbers, name="numbers").sink(work, name="work")
    with pytest.raises(JobErrorGroup) as caught:
        env.submit(autostop=True)
    assert {type(error.__cause__) for error in caught.value.exceptions} == {ValueError, KeyError}


def test_run_raises_what_failed(backend: Backends) -> None:
    """Also through `sage.testing.run`."""
    with pytest.raises(FunctionError, match="failed on record 2"):
        run([1, 2, 3], lambda stream: stream.map(fail_on_two), backend=backend)
