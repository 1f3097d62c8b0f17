"""What is shown of services whose address has a name and a password in it, and of what comes of these."""

from __future__ import annotations

import base64
import json
import logging
import re
import socket
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread
from typing import TYPE_CHECKING, Any

import pytest
from services.kept import left_clean, notes_of

from sage import JobError, JobErrorGroup, LocalEnvironment
from sage.errors import ServiceError
from sage.services._shared.address import checked_url, redact_url, split_credentials
from sage.services._shared.secret import Secret
from sage.services.models.endpoint import EndpointOptions
from sage.services.models.openai import OpenAIEmbeddings, OpenAILLM
from sage.services.stores.redis import RedisKeyValue
from sage.services.vectors.chroma import ChromaStore
from sage.services.vectors.milvus import MilvusStore

if TYPE_CHECKING:
    from pathlib import Path

QUICK = EndpointOptions(retries_max=0, timeout_s=5.0)
Made = tuple[type[Any], dict[str, Any]]

SERVICES: dict[str, Callable[[str], Made]] = {
    "chroma": lambda place: (ChromaStore, {"url": f"http://{place}"}),
    "milvus": lambda place: (MilvusStore, {"uri": f"http://{place}", "timeout_s": 1.0}),
    "redis": lambda place: (RedisKeyValue, {"url": f"redis://{place}/0"}),
    "embeddings": lambda place: (
        OpenAIEmbeddings,
        {"model": "m", "base_url": f"http://{place}/v1", "request_options": QUICK},
    ),
    "llm": lambda place: (OpenAILLM, {"model": "m", "base_url": f"http://{place}/v1", "request_options": QUICK}),
}
every_service = pytest.mark.parametrize("kind", list(SERVICES))


@pytest.fixture
def nobody() -> Iterator[str]:
    """A place where nobody listens."""
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        yield f"127.0.0.1:{taken.getsockname()[1]}"


def use(service: Any) -> None:
    service.setup()
    if isinstance(service, OpenAILLM):  # it asks for nothing before it has to
        service.generate("hi")


@every_service
def test_a_password_in_an_address_is_shown_nowhere(kind: str, nobody: str, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG)
    made, settings = SERVICES[kind](f"user:sek%2Frit@{nobody}")
    service = made(**settings)
    told = [repr(service), str(service.describe())]
    with left_clean():
        with pytest.raises(ServiceError, match=rf"\*\*\*@{nobody}") as caught:
            use(service)
        told += [repr(service), str(service.describe())]
        service.cleanup()
    told += ["".join(traceback.format_exception(caught.value)), repr(caught.value), notes_of(caught.value)]
    told += [str(service.describe()), caplog.text]
    assert [text for text in told if "sek" in text] == []
    assert f"***@{nobody}" in str(service.describe())


@every_service
def test_a_job_does_not_show_it_either(kind: str, nobody: str, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG)
    made, settings = SERVICES[kind](f"user:sek%2Frit@{nobody}")
    with left_clean(), LocalEnvironment("secret") as env:
        service = env.register_service("service", made, **settings)
        env.from_batch(["hi"]).map(service).sink(print)
        with pytest.raises((JobError, JobErrorGroup)) as caught:
            env.submit(autostop=True)
    told = ["".join(traceback.format_exception(caught.value)), env.explain(), caplog.text]
    assert [text for text in told if "sek" in text] == []


class Gate(BaseHTTPRequestHandler):
    """Notes who asks, and refuses everybody but the first ones, with what they sent."""

    seen: list[str]
    accepted = 0

    def do_GET(self) -> None:
        sent = self.headers.get("Authorization", "")
        self.seen.append(sent)
        text = json.dumps({"error": {"message": f"who is {sent}?"}}).encode()
        self.send_response(401 if len(self.seen) > self.accepted else 200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(text)))
        self.end_headers()
        self.wfile.write(text)

    do_POST = do_GET

    def log_message(self, *_: Any) -> None:
        pass


@contextmanager
def gate(accepted: int = 0) -> Iterator[tuple[str, list[str]]]:
    seen: list[str] = []
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("Noting", (Gate,), {"seen": seen, "accepted": accepted}))
    thread = Thread(target=server.serve_forever)
    thread.start()
    try:
        yield f"127.0.0.1:{server.server_address[1]}", seen
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


@pytest.mark.parametrize("kind", ["chroma", "embeddings", "llm"])
def test_it_is_sent_as_browsers_send_it(kind: str) -> None:
    basic = base64.b64encode(b"user:sek/rit").decode()
    with left_clean(), gate() as (place, seen):
        made, settings = SERVICES[kind](f"user:sek%2Frit@{place}")
        service = made(**settings)
        with pytest.raises(ServiceError, match=r"401|refuses") as caught:
            use(service)
        service.cleanup()
    assert set(seen) == {f"Basic {basic}"}
    assert basic not in str(caught.value)


