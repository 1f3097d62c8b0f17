"""Generation: a language model answers a question from the passages that were found for it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeAlias

from sage.functions import MapFunction
from sage.rag.citations import Citation, check_citations, citations_of
from sage.rag.prompts import NO_ANSWER, Prompt

if TYPE_CHECKING:
    from sage.rag.retrieval import Found, Question, Retrieved
    from sage.service import ServiceHandle
    from sage.services.models.llm import Answer, Asked, LLMService

    Model: TypeAlias = "ServiceHandle[LLMService] | LLMService"


@dataclass(frozen=True, slots=True)
class Answered:
    """An answer with its sources.

    Attributes:
        question: the question.
        text: the answer, with its marks.
        citations: the passages that it names.
        found: the passages that the model was given, in the order of their numbers.
        model: the name of the model.
        prompt_tokens: how many tokens the prompt had; None if the model's server does not say.
        completion_tokens: how many tokens the answer has, or None.
    """

    question: Question
    text: str
    citations: tuple[Citation, ...]
    found: tuple[Found, ...]
    model: str
    prompt_tokens: int | None = None
    completion_tokens: int | None = None

    @property
    def is_refused(self) -> bool:
        """Whether the model says that the passages do not answer the question."""
        return self.text.strip().rstrip(".") == NO_ANSWER.rstrip(".")


class Generate(MapFunction):
    """Asks a language model to answer each question from its passages; `Answered.citations` has those it cites.

    Args:
        llm: the language model.
        prompt: the template; see `Prompt`.
        max_tokens: how long an answer may be.
        temperature: 0 for the most probable answer.
    """

    def __init__(
        self,
        llm: Model,
        *,
        prompt: Prompt | None = None,
        max_tokens: int | None = None,
        temperature: float | None = 0.0,
    ) -> None:
        self._llm = llm
        self._prompt = Prompt() if prompt is None else prompt
        self._settings: Asked = {"max_tokens": max_tokens, "temperature": temperature}

    def execute(self, data: Retrieved) -> Answered:
        """Return the answer.

        Raises:
            Exception: the language model's own exception.
        """
        messages, count = self._prompt.fill(data.question, data.found)
        return answered(data, count, self._llm.generate(messages, **self._settings))


class GenerateAsync(Generate):
    """Like `Generate`, for many questions at a time: `stream.map_async(GenerateAsync, llm)`."""

    async def execute(self, data: Retrieved) -> Answered:  # type: ignore[override]
        """Return the answer.

        Raises:
            Exception: the language model's own exception.
        """
        messages, count = self._prompt.fill(data.question, data.found)
        return answered(data, count, await self._llm.agenerate(messages, **self._settings))


class CheckCitations(MapFunction):
    """Hands on answers whose citations hold; the others fail, and `on_error` decides about them.

    An answer that says that the passages do not answer the question needs no citation.

    Args:
        overlap_min: which part of a sentence's telling words at least one of its passages must have, from 0 to 1; 0
            checks only that the passages are there.
    """

    def __init__(self, *, overlap_min: float = 0.0) -> None:
        self._overlap_min = overlap_min

    def execute(self, data: Answered) -> Answered:
        """Return the answer itself.

        Raises:
            CitationError: it does not cite a passage, or cites one that was not given or does not support it.
        """
        check_citations(data.text, data.citations, overlap_min=self._overlap_min, may_lack=data.is_refused)
        return data


def answered(data: Retrieved, count: int, answer: Answer) -> Answered:
    """Return a model's answer with the passages that it was given: the first `count` of those found."""
    given = data.found[:count]
    return Answered(
        question=data.question,
        text=answer.text,
        citations=citations_of(answer.text, [each.passage for each in given]),
        found=given,
        model=answer.model,
        prompt_tokens=answer.prompt_tokens,
        completion_tokens=answer.completion_tokens,
    )
