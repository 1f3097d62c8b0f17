"""Clusters for the tests of Ray; all of these are left out unless `-m ray` is given."""

from __future__ import annotations

import secrets
import tempfile
from pathlib import Path
from shutil import rmtree
from typing import TYPE_CHECKING

import pytest
from ray_nodes import GivenCluster

if TYPE_CHECKING:
    from collections.abc import Iterator

HERE = Path(__file__).parent
TIMEOUT_S = 240


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark every test of this folder; each may start several clusters, which take ten seconds on an idle machine."""
    for item in items:
        if HERE in item.path.parents:
            item.add_marker(pytest.mark.ray)
            item.add_marker(pytest.mark.slow)
            item.add_marker(pytest.mark.timeout(TIMEOUT_S))


@pytest.fixture(scope="module")
def given() -> Iterator[GivenCluster]:
    """A cluster of one node that somebody else has started, for the tests of a file."""
    cluster = GivenCluster()
    yield cluster
    cluster.end()


@pytest.fixture
def two_nodes(monkeypatch: pytest.MonkeyPatch) -> Iterator[GivenCluster]:
    """A cluster of two nodes on this machine, each with two processors, that this process is let into."""
    cluster = GivenCluster()
    try:
        cluster.add_node()
        for name, value in cluster.variables.items():
            monkeypatch.setenv(name, value)
        yield cluster
    finally:
        cluster.end()


@pytest.fixture
def short_folder(monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder for temporary files that nobody else has, with a name that is short enough for the sockets of Ray."""
    folder = Path(tempfile.gettempdir()) / secrets.token_hex(3)
    folder.mkdir(0o700)
    monkeypatch.setenv("TMPDIR", str(folder))
    monkeypatch.setattr(tempfile, "tempdir", None)
    yield folder
    rmtree(folder)
