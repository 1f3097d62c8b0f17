"""The memory of conversations; test_memory_index.py has more of those with an index."""

from __future__ import annotations

import datetime
import json
import math
import os
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import numpy
import pytest
from hypothesis import given
from hypothesis import strategies as some
from services.kept import Shelf, Words, at_once, killed_after, left_clean, notes_of

from sage import LocalEnvironment, ServiceOptions
from sage.errors import JobError, ServiceError, ServiceUnavailableError
from sage.services.memory.memory import Memory, Recollection, Turn, Weights, estimated_tokens
from sage.services.memory.ranking import HALF_LIFE_S, Candidate, best
from sage.testing import ManualClock

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

DAY_S = 86_400.0


@contextmanager
def opened(path: Path, embeddings: Any = None, **settings: Any) -> Iterator[Memory]:
    """Use a memory without a job, and see that it leaves nothing."""
    memory = Memory(path, embeddings or Words(), **settings)
    with left_clean():
        memory.setup()
        try:
            yield memory
        finally:
            memory.cleanup()
    assert not [name for name in os.listdir(path.parent) if name.startswith(path.name + "-")]


@pytest.fixture
def clock() -> ManualClock:
    return ManualClock(1_700_000_000.0)


@pytest.fixture(params=["alone", "with an index"])
def memory(request: pytest.FixtureRequest, tmp_path: Path, clock: ManualClock) -> Iterator[Memory]:
    """A memory at a virtual time, with the same behaviour whether an index finds its vectors or not."""
    index = Shelf() if request.param == "with an index" else None
    with opened(tmp_path / "memory.db", index=index, clock=clock, half_life_s=DAY_S) as found:
        yield found


def texts(recollections: list[Recollection]) -> list[str]:
    return [found.text for found in recollections]


class TestTurns:
    def test_the_last_turns_come_in_order(self, memory: Memory, clock: ManualClock) -> None:
        for number in range(30):
            assert memory.add_turn("user", f"turn {number}") is None
            clock.advance(1)
        turns = memory.turns()
        assert [turn.content for turn in turns] == [f"turn {number}" for number in range(10, 30)]
        assert turns[-1] == Turn("user", "turn 29", clock() - 1)
        assert [turn.content for turn in memory.turns(turns_max=2)] == ["turn 28", "turn 29"]
        assert memory.turns(turns_max=0) == memory.turns("nobody") == []

    def test_sessions_are_apart(self, memory: Memory) -> None:
        memory.add_turn("user", "hello", session="ann")
        memory.add_turn("assistant", "good day", session="ann")
        memory.add_turn("user", "goodbye", session="bob")
        assert [turn.role for turn in memory.turns("ann")] == ["user", "assistant"]
        assert [turn.content for turn in memory.turns("bob")] == ["goodbye"]
        assert memory.sessions() == ["ann", "bob"]

    def test_the_budget_of_tokens(self, memory: Memory) -> None:
        for content in ("one two", "three", "four five six"):
            memory.add_turn("user", content)
        kept = {budget: [turn.content for turn in memory.turns(tokens_max=budget)] for budget in range(0, 12)}
        for budget, contents in kept.items():
            assert sum(map(estimated_tokens, contents)) <= budget
        assert kept[0] == []
        assert kept[estimated_tokens("four five six")] == ["four five six"]
        assert len(kept[11]) == 3

    def test_a_turn_that_does_not_fit_leaves_no_gap(self, tmp_path: Path) -> None:
        with opened(tmp_path / "memory.db", tokens_max=6, count_tokens=len) as memory:
            for content in ("ab", "too long to fit", "cd", "ef"):
                memory.add_turn("user", content)
            assert [turn.content for turn in memory.turns()] == ["cd", "ef"]
            assert memory.turns(tokens_max=1) == []

    def test_a_turn_with_an_importance_is_remembered_too(self, memory: Memory) -> None:
        name = memory.add_turn("user", "my cat is called Tom", session="ann", importance=0.9)
        (found,) = memory.recall("cat", session="ann")
        assert (found.id, found.text, found.importance) == (name, "my cat is called Tom", 0.9)
        assert found.metadata == {"role": "user"}
        assert len(memory.turns("ann")) == 1

    @pytest.mark.parametrize(
        ("text", "tokens"),
        [("", 0), ("one", 1), ("Well, no!", 4), ("incomprehensibilities", 6), ("\u4f60\u597d" * 8, 12)],
    )
    def test_the_estimate_of_tokens(self, text: str, tokens: int) -> None:
        assert estimated_tokens(text) == tokens


