"""The keyword index: what it finds, in which order, what it forgets, and what it survives."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING

import pytest

from sage import LocalEnvironment, ServiceError, ServiceOptions, ServiceUnavailableError
from sage.rag.keywords import KeywordIndex
from sage.services.filters import matches
from sage.testing import assert_clean

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

TEXTS = {
    "a": "The guardian watches the driver.",
    "b": "A driver submits a job; the job has tasks.",
    "c": "Caf\u00e9s serve coffee. call_service is a method.",
    "d": "\u4f60\u597d\u4e16\u754c and nothing else",
}


@pytest.fixture(params=["memory", "file"])
def index(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[KeywordIndex]:
    with assert_clean():
        index = KeywordIndex(None if request.param == "memory" else tmp_path / "words.db")
        index.setup()
        index.upsert(list(TEXTS), list(TEXTS.values()), metadatas=[{"place": place} for place in range(4)])
        yield index
        index.cleanup()


def ids(index: KeywordIndex, query: str, **settings: object) -> list[str]:
    where = settings.get("where")
    return [hit.id for hit in index.search(query, where=where if isinstance(where, dict) else None)]


class TestWhatIsFound:
    def test_rare_words_count_most_and_scores_fall(self, index: KeywordIndex) -> None:
        assert ids(index, "Which job does the driver submit?") == ["b", "a"]
        hits = index.search("driver job")
        assert [hit.id for hit in hits] == ["b", "a"]
        assert hits[0].score > hits[1].score > 0
        assert hits[0].document == TEXTS["b"]
        assert hits[0].metadata == {"place": 1}
        assert [hit.id for hit in index.search("driver job", 1)] == ["b"]

    def test_forms_of_words_accents_and_parts_are_the_same_word(self, index: KeywordIndex) -> None:
        assert ids(index, "submitting") == ["b"]
        assert ids(index, "cafe") == ["c"]
        assert ids(index, "call_service") == ["c"]
        assert ids(index, "service_call") == []

    def test_languages_without_spaces(self, index: KeywordIndex) -> None:
        assert ids(index, "\u4e16\u754c\u5462") == ["d"]

    def test_signs_and_operators_mean_nothing(self, index: KeywordIndex) -> None:
        assert ids(index, '"guardian" AND NOT (driver*) : - ^ {x} NEAR') == ["a", "b"]
        assert ids(index, "?!") == []
        assert ids(index, "a " * 100_000 + "guardian") == ["a"]

    def test_frequent_words_are_looked_up_only_when_there_are_no_others(self, index: KeywordIndex) -> None:
        assert ids(index, "the tasks") == ["b"]
        assert set(ids(index, "the")) == {"a", "b"}

    def test_a_heading_counts_more(self, index: KeywordIndex) -> None:
        index.upsert(["e", "f"], ["blue sky", "green grass"], metadatas=[{}, {"heading": "Blue things"}])
        assert ids(index, "blue") == ["f", "e"]

    @pytest.mark.parametrize("where", [{"place": 1}, {"place": {"$gt": 0}}, {"$not": {"place": 1}}, {"other": 1}])
    def test_a_filter_is_what_it_is_everywhere(self, index: KeywordIndex, where: dict[str, object]) -> None:
        expected = [hit.id for hit in index.search("driver") if matches(where, hit.metadata)]
        assert ids(index, "driver", where=where) == expected

    def test_what_cannot_be_asked(self, index: KeywordIndex) -> None:
        with pytest.raises(ValueError, match="the query ' ' is blank"):
            index.search(" ")
        with pytest.raises(ValueError, match="k is 0"):
            index.search("driver", 0)
        assert "search" not in index.measures()


class TestWhatIsKept:
    def test_an_id_is_kept_once(self, index: KeywordIndex) -> None:
        index.upsert(["a", "a"], ["first", "second"])
        assert (ids(index, "guardian"), ids(index, "first"), ids(index, "second")) == ([], [], ["a"])
        assert index.count() == 4

    def test_what_is_deleted_is_forgotten(self, index: KeywordIndex) -> None:
        assert index.delete(["b", "none"]) == 1
        assert ids(index, "job") == []
        assert index.delete(["a", "c"], where={"place": 2}) == 1
        index.upsert(["x", "y"], ["one", "two"], metadatas=[{"document": "m"}, {"document": "n"}])
        assert index.delete(where={"document": {"$in": ["m", "o"]}}) == 1
        assert index.delete(where={"document": {"$ne": "n"}}) == 2
        assert (index.delete(where={}), index.count()) == (1, 0)
        with pytest.raises(ValueError, match="neither ids nor a filter"):
            index.delete()

    @pytest.mark.parametrize(
        ("arguments", "metadatas", "message"),
        [
            ((["x", ""], ["1", "2"]), None, "an id is empty"),
            ((["x"], ["1", "2"]), None, "1 ids, 2 documents and 1 metadatas"),
            ((["x", "y"], ["1", "2"]), [{}, {"n": float("nan")}], "metadata 'n' of id 'y' is not finite"),
        ],
    )
    def test_nothing_of_a_wrong_call_is_stored(
        self,
        index: KeywordIndex,
        arguments: tuple[list[str], list[str]],
        metadatas: list[dict[str, float]] | None,
        message: str,
    ) -> None:
        with pytest.raises(ValueError, match=message):
            index.upsert(*arguments, metadatas=metadatas)
        assert index.count() == 4

    def test_many_threads(self, index: KeywordIndex) -> None:
        def work(number: int) -> list[str]:
            index.upsert([f"n{number}"], [f"number n{number}"])
            return ids(index, f"n{number}")

        with ThreadPoolExecutor(8) as threads:
            assert list(threads.map(work, range(40))) == [[f"n{number}"] for number in range(40)]
        assert index.count() == 44
        assert index.measures()["upsert"].calls == 41

    def test_half_of_a_surrogate_pair(self, index: KeywordIndex) -> None:
        index.upsert(["s"], ["broken \ud800 text"])
        assert [hit.document for hit in index.search("broken")] == ["broken ? text"]


class TestItsLife:
    def test_it_opens_again_with_all_it_had(self, tmp_path: Path) -> None:
        for count in (1, 2):
            with assert_clean():
                index = KeywordIndex(tmp_path / "words.db")
                index.setup()
                index.upsert([f"id{count}"], ["driver"])
                assert index.count() == count
                assert index.health()
                index.cleanup()
                index.cleanup()
            assert [path.name for path in tmp_path.iterdir()] == ["words.db"]
            assert not index.health()

    def test_in_a_job(self, tmp_path: Path) -> None:
        found: list[str] = []
        with assert_clean():
            env = LocalEnvironment("keywords")
            index = env.register_service(
                "keywords", KeywordIndex, tmp_path / "words.db", options=ServiceOptions(concurrency=4)
            )
            pairs = env.from_batch(TEXTS.items())
            pairs.map(lambda pair: (index.upsert([pair[0]], [pair[1]]), pair[0])[1], parallelism=3).map(
                lambda id_: index.search(TEXTS[id_])[0].id
            ).sink(found.append)
            env.submit(autostop=True)
        assert sorted(found) == list(TEXTS)

    def test_it_is_not_used_before_and_after_its_life(self, tmp_path: Path) -> None:
        for index in (KeywordIndex(), KeywordIndex(tmp_path / "words.db")):
            with pytest.raises(ServiceUnavailableError, match="is not open"):
                index.search("driver")

    def test_a_file_that_is_no_database(self, tmp_path: Path) -> None:
        path = tmp_path / "words.db"
        path.write_text("This is a letter to a friend. " * 100, "utf-8")
        index = KeywordIndex(path)
        with assert_clean(), pytest.raises(ServiceError, match=r"words.db. is no SQLite database"):
            index.setup()
        index.cleanup()

    def test_it_says_what_it_is(self, tmp_path: Path) -> None:
        assert KeywordIndex().describe() == {"service": "KeywordIndex", "path": "memory", "heading_weight": 2.0}
        with pytest.raises(ValueError, match="heading_weight is -1"):
            KeywordIndex(heading_weight=-1)

    def test_a_killed_writer_loses_at_most_the_batch_in_flight(self, tmp_path: Path) -> None:
        path = tmp_path / "words.db"
        writer = subprocess.Popen(
            [sys.executable, "-c", WRITER, str(path)], stdout=subprocess.PIPE, text=True, env=dict(os.environ)
        )
        assert writer.stdout is not None
        told = 0
        for line in writer.stdout:
            told = json.loads(line)
            if told >= 5:
                writer.send_signal(signal.SIGKILL)
                break
        rest = [json.loads(line) for line in writer.stdout if line.endswith("\n")]
        writer.stdout.close()
        assert writer.wait(30) == -signal.SIGKILL
        told = max([told, *rest])
        index = KeywordIndex(path)
        index.setup()
        batches = index.count() / 100
        assert batches in (told, told + 1)
        assert len(index.search("word", 10_000)) == index.count()
        index.cleanup()


WRITER = """
import itertools, sys
from sage.rag.keywords import KeywordIndex

index = KeywordIndex(sys.argv[1])
index.setup()
for batch in itertools.count(1):
    index.upsert([f"{batch}-{number}" for number in range(100)], ["a word"] * 100)
    print(batch, flush=True)
"""
