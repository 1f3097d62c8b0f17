"""What can be seen of a job: typed events, counts per operator, and log files."""

from __future__ import annotations

import logging
import os
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

if TYPE_CHECKING:
    from collections.abc import Iterator

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
        subject: what changed: "job", "task" or "service".
        name: the name of it.
        before: the state it left.
        after: the state it entered.
    """

    at: float
    subject: str
    name: str
    before: str
    after: str

    def __str__(self) -> str:
        return f'{self.subject} "{self.name}": {self.before} -> {self.after}'


class OperatorMetrics:
    """Counts of one operator in one task, added once per batch.

    Attributes:
        operator: the operator's name.
        records_in: records that the function was called with, or that a source read.
        records_out: records that went on.
        failed: records whose function raised, after the last attempt.
        busy_s: time in the operator, in seconds.
    """

    __slots__ = ("busy_s", "failed", "operator", "records_in", "records_out")

    def __init__(self, operator: str) -> None:
        self.operator = operator
        self.records_in = 0
        self.records_out = 0
        self.failed = 0
        self.busy_s = 0.0


class SessionLogs:
    """The log files of this process under one folder: `jobmanager/session_<time>_<pid>/`.

    `Dispatcher.log` and `JobManager.log` hold what their names say, `Error.log` every error with its traceback, and
    each job has a file of its own.
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
        """Return the session of this process under `log_dir`, a new one if there is none yet."""
        root = Path(log_dir).absolute() / "jobmanager"
        if root not in cls._open or cls._open[root].pid != os.getpid():
            _prune(root)
            stamp = time.strftime("%Y%m%d_%H%M%S")
            session = cls(root / f"session_{stamp}_{os.getpid()}")
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
            logger.setLevel(level)
        self._handlers.append((logger, handler))
        return handler


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
