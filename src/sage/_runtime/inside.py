"""Which job the current thread belongs to: it must not wait for that job, and finds its services by name."""

from __future__ import annotations

import threading
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, TypeVar

from sage import service, serving

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from sage._runtime.supervisor import Supervisor
    from sage.service import ServiceHandle

T = TypeVar("T")

_here = threading.local()


@contextmanager
def inside(supervisor: Supervisor | None) -> Iterator[None]:
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


def is_inside(supervisor: Supervisor) -> bool:
    """Return whether the current thread belongs to the supervisor's job."""
    return getattr(_here, "supervisor", None) is supervisor


def _handle_here(name: str) -> ServiceHandle[Any] | None:
    supervisor: Supervisor | None = getattr(_here, "supervisor", None)
    host = None if supervisor is None else supervisor.hosts.get(name)
    return None if host is None else host.spec.handle


def _wait_here(condition: threading.Condition, is_over: Callable[[], bool], timeout_s: float | None) -> bool:
    supervisor: Supervisor | None = getattr(_here, "supervisor", None)
    if supervisor is None:
        return _wait_outside(condition, is_over, timeout_s)
    return supervisor.backend.wait_for(supervisor, condition, is_over, timeout_s)


service.resolve = _handle_here
_wait_outside = serving.wait_for
serving.wait_for = _wait_here
