"""Several threads use one environment at once: one of them runs it, and the others are told so."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from typing import Any

import pytest
from support.recording_services import Recorded

from sage import DuplicateNameError, GraphError, JobError, LocalEnvironment, ServiceOptions
from sage.testing import assert_clean

THREADS = 20
ELSEWHERE = ["shared memory *", "temporary *"]


def at_once(*works: Callable[[], Any]) -> list[Any]:
    """Run all at the same moment, each on a thread, and return what they return or raise."""
    ends: list[Any] = [None] * len(works)
    start = threading.Barrier(len(works))

    def run(place: int) -> None:
        start.wait()
        try:
            ends[place] = works[place]()
        except Exception as error:
            ends[place] = error

    threads = [threading.Thread(target=run, args=(place,)) for place in range(len(works))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return ends


@pytest.mark.parametrize("round_", range(10))
@pytest.mark.parametrize("keep", [False, True])
def test_one_runs_and_the_others_are_refused(round_: int, keep: bool) -> None:
    journal: list[str] = []
    with assert_clean(ignore=ELSEWHERE):
        env = LocalEnvironment("shared by threads")
        env.register_service("only", Recorded, journal)
        goes_on = threading.Event()
        results: list[int] = []
        env.from_batch([1]).map(lambda value: goes_on.wait(10) and value).sink(results.append)
        ends = at_once(*[lambda: env.submit(keep_services=keep)] * THREADS)
        jobs = [end for end in ends if not isinstance(end, Exception)]
        refused = [end for end in ends if isinstance(end, GraphError)]
        assert (len(jobs), len(refused)) == (1, THREADS - 1), ends
        assert all("already runs job" in str(error) or "by another thread" in str(error) for error in refused)
        goes_on.set()
        jobs[0].wait()
        env.close()
    assert results == [1]
    assert Counter(journal) == {f"only.{hook}": 1 for hook in ("build", "setup", "start", "stop", "cleanup")}


@pytest.mark.parametrize("round_", range(20))
def test_a_close_meanwhile_leaves_nothing(round_: int) -> None:
    """Kept services go to the next job or to the close, never to both."""
    journal: list[str] = []
    with assert_clean(ignore=ELSEWHERE):
        env = LocalEnvironment("closed by threads")
        env.register_service("kept", Recorded, journal)
        env.from_batch([1]).sink(int)
        env.submit(autostop=True, keep_services=True)
        works = [lambda: env.submit(autostop=True, keep_services=True), env.close, env.stop, env.close]
        ends = at_once(*works[round_ % 2 :], *works[: round_ % 2])
        env.close()
    assert all(end is None or not isinstance(end, Exception) or isinstance(end, GraphError | JobError) for end in ends)
    assert journal.count("kept.build") == journal.count("kept.cleanup") == journal.count("kept.stop")


@pytest.mark.parametrize("round_", range(10))
def test_a_name_is_registered_once(round_: int) -> None:
    env = LocalEnvironment("named by threads")
    ends = at_once(*[lambda: env.register_service("one", Recorded, [])] * THREADS)
    assert sum(isinstance(end, DuplicateNameError) for end in ends) == THREADS - 1
    again = ServiceOptions(replace=True)
    ends = at_once(*[lambda: env.register_service("one", Recorded, [], options=again)] * THREADS)
    assert not any(isinstance(end, Exception) for end in ends)


@pytest.mark.parametrize("round_", range(3))
def test_operators_are_added_by_several_threads(round_: int) -> None:
    env = LocalEnvironment("built by threads")
    results: list[int] = []

    def build() -> None:
        for _ in range(8):
            env.from_batch([1]).map(abs).sink(results.append)
            with suppress(GraphError):  # it is not whole at every moment
                env.explain()

    assert at_once(*[build] * 8) == [None] * 8
    env.submit(autostop=True)
    assert len(results) == 8 * 8
