"""Clients of the OpenAI protocol against a real server, whatever it does."""

from __future__ import annotations

import asyncio
import json
import logging
import socket
import sys
import threading
import time
import traceback
import urllib.parse
import urllib.request
import uuid
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import aclosing
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from services.models import KEY, opened

from sage import (
    Cleanliness,
    FunctionError,
    Http,
    JobErrorGroup,
    JobReport,
    LocalEnvironment,
    ServiceError,
    ServiceOptions,
    ServiceStartError,
    ServiceTimeoutError,
    ServiceUnavailableError,
)
from sage._legacy.operators import OpenAIGenerator, QAPromptor
from sage.services.models.endpoint import EndpointOptions
from sage.services.models.llm import Answer, Image, LLMService, Message, ToolCall
from sage.services.models.openai import OpenAIEmbeddings, OpenAILLM
from sage.testing import assert_clean

SERVER = [sys.executable, str(Path(__file__).with_name("openai_server.py")), "{port}"]
QUICK = EndpointOptions(timeout_s=20.0, backoff_s=(0.01, 0.02))
ELSEWHERE = ["shared memory *"]
"""What other programs of this machine make meanwhile."""

HASTY = EndpointOptions(timeout_s=0.5, backoff_s=(0.01, 0.02))


@pytest.fixture(autouse=True)
def _nothing_is_left(server: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    for name in ("HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY", "http_proxy", "https_proxy", "all_proxy"):
        monkeypatch.delenv(name, raising=False)
    with assert_clean(within_s=5.0, ignore=ELSEWHERE):
        yield


def llm_of(server: str, model: str = "chat", options: EndpointOptions = QUICK, **settings: Any) -> OpenAILLM:
    return OpenAILLM(
        model, base_url=f"{server}/v1", api_key=settings.pop("api_key", KEY), request_options=options, **settings
    )


def named(behaviour: str) -> str:
    return f"{behaviour}/{uuid.uuid4().hex}"


def seen(server: str, model: str) -> dict[str, Any]:
    with urllib.request.urlopen(f"{server}/seen?model={urllib.parse.quote(model)}") as answer:
        found: dict[str, Any] = json.load(answer)
        return found


def wait_for(condition: Callable[[], object]) -> None:
    due = time.monotonic() + 20.0
    while not condition():
        assert time.monotonic() < due
        time.sleep(0.01)


def notes(error: BaseException) -> str:
    return " ".join(getattr(error, "__notes__", []))


def ask(llm: LLMService, way: str, prompt: str = "hello there", **settings: Any) -> str:
    """Return an answer in one of the four ways there are to ask."""

    async def in_pieces() -> str:
        return "".join([piece async for piece in llm.astream(prompt, **settings)])

    match way:
        case "generate":
            return llm.generate(prompt, **settings).text
        case "agenerate":
            return asyncio.run(llm.agenerate(prompt, **settings)).text
        case "stream":
            return "".join(llm.stream(prompt, **settings))
        case _:
            return asyncio.run(in_pieces())


WAYS = ["generate", "agenerate", "stream", "astream"]
every_way = pytest.mark.parametrize("way", WAYS)


@every_way
def test_an_answer_comes_and_its_tokens_are_counted(server: str, way: str) -> None:
    with opened(llm_of(server)) as llm:
        assert ask(llm, way) == "You said: hello there"
        assert ask(llm, way, max_tokens=3) == "You said: hello"
        measures = llm.measures()
    assert (measures[way].calls, measures[way].errors) == (2, 0)
    assert measures["prompt_tokens"].items == 14
    assert measures["completion_tokens"].items == 7


def test_an_answer_says_what_the_server_said(server: str) -> None:
    with opened(llm_of(server)) as llm:
        assert llm.generate("hi") == Answer("You said: hi", "chat", "stop", 7, 3)
        assert llm.generate("a b c", max_tokens=3) == Answer("You said: a", "chat", "length", 7, 3)
        messages = [Message("system", "be"), Message("user", "brief now")]
        assert llm.generate("half \ud800").text == "You said: half ?"
        assert llm.process(messages) == "You said: be brief now"
        assert llm.generate("one STOP two", stop="STOP").text == "You said: one "


def test_settings_reach_the_server(server: str) -> None:
    model = named("settings")
    settings: dict[str, Any] = {"token_limit": "max_completion_tokens", "extra": {"top_k": 3}}
    with opened(llm_of(server, model, **settings)) as llm:
        sent = json.loads(llm.generate("hi", max_tokens=5, temperature=0.0, stop=["a", "b"]).text)
    assert sent == {
        "model": model,
        "max_completion_tokens": 5,
        "temperature": 0.0,
        "stop": ["a", "b"],
        "top_k": 3,
    }


def add(first: int, second: int = 1) -> int:
    """Add two numbers."""
    return first + second


ADD = {
    "type": "function",
    "function": {
        "name": "add",
        "description": "Add two numbers.",
        "parameters": {
            "type": "object",
            "properties": {"first": {"type": "integer"}, "second": {"type": "integer"}},
            "required": ["first"],
        },
    },
}


@every_way
def test_tools_images_and_the_form_of_the_answer_reach_the_server(server: str, way: str, tmp_path: Path) -> None:
    (tmp_path / "dot.png").write_bytes(b"\x89PNG")
    call = ToolCall("c1", "add", '{"first": 1}')
    prompt = [
        Message("user", ["What is", Image.read(tmp_path / "dot.png"), {"type": "audio", "audio": {"id": "a"}}]),
        Message("assistant", "", (call,)),
        Message("tool", "2", tool_call_id="c1"),
    ]
    form = {"type": "json_schema", "json_schema": {"name": "sum", "schema": {"type": "object"}}}
    settings: dict[str, Any] = {"tools": [add, ADD], "tool_choice": "add", "response_format": form}
    with opened(llm_of(server, named("settings/all"))) as llm:
        sent = json.loads(ask(llm, way, prompt, **settings))  # type: ignore[arg-type]
    assert sent["messages"] == [
        {
            "role": "user",
            "content": [
                {"type": "text", "text": "What is"},
                {"type": "image_url", "image_url": {"url": "data:image/png;base64,iVBORw=="}},
                {"type": "audio", "audio": {"id": "a"}},
            ],
        },
        {
            "role": "assistant",
            "content": None,
            "tool_calls": [{"id": "c1", "type": "function", "function": {"name": "add", "arguments": '{"first": 1}'}}],
        },
        {"role": "tool", "content": "2", "tool_call_id": "c1"},
    ]
    assert sent["tools"] == [ADD, ADD]
    assert sent["tool_choice"] == {"type": "function", "function": {"name": "add"}}
    assert sent["response_format"] == form


def test_a_setting_that_is_not_known_is_refused(server: str) -> None:
    with opened(llm_of(server)) as llm:
        for way in WAYS:
            with pytest.raises(TypeError, match="maximum"):
                ask(llm, way, maximum=3)
        with pytest.raises(ValueError, match=r"tool_choice is 'sub', which is not one of .* the tools \['add'\]"):
            llm.generate("hi", tools=[add], tool_choice="sub")


def test_pieces_come_before_the_end(server: str) -> None:
    model = named("stuck")
    with opened(llm_of(server, model)) as llm:
        pieces = llm.stream("and no more")
        assert [next(pieces), next(pieces)] == ["You", " said:"]
        pieces.close()
        # The reader has enough: the server is told by the end of the connection.
        wait_for(lambda: seen(server, model)["left"] == 1)
        assert llm.measures()["stream"].errors == 0


def test_pieces_that_nobody_wants_are_not_fetched(server: str) -> None:
    """Of the asynchronous kind."""
    model = named("stuck")

    async def first(llm: OpenAILLM) -> str:
        async with aclosing(llm.astream("and no more")) as pieces:
            async for piece in pieces:
                return str(piece)
        return ""

    with opened(llm_of(server, model)) as llm:
        assert asyncio.run(first(llm)) == "You"
        wait_for(lambda: seen(server, model)["left"] == 1)


@every_way
def test_a_server_that_asks_for_patience_gets_it(server: str, way: str) -> None:
    model = named("limited")
    with opened(llm_of(server, model)) as llm:
        assert ask(llm, way) == "You said: hello there"
        assert llm.measures()["retries"].calls == 1
    assert seen(server, model)["pauses_s"][0] >= 0.4


@every_way
def test_a_server_error_is_tried_again(server: str, way: str) -> None:
    model = named("flaky")
    with opened(llm_of(server, model)) as llm:
        assert ask(llm, way) == "You said: hello there"
        assert llm.measures()["retries"].calls == 2
    assert seen(server, model)["asked"] == 3


@pytest.mark.parametrize(
    ("behaviour", "kind", "text", "note", "tries"),
    [
        ("down", ServiceError, "answered 503 for model", "", 3),
        ("unknown", ServiceError, "does not exist", "/v1/models", 1),
        ("picky", ServiceError, "answered 400 .*not to my liking", "", 1),
        ("closed", ServiceError, "answered 429 .*come back tomorrow", "It asks to wait for 86400 s", 1),
        ("penniless", ServiceError, "no money left", "", 1),
        ("malformed", ServiceError, "gave a malformed answer", "", 1),
        ("page", ServiceError, "gave a malformed answer", "", 1),
        ("odd", ServiceError, "gave a malformed answer .*surprise", "", 1),
    ],
)
@pytest.mark.parametrize("way", ["generate", "agenerate"])
def test_what_goes_wrong_is_told(
    server: str, way: str, behaviour: str, kind: type[Exception], text: str, note: str, tries: int
) -> None:
    model = named(behaviour)
    options = EndpointOptions(retries_max=2, backoff_s=(0.01, 0.02))
    with opened(llm_of(server, model, options)) as llm:
        with pytest.raises(kind, match=text) as caught:
            ask(llm, way)
        assert llm.measures()[way].errors == 1
    assert f"model server {server}/v1 " in str(caught.value)
    assert f'model "{model}"' in str(caught.value)
    assert note in notes(caught.value)
    assert seen(server, model)["asked"] == tries
    assert ("in 3 tries" in str(caught.value)) == (tries == 3)


@pytest.mark.parametrize("way", ["stream", "astream"])
@pytest.mark.parametrize(
    ("behaviour", "text"),
    [
        ("broken", "cannot be reached|broke off"),
        ("cut", "the stream ended before the answer did"),
        ("garbled", "gave a malformed answer"),
        ("unknown", "answered 404"),
    ],
)
def test_a_stream_that_breaks_is_told(server: str, way: str, behaviour: str, text: str) -> None:
    model = named(behaviour)
    with opened(llm_of(server, model)) as llm:
        with pytest.raises(ServiceError, match=text):
            ask(llm, way)
        assert llm.measures()[way].errors == 1
        # What was read of it has been passed on already, so it is not asked for again.
        assert seen(server, model)["asked"] == 1


@every_way
def test_a_slow_server_is_not_waited_for(server: str, way: str) -> None:
    model = named("slow" if way in ("generate", "agenerate") else "stuck")
    with opened(llm_of(server, model, HASTY)) as llm:
        with pytest.raises(ServiceTimeoutError, match=r"was silent for 0\.5 s") as caught:
            ask(llm, way)
        assert "Raise timeout_s" in notes(caught.value)
    assert seen(server, model)["asked"] == 1


@every_way
def test_an_unreachable_server_is_named(way: str) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))  # Nobody listens on it.
        url = f"http://127.0.0.1:{taken.getsockname()[1]}/v1"
        with opened(
            OpenAILLM("m", base_url=url, request_options=EndpointOptions(retries_max=2, backoff_s=(0.0, 0.0)))
        ) as llm:
            with pytest.raises(ServiceUnavailableError, match=f"{url} cannot be reached in 3 tries: ") as caught:
                ask(llm, way)
            assert llm.measures()["retries"].calls == 2
    assert "Check that it is running" in notes(caught.value)


