"""Programs of the old import paths on a cluster: results arrive as on one machine, and the old manners hold there."""

# mypy: disable-error-code="misc,import-not-found"
from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from sage.kernel.api.remote_environment import RemoteEnvironment
from support.ray_tests import SinksHere, load

import sage

if TYPE_CHECKING:
    from support.ray_nodes import GivenCluster

pytestmark = [pytest.mark.ray, pytest.mark.usefixtures("no_actor_is_left")]

COUNTS = {"to": 4, "be": 2, **dict.fromkeys(["or", "not", "that", "is", "the", "question", "sleep", "dream"], 1)}
SQUARES = [{"result": number**2, "original": number} for number in range(1, 6)]


class OldOnRay(SinksHere, RemoteEnvironment):
    """Takes the place of the programs' `LocalEnvironment`."""

    address = ""

    def __init__(self, name: str) -> None:
        super().__init__(name, address=OldOnRay.address)


# Left out is what a program's service or pipeline changes elsewhere: its hooks, and whether a bridge is closed.
RESULTS: dict[str, Any] = {
    "hello_service_world": lambda said: said[0] == ["Good day! #2", "Good day! #1", "Good day! #0"],
    "word_count": lambda counted: counted[0] == COUNTS,
    "comap_three": lambda seen: sorted(seen)[:1] == [("login", "ann")] and len(seen) == 6,
    "join_orders": lambda joined: sorted(joined) == [("ann", "ink"), ("bob", "jam"), ("bob", "tea")],
    "feedback_loop": lambda seen: sorted(seen) == [0, 0, 0, 1, 1, 2, 2, 3, 4],
    "pipeline_as_service": lambda answers: answers[0] == [*SQUARES, {"status": "shutdown_ack"}],
    "own_pipeline_service": lambda seen: (
        [one[:3] for one in seen[0]] == [(1, "tea", True), (2, "tea", False), (3, "ink", True)]
    ),
    "failing_pipeline_service": lambda seen: (
        [one if isinstance(one, dict) else one.partition(":")[0] for one in seen]
        == [{"quotient": 4}, "ZeroDivisionError", {"quotient": 3}]
    ),
}


@pytest.mark.parametrize("name", RESULTS)
def test_a_program_gives_the_same_on_a_cluster(
    ray_address: str, name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    OldOnRay.address = ray_address
    program = load("legacy/programs", name)
    program.LocalEnvironment = OldOnRay  # type: ignore[attr-defined]
    result = program.main()
    assert RESULTS[name](result), result


PROGRAM = """
import sys, time
import ray
from sage.common.core.functions import MapFunction, SinkFunction
from sage.core.api.remote_environment import RemoteEnvironment
from sage.kernel.api.function.batch_function import BatchFunction
from sage.kernel.api.service.base_service import BaseService

ray.init(address=sys.argv[2], configure_logging=False)


class Engine(BaseService):
    def __init__(self, folder):
        self.folder = folder
        self.is_on = False

    def start_running(self):
        self.is_on = True

    def terminate(self):
        open(self.folder + "/terminated", "w").close()

    def shout(self, word):
        return word.upper() if self.is_on else "not running"


class Words(BatchFunction):
    def __init__(self):
        super().__init__()
        self.left = ["a", "b", "c"]

    def execute(self):
        return self.left.pop(0) if self.left else None


class Shout(MapFunction):
    def execute(self, data):
        self.logger.info("shouting %s", data)
        return self.call_service("engine", data, method="shout", timeout=20)


class Write(SinkFunction):
    def __init__(self, folder):
        super().__init__()
        self.folder = folder

    def execute(self, data):
        with open(self.folder + "/words", "a") as file:
            file.write(data + "\\n")


env = RemoteEnvironment("old", host="127.0.0.1", port=19001)
env.set_console_log_level("INFO")
env.register_service(service_name="engine", service_class=Engine, folder=sys.argv[1])
env.from_batch(Words).map(Shout).sink(Write, sys.argv[1])
job = env.submit(autostop=True)
print(isinstance(job, str), env.env_base_dir)
env.close()
"""


def test_a_program_of_2025_is_a_script(ray_address: str, given: GivenCluster, tmp_path: Path) -> None:
    """`ray.init` before, host and port as they stood, a service with the old hooks, loggers, and log files."""
    program = tmp_path / "program.py"
    program.write_text(PROGRAM)
    environment = {**os.environ, **given.variables, "PYTHONPATH": str(Path(sage.__file__).parents[1])}
    words = [sys.executable, str(program), str(tmp_path), ray_address]
    done = subprocess.run(words, env=environment, cwd=tmp_path, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr
    assert "Traceback" not in done.stderr
    is_text, folder = done.stdout.split()[-2:]
    assert is_text == "True"
    assert (tmp_path / "words").read_text().split() == ["A", "B", "C"]
    assert (tmp_path / "terminated").exists()
    logs = "".join(path.read_text() for path in (tmp_path / folder).rglob("*.log"))
    assert "job registered" in logs
    assert done.stderr.count("shouting") == 3, done.stderr
