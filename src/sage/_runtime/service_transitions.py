"""The transitions of one service: its start, its hooks, its restart, its end and its death."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Unpack

from sage._runtime.lifecycle import (
    BEST_GUARD_S,
    DRAIN_NET_S,
    EXIT_NET_S,
    EXTENSION_MAX_S,
    HEALTH_LEAST_S,
    KILL_EXIT_S,
    LEAST_SHARE,
    PAUSES,
    READY_LEAST_S,
    READY_LEAST_SHARE,
    READY_PAUSE_S,
    START_HOOKS,
    STOP_STATES,
    ActionKind,
    CleanupDeferred,
    DependencySeen,
    Exit,
    ExtendTimeout,
    FailureKind,
    HookEnded,
    RestRequested,
    ServiceDied,
    ServiceEvent,
    ServiceFailed,
    ServiceRecord,
    WakeRequested,
)
from sage._runtime.states import SERVICE_TERMINAL, JobState, ServiceState
from sage._runtime.transition import ServiceChanges, Transition
from sage.errors import describe

S = ServiceState

WORSE = (S.STOPPED, S.CLEANUP_FAILED, S.FAILED, S.FAILED_START, S.KILLED, S.LOST, S.ABANDONED)
"""The ends of a service that was started; a later one takes the place of an earlier one."""


# --- events ---


def take_service(t: Transition, event: ServiceEvent) -> None:
    """Act on an event of a service, unless it is over or happened to an earlier incarnation."""
    if isinstance(event, DependencySeen):
        # Two services may call each other; were each to wait for the other's end, none would come.
        if not t.needs(event.requires, event.service):
            t.see(event.service, event.requires)
        return
    record = t.services[event.service]
    if isinstance(event, WakeRequested):
        if record.state is S.RESTING and t.may_wake(event.service):
            _wake(t, event.service)
        elif record.rests and record.state in STOP_STATES:
            _change(t, event.service, wanted=True)
        return
    if record.incarnation != event.incarnation or record.state in SERVICE_TERMINAL | {S.BACKOFF, S.RESTING}:
        return
    match event:
        case HookEnded():
            if record.hook == event.hook:
                _take_hook(t, event)
        case ServiceDied():
            if record.hook != "exit" and not record.has_died:
                _take_death(t, event)
        case ServiceFailed():
            _take_failure(t, event)
        case CleanupDeferred():
            if not record.has_died:
                _change(t, event.service, hooks=record.hooks | {"cleanup"})
        case ExtendTimeout():
            _extend(t, event.service, event.seconds)
        case RestRequested():
            if record.state is S.READY and _may_rest(t, event.service):
                _change(t, event.service, rests=True)
                if _idle(record):
                    _rest_or_watch(t, event.service)


def _take_hook(t: Transition, event: HookEnded) -> None:
    name = event.service
    record = _change(t, name, hook=None, due=None)
    if record.state is S.STARTING:
        _take_start_hook(t, event)
    elif event.hook == "health":
        if (event.error is not None or event.value is False) and not t.stopping:
            _service_failed(t, name, FailureKind.UNHEALTHY, "health", event.error)
        else:
            _rest_or_watch(t, name)
    elif event.hook == "exit":
        _take_exit(t, event)
    else:
        if event.hook == "drain" and event.value is False:
            t.fail(FailureKind.LATE_CALLS, name, "drain")
        elif event.error is not None:
            t.fail(FailureKind.HOOK, name, event.hook, event.error)
            _worsen(t, name, S.CLEANUP_FAILED)
        _next_stop_hook(t, name, event.hook)


def _take_start_hook(t: Transition, event: HookEnded) -> None:
    name, record = event.service, t.services[event.service]
    if event.hook == "build" and event.error is None:
        assert isinstance(event.value, frozenset)
        record = _change(t, name, hooks=record.hooks | event.value)
    if event.error is not None:
        _start_failed(t, name, FailureKind.START, event.hook, event.error)
    elif t.starting_ends:
        pass  # advance() tears it down in its turn
    elif event.hook == "ready" and not event.value:
        _change(t, name, hook="ready-pause", due=_next_try(t, name))
    else:
        _next_start_hook(t, name, event.hook)


def _take_exit(t: Transition, event: HookEnded) -> None:
    name, record = event.service, t.services[event.service]
    if event.error is not None:
        # Whether the process is gone, nobody knows.
        t.fail(FailureKind.HOOK, name, "exit", event.error)
        _worsen(t, name, S.ABANDONED)
    elif isinstance(event.value, Exit) and (event.value.was_killed or event.value.left):
        if event.value.left or record.goal is not S.KILLED:  # or else the hook that was late is known already
            t.fail(FailureKind.KILLED, name, "exit", text=", ".join(event.value.left))
        _worsen(t, name, S.KILLED)
    elif isinstance(event.value, Exit) and event.value.unknown and not record.has_died:
        t.fail(FailureKind.HOOK, name, "exit", text=event.value.unknown)
        _worsen(t, name, S.CLEANUP_FAILED)
    _end_service(t, name)


def _take_death(t: Transition, event: ServiceDied) -> None:
    """The process is gone: only "exit" can run, which ends the processes it left behind."""
    name, record = event.service, t.services[event.service]
    if record.hook not in (None, *PAUSES):
        t.do(ActionKind.LOSE_HOOK, name, hook=record.hook, incarnation=record.incarnation)
    _change(t, name, hook=None, due=None, hooks=record.hooks & {"exit"}, has_died=True)
    _worsen(t, name, S.LOST)
    job = t.job
    needed = job is JobState.DRAINING and t.start.service_plans[name].options.required
    if record.state in STOP_STATES:
        t.fail(FailureKind.LOST, name, text=event.text)
        _next_stop_hook(t, name, "cleanup")
    elif t.stopping and not needed:
        t.fail(FailureKind.LOST, name, text=event.text)
        t.do(ActionKind.REFUSE_CALLS, name)
        if record.state is S.STARTING:
            _next_stop_hook(t, name, "cleanup")
        else:
            t.move_service(name, S.DEGRADED)
    elif record.state is S.STARTING:
        _start_failed(t, name, FailureKind.DIED, text=event.text)
    else:
        _service_failed(t, name, FailureKind.DIED, text=event.text)


def _take_failure(t: Transition, event: ServiceFailed) -> None:
    """The service is of no use any more, but nothing of it is left either."""
    name, record = event.service, t.services[event.service]
    if record.state is S.STARTING:
        _change(t, name, hook=None, due=None)
        _start_failed(t, name, FailureKind.FAILED, text=event.text)
    elif record.state is S.READY:
        _service_failed(t, name, FailureKind.FAILED, text=event.text)


def _extend(t: Transition, name: str, seconds: float) -> None:
    record = t.services[name]
    if record.due is None or record.hook in (None, "exit", *PAUSES) or t.hook_cap_s < math.inf:
        return
    more_s = min(seconds, EXTENSION_MAX_S - record.extended_s)
    due = max(_within_budget(t, name, record.due + more_s), record.due)
    more_s = due - record.due
    _change(t, name, due=due, start_due=record.start_due + more_s, extended_s=record.extended_s + more_s)


# --- changes ---


def _change(t: Transition, name: str, **changes: Unpack[ServiceChanges]) -> ServiceRecord:
    record = replace(t.services[name], **changes)
    t.put_service(name, record)
    return record


def _worsen(t: Transition, name: str, goal: ServiceState) -> None:
    """Let a service end in `goal`, unless its end is worse already."""
    if WORSE.index(goal) > WORSE.index(t.services[name].goal):
        _change(t, name, goal=goal)


def _run_hook(t: Transition, name: str, hook: str, due: float) -> None:
    record = _change(t, name, hook=hook, due=due, extended_s=0.0)
    t.do(ActionKind.RUN_HOOK, name, hook=hook, incarnation=record.incarnation, due=due)


# --- start and restart ---


def start_service(t: Transition, name: str) -> None:
    plan, record = t.start.service_plans[name], t.services[name]
    t.move_service(
        name,
        S.STARTING,
        incarnation=record.incarnation + 1,
        start_due=_within_budget(t, name, t.now + plan.options.start_timeout_s),
        hooks=plan.own_hooks,
        hook=None,
        again=False,
        goal=S.STOPPED,
        has_died=False,
    )
    _next_start_hook(t, name, "")


def _may_rest(t: Transition, name: str) -> bool:
    """Return whether a service may rest: another one that needs it may call it until the job has ended.

    A replica that cannot be done without does not rest: its successor may have died at once.
    """
    front = t.start.service_plans[name].front
    if t.stopping or not front:
        return not t.stopping and t.dependents_over(name)
    return _replicas_left(t, front) > t.start.service_plans[front].options.replicas_min


def _wake(t: Transition, name: str) -> None:
    """Start a service that rests. A replica whose start fails rests again, another service has failed."""
    start_service(t, name)
    _change(t, name, rests=bool(t.start.service_plans[name].front))


def _next_start_hook(t: Transition, name: str, last: str) -> None:
    record = t.services[name]
    later = START_HOOKS[START_HOOKS.index(last) + 1 :] if last else START_HOOKS
    hook = next((hook for hook in later if hook == "build" or hook in record.hooks), None)
    if hook is None:
        t.move_service(name, S.READY, hook=None, due=None, rests=False)
        t.do(ActionKind.ADMIT_CALLS, name)
        watch(t, name)
    else:
        _run_hook(t, name, hook, record.start_due)


def _next_try(t: Transition, name: str) -> float:
    """Return when `ready` is asked again, or the end of the start if there is not enough time."""
    start_due = t.services[name].start_due
    share_s = t.start.service_plans[name].options.start_timeout_s * READY_LEAST_SHARE
    due = t.now + READY_PAUSE_S
    return due if due + min(READY_LEAST_S, share_s) <= start_due else max(start_due, t.now)


def watch(t: Transition, name: str) -> None:
    """Plan the next call of `health`."""
    record = t.services[name]
    if record.state is S.READY and "health" in record.hooks and not t.stopping:
        interval_s = t.start.service_plans[name].options.health_interval_s
        _change(t, name, hook="health-pause", due=t.now + interval_s)


def _rest_or_watch(t: Transition, name: str) -> None:
    """Begin the end of a ready service that is to rest, or plan the next call of `health`."""
    if t.services[name].rests and not _may_rest(t, name):
        _change(t, name, rests=False)
    if t.services[name].rests:
        t.do(ActionKind.HOLD_CALLS, name)
        _drain_service(t, name)
    else:
        watch(t, name)


def _may_restart(t: Transition, name: str) -> bool:
    options = t.start.service_plans[name].options
    in_limit = len(_recent_restarts(t, name)) < options.restarts_max
    return options.restart != "never" and in_limit and not t.stopping


def _recent_restarts(t: Transition, name: str) -> tuple[float, ...]:
    since = t.now - t.start.service_plans[name].options.restart_window_s
    return tuple(at for at in t.services[name].restarts if at > since)


def _start_failed(
    t: Transition, name: str, trouble: FailureKind, hook: str = "", error: BaseException | None = None, text: str = ""
) -> None:
    again = _may_restart(t, name)
    required = t.start.service_plans[name].options.required
    t.fail(trouble, name, hook, error, counts=required and not again, text=text)
    _change(t, name, again=again)
    if not again:
        _worsen(t, name, S.FAILED_START)
    if required and not again:
        t.fail_job()
    # A built service gets its cleanup but not its stop, since it never ran.
    _next_stop_hook(t, name, "stop")


def _service_failed(
    t: Transition, name: str, trouble: FailureKind, hook: str = "", error: BaseException | None = None, text: str = ""
) -> None:
    """A service that was ready has failed: restart it, or do without, or fail the job."""
    again = _may_restart(t, name)
    required = t.start.service_plans[name].options.required
    t.fail(trouble, name, hook, error, counts=required and not again, text=text)
    if required and not again:
        if trouble in (FailureKind.DIED, FailureKind.FAILED):
            t.do(ActionKind.REFUSE_CALLS, name)
        t.move_service(name, S.DEGRADED)
        t.fail_job()
        return
    _change(t, name, again=again, rests=False)
    if not again:
        _worsen(t, name, S.FAILED)
    t.do(ActionKind.HOLD_CALLS if again else ActionKind.REFUSE_CALLS, name)
    _drain_service(t, name)


def check_replicas(t: Transition) -> None:
    """Fail a service of which too few replicas are left, if one of them has changed in this step."""
    if t.stopping:
        return
    plans = t.start.service_plans
    lost = {plans[name].front for name in t.touched if plans[name].front and not _may_be_had(t.services[name])}
    ready = {name for name in t.touched if plans[name].options.has_replicas and t.services[name].state is S.READY}
    for name in lost | ready:
        options, replicas = plans[name].options, plans[name].requires
        left = _replicas_left(t, name)
        if left >= options.replicas_min or t.stopping:
            continue
        text = f"as {left} of its {options.replicas} replicas are left, and replicas_min is {options.replicas_min}"
        last = next((failure for failure in reversed(t.failures) if failure.name in replicas), None)
        if last is not None:
            why = last.text or (describe(last.error) if last.error else f"{last.hook} {last.trouble}")
            text += f'; the last one was "{last.name}": {why}'
        if t.services[name].state is S.READY:
            _service_failed(t, name, FailureKind.FAILED, text=text)
        elif options.required:
            t.fail(FailureKind.FAILED, name, text=text)
            t.fail_job()


def _replicas_left(t: Transition, front: str) -> int:
    return sum(_may_be_had(t.services[name]) for name in t.start.service_plans[front].requires)


def _may_be_had(record: ServiceRecord) -> bool:
    """Return whether a replica is ready, or may be once more."""
    return record.again or record.state in (S.REGISTERED, S.STARTING, S.READY, S.BACKOFF)


# --- stop ---


def stop_service(t: Transition, name: str) -> None:
    """Begin the end of a service that is ready, half started, or waits for a restart."""
    record = t.services[name]
    if record.state in (S.REGISTERED, S.RESTING) and not record.incarnation:
        t.move_service(name, S.SKIPPED)
    elif record.state in (S.BACKOFF, S.RESTING):
        t.move_service(name, record.goal, hook=None, due=None)
    elif record.state is S.STARTING:
        if record.hook in (None, "ready-pause"):
            # Built, but not ready: if it has begun, it gets its cleanup but not its stop.
            _next_stop_hook(t, name, "stop")
    elif record.state is S.READY and _idle(record) and _may_stay(t, name):
        t.move_service(name, S.KEPT, hook=None, due=None)
    elif record.state in (S.READY, S.DEGRADED) and _idle(record):
        t.do(ActionKind.REFUSE_CALLS, name)
        _drain_service(t, name)


def _may_stay(t: Transition, name: str) -> bool:
    """Return whether a service is to be kept, and nothing that it needs is about to end under it."""
    todo = [name]
    while todo:  # those that it needs come before it; there may be thousands in a row
        here = todo[-1]
        plan = t.start.service_plans[here]
        live = [other for other in plan.requires if t.services[other].state not in SERVICE_TERMINAL]
        unknown = [other for other in live if other not in t.stays]
        if here in t.stays:
            todo.pop()
        elif unknown and plan.keep:
            todo += unknown
        else:
            t.stays[here] = plan.keep and all(t.services[other].state is S.READY and t.stays[other] for other in live)
    return t.stays[name]


def _idle(record: ServiceRecord) -> bool:
    return record.hook in (None, "health-pause")


def _drain_service(t: Transition, name: str) -> None:
    t.move_service(name, S.DRAINING)
    if t.services[name].has_died:
        _next_stop_hook(t, name, "cleanup")
        return
    _run_bounded(t, name, "drain", t.start.service_plans[name].options.drain_timeout_s)


def _run_bounded(t: Transition, name: str, hook: str, timeout_s: float) -> None:
    """Run a hook that the host ends in time by itself; its own bound is only the net under that."""
    due = _hook_due(t, name, hook, timeout_s)
    _run_hook(t, name, hook, due)
    _change(t, name, due=due + (t.start.service_plans[name].exit_net_s if hook == "exit" else DRAIN_NET_S))


def _next_stop_hook(t: Transition, name: str, last: str) -> None:
    record, options = t.services[name], t.start.service_plans[name].options
    if last == "drain" and "stop" in record.hooks:
        t.move_service(name, S.STOPPING)
        _run_hook(t, name, "stop", _hook_due(t, name, "stop", options.stop_timeout_s))
    elif last in ("drain", "stop") and "cleanup" in record.hooks:
        t.move_service(name, S.CLEANING)
        _run_hook(t, name, "cleanup", _hook_due(t, name, "cleanup", options.stop_timeout_s))
    elif "exit" in record.hooks:
        t.move_service(name, S.CLEANING)
        _run_bounded(t, name, "exit", options.kill_grace_s)
    else:
        _end_service(t, name)


def _end_service(t: Transition, name: str) -> None:
    record = t.services[name]
    if record.rests and t.may_wake(name) and record.goal is not S.ABANDONED:
        t.move_service(name, S.RESTING, hook=None, due=None, rests=False, again=False, wanted=False)
        if record.wanted:
            _wake(t, name)
        return
    if record.again and not t.stopping and record.goal is not S.ABANDONED:
        first, longest = t.start.service_plans[name].options.backoff_s
        recent = _recent_restarts(t, name)
        pause_s = min(first * 2.0 ** min(len(recent), 64), longest)
        restarts = (*recent, t.now)
        t.move_service(name, S.BACKOFF, hook="backoff", due=t.now + pause_s, restarts=restarts)
        return
    t.move_service(name, record.goal, hook=None, due=None)
    t.do(ActionKind.REFUSE_CALLS, name)
    if not t.stopping and t.start.service_plans[name].options.required:
        # It was to be restarted, and its end did not come out well enough for that.
        t.fail(FailureKind.UNHEALTHY, name, "restart")
        t.fail_job()


def _hook_due(t: Transition, name: str, hook: str, timeout_s: float) -> float:
    """Return when a hook is late: its own bound, the rest of the budget, less a reserve for later services."""
    return max(_within_budget(t, name, t.now + min(timeout_s, t.hook_cap_s), hook), t.now)


def _within_budget(t: Transition, name: str, due: float, hook: str = "") -> float:
    """Return `due`, or earlier: each service that ends after this one, and its own exit, need some time as well."""
    deadline = t.deadline
    if deadline == math.inf:
        return due
    after = t.tally.services_left - (t.services[name].state not in SERVICE_TERMINAL)
    if hook != "exit" and "exit" in t.services[name].hooks:
        after += 1
    left = max(deadline - t.now, 0.0)
    guard = min(BEST_GUARD_S, left / (after + 1))
    return min(due, max(deadline - after * guard, min(t.now, deadline) + left * LEAST_SHARE))


def kill_service(t: Transition, name: str) -> None:
    """Wait for nothing but the end of the process, where there is one."""
    record = t.services[name]
    if record.state in SERVICE_TERMINAL:
        return
    if record.state in (S.REGISTERED, S.BACKOFF, S.RESTING):
        stop_service(t, name)
        return
    due = max(min(t.now + KILL_EXIT_S, t.deadline), t.now)
    if record.hook == "exit":
        t.bring_forward(name, due)
        return
    has_exit = "exit" in record.hooks
    hook = "stop" if record.hook in (None, *PAUSES) else record.hook
    _give_up(t, name, hook)
    t.do(ActionKind.REFUSE_CALLS, name)
    t.do(ActionKind.ABANDON_HOOK, name, hook=hook)
    if has_exit:
        t.move_service(name, S.CLEANING)
        _run_hook(t, name, "exit", due)
        _change(t, name, due=due + EXIT_NET_S)
    else:
        t.move_service(name, S.ABANDONED, hook=None, due=None)


# --- time ---


def expire_service(t: Transition, name: str, record: ServiceRecord) -> None:
    hook = record.hook
    _change(t, name, hook=None, due=None)
    if hook == "backoff":
        if not t.stopping:
            start_service(t, name)
    elif hook == "health-pause":
        if not t.stopping:
            interval_s = t.start.service_plans[name].options.health_interval_s
            _run_hook(t, name, "health", t.now + max(interval_s, HEALTH_LEAST_S))
    elif hook == "ready-pause":
        if t.starting_ends:
            pass  # advance() tears it down in its turn
        elif t.now >= record.start_due:
            _start_failed(t, name, FailureKind.NOT_READY, "ready")
        else:
            _run_hook(t, name, "ready", record.start_due)
    elif hook is not None:
        _late_hook(t, name, hook, record)


def _late_hook(t: Transition, name: str, hook: str, record: ServiceRecord) -> None:
    t.do(ActionKind.ABANDON_HOOK, name, hook=hook)
    if record.state is S.STARTING:
        _late_start(t, name, hook, record)
    elif hook == "health" and not t.stopping:
        _service_failed(t, name, FailureKind.LATE_HEALTH, hook)
        if not t.services[name].again:
            _worsen(t, name, _late_end(t, name, hook))
    elif hook == "health":
        _give_up(t, name, hook)
    elif hook == "exit":
        t.fail(FailureKind.LATE_HOOK, name, hook)
        _worsen(t, name, S.ABANDONED)
        _end_service(t, name)
    elif hook == "drain" and "drain" not in record.hooks:
        t.fail(FailureKind.LATE_CALLS, name, hook)
        _next_stop_hook(t, name, hook)
    else:
        _give_up(t, name, hook)
        _next_stop_hook(t, name, hook)


def _late_start(t: Transition, name: str, hook: str, record: ServiceRecord) -> None:
    required = t.start.service_plans[name].options.required
    # A hook that hangs on a thread cannot be ended, so that a second instance would stand beside the first.
    again = "exit" in record.hooks and _may_restart(t, name)
    t.fail(FailureKind.NOT_READY, name, hook, counts=required and not again and not t.starting_ends)
    _change(t, name, again=again)
    end = _late_end(t, name, hook)
    if end is S.KILLED or not again:
        _worsen(t, name, end)
    if required and not again:
        t.fail_job()
    _next_stop_hook(t, name, "stop")


def _give_up(t: Transition, name: str, hook: str) -> None:
    """Note a hook that is late: its process is ended, or its thread left behind."""
    end = _late_end(t, name, hook)
    t.fail(FailureKind.LATE_HOOK, name, hook, text="its process was ended" if end is S.KILLED else "")
    _worsen(t, name, end)


def _late_end(t: Transition, name: str, hook: str) -> ServiceState:
    """Return the end of a service whose hook is late: its process is ended, or its thread is left behind."""
    is_local = hook in t.start.service_plans[name].local_hooks
    return S.KILLED if "exit" in t.services[name].hooks and not is_local else S.ABANDONED
