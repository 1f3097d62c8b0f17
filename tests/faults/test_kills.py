"""Real drivers are killed and interrupted at random moments: services end in order, and nothing is left."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import textwrap
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from fair_clock import FairClock

SOURCES = Path(__file__).parents[2] / "src"
TOKEN = "SAGE_TEST_TOKEN"
"""Carried in the environment by everything that comes from a driver, its guardian included."""

DRIVERS_AT_ONCE = 4

GRACE_S = 10.0 + 2.0
"""For the services to stop in order, and between SIGTERM and SIGKILL for all else."""
AFTER_GRACE_S = 2.0
WAIT_S = 60.0
SIGNAL_BOUND_S = 10.0

CHAIN = """
    import os, signal, subprocess, sys, time
    from sage import BaseService, LocalEnvironment, ServiceOptions, StopSignal

    folder, has_children = sys.argv[1], sys.argv[2] == "children"

    def mark(text):
        with open(f"{folder}/marks", "a") as file:
            file.write(text + "\\n")

    class Link(BaseService):
        def __init__(self, *others):
            mark(f"{self.ctx.name} built")

        def setup(self):
            self.ctx.own_path(f"{folder}/{self.name}.spill")
            open(f"{folder}/{self.name}.spill", "w").close()
            if has_children and self.name == "a":
                subprocess.Popen(["sh", "-c", "trap '' TERM; exec sleep 1000"])
            if has_children and self.name == "b":
                subprocess.Popen(["sleep", "1000"], start_new_session=True)
            if has_children and self.name == "c":
                os.kill(subprocess.Popen(["sleep", "1000"]).pid, signal.SIGSTOP)
            mark(f"{self.name} up")

        def stop(self):
            mark(f"{self.name} stop")
            time.sleep(0.05)

        def cleanup(self):
            mark(f"{self.name} cleanup")
            time.sleep(0.05)
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

PHASES = {"start": ("begins", 1.0), "run": ("runs", 0.4), "stop": ("a stop", 0.6)}
"""The first sign of each phase, and how many seconds after it its moments may lie; by then the next may have begun."""


