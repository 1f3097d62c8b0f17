"""A child process whose output is read, and whose end is noticed, by one thread."""

from __future__ import annotations

import os
import select
import threading
from contextlib import suppress
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import subprocess
    from collections.abc import Callable

READ_BYTES = 65_536
LAST_READS_MAX = 64
"""How much is read of the output after the end; what the process left may go on writing for ever."""

LINE_BYTES_MAX = 8_192
"""Longer lines are cut into several."""


class WatchedProcess:
    """Watches a child that was started with its output in a pipe.

    The child is not reaped before `close`, so that its pid, its group and its session stay its own until then.

    Args:
        name: name of the thread.
        child: the process.
        on_line: is given each line of the output, by the thread.
        on_end: is given the exit code, negative for a signal or None if somebody else reaped the child, after all that
            it had written; by the thread, before `wait` returns.
    """

    def __init__(
        self,
        name: str,
        child: subprocess.Popen[bytes],
        on_line: Callable[[str], None],
        on_end: Callable[[int | None], None],
    ) -> None:
        assert child.stdout is not None
        self.pid = child.pid
        self._child = child
        self._on_line = on_line
        self._on_end = on_end
        self._rest = b""
        self._ended = threading.Event()
        self._output = child.stdout
        os.set_blocking(self._output.fileno(), False)
        self._pidfd = os.pidfd_open(child.pid)
        self._wake = os.eventfd(0, os.EFD_CLOEXEC)
        self._thread = threading.Thread(target=self._watch, name=name, daemon=True)
        self._thread.start()

    def has_ended(self) -> bool:
        """Return whether the process has ended, also if the thread has not noticed yet."""
        if self._ended.is_set():
            return True
        with suppress(ChildProcessError):
            return os.waitid(os.P_PID, self.pid, os.WEXITED | os.WNOWAIT | os.WNOHANG) is not None
        return True

    def wait(self, timeout_s: float | None = None) -> bool:
        """Wait until the process has ended and `on_end` was called, and return whether that is so."""
        return self._ended.wait(timeout_s)

    def close(self) -> None:
        """Reap the process, which has ended, and free the thread; the output of what it left is cut off."""
        os.eventfd_write(self._wake, 1)
        self._thread.join()
        self._child.wait()
        self._output.close()
        os.close(self._pidfd)
        os.close(self._wake)

    def _watch(self) -> None:
        poll = select.poll()
        output = self._output.fileno()
        for descriptor in (output, self._pidfd, self._wake):
            poll.register(descriptor, select.POLLIN)
        is_open = True
        while is_open or not self._ended.is_set():
            ready = {descriptor for descriptor, _ in poll.poll()}
            is_last = self._pidfd in ready or self._wake in ready
            if is_open and (output in ready or is_last):
                is_open = self._read(LAST_READS_MAX if is_last else 1)
                if not is_open:
                    poll.unregister(output)
            if self._pidfd in ready:
                poll.unregister(self._pidfd)
                self._on_end(self._exit_code())
                self._ended.set()
            if self._wake in ready:
                break
        self._take(self._rest)

    def _read(self, reads_max: int) -> bool:
        """Read what is there, and return whether more may come."""
        for _ in range(reads_max):
            try:
                data = os.read(self._output.fileno(), READ_BYTES)
            except BlockingIOError:
                return True
            *lines, self._rest = (self._rest + data).split(b"\n")
            while len(self._rest) > LINE_BYTES_MAX:
                lines.append(self._rest[:LINE_BYTES_MAX])
                self._rest = self._rest[LINE_BYTES_MAX:]
            for line in lines:
                self._take(line)
            if not data:
                return False
        return True

    def _take(self, line: bytes) -> None:
        for start in range(0, len(line), LINE_BYTES_MAX):
            # A bar that shows progress returns to the beginning of its line again and again; its last state counts.
            text = line[start : start + LINE_BYTES_MAX].rstrip(b"\r").rpartition(b"\r")[2].decode(errors="replace")
            if text.strip():
                self._on_line(text)

    def _exit_code(self) -> int | None:
        try:
            ended = os.waitid(os.P_PID, self.pid, os.WEXITED | os.WNOWAIT)
        except ChildProcessError:
            return None
        assert ended is not None
        return ended.si_status if ended.si_code == os.CLD_EXITED else -ended.si_status
