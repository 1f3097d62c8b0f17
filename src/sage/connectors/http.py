"""Records as requests to a web server, each with a key by which the server knows it again."""

from __future__ import annotations

import logging
import re
import time
import uuid
from collections.abc import Mapping
from contextlib import suppress
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

from sage._arguments import check_count, check_seconds, check_text
from sage._extras import load
from sage.connectors.brokers import FORMATS, BrokerSink, check_choice, encode
from sage.errors import ConnectorError, GraphError, describe, hint, short

if TYPE_CHECKING:
    from collections.abc import Sequence

    import urllib3

logger = logging.getLogger(__name__)

AGAIN = (408, 425, 429, 500, 502, 503, 504)
"""The answers that may be others if the request is sent again."""

BACKOFF_S = 0.2
BACKOFF_MAX_S = 5.0
RETRY_AFTER_MAX_S = 60.0
"""How long a `Retry-After` is waited for at most."""

TYPES = {"json": "application/json", "text": "text/plain; charset=utf-8", "bytes": "application/octet-stream"}
METHOD = re.compile("[A-Z]+")
HEADER_NAME = re.compile(r"[!#$%&'*+.^_`|~0-9A-Za-z-]+")
HEADER_VALUE = re.compile(r"[\t\x20-\x7e\x80-\xff]+")
OWN = ("idempotency-key", "content-length", "transfer-encoding")
TEXT_CHARS_MAX = 200
ANSWER_BYTES_MAX = 1 << 16


