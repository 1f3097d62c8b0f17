"""Processes of this machine, found by the cookie in their environment and ended so that a reused pid is never hit."""

from __future__ import annotations

import atexit
import errno
import os
import select
import signal
import sys
import threading
import time
from contextlib import ExitStack, suppress
from typing import TYPE_CHECKING, NamedTuple, NoReturn, TypeVar

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator

T = TypeVar("T")

PROC = "/proc"

COOKIE_VARIABLE = "SAGE_COOKIE"
"""Holds a chain `outer:inner:...` of tokens: one of the run, one of the service, and so on inwards."""

GUARDIAN_VARIABLE = "SAGE_GUARDIAN"
"""Marks a guardian and the processes that it starts for its own work."""

GUARDIAN_IGNORES = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT)
"""The signals that do not end a guardian."""

TERM_GRACE_S = 2.0
KILL_BOUND_S = 5.0
"""How long a kill may take to be seen; only a process that the kernel itself holds takes longer."""

LOADING_BOUND_S = 0.5
LOADING_PAUSE_S = 0.005
"""How long a process may take to load its program, and how often that is looked at."""

COMMAND_CHARS_MAX = 120

INIT_PID = 1
"""The first process of a container, to which the children of others fall when their parents end."""

SCARCE = frozenset({errno.EMFILE, errno.ENFILE, errno.ENOMEM})
SCARCE_BOUND_S = 0.5
"""Errors of a system without free resources, and how long calls are retried."""

EXITING = 0x00000004
KERNEL_THREAD = 0x00200000
"""Flags of a process, PF_EXITING and PF_KTHREAD of the kernel."""

STATE, PARENT, _SESSION, _FLAGS, STARTED = 0, 1, 3, 6, 19
"""Where these fields of /proc/PID/stat stand after the name of the program (fields 3, 4, 6, 9, 22 of proc(5))."""


TCP_LISTEN = "0A"
"""The state of a socket that listens, in /proc/net/tcp."""

ENDED_STATES = (b"Z", b"X")
"""The states of a process that has ended."""


class Process(NamedTuple):
    """One process for ever: its pid may be given to another, which then began at another time (in clock ticks)."""

    pid: int
    started: int


class Ended(NamedTuple):
    """The outcome of ending processes: which had to be killed, and which are still there."""

    killed: set[Process]
    left: set[Process]


