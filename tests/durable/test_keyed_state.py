"""What checkpoints write of keyed state: with those that are kept, each loads as it was, and they stay small."""

from __future__ import annotations

import pickle
from contextlib import closing
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sage import LocalEnvironment
from sage._operators.keyed_state import KeyedState, each_pickle
from sage._runtime.checkpoint_store import Checkpoint, CheckpointStore
from sage._runtime.checkpoints import Row, without_changes
from sage.errors import CheckpointError, FunctionError
from sage.state import Removed

if TYPE_CHECKING:
    from pathlib import Path

GRAPH = {"count": ("reduce", 1)}


def change(state: KeyedState, key: int, value: object) -> None:
    state.young[key] = value


def values(state: KeyedState) -> dict[object, object]:
    return {key: value for key, value in {**state.old, **state.young}.items() if value is not Removed.REMOVED}


def write(store: CheckpointStore, state: KeyedState, number: int, keep: int = 2) -> None:
    store.write(Checkpoint(number, GRAPH, (Row("count", 0, 0, b"", *state.take(number).take()),)), keep)


def loaded(store: CheckpointStore) -> tuple[int, KeyedState]:
    found = store.load()
    assert found is not None
    changes = [one for body in found.changes["count", 0] for one in each_pickle(body)]
    return found.number, KeyedState(found.rows[0].since, changes)


VALUES = st.integers() | st.just(Removed.REMOVED)


@given(rounds=st.lists(st.dictionaries(st.integers(0, 5_000), VALUES, max_size=3), max_size=25), data=st.data())
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


def test_a_removed_key_leaves_the_memory_once_a_checkpoint_has_it() -> None:
    state = KeyedState()
    for key in range(3):
        change(state, key, 0)
    state.take(1).take()
    change(state, 1, Removed.REMOVED)
    _, body = state.take(2).take()
    assert any(1 in keys and Removed.REMOVED in values for keys, values, _ in each_pickle(body))
    assert len(state) == 2
    state.take(3).take()
    assert list(state.old) == [0, 2]


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
        since, body = state.take(number).take()
        assert len(body) < whole / 10
        store.write(Checkpoint(number, GRAPH, (Row("count", 0, 0, b"", since, body),)), 2)
        sizes.append((tmp_path / "state" / "checkpoints.sqlite").stat().st_size)
    assert values(loaded(store)[1]) == values(state)
    assert max(sizes) < 5 * whole
    assert max(sizes[150:]) <= max(sizes[:150])  # it does not grow
    store.close()


def test_keys_that_are_removed_leave_the_folder(tmp_path: Path) -> None:
    store, state = CheckpointStore(str(tmp_path / "state")), KeyedState()
    sizes = []
    for number in range(1, 200):
        for key in range(number * 300, (number + 1) * 300):
            change(state, key, number)
            if key >= 3_000:
                state.remove(key - 3_000)
        write(store, state, number)
        sizes.append((tmp_path / "state" / "checkpoints.sqlite").stat().st_size)
    assert values(loaded(store)[1]) == values(state)
    assert max(sizes[100:]) <= max(sizes[:100])
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
    row = Row("count", 0, 0, b"", *state.take(1).take())
    store.write(Checkpoint(1, GRAPH, (row,)), 2)
    for number in range(2, 8):
        store.write(Checkpoint(number, GRAPH, (without_changes(row),)), 2)
    assert [values(found) for _, found in [loaded(store)]] == [values(state)]
    (size,) = store._file.execute("SELECT sum(length(changes)) FROM parts").fetchone()
    assert size == len(row.changes or b"")
    store.close()


def test_a_change_after_the_barrier_is_not_in_its_checkpoint() -> None:
    plain, lists = KeyedState(), KeyedState()
    plain.young.update(a=1, b="x")
    changed = [1]
    lists.young.update(a=changed)
    first, at_once = plain.take(1), lists.take(1)
    plain.young["a"] = 2
    changed.append(2)
    plain.settle()  # the old values change: what was not pickled has to be by now
    second = plain.take(2)
    plain.young["a"] = 3
    bodies = [late.take()[1] for late in (at_once, first, second)]
    found = [dict(zip(keys, values, strict=True)) for body in bodies for keys, values, _ in each_pickle(body)]
    assert found == [{"a": [1]}, {"a": 1, "b": "x"}, {"a": 2, "b": "x"}]
    assert (first.take(), second.take()) == ((1, b""), (2, b""))


def test_a_key_that_cannot_be_pickled_fails_the_job_with_its_operator(tmp_path: Path) -> None:
    class Unknown:
        def __hash__(self) -> int:
            return 1

        def __reduce__(self) -> str:
            raise TypeError("this key stays here")

    env = LocalEnvironment("job", durable=tmp_path / "state")
    env.from_batch([1], name="in").keyby(lambda _: Unknown()).count(name="counts").sink(lambda _: None)
    with pytest.raises(FunctionError, match=r'operator "counts" has a state that cannot be pickled: .*stays here'):
        env.submit(autostop=True)
