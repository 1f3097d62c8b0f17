"""The pauses between the tries of a request: table and draw."""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import pairwise
from typing import Any

import httpx
import openai
import pytest
from services.kept import left_clean

from sage import ServiceError, ServiceUnavailableError
from sage.services._shared.secret import Secret
from sage.services.models.endpoint import Endpoint, EndpointOptions, Tries

REQUEST: Any = httpx.Request("POST", "http://127.0.0.1:1/v1/chat/completions")
DRAWS = 200


@contextmanager
def opened(**options: Any) -> Iterator[tuple[Endpoint, list[int]]]:
    """Give an endpoint with these options, and a list that grows with each retry."""
    retries: list[int] = []
    settings = EndpointOptions(**options)
    endpoint = Endpoint("http://127.0.0.1:1/v1", Secret(), "m", settings, lambda: retries.append(1))
    with left_clean():
        endpoint.open()
        try:
            yield endpoint, retries
        finally:
            endpoint.close()


def lost() -> Exception:
    return openai.APIConnectionError(request=REQUEST)


def limited(**headers: str) -> Exception:
    response: Any = httpx.Response(429, headers={name.replace("_", "-"): value for name, value in headers.items()})
    response.request = REQUEST
    return openai.RateLimitError("too many", response=response, body=None)


@pytest.mark.parametrize(
    ("backoff_s", "longest"),
    [
        ((0.5, 8.0), [0.5, 1.0, 2.0, 4.0, 8.0, 8.0, 8.0]),
        ((1.0, 3.0), [1.0, 2.0, 3.0, 3.0]),
        ((2.0, 1.0), [1.0, 1.0]),
        ((0.0, 5.0), [0.0, 0.0]),
    ],
)
def test_pauses_double_up_to_the_longest_one(backoff_s: tuple[float, float], longest: list[float]) -> None:
    with opened(retries_max=len(longest), backoff_s=backoff_s) as (endpoint, retries):
        assert [endpoint._options.pause_s(count) for count in range(1, len(longest) + 1)] == longest
        for seed in range(20):
            random.seed(seed)
            tries = Tries(endpoint)
            pauses = [tries.pause_s(lost()) for _ in longest]
            drawn = random.Random(seed)
            assert pauses == [drawn.uniform(0.5, 1.0) * bound for bound in longest]
            with pytest.raises(ServiceUnavailableError, match=f"cannot be reached in {len(longest) + 1} tries"):
                tries.pause_s(lost())
        assert len(retries) == 20 * len(longest)


def test_clients_do_not_come_back_together() -> None:
    """A half of each pause is drawn, and all of that half is used."""
    random.seed(1)
    with opened(backoff_s=(1.0, 1.0)) as (endpoint, _):
        pauses = sorted(Tries(endpoint).pause_s(lost()) for _ in range(DRAWS))
    assert 0.5 <= pauses[0] < 0.52
    assert 0.98 < pauses[-1] <= 1.0
    assert max(later - earlier for earlier, later in pairwise(pauses)) < 0.02


def test_a_pause_that_the_server_asks_for_is_kept_and_not_much_longer() -> None:
    random.seed(1)
    with opened() as (endpoint, _):
        pauses = [Tries(endpoint).pause_s(limited(retry_after="20")) for _ in range(DRAWS)]
        assert 20.0 <= min(pauses) < 20.1
        assert 21.9 < max(pauses) <= 22.0
        assert Tries(endpoint).pause_s(limited(retry_after="0")) == 0.0
        for odd in ("", "soon", "nan"):  # those of the table count instead
            assert 0.25 <= Tries(endpoint).pause_s(limited(retry_after=odd)) <= 0.5
        with pytest.raises(ServiceError, match="answered 429"):
            Tries(endpoint).pause_s(limited(retry_after="61"))
        with pytest.raises(ServiceError, match="answered 429"):
            Tries(endpoint).pause_s(limited(x_should_retry="false"))


def test_without_retries_there_is_no_pause() -> None:
    with (
        opened(retries_max=0) as (endpoint, retries),
        pytest.raises(ServiceUnavailableError, match="cannot be reached:"),
    ):
        Tries(endpoint).pause_s(lost())
    assert retries == []


def test_nothing_is_sent_before_the_server_wants_to_be_asked_again() -> None:
    sent: list[float] = []

    async def ask(endpoint: Endpoint) -> str:
        async def send(_: object) -> str:
            sent.append(time.monotonic())
            if len(sent) == 1:
                raise limited(retry_after="0.2")
            return "answer"

        return await endpoint.call(send)

    async def ask_twice(endpoint: Endpoint) -> list[str]:
        first = asyncio.create_task(ask(endpoint))
        while not sent:
            await asyncio.sleep(0)
        return [*await asyncio.gather(first, ask(endpoint))]

    with opened(retries_max=1) as (endpoint, retries):
        assert endpoint.run(ask_twice(endpoint)) == ["answer", "answer"]
    assert len(retries) == 1
    assert len(sent) == 3
    assert min(sent[1:]) - sent[0] >= 0.2
