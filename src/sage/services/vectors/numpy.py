"""Vectors in memory, found by comparing with all of them."""

from __future__ import annotations

import threading
from abc import abstractmethod
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING

from sage._extras import load
from sage.services.vectors.contract import Entry, Hit, VectorStore, closed_error
from sage.services.vectors.filters import ALWAYS, All, OneOf, key_of, predicate

if TYPE_CHECKING:
    from collections.abc import Collection, Hashable, Iterable, Sequence

    from numpy import float32, intp
    from numpy.typing import NDArray

    from sage.services.vectors.contract import Shape
    from sage.services.vectors.filters import Condition, Metadata
    from sage.services.vectors.rows import Rows, Vectors

SCORES_MAX = 16_000_000
"""How many scores are held at once, which are 64 MB: searches in a large collection are done some at a time."""

PLACES_MIN = 256
LEAP_MAX = 64 * 2**20
"""A full matrix of up to so many bytes becomes four times as large, as copies cost time, and a larger one twice."""


class Shelf:
    """One collection in memory. Its entries have no gaps: the last one moves to where one is removed.

    It is safe for any number of threads.
    """

    def __init__(self, shape: Shape) -> None:
        np = load("numpy", "vector")
        self.shape = shape
        self._lock = threading.Lock()
        self._ids: list[str] = []
        self._places: dict[str, int] = {}
        self._documents: list[str | None] = []
        self._metadatas: list[Metadata] = []
        # Where the values of a field are, for fields that a filter has asked for: a scan for each batch of an index
        # would take time with the square of its size.
        self._places_of: dict[str, dict[Hashable, set[int]]] = {}
        self._vectors: Vectors = np.empty((PLACES_MIN, shape.dimension), dtype=np.float32)
        # One over the length for the cosine, the square of the length for the distance.
        self._lengths: NDArray[float32] = np.empty(PLACES_MIN, dtype=np.float32)

    def put(self, rows: Rows) -> None:
        """Store rows, in place of those with the same ids."""
        np = load("numpy", "vector")
        with self._lock:
            start = len(self._ids)
            are_new = self._places.keys().isdisjoint(rows.ids)
            fresh = rows.ids if are_new else [one for one in rows.ids if one not in self._places]
            self._ids += fresh
            self._places.update(zip(fresh, range(start, len(self._ids)), strict=True))
            self._grow(len(self._ids))
            for one, metadata in zip(rows.ids, rows.metadatas, strict=True) if self._places_of else ():
                place = self._places[one]
                if place < start:
                    self._unlist(place, self._metadatas[place])
                self._list(place, metadata)
            places: slice | NDArray[intp]
            if are_new:
                places = slice(start, len(self._ids))
                self._documents += rows.documents
                self._metadatas += rows.metadatas
            else:
                known = [self._places[one] for one in rows.ids]
                places = np.array(known)
                self._documents += [None] * len(fresh)
                self._metadatas += [{}] * len(fresh)
                for place, document, metadata in zip(known, rows.documents, rows.metadatas, strict=True):
                    self._documents[place] = document
                    self._metadatas[place] = metadata
            self._vectors[places] = rows.vectors
            self._lengths[places] = 1 / np.sqrt(rows.squares) if self.shape.metric == "cosine" else rows.squares

    def remove(self, ids: Sequence[str]) -> None:
        """Remove entries that are there."""
        with self._lock:
            for one in ids:
                place = self._places.pop(one)
                last = len(self._ids) - 1
                self._unlist(place, self._metadatas[place])
                moved = self._ids.pop(), self._documents.pop(), self._metadatas.pop()
                if place != last:
                    self._unlist(last, moved[2])
                    self._list(place, moved[2])
                    self._places[moved[0]] = place
                    self._ids[place], self._documents[place], self._metadatas[place] = moved
                    self._vectors[place] = self._vectors[last]
                    self._lengths[place] = self._lengths[last]

    def known(self, ids: Sequence[str]) -> list[str]:
        """Return those of the ids that are there, each once."""
        with self._lock:
            return [one for one in dict.fromkeys(ids) if one in self._places]

    def matching(self, condition: Condition) -> list[str]:
        """Return the ids that a condition holds for."""
        with self._lock:
            return [self._ids[place] for place in self._held(condition)]

    def count(self, condition: Condition) -> int:
        """Return for how many entries a condition holds."""
        with self._lock:
            return len(self._held(condition))

    def fetch(self, ids: Sequence[str]) -> dict[str, Entry]:
        """Return the entries that are there."""
        with self._lock:
            found = [(one, self._places[one]) for one in ids if one in self._places]
            return {
                one: Entry(one, self._vectors[place].copy(), self._documents[place], dict(self._metadatas[place]))
                for one, place in found
            }

    def nearest(self, vectors: Vectors, k: int, condition: Condition) -> list[list[Hit]]:
        """Return the nearest entries of each vector; those with the same score are in the order of their ids."""
        with self._lock:
            held = self._held(condition)
            if not held:
                return [[] for _ in vectors]
            np = load("numpy", "vector")
            places = np.arange(len(held)) if isinstance(held, range) else np.asarray(held)
            among = self._vectors[: len(held)] if isinstance(held, range) else self._vectors[places]
            step = max(1, SCORES_MAX // len(held))
            hits: list[list[Hit]] = []
            for start in range(0, len(vectors), step):
                hits += self._nearest_of(vectors[start : start + step], among, places, min(k, len(held)))
            return hits

    def _nearest_of(self, vectors: Vectors, among: Vectors, places: NDArray[intp], k: int) -> list[list[Hit]]:
        np = load("numpy", "vector")
        # A term or factor that is the same for all entries is left out, as it does not change their order.
        scores = vectors @ among.T
        if self.shape.metric == "cosine":
            scores *= self._lengths[places]
        elif self.shape.metric == "l2":
            scores *= 2
            scores -= self._lengths[places]
        best = (
            np.argpartition(scores, len(places) - k, axis=1)[:, len(places) - k :]
            if k < len(places)
            else np.tile(np.arange(k), (len(vectors), 1))
        )
        if self.shape.metric == "l2":
            # The difference of large squares says little about small distances.
            best_scores = -np.linalg.norm(among[best] - vectors[:, None, :], axis=2)
        else:
            best_scores = np.take_along_axis(scores, best, axis=1)
        if self.shape.metric == "cosine":
            best_scores /= np.linalg.norm(vectors, axis=1, keepdims=True)
        ids, documents, metadatas = self._ids, self._documents, self._metadatas
        hits = []
        for chosen, found in zip(places[best].tolist(), best_scores.tolist(), strict=True):
            order = sorted((-score, ids[place], place) for score, place in zip(found, chosen, strict=True))
            hits.append([Hit(one, -score, documents[place], dict(metadatas[place])) for score, one, place in order])
        return hits

    def _held(self, condition: Condition) -> Sequence[int]:
        if condition == ALWAYS:
            return range(len(self._ids))
        holds = predicate(condition)
        parts = condition.parts if isinstance(condition, All) else (condition,)
        wanted = next((part for part in parts if isinstance(part, OneOf) and not part.is_negated), None)
        if wanted is None:
            return [place for place, metadata in enumerate(self._metadatas) if holds(metadata)]
        if wanted.field not in self._places_of:
            self._places_of[wanted.field] = {}
            for place, metadata in enumerate(self._metadatas):
                self._list(place, metadata, (wanted.field,))
        listed = self._places_of[wanted.field]
        found = set[int]().union(*(listed.get(key_of(value), ()) for value in wanted.values))
        return [place for place in sorted(found) if holds(self._metadatas[place])]

    def _list(self, place: int, metadata: Metadata, fields: Iterable[str] | None = None) -> None:
        for field in self._places_of if fields is None else fields:
            if (value := metadata.get(field)) is not None:
                self._places_of[field].setdefault(key_of(value), set()).add(place)

    def _unlist(self, place: int, metadata: Metadata) -> None:
        for field, listed in self._places_of.items():
            if (value := metadata.get(field)) is not None:
                key = key_of(value)
                listed[key].discard(place)
                if not listed[key]:
                    del listed[key]

    def _grow(self, count: int) -> None:
        if count <= len(self._lengths):
            return
        np = load("numpy", "vector")
        places = max(count, len(self._lengths) * (4 if self._vectors.nbytes <= LEAP_MAX else 2))
        vectors = np.empty((places, self.shape.dimension), dtype=np.float32)
        lengths = np.empty(places, dtype=np.float32)
        vectors[: len(self._vectors)] = self._vectors
        lengths[: len(self._lengths)] = self._lengths
        self._vectors, self._lengths = vectors, lengths


class ShelfStore(VectorStore):
    """A vector store that searches in memory; an implementation lends the collections."""

    @abstractmethod
    def _reading(self, name: str) -> AbstractContextManager[Shelf]:
        """Lend a collection that is there."""

    def _known(self, name: str, ids: Sequence[str]) -> list[str]:
        with self._reading(name) as shelf:
            return shelf.known(ids)

    def _matching(self, name: str, condition: Condition) -> list[str]:
        with self._reading(name) as shelf:
            return shelf.matching(condition)

    def _nearest(self, name: str, vectors: Vectors, k: int, condition: Condition) -> list[list[Hit]]:
        with self._reading(name) as shelf:
            found = shelf
        return found.nearest(vectors, k, condition)

    def _fetch(self, name: str, ids: Sequence[str]) -> dict[str, Entry]:
        with self._reading(name) as shelf:
            return shelf.fetch(ids)

    def _count(self, name: str, condition: Condition) -> int:
        with self._reading(name) as shelf:
            return shelf.count(condition)


class NumpyStore(ShelfStore):
    """A vector store in the memory of its process, exact and without a trace: `cleanup` forgets everything.

    A search compares with every entry, which for up to some hundred thousand of them is as fast as an index.
    The arguments are those of `VectorStore`.
    """

    _shelves: dict[str, Shelf] | None = None

    def setup(self) -> None:
        """Begin without collections.

        Raises:
            MissingExtraError: numpy is not installed.
        """
        load("numpy", "vector")
        self._shelves = {}

    def cleanup(self) -> None:
        """Forget everything."""
        self._shelves = None

    def health(self) -> bool:
        """Return whether it is open."""
        return self._shelves is not None

    @property
    def _open(self) -> dict[str, Shelf]:
        if self._shelves is None:
            raise closed_error(self)
        return self._shelves

    def _shape(self, name: str) -> Shape | None:
        shelf = self._open.get(name)
        return None if shelf is None else shelf.shape

    def _create(self, name: str, shape: Shape) -> None:
        self._open[name] = Shelf(shape)

    def _write(self, name: str, rows: Rows) -> None:
        self._open[name].put(rows)

    def _remove(self, name: str, ids: Sequence[str]) -> None:
        self._open[name].remove(ids)

    def _reading(self, name: str) -> AbstractContextManager[Shelf]:
        return nullcontext(self._open[name])

    def _names(self) -> Collection[str]:
        return list(self._open)

    def _discard(self, name: str) -> None:
        del self._open[name]
