"""Entries of a store in memory are found by the values of a field without a look at all of them."""

from __future__ import annotations

from time import process_time
from typing import Any

import numpy as np
from hypothesis import given
from hypothesis import strategies as some
from services.models import opened

from sage.services.vectors.numpy import NumpyStore


def test_removing_by_a_field_takes_time_with_what_is_removed_and_not_with_the_store() -> None:
    """An index is filled batch by batch, and each removes the older passages of its documents."""

    def seconds(count: int) -> float:
        with opened(NumpyStore()) as store:
            began_at = process_time()
            for start in range(0, count, 20):
                ids = [str(number) for number in range(start, start + 20)]
                store.delete(where={"document": {"$in": [f"d{start}"]}})
                store.upsert(ids, np.ones((20, 2), np.float32), metadatas=[{"document": f"d{start}"}] * 20)
            return process_time() - began_at

    seconds(200)
    assert seconds(16_000) < 30 * max(seconds(1_600), 0.01)


@given(
    some.lists(some.tuples(some.sampled_from("abcd"), some.sampled_from(["x", "y", 1, 1.0, True, None])), max_size=30)
)
def test_entries_are_found_by_a_field_whatever_was_replaced_and_removed(changes: list[tuple[str, Any]]) -> None:
    """The places of a field's values are kept up to date: a second store that never looks by a field agrees."""
    with opened(NumpyStore()) as store:
        store.upsert(["z"], np.ones((1, 2), np.float32), metadatas=[{"f": "x", "g": 1}])
        held: dict[str, Any] = {"z": "x"}
        for id_, value in changes:
            assert sorted(store.ids(where={"f": {"$in": ["x"]}})) == sorted(one for one in held if held[one] == "x")
            if value is None and id_ in held:
                store.delete([id_])
                del held[id_]
            elif value is not None:
                store.upsert([id_], np.ones((1, 2), np.float32), metadatas=[{"f": value}])
                held[id_] = value
        for wanted in ("x", "y", 1, True):
            expected = [one for one, value in held.items() if value == wanted and type(value) in kinds_like(wanted)]
            assert sorted(store.ids(where={"f": wanted})) == sorted(expected)
            narrowed = store.ids(where={"$and": [{"f": wanted}, {"g": {"$exists": False}}]})
            assert sorted(narrowed) == sorted(set(expected) - {"z"})


def kinds_like(value: object) -> tuple[type, ...]:
    """Return the types that a filter takes for the kind of a value: truth values are no numbers."""
    return (bool,) if isinstance(value, bool) else (int, float) if isinstance(value, int | float) else (str,)
