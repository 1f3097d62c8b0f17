"""Dead letters in a file: each once, whenever the program is killed, and immediately if the job is not durable."""

from __future__ import annotations

import base64
import pickle
import random
import signal
import subprocess
import sys
from collections import Counter
from typing import TYPE_CHECKING, Any

import pytest

from sage import ConnectorError, DeadLetter, GraphError, LocalEnvironment, Retry
from sage.connectors.dead_letters import DeadLetterFile, read_letters, take_out

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator
    from pathlib import Path

    from sage._runtime.backend import Backend

COUNT = 600

PROGRAM = """
import asyncio, os, signal, sys
from sage import Durable, LocalEnvironment
from sage.connectors import JsonLinesFiles

left = {"file": 0, "call": 0, "prepared": 0}
if len(sys.argv) > 1:
    left[sys.argv[1]] = int(sys.argv[2])

def count(name):
    left[name] -= 1
    if left[name] == 0:
        os.kill(os.getpid(), signal.SIGKILL)

def heard(event, args):
    if event in ("open", "os.rename", "os.remove"):
        count("file")
    if event == "os.remove" and str(args[0]).endswith(".prepared"):
        count("prepared")

sys.addaudithook(heard)

async def ask(number):
    count("call")
    await asyncio.sleep(0.002 * (number % 5))
    if number % 3 == 0:
        raise ValueError(f"bad {number}")
    return number

env = LocalEnvironment("asking", durable=Durable("state", interval_s=0.02))
letters = env.dead_letters(store="failed.jsonl")
answers = env.from_batch(range(600), name="numbers").map_async(ask, concurrency=16, name="ask", on_error=letters)
answers.sink(JsonLinesFiles("out"), name="out")
env.run()
"""


def run(folder: Path, *until: str) -> bool:
    """Run the program, and return whether it was killed."""
    command = [sys.executable, "-W", "error", "-c", PROGRAM, *until]
    ended = subprocess.run(command, cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=50)
    assert ended.returncode in (0, -signal.SIGKILL), ended.stdout
    return ended.returncode != 0


def records(folder: Path) -> Counter[int]:
    letters, unread_count = read_letters(str(folder / "failed.jsonl"))
    assert unread_count == 0
    assert len({letter.id for letter in letters}) == len(letters)
    return Counter(letter.values["record"] for letter in letters)


@pytest.mark.parametrize("seed", [0, 1, *(pytest.param(seed, marks=pytest.mark.proof) for seed in range(2, 30))])
def test_each_letter_once_whenever_it_is_killed(seed: int, tmp_path: Path) -> None:
    moments = random.Random(seed)
    kills = [run(tmp_path, "call", str(moments.randrange(100, 300)))]
    kills.append(run(tmp_path, "file", str(moments.randrange(150, 250))))
    kills.append(run(tmp_path, "prepared", "2"))
    assert any(kills)
    assert not run(tmp_path)
    assert records(tmp_path) == Counter(range(0, COUNT, 3))
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".")] == []


def test_a_letter_that_was_appended_before_a_kill_does_not_come_again(tmp_path: Path) -> None:
    assert run(tmp_path, "prepared", "1")  # the first letters are in the file, and the rest of the commit is not done
    assert records(tmp_path)
    with (tmp_path / "failed.jsonl").open("r+b") as file:
        file.truncate(file.seek(0, 2) - 10)  # as if the machine had lost power meanwhile
    assert not run(tmp_path)
    assert records(tmp_path) == Counter(range(0, COUNT, 3))


def test_a_whole_last_line_without_a_line_end_stays(tmp_path: Path) -> None:
    assert run(tmp_path, "prepared", "1")
    path = tmp_path / "failed.jsonl"
    path.write_bytes(path.read_bytes().rstrip(b"\n"))  # as some editors do
    assert not run(tmp_path)
    assert records(tmp_path) == Counter(range(0, COUNT, 3))


def test_letters_of_a_checkpoint_that_was_left_out_are_taken_back(tmp_path: Path) -> None:
    path = tmp_path / "failed.jsonl"
    for checkpoint, value in ((1, "one"), (2, "two")):
        sink = DeadLetterFile(path, "job")
        sink.open("a-part-0", checkpoint - 1)
        sink.begin()
        sink.write([DeadLetter(value, ValueError("bad"), "parse", 1)])
        token = sink.prepare(checkpoint)
        assert token is not None
        sink.commit(token)
        sink.commit(token)
    other = DeadLetterFile(path, "job")
    other.append(DeadLetter("other", ValueError("bad"), "parse", 1))
    assert [letter.values["record"] for letter in read_letters(str(path))[0]] == ["one", "two", "other"]
    DeadLetterFile(path, "job").open("a-part-0", 1)
    assert [letter.values["record"] for letter in read_letters(str(path))[0]] == ["one", "other"]


