"""The contract of an operator that holds records for longer than a step."""

from __future__ import annotations

from typing import TYPE_CHECKING

from sage._operators.operator import Operator

if TYPE_CHECKING:
    from collections.abc import Callable

    from sage._operators.operator import Surroundings
    from sage._plan.logical import Node
    from sage.records import Batch


class Holder(Operator):
    """Takes records in, and hands their results on later; it is the first operator of its task.

    The task calls `take` with batches while `has_room`, and `hand_on` in every step. It is idle when there was nothing
    to do in either, until something arrives, `wake` is called or `due` has come. What is held counts as in flight. A
    task that ends early calls `drop`, and closes the function once the operator `is_quiet`.

    Attributes:
        wake: makes the task step again; any thread may call it.
        held: how many records were taken in and not handed on.
        due: when there may be something to hand on although nobody wakes the task, on the backend's clock, or None.
        is_quiet: whether nothing of the user's runs for the operator between steps.
    """

    def __init__(self, node: Node, surroundings: Surroundings) -> None:
        super().__init__(node, surroundings)
        self.wake: Callable[[], None] = lambda: None
        self.held = 0
        self.due: float | None = None
        self.is_quiet = True

    @property
    def has_room(self) -> bool:
        """Whether the operator takes another batch, of whatever size."""
        raise NotImplementedError

    def take(self, batch: Batch) -> None:
        """Take records in; no user code is called."""
        raise NotImplementedError

    def hand_on(self, *, is_all: bool, has_ended: bool) -> Batch | None:
        """Return what can go on now, or None if that is nothing; a failure is left in `failure`.

        Args:
            is_all: whether nothing more can be taken in at this moment.
            has_ended: whether nothing more follows at all.
        """
        raise NotImplementedError

    def drop(self) -> int:
        """Forget what is held, cancel what runs, and return how many records that were."""
        raise NotImplementedError

    def where(self) -> str:
        """Return where what runs for the operator stands, for a person."""
        return ""
