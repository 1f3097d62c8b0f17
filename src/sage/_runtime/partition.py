"""Which task gets a record: a hash that is the same in every process, and the ways to split a batch."""

from __future__ import annotations

import datetime
import enum
import numbers
import pathlib
import uuid
from dataclasses import fields, is_dataclass
from typing import TYPE_CHECKING, Any
from zlib import crc32

from sage._plan.logical import Route
from sage.errors import FunctionError, describe, hint, short
from sage.records import BATCH_RECORDS_MAX

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence

    from sage._runtime.channel import Channel, InFlight
    from sage.records import Batch

KNOWN_KEYS_MAX = 65_536
"""How many keys a partitioner remembers the task of."""


MASKS_MAX = 8
"""For more tasks, one look at each record costs less than one for each task."""

KEYS_HINT = "Use strings, numbers, tuples of them, enums, dates, UUIDs or frozen dataclasses as keys."


def stable_hash(key: object) -> int:
    """Return a number that is the same for equal keys in every process and on every run, unlike `hash` of a string.

    Raises:
        TypeError: the type does not have such a number.
    """
    if isinstance(key, str):
        return crc32(key.encode("utf-8", "surrogatepass"))
    if key is None:
        return 0x9E3779B9
    if isinstance(key, numbers.Number):
        # Python hashes equal numbers of different types alike, and without the seed that it uses for strings.
        return hash(key) if key == key else 0
    if isinstance(key, bytes):
        return crc32(key)
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
    if isinstance(key, datetime.time) and (offset := key.utcoffset()) is not None:
        since = datetime.timedelta(hours=key.hour, minutes=key.minute, seconds=key.second, microseconds=key.microsecond)
        return stable_hash(since - offset)
    if isinstance(key, datetime.date | datetime.time):
        return stable_hash(key.isoformat())
    if isinstance(key, datetime.timedelta):
        return stable_hash((key.days, key.seconds, key.microseconds))
    if isinstance(key, pathlib.PurePath):
        return stable_hash(str(key))
    if is_dataclass(key) and not isinstance(key, type) and type(key).__hash__ is not None:
        return stable_hash(
            (type(key).__qualname__, *(getattr(key, field.name) for field in fields(key) if field.compare))
        )
    if getattr(getattr(key, "dtype", None), "kind", "") == "b" and not getattr(key, "shape", True):
        return hash(bool(key))  # the truth values of numpy are the only ones of its scalars that are not numbers
    raise hint(
        TypeError(f"key {short(key)} of type {type(key).__name__} has no hash that is the same in every process"),
        KEYS_HINT,
    )


def _combine(hashes: Iterable[int]) -> int:
    return crc32(b",".join(b"%d" % (number & 0xFFFFFFFFFFFFFFFF) for number in hashes))


class Partitioner:
    """Splits the batches of one producer over the parallel tasks of a consumer."""

    def __init__(self, route: Route, index: int, targets: int, operator: str) -> None:
        self._route = route
        self._index = index
        self._targets = targets
        self._operator = operator
        self._next = index % targets
        self._known: dict[object, int] = {}

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

    def _by_key(self, batch: Batch, keys: Sequence[object]) -> Iterator[tuple[int, Batch]]:
        targets = self._targets_of(keys)
        present = dict.fromkeys(targets)  # in the order in which they come
        if len(present) == 1:
            yield targets[0], batch
        elif len(present) <= MASKS_MAX:
            for target in present:
                yield target, batch.select([one == target for one in targets])
        else:
            places: dict[int, list[int]] = {target: [] for target in present}
            for place, target in enumerate(targets):
                places[target].append(place)
            for target, picked in places.items():
                yield target, batch.pick(picked)

    def _targets_of(self, keys: Sequence[Any]) -> list[int]:
        """Return the task of each key.

        Strings and whole numbers are hashed about as fast as they are found among known ones.
        """
        count, known = self._targets, self._known
        types = set(map(type, keys))
        if types == {str}:
            return [crc32(key.encode("utf-8", "surrogatepass")) % count for key in keys]
        if types == {int}:
            return [hash(key) % count for key in keys]
        try:
            found = [known.get(key) for key in keys]
        except Exception:  # `_target` reports an error in the key's own `__hash__`
            found = [None] * len(keys)
        return [self._target(key) if target is None else target for key, target in zip(keys, found, strict=True)]

    def _target(self, key: object) -> int:
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


class Outlet:
    """Where the records of one operator go: the channels of one consumer.

    Attributes:
        partitioner: splits batches over the channels.
        channels: one for each task of the consumer that can be reached from here.
        port: the input of the consumer.
        feedback: whether the channels close a loop, and so take in every record.
        letters: whether dead letters travel here instead of records.
        enters: the counter of the loop that is entered here from outside; the end of the stream is counted off it.
        takes_whole: whether there is one channel, which takes a batch as it is: a stream may have hundreds of readers.
    """

    def __init__(
        self, partitioner: Partitioner, channels: tuple[Channel, ...], port: int, *, feedback: bool, letters: bool
    ) -> None:
        self.partitioner = partitioner
        self.channels = channels
        self.port = port
        self.feedback = feedback
        self.letters = letters
        self.enters: InFlight | None = None
        self.takes_whole = len(channels) == 1 and not channels[0].is_remote

    @property
    def portion(self) -> int:
        """How many records a batch for the consumer should have at most; feedback has no bound."""
        return BATCH_RECORDS_MAX if self.feedback else self.channels[0].portion * len(self.channels)


def count_copies(batch: Batch, outlets: list[Outlet]) -> None:
    """Tell the requests of records how many copies of each record travel on from here."""
    if batch.requests is not None:
        copies = sum(outlet.partitioner.copies for outlet in outlets)
        for request in filter(None, batch.requests if copies != 1 else ()):
            request.add(copies)
            request.drop()
