"""Files in an object store: names that a pattern finds, runs that go on, kills, and stores that cannot be used."""

from __future__ import annotations

import glob
import json
import os
import signal
import subprocess
import sys
import threading
from collections import Counter
from contextlib import suppress
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from random import Random
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from support.needs import needs_parquet
from support.object_server import SECRET, needs_objects, objects

from sage import ConnectorError, FunctionError, GraphError, LocalEnvironment
from sage.connectors import Csv, CsvFiles, JsonLines, JsonLinesFiles, Parquet, ParquetFiles, Text, TextFiles, places

if TYPE_CHECKING:
    from collections.abc import Iterator

pytestmark = needs_objects

COUNT = 300


def put(path: Path, name: str, text: str) -> None:
    place = places.Bucket(objects().url(path))
    place.open()
    file = place.begin(name)
    file.write(text.encode())
    place.finish(file, name)
    place.close()


def read(source: Any, position: Any = None) -> tuple[list[Any], Any]:
    found: list[Any] = []
    source.open(position)
    try:
        while (records := source.read(2)) is not None:
            found += records
    finally:
        source.close()
    return found, source.position()


NAMES = st.lists(st.sampled_from(["a", "b", ".a", "ab", "a.x"]), min_size=1, max_size=3)
PATTERNS = st.lists(st.sampled_from(["a", "*", "**", "?", "a*", ".*", "[ab]", "*.x"]), min_size=1, max_size=3)


@given(st.lists(NAMES, max_size=6), PATTERNS)
def test_a_pattern_matches_as_in_folders(paths: list[list[str]], pattern: list[str]) -> None:
    with TemporaryDirectory() as folder:
        kept = []
        for path in paths:
            file = Path(folder, *path)
            if not any(above.is_file() for above in file.parents) and not file.exists():
                file.parent.mkdir(parents=True, exist_ok=True)
                file.touch()
                kept.append(path)
        found = filter(os.path.isfile, glob.glob(os.path.join(folder, *pattern), recursive=True))
        expected = {tuple(Path(path).relative_to(folder).parts) for path in found}
        assert {tuple(path) for path in kept if places._matches(path, pattern)} == expected


def test_a_run_gives_the_lines_that_are_new(tmp_path: Path) -> None:
    url = objects().url(tmp_path)
    put(tmp_path, "1.jsonl", "1\n2\n3\n")
    put(tmp_path, "below/2.jsonl", "4\n")
    put(tmp_path, ".hidden.jsonl", "5\n")
    put(tmp_path, "other.txt", "6\n")
    found, position = read(JsonLines(url))
    assert found == [1, 2, 3, 4]
    assert read(JsonLines(url), position) == ([], position)
    put(tmp_path, "1.jsonl", "1\n2\n3\n7\n")
    put(tmp_path, "below/3.jsonl", "8\n")
    found, later = read(JsonLines(f"{url}/**/*.jsonl"), position)
    assert found == [7, 8]
    assert read(JsonLines(f"{url}/*.jsonl"))[0] == [1, 2, 3, 7]
    assert read(JsonLines(f"{url}/below/3.jsonl"))[0] == [8]
    put(tmp_path, "1.jsonl", "1\n")
    with pytest.raises(ConnectorError, match=rf'file "{url}/1.jsonl" has 2 bytes, and 8 were read before'):
        read(JsonLines(url), later)


