"""The real program, killed at any moment and run again: each row once, and no paid answer asked for twice."""

from __future__ import annotations

import json
import random
import signal
import sqlite3
import subprocess
import sys
from collections import Counter
from contextlib import closing
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from pathlib import Path

COUNT = 600

PROGRAM = """
import asyncio, os, signal, sys
from sage import Durable, LocalEnvironment
from sage.connectors import JsonLines, JsonLinesFiles

left = {"call": 0, "file": 0, "stop": 0}
if len(sys.argv) > 1:
    left[sys.argv[1]] = int(sys.argv[2])

def count(what):
    left[what] -= 1
    if left[what] == 0:
        os.kill(os.getpid(), signal.SIGINT if what == "stop" else signal.SIGKILL)

sys.addaudithook(lambda event, _: event in ("open", "os.rename", "os.remove") and count("file"))
calls = os.open("calls", os.O_WRONLY | os.O_APPEND | os.O_CREAT)

async def ask(row):
    os.write(calls, f"{row['id']}\\n".encode())  # the server's bill: it has the call, whatever comes of it
    count("call")
    count("stop")
    await asyncio.sleep(0.02 * (row["id"] % 5))
    return {"id": row["id"], "answer": row["id"] * 2}

env = LocalEnvironment("embed", durable=Durable("state", interval_s=0.02))
rows = env.from_source(JsonLines("in/*.jsonl"), name="rows")
answers = rows.map_async(ask, concurrency=16, capacity=16, name="ask")
answers.sink(JsonLinesFiles("out"))
counts = answers.map(lambda row: [row["id"] % 7, 1, row["answer"]]).keyby(lambda count: count[0])
counts = counts.reduce(lambda one, other: [one[0], one[1] + other[1], one[2] + other[2]], emit="last", name="totals")
counts.sink(JsonLinesFiles("totals"))
print(env.submit(autostop=True).report, flush=True)
"""

IN_A_DATABASE = """
import asyncio, signal, sys
from sage import Durable, LocalEnvironment
from sage.connectors import SqliteSink, SqliteTable

async def ask(row):
    await asyncio.sleep(0.01 * (row["id"] % 5))
    return {"id": row["id"], "answer": row["id"] * 2}

env = LocalEnvironment("embed", durable=Durable("state", interval_s=0.02))
rows = env.from_source(SqliteTable("rows.db", "rows", by="day"), name="rows")
answers = rows.map_async(ask, concurrency=16, capacity=16, name="ask")
answers.sink(SqliteSink("rows.db", "answers", wait_s=30), name="all", parallelism=2)
answers.sink(SqliteSink("rows.db", "latest", key="id", wait_s=30), name="latest")
if len(sys.argv) > 1:
    signal.setitimer(signal.ITIMER_REAL, float(sys.argv[1]))  # the system ends the process, wherever it is
print(env.submit(autostop=True).report, flush=True)
"""


def run(folder: Path, *until: str, program: str = PROGRAM) -> tuple[int, str]:
    """Run the program, which ends itself after so many calls or changes of files, if that is given."""
    command = [sys.executable, "-W", "error", "-c", program, *until]
    ended = subprocess.run(command, cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=50)
    return ended.returncode, ended.stdout


def prepare(folder: Path) -> None:
    inputs = folder / "in"
    inputs.mkdir(parents=True)
    for part in range(3):
        lines = [json.dumps({"id": number}) + "\n" for number in range(part, COUNT, 3)]
        (inputs / f"{part}.jsonl").write_text("".join(lines), encoding="utf-8")


def rows(folder: Path) -> Counter[int]:
    lines = [line for path in (folder / "out").glob("*.jsonl") for line in path.read_text("utf-8").splitlines()]
    answers = [json.loads(line) for line in lines]
    assert all(answer["answer"] == answer["id"] * 2 for answer in answers)
    return Counter(answer["id"] for answer in answers)


def finish(folder: Path) -> str:
    code, output = run(folder)
    assert code == 0, output
    # A total that changed in a later run comes again.
    paths = sorted((folder / "totals").glob("*.jsonl"))
    totals = {key: row for path in paths for key, *row in map(json.loads, path.read_text("utf-8").splitlines())}
    wanted: dict[int, list[int]] = {}
    for number in rows(folder):
        count, whole = wanted.get(number % 7, (0, 0))
        wanted[number % 7] = [count + 1, whole + number * 2]
    assert totals == wanted, output
    return output


def kill(folder: Path, what: str, count: int) -> bool:
    """Run the program until it kills itself, and return whether it did."""
    code, output = run(folder, what, str(count))
    assert code in (0, -signal.SIGKILL), output
    return code == -signal.SIGKILL


