"""Vector stores: the contract and the common code."""

from __future__ import annotations

import re
import threading
from abc import ABC, abstractmethod
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, get_args, overload

from sage.errors import ServiceError, ServiceUnavailableError, hint, short
from sage.services._shared.measures import MeasuredService
from sage.services._shared.validation import checked_count
from sage.services.vectors.filters import NEVER, condition_of, matches
from sage.services.vectors.rows import (
    DuplicateIdError,
    Rows,
    array_of,
    checked_ids,
    checked_rows,
    refuse_incomparable,
    squares_of,
)

if TYPE_CHECKING:
    from collections.abc import Collection, Iterator, Mapping, Sequence

    from numpy.typing import ArrayLike

    from sage.services.vectors.filters import Condition, Metadata, Where
    from sage.services.vectors.rows import Vectors

__all__ = [
    "DuplicateIdError",
    "Entry",
    "Hit",
    "Metric",
    "Rows",
    "Shape",
    "UnknownCollectionError",
    "VectorStore",
    "matches",
]

Metric = Literal["cosine", "dot", "l2"]

COLLECTION_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{1,510}[A-Za-z0-9]", re.ASCII)
"""The limits of Chroma."""

NO_ROOM = (
    *("no space left", "file too large", "disk is full", "disk i/o error", "disk quota exceeded"),
    "failed to apply logs",
)
"""Messages of libraries for a full disk, in lowercase; the last is all that Chroma says about its own files."""


class UnknownCollectionError(LookupError):
    """A collection is asked that is not there; the message lists the known ones."""


@dataclass(frozen=True, slots=True)
class Hit:
    """A result of a search.

    Attributes:
        id: the id.
        score: how near it is, higher is nearer: the cosine, the dot product or the negative distance.
        document: its text, or None.
        metadata: its metadata.
    """

    id: str
    score: float
    document: str | None
    metadata: Metadata


@dataclass(frozen=True, slots=True)
class Entry:
    """An entry of a collection.

    Attributes:
        id: the id.
        vector: float32 array of shape (dimension,). Stores may return it with a rounding error.
        document: its text, or None.
        metadata: its metadata.
    """

    id: str
    vector: Vectors
    document: str | None
    metadata: Metadata


@dataclass(frozen=True, slots=True)
class Shape:
    """The fixed settings of a collection: the dimension of its vectors, and how they are compared."""

    dimension: int
    metric: str


