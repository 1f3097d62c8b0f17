"""`simulate` runs a user's program on many schedules, and says which one it failed on."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from sage import LocalEnvironment
from sage.testing import simulate

if TYPE_CHECKING:
    from collections.abc import Callable

    from sage._runtime.backend import Backend


def arrivals(backend: Callable[[], Backend]) -> list[int]:
    env = LocalEnvironment("race", backend=backend)
    arrived: list[int] = []
    env.from_batch(range(20)).map(abs, parallelism=3).sink(arrived.append)
    env.submit(autostop=True)
    return arrived


def in_order(backend: Callable[[], Backend]) -> None:
    """Expect what parallel tasks do not promise, and what a first try may well show."""
    assert arrivals(backend) == list(range(20))


def test_a_sound_program_passes_on_every_schedule() -> None:
    seen: list[tuple[int, ...]] = []
    simulate(lambda backend: seen.append(tuple(arrivals(backend))), seeds=range(30))
    assert {tuple(sorted(arrived)) for arrived in seen} == {tuple(range(20))}
    assert len(set(seen)) > 1


def test_a_program_that_fails_is_told_its_seed_and_fails_with_it_again() -> None:
    with pytest.raises(AssertionError) as caught:
        simulate(in_order)
    (note,) = caught.value.__notes__
    seed = int(note.partition("seed ")[2].partition(":")[0])
    assert note == f"This came with seed {seed}: simulate(program, seeds=[{seed}]) shows it again."
    with pytest.raises(AssertionError):
        simulate(in_order, seeds=[seed])
