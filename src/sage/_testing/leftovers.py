"""Leftovers of a block of code, in its process and on the machine."""

from __future__ import annotations

import gc
import os
import secrets
import socket
import sys
import tempfile
import threading
import time
import traceback
import warnings
from contextlib import suppress
from fnmatch import fnmatchcase
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from sage._processes import (
    COOKIE_VARIABLE,
    ENDED_STATES,
    PARENT,
    PROC,
    STARTED,
    STATE,
    command_of,
    has_variable,
    listening,
    socket_table,
    stats,
    targets_of,
    variable_of,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Hashable, Iterable, Iterator
    from types import FrameType

PAUSE_MIN_S = 0.005
PAUSE_MAX_S = 0.05
"""How long to wait between two looks: short at first, because most things end at once."""

BLOCK_VARIABLE = "SAGE_CLEAN_BLOCK"
"""The environment variable that names the blocks, from outer to inner, in which a process was started."""

COMMAND_CHARACTERS_MAX = 200
SHARED_MEMORY = Path("/dev/shm")
STANDARD_LIBRARY = os.path.dirname(os.__file__)
BOOTSTRAP = frozenset({"_bootstrap", "_bootstrap_inner"})
UNIX_LISTEN = 0x10000


class Leftover(NamedTuple):
    """One thing that can be left: its kind and name, which `ignore` is compared with, and a line to find it by."""

    kind: str
    name: str
    line: str

    def matches(self, pattern: str) -> bool:
        """Return whether a pattern means this thing, by its name alone or with the kind before it."""
        return fnmatchcase(self.name, pattern) or fnmatchcase(f"{self.kind} {self.name}", pattern)


# --- threads and asyncio tasks ----------------------------------------------------------------------------------------


def threads(_: Path) -> dict[Hashable, Leftover]:
    """Return the Python threads, with where they stand."""
    listed = threading.enumerate()
    frames = sys._current_frames()
    found: dict[Hashable, Leftover] = {}
    for thread in listed:
        frame = frames.get(thread.ident or 0)
        # The stand-in for a thread that C code started stays in the list when the thread has ended.
        if frame is not None or not isinstance(thread, threading._DummyThread):
            daemon = " (daemon)" if thread.daemon else ""
            line = f'thread "{thread.name}"{daemon}{place_of(frame)}'
            found[thread] = Leftover("thread", thread.name, line)
    for ident in frames.keys() - {thread.ident for thread in [*listed, *threading.enumerate()]}:
        line = f"thread {ident}, without a name{place_of(frames[ident])}"
        found[ident] = Leftover("thread", str(ident), line)
    return found


def asyncio_tasks(_: Path) -> dict[Hashable, Leftover]:
    """Return the tasks of the event loop that runs on this thread, if one does."""
    asyncio = sys.modules.get("asyncio")
    found: dict[Hashable, Leftover] = {}
    with suppress(RuntimeError):
        for task in asyncio.all_tasks() if asyncio else ():
            place = place_of(next(iter(task.get_stack(limit=1)), None))
            found[task] = Leftover("asyncio task", task.get_name(), f'asyncio task "{task.get_name()}"{place}')
    return found


def place_of(frame: FrameType | None) -> str:
    """Return where a frame stands, and which line outside the standard library led there."""
    lines = [
        (at.f_code.co_filename, f"{at.f_code.co_filename}:{line} in {at.f_code.co_name}")
        for at, line in traceback.walk_stack(frame)
        if at.f_code.co_name not in BOOTSTRAP
    ]
    if frame is None or not lines:
        return ""
    callers = (text for path, text in lines if not path.startswith(STANDARD_LIBRARY) or "site-packages" in path)
    caller = next(callers, None)
    return f", at {lines[0][1]}" + (f", from {caller}" if caller not in (None, lines[0][1]) else "")


# --- processes --------------------------------------------------------------------------------------------------------


class Process(NamedTuple):
    """A line of the table of processes."""

    parent: int
    has_ended: bool
    started: bytes


def process_table(proc: Path) -> dict[int, Process]:
    """Return all processes of the machine by their id."""
    return {
        pid: Process(int(fields[PARENT]), fields[STATE] in ENDED_STATES, fields[STARTED]) for pid, fields in stats(proc)
    }


def lineage(table: dict[int, Process], pid: int) -> list[int]:
    """Return a process and those above it, from parent to parent."""
    found: list[int] = []
    while pid in table and pid not in found:
        found.append(pid)
        pid = table[pid].parent
    return found


def family(proc: Path, table: dict[int, Process]) -> tuple[set[int], set[int]]:
    """Return the processes below this one, and those that carry a cookie and may come from this one.

    Who loses its parent goes to one of our own ancestors, or stays below us. So a process whose parent is neither
    belongs to another program, for instance to tests that run beside these, unless that parent carries a cookie too.
    Who lost its parent and does not name this block in its environment comes from other programs as well.
    """
    here = os.getpid()
    above = lineage(table, here)
    below = {pid for pid in table if here in lineage(table, pid)} - {here}
    with_cookie = {pid for pid in table.keys() - above if has_variable(pid, COOKIE_VARIABLE, proc)}
    ours: set[int] = set()
    for carrier in with_cookie:
        owner = next((pid for pid in lineage(table, carrier) if pid not in with_cookie), None)
        if (owner is None or owner in above or owner in below) and is_of_this_block(carrier, proc):
            ours.add(carrier)
    return below, ours


def is_of_this_block(pid: int, proc: Path) -> bool:
    """Return whether a process was started in the innermost block that is open; without a block, all are."""
    block = os.environ.get(BLOCK_VARIABLE, "").rpartition(":")[2]
    with suppress(OSError):
        started_in = variable_of(pid, BLOCK_VARIABLE, proc)
        return not block or block in (started_in or "").split(":")
    return False


def processes(proc: Path) -> dict[Hashable, Leftover]:
    """Return the processes that came from this one, by tree or by cookie, and the sockets that they listen on."""
    table = process_table(proc)
    below, with_cookie = family(proc, table)
    found: dict[Hashable, Leftover] = {}
    pids = sorted((below | with_cookie) - {keeper("_pid")})
    for pid in pids:
        with suppress(OSError):
            command = shortened(command_of(pid, proc))
            line = f"process {pid}, {command}, child of {parent_of(table, pid)}"
            if pid in with_cookie:
                line += f", carries {COOKIE_VARIABLE}"
            if table[pid].has_ended:
                line += ", has ended and was not waited for"
            found[pid, table[pid].started] = Leftover("process", command, line)
    return found | listening_sockets(proc, pids)


def parent_of(table: dict[int, Process], pid: int) -> str:
    """Return the parent of a process in words."""
    parent = table[pid].parent
    return "this process" if parent == os.getpid() else str(parent)


def shortened(command: str) -> str:
    """Return the begin of a command line."""
    return command if len(command) <= COMMAND_CHARACTERS_MAX else f"{command[: COMMAND_CHARACTERS_MAX - 3]}..."


def keeper(attribute: str) -> int | None:
    """Return the id or the descriptor of the process that Python itself starts once to watch over shared memory."""
    tracker = getattr(sys.modules.get("multiprocessing.resource_tracker"), "_resource_tracker", None)
    found: int | None = getattr(tracker, attribute, None)
    return found


# --- descriptors and sockets ------------------------------------------------------------------------------------------


def descriptors(proc: Path) -> dict[Hashable, Leftover]:
    """Return the descriptors of this process."""
    targets = targets_of("self", proc)
    sockets = addresses(proc, [target for number, target in targets.items() if may_listen(number, target)])
    found: dict[Hashable, Leftover] = {}
    for number, target in targets.items():
        if number != keeper("_fd"):
            socket_line = f", listening socket {sockets[target]}" if target in sockets else ""
            line = f"file descriptor {number} -> {target}{socket_line}"
            found[number, target] = Leftover("file descriptor", target, line)
    return found


def may_listen(descriptor: int, target: str) -> bool:
    """Return whether a descriptor of this process can be that of a socket that listens."""
    with suppress(OSError):
        if target != f"socket:[{os.fstat(descriptor).st_ino}]":
            return target.startswith("socket:")  # the descriptor of another moment
        with socket.fromfd(descriptor, socket.AF_UNIX, socket.SOCK_STREAM) as copy:  # for a socket of any kind
            return copy.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN) == 1
    return True


