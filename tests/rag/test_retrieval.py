"""Passages are put into indexes, found by one way or both, fused and reranked."""

from __future__ import annotations

from contextlib import contextmanager
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import pytest
from hypothesis import given
from hypothesis import strategies as some
from services.kept import left_clean

from sage import FunctionError, GraphError, LocalEnvironment, ProcessFunction, ServiceUnavailableError
from sage.rag.documents import Document, Passage
from sage.rag.keywords import KeywordIndex
from sage.rag.loaders import Files, Load
from sage.rag.retrieval import Found, Index, Question, Retrieve, Retrieved, fuse, metadata_of, passage_of
from sage.rag.splitters import SplitByStructure
from sage.services.models.embeddings import HashingEmbeddings
from sage.services.vectors.contract import Hit
from sage.services.vectors.numpy import NumpyStore
from sage.services.vectors.sqlite import SqliteStore

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence
    from contextlib import AbstractContextManager
    from pathlib import Path

    Store = NumpyStore | SqliteStore

PASSAGES = [
    Passage("a.md#keys", "The same key goes to the same task.", "a.md", 8, 43, "Keys", {"file": "a.md"}),
    Passage("a.md#stop", "A stop drains what is in flight.", "a.md", 50, 82, "Stopping", {"file": "a.md"}),
    Passage("b.md", "Sources read records from files.", "b.md", 0, 32, "", {"file": "b.md"}),
]


@contextmanager
def opened(keywords: KeywordIndex, vectors: Store) -> Iterator[tuple[KeywordIndex, Store, HashingEmbeddings]]:
    """Lend the three services, set up by hand."""
    embeddings = HashingEmbeddings()
    with left_clean():
        for service in (keywords, vectors, embeddings):
            service.setup()
        yield keywords, vectors, embeddings
        for service in (keywords, vectors, embeddings):
            service.cleanup()


def services() -> AbstractContextManager[tuple[KeywordIndex, Store, HashingEmbeddings]]:
    """Lend services in memory."""
    return opened(KeywordIndex(), NumpyStore())


def ids(retrieved: Retrieved) -> list[str]:
    return [found.passage.id for found in retrieved.found]


class TestFusion:
    def test_the_sum_of_reciprocal_ranks(self) -> None:
        assert fuse([["a", "b", "c"], ["c", "a"]]) == {"a": 1 / 11 + 1 / 12, "c": 1 / 13 + 1 / 11, "b": 1 / 12}
        assert list(fuse([["a", "b", "c"], ["c", "a"]])) == ["a", "c", "b"]
        assert list(fuse([["a", "b"], ["b", "a"]])) == ["a", "b"]
        assert list(fuse([["a", "b"], ["b", "a"]], weights=[1.0, 1.1])) == ["b", "a"]
        assert list(fuse([["a", "b"], ["b"]], constant=0)) == ["b", "a"]
        assert fuse([]) == {}

    @given(some.lists(some.permutations("abcdef"), min_size=1, max_size=4))
    def test_what_is_first_everywhere_is_first(self, rankings: list[list[str]]) -> None:
        firsts = [["z", *ranking] for ranking in rankings]
        assert next(iter(fuse(firsts))) == "z"
        assert set(fuse(firsts)) == set("abcdefz")

    @given(some.permutations("abcdef"))
    def test_one_ranking_stays_as_it_is(self, ranking: list[str]) -> None:
        assert list(fuse([ranking])) == ranking


