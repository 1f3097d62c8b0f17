"""The folder of a run: whose it is, by its name and its lock, and which ones nobody needs any more.

Programs that clean the folder for temporary files remove single files or all of it, so a missing file proves
nothing. The name of the folder says which process is the driver. Driver and guardian also hold a lock on the folder
itself: it lasts while files are removed, and `systemd-tmpfiles` leaves a locked folder alone.
"""

from __future__ import annotations

import errno
import fcntl
import os
import shutil
import time
from contextlib import suppress
from itertools import count
from typing import TYPE_CHECKING, Any

from sage._descriptors import OpenFile
from sage._guardian.journal import Run, check_private, make_private, read_lines, replay
from sage._processes import Process, is_alive, process, with_cookie

if TYPE_CHECKING:
    from collections.abc import Callable

MARK = "r"
"""The prefix of every name; it cannot be mistaken for a hexadecimal digit."""

PID_DIGITS, STARTED_DIGITS, NUMBER_DIGITS = 5, 7, 3
DIGITS = "0123456789abcdefghijklmnopqrstuvwxyz"
"""A name has as few characters as possible, because sockets below the folder have bounded paths."""

UNNAMED_AGE_MIN_S = 60.0
"""A folder that does not name its driver may be that of a program which is just starting."""

_numbers = count()


def make_run_folder(root: str) -> str:
    """Make a folder for a run of this process below `root`, and return its path; its name is the run's cookie.

    Raises:
        PermissionError: others can enter `root`.
        OSError: it cannot be made.
    """
    make_private(root)
    own = process(os.getpid())
    while True:
        folder = os.path.join(root, named_after(own or Process(os.getpid(), 0), next(_numbers)))
        if not os.path.lexists(folder):  # one of an earlier boot may have the same name
            try:
                make_private(folder)
            except OSError:
                with suppress(OSError):
                    os.rmdir(folder)
                raise
            return folder


def named_after(driver: Process, number: int) -> str:
    """Return the name of the folder of a driver's run."""
    fields = ((driver.pid, PID_DIGITS), (driver.started, STARTED_DIGITS), (number, NUMBER_DIGITS))
    return MARK + "".join(_digits(value, width) for value, width in fields)


def driver_named(name: str) -> Process | None:
    """Return the driver that the name of a run's folder stands for, or None if it is not such a name."""
    if len(name) != len(MARK) + PID_DIGITS + STARTED_DIGITS + NUMBER_DIGITS or not name.startswith(MARK):
        return None
    pid, started = name[1 : 1 + PID_DIGITS], name[1 + PID_DIGITS : 1 + PID_DIGITS + STARTED_DIGITS]
    return Process(int(pid, 36), int(started, 36)) if name.isascii() and name.isalnum() else None


def hold(folder: str) -> OpenFile | None:
    """Lock a run's folder as one of those who need it, and return it, or None if that is not possible."""
    descriptor, _ = _locked(folder, fcntl.LOCK_SH)
    return None if descriptor is None else OpenFile(descriptor)


def stale_folders(root: str, besides: str | None = None) -> list[str]:
    """Return the folders of runs whose driver has died; a guardian may be at work on them.

    Raises:
        PermissionError: others can write there, so nothing in it can be trusted.
    """
    try:
        check_private(root)
    except FileNotFoundError:
        return []
    folders = sorted(entry.path for entry in os.scandir(root) if entry.is_dir(follow_symlinks=False))
    return [folder for folder in folders if folder != besides and _is_stale(folder, _run_of(folder))]


def reap_folder(folder: str, log: Callable[[str], None]) -> list[dict[str, Any]] | None:
    """Clean up a run whose driver has died, and return the reports of its jobs.

    None stands for a run that has a guardian, which does the same, or whose driver lives.
    """
    from sage._guardian.after_driver_death import take_over  # a driver does without its imports

    lock, is_held = _locked(folder, fcntl.LOCK_EX)
    try:
        run = _run_of(folder)
        if is_held or not _is_stale(folder, run):
            return None
        run.cookie = run.cookie or os.path.basename(folder)
        reports = take_over(run, {}, log)
        shutil.rmtree(folder, ignore_errors=True)
        return reports
    finally:
        if lock is not None:
            os.close(lock)


def _run_of(folder: str) -> Run:
    with suppress(OSError):
        return replay(read_lines(folder))
    return Run()


def _is_stale(folder: str, run: Run) -> bool:
    try:
        check_private(folder)
        changed_at = os.stat(folder).st_mtime
    except OSError:
        return False  # it has gone meanwhile, or is somebody else's
    named = driver_named(os.path.basename(folder))
    drivers = [one for one in (named, run.driver) if one is not None]
    if drivers:
        return not any(is_alive(one) for one in drivers)
    # Nobody can tell whether the driver lives, so its processes are left alone.
    return time.time() - changed_at > UNNAMED_AGE_MIN_S and not with_cookie(os.path.basename(folder))


def _locked(folder: str, kind: int) -> tuple[int | None, bool]:
    """Return the descriptor of a lock on a folder, if it can be had, and whether others have it."""
    try:
        descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
    except OSError:
        return None, False
    try:
        fcntl.flock(descriptor, kind | fcntl.LOCK_NB)
    except OSError as error:
        os.close(descriptor)
        return None, error.errno in (errno.EWOULDBLOCK, errno.EACCES)
    return descriptor, False


def _digits(value: int, width: int) -> str:
    text = ""
    for _ in range(width):
        value, digit = divmod(value, len(DIGITS))
        text = DIGITS[digit] + text
    return text