def listening_sockets(proc: Path, pids: Iterable[int]) -> dict[Hashable, Leftover]:
    """Return the sockets that other processes listen on; this one has its own among its descriptors."""
    targets: dict[int, set[str]] = {}
    for pid in pids:
        with suppress(OSError):
            targets[pid] = set(targets_of(pid, proc).values())
    sockets = addresses(proc, set().union(*targets.values()))
    found: dict[Hashable, Leftover] = {}
    for pid, own in targets.items():
        for target in own & sockets.keys():
            with suppress(OSError):
                line = f"listening socket {sockets[target]}, of process {pid}, {shortened(command_of(pid, proc))}"
                found[pid, target] = Leftover("listening socket", sockets[target], line)
    return found


def addresses(proc: Path, targets: Collection[str]) -> dict[str, str]:
    """Return the addresses of those targets of descriptors that are listening sockets."""
    found: dict[str, str] = {}
    # The tables are those of the whole network, and long ones take a while to read.
    if not any(target.startswith("socket:") for target in targets):
        return found
    for name, kind in (("tcp", socket.AF_INET), ("tcp6", socket.AF_INET6)):
        for target, digits, port in listening(name, proc):
            found[target] = f"tcp {address(kind, digits)}:{port}"
    for fields in socket_table("unix", proc):
        if int(fields[3], 16) & UNIX_LISTEN:
            found[f"socket:[{fields[6]}]"] = f"unix {' '.join(fields[7:])}"
    return {target: found[target] for target in targets if target in found}


