"""Embeddings: the contract of services that turn texts into vectors, and one that needs no model."""

from __future__ import annotations

import asyncio
import hashlib
import re
import unicodedata
import zlib
from abc import abstractmethod
from array import array
from operator import and_
from typing import TYPE_CHECKING, NamedTuple, TypedDict, Unpack

from sage._extras import load
from sage.errors import ServiceError, ServiceUnavailableError, hint, short
from sage.services._shared.measures import MeasuredService
from sage.services._shared.sqlite_file import checked_path
from sage.services._shared.validation import checked_whole
from sage.services.models.embedding_cache import EmbeddingCache, MemoryCache, SqliteCache

if TYPE_CHECKING:
    import os
    from collections.abc import Iterable, Iterator, Mapping, Sequence
    from types import ModuleType

    import numpy as np
    from numpy.typing import ArrayLike, NDArray

    Vectors = NDArray[np.float32]

IN_MEMORY = "Leave it out, and the vectors are kept in memory."

PIECE_TOKENS = 50
"""Chosen on the labelled questions in examples/rag; 30 finds about as much and needs twice the vectors."""

CACHE_ENTRIES_MAX = 10_000
BATCH_MAX = 64

HASHING_VERSION = 1
"""Changes whenever the same text gets another vector, so that no cache mixes old and new ones."""

WORD_PATTERN = re.compile(r"\w+")
N_GRAMS = (3, 4)
WORD_WEIGHT, PAIR_WEIGHT, N_GRAM_WEIGHT, FREQUENT_WEIGHT = 1.0, 0.7, 0.35, 0.15

CODE_BITS = 3
WORD_CODE, N_GRAM_CODE, PAIR_CODE, TEXT_CODE = 0, 2, 4, 6
WEIGHTS = [
    factor * weight
    for weight in (WORD_WEIGHT, N_GRAM_WEIGHT, PAIR_WEIGHT, WORD_WEIGHT / FREQUENT_WEIGHT)
    for factor in (FREQUENT_WEIGHT, 1.0)
]
"""The weight of a feature by its code: that of its kind, and 1 more where no frequent word is in it."""

TEXTS_AT_ONCE = 8
"""So many passages have about ten thousand features, of 8 bytes."""

GRAM_BEGIN = zlib.crc32(b"g ")
"""The checksum of an n-gram goes on from here."""

KEPT_WORDS_MAX = 50_000
KEPT_LETTERS_MAX = 40

FREQUENT_WORDS = frozenset(
    WORD_PATTERN.findall(
        "a about an and are as at be been but by can could did do does for from had has have he her his how i if in "
        "into is it its me my no not of on or our she so than that the their them then there these they this those "
        "to was we were what when where which who whom whose why will with would you your"
    )
)
"""Words that say little about the subject of an English text."""


class EmbeddingOptions(TypedDict, total=False):
    """The settings that all embeddings have; see `EmbeddingService`."""

    batch_max: int
    cache_entries_max: int
    cache_path: str | os.PathLike[str] | None


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

    _numpy: ModuleType

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

    @property
    @abstractmethod
    def name(self) -> str:
        """The model's name."""

    @property
    @abstractmethod
    def dimension(self) -> int:
        """How many numbers a vector has."""

    def piece_tokens(self) -> int | None:
        """Return how large the pieces of a passage should be that get vectors of their own beside that of the passage.

        None if pieces are not worth their cost: the vectors know words and no meanings.
        """
        return PIECE_TOKENS

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
            TypeError: `texts` is one string, or one of them is not a string; it is named.
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
        """Return the result of `embed`, and let other coroutines go on meanwhile."""
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
    def _encode(self, texts: list[str]) -> ArrayLike:
        """Return an array of shape (n, dimension); the rows may have any length but zero."""

    async def _aencode(self, texts: list[str]) -> ArrayLike:
        """Return the result of `_encode`; by default from another thread, as computing would hold up the loop."""
        return await asyncio.to_thread(self._encode, texts)

    def _shown_dimension(self) -> int | None:
        """Return the dimension, or None where it is not known before `setup`."""
        return self.dimension

    def _identity(self) -> str:
        """Return the settings that determine the vector of a text."""
        return f"{self.name}/{self.dimension}"

    def _opened(self) -> EmbeddingCache:
        if self._cache is None:
            error = ServiceUnavailableError(f'embedding service "{self.name}" is not set up')
            raise hint(error, "Register it in an environment, or call setup() before and cleanup() after its use.")
        return self._cache


