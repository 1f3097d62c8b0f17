"""A user's program, run as Python itself would run it."""

from __future__ import annotations

import runpy
import signal
import sys
import threading
import traceback
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING

from sage import errors
from sage._assembly import INTERRUPT_TIMEOUT_S
from sage._runtime.interrupts import SignalsTaken
from sage._runtime.manager import JobManager
from sage._runtime.states import StopMode
from sage._standard_streams import CUT_OFF_CODE, has_unread_output, is_of_output, let_go
from sage.errors import InternalError, JobError, SageError
from sage.observability import ReportFile
from sage.report import Cleanliness, Outcome

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from sage._runtime.job import Job
    from sage.report import JobReport

EXIT_FAILED = 1
EXIT_DIRTY = 2
EXIT_BUDGET = 3
EXIT_INTERRUPTED = 130

TERMINATING = (signal.SIGTERM, signal.SIGHUP)

NUDGES_S = (0.05, 0.2, 1.0)
"""How long after a signal, and after each other, the main thread is nudged, in seconds."""

OWN_CODE = str(Path(errors.__file__).parent)


class Program:
    """A file that is run as `__main__`, with its folder first on the path of imports and its own arguments."""

    def __init__(self, file: Path, args: Sequence[str] = ()) -> None:
        self.error: BaseException | None = None
        self.names: dict[str, object] = {}
        self.file = file
        self._args = args

    def run(self) -> None:
        """Run it, and wait for the jobs that it leaves running; they are stopped if it raised something."""
        with self._terminated_by_exit(), _heard_while_waiting():
            try:
                with self._as_main():
                    self.names = runpy.run_path(str(self.file), run_name="__main__")
                for job in self._running():
                    job.wait()
                if has_unread_output():
                    let_go()
                    raise SystemExit(CUT_OFF_CODE)
            except BaseException as error:  # Ctrl-C and SystemExit decide about the exit code too
                if isinstance(error, BrokenPipeError) and is_of_output(error):
                    let_go()
                    error = SystemExit(CUT_OFF_CODE)
                self.error = error
                self._stop_jobs(error)

    @property
    def jobs(self) -> tuple[Job, ...]:
        """The jobs that it submitted so far, the first one first."""
        return tuple(JobManager().jobs.values())

    @property
    def reports(self) -> tuple[JobReport, ...]:
        """The reports of the jobs that have ended."""
        return tuple(job.report for job in self.jobs if not job.is_running)

    @property
    def exit_code(self) -> int:
        """The exit code: the program's own, or else that of its jobs."""
        codes = [EXIT_DIRTY if ReportFile.problems else 0, *map(_code_of, self.reports)]
        of_jobs = max(codes, key=(0, EXIT_BUDGET, EXIT_DIRTY, EXIT_FAILED).index)
        match self.error:
            case None:
                return of_jobs
            case KeyboardInterrupt():
                return EXIT_INTERRUPTED
            case SystemExit(code=code):
                return code or of_jobs if isinstance(code, int | None) else EXIT_FAILED
            case JobError():
                return of_jobs or EXIT_FAILED
        return EXIT_FAILED

    def error_text(self) -> str:
        """Return the error with its notes and the program's own part of the traceback, or ""."""
        match self.error:
            case None | KeyboardInterrupt():
                return ""
            case SystemExit(code=code):
                return code if isinstance(code, str) else ""
        return text_of(self.error)

    def _running(self) -> list[Job]:
        return [job for job in self.jobs if job.is_running]

    def _stop_jobs(self, error: BaseException) -> None:
        for job in self._running():
            if isinstance(error, KeyboardInterrupt):
                job._interrupt(signal.SIGINT)
            else:
                job._request(StopMode.STOP, f"the program ended by {type(error).__name__}", INTERRUPT_TIMEOUT_S)
            # Its report has the other errors, and the first signal has determined the exit code.
            with suppress(SageError, KeyboardInterrupt, SystemExit):
                job.wait()

    @contextmanager
    def _terminated_by_exit(self) -> Iterator[None]:
        """Turn the first SIGTERM or SIGHUP into SystemExit, as their default leaves no time to clean up."""
        received: list[int] = []

        def leave(signum: int, frame: object) -> None:  # noqa: ARG001
            received.append(signum)
            if len(received) == 1:
                raise SystemExit(128 + signum)

        # One that is ignored, as under nohup, stays ignored.
        changed = [signum for signum in TERMINATING if signal.getsignal(signum) is signal.SIG_DFL]
        with SignalsTaken() as taken:
            for signum in changed:
                taken.take(signum, leave)
            yield

    @contextmanager
    def _as_main(self) -> Iterator[None]:
        path, argv = sys.path[:], sys.argv
        # A console script leaves the folder of scripts there, where Python puts the folder of the program.
        sys.path[0] = str(self.file.absolute().parent)
        sys.argv = [str(self.file), *self._args]
        try:
            yield
        finally:
            sys.path[:], sys.argv = path, argv


@contextmanager
def _heard_while_waiting() -> Iterator[None]:
    """See to it that the main thread hears of every signal, also of one that comes when it is about to wait.

    A thread that is to wait, in a call such as `Event.wait`, gives the interpreter's lock to another one first, which
    takes a while on a busy machine. A signal that comes meanwhile interrupts nothing, and the thread then waits without
    having heard of it. A waiting thread reads the bytes that the interpreter writes to the wake-up descriptor, and
    interrupts the main thread again with a signal that has no effect.
    """
    if signal.getsignal(signal.SIGURG) is not signal.SIG_DFL:
        yield  # the program around has a use for it
        return
    main = threading.get_ident()
    over = threading.Event()

    def nudge(signum: int) -> None:
        for pause_s in NUDGES_S if signum != signal.SIGURG else ():
            if not over.wait(pause_s):
                signal.pthread_kill(main, signal.SIGURG)

    with SignalsTaken(nudge, "sage-nudges") as taken:
        taken.take(signal.SIGURG, lambda *_: None)
        try:
            yield
        finally:
            over.set()


def _code_of(report: JobReport) -> int:
    if report.state in (Outcome.FAILED, Outcome.LOST):
        return EXIT_FAILED
    if report.cleanliness is Cleanliness.DIRTY:
        return EXIT_DIRTY
    return EXIT_BUDGET if report.state is Outcome.STOPPED and report.why.startswith("budget: ") else 0


def text_of(error: BaseException) -> str:
    """Return an error with its notes and the program's own part of the traceback."""
    shown = traceback.TracebackException.from_exception(error, compact=True)
    if not isinstance(error, InternalError):
        _leave_out_own_code(shown, set())
    return "".join(shown.format())


def _leave_out_own_code(shown: traceback.TracebackException, seen: set[int]) -> None:
    """Leave only the frames of the user's code, in the error and in everything behind it; Error.log has them all."""
    if id(shown) in seen:
        return
    seen.add(id(shown))
    frames = [frame for frame in shown.stack if not is_own(frame.filename)]
    shown.stack = traceback.StackSummary.from_list(frames)
    for other in (shown.__cause__, shown.__context__, *(shown.exceptions or ())):
        if other is not None:
            _leave_out_own_code(other, seen)


def is_own(file_name: str) -> bool:
    """Return whether a file is part of SAGE, or runs the program for it."""
    return file_name.startswith((OWN_CODE, "<frozen runpy>")) or file_name == runpy.__file__
