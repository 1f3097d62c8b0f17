"""Streams with keys: the three strategies, keys in functions, and reduce."""

from __future__ import annotations

import datetime
from dataclasses import dataclass, field
from decimal import Decimal
from fractions import Fraction
from typing import TYPE_CHECKING, Any

import pytest
from support.recording_services import report_of

from sage import FunctionError, KeyByFunction, LocalEnvironment, MapFunction, Retry
from sage.testing import run

if TYPE_CHECKING:
    from collections.abc import Callable

    from sage._runtime.backend import Backend

    Backends = Callable[[], Backend]


class Where(MapFunction):
    """Gives the record, its key and its task."""

    def execute(self, data: Any) -> tuple[Any, Any, int]:
        return data, self.ctx.get_key(), self.ctx.parallel_index


class Modulo(KeyByFunction):
    def __init__(self, modulus: int) -> None:
        self._modulus = modulus

    def execute(self, data: int) -> int:
        return data % self._modulus


def test_hash_sends_each_key_to_one_task(backend: Backends) -> None:
    arrived = run(range(60), lambda stream: stream.keyby(Modulo, 6).map(Where, parallelism=3), backend=backend)
    assert sorted(number for number, _, _ in arrived) == list(range(60))
    assert all(key == number % 6 for number, key, _ in arrived)
    assert len({(key, task) for _, key, task in arrived}) == 6


def test_broadcast_sends_each_record_to_every_task(backend: Backends) -> None:
    arrived = run(
        range(12),
        lambda stream: stream.keyby(Modulo, 6, strategy="broadcast").map(Where, parallelism=3),
        backend=backend,
    )
    assert sorted(arrived) == [(number, number % 6, task) for number in range(12) for task in range(3)]


def test_round_robin_spreads_records_evenly(backend: Backends) -> None:
    arrived = run(
        range(30),
        lambda stream: stream.key_by(lambda x: 0, strategy="round_robin").map(Where, parallelism=3),
        backend=backend,
    )
    assert sorted(number for number, _, _ in arrived) == list(range(30))
    assert {key for _, key, _ in arrived} == {0}
    assert [sum(1 for *_, task in arrived if task == place) for place in range(3)] == [10, 10, 10]


def test_keys_stay_through_map_filter_and_flatmap(backend: Backends) -> None:
    arrived = run(
        range(8),
        lambda stream: (
            stream.keyby(Modulo, 4)
            .map(lambda number: number * 10)
            .filter(lambda number: number >= 20)
            .flatmap(lambda number: [number, number + 1])
            .map(Where)
        ),
        backend=backend,
    )
    assert [(record, key) for record, key, _ in arrived] == [
        (number * 10 + plus, number % 4) for number in range(2, 8) for plus in (0, 1)
    ]


def test_a_second_keyby_takes_the_place_of_the_first(backend: Backends) -> None:
    arrived = run(
        range(20),
        lambda stream: stream.keyby(Modulo, 2, parallelism=2).keyby(Modulo, 5, parallelism=2).map(Where, parallelism=2),
        backend=backend,
    )
    assert all(key == number % 5 for number, key, _ in arrived)
    assert len({(key, task) for _, key, task in arrived}) == 5


def test_a_stream_without_keys_has_none(backend: Backends) -> None:
    assert run([1], lambda stream: stream.map(Where), backend=backend) == [(1, None, 0)]


def test_reduce_emits_each_combined_value_or_only_the_last(backend: Backends) -> None:
    words = ["tea", "milk", "tea", "tea", "milk", "cup"]

    def pairs(emit: Any) -> list[Any]:
        return run(
            words,
            lambda stream: (
                stream.map(lambda word: (word, 1))
                .keyby(lambda pair: pair[0])
                .reduce(lambda a, b: (a[0], a[1] + b[1]), emit=emit)
            ),
            backend=backend,
        )

    assert pairs("each") == [("tea", 1), ("milk", 1), ("tea", 2), ("tea", 3), ("milk", 2), ("cup", 1)]
    assert pairs("last") == [("tea", 3), ("milk", 2), ("cup", 1)]


def test_a_parallel_reduce_has_each_key_once(backend: Backends) -> None:
    arrived = run(
        range(100),
        lambda stream: stream.keyby(Modulo, 7).reduce(lambda a, b: a + b, emit="last", parallelism=3),
        backend=backend,
    )
    assert sorted(arrived) == sorted(sum(range(key, 100, 7)) for key in range(7))


def test_reduce_knows_falsy_values_and_keys(backend: Backends) -> None:
    numbers: list[Any] = [0, None, 0, None]
    arrived = run(
        numbers,
        lambda stream: stream.keyby(lambda x: x).reduce(lambda a, b: [a, b], emit="last"),
        backend=backend,
    )
    assert arrived == [[0, 0], [None, None]]


def test_a_record_that_fails_in_reduce_is_left_out(backend: Backends) -> None:
    records: list[Any] = [1, "x", 2]
    arrived = run(
        records,
        lambda stream: stream.keyby(lambda x: 0).reduce(lambda a, b: a + b, emit="last", on_error="skip"),
        backend=backend,
    )
    assert arrived == [3]


