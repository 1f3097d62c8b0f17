"""States of keys: class attributes of a function, of which each key has its own."""

from __future__ import annotations

from collections import deque
from collections.abc import MutableMapping, MutableSequence
from copy import copy, deepcopy
from enum import Enum
from typing import TYPE_CHECKING, Any, Generic, NamedTuple, Protocol, overload

from sage._arguments import check_seconds, copy_of_initial
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


class Removed(Enum):
    """Stands for the value of a key that is taken out; a checkpoint writes it, and after that the key is gone."""

    REMOVED = "removed"


class Dated(NamedTuple):
    """A value of a state with `ttl_s`.

    Attributes:
        value: the value itself.
        written_at: when it was written, in seconds since the epoch.
    """

    value: Any
    written_at: float


class Values(Protocol):
    """The values of all states of a function, by the name of the state and the key.

    Attributes:
        young: the values that were used since the last checkpoint; without checkpoints, all of them.
        old: further values, which those in `young` replace.
    """

    young: dict[object, object]
    old: dict[object, object]

    def remove(self, place: object) -> None:
        """Remove a value."""


class ValuesInMemory:
    """The values in a job that is not durable."""

    def __init__(self) -> None:
        self.young: dict[object, object] = {}
        self.old: dict[object, object] = {}

    def remove(self, place: object) -> None:
        """Remove a value."""
        self.young.pop(place, None)


class Expiry:
    """Ends the values of one state that have not been written for `ttl_s` seconds.

    A value that has ended is never seen again. It is removed from memory a little later, so that nothing ever walks
    through all keys: each value is in a queue once, with the time of its first write. If it was written again
    meanwhile, it goes back to the end of the queue, so it is removed before twice the time is over.

    Args:
        name: the name of the state.
        ttl_s: how long a value lasts after it was last written, in seconds.
        values: the values of all states of the function.
        now: the time in seconds since the epoch, which never goes back. Values from a later time were written by an
            earlier run with another clock. They count as written now, as do those from before the state had a `ttl_s`.
    """

    def __init__(self, name: str, ttl_s: float, values: Values, now: Callable[[], float]) -> None:
        self._ttl_s = ttl_s
        self._values = values
        self._now = now
        self._at = now()
        found: list[tuple[float, object]] = []
        for place, value in values_of(name, values):
            dated = value if isinstance(value, Dated) else Dated(value, self._at)
            values.old[place] = dated = dated._replace(written_at=min(dated.written_at, self._at))
            found.append((dated.written_at, place))
        self._queue = deque(sorted(found, key=lambda entry: entry[0]))

    def go_on(self, values_max: int) -> None:
        """Move the time on, and remove at most so many values that have ended.

        A function sees one time while it works on a record: a value does not end between two looks.
        """
        self._at = self._now()
        ended_at = self._at - self._ttl_s
        while values_max and self._queue and self._queue[0][0] <= ended_at:
            values_max -= 1
            _, place = self._queue.popleft()
            found = self._find(place)
            assert found is not None
            if found.written_at <= ended_at:
                self._values.remove(place)
            else:
                self._queue.append((found.written_at, place))

    def read(self, place: object, default: T) -> T:
        """Return the value at a place, which may be changed in place, or write a copy of the default and return it."""
        found = self._find(place)
        if found is None or found.written_at <= self._at - self._ttl_s:
            value = deepcopy(default)
            self.write(place, value)
        else:
            self._values.young[place] = found
            value = found.value
        return value

    def write(self, place: object, value: object) -> None:
        """Put a value at a place."""
        now = self._now()
        if self._find(place) is None:
            self._queue.append((now, place))
        self._values.young[place] = Dated(value, now)

    def _find(self, place: object) -> Dated | None:
        """Return the value at a place, or None; it may have ended."""
        young = self._values.young
        found = young[place] if place in young else self._values.old.get(place)
        return found if isinstance(found, Dated) else None


def values_of(name: str, values: Values) -> list[tuple[object, object]]:
    """Return the values of one state that were there at the last checkpoint, each with its place."""
    return [(place, value) for place, value in values.old.items() if isinstance(place, tuple) and place[0] == name]


