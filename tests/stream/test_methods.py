"""Each method of a stream, with a function class, an instance, a callable and a coroutine function."""

from __future__ import annotations

import asyncio
from functools import partial
from itertools import count
from typing import TYPE_CHECKING, Any, Generic, TypeVar

import pytest

from sage import (
    BaseCoMapFunction,
    BatchFunction,
    FilterFunction,
    FlatMapFunction,
    FunctionError,
    GraphError,
    KeyByFunction,
    LocalEnvironment,
    MapFunction,
    Outcome,
    ProcessFunction,
    SinkFunction,
    StopSignal,
)
from sage.testing import STEP_S, StepBackend, run

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from sage._runtime.backend import Backend

    Backends = Callable[[], Backend]


T = TypeVar("T")


class Times(MapFunction):
    def __init__(self, factor: int, plus: int = 0) -> None:
        self._factor = factor
        self._plus = plus

    def execute(self, data: int) -> int:
        return data * self._factor + self._plus


class Above(FilterFunction):
    def __init__(self, bound: int) -> None:
        self._bound = bound

    def execute(self, data: int) -> bool:
        return data > self._bound


class Words(FlatMapFunction):
    def execute(self, data: str) -> list[str]:
        return data.split()


async def double(number: int) -> int:
    await asyncio.sleep(0)
    return number * 2


class CallableObject:
    def __call__(self, number: int) -> int:
        return number * 2


@pytest.mark.parametrize(
    "function",
    [lambda number: number * 2, double, Times(2), CallableObject(), partial(pow, exp=1, mod=None)],
    ids=["lambda", "coroutine function", "instance", "callable object", "partial"],
)
def test_map_takes_whatever_can_be_called(backend: Backends, function: Any) -> None:
    expected = [1, 2, 3] if isinstance(function, partial) else [2, 4, 6]
    assert run([1, 2, 3], lambda stream: stream.map(function), backend=backend) == expected


def test_arguments_of_a_class_follow_it(backend: Backends) -> None:
    assert run([1, 2], lambda stream: stream.map(Times, 10, plus=1), backend=backend) == [11, 21]
    assert run([1, 2, 3], lambda stream: stream.filter(Above, 1), backend=backend) == [2, 3]
    assert run([1, 2, 3], lambda stream: stream.filter(Above, bound=2), backend=backend) == [3]


def test_a_map_class_that_returns_none_drops_the_record(backend: Backends) -> None:
    class Odd(MapFunction):
        def execute(self, data: int) -> int | None:
            return data if data % 2 else None

    assert run([1, 2, 3], lambda stream: stream.map(Odd), backend=backend) == [1, 3]
    assert run([1, 2], lambda stream: stream.map(lambda x: None), backend=backend) == [None, None]


def test_filter_takes_any_truth_value(backend: Backends) -> None:
    records = [0, 1, "", "a", None, [], [0]]
    assert run(records, lambda stream: stream.filter(lambda x: x), backend=backend) == [1, "a", [0]]


def test_flatmap_takes_lists_tuples_generators_and_none(backend: Backends) -> None:
    def give(number: int) -> Any:
        return [None, [number], (number, number), (number for _ in range(3))][number]

    assert run([0, 1, 2, 3, 0], lambda stream: stream.flatmap(give), backend=backend) == [1, 2, 2, 3, 3, 3]
    assert run(["a b", "c"], lambda stream: stream.flat_map(Words), backend=backend) == ["a", "b", "c"]


def test_a_string_is_no_list_of_records(backend: Backends) -> None:
    with pytest.raises(FunctionError, match="a str is one record and not a list of records"):
        run(["ab"], lambda stream: stream.flatmap(lambda text: text), backend=backend)


class Collecting(FlatMapFunction):
    def execute(self, data: int) -> list[str]:
        self.collect(f"{data} first")
        self.collect(f"{data} second")
        return [f"{data} returned"]


class Interleaving(FlatMapFunction):
    def execute(self, data: int) -> Iterator[str]:
        self.collect(f"{data} a")
        yield f"{data} b"
        self.collect(f"{data} c")
        yield f"{data} d"
        self.collect(f"{data} e")


def test_what_is_collected_keeps_its_place(backend: Backends) -> None:
    returned = run([1, 2], lambda stream: stream.flatmap(Collecting), backend=backend)
    assert returned == ["1 first", "1 second", "1 returned", "2 first", "2 second", "2 returned"]
    yielded = run([1, 2], lambda stream: stream.flatmap(Interleaving), backend=backend)
    assert yielded == [f"{number} {letter}" for number in (1, 2) for letter in "abcde"]


