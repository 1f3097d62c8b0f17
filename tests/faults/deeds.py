"""The table of what the code of a user may do to its process, and what must follow from it.

A deed is done once for each record, by a function, or by a service in the process of the job or in one of its own; or
once, by the program of a command, or by the main thread before its jobs. `DEEDS` is the table, and nothing here runs by
itself. `faults.deed_program` runs a row of it.
"""

from __future__ import annotations

import asyncio
import atexit
import faulthandler
import multiprocessing
import os
import resource
import signal
import subprocess
import sys
import tempfile
import threading
import time
from concurrent.futures import ProcessPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from multiprocessing.pool import ThreadPool
from typing import TYPE_CHECKING, Any, TypeVar

from sage import LocalEnvironment, ServiceOptions

if TYPE_CHECKING:
    from collections.abc import Callable

FUNCTION, INLINE, PROCESS, COMMAND = "function", "inline", "process", "command"
HOSTS = (FUNCTION, INLINE, PROCESS)
"""Where a deed is done. A command does most of them as any other program would, so that few say something."""

REPLICAS, RECYCLED, COMMANDS = "replicas", "recycled", "replicas of a command"
LIKE = {REPLICAS: PROCESS, RECYCLED: PROCESS, COMMANDS: COMMAND}
"""Hosts with several processes, and the host with one, of which each does the same deeds and must end alike."""

SINGLE = (*HOSTS, COMMAND)
ALL = (*SINGLE, *LIKE)

SLOW = ("spawn", "forkserver")
"""Start methods that load the whole program again for each process."""

LIKE_OTHERS = {
    "a pool by fork",
    "an executor by fork",
    "clears the environment and leaves a program",
    "closes standard input",
    "dumps on signals",
    "forks and ends the child",
    "forks and leaves the child",
    "leaves a pool of threads",
    "leaves a program in a session",
    "leaves a program that inherits",
    "registers for the exit",
    "removes the folder",
    "runs a program that inherits",
    "runs programs by asyncio",
    "sets the wake-up descriptor",
    "terminates a process",
    "uses the shell",
}
"""Deeds whose main part another deed does as well."""

WAYS = ("natural", "stop", "cancel", "failure", "SIGINT", "SIGTERM")
OUTCOMES = {
    "natural": "completed",
    "stop": "stopped",
    "cancel": "cancelled",
    "failure": "failed",
    "SIGINT": "stopped",
    "SIGTERM": "stopped",
}

T = TypeVar("T")

STAYS_S = 1000.0
WAIT_S = 20.0
DONE = "done"

SLEEP = ["sleep", str(STAYS_S)]
STUBBORN = ["sh", "-c", f"trap '' TERM; exec sleep {STAYS_S}"]


@dataclass(frozen=True)
class Deed:
    """One row.

    Attributes:
        name: what is done, in words.
        do: does it, and returns `DONE` if it went as it should.
        single: where it is done by one process or function.
        before: done on the main thread of the program before its jobs.
        dirty: the hosts whose job is dirty for it, with what an error must say there.
        fails: the hosts whose job fails for it, with what an error must say there.
        ends: the hosts whose whole program ends by it, with the exit code.
        unchecked: what cannot be as it should on a host, by the names of `must` in the test.
        ignore: what stays by the nature of it, as patterns of `assert_clean`.
    """

    name: str
    do: Callable[[], str]
    single: tuple[str, ...] = HOSTS
    before: Callable[[], None] | None = None
    dirty: tuple[tuple[str, str], ...] = ()
    fails: tuple[tuple[str, str], ...] = ()
    ends: tuple[tuple[str, int], ...] = ()
    unchecked: tuple[tuple[str, tuple[str, ...]], ...] = ()
    ignore: tuple[str, ...] = ()

    @property
    def is_quick(self) -> bool:
        """Whether no other deed does its main part, and it loads no program again."""
        return not self.name.endswith(SLOW) and self.name not in LIKE_OTHERS

    @property
    def hosts(self) -> tuple[str, ...]:
        """Where it is done; several processes of a service do only those that are quick."""
        several = [host for host, like in LIKE.items() if like in self.single and self.is_quick]
        return (*self.single, *several)

    def on(self, host: str, table: tuple[tuple[str, T], ...]) -> T | None:
        """Return what one of the attributes above says about a host, or None."""
        return dict(table).get(LIKE.get(host, host))


