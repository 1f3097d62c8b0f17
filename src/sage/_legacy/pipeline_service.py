"""Source and sink of pipelines that old programs wire to a service by hand."""

from __future__ import annotations

from typing import TYPE_CHECKING

from sage._legacy.functions import SinkFunction, SourceFunction
from sage.functions import StopSignal

if TYPE_CHECKING:
    from sage.serving import PipelineBridge

RESPONSE_QUEUE = "_response_queue"
"""Where a request's record has the queue for the answer."""


class PipelineServiceSource(SourceFunction):
    """Reads the requests of a bridge: each is a copy of its payload, with the queue for the answer in it."""

    def __init__(self, bridge: PipelineBridge, poll_interval: float = 0.1) -> None:
        self._bridge = bridge
        self._poll_interval = poll_interval

    def execute(self) -> object:
        """Return the next request, None after a poll interval without one, or the signal of the end."""
        request = self._bridge.next(timeout=self._poll_interval)
        if request is None or isinstance(request, StopSignal):
            return request
        payload = request.payload if isinstance(request.payload, dict) else {"data": request.payload}
        return {**payload, RESPONSE_QUEUE: request.response_queue}


class PipelineServiceSink(SinkFunction):
    """Answers each request with the record that arrives, without the queue."""

    def execute(self, data: object) -> None:
        """Put the rest of the record into the queue that is in it; a record without one answers nobody."""
        if isinstance(data, dict):
            answer: object = {key: value for key, value in data.items() if key != RESPONSE_QUEUE}
            queue = data.get(RESPONSE_QUEUE)
        else:
            answer, queue = data, getattr(data, "response_queue", None)
        if queue is not None:
            queue.put(answer)
