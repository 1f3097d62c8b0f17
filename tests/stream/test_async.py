"""`map_async`: many coroutines at a time, their order, limits, failures and ends."""

from __future__ import annotations

import asyncio
import contextvars
import threading
import time
from collections import Counter
from functools import partial
from typing import TYPE_CHECKING, Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.recording_services import report_of

from sage import (
    BaseFunction,
    DeadLetter,
    FunctionError,
    GraphError,
    JobError,
    LocalEnvironment,
    MapFunction,
    Outcome,
    Retry,
    SourceFunction,
    StopSignal,
)
from sage._backends.threads import ThreadsBackend
from sage.testing import StepBackend, assert_clean, run

if TYPE_CHECKING:
    from collections.abc import Callable

    from support.fair_clock import FairClock

    from sage._runtime.backend import Backend
    from sage.stream import DataStream

    Backends = Callable[[], Backend]

FOREVER_S = 3600.0
QUICK_S = 0.001


async def double(number: int) -> int:
    await asyncio.sleep(QUICK_S * (number % 3))
    return number * 2


async def not_three(number: int) -> int:
    await asyncio.sleep(0)
    if number % 10 == 3:
        raise ValueError(f"{number} again")
    return number


class Crowd:
    """Counts how many coroutines are in it."""

    def __init__(self) -> None:
        self.inside = 0
        self.most = 0
        self.begun = 0

    async def pass_through(self, number: int) -> int:
        self.begun += 1
        self.inside += 1
        self.most = max(self.most, self.inside)
        await asyncio.sleep(QUICK_S * (1 + number % 4))
        self.inside -= 1
        return number


# --- results ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("concurrency", [1, 3, 100])
def test_results_keep_the_order_of_their_records(backend: Backends, concurrency: int) -> None:
    arrived = run(range(150), lambda stream: stream.map_async(double, concurrency=concurrency), backend=backend)
    assert arrived == [number * 2 for number in range(150)]


@pytest.mark.parametrize("concurrency", [1, 3, 100])
def test_without_order_no_result_is_lost_or_doubled(backend: Backends, concurrency: int) -> None:
    arrived = run(
        range(150), lambda stream: stream.map_async(double, concurrency=concurrency, ordered=False), backend=backend
    )
    assert sorted(arrived) == [number * 2 for number in range(150)]


class Added(MapFunction):
    def __init__(self, plus: int) -> None:
        self.plus = plus

    async def open(self) -> None:  # type: ignore[override]
        self.lock = asyncio.Lock()

    async def execute(self, data: int) -> int | None:
        async with self.lock:
            await asyncio.sleep(0)
        return data + self.plus if data else None


class Callable_:
    async def __call__(self, number: int) -> int:
        return number + 5


async def add(plus: int, number: int) -> int:
    return number + plus


@pytest.mark.parametrize(
    ("build", "expected"),
    [
        (lambda stream: stream.map_async(Added, 5), [6, 7]),
        (lambda stream: stream.map_async(Added(5)), [6, 7]),
        (lambda stream: stream.map_async(Callable_()), [5, 6, 7]),
        (lambda stream: stream.map_async(partial(add, 5)), [5, 6, 7]),
        (lambda stream: stream.map_async(partial(add, 5), parallelism=2).map(lambda number: number), [5, 6, 7]),
    ],
    ids=["class", "instance", "callable object", "partial", "two tasks"],
)
def test_every_form_of_a_coroutine_function_is_taken(
    backend: Backends, build: Callable[[DataStream], DataStream], expected: list[int]
) -> None:
    assert sorted(run(range(3), build, backend=backend)) == expected


def test_none_of_a_plain_coroutine_function_is_data(backend: Backends) -> None:
    async def nothing(number: int) -> None:
        await asyncio.sleep(0)

    assert run([1, 2], lambda stream: stream.map_async(nothing), backend=backend) == [None, None]


