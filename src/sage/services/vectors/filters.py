"""The filters of the vector stores: the meaning of a `where`, and the form that stores translate from.

A filter is a mapping: `{"year": 2024}`, `{"year": {"$gte": 2020}, "kind": {"$in": ["paper", "book"]}}`,
`{"$or": [{...}, {...}]}`, `{"$not": {...}}`. Several fields, and several operators of one field, have to hold together.

There are three kinds of values: numbers, texts, and True and False. Values of different kinds are never equal, and
neither is greater: a comparison with a field that is missing, or of another kind, does not hold. `$ne`, `$nin` and
`$not` are the opposite of `$eq`, `$in` and their content, and so are true for those.

A field may hold a list of values of one kind. A list is not equal to any value: `{"tags": {"$contains": "new"}}` holds
if the list has the value, and `$not_contains` is its opposite. `{"tags": {"$exists": True}}` holds if there is a field.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeAlias

from sage.errors import hint, short

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

Scalar: TypeAlias = "str | int | float | bool"
Metadata: TypeAlias = "Mapping[str, Scalar | list[Scalar]]"
Where: TypeAlias = "Mapping[str, object]"

INTEGER_MAX = 2**63 - 1
"""The largest whole number that all stores keep exactly; the smallest is as far below zero, less one."""

ORDERS: dict[str, Callable[[Any, Any], bool]] = {
    "$lt": operator.lt,
    "$lte": operator.le,
    "$gt": operator.gt,
    "$gte": operator.ge,
}


@dataclass(frozen=True, slots=True)
class OneOf:
    """A field has one of some values, or none of them if it is negated."""

    field: str
    values: tuple[Scalar, ...]
    is_negated: bool = False


@dataclass(frozen=True, slots=True)
class Compare:
    """A field is of the kind of a value and before or after it; if it is negated, it is not."""

    field: str
    operator: str
    value: Scalar
    is_negated: bool = False


@dataclass(frozen=True, slots=True)
class Contains:
    """A field is a list that has a value, or is not if it is negated."""

    field: str
    value: Scalar
    is_negated: bool = False


@dataclass(frozen=True, slots=True)
class Exists:
    """A field is there, or is not if it is negated."""

    field: str
    is_negated: bool = False


@dataclass(frozen=True, slots=True)
class All:
    """All parts hold; without parts it always holds. No part is of the same type."""

    parts: tuple[Condition, ...]


@dataclass(frozen=True, slots=True)
class AnyOf:
    """One of the parts holds; without parts it never holds. No part is of the same type."""

    parts: tuple[Condition, ...]


Condition: TypeAlias = "OneOf | Compare | Contains | Exists | All | AnyOf"
"""A filter in which only fields are negated, and which holds no constants but as a whole."""

ALWAYS = All(())
NEVER = AnyOf(())


def condition_of(where: Where | None) -> Condition:
    """Return the parsed form of a filter."""
    return ALWAYS if where is None else _condition(where, False)


def matches(where: Where | None, metadata: Metadata) -> bool:
    """Return whether a filter holds for metadata. All stores agree with this."""
    return predicate(condition_of(where))(metadata)


def predicate(condition: Condition) -> Callable[[Metadata], bool]:
    """Return a condition as a function of metadata."""
    match condition:
        case All(parts):
            tests = [predicate(part) for part in parts]
            return lambda metadata: all(test(metadata) for test in tests)
        case AnyOf(parts):
            tests = [predicate(part) for part in parts]
            return lambda metadata: any(test(metadata) for test in tests)
        case OneOf(field, values, is_negated):
            known = {(kind_of(value), value) for value in values}
            return lambda metadata: (
                ((value := metadata.get(field)) is not None and key_of(value) in known) is not is_negated
            )
        case Compare(field, name, bound, is_negated):
            kind, order = kind_of(bound), ORDERS[name]
            return lambda metadata: (
                ((value := metadata.get(field)) is not None and kind_of(value) == kind and order(value, bound))
                is not is_negated
            )
        case Contains(field, member, is_negated):
            key = key_of(member)
            return lambda metadata: (
                (isinstance(value := metadata.get(field), list) and key in map(key_of, value)) is not is_negated
            )
        case Exists(field, is_negated):
            return lambda metadata: (metadata.get(field) is not None) is not is_negated


def kind_of(value: object) -> str:
    """Return the kind of a value: "bool", "number", "text" or "list"."""
    if isinstance(value, bool):
        return "bool"
    if isinstance(value, str):
        return "text"
    return "list" if isinstance(value, list) else "number"


def key_of(value: object) -> tuple[str, object]:
    """Return the key by which values are equal; a list is not equal to any value of a filter."""
    return ("list", None) if isinstance(value, list) else (kind_of(value), value)


def plain(value: object) -> Any:
    """Return a value as plain Python has it: scalars and arrays of numpy, and tuples, become numbers and lists."""
    if isinstance(value, str | bool | int | float):
        # Types of numpy, and enums of texts, are of these too.
        kinds = (str, bool, int, float)
        return value if type(value) in kinds else next(kind for kind in kinds if isinstance(value, kind))(value)
    if isinstance(value, list | tuple):
        return [plain(each) for each in value]
    # Arrays of one dimension, and their elements.
    shape = getattr(value, "shape", None)
    return plain(value.tolist()) if shape is not None and len(shape) <= 1 and hasattr(value, "tolist") else value


def problem_of(value: object) -> str | None:
    """Return why a value can be no metadata, or None if it can."""
    if isinstance(value, bool):
        return None
    if isinstance(value, str):
        return "has half of a surrogate pair" if not value.isascii() and _has_surrogate(value) else None
    if isinstance(value, int):
        return None if -INTEGER_MAX - 1 <= value <= INTEGER_MAX else "does not fit into 64 bits"
    if isinstance(value, float):
        return None if math.isfinite(value) else "is not finite"
    if isinstance(value, list):
        return _problem_of_list(value)
    return f"is of type {type(value).__name__}"


def _problem_of_list(values: list[object]) -> str | None:
    if not values:
        return "is empty"
    kinds = {kind_of(value) for value in values}
    if "list" in kinds:
        return "has a list in it"
    problem = next(filter(None, map(problem_of, values)), None)
    if problem is not None:
        return f"has a value that {problem}"
    return None if len(kinds) == 1 else f"has values of different kinds: {', '.join(sorted(kinds))}"


def _has_surrogate(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return True
    return False


def _condition(where: object, is_negated: bool) -> Condition:
    if not isinstance(where, Mapping):
        raise TypeError(f"a filter is a mapping, not {short(where)}")
    return _joined(list(_parts(where, is_negated)), is_negated)


def _parts(where: Mapping[object, object], is_negated: bool) -> Iterator[Condition]:
    for key, value in where.items():
        match key:
            case "$and" | "$or":
                if isinstance(value, str) or not isinstance(value, Sequence):
                    raise TypeError(f"{key} takes a list of filters, not {short(value)}")
                parts = [_condition(part, is_negated) for part in value]
                yield _joined(parts, is_negated is (key == "$and"))
            case "$not":
                yield _condition(value, not is_negated)
            case str() if key.startswith("$"):
                raise hint(
                    ValueError(f"a filter has the unknown operator {key!r}"), "The operators are $and, $or and $not."
                )
            case str():
                yield _of_field(key, value, is_negated)
            case _:
                raise TypeError(f"a filter has the field {short(key)}, which is not a string")


def _joined(parts: list[Condition], is_any: bool) -> Condition:
    """Join parts, by "or" if `is_any`, else by "and", and leave out parts that do not matter."""
    same, neutral, final = (AnyOf, NEVER, ALWAYS) if is_any else (All, ALWAYS, NEVER)
    found: list[Condition] = []
    for part in parts:
        if part == final:
            return final
        found += part.parts if isinstance(part, same) else [part]
    if not found:
        return neutral
    return found[0] if len(found) == 1 else same(tuple(found))


def _of_field(field: str, value: object, is_negated: bool) -> Condition:
    if not isinstance(value, Mapping):
        return OneOf(field, (_scalar(field, value),), is_negated)
    if not value:
        raise ValueError(f'the filter of field "{field}" has no operator')
    return _joined([_test(field, name, bound, is_negated) for name, bound in value.items()], is_negated)


def _test(field: str, name: object, value: object, is_negated: bool) -> Condition:
    match name:
        case "$eq" | "$ne":
            return OneOf(field, (_scalar(field, value),), is_negated is (name == "$eq"))
        case "$in" | "$nin":
            if isinstance(value, str) or not isinstance(value, Sequence | set | frozenset):
                raise TypeError(f'{name} of field "{field}" takes a list, not {short(value)}')
            negated = is_negated is (name == "$in")
            values = tuple(_scalar(field, one) for one in value)
            return OneOf(field, values, negated) if values else ALWAYS if negated else NEVER
        case "$lt" | "$lte" | "$gt" | "$gte":
            if isinstance(value, bool):
                raise TypeError(f'{name} of field "{field}" takes a number or a text, not {value}')
            return Compare(field, name, _scalar(field, value), is_negated)
        case "$contains" | "$not_contains":
            return Contains(field, _scalar(field, value), is_negated is (name == "$contains"))
        case "$exists":
            if not isinstance(value, bool):
                raise TypeError(f'$exists of field "{field}" takes True or False, not {short(value)}')
            return Exists(field, is_negated is value)
    error = ValueError(f'the filter of field "{field}" has the unknown operator {short(name)}')
    raise hint(
        error, "The operators are $eq, $ne, $lt, $lte, $gt, $gte, $in, $nin, $contains, $not_contains and $exists."
    )


def _scalar(field: str, value: object) -> Scalar:
    found = plain(value)
    problem = f"is of type {type(found).__name__}" if isinstance(found, list) else problem_of(found)
    if problem is not None:
        kind = TypeError if problem.startswith("is of type") else ValueError
        error = kind(f'the filter of field "{field}" has {short(found)}, which {problem}')
        if found is None:
            raise hint(error, f'Write {{"{field}": {{"$exists": False}}}} for a field that is not there.')
        raise hint(error, "Values are str, bool, finite float and int of 64 bits.")
    scalar: Scalar = found
    return scalar
