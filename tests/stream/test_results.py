"""Results without a sink: lists, loops over what arrives, and the methods that are made of others."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Iterator
from itertools import count
from typing import TYPE_CHECKING, Any

import pytest

from sage import FunctionError, GraphError, LocalEnvironment, MapFunction, Outcome, ServiceStartError
from sage._handover import RECORDS_MAX
from sage.errors import DuplicateNameError
from sage.testing import StepBackend, assert_clean, run

if TYPE_CHECKING:
    from sage._runtime.backend import Backend

    Backends = Callable[[], Backend]


class Noted:
    """A service that notes its life."""

    def __init__(self, journal: list[str]) -> None:
        self.journal = journal
        journal.append("built")

    def double(self, number: int) -> int:
        return number * 2

    def close(self) -> None:
        self.journal.append("closed")


class Broken(Noted):
    def setup(self) -> None:
        raise OSError("no disk")


def endless(env: LocalEnvironment) -> Any:
    numbers = count()
    return env.from_source(lambda: next(numbers))


def test_run_returns_the_report(backend: Backends) -> None:
    env = LocalEnvironment("run", backend=backend)
    env.from_batch([1, 2]).map(lambda x: x + 1, name="plus").sink(lambda x: None)
    report = env.run()
    assert report.state is Outcome.COMPLETED
    assert report.operator("plus").records_in == 2


def test_run_raises_what_failed(backend: Backends) -> None:
    env = LocalEnvironment("run", backend=backend)
    env.from_batch([0]).map(lambda x: 1 // x).sink(lambda x: None)
    with pytest.raises(FunctionError, match="ZeroDivisionError"):
        env.run()


def test_collect_returns_what_arrives_with_services_and_again(backend: Backends) -> None:
    journal: list[str] = []
    env = LocalEnvironment("collect", backend=backend)
    doubler = env.register_service("doubler", Noted, journal)
    numbers = env.from_batch([1, 2, 3])
    doubled = numbers.map(doubler.double)
    assert doubled.collect() == [2, 4, 6]
    assert numbers.filter(lambda x: x > 1).collect() == [2, 3]
    assert doubled.map(lambda x: x + 1, name="plus").collect() == [3, 5, 7]
    assert journal == ["built", "closed"] * 3


def test_collect_runs_the_other_branches_too_and_leaves_no_sink_behind(backend: Backends) -> None:
    seen: list[int] = []
    env = LocalEnvironment("collect", backend=backend)
    numbers = env.from_batch([1, 2])
    numbers.sink(seen.append)
    assert numbers.map(lambda x: -x).collect() == [-1, -2]
    assert seen == [1, 2]
    env.run()
    assert seen == [1, 2, 1, 2]


def test_collect_raises_what_failed_and_can_be_called_again(backend: Backends) -> None:
    divisors = [0, 1]
    env = LocalEnvironment("collect", backend=backend)
    stream = env.from_batch([1]).map(lambda x: x // divisors.pop(0))
    with pytest.raises(FunctionError):
        stream.collect()
    assert stream.collect() == [1]


def test_iterate_gives_all_records_in_order(backend: Backends) -> None:
    env = LocalEnvironment("iterate", backend=backend)
    records = env.from_batch(range(3 * RECORDS_MAX)).map(lambda x: x + 1)
    assert list(records.iterate()) == list(range(1, 3 * RECORDS_MAX + 1))
    assert list(records.limit(2).iterate()) == [1, 2]


def test_iterate_raises_what_failed_after_the_records_before_it(backend: Backends) -> None:
    env = LocalEnvironment("iterate", backend=backend)
    rows = env.from_batch([2, 1, 0]).map(lambda x: 2 // x).iterate()
    assert [next(rows), next(rows)] == [1, 2]
    with pytest.raises(FunctionError, match="ZeroDivisionError"):
        next(rows)


def test_iterate_gives_records_while_the_job_runs() -> None:
    asked: list[int] = []
    goes_on = threading.Event()

    def numbers() -> Iterator[int]:
        yield 1
        assert goes_on.wait(20)
        yield 2

    for number in LocalEnvironment("iterate").from_batch(numbers).iterate():
        asked.append(number)
        goes_on.set()
    assert asked == [1, 2]


def leave_by_break(env: LocalEnvironment, stream: Any) -> None:
    for number in stream.iterate():
        if number == 3:
            break


def leave_by_exception(env: LocalEnvironment, stream: Any) -> None:
    def body() -> None:
        for number in stream.iterate():
            if number == 3:
                raise LookupError("enough")

    with pytest.raises(LookupError, match="enough"):
        body()


def leave_by_return(env: LocalEnvironment, stream: Any) -> None:
    def first() -> Any:
        for number in stream.iterate():
            return number

    assert first() == 0


def leave_by_close(env: LocalEnvironment, stream: Any) -> None:
    rows = stream.iterate()
    assert [next(rows), next(rows)] == [0, 1]
    rows.close()


def leave_by_throw(env: LocalEnvironment, stream: Any) -> None:
    rows = stream.iterate()
    assert next(rows) == 0
    with pytest.raises(KeyboardInterrupt):
        rows.throw(KeyboardInterrupt())


WAYS = [leave_by_break, leave_by_exception, leave_by_return, leave_by_close, leave_by_throw]


@pytest.mark.parametrize("leave", WAYS)
def test_a_loop_that_is_left_ends_the_job_and_cleans_up(leave: Callable[[LocalEnvironment, Any], None]) -> None:
    """Its source never ends, and the sink waits for room in the moment in which the loop is left."""
    journal: list[str] = []
    with assert_clean():
        env = LocalEnvironment("iterate")
        doubler = env.register_service("doubler", Noted, journal)
        stream = endless(env)
        stream.map(doubler.double).sink(lambda x: None)
        leave(env, stream)
        assert journal == ["built", "closed"]
        (job,) = [env.jobmanager.jobs[env.env_uuid]]
        assert job.report.state is Outcome.CANCELLED


def test_a_loop_that_was_not_begun_starts_nothing() -> None:
    journal: list[str] = []
    env = LocalEnvironment("iterate")
    env.register_service("doubler", Noted, journal)
    endless(env).iterate().close()
    assert journal == []


def test_a_start_that_fails_ends_the_loop_with_its_error(backend: Backends) -> None:
    env = LocalEnvironment("iterate", backend=backend)
    env.register_service("broken", Broken, [])
    with pytest.raises(ServiceStartError, match="no disk"):
        next(env.from_batch([1]).iterate())


def test_an_environment_that_runs_refuses_and_forgets_the_sink() -> None:
    env = LocalEnvironment("busy")
    stream = endless(env)
    rows = stream.iterate()
    assert next(rows) == 0
    with pytest.raises(GraphError, match='"busy" already runs job'):
        stream.collect()
    rows.close()
    assert "sink" not in env.explain()
    assert len(env._builder) == 1


def test_both_work_where_an_event_loop_runs() -> None:
    """As in a notebook, whose cells run on the thread of a loop."""

    async def cell() -> tuple[list[int], list[int]]:
        env = LocalEnvironment("cell")

        async def double(number: int) -> int:
            await asyncio.sleep(0)
            return number * 2

        doubled = env.from_batch([1, 2]).map_async(double)
        return doubled.collect(), list(doubled.iterate())

    assert asyncio.run(cell()) == ([2, 4], [2, 4])


def test_branches_have_names_and_their_own_records(backend: Backends) -> None:
    env = LocalEnvironment("branch", backend=backend)
    parts = env.from_batch(range(6)).branch(even=lambda x: x % 2 == 0, small=lambda x: x < 2)
    found: dict[str, list[int]] = {name: [] for name in parts}
    for name, part in parts.items():
        part.sink(found[name].append)
    report = env.run()
    assert found == {"even": [0, 2, 4], "small": [0, 1]}
    assert report.operator("even").records_out == 3
    with pytest.raises(DuplicateNameError, match='"even" is defined twice'):
        env.from_batch([1]).branch(even=bool)


def test_branches_of_a_keyed_stream_have_its_keys(backend: Backends) -> None:
    def build(stream: Any) -> Any:
        return (
            stream.keyby(lambda x: x % 2).branch(some=lambda x: x < 4)["some"].reduce(lambda a, b: a + b, emit="last")
        )

    assert sorted(run(range(6), build, backend=backend)) == [2, 4]


def test_tap_sees_each_record_and_passes_it_on(backend: Backends) -> None:
    seen: list[str] = []
    later: list[str] = []

    async def note(text: str) -> str:
        later.append(text)
        return "lost"

    arrived = run(["a", "b"], lambda stream: stream.tap(seen.append).tap(note).map(str.upper), backend=backend)
    assert (seen, later, arrived) == (["a", "b"], ["a", "b"], ["A", "B"])


def test_tap_refuses_what_is_no_function_of_one_record() -> None:
    class Upper(MapFunction[str, str]):
        def execute(self, data: str) -> str:
            return data.upper()

    stream = LocalEnvironment().from_batch(["a"])
    with pytest.raises(GraphError, match="wrong arity"):
        stream.tap(lambda one, other: None)  # type: ignore[misc,arg-type]
    with pytest.raises(GraphError, match=r"tap: .* is a function class"):
        stream.tap(Upper)  # type: ignore[arg-type]


@pytest.mark.parametrize(("count_", "expected"), [(0, []), (2, [0, 1]), (9, [0, 1, 2])])
def test_limit(count_: int, expected: list[int], backend: Backends) -> None:
    assert run(range(3), lambda stream: stream.limit(count_), backend=backend) == expected
    parallel = run(range(3), lambda stream: stream.rebalance().map(lambda x: x, parallelism=2).limit(count_))
    assert len(parallel) == len(expected)


def test_limit_begins_again_with_each_job() -> None:
    limited = LocalEnvironment().from_batch(range(9)).limit(2)
    assert [limited.collect(), limited.collect()] == [[0, 1], [0, 1]]


def test_sample_draws_a_part_and_the_same_one_from_a_seed() -> None:
    numbers = LocalEnvironment().from_batch(range(2_000))
    one, other = numbers.sample(0.25, seed=1), numbers.sample(0.25, seed=2)
    drawn = one.collect()
    assert 400 < len(drawn) < 600
    assert drawn == one.collect() != other.collect()
    assert [numbers.sample(0.0).collect(), len(numbers.sample(1).collect())] == [[], 2_000]


@pytest.mark.parametrize("wrong", [-0.1, 1.1, True, "half", float("nan")])
def test_a_wrong_fraction_is_refused(wrong: Any) -> None:
    with pytest.raises(GraphError, match="sample: fraction is"):
        LocalEnvironment().from_batch([1]).sample(wrong)


@pytest.mark.parametrize("wrong", [-1, 1.5, True, "2"])
def test_a_wrong_limit_is_refused(wrong: Any) -> None:
    with pytest.raises(GraphError, match="limit: count is"):
        LocalEnvironment().from_batch([1]).limit(wrong)


def test_steps_of_a_seed_are_run_before_the_first_record() -> None:
    env = LocalEnvironment("steps", backend=lambda: StepBackend(3))
    assert next(env.from_batch(range(1000)).map(lambda x: x * 2).iterate()) == 0