@pytest.mark.in_one_process
@pytest.mark.parametrize("ordered", [True, False])
def test_a_result_goes_on_as_soon_as_it_is_there(backend: Backends, ordered: bool) -> None:
    """The second record ends when the first has arrived at the sink, so that waiting for both would never end."""
    here: list[tuple[asyncio.AbstractEventLoop, asyncio.Event]] = []

    async def wait(number: int) -> int:
        if number == 1:
            here.append((asyncio.get_running_loop(), asyncio.Event()))
            await here[0][1].wait()
        else:
            while not here:
                await asyncio.sleep(QUICK_S)
        return number

    def arrive(number: int) -> None:
        if number == 0:
            here[0][0].call_soon_threadsafe(here[0][1].set)

    arrived: list[int] = []
    env = LocalEnvironment("soon", backend=backend)
    env.from_batch([0, 1]).map_async(wait, concurrency=2, ordered=ordered).sink(arrive).sink(arrived.append)
    env.submit(autostop=True)
    assert arrived == [0, 1]


def test_a_record_that_is_done_passes_a_slower_one_without_order(backend: Backends) -> None:
    async def wait(number: int) -> int:
        await asyncio.sleep(0.2 if number == 0 else 0)
        return number

    arrived = run(range(5), lambda stream: stream.map_async(wait, ordered=False), backend=backend)
    assert arrived[-1] == 0
    assert sorted(arrived) == [0, 1, 2, 3, 4]


def test_a_source_that_waits_keeps_no_result_from_going_on() -> None:
    has_arrived = threading.Event()

    class Patient(SourceFunction):
        def __init__(self) -> None:
            self.asked = 0

        def execute(self) -> int | StopSignal:
            self.asked += 1
            if self.asked == 1:
                return 7
            assert has_arrived.wait(20)
            return StopSignal()

    env = LocalEnvironment("patient")
    env.from_source(Patient).map_async(double).sink(lambda _: has_arrived.set())
    env.submit(autostop=True)
    assert has_arrived.is_set()


# --- limits -----------------------------------------------------------------------------------------------------------


@pytest.mark.in_one_process
@pytest.mark.parametrize("ordered", [True, False])
def test_as_many_coroutines_run_as_the_limit_allows(backend: Backends, ordered: bool) -> None:
    crowd = Crowd()
    arrived = run(
        range(100),
        lambda stream: stream.map_async(crowd.pass_through, concurrency=7, ordered=ordered),
        backend=backend,
    )
    assert sorted(arrived) == list(range(100))
    assert crowd.most == 7


def test_hundreds_are_in_flight_at_once(backend: Backends) -> None:
    inside = 0
    all_there: list[asyncio.Event] = []

    async def meet(number: int) -> int:
        nonlocal inside
        if not all_there:
            all_there.append(asyncio.Event())
        inside += 1
        if inside == 500:
            all_there[0].set()
        await all_there[0].wait()
        return number

    arrived = run(range(500), lambda stream: stream.map_async(meet, concurrency=500), backend=backend)
    assert arrived == list(range(500))


def test_a_slow_record_holds_up_a_bounded_number_of_others(backend: Backends) -> None:
    """With order, results wait behind it; then no more calls begin, so that a stalled record costs no memory."""
    begun: list[int] = []

    async def wait(number: int) -> int:
        begun.append(number)
        if number == 0:
            while len(begun) < 20:
                await asyncio.sleep(QUICK_S)
            # Whatever could begin has time to.
            await asyncio.sleep(50 * QUICK_S)
            assert len(begun) == 20
        return number

    arrived = run(range(200), lambda stream: stream.map_async(wait, concurrency=10), backend=backend)
    assert arrived == list(range(200))


@pytest.mark.in_one_process
def test_coroutines_do_not_see_the_variables_of_other_records(backend: Backends) -> None:
    name: contextvars.ContextVar[int | None] = contextvars.ContextVar("name", default=None)

    async def see(number: int) -> int | None:
        before = name.get()
        name.set(number)
        await asyncio.sleep(0)
        assert name.get() == number
        return before

    assert run(range(50), lambda stream: stream.map_async(see, concurrency=3), backend=backend) == [None] * 50


