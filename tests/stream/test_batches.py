"""`map_batches`: how batches fill, what their functions may return, and what follows when one fails."""

from __future__ import annotations

import asyncio
import itertools
import subprocess
import sys
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
    DeadLetter,
    FunctionError,
    GraphError,
    JobError,
    LocalEnvironment,
    MapFunction,
    Outcome,
    Retry,
    StopSignal,
)
from sage._backends.threads import ThreadsBackend
from sage._operators.batched import RUN_S
from sage.testing import StepBackend, run

if TYPE_CHECKING:
    from collections.abc import Callable

    from support.fair_clock import FairClock

    from sage._runtime.backend import Backend
    from sage.stream import DataStream

    Backends = Callable[[], Backend]


def doubled(batch: list[int]) -> list[int]:
    return [number * 2 for number in batch]


def without_threes(batch: list[int]) -> list[int]:
    if any(number % 10 == 3 for number in batch):
        raise ValueError("a three")
    return batch


# --- batches ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("max_records", [1, 7, 5000])
def test_results_keep_the_order_of_their_records(backend: Backends, max_records: int) -> None:
    arrived = run(range(300), lambda stream: stream.map_batches(doubled, max_records=max_records), backend=backend)
    assert arrived == [number * 2 for number in range(300)]


@pytest.mark.in_one_process
def test_no_batch_is_larger_than_it_may_be(backend: Backends) -> None:
    sizes: list[int] = []

    def note(batch: list[int]) -> list[int]:
        assert type(batch) is list
        sizes.append(len(batch))
        return batch

    assert run(range(100), lambda stream: stream.map_batches(note, max_records=16), backend=backend) == [*range(100)]
    assert sum(sizes) == 100
    assert 1 <= min(sizes) <= max(sizes) <= 16


def test_batches_that_may_wait_are_full_until_the_stream_ends(backend: Backends) -> None:
    def size(batch: list[int]) -> list[int]:
        return [len(batch)] * len(batch)

    arrived = run(
        range(100), lambda stream: stream.map_batches(size, max_records=30, max_wait_s=3600.0), backend=backend
    )
    assert arrived == [30] * 90 + [10] * 10


@pytest.mark.in_one_process
def test_a_record_waits_no_longer_than_it_may(backend: Backends) -> None:
    """The second record comes when the first has arrived, so that a batch of two would never be full."""
    has_arrived = threading.Event()
    numbers = iter([1, 2])

    def next_number() -> int | StopSignal | None:
        if has_arrived.is_set() or not arrived_any:
            arrived_any.append(True)
            return next(numbers, StopSignal())
        return None

    arrived_any: list[bool] = []
    arrived: list[int] = []

    def arrive(number: int) -> None:
        arrived.append(number)
        has_arrived.set()

    env = LocalEnvironment("waits", backend=backend)
    env.from_source(next_number).map_batches(doubled, max_records=2, max_wait_s=0.05).sink(arrive)
    env.submit(autostop=True)
    assert arrived == [2, 4]


def test_what_is_there_makes_a_batch_when_nothing_may_wait() -> None:
    """While the function works, records gather; the next batch takes all of them."""
    may_go_on = threading.Event()
    sizes: list[int] = []

    def slow(batch: list[int]) -> list[int]:
        assert may_go_on.wait(20)
        sizes.append(len(batch))
        return batch

    numbers = iter(range(50))

    def next_number() -> int | StopSignal:
        number = next(numbers, None)
        if number is None:
            may_go_on.set()
            return StopSignal()
        return number

    env = LocalEnvironment("gather")
    env.from_source(next_number).map_batches(slow, max_records=50).sink(lambda _: None)
    env.submit(autostop=True)
    assert sum(sizes) == 50
    assert len(sizes) <= 2


class Scaled(MapFunction):
    def __init__(self, factor: int) -> None:
        self.factor = factor

    def open(self) -> None:
        self.is_open = True

    def execute(self, data: list[int]) -> list[int]:
        assert self.is_open
        return [number * self.factor for number in data]


