"""Files that are removed or replaced while a service has them open: each write after that is an error, or is kept."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from services.kept import Words
from services.models import opened
from support.vector_stores import vectors_of

from sage import JobError, LocalEnvironment
from sage.errors import ServiceError
from sage.rag.keywords import KeywordIndex
from sage.services.memory.memory import Memory
from sage.services.stores.graph import GraphStore
from sage.services.stores.key_value import SqliteKeyValue
from sage.services.vectors.chroma import ChromaStore
from sage.services.vectors.milvus import MilvusStore
from sage.services.vectors.sqlite import SqliteStore

MAKERS: dict[str, Callable[[Path], Any]] = {
    "key_value": SqliteKeyValue,
    "graph": GraphStore,
    "memory": lambda path: Memory(path, Words()),
    "keywords": KeywordIndex,
    "sqlite": SqliteStore,
    "chroma": ChromaStore,
    "milvus": MilvusStore,
}


def write(store: Any, name: str) -> None:
    match store:
        case SqliteKeyValue():
            store.put(name, "x")
        case GraphStore():
            store.put_node(name, {})
        case KeywordIndex():
            store.upsert([name], ["words"])
        case Memory():
            store.remember(name)
        case _:
            store.upsert([name], vectors_of(1))


def count(store: Any) -> int:
    found = store.count()
    return int(found[0] if isinstance(found, tuple) else found)


def remove(path: Path) -> None:
    shutil.rmtree(path) if path.is_dir() else path.unlink()


def remove_folder(path: Path) -> None:
    shutil.rmtree(path.parent)


def replace_by_a_copy(path: Path) -> None:
    copied = path.with_name("copy")
    (shutil.copytree if path.is_dir() else shutil.copy)(path, copied)
    remove(path)
    copied.rename(path)


def move(path: Path) -> None:
    path.rename(path.with_name("moved"))


def remove_log(path: Path) -> None:
    path.with_name(f"{path.name}-wal").unlink()


def empty(path: Path) -> None:
    for each in path.iterdir():
        if not each.name.startswith("."):
            remove(each)


HARMS: list[Callable[[Path], None]] = [remove, remove_folder, replace_by_a_copy, move]
CASES = [
    *((kind, harm) for kind in MAKERS for harm in HARMS),
    *((kind, remove_log) for kind in MAKERS if kind not in ("chroma", "milvus")),
    *((kind, empty) for kind in ("chroma", "milvus")),
]


@pytest.mark.parametrize(("kind", "harm"), CASES, ids=lambda one: getattr(one, "__name__", one))
def test_no_write_is_lost_without_a_word(kind: str, harm: Callable[[Path], None], tmp_path: Path) -> None:
    path = tmp_path / "folder" / "store.db"
    path.parent.mkdir()
    store = MAKERS[kind](path)
    store.setup()
    try:
        write(store, "one")
        assert store.health()
        harm(path)
        for call in (lambda: write(store, "two"), lambda: count(store), lambda: write(store, "three")):
            with pytest.raises(ServiceError, match=f'"{path}" was removed or replaced while it was open'):
                call()
        assert not store.health()
    finally:
        store.cleanup()
    path.parent.mkdir(exist_ok=True)
    if kind == "milvus":  # it leaves a part of its folder there when it is closed
        shutil.rmtree(path, ignore_errors=True)
    with opened(MAKERS[kind](path)) as again:  # what was started again can be used
        write(again, "four")
        assert count(again) >= 1


def test_a_write_during_which_the_file_is_removed_is_an_error(tmp_path: Path) -> None:
    path = tmp_path / "store.db"
    with opened(SqliteKeyValue(path)) as store:
        with pytest.raises(ServiceError, match="was removed or replaced"), store._file.writing():
            path.unlink()
        assert store._file._idle


@pytest.mark.parametrize("kind", MAKERS)
def test_a_file_that_may_be_written_no_more_keeps_all_that_a_call_returned_for(kind: str, tmp_path: Path) -> None:
    path = tmp_path / "store.db"
    with opened(MAKERS[kind](path)) as store:
        write(store, "one")
        for each in [path, *path.glob("**/*")] if path.is_dir() else [path]:
            each.chmod(0o555 if each.is_dir() else 0o444)
        written = 1
        try:
            write(store, "two")
            written += 1
        except ServiceError:
            pass
    for each in [path, *path.glob("**/*")] if path.is_dir() else [path]:
        each.chmod(0o755)
    with opened(MAKERS[kind](path)) as again:
        assert count(again) == written


def test_a_job_fails_at_the_record_that_could_not_be_kept(tmp_path: Path) -> None:
    path = tmp_path / "store.db"
    env = LocalEnvironment("removed")
    store = env.register_service("store", SqliteStore, path)
    kept: list[int] = []

    def keep(number: int) -> int:
        if number == 3:
            path.unlink()
        store.upsert([str(number)], vectors_of(1))
        return number

    env.from_batch(range(6)).map(keep, name="keep").sink(kept.append)
    with pytest.raises(JobError, match=r"store\.db\" was removed or replaced while it was open"):
        env.submit(autostop=True)
    assert kept == [0, 1, 2]
