"""The settings of a durable job, and how it begins."""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import TYPE_CHECKING

from sage._arguments import check_count, check_seconds
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