class Driver:
    """A program with three services in processes of their own, in a folder of its own."""

    def __init__(self, folder: Path, children: str) -> None:
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
        command = [sys.executable, str(folder / "program.py"), str(folder), children]
        with (folder / "errors").open("wb") as errors:
            self.process = subprocess.Popen(
                command, env=environment, stdout=errors, stderr=errors, stdin=subprocess.DEVNULL, start_new_session=True
            )

    def marks(self) -> list[str]:
        try:
            return (self.folder / "marks").read_text().splitlines()
        except FileNotFoundError:
            return []

    def send_at(self, phase: str, moment_s: float, signum: int) -> None:
        """Send a signal so long after the first sign of the phase, if the driver is still there."""
        due = time.monotonic() + WAIT_S
        while PHASES[phase][0] not in self.marks() and self.process.poll() is None:
            assert time.monotonic() < due, f"{phase} never began"
            time.sleep(0.003)
        time.sleep(moment_s)
        self.process.send_signal(signum)

    def left(self) -> list[str]:
        """Return what still runs of all that came from the driver."""
        wanted = f"{TOKEN}={self.token}".encode()
        found = []
        for folder in Path("/proc").iterdir():
            try:
                if folder.name.isdigit() and wanted in (folder / "environ").read_bytes().split(b"\0"):
                    found.append(f"{folder.name} {(folder / 'cmdline').read_bytes()[:80]!r}")
            except OSError:
                continue
        return found

    def wait_nothing_left(self, bound_s: float, clock: FairClock) -> list[str]:
        """Wait until nothing is left, and return what is, after `bound_s` seconds."""
        began_at = time.monotonic()
        while (left := self.left()) and clock.elapsed_s(began_at) < bound_s:
            time.sleep(0.02)
        return left

    def lines(self) -> list[dict[str, object]]:
        file = self.folder / "report"
        return [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []


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


def kill_one(folder: Path, phase: str, moment_s: float, clock: FairClock) -> list[str]:
    """Kill a driver at a moment, and return what is wrong afterwards."""
    driver = Driver(folder, "children")
    driver.send_at(phase, moment_s, signal.SIGKILL)
    driver.process.wait()
    left = driver.wait_nothing_left(GRACE_S + AFTER_GRACE_S, clock)
    marks = driver.marks()
    wrong = [f"still runs: {one}" for one in left] + wrong_order(marks)
    wrong += [f"left: {path.name}" for path in folder.glob("*.spill")]
    wrong += [f"left: {path}" for path in (folder / "temporary").glob("*/*")]
    lines = driver.lines()
    reports = [line for line in lines if line["type"] == "report"]
    states = [report["state"] for report in reports]
    # A job that was over before the kill has its own report; one that had not begun has none.
    is_over = driver.process.returncode != -signal.SIGKILL or "c cleaned" in marks
    if lines and states != ["lost"] and not (is_over and states in (["completed"], ["failed"])):
        wrong.append(f"reports: {states}")
    if lines and lines[-1]["type"] != "report":
        wrong.append(f"the report file ends with {lines[-1]}")
    if any(line == "c built" for line in marks) and not lines:
        wrong.append("there is no report")
    return [f"{phase} + {moment_s:.3f} s: {text}; marks {marks}" for text in wrong]


def interrupt_one(folder: Path, phase: str, moment_s: float, signum: int, clock: FairClock) -> list[str]:
    """Interrupt a driver at a moment, and return what is wrong afterwards."""
    driver = Driver(folder, "plain")
    driver.send_at(phase, moment_s, signum)
    began_at = time.monotonic()
    code = driver.process.wait(WAIT_S)
    took_s = clock.elapsed_s(began_at)
    marks = driver.marks()
    wrong = [f"still runs: {one}" for one in driver.wait_nothing_left(AFTER_GRACE_S, clock)] + wrong_order(marks)
    # Python ends a program by the signal itself, which a shell shows as 128 and its number.
    shown = 128 - code if code < 0 else code
    if shown != 128 + signum and not (shown == 0 and marks[-1:] == ["ended"]):
        wrong.append(f"exit code {code}: {(driver.folder / 'errors').read_text()[-500:]}")
    if took_s > SIGNAL_BOUND_S:
        wrong.append(f"took {took_s:.1f} s")
    states = [line["state"] for line in driver.lines() if line["type"] == "report"]
    if "c built" in marks and len(states) != 1:
        wrong.append(f"reports: {states}")
    wrong += [f"left: {path}" for path in (*folder.glob("*.spill"), *(folder / "temporary").glob("*/*"))]
    return [f"{phase} + {moment_s:.3f} s: {text}; marks {marks}" for text in wrong]


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("phase", PHASES)
def test_a_driver_killed_at_any_moment_leaves_nothing(
    phase: str, tmp_path: Path, clock: FairClock, request: pytest.FixtureRequest
) -> None:
    """Acceptance 47: SIGKILL, with children that have their own session, ignore SIGTERM, or are stopped."""
    moments = random.Random(f"kill {phase}")
    waits = [moments.uniform(0.0, PHASES[phase][1]) for _ in range(request.config.getoption("--moments"))]
    with ThreadPoolExecutor(DRIVERS_AT_ONCE) as threads:
        runs = enumerate(waits)
        found = list(threads.map(lambda run: kill_one(tmp_path / str(run[0]), phase, run[1], clock), runs))
    wrong = [text for texts in found for text in texts]
    assert not wrong, "\n".join(wrong)


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("name", ["SIGINT", "SIGTERM"])
@pytest.mark.parametrize("phase", PHASES)
def test_a_driver_interrupted_at_any_moment_cleans_up_once(
    phase: str, name: str, tmp_path: Path, clock: FairClock, request: pytest.FixtureRequest
) -> None:
    """Faults 22, 55 and 59: exit code 130 or 143, each cleanup once and in order, and nothing is left."""
    moments = random.Random(f"{name} {phase}")
    waits = [moments.uniform(0.0, PHASES[phase][1]) for _ in range(request.config.getoption("--moments"))]
    signum = getattr(signal, name)
    with ThreadPoolExecutor(DRIVERS_AT_ONCE) as threads:
        runs = enumerate(waits)
        found = list(threads.map(lambda run: interrupt_one(tmp_path / str(run[0]), phase, run[1], signum, clock), runs))
    wrong = [text for texts in found for text in texts]
    assert not wrong, "\n".join(wrong)
