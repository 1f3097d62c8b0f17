"""The places of vector stores, and what their libraries keep for the life of a process."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
from private_temporary import _private_temporary  # noqa: F401 - pytest finds it here
from stores import KINDS, Place, Servers, vectors_of

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path


@pytest.fixture(scope="session")
def servers(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Servers]:
    # Chroma's library and gRPC keep a few descriptors from their first use on, for all stores there will ever be.
    for kind in ("chroma", "milvus"):
        store = Place(kind, tmp_path_factory.mktemp(kind), Servers()).store()
        store.setup()  # type: ignore[attr-defined]
        store.upsert(["a"], vectors_of(1))
        store.search(vectors_of(1)[0])
        store.cleanup()  # type: ignore[attr-defined]
    servers = Servers()
    yield servers
    servers.close()


@pytest.fixture(params=KINDS)
def place(request: pytest.FixtureRequest, tmp_path: Path, servers: Servers) -> Place:
    return Place(request.param, tmp_path, servers)
