"""The process of one incarnation of a service: started under the guardian's eyes, watched, and ended for good."""

from __future__ import annotations

import math
import os
import signal
import subprocess
import threading
import time
from contextlib import suppress
from typing import TYPE_CHECKING, Any

from sage._processes import (
    COOKIE_VARIABLE,
    INIT_PID,
    TERM_GRACE_S,
    Grace,
    descendants,
    end_all,
    process,
    reap_orphans,
)
from sage._runtime.lifecycle import Exit

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from sage._processes import Process

BY_ITSELF_SHARE = 0.5
KILL_SHARE = 0.3
"""The share of the exit time to end by itself, and the share of the rest for the kill after SIGTERM."""

SEEN_BOUND_S = 1.0
"""How long it may take until the end of a process, of which its connection knows already, is known here."""


UNKNOWN_END = "ended, and its exit code is not known, as SIGCHLD is ignored or something waits for every child"


class ChildProcess:
    """A child process with everything that comes from it.

    Args:
        command: the program and its arguments.
        cookie: by which it and its descendants are found.
        on_end: called once, on a thread of its own, when the process has ended; not before `watch`.
        environment: variables besides those of this process.
        options: further arguments of `subprocess.Popen`.
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
        self._exit_code: int | None = None
        self._is_over = False
        self._hurried = threading.Condition()
        self._due = math.inf
        self._grace: Grace | None = None
        self._popen: subprocess.Popen[bytes] | None = None
        variables = {**os.environ, **(environment or {}), COOKIE_VARIABLE: cookie}
        self._is_started = threading.Event()
        # There before the process is, as it might not be had any more afterwards.
        self._waiting = threading.Thread(target=self._wait, name="sage-process", daemon=True)
        self._waiting.start()
        try:
            # Its own session: a terminal's signals to its foreground must not end services before their turn.
            self._popen = subprocess.Popen(command, env=variables, start_new_session=True, **options)
        except BaseException:
            self._is_started.set()
            self._waiting.join()
            raise
        self.pid = self._popen.pid
        self._process: Process | None = None
        with suppress(OSError):  # without a descriptor it cannot be seen, and is ended by its group
            self._process = process(self.pid)
        self._waiting.name = f"sage-process-{self.pid}"

    def watch(self) -> None:
        """Begin to wait for its end."""
        self._is_started.set()

    @property
    def exit_code(self) -> int | None:
        """How it ended; negative for a signal, None while it runs or where it is not known."""
        return self._exit_code

    def how_it_ended(self) -> str:
        """Return in words how the process ended."""
        code = self.exit_code
        if code is None:
            return f"its process {self.pid} {UNKNOWN_END if self._is_over else 'runs'}"
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
        self,
        ask: Callable[[], None],
        left_of: Callable[[str, set[Process]], set[Process]],
        timeout_s: float,
        where: Callable[[], str] = str,
    ) -> Exit:
        """End the process and everything that comes from it, and return when all of it is gone.

        Args:
            ask: asks it to end by itself.
            left_of: returns the processes to end: those that carry a cookie, or are known and live.
            timeout_s: how long it may take in all; the rest is killed.
            where: asks it where it stands, before it is killed.
        """
        began_at = time.monotonic()
        # When the process has gone, its descendants without a cookie can no longer be found.
        ended_before = self._ended.is_set()
        known = set() if ended_before or self._process is None else descendants(self._process)
        with self._hurried:
            self._due = min(self._due, began_at + timeout_s)
        if not ended_before:
            ask()
            with self._hurried:
                # The end is told under the same lock, so that nothing has to look at the clock in between.
                while not self._ended.is_set() and (left_s := self._by_itself_s(began_at)) > 0:
                    self._hurried.wait(left_s)
        by_itself = self._ended.is_set()
        stands = "" if by_itself else where()
        found: set[Process] = set()

        def left_here() -> set[Process]:
            left = left_of(self._cookie, known)
            found.update(left)
            return left

        with self._hurried:
            left_s = max(self._due - time.monotonic(), 0.0)
            grace = self._grace = Grace(time.monotonic() + min(left_s * (1 - KILL_SHARE), TERM_GRACE_S))
        try:
            ended = end_all(left_here, grace, max(left_s * KILL_SHARE, SEEN_BOUND_S))
        except OSError:
            self._kill_group()
            raise
        finally:
            grace.close()
        self._waiting.join(SEEN_BOUND_S)
        reap_orphans(self.pid, known | found)
        left = tuple(f"process {one.pid} had to be killed" for one in sorted(ended.killed) if one != self._process)
        left += tuple(f"process {one.pid} cannot be ended" for one in sorted(ended.left))
        unknown = self.how_it_ended() if by_itself and self.exit_code is None else ""
        return Exit(self.exit_code, was_killed=not by_itself, left=left, unknown=unknown, where=stands)

    def _kill_group(self) -> None:
        """Kill the process and its group where nothing can be seen: that takes no descriptor."""
        with suppress(ProcessLookupError):
            if not self._is_over:  # until it is waited for, no other process has its number
                os.killpg(self.pid, signal.SIGKILL)
        self._ended.wait(SEEN_BOUND_S)

    def _by_itself_s(self, began_at: float) -> float:
        """Return how many seconds the process has left to end by itself."""
        return began_at + (self._due - began_at) * BY_ITSELF_SHARE - time.monotonic()

    def _wait(self) -> None:
        self._is_started.wait()
        if self._popen is None:
            return
        self._exit_code = self._waited()
        # Popen would take an end that it cannot know for a good one, and wait for a pid that another process has.
        self._popen.returncode = self._exit_code or 0
        self._is_over = True
        self._on_end()
        self._ended.set()
        with self._hurried:
            self._hurried.notify_all()

    def _waited(self) -> int | None:
        """Wait for its end and return its exit code, or None if somebody else was told."""
        try:
            while os.getpid() == INIT_PID:
                # An orphaned process becomes a child of this process, and stays in the group of its service.
                ended = os.waitid(os.P_PGID, self.pid, os.WEXITED | os.WNOWAIT)
                if ended is None or ended.si_pid == self.pid:
                    break
                os.waitpid(ended.si_pid, os.WNOHANG)
            return os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])
        except ChildProcessError:
            return None
