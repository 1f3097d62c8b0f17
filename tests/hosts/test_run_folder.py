"""The folder of a run while others clean the folder for temporary files: nothing of a living driver is ended."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from support.guarded_drivers import CHAIN, PROGRAM, WAIT_S, Running, stale, wait_end, wait_gone

from sage._guardian import lease
from sage._guardian.journal import JOURNAL, encode, read_lines, replay
from sage._guardian.lease import GuardianLease
from sage._guardian.run_folder import driver_named, hold, make_run_folder, named_after, reap_folder, stale_folders
from sage._processes import Process, is_alive, process

SAGE = Path(sys.executable).with_name("sage")
LONG_AGO = (1, 1)


@pytest.fixture
def environment(tmp_path: Path) -> dict[str, str]:
    (tmp_path / "temporary").mkdir()
    path = os.pathsep.join(map(str, [PROGRAM.parents[2] / "src", tmp_path]))
    own = {"TMPDIR": str(tmp_path / "temporary"), "SAGE_STATE_DIR": str(tmp_path / "state"), "PYTHONPATH": path}
    return {**os.environ, **own}


@pytest.fixture
def running(tmp_path: Path, environment: dict[str, str]) -> Iterator[Running]:
    started = Running(tmp_path, {"services": CHAIN, "claims": []}, environment)
    yield started
    started.close()


def clean_journal(folder: Path) -> None:
    (folder / JOURNAL).unlink()


def clean_files(folder: Path) -> None:
    for path in folder.iterdir():
        path.unlink()


def clean_folder(folder: Path) -> None:
    shutil.rmtree(folder)


def clean_all(folder: Path) -> None:
    shutil.rmtree(folder.parent)


def replace_folder(folder: Path) -> None:
    folder.rename(folder.with_name("moved"))
    folder.mkdir(0o700)


def replace_journal(folder: Path) -> None:
    """Put the journal of a run there whose driver has died."""
    entry = json.loads(read_lines(str(folder))[0])
    (folder / JOURNAL).unlink()
    (folder / JOURNAL).write_bytes(encode({**entry, "pid": os.getpid(), "started": 1}) + b"\n")


def empty_journal(folder: Path) -> None:
    os.truncate(folder / JOURNAL, 0)


def put_a_pipe(folder: Path) -> None:
    (folder / JOURNAL).unlink()
    os.mkfifo(folder / JOURNAL)


def leave(folder: Path) -> None:
    pass


CLEANINGS = [
    leave,
    clean_journal,
    clean_files,
    clean_folder,
    clean_all,
    replace_folder,
    replace_journal,
    put_a_pipe,
]


@pytest.mark.parametrize("clean", CLEANINGS)
def test_nothing_of_a_living_driver_is_ended(
    running: Running, environment: dict[str, str], tmp_path: Path, clean: Callable[[Path], None]
) -> None:
    clean(running.folder)
    if running.folder.exists():
        os.utime(running.folder, LONG_AGO)
    collected = subprocess.run([SAGE, "gc"], env=environment, capture_output=True, text=True, timeout=WAIT_S)
    assert (collected.stdout, collected.stderr) == ("nothing is left\n", "")
    (tmp_path / "other").mkdir()
    other = Running(tmp_path / "other", {"services": [], "claims": []}, environment)
    try:
        running.ask("guardian")
        assert running.alive() == running.pids
        assert is_alive(running.guardian)
    finally:
        other.kill_and_wait()
        other.close()
    assert running.alive() == running.pids
    running.kill_and_wait()
    assert running.marks.read_text().split("\n") == ["a stop", "b stop", "c stop", ""]
    assert running.alive() == []
    assert running.report()["state"] == "lost"
    assert not running.folder.exists()


@pytest.mark.parametrize("clean", [*CLEANINGS[1:5], replace_journal, empty_journal])
def test_the_next_line_puts_everything_back(running: Running, clean: Callable[[Path], None]) -> None:
    before = replay(read_lines(str(running.folder)))
    clean(running.folder)
    running.ask("claim " + json.dumps(["a", {"claim": "path", "path": "/dev/shm/sage-none"}]))
    after = replay(read_lines(str(running.folder)))
    claims = after.jobs["job-1"].services["a", 1].claims
    assert [claim.path for claim in claims] == ["/dev/shm/sage-none"]
    claims.clear()
    assert after == before
    stale(running)  # so that nobody but the journal knows the services
    reports = reap_folder(str(running.folder), print)
    assert reports is not None
    assert [service["name"] for service in reports[0]["services"]] == ["c", "b", "a"]
    for one in running.processes:
        wait_end(one)
    wait_gone(running.folder)


def test_the_watch_puts_the_folder_back(
    environment: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tempfile.tempdir", environment["TMPDIR"])
    monkeypatch.setattr(lease, "KEEP_PAUSE_S", 0.01)
    held = GuardianLease.acquire()
    try:
        os.utime(Path(held.folder, JOURNAL), LONG_AGO)
        wait_for(lambda: Path(held.folder, JOURNAL).stat().st_mtime > LONG_AGO[1])
        shutil.rmtree(held.folder)
        wait_for(Path(held.folder, JOURNAL).exists)
        assert replay(read_lines(held.folder)).driver == process(os.getpid())
    finally:
        held.release()
    assert not os.path.exists(held.folder)


def wait_for(condition: Callable[[], bool]) -> None:
    import time

    due = time.monotonic() + WAIT_S
    while not condition():
        assert time.monotonic() < due
        time.sleep(0.005)


def test_a_journal_in_which_most_lines_no_longer_count_is_shortened(
    environment: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tempfile.tempdir", environment["TMPDIR"])
    held = GuardianLease.acquire()
    try:
        for number in range(lease.LINES_MIN):
            job = {"entry": "job", "job": f"j{number}", "name": "short", "report": None, "began_at": 1.0}
            held.note(job)
            held.note({"entry": "sealed", "job": f"j{number}"})
        run = replay(read_lines(held.folder))
        assert run.driver == process(os.getpid())
        assert len(read_lines(held.folder)) < lease.LINES_MIN + 2
        assert "j0" not in run.jobs
        assert len(run.jobs) < lease.LINES_MIN / 2
    finally:
        held.release()


def test_a_folder_that_is_held_is_left_alone_whatever_its_name_says(tmp_path: Path) -> None:
    folder = make_run_folder(str(tmp_path / "runs"))
    dead = os.path.join(os.path.dirname(folder), named_after(Process(os.getpid(), 1), 0))
    os.rename(folder, dead)
    assert stale_folders(os.path.dirname(dead)) == [dead]
    held = hold(dead)
    assert held is not None
    assert reap_folder(dead, print) is None
    held.close()
    assert reap_folder(dead, print) == []
    assert not os.path.exists(dead)


def test_a_folder_that_others_can_enter_is_left_alone(tmp_path: Path) -> None:
    folder = make_run_folder(str(tmp_path / "runs"))
    dead = os.path.join(os.path.dirname(folder), named_after(Process(os.getpid(), 1), 0))
    os.rename(folder, dead)
    os.chmod(dead, 0o755)
    assert stale_folders(os.path.dirname(dead)) == []
    assert reap_folder(dead, print) is None


def test_each_run_of_a_driver_has_a_folder_of_its_own(tmp_path: Path) -> None:
    folders = {make_run_folder(str(tmp_path / "runs")) for _ in range(50)}
    assert len(folders) == 50
    assert {driver_named(os.path.basename(folder)) for folder in folders} == {process(os.getpid())}
    assert stale_folders(str(tmp_path / "runs")) == []


@given(st.integers(1, 4_194_304), st.integers(0, 10**10), st.integers(0, 46_655))
def test_a_name_says_which_process_the_driver_is(pid: int, started: int, number: int) -> None:
    name = named_after(Process(pid, started), number)
    assert (len(name), driver_named(name)) == (16, Process(pid, started))


@pytest.mark.parametrize("name", ["", "c3", "0123456789abcdef", "r" * 15, "r2345678901234-6", "r" + "\uff12" * 15])
def test_other_names_say_nothing(name: str) -> None:
    assert driver_named(name) is None
