"""Language models: the contract of services that answer prompts, and one that answers with sentences of its prompt."""

from __future__ import annotations

import asyncio
import base64
import json
import math
import mimetypes
import re
from abc import abstractmethod
from collections import Counter
from collections.abc import AsyncGenerator, Callable, Generator, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, TypeAlias, TypedDict, Unpack

from sage.errors import hint, short
from sage.services._shared.measures import MeasuredService
from sage.services.models.embeddings import FREQUENT_WORDS, words_of

if TYPE_CHECKING:
    import os

Role = Literal["system", "user", "assistant", "tool"]
ROLES = ("system", "user", "assistant", "tool")


@dataclass(frozen=True, slots=True)
class Image:
    """An image in a message.

    Attributes:
        url: its address, or the image itself as a `data:` URL.
    """

    url: str

    @classmethod
    def read(cls, path: str | os.PathLike[str]) -> Image:
        """Return the image in a file.

        Raises:
            OSError: the file cannot be read.
            ValueError: its name does not show the kind of image.
        """
        kind, _ = mimetypes.guess_type(Path(path).name)
        if kind is None or not kind.startswith("image/"):
            error = ValueError(f"the file {short(str(path))} does not have the name of an image")
            raise hint(error, 'A name such as "plan.png" says which kind it is.')
        return cls(f"data:{kind};base64,{base64.b64encode(Path(path).read_bytes()).decode()}")

    def __repr__(self) -> str:
        return f"Image({short(self.url)})"


@dataclass(frozen=True, slots=True)
class ToolCall:
    """A model's request to call a tool; answer it with a message of the role "tool" that has its `id`.

    Attributes:
        id: tells the calls of one answer apart.
        name: the name of the tool.
        arguments: the arguments as the model wrote them, which should be a JSON object.
    """

    id: str
    name: str
    arguments: str

    def values(self) -> dict[str, object]:
        """Return the arguments by their names.

        Raises:
            ValueError: the model did not write a JSON object.
        """
        try:
            values = json.loads(self.arguments or "{}")
        except ValueError:
            values = self.arguments
        if not isinstance(values, dict):
            text = f'the model called the tool "{self.name}" with {short(self.arguments)}, which is not a JSON object'
            raise ValueError(text)
        return values


Part: TypeAlias = "str | Image | Mapping[str, object]"
"""A part of a message: a text, an image, or a part as the protocol of the model's server has it."""


@dataclass(frozen=True, slots=True)
class Message:
    """One part of a conversation.

    Attributes:
        role: who says it; "tool" for the result of a tool that the model asked for.
        content: the text, or several texts and images.
        tool_calls: the tools that an answer of the model asked for.
        tool_call_id: the `ToolCall.id` that a message of the role "tool" answers.
    """

    role: Role
    content: str | Sequence[Part]
    tool_calls: tuple[ToolCall, ...] = ()
    tool_call_id: str | None = None

    @property
    def text(self) -> str:
        """The text of the message, without images and the like."""
        if isinstance(self.content, str):
            return self.content
        return "\n\n".join(filter(None, map(_text_of, self.content)))


def _text_of(part: Part) -> str:
    if isinstance(part, Mapping):
        return str(part.get("text") or "")
    return part if isinstance(part, str) else ""


@dataclass(frozen=True, slots=True)
class Answer:
    """A model's answer. A count or a reason that the server does not give is None.

    Attributes:
        text: the answer itself; it may be empty if the model calls tools or refuses.
        model: the name of the model as the server calls it, or the name that was asked for if it does not say.
        finish_reason: why it ended: "stop" at its end or at a stop word, "length" at `max_tokens`, "tool_calls", or the
            server's own.
        prompt_tokens: how many tokens the prompt had, as the model counts them.
        completion_tokens: how many tokens the answer has.
        tool_calls: the tools that the model wants to be called.
        refusal: the model's words if it refuses to answer.
        reasoning: the text of the model's thinking, if the server gives it apart from the answer.
        alternatives: the further answers, if several were asked for.
    """

    text: str
    model: str
    finish_reason: str | None
    prompt_tokens: int | None
    completion_tokens: int | None
    tool_calls: tuple[ToolCall, ...] = ()
    refusal: str | None = None
    reasoning: str | None = None
    alternatives: tuple[Answer, ...] = ()

    @property
    def turn(self) -> Message:
        """The answer as the next message of the conversation."""
        return Message("assistant", self.text or self.refusal or "", self.tool_calls)


