"""A machine that gives nothing more: no memory, no threads and processes, no writes, hardly any time."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import textwrap
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from support.recording_services import report_of

from sage import BaseService, JobErrorGroup, LocalEnvironment, ServiceOptions

SOURCES = Path(__file__).parents[2] / "src"
GROUPS = Path("/sys/fs/cgroup")
WAIT_S = 60.0


class Greedy(BaseService):
    """Moves into a control group, takes all the memory that there is in it, and more."""

    def __init__(self, group: str, marks: str) -> None:
        self.marks = marks
        Path(group, "cgroup.procs").write_text(str(os.getpid()))

    def process(self, _: Any) -> int:
        return len(bytearray(os.urandom(1 << 20)) * (1 << 10))

    def cleanup(self) -> None:
        Path(self.marks).touch()


@pytest.fixture
def group(kind: str) -> Iterator[Path]:
    """Return a control group of a kind."""
    group = GROUPS / kind / f"sage-test-{os.getpid()}"
    try:
        group.mkdir()
    except OSError as error:
        pytest.skip(f"no control group can be made: {error}")
    yield group
    # The kernel lets go of a process a moment after its end was told.
    done = threading.Event()
    for _ in range(100):
        try:
            group.rmdir()
            return
        except OSError:
            done.wait(0.05)
    group.rmdir()


@pytest.mark.parametrize("kind", ["memory"])
def test_a_service_that_the_system_kills_for_its_memory(group: Path, tmp_path: Path) -> None:
    """A death like others, whose error says what may have happened."""
    (group / "memory.limit_in_bytes").write_text(str(100 << 20))
    env = LocalEnvironment("greedy")
    options = ServiceOptions(host="process")
    greedy = env.register_service("greedy", Greedy, str(group), str(tmp_path / "cleaned"), options=options)
    env.from_batch([1]).map(greedy.process).sink(lambda _: None)
    with pytest.raises(JobErrorGroup, match=r"its process \d+ was ended by SIGKILL") as caught:
        env.submit(autostop=True)
    assert report_of(env).service("greedy").state == "lost"
    (error,) = caught.value.exceptions
    assert "memory" in "\n".join(error.__notes__)
    assert not (tmp_path / "cleaned").exists()


NO_THREADS = """
    import os, resource, sys, threading
    from pathlib import Path
    from sage import LocalEnvironment, ServiceOptions

    class Marked:
        def stop(self):
            os.write(1, b"stopped\\n")
        def cleanup(self):
            os.write(1, b"cleaned\\n")

    def forbid(record):
        if os.geteuid():
            resource.setrlimit(resource.RLIMIT_NPROC, (0, 0))
        else:  # whom limits of a user do not bind
            Path(sys.argv[1], "pids.max").write_text("1")
        try:
            threading.Thread(target=print).start()
        except RuntimeError:
            os.write(1, b"no thread\\n")
        return record

    if __name__ == "__main__":
        if not os.geteuid():
            Path(sys.argv[1], "cgroup.procs").write_text(str(os.getpid()))
        env = LocalEnvironment("nothing more")
        env.register_service("near", Marked)
        env.register_service("apart", Marked, options=ServiceOptions(host="process"))
        env.from_batch([1]).map(forbid).sink(lambda _: None)
        env.submit(autostop=True)
        os.write(1, b"returned\\n")
"""


def run(words: list[str], folder: Path, text: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Run a program, behind some words of its command."""
    program = folder / "program.py"
    program.write_text(textwrap.dedent(text))
    environment = {**os.environ, "PYTHONPATH": str(SOURCES), "TMPDIR": str(folder), "SAGE_STATE_DIR": str(folder)}
    return subprocess.run(
        [*words, sys.executable, str(program), *arguments],
        env=environment,
        capture_output=True,
        text=True,
        stdin=subprocess.DEVNULL,
        timeout=WAIT_S,
    )


@pytest.mark.parametrize("kind", ["pids"])
def test_a_stop_needs_no_new_thread_and_no_new_process(
    kind: str, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    """Neither can be started from the record on, and everything ends as ever."""
    group = "" if os.geteuid() else str(request.getfixturevalue("group"))
    done = run([], tmp_path, NO_THREADS, group)
    assert done.stdout.splitlines() == ["no thread", *["stopped", "cleaned"] * 2, "returned"], done.stderr
    assert (done.returncode, done.stderr) == (0, "")


WRITES_FAIL = """
    import os
    from sage import LocalEnvironment, ServiceOptions

    class Marked:
        def cleanup(self):
            os.write(1, b"cleaned\\n")

    if __name__ == "__main__":
        env = LocalEnvironment("broken disk")
        env.register_service("near", Marked)
        env.register_service("apart", Marked, options=ServiceOptions(host="process"))
        env.from_batch([1]).sink(lambda _: None)
        env.submit(autostop=True)
"""


@pytest.mark.skipif(shutil.which("strace") is None, reason="strace is not installed")
def test_a_disk_that_cannot_be_written_changes_nothing(tmp_path: Path) -> None:
    """Each fsync fails with EIO, so that the journal is of no use."""
    trace = tmp_path / "trace"
    words = ["strace", "-f", "-o", str(trace), "-e", "trace=fsync", "-e", "inject=fsync:error=EIO"]
    done = run(words, tmp_path, WRITES_FAIL)
    if "PTRACE" in done.stderr or "ptrace" in done.stderr:
        pytest.skip(f"nothing can be traced here: {done.stderr}")
    assert done.stdout == "cleaned\n" * 2, done.stderr
    assert done.returncode == 0
    assert "EIO (Input/output error) (INJECTED)" in trace.read_text()
    assert list(tmp_path.glob("sage-*/*")) == []


class Watched(BaseService):
    """Counts how often its health was looked at."""

    def __init__(self) -> None:
        self.count = 0

    def where(self) -> int:
        return os.getpid()

    def looks(self) -> int:
        return self.count

    def health(self) -> None:
        self.count += 1


def test_a_service_that_hardly_gets_to_run_is_not_taken_for_sick() -> None:
    """Its process stands still nine tenths of the time, as on a machine that is too small."""
    env = LocalEnvironment("slow machine")
    options = ServiceOptions(host="process", health_interval_s=0.01, restart="on_failure")
    watched = env.register_service("watched", Watched, options=options)

    def hinder(_: int) -> int:
        pid, pause = watched.where(), threading.Event()
        try:
            while watched.looks() < 10:
                os.kill(pid, signal.SIGSTOP)
                pause.wait(0.18)
                os.kill(pid, signal.SIGCONT)
                pause.wait(0.02)
        finally:
            os.kill(pid, signal.SIGCONT)
        return int(watched.looks())

    looks: list[int] = []
    env.from_batch([1]).map(hinder).sink(looks.append)
    env.submit(autostop=True)
    assert looks >= [10]
    assert (report_of(env).cleanliness, report_of(env).service("watched").restarts) == ("clean", 0)
