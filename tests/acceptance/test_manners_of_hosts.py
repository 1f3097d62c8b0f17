"""The manners of a program whose services have processes of their own, or are commands."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest

import sage
from sage._processes import process

WAIT_S = 60.0

PROGRAM = """
    import os, sys, threading
    from sage import BaseService, Line, LocalEnvironment, ServiceOptions

    STORE = '''
    import os, signal, sys
    def stop(*_):
        with open("marks", "a") as marks:
            marks.write("store stopped" + chr(10))
        sys.exit(0)
    signal.signal(signal.SIGTERM, stop)
    print("up", flush=True)
    while True:
        signal.pause()
    '''

    class Memory(BaseService):
        def __init__(self, store):
            pass
        def where(self, _):
            return os.getpid()
        def cleanup(self):
            with open("marks", "a") as marks:
                marks.write("memory cleaned\\n")

    def build():
        import textwrap
        env = LocalEnvironment("manners")
        store = env.register_command("store", [sys.executable, "-c", textwrap.dedent(STORE)], ready=Line("up"))
        memory = env.register_service("memory", Memory, store, options=ServiceOptions(host="process"))
        return env, store, memory

    def endless(env, store, memory):
        sent = []
        def read():
            first = not sent
            sent.append(1)
            return 1 if first else None
        is_up = threading.Event()
        def tell(pid):
            print("up", pid, store.pid, flush=True)
            is_up.set()
        env.from_source(read).map(memory.where).sink(tell)
        return is_up
"""

IN_ORDER = ["memory cleaned", "store stopped"]


@contextmanager
def program(folder: Path, body: str) -> Iterator[subprocess.Popen[str]]:
    """Run a program in a folder of its own."""
    folder.mkdir()
    (folder / "program.py").write_text(textwrap.dedent(PROGRAM) + textwrap.dedent(body))
    environment = {**os.environ, "PYTHONPATH": str(Path(sage.__file__).parents[1]), "SAGE_STATE_DIR": str(folder)}
    pipes = subprocess.PIPE
    words = [sys.executable, str(folder / "program.py")]
    with subprocess.Popen(
        words, cwd=folder, env=environment, stdin=pipes, stdout=pipes, stderr=pipes, text=True
    ) as running:
        try:
            yield running
        finally:
            running.kill()


def marks(folder: Path) -> list[str]:
    return (folder / "marks").read_text().splitlines()


def pids(running: subprocess.Popen[str]) -> list[int]:
    """Wait until the program runs, and return the processes of its services."""
    assert running.stdout is not None
    up, *found = running.stdout.readline().split()
    assert up == "up"
    return [int(pid) for pid in found]


@pytest.mark.parametrize(("signum", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_ends_processes_and_commands_in_order(signum: int, code: int, tmp_path: Path) -> None:
    """Each is ended once, and the exit code is that of the signal."""
    body = """
    if __name__ == "__main__":
        made = build()
        endless(*made)
        made[0].submit(autostop=True)
    """
    with program(tmp_path / "run", body) as running:
        found = pids(running)
        running.send_signal(signum)
        running.communicate(timeout=WAIT_S)
    # Python ends a program by the signal itself, which a shell shows as 128 and its number.
    assert running.returncode in (code, -signum)
    assert marks(tmp_path / "run") == IN_ORDER
    assert [process(pid) for pid in found] == [None, None]


def test_what_runs_at_exit_is_ended_in_order(tmp_path: Path) -> None:
    """Without autostop, the interpreter's exit ends the job, with a warning."""
    body = """
    if __name__ == "__main__":
        made = build()
        is_up = endless(*made)
        made[0].submit()
        is_up.wait()
    """
    with program(tmp_path / "run", body) as running:
        found = pids(running)
        _, errors = running.communicate(timeout=WAIT_S)
    assert running.returncode == 0
    assert "RuntimeWarning" in errors
    assert "Traceback" not in errors
    assert marks(tmp_path / "run") == IN_ORDER
    assert [process(pid) for pid in found] == [None, None]


def test_two_programs_at_once_print_nothing_and_have_their_own(tmp_path: Path) -> None:
    """On another thread than the main one, each with its own processes and its own guardian."""
    body = """
    def work():
        env, store, memory = build()
        def meet(_):
            print("up", memory.where(0), store.pid, flush=True)
            return sys.stdin.readline().strip()
        seen = []
        env.from_batch([1]).map(meet).sink(seen.append)
        env.submit(autostop=True)
        assert seen == ["go on"], seen

    if __name__ == "__main__":
        thread = threading.Thread(target=work)
        thread.start()
        thread.join()
    """
    folders = [tmp_path / "a", tmp_path / "b"]
    with ExitStack() as stack:
        both = [stack.enter_context(program(folder, body)) for folder in folders]
        found = [pids(running) for running in both]
        assert len({pid for own in found for pid in own}) == 4
        outputs = [running.communicate("go on\n", timeout=WAIT_S) for running in both]
    assert outputs == [("", "")] * 2
    assert [running.returncode for running in both] == [0, 0]
    assert [marks(folder) for folder in folders] == [IN_ORDER] * 2