class Rows:
    """The rows of one call: those in the cache, those that are missing, and their places."""

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

    def fill(self, batch: dict[bytes, str], encoded: ArrayLike) -> None:
        """Take the vectors of a batch."""
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

    def __init__(self, dimension: int = 384, **settings: Unpack[EmbeddingOptions]) -> None:
        super().__init__(**settings)
        self._dimension = checked_dimension(dimension)
        self._vocabulary = Vocabulary()

    def piece_tokens(self) -> int | None:
        """Return None: a hashed vector finds a passage by its words, in pieces or not."""
        return None

    @property
    def name(self) -> str:
        """The name of the model: "hashing" and the dimension."""
        return f"hashing-{self._dimension}"

    @property
    def dimension(self) -> int:
        """How many numbers a vector has."""
        return self._dimension

    def _identity(self) -> str:
        return f"{super()._identity()}/{HASHING_VERSION}"

    def _encode(self, texts: list[str]) -> Vectors:
        """Encode some texts at a time, so that the arrays of their features stay in the cache of a processor."""
        parts = [self._encode_some(texts[at : at + TEXTS_AT_ONCE]) for at in range(0, len(texts), TEXTS_AT_ONCE)]
        vectors: Vectors = self._numpy.concatenate(parts)
        return vectors

    def _encode_some(self, texts: list[str]) -> Vectors:
        """Count all features of all texts by sorting them once: a loop over features takes ten times as long."""
        numpy = self._numpy
        coded = [self._vocabulary.features_of(text) for text in texts]
        features = numpy.frombuffer(b"".join(coded), numpy.uint64)
        lengths = numpy.fromiter((len(each) for each in coded), numpy.int64, len(coded)) // features.itemsize
        firsts = features[numpy.cumsum(lengths) - lengths] >> CODE_BITS
        rows = numpy.repeat(numpy.arange(len(texts), dtype=numpy.uint64), lengths)
        keys = rows << numpy.uint64(32 + CODE_BITS)
        keys |= features
        keys.sort()
        # The weight is not part of a feature, and of several weights the last, which is the highest, counts.
        ends = numpy.append(numpy.flatnonzero(keys[1:] ^ keys[:-1] > 1), len(keys) - 1)
        counts = numpy.diff(ends, prepend=-1)
        keys = keys[ends]
        weights = numpy.array(WEIGHTS)[(keys & numpy.uint64(2**CODE_BITS - 1)).astype(numpy.intp)]
        signs, places = self._spread(keys >> numpy.uint64(CODE_BITS))
        cells = (keys >> numpy.uint64(32 + CODE_BITS)).astype(numpy.intp) * self._dimension + places
        sums = numpy.bincount(cells, signs * weights * (1 + numpy.log(counts)), len(texts) * self._dimension)
        vectors: Vectors = sums.reshape(len(texts), self._dimension).astype(numpy.float32)
        blank = numpy.flatnonzero(~vectors.any(axis=1))
        # Features that took each other away; a vector needs a direction.
        vectors[blank, self._spread(firsts[blank])[1]] = 1.0
        return vectors

    def _spread(self, checksums: NDArray[np.uint64]) -> tuple[NDArray[np.float64], NDArray[np.intp]]:
        """Return the sign and the place of features: a checksum alone keeps patterns of its input."""
        numpy = self._numpy
        hashes = (checksums & numpy.uint64(2**32 - 1)) * numpy.uint64(0x9E3779B97F4A7C15) >> numpy.uint64(16)
        signs = numpy.where(hashes & numpy.uint64(1), 1.0, -1.0)
        return signs, ((hashes >> numpy.uint64(1)) % numpy.uint64(self._dimension)).astype(numpy.intp)


