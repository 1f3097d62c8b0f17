"""What tests of services that keep something share: a Redis server, waiting, and programs that are killed."""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import sys
import textwrap
import threading
import time
import zlib
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

import numpy
import pytest

from sage import BaseService, Line, LocalEnvironment
from sage.testing import assert_clean

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence

    from sage import RunningCommand
    from sage._testing.leftovers import CleanBlock

T = TypeVar("T")

ROOT = Path(__file__).resolve().parents[2]
REDIS_SERVER = shutil.which("redis-server")
PASSWORD = "open sesame: 7/8@%"
SOON_S = 20.0

needs_redis = pytest.mark.skipif(REDIS_SERVER is None, reason="redis-server is not installed")


def register_redis(env: LocalEnvironment, *words: str) -> RunningCommand:
    """Register a server of its own, on loopback only."""
    return env.register_command(
        "redis",
        [
            *(str(REDIS_SERVER), "--port", "{port}", "--bind", "127.0.0.1", "--dir", "{folder}"),
            *("--save", "", "--appendonly", "no", *words),
        ],
        ready=Line("Ready to accept connections"),
        url="redis://127.0.0.1:{port}/0",
    )


@contextmanager
def redis_url(*words: str) -> Iterator[str]:
    """Run a server as long as the block takes."""
    with LocalEnvironment("redis for tests") as env:
        server = register_redis(env, *words)
        urls: list[str] = []
        env.from_batch([1]).map(lambda _: server.url).sink(urls.append)
        env.submit(autostop=True, keep_services=True)
        yield urls[0]


def left_clean() -> CleanBlock:
    """Return a block that leaves nothing; other programs of this user have temporary files and shared memory too."""
    return assert_clean(ignore="shared memory *")


def wait_until(is_so: Callable[[], bool]) -> None:
    """Wait for something that nothing tells of."""
    due = time.monotonic() + SOON_S
    while not is_so():
        assert time.monotonic() < due, "it did not happen in time"
        threading.Event().wait(0.005)


def at_once(count: int, function: Callable[[int], T]) -> list[T]:
    """Call a function with each number on a thread of its own, all at the same moment, and return the answers."""
    barrier = threading.Barrier(count)
    answers: dict[int, T] = {}
    errors: list[BaseException] = []

    def call(number: int) -> None:
        try:
            barrier.wait(SOON_S)
            answers[number] = function(number)
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=call, args=(number,)) for number in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if errors:
        raise errors[0]
    return [answers[number] for number in range(count)]


def program(text: str, *words: str, folder: Path, stdin: int | None = None) -> subprocess.Popen[str]:
    """Start a program of its own, whose output can be read line by line."""
    paths = [str(ROOT / "src"), str(ROOT / "tests"), os.environ.get("PYTHONPATH", "")]
    return subprocess.Popen(
        [sys.executable, "-W", "error", "-c", textwrap.dedent(text), *words],
        stdin=stdin,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=folder,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(paths)},
    )


def output_of(text: str, *words: str, folder: Path) -> list[str]:
    """Run a program to its end and return the lines it printed."""
    with program(text, *words, folder=folder) as child:
        out, errors = child.communicate(timeout=SOON_S * 2)
    assert child.returncode == 0, errors
    return out.splitlines()


def killed_after(lines: int, text: str, *words: str, folder: Path) -> list[str]:
    """Run a program, kill it in the middle of its work when it has printed so many lines, and return all it printed."""
    with program(text, *words, folder=folder) as child:
        assert child.stdout is not None
        assert child.stderr is not None
        said = [child.stdout.readline() for _ in range(lines)]
        assert all(said), child.stderr.read()
        child.send_signal(signal.SIGKILL)
        # A line that was cut by the end is none.
        said += [line for line in child.stdout.read().splitlines(keepends=True) if line.endswith("\n")]
    assert child.returncode == -signal.SIGKILL
    return [line.strip() for line in said]


def notes_of(error: BaseException) -> str:
    return "\n".join(getattr(error, "__notes__", ()))


class Words(BaseService):
    """Embeds texts by their words: texts that share words are similar. `EmbeddingService` in little."""

    def __init__(self, dimension: int = 64, name: str = "words") -> None:
        self.dimension = dimension
        self.model = name
        self.texts_seen = 0

    @property
    def name(self) -> str:
        return self.model

    def embed(self, texts: Sequence[str]) -> Any:
        self.texts_seen += len(texts)
        vectors = numpy.zeros((len(texts), self.dimension), numpy.float32)
        for row, text in enumerate(texts):
            for word in re.findall(r"\w+", text.lower()):
                vectors[row, zlib.crc32(word.encode()) % self.dimension] += 1
        return vectors


class Hit(NamedTuple):
    id: str
    score: float


class Shelf(BaseService):
    """Finds vectors by comparing all of them. `VectorStore` in little; it keeps nothing beyond its own life."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.rows: dict[str, tuple[Any, Mapping[str, Any]]] = {}
        self.is_broken = False

    def upsert(self, ids: Sequence[str], vectors: Any, *, metadatas: Sequence[Mapping[str, Any]]) -> None:
        if self.is_broken:
            raise OSError("the shelf is broken")
        with self.lock:
            self.rows.update({name: (row, data) for name, row, data in zip(ids, vectors, metadatas, strict=True)})

    def search(self, vector: Any, k: int, *, where: Mapping[str, Any] | None) -> list[Hit]:
        with self.lock:
            hits = [
                Hit(name, float(row @ vector))
                for name, (row, data) in self.rows.items()
                if all(data[key] == value for key, value in (where or {}).items())
            ]
        return sorted(hits, key=lambda hit: -hit.score)[:k]

    def delete(self, ids: Sequence[str]) -> None:
        with self.lock:
            for name in ids:
                self.rows.pop(name, None)

    def count(self) -> int:
        return len(self.rows)