@pytest.mark.parametrize("seed", range(20))
def test_a_seed_gives_the_same_schedule_every_time(seed: int) -> None:
    def order() -> list[int]:
        crowd = Crowd()
        return run(
            range(60),
            lambda stream: stream.map_async(crowd.pass_through, concurrency=9, ordered=False),
            backend=lambda: StepBackend(seed),
        )

    assert order() == order()


# --- keys, requests, loops, lockstep ----------------------------------------------------------------------------------


class WithKey(MapFunction):
    async def execute(self, data: int) -> tuple[int, int]:
        before = self.ctx.get_key()
        await asyncio.sleep(QUICK_S * (data % 3))
        assert self.ctx.get_key() == before
        return data, self.ctx.get_key()


@pytest.mark.parametrize("ordered", [True, False])
def test_keys_travel_with_their_records(backend: Backends, ordered: bool) -> None:
    def build(stream: DataStream) -> DataStream:
        keyed: Any = stream.keyby(lambda number: number % 4).map_async(WithKey, concurrency=6, ordered=ordered)
        return keyed.reduce(lambda a, b: (a[0] + b[0], b[1]), emit="last")  # type: ignore[no-any-return]

    arrived = run(range(40), build, backend=backend)
    assert sorted(arrived, key=lambda pair: pair[1]) == [(sum(range(rest, 40, 4)), rest) for rest in range(4)]


@pytest.mark.parametrize("ordered", [True, False])
def test_each_request_gets_its_own_answer(backend: Backends, ordered: bool) -> None:
    env = LocalEnvironment("served")
    doubled = env.serve(
        "doubled", lambda requests: requests.map_async(not_three, ordered=ordered).map(lambda number: number * 2)
    )
    answers: list[Any] = []

    def ask(number: int) -> Any:
        try:
            return doubled.process(number)
        except ValueError as error:
            return str(error)

    env.from_batch(range(20)).map(ask, parallelism=4).sink(answers.append)
    env.submit(autostop=True)
    assert Counter(answers) == Counter([f"{n} again" if n % 10 == 3 else n * 2 for n in range(20)])


def test_a_request_whose_record_is_dropped_is_answered_with_none() -> None:
    env = LocalEnvironment("served")
    added = env.serve("added", lambda requests: requests.map_async(Added, 5))
    answers: list[Any] = []
    env.from_batch([0, 1]).map(added.process).sink(answers.append)
    env.submit(autostop=True)
    assert answers == [None, 6]


@pytest.mark.parametrize("parallelism", [1, 3])
def test_a_loop_waits_for_what_is_in_flight(backend: Backends, parallelism: int) -> None:
    async def less(number: int) -> int:
        await asyncio.sleep(QUICK_S * number)
        return number - 1

    arrived: list[int] = []
    env = LocalEnvironment("loop", backend=backend)
    loop = env.from_future("loop")
    lower = env.from_batch([3, 10, 0, 7]).union(loop).filter(lambda number: number > 0)
    fewer = lower.map_async(less, parallelism=parallelism, ordered=False)
    fewer.fill_future(loop)
    fewer.sink(arrived.append)
    report = env.submit(autostop=True).report
    assert sorted(arrived) == sorted(number for first in (3, 10, 0, 7) for number in range(first))
    assert report is not None
    assert report.undelivered == 0


def test_in_lockstep_one_record_is_in_flight(backend: Backends) -> None:
    crowd = Crowd()
    numbers = iter(range(10))
    env = LocalEnvironment("lockstep", backend=backend)
    arrived: list[int] = []
    source = env.from_source(lambda: next(numbers, StopSignal()), lockstep=True)
    source.map_async(crowd.pass_through, concurrency=5).sink(arrived.append)
    env.submit(autostop=True)
    assert arrived == list(range(10))
    assert crowd.most == 1


