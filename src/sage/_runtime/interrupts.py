"""SIGINT, SIGTERM, SIGHUP and SIGQUIT while the main thread waits for a job."""

from __future__ import annotations

import os
import signal
import threading
from contextlib import suppress
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable

SIGNALS = tuple(getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP", "SIGQUIT") if hasattr(signal, name))


class Interrupts:
    """Tells a job of signals as long as it is entered, and puts the program's own handlers back afterwards.

    A handler of Python runs between two bytecodes of the main thread, so a long call into C delays it for as long as it
    lasts. The bytes that the interpreter writes to the wake-up descriptor are not delayed: a thread that was started
    before reads them. The program's own handlers are called besides. On another than the main thread nothing happens.

    Attributes:
        first: the first signal that came, or None.
    """

    def __init__(self, on_signal: Callable[[int], None]) -> None:
        self.first: int | None = None
        self._on_signal = on_signal
        self._previous: dict[int, Any] = {}
        self._wakeup_before = -1
        self._pipe: tuple[int, int] | None = None
        self._thread: threading.Thread | None = None

    def __enter__(self) -> Interrupts:
        if threading.current_thread() is not threading.main_thread():
            return self
        self._pipe = os.pipe()
        os.set_blocking(self._pipe[1], False)
        self._thread = threading.Thread(target=self._watch, args=(self._pipe[0],), name="sage-signals", daemon=True)
        self._thread.start()
        self._wakeup_before = signal.set_wakeup_fd(self._pipe[1], warn_on_full_buffer=False)
        unknown = _caught_in_c()
        for signum in SIGNALS:
            previous = signal.getsignal(signum)
            if previous not in (signal.SIG_IGN, None) and not (previous is signal.SIG_DFL and signum in unknown):
                self._previous[signum] = previous
                signal.signal(signum, self._handle)
        return self

    def __exit__(self, *_: object) -> None:
        if self._pipe is None:
            return
        for signum, previous in self._previous.items():
            signal.signal(signum, previous)
        signal.set_wakeup_fd(self._wakeup_before)
        os.close(self._pipe[1])
        assert self._thread is not None
        self._thread.join()
        os.close(self._pipe[0])

    def raise_for_signal(self) -> None:
        """Raise what the first signal means where the program has no handler of its own for it."""
        if self.first is None or self._is_own(self._previous[self.first]):
            return
        if self.first == signal.SIGINT:
            raise KeyboardInterrupt
        raise SystemExit(128 + self.first)

    @staticmethod
    def _is_own(previous: Any) -> bool:
        return previous not in (signal.SIG_DFL, signal.default_int_handler)

    def _handle(self, signum: int, frame: Any) -> None:
        if self._is_own(self._previous[signum]):
            self._previous[signum](signum, frame)

    def _watch(self, read_end: int) -> None:
        while received := os.read(read_end, 64):
            for signum in received:
                if signum in self._previous:
                    if signum == getattr(signal, "SIGQUIT", None):
                        _tell_where()
                    self.first = self.first or signum
                    self._on_signal(signum)
                if self._wakeup_before != -1:
                    os.write(self._wakeup_before, bytes([signum]))


def _caught_in_c() -> set[int]:
    """Return the signals that have a handler, Python's own or one that it does not know of and could not put back."""
    with suppress(OSError, ValueError, StopIteration), open("/proc/self/status", encoding="ascii") as file:
        mask = int(next(line for line in file if line.startswith("SigCgt:")).split()[1], 16)
        return {signum for signum in SIGNALS if mask >> (signum - 1) & 1}
    return set()


def _tell_where() -> None:
    """Write to standard error where all threads stand."""
    import faulthandler  # hardly any program needs it

    with suppress(OSError, ValueError, RuntimeError, AttributeError):  # there may be no standard error
        faulthandler.dump_traceback(all_threads=True)
