"""What follows when a function raises: skip, dead letters, and trying again."""

from __future__ import annotations

import asyncio
import threading
from collections import Counter
from contextlib import suppress
from functools import partial
from itertools import pairwise
from re import escape
from typing import TYPE_CHECKING, Any

import pytest
from support.recording_services import report_of

from sage import (
    BaseCoMapFunction,
    BaseJoinFunction,
    DeadLetter,
    FunctionError,
    GraphError,
    JobError,
    LocalEnvironment,
    MapFunction,
    Outcome,
    Retry,
)
from sage.testing import StepBackend, run

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from sage._runtime.backend import Backend
    from sage.stream import DataStream

    Backends = Callable[[], Backend]

QUICK = (0.001, 0.001)


def not_three(number: int) -> int:
    if number % 10 == 3:
        raise ValueError(f"{number} again")
    return number


def test_both_errors_of_one_chain_are_told() -> None:
    def never_three(number: int) -> int:
        if number == 3:
            raise ValueError("three")
        return number

    def never(number: int) -> None:
        raise KeyError("any")

    told = set()
    for seed in range(20):
        env = LocalEnvironment("test", backend=partial(StepBackend, seed))
        env.from_batch([1, 2, 3]).map(never_three).sink(never)
        job = env.submit()
        with pytest.raises(JobError):
            job.wait()
        assert job.report is not None
        told.add(tuple(type(error.__cause__) for error in job.report.errors))
    assert told == {(KeyError,), (ValueError, KeyError)}


def test_dead_letters_that_nobody_sends_end_with_the_job(backend: Backends) -> None:
    env = LocalEnvironment("test", backend=backend)
    arrived: list[int] = []
    letters: list[DeadLetter] = []
    env.dead_letters().sink(letters.append)
    env.from_batch([1, 2]).sink(arrived.append)
    report = env.submit().wait(timeout_s=20)
    assert (arrived, letters) == ([1, 2], [])
    assert {task.state for task in report.tasks} == {"done"}


@pytest.mark.in_one_process
def test_what_one_record_gave_arrives_before_another_one_fails_the_job(backend: Backends) -> None:
    """Also where it is more than one step takes, so that a part of it waits when the error is known."""
    arrived: list[int] = []

    def not_empty(numbers: list[int]) -> list[int]:
        if not numbers:
            raise ValueError("nothing")
        return numbers

    env = LocalEnvironment("test", backend=backend)
    stream = env.from_batch([[0, 1, 2], [3, 4], [5, 6, 7, 8], [], [9]]).flatmap(not_empty, name="f")
    stream.map(lambda number: number + 1).sink(arrived.append)
    with pytest.raises(JobError, match=r'operator "f" failed on record \[\]: ValueError: nothing'):
        env.submit(autostop=True)
    assert arrived == [1, 2, 3, 4, 5, 6, 7, 8, 9]
    assert report_of(env).undelivered <= 1


def test_a_failure_that_waits_is_told_when_the_job_is_cancelled() -> None:
    ends = set()
    for seed in range(60):
        env = LocalEnvironment("test", backend=partial(StepBackend, seed))

        def cancel(_: int, env: LocalEnvironment = env) -> None:
            env.jobmanager.jobs[env.env_uuid].cancel()

        env.from_batch([[1, 2, 3, 4, 5], []]).flatmap(lambda numbers: numbers or [not_three(3)]).sink(cancel)
        job = env.submit()
        with suppress(FunctionError):
            job.wait()
        report = report_of(env)
        errors = tuple(type(error.__cause__) for error in report.errors)
        ends.add((report.state, errors, tuple(task.state for task in report.tasks)))
    assert ends == {
        (Outcome.CANCELLED, (), ("cancelled",)),
        (Outcome.FAILED, (ValueError,), ("failed",)),
    }


def test_a_coroutine_that_is_cancelled_with_its_job_is_no_failure() -> None:
    """Also where results of the records before it wait when it ends."""
    waits = threading.Event()

    async def given(number: int) -> Any:
        if number == 51:
            waits.set()
            await asyncio.sleep(3600)
        return list(range(1000)) if number == 50 else [number]

    env = LocalEnvironment("test")
    env.from_batch(range(100)).flatmap(given).map(lambda number: number).sink(lambda _: None)
    job = env.submit()
    assert waits.wait(20)
    job.cancel()
    report = job.wait()
    assert (report.state, report.errors) == (Outcome.CANCELLED, ())


