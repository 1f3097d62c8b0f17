"""Forked processes: a copy of a job's process is not part of the job, so it cannot reach the job any more."""

from __future__ import annotations

import os
import sys
import threading
import traceback
from contextlib import suppress
from typing import NoReturn, Protocol
from weakref import WeakSet

from sage.errors import ServiceUnavailableError, hint

CAME_BACK_CODE = 70
"""Exit code of a forked process that returns from a user's function into the job (EX_SOFTWARE of sysexits.h)."""


class Inherited(Protocol):
    """A thing that is of no use in a forked process, where it is only a copy."""

    def _after_fork_in_child(self) -> None:
        """Let go of everything that still belongs to the process of the job; wait for nothing."""


_inherited: WeakSet[Inherited] = WeakSet()
_forked: list[int] = []
"""The one thread that a forked process begins with, and the process that it was forked from."""


def useless_after_fork(thing: Inherited) -> None:
    """Have `thing` let go of the job in every process that is forked from now on."""
    _inherited.add(thing)


def refusal(service: str) -> ServiceUnavailableError:
    """Return the error of a call in a forked process."""
    parent = f"process {_forked[1]}, from which this one was forked" if _forked else "another process"
    error = ServiceUnavailableError(
        f'service "{service}" is called in process {os.getpid()}, but belongs to the job in {parent}', service=service
    )
    return hint(
        error,
        "Make the call in the parent and give the child the answer. This holds for children of every start method, "
        'spawn included; a service with ServiceOptions(host="process") may call other services.',
    )


class RefusedCalls:
    """Stands for the host of a service in a forked process, and refuses every call."""

    def __init__(self, service: str) -> None:
        self._service = service

    def method(self, name: str) -> NoReturn:  # noqa: ARG002
        """Refuse."""
        raise refusal(self._service)

    def call(self, *_: object) -> NoReturn:
        """Refuse."""
        raise refusal(self._service)

    def call_async(self, *_: object) -> NoReturn:
        """Refuse."""
        raise refusal(self._service)

    def is_coroutine(self, name: str) -> NoReturn:  # noqa: ARG002
        """Refuse."""
        raise refusal(self._service)


def leave_if_forked(error: BaseException | None = None) -> None:
    """End a forked process that comes back from a user's function, as it would work on the records a second time.

    Every loop of a job that calls user code calls this afterwards. In the process of the job it does nothing.
    """
    if not _forked or _forked[0] != threading.get_ident():
        return
    code = CAME_BACK_CODE
    with suppress(OSError, ValueError, AttributeError):  # there may be no standard error
        if isinstance(error, SystemExit):
            code = error.code if isinstance(error.code, int) else int(error.code is not None)
        elif error is not None:
            traceback.print_exception(error)
        else:
            text = f"process {os.getpid()} was forked in a function of a job and ends where it comes back from it"
            sys.stderr.write(f"{text}; end it by os._exit() before\n")
        sys.stderr.flush()  # not standard output, where the parent's own text may wait
    os._exit(code & 0xFF)


def _after_fork_in_child() -> None:
    _forked[:] = [threading.get_ident(), os.getppid()]
    for thing in tuple(_inherited):
        thing._after_fork_in_child()
    _inherited.clear()


os.register_at_fork(after_in_child=_after_fork_in_child)
