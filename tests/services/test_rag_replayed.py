"""A pipeline that retrieves and answers, recorded once with its servers and replayed without a network."""

from __future__ import annotations

import json
import os
import socket
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from services.kept import left_clean
from services.models import KEY
from services.test_limits import seen

from sage import LocalEnvironment, Outcome
from sage.rag.documents import Passage
from sage.rag.generation import Answered, CheckCitations, GenerateAsync
from sage.rag.retrieval import Index, Question, Retrieve
from sage.services.models.openai import OpenAIEmbeddings, OpenAILLM
from sage.services.vectors.numpy import NumpyStore
from sage.testing import StepBackend

PASSAGES = [Passage(str(number), f"Text {number} is about {'abcdefgh'[number] * 5}.", "d") for number in range(8)]
QUESTIONS = [Question(f"What is about {letter * 5}?") for letter in "aceg"]


@pytest.fixture(autouse=True)
def _nothing_is_left(server: str, tmp_path: Path) -> Iterator[None]:
    with left_clean():
        yield


def pipeline(server: str, model: str, results: Path, seed: int | None = None) -> LocalEnvironment:
    """Index the passages, then answer the questions, and write the answers as lines into a file."""
    env = LocalEnvironment("rag", backend=None if seed is None else (lambda: StepBackend(seed)))
    settings: dict[str, Any] = {"base_url": f"{server}/v1", "api_key": os.environ["MODEL_API_KEY"]}
    embeddings = env.register_service("embeddings", OpenAIEmbeddings, model, dimension=8, **settings)
    llm = env.register_service("llm", OpenAILLM, model, **settings)
    vectors = env.register_service("vectors", NumpyStore, 8)

    def shown(answered: Answered) -> str:
        return json.dumps([answered.question.text, answered.text, len(answered.citations)])

    with_all = env.from_batch(PASSAGES).map(Index, vectors=vectors, embeddings=embeddings)
    questions = with_all.filter(lambda passage: passage.id == PASSAGES[-1].id).flatmap(lambda _: QUESTIONS)
    retrieved = questions.map(Retrieve, vectors=vectors, embeddings=embeddings)
    answers = retrieved.map_async(GenerateAsync, llm, concurrency=4).map(CheckCitations)
    answers.map(shown).sink(lambda line: results.write_text(f"{results.read_text()}{line}\n"))
    results.write_text("")
    return env


def replay(server: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, seeds: range) -> None:
    monkeypatch.setenv("MODEL_API_KEY", KEY)
    model = f"chat/{uuid.uuid4().hex}"
    recorded, replayed, calls = (tmp_path / name for name in ("recorded", "replayed", "calls.db"))
    env = pipeline(server, model, recorded)
    env.record_calls(calls)
    assert env.run().state is Outcome.COMPLETED
    assert recorded.read_text().count("\n") == len(QUESTIONS)
    asked = seen(server, model)["asked"]
    assert asked >= len(PASSAGES) + 2 * len(QUESTIONS)
    for file in (calls, *tmp_path.glob("calls.db-*")):
        assert KEY.encode() not in file.read_bytes()

    def refuse(*_: object) -> None:
        raise AssertionError("the network is off")

    with monkeypatch.context() as off:
        for name in ("connect", "connect_ex"):
            off.setattr(socket.socket, name, refuse)
        for seed in seeds:
            env = pipeline(server, model, replayed, seed)
            env.replay_calls(calls)
            assert env.run().state is Outcome.COMPLETED
            assert replayed.read_bytes() == recorded.read_bytes(), seed
    assert seen(server, model)["asked"] == asked


def test_a_pipeline_gives_the_same_bytes_without_a_network(
    server: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    replay(server, tmp_path, monkeypatch, range(3))


@pytest.mark.proof
def test_a_hundred_schedules_give_the_same_bytes_without_a_network(
    server: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    replay(server, tmp_path, monkeypatch, range(100))