@pytest.mark.parametrize("seed", [0, 1, *(pytest.param(seed, marks=pytest.mark.proof) for seed in range(2, 40))])
def test_each_row_once_whenever_it_is_killed(seed: int, tmp_path: Path) -> None:
    prepare(tmp_path)
    moments = random.Random(seed)
    kills = int(kill(tmp_path, "call", moments.randrange(100, 300)))
    kills += kill(tmp_path, "file", moments.randrange(1, 200))
    kills += kill(tmp_path, "call", moments.randrange(1, 200))
    output = finish(tmp_path)
    assert kills > 0
    assert rows(tmp_path) == Counter(range(COUNT)), output
    assert not [path for path in (tmp_path / "out").iterdir() if path.name.startswith(".")]


def test_an_answer_that_a_checkpoint_has_is_not_asked_for_again(tmp_path: Path) -> None:
    prepare(tmp_path)
    assert kill(tmp_path, "call", 400)
    bill = (tmp_path / "calls").read_text("utf-8").split()
    output = finish(tmp_path)
    resumed = next(line for line in output.splitlines() if line.startswith("resumed from checkpoint"))
    done = int(resumed.split("(")[1].split(" ")[0].replace(",", ""))
    again = Counter((tmp_path / "calls").read_text("utf-8").split())
    assert done > 0
    # Records are read and answered in the order of the calls, but for those in flight.
    assert sum(again.values()) - COUNT <= len(bill) - done
    assert set(again) == set(map(str, range(COUNT)))


def test_after_a_completed_run_only_new_lines_are_read(tmp_path: Path) -> None:
    prepare(tmp_path)
    finish(tmp_path)
    assert "nothing new: the sources have no further records" in finish(tmp_path)
    with (tmp_path / "in" / "1.jsonl").open("a", encoding="utf-8") as file:
        file.write(json.dumps({"id": 5000}) + "\n")
    (tmp_path / "in" / "9.jsonl").write_text(json.dumps({"id": 5001}), encoding="utf-8")
    output = finish(tmp_path)
    assert f"({COUNT} records done)" in output
    assert rows(tmp_path) == Counter([*range(COUNT), 5000, 5001])
    assert sorted(Counter((tmp_path / "calls").read_text("utf-8").split()).values()) == [1] * (COUNT + 2)


def test_ctrl_c_keeps_every_answer_and_asks_for_none_twice(tmp_path: Path) -> None:
    prepare(tmp_path)
    code, output = run(tmp_path, "stop", "200")
    assert code == -signal.SIGINT, output
    stopped = rows(tmp_path)
    called = (tmp_path / "calls").read_text("utf-8").split()
    assert stopped == Counter(map(int, called)) != Counter(range(COUNT))
    finish(tmp_path)
    assert rows(tmp_path) == Counter(range(COUNT))
    assert Counter((tmp_path / "calls").read_text("utf-8").split()) == Counter(map(str, range(COUNT)))


@pytest.mark.parametrize("seed", [0, *(pytest.param(seed, marks=pytest.mark.proof) for seed in range(1, 20))])
def test_a_database_has_each_row_once_whenever_the_program_is_killed(seed: int, tmp_path: Path) -> None:
    def rows_of(table: str) -> Counter[tuple[int, int]]:
        with closing(sqlite3.connect(tmp_path / "rows.db")) as database:
            return Counter(database.execute(f"SELECT id, answer FROM {table}").fetchall())

    with closing(sqlite3.connect(tmp_path / "rows.db")) as database, database:
        database.execute("CREATE TABLE rows (id INTEGER, day INTEGER)")
        database.execute("CREATE TABLE answers (id INTEGER, answer INTEGER)")
        database.execute("CREATE TABLE latest (id INTEGER UNIQUE, answer INTEGER)")
        database.executemany("INSERT INTO rows VALUES (?, ?)", [(number, number // 50) for number in range(COUNT)])
    moments = random.Random(seed)
    kills = 0
    for moment in (moments.uniform(0.01, 0.4), moments.uniform(0.3, 1.0), moments.uniform(0.3, 1.0)):
        code, output = run(tmp_path, str(moment), program=IN_A_DATABASE)
        assert code in (0, -signal.SIGALRM), output
        assert max(rows_of("answers").values(), default=1) == 1
        kills += code != 0
    code, output = run(tmp_path, program=IN_A_DATABASE)
    assert code == 0, output
    assert kills > 0
    assert rows_of("answers") == rows_of("latest") == Counter((number, number * 2) for number in range(COUNT)), output