class TestRecall:
    def test_the_most_similar_comes_first(self, memory: Memory) -> None:
        memory.remember_many(["the cat sleeps", "the dog barks", "rain in the night"])
        assert texts(memory.recall("a cat"))[0] == "the cat sleeps"
        assert texts(memory.recall("why barks that dog", k=1)) == ["the dog barks"]
        assert len(memory.recall("anything", k=10)) == 3

    def test_what_is_recalled_says_why(self, memory: Memory, clock: ManualClock) -> None:
        first = memory.remember("tea is hot", importance=0.25, metadata={"page": [1, None]})
        clock.advance(DAY_S)
        (found,) = memory.recall("tea is hot")
        assert found.relevance == pytest.approx(1.0)
        assert found == Recollection(
            first, "tea is hot", "default", 1.25, found.relevance, 0.5, 0.25, clock() - DAY_S, {"page": [1, None]}
        )

    def test_recent_ones_come_before_old_ones(self, memory: Memory, clock: ManualClock) -> None:
        for day in ("monday", "tuesday", "wednesday"):
            memory.remember(f"lunch {day}")
            clock.advance(DAY_S)
        found = memory.recall("lunch", weights=Weights(relevance=0, importance=0))
        assert texts(found) == ["lunch wednesday", "lunch tuesday", "lunch monday"]
        assert [round(part.recency, 6) for part in found] == [0.5, 0.25, 0.125]

    def test_recalling_makes_recent_again(self, memory: Memory, clock: ManualClock) -> None:
        memory.remember("an old tale")
        clock.advance(DAY_S)
        memory.remember("new gossip")
        clock.advance(DAY_S)
        recent = Weights(relevance=0, importance=0)
        assert texts(memory.recall("tale", k=1, weights=Weights(recency=0, importance=0))) == ["an old tale"]
        assert texts(memory.recall("tale", weights=recent)) == ["an old tale", "new gossip"]

    def test_important_ones_come_before_others(self, memory: Memory) -> None:
        memory.remember("weather", importance=0)
        memory.remember("allergic to nuts", importance=1)
        memory.remember("likes blue", importance=0.5)
        found = memory.recall("what", weights=Weights(relevance=0, recency=0))
        assert [(part.text, part.score) for part in found] == [
            *(("allergic to nuts", 1.0), ("likes blue", 0.5), ("weather", 0.0)),
        ]

    def test_sessions_are_apart(self, memory: Memory) -> None:
        memory.remember("the secret is 1", session="ann")
        memory.remember("the secret is 2", session="bob")
        assert texts(memory.recall("secret", session="ann")) == ["the secret is 1"]
        assert memory.recall("secret") == []
        assert {found.session for found in memory.recall("secret", session=None)} == {"ann", "bob"}
        assert (memory.count("ann"), memory.count(), memory.count("default")) == (1, 2, 0)

    def test_an_empty_memory_recalls_nothing(self, memory: Memory) -> None:
        assert memory.recall("anything") == []
        assert memory.process("anything") == []
        assert memory.remember_many([]) == []

    def test_no_words_in_common(self, memory: Memory) -> None:
        memory.remember("?!")
        (found,) = memory.recall("...")
        assert found.relevance == 0

    @given(
        some.lists(
            some.tuples(
                some.floats(0, 1), some.floats(0, 1e7), some.lists(some.integers(-5, 5), min_size=3, max_size=3)
            ),
            min_size=1,
            max_size=12,
        ),
        some.tuples(some.floats(0.1, 5), some.floats(0, 5), some.floats(0, 5)),
        some.integers(1, 15),
    )
    def test_the_score_is_that_of_the_paper(
        self, rows: list[tuple[float, float, list[int]]], parts: tuple[float, float, float], k: int
    ) -> None:
        query = numpy.array([1, 2, -1], numpy.float32)
        now = 1e7
        candidates = [
            Candidate(number, importance, at, numpy.array(vector, numpy.float32).tobytes())
            for number, (importance, at, vector) in enumerate(rows)
        ]
        found = best(query, candidates, k, now=now, half_life_s=HALF_LIFE_S, weights=Weights(*parts))

        def scaled(values: list[float]) -> list[float]:
            low, high = min(values), max(values)
            return [0.5 if high - low < 1e-6 else (value - low) / (high - low) for value in values]

        def cosine(vector: list[int]) -> float:
            length = math.hypot(*vector) * math.hypot(1, 2, -1)
            return (vector[0] + 2 * vector[1] - vector[2]) / length if length else 0.0

        columns = (
            scaled([cosine(vector) for _, _, vector in rows]),
            [0.995 ** ((now - at) / 3600) for _, at, _ in rows],
            [importance for importance, _, _ in rows],
        )
        scores = [
            sum(weight * part for weight, part in zip(parts, row, strict=True)) for row in zip(*columns, strict=True)
        ]
        assert [one.score for one in found] == pytest.approx(sorted(scores, reverse=True)[:k], abs=1e-3)
        assert [scores[one.number] for one in found] == pytest.approx([one.score for one in found], abs=1e-3)