# --- failures ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("ordered", [True, False])
def test_failed_records_are_skipped_or_handed_over(backend: Backends, ordered: bool) -> None:
    kept = [number for number in range(100) if number % 10 != 3]
    arrived: list[int] = []
    letters: list[DeadLetter] = []
    env = LocalEnvironment("policies", backend=backend)
    dead = env.dead_letters("lost")
    numbers = env.from_batch(range(100))
    numbers.map_async(not_three, ordered=ordered, name="sent", on_error=dead).sink(arrived.append)
    numbers.map_async(not_three, ordered=ordered, name="skipped", on_error="skip").sink(arrived.append)
    dead.sink(letters.append)
    env.submit(autostop=True)
    assert sorted(arrived) == sorted(kept * 2)
    assert Counter(letter.value for letter in letters) == Counter(range(3, 100, 10))
    assert {(letter.operator, letter.attempts) for letter in letters} == {("sent", 1)}
    assert Counter(str(letter.error) for letter in letters) == Counter(f"{n} again" for n in range(3, 100, 10))
    for name in ("sent", "skipped"):
        counts = report_of(env).operator(name)
        assert (counts.records_in, counts.records_out, counts.failed) == (100, 90, 10)


def fails_on_three(backend: Backends) -> tuple[list[int], LocalEnvironment]:
    """Run a job that fails on record 3, and return the records that arrived before it."""
    arrived: list[int] = []
    env = LocalEnvironment("fails", backend=backend)
    env.from_batch(range(20)).map_async(not_three, name="check", concurrency=5).sink(arrived.append)
    with pytest.raises(FunctionError, match='operator "check" failed on record 3: ValueError: 3 again') as caught:
        env.submit(autostop=True)
    assert isinstance(caught.value.__cause__, ValueError)
    return arrived, env


@pytest.mark.in_one_process
def test_what_came_before_a_failing_record_has_arrived(backend: Backends) -> None:
    assert fails_on_three(backend)[0] == [0, 1, 2]


def test_the_error_names_operator_and_record(backend: Backends) -> None:
    """Records on their way to another process may be dropped, and are counted."""
    arrived, env = fails_on_three(backend)
    assert arrived == [0, 1, 2][: len(arrived)]
    report = report_of(env)
    assert report.operators[0].records_out == len(arrived) + 1 + report.undelivered


@pytest.mark.parametrize("error", [asyncio.CancelledError, KeyboardInterrupt, SystemExit])
def test_what_is_no_exception_fails_the_job_whatever_the_policy(backend: Backends, error: type[BaseException]) -> None:
    async def strange(number: int) -> int:
        await asyncio.sleep(0)
        raise error

    policy = Retry(3, (0.0, 0.0), then="skip")
    with pytest.raises(JobError, match=f'operator "strange" failed on record 1: {error.__name__}'):
        run([1], lambda stream: stream.map_async(strange, on_error=policy), backend=backend)


class Flaky:
    """Fails twice for each record, and notes when it was called, in the time of the loop."""

    def __init__(self) -> None:
        self.called_at: dict[int, list[float]] = {}

    async def __call__(self, number: int) -> int:
        called_at = self.called_at.setdefault(number, [])
        called_at.append(asyncio.get_running_loop().time())
        await asyncio.sleep(0)
        if len(called_at) < 3:
            raise ConnectionError("once more")
        return number


@pytest.mark.parametrize("how", ["retry", "on_error"])
def test_a_record_is_tried_again_after_a_pause(backend: Backends, how: str) -> None:
    flaky = Flaky()
    policy: dict[str, Any] = {how: Retry(3, (0.02, 0.03))}
    assert run(range(30), lambda stream: stream.map_async(flaky, **policy), backend=backend) == list(range(30))
    for first, second, third in flaky.called_at.values():
        assert second - first >= 0.02
        assert third - second >= 0.03


