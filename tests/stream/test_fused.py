"""Operators that run in one loop: every policy does what it does for an operator alone, and the counts add up."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from support.recording_services import report_of

from sage import JobError, LocalEnvironment, MapFunction, Retry
from sage._backends.threads import ThreadsBackend
from sage._operators.fused import _compiled
from sage.testing import StepBackend

if TYPE_CHECKING:
    from collections.abc import Callable

    from sage._runtime.backend import Backend

Step = tuple[str, int]

KINDS = ("map", "drop none", "filter", "skip", "letters", "retry", "keyby", "sum each", "filter that skips")
"""What a chain is drawn from; each step also has a small number that it works with."""

ODD = 7
"""Multiples of it are what functions refuse."""


@dataclass
class Expected:
    """What a chain does, by a loop that works record by record."""

    arrived: list[Any] = field(default_factory=list)
    letters: list[Any] = field(default_factory=list)
    taken: Counter[int] = field(default_factory=Counter)
    failed: Counter[int] = field(default_factory=Counter)


def refusing(value: int) -> int:
    if value % ODD == 0:
        raise ValueError(f"not {value}")
    return value


class NoneForSome(MapFunction):
    """A function of the old kind, which drops a record by returning nothing."""

    def __init__(self, modulus: int) -> None:
        self.modulus = modulus

    def execute(self, data: int) -> int | None:
        return data if data % (self.modulus + 1) else None


class ThirdTime:
    """Refuses some values, each twice."""

    def __init__(self) -> None:
        self.refused: Counter[int] = Counter()

    def __call__(self, value: int) -> int:
        if value % ODD == 0 and self.refused[value] < 2:
            self.refused[value] += 1
            raise ConnectionError("once more")
        return value + 1


def kept_or_refused(value: int) -> bool:
    return refusing(value) % 3 != 0


def expected_of(values: list[int], steps: list[Step]) -> Expected:
    expected = Expected()
    sums: dict[tuple[int, Any], int] = {}
    for value in values:
        key: Any = None
        for place, (kind, small) in enumerate(steps):
            expected.taken[place] += 1
            is_odd = value % ODD == 0
            match kind:
                case "map":
                    value = value * small + 1
                case "retry":
                    value += 1
                case "keyby":
                    key = value % (small + 1)
                case "sum each":
                    sums[place, key] = value = sums.get((place, key), 0) + value
                case "letters" if is_odd:
                    expected.letters.append(value)
            is_refused = is_odd and kind in ("skip", "letters", "filter that skips")
            expected.failed[place] += is_refused
            falls = kind in ("drop none", "filter") and value % (small + 1) == 0
            if is_refused or falls or (kind == "filter that skips" and value % 3 == 0):
                break
        else:
            expected.taken[len(steps)] += 1
            expected.arrived.append(value)
    return expected


def run(values: list[int], steps: list[Step], backend: Callable[[], Backend]) -> tuple[list[Any], list[Any], Any]:
    env = LocalEnvironment("chain", backend=backend)
    arrived: list[Any] = []
    letters: list[Any] = []
    stream: Any = env.from_batch(values)
    sent = env.dead_letters()
    sent.map(lambda letter: letter.value).sink(letters.append)
    for place, (kind, small) in enumerate(steps):
        name = f"step{place}"
        match kind:
            case "map":
                stream = stream.map(lambda value, small=small: value * small + 1, name=name)
            case "drop none":
                stream = stream.map(NoneForSome, small, name=name)
            case "filter":
                stream = stream.filter(lambda value, small=small: value % (small + 1), name=name)
            case "skip":
                stream = stream.map(refusing, on_error="skip", name=name)
            case "letters":
                stream = stream.map(refusing, on_error=sent, name=name)
            case "retry":
                stream = stream.map(ThirdTime(), on_error=Retry(3, (0.0, 0.0)), name=name)
            case "keyby":
                stream = stream.keyby(lambda value, small=small: value % (small + 1), name=name)
            case "sum each":
                stream = stream.reduce(lambda a, b: a + b, emit="each", name=name)
            case _:
                stream = stream.filter(kept_or_refused, on_error="skip", name=name)
    stream.sink(arrived.append, name="out")
    env.submit(autostop=True)
    return arrived, letters, report_of(env)


def with_keys(steps: list[Step]) -> list[Step]:
    """Drop sums of streams without keys."""
    return [step for place, step in enumerate(steps) if step[0] != "sum each" or ("keyby" in dict(steps[:place]))]


steps = st.lists(st.tuples(st.sampled_from(KINDS), st.integers(1, 4)), min_size=1, max_size=5).map(with_keys)
records = st.lists(st.integers(-50, 50), max_size=150)


def check(values: list[int], chain: list[Step], backend: Callable[[], Backend]) -> None:
    expected = expected_of(values, chain)
    arrived, letters, report = run(values, chain, backend)
    assert arrived == expected.arrived
    assert Counter(letters) == Counter(expected.letters)
    for place in range(len(chain) + 1):
        operator = report.operator("out" if place == len(chain) else f"step{place}")
        assert (operator.records_in, operator.failed) == (expected.taken[place], expected.failed[place]), chain
        if place < len(chain):
            assert operator.records_out == expected.taken[place + 1]


@given(records, steps)
def test_a_chain_does_what_a_loop_does_on_threads(values: list[int], chain: list[Step]) -> None:
    check(values, chain, ThreadsBackend)


@given(records, steps, st.integers(0, 10_000))
def test_a_chain_does_what_a_loop_does_however_it_is_cut(values: list[int], chain: list[Step], seed: int) -> None:
    check(values, chain, lambda: StepBackend(seed))


@pytest.mark.parametrize("place", range(4))
def test_the_error_names_the_operator_and_the_record_as_it_came_there(place: int) -> None:
    """Also among many records, and what came before the record has arrived."""

    def at(here: int) -> Callable[[int], int]:
        def function(value: int) -> int:
            if here == place and value == 3000 + here:
                raise ValueError("this one")
            return value + 1

        return function

    env = LocalEnvironment("chain")
    stream = env.from_batch(range(5000))
    arrived: list[int] = []
    for number in range(4):
        stream = stream.map(at(number), name=f"step{number}")
    stream.sink(arrived.append)
    with pytest.raises(JobError, match=f'operator "step{place}" failed on record {3000 + place}: ValueError: this one'):
        env.submit(autostop=True)
    assert arrived == list(range(4, 3004))
    report = report_of(env)
    assert [report.operator(f"step{number}").records_in for number in range(4)] == [
        3001 if number < place else 3000 for number in range(4)
    ]


def test_the_time_is_shared_among_the_operators_as_they_take_it() -> None:
    def slow(value: int) -> int:
        return sum(range(30_000)) + value  # so slow that the machine may stall while a quick one is measured

    env = LocalEnvironment("chain")
    env.from_batch(range(500)).map(lambda value: value, name="quick").map(slow, name="slow").sink(
        lambda _: None, name="out"
    )
    env.submit(autostop=True)
    report = report_of(env)
    assert report.operator("slow").busy_s > 4 * report.operator("quick").busy_s
    assert report.operator("slow").busy_s > 4 * report.operator("out").busy_s
    assert report.operator("out").busy_s > 0


def test_names_need_not_be_fit_for_files() -> None:
    env = LocalEnvironment("chain")
    arrived: list[int] = []
    env.from_batch(range(100)).map(abs, name='"{call0}" \\').map(abs, name="ünï'").sink(arrived.append)
    env.submit(autostop=True)
    assert arrived == list(range(100))


def test_branches_with_the_same_operators_are_compiled_once() -> None:
    _compiled.cache_clear()
    env = LocalEnvironment("branches")
    stream = env.from_batch(range(100))
    arrived: list[list[int]] = [[] for _ in range(30)]
    for number, out in enumerate(arrived):
        stream.map(number.__add__).sink(out.append)
    env.submit(autostop=True)
    assert arrived == [[value + number for value in range(100)] for number in range(30)]
    assert _compiled.cache_info().misses == 1


class Closed(MapFunction):
    """Has a `close`."""

    def execute(self, data: int) -> int:
        """Return the record."""
        return data


@pytest.mark.parametrize(("function", "closings"), [(abs, 0), (Closed, 1)])
def test_only_what_has_something_to_close_is_closing(function: Any, closings: int) -> None:
    env = LocalEnvironment("closing")
    env.from_batch([1, 2]).union(env.from_batch([3])).map(function, name="work").sink(lambda _: None)
    job = env.submit()
    job.wait()
    after = [event.after for event in job.events() if "work" in event.name]
    assert after.count("closing") == closings
    assert after[-1] == "done"