ROWS = [{"id": str(number), "text": "long " * 20} for number in range(200)]
KINDS: dict[str, tuple[Any, Any, list[Any]]] = {
    "JSON Lines": (JsonLinesFiles, JsonLines, ROWS),
    "CSV": (CsvFiles, Csv, ROWS),
    "text": (TextFiles, Text, [row["text"].strip() for row in ROWS]),
    "Parquet": (ParquetFiles, Parquet, ROWS),
}


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=needs_parquet if name == "Parquet" else ()) for name in KINDS]
)
def test_each_format_comes_back_in_pieces(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(places, "READ_BYTES", 1_000)
    sink, source, records = KINDS[name]
    url = objects().url(tmp_path)
    env = LocalEnvironment("write")
    env.from_batch(records).sink(sink(url))
    env.run()
    assert read(source(url))[0] == records
    env = LocalEnvironment("read")
    found: list[Any] = []
    env.from_source(source(url)).sink(found.append)
    env.run()
    assert found == records


PROGRAM = """
import signal, sys, time
from sage import Durable, LocalEnvironment
from sage.connectors import JsonLines, JsonLinesFiles

def slow(row):
    time.sleep(0.001)
    return {"id": row["id"], "day": row["id"] % 3}

url = sys.argv[1]
env = LocalEnvironment("copy", durable=Durable("state", interval_s=0.1))
rows = env.from_source(JsonLines(f"{url}/in/*.jsonl"), name="rows").map(slow)
rows.sink(JsonLinesFiles(f"{url}/out", partition_by="day", file_bytes_max=1_000), name="out")
if len(sys.argv) > 2:
    signal.setitimer(signal.ITIMER_REAL, float(sys.argv[2]))  # the system ends the process, wherever it is
print(env.submit(autostop=True).report, flush=True)
"""


@pytest.mark.timeout(180)  # starts four programs
@pytest.mark.parametrize("seed", [0, *(pytest.param(seed, marks=pytest.mark.proof) for seed in range(1, 4))])
def test_each_row_once_whenever_the_program_is_killed(seed: int, tmp_path: Path) -> None:
    url = objects().url(tmp_path)
    for part in range(2):
        rows = (json.dumps({"id": number}) for number in range(part, COUNT, 2))
        put(tmp_path, f"in/{part}.jsonl", "\n".join(rows))

    def run(*until: str) -> tuple[int, str]:
        command = [sys.executable, "-W", "error", "-c", PROGRAM, url, *until]
        ended = subprocess.run(
            command, cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=60
        )
        return ended.returncode, ended.stdout

    random = Random(seed)
    for _ in range(3):
        code, text = run(str(random.uniform(0.5, 2.0)))
        assert code in {0, -signal.SIGALRM}, text
        with suppress(ConnectorError):  # nothing is there yet
            found = Counter(row["id"] for row in read(JsonLines(f"{url}/out"))[0])
            assert max(found.values()) == 1
    code, text = run()
    assert code == 0, text
    assert "every record is accounted for" in text
    found = Counter(row["id"] for row in read(JsonLines(f"{url}/out"))[0])
    assert found == Counter(range(COUNT))
    place = places.Bucket(f"{url}/out")
    place.open()
    assert [name for name in place.names() if "/." in name or name.startswith(".")] == []
    place.close()


@pytest.fixture
def refusing(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Let a server be asked that knows no key."""

    class Refusal(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            body = b"<Error><Code>SignatureDoesNotMatch</Code><Message>Check your key.</Message></Error>"
            self.send_response(403)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, format: str, *args: object) -> None:
            pass

    server = HTTPServer(("127.0.0.1", 0), Refusal)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{server.server_port}")
    yield
    server.shutdown()
    thread.join()
    server.server_close()


def failure(source: Any) -> str:
    env = LocalEnvironment("bad")
    env.from_source(source).sink(lambda _: None)
    with pytest.raises(FunctionError) as caught:
        env.run()
    texts: list[str] = [str(caught.value), *getattr(caught.value, "__notes__", [])]
    assert SECRET not in "".join(texts)
    return texts[0]


def test_a_key_that_is_refused_is_told_without_the_key(refusing: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", SECRET)
    assert "SignatureDoesNotMatch" in failure(JsonLines("s3://tests/in/*.jsonl"))


def test_a_store_that_is_not_there_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    monkeypatch.setattr(places, "RETRIES_MAX", 1)
    text = failure(JsonLines("s3://tests/in/*.jsonl"))
    assert '"s3://tests/in/*.jsonl" cannot be looked through' in text
    assert "http://127.0.0.1:9" in text


def test_a_bucket_or_an_object_that_is_not_there_is_named(tmp_path: Path) -> None:
    assert "NoSuchBucket" in failure(JsonLines("s3://nothing/in/*.jsonl"))
    url = objects().url(tmp_path)
    assert f'no file matches "{url}/in.jsonl"' in failure(JsonLines(f"{url}/in.jsonl"))


def test_a_bucket_that_vanishes_before_the_commit_is_told(tmp_path: Path) -> None:
    sink = JsonLinesFiles(objects().url(tmp_path))
    sink.open("part", 0)
    sink.begin()
    sink.write([1])
    token = sink.prepare(1)
    sink.close()
    gone = JsonLinesFiles("s3://nothing/out")
    with pytest.raises(ConnectorError, match="NoSuchBucket"):
        gone.open("part", 1)
    assert token is not None
    with pytest.raises(ConnectorError, match=r'folder "s3://nothing/out" cannot be written into: .*NoSuchBucket'):
        gone.commit(token)
    gone.close()


class Store(HTTPServer):
    """A store with objects of four bytes, which counts requests and, unlike S3, says if there is nothing to delete."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), StoreHandler)
        self.asked: list[str] = []
        self.address = f"http://127.0.0.1:{self.server_port}"


ENTRY = (
    "<Contents><Key>in/{}.txt</Key><LastModified>2026-01-01T00:00:00.000Z</LastModified>"
    "<ETag>1</ETag><Size>4</Size></Contents>"
)


class StoreHandler(BaseHTTPRequestHandler):
    server: Store

    def answer(self) -> None:
        self.server.asked.append(f"{self.command} {self.path}")
        self.rfile.read(int(self.headers.get("Content-Length", 0)))
        is_list = self.command == "GET" and "prefix=in" in self.path
        text = "".join(map(ENTRY.format, range(50))) if is_list else ""
        body = f"<ListBucketResult><Name>b</Name><IsTruncated>false</IsTruncated>{text}</ListBucketResult>".encode()
        self.send_response(404 if self.command in ("DELETE", "HEAD") else 200)
        self.send_header("ETag", "1")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    do_GET = do_PUT = do_DELETE = do_HEAD = answer

    def log_message(self, format: str, *args: object) -> None:
        pass


@pytest.fixture
def store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Store]:
    server = Store()
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    account = {"gcs_base_url": server.address, "disable_oauth": True}
    account |= dict.fromkeys(("client_email", "private_key", "private_key_id"), "")
    (tmp_path / "account.json").write_text(json.dumps(account))
    monkeypatch.setenv("GOOGLE_SERVICE_ACCOUNT", str(tmp_path / "account.json"))
    yield server
    server.shutdown()
    thread.join()
    server.server_close()


def test_objects_that_were_read_cost_no_request_each(store: Store) -> None:
    source = Text("gs://b/in/*.txt")
    source.open({f"gs://b/in/{number}.txt": 4 for number in range(50)})
    assert len(store.asked) == 1
    source.close()


def test_a_job_that_fails_deletes_only_objects_that_it_has_put(store: Store) -> None:
    def fail(number: int) -> dict[str, int]:
        return {"day": 1 // (9 - number)}

    env = LocalEnvironment("failing")
    env.from_batch(range(10)).map(fail, name="divide").sink(JsonLinesFiles("gs://b/out", partition_by="day"))
    with pytest.raises(FunctionError, match='operator "divide" failed'):
        env.run()
    assert [asked.split()[0] for asked in store.asked] == ["GET"]


def test_an_object_that_somebody_has_removed_is_not_missed(store: Store) -> None:
    sink = TextFiles("gs://b/out", file_bytes_max=1)
    sink.open("part", 0)
    sink.begin()
    sink.write(["a"])
    assert store.asked[-1].startswith("PUT ")
    sink.abort()
    assert store.asked[-1].startswith("DELETE ")
    sink.close()


@pytest.mark.parametrize("url", ["s4://bucket/in", "https://host/in.jsonl", "file:///in.jsonl", "s3:///in.jsonl"])
def test_another_address_is_refused_where_it_is_given(url: str) -> None:
    with pytest.raises(GraphError, match="is the address of no object store") as caught:
        JsonLines(url)
    assert caught.value.__notes__ == ['Give one of "s3://bucket/...", "gs://bucket/...", "az://bucket/...".']


def test_dead_letters_stay_on_this_machine() -> None:
    with pytest.raises(GraphError, match=r'store is "s3://tests/failed\.jsonl"'):
        LocalEnvironment("letters").dead_letters(store="s3://tests/failed.jsonl")
