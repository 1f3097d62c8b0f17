"""`sage exec` and `sage.supervised`: nothing that a command started outlives it, however it ends."""

from __future__ import annotations

import json
import os
import pty
import random
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

import sage
from sage._processes import Process, is_alive, process, with_cookie

EXEC = [str(Path(sys.executable).with_name("sage")), "exec", "--"]
WAIT_S = 20.0
SURVIVE_S = 3.0

# As vLLM is built: the process that answers, an engine in a session of its own, and two workers that do not listen.
ENGINE = """
import os, signal, subprocess, sys, time
role, folder = sys.argv[1:]
below = {"api": ["engine"], "engine": ["worker", "worker"], "worker": []}[role]
if role == "worker":
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
for other in below:
    subprocess.Popen([sys.executable, __file__, other, folder], start_new_session=other == "engine")
with open(os.path.join(folder, f"{role}-{os.getpid()}"), "w"):
    pass
while True:
    time.sleep(60)
"""


def wait_for(condition: Callable[[], object]) -> None:
    due = time.monotonic() + WAIT_S
    while not condition():
        assert time.monotonic() < due, "it did not come"
        time.sleep(0.005)


def ran(*words: str, **options: Any) -> subprocess.CompletedProcess[str]:
    return subprocess.run([*EXEC, *words], capture_output=True, text=True, timeout=60, **options)


@contextmanager
def killed_at_the_end(words: list[str], **options: Any) -> Iterator[subprocess.Popen[bytes]]:
    """Start a process and kill it at the end of the block; `Popen` alone would wait for it, also in a failed test."""
    with subprocess.Popen(words, **options) as running:
        try:
            yield running
        finally:
            running.kill()


@pytest.fixture
def server(tmp_path: Path) -> list[str]:
    return made_server(tmp_path)


def made_server(folder: Path) -> list[str]:
    program = folder / "server.py"
    program.write_text(ENGINE)
    (folder / "up").mkdir()
    return [sys.executable, str(program), "api", str(folder / "up")]


def processes_of(server: Sequence[str]) -> set[Process]:
    """Return the processes of a server that is up."""
    found = {process(int(name.partition("-")[2])) for name in os.listdir(server[3])}
    return {one for one in found if one is not None}


@pytest.mark.parametrize("code", [0, 3])
def test_output_and_exit_code_are_those_of_the_command(code: int) -> None:
    done = ran(sys.executable, "-c", f"import sys; print(input()); sys.exit({code})", input="word\n")
    assert (done.returncode, done.stdout, done.stderr) == (code, "word\n", "")


def test_options_of_the_command_are_its_own() -> None:
    assert ran("echo", "-n", "--help").stdout == "--help"


def test_a_signal_reaches_the_command() -> None:
    program = "import signal, sys; signal.signal(15, lambda *_: sys.exit(7)); print(flush=True); signal.pause()"
    with killed_at_the_end([*EXEC, sys.executable, "-c", program], stdout=subprocess.PIPE) as running:
        assert running.stdout is not None
        running.stdout.readline()
        running.send_signal(signal.SIGTERM)
        assert running.wait(WAIT_S) == 7


def test_a_command_that_a_signal_ended_has_the_code_of_shells() -> None:
    assert ran("sh", "-c", "kill -KILL $$").returncode == 128 + signal.SIGKILL


@pytest.mark.parametrize(("word", "code"), [("/no/such/program", 127), ("/etc/passwd", 126)])
def test_a_command_that_cannot_be_run(word: str, code: int) -> None:
    done = ran(word)
    assert done.returncode == code
    assert done.stderr.startswith(f"sage exec: {word}: ")


def test_what_a_command_left_is_ended_and_named(server: list[str], tmp_path: Path) -> None:
    """The API process ends by itself; its engine and the deaf workers would stay."""
    up = f"until [ $(ls {server[3]} | wc -l) = 4 ]; do sleep 0.05; done"
    script = f"{shlex.join(server)} & {up}; kill -9 $!; wait $! 2>/dev/null"
    done = ran("sh", "-c", script)
    assert processes_of(server) == set()
    lines = done.stderr.splitlines()
    assert len(lines) == 3
    assert sum(line.endswith(" was left and had to be killed") for line in lines) == 2
    assert all(f"({sys.executable} {server[1]} " in line for line in lines)


def test_a_terminal_belongs_to_the_command_and_is_given_back() -> None:
    """Ctrl-C reaches the command alone, which decides what it means."""
    program = "import signal, sys; signal.signal(2, lambda *_: sys.exit(5)); print('up', flush=True); signal.pause()"
    main, other = pty.openpty()
    words = [*EXEC, sys.executable, "-c", program]
    options: dict[str, Any] = {"start_new_session": True, "preexec_fn": controls}
    with killed_at_the_end(words, stdin=other, stdout=other, stderr=other, **options) as running:
        os.close(other)
        shown = b""
        while b"up" not in shown:
            shown += os.read(main, 100)
        os.write(main, b"\x03")
        assert running.wait(WAIT_S) == 5
    os.close(main)


def controls() -> None:
    import fcntl
    import termios

    fcntl.ioctl(0, termios.TIOCSCTTY, 0)


@pytest.mark.parametrize("seed", range(3))
def test_nothing_survives_a_killed_driver(server: list[str], tmp_path: Path, seed: int) -> None:
    kill_at_a_moment(server, tmp_path, seed)