def address(kind: socket.AddressFamily, digits: str) -> str:
    """Return an address in its usual form; the kernel prints words of four bytes in the order of the machine."""
    raw = bytes.fromhex(digits)
    step = -1 if sys.byteorder == "little" else 1
    text = socket.inet_ntop(kind, b"".join(raw[start : start + 4][::step] for start in range(0, len(raw), 4)))
    return f"[{text}]" if kind == socket.AF_INET6 else text


# --- files ------------------------------------------------------------------------------------------------------------


def shared_memory(_: Path) -> dict[Hashable, Leftover]:
    """Return this user's files in /dev/shm."""
    return {
        path: Leftover("shared memory", path, f"shared memory {path}, {size} bytes")
        for path, _, size in own_entries(SHARED_MEMORY)
    }


def temporary_files(_: Path) -> dict[Hashable, Leftover]:
    """Return this user's entries in the folder for temporary files, without looking into folders."""
    found: dict[Hashable, Leftover] = {}
    for path, is_folder, _size in own_entries(Path(tempfile.gettempdir())):
        kind = "temporary folder" if is_folder else "temporary file"
        found[path] = Leftover(kind, path, f"{kind} {path}")
    return found


def own_entries(folder: Path) -> Iterator[tuple[str, bool, int]]:
    """Yield the path, whether it is a folder, and the size of each entry of this user."""
    user = os.getuid() if hasattr(os, "getuid") else None
    with os.scandir(folder) as entries:
        for entry in entries:
            with suppress(FileNotFoundError):
                status = entry.stat(follow_symlinks=False)
                if user in (None, status.st_uid):
                    yield entry.path, entry.is_dir(follow_symlinks=False), status.st_size


def held_elsewhere(paths: Iterable[str], proc: Path) -> set[str]:
    """Return the files that a process maps which is neither this one nor comes from it.

    Programs of the same user share the folder. A file that no process maps may be anybody's, and is not returned.
    """
    found: set[str] = set()
    if not (wanted := set(paths)):
        return found
    below, with_cookie = family(proc, table := process_table(proc))
    for pid in table.keys() - below - with_cookie - {os.getpid()}:
        with suppress(OSError):
            found |= wanted.intersection(mapped(pid, proc))
    return found


def mapped(pid: int, proc: Path) -> Iterator[str]:
    """Yield the paths of the files in the memory of a process."""
    with open(f"{proc}/{pid}/maps", errors="replace") as lines:
        for line in lines:
            # Addresses, permissions, offset, device and inode come before the path.
            if len(fields := line.rstrip("\n").split(None, 5)) == 6:
                yield fields[5]


# --- before and after -------------------------------------------------------------------------------------------------

LOOKS: dict[str, Callable[[Path], dict[Hashable, Leftover]]] = {
    "threads": threads,
    "processes": processes,
    "file descriptors": descriptors,
    "shared memory": shared_memory,
    "temporary files": temporary_files,
    "asyncio tasks": asyncio_tasks,
}


class Snapshot(NamedTuple):
    """The things that exist at one moment, and the kinds that cannot be listed."""

    found: dict[tuple[str, Hashable], Leftover]
    unknown: dict[str, str]


def snapshot(proc: Path) -> Snapshot:
    """Return the things that exist now."""
    found: dict[tuple[str, Hashable], Leftover] = {}
    unknown: dict[str, str] = {}
    for kind, look in LOOKS.items():
        try:
            found.update({(kind, key): thing for key, thing in look(proc).items()})
        except OSError as error:
            unknown[kind] = str(error)
    return Snapshot(found, unknown)