class AsyncScaled(Scaled):
    async def execute(self, data: list[int]) -> list[int]:  # type: ignore[override]
        await asyncio.sleep(0)
        return super().execute(data)


@pytest.mark.parametrize(
    "build",
    [
        lambda stream: stream.map_batches(Scaled, 2),
        lambda stream: stream.map_batches(Scaled(2)),
        lambda stream: stream.map_batches(AsyncScaled, 2),
        lambda stream: stream.map_batches(lambda batch: tuple(doubled(batch))),
        lambda stream: stream.map_batches(doubled, parallelism=2).map(lambda number: number),
    ],
    ids=["class", "instance", "coroutine", "tuple", "two tasks"],
)
def test_every_form_of_a_function_is_taken(backend: Backends, build: Callable[[DataStream], DataStream]) -> None:
    assert sorted(run(range(20), build, backend=backend)) == [number * 2 for number in range(20)]


def test_arrays_go_in_and_come_out() -> None:
    numpy = pytest.importorskip("numpy")
    types: set[Any] = set()

    def shifted(batch: Any) -> Any:
        types.add((type(batch), batch.ndim))
        return batch + 0.5

    arrived = run([1, 2, 3], lambda stream: stream.map_batches(shifted, batch_format="numpy", max_records=2))
    assert arrived == [1.5, 2.5, 3.5]
    assert types == {(numpy.ndarray, 1)}
    rows = run([[1, 2], [3, 4]], lambda stream: stream.map_batches(lambda batch: batch * 2, batch_format="numpy"))
    assert [row.tolist() for row in rows] == [[2, 4], [6, 8]]


def test_numpy_is_imported_when_it_is_used_and_not_before() -> None:
    program = """
import sys
from sage.testing import run
assert run([1, 2], lambda stream: stream.map_batches(lambda batch: batch)) == [1, 2]
assert "numpy" not in sys.modules
sys.modules["numpy"] = None
try:
    run([1], lambda stream: stream.map_batches(lambda batch: batch, batch_format="numpy", name="scale"))
except Exception as error:
    print(error)
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert 'operator "scale" failed to open: ModuleNotFoundError' in done.stdout


# --- keys, requests, loops --------------------------------------------------------------------------------------------


def test_keys_stay_with_their_records(backend: Backends) -> None:
    def build(stream: DataStream) -> DataStream:
        keyed: Any = stream.keyby(lambda number: number % 4).map_batches(doubled, max_records=5)
        return keyed.reduce(lambda a, b: a + b, emit="last")  # type: ignore[no-any-return]

    arrived = run(range(40), build, backend=backend)
    assert sorted(arrived) == sorted(2 * sum(range(rest, 40, 4)) for rest in range(4))


def test_records_with_and_without_keys_share_a_batch(backend: Backends) -> None:
    env = LocalEnvironment("mixed", backend=backend)
    keyed = env.from_batch(range(10)).keyby(lambda number: number)
    arrived: list[int] = []
    env.from_batch(range(10, 20)).union(keyed).map_batches(doubled, max_records=20, max_wait_s=9.0).sink(arrived.append)
    env.submit(autostop=True)
    assert sorted(arrived) == [number * 2 for number in range(20)]


def test_each_request_gets_its_own_answer_or_the_error_of_its_batch(backend: Backends) -> None:
    env = LocalEnvironment("served")
    checked = env.serve("checked", lambda requests: requests.map_batches(without_threes, max_records=8, max_wait_s=0.0))
    answers: list[Any] = []

    def ask(number: int) -> Any:
        try:
            return checked.process(number)
        except ValueError as error:
            return str(error)

    env.from_batch([1, 2, 3, 4]).map(ask).sink(answers.append)
    env.submit(autostop=True)
    assert answers == [1, 2, "a three", 4]


def test_a_loop_waits_for_a_batch_that_fills(backend: Backends) -> None:
    arrived: list[int] = []
    env = LocalEnvironment("loop", backend=backend)
    loop = env.from_future("loop")
    lower = env.from_batch([3, 10, 0, 7]).union(loop).filter(lambda number: number > 0)
    fewer = lower.map_batches(lambda batch: [number - 1 for number in batch], max_records=3, max_wait_s=0.005)
    fewer.fill_future(loop)
    fewer.sink(arrived.append)
    env.submit(autostop=True)
    assert sorted(arrived) == sorted(number for first in (3, 10, 0, 7) for number in range(first))


# --- failures ---------------------------------------------------------------------------------------------------------


class Array:
    """What numpy's arrays of no dimension are: they have a method for a length that they do not have."""

    ndim = 0

    def __len__(self) -> int:
        raise TypeError("len() of unsized object")


