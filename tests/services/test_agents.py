"""Agents against a real server: the example, new projects, and the loop in each of the ways to ask."""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys
import uuid
from pathlib import Path
from typing import Any

import pytest
from services.models import KEY, opened

from sage.services.models.llm import Answer, Message
from sage.services.models.openai import OpenAILLM
from sage.services.models.tools import called

ROOT = Path(__file__).resolve().parents[2]


def stock(article: str) -> int:
    """Return how many pieces of an article are in stock."""
    return {"rope": 12}[article]


def price(article: str) -> str:
    """Return the price of an article."""
    return f"5 coins for a {article}"


async def streamed(llm: OpenAILLM, turns: list[Message]) -> Answer:
    pieces = llm.astream(turns, tools=[stock, price])
    text = "".join([piece async for piece in pieces])
    assert text == pieces.answer.text
    return pieces.answer


def ask(llm: OpenAILLM, way: str, turns: list[Message]) -> Answer:
    match way:
        case "generate":
            return llm.generate(turns, tools=[stock, price])
        case "agenerate":
            return asyncio.run(llm.agenerate(turns, tools=[stock, price]))
        case "stream":
            pieces = llm.stream(turns, tools=[stock, price])
            assert "".join(pieces) == pieces.answer.text
            return pieces.answer
    return asyncio.run(streamed(llm, turns))


@pytest.mark.parametrize("way", ["generate", "agenerate", "stream", "astream"])
def test_the_model_asks_sees_and_answers(server: str, way: str) -> None:
    turns = [Message("user", "How many pieces of rope?")]
    with opened(OpenAILLM(f"agent/{uuid.uuid4().hex}", base_url=f"{server}/v1", api_key=KEY)) as llm:
        answer = ask(llm, way, turns)
        assert answer.finish_reason == "tool_calls"
        assert [(call.name, call.values()) for call in answer.tool_calls] == [
            ("stock", {"article": "rope"}),
            ("price", {"article": "rope"}),
        ]
        turns += [answer.turn, *(called(call, [stock, price]) for call in answer.tool_calls)]
        assert [turn.text for turn in turns[2:]] == ["12", "5 coins for a rope"]
        assert ask(llm, way, turns).text == "I found 5 coins for a rope."


def run(*words: Any, cwd: Path) -> subprocess.CompletedProcess[str]:
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("SAGE_", "PYTEST_"))}
    return subprocess.run(
        [sys.executable, "-W", "error::ResourceWarning", *words],
        cwd=cwd,
        env={**environment, "PYTHONPATH": str(ROOT / "src")},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=100,
    )


def test_the_example_answers(server: str, tmp_path: Path) -> None:
    """One question at a time; a tool that fails is told to the model."""
    questions = ["Is there rope?", "Is there soap?"]
    ended = run(ROOT / "examples" / "agent.py", f"{server}/open/v1", "agent/example", *questions, cwd=tmp_path)
    assert (ended.returncode, ended.stderr) == (0, "")
    assert ended.stdout.splitlines() == [
        "Is there rope? I found 12.",
        "Is there soap? I found error: KeyError: 'soap'.",
    ]


def test_the_example_ends_with_a_model_that_never_answers(server: str, tmp_path: Path) -> None:
    ended = run(ROOT / "examples" / "agent.py", f"{server}/open/v1", "stubborn/example", "rope?", cwd=tmp_path)
    assert (ended.returncode, ended.stdout) == (0, "")
