"""How a process that uses SAGE behaves: signals, exit, logs, arguments, and what a library must leave alone."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import textwrap
import threading
import time
from collections import Counter
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import pytest

import sage
from sage import (
    BaseCoMapFunction,
    BaseJoinFunction,
    BatchFunction,
    CleanupTimeoutError,
    FilterFunction,
    FlatMapFunction,
    GraphError,
    JobError,
    JobErrorGroup,
    KeyByFunction,
    LocalEnvironment,
    MapFunction,
    ProcessFunction,
    RemoteEnvironment,
    ServiceOptions,
    ServiceUnavailableError,
    SinkFunction,
    SourceFunction,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from support.fair_clock import FairClock

EXIT_WITHIN_S = 10

# Every program tells its moments on standard output, for the test to wait for, and marks its hooks in a file.
PRELUDE = """
import os, signal, sys, threading, time
from sage import *

# As a shell in the foreground starts a program; under nohup, or behind an ampersand, some are ignored.
signal.signal(signal.SIGINT, signal.default_int_handler)
signal.signal(signal.SIGTERM, signal.SIG_DFL)
signal.signal(signal.SIGHUP, signal.SIG_DFL)

def tell(line):
    print(line, flush=True)

def mark(line):
    with open("marks", "a") as marks:
        marks.write(line + "\\n")

def handlers():
    return [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)]

class Count(SourceFunction):
    '''Gives `limit` records at once and then none for ever; tells when they are given and signals are minded.'''
    def __init__(self, limit):
        self.limit, self.given, self.told = limit, 0, False
    def execute(self):
        if self.given < self.limit:
            self.given += 1
            return self.given
        if not self.told and not any(now is before for now, before in zip(handlers(), handlers_before)):
            self.told = True
            tell("given")
        return None
    def close(self):
        mark("source closed")
        tell("draining")

class Write(SinkFunction):
    def __init__(self):
        self.written = 0
    def execute(self, data):
        self.written += 1
    def close(self):
        mark(f"sink closed after {self.written}")

class Store:
    def process(self, record):
        return record
    def cleanup(self):
        mark("cleaned")

class Work(MapFunction):
    def __init__(self, work_s):
        self.work_s = work_s
    def execute(self, data):
        time.sleep(self.work_s)
        return self.call_service("store", data)

def build(limit, work_s, **settings):
    global handlers_before
    handlers_before = handlers()
    env = LocalEnvironment("program", **settings)
    env.register_service("store", Store)
    # Two tasks for the work, so that the source is a task of its own and all its records are in flight at once.
    env.from_source(Count, limit).map(Work, work_s, parallelism=2, capacity=limit).sink(Write)
    return env