class TestForgetting:
    def test_a_time_to_live_ends(self, memory: Memory, clock: ManualClock) -> None:
        memory.remember("short", ttl_s=10)
        memory.remember("long")
        clock.advance(9)
        assert memory.count() == 2
        clock.advance(1)
        assert texts(memory.recall("short long")) == ["long"]
        assert memory.count() == 1
        assert memory.expire() == 1
        assert memory.expire() == 0

    def test_writes_forget_what_is_over(self, memory: Memory, clock: ManualClock) -> None:
        memory.remember("short", ttl_s=10)
        clock.advance(11)
        memory.remember("long")
        assert memory.expire() == 0

    def test_a_time_to_live_for_all(self, tmp_path: Path, clock: ManualClock) -> None:
        with opened(tmp_path / "memory.db", ttl_s=5, clock=clock) as memory:
            memory.remember("short")
            memory.remember("longer", ttl_s=50)
            memory.add_turn("user", "short too", importance=0)
            clock.advance(6)
            assert texts(memory.recall("any")) == ["longer"]

    def test_by_id(self, memory: Memory) -> None:
        first, _ = memory.remember_many(["one", "two"])
        assert memory.forget([first, first, "unknown"]) == 1
        assert texts(memory.recall("one")) == ["two"]
        assert memory.forget([first]) == 0

    def test_by_session(self, memory: Memory) -> None:
        for session in ("ann", "bob"):
            memory.remember("a fact", session=session)
            memory.add_turn("user", "hello", session=session)
        assert memory.forget(session="ann") == 1
        assert memory.sessions() == ["bob"]
        assert memory.turns("ann") == []
        assert len(memory.turns("bob")) == 1

    def test_by_time(self, memory: Memory, clock: ManualClock) -> None:
        memory.remember("old")
        memory.add_turn("user", "old")
        clock.advance(10)
        memory.remember("new")
        memory.add_turn("user", "new")
        assert memory.forget(before=clock()) == 1
        assert texts(memory.recall("old")) == ["new"]
        assert [turn.content for turn in memory.turns()] == ["new"]

    def test_by_all_of_them(self, memory: Memory) -> None:
        names = [memory.remember("fact", session=session) for session in ("ann", "bob")]
        memory.add_turn("user", "hello", session="ann")
        assert memory.forget(names, session="ann") == 1
        assert memory.sessions() == ["ann", "bob"]

    def test_of_nothing_in_particular(self, memory: Memory) -> None:
        with pytest.raises(ValueError, match="needs ids, a session") as caught:
            memory.forget()
        assert "session" in notes_of(caught.value)
        with pytest.raises(TypeError, match=r"takes a list of ids"):
            memory.forget("abc")


LINE: dict[str, Any] = {
    "kind": "memory", "id": "a", "session": "s", "text": "t", "importance": 0.5, "created_at": 1, "recalled_at": 1,
    "expires_at": None, "metadata": {}, "vector": [1.0, 2.0],
}  # fmt: skip
HEAD = '{"kind": "sage-memory", "version": 1, "model": "words"}'


