"""What goes wrong around a job: crashes in C, no memory, no descriptors, strange homes and masks, errors that lie."""

from __future__ import annotations

import ctypes
import os
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

import pytest
from support.recording_services import report_of

from sage import BaseService, FunctionError, JobErrorGroup, LocalEnvironment, ServiceOptions

SAGE = Path(__file__).parents[2] / "src" / "sage"
STAMPS = {
    "checkpoint_store.py",
    "after_driver_death.py",
    "guardian.py",
    "job.py",
    "job_journal.py",
    "kept_cluster.py",
    "outcome.py",
    "supervisor.py",
}
"""Where a moment of the calendar is written down, beside the clock that never jumps."""

AGES = {"run_folder.py", "backend.py"}
"""Where the age of a folder without a driver is asked for, or of a value from an earlier run: the calendar has it."""


class Marked(BaseService):
    """Writes a line when it is cleaned up."""

    def __init__(self, marks: Path) -> None:
        self.marks = marks

    def cleanup(self) -> None:
        with self.marks.open("a", encoding="utf-8") as file:
            file.write("cleaned\n")


class Crashing(Marked):
    """Reads from nowhere when it is called."""

    def process(self, _: Any) -> bytes:
        return ctypes.string_at(0)


def test_a_crash_in_c_is_named_by_its_signal(tmp_path: Path) -> None:
    """Only the process of the service dies, and the other service is cleaned up."""
    env = LocalEnvironment("crash")
    env.register_service("marked", Marked, tmp_path / "marks")
    crashing = env.register_service("crashing", Crashing, tmp_path / "lost", options=ServiceOptions(host="process"))
    env.from_batch([1]).map(crashing.process).sink(lambda _: None)
    with pytest.raises(
        JobErrorGroup, match=r'service "crashing" ended by itself: its process \d+ was ended by SIGSEGV'
    ):
        env.submit(autostop=True)
    assert {service.name: service.state for service in report_of(env).services} == {
        "marked": "stopped",
        "crashing": "lost",
    }
    assert (tmp_path / "marks").read_text() == "cleaned\n"
    assert not (tmp_path / "lost").exists()


def too_deep(number: int) -> int:
    return too_deep(number + 1)


def too_large(_: int) -> bytearray:
    return bytearray(1 << 60)


class Lying(Exception):
    """Cannot say what it is about."""

    def __str__(self) -> str:
        raise RuntimeError("no text")


def lies(_: int) -> int:
    raise Lying


@pytest.mark.parametrize(
    ("function", "text"),
    [(too_deep, "RecursionError"), (too_large, "MemoryError"), (lies, "Lying: <its str raised RuntimeError>")],
)
@pytest.mark.parametrize("host", ["inline", "process"])
def test_an_error_that_is_hard_to_handle_is_an_error_like_others(
    function: Any, text: str, host: str, tmp_path: Path
) -> None:
    """In a function and in a process of its own."""
    env = LocalEnvironment("hard")
    options = ServiceOptions(host="process" if host == "process" else "inline")
    env.register_service("marked", Marked, tmp_path / "marks")
    hard = env.register_service("hard", Hard, function, options=options)
    env.from_batch([1]).map(hard.process).sink(lambda _: None)
    with pytest.raises(FunctionError) as caught:
        env.submit(autostop=True)
    assert text in str(caught.value)
    assert report_of(env).cleanliness == "clean"
    assert (tmp_path / "marks").read_text() == "cleaned\n"


class Hard:
    """Calls a function for each record."""

    def __init__(self, function: Any) -> None:
        self.function = function

    def process(self, record: int) -> Any:
        return self.function(record)


NO_DESCRIPTORS = """
    import os, resource
    from sage import LocalEnvironment, ServiceOptions

    class Marked:
        def cleanup(self):
            os.write(1, b"cleaned\\n")

    taken = []

    def take_all(record):
        resource.setrlimit(resource.RLIMIT_NOFILE, (64, 64))
        while True:
            taken.append(os.open("/dev/null", os.O_RDONLY))

    if __name__ == "__main__":
        env = LocalEnvironment("taken")
        env.register_service("near", Marked)
        env.register_service("apart", Marked, options=ServiceOptions(host="process"))
        env.from_batch([1]).map(take_all).sink(print)
        env.submit(autostop=True)
"""

STRANGE = """
    import os
    from sage import LocalEnvironment, ServiceOptions

    class Marked:
        def cleanup(self):
            os.write(1, b"cleaned\\n")

    if __name__ == "__main__":
        os.umask(0o777)
        env = LocalEnvironment("strange")
        env.register_service("apart", Marked, options=ServiceOptions(host="process"))
        env.from_batch([1]).sink(lambda _: None)
        env.submit(autostop=True)
"""


LOOKING = """
    import threading

    marks = []
    lock = threading.Lock()

    class Looking:
        def process(self, record):
            return marks, lock.locked()
"""

FORKING = """
    import multiprocessing, threading
    import looking
    from sage import LocalEnvironment, ServiceOptions

    if __name__ == "__main__":
        multiprocessing.set_start_method("fork")
        holder = threading.Thread(target=looking.lock.acquire)
        holder.start()
        holder.join()
        looking.marks.append("of the driver")
        env = LocalEnvironment("forking")
        service = env.register_service("service", looking.Looking, options=ServiceOptions(host="process"))
        env.from_batch([1]).map(service).sink(lambda seen: print(*seen))
        env.submit(autostop=True)
"""


def run(text: str, folder: Path, **variables: str) -> subprocess.CompletedProcess[str]:
    """Run a program without a terminal."""
    program = folder / "program.py"
    program.write_text(textwrap.dedent(text))
    environment = {**os.environ, "PYTHONPATH": str(SAGE.parent), "TMPDIR": str(folder), **variables}
    return subprocess.run(
        [sys.executable, str(program)], env=environment, capture_output=True, text=True, stdin=subprocess.DEVNULL
    )


def test_without_descriptors_everything_is_cleaned_all_the_same(tmp_path: Path) -> None:
    """The function takes all that there are, and fails; the stop gets by with what it has."""
    done = run(NO_DESCRIPTORS, tmp_path)
    assert done.stdout == "cleaned\n" * 2, done.stderr
    assert done.returncode == 1
    assert "Too many open files" in done.stderr


def test_without_a_home_and_with_a_strange_mask(tmp_path: Path) -> None:
    """No home, no terminal, and files that nobody may read."""
    done = run(STRANGE, tmp_path, HOME="/nonexistent", XDG_STATE_HOME="/proc/nowhere")
    assert (done.returncode, done.stdout, done.stderr) == (0, "cleaned\n", "")


def test_no_process_is_forked_from_a_program_with_threads(tmp_path: Path) -> None:
    """Whatever `multiprocessing` is told, the process of a service is a new interpreter."""
    (tmp_path / "looking.py").write_text(textwrap.dedent(LOOKING))
    done = run(FORKING, tmp_path)
    assert (done.returncode, done.stdout, done.stderr) == (0, "[] False\n", "")


def test_no_bound_looks_at_the_calendar() -> None:
    """A clock that is set an hour back or forward moves no deadline."""
    folders = [SAGE / name for name in ("_runtime", "_hosts", "_backends")]
    found = {
        path.name for folder in folders for path in folder.glob("*.py") if "time.time()" in path.read_text("utf-8")
    }
    assert found - STAMPS - AGES == set()
