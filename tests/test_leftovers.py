"""`assert_clean` names everything that a block leaves behind, and nothing else."""

from __future__ import annotations

import _thread
import asyncio
import os
import re
import select
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import uuid
import warnings
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from sage import LocalEnvironment
from sage._processes import COOKIE_VARIABLE
from sage._testing.leftovers import CleanBlock, address, processes
from sage.testing import assert_clean

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

SOON_S = 0.1
LONG_S = 30.0
ELSEWHERE = "shared memory *"
"""What tests that run beside these may make meanwhile."""

needs_proc = pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="reads /proc")


@pytest.fixture(autouse=True)
def _own_temporary_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Other programs of this machine leave files in the shared folder meanwhile."""
    (tmp_path / "temporary").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "temporary"))


@pytest.fixture
def after() -> Iterator[ExitStack]:
    """Ends what a test leaves."""
    with ExitStack() as stack:
        yield stack


def left_by(block: Callable[[], object], **settings: Any) -> list[str]:
    """Return the lines of the error."""
    with pytest.raises(AssertionError) as caught, assert_clean(**{"within_s": SOON_S, "ignore": ELSEWHERE, **settings}):
        block()
    first, *lines = str(caught.value).splitlines()
    assert re.fullmatch(r"left behind after [\d.]+ s:", first)
    return [line.strip() for line in lines]


def child(after: ExitStack, program: str, cookie: str | None = None) -> subprocess.Popen[str]:
    """Start a program that has written its first line when this returns."""
    environment = {**os.environ, **({COOKIE_VARIABLE: cookie} if cookie else {})}
    command = [sys.executable, "-c", program]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stdin=subprocess.PIPE, text=True, env=environment)
    after.enter_context(process)
    after.callback(process.kill)
    return process


def line_of(process: subprocess.Popen[str]) -> str:
    assert process.stdout is not None
    return process.stdout.readline().strip()


# --- nothing is left --------------------------------------------------------------------------------------------------


def test_a_clean_block_passes() -> None:
    with assert_clean(0.0, ELSEWHERE):
        pass


def test_what_was_there_before_may_stay(after: ExitStack) -> None:
    """Also a thread, a child that is reachable by its cookie, and files."""
    release = threading.Event()
    thread = threading.Thread(target=release.wait)
    after.callback(thread.join)
    after.callback(release.set)
    thread.start()
    child(after, "input()", uuid.uuid4().hex)
    Path(tempfile.gettempdir(), "before").touch()
    after.enter_context(socket.create_server(("127.0.0.1", 0)))
    with assert_clean(0.0, ELSEWHERE):
        pass


def test_a_job_is_clean() -> None:
    with assert_clean(0.0, ELSEWHERE):
        env = LocalEnvironment("clean")
        env.from_batch(range(10)).map(lambda n: n + 1).sink(lambda n: None)
        env.submit(autostop=True)


def test_what_ends_by_itself_is_waited_for() -> None:
    """Not longer than it takes: the threads need a tenth of a second, the limit is 30 s."""
    began_at = time.monotonic()
    with assert_clean(LONG_S, ELSEWHERE):
        threading.Thread(target=time.sleep, args=(0.1,)).start()
    assert 0.05 < time.monotonic() - began_at < LONG_S / 2


@needs_proc
def test_what_only_waits_for_the_collector_is_not_left() -> None:
    def leave_a_ring() -> None:
        ring: list[object] = [select.epoll()]
        ring.append(ring)

    with assert_clean(0.0, ELSEWHERE):
        leave_a_ring()


# --- each kind --------------------------------------------------------------------------------------------------------


def test_a_thread_is_named_with_where_it_stands(after: ExitStack) -> None:
    release = threading.Event()
    waits = threading.Event()

    def forgotten_work() -> None:
        waits.set()
        release.wait()

    thread = threading.Thread(target=forgotten_work, name="forgotten", daemon=True)
    after.callback(thread.join)
    after.callback(release.set)

    def block() -> None:
        thread.start()
        waits.wait()

    (line,) = left_by(block)
    assert line.startswith('thread "forgotten" (daemon), at ')
    assert re.search(rf"threading\.py:\d+ in \w+, from {re.escape(__file__)}:\d+ in forgotten_work$", line)


def test_a_thread_without_a_name_is_named_by_its_place(after: ExitStack) -> None:
    lock, waits, ended = threading.Lock(), threading.Event(), threading.Event()
    lock.acquire()
    after.callback(ended.wait)
    after.callback(lock.release)

    def nameless_work() -> None:
        waits.set()
        with lock:
            ended.set()

    def block() -> None:
        _thread.start_new_thread(nameless_work, ())
        waits.wait()

    (line,) = left_by(block)
    assert re.fullmatch(rf"thread \d+, without a name, at {re.escape(__file__)}:\d+ in nameless_work", line)


def test_a_stand_in_for_a_thread_that_has_ended_is_not_left() -> None:
    ended = threading.Event()

    def work() -> None:
        threading.current_thread()
        ended.set()

    with assert_clean(LONG_S, ELSEWHERE):
        _thread.start_new_thread(work, ())
        ended.wait()


@needs_proc
def test_a_child_is_named(after: ExitStack) -> None:
    children: list[subprocess.Popen[str]] = []
    lines = left_by(lambda: children.append(child(after, "input()")), ignore=["pipe:*", ELSEWHERE])
    assert lines == [f"process {children[0].pid}, {sys.executable} -c input(), child of this process"]


@needs_proc
def test_children_of_children_are_named(after: ExitStack) -> None:
    program = "import subprocess, sys; p = subprocess.Popen(['sleep', '600']); print(p.pid, flush=True); p.wait()"
    pids: list[int] = []

    def block() -> None:
        process = child(after, program)
        pids.extend([process.pid, int(line_of(process))])
        after.callback(os.kill, pids[1], signal.SIGKILL)

    lines = left_by(block, ignore=["file descriptor pipe:*", ELSEWHERE])
    assert len(lines) == 2
    assert f"process {pids[1]}, sleep 600, child of {pids[0]}" in lines


@needs_proc
def test_a_child_that_nobody_waited_for_is_named(after: ExitStack) -> None:
    children: list[subprocess.Popen[str]] = []

    def block() -> None:
        process = child(after, "")
        children.append(process)
        os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)

    (line,) = left_by(block, ignore=["pipe:*", ELSEWHERE])
    assert line.startswith(f"process {children[0].pid}, [")
    assert line.endswith("], child of this process, has ended and was not waited for")


@needs_proc
def test_a_grandchild_in_a_session_of_its_own_is_found_by_its_cookie(after: ExitStack) -> None:
    """Its parent has ended, so that no tree of processes leads to it."""
    program = (
        "import subprocess; p = subprocess.Popen(['sleep', '600'], start_new_session=True, stdout=subprocess.DEVNULL)\n"
        "print(p.pid, flush=True); p.returncode = 0"
    )
    pids: list[int] = []

    def block() -> None:
        with child(after, program, uuid.uuid4().hex) as process:
            pids.append(int(line_of(process)))
            after.callback(os.kill, pids[0], signal.SIGKILL)
            process.communicate()

    (line,) = left_by(block)
    assert re.fullmatch(rf"process {pids[0]}, sleep 600, child of \d+, carries SAGE_COOKIE", line)


@needs_proc
def test_a_descriptor_is_named_by_what_it_points_to(tmp_path: Path, after: ExitStack) -> None:
    numbers: list[int] = []

    def block() -> None:
        numbers.append(os.open(tmp_path, os.O_RDONLY))
        after.callback(os.close, numbers[0])

    assert left_by(block) == [f"file descriptor {numbers[0]} -> {tmp_path}"]


@needs_proc
@pytest.mark.parametrize("host", ["127.0.0.1", "::1"])
def test_a_listening_socket_is_named_by_its_address(host: str, after: ExitStack) -> None:
    servers: list[socket.socket] = []
    kind = socket.AF_INET6 if ":" in host else socket.AF_INET

    def block() -> None:
        try:
            servers.append(after.enter_context(socket.create_server((host, 0), family=kind)))
        except OSError:
            pytest.skip(f"this machine has no {host}")

    (line,) = left_by(block)
    port = servers[0].getsockname()[1]
    shown = f"[{host}]" if ":" in host else host
    assert line.startswith(f"file descriptor {servers[0].fileno()} -> socket:[")
    assert line.endswith(f"], listening socket tcp {shown}:{port}")


@needs_proc
def test_a_listening_unix_socket_is_named_by_its_path(tmp_path: Path, after: ExitStack) -> None:
    def block() -> None:
        server = after.enter_context(socket.socket(socket.AF_UNIX))
        after.callback(os.chdir, os.getcwd())
        os.chdir(tmp_path)  # the path of a unix socket may not be long
        server.bind("served.sock")
        server.listen()

    (line,) = left_by(block)
    assert line.endswith("], listening socket unix served.sock")


@needs_proc
def test_a_listening_socket_of_a_child_that_was_there_before_is_named(after: ExitStack) -> None:
    program = (
        "import socket; input()\nserver = socket.create_server(('127.0.0.1', 0))\n"
        "print(server.getsockname()[1], flush=True); input()"
    )
    process = child(after, program)
    ports: list[str] = []

    def block() -> None:
        assert process.stdin is not None
        process.stdin.write("\n")
        process.stdin.flush()
        ports.append(line_of(process))

    (line,) = left_by(block)
    assert line.startswith(f"listening socket tcp 127.0.0.1:{ports[0]}, of process {process.pid}, {sys.executable}")


@pytest.mark.skipif(not Path("/dev/shm").is_dir(), reason="looks into /dev/shm")
def test_shared_memory_is_named(after: ExitStack) -> None:
    path = Path("/dev/shm", f"sage-test-{uuid.uuid4().hex}")
    after.callback(path.unlink)
    assert f"shared memory {path}, 5 bytes" in left_by(lambda: path.write_bytes(b"12345"), ignore=())


MAPS = """
import mmap, os, sys
if os.fork():
    sys.exit()
