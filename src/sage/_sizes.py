"""How many bytes records take in memory, estimated by looking at a few of them; nothing is pickled or copied."""

from __future__ import annotations

from collections import deque
from itertools import islice
from sys import getsizeof
from types import BuiltinFunctionType, FunctionType, MemberDescriptorType, MethodType, ModuleType
from typing import TYPE_CHECKING
from weakref import WeakKeyDictionary

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

RECORDS_SEEN = 4
"""How many records of a batch are looked at; the others are taken for as large as these on average."""

ELEMENTS_SEEN = 16
"""How many elements of a longer container are looked at."""

OBJECTS_SEEN = 64
"""How many objects are looked at for one record, so that a deep one costs no more than tens of microseconds."""

_SMALL = frozenset({type(None), bool, int, float})
_FLAT = frozenset({*_SMALL, complex, str, bytes, bytearray})
_CODE = (type, ModuleType, FunctionType, BuiltinFunctionType, MethodType)


def size_of(record: object) -> int:
    """Return about how many bytes a record takes, with all that it refers to.

    An object that is met twice in a record counts once. Arrays and tensors, which have `nbytes`, count those. Of a long
    container, some elements are looked at. Classes, modules and functions belong to the program and count as nothing.
    """
    kind = type(record)
    if kind in _FLAT:
        return getsizeof(record)
    try:
        return _Measure().of(record)
    except Exception:  # a class of the user's may fail at anything, and a size is not worth the record
        return _own_size(record)


def size_of_all(records: Sequence[object]) -> int:
    """Return about how many bytes the records of a batch take, from the sizes of a few that are spread over it."""
    count = len(records)
    if count <= RECORDS_SEEN:
        return sum(map(size_of, records))
    step = (count - 1) // (RECORDS_SEEN - 1)
    seen = sum(size_of(records[place]) for place in range(0, step * RECORDS_SEEN, step))
    return seen * count // RECORDS_SEEN


class _Measure:
    """The measurement of one record."""

    __slots__ = ("_left", "_seen")

    def __init__(self) -> None:
        self._seen: set[int] = set()
        self._left = OBJECTS_SEEN

    def of(self, value: object) -> int:
        kind = type(value)
        if kind in _SMALL:
            return getsizeof(value)
        if id(value) in self._seen or (kind not in _FLAT and isinstance(value, _CODE)):
            return 0
        self._seen.add(id(value))
        self._left -= 1
        own = _own_size(value)
        if kind in _FLAT or self._left <= 0:
            return own
        # Asked of the class, as an object's own `__getattr__` may do anything.
        if hasattr(kind, "nbytes"):
            return max(own, int(getattr(value, "nbytes", 0)))
        if isinstance(value, dict):
            return own + self._some(value.keys(), len(value)) + self._some(value.values(), len(value))
        if isinstance(value, list | tuple):
            return own + self._spread(value) + self._attributes(value)
        if isinstance(value, set | frozenset | deque):
            return own + self._some(value, len(value)) + self._attributes(value)
        return own + (_pixels(value) or self._attributes(value))

    def _spread(self, values: Sequence[object]) -> int:
        count = len(values)
        if count <= ELEMENTS_SEEN:
            return sum(map(self.of, values))
        step = count // ELEMENTS_SEEN
        return sum(self.of(values[place]) for place in range(0, step * ELEMENTS_SEEN, step)) * count // ELEMENTS_SEEN

    def _some(self, values: Iterable[object], count: int) -> int:
        if count <= ELEMENTS_SEEN:
            return sum(map(self.of, values))
        return sum(map(self.of, islice(values, ELEMENTS_SEEN))) * count // ELEMENTS_SEEN

    def _attributes(self, value: object) -> int:
        """Return the size of the attributes of an object of a class."""
        kind = type(value)
        size = self.of(value.__dict__) if kind.__dictoffset__ else 0
        slots = _SLOTS.get(kind)
        if slots is None:
            slots = _SLOTS[kind] = _slots_of(kind)
        for slot in slots:
            try:
                size += self.of(slot.__get__(value, kind))
            except AttributeError:  # it has no value
                continue
        return size


_SLOTS: WeakKeyDictionary[type, tuple[MemberDescriptorType, ...]] = WeakKeyDictionary()
"""The slots of the classes that were met."""


def _slots_of(kind: type) -> tuple[MemberDescriptorType, ...]:
    slotted = (vars(one) for one in kind.__mro__[:-1] if "__slots__" in vars(one))
    return tuple(slot for names in slotted for slot in names.values() if isinstance(slot, MemberDescriptorType))


def _own_size(value: object) -> int:
    try:
        return getsizeof(value)
    except Exception:  # its own `__sizeof__` is wrong, or it stands for an object that is gone
        return 0


def _pixels(value: object) -> int:
    """Return the bytes of an image, which keeps them where Python does not see them, or 0."""
    if not hasattr(type(value), "getbands"):
        return 0
    width, height = getattr(value, "size", (0, 0))
    return int(width) * int(height) * len(getattr(value, "getbands", tuple)())
