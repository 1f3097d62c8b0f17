"""Services over several jobs, beside running ones, under watch, and after they failed."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import pytest
from support.recording_services import Journal, Notes, Numbered, report_of

import sage
from sage import (
    BaseService,
    Cleanliness,
    GraphError,
    LocalEnvironment,
    MapFunction,
    Outcome,
    ProcessFunction,
    ServiceError,
    ServiceOptions,
    ServiceUnavailableError,
    SinkFunction,
)
from sage.testing import StepBackend

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from sage._runtime.backend import Backend

    MakeBackend = Callable[[], Backend]
    Host = Literal["inline", "process"]

SOON_S = 10.0
"""Bound of every wait for something that happens at once on an idle machine."""


def run_script(folder: Path, text: str) -> subprocess.CompletedProcess[str]:
    """Run a program as a user does, in a process of its own."""
    script = folder / "program.py"
    script.write_text(text)
    environment = {**os.environ, "PYTHONPATH": str(Path(sage.__file__).parents[1])}
    return subprocess.run(
        [sys.executable, str(script)], cwd=folder, env=environment, capture_output=True, text=True, timeout=60
    )


def endless(env: LocalEnvironment, journal: Journal, host: Host = "inline") -> threading.Event:
    """Give `env` a stream that never ends and a service; the event says that records arrive."""
    flows = threading.Event()

    class Store(SinkFunction):
        def execute(self, data: int) -> None:
            assert self.call_service("memory", data) == data
            flows.set()

        def close(self) -> None:
            journal.append("sink closed")

    env.register_service("memory", Numbered, journal, options=ServiceOptions(host=host))
    env.from_source(lambda: 1, delay=0.001).sink(Store)
    return flows


ENDED = ["memory.build 1", "sink closed", "memory.stop 1", "memory.cleanup 1"]

# --- jobs that end, or are ended --------------------------------------------------------------------------------------


def test_a_batch_without_autostop_is_cleaned_when_it_ends(backend: MakeBackend, host: Host, journal: Notes) -> None:
    """The services end with the batch, and `job.wait()` reports it."""
    arrived = list[int]()
    env = LocalEnvironment(backend=backend)
    env.register_service("memory", Numbered, journal, options=ServiceOptions(host=host))
    env.from_batch([1, 2, 3]).sink(arrived.append)
    report = env.submit().wait()
    assert journal == ["memory.build 1", "memory.stop 1", "memory.cleanup 1"]
    assert arrived == [1, 2, 3]
    assert (report.state, report.cleanliness) == (Outcome.COMPLETED, Cleanliness.CLEAN)
    assert report.service("memory").state == "stopped"


def test_a_batch_without_autostop_is_cleaned_though_nobody_waits() -> None:
    """The cleanup needs no call of anybody."""
    cleaned = threading.Event()

    class Marked(BaseService):
        def cleanup(self) -> None:
            cleaned.set()

    env = LocalEnvironment()
    env.register_service("marked", Marked)
    env.from_batch([1]).sink(lambda data: None)
    job = env.submit()
    assert cleaned.wait(SOON_S)
    assert job.wait(SOON_S).cleanliness is Cleanliness.CLEAN


@pytest.mark.parametrize("way", ["stop", "close", "with", "stop twice", "close twice", "stop, then close"])
def test_a_stream_is_stopped_from_outside(way: str, host: Host, journal: Notes) -> None:
    """Tasks end, then services, once; a second call does nothing."""
    env = LocalEnvironment()
    flows = endless(env, journal, host)
    if way == "with":
        with env:
            env.submit()
            assert flows.wait(SOON_S)
    else:
        env.submit()
        assert flows.wait(SOON_S)
        (env.close if way.startswith("close") else env.stop)()
    assert journal == ENDED
    assert (report_of(env).state, report_of(env).cleanliness) == (Outcome.STOPPED, Cleanliness.CLEAN)
    if way == "stop twice":
        env.stop()
    if way in ("close twice", "stop, then close", "with"):
        env.close()
    assert journal == ENDED


def test_leaving_with_by_an_error_cleans_up() -> None:
    """The program's own error comes out, after everything was cleaned."""
    journal = list[str]()
    env = LocalEnvironment()
    flows = endless(env, journal)

    def program() -> None:
        with env:
            env.submit()
            assert flows.wait(SOON_S)
            raise ValueError("the program's own")

    with pytest.raises(ValueError, match="the program's own"):
        program()
    assert journal == ENDED
    assert report_of(env).state is Outcome.CANCELLED


