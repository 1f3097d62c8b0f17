"""Tasks that share a thread: many tasks need few threads, and one that waits keeps no other from going on."""

from __future__ import annotations

import threading
import time
from collections import Counter
from itertools import groupby
from typing import TYPE_CHECKING, Any, cast

import pytest

from sage import LocalEnvironment, MapFunction, SinkFunction
from sage._backends.pool import Pool, Seat, Worker, may_share

if TYPE_CHECKING:
    from sage._runtime.task import Task
    from sage.stream import DataStream

WAIT_S = 20.0


def threads_of_jobs() -> set[threading.Thread]:
    return {thread for thread in threading.enumerate() if thread.name.startswith("sage-")}


def into(stream: DataStream, branches: int) -> tuple[list[list[Any]], list[int]]:
    """Add branches to a stream, and return what arrives in each, and how many threads each of them saw."""
    arrived: list[list[Any]] = [[] for _ in range(branches)]
    seen: list[int] = []
    for out in arrived:
        stream.map(lambda value: value + 1).sink(out.append)
    stream.sink(lambda _: seen.append(len(threads_of_jobs())))
    return arrived, seen


def test_three_hundred_branches_get_everything_in_order_from_few_threads() -> None:
    """Each branch gets all records, in order."""
    env = LocalEnvironment("branches")
    arrived, seen = into(env.from_batch(range(500)), 300)
    env.submit(autostop=True)
    assert arrived == [list(range(1, 501))] * 300
    # One for the supervisor, and one for the tasks; more only while the machine keeps those from running.
    assert sorted(seen)[len(seen) // 2] < 20


def test_two_hundred_sources_go_into_one_operator_from_few_threads() -> None:
    env = LocalEnvironment("sources")
    first, *others = (env.from_batch([(number, place) for place in range(50)]) for number in range(200))
    arrived: list[tuple[int, int]] = []
    seen: list[int] = []
    union = first.union(*others)
    union.sink(arrived.append)
    union.sink(lambda _: seen.append(len(threads_of_jobs())))
    env.submit(autostop=True)
    for number in range(200):
        assert [place for one, place in arrived if one == number] == list(range(50))
    assert sorted(seen)[len(seen) // 2] < 20


def test_a_branch_that_waits_keeps_no_other_branch_from_going_on() -> None:
    env = LocalEnvironment("one waits")
    others_are_done = threading.Event()
    arrived: list[int] = []

    def wait(_: int) -> None:
        assert others_are_done.wait(WAIT_S)

    def arrive(value: int) -> None:
        arrived.append(value)
        if len(arrived) == 3 * 100:
            others_are_done.set()

    stream = env.from_batch(range(100))
    stream.sink(arrive)
    stream.sink(wait, capacity=100)
    stream.sink(arrive)
    stream.map(lambda value: value).sink(arrive)
    began_at = time.monotonic()
    env.submit(autostop=True)
    assert time.monotonic() - began_at < WAIT_S
    assert Counter(arrived) == dict.fromkeys(range(100), 3)


def test_branches_that_all_wait_for_one_another_go_on_together() -> None:
    env = LocalEnvironment("all wait")
    barrier = threading.Barrier(20)
    stream = env.from_batch([1, 2])
    for _ in range(20):
        stream.sink(lambda _: barrier.wait(WAIT_S))
    env.submit(autostop=True)


def test_branches_that_take_a_millisecond_each_do_not_wait_for_one_another() -> None:
    """A task that takes long for a record gets a thread, although none of its steps takes long."""
    env = LocalEnvironment("slow branches")
    stream = env.from_batch(range(400))
    inside: set[int] = set()
    together = 0

    for number in range(4):

        def slow(_: int, number: int = number) -> None:
            nonlocal together
            inside.add(number)
            time.sleep(0.001)
            together = max(together, len(inside))
            inside.discard(number)

        stream.sink(slow, capacity=400)
    env.submit(autostop=True)
    assert together >= 3


def test_a_task_that_is_fast_again_shares_a_thread_again() -> None:
    env = LocalEnvironment("slow at first")
    names: list[str] = []

    def work(value: int) -> int:
        if value < 20:
            time.sleep(0.005)
        names.append(threading.current_thread().name)
        return value

    stream = env.from_batch(range(400_000))
    stream.map(work, name="work").sink(lambda _: None)
    stream.sink(lambda _: None)
    env.submit(autostop=True)
    assert names[0] == "sage-tasks"
    kept_at = next(place for place, name in enumerate(names) if name != "sage-tasks")
    assert "sage-tasks" in names[kept_at:]


def test_a_task_that_stays_slow_is_tried_on_the_shared_thread_again() -> None:
    """Many threads that wait for the interpreter's lock all seem slow, and would stay many."""
    env = LocalEnvironment("slow")
    names: list[str] = []

    def work(value: int) -> None:
        time.sleep(0.001)
        names.append(threading.current_thread().name)

    stream = env.from_batch(range(500))
    stream.sink(work, name="work", capacity=8)
    stream.sink(lambda _: None)
    env.submit(autostop=True)
    threads = [name for name, _ in groupby(names)]
    assert threads[:4] == ["sage-tasks", "sage-work", "sage-tasks", "sage-work"]
    assert len(threads) < 10


def test_a_step_is_stuck_when_it_is_seen_twice() -> None:
    worker = Worker()
    worker.since = 100.0
    assert not worker.is_stuck(200.0)  # it steps no task
    worker.seat = Seat(cast("Task", None), Pool(None), may_share=True)
    assert not worker.is_stuck(100.009)
    assert not worker.is_stuck(101.0)  # the whole process may have stood still
    assert worker.is_stuck(101.01)
    worker.since = 101.02  # the next step
    assert not worker.is_stuck(101.04)


class Bound(SinkFunction):
    """Holds what only the thread that made it may use."""

    def open(self) -> None:
        """Note the thread."""
        self.threads = {threading.get_ident()}

    def execute(self, data: int) -> None:
        """Note the thread, and take long now and then."""
        self.threads.add(threading.get_ident())
        time.sleep(0.0001)

    def close(self) -> None:
        """Note the thread."""
        self.threads.add(threading.get_ident())


def test_a_function_with_hooks_is_called_by_one_thread_only() -> None:
    env = LocalEnvironment("bound")
    stream = env.from_batch(range(300))
    bound = [Bound() for _ in range(5)]
    for function in bound:
        stream.sink(function)
        stream.sink(lambda _: time.sleep(0.0005))
    env.submit(autostop=True)
    assert [len(function.threads) for function in bound] == [1] * 5


class Plain(MapFunction):
    """Has no hook."""

    def execute(self, data: int) -> int:
        """Return the record."""
        return data


class WithConstructor(Plain):
    """Is made by the task that calls it."""

    def __init__(self) -> None:
        self.threads = {threading.get_ident()}


async def awaited(value: int) -> int:
    return value


@pytest.mark.parametrize(
    ("build", "expected"),
    [
        (lambda env: env.from_batch([1]).map(abs), True),
        (lambda env: env.from_batch(range(3)).map(Plain), True),
        (lambda env: env.from_batch((1, 2)).map(Plain()), True),
        (lambda env: env.from_batch((1, 2)).map(WithConstructor()), True),
        (lambda env: env.from_batch([1]).map(WithConstructor), False),
        (lambda env: env.from_batch([1]).sink(Bound), False),
        (lambda env: env.from_batch([1]).sink(Bound()), False),
        (lambda env: env.from_batch([1]).map(awaited), False),
        (lambda env: env.from_batch(value for value in [1]), False),
        (lambda env: env.from_batch(lambda: [1]), False),
        (lambda env: env.from_source(lambda: None), False),
        (lambda env: env.from_batch([1]).map_batches(list, max_records=3), False),
    ],
)
def test_what_may_share_a_thread(build: Any, expected: bool) -> None:
    env = LocalEnvironment("kinds")
    build(env)
    assert may_share(tuple(env._graph().nodes.values())) is expected


def test_no_thread_is_left_when_a_job_ends_in_any_way() -> None:
    def failing(value: int) -> int:
        if value == 50:
            raise ValueError("this one")
        return value

    before = threads_of_jobs()
    for number in range(20):
        env = LocalEnvironment("ends")
        stream = env.from_batch(range(100))
        for _ in range(10):
            stream.sink(lambda _: None)
        if number % 2:
            stream.sink(lambda _: time.sleep(0.0003))
        if number % 3 == 0:
            stream.map(failing, name="failing").sink(lambda _: None)
            with pytest.raises(Exception, match="this one"):
                env.submit(autostop=True)
        else:
            env.submit(autostop=True)
        assert threads_of_jobs() == before