@pytest.mark.parametrize(
    ("function", "text"),
    [
        (lambda batch: batch[1:], "ValueError: 4 records went in, and 3 results came out"),
        (lambda batch: [*batch, 1], "ValueError: 4 records went in, and 5 results came out"),
        (lambda batch: None, "TypeError: 4 records went in, and a NoneType came out"),
        (lambda batch: (number for number in batch), "TypeError: 4 records went in, and a generator came out"),
        (lambda batch: "abcd", "TypeError: 4 records went in, and a str came out"),
        (lambda batch: set(batch), "TypeError: 4 records went in, and a set came out"),
        (lambda batch: Array(), "TypeError: 4 records went in, and a Array came out"),
    ],
    ids=["fewer", "more", "none", "generator", "text", "set", "array of no dimension"],
)
def test_another_number_of_results_is_an_error_that_says_both(backend: Backends, function: Any, text: str) -> None:
    with pytest.raises(FunctionError, match=f'operator "f" failed on 4 records from 5 on: {text}') as caught:
        run(
            [5, 6, 7, 8],
            lambda stream: stream.map_batches(function, name="f", max_records=4, max_wait_s=60.0),
            backend=backend,
        )
    assert caught.value.__cause__ is not None
    assert "one result for each record" in caught.value.__cause__.__notes__[0]


def checked(batch: list[int]) -> list[int | ValueError]:
    return [ValueError("a three") if number % 10 == 3 else number for number in batch]


@pytest.mark.parametrize(
    ("function", "lost"),
    [(without_threes, [*range(5), *range(10, 15)]), (checked, [3, 13])],
    ids=["a batch that fails", "an error in the place of a result"],
)
def test_what_fails_is_skipped_or_handed_over(backend: Backends, function: Any, lost: list[int]) -> None:
    """The whole batch where the function raises, and one record where an error stands in the place of its result."""
    letters: list[DeadLetter] = []
    arrived: list[int] = []
    env = LocalEnvironment("policies", backend=backend)
    dead = env.dead_letters("lost")
    numbers = env.from_batch(range(20))
    options: dict[str, Any] = {"max_records": 5, "max_wait_s": 60.0}
    numbers.map_batches(function, name="sent", on_error=dead, **options).sink(arrived.append)
    numbers.map_batches(function, name="skipped", on_error="skip", **options).sink(arrived.append)
    dead.sink(letters.append)
    env.submit(autostop=True)
    assert sorted(arrived) == sorted(2 * [number for number in range(20) if number not in lost])
    assert [letter.value for letter in letters] == lost
    assert {(letter.operator, letter.attempts, str(letter.error)) for letter in letters} == {("sent", 1, "a three")}
    for name in ("sent", "skipped"):
        counts = report_of(env).operator(name)
        assert (counts.records_in, counts.records_out, counts.failed) == (20, 20 - len(lost), len(lost))


def test_a_record_that_fails_alone_keeps_the_keys_of_the_others(backend: Backends) -> None:
    arrived = run(
        range(12),
        lambda stream: (
            stream.keyby(lambda number: number % 2)
            .map_batches(checked, max_records=12, max_wait_s=60.0, on_error="skip")
            .reduce(lambda one, other: one + other)
        ),
        backend=backend,
    )
    assert {0 + 2 + 4 + 6 + 8 + 10, 1 + 5 + 7 + 9 + 11} <= set(arrived)


