"""The settings of a durable job."""

from __future__ import annotations

import os
from dataclasses import dataclass

from sage._arguments import check_count, check_seconds
from sage.errors import hint, short


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
