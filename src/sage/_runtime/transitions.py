"""The lifecycle of a job, without I/O: events in, next state and actions out.

`step(state, event, now)` returns the next state and the actions to carry out. It knows no thread, no clock and no
service; a supervisor carries out the actions and feeds back the events. So every order, crash point and time-out can be
tested with numbers.
"""

from __future__ import annotations

import math
from dataclasses import replace
from heapq import heapify, heappop, heappush
from typing import TYPE_CHECKING

from sage._runtime.dues import without_first
from sage._runtime.lifecycle import (
    STOP_STATES,
    Action,
    ActionKind,
    Begin,
    CannotBegin,
    Failure,
    FailureKind,
    ServiceDied,
    ServiceFailed,
    State,
    StopRequested,
    TaskClosing,
    TaskEnded,
    TaskEvents,
    TaskFailed,
    TaskOpened,
    TaskRecord,
    TasksRenewed,
    Tick,
)
from sage._runtime.service_transitions import (
    check_replicas,
    expire_service,
    kill_service,
    start_service,
    stop_service,
    take_service,
    watch,
)
from sage._runtime.states import SERVICE_TERMINAL, TASK_TERMINAL, JobState, ServiceState, StopMode, TaskState
from sage._runtime.transition import Transition
from sage.errors import ServiceUnavailableError

if TYPE_CHECKING:
    from sage._runtime.dues import Due
    from sage._runtime.lifecycle import LifecycleEvent, TaskEvent


GOING_ON = frozenset({JobState.NEW, JobState.STARTING, JobState.RUNNING, JobState.RESTARTING, JobState.DRAINING})
"""The states of a job that nobody has asked to end at once."""


def step(
    state: State, event: LifecycleEvent, now: float, happened_at: float | None = None
) -> tuple[State, tuple[Action, ...]]:
    """Return what follows from an event at the monotonic time `now`: the next state, and the actions.

    An event that had to wait gives `happened_at`. Only deadlines before that have passed: another event that waits
    behind this one may say that a hook has ended in time.
    """
    if state.job is JobState.SEALED:
        return state, ()
    t = Transition(state, now)
    _take(t, event)
    if t.job is JobState.RESTARTING and state.tally.services_unready:
        t.begin_bounds_anew()  # calls of the tasks may wait for the service
    _expire(t, now if happened_at is None else min(happened_at, now))
    _advance(t)
    return t.state(), tuple(t.actions)


# --- events ---


def _take(t: Transition, event: LifecycleEvent) -> None:
    match event:
        case Begin():
            if t.job is JobState.NEW:  # it may have been stopped before
                t.move_job(JobState.STARTING)
                t.startable.update(t.services)
                for name in t.services:
                    watch(t, name)
        case CannotBegin():
            _take_refusal(t, event)
        case StopRequested():
            _take_stop(t, event)
        case ServiceDied() | ServiceFailed() if t.job is JobState.NEW:
            t.early = (*t.early, event)
        case TaskOpened() | TaskFailed() | TaskClosing() | TaskEnded():
            if t.tasks[event.task].state not in TASK_TERMINAL:
                _take_task(t, event)
        case TaskEvents():
            for one in event.events:
                _take(t, one)
        case TasksRenewed():
            _take_renewal(t, event)
        case Tick():
            pass
        case _:
            take_service(t, event)
    if t.early and t.job is not JobState.NEW:
        deaths, t.early = t.early, ()
        for death in deaths:
            take_service(t, death)


def _take_refusal(t: Transition, event: CannotBegin) -> None:
    """Begin a job that only ends services it took over; fail any other, which has not built anything yet."""
    if t.job is not JobState.NEW:
        return
    if not t.tasks and not t.start.until_asked and not t.tally.services_unready:
        _take(t, Begin())
        return
    t.fail(FailureKind.BEGIN, "", error=event.error)
    t.arm()
    t.move_job(JobState.FAILING)
    t.cancel_tasks()