"""


class Finished(NamedTuple):
    """How a program ended; `output` is what it told since the test last waited for a line."""

    code: int
    output: str
    errors: str
    marks: list[str]


class Program:
    """A program that runs in a process of its own."""

    def __init__(self, folder: Path, body: str, prelude: str = PRELUDE, **variables: str) -> None:
        self.folder = folder
        script = folder / "program.py"
        script.write_text(prelude + textwrap.dedent(body), encoding="utf-8")
        path = os.pathsep.join([str(Path(sage.__file__).parents[1]), os.environ.get("PYTHONPATH", "")])
        self.process = subprocess.Popen(
            [sys.executable, str(script)],
            cwd=folder,
            env={**os.environ, "PYTHONPATH": path, **variables},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        # Reading a line has no time-out of its own; a program that hangs ends here, and so does the read.
        self.watchdog = threading.Timer(2 * EXIT_WITHIN_S, self.process.kill)
        self.watchdog.start()

    def wait_line(self, expected: str) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            if line.rstrip("\n") == expected:
                return
        _, errors = self.process.communicate(timeout=EXIT_WITHIN_S)
        pytest.fail(f"the program ended before it told {expected!r}:\n{errors}")

    def send(self, signum: signal.Signals) -> None:
        self.process.send_signal(signum)

    def finish(self) -> Finished:
        output, errors = self.process.communicate(timeout=EXIT_WITHIN_S)
        marks = self.folder / "marks"
        return Finished(
            self.process.returncode,
            output,
            errors,
            marks.read_text(encoding="utf-8").splitlines() if marks.exists() else [],
        )


@contextmanager
def program(folder: Path, body: str, prelude: str = PRELUDE, **variables: str) -> Iterator[Program]:
    """Run a program, and end it if the test does not get that far."""
    started = Program(folder, body, prelude, **variables)
    try:
        yield started
    finally:
        started.watchdog.cancel()
        started.process.kill()
        started.process.communicate()


def shell_code(code: int) -> int:
    """Return the exit code that a shell reports; a death by a signal counts from 128 on."""
    return 128 - code if code < 0 else code


# --- signals ---

TO_SUBMIT = "env = build(20, 0.001)\n{}\n"
WAYS_TO_WAIT = ["env.submit(autostop=True)", "env.submit().wait()"]


@pytest.mark.parametrize("way", WAYS_TO_WAIT)
@pytest.mark.parametrize(("signum", "code"), [("SIGINT", 130), ("SIGTERM", 143), ("SIGHUP", 129)])
def test_a_signal_drains_and_cleans(tmp_path: Path, way: str, signum: str, code: int) -> None:
    """Sources stop, all 20 records in flight arrive, sinks close, services are cleaned once."""
    with program(tmp_path, TO_SUBMIT.format(way)) as running:
        running.wait_line("given")
        running.send(signal.Signals[signum])
        ended = running.finish()
    assert shell_code(ended.code) == code
    if signum != "SIGINT":
        assert ended.code == code, "it has to leave by SystemExit, as a death by the signal runs no cleanup"
    # Each task closes its functions when it has done its part: which of the two is first is not said.
    assert sorted(ended.marks[:2]) == ["sink closed after 20", "source closed"]
    assert ended.marks[2:] == ["cleaned"]
    assert ended.errors.rstrip().endswith("KeyboardInterrupt") == (signum == "SIGINT")
    assert "Error" not in ended.errors


@pytest.mark.parametrize(("signum", "code"), [("SIGINT", 130), ("SIGTERM", 143), ("SIGHUP", 129)])
def test_a_signal_during_the_start_cleans(tmp_path: Path, signum: str, code: int) -> None:
    """What was built is cleaned, what was not is left, and no record flows."""
    body = """
    class Early:
        def __init__(self):
            tell("building")
            time.sleep(0.3)
        def cleanup(self):
            mark("early cleaned")

    env = LocalEnvironment("program")
    env.register_service("early", Early)
    env.register_service("store", Store, options=ServiceOptions(depends_on=["early"]))
    env.from_batch([1]).sink(lambda record: mark("record"))
    env.submit(autostop=True)
    """
    with program(tmp_path, body) as running:
        running.wait_line("building")
        running.send(signal.Signals[signum])
        ended = running.finish()
    assert shell_code(ended.code) == code
    assert ended.code == code or signum == "SIGINT"
    assert ended.marks == ["early cleaned"]


def test_a_drain_after_ctrl_c_is_bounded(tmp_path: Path, clock: FairClock) -> None:
    """What is in flight drains within the bound; the rest is dropped, counted, and all is cleaned."""
    body = """
    env = build(1000, 0.05, drain_timeout_s=0.3)
    try:
        env.submit(autostop=True)
    finally:
        tell(f"undelivered {env.jobmanager.jobs[env.env_uuid].report.undelivered > 0}")
    """
    with program(tmp_path, body) as running:
        running.wait_line("given")
        clock.watch(running.process.pid)
        began_at = time.monotonic()
        running.send(signal.SIGINT)
        ended = running.finish()
    assert clock.elapsed_s(began_at) < 3
    assert shell_code(ended.code) == 130
    assert ended.output.splitlines()[-1] == "undelivered True"
    assert ended.marks[0] == "source closed"
    assert re.fullmatch(r"sink closed after \d{1,2}", ended.marks[1])
    assert ended.marks[2:] == ["cleaned"]


def test_a_second_ctrl_c_cancels_and_still_cleans(tmp_path: Path, clock: FairClock) -> None:
    """A drain of 50 s is cut off at once, and sinks and services end in good order all the same."""
    with program(tmp_path, "build(1000, 0.05).submit(autostop=True)") as running:
        running.wait_line("given")
        running.send(signal.SIGINT)
        running.wait_line("draining")
        clock.watch(running.process.pid)
        began_at = time.monotonic()
        running.send(signal.SIGINT)
        ended = running.finish()
    assert clock.elapsed_s(began_at) < 2
    assert shell_code(ended.code) == 130
    assert ended.marks[0] == "source closed"
    assert re.fullmatch(r"sink closed after \d{1,2}", ended.marks[1])
    assert ended.marks[2:] == ["cleaned"]


@pytest.mark.parametrize("signum", ["SIGTERM", "SIGHUP"])
def test_a_ctrl_c_is_stronger_than_the_signal_before_it(tmp_path: Path, signum: str, clock: FairClock) -> None:
    """A person at the terminal is less patient than what ended the job first; then, each Ctrl-C counts on."""
    with program(tmp_path, "build(1000, 0.05).submit(autostop=True)") as running:
        running.wait_line("given")
        running.send(getattr(signal, signum))
        running.wait_line("draining")
        clock.watch(running.process.pid)
        began_at = time.monotonic()
        running.send(signal.SIGINT)
        ended = running.finish()
    assert clock.elapsed_s(began_at) < 2
    assert shell_code(ended.code) == 128 + getattr(signal, signum)
    assert ended.marks[0] == "source closed"
    assert ended.marks[2:] == ["cleaned"]


def test_a_second_ctrl_c_after_sigterm_gives_up(tmp_path: Path, clock: FairClock) -> None:
    body = """
    class Hanging:
        def cleanup(self):
            tell("hanging")
            time.sleep(60)

    env = build(1000, 0.05)
    env.register_service("hanging", Hanging)
    env.submit(autostop=True)
    """
    with program(tmp_path, body) as running:
        running.wait_line("given")
        running.send(signal.SIGTERM)
        running.wait_line("draining")
        running.send(signal.SIGTERM)
        running.send(signal.SIGINT)
        running.wait_line("hanging")
        clock.watch(running.process.pid)
        began_at = time.monotonic()
        running.send(signal.SIGINT)
        ended = running.finish()
    assert clock.elapsed_s(began_at) < 2
    assert shell_code(ended.code) == 143


def test_a_third_ctrl_c_gives_up_and_still_reports(tmp_path: Path, clock: FairClock) -> None:
    """Hooks that hang or have not run are given up at once, and the report that says so is written."""
    body = """
    class Hanging:
        def cleanup(self):
            mark("hanging")
            tell("hanging")
            time.sleep(60)

    env = build(1000, 0.05)
    env.register_service("hanging", Hanging)
    try:
        env.submit(autostop=True)
    finally:
        report = env.jobmanager.jobs[env.env_uuid].report
        for service in report.services:
            tell(f"{service.name} {service.state}")
        tell(f"{report.state} {report.cleanliness}")
    """
    with program(tmp_path, body) as running:
        running.wait_line("given")
        running.send(signal.SIGINT)
        running.wait_line("draining")
        running.send(signal.SIGINT)
        running.wait_line("hanging")
        clock.watch(running.process.pid)
        began_at = time.monotonic()
        running.send(signal.SIGINT)
        ended = running.finish()
    assert clock.elapsed_s(began_at) < 2
    assert shell_code(ended.code) == 130
    assert ended.output.splitlines() == ["store abandoned", "hanging abandoned", "cancelled dirty"]
    assert len(ended.marks) == 3
    assert ended.marks[-1] == "hanging"


def test_a_second_ctrl_c_bounds_a_cleanup_that_hangs(tmp_path: Path, clock: FairClock) -> None:
    """After a second one each hook has 5 s and no more."""
    body = """
    class Hanging:
        def cleanup(self):
            tell("hanging")
            time.sleep(60)

    env = build(1, 0)
    env.register_service("hanging", Hanging, options=ServiceOptions(stop_timeout_s=30))
    env.submit(autostop=True)
    """
    with program(tmp_path, body) as running:
        running.wait_line("given")
        running.send(signal.SIGINT)
        running.wait_line("hanging")
        clock.watch(running.process.pid)
        began_at = time.monotonic()
        running.send(signal.SIGINT)
        ended = running.finish()
    assert clock.elapsed_s(began_at) < 6.5
    assert shell_code(ended.code) == 130
    assert sorted(ended.marks[:2]) == ["sink closed after 1", "source closed"]
    assert ended.marks[2:] == ["cleaned"]


@pytest.mark.parametrize(("signum", "code"), [("SIGTERM", 143), ("SIGHUP", 129)])
def test_a_repeated_sigterm_is_ignored(tmp_path: Path, signum: str, code: int) -> None:
    """Orchestrators that repeat SIGTERM, and terminals that hang up, do not cut the drain off."""
    with program(tmp_path, "build(200, 0.001).submit(autostop=True)") as running:
        running.wait_line("given")
        running.send(signal.Signals[signum])
        running.wait_line("draining")
        running.send(signal.Signals[signum])
        running.send(signal.Signals[signum])
        ended = running.finish()
    assert ended.code == code
    assert ended.marks == ["source closed", "sink closed after 200", "cleaned"]


@pytest.mark.parametrize("signum", ["SIGINT", "SIGTERM"])
def test_the_programs_own_handler_is_called_and_put_back(tmp_path: Path, signum: str) -> None:
    """The job drains and submit returns; what the signal means further is the program's affair."""
    body = f"""
    def own(signum, frame):
        mark("own handler")

    signal.signal(signal.{signum}, own)
    build(20, 0.001).submit(autostop=True)
    assert signal.getsignal(signal.{signum}) is own
    tell("went on")
    """
    with program(tmp_path, body) as running:
        running.wait_line("given")
        running.send(signal.Signals[signum])
        ended = running.finish()
    assert (ended.code, ended.errors) == (0, "")
    assert ended.output.splitlines()[-1] == "went on"
    assert sorted(ended.marks) == ["cleaned", "own handler", "sink closed after 20", "source closed"]
    assert ended.marks[-1] == "cleaned"