def test_stopping_before_submit_and_after_the_end_does_nothing(
    backend: MakeBackend, host: Host, journal: Notes
) -> None:
    """There is nothing to stop, and a submit afterwards works."""
    arrived = list[int]()
    env = LocalEnvironment(backend=backend)
    env.register_service("memory", Numbered, journal, options=ServiceOptions(host=host))
    env.from_batch([1]).sink(arrived.append)
    env.stop()
    env.close()
    assert journal == []
    env.submit(autostop=True)
    env.stop()
    env.close()
    assert arrived == [1]
    assert journal == ["memory.build 1", "memory.stop 1", "memory.cleanup 1"]
    assert report_of(env).state is Outcome.COMPLETED


@pytest.mark.parametrize("call", ["stop", "close"])
@pytest.mark.parametrize("place", ["hook", "call", "call with a time-out", "coroutine"])
def test_a_service_of_the_job_may_stop_it(call: str, place: str) -> None:
    """From inside, a stop is a request, so that nothing waits for itself."""
    journal = list[str]()
    env = LocalEnvironment()

    class Stopping(Numbered):
        def process(self, data: int) -> int:
            if place.startswith("call"):
                getattr(env, call)()
            return data

        async def later(self, data: int) -> int:
            getattr(env, call)()
            return data

        def cleanup(self) -> None:
            if place == "hook":
                getattr(env, call)()
            super().cleanup()

    options = ServiceOptions(call_timeout_s=SOON_S if place == "call with a time-out" else None, stop_timeout_s=2.0)
    stopping = env.register_service("memory", Stopping, journal, options=options)
    source = env.from_batch([1, 2, 3]) if place == "hook" else env.from_source(lambda: 1, delay=0.001)
    source.map(stopping.later if place == "coroutine" else stopping.process).sink(lambda data: None)
    report = env.submit().wait(SOON_S)
    assert journal == ["memory.build 1", "memory.stop 1", "memory.cleanup 1"]
    assert report.state is (Outcome.COMPLETED if place == "hook" else Outcome.STOPPED)
    assert report.cleanliness is Cleanliness.CLEAN


def test_the_functions_of_an_empty_source_are_finished_and_closed_once(
    backend: MakeBackend, host: Host, journal: Notes
) -> None:
    """Nothing flows, and everything begins and ends all the same."""
    arrived = list[int]()

    class Window(ProcessFunction):
        def open(self) -> None:
            journal.append("open")

        def execute(self, data: int) -> None:
            journal.append("record")

        def finish(self) -> Iterable[int]:
            journal.append("finish")
            return [7]

        def close(self) -> None:
            journal.append("close")

    env = LocalEnvironment(backend=backend)
    env.register_service("memory", Numbered, journal, options=ServiceOptions(host=host))
    env.from_batch([]).process(Window).sink(arrived.append)
    env.submit(autostop=True)
    assert journal == ["memory.build 1", "open", "finish", "close", "memory.stop 1", "memory.cleanup 1"]
    assert arrived == [7]


def test_the_end_of_a_job_leaves_another_alone() -> None:
    """Two jobs with a service each; the end of one is nothing to the other's."""
    running, ended = list[str](), list[str]()
    stream, batch = LocalEnvironment("stream"), LocalEnvironment("batch")
    with stream:
        flows = endless(stream, running)
        stream.submit()
        batch.register_service("memory", Numbered, ended)
        batch.from_batch([1]).sink(lambda data: None)
        batch.submit(autostop=True)
        assert ended == ["memory.build 1", "memory.stop 1", "memory.cleanup 1"]
        flows.clear()
        assert flows.wait(SOON_S)
        assert running == ["memory.build 1"]
    assert running == ENDED


# --- several jobs of one environment ----------------------------------------------------------------------------------


