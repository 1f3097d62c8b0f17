"""The guardian of a driver that had a cluster of its own, which stands in here as plain processes."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from sage._processes import Grace, Process, is_alive, process, send, wait_gone
from sage.testing import assert_clean

BOUND_S = 20.0

# Like `ray start`, it goes and leaves processes behind, one of which, like Ray's agents, shows no environment. The
# other one is a job on the cluster: it ends itself when the driver dies, which takes a while.
LEADER = """
import os, subprocess, sys
AGENT = "import signal; signal.signal(signal.SIGTERM, signal.SIG_IGN); print(flush=True); signal.pause()"
JOB = '''
import os, sys, threading
print(flush=True)
os.read(int(sys.argv[1]), 1)
threading.Event().wait(0.5)
open(sys.argv[3], "w").close()
os.unlink(sys.argv[2])
'''
agent = subprocess.Popen([sys.executable, "-I", "-S", "-c", AGENT], env={}, stdout=subprocess.PIPE)
lease = int(sys.argv[1])
job = subprocess.Popen([sys.executable, "-c", JOB, *sys.argv[1:]], pass_fds=[lease], stdout=subprocess.PIPE)
agent.stdout.readline(), job.stdout.readline()
print(agent.pid, job.pid, flush=True)
os._exit(0)
"""

DRIVER = """
import json, os, subprocess, sys
from sage._guardian.lease import GuardianLease
from sage._processes import COOKIE_VARIABLE, process

order = json.loads(sys.argv[1])
guard = GuardianLease.acquire()
jobs = os.path.join(guard.folder, "jobs")
os.mkdir(jobs)
path = os.path.join(jobs, "job-1")
if order["bound_s"] is not None:
    with open(path, "w") as file:
        file.write(str(order["bound_s"]))
token = guard.new_token()
guard.note({"entry": "cluster", "token": token, "jobs": jobs})
read, write = os.pipe()
os.set_inheritable(read, True)
leader = subprocess.Popen(
    [sys.executable, "-c", order["leader"], str(read), path, order["mark"]],
    env={**os.environ, COOKIE_VARIABLE: f"{guard.cookie}:{token}"},
    pass_fds=[read],
    stdout=subprocess.PIPE,
    start_new_session=True,
    text=True,
)
one = process(leader.pid)
if order["noted"]:
    guard.note({"entry": "cluster started", "token": token, **one._asdict()})
pids = [int(word) for word in leader.stdout.readline().split()]
leader.wait()
if order["ended"]:
    guard.note({"entry": "cluster ended", "token": token})
print(json.dumps({"pids": pids, "folder": guard.folder, "guardian": guard.guardian_pid}), flush=True)
sys.stdin.read()
"""


class Killed(NamedTuple):
    """What was left of a driver and its cluster after the driver was killed and its guardian had done."""

    agent: Process
    job: Process
    mark: Path
    folder: Path


Kill = Callable[..., Killed]


def known(pid: int) -> Process:
    found = process(pid)
    assert found is not None
    return found


@pytest.fixture
def kill(tmp_path: Path) -> Iterator[Kill]:
    killed: list[Killed] = []

    def start(**order: Any) -> Killed:
        mark = tmp_path / "mark"
        full = {"leader": LEADER, "mark": str(mark), "bound_s": None, "noted": True, "ended": False, **order}
        environment = {**os.environ, "TMPDIR": str(tmp_path)}
        command = [sys.executable, "-c", DRIVER, json.dumps(full)]
        with subprocess.Popen(command, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as driver:
            assert driver.stdout is not None
            told = json.loads(driver.stdout.readline())
            agent, job = map(known, told["pids"])
            killed.append(Killed(agent, job, mark, Path(told["folder"])))
            guardian = known(told["guardian"])
            driver.kill()
        wait_ended(guardian)
        return killed[-1]

    # Other programs of this user have files in the same folders; those of these tests are in `tmp_path`.
    with assert_clean(ignore=("temporary *", "shared memory *")):
        yield start
        for one in killed:
            send(one.agent, signal.SIGKILL)
            send(one.job, signal.SIGKILL)
            wait_ended(one.agent, one.job)


def wait_ended(*processes: Process) -> None:
    grace = Grace(time.monotonic() + BOUND_S)
    try:
        wait_gone(processes, grace)
    finally:
        grace.close()
    assert not [one for one in processes if is_alive(one)]


@pytest.mark.parametrize("noted", [True, False])
def test_a_cluster_ends_with_its_driver(kill: Kill, noted: bool) -> None:
    """A process that shows no environment is found by its session, for which the leader has to be known."""
    left = kill(noted=noted)
    assert not is_alive(left.job)
    assert is_alive(left.agent) is not noted
    assert not left.mark.exists()
    assert not left.folder.exists()


def test_a_job_on_it_ends_itself_first(kill: Kill) -> None:
    left = kill(bound_s=BOUND_S)
    assert left.mark.exists()
    assert not is_alive(left.agent)
    assert not is_alive(left.job)
    assert not left.folder.exists()


def test_a_job_that_takes_too_long_ends_with_it(kill: Kill) -> None:
    left = kill(bound_s=0.1)
    assert not left.mark.exists()
    assert not is_alive(left.agent)
    assert not is_alive(left.job)


def test_a_session_of_a_cluster_that_has_ended_is_left_alone(kill: Kill) -> None:
    left = kill(ended=True)
    assert not is_alive(left.job)  # by its cookie
    assert is_alive(left.agent)
