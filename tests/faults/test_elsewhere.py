"""What hangs or waits somewhere else than in a hook or a call: in C, in a finalizer, in a log handler, in a connect."""

from __future__ import annotations

import hashlib
import logging
import os
import socket
import subprocess
import sys
import threading
import time
from typing import TYPE_CHECKING, Any

import pytest
from support.recording_services import Notes, report_of

from sage import (
    BaseService,
    FunctionError,
    JobErrorGroup,
    LocalEnvironment,
    Outcome,
    ServiceOptions,
    SourceFunction,
    StopSignal,
)
from sage._logs import LogThread
from sage.testing import StepBackend, assert_clean

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

SOON_S = 20.0
HOUR_S = 3600.0
GAP_S = 600.0


class Marked(BaseService):
    """Notes its calls and its cleanup."""

    def __init__(self, notes: Notes) -> None:
        self.notes = notes

    def process(self, record: Any) -> Any:
        return record

    def cleanup(self) -> None:
        self.notes.append("cleaned")


@pytest.fixture
def notes(tmp_path: Path) -> Notes:
    return Notes(tmp_path / "notes")


class Quiet(SourceFunction):
    """Says that it has nothing for ten minutes before each record."""

    def __init__(self, now: Callable[[], float]) -> None:
        self.now = now
        self.next_at = now() + GAP_S
        self.given = 0

    def execute(self) -> Any:
        if self.given == 3:
            return StopSignal("over")
        if self.now() < self.next_at:
            return None
        self.given += 1
        self.next_at += GAP_S
        return self.given


def test_a_long_gap_ends_nothing(notes: Notes) -> None:
    """Nothing looks at how long it was quiet."""
    backend = StepBackend(0)
    env = LocalEnvironment("gap", backend=lambda: backend)
    marked = env.register_service("marked", Marked, notes)
    arrived: list[int] = []
    env.from_source(Quiet, backend.now).map(marked.process).sink(arrived.append)
    env.submit(autostop=True)
    assert arrived == [1, 2, 3]
    assert backend.now() > 1000 + 3 * GAP_S
    assert notes == ["cleaned"]


def test_a_last_record_of_an_hour_is_waited_for(notes: Notes) -> None:
    """A natural end has no bound."""
    import asyncio

    async def slow(record: int) -> int:
        await asyncio.sleep(HOUR_S)
        return record

    backend = StepBackend(0)
    env = LocalEnvironment("long", backend=lambda: backend)
    marked = env.register_service("marked", Marked, notes)
    arrived: list[int] = []
    env.from_batch([1]).map_async(slow).map(marked.process).sink(arrived.append)
    env.submit(autostop=True)
    assert arrived == [1]
    assert report_of(env).cleanliness == "clean"
    assert notes == ["cleaned"]


def test_a_consumer_that_fails_frees_who_waits_for_it() -> None:
    """Every source finds the channel full, and closes all the same."""
    env = LocalEnvironment("full")
    is_known = threading.Event()
    closed: list[int] = []

    class Fast(SourceFunction):
        def execute(self) -> int:
            return 1

        def close(self) -> None:
            closed.append(self.ctx.parallel_index)

    def fails_once_it_is_full(_: int) -> None:
        assert is_known.wait(SOON_S)
        (inbox,) = (task.inbox for task in job.dispatcher.supervisor.tasks.values() if task.inbox is not None)
        while inbox.fill < 1:
            os.sched_yield()
        raise OSError("nobody takes records any more")

    env.from_source(Fast, parallelism=3).sink(fails_once_it_is_full)
    job = env.submit()
    is_known.set()
    with pytest.raises(FunctionError, match="nobody takes records any more"):
        job.wait(SOON_S)
    assert sorted(closed) == [0, 1, 2]
    assert_clean()


def test_work_in_c_keeps_no_stop_from_being_noticed(notes: Notes) -> None:
    """The stop is noticed at once, and the job ends when the function comes back."""
    began, over_at = threading.Event(), list[float]()

    def grind(record: int) -> int:
        began.set()
        hashlib.pbkdf2_hmac("sha256", b"secret", b"salt", 3_000_000)
        over_at.append(time.time())
        return record

    env = LocalEnvironment("grind")
    env.register_service("marked", Marked, notes)
    env.from_batch([1, 2]).map(grind).sink(lambda _: None)
    job = env.submit()
    assert began.wait(SOON_S)
    asked_at = time.time()
    job.cancel()
    noticed_at = next(event.at for event in job.events() if event.subject == "job" and event.at >= asked_at)
    assert noticed_at < asked_at + 0.5
    assert noticed_at < over_at[0]
    assert len(over_at) == 1
    assert job.wait().state is Outcome.CANCELLED
    assert notes == ["cleaned"]