class TestExport:
    def test_what_was_exported_can_be_imported(self, memory: Memory, clock: ManualClock, tmp_path: Path) -> None:
        memory.remember("tea is hot", importance=0.1, metadata={"a": ["é", 1.5]})
        memory.remember("expires", ttl_s=100)
        memory.remember("of another session", session="\u2028 odd\nname")
        memory.add_turn("user", "hello")
        memory.add_turn("assistant", "hi")
        clock.advance(7)
        memory.recall("tea", k=1)
        assert memory.export(tmp_path / "all.jsonl") == 5
        assert memory.export(tmp_path / "one.jsonl", session="default") == 4
        embeddings = Words()
        with opened(tmp_path / "other.db", embeddings, clock=clock, half_life_s=DAY_S) as other:
            for _ in range(2):
                assert other.import_(tmp_path / "all.jsonl") == 5
            assert embeddings.texts_seen == 0
            assert other.turns() == memory.turns()
            assert other.recall("tea hot", session=None) == memory.recall("tea hot", session=None)
            other.export(tmp_path / "again.jsonl")
            clock.advance(100)
            assert other.count() == 2
        assert len((tmp_path / "again.jsonl").read_text().splitlines()) == 6
        assert sorted(os.listdir(tmp_path)) == sorted(
            [*(f"{name}.jsonl" for name in ("all", "one", "again")), *(n for n in os.listdir(tmp_path) if ".db" in n)]
        )

    def test_another_model_embeds_anew(self, tmp_path: Path) -> None:
        with opened(tmp_path / "memory.db") as memory:
            memory.remember_many(["one cat", "two dogs"])
            memory.export(tmp_path / "memory.jsonl")
        embeddings = Words(32, "other")
        with opened(tmp_path / "other.db", embeddings) as other:
            other.import_(tmp_path / "memory.jsonl")
            assert embeddings.texts_seen == 2
            assert texts(other.recall("cat", k=1)) == ["one cat"]

    @pytest.mark.parametrize(
        ("lines", "message"),
        [
            (["{not json"], "line 1: it is not JSON"),
            ([], "line 1: it is not JSON"),
            (["[1]"], r"line 1: it is \[1\], not an object"),
            (['{"kind": "other"}'], "line 1: it is not an export of a memory"),
            (['{"kind": "sage-memory", "version": 9}'], "line 1: it has version 9, not 1"),
            ([HEAD, "", "{"], "line 3: it is not JSON"),
            ([HEAD, '{"kind": "dream"}'], 'line 2: its kind is neither "memory" nor "turn"'),
            ([HEAD, '{"kind": "turn", "id": "a"}'], 'line 2: it lacks, or has extra, "at", "content"'),
            ([HEAD, json.dumps(LINE | {"more": 1})], 'line 2: it lacks, or has extra, "more"'),
            ([HEAD, json.dumps(LINE), json.dumps(LINE | {"text": 5})], 'line 3: its "text" is 5'),
            ([HEAD, json.dumps(LINE | {"vector": [1, math.nan]})], r'line 2: its "vector" is \[1, nan\]'),
            ([HEAD, json.dumps(LINE | {"vector": []})], r'line 2: its "vector" is \[\]'),
            ([HEAD, json.dumps(LINE | {"vector": [1, 1e39]})], r'line 2: its "vector" is \[1, 1e\+39\]'),
            ([HEAD, json.dumps(LINE | {"created_at": 10**400})], 'line 2: its "created_at" is 1000'),
            ([HEAD, json.dumps(LINE | {"text": "\ud800"})], r"line 2: its \"text\" is '\\ud800'"),
            ([HEAD, json.dumps(LINE | {"importance": 2})], 'line 2: its "importance" is 2, not from 0 to 1'),
            ([HEAD, json.dumps(LINE | {"expires_at": "x"})], "line 2: its \"expires_at\" is 'x'"),
            (
                [HEAD, json.dumps(LINE), json.dumps(LINE | {"id": "b", "vector": [1.0]})],
                "holds vectors of 2 numbers each, not 1",
            ),
        ],
    )
    def test_files_that_are_none(self, lines: list[str], message: str, tmp_path: Path) -> None:
        (tmp_path / "broken.jsonl").write_text("".join(f"{line}\n" for line in lines))
        with opened(tmp_path / "memory.db") as memory:
            with pytest.raises(ServiceError, match=message):
                memory.import_(tmp_path / "broken.jsonl")
            assert memory.count() == 0
            assert memory.remember("it goes on")

    def test_moments_may_be_whole_numbers(self, tmp_path: Path) -> None:
        (tmp_path / "whole.jsonl").write_text(f"{HEAD}\n{json.dumps(LINE | {'created_at': 10**30})}\n")
        with opened(tmp_path / "memory.db") as memory:
            assert memory.import_(tmp_path / "whole.jsonl") == 1

    def test_files_that_cannot_be_read_or_written(self, memory: Memory, tmp_path: Path) -> None:
        with pytest.raises(ServiceError, match=r'nowhere.jsonl" cannot be read: No such file'):
            memory.import_(tmp_path / "nowhere.jsonl")
        with pytest.raises(ServiceError, match=r'x.jsonl" cannot be written: No such file'):
            memory.export(tmp_path / "nowhere" / "x.jsonl")
        (tmp_path / "binary").write_bytes(b"\xff\xfe")
        with pytest.raises(ServiceError, match=r'binary" is not a text file'):
            memory.import_(tmp_path / "binary")
        (tmp_path / "folder").mkdir()
        with pytest.raises(ServiceError, match=r'folder" cannot be written: Is a directory'):
            memory.export(tmp_path / "folder")
        assert not [name for name in os.listdir(tmp_path) if "partial" in name]


