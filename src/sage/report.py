"""What happened in a job: the report that is sealed when everything it started has ended."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from enum import StrEnum
from typing import Any

from sage.errors import describe


class Outcome(StrEnum):
    """How a job ended."""

    COMPLETED = "completed"
    STOPPED = "stopped"
    CANCELLED = "cancelled"
    FAILED = "failed"


class Cleanliness(StrEnum):
    """Whether everything a job started was closed and cleaned up without an error."""

    CLEAN = "clean"
    DIRTY = "dirty"


@dataclass(frozen=True, slots=True)
class HookReport:
    """One call of a hook of a service.

    Attributes:
        hook: its name; "build" is the constructor, "drain" the wait for running calls, "exit" the end of the process.
        incarnation: which instance of the service it was called on, from 1.
        outcome: "ok", "error", "abandoned" if it was late, "lost" if the process died while it ran, "killed" for an
            "exit" that needed force.
        duration_s: how long it took, in seconds.
        error: type and text of what it raised, or None.
    """

    hook: str
    incarnation: int
    outcome: str
    duration_s: float
    error: str | None = None


@dataclass(frozen=True, slots=True)
class ServiceReport:
    """What happened to one service.

    Attributes:
        name: its name.
        state: its last state, such as "stopped", "cleanup_failed" or "abandoned".
        hooks: its hooks in the order in which they ended.
        calls: how many calls it was given.
        errors: how many of them raised.
        restarts: how often it was restarted.
        stack: where its thread stood when it was abandoned, or None.
        host: where it ran: "inline", "process" or "command".
        pid: its last process, or None for one that had none of its own.
        exit_code: how that process ended; negative for a signal, None where it is not known.
        output: the last lines that it wrote.
    """

    name: str
    state: str
    hooks: tuple[HookReport, ...]
    calls: int
    errors: int
    restarts: int
    stack: str | None = None
    host: str = "inline"
    pid: int | None = None
    exit_code: int | None = None
    output: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class OperatorReport:
    """Counts of one operator, over all its tasks.

    Attributes:
        name: its name.
        kind: what it does.
        parallelism: how many tasks ran it.
        records_in: records that its function was called with, or that a source read.
        records_out: records that went on.
        failed: records that failed after the last attempt.
        busy_s: time in the operator, in seconds, over all tasks.
    """

    name: str
    kind: str
    parallelism: int
    records_in: int
    records_out: int
    failed: int
    busy_s: float


@dataclass(frozen=True, slots=True)
class TaskReport:
    """How one task ended; `stack` shows where it stood when it was abandoned."""

    name: str
    state: str
    stack: str | None = None


@dataclass(frozen=True, slots=True)
class JobReport:
    """Everything about a job that has ended. `str(report)` is a table, `to_dict()` is ready for JSON.

    Attributes:
        id: the job's id.
        name: the environment's name.
        state: how it ended.
        cleanliness: whether everything was cleaned up.
        why: the reason in words.
        started_at: when it was submitted, in seconds since the epoch.
        ended_at: when the report was sealed, in seconds since the epoch.
        duration_s: the time between, by a monotonic clock, in seconds.
        operators: counts per operator, in the order of the graph.
        services: what happened to each service, in the order of registration.
        tasks: how each task ended.
        undelivered: records that were in flight and dropped by a stop, a cancel or a failure.
        errors: everything that went wrong, the first cause first.
    """

    id: str
    name: str
    state: Outcome
    cleanliness: Cleanliness
    why: str
    started_at: float
    ended_at: float
    duration_s: float
    operators: tuple[OperatorReport, ...] = ()
    services: tuple[ServiceReport, ...] = ()
    tasks: tuple[TaskReport, ...] = ()
    undelivered: int = 0
    errors: tuple[Exception, ...] = ()

    def service(self, name: str) -> ServiceReport:
        """Return the report of one service."""
        return next(service for service in self.services if service.name == name)

    def operator(self, name: str) -> OperatorReport:
        """Return the report of one operator."""
        return next(operator for operator in self.operators if operator.name == name)

    def to_dict(self) -> dict[str, Any]:
        """Return the report as plain values that `json.dumps` takes."""
        errors, self_errors = [], self.errors
        for error in self_errors:
            cause = error.__cause__
            errors.append(
                {
                    "type": type(error).__name__,
                    "text": describe(error),
                    "cause": describe(cause) if cause is not None else None,
                    "notes": list(getattr(error, "__notes__", ())),
                }
            )
        plain = {
            key: getattr(self, key)
            for key in ("id", "name", "why", "started_at", "ended_at", "duration_s", "undelivered")
        }
        return {
            **plain,
            "state": str(self.state),
            "cleanliness": str(self.cleanliness),
            "operators": [asdict(operator) for operator in self.operators],
            "services": [asdict(service) for service in self.services],
            "tasks": [asdict(task) for task in self.tasks],
            "errors": errors,
        }

    def __str__(self) -> str:
        lines = [
            f'job "{self.name}": {self.state.upper()} and {self.cleanliness.upper()}'
            f" after {self.duration_s:.3f} s ({self.why})"
        ]
        if self.undelivered:
            lines.append(f"{self.undelivered} records were in flight and not delivered")
        lines += _table(
            ("operator", "tasks", "in", "out", "failed", "busy"),
            [
                (
                    operator.name,
                    str(operator.parallelism),
                    f"{operator.records_in:,}",
                    f"{operator.records_out:,}",
                    f"{operator.failed:,}",
                    seconds(operator.busy_s),
                )
                for operator in self.operators
            ],
        )
        lines += _table(
            ("service", "state", "calls", "errors", "restarts", "hooks"),
            [
                (
                    service.name,
                    service.state,
                    f"{service.calls:,}",
                    f"{service.errors:,}",
                    str(service.restarts),
                    ", ".join(_hook(hook) for hook in service.hooks if hook.hook != "drain" or hook.outcome != "ok"),
                )
                for service in self.services
            ],
        )
        for error in self.errors:
            lines.append(f"{type(error).__name__}: {error}")
            lines += [f"    {line}" for note in getattr(error, "__notes__", ()) for line in note.splitlines()]
        return "\n".join(lines)


def seconds(value: float) -> str:
    """Return a duration as a person reads it."""
    if value >= 1:
        return f"{value:.1f} s"
    return f"{value * 1e3:.1f} ms" if value >= 1e-3 else f"{value * 1e6:.0f} us"


def _hook(hook: HookReport) -> str:
    outcome = "" if hook.outcome == "ok" else f" {hook.outcome.upper()}"
    number = f" #{hook.incarnation}" if hook.incarnation > 1 else ""
    return f"{hook.hook}{number} {seconds(hook.duration_s)}{outcome}"


def _table(header: tuple[str, ...], rows: list[tuple[str, ...]]) -> list[str]:
    if not rows:
        return []
    widths = [max(len(row[column]) for row in (header, *rows)) for column in range(len(header))]

    def line(row: tuple[str, ...]) -> str:
        numeric = [cell.replace(",", "").replace(".", "").split(" ")[0].isdigit() for cell in rows[0]]
        cells = [
            cell.rjust(width) if number else cell.ljust(width)
            for cell, width, number in zip(row, widths, numeric, strict=True)
        ]
        return "  " + "  ".join(cells).rstrip()

    return [line(header), *map(line, rows)]
