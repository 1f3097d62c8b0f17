"""What clients of model servers say of their health, and what a job makes of it."""

from __future__ import annotations

import socket
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from threading import Thread
from typing import Any

import pytest
from services.kept import left_clean, wait_until
from services.models import KEY, opened

from sage import JobError, JobErrorGroup, LocalEnvironment, ServiceError, ServiceOptions
from sage.services.models.endpoint import EndpointOptions
from sage.services.models.openai import OpenAIEmbeddings, OpenAILLM

HURRIED = EndpointOptions(timeout_s=0.2, retries_max=0)
"""Loses its patience soon."""

Make = Callable[..., Any]


@pytest.fixture(autouse=True)
def _nothing_is_left(server: str, tmp_path: Path) -> Iterator[None]:
    with left_clean():
        yield


@pytest.fixture(params=["llm", "embeddings"])
def make(request: pytest.FixtureRequest) -> Make:
    """Return what makes clients."""
    if request.param == "llm":
        return lambda url, **settings: OpenAILLM("chat", base_url=url, **settings)
    return lambda url, **settings: OpenAIEmbeddings("embed", dimension=8, base_url=url, **settings)


@contextmanager
def nobody() -> Iterator[str]:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        yield f"http://127.0.0.1:{taken.getsockname()[1]}/v1"


class Closed(BaseHTTPRequestHandler):
    """What stands before a server that is not there."""

    def do_GET(self) -> None:
        self.send_error(503)

    def log_message(self, *_: Any) -> None:
        pass


@contextmanager
def closed() -> Iterator[str]:
    with HTTPServer(("127.0.0.1", 0), Closed) as proxy:
        thread = Thread(target=proxy.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{proxy.server_address[1]}/v1"
        proxy.shutdown()
        thread.join()


@contextmanager
def silent() -> Iterator[str]:
    with socket.create_server(("127.0.0.1", 0)) as listening:
        yield f"http://127.0.0.1:{listening.getsockname()[1]}/v1"


def test_it_is_that_of_an_open_service(server: str, make: Make) -> None:
    service = make(f"{server}/v1", api_key=KEY)
    for _ in range(2):
        assert service.health() is False
        with opened(service):
            assert service.health() is True
            service.stop()
            assert service.health() is False
    assert service.health() is False


@pytest.mark.parametrize("base", ["open", "bare"])
def test_a_server_may_want_no_key_and_have_no_list_of_models(server: str, make: Make, base: str) -> None:
    with opened(make(f"{server}/{base}/v1")) as service:
        assert service.health() is True


def test_a_key_that_is_refused_is_told_at_once(server: str, make: Make) -> None:
    with opened(make(f"{server}/v1", api_key="wrong")) as service:
        assert service.health() is False


def test_a_key_that_was_taken_may_be_one_without_a_right_to_the_list(server: str) -> None:
    """OpenAI gives out keys that are for answers alone."""
    with opened(OpenAILLM("chat", base_url=f"{server}/shy/v1", api_key=KEY)) as llm:
        assert llm.health() is False
        assert llm.generate("hi").text == "You said: hi"
        assert llm.health() is True


@pytest.mark.parametrize("missing", [nobody, closed, silent], ids=["nobody", "closed", "silent"])
def test_a_server_that_is_away_is_waited_for_as_long_as_by_a_request(make: Make, missing: Any) -> None:
    with missing() as url:
        with opened(make(url)) as service:
            began_at = time.monotonic()
            assert service.health() is True
            assert time.monotonic() - began_at < 5.0
        with opened(make(url, request_options=HURRIED)) as service:
            wait_until(lambda: not service.health())


def test_patience_is_that_of_all_tries() -> None:
    assert EndpointOptions().patience_s == 60.0 + 0.5 + 1.0 + 2.0
    assert EndpointOptions(timeout_s=1.0, retries_max=6, backoff_s=(1.0, 5.0)).patience_s == 1 + 1 + 2 + 4 + 5 + 5 + 5
    assert HURRIED.patience_s == 0.2


def ended(url: str, host: Any, **settings: Any) -> str:
    """Return what a job says that asks for nothing, and ends only by the health of its service."""
    env = LocalEnvironment("watches")
    options = ServiceOptions(host=host, health_interval_s=0.05)
    env.register_service("llm", OpenAILLM, "chat", base_url=url, options=options, **settings)
    env.from_source(lambda: None, delay=0.01).sink(print)
    with pytest.raises((JobError, JobErrorGroup)) as caught:
        env.submit(autostop=True)
    return str(caught.value)


@pytest.mark.parametrize("host", ["inline", "process"])
def test_a_job_ends_with_a_service_that_cannot_be_used(server: str, host: Any) -> None:
    text = 'service "llm" failed: its health check failed'
    assert text in ended(f"{server}/v1", host, api_key="wrong")
    with nobody() as url:
        assert text in ended(url, host, request_options=HURRIED)


def test_a_job_outlives_a_server_that_is_away_for_a_moment() -> None:
    """Its health is asked for all the time, and the tries of the request come through."""
    arrived: list[str] = []
    with nobody() as url:
        env = LocalEnvironment("patient")
        options = ServiceOptions(health_interval_s=0.01, concurrency=None)
        patient = EndpointOptions(retries_max=20, backoff_s=(0.05, 0.05))
        llm = env.register_service("llm", OpenAILLM, "m", base_url=url, request_options=patient, options=options)

        def ask(question: str) -> str:
            try:
                return str(llm.generate(question).text)
            except ServiceError as error:
                return str(error)

        env.from_batch(["hi"]).map(ask).sink(arrived.append)
        env.submit(autostop=True)
    assert "cannot be reached in 21 tries" in arrived[0]