class KeyState(Generic[T]):
    """What all states of keys have in common."""

    def __init__(self, default: T, ttl_s: float | None = None) -> None:
        label = type(self).__name__
        self._default = copy_of_initial(f"{label}: default", default)
        self._ttl_s = None if ttl_s is None else check_seconds(f"{label}: ttl_s is", ttl_s, may_be_zero=False)
        self._name = ""
        self._young: dict[object, Any] = {}
        self._old: dict[object, Any] = {}
        self._expiry: Expiry | None = None
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

    def bind(self, function: object, values: Values, context: HasKey, now: Callable[[], float]) -> Expiry | None:
        """Give one instance of the function class its states, by name and key.

        Args:
            function: the instance.
            values: those of all its states.
            context: tells the key.
            now: see `Expiry`.

        Returns:
            The end of its values, which somebody has to move on, or None if they last forever.
        """
        bound = copy(self)
        bound._young, bound._old, bound._context = values.young, values.old, context
        if self._ttl_s is None:
            for place, value in values_of(self._name, values):
                if isinstance(value, Dated):  # the state had a `ttl_s` in an earlier run
                    values.old[place] = value.value
        else:
            bound._expiry = Expiry(self._name, self._ttl_s, values, now)
        vars(function)[self._name] = bound
        return bound._expiry

    def _of_key(self, *, to_write: bool = False) -> T:
        """Return the value of the key in hand, which counts as changed, since the caller may change it in place.

        Args:
            to_write: whether the caller is about to do so.
        """
        place = (self._name, self._context.key)
        if self._expiry is not None:
            lasting = self._expiry.read(place, self._default)
            if to_write:
                self._expiry.write(place, lasting)
            return lasting
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
        ttl_s: how many seconds the value of a key lasts after it was last assigned; then the key begins anew. A list or
            another object in it that you change in place has to be assigned again to last longer.

    >>> from sage import ProcessFunction
    >>> class Sessions(ProcessFunction):
    ...     count = ValueState(0)
    """

    @property
    def value(self) -> T:
        """The value of the key."""
        if self._expiry is not None:
            return self._of_key()
        try:
            value: T = self._young[self._name, self._context.key]
        except KeyError:
            return self._of_key()
        return value

    @value.setter
    def value(self, value: T) -> None:
        if self._expiry is None:
            self._young[self._name, self._context.key] = value
        else:
            self._expiry.write((self._name, self._context.key), value)


class ListState(KeyState[list[T]], MutableSequence[T]):
    """A list for each key, with the methods of a list; see `ValueState`.

    Args:
        ttl_s: how many seconds the list of a key lasts after a method last changed it.
    """

    def __init__(self, ttl_s: float | None = None) -> None:
        super().__init__([], ttl_s)

    @overload
    def __getitem__(self, place: int) -> T: ...
    @overload
    def __getitem__(self, place: slice) -> list[T]: ...
    def __getitem__(self, place: int | slice) -> T | list[T]:
        return self._of_key()[place]

    def __setitem__(self, place: Any, value: Any) -> None:
        self._of_key(to_write=True)[place] = value

    def __delitem__(self, place: int | slice) -> None:
        del self._of_key(to_write=True)[place]

    def __len__(self) -> int:
        return len(self._of_key())

    def __iter__(self) -> Iterator[T]:
        return iter(self._of_key())

    def insert(self, place: int, value: T) -> None:
        """Insert a value before a place."""
        self._of_key(to_write=True).insert(place, value)

    def append(self, value: T) -> None:
        """Add a value at the end."""
        self._of_key(to_write=True).append(value)

    def extend(self, values: Iterable[T]) -> None:
        """Add values at the end."""
        self._of_key(to_write=True).extend(values)

    def sort(self, *, key: Callable[[T], SupportsRichComparison] | None = None, reverse: bool = False) -> None:
        """Sort the values as `list.sort` does."""
        values: list[Any] = self._of_key(to_write=True)
        values.sort(key=key, reverse=reverse)

    def copy(self) -> list[T]:
        """Return a list of the values."""
        return self._of_key().copy()

    def clear(self) -> None:
        """Remove all values."""
        self._of_key(to_write=True).clear()


class MapState(KeyState[dict[K, V]], MutableMapping[K, V]):
    """A dict for each key, with the methods of a dict; see `ValueState`.

    Args:
        ttl_s: how many seconds the whole dict of a key lasts after a method last changed it.
    """

    def __init__(self, ttl_s: float | None = None) -> None:
        super().__init__({}, ttl_s)

    def __getitem__(self, name: K) -> V:
        return self._of_key()[name]

    def __setitem__(self, name: K, value: V) -> None:
        self._of_key(to_write=True)[name] = value

    def __delitem__(self, name: K) -> None:
        del self._of_key(to_write=True)[name]

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
