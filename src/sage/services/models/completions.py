"""Reads the answers of servers with the OpenAI protocol.

Servers differ: every field that can be understood is read, and a missing one is None. A body that cannot be understood
raises ValueError, LookupError or TypeError, and whoever asked makes the error of it.
"""

from __future__ import annotations

import base64
import json
import re
import sys
from array import array
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace

from sage.services.models.llm import Answer, ToolCall

DONE = "[DONE]"
LINE_END = re.compile(rb"\r\n|\n|\r(?!\Z)")
BLANK = b"\xef\xbb\xbf \t\r\n"
"""The bytes that may precede the first character of a body: a byte order mark, spaces and ends of lines."""

TAG = re.compile(r"<(script|style)\b.*?</\1>|<[^<>]*>", re.IGNORECASE | re.DOTALL)

REASONING = ("reasoning_content", "reasoning", "thinking")
"""The fields in which servers give the text of a model's thinking."""

TOLD = ("message", "detail", "msg", "error_description", "error", "errors", "title", "reason", "code", "type")
"""The fields in which servers describe an error, the most specific one first."""

ERRORS_TOLD_MAX = 3

TOO_LONG = re.compile(
    r"context[ _](?:length|size|window)|too (?:long|large)|maximum (?:\w+ )?(?:tokens|length)|max\w*_tokens",
    re.IGNORECASE,
)
"""How servers say that a text has more tokens than they take, some of them with a status of 500."""


class NoAnswer(ValueError):
    """A server sent an error in the place of an answer; the text is the server's own."""

    def __init__(self, text: str, code: int | None) -> None:
        super().__init__(text)
        self.code = code


# --- errors -----------------------------------------------------------------------------------------------------------


def told_in(body: object) -> str:
    """Return a server's description of an error, or an empty text."""
    match body:
        case str():
            return " ".join(TAG.sub(" ", body).split())
        case bool() | None:
            return ""
        case int() | float():
            return str(body)
        case Mapping():
            found = next(filter(None, (told_in(body.get(name)) for name in TOLD)), "")
            place = body.get("loc")
            where = ".".join(map(str, place)) if isinstance(place, list | tuple) else ""
            return f"{where}: {found}" if where and found else found
        case Sequence():
            return "; ".join(filter(None, map(told_in, body[:ERRORS_TOLD_MAX])))
    return ""


def json_or_text(content: bytes) -> object:
    """Return a body as JSON, or as text if it is not JSON."""
    try:
        return json.loads(content)
    except ValueError:
        return content.decode("utf-8", "replace")


def body_of(content: bytes) -> object:
    """Return the JSON of an answer."""
    body: object = json.loads(content)
    check_answered(body)
    return body


def check_answered(body: object) -> None:
    """Refuse an error that a server sent in the place of an answer."""
    if isinstance(body, Mapping) and body.get("error"):
        error = body["error"]
        code = error.get("code", error.get("status")) if isinstance(error, Mapping) else None
        raise NoAnswer(told_in(error) or told_in(body), code if type(code) is int else None)


# --- answers ----------------------------------------------------------------------------------------------------------


def _fields(kind: str, value: object) -> Mapping[str, object]:
    if not isinstance(value, Mapping):
        raise TypeError(f"{kind} is of the type {type(value).__name__}")
    return value


def _listed(kind: str, value: object) -> Sequence[object]:
    """Return a list, which may be missing."""
    if value and (isinstance(value, str) or not isinstance(value, Sequence)):
        raise TypeError(f"{kind} is of the type {type(value).__name__}")
    return value if isinstance(value, Sequence) else ()


@dataclass
class DraftCall:
    """One call of a tool, as far as it has come."""

    index: object
    id: object = None
    name: object = None
    arguments: list[str] = field(default_factory=list)


