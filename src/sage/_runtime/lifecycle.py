"""The lifecycle of a job as values: what is known beforehand, where everything is, what happens, and what to do.

`transitions.step` leads from one state to the next.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum, StrEnum
from typing import TYPE_CHECKING, Any

from sage._runtime.states import JobState, ServiceState, TaskState, Way

if TYPE_CHECKING:
    from collections.abc import Mapping

    from sage.service import ServiceOptions

START_HOOKS = ("build", "setup", "start", "ready")
PAUSES = ("ready-pause", "health-pause", "backoff")
"""What stands for a hook while a service only waits until it is due."""

READY_PAUSE_S = 0.05
"""How long after a `ready()` that said no it is asked again."""

READY_LEAST_S = 0.25
READY_LEAST_SHARE = 0.1
"""What a further `ready` has to have left of the start, in seconds or as a share, so that it can end in time."""

BEST_GUARD_S = 1.0
"""How much of the budget a service leaves to each that is stopped after it, if there is that much."""


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
        drain_timeout_s: how long what is in flight may take to drain, and a task to leave user code.
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
    """What the lifecycle knows of a service beforehand.

    Attributes:
        name: its name.
        requires: services that start before it and stop after it.
        options: its bounds and policies.
        keep: whether it outlives the job.
        adopted: the hooks of an instance that an earlier job kept, or None if it has to be built.
        own_hooks: the hooks that its host has whatever the service is: "exit", if there is a process to end.
        local_hooks: the hooks that run on a thread here although there is such a process.
    """

    name: str
    requires: tuple[str, ...]
    options: ServiceOptions
    keep: bool = False
    adopted: frozenset[str] | None = None
    own_hooks: frozenset[str] = frozenset()
    local_hooks: frozenset[str] = frozenset()


@dataclass(frozen=True, slots=True)
class TaskPlan:
    """What the lifecycle knows of a task beforehand.

    Attributes:
        name: its name.
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
        state: its state.
        incarnation: how many times it was built.
        hooks: the hooks that it has.
        hook: the hook that runs, or None.
        due: when the hook that runs is late, or what waits is due; None for never.
        start_due: when the start as a whole is late.
        restarts: when it was restarted.
        again: whether its teardown leads to a restart, unless stopping begins before.
        goal: the state that its teardown leads to otherwise.
        extended_s: how much longer the hook that runs was allowed to take.
        has_died: whether the incarnation is gone, so that no hook of it can run.
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


@dataclass(frozen=True, slots=True)
class TaskRecord:
    """Where a task is. `due` is when it is late, `opened` whether it may run."""

    state: TaskState = TaskState.CREATED
    due: float | None = None
    opened: bool = False


class Trouble(StrEnum):
    """What kind of failure it was."""

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


FAILS_JOB = frozenset(
    {
        Trouble.TASK,
        Trouble.CLOSE,
        Trouble.START,
        Trouble.NOT_READY,
        Trouble.UNHEALTHY,
        Trouble.LATE_HEALTH,
        Trouble.DIED,
        Trouble.FAILED,
    }
)


@dataclass(frozen=True, slots=True)
class Failure:
    """Something that went wrong.

    Attributes:
        trouble: what kind.
        name: the task or service.
        hook: the hook or operator, or "".
        error: what was raised, or None for what took too long.
        counts: whether it fails the job; a service that may be absent or restarted does not.
        text: what else is known of it, in words.
        caused: what tasks failed with for no other reason.
    """

    trouble: Trouble
    name: str
    hook: str = ""
    error: BaseException | None = None
    counts: bool = True
    text: str = ""
    caused: tuple[BaseException, ...] = ()