@pytest.mark.proof
@pytest.mark.timeout(0)
def test_nothing_survives_many_killed_drivers(tmp_path: Path, request: pytest.FixtureRequest) -> None:
    """As many as `--kills` says, two at a time; 1,000 take about a quarter of an hour on two busy cores."""
    count = request.config.getoption("--kills")

    def kill(seed: int) -> None:
        folder = tmp_path / str(seed)
        folder.mkdir()
        kill_at_a_moment(made_server(folder), folder, seed)

    with ThreadPoolExecutor(2) as threads:
        done = list(threads.map(kill, range(3, 3 + count)))
    print(f"{len(done)} drivers were killed, and nothing of them survived {SURVIVE_S:g} s")


def kill_at_a_moment(server: list[str], tmp_path: Path, seed: int) -> None:
    """Kill the driver when some number of the server's processes are up, or a moment later."""
    choice = random.Random(seed)
    state = tmp_path / f"state-{seed}"
    environment = {**os.environ, "SAGE_STATE_DIR": str(state)}
    token = f"test-{os.getpid()}-{seed}"
    environment["SAGE_COOKIE"] = token
    up_count, pause_s = choice.randrange(5), choice.random() * 0.05
    with killed_at_the_end([*EXEC, *server], env=environment):
        wait_for(lambda: len(os.listdir(server[3])) >= up_count)
        time.sleep(pause_s)
    due = time.monotonic() + SURVIVE_S
    while left := with_cookie(token):
        assert time.monotonic() < due, f"{left} survived, with {up_count} processes up and {pause_s:.3f} s later"
        time.sleep(0.01)
    if up_count == 4:
        wait_for(lambda: [path for path in state.glob("reports/*.json") if path.read_text().endswith("\n")])
        (path,) = (state / "reports").iterdir()
        report = json.loads(path.read_text())
        assert (report["name"], report["state"], report["cleanliness"]) == (Path(server[0]).name, "lost", "dirty")
        assert sum(error["text"].endswith(" had to be killed") for error in report["errors"]) == 2


def can_make_namespaces() -> bool:
    return os.geteuid() == 0 and shutil.which("unshare") is not None


@pytest.mark.skipif(not can_make_namespaces(), reason="makes a namespace for process ids")
def test_as_the_first_process_it_waits_for_orphans() -> None:
    """A container without an init has zombies otherwise."""
    look = "cat /proc/[0-9]*/stat | cut -d ' ' -f 3 | grep -c Z"
    script = f"for i in 1 2 3; do (sh -c 'sleep 0.01' &) ; done; sleep 0.3; {look}; true"
    words = ["unshare", "--pid", "--fork", "--mount-proc", *EXEC, "sh", "-c", script]
    done = subprocess.run(words, capture_output=True, text=True, timeout=60)
    assert (done.stdout, done.returncode) == ("0\n", 0), done.stderr


def test_without_a_guardian_the_command_does_not_begin(tmp_path: Path) -> None:
    """The folder of the runs is a link, so somebody else could read and write there."""
    (tmp_path / "other").mkdir()
    (tmp_path / f"sage-{os.geteuid()}").symlink_to(tmp_path / "other")
    done = ran("echo", "begun", env={**os.environ, "TMPDIR": str(tmp_path)})
    assert (done.returncode, done.stdout) == (125, "")
    assert done.stderr.startswith("sage exec: ")
    assert "is a link" in done.stderr


# --- the block of a program -------------------------------------------------------------------------------------------


def test_a_block_ends_what_began_in_it_and_nothing_else() -> None:
    sleep = ["sleep", "60"]
    with killed_at_the_end(sleep) as before:
        with sage.supervised("helpers") as block:
            inside = subprocess.Popen(sleep, start_new_session=True)
        assert inside.wait(WAIT_S) == -signal.SIGTERM
        assert block.ended == (f"process {inside.pid} (sleep 60)",)
        assert (block.killed, block.left) == ((), ())
        assert is_alive(process(before.pid) or Process(0, 0))
    assert "SAGE_COOKIE" not in os.environ or "helpers" not in os.environ["SAGE_COOKIE"]


def test_blocks_stand_in_each_other() -> None:
    with sage.supervised("outer") as outer:
        first = subprocess.Popen(["sleep", "60"])
        with sage.supervised("inner") as inner:
            second = subprocess.Popen(["sleep", "60"])
        assert second.wait(WAIT_S) == -signal.SIGTERM
        assert first.poll() is None
    first.wait(WAIT_S)
    assert [len(inner.ended), len(outer.ended)] == [1, 1]


def test_an_interrupt_while_a_block_ends_kills_what_is_left() -> None:
    deaf = "import os, signal; signal.signal(15, lambda *_: print('asked', flush=True)); print(os.getpid(), flush=True)"
    program = f"""
import subprocess, sys, sage
with sage.supervised("helpers", grace_s=60.0):
    subprocess.Popen([sys.executable, "-c", {deaf + chr(10) + "while True: signal.pause()"!r}])
    sys.stdin.readline()
"""
    pipe = subprocess.PIPE
    with killed_at_the_end([sys.executable, "-c", program], stdin=pipe, stdout=pipe, stderr=pipe) as running:
        assert running.stdin is not None
        assert running.stdout is not None
        inside = process(int(running.stdout.readline()))
        assert inside is not None
        running.stdin.close()
        assert running.stdout.readline() == b"asked\n"
        running.send_signal(signal.SIGINT)
        assert running.wait(WAIT_S) == -signal.SIGINT
    assert not is_alive(inside)


def test_a_block_that_raises_ends_its_processes_too() -> None:
    started: list[subprocess.Popen[bytes]] = []

    def fails() -> None:
        with sage.supervised("helpers"):
            started.append(subprocess.Popen(["sleep", "60"]))
            raise ValueError("mistake")

    with pytest.raises(ValueError, match="mistake"):
        fails()
    assert started[0].wait(WAIT_S) == -signal.SIGTERM
