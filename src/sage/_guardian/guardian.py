"""The guardian: a small process beside a driver that cleans up when the driver dies.

    python -I -S guardian.py FOLDER LEASE      the descriptor of the lease; end-of-file there means that the driver died
    python -I -S guardian.py FOLDER            the driver and its guardian died long ago; clean up the rest

It imports only the standard library and the few modules of SAGE that do the same.
"""

import json
import os
import select
import shutil
import signal
import socket
import subprocess
import sys
import time
from contextlib import suppress

if __name__ == "__main__":
    # An isolated interpreter knows the standard library only; the folder of this file comes last.
    sys.path.append(os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__)))))

from sage._guardian.after_driver_death import take_over
from sage._guardian.journal import Run, encode, lines_from, read_lines, replay
from sage._guardian.run_folder import hold, reap_folder, stale_folders
from sage._guardian.stop_order import Key
from sage._processes import GUARDIAN_IGNORES

MESSAGE_BYTES_MAX = 65_536
DESCRIPTORS_MAX = 8


def main() -> None:
    """Guard a run until its driver dies, or clean up an old one; if it is not needed, the driver kills it."""
    for signum in GUARDIAN_IGNORES:
        # Not SIG_IGN, which child processes would inherit.
        signal.signal(signum, lambda *_: None)
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # ignored, as the driver may have it, no exit code could be known
    signal.pthread_sigmask(signal.SIG_UNBLOCK, GUARDIAN_IGNORES)
    folder = sys.argv[1]
    if len(sys.argv) == 2:
        reap_folder(folder, log)
        return
    lease = int(sys.argv[2])
    os.set_inheritable(lease, False)
    Guardian(folder, socket.socket(fileno=lease)).run()


class Guardian:
    """Holds the lease of a driver, and the lines to its services."""

    def __init__(self, folder: str, lease: socket.socket) -> None:
        self._folder = folder
        self._lease = lease
        self._lines: dict[Key, socket.socket] = {}
        self._keys: dict[int, Key] = {}
        self._unwritten: list[bytes] = []
        self._journal: int | None = None
        self._lock = hold(folder)
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
        if word["do"] == "journal":
            self._take_journal(descriptors[0])
            return True
        job, name, incarnation = word["key"]
        self._drop((job, name, incarnation))
        if word["do"] == "give":
            line = socket.socket(fileno=descriptors[0])
            self._lines[job, name, incarnation] = line
            self._keys[line.fileno()] = (job, name, incarnation)
            self._poll.register(line, select.POLLIN)
        return True

    def _take_journal(self, descriptor: int) -> None:
        """Read this file at the end, as the folder's may have been removed by then; hold a folder made again."""
        if self._journal is not None:
            os.close(self._journal)
        self._journal = descriptor
        if self._lock is not None:
            self._lock.close()
        self._lock = hold(self._folder)

    def _hear(self, descriptor: int) -> None:
        """Read an unexpected message, or the end of a service."""
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
            lines = read_lines(self._folder) if self._journal is None else lines_from(self._journal)
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


def log(text: str) -> None:
    """Write a line to the log in the run's folder; a full disk must not stop the guardian."""
    with suppress(OSError):
        os.write(2, f"{time.strftime('%Y-%m-%d %H:%M:%S')} {text}\n".encode())


if __name__ == "__main__":
    main()
