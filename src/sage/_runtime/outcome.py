"""From what went wrong to the errors that a user sees, and to the report."""

from __future__ import annotations

import signal
import time
from typing import TYPE_CHECKING

from sage._runtime.lifecycle import FAILS_JOB, Failure, Trouble
from sage._runtime.states import Way
from sage.errors import (
    CleanupError,
    CleanupTimeoutError,
    InternalError,
    JobError,
    JobErrorGroup,
    ServiceError,
    ServiceStartError,
    describe,
    hint,
)
from sage.report import STANDS_HERE, Cleanliness, JobReport, OperatorReport, Outcome, ServiceReport, TaskReport

if TYPE_CHECKING:
    from collections.abc import Iterable

    from sage._plan.logical import LogicalGraph
    from sage._runtime.backend import HostFacts
    from sage._runtime.dispatcher import Dispatcher
    from sage._runtime.lifecycle import State
    from sage._runtime.supervisor import Ended

UNCLEAN = frozenset(
    {
        Trouble.CLOSE,
        Trouble.LATE_HEALTH,
        Trouble.HOOK,
        Trouble.LATE_HOOK,
        Trouble.LATE_CALLS,
        Trouble.LATE_TASK,
        Trouble.DIED,
        Trouble.LOST,
        Trouble.KILLED,
    }
)

LINES_SHOWN_MAX = 20

OF_TASKS = frozenset({Trouble.TASK, Trouble.CLOSE, Trouble.LATE_TASK})


def error_of(failure: Failure, job: str, stack: str | None, facts: HostFacts | None = None) -> Exception:
    """Return the error that tells a user of a failure; `facts` are those of the host, if it is one of a service."""
    name, hook, cause = failure.name, failure.hook, failure.error
    text = describe(cause) if cause is not None else failure.text
    error: JobError
    match failure.trouble:
        case Trouble.TASK | Trouble.CLOSE:
            if isinstance(cause, JobError):
                cause.job = job
                return cause
            error = JobError(f'task "{name}" failed: {text}', job=job, fault="internal")
        case Trouble.START:
            what = {"build": "be built", "ready": "get ready"}.get(hook, hook)
            error = ServiceStartError(f'service "{name}" failed to {what}: {text}', job=job, service=name)
        case Trouble.NOT_READY:
            unready = f": {facts.unready}" if facts is not None and facts.unready else ""
            what = f"get ready in time{unready}" if unready else f"end its {hook} in time"
            error = ServiceStartError(f'service "{name}" did not {what}', job=job, service=name)
            hint(error, "ServiceOptions(start_timeout_s=...) is the bound.")
        case Trouble.UNHEALTHY:
            said = f"its health check raised {text}" if cause is not None else "its health check failed"
            error = ServiceError(f'service "{name}" failed: {said}', job=job, service=name)
        case Trouble.LATE_HEALTH:
            text = f'service "{name}" failed: its health check did not end in time'
            error = ServiceError(text, job=job, service=name)
        case Trouble.DIED:
            error = ServiceError(f'service "{name}" ended by itself: {text}', job=job, service=name)
            hint(error, "Its stop and cleanup could not run any more.")
            if facts is not None and facts.exit_code == -signal.SIGKILL:
                hint(error, "The system kills processes when memory runs out; its log tells.")
            for caused in failure.caused:
                hint(error, f"With it failed: {describe(caused)}")
        case Trouble.FAILED:
            error = ServiceError(f'service "{name}" failed for all who share it: {text}', job=job, service=name)
        case Trouble.LOST:
            text = f'service "{name}" ended by itself before it was cleaned up: {text}'
            error = CleanupError(text, job=job, service=name)
        case Trouble.KILLED:
            what = f"left behind what had to be killed: {text}" if text else "did not exit in time and was killed"
            error = CleanupTimeoutError(f'service "{name}" {what}', job=job, service=name)
        case Trouble.HOOK:
            error = CleanupError(f'service "{name}" failed in {hook}: {text}', job=job, service=name)
        case Trouble.LATE_HOOK:
            then = text or "was abandoned"
            error = CleanupTimeoutError(
                f'service "{name}" did not end its {hook} in time and {then}', job=job, service=name
            )
        case Trouble.LATE_CALLS:
            error = CleanupTimeoutError(
                f'service "{name}" was stopped while calls of it still ran', job=job, service=name
            )
        case Trouble.LATE_TASK:
            error = CleanupTimeoutError(f'task "{name}" did not end in time and was abandoned', job=job)
    error.__cause__ = cause
    if facts is not None and facts.output:
        lines = "".join(f"\n    {line}" for line in facts.output[-LINES_SHOWN_MAX:])
        hint(error, f"The last lines of its output:{lines}")
    if stack:
        hint(error, f"{STANDS_HERE}\n{stack}")
    return error


