"""`sage state`, as it is installed, on the folders of real jobs, also of one that runs."""

from __future__ import annotations

import hashlib
import json
import os
import re
import signal
import sqlite3
import subprocess
import sys
import textwrap
from contextlib import closing
from typing import TYPE_CHECKING

import pytest

from sage._runtime.checkpoint_store import Checkpoint, CheckpointStore
from sage._runtime.checkpoints import Row

if TYPE_CHECKING:
    from pathlib import Path

SAGE = [sys.executable, "-m", "sage"]
ENVIRONMENT = {name: value for name, value in os.environ.items() if not name.startswith("SAGE_")}

TOTALS = """
    import sys
    from dataclasses import dataclass
    from sage import LocalEnvironment
    from sage.connectors import JsonLines, JsonLinesFiles

    @dataclass
    class Total:
        user: str
        spent: int

    def add(left, right):
        return Total(left.user, left.spent + right.spent)

    env = LocalEnvironment("totals", durable="state")
    orders = env.from_source(JsonLines("orders.jsonl"), name="orders").map(lambda order: Total(*order))
    users = orders.keyby(lambda order: order.user, name="users")
    users.reduce(add, emit="last", name="totals").sink(print, name="show")
    counted = orders.keyby(lambda order: len(order.user)).reduce(lambda left, right: right, name="latest")
    counted.map(lambda total: total.spent).sink(JsonLinesFiles("out"), name="files")
    env.run()
"""

ENDLESS = """
    import sys
    from sage import Durable, LocalEnvironment, Source
    from sage.connectors import JsonLinesFiles

    class Numbers(Source):
        bounded = False

        def open(self, position=None):
            self.at = position or 0

        def read(self, records_max):
            self.at += 1
            return [self.at]

        def position(self):
            return self.at

    env = LocalEnvironment("endless", durable=Durable("state", interval_s=0.01))
    numbers = env.from_source(Numbers, name="numbers").keyby(lambda number: number % 100)
    numbers.reduce(max, name="largest").filter(lambda number: number % 100 == 0).sink(JsonLinesFiles("out"), name="out")
    job = env.submit()
    print("begun", flush=True)
    job.wait()
"""

KILLED_IN_A_WRITE = """
    import os, sqlite3, sys
    file = sqlite3.connect("state/checkpoints.sqlite", isolation_level=None)
    file.execute("PRAGMA cache_size = 5")
    file.execute("BEGIN IMMEDIATE")
    file.execute("UPDATE parts SET body = x'00'")
    for number in range(1000):
        file.execute("INSERT INTO parts VALUES (9, 'x', 0, 0, zeroblob(1000), NULL, NULL, NULL, 0)")
    os._exit(9)
"""


def sage(folder: Path, *words: str, text: str = "", code: int = 0) -> str:
    """Run the command in a folder and return both of its outputs."""
    done = subprocess.run(
        [*SAGE, *words], cwd=folder, env=ENVIRONMENT, input=text, capture_output=True, text=True, timeout=60
    )
    assert done.returncode == code, done.stdout + done.stderr
    return done.stdout + done.stderr


def python(folder: Path, program: str, code: int = 0) -> str:
    path = folder / "program.py"
    path.write_text(textwrap.dedent(program), encoding="utf-8")
    command = [sys.executable, str(path)]
    done = subprocess.run(command, cwd=folder, env=ENVIRONMENT, capture_output=True, text=True, timeout=60)
    assert done.returncode == code, done.stderr
    return done.stdout


@pytest.fixture
def totals(tmp_path: Path) -> Path:
    """Run a job twice, so that its folder has two checkpoints, and return the folder around it."""
    orders = tmp_path / "orders.jsonl"
    orders.write_text('["ann", 5]\n["bob", 7]\n["eve", 1]\n', encoding="utf-8")
    python(tmp_path, TOTALS)
    with orders.open("a", encoding="utf-8") as file:
        file.write('["ann", 1]\n')
    python(tmp_path, TOTALS)
    return tmp_path