Keep: TypeAlias = Callable[[Answer], None]
"""Takes the whole answer when its last piece has come."""


class WholeAnswer:
    """Keeps the answer that comes in pieces."""

    _answer: Answer | None = None

    @property
    def answer(self) -> Answer:
        """The whole answer, with everything that is not text."""
        if self._answer is None:
            raise hint(RuntimeError("the answer is not complete yet"), "Read all its pieces first.")
        return self._answer

    def _keep(self, answer: Answer) -> None:
        self._answer = answer


class Pieces(WholeAnswer, Generator[str, None, None]):
    """An answer that comes in pieces of text. Close it if you stop before its end."""

    def __init__(self, make: Callable[[Keep], Generator[str, None, None]]) -> None:
        self._pieces = make(self._keep)

    def send(self, value: None, /) -> str:
        """Return the next piece."""
        return self._pieces.send(value)

    def throw(self, *error: Any) -> str:
        """Raise an error where the pieces come from."""
        return self._pieces.throw(*error)


class AsyncPieces(WholeAnswer, AsyncGenerator[str, None]):
    """An answer that comes in pieces of text to a coroutine. Close it if you stop before its end."""

    def __init__(self, make: Callable[[Keep], AsyncGenerator[str, None]]) -> None:
        self._pieces = make(self._keep)

    async def asend(self, value: None, /) -> str:
        """Return the next piece."""
        return await self._pieces.asend(value)

    async def athrow(self, *error: Any) -> str:
        """Raise an error where the pieces come from."""
        return await self._pieces.athrow(*error)


class Asked(TypedDict, total=False):
    """The settings of a prompt that every model has; see `LLMService.generate`."""

    max_tokens: int | None
    temperature: float | None
    stop: str | Sequence[str] | None


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
            ServiceError: the answer failed; the message says why.
        """

    async def agenerate(self, prompt: str | Sequence[Message], **asked: Unpack[Asked]) -> Answer:
        """Return the result of `generate`, and let other coroutines go on meanwhile."""
        return await asyncio.to_thread(self.generate, prompt, **asked)

    def stream(self, prompt: str | Sequence[Message], **asked: Unpack[Asked]) -> Generator[str, None, None]:
        """Yield the answer in pieces as they come; together they are the text of the answer.

        It has to be called where the service runs: an iterator cannot leave a process of its own.
        """
        yield from pieces_of(self.generate(prompt, **asked).text)

    async def astream(self, prompt: str | Sequence[Message], **asked: Unpack[Asked]) -> AsyncGenerator[str, None]:
        """Yield the pieces of `stream`, and let other coroutines go on meanwhile."""
        for piece in pieces_of((await self.agenerate(prompt, **asked)).text):
            yield piece

    def process(self, prompt: str | Sequence[Message]) -> str:
        """Return the text of the answer to a prompt."""
        return self.generate(prompt).text

    def _used(self, answer: Answer) -> None:
        """Count the tokens of an answer, as far as they are known."""
        if answer.prompt_tokens is not None:
            self.counted("prompt_tokens", answer.prompt_tokens)
        if answer.completion_tokens is not None:
            self.counted("completion_tokens", answer.completion_tokens)
        if self.ctx is not None:
            self.ctx.used(prompt_tokens=answer.prompt_tokens or 0, completion_tokens=answer.completion_tokens or 0)


class Sentence(NamedTuple):
    """A sentence of a context."""

    place: int
    text: str
    label: str
    stems: frozenset[str]


class ExtractiveLLM(LLMService):
    """Answers with the sentences of the given context that fit the question best: offline, always the same, no model.

    It cannot say anything that is not in the prompt, so use it in examples and in tests of the code around a model. The
    question is the text after the last "Question:", or else the last paragraph of the user's last message. The context
    is the text between "Context:" and the question, or else the paragraphs before the question. A passage that begins
    with a label such as "[2]" lends it to the sentences that are taken of it. Tokens are words here.

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
            prompt_tokens = sum(len(message.text.split()) for message in messages)
            answer = Answer(text, "extractive", "length" if is_cut else "stop", prompt_tokens, len(text.split()))
            self._used(answer)
            return answer


