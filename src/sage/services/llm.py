"""Language models: the contract of services that answer prompts, and one that answers with what it is given."""

from __future__ import annotations

import asyncio
import math
import re
from abc import abstractmethod
from collections import Counter
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

from sage.errors import short
from sage.services.embeddings import FREQUENT_WORDS, words_of
from sage.services.measures import MeasuredService

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, Generator, Mapping, Sequence

Role = Literal["system", "user", "assistant"]
ROLES = ("system", "user", "assistant")


@dataclass(frozen=True, slots=True)
class Message:
    """One part of a conversation.

    Attributes:
        role: who says it.
        content: what is said.
    """

    role: Role
    content: str


@dataclass(frozen=True, slots=True)
class Answer:
    """What a model answered.

    Attributes:
        text: the answer itself.
        model: the name of the model that gave it, as the model's server calls it.
        finish_reason: why it ended: "stop" at its end or at a stop word, "length" at `max_tokens`, or the server's own.
        prompt_tokens: how many tokens the prompt had, as the model counts them; 0 where the server does not tell.
        completion_tokens: how many tokens the answer has.
    """

    text: str
    model: str
    finish_reason: str
    prompt_tokens: int
    completion_tokens: int


class LLMService(MeasuredService):
    """Answers prompts. A prompt is a text, which stands for one message of the user, or a list of messages.

    An implementation gives `generate`, which any number of threads may call at once.
    """

    @abstractmethod
    def generate(
        self,
        prompt: str | Sequence[Message],
        *,
        max_tokens: int | None = None,
        temperature: float | None = None,
        stop: str | Sequence[str] | None = None,
    ) -> Answer:
        """Return the answer to a prompt.

        Args:
            prompt: a text or messages.
            max_tokens: how long the answer may be; as long as the model likes by default.
            temperature: 0 for the most probable answer, more for more surprising ones; the model's own by default.
            stop: words that end the answer and are not part of it.

        Raises:
            TypeError: the prompt is neither a text nor messages.
            ValueError: there is nothing in it.
            ServiceError: there is no answer; the message says why.
        """

    async def agenerate(
        self,
        prompt: str | Sequence[Message],
        *,
        max_tokens: int | None = None,
        temperature: float | None = None,
        stop: str | Sequence[str] | None = None,
    ) -> Answer:
        """Return what `generate` does, and let other coroutines go on meanwhile."""
        return await asyncio.to_thread(self.generate, prompt, max_tokens=max_tokens, temperature=temperature, stop=stop)

    def stream(
        self,
        prompt: str | Sequence[Message],
        *,
        max_tokens: int | None = None,
        temperature: float | None = None,
        stop: str | Sequence[str] | None = None,
    ) -> Generator[str, None, None]:
        """Yield the answer in pieces as they come; together they are the text of the answer.

        It has to be called where the service runs: an iterator cannot leave a process of its own.
        """
        yield from pieces_of(self.generate(prompt, max_tokens=max_tokens, temperature=temperature, stop=stop).text)

    async def astream(
        self,
        prompt: str | Sequence[Message],
        *,
        max_tokens: int | None = None,
        temperature: float | None = None,
        stop: str | Sequence[str] | None = None,
    ) -> AsyncGenerator[str, None]:
        """Yield what `stream` does, and let other coroutines go on meanwhile."""
        answer = await self.agenerate(prompt, max_tokens=max_tokens, temperature=temperature, stop=stop)
        for piece in pieces_of(answer.text):
            yield piece

    def process(self, prompt: str | Sequence[Message]) -> str:
        """Return the text of the answer to a prompt."""
        return self.generate(prompt).text

    def _used(self, prompt_tokens: int, completion_tokens: int) -> None:
        """Count the tokens of an answer."""
        self.counted("prompt_tokens", prompt_tokens)
        self.counted("completion_tokens", completion_tokens)


class Sentence(NamedTuple):
    """A sentence of a context."""

    place: int
    text: str
    label: str
    stems: frozenset[str]


