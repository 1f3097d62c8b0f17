"""The process of one incarnation of a service: started under the guardian's eyes, watched, and ended for good."""

from __future__ import annotations

import math
import os
import signal
import subprocess
import threading
import time
from typing import TYPE_CHECKING, Any, Protocol

from sage._runtime.lifecycle import Exit
from sage._runtime.processes import COOKIE_VARIABLE, TERM_GRACE_S, Grace, descendants, end_all, process

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping, Sequence

    from sage._runtime.processes import Process

BY_ITSELF_SHARE = 0.5
KILL_SHARE = 0.3
"""What of the time for an exit a process has to end by itself, and what of the rest is for the kill after SIGTERM."""

SEEN_BOUND_S = 1.0
"""How long it may take until the end of a process, of which its connection knows already, is known here."""


class ProcessGuard(Protocol):
    """What a host tells the guardian of its process."""

    def announce(self, service: str, incarnation: int, host: str, requires: Iterable[str]) -> str:
        """Write down that a process will be started, and return the cookie that its environment has to carry."""

    def started(
        self, service: str, incarnation: int, pid: int, descriptor: int | None = None, stop_signal: int | None = None
    ) -> None:
        """Write down the process right after it was started."""

    @property
    def folder(self) -> str:
        """A folder for temporary files, which is removed in the end, whoever is killed before."""

    def left_of(self, cookie: str, known: Iterable[Process]) -> set[Process]:
        """Return the processes that carry the cookie or are known to be of it, but for those that were released."""

    def ended(self, service: str, incarnation: int) -> None:
        """Let go of a process that has ended."""

    def reap(self, service: str) -> list[str]:
        """Act on the claims of a service that was lost or killed, and return what went wrong."""


class OwnProcess:
    """A child process with everything that comes from it.

    Args:
        command: the program and its arguments.
        cookie: what it and its descendants are found by.
        on_end: called once, on a thread of its own, when the process has ended; not before `watch`.
        environment: variables besides those of this process.
        options: what else `subprocess.Popen` takes.
    """

    def __init__(
        self,
        command: Sequence[str],
        cookie: str,
        on_end: Callable[[], None],
        environment: Mapping[str, str] | None = None,
        **options: Any,
    ) -> None:
        self._cookie = cookie
        self._on_end = on_end
        self._ended = threading.Event()
        self._hurried = threading.Condition()
        self._due = math.inf
        self._grace: Grace | None = None
        variables = {**os.environ, **(environment or {}), COOKIE_VARIABLE: cookie}
        # Its own session: what a terminal sends to its foreground must not end services before their turn.
        self._popen = subprocess.Popen(command, env=variables, start_new_session=True, **options)
        self.pid = self._popen.pid
        self._process = process(self.pid)
        self._waiting = threading.Thread(target=self._wait, name=f"sage-process-{self.pid}", daemon=True)

    def watch(self) -> None:
        """Begin to wait for its end."""
        self._waiting.start()

    @property
    def exit_code(self) -> int | None:
        """How it ended; negative for a signal, None while it runs."""
        return self._popen.returncode

    @property
    def stdout(self) -> Any:
        """What it writes, if it was started with a pipe."""
        return self._popen.stdout

    def how_it_ended(self) -> str:
        """Return in words how the process ended."""
        code = self.exit_code
        if code is None:
            return f"its process {self.pid} runs"
        if code >= 0:
            return f"its process {self.pid} exited with code {code}"
        try:
            name = signal.Signals(-code).name
        except ValueError:
            name = f"signal {-code}"
        return f"its process {self.pid} was ended by {name}"

    def wait_ended(self, timeout_s: float = SEEN_BOUND_S) -> bool:
        """Wait until it has ended and `on_end` was called, and return whether that is so."""
        return self._ended.wait(timeout_s)

    def hurry(self, seconds: float) -> None:
        """Let `end`, which runs on another thread, wait no longer than that."""
        with self._hurried:
            self._due = min(self._due, time.monotonic() + seconds)
            if self._grace is not None:
                self._grace.shorten(self._due - seconds * KILL_SHARE)
            self._hurried.notify_all()

    def end(
        self, ask: Callable[[], None], left_of: Callable[[str, set[Process]], set[Process]], timeout_s: float
    ) -> Exit:
        """End the process and everything that comes from it, and return when all of it is gone.

        Args:
            ask: asks it to end by itself.
            left_of: returns the processes that are to be ended: those that carry a cookie, or are known and live.
            timeout_s: how long it may take in all; what has not ended before is killed.
        """
        began_at = time.monotonic()
        # When the process has gone, nobody can tell any more what it had started that carries no cookie.
        known = descendants(self._process) if self._process is not None else set()
        with self._hurried:
            self._due = min(self._due, began_at + timeout_s)
        ended_before = self._ended.is_set()
        if not ended_before:
            ask()
            with self._hurried:
                # The end is told under the same lock, so that nothing has to look at the clock in between.
                while not self._ended.is_set() and (left_s := self._by_itself_s(began_at)) > 0:
                    self._hurried.wait(left_s)
        by_itself = self._ended.is_set()
        with self._hurried:
            left_s = max(self._due - time.monotonic(), 0.0)
            grace = self._grace = Grace(time.monotonic() + min(left_s * (1 - KILL_SHARE), TERM_GRACE_S))
        try:
            ended = end_all(lambda: left_of(self._cookie, known), grace, max(left_s * KILL_SHARE, SEEN_BOUND_S))
        finally:
            grace.close()
        self._waiting.join(SEEN_BOUND_S)
        left = tuple(f"process {one.pid} had to be killed" for one in sorted(ended.killed) if one != self._process)
        left += tuple(f"process {one.pid} cannot be ended" for one in sorted(ended.left))
        return Exit(self.exit_code, was_killed=not by_itself, left=left)

    def _by_itself_s(self, began_at: float) -> float:
        """Return how many seconds the process has left to end by itself."""
        return began_at + (self._due - began_at) * BY_ITSELF_SHARE - time.monotonic()

    def _wait(self) -> None:
        self._popen.wait()
        self._on_end()
        self._ended.set()
        with self._hurried:
            self._hurried.notify_all()
