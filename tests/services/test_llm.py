"""The model that answers with what it is given."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from typing import Any

import pytest

from sage import Cleanliness, LocalEnvironment, ServiceOptions
from sage.services.llm import ExtractiveLLM, Message
from sage.testing import assert_clean

PROMPT = """Answer with the context only. Name the passages that you use.

Context:
[1] SAGE runs dataflow pipelines. A service is restarted after it failed, at most three times within a minute.
[2] Bananas are yellow. Services are stopped in the reverse order of their start.

Question: How often is a service restarted?
Answer:"""


@pytest.fixture(autouse=True)
def _nothing_is_left() -> Iterator[None]:
    with assert_clean(within_s=5.0, ignore=["shared memory *"]):
        yield


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


def test_the_same_answer_comes_in_every_way() -> None:
    llm = ExtractiveLLM()
    expected = llm.generate(PROMPT)

    async def pieces() -> list[str]:
        return [piece async for piece in llm.astream(PROMPT)]

    assert llm.process(PROMPT) == expected.text
    assert asyncio.run(llm.agenerate(PROMPT, temperature=0.5)) == expected
    assert "".join(llm.stream(PROMPT)) == expected.text
    assert asyncio.run(pieces()) == list(llm.stream(PROMPT))
    assert len(asyncio.run(pieces())) > 10


def test_its_health_is_that_of_an_open_service() -> None:
    llm = ExtractiveLLM()
    assert llm.health() is False
    llm.setup()
    assert llm.health() is True
    llm.cleanup()
    assert llm.health() is False


def test_settings_that_cannot_work_are_refused() -> None:
    with pytest.raises(ValueError, match="sentences_max is 0"):
        ExtractiveLLM(sentences_max=0)
    with pytest.raises(ValueError, match="the prompt is empty"):
        ExtractiveLLM().generate(" \n")


def test_a_prompt_that_is_refused_is_counted() -> None:
    llm = ExtractiveLLM()
    with pytest.raises(ValueError, match="the prompt is empty"):
        llm.generate("")
    with pytest.raises(ValueError, match="max_tokens is 0"):
        next(llm.stream("hi", max_tokens=0))
    assert (llm.measures()["generate"].calls, llm.measures()["generate"].errors) == (2, 2)


@pytest.mark.slow
def test_it_serves_a_job(host: Any) -> None:
    env = LocalEnvironment("answers")
    options = ServiceOptions(host=host)
    llm = env.register_service("llm", ExtractiveLLM, unknown="No idea.", options=options)
    results: list[Any] = []
    prompts = [PROMPT, "What?"]
    env.from_batch(prompts).map(lambda prompt: (llm(prompt), llm.agenerate(prompt).text)).sink(results.append)
    assert env.submit(autostop=True).wait().cleanliness is Cleanliness.CLEAN
    assert results[0] == (ExtractiveLLM().process(PROMPT),) * 2
    assert results[1] == ("No idea.",) * 2
