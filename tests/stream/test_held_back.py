"""Calls that a stop holds back: none of a costly function begins, those that run end, and what waited is counted."""

from __future__ import annotations

import asyncio
import os
import pty
import signal
import subprocess
import sys
import textwrap
import threading
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from sage import BaseService, LocalEnvironment, Outcome, Retry, ServiceOptions

if TYPE_CHECKING:
    from collections.abc import Callable

    from support.fair_clock import FairClock
    from support.recording_services import Notes

    from sage import DataStream, JobReport

CALL_S = 0.02
PARALLEL = 4
SOURCES = Path(__file__).parents[2] / "src"


class Paid:
    """Counts calls; `many` says that enough of them were made to know what they cost."""

    def __init__(self) -> None:
        self.begun = 0
        self.ended = 0
        self.many = threading.Event()
        self._lock = threading.Lock()

    def call(self, record: Any) -> Any:
        self._begin()
        time.sleep(CALL_S)
        self.ended += 1
        return record

    async def call_async(self, record: Any) -> Any:
        self._begin()
        await asyncio.sleep(CALL_S)
        self.ended += 1
        return record

    def _begin(self) -> None:
        with self._lock:
            self.begun += 1
        if self.begun > 6 * PARALLEL:
            self.many.set()


class Model(BaseService):
    """The same in a service."""

    def __init__(self, paid: Paid) -> None:
        self._paid = paid

    def ask(self, record: Any) -> Any:
        return self._paid.call(record)


def in_service(env: LocalEnvironment, stream: DataStream, paid: Paid) -> DataStream:
    model = env.register_service("model", Model, paid, options=ServiceOptions(concurrency=None))
    return stream.rebalance().map(lambda record: model.ask(record), parallelism=PARALLEL)


WAYS: dict[str, Callable[[LocalEnvironment, DataStream, Paid], DataStream]] = {
    "map_async": lambda _, stream, paid: stream.map_async(paid.call_async, concurrency=PARALLEL),
    "unordered": lambda _, stream, paid: stream.map_async(paid.call_async, concurrency=PARALLEL, ordered=False),
    "coroutine in map": lambda _, stream, paid: stream.map(paid.call_async),
    "map": lambda _, stream, paid: stream.map(lambda record: record).map(paid.call).map(lambda record: record),
    "service in map": in_service,
    "filter": lambda _, stream, paid: stream.filter(lambda record: paid.call(record) or True),
    "flatmap": lambda _, stream, paid: stream.flatmap(lambda record: [paid.call(record)]),
    "keyed": lambda _, stream, paid: stream.keyby(lambda record: record % 7).map(paid.call, parallelism=PARALLEL),
    "after cheap ones": lambda _, stream, paid: (
        stream.flatmap(lambda record: [record]).filter(lambda _: True).map(paid.call)
    ),
    "comap": lambda _, stream, paid: stream.connect(stream.filter(lambda _: False)).comap([paid.call, paid.call]),
    "map_batches": lambda _, stream, paid: stream.map_batches(lambda batch: paid.call(batch), max_records=3),
}


def stopped(
    build: Callable[[LocalEnvironment, DataStream], DataStream], paid: Paid
) -> tuple[JobReport, list[Any], int]:
    """Run 100,000 records, stop when enough calls were made, and return how many more began after that."""
    env = LocalEnvironment("paid")
    arrived: list[Any] = []
    build(env, env.from_batch(range(100_000))).sink(arrived.append)
    job = env.submit()
    assert paid.many.wait(30)
    begun = paid.begun
    env.stop()
    assert job.report is not None
    return job.report, arrived, paid.begun - begun


class ElsewhereModel(BaseService):
    """Pays for its calls in a process of its own."""

    def __init__(self, journal: Notes) -> None:
        self._journal = journal

    async def ask(self, record: int) -> int:
        self._journal.append(str(record))
        await asyncio.sleep(CALL_S)
        return record


