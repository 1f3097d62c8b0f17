"""A service in whose hooks things go wrong, and one beside it that has to be none the worse for it."""

from __future__ import annotations

from typing import Any

from support.fault_injection import go_wrong, mark

from sage import BaseService


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
