"""Standard output and standard error after their reader has gone, as behind `| head`."""

from __future__ import annotations

import os
import select
import signal
import sys
from contextlib import suppress
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator
    from typing import TextIO

CUT_OFF_CODE = 128 + signal.SIGPIPE
"""Exit code of a program whose output nobody reads any more; a shell shows it for a tool that SIGPIPE has ended."""


def is_cut_off(stream: TextIO | None = None) -> bool:
    """Return whether nobody reads a stream, standard output by default, any more."""
    try:
        descriptor = (stream or sys.stdout).fileno()
        poll = select.poll()
        poll.register(descriptor, 0)
        return any(events & (select.POLLERR | select.POLLHUP) for _, events in poll.poll(0))
    except (OSError, ValueError, AttributeError):  # it is closed, or a stand-in that is not a file
        return False


def is_of_output(error: BaseException | None) -> bool:
    """Return whether an error, or its cause, is that the reader of standard output has gone."""
    return any(isinstance(one, BrokenPipeError) for one in _causes(error)) and is_cut_off()


def has_unread_output() -> bool:
    """Return whether text waits that nobody will read; nothing is waited for."""
    if is_cut_off():
        try:
            sys.stdout.flush()
        except BrokenPipeError:
            return True
    return False


def let_go() -> None:
    """Discard output to a stream without a reader; Python would complain about it at exit."""
    for stream in (sys.stdout, sys.stderr):
        if stream is not None and is_cut_off(stream):
            with suppress(OSError):
                nowhere = os.open(os.devnull, os.O_WRONLY)
                os.dup2(nowhere, stream.fileno())
                os.close(nowhere)


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    """Yield an error and its causes, each once: an error may be a cause of itself."""
    seen: set[int] = set()
    while error is not None and id(error) not in seen:
        seen.add(id(error))
        yield error
        error = error.__cause__
