"""Checks of a vector store's arguments: whole columns are checked, as checking each value would be slow."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import chain
from math import isfinite
from typing import TYPE_CHECKING, Any, TypeAlias

from sage._extras import load
from sage.errors import hint, short
from sage.services.vectors.filters import INTEGER_MAX, plain, problem_of

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence

    import numpy as np
    from numpy.typing import ArrayLike, NDArray

    from sage.services.vectors.filters import Metadata, Scalar

    Vectors: TypeAlias = NDArray[np.float32]


VALUES = "Values are str, bool, finite float and int of 64 bits, and lists of one kind of these; None is left out."


class DuplicateIdError(ValueError):
    """An id is given twice, or is in the collection already and was to be added."""


@dataclass(frozen=True, slots=True)
class Rows:
    """Entries that were checked, as columns of the same length; no id is there twice."""

    ids: Sequence[str]
    vectors: Vectors
    squares: Vectors
    documents: Sequence[str | None]
    metadatas: Sequence[Metadata]

    def cut(self, start: int, end: int) -> Rows:
        """Return some of the rows."""
        part = slice(start, end)
        return Rows(self.ids[part], self.vectors[part], self.squares[part], self.documents[part], self.metadatas[part])


def checked_rows(
    ids: Sequence[str], vectors: ArrayLike, documents: Sequence[str | None] | None, metadatas: Sequence[Metadata] | None
) -> Rows:
    """Return the arguments of `add` and `upsert` as rows, or raise their documented errors."""
    given = checked_ids(ids, may_repeat=False)
    array = array_of(vectors)
    for what, values in (("vectors", array), ("documents", documents), ("metadatas", metadatas)):
        if isinstance(values, str):
            raise TypeError(f"{what} is {short(values)}, a string and not a list")
        if values is not None and (count := len(values) if getattr(values, "ndim", 1) else 1) != len(given):
            raise ValueError(f"there are {len(given)} ids and {count} {what}")
    if given and (array.ndim != 2 or not array.shape[1]):
        raise ValueError(f"the vectors have shape {array.shape}, not (n, dimension)")
    texts = [None] * len(given) if documents is None else list(documents)
    if documents is not None and not _are_ascii(texts):
        for one, text in zip(given, texts, strict=True):
            if text is not None:
                check_document(one, text)
    mappings = [{}] * len(given) if metadatas is None else checked_metadatas(given, list(metadatas))
    return Rows(given, array, squares_of(array) if given else array, texts, mappings)


def _are_ascii(values: Iterable[Any]) -> bool:
    """Return whether all are strings of ASCII, which most are and which no rule refuses: a look at each would cost."""
    try:
        return all(map(str.isascii, values))
    except TypeError:
        return False  # one is not a string


def check_document(one: str, text: object) -> None:
    """Refuse a value that is not a string or cannot be stored, naming its id."""
    problem = problem_of(text) if isinstance(text, str) else f"is of type {type(text).__name__}"
    if problem is not None:
        kind = ValueError if isinstance(text, str) else TypeError
        raise kind(f"the document of id {short(one)} {problem}")


def checked_metadatas(ids: Sequence[str], metadatas: Sequence[Any]) -> list[Metadata]:
    """Return copies for storage, or raise for the first one that cannot be stored."""
    fields: set[str] = set()
    try:
        # Where all are dictionaries of plain values, as most are, the columns tell it; otherwise each is looked at.
        values = list(chain.from_iterable(map(dict.values, metadatas)))
        if all(map(_is_field, set().union(*metadatas))) and _are_plain(values):
            return list(map(dict.copy, metadatas))
    except TypeError:
        pass
    return [_metadata(one, metadata, fields) for one, metadata in zip(ids, metadatas, strict=True)]


def _are_plain(values: list[object]) -> bool:
    """Return whether all are strings without halves of characters, truth values, or numbers that can be stored."""
    kinds = {*map(type, values)}
    if not kinds <= {str, int, bool, float}:
        return False
    numbers = [value for value in values if type(value) is int]
    if numbers and not -INTEGER_MAX - 1 <= min(numbers) <= max(numbers) <= INTEGER_MAX:
        return False
    if float in kinds and not all(isfinite(value) for value in values if type(value) is float):
        return False
    return problem_of("".join([value for value in values if type(value) is str])) is None


def _is_field(name: object) -> bool:
    return isinstance(name, str) and bool(name) and not name.startswith("$") and problem_of(name) is None


def _metadata(one: str, metadata: Any, fields: set[str]) -> Metadata:
    """Return a copy for storage; `fields` are those that were checked before."""
    if metadata is None:
        return {}
    if not hasattr(metadata, "items"):
        raise TypeError(f"the metadata of id {short(one)} is {short(metadata)}, not a mapping")
    found: dict[str, Scalar | list[Scalar]] = {}
    for field, given in metadata.items():
        if field not in fields:
            if not _is_field(field):
                raise ValueError(f"the metadata of id {short(one)} has the field {short(field)}")
            fields.add(field)
        if type(given) is str and given.isascii():
            found[field] = given
        elif given is not None:  # None counts as a field that is not there
            value = plain(given)
            problem = problem_of(value)
            if problem is not None:
                kind = TypeError if problem.startswith("is of type") else ValueError
                error = kind(f"the metadata of id {short(one)} has {short(field)}: {short(value)}, which {problem}")
                raise hint(error, VALUES)
            found[field] = value
    return found


def checked_ids(ids: Sequence[str], *, may_repeat: bool) -> list[str]:
    """Return ids as a list, or raise for the first one that can be none."""
    if isinstance(ids, str):
        raise TypeError(f"ids is {short(ids)}, a string and not a list")
    given = list(ids)
    for place, one in enumerate(given) if not (_are_ascii(given) and all(given)) else ():
        if not isinstance(one, str):
            raise TypeError(f"id {place} is {short(one)}, of type {type(one).__name__} and not a string")
        if not one or problem_of(one):
            raise ValueError(f"id {place} is {short(one)}, which " + (problem_of(one) or "is empty"))
    if not may_repeat and len(set(given)) < len(given):
        seen: set[str] = set()
        twice = next(one for one in given if one in seen or seen.add(one))  # type: ignore[func-returns-value]
        raise DuplicateIdError(f"id {short(twice)} is given twice")
    return given


def array_of(vectors: ArrayLike) -> Vectors:
    """Return an array of float32, the given one if it is that."""
    np = load("numpy", "vector")
    try:
        given = np.asarray(vectors)
        if given.dtype.kind in "biufO":
            with np.errstate(over="ignore"):  # too large values become infinite, and are refused as such
                array: Vectors = given.astype(np.float32, copy=False)
            return array
    except (TypeError, ValueError) as error:
        raise ValueError(f"the vectors are not an array of numbers: {error}") from None
    raise ValueError(f"the vectors are not an array of numbers, but of {given.dtype}")


def squares_of(vectors: Vectors) -> Vectors:
    """Return the square of the length of each vector, as float32 array of shape (n,)."""
    squares: Vectors = load("numpy", "vector").einsum("ij,ij->i", vectors, vectors)
    return squares


def refuse_incomparable(vectors: Vectors, squares: Vectors, metric: str, name_of: Callable[[int], str]) -> None:
    """Refuse vectors that have no distance to others; the square of the length tells of all that is wrong with one."""
    np = load("numpy", "vector")
    is_cosine = metric == "cosine"
    numbers = np.finfo(np.float32)
    # The sum of two vectors must not be too long either. Below `tiny`, a number has fewer digits than others.
    is_good = squares <= numbers.max / 4
    if is_cosine:
        is_good &= squares >= numbers.tiny
    if is_good.all():
        return
    place = int(is_good.argmin())
    vector = vectors[place]
    if not np.isfinite(vector).all():
        raise ValueError(f"{name_of(place)} has a value that is not finite")
    if is_cosine and not vector.any():
        error = ValueError(f"{name_of(place)} is all zeros and has no cosine")
        raise hint(error, 'Leave it out, or take metric="l2" or "dot".')
    size = "short" if squares[place] < 1 else "long"
    raise ValueError(f"{name_of(place)} is too {size}: the square of its length does not fit into 32 bits")
