"""What is left of a job whose driver or master ends while it starts: nothing, and what was built is cleaned up."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from support.ray_jobs import WAIT_S, master_pid, wait_until
from support.recording_services import Notes

import sage

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from support.ray_nodes import GivenCluster

pytestmark = [pytest.mark.ray, pytest.mark.usefixtures("no_actor_is_left")]

PROGRAM = """
import sys, time
from pathlib import Path
from support.recording_services import Notes, Recorded
from sage import RemoteEnvironment, SourceFunction

class Ticks(SourceFunction):
    def execute(self):
        time.sleep(0.001)
        return 1

class Slow(Recorded):
    def __init__(self, journal, folder):
        super().__init__(journal)
        while not (folder / "go").exists():
            time.sleep(0.01)

folder = Path(sys.argv[1])
env = RemoteEnvironment("starting", address=sys.argv[2])
env.register_service("first", Recorded, Notes(folder / "journal"))
env.register_service("second", Slow, Notes(folder / "journal"), folder)
env.from_source(Ticks).sink(lambda x: (folder / "arrived").touch())
env.submit(autostop=True)
"""


@contextmanager
def starting(folder: Path, address: str, given: GivenCluster) -> Iterator[subprocess.Popen[str]]:
    """A driver that submits a job with two services, of which the second is built once "go" exists."""
    program = folder / "program.py"
    program.write_text(PROGRAM)
    folders = [str(Path(sage.__file__).parents[1]), str(Path(__file__).parents[1])]
    environment = {**os.environ, **given.variables, "PYTHONPATH": os.pathsep.join(folders)}
    words: list[Any] = [sys.executable, program, folder, address]
    driver = subprocess.Popen(words, env=environment, stderr=subprocess.PIPE, text=True)
    try:
        yield driver
    finally:
        driver.kill()
        driver.communicate()


def at_master(actors: Callable[[], list[str]], _: Notes) -> bool:
    return any("MasterActor" in one for one in actors())


def at_service(actors: Callable[[], list[str]], _: Notes) -> bool:
    return any("service" in one for one in actors())


def at_constructor(_: Callable[[], list[str]], journal: Notes) -> bool:
    return "second.build" in journal and "first.start" in journal


PROOF = pytest.mark.proof
IN_PROOF = pytest.param(at_service, marks=PROOF)
SOON_S = [0.0, *(pytest.param(soon_s, marks=PROOF) for soon_s in (0.05, 0.1, 0.2, 0.4, 0.8, 1.5))]
SIGNALS = [(signal.SIGINT, -signal.SIGINT), pytest.param(signal.SIGTERM, 143, marks=PROOF)]


def cleaned(journal: Notes) -> list[str]:
    return sorted(line.partition(".")[0] for line in journal if line.endswith(".cleanup"))


def built(journal: Notes) -> list[str]:
    return sorted(line.partition(".")[0] for line in journal if line.endswith(".build"))


@pytest.mark.parametrize("soon_s", SOON_S)
@pytest.mark.parametrize("moment", [at_master, IN_PROOF, at_constructor])
def test_a_driver_that_is_killed(
    ray_address: str,
    given: GivenCluster,
    actors: Callable[[], list[str]],
    journal: Notes,
    tmp_path: Path,
    moment: Any,
    soon_s: float,
) -> None:
    """The master gives up by itself, whether or not it has begun."""
    with starting(tmp_path, ray_address, given) as driver:
        wait_until(lambda: moment(actors, journal))
        time.sleep(soon_s)
        driver.kill()
        (tmp_path / "go").touch()
    wait_until(lambda: not actors())
    assert cleaned(journal) == built(journal)


@pytest.mark.parametrize("soon_s", SOON_S)
@pytest.mark.parametrize(("signum", "code"), SIGNALS)
def test_a_driver_that_is_told_to_end(
    ray_address: str,
    given: GivenCluster,
    actors: Callable[[], list[str]],
    journal: Notes,
    tmp_path: Path,
    signum: int,
    code: int,
    soon_s: float,
) -> None:
    """It has the exit code of the signal and no other error, and nothing comes after its end."""
    with starting(tmp_path, ray_address, given) as driver:
        wait_until(lambda: at_master(actors, journal))
        time.sleep(soon_s)
        driver.send_signal(signum)
        (tmp_path / "go").touch()
        _, told = driver.communicate(timeout=WAIT_S)
        at_end = journal.lines()
        assert actors() == []
    assert driver.returncode == code, told
    assert "JobError" not in told
    assert cleaned(journal) == built(journal)
    assert journal.lines() == at_end


@pytest.mark.parametrize("soon_s", SOON_S)
@pytest.mark.parametrize("moment", [IN_PROOF, at_constructor])
def test_a_master_that_is_killed(
    ray_address: str,
    given: GivenCluster,
    actors: Callable[[], list[str]],
    journal: Notes,
    tmp_path: Path,
    moment: Any,
    soon_s: float,
) -> None:
    """The one that follows ends every process that was asked for, and cleans up what was built."""
    with starting(tmp_path, ray_address, given) as driver:
        wait_until(lambda: moment(actors, journal))
        time.sleep(soon_s)
        os.kill(master_pid(), signal.SIGKILL)
        (tmp_path / "go").touch()
        _, told = driver.communicate(timeout=2 * WAIT_S)
        assert 'the master of job "starting" was lost' in told
        assert cleaned(journal) == built(journal)
    wait_until(lambda: not actors())
