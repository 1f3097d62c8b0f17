"""The language of filters: what it means, and what it refuses."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from support.filter_strategies import metadatas, reference, wheres

from sage.services.vectors.filters import ALWAYS, NEVER, All, AnyOf, Compare, OneOf, condition_of, matches


@given(wheres(), metadatas())
def test_it_means_what_the_plain_evaluation_says(where: Any, metadata: Any) -> None:
    assert matches(where, metadata) is reference(where, metadata)


@given(wheres(), metadatas())
def test_not_is_the_exact_opposite(where: Any, metadata: Any) -> None:
    assert matches({"$not": where}, metadata) is not matches(where, metadata)


@pytest.mark.parametrize(
    ("where", "metadata", "expected"),
    [
        ({"n": 1}, {"n": 1.0}, True),
        ({"n": 1}, {"n": True}, False),
        ({"n": 1}, {"n": "1"}, False),
        ({"n": {"$ne": 1}}, {}, True),
        ({"n": {"$lt": 1}}, {}, False),
        ({"$not": {"n": {"$lt": 1}}}, {}, True),
        ({"n": {"$gte": 1}}, {"n": "2"}, False),
        ({"day": {"$gte": "2024-02-01"}}, {"day": "2024-02-03"}, True),
        ({"n": {"$gt": 1, "$lt": 3}}, {"n": 2}, True),
        ({"n": {"$gt": 1, "$lt": 3}}, {"n": 3}, False),
        ({}, {"n": 3}, True),
        ({"$or": []}, {"n": 3}, False),
        ({"n": 2**53}, {"n": 2**53 + 1}, False),
    ],
)
def test_the_meaning_of_kinds_and_of_what_is_missing(where: Any, metadata: Any, expected: bool) -> None:
    assert matches(where, metadata) is expected


def test_only_fields_are_negated_and_constants_are_gone() -> None:
    where = {"$not": {"$or": [{"a": 1}, {"b": {"$lt": 2}}, {"$and": [{"c": 3}, {"d": {"$in": []}}]}]}}
    assert condition_of(where) == All((OneOf("a", (1,), True), Compare("b", "$lt", 2, True)))
    assert condition_of({"a": {"$nin": []}}) == ALWAYS
    assert condition_of({"$and": [{"a": 1}, {"a": {"$in": []}}]}) == NEVER
    assert condition_of({"$or": [{"a": 1}, {"$or": [{"b": 1}]}]}) == AnyOf((OneOf("a", (1,)), OneOf("b", (1,))))


@pytest.mark.parametrize(
    ("where", "kind", "message"),
    [
        ("x", TypeError, "a filter is a mapping, not 'x'"),
        ({"$nor": []}, ValueError, r"a filter has the unknown operator '\$nor'"),
        ({"$and": {"a": 1}}, TypeError, r"\$and takes a list of filters, not {'a': 1}"),
        ({"$and": "ab"}, TypeError, r"\$and takes a list of filters, not 'ab'"),
        ({1: 2}, TypeError, "a filter has the field 1, which is not a string"),
        ({"a": None}, TypeError, 'the filter of field "a" has None, which is of type NoneType'),
        ({"a": {"$contains": ["x"]}}, TypeError, r'the filter of field "a" has \[\'x\'\], which is of type list'),
        ({"a": {"$exists": 1}}, TypeError, r'\$exists of field "a" takes True or False, not 1'),
        ({"a": [1]}, TypeError, r'the filter of field "a" has \[1\], which is of type list'),
        ({"a": {}}, ValueError, 'the filter of field "a" has no operator'),
        ({"a": {"$like": "x"}}, ValueError, r'the filter of field "a" has the unknown operator \'\$like\''),
        ({"a": {"$in": "xy"}}, TypeError, r"\$in of field \"a\" takes a list, not 'xy'"),
        ({"a": {"$gt": True}}, TypeError, r'\$gt of field "a" takes a number or a text, not True'),
        ({"a": float("nan")}, ValueError, 'the filter of field "a" has nan, which is not finite'),
        ({"a": 2**63}, ValueError, 'the filter of field "a" has 9223372036854775808, which does not fit into 64 bits'),
        ({"a": "\ud800"}, ValueError, 'the filter of field "a" has .*, which has half of a surrogate pair'),
    ],
)
def test_what_cannot_be_meant_is_refused(where: Any, kind: type[Exception], message: str) -> None:
    with pytest.raises(kind, match=message):
        condition_of(where)