class VectorStore(MeasuredService, ABC):
    """Keeps vectors with texts and metadata in collections, and finds the nearest ones.

    A collection is made by the first write to it. The store's own one can be read before that, and is empty then. Any
    number of threads may call a store; its writes run one after another. Every read that begins after a write has
    returned sees its data, which survives if the program is killed, except for stores in memory.

    An implementation opens in `setup` and closes in `cleanup`, and offers the methods that begin with an underscore:
    they get checked arguments, and the ones that write are called by one thread at a time.

    Args:
        dimension: of the vectors in the store's own collection; the first write decides if it is None.
        metric: how the vectors of a collection are compared that this store makes.
        collection: the store's own collection, for calls that name none.
    """

    def __init__(self, dimension: int | None = None, *, metric: Metric = "cosine", collection: str = "default") -> None:
        super().__init__()
        if dimension is not None:
            dimension = checked_count("the dimension", dimension)
        if metric not in get_args(Metric):
            raise hint(ValueError(f"the metric is {short(metric)}"), 'It is "cosine", "dot" or "l2".')
        self.dimension = dimension
        self.metric: Metric = metric
        self.collection = _collection_name(collection)
        self._writing = threading.RLock()
        self._is_broken = False

    # --- the methods that users call ---

    def add(
        self,
        ids: Sequence[str],
        vectors: ArrayLike,
        *,
        documents: Sequence[str | None] | None = None,
        metadatas: Sequence[Metadata] | None = None,
        collection: str | None = None,
    ) -> None:
        """Store entries under new ids.

        Args:
            ids: not empty, and no two the same.
            vectors: float32 array of shape (n, dimension).
            documents: as many texts.
            metadatas: as many mappings of names to numbers, texts, True or False, or lists of one kind of these. A
                field of None is left out.
            collection: the store's own one by default.

        Raises:
            DuplicateIdError: an id is known or is there twice; nothing was stored.
            ValueError: something has a wrong shape or value; the id is named, and nothing was stored.
            TypeError: something has a wrong type.
        """
        with self.measured("add") as call:
            call.items = len(ids)
            self._put(ids, vectors, documents, metadatas, collection, is_new=True)

    def upsert(
        self,
        ids: Sequence[str],
        vectors: ArrayLike,
        *,
        documents: Sequence[str | None] | None = None,
        metadatas: Sequence[Metadata] | None = None,
        collection: str | None = None,
    ) -> None:
        """Store entries, in place of those that have the same ids. The arguments are those of `add`.

        Raises:
            ValueError: something has a wrong shape or value; the id is named, and nothing was stored.
            TypeError: something has a wrong type.
        """
        with self.measured("upsert") as call:
            call.items = len(ids)
            self._put(ids, vectors, documents, metadatas, collection, is_new=False)

    def delete(
        self, ids: Sequence[str] | None = None, *, where: Where | None = None, collection: str | None = None
    ) -> int:
        """Remove entries, those with the ids that the filter holds for, and return how many there were.

        Raises:
            UnknownCollectionError: the collection does not exist.
            ValueError: neither ids nor a filter are given.
        """
        with self.measured("delete") as call, self._changing():
            if ids is None and where is None:
                error = ValueError("delete is given neither ids nor a filter")
                raise hint(error, "delete(where={}) removes all entries.")
            given = None if ids is None else checked_ids(ids, may_repeat=True)
            call.items = 1 if given is None else len(given)
            condition = condition_of(where)
            name, shape = self._find(collection)
            if shape is None or condition == NEVER:
                return 0
            found = self._known(name, given) if given is not None else None
            if where is not None and found != []:
                held = self._matching(name, condition)
                found = held if found is None else [one for one in found if one in set(held)]
            if found:
                self._remove(name, found)
            return len(found or ())

    def search(
        self, vector: ArrayLike, k: int = 10, *, where: Where | None = None, collection: str | None = None
    ) -> list[Hit]:
        """Return the nearest entries, the nearest first. `search_batch` is faster for several vectors.

        Args:
            vector: float32 array of shape (dimension,).
            k: how many entries at most.
            where: a filter, see `sage.services.vectors.filters`.
            collection: the store's own one by default.

        Raises:
            UnknownCollectionError: the collection does not exist.
            ValueError: the vector or `k` cannot be used.
        """
        with self.measured("search"):
            array = array_of(vector)
            if array.ndim != 1:
                raise ValueError(f"the vector of a search has shape {array.shape}, not (dimension,)")
            return self._search(array[None], k, where, collection)[0]

    def search_batch(
        self, vectors: ArrayLike, k: int = 10, *, where: Where | None = None, collection: str | None = None
    ) -> list[list[Hit]]:
        """Return the results of `search` for each vector.

        Args:
            vectors: float32 array of shape (m, dimension).
            k: how many entries at most for each.
            where: a filter for all of them.
            collection: the store's own one by default.

        Raises:
            UnknownCollectionError: the collection does not exist.
            ValueError: a vector or `k` cannot be used.
        """
        with self.measured("search_batch") as call:
            array = array_of(vectors)
            call.items = len(array) if array.ndim else 1
            if array.ndim != 2 and array.size:
                raise ValueError(f"the vectors of a search have shape {array.shape}, not (m, dimension)")
            return self._search(array, k, where, collection) if array.size else [[] for _ in array]

    @overload
    def get(
        self, ids: Sequence[str], *, where: Where | None = None, collection: str | None = None
    ) -> list[Entry | None]: ...

    @overload
    def get(self, *, where: Where, collection: str | None = None) -> list[Entry]: ...

    def get(
        self, ids: Sequence[str] | None = None, *, where: Where | None = None, collection: str | None = None
    ) -> list[Entry | None] | list[Entry]:
        """Return the entries of ids, None for those that are not there, or all entries that a filter holds for.

        Args:
            ids: the ids; without them, the entries are those of the filter.
            where: a filter that entries must pass; `{}` holds for all.
            collection: the store's own one by default.

        Raises:
            UnknownCollectionError: the collection does not exist.
            ValueError: neither ids nor a filter are given.
        """
        with self.measured("get") as call:
            if ids is None and where is None:
                raise hint(ValueError("get is given neither ids nor a filter"), "get(where={}) returns all entries.")
            held = None if where is None else self._ids_of(where, collection)
            given = held or [] if ids is None else checked_ids(ids, may_repeat=True)
            call.items = len(given)
            name, shape = self._find(collection)
            allowed = given if held is None else set(held)
            found = self._fetch(name, [one for one in given if one in allowed]) if given and shape is not None else {}
            if ids is None:
                return [found[one] for one in given if one in found]
            return [found.get(one) for one in given]

    def ids(self, *, where: Where | None = None, collection: str | None = None) -> list[str]:
        """Return the ids of all entries, or of those that a filter holds for.

        Raises:
            UnknownCollectionError: the collection does not exist.
        """
        with self.measured("ids"):
            return self._ids_of(where, collection)

    def count(self, *, where: Where | None = None, collection: str | None = None) -> int:
        """Return how many entries there are, or how many a filter holds for.

        Raises:
            UnknownCollectionError: the collection does not exist.
        """
        with self.measured("count"):
            condition = condition_of(where)
            name, shape = self._find(collection)
            return 0 if shape is None or condition == NEVER else self._count(name, condition)

    def collections(self) -> list[str]:
        """Return the names of the collections, in order."""
        with self.measured("collections"):
            self._mend()
            return sorted(self._names())

    def drop(self, collection: str) -> bool:
        """Remove a collection with all its entries, and return whether there was one."""
        with self.measured("drop"), self._changing():
            name = _collection_name(collection)
            if self._shape(name) is None:
                return False
            self._discard(name)
            return True

    def flush(self) -> None:
        """Return when everything is on the disk, so that it outlasts a crash of the machine too."""
        with self.measured("flush"), self._changing():
            self._flush()

    def process(self, data: ArrayLike) -> list[Hit]:
        """Search for one vector."""
        return self.search(data)

    def describe(self) -> Mapping[str, object]:
        """Return the settings that a person may see."""
        return {**super().describe(), "collection": self.collection, "dimension": self.dimension, "metric": self.metric}

    # --- the methods of implementations ---

    @abstractmethod
    def _shape(self, name: str) -> Shape | None:
        """Return the fixed settings of a collection, or None if it does not exist."""

    @abstractmethod
    def _create(self, name: str, shape: Shape) -> None:
        """Make a collection; called before the first write."""

    @abstractmethod
    def _write(self, name: str, rows: Rows) -> None:
        """Store rows, in place of those with the same ids."""

    @abstractmethod
    def _remove(self, name: str, ids: Sequence[str]) -> None:
        """Remove entries that are there."""

    @abstractmethod
    def _known(self, name: str, ids: Sequence[str]) -> list[str]:
        """Return those of the ids that are there, each once."""

    @abstractmethod
    def _matching(self, name: str, condition: Condition) -> list[str]:
        """Return the ids that a condition holds for."""

    @abstractmethod
    def _nearest(self, name: str, vectors: Vectors, k: int, condition: Condition) -> list[list[Hit]]:
        """Return the nearest entries of each vector; the condition is not `NEVER`."""

    @abstractmethod
    def _fetch(self, name: str, ids: Sequence[str]) -> dict[str, Entry]:
        """Return the entries that are there."""

    @abstractmethod
    def _count(self, name: str, condition: Condition) -> int:
        """Return for how many entries a condition holds."""

    @abstractmethod
    def _names(self) -> Collection[str]:
        """Return the names of the collections."""

    @abstractmethod
    def _discard(self, name: str) -> None:
        """Remove a collection that is there."""

    def _flush(self) -> None:
        """Bring everything to the disk, where that is not done already."""

    def _check_place(self) -> None:
        """Refuse to go on where the files of an open store were removed or replaced."""

    def _reopen(self) -> None:
        """Open the engine anew, where one in this process must not be used after a change that failed.

        With half of a change, Milvus Lite loses later ones and Chroma waits for ever; opening makes both recover.
        """

    # --- changes ---

    @contextmanager
    def _changing(self) -> Iterator[None]:
        """Let one thread at a time make a change, and remember if the engine has failed to."""
        with self._writing:
            self._mend()
            try:
                yield
                self._check_place()
            except ServiceError:
                self._is_broken = True
                raise

    def _mend(self) -> None:
        self._check_place()
        if self._is_broken:
            with self._writing:
                if self._is_broken:
                    self._reopen()
                    self._is_broken = False

    # --- the checks ---

    def _check_own_collection(self) -> None:
        """Refuse to open a store whose own collection does not match the settings."""
        shape = self._shape(self.collection)
        if shape is None:
            return
        if self.dimension not in (None, shape.dimension):
            raise _dimension_error(f'collection "{self.collection}"', shape.dimension, f"{self.dimension}")
        if shape.metric != self.metric:
            error = ValueError(f'collection "{self.collection}" was made for the metric "{shape.metric}"')
            raise hint(error, f'Give metric="{shape.metric}", or take another collection for "{self.metric}".')

    def _put(
        self,
        ids: Sequence[str],
        vectors: ArrayLike,
        documents: Sequence[str | None] | None,
        metadatas: Sequence[Metadata] | None,
        collection: str | None,
        *,
        is_new: bool,
    ) -> None:
        rows = checked_rows(ids, vectors, documents, metadatas)
        name = self.collection if collection is None else _collection_name(collection)
        if not rows.ids:
            return
        with self._changing():
            shape = self._shape(name)
            expected = self.dimension if shape is None and name == self.collection else shape and shape.dimension
            found = rows.vectors.shape[1]
            if expected not in (None, found):
                raise _dimension_error(f'collection "{name}"', expected, f"{found}, from id {short(rows.ids[0])} on")
            metric = self.metric if shape is None else shape.metric
            refuse_incomparable(
                rows.vectors, rows.squares, metric, lambda place: f"the vector of id {short(rows.ids[place])}"
            )
            if shape is None:
                self._create(name, Shape(found, self.metric))
            elif is_new and (known := self._known(name, rows.ids)):
                raise _known_error(name, known)
            self._write(name, rows)

    def _search(self, vectors: Vectors, k: int, where: Where | None, collection: str | None) -> list[list[Hit]]:
        k = checked_count("k", k)
        condition = condition_of(where)
        name, shape = self._find(collection)
        expected = self.dimension if shape is None and name == self.collection else shape and shape.dimension
        if expected not in (None, vectors.shape[1]):
            raise _dimension_error(f'collection "{name}"', expected, f"{vectors.shape[1]} as that of the search")
        metric = self.metric if shape is None else shape.metric
        refuse_incomparable(vectors, squares_of(vectors), metric, lambda place: f"vector {place} of the search")
        if shape is None or condition == NEVER:
            return [[] for _ in vectors]
        return self._nearest(name, vectors, k, condition)

    def _ids_of(self, where: Where | None, collection: str | None) -> list[str]:
        """Return the ids that a filter holds for."""
        condition = condition_of(where)
        name, shape = self._find(collection)
        return [] if shape is None or condition == NEVER else self._matching(name, condition)

    def _find(self, collection: str | None) -> tuple[str, Shape | None]:
        """Return the name and the shape of a collection that is read; only the own one may not be there yet."""
        self._mend()
        name = self.collection if collection is None else _collection_name(collection)
        shape = self._shape(name)
        if shape is None and name != self.collection:
            known = ", ".join(sorted(self._names())) or "none"
            raise hint(UnknownCollectionError(f'collection "{name}" does not exist'), f"There are: {known}.")
        return name, shape