@dataclass(frozen=True, slots=True)
class State:
    """A job's lifecycle at one moment.

    Attributes:
        services: where each service is, in the order of registration.
        tasks: where each task is.
        service_plans: what is known of the services beforehand.
        task_plans: what is known of the tasks beforehand.
        limits: the bounds of the stop.
        until_asked: whether the job, although it has no tasks, goes on until somebody asks for its end.
        early: deaths and failures of services that the job took over, from before it began.
        job: the state of the job.
        way: the strongest way in which an end was asked for.
        ended_by: the way that really ended the job, or None if it ended by itself.
        seen: pairs of services of which the first was seen to call the second.
        failures: what went wrong, in order.
        serving_stopped: whether pipelines that only answer requests were told to stop.
        deadline: when the budget of the stop is used up; set once.
        drain_due: when draining turns into cancelling.
        tasks_due: when tasks that still run are abandoned.
        hook_cap_s: bound of every hook after an impatient stop, in seconds.
    """

    services: Mapping[str, ServiceRecord]
    tasks: Mapping[str, TaskRecord]
    service_plans: Mapping[str, ServicePlan]
    task_plans: Mapping[str, TaskPlan]
    limits: Limits
    until_asked: bool = False
    early: tuple[ServiceDied | ServiceFailed, ...] = ()
    job: JobState = JobState.NEW
    way: Way | None = None
    ended_by: Way | None = None
    seen: frozenset[tuple[str, str]] = frozenset()
    failures: tuple[Failure, ...] = ()
    serving_stopped: bool = False
    deadline: float | None = None
    drain_due: float | None = None
    tasks_due: float | None = None
    hook_cap_s: float | None = None

    @property
    def next_due(self) -> float | None:
        """When a `Tick` is due next, or None."""
        dues = [record.due for record in self.services.values() if record.due is not None]
        dues += [record.due for record in self.tasks.values() if record.due is not None]
        if self.job is JobState.DRAINING and self.drain_due is not None:
            dues.append(self.drain_due)
        return min(dues, default=None)

    @property
    def is_failed(self) -> bool:
        """Whether a failure counts against the job."""
        return any(failure.trouble in FAILS_JOB and failure.counts for failure in self.failures)


# --- events -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Begin:
    """The job is to be started."""


@dataclass(frozen=True, slots=True)
class Tick:
    """Time has passed."""


@dataclass(frozen=True, slots=True)
class StopRequested:
    """Somebody wants the job to end; `budget_s` bounds the whole stop, `hook_cap_s` each hook."""

    way: Way
    budget_s: float | None = None
    hook_cap_s: float | None = None


@dataclass(frozen=True, slots=True)
class HookEnded:
    """A hook of a service returned `value` or raised `error`."""

    service: str
    incarnation: int
    hook: str
    value: Any = None
    error: BaseException | None = None


@dataclass(frozen=True, slots=True)
class Exit:
    """What the hook "exit" returns.

    Attributes:
        code: how the process ended; negative for a signal, None where it is not known.
        was_killed: whether it had to be killed.
        left: what it had left behind that had to be killed, in words, one for each.
    """

    code: int | None
    was_killed: bool = False
    left: tuple[str, ...] = ()


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


TaskEvent = TaskOpened | TaskFailed | TaskClosing | TaskEnded
ServiceEvent = HookEnded | ServiceDied | ServiceFailed | CleanupDeferred | ExtendTimeout | DependencySeen
LifecycleEvent = Begin | Tick | StopRequested | ServiceEvent | TaskEvent

# --- actions ----------------------------------------------------------------------------------------------------------


class Do(Enum):
    """What the supervisor is to do; the target is a task, a service, or "" for the job."""

    OPEN_TASK = "open_task"
    RUN_TASK = "run_task"
    STOP_TASK = "stop_task"
    CANCEL_TASK = "cancel_task"
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
        do: what.
        target: the task or service.
        hook: the hook to run or to abandon.
        incarnation: of the service.
        due: when the hook is late.
        before: for a note, the state that was left.
        after: for a note, the state that was entered.
    """

    do: Do
    target: str = ""
    hook: str = ""
    incarnation: int = 0
    due: float | None = None
    before: str = ""
    after: str = ""


def begin(
    services: tuple[ServicePlan, ...], tasks: tuple[TaskPlan, ...], limits: Limits, *, until_asked: bool = False
) -> State:
    """Return the state of a job that was not started yet."""
    return State(
        services={
            plan.name: ServiceRecord()
            if plan.adopted is None
            else ServiceRecord(ServiceState.READY, incarnation=1, hooks=plan.adopted | plan.own_hooks)
            for plan in services
        },
        tasks={plan.name: TaskRecord() for plan in tasks},
        service_plans={plan.name: plan for plan in services},
        task_plans={plan.name: plan for plan in tasks},
        limits=limits,
        until_asked=until_asked,
    )
