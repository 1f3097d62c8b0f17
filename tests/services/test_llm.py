"""What every language model keeps to, and what is special of the one that answers with what it is given."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from services.models import KEY, opened

from sage import Cleanliness, LocalEnvironment, ServiceOptions
from sage.services.models.llm import Answer, ExtractiveLLM, Message
from sage.services.models.openai import OpenAILLM
from sage.testing import assert_clean

PROMPT = """Answer with the context only. Name the passages that you use.

Context:
[1] SAGE runs dataflow pipelines. A service is restarted after it failed, at most three times within a minute.
[2] Bananas are yellow. Services are stopped in the reverse order of their start.

Question: How often is a service restarted?
Answer:"""


Kind = partial[Any]
KINDS: dict[str, Callable[[str], Kind]] = {
    "extractive": lambda _: partial(ExtractiveLLM),
    "openai": lambda server: partial(OpenAILLM, "chat", base_url=f"{server}/v1", api_key=KEY),
}


@pytest.fixture(autouse=True)
def _nothing_is_left(tmp_path: Path) -> Iterator[None]:
    with assert_clean(within_s=5.0, ignore=["shared memory *"]):
        yield


@pytest.fixture(scope="module", params=list(KINDS))
def kind(request: pytest.FixtureRequest) -> Kind:
    """Return what makes models of a kind."""
    return KINDS[request.param](request.getfixturevalue("server") if request.param == "openai" else "")


def told(llm: Any, prompt: Any, **settings: Any) -> list[str]:
    """Return what a model says in each of the ways there are to ask."""

    async def pieces() -> str:
        return "".join([piece async for piece in llm.astream(prompt, **settings)])

    return [
        llm.generate(prompt, **settings).text,
        asyncio.run(llm.agenerate(prompt, **settings)).text,
        "".join(llm.stream(prompt, **settings)),
        asyncio.run(pieces()),
    ]


# --- all of them ------------------------------------------------------------------------------------------------------


def test_every_way_gives_the_same_answer(kind: Kind) -> None:
    with opened(kind()) as llm:
        answer = llm.generate(PROMPT)
        assert isinstance(answer, Answer)
        assert answer.text
        assert answer.model == llm.describe()["model"]
        assert answer.finish_reason == "stop"
        assert answer.prompt_tokens is not None
        assert answer.prompt_tokens > 0
        assert answer.completion_tokens == len(answer.text.split())
        assert told(llm, PROMPT) == [answer.text] * 4
        assert told(llm, [Message("user", PROMPT)], temperature=0.0) == [answer.text] * 4
        assert llm.process(PROMPT) == answer.text
        measures = llm.measures()
        assert measures["completion_tokens"].items == 10 * answer.completion_tokens
        assert measures["generate"].errors == 0


def test_an_answer_ends_where_it_is_asked_to(kind: Kind) -> None:
    with opened(kind()) as llm:
        whole = llm.generate(PROMPT).text
        first = whole.split()[:2]
        assert told(llm, PROMPT, max_tokens=2) == [" ".join(first)] * 4
        assert llm.generate(PROMPT, max_tokens=2).finish_reason == "length"
        word = whole.split()[2]
        assert told(llm, PROMPT, stop=[word]) == [whole.partition(word)[0]] * 4


@pytest.mark.parametrize(
    ("prompt", "settings", "error", "text"),
    [
        (" \n", {}, ValueError, "the prompt is empty"),
        (5, {}, TypeError, "neither a text nor a list of messages"),
        ("hi", {"max_tokens": 0}, ValueError, "max_tokens is 0"),
        ("hi", {"stop": ""}, ValueError, "stop has an empty text"),
    ],
)
def test_what_cannot_be_asked_is_refused(
    kind: Kind, prompt: Any, settings: dict[str, Any], error: type[Exception], text: str
) -> None:
    with opened(kind()) as llm:
        for way in (llm.generate, lambda *given, **more: asyncio.run(llm.agenerate(*given, **more))):
            with pytest.raises(error, match=text):
                way(prompt, **settings)
        with pytest.raises(error, match=text):
            next(llm.stream(prompt, **settings))
        assert llm.generate("hi").text


def test_its_health_is_that_of_an_open_service(kind: Kind) -> None:
    llm = kind()
    for _ in range(2):
        assert llm.health() is False
        with opened(llm):
            assert llm.health() is True
    assert llm.health() is False
    assert llm.describe()["service"] == type(llm).__name__


@pytest.mark.slow
def test_it_serves_a_job(kind: Kind, host: Any) -> None:
    env = LocalEnvironment("answers")
    options = ServiceOptions(host=host, concurrency=2)
    llm = env.register_service("llm", kind.func, *kind.args, **kind.keywords, options=options)
    results: list[Any] = []
    prompts = [PROMPT, "What?"]
    env.from_batch(prompts).map(lambda prompt: (llm(prompt), llm.agenerate(prompt).text)).sink(results.append)
    assert env.submit(autostop=True).wait().cleanliness is Cleanliness.CLEAN
    with opened(kind()) as other:
        assert results == [(other.process(prompt),) * 2 for prompt in prompts]


# --- the one that answers with what it is given -----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("prompt", "text"),
    [
        (PROMPT, "A service is restarted after it failed, at most three times within a minute. [1]"),
        (PROMPT.replace("How often is a service restarted", "What is yellow"), "Bananas are yellow. [2]"),
        ("The sky is blue. Grass is green.\n\nWhat colour has the grass?", "Grass is green."),
        ("Context: Dr. No is a film. It is old.\nQuestion: Which film is old?", "Dr. No is a film. It is old."),
        ("数据流是什么。服务会重启。\n\n服务会重启", "服务会重启。"),
        (PROMPT.replace("How often is a service restarted", "Who won"), "The context does not say."),
        ("What?", "The context does not say."),
        ("Context: nothing is asked here", "The context does not say."),
    ],
)
def test_the_best_sentences_are_the_answer(prompt: str, text: str) -> None:
    assert ExtractiveLLM().generate(prompt).text == text


def test_instructions_are_no_context() -> None:
    messages = [
        Message("system", "A service is restarted by you."),
        Message("user", "Hello."),
        Message("assistant", "A service is restarted by me."),
        Message("user", "A service is restarted by SAGE.\n\nWho restarts a service?"),
    ]
    assert ExtractiveLLM().generate(messages).text == "A service is restarted by SAGE."
    messages[0] = Message("system", "Be brief.\nContext: The Eiffel Tower stands in Paris. Its height is 330 m.")
    messages[-1] = Message("user", "Where does the tower stand?")
    assert ExtractiveLLM(sentences_max=1).generate(messages).text == "The Eiffel Tower stands in Paris."


def test_tokens_are_words() -> None:
    answer = ExtractiveLLM().generate("Grass is green and long.\n\nWhat about grass?", max_tokens=3)
    assert (answer.text, answer.finish_reason) == ("Grass is green", "length")
    assert (answer.model, answer.prompt_tokens, answer.completion_tokens) == ("extractive", 8, 3)
    llm = ExtractiveLLM()
    answer = llm.generate("Grass is green and long.\n\nWhat about grass?", stop=["and", "is"])
    assert (answer.text, answer.finish_reason) == ("Grass ", "stop")
    assert llm.measures()["completion_tokens"].items == 1
    assert llm.describe() == {"service": "ExtractiveLLM", "model": "extractive", "sentences_max": 2}


def test_pieces_are_words() -> None:
    llm = ExtractiveLLM()
    pieces = list(llm.stream(PROMPT))
    assert "".join(pieces) == llm.generate(PROMPT).text
    assert len(pieces) > 10


def test_settings_that_cannot_work_are_refused() -> None:
    with pytest.raises(ValueError, match="sentences_max is 0"):
        ExtractiveLLM(sentences_max=0)
    with pytest.raises(ValueError, match="the prompt is empty"):
        ExtractiveLLM().generate(" \n")
    assert ExtractiveLLM(unknown="No idea.").generate("What?").text == "No idea."


def test_a_prompt_that_is_refused_is_counted() -> None:
    llm = ExtractiveLLM()
    with pytest.raises(ValueError, match="the prompt is empty"):
        llm.generate("")
    with pytest.raises(ValueError, match="max_tokens is 0"):
        next(llm.stream("hi", max_tokens=0))
    assert (llm.measures()["generate"].calls, llm.measures()["generate"].errors) == (2, 2)