@pytest.mark.parametrize("records", [1, 5, 50])
def test_records_behind_one_that_fails_the_job_count_as_undelivered(records: int, backend: Backends) -> None:
    env = LocalEnvironment("test", backend=backend)
    seen: list[int] = []

    def take(number: int) -> None:
        seen.append(number)
        if number == 3 or number == records - 1:
            raise ValueError("not this one")

    env.from_batch(range(records)).rebalance().sink(take, name="sink")
    job = env.submit()
    with pytest.raises(FunctionError, match="not this one"):
        job.wait()
    report = job.report
    assert report is not None
    assert report.operators[0].records_out == len(seen) + report.undelivered


@pytest.mark.parametrize(
    "build",
    [
        lambda stream, policy: stream.map(not_three, name="f", on_error=policy),
        lambda stream, policy: stream.filter(lambda x: not_three(x) + 1, name="f", on_error=policy),
        lambda stream, policy: stream.flatmap(lambda x: [not_three(x)], name="f", on_error=policy),
        lambda stream, policy: stream.process(lambda x: [not_three(x)], name="f", on_error=policy),
        lambda stream, policy: stream.keyby(not_three, name="f", on_error=policy),
    ],
    ids=["map", "filter", "flatmap", "process", "keyby"],
)
def test_every_operator_skips_or_hands_over_failed_records(
    backend: Backends, build: Callable[[DataStream, Any], DataStream]
) -> None:
    expected = [number for number in range(100) if number % 10 != 3]
    assert run(range(100), lambda stream: build(stream, "skip"), backend=backend) == expected

    arrived: list[int] = []
    letters: list[DeadLetter] = []
    env = LocalEnvironment("test", backend=backend)
    dead = env.dead_letters("lost")
    build(env.from_batch(range(100)), dead).sink(arrived.append)
    dead.sink(letters.append)
    env.submit(autostop=True)
    assert arrived == expected
    assert [letter.value for letter in letters] == list(range(3, 100, 10))
    assert {letter.operator for letter in letters} == {"f"}
    assert [str(letter.error) for letter in letters] == [f"{number} again" for number in range(3, 100, 10)]


def test_a_sink_skips_too(backend: Backends) -> None:
    arrived: list[int] = []
    env = LocalEnvironment("test", backend=backend)
    env.from_batch(range(5)).sink(lambda number: arrived.append(not_three(number)), name="end", on_error="skip")
    report = env.submit(autostop=True).report
    assert arrived == [0, 1, 2, 4]
    assert report is not None
    assert report.operator("end").failed == 1


def test_comap_and_join_skip_too(backend: Backends) -> None:
    class Sides(BaseCoMapFunction):
        def map0(self, data: int) -> int:
            return not_three(data)

        def map1(self, data: int) -> int:
            return -not_three(data)

    class Tagged(BaseJoinFunction):
        def execute(self, payload: int, key: Any, tag: int) -> list[tuple[int, int]]:
            return [(tag, not_three(payload))]

    arrived: list[Any] = []
    env = LocalEnvironment("test", backend=backend)
    both = env.from_batch(range(5)).connect(env.from_batch(range(2, 6)))
    both.comap(Sides, on_error="skip").sink(arrived.append)
    both.keyby(lambda x: x).join(Tagged, on_error="skip").sink(arrived.append)
    env.submit(autostop=True)
    assert Counter(arrived) == Counter([0, 1, 2, 4, -2, -4, -5, (0, 0), (0, 1), (0, 2), (0, 4), (1, 2), (1, 4), (1, 5)])