with open(sys.argv[1], "r+b") as file:
    memory = mmap.mmap(file.fileno(), 0)
print(os.getpid(), flush=True)
sys.stdin.read()
"""


@needs_proc
@pytest.mark.parametrize("holder", ["another program", "a child"])
def test_shared_memory_of_another_program_is_not_left(holder: str, after: ExitStack) -> None:
    path = Path("/dev/shm", f"sage-test-{uuid.uuid4().hex}")
    after.callback(path.unlink)
    program = MAPS if holder == "another program" else MAPS.replace("os.fork()", "False")

    def block() -> None:
        path.write_bytes(b"12345")
        words = [sys.executable, "-c", program, str(path)]
        process = subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        after.callback(process.communicate)
        assert process.stdout is not None
        process.stdout.readline()

    settings: dict[str, Any] = {"ignore": ["shared memory *sem*", "process *", "file descriptor *"], "within_s": SOON_S}
    if holder == "another program":
        with assert_clean(**settings):
            block()
    else:
        assert left_by(block, **settings) == [f"shared memory {path}, 5 bytes"]


@needs_proc
def test_the_process_that_python_keeps_for_shared_memory_is_not_left() -> None:
    """It is started once, with the first shared memory of the program, and ends with the program."""
    program = """
import multiprocessing.shared_memory
from sage.testing import assert_clean
with assert_clean(within_s=0.0, ignore=["temporary *", "shared memory *"]):
    memory = multiprocessing.shared_memory.SharedMemory(create=True, size=10)
    memory.close()
    memory.unlink()