def test_a_handler_that_raises_still_gets_everything_cleaned(tmp_path: Path) -> None:
    """What the program's own handler raises leaves submit, after the last cleanup."""
    body = """
    class Leave(Exception):
        pass

    def own(signum, frame):
        raise Leave("now")

    signal.signal(signal.SIGTERM, own)
    try:
        build(20, 0.001).submit(autostop=True)
    except Leave as leave:
        mark(f"left {leave}")
    """
    with program(tmp_path, body) as running:
        running.wait_line("given")
        running.send(signal.SIGTERM)
        ended = running.finish()
    assert (ended.code, ended.errors) == (0, "")
    assert ended.marks == ["source closed", "sink closed after 20", "cleaned", "left now"]


def test_ctrl_c_comes_through_while_a_cleanup_runs(tmp_path: Path) -> None:
    """A cleanup is never interrupted itself; one that takes 1 s ends, and once."""
    body = """
    class Slow:
        def cleanup(self):
            tell("cleaning")
            time.sleep(1)
            mark("slow cleaned")

    env = LocalEnvironment("program")
    env.register_service("slow", Slow)
    env.from_batch([1]).sink(lambda record: None)
    env.submit(autostop=True)
    """
    with program(tmp_path, body) as running:
        running.wait_line("cleaning")
        running.send(signal.SIGINT)
        ended = running.finish()
    assert shell_code(ended.code) == 130
    assert ended.marks == ["slow cleaned"]


