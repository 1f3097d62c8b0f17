"""Functions and services of jobs on Ray for tests that end their processes, and what waits for what follows."""

from __future__ import annotations

import os
import threading
import time
from typing import TYPE_CHECKING, Any

from support.recording_services import Recorded

from sage import MapFunction, SourceFunction

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from support.recording_services import Notes

WAIT_S = 30.0


class Ticks(SourceFunction):
    """Counts for ever, a little slowly."""

    def __init__(self) -> None:
        self._at = -1

    def execute(self) -> int:
        time.sleep(0.001)
        self._at += 1
        return self._at


class Told(MapFunction):
    """Says in which process it runs, and calls a service with each record."""

    def __init__(self, path: Path, *services: str) -> None:
        self._path = path
        self._services = services

    def open(self) -> None:
        self._path.write_text(str(os.getpid()))

    def execute(self, data: int) -> int:
        for name in self._services:
            self.call_service(name, data)
        return data


class Placed(Recorded):
    """Says in which process it runs."""

    def pid(self) -> int:
        return os.getpid()


def wait_until(is_so: Callable[[], bool], within_s: float = WAIT_S) -> None:
    due = time.monotonic() + within_s
    while not is_so():
        assert time.monotonic() < due
        threading.Event().wait(0.02)


def ends(journal: Notes) -> list[str]:
    return [line for line in journal if ".stop" in line or ".cleanup" in line]


def master_pid() -> int:
    import ray._private.state as state

    actors: dict[str, dict[str, Any]] = state.actors()
    (pid,) = (
        one["Pid"] for one in actors.values() if one["ActorClassName"] == "MasterActor" and one["State"] != "DEAD"
    )
    return int(pid)
