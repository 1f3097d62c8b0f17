"""Services that outlive their job: for a time, and longer than the thread that started them."""

from __future__ import annotations

import logging
import random
import subprocess
import sys
import textwrap
import threading
from typing import TYPE_CHECKING, Any

import pytest
from support.recording_services import Notes, Numbered, report_of

from sage import GraphError, Line, LocalEnvironment, ServiceOptions, ServiceUnavailableError
from sage._processes import process
from sage.testing import assert_clean

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

HOUR_S = 3600.0
SOON_S = 20.0

WAITING = "import signal; print('up', flush=True); signal.pause()"


@pytest.fixture
def notes(tmp_path: Path) -> Notes:
    return Notes(tmp_path / "notes")


def expiry() -> threading.Thread | None:
    """Return the thread that waits for the end of what is kept."""
    return next((thread for thread in threading.enumerate() if thread.name.startswith("sage-keep")), None)


def expired() -> None:
    """Wait until what is kept for a short time has ended."""
    waiting = expiry()
    if waiting is not None:
        waiting.join(SOON_S)
        assert not waiting.is_alive()


@pytest.mark.parametrize("host", ["inline", "process"])
def test_what_is_kept_for_a_time_ends_by_itself(host: Any, notes: Notes) -> None:
    """Once; the next job builds it anew."""
    env = LocalEnvironment("short")
    memory = env.register_service("memory", Numbered, notes, options=ServiceOptions(host=host))
    env.from_batch([1]).map(memory).sink(abs)
    for number in (1, 2):
        env.submit(autostop=True, keep_services=True, keep_s=0.05)
        assert report_of(env).service("memory").state == "kept"
        expired()
        assert notes[-3:] == [f"memory.{hook} {number}" for hook in ("build", "stop", "cleanup")]
        with pytest.raises(ServiceUnavailableError):
            memory.process(1)
    env.close()
    assert len(notes) == 6
    assert_clean()


def test_a_command_that_is_kept_for_a_time_ends_by_itself() -> None:
    """With its process."""
    pids: list[int] = []
    env = LocalEnvironment("short")
    command = env.register_command("command", [sys.executable, "-c", WAITING], ready=Line("up"))
    env.from_batch([1]).sink(lambda _: pids.append(command.pid))
    env.submit(autostop=True, keep_services=True, keep_s=0.05)
    expired()
    assert process(pids[0]) is None
    assert_clean()


def test_a_job_and_a_close_come_before_the_time_is_over(notes: Notes) -> None:
    """The time begins anew after each job, and nothing waits for it any more after `close`."""
    env = LocalEnvironment("long")
    memory = env.register_service("memory", Numbered, notes)
    env.from_batch([1]).map(memory).sink(abs)
    env.submit(autostop=True, keep_services=True, keep_s=HOUR_S)
    first = expiry()
    assert first is not None
    env.submit(autostop=True)
    first.join(SOON_S)  # it was told to end, which takes a moment
    second = expiry()
    assert first is not second is not None
    assert report_of(env).service("memory").state == "kept"
    assert notes == ["memory.build 1"]
    env.close()
    assert notes == ["memory.build 1", "memory.stop 1", "memory.cleanup 1"]
    assert second is not None
    second.join(SOON_S)
    assert expiry() is None
    assert_clean()


def test_a_job_that_comes_as_the_time_is_over_has_the_old_one_or_a_new_one(notes: Notes) -> None:
    """At whatever moment; each instance ends once, and before the next one begins."""
    moments = random.Random(119)
    env = LocalEnvironment("near")
    memory = env.register_service("memory", Numbered, notes)
    arrived: list[int] = []
    env.from_batch([1]).map(memory).sink(arrived.append)
    for _ in range(60):
        env.submit(autostop=True, keep_services=True, keep_s=moments.uniform(1e-6, 2e-3))
        waiting = expiry()
        if waiting is not None:
            waiting.join(moments.uniform(0, 2e-3))
    env.close()
    assert arrived == [1] * 60
    built = len(notes) // 3
    assert notes == [f"memory.{hook} {n}" for n in range(1, built + 1) for hook in ("build", "stop", "cleanup")]
    assert_clean()


def test_an_error_of_such_an_end_is_logged_and_fails_nothing(notes: Notes, caplog: pytest.LogCaptureFixture) -> None:
    """Nobody is there to be told; the next job is another matter."""

    class Broken(Numbered):
        def cleanup(self) -> None:
            raise OSError("disk is full")

    env = LocalEnvironment("broken")
    memory = env.register_service("memory", Broken, notes)
    env.from_batch([1]).map(memory).sink(abs)
    with caplog.at_level(logging.ERROR, "sage"):
        env.submit(autostop=True, keep_services=True, keep_s=0.05)
        expired()
    assert 'service "memory" failed in cleanup: OSError: disk is full' in caplog.text
    env.submit(autostop=True, keep_services=True)
    assert notes[-1] == "memory.build 2"
    with pytest.raises(Exception, match="disk is full"):
        env.close()


NO_THREAD = """
    import threading
    from sage import LocalEnvironment

    class Marked:
        def cleanup(self):
            print("cleaned")

    def no_timer(timer):
        raise RuntimeError("can't start new thread")

    env = LocalEnvironment("full")
    env.register_service("marked", Marked)
    env.from_batch([1]).sink(abs)
    threading.Timer.start = no_timer
    env.submit(autostop=True, keep_services=True, keep_s=1.0)
    print("kept")
    env.close()
"""


def test_where_no_thread_can_wait_it_is_kept_until_the_environment_is_closed(tmp_path: Path) -> None:
    """The job that ends is none the worse for it."""
    program = tmp_path / "program.py"
    program.write_text(textwrap.dedent(NO_THREAD))
    done = subprocess.run([sys.executable, str(program)], capture_output=True, text=True, timeout=60, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (0, "kept\ncleaned\n", "")


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"keep_services": True, "keep_s": 0}, "keep_s is 0"),
        ({"keep_services": True, "keep_s": "long"}, "keep_s is 'long'"),
        ({"keep_s": 1.0}, "keep_s is 1.0, but no service is kept"),
    ],
)
def test_a_time_that_cannot_work_is_refused(given: dict[str, Any], message: str, notes: Notes) -> None:
    env = LocalEnvironment("refused")
    env.register_service("memory", Numbered, notes)
    env.from_batch([1]).sink(abs)
    with pytest.raises(GraphError, match=message):
        env.submit(autostop=True, **given)
    assert notes == []


@pytest.mark.parametrize("kind", ["process", "command"])
def test_a_process_outlives_the_thread_that_submitted_its_job(kind: str, notes: Notes) -> None:
    """It ends with its job or its environment, whatever becomes of the thread that started it."""
    env = LocalEnvironment("threads")
    if kind == "command":
        service: Any = env.register_command("service", [sys.executable, "-c", WAITING], ready=Line("up"))
        call: Callable[[int], Any] = lambda _: service.pid  # noqa: E731
    else:
        service = env.register_service("service", Numbered, notes, options=ServiceOptions(host="process"))
        call = service
    env.from_batch([1]).map(call).sink(id)

    def submit() -> None:
        env.submit(autostop=True, keep_services=True)

    pids = []
    for _ in range(2):
        submitting = threading.Thread(target=submit)
        submitting.start()
        submitting.join(SOON_S)
        assert not submitting.is_alive()
        pid = report_of(env).service("service").pid
        assert pid is not None
        assert process(pid) is not None
        pids.append(pid)
    assert pids[0] == pids[1]
    env.close()
    assert process(pids[0]) is None
    assert_clean()