CONTEXT_MARK = re.compile(r"^[ \t]*context[ \t]*:", re.IGNORECASE | re.MULTILINE)
QUESTION_MARK = re.compile(r"^[ \t]*question[ \t]*:", re.IGNORECASE | re.MULTILINE)
ANSWER_MARK = re.compile(r"^[ \t]*answer[ \t]*:[ \t]*\Z", re.IGNORECASE | re.MULTILINE)
PARAGRAPH_END = re.compile(r"\n\s*\n")
# Items of a list and rows of a table are apart, as sentences are.
SENTENCE_END = re.compile(
    r"(?<=[.!?])[\"')\]]*\s+(?=[\"'(\[]*[A-Z0-9])|(?<=[\u3002\uff01\uff1f])|\n\s*\n|\n\s*(?:[-*+] |(?=\|))"
)
CODE = re.compile(r"^[ \t]*(`{3,}|~{3,}).*?(?:^[ \t]*\1[`~]*[ \t]*$|\Z)", re.MULTILINE | re.DOTALL)
TABLE_RULE = re.compile(r"[|:\- ]+")
ABBREVIATION = re.compile(r"\b(?:Dr|Mr|Mrs|Ms|Prof|St|vs|e\.g|i\.e)\.\Z")
LABEL = re.compile(r"\s*(\[[^\[\]\n]{1,40}\])\s*")
ENDINGS = ("ations", "ation", "ings", "ing", "edly", "ies", "ied", "ers", "er", "ed", "es", "ly", "s", "e", "y")


def parts_of(messages: Sequence[Message]) -> tuple[str, str]:
    """Return context and question of a prompt; the context may be empty."""
    last = max((place for place, message in enumerate(messages) if message.role == "user"), default=len(messages) - 1)
    asked = ANSWER_MARK.sub("", messages[last].text).strip()
    marks = list(QUESTION_MARK.finditer(asked))
    if marks:
        context, question = asked[: marks[-1].start()], asked[marks[-1].end() :]
    else:
        *paragraphs, question = PARAGRAPH_END.split(asked)
        context = "\n\n".join(paragraphs)
        if CONTEXT_MARK.match(question):
            context, question = asked, ""  # A context alone asks nothing.
    # The system message says how to answer, unless it says that it holds the context.
    others = [message.text for message in messages[:last] if CONTEXT_MARK.search(message.text)]
    marked = [text[mark.end() :] for text in [*others, context] if (mark := CONTEXT_MARK.search(text)) is not None]
    return "\n\n".join(marked) if marked else context, question.strip()


def sentences_of(context: str) -> list[Sentence]:
    """Return the sentences of a context, each with the label of its passage."""
    found: list[Sentence] = []
    for passage in re.split(r"\n\s*\n|\n(?=\s*\[[^\[\]\n]{1,40}\])", context):
        match = LABEL.match(passage)
        label = match.group(1) if match is not None else ""
        begun = ""
        said = passage[match.end() if match is not None else 0 :]
        for text in SENTENCE_END.split(CODE.sub("", said) if CODE.sub("", said).strip() else said):
            joined = " ".join([*begun.split(), *cells_of(text).split()])
            begun = joined if ABBREVIATION.search(joined) else ""
            if joined and not begun:
                found.append(Sentence(len(found), joined, label, stems_of(joined)))
        if begun:
            found.append(Sentence(len(found), begun, label, stems_of(begun)))
    return found