def contents(folder: Path) -> dict[str, tuple[str, int]]:
    """Return the files of a folder, each with its checksum and the time of its last change."""
    return {
        path.name: (hashlib.sha256(path.read_bytes()).hexdigest(), path.stat().st_mtime_ns)
        for path in [folder, *folder.iterdir()]
        if path.is_file()
    }


def words_of(text: str, first: str) -> list[str]:
    """Return the cells of the line of a table that begins with a word."""
    (line,) = [line for line in text.splitlines() if line.split()[:1] == [first]]
    return re.split(" {2,}", line.strip())


def test_list_shows_checkpoints_states_and_positions(totals: Path) -> None:
    before = contents(totals / "state")
    text = sage(totals, "state", "list", "state")
    assert [line.split()[0] for line in text.splitlines()[:3]] == ["checkpoint", "1", "2"]
    assert words_of(text, "2")[3] == "4"
    assert words_of(text, "2")[-1] == "yes"
    assert "states in checkpoint 2" in text
    assert words_of(text, "orders")[:4] == ["orders", "source", "1", "4"]
    assert words_of(text, "orders")[-1] == "{'orders.jsonl': 44}"
    assert words_of(text, "totals")[:5] == ["totals", "reduce", "1", "0", "3"]
    assert words_of(text, "latest")[4] == "1"
    assert sage(totals, "state", "check", "state") == "checkpoint 1: whole\ncheckpoint 2: whole\n"
    assert contents(totals / "state") == before


def test_show_tells_the_values_of_an_operator(totals: Path) -> None:
    before = contents(totals / "state")
    text = sage(totals, "state", "show", "state", "totals")
    assert "keys: 3" in text
    assert "'ann': Total(user='ann', spent=6)" in text
    assert sage(totals, "state", "show", "state", "totals", "--key", "bob") == "  'bob': Total(user='bob', spent=7)\n"
    assert sage(totals, "state", "show", "state", "latest", "--key", "3") == "  3: Total(user='ann', spent=1)\n"
    text = sage(totals, "state", "show", "state", "orders")
    assert "records read: 4" in text
    assert "position: {'orders.jsonl': 44}" in text
    text = sage(totals, "state", "show", "state", "totals", "--key", "nobody", code=1)
    assert text == 'Error: operator "totals" has no key nobody\n'
    text = sage(totals, "state", "show", "state", "total", code=1)
    assert 'operator "total" has no state in checkpoint 2' in text
    assert "These have one: files, latest, orders, totals." in text or "These have one: latest, orders, totals." in text
    assert contents(totals / "state") == before


def test_export_writes_json_lines(totals: Path) -> None:
    lines = [json.loads(line) for line in sage(totals, "state", "export", "state").splitlines()]
    assert {"operator": "totals", "key": "ann", "value_text": "Total(user='ann', spent=6)"} in lines
    assert {"operator": "latest", "key": 3, "value_text": "Total(user='ann', spent=1)"} in lines
    assert len(lines) == 4
    assert len(sage(totals, "state", "export", "state", "totals").splitlines()) == 3
    text = sage(totals, "state", "export", "state", "orders", code=1)
    assert text == 'Error: operator "orders" keeps nothing by key\n'


def test_plain_values_are_exported_as_json(tmp_path: Path) -> None:
    python(
        tmp_path,
        """
        from sage import LocalEnvironment
        env = LocalEnvironment("job", durable="state")
        pairs = env.from_batch([("a", {"n": 1}), ((1, 2), {3})], name="pairs")
        pairs.keyby(lambda pair: pair[0]).map(lambda pair: pair[1]).reduce(max, name="largest").sink(print)
        env.run()
        """,
    )
    plain, other = [json.loads(line) for line in sage(tmp_path, "state", "export", "state").splitlines()]
    assert plain == {"operator": "largest", "key": "a", "value": {"n": 1}}
    assert (other["key_text"], other["value_text"]) == ("(1, 2)", "{3}")
    assert other["key_pickled"]
    assert other["value_pickled"]