class TestByHand:
    def test_each_way_and_both(self) -> None:
        with services() as (keywords, vectors, embeddings):
            Index(keywords=keywords, vectors=vectors, embeddings=embeddings).execute(PASSAGES)
            ways: list[Retrieve] = [
                Retrieve(1, keywords=keywords),
                Retrieve(1, vectors=vectors, embeddings=embeddings),
                Retrieve(1, keywords=keywords, vectors=vectors, embeddings=embeddings),
            ]
            for way in ways:
                (found,) = way.execute("Which task gets a key?").found
                assert found.passage == PASSAGES[0]
                assert found.score > 0

    def test_a_batch_is_what_its_questions_are(self) -> None:
        questions = [Question("Which task gets a key?", "1"), Question("it?", "2", query="sources and files")]
        with services() as (keywords, vectors, embeddings):
            Index(keywords=keywords, vectors=vectors, embeddings=embeddings).execute(PASSAGES)
            retrieve = Retrieve(2, keywords=keywords, vectors=vectors, embeddings=embeddings)
            batch = retrieve.execute(questions)
            assert batch == [retrieve.execute(question) for question in questions]
            assert ids(batch[1])[0] == "b.md"

    def test_of_a_batch_the_refused_are_left_out_and_the_others_are_stored(self) -> None:
        broken = replace(PASSAGES[1], text="half of a pair: \ud800")
        with services() as (keywords, vectors, embeddings):
            index = Index(keywords=keywords, vectors=vectors, embeddings=embeddings)
            first, error, last = index.execute([PASSAGES[0], broken, PASSAGES[2]])
            assert (first, last) == (PASSAGES[0], PASSAGES[2])
            assert isinstance(error, ValueError)
            assert f"id {broken.id!r} has half of a surrogate pair" in str(error)
            assert keywords.count() == vectors.count() == 2
            with pytest.raises(ValueError, match="has half of a surrogate pair"):
                index.execute(broken)

    def test_of_a_batch_of_questions_a_blank_one_has_no_answer(self) -> None:
        with services() as (keywords, vectors, embeddings):
            Index(keywords=keywords, vectors=vectors, embeddings=embeddings).execute(PASSAGES)
            retrieve = Retrieve(2, keywords=keywords, vectors=vectors, embeddings=embeddings)
            answered, error = retrieve.execute([Question("Which task gets a key?"), Question(" ")])
            assert answered == retrieve.execute("Which task gets a key?")
            assert (type(error), str(error)) == (ValueError, "the question is empty")

    @pytest.mark.parametrize("wrong", [Document("a.md", "text"), "text", {"question": "what"}, 7])
    def test_what_is_no_passage_is_refused_with_a_hint(self, wrong: Any) -> None:
        with services() as (keywords, vectors, embeddings):
            index = Index(keywords=keywords, vectors=vectors, embeddings=embeddings)
            with pytest.raises(TypeError, match="Index takes passages, not ") as caught:
                index.execute(wrong)
            assert caught.value.__notes__ == ["Documents become passages by SplitByStructure or SplitByTokens."]
            first, error = index.execute([PASSAGES[0], wrong])
            assert first == PASSAGES[0]
            assert isinstance(error, TypeError)

    @pytest.mark.parametrize("wrong", [{"question": "what"}, 7, None, PASSAGES[0]])
    def test_what_is_no_question_is_refused_with_a_hint(self, wrong: Any) -> None:
        refused = pytest.raises(TypeError, match="a question is a text or a Question, not ")
        with services() as (keywords, _, _), refused:
            Retrieve(keywords=keywords).execute(wrong)

    def test_where_nobody_answers_the_batch_has_failed_as_a_whole(self) -> None:
        with services() as (keywords, vectors, embeddings):
            index = Index(keywords=keywords, vectors=vectors, embeddings=embeddings)
            retrieve = Retrieve(2, keywords=keywords)
        with pytest.raises(ServiceUnavailableError, match="is not set up"):
            index.execute(PASSAGES)
        with pytest.raises(ServiceUnavailableError, match="is not open"):
            retrieve.execute([Question("Which task gets a key?")])

    def test_a_filter_holds_for_both_ways(self) -> None:
        with services() as (keywords, vectors, embeddings):
            Index(keywords=keywords, vectors=vectors, embeddings=embeddings).execute(PASSAGES)
            retrieve = Retrieve(
                keywords=keywords, vectors=vectors, embeddings=embeddings, where={"file": {"$ne": "a.md"}}
            )
            assert ids(retrieve.execute("Which task gets a key from a source?")) == ["b.md"]

    def test_reranking_sees_all_candidates(self) -> None:
        seen: list[int] = []

        def longest_last(question: Question, found: Sequence[Found]) -> Sequence[Found]:
            assert question.text == "key stop sources"
            seen.append(len(found))
            return sorted(found, key=lambda each: len(each.passage.text))

        with services() as (keywords, vectors, embeddings):
            Index(keywords=keywords, vectors=vectors, embeddings=embeddings).execute(PASSAGES)
            retrieve = Retrieve(2, keywords=keywords, rerank=longest_last)
            assert set(ids(retrieve.execute("key stop sources"))) == {"a.md#stop", "b.md"}
        assert seen == [3]

    def test_indexing_again_leaves_nothing_of_the_older_version(self) -> None:
        with services() as (keywords, vectors, embeddings):
            Index(keywords=keywords, vectors=vectors, embeddings=embeddings).execute(PASSAGES)
            again = Index(keywords=keywords, vectors=vectors, embeddings=embeddings)
            assert again.execute(PASSAGES[1]) == PASSAGES[1]
            assert again.execute(PASSAGES[1:]) == PASSAGES[1:]
            assert keywords.count() == vectors.count() == 2
            assert ids(Retrieve(keywords=keywords).execute("same key")) == []

    def test_of_two_passages_with_one_id_the_later_one_counts_however_batches_fall(self) -> None:
        twice = [*PASSAGES, replace(PASSAGES[0], text="Sources have a key."), PASSAGES[2]]
        for size in range(1, len(twice) + 1):
            with services() as (keywords, vectors, embeddings):
                index = Index(keywords=keywords, vectors=vectors, embeddings=embeddings)
                for start in range(0, len(twice), size):
                    assert index.execute(twice[start : start + size]) == twice[start : start + size]
                assert keywords.count() == vectors.count() == 3
                for way in (Retrieve(1, keywords=keywords), Retrieve(1, vectors=vectors, embeddings=embeddings)):
                    assert [found.passage.text for found in way.execute("a key").found] == ["Sources have a key."]

    def test_a_blank_question(self) -> None:
        with services() as (keywords, vectors, embeddings):
            retrieve = Retrieve(vectors=vectors, embeddings=embeddings)
            with pytest.raises(ValueError, match="the question is empty"):
                retrieve.execute(" \n")
            assert retrieve.execute("anything") == Retrieved(Question("anything"), ())
            assert keywords.count() == 0

    @pytest.mark.parametrize("make", [Index, Retrieve])
    def test_services_that_lead_nowhere(self, make: type[Index] | type[Retrieve]) -> None:
        with pytest.raises(GraphError, match="neither keywords nor vectors are given"):
            make()
        with pytest.raises(GraphError, match="vectors is given without embeddings"):
            make(vectors=NumpyStore())
        with pytest.raises(GraphError, match="embeddings is given without vectors"):
            make(keywords=KeywordIndex(), embeddings=HashingEmbeddings())

    def test_no_passage_is_asked_for(self) -> None:
        with pytest.raises(GraphError, match="k is 0"):
            Retrieve(0, keywords=KeywordIndex())