class TestSurvival:
    def test_it_is_there_again_after_a_restart(self, tmp_path: Path) -> None:
        with opened(tmp_path / "memory.db") as memory:
            memory.remember("one cat", session="ann")
            memory.add_turn("user", "hello", session="ann")
        with opened(tmp_path / "memory.db") as memory:
            assert texts(memory.recall("cat", session="ann")) == ["one cat"]
            assert [turn.content for turn in memory.turns("ann")] == ["hello"]

    @pytest.mark.parametrize("threads", [1, 4])
    def test_a_program_that_is_killed_loses_at_most_the_writes_in_flight(self, tmp_path: Path, threads: int) -> None:
        text = """
            import os, sys, threading, itertools
            from services.kept import Words
            from sage.services.memory.memory import Memory
            memory = Memory("memory.db", Words())
            memory.setup()
            def work(thread):
                for number in itertools.count():
                    names = memory.remember_many([f"{thread} {number} first", f"{thread} {number} second"])
                    memory.add_turn("user", f"{number}", session=str(thread), importance=1)
                    os.write(1, f"{thread} {number} {' '.join(names)}\\n".encode())
            for thread in range(int(sys.argv[1])):
                threading.Thread(target=work, args=(thread,)).start()
        """
        said = [line.split() for line in killed_after(200, text, str(threads), folder=tmp_path)]
        with opened(tmp_path / "memory.db") as memory:
            found = {one.id for one in memory.recall("first second", k=1_000_000, session=None)}
            assert {name for _, _, *names in said for name in names} <= found
            for thread in range(threads):
                done = sum(1 for line in said if line[0] == str(thread))
                assert done <= memory.count(str(thread)) <= done + 1
            lone = len(said) * 2
            total = memory.count("default")
            assert lone <= total <= lone + 2 * threads
            assert total % 2 == 0, "half of a write is there"
            memory.remember("it goes on")

    def test_parallel_callers(self, memory: Memory) -> None:
        def work(number: int) -> None:
            session = f"session {number % 4}"
            for turn in range(12):
                name = memory.remember(f"thread {number} turn {turn}", session=session)
                memory.add_turn("user", f"{number} {turn}", session=session)
                assert f"thread {number} turn {turn}" in texts(
                    memory.recall(f"thread {number} turn {turn}", 500, session=session)
                )
                memory.turns(session)
                if turn % 3 == 2:
                    assert memory.forget([name]) == 1

        at_once(16, work)
        assert memory.count() == 16 * 8
        assert [len(memory.turns(f"session {number}")) for number in range(4)] == [20] * 4

    def test_two_memories_on_one_file(self, tmp_path: Path) -> None:
        with opened(tmp_path / "memory.db") as one:
            two = Memory(tmp_path / "memory.db", Words())
            two.setup()
            at_once(8, lambda number: (one if number % 2 else two).remember_many([f"{number} {i}" for i in range(20)]))
            assert one.count() == two.count() == 160
            two.cleanup()


