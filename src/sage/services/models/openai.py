"""Language models and embeddings of any server that speaks the OpenAI protocol."""

from __future__ import annotations

from contextlib import aclosing
from functools import partial
from typing import TYPE_CHECKING, Literal, Unpack

from sage.errors import ServiceError
from sage.services._shared.measures import MeasuredService
from sage.services._shared.secret import Secret
from sage.services.models.completions import Completion, Events, body_of, tokens_in, vectors_of
from sage.services.models.embeddings import EmbeddingService, checked_dimension, well_formed
from sage.services.models.endpoint import OPENAI_URL, Endpoint, EndpointOptions
from sage.services.models.llm import (
    Asked,
    AsyncPieces,
    Image,
    LLMService,
    Pieces,
    checked_tokens,
    conversation_of,
    stops_of,
)
from sage.services.models.tools import choice_of, tool_of

if TYPE_CHECKING:
    import os
    from collections.abc import AsyncGenerator, Awaitable, Callable, Generator, Mapping, Sequence

    from sage.services._shared.address import Url
    from sage.services.models.embeddings import EmbeddingOptions
    from sage.services.models.endpoint import Client, RawAnswer, Response
    from sage.services.models.llm import Answer, Keep, Message, Part
    from sage.services.models.tools import AnyTool


class AskedOfServer(Asked, total=False):
    """The options of a prompt; see `LLMService.generate` for the first three.

    Attributes:
        tools: the tools that the model may ask for: functions, instances of `Tool`, or schemas as the protocol has
            them. The model calls none itself: `Answer.tool_calls` says which it wants.
        tool_choice: "auto", "none", "required", or the name of the tool that the model has to ask for.
        response_format: the form of the answer, such as {"type": "json_object"}.
    """

    tools: Sequence[AnyTool]
    tool_choice: str | Mapping[str, object] | None
    response_format: Mapping[str, object] | None


class OfServer(MeasuredService):
    """A model of a server, which is asked through an endpoint."""

    _endpoint: Endpoint
    _model: str

    def _reach(
        self,
        model: str,
        base_url: Url,
        key: tuple[str | None, str | None, str | os.PathLike[str] | None],
        options: EndpointOptions | None,
    ) -> None:
        self._model = model
        count = partial(self.counted, "retries")
        self._endpoint = Endpoint(base_url, Secret(*key), model, options or EndpointOptions(), count)

    def stop(self) -> None:
        """Let go whoever still waits for an answer."""
        self._endpoint.end()

    def cleanup(self) -> None:
        """Close the connections, and the cache if there is one."""
        try:
            self._endpoint.close()
        finally:
            super().cleanup()

    def health(self) -> bool:
        """Return whether the server can be asked, which takes half a second at most."""
        return super().health() and self._endpoint.health()

    def describe(self) -> Mapping[str, object]:
        """Return the settings, without the key."""
        return {**super().describe(), "model": self._model, **self._endpoint.describe()}


