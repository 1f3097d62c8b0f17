"""The states of jobs, tasks and services, and which may follow which."""

from __future__ import annotations

from enum import Enum, IntEnum, StrEnum


class JobState(StrEnum):
    """Where a job is; a sealed one has an outcome besides."""

    NEW = "new"
    STARTING = "starting"
    RUNNING = "running"
    RESTARTING = "restarting"
    DRAINING = "draining"
    CANCELLING = "cancelling"
    FAILING = "failing"
    STOPPING_SERVICES = "stopping_services"
    SEALED = "sealed"


class StopMode(IntEnum):
    """How a job is asked to end; a stronger way may follow a weaker one, never the reverse."""

    DRAIN = 1  # everything in flight is processed
    STOP = 2  # so are cheap functions' records; no further call of a costly one begins
    CANCEL = 3
    KILL = 4

    @classmethod
    def of(cls, drain: bool | None) -> StopMode:
        """Return the way that a user's `drain` stands for."""
        return cls.STOP if drain is None else cls.DRAIN if drain else cls.CANCEL


class TaskState(StrEnum):
    """Where a task is."""

    CREATED = "created"
    OPENING = "opening"
    RUNNING = "running"
    CLOSING = "closing"
    DONE = "done"
    FAILED = "failed"
    CANCELLED = "cancelled"
    ABANDONED = "abandoned"
    SKIPPED = "skipped"


class Step(Enum):
    """The outcome of a step."""

    PROGRESSED = "progressed"
    IDLE = "idle"
    BLOCKED = "blocked"
    DONE = "done"


class Phase(Enum):
    """Where a task is in its steps; the lifecycle has its `TaskState`."""

    CREATED = "created"
    OPENED = "opened"
    RUNNING = "running"
    FINISHING = "finishing"
    CLOSING = "closing"
    DONE = "done"


class ServiceState(StrEnum):
    """Where a service is."""

    REGISTERED = "registered"
    STARTING = "starting"
    READY = "ready"
    DEGRADED = "degraded"
    DRAINING = "draining"
    STOPPING = "stopping"
    CLEANING = "cleaning"
    BACKOFF = "backoff"
    RESTING = "resting"
    STOPPED = "stopped"
    CLEANUP_FAILED = "cleanup_failed"
    ABANDONED = "abandoned"
    KILLED = "killed"
    LOST = "lost"
    FAILED_START = "failed_start"
    FAILED = "failed"
    SKIPPED = "skipped"
    KEPT = "kept"


J, T, S = JobState, TaskState, ServiceState

JOB_NEXT: dict[JobState, frozenset[JobState]] = {
    J.NEW: frozenset({J.STARTING, J.CANCELLING, J.FAILING}),
    J.STARTING: frozenset({J.RUNNING, J.RESTARTING, J.CANCELLING, J.FAILING}),
    J.RUNNING: frozenset({J.DRAINING, J.RESTARTING, J.CANCELLING, J.FAILING, J.STOPPING_SERVICES}),
    J.RESTARTING: frozenset({J.STARTING, J.CANCELLING, J.FAILING}),
    J.DRAINING: frozenset({J.CANCELLING, J.FAILING, J.STOPPING_SERVICES}),
    J.CANCELLING: frozenset({J.STOPPING_SERVICES}),
    J.FAILING: frozenset({J.STOPPING_SERVICES}),
    J.STOPPING_SERVICES: frozenset({J.SEALED}),
    J.SEALED: frozenset(),
}

TASK_TERMINAL = frozenset({T.DONE, T.FAILED, T.CANCELLED, T.ABANDONED, T.SKIPPED})
_TASK_ENDS = frozenset({T.DONE, T.FAILED, T.CANCELLED, T.ABANDONED})

TASK_NEXT: dict[TaskState, frozenset[TaskState]] = {
    T.CREATED: frozenset({T.OPENING, T.SKIPPED}),
    T.OPENING: frozenset({T.RUNNING, T.CLOSING}) | _TASK_ENDS,
    T.RUNNING: frozenset({T.CLOSING}) | _TASK_ENDS,
    T.CLOSING: _TASK_ENDS,
    **{state: frozenset() for state in TASK_TERMINAL},
}

SERVICE_TERMINAL = frozenset(
    {S.STOPPED, S.CLEANUP_FAILED, S.ABANDONED, S.KILLED, S.LOST, S.FAILED_START, S.FAILED, S.SKIPPED, S.KEPT}
)
_SERVICE_ENDS = SERVICE_TERMINAL - {S.SKIPPED, S.KEPT}

SERVICE_NEXT: dict[ServiceState, frozenset[ServiceState]] = {
    S.REGISTERED: frozenset({S.STARTING, S.SKIPPED}),
    S.RESTING: frozenset({S.STARTING, S.SKIPPED}) | _SERVICE_ENDS,
    S.STARTING: frozenset({S.READY, S.CLEANING, S.BACKOFF, S.RESTING}) | _SERVICE_ENDS,
    S.READY: frozenset({S.DEGRADED, S.DRAINING, S.CLEANING, S.KEPT, S.ABANDONED}),
    S.DEGRADED: frozenset({S.DRAINING, S.CLEANING, S.ABANDONED}),
    S.DRAINING: frozenset({S.STOPPING, S.CLEANING, S.BACKOFF, S.RESTING}) | _SERVICE_ENDS,
    S.STOPPING: frozenset({S.CLEANING, S.BACKOFF, S.RESTING}) | _SERVICE_ENDS,
    S.CLEANING: frozenset({S.BACKOFF, S.RESTING}) | _SERVICE_ENDS,
    S.BACKOFF: frozenset({S.STARTING, S.STOPPED, S.CLEANUP_FAILED, S.KILLED, S.LOST}),
    **{state: frozenset() for state in SERVICE_TERMINAL},
}
