"""The report of a job, sealed when everything that the job started has ended."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from enum import StrEnum
from typing import Any, TypeVar

from sage.errors import SageError, describe

STANDS_HERE = "It stands here:"
"""How the note of an error begins that shows the stack of a thread."""

FRAMES_SHOWN = 2
INCARNATIONS_SHOWN = 4
ERRORS_SHOWN = 10
OUTPUT_LINES_SHOWN = 10

BOTTLENECK_RUN_S = 3.0
BUSY_SHARE = 0.8
WAITED_SHARE = 0.1
"""A bottleneck is named after a run of so many seconds, in which it was busy for so large a part, and calls or records
waited for it for so large a part of that time."""

UNCLEAN_STATES = frozenset({"abandoned", "cleanup_failed", "killed", "lost"})
CLEANING_HOOKS = frozenset({"drain", "stop", "cleanup"})


class Outcome(StrEnum):
    """How a job ended. `RUNNING`: it has not; `LOST`: the driver died, written by whoever found out."""

    RUNNING = "running"
    COMPLETED = "completed"
    STOPPED = "stopped"
    CANCELLED = "cancelled"
    FAILED = "failed"
    LOST = "lost"


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
        error: type and text of its exception, or None.
    """

    hook: str
    incarnation: int
    outcome: str
    duration_s: float
    error: str | None = None


@dataclass(frozen=True, slots=True)
class ServiceReport:
    """The account of one service.

    Attributes:
        name: its name.
        state: its last state, such as "stopped", "cleanup_failed" or "abandoned".
        hooks: its hooks in the order in which they ended.
        calls: how many calls it was given.
        errors: how many of them raised.
        restarts: how often it was restarted.
        stack: where its thread stood when it was abandoned, or None.
        host: where it ran: "inline", "process", "command" or "ray".
        pid: its last process, or None for one that had none of its own.
        exit_code: how that process ended; negative for a signal, None where it is not known.
        output: the last lines that it wrote.
        released: whether its instance lives on, for other environments that share it.
        waits: how many of its calls had to wait, as all its `concurrency` was taken.
        waited_s: for how long they waited, in seconds, all together.
        busy_s: how long the service kept any of them waiting, in seconds.
        rate_waits: how many of its calls had to wait for its `rate`.
        rate_waited_s: for how long they waited, in seconds, all together.
        concurrency: how many of its calls may run at once, or None without a limit.
        recycled: how many processes of its replicas have given their place to new ones.
        rested: how often it was stopped because nobody had called it for its `idle_stop_s`.
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
    released: bool = False
    waits: int = 0
    waited_s: float = 0.0
    busy_s: float = 0.0
    rate_waits: int = 0
    rate_waited_s: float = 0.0
    concurrency: int | None = None
    recycled: int = 0
    rested: int = 0

    @property
    def built_count(self) -> int:
        """How many instances the job built; 0 for a service that an earlier job left."""
        return sum(hook.hook == "build" for hook in self.hooks)


@dataclass(frozen=True, slots=True)
class LostRecord:
    """A record that failed: its text, shortened, and its error."""

    record: str
    error: str


@dataclass(frozen=True, slots=True)
class OperatorReport:
    """Counts of one operator, over all its tasks.

    Attributes:
        name: its name.
        kind: the kind of operator.
        parallelism: how many tasks ran it.
        records_in: records that its function was called with, or that a source read.
        records_out: records that went on.
        failed: records that failed after the last attempt, and those that a source skipped.
        busy_s: time in the operator, in seconds, over all tasks.
        full_s: of `map_async`: time in which all `concurrency` calls ran, in seconds, over all tasks.
        waited_s: for how long tasks waited to send it records, in seconds, all together.
        concurrency: of `map_async`: how many calls each task may make at once.
        missing: records that were sent to it and that it did not take; None if that is not known, as on Ray, with a
            served pipeline, or if a task was abandoned.
        earlier_in: `records_in` of earlier runs of a durable job, up to the checkpoint that this run began with.
        earlier_out: `records_out` of them.
        earlier_failed: `failed` of them.
        fatal: how many of those that failed have failed the job; 0 on Ray.
        on_error: the policy for the others: "fail", "skip" or "letters".
        lost: the first records that failed, at most 20 for each task; none on Ray.
    """

    name: str
    kind: str
    parallelism: int
    records_in: int
    records_out: int
    failed: int
    busy_s: float
    full_s: float = 0.0
    waited_s: float = 0.0
    concurrency: int | None = None
    missing: int | None = None
    earlier_in: int = 0
    earlier_out: int = 0
    earlier_failed: int = 0
    fatal: int = 0
    on_error: str = "fail"
    lost: tuple[LostRecord, ...] = ()


@dataclass(frozen=True, slots=True)
class TaskReport:
    """How one task ended; `stack` shows where it stood when it was abandoned."""

    name: str
    state: str
    stack: str | None = None


class SavedError(SageError):
    """Stands for an error in a report that was read back; its class has the name that the error's class had."""