class HttpSink(BrokerSink[bytes]):
    """Sends records to a web server, in order, each in a request of its own or several as a JSON list.

    In a durable job, the requests of a checkpoint are sent when it is complete. Each has a header `Idempotency-Key`. If
    the program is killed meanwhile, the next run sends all of them again, with the same keys, so a server that knows
    the header takes each request once. In other jobs, records are sent as they come.

    Answers 408, 425, 429, 500 and 502 to 504 and broken connections are tried again, after pauses that grow up to 5 s,
    or after a `Retry-After` of up to a minute.

    Args:
        url: where to send to, such as "https://shop.example/orders".
        method: "POST", "PUT" or another one.
        headers: further headers, such as `{"Authorization": f"Bearer {token}"}`; they are never shown.
        format: of the body: "json", "text" or "bytes".
        records_max: how many records a request has at most; with more than 1, its body is a list.
        retries_max: how often a request is sent again.
        timeout_s: bound of connecting, of each wait for the answer, and of reading its text, in seconds.
        refused: "fail" if the server refuses a request, or "skip" to log it and go on.
    """

    promise = "each record exactly once if its server knows Idempotency-Key, and otherwise at least once"

    def __init__(
        self,
        url: str,
        *,
        method: str = "POST",
        headers: Mapping[str, str] | None = None,
        format: str = "json",
        records_max: int = 1,
        retries_max: int = 5,
        timeout_s: float = 30.0,
        refused: str = "fail",
    ) -> None:
        super().__init__()
        load("urllib3", "http")
        check_text("HttpSink: url", url, 'Give one: HttpSink("https://shop.example/orders").')
        try:
            parts, is_address = urlsplit(url), load("urllib3", "http").util.parse_url(url).host is not None
        except (ValueError, load("urllib3.exceptions", "http").LocationParseError):
            is_address = False
        if not is_address or parts.scheme not in ("http", "https") or parts.username is not None:
            error = GraphError("HttpSink: url is not an address without a user that begins with http:// or https://")
            raise hint(error, 'Give a password as headers={"Authorization": ...}.') from None
        check_text("HttpSink: method", method, 'Give "POST", "PUT" or another one.')
        if not METHOD.fullmatch(method):
            raise hint(GraphError(f"HttpSink: method is {short(method)}"), 'Give "POST", "PUT" or another one.')
        given: object = headers or {}
        if not isinstance(given, Mapping) or not all(map(_is_header, given.items())):
            error = GraphError("HttpSink: headers are not names with texts of one line in Latin-1")
            raise hint(error, 'Give {"X-Name": "value"}.')
        for name in given:
            if name.lower() in OWN:
                raise hint(GraphError(f'HttpSink: "{name}" is in headers'), "Each request has its own.")
        check_choice("HttpSink: format", format, FORMATS)
        check_count("HttpSink: records_max is", records_max)
        if records_max > 1 and format != "json":
            error = GraphError(f'HttpSink: records_max is {records_max} and format "{format}"')
            raise hint(error, "Only JSON has lists of records.")
        check_count("HttpSink: retries_max is", retries_max, least=0)
        check_seconds("HttpSink: timeout_s is", timeout_s, may_be_zero=False)
        check_choice("HttpSink: refused", refused, ("fail", "skip"))
        self.place = f'"{parts.scheme}://{parts.netloc}{parts.path}"'
        self._url = url
        self._method = method
        self._headers = {"Content-Type": TYPES[format], **(headers or {})}
        self._format = format
        self._records_max = records_max
        self._retries_max = retries_max
        self._timeout_s = timeout_s
        self._skips = refused == "skip"
        self._skipped = 0
        self._pool: urllib3.PoolManager | None = None
        self._part = self._run = ""
        self._sent = 0

    def open(self, part: str, checkpoint: int) -> None:  # noqa: ARG002  (the server cannot take anything back)
        """Prepare connections; the first request makes one."""
        library = load("urllib3", "http")
        self._part, self._run = part, uuid.uuid4().hex[:12]
        self._skipped = 0
        retries = library.Retry(
            self._retries_max,
            redirect=0,
            status_forcelist=AGAIN,
            allowed_methods=None,
            backoff_factor=BACKOFF_S,
            backoff_max=BACKOFF_MAX_S,
            retry_after_max=RETRY_AFTER_MAX_S,
            raise_on_redirect=False,
            raise_on_status=False,
        )
        self._pool = library.PoolManager(1, retries=retries, timeout=self._timeout_s)

    def _raw(self, record: object) -> bytes:
        return encode(self._format, record, record)

    def write(self, batch: Sequence[object]) -> None:
        """Keep the records for the checkpoint, or send them in a job without checkpoints.

        Raises:
            ConnectorError: a record cannot be written, or, without a checkpoint, not be sent.
        """
        super().write(batch)
        if not self.durable:
            kept, self._kept = self._kept, []
            self._send(self._run, kept, self._sent)
            self._sent += len(kept)

    def commit(self, token: tuple[int, list[bytes]]) -> None:
        """Send the records.

        Raises:
            ConnectorError: the server is not there or refuses them.
        """
        number, bodies = token
        self._send(str(number), bodies, 0)

    def _send(self, name: str, bodies: Sequence[bytes], first: int) -> None:
        for place in range(0, len(bodies), self._records_max):
            some = bodies[place : place + self._records_max]
            body = some[0] if self._records_max == 1 else b"[" + b",".join(some) + b"]"
            self._request(f"{self._part}-{name}-{first + place}", body)

    def _request(self, key: str, body: bytes) -> None:
        assert self._pool is not None
        library = load("urllib3", "http")
        headers = {**self._headers, "Idempotency-Key": key}
        try:
            answer = self._pool.request(self._method, self._url, body=body, headers=headers, preload_content=False)
        except library.exceptions.HTTPError as error:
            # The library's own text has the whole address, with what may be a secret in its query.
            reason = getattr(error, "reason", None) or error
            failed = ConnectorError(f"{self.place} cannot be reached: {describe(reason)}", fault="external")
            raise hint(failed, f"It was tried {self._retries_max + 1} times.") from None
        said = self._said(answer)[:TEXT_CHARS_MAX].decode("utf-8", "replace")
        if 200 <= answer.status < 300:
            return
        text = f"{self.place} answered {answer.status} to {short(body.decode('utf-8', 'replace'))}: {short(said)}"
        if not self._skips or answer.status in AGAIN:
            note = 'A record that the server refuses can be left out with refused="skip".'
            raise hint(ConnectorError(text, fault="external"), note)
        self._skipped += 1
        if self._skipped == 1:
            logger.warning("skipped: %s; the last line counts all of them", text)

    def _said(self, answer: urllib3.BaseHTTPResponse) -> bytes:
        """Return the text of an answer, or its beginning if it does not end soon, as a stream of events does not."""
        due = time.monotonic() + self._timeout_s
        said = b""
        with suppress(load("urllib3", "http").exceptions.HTTPError):  # the status tells whether the server has it
            while len(said) < ANSWER_BYTES_MAX and time.monotonic() < due:
                part = answer.read1(ANSWER_BYTES_MAX)
                if not part:
                    answer.release_conn()
                    return said
                said += part
        answer.close()
        return said

    def close(self) -> None:
        """Close the connections."""
        if self._skipped > 1:
            logger.warning("skipped: %s refused %d requests", self.place, self._skipped)
        if self._pool is not None:
            self._pool.clear()


def _is_header(item: tuple[object, object]) -> bool:
    """Return whether name and value can be a header; the library refuses others within the commit, and shows them."""
    name, value = item
    if not isinstance(name, str) or not isinstance(value, str):
        return False
    return HEADER_NAME.fullmatch(name) is not None and HEADER_VALUE.fullmatch(value) is not None
