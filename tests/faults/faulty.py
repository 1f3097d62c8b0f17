"""A service in whose hooks things go wrong, and one beside it that has to be none the worse for it."""

from __future__ import annotations

import os
import signal
import threading
import time
from typing import Any

from sage import BaseService

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


class Neighbour(BaseService):
    """Marks its hooks in a file."""

    def __init__(self, marks: str) -> None:
        self.marks = marks
        mark(marks, "neighbour.constructor")

    def setup(self) -> None:
        mark(self.marks, "neighbour.setup")

    def start(self) -> None:
        mark(self.marks, "neighbour.start")

    def stop(self) -> None:
        mark(self.marks, "neighbour.stop")

    def cleanup(self) -> None:
        mark(self.marks, "neighbour.cleanup")


class Faulty(BaseService):
    """Marks its hooks in a file, and has a fault in one of them, the first time that it is called.

    Calls and health checks come at moments of their own, so that they are marked only where they are the fault.
    """

    def __init__(self, marks: str, place: str, fault: str) -> None:
        self.marks, self.place, self.fault = marks, place, fault
        self.seen: set[str] = set()
        self.pass_by("constructor")

    def pass_by(self, place: str) -> None:
        if place in self.seen or (place in ("call", "health") and place != self.place):
            return
        self.seen.add(place)
        mark(self.marks, f"faulty.{place}")
        if place == self.place:
            go_wrong(self.fault)

    def setup(self) -> None:
        self.pass_by("setup")

    def start(self) -> None:
        self.pass_by("start")

    def ready(self) -> bool:
        self.pass_by("ready")
        return True

    def process(self, data: Any) -> Any:
        self.pass_by("call")
        return data

    def health(self) -> None:
        self.pass_by("health")

    def stop(self) -> None:
        self.pass_by("stop")

    def cleanup(self) -> None:
        self.pass_by("cleanup")