@pytest.mark.parametrize("way", ["generate", "stream"])
def test_stop_lets_go_who_waits(server: str, way: str) -> None:
    model = named("slow" if way == "generate" else "stuck")
    with opened(llm_of(server, model)) as llm, ThreadPoolExecutor(1) as thread:
        waits = thread.submit(ask, llm, way)
        wait_for(lambda: seen(server, model)["asked"])
        llm.stop()
        with pytest.raises(ServiceUnavailableError, match="stopped before there was an answer"):
            waits.result()


def test_a_client_belongs_to_the_loop_that_uses_it(server: str) -> None:
    """Loops come and go; each closes its own connections, and the service those of the loops that go on."""
    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_forever)
    thread.start()
    try:
        with opened(llm_of(server)) as llm:
            for _ in range(2):
                assert asyncio.run(llm.agenerate("hi")).text == "You said: hi"
                with assert_clean(within_s=5.0, ignore=ELSEWHERE):
                    assert asyncio.run(llm.agenerate("hi")).text == "You said: hi"
            assert asyncio.run_coroutine_threadsafe(llm.agenerate("hi"), loop).result().text == "You said: hi"
    finally:
        loop.call_soon_threadsafe(loop.stop)
        thread.join()
        loop.close()


def test_a_service_can_end_on_the_loop_that_it_serves(server: str) -> None:
    async def use() -> str:
        with opened(llm_of(server)) as llm:
            return str((await llm.agenerate("hi")).text)

    assert asyncio.run(use()) == "You said: hi"