def test_a_passage_comes_back_as_it_was() -> None:
    for passage in PASSAGES:
        assert passage_of(Hit(passage.id, 1.0, passage.text, metadata_of(passage))) == passage
    assert passage_of(Hit("x", 1.0, None, {})) == Passage("x", "", "")


def indexed(folder: Path, questions: list[str], on_error: Any = None) -> tuple[list[list[str]], str]:
    """Index a folder and ask questions in one environment, by two jobs."""
    answers: list[list[str]] = []
    with left_clean():
        env = LocalEnvironment("rag")
        keywords = env.register_service("keywords", KeywordIndex)
        vectors = env.register_service("vectors", NumpyStore)
        embeddings = env.register_service("embeddings", HashingEmbeddings)
        stored = (
            env.from_batch(Files, folder)
            .flatmap(Load)
            .flatmap(SplitByStructure, 40)
            .map_batches(Index, max_records=16, keywords=keywords, vectors=vectors, embeddings=embeddings)
        )

        class Ask(ProcessFunction[Passage, str]):
            """Waits for the last passage, then asks."""

            def execute(self, data: Passage) -> list[str]:
                return []

            def finish(self) -> list[str]:
                return questions

        retrieve = Retrieve(1, keywords=keywords, vectors=vectors, embeddings=embeddings)
        stored.process(Ask).map(retrieve, name="retrieve", on_error=on_error).map(ids).sink(answers.append)
        return answers, str(env.submit(autostop=True).report)