def test_what_a_failed_record_collected_does_not_go_on(backend: Backends) -> None:
    class Half(FlatMapFunction):
        def execute(self, data: int) -> None:
            self.collect(data)
            if data == 2:
                raise ValueError("half done")

    assert run([1, 2, 3], lambda stream: stream.flatmap(Half, on_error="skip"), backend=backend) == [1, 3]


def test_a_long_generator_is_read_to_its_end(backend: Backends) -> None:
    arrived = run([3000, 0, 5000], lambda stream: stream.flatmap(range).map(lambda x: x), backend=backend)
    assert arrived == [*range(3000), *range(5000)]


def test_an_endless_generator_goes_on_until_the_job_is_cancelled(backend: Backends) -> None:
    arrived: list[int] = []
    env = LocalEnvironment("test", backend=backend)

    def take(number: int) -> None:
        arrived.append(number)
        if len(arrived) == 5000:
            env.jobmanager.jobs[env.env_uuid].cancel()

    env.from_batch([7]).flatmap(lambda first: count(first)).sink(take)
    env.submit(autostop=True)
    assert arrived == list(range(7, 7 + len(arrived)))
    assert len(arrived) >= 5000


def test_an_endless_generator_is_drained_for_a_limited_time(backend: Backends) -> None:
    arrived: list[int] = []
    env = LocalEnvironment("test", backend=backend, drain_timeout_s=0.1)

    def take(number: int) -> None:
        arrived.append(number)
        if number == 100:
            env.stop()

    env.from_batch([7]).flatmap(lambda first: count(first)).sink(take)
    job = env.submit(autostop=True)
    assert arrived == list(range(7, 7 + len(arrived)))
    assert len(arrived) > 100 - 7
    assert job.report is not None
    assert job.report.state is Outcome.STOPPED


def test_a_drain_takes_its_whole_bound_of_virtual_time() -> None:
    backend = StepBackend(3)
    env = LocalEnvironment("test", backend=lambda: backend, drain_timeout_s=20.0)
    stopped_at_s: list[float] = []

    def take(number: int) -> None:
        if not stopped_at_s:
            stopped_at_s.append(backend.now())
            env.stop()

    env.from_batch([7]).flatmap(lambda first: count(first)).sink(take)
    env.submit(autostop=True)
    assert 20.0 <= backend.now() - stopped_at_s[0] < 20.0 + 100 * STEP_S


@pytest.mark.in_one_process
def test_a_generator_function_is_a_source_that_ends_with_it(backend: Backends) -> None:
    """None is nothing now, as for other functions of `from_source`, and a `StopSignal` the end."""
    closed: list[str] = []

    def ticks(first: int, is_signalled: bool) -> Iterator[Any]:
        try:
            yield from (first, None, first + 1)
            if is_signalled:
                yield StopSignal()
                yield first + 2
        finally:
            closed.append("closed")

    for is_signalled in (False, True):
        arrived: list[int] = []
        env = LocalEnvironment("test", backend=backend)
        env.from_source(ticks, 5, is_signalled=is_signalled).sink(arrived.append)
        env.submit(autostop=True)
        assert arrived == [5, 6]
    assert closed == ["closed", "closed"]


def test_an_endless_generator_function_goes_on_until_the_environment_is_closed(backend: Backends) -> None:
    arrived: list[int] = []
    env = LocalEnvironment("test", backend=backend)

    def take(number: int) -> None:
        arrived.append(number)
        if number == 100:
            env.close()

    def numbers() -> Iterator[int]:
        yield from count()

    env.from_source(numbers).sink(take)
    job = env.submit(autostop=True)
    assert arrived == list(range(len(arrived)))
    assert len(arrived) > 100
    assert job.state == "stopped"


async def several(number: int = 2) -> list[int]:
    return [number] * 2


def test_a_coroutine_function_returns_the_records_of_a_source(backend: Backends) -> None:
    arrived: list[int] = []
    env = LocalEnvironment("test", backend=backend)
    env.from_batch(several, 3).sink(arrived.append)
    env.submit(autostop=True)
    assert arrived == [3, 3]


