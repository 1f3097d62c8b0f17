"""The end of a service's process and of everything that came from it."""

from __future__ import annotations

import signal
import time
from typing import TYPE_CHECKING, NamedTuple

from sage._runtime.processes import (
    KILL_BOUND_S,
    TERM_GRACE_S,
    Grace,
    carriers,
    end_all,
    is_alive,
    of_session,
    program_of,
    send,
    wait_gone,
)
from sage.errors import ServiceError

if TYPE_CHECKING:
    from sage._runtime.processes import Process

KILL_SHARE = 0.25
KILL_SHARE_MAX_S = 0.5
"""How much of the bound is kept for killing: a part of it, and no more than this."""


class Outlived(NamedTuple):
    """Whether the process itself had to be killed, and, in words, what it left behind that had to be."""

    was_killed: bool
    left: tuple[str, ...]


class Ending:
    """Ends one process of a service, the session that it began, and whatever carries its token.

    Args:
        leader: the process; it must not be reaped before this is over, or its session may be somebody else's.
        token: what it and its descendants carry in their cookie, as its own.
        due: when everything has to be gone, by the monotonic clock.
    """

    def __init__(self, leader: Process, token: str, due: float) -> None:
        self._leader = leader
        self._token = token
        self._names: dict[Process, str] = {}
        self._grace = Grace(self._until(due))

    def hurry(self, due: float) -> None:
        """Bring `due` forward; any thread may."""
        self._grace.shorten(self._until(due))

    def run(self, stop_signal: int | None) -> Outlived:
        """End it all, and return what had to be killed for that.

        Args:
            stop_signal: what asks the process to end; None if it was asked before and had its time.

        Raises:
            ServiceError: something is still there, although it was killed.
        """
        try:
            was_killed = self._end_leader(stop_signal)
            # What it has left was not asked to end yet, and gets the time for that.
            self._grace.shorten(time.monotonic() + TERM_GRACE_S)
            ended = end_all(self._find, self._grace, KILL_BOUND_S)
        finally:
            self._grace.close()
        if ended.left:
            raise ServiceError(f"{', '.join(self._words(ended.left))} cannot be ended")
        return Outlived(was_killed, tuple(self._words(ended.killed)))

    def _end_leader(self, stop_signal: int | None) -> bool:
        if not is_alive(self._leader):
            return False
        if stop_signal is not None:
            send(self._leader, stop_signal, signal.SIGCONT)
            wait_gone([self._leader], self._grace)
        if not is_alive(self._leader):
            return False
        end_all(lambda: {one for one in of_session(self._leader.pid) | {self._leader} if is_alive(one)}, 0.0)
        return True

    def _find(self) -> set[Process]:
        found = carriers(self._token) | of_session(self._leader.pid)
        for one in found - self._names.keys():
            self._names[one] = program_of(one.pid)
        return found

    def _words(self, processes: set[Process]) -> list[str]:
        return [f"process {one.pid} ({self._names.get(one, '')})" for one in sorted(processes)]

    @staticmethod
    def _until(due: float) -> float:
        left_s = max(due - time.monotonic(), 0.0)
        return due - min(left_s * KILL_SHARE, KILL_SHARE_MAX_S)
