"""Model servers as commands: the arguments of `env.register_command` for vLLM, llama.cpp and Ollama."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from http.client import HTTPConnection, HTTPException
from typing import TYPE_CHECKING, Literal, TypedDict

from sage.command import Http
from sage.errors import GraphError, hint, short
from sage.service import ServiceOptions

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from sage.command import Ready, RunningCommand, Word

Server = Literal["vllm", "llama.cpp", "ollama"]

URL = "http://{host}:{port}/v1"
PROBE_TIMEOUT_S = 2.0

LOADING = ServiceOptions(start_timeout_s=600.0, kill_grace_s=15.0)
"""Large models take minutes to load, and give their memory back slowly."""

NO_DOWNLOAD = {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1"}
NO_REPORTS = {"VLLM_NO_USAGE_STATS": "1", "DO_NOT_TRACK": "1"}


class CommandArguments(TypedDict):
    """Arguments of `env.register_command`, without the name."""

    argv: Sequence[Word]
    ready: Ready
    health: Ready
    env: dict[str, Word]
    url: str
    options: ServiceOptions


@dataclass(frozen=True, slots=True)
class OllamaHas:
    """Ready when an Ollama server answers and has the model."""

    model: str

    def __call__(self, command: RunningCommand) -> bool:
        """Ask the server for its models."""
        connection = HTTPConnection(command.host, command.port, timeout=PROBE_TIMEOUT_S)
        try:
            connection.request("GET", "/api/tags")
            names = [str(model["name"]) for model in json.loads(connection.getresponse().read())["models"]]
        except HTTPException as error:
            raise ConnectionError(str(error)) from error
        finally:
            connection.close()
        wanted = self.model if ":" in self.model else f"{self.model}:latest"
        if wanted not in names:
            missing = LookupError(f'Ollama has no model "{wanted}", it has: {", ".join(names) or "none"}')
            raise hint(missing, f"Fetch it first: ollama pull {self.model}")
        return True


def serve_command(
    server: Server,
    model: str | os.PathLike[str],
    *,
    name: str | None = None,
    words: Sequence[str] = (),
    downloads: bool = False,
    options: ServiceOptions = LOADING,
) -> CommandArguments:
    """Return the arguments of `env.register_command` for a model server: `**serve_command("vllm", model="...")`.

    The server listens on 127.0.0.1 alone, or on a cluster, on the address of its node, on a free port. The handle's
    `url` is the `base_url` of `OpenAILLM` and `OpenAIEmbeddings`. A server that is to ask for a key reads it from its
    own environment variable, VLLM_API_KEY or LLAMA_API_KEY, which it inherits.

    Args:
        server: which one; its program, `vllm`, `llama-server` or `ollama`, has to be on PATH.
        model: a folder or a name in the local cache for vLLM, a GGUF file for llama.cpp, a model that was pulled for
            Ollama.
        name: the model's name in requests; by default as above. Ollama has names of its own.
        words: further words of the command line.
        downloads: whether vLLM may fetch a model that is not on this machine.
        options: how the server is started, watched and stopped; it may take ten minutes to start by default.

    Raises:
        GraphError: the server is unknown, or an argument has no meaning for it.
    """
    make = SERVERS.get(server)
    if make is None:
        raise hint(GraphError(f"model server {short(server)} is unknown"), f"Known are: {', '.join(SERVERS)}.")
    if downloads and server != "vllm":
        raise GraphError(f"downloads has no effect on {server}, which serves what is on this machine")
    path = os.fspath(model)
    if not path:
        raise GraphError(f"the model of {server} is an empty text")
    arguments = make(path, name, options)
    if downloads:
        arguments["env"] = {key: value for key, value in arguments["env"].items() if key not in NO_DOWNLOAD}
    arguments["argv"] = [*arguments["argv"], *map(plain, words)]
    return arguments


def plain(word: str) -> str:
    """Return a word whose braces stand for themselves."""
    return word.replace("{", "{{").replace("}", "}}")


def _vllm(model: str, name: str | None, options: ServiceOptions) -> CommandArguments:
    named = ["--served-model-name", plain(name)] if name is not None else []
    argv = ["vllm", "serve", plain(model), "--host", "{host}", "--port", "{port}", *named]
    # It answers 200 at /health as soon as the model is loaded, and 503 when its engine has died.
    return _arguments(argv, Http("/health"), {**NO_DOWNLOAD, **NO_REPORTS}, options)


def _llama(model: str, name: str | None, options: ServiceOptions) -> CommandArguments:
    if not os.path.isfile(model):
        raise hint(GraphError(f"the model of llama.cpp, {model!r}, is not a file"), "It is a file in the format GGUF.")
    alias = name if name is not None else os.path.basename(model).removesuffix(".gguf")
    argv = ["llama-server", "--model", plain(os.path.abspath(model)), "--alias", plain(alias)]
    # It answers 503 at /health while it loads the model.
    return _arguments([*argv, "--host", "{host}", "--port", "{port}"], Http("/health"), {}, options)


def _ollama(model: str, name: str | None, options: ServiceOptions) -> CommandArguments:
    if name is not None:
        raise GraphError(f'Ollama calls the model "{model}" by its own name, not {short(name)}')
    return _arguments(["ollama", "serve"], OllamaHas(model), {"OLLAMA_HOST": "{host}:{port}"}, options)


def _arguments(
    argv: Sequence[Word], ready: Ready, environment: dict[str, str], options: ServiceOptions
) -> CommandArguments:
    return {"argv": argv, "ready": ready, "health": ready, "env": {**environment}, "url": URL, "options": options}


SERVERS: dict[str, Callable[[str, str | None, ServiceOptions], CommandArguments]] = {
    "vllm": _vllm,
    "llama.cpp": _llama,
    "ollama": _ollama,
}
