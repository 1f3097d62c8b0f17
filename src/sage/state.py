"""States of keys: class attributes of a function, of which each key has its own."""

from __future__ import annotations

from collections.abc import MutableMapping, MutableSequence
from copy import copy, deepcopy
from typing import TYPE_CHECKING, Any, Generic, Protocol, overload

from sage._arguments import copy_of_initial
from sage._types import K, T, V
from sage.errors import hint

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator
    from typing import Self

    from _typeshed import SupportsRichComparison


class HasKey(Protocol):
    """Tells the key of the record in hand."""

    key: object


class NoKey:
    """Stands for the key while no record is in hand."""

    def __init__(self) -> None:
        self.key: object = self

    def __hash__(self) -> int:
        error = RuntimeError("a state of a key is used while no record is in hand")
        note = "It is a class attribute of a ProcessFunction or the like, and has a value only while execute() runs."
        raise hint(error, note)


NO_KEY = NoKey()


class KeyState(Generic[T]):
    """What all states of keys have in common."""

    def __init__(self, default: T) -> None:
        self._default = copy_of_initial(f"{type(self).__name__}: default", default)
        self._name = ""
        self._young: dict[object, Any] = {}
        self._old: dict[object, Any] = {}
        self._context: HasKey = NO_KEY

    def __set_name__(self, owner: type, name: str) -> None:
        self._name = name

    def __get__(self, function: object | None, owner: type | None = None) -> Self:
        try:
            state: Self = function.__dict__[self._name]
        except (KeyError, AttributeError):  # in a constructor, and for the class
            return self
        return state

    def __set__(self, function: object, value: Self) -> None:
        if value is not self.__get__(function):  # as after +=
            error = AttributeError(f'"{self._name}" of {type(function).__name__} is a state of each key')
            raise hint(error, "Change what it holds: a ValueState has the attribute value.")

    def bind(self, function: object, young: dict[object, Any], old: dict[object, Any], context: HasKey) -> None:
        """Give one instance of the function class its states, by name and key.

        Args:
            function: the instance.
            young: the values that were used since the last checkpoint.
            old: further values.
            context: tells the key.
        """
        bound = copy(self)
        bound._young, bound._old, bound._context = young, old, context
        vars(function)[self._name] = bound

    def _of_key(self) -> T:
        """Return the value of the key in hand; it counts as changed, since the caller may change it in place."""
        place = (self._name, self._context.key)
        if place in self._young:
            value: T = self._young[place]
            return value
        value = self._young[place] = self._old[place] if place in self._old else deepcopy(self._default)
        return value


class ValueState(KeyState[T]):
    """A value for each key: a class attribute of a `ProcessFunction` or another function class, on a keyed stream.

    `self.count.value` is the value of the record's key, in `execute` only. Each key begins with a copy of `default`.
    Durable jobs keep it; a record that fails leaves the changes that it made.

    Args:
        default: the value before the first change.

    >>> from sage import ProcessFunction
    >>> class Sessions(ProcessFunction):
    ...     count = ValueState(0)
    """

    @property
    def value(self) -> T:
        """The value of the key."""
        try:
            value: T = self._young[self._name, self._context.key]
        except KeyError:
            return self._of_key()
        return value

    @value.setter
    def value(self, value: T) -> None:
        self._young[self._name, self._context.key] = value


class ListState(KeyState[list[T]], MutableSequence[T]):
    """A list for each key, with the methods of a list; see `ValueState`."""

    def __init__(self) -> None:
        super().__init__([])

    @overload
    def __getitem__(self, place: int) -> T: ...
    @overload
    def __getitem__(self, place: slice) -> list[T]: ...
    def __getitem__(self, place: int | slice) -> T | list[T]:
        return self._of_key()[place]

    def __setitem__(self, place: Any, value: Any) -> None:
        self._of_key()[place] = value

    def __delitem__(self, place: int | slice) -> None:
        del self._of_key()[place]

    def __len__(self) -> int:
        return len(self._of_key())

    def __iter__(self) -> Iterator[T]:
        return iter(self._of_key())

    def insert(self, place: int, value: T) -> None:
        """Insert a value before a place."""
        self._of_key().insert(place, value)

    def append(self, value: T) -> None:
        """Add a value at the end."""
        self._of_key().append(value)

    def extend(self, values: Iterable[T]) -> None:
        """Add values at the end."""
        self._of_key().extend(values)

    def sort(self, *, key: Callable[[T], SupportsRichComparison] | None = None, reverse: bool = False) -> None:
        """Sort the values as `list.sort` does."""
        values: list[Any] = self._of_key()
        values.sort(key=key, reverse=reverse)

    def copy(self) -> list[T]:
        """Return a list of the values."""
        return self._of_key().copy()

    def clear(self) -> None:
        """Remove all values."""
        self._of_key().clear()


class MapState(KeyState[dict[K, V]], MutableMapping[K, V]):
    """A dict for each key, with the methods of a dict; see `ValueState`."""

    def __init__(self) -> None:
        super().__init__({})

    def __getitem__(self, name: K) -> V:
        return self._of_key()[name]

    def __setitem__(self, name: K, value: V) -> None:
        self._of_key()[name] = value

    def __delitem__(self, name: K) -> None:
        del self._of_key()[name]

    def __len__(self) -> int:
        return len(self._of_key())

    def __iter__(self) -> Iterator[K]:
        return iter(self._of_key())

    def copy(self) -> dict[K, V]:
        """Return a dict of the values."""
        return self._of_key().copy()


def states_of(owner: type) -> dict[str, KeyState]:
    """Return the states of keys that a function class declares, by their names."""
    attributes = {name: value for class_ in reversed(owner.__mro__) for name, value in vars(class_).items()}
    return {name: value for name, value in attributes.items() if isinstance(value, KeyState)}
