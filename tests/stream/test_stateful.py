"""Operators that keep a state for each key, alone and in one loop with their neighbours."""

from __future__ import annotations

import random
from typing import TYPE_CHECKING, Any

import pytest

from sage import FunctionError, LocalEnvironment, Retry, Source
from sage.testing import run

if TYPE_CHECKING:
    from collections.abc import Callable

    from sage import DataStream
    from sage._runtime.backend import Backend

    Backends = Callable[[], Backend]

MANY = random.Random(1).choices(range(50), k=2_000)
"""More records than run operator by operator."""


def rest(number: int) -> int:
    return number % 3


def running(total: int, number: int) -> tuple[int, tuple[int, int]]:
    return total + number, (number, total + number)


def running_totals(numbers: list[int]) -> list[tuple[int, int]]:
    totals = dict.fromkeys(range(3), 0)
    found = []
    for number in numbers:
        totals[rest(number)] += number
        found.append((number, totals[rest(number)]))
    return found


@pytest.mark.parametrize("count", [20, len(MANY)])
def test_a_state_goes_from_record_to_record_of_its_key(backend: Backends, count: int) -> None:
    numbers = MANY[:count]
    arrived = run(numbers, lambda stream: stream.keyby(rest).stateful_map(running, 0), backend=backend)
    assert arrived == running_totals(numbers)


def test_parallel_states_are_those_of_one_task(backend: Backends) -> None:
    arrived = run(
        MANY,
        lambda stream: stream.keyby(rest, parallelism=2).stateful_map(running, 0, parallelism=3),
        backend=backend,
    )
    totals = {key: sum(number for number in MANY if rest(number) == key) for key in range(3)}
    assert len(arrived) == len(MANY)
    assert {key: max(total for number, total in arrived if rest(number) == key) for key in range(3)} == totals


def test_a_result_of_none_is_a_record(backend: Backends) -> None:
    arrived = run([1, 2], lambda stream: stream.keyby(rest).stateful_map(lambda old, x: (x, None), 0), backend=backend)
    assert arrived == [None, None]


def test_a_coroutine_function_may_find_the_result(backend: Backends) -> None:
    async def add(total: int, number: int) -> tuple[int, int]:
        return total + number, total + number

    arrived = run([3, 4, 6], lambda stream: stream.keyby(rest).stateful_map(add, 0), backend=backend)
    assert arrived == [3, 4, 9]


@pytest.mark.parametrize("count", [20, len(MANY)])
def test_a_state_that_is_changed_in_place_belongs_to_one_key(backend: Backends, count: int) -> None:
    def collect(seen: list[int], number: int) -> tuple[list[int], list[int]]:
        seen.append(number)
        return seen, [*seen]

    given: list[int] = []
    arrived = run(MANY[:count], lambda stream: stream.keyby(rest).stateful_map(collect, given), backend=backend)
    for seen in arrived:
        assert {rest(number) for number in seen} == {rest(seen[-1])}
    assert given == []


@pytest.mark.parametrize("result", [7, [1, 2], "ab", (1, 2, 3)])
def test_a_result_that_is_not_a_pair_names_operator_and_record(backend: Backends, result: Any) -> None:
    def wrong(state: int, number: int) -> Any:
        return result if number == 3 else (state, number)

    with pytest.raises(FunctionError, match='operator "wrong" failed on record 3: ') as caught:
        run(range(5), lambda stream: stream.keyby(rest).stateful_map(wrong, 0), backend=backend)
    assert f"{result!r} is not a pair of the new state and a result" in str(caught.value)
    assert caught.value.__cause__ is not None
    assert "Return (state, result)." in caught.value.__cause__.__notes__[0]


class OneByOne(Source[int]):
    """Gives one record with each read, so that each is a batch of its own."""

    def __init__(self) -> None:
        self._left = iter(range(8))

    def read(self, records_max: int) -> list[int] | None:
        return next(([number] for number in self._left), None)


@pytest.mark.parametrize("result", [7, [1, 2], "ab", (1, 2, 3)])
@pytest.mark.parametrize("place", range(8))
def test_it_is_named_in_any_batch(place: int, result: Any) -> None:
    def wrong(state: int, number: int) -> Any:
        return result if number == place else (state, number)

    env = LocalEnvironment("pairs")
    env.from_source(OneByOne()).keyby(rest).stateful_map(wrong, 0).sink(lambda _: None)
    with pytest.raises(FunctionError) as caught:
        env.run()
    assert f"{result!r} is not a pair of the new state and a result" in str(caught.value)


def test_a_record_that_fails_leaves_the_state(backend: Backends) -> None:
    def add(total: int, number: int) -> tuple[int, int]:
        if number % 5 == 0:
            raise ValueError(number)
        return total + number, total + number

    arrived = run(MANY, lambda stream: stream.keyby(lambda x: 0).stateful_map(add, 0, on_error="skip"), backend=backend)
    kept = [number for number in MANY if number % 5]
    assert arrived == [sum(kept[: place + 1]) for place in range(len(kept))]


@pytest.mark.in_one_process
def test_a_retried_record_finds_the_state_of_its_key(backend: Backends) -> None:
    failed: set[tuple[int, int]] = set()

    def add(total: int, number: int) -> tuple[int, tuple[int, int]]:
        if (total, number) not in failed and number % 7 == 0:
            failed.add((total, number))
            raise ConnectionError("once more")
        return running(total, number)

    arrived = run(
        MANY,
        lambda stream: stream.keyby(rest).stateful_map(add, 0, on_error=Retry(2, (0.0, 0.0))),
        backend=backend,
    )
    assert arrived == running_totals(MANY)
    assert failed