@pytest.mark.parametrize("way", ["address", "token"])
def test_what_a_server_repeats_is_not_shown(way: str) -> None:
    """Here by what Chroma's library makes of it, which comes to speak after the first request."""
    basic = base64.b64encode(b"user:sek/rit").decode()
    with left_clean(), gate(accepted=1) as (place, seen):
        if way == "address":
            store = ChromaStore(url=f"http://user:sek%2Frit@{place}")
        else:
            store = ChromaStore(url=f"http://{place}", token="sek/rit")
        with pytest.raises(ServiceError, match=r"refuses the token: .*\*\*\*") as caught:
            store.setup()
        store.cleanup()
    assert len(seen) > 1
    told = "".join(traceback.format_exception(caught.value))
    assert [secret for secret in ("sek", basic) if secret in told] == []


@pytest.mark.parametrize(
    ("made", "settings"),
    [
        (ChromaStore, {"url": "http://user:sekrit@h:1", "token": "t"}),
        (MilvusStore, {"uri": "http://user:sekrit@h:1", "token": "t"}),
        (OpenAILLM, {"model": "m", "base_url": "http://user:sekrit@h:1", "api_key": "t"}),
    ],
)
def test_two_keys_for_one_server_are_refused(made: Any, settings: dict[str, str]) -> None:
    with pytest.raises(ValueError, match=r"has a name and a password, and a key is given too") as caught:
        made(**settings)
    assert "sekrit" not in str(caught.value)


@pytest.mark.parametrize(
    ("url", "text"),
    [
        ("http://127.0.0.1:8000/v1", "http://127.0.0.1:8000/v1"),
        ("https://me:sekrit@host/v1?key=sekrit#sekrit", "https://***@host/v1"),
        ("redis://:sekrit@host:6379/0", "redis://***@host:6379/0"),
        ("redis://:sek@rit@[::1]:6379/0", "redis://***@[::1]:6379/0"),
        ("unix:///run/redis.sock?password=sekrit", "unix:///run/redis.sock"),
        ("unix:/run/milvus.sock", "unix:/run/milvus.sock"),
        ("me:sekrit@host:1", "***@host:1"),
        ("localhost:8000", "localhost:8000"),
        ("nonsense:sekrit", "***"),
        ("redis://:sek/rit@host", "***"),
        ("redis://me:1/sekrit@host", "***"),
        ("redis://:sek?rit@host", "***"),
        ("redis://:sekrit@[", "***"),
        ("redis://me:sekrit@host:port", "***"),
        ("redis://me:sek\nrit@host:1", "***"),
        ("redis://host:1/\x01", "***"),
        ("", ""),
    ],
)
def test_what_is_shown_of_an_address(url: str, text: str) -> None:
    assert redact_url(url) == text


UNSENDABLE = ["sek\nrit", "sek\r\nrit", "sek\x00rit", "sek\trit", "sek\x7frit", "\u201csekrit\u201d", "s\u00e9krit"]


def told_of(error: BaseException) -> str:
    """Return all that is told of an error, with the errors that led to it."""
    context = None if error.__suppress_context__ else error.__context__
    links: list[BaseException | None] = [error, error.__cause__, context]
    return "".join(f"{link!r} {notes_of(link)} {traceback.format_exception(link)}" for link in links if link)


@pytest.mark.parametrize("key", [*UNSENDABLE, "sekrit\n", " sekrit", "  ", "\n"])
@pytest.mark.parametrize("made", [OpenAILLM, OpenAIEmbeddings])
def test_a_key_that_no_header_can_hold_is_refused_at_once(made: Any, key: str) -> None:
    with pytest.raises(ValueError, match="the key from argument api_key cannot be sent") as caught:
        made("m", api_key=key)
    assert "printable ASCII" in notes_of(caught.value)
    assert [part for part in ("sek", "krit") if part in told_of(caught.value)] == []


def test_a_key_that_is_no_string_is_refused_at_once() -> None:
    for key in (b"sekrit", ["sekrit"]):
        with pytest.raises(TypeError, match=r"the key from argument api_key is of type (bytes|list), not a") as caught:
            Secret(key)  # type: ignore[arg-type]
        assert "sekrit" not in told_of(caught.value)


