"""Filters and metadata for Hypothesis, and a plain evaluation to compare with."""

from __future__ import annotations

from typing import Any

from hypothesis import strategies as st

FIELDS = ("a", "b", "some field", 'qu"oted', "ümläut", "back\\slash")
TEXTS = ("", "a", "b", "B", "ab", 'say "x"', "it's", "back\\slash", "line\nbreak", "ü", "語", "100%", "true", "1")
NUMBERS = (0, 1, -1, 2, 2**53, 2**53 + 1, 2**63 - 1, -(2**63), 0.0, 1.0, 1.5, -0.5, 1e300, 2.0**53, 2.0**63)


def values() -> st.SearchStrategy[Any]:
    return st.one_of(st.booleans(), st.sampled_from(NUMBERS), st.sampled_from(TEXTS))


def lists() -> st.SearchStrategy[Any]:
    """Draw lists of one kind. Chroma has all numbers of a list as floats if one is, so large integers would change."""
    numbers = st.sampled_from([number for number in NUMBERS if abs(number) <= 2**53])
    return st.one_of(
        *(st.lists(each, min_size=1, max_size=3) for each in (st.booleans(), numbers, st.sampled_from(TEXTS)))
    )


def metadatas() -> st.SearchStrategy[dict[str, Any]]:
    return st.dictionaries(st.sampled_from(FIELDS), st.one_of(values(), lists()), max_size=4)


def wheres() -> st.SearchStrategy[dict[str, Any]]:
    ordered = st.one_of(st.sampled_from(NUMBERS), st.sampled_from(TEXTS))
    tests = st.one_of(
        values(),
        st.dictionaries(st.sampled_from(["$eq", "$ne"]), values(), min_size=1),
        st.dictionaries(st.sampled_from(["$lt", "$lte", "$gt", "$gte"]), ordered, min_size=1, max_size=2),
        st.dictionaries(st.sampled_from(["$contains", "$not_contains"]), values(), min_size=1),
        st.dictionaries(st.just("$exists"), st.booleans(), min_size=1),
        st.dictionaries(st.sampled_from(["$in", "$nin"]), st.lists(values(), max_size=3), min_size=1),
    )
    fields = st.dictionaries(st.sampled_from(FIELDS), tests, max_size=2)
    return st.recursive(
        fields,
        lambda inner: st.one_of(
            st.builds(lambda parts: {"$and": parts}, st.lists(inner, max_size=3)),
            st.builds(lambda parts: {"$or": parts}, st.lists(inner, max_size=3)),
            st.builds(lambda part: {"$not": part}, inner),
        ),
        max_leaves=4,
    )


def kind(value: Any) -> str:
    if isinstance(value, list):
        return "list"
    return "bool" if isinstance(value, bool) else "text" if isinstance(value, str) else "number"


def same(one: Any, other: Any) -> bool:
    return kind(one) == kind(other) and one == other


def reference(where: dict[str, Any], metadata: dict[str, Any]) -> bool:
    """Evaluate a filter as it is written, case by case."""

    def holds(field: str, name: str, bound: Any) -> bool:
        has = field in metadata
        value = metadata.get(field)
        if name in ("$ne", "$nin", "$not_contains"):
            return not holds(field, {"$ne": "$eq", "$nin": "$in", "$not_contains": "$contains"}[name], bound)
        if name == "$exists":
            return has is bound
        if name == "$contains":
            return isinstance(value, list) and any(same(one, bound) for one in value)
        if name == "$eq":
            return has and same(value, bound)
        if name == "$in":
            return has and any(same(value, one) for one in bound)
        if not has or kind(value) != kind(bound):
            return False
        found: bool = {"$lt": value < bound, "$lte": value <= bound, "$gt": value > bound, "$gte": value >= bound}[name]
        return found

    def of_field(field: str, test: Any) -> bool:
        if isinstance(test, dict):
            return all(holds(field, name, bound) for name, bound in test.items())
        return holds(field, "$eq", test)

    results = []
    for key, value in where.items():
        if key == "$and":
            results.append(all(reference(part, metadata) for part in value))
        elif key == "$or":
            results.append(any(reference(part, metadata) for part in value))
        elif key == "$not":
            results.append(not reference(value, metadata))
        else:
            results.append(of_field(key, value))
    return all(results)
