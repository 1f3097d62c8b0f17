"""Clients of vector servers: tokens, nobody there, nobody who answers, a server that ends, a server of the same job."""

from __future__ import annotations

import re
import socket
import sys
import threading
import time
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import quote

import pytest
from services.token_gate import TOKEN
from support.vector_stores import MILVUS_SERVER, Servers, ids_of, vectors_of

from sage import JobError, LocalEnvironment, Port, ServiceOptions
from sage.errors import ServiceError, ServiceUnavailableError
from sage.services.vectors.chroma import ChromaStore, chroma_command
from sage.services.vectors.milvus import MilvusStore
from sage.testing import assert_clean

if TYPE_CHECKING:
    from collections.abc import Iterator

    from sage.services.vectors.contract import VectorStore

KINDS = ["chroma", "milvus"]
GATE = str(Path(__file__).with_name("token_gate.py"))
ELSEWHERE = ["shared memory *"]


def client(kind: str, url: Any, **settings: Any) -> VectorStore:
    if kind == "chroma":
        return ChromaStore(url=url, **settings)
    return MilvusStore(uri=url, **settings)


def register_server(env: LocalEnvironment, kind: str, folder: Path | None = None) -> Any:
    if kind == "chroma":
        return env.register_command("server", **chroma_command(folder))
    words = MILVUS_SERVER if folder is None else [str(folder) if word == "{folder}" else word for word in MILVUS_SERVER]
    return env.register_command("server", words, ready=Port())


@contextmanager
def running(env: LocalEnvironment, *handles: Any) -> Iterator[list[str]]:
    """Run a job as long as the block takes, and give the addresses of its servers."""
    is_up = threading.Event()

    def note() -> int:
        is_up.set()
        return 1

    with env:
        env.from_source(note, delay=0.05).sink(int)
        env.submit()
        assert is_up.wait(60.0)
        yield [handle.url for handle in handles]


@pytest.fixture(params=KINDS)
def kind(request: pytest.FixtureRequest) -> str:
    name: str = request.param
    return name


@pytest.fixture
def guarded(kind: str, servers: Servers, tmp_path: Path) -> Iterator[str]:
    """Give the address of a server that wants the token."""
    place = servers.url("chroma server") if kind == "chroma" else str(tmp_path / "data")
    env = LocalEnvironment("guarded")
    gate = env.register_command("gate", [sys.executable, GATE, kind, "{port}", place], ready=Port())
    with running(env, gate) as (url,):
        yield url


@contextmanager
def refused(store: VectorStore, error: type[ServiceError], match: str) -> Iterator[None]:
    """See that a store cannot be opened, and that nothing is left of the try."""
    with assert_clean(ignore=ELSEWHERE):
        with pytest.raises(error, match=match) as caught:
            store.setup()
        yield
        store.cleanup()
        assert store.health() is False
    assert TOKEN not in f"{caught.value!r} {caught.value.__cause__!r} {store.describe()} {store!r}"


def test_the_right_token_opens(kind: str, guarded: str) -> None:
    store = client(kind, guarded, token=TOKEN, collection=f"{kind}guarded")
    with assert_clean(ignore=ELSEWHERE):
        store.setup()
        store.upsert(ids_of(5), vectors_of(5))
        assert [hit.id for hit in store.search(vectors_of(5)[2], 1)] == ["id2"]
        assert store.health() is True
        assert TOKEN not in f"{store.describe()} {store!r}"
        store.drop(f"{kind}guarded")
        store.cleanup()


@pytest.mark.parametrize("token", [None, "root:wrong"])
def test_a_wrong_token_is_refused(kind: str, guarded: str, token: str | None) -> None:
    name = {"chroma": "Chroma", "milvus": "Milvus"}[kind]
    with refused(client(kind, guarded, token=token), ServiceError, f"{name} at {guarded} refuses the token"):
        pass


@pytest.mark.parametrize("kind", ["milvus"], indirect=True)
def test_a_name_and_a_password_in_the_address_are_a_token(kind: str, guarded: str) -> None:
    store = client(kind, guarded.replace("//", f"//{quote(TOKEN, safe=':')}@"), collection="by_address")
    with assert_clean(ignore=ELSEWHERE):
        store.setup()
        assert store.count() == 0
        store.cleanup()
    place = guarded.replace("//", "//***@")
    with refused(client(kind, guarded.replace("//", "//root:wrong@")), ServiceError, re.escape(place)):
        pass


