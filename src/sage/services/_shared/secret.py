"""Keys of servers: where they come from, and how they stay out of everything that is shown."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from pathlib import Path

from sage.errors import ServiceError, describe, hint

HIDDEN = "***"

SENDABLE = re.compile(r"[!-~](?:[ -~]*[!-~])?")
"""Characters that can be sent in a header. Libraries show other values in errors, so they must not get them."""


@dataclass(frozen=True, slots=True, repr=False)
class Secret:
    """A key that was asked for, and is read when it is needed."""

    value: str | None = None
    variable: str | None = None
    path: str | os.PathLike[str] | None = None

    def __post_init__(self) -> None:
        """Refuse two places for one key, and a key that cannot be sent."""
        places = {"api_key": self.value, "api_key_env": self.variable, "api_key_file": self.path}
        given = [name for name, place in places.items() if place]
        if len(given) > 1:
            raise ValueError(f"the key is given by {' and by '.join(given)}, but it can come from one place only")
        if self.value and not isinstance(self.value, str):
            raise TypeError(f"the key from {self.source} is of type {type(self.value).__name__}, not a string")
        self._check(self.value or "", ValueError, "no space or line end is before or after it.")

    @property
    def source(self) -> str:
        """Where the key comes from, for people to read."""
        if self.variable is not None:
            return f"environment variable {self.variable}"
        if self.path is not None:
            return f"file {os.fspath(self.path)!r}"
        return "argument api_key" if self.value else "nowhere"

    def read(self) -> str:
        """Return the key, or an empty text where none was asked for; ServiceError if it is missing or unsendable."""
        key = self.value or ""
        if self.variable is not None:
            key = os.environ.get(self.variable, "").strip()
            if not key:
                error = ServiceError(f"environment variable {self.variable}, which should hold the key, is not set")
                raise hint(error, f"Set it before the program starts: export {self.variable}=...")
        elif self.path is not None:
            try:
                key = Path(self.path).expanduser().read_text(encoding="utf-8").strip()
            except (OSError, UnicodeDecodeError) as error:
                text = f"{self.source}, which should hold the key, cannot be read: {type(error).__name__}"
                raise ServiceError(text) from None
            if not key:
                raise ServiceError(f"{self.source}, which should hold the key, is empty")
        self._check(key, ServiceError, "the place holds one key and nothing else.")
        return key

    def __repr__(self) -> str:
        return f"<Secret from {self.source}>"

    def _check(self, key: str, kind: type[Exception], rule: str) -> None:
        if key and not SENDABLE.fullmatch(key):
            error = kind(f"the key from {self.source} cannot be sent in a header")
            raise hint(error, f"A key is one line of printable ASCII characters, and {rule}")


def redact(text: str, *keys: str) -> str:
    """Return a text in which none of the keys stands."""
    for key in filter(None, keys):
        text = text.replace(key, HIDDEN)
    return text


def redacted_cause(error: BaseException, *keys: str) -> BaseException | None:
    """Return an error as the cause of another one, or None if it, or one of its causes, contains a key."""
    for link in causes_of(error):
        text = f"{link} {link!r}"
        if redact(text, *keys) != text:
            return None
    return error


def causes_of(error: BaseException) -> list[BaseException]:
    """Return an error and its causes, each once: libraries raise errors that have themselves as cause."""
    found: list[BaseException] = []
    link: BaseException | None = error
    while link is not None and all(link is not other for other in found):
        found.append(link)
        link = link.__cause__ or link.__context__
    return found


LIKELY_KEY = re.compile(
    r"(?P<before>\b(?:bearer|basic)\s+(?=\S*\d)|[?&](?:[\w-]*key|token|sig|signature|password)=)[^\s&\"'<>]+"
    r"|\bsk-[\w-]{8,}",
    re.IGNORECASE,
)
"""Keys as other programs show them, such as that of a server behind a server."""


def redacted_text(error: BaseException | str, *keys: str, length_max: int = 300) -> str:
    """Return an error's text, without keys and shortened."""
    text = error if isinstance(error, str) else describe(error)
    text = " ".join(redact(text, *keys).split())
    text = LIKELY_KEY.sub(lambda match: f"{match['before'] or ''}{HIDDEN}", text)
    return text if len(text) <= length_max else text[: length_max - 3] + "..."
