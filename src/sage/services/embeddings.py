"""Embeddings: the contract of services that turn texts into vectors, and one that needs no model."""

from __future__ import annotations

import asyncio
import hashlib
import math
import re
import unicodedata
import zlib
from abc import abstractmethod
from collections import Counter
from itertools import pairwise
from typing import TYPE_CHECKING, Any

from sage.errors import ServiceError, ServiceUnavailableError, hint, short
from sage.services.embedding_cache import EmbeddingCache, MemoryCache, SqliteCache
from sage.services.extras import load
from sage.services.measures import MeasuredService
from sage.services.sqlite_file import checked_path
from sage.services.values import checked_whole

if TYPE_CHECKING:
    import os
    from collections.abc import Iterator, Mapping, Sequence

    import numpy as np
    from numpy.typing import NDArray

    Vectors = NDArray[np.float32]

IN_MEMORY = "Leave it out, and the vectors are kept in memory."

CACHE_ENTRIES_MAX = 10_000
BATCH_MAX = 64

HASHING_VERSION = 1
"""Changes whenever the same text gets another vector, so that no cache mixes old and new ones."""

WORD_PATTERN = re.compile(r"\w+")
N_GRAMS = (3, 4)
WORD_WEIGHT, PAIR_WEIGHT, N_GRAM_WEIGHT, FREQUENT_WEIGHT = 1.0, 0.7, 0.35, 0.15

FREQUENT_WORDS = frozenset(
    WORD_PATTERN.findall(
        "a about an and are as at be been but by can could did do does for from had has have he her his how i if in "
        "into is it its me my no not of on or our she so than that the their them then there these they this those "
        "to was we were what when where which who whom whose why will with would you your"
    )
)
"""Words that say little about what an English text is about."""


class EmbeddingService(MeasuredService):
    """Turns texts into vectors of length 1; the same text always gets the same vector.

    An implementation gives `name`, `dimension` and `_encode`, which any number of threads may call at once. It gets
    batches of at most `batch_max` texts that are neither in the cache nor twice in the call.

    Args:
        batch_max: how many texts the model is given at once.
        cache_entries_max: how many vectors are kept; 0 turns the cache off.
        cache_path: an SQLite file that keeps them beyond the job, instead of memory. Where it fails while the service
            runs, the log says so once and memory takes its place.
    """

    def __init__(
        self,
        *,
        batch_max: int = BATCH_MAX,
        cache_entries_max: int = CACHE_ENTRIES_MAX,
        cache_path: str | os.PathLike[str] | None = None,
    ) -> None:
        super().__init__()
        if checked_whole("batch_max", batch_max) < 1:
            raise ValueError(f"batch_max is {batch_max}, but a batch has at least 1 text")
        if checked_whole("cache_entries_max", cache_entries_max) < 0:
            raise ValueError(f"cache_entries_max is {cache_entries_max}, a negative number of vectors")
        if cache_path is not None:
            checked_path(cache_path, IN_MEMORY, what="cache_path")
        self._batch_max = int(batch_max)
        self._cache_entries_max = int(cache_entries_max)
        self._cache_path = cache_path
        self._cache: EmbeddingCache | None = None
        self._numpy: Any = None

    @property
    @abstractmethod
    def name(self) -> str:
        """The model's name."""

    @property
    @abstractmethod
    def dimension(self) -> int:
        """How many numbers a vector has."""

    def setup(self) -> None:
        """Open the cache. A subclass calls this last, when its dimension is known."""
        self._numpy = load("numpy", "vector")
        if self._cache_path is not None and self._cache_entries_max > 0:
            self._cache = SqliteCache(self._cache_path, self._identity(), self._cache_entries_max)
        else:
            self._cache = MemoryCache(self._cache_entries_max)

    def cleanup(self) -> None:
        """Close the cache."""
        cache, self._cache = self._cache, None
        if cache is not None:
            cache.close()

    def health(self) -> bool:
        """Return whether it is set up."""
        return self._cache is not None

    def describe(self) -> Mapping[str, object]:
        """Return the settings."""
        where = "memory" if self._cache_path is None else str(self._cache_path)
        if self._cache is not None:
            where = self._cache.place
        return {
            **super().describe(),
            "model": self.name,
            "dimension": self._shown_dimension(),
            "batch_max": self._batch_max,
            "cache_entries_max": self._cache_entries_max,
            "cache": where if self._cache_entries_max else "off",
        }

    def embed(self, texts: Sequence[str]) -> Vectors:
        """Return the vectors of texts: float32 array of shape (n, dimension), each row of length 1.

        Raises:
            TypeError: `texts` is one string, or one of them is no string; it is named.
            ServiceError: the model gave something else than a vector for each text.
        """
        with self.measured("embed") as call:
            found = texts_of(texts)
            call.items = len(found)
            rows = Rows(self, found)
            for batch in rows.batches():
                with self.measured("encode", len(batch)):
                    encoded = self._encode(list(batch.values()))
                rows.fill(batch, encoded)
            return rows.array()

    def embed_one(self, text: str) -> Vectors:
        """Return the vector of one text: float32 array of shape (dimension,)."""
        vector: Vectors = self.embed([text])[0]
        return vector

    async def aembed(self, texts: Sequence[str]) -> Vectors:
        """Return what `embed` does, and let other coroutines go on meanwhile."""
        with self.measured("aembed") as call:
            found = texts_of(texts)
            call.items = len(found)
            rows = Rows(self, found)
            for batch in rows.batches():
                with self.measured("encode", len(batch)):
                    encoded = await self._aencode(list(batch.values()))
                rows.fill(batch, encoded)
            return rows.array()

    def process(self, text: str) -> Vectors:
        """Return the vector of one text."""
        return self.embed_one(text)

    @abstractmethod
    def _encode(self, texts: list[str]) -> Any:
        """Return an array of shape (n, dimension); the rows may have any length but zero."""

    async def _aencode(self, texts: list[str]) -> Any:
        """Return what `_encode` does; by default from another thread, as computing would hold up the loop."""
        return await asyncio.to_thread(self._encode, texts)

    def _shown_dimension(self) -> int | None:
        """Return the dimension, or None where it is not known before `setup`."""
        return self.dimension

    def _identity(self) -> str:
        """Return what vectors of the same text have to agree in to be the same."""
        return f"{self.name}/{self.dimension}"

    def _opened(self) -> EmbeddingCache:
        if self._cache is None:
            error = ServiceUnavailableError(f'embedding service "{self.name}" is not set up')
            raise hint(error, "Register it in an environment, or call setup() before and cleanup() after its use.")
        return self._cache