class ExtractiveLLM(LLMService):
    """Answers with the sentences of the given context that fit the question best: offline, always the same, no model.

    It cannot say anything that does not stand in the prompt, so it serves examples and tests of what surrounds a model.
    The question is what follows the last "Question:", or else the last paragraph of the last message of the user. The
    context is what stands between "Context:" and the question, or else the paragraphs before the question. A passage
    that begins with a label such as "[2]" lends it to the sentences that are taken of it. Tokens are words here.

    Args:
        sentences_max: how many sentences an answer has at most.
        unknown: the answer where no sentence of the context shares a word with the question.
    """

    def __init__(self, sentences_max: int = 2, unknown: str = "The context does not say.") -> None:
        super().__init__()
        if sentences_max < 1:
            raise ValueError(f"sentences_max is {sentences_max}, but an answer has at least 1 sentence")
        self._sentences_max = sentences_max
        self._unknown = unknown
        self._is_open = False

    def setup(self) -> None:
        """Note that it is in use; it answers without, too."""
        self._is_open = True

    def cleanup(self) -> None:
        """Note that it is not in use any more."""
        self._is_open = False

    def health(self) -> bool:
        """Return whether it is set up."""
        return self._is_open

    def describe(self) -> Mapping[str, object]:
        """Return the settings."""
        return {**super().describe(), "model": "extractive", "sentences_max": self._sentences_max}

    def generate(
        self,
        prompt: str | Sequence[Message],
        *,
        max_tokens: int | None = None,
        temperature: float | None = None,  # noqa: ARG002
        stop: str | Sequence[str] | None = None,
    ) -> Answer:
        """Return the best sentences in the order of the context; see `LLMService.generate`.

        The answer does not depend on `temperature`: nothing is drawn here.
        """
        with self.measured("generate"):
            messages = conversation_of(prompt)
            stops = stops_of(stop)
            checked_tokens(max_tokens)
            context, question = parts_of(messages)
            text = " ".join(best_of(sentences_of(context), question, self._sentences_max)) or self._unknown
            for word in stops:
                text = text.partition(word)[0]
            words = text.split()
            is_cut = max_tokens is not None and len(words) > max_tokens
            if is_cut:
                text = " ".join(words[:max_tokens])
            prompt_tokens = sum(len(message.content.split()) for message in messages)
            answer = Answer(text, "extractive", "length" if is_cut else "stop", prompt_tokens, len(text.split()))
            self._used(answer.prompt_tokens, answer.completion_tokens)
            return answer


CONTEXT_MARK = re.compile(r"^[ \t]*context[ \t]*:", re.IGNORECASE | re.MULTILINE)
QUESTION_MARK = re.compile(r"^[ \t]*question[ \t]*:", re.IGNORECASE | re.MULTILINE)
ANSWER_MARK = re.compile(r"^[ \t]*answer[ \t]*:[ \t]*\Z", re.IGNORECASE | re.MULTILINE)
PARAGRAPH_END = re.compile(r"\n\s*\n")
SENTENCE_END = re.compile(r"(?<=[.!?])[\"')\]]*\s+(?=[\"'(\[]*[A-Z0-9])|(?<=[\u3002\uff01\uff1f])|\n\s*\n")
ABBREVIATION = re.compile(r"\b(?:Dr|Mr|Mrs|Ms|Prof|St|vs|e\.g|i\.e)\.\Z")
LABEL = re.compile(r"\s*(\[[^\[\]\n]{1,40}\])\s*")
ENDINGS = ("ations", "ation", "ings", "ing", "edly", "ies", "ied", "ers", "er", "ed", "es", "ly", "s", "e", "y")


def parts_of(messages: Sequence[Message]) -> tuple[str, str]:
    """Return context and question of a prompt; the context may be empty."""
    last = max((place for place, message in enumerate(messages) if message.role == "user"), default=len(messages) - 1)
    asked = ANSWER_MARK.sub("", messages[last].content).strip()
    marks = list(QUESTION_MARK.finditer(asked))
    if marks:
        context, question = asked[: marks[-1].start()], asked[marks[-1].end() :]
    else:
        *paragraphs, question = PARAGRAPH_END.split(asked)
        context = "\n\n".join(paragraphs)
        if CONTEXT_MARK.match(question):
            context, question = asked, ""  # A context alone asks nothing.
    # What the system says is how to answer, unless it says that it holds the context.
    others = [message.content for message in messages[:last] if CONTEXT_MARK.search(message.content)]
    marked = [text[mark.end() :] for text in [*others, context] if (mark := CONTEXT_MARK.search(text)) is not None]
    return "\n\n".join(marked) if marked else context, question.strip()


