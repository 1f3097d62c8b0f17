"""Whether a command can be used: by its answer over HTTP, its port, its output, or a callable."""

from __future__ import annotations

import inspect
import socket
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

from sage._calls import function_of
from sage.command import Http, Line, Port, filled
from sage.errors import describe

if TYPE_CHECKING:
    from collections.abc import Callable, Coroutine

    from sage.command import RunningCommand

    Settle = Callable[[Coroutine[object, object, object]], object]

PORT_TIMEOUT_S = 2.0

MISTAKES = (ArithmeticError, AssertionError, AttributeError, ImportError, LookupError, NameError, TypeError)
"""Errors that show a mistake in a callable; clients raise any other while the server does not answer."""


def why_not(probe: object, command: RunningCommand, has_line: bool, timeout_s: float, settle: Settle) -> str | None:
    """Return why a command cannot be used yet, in words, or None if it can be.

    Args:
        probe: the probe.
        command: the command.
        has_line: whether the line was seen that a `Line` waits for.
        timeout_s: bound of the answer, in seconds.
        settle: waits for a coroutine.

    Raises:
        Exception: a callable is wrong.
    """
    match probe:
        case None:
            return None
        case Http():
            return _http(probe, command, timeout_s)
        case Port():
            return _port(command.host, command.ports[probe.name], timeout_s)
        case Line():
            return None if has_line else f"no line of its output matches {probe.pattern!r}"
        case _:
            return _callable(probe, command, settle)


def _http(probe: Http, command: RunningCommand, timeout_s: float) -> str | None:
    # Only who uses it pays for the import.
    from http.client import HTTPConnection, HTTPException, HTTPSConnection

    url = filled(probe.url, command.ports, command.folder, command.host)
    if url.startswith("/"):
        url = f"http://{command.host}:{command.port}{url}"
    parts = urlsplit(url)
    kind = HTTPSConnection if parts.scheme == "https" else HTTPConnection
    connection = kind(parts.hostname or command.host, parts.port, timeout=max(min(probe.timeout_s, timeout_s), 0.01))
    try:
        path = parts.path or "/"
        connection.request("GET", f"{path}?{parts.query}" if parts.query else path)
        status = connection.getresponse().status
    except (OSError, HTTPException) as error:
        return f"GET {url}: {describe(error)}"
    finally:
        connection.close()
    is_good = 200 <= status < 300 if probe.status is None else status == probe.status
    return None if is_good else f"GET {url} answered {status}"


def _port(host: str, port: int, timeout_s: float) -> str | None:
    try:
        with socket.create_connection((host, port), max(min(PORT_TIMEOUT_S, timeout_s), 0.01)) as connection:
            # Where nobody listens, the system may choose the same port for this end, which then talks to itself.
            if connection.getsockname() == connection.getpeername():
                return f"nobody listens on port {port}"
    except OSError as error:
        return f"port {port}: {describe(error)}"
    return None


def _callable(probe: object, command: RunningCommand, settle: Settle) -> str | None:
    try:
        answer = function_of(probe)(command)
        if inspect.iscoroutine(answer):
            answer = settle(answer)
    except MISTAKES:
        raise
    except Exception as error:  # a client's own kind of saying that it cannot connect yet
        return describe(error)
    return None if answer else f"{getattr(probe, '__name__', type(probe).__name__)} returned {answer!r}"