@pytest.mark.in_one_process
def test_the_last_attempt_is_followed_by_the_policy(backend: Backends) -> None:
    letters: list[DeadLetter] = []
    arrived: list[int] = []
    env = LocalEnvironment("policies", backend=backend)
    dead = env.dead_letters()
    numbers = env.from_batch(range(10))
    numbers.map_async(not_three, retry=Retry(4, (0.0, 0.0)), on_error=dead, name="check").sink(arrived.append)
    dead.sink(letters.append)
    env.submit(autostop=True)
    assert [(letter.value, letter.attempts) for letter in letters] == [(3, 4)]
    assert arrived == [0, 1, 2, 4, 5, 6, 7, 8, 9]


def test_an_error_after_several_attempts_says_so(backend: Backends) -> None:
    with pytest.raises(FunctionError, match="failed on record 3 after 2 attempts: ValueError"):
        run([3], lambda stream: stream.map_async(not_three, retry=Retry(2, (0.0, 0.0))), backend=backend)


@pytest.mark.in_one_process
def test_an_attempt_that_takes_too_long_fails(backend: Backends) -> None:
    ended: list[int] = []
    tries: Counter[int] = Counter()

    async def hang(number: int) -> int:
        tries[number] += 1
        if number != 3 or tries[3] > 2:
            return number
        try:
            await asyncio.sleep(FOREVER_S)
        finally:
            ended.append(number)
        return -1

    retry = Retry(3, (0.0, 0.0))
    arrived = run(range(5), lambda stream: stream.map_async(hang, timeout_s=0.05, retry=retry), backend=backend)
    assert arrived == [0, 1, 2, 3, 4]
    assert ended == [3, 3]
    tries.clear()
    with pytest.raises(FunctionError, match=r"failed on record 3: TimeoutError: no result within 0\.05 s"):
        run([3], lambda stream: stream.map_async(hang, timeout_s=0.05), backend=backend)


def test_a_time_out_of_the_users_own_keeps_its_words(backend: Backends) -> None:
    async def late(number: int) -> int:
        raise TimeoutError("the database was late")

    with pytest.raises(FunctionError, match="TimeoutError: the database was late"):
        run([1], lambda stream: stream.map_async(late, timeout_s=60), backend=backend)


# --- ends -------------------------------------------------------------------------------------------------------------


class Endless(BaseFunction):
    """Waits for ever, and notes what ends it."""

    def __init__(self, notes: list[str], may_cancel: Callable[[], None], count: int) -> None:
        self.notes = notes
        self.may_cancel = may_cancel
        self.left = count

    async def execute(self, data: int) -> int:
        self.left -= 1
        if self.left == 0:
            self.may_cancel()
        try:
            await asyncio.sleep(FOREVER_S)
        except asyncio.CancelledError:
            await asyncio.sleep(QUICK_S)  # a cleanup that takes its time
            self.notes.append(f"cancelled {data}")
            raise
        return data

    def close(self) -> None:
        self.notes.append("close")


@pytest.mark.in_one_process
@pytest.mark.parametrize("ordered", [True, False])
def test_a_cancel_ends_what_is_in_flight_before_the_function_is_closed(backend: Backends, ordered: bool) -> None:
    notes: list[str] = []
    env = LocalEnvironment("cancelled", backend=backend)
    function = Endless(notes, lambda: env.jobmanager.jobs[env.env_uuid].cancel(), 8)
    env.from_batch(range(100)).map_async(function, concurrency=8, ordered=ordered).sink(lambda _: notes.append("out"))
    report = env.submit().wait()
    assert sorted(notes[:-1]) == [f"cancelled {number}" for number in range(8)]
    assert notes[-1] == "close"
    assert (report.state, str(report.cleanliness)) == (Outcome.CANCELLED, "clean")
    assert report.undelivered == report.operators[0].records_out


