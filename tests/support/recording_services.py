"""Services that write down what happens to them, for tests that compare it with what should."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from sage import BaseService

# Every process of a test's service imports this module, so that what only names types is left out there.
if TYPE_CHECKING:
    from pathlib import Path

    from sage import JobReport, LocalEnvironment


class Notes(Sequence[str]):
    """A list of lines in a file, which services of any process append to."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def append(self, line: str) -> None:
        # Appended by one write, lines of several processes do not mix.
        with self.path.open("ab", buffering=0) as file:
            file.write(line.encode() + b"\n")

    def clear(self) -> None:
        self.path.unlink(missing_ok=True)

    def lines(self) -> list[str]:
        return self.path.read_text().splitlines() if self.path.exists() else []

    def __getitem__(self, place: Any) -> Any:
        return self.lines()[place]

    def __len__(self) -> int:
        return len(self.lines())

    def __eq__(self, other: object) -> bool:
        return self.lines() == (other.lines() if isinstance(other, Notes) else other)

    def __hash__(self) -> int:
        return hash(self.path)

    def __repr__(self) -> str:
        return repr(self.lines())


Journal = list[str] | Notes


class Recorded(BaseService):
    """Writes its hooks into a list, and says so if one of them runs during a call."""

    def __init__(self, journal: Journal, *others: Any) -> None:
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

    def __init__(self, journal: Journal, hook: str, error: BaseException) -> None:
        self.hook, self.error = hook, error
        super().__init__(journal)

    def note(self, hook: str) -> None:
        super().note(hook)
        if hook == self.hook:
            raise self.error


class SlowlyMarked:
    """Takes its time to clean up, and leaves a line in a file when it is done."""

    def __init__(self, marker: Path, cleanup_s: float) -> None:
        self.marker = marker
        self.cleanup_s = cleanup_s

    def process(self, data: int) -> int:
        return data + 1

    def cleanup(self) -> None:
        time.sleep(self.cleanup_s)
        with self.marker.open("a") as file:
            file.write("cleaned\n")


class Numbered(BaseService):
    """Writes its hooks into a list, with the number of the instance."""

    def __init__(self, journal: Journal) -> None:
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


class Fragile(Numbered):
    """The first instances get sick by the third call, and their health check says so."""

    def __init__(self, journal: Journal, sick_count: int, *, raises: bool = False) -> None:
        super().__init__(journal)
        self.is_sick_one = self.number <= sick_count
        self.raises = raises
        self.calls_seen = 0

    def process(self, data: Any) -> int:
        self.calls_seen += 1
        return self.number

    def health(self) -> bool:
        is_sick = self.is_sick_one and self.calls_seen >= 3
        if is_sick and self.raises:
            raise ConnectionError("the index is gone")
        return not is_sick


def assert_same(found: BaseException | None, error: BaseException, host: str) -> None:
    """Compare an error with the one that was raised, of which another process sends a copy."""
    if host == "inline":
        assert found is error
    else:
        assert type(found) is type(error)
        assert found.args == error.args
        assert "In the process " in found.__notes__[0]


def report_of(env: LocalEnvironment) -> JobReport:
    """Return the report of the environment's latest job, as somebody who has not got the job finds it."""
    report: JobReport | None = env.jobmanager.jobs[env.env_uuid].report
    assert report is not None
    assert report.is_accounted is not False, str(report)
    return report
