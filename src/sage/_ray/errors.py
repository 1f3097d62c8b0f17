"""Errors on their way to another process, with what a pickle leaves out: their causes, and where they were raised."""

from __future__ import annotations

import pickle
import traceback
from dataclasses import dataclass
from typing import Any

from sage._hosts.wire import encode
from sage.errors import JobError, describe, hint

DEPTH_MAX = 8
"""How many causes go along."""


@dataclass(frozen=True)
class PackedError:
    """An error as data.

    Attributes:
        data: its pickle and the buffers beside it, or None if it cannot be pickled.
        text: its type and text.
        notes: its notes.
        cause: what it came from, or None.
        where: its traceback as text, or "".
    """

    data: tuple[bytes, tuple[bytes, ...]] | None
    text: str
    notes: tuple[str, ...]
    cause: PackedError | None
    where: str


class UnknownError(JobError):
    """Stands for an error in a process that does not know its class; where it goes next, it may be itself again."""

    def __init__(self, packed: PackedError) -> None:
        super().__init__(packed.text)
        self.packed = packed


def pack(error: BaseException, depth: int = 0) -> PackedError:
    """Return an error as data that any process can take in."""
    if isinstance(error, UnknownError):
        return error.packed
    data = None
    try:
        pickled, buffers = encode(error)
        data = pickled, tuple(bytes(buffer) for buffer in buffers)
        rebuilt = pickle.loads(pickled, buffers=data[1])
        if type(rebuilt) is not type(error) or str(rebuilt) != str(error):
            data = None
    except Exception:  # whatever the error's own code raises
        data = None
    cause = error.__cause__
    packed = pack(cause, depth + 1) if cause is not None and depth < DEPTH_MAX else None
    where = ""
    if error.__traceback__ is not None and cause is None:
        where = "".join(traceback.format_exception(error, chain=False)).rstrip()
    return PackedError(data, describe(error), tuple(getattr(error, "__notes__", ())), packed, where)


def unpack(packed: PackedError, site: str = "") -> BaseException:
    """Return the error again, or one that says the same if it cannot be rebuilt here."""
    error: BaseException | None = None
    if packed.data is not None:
        try:
            rebuilt: Any = pickle.loads(packed.data[0], buffers=packed.data[1])
            error = rebuilt if isinstance(rebuilt, BaseException) else None
        except Exception:  # its class may be unknown here
            error = None
    if error is None:
        error = UnknownError(packed) if packed.data is not None else JobError(packed.text)
        for note in packed.notes:
            hint(error, note)
    if packed.cause is not None:
        error.__cause__ = unpack(packed.cause, site)
    if packed.where and site:
        hint(error, f"In the process {site}:\n{packed.where}")
    return error
