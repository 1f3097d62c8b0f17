"""The command `sage cluster`, and who uses the Ray that it keeps."""

from __future__ import annotations

import json
import os
import signal
import stat
import subprocess
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from sage import JobError, ServerUnreachableError
from sage._processes import Grace, Process, is_alive, wait_gone, with_cookie
from sage._ray.connection import cluster
from sage._ray.kept_cluster import kept_cluster
from sage.testing import assert_clean

if TYPE_CHECKING:
    from collections.abc import Iterator

    from sage._ray.kept_cluster import KeptCluster

SAGE = Path(sys.executable).with_name("sage")
BOUND_S = 30.0

USE = """
import json, sys
from sage._ray.connection import cluster
import ray
found = []
for address in [None, *sys.argv[1:]]:
    with cluster(address) as connected:
        assert ray.get(ray.put(1)) == 1
        found.append(connected.address)
print(json.dumps(found))
"""


def sage(*words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([SAGE, "cluster", *words], capture_output=True, text=True, timeout=200)


def processes_of(warm: KeptCluster) -> set[Process]:
    return with_cookie(warm.cookie.rpartition(":")[2]) | {warm.keeper}


def wait_ended(processes: set[Process]) -> set[Process]:
    grace = Grace(time.monotonic() + BOUND_S)
    try:
        wait_gone(processes, grace)
    finally:
        grace.close()
    return {one for one in processes if is_alive(one)}


@pytest.fixture(autouse=True)
def own_folder(short_folder: Path) -> Iterator[Path]:
    """Let these tests keep a Ray of their own, whatever this user keeps, and end it whatever happens."""
    with assert_clean(ignore=("temporary *", "shared memory *", "file descriptor *")):
        yield short_folder
        sage("down")


def test_it_is_kept_until_it_is_ended(own_folder: Path) -> None:
    up = sage("up")
    address = up.stdout.strip()
    assert (up.returncode, up.stderr) == (0, 'RemoteEnvironment(address="warm") uses it, and so does this address.\n')
    warm = kept_cluster()
    assert warm is not None
    assert warm.address == address
    processes = processes_of(warm)
    assert len(processes) > 4
    state = own_folder / f"sage-{os.geteuid()}" / "cluster.json"
    assert stat.S_IMODE(state.stat().st_mode) == 0o600
    assert sage("up").stdout == up.stdout
    status = dict(line.split(maxsplit=1) for line in sage("status").stdout.splitlines())
    assert status["address"] == address
    assert status["nodes"].startswith("1: ")
    assert status["CPUs"].startswith(f"{os.cpu_count()}, ")
    assert status["memory"].endswith("GiB free")
    assert status["since"].endswith(f"kept by process {warm.keeper.pid}")
    assert status["folder"] == warm.folder
    # A program that asks for nothing has a Ray of its own beside it, and its end does not end this one.
    environment = {**os.environ, "RAY_ADDRESS": address}
    done = subprocess.run([sys.executable, "-c", USE, "warm", address], env=environment, capture_output=True, text=True)
    own, *asked = json.loads(done.stdout)
    assert own != address
    assert asked == [address, address]
    assert [one for one in processes if not is_alive(one)] == []
    assert sage("down").stdout == f"{address} has ended\n"
    assert [one for one in processes if is_alive(one)] == []
    assert not Path(warm.folder).exists()
    assert not Path(warm.run_folder).exists()
    assert list(state.parent.iterdir()) == []


@pytest.mark.parametrize("how", ["keeper", "keeper and guardian"])
def test_down_finds_what_a_killed_keeper_left(own_folder: Path, how: str) -> None:
    sage("up")
    warm = kept_cluster()
    assert warm is not None
    processes = processes_of(warm)
    if how == "keeper and guardian":
        for pid in Path(f"/proc/{warm.keeper.pid}/task/{warm.keeper.pid}/children").read_text().split():
            if b"guardian.py" in Path(f"/proc/{pid}/cmdline").read_bytes():
                os.kill(warm.keeper.pid, signal.SIGSTOP)  # it would start another one
                os.kill(int(pid), signal.SIGKILL)
    os.kill(warm.keeper.pid, signal.SIGKILL)
    if how == "keeper":
        assert wait_ended(processes) == set()
    assert wait_ended({warm.keeper}) == set()
    assert kept_cluster() is None
    assert sage("status").stdout == "no cluster is kept\n"
    assert sage("down").stdout == f"{warm.address} has ended\n"
    assert [one for one in processes if is_alive(one)] == []
    assert list((own_folder / f"sage-{os.geteuid()}").iterdir()) == []


def test_without_one() -> None:
    status = sage("status")
    assert (status.returncode, status.stdout) == (1, "no cluster is kept\n")
    assert sage("down").stdout == "no cluster is kept\n"
    with pytest.raises(ServerUnreachableError, match="no cluster is kept warm") as caught, cluster("warm"):
        pass
    assert caught.value.__notes__ == ["Start one: sage cluster up"]


def test_one_that_cannot_start_says_why(own_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", str(own_folder))
    (own_folder / "ray").mkdir()
    (own_folder / "ray" / "__init__.py").touch()  # a Ray in which nothing is
    up = sage("up")
    assert up.returncode == 1
    assert "the local Ray cannot be started: ray start exited with code 1\nThe end of its output:" in up.stderr
    assert list((own_folder / f"sage-{os.geteuid()}").iterdir()) == []


def test_a_folder_that_is_not_safe_is_refused(own_folder: Path) -> None:
    root = own_folder / f"sage-{os.geteuid()}"
    root.mkdir()
    root.chmod(0o755)
    for word in ("up", "down", "status"):
        done = sage(word)
        assert done.returncode == 1
        assert f"folder '{root}' can be entered by others" in done.stderr
    with pytest.raises((PermissionError, JobError)), cluster("warm"):
        pass
    root.chmod(0o700)
