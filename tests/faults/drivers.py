"""Programs with a chain of three services in processes of their own, for tests that kill and interrupt them."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
import textwrap
import time
from pathlib import Path
from typing import NamedTuple

from support.fair_clock import FairClock

SOURCES = Path(__file__).parents[2] / "src"
TOKEN = "SAGE_TEST_TOKEN"
"""Carried in the environment by everything that comes from a driver, its guardian included."""


WAIT_S = 60.0
SIGNAL_BOUND_S = 10.0

CHAIN = """
    import os, signal, subprocess, sys, time
    from sage import BaseService, LocalEnvironment, ServiceOptions, StopSignal

    folder, kind = sys.argv[1:]

    def mark(text):
        with open(f"{folder}/marks", "a") as file:
            file.write(text + "\\n")

    class Link(BaseService):
        def __init__(self, *others):
            mark(f"{self.ctx.name} built")

        def setup(self):
            self.ctx.own_path(f"{folder}/{self.name}.spill")
            open(f"{folder}/{self.name}.spill", "w").close()
            if kind == "children" and self.name == "a":
                subprocess.Popen(["sh", "-c", "trap '' TERM; exec sleep 1000"])
            if kind == "children" and self.name == "b":
                subprocess.Popen(["sleep", "1000"], start_new_session=True)
            if kind == "children" and self.name == "c":
                os.kill(subprocess.Popen(["sleep", "1000"]).pid, signal.SIGSTOP)
            mark(f"{self.name} up")

        def stop(self):
            mark(f"{self.name} stop")
            time.sleep(1000 if kind == "hangs" and self.name == "c" else 0.05)

        def cleanup(self):
            mark(f"{self.name} cleanup")
            time.sleep(0.05)
            if os.path.exists(f"{folder}/{self.name}.spill"):  # it may be cleaned up without having been set up
                os.unlink(f"{folder}/{self.name}.spill")
            mark(f"{self.name} cleaned")

        def process(self, record):
            return record

    began_at = []

    def numbers():
        if not began_at:
            mark("runs")
            began_at.append(time.monotonic())
        return 1 if time.monotonic() < began_at[0] + 0.3 else StopSignal()

    if __name__ == "__main__":
        env = LocalEnvironment("chain", report_file=f"{folder}/report")
        options = ServiceOptions(host="process", kill_grace_s=1.0)
        c = env.register_service("c", Link, options=options)
        b = env.register_service("b", Link, c, options=options)
        a = env.register_service("a", Link, b, options=options)
        env.from_source(numbers, delay=0.01).map(a.process).sink(lambda _: None)
        mark("begins")
        env.submit(autostop=True)
        mark("ended")
"""

PHASES = {
    "start": ("begins", "c built", "c up", "b built", "b up", "a built", "a up"),
    "run": ("runs",),
    "stop": ("a stop", "a cleanup", "b stop", "b cleaned", "c stop", "c cleanup", "c cleaned", "ended"),
}
"""The signs of each phase; a moment of it is a little after one of them."""

AFTER_S = {"start": 0.15, "run": 0.4, "stop": 0.1}


class Moment(NamedTuple):
    """When something is done to a driver: so many seconds after a sign."""

    sign: str
    after_s: float


def moments(seed: str, phase: str, count: int) -> list[Moment]:
    """Return random moments of a phase, the same ones for the same seed."""
    chance = random.Random(f"{seed} {phase}")
    return [Moment(chance.choice(PHASES[phase]), chance.uniform(0.0, AFTER_S[phase])) for _ in range(count)]


class Driver:
    """A program with three services in processes of their own, in a folder of its own.

    Args:
        folder: does not exist yet.
        kind: "plain", "hangs" if the last service never ends its `stop`, or "children" if each has one that is hard to
            end.
        terminal: what it writes to and is controlled by; a file without.
    """

    def __init__(self, folder: Path, kind: str, terminal: int | None = None) -> None:
        self.folder = folder
        (folder / "temporary").mkdir(parents=True)
        (folder / "program.py").write_text(textwrap.dedent(CHAIN))
        self.token = f"{folder.name}-{os.getpid()}-{time.monotonic_ns()}"
        environment = {
            **os.environ,
            "PYTHONPATH": str(SOURCES),
            "TMPDIR": str(folder / "temporary"),
            "SAGE_STATE_DIR": str(folder / "state"),
            TOKEN: self.token,
        }
        command = [sys.executable, str(folder / "program.py"), str(folder), kind]
        with (folder / "errors").open("wb") as errors:
            self.process = subprocess.Popen(
                command if terminal is None else ["setsid", "--ctty", "--wait", *command],
                env=environment,
                stdout=errors if terminal is None else terminal,
                stderr=errors if terminal is None else terminal,
                stdin=subprocess.DEVNULL if terminal is None else terminal,
                start_new_session=terminal is None,
            )

    def marks(self) -> list[str]:
        try:
            return (self.folder / "marks").read_text().splitlines()
        except FileNotFoundError:
            return []

    def wait_marked(self, mark: str) -> None:
        """Wait for a mark, or for the end of the driver."""
        due = time.monotonic() + WAIT_S
        while mark not in self.marks() and self.process.poll() is None:
            assert time.monotonic() < due, f"{mark} never came"
            time.sleep(0.003)

    def send_at(self, moment: Moment, signum: int) -> None:
        """Send a signal at a moment, if the driver is still there."""
        self.wait_marked(moment.sign)
        time.sleep(moment.after_s)
        self.process.send_signal(signum)

    def left_pids(self) -> list[int]:
        """Return what still runs of all that came from the driver, itself included."""
        return pids_of(self.token)

    def left(self) -> list[str]:
        """Return what still runs, with its command."""
        return left_of(self.token)

    def wait_nothing_left(self, bound_s: float, clock: FairClock) -> list[str]:
        """Wait until nothing is left, and return what is, after `bound_s` seconds."""
        began_at = time.monotonic()
        while (left := self.left()) and clock.elapsed_s(began_at) < bound_s:
            time.sleep(0.02)
        return left

    def lines(self) -> list[dict[str, object]]:
        file = self.folder / "report"
        return [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []


def pids_of(token: str) -> list[int]:
    """Return the processes that have this token in their environment."""
    wanted = f"{TOKEN}={token}".encode()
    found = []
    for folder in Path("/proc").iterdir():
        try:
            if folder.name.isdigit() and wanted in (folder / "environ").read_bytes().split(b"\0"):
                found.append(int(folder.name))
        except OSError:
            continue
    return found


def left_of(token: str) -> list[str]:
    """Return the processes that have this token in their environment, with their commands."""
    found = []
    for pid in pids_of(token):
        try:
            found.append(f"{pid} {Path(f'/proc/{pid}/cmdline').read_bytes()[:80]!r}")
        except OSError:
            continue
    return found


def wrong_order(marks: list[str]) -> list[str]:
    """Return what is wrong with the ends of the services; the marks tell of it in the order in which it happened."""
    ends = [line for line in marks if line.split()[-1] in ("stop", "cleanup", "cleaned")]
    must = [f"{name} {hook}" for name in "abc" for hook in ("stop", "cleanup", "cleaned")]
    wrong = []
    if ends != [line for line in must if line in ends]:
        wrong.append("not in order, or twice")
    for name in "abc":
        if f"{name} up" in marks and f"{name} cleaned" not in ends:
            wrong.append(f"{name} was not cleaned up")
    return wrong