def fail(folder: Path, values: Iterable[Any], backend: Callable[[], Backend] | None = None) -> None:
    env = LocalEnvironment("failing", backend=backend)
    letters = env.dead_letters(store=folder / "new" / "failed.jsonl")

    def parse(value: object) -> int:
        raise ValueError(f"cannot parse {value!r}")

    policy = Retry(attempts_max=2, backoff_s=(0.0001, 0.0001), then=letters)
    env.from_batch(values).map(parse, name="parse", on_error=policy).sink(print)
    env.run()


def test_a_job_that_is_not_durable_appends_immediately(tmp_path: Path, backend: Callable[[], Backend]) -> None:
    fail(tmp_path, ["a"], backend)
    fail(tmp_path, [{"b": [1, None, 0.5]}], backend)
    (first, second), _ = read_letters(str(tmp_path / "new" / "failed.jsonl"))
    assert first.values | {"id": "", "at": "", "traceback": ""} == {
        "id": "",
        "at": "",
        "job": "failing",
        "operator": "parse",
        "attempts": 2,
        "error": "ValueError: cannot parse 'a'",
        "traceback": "",
        "input": 0,
        "record": "a",
    }
    assert "in parse\n    raise ValueError" in first.values["traceback"]
    assert second.values["record"] == {"b": [1, None, 0.5]}


@pytest.mark.parametrize("value", [(1, 2), {1: 2}, float("nan"), b"x", "\ud800", {1, 2}, [[{"a": (1,)}]]])
def test_a_record_that_is_not_json_is_pickled(value: object, tmp_path: Path) -> None:
    fail(tmp_path, [value])
    ((letter,), _) = read_letters(str(tmp_path / "new" / "failed.jsonl"))
    assert "record" not in letter.values
    assert letter.values["record_text"]
    assert repr(pickle.loads(base64.b64decode(letter.values["record_pickled"]))) == repr(value)


def test_a_number_too_long_for_text_is_pickled(tmp_path: Path) -> None:
    fail(tmp_path, [10**5_000])
    ((letter,), _) = read_letters(str(tmp_path / "new" / "failed.jsonl"))
    assert pickle.loads(base64.b64decode(letter.values["record_pickled"])) == 10**5_000


def test_a_record_that_cannot_be_pickled_is_text(tmp_path: Path) -> None:
    fail(tmp_path, [test_a_record_that_is_not_json_is_pickled, lambda: None])
    (letters, _) = read_letters(str(tmp_path / "new" / "failed.jsonl"))
    assert "record_pickled" not in letters[1].values
    assert "<lambda>" in letters[1].values["record_text"]


def test_a_torn_line_hides_no_other(tmp_path: Path) -> None:
    path = tmp_path / "new" / "failed.jsonl"
    fail(tmp_path, ["a"])
    with path.open("ab") as file:
        file.write(b'{"id": "torn')
    fail(tmp_path, ["b"])
    letters, unread_count = read_letters(str(path))
    assert ([letter.values["record"] for letter in letters], unread_count) == (["a", "b"], 1)
    path.chmod(0o640)
    link = tmp_path / "link.jsonl"
    link.symlink_to(path)
    take_out(str(link), frozenset({letters[0].id}))
    assert link.is_symlink()
    letters, unread_count = read_letters(str(path))
    assert ([letter.values["record"] for letter in letters], unread_count) == (["b"], 1)
    assert path.stat().st_mode & 0o777 == 0o640


def test_a_store_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    env = LocalEnvironment("job")
    with pytest.raises(GraphError, match="dead_letters: store is 7") as caught:
        env.dead_letters(store=7)  # type: ignore[arg-type]
    assert caught.value.__notes__ == ['Give the path of a file: store="failed.jsonl".']
    with pytest.raises(GraphError, match=f'dead_letters: store is the folder "{tmp_path}", and not a file'):
        env.dead_letters(store=tmp_path)

    def records() -> Iterator[str]:
        (tmp_path / "new").touch()
        yield "a"

    with pytest.raises(Exception, match=r'dead letters cannot be written to ".*failed.jsonl": FileExistsError'):
        fail(tmp_path, records())
    with pytest.raises(GraphError, match=r'dead_letters: store ".*failed.jsonl" cannot be written') as caught:
        env.dead_letters(store=tmp_path / "new" / "failed.jsonl")
    assert caught.value.__notes__ == [f'"{tmp_path / "new"}" must be a file or folder that this user may write.']
    with pytest.raises(ConnectorError, match="cannot be read: NotADirectoryError"):
        read_letters(str(tmp_path / "new" / "failed.jsonl"))


def test_the_plan_says_that_stored_letters_come_exactly_once(tmp_path: Path) -> None:
    env = LocalEnvironment("job", durable=tmp_path / "state")
    letters = env.dead_letters("bad", store=tmp_path / "failed.jsonl")
    env.from_batch([1]).map(str, on_error=letters).sink(print)
    assert 'over a restart, "bad store" gets each record exactly once' in env.explain()
