"""The vector stores that the tests run on, each with its real engine."""

from __future__ import annotations

import sys
import threading
import uuid
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from sage import LocalEnvironment, Port
from sage.services.vectors.chroma import ChromaStore, chroma_command
from sage.services.vectors.milvus import MilvusStore
from sage.services.vectors.numpy import NumpyStore
from sage.services.vectors.sqlite import SqliteStore
from sage.testing import assert_clean

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from numpy.typing import NDArray

    from sage.services.vectors.contract import VectorStore

KINDS = ("numpy", "sqlite", "chroma", "chroma server", "milvus", "milvus server")
KEPT = ("sqlite", "chroma", "milvus")
"""Those that keep their data in a path of this machine."""

CLASSES: dict[str, type[VectorStore]] = {
    "numpy": NumpyStore,
    "sqlite": SqliteStore,
    "chroma": ChromaStore,
    "milvus": MilvusStore,
}
MILVUS_SERVER = [
    str(Path(sys.executable).with_name("milvus-lite")),
    *("server", "--data-dir", "{folder}", "--host", "127.0.0.1", "--port", "{port}"),
]
START_S = 60.0


class Servers:
    """Servers that are command services of one job, which runs as long as the tests need them."""

    def __init__(self) -> None:
        self._environments: list[LocalEnvironment] = []
        self._urls: dict[str, str] = {}

    def url(self, kind: str) -> str:
        """Return the address of a server, which is started by the first who asks."""
        if kind not in self._urls:
            env = LocalEnvironment(kind)
            is_up = threading.Event()
            self._environments.append(env)
            if kind == "chroma server":
                server = env.register_command("server", **chroma_command())
            else:
                server = env.register_command("server", MILVUS_SERVER, ready=Port())

            def note() -> int:
                is_up.set()
                return 1

            env.from_source(note, delay=0.05).sink(int)
            env.submit()
            if not is_up.wait(START_S):
                raise TimeoutError(kind)
            self._urls[kind] = server.url
        return self._urls[kind]

    def close(self) -> None:
        for env in self._environments:
            env.close()


class Place:
    """Where the stores of one test keep their data: opened again, a store finds what was there."""

    def __init__(self, kind: str, folder: Path, servers: Servers) -> None:
        self.kind = kind
        self.path = folder / "store.db"
        self.name = f"c{uuid.uuid4().hex}"
        self._servers = servers

    @property
    def arguments(self) -> tuple[type[VectorStore], dict[str, Any]]:
        """The class, and what its constructor is given."""
        settings: dict[str, Any] = {"collection": self.name}
        match self.kind:
            case "numpy":
                return NumpyStore, settings
            case "chroma server":
                return ChromaStore, settings | {"url": self._servers.url(self.kind)}
            case "milvus server":
                return MilvusStore, settings | {"uri": self._servers.url(self.kind)}
        return CLASSES[self.kind], settings | {"path": self.path}

    def store(self, **settings: Any) -> VectorStore:
        """Return a store that is not open."""
        chosen, given = self.arguments
        return chosen(**{**given, **settings})

    @contextmanager
    def opened(self, **settings: Any) -> Iterator[VectorStore]:
        """Open a store, close it, and look at what is left then."""
        store = self.store(**settings)
        with assert_clean(ignore=["shared memory *"]):
            try:
                store.setup()
                yield store
            finally:
                store.cleanup()


def vectors_of(count: int, dimension: int = 8, seed: int = 0) -> NDArray[np.float32]:
    return np.random.default_rng(seed).normal(size=(count, dimension)).astype(np.float32)


def ids_of(count: int, first: int = 0) -> list[str]:
    return [f"id{number}" for number in range(first, first + count)]


def wait_for(condition: Callable[[], bool], what: str) -> None:
    """Poll until something holds."""
    for _ in range(3_000):
        if condition():
            return
        threading.Event().wait(0.01)
    raise TimeoutError(what)
