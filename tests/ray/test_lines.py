"""Promises whose own tests look at the process of the job, shown on a cluster by the results that arrive."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from support.ray_jobs import ends
from support.recording_services import Notes, Recorded

import sage
from sage import (
    BaseService,
    FunctionError,
    GraphError,
    JobError,
    JobErrorGroup,
    MapFunction,
    RemoteEnvironment,
    ServiceOptions,
    ServiceTimeoutError,
    UnknownServiceError,
)

if TYPE_CHECKING:
    from support.ray_nodes import GivenCluster

pytestmark = [pytest.mark.ray, pytest.mark.usefixtures("no_actor_is_left")]

PROGRAM = """
import sys
from pathlib import Path
from support.recording_services import Notes, Recorded
from sage import RemoteEnvironment

env = RemoteEnvironment("script", address=sys.argv[2])
memory = env.register_service("memory", Recorded, Notes(Path(sys.argv[1]) / "journal"))
env.from_batch([1, 2, 3]).map(memory.process).sink(print)
env.submit(autostop=True)
"""


def test_a_script_whose_last_statement_is_submit(
    ray_address: str, given: GivenCluster, journal: Notes, tmp_path: Path
) -> None:
    """It ends with exit code 0 when the service was cleaned, once."""
    program = tmp_path / "program.py"
    program.write_text(PROGRAM)
    folders = [str(Path(sage.__file__).parents[1]), str(Path(__file__).parents[1])]
    environment = {**os.environ, **given.variables, "PYTHONPATH": os.pathsep.join(folders)}
    words = [sys.executable, str(program), str(tmp_path), ray_address]
    done = subprocess.run(words, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert ends(journal) == ["memory.stop", "memory.cleanup"]


class NotOpening(MapFunction):
    """Raises in `open`."""

    def open(self) -> None:
        raise OSError("no such model")

    def execute(self, data: int) -> int:
        return data


def test_a_function_that_cannot_start_fails_the_job(ray_address: str, journal: Notes) -> None:
    """Submit raises it as the cause, and the service is cleaned."""
    env = RemoteEnvironment("open", address=ray_address)
    env.register_service("memory", Recorded, journal)
    arrived: list[int] = []
    env.from_batch([1]).map(NotOpening).sink(arrived.append)
    with pytest.raises(FunctionError, match="no such model") as caught:
        env.submit(autostop=True)
    assert isinstance(caught.value.__cause__, OSError)
    assert arrived == []
    assert ends(journal) == ["memory.stop", "memory.cleanup"]


def test_what_is_unknown_is_named(ray_address: str) -> None:
    """At submit where it can be seen there, else by an error that lists what is known."""
    env = RemoteEnvironment("unknown", address=ray_address)
    memory: Any = env.register_service("memory", Sleeping)
    env.from_batch([1]).map(memory.recal).sink(abs)
    with pytest.raises(GraphError, match='uses "recal" of service "memory", which it lacks'):
        env.submit(autostop=True)

    class Calls(MapFunction):
        def __init__(self, service: str, method: str) -> None:
            self.asked = service, method

        def execute(self, data: int) -> Any:
            service, method = self.asked
            return self.call_service(service, data, method=method)

    for asked, message in ((("memry", "process"), "memory"), (("memory", "recal"), "nap")):
        env = RemoteEnvironment("unknown", address=ray_address)
        env.register_service("memory", Sleeping)
        env.from_batch([1]).map(Calls, *asked).sink(abs)
        with pytest.raises(FunctionError) as caught:
            env.submit(autostop=True)
        assert isinstance(caught.value.__cause__, UnknownServiceError)
        told = "\n".join([str(caught.value.__cause__), *caught.value.__cause__.__notes__])
        assert asked[0] in told
        assert message in told


def fails_together(folder: Path) -> Any:
    """Return a function that waits until two tasks are in it, then raises."""

    def fail(number: int) -> int:
        (folder / f"at{number}").touch()
        while len(list(folder.glob("at*"))) < 2:
            os.sched_yield()
        raise ValueError(f"wrong {number}")

    return fail


def test_two_tasks_that_fail_at_once_are_both_told(ray_address: str, tmp_path: Path) -> None:
    """Each in a process of its own; both errors are in the group."""
    env = RemoteEnvironment("two", address=ray_address, workers=2)
    fail = fails_together(tmp_path)
    for number in (1, 2):
        env.from_batch([number], name=f"source {number}").map(fail, name=f"fail {number}").place(num_cpus=0.1).sink(abs)
    with pytest.raises(JobErrorGroup) as caught:
        env.submit(autostop=True)
    told = "\n".join(map(str, caught.value.exceptions))
    assert "wrong 1" in told
    assert "wrong 2" in told


class Sleeping(BaseService):
    """Sleeps, and says when."""

    def nap(self, seconds: float) -> tuple[float, float]:
        began_at = time.monotonic()
        time.sleep(seconds)
        return began_at, time.monotonic()

    def process(self, data: Any) -> Any:
        return data


class Naps(MapFunction):
    """Starts several naps, and waits for all."""

    def execute(self, data: tuple[int, float]) -> list[tuple[float, float]]:
        count, seconds = data
        futures = [self.call_service_async("sleeping", seconds, method=Sleeping.nap.__name__) for _ in range(count)]
        return [future.result() for future in futures]


@pytest.mark.parametrize(("concurrency", "together"), [(1, 1), (4, 4)])
def test_as_many_calls_run_at_once_as_were_declared(ray_address: str, concurrency: int, together: int) -> None:
    """No more and no fewer, whoever calls."""
    env = RemoteEnvironment("naps", address=ray_address)
    env.register_service("sleeping", Sleeping, options=ServiceOptions(concurrency=concurrency))
    arrived: list[list[tuple[float, float]]] = []
    env.from_batch([(8, 0.25)]).map(Naps).sink(arrived.append)
    env.submit(autostop=True)
    (spans,) = arrived
    assert max(sum(began <= at < ended for began, ended in spans) for at, _ in spans) == together


class Impatient(MapFunction):
    """Gives up on a nap, then calls again."""

    def execute(self, data: float) -> list[Any]:
        began_at = time.monotonic()
        with pytest.raises(ServiceTimeoutError) as caught:
            self.call_service("sleeping", data, method="nap", timeout=0.5)
        waited_s = time.monotonic() - began_at
        return [isinstance(caught.value, TimeoutError), waited_s, self.call_service("sleeping", "later")]


def test_a_late_answer_is_dropped(ray_address: str) -> None:
    """The caller has its time-out in time, and the next answer is the right one."""
    env = RemoteEnvironment("late", address=ray_address)
    env.register_service("sleeping", Sleeping, options=ServiceOptions(concurrency=2))
    arrived: list[list[Any]] = []
    env.from_batch([1.5]).map(Impatient).sink(arrived.append)
    env.submit(autostop=True)
    ((is_timeout, waited_s, later),) = arrived
    assert is_timeout
    assert 0.5 <= waited_s < 1.0
    assert later == "later"


class Many(MapFunction):
    """Has a hundred calls on their way, and waits for the first fifty."""

    def execute(self, data: int) -> list[int]:
        futures = [self.call_service_async("sleeping", number + data) for number in range(100)]
        return [future.result() for future in futures[:50]]


def test_a_hundred_calls_on_their_way(ray_address: str) -> None:
    """Those that are waited for are right, and none of the others hangs the end."""
    env = RemoteEnvironment("many", address=ray_address)
    env.register_service("sleeping", Sleeping, options=ServiceOptions(concurrency=None))
    arrived: list[list[int]] = []
    env.from_batch([1]).map(Many).sink(arrived.append)
    try:
        env.submit(autostop=True)
    except JobError as error:
        raise AssertionError(str(error)) from error
    assert arrived == [list(range(1, 51))]
