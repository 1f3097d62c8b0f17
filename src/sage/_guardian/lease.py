"""The driver's side of the guardian: one for all jobs of this process, as long as one of them needs it."""

from __future__ import annotations

import json
import os
import select
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING, BinaryIO, ClassVar

from sage._descriptors import OpenFile
from sage._guardian.claims import reap
from sage._guardian.journal import Journal, Run, encode, entries_of, entry, forget_over, make_private, take
from sage._guardian.run_folder import hold, make_run_folder
from sage._processes import COOKIE_VARIABLE, GUARDIAN_IGNORES, GUARDIAN_VARIABLE, is_alive, process
from sage.errors import ServiceError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from sage._guardian.journal import Entry
    from sage._guardian.stop_order import Key
    from sage._logs import Log
    from sage._processes import Process

GUARDIAN = os.path.join(os.path.dirname(os.path.abspath(__file__)), "guardian.py")
"""The program of the guardian. Its modules are not imported here: they take longer than a whole `sage exec`."""

GUARDIANS_MAX = 5
"""How many times in a row a guardian may end at once; after that the driver goes on without."""

GUARDIAN_LIFE_MIN_S = 10.0
"""One that lived as long has not ended at once."""

KEEP_PAUSE_S = 60.0
"""How often to look whether the run's folder is still as it was left."""

LINES_MIN = 1_000
"""A journal with fewer lines is never written again only because most of them no longer count."""

TOKEN_BYTES = 8


def runs_folder() -> str:
    """Return the folder of the folders of this user's runs; it need not exist."""
    return os.path.join(os.path.realpath(tempfile.gettempdir()), f"sage-{os.geteuid()}")


def state_folder() -> str:
    """Return the folder for files that outlive a run: `SAGE_STATE_DIR`, else `sage` in the user's folder for state."""
    chosen = os.environ.get("SAGE_STATE_DIR")
    if chosen:
        return os.path.abspath(chosen)
    root = os.environ.get("XDG_STATE_HOME")
    return os.path.join(root if root and os.path.isabs(root) else os.path.expanduser("~/.local/state"), "sage")