@pytest.mark.in_one_process
def test_a_failure_ends_what_is_in_flight_too(backend: Backends) -> None:
    notes: list[str] = []
    env = LocalEnvironment("failed", backend=backend)

    class FailsLast(Endless):
        async def execute(self, data: int) -> int:
            if data == 7:
                raise ValueError("seven")
            return await super().execute(data)

    function = FailsLast(notes, lambda: None, 100)
    env.from_batch(range(8)).map_async(function, name="f", concurrency=8, ordered=False).sink(lambda _: None)
    with pytest.raises(FunctionError, match="record 7: ValueError: seven"):
        env.submit(autostop=True)
    assert notes[-1] == "close"
    assert set(notes[:-1]) <= {f"cancelled {number}" for number in range(7)}
    report = report_of(env)
    assert report.undelivered == 7


@pytest.mark.in_one_process
def test_a_failure_elsewhere_ends_what_is_in_flight(backend: Backends) -> None:
    notes: list[str] = []
    env = LocalEnvironment("failed", backend=backend)
    may_fail: list[bool] = []

    def fail() -> int | None:
        if may_fail:
            raise ValueError("the other branch")
        return None

    env.from_batch(range(8)).map_async(Endless(notes, lambda: may_fail.append(True), 8)).sink(lambda _: None)
    env.from_source(fail, name="other", delay=QUICK_S).sink(lambda _: None)
    with pytest.raises(FunctionError, match="the other branch"):
        env.submit(autostop=True)
    assert sorted(notes) == [*(f"cancelled {number}" for number in range(8)), "close"]


@pytest.mark.in_one_process
def test_a_stop_that_drains_processes_what_is_in_flight(backend: Backends) -> None:
    env = LocalEnvironment("stopped", backend=backend)
    begun: list[int] = []
    arrived: list[int] = []
    numbers = iter(range(10**9))

    async def slow(number: int) -> int:
        begun.append(number)
        if len(begun) == 5:
            env.stop(drain=True)
        await asyncio.sleep(0.05)
        return number

    env.from_source(lambda: next(numbers), delay=QUICK_S).map_async(slow, concurrency=50).sink(arrived.append)
    report = env.submit().wait()
    assert report.state is Outcome.STOPPED
    assert arrived == begun
    assert len(arrived) >= 5
    assert report.undelivered == 0


@pytest.mark.in_one_process
def test_a_stop_that_takes_too_long_cancels_what_is_in_flight(backend: Backends) -> None:
    notes: list[str] = []
    env = LocalEnvironment("stopped", backend=backend, drain_timeout_s=0.2)
    env.from_batch(range(3)).map_async(Endless(notes, env.stop, 3)).sink(lambda _: None)
    report = env.submit().wait()
    assert report.state is Outcome.STOPPED
    assert report.undelivered == 3
    assert sorted(notes) == ["cancelled 0", "cancelled 1", "cancelled 2", "close"]


def test_nothing_is_left_on_the_loop() -> None:
    loops: list[asyncio.AbstractEventLoop] = []

    async def leave(number: int) -> int:
        loops.append(asyncio.get_running_loop())
        asyncio.create_task(asyncio.sleep(FOREVER_S))  # noqa: RUF006
        await asyncio.sleep(FOREVER_S if number == 5 else 0)
        return number

    with assert_clean(ignore=["temporary *", "shared memory *"]):  # others on this machine make these
        env = LocalEnvironment("left")
        jobs: list[Any] = []
        may_begin = threading.Event()

        def cancel(number: int) -> None:
            assert may_begin.wait(20)
            if number == 4:
                jobs[0].cancel()

        env.from_batch(range(6)).map_async(leave).sink(cancel)
        jobs.append(env.submit())
        may_begin.set()
        jobs[0].wait()
    assert loops[0].is_closed()
    assert not asyncio.all_tasks(loops[0])