def kept(folder: Path, *, anew: bool) -> list[str]:
    """Index the folder "docs" and return which documents are in both indexes then."""
    with left_clean():
        env = LocalEnvironment("rag")
        handles: dict[str, Any] = {
            "keywords": env.register_service("keywords", KeywordIndex, folder / "words.db"),
            "vectors": env.register_service("vectors", SqliteStore, folder / "vectors.db"),
            "embeddings": env.register_service("embeddings", HashingEmbeddings),
        }
        passages = env.from_batch(Files, folder / "docs").flatmap(Load).flatmap(SplitByStructure)
        passages.map_batches(Index(**handles, anew=anew)).sink(lambda _: None)
        env.submit(autostop=True)
    keywords, vectors = KeywordIndex(folder / "words.db"), SqliteStore(folder / "vectors.db")
    with opened(keywords, vectors) as (_, _, embeddings):
        ways = (Retrieve(keywords=keywords), Retrieve(vectors=vectors, embeddings=embeddings))
        one, other = (sorted(found.passage.document for found in way.execute("all").found) for way in ways)
    assert one == other
    return one


class TestInAJob:
    def test_a_folder_is_indexed_and_asked(self, tmp_path: Path) -> None:
        (tmp_path / "guide.md").write_text("# Keys\n\nSame key, same task.\n\n# Stopping\n\nIt drains.\n", "utf-8")
        (tmp_path / "notes.txt").write_text("Sources read files. " * 30, "utf-8")
        answers, report = indexed(tmp_path, ["Which task has a key?", "What reads files?", "When does it drain?"])
        assert [found[0].partition("~")[0] for found in answers] == ["guide.md#keys", "notes.txt", "guide.md#stopping"]
        assert "COMPLETED and CLEAN" in report

    def test_documents_that_are_gone_or_empty_are_found_no_more_in_an_index_made_anew(self, tmp_path: Path) -> None:
        docs = tmp_path / "docs"
        docs.mkdir()
        for name in ("keys", "stopping", "sources"):
            (docs / f"{name}.md").write_text(f"# {name}\n\nAll of {name}.\n", "utf-8")
        assert kept(tmp_path, anew=True) == ["keys.md", "sources.md", "stopping.md"]
        (docs / "keys.md").unlink()
        (docs / "sources.md").write_text("", "utf-8")
        assert kept(tmp_path, anew=False) == ["keys.md", "sources.md", "stopping.md"]
        assert kept(tmp_path, anew=True) == ["stopping.md"]
        (docs / "stopping.md").unlink()
        assert kept(tmp_path, anew=True) == []

    def test_a_blank_question_is_named_and_the_rest_goes_on(self, tmp_path: Path) -> None:
        (tmp_path / "guide.md").write_text("# Keys\n\nSame key, same task.\n", "utf-8")
        assert indexed(tmp_path, [" ", "key?"], "skip")[0] == [["guide.md#keys"]]
        with pytest.raises(FunctionError, match=r'"retrieve" failed on record .*: the question is empty'):
            indexed(tmp_path, ["  "])


def test_a_document_is_split_indexed_and_found_whole() -> None:
    passages = list(SplitByStructure().execute(Document("a.md", "# One\n\nfirst\n\n# Two\n\nsecond")))
    with services() as (keywords, _, _):
        Index(keywords=keywords).execute(passages)
        retrieve: Callable[[str], Retrieved] = Retrieve(keywords=keywords).execute
        assert [found.passage for found in retrieve("second").found] == passages[1:]
