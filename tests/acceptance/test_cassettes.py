"""Calls of services on a cassette: what a job was answered, a later one is answered without the services."""

from __future__ import annotations

import sqlite3
import subprocess
import sys
from contextlib import closing
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import pytest

from sage import GraphError, JobError, LocalEnvironment, ReplayError, ServiceOptions
from sage.testing import StepBackend, assert_clean

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Iterator
    from pathlib import Path


OF_OTHERS = ["shared memory *", "temporary *"]


@dataclass(frozen=True)
class Told:
    """An answer of a class of its own."""

    text: str
    number: int


class Model:
    """Answers differently each time, fails for one text, and knows whether it was built."""

    built = 0
    first = 0
    width = 3

    def __init__(self) -> None:
        type(self).built += 1
        self.count = self.first

    def tell(self, text: str, *, loud: bool = False) -> Told:
        self.count += 1
        if text == "bad":
            raise LookupError(f"nothing about {text}")
        return Told(text.upper() if loud else text, self.count)

    async def tell_later(self, text: str) -> str:
        return f"{text} later"

    def spell(self, text: str) -> Iterator[str]:
        yield from text
        if text == "bad":
            raise LookupError("no end")

    async def spell_later(self, text: str) -> AsyncIterator[str]:
        for letter in text:
            yield letter

    def process(self, text: str) -> str:
        return f"processed {text}"

    def odd(self) -> Any:
        return lambda: None


def job(texts: list[str], *, host: Any = "inline", seed: int | None = None) -> tuple[LocalEnvironment, list[Any]]:
    """Return a pipeline that calls a model in each of its ways, and the list that its results come to."""
    env = LocalEnvironment("told", backend=None if seed is None else (lambda: StepBackend(seed)))
    model: Any = env.register_service("model", Model, options=ServiceOptions(host=host))
    found: list[Any] = []

    def ask(text: str) -> Any:
        try:
            return (model.tell(text), model.tell(text, loud=True), model(text), model.width)
        except LookupError as error:
            return f"{type(error).__name__}: {error}"

    env.from_batch(texts).map(ask).sink(found.append)
    return env, found


@pytest.mark.parametrize("host", ["inline", "process"])
def test_a_replay_gives_what_was_recorded_and_starts_nothing(tmp_path: Path, host: Any) -> None:
    texts = ["a", "b", "bad", "a"]
    env, recorded = job(texts, host=host)
    env.record_calls(tmp_path / "calls.db")
    with assert_clean(ignore=OF_OTHERS):
        env.submit(autostop=True)
    assert recorded[0] == (Told("a", 1), Told("A", 2), "processed a", 3)
    assert recorded[2] == "LookupError: nothing about bad"
    assert recorded[3] != recorded[0]  # it is asked again, and has counted on
    built = Model.built
    env, replayed = job(texts, host=host)
    env.replay_calls(tmp_path / "calls.db")
    with assert_clean(ignore=OF_OTHERS):
        report = env.submit(autostop=True).wait()
    assert repr(replayed) == repr(recorded)
    assert Model.built == built
    assert report.service("model").host != "process"


def test_a_hundred_orders_of_steps_give_the_same(tmp_path: Path) -> None:
    texts = [f"text {number}" for number in range(6)]
    env, recorded = job(texts)
    env.record_calls(tmp_path / "calls.db")
    env.submit(autostop=True)
    for seed in range(100):
        env, replayed = job(texts, seed=seed)
        env.replay_calls(tmp_path / "calls.db")
        env.submit(autostop=True)
        assert replayed == recorded


