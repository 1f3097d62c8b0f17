"""Signals and requests to end a job, while its services have processes of their own."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
import textwrap
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path

import pytest
from faults.drivers import SIGNAL_BOUND_S, SOURCES, WAIT_S, Driver, wrong_order
from support.fair_clock import FairClock

from sage import BaseService, JobReport, LocalEnvironment, ServiceOptions

ONCE = [f"{name} {hook}" for name in "abc" for hook in ("stop", "cleanup", "cleaned")]


def end_of(driver: Driver, clock: FairClock) -> tuple[int, list[str]]:
    """Wait for the end of a driver, and return its code as a shell shows it, and how its services ended."""
    began_at = time.monotonic()
    code = driver.process.wait(WAIT_S)
    assert clock.elapsed_s(began_at) < SIGNAL_BOUND_S
    assert driver.wait_nothing_left(2.0, clock) == []
    ends = [line for line in driver.marks() if line.split()[-1] in ("stop", "cleanup", "cleaned")]
    return 128 - code if code < 0 else code, ends


@pytest.mark.parametrize("name", ["SIGINT", "SIGTERM", "SIGHUP", "SIGQUIT"])
def test_a_signal_to_every_process_does_not_break_the_order(name: str, tmp_path: Path, clock: FairClock) -> None:
    """The services get it as well, as from a terminal or the manager of a container."""
    driver = Driver(tmp_path / "run", "plain")
    driver.wait_marked("runs")
    signum = getattr(signal, name)
    for pid in driver.left_pids():
        with suppress(ProcessLookupError):
            os.kill(pid, signum)
    assert end_of(driver, clock) == (128 + signum, ONCE)


def test_sigquit_tells_where_everything_stands_and_ends_in_order(tmp_path: Path, clock: FairClock) -> None:
    """Like SIGTERM, with the stacks of all threads before."""
    driver = Driver(tmp_path / "run", "plain")
    driver.wait_marked("runs")
    driver.process.send_signal(signal.SIGQUIT)
    assert end_of(driver, clock) == (128 + signal.SIGQUIT, ONCE)
    errors = (tmp_path / "run" / "errors").read_text()
    assert "Thread 0x" in errors
    assert "in numbers" in errors or "in submit" in errors


FOREIGN = """
    import faulthandler, os, signal, sys
    from sage import LocalEnvironment

    faulthandler.register(signal.SIGQUIT, all_threads=False)  # it does not stop the others while it reads their frames
    env = LocalEnvironment("foreign")
    env.from_batch([1]).sink(lambda _: os.kill(os.getpid(), signal.SIGQUIT))
    print(env.submit(autostop=True).report.state)
    os.kill(os.getpid(), signal.SIGQUIT)
    print("lives")
"""


def test_a_handler_that_python_does_not_know_of_is_left_alone(tmp_path: Path) -> None:
    """Faulthandler, and libraries in C, set theirs behind Python's back, and it could not be put back."""
    (tmp_path / "program.py").write_text(textwrap.dedent(FOREIGN))
    environment = {**os.environ, "PYTHONPATH": str(SOURCES)}
    words = [sys.executable, str(tmp_path / "program.py")]
    done = subprocess.run(words, env=environment, capture_output=True, text=True, timeout=WAIT_S)
    assert (done.returncode, done.stdout) == (0, "completed\nlives\n"), done.stderr
    assert done.stderr.count("(most recent call first)") == 2


@pytest.mark.parametrize("to", ["driver", "every process"])
def test_sigpipe_changes_nothing(to: str, tmp_path: Path, clock: FairClock) -> None:
    """Whoever writes to what nobody reads gets an error, and the job ends as it would have."""
    driver = Driver(tmp_path / "run", "plain")
    driver.wait_marked("runs")
    for pid in driver.left_pids() if to == "every process" else [driver.process.pid]:
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGPIPE)
    assert end_of(driver, clock) == (0, ONCE)


def test_a_signal_during_a_cleanup_does_not_cut_it_off(tmp_path: Path, clock: FairClock) -> None:
    driver = Driver(tmp_path / "run", "plain")
    driver.wait_marked("a cleanup")
    for pid in driver.left_pids():
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGINT)
    assert end_of(driver, clock) == (128 + signal.SIGINT, ONCE)