@pytest.mark.parametrize("value", [None, 5])
def test_a_function_of_from_batch_returns_an_iterable(backend: Backends, value: Any) -> None:
    env = LocalEnvironment("test", backend=backend)
    env.from_batch(lambda: value, name="feed")
    with pytest.raises(FunctionError, match=f'"feed" failed to open: TypeError: it returned {value}, which') as caught:
        env.submit(autostop=True)
    assert "BatchFunction" in caught.value.__cause__.__notes__[0]  # type: ignore[union-attr]


@pytest.mark.parametrize("seed", range(8))
def test_the_pause_of_a_source_does_not_hold_up_what_came_of_its_record(seed: int) -> None:
    step = StepBackend(seed)
    env = LocalEnvironment("test", backend=lambda: step)
    read_at_s: list[float] = []
    arrived_after_s: list[float] = []

    def tick() -> list[int] | StopSignal:
        read_at_s.append(step.clock())
        return list(range(20)) if len(read_at_s) < 4 else StopSignal()

    class Everything(FilterFunction):
        """A class, as such a function is not run in one loop with its neighbours."""

        def execute(self, data: int) -> bool:
            return data >= 0

    env.from_source(tick, delay=5.0).flatmap(list).filter(Everything).sink(
        lambda _: arrived_after_s.append(step.clock() - read_at_s[-1])
    )
    env.submit(autostop=True)
    assert len(arrived_after_s) == 60
    assert max(arrived_after_s) < 1.0


class Sums(ProcessFunction):
    """Emits negative numbers at once, and the sum of the others at the end."""

    def __init__(self) -> None:
        self._sum = 0

    def execute(self, data: int) -> list[int]:
        if data < 0:
            return [data]
        self._sum += data
        return []

    def finish(self) -> list[int]:
        self.collect(-1000)
        return [self._sum]


def test_process_emits_at_the_end_too(backend: Backends) -> None:
    arrived = run([1, -5, 2, 3], lambda stream: stream.process(Sums).map(lambda x: x * 2), backend=backend)
    assert arrived == [-10, -2000, 12]
    assert run([], lambda stream: stream.process(Sums), backend=backend) == [-1000, 0]


def test_every_parallel_process_finishes(backend: Backends) -> None:
    arrived = run(range(1, 31), lambda stream: stream.process(Sums, parallelism=3), backend=backend)
    assert arrived.count(-1000) == 3
    assert sum(number for number in arrived if number > 0) == sum(range(1, 31))


def test_what_finish_yields_goes_on_as_it_is_read(backend: Backends) -> None:
    """It may be more than the memory holds, so that a cancel must not wait for its end."""
    arrived: list[int] = []
    env = LocalEnvironment("test", backend=backend)

    class Counting(ProcessFunction):
        def execute(self, data: int) -> None:
            self.collect(-data)

        def finish(self) -> Iterator[int]:
            yield from range(100_000)
            raise AssertionError("it was read to its end")

    def take(number: int) -> None:
        arrived.append(number)
        if number == 5000:
            env.jobmanager.jobs[env.env_uuid].cancel()

    env.from_batch([7]).process(Counting).sink(take)
    job = env.submit(autostop=True)
    assert arrived == [-7, *range(len(arrived) - 1)]
    assert job.report is not None
    assert job.report.state is Outcome.CANCELLED


def test_an_error_in_finish_is_told_as_one(backend: Backends) -> None:
    class Failing(ProcessFunction):
        def execute(self, data: int) -> None:
            pass

        def finish(self) -> Iterator[int]:
            yield from range(5000)
            raise LookupError("at the end")

    with pytest.raises(FunctionError, match='operator "Failing" failed to finish: LookupError: at the end'):
        run([1], lambda stream: stream.process(Failing), backend=backend)


def test_process_without_finish_is_a_flatmap(backend: Backends) -> None:
    assert run([1, 2], lambda stream: stream.process(lambda x: [x, -x]), backend=backend) == [1, -1, 2, -2]