@every_way
def test_it_says_that_it_is_not_open(server: str, way: str) -> None:
    llm = llm_of(server)
    for _ in range(2):
        with pytest.raises(ServiceUnavailableError, match="is not open") as caught:
            ask(llm, way)
        assert "setup()" in notes(caught.value)
        with opened(llm):
            pass


# --- keys -------------------------------------------------------------------------------------------------------------


@every_way
def test_a_wrong_key_is_refused_and_stays_secret(server: str, way: str, caplog: pytest.LogCaptureFixture) -> None:
    """Also where the server repeats it."""
    caplog.set_level(logging.DEBUG)
    key = "sk-wrong-987654321"
    with opened(llm_of(server, named("chat"), api_key=key)) as llm:
        with pytest.raises(ServiceError, match=r"answered 401 .*Incorrect API key provided: Bearer \*\*\*") as caught:
            ask(llm, way)
        shown = [repr(llm), repr(llm._endpoint._secret), str(llm.describe()), notes(caught.value), str(caught.value)]
    error: BaseException | None = caught.value
    assert caught.value.__context__ is None
    assert caught.value.__cause__ is None
    shown += [repr(error), caplog.text]
    assert [text for text in shown if key in text] == []
    assert "argument api_key" in notes(caught.value)


@pytest.mark.parametrize("place", ["variable", "file"])
def test_a_key_is_read_where_it_is(server: str, place: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "key").write_text(f"{KEY}\n")
    monkeypatch.setenv("MY_KEY", KEY)
    where: dict[str, Any] = {"api_key_env": "MY_KEY"} if place == "variable" else {"api_key_file": tmp_path / "key"}
    with opened(OpenAILLM("chat", base_url=f"{server}/v1", **where)) as llm:
        assert llm.generate("hi").text == "You said: hi"
        assert KEY not in str(llm.describe())
        assert ("MY_KEY" if place == "variable" else str(tmp_path)) in str(llm.describe()["key"])


