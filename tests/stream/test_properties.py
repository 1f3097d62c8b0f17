"""Properties of whole pipelines: parallel equals serial up to order, and every schedule equals threads."""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING, Any

from hypothesis import given, settings
from hypothesis import strategies as st

from sage import LocalEnvironment, Retry
from sage._backends.threads import ThreadsBackend
from sage.testing import StepBackend

if TYPE_CHECKING:
    from collections.abc import Callable

    from sage._runtime.backend import Backend
    from sage.stream import DataStream

    Backends = Callable[[], Backend]

# One step of a pipeline: its kind, a small number that it works with, and how many tasks run it.
Step = tuple[str, int, int]

KINDS = ("map", "filter", "flatmap", "generator", "process", "skip", "union", "rebalance", "retry")

steps = st.lists(st.tuples(st.sampled_from(KINDS), st.integers(1, 4), st.integers(1, 3)), max_size=5)
records = st.lists(st.integers(-20, 20), max_size=60)


def refuse(number: int, modulus: int) -> int:
    if number % (modulus + 1) == 0:
        raise ValueError("not this one")
    return number


class OnceMore:
    """Fails on some numbers the first time; what it remembers is shared by its tasks, and does not change results."""

    def __init__(self, modulus: int) -> None:
        self._modulus = modulus
        self._failed: Counter[int] = Counter()

    def __call__(self, number: int) -> int:
        if number % self._modulus == 0 and not self._failed[number]:
            self._failed[number] += 1
            raise ConnectionError("once more")
        return number - 1


def add(stream: DataStream, step: Step, parallelism: int) -> DataStream:
    kind, small, _ = step
    match kind:
        case "map":
            return stream.map(lambda number: number * small + 1, parallelism=parallelism)
        case "filter":
            return stream.filter(lambda number: number % (small + 1), parallelism=parallelism)
        case "flatmap":
            return stream.flatmap(lambda number: [number] * (number % small), parallelism=parallelism)
        case "generator":
            return stream.flatmap(lambda number: (number + plus for plus in range(small)), parallelism=parallelism)
        case "process":
            return stream.process(lambda number: [number, -number], parallelism=parallelism)
        case "skip":
            return stream.map(lambda number: refuse(number, small), on_error="skip", parallelism=parallelism)
        case "union":
            return stream.union(stream.map(lambda number: number + small, parallelism=parallelism))
        case "rebalance":
            return stream.rebalance()
        case _:
            return stream.map(OnceMore(small), on_error=Retry(9, (0.0, 0.0)), parallelism=parallelism)


def result(values: list[int], shape: list[Step], backend: Backends, *, serial: bool) -> list[int]:
    env = LocalEnvironment("test", backend=backend)
    arrived: list[int] = []
    stream = env.from_batch(values)
    for step in shape:
        stream = add(stream, step, 1 if serial else step[2])
    stream.sink(arrived.append)
    env.submit(autostop=True)
    return arrived


def sums(values: list[int], modulus: int, parallelism: int, backend: Backends, emit: Any) -> list[tuple[int, int]]:
    env = LocalEnvironment("test", backend=backend)
    arrived: list[tuple[int, int]] = []
    pairs = env.from_batch(values).map(lambda number: (number % modulus, number))
    keyed = pairs.keyby(lambda pair: pair[0])
    summed = keyed.reduce(lambda a, b: (a[0], a[1] + b[1]), emit=emit, parallelism=parallelism)
    summed.sink(arrived.append)
    env.submit(autostop=True)
    return arrived


@settings(max_examples=60)
@given(records, steps, st.integers(0, 10_000))
def test_parallel_equals_serial_up_to_order(values: list[int], shape: list[Step], seed: int) -> None:
    serial = result(values, shape, lambda: StepBackend(seed), serial=True)
    parallel = result(values, shape, lambda: StepBackend(seed), serial=False)
    assert Counter(parallel) == Counter(serial)


@settings(max_examples=40)
@given(records, steps, st.integers(0, 10_000))
def test_every_schedule_equals_threads_up_to_order(values: list[int], shape: list[Step], seed: int) -> None:
    threads = result(values, shape, ThreadsBackend, serial=False)
    stepped = result(values, shape, lambda: StepBackend(seed), serial=False)
    assert Counter(stepped) == Counter(threads)


@settings(max_examples=40)
@given(
    records,
    st.lists(
        st.tuples(
            st.sampled_from(("map", "filter", "flatmap", "generator", "skip", "retry")), st.integers(1, 4), st.just(1)
        ),
        max_size=5,
    ),
    st.integers(0, 10_000),
)
def test_a_pipeline_without_parallel_tasks_keeps_the_order(values: list[int], shape: list[Step], seed: int) -> None:
    threads = result(values, shape, ThreadsBackend, serial=True)
    assert result(values, shape, lambda: StepBackend(seed), serial=True) == threads


@settings(max_examples=40)
@given(records, st.integers(1, 6), st.integers(1, 4), st.integers(0, 10_000))
def test_a_parallel_reduce_equals_a_serial_one(values: list[int], modulus: int, parallelism: int, seed: int) -> None:
    expected = Counter(number % modulus for number in values)
    last = sums(values, modulus, parallelism, lambda: StepBackend(seed), "last")
    assert dict(last) == {key: sum(number for number in values if number % modulus == key) for key in expected}
    assert len(last) == len(expected)
    serial = sums(values, modulus, 1, lambda: StepBackend(seed), "each")
    parallel = sums(values, modulus, parallelism, lambda: StepBackend(seed), "each")
    for key in expected:
        assert [pair for pair in parallel if pair[0] == key] == [pair for pair in serial if pair[0] == key]


@settings(max_examples=40)
@given(
    st.lists(st.one_of(st.none(), st.booleans(), st.integers(), st.text(), st.binary(), st.tuples(st.integers()))),
    st.integers(1, 4),
    st.integers(0, 10_000),
)
def test_any_values_go_through_and_any_key_finds_its_task(values: list[Any], parallelism: int, seed: int) -> None:
    env = LocalEnvironment("test", backend=lambda: StepBackend(seed))
    arrived: list[Any] = []
    env.from_batch(values).keyby(lambda value: value).map(lambda value: value, parallelism=parallelism).sink(
        arrived.append
    )
    env.submit(autostop=True)
    assert Counter(map(repr, arrived)) == Counter(map(repr, values))


@settings(max_examples=25)
@given(st.lists(st.integers(0, 30), max_size=12), st.integers(1, 3), st.integers(0, 10_000))
def test_a_loop_processes_everything_on_every_schedule(values: list[int], parallelism: int, seed: int) -> None:
    env = LocalEnvironment("test", backend=lambda: StepBackend(seed))
    arrived: list[int] = []
    loop = env.from_future("loop")
    around = env.from_batch(values).union(loop).filter(lambda number: number > 0)
    lower = around.map(lambda number: number // 2, parallelism=parallelism)
    lower.fill_future(loop)
    lower.sink(arrived.append)
    env.submit(autostop=True)
    expected: Counter[int] = Counter()
    for number in values:
        while number > 0:
            number //= 2
            expected[number] += 1
    assert Counter(arrived) == expected


@settings(max_examples=15)
@given(records, steps, st.integers(0, 10_000))
def test_a_seed_shows_the_same_schedule_again(values: list[int], shape: list[Step], seed: int) -> None:
    once = result(values, shape, lambda: StepBackend(seed), serial=False)
    assert result(values, shape, lambda: StepBackend(seed), serial=False) == once
