"""Records as requests: each once by its key, again after a kill or a passing trouble, and refusals that are named."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import threading
from collections import Counter
from contextlib import suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from importlib.util import find_spec
from random import Random
from typing import TYPE_CHECKING, Any, NamedTuple

import pytest

from sage import ConnectorError, Durable, FunctionError, GraphError, LocalEnvironment
from sage.connectors import HttpSink, JsonLines

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

pytestmark = pytest.mark.skipif(find_spec("urllib3") is None, reason="the package urllib3 is not installed")

COUNT = 200
SECRET = "tok-7391"


class Got(NamedTuple):
    """A request that arrived."""

    method: str
    path: str
    key: str
    headers: dict[str, str]
    body: bytes
    sender: tuple[str, int]


class Server(ThreadingHTTPServer):
    """Takes each request once, as its key says, after the answers that it was told to give before.

    Attributes:
        arrived: all requests.
        taken: the bodies of those that were taken, by key.
        answers: statuses and headers of the next answers that are other than 200.
    """

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.arrived: list[Got] = []
        self.taken: dict[str, bytes] = {}
        self.answers: list[tuple[int, dict[str, str]]] = []
        self.lock = threading.Lock()
        self.url = f"http://127.0.0.1:{self.server_port}/orders?token={SECRET}"

    def values(self) -> list[Any]:
        return [json.loads(body) for body in self.taken.values()]


class Handler(BaseHTTPRequestHandler):
    server: Server
    protocol_version = "HTTP/1.1"
    wbufsize = -1
    disable_nagle_algorithm = True

    def do_POST(self) -> None:
        length = int(self.headers["Content-Length"])
        body = self.rfile.read(length)
        if len(body) < length:
            return  # the sender was killed
        got = Got(
            self.command, self.path, self.headers["Idempotency-Key"], dict(self.headers), body, self.client_address
        )
        with self.server.lock:
            self.server.arrived.append(got)
            status, headers = self.server.answers.pop(0) if self.server.answers else (200, {})
            if status == 200:
                assert self.server.taken.setdefault(got.key, body) == body
        text = b"" if status == 200 else b"no such article"
        self.send_response(status)
        for name, value in {"Content-Length": str(len(text)), **headers}.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(text)

    do_PUT = do_POST

    def log_message(self, format: str, *args: object) -> None:
        pass


@pytest.fixture
def server() -> Iterator[Server]:
    running = Server()
    thread = threading.Thread(target=running.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    yield running
    running.shutdown()
    thread.join()
    running.server_close()


def run(url: str, records: list[Any], *, durable: Durable | None = None, **options: Any) -> None:
    env = LocalEnvironment("send", durable=durable)
    env.from_batch(records, name="in").sink(HttpSink(url, **options), name="out")
    env.run()


@pytest.mark.parametrize("is_durable", [False, True])
def test_each_record_is_a_request_in_order(server: Server, is_durable: bool, tmp_path: Path) -> None:
    records = [{"id": number, "text": "ä"} for number in range(20)]
    durable = Durable(tmp_path / "state") if is_durable else None
    run(server.url, records, durable=durable, headers={"X-From": "tests"})
    assert server.values() == records
    assert len(server.arrived) == 20
    first = server.arrived[0]
    assert (first.method, first.path) == ("POST", f"/orders?token={SECRET}")
    assert first.headers["Content-Type"] == "application/json"
    assert first.headers["X-From"] == "tests"


def test_several_records_are_a_list(server: Server, tmp_path: Path) -> None:
    run(server.url, list(range(25)), durable=Durable(tmp_path / "state"), records_max=10, method="PUT")
    assert [len(value) for value in server.values()] == [10, 10, 5]
    assert [number for some in server.values() for number in some] == list(range(25))
    assert {got.method for got in server.arrived} == {"PUT"}


@pytest.mark.parametrize(("format", "record", "body"), [("text", "ä", "ä".encode()), ("bytes", b"\xff", b"\xff")])
def test_other_formats(server: Server, format: str, record: Any, body: bytes) -> None:
    run(server.url, [record], format=format)
    assert list(server.taken.values()) == [body]


def test_a_commit_that_is_repeated_has_the_same_keys(server: Server) -> None:
    sink = HttpSink(server.url)
    sink.open("part-0", 0)
    sink.begin()
    sink.write([1, 2])
    token = sink.prepare(1)
    assert server.arrived == []
    assert token is not None
    sink.commit(token)
    sink.close()
    other = HttpSink(server.url)
    other.open("part-0", 1)
    other.commit(token)
    other.close()
    assert [got.key for got in server.arrived] == ["part-0-1-0", "part-0-1-1"] * 2
    assert server.values() == [1, 2]


def test_a_run_that_has_ended_sends_nothing_again(server: Server, tmp_path: Path) -> None:
    for end in (2, 2, 4):  # the second run finds nothing new
        (tmp_path / "in").write_text("".join(f"{number}\n" for number in range(end)))
        env = LocalEnvironment("send", durable=Durable(tmp_path / "state"))
        env.from_source(JsonLines(tmp_path / "in")).sink(HttpSink(server.url))
        env.run()
    assert [json.loads(got.body) for got in server.arrived] == [0, 1, 2, 3]


def test_a_run_that_has_failed_in_a_commit_sends_all_of_it_again(server: Server, tmp_path: Path) -> None:
    server.answers += [(200, {}), (418, {})]
    durable = Durable(tmp_path / "state")
    with pytest.raises(FunctionError):
        run(server.url, [1, 2], durable=durable)
    for _ in range(2):
        run(server.url, [1, 2], durable=durable)
    assert [json.loads(got.body) for got in server.arrived] == [1, 2, 1, 2]
    assert server.values() == [1, 2]


@pytest.mark.parametrize("status", [408, 425, 429, 500, 502, 503, 504])
def test_a_passing_trouble_is_passed_over(server: Server, status: int) -> None:
    server.answers += [(status, {}), (status, {"Retry-After": "0"})]
    run(server.url, [1, 2])
    assert server.values() == [1, 2]
    assert len({got.key for got in server.arrived}) == 2
    assert len(server.arrived) == 4


def failure(url: str, records: list[Any], **options: Any) -> tuple[str, list[str]]:
    with pytest.raises(FunctionError) as caught:
        run(url, records, **options)
    cause = caught.value.__cause__
    assert isinstance(cause, ConnectorError)
    assert SECRET not in f"{caught.value}{cause}{cause.__notes__}{cause.__cause__}"
    return str(cause), cause.__notes__


def test_a_request_that_is_refused_is_named(server: Server) -> None:
    server.answers.append((422, {}))
    text, notes = failure(server.url, [{"id": 1}])
    place = server.url.partition("?")[0]
    assert text == f"\"{place}\" answered 422 to '{{\"id\": 1}}': 'no such article'"
    assert notes == ['A record that the server refuses can be left out with refused="skip".']


def test_refused_requests_are_left_out_and_counted(server: Server, caplog: pytest.LogCaptureFixture) -> None:
    server.answers += [(422, {}), (200, {}), (400, {})]
    run(server.url, [1, 2, 3], refused="skip")
    assert server.values() == [2]
    place = server.url.partition("?")[0]
    assert [record.getMessage() for record in caplog.records if record.name == "sage.connectors.http"] == [
        f"skipped: \"{place}\" answered 422 to '1': 'no such article'; the last line counts all of them",
        f'skipped: "{place}" refused 2 requests',
    ]


def test_trouble_that_does_not_pass_ends_the_job(server: Server) -> None:
    server.answers += [(503, {})] * 3
    text, _ = failure(server.url, [1], retries_max=1, refused="skip")
    assert "answered 503 to '1'" in text
    assert len(server.arrived) == 2


class EndlessHandler(BaseHTTPRequestHandler):
    """Answers with events that do not end."""

    protocol_version = "HTTP/1.1"

    def do_POST(self) -> None:
        self.rfile.read(int(self.headers["Content-Length"]))
        self.send_response(200)
        self.send_header("Transfer-Encoding", "chunked")
        self.end_headers()
        with suppress(OSError):  # the other side has gone
            while True:
                self.wfile.write(b"8\r\ndata: 1\n\r\n")
                threading.Event().wait(0.01)

    def log_message(self, format: str, *args: object) -> None:
        pass


@pytest.mark.timeout(30)  # an answer that is waited for never ends
def test_the_end_of_an_answer_that_does_not_end_is_not_waited_for() -> None:
    with ThreadingHTTPServer(("127.0.0.1", 0), EndlessHandler) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        run(f"http://127.0.0.1:{server.server_port}/", [1, 2], timeout_s=0.2)
        server.shutdown()
        thread.join()


def test_all_requests_go_through_one_connection(server: Server) -> None:
    run(server.url, list(range(20)))
    assert len({got.sender for got in server.arrived}) == 1


def test_a_redirect_is_not_followed(server: Server) -> None:
    server.answers.append((302, {"Location": "/elsewhere"}))
    assert "answered 302" in failure(server.url, [1])[0]


def test_a_server_that_is_not_there_is_named() -> None:
    text, notes = failure(f"http://127.0.0.1:9/orders?token={SECRET}", [1], retries_max=1)
    assert text.startswith('"http://127.0.0.1:9/orders" cannot be reached: NewConnectionError: ')
    assert notes == ["It was tried 2 times."]


def test_a_record_that_json_does_not_have_is_named() -> None:
    assert "record {1} cannot be written as json" in failure("http://127.0.0.1:9", [{1}])[0]


WRONG: dict[str, dict[str, Any]] = {
    "url is not an address without a user": {"url": "https://ann:secret@host/"},
    "url is not an address": {"url": "ftp://host"},
    "url is": {"url": ""},
    "method is 'GET me'": {"method": "GET me"},
    "headers are not names with texts of one line": {"headers": {"X": "a\r\nY: b"}},
    "headers are not names with": {"headers": {"X:": "secret"}},
    "texts of one line in Latin-1": {"headers": {"X": "secret \N{EURO SIGN}"}},
    '"idempotency-KEY" is in headers': {"headers": {"idempotency-KEY": "one for all"}},
    "url is not an address without": {"url": "http://[::1/?secret"},
    "address without a user that": {"url": "http://host:99999/?secret"},
    "that begins with http": {"url": "http:///path"},
    "format is 'xml'": {"format": "xml"},
    "records_max is 0": {"records_max": 0},
    'records_max is 2 and format "text"': {"records_max": 2, "format": "text"},
    "retries_max is -1": {"retries_max": -1},
    "timeout_s is 0": {"timeout_s": 0},
    "refused is 'retry'": {"refused": "retry"},
}


@pytest.mark.parametrize("message", WRONG)
def test_an_option_that_cannot_work_is_refused_where_it_is_given(message: str) -> None:
    with pytest.raises(GraphError) as caught:
        HttpSink(**{"url": "https://host", **WRONG[message]})
    assert message in str(caught.value)
    assert "secret" not in f"{caught.value}{caught.value.__notes__}"


PROGRAM = """
import signal, sys, time
from sage import Durable, LocalEnvironment
from sage.connectors import HttpSink, JsonLines

