"""Keys find the same task in every process, and batches are split without loss."""

from __future__ import annotations

import datetime
import decimal
import enum
import fractions
import os
import pathlib
import subprocess
import sys
import uuid
from dataclasses import dataclass
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sage._plan.logical import Route
from sage._runtime.partition import Partitioner, stable_hash
from sage.errors import FunctionError
from sage.records import Batch


class Colour(enum.Enum):
    RED = "r"
    BLUE = "b"


@dataclass(frozen=True)
class Point:
    x: int
    y: str


@dataclass
class Mutable:
    x: int


KEYS: list[Any] = [
    0,
    -1,
    2**80,
    True,
    1.5,
    2 + 1j,
    decimal.Decimal("0.1"),
    fractions.Fraction(1, 3),
    "",
    "a",
    "straße",
    "\ud800",
    b"",
    b"a",
    None,
    (),
    (1, "x"),
    ((1, None), "x"),
    frozenset({"a", "b", "c"}),
    Colour.RED,
    uuid.UUID(int=7),
    datetime.date(2025, 2, 28),
    datetime.datetime(2025, 2, 28, 12, 30),
    datetime.datetime(2025, 2, 28, 12, 30, tzinfo=datetime.UTC),
    datetime.time(1, 2, 3),
    datetime.timedelta(days=1, microseconds=5),
    pathlib.PurePosixPath("a/b"),
    Point(1, "x"),
]

IN_ANOTHER_PROCESS = """
import datetime, decimal, enum, fractions, pathlib, uuid
from dataclasses import dataclass
from sage._runtime.partition import stable_hash
class Colour(enum.Enum):
    RED = "r"
    BLUE = "b"
@dataclass(frozen=True)
class Point:
    x: int
    y: str
keys = [
    0, -1, 2**80, True, 1.5, 2 + 1j, decimal.Decimal("0.1"), fractions.Fraction(1, 3), "", "a", "stra\\u00dfe",
    "\\ud800", b"", b"a", None, (), (1, "x"), ((1, None), "x"), frozenset({"a", "b", "c"}), Colour.RED,
    uuid.UUID(int=7), datetime.date(2025, 2, 28), datetime.datetime(2025, 2, 28, 12, 30),
    datetime.datetime(2025, 2, 28, 12, 30, tzinfo=datetime.UTC), datetime.time(1, 2, 3),
    datetime.timedelta(days=1, microseconds=5), pathlib.PurePosixPath("a/b"), Point(1, "x"),
]
print([stable_hash(key) for key in keys])
"""