class Grace:
    """A moment until which somebody waits, by the monotonic clock; any other thread may bring it forward."""

    def __init__(self, until: float) -> None:
        self.until = until
        self.descriptor = patiently(os.eventfd, 0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        self._is_open = True
        self._lock = threading.Lock()

    @property
    def left_s(self) -> float:
        """How many seconds are left, or 0."""
        return max(self.until - time.monotonic(), 0.0)

    def shorten(self, until: float) -> None:
        """Wait no longer than until then."""
        with self._lock:
            self.until = min(self.until, until)
            if self._is_open:
                os.eventfd_write(self.descriptor, 1)

    def close(self) -> None:
        """Close the descriptor; nobody waits any more."""
        with self._lock:
            self._is_open = False
            os.close(self.descriptor)


def process(pid: int) -> Process | None:
    """Return the process that has this pid now, or None if none lives; a zombie has ended."""
    fields = _stat(pid)
    if fields is None or fields[STATE] in ENDED_STATES:
        return None
    return Process(pid, int(fields[STARTED]))


def is_alive(one: Process) -> bool:
    """Return whether exactly this process still runs."""
    return process(one.pid) == one


def resident_bytes(pid: int) -> int:
    """Return how much memory a process uses, in bytes; 0 if it is gone."""
    try:
        with open(f"/proc/{pid}/statm", "rb") as file:
            return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except (OSError, IndexError):
        return 0


def is_ending(one: Process) -> bool:
    """Return whether a process has ended or is about to: whoever it was connected with may know before its parent."""
    fields = _stat(one.pid)
    if fields is None or int(fields[STARTED]) != one.started:
        return True
    return fields[STATE] in ENDED_STATES or bool(int(fields[_FLAGS]) & EXITING)


def parent_of(pid: int) -> int | None:
    """Return the pid of the parent, or None if the process has gone."""
    fields = _stat(pid)
    return None if fields is None else int(fields[PARENT])


def command_of(pid: int, proc: str | os.PathLike[str] = PROC) -> str:
    """Return the command line of a process, or the name of its program in brackets if it shows none.

    Raises:
        OSError: the process has vanished.
    """
    words = _read(os.path.join(proc, str(pid), "cmdline")).rstrip(b"\0").split(b"\0")
    # A command line may hold line breaks (python -c), and one process has to fit on one line.
    command = " ".join(b" ".join(words).decode(errors="replace").split())
    return command or f"[{_read(os.path.join(proc, str(pid), 'comm')).decode(errors='replace').strip()}]"


def described(one: Process) -> str:
    """Return a process in words, with the begin of its command line."""
    try:
        command = command_of(one.pid)
    except OSError:
        return f"process {one.pid}"
    return (
        f"process {one.pid} ({command if len(command) <= COMMAND_CHARS_MAX else command[:COMMAND_CHARS_MAX] + '...'})"
    )


def with_cookie(token: str) -> set[Process]:
    """Return the processes whose cookie holds `token`; those that may not be read and this one are left out.

    A process whose program is just being loaded shows no environment; for it, the search is made again.
    """
    due = time.monotonic() + LOADING_BOUND_S
    found, is_loading = _carriers(token)
    while is_loading and time.monotonic() < due:
        pause(LOADING_PAUSE_S)
        found, is_loading = _carriers(token)
    return found


def variable_of(pid: int, name: str, proc: str | os.PathLike[str] = PROC) -> str | None:
    """Return a variable of the environment that the program of a process began with, or None if it had none.

    Between fork and exec a process shows the environment of its parent, and when it has ended it shows none.

    Raises:
        OSError: the process has vanished, or may not be read.
    """
    _, begins, rest = (b"\0" + _read(os.path.join(proc, str(pid), "environ"))).partition(f"\0{name}=".encode())
    return os.fsdecode(rest.partition(b"\0")[0]) if begins else None


def has_variable(pid: int, name: str, proc: str | os.PathLike[str] = PROC) -> bool:
    """Return whether the program of a process began with a variable, as far as it may be read."""
    with suppress(OSError):
        return variable_of(pid, name, proc) is not None
    return False


def targets_of(pid: int | str, proc: str | os.PathLike[str] = PROC) -> dict[int, str]:
    """Return the targets of a process's descriptors; OSError if they may not be read."""
    folder = os.path.join(proc, str(pid), "fd")
    targets: dict[int, str] = {}
    for name in os.listdir(folder):
        with suppress(FileNotFoundError):  # such as the one that the list was read with
            targets[int(name)] = os.readlink(os.path.join(folder, name))
    return targets


def socket_table(name: str, proc: str | os.PathLike[str] = PROC) -> list[list[str]]:
    """Return the rows of a table of sockets; a kernel without such sockets has no such table."""
    with suppress(FileNotFoundError), open(os.path.join(proc, "net", name), errors="replace") as lines:
        return [line.split() for line in lines][1:]
    return []


def listening(name: str, proc: str | os.PathLike[str] = PROC) -> Iterator[tuple[str, str, int]]:
    """Yield the target of a descriptor, the address in digits, and the port of each socket of TCP that listens."""
    for fields in socket_table(name, proc):
        if fields[3] == TCP_LISTEN:
            digits, _, port = fields[1].partition(":")
            yield f"socket:[{fields[9]}]", digits, int(port, 16)


def stats(proc: str | os.PathLike[str] = PROC) -> Iterator[tuple[int, list[bytes]]]:
    """Yield the pid and the fields of `stat` of each process that can be read."""
    for name in patiently(os.listdir, proc):
        fields = _stat(int(name), proc) if name.isdecimal() else None
        if fields is not None:
            yield int(name), fields


def pause(seconds: float) -> None:
    """Let time pass, where the kernel tells of nothing that could be waited for."""
    select.poll().poll(seconds * 1000)


def _carriers(token: str) -> tuple[set[Process], bool]:
    """Return the processes with it that can be seen, and whether there is a process that shows nothing yet."""
    found, is_loading = set(), False
    begin, wanted = f"{COOKIE_VARIABLE}=".encode(), token.encode()
    for name in patiently(os.listdir, "/proc"):
        if not name.isdecimal() or int(name) == os.getpid() or not _may_carry(name, wanted):
            continue
        # The moment of start is read before the cookie: if the pid changes hands in between, nobody has both.
        carrier = process(int(name))
        if carrier is None:
            continue
        with suppress(OSError):
            variables = _read(f"/proc/{name}/environ").split(b"\0")
            chains = [variable[len(begin) :] for variable in variables if variable.startswith(begin)]
            if any(wanted in chain.split(b":") for chain in chains):
                found.add(carrier)
            elif variables == [b""] and not _read(f"/proc/{name}/cmdline"):
                fields = _stat(carrier.pid)
                is_loading |= fields is not None and fields[STATE] != b"Z" and not int(fields[_FLAGS]) & KERNEL_THREAD
    return found, is_loading


def _may_carry(name: str, wanted: bytes) -> bool:
    """Return whether a process shows a token or nothing; most show something else, and nothing more is read of them."""
    try:
        shown = _read(f"/proc/{name}/environ")
    except OSError as error:
        if error.errno in SCARCE:
            raise  # it may well have it
        return False
    return not shown or wanted in shown


def in_session(leader: Process) -> set[Process]:
    """Return the processes of the session that a process began, whether or not it still lives."""
    if process(leader.pid) not in (None, leader):
        return set()  # A pid is given away again only when the session of that number is empty.
    return {
        Process(pid, int(fields[STARTED]))
        for pid, fields in stats()
        if int(fields[_SESSION]) == leader.pid and fields[STATE] not in ENDED_STATES
    }


def zombies_of_init() -> set[Process]:
    """Return the ended children that nobody has waited for, if this process is the first one, whose they all become.

    Elsewhere, nothing: a child of another process is that one's matter.
    """
    return {Process(pid, int(fields[STARTED])) for pid, fields in _zombies()}


def reap_orphans(session: int, known: Iterable[Process]) -> None:
    """Wait for ended processes of a session and of `known` that became this process's children when orphaned.

    Only the first process of a container has such children. Those that it started itself are left to who did that.
    """
    known = set(known)
    for pid, fields in _zombies():
        if int(fields[_SESSION]) == session or Process(pid, int(fields[STARTED])) in known:
            with suppress(ChildProcessError):
                os.waitpid(pid, os.WNOHANG)


def _zombies() -> list[tuple[int, list[bytes]]]:
    if os.getpid() != INIT_PID:
        return []
    return [one for one in stats() if one[1][STATE] == b"Z" and int(one[1][PARENT]) == INIT_PID]


def descendants(root: Process) -> set[Process]:
    """Return the descendants of a process, as long as those in between live.

    This also finds processes that have discarded their environment. A guardian is left out, as it has to outlive its
    run.
    """
    children: dict[int, list[Process]] = {}
    for pid, fields in stats():
        if fields[STATE] not in ENDED_STATES:
            children.setdefault(int(fields[PARENT]), []).append(Process(pid, int(fields[STARTED])))
    found: set[Process] = set()
    todo = [root] if is_alive(root) else []
    while todo:
        for child in children.get(todo.pop().pid, ()):
            if not has_variable(child.pid, GUARDIAN_VARIABLE):
                found.add(child)
                todo.append(child)
    return found


def with_descendants(roots: Iterable[Process], among: Iterable[Process]) -> set[Process]:
    """Return those of `among` that are, or come from, one of `roots` that still lives."""
    living = {one.pid for one in roots if is_alive(one)}

    def comes_from(pid: int | None) -> bool:
        while pid is not None and pid > 1:
            if pid in living:
                return True
            pid = parent_of(pid)
        return False

    return {one for one in among if living and comes_from(one.pid)}


def send(one: Process, *signals: int) -> bool:
    """Send signals to exactly this process; return whether it still ran."""
    try:
        descriptor = watch(one)
    except OSError:
        return _send_by_number(one, signals)
    if descriptor is None:
        return False
    try:
        for signum in signals:
            signal.pidfd_send_signal(descriptor, signum)
    except OSError:
        return False
    finally:
        os.close(descriptor)
    return True


def _send_by_number(one: Process, signals: Iterable[int]) -> bool:
    """Send signals where no descriptor can be had: in the moment after the look, the pid might change hands."""
    try:
        for signum in signals:
            if not is_alive(one):
                return False
            os.kill(one.pid, signum)
    except ProcessLookupError:
        return False
    return True


def watch(one: Process) -> int | None:
    """Return a descriptor that becomes readable when the process ends, for the caller to close, or None if it has.

    Raises:
        OSError: no descriptor can be had.
    """
    try:
        descriptor = patiently(os.pidfd_open, one.pid)
    except ProcessLookupError:
        return None
    # From here on the descriptor means one process; the comparison says whether it is the right one.
    if is_alive(one):
        return descriptor
    os.close(descriptor)
    return None


def wait_gone(processes: Iterable[Process], grace: Grace) -> None:
    """Wait until all of them have ended, or until the grace is over."""
    poll = select.poll()
    poll.register(grace.descriptor, select.POLLIN)
    open_ones = set()
    try:
        for one in processes:
            try:
                descriptor = watch(one)
            except OSError:
                pause(LOADING_PAUSE_S)  # it cannot be waited for, so that the caller has to look again
                continue
            if descriptor is not None:
                open_ones.add(descriptor)
                poll.register(descriptor, select.POLLIN)
        while open_ones and (left_s := grace.left_s) > 0:
            for descriptor, _ in poll.poll(left_s * 1000):
                if descriptor == grace.descriptor:
                    os.eventfd_read(descriptor)
                    continue
                poll.unregister(descriptor)
                open_ones.discard(descriptor)
                os.close(descriptor)
    finally:
        for descriptor in open_ones:
            os.close(descriptor)


def end_all(
    find: Callable[[], set[Process]], grace: float | Grace = TERM_GRACE_S, kill_s: float = KILL_BOUND_S
) -> Ended:
    """End every process that `find` returns, looking again and again until it finds none.

    Each gets SIGTERM, and SIGCONT so that a stopped one sees it; any that are left after the grace are killed.

    Args:
        find: returns the processes that are left.
        grace: how long they are waited for, in seconds, or a moment that may be brought forward meanwhile.
        kill_s: how long a kill may take to be seen, in seconds.
    """
    asked: set[Process] = set()
    killed: set[Process] = set()
    with ExitStack() as stack:
        patience = grace if isinstance(grace, Grace) else _closing(stack, grace)
        last: Grace | None = None
        while found := find():
            if patience.left_s > 0:
                for one in found - asked:
                    send(one, signal.SIGTERM, signal.SIGCONT)
                asked |= found
                wait_gone(found, patience)
                continue
            last = last or _closing(stack, kill_s)
            if last.left_s == 0:
                return Ended(killed, found)
            killed |= {one for one in found if send(one, signal.SIGKILL)}
            wait_gone(found, last)
    return Ended(killed, set())


def _closing(stack: ExitStack, seconds: float) -> Grace:
    grace = Grace(time.monotonic() + seconds)
    stack.callback(grace.close)
    return grace


def processor_wait_s() -> float:
    """Return how long the calling thread has waited for a processor so far, or 0 if the system does not count it."""
    with suppress(OSError, IndexError, ValueError), open("/proc/thread-self/schedstat", "rb") as file:
        return int(file.read().split()[1]) / 1e9
    return 0.0


def _stat(pid: int, proc: str | os.PathLike[str] = PROC) -> list[bytes] | None:
    try:
        # The name of the program stands in parentheses and may hold spaces and parentheses of its own.
        return _read(os.path.join(proc, str(pid), "stat")).rpartition(b")")[2].split()
    except OSError as error:
        if error.errno in SCARCE:
            raise  # it may well live
        return None


def _read(path: str) -> bytes:
    with patiently(lambda: open(path, "rb")) as file:
        return file.read()


def patiently(function: Callable[..., T], *args: object) -> T:
    """Call a function that takes a descriptor, and retry while the system has run out of them.

    Raises:
        OSError: it failed for another reason, or too often.
    """
    due = time.monotonic() + SCARCE_BOUND_S
    while True:
        try:
            return function(*args)
        except OSError as error:
            if error.errno not in SCARCE or time.monotonic() >= due:
                raise
        pause(LOADING_PAUSE_S)


def leave(code: int) -> NoReturn:
    """End as the interpreter does, but do not take its modules apart: after `import openai`, that takes 0.2 s."""
    join_threads: Callable[[], None] = vars(threading)["_shutdown"]
    join_threads()
    atexit._run_exitfuncs()
    for stream in (sys.stdout, sys.stderr):
        with suppress(AttributeError, OSError, ValueError):  # it may be None, closed, or led nowhere
            stream.flush()
    os._exit(code)
