"""Limits that a model server tells in its answers: read from the headers, and kept without a setting."""

from __future__ import annotations

import json
import time
import urllib.parse
import urllib.request
import uuid
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
from services.kept import left_clean
from services.models import KEY

from sage import LocalEnvironment, Outcome, ServiceOptions
from sage._bucket import Bucket, Limit
from sage.services.models.endpoint import EndpointOptions
from sage.services.models.limits import duration_s, limit_in
from sage.services.models.openai import OpenAILLM
from sage.testing import ManualClock

AT_ONCE = 4
WITHOUT_RETRY = {"timeout_s": 10.0, "retries_max": 0}


@pytest.fixture(autouse=True)
def _nothing_is_left(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[None]:
    if "server" in request.fixturenames:
        request.getfixturevalue("server")
    with left_clean():
        yield


@pytest.mark.parametrize(
    ("text", "seconds"),
    [
        ("1s", 1.0),
        ("6m0s", 360.0),
        ("20ms", 0.02),
        ("1m2.5s", 62.5),
        ("2h3m4s", 7384.0),
        (" 1.5 ", 1.5),
        ("0s", 0.0),
        ("", None),
        ("soon", None),
        ("-3", None),
        ("nan", None),
        ("inf", None),
        ("2025-01-27T12:00:00Z", None),
    ],
)
def test_durations_are_read_in_the_forms_that_servers_write(text: str, seconds: float | None) -> None:
    assert duration_s(text) == seconds


def told(limit: object, remaining: object, reset: str | None = None) -> Limit | None:
    headers = {"x-ratelimit-limit-requests": str(limit), "x-ratelimit-remaining-requests": str(remaining)}
    return limit_in(headers | ({} if reset is None else {"x-ratelimit-reset-requests": reset}), "requests")


@pytest.mark.parametrize(
    ("limit", "remaining", "reset", "expected"),
    [
        (500, 499, "120ms", Limit(500, 500, 499)),
        (500, 0, "1m0s", Limit(500, 500, 0)),
        (3, 1, "39s", Limit(3, 3, 1)),
        (500, 500, "0s", Limit(500, 500, 500)),
        (500, 20, None, Limit(500, 500, 20)),
        (500, 20, "soon", Limit(500, 500, 20)),
        (100, 50, "5s", Limit(49 * 60 / 5, 100, 50)),  # all of it in ten seconds
        (14400, 14370, "3m0s", None),  # one for a day
        (100, 99, "0.01s", None),  # too little is missing to tell
        ("", 20, "1s", None),
        (500, "many", "1s", None),
        (0, 0, "1s", None),
        (500, 501, "1s", None),
        (500, -1, "1s", None),
        ("inf", 1, "1s", None),
        ("nan", 1, "1s", None),
    ],
)
def test_the_limit_is_read_with_how_fast_it_comes_back(
    limit: object, remaining: object, reset: str | None, expected: Limit | None
) -> None:
    assert told(limit, remaining, reset) == expected
    assert limit_in({}, "tokens") is None


def begun(bucket: Bucket, clock: ManualClock, calls: int, tokens: int = 0) -> list[float]:
    """Return when so many calls begin that come at once, each of which uses so many tokens."""
    start_s, begun_at = clock.now_s, []
    with ExitStack() as stack:
        for turn in [stack.enter_context(bucket.turn()) for _ in range(calls)]:
            while pause_s := bucket.pause_s(turn):
                clock.advance(pause_s)
            begun_at.append(round(clock.now_s - start_s, 1))
            bucket.used(tokens)
    return begun_at


def test_what_is_left_begins_at_once_and_the_rest_as_it_comes_back() -> None:
    clock = ManualClock()
    bucket = Bucket(None, clock)
    assert begun(bucket, clock, 50) == [0.0] * 50
    for _ in range(49):
        bucket.learn(None, None)
    bucket.learn(Limit(60, 100, 3), None)
    assert begun(bucket, clock, 5) == [0, 0, 0, 1, 2]
    clock.advance(10)
    bucket.learn(Limit(60, 100, 50), None)  # an old answer: what began since then is not given back
    assert begun(bucket, clock, 12) == [0] * 10 + [1, 2]
    bucket.learn(Limit(120, 100, 0), None)  # others share the account
    assert begun(bucket, clock, 3) == [0.5, 1, 1.5]


def test_calls_on_their_way_when_a_limit_becomes_known_are_counted() -> None:
    clock = ManualClock()
    bucket = Bucket(None, clock)
    assert begun(bucket, clock, 5) == [0] * 5
    bucket.learn(None, None)  # an answer that tells nothing, such as one of a connection that failed
    bucket.learn(Limit(60, 20, 18), None)  # three more are on their way
    assert begun(bucket, clock, 17) == [0] * 15 + [1, 2]


def test_tokens_that_are_left_begin_at_once_too() -> None:
    clock = ManualClock()
    bucket = Bucket(None, clock)
    assert begun(bucket, clock, 1, tokens=100) == [0]
    bucket.learn(None, Limit(600, 1000, 300))
    assert begun(bucket, clock, 5, tokens=100) == [0, 0, 0, 10, 20]
    clock.advance(1000)
    assert begun(bucket, clock, 11, tokens=100) == [0] * 10 + [10]


def test_a_call_that_needs_more_than_the_limit_waits_until_all_of_it_is_there() -> None:
    clock = ManualClock()
    bucket = Bucket(None, clock)
    begun(bucket, clock, 1, tokens=5000)
    bucket.learn(None, Limit(600, 1000, 900))
    assert begun(bucket, clock, 1, tokens=5000) == [10]


def seen(server: str, model: str) -> dict[str, Any]:
    """Return what a server has seen of the requests to one model."""
    with urllib.request.urlopen(f"{server}/seen?model={urllib.parse.quote(model)}") as answer:
        found: dict[str, Any] = json.load(answer)
        return found


def asked(server: str, account: str, *, keeps_limits: bool, host: Any = "inline", calls: int) -> tuple[float, int, int]:
    """Return how long a job took to ask so many questions, and how many the server refused and the job lost."""
    model = f"metered/{account}/{uuid.uuid4().hex}"
    env = LocalEnvironment("metered")
    reached = EndpointOptions(keeps_limits=keeps_limits, **WITHOUT_RETRY)  # type: ignore[arg-type]
    options = ServiceOptions(host=host, concurrency=AT_ONCE)
    given: dict[str, Any] = {"base_url": f"{server}/v1", "api_key": KEY, "request_options": reached}
    llm = env.register_service("llm", OpenAILLM, model, options=options, **given)
    answers: list[str] = []
    spans: list[float] = []

    async def ask(number: int) -> str:
        spans.append(time.monotonic())
        answer = await llm.agenerate(f"question {number}", max_tokens=5)
        spans.append(time.monotonic())
        return str(answer.text)

    env.from_batch(range(calls)).map_async(ask, concurrency=AT_ONCE, on_error="skip").sink(answers.append)
    assert env.run().state is Outcome.COMPLETED
    return max(spans) - min(spans), int(seen(server, model)["refused"]), calls - len(answers)


@pytest.mark.parametrize("account", ["20/100000", "100000/200"])
def test_a_server_that_tells_its_limits_refuses_nothing(server: str, account: str) -> None:
    """The account has twenty requests, by their number or their tokens, and they come back in two seconds."""
    took_s, refused, lost = asked(server, account, keeps_limits=True, calls=30)
    assert (refused, lost) == (0, 0)
    assert 0.8 <= took_s <= 5.0


def test_limits_that_are_not_kept_cost_calls(server: str) -> None:
    _, refused, lost = asked(server, "20/100000", keeps_limits=False, calls=30)
    assert refused == lost > 0


def test_a_service_in_its_own_process_keeps_the_limits_too(server: str) -> None:
    _, refused, lost = asked(server, "20/100000", keeps_limits=True, host="process", calls=26)
    assert (refused, lost) == (0, 0)
