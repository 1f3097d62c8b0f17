"""SIGINT, SIGTERM, SIGHUP and SIGQUIT while the main thread waits for a job."""

from __future__ import annotations

import os
import signal
import threading
from contextlib import suppress
from typing import TYPE_CHECKING, ClassVar

from sage._current_job import here
from sage._descriptors import file_of

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable
    from types import FrameType

    Handler = Callable[[int, FrameType | None], object] | int | None

SIGNALS = tuple(getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP", "SIGQUIT") if hasattr(signal, name))

OVER = b"\0"
"""Ends the thread that hears of signals; no signal has this number."""

LOST_S = 1.0
"""How long the thread is waited for if its pipe is lost."""


class SignalsTaken:
    """Handlers of signals that are set while this is entered, and a thread that hears of signals at once.

    A handler of Python runs between two bytecodes of the main thread, so a long call into C delays it for as long as it
    lasts. The bytes that the interpreter writes to the wake-up descriptor are not delayed: a thread that was started
    before reads them, and passes them on to the descriptor that the program had set.

    A process that is forked meanwhile has the program's own handlers and descriptor again from its first line on. No
    signal falls between: it would be handled by ours, and counted here as if it had been sent to this process.

    Args:
        on_signal: called on a thread with the number of each signal that Python has a handler for, or None.
        name: the name of the thread.
    """

    _entered: ClassVar[list[SignalsTaken]] = []

    def __init__(self, on_signal: Callable[[int], None] | None = None, name: str = "sage-signals") -> None:
        self.previous: dict[int, Handler] = {}
        self._name = name
        self._on_signal = on_signal
        self._wakeup_before = -1
        self._pipe: tuple[int, int] | None = None
        self._file: tuple[int, int] | None = None
        self._thread: threading.Thread | None = None

    def __enter__(self) -> SignalsTaken:
        self._entered.append(self)
        if self._on_signal is not None:
            with suppress(OSError, RuntimeError):  # then whoever set the handlers hears of signals by them
                self._begin_to_listen()
        return self

    def __exit__(self, *_: object) -> None:
        if self not in self._entered:
            return  # a forked process, which has put everything back already
        self._entered.remove(self)
        self._put_back()
        if self._pipe is None:
            return
        assert self._thread is not None
        if self.is_heard:
            # Not the end of the pipe: a process that was forked by code that Python knows nothing of may hold it open.
            with suppress(OSError):
                os.write(self._pipe[1], OVER)
            os.close(self._pipe[1])
            self._thread.join()
            os.close(self._pipe[0])
        else:
            self._thread.join(LOST_S)  # which ends by itself, unless somebody else has a copy of the pipe

    @property
    def is_heard(self) -> bool:
        """Whether the thread still hears of signals: the program may have closed every descriptor that it finds."""
        return self._pipe is not None and all(file_of(end) == self._file for end in self._pipe)

    def take(self, signum: int, handler: Handler) -> None:
        """Set a handler, and remember the one that the program has."""
        self.previous[signum] = signal.getsignal(signum)
        signal.signal(signum, handler)

    def _begin_to_listen(self) -> None:
        pipe = self._pipe = os.pipe()
        self._thread = threading.Thread(target=self._listen, args=(pipe[0],), name=self._name, daemon=True)
        try:
            self._file = file_of(pipe[0])
            os.set_blocking(pipe[1], False)
            self._thread.start()
            self._wakeup_before = signal.set_wakeup_fd(pipe[1], warn_on_full_buffer=False)
        except BaseException:
            os.close(pipe[1])
            if self._thread.ident is not None:
                self._thread.join()
            os.close(pipe[0])
            self._pipe = None
            raise

    def _put_back(self) -> None:
        for signum, previous in self.previous.items():
            signal.signal(signum, previous)
        if self._pipe is not None:
            try:
                signal.set_wakeup_fd(self._wakeup_before)
            except (OSError, ValueError):  # the program has closed it meanwhile
                signal.set_wakeup_fd(-1)

    def _listen(self, read_end: int) -> None:
        assert self._on_signal is not None
        while received := os.read(read_end, 64):
            for signum in received:
                if signum == OVER[0]:
                    return
                self._on_signal(signum)
                if self._wakeup_before != -1:
                    with suppress(OSError):  # nobody reads there any more
                        os.write(self._wakeup_before, bytes([signum]))

    @classmethod
    def _before_fork(cls) -> None:
        if cls._entered:
            here.mask = signal.pthread_sigmask(signal.SIG_BLOCK, signal.valid_signals())

    @classmethod
    def _after_fork_in_parent(cls) -> None:
        mask, here.mask = here.mask, None
        if mask is not None:
            signal.pthread_sigmask(signal.SIG_SETMASK, mask)

    @classmethod
    def _after_fork_in_child(cls) -> None:
        for taken in reversed(cls._entered):
            taken._put_back()
            if taken.is_heard:
                for descriptor in taken._pipe or ():
                    os.close(descriptor)
        cls._entered.clear()
        cls._after_fork_in_parent()


os.register_at_fork(
    before=SignalsTaken._before_fork,
    after_in_parent=SignalsTaken._after_fork_in_parent,
    after_in_child=SignalsTaken._after_fork_in_child,
)


class Interrupts:
    """Tells a job of signals as long as it is entered, and puts the program's own handlers back afterwards.

    The program's own handlers are called besides. On another than the main thread nothing happens.

    Attributes:
        first: the first signal that came, or None.
        is_entered: whether it does anything, which it does on the main thread only.
    """

    def __init__(self, on_signal: Callable[[int], None]) -> None:
        self.first: int | None = None
        self._on_signal = on_signal
        self._taken = SignalsTaken(self._hear)
        self.is_entered = False

    def __enter__(self) -> Interrupts:
        if threading.current_thread() is not threading.main_thread():
            return self
        self.is_entered = True
        self._taken.__enter__()
        unknown = _caught_in_c()
        for signum in SIGNALS:
            previous = signal.getsignal(signum)
            if previous not in (signal.SIG_IGN, None) and not (previous is signal.SIG_DFL and signum in unknown):
                self._taken.take(signum, self._handle)
        return self

    def __exit__(self, *_: object) -> None:
        if self.is_entered:
            self._taken.__exit__()

    def raise_for_signal(self) -> None:
        """Raise the exception of the first signal, if the program does not have its own handler for it."""
        if self.first is None or self._is_own(self._taken.previous[self.first]):
            return
        if self.first == signal.SIGINT:
            raise KeyboardInterrupt
        raise SystemExit(128 + self.first)

    @staticmethod
    def _is_own(previous: object) -> bool:
        return previous not in (signal.SIG_DFL, signal.default_int_handler)

    def _handle(self, signum: int, frame: FrameType | None) -> None:
        if not self._taken.is_heard:
            self._hear(signum)
        previous = self._taken.previous[signum]
        if callable(previous) and self._is_own(previous):
            previous(signum, frame)

    def _hear(self, signum: int) -> None:
        if signum in self._taken.previous:
            if signum == getattr(signal, "SIGQUIT", None):
                _tell_where()
            self.first = self.first or signum
            self._on_signal(signum)


def mean_nothing(signums: Iterable[int]) -> None:
    """Let signals do nothing in this process from now on; its child processes have their default."""
    taken = SignalsTaken()
    taken.__enter__()
    for signum in signums:
        taken.take(signum, lambda *_: None)  # unlike SIG_IGN, child processes do not inherit this


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
