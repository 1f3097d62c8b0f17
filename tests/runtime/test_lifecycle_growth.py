"""What a step of the lifecycle costs does not grow with the job: counted in calls of functions, not by a clock."""

from __future__ import annotations

import math
import resource
import sys
import threading
from collections import deque
from collections.abc import Callable
from queue import Empty
from typing import Any

import pytest
from support.recording_services import report_of

from sage import BaseService, LocalEnvironment, ServiceOptions
from sage._backends.threads import ThreadsBackend
from sage._runtime.dues import Dues, with_due, without_first
from sage._runtime.lifecycle import (
    Action,
    ActionKind,
    Begin,
    DependencySeen,
    HookEnded,
    LifecycleEvent,
    Limits,
    ServicePlan,
    State,
    TaskEnded,
    TaskEvent,
    TaskEvents,
    TaskFailed,
    TaskOpened,
    TaskPlan,
    begin,
)
from sage._runtime.states import JobState, ServiceState, TaskState
from sage._runtime.transitions import step

HOOKS = frozenset({"setup", "start", "stop", "cleanup"})
FEW, MANY = 50, 500
ROUNDS = 3

Requires = Callable[[int], tuple[int, ...]]

SHAPES: dict[str, Requires] = {
    "none": lambda number: (),
    "chain": lambda number: (number - 1,) if number else (),
    "fan out": lambda number: (0,) if number else (),
    "fan in": lambda number: tuple(range(FEW - 1)) if number == FEW - 1 else (),
    "levels": lambda number: tuple(range(number // 10 * 10 - 10, number // 10 * 10 - 7)) if number >= 10 else (),
}


class Life:
    """Drives a job through its whole life; whatever it is asked to do is done at once, in the order of the actions."""

    def __init__(self, state: State, seen: list[tuple[str, str]]) -> None:
        self.state = state
        self.seen = seen
        self.stopped: list[str] = []

    def run(self) -> State:
        todo: deque[LifecycleEvent] = deque([Begin()])
        while todo:
            self.state, actions = step(self.state, todo.popleft(), 0.0)
            for action in actions:
                todo.extend(self.follow(action))
        return self.state

    def follow(self, action: Action) -> list[LifecycleEvent]:
        name, hook = action.target, action.hook
        if action.do is ActionKind.RUN_HOOK:
            if hook == "stop":
                self.stopped.append(name)
            return [HookEnded(name, action.incarnation, hook, {"build": HOOKS, "drain": True}.get(hook))]
        if action.do is ActionKind.OPEN_TASK:
            return [TaskOpened(name)]
        if action.do is ActionKind.RUN_TASK:
            seen, self.seen = self.seen, []
            return [*(DependencySeen(*edge) for edge in seen), TaskEnded(name, TaskState.DONE)]
        return []


def life(n: int, requires: Requires, *, keep: bool = False, seen: bool = False) -> Life:
    plans = tuple(
        ServicePlan(
            f"s{number}",
            tuple(f"s{other}" for other in requires(number)),
            ServiceOptions(),
            keep,
        )
        for number in range(n)
    )
    tasks = tuple(TaskPlan(f"t{number}", (f"t{number - 1}",) if number else (), number == n - 1) for number in range(n))
    edges = [(f"s{number}", f"s{number + 1}") for number in range(0, n - 1, 10)] if seen else []
    return Life(begin(plans, tasks, Limits()), edges)


def calls_of(work: Callable[[], Any]) -> int:
    """Return how many functions are called meanwhile."""
    count = 0

    def see(frame: Any, event: str, argument: Any) -> None:
        nonlocal count
        count += event in ("call", "c_call")

    before = sys.getprofile()
    sys.setprofile(see)
    try:
        work()
    finally:
        sys.setprofile(before)
    return count


def test_a_start_and_a_stop_grow_with_the_replicas_of_a_service() -> None:
    lives = {}
    for n in (FEW, MANY):
        names = tuple(f"s[{number}]" for number in range(n))
        plans = [ServicePlan(name, (), ServiceOptions(required=False), front="s") for name in names]
        front = ServicePlan("s", names, ServiceOptions(replicas=n))
        lives[n] = Life(begin((*plans, front), (), Limits()), [])
    few, many = (calls_of(one.run) for one in lives.values())
    assert math.log(many / few) / math.log(MANY / FEW) < 1.1, (few, many)
    for one in lives.values():
        assert (one.state.job, one.state.failures) == (JobState.SEALED, ())
        assert len(one.stopped) == len(one.state.services)


@pytest.mark.parametrize(
    ("keep", "seen", "shape"),
    [
        *((False, False, shape) for shape in SHAPES),
        *(
            pytest.param(keep, seen, shape, marks=[] if shape == "levels" else pytest.mark.proof)
            for keep, seen in ((True, False), (False, True))
            for shape in SHAPES
        ),
    ],
)
def test_the_whole_life_of_a_job_grows_with_its_services(shape: str, keep: bool, seen: bool) -> None:
    lives = {n: life(n, SHAPES[shape], keep=keep, seen=seen) for n in (FEW, MANY)}
    few, many = (calls_of(one.run) for one in lives.values())
    exponent = math.log(many / few) / math.log(MANY / FEW)
    assert exponent < 1.1, (few, many)
    end = ServiceState.KEPT if keep else ServiceState.STOPPED
    for one in lives.values():
        assert one.state.job is JobState.SEALED
        assert {record.state for record in one.state.services.values()} == {end}
        assert one.state.failures == ()
        assert len(one.stopped) == (0 if keep else len(one.state.services))


def test_what_ended_in_time_is_not_late_because_the_supervisor_is() -> None:
    """Ten thousand events may wait, and some minutes pass: each is taken as of the moment at which it came."""
    one = life(3, SHAPES["none"])
    state, actions = step(one.state, Begin(), 0.0)
    builds = [action for action in actions if action.do is ActionKind.RUN_HOOK]
    assert [action.due for action in builds] == [60.0] * 3
    for number, action in enumerate(builds):
        event = HookEnded(action.target, 1, "build", HOOKS)
        state, actions = step(state, event, 500.0, 1.0 + number)
        (setup,) = [action for action in actions if action.do is ActionKind.RUN_HOOK]
        assert (setup.hook, setup.due) == ("setup", 60.0)
    assert state.failures == ()


@pytest.mark.parametrize(
    "ends", [[], [TaskFailed("t3", ValueError("this one"))]], ids=["all end well", "one fails while others end"]
)
def test_events_of_tasks_lead_to_the_same_together_and_one_after_the_other(ends: list[TaskEvent]) -> None:
    tasks = tuple(TaskPlan(f"t{number}") for number in range(6))
    state, _ = step(begin((), tasks, Limits()), Begin(), 0.0)
    opened = [TaskOpened(task.name) for task in tasks]
    ended = [TaskEnded(task.name, TaskState.DONE) for task in tasks]
    for events in (opened, [*ended[:2], *ends, *ended[2:]]):
        one_by_one = state
        done: list[Action] = []
        for event in events:
            one_by_one, actions = step(one_by_one, event, 1.0)
            done += actions
        state, together = step(state, TaskEvents(tuple(events)), 1.0)
        assert (state.job, state.tasks, state.failures) == (one_by_one.job, one_by_one.tasks, one_by_one.failures)
        assert list(together) == done
    assert state.job is JobState.SEALED


def test_the_supervisor_takes_events_of_tasks_that_wait_in_one_step() -> None:
    backend = ThreadsBackend()
    opened = [TaskOpened(f"t{number}") for number in range(300)]
    events: list[LifecycleEvent] = [*opened, Begin(), *opened[:2]]
    for moment, event in enumerate(events):
        backend._queue.put((event, float(moment)))
    assert [backend._next_event(0.0) for _ in range(3)] == [
        (TaskEvents(tuple(opened)), 0.0),
        (Begin(), 300.0),
        (TaskEvents(tuple(opened[:2])), 301.0),
    ]
    with pytest.raises(Empty):
        backend._next_event(0.0)


def test_a_hook_has_its_share_of_the_budget_however_many_follow() -> None:
    one = life(MANY, SHAPES["fan out"])
    one.run()
    state = life(MANY, SHAPES["fan out"]).state
    todo: deque[LifecycleEvent] = deque([Begin()])
    follower = Life(state, [])
    dues: list[float] = []
    while todo:
        state, actions = step(state, todo.popleft(), 0.0)
        for action in actions:
            if action.do is ActionKind.RUN_HOOK and action.hook in ("stop", "cleanup"):
                assert action.due is not None
                dues.append(action.due)
            todo.extend(follower.follow(action))
    assert len(dues) == 2 * MANY
    assert min(dues) >= Limits().stop_timeout_s / 10


def test_moments_come_in_order_and_the_old_ones_stay() -> None:
    dues: Dues = None
    versions = [dues]
    for number in range(500):
        dues = with_due(dues, (float(number * 7_919 % 1_009), False, f"s{number}"))
        versions.append(dues)
    for count, version in enumerate(versions):
        if count % 50 == 0:
            moments = []
            while version is not None:
                moments.append(version[1][0])
                version = without_first(version)
            assert moments == sorted(float(number * 7_919 % 1_009) for number in range(count))


class Idle(BaseService):
    """Has every hook."""

    def setup(self) -> None:
        pass

    def stop(self) -> None:
        pass

    def cleanup(self) -> None:
        pass


@pytest.mark.parametrize("shape", ["none", "chain", "fan out", "levels"])
def test_a_job_with_hundreds_of_services_is_clean(shape: str) -> None:
    env = LocalEnvironment("many")
    for number in range(400):
        names = [f"s{other}" for other in SHAPES[shape](number)]
        env.register_service(f"s{number}", Idle, options=ServiceOptions(depends_on=names))
    env.from_batch([1]).sink(int)
    env.submit(autostop=True)
    report = report_of(env)
    assert (report.state, report.cleanliness) == ("completed", "clean")
    assert {service.state for service in report.services} == {"stopped"}


def switches(count: int) -> float:
    """Return how often a job with services without hooks gave up the processor to wait, for each of its services."""
    env = LocalEnvironment("switches")
    for number in range(count):
        env.register_service(f"s{number}", BaseService)
    env.from_batch([1]).sink(int)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_nvcsw
    env.submit(autostop=True)
    return (resource.getrusage(resource.RUSAGE_SELF).ru_nvcsw - before) / count


def test_threads_of_services_do_not_crowd_around_the_interpreter() -> None:
    """Each that waits for it looks every 5 ms, so many that are woken at once take the time of all."""
    # What else the machine does adds to a measurement, and never takes away from it.
    few, many = (min(switches(count) for _ in range(ROUNDS)) for count in (100, 1_000))
    assert many <= 1.5 * few


def test_as_many_hooks_as_wanted_run_at_once() -> None:
    together = threading.Barrier(100)

    class Waiting(BaseService):
        def setup(self) -> None:
            together.wait(30.0)

    env = LocalEnvironment("together")
    for number in range(100):
        env.register_service(f"s{number}", Waiting)
    env.from_batch([1]).sink(int)
    env.submit(autostop=True)
    assert report_of(env).cleanliness == "clean"
