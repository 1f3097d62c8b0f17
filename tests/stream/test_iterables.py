"""What can be iterated over into letters, keys or names of columns is not taken for a collection of records."""

from __future__ import annotations

import io
import os
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

import pytest

from sage import FlatMapFunction, FunctionError, GraphError, LocalEnvironment
from sage.testing import run

if TYPE_CHECKING:
    from collections.abc import Callable

    from sage._runtime.backend import Backend

    Backends = Callable[[], Backend]


class Table:
    """Stands for a table of pandas, whose iteration gives the names of its columns."""

    columns = ("a", "b")
    shape = (3, 2)

    def __iter__(self) -> Iterator[str]:
        return iter(self.columns)


class Frame(Table):
    """Stands for one of polars."""

    def iter_rows(self, *, named: bool) -> Iterator[Any]:
        return iter(())


SINGLE = [
    ("file.txt", "a str", "open(path)"),
    ("", "a str", "open(path)"),
    (b"bytes", "a bytes", "list(data)"),
    (bytearray(b"bytes"), "a bytearray", "list(data)"),
    (Path("file.txt"), "a path", "open(path)"),
    ({"a": 1}, "a dict", "mapping.items()"),
    (Counter("ab"), "a Counter", "mapping.items()"),
    (MappingProxyType({"a": 1}), "a mappingproxy", "mapping.items()"),
    (os.environ, "a _Environ", "mapping.items()"),
    (Table(), "a Table", 'table.to_dict("records")'),
    (Frame(), "a Frame", "table.iter_rows(named=True)"),
]


@pytest.mark.parametrize(("value", "what", "note"), SINGLE)
def test_a_source_is_refused_before_anything_runs(value: Any, what: str, note: str) -> None:
    env = LocalEnvironment("test")
    for begin in (env.from_batch, env.from_collection):
        with pytest.raises(GraphError, match=f"{what} is not a collection of records") as caught:
            begin(value)
        assert note in caught.value.__notes__[0]


@pytest.mark.parametrize(("value", "what", "note"), SINGLE)
def test_a_source_that_returns_one_fails(backend: Backends, value: Any, what: str, note: str) -> None:
    env = LocalEnvironment("test", backend=backend)
    env.from_batch(lambda: value).sink(print)
    with pytest.raises(FunctionError, match=f"{what} and not a collection of records") as caught:
        env.submit(autostop=True)
    assert caught.value.__cause__ is not None
    assert note in caught.value.__cause__.__notes__[0]


class Collecting(FlatMapFunction):
    def __init__(self, value: Any) -> None:
        self._value = value

    def execute(self, data: Any) -> Any:
        self.collect(data)
        return self._value


@pytest.mark.parametrize(("value", "what", "note"), [*SINGLE, (5, "5", "map()"), (object(), "<object object", "map()")])
@pytest.mark.parametrize("way", ["flatmap", "process", "collect"])
def test_a_record_that_gives_one_fails_by_policy(backend: Backends, way: str, value: Any, what: str, note: str) -> None:
    def added(stream: Any, **policy: Any) -> Any:
        if way == "collect":
            return stream.flatmap(Collecting(value), **policy)
        return getattr(stream, way)(lambda x: [x] if x % 2 else value, **policy)

    kept = run(range(4), lambda stream: added(stream, on_error="skip"), backend=backend)
    assert kept == ([] if way == "collect" else [1, 3])
    with pytest.raises(FunctionError, match=f"{what}.* is one record and not a list of records") as caught:
        run(range(4), added, backend=backend)
    assert caught.value.__cause__ is not None
    assert note in caught.value.__cause__.__notes__[0]


def test_what_holds_records_is_read(backend: Backends, tmp_path: Path) -> None:
    (tmp_path / "lines.txt").write_text("one\ntwo\n")

    class Items:
        """Iterated over by its places, as old classes are."""

        def __getitem__(self, place: int) -> int:
            return [7, 8][place]

    for make, records in (
        (lambda: {"a": 1}.items(), [("a", 1)]),
        (lambda: {"a": 1}.keys(), ["a"]),
        (lambda: {3}, [3]),
        (lambda: io.StringIO("one\ntwo\n"), ["one\n", "two\n"]),
        (lambda: (tmp_path / "lines.txt").read_text().splitlines(), ["one", "two"]),
        (lambda: iter("ab"), ["a", "b"]),
        (lambda: range(2), [0, 1]),
    ):
        values: Any = make()
        assert run(values, lambda stream: stream, backend=backend) == records
        assert run([make], lambda stream: stream.flatmap(lambda each: each()), backend=backend) == records
    old: Any = Items()
    assert run([1], lambda stream: stream.flatmap(lambda x: old), backend=backend) == [7, 8]


def test_arrays_are_records_and_tables_are_not(backend: Backends) -> None:
    numpy = pytest.importorskip("numpy")
    assert run(numpy.arange(3), lambda stream: stream, backend=backend) == [0, 1, 2]
    assert run([2], lambda stream: stream.flatmap(lambda x: numpy.ones(x)), backend=backend) == [1.0, 1.0]
    assert len(run(numpy.eye(3), lambda stream: stream, backend=backend)) == 3
