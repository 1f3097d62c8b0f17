"""A server that speaks the OpenAI protocol and misbehaves on demand: `python openai_server.py PORT`.

The first part of the model's name says how it behaves, and requests are counted for each full name. At /v1 it wants the
key, at /open/v1 it wants none to be sent.
"""

from __future__ import annotations

import asyncio
import base64
import json
import sys
import time
from collections import defaultdict
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import uvicorn
from starlette.applications import Starlette
from starlette.concurrency import iterate_in_threadpool
from starlette.responses import JSONResponse, PlainTextResponse, Response, StreamingResponse
from starlette.routing import Route

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from starlette.requests import Request

KEY = "sk-right-0123456789"
LONG_S = 60.0
METERED_MINUTE_S = 2.0
"""In how many seconds the limits of a metered account come back."""

TOKENS_OF_ANSWER = 10

asked: defaultdict[str, list[float]] = defaultdict(list)
left: defaultdict[str, int] = defaultdict(int)
is_open: defaultdict[str, int] = defaultdict(int)
open_max: defaultdict[str, int] = defaultdict(int)


def refused(status: int, text: str, headers: dict[str, str] | None = None, code: str | None = None) -> JSONResponse:
    return JSONResponse({"error": {"message": text, "type": "refused", "code": code}}, status, headers)


def wrong_key(request: Request) -> JSONResponse | None:
    sent = request.headers.get("authorization")
    if request.url.path.startswith("/open/"):
        return refused(400, "an Authorization header was sent to an open server") if sent is not None else None
    # A server that shows what was wrong is the worst that can happen to a key.
    return None if sent == f"Bearer {KEY}" else refused(401, f"Incorrect API key provided: {sent}")


class Account:
    """What is left of a minute's requests and tokens, which come back evenly."""

    def __init__(self, requests: float, tokens: float, *, minute_s: float) -> None:
        self.sizes, self.left = (requests, tokens), [requests, tokens]
        self.minute_s, self.at = minute_s, time.monotonic()
        self.refused = 0

    def take(self, tokens: float) -> bool:
        """Take a request with so many tokens, and return whether the account has them."""
        now, taken = time.monotonic(), (1.0, tokens)
        back = [size * (now - self.at) / self.minute_s for size in self.sizes]
        self.left = [min(left + more, size) for left, more, size in zip(self.left, back, self.sizes, strict=True)]
        self.at = now
        has_all = all(left >= amount for left, amount in zip(self.left, taken, strict=True))
        self.refused += not has_all
        if has_all:
            self.left = [left - amount for left, amount in zip(self.left, taken, strict=True)]
        return has_all

    def headers(self) -> dict[str, str]:
        told: dict[str, str] = {}
        for kind, size, left in zip(("requests", "tokens"), self.sizes, self.left, strict=True):
            reset_ms = (size - left) / size * self.minute_s * 1000
            told |= {f"x-ratelimit-limit-{kind}": f"{size:g}", f"x-ratelimit-remaining-{kind}": f"{int(left)}"}
            told[f"x-ratelimit-reset-{kind}"] = f"{reset_ms:.0f}ms"
        return told


accounts: dict[str, Account] = {}


def metered(model: str) -> Response | None:
    """Refuse a request for "metered/REQUESTS/TOKENS/..." that its account has too little for."""
    _, requests, tokens, _ = model.split("/", 3)
    account = accounts.setdefault(model, Account(float(requests), float(tokens), minute_s=METERED_MINUTE_S))
    return None if account.take(TOKENS_OF_ANSWER) else refused(429, "too many requests", account.headers())


