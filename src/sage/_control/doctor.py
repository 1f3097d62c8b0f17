"""Checks whether SAGE can run on this machine."""

from __future__ import annotations

import platform
import shutil
import sqlite3
import sys
import tempfile
import threading
import time
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, packages_distributions, version
from pathlib import Path
from typing import TYPE_CHECKING

from sage._extras import MissingExtraError
from sage._ray.local_cluster import check_ray
from sage.environment import LocalEnvironment
from sage.errors import SageError, describe
from sage.report import Cleanliness, Outcome
from sage.service import BaseService

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

PYTHON_MIN = (3, 11)
THREADS_COUNT = 50
THREAD_START_SLOW_S = 0.01
"""A thread starts in a tenth of a millisecond; where it takes a hundred times that, every job is slow to begin."""


SHARED_MEMORY = Path("/dev/shm")
OBJECT_STORE_SHARE = 0.3
"""The share of free memory that Ray uses for its objects; objects beyond shared memory go to the disk."""

GIB = 2**30


@dataclass(frozen=True, slots=True)
class Check:
    """One thing that was looked at."""

    name: str
    is_good: bool
    detail: str


class Doubler(BaseService):
    """The service of the pipeline that is tried."""

    def process(self, number: int) -> int:
        """Return twice the number."""
        return 2 * number


def checks(log_dir: Path) -> Iterator[Check]:
    """Yield one check after the other; none of them raises."""
    running = platform.python_version()
    yield Check("Python", sys.version_info >= PYTHON_MIN, f"{running}, 3.11 or later is needed")
    yield import_name()
    yield full_text_search()
    yield thread_start()
    yield writeable(log_dir)
    for package in ("click", "rich"):
        yield installed(package)
    yield from ray()
    yield pipeline()


def import_name(providers: Iterable[str] | None = None) -> Check:
    """Look for other distributions that install a package named `sage`, as SageMath and the SAGE of 2025 do."""
    found = packages_distributions().get("sage", ()) if providers is None else providers
    others = sorted({name for name in found if name != "sage-dataflow"})
    if not others:
        return Check("import sage", True, "no other package has this name")
    listed = ", ".join(others)
    return Check("import sage", False, f"{listed} installs a package of this name too; use a virtual environment apart")


def full_text_search() -> Check:
    """Look for the FTS5 module of SQLite."""
    name = "SQLite FTS5"
    connection = sqlite3.connect(":memory:")
    try:
        connection.execute("CREATE VIRTUAL TABLE words USING fts5(word)")
    except sqlite3.Error as error:
        return Check(name, False, f"SQLite {sqlite3.sqlite_version}: {error}")
    finally:
        connection.close()
    return Check(name, True, f"SQLite {sqlite3.sqlite_version}")


def thread_start(slow_from_s: float = THREAD_START_SLOW_S) -> Check:
    """Measure how long starting and joining a thread takes: the best of many times, as others use the machine.

    A slow machine is told and is not wrong, as every job works there all the same.
    """
    times_s: list[float] = []
    try:
        for _ in range(THREADS_COUNT):
            began_at = time.perf_counter()
            thread = threading.Thread(target=threading.get_ident)
            thread.start()
            thread.join()
            times_s.append(time.perf_counter() - began_at)
    except RuntimeError as error:
        return Check("thread start", False, str(error))
    best_s = min(times_s)
    note = ", slow: every job takes long to begin" if best_s >= slow_from_s else ""
    return Check("thread start", True, f"{best_s * 1e6:.0f} us{note}")


def writeable(log_dir: Path) -> Check:
    """Write a file where the folder of logs is, or would be made."""
    folder = log_dir.absolute()
    try:
        while not folder.exists():
            folder = folder.parent
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        return Check("log folder", False, f"{log_dir}: {error.strerror or error}")
    return Check("log folder", True, str(log_dir))


def installed(package: str) -> Check:
    """Look for a package of the command line."""
    try:
        return Check(package, True, version(package))
    except PackageNotFoundError:
        return Check(package, False, "is not installed")


def ray(shared_memory: Path = SHARED_MEMORY) -> Iterator[Check]:
    """Check Ray and its requirements; without it, only RemoteEnvironment cannot be used."""
    try:
        version("ray")
    except PackageNotFoundError:
        yield Check("Ray", True, 'not installed; RemoteEnvironment needs it: pip install "sage-dataflow[ray]"')
        return
    try:
        yield Check("Ray", True, check_ray())
    except MissingExtraError as error:
        yield Check("Ray", False, describe(error))
        return
    name = "shared memory for Ray"
    try:
        free = shutil.disk_usage(shared_memory).free
        wanted = OBJECT_STORE_SHARE * available_memory()
    except OSError as error:
        yield Check(name, False, f"{error.filename}: {error.strerror}")
        return
    detail = f"{free / GIB:.1f} GiB free in {shared_memory}, {wanted / GIB:.1f} GiB are wanted"
    yield Check(name, free >= wanted, detail + ("" if free >= wanted else "; what does not fit goes to the disk"))


def available_memory() -> int:
    """Return how many bytes of memory programs can have."""
    with open("/proc/meminfo", encoding="ascii") as file:
        return next(1024 * int(line.split()[1]) for line in file if line.startswith("MemAvailable"))


def pipeline() -> Check:
    """Run three records through a service."""
    name = "pipeline with a service"
    environment = LocalEnvironment("doctor")
    doubler = environment.register_service("doubler", Doubler)
    arrived: list[int] = []
    environment.from_batch([1, 2, 3]).map(doubler.process).sink(arrived.append)
    try:
        report = environment.submit(autostop=True).report
    except SageError as error:
        return Check(name, False, describe(error))
    if arrived != [2, 4, 6]:
        return Check(name, False, f"expected [2, 4, 6], got {arrived}")
    is_good = report.state is Outcome.COMPLETED and report.cleanliness is Cleanliness.CLEAN
    return Check(name, is_good, f"{report.state} and {report.cleanliness} after {report.duration_s * 1e3:.0f} ms")