def test_a_second_submit_is_a_new_run(backend: MakeBackend, host: Host, journal: Notes) -> None:
    """A new instance of everything; a submit while a job runs is refused."""
    arrived = list[int]()
    refused = list[str]()
    env = LocalEnvironment("twice", backend=backend)
    env.register_service("memory", Numbered, journal, options=ServiceOptions(host=host))

    def again(data: int) -> int:
        with pytest.raises(GraphError) as caught:
            env.submit()
        refused.append(str(caught.value))
        return data

    env.from_batch([1]).map(again).sink(arrived.append)
    first, second = env.submit(autostop=True), env.submit(autostop=True)
    assert first.id != second.id
    assert refused == [f'environment "twice" already runs job {job.id}' for job in (first, second)]
    assert arrived == [1, 1]
    assert journal == [f"memory.{hook} {number}" for number in (1, 2) for hook in ("build", "stop", "cleanup")]
    assert first.report is not None
    assert first.report.service("memory").calls == 0


@pytest.mark.parametrize("way", ["close", "with", "with an error"])
def test_kept_services_serve_the_next_job(backend: MakeBackend, host: Host, journal: Notes, way: str) -> None:
    """No second start, and one cleanup by `close()` or by leaving `with env:`."""
    arrived = list[int]()
    env = LocalEnvironment(backend=backend)
    memory = env.register_service("memory", Numbered, journal, options=ServiceOptions(host=host))
    env.register_service("index", Numbered, journal, options=ServiceOptions(host=host))
    env.from_batch([1, 2]).map(memory).sink(arrived.append)

    def run_twice() -> None:
        for _ in range(2):
            env.submit(autostop=True, keep_services=True)
            assert [service.state for service in report_of(env).services] == ["kept", "kept"]
            assert report_of(env).cleanliness is Cleanliness.CLEAN
        assert sorted(journal) == ["index.build 1", "memory.build 1"]
        assert arrived == [1, 2, 1, 2]
        if way == "with an error":
            raise ValueError("the program's own")

    if way == "close":
        run_twice()
        env.close()
    else:
        with pytest.raises(ValueError, match="own") if way == "with an error" else env, env:
            run_twice()
    ends = ["index.stop 1", "index.cleanup 1", "memory.stop 1", "memory.cleanup 1"]
    assert journal[2:] == ends
    env.close()
    env.stop()
    assert journal[2:] == ends
    with pytest.raises(ServiceUnavailableError):
        memory.process(1)


class Asking(Numbered):
    """Calls another service, which it never declared."""

    def process(self, data: Any) -> Any:
        return self.call_service("store", data)


def test_a_kept_service_still_ends_before_the_one_that_it_was_seen_to_call(backend: MakeBackend) -> None:
    """The job that ends kept services knows who called whom in the jobs before."""
    journal = list[str]()
    env = LocalEnvironment(backend=backend)
    index = env.register_service("index", Asking, journal)
    env.register_service("store", Numbered, journal)
    env.from_batch([1]).map(index).sink(abs)
    env.submit(autostop=True, keep_services=True)
    env.close()
    assert journal[2:] == ["index.stop 1", "index.cleanup 1", "store.stop 1", "store.cleanup 1"]


def test_only_the_named_services_are_kept(backend: MakeBackend, host: Host, journal: Notes) -> None:
    """The others end with their job, and a kept one keeps what it requires."""
    env = LocalEnvironment(backend=backend)
    env.register_service("store", Numbered, journal, options=ServiceOptions(host=host))
    env.register_service("memory", Numbered, journal, options=ServiceOptions(host=host, depends_on=["store"]))
    env.register_service("index", Numbered, journal, options=ServiceOptions(host=host))
    env.from_batch([1]).sink(lambda data: None)
    env.submit(autostop=True, keep_services=["memory"])
    assert [service.state for service in report_of(env).services] == ["kept", "kept", "stopped"]
    assert Counter(journal) == Counter(
        ["store.build 1", "memory.build 1", "index.build 1", "index.stop 1", "index.cleanup 1"]
    )
    journal.clear()
    env.close()
    assert journal == ["memory.stop 1", "memory.cleanup 1", "store.stop 1", "store.cleanup 1"]


