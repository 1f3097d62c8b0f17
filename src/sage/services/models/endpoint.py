"""A server that speaks the OpenAI protocol, as one service sees it: clients, retries, time-outs and a limit."""

from __future__ import annotations

import asyncio
import email.utils
import logging
import os
import random
import ssl
import threading
import time
from contextlib import asynccontextmanager, contextmanager, suppress
from dataclasses import dataclass, fields
from importlib import import_module
from typing import TYPE_CHECKING, NamedTuple, Protocol, TypeVar

from sage._bucket import Bucket
from sage._extras import load
from sage.errors import ServiceError, ServiceTimeoutError, ServiceUnavailableError, hint, short
from sage.services._shared.address import (
    basic_auth,
    checked_url,
    is_here,
    query_of,
    redact_url,
    resolved,
    split_credentials,
)
from sage.services._shared.secret import Secret, redact, redacted_text
from sage.services.models.completions import TOO_LONG, NoAnswer, json_or_text, told_in
from sage.services.models.limits import limit_in
from sage.services.models.loop_thread import LoopThread

if TYPE_CHECKING:
    from asyncio import AbstractEventLoop
    from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Coroutine, Iterator
    from types import ModuleType

    from sage.services._shared.address import Url

log = logging.getLogger(__name__)

T = TypeVar("T")

OPENAI_URL = "https://api.openai.com/v1"
OPENAI_VARIABLE = "OPENAI_API_KEY"
"""Holds the key for OpenAI's own address, and is sent to no other one unless it is named."""

RETRY_AFTER_MAX_S = 60.0
"""A server that wants more patience than this is not waited for."""

HEALTH_TIMEOUT_S = 0.5
"""Bound of asking a server whether it is there; a job gives a `health` at least 1 s."""

DRAIN_TIMEOUT_S = 0.1
"""Bound of reading to the end of a connection that is to be used again, after the end of the answer."""

REFUSED = (401, 403)
NOT_TAKEN = (400, 413, 422)
"""The status of a request that the server does not take, however often it is sent."""

AWAY = (502, 503, 504)
"""The statuses of a proxy whose server cannot be reached."""

CLOSE_TIMEOUT_S = 5.0
"""Bound of closing the connections of one event loop."""

VERSION = "api-version"
"""The part of an address that Azure wants; any other may be a key."""

SOCKS = 'A proxy with "socks5://" needs the package socksio.'
NO_WORDS = "it does not say why"

PROXIES = ("ALL_PROXY", "HTTPS_PROXY", "HTTP_PROXY")


class Response(Protocol):
    """An answer whose body comes in pieces."""

    request: object
    aiter_bytes: Callable[[], AsyncIterator[bytes]]
    aclose: Callable[[], Awaitable[None]]


class RawAnswer(Protocol):
    """An answer as the client library has it before it reads the JSON."""

    content: bytes
    status_code: int
    http_response: Response


class _Requests(Protocol):
    create: Callable[..., Awaitable[RawAnswer]]
    list: Callable[..., Awaitable[RawAnswer]]


class _RawRequests(Protocol):
    with_raw_response: _Requests


class _Chat(Protocol):
    completions: _RawRequests


class Client(Protocol):
    """The parts of `openai.AsyncOpenAI` that are used here."""

    chat: _Chat
    embeddings: _RawRequests
    models: _RawRequests
    close: Callable[[], Awaitable[None]]


class _StatusError(Protocol):
    status_code: int
    body: object


class _Pause(NamedTuple):
    seconds: float


class RefusedError(ServiceError, ValueError):
    """A server does not take a request, and will not take it later either; one part of it alone may be the reason."""


@dataclass(frozen=True, slots=True)
class EndpointOptions:
    """How a server is reached.

    Attributes:
        timeout_s: how long the server may be silent: while it is connected to, before the first byte of an answer, and
            between two bytes, in seconds.
        retries_max: how often a request is sent again after 429, 408, a 5xx answer or a connection that failed.
        backoff_s: first and longest pause before it is sent again, in seconds; the pause doubles each time, and a part
            that is drawn is taken off, so that clients do not come back together. A `Retry-After` of the server counts
            instead, up to 60 s.
        keeps_limits: whether requests wait for the limits that the server tells in its answers by `x-ratelimit-*`.
    """

    timeout_s: float = 60.0
    retries_max: int = 3
    backoff_s: tuple[float, float] = (0.5, 8.0)
    keeps_limits: bool = True

    def __post_init__(self) -> None:
        """Refuse values that cannot work."""
        if self.timeout_s <= 0:
            raise ValueError(f"timeout_s is {self.timeout_s}, which leaves no time for an answer")
        if self.retries_max < 0:
            raise ValueError(f"retries_max is {self.retries_max}, a negative number of retries")
        if min(self.backoff_s) < 0:
            raise ValueError(f"backoff_s is {self.backoff_s}, with a negative number of seconds")

    @property
    def patience_s(self) -> float:
        """How long a server may be away, in seconds: the time-out of a request with all its pauses."""
        return self.timeout_s + sum(self.pause_s(count) for count in range(1, self.retries_max + 1))

    def pause_s(self, count: int) -> float:
        """Return the longest pause after so many tries, in seconds."""
        first_s, longest_s = self.backoff_s
        return min(first_s * 2.0 ** min(count - 1, 30), longest_s)


