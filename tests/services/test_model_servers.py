"""Model servers as commands, with a program on PATH that has their command lines."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from sage import Cleanliness, GraphError, JobError, JobReport, LocalEnvironment
from sage.services.models.openai import OpenAILLM
from sage.services.models.servers import serve_command
from sage.testing import assert_clean


@pytest.fixture(autouse=True)
def _programs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    (tmp_path / "bin").mkdir()
    code = Path(__file__).with_name("model_server.py").read_text()
    for name in ("vllm", "llama-server", "ollama"):
        program = tmp_path / "bin" / name
        program.write_text(f"#!{sys.executable}\n{code}")
        program.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path / "bin"), prepend=":")
    monkeypatch.setenv("NOTED", str(tmp_path / "noted"))
    for name in ("HTTP_PROXY", "ALL_PROXY", "http_proxy", "all_proxy"):
        monkeypatch.delenv(name, raising=False)
    with assert_clean(within_s=5.0, ignore=["shared memory *"]):
        yield


@pytest.fixture
def model(tmp_path: Path) -> Path:
    path = tmp_path / "tiny{q4}.gguf"
    path.write_bytes(b"GGUF")
    return path


def ask(model: str, arguments: Any) -> tuple[list[str], JobReport]:
    """Ask a model behind its server in one job, and return the answer."""
    env = LocalEnvironment("served")
    server = env.register_command("server", **arguments)
    llm = env.register_service("llm", OpenAILLM, model, base_url=server.url)
    results: list[str] = []
    env.from_batch(["where are you?"]).map(llm).sink(results.append)
    return results, env.submit(autostop=True).wait()


def noted(tmp_path: Path) -> Any:
    return json.loads((tmp_path / "noted").read_text())


def test_vllm_serves_a_model(tmp_path: Path) -> None:
    arguments = serve_command("vllm", "org/tiny", name="tiny", words=["--max-model-len", "512"])
    results, report = ask("tiny", arguments)
    assert results == ["here I am"]
    assert report.cleanliness is Cleanliness.CLEAN
    assert report.service("server").exit_code == 0
    found = noted(tmp_path)
    assert found["words"][:4] == ["serve", "org/tiny", "--host", "127.0.0.1"]
    assert found["words"][-2:] == ["--max-model-len", "512"]
    assert found["environment"]["HF_HUB_OFFLINE"] == "1"
    assert found["environment"]["VLLM_NO_USAGE_STATS"] == "1"


def test_vllm_may_download_when_it_is_told_to(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    results, _ = ask("org/tiny", serve_command("vllm", "org/tiny", downloads=True))
    assert results == ["here I am"]
    assert "HF_HUB_OFFLINE" not in noted(tmp_path)["environment"]


def test_llama_serves_a_file(tmp_path: Path, model: Path) -> None:
    """Braces in its name are its own."""
    results, report = ask("tiny{q4}", serve_command("llama.cpp", model, words=["--ctx-size", "512"]))
    assert results == ["here I am"]
    assert report.cleanliness is Cleanliness.CLEAN
    assert noted(tmp_path)["words"][:4] == ["--model", str(model), "--alias", "tiny{q4}"]


def test_ollama_serves_what_was_pulled() -> None:
    for name in ("tiny", "tiny:latest"):
        results, report = ask(name, serve_command("ollama", name))
        assert results == ["here I am"]
        assert report.cleanliness is Cleanliness.CLEAN


def first(error: BaseException) -> BaseException:
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    return error


def test_ollama_says_what_has_to_be_pulled() -> None:
    with pytest.raises(JobError) as caught:
        ask("large", serve_command("ollama", "large"))
    error: BaseException | None = first(caught.value)
    texts = []
    while error is not None:
        texts += [str(error), *getattr(error, "__notes__", [])]
        error = error.__cause__
    assert 'Ollama has no model "large:latest", it has: tiny:latest' in "\n".join(texts)
    assert "ollama pull large" in "\n".join(texts)


def test_a_server_that_fails_says_why(model: Path) -> None:
    model.write_bytes(b"ELF!")
    with pytest.raises(JobError, match="failed to load model: invalid magic characters"):
        ask("tiny", serve_command("llama.cpp", model))


def test_a_program_that_is_not_there_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "bin" / "vllm").unlink()
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))
    with pytest.raises(GraphError, match="command 'vllm' of service \"server\" does not exist"):
        ask("tiny", serve_command("vllm", "tiny"))


@pytest.mark.parametrize(
    ("server", "arguments", "text"),
    [
        ("tgi", {}, "model server 'tgi' is unknown"),
        ("llama.cpp", {}, "the model of llama.cpp, 'm', is not a file"),
        ("ollama", {"name": "other"}, 'Ollama calls the model "m" by its own name'),
        ("ollama", {"downloads": True}, "downloads has no effect on ollama"),
    ],
)
def test_what_makes_no_sense_is_refused(server: Any, arguments: dict[str, Any], text: str) -> None:
    with pytest.raises(GraphError, match=text):
        serve_command(server, "m", **arguments)
    with pytest.raises(GraphError):
        serve_command(server, "", **arguments)