async def trouble(request: Request, model: str) -> Response | None:
    count = len(asked[model])
    match model.split("/")[0]:
        case "metered":
            return metered(model)
        case "brief" if count == 1:
            return refused(429, "too many requests", {"Retry-After-Ms": "400", "Retry-After": "50"})
        case "limited" if count == 1:
            return refused(429, "too many requests", {"Retry-After": "0.4"})
        case "closed":
            return refused(429, "come back tomorrow", {"Retry-After": "86400"})
        case "penniless":
            return refused(429, "you have no money left", {"x-should-retry": "false"}, "insufficient_quota")
        case "flaky" if count <= 2:
            return refused(500 + count, "it is not my day")
        case "down":
            return refused(503, "no")
        case "unknown":
            return refused(404, f"The model `{model}` does not exist", code="model_not_found")
        case "picky":
            return refused(400, "the prompt is not to my liking")
        case "malformed":
            return Response('{"choices": [', media_type="application/json")
        case "page":
            return PlainTextResponse("<html>welcome</html>", media_type="text/html")
        case "odd":
            return JSONResponse({"object": "surprise"})
        case "say":  # what the model's name holds, piece by piece
            said = json.loads(base64.urlsafe_b64decode(model.split("/")[1]))
            pieces = (piece.encode() for piece in said["pieces"])
            return StreamingResponse(iterate_in_threadpool(pieces), said["status"], said["headers"])
        case "slow":
            while not await request.is_disconnected():
                await asyncio.sleep(0.02)
            left[model] += 1
    return None


def text_of(message: dict[str, Any]) -> str:
    content = message["content"] or ""
    return content if isinstance(content, str) else " ".join(part.get("text", "(image)") for part in content)


def asked_tools(body: dict[str, Any]) -> list[dict[str, Any]] | None:
    """Return the calls of a model that asks for each tool first, with the last word of the question, or None."""
    if not body.get("tools") or body["messages"][-1]["role"] == "tool":
        return None
    word = text_of(body["messages"][-1]).split()[-1].strip("?.")
    calls = []
    for place, tool in enumerate(body["tools"]):
        wanted = dict.fromkeys(tool["function"]["parameters"]["required"], word)
        function = {"name": tool["function"]["name"], "arguments": json.dumps(wanted)}
        calls.append({"id": f"c{len(body['messages'])}.{place}", "type": "function", "function": function})
    return calls


def answer_to(body: dict[str, Any]) -> tuple[str, str]:
    asked_for = " ".join(map(text_of, body["messages"]))
    words = f"You said: {asked_for}".split()
    limit = body.get("max_tokens", body.get("max_completion_tokens"))
    text = " ".join(words[:limit])
    for word in body.get("stop", []):
        text = text.partition(word)[0]
    return text, "length" if limit is not None and len(words) > limit else "stop"


async def chat(request: Request) -> Response:
    body = await request.json()
    model = body["model"]
    asked[model].append(time.monotonic())
    found = wrong_key(request)
    if found is not None:
        return found
    is_open[model] += 1
    open_max[model] = max(open_max[model], is_open[model])
    try:
        response = await trouble(request, model)
        if model.startswith("busy/"):
            await asyncio.sleep(0.1)
        if model.startswith("uneven/"):  # the first ones take longest
            await asyncio.sleep(0.3 / (1 + int(body["messages"][-1]["content"].split()[-1])))
    finally:
        is_open[model] -= 1
    if response is not None:
        return response
    text, reason = answer_to(body)
    if model.startswith("settings/"):
        query = {"query": dict(request.query_params)} if request.query_params else {}
        hidden = () if model.startswith("settings/all") else ("messages",)
        text = json.dumps({**{key: value for key, value in body.items() if key not in hidden}, **query})
    calls = asked_tools(body) if model.startswith(("agent/", "stubborn/")) else None
    if calls is None and model.startswith("stubborn/"):  # one that never stops to ask
        calls = asked_tools({**body, "messages": body["messages"][1:2]})
    if calls is not None:
        text, reason = "", "tool_calls"
    elif model.startswith("agent/"):
        text = f"I found {text_of(body['messages'][-1])}."
    if body.get("stream"):
        return StreamingResponse(events(body, text, reason, calls), media_type="text/event-stream")
    usage = {"prompt_tokens": 7, "completion_tokens": len(text.split()), "total_tokens": 0}
    said = {"role": "assistant", "content": text, **({"tool_calls": calls} if calls else {})}
    choice = {"index": 0, "finish_reason": reason, "message": said}
    told = accounts[model].headers() if model in accounts else None
    if told is not None:
        usage["completion_tokens"] = TOKENS_OF_ANSWER - usage["prompt_tokens"]
    answer = {"id": "1", "object": "chat.completion", "model": model, "choices": [choice], "usage": usage}
    return JSONResponse(answer, headers=told)


