"""Descriptors that are held for long, and told from others that have got the same number meanwhile."""

from __future__ import annotations

import errno
import os


class OpenFile:
    """A descriptor with the file that it was opened for.

    A program may close every descriptor that it finds, and the next file that it opens gets one of the numbers. Nothing
    is written to that file, and it is not closed.

    Attributes:
        descriptor: the number.
        file: the device and the number of the file.
    """

    def __init__(self, descriptor: int) -> None:
        self.descriptor = descriptor
        self.file = file_of(descriptor)

    @property
    def is_open(self) -> bool:
        """Whether the descriptor still leads to the file."""
        return self.file is not None and file_of(self.descriptor) == self.file

    def write(self, data: bytes) -> int:
        """Write bytes and return how many were written.

        Raises:
            OSError: they could not be written, or somebody else has closed the descriptor.
        """
        if not self.is_open:
            raise OSError(errno.EBADF, os.strerror(errno.EBADF))
        return os.write(self.descriptor, data)

    def close(self) -> None:
        """Close the file, unless that was done already.

        Raises:
            OSError: what was written before is lost.
        """
        if self.is_open:
            self.file = None
            os.close(self.descriptor)


def file_of(descriptor: int | str) -> tuple[int, int] | None:
    """Return the device and the number of the file behind a descriptor or at a path; None if nothing is there."""
    try:
        found = os.stat(descriptor)
    except OSError:
        return None
    return found.st_dev, found.st_ino
