"""Commands as services of a job on two nodes: where they run, how they are reached, and how they end."""

from __future__ import annotations

import math
import os
import signal
import sys
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.request import urlopen

import pytest
from support.ray_jobs import wait_until

from sage import Cleanliness, Http, JobError, MapFunction, Outcome, RemoteEnvironment, ServiceOptions
from sage._processes import process
from sage.services import ChromaStore, chroma_command

if TYPE_CHECKING:
    from support.ray_nodes import GivenCluster

pytestmark = pytest.mark.ray

RECORDS = 30
SERVER = """
import subprocess, sys
from http.server import HTTPServer, SimpleHTTPRequestHandler
from pathlib import Path
worker = [sys.executable, "-c", "import signal; signal.pause()"]
with open(sys.argv[3], "a") as file:
    print(subprocess.Popen(worker, start_new_session=True).pid, file=file)
print("listens at", sys.argv[1], flush=True)
HTTPServer((sys.argv[1], int(sys.argv[2])), SimpleHTTPRequestHandler).serve_forever()
"""


class Fetch(MapFunction):
    """Asks the server, and kills it once in the middle."""

    def __init__(self, kills: bool) -> None:
        self._kills = kills

    def execute(self, data: int) -> tuple[int, int, str]:
        server = self.service("server")
        pid, url = server.pid, server.url
        if self._kills and data == RECORDS // 2:
            os.kill(pid, signal.SIGKILL)
            wait_until(lambda: process(pid) is None)
            wait_until(lambda: self.service("server").pid != pid)
            pid, url = server.pid, server.url
        with urlopen(url, timeout=10.0) as answer:
            return pid, answer.status, url


def is_over(pid: int) -> bool:
    return process(pid) is None


@pytest.mark.parametrize("restart", ["on_failure", "never"])
def test_a_command_runs_on_the_node_that_has_what_it_asks_for(
    two_nodes: GivenCluster, tmp_path: Path, restart: str
) -> None:
    """Called from the other node and killed there; its policy decides, and nothing of it is left on either node."""
    arrived: list[tuple[int, int, str]] = []
    env = RemoteEnvironment("commands", address=two_nodes.address)
    words = [sys.executable, "-c", SERVER, "{host}", "{port}", str(tmp_path / "workers")]
    asked = ServiceOptions(num_cpus=1, resources={"second": 1}, restart=restart, backoff_s=(0.05, 0.1))  # type: ignore[arg-type]
    env.register_command("server", words, ready=Http("/"), options=asked)
    stream = env.from_batch(range(RECORDS)).map(Fetch, kills=True).place(resources={"head": 1})
    stream.sink(arrived.append)
    if restart == "never":
        with pytest.raises(JobError, match=r'service "server" ended by itself: command .* was ended by SIGKILL'):
            env.submit(autostop=True)
    else:
        env.submit(autostop=True)
        assert len(arrived) == RECORDS
    report = env.jobmanager.jobs[env.env_uuid].report
    assert report is not None
    line = report.service("server")
    assert (line.restarts, line.state) == ((1, "stopped") if restart == "on_failure" else (0, "lost"))
    assert report.state is (Outcome.COMPLETED if restart == "on_failure" else Outcome.FAILED)
    pids = {pid for pid, _, _ in arrived}
    assert {status for _, status, _ in arrived} == {200}
    assert all(url.startswith("http://127.0.1.2:") for _, _, url in arrived)
    assert len(pids) == 1 + line.restarts
    workers = [int(word) for word in (tmp_path / "workers").read_text().split()]
    for pid in (*pids, *workers):
        assert is_over(pid)


class Remember(MapFunction):
    """Stores a vector in the Chroma server and finds it there; kills the server once in the middle."""

    def __init__(self, kills: bool) -> None:
        self._kills = kills

    def execute(self, data: int) -> tuple[int, int, str, list[str], int]:
        server = self.service("server")
        pid = server.pid
        if self._kills and data == RECORDS // 2:
            os.kill(pid, signal.SIGKILL)
            wait_until(lambda: process(pid) is None)
            wait_until(lambda: self.service("server").pid != pid)
        store = ChromaStore(url=server.url)
        store.setup()
        try:
            angle = data / RECORDS
            vector = [math.cos(angle), math.sin(angle)]
            store.upsert([f"id{data}"], [vector])
            found = [hit.id for hit in store.search(vector, 1)]
            return data, server.pid, server.url, found, store.count()
        finally:
            store.cleanup()


