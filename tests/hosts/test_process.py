"""Services in processes of their own: calls, errors, logs, deaths, and that nothing is left of them."""

from __future__ import annotations

import array
import gc
import logging
import os
import signal
import socket
import subprocess
import sys
import textwrap
import threading
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from support.host_services import (
    Crowd,
    Departing,
    FullError,
    Leaving,
    Listening,
    Mortal,
    Parent,
    Printing,
    Rows,
    Stuck,
    Tools,
    Unpicklable,
)
from support.recording_services import Notes, report_of

import sage
from sage import (
    BaseService,
    Cleanliness,
    GraphError,
    JobError,
    JobErrorGroup,
    LocalEnvironment,
    MapFunction,
    Outcome,
    ServiceError,
    ServiceOptions,
    ServiceStartError,
    ServiceTimeoutError,
    ServiceUnavailableError,
)
from sage._processes import process
from sage._remote.protocol import LogSide
from sage._remote.rpc import RpcClosedError, SocketPairRpc
from sage.testing import assert_clean

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from support.fair_clock import FairClock

SOON_S = 20.0
"""Bound of every wait for something that happens at once on an idle machine."""

OWN = ServiceOptions(host="process")


@pytest.fixture(autouse=True)
def nothing_left() -> Iterator[None]:
    """Look after each test that no process, descriptor, thread or port is left."""
    with assert_clean(within_s=5.0, ignore=["temporary *", "shared memory *"]):
        yield
        gc.collect()


def options(**others: Any) -> ServiceOptions:
    return ServiceOptions(host="process", **others)


def ask(work: Callable[[LocalEnvironment], Any], **services: tuple[Any, ...]) -> Any:
    """Run `work` in a map of a job that has the services, each with its options, and return what it returned."""
    env = LocalEnvironment("asking")
    for name, (target, *args, given) in services.items():
        env.register_service(name, target, *args, options=given)
    arrived: list[Any] = []
    env.from_batch([1]).map(lambda _: [work(env)]).sink(arrived.append)
    job = env.submit(autostop=True)
    assert job.report is not None
    assert (job.report.state, job.report.cleanliness) == (Outcome.COMPLETED, Cleanliness.CLEAN)
    [[answer]] = arrived
    return answer


def in_tools(work: Callable[[Any], Any], **given: Any) -> Any:
    """Run `work` with the handle of a service that does what it is asked for."""
    env = LocalEnvironment("tools")
    tools = env.register_service("tools", Tools, options=options(**given))
    arrived: list[Any] = []
    env.from_batch([1]).map(lambda _: [work(tools)]).sink(arrived.append)
    job = env.submit(autostop=True)
    assert job.report is not None
    assert (job.report.state, job.report.cleanliness) == (Outcome.COMPLETED, Cleanliness.CLEAN)
    [[answer]] = arrived
    return answer


# --- calls ------------------------------------------------------------------------------------------------------------


def test_a_service_runs_in_a_process_of_its_own() -> None:
    """Calls by every way, attributes that are no methods, and what the report says of the process."""
    seen: list[Any] = []

    class Ask(MapFunction):
        def execute(self, data: int) -> int:
            tools = self.service("tools")
            seen.extend([tools.pid, tools.amount, tools.process(data), tools(data), tools.later(data)])
            seen.append(self.call_service("tools", data, timeout=SOON_S))
            seen.append(self.call_service_async("tools", data, method="later").result(SOON_S))
            return data

    env = LocalEnvironment("own process")
    tools = env.register_service("tools", Tools, 5, options=OWN)
    arrived: list[int] = []
    env.from_batch([1, 2]).map(tools.process).map(Ask).sink(arrived.append)
    job = env.submit(autostop=True)
    assert arrived == [6, 7]
    pid = seen[0]
    assert pid != os.getpid()
    assert seen == [pid, 5, 11, 11, 12, 11, 12, pid, 5, 12, 12, 14, 12, 14]
    assert job.report is not None
    report = job.report.service("tools")
    assert (report.host, report.pid, report.exit_code, report.state, report.calls) == ("process", pid, 0, "stopped", 12)
    assert [hook.hook for hook in report.hooks] == ["build", "drain", "exit"]
    assert f"process pid {pid} exit 0" in str(job.report)


def test_an_unknown_method_lists_the_known_ones() -> None:
    """Over the boundary too."""

    def work(tools: Any) -> tuple[str, list[str]]:
        with pytest.raises(sage.UnknownServiceError) as caught:
            tools.nothing(1)
        return str(caught.value), caught.value.__notes__

    text, listed = in_tools(work)
    assert text == 'service "tools" has no method "nothing"'
    assert listed[0].startswith("Tools has: ask, ")


