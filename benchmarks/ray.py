"""What a job on Ray costs: an edge between two workers, a call of a service, two workers, and submit itself."""

from __future__ import annotations

import tempfile
import time
from pathlib import Path
from time import perf_counter
from typing import TYPE_CHECKING, Any

from benchmarks.measure import at_least, at_most
from sage import BatchFunction, MapFunction, RemoteEnvironment, SinkFunction
from sage._extras import load
from sage._ray.connection import cluster

if TYPE_CHECKING:
    from collections.abc import Iterator

    from benchmarks.measure import Figure, Scale

BATCH = 1_000
WINDOW = 32
"""How many batches a hand-written actor has on their way."""

CALLS = 500
SINGLE_CALLS = 2_000
ROUNDS = 3
SPIN = 20_000
SPUN = 400


class Tuples(BatchFunction):
    """Small tuples."""

    def __init__(self, count: int) -> None:
        self._left = count

    def execute(self) -> tuple[int, str] | None:
        """Return the next one."""
        if not self._left:
            return None
        self._left -= 1
        return (self._left, "small")


class Rated(SinkFunction):
    """Writes down how many records came in a second, from the first to the last."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._count = 0
        self._began_at = self._ended_at = 0.0

    def execute(self, data: Any) -> None:  # noqa: ARG002
        """Count one."""
        if not self._count:
            self._began_at = perf_counter()
        self._count += 1

    def close(self) -> None:
        """Write it down."""
        self._path.write_text(str(self._count / (perf_counter() - self._began_at)))


class Answering:
    """Answers at once."""

    def process(self, data: int) -> int:
        """Return what came."""
        return data


class Asking(MapFunction):
    """Writes down how long a call takes."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def execute(self, data: int) -> int:
        """Make many calls."""
        service = self.service("answering")
        service.process(0)
        began_at = perf_counter()
        for number in range(CALLS):
            service.process(number)
        self._path.write_text(str((perf_counter() - began_at) / CALLS))
        return data


class Taking:
    """A hand-written actor that takes batches, or single records."""

    def take(self, batch: list[Any]) -> int:
        """Count a batch."""
        return sum(1 for _ in batch)

    def process(self, data: int) -> int:
        """Return what came."""
        return data


class Giving:
    """A hand-written actor that gives batches to another, or calls it."""

    def batches(self, other: Any, count: int) -> float:
        """Return how many records a second it gave."""
        ray = load("ray", "ray")
        began_at, waiting = perf_counter(), []
        for start in range(0, count, BATCH):
            waiting.append(other.take.remote([(number, "small") for number in range(start, start + BATCH)]))
            if len(waiting) == WINDOW:
                ray.get(waiting.pop(0))
        ray.get(waiting)
        return count / (perf_counter() - began_at)

    def singles(self, other: Any, count: int) -> float:
        """Return how many records a second it gave, each in a call."""
        ray = load("ray", "ray")
        began_at = perf_counter()
        ray.get([other.process.remote(number) for number in range(count)])
        return count / (perf_counter() - began_at)

    def calls(self, other: Any) -> float:
        """Return how long a call takes."""
        ray = load("ray", "ray")
        ray.get(other.process.remote(0))
        began_at = perf_counter()
        for number in range(CALLS):
            ray.get(other.process.remote(number))
        return (perf_counter() - began_at) / CALLS


def spin(number: int) -> int:
    """Take a processor for about a millisecond."""
    return sum(range(SPIN)) + number


def jobs_on_ray(scale: Scale) -> Iterator[Figure]:
    """Yield all figures; one Ray serves them all."""
    with cluster(), tempfile.TemporaryDirectory() as folder:
        ray = load("ray", "ray")
        giving, taking = (ray.remote(kind).options(num_cpus=0).remote() for kind in (Giving, Taking))
        path = Path(folder) / "figure"
        yield from _edge(scale, path, giving, taking)
        ours = [_call(path) for _ in range(ROUNDS)]
        bare = [ray.get(giving.calls.remote(taking)) for _ in range(ROUNDS)]
        pairs = zip(ours, bare, strict=True)
        yield at_most("Ray: a call of a service", "of a bare actor call", 1.3, [one / other for one, other in pairs])
        for actor in (giving, taking):
            ray.kill(actor)
        ratios = [_spun(1) / _spun(2) for _ in range(ROUNDS)]
        yield at_least("Ray: CPU-bound map, 2 tasks", "of one task", 1.7, ratios)
        ours = [_short() for _ in range(ROUNDS)]
        bare = [_pair() for _ in range(ROUNDS)]
        yield at_most("Ray: submit with a service, warm", "s", 1.0, ours)
        beside = [one / other for one, other in zip(ours, bare, strict=True)]
        yield at_most("Ray: submit with a service, warm", "of making and calling two bare actors", 1.5, beside)


def _edge(scale: Scale, path: Path, giving: Any, taking: Any) -> Iterator[Figure]:
    ray = load("ray", "ray")
    ours, batches, singles = [], [], []
    for _round in range(ROUNDS):
        env = RemoteEnvironment("edge")
        env.from_batch(Tuples, scale.records).place(num_cpus=0.1).sink(Rated, path)
        env.submit(autostop=True)
        ours.append(float(path.read_text()))
        batches.append(ray.get(giving.batches.remote(taking, scale.records)))
        singles.append(ray.get(giving.singles.remote(taking, SINGLE_CALLS)))
    beside = [one / other for one, other in zip(ours, batches, strict=True)]
    yield at_least("Ray: an edge between two workers", "of a hand-written pair", 0.7, beside)
    beside = [one / other for one, other in zip(ours, singles, strict=True)]
    yield at_least("Ray: an edge between two workers", "of a call for each record", 50.0, beside)


def _call(path: Path) -> float:
    env = RemoteEnvironment("call")
    env.register_service("answering", Answering)
    env.from_batch([1]).map(Asking, path).sink(abs)
    env.submit(autostop=True)
    return float(path.read_text())


def _spun(parallelism: int) -> float:
    """Return how long the tasks run, from the first state to the last."""
    env = RemoteEnvironment("spin", workers=parallelism)
    env.from_batch(range(SPUN), parallelism=parallelism).map(spin, parallelism=parallelism).sink(
        abs, parallelism=parallelism
    )
    job = env.submit(autostop=True)
    moved = [event for event in job.events() if event.subject == "job"]
    began_at = next(event.at for event in moved if event.after == "running")
    return next(event.at for event in moved if event.after == "stopping_services") - began_at


def _short() -> float:
    """Return how long a job takes that asks a service once, where a Ray is running already."""
    env = RemoteEnvironment("short")
    answering = env.register_service("answering", Answering)
    arrived: list[int] = []
    env.from_batch([1]).map(answering.process).sink(arrived.append)
    began_at = time.monotonic()
    env.submit(autostop=True)
    assert arrived == [1]
    return time.monotonic() - began_at


def _pair() -> float:
    """Return how long it takes to make two bare actors and call them."""
    ray = load("ray", "ray")
    began_at = time.monotonic()
    pair = [ray.remote(Taking).options(num_cpus=0).remote() for _ in range(2)]
    ray.get([one.process.remote(1) for one in pair])
    took_s = time.monotonic() - began_at
    for one in pair:
        ray.kill(one)
    return took_s
