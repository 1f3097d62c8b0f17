"""The contract of an operator that holds records for longer than a step."""

from __future__ import annotations

from typing import TYPE_CHECKING

from sage._operators.operator import Operator

if TYPE_CHECKING:
    from sage.records import Batch


class BufferingOperator(Operator):
    """Takes records in, and hands their results on later; it is the first operator of its task.

    The task calls `take` with batches while `has_room`, and `hand_on` in every step. It is idle when there was nothing
    to do in either, until something arrives, `wake` is called or `due` has come. Held records count as in flight. A
    task that ends early calls `drop`, and closes the function once the operator `is_quiet`.
    """

    @property
    def has_room(self) -> bool:
        """Whether the operator takes another batch, of any size."""
        raise NotImplementedError

    def take(self, batch: Batch) -> None:
        """Take records in; no user code is called."""
        raise NotImplementedError

    def hand_on(self, *, is_all: bool, has_ended: bool) -> Batch | None:
        """Return the results that can go on now, or None without any; a failure is left in `failure`.

        Args:
            is_all: whether nothing more can be taken in at this moment.
            has_ended: whether nothing more follows at all.
        """
        raise NotImplementedError

    def give_back(self) -> int:
        """Forget the records whose call has not begun, and return how many those were."""
        raise NotImplementedError

    @property
    def calls_running(self) -> int:
        """How many calls run between steps."""
        return 0
