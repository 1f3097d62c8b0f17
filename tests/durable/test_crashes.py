"""`simulate(crashes=)` passes a sound program, and finds the mistakes that lose or double records over a restart."""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING, Any

import pytest
from support.numbers import Numbers, lines

from sage import Durable, GraphError, LocalEnvironment, MapFunction, TransactionalSink
from sage.connectors import JsonLinesFiles
from sage.testing import simulate

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from pathlib import Path

    from sage._runtime.backend import Backend


class Running(MapFunction[int, int]):
    """Adds up."""

    def __init__(self) -> None:
        self.sum = 0

    def execute(self, data: int) -> int:
        self.sum += data
        return self.sum

    def snapshot(self) -> int:
        return self.sum

    def restore(self, whole: int) -> None:
        self.sum = whole


class Parities(MapFunction[int, str]):
    """Counts by key."""

    def __init__(self) -> None:
        self.counts = {0: 0, 1: 0}

    def execute(self, data: int) -> str:
        self.counts[data % 2] += 1
        return f"{data % 2}: {self.counts[data % 2]}"

    def snapshot(self) -> dict[int, int]:
        return self.counts

    def restore(self, counts: dict[int, int]) -> None:
        self.counts = counts


class ForgetsState(Running):
    def restore(self, whole: int) -> None:
        pass


class SharesStateBetweenKeys(Parities):
    def restore(self, counts: dict[int, int]) -> None:
        self.counts = dict.fromkeys(counts, max(counts.values()))


class StoresItsOwnPosition(Numbers):
    """The position is stored before the sink has the record."""

    def __init__(self, folder: Path) -> None:
        self.path = folder / "position"

    def open(self, position: Any = None) -> None:
        self.at = int(self.path.read_text()) if self.path.exists() else 0

    def read(self, records_max: int) -> list[int] | None:
        read = super().read(records_max)
        self.path.write_text(str(self.at))
        return read


class CommitsEarly(TransactionalSink[int]):
    """Writes at once, whatever becomes of the checkpoint."""

    def __init__(self, folder: Path) -> None:
        self.path = folder / "out" / "rows"

    def open(self, part: str, checkpoint: int) -> None:
        self.path.parent.mkdir(exist_ok=True)

    def write(self, batch: Sequence[int]) -> None:
        with self.path.open("a") as file:
            file.writelines(f"{row}\n" for row in batch)

    def prepare(self, number: int) -> None:
        pass

    def commit(self, token: Any) -> None:
        pass


def program(
    source: Callable[[Path], Any], function: Any, sink: Callable[[Path], Any]
) -> Callable[[Callable[[], Backend], Path], Counter[str]]:
    def run(backend: Callable[[], Backend], folder: Path) -> Counter[str]:
        env = LocalEnvironment("job", backend=backend, durable=Durable(folder / "state", interval_s=0.002))
        env.from_source(source(folder), name="numbers").map(function, name="function").sink(sink(folder), name="out")
        env.run()
        return lines(folder)

    return run


def numbers(_: Path) -> Numbers:
    return Numbers()


def rows(folder: Path) -> JsonLinesFiles:
    return JsonLinesFiles(folder / "out")


def appending(folder: Path) -> Callable[[int], None]:
    """Write records as they come: those since the last checkpoint come again."""

    def append(row: int) -> None:
        (folder / "out").mkdir(exist_ok=True)
        with (folder / "out" / "rows").open("a") as file:
            file.write(f"{row}\n")

    return append


@pytest.mark.parametrize("function", [Running, Parities])
def test_a_sound_program_passes(function: type) -> None:
    simulate(program(numbers, function, rows), seeds=range(15), crashes=2)


@pytest.mark.parametrize(
    "wrong",
    [
        program(numbers, Running, CommitsEarly),
        program(numbers, Running, appending),
        program(StoresItsOwnPosition, Running, rows),
        program(numbers, ForgetsState, rows),
        program(numbers, SharesStateBetweenKeys, rows),
    ],
    ids=["commits early", "appends", "stores its own position", "forgets a state", "shares a state between keys"],
)
def test_a_mistake_is_found_and_comes_again(wrong: Callable[[Callable[[], Backend], Path], Counter[str]]) -> None:
    with pytest.raises(AssertionError, match=r"when it was killed before step \d+") as caught:
        simulate(wrong, seeds=range(200), crashes=2)
    (note,) = caught.value.__notes__
    seed = int(note.partition("seed ")[2].partition(":")[0])
    assert note == f"This came with seed {seed}: simulate(program, seeds=[{seed}], crashes=2) shows it again."
    with pytest.raises(AssertionError, match=r"when it was killed before step \d+") as again:
        simulate(wrong, seeds=[seed], crashes=2)
    assert str(again.value) == str(caught.value)


def test_a_program_that_returns_nothing_is_refused() -> None:
    with pytest.raises(TypeError, match="simulate: the program returns None"):
        simulate(lambda backend, folder: None, seeds=[0], crashes=1)


def test_crashes_that_are_no_count_are_refused() -> None:
    with pytest.raises(GraphError, match="simulate: crashes is -1, which is not a number of at least 0"):
        simulate(program(numbers, Running, rows), crashes=-1)
