"""Connections whose short frames go through memory that two processes share, in half the time that a socket takes."""

from __future__ import annotations

import mmap
import os
import select
import struct
import threading
from contextlib import suppress
from typing import TYPE_CHECKING

from sage._remote.begun import PLACES_COUNT
from sage._remote.wire import NOTHING, Connection

if TYPE_CHECKING:
    import socket
    from collections.abc import Mapping, Sequence

    from sage._remote.wire import Frame
    from sage.service import ServiceHandle

LANES_MAX = NO_LANE = 64
"""How many connections of a link have a lane, which takes two descriptors more; all others do without."""

ROOM_BYTES, GONE_AT = 4096, 4095
"""Each lane has so much room for each direction: the size of a frame, the frame, and whether its sender is gone."""

MEMORY_BYTES = PLACES_COUNT + 2 * LANES_MAX * ROOM_BYTES
BELL_BYTES = 8
SIZE = struct.Struct("=I")
SHORT_BYTES_MAX = GONE_AT - SIZE.size
NONE, LONG = 0, 0xFFFF_FFFF
"""In place of a size: nothing is there, or a frame comes over the socket."""


class Lanes:
    """The memory of the lanes of a link.

    Args:
        descriptor: of the memory, from `shared_memory`; it stays open.
    """

    def __init__(self, descriptor: int) -> None:
        self.memory = mmap.mmap(descriptor, MEMORY_BYTES)
        self._lock = threading.Lock()
        self._unused = list(range(LANES_MAX))
        self._left: set[int] = set()

    def take(self) -> int | None:
        """Return the number of a lane that neither end uses, or None."""
        with self._lock:
            if self._unused:
                return self._unused.pop()
            with suppress(ValueError):  # the memory is closed
                for number in self._left:
                    rooms = _rooms(number)
                    # An end that still makes a call of a connection that was given up has an answer to write.
                    if self.memory[rooms[0] + GONE_AT]:
                        self._left.discard(number)
                        for room in rooms:
                            SIZE.pack_into(self.memory, room, NONE)
                            self.memory[room + GONE_AT] = 0
                        return number
        return None

    def give_back(self, number: int) -> None:
        """Let another connection have a lane that was not used."""
        with self._lock:
            self._unused.append(number)

    def leave(self, number: int) -> None:
        """Let another connection have the lane when the other end has left it too."""
        with self._lock:
            self._left.add(number)

    def refuse(self, number: int) -> None:
        """Leave a lane of the other end, which could not be taken over."""
        with suppress(ValueError):
            self.memory[_rooms(number)[0] + GONE_AT] = 1

    def close(self) -> None:
        """Free the memory; connections that use it end."""
        self.memory.close()


def shared_memory() -> int:
    """Return a descriptor of new memory for `BegunCalls` and `Lanes`; the caller closes it."""
    descriptor = os.memfd_create("sage-calls")
    os.ftruncate(descriptor, MEMORY_BYTES)  # of which the system only keeps the pages that are used
    return descriptor


def _rooms(number: int) -> tuple[int, int]:
    """Return where the rooms of a lane begin: for the frames of whoever answers, and of whoever asks."""
    answers_at = PLACES_COUNT + 2 * number * ROOM_BYTES
    return answers_at, answers_at + ROOM_BYTES


class LaneConnection(Connection):
    """One end of a connection with a lane. A frame is only sent when the other end has taken the one before.

    The other end is woken by its bell, an eventfd. That does not tell of the end of a process, so whoever hears of it
    calls `shut`.

    Args:
        end: the socket, for long frames; the connection owns it and the bells from now on.
        handles: resolves handles of services among the received values.
        lanes: the memory.
        number: which lane it is.
        bells: the descriptors of its own bell and of that of the other end.
        asks: whether it is the end that asks.
    """

    def __init__(
        self,
        end: socket.socket,
        handles: Mapping[str, ServiceHandle[object]],
        lanes: Lanes,
        number: int,
        bells: Sequence[int],
        *,
        asks: bool,
    ) -> None:
        super().__init__(end, handles)
        self._lanes = lanes
        self._number = number
        self._memory = lanes.memory
        self._in, self._out = _rooms(number) if asks else _rooms(number)[::-1]
        self._bell, self._other_bell = bells
        self._asks = asks
        self._is_shut = False
        self._timeout_s: float | None = None
        self._polls = asks  # until the first answer: a process that can have no more descriptors loses its bells

    def send(self, frame: Frame) -> None:
        """Send the result of `encode`.

        Raises:
            OSError: the other end is known to be gone; otherwise `take` tells.
        """
        data, buffers = frame
        size, at = len(data), self._out + SIZE.size
        is_short = size <= SHORT_BYTES_MAX and not buffers
        try:
            if is_short:
                self._memory[at : at + size] = data
            SIZE.pack_into(self._memory, self._out, size if is_short else LONG)
        except ValueError:
            raise BrokenPipeError("the memory is closed") from None
        if self._is_shut:
            raise BrokenPipeError("the connection is shut")
        os.eventfd_write(self._other_bell, 1)
        if not is_short:
            super().send(frame)

    def take(self) -> tuple[bytes | memoryview, Sequence[bytearray]]:
        """Receive a frame; see `Connection.take`."""
        memory, at = self._memory, self._in + SIZE.size
        try:
            is_over = self._is_shut or memory[self._in + GONE_AT]
            if not is_over and (not self._polls or self._hears_bell()):
                os.read(self._bell, BELL_BYTES)  # which goes on after a signal, as `os.eventfd_read` does not
            (size,) = SIZE.unpack_from(memory, self._in)
            if size == NONE:  # so the bell has told of the end
                raise EOFError("the other end was closed")
            SIZE.pack_into(memory, self._in, NONE)
            # Its bytes are copied, as memory cannot be closed while something leads to it.
            return super().take() if size == LONG else (memory[at : at + size], NOTHING)
        except ValueError:
            raise EOFError("the memory is closed") from None

    def bound(self, timeout_s: float) -> None:
        """Let sending and receiving raise `TimeoutError` after a time; the connection is of no use after that."""
        self._timeout_s, self._polls = timeout_s, True
        super().bound(timeout_s)

    def shut(self) -> None:
        """Wake whoever sends or receives; data that has arrived can still be received."""
        self._is_shut = True
        super().shut()
        with suppress(OSError):
            os.eventfd_write(self._bell, 1)

    def close(self) -> None:
        """Tell the other end, and free the descriptors; nobody may be sending or receiving."""
        with suppress(OSError, ValueError):
            self._memory[self._out + GONE_AT] = 1  # as its bell may be heard together with that of a frame
            os.eventfd_write(self._other_bell, 1)
        if self._asks:
            self._lanes.leave(self._number)
        self.free()

    def free(self) -> None:
        """Free the descriptors of this process alone."""
        super().free()
        bells, self._bell, self._other_bell = (self._bell, self._other_bell), -1, -1
        for bell in bells:
            with suppress(OSError):
                os.close(bell)

    def _hears_bell(self) -> bool:
        """Wait for the bell or, if the other end has none, for the end of the socket; return which it was."""
        heard = select.poll()
        heard.register(self._bell, select.POLLIN)
        heard.register(self._socket, 0)  # which is told of its end alone
        found = dict(heard.poll(None if self._timeout_s is None else self._timeout_s * 1000))
        if not found:
            raise TimeoutError("no answer came in time")
        self._polls = self._timeout_s is not None
        return self._bell in found