# --- a library's manners ---

SMALL_JOB = """
env = LocalEnvironment("small")
store = env.register_service("store", Store)
seen = []
env.from_batch(range(100), parallelism=2).map(store.process, parallelism=2).sink(seen.append)
"""


def test_a_job_prints_nothing(tmp_path: Path) -> None:
    """Neither standard output nor standard error gets a byte, and no file is left."""
    with program(tmp_path, SMALL_JOB + "env.submit(autostop=True)\nassert len(seen) == 100") as running:
        ended = running.finish()
    assert (ended.code, ended.output, ended.errors) == (0, "", "")
    assert ended.marks == ["cleaned"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["marks", "program.py"]


@pytest.mark.skipif(not Path("/proc/net/tcp").exists(), reason="reads the open sockets from /proc")
def test_a_job_opens_no_port(tmp_path: Path) -> None:
    """While the job runs, no descriptor of the process is an internet socket."""
    body = """
    import socket
    from pathlib import Path

    def ports(record):
        inodes = set()
        for table in ("tcp", "tcp6", "udp", "udp6"):
            path = Path("/proc/net", table)
            if path.exists():
                inodes |= {line.split()[9] for line in path.read_text().splitlines()[1:]}
        links = {os.readlink(file) for file in Path("/proc/self/fd").iterdir() if file.exists()}
        return links & {f"socket:[{inode}]" for inode in inodes}

    with socket.create_server(("127.0.0.1", 0)):
        assert ports(None), "a port that is open has to be seen"

    async def later(record):
        return record

    env = LocalEnvironment("ports")
    env.serve("served", lambda requests: requests.map(lambda request: request))
    seen = []
    env.from_batch([1]).map(later).map(ports).sink(seen.append)
    env.submit(autostop=True)
    assert seen == [set()], seen
    """
    with program(tmp_path, body) as running:
        ended = running.finish()
    assert (ended.code, ended.errors) == (0, "")


def test_an_import_starts_nothing(tmp_path: Path) -> None:
    """No thread, no handler, no descriptor, no output, and no time of note."""
    prelude = """
import os, signal, sys, threading, time
before = [signal.getsignal(number) for number in signal.valid_signals()]
files = len(os.listdir("/dev/fd"))
began_at = time.process_time()
import sage
elapsed_s = time.process_time() - began_at
assert threading.active_count() == 1
assert [signal.getsignal(number) for number in signal.valid_signals()] == before
assert len(os.listdir("/dev/fd")) == files
assert not {"rich", "click", "asyncio", "multiprocessing", "socket"} & set(sys.modules), sorted(sys.modules)
print(elapsed_s)
"""
    elapsed_s: list[float] = []
    for _ in range(3):
        with program(tmp_path, "", prelude) as running:
            ended = running.finish()
        assert (ended.code, ended.errors) == (0, "")
        elapsed_s.append(float(ended.output))
    # The best of three in processor time: the first import may have to compile, and the machine may be busy.
    assert min(elapsed_s) < 0.2


def test_handlers_are_as_they_were() -> None:
    """After submit every handler and the wake-up descriptor are what they were, also after a failure."""

    def handlers() -> list[Any]:
        wakeup = signal.set_wakeup_fd(-1)
        signal.set_wakeup_fd(wakeup)
        return [wakeup, *(signal.getsignal(number) for number in sorted(signal.valid_signals()))]

    def fail(record: int) -> int:
        raise ValueError(record)

    before = handlers()
    env = LocalEnvironment("good")
    env.from_batch([1]).sink(lambda record: None)
    env.submit(autostop=True)
    assert handlers() == before
    env = LocalEnvironment("bad")
    env.from_batch([1]).map(fail).sink(lambda record: None)
    with pytest.raises(JobError):
        env.submit(autostop=True)
    assert handlers() == before


def test_a_job_works_from_another_thread() -> None:
    """Submit blocks the thread that calls it and touches no handler of the process."""
    seen_inside: list[Any] = []
    arrived: list[int] = []
    ended: list[str] = []

    class Store:
        def process(self, record: int) -> int:
            seen_inside.append(signal.getsignal(signal.SIGINT))
            return record * 2

        def cleanup(self) -> None:
            ended.append("cleaned")

    def work() -> None:
        env = LocalEnvironment("thread")
        store = env.register_service("store", Store)
        env.from_batch([1, 2]).map(store.process).sink(arrived.append)
        env.submit(autostop=True)
        ended.append("returned")

    before = signal.getsignal(signal.SIGINT)
    thread = threading.Thread(target=work)
    thread.start()
    thread.join(timeout=10)
    assert arrived == [2, 4]
    assert ended == ["cleaned", "returned"]
    assert seen_inside == [before, before]


def test_two_processes_at_once_share_a_folder(tmp_path: Path) -> None:
    """Each is in the middle of a job while the other is, with logs of its own in one log folder."""
    body = """
    def rendezvous(record):
        tell("running")
        return sys.stdin.readline().strip()

    seen = []
    env = LocalEnvironment("twin", log_dir="../logs")
    env.register_service("store", Store)
    env.from_batch([1]).map(rendezvous).sink(seen.append)
    env.submit(autostop=True)
    assert seen == ["go on"]
    """
    folders = [tmp_path / "a", tmp_path / "b"]
    for folder in folders:
        folder.mkdir()
    with program(folders[0], body) as first, program(folders[1], body) as second:
        for running in (first, second):
            running.wait_line("running")
        for running in (first, second):
            assert running.process.stdin is not None
            running.process.stdin.write("go on\n")
            running.process.stdin.flush()
        results = [running.finish() for running in (first, second)]
    assert [(ended.code, ended.errors, ended.marks) for ended in results] == [(0, "", ["cleaned"])] * 2
    sessions = sorted((tmp_path / "logs" / "jobmanager").iterdir())
    pids = {int(session.name.rsplit("_", 1)[1]) for session in sessions}
    assert pids == {first.process.pid, second.process.pid}


# --- logs ---


def session(folder: Path) -> dict[str, str]:
    """Return the log files of the only session under `folder`, by name; a job's file is called "job"."""
    (found,) = (folder / "jobmanager").iterdir()
    assert re.fullmatch(r"session_\d{8}_\d{6}_\d+", found.name)
    return {
        path.name if path.name[0].isupper() else "job": path.read_text(encoding="utf-8") for path in found.iterdir()
    }


LOGGED_JOB = """
env = LocalEnvironment("logged"{})
store = env.register_service("store", Store)
env.from_batch(range({})).filter(lambda record: True, name="all").map(store.process).sink(lambda record: None)
env.submit(autostop=True)
"""


def test_no_line_is_logged_for_a_record(tmp_path: Path) -> None:
    """A job of 5,000 records writes as many lines to its files as a job of 5."""
    lines: list[dict[str, int]] = []
    for count in (5, 5_000):
        folder = tmp_path / str(count)
        folder.mkdir()
        with program(folder, LOGGED_JOB.format(', log_dir="logs"', count)) as running:
            ended = running.finish()
        assert (ended.code, ended.output, ended.errors) == (0, "", "")
        lines.append({name: text.count("\n") for name, text in session(folder / "logs").items()})
    assert lines[0] == lines[1]
    assert {"Dispatcher.log", "JobManager.log", "job"} <= set(lines[0])


@pytest.mark.parametrize("how", ["argument", "variable"])
def test_log_files_tell_the_life_of_a_job(tmp_path: Path, how: str) -> None:
    """With `log_dir`, or `SAGE_LOG_DIR`, the session's files show every change of state."""
    argument = ', log_dir="logs"' if how == "argument" else ""
    variables = {} if how == "argument" else {"SAGE_LOG_DIR": "logs"}
    with program(tmp_path, LOGGED_JOB.format(argument, 5), **variables) as running:
        ended = running.finish()
    assert (ended.code, ended.output, ended.errors) == (0, "", "")
    files = session(tmp_path / "logs")
    for text in ('service "store": ', 'task "', "cleaning -> stopped", "-> sealed"):
        assert text in files["Dispatcher.log"]
    assert "name='logged'" in files["JobManager.log"]
    assert "state=completed cleanliness=clean" in files["job"]
    assert files.get("Error.log", "") == ""


def test_an_error_is_found_with_its_traceback(tmp_path: Path) -> None:
    """`Error.log` holds the error of an operator once, with the traceback of the user's code."""
    body = """
    def halve(record):
        return 1 // record

    env = LocalEnvironment("failing", log_dir="logs")
    env.from_batch([1, 0]).map(halve, name="halve").sink(lambda record: None)
    env.submit(autostop=True)
    """
    with program(tmp_path, body) as running:
        ended = running.finish()
    assert ended.code == 1
    assert "ZeroDivisionError" in ended.errors
    errors = session(tmp_path / "logs")["Error.log"]
    assert len(re.findall(r"^\S+ \S+ ERROR ", errors, re.MULTILINE)) == 1
    assert '"halve"' in errors
    assert "Traceback (most recent call last)" in errors
    assert "in halve" in errors
    assert "return 1 // record" in errors
    assert "ZeroDivisionError: integer division or modulo by zero" in errors


def test_without_a_folder_nothing_is_written(tmp_path: Path) -> None:
    """File logs are off unless they are asked for."""
    with program(tmp_path, LOGGED_JOB.format("", 5)) as running:
        ended = running.finish()
    assert (ended.code, ended.output, ended.errors) == (0, "", "")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["marks", "program.py"]


def test_log_files_show_a_handler_each_line_once(tmp_path: Path) -> None:
    """The level may be set between two jobs with log files, and each of them has its own file."""
    body = """
    import logging, sys
    logging.basicConfig(format="%(message)s", stream=sys.stdout, level=logging.WARNING)
    for _ in range(3):
        logging.getLogger("sage.job").setLevel(logging.WARNING)
        env = LocalEnvironment("logged", log_dir="logs")
        env.from_batch([1]).sink(lambda _: None)
        env.submit(autostop=True)
    logging.getLogger("sage.job").warning("a line")
    """
    with program(tmp_path, body) as running:
        ended = running.finish()
    assert (ended.code, ended.output) == (0, "a line\n"), ended.errors


def test_the_console_shows_the_log_when_asked(tmp_path: Path) -> None:
    """`set_console_log_level` shows the log on standard error, and refuses a level it does not know."""
    body = SMALL_JOB + 'env.set_console_log_level("INFO")\nenv.submit(autostop=True)'
    with program(tmp_path, body) as running:
        ended = running.finish()
    assert (ended.code, ended.output) == (0, "")
    assert 'service "store"' in ended.errors
    assert "ERROR" not in ended.errors
    with pytest.raises(ValueError, match="console log level is 10"):
        LocalEnvironment().set_console_log_level(10)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="console log level is 'LOUD'") as caught:
        LocalEnvironment().set_console_log_level("LOUD")
    assert "DEBUG, INFO, WARNING, ERROR" in caught.value.__notes__[0]