@pytest.mark.parametrize(("concurrency", "at_once"), [(1, 1), (3, 3), (None, 8)])
def test_as_many_calls_run_at_once_as_are_declared(concurrency: int | None, at_once: int) -> None:
    """The process runs as many calls at once as its options say."""

    def work(env: LocalEnvironment) -> tuple[int, list[int]]:
        crowd = env.jobmanager.jobs[env.env_uuid].dispatcher.supervisor.hosts["crowd"].spec.handle
        answers: list[int] = []
        threads = [threading.Thread(target=lambda n=n: answers.append(crowd.process(n))) for n in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        return crowd.inside_max, sorted(answers)

    call_s = 0.05 if concurrency == 1 else 0.5
    answer = ask(work, crowd=(Crowd, call_s, options(concurrency=concurrency)))
    assert answer == (at_once, list(range(8)))


def test_many_threads_get_their_own_answers() -> None:
    """Sixteen threads with 100 calls each, more connections than are kept for later."""

    def work(tools: Any) -> list[list[int]]:
        answers: list[list[int]] = [[] for _ in range(40)]

        def call(place: int) -> None:
            answers[place] = [tools.process(place * 1000 + number) for number in range(50)]

        threads = [threading.Thread(target=call, args=(place,)) for place in range(40)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        return answers

    assert in_tools(work, concurrency=None) == [[p * 1000 + n + 1 for n in range(50)] for p in range(40)]


def test_a_call_that_is_too_slow_times_out(clock: FairClock) -> None:
    """The late answer is dropped, and later calls get their own."""
    waits: list[tuple[float, float]] = []

    class Ask(MapFunction):
        def execute(self, data: str) -> str:
            began_at = time.monotonic()
            try:
                answer: str = self.call_service(
                    "tools",
                    2.0 if data == "slow" else 0.0,
                    data,
                    method="slow",
                    timeout=1.0 if data == "slow" else None,
                )
            except ServiceTimeoutError as error:
                waits.append((began_at, time.monotonic()))
                answer = str(error)
            return answer

    env = LocalEnvironment("slow")
    env.register_service("tools", Tools, options=OWN)
    arrived: list[str] = []
    env.from_batch(["a", "slow", "b", "c"]).map(Ask).sink(arrived.append)
    env.submit(autostop=True)
    assert arrived == ["a", 'service "tools" did not answer slow within 1 s', "b", "c"]
    [(began_at, ended_at)] = waits
    assert ended_at - began_at >= 1.0
    assert clock.elapsed_s(began_at, ended_at) < 1.2


def test_a_hundred_asynchronous_calls_complete() -> None:
    """100 calls in flight at once all get their own answers."""

    class Gather(MapFunction):
        def execute(self, data: int) -> list[int]:
            futures = [self.call_service_async("crowd", data + number) for number in range(100)]
            return [future.result(timeout=SOON_S) for future in futures]

    env = LocalEnvironment("futures")
    env.register_service("crowd", Crowd, 0.005, options=options(concurrency=8))
    arrived: list[list[int]] = []
    env.from_batch([0, 1000]).map(Gather).sink(arrived.append)
    env.submit(autostop=True)
    assert arrived == [list(range(100)), list(range(1000, 1100))]


# --- errors -----------------------------------------------------------------------------------------------------------


def test_an_error_arrives_as_what_it_is() -> None:
    """The same type, with the traceback of the other process as a note; later calls are right."""

    def work(tools: Any) -> list[Any]:
        with pytest.raises(KeyError) as caught:
            tools.fail("x")
        with pytest.raises(FullError, match="full") as full:
            tools.fail_with(FullError("full", 5))
        return [caught.value.args, caught.value.__notes__, full.value.code, tools.process(1)]

    args, [note], code, answer = in_tools(work)
    assert (args, code, answer) == (("x",), 5, 2)
    assert note.startswith("In the process tools:\nTraceback (most recent call last):")
    assert 'host_services.py", line' in note
    assert note.endswith("KeyError: 'x'")
    assert "raise KeyError(text)" in note


@pytest.mark.parametrize(("kind", "text"), [("odd", "OddError: odd (7)"), ("locked", "LockedError: locked")])
def test_an_error_that_cannot_be_pickled_arrives_as_its_text(kind: str, text: str) -> None:
    """With the remote traceback all the same; later calls are right."""

    def work(tools: Any) -> tuple[str, str, int]:
        with pytest.raises(ServiceError) as caught:
            tools.fail_oddly(kind)
        return str(caught.value), caught.value.__notes__[0], tools.process(1)

    message, note, answer = in_tools(work)
    assert (message, answer) == (text, 2)
    assert "in fail_oddly" in note
    assert "It came as its text, because it cannot be pickled: " in note


@pytest.mark.parametrize("error", [SystemExit(3), KeyboardInterrupt("enough")], ids=repr)
def test_an_exit_in_a_call_is_an_error_of_the_call(error: BaseException) -> None:
    """It ends neither the process nor its later calls."""

    def work(tools: Any) -> tuple[Any, int]:
        with pytest.raises(type(error)) as caught:
            tools.fail_with(error)
        return caught.value.args, tools.process(1)

    assert in_tools(work) == (error.args, 2)


@pytest.mark.parametrize("kind", ["lock", "unpicklable"])
def test_an_answer_that_cannot_be_pickled_is_named(kind: str) -> None:
    """The call fails with what it was, and later calls are right."""

    def work(tools: Any) -> tuple[str, int]:
        with pytest.raises(ServiceError) as caught:
            tools.give(kind)
        return str(caught.value), tools.process(1)

    text, answer = in_tools(work)
    type_name = {"lock": "lock", "unpicklable": "Unpicklable"}[kind]
    assert text.startswith(f"an answer of type {type_name} cannot be pickled: ")
    assert answer == 2


def test_an_argument_that_cannot_be_pickled_is_named() -> None:
    """The call fails in the caller, and later calls are right."""

    def work(tools: Any) -> tuple[str, int]:
        with pytest.raises(ServiceError) as caught:
            tools.send_back(threading.Lock())
        return str(caught.value), tools.process(1)

    text, answer = in_tools(work)
    assert text.startswith('the arguments of "tools".send_back cannot be pickled: TypeError: cannot pickle')
    assert answer == 2


def test_functions_travel_by_value() -> None:
    """Lambdas and what the program defines inside of functions go there and come back."""
    offset = 10

    def shift(number: int) -> int:
        return number + offset

    assert in_tools(lambda tools: tools.send_back(shift)(1)) == 11
    assert in_tools(lambda tools: tools.give("lambda")()) == 7


@pytest.mark.parametrize(
    ("args", "named"),
    [
        ((Unpicklable(),), "argument 0: PicklingError: it stays here"),
        ((threading.Lock(),), "argument 0: TypeError: cannot pickle '_thread.lock' object"),
    ],
)
def test_what_cannot_be_sent_is_refused_before_anything_starts(
    args: tuple[Any, ...], named: str, journal: Notes
) -> None:
    """The error names service and argument, and no other service was built."""
    env = LocalEnvironment("refused")
    env.register_service("first", Mortal, journal, 0, "SIGKILL", options=OWN)
    env.register_service("tools", Tools, *args, options=OWN)
    env.from_batch([1]).sink(lambda _: journal.append("record"))
    with pytest.raises(GraphError) as caught:
        env.submit(autostop=True)
    assert str(caught.value) == f'service "tools" cannot be sent to a process of its own: {named}'
    assert caught.value.__notes__ == ["Make it in the constructor or in setup(), which run in that process."]
    assert journal == []


def test_an_attribute_that_cannot_be_sent_is_named() -> None:
    """The attribute of an argument, by its name."""

    class Settings:
        def __init__(self) -> None:
            self.port = 1
            self.lock = threading.Lock()

    env = LocalEnvironment("refused")
    env.register_service("tools", Tools, amount=Settings(), options=OWN)
    env.from_batch([1]).sink(lambda _: None)
    with pytest.raises(GraphError, match='attribute "lock" of argument "amount": TypeError: cannot pickle'):
        env.submit(autostop=True)


PROGRAM = """
from sage import BaseService, LocalEnvironment, ServiceOptions

FACTOR = 3

class Failed(Exception):
    pass

class Times(BaseService):
    def __init__(self, then):
        self.then = then
    def process(self, x):
        if x == 2:
            raise Failed("two")
        return Pair(self.then(x * FACTOR))
    def cleanup(self):
        with open("marker", "a") as file:
            file.write("cleaned\\n")

class Pair:
    def __init__(self, x):
        self.x = x

env = LocalEnvironment("program")
times = env.register_service("times", Times, lambda x: x + 1, options=ServiceOptions(host="process"))

def ask(x):
    try:
        answer = times.process(x)
        assert type(answer) is Pair, type(answer)
        return answer.x
    except Failed as error:
        return f"failed {error}"

env.from_batch([1, 2, 3]).map(ask).sink(print)
env.submit(autostop=True)
"""


def run_program(folder: Path, text: str) -> subprocess.CompletedProcess[str]:
    """Run a program as a user does."""
    script = folder / "program.py"
    script.write_text(textwrap.dedent(text))
    environment = {**os.environ, "PYTHONPATH": str(Path(sage.__file__).parents[1])}
    return subprocess.run(
        [sys.executable, str(script)], cwd=folder, env=environment, capture_output=True, text=True, timeout=50
    )


def test_classes_of_the_program_itself(tmp_path: Path) -> None:
    """A script without `if __name__`: its classes, lambdas, answers and errors work in both processes."""
    done = run_program(tmp_path, PROGRAM)
    assert (done.returncode, done.stdout, done.stderr) == (0, "4\nfailed two\n10\n", "")
    assert (tmp_path / "marker").read_text() == "cleaned\n"


# --- buffers ----------------------------------------------------------------------------------------------------------

MANY = 10_000_000


@pytest.mark.parametrize(
    "make",
    [
        lambda: Rows(bytearray(b"abcdefgh") * (MANY // 8)),
        lambda: Rows(array.array("Q", bytes(8)) * (MANY // 8)),
        lambda: bytearray(b"abcdefgh") * (MANY // 8),
        lambda: b"abcdefgh" * (MANY // 8),
        lambda: array.array("d", [1.5]) * (MANY // 8),
    ],
    ids=["rows", "rows of numbers", "bytearray", "bytes", "array"],
)
def test_large_values_arrive_whole(make: Callable[[], Any]) -> None:
    """Ten megabytes there and back, beside the pickle or in it."""
    value = make()
    plain = memoryview(value.room if isinstance(value, Rows) else value).cast("B")

    def work(tools: Any) -> tuple[Any, bool]:
        back = tools.send_back(value)
        room = memoryview(back.room if isinstance(back, Rows) else back).cast("B")
        return tools.length(value), room == plain

    (size, _, kind), is_same = in_tools(work)
    assert (size, kind, is_same) == (MANY, type(value).__name__, True)


def test_buffers_of_every_size_arrive_whole() -> None:
    """Around the limits of the inbox and of what one system call takes, many at once, and empty ones."""
    sizes = [0, 1, 100, 65_500, 65_535, 65_536, 65_537, 200_000]
    values = [Rows(bytearray([place]) * size) for place, size in enumerate(sizes)] + [Rows(b"x")] * 1500

    def work(tools: Any) -> list[bool]:
        answers = []
        for value in (*values, values, b"x" * 65_510, "y" * 65_536):
            back = tools.send_back(value)
            pairs = zip(value, back, strict=True) if isinstance(value, list) else [(value, back)]
            answers += [
                bytes(one.room) == bytes(two.room) if isinstance(one, Rows) else one == two for one, two in pairs
            ]
        return answers

    assert set(in_tools(work)) == {True}


def test_an_array_that_arrived_can_be_written_to() -> None:
    """What came beside a pickle belongs to the receiver, as what came in it does."""

    def work(tools: Any) -> int:
        back = tools.send_back(Rows(bytearray(MANY)))
        back.room[0] = 7
        return int(back.room[0])

    assert in_tools(work) == 7


# --- logs and output --------------------------------------------------------------------------------------------------


def test_log_records_reach_the_loggers_of_the_driver_once(caplog: pytest.LogCaptureFixture) -> None:
    """With level, logger, text and traceback; what is below the driver's level does not travel."""
    caplog.set_level(logging.INFO)
    caplog.set_level(logging.INFO, "sage")
    pid: list[int] = []

    def work(tools: Any) -> None:
        pid.append(tools.pid)
        tools.log(logging.WARNING, "careful")
        tools.log(logging.INFO, "by the way")
        tools.log(logging.DEBUG, "unseen")
        tools.log_error()

    in_tools(work)
    records = [record for record in caplog.records if record.process == pid[0]]
    assert [(record.name, record.levelname, record.getMessage()) for record in records] == [
        ("sage.user.tools", "WARNING", f"careful from {pid[0]}"),
        ("sage.user.tools", "INFO", f"by the way from {pid[0]}"),
        ("another.package", "ERROR", "it failed"),
    ]
    assert records[2].exc_text is not None
    assert records[2].exc_text.endswith("ValueError: seen there")


def test_what_a_service_prints_goes_where_the_program_prints(capfd: pytest.CaptureFixture[str]) -> None:
    """Also from its cleanup, the last thing it does."""
    assert ask(lambda env: None, printing=(Printing, OWN)) is None
    out, error = capfd.readouterr()
    assert (out, error) == ("cleanup out\n", "cleanup error\n")


# --- services among each other ----------------------------------------------------------------------------------------

INLINE = ServiceOptions()


@pytest.mark.parametrize("kind", ["process", "inline"])
def test_a_service_in_a_process_calls_others(kind: str) -> None:
    """In this process and in others, with and without a time-out, and several at once."""
    other = OWN if kind == "process" else INLINE

    class Ask(MapFunction):
        def execute(self, data: int) -> list[Any]:
            front = self.service("front")
            answers = [front.ask("store", data), front.ask_later("store", [1, 2, 3])]
            answers.append(front.ask_in_time("store", "later", SOON_S, 4))
            with pytest.raises(KeyError, match="gone"):
                front.ask_in_time("store", "fail", SOON_S, "gone")
            with pytest.raises(ServiceTimeoutError, match=r'service "store" did not answer slow within 0\.2 s'):
                front.ask_in_time("store", "slow", 0.2, 1.0, "late")
            with pytest.raises(sage.UnknownServiceError, match="nobody"):
                front.ask("nobody", 1)
            return answers

    env = LocalEnvironment("two")
    env.register_service("front", Tools, options=OWN)
    env.register_service("store", Tools, 10, options=other)
    arrived: list[list[Any]] = []
    env.from_batch([5]).map(Ask).sink(arrived.append)
    job = env.submit(autostop=True)
    assert arrived == [[15, [11, 12, 13], 8]]
    ends = [event.name for event in job.events() if event.after == "stopped" and event.subject == "service"]
    assert ends == ["front", "store"]


class Fronted:
    """Has another service as an argument."""

    def __init__(self, store: Any) -> None:
        self.store = store

    def process(self, data: Any) -> Any:
        return self.store.process(data)


def test_a_handle_among_the_arguments_leads_to_the_other_service() -> None:
    """A handle, and a method of one, in a list and as an argument of a call."""

    class Method:
        def __init__(self, methods: list[Any]) -> None:
            self.methods = methods

        def process(self, data: int, also: Any) -> list[int]:
            return [method(data) for method in (*self.methods, also)]

    env = LocalEnvironment("handles")
    store = env.register_service("store", Tools, 10, options=OWN)
    front = env.register_service("front", Method, [store.process, store], options=OWN)
    arrived: list[Any] = []
    env.from_batch([1]).map(lambda data: front.process(data, store)).sink(arrived.append)
    job = env.submit(autostop=True)
    assert arrived == [[11, 11, 11]]
    assert job.report is not None
    assert [service.state for service in job.report.services] == ["stopped", "stopped"]


def test_a_circle_of_processes_is_refused() -> None:
    """Two services that call each other get an error with the path instead of a deadlock."""

    class Ping(BaseService):
        def process(self, data: int) -> int:
            return int(self.call_service({"ping": "pong", "pong": "ping"}[self.name], data))

    env = LocalEnvironment("circle")
    ping = env.register_service("ping", Ping, options=OWN)
    env.register_service("pong", Ping, options=OWN)
    env.from_batch([1]).map(ping.process).sink(lambda _: None)
    with pytest.raises(JobError) as caught:
        env.submit(autostop=True)
    assert isinstance(caught.value.__cause__, ServiceError)
    assert str(caught.value.__cause__) == "services call each other in a circle: pong -> ping -> pong"


@pytest.mark.parametrize("concurrency", [1, 2, None])
def test_a_service_in_a_process_may_call_itself(concurrency: int | None) -> None:
    """A call of its own method through the job does not wait for the call it is made in."""
    assert in_tools(lambda tools: tools.countdown(3), concurrency=concurrency) == [3, 2, 1, 0]


def test_a_service_in_a_process_asks_a_served_pipeline() -> None:
    """The pipeline runs in the driver, and answers what another process asks."""
    env = LocalEnvironment("serving")
    tens = env.serve("tens", lambda requests: requests.map(lambda request: request * 10))
    front = env.register_service("front", Fronted, tens, options=OWN)
    arrived: list[int] = []
    env.from_batch([1, 2]).map(front.process).sink(arrived.append)
    job = env.submit(autostop=True)
    assert arrived == [10, 20]
    assert job.report is not None
    assert (job.report.state, job.report.cleanliness) == (Outcome.COMPLETED, Cleanliness.CLEAN)


def test_two_environments_have_processes_of_their_own() -> None:
    """Two jobs at the same time, services of the same name, and one guardian for both."""
    meeting = threading.Barrier(2)
    arrived: dict[int, list[tuple[int, int]]] = {10: [], 20: []}
    jobs = []
    for amount, records in arrived.items():
        env = LocalEnvironment(f"environment {amount}")
        tools = env.register_service("tools", Tools, amount, options=OWN)

        def meet(record: int, tools: Any = tools) -> tuple[int, int]:
            meeting.wait(SOON_S)
            return tools.process(record), tools.pid

        env.from_batch([1, 2]).map(meet).sink(records.append)
        jobs.append(env.submit())
    for job in jobs:
        job.wait(SOON_S)
    assert [[answer for answer, _ in records] for records in arrived.values()] == [[11, 12], [21, 22]]
    assert len({pid for records in arrived.values() for _, pid in records}) == 2


# --- what a context offers --------------------------------------------------------------------------------------------


def test_a_service_defers_extends_and_claims(tmp_path: Path, journal: Notes) -> None:
    """All of it from another process; a service that was cleaned up loses nothing."""
    env = LocalEnvironment("leaving")
    leaving = env.register_service(
        "leaving", Leaving, journal, str(tmp_path / "made"), options=options(stop_timeout_s=0.3)
    )
    env.from_batch([1]).map(leaving.process).sink(lambda _: None)
    job = env.submit(autostop=True)
    assert journal == ["cleanup", "deferred last", "deferred first"]
    assert job.report is not None
    assert job.report.cleanliness is Cleanliness.CLEAN
    assert not (tmp_path / "made").exists()


def test_a_process_ends_as_any_other_program(journal: Notes, capfd: pytest.CaptureFixture[str]) -> None:
    """It waits for its threads, calls what was registered with atexit, and writes what it has printed."""
    env = LocalEnvironment("departing")
    env.register_service("departing", Departing, journal, options=OWN)
    env.from_batch([1]).sink(lambda _: None)
    env.submit(autostop=True)
    assert journal == ["thread", "at exit"]
    assert "no end of a line" in capfd.readouterr().out


def test_what_a_constructor_deferred_is_done_though_it_raised(tmp_path: Path, journal: Notes) -> None:
    """The error is that of the constructor, in the report and for the caller."""
    env = LocalEnvironment("failing")
    env.register_service("leaving", Leaving, journal, str(tmp_path / "made"), True, options=OWN)
    env.from_batch([1]).sink(lambda _: journal.append("record"))
    with pytest.raises(
        ServiceStartError, match='service "leaving" failed to be built: OSError: no such model'
    ) as caught:
        env.submit(autostop=True)
    assert isinstance(caught.value.__cause__, OSError)
    assert journal == ["deferred first"]
    assert report_of(env).service("leaving").state == "failed_start"
    assert report_of(env).cleanliness is Cleanliness.CLEAN


def test_what_a_lost_service_claimed_is_reaped(tmp_path: Path, journal: Notes, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing of its own can run, so that what it declared is acted upon before submit returns."""
    env = LocalEnvironment("lost")
    leaving = env.register_service("leaving", Leaving, journal, str(tmp_path / "made"), options=OWN)
    env.from_batch([1]).map(lambda _: leaving.process("die")).sink(lambda _: None)
    with pytest.raises(JobError, match="SIGKILL"):
        env.submit(autostop=True)
    assert journal == ["lost leaving"]
    assert not (tmp_path / "made").exists()
    assert report_of(env).service("leaving").state == "lost"
    assert report_of(env).cleanliness is Cleanliness.DIRTY


@pytest.mark.parametrize("ends", ["close", "replaced"])
def test_a_kept_service_keeps_its_process(ends: str) -> None:
    """Two jobs see one process and one state, which ends with the environment."""
    seen: list[Any] = []

    class See(MapFunction):
        def execute(self, data: int) -> tuple[int, int]:
            tools = self.service("tools")
            return tools.pid, tools.count()

    with LocalEnvironment("keeping") as env:
        env.register_service("tools", Tools, options=OWN)
        env.from_batch([1]).map(See).sink(seen.append)
        for _ in range(2):
            env.submit(autostop=True, keep_services=True)
            assert report_of(env).service("tools").state == "kept"
        [(pid, _), _] = seen
        assert seen == [(pid, 1), (pid, 2)]
        assert process(pid) is not None
        if ends == "replaced":
            env.register_service("tools", Tools, options=options(replace=True))
            env.submit(autostop=True)
            assert process(pid) is None
            assert seen[2][1] == 1
    assert process(pid) is None


def kill_and_wait(pid: int) -> None:
    """Kill the process of a service and wait until its host knows."""
    os.kill(pid, signal.SIGKILL)
    wait_until(lambda: f"sage-process-{pid}" not in [thread.name for thread in threading.enumerate()])


@pytest.mark.parametrize("restart", ["never", "on_failure"])
def test_a_kept_service_that_dies_between_two_jobs(restart: Any) -> None:
    """Calls meanwhile fail at once; the next job is told, and builds it anew if its policy says so."""
    seen: list[int] = []
    env = LocalEnvironment("keeping")
    tools: Any = env.register_service("tools", Tools, options=options(restart=restart, backoff_s=(0.01, 0.01)))
    env.from_batch([1]).map(lambda _: tools.count() * tools.pid).sink(seen.append)
    env.submit(autostop=True, keep_services=True)
    kill_and_wait(seen[0])
    with pytest.raises(ServiceUnavailableError):
        tools.count()
    with pytest.raises(ServiceUnavailableError):
        tools._require().call("count", (), {}, SOON_S)
    if restart == "never":
        with pytest.raises(JobErrorGroup, match=r'service "tools" ended by itself: .* SIGKILL'):
            env.submit(autostop=True, keep_services=True)
        assert report_of(env).service("tools").state == "lost"
    else:
        env.submit(autostop=True, keep_services=True)
        assert len(set(seen)) == 2
        assert report_of(env).service("tools").state == "kept"
    env.close()


def test_a_kept_service_that_died_is_no_more_at_the_close() -> None:
    """Closing its environment ends without waiting for anything."""
    seen: list[int] = []
    env = LocalEnvironment("keeping")
    tools = env.register_service("tools", Tools, options=OWN)
    env.from_batch([1]).map(lambda _: tools.pid).sink(seen.append)
    env.submit(autostop=True, keep_services=True)
    kill_and_wait(seen[0])
    with pytest.raises(JobErrorGroup, match=r'service "tools" ended by itself: .* SIGKILL'):
        env.close()


def wait_until(is_so: Callable[[], bool]) -> None:
    """Wait for something that nothing tells of."""
    due = time.monotonic() + SOON_S
    while not is_so():
        assert time.monotonic() < due, "it did not happen in time"
        threading.Event().wait(0.005)


# --- deaths -----------------------------------------------------------------------------------------------------------

DEATHS = {
    "SIGKILL": "was ended by SIGKILL",
    "_exit": "exited with code 3",
    "SIGSEGV": "was ended by SIGSEGV",
    "fork": "exited with code 3",
}
CODES = {"SIGKILL": -signal.SIGKILL, "_exit": 3, "SIGSEGV": -signal.SIGSEGV, "fork": 3}


@pytest.mark.parametrize("how", DEATHS)
def test_a_service_whose_process_died_is_restarted(how: str, journal: Notes) -> None:
    """The call that it died in fails and says how, calls meanwhile wait for the next process."""
    failed: list[str] = []
    answers: list[int] = []
    env = LocalEnvironment("mortal")
    given = options(restart="on_failure", backoff_s=(0.05, 0.1))
    mortal = env.register_service("mortal", Mortal, journal, 1, how, options=given)

    class Ask(MapFunction):
        def execute(self, data: int) -> int:
            try:
                answer: int = mortal.process(data)
            except ServiceUnavailableError as error:
                failed.append(str(error))
                answer = 0
            return answer

    env.from_batch(range(6)).map(Ask).sink(answers.append)
    env.submit(autostop=True)
    assert answers == [1, 1, 0, 2, 2, 2]
    [text] = failed
    assert text.startswith('service "mortal" has no process any more: its process ')
    assert text.endswith(DEATHS[how])
    assert journal == ["build", "build", "cleanup 2"]
    report = report_of(env)
    assert (report.state, report.cleanliness) == (Outcome.COMPLETED, Cleanliness.DIRTY)
    assert (report.service("mortal").restarts, report.service("mortal").state) == (1, "stopped")
    [error] = report.errors
    assert str(error).startswith('service "mortal" ended by itself: its process ')
    assert str(error).endswith(DEATHS[how])


@pytest.mark.parametrize("how", DEATHS)
def test_a_required_service_whose_process_died_fails_the_job(how: str, journal: Notes) -> None:
    """The report names exit code and signal."""
    env = LocalEnvironment("mortal")
    mortal = env.register_service("mortal", Mortal, journal, 1, how, options=OWN)
    env.from_batch(range(6)).map(mortal.process).sink(lambda _: None)
    with pytest.raises(JobError, match=DEATHS[how]):
        env.submit(autostop=True)
    report = report_of(env)
    assert (report.state, report.cleanliness) == (Outcome.FAILED, Cleanliness.DIRTY)
    assert len(report.errors) == 1, "the task that has called hears of the death, and is not given up"
    service = report.service("mortal")
    assert (service.state, service.exit_code) == ("lost", CODES[how])
    assert DEATHS[how] in str(report)
    assert journal == ["build"]


def test_a_process_that_dies_while_nobody_calls_is_noticed() -> None:
    """Nothing polls; the death itself tells."""
    pids: list[int] = []
    env = LocalEnvironment("idle")
    tools = env.register_service("tools", Tools, options=options(restart="on_failure", backoff_s=(0.01, 0.01)))
    restarted = threading.Event()

    def watch(_: int) -> int:
        pids.append(tools.pid)
        if len(pids) == 1:
            os.kill(pids[0], signal.SIGKILL)
            wait_until(lambda: tools_pid() != pids[0])
            restarted.set()
        return 1

    def tools_pid() -> Any:
        return env.jobmanager.jobs[env.env_uuid].dispatcher.supervisor.hosts["tools"].facts().pid

    env.from_batch([1, 2]).map(watch).sink(lambda _: None)
    env.submit(autostop=True)
    assert restarted.is_set()
    assert len(set(pids)) == 2


def test_a_process_that_dies_again_and_again_fails_the_job(journal: Notes) -> None:
    """After as many restarts as are allowed."""
    env = LocalEnvironment("mortal")
    given = options(restart="on_failure", restarts_max=2, backoff_s=(0.01, 0.01))
    mortal = env.register_service("mortal", Mortal, journal, 99, "_exit", options=given)

    def keep_asking(data: int) -> int:
        try:
            return int(mortal.process(data))
        except ServiceUnavailableError:
            return 0

    env.from_source(lambda: 1, delay=0.001).map(keep_asking).sink(lambda _: None)
    with pytest.raises(JobError, match="exited with code 3"):
        env.submit().wait(SOON_S)
    assert journal == ["build"] * 3
    assert report_of(env).service("mortal").state == "lost"


def test_a_process_that_ends_in_the_constructor_fails_the_start(clock: FairClock) -> None:
    """Promptly, and the error says how the process ended."""
    env = LocalEnvironment("fatal")
    env.register_service("first", Tools, options=OWN)

    class Fatal:
        def __init__(self) -> None:
            os._exit(9)

    env.register_service("fatal", Fatal, options=OWN)
    env.from_batch([1]).sink(lambda _: None)
    began_at = time.monotonic()
    with pytest.raises(JobError, match="exited with code 9"):
        env.submit(autostop=True)
    assert clock.elapsed_s(began_at) < 5
    assert report_of(env).service("first").state in ("stopped", "skipped")


# --- what hangs -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("how", ["python", "C", "SIGSTOP"])
@pytest.mark.parametrize("hook", ["stop", "cleanup"])
def test_a_hook_that_hangs_is_ended_with_its_process(hook: str, how: str, journal: Notes, clock: FairClock) -> None:
    """It costs its bound and the grace, the others are cleaned, and nothing is left running."""
    env = LocalEnvironment("stuck")
    env.register_service("before", Stuck, journal, "none", "none", options=OWN)
    given = options(stop_timeout_s=0.5, kill_grace_s=1.0)
    stuck = env.register_service("stuck", Stuck, journal, hook, how, options=given)
    env.register_service("after", Stuck, journal, "none", "none", options=OWN)
    ended_at: list[float] = []
    env.from_batch([1]).map(stuck.process).sink(lambda _: ended_at.append(time.monotonic()))
    with pytest.raises(JobErrorGroup, match="COMPLETED and DIRTY") as caught:
        env.submit(autostop=True)
    # With stop and cleanup late in turn: two bounds, the question where it stands, and the grace.
    assert clock.elapsed_s(ended_at[0]) < 5
    report = report_of(env)
    service = report.service("stuck")
    assert service.state == "killed"
    assert [report.service(name).state for name in ("before", "after")] == ["stopped", "stopped"]
    assert journal.lines().count("cleanup") >= 2
    assert service.pid is not None
    assert process(service.pid) is None
    text = str(report)
    if how == "python":
        assert "hang_here" in text
        assert any("hang_here" in note for error in caught.value.exceptions for note in error.__notes__)
    else:
        assert f"process {service.pid} does not say where it stands" in text


@pytest.mark.parametrize("how", ["python", "C", "SIGSTOP"])
@pytest.mark.parametrize("hook", ["build", "setup"])
def test_a_start_that_hangs_is_ended_with_its_process(hook: str, how: str, journal: Notes) -> None:
    """The start ends at its bound, and the process with it."""
    env = LocalEnvironment("stuck")
    given = options(start_timeout_s=2.0, stop_timeout_s=0.3, kill_grace_s=1.0)
    env.register_service("stuck", Stuck, journal, hook, how, options=given)
    env.from_batch([1]).sink(lambda _: journal.append("record"))
    with pytest.raises(JobError, match='service "stuck" did not end its'):
        env.submit(autostop=True)
    report = report_of(env)
    pid = report.service("stuck").pid
    assert pid is not None
    assert process(pid) is None
    assert "record" not in journal
    assert report.state is Outcome.FAILED


class Slow(str):
    """A place to import from that takes its time to be asked for on one thread."""

    thread_name: str
    is_asked: threading.Event
    go_on: threading.Event

    def __bool__(self) -> bool:
        if threading.current_thread().name == self.thread_name:
            self.is_asked.set()
            assert self.go_on.wait(SOON_S)
        return True


def test_a_start_that_is_given_up_before_it_has_a_process_gets_none(
    journal: Notes, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What was still on its way to the start finds out that nobody waits for it any more."""
    place = Slow(sys.path[-1])
    place.thread_name, place.is_asked, place.go_on = "sage-service-slow", threading.Event(), threading.Event()
    monkeypatch.setattr(sys, "path", [*sys.path[:-1], place])
    env = LocalEnvironment("given up")
    env.register_service("slow", Tools, journal, options=options(start_timeout_s=0.2, kill_grace_s=0.5))
    env.from_batch([1]).sink(lambda _: journal.append("record"))
    with pytest.raises(JobError, match='service "slow" did not end its'):
        env.submit(autostop=True)
    assert place.is_asked.is_set()
    late = [thread for thread in threading.enumerate() if thread.name == "sage-service-slow"]
    place.go_on.set()
    for thread in late:
        thread.join(SOON_S)
    assert late
    assert report_of(env).service("slow").pid is None
    assert list(journal) == []


class Closing:
    """Closes a socket when it is pickled."""

    def __init__(self, end: socket.socket) -> None:
        self.end = end

    def __reduce__(self) -> tuple[type[str], tuple[()]]:
        self.end.close()
        return str, ()


def test_whoever_tells_the_other_side_something_hears_that_it_went_just_now() -> None:
    here, there = socket.socketpair()
    link = SocketPairRpc(here, {}, {}, "telling", lambda: None)
    with pytest.raises(RpcClosedError, match="the other side is gone"):
        link.tell(LogSide.log, {"it": Closing(there)})
    link.close(SOON_S)
    here.close()


@pytest.mark.parametrize("how", ["python", "C", "SIGSTOP"])
def test_a_call_that_hangs_is_ended_with_its_process(how: str, journal: Notes) -> None:
    """Its caller goes on after the time-out, and the stop ends the process."""
    failed: list[str] = []

    class Ask(MapFunction):
        def execute(self, data: int) -> int:
            with pytest.raises(ServiceTimeoutError) as caught:
                self.call_service("stuck", data, timeout=1.0)  # the call itself has to have begun
            failed.append(str(caught.value))
            return data

    env = LocalEnvironment("stuck")
    given = options(drain_timeout_s=0.3, stop_timeout_s=0.3, kill_grace_s=1.0)
    env.register_service("stuck", Stuck, journal, "call", how, options=given)
    env.from_batch([1]).map(Ask).sink(lambda _: None)
    with pytest.raises(JobError, match="stuck"):
        env.submit(autostop=True)
    assert failed == ['service "stuck" did not answer process within 1 s']
    pid = report_of(env).service("stuck").pid
    assert pid is not None
    assert process(pid) is None


@pytest.mark.parametrize(
    "kind", ["plain", "session", "stubborn session", "stopped session", "cleared session", "cleared stubborn session"]
)
def test_what_a_service_started_ends_with_it(kind: str) -> None:
    """Wherever it went, and whatever it ignores; the report names what had to be killed."""
    children: list[int] = []
    env = LocalEnvironment("parent")
    parent = env.register_service("parent", Parent, kind, options=options(kill_grace_s=1.0))
    env.from_batch([1]).map(parent.process).sink(children.append)
    if "stubborn" in kind:
        with pytest.raises(JobError, match=r"process \d+ had to be killed"):
            env.submit(autostop=True)
        assert report_of(env).service("parent").state == "killed"
    else:
        env.submit(autostop=True)
        assert report_of(env).cleanliness is Cleanliness.CLEAN
    [child] = children
    assert process(child) is None


def test_a_child_that_was_released_lives_on() -> None:
    """`release_process` names the one that stays."""
    children: list[int] = []
    env = LocalEnvironment("parent")
    parent = env.register_service("parent", Parent, "released session", options=OWN)
    env.from_batch([1]).map(parent.process).sink(children.append)
    env.submit(autostop=True)
    [child] = children
    found = process(child)
    assert found is not None
    os.kill(child, signal.SIGKILL)
    wait_until(lambda: process(child) != found)


def test_a_thread_that_is_no_daemon_does_not_keep_the_process() -> None:
    """The interpreter would wait for it for ever; the grace ends that, and the port is free."""
    ports: list[int] = []
    env = LocalEnvironment("listening")
    listening = env.register_service("listening", Listening, options=options(kill_grace_s=1.0))
    env.from_batch([1]).map(listening.process).sink(ports.append)
    with pytest.raises(JobError, match="listening"):
        env.submit(autostop=True)
    assert report_of(env).service("listening").state == "killed"


def test_signals_to_the_process_do_not_break_the_order() -> None:
    """SIGTERM and SIGINT to the process are for the driver to act upon: it still answers, and is cleaned."""

    def work(tools: Any) -> int:
        for signum in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
            os.kill(tools.pid, signum)
        return int(tools.process(1))

    assert in_tools(work) == 2


# --- many jobs --------------------------------------------------------------------------------------------------------


@pytest.mark.proof
def test_thirty_jobs_leave_nothing_behind() -> None:
    """Descriptors and threads as after the first job."""

    def state() -> tuple[int, list[str]]:
        gc.collect()
        return len(os.listdir("/proc/self/fd")), sorted(thread.name for thread in threading.enumerate())

    def one_job() -> None:
        env = LocalEnvironment("one of many")
        tools = env.register_service("tools", Tools, options=options(concurrency=3))
        env.from_batch(range(6), parallelism=3).map(tools.process, parallelism=3).sink(lambda _: None)
        env.submit(autostop=True)

    one_job()
    first = state()
    for _ in range(30):
        one_job()
    assert state() == first
