"""The places of vector stores, what their libraries keep for the life of a process, and a model server."""

from __future__ import annotations

import sys
import threading
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from support.vector_stores import KINDS, Place, Servers, vectors_of

from sage import Cleanliness, Http, LocalEnvironment, StopSignal

if TYPE_CHECKING:
    from collections.abc import Iterator


@pytest.fixture(scope="session")
def servers(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Servers]:
    # Chroma's library and gRPC keep a few descriptors from their first use on, for all stores there will ever be.
    for kind in ("chroma", "milvus"):
        store = Place(kind, tmp_path_factory.mktemp(kind), Servers()).store()
        store.setup()
        store.upsert(["a"], vectors_of(1))
        store.search(vectors_of(1)[0])
        store.cleanup()
    servers = Servers()
    yield servers
    servers.close()


@pytest.fixture(params=KINDS)
def place(request: pytest.FixtureRequest, tmp_path: Path, servers: Servers) -> Place:
    return Place(request.param, tmp_path, servers)


@pytest.fixture(scope="session")
def server() -> Iterator[str]:
    """Return the address of a server of the OpenAI protocol that runs as a service of a job of its own."""
    env = LocalEnvironment("server")
    words = [sys.executable, str(Path(__file__).with_name("openai_server.py")), "{port}"]
    command = env.register_command("server", words, ready=Http("/health"))
    started, over = threading.Event(), threading.Event()

    def wait() -> StopSignal:
        started.set()
        over.wait()
        return StopSignal()

    env.from_source(wait).sink(lambda _: None)
    job = env.submit()
    assert started.wait(30.0)
    url: str = command.url
    yield url
    over.set()
    assert job.wait().cleanliness is Cleanliness.CLEAN
