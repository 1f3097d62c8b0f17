"""`sage exec`: runs any command, and ends everything that it leaves behind."""

from __future__ import annotations

import os
import signal
import sys
from contextlib import suppress
from typing import TYPE_CHECKING

from sage._processes import INIT_PID, zombies_of_init
from sage._supervised import supervised
from sage.errors import ServiceError

if TYPE_CHECKING:
    from collections.abc import Sequence
    from types import FrameType

PASSED_ON = (
    *(signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGQUIT),
    *(signal.SIGUSR1, signal.SIGUSR2, signal.SIGALRM, signal.SIGCONT),
)
UNGUARDED, NOT_EXECUTABLE, NOT_FOUND, BY_SIGNAL = 125, 126, 127, 128
"""Exit codes as `timeout` and shells have them; the first says that the command was not even tried."""


def run(words: Sequence[str]) -> int:
    """Run a command under supervision, tell on standard error what it left, and return the exit code."""
    try:
        with supervised(os.path.basename(words[0])) as block:
            code = _Child(words, block._lease.guardian_pid).run()
    except ServiceError as error:
        print(f"sage exec: {error}", file=sys.stderr)
        return UNGUARDED
    for text in block.ended:
        fate = " does not end" if text in block.left else " and had to be killed" if text in block.killed else ""
        print(f"sage exec: {text} was left{fate}", file=sys.stderr)
    return code


class _Child:
    """The command: a process group of its own, and in the foreground where there is a terminal."""

    def __init__(self, words: Sequence[str], guardian_pid: int) -> None:
        self._words = words
        self._guardian_pid = guardian_pid
        self._pid = 0
        self._has_ended = False
        self._early: list[int] = []
        self._terminal = sys.stdin.fileno() if sys.stdin is not None and sys.stdin.isatty() else None

    def run(self) -> int:
        for number in PASSED_ON:
            signal.signal(number, self._pass_on)
        if os.getpid() == INIT_PID:
            signal.signal(signal.SIGCHLD, self._reap)
        try:
            self._pid = os.posix_spawnp(self._words[0], list(self._words), os.environ, setpgroup=0, setsigmask=())
        except OSError as error:
            print(f"sage exec: {self._words[0]}: {error.strerror}", file=sys.stderr)
            return NOT_FOUND if isinstance(error, FileNotFoundError) else NOT_EXECUTABLE
        self._to_foreground(self._pid)
        for early in self._early:
            self._pass_on(early, None)
        while True:
            news = os.waitid(os.P_PID, self._pid, os.WEXITED | os.WSTOPPED | os.WNOWAIT)
            if news is None or news.si_code != os.CLD_STOPPED:
                self._has_ended = True  # once it is waited for, its number may be that of another process
                _, status = os.waitpid(self._pid, 0)
                self._to_foreground(os.getpgrp())
                return os.WEXITSTATUS(status) if os.WIFEXITED(status) else BY_SIGNAL + os.WTERMSIG(status)
            os.waitid(os.P_PID, self._pid, os.WSTOPPED | os.WNOHANG)
            if news.si_status not in (signal.SIGTTIN, signal.SIGTTOU):
                self._to_foreground(os.getpgrp())
                os.kill(os.getpid(), signal.SIGSTOP)  # as the command is: whoever started both continues both
            self._to_foreground(self._pid)
            self._pass_on(signal.SIGCONT, None)

    def _pass_on(self, number: int, _: FrameType | None) -> None:
        if not self._pid:
            self._early.append(number)
        elif not self._has_ended:
            os.kill(self._pid, number)

    def _reap(self, *_: object) -> None:
        """Wait for the ended processes of others, which are the first process's to wait for."""
        for one in zombies_of_init():
            if one.pid not in (self._pid, self._guardian_pid):
                with suppress(ChildProcessError):
                    os.waitpid(one.pid, os.WNOHANG)

    def _to_foreground(self, group: int) -> None:
        if self._terminal is not None:
            signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTTOU})  # or it would stop whoever is not in it
            with suppress(OSError):
                os.tcsetpgrp(self._terminal, group)
            signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGTTOU})
