"""The fault matrix, row by row: the order of hooks, the outcome, the errors and the time of each."""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from faults.faulty import Faulty, Neighbour
from faults.matrix import (
    CALL_S,
    CLOSE_S,
    DRAIN_S,
    ENDING,
    HOSTS,
    IN_PYTHON,
    ITSELF,
    KILL_GRACE_S,
    LASTING,
    ROWS,
    START_S,
    STARTING,
    STOP_S,
    Row,
    expected,
)
from faults.program import ask
from support.fair_clock import FairClock
from support.fault_injection import go_wrong, mark, marked, released

from sage import JobError, JobReport, LocalEnvironment, MapFunction, RunningCommand, ServiceOptions, StopSignal

WAIT_S = 30.0
SLACK_S = 3.0
"""What starts and ends of processes may take beside the bounds, with several jobs at once on two processors."""

JOBS_AT_ONCE = 6

NEIGHBOUR_BEGINS = ("neighbour.constructor", "neighbour.setup", "neighbour.start")
NEIGHBOUR_ENDS = ("neighbour.stop", "neighbour.cleanup")


@pytest.fixture(scope="module", autouse=True)
def _release() -> Iterator[None]:
    """Let what hangs in this process end when the tests are over."""
    released.clear()
    yield
    released.set()


class Case:
    """One row while it runs."""

    def __init__(self, row: Row, folder: Path) -> None:
        self.row = row
        self.marks = str(folder / f"{row}.marks")
        self.arrived = threading.Event()
        self.is_ending = threading.Event()
        self.is_failing = threading.Event()
        self.is_sent = False
        self.call: Any = None
        self.began_at = 0.0

    def read(self) -> Any:
        if self.is_ending.is_set():
            return StopSignal()
        first, self.is_sent = not self.is_sent, True
        return 1 if first else None

    def read_beside(self) -> Any:
        if self.is_failing.is_set():
            raise RuntimeError("told to fail")
        return StopSignal() if self.is_ending.is_set() else None

    def environment(self) -> LocalEnvironment:
        row = self.row
        env = LocalEnvironment(str(row), drain_timeout_s=DRAIN_S, close_timeout_s=CLOSE_S)
        env.register_service("neighbour", Neighbour, self.marks)
        options = ServiceOptions(
            host="process" if row.host == "process" else "inline",
            depends_on=["neighbour"],
            start_timeout_s=START_S[row.host] if row.place in STARTING and row.fault in LASTING else WAIT_S,
            call_timeout_s=CALL_S if row.place == "call" and row.way == ITSELF else None,
            drain_timeout_s=DRAIN_S,
            stop_timeout_s=STOP_S if row.fault in LASTING else WAIT_S,
            kill_grace_s=KILL_GRACE_S,
            health_interval_s=0.05 if row.place == "health" else WAIT_S,
        )
        if row.host == "command":
            self.register_command(env, options)
        else:
            self.register_service(env, options)
        case = self

        class Closing(MapFunction):
            def execute(self, data: int) -> int:
                return data

            def close(self) -> None:
                if row.place == "close":
                    mark(case.marks, "function.close")
                    go_wrong(row.fault)

        # Health is looked at whether or not a call runs, and a call would be a second thing to go wrong.
        call = (lambda data: data) if row.place == "health" else self.call
        env.from_source(self.read).map(call).map(Closing).sink(lambda _: self.arrived.set())
        env.from_source(self.read_beside).sink(lambda _: None)
        return env

    def register_service(self, env: LocalEnvironment, options: ServiceOptions) -> None:
        faulty = env.register_service("faulty", Faulty, self.marks, self.row.place, self.row.fault, options=options)
        self.call = faulty.process

    def register_command(self, env: LocalEnvironment, options: ServiceOptions) -> None:
        row = self.row
        command = env.register_command(
            "faulty",
            [sys.executable, "-S", "-m", "faults.program", self.marks, row.place, row.fault, "{port}"],
            ready=lambda running: self.look(running, "ready"),
            health=lambda running: self.look(running, "health"),
            env={"PYTHONPATH": str(Path(__file__).parents[1])},
            options=options,
        )
        timeout_s = CALL_S if row.way == ITSELF and row.fault in LASTING else None

        def call(data: int) -> int:
            ask(command.port, "call", timeout_s)
            return data

        self.call = call

    def look(self, running: RunningCommand, place: str) -> bool:
        """Ask the program; what goes wrong without its doing goes wrong here, the first time."""
        assert running.port is not None
        if (self.row.place, self.row.fault in IN_PYTHON) != (place, True):
            ask(running.port, place)
            return True
        ask(running.port)
        if f"faulty.{place}" not in marked(self.marks):
            mark(self.marks, f"faulty.{place}")
            go_wrong(self.row.fault)
        return True

    def run(self) -> JobReport:
        """Run the job to its end, and end it in its way if the fault does not."""
        row = self.row
        job = self.environment().submit()
        if row.place in ENDING:
            assert self.arrived.wait(WAIT_S), f"{row}: no record arrived"
        elif row.place not in STARTING or row.way != "natural":
            self.wait_marked(f"faulty.{row.place}")
        self.began_at = time.monotonic()
        with suppress(JobError):
            match row.way:
                case "natural":
                    self.is_ending.set()
                case "failure":
                    self.is_failing.set()
                case "stop":
                    job.stop(timeout_s=WAIT_S)
                case "cancel":
                    job.cancel()
            job.wait(WAIT_S)
        assert job.report is not None
        return job.report

    def wait_marked(self, text: str) -> None:
        due = time.monotonic() + WAIT_S
        while text not in marked(self.marks):
            assert time.monotonic() < due, f"{self.row}: {text} never came"
            time.sleep(0.005)


