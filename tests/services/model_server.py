"""Stands in for `vllm`, `llama-server` and `ollama`: the same command lines, the same answers, no model.

It is started under the name of the program that it stands in for, and notes in a file what it was given.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import sys
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

PROGRAM = Path(sys.argv[0]).name
LOADING_REQUESTS = 2


def vllm() -> tuple[str, int, str]:
    parser = argparse.ArgumentParser("vllm")
    serve = parser.add_subparsers(required=True).add_parser("serve")
    serve.add_argument("model_tag")
    serve.add_argument("--host", required=True)
    serve.add_argument("--port", type=int, default=8000)
    serve.add_argument("--served-model-name", nargs="+")
    serve.add_argument("--max-model-len", type=int)
    given = parser.parse_args()
    return given.host, given.port, (given.served_model_name or [given.model_tag])[0]


def llama() -> tuple[str, int, str]:
    parser = argparse.ArgumentParser("llama-server")
    parser.add_argument("-m", "--model", required=True)
    parser.add_argument("-a", "--alias")
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", type=int, default=8080)
    parser.add_argument("-c", "--ctx-size", type=int)
    given = parser.parse_args()
    if Path(given.model).read_bytes()[:4] != b"GGUF":
        sys.exit("error: failed to load model: invalid magic characters")
    return given.host, given.port, given.alias or given.model


def ollama() -> tuple[str, int, str]:
    parser = argparse.ArgumentParser("ollama")
    parser.add_subparsers(required=True).add_parser("serve")
    parser.parse_args()
    host, _, port = os.environ.get("OLLAMA_HOST", "127.0.0.1:11434").partition(":")
    return host, int(port), "tiny:latest"


host, port, name = {"vllm": vllm, "llama-server": llama, "ollama": ollama}[PROGRAM]()
loading = LOADING_REQUESTS


class Answers(BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        global loading
        if self.path == "/health" and PROGRAM != "ollama":
            loading -= 1
            self.answer(503 if loading > 0 else 200, {"status": "loading" if loading > 0 else "ok"})
        elif self.path == "/api/tags" and PROGRAM == "ollama":
            self.answer(200, {"models": [{"name": name}]})
        else:
            self.answer(404, {})

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        if self.path != "/v1/chat/completions" or body["model"] not in (name, name.removesuffix(":latest")):
            self.answer(404, {"error": {"message": f"model {body['model']!r} not found"}})
            return
        choice = {"index": 0, "finish_reason": "stop", "message": {"role": "assistant", "content": "here I am"}}
        self.answer(200, {"id": "1", "object": "chat.completion", "model": name, "choices": [choice]})

    def answer(self, status: int, body: Any) -> None:
        content = json.dumps(body).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, format: str, *args: Any) -> None:
        pass


noted = {key: value for key, value in os.environ.items() if key.startswith(("HF_", "TRANSFORMERS_", "VLLM_", "DO_NOT"))}
Path(os.environ["NOTED"]).write_text(json.dumps({"words": sys.argv[1:], "environment": noted}))
signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
with ThreadingHTTPServer((host, port), Answers) as server:
    server.serve_forever()