@pytest.mark.parametrize("way", ["record_calls", "replay_calls"])
def test_coroutines_and_pieces_are_recorded(tmp_path: Path, way: str) -> None:
    found: dict[str, list[Any]] = {}
    for do in ("record_calls", way):
        env = LocalEnvironment("pieces")
        getattr(env, do)(tmp_path / "calls.db")
        model: Any = env.register_service("model", Model)
        results = found[do] = []

        def spelt(text: str, model: Any = model) -> list[str]:
            try:
                return list(model.spell(text))
            except LookupError as error:
                return [str(error)]

        async def spelt_later(text: str, model: Any = model) -> list[str]:
            return [letter async for letter in model.spell_later(text)]

        stream = env.from_batch(["ab", "bad"])
        stream.map(spelt).sink(results.append)
        stream.map_async(model.tell_later).sink(results.append)
        stream.map_async(spelt_later).sink(results.append)
        env.submit(autostop=True)
    assert sorted(map(str, found[way])) == sorted(
        map(str, [["a", "b"], ["no end"], "ab later", "bad later", ["a", "b"], ["b", "a", "d"]])
    )


def test_a_call_that_was_not_recorded_shows_the_nearest(tmp_path: Path) -> None:
    env, _ = job(["what is a tape?", "how do you do?"])
    env.record_calls(tmp_path / "calls.db")
    env.submit(autostop=True)
    env, _ = job(["what is a loom?"])
    env.replay_calls(tmp_path / "calls.db")
    with pytest.raises(JobError, match="no call tell\\('what is a loom\\?'\\) of service \"model\"") as caught:
        env.submit(autostop=True)
    error = caught.value.__cause__
    assert isinstance(error, ReplayError)
    assert "it has \"('what is a tape?')\" where this one has \"('what is a loom?')\"" in "".join(error.__notes__)


def test_a_call_too_many_is_told(tmp_path: Path) -> None:
    env, _ = job(["a"])
    env.record_calls(tmp_path / "calls.db")
    env.submit(autostop=True)
    env, _ = job(["a", "a"])
    env.replay_calls(tmp_path / "calls.db")
    with pytest.raises(JobError, match="tell\\('a'\\) of service \"model\" is called 2 times, recorded were 1"):
        env.submit(autostop=True)


def test_no_secret_is_in_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MODEL_API_KEY", "sk-not-for-anyone")
    env, found = job(["my key is sk-not-for-anyone"])
    env.record_calls(tmp_path / "calls.db")
    env.submit(autostop=True)
    assert found[0][0].text == "my key is sk-not-for-anyone"
    assert b"sk-not-for-anyone" not in (tmp_path / "calls.db").read_bytes()
    env, found = job(["my key is sk-not-for-anyone"])
    env.replay_calls(tmp_path / "calls.db")
    env.submit(autostop=True)
    assert found[0][0].text == "my key is *****************"