def differences(row: Row, folder: Path, clock: FairClock) -> list[str]:
    """Run a row, and return in words where it is not as it must be."""
    case, must = Case(row, folder), expected(row)
    report = case.run()
    took_s = clock.elapsed_s(case.began_at)
    marks = marked(case.marks)
    errors = tuple(sorted(type(error).__name__ for error in report.errors))
    if errors in must.or_errors:
        errors = must.errors
    seen = {
        "marks": tuple(marks),
        "state": report.service("faulty").state,
        "neighbour": report.service("neighbour").state,
        "outcome": str(report.state),
        "clean": report.cleanliness == "clean",
        "errors": errors,
        "ends of its process": sum(hook.hook == "exit" for hook in report.service("faulty").hooks),
    }
    wanted = {
        "marks": (*NEIGHBOUR_BEGINS, *must.marks, *NEIGHBOUR_ENDS),
        "state": must.state,
        "neighbour": "stopped",
        "outcome": must.outcome,
        "clean": must.is_clean,
        "errors": must.errors,
        "ends of its process": 0 if row.host == "inline" else 1,
    }
    found = [f"{row}: {key}: {seen[key]} instead of {wanted[key]}" for key in wanted if seen[key] != wanted[key]]
    if took_s > must.bound_s + SLACK_S:
        found.append(f"{row}: took {took_s:.2f} s, bound {must.bound_s:.2f} s")
    return found + ([f"    {error!r}" for error in report.errors] if found else [])


@pytest.mark.proof
@pytest.mark.parametrize(("host", "place"), [(host, place) for host, places in HOSTS.items() for place in places])
def test_what_must_follow_follows(host: str, place: str, tmp_path: Path, clock: FairClock) -> None:
    """Each in every hook and with every way to end."""
    rows = [row for row in ROWS if (row.host, row.place) == (host, place)]
    with ThreadPoolExecutor(JOBS_AT_ONCE) as threads:
        found = list(threads.map(lambda row: differences(row, tmp_path, clock), rows))
    wrong = [text for texts in found for text in texts]
    assert not wrong, "\n".join(wrong)