def test_several_operators_share_dead_letters(backend: Backends) -> None:
    letters: list[DeadLetter] = []
    arrived: list[int] = []
    env = LocalEnvironment("test", backend=backend)
    dead = env.dead_letters()
    stream = env.from_batch(range(30)).map(not_three, name="first", parallelism=3, on_error=dead)
    stream.map(lambda number: 12 // (number % 5), name="second", on_error=dead).sink(arrived.append)
    dead.map(lambda letter: letter).sink(letters.append)
    env.submit(autostop=True)
    first = [3, 13, 23]
    second = [0, 5, 10, 15, 20, 25]
    assert len(arrived) == 30 - len(first) - len(second)
    assert sorted(letter.value for letter in letters if letter.operator == "first") == first
    assert sorted(letter.value for letter in letters if letter.operator == "second") == second


def test_dead_letters_can_join_the_stream_again(backend: Backends) -> None:
    env = LocalEnvironment("test", backend=backend)
    dead = env.dead_letters()
    arrived: list[int] = []
    good = env.from_batch(range(10)).map(not_three, on_error=dead)
    good.union(dead.map(lambda letter: -letter.value)).sink(arrived.append)
    env.submit(autostop=True)
    assert sorted(arrived) == sorted([0, 1, 2, -3, 4, 5, 6, 7, 8, 9])


def test_dead_letters_that_nobody_reads_do_no_harm(backend: Backends) -> None:
    env = LocalEnvironment("test", backend=backend)
    dead = env.dead_letters()
    arrived: list[int] = []
    env.from_batch(range(5)).map(not_three, on_error=dead).sink(arrived.append)
    env.submit(autostop=True)
    assert arrived == [0, 1, 2, 4]


class Flaky:
    """Fails on each record a number of times before it succeeds."""

    def __init__(self, failures: int) -> None:
        self.calls: Counter[Any] = Counter()
        self._failures = failures

    def __call__(self, number: int) -> int:
        self.calls[number] += 1
        if self.calls[number] <= self._failures:
            raise ConnectionError(f"attempt {self.calls[number]}")
        return number


@pytest.mark.in_one_process
def test_a_record_is_tried_again_until_it_succeeds(backend: Backends) -> None:
    flaky = Flaky(2)
    retry = Retry(attempts_max=3, backoff_s=QUICK)
    assert run(range(10), lambda stream: stream.map(flaky, on_error=retry), backend=backend) == list(range(10))
    assert set(flaky.calls.values()) == {3}


@pytest.mark.in_one_process
def test_the_attempts_of_each_record_are_counted_alone(backend: Backends) -> None:
    calls: Counter[int] = Counter()

    def every_third(number: int) -> int:
        calls[number] += 1
        if number % 3 == 0 and calls[number] < 3:
            raise ConnectionError("once more")
        return number

    retry = Retry(attempts_max=3, backoff_s=QUICK)
    assert run(range(30), lambda stream: stream.map(every_third, on_error=retry), backend=backend) == list(range(30))
    assert calls == {number: 3 if number % 3 == 0 else 1 for number in range(30)}


@pytest.mark.in_one_process
def test_the_last_attempt_fails_the_job_with_their_number(backend: Backends) -> None:
    flaky = Flaky(100)
    with pytest.raises(FunctionError) as caught:
        run([7], lambda stream: stream.map(flaky, name="call", on_error=Retry(4, QUICK)), backend=backend)
    assert str(caught.value) == 'operator "call" failed on record 7 after 4 attempts: ConnectionError: attempt 4'
    assert flaky.calls == {7: 4}


@pytest.mark.in_one_process
def test_after_the_last_attempt_a_record_is_skipped_or_a_dead_letter(backend: Backends) -> None:
    calls: Counter[int] = Counter()

    def never_three(number: int) -> int:
        calls[number] += 1
        return not_three(number)

    retry = Retry(3, QUICK, then="skip")
    assert run(range(5), lambda stream: stream.map(never_three, on_error=retry), backend=backend) == [0, 1, 2, 4]
    assert calls == {0: 1, 1: 1, 2: 1, 3: 3, 4: 1}

    arrived: list[int] = []
    letters: list[DeadLetter] = []
    env = LocalEnvironment("test", backend=backend)
    dead = env.dead_letters()
    env.from_batch(range(5)).map(not_three, on_error=Retry(2, QUICK, then=dead)).sink(arrived.append)
    dead.sink(letters.append)
    env.submit(autostop=True)
    assert arrived == [0, 1, 2, 4]
    assert [(letter.value, letter.attempts) for letter in letters] == [(3, 2)]


@pytest.mark.parametrize("seed", range(4))
def test_the_pauses_double_up_to_the_longest(seed: int) -> None:
    step = StepBackend(seed)
    at_s: list[float] = []

    def fail(number: int) -> int:
        at_s.append(step.clock())
        raise ConnectionError("not now")

    with pytest.raises(FunctionError, match="after 6 attempts"):
        run([1], lambda stream: stream.map(fail, on_error=Retry(6, (0.1, 1.0))), backend=lambda: step)
    pauses_s = [later - sooner for sooner, later in pairwise(at_s)]
    assert pauses_s == pytest.approx([0.1, 0.2, 0.4, 0.8, 1.0])


def test_a_retried_record_keeps_its_key_and_its_place(backend: Backends) -> None:
    class Keyed(MapFunction):
        def __init__(self) -> None:
            self._tried: set[int] = set()

        def execute(self, data: int) -> tuple[int, Any]:
            if data % 4 == 0 and data not in self._tried:
                self._tried.add(data)
                raise ConnectionError("once more")
            return data, self.ctx.get_key()

    retry = Retry(2, QUICK)
    arrived = run(range(40), lambda stream: stream.keyby(lambda x: x % 5).map(Keyed, on_error=retry), backend=backend)
    assert arrived == [(number, number % 5) for number in range(40)]


def test_a_job_that_is_stopped_during_a_pause_does_not_wait_for_it() -> None:
    env = LocalEnvironment("test", drain_timeout_s=0.1)

    def fail(number: int) -> int:
        raise ConnectionError("not now")

    env.from_batch([1]).map(fail, on_error=Retry(5, (60.0, 60.0))).sink(lambda number: None)
    job = env.submit()
    job.cancel()
    assert job.report is not None
    assert job.report.duration_s < 10


@pytest.mark.parametrize("seed", range(4))
def test_a_stop_does_not_shorten_the_pauses_between_attempts(seed: int) -> None:
    """What was down for a moment may be there at the next attempt, so that the record still arrives."""
    step = StepBackend(seed)
    env = LocalEnvironment("test", backend=lambda: step)
    at_s: list[float] = []
    arrived: list[int] = []

    def fail_at_first(number: int) -> int:
        at_s.append(step.clock())
        if len(at_s) == 1:
            env.stop()
        if len(at_s) < 4:
            raise ConnectionError("not now")
        return number

    env.from_batch([1]).map(fail_at_first, on_error=Retry(5, (1.0, 1.0))).sink(arrived.append)
    job = env.submit(autostop=True)
    assert job.state == "stopped"
    assert arrived == [1]
    assert [later - sooner for sooner, later in pairwise(at_s)] == pytest.approx([1.0] * 3)


def test_a_generator_that_fails_in_the_middle_is_skipped_from_there_on(backend: Backends) -> None:
    """What a generator gave before its reading was cut may have gone on; what a list would have held has not."""

    def half(number: int) -> Iterator[int]:
        yield number
        yield not_three(number)

    arrived = run([2, 3, 4], lambda stream: stream.flatmap(half, on_error="skip"), backend=backend)
    assert arrived in ([2, 2, 4, 4], [2, 2, 3, 4, 4])
    arrived = run([2, 3, 4], lambda stream: stream.flatmap(lambda x: list(half(x)), on_error="skip"), backend=backend)
    assert arrived == [2, 2, 4, 4]


def test_an_interpreter_exit_in_a_function_is_never_skipped(backend: Backends) -> None:
    def leave(number: int) -> int:
        raise SystemExit(3)

    with pytest.raises(FunctionError, match="SystemExit") as caught:
        run([1], lambda stream: stream.map(leave, on_error="skip"), backend=backend)
    assert isinstance(caught.value.__cause__, SystemExit)


@pytest.mark.parametrize("policy", ["ignore", 3, lambda error: None], ids=["word", "number", "function"])
def test_an_unknown_policy_is_refused(policy: Any) -> None:
    env = LocalEnvironment("test")
    with pytest.raises(GraphError, match="on_error is") as caught:
        env.from_batch([1]).map(lambda x: x, on_error=policy)
    assert 'It is "fail", "skip", Retry(...)' in caught.value.__notes__[0]


def test_a_stream_that_is_no_dead_letters_is_refused() -> None:
    env = LocalEnvironment("test")
    stream = env.from_batch([1])
    with pytest.raises(GraphError, match="on_error is"):
        stream.map(lambda x: x, on_error=stream)


def test_a_retry_that_cannot_work_is_refused() -> None:
    for attempts_max in (0, "3", 2.5):
        with pytest.raises(GraphError, match=f"Retry: attempts_max is {attempts_max!r}, which is not a positive"):
            Retry(attempts_max=attempts_max)  # type: ignore[arg-type]
    for backoff_s in (0.5, (1,), ("a", 2), (-1, 2), None):
        with pytest.raises(GraphError, match=f"Retry: backoff_s is {escape(str(backoff_s))}") as caught:
            Retry(backoff_s=backoff_s)  # type: ignore[arg-type]
        assert caught.value.__notes__
    with pytest.raises(GraphError, match="another Retry"):
        Retry(then=Retry())


def test_an_error_that_is_its_own_cause_ends_the_job_as_any_other(backend: Callable[[], Backend]) -> None:
    """Libraries raise such errors."""
    looped = ValueError("around")
    looped.__cause__ = KeyError("and around")
    looped.__cause__.__cause__ = looped

    def fail(record: int) -> int:
        raise looped

    env = LocalEnvironment("around", backend=backend)
    env.from_batch([1]).map(fail).sink(lambda record: None)
    with pytest.raises(FunctionError, match="around"):
        env.submit(autostop=True)
