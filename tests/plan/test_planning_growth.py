"""Planning takes as much for each operator of a large graph as of a small one: counted in steps, not by a clock."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import pytest

from sage import BaseService, GraphError, LocalEnvironment, ServiceOptions

FEW, MANY = 60, 600


def chain(env: LocalEnvironment, n: int) -> None:
    stream = env.from_batch([1])
    for _ in range(n):
        stream = stream.map(abs)
    stream.sink(int)


def unfused(env: LocalEnvironment, n: int) -> None:
    stream = env.from_batch([1])
    for number in range(n):
        stream = stream.map(abs, parallelism=1 + number % 2)
    stream.sink(int)


def fan_out(env: LocalEnvironment, n: int) -> None:
    stream = env.from_batch([1])
    for _ in range(n):
        stream.sink(int)


def union(env: LocalEnvironment, n: int) -> None:
    first, *others = (env.from_batch([1]) for _ in range(n))
    first.union(*others).sink(int)


def named(env: LocalEnvironment, n: int) -> None:
    stream = env.from_batch([1], name="numbers")
    for number in range(n):
        stream = stream.map(abs, name=f"step {number}")
    stream.sink(int)


def letters(env: LocalEnvironment, n: int) -> None:
    dead = env.dead_letters()
    stream = env.from_batch([1])
    for _ in range(n):
        stream = stream.map(abs, on_error=dead)
    stream.sink(int)
    dead.sink(lambda _: None)


def served(env: LocalEnvironment, n: int) -> None:
    for number in range(n // 3):
        env.serve(f"pipeline{number}", lambda requests: requests.map(abs))
    env.from_batch([1]).sink(int)


def steps_of(work: Callable[[], Any]) -> int:
    """Return how many lines of Python are run meanwhile."""
    count = 0

    def see(frame: Any, event: str, argument: Any) -> Any:
        nonlocal count
        count += event == "line"
        return see

    before = sys.gettrace()
    sys.settrace(see)
    try:
        work()
    finally:
        sys.settrace(before)
    return count


@pytest.mark.parametrize("build", [chain, unfused, fan_out, union, named, letters, served])
def test_a_plan_is_made_and_shown_in_steps_that_grow_with_it(build: Callable[[LocalEnvironment, int], None]) -> None:
    def work(n: int) -> int:
        env = LocalEnvironment("growing")

        def whole() -> None:
            build(env, n)
            env.explain()
            env.explain("mermaid")

        return steps_of(whole)

    work(3)  # what is looked up once
    few, many = work(FEW), work(MANY)
    assert many < 1.2 * few * MANY / FEW, (few, many)


@pytest.mark.parametrize("backwards", [False, True])
def test_a_thousand_services_may_depend_on_each_other_in_a_row(backwards: bool) -> None:
    env = LocalEnvironment("row")
    numbers = range(3_000)
    for number in reversed(numbers) if backwards else numbers:
        names = [f"s{number - 1}"] if number else []
        env.register_service(f"s{number}", BaseService, options=ServiceOptions(depends_on=names))
    env.from_batch([1]).sink(int)
    env.explain()
    again = ServiceOptions(depends_on=["s2999"], replace=True)
    env.register_service("s0", BaseService, options=again)
    with pytest.raises(GraphError, match="in a cycle: s0 -> s2999 -> s2998" if not backwards else "in a cycle: s2999"):
        env.explain()
