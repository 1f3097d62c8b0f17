"""The jobs in a report file, even if the file was cut short."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from sage.errors import ControlError
from sage.observability import Event, HookEvent
from sage.report import HookReport, JobReport, hook_lines, printable, seconds, table

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

SECONDS_MAX = 1e11
"""More than that is damage; it is three thousand years."""


@dataclass(frozen=True)
class SavedFailure:
    """A record that failed: where, on which record, how, and its number in which cassette."""

    operator: str
    record: str
    error: str
    cassette: str
    number: int


@dataclass
class SavedJob:
    """One job of a report file; `program` is the path of the program, or None if it is not known."""

    id: str
    name: str = ""
    program: str | None = None
    failures: list[SavedFailure] = field(default_factory=list)
    events: list[Event] = field(default_factory=list)
    hooks: list[HookEvent] = field(default_factory=list)
    report: JobReport | None = None
    began_at: float = float("inf")
    ended_at: float = float("-inf")

    @property
    def has_ended(self) -> bool:
        """Whether its report is there."""
        return self.report is not None

    def take(self, line: Mapping[str, object]) -> None:
        """Add the content of one line."""
        match line.get("type", "report"):
            case "job":
                self.name = str(line["name"])
                program = line.get("program")
                self.program = None if program is None else str(program)
                self._reach(line["at"])
            case "failed":
                operator, record, text, cassette = (
                    str(line[key]) for key in ("operator", "record", "error", "cassette")
                )
                self._reach(line["at"])
                self.failures.append(SavedFailure(operator, record, text, cassette, int(_number(line["number"]))))
            case "event":
                subject, name, before, after = (str(line[key]) for key in ("subject", "name", "before", "after"))
                self.events.append(Event(self._reach(line["at"]), subject, name, before, after))
            case "hook":
                error = None if line["error"] is None else str(line["error"])
                duration_s = max(0.0, _number(line["duration_s"]))
                report = HookReport(
                    str(line["hook"]), int(_number(line["incarnation"])), str(line["outcome"]), duration_s, error
                )
                self.hooks.append(HookEvent(self._reach(line["at"]), str(line["service"]), report))
            case "report":
                self.report = JobReport.from_dict(line)
                self.name = self.report.name
                self._reach(self.report.started_at)
                self._reach(self.report.ended_at)
            case kind:
                raise ValueError(f"a line of the unknown type {kind!r}")

    def text(self) -> str:
        """Return the report as a table, or the known facts about a job that did not end."""
        if self.report is not None:
            return str(self.report)
        lasted_s = max(0.0, self.ended_at - self.began_at)
        lines = [f'job "{self.name}": the run DID NOT END; the file ends {seconds(lasted_s)} after its start']
        states = self._last_states()
        tasks = [(name, state) for (subject, name), state in states.items() if subject == "task"]
        services = [
            (name, state, " | ".join(hook_lines(self.hooks_of(name))))
            for (subject, name), state in states.items()
            if subject == "service"
        ]
        lines += table(("task", "last seen"), tasks)
        lines += table(("service", "last seen", "hooks"), services)
        return "\n".join(map(printable, lines))

    def hooks_of(self, service: str) -> tuple[HookReport, ...]:
        return tuple(hook.report for hook in self.hooks if hook.service == service)

    def _last_states(self) -> dict[tuple[str, str], str]:
        return {(event.subject, event.name): event.after for event in self.events}

    def _reach(self, moment: object) -> float:
        at = _number(moment)
        self.began_at, self.ended_at = min(self.began_at, at), max(self.ended_at, at)
        return at


@dataclass(frozen=True)
class Saved:
    """The jobs of a report file, the first one first, and how many lines of it could not be read."""

    jobs: tuple[SavedJob, ...]
    unread_count: int


def read(path: Path) -> Saved:
    """Read a report file, or a file with the JSON of one report.

    Lines that cannot be read are counted and left out: one is torn when its process is killed.
    """
    text = path.read_text(encoding="utf-8", errors="replace")
    jobs: dict[str, SavedJob] = {}
    unread_count = 0
    for line in _lines(text):
        try:
            values = json.loads(line)
            id_ = str(values.get("job", values.get("id")))
            job = jobs.get(id_) or SavedJob(id_)
            job.take(values)
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
            unread_count += 1
        else:
            jobs[id_] = job
    return Saved(tuple(jobs.values()), unread_count)


def known_jobs(path: Path) -> Saved:
    """Read a report file; ControlError if it tells of no job, or cannot be read."""
    try:
        saved = read(path)
    except OSError as error:
        raise ControlError(f"{path} cannot be read: {error.strerror or error}") from error
    if not saved.jobs:
        raise ControlError(f"{path} does not contain a job")
    return saved


def _number(value: object) -> float:
    if not isinstance(value, int | float | str):
        raise TypeError(f"{value} is not a number")
    number = float(value)
    if not abs(number) < SECONDS_MAX:
        raise ValueError(f"{value} is not a number of seconds")
    return number


def _lines(text: str) -> list[str]:
    # A report that was saved alone may stand on many lines.
    try:
        json.loads(text)
    except (ValueError, RecursionError):
        return [line for line in text.split("\n") if line.strip()]
    return [text]