class GuardianLease:
    """Keeps a guardian beside this process, and tells it of everything before it is made.

    If the guardian dies, a new one is started at once and is given everything again. A child that is forked from this
    process has no guard of its own until it asks for one, and does not hold the lease.

    Attributes:
        cookie: carried by every process that is started for a job.
        folder: the run's folder, with the journal; temporary files may be put there.
    """

    _lock: ClassVar[threading.Lock] = threading.Lock()
    _current: ClassVar[GuardianLease | None] = None

    def __init__(self) -> None:
        self.folder = _make_folder()
        self.cookie = os.path.basename(self.folder)
        self._users_count = 1
        self._hold: OpenFile | None = hold(self.folder)
        self._journal: Journal | None = None
        self._run = Run()
        self._unwritten: list[Entry] = []
        self._given: dict[Key, OpenFile] = {}
        self._lock_of_run = threading.Lock()
        self._is_over = False
        self._short_lives = 0
        self._lines_max = LINES_MIN
        self._lease: socket.socket | None = None
        try:
            self._write(_run_entry(self.cookie))
            self._start()
            self._watcher = threading.Thread(target=self._watch, name="sage-guard", daemon=True)
            self._watcher.start()
        except BaseException as error:
            self._discard()
            if isinstance(error, OSError | RuntimeError):
                raise ServiceError(f"the guardian cannot be started: {error}", fault="external") from error
            raise

    @classmethod
    def acquire(cls) -> GuardianLease:
        """Return the guard of this process, creating it if necessary; the caller releases it once.

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
        """Release a guard from `acquire`; the last release ends the guardian and removes the run's folder."""
        with GuardianLease._lock:
            self._users_count -= 1
            if self._users_count or GuardianLease._current is not self:
                return
            GuardianLease._current = None
        # Everything is over, so that there is nothing to tell it, and it need not even have begun. It is there until
        # the folder is gone, and would remove that if this process were killed just now.
        with self._lock_of_run:
            self._is_over = True
            shutil.rmtree(self.folder, ignore_errors=True)
            if self._lease is not None and os.path.lexists(self.folder):
                self._lease.shutdown(socket.SHUT_RDWR)  # without descriptors it cannot be removed here, but there
            else:
                self._guardian.kill()
        self._watcher.join()
        self._close()

    def _discard(self) -> None:
        """Undo a start that failed."""
        self._is_over = True
        shutil.rmtree(self.folder, ignore_errors=True)
        if self._lease is not None:
            self._guardian.kill()
            self._guardian.wait()
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
            self._given[key] = end = OpenFile(descriptor)
            self._hand_over(key, end)

    def rename(self, key: Key, new: Key) -> None:
        """Know a service by another key: its job kept it, and the next one takes it over."""
        with self._lock_of_run:
            end = self._given.pop(key, None)
            if end is not None:
                self._given[new] = end
                self._hand_over(new, end)
                self._send({"do": "take", "key": key})

    def take_back(self, key: Key) -> None:
        """Close the descriptor passed to `give`, after the process has ended. A second call does nothing."""
        with self._lock_of_run:
            end = self._given.pop(key, None)
            if end is not None:
                end.close()
                self._send({"do": "take", "key": key})

    def new_token(self) -> str:
        """Return the token of one incarnation of a service in its cookie, after that of the run."""
        return os.urandom(TOKEN_BYTES).hex()

    def reap(self, job: str, service: str | None = None) -> list[str]:
        """Act on the claims that are due of a job's services, or of one of them, and return the failures."""
        with self._lock_of_run:
            known = self._run.jobs.get(job)
            due = [
                (line, line.claims_due())
                for line in reversed(known.services.values() if known is not None else ())
                if line.state != "kept" and service in (None, line.name)
            ]
        errors: list[str] = []
        for line, claims in due:
            if claims:
                errors += reap(self._run, line.name, claims)
                self.note(entry(Run.take_reaped, job, line.name, line.incarnation))
        for error in errors:
            _log().error("reap action failed %s", error)
        return errors

    def released(self) -> list[Process]:
        """Return the processes that live on after their services, by their services' wish."""
        with self._lock_of_run:
            return list(self._run.released)

    # --- behind it; the caller holds the lock of the run ---

    def _write(self, entry: Entry) -> bool:
        take(self._run, entry)
        if not self._unwritten:
            try:
                if self._journal is not None and not self._journal.is_in_place():
                    self._restore()
                    return True
                if self._journal is None:
                    self._journal = Journal(self.folder)
                self._journal.write(encode(entry))
                if self._journal.lines_count > self._lines_max:
                    self._shorten()
                return True
            except OSError as error:
                _log().error("journal cannot be written folder=%s error=%s", self.folder, error)
        # From now on the guardian learns everything by the lease, in order; only the death of both would forget it.
        self._unwritten.append(entry)
        return False

    def _restore(self) -> None:
        """Write the journal again where others look for it: somebody has removed it, or the whole folder."""
        _log().warning("the folder of this run was cleaned by others, and is written again folder=%s", self.folder)
        make_private(os.path.dirname(self.folder))
        make_private(self.folder)
        held, self._hold = self._hold, hold(self.folder)
        if held is not None:
            held.close()
        self._rewrite()

    def _shorten(self) -> None:
        try:
            self._rewrite()
        except OSError as error:  # the longer one still tells everything
            _log().warning("journal cannot be shortened folder=%s error=%s", self.folder, error)
            self._lines_max *= 2

    def _rewrite(self) -> None:
        """Write the entries that still count, and let the guardian read these from now on."""
        forget_over(self._run)
        self._run.released = [one for one in self._run.released if is_alive(one)]
        journal = Journal(self.folder, map(encode, entries_of(self._run)))
        self._close_journal()
        self._journal = journal
        self._lines_max = max(LINES_MIN, 2 * journal.lines_count)
        self._send({"do": "journal"}, journal.file)

    def _keep(self) -> None:
        """See that the run's folder stays: restore removed files, and refresh the times of the others."""
        if self._journal is None or self._unwritten:
            return
        try:
            if not self._journal.is_in_place():
                self._restore()
            self._journal.keep_fresh()
            os.utime(self.folder)
            if self._hold is None:
                self._hold = hold(self.folder)
        except OSError as error:
            _log().error("journal cannot be kept folder=%s error=%s", self.folder, error)

    def _start(self) -> None:
        """Start a guardian, in the place of one that has died, and tell it everything."""
        lease, other = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        environment = {name: value for name, value in os.environ.items() if name != COOKIE_VARIABLE}
        environment[GUARDIAN_VARIABLE] = str(os.getpid())
        try:
            with other, _log_file(self.folder) as log_file, _blocked(GUARDIAN_IGNORES):
                command = [sys.executable, "-I", "-S", GUARDIAN, self.folder, str(other.fileno())]
                self._guardian = subprocess.Popen(
                    command,
                    env=environment,
                    cwd="/",
                    stdin=subprocess.DEVNULL,
                    stdout=subprocess.DEVNULL,
                    stderr=log_file,
                    pass_fds=[other.fileno()],
                    start_new_session=True,
                )
        except BaseException:
            lease.close()
            raise
        if self._lease is not None:
            self._lease.close()
        self._lease = lease
        if self._journal is not None:
            self._send({"do": "journal"}, self._journal.file)
        for unwritten in self._unwritten:
            self._send({"do": "note", "entry": unwritten})
        for key, end in self._given.items():
            self._hand_over(key, end)

    def _send(self, word: dict[str, object], *files: OpenFile) -> None:
        """Tell the guardian something, and hand it files; not if the program has closed one of them."""
        if not all(file.is_open for file in files):
            return
        descriptors = [file.descriptor for file in files]
        try:
            assert self._lease is not None
            socket.send_fds(self._lease, [json.dumps(word).encode()], descriptors, socket.MSG_DONTWAIT)
        except BlockingIOError:
            # It has not read for long, as if stopped, and would not act either; the next one is told everything.
            self._guardian.kill()
        except OSError:
            pass  # It has died; whoever watches the lease starts the next one and tells it everything.

    def _hand_over(self, key: Key, end: OpenFile) -> None:
        self._send({"do": "give", "key": key}, end)

    def _watch(self) -> None:
        """Wait for the death of the guardian, which ends the lease, and start the next one; keep the folder."""
        began_at = time.monotonic()
        while True:
            if not self._has_ended():
                with self._lock_of_run:
                    if not self._is_over:
                        self._keep()
                continue
            self._guardian.wait()
            lived_s = time.monotonic() - began_at
            with self._lock_of_run:
                if self._is_over:
                    return
                self._short_lives = 0 if lived_s >= GUARDIAN_LIFE_MIN_S else self._short_lives + 1
                if self._short_lives >= GUARDIANS_MAX:
                    _log().error("guardian keeps ending, going on without folder=%s", self.folder)
                    return
                _log().error("guardian died and is replaced pid=%d", self._guardian.pid)
                began_at = time.monotonic()
                try:
                    self._start()
                except OSError as error:
                    _log().error("guardian cannot be replaced, going on without folder=%s error=%s", self.folder, error)
                    return

    def _has_ended(self) -> bool:
        """Wait until the lease ends, but not for long, and return whether it has."""
        assert self._lease is not None
        poll = select.poll()
        poll.register(self._lease, select.POLLIN)
        if not poll.poll(KEEP_PAUSE_S * 1000):
            return False
        with suppress(OSError):
            return not self._lease.recv(1)
        return True

    def _close(self) -> None:
        held = [*self._given.values(), *(() if self._hold is None else (self._hold,))]
        self._given.clear()
        self._hold = None
        closes: list[Callable[[], None]] = [file.close for file in held]
        if self._lease is not None:
            closes.append(self._lease.close)
        for close in (*closes, self._close_journal):
            with suppress(OSError):  # the program may have closed every descriptor that it found
                close()

    def _close_journal(self) -> None:
        if self._journal is not None:
            self._journal.close()
            self._journal = None

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
            inherited._guardian.returncode = 0  # it is not a child of this process, which must not wait for it