@pytest.mark.parametrize("seed", ["0", "1", "4711"])
def test_every_key_has_the_same_hash_in_every_process(seed: str) -> None:
    """The same key finds the same task on every run and in every process."""
    environment = {**os.environ, "PYTHONHASHSEED": seed, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    process = subprocess.run(
        [sys.executable, "-c", IN_ANOTHER_PROCESS], env=environment, capture_output=True, text=True, check=True
    )
    assert process.stdout.strip() == str([stable_hash(key) for key in KEYS])


@pytest.mark.parametrize(
    ("one", "other"),
    [
        (1, 1.0),
        (1, True),
        (0, -0.0),
        (0, False),
        (1, decimal.Decimal("1.00")),
        (0.5, fractions.Fraction(1, 2)),
        ((1, "x"), (1.0, "x")),
        (frozenset({"a", "b"}), frozenset({"b", "a"})),
        (Point(1, "x"), Point(1, "x")),
        (
            datetime.datetime(2025, 1, 1, 12, tzinfo=datetime.UTC),
            datetime.datetime(2025, 1, 1, 13, tzinfo=datetime.timezone(datetime.timedelta(hours=1))),
        ),
        (datetime.timedelta(hours=24), datetime.timedelta(days=1)),
    ],
)
def test_equal_keys_have_equal_hashes(one: object, other: object) -> None:
    """Keys that are equal in Python are one key."""
    assert one == other
    assert stable_hash(one) == stable_hash(other)


class Status(enum.StrEnum):
    OPEN = "open"


class Level(enum.IntEnum):
    HIGH = 3


class Corner(tuple[int, int]):
    """Stands for named tuples and the like."""


def test_subclasses_hash_like_what_they_are_equal_to() -> None:
    """A StrEnum equals its string, an IntEnum its number, and they are one key with it."""
    assert stable_hash(Status.OPEN) == stable_hash("open")
    assert stable_hash(Level.HIGH) == stable_hash(3)
    assert stable_hash(Corner((1, 2))) == stable_hash((1, 2))


def test_not_a_number_is_one_key() -> None:
    """NaN, which is not even equal to itself, always finds the same task."""
    assert stable_hash(float("nan")) == stable_hash(float("nan"))
    assert stable_hash((1, float("nan"))) == stable_hash((1, float("nan")))


scalars = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text() | st.binary()
keys = st.recursive(scalars, lambda inner: st.lists(inner, max_size=3).map(tuple), max_leaves=6)


@given(keys, keys)
def test_any_keys_that_are_equal_hash_equally(one: Any, other: Any) -> None:
    """The property that the examples above are cases of."""
    assert (one != other) or stable_hash(one) == stable_hash(other)


def test_many_keys_are_spread_over_all_tasks() -> None:
    """No task of four is left with less than half of its share."""
    for keys_ in ([f"user-{number}" for number in range(4000)], list(range(4000)), [(n, "x") for n in range(4000)]):
        counts = [0] * 4
        for key in keys_:
            counts[stable_hash(key) % 4] += 1
        assert min(counts) > 500


@pytest.mark.parametrize("key", [[1], {"a": 1}, {1}, bytearray(b"a"), object(), Mutable(1), Point, (1, [2])])
def test_a_key_without_a_stable_hash_is_refused(key: object) -> None:
    """A key that another process would hash differently is refused, not spread at random."""
    with pytest.raises(TypeError, match="has no hash that is the same in every process") as caught:
        stable_hash(key)
    assert caught.value.__notes__ == [
        "Use strings, numbers, tuples of them, enums, dates, UUIDs or frozen dataclasses as keys."
    ]


class Hashless:
    """What raises something of its own when it is asked for its hash."""

    def __hash__(self) -> int:
        raise LookupError("no hash today")


@pytest.mark.parametrize(
    ("key", "cause"), [([1], TypeError), (decimal.Decimal("sNaN"), decimal.InvalidOperation), (Hashless(), TypeError)]
)
def test_a_refused_key_names_the_operator(key: Any, cause: type[Exception]) -> None:
    """The error says which operator gave the key, and keeps the reason as its cause."""
    partitioner = Partitioner(Route.HASH, 0, 2, "by user")
    with pytest.raises(FunctionError, match='operator "by user" gave a key that cannot be used') as caught:
        list(partitioner.split(Batch([1], keys=[key])))
    assert isinstance(caught.value.__cause__, cause)
    assert "Use strings, numbers" in caught.value.__notes__[0]


def split(route: Route, values: list[Any], targets: int, *, index: int = 0, keys: Any = None) -> dict[int, list[Any]]:
    parts: dict[int, list[Any]] = {}
    for target, part in Partitioner(route, index, targets, "op").split(Batch(values, keys)):
        parts.setdefault(target, []).extend(part.values)
    return parts


def test_hash_keeps_keys_together_and_in_order() -> None:
    """Each key in one task only, its records in their order."""
    values = list(range(60))
    keys_: list[Any] = [(0, "", False, None, "a", 1.0, (1, "x"))[value % 7] for value in values]
    parts = split(Route.HASH, values, 4, keys=keys_)
    assert sorted(value for part in parts.values() for value in part) == values
    for target, part in parts.items():
        assert part == sorted(part)
        assert all(stable_hash(keys_[value]) % 4 == target for value in part)


def test_broadcast_gives_everything_to_every_task() -> None:
    """The strategy "broadcast" has its effect."""
    assert split(Route.BROADCAST, [1, 2], 3) == {0: [1, 2], 1: [1, 2], 2: [1, 2]}


def test_round_robin_goes_on_where_the_last_batch_ended() -> None:
    """Single records are spread as evenly as large batches."""
    partitioner = Partitioner(Route.ROUND_ROBIN, 1, 3, "op")
    parts = [
        [(target, part.values) for target, part in partitioner.split(batch)]
        for batch in (Batch([1]), Batch([2, 3]), Batch([4, 5, 6, 7]))
    ]
    assert parts == [[(1, [1])], [(2, [2]), (0, [3])], [(1, [4, 7]), (2, [5]), (0, [6])]]


def test_forward_stays_with_the_task_of_the_same_number() -> None:
    """Between tasks of equal number, the order of each is kept."""
    assert split(Route.FORWARD, [1, 2], 3, index=2) == {2: [1, 2]}
    assert split(Route.ROUND_ROBIN, [1, 2], 1) == {0: [1, 2]}


@given(
    st.one_of(
        st.lists(st.text(), max_size=50),
        st.lists(st.integers(), max_size=50),
        st.lists(st.one_of(st.text(), st.integers(), st.booleans(), st.tuples(st.integers(), st.text())), max_size=50),
    ),
    st.integers(2, 12),
)
def test_a_batch_is_split_by_the_hash_of_each_key_and_keeps_its_order(keys: list[Any], targets: int) -> None:
    """However a batch is hashed, each key goes to the task of its stable hash."""
    partitioner = Partitioner(Route.HASH, 0, targets, "keys")
    for _ in range(2):  # the second time, keys are known
        parts = dict(partitioner.split(Batch(list(range(len(keys))), keys)))
        expected: dict[int, list[int]] = {}
        for place, key in enumerate(keys):
            expected.setdefault(stable_hash(key) % targets, []).append(place)
        assert {target: list(part.values) for target, part in parts.items()} == expected
        assert {target: part.keys for target, part in parts.items()} == {
            target: [keys[place] for place in places] for target, places in expected.items()
        }
