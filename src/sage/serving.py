"""Pipelines that answer calls: requests enter at a source, and the record that arrives at the end is the answer."""

from __future__ import annotations

import queue
import threading
from collections import deque
from contextlib import suppress
from typing import TYPE_CHECKING, Any, Protocol

from sage._calls import refuse_on_foreign_loop
from sage._current_job import wait_for
from sage._forks import refusal, useless_after_fork
from sage._types import U_co
from sage.connector import Source
from sage.errors import JobError, ServiceTimeoutError, ServiceUnavailableError, hint
from sage.functions import StopSignal
from sage.service import BaseService

if TYPE_CHECKING:
    from asyncio import AbstractEventLoop
    from collections.abc import Callable

_UNANSWERED = object()


class Request:
    """One call of a served pipeline, and the place where its answer arrives.

    It travels beside the records that came of it and counts them: when the last one ended without an answer, the answer
    is None. Older programs use it as a queue of one place, `_response_queue`.

    Attributes:
        payload: the argument of the call.
        is_streamed: whether its answer is given piece by piece.
        is_given_up: whether nobody wants the answer any more, so that the records of the request can end.
    """

    is_streamed = False

    def __init__(self, payload: Any, on_done: Callable[[Request], None] | None = None) -> None:
        self.payload = payload
        self._on_done = on_done
        self._records = 1
        self._first: object = _UNANSWERED
        self._answer: object = _UNANSWERED
        self._error: BaseException | None = None
        self._condition = threading.Condition()
        self._listening: list[Callable[[], None]] = []
        self.is_given_up = False

    @property
    def response_queue(self) -> Request:
        """Where the answer is put: the request itself."""
        return self

    def add(self, count: int) -> None:
        """Count records that came of one of this request's."""
        with self._condition:
            self._records += count

    def drop(self) -> None:
        """Count off a record that has ended."""
        with self._condition:
            self._records -= 1
            if self._records == 0 and not self.is_done:
                self._answer = None if self._first is _UNANSWERED else self._first
                self._done()

    def answer(self, record: object) -> None:
        """Give a record that arrived at the end; the request is answered once no other one can follow."""
        with self._condition:
            if self.is_done:
                return
            if self._first is _UNANSWERED:
                self._first = record
                if self._records == 1:
                    self._answer = record
                    self._done()
                return
            error = JobError("the pipeline gave a second answer to one request")
            self._error = hint(error, "serve(..., stream=True) passes on all answers; otherwise return one list.")
            self._done()

    def put(self, answer: object) -> None:
        """Give the answer; only the first one counts."""
        with self._condition:
            if not self.is_done:
                self._answer = answer
                self._done()

    def fail(self, error: BaseException) -> None:
        """Give an error instead of an answer."""
        with self._condition:
            if not self.is_done:
                self._error = error
                self._done()

    def get(self, timeout: float | None = None) -> object:
        """Wait for the answer and return it, or raise the error.

        Raises:
            ServiceTimeoutError: it did not arrive within `timeout` seconds.
        """
        if not wait_for(self._condition, lambda: self.is_done, timeout):
            raise not_answered(timeout)
        return self.result()

    def result(self) -> object:
        """Return the answer that is there, or raise the error."""
        if self._error is not None:
            raise self._error
        return self._answer

    def listen(self, tell: Callable[[], None]) -> None:
        """Call `tell` when the request is answered, and with each piece of a streamed answer."""
        with self._condition:
            self._listening.append(tell)
        tell()

    def give_up(self) -> None:
        """Say that nobody wants the answer any more; the records of the request end where they are."""
        self.is_given_up = True

    def _done(self) -> None:
        self._changed()
        if self._on_done is not None:
            self._on_done(self)

    def _changed(self) -> None:
        self._condition.notify_all()
        for tell in self._listening:
            tell()

    @property
    def is_done(self) -> bool:
        """Whether there is an answer or an error."""
        return self._answer is not _UNANSWERED or self._error is not None


