"""Runs a durable job on one schedule, kills it at random steps, and runs it again from what each kill has left."""

from __future__ import annotations

import random
import shutil
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

from sage.errors import hint, short

if TYPE_CHECKING:
    from collections.abc import Callable

    from sage._runtime.backend import Backend

    Program = Callable[[Callable[[], Backend], Path], object]
    BackendOf = Callable[[int, Callable[[], None]], Backend]
    """Returns the backend for a seed; it calls the function before each step."""


class Kills:
    """Copies a folder before some of the steps of a job, as a kill at that moment would leave it.

    The moments are spread evenly over the run: a later one takes the place of an earlier one less often.

    Args:
        seed: the seed of the moments.
        folder: everything that the program keeps.
        count: how many moments.

    Attributes:
        left: the number of the step that each copy was made before, and the copy.
    """

    def __init__(self, seed: int, folder: Path, count: int) -> None:
        self.left: dict[int, tuple[int, Path]] = {}
        self._folder = folder
        self._count = count
        self._moments = random.Random(f"moments {seed}")
        self._steps = 0

    def step(self) -> None:
        """Copy the folder if this is one of the moments."""
        place = self._moments.randrange(self._steps + 1)
        if place < self._count:
            copy = self._folder.with_name(f"{self._folder.name}-{place}")
            shutil.rmtree(copy, ignore_errors=True)
            shutil.copytree(self._folder, copy)
            self.left[place] = self._steps, copy
        self._steps += 1


def crash_anywhere(program: Program, backend_of: BackendOf, seed: int, crashes: int) -> None:
    """Run a program on one schedule without a kill, and with some; each that was killed is killed once more.

    Raises:
        AssertionError: a run after a kill did not give what the one without gave.
        TypeError: the program gives nothing to compare.
    """

    def came(seed: int, folder: Path, kills: Kills) -> object:
        return program(lambda: backend_of(seed, kills.step), folder)

    with tempfile.TemporaryDirectory(prefix="crash-") as name:
        folder = Path(name, "job")
        folder.mkdir()
        first = Kills(seed, folder, crashes)
        wanted = came(seed, folder, first)
        if wanted is None:
            error = TypeError("simulate: the program returns None, so its runs cannot be compared")
            raise hint(error, "Return what its sinks hold, such as a sorted list of the lines in the folder.")
        for step, left in first.left.values():
            second = Kills(seed + 1, left, 1)
            when = f"when it was killed before step {step}"
            _compare(came(seed + 1, left, second), wanted, when)
            for later, rest in second.left.values():
                when = f"when it was killed before step {step}, and then before step {later}"
                _compare(came(seed + 2, rest, Kills(seed, rest, 0)), wanted, when)


def _compare(came: object, wanted: object, when: str) -> None:
    if came != wanted:
        raise AssertionError(f"the program gave {short(came)} instead of {short(wanted)} {when}")
