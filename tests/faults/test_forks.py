"""Processes that are forked while a job runs: they end as others do, and have no part in the job's services."""

from __future__ import annotations

import multiprocessing
import os
import signal
import subprocess
import sys
import textwrap
import threading
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from support.fair_clock import FairClock

from sage import BaseService, Http, LocalEnvironment, ServiceOptions, ServiceUnavailableError
from sage.serving import PipelineBridge
from sage.testing import assert_clean

FORKING = multiprocessing.get_context("fork")
WAIT_S = 20.0


class Doubling:
    def process(self, record: int) -> int:
        return record * 2

    async def later(self, record: int) -> int:
        return record * 2


class Forking:
    """A service that asks another one, and has a forked process do the same."""

    def __init__(self, other: Any) -> None:
        self.other = other
        self.method = other.process

    def process(self, record: int) -> tuple[Any, ...]:
        calls.update(handle=self.other, method=self.method)
        with ProcessPoolExecutor(1, mp_context=FORKING) as pool:
            refused = [pool.submit(refused_call, name, record) for name in calls]
            return self.other(record), *(future.result(WAIT_S) for future in refused)


calls: dict[str, Any] = {}


def attempt(function: Any, *args: Any) -> str:
    try:
        return f"answered {function(*args)}"
    except ServiceUnavailableError as error:
        return f"{error}; {' '.join(error.__notes__)}"


def refused_call(name: str, record: int) -> str:
    return attempt(calls[name], record)


def is_refusal(text: str) -> bool:
    return 'service "doubling" is called in process ' in text and "in the parent" in text and "spawn" in text


OPTIONS = {
    "inline": ServiceOptions(),
    "unlimited": ServiceOptions(concurrency=None),
    "with a bound": ServiceOptions(call_timeout_s=WAIT_S),
    "process": ServiceOptions(host="process"),
    "shared": ServiceOptions(shared=True),
    "shared process": ServiceOptions(shared=True, host="process"),
}


def handles_are_refused(env: LocalEnvironment, doubling: Any) -> None:
    """Run a job whose function calls a service while the processes that it forks try to, in every way there is."""

    def call(record: int) -> tuple[int, list[str]]:
        calls["handle"] = doubling
        calls["method"] = doubling.process  # found before, as a loop that is fast does
        calls["coroutine"] = doubling.later
        calls["later"] = lambda value: doubling._require().call_async("process", (value,), {}, None).result()
        with ProcessPoolExecutor(2, mp_context=FORKING) as pool:
            futures = [pool.submit(refused_call, name, record) for name in calls]
            own = [doubling(record) for _ in range(20)]
            texts = [future.result(WAIT_S) for future in futures]
        assert own == [record * 2] * 20
        return own[0], texts

    seen: list[tuple[int, list[str]]] = []
    env.from_batch([1, 2, 3]).map(call).sink(seen.append)
    env.submit(autostop=True, keep_services=True)
    report = env.jobmanager.jobs[env.env_uuid].report
    assert report is not None
    assert (report.state, report.cleanliness) == ("completed", "clean")
    assert [value for value, _ in seen] == [2, 4, 6]
    assert [text for _, texts in seen for text in texts if not is_refusal(text)] == []


@pytest.mark.parametrize("kind", OPTIONS)
def test_a_service_refuses_calls_of_forked_processes(kind: str) -> None:
    """The child has a copy of the parent's sockets and locks: it would take another's answer, or wait for ever."""
    with assert_clean():
        env = LocalEnvironment(kind)
        doubling = env.register_service("doubling", Doubling, options=OPTIONS[kind])
        handles_are_refused(env, doubling)
        handles_are_refused(env, doubling)  # by a job that has taken over what was kept
        env.close()


def test_a_command_refuses_forked_processes() -> None:
    with assert_clean():
        env = LocalEnvironment("command")
        command = env.register_command(
            "doubling", [sys.executable, "-m", "http.server", "{port}", "--bind", "127.0.0.1"], ready=Http("/")
        )
        seen: list[tuple[int, str]] = []

        def call(record: int) -> tuple[int, str]:
            calls["port"] = lambda _: command.port
            with ProcessPoolExecutor(1, mp_context=FORKING) as pool:
                return command.port, pool.submit(refused_call, "port", record).result(WAIT_S)

        env.from_batch([1]).map(call).sink(seen.append)
        env.submit(autostop=True)
    port, text = seen[0]
    assert isinstance(port, int)
    assert is_refusal(text), text