os.register_at_fork(
    before=GuardianLease._before_fork,
    after_in_parent=GuardianLease._after_fork_in_parent,
    after_in_child=GuardianLease._after_fork_in_child,
)


def _run_entry(cookie: str) -> Entry:
    own = process(os.getpid())
    started = own.started if own is not None else 0
    path = [os.path.abspath(place) for place in sys.path]
    reports = os.path.join(state_folder(), "reports")
    return entry(Run.take_run, cookie, os.getpid(), started, sys.executable, path, os.getcwd(), reports)


def _make_folder() -> str:
    try:
        return make_run_folder(runs_folder())
    except OSError as error:
        refused = ServiceError(f"the journal of a run cannot be kept: {error}", fault="external")
        for note in getattr(error, "__notes__", ["Let TMPDIR name another folder for temporary files."]):
            refused.add_note(note)
        raise refused from error


@contextmanager
def _blocked(signals: tuple[signal.Signals, ...]) -> Iterator[None]:
    """Start processes with the signals blocked, as they ignore them only after some time."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, signals)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _log() -> Log:
    """Return the log; `logging` is imported only for something to say, as `sage exec` has to start quickly."""
    from sage._logs import log_of

    return log_of("sage.dispatcher")


def _log_file(folder: str) -> BinaryIO:
    try:
        return open(os.path.join(folder, "guardian.log"), "ab")
    except OSError:
        return open(os.devnull, "wb")
