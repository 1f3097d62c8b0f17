"""Web requests as records: each is answered when a checkpoint has what it brought."""

from __future__ import annotations

import asyncio
import hmac
import logging
import re
import socket
import threading
from collections import deque
from contextlib import suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from sage._arguments import check_count, check_text
from sage._extras import load
from sage.connector import Source
from sage.connectors.brokers import FORMATS, POLL_S, check_choice, decode
from sage.errors import ConnectorError, GraphError, describe, hint, short

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Mapping, Sequence

    Scope = Mapping[str, Any]
    Receive = Callable[[], Awaitable[Mapping[str, Any]]]
    Send = Callable[[Mapping[str, Any]], Awaitable[None]]

logger = logging.getLogger(__name__)

PORT_MAX = 65_535
CLOSE_S = 2.0
"""How long the end of connections is waited for; all requests have their answer by then."""

TAKEN, BROKEN, TOO_LARGE, AGAIN = 200, 400, 413, 503


@dataclass(frozen=True, slots=True)
class WebRequest:
    """What a request brought.

    Attributes:
        value: its body.
        key: its `Idempotency-Key`, by which you know a request again that was sent twice; "" without one.
    """

    value: Any
    key: str = ""


class _Waiting:
    """A request that was not answered yet."""

    __slots__ = ("_answer", "_loop", "record")

    def __init__(self, record: WebRequest) -> None:
        self.record = record
        self._loop = asyncio.get_running_loop()
        self._answer: asyncio.Future[int] = self._loop.create_future()

    async def answered(self) -> int:
        return await self._answer

    def answer(self, status: int) -> None:
        """Answer it; any thread may call this."""
        with suppress(RuntimeError):  # the loop has ended, as its last connections did not end in time
            self._loop.call_soon_threadsafe(self._settle, status)

    def _settle(self, status: int) -> None:
        if not self._answer.done():
            self._answer.set_result(status)