"""
    done = subprocess.run([sys.executable, "-W", "error", "-c", program], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")


def test_temporary_files_and_folders_are_named() -> None:
    def block() -> None:
        names.append(tempfile.mkdtemp())
        Path(names[0], "inside").touch()
        number, name = tempfile.mkstemp()
        names.append(name)
        os.close(number)

    names: list[str] = []
    assert sorted(left_by(block)) == [f"temporary file {names[1]}", f"temporary folder {names[0]}"]


def test_asyncio_tasks_are_named_with_where_they_stand() -> None:
    async def forgotten_task() -> None:
        await asyncio.Event().wait()

    async def main() -> None:
        with pytest.raises(AssertionError) as caught:
            async with assert_clean(SOON_S, ELSEWHERE):
                task = asyncio.create_task(forgotten_task(), name="forgotten")
        task.cancel()
        (line,) = str(caught.value).splitlines()[1:]
        assert re.fullmatch(rf'  asyncio task "forgotten", at {re.escape(__file__)}:\d+ in forgotten_task', line)

    asyncio.run(main())


def test_asyncio_tasks_that_end_are_waited_for() -> None:
    async def main() -> None:
        ended = asyncio.Event()

        async def short_task() -> None:
            await asyncio.sleep(0.02)
            ended.set()

        async with assert_clean(LONG_S, ELSEWHERE):
            task = asyncio.create_task(short_task())
        assert ended.is_set()
        await task

    asyncio.run(main())


# --- how it is told ---------------------------------------------------------------------------------------------------


def leave_two(after: ExitStack) -> None:
    release = threading.Event()
    for name in ("pool-1", "reader"):
        thread = threading.Thread(target=release.wait, name=name)
        after.callback(thread.join)
        after.callback(release.set)
        thread.start()


def leave_two_and_raise(after: ExitStack, error: BaseException) -> None:
    leave_two(after)
    raise error


def test_everything_that_is_left_is_named(after: ExitStack) -> None:
    def block() -> None:
        leave_two(after)
        Path(tempfile.gettempdir(), "left").touch()

    lines = left_by(block)
    assert [line.split(" ")[:2] for line in lines] == [
        ["thread", '"pool-1",'],
        ["thread", '"reader",'],
        ["temporary", "file"],
    ]


@pytest.mark.parametrize("pattern", ["pool-*", "thread pool-?", "pool-1"])
def test_patterns_say_what_may_stay(after: ExitStack, pattern: str) -> None:
    lines = left_by(lambda: leave_two(after), ignore=[ELSEWHERE, pattern])
    assert len(lines) == 1
    assert lines[0].startswith('thread "reader"')


def test_everything_may_stay(after: ExitStack) -> None:
    with assert_clean(within_s=0.0, ignore="*"):
        leave_two(after)


def test_the_error_of_the_block_goes_on_with_a_note(after: ExitStack) -> None:
    with pytest.raises(LookupError, match="of the block") as caught, assert_clean(0.0, ELSEWHERE):
        leave_two_and_raise(after, LookupError("of the block"))
    (note,) = caught.value.__notes__
    assert note.startswith("left behind after 0 s:\n")
    assert 'thread "pool-1"' in note


def test_the_error_of_a_clean_block_has_no_note() -> None:
    with pytest.raises(LookupError) as caught, assert_clean(0.0, ELSEWHERE):
        raise LookupError("of the block")
    assert not hasattr(caught.value, "__notes__")


def test_an_interrupt_is_not_held_up(after: ExitStack) -> None:
    began_at = time.monotonic()
    with pytest.raises(KeyboardInterrupt), assert_clean(LONG_S, ELSEWHERE):
        leave_two_and_raise(after, KeyboardInterrupt())
    assert time.monotonic() - began_at < LONG_S / 2


def test_what_cannot_be_compared_is_told(tmp_path: Path, after: ExitStack) -> None:
    """In a warning, and in the error: a platform without /proc must not look clean."""
    with (
        pytest.raises(AssertionError, match="pool-1") as caught,
        pytest.warns(UserWarning, match=r"cannot compare processes \(.*nothing.*\); file descriptors \(") as told,
        CleanBlock(0.0, (), proc=tmp_path / "nothing"),
    ):
        leave_two(after)
    assert told[0].filename == __file__
    assert "not compared: processes (" in str(caught.value)
    assert "not compared: file descriptors (" in str(caught.value)
    assert "not compared: threads" not in str(caught.value)


def test_a_platform_that_has_everything_gets_no_warning() -> None:
    with warnings.catch_warnings(record=True) as told, assert_clean(0.0, ELSEWHERE):
        pass
    assert not Path("/proc/net").exists() or told == []


def test_a_limit_below_zero_is_refused() -> None:
    with pytest.raises(ValueError, match=r"within_s must be 0 or more, not -1"):
        assert_clean(within_s=-1)


# --- whose processes --------------------------------------------------------------------------------------------------


def add_process(proc: Path, pid: int, parent: int, *, cookie: bool = False, block: str = "") -> None:
    folder = proc / str(pid)
    folder.mkdir(parents=True)
    (folder / "stat").write_text(f"{pid} (odd) name) S {parent} " + "0 " * 17 + f"{pid}00 0")
    variables = ["PATH=/bin", *["SAGE_COOKIE=ab"] * cookie, *[f"SAGE_CLEAN_BLOCK={block}"] * bool(block)]
    (folder / "environ").write_text("\0".join(variables))
    (folder / "cmdline").write_bytes(b"serve\0")


def test_processes_of_programs_beside_this_one_are_not_ours(tmp_path: Path) -> None:
    """Who loses its parent ends up below an ancestor of ours; what has another living owner belongs to that."""
    here = os.getpid()
    runner, neighbour, theirs, orphan, below_orphan = here + 1, here + 2, here + 3, here + 4, here + 5
    add_process(tmp_path, 1, 0)
    add_process(tmp_path, runner, 1)
    add_process(tmp_path, here, runner)
    add_process(tmp_path, neighbour, runner)
    add_process(tmp_path, theirs, neighbour, cookie=True)
    add_process(tmp_path, orphan, 1, cookie=True)
    add_process(tmp_path, below_orphan, orphan, cookie=True)
    add_process(tmp_path, here + 6, here)
    add_process(tmp_path, here + 7, runner)
    lines = [thing.line for thing in processes(tmp_path).values()]
    assert lines == [
        f"process {orphan}, serve, child of 1, carries SAGE_COOKIE",
        f"process {below_orphan}, serve, child of {orphan}, carries SAGE_COOKIE",
        f"process {here + 6}, serve, child of this process",
    ]


def test_processes_that_were_not_started_in_this_block_are_not_ours(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They have lost their parents, and tell by their environment where they were started."""
    monkeypatch.setenv("SAGE_CLEAN_BLOCK", "outer:this")
    add_process(tmp_path, 1, 0)
    add_process(tmp_path, os.getpid(), 1)
    for place, block in enumerate(["outer:this", "outer:this:inner", "outer", "other:thistle", ""]):
        add_process(tmp_path, os.getpid() + 1 + place, 1, cookie=True, block=block)
    found = [thing.line.split(",")[0] for thing in processes(tmp_path).values()]
    assert found == [f"process {os.getpid() + 1 + place}" for place in (0, 1)]


def test_the_environment_is_as_before() -> None:
    before = dict(os.environ)
    with assert_clean(0.0, ELSEWHERE):
        with assert_clean(0.0, ELSEWHERE):
            pass
        with pytest.raises(KeyboardInterrupt), assert_clean(0.0, ELSEWHERE):
            raise KeyboardInterrupt
        assert len(os.environ) == len(before) + ("SAGE_CLEAN_BLOCK" not in before)
    assert dict(os.environ) == before


def test_addresses_are_read_in_the_order_of_the_machine() -> None:
    """The kernel prints the four bytes of a word as one number."""
    one = (127 << 24 | 1).to_bytes(4, "big")
    digits = f"{int.from_bytes(one, sys.byteorder):08X}"
    assert address(socket.AF_INET, digits) == "127.0.0.1"
    assert address(socket.AF_INET6, "0" * 32) == "[::]"
