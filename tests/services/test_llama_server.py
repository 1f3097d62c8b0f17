"""A real llama.cpp as a command service, with a model of random weights: it starts, answers, dies and starts again."""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from services.kept import left_clean, program
from services.llama_server import WIDTH, write_model

from sage import Cleanliness, LocalEnvironment, Outcome, ServiceOptions, ServiceStartError
from sage.rag import Files, Generate, Index, KeywordIndex, Load, Retrieve, SplitByStructure
from sage.services import EndpointOptions, OpenAIEmbeddings, OpenAILLM
from sage.services.models.servers import serve_command
from sage.testing import StepBackend

if TYPE_CHECKING:
    from collections.abc import Iterator

    from sage.services import Answer

PROMPTS = [f"tell me about number {number}" for number in range(12)]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("model") / "tiny.gguf"
    write_model(path)
    return path


@pytest.fixture(autouse=True)
def server_pid(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Put the program on PATH, and return the file in which it notes its process."""
    here = tmp_path / "bin" / "llama-server"
    here.parent.mkdir()
    code = Path(__file__).with_name("llama_server.py").read_text("utf-8")
    here.write_text(f"#!{sys.executable}\n{code}", encoding="utf-8")
    here.chmod(0o755)
    monkeypatch.setenv("PATH", str(here.parent), prepend=":")
    monkeypatch.setenv("NOTED", str(tmp_path / "pid"))
    with left_clean():
        yield tmp_path / "pid"


def pipeline(model: Path, **options: Any) -> tuple[LocalEnvironment, Any]:
    """Return an environment with the server, and a model behind it that always says the same."""
    env = LocalEnvironment("served")
    server = env.register_command("server", **serve_command("llama.cpp", model, options=ServiceOptions(**options)))
    patient = EndpointOptions(retries_max=10)
    llm = env.register_service("llm", OpenAILLM, "tiny", base_url=server.url, request_options=patient)
    return env, llm


def said(llm: Any, prompt: str) -> Answer:
    answer: Answer = llm.generate(prompt, max_tokens=8, temperature=0.0)
    return answer


def test_it_answers_and_ends_by_itself(model: Path) -> None:
    env, llm = pipeline(model)
    answers: list[Answer] = []
    env.from_batch([*PROMPTS, *PROMPTS]).map(lambda prompt: said(llm, prompt), parallelism=4).sink(answers.append)
    report = env.submit(autostop=True).wait()
    assert len(answers) == 2 * len(PROMPTS)
    assert {(answer.model, answer.finish_reason, answer.completion_tokens) for answer in answers} == {
        ("tiny", "length", 8)
    }
    # Requests that run side by side are computed together, which may round otherwise, but nonsense repeats itself.
    assert 2 <= len({answer.text for answer in answers}) <= 2 * len(PROMPTS)
    assert report.cleanliness is Cleanliness.CLEAN
    assert report.service("server").exit_code == 0


def test_what_streams_is_what_it_says_at_once(model: Path) -> None:
    env, llm = pipeline(model)
    found: list[tuple[list[str], str]] = []

    def both(prompt: str) -> tuple[list[str], str]:
        pieces = list(llm.stream(prompt, max_tokens=8, temperature=0.0))
        return pieces, said(llm, prompt).text

    env.from_batch(PROMPTS[:3]).map(both).sink(found.append)
    env.submit(autostop=True)
    assert len(found) == 3
    for pieces, whole in found:
        assert len(pieces) > 1
        assert "".join(pieces) == whole


def test_embeddings_have_the_width_of_the_model(model: Path) -> None:
    env = LocalEnvironment("embedded")
    server = env.register_command("server", **serve_command("llama.cpp", model, words=["--embeddings"]))
    vectors = env.register_service("vectors", OpenAIEmbeddings, "tiny", base_url=server.url)
    found: list[Any] = []
    env.from_batch([["a tape", "a loom"]]).map(vectors.embed).sink(found.append)
    env.submit(autostop=True)
    assert [batch.shape for batch in found] == [(2, WIDTH)]


def test_a_server_that_is_killed_is_started_again_and_no_answer_is_lost(model: Path, server_pid: Path) -> None:
    env, llm = pipeline(model, restart="on_failure", health_interval_s=0.1, backoff_s=(0.1, 1.0))
    answers: list[Answer] = []

    def killing(prompt: str) -> str:
        if prompt == PROMPTS[5]:
            os.kill(int(server_pid.read_text()), signal.SIGKILL)
        return prompt

    env.from_batch(PROMPTS).map(killing).map(lambda prompt: said(llm, prompt)).sink(answers.append)
    report = env.submit(autostop=True).wait()
    assert len(answers) == len(PROMPTS)
    assert report.service("server").built_count == 2
    assert report.state is Outcome.COMPLETED
    # What is said of the first process is its own: the second one wrote that it has ended.
    (died,) = report.errors
    assert "was ended by SIGKILL, its last line: " in str(died)
    assert "llama-server has ended" not in str(died.__notes__)
    assert "llama-server has ended" in report.service("server").output


def test_a_file_that_is_no_model_is_refused_in_its_own_words(tmp_path: Path) -> None:
    damaged = tmp_path / "damaged.gguf"
    damaged.write_bytes(b"GGUF and nothing else")
    env, llm = pipeline(damaged)
    env.from_batch(PROMPTS).map(llm).sink(print)
    with pytest.raises(ServiceStartError, match="gguf"):
        env.submit(autostop=True)


def test_a_rag_pipeline_is_replayed_a_hundred_times_without_a_server(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The server asks for a key, which is in none of the calls, and a replay needs neither."""
    monkeypatch.setenv("LLAMA_API_KEY", "sk-only-for-the-server")
    (tmp_path / "shop.md").write_text("# Hours\n\nThe shop opens at nine.\n\n# Tape\n\nTape costs two coins.\n")
    calls = tmp_path / "calls.db"

    def answers(way: str, seed: int | None) -> list[tuple[str, tuple[str, ...]]]:
        env = LocalEnvironment("rag", backend=None if seed is None else (lambda: StepBackend(seed)))
        getattr(env, way)(calls)
        server = env.register_command("server", **serve_command("llama.cpp", model))
        words: Any = env.register_service("words", KeywordIndex, tmp_path / "words.db")
        llm: Any = env.register_service(
            "llm", OpenAILLM, "tiny", base_url=server.url, api_key_env="LLAMA_API_KEY", extra={"max_tokens": 8}
        )
        found: list[tuple[str, tuple[str, ...]]] = []
        asked = env.from_batch(["When does the shop open?", "What is a tape?"]).map(Retrieve, 1, keywords=words)
        asked.map(Generate, llm).sink(
            lambda answer: found.append((answer.text, tuple(citation.passage for citation in answer.citations)))
        )
        env.submit(autostop=True)
        return found

    filling = LocalEnvironment("fill")
    index = filling.register_service("words", KeywordIndex, tmp_path / "words.db")
    filling.from_batch(Files, tmp_path / "shop.md").flatmap(Load).flatmap(SplitByStructure).map(
        Index, keywords=index
    ).collect()
    recorded = answers("record_calls", None)
    assert len(recorded) == 2
    assert b"sk-only-for-the-server" not in calls.read_bytes()
    monkeypatch.delenv("LLAMA_API_KEY")
    monkeypatch.setenv("PATH", "/nowhere")
    for seed in range(100):
        assert answers("replay_calls", seed) == recorded


KILLED = """
import os, signal, sys
from sage import LocalEnvironment
from sage.services import OpenAILLM
from sage.services.models.servers import serve_command

env = LocalEnvironment("killed")
server = env.register_command("server", **serve_command("llama.cpp", sys.argv[1]))
llm = env.register_service("llm", OpenAILLM, "tiny", base_url=server.url)

def end(answer):
    print(len(answer) > 0, flush=True)
    os.kill(os.getpid(), signal.SIGKILL)

env.from_batch(["how are you?"]).map(lambda prompt: llm.generate(prompt, max_tokens=8).text).sink(end)
env.run()
"""


def test_it_does_not_outlive_a_driver_that_is_killed(model: Path, tmp_path: Path) -> None:
    with program(KILLED, str(model), folder=tmp_path) as driver:
        assert driver.stdout is not None
        # This ends when the last process that could still write has ended: the server writes to the same place.
        assert driver.stdout.read().splitlines()[0] == "True"
    assert driver.returncode == -signal.SIGKILL
