"""What a program has made of its process shows at the end of a job: in its report, or not at all."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from sage import JobError, JobReport, Line, LocalEnvironment, ServiceOptions

WAIT_S = 20.0
BLOCKED_S = 8.0

ENDS_WITH_7 = "import signal, sys\nsignal.signal(15, lambda *_: sys.exit(7))\nprint('up')\nsignal.pause()"


class Echo:
    def process(self, record: int) -> int:
        return record


def ended(env: LocalEnvironment) -> JobReport:
    """Run a job to its end and return its report, whatever it raises."""
    with suppress(JobError):
        env.submit(autostop=True)
    report: JobReport | None = env.jobmanager.jobs[env.env_uuid].report
    assert report is not None
    return report


# --- exit codes -------------------------------------------------------------------------------------------------------


@pytest.fixture
def ignored() -> Iterator[None]:
    before = signal.signal(signal.SIGCHLD, signal.SIG_IGN)
    yield
    signal.signal(signal.SIGCHLD, before)


@pytest.fixture
def waited_for() -> Iterator[None]:
    """Have another thread wait for every child, and be told of each before anyone else."""
    over = threading.Event()

    def wait() -> None:
        while not over.is_set():
            try:
                os.waitid(os.P_ALL, 0, os.WEXITED)
            except ChildProcessError:
                over.wait(0.001)

    waiting = threading.Thread(target=wait, daemon=True)
    waiting.start()
    yield
    over.set()
    pid = os.posix_spawn("/bin/true", ["true"], {})  # wakes it, if it still waits
    waiting.join(WAIT_S)
    with suppress(ChildProcessError):
        os.waitpid(pid, 0)


def command_that_ends_with_7() -> JobReport:
    env = LocalEnvironment("command")
    env.register_command("service", [sys.executable, "-c", ENDS_WITH_7], ready=Line("up"))
    env.from_batch([1]).sink(lambda _: None)
    return ended(env)


def process_that_ends() -> JobReport:
    env = LocalEnvironment("process")
    echo = env.register_service("service", Echo, options=ServiceOptions(host="process"))
    env.from_batch([1]).map(echo).sink(lambda _: None)
    return ended(env)


@pytest.mark.usefixtures("ignored")
def test_an_exit_code_that_nobody_knows_is_not_a_good_one() -> None:
    """With SIGCHLD ignored, the system throws it away; `subprocess` would say 0."""
    for report, hook in ((command_that_ends_with_7(), "stop"), (process_that_ends(), "exit")):
        assert (report.state, report.cleanliness) == ("completed", "dirty")
        service = report.service("service")
        assert (service.state, service.exit_code) == ("cleanup_failed", None)
        assert len(report.errors) == 1
        assert f"failed in {hook}: " in str(report.errors[0])
        assert "its exit code is not known, as SIGCHLD is ignored or something waits for every child" in str(
            report.errors[0]
        )


@pytest.mark.usefixtures("waited_for")
def test_an_exit_code_that_somebody_else_was_told_is_not_made_up() -> None:
    """It is seen by whoever waits first, so that either is right; that of a process is not known, or is its own."""
    codes = []
    for _ in range(4):
        report = command_that_ends_with_7()
        codes.append(report.service("service").exit_code)
        assert report.cleanliness == "dirty"
        assert report.service("service").state == "cleanup_failed"
    assert set(codes) <= {None, 7}
    report = process_that_ends()
    assert (report.service("service").exit_code, str(report.cleanliness)) in {(None, "dirty"), (0, "clean")}


@pytest.mark.usefixtures("ignored")
def test_a_death_whose_exit_code_nobody_knows_is_told() -> None:
    env = LocalEnvironment("death")
    dying = env.register_service("service", Dying, options=ServiceOptions(host="process"))
    env.from_batch([1]).map(dying).sink(lambda _: None)
    report = ended(env)
    assert (report.state, report.service("service").state) == ("failed", "lost")
    assert any("its exit code is not known" in str(error) for error in report.errors)


class Dying:
    def process(self, record: int) -> int:
        os._exit(record)


@pytest.mark.usefixtures("ignored")
def test_a_service_knows_how_its_own_children_end() -> None:
    """Ignored signals are inherited; in a process of its own, a service begins with the default."""
    env = LocalEnvironment("children")
    falling = env.register_service("service", Falling, options=ServiceOptions(host="process"))
    seen: list[int] = []
    env.from_batch([3]).map(falling).sink(seen.append)
    ended(env)
    assert seen == [3]


class Falling:
    def process(self, record: int) -> int:
        return subprocess.run(["sh", "-c", f"exit {record}"], check=False).returncode


# --- event loops ------------------------------------------------------------------------------------------------------


class Background:
    """Starts a task of its own, which outlives the call."""

    def __init__(self, deed: str) -> None:
        self.deed = deed
        self.tasks: list[Any] = []

    async def process(self, record: int) -> int:
        deeds = {"blocks": self.blocks, "refuses": self.refuses, "waits": self.waits}
        self.tasks.append(asyncio.create_task(deeds[self.deed](), name="mine"))
        return record

    async def blocks(self) -> None:
        await asyncio.sleep(0.05)
        time.sleep(BLOCKED_S)

    async def refuses(self) -> None:
        due = time.monotonic() + BLOCKED_S
        while time.monotonic() < due:
            try:
                await asyncio.sleep(BLOCKED_S)
            except asyncio.CancelledError:
                continue

    async def waits(self) -> None:
        await asyncio.Event().wait()


def background(deed: str, host: Any) -> JobReport:
    env = LocalEnvironment("background")
    service = env.register_service("service", Background, deed, options=ServiceOptions(host=host))
    env.from_batch([1]).map(service).sink(lambda _: time.sleep(0.2))
    return ended(env)


@pytest.mark.parametrize(
    ("deed", "host", "line"),
    [
        ("blocks", "inline", 'job "background" left something behind: thread "background-loop", as a coroutine'),
        ("refuses", "inline", 'job "background" left something behind: asyncio task "mine", which does not end'),
        ("blocks", "process", 'service "service" did not exit in time and was killed'),
    ],
)
def test_a_background_task_that_does_not_end_is_named(deed: str, host: str, line: str) -> None:
    report = background(deed, host)
    assert (report.state, report.cleanliness) == ("completed", "dirty")
    assert [str(error)[: len(line)] for error in report.errors] == [line]
    assert f"in {deed}" in str(report)


@pytest.mark.parametrize("host", ["inline", "process"])
def test_a_background_task_that_waits_is_cancelled(host: str) -> None:
    assert background("waits", host).cleanliness == "clean"


# --- the first process of a container ---------------------------------------------------------------------------------

FIRST = """
    import os, subprocess, sys, time
    from sage import JobError, LocalEnvironment, ServiceOptions

    class Service:
        def __init__(self, script):
            self.script = script

        def setup(self):
            subprocess.run(["sh", "-c", self.script])
            time.sleep(0.4)

        def process(self, record):
            return record

    if __name__ == "__main__":
        env = LocalEnvironment("first")
        service = env.register_service("service", Service, sys.argv[2], options=ServiceOptions(host=sys.argv[1]))
        env.from_batch([1]).map(service).sink(lambda _: None)
        try:
            env.submit(autostop=True)
        except JobError:
            pass
        report = env.jobmanager.jobs[env.env_uuid].report
        zombies = 0
        for name in filter(str.isdecimal, os.listdir("/proc")):
            with open(f"/proc/{name}/stat") as file:
                zombies += file.read().rpartition(")")[2].split()[0] == "Z"
        print(os.getpid(), report.state, report.cleanliness, f"{zombies} left", *report.errors)