# --- arguments ---


class Number(BatchFunction):
    def execute(self) -> None:
        return None


class Numbers(SourceFunction):
    def execute(self) -> None:
        return None


class Same(MapFunction):
    def execute(self, data: Any) -> Any:
        return data


class All(FilterFunction):
    def execute(self, data: Any) -> bool:
        return True


class Split(FlatMapFunction):
    def execute(self, data: Any) -> list[Any]:
        return [data]


class Run(ProcessFunction):
    def execute(self, data: Any) -> list[Any]:
        return [data]


class Drop(SinkFunction):
    def execute(self, data: Any) -> None:
        return None


class Key(KeyByFunction):
    def execute(self, data: Any) -> Any:
        return data


class Both(BaseCoMapFunction):
    def map0(self, data: Any) -> Any:
        return data

    def map1(self, data: Any) -> Any:
        return data


class Match(BaseJoinFunction):
    def execute(self, payload: Any, key: Any, tag: int) -> list[Any]:
        return []


class Store:
    def process(self, record: Any) -> Any:
        return record


def env() -> Any:
    return LocalEnvironment("arguments")


def stream() -> Any:
    return env().from_batch([1])


def keyed() -> Any:
    return stream().keyby(lambda record: record)


def connected() -> Any:
    environment = env()
    return environment.from_batch([1]).connect(environment.from_batch([2])).keyby(lambda record: record)


