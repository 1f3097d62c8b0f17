"""Several processes of one service: how much faster they are, a death among them, and processes that are recycled."""

from __future__ import annotations

import mmap
import os
import signal
import sys
import tempfile
import threading
import time
import urllib.request
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from benchmarks.measure import at_least, at_most
from sage import BaseService, Http, LocalEnvironment, Retry, ServiceOptions
from sage._processes import resident_bytes

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from benchmarks.measure import Figure, Scale
    from sage import JobReport
    from sage._runtime.job import Job

CALL_S = 0.05
CALLERS = 64
REPLICAS = 4

CALL_BYTES = 10_000_000
LEAKY_CALL_S = 0.02
LIMIT_MB = 600

SERVER = """
import sys, time
from http.server import BaseHTTPRequestHandler, HTTPServer
class Answer(BaseHTTPRequestHandler):
    def do_GET(self):
        time.sleep(0 if self.path == "/health" else float(sys.argv[2]))
        self.send_response(200)
        self.end_headers()
    def log_message(self, *_): pass
class Server(HTTPServer):
    request_queue_size = 256
Server(("127.0.0.1", int(sys.argv[1])), Answer).serve_forever()
"""
"""Answers one request after the other, as a model does that fills its processor."""

Host = Literal["process", "command"]


class Model(BaseService):
    """Takes its time for a call, may need memory from the system for each, and may keep it."""

    def __init__(self, call_s: float, call_bytes: int = 0, keeps: bool = False, made: str | None = None) -> None:
        self.call_s, self.keeps, self.made = call_s, keeps, made
        self.content = b"x" * call_bytes
        self.kept: list[mmap.mmap] = []

    def process(self, call: int) -> int:
        """Make a call, and note that it was made."""
        until = time.monotonic() + self.call_s
        if self.content:
            memory = mmap.mmap(-1, len(self.content))
            memory.write(self.content)
            if self.keeps:
                self.kept.append(memory)
            else:
                memory.close()
        if self.made is not None:
            with open(self.made, "a") as file:
                file.write(f"{call}\n")
        time.sleep(max(until - time.monotonic(), 0.0))
        return os.getpid()


def asking(env: LocalEnvironment, host: Host, replicas: int) -> tuple[Callable[[int], object], Callable[[], int]]:
    """Register replicas of a service, and return how one is called, and how the process of one is found."""
    options: dict[str, Any] = {"replicas": replicas, "restart": "on_failure"}
    if host == "process":
        model = env.register_service(
            "model", Model, CALL_S, options=ServiceOptions(host="process", idempotent=True, **options)
        )
        return model.process, lambda: int(model.process(0))
    words = [sys.executable, "-c", SERVER, "{port}", str(CALL_S)]
    server = env.register_command("model", words, ready=Http("/health"), options=ServiceOptions(**options))

    def ask(call: int) -> int:
        with urllib.request.urlopen(f"{server.url}/{call}", timeout=60) as answer:
            answer.read()
        return call

    return ask, lambda: int(server.pid)


def asked(
    host: Host, replicas: int, calls: int, during: Callable[[int], None] | None = None
) -> tuple[Job, list[float]]:
    """Run a job of so many calls from many callers, and return it with the moments of all answers."""
    env = LocalEnvironment("replicas")
    ask, pid = asking(env, host, replicas)
    pids: list[int] = []
    done_at: list[float] = []

    def call(number: int) -> int:
        if number == 0:
            pids.append(pid())
        ask(number)
        done_at.append(time.time())
        return number

    # A client of a command sees the end of its process as a broken connection.
    policy = Retry(attempts_max=20, backoff_s=(0.01, 0.2)) if host == "command" else "fail"
    stream = env.from_batch(range(calls)).map(call, parallelism=CALLERS, on_error=policy)
    stream.sink(abs)
    job = env.submit()
    if during is not None:
        while len(done_at) < calls // 3:
            time.sleep(0.01)
        during(pids[0])
    report = job.wait()
    if report.state != "completed" or len(done_at) != calls:
        raise AssertionError(f"{len(done_at)} of {calls} calls came back: {report}")
    return job, done_at