def test_an_interrupt_begins_no_further_call_in_the_process_of_a_service(journal: Notes) -> None:
    env = LocalEnvironment("paid elsewhere")
    options = ServiceOptions(host="process", concurrency=PARALLEL)
    model = env.register_service("model", ElsewhereModel, journal, options=options)
    arrived: list[int] = []
    env.from_batch(range(100_000)).map_async(model.ask, concurrency=PARALLEL).sink(arrived.append)
    begun = 0

    def interrupt() -> None:
        nonlocal begun
        while len(arrived) < 6 * PARALLEL:
            time.sleep(CALL_S)
        begun = len(journal.lines())
        os.kill(os.getpid(), signal.SIGINT)

    interrupting = threading.Thread(target=interrupt)
    interrupting.start()
    with pytest.raises(KeyboardInterrupt):
        env.submit(autostop=True)
    interrupting.join()
    assert len(journal.lines()) - begun <= 3 * PARALLEL  # before the signal is noticed
    assert sorted(map(int, journal.lines())) == sorted(arrived)


@pytest.mark.parametrize("way", WAYS)
def test_a_stop_begins_no_further_call_of_a_costly_function(way: str) -> None:
    paid = Paid()
    report, arrived, further = stopped(lambda env, stream: WAYS[way](env, stream, paid), paid)
    assert report.state is Outcome.STOPPED
    assert further <= PARALLEL  # between the count and the stop
    assert paid.begun == paid.ended
    assert len(arrived) == paid.ended * (3 if way == "map_batches" else 1)
    read = report.operators[0].records_out
    copies = 1 if way != "comap" else 2
    dropped = 0 if way != "comap" else next(one for one in report.operators if one.name.startswith("filter")).records_in
    assert len(arrived) + report.undelivered + dropped <= copies * read
    if way != "comap":
        assert len(arrived) + report.undelivered == read


def test_stop_with_drain_processes_everything_in_flight() -> None:
    paid = Paid()
    env = LocalEnvironment("drained")
    arrived: list[Any] = []
    source = iter(range(10**6))
    env.from_source(lambda: next(source), delay=CALL_S / 20).map_async(paid.call_async, concurrency=PARALLEL).sink(
        arrived.append
    )
    job = env.submit()
    assert paid.many.wait(30)
    env.stop(drain=True)
    assert job.report is not None
    assert job.report.state is Outcome.STOPPED
    assert job.report.undelivered == 0
    assert arrived == list(range(job.report.operators[0].records_out))
    assert paid.ended == len(arrived)


def test_a_stop_after_a_drain_began_holds_back_too() -> None:
    paid = Paid()
    env = LocalEnvironment("drained")
    env.from_batch(range(1000)).map_async(paid.call_async, concurrency=PARALLEL).sink(lambda _: None)
    job = env.submit()
    assert paid.many.wait(30)
    drain = threading.Thread(target=env.stop, args=(True,))
    drain.start()
    begun = paid.begun
    while paid.begun < begun + 2 * PARALLEL:
        time.sleep(0.001)
    begun = paid.begun
    job._interrupt(signal.SIGINT)
    drain.join()
    assert paid.begun <= begun + PARALLEL


@pytest.mark.parametrize("seed", range(5))
def test_a_stop_processes_what_is_in_flight_of_cheap_functions(seed: int) -> None:
    """Programs that were written for a stop that drains still get every record."""
    env = LocalEnvironment("cheap")
    arrived: list[int] = []
    numbers = iter(range(10**9))
    (
        env.from_source(lambda: next(numbers))
        .map(lambda number: number + seed)
        .rebalance()
        .map(lambda number: number - seed, parallelism=2)
        .keyby(lambda number: number % 5)
        .reduce(lambda _, number: number)
        .map_batches(lambda batch: batch, max_records=100, max_wait_s=3000.0)
        .sink(arrived.append)
    )
    job = env.submit()
    while len(arrived) < 1000:
        time.sleep(0.001)
    env.stop()
    assert job.report is not None
    assert job.report.undelivered == 0
    assert sorted(arrived) == list(range(job.report.operators[0].records_out))


