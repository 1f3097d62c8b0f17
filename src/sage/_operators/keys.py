"""Which keys make groups: those that are equal to themselves, as NaN is not."""

from __future__ import annotations

from dataclasses import fields, is_dataclass
from typing import TYPE_CHECKING

from sage.errors import hint, short

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable


class KeyKinds(frozenset[type]):
    """The types of keys that need no check; a look into a set is all that most keys cost."""

    @staticmethod
    def check(key: object) -> None:
        """Refuse a key that is not equal to itself.

        Raises:
            ValueError: it is not; every such key would be a group of its own, and never be found again.
        """
        if is_unequal(key):
            error = ValueError(f"the key {short(key)} is not equal to itself, or has a part that is not")
            raise hint(error, "Give None, or a text of your own, as the key of records with NaN.")


NEED_NO_CHECK = KeyKinds([str, int, bool, bytes, type(None)])


def is_unequal(key: object) -> bool:
    """Return whether a key, or a part of it, is not equal to itself."""
    if isinstance(key, tuple | frozenset):
        return any(map(is_unequal, key))
    if is_dataclass(key) and not isinstance(key, type):
        return any(is_unequal(getattr(key, field.name)) for field in fields(key) if field.compare)
    try:
        return bool(key != key)
    except (TypeError, ValueError, ArithmeticError):  # arrays, and a signalling NaN, cannot be compared
        return not hasattr(key, "__len__")


def into_keys(records: Iterable[object], function: Callable[..., object], out: list[object]) -> None:
    """Add the key of each record."""
    for value in records:
        key = function(value)
        if key.__class__ not in NEED_NO_CHECK:
            NEED_NO_CHECK.check(key)
        out.append(key)