def test_a_third_signal_ends_processes_without_their_hooks(tmp_path: Path, clock: FairClock) -> None:
    """Nothing is left, and the report is written all the same."""
    driver = Driver(tmp_path / "run", "hangs")
    driver.wait_marked("c stop")
    for _ in range(6):  # two that follow at once may arrive as one, and one that comes after the third changes nothing
        driver.process.send_signal(signal.SIGINT)
        with suppress(subprocess.TimeoutExpired):
            driver.process.wait(0.5)
    code, ends = end_of(driver, clock)
    assert code == 128 + signal.SIGINT
    assert ends == [line for line in ONCE if not line.startswith("c ")] + ["c stop"]
    assert [line["type"] for line in driver.lines()].count("report") == 1
    assert driver.lines()[-1]["cleanliness"] == "dirty"


@pytest.mark.skipif(sys.platform == "win32", reason="there are no terminals of this kind")
def test_the_terminal_is_closed(tmp_path: Path, clock: FairClock) -> None:
    """The hang-up counts as SIGTERM, and output that goes nowhere harms nothing."""
    master, terminal = os.openpty()
    driver = Driver(tmp_path / "run", "plain", terminal=terminal)
    os.close(terminal)
    driver.wait_marked("runs")
    os.close(master)
    assert end_of(driver, clock) == (128 + signal.SIGHUP, ONCE)
    assert wrong_order(driver.marks()) == []


class Counted(BaseService):
    """Writes a line for each cleanup."""

    def __init__(self, marks: Path) -> None:
        self.marks = marks

    def cleanup(self) -> None:
        with self.marks.open("a", encoding="utf-8") as file:
            file.write("cleaned\n")


@pytest.mark.parametrize("host", ["inline", "process"])
def test_fifty_threads_cancel_at_once(host: str, tmp_path: Path) -> None:
    """There is one end, and all get the same report."""
    env = LocalEnvironment("fifty")
    options = ServiceOptions(host="process" if host == "process" else "inline")
    env.register_service("counted", Counted, tmp_path / "marks", options=options)
    runs = threading.Event()
    env.from_source(lambda: 1, delay=0.001).sink(lambda _: runs.set())
    job = env.submit()
    assert runs.wait(WAIT_S)

    def cancel() -> JobReport:
        job.cancel()
        return job.wait()

    with ThreadPoolExecutor(50) as threads:
        reports = [future.result() for future in [threads.submit(cancel) for _ in range(50)]]
    assert {id(report) for report in reports} == {id(job.report)}
    assert (reports[0].state, reports[0].cleanliness) == ("cancelled", "clean")
    assert (tmp_path / "marks").read_text() == "cleaned\n"


def test_a_job_inside_a_running_loop(tmp_path: Path) -> None:
    """As in a notebook, there is a loop of asyncio already."""
    arrived: list[int] = []

    async def cell() -> None:
        env = LocalEnvironment("notebook")
        env.register_service("counted", Counted, tmp_path / "marks", options=ServiceOptions(host="process"))
        env.from_batch([1, 2]).sink(arrived.append)
        env.submit(autostop=True)

    asyncio.run(cell())
    assert arrived == [1, 2]
    assert (tmp_path / "marks").read_text() == "cleaned\n"


def test_the_programs_own_wakeup_descriptor_hears_of_signals_and_is_put_back() -> None:
    """A loop of asyncio in the main thread has one, for instance."""
    read_end, write_end = os.pipe()
    os.set_blocking(read_end, False)
    os.set_blocking(write_end, False)
    handler = signal.signal(signal.SIGTERM, lambda *_: None)
    before = signal.set_wakeup_fd(write_end)
    try:
        env = LocalEnvironment("descriptor")
        env.from_batch([1]).sink(lambda _: os.kill(os.getpid(), signal.SIGTERM))
        env.submit(autostop=True)
        assert signal.set_wakeup_fd(write_end) == write_end
        assert signal.SIGTERM in os.read(read_end, 64)
    finally:
        signal.set_wakeup_fd(before)
        signal.signal(signal.SIGTERM, handler)
        os.close(read_end)
        os.close(write_end)
