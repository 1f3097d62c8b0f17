"""Streams with keys: the three strategies, keys in functions, and reduce."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest

from sage import FunctionError, KeyByFunction, MapFunction, Retry
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
    arrived = run(
        [0, None, 0, None],
        lambda stream: stream.keyby(lambda x: x).reduce(lambda a, b: [a, b], emit="last"),
        backend=backend,
    )
    assert arrived == [[0, 0], [None, None]]


def test_a_record_that_fails_in_reduce_is_left_out(backend: Backends) -> None:
    arrived = run(
        [1, "x", 2],
        lambda stream: stream.keyby(lambda x: 0).reduce(lambda a, b: a + b, emit="last", on_error="skip"),
        backend=backend,
    )
    assert arrived == [3]


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
