"""Language models in jobs that ask many questions at once, and go on where there is no answer."""

from __future__ import annotations

import json
import urllib.parse
import urllib.request
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from services.kept import left_clean
from services.models import KEY

from sage import (
    Cleanliness,
    DeadLetter,
    LocalEnvironment,
    ServiceError,
    ServiceOptions,
    ServiceTimeoutError,
)
from sage.rag.documents import Passage
from sage.rag.retrieval import Index
from sage.services.models.endpoint import EndpointOptions, RefusedError
from sage.services.models.llm import Answer
from sage.services.models.openai import OpenAIEmbeddings, OpenAILLM
from sage.services.vectors.numpy import NumpyStore

QUESTIONS = [f"question {number}" for number in range(30)]
AT_ONCE = 6
HASTY = EndpointOptions(timeout_s=0.5, retries_max=1, backoff_s=(0.01, 0.02))

hosts = pytest.mark.parametrize("host", ["inline", "process"])


@pytest.fixture(autouse=True)
def _nothing_is_left(server: str, tmp_path: Path) -> Iterator[None]:
    with left_clean():
        yield


def open_max(server: str, model: str) -> int:
    with urllib.request.urlopen(f"{server}/seen?model={urllib.parse.quote(model)}") as answer:
        return int(json.load(answer)["open_max"])


def registered(env: LocalEnvironment, server: str, model: str, host: Any, **settings: Any) -> Any:
    options = ServiceOptions(host=host, concurrency=AT_ONCE)
    given = {"base_url": f"{server}/v1", "api_key": KEY}
    return env.register_service(f"llm {model}", OpenAILLM, model, options=options, **given | settings)


@hosts
@pytest.mark.parametrize("ordered", [True, False])
def test_many_questions_are_asked_at_once(server: str, host: Any, ordered: bool) -> None:
    """By a coroutine that awaits the service through its handle; the first answers take longest to come."""
    model = f"uneven/{uuid.uuid4().hex}"
    answers: list[str] = []
    env = LocalEnvironment("asks")
    llm = registered(env, server, model, host)

    async def ask(question: str) -> str:
        answer: Answer = await llm.agenerate(question, max_tokens=50)
        return answer.text

    env.from_batch(QUESTIONS).map_async(ask, concurrency=20, ordered=ordered).sink(answers.append)
    report = env.submit(autostop=True).wait()
    assert report.cleanliness is Cleanliness.CLEAN
    expected = [f"You said: {question}" for question in QUESTIONS]
    assert (answers == expected) == ordered
    assert sorted(answers) == sorted(expected)
    assert 2 <= open_max(server, model) <= AT_ONCE


@hosts
def test_a_method_of_the_service_may_be_the_function(server: str, host: Any) -> None:
    answers: list[Answer] = []
    env = LocalEnvironment("asks")
    llm = registered(env, server, "chat", host)
    env.from_batch(QUESTIONS).map_async(llm.agenerate, concurrency=10).sink(answers.append)
    env.submit(autostop=True)
    assert answers == [Answer(f"You said: {question}", "chat", "stop", 7, 4) for question in QUESTIONS]


@hosts
def test_vectors_are_awaited_too(server: str, host: Any) -> None:
    widths: list[int] = []
    env = LocalEnvironment("embeds")
    options = ServiceOptions(host=host, concurrency=AT_ONCE)
    settings: dict[str, Any] = {"base_url": f"{server}/v1", "api_key": KEY, "batch_max": 2, "options": options}
    embeddings = env.register_service("embeddings", OpenAIEmbeddings, "embed", **settings)

    async def embed(count: int) -> int:
        vectors = await embeddings.aembed([f"{count} {number}" for number in range(count)])
        return len(vectors)

    env.from_batch(range(20)).map_async(embed, concurrency=5).sink(widths.append)
    env.submit(autostop=True)
    assert widths == list(range(20))


# --- where there is no answer -----------------------------------------------------------------------------------------