@dataclass
class Draft:
    """One answer of several, as far as it has come."""

    texts: list[str] = field(default_factory=list)
    refusals: list[str] = field(default_factory=list)
    thoughts: list[str] = field(default_factory=list)
    calls: list[DraftCall] = field(default_factory=list)
    finish_reason: str | None = None

    def add(self, choice: Mapping[str, object]) -> str:
        """Take a choice of a completion or of a chunk, and return its text."""
        said = choice.get("delta") or choice.get("message") or {}
        said = {"content": said} if isinstance(said, str) else _fields("a message", said)
        begun = len(self.texts)
        content = said.get("content")
        self._take(choice.get("text") if content is None else content)
        self._keep(self.refusals, said.get("refusal"))
        self._keep(self.thoughts, next(filter(None, map(said.get, REASONING)), None))
        for place, each in enumerate(_listed("tool_calls", said.get("tool_calls"))):
            call = _fields("a call", each)
            function = _fields("a function", call.get("function") or call)
            self._call(call, function, call.get("index"), is_first=place == 0)
        if said.get("function_call"):
            self._call({}, _fields("a function", said["function_call"]), 0, is_first=True)
        if choice.get("finish_reason"):
            self.finish_reason = str(choice["finish_reason"])
        return "".join(self.texts[begun:])

    def _take(self, content: object) -> None:
        """Take a text, a part or a list of parts."""
        match content:
            case None:
                return
            case str():
                self.texts.append(content)
            case Mapping():
                kind = str(content.get("type", ""))
                of_kind = next((content[name] for name in ("text", "refusal", *REASONING) if content.get(name)), None)
                if "refusal" in kind:
                    self._keep(self.refusals, of_kind)
                elif "thinking" in kind or "reasoning" in kind:
                    self._keep(self.thoughts, of_kind)
                else:
                    self._take(content.get("text"))
            case Sequence():
                for part in content:
                    self._take(part)
            case _:
                raise TypeError(f"the content is of the type {type(content).__name__}")

    @staticmethod
    def _keep(texts: list[str], found: object) -> None:
        if isinstance(found, Sequence) and not isinstance(found, str):
            found = "".join(str(part.get("text") or "") if isinstance(part, Mapping) else str(part) for part in found)
        if found:
            texts.append(str(found))

    def _call(
        self, call: Mapping[str, object], function: Mapping[str, object], index: object, *, is_first: bool
    ) -> None:
        """Take a call of a tool, or the next part of one that has begun."""
        id_, name = call.get("id"), function.get("name")
        begun = None
        if type(index) is int:
            begun = next((each for each in reversed(self.calls) if each.index == index), None)
        elif id_:
            begun = next((each for each in self.calls if each.id == id_), None)
        elif self.calls and is_first and not name:
            begun = self.calls[-1]
        # Some servers give each call of an answer the same index.
        if begun is None or (id_ and begun.id and begun.id != id_):
            begun = DraftCall(index)
            self.calls.append(begun)
        begun.id = begun.id or id_
        begun.name = begun.name or name
        arguments = function.get("arguments")
        if arguments is not None:
            begun.arguments.append(arguments if isinstance(arguments, str) else json.dumps(arguments))

    def answer(self, model: str) -> Answer:
        """Return the pieces so far as an answer, without counts."""
        calls = tuple(
            ToolCall(str(call.id or f"call_{place}"), str(call.name or ""), "".join(call.arguments))
            for place, call in enumerate(self.calls)
        )
        refusal, thoughts = "".join(self.refusals) or None, "".join(self.thoughts) or None
        return Answer("".join(self.texts), model, self.finish_reason, None, None, calls, refusal, thoughts)


class Completion:
    """Puts an answer together, from one body or from the chunks of a stream."""

    def __init__(self, model: str) -> None:
        self._model = model
        self._drafts: dict[int, Draft] = {}
        self._tokens: tuple[int | None, int | None] = (None, None)
        self.is_done = False

    @property
    def is_begun(self) -> bool:
        """Whether a part of an answer has come."""
        return bool(self._drafts)

    @property
    def is_over(self) -> bool:
        """Whether the server has said that the answer is over."""
        return self.is_done or all(draft.finish_reason for draft in self._drafts.values())

    def add(self, body: object) -> str:
        """Take a body or a chunk, and return its text, which is that of the first answer if there are several."""
        if body == DONE:
            self.is_done = True
            return ""
        check_answered(body)
        chunk = _fields("a chunk", body)
        model = chunk.get("model")
        if isinstance(model, str) and model:
            self._model = model
        texts = []
        for place, each in enumerate(_listed("choices", chunk.get("choices"))):
            choice = _fields("a choice", each)
            number = choice.get("index")
            index = number if isinstance(number, int) and not isinstance(number, bool) else place
            text = self._drafts.setdefault(index, Draft()).add(choice)
            if index == 0:
                texts.append(text)
            self._count(choice.get("usage"))
        self._count(chunk.get("usage"))
        return "".join(texts)

    def _count(self, usage: object) -> None:
        # A server may count again in each chunk; the last count is that of the whole answer.
        if isinstance(usage, Mapping):
            self._tokens = tokens_in(usage, "prompt_tokens"), tokens_in(usage, "completion_tokens")

    def answer(self) -> Answer:
        """Return the answer."""
        if not self._drafts:
            raise ValueError("it has no choices")
        first, *others = (self._drafts[index].answer(self._model) for index in sorted(self._drafts))
        prompt_tokens, completion_tokens = self._tokens
        return replace(
            first, prompt_tokens=prompt_tokens, completion_tokens=completion_tokens, alternatives=tuple(others)
        )


