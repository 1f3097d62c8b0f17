"""Addresses of servers: what they are, what may be shown of them, and the name and password that they may hold."""

from __future__ import annotations

import base64
import re
from typing import Any
from urllib.parse import unquote

from sage.errors import hint, short
from sage.service import ServiceHandle, ServiceMethod
from sage.services.secret import HIDDEN

Url = str | ServiceHandle[Any] | ServiceMethod
"""An address, or the command service that has it."""

PARTS = re.compile(
    r"(?P<scheme>[a-z][\w+.-]*://)?(?P<user>[^/?#\x00-\x1f\x7f]*@)?(?P<place>[\w.-]*|\[[\w:.%]+\])(?P<port>:\d*)?"
    r"(?P<path>/[^?#@\x00-\x1f\x7f]*)?(?P<rest>[?#][^@\x00-\x1f\x7f]*)?",
    re.IGNORECASE,
)
"""Stricter than the standard: where it is not clear what is a password, nothing is taken for something else."""

QUOTED = "Signs such as / # ? @ [ in a name or a password are written as %2F %23 %3F %40 %5B."


def resolved(url: Url) -> str:
    """Return an address as text, asking the service that it is taken of."""
    if isinstance(url, ServiceHandle):
        url = url.url
    value: Any = url.resolve() if isinstance(url, ServiceMethod) else url
    return str(value)


def shown(url: str) -> str:
    """Return an address without name, password and query; of what is none, nothing."""
    parts = PARTS.fullmatch(url)
    if parts is None:
        return HIDDEN
    hidden = f"{HIDDEN}@" if parts["user"] else ""
    return "".join((parts["scheme"] or "", hidden, parts["place"], parts["port"] or "", parts["path"] or ""))


def told_of(url: str, error: Exception) -> str:
    """Return what a library says of an address, or nothing where the address may hold what must not be shown."""
    parts = PARTS.fullmatch(url)
    return "" if parts is None or parts["user"] or parts["rest"] else str(error)


def checked_url(what: str, url: str) -> str:
    """Return an address of a web server.

    Args:
        what: what it is called, for messages.
        url: the address.

    Raises:
        ValueError: it is none.
    """
    parts = PARTS.fullmatch(url)
    if parts is None or (parts["scheme"] or "").lower() not in ("http://", "https://") or not parts["place"]:
        wrong = ValueError(f"{what} is {short(shown(url))}, no http address")
        raise hint(wrong, f'It is one like "http://127.0.0.1:8000". {QUOTED}')
    return url


def apart(what: str, url: str, key: object = None) -> tuple[str, str]:
    """Return an address without the name and the password in it, and these as "name:password", or an empty text.

    Libraries that get the whole address show it in their errors and logs.

    Args:
        what: what the address is called, for messages.
        url: the address.
        key: another key for the same server, if there is one.

    Raises:
        ValueError: it is no address, or there are two keys.
    """
    parts = PARTS.fullmatch(url)
    if parts is None:
        raise hint(ValueError(f"{what} is no address"), QUOTED)
    user = parts["user"]
    if not user:
        return url, ""
    if key:
        raise ValueError(f"{what} {short(shown(url))} has a name and a password, and there is a key besides")
    return url[: parts.start("user")] + url[parts.end("user") :], unquote(user[:-1])


def basic(user: str) -> str:
    """Return what the header `Authorization` is for a "name:password"."""
    return f"Basic {base64.b64encode(user.encode()).decode()}"
