"""Replicas on a cluster: how fast they are together, which one makes a call, and what one that dies takes along."""

from __future__ import annotations

import os
import signal
import sys
import time
from collections import Counter
from functools import partial
from itertools import accumulate
from typing import TYPE_CHECKING, Any, NamedTuple

import pytest
from support.ray_jobs import WAIT_S, Ticks, ends, master_pid, wait_until
from support.ray_nodes import known
from support.recording_services import Notes, Recorded

from sage import (
    BaseService,
    Cleanliness,
    JobError,
    JobErrorGroup,
    Line,
    MapFunction,
    Outcome,
    RemoteEnvironment,
    ServiceOptions,
)
from sage._processes import process

if TYPE_CHECKING:
    from collections.abc import Sequence

    from support.ray_nodes import GivenCluster

    from sage import ServiceHandle

pytestmark = pytest.mark.ray

NAMES = ["llm[1]", "llm[2]", "llm[3]", "llm[4]"]
CALL_S = 0.05
TASKS = 8
"""Callers in each of two workers: more calls than replicas at any time, also as each worker sees it."""
CALLS = 160
RATE = 3.7 / CALL_S
"""3.7 times as many calls in a second as one instance can make."""
START_BOUND_S = 90.0


class Answer(NamedTuple):
    """Who answered which call, and when it had begun and ended there."""

    name: str
    pid: int
    number: int
    began_at: float
    at: float


class Sleeper(Recorded):
    """Needs the same time for each call."""

    def process(self, data: int) -> Answer:
        began_at = time.time()
        time.sleep(CALL_S)
        return Answer(self.name, os.getpid(), data, began_at, time.time())

    async def later(self, data: int) -> str:
        return str(self.name)


def rate(answers: Sequence[Answer]) -> float:
    """Return how many calls were answered in a second."""
    times = sorted(answer.at for answer in answers)
    return (len(times) - 1) / (times[-1] - times[0])


def at_once_max(answers: Sequence[Answer]) -> int:
    """Return how many calls ran at once."""
    turns = sorted(turn for one in answers for turn in ((one.began_at, 1), (one.at, -1)))
    return max(accumulate(step for _, step in turns))


def is_over(pid: int) -> bool:
    return process(pid) is None


@pytest.mark.parametrize("is_timed", [False, pytest.param(True, marks=pytest.mark.proof)])
def test_four_replicas_share_the_calls_again_after_a_death(
    two_nodes: GivenCluster, journal: Notes, is_timed: bool
) -> None:
    """Of idempotent calls, none fails; the job goes on, and leaves nothing. Their speed is that of a machine alone."""
    env = RemoteEnvironment("fast", address=two_nodes.address, workers=2)
    policy: Any = {"restart": "on_failure", "backoff_s": (0.05, 0.05), "start_timeout_s": START_BOUND_S}
    llm = env.register_service("llm", Sleeper, journal, options=ServiceOptions(replicas=4, idempotent=True, **policy))
    answers: list[Answer] = []
    env.from_source(Ticks).map(llm, parallelism=2 * TASKS).sink(answers.append)
    job = env.submit()
    wait_until(lambda: len(answers) >= CALLS, START_BOUND_S)
    assert at_once_max(answers) == 4
    assert not is_timed or rate(answers) >= RATE
    pids = {answer.name: answer.pid for answer in answers}
    assert sorted(pids) == NAMES
    second = {one.pid for one in two_nodes.nodes[1].processes()}
    assert 0 < len(second.intersection(pids.values())) < 4

    os.kill(pids["llm[2]"], signal.SIGKILL)
    killed_at, before = time.time(), len(answers)

    def is_back() -> bool:
        return any(answer.name == "llm[2]" and answer.pid != pids["llm[2]"] for answer in answers[before:])

    wait_until(is_back, START_BOUND_S)
    back_s, before = time.time() - killed_at, len(answers)
    wait_until(lambda: len(answers) >= before + CALLS, START_BOUND_S)
    assert at_once_max(answers[before:]) == 4
    assert not is_timed or rate(answers[before:]) >= RATE
    job.stop()
    report = job.report
    hooks = report.service("llm[2]").hooks
    start_s = next(hook.duration_s for hook in hooks if (hook.hook, hook.incarnation) == ("build", 1))
    assert not is_timed or back_s < 2 * start_s
    assert (report.state, report.service("llm").errors) == (Outcome.STOPPED, 0)
    assert [operator.failed for operator in report.operators] == [0, 0, 0]
    assert ['service "llm[2]" ended by itself' in str(error) for error in report.errors] == [True]
    assert len({answer.number for answer in answers}) == len(answers)
    assert report.service("llm[2]").restarts == 1
    assert Counter(ends(journal)) == {f"{name}.{hook}": 1 for name in NAMES for hook in ("stop", "cleanup")}
    for pid in {answer.pid for answer in answers}:
        wait_until(partial(is_over, pid))