class StreamedRequest(Request):
    """A call that is answered piece by piece."""

    is_streamed = True

    def __init__(self, payload: Any, on_done: Callable[[Request], None] | None = None) -> None:
        super().__init__(payload, on_done)
        self._pieces: deque[object] = deque()

    def answer(self, record: object) -> None:
        """Give a piece."""
        with self._condition:
            if not self.is_done:
                self._pieces.append(record)
                self._changed()

    def get(self, timeout: float | None = None) -> Pieces:
        """Return the pieces; `timeout` bounds the wait for each."""
        return Pieces(self, timeout)

    def result(self) -> Pieces:
        """Return the pieces."""
        return Pieces(self, None)

    def next_piece(self) -> object:
        """Return the next piece, or `NOTHING_YET`.

        Raises:
            StopIteration: none follows.
            BaseException: the error, after the pieces before it.
        """
        with self._condition:
            if self._pieces:
                return self._pieces.popleft()
            if self._error is not None:
                raise self._error
            if self.is_done or self.is_given_up:
                raise StopIteration
        return NOTHING_YET

    def wait_piece(self, timeout: float | None) -> None:
        """Wait until `next_piece` has something to say.

        Raises:
            ServiceTimeoutError: it took more than `timeout` seconds.
        """
        if not wait_for(self._condition, lambda: bool(self._pieces) or self.is_done or self.is_given_up, timeout):
            raise not_answered(timeout)

    def give_up(self) -> None:
        """Say that nobody wants further pieces, and let a caller who waits go."""
        with self._condition:
            self.is_given_up = True
            if not self.is_done:
                self._answer = None
                self._done()


NOTHING_YET: object = object()
"""Stands for a piece that is not there yet."""


class Pieces:
    """The pieces of a streamed answer, in order, as they come.

    Leaving the loop, `close()` and the end of the iterator's life give the request up: its generator is closed, and its
    records in the pipeline end. On an event loop of the program, `async for` waits without blocking it.
    """

    def __init__(self, request: StreamedRequest, timeout_s: float | None) -> None:
        self._request = request
        self._timeout_s = timeout_s

    def __iter__(self) -> Pieces:
        return self

    def __next__(self) -> Any:
        piece = self._request.next_piece()
        while piece is NOTHING_YET:
            refuse_on_foreign_loop("the next piece of a streamed answer", "Write `async for` there.")
            self._request.wait_piece(self._timeout_s)
            piece = self._request.next_piece()
        return piece

    def __aiter__(self) -> Pieces:
        return self

    async def __anext__(self) -> Any:
        import asyncio

        changed = asyncio.Event()
        loop = asyncio.get_running_loop()
        try:
            piece = self._request.next_piece()
            if piece is NOTHING_YET:
                self._request.listen(lambda: _tell(loop, changed.set))
            while piece is NOTHING_YET:
                async with asyncio.timeout(self._timeout_s):
                    await changed.wait()
                changed.clear()
                piece = self._request.next_piece()
        except StopIteration:
            raise StopAsyncIteration from None
        except TimeoutError:
            raise not_answered(self._timeout_s) from None
        return piece

    def close(self) -> None:
        """Give up the pieces that have not arrived yet."""
        self._request.give_up()

    def __del__(self) -> None:
        self.close()


def not_answered(timeout_s: float | None) -> ServiceTimeoutError:
    """Return the error of a call whose time is over."""
    return ServiceTimeoutError(f"the pipeline gave no answer within {timeout_s:g} s", fault="external")


def _tell(loop: AbstractEventLoop, callback: Callable[[], object]) -> None:
    with suppress(RuntimeError):  # the program has closed its loop
        loop.call_soon_threadsafe(callback)


async def answered(request: Request, timeout_s: float | None) -> object:
    """Wait for the answer of a request on any event loop; a cancelled wait gives the request up."""
    import asyncio

    loop = asyncio.get_running_loop()
    changed = asyncio.Event()
    if isinstance(request, StreamedRequest):
        return request.get(timeout_s)
    request.listen(lambda: _tell(loop, changed.set))
    try:
        async with asyncio.timeout(timeout_s):
            while not request.is_done:
                changed.clear()
                await changed.wait()
    except TimeoutError:
        raise not_answered(timeout_s) from None
    except asyncio.CancelledError:
        request.give_up()
        raise
    return request.result()


PipelineRequest = Request


