"""A Ray of the tests' own, one for all of them, and what has to be gone after each."""

from __future__ import annotations

import os
import secrets
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from collections.abc import Iterator

START_S = 120.0
GONE_S = 5.0


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Leave out ways to end a job by the job manager, which a task in another process does not have."""
    items[:] = [item for item in items if not item.nodeid.endswith("[ray-ray-cancel]")]


@pytest.fixture(scope="session")
def ray_address() -> Iterator[str]:
    """Start a head with two processors and a token, connect this process to it, and end it after the last test."""
    folder = Path(tempfile.mkdtemp(prefix="sr", dir="/tmp"))  # sockets below it must not have long names
    token = folder / "token"
    token.touch(0o600)
    token.write_text(secrets.token_hex(32))
    os.environ.update({"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": str(token), "RAY_USAGE_STATS_ENABLED": "0"})
    ray: Any = pytest.importorskip("ray")  # reads the variables when it is imported
    with socket.create_server(("", 0)) as free:
        port = free.getsockname()[1]
    head = _start_head(folder, port)
    try:
        address = f"{ray.util.get_node_ip_address()}:{port}"
        ray.init(address=address, namespace="sage-tests", configure_logging=False, log_to_driver=False)
        try:
            yield address
        finally:
            ray.shutdown()
    finally:
        head.terminate()
        head.wait(30)
        shutil.rmtree(folder, ignore_errors=True)


def _start_head(folder: Path, port: int) -> subprocess.Popen[bytes]:
    log = folder / "head.log"
    program = Path(sys.executable).with_name("ray")
    options = ["--port", str(port), "--temp-dir", str(folder / "s"), "--num-cpus", "2", "--resources", '{"bolts": 2}']
    more = ["--include-dashboard", "false", "--disable-usage-stats", "--object-store-memory", "200000000", "--block"]
    with log.open("wb") as output:
        head = subprocess.Popen(
            [program, "start", "--head", *options, *more], stdin=subprocess.DEVNULL, stdout=output, stderr=output
        )
    due = time.monotonic() + START_S
    while "Ray runtime started" not in log.read_text():
        if head.poll() is not None or time.monotonic() > due:
            head.kill()
            pytest.fail(f"the head does not start:\n{log.read_text()}")
        time.sleep(0.1)
    return head


@pytest.fixture(autouse=True)
def no_actor_is_left(ray_address: str) -> Iterator[None]:
    """See that no actor is there after a test."""
    yield
    due = time.monotonic() + GONE_S
    while (left := living_actors()) and time.monotonic() < due:
        time.sleep(0.05)
    assert not left


def living_actors() -> list[str]:
    """Return class and name of every actor that has not ended."""
    import ray._private.state as state

    actors: dict[str, dict[str, Any]] = state.actors()
    return [f"{actor['ActorClassName']} {actor['Name']}" for actor in actors.values() if actor["State"] != "DEAD"]
