"""Batches on their way to another process.

They are pickled on the thread of the task that made them, so that its operator can answer for a record that cannot be.
"""

from __future__ import annotations

import pickle
from dataclasses import replace
from typing import TYPE_CHECKING

from sage._remote.errors import pack, unpack
from sage._remote.wire import encode
from sage.errors import describe, hint, short
from sage.failure import DeadLetter
from sage.records import Batch

if TYPE_CHECKING:
    from collections.abc import Callable


class Parcel:
    """A pickled batch.

    Attributes:
        bytes_count: how large it is.
    """

    __slots__ = ("_buffers", "_data", "_records_count", "bytes_count")

    def __init__(self, records_count: int, data: bytes | memoryview, buffers: tuple[bytes | memoryview, ...]) -> None:
        self._records_count = records_count
        self._data = data
        self._buffers = buffers
        self.bytes_count = len(data) + sum(memoryview(buffer).nbytes for buffer in buffers)

    def __len__(self) -> int:
        return self._records_count

    def __reduce__(self) -> tuple[object, ...]:
        # Beside the pickle of the request, where it is not copied.
        data, *buffers = map(pickle.PickleBuffer, (self._data, *self._buffers))
        return Parcel, (self._records_count, data, tuple(buffers))

    def unpacked(self) -> Batch:
        """Return the batch; any error if it cannot be unpickled here."""
        return Batch(*pickle.loads(self._data, buffers=self._buffers))


def packed(batch: Batch, refuse: Callable[[Batch, Exception], bool]) -> Parcel:
    """Return a batch as a parcel, without the records that cannot be pickled.

    Args:
        batch: the records.
        refuse: called with each record that cannot be pickled, and why; returns whether the records behind it follow.
    """
    is_checked = any(issubclass(one, (BaseException, DeadLetter)) for one in set(map(type, batch.values)))
    if not is_checked:
        try:
            return _parcel(batch)
        except Exception:  # an error of the records' own code
            pass
    places: list[int] = []
    values = list(batch.values)
    for place, value in enumerate(values):
        if isinstance(value, DeadLetter):
            values[place] = _sendable(value)
        error = _error_of(batch.slice(place, place + 1).replace([values[place]]))
        if error is None:
            places.append(place)
        elif not refuse(batch.slice(place, place + 1), error):
            break
    return _parcel(batch.replace(values).pick(places))


def _parcel(batch: Batch) -> Parcel:
    data, buffers = encode((batch.values, batch.keys, batch.requests))
    return Parcel(len(batch), data, tuple(buffers))


def _error_of(record: Batch) -> Exception | None:
    """Return why a record cannot be pickled, or None.

    An exception is unpickled as well: many that take several arguments can be pickled, but not be made again.
    """
    try:
        parcel = _parcel(record)
        if isinstance(record.values[0], BaseException):
            parcel.unpacked()
    except Exception as error:  # an error of the record's own code
        return error
    return None


def _sendable(letter: DeadLetter) -> DeadLetter:
    """Return a dead letter with texts in place of parts that cannot be pickled: it is the last trace of a record."""
    value, error = letter.value, unpack(pack(letter.error))
    reason = _error_of(Batch([value]))
    if reason is not None:
        hint(error, f"The record was of type {type(value).__name__}; its text came, as {describe(reason)}.")
        value = short(value)
    return replace(letter, value=value, error=error)
