"""The faults themselves, and the file in which every process writes down what it has come to."""

from __future__ import annotations

import os
import signal
import threading
import time

SLOW_S = 0.15

released = threading.Event()
"""Set when the tests are over, so that what hangs in their own process comes to an end."""


def mark(marks: str, text: str) -> None:
    """Append a line to a file that several processes write to."""
    with open(marks, "a", encoding="utf-8") as file:
        file.write(f"{text}\n")


def marked(marks: str) -> list[str]:
    """Return the lines of the file."""
    try:
        with open(marks, encoding="utf-8") as file:
            return file.read().split()
    except FileNotFoundError:
        return []


def go_wrong(fault: str) -> None:
    """Let a fault happen to whoever calls."""
    match fault:
        case "raises":
            raise OSError("broken")
        case "hangs":
            released.wait()
        case "slow":
            time.sleep(SLOW_S)
        case "exits":
            os._exit(3)
        case "killed":
            os.kill(os.getpid(), signal.SIGKILL)
        case "stopped":
            os.kill(os.getpid(), signal.SIGSTOP)
            time.sleep(SLOW_S)  # another thread may take the signal, and this one would get on for a moment
