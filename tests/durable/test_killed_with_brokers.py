"""Jobs that read and write topics and streams, whose programs are killed at random moments: each record once."""

from __future__ import annotations

import json
import random
import signal
import subprocess
import sys
from collections import Counter
from contextlib import suppress
from typing import TYPE_CHECKING, Any

import pytest
from support import brokers

from sage import ConnectorError

if TYPE_CHECKING:
    from pathlib import Path

PROGRAM = """
import asyncio, signal, sys
from sage import Durable, LocalEnvironment
from sage.connectors import KafkaSink, KafkaTopic, RedisStream, RedisStreamSink

kind, address, source, target, *until = sys.argv[1:]

async def ask(record):
    number = int((record.value if kind == "kafka" else record.fields)["id"])
    await asyncio.sleep(0.002 * (number % 5))
    return {"id": str(number), "text": str(number * 2)}

env = LocalEnvironment("ask", durable=Durable("state", interval_s=0.02))
rows = env.from_source((KafkaTopic if kind == "kafka" else RedisStream)(address, source), name="rows")
answers = rows.map_async(ask, concurrency=16, capacity=16, name="ask")
answers.sink((KafkaSink if kind == "kafka" else RedisStreamSink)(address, target), name="all", parallelism=2)
if until:
    signal.setitimer(signal.ITIMER_REAL, float(until[0]))  # the system ends the process, wherever it is
print(env.submit(autostop=True).report, flush=True)
"""
MORE = 100


def run(folder: Path, *words: str) -> tuple[int, str]:
    """Run the program in a folder, and return its exit code and its output."""
    command = [sys.executable, "-W", "error", "-c", PROGRAM, *words]
    done = subprocess.run(command, cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=50)
    return done.returncode, done.stdout


def values_of(source: Any) -> Counter[str]:
    """Return how often each value is there."""
    with suppress(ConnectorError):  # nothing was written yet
        source.open()
    found: Counter[str] = Counter()
    while (values := source.read(1_000)) is not None:
        found.update(value["id"] for value in values)
        assert all(int(value["text"]) == int(value["id"]) * 2 for value in values)
    source.close()
    return found


@pytest.mark.timeout(180)  # starts eleven programs
@pytest.mark.parametrize("seed", [0, *(pytest.param(seed, marks=pytest.mark.proof) for seed in range(1, 3))])
@pytest.mark.parametrize(
    "kind", [pytest.param("kafka", marks=brokers.needs_kafka), pytest.param("redis", marks=brokers.needs_redis)]
)
def test_each_record_once_whenever_the_program_is_killed(kind: str, seed: int, tmp_path: Path) -> None:
    name = brokers.topic if kind == "kafka" else brokers.stream
    source, target = name(tmp_path / "source"), name(tmp_path / "target")
    address = brokers.kafka() if kind == "kafka" else brokers.redis()
    moments, kills = random.Random(seed), 0
    for turn in range(11):
        if turn < 10:
            rows = [{"id": str(turn * MORE + number)} for number in range(MORE)]
            if kind == "kafka":
                brokers.produce(source, [json.dumps(row).encode() for row in rows])
            else:
                brokers.add(source, rows)
        until = [str(moments.uniform(0.005, 0.5))] if turn < 10 else []
        code, output = run(tmp_path, kind, address, source, target, *until)
        assert code in (0, -signal.SIGALRM) if until else code == 0, output
        kills += code != 0
        values = brokers.KafkaValues if kind == "kafka" else brokers.RedisValues
        found = values_of(values(address, target))
        assert max(found.values(), default=1) == 1
    assert kills > 2
    assert found == Counter(str(number) for number in range(10 * MORE)), output