def test_states_of_a_function_are_named(tmp_path: Path) -> None:
    python(
        tmp_path,
        """
        from sage import ListState, LocalEnvironment, MapFunction, ValueState

        class Seen(MapFunction):
            count = ValueState(0)
            lengths = ListState()

            def execute(self, word):
                self.count.value += 1
                self.lengths.append(len(word))
                return word

        env = LocalEnvironment("job", durable="state")
        words = env.from_batch(["ann", "bob", "al"], name="words")
        words.keyby(lambda word: word[0]).map(Seen, name="seen").sink(print)
        env.run()
        """,
    )
    assert "    count of 'a': 2\n" in sage(tmp_path, "state", "show", "state", "seen")
    text = sage(tmp_path, "state", "show", "state", "seen", "--key", "a")
    assert text == "  count of 'a': 2\n  lengths of 'a': [3, 2]\n"
    lines = [json.loads(line) for line in sage(tmp_path, "state", "export", "state").splitlines()]
    assert {"operator": "seen", "state": "lengths", "key": "b", "value": [3]} in lines
    assert len(lines) == 4


def test_a_damaged_checkpoint_is_named(totals: Path) -> None:
    with closing(sqlite3.connect(totals / "state" / "checkpoints.sqlite")) as file, file:
        file.execute("UPDATE parts SET records = 99 WHERE number = 2 AND operator = 'orders'")
    file.close()
    text = sage(totals, "state", "check", "state", code=1)
    assert text == "checkpoint 1: whole\ncheckpoint 2: DAMAGED, the checksum does not match\n"
    text = sage(totals, "state", "list", "state")
    assert words_of(text, "2")[-1] == "DAMAGED"
    assert "states in checkpoint 1" in text
    assert "checkpoint 2 is damaged and was left out" in sage(totals, "state", "show", "state", "orders")


def test_a_checkpoint_that_lacks_an_earlier_one_is_damaged(tmp_path: Path) -> None:
    store = CheckpointStore(str(tmp_path / "state"))
    graph = {"sums": ("reduce", 1)}
    for number in (1, 2, 3):
        store.write(Checkpoint(number, graph, (Row("sums", 0, 0, b"", 2 if number == 3 else 1, b"changes", 5),)), 3)
    store.close()
    with closing(sqlite3.connect(tmp_path / "state" / "checkpoints.sqlite")) as file, file:
        file.execute("UPDATE parts SET changes = x'00' WHERE number = 1")
    file.close()
    text = sage(tmp_path, "state", "check", "state", code=1)
    assert text.splitlines() == [
        "checkpoint 1: DAMAGED, the checksum does not match",
        'checkpoint 2: DAMAGED, it needs the keys of "sums" in checkpoint 1, which is damaged or missing',
        "checkpoint 3: whole",
    ]


def test_list_and_check_run_no_code_of_a_pickle(tmp_path: Path) -> None:
    bomb = b"cposix\nmkdir\n(S'ran'\ntR."
    store = CheckpointStore(str(tmp_path / "state"))
    graph = {"in": ("source", 1), "sums": ("reduce", 1)}
    store.write(Checkpoint(1, graph, (Row("in", 0, 3, bomb), Row("sums", 0, 0, bomb, 1, bomb, 1))), 3)
    store.close()
    assert "not plain data: it has a posix.mkdir" in sage(tmp_path, "state", "list", "state")
    sage(tmp_path, "state", "check", "state")
    assert not (tmp_path / "ran").exists()
    for command in ("show", "export"):
        assert "which can run code" in " ".join(sage(tmp_path, "state", command, "--help").split())
    text = sage(tmp_path, "state", "show", "state", "sums", code=1)
    assert (tmp_path / "ran").exists(), text


def test_a_folder_that_others_can_write_is_not_unpickled(totals: Path) -> None:
    (totals / "state").chmod(0o770)
    for command in (["show", "state", "totals"], ["export", "state"]):
        text = sage(totals, "state", *command, code=1)
        assert 'folder "state" can be written by other users' in text
        assert "chmod 700 state" in text
    assert "totals" in sage(totals, "state", "list", "state")


