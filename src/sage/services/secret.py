"""Keys of servers: where they come from, and how they stay out of everything that is shown."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from sage.errors import ServiceError, describe, hint

E = TypeVar("E", bound=Exception)

HIDDEN = "***"

SENDABLE = re.compile(r"[!-~](?:[ -~]*[!-~])?")
"""What can be sent in a header. Libraries show what cannot, so that they must not be given it."""


@dataclass(frozen=True, slots=True, repr=False)
class Secret:
    """A key that was asked for, and is read when it is needed.

    Attributes:
        value: the key itself, or None; a blank or a line end around it is refused, as everything else that no header
            can hold.
        variable: the environment variable that has it, or None.
        path: the file that has it, or None; blanks and line ends around it do not count.
    """

    value: str | None = None
    variable: str | None = None
    path: str | os.PathLike[str] | None = None

    def __post_init__(self) -> None:
        """Refuse two places for one key, and a key that cannot be sent."""
        given = [
            name
            for name, place in zip(("api_key", "api_key_env", "api_key_file"), self._places(), strict=True)
            if place
        ]
        if len(given) > 1:
            raise ValueError(f"the key is given by {' and by '.join(given)}, but it can come from one place only")
        if self.value and not isinstance(self.value, str):
            raise TypeError(f"the key from {self.source} is of type {type(self.value).__name__}, not a string")
        if self.value and not SENDABLE.fullmatch(self.value):
            raise self._unsendable(ValueError, "no blank or line end is before or after it.")

    @property
    def source(self) -> str:
        """Where the key comes from, for people to read."""
        if self.variable is not None:
            return f"environment variable {self.variable}"
        if self.path is not None:
            return f"file {os.fspath(self.path)!r}"
        return "argument api_key" if self.value else "nowhere"

    def read(self) -> str:
        """Return the key, or an empty text where none was asked for.

        Raises:
            ServiceError: it is not where it should be, or no header can hold what is there.
        """
        key = self._read()
        if key and not SENDABLE.fullmatch(key):
            raise self._unsendable(ServiceError, "the place holds one key and nothing else.")
        return key

    def _read(self) -> str:
        if self.variable is not None:
            key = os.environ.get(self.variable, "").strip()
            if not key:
                error = ServiceError(f"environment variable {self.variable}, which should hold the key, is not set")
                raise hint(error, f"Set it before the program starts: export {self.variable}=...")
            return key
        if self.path is not None:
            try:
                key = Path(self.path).expanduser().read_text(encoding="utf-8").strip()
            except (OSError, UnicodeDecodeError) as error:
                text = f"{self.source}, which should hold the key, cannot be read: {type(error).__name__}"
                raise ServiceError(text) from None
            if not key:
                raise ServiceError(f"{self.source}, which should hold the key, is empty")
            return key
        return self.value or ""

    def __repr__(self) -> str:
        return f"<Secret from {self.source}>"

    def _unsendable(self, kind: type[E], rule: str) -> E:
        error = kind(f"the key from {self.source} cannot be sent in a header")
        return hint(error, f"A key is on one line and of printable ASCII signs, and {rule}")

    def _places(self) -> tuple[object, object, object]:
        return self.value, self.variable, self.path


def without(text: str, *keys: str) -> str:
    """Return a text in which none of the keys stands."""
    for key in filter(None, keys):
        text = text.replace(key, HIDDEN)
    return text


def cause_without(error: BaseException, *keys: str) -> BaseException | None:
    """Return an error as the cause of another one, or None where a key stands in it or in what led to it."""
    for link in links_of(error):
        text = f"{link} {link!r}"
        if without(text, *keys) != text:
            return None
    return error


def links_of(error: BaseException) -> list[BaseException]:
    """Return an error and what led to it, each once: libraries raise errors that have themselves as cause."""
    found: list[BaseException] = []
    link: BaseException | None = error
    while link is not None and all(link is not other for other in found):
        found.append(link)
        link = link.__cause__ or link.__context__
    return found


def told(error: BaseException, *keys: str, length_max: int = 300) -> str:
    """Return what an error says, without the keys and not longer than can be read."""
    text = " ".join(without(describe(error), *keys).split())
    return text if len(text) <= length_max else text[: length_max - 3] + "..."