@pytest.mark.in_one_process
def test_a_record_that_fails_alone_fails_the_job_after_those_before_it(backend: Backends) -> None:
    arrived: list[int] = []
    env = LocalEnvironment("fails", backend=backend)
    env.from_batch(range(10), name="numbers").map_batches(checked, name="f", max_records=10, max_wait_s=60.0).sink(
        arrived.append
    )
    with pytest.raises(JobError, match='operator "f" failed on record 3: ValueError: a three'):
        env.submit(autostop=True)
    assert arrived == [0, 1, 2]
    report = report_of(env)
    counts = report.operator("f")
    assert (counts.records_in, counts.records_out, counts.failed, report.undelivered) == (3, 3, 1, 6)


@pytest.mark.in_one_process
def test_all_that_came_before_a_record_that_fails_alone_arrives_also_at_the_end_of_the_stream(
    backend: Backends,
) -> None:
    arrived: list[int] = []
    env = LocalEnvironment("fails", backend=backend)
    stream = env.from_batch(range(10)).map_batches(checked, name="f", max_records=11, max_wait_s=60.0)
    stream.flatmap(lambda number: [number] * 5).sink(arrived.append)
    with pytest.raises(FunctionError, match='operator "f" failed on record 3: ValueError: a three'):
        env.submit(autostop=True)
    assert arrived == [0] * 5 + [1] * 5 + [2] * 5


def once_more(number: int) -> int:
    raise ConnectionError(f"{number} once more")


@pytest.mark.parametrize("seed", range(10))
@pytest.mark.parametrize(
    "then",
    [
        lambda stream: stream.flatmap(lambda _: itertools.count()),
        lambda stream: stream.map(once_more, on_error=Retry(2, (3600.0, 3600.0))),
    ],
    ids=["an endless generator", "a long pause"],
)
def test_a_failure_does_not_wait_for_ever_for_what_came_before_it(then: Callable[[Any], DataStream], seed: int) -> None:
    def build(stream: DataStream) -> DataStream:
        found = stream.map_batches(checked, name="f", max_records=2, max_wait_s=60.0)
        return then(found).filter(lambda _: False)

    with pytest.raises(FunctionError, match='operator "f" failed on record 3: ValueError: a three'):
        run([1, 3], build, backend=partial(StepBackend, seed))


def test_the_end_of_the_interpreter_in_the_place_of_a_result_is_neither_skipped_nor_tried_again(
    backend: Backends,
) -> None:
    def exits(batch: list[int]) -> list[Any]:
        return [ValueError("a three"), SystemExit("enough")]

    env = LocalEnvironment("exits", backend=backend)
    options: dict[str, Any] = {"max_records": 2, "max_wait_s": 60.0, "on_error": Retry(3, (0.0, 0.0), then="skip")}
    env.from_batch([3, 4]).map_batches(exits, name="f", **options)
    with pytest.raises(JobError, match='operator "f" failed on record 4: SystemExit: enough'):
        env.submit(autostop=True)


def test_requests_that_fail_alone_are_answered_with_their_errors(backend: Backends) -> None:
    answers: list[Any] = []
    env = LocalEnvironment("served", backend=backend)
    service = env.serve("checked", lambda requests: requests.map_batches(checked, max_records=4, max_wait_s=0.001))

    def ask(number: int) -> Any:
        try:
            return service.process(number)
        except ValueError as error:
            return str(error)

    env.from_batch(range(8)).map(ask, parallelism=3).sink(answers.append)
    env.submit(autostop=True)
    assert Counter(answers) == Counter([0, 1, 2, "a three", 4, 5, 6, 7])


