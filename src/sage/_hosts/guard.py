"""The driver's side of the guardian: one for all jobs of this process, as long as one of them needs it."""

from __future__ import annotations

import json
import os
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING, Any, ClassVar

from sage._hosts import guardian
from sage._hosts.reaping import reap
from sage._logs import log_of
from sage._runtime.journal import Journal, encode, make_private, replay
from sage._runtime.processes import COOKIE_VARIABLE, GUARDIAN_VARIABLE, process
from sage.errors import ServiceError

if TYPE_CHECKING:
    from collections.abc import Iterator

    from sage._hosts.stop_order import Key
    from sage._runtime.journal import Entry
    from sage._runtime.processes import Process

log = log_of("sage.dispatcher")

GUARDIANS_MAX = 5
"""How many times in a row a guardian may end at once; after that the driver goes on without."""

GUARDIAN_LIFE_MIN_S = 10.0
"""One that lived as long has not ended at once."""

COOKIE_BYTES = 8


def runs_folder() -> str:
    """Return the folder of the folders of this user's runs; it need not exist."""
    return os.path.join(os.path.realpath(tempfile.gettempdir()), f"sage-{os.geteuid()}")


def state_folder() -> str:
    """Return the folder of what outlives a run: `SAGE_STATE_DIR`, else `sage` in the user's folder for state."""
    chosen = os.environ.get("SAGE_STATE_DIR")
    if chosen:
        return os.path.abspath(chosen)
    root = os.environ.get("XDG_STATE_HOME")
    return os.path.join(root if root and os.path.isabs(root) else os.path.expanduser("~/.local/state"), "sage")