@pytest.mark.parametrize("is_async", [True, False])
def test_a_record_that_waits_for_its_next_attempt_is_given_back(is_async: bool, clock: FairClock) -> None:
    env = LocalEnvironment("again")
    failed = threading.Event()
    tries = 0

    def fail(number: int) -> int:
        nonlocal tries
        tries += 1
        time.sleep(3 * CALL_S)  # a single call has to be clearly costly
        failed.set()
        raise ConnectionError(number)

    async def fail_async(number: int) -> int:
        return fail(number)

    again = Retry(3, (600.0, 600.0))
    stream = env.from_batch([1, 2, 3])
    (stream.map_async(fail_async, retry=again) if is_async else stream.map(fail, on_error=again)).sink(lambda _: None)
    job = env.submit()
    assert failed.wait(30)
    began_at = time.monotonic()
    env.stop()
    assert clock.elapsed_s(began_at) < 0.5
    assert job.report is not None
    assert job.report.state is Outcome.STOPPED
    assert job.report.undelivered == job.report.operators[0].records_out
    assert tries <= 3


def test_a_slow_sink_still_gets_what_was_paid_for() -> None:
    paid = Paid()
    env = LocalEnvironment("results")
    arrived: list[int] = []

    def write(record: int) -> None:
        time.sleep(0.015)
        arrived.append(record)

    env.from_batch(range(100_000)).map_async(paid.call_async, concurrency=PARALLEL).rebalance().sink(
        write, parallelism=2
    )
    env.submit()
    assert paid.many.wait(30)
    env.stop()
    assert sorted(arrived) == list(range(paid.ended))


def test_what_a_running_call_asks_of_a_served_pipeline_is_still_answered() -> None:
    paid = Paid()
    env = LocalEnvironment("served")
    served = env.serve("served", lambda requests: requests.map_async(paid.call_async))
    arrived: list[int] = []
    env.from_batch(range(100_000)).map(lambda record: served.process(record)).sink(arrived.append)
    env.submit()
    assert paid.many.wait(30)
    env.stop()
    assert arrived == list(range(paid.ended))


PROGRAM = """
    import asyncio, sys, time
    from pathlib import Path
    from sage import LocalEnvironment

    calls = [0]

    async def paid(record):
        calls[0] += 1
        if calls[0] == 160:
            Path(sys.argv[1]).touch()
        await asyncio.sleep(0.05)
        return record

    env = LocalEnvironment("paid")
    arrived = []
    env.from_batch(range(100_000)).map_async(paid, concurrency=16).sink(arrived.append)
    try:
        env.submit(autostop=True)
    except BaseException as error:
        print(type(error).__name__, calls[0], len(arrived))
"""


@pytest.mark.parametrize(
    ("signum", "name", "line"),
    [
        (signal.SIGINT, "KeyboardInterrupt", "stopping: 16 calls run; Ctrl-C again to cancel them"),
        (signal.SIGTERM, "SystemExit", "stopping: 16 calls run; Ctrl-C to cancel them"),
    ],
)
def test_one_line_on_a_terminal_says_what_a_stop_waits_for(
    signum: int, name: str, line: str, tmp_path: Path, clock: FairClock
) -> None:
    (tmp_path / "program.py").write_text(textwrap.dedent(PROGRAM))
    terminal, inner = pty.openpty()
    words = [sys.executable, str(tmp_path / "program.py"), str(tmp_path / "many")]
    environment = {**os.environ, "PYTHONPATH": str(SOURCES)}
    process = subprocess.Popen(words, env=environment, stdout=subprocess.PIPE, stderr=inner, text=True)
    while not (tmp_path / "many").exists():
        assert process.poll() is None
        time.sleep(0.005)
    began_at = time.monotonic()
    process.send_signal(signum)
    output, _ = process.communicate(timeout=30)
    assert clock.elapsed_s(began_at) < 1.0
    kind, begun, ended = output.split()
    assert kind == name
    assert begun == ended
    assert int(begun) <= 160 + 32
    os.close(inner)
    shown = os.read(terminal, 10_000).decode()
    os.close(terminal)
    assert [part.strip() for part in shown.splitlines() if "stopping" in part] == [line]