def test_drop_asks_and_the_operator_begins_anew(totals: Path) -> None:
    text = sage(totals, "state", "drop", "state", "totals", text="n\n", code=1)
    assert 'Drop the state of reduce "totals" from checkpoint 2? It will begin anew. [y/N]: ' in text
    sage(totals, "state", "drop", "state", "totals", code=1)  # there is nobody to ask
    assert "keys: 3" in sage(totals, "state", "show", "state", "totals")
    text = sage(totals, "state", "drop", "state", "totals", text="y\n")
    assert 'checkpoint 2 has no state of "totals" any more' in text
    assert sage(totals, "state", "check", "state") == "checkpoint 1: whole\ncheckpoint 2: whole\n"
    assert 'operator "totals" has no state' in sage(totals, "state", "drop", "state", "totals", "--yes", code=1)
    with (totals / "orders.jsonl").open("a", encoding="utf-8") as file:
        file.write('["ann", 2]\n')
    assert python(totals, TOTALS) == "Total(user='ann', spent=2)\n"
    text = sage(totals, "state", "drop", "state", "orders", "--yes")
    assert python(totals, TOTALS).splitlines() == [
        "Total(user='ann', spent=10)",  # 2 of the run before, and all orders once more
        "Total(user='bob', spent=7)",
        "Total(user='eve', spent=1)",
    ]


def test_a_job_that_runs_is_looked_at_and_not_disturbed(tmp_path: Path) -> None:
    program = tmp_path / "endless.py"
    program.write_text(textwrap.dedent(ENDLESS), encoding="utf-8")
    job = subprocess.Popen(
        [sys.executable, str(program)],
        cwd=tmp_path,
        env=ENVIRONMENT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        assert job.stdout is not None
        assert job.stdout.readline() == "begun\n"
        while "numbers" not in (text := sage(tmp_path, "state", "list", "state")):
            assert job.poll() is None
        assert "DAMAGED" not in text
        for _ in range(3):
            assert "DAMAGED" not in sage(tmp_path, "state", "check", "state")
            assert "keys:" in sage(tmp_path, "state", "show", "state", "largest")
        text = sage(tmp_path, "state", "drop", "state", "largest", "--yes", code=1)
        assert f"is in use by process {job.pid}" in text
        job.send_signal(signal.SIGINT)
        _, errors = job.communicate(timeout=60)
        assert "CheckpointError" not in errors
    finally:
        job.kill()
        job.communicate()
    assert "DAMAGED" not in sage(tmp_path, "state", "check", "state")
    position = re.search(r"position: (\d+)", sage(tmp_path, "state", "show", "state", "numbers"))
    assert position is not None
    rows = [int(row) for path in sorted((tmp_path / "out").glob("*.jsonl")) for row in path.read_text().splitlines()]
    assert rows == list(range(100, int(position[1]) + 1, 100))


def test_the_unfinished_write_of_a_killed_program_is_left_alone(totals: Path) -> None:
    listed = sage(totals, "state", "check", "state")
    python(totals, KILLED_IN_A_WRITE, code=9)
    before = contents(totals / "state")
    assert "checkpoints.sqlite-journal" in before
    assert sage(totals, "state", "check", "state") == listed
    assert "keys: 3" in sage(totals, "state", "show", "state", "totals")
    assert contents(totals / "state") == before
    python(totals, TOTALS)


def test_a_folder_without_checkpoints_is_named(tmp_path: Path) -> None:
    text = sage(tmp_path, "state", "list", ".", code=1)
    assert 'Error: folder "." has no checkpoints: checkpoints.sqlite is not there' in text
    assert 'such as "state" for durable="state"' in text
    sage(tmp_path, "state", "drop", ".", "x", "--yes", code=1)
    assert [*tmp_path.iterdir()] == []
    tmp_path.chmod(0o700)
    (tmp_path / "checkpoints.sqlite").touch()  # of a program that was killed as it began
    assert sage(tmp_path, "state", "list", ".") == ". has no checkpoint yet\n"
    assert "has no checkpoint yet" in sage(tmp_path, "state", "show", ".", "x", code=1)
    (tmp_path / "checkpoints.sqlite").write_text("no database " * 100, encoding="utf-8")
    assert "cannot be read: DatabaseError: file is not a database" in sage(tmp_path, "state", "check", ".", code=1)
