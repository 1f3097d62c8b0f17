"""The states of jobs, tasks and services, and which may follow which."""

from __future__ import annotations

from enum import IntEnum, StrEnum


class JobState(StrEnum):
    """Where a job is; a sealed one has an outcome besides."""

    NEW = "new"
    STARTING = "starting"
    RUNNING = "running"
    DRAINING = "draining"
    CANCELLING = "cancelling"
    FAILING = "failing"
    STOPPING_SERVICES = "stopping_services"
    SEALED = "sealed"


class Way(IntEnum):
    """How a job is asked to end; a stronger way may follow a weaker one, never the reverse."""

    DRAIN = 1
    CANCEL = 2
    KILL = 3


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
    J.NEW: frozenset({J.STARTING, J.CANCELLING}),
    J.STARTING: frozenset({J.RUNNING, J.CANCELLING, J.FAILING}),
    J.RUNNING: frozenset({J.DRAINING, J.CANCELLING, J.FAILING, J.STOPPING_SERVICES}),
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
    S.STARTING: frozenset({S.READY, S.CLEANING, S.BACKOFF}) | _SERVICE_ENDS,
    S.READY: frozenset({S.DEGRADED, S.DRAINING, S.CLEANING, S.KEPT, S.ABANDONED}),
    S.DEGRADED: frozenset({S.DRAINING, S.CLEANING, S.ABANDONED}),
    S.DRAINING: frozenset({S.STOPPING, S.CLEANING, S.BACKOFF}) | _SERVICE_ENDS,
    S.STOPPING: frozenset({S.CLEANING, S.BACKOFF}) | _SERVICE_ENDS,
    S.CLEANING: frozenset({S.BACKOFF}) | _SERVICE_ENDS,
    S.BACKOFF: frozenset({S.STARTING, S.STOPPED, S.CLEANUP_FAILED, S.KILLED, S.LOST}),
    **{state: frozenset() for state in SERVICE_TERMINAL},
}
