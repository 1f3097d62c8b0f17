"""A folder in memory for the checkpoints of random jobs: a disk would be waited for thousands of times."""

from __future__ import annotations

import tempfile
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING

import pytest
from support import brokers, object_server, postgres_server

if TYPE_CHECKING:
    from collections.abc import Iterator

HERE = Path(__file__).parent
MEMORY = pytest.StashKey[str]()


def pytest_configure(config: pytest.Config) -> None:
    """Make it before the first test of any worker, so that none takes it for something that was left meanwhile."""
    memory = Path("/dev/shm")
    whole = TemporaryDirectory(prefix="own-", dir=memory if memory.is_dir() else None)
    config.add_cleanup(whole.cleanup)
    config.stash[MEMORY] = whole.name


@pytest.hookimpl(trylast=True)
def pytest_runtest_teardown(nextitem: pytest.Item | None) -> None:
    """Stop the servers before a test of another folder: they are services of jobs, of which it may want to see none."""
    if nextitem is None or HERE not in nextitem.path.parents:
        postgres_server.stop()
        object_server.stop()
        brokers.stop()


@pytest.fixture(autouse=True)
def _temporary_in_memory(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let `simulate` have its folders there, too."""
    monkeypatch.setattr(tempfile, "tempdir", request.config.stash[MEMORY])


@pytest.fixture
def folder(request: pytest.FixtureRequest) -> Iterator[Path]:
    """Return an empty folder in memory."""
    with TemporaryDirectory(dir=request.config.stash[MEMORY]) as name:
        yield Path(name)
