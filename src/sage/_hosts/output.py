"""The output of a process, read line by line."""

from __future__ import annotations

import os
import select
import threading
from contextlib import ExitStack
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable

READ_BYTES = 65_536
LAST_READS_MAX = 2
"""More than a pipe holds, so all the last output of a process; processes that it has left may write forever."""

LINE_BYTES_MAX = 8_192
"""Longer lines are cut into several."""


class Output:
    """Reads the output of one process, on a thread of its own.

    Args:
        pipe: the descriptor that is read; it belongs to this from now on, and is closed if this cannot begin.
        name: of the thread.
        on_line: is given each line that is not blank, by the thread.
    """

    def __init__(self, pipe: int, name: str, on_line: Callable[[str], None]) -> None:
        self._pipe = pipe
        self._on_line = on_line
        self._rest = b""
        self._is_closed = False
        self._caught_up = threading.Event()
        with ExitStack() as undo:
            undo.callback(os.close, pipe)
            os.set_blocking(pipe, False)
            self._asked = os.eventfd(0, os.EFD_CLOEXEC)
            undo.callback(os.close, self._asked)
            self._thread = threading.Thread(target=self._work, name=name, daemon=True)
            self._thread.start()
            undo.pop_all()

    def catch_up(self, timeout_s: float) -> None:
        """Wait until all was read that is written now; `on_line` may take long, but no longer than that is waited."""
        os.eventfd_write(self._asked, 1)
        self._caught_up.wait(timeout_s)

    def close(self) -> None:
        """Read the output written so far."""
        self._is_closed = True
        os.eventfd_write(self._asked, 1)
        self._thread.join()
        os.close(self._asked)
        os.close(self._pipe)

    def _work(self) -> None:
        poll = select.poll()
        poll.register(self._pipe, select.POLLIN)
        poll.register(self._asked, select.POLLIN)
        is_open = True
        while not self._is_closed:
            ready = {descriptor for descriptor, _ in poll.poll()}
            was_asked = self._asked in ready
            if was_asked:
                os.eventfd_read(self._asked)
            if is_open and not self._read(LAST_READS_MAX if was_asked else 1):
                is_open = False
                poll.unregister(self._pipe)
            if was_asked:
                self._take(self._rest)
                self._rest = b""
                self._caught_up.set()

    def _read(self, reads_max: int) -> bool:
        """Read the available output, and return whether more may come."""
        for _ in range(reads_max):
            try:
                data = os.read(self._pipe, READ_BYTES)
            except BlockingIOError:
                break
            *lines, self._rest = (self._rest + data).split(b"\n")
            for line in lines:
                self._take(line)
            if not data:
                return False
            while len(self._rest) > LINE_BYTES_MAX:
                self._take(self._rest[:LINE_BYTES_MAX])
                self._rest = self._rest[LINE_BYTES_MAX:]
        return True

    def _take(self, line: bytes) -> None:
        for start in range(0, len(line), LINE_BYTES_MAX):
            # A bar that shows progress returns to the beginning of its line again and again; its last state counts.
            text = line[start : start + LINE_BYTES_MAX].rstrip(b"\r").rpartition(b"\r")[2].decode(errors="replace")
            if text.strip():
                self._on_line(text)
