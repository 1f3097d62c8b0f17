"""What holds for every service holds for commands: their end is their stop signal, which they write down."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import textwrap
import threading
import time
from typing import TYPE_CHECKING, Any

import pytest
from support.recording_services import Notes, report_of

from sage import FunctionError, JobError, Line, LocalEnvironment, Outcome, ServiceOptions, ServiceUnavailableError
from sage._processes import is_ending, process

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from sage import RunningCommand

    Register = Callable[..., RunningCommand]

SOON_S = 20.0

STORE = """
    import signal, sys, time

    def stop(signum, frame):
        time.sleep(float(sys.argv[3]))
        with open(sys.argv[1], "a") as notes:
            notes.write(sys.argv[2] + " stopped" + chr(10))
        sys.exit(0)

    signal.signal(signal.SIGTERM, stop)
    print("up", flush=True)
    while True:
        signal.pause()
"""


@pytest.fixture
def notes(tmp_path: Path) -> Notes:
    return Notes(tmp_path / "notes")


@pytest.fixture
def register(notes: Notes) -> Register:
    def register(env: LocalEnvironment, name: str, takes_s: float = 0.0) -> Any:
        words = [sys.executable, "-c", textwrap.dedent(STORE), str(notes.path), name, str(takes_s)]
        return env.register_command(name, words, ready=Line("up"))

    return register


def test_a_command_that_nobody_calls_has_stopped_when_submit_returns(notes: Notes, register: Register) -> None:
    """Once, in its own way, and with nothing left of it."""
    env = LocalEnvironment()
    register(env, "store")
    env.from_batch([1]).sink(lambda _: None)
    env.submit(autostop=True)
    assert notes == ["store stopped"]
    service = report_of(env).service("store")
    assert (service.state, service.exit_code) == ("stopped", 0)
    assert service.pid is not None
    assert process(service.pid) is None


def fails(_: int) -> int:
    raise ValueError("wrong")


@pytest.mark.parametrize("way", ["natural", "failure", "stop", "cancel"])
def test_commands_stop_once_and_in_reverse_however_the_job_ends(way: str, notes: Notes, register: Register) -> None:
    """The latest first, each once, and after every record."""
    env = LocalEnvironment()
    for name in ("a", "b", "c"):
        register(env, name)
    runs = threading.Event()

    def work(record: int) -> int:
        runs.set()
        notes.append("record")
        return record

    source = env.from_batch([1]) if way in ("natural", "failure") else env.from_source(lambda: 1)
    source.map(work).map(fails if way == "failure" else lambda record: record).sink(lambda _: None)
    if way == "failure":
        with pytest.raises(FunctionError, match="wrong"):
            env.submit(autostop=True)
    else:
        job = env.submit()
        assert runs.wait(SOON_S)
        if way == "cancel":
            job.cancel()
        elif way == "stop":
            job.stop()
        else:
            job.wait()
    ends = ["c stopped", "b stopped", "a stopped"]
    assert notes[-3:] == ends
    assert set(notes[:-3]) == {"record"}
    assert report_of(env).cleanliness == "clean"


def test_submit_returns_after_a_command_that_is_slow_to_stop(notes: Notes, register: Register) -> None:
    """After it, not before."""
    env = LocalEnvironment()
    store = register(env, "store", 2.0)
    pids: list[Any] = []
    env.from_batch([1]).sink(lambda _: pids.append(store.pid))
    began_at = time.monotonic()
    env.submit(autostop=True)
    assert time.monotonic() - began_at >= 2.0
    assert notes == ["store stopped"]
    assert process(pids[0]) is None


def test_a_command_that_does_not_start_lets_no_record_through(notes: Notes, register: Register) -> None:
    """The one that was up before it is stopped once."""
    env = LocalEnvironment()
    register(env, "store")
    env.register_command("broken", [sys.executable, "-c", "raise SystemExit(3)"], ready=Line("up"))
    env.from_batch([1]).sink(lambda _: notes.append("record"))
    with pytest.raises(JobError, match='service "broken"'):
        env.submit(autostop=True)
    assert notes == ["store stopped"]


@pytest.mark.parametrize(
    "use", [lambda store: f"{store.url}", lambda store: range(store.pid), lambda store: store.output()]
)
def test_nothing_of_it_can_be_used_after_the_job(use: Callable[[Any], Any], register: Register) -> None:
    """Its attributes are no values any more, and say so."""
    env = LocalEnvironment()
    store = register(env, "store")
    found: list[Any] = []
    env.from_batch([1]).sink(lambda _: found.append(use(store)))
    env.submit(autostop=True)
    assert len(found) == 1
    with pytest.raises(ServiceUnavailableError, match='service "store" is not running'):
        use(store)


SCRIPT = f"""
import sys
from sage import Line, LocalEnvironment