"""

NAMESPACE = ["unshare", "--pid", "--fork", "--mount-proc"]
ORPHAN = "(sleep 0.2) & exec sleep 0.1"


def can_unshare() -> bool:
    return subprocess.run([*NAMESPACE, "true"], capture_output=True, check=False).returncode == 0


@pytest.mark.skipif(not can_unshare(), reason="this machine makes no namespaces of processes for this user")
@pytest.mark.parametrize(
    ("host", "script", "told"),
    [
        ("process", ORPHAN, "1 completed clean 0 left\n"),
        ("process", f"{ORPHAN} & {ORPHAN}", "1 completed clean 0 left\n"),
        # It belongs to no group of ours; nor does what a service in the program's own process leaves.
        ("process", "(setsid sleep 0.2) & exec sleep 0.1", "1 completed dirty 1 left job"),
        ("inline", ORPHAN, "1 completed dirty 1 left job"),
        ("inline", "sleep 0.1", "1 completed clean 0 left\n"),
    ],
)
def test_what_loses_its_parent_is_waited_for_or_named(host: str, script: str, told: str, tmp_path: Path) -> None:
    (tmp_path / "program.py").write_text(textwrap.dedent(FIRST))
    command = [*NAMESPACE, sys.executable, str(tmp_path / "program.py"), host, script]
    done = subprocess.run(command, capture_output=True, text=True, timeout=WAIT_S, check=False)
    assert done.stdout.startswith(told), done.stdout + done.stderr
    if "dirty" in told:
        assert "has ended and nobody waited for it; as process 1, this program is the parent" in done.stdout
