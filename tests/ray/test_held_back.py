"""Ctrl-C on a cluster: no further call of a costly function begins there, and those that run end."""

from __future__ import annotations

import os
import pty
import signal
import subprocess
import sys
import threading
import time
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from support.ray_jobs import WAIT_S, wait_until

import sage

if TYPE_CHECKING:
    from support.fair_clock import FairClock
    from support.ray_nodes import GivenCluster

pytestmark = [pytest.mark.ray, pytest.mark.usefixtures("no_actor_is_left")]

SEEN_S = 0.2
"""By when the request has come through the master to the worker, and the line is there."""

CALL_S = 0.05
PARALLEL = 16

PROGRAM = f"""
import asyncio, os, sys, time
from pathlib import Path
from sage import MapFunction, RemoteEnvironment, ServiceOptions

folder = Path(sys.argv[1])

class Notes:
    def __init__(self):
        (folder / "processes").mkdir(exist_ok=True)
        (folder / "processes" / str(os.getpid())).touch()
        self.file = (folder / "calls").open("ab", buffering=0)

    def write(self, word):
        self.file.write(b"%s %f\\n" % (word, time.monotonic()))

class Paid(MapFunction):
    def open(self):
        self.notes = Notes()

    async def execute(self, data):
        self.notes.write(b"begun")
        await asyncio.sleep({CALL_S})
        self.notes.write(b"ended")
        return data

class PaidBatch(MapFunction):
    def open(self):
        self.notes = Notes()

    def execute(self, data):
        self.notes.write(b"begun")
        time.sleep({CALL_S})
        self.notes.write(b"ended")
        return data

class Model:
    def setup(self):
        self.paid = PaidBatch()
        self.paid.open()

    def ask(self, data):
        return self.paid.execute(data)

def in_service(records):
    model = env.register_service("model", Model, options=ServiceOptions(concurrency={PARALLEL}))
    return records.rebalance().map(lambda record: model.ask(record), parallelism={PARALLEL})

ways = {{
    "map_async": lambda records: records.map_async(Paid(), concurrency={PARALLEL}),
    "map_batches": lambda records: records.rebalance().map_batches(PaidBatch, max_records=1, parallelism={PARALLEL}),
    "service": in_service,
}}
env = RemoteEnvironment("paid", address=sys.argv[2])
arrived = []
ways[sys.argv[3]](env.from_batch(range(100_000))).sink(arrived.append)
try:
    env.submit(autostop=True)
finally:
    report = env._job.report
    print(len(arrived), report.undelivered, report.state, flush=True)
"""


class Terminal:
    """What a program writes to its terminal, with the moment at which a word was there."""

    def __init__(self, word: str) -> None:
        self.word, self.shown, self.seen_at = word, "", 0.0
        self._terminal, self.inner = pty.openpty()
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self) -> None:
        with suppress(OSError):  # it was closed, so that the word never came
            while "\n" not in self.shown.partition(self.word)[2]:
                self.shown += os.read(self._terminal, 10_000).decode()
            self.seen_at = time.monotonic()

    def close(self) -> None:
        self._reader.join(WAIT_S)
        os.close(self.inner)
        os.close(self._terminal)


@pytest.mark.parametrize("way", ["map_async", "map_batches", "service"])
def test_a_stop_holds_back_what_costs(
    ray_address: str, given: GivenCluster, tmp_path: Path, clock: FairClock, way: str
) -> None:
    """At most as many calls end as ran, none begins, their results arrive, and a line says that it stops."""
    program = tmp_path / "program.py"
    program.write_text(PROGRAM)
    environment = {**os.environ, **given.variables, "PYTHONPATH": str(Path(sage.__file__).parents[1])}
    terminal = Terminal("stopping")
    words = [sys.executable, str(program), str(tmp_path), ray_address, way]
    driver = subprocess.Popen(words, env=environment, stdout=subprocess.PIPE, stderr=terminal.inner, text=True)
    calls = tmp_path / "calls"
    try:
        wait_until(lambda: calls.exists() and calls.read_text().count("ended") > 10 * PARALLEL)
        clock.watch(driver.pid)
        for one in (tmp_path / "processes").iterdir():
            clock.watch(int(one.name))
        told_at = time.monotonic()
        driver.send_signal(signal.SIGINT)
        output, _ = driver.communicate(timeout=WAIT_S)
    finally:
        driver.kill()
        terminal.close()
    noted = [line.split() for line in calls.read_text().splitlines()]
    begun = [float(at) for word, at in noted if word == "begun"]
    ended = [float(at) for word, at in noted if word == "ended"]
    held_at = max(max(begun), told_at)
    assert clock.elapsed_s(told_at, held_at) < SEEN_S
    assert len([at for at in ended if at > held_at]) <= PARALLEL
    assert clock.elapsed_s(held_at, max(held_at, *ended)) < CALL_S + SEEN_S
    assert "stopping; Ctrl-C again to cancel" in [part.strip() for part in terminal.shown.splitlines()]
    assert clock.elapsed_s(told_at, terminal.seen_at) < SEEN_S
    arrived, undelivered, state = output.split()
    assert int(arrived) == len(begun) == len(ended)
    assert int(undelivered) > 0
    assert (state, driver.returncode) == ("stopped", -signal.SIGINT)