@pytest.mark.parametrize("count", [20, len(MANY)])
def test_count_emits_each_count_or_only_the_last(backend: Backends, count: int) -> None:
    numbers = MANY[:count]
    assert run(numbers, lambda stream: stream.keyby(rest).count(), backend=backend) == [
        (rest(number), sum(rest(other) == rest(number) for other in numbers[: place + 1]))
        for place, number in enumerate(numbers)
    ]
    last = run(numbers, lambda stream: stream.keyby(rest).count(emit="last", parallelism=2), backend=backend)
    assert sorted(last) == [(key, [*map(rest, numbers)].count(key)) for key in range(3)]


@pytest.mark.parametrize("count", [20, len(MANY)])
def test_aggregate_emits_results_with_their_keys(backend: Backends, count: int) -> None:
    def mean(stream: DataStream[int], emit: Any) -> DataStream[Any]:
        keyed = stream.keyby(lambda x: "all")
        return keyed.aggregate((0, 0), lambda s, x: (s[0] + x, s[1] + 1), lambda s: s[0] / s[1], emit=emit)

    numbers = MANY[:count]
    means = [("all", sum(numbers[:size]) / size) for size in range(1, count + 1)]
    assert run(numbers, lambda stream: mean(stream, "each"), backend=backend) == means
    assert run(numbers, lambda stream: mean(stream, "last"), backend=backend) == means[-1:]


def test_aggregate_emits_the_value_itself_without_a_result(backend: Backends) -> None:
    def add(seen: frozenset[int], number: int) -> frozenset[int]:
        return seen | {number}

    arrived = run([1, 4, 2], lambda stream: stream.keyby(rest).aggregate(frozenset[int](), add), backend=backend)
    assert arrived == [(1, frozenset([1])), (1, frozenset([1, 4])), (2, frozenset([2]))]


def test_an_aggregate_that_is_changed_in_place_belongs_to_one_key(backend: Backends) -> None:
    def add(seen: list[int], number: int) -> list[int]:
        seen.append(number)
        return seen

    arrived = run(
        MANY,
        lambda stream: stream.keyby(rest).aggregate(list[int](), add, emit="last").map(lambda x: x),
        backend=backend,
    )
    assert sorted(arrived) == [(key, [number for number in MANY if rest(number) == key]) for key in range(3)]


@pytest.mark.parametrize("count", [20, len(MANY)])
def test_top_k_gives_the_greatest_first(backend: Backends, count: int) -> None:
    numbers = MANY[:count]
    groups = {key: [number for number in numbers if rest(number) == key] for key in range(3)}
    arrived = run(numbers, lambda stream: stream.keyby(rest).top_k(4, emit="last"), backend=backend)
    assert dict(arrived) == {key: sorted(group, reverse=True)[:4] for key, group in groups.items()}
    least = run(numbers, lambda stream: stream.keyby(rest).top_k(2, by=lambda x: -x, emit="last"), backend=backend)
    assert dict(least) == {key: sorted(group)[:2] for key, group in groups.items()}


def test_each_top_k_is_a_list_of_its_own_and_the_first_of_equal_ones_stays(backend: Backends) -> None:
    words = ["bb", "a", "cc", "ddd", "ee"]
    arrived = run(words, lambda stream: stream.keyby(lambda x: 0).top_k(2, by=len), backend=backend)
    assert [best for _, best in arrived] == [["bb"], ["bb", "a"], ["bb", "cc"], ["ddd", "bb"], ["ddd", "bb"]]


@pytest.mark.parametrize("count", [20, len(MANY)])
def test_distinct_lets_the_first_record_of_each_key_pass(backend: Backends, count: int) -> None:
    pairs = [(number, place) for place, number in enumerate(MANY[:count])]
    firsts = {number: (number, place) for number, place in reversed(pairs)}
    arrived = run(pairs, lambda stream: stream.keyby(lambda pair: pair[0]).distinct(), backend=backend)
    assert arrived == sorted(firsts.values(), key=lambda pair: pair[1])
    counts = run(
        pairs, lambda stream: stream.keyby(lambda pair: pair[0]).distinct().count(emit="last"), backend=backend
    )
    assert sorted(counts) == [(number, 1) for number in sorted(firsts)]


ROWS = [("a", 1, "x"), ("b", 1, "x"), ("a", 1, "y"), ("a", 2, "y"), ("b", 1, "x"), ("a", 1, "y")]


def test_changed_lets_records_pass_that_differ_from_the_one_before(backend: Backends) -> None:
    def passed(**options: Any) -> list[Any]:
        return run(ROWS, lambda stream: stream.keyby(lambda row: row[0]).changed(**options), backend=backend)

    assert passed() == [ROWS[place] for place in (0, 1, 2, 3, 5)]
    assert passed(fingerprint=lambda row: row[1]) == [ROWS[place] for place in (0, 1, 3, 5)]


def test_a_record_that_is_changed_later_is_compared_as_it_came(backend: Backends) -> None:
    def use(row: dict[str, int]) -> int:
        return row.pop("count")

    arrived = run(
        [{"count": number // 2} for number in range(6)],
        lambda stream: stream.keyby(lambda row: 0).changed().map(use),
        backend=backend,
    )
    assert arrived == [0, 1, 2]
