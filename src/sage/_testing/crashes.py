"""Runs a program whose jobs are killed at random steps, and run again, until one of them ends otherwise."""

from __future__ import annotations

import random
import shutil
import tempfile
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from sage.errors import short
from sage.testing import StepBackend

if TYPE_CHECKING:
    from collections.abc import Callable

    from sage._runtime.backend import Backend
    from sage._runtime.supervisor import Supervisor

MEMORY = Path("/dev/shm")


class CrashingBackend(StepBackend):
    """Copies a folder before some of the steps, as a kill at that moment would leave it.

    The moments are spread evenly over the run: a later one takes the place of an earlier one less often.

    Args:
        seed: the seed of the schedule, and of the moments.
        folder: everything that the program keeps.
        crashes: how many moments.

    Attributes:
        left: the copies, with the number of the step that each was made before.
    """

    def __init__(self, seed: int, folder: Path, crashes: int) -> None:
        super().__init__(seed)
        self.left: dict[int, tuple[int, Path]] = {}
        self._folder = folder
        self._crashes = crashes
        self._moments = random.Random(f"moments {seed}")
        self._turn_number = 0

    def turn(self, supervisor: Supervisor) -> None:
        """Copy the folder if this is one of the moments, and take the turn."""
        place = self._moments.randrange(self._turn_number + 1)
        if place < self._crashes:
            copy = self._folder.with_name(f"{self._folder.name}-{place}")
            shutil.rmtree(copy, ignore_errors=True)
            shutil.copytree(self._folder, copy)
            self.left[place] = self._turn_number, copy
        self._turn_number += 1
        super().turn(supervisor)


class Killed:
    """The jobs of one program in one folder, of which each is killed at the moments of one seed."""

    def __init__(self, seed: int, folder: Path, crashes: int) -> None:
        self.seed = seed
        self.folder = folder
        self.crashes = crashes
        self.backends: list[CrashingBackend] = []

    def backend(self) -> CrashingBackend:
        """Return the backend of the program's next job."""
        # The next job of the program finds what the one before has left, so their moments are kept apart.
        number = len(self.backends)
        backend = CrashingBackend(self.seed + number, self.folder, self.crashes if number == 0 else 0)
        self.backends.append(backend)
        return backend

    @property
    def left(self) -> list[tuple[int, Path]]:
        """What kills have left of the first job: the step, and the folder."""
        return [*self.backends[0].left.values()] if self.backends else []


def crash_anywhere(program: Callable[[Callable[[], Backend], Path], object], seed: int, crashes: int) -> None:
    """Run a program on one schedule without a kill, and with some; each that was killed is killed once more.

    Raises:
        AssertionError: a run after a kill did not give what the one without gave.
    """
    with tempfile.TemporaryDirectory(prefix="crash-", dir=MEMORY if MEMORY.is_dir() else None) as name:
        wanted = program(partial(StepBackend, seed), _made(name, "undisturbed"))
        first = Killed(seed, _made(name, "killed"), crashes)
        _compare(program(first.backend, first.folder), wanted, "although it was not killed")
        for step, folder in first.left:
            second = Killed(seed + 1, folder, 1)
            told = f"when it was killed before step {step}"
            _compare(program(second.backend, folder), wanted, told)
            for later, rest in second.left:
                told = f"when it was killed before step {step}, and then before step {later}"
                _compare(program(partial(StepBackend, seed + 2), rest), wanted, told)


def _made(parent: str, name: str) -> Path:
    folder = Path(parent, name)
    folder.mkdir()
    return folder


def _compare(came: object, wanted: object, when: str) -> None:
    if came != wanted:
        raise AssertionError(f"the program gave {short(came)} instead of {short(wanted)} {when}")