class Guard:
    """Keeps a guardian beside this process, and tells it of everything before it is made.

    If the guardian dies, a new one is started at once and is given everything again. A child that is forked from this
    process has no guard of its own until it asks for one, and does not hold the lease.

    Attributes:
        cookie: what every process that is started for a job carries.
        folder: the run's folder, with the journal; temporary files may be put there.
    """

    _lock: ClassVar[threading.Lock] = threading.Lock()
    _current: ClassVar[Guard | None] = None

    def __init__(self) -> None:
        self.cookie = secrets.token_hex(COOKIE_BYTES)
        self.folder = _make_folder(self.cookie)
        self._users_count = 1
        self._journal: Journal | None = None
        self._lines: list[bytes] = []
        self._unwritten: list[Entry] = []
        self._given: dict[Key, int] = {}
        self._lock_of_run = threading.Lock()
        self._is_over = False
        self._short_lives = 0
        self._write(_run_entry(self.cookie))
        try:
            self._lease, self._guardian = self._start()
        except OSError as error:
            self._close_journal()
            shutil.rmtree(self.folder, ignore_errors=True)
            raise ServiceError(f"the guardian cannot be started: {error}", fault="external") from error
        for entry in self._unwritten:
            self._send({"do": "note", "entry": entry})
        self._watcher = threading.Thread(target=self._watch, name="sage-guard", daemon=True)
        self._watcher.start()

    @classmethod
    def acquire(cls) -> Guard:
        """Return the guard of this process, a new one if there is none; the caller releases it once.

        Raises:
            ServiceError: the run's folder cannot be made, or is not safe from others.
        """
        with cls._lock:
            if cls._current is None:
                cls._current = cls()
            else:
                cls._current._users_count += 1
            return cls._current

    def release(self) -> None:
        """Give back what `acquire` gave; the last one ends the guardian and removes the run's folder."""
        with Guard._lock:
            self._users_count -= 1
            if self._users_count or Guard._current is not self:
                return
            Guard._current = None
        # Everything is over, so that there is nothing to tell it, and it need not even have begun. It is there until
        # the folder is gone, and would remove that if this process were killed just now.
        with self._lock_of_run:
            self._is_over = True
            shutil.rmtree(self.folder, ignore_errors=True)
            self._guardian.kill()
        self._watcher.join()
        self._close()

    @property
    def guardian_pid(self) -> int:
        """The process id of the guardian that lives now."""
        with self._lock_of_run:
            return self._guardian.pid

    def note(self, entry: Entry) -> None:
        """Write an entry into the journal, before the thing that it names is made."""
        with self._lock_of_run:
            if not self._write(entry):
                self._send({"do": "note", "entry": entry})

    def give(self, key: Key, descriptor: int) -> None:
        """Hand the guardian's end of a service's guard socket over; the guard closes it.

        The driver keeps its own copy for the next guardian, so that a service sees end-of-file only when both are gone.
        """
        with self._lock_of_run:
            self._given[key] = descriptor
            self._hand_over(key, descriptor)

    def rename(self, key: Key, new: Key) -> None:
        """Know a service by another key: its job kept it, and the next one takes it over."""
        with self._lock_of_run:
            descriptor = self._given.pop(key, None)
            if descriptor is not None:
                self._given[new] = descriptor
                self._hand_over(new, descriptor)
                self._send({"do": "take", "key": key})

    def take_back(self, key: Key) -> None:
        """Close what `give` was given, after the process has ended. Does nothing twice."""
        with self._lock_of_run:
            descriptor = self._given.pop(key, None)
            if descriptor is not None:
                os.close(descriptor)
                self._send({"do": "take", "key": key})

    def new_token(self) -> str:
        """Return what one incarnation of a service carries in its cookie, behind the one of the run."""
        return secrets.token_hex(COOKIE_BYTES)

    def reap(self, job: str, service: str | None = None) -> list[str]:
        """Act on the claims that are due of a job's services, or of one of them, and return what went wrong."""
        with self._lock_of_run:
            run = replay(self._lines)
        errors: list[str] = []
        for line in reversed(list(run.job(job).services.values())):
            if line.claims_due() and line.state != "kept" and service in (None, line.name):
                errors += reap(run, line)
                self.note({"entry": "reaped", "job": job, "service": line.name, "incarnation": line.incarnation})
        for error in errors:
            log.error("reap action failed %s", error)
        return errors

    def released(self) -> list[Process]:
        """Return the processes that live on after their services, by their services' wish."""
        with self._lock_of_run:
            return replay(self._lines).released

    # --- behind it; the caller holds the lock of the run ---

    def _write(self, entry: Entry) -> bool:
        line = encode(entry)
        self._lines.append(line)
        if not self._unwritten:
            try:
                if self._journal is None:
                    self._journal = Journal(self.folder)
                self._journal.write(line)
                return True
            except OSError as error:
                log.error("journal cannot be written folder=%s error=%s", self.folder, error)
        # From now on the guardian learns everything by the lease, in order; only the death of both would forget it.
        self._unwritten.append(entry)
        return False

    def _start(self) -> tuple[socket.socket, subprocess.Popen[bytes]]:
        lease, other = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        environment = {name: value for name, value in os.environ.items() if name != COOKIE_VARIABLE}
        environment[GUARDIAN_VARIABLE] = str(os.getpid())
        with other, _log_file(self.folder) as log_file, _blocked(guardian.IGNORED):
            command = [sys.executable, "-I", "-S", guardian.__file__, self.folder, str(other.fileno())]
            process = subprocess.Popen(
                command,
                env=environment,
                cwd="/",
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=log_file,
                pass_fds=[other.fileno()],
                start_new_session=True,
            )
        return lease, process

    def _send(self, word: dict[str, Any], *descriptors: int) -> None:
        try:
            socket.send_fds(self._lease, [json.dumps(word).encode()], list(descriptors), socket.MSG_DONTWAIT)
        except BlockingIOError:
            # It has not read for long, as if stopped, and would not act either; the next one is told everything.
            self._guardian.kill()
        except OSError:
            pass  # It has died; whoever watches the lease starts the next one and tells it everything.

    def _hand_over(self, key: Key, descriptor: int) -> None:
        self._send({"do": "give", "key": key}, descriptor)

    def _watch(self) -> None:
        """Wait for the death of the guardian, which ends the lease, and start the next one."""
        began_at = time.monotonic()
        while True:
            with suppress(OSError):
                self._lease.recv(1)
            self._guardian.wait()
            lived_s = time.monotonic() - began_at
            with self._lock_of_run:
                if self._is_over:
                    return
                self._short_lives = 0 if lived_s >= GUARDIAN_LIFE_MIN_S else self._short_lives + 1
                if self._short_lives >= GUARDIANS_MAX:
                    log.error("guardian ends again and again, going on without folder=%s", self.folder)
                    return
                log.error("guardian died and is replaced pid=%d", self._guardian.pid)
                began_at = time.monotonic()
                try:
                    lease, self._guardian = self._start()
                except OSError as error:
                    log.error("guardian cannot be replaced, going on without folder=%s error=%s", self.folder, error)
                    return
                self._lease.close()
                self._lease = lease
                for entry in self._unwritten:
                    self._send({"do": "note", "entry": entry})
                for key, descriptor in self._given.items():
                    self._hand_over(key, descriptor)

    def _close(self) -> None:
        self._lease.close()
        self._close_journal()
        for descriptor in self._given.values():
            os.close(descriptor)
        self._given.clear()

    def _close_journal(self) -> None:
        if self._journal is not None:
            self._journal.close()

    @classmethod
    def _before_fork(cls) -> None:
        cls._lock.acquire()
        if cls._current is not None:
            cls._current._lock_of_run.acquire()

    @classmethod
    def _after_fork_in_parent(cls) -> None:
        if cls._current is not None:
            cls._current._lock_of_run.release()
        cls._lock.release()

    @classmethod
    def _after_fork_in_child(cls) -> None:
        """Let go of the lease: it has to end with the driver, also if this child lives on."""
        inherited, cls._current = cls._current, None
        cls._lock = threading.Lock()
        if inherited is not None:
            inherited._lock_of_run = threading.Lock()
            inherited._close()
            inherited._guardian.returncode = 0  # it is no child of this process, which is not to wait for it


os.register_at_fork(
    before=Guard._before_fork,
    after_in_parent=Guard._after_fork_in_parent,
    after_in_child=Guard._after_fork_in_child,
)


def _run_entry(cookie: str) -> Entry:
    own = process(os.getpid())
    return {
        "entry": "run",
        "cookie": cookie,
        "pid": os.getpid(),
        "started": own.started if own is not None else 0,
        "python": sys.executable,
        "path": [os.path.abspath(place) for place in sys.path],
        "folder": os.getcwd(),
        "reports": os.path.join(state_folder(), "reports"),
    }


def _make_folder(cookie: str) -> str:
    folder = os.path.join(runs_folder(), cookie)
    try:
        make_private(os.path.dirname(folder))
        make_private(folder)
    except OSError as error:
        refused = ServiceError(f"the journal of a run cannot be kept: {error}", fault="external")
        for note in getattr(error, "__notes__", ["Let TMPDIR name another folder for temporary files."]):
            refused.add_note(note)
        raise refused from error
    return folder


@contextmanager
def _blocked(signals: tuple[signal.Signals, ...]) -> Iterator[None]:
    """Let what is started meanwhile begin with the signals blocked: it ignores them only once it has got that far."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, signals)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _log_file(folder: str) -> Any:
    try:
        return open(os.path.join(folder, "guardian.log"), "ab")
    except OSError:
        return open(os.devnull, "wb")