def seal(
    ended: Ended, dispatcher: Dispatcher, graph: LogicalGraph, id_: str, started: tuple[float, float], reason: str
) -> JobReport:
    """Return the report of a job.

    Args:
        ended: what the supervisor hands over.
        dispatcher: what ran the job.
        graph: what the user wrote.
        id_: the job's id.
        started: when it was submitted, in seconds since the epoch and by the monotonic clock.
        reason: who asked for its end, or "".
    """
    state = ended.state
    errors = tuple(_error_of(failure, ended, dispatcher, graph) for failure in state.failures)
    outcome = _outcome(state)
    if ended.crash is not None:
        crash = InternalError(f'the supervision of job "{graph.name}" failed: {describe(ended.crash)}')
        crash.__cause__ = ended.crash
        errors = (hint(crash, "This is a bug of SAGE. Please report it with the traceback."), *errors)
        outcome = Outcome.FAILED
    dirty = (
        ended.crash is not None
        or any(failure.trouble in UNCLEAN for failure in state.failures)
        or any(record.state in ("abandoned", "killed", "lost") for record in state.services.values())
    )
    return JobReport(
        id=id_,
        name=graph.name,
        state=outcome,
        cleanliness=Cleanliness.DIRTY if dirty else Cleanliness.CLEAN,
        why=_why(outcome, errors, reason),
        started_at=started[0],
        ended_at=time.time(),
        duration_s=time.monotonic() - started[1],
        operators=operator_reports(dispatcher, graph),
        services=_services(ended, dispatcher),
        tasks=tuple(
            TaskReport(name, str(record.state), ended.stacks.get(name)) for name, record in state.tasks.items()
        ),
        undelivered=sum(
            task.undelivered + (task.inbox.undelivered if task.inbox is not None else 0)
            for task in dispatcher.supervisor.tasks.values()
        ),
        errors=errors,
    )


def _error_of(failure: Failure, ended: Ended, dispatcher: Dispatcher, graph: LogicalGraph) -> Exception:
    host = dispatcher.supervisor.hosts.get(failure.name) if failure.trouble not in OF_TASKS else None
    stack = ended.stacks.get(failure.name)
    return error_of(failure, graph.name, stack, host.facts() if host is not None else None)


def operator_reports(dispatcher: Dispatcher, graph: LogicalGraph) -> tuple[OperatorReport, ...]:
    """Return the counts of every operator as they stand, over all its tasks."""
    counts = {node.id: [0.0, 0.0, 0.0, 0.0] for node in graph.nodes.values()}
    for task in dispatcher.supervisor.tasks.values():
        for operator in task.operators:
            metrics, total = operator.metrics, counts[operator.node.id]
            for place, value in enumerate((metrics.records_in, metrics.records_out, metrics.failed, metrics.busy_s)):
                total[place] += value
    return tuple(
        OperatorReport(
            node.name, str(node.kind), node.parallelism, int(total[0]), int(total[1]), int(total[2]), total[3]
        )
        for node, total in ((graph.nodes[id_], total) for id_, total in counts.items())
    )


def to_raise(report: JobReport, failures: Iterable[Failure]) -> Exception | None:
    """Return what a waiting caller gets: nothing, the one error of a clean job, or all of them as a group."""
    failures = tuple(failures)
    crashes = report.errors[: len(report.errors) - len(failures)]
    counting = [
        *crashes,
        *(
            error
            for error, failure in zip(report.errors[len(crashes) :], failures, strict=True)
            if failure.counts or failure.trouble not in FAILS_JOB
        ),
    ]
    if not counting:
        return None
    if len(counting) == 1 and report.cleanliness is Cleanliness.CLEAN:
        return counting[0]
    text = f'job "{report.name}" {report.state.upper()} and {report.cleanliness.upper()}: {counting[0]}'
    return JobErrorGroup(text, counting, job=report.name)


def _outcome(state: State) -> Outcome:
    if state.is_failed:
        return Outcome.FAILED
    if state.ended_by is None:
        return Outcome.COMPLETED
    return Outcome.STOPPED if state.ended_by is Way.DRAIN else Outcome.CANCELLED


def _why(outcome: Outcome, errors: tuple[Exception, ...], reason: str) -> str:
    if outcome is Outcome.FAILED and errors:
        return str(errors[0]).splitlines()[0]
    if outcome is Outcome.COMPLETED:
        return "all sources ended"
    return reason or "its end was asked for"


def _services(ended: Ended, dispatcher: Dispatcher) -> tuple[ServiceReport, ...]:
    reports = []
    for name, record in ended.state.services.items():
        host = dispatcher.supervisor.hosts[name]
        facts = host.facts()
        reports.append(
            ServiceReport(
                name,
                str(record.state),
                ended.hooks[name],
                host.call_count,
                host.error_count,
                len(record.restarts),
                ended.stacks.get(name),
                facts.host,
                facts.pid,
                facts.exit_code,
                facts.output,
                facts.released,
            )
        )
    return tuple(reports)
