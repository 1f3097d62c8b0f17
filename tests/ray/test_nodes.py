"""What becomes of a job when a node, or what a cluster is held together by, dies, stands still or is cut off."""

from __future__ import annotations

import os
import signal
import time
from contextlib import suppress
from functools import partial
from typing import TYPE_CHECKING, Any

import pytest
from ray_jobs import Placed, Ticks, Told, ends, master_pid, wait_until
from ray_nodes import known
from recorded import Notes

from sage import Cleanliness, JobError, JobErrorGroup, Outcome, RemoteEnvironment, ServiceOptions
from sage._runtime.processes import Process, process

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from ray_nodes import GivenCluster

pytestmark = pytest.mark.ray

WAIT_S = 60.0
NOTICED_S = 15.0
"""By when a job is over whose node has died: some seconds until it is noticed, and its services have to stop."""


@pytest.fixture
def running(two_nodes: GivenCluster, journal: Notes, tmp_path: Path) -> Iterator[tuple[Any, int, int]]:
    """A job with a worker and a service on each of two nodes, and the processes on the second one."""
    arrived: list[int] = []
    env = RemoteEnvironment("two nodes", address=two_nodes.address)
    env.register_service("near", Placed, journal, options=ServiceOptions(resources={"head": 1}))
    far = env.register_service("far", Placed, journal, options=ServiceOptions(resources={"second": 1}))
    pids: list[int] = []

    def arrive(seen: tuple[int, int]) -> None:
        arrived.append(seen[0])
        pids.append(seen[1])

    source = env.from_source(Ticks).place(resources={"head": 1})
    told = source.map(Told, tmp_path / "worker", "near", "far").place(resources={"second": 1})
    told.map(lambda x: (x, far.pid())).sink(arrive, at="driver")
    job = env.submit()
    wait_until(lambda: len(arrived) > 10)
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
    """Acceptance 48: a worker and a service on each; all of it ends in order."""
    job, worker, service = running
    second = {one.pid for one in two_nodes.nodes[1].processes()}
    assert {worker, service} <= second
    job.stop()
    assert job.report.cleanliness is Cleanliness.CLEAN
    assert ends(journal) == ["far.stop", "far.cleanup", "near.stop", "near.cleanup"]
    assert process(worker) is None
    assert process(service) is None


def test_a_killed_node_fails_the_job(two_nodes: GivenCluster, running: tuple[Any, int, int], journal: Notes) -> None:
    """Fault 94: what ran there is lost and named, and the service of the other node is cleaned."""
    job, worker, service = running
    os.kill(two_nodes.nodes[1].process("raylet").pid, signal.SIGKILL)
    text = failed(job)
    assert 'service "far" ended by itself' in text or "was lost with" in text  # whichever is seen first
    # Its process may live long enough to stop in order; then there is perhaps nobody to look at what it left behind.
    far = job.report.service("far")
    assert far.state in ("stopped", "killed", "lost")
    assert ends(journal)[:-2] == ["far.stop", "far.cleanup"][: len(ends(journal)) - 2]
    assert ends(journal)[-2:] == ["near.stop", "near.cleanup"]
    for pid in (worker, service):
        wait_until(partial(is_over, pid))


def test_a_node_that_stands_still_is_no_end_of_what_runs_there(
    two_nodes: GivenCluster, running: tuple[Any, int, int], journal: Notes
) -> None:
    """Fault 95: its raylet is stopped and taken for dead; the job goes on, stops in order, and leaves nothing."""
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
    two_nodes: GivenCluster, running: tuple[Any, int, int], journal: Notes
) -> None:
    """Fault 95: the raylet of its node stands still; the one on the other node ends each service, once."""
    job, worker, service = running
    first = known(master_pid())
    raylet = raylet_of(two_nodes, first.pid, is_there=True)
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
    two_nodes: GivenCluster, running: tuple[Any, int, int], journal: Notes
) -> None:
    """Fault 97: Ray would end every process after a minute; the job is over before, with every service cleaned."""
    job, worker, service = running
    os.kill(two_nodes.nodes[0].process("gcs_server").pid, signal.SIGKILL)
    assert "does not answer" in failed(job)
    assert ends(journal) == ["far.stop", "far.cleanup", "near.stop", "near.cleanup"]
    for pid in (worker, service):
        wait_until(partial(is_over, pid))
    assert job.report.service("far").state == "stopped"