@pytest.mark.parametrize("key", UNSENDABLE)
@pytest.mark.parametrize("place", ["variable", "file"])
def test_a_key_that_no_header_can_hold_is_refused_where_it_is_read(
    place: str, key: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if place == "variable" and "\0" in key:
        key = "sek\nrit"  # a variable cannot have it
    (tmp_path / "key").write_text(f" {key}\n", encoding="utf-8", newline="")
    if place == "variable":
        monkeypatch.setenv("MY_KEY", f"{key}\n")
    where: dict[str, Any] = {"api_key_env": "MY_KEY"} if place == "variable" else {"api_key_file": tmp_path / "key"}
    source = "environment variable MY_KEY" if place == "variable" else f"file '{tmp_path / 'key'}'"
    with left_clean():
        llm = OpenAILLM("m", base_url="http://127.0.0.1:1", **where)
        with pytest.raises(ServiceError, match=re.escape(f"the key from {source} cannot be sent")) as caught:
            llm.setup()
        llm.cleanup()
    assert "nothing else" in notes_of(caught.value)
    assert [part for part in ("sek", "krit") if part in told_of(caught.value)] == []


@pytest.mark.parametrize("place", ["variable", "file"])
def test_what_is_around_a_key_does_not_count(place: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "key").write_text("\n sek rit\r\n\n")
    monkeypatch.setenv("MY_KEY", " sek rit\n")
    secret = Secret(variable="MY_KEY") if place == "variable" else Secret(path=tmp_path / "key")
    assert secret.read() == "sek rit"


def use_once(kind: str, place: str) -> None:
    made, settings = SERVICES[kind](place)
    service = made(**settings)
    try:
        use(service)
    finally:
        service.cleanup()


@pytest.mark.parametrize("password", ["HUN/TWO", "HUN#TWO", "HUN?TWO", "12/TWO", "HUN\nTWO", "[HUN", "HUN\x00TWO"])
@pytest.mark.parametrize("kind", ["redis", "chroma", "milvus", "llm"])
def test_nothing_is_told_of_a_password_that_breaks_the_address(kind: str, password: str) -> None:
    with left_clean(), pytest.raises((ValueError, ServiceError)) as caught:
        use_once(kind, f"me:{password}@127.0.0.1:1")
    told = told_of(caught.value)
    assert [part for part in ("HUN", "TWO") if part in told] == []
    if password != "[HUN" or kind == "redis":
        assert all(code in notes_of(caught.value) for code in ("%2F", "%23", "%3F"))


@pytest.mark.parametrize(
    "url",
    [
        "redis://me:HUNTER@127.0.0.1:99999/0",
        "redis://127.0.0.1:1/0?password=HUNTER&socket_timeout=HUNTER",
        "redis://127.0.0.1:1/0?password=HUNTER&HUNTER=1",
        "ftp://me:HUNTER@127.0.0.1:1/0",
    ],
)
def test_what_a_library_says_of_an_address_with_a_secret_is_not_told(url: str) -> None:
    with left_clean(), pytest.raises(ServiceError, match=r'redis cannot use the url "\w+://') as caught:
        RedisKeyValue(url).setup()
    assert "HUNTER" not in told_of(caught.value)
    assert caught.value.__context__ is None
    assert notes_of(caught.value)


def test_what_a_library_says_of_an_address_without_one_is_told() -> None:
    with left_clean(), pytest.raises(ServiceError, match=r"99999/0\": Port out of range"):
        RedisKeyValue("redis://127.0.0.1:99999/0").setup()


def test_a_server_that_repeats_the_password_is_not_quoted() -> None:
    """Not in the cause either: a server that knows no passwords says what it was given."""

    def answer(server: socket.socket) -> None:
        connection, _ = server.accept()
        with connection:
            connection.recv(1000)
            connection.sendall(b"-ERR unknown command 'AUTH', with args beginning with: 'sekrit'\r\n" * 5)

    with left_clean(), socket.create_server(("127.0.0.1", 0)) as server:
        thread = Thread(target=answer, args=(server,))
        thread.start()
        store = RedisKeyValue(f"redis://127.0.0.1:{server.getsockname()[1]}", password="sekrit")
        with pytest.raises(ServiceError) as caught:
            store.setup()
        store.cleanup()
        thread.join()
    assert "sekrit" not in told_of(caught.value)


@pytest.mark.parametrize("settings", [{"password": 5}, {"password": b"sekrit"}])
def test_a_password_that_is_no_string(settings: dict[str, Any]) -> None:
    with pytest.raises(TypeError, match=r"the password is of type \w+, not a string") as caught:
        RedisKeyValue("redis://127.0.0.1:1", **settings)
    assert "sekrit" not in told_of(caught.value)


def test_name_and_password_are_taken_apart() -> None:
    assert split_credentials("url", "http://me:a%40b@host:1/x?y=1") == ("http://host:1/x?y=1", "me:a@b")
    assert split_credentials("url", "http://host") == ("http://host", "")
    for url in ("http://me:sek/rit@host", "http://[", "ftp://me:sekrit@host", "me:sekrit@host:1", "http://"):
        with pytest.raises(ValueError, match=r"url is '.*', no http address") as caught:
            checked_url("url", url)
        assert "sek" not in str(caught.value)
