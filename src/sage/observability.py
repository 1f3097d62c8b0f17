"""Observing a job: typed events, counts per operator, and log files."""

from __future__ import annotations

import json
import logging
import os
import stat
import sys
import threading
import time
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

from sage._descriptors import OpenFile
from sage._logs import log_of
from sage.errors import GraphError, hint

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from sage.report import HookReport, JobReport

SESSIONS_MAX = 20
"""How many session folders are kept; the oldest go first."""

LOG_FILE_BYTES_MAX = 10_000_000
LOG_FILES_MAX = 3

LOG_FORMAT = "%(asctime)s %(levelname)s %(name)s %(message)s"


@dataclass(frozen=True, slots=True)
class Event:
    """One change of state.

    Attributes:
        at: when, in seconds since the epoch.
        subject: the kind of thing that changed: "job", "task" or "service".
        name: the name of it; empty for the job.
        before: the state it left.
        after: the state it entered.
    """

    at: float
    subject: str
    name: str
    before: str
    after: str

    def __str__(self) -> str:
        what = f'{self.subject} "{self.name}"' if self.name else self.subject
        return f"{what}: {self.before} -> {self.after}"


@dataclass(frozen=True, slots=True)
class HookEvent:
    """The end of one call of a hook.

    Attributes:
        at: when it ended, in seconds since the epoch.
        service: the service's name.
        report: its outcome and duration.
    """

    at: float
    service: str
    report: HookReport


class OperatorMetrics:
    """Counts of one operator in one task, added once per batch.

    Attributes:
        operator: the operator's name.
        records_in: records that the function was called with, or that a source read.
        records_out: records that went on.
        failed: records whose function raised, after the last attempt.
        fatal: those of them that failed the job.
        busy_s: time in the operator, in seconds.
        full_s: time in which all calls ran that may run at once, in seconds.
        lost: the first records that failed, each with its error, both in words.
    """

    __slots__ = ("busy_s", "failed", "fatal", "full_s", "lost", "operator", "records_in", "records_out")

    def __init__(self, operator: str) -> None:
        self.operator = operator
        self.records_in = 0
        self.records_out = 0
        self.failed = 0
        self.fatal = 0
        self.busy_s = 0.0
        self.full_s = 0.0
        self.lost: list[tuple[str, str]] = []


class Onward(logging.Handler):
    """Hands the records of a logger on to the handlers above it, if they would get them without the log files."""

    def __init__(self, logger: logging.Logger) -> None:
        super().__init__()
        self._logger = logger
        self._own_level = logger.level

    def emit(self, record: logging.LogRecord) -> None:
        """Hand a record on."""
        above = self._logger.parent
        if above is not None and record.levelno >= (self._own_level or above.getEffectiveLevel()):
            above.callHandlers(record)


class SessionLogs:
    """The log files of this process under one folder: `jobmanager/session_<time>_<pid>/`.

    `Dispatcher.log` and `JobManager.log` hold the log of their component, `Error.log` holds every error with its
    traceback, and each job has its own file.
    """

    _open: ClassVar[dict[Path, SessionLogs]] = {}

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        folder.mkdir(parents=True)
        self._handlers: list[tuple[logging.Logger, logging.Handler]] = []
        self._attach("sage.dispatcher", "Dispatcher.log", logging.INFO)
        self._attach("sage.manager", "JobManager.log", logging.INFO)
        self._attach("sage", "Error.log", logging.ERROR)

    @classmethod
    def open(cls, log_dir: str | os.PathLike[str]) -> SessionLogs:
        """Return the session of this process under `log_dir`, creating it on first use.

        Raises:
            GraphError: the folder cannot be written.
        """
        root = Path(log_dir).absolute() / "jobmanager"
        if root not in cls._open or cls._open[root].pid != os.getpid():
            stamp = time.strftime("%Y%m%d_%H%M%S")
            try:
                _prune(root)
                session = cls(root / f"session_{stamp}_{os.getpid()}")
            except OSError as error:
                wrong = GraphError(f'log folder "{os.fspath(log_dir)}" cannot be written: {error.strerror or error}')
                raise hint(wrong, "Give log_dir, or SAGE_LOG_DIR, a folder of this user.") from error
            session.pid = os.getpid()
            cls._open[root] = session
        return cls._open[root]

    pid = 0

    def open_job(self, name: str, id_: str) -> logging.Handler:
        """Begin the file of one job; the caller gives the handler to `close_job`."""
        handler = self._attach("sage.job", f"{_file_name(name)}_{id_[:8]}.log", logging.INFO)
        handler.addFilter(lambda record: getattr(record, "job", None) == id_)
        return handler

    def close_job(self, handler: logging.Handler) -> None:
        """Close the file of a job."""
        for logger, attached in list(self._handlers):
            if attached is handler:
                logger.removeHandler(handler)
                self._handlers.remove((logger, attached))
        handler.close()

    def _attach(self, logger_name: str, file_name: str, level: int) -> logging.Handler:
        from logging.handlers import RotatingFileHandler  # imports sockets and queues that most programs never need

        handler = RotatingFileHandler(
            self.folder / file_name,
            maxBytes=LOG_FILE_BYTES_MAX,
            backupCount=LOG_FILES_MAX,
            delay=True,
            encoding="utf-8",
        )
        handler.setLevel(level)
        handler.setFormatter(logging.Formatter(LOG_FORMAT))
        logger = logging.getLogger(logger_name)
        logger.addHandler(handler)
        if logger.getEffectiveLevel() > level:
            # The files get more than the program asked for; its own handlers get the same as without the files.
            if logger.propagate:  # the program may have set its level again since an earlier job
                logger.addHandler(Onward(logger))
                logger.propagate = False
            logger.setLevel(level)
        self._handlers.append((logger, handler))
        return handler


