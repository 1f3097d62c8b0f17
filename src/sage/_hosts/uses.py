"""Who uses a service beside its calls: whoever reads an attribute, or waits until it is there."""

from __future__ import annotations

from contextlib import contextmanager
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator
    from threading import Condition


class Uses:
    """Counts such uses, so that a service does not rest during one.

    Attributes:
        count: how many have begun.
        running: how many have not ended.

    Args:
        lock: guards the counts; whoever holds it sees no use begin or end.
    """

    def __init__(self, lock: Condition) -> None:
        self.count = self.running = 0
        self._lock = lock

    @contextmanager
    def one(self) -> Iterator[None]:
        """Count a use until the block ends."""
        with self._lock:
            self.count += 1
            self.running += 1
        try:
            yield
        finally:
            with self._lock:
                self.running -= 1
