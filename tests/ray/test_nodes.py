"""What becomes of a job when a node, or what a cluster is held together by, dies, stands still or is cut off."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from support.ray_jobs import Placed, Ticks, Told, ends, master_pid, wait_until
from support.ray_nodes import known
from support.recording_services import Notes

import sage
from sage import Cleanliness, JobError, JobErrorGroup, Outcome, RemoteEnvironment, ServiceOptions
from sage._processes import Process, process

if TYPE_CHECKING:
    from collections.abc import Iterator

    from support.ray_nodes import GivenCluster

pytestmark = pytest.mark.ray

WAIT_S = 60.0
NOTICED_S = 15.0
"""By when a job is over whose node has died: some seconds until it is noticed, and its services have to stop."""


@pytest.fixture
def running(two_nodes: GivenCluster, journal: Notes, tmp_path: Path) -> Iterator[tuple[Any, int, int]]:
    """A job with a worker and a service on each of two nodes, and the processes on the second one."""
    with running_on(two_nodes, journal, tmp_path) as running:
        yield running


@pytest.fixture
def running_apart(two_own_nodes: GivenCluster, journal: Notes, tmp_path: Path) -> Iterator[tuple[Any, int, int]]:
    """The same on a cluster of the test's own."""
    with running_on(two_own_nodes, journal, tmp_path) as running:
        yield running


def seen_by(service: Any, record: int) -> tuple[int, int]:
    return record, service.pid()


@contextmanager
def running_on(cluster: GivenCluster, journal: Notes, tmp_path: Path) -> Iterator[tuple[Any, int, int]]:
    arrived: list[int] = []
    pids: list[int] = []

    def arrive(seen: tuple[int, int]) -> None:
        arrived.append(seen[0])
        pids.append(seen[1])

    while True:
        env = RemoteEnvironment("two nodes", address=cluster.address)
        env.register_service("near", Placed, journal, options=ServiceOptions(resources={"head": 1}))
        far = env.register_service("far", Placed, journal, options=ServiceOptions(resources={"second": 1}))
        source = env.from_source(Ticks).place(resources={"head": 1})
        told = source.map(Told, tmp_path / "worker", "near", "far").place(resources={"second": 1})
        told.map(partial(seen_by, far)).sink(arrive, at="driver")
        job = env.submit()
        wait_until(lambda: len(arrived) > 10)
        if known(master_pid()) in cluster.nodes[0].processes():
            break
        # A node that has just joined may not know of the driver's, beside which Ray should place the master.
        job.cancel()
        arrived.clear()
        pids.clear()
        journal.clear()
    yield job, int((tmp_path / "worker").read_text()), pids[0]
    with suppress(JobError):
        job.cancel()


def raylet_of(cluster: GivenCluster, pid: int, *, is_there: bool) -> Process:
    """Return the raylet of the node that a process is of, or of the other one."""
    (node,) = (node for node in cluster.nodes if (known(pid) in node.processes()) is is_there)
    return node.process("raylet")


def is_over(pid: int) -> bool:
    return process(pid) is None


def failed(job: Any) -> str:
    """Return the text of what a job has failed with, all of it."""
    began_at = time.monotonic()
    with pytest.raises(JobError) as caught:
        job.wait(WAIT_S)
    assert time.monotonic() - began_at < NOTICED_S
    assert job.report.state is Outcome.FAILED
    errors = caught.value.exceptions if isinstance(caught.value, JobErrorGroup) else (caught.value,)
    return "\n".join(map(str, errors))


def test_a_job_runs_on_two_nodes(two_nodes: GivenCluster, running: tuple[Any, int, int], journal: Notes) -> None:
    """A worker and a service on each; all of it ends in order."""
    job, worker, service = running
    second = {one.pid for one in two_nodes.nodes[1].processes()}
    assert {worker, service} <= second
    job.stop()
    assert job.report.cleanliness is Cleanliness.CLEAN
    assert ends(journal) == ["far.stop", "far.cleanup", "near.stop", "near.cleanup"]
    assert process(worker) is None
    assert process(service) is None


def test_a_killed_node_fails_the_job(two_nodes: GivenCluster, running: tuple[Any, int, int], journal: Notes) -> None:
    """What ran there is lost and named, and the service of the other node is cleaned, by the same master."""
    job, worker, service = running
    for one in two_nodes.nodes[1].processes():
        with suppress(ProcessLookupError):
            os.kill(one.pid, signal.SIGKILL)
    text = failed(job)
    assert 'worker of Told was lost with "Told"' in text
    assert 'service "far" ended by itself' in text
    assert "the master of job" not in text
    assert (job.report.service("far").state, job.report.service("near").state) == ("lost", "stopped")
    assert ends(journal) == ["near.stop", "near.cleanup"]
    for pid in (worker, service):
        wait_until(partial(is_over, pid))