class PipelineBridge:
    """Joins callers with the source of a served pipeline.

    Attributes:
        streams: whether a call is answered piece by piece.
    """

    def __init__(self, streams: bool = False) -> None:
        self.streams = streams
        self._requests: queue.SimpleQueue[Request | None] = queue.SimpleQueue()
        self._open: set[Request] = set()
        self._lock = threading.Lock()
        self._closed = False
        self._taken: list[Request] = []
        self._listening: list[Callable[[], None]] = []
        self._is_forked = False
        useless_after_fork(self)

    def when_changed(self, wake: Callable[[], None]) -> None:
        """Call `wake` each time that a request came, and when the bridge is closed."""
        self._listening.append(wake)

    def __reduce__(self) -> tuple[type[PipelineBridge], tuple[bool]]:
        # It joins the source and the service of one process, which are sent there together, so that both get the same.
        return PipelineBridge, (self.streams,)

    @property
    def is_closed(self) -> bool:
        """Whether it takes no more requests."""
        return self._closed

    @property
    def is_idle(self) -> bool:
        """Whether no request waits, and it is not closed."""
        return self._requests.empty() and not self._closed

    @property
    def is_over(self) -> bool:
        """Whether it is closed and every request has been taken."""
        return self._closed and self._requests.qsize() <= 1

    def submit(self, payload: object) -> Request:
        """Put a request on its way and return it; its `get` waits for the answer.

        Raises:
            ServiceUnavailableError: the pipeline has ended.
        """
        request = (StreamedRequest if self.streams else Request)(payload, self._open.discard)
        with self._lock:
            if self._is_forked:
                raise refusal("pipeline")
            if self._closed:
                raise ServiceUnavailableError("the pipeline behind this service has ended")
            self._open.add(request)
            self._requests.put(request)
        self._tell()
        return request

    def next(self, timeout: float | None = 0.1) -> Request | StopSignal | None:
        """Return the next request, None after `timeout` seconds without one, or a `StopSignal` at the end."""
        is_closed = self._closed  # asked before: a request may come between a look that finds none and the end
        try:
            request = self._requests.get(timeout=timeout) if timeout != 0 else self._requests.get_nowait()
        except queue.Empty:
            return StopSignal("pipeline bridge closed") if is_closed else None
        if request is None:
            self._requests.put(None)  # for whoever else reads
            return StopSignal("pipeline bridge closed")
        self._taken.append(request)
        return request

    def taken(self, count: int) -> list[Request | None]:
        """Return the requests of the records that a source has just read, and forget them."""
        taken, self._taken = self._taken, []
        if len(taken) == count:
            return list(taken)
        return [*taken, *[None] * count][:count]

    def _after_fork_in_child(self) -> None:
        self._lock = threading.Lock()
        self._is_forked = True

    def close(self) -> None:
        """Take no more requests; those on their way are still answered."""
        with self._lock:
            if not self._closed:
                self._closed = True
                self._requests.put(None)
        self._tell()

    def _tell(self) -> None:
        for wake in self._listening:
            wake()

    def abort(self) -> None:
        """Fail every request that has no answer; nothing will give one any more."""
        self.close()
        # Each request leaves the set when it fails, as when it is answered.
        for request in tuple(self._open):
            request.fail(ServiceUnavailableError("the pipeline behind this service has ended"))


class PipelineService(BaseService):
    """The service in front of a pipeline: `process(request)` returns the pipeline's answer."""

    def __init__(self, bridge: PipelineBridge, request_timeout: float | None = None) -> None:
        self._bridge = bridge
        self._request_timeout = request_timeout

    def process(self, message: object) -> object:
        """Send a request through the pipeline and return the answer, or raise the error that it met."""
        if isinstance(message, dict) and message.get("command") == "shutdown":
            self._bridge.close()
            return {"status": "shutdown_ack"}
        refuse_on_foreign_loop("a served pipeline", "Write `await aio(handle).process(...)` there.")
        return self._bridge.submit(message).get(self._request_timeout)

    def begin(self, message: object) -> tuple[Request, float | None]:
        """Send a request without waiting for the answer, and return it with the bound of the waiting."""
        return self._bridge.submit(message), self._request_timeout

    def stop(self) -> None:
        """Take no more requests."""
        self._bridge.close()


class ServedPipeline(Protocol[U_co]):
    """The methods of a served pipeline's handle. The answer is None if the pipeline drops the request."""

    def process(self, request: object, /) -> U_co | Any:
        """Send a request through the pipeline and return the answer, or raise the error that it met."""

    def __call__(self, request: object, /) -> U_co | Any:
        """Call `process`."""


class RequestSource(Source[object]):
    """Reads the requests of a bridge as records, and ends when the bridge is closed; the bridge says when some came."""

    bounded = False

    def __init__(self, bridge: PipelineBridge) -> None:
        self._bridge = bridge

    @property
    def is_idle(self) -> bool:
        """Whether a read would find neither a request nor the end."""
        return self._bridge.is_idle

    def read(self, records_max: int) -> list[object] | None:
        """Return the payloads of the requests that wait."""
        payloads: list[object] = []
        while len(payloads) < records_max and not self.is_idle:
            request = self._bridge.next(timeout=0)
            if not isinstance(request, Request):
                return None if request is not None and not payloads else payloads
            payloads.append(request.payload)
        return payloads


def bridge_among(source: object, args: tuple[object, ...], kwargs: dict[str, object]) -> PipelineBridge | None:
    """Return the bridge that a source is built with, or that an instance holds, or None."""
    held = vars(source).values() if hasattr(source, "__dict__") and not isinstance(source, type) else ()
    candidates = (*args, *kwargs.values(), *held)
    return next((value for value in candidates if isinstance(value, PipelineBridge)), None)