def test_a_key_that_is_not_there_is_missed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    (tmp_path / "empty").touch()
    for settings, text in [
        ({}, "environment variable OPENAI_API_KEY, which should hold the key, is not set"),
        ({"api_key_env": "NOT_THERE"}, "environment variable NOT_THERE, .* is not set"),
        ({"api_key_file": tmp_path / "none"}, "none', which should hold the key, cannot be read: FileNotFoundError"),
        ({"api_key_file": tmp_path / "empty"}, "empty', which should hold the key, is empty"),
    ]:
        llm = OpenAILLM("m", **settings)  # type: ignore[arg-type]
        with pytest.raises(ServiceError, match=text):
            llm.setup()
        llm.cleanup()
    with pytest.raises(ValueError, match="api_key and by api_key_env"):
        OpenAILLM("m", api_key="secret", api_key_env="X")


def test_the_key_of_openai_goes_nowhere_else(server: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    with opened(OpenAILLM("chat", base_url=f"{server}/open/v1")) as llm:
        assert llm.generate("hi").text == "You said: hi"
        assert asyncio.run(llm.agenerate("hi")).text == "You said: hi"


# --- bad input --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("prompt", "settings", "kind", "text"),
    [
        ("", {}, ValueError, "the prompt is empty"),
        ([], {}, ValueError, "the prompt is empty"),
        (5, {}, TypeError, "the prompt is 5, neither a text nor a list of messages"),
        (["hi"], {}, TypeError, "message 0 of the prompt is 'hi', not a Message"),
        (Message("user", "hi"), {}, TypeError, "one message and not a list"),
        ([Message("user", None)], {}, TypeError, "has the content None"),  # type: ignore[arg-type]
        ([Message("user", [3])], {}, TypeError, "has the part 3, which is not a text"),  # type: ignore[list-item]
        ([Message("tool", "3")], {}, ValueError, 'has the role "tool" and no tool_call_id'),
        ([Message("boss", "hi")], {}, ValueError, "has the role 'boss'"),  # type: ignore[arg-type]
        ("hi", {"max_tokens": 0}, ValueError, "max_tokens is 0"),
        ("hi", {"stop": [""]}, ValueError, "stop has an empty text"),
        ("hi", {"stop": [3]}, TypeError, "stop has 3"),
    ],
)
@every_way
def test_what_cannot_be_asked_is_refused_and_counted(
    server: str, way: str, prompt: Any, settings: dict[str, Any], kind: type[Exception], text: str
) -> None:
    with opened(llm_of(server)) as llm:
        with pytest.raises(kind, match=text):
            ask(llm, way, prompt, **settings)
        assert (llm.measures()[way].calls, llm.measures()[way].errors) == (1, 1)