class Endpoint:
    """Sends requests to one server and turns their failures into errors."""

    _openai: ModuleType

    def __init__(
        self, base_url: Url, secret: Secret, model: str, options: EndpointOptions, on_retry: Callable[[], object]
    ) -> None:
        if secret == Secret() and base_url == OPENAI_URL:
            secret = Secret(variable=OPENAI_VARIABLE)
        if isinstance(base_url, str):
            split_credentials("base_url", checked_url("base_url", base_url), secret != Secret())
        self._base_url = base_url
        self._secret = secret
        self._model = model
        self._options = options
        self._on_retry = on_retry
        self._settings: dict[str, object] = {}
        self._thread: LoopThread | None = None
        self._lock = threading.Lock()
        self._of_loops: dict[AbstractEventLoop, tuple[AsyncGenerator[Client, None], Client]] = {}
        self._closing: set[object] = set()
        self._rate = Bucket(None, time.monotonic)
        self._knows_limits = False
        self._resumes_at = 0.0  # when the server wants to be asked again, by its latest `Retry-After`
        self._key = ""
        self._password, self._basic = "", ""
        self._in_query: tuple[str, ...] = ()
        self._answered_at = 0.0
        self._is_accepted = False
        self.url = base_url if isinstance(base_url, str) else "not known yet"
        self.is_open = False

    @property
    def shown_url(self) -> str:
        """The address without its secret parts."""
        return redact_url(self.url)

    @property
    def lasting_url(self) -> str:
        """The address as it is in the next run too, or nothing where it is that of a service."""
        return self.shown_url if isinstance(self._base_url, str) else ""

    def describe(self) -> dict[str, object]:
        """Return the settings, without the key."""
        options = {field.name: getattr(self._options, field.name) for field in fields(self._options)}
        return {"base_url": self.shown_url, "key": f"from {self._secret.source}", **options}

    @property
    def headers(self) -> dict[str, object]:
        """The header argument of a request: without a key, `Authorization` is omitted or has the address's password."""
        return {} if self._key else {"extra_headers": {"Authorization": self._basic or self._openai.Omit()}}

    def without_key(self, text: str) -> str:
        """Return a text in which the key does not stand."""
        return redact(text, *self.secrets)

    @property
    def secrets(self) -> tuple[str, ...]:
        """The secrets that messages must not show: the key or the address's password, in all forms that are sent."""
        return self._key, self._password, self._basic.removeprefix("Basic "), *self._in_query

    # --- from setup to cleanup ---

    def open(self) -> None:
        """Load the client library and read the key. Nothing is sent yet."""
        self._openai = load("openai", "llm")
        self._key = self._secret.read()
        self.url = resolved(self._base_url)
        url, query = query_of(checked_url("base_url", self.url))
        url, user = split_credentials("base_url", url, self._key)
        self._password, self._basic = user.partition(":")[2], basic_auth(user) if user else ""
        # Retries are counted and bounded here, for threads and coroutines alike.
        self._settings = {"base_url": url, "max_retries": 0, "timeout": self._options.timeout_s}
        self._settings["api_key"] = self._key or "none"  # The client insists on one, and would look for it elsewhere.
        self._settings["default_query"] = query
        self._in_query = tuple(value for name, value in query.items() if name != VERSION)
        self._answered_at = time.monotonic()
        self._is_accepted = False
        self.is_open = True
        self._thread = LoopThread(f"requests to {self.shown_url}")
        self._thread.run(self._of_loop())  # A proxy that cannot be used is found now.

    def end(self) -> None:
        """Let go whoever waits for an answer on a thread."""
        self.is_open = False
        if self._thread is not None:
            self._thread.end()

    def close(self) -> None:
        """Close every connection on the loop that it belongs to. Does nothing twice."""
        self.end()
        thread, self._thread = self._thread, None
        if thread is not None:
            thread.close()
        with self._lock:
            left = [(loop, generator) for loop, (generator, _) in self._of_loops.items()]
        for loop, generator in left:
            self._close_on(loop, generator)

    def _close_on(self, loop: AbstractEventLoop, generator: AsyncGenerator[Client, None]) -> None:
        async def end() -> None:
            await generator.aclose()

        if not loop.is_running():
            return  # It closes them itself, as it ends; see `_of_loop`.
        try:
            here = asyncio.get_running_loop()
        except RuntimeError:
            here = None
        if here is loop:
            task = loop.create_task(end())
            self._closing.add(task)
            task.add_done_callback(self._closing.discard)
            return
        future = asyncio.run_coroutine_threadsafe(end(), loop)
        future.result(CLOSE_TIMEOUT_S)

    def health(self) -> bool:
        """Return whether the server can be asked.

        It is asked for its models, within `HEALTH_TIMEOUT_S`. A server that is away for less than `patience_s` counts
        as there, as requests wait for it as long; a key that is refused does not, unless a request with it has been
        answered: it may be one that has no right to the list of models.
        """
        if not self.is_open:
            return False
        try:
            status = self.run(self._status())
        except ServiceUnavailableError:
            return False
        if status is None or status in AWAY:
            return time.monotonic() - self._answered_at <= self._options.patience_s
        self._answered_at = time.monotonic()
        return self._is_accepted or status not in REFUSED

    async def _status(self) -> int | None:
        client = await self._of_loop()
        try:
            async with asyncio.timeout(HEALTH_TIMEOUT_S):
                answer = await client.models.with_raw_response.list(timeout=HEALTH_TIMEOUT_S, **self.headers)
            return answer.status_code
        except self._openai.APIStatusError as error:
            return int(error.status_code)
        except (self._openai.OpenAIError, TimeoutError):
            return None

    # --- requests ---

    def run(self, coroutine: Coroutine[object, object, T]) -> T:
        """Wait on a thread for a coroutine of this endpoint, which runs on its own loop."""
        if self._thread is None:
            coroutine.close()
            raise self._ended()
        return self._thread.run(coroutine)

    async def call(self, send: Callable[[Client], Awaitable[T]]) -> T:
        """Return the result of `send`, which gets a client and is called again after temporary errors."""
        async with self.opened(send) as answer:
            return answer

    @asynccontextmanager
    async def opened(self, send: Callable[[Client], Awaitable[T]]) -> AsyncIterator[T]:
        """Provide the result of `send`.

        A failure in the block, while the answer arrives in pieces, becomes an error like others and is not retried.
        """
        tries = Tries(self)
        while True:
            answer = await self._one_try(send, tries)
            if not isinstance(answer, _Pause):
                with self._explained(tries):
                    yield answer
                return
            await asyncio.sleep(answer.seconds)

    def used(self, tokens: int) -> None:
        """Count the tokens of an answer towards the limit for tokens."""
        self._rate.used(tokens)

    async def contents(self, response: Response) -> AsyncGenerator[bytes, None]:
        """Yield the bytes of an answer as they come."""
        library = import_module(type(response).__module__.partition(".")[0])  # The client has one of two.
        try:
            async for content in response.aiter_bytes():
                yield content
        except library.TimeoutException as error:
            raise self._openai.APITimeoutError(request=response.request) from error
        except library.RequestError as error:
            raise self._openai.OpenAIError(redacted_text(error, *self.secrets)) from error

    async def drain(self, contents: AsyncGenerator[bytes, None]) -> None:
        """Read to the end of an answer that is complete, so that its connection can be used again."""
        with suppress(TimeoutError, self._openai.OpenAIError):
            async with asyncio.timeout(DRAIN_TIMEOUT_S):
                async for _ in contents:
                    pass

    @contextmanager
    def reading(self, content: bytes) -> Iterator[None]:
        """Make an error from an error response, or from one that cannot be understood."""
        server = f"model server {self.shown_url}"
        try:
            yield
        except NoAnswer as error:
            text = f'{server} gave an error in place of an answer for model "{self._model}": '
            text += redacted_text(str(error), *self.secrets) or NO_WORDS
            if error.code in NOT_TAKEN or TOO_LONG.search(str(error)):
                raise RefusedError(text, fault="user") from None
            raise ServiceError(text, fault="external") from None
        except (AttributeError, LookupError, TypeError, ValueError) as error:
            text = f'{server} gave a malformed answer for model "{self._model}": '
            text += self.without_key(f"{short(error)}, in {short(content.decode('utf-8', 'replace'))}")
            raise ServiceError(text, fault="external") from None

    def broke_off(self, reason: str) -> ServiceError:
        """Return the error for an answer that ended before it was complete."""
        text = f'model server {self.shown_url} broke off, asked for model "{self._model}": {reason}'
        return ServiceError(text, fault="external")

    async def _one_try(self, send: Callable[[Client], Awaitable[T]], tries: Tries) -> T | _Pause:
        client = await self._of_loop()
        failure: Exception
        await self._rate.wait(self._check_open)
        while (left_s := self._resumes_at - time.monotonic()) > 0:
            await asyncio.sleep(left_s)
        try:
            answer = await send(client)
            self._answered_at, self._is_accepted = time.monotonic(), True
            self._learn(answer)
            return answer
        except (self._openai.OpenAIError, ValueError) as error:
            failure = error
            self._learn(getattr(error, "response", None))
        # Raised outside of the handler, so that the client's error, which holds the request and its key, stays behind.
        return _Pause(tries.pause_s(failure))

    def _learn(self, answer: object) -> None:
        """Take in the limits that an answer or a refusal tells in its headers."""
        headers = getattr(answer, "headers", None)
        if not self._options.keeps_limits:
            return
        requests, tokens = (None if headers is None else limit_in(headers, kind) for kind in ("requests", "tokens"))
        self._rate.learn(requests, tokens)
        if not self._knows_limits and (requests or tokens):
            self._knows_limits = True
            log.info("limits told server=%s requests=%s tokens=%s", self.shown_url, requests, tokens)

    @contextmanager
    def _explained(self, tries: Tries) -> Iterator[None]:
        failure: Exception | None = None
        try:
            yield
        except self._openai.OpenAIError as error:
            failure = error
        if failure is not None:
            raise tries.explained(failure)

    async def _of_loop(self) -> Client:
        """Return the client of the loop that runs; its connections can be used on no other.

        It lives in an asynchronous generator: a loop that ends in order closes those that wait on it, so the
        connections are closed on their own loop, also if the loop ends before the service does.
        """
        loop = asyncio.get_running_loop()
        with self._lock:
            known = self._of_loops.get(loop)
        if known is not None:
            return known[1]
        if self._thread is None:
            raise self._ended()
        generator = self._living(loop)
        # Nothing else runs on this loop until the generator has given its client.
        client = await anext(generator)
        with self._lock:
            self._of_loops[loop] = generator, client
        return client

    async def _living(self, loop: AbstractEventLoop) -> AsyncGenerator[Client, None]:
        client = self._made()
        try:
            yield client
        finally:
            with self._lock:
                self._of_loops.pop(loop, None)
            await client.close()

    def _made(self) -> Client:
        """Return a client; one of a server on this machine does not ask a proxy for it."""
        openai = self._openai
        settings = dict(self._settings)
        if is_here(self.url):
            verify = ssl.create_default_context() if self.url.lower().startswith("https") else False
            settings["http_client"] = openai.DefaultAsyncHttpxClient(trust_env=False, verify=verify)
        proxies = {name: os.environ.get(name) or os.environ.get(name.lower()) for name in PROXIES}
        try:
            client: Client = openai.AsyncOpenAI(**settings)
            return client
        except Exception:  # of the types of two libraries, with passwords of proxies in their texts
            if not any(proxies.values()):
                raise
        given = ", ".join(f"{name}={redact_url(proxy)}" for name, proxy in proxies.items() if proxy)
        error = ServiceError(
            f"model server {self.shown_url} cannot be asked through the proxy of {given}", fault="user"
        )
        raise hint(error, f"Give the address of an http proxy, or list the server in NO_PROXY. {SOCKS}")

    def _check_open(self) -> None:
        if not self.is_open:
            raise self._ended()

    def _ended(self) -> ServiceUnavailableError:
        error = ServiceUnavailableError(f"the client of model server {self.shown_url} is not open")
        return hint(error, "It is open from setup() to cleanup(), which a job calls.")


