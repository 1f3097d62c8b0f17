"""Language models and embeddings of any server that speaks the OpenAI protocol."""

from __future__ import annotations

from contextlib import aclosing
from functools import partial
from typing import TYPE_CHECKING, Any, Literal

from sage.errors import ServiceError, short
from sage.services.embeddings import EmbeddingService, checked_dimension, well_formed
from sage.services.endpoint import OPENAI_URL, Endpoint, EndpointOptions
from sage.services.llm import Answer, LLMService, checked_tokens, conversation_of, stops_of
from sage.services.secret import Secret

if TYPE_CHECKING:
    import os
    from collections.abc import AsyncGenerator, Awaitable, Callable, Generator, Mapping, Sequence

    from openai import AsyncOpenAI

    from sage.services.address import Url
    from sage.services.llm import Message


class OpenAILLM(LLMService):
    """A chat model of a server that speaks the OpenAI protocol: OpenAI, vLLM, llama.cpp, Ollama and many others.

    Its `health` asks the server for the list of its models. A server without one is as good as others; one that is away
    counts as healthy for as long as a request would wait for it, `EndpointOptions.patience_s`; a key that is refused
    does not, unless a request has been answered with it.

    Args:
        model: the model's name, as the server calls it.
        base_url: the server's address up to and with the version; of a service that is a command, `handle.url`. A name
            and a password in it are sent as `Authorization: Basic`, in place of a key.
        api_key: the key. Better name a place that holds it, as what is written in a program is read by many.
        api_key_env: the environment variable that holds the key; for OpenAI's own address it is OPENAI_API_KEY, for
            another server there is no key unless one is given.
        api_key_file: the file that holds the key.
        request_options: time-outs, retries and the limit on open requests.
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
        secret = Secret(api_key, api_key_env, api_key_file)
        options = request_options or EndpointOptions()
        self._endpoint = Endpoint(base_url, secret, model, options, lambda: self.counted("retries"))
        self._model = model
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

    def stop(self) -> None:
        """Let go whoever still waits for an answer."""
        self._endpoint.end()

    def cleanup(self) -> None:
        """Close the connections."""
        self._endpoint.close()

    def health(self) -> bool:
        """Return whether the server can be asked, which takes half a second at most."""
        return self._endpoint.health()

    def describe(self) -> Mapping[str, object]:
        """Return the settings, without the key."""
        return {**super().describe(), "model": self._model, **self._endpoint.describe()}

    def generate(
        self,
        prompt: str | Sequence[Message],
        *,
        max_tokens: int | None = None,
        temperature: float | None = None,
        stop: str | Sequence[str] | None = None,
    ) -> Answer:
        """Return the answer to a prompt; see `LLMService.generate`."""
        with self.measured("generate"):
            return self._endpoint.run(self._answer(self._request(prompt, max_tokens, temperature, stop)))

    async def agenerate(
        self,
        prompt: str | Sequence[Message],
        *,
        max_tokens: int | None = None,
        temperature: float | None = None,
        stop: str | Sequence[str] | None = None,
    ) -> Answer:
        """Return what `generate` does, and let other coroutines go on meanwhile."""
        with self.measured("agenerate"):
            return await self._answer(self._request(prompt, max_tokens, temperature, stop))

    def stream(
        self,
        prompt: str | Sequence[Message],
        *,
        max_tokens: int | None = None,
        temperature: float | None = None,
        stop: str | Sequence[str] | None = None,
    ) -> Generator[str, None, None]:
        """Yield the answer in pieces as they come; see `LLMService.stream`.

        A reader that stops before the end should close the iterator, which closes the connection.
        """
        return self._read(partial(self._request, prompt, max_tokens, temperature, stop))

    async def astream(
        self,
        prompt: str | Sequence[Message],
        *,
        max_tokens: int | None = None,
        temperature: float | None = None,
        stop: str | Sequence[str] | None = None,
    ) -> AsyncGenerator[str, None]:
        """Yield what `stream` does, and let other coroutines go on meanwhile."""
        ask = partial(self._request, prompt, max_tokens, temperature, stop)
        async with aclosing(self._pieces(ask, "astream")) as pieces:
            async for piece in pieces:
                yield piece

    # --- behind it ---

    def _request(self, prompt: Any, max_tokens: Any, temperature: Any, stop: Any) -> dict[str, Any]:
        messages = [
            {"role": message.role, "content": well_formed(message.content)} for message in conversation_of(prompt)
        ]
        request: dict[str, Any] = {"model": self._model, "messages": messages}
        checked_tokens(max_tokens)
        stops = stops_of(stop)
        if max_tokens is not None:
            request[self._token_limit] = max_tokens
        if temperature is not None:
            request["temperature"] = temperature
        if stops:
            request["stop"] = stops
        if self._extra:
            request["extra_body"] = self._extra
        return request

    async def _answer(self, request: Mapping[str, Any]) -> Answer:
        def send(client: AsyncOpenAI) -> Awaitable[Any]:
            return client.chat.completions.create(**request, **self._endpoint.headers)

        completion = await self._endpoint.call(send)
        try:
            choice = completion.choices[0]
            text = choice.message.content
            reason = choice.finish_reason
            usage = completion.usage
            prompt_tokens, completion_tokens = (usage.prompt_tokens, usage.completion_tokens) if usage else (0, 0)
            answer = Answer(
                text or "", completion.model or self._model, reason or "stop", prompt_tokens, completion_tokens
            )
        except (AttributeError, IndexError, TypeError):
            raise self._malformed(completion) from None
        self._used(answer.prompt_tokens, answer.completion_tokens)
        return answer

    def _read(self, ask: Callable[[], Mapping[str, Any]]) -> Generator[str, None, None]:
        pieces = self._pieces(ask, "stream")

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

    async def _pieces(self, ask: Callable[[], Mapping[str, Any]], method: str) -> AsyncGenerator[str, None]:
        def send(client: AsyncOpenAI) -> Awaitable[Any]:
            return client.chat.completions.create(**streamed, **self._endpoint.headers)

        with self.measured(method):
            streamed = {**ask(), "stream": True}
            if self._stream_usage:
                streamed["stream_options"] = {"include_usage": True}
            try:
                async with self._endpoint.opened(send) as chunks, chunks:
                    async for piece in self._texts(chunks):
                        yield piece
            except GeneratorExit:
                return  # The reader has enough, which is no error.

    async def _texts(self, chunks: Any) -> AsyncGenerator[str, None]:
        is_over = False
        async for chunk in chunks:
            try:
                choices, usage = chunk.choices, chunk.usage
                text = choices[0].delta.content if choices else None
                is_over = is_over or bool(choices and choices[0].finish_reason)
            except (AttributeError, IndexError, TypeError):
                raise self._malformed(chunk) from None
            if usage is not None:
                self._used(usage.prompt_tokens, usage.completion_tokens)
            if text:
                yield text
        if not is_over:
            raise ServiceError(
                f'model server {self._endpoint.shown_url} broke off, asked for model "{self._model}": '
                "the stream ended before the answer did",
                fault="external",
            )

    def _malformed(self, answer: Any) -> ServiceError:
        text = f'model server {self._endpoint.shown_url} gave a malformed answer for model "{self._model}": '
        return ServiceError(text + self._endpoint.without_key(short(answer)), fault="external")


class OpenAIEmbeddings(EmbeddingService):
    """An embedding model of a server that speaks the OpenAI protocol.

    Args:
        model: the model's name, as the server calls it.
        dimension: how many numbers a vector has; without it, `setup` asks the server for one vector to find out.
        shortened: whether to ask the server for vectors of `dimension` numbers, which some models can give.
        base_url: the server's address up to and with the version; of a service that is a command, `handle.url`.
        api_key: the key; see `OpenAILLM`.
        api_key_env: the environment variable that holds the key.
        api_key_file: the file that holds the key.
        request_options: time-outs, retries and the limit on open requests.
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
        **settings: Any,
    ) -> None:
        super().__init__(**settings)
        if shortened and dimension is None:
            raise ValueError("shortened needs a dimension to shorten vectors to")
        secret = Secret(api_key, api_key_env, api_key_file)
        options = request_options or EndpointOptions()
        self._endpoint = Endpoint(base_url, secret, model, options, lambda: self.counted("retries"))
        self._model = model
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

    def stop(self) -> None:
        """Let go whoever still waits for an answer."""
        self._endpoint.end()

    def cleanup(self) -> None:
        """Close the connections and the cache."""
        try:
            self._endpoint.close()
        finally:
            super().cleanup()

    def health(self) -> bool:
        """Return whether the server can be asked, as that of `OpenAILLM` does."""
        return super().health() and self._endpoint.health()

    def describe(self) -> Mapping[str, object]:
        """Return the settings, without the key."""
        return {**super().describe(), **self._endpoint.describe()}

    def _shown_dimension(self) -> int | None:
        return self._dimension

    def _identity(self) -> str:
        # Servers may have different models under one name; that of a command has another port each time.
        return f"{super()._identity()}/{self._endpoint.lasting_url}"

    def _encode(self, texts: list[str]) -> Any:
        return self._endpoint.run(self._aencode(texts))

    async def _aencode(self, texts: list[str]) -> Any:
        # As numbers: the client would ask for base64 otherwise, which many servers do not know.
        request: dict[str, Any] = {
            "model": self._model,
            "input": [well_formed(text) for text in texts],
            "encoding_format": "float",
        }
        if self._shortened:
            request["dimensions"] = self._dimension

        def send(client: AsyncOpenAI) -> Awaitable[Any]:
            return client.embeddings.create(**request, **self._endpoint.headers)

        answer = await self._endpoint.call(send)
        try:
            rows = {int(row.index): [float(number) for number in row.embedding] for row in answer.data}
            vectors = [rows[place] for place in range(len(texts))]
            usage = answer.usage
            self.counted("prompt_tokens", usage.prompt_tokens if usage is not None else 0)
        except (AttributeError, KeyError, TypeError, ValueError):
            text = f'model server {self._endpoint.shown_url} gave a malformed answer for model "{self._model}": '
            text += self._endpoint.without_key(short(answer))
            raise ServiceError(text, fault="external") from None
        if len({len(vector) for vector in vectors}) > 1:
            raise ServiceError(f'model "{self._model}" gave vectors of different lengths', fault="external")
        return vectors
