"""Sizes of records in memory, as queues estimate them."""

from __future__ import annotations

import tracemalloc
from collections import deque, namedtuple
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import pytest

from sage._sizes import size_of, size_of_all

if TYPE_CHECKING:
    from collections.abc import Callable

MB = 1_000_000


@dataclass
class Page:
    text: str
    vector: list[float]


@dataclass(slots=True)
class Image:
    name: str
    data: bytes


class Private:
    __slots__ = ("__data", "missing")

    def __init__(self) -> None:
        self.__data = bytes(MB)

    def __bytes__(self) -> bytes:
        return self.__data


class Wrong:
    """A record whose own methods fail."""

    nbytes = "many"

    def __getattr__(self, name: str) -> Any:
        raise RuntimeError(name)

    def __len__(self) -> int:
        raise RuntimeError("no length")


Pair = namedtuple("Pair", "name data")

# One place for each kind, by a function that makes it new: nothing in it is shared with other objects.
MADE: dict[str, Callable[[], Any]] = {
    "bytes": lambda: bytes(MB),
    "bytearray": lambda: bytearray(MB),
    "text": lambda: "x" * MB,
    "wide text": lambda: "\N{BLACK STAR}" * MB,
    "list of numbers": lambda: [float(number) for number in range(20_000)],
    "dict of lists": lambda: {f"key {key}": [float(number) for number in range(1000)] for key in range(20)},
    "list of dicts": lambda: [{"id": 1000 + number, "text": f"text {number}" * 20} for number in range(1000)],
    "set of texts": lambda: {f"text {number}" * 10 for number in range(1000)},
    "deque of bytes": lambda: deque(bytes(1000) for _ in range(500)),
    "dataclass": lambda: Page("x" * MB, [0.5 * number for number in range(1000)]),
    "dataclass with slots": lambda: Image("page", bytes(MB)),
    "private slot": Private,
    "named tuple": lambda: Pair("page", bytes(MB)),
    "nested": lambda: {"pages": [Page(f"{number}" * 5000, [0.5]) for number in range(10)]},
}


@pytest.mark.parametrize("kind", MADE)
def test_the_estimate_is_near_what_python_takes(kind: str) -> None:
    make = MADE[kind]
    make()  # what is made once for all records, such as the layout of a class, is there then
    tracemalloc.start()
    try:
        before, _ = tracemalloc.get_traced_memory()
        record = make()
        taken = tracemalloc.get_traced_memory()[0] - before
    finally:
        tracemalloc.stop()
    assert 0.6 * taken < size_of(record) < 1.6 * taken


def test_arrays_count_their_elements_and_views_what_they_show() -> None:
    numpy = pytest.importorskip("numpy")
    array = numpy.zeros((100, 1000))
    assert 800_000 <= size_of(array) < 801_000
    assert 800_000 <= size_of({"vectors": array}) < 802_000
    assert 400_000 <= size_of(array[::2]) < 401_000
    assert size_of(memoryview(bytes(MB))) >= MB


def test_what_is_met_twice_counts_once() -> None:
    data = bytes(MB)
    assert MB <= size_of([data] * 10) < 1.01 * MB
    circle: list[Any] = [data]
    circle.append(circle)
    assert MB <= size_of(circle) < 1.01 * MB


def test_what_belongs_to_the_program_counts_as_nothing() -> None:
    assert size_of({"class": Page, "function": size_of, "module": pytest}) < 1000


def test_a_record_whose_methods_fail_has_a_size_all_the_same() -> None:
    assert 0 < size_of(Wrong()) < 1000


@pytest.mark.parametrize("count", [0, 1, 2, 3, 4, 5, 7, 64, 1000])
def test_a_batch_is_as_large_as_its_records(count: int) -> None:
    one = size_of("x" * 1000)
    assert size_of_all(["x" * 1000 for _ in range(count)]) == pytest.approx(count * one)


def test_a_batch_of_growing_records_is_seen_at_both_ends() -> None:
    records = [bytes(1000 * number) for number in range(100)]
    total = sum(map(len, records))
    assert 0.7 * total < size_of_all(records) < 1.3 * total