@dataclass(frozen=True)
class Cell:
    """A deed on a host, in a job that ends in a way."""

    deed: Deed
    host: str
    way: str

    @property
    def outcome(self) -> str:
        """How the job ends."""
        return "failed" if self.deed.on(self.host, self.deed.fails) else OUTCOMES[self.way]


# --- what is undone in the process in which it was done, when the job is over

undoing: list[Callable[[], object]] = []


def undo() -> None:
    """End what deeds have left in this process, the last first."""
    while undoing:
        undoing.pop()()


def nothing() -> str:
    return DONE


def echo(value: int) -> int:
    return value


def stay() -> None:
    time.sleep(STAYS_S)


# --- fork ------------------------------------------------------------


def forked(body: Callable[[], object]) -> int:
    """Fork a process that runs `body`, and return its pid."""
    pid = os.fork()
    if pid == 0:
        try:
            body()
        finally:
            os._exit(0)
    return pid


def forks() -> str:
    return DONE if os.waitpid(forked(nothing), 0)[1] == 0 else "the child failed"


def ended_child(pid: int) -> None:
    with suppress(ProcessLookupError, ChildProcessError):
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)


def forks_and_leaves_it() -> str:
    pid = forked(stay)
    undoing.append(lambda: ended_child(pid))
    return DONE


def forks_twice_and_leaves_it() -> str:
    """Leave a daemon as programs make them; who knows its pid can end it."""
    read_end, write_end = os.pipe()

    def between() -> None:
        os.setsid()
        os.write(write_end, str(forked(stay)).encode())

    os.waitpid(forked(between), 0)
    pid = int(os.read(read_end, 32))
    os.close(read_end)
    os.close(write_end)
    undoing.append(lambda: ended_child(pid))
    return DONE


def forks_and_ends_it() -> str:
    pid = forked(stay)
    os.kill(pid, signal.SIGTERM)
    status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    return DONE if status == -signal.SIGTERM else f"ended with {status}"


def comes_back_from_a_fork() -> str:
    """Return in the child as well: it must not go on with the records of the parent."""
    errors, sys.stderr = sys.stderr, open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115
    pid = os.fork()
    if pid == 0:
        return "in the child"
    status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    sys.stderr.close()
    sys.stderr = errors
    return DONE if status != 0 else "the child went on"


class Doubling:
    def process(self, record: int) -> int:
        return record * 2


def runs_a_job(host: str) -> str:
    env = LocalEnvironment("of the child")
    doubling = env.register_service("doubling", Doubling, options=ServiceOptions(host=host))  # type: ignore[arg-type]
    results: list[int] = []
    env.from_batch([1, 2, 3]).map(doubling).sink(results.append)
    env.submit(autostop=True)
    return DONE if results == [2, 4, 6] else f"wrong answers {results}"


def forks_and_runs_a_job_there() -> str:
    """The child has no part in the job of its parent, and may have one of its own, with services of every host."""

    def run() -> None:
        os._exit(0 if {runs_a_job("inline"), runs_a_job("process")} == {DONE} else 1)

    return DONE if os.waitpid(forked(run), 0)[1] == 0 else "the child failed"


# --- multiprocessing ------------------------------------------------------------


def process_by(method: str) -> Callable[[], str]:
    def run() -> str:
        context: Any = multiprocessing.get_context(method)
        child = context.Process(target=nothing)
        child.start()
        child.join(WAIT_S)
        return DONE if child.exitcode == 0 else f"exit code {child.exitcode}"

    return run


