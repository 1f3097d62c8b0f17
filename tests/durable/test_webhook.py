"""Requests as records: an answer says that the record is kept, and whoever gets none sends it again."""

from __future__ import annotations

import json
import os
import pickle
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections import Counter
from contextlib import closing, contextmanager
from importlib.util import find_spec
from random import Random
from typing import TYPE_CHECKING, Any

import pytest

from sage import ConnectorError, Durable, FunctionError, GraphError, LocalEnvironment, Outcome
from sage.connectors import JsonLines, Webhook, WebRequest
from sage.testing import assert_clean

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

pytestmark = pytest.mark.skipif(find_spec("uvicorn") is None, reason="the package uvicorn is not installed")

SOON_S = 20.0
TOKEN = "tok-7391"


def post(url: str, body: bytes, method: str = "POST", **headers: str) -> tuple[int, str]:
    """Return the status and the text of the answer."""
    given = {"Content-Type": "application/json", **{name.replace("_", "-"): value for name, value in headers.items()}}
    request = urllib.request.Request(url, data=body, headers=given, method=method)
    try:
        with urllib.request.urlopen(request, timeout=SOON_S) as answer:
            return answer.status, answer.read().decode()
    except urllib.error.HTTPError as error:
        with error:
            return error.code, error.read().decode()


class Running:
    """A job that reads from a hook, until the block ends."""

    def __init__(self, hook: Webhook, durable: Durable | None = None, act: Callable[[Any], object] = id) -> None:
        self.records: list[Any] = []
        self._hook = hook
        self._env = LocalEnvironment("hooked", durable=durable)
        self._env.from_source(hook, name="hook").map(lambda record: (act(record), record)[1]).sink(self.records.append)

    def __enter__(self) -> str:
        self.job = self._env.submit()
        due = time.monotonic() + SOON_S
        while not self._hook.port:
            assert time.monotonic() < due
            threading.Event().wait(0.01)
        return f"http://127.0.0.1:{self._hook.port}"

    def __exit__(self, *_: object) -> None:
        self.job.stop()
        self.report = self.job.wait()


@pytest.mark.parametrize("is_durable", [False, True])
def test_what_is_posted_is_a_record(is_durable: bool, tmp_path: Path) -> None:
    durable = Durable(tmp_path / "state", interval_s=0.02) if is_durable else None
    with assert_clean(), (running := Running(Webhook(0, path="/orders"), durable)) as url:
        for number in range(5):
            assert post(f"{url}/orders", json.dumps({"id": number}).encode(), Idempotency_Key=f"k{number}") == (
                200,
                "taken\n",
            )
    assert running.records == [WebRequest({"id": number}, f"k{number}") for number in range(5)]
    assert running.report.state is Outcome.STOPPED


def test_an_answer_waits_for_the_checkpoint(tmp_path: Path) -> None:
    got = threading.Event()
    answers: list[tuple[int, str]] = []
    running = Running(Webhook(0), Durable(tmp_path / "state", interval_s=3600), lambda _: got.set())
    with running as url:
        client = threading.Thread(target=lambda: answers.append(post(url, b"1")))
        client.start()
        assert got.wait(SOON_S)
        client.join(0.3)
        assert answers == []
    client.join()
    assert answers == [(200, "taken\n")]  # the last checkpoint has it


def test_a_request_that_no_checkpoint_has_is_to_be_sent_again(tmp_path: Path) -> None:
    def fail(_: object) -> None:
        raise ValueError("bad")

    answers: list[tuple[int, str]] = []
    hook = Webhook(0)
    env = LocalEnvironment("hooked", durable=Durable(tmp_path / "state", interval_s=3600))
    env.from_source(hook, name="hook").map(fail).sink(print)
    job = env.submit()
    while not hook.port:
        threading.Event().wait(0.01)
    client = threading.Thread(target=lambda: answers.append(post(f"http://127.0.0.1:{hook.port}", b"1")))
    client.start()
    with pytest.raises(FunctionError, match="bad"):
        job.wait()
    client.join()
    assert answers == [(503, "send it again later\n")]


