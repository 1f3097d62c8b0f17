"""Errors on their way to another process, with the parts that a pickle leaves out: their causes and tracebacks."""

from __future__ import annotations

import io
import pickle
import traceback
from dataclasses import dataclass
from typing import Any, TypeVar, cast

from sage._remote.wire import encode
from sage.errors import JobError, JobErrorGroup, describe, hint

T = TypeVar("T")

DEPTH_MAX = 8
"""How many causes go along."""

TEXT_CAME = "It came as its text, because it cannot be pickled"


@dataclass(frozen=True)
class PackedError:
    """An error as data.

    Attributes:
        data: the pickle of the error, or of its stand-in, and the buffers beside it.
        text: its type and text.
        notes: its notes.
        cause: its cause, or None.
        where: its process and its traceback as text, or "".
    """

    data: tuple[bytes, tuple[bytes, ...]]
    text: str
    notes: tuple[str, ...]
    cause: PackedError | None
    where: str


class UnknownError(JobError):
    """Stands for an error in a process that does not know its class; where it goes next, it may be itself again."""

    def __init__(self, packed: PackedError) -> None:
        super().__init__(packed.text)
        self.packed = packed

    def __reduce__(self) -> tuple[object, ...]:
        return unpack, (self.packed,)


def pack(error: BaseException, process: str = "", stand_in: type[JobError] = JobError, depth: int = 0) -> PackedError:
    """Return an error as data that any process can take in.

    Args:
        error: the error.
        process: the name of this process, if the traceback is to go along.
        stand_in: the class of the error that has only the text, for one that cannot be pickled.
        depth: how many errors it is the cause of.
    """
    if isinstance(error, UnknownError):
        return error.packed
    cause, why, notes = error.__cause__, "", tuple(getattr(error, "__notes__", ()))
    try:
        data = _data(error)
        rebuilt = pickle.loads(data[0], buffers=data[1])
        is_same = type(rebuilt) is type(error) and str(rebuilt) == str(error)
    except Exception as reason:  # an error of the error's own code
        is_same, why = False, f"\n{TEXT_CAME}: {describe(reason)}"
    if not is_same:
        text = stand_in(describe(error))
        for note in notes:
            hint(text, note)
        data = _data(text)
    where = ""
    # An error of ours that has a cause tells of that, and was raised by code of ours.
    if process and error.__traceback__ is not None and not (isinstance(error, JobError) and cause is not None):
        lines = traceback.format_exception(error, chain=cause is None)
        where = f"In the process {process}:\n{''.join(lines).rstrip()}{why}"
    packed = pack(cause, process, stand_in, depth + 1) if cause is not None and depth < DEPTH_MAX else None
    return PackedError(data, describe(error), notes, packed, where)


def unpack(packed: PackedError) -> BaseException:
    """Return the error again, or one that says the same if it cannot be rebuilt here."""
    error: BaseException
    try:
        error = pickle.loads(packed.data[0], buffers=packed.data[1])
    except Exception:  # its class may be unknown here
        error = UnknownError(packed)
        for note in packed.notes:
            hint(error, note)
    if packed.cause is not None:
        error.__cause__ = unpack(packed.cause)
    return hint(error, packed.where) if packed.where else error


def sendable(value: T, process: str = "") -> T:
    """Return a stand-in that arrives in another process as `value`, with all of its errors as `pack` sends them.

    Two places that have the same error have the same again there.
    """
    return cast("T", _Sendable(value, process))


class _Sendable:
    def __init__(self, value: object, process: str) -> None:
        self._value = value
        self._process = process

    def __reduce__(self) -> tuple[object, ...]:
        room = io.BytesIO()
        _Pickler(room, self._process).dump(self._value)
        return pickle.loads, (room.getvalue(),)


class _Pickler(pickle.Pickler):
    def __init__(self, room: io.BytesIO, process: str) -> None:
        super().__init__(room, 5)
        self._process = process

    def reducer_override(self, value: object) -> Any:
        if isinstance(value, JobErrorGroup):
            return type(value), (value.message, value.exceptions), value.__dict__
        if isinstance(value, BaseException):
            return unpack, (pack(value, self._process),)
        return NotImplemented


def _data(error: BaseException) -> tuple[bytes, tuple[bytes, ...]]:
    pickled, buffers = encode(error)
    return pickled, tuple(bytes(buffer) for buffer in buffers)
