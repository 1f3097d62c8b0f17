"""Services that write down what happens to them, for tests that compare it with what should."""

from __future__ import annotations

from typing import Any

from sage import BaseService, JobReport, LocalEnvironment


class Recorded(BaseService):
    """Writes its hooks into a list, and says so if one of them runs during a call."""

    def __init__(self, journal: list[str], *others: Any) -> None:
        self.journal = journal
        self.calls_running = 0
        self.note("build")

    def note(self, hook: str) -> None:
        self.journal.append(f"{self.name}.{hook}" + (" during a call" if self.calls_running else ""))

    def setup(self) -> None:
        self.note("setup")

    def start(self) -> None:
        self.note("start")

    def stop(self) -> None:
        self.note("stop")

    def cleanup(self) -> None:
        self.note("cleanup")

    def process(self, data: Any) -> Any:
        self.calls_running += 1
        try:
            return data
        finally:
            self.calls_running -= 1


class Broken(Recorded):
    """Raises in one of its hooks."""

    def __init__(self, journal: list[str], hook: str, error: BaseException) -> None:
        self.hook, self.error = hook, error
        super().__init__(journal)

    def note(self, hook: str) -> None:
        super().note(hook)
        if hook == self.hook:
            raise self.error


class Numbered(BaseService):
    """Writes its hooks into a list, with the number of the instance."""

    def __init__(self, journal: list[str]) -> None:
        self.journal = journal
        self.number = 1 + sum(entry.startswith(f"{self.name}.build") for entry in journal)
        self.note("build")

    def note(self, hook: str) -> None:
        self.journal.append(f"{self.name}.{hook} {self.number}")

    def stop(self) -> None:
        self.note("stop")

    def cleanup(self) -> None:
        self.note("cleanup")

    def process(self, data: Any) -> Any:
        return data


def report_of(env: LocalEnvironment) -> JobReport:
    """Return the report of the environment's latest job, as somebody who has not got the job finds it."""
    report = env.jobmanager.jobs[env.env_uuid].report
    assert isinstance(report, JobReport)
    return report