class ReportFile:
    """The file that tells of jobs in JSON Lines while they run: events, hooks, records that failed, and the report.

    Each line is written at once and in one piece, so that a killed process leaves everything up to that moment, and
    several jobs may write to the same file; `job` in a line says which it was. After the first write that fails nothing
    more is written, and the job goes on.
    """

    problems: ClassVar[list[str]] = []
    """The reports that could not be written in this process, a sentence for each job."""

    def __init__(self, path: str | os.PathLike[str], file: OpenFile | None, job: str, problem: str = "") -> None:
        self._path = path
        self._file = file
        self._job = job
        self._problem = problem
        self._lock = threading.Lock()

    @classmethod
    def open(cls, path: str | os.PathLike[str], job: str, name: str, *, must_open: bool = True) -> ReportFile:
        """Begin to write about a job, after the file's existing content.

        Args:
            path: where the file is; its folder has to exist.
            job: the job's id.
            name: the job's name.
            must_open: whether a file that cannot be opened is an error; else it is told at the end of the job.

        Raises:
            GraphError: the file cannot be opened.
        """
        try:
            opened = OpenFile(append_to(path))
        except OSError as error:
            problem = error.strerror or str(error)
            if must_open:
                wrong = GraphError(f'report file "{os.fspath(path)}" cannot be written: {problem}')
                raise hint(wrong, "Its folder has to exist, and it has to be a file.") from error
            return cls(path, None, job, problem)
        file = cls(path, opened, job)
        program = getattr(sys.modules["__main__"], "__file__", None)
        program = None if program is None else os.path.abspath(program)
        file._write("job", {"at": time.time(), "name": name, "pid": os.getpid(), "program": program})
        return file

    def note(self, event: Event | HookEvent) -> None:
        """Write one event or hook; called by the thread of the supervisor."""
        if isinstance(event, Event):
            self._write("event", asdict(event))
        else:
            self._write("hook", {"at": event.at, "service": event.service, **asdict(event.report)})

    def fail(self, operator: str, record: str, error: str, cassette: str, number: int) -> None:
        """Write that a record failed, and where it is kept; any thread may call this."""
        about = {"operator": operator, "record": record, "error": error, "cassette": cassette, "number": number}
        self._write("failed", {"at": time.time(), **about})

    def end(self, report: JobReport) -> None:
        """Write the report, close the file, and say on standard error if something could not be written."""
        self._write("report", report.to_dict())
        with self._lock:
            self._close()
        if not self._problem:
            return
        text = f'report file "{os.fspath(self._path)}" is not complete: {self._problem}'
        self.problems.append(text)
        log_of("sage.job", {"job": self._job}).error("%s", text)
        # Standard error may be closed or on the same full disk.
        if sys.stderr is not None:
            with suppress(OSError, ValueError):
                sys.stderr.write(f"warning: {text}\n")

    def _write(self, kind: str, values: Mapping[str, object]) -> None:
        line = json.dumps({"type": kind, "job": self._job, **values}, default=str).encode() + b"\n"
        with self._lock:
            if self._file is None:
                return
            try:
                is_whole = self._file.write(line) == len(line)
                self._problem = "" if is_whole else "a line could be written in part only"
            except OSError as error:
                self._problem = error.strerror or str(error)
            if self._problem:
                self._close()

    def _close(self) -> None:
        if self._file is not None:
            # A file system in a network may tell only here that it is full.
            try:
                self._file.close()
            except OSError as error:
                self._problem = self._problem or error.strerror or str(error)
            self._file = None


def append_to(path: str | os.PathLike[str]) -> int:
    """Open a file for appending lines and return its descriptor; a line that was torn there is ended first.

    Raises:
        OSError: it cannot be opened.
    """
    # A named pipe that nobody reads, or reads too slowly, is an error and must not block the job.
    flags = os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC | os.O_NONBLOCK
    descriptor = os.open(path, flags, 0o666)
    status = os.fstat(descriptor)
    if stat.S_ISREG(status.st_mode) and status.st_size:
        with suppress(OSError):
            with Path(path).open("rb") as file:
                file.seek(-1, os.SEEK_END)
                is_torn = file.read() != b"\n"
            if is_torn:
                os.write(descriptor, b"\n")
    return descriptor


def console_level(level: str) -> None:
    """Show the log of this process on standard error from `level` on."""
    logger = logging.getLogger("sage")
    for handler in logger.handlers:
        if handler.name == "sage-console":
            break
    else:
        handler = logging.StreamHandler()
        handler.name = "sage-console"
        handler.setFormatter(logging.Formatter(LOG_FORMAT))
        logger.addHandler(handler)
    handler.setLevel(level)
    if logger.level == logging.NOTSET or logger.level > handler.level:
        logger.setLevel(handler.level)


def _prune(root: Path) -> None:
    sessions = sorted(root.glob("session_*"), key=lambda path: path.stat().st_mtime) if root.is_dir() else []
    for session in sessions[: max(0, len(sessions) - SESSIONS_MAX + 1)]:
        for file in _files(session):
            file.unlink(missing_ok=True)
        session.rmdir()


def _files(folder: Path) -> Iterator[Path]:
    return (path for path in folder.iterdir() if path.is_file())


def _file_name(name: str) -> str:
    return "".join(character if character.isalnum() or character in "-_" else "_" for character in name)[:60]