class Webhook(Source[WebRequest]):
    """Serves an address, and gives what is posted to it as records.

    In a durable job, a request is answered with 200 when a checkpoint has its record, so whoever sends until an answer
    comes loses nothing, whatever happens to the program. A request that has no answer yet when the program ends gets
    503 with `Retry-After`, or none if the program was killed; sent again, it may come twice. In other jobs, or with
    `answer="now"`, a request is answered as soon as the job has read it.

    Args:
        port: where to listen; 0 for a free one, which the log tells.
        host: "127.0.0.1" serves this machine only.
        path: of the address.
        format: of the bodies: "json", "text" or "bytes".
        answer: "checkpoint" or "now"; without one, that which the job can give.
        token: a secret that requests have as `Authorization: Bearer TOKEN`; without one, everybody may post.
        waiting_max: how many requests wait for their answer at most; further ones get 503.
        body_bytes_max: the size of a body.

    Attributes:
        port: where it listens, once it is open.
    """

    bounded = False

    def __init__(
        self,
        port: int,
        *,
        host: str = "127.0.0.1",
        path: str = "/",
        format: str = "json",
        answer: str | None = None,
        token: str | None = None,
        waiting_max: int = 1_000,
        body_bytes_max: int = 1_000_000,
    ) -> None:
        load("uvicorn", "http")
        if check_count("Webhook: port is", port, least=0) > PORT_MAX:
            raise hint(GraphError(f"Webhook: port is {port}"), f"Give one up to {PORT_MAX}.")
        check_text("Webhook: host", host, 'Give "127.0.0.1", or "0.0.0.0" for all networks.')
        check_text("Webhook: path", path, 'Give one such as "/orders".')
        if not re.fullmatch(r"/[!->@-~]*", path):
            raise hint(GraphError(f"Webhook: path is {short(path)}"), 'Give one such as "/orders".')
        check_choice("Webhook: format", format, FORMATS)
        if answer is not None:
            check_choice("Webhook: answer", answer, ("checkpoint", "now"))
        if token is not None and not re.fullmatch("[!-~]+", token):
            raise hint(GraphError("Webhook: token is not a text without spaces"), "Give one of ASCII characters.")
        check_count("Webhook: waiting_max is", waiting_max)
        check_count("Webhook: body_bytes_max is", body_bytes_max)
        self.port = port
        self._host = host
        self._path = path
        self._format = format
        self._answer = answer
        self._bearer = None if token is None else f"Bearer {token}".encode()
        self._waiting_max = waiting_max
        self._body_bytes_max = body_bytes_max
        self._changed = threading.Condition()
        self._unread: deque[_Waiting] = deque()
        self._unanswered: deque[_Waiting] = deque()
        self._answered = 0
        self._is_closed = False
        self._server: Any = None
        self._thread: threading.Thread | None = None

    def __getstate__(self) -> dict[str, object]:
        """Return what another process needs, before this is open."""
        return {name: value for name, value in vars(self).items() if name != "_changed"}

    def __setstate__(self, state: Mapping[str, object]) -> None:
        """Take it in."""
        vars(self).update(state)
        self._changed = threading.Condition()

    @property
    def _is_patient(self) -> bool:
        return self.durable and self._answer != "now"

    def open(self, position: int | None = None) -> None:
        """Listen.

        Raises:
            ConnectorError: the address cannot be used, or the job has no checkpoints to answer after.
        """
        if self._answer == "checkpoint" and not self.durable:
            error = ConnectorError('Webhook has answer="checkpoint", and the job has none')
            raise hint(error, 'Give the environment durable=, or answer="now".')
        self._answered, self._is_closed = position or 0, False
        self._unread.clear()
        self._unanswered.clear()
        try:
            listening = socket.create_server((self._host, self.port), backlog=self._waiting_max)
        except (OSError, OverflowError) as error:
            failed = ConnectorError(
                f"Webhook cannot listen at {self._host}:{self.port}: {describe(error)}", fault="external"
            )
            raise hint(failed, "Does another program or task listen there? Port 0 takes a free one.") from error
        self.port = listening.getsockname()[1]
        library = load("uvicorn", "http")
        config = library.Config(
            self._serve,
            interface="asgi3",
            loop="asyncio",
            log_config=None,
            access_log=False,
            lifespan="off",
            proxy_headers=False,
            timeout_graceful_shutdown=CLOSE_S,
            ws="none",
        )
        self._server = library.Server(config)
        self._thread = threading.Thread(
            target=self._server.run, kwargs={"sockets": [listening]}, name="sage-webhook", daemon=True
        )
        self._thread.start()
        logger.info("listening address=http://%s:%d%s", self._host, self.port, self._path)

    def read(self, records_max: int) -> Sequence[WebRequest]:
        """Return the requests that have come, after waiting for a moment.

        Raises:
            ConnectorError: nothing listens any more.
        """
        if self._thread is None or not self._thread.is_alive():
            raise ConnectorError(f"Webhook no longer listens at {self._host}:{self.port}", fault="external")
        with self._changed:
            self._changed.wait_for(lambda: self._unread, POLL_S)
            read = [self._unread.popleft() for _ in range(min(records_max, len(self._unread)))]
            if self._is_patient:
                self._unanswered += read
        if not self._is_patient:
            for one in read:
                one.answer(TAKEN)
        return [one.record for one in read]

    def position(self) -> int:
        """Return how many requests were read, in all runs."""
        return self._answered + len(self._unanswered)

    def committed(self, position: int) -> None:
        """Answer the requests up to there."""
        while self._unanswered and self._answered < position:
            self._unanswered.popleft().answer(TAKEN)
            self._answered += 1

    def close(self) -> None:
        """Let all other requests be sent again later, and end."""
        with self._changed:
            self._is_closed = True
            left = [*self._unanswered, *self._unread]
        for one in left:
            one.answer(AGAIN)
        if self._thread is not None:
            self._server.should_exit = True
            self._thread.join()

    async def _serve(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Take a request, as ASGI has it."""
        if scope["type"] != "http":
            return
        status, text = await self._taken(scope, receive)
        headers = [(b"content-type", b"text/plain; charset=utf-8")]
        if status == AGAIN:
            headers.append((b"retry-after", b"1"))
        await send({"type": "http.response.start", "status": status, "headers": headers})
        await send({"type": "http.response.body", "body": text.encode()})

    async def _taken(self, scope: Scope, receive: Receive) -> tuple[int, str]:
        """Return the status of the answer to a request, and its text."""
        headers: dict[bytes, bytes] = dict(scope["headers"])
        if self._bearer is not None and not hmac.compare_digest(headers.get(b"authorization", b""), self._bearer):
            return 401, "the token is missing or wrong\n"
        if scope["path"] != self._path:
            return 404, f"post to {self._path}\n"
        if scope["method"] not in ("POST", "PUT"):
            return 405, "use POST\n"
        # A page of somebody else's that a browser shows may send other types without asking.
        if self._format == "json" and not headers.get(b"content-type", b"").startswith(b"application/json"):
            return 415, "the type is not application/json\n"
        body = await self._body(receive)
        if isinstance(body, int):
            return body, {
                BROKEN: "the body is not whole\n",
                TOO_LARGE: f"a body has at most {self._body_bytes_max} bytes\n",
                AGAIN: "send it again later\n",
            }[body]
        try:
            value = decode(self._format, body)
        except ValueError as error:
            return 400, f"the body {error}\n"
        waiting = _Waiting(WebRequest(value, headers.get(b"idempotency-key", b"").decode("latin-1")))
        with self._changed:
            if self._is_closed or len(self._unread) + len(self._unanswered) >= self._waiting_max:
                return AGAIN, "send it again later\n"
            self._unread.append(waiting)
            self._changed.notify()
        status = await waiting.answered()
        return status, "taken\n" if status == TAKEN else "send it again later\n"

    async def _body(self, receive: Receive) -> bytes | int:
        """Return the body, or the status of the answer if it is too large or does not come whole."""
        body = bytearray()
        while True:
            try:
                part = await receive()
            except asyncio.CancelledError:  # the end does not wait for the rest of it
                return AGAIN
            if part["type"] == "http.disconnect":
                return BROKEN
            body += part.get("body", b"")
            if len(body) > self._body_bytes_max:
                return TOO_LARGE
            if not part.get("more_body"):
                return bytes(body)