def _take_stop(t: Transition, event: StopRequested) -> None:
    way = t.way
    if way is not None and event.way <= way:
        return
    t.way = event.way
    t.arm(event.budget_s)
    if event.hook_cap_s is not None:
        t.hook_cap_s = event.hook_cap_s
        capped = t.now + event.hook_cap_s
        t.tasks_due = min(t.tasks_due, capped)
        for name, record in t.services.items():
            if record.hook is not None and t.stopping:
                t.bring_forward(name, capped)
        t.tighten_tasks()
    job = t.job
    if job in GOING_ON or job is JobState.CANCELLING:
        t.ended_by = event.way
    if event.way is StopMode.KILL:
        _kill(t)
    elif event.way in (StopMode.DRAIN, StopMode.STOP) and job in (JobState.RUNNING, JobState.DRAINING):
        if event.way is StopMode.STOP:
            t.hold_back()
        if job is JobState.RUNNING:
            t.move_job(JobState.DRAINING)
            t.stop_sources(lambda plan: not plan.serving)
    elif job in GOING_ON:
        t.move_job(JobState.CANCELLING)
        t.cancel_tasks()


def _take_renewal(t: Transition, event: TasksRenewed) -> None:
    if t.job is not JobState.RESTARTING:
        return  # it was stopped meanwhile
    if event.error is None:
        t.renew_tasks()
    else:
        t.fail(FailureKind.TASK, next(iter(t.tasks)), error=event.error)
        t.fail_job()


def _take_task(t: Transition, event: TaskEvent) -> None:
    name = event.task
    match event:
        case TaskOpened():
            t.put_task(name, TaskRecord(t.tasks[name].state, t.tasks[name].due, opened=True))
        case TaskFailed() if _takes_along(t, event.error):
            pass
        case TaskFailed() if not event.closing and t.may_restart(event.error):
            t.restart_tasks(name, event.error)
        case TaskFailed():
            trouble = FailureKind.CLOSE if event.closing else FailureKind.TASK
            t.fail(trouble, name, event.closing, event.error)
            t.fail_job()
        case TaskClosing():
            due = t.now + t.start.limits.close_timeout_s
            t.move_task(name, TaskState.CLOSING, due=min(due, t.tasks_due))
        case TaskEnded():
            t.move_task(name, event.state)


def _takes_along(t: Transition, error: BaseException) -> bool:
    """Return whether a service that died, and failed the job by that, is all that a task failed for; then say so.

    Whether a task still hears of such a death is a matter of moments, and it is not a second failure.
    """
    failures: tuple[Failure, ...] = t.failures
    reason: BaseException | None = error
    looked_at: set[int] = set()
    while reason is not None and id(reason) not in looked_at:  # `raise error from error` makes a circle
        looked_at.add(id(reason))
        for place, failure in enumerate(failures):
            is_death = failure.trouble is FailureKind.DIED and failure.counts
            if is_death and isinstance(reason, ServiceUnavailableError) and reason.service == failure.name:
                known = replace(failure, caused=(*failure.caused, error))
                t.failures = (*failures[:place], known, *failures[place + 1 :])
                return True
        reason = reason.__cause__
    return False


def _kill(t: Transition) -> None:
    """Give up on everything that has not ended."""
    if t.job in GOING_ON:
        t.move_job(JobState.CANCELLING)
    for name, task in list(t.tasks.items()):
        if task.state is TaskState.CREATED:
            t.move_task(name, TaskState.SKIPPED)
        elif task.state not in TASK_TERMINAL:
            t.abandon_task(name)
    for name in t.services:
        kill_service(t, name)


# --- time ---


def _expire(t: Transition, until: float) -> None:
    """Act on everything whose time has come until then."""
    if t.job is JobState.DRAINING and until >= t.drain_due:
        t.move_job(JobState.CANCELLING)
        t.cancel_tasks()
    late: set[Due] = set()
    while t.tally.dues is not None and t.tally.dues[1][0] <= until:
        if t.is_due(t.tally.dues[1]):
            late.add(t.tally.dues[1])
        t.tally.dues = without_first(t.tally.dues)
    for name in sorted((name for _, is_task, name in late if is_task), key=t.start.shape.task_places.__getitem__):
        t.abandon_task(name)
    names = sorted({name for _, is_task, name in late if not is_task}, key=t.start.shape.service_places.__getitem__)
    for name, record in [(name, t.services[name]) for name in names]:
        expire_service(t, name, record)


# --- the possible next steps ---


def _advance(t: Transition) -> None:
    """Start, run, stop and seal everything that is due, until the state is stable."""
    check_replicas(t)
    if t.job is JobState.STARTING:
        _advance_start(t)
    if t.job is JobState.RESTARTING and t.tasks_over:
        _advance_restart(t)
    job = t.job
    if job is JobState.DRAINING or (job is JobState.RUNNING and not t.start.shape.serves_only):
        _stop_serving(t)
    waits = t.start.until_asked and job is JobState.RUNNING
    if (
        t.tasks_over
        and not waits
        and job in (JobState.RUNNING, JobState.DRAINING, JobState.CANCELLING, JobState.FAILING)
    ):
        t.arm()
        t.move_job(JobState.STOPPING_SERVICES)
    if t.job is JobState.STOPPING_SERVICES:
        _advance_stop(t)