@pytest.mark.parametrize(
    ("settings", "text"),
    [
        ({"timeout_s": 0}, "timeout_s is 0"),
        ({"retries_max": -1}, "retries_max is -1"),
        ({"backoff_s": (-1, 2)}, "backoff_s is"),
    ],
)
def test_options_that_cannot_work_are_refused(settings: dict[str, Any], text: str) -> None:
    with pytest.raises(ValueError, match=text):
        EndpointOptions(**settings)


def test_an_address_that_is_none_is_refused() -> None:
    with pytest.raises(ValueError, match="base_url is 'localhost:8000', no http address"):
        OpenAILLM("m", base_url="localhost:8000")
    llm = OpenAILLM("m", base_url="http://me:secret@localhost:1/v1?key=secret")
    assert llm.describe()["base_url"] == "http://***@localhost:1/v1"


# --- embeddings -------------------------------------------------------------------------------------------------------


def embeddings_of(server: str, model: str = "embed", **settings: Any) -> OpenAIEmbeddings:
    return OpenAIEmbeddings(model, base_url=f"{server}/v1", api_key=KEY, request_options=QUICK, **settings)


def test_texts_become_vectors_in_batches(server: str) -> None:
    model = named("embed")
    with opened(embeddings_of(server, model, batch_max=3)) as service:
        assert (service.name, service.dimension) == (model, 8)
        texts = ["a", "bb", "ccc", "dddd", "a", "eeeee", "ffffff", "ggggggg"]
        vectors = service.embed(texts)
        assert vectors.dtype == np.float32
        expected = np.array([[len(text) + 1, *range(1, 8)] for text in texts])
        np.testing.assert_allclose(vectors, expected / np.linalg.norm(expected, axis=1, keepdims=True), rtol=1e-6)
        np.testing.assert_array_equal(asyncio.run(service.aembed(texts)), vectors)
        assert service.embed([]).shape == (0, 8)
        measures = service.measures()
    # One request for the dimension, three for seven different texts, none for what is known.
    assert seen(server, model)["asked"] == 4
    assert measures["prompt_tokens"].items == 12
    assert (measures["cache_hits"].items, measures["cache_misses"].items) == (8, 8)


