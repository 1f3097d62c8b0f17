"""A question that follows another one is answered with what was said before."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
from services.kept import left_clean

from sage import LocalEnvironment
from sage.rag.conversation import Converse, says_too_little, with_history
from sage.rag.documents import Passage
from sage.rag.generation import Answered, Generate
from sage.rag.keywords import KeywordIndex
from sage.rag.retrieval import Index, Question, Retrieve
from sage.services.embeddings import HashingEmbeddings
from sage.services.llm import ExtractiveLLM, Message
from sage.services.memory import Memory

if TYPE_CHECKING:
    from pathlib import Path

HISTORY = (Message("user", "What drains?"), Message("assistant", "A stop."))


@pytest.mark.parametrize(
    ("question", "is_short"),
    [
        ("And who stops it?", True),
        ("Why?", True),
        ("What about that one?", True),
        ("And what drains?", False),
        ("Is it true that keys go to tasks of partitions?", False),
        ("How does a loop end?", False),
    ],
)
def test_what_says_too_little_is_searched_for_with_the_question_before(question: str, is_short: bool) -> None:
    assert says_too_little(question) is is_short
    expected = f"What drains? {question}" if is_short else ""
    assert with_history(Question(question), HISTORY) == Question(question, query=expected, history=HISTORY)
    assert with_history(Question(question), ()) == Question(question)


def test_a_query_of_its_own_stays() -> None:
    assert with_history(Question("Why?", query="draining"), HISTORY).query == "draining"


def test_questions_of_one_batch_follow_each_other(tmp_path: Path) -> None:
    """The engine hands over records in batches, and yet each question knows the answer to the one before."""
    answers: list[Answered] = []
    passages = [Passage("a", "A stop drains records.", "a"), Passage("b", "A key names records.", "b")]
    with left_clean():
        env = LocalEnvironment("conversation")
        keywords = env.register_service("keywords", KeywordIndex)
        memory = env.register_service(
            "memory", Memory, tmp_path / "memory.db", env.register_service("embeddings", HashingEmbeddings)
        )
        converse = Converse(
            Retrieve(1, keywords=keywords), Generate(env.register_service("llm", ExtractiveLLM)), memory, turns_max=2
        )

        class Ask:
            """Waits for the passages, then asks."""

            def execute(self, data: Passage) -> list[str]:
                return []

            def finish(self) -> list[str]:
                return ["What drains?", "Which records does it mean?", " ", "And what is a key?", "Its records?"]

        stored = env.from_batch(passages).map_batches(Index, keywords=keywords)
        stored.process(Ask).map(converse, on_error="skip").sink(answers.append)
        env.submit(autostop=True)
    assert [answer.found[0].passage.id for answer in answers] == ["a", "a", "b", "b"]
    assert [len(answer.question.history) for answer in answers] == [0, 2, 2, 2]
    assert answers[3].question.history[0] == Message("user", "And what is a key?")
