"""Many keys: what a reduction emits at its end goes on in parts, and no step takes single records for long."""

from __future__ import annotations

import time

import pytest

from sage import LocalEnvironment
from sage.records import BATCH_RECORDS_MAX, Batch


def added(left: tuple[int, int], right: tuple[int, int]) -> tuple[int, int]:
    return left[0], left[1] + right[1]


@pytest.mark.parametrize("count", [0, 1, BATCH_RECORDS_MAX, BATCH_RECORDS_MAX + 1, 20_000])
@pytest.mark.parametrize("parallelism", [1, 2])
def test_each_key_is_emitted_once_in_the_order_in_which_it_came(count: int, parallelism: int) -> None:
    env = LocalEnvironment("keys")
    pairs = [(key, 1) for key in range(count)] * 2
    out: list[tuple[int, int]] = []
    keyed = env.from_batch(pairs).keyby(lambda pair: pair[0])
    keyed.reduce(added, emit="last", parallelism=parallelism).sink(out.append)
    env.submit(autostop=True)
    assert sorted(out) == [(key, 2) for key in range(count)]
    for task in range(parallelism):
        own = [key for key, _ in out if key % parallelism == task]
        assert own == sorted(own)


def test_ten_times_the_keys_take_about_ten_times_the_processor_time() -> None:
    def seconds(count: int) -> float:
        env = LocalEnvironment("growing")
        keyed = env.from_batch([(key, 1) for key in range(count)]).keyby(lambda pair: pair[0])
        keyed.reduce(added, emit="last", parallelism=2).sink(lambda _: None)
        began_s = time.process_time()
        env.submit(autostop=True)
        return time.process_time() - began_s

    few = min(seconds(20_000) for _ in range(3))
    assert min(seconds(200_000) for _ in range(2)) < 10 * few * 2.5


def test_parts_grow_and_lose_nothing() -> None:
    parts = [list(part.values) for part in Batch(list(range(10_000))).parts(1)]
    assert [len(part) for part in parts[:4]] == [1, 4, 16, 64]
    assert max(map(len, parts)) == BATCH_RECORDS_MAX
    assert [value for part in parts for value in part] == list(range(10_000))
