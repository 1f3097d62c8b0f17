"""Turns failures into the errors that a user sees, and into the report."""

from __future__ import annotations

import signal
import time
from collections import Counter
from dataclasses import replace
from typing import TYPE_CHECKING

from sage._plan.logical import Kind
from sage._runtime.accounts import Counts, counted, not_taken, ways_of_records
from sage._runtime.lifecycle import FAILS_JOB, Failure, FailureKind
from sage._runtime.states import ServiceState, StopMode, TaskState
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
from sage.report import (
    STANDS_HERE,
    Cleanliness,
    JobReport,
    LostRecord,
    OperatorReport,
    Outcome,
    ServiceReport,
    TaskReport,
)

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from sage._plan.logical import LogicalGraph
    from sage._runtime.backend import Host, HostFacts
    from sage._runtime.dispatcher import Dispatcher
    from sage._runtime.durable_run import DurableRun
    from sage._runtime.lifecycle import State
    from sage._runtime.supervisor import Ended

UNCLEAN = frozenset(
    {
        FailureKind.CLOSE,
        FailureKind.LATE_HEALTH,
        FailureKind.HOOK,
        FailureKind.LATE_HOOK,
        FailureKind.LATE_CALLS,
        FailureKind.LATE_TASK,
        FailureKind.DIED,
        FailureKind.LOST,
        FailureKind.KILLED,
        FailureKind.LEFT,
    }
)

LINES_SHOWN_MAX = 20

OF_TASKS = frozenset({FailureKind.BEGIN, FailureKind.TASK, FailureKind.CLOSE, FailureKind.LATE_TASK})


def error_of(failure: Failure, job: str, stack: str | None, facts: HostFacts | None = None) -> Exception:
    """Return the error that tells a user of a failure; `facts` are those of the host, if it is one of a service."""
    name, hook, cause = failure.name, failure.hook, failure.error
    text = describe(cause) if cause is not None else failure.text
    error: JobError
    match failure.trouble:
        case FailureKind.TASK | FailureKind.CLOSE:
            if isinstance(cause, JobError):
                cause.job = job
                return cause
            error = JobError(f'task "{name}" failed: {text}', job=job, fault="internal")
        case FailureKind.START:
            what = {"build": "be built", "ready": "get ready"}.get(hook, hook)
            error = ServiceStartError(f'service "{name}" failed to {what}: {text}', job=job, service=name)
        case FailureKind.NOT_READY:
            unready = f": {facts.unready}" if facts is not None and facts.unready else ""
            what = f"get ready in time{unready}" if unready else f"end its {hook} in time"
            error = ServiceStartError(f'service "{name}" did not {what}', job=job, service=name)
            hint(error, "ServiceOptions(start_timeout_s=...) sets the limit.")
        case FailureKind.UNHEALTHY:
            said = f"its health check raised {text}" if cause is not None else "its health check failed"
            error = ServiceError(f'service "{name}" failed: {said}', job=job, service=name)
        case FailureKind.LATE_HEALTH:
            text = f'service "{name}" failed: its health check did not end in time'
            error = ServiceError(text, job=job, service=name)
        case FailureKind.DIED:
            error = ServiceError(f'service "{name}" ended by itself: {text}', job=job, service=name)
            hint(error, "Its stop and cleanup could not run.")
            if facts is not None and facts.exit_code == -signal.SIGKILL:
                hint(error, "The system kills processes when memory runs out; check its log.")
            for caused in failure.caused:
                hint(error, f"With it failed: {describe(caused)}")
        case FailureKind.FAILED:
            error = ServiceError(f'service "{name}" failed {text}', job=job, service=name)
        case FailureKind.LOST:
            text = f'service "{name}" ended by itself before it was cleaned up: {text}'
            error = CleanupError(text, job=job, service=name)
        case FailureKind.KILLED:
            what = f"left behind what had to be killed: {text}" if text else "did not exit in time and was killed"
            error = CleanupTimeoutError(f'service "{name}" {what}', job=job, service=name)
        case FailureKind.HOOK:
            error = CleanupError(f'service "{name}" failed in {hook}: {text}', job=job, service=name)
        case FailureKind.LATE_HOOK:
            then = text or "was abandoned"
            text = f'service "{name}" did not end its {hook} in time and {then}'
            error = CleanupTimeoutError(text, job=job, service=name)
        case FailureKind.LATE_CALLS:
            text = f'service "{name}" was stopped while calls of it still ran'
            error = CleanupTimeoutError(text, job=job, service=name)
        case FailureKind.LATE_TASK:
            error = CleanupTimeoutError(f'task "{name}" did not end in time and was abandoned', job=job)
        case FailureKind.LEFT:
            error = CleanupError(f'job "{job}" left something behind: {text}', job=job)
    error.__cause__ = cause
    if facts is not None and facts.output:
        lines = "".join(f"\n    {line}" for line in facts.output[-LINES_SHOWN_MAX:])
        hint(error, f"The last lines of its output:{lines}")
    if stack:
        hint(error, f"{STANDS_HERE}\n{stack}")
    return error