def test_kept_services_are_cleaned_at_exit_with_a_warning(tmp_path: Path) -> None:
    """A program that never closes its environment is told so, and the service is cleaned once."""
    text = """
from sage import LocalEnvironment

class Memory:
    def process(self, data):
        return data
    def cleanup(self):
        with open("marker", "a") as file:
            file.write("cleaned\\n")

env = LocalEnvironment("forgetful")
memory = env.register_service("memory", Memory)
env.from_batch([1]).map(memory).sink(lambda data: None)
env.submit(autostop=True, keep_services=True)
env.submit(autostop=True, keep_services=True)
open("marker", "x").close()
"""
    done = run_script(tmp_path, text)
    assert done.returncode == 0, done.stderr
    assert 'RuntimeWarning: environment "forgetful" still keeps memory at exit' in done.stderr
    assert "Traceback" not in done.stderr
    assert (tmp_path / "marker").read_text() == "cleaned\n"


TASKS = """
import os, threading, time

def tasks():
    # For a moment, the system still counts a thread that was joined.
    give_up_at = time.monotonic() + 1
    while (count := len(os.listdir("/proc/self/task"))) > threading.active_count() and time.monotonic() < give_up_at:
        os.sched_yield()
    return count
"""

MANY_JOBS = (
    TASKS
    + """
import gc, json
from pathlib import Path
from sage import LocalEnvironment, ServiceOptions
from sage.testing import assert_clean

class Memory:
    def process(self, data):
        return data
    def cleanup(self):
        pass

def one_job():
    env = LocalEnvironment("one of many")
    options = ServiceOptions(call_timeout_s=5.0)
    memory = env.register_service("memory", Memory, options=options)
    env.register_service("index", Memory)
    stream = env.from_batch(range(20)).keyby(lambda data: data).map(memory.process, parallelism=2)
    async def later(data):
        return data
    stream.map(later).sink(lambda data: None)
    env.submit(autostop=True)

def state():
    gc.collect()
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return {"tasks": tasks(), "memory": pages * os.sysconf("SC_PAGE_SIZE")}

with assert_clean(within_s=0.0, ignore=["temporary *", "shared memory *"]):
    one_job()
    first = state()
    for _ in range(200):
        one_job()
    last = state()
print(json.dumps([first, last]))
"""
)


def test_two_hundred_jobs_leave_nothing_behind(tmp_path: Path) -> None:
    """Threads, descriptors and children as before the first job, memory within 5 MB."""
    done = run_script(tmp_path, MANY_JOBS)
    assert done.returncode == 0, done.stderr
    first, last = json.loads(done.stdout)
    assert last.pop("memory") - first.pop("memory") < 5_000_000
    assert last == first


MANY_PROCESSES = (
    TASKS
    + """
import gc, json, os, sys
from sage import Line, LocalEnvironment, ServiceOptions
from sage.testing import assert_clean

class Memory:
    def process(self, data):
        return data
    def cleanup(self):
        pass

STAYS = "import signal; print('up', flush=True); signal.pause()"

def one_job():
    env = LocalEnvironment("one of many")
    memory = env.register_service("memory", Memory, options=ServiceOptions(host="process", concurrency=3))
    command = env.register_command("command", [sys.executable, "-c", STAYS], ready=Line("up"))
    stream = env.from_batch(range(20)).map(memory.process, parallelism=3).map(lambda data: command.pid)
    stream.sink(lambda data: None)
    env.submit(autostop=True)

def state():
    gc.collect()
    return {
        "tasks": tasks(),
        "descriptors": len(os.listdir("/proc/self/fd")),
        "children": open(f"/proc/self/task/{os.getpid()}/children").read(),
    }

if __name__ == "__main__":
    with assert_clean(within_s=0.0, ignore=["temporary *", "shared memory *"]):
        one_job()
        first = state()
        for _ in range(10):
            one_job()
        last = state()
    print(json.dumps([first, last]))
"""
)