@dataclass(frozen=True, slots=True)
class JobReport:
    """Everything about a job that has ended, or so far about one that runs.

    `str(report)` is a table, `to_dict()` is ready for JSON. `JobReport.from_dict` reads that back, and the result
    prints the same.

    Attributes:
        id: the job's id.
        name: the environment's name.
        state: how it ended, or `Outcome.RUNNING`.
        cleanliness: whether everything was cleaned up.
        why: the reason in words.
        started_at: when it was submitted, in seconds since the epoch.
        ended_at: when the report was made, in seconds since the epoch.
        duration_s: the time between, by a monotonic clock, in seconds.
        operators: counts per operator, in the order of the graph.
        services: the account of each service, in the order of registration.
        tasks: how each task ended.
        undelivered: records that were in flight and dropped by a stop, a cancel or a failure.
        waiting: records that wait for the next run of a durable job.
        errors: everything that went wrong, the first cause first.
        running_s: for how long records flowed, after the start of the services and before their end, in seconds.
        notes: lines about the checkpoints of a durable job, such as the one that it was resumed from.
        restarts: how often the tasks of a durable job started again; the counts of operators are those since then.
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
    running_s: float = 0.0
    notes: tuple[str, ...] = ()
    waiting: int = 0
    restarts: int = 0

    @property
    def bottleneck(self) -> str | None:
        """The limit that held the job up and what to set, in a line; None if none did, or the job was quick."""
        if self.running_s < BOTTLENECK_RUN_S:
            return None
        least_s = WAITED_SHARE * self.running_s
        found = [*filter(None, map(self._service_bottleneck, self.services))]
        # An operator that calls a service may be busy with waiting for it.
        found = found or [*filter(None, map(self._operator_bottleneck, self.operators))]
        waited_s, line = max(found, default=(0.0, None))
        return line if waited_s >= least_s else None

    @property
    def is_accounted(self) -> bool | None:
        """Whether each record that an operator sent was taken, failed the job, or counts as undelivered or waiting.

        That is over all runs of a durable job. None if it is not known; see `OperatorReport.missing`.
        """
        missing = [operator.missing for operator in self.operators if operator.missing is not None]
        if not missing:
            return None
        return min(missing) >= 0 and sum(missing) == self.undelivered + self.waiting

    def _service_bottleneck(self, service: ServiceReport) -> tuple[float, str] | None:
        if service.rate_waited_s >= WAITED_SHARE * self.running_s:
            line = f"{_rate_line(service)} (set ServiceOptions(rate=...) if the provider allows more)"
            return service.rate_waited_s, line
        busy = service.busy_s / self.running_s
        if busy < BUSY_SHARE or service.concurrency is None:
            return None
        line = f'service "{service.name}" was busy {_percent(busy)} of the time, {service.waits:,} calls waited '
        line += f"{seconds(service.waited_s)} in all; its concurrency is {service.concurrency}"
        return service.waited_s, f"{line} (set ServiceOptions(concurrency=...) if it can take more)"

    def _operator_bottleneck(self, operator: OperatorReport) -> tuple[float, str] | None:
        is_async = operator.concurrency is not None
        busy = (operator.full_s if is_async else operator.busy_s) / (max(operator.parallelism, 1) * self.running_s)
        if busy < BUSY_SHARE or operator.kind == "source":
            return None
        limit, value = ("concurrency", operator.concurrency) if is_async else ("parallelism", operator.parallelism)
        line = f'operator "{operator.name}" was busy {_percent(busy)} of the time, tasks waited '
        line += f"{seconds(operator.waited_s)} in all to send it records; its {limit} is {value}"
        hint = "" if is_async else " if its function waits for something; computing in Python needs processes"
        return operator.waited_s, f"{line} (set {limit}=...{hint})"

    def service(self, name: str) -> ServiceReport:
        """Return the report of one service."""
        return next(service for service in self.services if service.name == name)

    def operator(self, name: str) -> OperatorReport:
        """Return the report of one operator."""
        return next(operator for operator in self.operators if operator.name == name)

    def to_dict(self) -> dict[str, Any]:
        """Return the report as plain values that `json.dumps` takes."""
        errors = [
            {
                "type": type(error).__name__,
                "text": describe(error),
                "cause": describe(error.__cause__) if error.__cause__ is not None else None,
                "notes": _notes(error),
            }
            for error in self.errors
        ]
        plain = {
            key: getattr(self, key)
            for key in (
                "id",
                "name",
                "why",
                "started_at",
                "ended_at",
                "duration_s",
                "running_s",
                "undelivered",
                "waiting",
                "restarts",
            )
        }
        return {
            **plain,
            "bottleneck": self.bottleneck,
            "notes": list(self.notes),
            "state": str(self.state),
            "cleanliness": str(self.cleanliness),
            "operators": [asdict(operator) for operator in self.operators],
            "services": [asdict(service) for service in self.services],
            "tasks": [asdict(task) for task in self.tasks],
            "errors": errors,
        }

    @classmethod
    def from_dict(cls, saved: Mapping[str, Any]) -> JobReport:
        """Return the report that `to_dict` made plain; fields that are not known here are left out.

        Raises:
            ValueError: it is not a report.
        """
        try:
            plain = {field.name: saved[field.name] for field in fields(cls) if field.name in saved}
            parts = {
                "state": Outcome(saved["state"]),
                "cleanliness": Cleanliness(saved["cleanliness"]),
                "operators": tuple(_read(OperatorReport, one) for one in saved["operators"]),
                "services": tuple(_read(ServiceReport, one) for one in saved["services"]),
                "tasks": tuple(_read(TaskReport, one) for one in saved["tasks"]),
                "errors": tuple(_error(one) for one in saved["errors"]),
                "notes": tuple(map(str, saved.get("notes", ()))),
            }
            report = cls(**(plain | parts))
            str(report)  # this finds values that are not numbers
        except (KeyError, TypeError, AttributeError, ValueError) as error:
            raise ValueError(f"not a report of a job: {describe(error)}") from error
        return report

    def __str__(self) -> str:
        cleaned = "" if self.state is Outcome.RUNNING else f" and {self.cleanliness.upper()}"
        lines = [f'job "{self.name}": {self.state.upper()}{cleaned} after {self.duration_s:.3f} s ({self.why})']
        lines += self.notes
        if self.undelivered:
            lines.append(f"{self.undelivered:,} records were in flight and not delivered{self._places()}")
        if self.waiting:
            lines.append(f"{self.waiting:,} records wait for the next run{self._places()}")
        if self.is_accounted:
            lines.append("every record is accounted for")
        elif self.is_accounted is False:
            lines.append(f"records are not accounted for{self._places()}; this is a bug of SAGE, please report it")
        lines += self._operator_lines()
        lines += self._service_lines()
        if self.bottleneck is not None:
            lines.append(f"bottleneck: {self.bottleneck}")
        unclean = [line for service in self.services for line in _unclean_service(service)]
        unclean += [line for task in self.tasks for line in _unclean_task(task)]
        if self.cleanliness is Cleanliness.DIRTY:
            lines += ["not cleaned:", *unclean] if unclean else ["not cleaned: see the errors"]
        if self.errors:
            lines.append("errors:")
        for error in self.errors[:ERRORS_SHOWN]:
            lines += _error_lines(error, is_stack_shown=bool(unclean))
        if len(self.errors) > ERRORS_SHOWN:
            lines.append(f"  and {len(self.errors) - ERRORS_SHOWN} more")
        return "\n".join(printable(line) for part in lines for line in part.splitlines() or [""])

    def _operator_lines(self) -> list[str]:
        header = ("operator", "tasks", "in", "out", "failed", "busy")
        has_earlier = any(one.earlier_in for one in self.operators)
        rows = []
        for one in self.operators:
            counts = (one.records_in, one.records_out, one.failed)
            sums = (one.earlier_in + counts[0], one.earlier_out + counts[1], one.earlier_failed + counts[2])
            row = (one.name, str(one.parallelism), *map("{:,}".format, counts), seconds(one.busy_s))
            rows.append((*row, *map("{:,}".format, sums)) if has_earlier else row)
        return table((*header, *(("in all runs: in", "out", "failed") if has_earlier else ())), rows)

    def _places(self) -> str:
        """Return where records are missing, for the end of a line."""
        places = [f"{one.missing:,} before {one.name}" for one in self.operators if one.missing]
        return f": {', '.join(places)}" if places else ""

    def _service_lines(self) -> list[str]:
        hosted = any(service.host != "inline" for service in self.services)
        rows: list[tuple[str, ...]] = []
        for service in self.services:
            first, *others = hook_lines(service.hooks)
            host = (_host(service),) if hosted else ()
            calls = (f"{service.calls:,}", f"{service.errors:,}", str(service.built_count))
            state = "released" if service.released else service.state
            rows.append((service.name, state, *calls, *host, first))
            rows += [("",) * (len(rows[-1]) - 1) + (line,) for line in others]
        header = ("service", "state", "calls", "errors", "built", *(("host",) if hosted else ()), "hooks")
        lines = table(header, rows)
        lines += [_rate_line(service) for service in self.services if service.rate_waits]
        lines += [_recycled_line(service) for service in self.services if service.recycled]
        lines += [_rested_line(service) for service in self.services if service.rested]
        for service in self.services:
            if service.output:
                lines.append(f'last output of service "{service.name}":')
                lines += [f"    {line}" for line in service.output[-OUTPUT_LINES_SHOWN:]]
        return lines


def seconds(value: float) -> str:
    """Return a duration as a person reads it."""
    if value >= 1:
        return f"{value:.1f} s"
    return f"{value * 1e3:.1f} ms" if value >= 1e-3 else f"{value * 1e6:.0f} us"


def _percent(share: float) -> str:
    return f"{min(share, 1.0):.0%}".replace("%", " %")


def printable(text: str) -> str:
    """Return `text` with those characters escaped that could move the cursor of a terminal or break a file."""
    if text.isprintable():
        return text
    return "".join(
        letter if letter.isprintable() else letter.encode("unicode_escape", "surrogatepass").decode() for letter in text
    )


def hook_lines(hooks: tuple[HookReport, ...]) -> list[str]:
    """Return the hooks of a service, one line for each instance; the line is empty without hooks."""
    lines: dict[int, list[str]] = {}
    for hook in hooks:
        if hook.hook != "drain" or hook.outcome != "ok":
            lines.setdefault(hook.incarnation, []).append(_hook(hook))
    shown = [f"#{number} {', '.join(texts)}" if number > 1 else ", ".join(texts) for number, texts in lines.items()]
    left_out = len(shown) - INCARNATIONS_SHOWN
    if left_out > 0:
        shown[:left_out] = [f"{left_out} earlier {'instance is' if left_out == 1 else 'instances are'} left out"]
    return shown or [""]


def table(header: tuple[str, ...], rows: Sequence[tuple[str, ...]]) -> list[str]:
    """Return a table of text: columns that begin with a number in the first row are set to the right."""
    if not rows:
        return []
    rows = [tuple(printable(cell) for cell in row) for row in rows]
    widths = [max(len(row[column]) for row in (header, *rows)) for column in range(len(header))]
    numeric = [cell.replace(",", "").replace(".", "").split(" ")[0].isdigit() for cell in rows[0]]

    def line(row: tuple[str, ...]) -> str:
        cells = [
            cell.rjust(width) if number else cell.ljust(width)
            for cell, width, number in zip(row, widths, numeric, strict=True)
        ]
        return "  " + "  ".join(cells).rstrip()

    return [line(header), *map(line, rows)]


def _hook(hook: HookReport) -> str:
    outcome = "" if hook.outcome == "ok" else f" {hook.outcome.upper()}"
    return f"{hook.hook} {seconds(hook.duration_s)}{outcome}"


def _rate_line(service: ServiceReport) -> str:
    waited = f"{service.rate_waits:,} calls waited {seconds(service.rate_waited_s)} in all"
    return f'service "{service.name}": {waited} for its rate'


def _recycled_line(service: ServiceReport) -> str:
    processes = "1 process" if service.recycled == 1 else f"{service.recycled:,} processes"
    return f'service "{service.name}": {processes} gave {"its" if service.recycled == 1 else "their"} place to new ones'


def _rested_line(service: ServiceReport) -> str:
    times = "once" if service.rested == 1 else f"{service.rested:,} times"
    return f'service "{service.name}": stopped {times} while nobody called it'


def _host(service: ServiceReport) -> str:
    parts = [service.host]
    if service.pid is not None:
        parts.append(f"pid {service.pid}")
    if service.exit_code is not None:
        parts.append(f"exit {service.exit_code}")
    return " ".join(parts)


def _unclean_service(service: ServiceReport) -> list[str]:
    """Return which part of a service was not cleaned up and why, or nothing."""
    failed = [hook for hook in service.hooks if hook.outcome != "ok"]
    if service.state not in UNCLEAN_STATES and not any(hook.hook in CLEANING_HOOKS for hook in failed):
        return []
    why = "; ".join(map(_why, failed)) or "not all of its hooks were run"
    return [f'  service "{service.name}" ({service.state}): {why}', *_stack_lines(service.stack)]


def _unclean_task(task: TaskReport) -> list[str]:
    if task.state != "abandoned":
        return []
    return [f'  task "{task.name}" ({task.state}): it did not leave user code in time', *_stack_lines(task.stack)]


def _why(hook: HookReport) -> str:
    if hook.outcome == "error":
        return f"{hook.hook} raised {hook.error}"
    if hook.hook == "drain":
        return f"calls still ran after {seconds(hook.duration_s)}"
    return f"{hook.hook} did not end within {seconds(hook.duration_s)}"


def _stack_lines(stack: str | None) -> list[str]:
    """Return the innermost frames of a stack that are not of the standard library, which is where a lock hangs."""
    if not stack:
        return []
    frames = [frame.rstrip() for frame in re.split(r"^(?=  File )", stack, flags=re.MULTILINE) if frame.strip()]
    own = [frame for frame in frames if "site-packages" in frame or not re.search(r"[/\\]lib[/\\]python3", frame)]
    lines = "\n".join((own or frames)[-FRAMES_SHOWN:]).splitlines()
    return ["    its thread stands here:", *(f"    {line}" for line in lines)]


def _error_lines(error: Exception, *, is_stack_shown: bool) -> list[str]:
    first, *others = describe(error).splitlines() or [""]
    notes = _notes(error)
    if is_stack_shown:
        notes = [note for note in notes if not note.startswith(STANDS_HERE)]
    return [
        f"  {first}",
        *(f"      {line}" for line in (*others, *(line for note in notes for line in note.splitlines()))),
    ]


def _notes(error: Exception) -> list[str]:
    # A program may have put anything there, and a report has to be made all the same.
    notes = getattr(error, "__notes__", None)
    return [note for note in notes if isinstance(note, str)] if isinstance(notes, list) else []


Part = TypeVar("Part", HookReport, OperatorReport, ServiceReport, TaskReport)


def _read(kind: type[Part], saved: Mapping[str, Any]) -> Part:
    values = {field.name: saved[field.name] for field in fields(kind) if field.name in saved}
    if "hooks" in values:
        values["hooks"] = tuple(_read(HookReport, hook) for hook in values["hooks"])
    if "lost" in values:
        values["lost"] = tuple(LostRecord(one["record"], one["error"]) for one in values["lost"])
    if "output" in values:
        values["output"] = tuple(values["output"])
    return kind(**values)


def _error(saved: Mapping[str, Any]) -> SavedError:
    name = saved["type"]
    error = _named(name, saved["text"])
    if saved.get("cause") is not None:
        error.__cause__ = _named(saved["cause"].partition(": ")[0], saved["cause"])
    for note in saved.get("notes", ()):
        error.add_note(note)
    return error


def _named(name: str, described: str) -> SavedError:
    kind: type[SavedError] = type(name, (SavedError,), {})
    text = described.removeprefix(f"{name}: ")
    return kind(text) if text != name else kind()
