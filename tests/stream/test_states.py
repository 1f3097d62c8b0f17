"""States of keys as attributes of function classes."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest

from sage import (
    BaseCoMapFunction,
    BaseJoinFunction,
    BatchFunction,
    FilterFunction,
    FunctionError,
    GraphError,
    JobError,
    KeyByFunction,
    ListState,
    LocalEnvironment,
    MapFunction,
    MapState,
    ProcessFunction,
    ValueState,
)
from sage.testing import run

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from sage import DataStream
    from sage._runtime.backend import Backend

    Backends = Callable[[], Backend]


def rest(number: int) -> int:
    return number % 3


def pairs(numbers: Any) -> Iterator[tuple[int, int]]:
    """Number the records of each key."""
    counts = [0, 0, 0]
    for number in numbers:
        counts[rest(number)] += 1
        yield rest(number), counts[rest(number)]


class Sessions(ProcessFunction[int, tuple[int, int]]):
    count = ValueState(0)

    def execute(self, data: int) -> list[tuple[int, int]]:
        self.count.value += 1
        return [(self.ctx.get_key(), self.count.value)]


@pytest.mark.parametrize("as_instance", [False, True])
@pytest.mark.parametrize("parallelism", [1, 3])
def test_each_key_has_its_own_value(backend: Backends, as_instance: bool, parallelism: int) -> None:
    given: Any = Sessions() if as_instance else Sessions
    arrived = run(
        range(300), lambda stream: stream.keyby(rest).process(given, parallelism=parallelism), backend=backend
    )
    assert sorted(arrived) == sorted(pairs(range(300)))


class Changing(ProcessFunction[int, Any]):
    """Changes each kind of state in place."""

    given: list[int] = []  # noqa: RUF012
    value = ValueState(given)
    some = ListState[int]()
    by_name = MapState[str, list[int]]()

    def execute(self, data: int) -> list[Any]:
        self.value.value.append(data)
        self.some.append(data)
        self.by_name.setdefault("all", []).append(data)
        assert self.value.value == [*self.some] == self.by_name["all"]
        return [[*self.some]]


def test_a_default_that_is_changed_in_place_belongs_to_one_key(backend: Backends) -> None:
    arrived = run(range(7), lambda stream: stream.keyby(rest).process(Changing), backend=backend)
    assert arrived == [[0], [1], [2], [0, 3], [1, 4], [2, 5], [0, 3, 6]]
    assert Changing.given == []


class Lists(ProcessFunction[int, Any]):
    some = ListState[int]()

    def execute(self, data: int) -> Any:
        before = len(self.some)
        self.some.extend([data, data + 1])
        self.some.insert(0, -data)
        self.some += [7]
        self.some[-1] = 8
        del self.some[1:2]
        self.some.sort(reverse=True)
        self.some.reverse()
        assert self.some.copy() == list(self.some)
        yield before, self.some[0], self.some[-2:], list(self.some), 8 in self.some
        self.some.clear()


class Maps(ProcessFunction[int, Any]):
    by_name = MapState[str, int]()

    def execute(self, data: int) -> Any:
        self.by_name["last"] = data
        self.by_name[str(data)] = data
        gone = self.by_name.pop("2", None)
        assert self.by_name.copy() == dict(self.by_name)
        yield self.by_name.get("last"), "1" in self.by_name, len(self.by_name), dict(self.by_name), gone


def test_lists_and_maps_have_the_methods_of_lists_and_dicts(backend: Backends) -> None:
    one_key = run([1, 2], lambda stream: stream.keyby(lambda x: 0).process(Lists), backend=backend)
    assert one_key == [(0, -1, [2, 8], [-1, 2, 8], True), (0, -2, [3, 8], [-2, 3, 8], True)]
    one_key = run([1, 2], lambda stream: stream.keyby(lambda x: 0).process(Maps), backend=backend)
    assert one_key == [(1, True, 2, {"last": 1, "1": 1}, None), (2, True, 2, {"last": 2, "1": 1}, 2)]


class Numbered(MapFunction[Any, Any]):
    count = ValueState(0)

    def execute(self, data: Any) -> Any:
        self.count.value += 1
        return data, self.count.value


class Again(FilterFunction[int]):
    count = ValueState(0)

    def execute(self, data: int) -> bool:
        self.count.value += 1
        return self.count.value > 1


class Pairs(BaseJoinFunction[int, int, Any]):
    seen = ListState[int]()

    def execute(self, payload: int, key: int, tag: int) -> list[Any]:
        self.seen.append(payload)
        return [sorted(self.seen)] if len(self.seen) == 2 else []


class Both(BaseCoMapFunction):
    count = ValueState(0)

    def map0(self, data: int) -> Any:
        self.count.value += 1
        return data % 10, self.count.value

    map1 = map0


def test_other_functions_of_one_record_have_states_too(backend: Backends) -> None:
    def build(stream: DataStream[int]) -> DataStream[Any]:
        return stream.keyby(rest).filter(Again).map(Numbered)

    assert run(range(9), build, backend=backend) == [(number, number // 3) for number in range(3, 9)]

    def together(stream: DataStream[int]) -> Any:
        both = stream.connect(stream.map(lambda x: x + 10))
        return both.keyby(lambda x: x % 10)

    assert sorted(run(range(3), lambda s: together(s).join(Pairs), backend=backend)) == [[0, 10], [1, 11], [2, 12]]
    assert sorted(run(range(2), lambda s: together(s).comap(Both), backend=backend)) == [(0, 1), (0, 2), (1, 1), (1, 2)]


class Failing(ProcessFunction[int, int]):
    count = ValueState(0)

    def execute(self, data: int) -> list[int]:
        self.count.value += 1
        if data == 1:
            raise ValueError(data)
        return [self.count.value]


def test_a_record_that_fails_leaves_the_changes_that_it_made(backend: Backends) -> None:
    arrived = run(range(3), lambda stream: stream.keyby(lambda x: 0).process(Failing, on_error="skip"), backend=backend)
    assert arrived == [1, 3]


class Early(Sessions):
    def open(self) -> None:
        self.count.value = 3


class Late(Sessions):
    def finish(self) -> list[tuple[int, int]]:
        return [(0, self.count.value)]


class InConstructor(ProcessFunction[int, int]):
    def __init__(self) -> None:
        self.count = ValueState(0)

    def execute(self, data: int) -> list[int]:
        return [self.count.value]


@pytest.mark.parametrize("wrong", [Early, Late, InConstructor])
def test_a_state_without_a_record_in_hand_is_refused(backend: Backends, wrong: Any) -> None:
    with pytest.raises((FunctionError, JobError), match="a state of a key is used while no record is in hand"):
        run(range(3), lambda stream: stream.keyby(rest).process(wrong), backend=backend)


class Closing(MapFunction[int, int]):
    count = ValueState(0)

    def execute(self, data: int) -> int:
        return data + self.count.value

    def close(self) -> None:
        self.count.value = 3


def test_a_state_is_refused_after_the_last_record(backend: Backends) -> None:
    with pytest.raises((FunctionError, JobError), match="a state of a key is used while no record is in hand"):
        run(range(3), lambda stream: stream.keyby(rest).map(Closing), backend=backend)


class Assigns(Sessions):
    def execute(self, data: int) -> list[tuple[int, int]]:
        self.count = 3  # type: ignore[assignment]
        return []


def test_a_value_in_the_place_of_the_state_is_refused(backend: Backends) -> None:
    with pytest.raises(FunctionError, match='AttributeError: "count" of Assigns is a state of each key') as caught:
        run(range(3), lambda stream: stream.keyby(rest).process(Assigns), backend=backend)
    assert caught.value.__cause__ is not None
    assert "a ValueState has the attribute value" in caught.value.__cause__.__notes__[0]


class Waiting(MapFunction[Any, Any]):
    count = ValueState(0)

    async def execute(self, data: Any) -> Any:
        return data


class Key(KeyByFunction[int, int]):
    count = ValueState(0)

    def execute(self, data: int) -> int:
        return data


class Ticks(BatchFunction[int]):
    count = ValueState(0)

    def execute(self) -> int | None:
        return None


@pytest.mark.parametrize(
    ("build", "message", "note"),
    [
        (
            lambda s: s.process(Sessions),
            r'Sessions.count is a state of each key, and the stream \("source"\) has no keys',
            "Call keyby",
        ),
        (lambda s: s.process(Sessions()), "Sessions.count is a state of each key, and the stream", "Call keyby"),
        (lambda s: s.connect(s.keyby(rest)).comap(Both), r"Both.count is .* has no keys", "Call keyby"),
        (lambda s: s.keyby(rest).connect(s).comap(Both), r"Both.count is .* has no keys", "Call keyby"),
        (
            lambda s: s.keyby(rest).map_async(Waiting),
            "and map_async does not call its function with one record",
            "map, process",
        ),
        (
            lambda s: s.keyby(rest).map_batches(Numbered),
            "Numbered.count is a state .* and map_batches does not",
            "map, process",
        ),
        (lambda s: s.keyby(Key), "Key.count is a state of each key, and keyby does not", "Use one of filter, flatmap"),
        (lambda s: ValueState(list), "ValueState: default is <class 'list'>, which is not a state", "such as \\[\\]"),
        (lambda s: ValueState(rest), "ValueState: default is <function rest", "a copy of it"),
    ],
)
def test_a_state_that_cannot_work_is_refused_before_anything_starts(build: Any, message: str, note: str) -> None:
    with pytest.raises(GraphError, match=message) as caught:
        build(LocalEnvironment("test").from_batch([1]))
    assert note.replace("\\", "") in caught.value.__notes__[0]


def test_a_source_has_no_states() -> None:
    with pytest.raises(GraphError, match=r"Ticks.count is a state of each key, and source does not"):
        LocalEnvironment("test").from_batch(Ticks)
