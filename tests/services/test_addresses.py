"""Addresses of model servers: queries, proxies, and how long a server asks to be left alone."""

from __future__ import annotations

import json
import uuid
from typing import Any

import pytest
from services.models import KEY, opened

from sage import ServiceError
from sage.services._shared.address import is_here, query_of
from sage.services.models.endpoint import EndpointOptions
from sage.services.models.openai import OpenAIEmbeddings, OpenAILLM

PROXIES = ("HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY", "http_proxy", "https_proxy", "all_proxy", "NO_PROXY", "no_proxy")
AWAY = "http://127.0.0.1:9"  # no proxy answers there


@pytest.fixture(autouse=True)
def _no_proxies(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in PROXIES:
        monkeypatch.delenv(name, raising=False)


def test_a_query_goes_behind_each_path(server: str) -> None:
    model = f"settings/{uuid.uuid4().hex}"
    url = f"{server}/v1?api-version=2024-10-21&token=secret-value"
    with opened(OpenAILLM(model, base_url=url, api_key=KEY)) as llm:
        sent = json.loads(llm.generate("hi").text)
        assert sent["query"] == {"api-version": "2024-10-21", "token": "secret-value"}
        assert "".join(llm.stream("hi")).startswith("{")
        assert llm.health()
        assert llm.describe()["base_url"] == f"{server}/v1"
    with opened(OpenAIEmbeddings("embed", base_url=url, api_key=KEY)) as embeddings:
        assert embeddings.embed_one("a").shape == (8,)


def test_a_query_may_hold_a_key_that_the_server_repeats(server: str) -> None:
    url = f"{server}/v1/?key={KEY}x"
    with opened(OpenAILLM("chat", base_url=url)) as llm, pytest.raises(ServiceError, match="answered 401") as caught:
        llm.generate("hi")
    assert KEY not in str(caught.value)


def test_an_address_is_cut_at_its_query() -> None:
    assert query_of("http://a/v1") == ("http://a/v1", {})
    assert query_of("http://a/v1?b=c%20d&e=") == ("http://a/v1", {"b": "c d", "e": ""})
    assert query_of("http://a/v1?b=c#d") == ("http://a/v1", {"b": "c"})


@pytest.mark.parametrize(
    ("url", "here"),
    [
        ("http://127.0.0.1:8000/v1", True),
        ("http://127.1.2.3/v1", True),
        ("http://localhost:1/v1", True),
        ("https://me:word@LOCALHOST/v1", True),
        ("http://[::1]:8000/v1", True),
        ("http://models.localhost/v1", True),
        ("http://10.0.0.1/v1", False),
        ("http://localhost.example.com/v1", False),
        ("https://api.openai.com/v1", False),
    ],
)
def test_addresses_of_this_machine(url: str, here: bool) -> None:
    assert is_here(url) is here


@pytest.mark.parametrize("name", ["HTTP_PROXY", "http_proxy", "ALL_PROXY", "all_proxy"])
@pytest.mark.parametrize("proxy", [AWAY, "socks://127.0.0.1:9", "socks5://127.0.0.1:9", "nonsense"])
def test_a_server_of_this_machine_is_asked_without_a_proxy(
    server: str, name: str, proxy: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(name, proxy)
    with opened(OpenAILLM("chat", base_url=f"{server}/v1", api_key=KEY)) as llm:
        assert llm.generate("hi").text == "You said: hi"
        assert llm.health()


@pytest.mark.parametrize("proxy", ["socks://me:word@127.0.0.1:9", "socks5://me:word@127.0.0.1:9", "nonsense:word"])
@pytest.mark.parametrize("name", ["ALL_PROXY", "https_proxy"])
def test_a_proxy_that_cannot_be_used_is_named_before_anything_is_asked(
    name: str, proxy: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(name, proxy)
    llm = OpenAILLM("m", base_url="https://models.example/v1")
    try:
        with pytest.raises(ServiceError, match=f"cannot be asked through the proxy of {name.upper()}=") as caught:
            llm.setup()
    finally:
        llm.cleanup()
    assert "word" not in str(caught.value)
    assert caught.value.__context__ is None
    assert "NO_PROXY" in " ".join(caught.value.__notes__)


def test_a_pause_may_be_given_in_milliseconds(server: str) -> None:
    """It is more exact than the one in seconds that stands beside it."""
    options = EndpointOptions(backoff_s=(0.01, 0.02))
    settings: dict[str, Any] = {"base_url": f"{server}/v1", "api_key": KEY, "request_options": options}
    with opened(OpenAILLM(f"brief/{uuid.uuid4().hex}", **settings)) as llm:
        assert llm.generate("hi").text == "You said: hi"
        assert 0.4 <= llm.measures()["generate"].p50_s < 20.0