REFUSED: dict[str, tuple[dict[str, Any], tuple[int, str]]] = {
    "token": ({"Authorization": "Bearer wrong"}, (401, "the token is missing or wrong\n")),
    "path": ({"path": "/other"}, (404, "post to /\n")),
    "method": ({"method": "DELETE"}, (405, "use POST\n")),
    "type": ({"Content_Type": "text/plain"}, (415, "the type is not application/json\n")),
    "size": ({"body": b"1" * 101}, (413, "a body has at most 100 bytes\n")),
    "value": ({"body": b"{"}, (400, "the body is not JSON\n")),
}


@pytest.mark.parametrize("name", REFUSED)
def test_a_request_that_cannot_be_taken_is_told_why(name: str) -> None:
    given, answer = REFUSED[name]
    given = {"body": b"1", "path": "/", "Authorization": f"Bearer {TOKEN}", **given}
    with (running := Running(Webhook(0, token=TOKEN, body_bytes_max=100))) as url:
        path, body = given.pop("path"), given.pop("body")
        assert post(f"{url}{path}", body, **given) == answer
        assert post(url, b"2", Authorization=f"Bearer {TOKEN}")[0] == 200
    assert [record.value for record in running.records] == [2]


@contextmanager
def background(work: Callable[[], object]) -> Iterator[None]:
    """Do something beside the block, which ends with it."""
    thread = threading.Thread(target=work)
    thread.start()
    yield
    thread.join()


def half_a_body(port: int) -> socket.socket:
    sender = socket.create_connection(("127.0.0.1", port))
    sender.sendall(b"POST / HTTP/1.1\r\nHost: here\r\nContent-Length: 4\r\n\r\n12")
    return sender


def test_a_body_whose_sender_has_gone_is_not_a_record() -> None:
    hook = Webhook(0, format="text")
    with (running := Running(hook)) as url:
        for _ in range(5):
            half_a_body(hook.port).close()
        assert post(url, b"whole")[0] == 200
    assert [record.value for record in running.records] == ["whole"]


def test_a_sender_that_never_ends_its_body_is_told_so_at_the_end(caplog: pytest.LogCaptureFixture) -> None:
    hook = Webhook(0, format="text")
    with assert_clean():
        hook.open()
        with closing(half_a_body(hook.port)) as sender:
            with background(lambda: post(f"http://127.0.0.1:{hook.port}/", b"1")):
                while not hook.read(1):  # it comes later, so the other one is there
                    pass
            hook.close()
            assert sender.recv(1_000).startswith(b"HTTP/1.1 503 ")
    assert "Traceback" not in caplog.text


def test_the_next_job_does_not_get_requests_of_the_last_one() -> None:
    hook = Webhook(0)
    hook.open()
    answers: list[int] = []
    with background(lambda: answers.append(post(f"http://127.0.0.1:{hook.port}/", b"1")[0])):
        while not hook._unread:
            threading.Event().wait(0.01)
        hook.close()
    assert answers == [503]
    hook.open()
    assert hook.read(10) == []
    hook.close()


def test_more_than_can_wait_are_to_be_sent_again() -> None:
    entered, go_on = threading.Event(), threading.Event()
    statuses: list[int] = []

    def hold(_: object) -> None:
        entered.set()
        assert go_on.wait(SOON_S)

    with (running := Running(Webhook(0, waiting_max=3), act=hold)) as url:
        assert post(url, b"0")[0] == 200
        assert entered.wait(SOON_S)
        clients = [threading.Thread(target=lambda: statuses.append(post(url, b"1")[0])) for _ in range(10)]
        for client in clients:
            client.start()
        while len(statuses) < 7:
            threading.Event().wait(0.01)
        assert statuses == [503] * 7
        go_on.set()
        for client in clients:
            client.join()
    assert Counter(statuses) == {503: 7, 200: 3}
    assert len(running.records) == 4


def test_many_requests_at_once(tmp_path: Path) -> None:
    with (running := Running(Webhook(0, waiting_max=5_000), Durable(tmp_path / "state", interval_s=0.05))) as url:

        def some(first: int) -> None:
            for number in range(first, first + 20):
                assert post(url, str(number).encode())[0] == 200

        clients = [threading.Thread(target=some, args=(first,)) for first in range(0, 400, 20)]
        for client in clients:
            client.start()
        for client in clients:
            client.join()
    assert sorted(record.value for record in running.records) == list(range(400))


