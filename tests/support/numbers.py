"""A source with positions, and the lines that a durable job has written."""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING, Any

from sage import Source

if TYPE_CHECKING:
    from pathlib import Path

COUNT = 12


class Numbers(Source[int]):
    """Gives 1 to `COUNT`, one at a time."""

    def open(self, position: Any = None) -> None:
        """Go on after a position."""
        self.at = position or 0

    def read(self, records_max: int) -> list[int] | None:
        """Return the next number."""
        if self.at == COUNT:
            return None
        self.at += 1
        return [self.at]

    def position(self) -> int:
        """Return the last number."""
        return self.at


def lines(folder: Path) -> Counter[str]:
    """Return the lines of all files in its folder `out`."""
    return Counter(line for path in folder.glob("out/*") for line in path.read_text("utf-8").splitlines())