class Rows:
    """The rows of one call: what the cache has of them, what is missing, and where it belongs."""

    def __init__(self, service: EmbeddingService, texts: list[str]) -> None:
        self._service = service
        self._cache = service._opened()
        self._numpy = service._numpy
        self._keys = [key_of(text) for text in texts]
        width = 4 * service.dimension
        known = self._cache.get_many(dict.fromkeys(self._keys)) if texts and service._cache_entries_max else {}
        self._vectors = {key: vector for key, vector in known.items() if len(vector) == width}
        self._missing = {key: text for key, text in zip(self._keys, texts, strict=True) if key not in self._vectors}
        if texts and service._cache_entries_max:
            hits = sum(key in self._vectors for key in self._keys)
            service.counted("cache_hits", hits)
            service.counted("cache_misses", len(texts) - hits)

    def batches(self) -> Iterator[dict[bytes, str]]:
        """Yield the missing texts by key, in batches of texts that are about as long as each other."""
        ordered = sorted(self._missing.items(), key=lambda entry: len(entry[1]))
        size = self._service._batch_max
        for begin in range(0, len(ordered), size):
            yield dict(ordered[begin : begin + size])

    def fill(self, batch: dict[bytes, str], encoded: Any) -> None:
        """Take the vectors of a batch.

        Raises:
            ServiceError: there are others than were asked for, or one has no direction.
        """
        numpy, service = self._numpy, self._service
        vectors = numpy.asarray(encoded, dtype=numpy.float32)
        if vectors.shape != (len(batch), service.dimension):
            raise ServiceError(
                f'model "{service.name}" gave an array of shape {vectors.shape} for {len(batch)} texts, '
                f"but its dimension is {service.dimension}",
                fault="external",
            )
        lengths = numpy.linalg.norm(vectors, axis=1, keepdims=True)
        good = numpy.isfinite(lengths[:, 0]) & (lengths[:, 0] > 0)
        if not good.all():
            text = list(batch.values())[int(numpy.argmin(good))]
            raise ServiceError(
                f'model "{service.name}" gave a vector of zeros, NaN or infinity for {short(text)}', fault="external"
            )
        vectors = vectors / lengths
        new = {key: row.tobytes() for key, row in zip(batch, vectors, strict=True)}
        self._vectors.update(new)
        if service._cache_entries_max:
            self._cache.put_many(new)

    def array(self) -> Vectors:
        """Return the rows in the order of the texts, as an array of its own."""
        joined = bytearray().join([self._vectors[key] for key in self._keys])
        rows: Vectors = self._numpy.frombuffer(joined, self._numpy.float32).reshape(-1, self._service.dimension)
        return rows