env = LocalEnvironment()
words = [sys.executable, "-c", {textwrap.dedent(STORE)!r}, sys.argv[1], "store", "0"]
env.register_command("store", words, ready=Line("up"))
env.from_batch([1]).sink(lambda record: None)
env.submit(autostop=True)
"""


def test_a_script_that_ends_with_submit_stops_it_once(notes: Notes, tmp_path: Path) -> None:
    """Before the interpreter is gone, whose exit code is 0."""
    program = tmp_path / "program.py"
    program.write_text(SCRIPT)
    ended = subprocess.run(
        [sys.executable, str(program), str(notes.path)], capture_output=True, text=True, timeout=SOON_S, check=False
    )
    assert (ended.returncode, ended.stdout, ended.stderr) == (0, "", "")
    assert notes == ["store stopped"]


def test_one_that_ends_badly_does_not_keep_the_others_from_their_end(notes: Notes, register: Register) -> None:
    """It is in the report and in what submit raises, once everything is down."""
    env = LocalEnvironment()
    register(env, "first")
    bad = textwrap.dedent(STORE).replace("sys.exit(0)", "print('disk is full'); sys.exit(7)")
    env.register_command("bad", [sys.executable, "-c", bad, str(notes.path), "bad", "0"], ready=Line("up"))
    register(env, "last")
    env.from_batch([1]).sink(lambda _: None)
    with pytest.raises(JobError, match='DIRTY: service "bad" failed in stop') as caught:
        env.submit(autostop=True)
    assert notes == ["last stopped", "bad stopped", "first stopped"]
    report = report_of(env)
    assert (report.state, report.cleanliness) == (Outcome.COMPLETED, "dirty")
    service = report.service("bad")
    assert (service.exit_code, service.output) == (7, ("up", "disk is full"))
    assert "exited with code 7 when it was told to stop, its last line: disk is full" in str(caught.value)


@pytest.mark.parametrize("end", ["close", "with"])
def test_a_kept_command_is_stopped_once_by_its_environment(end: str, notes: Notes, register: Register) -> None:
    """It serves both jobs, and ends with `close` or `with`."""
    env = LocalEnvironment()
    store = register(env, "store")
    pids: list[Any] = []
    env.from_batch([1]).sink(lambda _: pids.append(store.pid))
    for _ in range(2):
        env.submit(autostop=True, keep_services=True)
    assert notes == []
    assert pids[0] == pids[1]
    if end == "close":
        env.close()
    else:
        with env:
            pass
    env.close()
    assert notes == ["store stopped"]
    assert process(pids[0]) is None


def test_without_autostop_it_is_stopped_just_the_same(notes: Notes, register: Register) -> None:
    """When the batch ends by itself."""
    env = LocalEnvironment()
    register(env, "store")
    env.from_batch([1]).sink(lambda _: None)
    report = env.submit().wait()
    assert report.state is Outcome.COMPLETED
    assert notes == ["store stopped"]


@pytest.mark.parametrize("end", ["stop", "close"])
def test_a_running_job_is_ended_and_a_second_call_does_nothing(end: str, notes: Notes, register: Register) -> None:
    """Tasks first, then the command, once."""
    env = LocalEnvironment()
    register(env, "store")
    runs = threading.Event()
    env.from_source(lambda: 1).sink(lambda _: runs.set())
    env.submit()
    assert runs.wait(SOON_S)
    for _ in range(2):
        getattr(env, end)()
    assert notes == ["store stopped"]


def test_two_environments_have_their_own(notes: Notes, register: Register) -> None:
    """Of the same name, at the same time."""
    both = threading.Barrier(2)
    pids: list[Any] = []

    def meet(store: Any) -> Callable[[int], None]:
        def sink(_: int) -> None:
            pids.append(store.pid)
            both.wait(SOON_S)

        return sink

    jobs = []
    for _ in range(2):
        env = LocalEnvironment()
        store = register(env, "store")
        env.from_batch([1]).sink(meet(store))
        jobs.append(env.submit())
    for job in jobs:
        job.wait()
    assert len(set(pids)) == 2
    assert notes == ["store stopped"] * 2


def test_one_that_hangs_is_ended_within_its_bound(notes: Notes, register: Register) -> None:
    """The others are stopped, and the report names it."""
    env = LocalEnvironment()
    register(env, "store")
    deaf = textwrap.dedent(STORE).replace("sys.exit(0)", "return").replace("notes.write", "str")
    words = [sys.executable, "-c", deaf, str(notes.path), "deaf", "0"]
    options = ServiceOptions(stop_timeout_s=0.5, kill_grace_s=0.5)
    env.register_command("deaf", words, ready=Line("up"), options=options)
    env.from_batch([1]).sink(lambda _: None)
    with pytest.raises(JobError, match="DIRTY"):
        env.submit(autostop=True)
    assert report_of(env).service("deaf").state == "killed"
    assert notes == ["store stopped"]


def test_one_that_died_as_the_job_failed_was_lost_and_is_not_told_to_stop(notes: Notes, register: Register) -> None:
    """A task notices the death first, and fails; its end is no answer to the stop."""
    env = LocalEnvironment()
    store = register(env, "store")

    def call(_: int) -> None:
        running = process(store.pid)
        assert running is not None
        os.kill(running.pid, signal.SIGKILL)
        while not is_ending(running):
            os.sched_yield()
        raise ConnectionError("the store went away")

    env.from_batch([1]).sink(call)
    with pytest.raises(JobError, match="store"):
        env.submit(autostop=True)
    assert report_of(env).service("store").state == "lost"
    assert notes == []