@pytest.mark.parametrize("blocks", [False, True], ids=["goes on", "blocks the loop"])
def test_a_coroutine_that_cannot_be_cancelled_is_given_up(blocks: bool) -> None:
    """The job ends all the same, and the report says where the coroutine stands."""
    is_there = threading.Event()
    may_end = threading.Event()

    async def stubborn(number: int) -> int:
        is_there.set()
        while not may_end.is_set():
            try:
                if blocks:
                    may_end.wait(60)
                await asyncio.sleep(0.01)
            except asyncio.CancelledError:
                continue
        return number

    env = LocalEnvironment("stubborn", drain_timeout_s=0.2, stop_timeout_s=1.0, close_timeout_s=0.2)
    env.from_batch([1]).map_async(stubborn, name="stubborn").sink(lambda _: None)
    job = env.submit()
    assert is_there.wait(20)
    with pytest.raises(JobError, match='task "stubborn -> sink" did not end in time and was abandoned'):
        job.cancel()
    may_end.set()
    report = job.report
    assert report is not None
    assert (report.state, str(report.cleanliness)) == (Outcome.CANCELLED, "dirty")
    stacks = {str(task.state): task.stack for task in report.tasks}
    assert str(stacks["abandoned"]).startswith("record 1:")
    assert "in stubborn" in str(stacks["abandoned"])


def test_a_task_that_is_given_up_starts_no_more_coroutines() -> None:
    """While its thread is stuck behind them, the loop ends those that run, and their places stay empty."""
    is_stuck = threading.Event()
    may_end = threading.Event()
    begun: list[int] = []

    async def work(number: int) -> int:
        begun.append(number)
        if number:
            await asyncio.Event().wait()
        return number

    def stick(number: int) -> None:
        is_stuck.set()
        may_end.wait(60)

    env = LocalEnvironment("stuck", drain_timeout_s=0.2, stop_timeout_s=1.0, close_timeout_s=0.2)
    stream = env.from_batch(range(10)).map_async(work, name="work", concurrency=2, ordered=False)
    stream.sink(stick, name="stick")
    job = env.submit()
    assert is_stuck.wait(20)
    with pytest.raises(JobError, match='task "work -> stick" did not end in time and was abandoned'):
        job.cancel()
    were_begun = len(begun)
    may_end.set()
    assert were_begun == len(begun) <= 3


# --- what is refused --------------------------------------------------------------------------------------------------


class Plain(MapFunction):
    def execute(self, data: int) -> int:
        return data


async def none_taken() -> None:
    """Takes no record."""


@pytest.mark.parametrize(
    ("function", "options", "text", "note"),
    [
        (lambda x: x, {}, r"map_async\(<lambda>\): <lambda> is not a coroutine function", "Write async def"),
        (Plain, {}, r"map_async\(Plain\): Plain.execute is not a coroutine function", "Write async def"),
        (none_taken, {}, "wrong arity", "map_async calls it with one record"),
        (double, {"concurrency": 0}, "concurrency is 0, which is not a positive number", None),
        (double, {"concurrency": 2.5}, "concurrency is 2.5", None),
        (double, {"timeout_s": 0}, "timeout_s is 0", "more than 0"),
        (double, {"on_error": "ignore"}, "on_error is 'ignore'", "fail"),
        (double, {"retry": Retry(), "on_error": Retry()}, "retry and on_error both say", "Leave `then` out"),
        (double, {"retry": Retry(then="skip"), "on_error": "fail"}, "retry and on_error both say", "Leave `then` out"),
        (double, {"retry": 3, "on_error": "fail"}, "map_async: retry is 3", "Give Retry"),
        (42, {}, "int is not callable", None),
    ],
)
def test_what_cannot_work_is_refused_at_once(
    function: Any, options: dict[str, Any], text: str, note: str | None
) -> None:
    with pytest.raises(GraphError, match=text) as caught:
        LocalEnvironment().from_batch([1]).map_async(function, **options)
    assert note is None or note in caught.value.__notes__[0]


