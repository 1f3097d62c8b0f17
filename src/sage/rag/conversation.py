"""Conversation: questions that follow others, answered with the previous turns."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, TypeAlias, cast

from sage.functions import MapFunction
from sage.rag.retrieval import question_of
from sage.services.models.embeddings import FREQUENT_WORDS, words_of
from sage.services.models.llm import Message, Role

if TYPE_CHECKING:
    from sage.rag.generation import Answered, Generate
    from sage.rag.retrieval import Question, Retrieve
    from sage.service import ServiceHandle
    from sage.services.memory.memory import Memory

    Remembering: TypeAlias = "ServiceHandle[Memory] | Memory"

TELLING_WORDS_MIN = 3
"""A question that refers to something and has fewer telling words than this does not name its subject."""

SPEAKING = ("user", "assistant")

REFERRING_WORDS = frozenset("he her him his it its one ones she that their them these they this those".split())  # noqa: SIM905


class Converse(MapFunction):
    """Answers the questions of one session, one after the other, each with the turns before it.

    Retrieval, generation and memory are one function here, because a question must not be begun before the answer to
    the last one is remembered. Questions of several sessions run side by side in operators of their own.

    Args:
        retrieve: finds the passages.
        generate: answers from them.
        memory: keeps the turns.
        session: whose turns they are.
        turns_max: how many turns the model is told.
    """

    def __init__(
        self,
        retrieve: Retrieve,
        generate: Generate,
        memory: Remembering,
        *,
        session: str = "default",
        turns_max: int = 6,
    ) -> None:
        self._retrieve = retrieve
        self._generate = generate
        self._memory = memory
        self._session = session
        self._turns_max = turns_max

    def execute(self, data: str | Question) -> Answered:
        """Answer a question, and remember both.

        Raises:
            ValueError: the question is empty.
            Exception: a service raised it; the turn is not remembered then.
        """
        turns = self._memory.turns(self._session, turns_max=self._turns_max)
        # The memory may hold turns of other roles too, such as results of tools, without the fields that a model needs.
        history = tuple(Message(cast("Role", turn.role), turn.content) for turn in turns if turn.role in SPEAKING)
        question = with_history(question_of(data), history)
        answer = self._generate.execute(self._retrieve.execute(question))
        self._memory.add_turn("user", question.text, session=self._session)
        self._memory.add_turn("assistant", answer.text, session=self._session)
        return answer


def with_history(question: Question, history: tuple[Message, ...]) -> Question:
    """Return a question as part of a conversation.

    One that says too little by itself, such as "And who stops it?" or "Why?", is searched for together with the
    question of the user before it.
    """
    asked = [message.content for message in history if message.role == "user"]
    query = question.query
    if asked and not query and question.text.strip() and says_too_little(question.text):
        query = f"{asked[-1]} {question.text}"
    return replace(question, query=query, history=history)


def says_too_little(question: str) -> bool:
    """Return whether a question means something only after another one, as far as its words tell."""
    words = words_of(question)
    telling = [word for word in words if word not in FREQUENT_WORDS and word not in REFERRING_WORDS]
    return not telling or (len(telling) < TELLING_WORDS_MIN and not REFERRING_WORDS.isdisjoint(words))