def checked_dimension(dimension: object) -> int:
    """Return how many numbers a vector is to have."""
    number = checked_whole("dimension", dimension)
    if number < 1:
        raise ValueError(f"dimension is {number}, but a vector has at least 1 number")
    return number


class Word(NamedTuple):
    """A word and its features."""

    features: bytes
    before: int
    after: bytes
    is_rare: bool


class Vocabulary(dict[str, Word]):
    """The words that have been met, each with its features; any number of threads may use it.

    A feature is coded in 64 bits: the place of its weight in `WEIGHTS` in the lowest bits, above them its checksum.
    """

    def __missing__(self, word: str) -> Word:
        is_rare = word not in FREQUENT_WORDS
        written = word.encode("utf-8", "surrogatepass")
        # Languages that put no spaces between words have theirs of one or two characters.
        sizes = N_GRAMS if word.isascii() else (1, 2, *N_GRAMS)
        letters = [letter.encode("utf-8", "surrogatepass") for letter in f"<{word}>"]
        grams = [b"".join(letters[at : at + size]) for size in sizes for at in range(len(letters) - size + 1)]
        features = array("Q", [zlib.crc32(b"w " + written) << CODE_BITS | WORD_CODE + is_rare])
        features.extend([zlib.crc32(gram, GRAM_BEGIN) << CODE_BITS | N_GRAM_CODE + is_rare for gram in grams])
        found = Word(features.tobytes(), zlib.crc32(b"p %b " % written), written, is_rare)
        if len(word) <= KEPT_LETTERS_MAX:
            if len(self) >= KEPT_WORDS_MAX:
                self.clear()
            self[word] = found
        return found

    def features_of(self, text: str) -> bytes:
        """Return the coded features of a text, each as often as it is met; there is always one."""
        words = [self[word] for word in words_of(text)]
        if not words:
            return array("Q", [coded(f"t {text}", TEXT_CODE)]).tobytes()  # Signs only, or nothing at all.
        features, befores, afters, rarities = zip(*words, strict=True)
        pairs = [
            zlib.crc32(after, before) << CODE_BITS | PAIR_CODE + is_rare
            for after, before, is_rare in zip(afters[1:], befores, map(and_, rarities, rarities[1:]), strict=False)
        ]
        return b"".join(features) + array("Q", pairs).tobytes()


def coded(feature: str, code: int) -> int:
    """Return a feature as a number, of its checksum and the place of its weight."""
    return zlib.crc32(feature.encode("utf-8", "surrogatepass")) << CODE_BITS | code


def words_of(text: str) -> list[str]:
    """Return the words of a text in their order, without case and in one form."""
    if text.isascii():
        return WORD_PATTERN.findall(text.lower())
    return WORD_PATTERN.findall(unicodedata.normalize("NFKC", text).casefold())


def key_of(text: str) -> bytes:
    """Return the key of a text in a cache, which is short even for a long text."""
    return hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=16).digest()


def well_formed(text: str) -> str:
    """Return a text that can be written as UTF-8: halves of characters, as broken file names have, become "?"."""
    return text.encode("utf-8", "replace").decode()


def texts_of(texts: Iterable[object]) -> list[str]:
    """Return texts as a list."""
    if isinstance(texts, str | bytes):
        raise hint(TypeError(f"texts is {short(texts)}, not a list of texts"), "Call embed_one(text) for one.")
    try:
        given = list(texts)
    except TypeError:
        raise TypeError(f"texts is {short(texts)}, not a list of texts") from None
    found: list[str] = []
    for place, text in enumerate(given):
        if not isinstance(text, str):
            raise TypeError(
                f"text {place} of {len(given)} is {short(text)}, of type {type(text).__name__}, not a string"
            )
        found.append(text)
    return found
