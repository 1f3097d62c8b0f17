"""Which calls another process has begun, in memory that both processes share.

When a process dies, each of its callers finds here whether the call was begun, and fails, or can be made by the next
process. Waiting calls therefore need no place in a queue of the driver, and no thread to hand that place on.
"""

from __future__ import annotations

import mmap
import os

BEGUN = 1
PLACES_COUNT = 4096
UNKNOWN = PLACES_COUNT - 1
"""The place of all calls beyond that number at once, which count as begun."""


class BegunCalls:
    """The calls that wait for an answer, each at a place of its own.

    Attributes:
        marks: has a byte for each place. The other process sets it to `BEGUN` as it begins the call.

    Args:
        descriptor: of the shared memory, from `shared_memory`; it stays open.
    """

    def __init__(self, descriptor: int) -> None:
        self._memory = mmap.mmap(descriptor, PLACES_COUNT)
        self.marks: mmap.mmap | bytearray = self._memory
        self._free = list(range(UNKNOWN))

    def take(self) -> int:
        """Return the place for a call that has not begun; the caller returns it with `free`."""
        try:
            place = self._free.pop()
        except IndexError:
            return UNKNOWN
        self.marks[place] = 0
        return place

    def free(self, place: int) -> None:
        """Let another call have a place."""
        if place != UNKNOWN:
            self._free.append(place)

    def has_begun(self, place: int) -> bool:
        return place == UNKNOWN or self.marks[place] == BEGUN

    def close(self) -> None:
        """Free the memory; calls that still wait count as begun."""
        self.marks = bytearray([BEGUN]) * PLACES_COUNT
        self._memory.close()


def shared_memory() -> int:
    """Return a descriptor of new memory for `BegunCalls`; the caller closes it."""
    descriptor = os.memfd_create("sage-begun")
    os.ftruncate(descriptor, PLACES_COUNT)
    return descriptor
