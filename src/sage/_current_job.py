"""What the current thread and coroutine belong to: a job, the calls they are made for, and the key of a record.

This is the only state that follows a thread or a coroutine around without being passed to it.
"""

from __future__ import annotations

import threading
from contextlib import contextmanager
from contextvars import ContextVar
from types import MappingProxyType
from typing import TYPE_CHECKING, Protocol, TypeVar

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Mapping

T = TypeVar("T")


class Inside(Protocol):
    """The job as its threads see it: its supervisor, or the supervisor's stand-in in another process."""

    def handle_of(self, service: str) -> object:
        """Return the handle of a service of the job by its name, or None."""

    def ask_to_stop(self, drain: bool | None) -> None:
        """Ask for the end of the job, as `Job.stop` does, without waiting for it."""

    def wait_for(self, condition: threading.Condition, is_over: Callable[[], bool], timeout_s: float | None) -> bool:
        """Wait for a condition as a thread of the job has to, and return whether it came true."""


class Here(threading.local):
    """What the current thread belongs to.

    Attributes:
        job: its job, or None.
        is_task: whether it works for a task, also in a call that it makes for one.
        loop: the event loop of a job, on the thread of that loop, or None.
        call: the call of a service that the thread makes for the caller who waits for its future, or None.
        handles: the meaning of handles that are unpickled on this thread, by name, before that in its job.
        mask: the signals that were blocked before the fork that the thread is making, or None.
    """

    job: Inside | None = None
    is_task: bool = False
    loop: object = None
    call: object = None
    handles: Mapping[str, object] = MappingProxyType({})
    mask: Iterable[int] | None = None


here = Here()

key_here: ContextVar[object] = ContextVar("key", default=None)
"""The key of the record for which the current coroutine runs."""

gates_here: ContextVar[frozenset[object]] = ContextVar("gates", default=frozenset())
"""The gates that let through the call in which the current coroutine runs."""


@contextmanager
def inside(job: Inside | None, *, is_task: bool = False) -> Iterator[None]:
    """Mark the current thread as one of the job, and as one that works for a task."""
    before = here.job, here.is_task
    here.job, here.is_task = job, is_task
    try:
        yield
    finally:
        here.job, here.is_task = before


def carried(function: Callable[[], T]) -> Callable[[], T]:
    """Return `function` as one that belongs to the current thread's job on whatever thread it runs."""
    job, is_task = here.job, here.is_task

    def work() -> T:
        with inside(job, is_task=is_task):
            return function()

    return work


def wait_for(condition: threading.Condition, is_over: Callable[[], bool], timeout_s: float | None) -> bool:
    """Wait for a condition, as a thread of its job has to if it belongs to one, and return whether it came true."""
    if here.job is not None:
        return here.job.wait_for(condition, is_over, timeout_s)
    with condition:
        return condition.wait_for(is_over, timeout_s)
