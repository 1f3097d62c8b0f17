"""Addresses of servers: parsing them, showing them without secrets, and the name and password in them."""

from __future__ import annotations

import base64
import ipaddress
import os
import re
import threading
from contextlib import contextmanager
from typing import TYPE_CHECKING
from urllib.parse import parse_qsl, unquote

from sage.errors import hint, short
from sage.service import ServiceHandle, ServiceMethod
from sage.services._shared.secret import HIDDEN

if TYPE_CHECKING:
    from collections.abc import Iterator

Url = str | ServiceHandle[object] | ServiceMethod
"""An address, or the command service that has it."""

PARTS = re.compile(
    r"(?P<scheme>[a-z][\w+.-]*://)?(?P<user>[^/?#\x00-\x1f\x7f]*@)?(?P<place>[\w.-]*|\[[\w:.%]+\])(?P<port>:\d*)?"
    r"(?P<path>/[^?#@\x00-\x1f\x7f]*)?(?P<rest>[?#][^@\x00-\x1f\x7f]*)?",
    re.IGNORECASE,
)
"""Stricter than the standard: if it is not clear which part is the password, the address is refused."""

QUOTED = "Signs such as / # ? @ [ in a name or a password are written as %2F %23 %3F %40 %5B."


def resolved(url: Url) -> str:
    """Return an address as text, asking the service that it is taken of."""
    if isinstance(url, ServiceHandle):
        url = url.url
    return str(url.resolve() if isinstance(url, ServiceMethod) else url)


def redact_url(url: str) -> str:
    """Return an address without name, password and query; empty if it is not an address."""
    parts = PARTS.fullmatch(url)
    if parts is None:
        return HIDDEN
    hidden = f"{HIDDEN}@" if parts["user"] else ""
    return "".join((parts["scheme"] or "", hidden, parts["place"], parts["port"] or "", parts["path"] or ""))


def text_about(url: str, error: Exception) -> str:
    """Return a library's message about an address, or an empty text if the address may hold a secret."""
    parts = PARTS.fullmatch(url)
    return "" if parts is None or parts["user"] or parts["rest"] else str(error)


def checked_url(what: str, url: str) -> str:
    """Return an address of a web server."""
    parts = PARTS.fullmatch(url)
    if parts is None or (parts["scheme"] or "").lower() not in ("http://", "https://") or not parts["place"]:
        wrong = ValueError(f"{what} is {short(redact_url(url))}, no http address")
        raise hint(wrong, f'It is one like "http://127.0.0.1:8000". {QUOTED}')
    return url


def split_credentials(what: str, url: str, key: object = None) -> tuple[str, str]:
    """Return an address without the name and the password in it, and these as "name:password", or an empty text.

    Libraries that get the whole address show it in their errors and logs.
    """
    parts = PARTS.fullmatch(url)
    if parts is None:
        raise hint(ValueError(f"{what} is not an address"), QUOTED)
    user = parts["user"]
    if not user:
        return url, ""
    if key:
        raise ValueError(f"{what} {short(redact_url(url))} has a name and a password, and a key is given too")
    return url[: parts.start("user")] + url[parts.end("user") :], unquote(user[:-1])


def query_of(url: str) -> tuple[str, dict[str, str]]:
    """Return an address without its query, and the query, which is to follow every path below the address."""
    url, _, _ = url.partition("#")
    url, _, query = url.partition("?")
    return url, dict(parse_qsl(query, keep_blank_values=True))


def is_here(url: str) -> bool:
    """Return whether an address is one of this machine, which no proxy can reach for it."""
    parts = PARTS.fullmatch(url)
    place = "" if parts is None else parts["place"].strip("[]").lower()
    try:
        return ipaddress.ip_address(place).is_loopback
    except ValueError:
        return place == "localhost" or place.endswith(".localhost")


_changing = threading.Lock()


@contextmanager
def without_proxy(url: str) -> Iterator[None]:
    """Let a library that is made in the block ask an address of this machine without the proxy of the environment.

    It is for libraries that read the environment themselves and have no setting for it.
    """
    if not is_here(url):
        yield
        return
    parts = PARTS.fullmatch(url)
    assert parts is not None
    with _changing:
        before = {name: os.environ.get(name) for name in ("NO_PROXY", "no_proxy")}
        listed = ",".join(filter(None, (*before.values(), parts["place"].strip("[]"))))
        os.environ.update(dict.fromkeys(before, listed))
        try:
            yield
        finally:
            for name, value in before.items():
                if value is None:
                    del os.environ[name]
                else:
                    os.environ[name] = value


def basic_auth(user: str) -> str:
    """Return the header `Authorization` for a "name:password"."""
    return f"Basic {base64.b64encode(user.encode()).decode()}"