@pytest.mark.slow
def test_jobs_with_processes_leave_nothing_behind(tmp_path: Path) -> None:
    """Threads, descriptors and children as after the first job, the guardian's included."""
    done = run_script(tmp_path, MANY_PROCESSES)
    assert done.returncode == 0, done.stderr
    first, last = json.loads(done.stdout)
    assert last == first
    assert first["children"] == ""


# --- calls that come too late -----------------------------------------------------------------------------------------


def test_a_call_after_the_end_of_the_job_fails_at_once(backend: MakeBackend, host: Host) -> None:
    """By the handle, by a method taken from it while the job ran, and from a function that is left."""
    journal, functions = list[str](), list[MapFunction]()
    env = LocalEnvironment(backend=backend)
    memory = env.register_service("memory", Numbered, journal, options=ServiceOptions(host=host))
    methods = list[Any]()

    class Ask(MapFunction):
        def open(self) -> None:
            functions.append(self)
            methods.append(self.service("memory").process)

        def execute(self, data: Any) -> Any:
            return self.call_service("memory", data)

    env.from_batch([1]).map(Ask).sink(lambda data: None)
    env.submit(autostop=True)
    calls: list[Any] = [memory, memory.process, methods[0], functions[0].execute]
    for call in calls:
        with pytest.raises(ServiceUnavailableError, match="memory") as caught:
            call(1)
        assert caught.value.service == "memory"
    with pytest.raises(ServiceUnavailableError, match="memory"):
        functions[0].call_service_async("memory", 1)
    with pytest.raises(ServiceUnavailableError, match="memory"):
        functions[0].call_service("memory", 1, timeout=SOON_S)


def test_a_service_that_has_stopped_refuses_the_calls_of_one_that_is_stopped_later(backend: MakeBackend) -> None:
    """What was registered first ends last, and is told at once that the other is down."""
    journal, refused = list[str](), list[str]()

    class Late(Numbered):
        def __init__(self, journal: list[str], other: list[Any]) -> None:
            super().__init__(journal)
            self.other = other

        def cleanup(self) -> None:
            super().cleanup()
            with pytest.raises(ServiceUnavailableError) as caught:
                self.other[0].process(1)
            refused.append(str(caught.value))

    env = LocalEnvironment(backend=backend)
    handles = list[Any]()
    env.register_service("late", Late, journal, handles)
    handles.append(env.register_service("memory", Numbered, journal))
    env.from_batch([1]).sink(lambda data: None)
    env.submit(autostop=True)
    assert refused == ['service "memory" has stopped and takes no more calls']
    assert journal[2:] == ["memory.stop 1", "memory.cleanup 1", "late.stop 1", "late.cleanup 1"]


def test_a_kept_service_that_is_replaced_is_cleaned(backend: Callable[[], Backend]) -> None:
    """What was kept ends when another takes its place."""
    cleaned: list[str] = []

    class Named:
        def __init__(self, name: str) -> None:
            self.name = name

        def close(self) -> None:
            cleaned.append(self.name)

    with sage.LocalEnvironment("keeps", backend=backend) as env:
        env.register_service("any", Named, "first")
        env.from_batch([1]).sink(lambda x: None)
        env.submit(autostop=True, keep_services=True)
        env.register_service("any", Named, "second", options=sage.ServiceOptions(replace=True))
        env.submit(autostop=True)
        assert cleaned[0] == "first"
    assert cleaned == ["first", "second"]


def test_no_service_is_kept_on_one_that_failed() -> None:
    """What is kept would otherwise outlive the service that it depends on."""
    journal: list[str] = []

    class Sick(Numbered):
        def health(self) -> bool:
            return False

    def source() -> None:
        """Have nothing, for ever."""

    env = LocalEnvironment("test", backend=lambda: StepBackend(0))
    env.register_service("base", Sick, journal, options=ServiceOptions(health_interval_s=0.01))
    env.register_service("upper", Numbered, journal, options=ServiceOptions(depends_on=["base"]))
    env.from_source(source).sink(print)
    job = env.submit(keep_services=True)
    with pytest.raises(ServiceError, match="its health check failed"):
        job.wait()
    assert journal[2:] == ["upper.stop 1", "upper.cleanup 1", "base.stop 1", "base.cleanup 1"]
    env.close()
    assert len(journal) == 6