def test_the_bridge_of_a_pipeline_refuses_forked_processes() -> None:
    """Nobody would ever answer what is put into the copy of its queue."""
    bridge = PipelineBridge()
    calls["bridge"] = lambda record: bridge.submit(record).get()
    with ProcessPoolExecutor(1, mp_context=FORKING) as pool:
        text = pool.submit(refused_call, "bridge", 1).result(WAIT_S)
    assert 'service "pipeline" is called in process ' in text


def test_a_process_that_a_service_forks_calls_no_other_service() -> None:
    """The service has a process of its own, whose link to the driver is not one for two."""
    with assert_clean():
        env = LocalEnvironment("nested")
        doubling = env.register_service("doubling", Doubling)
        forking = env.register_service("forking", Forking, doubling, options=ServiceOptions(host="process"))
        seen: list[Any] = []
        env.from_batch([1, 2]).map(forking).sink(seen.append)
        env.submit(autostop=True)
    assert [value for value, *_ in seen] == [2, 4]
    assert [text for _, *texts in seen for text in texts if not is_refusal(text)] == []


def test_a_lock_that_another_thread_holds_does_not_hang_the_child() -> None:
    """Each record is in the serial service while another task forks."""

    class Slow:
        def process(self, record: int) -> int:
            time.sleep(0.01)
            return record

    def fork(record: int) -> str:
        method = slow.process
        pid = os.fork()
        if pid == 0:
            text = attempt(method, record)
            os._exit(0 if "in the parent" in text else 1)
        return f"child {os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])}"

    env = LocalEnvironment("locked")
    slow = env.register_service("slow", Slow)
    seen: list[str] = []
    env.from_batch(range(60)).map(slow).sink(lambda _: None)
    env.from_batch(range(20)).map(fork).sink(seen.append)
    with assert_clean():
        env.submit(autostop=True)
    assert seen == ["child 0"] * 20


def test_a_child_that_stays_does_not_hold_the_job() -> None:
    """It has no copy of the pipe over which the job hears of signals."""
    began_at = time.monotonic()
    children: list[Any] = []

    def start(record: int) -> int:
        child = FORKING.Process(target=time.sleep, args=(WAIT_S,), daemon=True)
        child.start()
        children.append(child)
        return record

    env = LocalEnvironment("staying")
    env.from_batch([1]).map(start).sink(lambda _: None)
    env.submit(autostop=True)
    assert time.monotonic() - began_at < WAIT_S / 2
    children[0].terminate()
    children[0].join()
    assert children[0].exitcode == -signal.SIGTERM


@pytest.mark.parametrize("host", ["function", "inline", "process"])
@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_a_forked_child_has_the_programs_own_handlers(host: str, signum: signal.Signals) -> None:
    """Ours would do nothing there, and tell this process of a signal that was the child's."""
    with assert_clean():
        env = LocalEnvironment("handlers")
        seen: list[Any] = []
        function: Any = Signalled(signum).process
        if host != "function":
            options = ServiceOptions(host=host)  # type: ignore[arg-type]
            function = env.register_service("signalled", Signalled, signum, options=options)
        env.from_batch(range(4)).map(function).sink(seen.append)
        env.submit(autostop=True)
    assert seen == [1 if signum == signal.SIGINT else -signum] * 4


class Signalled:
    def __init__(self, signum: signal.Signals) -> None:
        self.signum = signum

    def process(self, record: int) -> Any:
        here, there = FORKING.Pipe(duplex=False)
        child = FORKING.Process(target=be_signalled, args=(there,))
        child.start()
        here.recv()
        assert child.pid is not None
        os.kill(child.pid, self.signum)
        child.join(WAIT_S)
        return child.exitcode


def be_signalled(there: Any) -> None:
    sys.stderr = open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115  (where a KeyboardInterrupt is told)
    there.send(None)
    until = time.monotonic() + WAIT_S
    while time.monotonic() < until:  # a signal that comes just before a wait begins does not end that wait
        threading.Event().wait(0.01)