TAKES_UNKNOWN: dict[str, Callable[[], Any]] = {
    "LocalEnvironment": lambda: LocalEnvironment("x", colour=1),  # type: ignore[call-arg]
    "RemoteEnvironment": lambda: RemoteEnvironment("x", colour=1),  # type: ignore[call-arg]
    "ServiceOptions": lambda: ServiceOptions(colour=1),  # type: ignore[call-arg]
    "from_batch list": lambda: env().from_batch([1], colour=1),
    "from_batch list, positional": lambda: env().from_batch([1], 2),
    "from_batch class": lambda: env().from_batch(Number, colour=1),
    "from_batch class, positional": lambda: env().from_batch(Number, 1),
    "from_batch function": lambda: env().from_batch(lambda: iter([1]), colour=1),
    "from_collection": lambda: env().from_collection([1], colour=1),
    "from_source class": lambda: env().from_source(Numbers, colour=1),
    "from_source function": lambda: env().from_source(lambda: 1, colour=1),
    "from_future": lambda: env().from_future("x", colour=1),
    "register_service": lambda: env().register_service("x", Store, colour=1),
    "register_service, positional": lambda: env().register_service("x", Store, 1),
    "register_service function": lambda: env().register_service("x", lambda: Store(), colour=1),
    "register_service_factory": lambda: env().register_service_factory("x", Store, colour=1),
    "serve": lambda: env().serve("x", lambda requests: requests, colour=1),
    "submit": lambda: env().submit(colour=1),
    "explain": lambda: env().explain(colour=1),
    "map class": lambda: stream().map(Same, colour=1),
    "map function": lambda: stream().map(lambda record: record, colour=1),
    "map function, positional": lambda: stream().map(lambda record: record, 1),
    "map instance": lambda: stream().map(Same(), colour=1),
    "filter class": lambda: stream().filter(All, colour=1),
    "filter function": lambda: stream().filter(lambda record: True, colour=1),
    "flatmap class": lambda: stream().flatmap(Split, colour=1),
    "flatmap function": lambda: stream().flatmap(lambda record: [record], colour=1),
    "process class": lambda: stream().process(Run, colour=1),
    "sink class": lambda: stream().sink(Drop, colour=1),
    "sink function": lambda: stream().sink(lambda record: None, colour=1),
    "keyby class": lambda: stream().keyby(Key, colour=1),
    "keyby function": lambda: stream().keyby(lambda record: record, colour=1),
    "reduce": lambda: keyed().reduce(lambda a, b: a + b, colour=1),
    "print": lambda: stream().print("x", colour=1),
    "union": lambda: stream().union(colour=1),
    "connect": lambda: stream().connect(colour=1),
    "comap class": lambda: connected().comap(Both, colour=1),
    "comap functions": lambda: connected().comap(lambda record: 0, lambda record: 1, colour=1),
    "join class": lambda: connected().join(Match, colour=1),
    "connected map": lambda: connected().map(lambda record: record, colour=1),
    "connected sink": lambda: connected().sink(lambda record: None, colour=1),
}


