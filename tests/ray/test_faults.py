"""What is left of a job on a cluster when one of its processes is killed, hangs or cannot be had: nothing."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from support.ray_jobs import WAIT_S, Placed, Ticks, Told, ends, master_pid, wait_until
from support.ray_nodes import known
from support.recording_services import Notes, Recorded

import sage
from sage import (
    BaseService,
    Cleanliness,
    CleanupTimeoutError,
    JobError,
    JobErrorGroup,
    Outcome,
    RemoteEnvironment,
    ServiceError,
    ServiceOptions,
)
from sage._processes import process

if TYPE_CHECKING:
    from collections.abc import Callable

    from support.ray_nodes import GivenCluster

pytestmark = [pytest.mark.ray, pytest.mark.usefixtures("no_actor_is_left")]


def running(address: str, journal: Notes, folder: Path) -> tuple[RemoteEnvironment, Any, list[int]]:
    """Return an environment whose job calls two services with each record, when the first has arrived."""
    arrived: list[int] = []
    env = RemoteEnvironment("faulty", address=address)
    for name in ("first", "second"):
        env.register_service(name, Placed, journal)
    env.from_source(Ticks).map(Told, folder / "worker", "first", "second").sink(arrived.append)
    job = env.submit()
    wait_until(lambda: bool(arrived))
    return env, job, arrived


def test_a_killed_worker_fails_the_job_and_services_are_cleaned(
    ray_address: str, journal: Notes, tmp_path: Path
) -> None:
    """The error names the worker and the task that was lost with it."""
    _, job, _ = running(ray_address, journal, tmp_path)
    os.kill(int((tmp_path / "worker").read_text()), signal.SIGKILL)
    with pytest.raises(JobError, match='worker 0 was lost with "Ticks -> Told"'):
        job.wait(WAIT_S)
    assert ends(journal) == ["second.stop", "second.cleanup", "first.stop", "first.cleanup"]
    assert job.report.state is Outcome.FAILED


def test_a_killed_service_fails_the_job_by_its_name(ray_address: str, journal: Notes, tmp_path: Path) -> None:
    """The other service is cleaned, and the one that was killed is reported as lost."""
    env, job, _ = running(ray_address, journal, tmp_path)
    pid = env._services["second"].handle.pid()
    os.kill(pid, signal.SIGKILL)
    with pytest.raises(JobErrorGroup) as caught:
        job.wait(WAIT_S)
    assert any('service "second" ended by itself' in str(error) for error in caught.value.exceptions)
    assert ends(journal) == ["first.stop", "first.cleanup"]
    assert job.report.service("second").state == "lost"


class Counting(BaseService):
    """Knows how many calls it was given."""

    def __init__(self) -> None:
        self.calls = 0

    def count(self) -> int:
        self.calls += 1
        return self.calls

    def die_once(self, path: Path) -> None:
        if not path.exists():
            path.touch()
            os.kill(os.getpid(), signal.SIGKILL)


def test_a_killed_service_is_restarted_by_its_policy(ray_address: str, tmp_path: Path) -> None:
    """The call that it was killed by fails, and those after it go to the next instance."""
    arrived: list[Any] = []
    env = RemoteEnvironment("restarted", address=ray_address)
    options = ServiceOptions(restart="on_failure", backoff_s=(0.05, 0.1))
    counting = env.register_service("counting", Counting, options=options)
    marker = tmp_path / "died"

    def call(record: int) -> int:
        if record == 3:
            counting.die_once(marker)
        return int(counting.count())

    env.from_batch(range(6)).map(call, on_error="skip").sink(arrived.append)
    job = env.submit(autostop=True)
    assert arrived == [1, 2, 3, 1, 2]
    assert job.report is not None
    assert job.report.service("counting").restarts == 1


def test_a_killed_master_is_followed_by_one_that_cleans_up(ray_address: str, journal: Notes, tmp_path: Path) -> None:
    """Fault: the next master stops the services in order, and the driver hears how it ended."""
    _, job, _ = running(ray_address, journal, tmp_path)
    worker = known(int((tmp_path / "worker").read_text()))
    os.kill(master_pid(), signal.SIGKILL)
    with pytest.raises(JobError, match='the master of job "faulty" was lost'):
        job.wait(WAIT_S)
    assert ends(journal) == ["second.stop", "second.cleanup", "first.stop", "first.cleanup"]
    assert process(worker.pid) != worker
    assert (job.report.state, job.report.cleanliness) == (Outcome.FAILED, Cleanliness.DIRTY)
    assert job.report.service("first").state == "stopped"


PROGRAM = """
import sys, time
from pathlib import Path
from support.ray_jobs import WAIT_S, Placed, Ticks, Told, ends, master_pid, wait_until
from support.ray_nodes import known
from support.recording_services import Notes, Recorded
from sage import RemoteEnvironment, SourceFunction

