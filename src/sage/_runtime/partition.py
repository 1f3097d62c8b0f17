"""Which task gets a record: a hash that is the same in every process, and the ways to split a batch."""

from __future__ import annotations

import datetime
import enum
import numbers
import pathlib
import uuid
import zlib
from dataclasses import fields, is_dataclass
from typing import TYPE_CHECKING, Any

from sage._plan.logical import Route
from sage.errors import FunctionError, describe, hint, short

if TYPE_CHECKING:
    from collections.abc import Iterator

    from sage.records import Batch

KNOWN_KEYS_MAX = 65_536
"""How many keys a partitioner remembers the task of."""


KEYS_HINT = "Use strings, numbers, tuples of them, enums, dates, UUIDs or frozen dataclasses as keys."


def stable_hash(key: Any) -> int:
    """Return a number that is the same for equal keys in every process and on every run, unlike `hash` of a string.

    Raises:
        TypeError: there is no such number for this type.
    """
    if isinstance(key, str):
        return zlib.crc32(key.encode("utf-8", "surrogatepass"))
    if key is None:
        return 0x9E3779B9
    if isinstance(key, numbers.Number):
        # Python hashes equal numbers of different types alike, and without the seed that it uses for strings.
        return hash(key) if key == key else 0
    if isinstance(key, bytes):
        return zlib.crc32(key)
    if isinstance(key, tuple):
        return _combine(map(stable_hash, key))
    if isinstance(key, frozenset):
        return _combine(sorted(map(stable_hash, key)))
    if isinstance(key, enum.Enum):
        return stable_hash(f"{type(key).__qualname__}.{key.name}")
    if isinstance(key, uuid.UUID):
        return stable_hash(key.int)
    if isinstance(key, datetime.datetime) and key.tzinfo is not None:
        return stable_hash(key.astimezone(datetime.UTC).isoformat())
    if isinstance(key, datetime.date | datetime.time):
        return stable_hash(key.isoformat())
    if isinstance(key, datetime.timedelta):
        return stable_hash((key.days, key.seconds, key.microseconds))
    if isinstance(key, pathlib.PurePath):
        return stable_hash(str(key))
    if is_dataclass(key) and not isinstance(key, type) and type(key).__hash__ is not None:
        return stable_hash((type(key).__qualname__, *(getattr(key, field.name) for field in fields(key))))
    raise hint(
        TypeError(f"key {short(key)} of type {type(key).__name__} has no hash that is the same in every process"),
        KEYS_HINT,
    )


def _combine(hashes: Any) -> int:
    return zlib.crc32(b",".join(b"%d" % (number & 0xFFFFFFFFFFFFFFFF) for number in hashes))


class Partitioner:
    """Splits the batches of one producer over the parallel tasks of a consumer."""

    def __init__(self, route: Route, index: int, targets: int, operator: str) -> None:
        self._route = route
        self._index = index
        self._targets = targets
        self._operator = operator
        self._next = index % targets
        self._known: dict[Any, int] = {}

    @property
    def copies(self) -> int:
        """How many tasks get each record."""
        return self._targets if self._route is Route.BROADCAST else 1

    def split(self, batch: Batch) -> Iterator[tuple[int, Batch]]:
        """Yield the parts of a batch with the task that each belongs to."""
        if self._targets == 1:
            yield 0, batch
        elif self._route is Route.FORWARD:
            yield self._index % self._targets, batch
        elif self._route is Route.BROADCAST:
            yield from ((target, batch) for target in range(self._targets))
        elif self._route is Route.HASH and batch.keys is not None:
            yield from self._by_key(batch, batch.keys)
        else:
            yield from self._in_turn(batch)

    def _in_turn(self, batch: Batch) -> Iterator[tuple[int, Batch]]:
        first = self._next
        self._next = (first + len(batch)) % self._targets
        for offset in range(min(self._targets, len(batch))):
            yield (first + offset) % self._targets, batch.stride(offset, self._targets)

    def _by_key(self, batch: Batch, keys: list[Any]) -> Iterator[tuple[int, Batch]]:
        places: dict[int, list[int]] = {}
        known = self._known
        for place, key in enumerate(keys):
            try:
                target = known[key]
            except Exception:  # not known, or without a hash: what its own `__hash__` raises is told below
                target = self._target(key)
            places.setdefault(target, []).append(place)
        for target, picked in places.items():
            yield target, batch.pick(picked) if len(picked) < len(keys) else batch

    def _target(self, key: Any) -> int:
        try:
            target = stable_hash(key) % self._targets
            if len(self._known) >= KNOWN_KEYS_MAX:
                self._known.clear()
            self._known[key] = target
        except Exception as error:
            text = f'operator "{self._operator}" gave a key that cannot be used: {describe(error)}'
            blamed = FunctionError(text, operator=self._operator)
            raise hint(blamed, KEYS_HINT) from error
        return target