@pytest.mark.parametrize("call", TAKES_UNKNOWN.values(), ids=TAKES_UNKNOWN)
def test_an_unknown_argument_is_a_type_error(call: Callable[[], Any]) -> None:
    """An argument that could have no effect is refused while the graph is built."""
    with pytest.raises(TypeError) as caught:
        call()
    assert str(caught.value)


def test_accepted_arguments_have_an_effect() -> None:
    """Name, parallelism, and the arguments of functions and services are seen in what happens."""

    class Add(MapFunction):
        def __init__(self, number: int, factor: int = 1) -> None:
            self.number = number
            self.factor = factor

        def execute(self, data: int) -> int:
            return (data + self.number) * self.factor

    class Power:
        def __init__(self, exponent: int, *, sign: int = 1) -> None:
            self.exponent = exponent
            self.sign = sign

        def process(self, record: int) -> int:
            return int(self.sign * record**self.exponent)

    environment = LocalEnvironment("effects")
    power = environment.register_service("power", Power, 2, sign=-1)
    arrived: list[int] = []
    numbers = environment.from_batch([1, 2, 3], name="numbers").map(Add, 1, factor=2, parallelism=3, name="add")
    numbers.map(power.process, name="power of two").sink(arrived.append, name="list")
    report = environment.submit(autostop=True).report
    assert sorted(arrived) == [-64, -36, -16]
    assert report is not None
    assert report.name == "effects"
    assert [operator.name for operator in report.operators] == ["numbers", "add", "power of two", "list"]
    assert report.operator("add").parallelism == 3


def test_a_delay_lies_between_records(clock: FairClock) -> None:
    """`delay` paces a source, and without it nothing waits."""
    for delay, least_s, most_s in [(0.1, 0.4, 1.5), (None, 0.0, 0.4)]:
        numbers = iter([*range(5), sage.StopSignal()])
        environment = env()
        arrived: list[int] = []
        environment.from_source(numbers.__next__, delay=delay).sink(arrived.append)
        began_at = time.monotonic()
        environment.submit(autostop=True)
        assert arrived == [0, 1, 2, 3, 4]
        assert time.monotonic() - began_at >= least_s
        assert clock.elapsed_s(began_at) < most_s


def test_the_bounds_of_an_environment_hold(clock: FairClock) -> None:
    """`close_timeout_s` bounds a `close` that hangs, and the report names the task."""
    finish = threading.Event()

    class Hang(Drop):
        def close(self) -> None:
            finish.wait(timeout=10)

    environment = LocalEnvironment("bounds", close_timeout_s=0.2)
    environment.from_batch([1]).sink(Hang, name="hang")
    began_at = time.monotonic()
    with pytest.raises(JobErrorGroup, match="COMPLETED and DIRTY") as caught:
        environment.submit(autostop=True)
    assert clock.elapsed_s(began_at) < 1.2
    (error,) = caught.value.exceptions
    assert isinstance(error, CleanupTimeoutError)
    assert "hang" in str(error)
    finish.set()


def test_print_uses_its_arguments(capsys: pytest.CaptureFixture[str]) -> None:
    """Prefix and separator stand before each record."""
    environment = env()
    environment.from_batch(["a", "b"]).print("record", separator=" > ")
    environment.submit(autostop=True)
    assert capsys.readouterr().out == "record > a\nrecord > b\n"


