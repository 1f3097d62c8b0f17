"""Which job the current thread belongs to: it must not wait for that job, and finds its services by name."""

from __future__ import annotations

import threading
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

from sage import service, serving

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from sage.service import ServiceHandle

T = TypeVar("T")

_here = threading.local()


class Inside(Protocol):
    """What the threads of a job know of it: its supervisor, or what stands for that in another process."""

    def handle_of(self, service: str) -> ServiceHandle[Any] | None:
        """Return the handle of a service of the job by its name, or None."""

    def ask_to_stop(self) -> None:
        """Ask for the end of the job, draining what is in flight, without waiting for it."""

    def wait_for(self, condition: threading.Condition, is_over: Callable[[], bool], timeout_s: float | None) -> bool:
        """Wait for a condition, whose lock is held, as a thread of the job has to; return whether it came true."""


@contextmanager
def inside(supervisor: Inside | None) -> Iterator[None]:
    """Mark the current thread as one of the supervisor's job."""
    before = getattr(_here, "supervisor", None)
    _here.supervisor = supervisor
    try:
        yield
    finally:
        _here.supervisor = before


def carried(function: Callable[[], T]) -> Callable[[], T]:
    """Return `function` as one that belongs to the current thread's job on whatever thread it runs."""
    supervisor = getattr(_here, "supervisor", None)

    def work() -> T:
        with inside(supervisor):
            return function()

    return work


def around() -> Inside | None:
    """Return what the current thread's job is known as here, or None outside of one."""
    found: Inside | None = getattr(_here, "supervisor", None)
    return found


def is_inside(supervisor: Inside) -> bool:
    """Return whether the current thread belongs to the supervisor's job."""
    return getattr(_here, "supervisor", None) is supervisor


def _handle_here(name: str) -> ServiceHandle[Any] | None:
    job = around()
    return None if job is None else job.handle_of(name)


def _wait_here(condition: threading.Condition, is_over: Callable[[], bool], timeout_s: float | None) -> bool:
    job = around()
    if job is None:
        return _wait_outside(condition, is_over, timeout_s)
    return job.wait_for(condition, is_over, timeout_s)


service.resolve = _handle_here
_wait_outside = serving.wait_for
serving.wait_for = _wait_here
