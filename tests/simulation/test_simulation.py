"""Random jobs with random faults on random schedules, each judged by what it should have done."""

from __future__ import annotations

from typing import TYPE_CHECKING

from simulation.replay import wrong_with_all

if TYPE_CHECKING:
    import pytest

SEEDS_PER_TEST = 100


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Cut the seeds into tests that each end well within the time-out, and that run side by side."""
    first: int = metafunc.config.getoption("--simulation-base")
    only: int | None = metafunc.config.getoption("--simulation-seed")
    count: int = metafunc.config.getoption("--simulation-count")
    ranges = [range(at, min(at + SEEDS_PER_TEST, first + count)) for at in range(first, first + count, SEEDS_PER_TEST)]
    if only is not None:
        ranges = [range(only, only + 1)]
    metafunc.parametrize("seeds", ranges, ids=[f"{part.start}-{part.stop - 1}" for part in ranges])


def test_no_schedule_breaks_a_promise(seeds: range) -> None:
    wrong = wrong_with_all(seeds)
    assert not wrong, "\n".join(wrong)
