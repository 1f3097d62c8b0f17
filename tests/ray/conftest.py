"""Clusters for the tests of Ray; all of these are left out unless `-m ray` is given."""

from __future__ import annotations

import secrets
import tempfile
import time
from pathlib import Path
from shutil import rmtree
from typing import TYPE_CHECKING, Any

import pytest
from support.ray_nodes import GivenCluster

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

HERE = Path(__file__).parent
STREAMS = "test_behaviour.py"
TIMEOUT_S = 240

GONE_S = 5.0


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Mark every test of this folder; each may start several clusters, which take ten seconds on an idle machine."""
    if not config.getoption("--proof"):
        # Each of them is a job of two seconds.
        streams = {item.nodeid.partition("[")[0]: item for item in reversed(items) if item.path.name == STREAMS}
        items[:] = [item for item in items if item.path.name != STREAMS or item in streams.values()]
    for item in items:
        if HERE in item.path.parents:
            item.add_marker(pytest.mark.ray)
            item.add_marker(pytest.mark.slow)
            item.add_marker(pytest.mark.timeout(TIMEOUT_S))
    # A task in another process does not have the job manager, which is one of the ways to end a job.
    items[:] = [item for item in items if not item.nodeid.endswith("[ray-ray-cancel]")]


@pytest.fixture(scope="session")
def given() -> Iterator[GivenCluster]:
    """A cluster of one node that somebody else has started; no test may end its processes."""
    cluster = GivenCluster()
    yield cluster
    cluster.end()


@pytest.fixture
def two_nodes(given: GivenCluster, monkeypatch: pytest.MonkeyPatch) -> Iterator[GivenCluster]:
    """The same with a second node, which the test may end; each has two processors. This process is let in."""
    node = given.add_node()
    try:
        for name, value in given.variables.items():
            monkeypatch.setenv(name, value)
        yield given
    finally:
        given.remove(node)


@pytest.fixture
def two_own_nodes(monkeypatch: pytest.MonkeyPatch) -> Iterator[GivenCluster]:
    """Another cluster of two nodes, of which the test may end whatever it likes."""
    cluster = GivenCluster()
    try:
        cluster.add_node()
        for name, value in cluster.variables.items():
            monkeypatch.setenv(name, value)
        yield cluster
    finally:
        cluster.end()


@pytest.fixture(scope="module")
def ray_address(given: GivenCluster) -> Iterator[str]:
    """The address of a cluster to which this process stays connected, so that each job finds a connection."""
    from sage._ray.connection import cluster

    with pytest.MonkeyPatch.context() as patch:
        for name, value in given.variables.items():
            patch.setenv(name, value)
        with cluster(given.address):
            yield given.address


@pytest.fixture
def no_actor_is_left(ray_address: str) -> Iterator[None]:
    """See that no actor is there after a test."""
    yield
    due = time.monotonic() + GONE_S
    while (left := living_actors()) and time.monotonic() < due:
        time.sleep(0.05)
    assert not left


@pytest.fixture
def actors(ray_address: str) -> Callable[[], list[str]]:
    """Return what lists the actors that have not ended."""
    return living_actors


def living_actors() -> list[str]:
    """Return class and name of every actor that has not ended."""
    import ray._private.state as state

    actors: dict[str, dict[str, Any]] = state.actors()
    return [f"{actor['ActorClassName']} {actor['Name']}" for actor in actors.values() if actor["State"] != "DEAD"]


@pytest.fixture(scope="session", autouse=True)
def _private_temporary() -> None:
    """Let Ray have its sockets in the common folder: their paths must be short."""


@pytest.fixture
def short_folder(monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder for temporary files that nobody else has, with a name that is short enough for the sockets of Ray."""
    folder = Path(tempfile.gettempdir()) / secrets.token_hex(3)
    folder.mkdir(0o700)
    monkeypatch.setenv("TMPDIR", str(folder))
    monkeypatch.setattr(tempfile, "tempdir", None)
    yield folder
    rmtree(folder)
