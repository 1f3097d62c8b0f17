"""A program whose jobs do a deed: `python -m faults.deed_program RESULTS DEED HOST WAY...`, one job for each way.

With `command` in the place of RESULTS, it is the program of a command that does the deed.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import threading
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

from faults.deeds import COMMAND, COMMANDS, DEEDS, DONE, FUNCTION, INLINE, RECYCLED, REPLICAS, WAIT_S, Deed, undo

from sage import BaseService, JobError, Line, LocalEnvironment, MapFunction, ServiceOptions, StopSignal
from sage._runtime.job import Job
from sage.testing import assert_clean

RECORDS = 3

OF_OTHERS = ("shared memory */sem.mp-*", "shared memory */own-*")
"""What programs beside this one make: multiprocessing for a moment, and tests of durable jobs."""


def mark(marks: str, text: str) -> None:
    descriptor = os.open(marks, os.O_WRONLY | os.O_APPEND)
    os.write(descriptor, f"{text}\n".encode())
    os.close(descriptor)


class Service(BaseService):
    """Does the deed, and marks its hooks."""

    def __init__(self, deed: str, marks: str) -> None:
        self.deed = deed
        self.marks = marks
        mark(marks, "build")

    def setup(self) -> None:
        mark(self.marks, "setup")

    def process(self, record: int) -> str:
        return DEEDS[self.deed].do()

    def stop(self) -> None:
        mark(self.marks, "stop")

    def cleanup(self) -> None:
        mark(self.marks, "cleanup")


def job_of(env: LocalEnvironment) -> Job | None:
    """Return the job of an environment once it has one."""
    found = env.jobmanager.jobs.get(env.env_uuid)
    return found if isinstance(found, Job) else None


class Run:
    """One job."""

    def __init__(self, deed: Deed, host: str, way: str, folder: Path) -> None:
        self.deed, self.host, self.way = deed, host, way
        self.marks = str(folder / f"{way}.marks")
        Path(self.marks).touch()
        self.report_file = folder / f"{way}.report"
        self.arrived = threading.Semaphore(0)
        self.is_ending = threading.Event()
        self.results: list[Any] = []
        self.given = 0
        self.ended_at = self.began_at = 0.0

    def read(self) -> Any:
        if self.given < RECORDS:
            if self.host == RECYCLED and self.given == RECORDS - 1 and "cleanup" not in self.marked():
                return None  # the last record is for the successor
            self.given += 1
            return self.given
        return StopSignal() if self.way == "natural" or self.is_ending.is_set() else None

    def marked(self) -> list[str]:
        return Path(self.marks).read_text(encoding="utf-8").split()

    def read_beside(self) -> Any:
        if self.is_ending.is_set() and self.way == "failure":
            raise RuntimeError("told to fail")
        return StopSignal() if self.way != "failure" or self.is_ending.is_set() else None

    def take(self, result: Any) -> None:
        self.results.append(result)
        self.arrived.release()

    def environment(self) -> LocalEnvironment:
        env = LocalEnvironment(self.way, report_file=self.report_file)
        run = self

        class Function(MapFunction):
            def execute(self, data: int) -> Any:
                if run.host == FUNCTION:
                    return run.deed.do()
                return DONE if run.host in (COMMAND, COMMANDS) else self.call_service("service", data)

            def close(self) -> None:
                mark(run.marks, "close")

        replicas = 2 if self.host in (REPLICAS, COMMANDS) else 1
        if self.host in (COMMAND, COMMANDS):
            words = [sys.executable, "-m", "faults.deed_program", "command", self.deed.name]
            env.register_command(
                "service", words, ready=Line("up"), options=ServiceOptions(stop_timeout_s=5, replicas=replicas)
            )
        else:
            # What a function does may hurt what leads from its process to that of a service.
            options = ServiceOptions(
                host="inline" if self.host == INLINE else "process",
                kill_grace_s=5.0,
                replicas=replicas,
                recycle_calls=1 if self.host == RECYCLED else None,
            )
            env.register_service("service", Service, self.deed.name, self.marks, options=options)
        env.from_source(self.read).map(Function).sink(self.take)
        env.from_source(self.read_beside).sink(lambda _: None)
        return env

    def end(self, job: Any) -> None:
        """Wait for the records, or for the end of the job, and end it in its way."""
        for _ in range(RECORDS):
            while not self.arrived.acquire(timeout=0.01):
                if job() is not None and not job().is_running:
                    return
        self.began_at = time.monotonic()
        match self.way:
            case "stop":
                job().stop()
            case "cancel":
                job().cancel()
            case "failure":
                self.is_ending.set()
            case "SIGINT" | "SIGTERM":
                os.kill(os.getpid(), getattr(signal, self.way))

    def go(self) -> dict[str, Any]:
        env = self.environment()
        raised = ""
        ending = threading.Thread(target=self.tried_to_end, args=(lambda: job_of(env),))
        left = ""
        try:
            with assert_clean(within_s=3.0, ignore=(*self.deed.ignore, *OF_OTHERS)):
                ending.start()
                try:
                    env.submit(autostop=True)
                except (JobError, KeyboardInterrupt, SystemExit) as error:
                    raised = type(error).__name__
                self.ended_at = time.monotonic()
                ending.join(WAIT_S)
                undo()
        except AssertionError as error:
            left = str(error)
        report = env.jobmanager.jobs[env.env_uuid].report
        assert report is not None
        return {
            "way": self.way,
            "results": self.results,
            "raised": raised,
            "state": str(report.state),
            "cleanliness": str(report.cleanliness),
            "service": report.service("service").state,
            "errors": [str(error) for error in report.errors],
            "marks": self.marked(),
            "left": left,
            "took_s": [self.began_at or self.ended_at, self.ended_at],
            "is_reported": self.report_file.exists() and '"type": "report"' in self.report_file.read_text(),
        }

    def tried_to_end(self, job: Any) -> None:
        with suppress(JobError):
            self.end(job)


def main(results: str, name: str, host: str, *ways: str) -> None:
    deed = DEEDS[name]
    for signum in (signal.SIGINT, signal.SIGTERM):
        signal.signal(signum, signal.default_int_handler if signum == signal.SIGINT else signal.SIG_DFL)
    if deed.before is not None:
        deed.before()
    last = {}
    for way in ways:
        last = Run(deed, host, way, Path(results).parent).go()
        with open(results, "a", encoding="utf-8") as file:
            file.write(json.dumps(last) + "\n")
    if last["raised"] == "KeyboardInterrupt":
        raise KeyboardInterrupt
    if last["raised"] == "SystemExit":
        sys.exit(143)


def be_command(name: str) -> None:
    over = threading.Event()
    DEEDS[name].do()
    signal.signal(signal.SIGTERM, lambda *_: over.set())
    with suppress(OSError):
        print("up", flush=True)
    while not over.wait(0.01):
        pass
    os._exit(0)


if __name__ == "__main__":
    if sys.argv[1] == "command":
        be_command(sys.argv[2])
    else:
        main(*sys.argv[1:])
