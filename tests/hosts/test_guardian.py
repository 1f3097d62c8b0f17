"""The guardian: what is left of a run after its driver was killed, and what is not."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from support.guarded_drivers import CHAIN, PROGRAM, WAIT_S, Running, known, stale, wait_end, wait_gone

from sage._guardian import guardian, run_folder
from sage._guardian.job_journal import JobJournal
from sage._guardian.journal import ServiceLine
from sage._guardian.lease import GuardianLease, runs_folder
from sage._guardian.stop_order import StopOrder, followers
from sage._processes import (
    COOKIE_VARIABLE,
    Process,
    descendants,
    end_all,
    is_alive,
    send,
    watch,
    with_cookie,
)
from sage.errors import ServiceError
from sage.report import JobReport, Outcome

Driver = Callable[..., Running]


@pytest.fixture
def environment(tmp_path: Path) -> dict[str, str]:
    temporary = tmp_path / "temporary"
    temporary.mkdir()
    return {
        **os.environ,
        "TMPDIR": str(temporary),
        "SAGE_STATE_DIR": str(tmp_path / "state"),
        "PYTHONPATH": os.pathsep.join(map(str, [PROGRAM.parents[2] / "src", tmp_path])),
    }


@pytest.fixture
def driver(tmp_path: Path, environment: dict[str, str]) -> Iterator[Driver]:
    started: list[Running] = []

    def start(services: list[dict[str, Any]], claims: list[Any] | None = None, **order: Any) -> Running:
        changed = order.pop("environment", {})
        full = {"services": services, "claims": claims or [], **order}
        started.append(Running(tmp_path, full, environment | changed))
        return started[-1]

    yield start
    for running in started:
        running.close()


def test_services_stop_in_reverse_after_the_driver_was_killed(driver: Driver) -> None:
    running = driver(CHAIN)
    took_s = running.kill_and_wait()
    assert running.marks.read_text().split("\n") == ["a stop", "b stop", "c stop", ""]
    assert running.alive() == []
    report = running.report()
    assert (report["type"], report["state"], report["cleanliness"], report["errors"]) == ("report", "lost", "clean", [])
    assert running.ends() == {"a": "stopped", "b": "stopped", "c": "stopped"}
    assert report["why"] == f"its driver, process {running.program.pid}, died"
    assert not running.folder.exists()
    assert took_s < 10


def test_without_dependencies_the_last_one_stops_first(driver: Driver) -> None:
    running = driver([{"name": name, "kind": "good"} for name in ("first", "second", "third")])
    running.kill_and_wait()
    assert running.marks.read_text().split("\n") == ["third stop", "second stop", "first stop", ""]


def test_services_of_one_level_stop_side_by_side(driver: Driver, tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "marks.pipe")
    running = driver(
        [
            {"name": "below", "kind": "good"},
            {"name": "writer", "kind": "meets", "requires": ["below"]},
            {"name": "reader", "kind": "meets", "requires": ["below"]},
        ]
    )
    running.kill_and_wait()
    assert running.ends() == {"below": "stopped", "writer": "stopped", "reader": "stopped"}


@pytest.mark.slow
def test_one_that_hangs_does_not_take_the_cleanup_of_others(driver: Driver) -> None:
    running = driver(
        [
            {"name": "c", "kind": "good"},
            {"name": "b", "kind": "hangs", "requires": ["c"]},
            {"name": "a", "kind": "good", "requires": ["b"]},
        ]
    )
    took_s = running.kill_and_wait()
    assert running.marks.read_text().split("\n") == ["a stop", "c stop", ""]
    assert running.ends() == {"a": "stopped", "b": "killed", "c": "stopped"}
    assert running.alive() == []
    assert 3 < took_s < 12
    assert running.report()["cleanliness"] == "dirty"


def test_a_stopped_service_is_woken_and_stops(driver: Driver) -> None:
    running = driver([{"name": "a", "kind": "stopped"}])
    running.kill_and_wait()
    assert running.ends() == {"a": "stopped"}


def test_an_error_of_a_cleanup_is_in_the_report(driver: Driver) -> None:
    running = driver([{"name": "a", "kind": "raises"}])
    running.kill_and_wait()
    assert running.ends() == {"a": "cleanup_failed"}
    assert [error["text"] for error in running.report()["errors"]] == ['CleanupError: service "a": OSError: disk full']


def test_nothing_that_a_service_started_is_left(driver: Driver) -> None:
    """Own session, double fork, ignored SIGTERM, SIGSTOP."""
    running = driver([{"name": "a", "kind": "family"}])
    assert len(running.processes) == 4
    took_s = running.kill_and_wait()
    assert running.alive() == []
    assert running.ends() == {"a": "stopped"}
    assert 1.9 < took_s < 12


def test_what_threw_its_environment_away_is_known_by_its_parent(driver: Driver) -> None:
    """It carries no cookie any more, and neither does what it starts."""
    running = driver([{"name": "a", "kind": "cleared"}])
    assert len(running.processes) == 3
    running.kill_and_wait()
    assert running.alive() == []
    assert running.ends() == {"a": "stopped"}


def test_a_guardian_outlives_what_it_guards(environment: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    """A service may be a driver with a guardian of its own, which has to be there when that driver has ended."""
    monkeypatch.setattr("tempfile.tempdir", environment["TMPDIR"])
    guard = GuardianLease.acquire()
    try:
        beside = subprocess.Popen([sys.executable, "-c", "import signal; signal.pause()"], env={})
        wait_loaded(beside.pid)
        found = descendants(known(os.getpid()))
        assert known(beside.pid) in found
        assert known(guard.guardian_pid) not in found
        beside.kill()
        beside.wait()
    finally:
        guard.release()


def wait_loaded(pid: int) -> None:
    """Wait until a process has a program, and with it an environment of its own."""
    due = time.monotonic() + WAIT_S
    while b"pause" not in Path(f"/proc/{pid}/cmdline").read_bytes():
        assert time.monotonic() < due
        time.sleep(0.005)


def test_a_service_that_died_before_the_driver_is_lost(driver: Driver) -> None:
    running = driver(CHAIN[:2])
    send(running.processes[0], signal.SIGKILL)
    running.kill_and_wait()
    assert running.ends() == {"b": "stopped", "c": "lost"}


def test_a_released_process_is_left_alone_and_listed(driver: Driver) -> None:
    running = driver([{"name": "a", "kind": "family"}], [["a", {"claim": "release", "pid": "last pid"}]])
    running.kill_and_wait()
    assert running.alive() == [running.pids[-1]]
    assert running.report()["released"] == [running.pids[-1]]


def test_a_process_outside_of_the_run_is_ended_if_it_is_owned(driver: Driver) -> None:
    outside = subprocess.Popen([sys.executable, "-c", "import signal; signal.pause()"])
    running = driver([{"name": "a", "kind": "hangs"}], [["a", {"claim": "process", "pid": outside.pid}]])
    send(running.processes[0], signal.SIGKILL)
    running.kill_and_wait()
    assert outside.wait(WAIT_S) == -signal.SIGTERM


def test_a_reused_pid_is_never_hit() -> None:
    """The same pid with another moment of start is another process."""
    with subprocess.Popen([sys.executable, "-c", "import signal; signal.pause()"]) as child:
        one = known(child.pid)
        other = Process(one.pid, one.started - 1)
        assert not send(other, signal.SIGKILL)
        assert watch(other) is None
        assert is_alive(one)
        assert send(one, signal.SIGKILL)


def test_paths_are_removed_and_links_are_not_followed(driver: Driver, tmp_path: Path) -> None:
    """Shared memory, temporary folders, sockets."""
    kept = tmp_path / "kept"
    (kept / "inside").mkdir(parents=True)
    folder = tmp_path / "folder"
    folder.mkdir()
    (folder / "link").symlink_to(kept)
    link = tmp_path / "link"
    link.symlink_to(kept)
    moved = tmp_path / "moved"
    moved.mkdir()
    (kept / "file").touch()
    shared_memory = Path(f"/dev/shm/sage_test_{os.getpid()}")
    shared_memory.write_bytes(b"x")
    paths = [folder, link, moved / "file", shared_memory, tmp_path / "never made"]
    running = driver([{"name": "a", "kind": "hangs"}], [["a", {"claim": "path", "path": str(path)}] for path in paths])
    moved.rmdir()
    moved.symlink_to(kept)
    send(running.processes[0], signal.SIGKILL)
    running.kill_and_wait()
    assert not folder.exists()
    assert not link.is_symlink()
    assert not shared_memory.exists()
    assert (kept / "inside").exists()
    assert (kept / "file").exists()
    (error,) = running.report()["errors"]
    assert "has become a link" in error["text"]


def test_paths_of_a_service_that_stopped_are_its_own_matter(driver: Driver, tmp_path: Path) -> None:
    result = tmp_path / "result"
    result.touch()
    running = driver([{"name": "a", "kind": "good"}], [["a", {"claim": "path", "path": str(result)}]])
    running.kill_and_wait()
    assert result.exists()


def test_reap_actions_run_in_a_fresh_process(driver: Driver, tmp_path: Path) -> None:
    (tmp_path / "actions_of_test.py").write_text(
        "import os, pathlib, subprocess\n"
        "def mark(path, text):\n"
        "    subprocess.Popen(['sleep', '60'])\n"
        "    pathlib.Path(path).write_text(f'{text} {os.getpid()}')\n"
        "def fail():\n"
        "    raise OSError('no such table')\n"
    )
    marker = tmp_path / "marker"
    running = driver(
        [{"name": "a", "kind": "hangs"}],
        [
            ["a", {"claim": "call", "function": "actions_of_test:mark", "args": [str(marker), "table"]}],
            ["a", {"claim": "call", "function": "actions_of_test:fail", "args": []}],
        ],
    )
    send(running.processes[0], signal.SIGKILL)
    took_s = running.kill_and_wait()
    text, pid = marker.read_text().split()
    assert text == "table"
    assert int(pid) not in (running.guardian.pid, running.program.pid)
    (error,) = running.report()["errors"]
    assert "OSError: no such table" in error["text"]
    assert took_s < 12


def test_the_report_goes_to_the_file_of_the_job(driver: Driver, tmp_path: Path) -> None:
    report = tmp_path / "report.jsonl"
    report.write_text('{"type": "event"}\n{"type": "ev')
    running = driver(CHAIN, report=str(report))
    running.kill_and_wait()
    lines = report.read_text().splitlines()
    assert lines[:2] == ['{"type": "event"}', '{"type": "ev']
    last = json.loads(lines[2])
    assert (last["type"], last["job"], last["state"]) == ("report", "job-1", "lost")
    read = JobReport.from_dict(last)
    assert (read.state, read.service("a").state, read.service("a").host) == (Outcome.LOST, "stopped", "process")
    assert 'job "demo": LOST and CLEAN' in str(read)
    assert not running.state.exists()


def test_a_job_that_has_its_report_gets_no_other(driver: Driver, tmp_path: Path) -> None:
    """Its driver died after it had written how the job ended, and before it had told its guardian."""
    report = tmp_path / "report.jsonl"
    own = '{"type": "report", "job": "job-1", "state": "completed"}\n'
    others = '{"type": "report", "job": "job-0", "state": "failed"}\n{"type": "event", "job": "job-1"}\n{"type": "rep'
    report.write_text(own + others)
    running = driver(CHAIN, report=str(report))
    running.kill_and_wait()
    assert report.read_text() == own + others
    assert running.alive() == []
    assert not running.state.exists()


def test_a_report_that_would_go_into_a_pipe_is_not_waited_for(driver: Driver, tmp_path: Path) -> None:
    """Nobody writes into it any more, so that reading would never end."""
    pipe = tmp_path / "report.jsonl"
    os.mkfifo(pipe)
    running = driver(CHAIN, report=str(pipe))
    running.kill_and_wait()
    assert running.alive() == []
    assert not running.folder.exists()


def test_a_report_that_cannot_be_written_keeps_nothing_alive(driver: Driver, tmp_path: Path) -> None:
    running = driver(CHAIN, report=str(tmp_path / "no" / "such" / "folder"))
    running.kill_and_wait()
    assert running.alive() == []
    assert not running.folder.exists()


def test_only_a_hundred_reports_are_kept(driver: Driver) -> None:
    running = driver(CHAIN[:1])
    reports = running.state / "reports"
    reports.mkdir(parents=True)
    for number in range(105):
        (reports / f"old-{number}.json").touch()
        os.utime(reports / f"old-{number}.json", (number, number))
    running.kill_and_wait()
    names = {path.name for path in reports.iterdir()}
    assert len(names) == 100
    assert "job-1.json" in names
    assert "old-5.json" not in names
    assert "old-6.json" in names


def test_signals_of_the_terminal_do_not_end_the_guardian(driver: Driver) -> None:
    running = driver(CHAIN)
    for signum in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        send(running.guardian, signum)
    assert running.ask("guardian")["guardian"] == running.guardian.pid
    assert is_alive(running.guardian)
    running.kill_and_wait()
    assert running.marks.read_text().split("\n") == ["a stop", "b stop", "c stop", ""]


def next_guardian(running: Running) -> Process:
    """Wait until the driver has replaced its guardian, which is told to nobody."""
    due = time.monotonic() + WAIT_S
    while (pid := running.ask("guardian")["guardian"]) == running.guardian.pid:
        assert time.monotonic() < due
        time.sleep(0.01)
    return known(pid)


def test_a_killed_guardian_is_replaced_and_told_everything(driver: Driver) -> None:
    running = driver(CHAIN)
    send(running.guardian, signal.SIGKILL)
    running.guardian = next_guardian(running)
    assert running.marks.read_text() == ""
    running.kill_and_wait()
    assert running.marks.read_text().split("\n") == ["a stop", "b stop", "c stop", ""]
    assert running.ends() == {"a": "stopped", "b": "stopped", "c": "stopped"}


def test_a_forked_child_does_not_hold_the_lease(driver: Driver) -> None:
    running = driver(CHAIN)
    fork = known(running.ask("fork")["fork"])
    try:
        running.kill_and_wait()
        assert is_alive(fork)
        assert running.marks.read_text().split("\n") == ["a stop", "b stop", "c stop", ""]
    finally:
        send(fork, signal.SIGKILL)


def test_a_driver_that_is_stopped_is_not_dead(driver: Driver) -> None:
    running = driver(CHAIN)
    send(known(running.program.pid), signal.SIGSTOP)
    assert is_alive(running.guardian)
    send(known(running.program.pid), signal.SIGCONT)
    assert running.ask("guardian")["guardian"] == running.guardian.pid
    assert running.marks.read_text() == ""


def test_after_the_end_of_the_last_job_nothing_is_there(driver: Driver) -> None:
    running = driver(CHAIN)
    assert running.ask("end") == {"ended": 1}
    assert not is_alive(running.guardian)
    assert not running.folder.exists()
    assert list(running.folder.parent.iterdir()) == []
    assert not running.state.exists()


@pytest.mark.parametrize("with_guardian", [False, True], ids=["driver", "both"])
@pytest.mark.parametrize("step", range(1, 8))
def test_a_driver_that_is_killed_at_any_step_of_a_start_leaves_nothing(
    environment: dict[str, str], tmp_path: Path, step: int, with_guardian: bool
) -> None:
    """Before and after each line of the journal, and between a process and its line."""
    (tmp_path / "marks").touch()
    order = {"services": CHAIN[:2], "marks": str(tmp_path / "marks"), "dies_at": step, "with_guardian": with_guardian}
    done = subprocess.run([sys.executable, str(PROGRAM), json.dumps(order)], env=environment, stdout=subprocess.PIPE)
    assert done.returncode == -signal.SIGKILL
    told = json.loads(done.stdout)
    due = time.monotonic() + WAIT_S
    while with_guardian and run_folder.stale_folders(os.path.dirname(told["folder"])):
        # A guardian that is just being killed still holds its lock.
        run_folder.reap_folder(told["folder"], print)
        assert time.monotonic() < due
    wait_gone(Path(told["folder"]))
    assert with_cookie(told["cookie"]) == set()
    reports = tmp_path / "state" / "reports"
    assert reports.exists() == (step > 1)
    if step > 1:
        assert json.loads((reports / "job-1.json").read_text())["state"] == "lost"


def test_the_next_guard_sees_to_what_a_double_death_left(driver: Driver) -> None:
    dead = driver([{"name": "a", "kind": "family"}])
    stale(dead)
    wait_end(dead.processes[0])  # by itself, as it lost both
    assert dead.alive() == dead.pids[1:]
    assert dead.folder.exists()
    following = driver([])
    for one in dead.processes:
        wait_end(one)
    wait_gone(dead.folder)
    assert dead.ends() == {"a": "lost"}
    assert is_alive(following.guardian)


def test_services_stop_by_themselves_after_a_double_death(driver: Driver) -> None:
    dead = driver([{"name": "a", "kind": "good"}])
    stale(dead)
    wait_end(dead.processes[0])
    assert dead.marks.read_text() == "a alone\n"


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can mount a file system")
def test_a_full_disk_keeps_nothing_alive(driver: Driver, tmp_path: Path) -> None:
    """Neither the journal, nor the log, nor the report can be written."""
    tiny = tmp_path / "tiny"
    tiny.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", str(tiny)], capture_output=True)
    if mounted.returncode:
        pytest.skip(f"cannot mount: {mounted.stderr.decode()}")
    try:
        running = driver(
            [{"name": "full disk", "kind": "full", "path": str(tiny / "full")}, *CHAIN],
            environment={"TMPDIR": str(tiny), "SAGE_STATE_DIR": str(tiny / "state")},
        )
        assert b'"entry":"run"' in (running.folder / "journal.jsonl").read_bytes()
        assert b'"process"' not in (running.folder / "journal.jsonl").read_bytes()
        running.kill_and_wait()
        assert running.marks.read_text().split("\n") == ["a stop", "b stop", "c stop", ""]
        assert running.alive() == []
    finally:
        subprocess.run(["umount", "-l", str(tiny)], check=True)


def test_a_premade_folder_of_runs_is_refused(environment: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tempfile.tempdir", environment["TMPDIR"])
    os.mkdir(runs_folder())
    os.chmod(runs_folder(), 0o777)
    with pytest.raises(ServiceError, match="can be entered by others") as caught:
        GuardianLease.acquire()
    assert "TMPDIR" in caught.value.__notes__[0]
    with pytest.raises(PermissionError):
        run_folder.stale_folders(runs_folder())


def lines(*specs: tuple[str, tuple[str, ...]]) -> list[ServiceLine]:
    return [ServiceLine("j", name, 1, requires=requires) for name, requires in specs]


def test_which_services_wait_for_which() -> None:
    before = followers(lines(("c", ()), ("b", ("c",)), ("a", ("b",)), ("x", ())))
    named = {key[1]: {other[1] for other in others} for key, others in before.items()}
    assert named == {"c": {"a", "b"}, "b": {"a"}, "a": set(), "x": set()}
    before = followers(lines(("c", ()), ("b", ()), ("a", ())))
    named = {key[1]: {other[1] for other in others} for key, others in before.items()}
    assert named == {"c": {"a", "b"}, "b": {"a"}, "a": set()}


def test_what_was_seen_changes_only_what_it_has_to() -> None:
    seen = {("j", "c", "a"), ("other", "b", "a")}
    before = followers(lines(("c", ()), ("b", ()), ("a", ())), seen)
    named = {key[1]: {other[1] for other in others} for key, others in before.items()}
    assert named == {"b": set(), "c": {"b"}, "a": {"b", "c"}}
    before = followers(lines(("c", ()), ("b", ("c",)), ("a", ())), seen)
    named = {key[1]: {other[1] for other in others} for key, others in before.items()}
    assert named == {"b": set(), "c": {"b"}, "a": {"b", "c"}}


def test_what_is_shared_ends_after_all_who_share_it() -> None:
    services = [
        ServiceLine(job, name, 1)
        for job, name in (("owner", "store"), ("j", "store"), ("j", "agent"), ("k", "store"), ("x", "store"))
    ]
    before = followers(services, (), {("j", "store"): "owner", ("k", "store"): "owner"})
    assert before["owner", "store", 1] == {("j", "store", 1), ("j", "agent", 1), ("k", "store", 1)}
    assert before["x", "store", 1] == set()


@given(st.lists(st.sets(st.integers(0, 11)), max_size=12), st.booleans())
def test_every_service_gets_its_turn(requirements: list[set[int]], has_circles: bool) -> None:
    """Whatever a journal says, the order comes to its end; those that depend on a service are before it."""
    specs = [
        (str(place), tuple(str(other) for other in others if has_circles or other < place))
        for place, others in enumerate(requirements)
    ]
    services = lines(*specs)
    before = followers(services)
    ends = StopOrder(services, {}).run()
    assert {key: end.state for key, end in ends.items()} == dict.fromkeys(before, "lost")
    if not has_circles:
        places = {key: place for place, key in enumerate(ends)}
        assert all(places[other] < places[key] for key, others in before.items() for other in others)


def test_a_guard_is_counted(environment: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tempfile.tempdir", environment["TMPDIR"])
    first, second = GuardianLease.acquire(), GuardianLease.acquire()
    assert first is second
    pid = known(first.guardian_pid)
    first.release()
    assert is_alive(pid)
    second.release()
    assert not is_alive(pid)
    assert os.listdir(runs_folder()) == []
    third = GuardianLease.acquire()
    assert third.cookie != first.cookie
    third.release()


def test_the_next_guardian_gets_no_file_of_the_program(
    environment: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """One that has got the number of the guard socket of a service, which the program has closed."""
    monkeypatch.setattr("tempfile.tempdir", environment["TMPDIR"])
    guard = GuardianLease.acquire()
    ours, guarded = socket.socketpair()
    theirs, far = socket.socketpair()
    with guarded, far:
        try:
            number = ours.detach()
            guard.give(("j1", "a", 1), number)
            with theirs:
                os.dup2(theirs.fileno(), number)
            first = guard.guardian_pid
            os.kill(first, signal.SIGKILL)
            due, pause = time.monotonic() + WAIT_S, threading.Event()
            while guard.guardian_pid == first:
                assert time.monotonic() < due
                pause.wait(0.01)
            os.close(number)
            far.settimeout(WAIT_S)
            assert far.recv(1) == b""
        finally:
            guard.release()


def test_what_is_left_of_a_service_does_not_count_what_it_released(
    environment: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """While the driver lives."""
    monkeypatch.setattr("tempfile.tempdir", environment["TMPDIR"])
    job = JobJournal("job-1", "demo", None, ())
    cookie = job.announce("a", 1, "process", [])
    sleeper = [sys.executable, "-c", "import signal; signal.pause()"]
    child_environment = {**environment, COOKIE_VARIABLE: cookie}
    with (
        subprocess.Popen(sleeper, env=child_environment) as own,
        subprocess.Popen(sleeper, env=child_environment) as daemon,
    ):
        job.started("a", 1, own.pid)
        assert job.left_of(cookie) == {known(own.pid), known(daemon.pid)}
        job.claim("a", {"claim": "release", "pid": daemon.pid})
        assert job.left_of(cookie) == {known(own.pid)}
        assert end_all(lambda: job.left_of(cookie)).left == set()
        assert own.wait() == -signal.SIGTERM
        daemon.kill()
    job.sealed()
    assert GuardianLease._current is None


def test_the_guardian_needs_only_the_standard_library(tmp_path: Path) -> None:
    source = Path(guardian.__file__)
    names = "print(json.dumps([name for name in sys.modules if name.split('.')[0] == 'sage']))"
    path = f"import json, sys, runpy; sys.path.append({str(source.parents[2])!r})"
    script = f"{path}; runpy.run_path({str(source)!r}); {names}"
    shown = subprocess.run([sys.executable, "-I", "-S", "-c", script], capture_output=True, text=True, check=True)
    loaded = set(json.loads(shown.stdout))
    assert loaded <= {
        "sage",
        "sage._old_paths",
        "sage._lazy",
        "sage._guardian",
        "sage._guardian.claims",
        "sage._guardian.stop_order",
        "sage._guardian.run_folder",
        "sage._guardian.after_driver_death",
        "sage._guardian.journal",
        "sage._descriptors",
        "sage._processes",
        "sage.errors",
        "sage.report",
    }