def chroma_processes(cluster: GivenCluster) -> set[int]:
    """Return the processes of a cluster whose command line names Chroma."""
    found = set()
    for one in cluster.processes():
        with suppress(OSError):  # it ends just now
            if b"chroma\0run" in Path(f"/proc/{one.pid}/cmdline").read_bytes():
                found.add(one.pid)
    return found


@pytest.mark.parametrize("restart", ["on_failure", "never"])
def test_a_chroma_server_runs_on_the_node_that_has_what_it_asks_for(
    two_nodes: GivenCluster, tmp_path: Path, restart: str
) -> None:
    """Asked by tasks of the other node and killed there; its policy decides, and nothing of it is left on any node."""
    pytest.importorskip("chromadb", reason="Chroma is not installed: the extra chroma")
    arrived: list[tuple[int, int, str, list[str], int]] = []
    running: list[set[int]] = []

    def note(answer: tuple[int, int, str, list[str], int]) -> None:
        arrived.append(answer)
        running.append(chroma_processes(two_nodes))

    env = RemoteEnvironment("chroma", address=two_nodes.address)
    asked = ServiceOptions(num_cpus=1, resources={"second": 1}, restart=restart, backoff_s=(0.05, 0.1))  # type: ignore[arg-type]
    env.register_command("server", **chroma_command(tmp_path / "data"), options=asked)
    stream = env.from_batch(range(RECORDS)).map(Remember, kills=True).place(resources={"head": 1})
    stream.sink(note, at="driver")
    if restart == "never":
        with pytest.raises(JobError, match=r'service "server" ended by itself: command .* was ended by SIGKILL'):
            env.submit(autostop=True)
    else:
        env.submit(autostop=True)
        assert [number for number, *_ in arrived] == list(range(RECORDS))
    assert not chroma_processes(two_nodes)
    report = env.jobmanager.jobs[env.env_uuid].report
    assert report is not None
    line = report.service("server")
    assert (line.restarts, line.state) == ((1, "stopped") if restart == "on_failure" else (0, "lost"))
    assert report.state is (Outcome.COMPLETED if restart == "on_failure" else Outcome.FAILED)
    for number, pid, url, found, count in arrived:
        assert url.startswith("http://127.0.1.2:")
        assert found == [f"id{number}"]
        assert count == number + 1  # after the kill, those from before it are there too
        assert is_over(pid)
    assert len({pid for _, pid, *_ in arrived}) == 1 + line.restarts
    assert {pid for _, pid, *_ in arrived} <= set().union(*running)


def test_a_command_ends_with_its_part_of_the_job(two_nodes: GivenCluster, tmp_path: Path) -> None:
    """If the process on its node is killed, which started it, the guardian there ends it, and all that it started."""
    arrived: list[int] = []
    env = RemoteEnvironment("commands", address=two_nodes.address)
    words = [sys.executable, "-c", SERVER, "{host}", "{port}", str(tmp_path / "workers")]
    server = env.register_command("server", words, ready=Http("/"), options=ServiceOptions(resources={"second": 1}))

    def kill_parent(_: int) -> int:
        pid: int = server.pid
        with open(f"/proc/{pid}/stat") as file:
            os.kill(int(file.read().rpartition(")")[2].split()[1]), signal.SIGKILL)
        return pid

    env.from_batch([1]).map(kill_parent).sink(arrived.append)
    with pytest.raises(JobError, match='service "server"'):
        env.submit(autostop=True)
    workers = [int(word) for word in (tmp_path / "workers").read_text().split()]
    for pid in (*arrived, *workers):
        wait_until(partial(is_over, pid))


def test_a_service_with_host_process_has_one_on_a_cluster(given: GivenCluster, monkeypatch: pytest.MonkeyPatch) -> None:
    """It has its own process there anyway."""
    for name, value in given.variables.items():
        monkeypatch.setenv(name, value)
    pids: list[tuple[int, int]] = []
    env = RemoteEnvironment("process", address=given.address)
    own = env.register_service("own", Own, options=ServiceOptions(host="process"))
    env.from_batch([1]).map(lambda _: (own.pid(), os.getpid())).sink(pids.append)
    job = env.submit(autostop=True)
    [(pid, worker)] = pids
    assert pid not in (worker, os.getpid())
    assert job.report is not None
    assert job.report.cleanliness is Cleanliness.CLEAN


class Own:
    """Says in which process it runs."""

    def pid(self) -> int:
        return os.getpid()