def _advance_start(t: Transition) -> None:
    shape = t.start.shape
    for name in sorted(t.startable, key=shape.service_places.__getitem__):
        if t.services[name].state is ServiceState.REGISTERED and t.tally.unmet[name] == 0:
            start_service(t, name)
    if t.tally.services_unready:
        return
    if t.start.tally.services_unready or t.start.job is not JobState.STARTING:
        t.openable.update(t.tasks)  # some may have waited for the services alone
    for name in sorted(t.openable, key=shape.task_places.__getitem__):
        if t.tally.unopened[name] == 0 and t.tasks[name].state is TaskState.CREATED:
            t.move_task(name, TaskState.OPENING)
            t.do(ActionKind.OPEN_TASK, name)
    if t.tally.tasks_unopened == 0:
        t.move_job(JobState.RUNNING)
        for name in t.tasks:
            t.move_task(name, TaskState.RUNNING)
            t.do(ActionKind.RUN_TASK, name)


def _advance_restart(t: Transition) -> None:
    """Have the tasks made again after the pause; one that could not be ended might still write."""
    if any(record.state is TaskState.ABANDONED for record in t.tasks.values()):
        t.fail_job()
    elif t.now >= t.restarts.due:
        t.restarts = replace(t.restarts, due=math.inf)
        t.do(ActionKind.RENEW_TASKS)


def _stop_serving(t: Transition) -> None:
    """End the pipelines that only answer requests, once everything that may call them has ended."""
    if t.tally.main_left == 0 and not t.serving_stopped:
        t.serving_stopped = True
        t.stop_sources(lambda plan: plan.serving)


def _advance_stop(t: Transition) -> None:
    """Stop services that nothing needs any more, and seal the job when all services have ended.

    With dependencies declared, services that do not depend on each other stop side by side; with none, strictly one
    after the other, the last registered first. One that ends at once makes room for others, wherever they stand.
    """
    begins = t.start.job is not JobState.STOPPING_SERVICES
    if t.start.shape.side_by_side:
        _stop_side_by_side(t, set(t.services) if begins else {*t.touched, *t.stoppable})
    elif begins or t.seen is not t.start.seen or any(t.services[name].state not in STOP_STATES for name in t.touched):
        while _stop_in_turn(t):
            pass
    if t.tally.services_left == 0:
        t.move_job(JobState.SEALED)
        t.do(ActionKind.SEAL)


def _stop_side_by_side(t: Transition, names: set[str]) -> None:
    """Stop those of `names` that may be stopped, then those that they make room for, always the last ones first."""
    places, order = t.start.shape.service_places, t.start.shape.service_names
    todo = [(0, -places[name]) for name in names]
    heapify(todo)
    while todo:
        turn, place = heappop(todo)
        name = order[-place]
        if not t.dependents_over(name) or t.services[name].state in SERVICE_TERMINAL | STOP_STATES:
            continue
        t.stoppable.clear()
        stop_service(t, name)
        for freed in t.stoppable:
            heappush(todo, (turn if -places[freed] > place else turn + 1, -places[freed]))


def _stop_in_turn(t: Transition) -> bool:
    """Go through the services from the last one to the first that has not ended at once; return whether any did."""
    order, place = t.start.shape.service_names, t.tally.stop_place
    while place >= 0 and t.services[order[place]].state in SERVICE_TERMINAL:
        place -= 1
    t.tally.stop_place = place
    has_changed = False
    front = ""  # of the replicas that end now
    ends = SERVICE_TERMINAL | STOP_STATES
    for name in (order[at] for at in range(place, -1, -1)):
        if front and t.start.service_plans[name].front != front:
            break
        if front and t.services[name].state in ends:
            continue
        if not t.dependents_over(name):
            continue
        before = t.services[name]
        if before.state not in ends:
            stop_service(t, name)
            has_changed |= t.services[name] is not before
        if t.services[name].state not in SERVICE_TERMINAL:
            front = t.start.service_plans[name].front
            if not front:
                break
    return has_changed
