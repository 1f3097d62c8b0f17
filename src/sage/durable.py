"""The settings of a durable job, and how it begins."""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import TYPE_CHECKING

from sage._arguments import check_backoff, check_count, check_seconds
from sage.errors import GraphError, hint, short

if TYPE_CHECKING:
    from collections.abc import Iterable

RESUME_VARIABLE = "SAGE_RESUME"
"""Set by `sage run --fresh`: how durable jobs begin whose program does not say."""


@dataclass(frozen=True, slots=True)
class Durable:
    """Where a job keeps its checkpoints, and how often it makes one.

    Attributes:
        folder: the folder of the checkpoints, of one program alone; made if it is not there.
        interval_s: the time between two checkpoints, in seconds. After a kill, calls since the last one are made again.
        keep: how many checkpoints are kept; if the last one is damaged, the one before it is used.
    """

    folder: str | os.PathLike[str]
    interval_s: float = 5.0
    keep: int = 3

    def __post_init__(self) -> None:
        """Refuse values that cannot work, naming the setting."""
        folder: object = self.folder
        if not isinstance(folder, str | os.PathLike) or not os.fspath(folder):
            raise hint(TypeError(f"durable: folder is {short(folder)}"), 'Give a folder: durable="state".')
        check_seconds("durable: interval_s is", self.interval_s, may_be_zero=False)
        check_count("durable: keep is", self.keep)


@dataclass(frozen=True, slots=True)
class Restart:
    """How a durable job starts its tasks again within the run after one has failed: from the last checkpoint.

    Attributes:
        restarts_max: how many restarts are allowed within `restart_window_s` seconds; the next failure fails the job.
        restart_window_s: how long a restart counts, in seconds.
        backoff_s: first and longest pause before a restart, in seconds; it doubles with each that counts.
    """

    restarts_max: int = 3
    restart_window_s: float = 60.0
    backoff_s: tuple[float, float] = (0.1, 10.0)

    def __post_init__(self) -> None:
        """Refuse values that cannot work."""
        check_count("Restart: restarts_max is", self.restarts_max)
        check_seconds("Restart: restart_window_s is", self.restart_window_s, may_be_zero=False)
        check_backoff("Restart: backoff_s is", self.backoff_s)

    def pause_s(self, count: int) -> float:
        """Return the pause before a restart, in seconds; `count` others still count."""
        first, longest = self.backoff_s
        return min(first * 2.0 ** min(count, 64), longest)  # a larger power overflows


def check_restarts(environment: str, restarts: object, *, is_durable: bool) -> None:
    """Refuse anything but a `Restart` for a durable job.

    Raises:
        GraphError: it is something else, or the environment is not durable.
    """
    if restarts is not None and not isinstance(restarts, Restart):
        raise hint(GraphError(f"submit: restarts is {short(restarts)}"), "Give Restart(restarts_max=3).")
    if restarts is not None and not is_durable:
        error = GraphError(f'environment "{environment}" is not durable, and restarts is {short(restarts)}')
        raise hint(error, 'Tasks start again from a checkpoint: LocalEnvironment(..., durable="state").')


def begins_as(
    environment: str, resume: str, drop_state: Iterable[str], *, is_durable: bool
) -> tuple[str, tuple[str, ...]]:
    """Return how a job begins, and the operators whose state it does not take from its last checkpoint.

    Raises:
        GraphError: a value can never work, or the environment is not durable and has one.
    """
    if resume not in ("auto", "never", "must"):
        raise hint(GraphError(f"submit: resume is {short(resume)}"), 'It is "auto", "never" or "must".')
    if resume != "auto" and not is_durable:
        error = GraphError(f'environment "{environment}" is not durable, and resume is {resume!r}')
        raise hint(error, 'Give it a folder for checkpoints: LocalEnvironment(..., durable="state").')
    if not isinstance(drop_state, list | tuple | set | frozenset) or not all(
        isinstance(one, str) for one in drop_state
    ):
        error = GraphError(f"submit: drop_state is {short(drop_state)}")
        raise hint(error, 'Give a list with names of operators: drop_state=["totals"].')
    if drop_state and not is_durable:
        error = GraphError(f'environment "{environment}" is not durable, and drop_state is {short(drop_state)}')
        raise hint(error, "Only a durable job has states in checkpoints.")
    return os.environ.get(RESUME_VARIABLE, "auto") if resume == "auto" else resume, tuple(drop_state)