def test_a_killed_node_of_the_master_is_followed_by_one_elsewhere(
    two_nodes: GivenCluster, running: tuple[Any, int, int], journal: Notes
) -> None:
    """What the lost master had started on the other node is ended in order; the rest is reported as lost."""
    job, worker, service = running
    master = known(master_pid())
    for one in {master, *(two_nodes.nodes[1].processes())}:
        with suppress(ProcessLookupError):
            os.kill(one.pid, signal.SIGKILL)
    assert f'the master of job "two nodes" was lost: process {master.pid} ended by itself' in failed(job)
    assert (job.report.service("far").state, job.report.service("near").state) == ("lost", "stopped")
    assert ends(journal) == ["near.stop", "near.cleanup"]
    for pid in (worker, service):
        wait_until(partial(is_over, pid))


def test_a_node_that_stands_still_is_no_end_of_what_runs_there(
    two_nodes: GivenCluster, running: tuple[Any, int, int], journal: Notes
) -> None:
    """Its raylet is stopped and taken for dead; the job goes on, stops in order, and leaves nothing."""
    import ray

    job, worker, service = running
    raylet = raylet_of(two_nodes, master_pid(), is_there=False)
    os.kill(raylet.pid, signal.SIGSTOP)
    try:
        wait_until(lambda: sum(bool(node["Alive"]) for node in ray.nodes()) == 1)
        job.stop(timeout_s=WAIT_S)
        assert ends(journal) == ["far.stop", "far.cleanup", "near.stop", "near.cleanup"]
        for pid in (worker, service):
            wait_until(partial(is_over, pid))
    finally:
        with suppress(ProcessLookupError):
            os.kill(raylet.pid, signal.SIGCONT)
    assert job.report.service("far").state == "stopped"


def test_a_master_that_was_taken_for_dead_is_followed_and_ends(
    two_own_nodes: GivenCluster, running_apart: tuple[Any, int, int], journal: Notes
) -> None:
    """The raylet of its node stands still; the one on the other node ends each service, once."""
    job, worker, service = running_apart
    first = known(master_pid())
    raylet = raylet_of(two_own_nodes, first.pid, is_there=True)
    os.kill(raylet.pid, signal.SIGSTOP)
    try:
        with pytest.raises(JobError, match='the master of job "two nodes" was lost'):
            job.wait(WAIT_S)
        assert ends(journal) == ["far.stop", "far.cleanup", "near.stop", "near.cleanup"]
        for pid in (first.pid, worker, service):
            wait_until(partial(is_over, pid))
    finally:
        with suppress(ProcessLookupError):
            os.kill(raylet.pid, signal.SIGCONT)


def test_without_its_gcs_a_job_is_ended_in_order(
    two_own_nodes: GivenCluster, running_apart: tuple[Any, int, int], journal: Notes
) -> None:
    """Ray would end every process after a minute; the job is over before, with every service cleaned."""
    job, worker, service = running_apart
    os.kill(two_own_nodes.nodes[0].process("gcs_server").pid, signal.SIGKILL)
    assert "does not answer" in failed(job)
    assert ends(journal) == ["far.stop", "far.cleanup", "near.stop", "near.cleanup"]
    for pid in (worker, service):
        wait_until(partial(is_over, pid))
    assert job.report.service("far").state == "stopped"


PROGRAM = """
import os, signal, sys, threading, time
import ray
from sage._ray.connection import cluster

gcs = int(sys.argv[2])
with cluster(sys.argv[1]):
    assert ray.get(ray.put(1)) == 1
    os.kill(gcs, signal.SIGKILL)
    time.sleep(65)
print("goes on")
"""


@pytest.mark.proof
def test_a_program_that_has_lost_its_gcs_goes_on(two_own_nodes: GivenCluster) -> None:
    """Ray itself ends every program after a minute, wherever it stands, and even while it disconnects."""
    gcs = two_own_nodes.nodes[0].process("gcs_server").pid
    environment = {**os.environ, "PYTHONPATH": str(Path(sage.__file__).parents[1])}
    words = [sys.executable, "-c", PROGRAM, two_own_nodes.address, str(gcs)]
    done = subprocess.run(words, env=environment, capture_output=True, text=True, timeout=200)
    assert done.stdout == "goes on\n", done.stderr
