"""Real drivers are killed and interrupted at random moments: services end in order, and nothing is left."""

from __future__ import annotations

import signal
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from faults.drivers import PHASES, SIGNAL_BOUND_S, WAIT_S, Driver, Moment, moments, wrong_order
from support.fair_clock import FairClock

DRIVERS_AT_ONCE = 4

GRACE_S = 10.0 + 2.0
"""For the services to stop in order, and between SIGTERM and SIGKILL for all else."""
AFTER_GRACE_S = 2.0


def kill_one(folder: Path, moment: Moment, clock: FairClock) -> list[str]:
    """Kill a driver at a moment, and return what is wrong afterwards."""
    driver = Driver(folder, "children")
    driver.send_at(moment, signal.SIGKILL)
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
    return [f"{moment}: {text}; marks {marks}" for text in wrong]


def interrupt_one(folder: Path, moment: Moment, signum: int, clock: FairClock) -> list[str]:
    """Interrupt a driver at a moment, and return what is wrong afterwards."""
    driver = Driver(folder, "plain")
    driver.send_at(moment, signum)
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
    dirty = [line["errors"] for line in driver.lines() if line["type"] == "report" and line["cleanliness"] != "clean"]
    wrong += [f"dirty: {errors}" for errors in dirty]
    if "c built" in marks and len(states) != 1:
        wrong.append(f"reports: {states}")
    wrong += [f"left: {path}" for path in (*folder.glob("*.spill"), *(folder / "temporary").glob("*/*"))]
    return [f"{moment}: {text}; marks {marks}" for text in wrong]


@pytest.mark.proof
@pytest.mark.timeout(600)
@pytest.mark.parametrize("phase", PHASES)
def test_a_driver_killed_at_any_moment_leaves_nothing(
    phase: str, tmp_path: Path, clock: FairClock, request: pytest.FixtureRequest
) -> None:
    """SIGKILL, with children that have their own session, ignore SIGTERM, or are stopped."""
    runs = list(enumerate(moments("kill", phase, request.config.getoption("--moments"))))
    with ThreadPoolExecutor(DRIVERS_AT_ONCE) as threads:
        found = list(threads.map(lambda run: kill_one(tmp_path / str(run[0]), run[1], clock), runs))
    wrong = [text for texts in found for text in texts]
    assert not wrong, "\n".join(wrong)


@pytest.mark.proof
@pytest.mark.timeout(600)
@pytest.mark.parametrize("name", ["SIGINT", "SIGTERM"])
@pytest.mark.parametrize("phase", PHASES)
def test_a_driver_interrupted_at_any_moment_cleans_up_once(
    phase: str, name: str, tmp_path: Path, clock: FairClock, request: pytest.FixtureRequest
) -> None:
    """Exit code 130 or 143, each cleanup once and in order, and nothing is left."""
    runs = list(enumerate(moments(name, phase, request.config.getoption("--moments"))))
    signum = getattr(signal, name)
    with ThreadPoolExecutor(DRIVERS_AT_ONCE) as threads:
        found = list(threads.map(lambda run: interrupt_one(tmp_path / str(run[0]), run[1], signum, clock), runs))
    wrong = [text for texts in found for text in texts]
    assert not wrong, "\n".join(wrong)