def tokens_in(usage: object, name: str) -> int | None:
    """Return a count of tokens, or None if it is not known."""
    count = usage.get(name) if isinstance(usage, Mapping) else None
    if isinstance(count, bool) or not isinstance(count, int | float) or count < 0 or count != count // 1:
        return None
    return int(count)


# --- streams ----------------------------------------------------------------------------------------------------------


class Events:
    """Cuts a stream of server-sent events into their data; comments and unused fields are left out.

    A body that is JSON instead, or a line of JSON for each chunk, is read too.
    """

    def __init__(self) -> None:
        self._rest = bytearray()
        self._data: list[str] = []
        self._kind = ""
        self.is_plain: bool | None = None

    def feed(self, content: bytes) -> list[object]:
        """Return the chunks that are complete now; `DONE` stands for the end."""
        self._rest += content
        if self.is_plain is None and self._rest.strip(BLANK):
            self.is_plain = self._rest.lstrip(BLANK).startswith((b"{", b"["))
        if self.is_plain or (b"\n" not in content and b"\r" not in content):
            return []
        *lines, rest = LINE_END.split(bytes(self._rest))
        self._rest = bytearray(rest)
        return [chunk for line in lines for chunk in self._line(line)]

    def end(self) -> list[object]:
        """Return the chunks that the end of the stream completes."""
        rest, self._rest = bytes(self._rest), bytearray()
        if not self.is_plain:
            return [*self._line(rest), *self._line(b"")]
        try:
            return [json.loads(rest)]
        except ValueError:
            return [json.loads(line) for line in rest.splitlines() if line.strip()]

    def _line(self, line: bytes) -> list[object]:
        if line:
            name, _, value = line.decode("utf-8", "replace").removeprefix("\ufeff").partition(":")
            value = value.removeprefix(" ")
            if name == "data":
                self._data.append(value)
            elif name == "event":
                self._kind = value.strip()
            return []
        data, kind = "\n".join(self._data).strip(), self._kind
        self._data, self._kind = [], ""
        if kind == "error":
            found = json_or_text(data.encode())
            check_answered(found)
            raise NoAnswer(told_in(found), None)
        if not data:
            return []
        return [DONE if data.startswith(DONE) else json.loads(data)]


# --- embeddings -------------------------------------------------------------------------------------------------------


def vectors_of(body: object, count: int) -> list[list[float]]:
    """Return the vectors of an answer in the order of the texts.

    Rows that have no numbers stand in the order of the texts; otherwise each text has one.
    """
    rows = body
    if isinstance(body, Mapping):
        rows = body.get("data", body.get("embeddings"))
    if not isinstance(rows, list):
        raise TypeError("it has no list of vectors")
    if len(rows) != count:
        raise ValueError(f"it has {len(rows)} vectors for {count} texts")
    numbers = [row.get("index") if isinstance(row, Mapping) else None for row in rows]
    vectors = [numbers_of(row["embedding"] if isinstance(row, Mapping) else row) for row in rows]
    if all(number is None for number in numbers):
        return vectors
    places = [int(number) for number in numbers if number is not None]
    if sorted(places) != list(range(count)):
        raise ValueError(f"its vectors have the numbers {places}")
    return [vector for _, vector in sorted(zip(places, vectors, strict=True), key=lambda pair: pair[0])]


def numbers_of(vector: object) -> list[float]:
    """Return a vector, which may be the bytes of its numbers as base64."""
    if not isinstance(vector, str):
        if not isinstance(vector, Iterable):
            raise TypeError(f"a vector is of the type {type(vector).__name__}")
        return [float(number) for number in vector]
    numbers = array("f", base64.b64decode(vector, validate=True))
    if sys.byteorder == "big":  # The bytes are in the order of little-endian machines.
        numbers.byteswap()
    return numbers.tolist()