def test_an_answer_that_cannot_be_kept_is_left_out_and_named(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    def odd(way: str) -> tuple[LocalEnvironment, list[bool]]:
        env = LocalEnvironment("odd")
        getattr(env, way)(tmp_path / "calls.db")
        model: Any = env.register_service("model", Model)
        found: list[bool] = []
        env.from_batch([1]).map(lambda _: callable(model.odd())).sink(found.append)
        return env, found

    env, found = odd("record_calls")
    env.submit(autostop=True)
    assert found == [True]
    assert "answer cannot be recorded service='model' method=odd" in caplog.text
    env, _ = odd("replay_calls")
    with pytest.raises(JobError, match='the answer of service "model" to odd\\(\\) was not recorded: <function'):
        env.submit(autostop=True)


def test_a_file_that_cannot_be_used_is_refused_at_once(tmp_path: Path) -> None:
    env, _ = job(["a"])
    with pytest.raises(GraphError, match=r"nothing\.db' cannot be used: it is missing"):
        env.replay_calls(tmp_path / "nothing.db")
    assert not (tmp_path / "nothing.db").exists()
    (tmp_path / "text.db").write_text("no cassette at all, but a text that is long enough to be read as one" * 20)
    for use in (env.replay_calls, env.record_calls):
        with pytest.raises(GraphError, match=r"text\.db' cannot be used: file is not a database"):
            use(tmp_path / "text.db")
    with pytest.raises(GraphError, match=r"absent/calls\.db' cannot be used: unable to open"):
        env.record_calls(tmp_path / "absent" / "calls.db")


@pytest.mark.parametrize("way", ["record_calls", "replay_calls"])
def test_a_cassette_of_another_form_is_refused_before_anything_is_asked(tmp_path: Path, way: str) -> None:
    path = tmp_path / "earlier.db"
    with closing(sqlite3.connect(path)) as file:
        file.execute("CREATE TABLE calls(service TEXT, method TEXT, hash TEXT, number INTEGER, answer BLOB)")
    with pytest.raises(GraphError, match=r"earlier\.db' cannot be used: no such column: ended_at") as caught:
        getattr(LocalEnvironment("earlier"), way)(str(path))
    assert caught.value.__notes__ == ["Give the path of a new file, or of one that env.record_calls made."]


def test_a_later_job_goes_on_with_the_answers(tmp_path: Path) -> None:
    def twice(way: str) -> list[Any]:
        env, found = job(["a"])
        getattr(env, way)(tmp_path / "calls.db")
        env.submit(autostop=True)
        Model.first = 10
        env.submit(autostop=True)
        Model.first = 0
        return found

    recorded = twice("record_calls")
    assert recorded[0] != recorded[1]
    assert twice("replay_calls") == recorded


def test_a_cassette_is_only_read(tmp_path: Path) -> None:
    """It may be checked in, and the disk may be read-only; nothing is written beside it."""
    env, recorded = job(["a"])
    env.record_calls(tmp_path / "calls.db")
    env.submit(autostop=True)
    before = (tmp_path / "calls.db").read_bytes()
    (tmp_path / "calls.db").chmod(0o400)
    env, replayed = job(["a"])
    env.replay_calls(tmp_path / "calls.db")
    env.submit(autostop=True)
    assert replayed == recorded
    assert [path.name for path in tmp_path.iterdir()] == ["calls.db"]
    assert (tmp_path / "calls.db").read_bytes() == before


def test_an_answer_is_not_lost_with_its_copy(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    env, found = job(["a"])
    env.record_calls(tmp_path / "calls.db")
    with closing(sqlite3.connect(tmp_path / "calls.db")) as file, file:
        file.execute("DROP TABLE calls")
        file.execute("CREATE VIEW calls AS SELECT 1 AS service, 2 AS method, 3 AS hash, 4 AS number")
    env.submit(autostop=True)
    assert found == [(Told("a", 1), Told("A", 2), "processed a", 3)]
    assert "call cannot be recorded service='model' method=tell" in caplog.text


def test_a_service_that_a_function_builds_is_awaited_again(tmp_path: Path) -> None:
    for way in ("record_calls", "replay_calls"):
        env = LocalEnvironment("built")
        getattr(env, way)(tmp_path / "calls.db")
        model: Any = env.register_service_factory("model", lambda: Model())
        found: list[str] = []
        env.from_batch(["a"]).map_async(model.tell_later).sink(found.append)
        env.submit(autostop=True)
        assert found == ["a later"]


def test_the_command_records_and_replays(tmp_path: Path) -> None:
    program = tmp_path / "program.py"
    program.write_text(
        "import time\n"
        "from sage import LocalEnvironment\n"
        "class Clock:\n"
        "    def now(self, number):\n"
        "        return number, time.time_ns()\n"
        "env = LocalEnvironment('clock')\n"
        "clock = env.register_service('clock', Clock)\n"
        "env.from_batch([1, 2, 3]).map(clock.now).sink(print)\n"
        "env.run()\n"
    )

    def run(*words: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "sage", "run", str(program), *words]
        return subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)

    first, second = run("--record", "calls.db"), run("--replay", "calls.db")
    assert (first.returncode, second.returncode) == (0, 0), second.stderr
    assert len(first.stdout.splitlines()) == 3
    assert second.stdout == first.stdout
    with closing(sqlite3.connect(tmp_path / "calls.db")) as file:
        assert file.execute("SELECT COUNT(*) FROM calls").fetchall() == [(3,)]
    assert "exclude each other" in run("--record", "x.db", "--replay", "calls.db").stderr


def test_a_cluster_refuses_it(tmp_path: Path) -> None:
    from sage import RemoteEnvironment

    with pytest.raises(GraphError, match="where calls cannot be recorded or replayed"):
        RemoteEnvironment("far").record_calls(tmp_path / "calls.db")
