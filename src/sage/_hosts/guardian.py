"""The guardian: a small process beside a driver that ends what the driver leaves behind when it dies.

    python -I -S guardian.py FOLDER LEASE      the descriptor of the lease; end-of-file there means that the driver died
    python -I -S guardian.py FOLDER            the driver and its guardian died long ago; see what is left

It imports only the standard library and the few modules of SAGE that do the same.
"""

import fcntl
import json
import os
import select
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from typing import Any

if __name__ == "__main__":
    # An isolated interpreter knows the standard library only; what is beside this file comes last.
    sys.path.append(os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__)))))

from sage._hosts.stop_order import Key
from sage._hosts.takeover import take_over
from sage._runtime.journal import Run, check_private, encode, read_lines, replay
from sage._runtime.processes import is_alive

LOCK = "lock"
IGNORED = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT)
MESSAGE_BYTES_MAX = 65_536
DESCRIPTORS_MAX = 8
EMPTY_AGE_MIN_S = 60.0
"""A run's folder without a journal belongs to a driver that just starts, or that died in that moment."""


def main() -> None:
    """Guard a run until its driver dies, or see to what is left of an old one; without need, the driver kills it."""
    for signum in IGNORED:
        # Not SIG_IGN, which what is started from here would inherit.
        signal.signal(signum, lambda *_: None)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, IGNORED)
    folder = sys.argv[1]
    if len(sys.argv) == 2:
        reap_folder(folder, log)
        return
    lock = locked(folder)
    Guardian(folder, socket.socket(fileno=int(sys.argv[2]))).run()
    if lock is not None:
        os.close(lock)


class Guardian:
    """Holds the lease of a driver, and the lines to its services."""

    def __init__(self, folder: str, lease: socket.socket) -> None:
        self._folder = folder
        self._lease = lease
        self._lines: dict[Key, socket.socket] = {}
        self._keys: dict[int, Key] = {}
        self._unwritten: list[bytes] = []
        self._reapers: dict[int, subprocess.Popen[bytes]] = {}
        self._poll = select.poll()

    def run(self) -> None:
        """Wait for the end of the lease, and take over."""
        self._poll.register(self._lease, select.POLLIN)
        for stale in stale_folders(os.path.dirname(self._folder), besides=self._folder):
            self._start_reaper(stale)
        while self._listen():
            pass
        run = self._run()
        log(f"the driver died, {len(run.jobs)} jobs are known")
        take_over(run, self._lines, log)
        shutil.rmtree(self._folder, ignore_errors=True)

    def _listen(self) -> bool:
        """Wait for something to happen, and return whether the driver lives."""
        for descriptor, _ in self._poll.poll():
            if descriptor == self._lease.fileno():
                if not self._read_lease():
                    return False
            elif descriptor in self._reapers:
                self._poll.unregister(descriptor)
                self._reapers.pop(descriptor).wait()
                os.close(descriptor)
            elif descriptor in self._keys:
                self._hear(descriptor)
        return True

    def _read_lease(self) -> bool:
        """Take in one message, and return False at end-of-file."""
        try:
            data, descriptors, _, _ = socket.recv_fds(self._lease, MESSAGE_BYTES_MAX, DESCRIPTORS_MAX)
        except OSError:
            return False
        if not data:
            return False
        word = json.loads(data)
        if word["do"] == "note":
            self._unwritten.append(encode(word["entry"]))
            return True
        job, name, incarnation = word["key"]
        self._drop((job, name, incarnation))
        if word["do"] == "give":
            line = socket.socket(fileno=descriptors[0])
            self._lines[job, name, incarnation] = line
            self._keys[line.fileno()] = (job, name, incarnation)
            self._poll.register(line, select.POLLIN)
        return True

    def _hear(self, descriptor: int) -> None:
        """Read what nobody asked for, or the end of a service."""
        key = self._keys[descriptor]
        try:
            if self._lines[key].recv(MESSAGE_BYTES_MAX):
                return
        except OSError:
            pass
        self._drop(key)

    def _drop(self, key: Key) -> None:
        line = self._lines.pop(key, None)
        if line is not None:
            self._poll.unregister(line)
            del self._keys[line.fileno()]
            line.close()

    def _run(self) -> Run:
        lines: list[bytes] = []
        with suppress(OSError):
            lines = read_lines(self._folder)
        run = replay([*lines, *self._unwritten])
        run.cookie = run.cookie or os.path.basename(self._folder)
        return run

    def _start_reaper(self, folder: str) -> None:
        command = [sys.executable, "-I", "-S", os.path.abspath(__file__), folder]
        with suppress(OSError):
            reaper = subprocess.Popen(command, stdin=subprocess.DEVNULL, start_new_session=True)
            descriptor = os.pidfd_open(reaper.pid)
            self._reapers[descriptor] = reaper
            self._poll.register(descriptor, select.POLLIN)


def locked(folder: str) -> int | None:
    """Return the descriptor of the lock of a run's folder, or None if another process has it or it cannot be had."""
    try:
        descriptor = os.open(os.path.join(folder, LOCK), os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
    except OSError:
        return None
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        os.close(descriptor)
        return None
    return descriptor


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
    return [folder for folder in folders if folder != besides and _is_stale(folder)]


def _is_stale(folder: str) -> bool:
    try:
        driver = replay(read_lines(folder)).driver
        if driver is None:
            return time.time() - os.stat(folder).st_mtime > EMPTY_AGE_MIN_S
    except OSError:
        with suppress(OSError):
            return time.time() - os.stat(folder).st_mtime > EMPTY_AGE_MIN_S
        return False
    return not is_alive(driver)


def reap_folder(folder: str, log: Callable[[str], None]) -> list[dict[str, Any]] | None:
    """See to what is left of a run whose driver has died, and return the reports of its jobs.

    None stands for a run that has a guardian, which does the same, or whose driver lives.
    """
    lock = locked(folder)
    if lock is None and os.path.exists(os.path.join(folder, LOCK)):
        return None
    run = Run()
    with suppress(OSError):
        run = replay(read_lines(folder))
    reports = None
    if run.driver is None or not is_alive(run.driver):
        run.cookie = run.cookie or os.path.basename(folder)
        reports = take_over(run, {}, log)
        shutil.rmtree(folder, ignore_errors=True)
    if lock is not None:
        os.close(lock)
    return reports


def log(text: str) -> None:
    """Write a line to the log in the run's folder; a full disk must not stop the guardian."""
    with suppress(OSError):
        os.write(2, f"{time.strftime('%Y-%m-%d %H:%M:%S')} {text}\n".encode())


if __name__ == "__main__":
    main()
