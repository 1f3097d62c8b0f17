"""Servers that are killed in the middle of an ingest: what was acknowledged is there when they are started again.

A Milvus server is stood in for by Milvus Lite as a server.
"""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import threading
from contextlib import contextmanager
from itertools import count
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import pytest
from services.kept import REDIS_SERVER, left_clean, needs_redis, wait_until
from support.vector_stores import MILVUS_SERVER, Servers, vectors_of

from sage.errors import ServiceError, ServiceUnavailableError
from sage.services.stores.redis import RedisKeyValue
from sage.services.vectors.chroma import ChromaStore, chroma_command
from sage.services.vectors.milvus import MilvusStore

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

ROWS = 50
BEFORE = 25
"""How many batches are stored before the server is killed, while the next ones are written."""


def ids_of(number: int) -> list[str]:
    return [f"{number}-{row}" for row in range(ROWS)]


def write_vectors(store: Any, number: int) -> None:
    store.upsert(ids_of(number), vectors_of(ROWS, 32, seed=number))


def vectors_there(store: Any, number: int) -> int:
    """Return how many rows of a batch are there, each with its own vector."""
    pairs = zip(store.get(ids_of(number)), vectors_of(ROWS, 32, seed=number), strict=True)
    found = [(entry.vector, vector) for entry, vector in pairs if entry is not None]
    assert all(np.allclose(kept, vector, atol=1e-4) for kept, vector in found)
    return len(found)


def write_values(store: Any, number: int) -> None:
    store.put_many({name: {"batch": number} for name in ids_of(number)})


def values_there(store: Any, number: int) -> int:
    found = store.get_many(ids_of(number))
    assert all(value == {"batch": number} for value in found.values())
    return len(found)


class Kind(NamedTuple):
    """A server, and a client of it."""

    words: list[str]
    client: Callable[[str], Any]
    write: Callable[[Any, int], None]
    there: Callable[[Any, int], int]


KINDS = {
    "chroma": Kind(
        [str(word).replace("{host}", "127.0.0.1") for word in chroma_command()["argv"]],
        lambda place: ChromaStore(url=f"http://{place}", timeout_s=10.0),
        write_vectors,
        vectors_there,
    ),
    "milvus": Kind(
        MILVUS_SERVER, lambda place: MilvusStore(uri=f"http://{place}", timeout_s=10.0), write_vectors, vectors_there
    ),
    "redis": Kind(
        [
            *(str(REDIS_SERVER), "--port", "{port}", "--bind", "127.0.0.1", "--dir", "{folder}"),
            *("--save", "", "--appendonly", "yes", "--appendfsync", "always"),
        ],
        lambda place: RedisKeyValue(f"redis://{place}/0"),
        write_values,
        values_there,
    ),
}


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        return int(taken.getsockname()[1])


@contextmanager
def served(kind: Kind, port: int, folder: Path) -> Iterator[subprocess.Popen[bytes]]:
    """Run a server that can be killed, on the same place each time."""
    words = [word.replace("{port}", str(port)).replace("{folder}", str(folder)) for word in kind.words]
    with subprocess.Popen(words, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, cwd=folder) as process:
        try:
            yield process
        finally:
            process.kill()


def opened(kind: Kind, port: int) -> Any:
    """Return a client, as soon as its server answers."""
    clients: list[Any] = []

    def is_up() -> bool:
        client = kind.client(f"127.0.0.1:{port}")
        try:
            client.setup()
        except ServiceUnavailableError:
            client.cleanup()
            return False
        clients.append(client)
        return True

    wait_until(is_up)
    return clients[0]


def ingest_until_killed(kind: Kind, client: Any, server: subprocess.Popen[bytes]) -> tuple[int, ServiceError]:
    """Write batches until the server is killed under one of them; return its number, and what its call raised."""
    is_time = threading.Event()

    def kill() -> None:
        is_time.wait()
        os.kill(server.pid, signal.SIGKILL)

    thread = threading.Thread(target=kill)
    thread.start()
    try:
        for number in count():
            if number == BEFORE:
                is_time.set()
            try:
                kind.write(client, number)
            except ServiceError as error:
                return number, error
        raise AssertionError
    finally:
        is_time.set()
        thread.join()


@pytest.mark.parametrize("name", ["chroma", "milvus", pytest.param("redis", marks=needs_redis)])
def test_what_was_acknowledged_is_there_again(name: str, servers: Servers, tmp_path: Path) -> None:
    kind, port = KINDS[name], free_port()
    place = f"127.0.0.1:{port}"
    with left_clean():
        with served(kind, port, tmp_path) as server:
            client = opened(kind, port)
            in_flight, error = ingest_until_killed(kind, client, server)
        assert in_flight >= BEFORE
        assert isinstance(error, ServiceUnavailableError), error
        assert place in str(error)
        assert client.health() is False
        with served(kind, port, tmp_path):
            again = opened(kind, port)
            there = [kind.there(again, number) for number in range(in_flight + 2)]
            assert there[:in_flight] == [ROWS] * in_flight
            assert there[in_flight] <= ROWS
            assert there[in_flight + 1] == 0
            assert again.count() == sum(there)
            # Who was connected before goes on too, and makes the batch whole.
            wait_until(client.health)
            kind.write(client, in_flight)
            assert kind.there(again, in_flight) == ROWS
            client.cleanup()
            again.cleanup()