async def events(
    body: dict[str, Any], text: str, reason: str, calls: list[dict[str, Any]] | None
) -> AsyncIterator[str]:
    model = body["model"]

    def event(content: str | None, end: str | None = None) -> str:
        choice = {"index": 0, "delta": {"content": content} if content else {}, "finish_reason": end}
        return f"data: {json.dumps({'id': '1', 'model': model, 'choices': [choice]})}\n\n"

    words = text.split(" ")
    try:
        for place, word in enumerate(words):
            if place == 2 and model.startswith("broken/"):
                raise ConnectionAbortedError  # The connection ends without an end of the answer.
            if place == 2 and model.startswith("cut/"):
                return
            if place == 2 and model.startswith("garbled/"):
                yield "data: {oops\n\n"
            if place == 2 and model.startswith("stuck/"):
                await asyncio.sleep(LONG_S)
            yield event(word if place == 0 else f" {word}")
        for place, call in enumerate(calls or ()):
            for part in (call["function"]["arguments"][:3], call["function"]["arguments"][3:]):
                piece = {**call, "index": place, "function": {**call["function"], "arguments": part}}
                delta = {"index": 0, "delta": {"tool_calls": [piece]}, "finish_reason": None}
                yield f"data: {json.dumps({'id': '1', 'model': model, 'choices': [delta]})}\n\n"
        yield event(None, reason)
        if (body.get("stream_options") or {}).get("include_usage"):
            usage = {"prompt_tokens": 7, "completion_tokens": len(words), "total_tokens": 0}
            yield f"data: {json.dumps({'id': '1', 'model': model, 'choices': [], 'usage': usage})}\n\n"
        yield "data: [DONE]\n\n"
    finally:
        left[model] += 1


async def embeddings(request: Request) -> Response:
    body = await request.json()
    model = body["model"]
    asked[model].append(time.monotonic())
    found = wrong_key(request) or await trouble(request, model)
    if found is not None:
        return found
    dimension = body.get("dimensions", 8)
    if len(body["input"]) > 100:
        return refused(400, "at most 100 texts")
    if any(len(text) > 6000 for text in body["input"]):
        text = "This model's maximum context length is 256 tokens, however you requested 500 tokens"
        return refused(500 if model.startswith("angry/") else 400, text)
    rows = [
        {
            "index": place,
            "embedding": [0.0 if model.startswith("zero/") else float(len(text) + 1), *range(1, dimension)],
        }
        for place, text in enumerate(body["input"])
    ]
    for row in rows:
        if model.startswith("zero/"):
            row["embedding"] = [0.0] * dimension
    # The order of the answer is the server's own business.
    answer = {"object": "list", "data": rows[::-1], "model": model, "usage": {"prompt_tokens": 3, "total_tokens": 3}}
    return JSONResponse(answer)


async def models(request: Request) -> Response:
    return wrong_key(request) or JSONResponse({"object": "list", "data": [{"id": "chat", "object": "model"}]})


async def forbidden(request: Request) -> Response:
    return refused(403, "Missing scopes: api.model.read")


async def seen(request: Request) -> Response:
    model = request.query_params["model"]
    times = asked[model]
    pauses = [after - before for before, after in pairwise(times)]
    found = {"asked": len(times), "pauses_s": pauses, "left": left[model], "open_max": open_max[model]}
    return JSONResponse({**found, "refused": accounts[model].refused if model in accounts else 0})


async def health(request: Request) -> Response:
    return PlainTextResponse("ok")


app = Starlette(
    routes=[
        *(
            Route(f"{base}/{path}", endpoint, methods=["POST"])
            for base in ("/v1", "/open/v1")
            for path, endpoint in (("chat/completions", chat), ("embeddings", embeddings))
        ),
        *(Route(f"{base}/models", models) for base in ("/v1", "/open/v1")),
        # An address without a list of models; such as these there are.
        Route("/bare/v1/chat/completions", chat, methods=["POST"]),
        Route("/shy/v1/chat/completions", chat, methods=["POST"]),
        Route("/shy/v1/models", forbidden),
        Route("/seen", seen),
        Route("/health", health),
    ]
)

if __name__ == "__main__":
    uvicorn.run(app, host="127.0.0.1", port=int(sys.argv[1]), log_level="critical", timeout_graceful_shutdown=1)
