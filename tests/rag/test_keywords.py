"""The keyword index: what it finds, in which order, what it forgets, and what it survives."""

from __future__ import annotations

import json
import math
import os
import signal
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

import numpy
import pytest
from services.kept import left_clean, notes_of

from sage import LocalEnvironment, ServiceError, ServiceOptions, ServiceUnavailableError
from sage.rag.keywords import KeywordIndex
from sage.services.vectors.filters import matches

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
    with left_clean():
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
        with pytest.raises(ValueError, match="the query ' ' is empty"):
            index.search(" ")
        with pytest.raises(ValueError, match="k is 0"):
            index.search("driver", 0)
        assert (index.measures()["search"].calls, index.measures()["search"].errors) == (2, 2)

    @pytest.mark.parametrize("k", [0, -1, 2.5, True, "3", None])
    def test_counts_that_are_none(self, index: KeywordIndex, k: Any) -> None:
        with pytest.raises(ValueError, match=r"k is .*, not a whole number from 1 on"):
            index.search("driver", k)

    def test_counts_of_numpy(self, index: KeywordIndex) -> None:
        one: Any = numpy.int64(1)
        assert [hit.id for hit in index.search("driver job", one)] == ["b"]

    @pytest.mark.parametrize("query", [5, None, b"driver"])
    def test_queries_that_are_none(self, index: KeywordIndex, query: Any) -> None:
        with pytest.raises(TypeError, match=r"the query .* is of type \w+, not a string"):
            index.search(query)
        with pytest.raises(TypeError, match=r"the query .* is of type \w+, not a string"):
            index.search_batch(["driver", query])

    @pytest.mark.parametrize("queries", ["driver", b"driver", 5, None])
    def test_batches_that_are_none(self, index: KeywordIndex, queries: Any) -> None:
        with pytest.raises(TypeError, match=r"queries is .*, not a list") as caught:
            index.search_batch(queries)
        assert "brackets" in notes_of(caught.value)


class TestWhatIsKept:
    def test_an_id_is_kept_once(self, index: KeywordIndex) -> None:
        index.upsert(["a", "a"], ["first", "second"])
        assert (ids(index, "guardian"), ids(index, "first"), ids(index, "second")) == ([], [], ["a"])
        assert index.count() == 4

    def test_many_ids_of_any_letters_are_replaced_and_deleted(self, index: KeywordIndex) -> None:
        many = [f"{number}\0" for number in range(1_100)]
        for text in ("An old owl.", "A new wren."):
            index.upsert(many, [text] * len(many))
        assert index.count() == len(TEXTS) + len(many)
        assert (index.search("owl"), len(index.search("wren", 2_000))) == ([], len(many))
        assert index.delete([*many, *many]) == len(many)
        assert (index.search("wren"), index.count()) == ([], len(TEXTS))

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
            ((["x", ""], ["1", "2"]), None, "id 1 is '', which is empty"),
            ((["x"], ["1", "2"]), None, "1 ids, 2 documents and 1 metadatas"),
            ((["x", "y"], ["1", "2"]), [{}, {"n": math.nan}], "metadata of id 'y' has 'n': nan, which is not finite"),
            (
                (["x", "y"], ["1", "2"]),
                [{}, {"n": b"x"}],
                "metadata of id 'y' has 'n': b'x', which is of type bytes",
            ),
            ((["x"], ["1"]), [{"": 1}], "metadata of id 'x' has the field ''"),
            ((["x"], ["1"]), [{"$a": 1}], r"metadata of id 'x' has the field '\$a'"),
            ((["x"], ["1"]), [{1: 1}], "metadata of id 'x' has the field 1"),
            ((["x"], ["1"]), [[1]], r"metadata of id 'x' is \[1\], not a mapping"),
            ((["x"], ["1"]), {"n": 1}, "metadata of id 'x' is 'n', not a mapping"),
            ((["x"], ["1"]), "n", "metadatas is 'n', not a list"),
            ((["x"], ["1"]), 5, "metadatas is 5, not a list"),
            ((["x", 5], ["1", "2"]), None, "id 1 is 5, of type int and not a string"),
            ((["x", "\ud800"], ["1", "2"]), None, "id 1 is '.ud800', which has half of a surrogate pair"),
            (("xyz", "123"), None, "ids is 'xyz', not a list"),
            ((None, ["1"]), None, "ids is None, not a list"),
            ((["x"], "1"), None, "documents is '1', not a list"),
            ((["x"], None), None, "documents is None, not a list"),
            ((["x", "y"], ["1", None]), None, "document of id 'y' is of type NoneType"),
            ((["x", "y"], ["1", 5]), None, "document of id 'y' is of type int"),
        ],
    )
    def test_nothing_of_a_wrong_call_is_stored(
        self, index: KeywordIndex, arguments: tuple[Any, Any], metadatas: Any, message: str
    ) -> None:
        with pytest.raises((ValueError, TypeError), match=message):
            index.upsert(*arguments, metadatas=metadatas)
        assert index.count() == 4
        assert index.measures()["upsert"].errors == 1

    def test_what_may_be_left_out_or_comes_one_by_one(self, index: KeywordIndex) -> None:
        metadatas: Any = (metadata for metadata in [None, {"n": 1}])
        texts: Any = (text for text in ["first", "second"])
        index.upsert(("x", "y"), texts, metadatas=metadatas)
        assert [index.search(word)[0].metadata for word in ("first", "second")] == [{}, {"n": 1}]

    @pytest.mark.parametrize("wrong", ["abcd", b"abcd", 5, ["a", 5], ["a", ""]])
    def test_nothing_of_a_wrong_call_is_deleted(self, index: KeywordIndex, wrong: Any) -> None:
        with pytest.raises((ValueError, TypeError), match=r"ids? .*(not a list|not a string|is empty)"):
            index.delete(wrong)
        with pytest.raises(TypeError, match="a filter is a mapping"):
            index.delete(["a"], where=wrong)
        with pytest.raises(ValueError, match="neither ids nor a filter"):
            index.delete()
        assert index.count() == 4
        assert (index.measures()["delete"].calls, index.measures()["delete"].errors) == (3, 3)

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
            with left_clean():
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
        with left_clean():
            env = LocalEnvironment("keywords")
            index: Any = env.register_service(
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
        with left_clean(), pytest.raises(ServiceError, match=r"words.db. is not an SQLite database"):
            index.setup()
        index.cleanup()

    @pytest.mark.parametrize("weight", [-1, math.nan, math.inf, 1e308, True, "2", None])
    def test_a_weight_that_is_none(self, weight: Any) -> None:
        with pytest.raises(ValueError, match=r"heading_weight is .*, not a number from 0 to 1,000,000"):
            KeywordIndex(heading_weight=weight)

    def test_frequent_words_that_are_no_words(self) -> None:
        with pytest.raises(TypeError, match="frequent_words is 'the', not a list"):
            KeywordIndex(frequent_words="the")

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