def test_in_a_job_a_wrong_token_is_the_error_of_submit(kind: str, guarded: str) -> None:
    with assert_clean(ignore=ELSEWHERE):
        env = LocalEnvironment("wrong token")
        store = env.register_service("store", type(client(kind, guarded)), token="root:wrong", **address(kind, guarded))
        done: list[int] = []
        env.from_batch([1, 2]).map(lambda number: store.count() + number).sink(done.append)
        with pytest.raises(JobError) as caught:
            env.submit(autostop=True)
    assert "refuses the token" in str(caught.value.__cause__)
    assert 'service "store"' in str(caught.value)
    assert "root:wrong" not in str(caught.value)
    assert done == []


def address(kind: str, url: str) -> dict[str, Any]:
    return {"url": url} if kind == "chroma" else {"uri": url}


def test_nobody_is_there(kind: str) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))  # Nobody listens on it.
        url = f"http://127.0.0.1:{taken.getsockname()[1]}"
        with refused(client(kind, url, timeout_s=2.0), ServiceUnavailableError, f"{url} does not answer"):
            pass


def test_somebody_is_there_and_does_not_answer(kind: str) -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        url = f"http://127.0.0.1:{silent.getsockname()[1]}"
        began_at = time.monotonic()
        with refused(client(kind, url, timeout_s=1.0), ServiceUnavailableError, f"{url} does not answer"):
            assert time.monotonic() - began_at < 10.0


def test_a_server_that_ends_meanwhile(kind: str, tmp_path: Path) -> None:
    """Calls say so at once, and the same store finds everything when the server is there again."""
    folder = tmp_path / "data"
    folder.mkdir()
    with assert_clean(ignore=ELSEWHERE):
        env = LocalEnvironment("ends")
        with running(env, register_server(env, kind, folder)) as (url,):
            store = client(kind, url, timeout_s=2.0)
            store.setup()
            store.upsert(ids_of(20), vectors_of(20))
        for call in (
            lambda: store.upsert(ids_of(1), vectors_of(1)),
            lambda: store.search(vectors_of(1)[0]),
            store.count,
            store.collections,
        ):
            with pytest.raises(ServiceUnavailableError, match=f"{url} does not answer"):
                call()
        assert store.health() is False
        store.cleanup()
        env = LocalEnvironment("again")
        with running(env, register_server(env, kind, folder)) as (url,):
            store = client(kind, url)
            store.setup()
            assert store.count() == 20
            assert [hit.id for hit in store.search(vectors_of(20)[7], 1)] == ["id7"]
            store.cleanup()


def test_a_collection_that_another_program_removes_is_named(kind: str, servers: Servers) -> None:
    """Whatever it is called: the authors of this one are no matter of the token."""
    stores = [client(kind, servers.url(f"{kind} server"), collection="authors") for _ in range(2)]
    for store in stores:
        store.setup()
    first, second = stores
    first.upsert(ids_of(3), vectors_of(3))
    assert first.count() == 3
    assert second.drop("authors")
    with pytest.raises(ServiceError, match="authors") as caught:
        first.search(vectors_of(1)[0])
    assert "token" not in str(caught.value)
    assert first.count() == 0
    first.upsert(ids_of(2), vectors_of(2))
    assert second.count() == 2
    assert second.drop("authors")
    for store in stores:
        store.cleanup()


@pytest.mark.parametrize("host", ["inline", "process"])
def test_a_server_of_the_same_job(kind: str, host: Any, tmp_path: Path) -> None:
    """It starts before the store and ends after it, and its data are there for the next job."""
    folder = tmp_path / "data"
    folder.mkdir()
    for turn in range(2):
        with assert_clean(ignore=ELSEWHERE):
            env = LocalEnvironment(f"turn {turn}")
            server = register_server(env, kind, folder)
            options = ServiceOptions(host=host, concurrency=None)
            chosen = type(client(kind, "http://127.0.0.1:1"))
            store = env.register_service("store", chosen, options=options, **address(kind, server.url))
            counts: list[int] = []

            def ingest(numbers: list[int], store: Any = store) -> list[int]:
                store.upsert([f"id{number}" for number in numbers], vectors_of(len(numbers)))
                return [store.count()] * len(numbers)

            env.from_batch(range(10 * turn, 10 * turn + 10)).map_batches(ingest, max_records=5).sink(counts.append)
            report = env.submit(autostop=True).wait()
        assert counts[-1] == 10 * turn + 10
        assert [report.service(name).state for name in ("server", "store")] == ["stopped", "stopped"]