class OpenAILLM(OfServer, LLMService):
    """A chat model of a server that speaks the OpenAI protocol: OpenAI, vLLM, llama.cpp, Ollama and many others.

    Its `health` asks the server for the list of its models. A server without one is as good as others; one that is away
    counts as healthy for as long as a request would wait for it, `EndpointOptions.patience_s`; a key that is refused
    does not, unless a request has been answered with it.

    Args:
        model: the model's name, as the server calls it.
        base_url: the server's address up to and with the version; of a service that is a command, `handle.url`. A name
            and a password in it are sent as `Authorization: Basic`, in place of a key.
        api_key: the key. Better name a place that holds it, because a program is read by many people.
        api_key_env: the environment variable that holds the key; for OpenAI's own address it is OPENAI_API_KEY, for
            another server the default is not to send a key.
        api_key_file: the file that holds the key.
        request_options: time-outs and retries.
        stream_usage: whether to ask for the count of tokens of streamed answers, which not every server can give.
        token_limit: the field that carries `max_tokens`; OpenAI's newer models want the second one.
        extra: further fields of each request that the server knows, such as {"top_p": 0.9}.
    """

    def __init__(
        self,
        model: str,
        *,
        base_url: Url = OPENAI_URL,
        api_key: str | None = None,
        api_key_env: str | None = None,
        api_key_file: str | os.PathLike[str] | None = None,
        request_options: EndpointOptions | None = None,
        stream_usage: bool = True,
        token_limit: Literal["max_tokens", "max_completion_tokens"] = "max_tokens",
        extra: Mapping[str, object] | None = None,
    ) -> None:
        super().__init__()
        self._reach(model, base_url, (api_key, api_key_env, api_key_file), request_options)
        self._stream_usage = stream_usage
        self._token_limit = token_limit
        self._extra = dict(extra or {})

    def setup(self) -> None:
        """Read the key and make the client. Nothing is sent yet.

        Raises:
            MissingExtraError: the package openai is not installed.
            ServiceError: the key is not where it should be.
        """
        self._endpoint.open()

    def generate(self, prompt: str | Sequence[Message], **asked: Unpack[AskedOfServer]) -> Answer:
        """Return the answer to a prompt; see `LLMService.generate`, and `AskedOfServer` for the settings."""
        with self.measured("generate"):
            return self._endpoint.run(self._answer(self._request(prompt, **asked)))

    async def agenerate(self, prompt: str | Sequence[Message], **asked: Unpack[AskedOfServer]) -> Answer:
        """Return the answer as `generate` does, and let other coroutines go on meanwhile."""
        with self.measured("agenerate"):
            return await self._answer(self._request(prompt, **asked))

    def stream(self, prompt: str | Sequence[Message], **asked: Unpack[AskedOfServer]) -> Pieces:
        """Yield the answer in pieces as they come; see `LLMService.stream`.

        After the last one, `answer` of the iterator is the whole answer, with the calls of tools. A reader that stops
        before the end should close the iterator, which closes the connection.
        """
        return Pieces(partial(self._read, partial(self._request, prompt, **asked)))

    def astream(self, prompt: str | Sequence[Message], **asked: Unpack[AskedOfServer]) -> AsyncPieces:
        """Yield the answer as `stream` does, and let other coroutines go on meanwhile."""
        return AsyncPieces(partial(self._pieces, partial(self._request, prompt, **asked), "astream"))

    # --- behind it ---

    def _request(
        self,
        prompt: object,
        *,
        max_tokens: int | None = None,
        temperature: float | None = None,
        stop: str | Sequence[str] | None = None,
        tools: Sequence[AnyTool] | None = (),
        tool_choice: str | Mapping[str, object] | None = None,
        response_format: Mapping[str, object] | None = None,
    ) -> dict[str, object]:
        request: dict[str, object] = {"model": self._model, "messages": [*map(_sent, conversation_of(prompt))]}
        checked_tokens(max_tokens)
        offered = [tool_of(tool).schema for tool in tools or ()]
        optional: dict[str, object] = {
            self._token_limit: max_tokens,
            "temperature": temperature,
            "stop": stops_of(stop) or None,
            "tools": offered or None,
            "tool_choice": choice_of(tool_choice, offered),
            "response_format": response_format,
            "extra_body": self._extra or None,
        }
        return {**request, **{name: value for name, value in optional.items() if value is not None}}

    def _used(self, answer: Answer) -> None:
        super()._used(answer)
        self._endpoint.used((answer.prompt_tokens or 0) + (answer.completion_tokens or 0))

    async def _answer(self, request: Mapping[str, object]) -> Answer:
        def send(client: Client) -> Awaitable[RawAnswer]:
            return client.chat.completions.with_raw_response.create(**request, **self._endpoint.headers)

        content = (await self._endpoint.call(send)).content
        with self._endpoint.reading(content):
            completion, events = Completion(self._model), Events()
            for chunk in (*events.feed(content), *events.end()):
                completion.add(chunk)
            answer = completion.answer()
        self._used(answer)
        return answer

    def _read(self, ask: Callable[[], Mapping[str, object]], keep: Keep) -> Generator[str, None, None]:
        pieces = self._pieces(ask, "stream", keep)

        async def following() -> str | None:
            return await anext(pieces, None)

        async def end() -> None:
            await pieces.aclose()

        try:
            while (piece := self._endpoint.run(following())) is not None:
                yield piece
        finally:
            if self._endpoint.is_open:
                self._endpoint.run(end())

    async def _pieces(
        self, ask: Callable[[], Mapping[str, object]], method: str, keep: Keep
    ) -> AsyncGenerator[str, None]:
        def send(client: Client) -> Awaitable[RawAnswer]:
            return client.chat.completions.with_raw_response.create(**streamed, **self._endpoint.headers)

        with self.measured(method):
            streamed = {**ask(), "stream": True}
            if self._stream_usage:
                streamed["stream_options"] = {"include_usage": True}
            try:
                async with self._endpoint.opened(send) as raw, aclosing(raw.http_response) as response:
                    async for piece in self._texts(response, keep):
                        yield piece
            except GeneratorExit:
                return  # The reader has enough, which is not an error.

    async def _texts(self, response: Response, keep: Keep) -> AsyncGenerator[str, None]:
        completion, events = Completion(self._model), Events()
        content = b""
        async with aclosing(self._endpoint.contents(response)) as contents:
            async for content in contents:
                with self._endpoint.reading(content):
                    texts = [completion.add(chunk) for chunk in events.feed(content)]
                for text in filter(None, texts):
                    yield text
                if completion.is_done:
                    await self._endpoint.drain(contents)
                    break
        with self._endpoint.reading(content):
            texts = [completion.add(chunk) for chunk in events.end()]
        if completion.is_begun and not completion.is_over and not events.is_plain:
            raise self._endpoint.broke_off("the stream ended before the answer did")
        with self._endpoint.reading(content):
            answer = completion.answer()
        for text in filter(None, texts):
            yield text
        self._used(answer)
        keep(answer)


