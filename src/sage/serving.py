"""Pipelines that answer calls: requests enter at a source, and what arrives at the end is the answer."""

from __future__ import annotations

import queue
import threading
from typing import TYPE_CHECKING, Any

from sage.connector import Source
from sage.errors import ServiceTimeoutError, ServiceUnavailableError
from sage.functions import StopSignal
from sage.service import BaseService

if TYPE_CHECKING:
    from collections.abc import Callable

_UNANSWERED = object()


def _wait_for(condition: threading.Condition, is_over: Callable[[], bool], timeout_s: float | None) -> bool:
    with condition:
        return condition.wait_for(is_over, timeout_s)


wait_for = _wait_for
"""How a caller waits for its answer; what runs jobs puts in its place what also works inside of one."""


class Request:
    """One call of a served pipeline, and the place where its answer arrives.

    It travels beside the records that came of it and counts them: when the last one ended without an answer, the answer
    is None. As a queue of one place it is what older programs call `_response_queue`.

    Attributes:
        payload: what was asked.
    """

    def __init__(self, payload: Any, on_done: Callable[[Request], None] | None = None) -> None:
        self.payload = payload
        self._on_done = on_done
        self._records = 1
        self._answer: Any = _UNANSWERED
        self._error: BaseException | None = None
        self._condition = threading.Condition()

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
            if self._records == 0 and not self._is_done:
                self._answer = None
                self._done()

    def put(self, answer: Any) -> None:
        """Give the answer; only the first one counts."""
        with self._condition:
            if not self._is_done:
                self._answer = answer
                self._done()

    def fail(self, error: BaseException) -> None:
        """Give an error instead of an answer."""
        with self._condition:
            if not self._is_done:
                self._error = error
                self._done()

    def get(self, timeout: float | None = None) -> Any:
        """Wait for the answer and return it, or raise what failed.

        Raises:
            ServiceTimeoutError: there was none within `timeout` seconds.
        """
        if not wait_for(self._condition, lambda: self._is_done, timeout):
            raise ServiceTimeoutError(f"the pipeline gave no answer within {timeout:g} s", fault="external")
        if self._error is not None:
            raise self._error
        return self._answer

    def _done(self) -> None:
        self._condition.notify_all()
        if self._on_done is not None:
            self._on_done(self)

    @property
    def _is_done(self) -> bool:
        return self._answer is not _UNANSWERED or self._error is not None


PipelineRequest = Request


class PipelineBridge:
    """Joins callers with the source of a served pipeline."""

    def __init__(self) -> None:
        self._requests: queue.SimpleQueue[Request | None] = queue.SimpleQueue()
        self._open: set[Request] = set()
        self._lock = threading.Lock()
        self._closed = False
        self._taken: list[Request] = []
        self._listening: list[Callable[[], None]] = []

    def when_changed(self, wake: Callable[[], None]) -> None:
        """Call `wake` each time that a request came, and when the bridge is closed."""
        self._listening.append(wake)

    def __reduce__(self) -> tuple[type[PipelineBridge], tuple[()]]:
        # It joins the source and the service of one process, which are sent there together, so that both get the same.
        return PipelineBridge, ()

    @property
    def is_closed(self) -> bool:
        """Whether it takes no more requests."""
        return self._closed

    @property
    def is_over(self) -> bool:
        """Whether it is closed and every request has been taken."""
        return self._closed and self._requests.qsize() <= 1

    def submit(self, payload: Any) -> Request:
        """Put a request on its way and return it; its `get` waits for the answer.

        Raises:
            ServiceUnavailableError: the pipeline has ended.
        """
        request = Request(payload, self._open.discard)
        with self._lock:
            if self._closed:
                raise ServiceUnavailableError("the pipeline behind this service has ended")
            self._open.add(request)
            self._requests.put(request)
        self._tell()
        return request

    def next(self, timeout: float | None = 0.1) -> Request | StopSignal | None:
        """Return the next request, None if there is none within `timeout` seconds, or a `StopSignal` at the end."""
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

    def process(self, message: Any) -> Any:
        """Send a request through the pipeline and return the answer, or raise what failed on its way."""
        if isinstance(message, dict) and message.get("command") == "shutdown":
            self._bridge.close()
            return {"status": "shutdown_ack"}
        return self._bridge.submit(message).get(self._request_timeout)

    def stop(self) -> None:
        """Take no more requests."""
        self._bridge.close()


class RequestSource(Source):
    """Reads the requests of a bridge as records, and ends when the bridge is closed; the bridge says when some came."""

    bounded = False

    def __init__(self, bridge: PipelineBridge) -> None:
        self._bridge = bridge

    def read(self, records_max: int) -> list[Any] | None:
        """Return the payloads of the requests that wait."""
        payloads: list[Any] = []
        while len(payloads) < records_max:
            request = self._bridge.next(timeout=0)
            if not isinstance(request, Request):
                return None if request is not None and not payloads else payloads
            payloads.append(request.payload)
        return payloads


def bridge_among(source: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> PipelineBridge | None:
    """Return the bridge that a source is built with, or that an instance holds, or None."""
    held = vars(source).values() if hasattr(source, "__dict__") and not isinstance(source, type) else ()
    candidates = (*args, *kwargs.values(), *held)
    return next((value for value in candidates if isinstance(value, PipelineBridge)), None)