@pytest.mark.in_one_process
def test_a_batch_in_which_a_record_failed_is_tried_again_as_it_was(backend: Backends) -> None:
    seen: list[list[int]] = []

    def flaky(batch: list[int]) -> list[Any]:
        seen.append(batch)
        return [ConnectionError("once more") if number == 2 and len(seen) < 3 else number for number in batch]

    options: dict[str, Any] = {"max_records": 4, "max_wait_s": 60.0, "on_error": Retry(3, (0.001, 0.001))}
    assert run(range(4), lambda stream: stream.map_batches(flaky, **options), backend=backend) == [0, 1, 2, 3]
    assert seen == [[0, 1, 2, 3]] * 3
    with pytest.raises(FunctionError, match="failed on record 3 after 3 attempts: ValueError: a three"):
        run([3], lambda stream: stream.map_batches(checked, **options), backend=backend)


def test_the_same_batch_is_tried_again_after_a_pause(backend: Backends) -> None:
    seen: list[list[int]] = []

    def flaky(batch: list[int]) -> list[int]:
        seen.append(list(batch))
        if len(seen) % 3:
            raise ConnectionError("once more")
        return batch

    retry = Retry(3, (0.001, 0.002))
    arrived = run(range(50), lambda stream: stream.map_batches(flaky, max_records=9, on_error=retry), backend=backend)
    assert arrived == list(range(50))
    assert seen[0::3] == seen[1::3] == seen[2::3]


def test_an_error_after_several_attempts_says_so(backend: Backends) -> None:
    with pytest.raises(FunctionError, match="failed on 1 record from 3 on after 2 attempts: ValueError: a three"):
        run([3], lambda stream: stream.map_batches(without_threes, on_error=Retry(2, (0.001, 0.001))), backend=backend)


@pytest.mark.in_one_process
def test_what_came_before_a_batch_that_fails_has_arrived(backend: Backends) -> None:
    arrived: list[int] = []
    env = LocalEnvironment("fails", backend=backend)
    stream = env.from_batch(range(40), name="numbers")
    stream.map_batches(without_threes, name="f", max_records=1).sink(arrived.append)
    with pytest.raises(JobError, match='operator "f" failed on 1 record from 3 on'):
        env.submit(autostop=True)
    assert arrived == [0, 1, 2]
    report = report_of(env)
    assert report.operator("numbers").records_out == 3 + 1 + report.undelivered


@pytest.mark.in_one_process
def test_a_cancel_drops_and_counts_what_waits(backend: Backends) -> None:
    env = LocalEnvironment("cancelled", backend=backend)
    left = iter(range(5))

    def next_number() -> int | None:
        number = next(left, None)
        if number is None:
            env.jobmanager.jobs[env.env_uuid].cancel()
        return number

    called: list[Any] = []

    def note(batch: list[int]) -> list[int]:
        called.append(batch)
        return batch

    env.from_source(next_number).map_batches(note, max_wait_s=3000.0)
    report = env.submit().wait()
    assert report.state is Outcome.CANCELLED
    assert called == []
    assert report.undelivered == report.operators[0].records_out == 5


def test_a_stop_processes_what_waits(backend: Backends) -> None:
    env = LocalEnvironment("stopped", backend=backend)
    left = iter(range(5))
    arrived: list[int] = []

    def next_number() -> int | None:
        number = next(left, None)
        if number is None:
            env.stop()
        return number

    env.from_source(next_number).map_batches(doubled, max_wait_s=3000.0).sink(arrived.append)
    report = env.submit().wait()
    assert report.state is Outcome.STOPPED
    assert arrived == [0, 2, 4, 6, 8]


@pytest.mark.parametrize(
    ("function", "options", "text"),
    [
        (doubled, {"max_records": 0}, "max_records is 0, which is not a positive number"),
        (doubled, {"max_wait_s": -1}, "max_wait_s is -1"),
        (doubled, {"max_wait_s": float("inf")}, "max_wait_s is inf"),
        (doubled, {"batch_format": "pandas"}, "batch_format is 'pandas'"),
        (lambda: [], {}, "wrong arity"),
        (lambda one, two: [], {}, "wrong arity"),
        ([1], {}, "list is not callable"),
    ],
)
def test_what_cannot_work_is_refused_at_once(function: Any, options: dict[str, Any], text: str) -> None:
    with pytest.raises(GraphError, match=text):
        LocalEnvironment().from_batch([1]).map_batches(function, **options)