class TestJobs:
    QUESTIONS = ("what is my cat called", "which tea do I like")

    @pytest.mark.parametrize("host", ["inline", "process"])
    @pytest.mark.parametrize("indexed", [False, True])
    def test_the_contract_of_sage(self, host: Any, indexed: bool, tmp_path: Path) -> None:
        """`memory.recall(q)` in a lambda, with the embeddings and the index as services of the same job."""
        options = ServiceOptions(host=host, concurrency=4)
        arrived: list[list[Recollection]] = []
        for task in ("tell", "ask"):
            with left_clean(), LocalEnvironment(task) as env:
                words = env.register_service("words", Words, options=options)
                index = env.register_service("shelf", Shelf, options=ServiceOptions(host=host)) if indexed else None
                memory = env.register_service(
                    "memory", Memory, tmp_path / "memory.db", words, index=index, options=options
                )
                if task == "tell":
                    env.from_batch(["my cat is called Tom", "I like green tea"]).map(memory.remember).print()
                    env.submit(autostop=True)
                else:
                    ask(env, memory, self.QUESTIONS, arrived)
        assert [found[0].text for found in arrived] == ["my cat is called Tom", "I like green tea"]
        assert os.listdir(tmp_path) == ["memory.db"]

    def test_an_object_as_embeddings_is_sent_along(self, tmp_path: Path) -> None:
        arrived: list[list[Recollection]] = []
        with left_clean(), LocalEnvironment("talk") as env:
            options = ServiceOptions(host="process")
            memory = env.register_service("memory", Memory, tmp_path / "memory.db", Words(), options=options)
            env.from_batch(["a cat"]).map(memory.remember).map(lambda _: memory.recall("cat")).sink(arrived.append)
            report = env.submit(autostop=True).wait()
        assert texts(arrived[0]) == ["a cat"]
        assert report.service("memory").errors == 0

    def test_a_memory_that_cannot_start_ends_the_job(self, tmp_path: Path) -> None:
        (tmp_path / "memory.db").write_text("this is a letter and no database, however long it may be" * 50)
        with left_clean(), LocalEnvironment("talk") as env:
            memory = env.register_service("memory", Memory, tmp_path / "memory.db", Words())
            env.from_batch(["a"]).map(memory.recall).print()
            with pytest.raises(JobError) as caught:
                env.submit(autostop=True)
        assert 'memory.db" is not an SQLite database' in str(caught.value.__cause__)


def ask(env: LocalEnvironment, memory: Any, questions: tuple[str, ...], arrived: list[Any]) -> None:
    env.from_batch(questions).map(lambda q: memory.recall(q)).sink(arrived.append)
    env.submit(autostop=True)


class Odd:
    """Embeddings that answer what they are told."""

    def __init__(self, answer: Any) -> None:
        self.answer = answer

    def embed(self, texts: Any) -> Any:
        return self.answer