def seal(
    ended: Ended,
    dispatcher: Dispatcher,
    graph: LogicalGraph,
    id_: str,
    started: tuple[float, float],
    reason: str,
    notes: tuple[str, ...] = (),
) -> JobReport:
    """Return the report of a job.

    Args:
        ended: the result of the supervisor.
        dispatcher: the dispatcher that ran the job.
        graph: the user's pipeline.
        id_: the job's id.
        started: when it was submitted, in seconds since the epoch and by the monotonic clock.
        reason: who asked for its end, or "".
        notes: lines about its checkpoints.
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
        running_s=ended.running_s,
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
        notes=(*notes, *(f"restart {one.number}: {one.text}" for one in state.restarts.setbacks)),
        restarts=state.restarts.count,
    )


def so_far(
    id_: str,
    name: str,
    started: tuple[float, float],
    state: State,
    operators: tuple[OperatorReport, ...],
    hosts: Mapping[str, Host],
) -> JobReport:
    """Return the report of a job that has not ended, as things stand; a cluster has the hosts elsewhere."""
    services = []
    for service, record in tuple(state.services.items()):
        host = hosts.get(service)
        calls, errors = (host.call_count, host.error_count) if host is not None else (0, 0)
        services.append(ServiceReport(service, str(record.state), (), calls, errors, 0))
    return JobReport(
        id=id_,
        name=name,
        state=Outcome.RUNNING,
        cleanliness=Cleanliness.CLEAN,
        why=str(state.job).replace("_", " "),
        started_at=started[0],
        ended_at=time.time(),
        duration_s=time.monotonic() - started[1],
        operators=operators,
        services=tuple(services),
        tasks=tuple(TaskReport(task, str(record.state)) for task, record in tuple(state.tasks.items())),
    )


def _error_of(failure: Failure, ended: Ended, dispatcher: Dispatcher, graph: LogicalGraph) -> Exception:
    if failure.trouble is FailureKind.BEGIN and failure.error is not None:
        begin = JobError(f"the job cannot begin: {describe(failure.error)}", job=graph.name, fault="external")
        begin.__cause__ = failure.error
        return hint(begin, "Nothing was started. The limits for threads are `ulimit -u` and pids.max of a group.")
    host = dispatcher.supervisor.hosts.get(failure.name) if failure.trouble not in OF_TASKS else None
    stack = ended.stacks.get(failure.name)
    if host is None or ended.state.services[failure.name].incarnation != failure.incarnation:
        return error_of(failure, graph.name, stack)  # the facts of the host are those of a later process
    return error_of(failure, graph.name, stack, host.facts())


def operator_reports(dispatcher: Dispatcher, graph: LogicalGraph) -> tuple[OperatorReport, ...]:
    """Return the counts of every operator as they stand, over all its tasks."""
    counts = {node.id: [0, 0, 0, 0, 0.0, 0.0, 0.0] for node in graph.nodes.values()}
    lost: dict[int, list[LostRecord]] = {node.id: [] for node in graph.nodes.values()}
    for task in dispatcher.supervisor.tasks.values():
        for operator in task.operators:
            one, total = operator.metrics, counts[operator.node.id]
            lost[operator.node.id] += [LostRecord(*texts) for texts in tuple(one.lost)]
            values = (one.records_in, one.records_out, one.failed, one.fatal, one.busy_s, one.full_s)
            for place, value in enumerate(values):
                total[place] += value
        # Its producers waited for the slowest of the chain.
        slowest = max(task.operators, key=lambda operator: operator.metrics.busy_s + operator.metrics.full_s)
        counts[slowest.node.id][-1] += task.waited_s
    return tuple(
        OperatorReport(
            node.name,
            str(node.kind),
            node.parallelism,
            int(total[0]),
            int(total[1]),
            int(total[2]),
            total[4],
            total[5],
            total[6],
            node.settings["concurrency"] if node.kind is Kind.MAP_ASYNC else None,
            fatal=int(total[3]),
            on_error=node.on_error.then,
            lost=tuple(lost[node.id]),
        )
        for node, total in ((graph.nodes[id_], total) for id_, total in counts.items())
    )


def accounted(report: JobReport, dispatcher: Dispatcher, graph: LogicalGraph, durable: DurableRun | None) -> JobReport:
    """Add for each operator how many records were sent to it that it did not take.

    Args:
        report: the report of a job whose tasks were all in this process.
        dispatcher: the dispatcher that ran the job.
        graph: the user's pipeline.
        durable: has the counts of earlier runs; None for a job without any.
    """
    tasks = dispatcher.supervisor.tasks.values()
    if durable is not None:
        none = Counts()
        earlier = [durable.before.get(one.name, none) for one in report.operators]
        report = replace(
            report,
            waiting=sum(task.waiting for task in tasks),
            operators=tuple(
                replace(one, earlier_in=counts.taken, earlier_out=counts.given, earlier_failed=counts.failed)
                for one, counts in zip(report.operators, earlier, strict=True)
            ),
        )
    if any(task.state == TaskState.ABANDONED for task in report.tasks):
        return report  # it may still count
    if any(node.kind is Kind.REPLY for node in graph.nodes.values()):
        return report  # a request whose caller has gone is dropped wherever it is
    counts = counted(operator for task in tasks for operator in task.operators)
    missing = not_taken(ways_of_records(graph), counts, {} if durable is None else durable.waiting)
    return replace(report, operators=tuple(replace(one, missing=missing[one.name]) for one in report.operators))


def to_raise(report: JobReport, failures: Iterable[Failure]) -> Exception | None:
    """Return the error for a waiting caller: None, the one error of a clean job, or all of them as a group."""
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
    return Outcome.STOPPED if state.ended_by in (StopMode.DRAIN, StopMode.STOP) else Outcome.CANCELLED


def _why(outcome: Outcome, errors: tuple[Exception, ...], reason: str) -> str:
    if outcome is Outcome.FAILED and errors:
        return str(errors[0]).splitlines()[0]
    if outcome is Outcome.COMPLETED:
        return "all sources ended"
    return reason or "its end was asked for"


def _services(ended: Ended, dispatcher: Dispatcher) -> tuple[ServiceReport, ...]:
    reports = []
    events = dispatcher.supervisor.events
    rests = Counter(event.name for event in events if event.after == ServiceState.RESTING)
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
                *host.waits,
                concurrency=host.options.concurrency,
                recycled=facts.recycled,
                rested=rests[name] if host.options.idle_stop_s is not None else 0,
            )
        )
    return tuple(reports)