def test_vectors_can_be_shorter(server: str) -> None:
    model = named("embed")
    with opened(embeddings_of(server, model, dimension=5, shortened=True)) as service:
        assert seen(server, model)["asked"] == 0
        assert service.embed_one("a").shape == (5,)
    with (
        opened(embeddings_of(server, model, dimension=5)) as service,
        pytest.raises(ServiceError, match=r"gave an array of shape \(1, 8\) for 1 texts, but its dimension is 5"),
    ):
        service.embed_one("a")
    with pytest.raises(ValueError, match="shortened needs a dimension"):
        embeddings_of(server, shortened=True)


def test_embeddings_survive_a_bad_day(server: str) -> None:
    for behaviour in ("limited", "flaky"):
        with opened(embeddings_of(server, named(behaviour), dimension=8)) as service:
            assert service.embed_one("a").shape == (8,)


@pytest.mark.parametrize(
    ("behaviour", "text"),
    [
        ("unknown", "answered 404 .*does not exist"),
        ("malformed", "malformed answer"),
        ("odd", "malformed answer"),
        ("page", "malformed answer"),
    ],
)
def test_setup_says_what_is_wrong_with_the_model(server: str, behaviour: str, text: str) -> None:
    service = embeddings_of(server, named(behaviour))
    assert service.describe()["dimension"] is None
    with pytest.raises(ServiceError, match=text):
        service.setup()
    service.cleanup()


def test_a_vector_of_zeros_is_told(server: str) -> None:
    text = "gave a vector of zeros, NaN or infinity for 'a'"
    with (
        opened(embeddings_of(server, named("zero"), dimension=8)) as service,
        pytest.raises(ServiceError, match=text),
    ):
        service.embed(["a"])


# --- in jobs ----------------------------------------------------------------------------------------------------------


def first(error: BaseException) -> BaseException:
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    return error