def test_finish_is_not_called_after_a_failure(backend: Backends) -> None:
    finished: list[str] = []

    class Finishing(ProcessFunction):
        def execute(self, data: int) -> list[int]:
            return [1 // data]

        def finish(self) -> None:
            finished.append("finish")

    with pytest.raises(FunctionError, match="ZeroDivisionError"):
        run([1, 0], lambda stream: stream.process(Finishing), backend=backend)
    assert finished == []


class Life(MapFunction):
    """Writes down its own life."""

    def __init__(self, happened: list[Any]) -> None:
        self._happened = happened

    def open(self) -> None:
        self._happened.append(("open", self.ctx.name, self.ctx.parallel_index, self.ctx.parallelism))

    def execute(self, data: int) -> int:
        self._happened.append(data)
        return data

    def close(self) -> None:
        self._happened.append("close")


@pytest.mark.in_one_process
def test_a_function_is_opened_before_and_closed_after_its_records(backend: Backends) -> None:
    happened: list[Any] = []
    run([1, 2], lambda stream: stream.map(Life, happened, name="life"), backend=backend)
    assert happened == [("open", "life", 0, 1), 1, 2, "close"]


def test_parallel_tasks_share_no_instance(backend: Backends) -> None:
    class Counting(MapFunction):
        def __init__(self) -> None:
            self.seen = 0

        def execute(self, data: int) -> tuple[int, int]:
            self.seen += 1
            return self.ctx.parallel_index, self.seen

    given = Counting()
    for function in (Counting, given):
        arrived = run(range(30), lambda stream: stream.map(function, parallelism=3), backend=backend)  # noqa: B023
        for index in range(3):
            numbers = [number for place, number in arrived if place == index]
            assert numbers == list(range(1, len(numbers) + 1))
        assert len(arrived) == 30
    assert given.seen == 0


def test_an_instance_of_an_earlier_job_can_be_copied_for_each_task(backend: Backends) -> None:
    class Named(MapFunction):
        def execute(self, data: int) -> tuple[str, int]:
            return self.name, data

    given = Named()
    for name, parallelism in (("first", 1), ("second", 3)):
        arrived = run(
            range(9),
            lambda stream: stream.map(given, parallelism=parallelism, name=name),  # noqa: B023
            backend=backend,
        )
        assert sorted(arrived) == [(name, number) for number in range(9)]


def test_sink_returns_the_stream_before_it(backend: Backends) -> None:
    seen: list[int] = []

    class Keep(SinkFunction):
        def __init__(self, factor: int) -> None:
            self._factor = factor

        def execute(self, data: int) -> None:
            seen.append(data * self._factor)

    arrived = run([1, 2], lambda stream: stream.sink(Keep, 10).map(lambda x: x + 1), backend=backend)
    assert (sorted(seen), arrived) == ([10, 20], [2, 3])


def test_print_shows_every_record_and_goes_on(backend: Backends, capsys: pytest.CaptureFixture[str]) -> None:
    assert run([1, None], lambda stream: stream.print("seen").print(), backend=backend) == [1, None]
    assert sorted(capsys.readouterr().out.splitlines()) == sorted(["seen | 1", "seen | None", "1", "None"])


def test_broadcast_reaches_every_task_and_rebalance_one(backend: Backends) -> None:
    class Where(MapFunction):
        def execute(self, data: int) -> tuple[int, int]:
            return data, self.ctx.parallel_index

    everywhere = run(range(10), lambda stream: stream.broadcast().map(Where, parallelism=3), backend=backend)
    assert sorted(everywhere) == [(number, index) for number in range(10) for index in range(3)]
    once = run(range(30), lambda stream: stream.rebalance().map(Where, parallelism=3), backend=backend)
    assert sorted(number for number, _ in once) == list(range(30))
    assert [sum(1 for _, index in once if index == place) for place in range(3)] == [10, 10, 10]


def test_rebalance_spreads_a_keyed_stream(backend: Backends) -> None:
    class Where(MapFunction):
        def execute(self, data: int) -> int:
            return int(self.ctx.parallel_index)

    arrived = run(
        range(20), lambda stream: stream.keyby(lambda x: 0).rebalance().map(Where, parallelism=2), backend=backend
    )
    assert sorted(arrived) == [0] * 10 + [1] * 10


def test_a_name_is_seen_in_the_report(backend: Backends) -> None:
    env = LocalEnvironment("test", backend=backend)
    env.from_batch([1, 2], name="numbers").map(lambda x: x).name("same").sink(lambda x: None, name="end")
    report = env.submit(autostop=True).report
    assert report is not None
    assert [operator.name for operator in report.operators] == ["numbers", "same", "end"]
    assert report.operator("same").records_out == 2


def test_generated_names_are_stable(backend: Backends) -> None:
    def names() -> list[str]:
        env = LocalEnvironment("test", backend=backend)
        env.from_batch([1]).map(lambda x: x).map(lambda x: x).map(Times, 2).sink(lambda x: None)
        report = env.submit(autostop=True).report
        assert report is not None
        return [operator.name for operator in report.operators]

    assert names() == names()
    assert len(set(names())) == 5
    assert "Times" in names()


def test_coroutine_functions_are_taken_everywhere(backend: Backends) -> None:
    async def even(number: int) -> bool:
        return number % 2 == 0

    async def twice(number: int) -> list[int]:
        await asyncio.sleep(0)
        return [number, number]

    class AsyncTimes(MapFunction):
        async def open(self) -> None:  # type: ignore[override]
            self._factor = 10

        async def execute(self, data: int) -> int:
            await asyncio.sleep(0)
            return data * self._factor

    seen: list[int] = []

    async def keep(number: int) -> None:
        seen.append(number)

    async def add(left: int, right: int) -> int:
        return left + right

    arrived = run(
        range(6),
        lambda stream: stream.filter(even).flatmap(twice).map(AsyncTimes).sink(keep).keyby(double).reduce(add),
        backend=backend,
    )
    assert arrived == [0, 0, 20, 40, 40, 80]
    assert sorted(seen) == [0, 0, 20, 20, 40, 40]


def test_an_error_of_a_coroutine_names_the_record(backend: Backends) -> None:
    async def fail(number: int) -> int:
        await asyncio.sleep(0)
        raise LookupError("not there")

    with pytest.raises(FunctionError, match='operator "fail" failed on record 1: LookupError: not there'):
        run([1], lambda stream: stream.map(fail), backend=backend)


@pytest.mark.in_one_process
def test_records_are_never_changed(backend: Backends) -> None:
    records = [{"a": 1}, [1, 2], object()]
    arrived = run(records, lambda stream: stream.map(lambda x: x).keyby(id).filter(lambda x: True), backend=backend)
    assert all(before is after for before, after in zip(records, arrived, strict=True))
    assert records[:2] == [{"a": 1}, [1, 2]]


def test_a_plain_class_with_execute_is_a_function(backend: Backends) -> None:
    class Plain:
        def __init__(self, plus: int) -> None:
            self._plus = plus

        def execute(self, data: int) -> int:
            return data + self._plus

    plain: Any = Plain
    assert run([1, 2], lambda stream: stream.map(plain, 5), backend=backend) == [6, 7]


def test_a_constructor_need_not_call_super(backend: Backends) -> None:
    class Key(KeyByFunction):
        def __init__(self, modulus: int) -> None:
            self.modulus = modulus

        def execute(self, data: int) -> int:
            return data % self.modulus

    assert run(range(4), lambda stream: stream.keyby(Key, 2).reduce(max), backend=backend) == [0, 1, 2, 3]


def test_a_class_with_type_arguments_is_the_class(backend: Backends) -> None:
    """What stands in brackets is for type checkers, wherever a class may stand."""

    class Tagged(MapFunction[T, tuple[str, T]], Generic[T]):
        def __init__(self, tag: str = "") -> None:
            self.tag = tag

        def execute(self, data: T) -> tuple[str, T]:
            return (self.tag, data)

    class Count(BatchFunction[T], Generic[T]):
        count = 0

        def execute(self) -> Any:
            self.count += 1
            return self.count if self.count < 3 else None

    class Asked(MapFunction[T, T], Generic[T]):
        async def execute(self, data: T) -> T:
            return data

    class Added(BaseCoMapFunction, Generic[T]):
        def map0(self, data: T) -> T:
            return data

        map1 = map0

    class Plus(Generic[T]):
        def __init__(self, other: int) -> None:
            self.other = other

        def process(self, number: int) -> int:
            return number + self.other

    env = LocalEnvironment("test", backend=backend)
    plus = env.register_service("plus", Plus[int], 10)
    arrived: list[Any] = []
    numbers = env.from_batch(Count[int]).map_async(Asked[int]).map(plus.process)
    numbers.map(Tagged[int], "x", name="tagged").sink(arrived.append)
    numbers.connect(numbers).comap(Added[int]).sink(arrived.append)
    env.submit(autostop=True)
    assert sorted(map(str, arrived)) == ["('x', 11)", "('x', 12)", "11", "11", "12", "12"]
    with pytest.raises(GraphError, match="Tagged is a function of a stream, not a service"):
        env.register_service("tagged", Tagged[int])
    with pytest.raises(GraphError, match="Tagged is a MapFunction"):
        env.from_batch([1]).filter(Tagged[int])  # type: ignore[arg-type]