def sentences_of(context: str) -> list[Sentence]:
    """Return the sentences of a context, each with the label of its passage."""
    found: list[Sentence] = []
    for passage in re.split(r"\n\s*\n|\n(?=\s*\[[^\[\]\n]{1,40}\])", context):
        match = LABEL.match(passage)
        label = match.group(1) if match is not None else ""
        begun = ""
        for text in SENTENCE_END.split(passage[match.end() if match is not None else 0 :]):
            joined = " ".join([*begun.split(), *text.split()])
            begun = joined if ABBREVIATION.search(joined) else ""
            if joined and not begun:
                found.append(Sentence(len(found), joined, label, stems_of(joined)))
        if begun:
            found.append(Sentence(len(found), begun, label, stems_of(begun)))
    return found


def best_of(sentences: Sequence[Sentence], question: str, count: int) -> list[str]:
    """Return the sentences that share the rarest words with the question, in their own order, with their labels."""
    asked = stems_of(question)
    spread = Counter(stem for sentence in sentences for stem in sentence.stems)

    def score(sentence: Sentence) -> float:
        rare = sum(math.log(1 + len(sentences) / spread[stem]) for stem in sorted(asked & sentence.stems))
        return rare / math.sqrt(8 + len(sentence.stems))

    scored = sorted(((score(sentence), sentence) for sentence in sentences), key=lambda pair: -pair[0])
    # What fits much worse than the best sentence is about something else.
    good = [sentence for value, sentence in scored[:count] if value > 0 and value >= scored[0][0] / 2]
    ordered = sorted(good, key=lambda sentence: sentence.place)
    return [f"{sentence.text} {sentence.label}".rstrip() for sentence in ordered]


def stems_of(text: str) -> frozenset[str]:
    """Return the words that say what a text is about, without their endings."""
    return frozenset(stem_of(word) for word in words_of(text) if word not in FREQUENT_WORDS)


def stem_of(word: str) -> str:
    """Return an English word without its ending, as far as that is seen without a dictionary."""
    for ending in ENDINGS:
        if word.endswith(ending) and len(word) - len(ending) >= 3:
            return word[: -len(ending)]
    return word


def pieces_of(text: str) -> list[str]:
    """Return a text in words, each with the blanks before it."""
    return re.findall(r"\s*\S+|\s+\Z", text)


def conversation_of(prompt: Any) -> list[Message]:
    """Return a prompt as messages.

    Raises:
        TypeError: it is neither a text nor messages.
        ValueError: there is nothing in it, or a role is unknown.
    """
    if isinstance(prompt, Message):
        raise TypeError(f"the prompt is {short(prompt)}, one message and not a list of them")
    if not isinstance(prompt, str | list | tuple):
        raise TypeError(f"the prompt is {short(prompt)}, neither a text nor a list of messages")
    messages = [Message("user", prompt)] if isinstance(prompt, str) else list(prompt)
    for place, message in enumerate(messages):
        if not isinstance(message, Message):
            raise TypeError(f"message {place} of the prompt is {short(message)}, no Message(role, content)")
        if message.role not in ROLES:
            raise ValueError(f"message {place} of the prompt has the role {message.role!r}, not one of {list(ROLES)}")
        if not isinstance(message.content, str):
            raise TypeError(f"message {place} of the prompt has the content {short(message.content)}, no text")
    if not any(message.content.strip() for message in messages):
        raise ValueError("the prompt is empty")
    return messages


def stops_of(stop: Any) -> list[str]:
    """Return the words that end an answer as a list.

    Raises:
        TypeError: one of them is no text.
        ValueError: one of them is empty.
    """
    stops = [] if stop is None else [stop] if isinstance(stop, str) else list(stop)
    for word in stops:
        if not isinstance(word, str):
            raise TypeError(f"stop has {short(word)}, which is no text")
        if not word:
            raise ValueError("stop has an empty text, which would end every answer")
    return stops


def checked_tokens(max_tokens: Any) -> None:
    """Refuse a bound that leaves no room for an answer.

    Raises:
        ValueError: it is below 1, or no whole number.
    """
    if max_tokens is not None and (type(max_tokens) is not int or max_tokens < 1):
        raise ValueError(f"max_tokens is {short(max_tokens)}, not a whole number from 1")
