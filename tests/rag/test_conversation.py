"""A question that follows another one is answered with what was said before."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
from services.kept import left_clean

from sage import LocalEnvironment, ProcessFunction
from sage.rag.conversation import Converse, says_too_little, with_history
from sage.rag.documents import Passage
from sage.rag.generation import Answered, Generate
from sage.rag.keywords import KeywordIndex
from sage.rag.prompts import in_turn
from sage.rag.retrieval import Index, Question, Retrieve
from sage.services.memory.memory import Memory
from sage.services.models.embeddings import HashingEmbeddings
from sage.services.models.llm import Answer, ExtractiveLLM, Message, Role, ToolCall

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

        class Ask(ProcessFunction[Passage, str]):
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


ASKED = Message("assistant", "", (ToolCall("c1", "add", "{}"),))


@pytest.mark.parametrize(
    ("history", "expected"),
    [
        ([("user", "a"), ("assistant", "b"), ("user", "c")], [("user", "a"), ("assistant", "b"), ("user", "c")]),
        ([("assistant", "b"), ("user", "c")], [("user", "c")]),
        ([("assistant", "a"), ("assistant", "b"), ("user", "c")], [("user", "c")]),
        ([("user", "a"), ("user", "b"), ("assistant", "c"), ("user", "d")], [("user", "a\n\nb"), ("assistant", "c")]),
        ([("user", "a"), ("user", "b")], [("user", "a\n\nb")]),
        ([("system", "be kind"), ("assistant", "b"), ("user", "c")], [("system", "be kind"), ("user", "c")]),
    ],
)
def test_user_and_assistant_speak_in_turn(history: list[tuple[Role, str]], expected: list[tuple[Role, str]]) -> None:
    found = in_turn([Message(role, content) for role, content in history])
    assert found[: len(expected)] == [Message(role, content) for role, content in expected]
    assert found[-1] == Message("user", found[-1].content)


def test_results_of_tools_stay_with_the_answer_that_asked_for_them() -> None:
    result = Message("tool", "3", tool_call_id="c1")
    whole = [Message("user", "a"), ASKED, result, Message("assistant", "b"), Message("user", "c")]
    assert in_turn(whole) == whole
    assert in_turn(whole[1:]) == in_turn(whole[2:]) == whole[4:]
    assert in_turn([whole[0], result, whole[4]]) == [Message("user", "a\n\nc")]


@pytest.mark.parametrize("turns_max", [1, 2, 3, 4, 5, 6])
def test_a_memory_with_turns_of_all_kinds_fails_no_question(tmp_path: Path, turns_max: int) -> None:
    """Neither results of tools nor a beginning that was cut off; strict models take only turns in their order."""
    seen: list[list[str]] = []

    class Strict(ExtractiveLLM):
        def generate(self, prompt: Any, **settings: Any) -> Answer:
            seen.append([message.role for message in prompt])
            return super().generate(prompt, **settings)

    memory = Memory(tmp_path / "memory.db", HashingEmbeddings())
    keywords, embeddings, llm = KeywordIndex(), memory._embeddings, Strict()
    services: list[Any] = [embeddings, memory, keywords, llm]
    for service in services:
        service.setup()
    for role in ("user", "assistant", "tool", "user", "human", "assistant"):
        memory.add_turn(role, f"said by {role}")
    answer = Converse(Retrieve(1, keywords=keywords), Generate(llm), memory, turns_max=turns_max).execute(
        "What drains?"
    )
    assert answer.is_refused
    (roles,) = seen
    assert roles[0] == "system"
    assert roles[1:] == ["user", "assistant"] * (len(roles) // 2 - 1) + ["user"]
    for service in reversed(services):
        service.cleanup()