class CleanBlock:
    """Compares before and after a block; see `assert_clean`. Serves `with` and, in a coroutine, `async with`."""

    def __init__(self, within_s: float, ignore: tuple[str, ...], proc: Path = Path(PROC)) -> None:
        self._within_s = within_s
        self._ignore = ignore
        self._proc = proc
        self._before = Snapshot({}, {})
        self._left: list[Leftover] = []
        self._outer: str | None = None

    def __enter__(self) -> None:
        """Note the existing things, and warn about kinds that cannot be compared here."""
        self._before = snapshot(self._proc)
        if self._before.unknown:
            reasons = "; ".join(f"{kind} ({reason})" for kind, reason in self._before.unknown.items())
            warnings.warn(f"assert_clean cannot compare {reasons}", stacklevel=2)
        self._outer = os.environ.get(BLOCK_VARIABLE)
        block = secrets.token_hex(8)
        os.environ[BLOCK_VARIABLE] = f"{self._outer}:{block}" if self._outer else block

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, *_: object) -> None:
        """Wait until nothing is left, and raise if something is when the time is over."""
        __tracebackhide__ = True
        try:
            if error is None or isinstance(error, Exception):
                for pause_s in self._pauses():
                    threading.Event().wait(pause_s)
        finally:
            self._close()
        self._judge(error)

    async def __aenter__(self) -> None:
        """Do the same as `__enter__`."""
        self.__enter__()

    async def __aexit__(self, kind: type[BaseException] | None, error: BaseException | None, *_: object) -> None:
        """Do the same as `__exit__`, but let the event loop run while it waits."""
        from asyncio import sleep

        __tracebackhide__ = True
        try:
            if error is None or isinstance(error, Exception):
                for pause_s in self._pauses():
                    await sleep(pause_s)
        finally:
            self._close()
        self._judge(error)

    def _pauses(self) -> Iterator[float]:
        """Look, and yield how long to wait before the next look, until nothing is left or the time is over."""
        due = time.monotonic() + self._within_s
        pause_s = PAUSE_MIN_S
        self._look()
        if self._left:
            # Objects that are only waiting for the garbage collector are not leftovers.
            gc.collect()
            self._look()
        while self._left and (left_s := due - time.monotonic()) > 0:
            yield min(pause_s, left_s)
            pause_s = min(2 * pause_s, PAUSE_MAX_S)
            self._look()

    def _look(self) -> None:
        after = snapshot(self._proc)
        self._left = [
            thing
            for key, thing in after.found.items()
            if key not in self._before.found and key[0] not in self._before.unknown
            if not any(thing.matches(pattern) for pattern in self._ignore)
        ]
        shared = [thing.name for thing in self._left if thing.kind == "shared memory"]
        others = held_elsewhere(shared, self._proc)
        self._left = [thing for thing in self._left if thing.kind != "shared memory" or thing.name not in others]

    def _close(self) -> None:
        os.environ.pop(BLOCK_VARIABLE, None)
        if self._outer is not None:
            os.environ[BLOCK_VARIABLE] = self._outer

    def _judge(self, error: BaseException | None) -> None:
        __tracebackhide__ = True
        if not self._left:
            return
        lines = [f"left behind after {self._within_s:g} s:"]
        lines += [f"  {thing.line}" for thing in self._left]
        lines += [f"not compared: {kind} ({reason})" for kind, reason in self._before.unknown.items()]
        if error is not None:
            # The failure of the block comes first, and may be why something is left.
            error.add_note("\n".join(lines))
            return
        raise AssertionError("\n".join(lines))


def assert_clean(within_s: float = 2.0, ignore: str | Iterable[str] = ()) -> CleanBlock:
    """Return a context manager that fails if its block leaves anything behind.

    It compares before and after: threads, processes below this one and all that carry the cookie of a job, file
    descriptors, listening sockets, shared memory that no other program maps, temporary files and folders of this
    user, and the asyncio tasks of a running event loop. The error names everything that is left, one line each. In a
    coroutine, `async with` lets tasks end while it waits. If the block itself raises, that error is raised, with a
    note that lists the leftovers.

    A warning names the kinds that cannot be compared because the platform lacks /proc or /dev/shm.

    Args:
        within_s: how long things may take to end by themselves, in seconds.
        ignore: patterns with `*` and `?` of things that may stay: a name, or a kind and a name, as in the error.

    Raises:
        AssertionError: at the end of the block, if something is left.
    """
    if not within_s >= 0:
        raise ValueError(f"within_s must be 0 or more, not {within_s!r}")
    return CleanBlock(within_s, (ignore,) if isinstance(ignore, str) else tuple(ignore))
