"""Prompts, generated answers, their citations and their evaluation."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
from hypothesis import given
from hypothesis import strategies as some
from services.kept import left_clean

from sage import DeadLetter, GraphError, LocalEnvironment
from sage.rag.citations import Citation, CitationError, check_citations, citations_of
from sage.rag.documents import Passage
from sage.rag.evaluation import Evaluate, Scores, recall, reciprocal_rank, token_f1
from sage.rag.generation import Answered, CheckCitations, Generate, GenerateAsync
from sage.rag.prompts import NO_ANSWER, SYSTEM, Prompt
from sage.rag.retrieval import Found, Question, Retrieved
from sage.services.models.llm import ExtractiveLLM, Message
from sage.testing import run

if TYPE_CHECKING:
    from sage.stream import DataStream

KEYS = Passage("a.md#keys", "The same key goes to the same task.\n\nIt never moves.", "a.md", heading="Keys")
STOP = Passage("a.md#stop", "A stop drains what is in flight.", "a.md", heading="Stopping")
FOUND = (Found(KEYS, 0.9), Found(STOP, 0.5))


class TestPrompt:
    def test_passages_are_numbered_and_the_conversation_stands_before_the_question(self) -> None:
        history = (Message("user", "Hello"), Message("assistant", "Hi"))
        messages, count = Prompt().fill(Question("Where does {a} key go?", history=history), FOUND)
        assert count == 2
        assert messages == [
            Message("system", SYSTEM),
            *history,
            Message(
                "user",
                "Context:\n\n[1] Keys:\nThe same key goes to the same task.\nIt never moves.\n\n"
                "[2] Stopping:\nA stop drains what is in flight.\n\nQuestion: Where does {a} key go?",
            ),
        ]

    def test_a_template_of_ones_own(self) -> None:
        prompt = Prompt("", "{question} {{json}} {passages}")
        assert prompt.fill(Question("q"), ()) == ([Message("user", "q {json} (none)")], 0)

    def test_what_is_too_long_is_left_out_or_cut(self) -> None:
        first, second = (Found(Passage(name, f"{name} word word word", "d"), 1.0) for name in "ab")
        messages, count = Prompt("", "{passages}|{question}", tokens_max=10).fill(Question("q"), (first, second))
        assert (messages[0].content, count) == ("[1] a word word word|q", 1)
        messages, count = Prompt("", "{passages}|{question}", tokens_max=5).fill(Question("q"), (first, second))
        assert (messages[0].content, count) == ("[1] a word |q", 1)
        messages, _ = Prompt("", "{passages}|{question}", tokens_max=5, count=len).fill(Question("q"), (first,))
        assert messages[0].content == "[1] a|q"

    @pytest.mark.parametrize(
        ("template", "message"),
        [
            ("{question}", "has the fields {question}"),
            ("{question} {passages} {name}", "has the fields {question}, {passages}, {name}"),
            ("none", "has the fields none"),
            ("{question} {passages", "cannot be read: expected '}'"),
        ],
    )
    def test_a_template_that_cannot_work(self, template: str, message: str) -> None:
        with pytest.raises(GraphError) as caught:
            Prompt(user=template)
        assert message in str(caught.value)


class TestCitations:
    def test_marks_belong_to_their_sentences(self) -> None:
        answer = "A key goes to a task [1]. It drains. [2, 1] Nothing here. Unknown [7]!"
        assert citations_of(answer, [KEYS, STOP]) == (
            Citation(1, "a.md#keys", "A key goes to a task .", 1.0),
            Citation(2, "a.md#stop", "It drains .", 1.0),
            Citation(1, "a.md#keys", "It drains .", 0.0),
            Citation(7, None, "Unknown !", 0.0),
        )

    def test_no_marks(self) -> None:
        assert citations_of("See a[b] and [x1].", [KEYS]) == ()
        assert citations_of("", []) == ()

    @given(some.text(alphabet="ab[]1,2. \n", max_size=60))
    def test_whatever_a_model_writes(self, answer: str) -> None:
        for citation in citations_of(answer, [KEYS]):
            assert (citation.passage is None) is (citation.number != 1)
            assert 0.0 <= citation.overlap <= 1.0

    def test_what_is_refused(self) -> None:
        def check(answer: str, overlap_min: float = 0.5) -> None:
            check_citations(answer, citations_of(answer, [KEYS, STOP]), overlap_min=overlap_min)

        check("The key goes to a task [1, 2].")
        check("Bananas are yellow [1].", 0.0)
        with pytest.raises(CitationError, match="the answer 'No marks' names no passage"):
            check("No marks")
        with pytest.raises(CitationError, match=r"names passage \[3\], which it was not given"):
            check("The key [3].")
        with pytest.raises(CitationError, match=r"has 0% of its words in the passages that it names, not 50%"):
            check("Bananas are yellow [1].")


class TestGenerate:
    @pytest.mark.parametrize("way", ["map", "map_async"])
    def test_an_answer_names_its_passages(self, way: str) -> None:
        answers: list[Answered] = []
        with left_clean():
            env = LocalEnvironment("generate")
            llm = env.register_service("llm", ExtractiveLLM, 1)
            asked = env.from_batch([Retrieved(Question("Where does a key go?"), FOUND)])
            answered = asked.map(Generate, llm) if way == "map" else asked.map_async(GenerateAsync, llm)
            answered.map(CheckCitations, overlap_min=0.9).sink(answers.append)
            env.submit(autostop=True)
        (answer,) = answers
        assert answer.text.startswith("Keys: The same key goes to the same task.")
        assert [citation.passage for citation in answer.citations] == ["a.md#keys"]
        assert answer.found == FOUND
        assert (answer.model, answer.is_refused) == ("extractive", False)
        assert answer.completion_tokens == len(answer.text.split())
        assert answer.prompt_tokens is not None
        assert answer.prompt_tokens > 20

    def test_only_what_the_model_was_given_can_be_named(self) -> None:
        llm = ExtractiveLLM(1)
        generate = Generate(llm, prompt=Prompt(tokens_max=15))
        assert generate.execute(Retrieved(Question("What drains?"), FOUND)).found == FOUND[:1]

    def test_an_answer_that_is_none_needs_no_citation(self) -> None:
        letters: list[DeadLetter] = []
        good: list[Answered] = []
        env = LocalEnvironment("checked")
        failed = env.dead_letters()
        llm = env.register_service("llm", ExtractiveLLM, unknown=NO_ANSWER)
        answers = env.from_batch([Retrieved(Question("Xylophones?"), FOUND)]).map(Generate, llm)
        bare = answers.map(lambda answer: Answered(answer.question, "Bare words.", (), FOUND, "none"))
        answers.union(bare).map(CheckCitations, on_error=failed).sink(good.append)
        failed.sink(letters.append)
        env.submit(autostop=True)
        assert [answer.text for answer in good] == [NO_ANSWER]
        assert [str(letter.error) for letter in letters] == ["the answer 'Bare words.' names no passage"]


def scores(*records: Retrieved | Answered, k: int = 5) -> Scores:
    def evaluated(stream: DataStream) -> DataStream:
        return stream.process(Evaluate, k)

    (found,) = run(records, evaluated)
    assert isinstance(found, Scores)
    return found


class TestEvaluation:
    def test_recall_and_reciprocal_rank(self) -> None:
        assert recall(["a", "b"], ["x", "b"]) == 0.5
        assert reciprocal_rank({"a", "b"}, ["x", "b", "a"]) == 0.5
        assert reciprocal_rank({"a"}, ["x"]) == 0.0

    def test_overlap(self) -> None:
        assert token_f1("The cat sat [1].", "a cat sat") == 1.0
        assert token_f1("one two", "two three four") == 2 * 1 / 5
        assert token_f1("", "word") == token_f1("word", "") == token_f1("one", "two") == 0.0
        assert token_f1("", "the") == 1.0

    @given(some.text(alphabet="ab ", max_size=20), some.text(alphabet="ab ", max_size=20))
    def test_overlap_has_no_sides(self, one: str, other: str) -> None:
        assert token_f1(one, other) == token_f1(other, one)
        assert 0.0 <= token_f1(one, other) <= 1.0

    def test_means_over_questions(self) -> None:
        first = Retrieved(Question("q", expected=frozenset(["a.md#stop"])), FOUND)
        missed = Retrieved(Question("q", expected=frozenset(["none"])), FOUND)
        plain = Retrieved(Question("q"), FOUND)
        assert scores(first, missed, plain) == Scores(3, 5, 0.5, 0.25)
        assert scores(first, missed, plain, k=1) == Scores(3, 1, 0.0, 0.0)
        assert scores(plain) == Scores(1, 5, None, None)
        assert scores() == Scores(0, 5, None, None)

    def test_answers(self) -> None:
        question = Question("q", expected=frozenset(["a.md#keys"]), reference="to the same task")
        named = Answered(question, "same task [1]", citations_of("same task [1]", [KEYS]), FOUND, "m")
        bare = Answered(question, "elsewhere", (), FOUND, "m")
        found = scores(named, bare)
        assert found.f1 == pytest.approx(0.4)
        assert (found.recall, found.mrr, found.cited) == (1.0, 1.0, 0.5)

    def test_no_passage_counts(self) -> None:
        with pytest.raises(GraphError, match="k is 0"):
            Evaluate(0)
