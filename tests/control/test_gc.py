"""The command `sage gc`, which sees to what killed drivers and their guardians left."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from sage._guardian.journal import Journal, encode
from sage._processes import COOKIE_VARIABLE, is_alive, process

SAGE = Path(sys.executable).with_name("sage")
SLEEP = [sys.executable, "-c", "import signal; print(flush=True); signal.pause()"]


def collect(folder: Path) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "TMPDIR": str(folder)}
    return subprocess.run([SAGE, "gc"], env=environment, capture_output=True, text=True, timeout=30)


def write(folder: Path, cookie: str, pid: int, started: int, *more: dict[str, Any]) -> Path:
    """Write the journal of a run, as its driver would have left it."""
    root = folder / f"sage-{os.geteuid()}"
    root.mkdir(mode=0o700, exist_ok=True)
    run = root / cookie
    run.mkdir(mode=0o700)
    journal = Journal(str(run))
    first: dict[str, Any] = {
        "entry": "run",
        "cookie": cookie,
        "pid": pid,
        "started": started,
        "python": sys.executable,
        "path": sys.path,
        "folder": str(folder),
        "reports": str(folder / "reports"),
    }
    job = {"entry": "job", "job": f"job-{cookie}", "name": "nightly", "report": None, "began_at": 1.0}
    for entry in (first, job, *more):
        journal.write(encode(entry))
    journal.close()
    return run


def test_what_a_double_death_left_is_taken_away(tmp_path: Path) -> None:
    left = tmp_path / "left"
    left.mkdir()
    key = {"job": "job-c1", "service": "store"}
    service = {"entry": "service", **key, "incarnation": 1, "host": "process", "requires": [], "token": "t1"}
    claim = {"entry": "claim", **key, "claim": "path", "path": str(left)}
    run = write(tmp_path, "c1", os.getpid(), 1, service, claim)  # this pid, but another process
    environment = {**os.environ, COOKIE_VARIABLE: "outer:c1"}
    with subprocess.Popen(SLEEP, env=environment, stdout=subprocess.PIPE) as child:
        assert child.stdout is not None
        child.stdout.readline()
        done = collect(tmp_path)
        assert child.wait() == -signal.SIGTERM
    assert done.stdout == 'job "nightly": LOST and DIRTY; store lost\n1 runs were left\n', done.stderr
    assert done.returncode == 0
    assert not run.exists()
    assert not left.exists()
    report = json.loads((tmp_path / "reports" / "job-c1.json").read_text())
    assert (report["id"], report["state"], report["services"][0]["state"]) == ("job-c1", "lost", "lost")
    assert collect(tmp_path).stdout == "nothing is left\n"


def test_a_run_whose_driver_lives_is_left_alone(tmp_path: Path) -> None:
    own = process(os.getpid())
    assert own is not None
    run = write(tmp_path, "c2", own.pid, own.started)
    assert collect(tmp_path).stdout == "nothing is left\n"
    assert run.exists()


def test_a_folder_without_a_journal_is_of_a_driver_that_starts(tmp_path: Path) -> None:
    run = write(tmp_path, "c3", 1, 1)
    (run / "journal.jsonl").write_bytes(b'{"entry":"ru')
    assert collect(tmp_path).stdout == "nothing is left\n"
    os.utime(run, (1, 1))
    assert collect(tmp_path).stdout == "1 runs were left\n"
    assert not run.exists()


def test_the_reused_pid_of_a_service_is_never_hit(tmp_path: Path) -> None:
    with subprocess.Popen(SLEEP, stdout=subprocess.PIPE) as stranger:
        assert stranger.stdout is not None
        stranger.stdout.readline()
        one = process(stranger.pid)
        assert one is not None
        key = {"job": "job-c4", "service": "store"}
        number = {"entry": "process", **key, "incarnation": 1, "pid": one.pid, "started": 5, "stop_signal": None}
        owned = {"entry": "claim", **key, "claim": "process", "pid": one.pid, "started": 5}
        write(tmp_path, "c4", 1, 1, number, owned)
        assert "store lost" in collect(tmp_path).stdout
        assert is_alive(one)
        stranger.kill()


@pytest.mark.parametrize("kind", ["link", "open to others"])
def test_a_folder_that_is_not_safe_is_refused(tmp_path: Path, kind: str) -> None:
    root = tmp_path / f"sage-{os.geteuid()}"
    if kind == "link":
        (tmp_path / "elsewhere").mkdir(0o700)
        root.symlink_to(tmp_path / "elsewhere")
    else:
        root.mkdir()
        root.chmod(0o755)
    done = collect(tmp_path)
    assert done.returncode == 1
    assert str(root) in done.stderr
    assert "TMPDIR" in done.stderr