# --- properties -------------------------------------------------------------------------------------------------------

Shape = tuple[int, int, bool, int]
shapes = st.lists(st.tuples(st.integers(1, 9), st.integers(1, 3), st.booleans(), st.integers(0, 2)), max_size=3)
records = st.lists(st.integers(-50, 50), max_size=80)


def awaited(values: list[int], shape: list[Shape], backend: Backends) -> list[int]:
    def build(stream: DataStream) -> DataStream:
        for concurrency, parallelism, ordered, policy in shape:

            async def step(number: int, policy: int = policy) -> int:
                await asyncio.sleep(abs(number) % 3 * 0.0005)
                if policy and number % 7 == 3:
                    raise ValueError("not this one")
                return number * 3 + 1

            stream = stream.map_async(
                step,
                concurrency=concurrency,
                parallelism=parallelism,
                ordered=ordered,
                retry=Retry(2, (0.0, 0.0)) if policy == 2 else None,
                on_error="skip" if policy else None,
            )
        return stream

    return run(values, build, backend=backend)


def expected(values: list[int], shape: list[Shape]) -> list[int]:
    for _, _, _, policy in shape:
        values = [number * 3 + 1 for number in values if not (policy and number % 7 == 3)]
    return values


def check(values: list[int], shape: list[Shape], backend: Backends) -> None:
    arrived = awaited(values, shape, backend)
    if all(ordered and parallelism == 1 for _, parallelism, ordered, _ in shape):
        assert arrived == expected(values, shape)
    else:
        assert Counter(arrived) == Counter(expected(values, shape))


@given(records, shapes, st.integers(0, 10_000))
def test_many_at_a_time_is_the_same_as_one_after_another_on_every_schedule(
    values: list[int], shape: list[Shape], seed: int
) -> None:
    check(values, shape, lambda: StepBackend(seed))


@settings(max_examples=25)
@given(records, shapes)
def test_many_at_a_time_is_the_same_as_one_after_another_on_threads(values: list[int], shape: list[Shape]) -> None:
    check(values, shape, ThreadsBackend)


# --- time -------------------------------------------------------------------------------------------------------------


def test_records_wait_at_the_same_time(clock: FairClock) -> None:
    async def wait(number: int) -> int:
        await asyncio.sleep(0.5)
        return number

    began_at = time.monotonic()
    assert run(range(100), lambda stream: stream.map_async(wait, concurrency=100)) == list(range(100))
    assert clock.elapsed_s(began_at) < 1.0


def test_a_result_is_at_the_sink_soon_after_it_is_there(clock: FairClock) -> None:
    done_at: dict[int, float] = {}
    arrived_at: dict[int, float] = {}

    async def wait(number: int) -> int:
        await asyncio.sleep(0.02 * (number % 10))
        done_at[number] = time.monotonic()
        return number

    env = LocalEnvironment("latency")
    stream = env.from_batch(range(50)).map_async(wait, concurrency=50, ordered=False)
    stream.sink(lambda number: arrived_at.__setitem__(number, time.monotonic()))
    env.submit(autostop=True)
    for number, done in done_at.items():
        if arrived_at[number] - done > 0.05:
            assert clock.elapsed_s(done, arrived_at[number]) < 0.1


def test_a_cancel_does_not_wait_for_what_sleeps(clock: FairClock) -> None:
    are_there = threading.Event()
    begun: list[int] = []

    async def wait(number: int) -> int:
        begun.append(number)
        if len(begun) == 300:
            are_there.set()
        await asyncio.sleep(FOREVER_S)
        return number

    env = LocalEnvironment("cancel")
    env.from_batch(range(1000)).map_async(wait, concurrency=300).sink(lambda _: None)
    job = env.submit()
    assert are_there.wait(20)
    asked_at = time.monotonic()
    job.cancel()
    assert clock.elapsed_s(asked_at) < 0.5