class Ticks(SourceFunction):
    def execute(self):
        time.sleep(0.001)
        return 1

folder, address = Path(sys.argv[1]), sys.argv[2]
env = RemoteEnvironment("killed", address=address)
a = env.register_service("a", Recorded, Notes(folder / "journal"))
b = env.register_service("b", Recorded, Notes(folder / "journal"))
env.from_source(Ticks).map(lambda x: b.process(a.process(x))).sink(lambda x: (folder / "arrived").touch())
env.submit(autostop=True)
"""


def test_a_killed_driver_leaves_nothing(ray_address: str, given: GivenCluster, journal: Notes, tmp_path: Path) -> None:
    """The cleanups run in order, and no actor is left."""
    program = tmp_path / "program.py"
    program.write_text(PROGRAM)
    folders = [str(Path(sage.__file__).parents[1]), str(Path(__file__).parents[1])]
    environment = {**os.environ, **given.variables, "PYTHONPATH": os.pathsep.join(folders)}
    driver = subprocess.Popen([sys.executable, program, tmp_path, ray_address], env=environment)
    try:
        wait_until((tmp_path / "arrived").exists)
    finally:
        driver.kill()
        driver.wait()
    wait_until(lambda: len(ends(journal)) == 4)
    assert ends(journal) == ["b.stop", "b.cleanup", "a.stop", "a.cleanup"]


class Hanging(BaseService):
    """Never ends its cleanup."""

    def process(self, data: Any) -> Any:
        return data

    def cleanup(self) -> None:
        threading.Event().wait()


def test_a_cleanup_that_hangs_is_killed_after_its_bound(ray_address: str, journal: Notes) -> None:
    """It is reported with where it stands, its process is gone, and the other service is cleaned."""
    env = RemoteEnvironment("hanging", address=ray_address)
    env.register_service("good", Recorded, journal)
    hanging = env.register_service("hanging", Hanging, options=ServiceOptions(stop_timeout_s=0.5))
    arrived: list[int] = []
    env.from_batch([1]).map(hanging.process).sink(arrived.append)
    with pytest.raises(JobErrorGroup) as caught:
        env.submit(autostop=True)
    report = env._job.report if env._job is not None else None
    assert report is not None
    assert (report.state, report.cleanliness) == (Outcome.COMPLETED, Cleanliness.DIRTY)
    assert any(
        isinstance(error, CleanupTimeoutError) and error.service == "hanging" for error in caught.value.exceptions
    )
    pid = report.service("hanging").pid
    assert pid is not None
    assert process(pid) is None
    assert ends(journal) == ["good.stop", "good.cleanup"]


class Parent(BaseService):
    """Has a child in a session of its own."""

    def setup(self) -> None:
        self.child = subprocess.Popen(["sleep", "1000"], start_new_session=True)

    def process(self, _: Any) -> int:
        return self.child.pid


def test_what_a_service_leaves_behind_is_ended(ray_address: str) -> None:
    """Fault: a child that called setsid, which Ray leaves alone, is found by its cookie."""
    env = RemoteEnvironment("parent", address=ray_address)
    parent = env.register_service("parent", Parent)
    arrived: list[int] = []
    env.from_batch([1]).map(parent.process).sink(arrived.append)
    env.submit(autostop=True)
    assert process(arrived[0]) is None


def test_a_worker_that_has_no_place_is_named(ray_address: str) -> None:
    """Eight GPUs are not there; what was started is unwound."""
    env = RemoteEnvironment("greedy", address=ray_address, start_timeout_s=12)
    env.from_batch([1]).map(abs, name="heavy").place(num_gpus=8).sink(print)
    with pytest.raises(JobError, match="worker of heavy has no place in the cluster after 12 s") as caught:
        env.submit(autostop=True)
    cause = caught.value.__cause__
    assert cause is not None
    assert "It reserves GPU 8" in cause.__notes__[0]


def test_two_jobs_at_once_have_their_own_services(ray_address: str, tmp_path: Path) -> None:
    """Under the same name, and the end of one is nothing to the other's."""
    jobs, results = [], []
    for number in (1, 2):
        arrived: list[int] = []
        env = RemoteEnvironment(f"job {number}", address=ray_address)
        counting = env.register_service("counting", Counting)
        stream = env.from_batch(range(5))
        stream.map(lambda _, counting=counting: counting.count()).sink(arrived.append)  # type: ignore[misc]
        jobs.append(env.submit())
        results.append(arrived)
    for job in jobs:
        job.wait(WAIT_S)
    assert results == [[1, 2, 3, 4, 5]] * 2