class User(BaseService):
    """A service that calls the replicas from its own process."""

    def __init__(self, llm: ServiceHandle[Sleeper]) -> None:
        self.llm = llm

    def process(self, data: int) -> str:
        name: str = self.llm.process(data).name
        return name


class Ask(MapFunction):
    """Calls by name, with a time-out, and in each of several processes."""

    def execute(self, data: int) -> tuple[int, set[str], str]:
        names = {
            self.call_service("llm", data).name,
            self.call_service_async("llm", data, timeout=WAIT_S).result().name,
            self.call_service("user", data),
            self.call_service("llm", data, method="later"),
        }
        return data % TASKS, names, str(self.service("web").url)


@pytest.mark.usefixtures("no_actor_is_left")
def test_callers_in_all_processes_find_the_same_replica_for_a_key(ray_address: str, journal: Notes) -> None:
    env = RemoteEnvironment("keys", address=ray_address, workers=2)
    options = ServiceOptions(replicas=3, affinity=lambda data: f"key {data % TASKS}", call_timeout_s=WAIT_S)
    llm = env.register_service("llm", Sleeper, journal, options=options)
    env.register_service("user", User, llm)
    words = [sys.executable, "-c", "import signal; print('up {port}', flush=True); signal.pause()"]
    env.register_command("web", words, ready=Line("up"), exit_codes=[-15], options=ServiceOptions(replicas=2))

    async def ask(data: int) -> tuple[int, str]:
        return data % TASKS, await llm.later(data)

    seen: list[tuple[int, set[str], str]] = []
    awaited: list[tuple[int, str]] = []
    numbers = env.from_batch(range(4 * TASKS))
    numbers.map(Ask, parallelism=4).sink(seen.append)
    numbers.map_async(ask).sink(awaited.append)
    report = env.run()
    by_key: dict[int, set[str]] = {key: {name for one, name in awaited if one == key} for key in range(TASKS)}
    for key, names, _ in seen:
        by_key[key] |= names
    assert len(seen) == len(awaited) == 4 * TASKS
    assert {len(names) for names in by_key.values()} == {1}
    assert len(set.union(*by_key.values())) > 1
    assert len({url for _, _, url in seen}) == 2
    assert (report.state, report.cleanliness) == (Outcome.COMPLETED, Cleanliness.CLEAN)
    lines = report.service("llm"), *(report.service(name) for name in NAMES[:3])
    assert [line.host for line in lines] == ["replicas", "ray", "ray", "ray"]
    assert lines[0].calls == sum(line.calls for line in lines[1:]) == 5 * 4 * TASKS


@pytest.mark.usefixtures("no_actor_is_left")
def test_too_few_replicas_fail_the_job(ray_address: str, journal: Notes) -> None:
    """A call that is not idempotent fails with its replica, and the other one is stopped in order."""
    env = RemoteEnvironment("too few", address=ray_address)
    llm = env.register_service("llm", Sleeper, journal, options=ServiceOptions(replicas=2, replicas_min=2))
    answers: list[Answer] = []
    env.from_source(Ticks).map(llm, on_error="skip").sink(answers.append)
    job = env.submit()
    wait_until(lambda: len({answer.name for answer in answers}) == 2)
    (pid,) = {answer.pid for answer in answers if answer.name == "llm[1]"}
    os.kill(pid, signal.SIGKILL)
    with pytest.raises((JobError, JobErrorGroup), match='service "llm" failed as 1 of its 2 replicas are left'):
        job.wait(WAIT_S)
    assert [job.report.service(name).state for name in NAMES[:2]] == ["lost", "stopped"]
    assert ends(journal) == ["llm[2].stop", "llm[2].cleanup"]


@pytest.mark.usefixtures("no_actor_is_left")
def test_a_master_that_follows_a_killed_one_stops_each_replica(ray_address: str, journal: Notes) -> None:
    env = RemoteEnvironment("followed", address=ray_address)
    llm = env.register_service("llm", Sleeper, journal, options=ServiceOptions(replicas=2))
    answers: list[Answer] = []
    env.from_source(Ticks).map(llm).sink(answers.append)
    job = env.submit()
    wait_until(lambda: bool(answers))
    os.kill(known(master_pid()).pid, signal.SIGKILL)
    with pytest.raises(JobError, match='the master of job "followed" was lost'):
        job.wait(WAIT_S)
    assert sorted(ends(journal)) == [f"{name}.{hook}" for name in NAMES[:2] for hook in ("cleanup", "stop")]
    assert job.report.service("llm[1]").state == "stopped"