@pytest.mark.in_one_process
def test_a_retried_record_of_reduce_keeps_its_key(backend: Backends) -> None:
    failed: set[tuple[int, int]] = set()

    def add(left: int, right: int) -> int:
        if right % 3 == 0 and (left, right) not in failed:
            failed.add((left, right))
            raise ConnectionError("once more")
        return left + right

    arrived = run(
        range(20),
        lambda stream: stream.keyby(Modulo, 2).reduce(add, emit="last", on_error=Retry(2, (0.001, 0.001))),
        backend=backend,
    )
    assert arrived == [sum(range(0, 20, 2)), sum(range(1, 20, 2))]
    assert failed


def test_a_key_that_cannot_be_a_key_names_operator_and_record(backend: Backends) -> None:
    with pytest.raises(FunctionError) as caught:
        run([1], lambda stream: stream.keyby(lambda x: [x], name="bad key").reduce(lambda a, b: a), backend=backend)
    assert "unhashable" in str(caught.value)
    assert "record 1" in str(caught.value)


def test_a_key_that_has_no_stable_hash_is_refused(backend: Backends) -> None:
    class Opaque:
        pass

    with pytest.raises(FunctionError) as caught:
        run([1, 2], lambda stream: stream.keyby(lambda x: Opaque()).map(Where, parallelism=2), backend=backend)
    assert "Opaque" in str(caught.value)


@pytest.mark.in_one_process
def test_records_with_a_key_that_is_refused_are_accounted_for(backend: Backends) -> None:
    env = LocalEnvironment("opaque", backend=backend)
    env.from_batch([1, 2]).keyby(lambda x: object()).map(Where, parallelism=2).sink(lambda _: None)
    with pytest.raises(FunctionError, match="a key that cannot be used"):
        env.submit(autostop=True)
    assert report_of(env).is_accounted is True


NAN = float("nan")


@dataclass(frozen=True)
class Place:
    x: float
    note: float = field(default=0.0, compare=False)


@pytest.mark.parametrize(
    "key",
    [NAN, (1, NAN), (("a", NAN), 1), frozenset([NAN]), Decimal("nan"), Decimal("snan"), complex(NAN, 1), Place(NAN)],
)
@pytest.mark.parametrize("parallelism", [1, 2])
def test_a_key_that_is_not_equal_to_itself_fails_by_policy(backend: Backends, key: Any, parallelism: int) -> None:
    def counted(stream: Any, on_error: str) -> Any:
        keyed = stream.keyby(lambda x: key if x == 2 else "a", on_error=on_error, name="keys")
        return keyed.map(lambda x: 1, parallelism=parallelism).reduce(lambda one, other: one + other, emit="last")

    assert run(range(40), lambda stream: counted(stream, "skip"), backend=backend) == [39]
    with pytest.raises(FunctionError, match=r'operator "keys" failed on record 2.* is not equal to itself') as caught:
        run(range(40), lambda stream: counted(stream, "fail"), backend=backend)
    cause = caught.value.__cause__
    assert cause is not None
    assert "Give None" in cause.__notes__[0]


SAME = [
    [1, 1.0, True, Decimal(1), Fraction(1), 1 + 0j],
    [0, 0.0, -0.0, False, Decimal("-0")],
    [(1, 0.0), (True, -0.0), (Decimal(1), False)],
    [frozenset([1, 2]), frozenset([2.0, True])],
    [Place(1.0, 2.0), Place(1, NAN)],
    [datetime.time(12, tzinfo=datetime.UTC), datetime.time(13, tzinfo=datetime.timezone(datetime.timedelta(hours=1)))],
]


@pytest.mark.parametrize("keys", SAME)
@pytest.mark.parametrize("parallelism", [1, 3])
def test_keys_that_are_equal_are_one_group(backend: Backends, keys: list[Any], parallelism: int) -> None:
    assert len(set(keys)) == 1
    counts = run(
        range(len(keys) * 10),
        lambda stream: (
            stream.keyby(lambda x: keys[x % len(keys)])
            .map(lambda x: 1, parallelism=parallelism)
            .reduce(lambda one, other: one + other, parallelism=parallelism, emit="last")
        ),
        backend=backend,
    )
    assert counts == [len(keys) * 10]


def test_scalars_of_numpy_are_keys_like_the_numbers_that_they_equal(backend: Backends) -> None:
    numpy = pytest.importorskip("numpy")
    keys = [1, numpy.int64(1), numpy.float32(1), numpy.bool_(True), numpy.uint8(1), (1,), (numpy.int8(1),), "a"]
    keys += [numpy.str_("a"), ("a", numpy.bool_(False)), ("a", 0)]
    counts = run(
        range(len(keys)),
        lambda stream: (
            stream.keyby(lambda x: keys[x])
            .map(lambda x: 1, parallelism=3)
            .reduce(lambda one, other: one + other, parallelism=3, emit="last")
        ),
        backend=backend,
    )
    assert sorted(counts) == [2, 2, 2, 5]
    wrong = [numpy.float64("nan"), numpy.datetime64("NaT"), (1, numpy.float32("nan"))]
    assert run(range(3), lambda stream: stream.keyby(lambda x: wrong[x], on_error="skip"), backend=backend) == []
