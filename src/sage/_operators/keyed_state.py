"""Keeps the value of each key in a task of a durable job, and picks the ones that a checkpoint writes."""

from __future__ import annotations

import pickle
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

Changes = tuple[list[object], list[object], list[object]]
"""Keys, their values, and those of the keys whose value was handed on at the end of a run."""

SWEEP_MIN = 1_000
"""How many unchanged keys a checkpoint writes at least, if there are so many."""

SWEEP_FACTOR = 2
"""How many unchanged keys a checkpoint writes for each that changed."""


class KeyedState:
    """The values by key, of which a checkpoint writes those that changed, and some of the others.

    The others are taken in turn. Once all keys that were there when such a sweep began have been written, the
    checkpoints before it are no longer needed. So a checkpoint costs as much as the keys that changed, and everything
    that is kept takes at most a few times the space of the values.

    Attributes:
        young: the values that were set since the last checkpoint. Nothing else has to be noted about a change.
        old: the values before it, of which those in `young` no longer count.
    """

    __slots__ = ("_began", "_settled", "_since", "_sweep", "_to_write", "old", "young")

    def __init__(self, since: int | None = None, changes: Iterable[Changes] = ()) -> None:
        """Load the changes of checkpoints, the oldest first, whose number is `since`."""
        self.young: dict[object, object] = {}
        self.old: dict[object, object] = {}
        self._to_write: dict[object, None] = {}
        self._settled: set[object] = set()
        self._since = since
        self._began = 0
        self._sweep: Iterator[object] | None = None
        for keys, values, settled in changes:
            self.old.update(zip(keys, values, strict=True))
            self._settled.difference_update(keys)
            self._settled.update(settled)

    def unsettled(self) -> Iterator[tuple[object, object]]:
        """Return the keys and values that were set since `settle`, also in an earlier run."""
        self._grow_old()
        return (item for item in self.old.items() if item[0] not in self._settled)

    def settle(self) -> None:
        """Remember that all values have been handed on."""
        self._grow_old()
        self._to_write.update((key, None) for key in self.old if key not in self._settled)
        self._settled = set(self.old)

    def take(self, number: int) -> tuple[int, bytes]:
        """Return the number of the oldest checkpoint that is still needed, and the changes for `number`, pickled."""
        self._grow_old()
        due, self._to_write = self._to_write, {}
        keys = list(due)
        if len(due) == len(self.old):
            self._sweep, self._since = None, number
        else:
            self._add_others(keys, due, number)
        settled = [key for key in keys if key in self._settled] if self._settled else []
        values = [self.old[key] for key in keys]
        assert self._since is not None  # the first checkpoint writes everything
        return self._since, pickle.dumps((keys, values, settled), pickle.HIGHEST_PROTOCOL)

    def _add_others(self, keys: list[object], due: dict[object, None], number: int) -> None:
        """Add the next keys that have not changed."""
        room = max(SWEEP_MIN, SWEEP_FACTOR * len(due))
        if self._sweep is None:
            self._sweep, self._began = iter(list(self.old)), number
        for key in self._sweep:
            if key not in due:
                keys.append(key)
                room -= 1
                if not room:
                    return
        self._sweep, self._since = None, self._began

    def _grow_old(self) -> None:
        """Let the values that were set be written, and not be settled any more."""
        self._to_write |= dict.fromkeys(self.young)
        self._settled.difference_update(self.young)
        self.old |= self.young
        self.young.clear()
