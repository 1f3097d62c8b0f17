"""A gate between threads of old programs that keep the same pace."""

from __future__ import annotations

import threading


class Metronome:
    """A gate that one waiting thread passes for each release.

    Sources with `use_metronome = True` need none: the engine lets one record at a time through the job. It is for
    threads of the program that keep the same pace.
    """

    def __init__(self, name: str) -> None:
        self.name = name
        self._condition = threading.Condition()
        self._released = False
        self._stays_open = False

    def wait_for_release(self, timeout: float | None = None) -> bool:
        """Wait for a release and use it up; return whether there was one within `timeout` seconds."""
        with self._condition:
            if not self._condition.wait_for(lambda: self._released, timeout):
                return False
            self._released = self._stays_open
            return True

    def release_once(self) -> None:
        """Let one thread pass; a release that nobody has used yet is not counted twice."""
        with self._condition:
            self._released = True
            self._condition.notify()

    def force_release(self) -> None:
        """Let every thread pass until `reset`."""
        with self._condition:
            self._released = self._stays_open = True
            self._condition.notify_all()

    def reset(self) -> None:
        """Let nobody pass until the next release."""
        with self._condition:
            self._released = self._stays_open = False


_metronome = Metronome("global")


def create_metronome(name: str) -> Metronome:
    """Return a new metronome, which nobody passes yet."""
    return Metronome(name)


def get_global_metronome() -> Metronome:
    """Return the one metronome that the whole program shares."""
    return _metronome
