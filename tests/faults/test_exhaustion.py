"""A machine that gives out at one moment of a job: the n-th thread or descriptor cannot be had, for every n."""

from __future__ import annotations

import asyncio
import builtins
import errno
import fcntl
import gc
import os
import signal
import socket
import subprocess
import sys
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

import pytest
from support.recording_services import Notes, Recorded

import sage
from sage import LocalEnvironment, ServiceOptions
from sage._guardian.lease import runs_folder
from sage.testing import assert_clean

NO_THREAD = "can't start new thread"
STARTS_MAX = 60
ELSEWHERE = ["shared memory *", "file descriptor *eventpoll*"]
"""What other programs make meanwhile, and what the standard library keeps of an event loop that it could not make."""
SLEEPER = [sys.executable, "-c", "import signal; print('up', flush=True); signal.pause()"]


@pytest.fixture(autouse=True)
def _half_made_loops(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Let the event loops that the standard library could not make complain here, and not in a later test.

    Some are collected only then, as reports keep the tracebacks of their errors; those count as closed.
    """
    real = sys.unraisablehook

    def but_loops(found: Any) -> None:
        if found.object is not asyncio.BaseEventLoop.__del__:
            real(found)

    monkeypatch.setattr(sys, "unraisablehook", but_loops)
    yield
    gc.collect()
    for one in gc.get_objects():
        if issubclass(type(one), asyncio.BaseEventLoop) and not hasattr(one, "_ssock"):
            one._closed = True


class Failing:
    """Counts calls, and fails the one of the given number, and all after it if it is for good."""

    def __init__(
        self, real: Callable[..., Any], number: int, error: Callable[[], BaseException], for_good: bool
    ) -> None:
        self.real = real
        self.number = number
        self.error = error
        self.for_good = for_good
        self.count = 0

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        self.count += 1
        if self.count == self.number or (self.for_good and self.count > self.number):
            raise self.error()
        return self.real(*args, **kwargs)


@contextmanager
def no_thread(number: int, *, for_good: bool) -> Iterator[Failing]:
    """Let the n-th thread that is started in this process fail, as it does when a limit is reached."""
    with pytest.MonkeyPatch.context() as patch:
        real = threading._start_new_thread  # type: ignore[attr-defined]
        failing = Failing(real, number, lambda: RuntimeError(NO_THREAD), for_good)
        patch.setattr(threading, "_start_new_thread", failing)
        yield failing


ACQUIRING: list[tuple[Any, str]] = [
    *((os, name) for name in ("open", "pipe", "eventfd", "pidfd_open", "memfd_create", "listdir", "scandir")),
    (builtins, "open"),
    (socket, "socketpair"),
    (subprocess, "_fork_exec"),
]
"""What takes descriptors, and a process, of the system."""

OTHERS: list[tuple[Any, str]] = [
    *((os, name) for name in ("mkdir", "chmod", "lstat", "set_blocking", "fsync", "utime", "write")),
    (signal, "set_wakeup_fd"),
    (fcntl, "flock"),
]
"""What fails in between: no rights, no room."""


PRODUCT = str(Path(sage.__file__).parent)
PLACES_FEW, STRIDE = 4, 7
"""How many places the plain run tries, and how far from each other."""
PLACE_DEPTH = 4
"""Calls are made at the same place if so many of the functions around them, from the inside, are the same lines."""


class Places:
    """Counts calls by place, and fails the first call at one of them."""

    def __init__(self, fails_at: tuple[str, ...] | None, code: int) -> None:
        self.fails_at = fails_at
        self.code = code
        self.seen: Counter[tuple[str, ...]] = Counter()
        self._lock = threading.Lock()

    def __call__(self) -> None:
        place = place_of(sys._getframe(2))
        with self._lock:
            self.seen[place] += 1
            fails = place == self.fails_at and self.seen[place] == 1
        if fails:
            raise OSError(self.code, os.strerror(self.code))


def place_of(frame: FrameType | None) -> tuple[str, ...]:
    """Return the lines of the product that lead to a call, the innermost first, or nothing for other calls."""
    lines: list[str] = []
    while frame is not None and len(lines) < PLACE_DEPTH:
        if frame.f_code.co_filename.startswith(PRODUCT):
            lines.append(f"{frame.f_code.co_filename.removeprefix(PRODUCT)}:{frame.f_lineno}")
        frame = frame.f_back
    return tuple(lines)


@contextmanager
def counted(functions: list[tuple[Any, str]], counter: Callable[[], Any]) -> Iterator[None]:
    """Have each call of the functions in this process counted first, on whatever thread it is made."""
    with pytest.MonkeyPatch.context() as patch:
        for module, name in functions:
            real = getattr(module, name)

            def call(*args: Any, real: Any = real, **kwargs: Any) -> Any:
                counter()
                return real(*args, **kwargs)

            patch.setattr(module, name, call)
        yield


@contextmanager
def no_descriptor(number: int, functions: list[tuple[Any, str]], code: int, *, for_good: bool) -> Iterator[Failing]:
    """Let the n-th call of one of the functions in this process fail, on whatever thread it is made."""
    counter = Failing(lambda: None, number, lambda: OSError(code, os.strerror(code)), for_good)
    with counted(functions, counter):
        yield counter


class Slow(Recorded):
    """Has calls of its own threads and a coroutine, which need further threads."""

    async def later(self, value: int) -> int:
        return value + 1


def environment(host: Any, journal: Notes) -> tuple[LocalEnvironment, list[Any]]:
    """Return an environment with two services, of which one depends on the other, and a list for its results."""
    env = LocalEnvironment("scarce")
    results: list[Any] = []
    if host == "command":
        env.register_command("first", SLEEPER)
        env.register_command("second", SLEEPER, options=ServiceOptions(depends_on=["first"]))
        env.from_batch([1, 2, 3]).map(lambda value: value + 1).sink(results.append)
        return env, results
    env.register_service("first", Recorded, journal, options=ServiceOptions(host=host))
    options = ServiceOptions(host=host, depends_on=["first"])
    second = env.register_service("second", Slow, journal, options=options)
    env.from_batch([1, 2, 3]).map(second.later).sink(results.append)
    return env, results


def autostop(env: LocalEnvironment) -> None:
    env.submit(autostop=True)


def in_a_block(env: LocalEnvironment) -> None:
    with env:
        env.submit().wait()


def kept(env: LocalEnvironment) -> None:
    with env:
        env.submit(autostop=True, keep_services=True)


def stopped(env: LocalEnvironment) -> None:
    env.submit().stop()


WAYS = [autostop, in_a_block, kept, stopped]


def check_cleaned(journal: Notes) -> None:
    """See that what was built was cleaned, exactly once."""
    for name in ("first", "second"):
        assert journal.lines().count(f"{name}.build") == journal.lines().count(f"{name}.cleanup"), journal
        assert journal.lines().count(f"{name}.cleanup") <= 1, journal


@pytest.mark.parametrize(
    ("host", "way", "for_good"),
    [
        *(("inline", way, for_good) for way in WAYS for for_good in (False, True)),
        ("process", kept, False),
        ("command", autostop, True),
        # Each attempt begins a process.
        *(
            pytest.param(*case, marks=pytest.mark.proof)
            for case in (
                ("process", kept, True),
                ("process", autostop, False),
                ("process", autostop, True),
                ("command", autostop, False),
                ("command", kept, False),
                ("command", kept, True),
            )
        ),
    ],
)
def test_the_nth_thread_cannot_be_started(
    host: str, way: Callable[[LocalEnvironment], None], for_good: bool, journal: Notes
) -> None:
    for number in range(1, STARTS_MAX):
        journal.clear()
        env, results = environment(host, journal)
        error: BaseException | None = None
        with assert_clean(ignore=ELSEWHERE), no_thread(number, for_good=for_good) as failing:
            try:
                way(env)
            except Exception as raised:
                error = raised
        check_cleaned(journal)
        if failing.count < number:
            assert error is None
            assert results == [2, 3, 4] or way is stopped
            return
        assert error is None or NO_THREAD in text_of(error), error
        assert error is not None or results == [2, 3, 4] or way is stopped
    pytest.fail(f"a job that starts {STARTS_MAX} threads")


@pytest.mark.timeout(300)
@pytest.mark.parametrize(
    ("host", "functions", "code", "for_good"),
    [
        ("inline", ACQUIRING, errno.EMFILE, False),
        ("inline", ACQUIRING, errno.ENFILE, True),
        ("inline", OTHERS, errno.ENOSPC, False),
    ],
)
def test_the_nth_call_of_the_system_fails(
    host: str, functions: list[tuple[Any, str]], code: int, for_good: bool, journal: Notes
) -> None:
    for number in range(1, 400):
        journal.clear()
        env, results = environment(host, journal)
        error: BaseException | None = None
        with assert_clean(ignore=ELSEWHERE):
            with no_descriptor(number, functions, code, for_good=for_good) as failing:
                try:
                    autostop(env)
                except Exception as raised:
                    error = raised
            env.close()
        check_cleaned(journal)
        assert os.listdir(runs_folder()) == []
        if failing.count < number:
            assert error is None
            assert results == [2, 3, 4]
            return
    pytest.fail("a job that asks the system 400 times")


@pytest.mark.timeout(600)
@pytest.mark.parametrize("host", ["process", "command"])
@pytest.mark.parametrize(("functions", "code"), [(ACQUIRING, errno.EMFILE), (OTHERS, errno.ENOSPC)])
def test_the_first_call_of_the_system_at_any_place_fails(
    host: str, functions: list[tuple[Any, str]], code: int, journal: Notes, request: pytest.FixtureRequest
) -> None:
    """With a process for each attempt, only one call of each place fails, and a few places unless all are asked for."""
    todo = attempt(host, functions, Places(None, code), journal)
    done: set[tuple[str, ...]] = set()
    places_max = sys.maxsize if request.config.getoption("--proof") else PLACES_FEW
    while todo and len(done) < places_max:
        # Places that only an attempt to clean up comes to are found on the way.
        place = sorted(todo)[STRIDE * len(done) % len(todo)]
        done.add(place)
        todo = (todo | attempt(host, functions, Places(place, code), journal)) - done
    assert len(done) >= min(places_max, PLACES_FEW)


def attempt(host: str, functions: list[tuple[Any, str]], places: Places, journal: Notes) -> set[tuple[str, ...]]:
    """Run a job, check what it leaves, and return the places at which it called the functions."""
    journal.clear()
    env, results = environment(host, journal)
    error: BaseException | None = None
    with assert_clean(ignore=ELSEWHERE):
        with counted(functions, places):
            try:
                autostop(env)
            except Exception as raised:
                error = raised
        env.close()
    check_cleaned(journal)
    assert os.listdir(runs_folder()) == []
    assert error is not None or results == [2, 3, 4], places.fails_at
    return {place for place in places.seen if place}


def text_of(error: BaseException) -> str:
    """Return the texts of an error, of those in it and of their causes."""
    parts = [str(error)]
    if isinstance(error, BaseExceptionGroup):
        parts += [text_of(one) for one in error.exceptions]
    parts += [text_of(one) for one in (error.__cause__, error.__context__) if one is not None]
    return "\n".join(parts)