class TestBadInput:
    def test_arguments_of_the_wrong_type(self, memory: Memory) -> None:
        wrong: Any = 5
        calls: list[Callable[[], object]] = [
            lambda: memory.remember(wrong),
            lambda: memory.remember_many(["a", wrong]),
            lambda: memory.remember("a", session=wrong),
            lambda: memory.recall(wrong),
            lambda: memory.recall("a", session=wrong),
            lambda: memory.add_turn(wrong, "a"),
            lambda: memory.add_turn("a", wrong),
            lambda: memory.turns(wrong),
            lambda: memory.forget([wrong]),
        ]
        for call in calls:
            with pytest.raises(
                TypeError, match=r"the (text|session|query|role|content|id) 5 is of type int, not a string"
            ):
                call()
        with pytest.raises(TypeError, match="takes a list of texts"):
            memory.remember_many("abc")
        with pytest.raises(ValueError, match="the text '\\\\ud800' cannot be written as UTF-8"):
            memory.remember("\ud800")
        assert memory.count() == 0

    @pytest.mark.parametrize("query", ["", " \n"])
    def test_blank_queries_and_texts(self, memory: Memory, query: str) -> None:
        with pytest.raises(ValueError, match="the query is empty"):
            memory.recall(query)
        with pytest.raises(ValueError, match="the text is empty"):
            memory.remember_many(["a", query])
        assert memory.count() == 0

    @pytest.mark.parametrize("k", [0, -1, 1.5, True, "3"])
    def test_counts_that_are_none(self, memory: Memory, k: Any) -> None:
        with pytest.raises(ValueError, match="not a whole number of at least 1"):
            memory.recall("a", k)

    @pytest.mark.parametrize("importance", [-0.1, 1.1, math.nan, True, "high"])
    def test_importances_that_are_none(self, memory: Memory, importance: Any) -> None:
        with pytest.raises(ValueError, match=r"the importance is .*, not a number from 0 to 1"):
            memory.remember("a", importance=importance)
        with pytest.raises(ValueError, match="the importance is"):
            memory.add_turn("user", "a", importance=importance)
        assert memory.turns() == []

    def test_other_values(self, memory: Memory, tmp_path: Path) -> None:
        with pytest.raises(ValueError, match="ttl_s is -1"):
            memory.remember("a", ttl_s=-1)
        with pytest.raises(TypeError, match=r"the value of 'metadata' is .*, which JSON cannot hold"):
            memory.remember("a", metadata={"x": {1}})
        with pytest.raises(ValueError, match="neither can be negative"):
            memory.turns(turns_max=-1)
        with pytest.raises(ValueError, match="ttl_s is 0"):
            Memory(tmp_path / "x", Words(), ttl_s=0)
        with pytest.raises(ValueError, match="half_life_s is nan"):
            Memory(tmp_path / "x", Words(), half_life_s=math.nan)
        with pytest.raises(ValueError, match="at least 1 turn"):
            Memory(tmp_path / "x", Words(), turns_max=0)
        with pytest.raises(ValueError, match="the weight of recency is -1"):
            Weights(recency=-1)
        with pytest.raises(ValueError, match="all three weights are 0"):
            Weights(0, 0, 0)

    @pytest.mark.parametrize(
        ("before", "kind", "message"),
        [
            ("2020-01-01", TypeError, "before is '2020-01-01', not a number"),
            (datetime.datetime(2020, 1, 1, tzinfo=datetime.UTC), TypeError, "before is datetime.datetime"),
            (datetime.date(2020, 1, 1), TypeError, "before is datetime.date"),
            (True, TypeError, "before is True, not a number"),
            ([1], TypeError, r"before is \[1\], not a number"),
            (math.nan, ValueError, "before is nan, not a finite number"),
            (math.inf, ValueError, "before is inf, not a finite number"),
            (10**400, ValueError, "before is 1000"),
        ],
    )
    def test_moments_that_are_none(self, memory: Memory, before: Any, kind: type[Exception], message: str) -> None:
        memory.remember("keep me")
        memory.add_turn("user", "hello")
        with pytest.raises(kind, match=message) as caught:
            memory.forget(before=before)
        assert "moment.timestamp()" in notes_of(caught.value)
        assert (memory.count(), len(memory.turns())) == (1, 1)

    def test_moments_of_other_types_of_numbers(self, memory: Memory, clock: ManualClock) -> None:
        early: Any = numpy.int64(5)
        late: Any = numpy.float32(clock() + DAY_S)
        memory.remember("a")
        assert memory.forget(before=early) == memory.forget(before=-(2**70)) == 0
        assert memory.forget(before=late) == 1

    @pytest.mark.parametrize("bound", [1.5, True, "3", math.nan, [1]])
    def test_bounds_that_are_none(self, memory: Memory, bound: Any, tmp_path: Path) -> None:
        for name in ("turns_max", "tokens_max"):
            with pytest.raises(TypeError, match=f"{name} is .*, not a whole number"):
                memory.turns(**{name: bound})
            with pytest.raises(TypeError, match=f"{name} is .*, not a whole number"):
                Memory(tmp_path / "x", Words(), **{name: bound})

    def test_bounds_that_are_large(self, tmp_path: Path) -> None:
        with opened(tmp_path / "memory.db", turns_max=10**30, tokens_max=10**30) as memory:
            one: Any = numpy.int64(1)
            memory.add_turn("user", "a")
            assert len(memory.turns(turns_max=10**30)) == len(memory.turns(turns_max=one)) == 1
            assert len(memory.recall("a", 10**30)) == 0

    @pytest.mark.parametrize(
        ("settings", "kind", "message"),
        [
            ({"half_life_s": "1"}, TypeError, "half_life_s is '1', not a number"),
            ({"half_life_s": True}, TypeError, "half_life_s is True, not a number"),
            ({"half_life_s": None}, TypeError, "half_life_s is None, not a number"),
            ({"half_life_s": 10**400}, ValueError, "half_life_s is 1000"),
            ({"ttl_s": "1"}, TypeError, "ttl_s is '1', not a number"),
            ({"weights": (1, 1, 1)}, TypeError, r"weights is \(1, 1, 1\), not Weights"),
            ({"weights": {}}, TypeError, r"weights is \{\}, not Weights"),
        ],
    )
    def test_settings_that_are_none(
        self, settings: dict[str, Any], kind: type[Exception], message: str, tmp_path: Path
    ) -> None:
        with pytest.raises(kind, match=message):
            Memory(tmp_path / "x", Words(), **settings)

    @pytest.mark.parametrize("weight", [True, "1", math.nan, 10**400, None])
    def test_weights_that_are_none(self, weight: Any, memory: Memory) -> None:
        with pytest.raises(ValueError, match="the weight of recency is"):
            Weights(recency=weight)
        with pytest.raises(TypeError, match=r"weights is .*, not Weights"):
            memory.recall("a", weights=weight if weight is not None else {})  # type: ignore[arg-type]

    @pytest.mark.parametrize("metadata", [[1], [("a", 1)], "ab", 5, [], 0])
    def test_metadata_that_is_none(self, memory: Memory, metadata: Any) -> None:
        with pytest.raises(TypeError, match=r"the metadata is .*, not a mapping"):
            memory.remember("a", metadata=metadata)
        assert memory.count() == 0

    def test_lists_and_sessions_that_are_none(self, memory: Memory) -> None:
        wrong: Any = 5
        with pytest.raises(TypeError, match=r"remember_many\(5\) takes a list of texts"):
            memory.remember_many(wrong)
        with pytest.raises(TypeError, match=r"forget\(5\) takes a list of ids"):
            memory.forget(wrong)
        calls: list[Callable[[], object]] = [
            lambda: memory.forget(session=wrong),
            lambda: memory.count(wrong),
            lambda: memory.export("nowhere/x.jsonl", session=wrong),
        ]
        for call in calls:
            with pytest.raises(TypeError, match="the session 5 is of type int, not a string"):
                call()

    def test_texts_may_come_one_by_one(self, memory: Memory) -> None:
        texts: Any = (text for text in ["a cat", "a dog"])
        assert len(memory.remember_many(texts)) == memory.count() == 2

    @pytest.mark.parametrize(
        ("answer", "message"),
        [
            ([[1.0, math.nan]], "a vector with NaN or infinity for 'a text'"),
            ([[1.0, math.inf]], "a vector with NaN or infinity for 'a text'"),
            ([1.0, 2.0], r"an array of shape \(2,\) for 1 texts"),
            ([[1.0], [2.0]], r"an array of shape \(2, 1\) for 1 texts"),
            ([[]], r"an array of shape \(1, 0\) for 1 texts"),
            ("no", "which is not an array of numbers"),
            (None, r"shape|no array of numbers"),
            ([[1, 2], [3]], "which is not an array of numbers"),
        ],
    )
    def test_vectors_that_are_none(self, answer: Any, message: str, tmp_path: Path) -> None:
        with opened(tmp_path / "memory.db", Odd(answer)) as memory:
            with pytest.raises(ServiceError, match=message):
                memory.remember("a text")
            assert memory.count() == 0

    def test_another_model_than_before(self, tmp_path: Path) -> None:
        with opened(tmp_path / "memory.db") as memory:
            memory.remember("a")
        with left_clean(), pytest.raises(ServiceError, match="holds vectors of model 'words', not 'other'") as caught:
            Memory(tmp_path / "memory.db", Words(name="other")).setup()
        assert "Export" in notes_of(caught.value)
        with opened(tmp_path / "memory.db", Odd([[1.0, 2.0]])) as memory:
            with pytest.raises(ServiceError, match="holds vectors of 64 numbers each, not 2"):
                memory.recall("a")
            with pytest.raises(ServiceError, match="holds vectors of 64 numbers each"):
                memory.remember("a")

    def test_before_setup_and_after_cleanup(self, tmp_path: Path) -> None:
        memory = Memory(tmp_path / "memory.db", Words())
        with pytest.raises(ServiceUnavailableError, match="is not open") as caught:
            memory.recall("a")
        assert "setup()" in notes_of(caught.value)
        assert not memory.health()


