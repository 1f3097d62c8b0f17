"""The lifecycle of a job as values: plans, states, events and actions.

`transitions.step` leads from one state to the next.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace
from enum import Enum, StrEnum
from typing import TYPE_CHECKING

from sage._runtime.dues import Dues
from sage._runtime.states import JobState, ServiceState, StopMode, TaskState
from sage._runtime.task_restarts import NO_RESTARTS, TaskRestarts

if TYPE_CHECKING:
    from collections.abc import Mapping

    from sage.service import ServiceOptions

START_HOOKS = ("build", "setup", "start", "ready")
PAUSES = ("ready-pause", "health-pause", "backoff")
"""Stands for a hook while a service only waits until it is due."""

READY_PAUSE_S = 0.05
"""How long after a `ready()` that said no it is asked again."""

READY_LEAST_S = 0.25
READY_LEAST_SHARE = 0.1
"""The time that must be left for another `ready` at the start, in seconds or as a share, so that it can end in time."""

BEST_GUARD_S = 1.0
"""How much of the budget a service leaves to each that is stopped after it, if there is that much."""

LEAST_SHARE = 0.1
"""The least share of the remaining budget for a hook, even if many services are stopped after it."""

DRAIN_NET_S = 1.0
EXIT_NET_S = 3.0
"""How long after its bound a drain or an exit, which the host bounds by itself, is given up."""

HEALTH_LEAST_S = 1.0
"""The least time that a `health` has; more where the pause between two of them is longer."""

EXTENSION_MAX_S = 60.0
"""How much longer one hook may ask to take, in all."""

KILL_EXIT_S = 2.0
"""Bound of "exit" when everything is given up."""

STOP_STATES = frozenset({ServiceState.DRAINING, ServiceState.STOPPING, ServiceState.CLEANING})


@dataclass(frozen=True, slots=True)
class Limits:
    """Bounds of a job's stop, in seconds.

    Attributes:
        stop_timeout_s: budget of the whole stop, from the first request or failure on.
        drain_timeout_s: how long records in flight may take to drain, and a task to leave user code.
        close_timeout_s: how long each `close` of a function may take.
        services_share: the part of the budget that is kept for services, so that a slow drain cannot starve cleanups.
        services_reserve_s: the least that is kept for them.
    """

    stop_timeout_s: float = 60.0
    drain_timeout_s: float = 30.0
    close_timeout_s: float = 10.0
    services_share: float = 0.4
    services_reserve_s: float = 5.0


@dataclass(frozen=True, slots=True)
class ServicePlan:
    """The fixed facts about a service.

    Attributes:
        requires: services that start before it and stop after it.
        options: its bounds and policies.
        keep: whether it outlives the job.
        adopted: the hooks of an instance that an earlier job kept, or None if it has to be built.
        own_hooks: the hooks of its host itself: "exit", if there is a process to end.
        local_hooks: the hooks that run on a thread here although there is such a process.
        front: the service that it is a replica of, or "".
        spare: whether it is not started with the others, but when somebody asks for it.
        exit_net_s: how long after its bound an exit is given up, which the host bounds by itself.
    """

    name: str
    requires: tuple[str, ...]
    options: ServiceOptions
    keep: bool = False
    adopted: frozenset[str] | None = None
    own_hooks: frozenset[str] = frozenset()
    local_hooks: frozenset[str] = frozenset()
    front: str = ""
    spare: bool = False
    exit_net_s: float = EXIT_NET_S


@dataclass(frozen=True, slots=True)
class TaskPlan:
    """The fixed facts about a task.

    Attributes:
        downstream: tasks that have to be open before it.
        takes_stop: whether it is a source or begins a loop, and so has to be told to stop.
        serving: whether it only answers requests, and so ends after the others.
    """

    name: str
    downstream: tuple[str, ...] = ()
    takes_stop: bool = False
    serving: bool = False


@dataclass(frozen=True, slots=True)
class ServiceRecord:
    """Where a service is.

    Attributes:
        incarnation: how many times it was built.
        hooks: the hooks that it has.
        hook: the hook that runs, or None.
        due: when the current hook is late, or the current pause is over; None for never.
        start_due: when the start as a whole is late.
        restarts: when it was restarted.
        again: whether its teardown leads to a restart, unless stopping begins before.
        goal: the state that its teardown leads to otherwise.
        extended_s: how much longer the hook that runs was allowed to take.
        has_died: whether the incarnation is gone, so that no hook of it can run.
        rests: whether its teardown leads to a rest, from which it can be started again, unless stopping begins before.
        wanted: whether it is to be started again as soon as that rest begins.
    """

    state: ServiceState = ServiceState.REGISTERED
    incarnation: int = 0
    hooks: frozenset[str] = frozenset()
    hook: str | None = None
    due: float | None = None
    start_due: float = 0.0
    restarts: tuple[float, ...] = ()
    again: bool = False
    goal: ServiceState = ServiceState.STOPPED
    extended_s: float = 0.0
    has_died: bool = False
    rests: bool = False
    wanted: bool = False


@dataclass(frozen=True, slots=True)
class TaskRecord:
    """Where a task is. `due` is when it is late, `opened` whether it may run."""

    state: TaskState = TaskState.CREATED
    due: float | None = None
    opened: bool = False


class FailureKind(StrEnum):
    """The kind of failure."""

    BEGIN = "begin"
    TASK = "task"
    CLOSE = "close"
    START = "start"
    NOT_READY = "not_ready"
    UNHEALTHY = "unhealthy"
    LATE_HEALTH = "late_health"
    DIED = "died"
    FAILED = "failed"
    LOST = "lost"
    KILLED = "killed"
    HOOK = "hook"
    LATE_HOOK = "late_hook"
    LATE_CALLS = "late_calls"
    LATE_TASK = "late_task"
    LEFT = "left"


F = FailureKind
FAILS_JOB = frozenset({F.BEGIN, F.TASK, F.CLOSE, F.START, F.NOT_READY, F.UNHEALTHY, F.LATE_HEALTH, F.DIED, F.FAILED})


@dataclass(frozen=True, slots=True)
class Failure:
    """Something that went wrong.

    Attributes:
        trouble: the kind.
        name: the task or service.
        hook: the hook or operator, or "".
        error: the exception, or None if something took too long.
        counts: whether it fails the job; a service that may be absent or restarted does not.
        text: further facts, in words.
        caused: the errors of tasks that failed only because of this.
        incarnation: of the service, of which later ones may have facts of their own.
    """

    trouble: FailureKind
    name: str
    hook: str = ""
    error: BaseException | None = None
    counts: bool = True
    text: str = ""
    caused: tuple[BaseException, ...] = ()
    incarnation: int = field(default=0, compare=False)


@dataclass(frozen=True, slots=True)
class Shape:
    """The facts that follow from the plans alone, found once so that steps do not search them.

    Attributes:
        service_places: the place of each service in the order of registration.
        service_names: the services in that order.
        task_places: the place of each task.
        needed_by: the services that declared that they need a service.
        opened_before: the tasks that open only after a task.
        side_by_side: whether services stop side by side, because some declared dependencies; replicas always do.
        serves_only: whether all tasks only answer requests.
    """

    service_places: Mapping[str, int]
    service_names: tuple[str, ...]
    task_places: Mapping[str, int]
    needed_by: Mapping[str, tuple[str, ...]]
    opened_before: Mapping[str, tuple[str, ...]]
    side_by_side: bool
    serves_only: bool


@dataclass(slots=True)
class Tally:
    """The counts of a job, so that a step does not look at every task and service; each state has its own.

    Attributes:
        services_left: how many services have not ended.
        services_unready: how many are not ready, and cannot be done without.
        tasks_left: how many tasks have not ended.
        main_left: how many of these do more than answer requests.
        tasks_unopened: how many tasks were never open.
        unmet: for each service, how many of those that it declared are not ready.
        needed: for each service, how many that need it have not ended.
        unopened: for each task, how many that have to be open before it are not.
        seen_by: the services that a service was seen to call.
        stop_place: services after this place have ended, where they end one after the other.
        dues: when things are late or due, the first one valid; some may have been put off or dropped meanwhile.
    """

    services_left: int
    services_unready: int
    tasks_left: int
    main_left: int
    tasks_unopened: int
    unmet: dict[str, int]
    needed: dict[str, int]
    unopened: dict[str, int]
    seen_by: dict[str, tuple[str, ...]]
    stop_place: int
    dues: Dues = field(default=None, repr=False, compare=False)


@dataclass(frozen=True, slots=True)
class State:
    """A job's lifecycle at one moment.

    Attributes:
        services: where each service is, in the order of registration.
        tasks: where each task is.
        service_plans: the fixed facts about the services.
        task_plans: the fixed facts about the tasks.
        limits: the bounds of the stop.
        shape: the facts that follow from the plans.
        tally: the counts.
        until_asked: whether the job, although it has no tasks, goes on until somebody asks for its end.
        early: deaths and failures of services that the job took over, from before it began.
        job: the state of the job.
        way: the strongest way in which an end was asked for.
        ended_by: the way that really ended the job, or None if it ended by itself.
        seen: pairs of services of which the first was seen to call the second.
        failures: the failures, in order.
        serving_stopped: whether pipelines that only answer requests were told to stop.
        deadline: when the budget of the stop is used up; set once, and infinite before, like all bounds here.
        drain_due: when draining turns into cancelling.
        tasks_due: when tasks that still run are abandoned.
        hook_cap_s: bound of every hook after an impatient stop, in seconds.
        restarts: the restarts of the tasks.
    """

    services: Mapping[str, ServiceRecord]
    tasks: Mapping[str, TaskRecord]
    service_plans: Mapping[str, ServicePlan]
    task_plans: Mapping[str, TaskPlan]
    limits: Limits
    shape: Shape
    tally: Tally
    until_asked: bool = False
    early: tuple[ServiceDied | ServiceFailed, ...] = ()
    job: JobState = JobState.NEW
    way: StopMode | None = None
    ended_by: StopMode | None = None
    seen: frozenset[tuple[str, str]] = frozenset()
    failures: tuple[Failure, ...] = ()
    serving_stopped: bool = False
    deadline: float = math.inf
    drain_due: float = math.inf
    tasks_due: float = math.inf
    hook_cap_s: float = math.inf
    restarts: TaskRestarts = NO_RESTARTS

    @property
    def next_due(self) -> float | None:
        """When a `Tick` is due next, or None."""
        first = self.tally.dues[1][0] if self.tally.dues is not None else math.inf
        restarts = self.job is JobState.RESTARTING and self.tally.tasks_left == 0
        other = self.drain_due if self.job is JobState.DRAINING else self.restarts.due if restarts else math.inf
        return None if min(first, other) == math.inf else min(first, other)

    @property
    def is_failed(self) -> bool:
        """Whether a failure counts against the job."""
        return any(failure.trouble in FAILS_JOB and failure.counts for failure in self.failures)


# --- events -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Begin:
    """The job is to be started."""


@dataclass(frozen=True, slots=True)
class CannotBegin:
    """The system cannot run the job beside its caller; services that it took over still have to end, or stay."""

    error: BaseException


@dataclass(frozen=True, slots=True)
class Tick:
    """Time has passed."""


@dataclass(frozen=True, slots=True)
class StopRequested:
    """Somebody wants the job to end; `budget_s` bounds the whole stop, `hook_cap_s` each hook."""

    way: StopMode
    budget_s: float | None = None
    hook_cap_s: float | None = None


@dataclass(frozen=True, slots=True)
class HookEnded:
    """A hook of a service returned `value` or raised `error`."""

    service: str
    incarnation: int
    hook: str
    value: object = None
    error: BaseException | None = None


@dataclass(frozen=True, slots=True)
class Exit:
    """The result of the hook "exit".

    Attributes:
        code: how the process ended; negative for a signal, None where it is not known.
        was_killed: whether it had to be killed.
        left: its leftover processes that had to be killed, in words, one for each.
        unknown: why nobody knows how it ended, in words; "" if its code is known, or it was killed.
        where: where it stood when it was late, if it could say so.
    """

    code: int | None
    was_killed: bool = False
    left: tuple[str, ...] = ()
    unknown: str = ""
    where: str = ""


@dataclass(frozen=True, slots=True)
class ServiceDied:
    """The process of a service ended by itself, outside of "exit"; `text` says how."""

    service: str
    incarnation: int
    text: str


@dataclass(frozen=True, slots=True)
class ServiceFailed:
    """A service that others supervise has failed for good, and was cleaned up by them; `text` says how."""

    service: str
    incarnation: int
    text: str


@dataclass(frozen=True, slots=True)
class CleanupDeferred:
    """A service gave something to be called at its end, so that it has a cleanup from now on."""

    service: str
    incarnation: int


@dataclass(frozen=True, slots=True)
class RestRequested:
    """A service that is ready is not needed for now; it ends, and can be started again."""

    service: str
    incarnation: int


@dataclass(frozen=True, slots=True)
class WakeRequested:
    """A service that rests, or is about to, is needed; a replica whose start fails rests again."""

    service: str


@dataclass(frozen=True, slots=True)
class ExtendTimeout:
    """The hook of a service that runs wants more time."""

    service: str
    incarnation: int
    seconds: float


@dataclass(frozen=True, slots=True)
class DependencySeen:
    """A service was seen to call another."""

    service: str
    requires: str


@dataclass(frozen=True, slots=True)
class TaskOpened:
    """All functions of a task are open."""

    task: str


@dataclass(frozen=True, slots=True)
class TaskFailed:
    """A task raised; it closes by itself. `closing` names the operator whose `close` it was."""

    task: str
    error: BaseException
    closing: str = ""


@dataclass(frozen=True, slots=True)
class TaskClosing:
    """A task begins to close the function of another of its operators."""

    task: str


@dataclass(frozen=True, slots=True)
class TaskEnded:
    """A task is over; nothing of it runs."""

    task: str
    state: TaskState


@dataclass(frozen=True, slots=True)
class TasksRenewed:
    """All tasks were made again, from the last checkpoint, unless there is an `error`."""

    error: Exception | None = None


TaskEvent = TaskOpened | TaskFailed | TaskClosing | TaskEnded


@dataclass(frozen=True, slots=True)
class TaskEvents:
    """Events of tasks that came one after the other, and are taken in one step."""

    events: tuple[TaskEvent, ...]


Rest = RestRequested | WakeRequested
ServiceEvent = HookEnded | ServiceDied | ServiceFailed | CleanupDeferred | ExtendTimeout | DependencySeen | Rest
LifecycleEvent = Begin | CannotBegin | Tick | StopRequested | ServiceEvent | TaskEvent | TaskEvents | TasksRenewed

# --- actions ----------------------------------------------------------------------------------------------------------


class ActionKind(Enum):
    """An action for the supervisor; the target is a task, a service, or "" for the job."""

    OPEN_TASK = "open_task"
    RUN_TASK = "run_task"
    STOP_TASK = "stop_task"
    HOLD_BACK_TASK = "hold_back_task"
    CANCEL_TASK = "cancel_task"
    RESET_TASK = "reset_task"
    RENEW_TASKS = "renew_tasks"
    ABANDON_TASK = "abandon_task"
    RUN_HOOK = "run_hook"
    ABANDON_HOOK = "abandon_hook"
    LOSE_HOOK = "lose_hook"
    HURRY_EXIT = "hurry_exit"
    ADMIT_CALLS = "admit_calls"
    HOLD_CALLS = "hold_calls"
    REFUSE_CALLS = "refuse_calls"
    NOTE = "note"
    SEAL = "seal"


@dataclass(frozen=True, slots=True)
class Action:
    """One thing to do.

    Attributes:
        do: the kind of action.
        target: the task or service.
        hook: the hook to run or to abandon.
        incarnation: of the service.
        due: when the hook is late.
        subject: for a note, whether a job, a task or a service has changed.
        before: for a note, the state that was left.
        after: for a note, the state that was entered.
    """

    do: ActionKind
    target: str = ""
    hook: str = ""
    incarnation: int = 0
    due: float | None = None
    subject: str = ""
    before: str = ""
    after: str = ""


def begin(
    services: tuple[ServicePlan, ...], tasks: tuple[TaskPlan, ...], limits: Limits, *, until_asked: bool = False
) -> State:
    """Return the state of a job that was not started yet."""
    records = {
        plan.name: ServiceRecord(ServiceState.RESTING if plan.spare else ServiceState.REGISTERED)
        if plan.adopted is None
        else ServiceRecord(ServiceState.READY, incarnation=1, hooks=plan.adopted | plan.own_hooks)
        for plan in services
    }
    fronts = {plan.front for plan in services}
    side_by_side = any(plan.requires for plan in services if plan.name not in fronts)
    # One that was kept may have lost, in an earlier job, a service that it needed.
    services = tuple(
        replace(plan, requires=tuple(other for other in plan.requires if other in records)) for plan in services
    )
    needed_by: dict[str, list[str]] = {plan.name: [] for plan in services}
    for plan in services:
        for other in dict.fromkeys(plan.requires):
            needed_by[other].append(plan.name)
    opened_before: dict[str, list[str]] = {task.name: [] for task in tasks}
    for task in tasks:
        for after in dict.fromkeys(task.downstream):
            opened_before[after].append(task.name)
    fine = {plan.name for plan in services if plan.adopted is not None or plan.spare}
    return State(
        services=records,
        tasks={task.name: TaskRecord() for task in tasks},
        service_plans={plan.name: plan for plan in services},
        task_plans={task.name: task for task in tasks},
        limits=limits,
        shape=Shape(
            service_places={plan.name: place for place, plan in enumerate(services)},
            service_names=tuple(plan.name for plan in services),
            task_places={task.name: place for place, task in enumerate(tasks)},
            needed_by={name: tuple(others) for name, others in needed_by.items()},
            opened_before={name: tuple(others) for name, others in opened_before.items()},
            side_by_side=side_by_side,
            serves_only=all(task.serving for task in tasks),
        ),
        tally=Tally(
            services_left=len(services),
            services_unready=len(services) - len(fine),
            tasks_left=len(tasks),
            main_left=sum(not task.serving for task in tasks),
            tasks_unopened=len(tasks),
            unmet={plan.name: len({*plan.requires} - fine) for plan in services},
            needed={name: len(others) for name, others in needed_by.items()},
            unopened={task.name: len({*task.downstream}) for task in tasks},
            seen_by={},
            stop_place=len(services) - 1,
        ),
        until_asked=until_asked,
    )
