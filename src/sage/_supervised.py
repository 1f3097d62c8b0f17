"""Processes that end with a block of your program, however that block ends."""

from __future__ import annotations

import os
import time
from typing import TYPE_CHECKING

from sage._guardian.journal import Run, entry
from sage._guardian.lease import GuardianLease
from sage._processes import COOKIE_VARIABLE, TERM_GRACE_S, described, end_all, with_cookie, with_descendants

if TYPE_CHECKING:
    from typing import Self

    from sage._processes import Process


class supervised:
    """Let every process that starts within the block end with it, also if this process is killed in it.

    The processes are known by a variable in their environment, which their own children inherit, so that it does not
    matter who started them, or whether they have left their session. At the end of the block each gets SIGTERM, and is
    killed after `grace_s`. If this process dies, a guardian does the same, and writes a report that names what had to
    be killed; `sage report` shows it.

    The variable is set in `os.environ`, so blocks of several threads of one process must not overlap.

    Args:
        name: what reports call the block.
        grace_s: how long the processes may take to end after SIGTERM, in seconds.

    Attributes:
        ended: after the block, the processes that were still there at its end, as `process 12 (python worker.py)`.
        killed: those of them that did not end after SIGTERM, and were killed.
        left: those that even the kernel could not end.

    Raises:
        ServiceError: the folder of the run cannot be made, or is not safe from others.

    >>> import subprocess, sys
    >>> with supervised("helpers") as block:
    ...     sleeper = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
    >>> sleeper.wait(), len(block.ended), block.killed
    (-15, 1, ())
    """

    def __init__(self, name: str = "supervised", grace_s: float = TERM_GRACE_S) -> None:
        self.name = name
        self.grace_s = grace_s
        self.ended: tuple[str, ...] = ()
        self.killed: tuple[str, ...] = ()
        self.left: tuple[str, ...] = ()
        self._id = os.urandom(8).hex()

    def __enter__(self) -> Self:
        """Begin to know the processes."""
        self._lease = GuardianLease.acquire()
        self._token = self._lease.new_token()
        self._lease.note(entry(Run.take_job, self._id, self.name, None, time.time(), self._token))
        self._outer = os.environ.get(COOKIE_VARIABLE)
        os.environ[COOKIE_VARIABLE] = ":".join(filter(None, [self._outer, self._lease.cookie, self._token]))
        return self

    def __exit__(self, *_: object) -> None:
        """End the processes."""
        if self._outer is None:
            os.environ.pop(COOKIE_VARIABLE, None)
        else:
            os.environ[COOKIE_VARIABLE] = self._outer
        names: dict[Process, str] = {}

        def find() -> set[Process]:
            found = with_cookie(self._token)
            found -= with_descendants(self._lease.released(), found)
            names.update({one: described(one) for one in found - names.keys()})
            return found

        try:
            outcome = end_all(find, self.grace_s)
        except BaseException:  # Ctrl-C: whoever is left is killed; the next one leaves that to the guardian
            end_all(find, 0.0)
            self._leave()
            raise
        self._leave()
        self.ended = tuple(names[one] for one in sorted(names))
        self.killed = tuple(names[one] for one in sorted(outcome.killed))
        self.left = tuple(names[one] for one in sorted(outcome.left))

    def _leave(self) -> None:
        self._lease.note(entry(Run.take_sealed, self._id))
        self._lease.release()
