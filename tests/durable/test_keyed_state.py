"""What checkpoints write of keyed state: with those that are kept, each loads as it was, and they stay small."""

from __future__ import annotations

import pickle
from contextlib import closing
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sage._operators.keyed_state import KeyedState
from sage._runtime.checkpoint_store import Checkpoint, CheckpointStore
from sage._runtime.checkpoints import Row, without_changes
from sage.errors import CheckpointError

if TYPE_CHECKING:
    from pathlib import Path

GRAPH = {"count": ("reduce", 1)}


def change(state: KeyedState, key: int, value: object) -> None:
    state.young[key] = value


def values(state: KeyedState) -> dict[object, object]:
    return {**state.old, **state.young}


def write(store: CheckpointStore, state: KeyedState, number: int, keep: int = 2) -> None:
    store.write(Checkpoint(number, GRAPH, (Row("count", 0, 0, b"", *state.take(number)),)), keep)


def loaded(store: CheckpointStore) -> tuple[int, KeyedState]:
    found = store.load()
    assert found is not None
    changes = [pickle.loads(body) for body in found.changes["count", 0]]
    return found.number, KeyedState(found.rows[0].since, changes)


@given(rounds=st.lists(st.dictionaries(st.integers(0, 5_000), st.integers(), max_size=3), max_size=25), data=st.data())
def test_any_checkpoint_loads_as_it_was(rounds, data) -> None:  # type: ignore[no-untyped-def]
    # An example that Hypothesis gives up ends in the middle.
    with TemporaryDirectory() as folder, closing(CheckpointStore(folder)) as store:
        state, wanted = KeyedState(), {}
        for key in range(3_000):  # more than one sweep writes
            change(state, key, 0)
        for number, changes in enumerate([{}, *rounds], start=1):
            for key, value in changes.items():
                change(state, key, value)
            if data.draw(st.booleans()):
                state.settle()
            write(store, state, number)
            wanted[number] = values(state), dict(state.unsettled())
            if data.draw(st.booleans()):  # killed, and run again
                at, state = loaded(store)
                assert (at, values(state), dict(state.unsettled())) == (number, *wanted[number])


def test_a_checkpoint_costs_as_much_as_what_changed_and_the_folder_stays_small(tmp_path: Path) -> None:
    store, state = CheckpointStore(str(tmp_path / "state")), KeyedState()
    for key in range(50_000):
        change(state, key, key)
    write(store, state, 1)
    whole = len(pickle.dumps(values(state)))
    sizes = []
    for number in range(2, 200):
        for key in range(number, number + 300):
            change(state, key, number)
        since, body = state.take(number)
        assert len(body) < whole / 10
        store.write(Checkpoint(number, GRAPH, (Row("count", 0, 0, b"", since, body),)), 2)
        sizes.append((tmp_path / "state" / "checkpoints.sqlite").stat().st_size)
    assert values(loaded(store)[1]) == values(state)
    assert max(sizes) < 5 * whole
    assert max(sizes[150:]) <= max(sizes[:150])  # it does not grow
    store.close()


def test_a_damaged_change_falls_back_to_a_checkpoint_that_does_not_need_it(tmp_path: Path) -> None:
    store, state = CheckpointStore(str(tmp_path / "state")), KeyedState()
    for number in (1, 2, 3):
        change(state, number, "value")
        write(store, state, number, keep=3)
    with store._file:
        store._file.execute("UPDATE parts SET changes = x'00' WHERE number = 3")
    number, found = loaded(store)
    assert (number, values(found), store.skipped) == (2, {1: "value", 2: "value"}, [3])
    store.close()


def test_a_damaged_change_that_all_need_is_an_error(tmp_path: Path) -> None:
    store, state = CheckpointStore(str(tmp_path / "state")), KeyedState()
    for key in range(5_000):
        change(state, key, key)
    write(store, state, 1, keep=3)
    for number in (2, 3):
        change(state, number, "value")
        write(store, state, number, keep=3)
    with store._file:
        store._file.execute("UPDATE parts SET changes = x'00' WHERE number = 1")
    with pytest.raises(CheckpointError, match="are damaged: 3, 2, 1"):
        store.load()
    store.close()


def test_a_task_that_ended_is_not_written_again(tmp_path: Path) -> None:
    store, state = CheckpointStore(str(tmp_path / "state")), KeyedState()
    for key in range(5_000):
        change(state, key, key)
    row = Row("count", 0, 0, b"", *state.take(1))
    store.write(Checkpoint(1, GRAPH, (row,)), 2)
    for number in range(2, 8):
        store.write(Checkpoint(number, GRAPH, (without_changes(row),)), 2)
    assert [values(found) for _, found in [loaded(store)]] == [values(state)]
    (size,) = store._file.execute("SELECT sum(length(changes)) FROM parts").fetchone()
    assert size == len(row.changes or b"")
    store.close()