def test_a_port_that_is_taken_is_named() -> None:
    with closing(socket.create_server(("127.0.0.1", 0))) as other:
        hook = Webhook(other.getsockname()[1])
        with pytest.raises(ConnectorError, match=f"cannot listen at 127.0.0.1:{hook.port}: OSError"):
            hook.open()
        hook.close()


def test_a_server_that_has_ended_is_told() -> None:
    hook = Webhook(0)
    hook.open()
    assert hook.read(10) == []
    hook._server.should_exit = True
    assert hook._thread is not None
    hook._thread.join()
    with pytest.raises(ConnectorError, match=f"no longer listens at 127.0.0.1:{hook.port}"):
        hook.read(10)
    hook.close()


def test_answers_after_a_checkpoint_need_checkpoints() -> None:
    hook = Webhook(0, answer="checkpoint")
    with pytest.raises(ConnectorError, match='has answer="checkpoint", and the job has none'):
        hook.open()


def test_another_process_may_have_it() -> None:
    hook = pickle.loads(pickle.dumps(Webhook(0)))
    hook.open()
    assert hook.read(10) == []
    hook.close()


WRONG: dict[str, dict[str, Any]] = {
    "port is 65536": {"port": 65_536},
    "port is -1": {"port": -1},
    "host is": {"host": ""},
    "path is 'orders'": {"path": "orders"},
    "format is 'xml'": {"format": "xml"},
    "answer is 'soon'": {"answer": "soon"},
    "token is not a text without spaces": {"token": "a secret"},
    "waiting_max is 0": {"waiting_max": 0},
    "body_bytes_max is 0": {"body_bytes_max": 0},
}


@pytest.mark.parametrize("message", WRONG)
def test_an_option_that_cannot_work_is_refused_where_it_is_given(message: str) -> None:
    with pytest.raises(GraphError) as caught:
        Webhook(**{"port": 0, **WRONG[message]})
    assert message in str(caught.value)
    assert "secret" not in str(caught.value)


PROGRAM = """
import signal, sys
from sage import Durable, LocalEnvironment
from sage.connectors import JsonLinesFiles, Webhook

env = LocalEnvironment("hooked", durable=Durable("state", interval_s=0.03))
requests = env.from_source(Webhook(int(sys.argv[1])), name="hook")
requests.keyby(lambda request: request.key).distinct().map(lambda request: request.value).sink(JsonLinesFiles("out"))
if len(sys.argv) > 2:
    signal.setitimer(signal.ITIMER_REAL, float(sys.argv[2]))  # the system ends the process, wherever it is
env.submit(autostop=True)
"""


@pytest.mark.timeout(180)  # starts several programs
@pytest.mark.parametrize("seed", [0, *(pytest.param(seed, marks=pytest.mark.proof) for seed in range(1, 4))])
def test_nothing_that_was_answered_is_lost_whenever_the_program_is_killed(seed: int, tmp_path: Path) -> None:
    with closing(socket.create_server(("127.0.0.1", 0))) as free:
        port = free.getsockname()[1]
    over = threading.Event()
    sent: list[int] = []

    def send() -> None:
        while not over.is_set():
            number = len(sent)
            sent.append(number)
            while True:
                try:
                    if post(f"http://127.0.0.1:{port}/", str(number).encode(), Idempotency_Key=str(number))[0] == 200:
                        break
                except OSError:
                    threading.Event().wait(0.02)

    def start(*until: str) -> subprocess.Popen[bytes]:
        return subprocess.Popen([sys.executable, "-W", "error", "-c", PROGRAM, str(port), *until], cwd=tmp_path)

    client = threading.Thread(target=send)
    client.start()
    random = Random(seed)
    for _ in range(3):
        with start(str(random.uniform(0.6, 1.5))) as program:
            assert program.wait(60) == -signal.SIGALRM
    with start() as program:
        before = len(sent)
        due = time.monotonic() + SOON_S
        while len(sent) < before + 5 and time.monotonic() < due:
            threading.Event().wait(0.02)
        over.set()
        client.join()
        os.kill(program.pid, signal.SIGINT)
        program.wait(60)
    source, found = JsonLines(tmp_path / "out" / "*.jsonl"), []
    source.open()
    while records := source.read(100):
        found += records
    source.close()
    assert Counter(found) == Counter(sent)