MODELS: dict[str, dict[str, Any]] = {
    "chat": {},
    "slow": {},
    "down": {},
    "refused": {"api_key": "sk-wrong-987654321"},
}
RECORDS = [(name, f"question {number}") for number in range(2) for name in MODELS]
SAID = {
    "slow": (ServiceTimeoutError, "was silent for 0.5 s"),
    "down": (ServiceError, "answered 503 for model"),
    "refused": (ServiceError, "answered 401 for model"),
}


def asking(env: LocalEnvironment, server: str, host: Any, way: str) -> Callable[[tuple[str, str]], Any]:
    """Return a function that asks the model which a record names."""
    models = {
        name: registered(env, server, f"{name}/{uuid.uuid4().hex}", host, request_options=HASTY, **settings)
        for name, settings in MODELS.items()
    }

    def ask(record: tuple[str, str]) -> str:
        name, question = record
        return str(models[name].generate(question).text)

    async def ask_and_await(record: tuple[str, str]) -> str:
        name, question = record
        return str((await models[name].agenerate(question)).text)

    return ask if way == "map" else ask_and_await


@hosts
@pytest.mark.parametrize("way", ["map", "map_async"])
def test_a_record_without_an_answer_becomes_a_letter(server: str, host: Any, way: str) -> None:
    answers: list[str] = []
    letters: list[DeadLetter] = []
    env = LocalEnvironment("goes on")
    failed = env.dead_letters("failed")
    stream = env.from_batch(RECORDS)
    getattr(stream, way)(asking(env, server, host, way), name="ask", on_error=failed).sink(answers.append)
    failed.sink(letters.append)
    report = env.submit(autostop=True).wait()
    assert report.cleanliness is Cleanliness.CLEAN
    assert sorted(answers) == [f"You said: question {number}" for number in range(2)]
    assert sorted(letter.value for letter in letters) == sorted(record for record in RECORDS if record[0] != "chat")
    for letter in letters:
        kind, text = SAID[letter.value[0]]
        assert isinstance(letter.error, kind)
        assert text in str(letter.error)
        assert f"model server {server}/v1 " in str(letter.error)
        assert (letter.operator, letter.attempts) == ("ask", 1)
        assert "sk-wrong" not in f"{letter}"


@hosts
@pytest.mark.parametrize("way", ["map", "map_async"])
def test_a_record_without_an_answer_is_skipped_and_counted(server: str, host: Any, way: str) -> None:
    answers: list[str] = []
    env = LocalEnvironment("goes on")
    stream = env.from_batch(RECORDS)
    getattr(stream, way)(asking(env, server, host, way), name="ask", on_error="skip").sink(answers.append)
    report = env.submit(autostop=True).wait()
    assert sorted(answers) == [f"You said: question {number}" for number in range(2)]
    assert report.operator("ask").failed == 6


# --- a batch of which the server does not take one text -------------------------------------------------------------


@hosts
@pytest.mark.parametrize("model", ["embed", "angry/1"])  # a server may say of a text that is too long 400 or 500
@pytest.mark.parametrize("cache_entries_max", [0, 1000])
def test_of_a_batch_the_text_that_is_refused_fails_alone(
    server: str, host: Any, model: str, cache_entries_max: int
) -> None:
    env = LocalEnvironment("indexes")
    settings: dict[str, Any] = {"base_url": f"{server}/v1", "api_key": KEY, "cache_entries_max": cache_entries_max}
    options = ServiceOptions(host=host)
    embeddings = env.register_service("embeddings", OpenAIEmbeddings, model, dimension=8, options=options, **settings)
    vectors = env.register_service("vectors", NumpyStore, 8)
    passages = [Passage(str(number), f"text {number}" * (1500 if number == 5 else 1), "d") for number in range(8)]
    failed: list[DeadLetter] = []
    stored: list[str] = []
    dead = env.dead_letters()
    dead.sink(failed.append)
    index = env.from_batch(passages).map_batches(
        Index, vectors=vectors, embeddings=embeddings, max_records=8, on_error=dead
    )
    index.map(lambda passage: passage.id).sink(stored.append)
    env.submit(autostop=True)
    assert stored == ["0", "1", "2", "3", "4", "6", "7"]
    (letter,) = failed
    assert isinstance(letter.error.__cause__ or letter.error, RefusedError)
    assert "maximum context length is 256 tokens" in str(letter.error)