# --- many calls in one step -------------------------------------------------------------------------------------------


def firsts_of(records: int, size: int) -> list[int]:
    return [*range(0, records, size)]


@pytest.mark.in_one_process
@pytest.mark.parametrize("size", [1, 3, 8, 100])
@pytest.mark.parametrize("source", [[*range(250)], range(250)], ids=["list", "range"])
def test_every_call_gets_a_list_of_its_own(backend: Backends, size: int, source: Any) -> None:
    """A function may change its argument: neither the source nor the next call sees it."""
    firsts: list[int] = []

    def change(batch: list[int]) -> list[int]:
        firsts.append(batch[0])
        results = [*batch]
        batch.clear()
        return results

    def build(stream: DataStream[int]) -> DataStream[int]:
        return stream.map_batches(change, max_records=size, max_wait_s=3600.0)

    assert run(source, build, backend=backend) == [*range(250)]
    assert firsts == firsts_of(250, size)
    assert [*source] == [*range(250)]


@pytest.mark.in_one_process
@pytest.mark.parametrize("way", ["raises", "gives an error", "gives too few"])
def test_a_batch_in_the_middle_is_tried_again_before_the_next_one(backend: Backends, way: str) -> None:
    calls: list[int] = []

    def flaky(batch: list[int]) -> list[Any]:
        calls.append(batch[0])
        if batch[0] in (0, 60, 63) and calls.count(batch[0]) < 3:
            if way == "raises":
                raise ConnectionError("once more")
            return [ConnectionError("once more"), *batch[1:]] if way == "gives an error" else batch[1:]
        return batch

    def build(stream: DataStream[int]) -> DataStream[int]:
        return stream.map_batches(flaky, max_records=3, max_wait_s=3600.0, on_error=Retry(3, (0.001, 0.001)))

    assert run(range(100), build, backend=backend) == [*range(100)]
    expected = [first for first in firsts_of(100, 3) for _ in range(3 if first in (0, 60, 63) else 1)]
    assert calls == expected


def test_results_before_and_after_batches_that_fail_keep_their_keys(backend: Backends) -> None:
    letters: list[DeadLetter] = []
    env = LocalEnvironment("keys", backend=backend)
    dead = env.dead_letters()
    dead.sink(letters.append)
    checked_batches = (
        env.from_batch(range(200))
        .keyby(lambda number: number % 7)
        .map_batches(without_threes, max_records=4, max_wait_s=3600.0, on_error=dead)
    )
    sums: dict[int, int] = {}
    checked_batches.reduce(lambda left, right: left + right, emit="last").sink(
        lambda total: sums.update({total: sums.get(total, 0) + 1})
    )
    env.submit(autostop=True)
    lost = [
        number
        for first in firsts_of(200, 4)
        for number in range(first, first + 4)
        if any(other % 10 == 3 for other in range(first, first + 4))
    ]
    kept = [number for number in range(200) if number not in lost]
    assert [letter.value for letter in letters] == lost
    totals = [sum(number for number in kept if number % 7 == key) for key in range(7)]
    assert sums == Counter(totals)


@pytest.mark.in_one_process
def test_a_failure_in_the_middle_lets_the_results_before_it_arrive(backend: Backends) -> None:
    arrived: list[int] = []
    calls: list[int] = []

    def fails_late(batch: list[int]) -> list[int]:
        calls.append(batch[0])
        if batch[0] == 90:
            raise ValueError("late")
        return batch

    env = LocalEnvironment("late", backend=backend)
    env.from_batch(range(200)).map_batches(fails_late, max_records=2, max_wait_s=3600.0, name="f").sink(arrived.append)
    with pytest.raises(FunctionError, match='operator "f" failed on 2 records from 90 on: ValueError: late'):
        env.submit(autostop=True)
    assert arrived == [*range(90)]
    assert calls == firsts_of(92, 2)