def cells_of(text: str) -> str:
    """Return a row of a Markdown table as a phrase, nothing for the line below its head, and other text as it is."""
    row = text.strip()
    if not row.startswith("|"):
        return text
    cells = [] if TABLE_RULE.fullmatch(row) else [cell.strip() for cell in row.strip("|").split("|")]
    return ": ".join(filter(None, [cells[0], ", ".join(filter(None, cells[1:]))])) if cells else ""


def best_of(sentences: Sequence[Sentence], question: str, count: int) -> list[str]:
    """Return the sentences that share the rarest words with the question, in their own order, with their labels."""
    asked = stems_of(question)
    spread = Counter(stem for sentence in sentences for stem in sentence.stems)

    def score(sentence: Sentence) -> float:
        rare = sum(math.log(1 + len(sentences) / spread[stem]) for stem in sorted(asked & sentence.stems))
        return rare / math.sqrt(8 + len(sentence.stems))

    scored = sorted(((score(sentence), sentence) for sentence in sentences), key=lambda pair: -pair[0])
    # A sentence that fits much worse than the best one is about something else.
    good = [sentence for value, sentence in scored[:count] if value > 0 and value >= scored[0][0] / 2]
    ordered = sorted(good, key=lambda sentence: sentence.place)
    return [f"{sentence.text} {sentence.label}".rstrip() for sentence in ordered]


def stems_of(text: str) -> frozenset[str]:
    """Return the words that tell the subject of a text, without their endings."""
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


def conversation_of(prompt: object) -> list[Message]:
    """Return a prompt as messages."""
    if isinstance(prompt, Message):
        raise TypeError(f"the prompt is {short(prompt)}, one message and not a list of them")
    if not isinstance(prompt, str | list | tuple):
        raise TypeError(f"the prompt is {short(prompt)}, neither a text nor a list of messages")
    messages = [Message("user", prompt)] if isinstance(prompt, str) else list(prompt)
    for place, message in enumerate(messages):
        if not isinstance(message, Message):
            raise TypeError(f"message {place} of the prompt is {short(message)}, not a Message(role, content)")
        _check_turn(f"message {place} of the prompt", message)
    if not any(message.text.strip() or message.tool_calls or _has_image(message) for message in messages):
        raise ValueError("the prompt is empty")
    return messages


def _check_turn(name: str, message: Message) -> None:
    content: object = message.content
    if message.role not in ROLES:
        raise ValueError(f"{name} has the role {message.role!r}, not one of {list(ROLES)}")
    if not isinstance(content, str | list | tuple):
        raise TypeError(f"{name} has the content {short(content)}, which is not a text")
    for part in () if isinstance(content, str) else content:
        if not isinstance(part, str | Image | Mapping):
            raise TypeError(f"{name} has the part {short(part)}, which is not a text, an Image or a mapping")
    if message.role == "tool" and not message.tool_call_id:
        error = ValueError(f'{name} has the role "tool" and no tool_call_id')
        raise hint(error, "It is the id of the ToolCall that the message answers.")


def _has_image(message: Message) -> bool:
    return not isinstance(message.content, str) and any(not isinstance(part, str) for part in message.content)


def stops_of(stop: str | Iterable[str] | None) -> list[str]:
    """Return the words that end an answer as a list."""
    stops = [] if stop is None else [stop] if isinstance(stop, str) else list(stop)
    for word in stops:
        if not isinstance(word, str):
            raise TypeError(f"stop has {short(word)}, which is not a string")
        if not word:
            raise ValueError("stop has an empty text, which would end every answer")
    return stops


def checked_tokens(max_tokens: object) -> None:
    """Refuse a bound that leaves no room for an answer."""
    if max_tokens is not None and (type(max_tokens) is not int or max_tokens < 1):
        raise ValueError(f"max_tokens is {short(max_tokens)}, not a whole number from 1")