def _sent(message: Message) -> dict[str, object]:
    """Return a message as the protocol has it."""
    given = message.content
    content = well_formed(given) if isinstance(given, str) else [*map(_sent_part, given)]
    sent: dict[str, object] = {"role": message.role, "content": content}
    if message.tool_calls:
        sent["content"] = content or None
        sent["tool_calls"] = [
            {"id": call.id, "type": "function", "function": {"name": call.name, "arguments": call.arguments}}
            for call in message.tool_calls
        ]
    if message.tool_call_id is not None:
        sent["tool_call_id"] = message.tool_call_id
    return sent


def _sent_part(part: Part) -> Mapping[str, object]:
    if isinstance(part, Image):
        return {"type": "image_url", "image_url": {"url": part.url}}
    return {"type": "text", "text": well_formed(part)} if isinstance(part, str) else part


class OpenAIEmbeddings(OfServer, EmbeddingService):
    """An embedding model of a server that speaks the OpenAI protocol.

    Args:
        model: the model's name, as the server calls it.
        dimension: how many numbers a vector has; without it, `setup` asks the server for one vector to find out.
        shortened: whether to ask the server for vectors of `dimension` numbers, which some models can give.
        base_url: the server's address up to and with the version; of a service that is a command, `handle.url`.
        api_key: the key; see `OpenAILLM`.
        api_key_env: the environment variable that holds the key.
        api_key_file: the file that holds the key.
        request_options: time-outs and retries.
        **settings: those of `EmbeddingService`; `batch_max` is how many texts one request has.
    """

    def __init__(
        self,
        model: str,
        *,
        dimension: int | None = None,
        shortened: bool = False,
        base_url: Url = OPENAI_URL,
        api_key: str | None = None,
        api_key_env: str | None = None,
        api_key_file: str | os.PathLike[str] | None = None,
        request_options: EndpointOptions | None = None,
        **settings: Unpack[EmbeddingOptions],
    ) -> None:
        super().__init__(**settings)
        if shortened and dimension is None:
            raise ValueError("shortened needs a dimension to shorten vectors to")
        self._reach(model, base_url, (api_key, api_key_env, api_key_file), request_options)
        self._dimension = None if dimension is None else checked_dimension(dimension)
        self._shortened = shortened

    @property
    def name(self) -> str:
        """The model's name."""
        return self._model

    @property
    def dimension(self) -> int:
        """How many numbers a vector has.

        Raises:
            ServiceError: it was not given, and `setup` has not asked yet.
        """
        if self._dimension is None:
            raise ServiceError(f'the dimension of model "{self._model}" is not known before setup')
        return self._dimension

    def setup(self) -> None:
        """Read the key, make the client, and ask for the dimension where it was not given.

        Raises:
            MissingExtraError: the package openai is not installed.
            ServiceError: the key is not where it should be, or the server does not answer.
        """
        self._endpoint.open()
        if self._dimension is None:
            (vector,) = self._encode(["dimension"])
            self._dimension = len(vector)
        super().setup()

    def _shown_dimension(self) -> int | None:
        return self._dimension

    def _identity(self) -> str:
        # Servers may have different models under one name; that of a command has another port each time.
        return f"{super()._identity()}/{self._endpoint.lasting_url}"

    def _encode(self, texts: list[str]) -> list[list[float]]:
        return self._endpoint.run(self._aencode(texts))

    async def _aencode(self, texts: list[str]) -> list[list[float]]:
        # As numbers: the client would ask for base64 otherwise, which many servers do not know.
        request: dict[str, object] = {
            "model": self._model,
            "input": [well_formed(text) for text in texts],
            "encoding_format": "float",
        }
        if self._shortened:
            request["dimensions"] = self._dimension

        def send(client: Client) -> Awaitable[RawAnswer]:
            return client.embeddings.with_raw_response.create(**request, **self._endpoint.headers)

        content = (await self._endpoint.call(send)).content
        with self._endpoint.reading(content):
            body = body_of(content)
            vectors = vectors_of(body, len(texts))
        prompt_tokens = tokens_in(body.get("usage") if isinstance(body, dict) else None, "prompt_tokens")
        if prompt_tokens is not None:
            self.counted("prompt_tokens", prompt_tokens)
            self._endpoint.used(prompt_tokens)
            if self.ctx is not None:
                self.ctx.used(prompt_tokens=prompt_tokens)
        if len({len(vector) for vector in vectors}) > 1:
            raise ServiceError(f'model "{self._model}" gave vectors of different lengths', fault="external")
        return vectors