def test_calls_that_are_refused_are_counted(tmp_path: Path) -> None:
    with opened(tmp_path / "memory.db") as memory:
        with pytest.raises(ValueError, match="is empty"):
            memory.recall(" ")
        with pytest.raises(ValueError, match="is empty"):
            memory.remember_many(["a", " "])
        with pytest.raises(ValueError, match="importance"):
            memory.add_turn("user", "a", importance=2)
        with pytest.raises(ValueError, match="negative"):
            memory.turns(turns_max=-1)
        with pytest.raises(ValueError, match="needs ids, a session"):
            memory.forget()
        with pytest.raises(ServiceError, match="cannot be read"):
            memory.import_(tmp_path / "none")
        assert {name: (found.calls, found.errors) for name, found in memory.measures().items()} == dict.fromkeys(
            ["add_turn", "forget", "import_", "recall", "remember", "turns"], (1, 1)
        )


def test_it_measures_and_describes_itself(tmp_path: Path) -> None:
    with opened(tmp_path / "memory.db") as memory:
        memory.remember_many(["a", "b"])
        memory.recall("a")
        assert memory.health()
        assert {name: found.calls for name, found in memory.measures().items()} == {"remember": 1, "recall": 1}
        assert memory.describe() == {
            "service": "Memory",
            "path": str(tmp_path / "memory.db"),
            "model": "words",
            "turns_max": 20,
            "tokens_max": 2000,
            "half_life_s": pytest.approx(5.76 * DAY_S, rel=0.01),
            "ttl_s": None,
        }