def slow(row):
    time.sleep(0.002)
    return row

env = LocalEnvironment("send", durable=Durable("state", interval_s=0.05))
env.from_source(JsonLines("in.jsonl"), name="rows").map(slow).sink(HttpSink(sys.argv[1]), name="out")
if len(sys.argv) > 2:
    signal.setitimer(signal.ITIMER_REAL, float(sys.argv[2]))  # the system ends the process, wherever it is
print(env.submit(autostop=True).report, flush=True)
"""


@pytest.mark.timeout(180)  # starts four programs
@pytest.mark.parametrize("seed", [0, *(pytest.param(seed, marks=pytest.mark.proof) for seed in range(1, 4))])
def test_each_row_once_whenever_the_program_is_killed(seed: int, server: Server, tmp_path: Path) -> None:
    (tmp_path / "in.jsonl").write_text("".join(f"{number}\n" for number in range(COUNT)))
    random = Random(seed)

    def ended(*until: str) -> tuple[int, str]:
        command = [sys.executable, "-W", "error", "-c", PROGRAM, server.url, *until]
        done = subprocess.run(
            command, cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=60
        )
        return done.returncode, done.stdout

    for _ in range(3):
        code, text = ended(str(random.uniform(0.4, 1.2)))
        assert code in {0, -signal.SIGALRM}, text
    code, text = ended()
    assert code == 0, text
    assert "every record is accounted for" in text
    assert Counter(server.values()) == Counter(range(COUNT))


def test_the_promise_is_told(tmp_path: Path) -> None:
    env = LocalEnvironment("send", durable=Durable(tmp_path / "state"))
    env.from_batch([1], name="in").sink(HttpSink("https://host"), name="out")
    assert (
        'over a restart, "out" gets each record exactly once if its server knows Idempotency-Key, and otherwise at '
        "least once" in env.explain()
    )