def pool_by(method: str) -> Callable[[], str]:
    def run() -> str:
        with multiprocessing.get_context(method).Pool(2) as pool:
            return DONE if pool.map(echo, range(4)) == [0, 1, 2, 3] else "wrong answers"

    return run


def executor_by(method: str) -> Callable[[], str]:
    def run() -> str:
        with ProcessPoolExecutor(2, mp_context=multiprocessing.get_context(method)) as pool:
            return DONE if list(pool.map(echo, range(4))) == [0, 1, 2, 3] else "wrong answers"

    return run


def terminates_a_process() -> str:
    child = multiprocessing.get_context("fork").Process(target=stay)
    child.start()
    child.terminate()
    child.join(WAIT_S)
    return DONE if child.exitcode == -signal.SIGTERM else f"exit code {child.exitcode}"


def leaves_a_daemon_process() -> str:
    child = multiprocessing.get_context("fork").Process(target=stay, daemon=True)
    child.start()
    undoing.extend([child.join, child.kill])
    return DONE


# --- subprocess ------------------------------------------------------------


def runs_a_program(**options: Any) -> Callable[[], str]:
    return lambda: DONE if subprocess.run(["true"], check=False, **options).returncode == 0 else "failed"


def leaves_a_program(words: list[str] = SLEEP, **options: Any) -> Callable[[], str]:
    def start() -> str:
        child = subprocess.Popen(words, **options)
        undoing.extend([child.wait, child.kill])
        return DONE

    return start