class HashingEmbeddings(EmbeddingService):
    """Embeddings of the words themselves, by feature hashing: no model, no download, nothing learnt.

    Each word, each pair of neighbouring words and each run of 3 or 4 letters within a word adds to or takes from one
    number of the vector, which a checksum of it chooses. Texts that share words or parts of words are near; texts that
    say the same in other words are not. It serves examples, tests and search by wording.

    Args:
        dimension: how many numbers a vector has; below a few hundred, features meet by chance too often.
        **settings: those of `EmbeddingService`.
    """

    def __init__(self, dimension: int = 384, **settings: Any) -> None:
        super().__init__(**settings)
        self._dimension = checked_dimension(dimension)

    @property
    def name(self) -> str:
        """What it is: "hashing" and the dimension."""
        return f"hashing-{self._dimension}"

    @property
    def dimension(self) -> int:
        """How many numbers a vector has."""
        return self._dimension

    def _identity(self) -> str:
        return f"{super()._identity()}/{HASHING_VERSION}"

    def _encode(self, texts: list[str]) -> Any:
        numpy = self._numpy
        vectors = numpy.zeros((len(texts), self._dimension), numpy.float32)
        for row, text in zip(vectors, texts, strict=True):
            features = features_of(text)
            hashes = numpy.fromiter(
                (zlib.crc32(feature.encode("utf-8", "surrogatepass")) for feature in features),
                numpy.uint64,
                len(features),
            )
            # A checksum alone keeps patterns of its input; this spreads them over all bits.
            hashes = (hashes * numpy.uint64(0x9E3779B97F4A7C15)) >> numpy.uint64(16)
            signs = numpy.where(hashes & numpy.uint64(1), 1.0, -1.0)
            places = ((hashes >> numpy.uint64(1)) % numpy.uint64(self._dimension)).astype(numpy.intp)
            weights = numpy.fromiter(features.values(), numpy.float64, len(features))
            row += numpy.bincount(places, weights * signs, self._dimension)
            if not row.any():
                row[places[0]] = 1.0  # Features that took each other away; a vector needs a direction.
        return vectors


def checked_dimension(dimension: Any) -> int:
    """Return how many numbers a vector is to have.

    Raises:
        TypeError: it is no whole number.
        ValueError: it is below 1.
    """
    number = checked_whole("dimension", dimension)
    if number < 1:
        raise ValueError(f"dimension is {number}, but a vector has at least 1 number")
    return number


def features_of(text: str) -> dict[str, float]:
    """Return the features of a text, each with its weight; there is always one."""
    words = words_of(text)
    counts: Counter[str] = Counter()
    weights: dict[str, float] = {}
    for word in words:
        weight = FREQUENT_WEIGHT if word in FREQUENT_WORDS else 1.0
        counts[f"w {word}"] += 1
        weights[f"w {word}"] = WORD_WEIGHT * weight
        bounded = f"<{word}>"
        # Languages that put no blanks between words have theirs of one or two signs.
        sizes = N_GRAMS if word.isascii() else (1, 2, *N_GRAMS)
        for size in sizes:
            for begin in range(len(bounded) - size + 1):
                gram = f"g {bounded[begin : begin + size]}"
                counts[gram] += 1
                weights[gram] = max(weights.get(gram, 0.0), N_GRAM_WEIGHT * weight)
    for first, second in pairwise(words):
        counts[f"p {first} {second}"] += 1
        frequent = first in FREQUENT_WORDS or second in FREQUENT_WORDS
        weights[f"p {first} {second}"] = PAIR_WEIGHT * (FREQUENT_WEIGHT if frequent else 1.0)
    if not counts:
        return {f"t {text}": 1.0}  # Signs only, or nothing at all.
    return {feature: weights[feature] * (1 + math.log(count)) for feature, count in counts.items()}


def words_of(text: str) -> list[str]:
    """Return the words of a text in their order, without case and in one form."""
    return WORD_PATTERN.findall(unicodedata.normalize("NFKC", text).casefold())


def key_of(text: str) -> bytes:
    """Return what a text is known by in a cache: short, however long the text is."""
    return hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=16).digest()


def well_formed(text: str) -> str:
    """Return a text that can be written as UTF-8: halves of characters, as broken file names have, become "?"."""
    return text.encode("utf-8", "replace").decode()


def texts_of(texts: Any) -> list[str]:
    """Return texts as a list.

    Raises:
        TypeError: it is one string, or one of them is no string.
    """
    if isinstance(texts, str | bytes):
        raise hint(TypeError(f"texts is {short(texts)}, not a list of texts"), "Call embed_one(text) for one.")
    try:
        found = list(texts)
    except TypeError:
        raise TypeError(f"texts is {short(texts)}, not a list of texts") from None
    for place, text in enumerate(found):
        if not isinstance(text, str):
            raise TypeError(f"text {place} of {len(found)} is {short(text)}, of type {type(text).__name__}, no string")
    return found