@pytest.mark.parametrize("files", [{"log_dir": "file/logs"}, {"report_file": "file/report"}, {"log_dir": 5}])
def test_files_that_cannot_be_written_start_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, files: dict[str, Any]
) -> None:
    """Submit says so, and neither a thread nor a call of a service is left; what is kept stays."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").write_text("no folder")
    with LocalEnvironment("logged") as env:
        kept: Any = env.register_service("kept", Counter)
        env.from_batch([1]).map(kept.get)
        env.submit(autostop=True, keep_services=True)
        before = set(threading.enumerate())
        new: Any = env.register_service("new", Counter)
        env.log_dir, env.report_file = files.get("log_dir"), files.get("report_file")
        for _ in range(2):
            with pytest.raises((GraphError, TypeError)):
                env.submit(autostop=True)
        assert set(threading.enumerate()) == before
        with pytest.raises(ServiceUnavailableError):
            new.get(1)
        assert kept.get(1) is None
        env.log_dir = env.report_file = None
        env.submit(autostop=True)
        assert kept.get(1) is None


# --- the interpreter's exit ---


@pytest.mark.parametrize(("ending", "code"), [("", 0), ("sys.exit(3)", 3), ("raise LookupError('lost')", 1)])
def test_a_job_that_runs_at_exit_is_stopped_and_cleaned(tmp_path: Path, ending: str, code: int) -> None:
    """It drains, is cleaned once, a warning says so, and the exit code stays the program's own."""
    body = f"""
    class Ready(Store):
        def process(self, record):
            running.set()
            return record

    running = threading.Event()
    handlers_before = handlers()
    env = LocalEnvironment("forgotten")
    env.register_service("store", Ready)
    env.from_source(Count, 20).map(Work, 0.02).sink(Write)
    env.submit()
    assert running.wait(10)
    {ending}
    """
    with program(tmp_path, body) as running:
        ended = running.finish()
    assert ended.code == code
    assert ended.marks[-1] == "cleaned"
    assert sorted(mark.split(" after")[0] for mark in ended.marks) == ["cleaned", "sink closed", "source closed"]
    assert len(re.findall(r'RuntimeWarning: job "forgotten" still runs at exit and is stopped', ended.errors)) == 1
    assert "env.close()" in ended.errors
    assert ("LookupError: lost" in ended.errors) == (code == 1)


def test_an_exit_is_bounded(tmp_path: Path, clock: FairClock) -> None:
    """A cleanup that hangs holds the exit up for its bound only, and the others are cleaned."""
    body = """
    class Hanging:
        def start(self):
            started.set()
        def cleanup(self):
            mark("hanging")
            time.sleep(60)

    started = threading.Event()
    env = build(1, 0)
    env.register_service("hanging", Hanging, options=ServiceOptions(stop_timeout_s=1))
    env.submit()
    assert started.wait(10)
    """
    with program(tmp_path, body) as running:
        clock.watch(running.process.pid)
        began_at = time.monotonic()
        ended = running.finish()
    assert clock.elapsed_s(began_at) < 5
    assert ended.code == 0
    assert ended.marks[-2:] == ["hanging", "cleaned"]
    assert "RuntimeWarning" in ended.errors


def test_kept_services_are_cleaned_at_exit(tmp_path: Path) -> None:
    """Services that were kept are cleaned once at exit, with a warning that names them."""
    body = SMALL_JOB + 'env.submit(autostop=True, keep_services=True)\nmark("kept")\nassert store.process(5) == 5\n'
    with program(tmp_path, body) as running:
        ended = running.finish()
    assert ended.code == 0
    assert ended.marks == ["kept", "cleaned"]
    assert 'RuntimeWarning: environment "small" still keeps store at exit' in ended.errors


def test_what_is_left_at_exit_is_cleaned_where_warnings_are_errors(tmp_path: Path) -> None:
    """A warning that is raised keeps neither the job nor what is kept from its cleanup."""
    keep = SMALL_JOB + "env.submit(autostop=True, keep_services=True)\n"
    body = """
import warnings
warnings.simplefilter("error")
running = threading.Event()
forgotten = LocalEnvironment("forgotten")
forgotten.register_service("store", Store)
forgotten.from_source(running.set, delay=0.01).map(lambda record: record)
forgotten.submit()
assert running.wait(10)
first = env
"""
    with program(tmp_path, keep + body + keep) as running:
        ended = running.finish()
    assert ended.code == 0
    assert ended.marks.count("cleaned") == 3
    assert 'RuntimeWarning: job "forgotten" still runs at exit' in ended.errors
    assert ended.errors.count("still keeps store at exit") == 2


def test_a_program_that_closes_gets_no_warning(tmp_path: Path) -> None:
    """After `env.close()` nothing is left for the exit to do."""
    first = "with build(3, 0) as env:\n    env.submit()\n"
    second = SMALL_JOB + "env.submit(autostop=True, keep_services=True)\nenv.close()\n"
    with program(tmp_path, first + second) as running:
        ended = running.finish()
    assert (ended.code, ended.errors) == (0, "")
    assert ended.marks.count("cleaned") == 2