def test_a_cancel_ends_the_calls_of_a_fast_function() -> None:
    """The cancel arrives while a call runs; although more batches wait, that call is the last one."""
    calls: list[int] = []
    env = LocalEnvironment("cancelled")

    class Cancelling(MapFunction):
        def execute(self, data: list[int]) -> list[int]:
            calls.append(data[0])
            if data[0] == 40:
                env.jobmanager.jobs[env.env_uuid].cancel()
                assert not self.ctx.wait(20)
            return data

    env.from_batch(range(2000)).map_batches(Cancelling, max_records=1, max_wait_s=3600.0).sink(lambda _: None)
    assert env.submit().wait().state is Outcome.CANCELLED
    assert calls == [*range(41)]


def test_results_do_not_wait_for_many_calls_that_take_long() -> None:
    """Each call of a few milliseconds lets its results go on before the next one begins."""
    arrived: list[int] = []
    seen: list[int] = []

    def sleepy(batch: list[int]) -> list[int]:
        seen.append(len(arrived))
        time.sleep(RUN_S * 2)
        return batch

    env = LocalEnvironment("sleepy")
    env.from_batch(range(20)).map_batches(sleepy, max_records=1, max_wait_s=3600.0).sink(arrived.append)
    env.submit(autostop=True)
    assert seen == [*range(20)]


# --- properties -------------------------------------------------------------------------------------------------------

Shape = tuple[int, int, int, bool]
shapes = st.lists(
    st.tuples(st.integers(1, 9), st.integers(1, 3), st.integers(0, 2), st.booleans()), min_size=1, max_size=3
)
records = st.lists(st.integers(-50, 50), max_size=100)


def check(values: list[int], shape: list[Shape], backend: Backends) -> None:
    def build(stream: DataStream) -> DataStream:
        for max_records, parallelism, wait, tries in shape:
            failed: Counter[tuple[int, ...]] = Counter()

            def step(batch: list[int], failed: Counter[tuple[int, ...]] = failed, tries: bool = tries) -> list[int]:
                failed[tuple(batch)] += 1
                if tries and failed[tuple(batch)] == 1:
                    raise ConnectionError("once more")
                return [number * 3 + 1 for number in batch]

            stream = stream.map_batches(
                step,
                max_records=max_records,
                max_wait_s=wait * 0.001,
                parallelism=parallelism,
                on_error=Retry(9, (0.0, 0.0)),
            )
        return stream

    arrived = run(values, build, backend=backend)
    for _ in shape:
        values = [number * 3 + 1 for number in values]
    if all(parallelism == 1 for _, parallelism, _, _ in shape):
        assert arrived == values
    else:
        assert Counter(arrived) == Counter(values)


@given(records, shapes, st.integers(0, 10_000))
def test_batches_give_what_single_records_give_on_every_schedule(
    values: list[int], shape: list[Shape], seed: int
) -> None:
    check(values, shape, lambda: StepBackend(seed))


@settings(max_examples=25)
@given(records, shapes)
def test_batches_give_what_single_records_give_on_threads(values: list[int], shape: list[Shape]) -> None:
    check(values, shape, ThreadsBackend)


# --- time -------------------------------------------------------------------------------------------------------------


def test_a_record_that_waits_for_others_goes_on_in_time(clock: FairClock) -> None:
    sent_at: list[float] = []
    arrived_at: list[float] = []
    has_arrived = threading.Event()

    def next_number() -> int | StopSignal:
        if sent_at:
            assert has_arrived.wait(20)
            return StopSignal()
        sent_at.append(time.monotonic())
        return 1

    def arrive(_: int) -> None:
        arrived_at.append(time.monotonic())
        has_arrived.set()

    env = LocalEnvironment("waits")
    env.from_source(next_number).map_batches(doubled, max_records=10, max_wait_s=0.2).sink(arrive)
    env.submit(autostop=True)
    assert arrived_at[0] - sent_at[0] >= 0.2
    assert clock.elapsed_s(sent_at[0], arrived_at[0]) < 0.5
