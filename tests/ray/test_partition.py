"""What becomes of a job when the network between two nodes is cut: both sides end what they have, each by itself."""

from __future__ import annotations

import os
import secrets
import subprocess
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from support.ray_jobs import ends, wait_until
from support.ray_nodes import GivenCluster
from support.recording_services import Notes

import sage
from sage._processes import process

if TYPE_CHECKING:
    from collections.abc import Iterator

pytestmark = pytest.mark.ray

HOSTS = ("10.213.77.1", "10.213.77.2")
NOTICED_S = 30.0
"""By when the driver has ended: ten seconds of silence, then the end of what is on its side."""

ORPHANED_S = 70.0
"""By when the other side has ended: it hopes for another master for half a minute."""

PROGRAM = """
import os, sys, time
from pathlib import Path
from support.recording_services import Notes, Recorded
from sage import RemoteEnvironment, ServiceOptions, SourceFunction

class Ticks(SourceFunction):
    def execute(self):
        time.sleep(0.001)
        return 1

class Placed(Recorded):
    def pid(self):
        return os.getpid()

folder, address = Path(sys.argv[1]), sys.argv[2]
env = RemoteEnvironment("cut", address=address)
near = env.register_service("near", Placed, Notes(folder / "near"), options=ServiceOptions(resources={"head": 1}))
far = env.register_service("far", Placed, Notes(folder / "far"), options=ServiceOptions(resources={"second": 1}))

def note(seen):
    (folder / "new").write_text(" ".join(map(str, seen)))
    (folder / "new").rename(folder / "pids")

source = env.from_source(Ticks).place(resources={"head": 1})
source.map(lambda x: (os.getpid(), near.pid(), far.pid())).place(resources={"second": 1}).sink(note, at="driver")
env.submit(autostop=True)
"""


def ip(*words: str) -> None:
    subprocess.run(["ip", *words], check=True)


class TwoNetworks:
    """Two network namespaces with a cable between them."""

    def __init__(self) -> None:
        mark = secrets.token_hex(3)
        self.names = tuple(f"sage{mark}{side}" for side in "ab")
        one, other = self.names
        for name in self.names:
            ip("netns", "add", name)
        ip("-n", one, "link", "add", "cable", "type", "veth", "peer", "name", "cable", "netns", other)
        for name, host in zip(self.names, HOSTS, strict=True):
            ip("-n", name, "address", "add", f"{host}/24", "dev", "cable")
            for device in ("lo", "cable"):
                ip("-n", name, "link", "set", device, "up")

    def inside(self, place: int) -> tuple[str, ...]:
        """Return the words that run a command in one of them."""
        return ("ip", "netns", "exec", self.names[place])

    def cut(self) -> None:
        ip("-n", self.names[0], "link", "set", "cable", "down")

    def heal(self) -> None:
        ip("-n", self.names[0], "link", "set", "cable", "up")

    def end(self) -> None:
        for name in self.names:
            ip("netns", "delete", name)


@pytest.fixture
def networks() -> Iterator[TwoNetworks]:
    try:
        networks = TwoNetworks()
    except (OSError, subprocess.CalledProcessError) as error:
        pytest.skip(f"network namespaces need iproute2 and the right to make them: {error}")
    yield networks
    networks.end()


@pytest.fixture
def cluster(networks: TwoNetworks) -> Iterator[GivenCluster]:
    cluster = GivenCluster(hosts=HOSTS, inside=(networks.inside(0), networks.inside(1)))
    try:
        cluster.add_node()
        yield cluster
    finally:
        cluster.end()


def test_each_side_of_a_cut_ends_what_it_has(networks: TwoNetworks, cluster: GivenCluster, tmp_path: Path) -> None:
    """The job fails, services of both sides end in order, and nothing comes back with the net."""
    program = tmp_path / "program.py"
    program.write_text(PROGRAM)
    folders = [str(Path(sage.__file__).parents[1]), str(Path(__file__).parents[1])]
    environment = {**os.environ, **cluster.variables, "PYTHONPATH": os.pathsep.join(folders)}
    words = [*networks.inside(0), sys.executable, str(program), str(tmp_path), cluster.address]
    driver = subprocess.Popen(words, env=environment, stderr=subprocess.PIPE, text=True)
    try:
        wait_until((tmp_path / "pids").exists)
        networks.cut()
        cut_at = time.monotonic()
        _, errors = driver.communicate(timeout=NOTICED_S)
    finally:
        driver.kill()
        driver.wait()
    assert driver.returncode == 1, errors
    assert "was lost" in errors or "ended by itself" in errors
    assert ends(Notes(tmp_path / "near")) == ["near.stop", "near.cleanup"]
    pids = [int(pid) for pid in (tmp_path / "pids").read_text().split()]
    wait_until(lambda: all(process(pid) is None for pid in pids), cut_at + ORPHANED_S - time.monotonic())
    assert ends(Notes(tmp_path / "far")) == ["far.stop", "far.cleanup"]
    networks.heal()
    assert all(process(pid) is None for pid in pids)
