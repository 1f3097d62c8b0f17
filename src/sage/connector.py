"""The contract of a source: how records enter a job."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import TYPE_CHECKING, Generic

from sage._types import T_co

if TYPE_CHECKING:
    from collections.abc import Sequence


class Source(ABC, Generic[T_co]):
    """Where records come from. One object serves one task; all its methods are called on that task's thread.

    The engine calls `open` once, then `read` again and again, then `close` once, also after a failure, a stop or a
    cancel. The implementer returns from `read` soon: a source that waits inside `read` keeps only its own task, but a
    stop waits for it until the time to drain is over.

    Attributes:
        bounded: whether the source ends by itself.
    """

    bounded: bool = True

    def open(self) -> None:
        """Acquire resources; called once before the first `read`."""

    @abstractmethod
    def read(self, records_max: int) -> Sequence[T_co] | None:
        """Return the next records.

        Args:
            records_max: how many records may be returned at most, at least 1.

        Returns:
            The records; an empty sequence when there is nothing now; None at the end, after which it is not called
            again.

        Raises:
            Exception: any; the operator's `on_error` decides. Records read before it must be returned
                first.
        """

    def close(self) -> None:
        """Release everything; called exactly once if `open` began."""