def replicas(scale: Scale) -> Iterator[Figure]:
    """Four replicas of 50 ms a call against one, with 64 callers; then one of the four is killed in the middle."""
    calls = max(scale.records // 500, 400)
    for host in ("process", "command"):
        runs = [asked(host, count, calls) for count in (1, REPLICAS)]
        rates = [_rate(done_at[CALLERS:]) for _, done_at in runs]  # when each caller has been answered once
        yield at_least(f"replicas, 4 of 50 ms, {host}", "times the rate of one", 3.7, [rates[1] / rates[0]])
        killed_at: list[float] = []

        def kill(pid: int) -> None:
            killed_at.append(time.time())  # noqa: B023
            os.kill(pid, signal.SIGKILL)

        job, done_at = asked(host, REPLICAS, max(calls, 1200), kill)
        yield at_most(
            f"replicas, one killed, {host}", "times its start until it is back", 2.0, [_back(job, killed_at[0])]
        )
        rate = _rate([at for at in done_at if at > _ready(job, 2)])
        yield at_least(f"replicas, rate when it is back, {host}", "of four", 0.9, [rate / rates[1]])


def _rate(done_at: list[float]) -> float:
    return (len(done_at) - 1) / (done_at[-1] - done_at[0])


def _moments(job: Job, after: str) -> list[tuple[float, str]]:
    return [(event.at, event.name) for event in job.events() if event.subject == "service" and event.after == after]


def _ready(job: Job, time_of: int) -> float:
    """Return when a replica was ready for so many times."""
    counts: Counter[str] = Counter()
    for at, name in _moments(job, "ready"):
        counts[name] += 1
        if counts[name] == time_of:
            return at
    raise AssertionError("the replica did not come back")


def _back(job: Job, killed_at: float) -> float:
    """Return how long it took until the killed replica was back, as a multiple of the first start of the slowest."""
    began = {name: at for at, name in reversed(_moments(job, "starting"))}
    ready = {name: at for at, name in reversed(_moments(job, "ready"))}
    start_s = max(ready[name] - began[name] for name in ready if "[" in name)
    return (_ready(job, 2) - killed_at) / start_s


def recycling(scale: Scale) -> Iterator[Figure]:
    """A service that keeps the 10 MB of each call, recycled by its memory, against one that gives them back.

    Both get the memory from the system, which may take longer than the call on a busy machine.
    """
    calls = scale.records // 100
    plain, _ = recycled(calls, keeps=False)
    leaking, peak_mb = recycled(calls, keeps=True)
    name = f"recycling, {calls:,} calls of 10 MB"
    yield at_least(name, "of the rate without a leak", 0.9, [plain.running_s / leaking.running_s])
    yield at_most(name, "times the limit, peak of both processes", 4.0, [peak_mb / LIMIT_MB])


def recycled(calls: int, *, keeps: bool) -> tuple[JobReport, float]:
    """Run a job whose service is recycled, and return its report and the peak of the memory of its processes.

    Raises:
        AssertionError: a call was lost, or made twice.
    """
    with tempfile.TemporaryDirectory() as folder:
        made = Path(folder) / "made"
        env = LocalEnvironment("recycling")
        options = ServiceOptions(host="process", recycle_rss_mb=LIMIT_MB)
        model = env.register_service("model", Model, LEAKY_CALL_S, CALL_BYTES, keeps, str(made), options=options)
        pids: dict[int, None] = {}
        peaks: list[float] = []
        is_over = threading.Event()

        def watch() -> None:
            while not is_over.wait(0.05):
                peaks.append(sum(resident_bytes(pid) for pid in [*pids][-2:]) / 1e6)

        watcher = threading.Thread(target=watch)
        watcher.start()
        try:
            env.from_batch(range(calls)).map(model.process).sink(lambda pid: pids.setdefault(pid))
            report = env.submit(autostop=True).wait()
        finally:
            is_over.set()
            watcher.join()
        counts = Counter(made.read_text().split())
    if counts != Counter(str(number) for number in range(calls)):
        raise AssertionError(
            f"{calls - len(counts)} calls were lost, and {sum(counts.values()) - len(counts)} made twice"
        )
    if keeps != bool(report.service("model").recycled):
        raise AssertionError(f"{report.service('model').recycled} processes were recycled")
    return report, max(peaks, default=0.0)