class Clinging(Marked):
    """Hangs when it is let go of."""

    def __del__(self) -> None:
        threading.Event().wait()


def test_a_finalizer_that_hangs_ends_with_its_process(notes: Notes) -> None:
    """The cleanup was before it, and nothing waits for it."""
    env = LocalEnvironment("clinging")
    clinging = env.register_service("clinging", Clinging, notes, options=ServiceOptions(host="process"))
    env.from_batch([1]).map(clinging.process).sink(lambda _: None)
    with assert_clean():
        env.submit(autostop=True)
    assert notes == ["cleaned"]
    assert report_of(env).service("clinging").state == "stopped"


@pytest.fixture
def deaf() -> Iterator[tuple[str, int]]:
    """Return the address of a server that answers no connect: its queue is full."""
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        server.listen(0)
        waiting = []
        for _ in range(4):
            client = socket.socket()
            client.setblocking(False)
            client.connect_ex(server.getsockname())
            waiting.append(client)
        yield server.getsockname()
        for client in waiting:
            client.close()


class Connecting(Marked):
    """Connects to a server in its cleanup, to say goodbye."""

    def __init__(self, notes: Notes, address: tuple[str, int]) -> None:
        super().__init__(notes)
        self.address = address

    def cleanup(self) -> None:
        with socket.create_connection(self.address):
            self.notes.append("connected")


@pytest.mark.parametrize(("host", "state"), [("inline", "abandoned"), ("process", "killed")])
def test_a_connect_that_hangs_has_the_bound_of_its_hook(
    notes: Notes, deaf: tuple[str, int], host: Any, state: str
) -> None:
    """It is given up, and the other service is cleaned up."""
    env = LocalEnvironment("connecting")
    options = ServiceOptions(host=host, stop_timeout_s=0.3, kill_grace_s=0.3)
    env.register_service("marked", Marked, notes)
    env.register_service("connecting", Connecting, notes, deaf, options=options)
    env.from_batch([1]).sink(lambda _: None)
    with pytest.raises(JobErrorGroup, match='service "connecting" did not end its cleanup'):
        env.submit(autostop=True)
    assert {service.name: service.state for service in report_of(env).services} == {
        "marked": "stopped",
        "connecting": state,
    }
    assert notes == ["cleaned"]


# --- log handlers -----------------------------------------------------------------------------------------------------


class Blocking(logging.Handler):
    """Is blocked by its first record until it is released, as by a pipe that nobody reads."""

    def __init__(self) -> None:
        super().__init__()
        self.is_blocked = threading.Event()
        self.released = threading.Event()
        self.texts: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.is_blocked.set()
        self.released.wait()
        self.texts.append(record.getMessage())


@pytest.fixture
def blocking() -> Iterator[Blocking]:
    """Return a handler of the program's own for everything that SAGE logs."""
    logger = logging.getLogger("sage")
    before, handler = logger.level, Blocking()
    logger.addHandler(handler)
    logger.setLevel(logging.DEBUG)
    yield handler
    handler.released.set()
    logger.removeHandler(handler)
    logger.setLevel(before)


def log_thread() -> threading.Thread:
    (thread,) = (thread for thread in threading.enumerate() if thread.name == "sage-log")
    return thread


@pytest.mark.parametrize("host", ["inline", "process"])
def test_a_log_handler_that_hangs_does_not_hang_the_job(notes: Notes, blocking: Blocking, host: Any) -> None:
    """The job ends as if nobody had logged; what was logged comes when the handler goes on."""
    env = LocalEnvironment("logged")
    marked = env.register_service("marked", Marked, notes, options=ServiceOptions(host=host))
    arrived: list[int] = []
    env.from_batch(range(100)).map(marked.process).sink(arrived.append)
    report = env.submit(autostop=True).wait()
    assert (report.state, report.cleanliness) == (Outcome.COMPLETED, "clean")
    assert arrived == list(range(100))
    assert notes == ["cleaned"]
    assert blocking.is_blocked.is_set()
    assert blocking.texts == []
    blocking.released.set()
    LocalEnvironment("next").from_batch([1]).sink(lambda _: None)
    log_thread().join(SOON_S)
    assert blocking.texts[0].startswith("job registered id=")
    assert blocking.texts[-1].startswith("sealed state=completed")