def closed_error(store: VectorStore) -> ServiceUnavailableError:
    """Return the error for a call of a store that is not open."""
    return hint(ServiceUnavailableError(f"{type(store).__name__} is not open"), "Call setup() first.")


def with_hint_of_room(error: ServiceError) -> ServiceError:
    """Return an error, with a hint if its text tells of a full disk."""
    if any(text in str(error).lower() for text in NO_ROOM):
        hint(error, "Is the disk full? Make room, and write the rows of this call again; earlier ones are still there.")
    return error


def _dimension_error(what: str, expected: object, found: str) -> ValueError:
    return ValueError(f"{what} has vectors of dimension {expected}, not {found}")


def _known_error(name: str, known: Sequence[str]) -> DuplicateIdError:
    more = f" and {len(known) - 1} more" if len(known) > 1 else ""
    error = DuplicateIdError(f'collection "{name}" has id {short(known[0])}{more} already')
    return hint(error, "upsert() takes the place of what is there.")


def _collection_name(name: object) -> str:
    if not isinstance(name, str) or not COLLECTION_NAME.fullmatch(name):
        error = ValueError(f"a collection cannot have the name {short(name)}")
        raise hint(error, "3 to 512 letters, digits, dots, hyphens and underscores, a letter or digit first and last.")
    return name