def leaves_a_program_that_sees_no_signals() -> str:
    """Start it with SIGTERM blocked, which it inherits."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGTERM])
    try:
        return leaves_a_program()()
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def uses_the_shell() -> str:
    return DONE if os.system("true") == 0 else "failed"


# --- signals ------------------------------------------------------------


def refused(function: Callable[[], object]) -> str:
    """Call what only the main thread may."""
    try:
        function()
    except ValueError:
        return DONE
    return "allowed"


def sets_handlers() -> str:
    return refused(lambda: signal.signal(signal.SIGTERM, signal.SIG_IGN))


def sets_the_wakeup_descriptor() -> str:
    return refused(lambda: signal.set_wakeup_fd(-1))


def blocks_signals() -> str:
    signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
    return DONE


def dumps_on_signals() -> str:
    faulthandler.register(signal.SIGUSR1, file=2)
    undoing.append(lambda: faulthandler.unregister(signal.SIGUSR1))
    return DONE


def waits_for_every_child() -> str:
    """Be told of each child before whoever started it."""
    over = threading.Event()

    def wait() -> None:
        while not over.wait(0.0005):
            with suppress(ChildProcessError):
                os.waitpid(-1, os.WNOHANG)

    waiting = threading.Thread(target=wait, daemon=True)
    waiting.start()
    undoing.extend([waiting.join, over.set])
    return DONE


def ignores_sigchld() -> None:
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)


def ignores_sigpipe() -> None:
    signal.signal(signal.SIGPIPE, signal.SIG_DFL)


# --- descriptors and limits ------------------------------------------------------------


def lowers_the_limit_of_descriptors() -> str:
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (64, before[1]))
    undoing.append(lambda: resource.setrlimit(resource.RLIMIT_NOFILE, before))
    return DONE


def closes_every_descriptor() -> str:
    os.closerange(3, 1024)
    return DONE


def closes_standard_streams() -> None:
    for descriptor in range(3):
        os.close(descriptor)


def closes_standard_input() -> None:
    os.close(0)


def loses_standard_output() -> str:
    before, sys.stdout = sys.stdout, None
    undoing.append(lambda: setattr(sys, "stdout", before))
    return DONE


# --- the rest of a process ------------------------------------------------------------


def changes_the_folder() -> str:
    before = os.getcwd()
    os.chdir("/")
    undoing.append(lambda: os.chdir(before))
    return DONE


def removes_the_folder() -> str:
    with suppress(FileNotFoundError):
        before = os.getcwd()
        undoing.append(lambda: os.chdir(before))
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
    return DONE


def forbids_files() -> str:
    before = os.umask(0o777)
    undoing.append(lambda: os.umask(before))
    return DONE


def clears_the_environment() -> str:
    before = dict(os.environ)
    os.environ.clear()
    undoing.append(lambda: os.environ.update(before))
    return DONE


def clears_the_environment_and_leaves_a_program() -> str:
    clears_the_environment()
    return leaves_a_program(["/bin/sleep", str(STAYS_S)])()


def exits() -> str:
    sys.exit(3)


def exits_at_once() -> str:
    os._exit(3)


def interrupts_itself() -> str:
    raise KeyboardInterrupt


def leaves_a_thread(*, is_daemon: bool) -> Callable[[], str]:
    def start() -> str:
        over = threading.Event()
        thread = threading.Thread(target=over.wait, args=(STAYS_S,), name="of the deed", daemon=is_daemon)
        thread.start()
        undoing.extend([thread.join, over.set])
        return DONE

    return start


def leaves_a_pool_of_threads() -> str:
    pool = ThreadPool(2)
    undoing.extend([pool.join, pool.terminate])
    return DONE if pool.map(echo, range(4)) == [0, 1, 2, 3] else "wrong answers"


def runs_a_loop_of_its_own() -> str:
    async def main() -> str:
        tasks.append(asyncio.create_task(asyncio.sleep(STAYS_S)))  # cancelled by the end of the loop
        await asyncio.sleep(0)
        return DONE

    tasks: list[Any] = []
    return asyncio.run(main())


def runs_programs_by_asyncio() -> str:
    async def main() -> str:
        child = await asyncio.create_subprocess_exec("true")
        return DONE if await child.wait() == 0 else "failed"

    return asyncio.run(main())


def registers_for_the_exit() -> str:
    atexit.register(nothing)
    return DONE


def forgets_modules() -> str:
    before = sys.path[:]
    sys.path.clear()
    undoing.append(lambda: sys.path.extend(before))
    return DONE


FORKSERVER = ("process *forkserver*", "file descriptor *", "listening socket *pymp-*", "temporary folder *pymp-*")
"""What multiprocessing keeps as long as the program runs."""

NOT_KNOWN = tuple((host, "its exit code is not known") for host in (FUNCTION, PROCESS, COMMAND))

DEEDS = {
    deed.name: deed
    for deed in (
        Deed("does nothing", nothing, SINGLE),
        Deed("forks", forks, SINGLE),
        Deed("forks and leaves the child", forks_and_leaves_it, SINGLE),
        Deed("forks twice and leaves the child", forks_twice_and_leaves_it, SINGLE),
        Deed("forks and ends the child", forks_and_ends_it),
        Deed("forks, and the child comes back", comes_back_from_a_fork),
        Deed("forks, and the child runs a job", forks_and_runs_a_job_there),
        *(Deed(f"a process by {way}", process_by(way)) for way in ("fork", "spawn")),
        Deed("a process by forkserver", process_by("forkserver"), ignore=FORKSERVER),
        *(Deed(f"a pool by {way}", pool_by(way)) for way in ("fork", "spawn")),
        *(Deed(f"an executor by {way}", executor_by(way)) for way in ("fork", "spawn")),
        Deed("terminates a process", terminates_a_process),
        Deed("leaves a daemon process", leaves_a_daemon_process),
        Deed("runs a program", runs_a_program()),
        Deed("runs a program that inherits", runs_a_program(close_fds=False)),
        Deed("uses the shell", uses_the_shell),
        Deed("leaves a program", leaves_a_program(), SINGLE),
        Deed("leaves a program that inherits", leaves_a_program(close_fds=False), SINGLE),
        Deed("leaves a program in a session", leaves_a_program(start_new_session=True), SINGLE),
        Deed(
            "leaves a stubborn program",
            leaves_a_program(STUBBORN, start_new_session=True),
            SINGLE,
            dirty=((PROCESS, "had to be killed"), (COMMAND, "had to be killed")),
        ),
        Deed(
            "leaves a program that sees no signals",
            leaves_a_program_that_sees_no_signals,
            dirty=((PROCESS, "had to be killed"),),
        ),
        Deed("sets handlers", sets_handlers),
        Deed("sets the wake-up descriptor", sets_the_wakeup_descriptor),
        Deed("blocks signals", blocks_signals),
        Deed("dumps on signals", dumps_on_signals),
        Deed("waits for every child", waits_for_every_child, unchecked=((FUNCTION, ("cleanliness",)),)),
        Deed("ignores SIGCHLD", nothing, SINGLE, before=ignores_sigchld, dirty=NOT_KNOWN),
        Deed("has the default SIGPIPE", nothing, SINGLE, before=ignores_sigpipe),
        Deed("lowers the limit of descriptors", lowers_the_limit_of_descriptors),
        Deed(
            "closes every descriptor",
            closes_every_descriptor,
            dirty=((FUNCTION, "has no process any more"),),
            fails=((PROCESS, "has no process any more"),),
            unchecked=(
                (FUNCTION, ("marks", "is_reported", "took")),  # nothing leads to the service or to the file any more
                (INLINE, ("is_reported",)),
                (PROCESS, ("marks", "cleanliness")),  # either side may see the end of the other first
            ),
        ),
        Deed("closes standard streams", nothing, SINGLE, before=closes_standard_streams),
        Deed("closes standard input", nothing, SINGLE, before=closes_standard_input),
        Deed("loses standard output", loses_standard_output),
        Deed("changes the folder", changes_the_folder),
        Deed("removes the folder", removes_the_folder),
        Deed("forbids files", forbids_files),
        Deed("clears the environment", clears_the_environment),
        Deed("clears the environment and leaves a program", clears_the_environment_and_leaves_a_program),
        Deed("exits", exits, fails=tuple((host, "SystemExit") for host in HOSTS)),
        Deed("exits at once", exits_at_once, (FUNCTION, INLINE), ends=((FUNCTION, 3), (INLINE, 3))),
        Deed("interrupts itself", interrupts_itself, fails=tuple((host, "KeyboardInterrupt") for host in HOSTS)),
        Deed("leaves a daemon thread", leaves_a_thread(is_daemon=True)),
        Deed("leaves a thread", leaves_a_thread(is_daemon=False), dirty=((PROCESS, "did not exit in time"),)),
        Deed("leaves a pool of threads", leaves_a_pool_of_threads),
        Deed("runs a loop of its own", runs_a_loop_of_its_own),
        Deed("runs programs by asyncio", runs_programs_by_asyncio),
        Deed("registers for the exit", registers_for_the_exit),
        Deed("forgets modules", forgets_modules),
    )
}


def table() -> str:
    """Return the deeds as a table for the docs."""
    lines = ["| what is done | by | what follows |", "|---|---|---|"]
    for deed in DEEDS.values():
        follows: dict[str, list[str]] = {}
        for host in deed.hosts:
            follows.setdefault(consequence(deed, host), []).append(host)
        for text, hosts in follows.items():
            where = "the program before its jobs" if deed.before is not None else ", ".join(hosts)
            beside = f" ({', '.join(hosts)})" if deed.before is not None and len(follows) > 1 else ""
            lines.append(f"| {deed.name} | {where}{beside} | {text} |")
    return "\n".join(lines) + "\n"


def consequence(deed: Deed, host: str) -> str:
    """Return in words what follows from a deed on a host."""
    code = deed.on(host, deed.ends)
    if code is not None:
        return f"the program ends with code {code}, and nothing is left"
    dirty, fails = deed.on(host, deed.dirty), deed.on(host, deed.fails)
    if fails:
        return f"the job fails: {fails}"
    return f"right results; the job is dirty: {dirty}" if dirty else "right results, clean"
