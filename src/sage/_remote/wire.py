"""Values over a stream socket: protocol-5 pickles with their large buffers beside them."""

from __future__ import annotations

import pickle
import socket
import struct
from contextlib import suppress
from typing import TYPE_CHECKING, Any

from sage._current_job import here

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from sage.service import ServiceHandle

HEADER = struct.Struct("=IQ")
SIZE = struct.Struct("=Q")
INBOX_BYTES = 1 << 16
"""The most bytes that one receive takes of a frame's beginning; most frames are shorter and cost one call."""

PARTS_MAX = 512
"""How many buffers one sendmsg takes; the kernel's limit is 1024."""

MAIN = b"__main__"

Frame = tuple[bytes, "Sequence[memoryview]"]
NOTHING: tuple[()] = ()


def encode(value: object) -> Frame:
    """Return a value as a pickle and the buffers beside it.

    Functions and classes of the program's own script, and lambdas, cannot be found by name in another process; these
    travel by value.

    Raises:
        Exception: the value cannot be pickled; the type depends on it.
    """
    buffers: list[pickle.PickleBuffer] = []
    try:
        data = pickle.dumps(value, 5, buffer_callback=buffers.append)
    except (pickle.PicklingError, AttributeError, TypeError):
        return by_value(value)
    if MAIN in data:
        return by_value(value)
    return data, [buffer.raw() for buffer in buffers] if buffers else NOTHING


def by_value(value: object) -> Frame:
    """Return a value as `encode` does, with the code of everything that cannot be imported."""
    import cloudpickle  # most programs never need it

    buffers: list[pickle.PickleBuffer] = []
    data: bytes = cloudpickle.dumps(value, 5, buffer_callback=buffers.append)
    return data, [buffer.raw() for buffer in buffers]


class Connection:
    """One end of a stream socket that carries frames. One thread at a time sends, and one receives.

    Args:
        end: the socket, which the connection owns from now on.
        handles: resolves handles of services among the received values.
    """

    def __init__(self, end: socket.socket, handles: Mapping[str, ServiceHandle[object]]) -> None:
        self._socket = end
        self._handles = handles
        self._inbox = bytearray(INBOX_BYTES)
        self._view = memoryview(self._inbox)
        self._start = 0
        self._end = 0

    def send(self, frame: Frame) -> None:
        """Send the result of `encode`; OSError if the other end is gone."""
        data, buffers = frame
        header = HEADER.pack(len(buffers), len(data))
        if not buffers and len(data) <= INBOX_BYTES:
            self._socket.sendall(header + data)  # copying a little costs less than naming two places to send from
            return
        sizes = b"".join([SIZE.pack(buffer.nbytes) for buffer in buffers])
        parts: list[bytes | memoryview] = [header + sizes, data, *buffers]
        sent = self._socket.sendmsg(parts[:PARTS_MAX])
        views = [memoryview(part) for part in parts]
        while True:
            while views and sent >= views[0].nbytes:
                sent -= views.pop(0).nbytes
            if not views:
                return
            views[0] = views[0][sent:]
            sent = self._socket.sendmsg(views[:PARTS_MAX])

    def take(self) -> tuple[memoryview, Sequence[bytearray]]:
        """Receive a frame; the pickle is valid until the next one is received.

        Raises:
            EOFError: the other end was closed.
            OSError: the connection broke.
        """
        if self._start == self._end:
            size = self._socket.recv_into(self._inbox)
            if not size:
                raise EOFError("the other end was closed")
            if size > HEADER.size:  # most frames come alone, and as a whole
                buffer_count, length = HEADER.unpack_from(self._inbox)
                if not buffer_count and length == size - HEADER.size:
                    return self._view[HEADER.size : size], NOTHING
            self._start, self._end = 0, size
        if self._end - self._start < HEADER.size:
            self._fill(HEADER.size)
        buffer_count, length = HEADER.unpack_from(self._inbox, self._start)
        self._start += HEADER.size
        if not buffer_count and length <= self._end - self._start:
            data = self._view[self._start : self._start + length]
            self._start += length
            return data, NOTHING
        sizes = [size for (size,) in SIZE.iter_unpack(self._read(buffer_count * SIZE.size))]
        large = memoryview(self._read(length))
        return large, [self._read(size) for size in sizes]

    def decode(self, data: memoryview, buffers: Sequence[bytearray]) -> Any:
        """Return the value of a frame.

        Raises:
            Exception: it cannot be unpickled; the type depends on it.
        """
        here.handles = self._handles
        return pickle.loads(data, buffers=buffers) if buffers else pickle.loads(data)

    def bound(self, timeout_s: float) -> None:
        """Let sending and receiving raise `TimeoutError` after a time; the connection is of no use after that."""
        self._socket.settimeout(timeout_s)

    def has_missed(self, error: Exception) -> bool:  # noqa: ARG002
        """Return whether the other end was gone before it had all that was sent, given the error that told so."""
        return False

    def shut(self) -> None:
        """Wake whoever sends or receives; data that has arrived can still be received."""
        with suppress(OSError):
            self._socket.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        """Free the socket; nobody may be sending or receiving."""
        with suppress(OSError):  # the program may have closed every descriptor that it found
            self._socket.close()

    def _fill(self, size: int) -> None:
        """Have at least `size` bytes, few, in the inbox, which has some."""
        if self._start + size > INBOX_BYTES:
            left = self._end - self._start
            self._inbox[:left] = self._inbox[self._start : self._end]
            self._start, self._end = 0, left
        while self._end - self._start < size:
            count = self._socket.recv_into(self._view[self._end :])
            if not count:
                raise EOFError("the other end was closed")
            self._end += count

    def _read(self, size: int) -> bytearray:
        """Return the next `size` bytes, many, received in place."""
        room = bytearray(size)
        have = min(size, self._end - self._start)
        room[:have] = self._view[self._start : self._start + have]
        self._start += have
        view = memoryview(room)
        while have < size:
            count = self._socket.recv_into(view[have:])
            if not count:
                raise EOFError("the other end was closed")
            have += count
        return room