@pytest.mark.slow
def test_a_job_asks_in_every_way_there_is(host: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """With the server as a service of the same job, and the key in a variable."""
    monkeypatch.setenv("MODEL_KEY", KEY)
    env = LocalEnvironment("asks")
    server = env.register_command("server", SERVER, ready=Http("/health"), url="http://127.0.0.1:{port}/v1")
    settings: dict[str, Any] = {"base_url": server.url, "api_key_env": "MODEL_KEY", "request_options": QUICK}
    options = ServiceOptions(host=host, concurrency=4)
    # Plain functions get the answers of coroutine methods, which type checkers cannot know.
    llm: Any = env.register_service("llm", OpenAILLM, "chat", **settings, options=options)
    embeddings: Any = env.register_service("embeddings", OpenAIEmbeddings, "embed", **settings, options=options)

    def ask_all(question: str) -> list[Any]:
        answers = [llm.process(question), llm.generate(question).text, llm.agenerate(question).text]
        vectors = [embeddings(question), embeddings.embed([question])[0], embeddings.aembed([question])[0]]
        return [*answers, *(vector.tolist() for vector in vectors)]

    results: list[Any] = []
    measured: list[Any] = []
    stream = env.from_batch([f"question {number}" for number in range(6)]).map(ask_all, parallelism=3)
    stream.sink(results.append)
    stream.map(lambda _: llm.measures()).sink(measured.append)
    report = env.submit(autostop=True).wait()
    assert report.cleanliness is Cleanliness.CLEAN
    assert len(results) == 6
    for *answers, one, two, three in results:
        assert answers == [answers[0]] * 3
        assert answers[0].startswith("You said: question ")
        assert one == two == three
    assert measured[-1]["completion_tokens"].calls >= 6


def test_a_stream_is_read_where_the_service_runs(server: str) -> None:
    env = LocalEnvironment("streams")
    llm = env.register_service("llm", OpenAILLM, "chat", base_url=f"{server}/v1", api_key=KEY)
    results: list[str] = []
    env.from_batch(["hi"]).flatmap(lambda question: llm.stream(question)).sink(results.append)
    env.submit(autostop=True)
    assert results == ["You", " said:", " hi"]


def test_a_kept_service_serves_the_next_job_on_its_loop(server: str) -> None:
    with LocalEnvironment("keeps") as env:
        llm: Any = env.register_service("llm", OpenAILLM, "chat", base_url=f"{server}/v1", api_key=KEY)
        for _ in range(2):
            results: list[str] = []
            env.from_batch(["hi"]).map(lambda question: llm.agenerate(question).text).sink(results.append)
            env.submit(autostop=True, keep_services=True)
            assert results[0] == "You said: hi"


def test_what_a_job_tells_of_a_wrong_key_has_no_key(server: str, host: Any, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG)
    key = "sk-wrong-987654321"
    env = LocalEnvironment("wrong")
    options = ServiceOptions(host=host)
    llm = env.register_service("llm", OpenAILLM, "chat", base_url=f"{server}/v1", api_key=key, options=options)
    env.from_batch(["hi"]).map(llm).sink(print)
    job = env.submit()
    with pytest.raises((FunctionError, JobErrorGroup)) as caught:
        job.wait()
    error = first(caught.value)
    cause = error.__cause__ or error
    assert "answered 401" in str(cause)
    assert "The key came from argument api_key" in notes(cause)
    assert job.report is not None
    shown = ["".join(traceback.format_exception(caught.value)), json.dumps(job.report.to_dict()), caplog.text]
    assert [text for text in [*shown, env.explain(), str(job.report)] if key in text] == []


def test_a_model_that_is_not_there_fails_the_start(server: str, host: Any) -> None:
    env = LocalEnvironment("unknown")
    options = ServiceOptions(host=host)
    model = named("unknown")
    settings: dict[str, Any] = {"base_url": f"{server}/v1", "api_key": KEY, "options": options}
    env.register_service("embeddings", OpenAIEmbeddings, model, **settings)
    env.from_batch(["hi"]).sink(print)
    with pytest.raises((ServiceStartError, JobErrorGroup)) as caught:
        env.submit(autostop=True)
    error = first(caught.value)
    assert isinstance(error, ServiceStartError)
    assert f"The model `{model}` does not exist" in str(error.__cause__ or error)


def cancelled(server: str, ask_for: Callable[[Any], Callable[[str], Any]], **options: Any) -> JobReport:
    """Return the report of a job that was cancelled while it waited for a model that takes its time."""
    model = named("slow")
    env = LocalEnvironment("cancelled", drain_timeout_s=0.3)
    settings: dict[str, Any] = {"base_url": f"{server}/v1", "api_key": KEY, "options": ServiceOptions(**options)}
    llm = env.register_service("llm", OpenAILLM, model, **settings)
    env.from_batch(["hi"]).map(ask_for(llm)).sink(print)
    job = env.submit()
    wait_for(lambda: seen(server, model)["asked"])
    try:
        job.cancel()
    finally:
        wait_for(lambda: seen(server, model)["left"] == 1)
    return job.wait()


def test_a_cancelled_job_waits_for_no_coroutine(server: str) -> None:
    report = cancelled(server, lambda llm: llm.agenerate)
    assert report.cleanliness is Cleanliness.CLEAN


def test_a_cancelled_job_lets_go_of_a_call_that_waits(server: str, host: Any) -> None:
    """The job cannot end a call of a thread and says so; the end of the service ends it."""
    with pytest.raises(JobErrorGroup, match="did not end in time and was abandoned"):
        cancelled(server, lambda llm: llm.process, host=host, drain_timeout_s=0.2)


def test_the_generator_of_old_programs_asks_the_server(server: str) -> None:
    env = LocalEnvironment("old")
    asked = env.from_batch([{"query": "What?", "results": ["It is a loom."]}, ("Who?", [])]).map(QAPromptor, {})
    config = {"model_name": "chat", "base_url": f"{server}/v1", "api_key": KEY, "seed": 1}
    with_passage, without = asked.map(OpenAIGenerator, config).collect()
    assert with_passage["generated"].endswith("It is a loom. Question: What?")
    assert without == ("Who?", "You said: Answer the question. Give only the answer. Question: Who?")