def test_no_thread_is_left_of_a_log_that_works(notes: Notes, caplog: pytest.LogCaptureFixture) -> None:
    """Everything that was logged is handled when the job is over."""
    caplog.set_level(logging.INFO, "sage")
    env = LocalEnvironment("logged")
    env.register_service("marked", Marked, notes)
    env.from_batch([1]).sink(lambda _: None)
    with assert_clean(within_s=0.0):
        env.submit(autostop=True)
    assert caplog.messages[-1].startswith("sealed state=completed")
    record = next(record for record in caplog.records if record.name == "sage.dispatcher")
    assert (record.filename, record.threadName) == ("supervisor.py", "sage-supervisor")


def test_what_does_not_fit_is_dropped_and_counted(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """A handler that is stuck costs whoever logs one wait, and not one for each record."""
    monkeypatch.setattr("sage._logs.RECORDS_MAX", 3)
    monkeypatch.setattr("sage._logs.PATIENCE_S", 0.05)
    logger, handler = logging.Logger("test"), Blocking()
    logger.addHandler(handler)
    thread = LogThread()
    thread.put(logger, logger.makeRecord("test", logging.INFO, "", 0, "0", (), None))
    assert handler.is_blocked.wait(SOON_S)
    for number in range(1, 10):
        thread.put(logger, logger.makeRecord("test", logging.INFO, "", 0, str(number), (), None))
    handler.released.set()
    log_thread().join(SOON_S)
    assert handler.texts == ["0", "1", "2", "3"]
    assert caplog.messages == ["log records dropped count=6"]


class Raising(logging.Handler):
    """Does not see to its own errors."""

    def __init__(self) -> None:
        super().__init__()
        self.texts: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.texts.append(record.getMessage())
        raise OSError("disk full")


def test_a_log_handler_that_raises_is_told_of_and_gets_the_next_record(capfd: pytest.CaptureFixture[str]) -> None:
    logger, handler, thread = logging.Logger("test"), Raising(), LogThread()
    logger.addHandler(handler)
    for text in ("0", "1"):
        thread.put(logger, logger.makeRecord("test", logging.INFO, "", 0, text, (), None))
        thread.flush()
    assert handler.texts == ["0", "1"]
    assert capfd.readouterr().err.count("OSError: disk full") == 2


def test_where_no_thread_can_be_started_whoever_logs_calls_the_handlers(tmp_path: Path) -> None:
    """With a log."""
    program = tmp_path / "program.py"
    program.write_text(
        "import logging, sys, threading\n"
        "from sage._logs import flush, log_of\n"
        "logging.basicConfig(stream=sys.stdout, level=logging.INFO, format='%(threadName)s %(message)s')\n"
        'def refuse(self): raise RuntimeError("can\'t start new thread")\n'
        "threading.Thread.start = refuse\n"
        "log = log_of('sage.test')\n"
        "log.info('first'); log.info('second'); flush()\n"
    )
    done = subprocess.run([sys.executable, str(program)], capture_output=True, text=True, timeout=SOON_S, check=True)
    assert done.stdout == "MainThread first\nMainThread second\n"


def test_a_process_that_was_forked_logs_too(tmp_path: Path) -> None:
    """The thread of the parent is not there, and its lock may have been held."""
    program = tmp_path / "program.py"
    program.write_text(
        "import logging, os, sys\n"
        "from sage._logs import flush, log_of\n"
        "logging.basicConfig(stream=sys.stdout, level=logging.INFO, format='%(message)s')\n"
        "log = log_of('sage.test')\n"
        "log.info('parent'); flush()\n"
        "log.info('parent')\n"
        "if os.fork() == 0:\n"
        "    log.info('child'); flush(); os._exit(0)\n"
        "os.wait()\n"
    )
    done = subprocess.run([sys.executable, str(program)], capture_output=True, text=True, timeout=SOON_S, check=True)
    assert sorted(done.stdout.split()) == ["child", "parent", "parent"]