class Tries:
    """The attempts of one request: their number, the reaction to a failure, and its message."""

    def __init__(self, endpoint: Endpoint) -> None:
        self._endpoint = endpoint
        self._count = 0

    def pause_s(self, failure: Exception) -> float:
        """Return how long to wait before the next try, in seconds."""
        options = self._endpoint._options
        asked_s = self._retry_after_s(failure)
        self._count += 1
        if not self._may_pass(failure) or self._count > options.retries_max or (asked_s or 0) > RETRY_AFTER_MAX_S:
            raise self.explained(failure)
        self._endpoint._on_retry()
        if asked_s is not None:  # nobody asks before that, and not only this request
            resumes_at = time.monotonic() + asked_s
            self._endpoint._resumes_at = max(self._endpoint._resumes_at, resumes_at)
        backoff_s = options.pause_s(self._count)
        # Never earlier than the server asked for, and all at once neither.
        return random.uniform(0.5, 1.0) * backoff_s if asked_s is None else asked_s + random.uniform(0, 0.1) * asked_s

    def explained(self, failure: Exception) -> ServiceError:
        """Describe a failure for the user, without the key."""
        endpoint = self._endpoint
        openai = endpoint._openai
        server = f"model server {endpoint.shown_url}"
        model = f'model "{endpoint._model}"'
        tries = f" in {self._count} tries" if self._count > 1 else ""
        text = redacted_text(failure, *endpoint.secrets)
        if isinstance(failure, openai.APITimeoutError):
            silent = f"{server} was silent for {endpoint._options.timeout_s:g} s, asked for {model}{tries}"
            return hint(ServiceTimeoutError(silent, fault="external"), "Raise timeout_s if the model needs longer.")
        if isinstance(failure, openai.APIStatusError):
            unread = json_or_text(failure.response.content) if failure.response.is_stream_consumed else None
            words = told_in(failure.body) or told_in(unread)
            text = redacted_text(words, *endpoint.secrets) or NO_WORDS
            return self._status_explained(
                failure, f"{server} answered {failure.status_code} for {model}{tries}: {text}"
            )
        if isinstance(failure, openai.APIConnectionError):
            cause = redacted_text(failure.__cause__ or failure, *endpoint.secrets)
            error = ServiceUnavailableError(f"{server} cannot be reached{tries}: {cause}", fault="external")
            return hint(error, "Check that it is running and that base_url is right, with its port and /v1.")
        if isinstance(failure, openai.OpenAIError):
            return ServiceError(f"{server} broke off, asked for {model}: {text}", fault="external")
        return ServiceError(f"{server} gave a malformed answer for {model}: {text}", fault="external")

    def _status_explained(self, failure: _StatusError, text: str) -> ServiceError:
        secret = self._endpoint._secret
        match failure.status_code:
            case 401 | 403:
                error = ServiceError(text, fault="user")
                return hint(error, f"The key came from {secret.source}; the server refuses it.")
            case 404:
                error = ServiceError(text, fault="user")
                return hint(
                    error, f"Look for the model in {self._endpoint.shown_url}/models, and whether base_url is right."
                )
            case 429:
                asked_s = self._retry_after_s(failure)
                error = ServiceError(text, fault="external")
                wait = "" if asked_s is None else f" It asks to wait for {asked_s:g} s."
                return hint(
                    error,
                    f"The server does not accept more requests now.{wait} A lower concurrency of the service may help.",
                )
            case status:
                if _is_not_taken(failure):
                    return RefusedError(text, fault="user")
                return ServiceError(text, fault="user" if status < 500 else "external")

    def _may_pass(self, failure: Exception) -> bool:
        openai = self._endpoint._openai
        if isinstance(failure, openai.APIStatusError):
            # A server may know that trying again is useless, such as without money left.
            useless = failure.response.headers.get("x-should-retry") == "false" or _is_not_taken(failure)
            return not useless and (failure.status_code in (408, 429) or failure.status_code >= 500)
        if isinstance(failure, openai.APITimeoutError):
            # A slow model would be asked a second time while it still works on the answer.
            return type(failure.__cause__).__name__ == "ConnectTimeout"
        return isinstance(failure, openai.APIConnectionError)

    def _retry_after_s(self, failure: object) -> float | None:
        if not isinstance(failure, self._endpoint._openai.APIStatusError):
            return None
        headers = failure.response.headers
        with suppress(ValueError):
            return _checked_pause(float(headers.get("retry-after-ms", "")) / 1000.0)
        value = headers.get("retry-after", "").strip()
        try:
            seconds = float(value)
        except ValueError:
            date = email.utils.parsedate_tz(value)
            seconds = float("nan") if date is None else email.utils.mktime_tz(date) - time.time()
        return _checked_pause(seconds)


def _checked_pause(seconds: float) -> float | None:
    return max(seconds, 0.0) if seconds == seconds else None


def _is_not_taken(failure: _StatusError) -> bool:
    """Return whether a server refuses the request itself; some answer status 500 to a long text."""
    status = failure.status_code
    return status in NOT_TAKEN or (status == 500 and TOO_LONG.search(told_in(failure.body)) is not None)