COMES_BACK = """
    import os, sys
    from sage import LocalEnvironment

    def fork(record):
        pid = os.fork()
        if pid == 0:
            {deed}
            return record
        return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])

    def show(record):
        with open("records", "a") as file:
            file.write(f"{{record}}\\n")

    env = LocalEnvironment("back")
    {graph}
    env.submit(autostop=True)
    print("submitted by", "parent" if os.getpid() == parent else "child")
"""


@pytest.mark.parametrize(
    ("deed", "code", "told"),
    [
        ("pass", 70, "was forked in a function of a job"),
        ("sys.exit(5)", 5, ""),
        ("raise ValueError('mine')", 70, "ValueError: mine"),
    ],
)
@pytest.mark.parametrize("policy", ["fail", "skip"])
def test_a_child_that_comes_back_from_a_function_ends_there(
    deed: str, code: int, told: str, policy: str, tmp_path: Path
) -> None:
    """It would go through the rest of the records a second time, and end services that it has only a copy of."""
    graph = f'env.from_batch([1, 2, 3]).map(fork, on_error="{policy}").sink(show, parallelism=2)'
    body = textwrap.dedent(COMES_BACK).format(deed=deed, graph=graph)
    program = "import os\nparent = os.getpid()\n" + body
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=tmp_path, capture_output=True, text=True, timeout=WAIT_S, check=False
    )
    assert done.stdout == "submitted by parent\n", done.stderr
    assert sorted((tmp_path / "records").read_text().split()) == [str(code)] * 3
    assert told in done.stderr


POOL = """
    import os, signal, sys, time
    from concurrent.futures import ProcessPoolExecutor
    from sage import BaseService, LocalEnvironment

    signal.signal(signal.SIGINT, signal.default_int_handler)

    def mark(text):
        with open("marks", "a") as file:
            file.write(text + "\\n")

    def ignore():
        signal.signal(signal.SIGINT, signal.SIG_IGN)

    class Pool(BaseService):
        def setup(self):
            self.pool = ProcessPoolExecutor(4, initializer=ignore)
            list(self.pool.map(time.sleep, [0.05] * 8))

        def process(self, record):
            return self.pool.submit(abs, record).result()

        def cleanup(self):
            self.pool.shutdown()
            mark("cleaned")

    def numbers():
        time.sleep(0.01)
        if not os.path.exists("marks"):
            mark("runs")
            print("runs", flush=True)
        return 1

    env = LocalEnvironment("pool")
    pool = env.register_service("pool", Pool)
    env.from_source(numbers).map(pool).sink(lambda _: None)
    try:
        env.submit(autostop=True)
    finally:
        report = env.jobmanager.jobs[env.env_uuid].report
        print(report.state, report.cleanliness, flush=True)
"""


def test_one_ctrl_c_for_a_pool_and_its_driver_is_one(tmp_path: Path, clock: FairClock) -> None:
    """Every process of the terminal gets it; those of the pool would each tell the driver of one more."""
    with subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(POOL)],
        cwd=tmp_path,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "runs\n"
        clock.watch(process.pid)
        began_at = time.monotonic()
        os.killpg(process.pid, signal.SIGINT)
        output, errors = process.communicate(timeout=WAIT_S)
    assert clock.elapsed_s(began_at) < 5
    assert output == "stopped clean\n", errors
    assert (tmp_path / "marks").read_text().split() == ["runs", "cleaned"]
    assert process.returncode == -signal.SIGINT


class Claiming(BaseService):
    """Claims a path in its own process, which it may, and in a forked one, whose claims nobody would act upon."""

    def process(self, path: str) -> str:
        self.ctx.own_path(path)
        here, there = FORKING.Pipe(duplex=False)
        child = FORKING.Process(target=self.claim, args=(there, path))
        child.start()
        text: str = here.recv()
        child.join(WAIT_S)
        return text

    def claim(self, there: Any, path: str) -> None:
        try:
            self.ctx.own_path(path)
        except Exception as error:
            there.send(str(error))
        else:
            there.send("claimed")


@pytest.mark.parametrize("host", ["inline", "process"])
def test_a_forked_process_claims_nothing(host: Any, tmp_path: Path) -> None:
    env = LocalEnvironment("claims")
    claiming = env.register_service("claiming", Claiming, options=ServiceOptions(host=host))
    seen: list[str] = []
    env.from_batch([str(tmp_path / "spill")]).map(claiming).sink(seen.append)
    env.submit(autostop=True)
    assert "forked from" in seen[0], seen