@pytest.mark.timeout(400)
def test_twenty_jobs_one_after_another_leave_nothing(
    ray_address: str, journal: Notes, actors: Callable[[], list[str]]
) -> None:
    """After each the number of actors is back to what it was."""
    for number in range(20):
        arrived: list[int] = []
        env = RemoteEnvironment(f"job {number}", address=ray_address)
        service = env.register_service("service", Recorded, journal)
        env.from_batch(range(10)).map(service.process).sink(arrived.append)
        env.submit(autostop=True)
        assert arrived == list(range(10))
        assert actors() == []
    assert list(journal).count("service.cleanup") == 20


def test_an_error_of_a_service_comes_with_its_traceback(ray_address: str) -> None:
    """The same type, and a note that shows where it was raised."""
    env = RemoteEnvironment("failing", address=ray_address)

    class Failing:
        def process(self, data: int) -> int:
            raise KeyError(f"no {data}")

    failing = env.register_service("failing", Failing)
    env.from_batch([7]).map(failing.process, name="ask").sink(print)
    with pytest.raises(JobError) as caught:
        env.submit(autostop=True)
    cause = caught.value.__cause__
    assert isinstance(cause, KeyError)
    assert cause.args == ("no 7",)
    assert any("raise KeyError" in note for note in cause.__notes__)


def test_an_inline_service_lives_in_the_driver_and_is_called_from_the_cluster(ray_address: str) -> None:
    env = RemoteEnvironment("inline", address=ray_address)
    told: list[int] = []

    class Here:
        def process(self, pid: int) -> int:
            told.append(pid)
            return os.getpid()

    here = env.register_service("here", lambda: Here(), options=ServiceOptions(host="inline"))
    arrived: list[int] = []
    env.from_batch([1, 2]).map(lambda _: here.process(os.getpid())).sink(arrived.append)
    job = env.submit(autostop=True)
    assert arrived == [os.getpid()] * 2
    assert os.getpid() not in told
    assert job.report is not None
    assert job.report.service("here").host == "inline"


def test_a_call_of_a_service_that_stopped_fails_at_once(ray_address: str) -> None:
    env = RemoteEnvironment("over", address=ray_address)
    counting = env.register_service("counting", Counting)
    env.from_batch([1]).sink(print)
    env.submit(autostop=True)
    with pytest.raises(ServiceError, match='service "counting" is not running'):
        counting.count()
