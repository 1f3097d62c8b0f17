"""Keeps the value of each key in a task of a durable job, and picks the ones that a checkpoint writes."""

from __future__ import annotations

import io
import pickle
import threading
from typing import TYPE_CHECKING, Any

from sage.state import Dated, Removed

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Iterable, Iterator

Changes = tuple[list[object], list[object], list[object]]
"""Keys, their values, and those of the keys whose value was handed on at the end of a run."""

SWEEP_MIN = 1_000
"""How many unchanged keys a checkpoint writes at least, if there are so many."""

SWEEP_FACTOR = 2
"""How many unchanged keys a checkpoint writes for each that changed."""


PLAIN = frozenset({int, float, bool, str, bytes, type(None), Removed})
"""The types of values that a function cannot change in place, so that they may be pickled while it goes on."""

PORTION_KEYS = 5_000
"""How many keys are pickled at a time; between two portions, other threads run."""


class LateChanges:
    """The changes for a checkpoint, which are pickled when somebody asks for them. Any thread may."""

    def __init__(self, pickled: Callable[[], tuple[int, bytes]]) -> None:
        self._pickled: Callable[[], tuple[int, bytes]] | None = pickled
        self._lock = threading.Lock()
        self._since = 0
        self._body = b""

    def since(self) -> int:
        """Return the number of the oldest checkpoint that is still needed, once everything is pickled."""
        with self._lock:
            if self._pickled is not None:
                self._since, self._body = self._pickled()
                self._pickled = None
        return self._since

    def take(self) -> tuple[int, bytes]:
        """Return that number and the changes, and forget these."""
        since = self.since()
        body, self._body = self._body, b""
        return since, body


class KeyedState:
    """The values by key, of which a checkpoint writes those that changed, and some of the others.

    The others are taken in turn. Once all keys that were there when such a sweep began have been written, the
    checkpoints before it are no longer needed. So a checkpoint costs as much as the keys that changed, and everything
    that is kept takes at most a few times the space of the values.

    Between two checkpoints, nothing in `old` changes, so plain values can be pickled in the background. Others are
    pickled at the barrier, as a function may change what it has got.

    Attributes:
        young: the values that were set since the last checkpoint. Nothing else has to be noted about a change. A key
            is taken out by the value `Removed.REMOVED`.
        old: the values before it, of which those in `young` no longer count.
    """

    __slots__ = (
        "_are_plain",
        "_began",
        "_late",
        "_removed",
        "_settled",
        "_since",
        "_sweep",
        "_to_write",
        "old",
        "young",
    )

    def __init__(self, since: int | None = None, changes: Iterable[Changes] = ()) -> None:
        """Load the changes of checkpoints, the oldest first, whose number is `since`."""
        self.young: dict[object, object] = {}
        self.old: dict[object, object] = {}
        self._to_write: list[object] = []
        self._settled: set[object] = set()
        self._removed: list[object] = []
        self._since = since
        self._began = 0
        self._sweep: Iterator[object] | None = None
        self._late: LateChanges | None = None
        for keys, values, settled in changes:
            self.old.update(zip(keys, values, strict=True))
            self._settled.difference_update(keys)
            self._settled.update(settled)
        kinds = _kinds(self.old.values())
        self._are_plain = kinds <= PLAIN
        if Removed in kinds:
            self.old = {key: value for key, value in self.old.items() if value is not Removed.REMOVED}
            self._settled.intersection_update(self.old)

    def __len__(self) -> int:
        """Return how many keys there are; those that were set since the last checkpoint count only from the next on."""
        return len(self.old) - len(self._removed)

    def remove(self, key: object) -> None:
        """Take a key out."""
        self.young[key] = Removed.REMOVED

    def unsettled(self) -> Iterator[tuple[object, object]]:
        """Return the keys and values that were set since `settle`, also in an earlier run."""
        self._grow_old()
        settled = self._settled
        return (item for item in self.old.items() if item[0] not in settled and item[1] is not Removed.REMOVED)

    def settle(self) -> None:
        """Remember that all values have been handed on."""
        self._grow_old()
        self._to_write += [key for key in self.old if key not in self._settled]
        self._settled = set(self.old)

    def take(self, number: int) -> LateChanges:
        """Return the changes for checkpoint `number`, which are pickled in the background if that is possible."""
        self._grow_old()
        due, self._to_write = self._to_write, []
        self._late = LateChanges(lambda: self._pickled(due, number))
        if not self._are_plain:
            self._late.since()
        return self._late

    def _pickled(self, changed: list[object], number: int) -> tuple[int, bytes]:
        """Return the number of the oldest checkpoint that is still needed, and the changes."""
        due = dict.fromkeys(changed)
        keys = list(due)
        if len(due) == len(self.old):
            self._sweep, self._since = None, number
        else:
            self._add_others(keys, due, number)
        assert self._since is not None  # the first checkpoint writes everything
        body = io.BytesIO()
        for first in range(0, len(keys) or 1, PORTION_KEYS):
            portion = keys[first : first + PORTION_KEYS]
            settled = [key for key in portion if key in self._settled] if self._settled else []
            values = [self.old[key] for key in portion]
            pickle.dump((portion, values, settled), body, pickle.HIGHEST_PROTOCOL)
        return self._since, body.getvalue()

    def _add_others(self, keys: list[object], due: dict[object, None], number: int) -> None:
        """Add the next keys that have not changed."""
        room = max(SWEEP_MIN, SWEEP_FACTOR * len(due))
        if self._sweep is None:
            self._sweep, self._began = iter(list(self.old)), number
        for key in self._sweep:
            if key not in due and key in self.old:
                keys.append(key)
                room -= 1
                if not room:
                    return
        self._sweep, self._since = None, self._began

    def _grow_old(self) -> None:
        """Let the values that were set be written, and not be settled any more."""
        if self._late is not None:
            self._late.since()  # it reads the old values
            self._late = None
            for key in self._removed:  # a checkpoint has it
                del self.old[key]
            self._settled.difference_update(self._removed)
            self._removed = []
        kinds = _kinds(self.young.values())
        self._are_plain = self._are_plain and kinds <= PLAIN
        self._to_write += self.young
        if self._settled:
            self._settled.difference_update(self.young)
        self.old |= self.young
        if Removed in kinds or self._removed:
            keys = dict.fromkeys([*self._removed, *self.young])
            self._removed = [key for key in keys if self.old[key] is Removed.REMOVED]
        self.young.clear()


def _kinds(values: Collection[object]) -> set[type]:
    """Return the types of values; a value with its time counts as the value."""
    kinds = set(map(type, values))
    if Dated in kinds:
        kinds = kinds - {Dated} | {type(value.value) for value in values if isinstance(value, Dated)}
    return kinds


def each_pickle(body: bytes, load: Callable[[io.BytesIO], object] = pickle.load) -> list[Any]:
    """Return all objects that were pickled one after the other."""
    file = io.BytesIO(body)
    found: list[Any] = []
    while file.tell() < len(body):
        found.append(load(file))
    return found
