"""What services do while a job runs: concurrency, time-outs, futures, services among each other, served pipelines."""

from __future__ import annotations

import asyncio
import threading
import time
from typing import TYPE_CHECKING, Any, Literal

import pytest
from support.host_services import Crowd
from support.recording_services import Notes

from sage import (
    BaseService,
    Cleanliness,
    DataStream,
    GraphError,
    JobError,
    LocalEnvironment,
    MapFunction,
    Outcome,
    ServiceError,
    ServiceOptions,
    ServiceTimeoutError,
    ServiceUnavailableError,
    SinkFunction,
    SourceFunction,
    StopSignal,
)
from sage.serving import PipelineBridge, PipelineService
from sage.testing import StepBackend, assert_clean

if TYPE_CHECKING:
    from collections.abc import Callable
    from concurrent.futures import Future

    from support.fair_clock import FairClock

    from sage._runtime.backend import Backend

    Backends = Callable[[], Backend]
    Host = Literal["inline", "process"]

PROMPTLY_S = 0.5


class Call(MapFunction):
    """Calls a service with each record."""

    def __init__(self, service_name: str) -> None:
        self.service_name = service_name

    def execute(self, data: Any) -> Any:
        return self.call_service(self.service_name, data)


class Given:
    """Returns the arguments that it was called with."""

    def process(self, *args: Any, **kwargs: Any) -> tuple[Any, ...]:
        return (*args, kwargs)


class Giving(MapFunction):
    """Calls a service with as many arguments as a call may have, and with names that the call itself has, too."""

    def __init__(self, timeout: float | None) -> None:
        self.timeout = timeout

    def execute(self, data: int) -> list[Any]:
        handle = self.service("given")
        return [
            self.call_service("given", timeout=self.timeout),
            self.call_service("given", None, timeout=self.timeout),
            self.call_service("given", data, 2, timeout=self.timeout),
            self.call_service("given", name="a", first="b", timeout=self.timeout),
            self.call_service("given", data, name="a", timeout=self.timeout),
            self.call_service_async("given", data, name="a", timeout=self.timeout).result(),
            handle.process(),
            handle.process(data),
            handle(data, 2, first="b"),
        ]


@pytest.mark.parametrize("timeout", [None, 60.0])
@pytest.mark.parametrize("concurrency", [1, 4])
def test_arguments_arrive_as_they_were_given(host: Host, concurrency: int, timeout: float | None) -> None:
    env = LocalEnvironment("arguments")
    env.register_service("given", Given, options=ServiceOptions(host=host, concurrency=concurrency))
    arrived: list[list[Any]] = []
    env.from_batch([1]).map(Giving, timeout).sink(arrived.append)
    env.submit(autostop=True)
    assert arrived == [
        [
            ({},),
            (None, {}),
            (1, 2, {}),
            ({"name": "a", "first": "b"},),
            (1, {"name": "a"}),
            (1, {"name": "a"}),
            ({},),
            (1, {}),
            (1, 2, {"first": "b"}),
        ]
    ]


# --- concurrency ---


@pytest.mark.parametrize(
    ("concurrency", "call_s", "least_s", "most_s", "at_once"),
    [(4, 0.5, 1.0, 1.5, 4), (None, 0.25, 0.5, 1.0, 4), (2, 0.25, 1.0, 1.5, 2), (1, 0.5, 4.0, 4.5, 1)],
)
def test_four_callers_share_a_service(
    concurrency: int | None, call_s: float, least_s: float, most_s: float, at_once: int, clock: FairClock
) -> None:
    """8 calls by four callers take as long as the declared concurrency allows."""
    crowds: list[Crowd] = []

    def build() -> Crowd:
        crowds.append(Crowd(call_s))
        return crowds[0]

    env = LocalEnvironment("crowd")
    env.register_service("crowd", build, options=ServiceOptions(concurrency=concurrency))
    arrived: list[int] = []
    env.from_batch(range(8), parallelism=4).map(Call, "crowd", parallelism=4).sink(arrived.append)
    began_at = time.monotonic()
    env.submit(autostop=True)
    ended_at = time.monotonic()
    assert sorted(arrived) == list(range(8))
    assert crowds[0].inside_max == at_once
    assert ended_at - began_at >= least_s
    assert clock.elapsed_s(began_at, ended_at) < most_s


def test_a_service_is_serial_unless_it_is_declared_otherwise() -> None:
    """Calls of a service that declares nothing never overlap."""
    crowd = Crowd(0.01)
    env = LocalEnvironment("serial")
    env.register_service("crowd", lambda: crowd)
    env.from_batch(range(20), parallelism=4).map(Call, "crowd", parallelism=4).sink(lambda record: None)
    env.submit(autostop=True)
    assert (crowd.calls, crowd.inside_max) == (20, 1)


# --- time-outs ---


class Slow:
    """Answers with what it was asked, "slow" only after a while."""

    def __init__(self, slow_s: float) -> None:
        self.slow_s = slow_s

    def process(self, record: str) -> str:
        if record == "slow":
            time.sleep(self.slow_s)
        return f"answer to {record}"


@pytest.mark.parametrize(("concurrency", "slow_s"), [(1, 3.0), (2, 1.5)])
def test_a_call_that_is_too_slow_times_out(concurrency: int, slow_s: float, clock: FairClock) -> None:
    """The time-out is kept, the late answer goes nowhere, and later calls get their own answers."""
    errors: list[BaseException] = []
    waits: list[tuple[float, float]] = []

    class Ask(MapFunction):
        def execute(self, data: str) -> str:
            began_at = time.monotonic()
            try:
                answer: str = self.call_service("slow", data, timeout=1 if data == "slow" else None)
            except TimeoutError as error:
                waits.append((began_at, time.monotonic()))
                errors.append(error)
                answer = "too late"
            return answer

    env = LocalEnvironment("slow")
    env.register_service("slow", Slow, slow_s, options=ServiceOptions(concurrency=concurrency))
    arrived: list[str] = []
    env.from_batch(["a", "slow", "b", "c"]).map(Ask).sink(arrived.append)
    job = env.submit(autostop=True)
    assert arrived == ["answer to a", "too late", "answer to b", "answer to c"]
    [(began_at, ended_at)] = waits
    assert ended_at - began_at >= 1.0
    assert clock.elapsed_s(began_at, ended_at) < 1.2
    assert isinstance(errors[0], ServiceTimeoutError)
    assert errors[0].service == "slow"
    assert '"slow"' in str(errors[0])
    assert "1 s" in str(errors[0])
    assert job.report is not None
    assert (job.report.state, job.report.cleanliness) == (Outcome.COMPLETED, Cleanliness.CLEAN)


def test_the_option_bounds_every_call() -> None:
    """`call_timeout_s` holds for calls of a handle, and an error that nobody catches fails the job."""
    env = LocalEnvironment("slow")
    slow = env.register_service("slow", Slow, 0.5, options=ServiceOptions(call_timeout_s=0.2))
    env.from_batch(["slow"]).map(slow.process, name="ask").sink(lambda record: None)
    with pytest.raises(JobError) as caught:
        env.submit(autostop=True)
    assert '"ask"' in str(caught.value)
    assert isinstance(caught.value.__cause__, ServiceTimeoutError)


# --- futures ---


def test_a_hundred_asynchronous_calls_complete(host: Host) -> None:
    """100 calls in flight at once all get their own answers."""

    class Gather(MapFunction):
        def execute(self, data: int) -> list[int]:
            futures = [self.call_service_async("crowd", data + number) for number in range(100)]
            return [future.result(timeout=10) for future in futures]

    env = LocalEnvironment("futures")
    env.register_service("crowd", Crowd, 0.01, options=ServiceOptions(host=host, concurrency=8))
    arrived: list[list[int]] = []
    env.from_batch([0, 1000]).map(Gather).sink(arrived.append)
    env.submit(autostop=True)
    assert arrived == [list(range(100)), list(range(1000, 1100))]


class Fire(MapFunction):
    """Starts calls and does not wait for their answers."""

    def __init__(self, futures: list[Future[Any]]) -> None:
        self.futures = futures

    def execute(self, data: int) -> int:
        self.futures.append(self.call_service_async("crowd", data))
        return data


def test_calls_that_nobody_waits_for_finish() -> None:
    """What is pending at the end of the job is finished before the service stops."""
    crowd = Crowd(0.02)
    futures: list[Future[Any]] = []
    env = LocalEnvironment("pending")
    env.register_service("crowd", lambda: crowd, options=ServiceOptions(concurrency=4))
    env.from_batch(range(40)).map(Fire, futures).sink(lambda record: None)
    env.submit(autostop=True)
    assert [future.result(timeout=0) for future in futures] == list(range(40))
    assert crowd.inside == 0


def test_calls_that_cannot_finish_are_cancelled(host: Host, clock: FairClock) -> None:
    """What is still pending after the bound is cancelled, so that nobody waits for it in vain."""
    futures: list[Future[Any]] = []
    env = LocalEnvironment("pending")
    env.register_service("crowd", Crowd, 0.1, options=ServiceOptions(host=host, drain_timeout_s=0.25))
    env.from_batch(range(100)).map(Fire, futures).sink(lambda record: None)
    began_at = time.monotonic()
    job = env.submit()
    with pytest.raises(JobError, match="crowd"):
        job.wait()
    assert clock.elapsed_s(began_at) < 2
    assert len(futures) == 100
    # The one call that runs right then cannot be cancelled, but it ends.
    assert sum(future.cancelled() for future in futures) >= 90
    for future in futures:
        if not future.cancelled():
            future.exception(timeout=PROMPTLY_S)
    assert job.report is not None
    assert (job.report.state, job.report.cleanliness) == (Outcome.COMPLETED, Cleanliness.DIRTY)


# --- services among each other ---


def test_a_service_that_calls_another_ends_before_it(backend: Backends, host: Host, journal: Notes) -> None:
    """A service that was only seen to call another is stopped and cleaned before that one."""

    class Store(BaseService):
        def process(self, record: int) -> int:
            return record * 10

        def stop(self) -> None:
            journal.append("store stop")

        def cleanup(self) -> None:
            journal.append("store cleanup")

    class Front(BaseService):
        def process(self, record: int) -> int:
            answer: int = self.call_service("store", record)
            return answer + 1

        def stop(self) -> None:
            journal.append("front stop")

        def cleanup(self) -> None:
            journal.append(f"front cleanup, store says {self.call_service('store', 5)}")

    env = LocalEnvironment("two", backend=backend)
    # By the order of registration alone the store would be the first to end.
    env.register_service("front", Front, options=ServiceOptions(host=host))
    env.register_service("store", Store, options=ServiceOptions(host=host))
    arrived: list[int] = []
    env.from_batch([1, 2]).map(Call, "front").sink(arrived.append)
    env.submit(autostop=True)
    assert arrived == [11, 21]
    assert journal == ["front stop", "front cleanup, store says 50", "store stop", "store cleanup"]


@pytest.mark.parametrize("how", ["declared", "handle"])
def test_what_a_service_needs_outlives_it(backend: Backends, host: Host, journal: Notes, how: str) -> None:
    """A dependency that is declared, or a handle among the arguments, orders start and stop."""

    class Part:
        def __init__(self, name: str, other: Any = None) -> None:
            self.name = name
            self.other = other
            journal.append(f"{name} built")

        def process(self, record: int) -> int:
            return record if self.other is None else self.other.process(record) + 1

        def cleanup(self) -> None:
            journal.append(f"{self.name} cleaned")

    env = LocalEnvironment("two", backend=backend)
    if how == "declared":
        env.register_service("a", Part, "a", options=ServiceOptions(host=host, depends_on=["b"]))
        env.register_service("b", Part, "b", options=ServiceOptions(host=host))
    else:
        b = env.register_service("b", Part, "b", options=ServiceOptions(host=host))
        env.register_service("a", Part, "a", b, options=ServiceOptions(host=host))
    arrived: list[int] = []
    env.from_batch([1]).map(Call, "a").sink(arrived.append)
    env.submit(autostop=True)
    assert arrived == [1 if how == "declared" else 2]
    assert journal == ["b built", "a built", "a cleaned", "b cleaned"]


def test_a_circle_of_services_is_refused() -> None:
    """Submit refuses a cycle of dependencies, names its path, and builds nothing."""
    built: list[str] = []
    env = LocalEnvironment("circle")
    for name, other in [("a", "b"), ("b", "c"), ("c", "a")]:
        env.register_service(name, built.append, name, options=ServiceOptions(depends_on=[other]))
    env.from_batch([1]).sink(lambda record: None)
    with pytest.raises(GraphError) as caught:
        env.submit(autostop=True)
    assert "a -> b -> c -> a" in str(caught.value)
    assert built == []


def test_a_circle_that_is_only_seen_at_run_time_is_refused(backend: Backends) -> None:
    """Two services that call each other get an error with the path instead of a deadlock."""

    class Ping(BaseService):
        def process(self, record: int) -> int:
            return int(self.call_service("pong", record))

    class Pong(BaseService):
        def process(self, record: int) -> int:
            return int(self.call_service("ping", record))

    env = LocalEnvironment("circle", backend=backend)
    env.register_service("ping", Ping)
    env.register_service("pong", Pong)
    env.from_batch([1]).map(Call, "ping").sink(lambda record: None)
    with pytest.raises(JobError) as caught:
        env.submit(autostop=True)
    assert isinstance(caught.value.__cause__, ServiceError)
    assert "pong -> ping -> pong" in str(caught.value.__cause__)


@pytest.mark.parametrize("concurrency", [1, 2, None])
def test_a_service_may_call_itself(backend: Backends, host: Host, concurrency: int | None) -> None:
    """A call of its own method through the job does not wait for the call it is made in."""

    class Countdown(BaseService):
        def process(self, record: int) -> list[int]:
            rest: list[int] = self.call_service("countdown", record - 1) if record else []
            return [record, *rest]

    env = LocalEnvironment("itself", backend=backend)
    env.register_service("countdown", Countdown, options=ServiceOptions(host=host, concurrency=concurrency))
    arrived: list[list[int]] = []
    env.from_batch([3]).map(Call, "countdown").sink(arrived.append)
    env.submit(autostop=True)
    assert arrived == [[3, 2, 1, 0]]


# --- pipelines as services ---


def answer(requests: DataStream) -> DataStream:
    """Multiply by ten; 13 fails and odd requests are dropped."""

    def check(request: int) -> int:
        if request == 13:
            raise ZeroDivisionError("13 cannot be asked")
        return request

    return requests.map(check, name="check").filter(lambda request: request % 2 == 0).map(lambda request: request * 10)


def test_a_pipeline_answers_calls(backend: Backends) -> None:
    """Each call gets the answer of its own request; one that is filtered away is answered with None."""
    env = LocalEnvironment("serving", backend=backend)
    tens = env.serve("tens", answer)
    arrived: list[int | None] = []
    env.from_batch([2, 3, 4]).map(tens.process).sink(arrived.append)
    job = env.submit(autostop=True)
    assert arrived == [20, None, 40]
    assert job.report is not None
    assert (job.report.state, job.report.cleanliness) == (Outcome.COMPLETED, Cleanliness.CLEAN)


@pytest.mark.parametrize("parallelism", [1, 3])
def test_a_pipeline_answers_several_callers_at_once(backend: Backends, parallelism: int) -> None:
    """Eight callers at once get the answers to their own requests, from parallel tasks too."""
    env = LocalEnvironment("serving", backend=backend)
    tens = env.serve("tens", lambda requests: requests.map(lambda request: request * 10, parallelism=parallelism))
    arrived: list[tuple[int, int]] = []
    source = env.from_batch(range(200), parallelism=8)
    source.map(lambda record: (record, tens.process(record)), parallelism=8).sink(arrived.append)
    env.submit(autostop=True)
    assert sorted(arrived) == [(record, record * 10) for record in range(200)]


def test_the_callers_are_really_answered_at_once() -> None:
    """Four requests meet inside of the pipeline, so none waits for the answer of another."""
    meeting = threading.Barrier(4)

    def meet(request: int) -> int:
        meeting.wait(timeout=10)
        return -request

    env = LocalEnvironment("serving")
    met = env.serve("met", lambda requests: requests.rebalance().map(meet, parallelism=4))
    arrived: list[int] = []
    env.from_batch(range(4), parallelism=4).map(met.process, parallelism=4).sink(arrived.append)
    env.submit(autostop=True)
    assert sorted(arrived) == [-3, -2, -1, 0]


def test_an_error_in_a_served_pipeline_reaches_the_caller(backend: Backends, clock: FairClock) -> None:
    """The caller promptly catches the very error, and the pipeline goes on answering."""
    waits: list[tuple[float, float]] = []

    class Ask(MapFunction):
        def execute(self, data: int) -> Any:
            began_at = time.monotonic()
            try:
                return self.call_service("tens", data)
            except ZeroDivisionError as error:
                waits.append((began_at, time.monotonic()))
                return str(error)

    env = LocalEnvironment("serving", backend=backend)
    env.serve("tens", answer)
    arrived: list[Any] = []
    env.from_batch([2, 13, 4]).map(Ask).sink(arrived.append)
    job = env.submit(autostop=True)
    assert arrived == [20, "13 cannot be asked", 40]
    assert clock.elapsed_s(*waits[0]) < PROMPTLY_S
    assert job.report is not None
    assert job.report.state is Outcome.COMPLETED


def test_an_error_that_the_caller_lets_through_fails_the_job(backend: Backends, clock: FairClock) -> None:
    """An uncaught error of a served pipeline is the cause of the job's, promptly."""
    env = LocalEnvironment("serving", backend=backend)
    tens = env.serve("tens", answer)
    env.from_batch([13]).map(tens.process, name="ask").sink(lambda record: None)
    began_at = time.monotonic()
    with pytest.raises(JobError) as caught:
        env.submit(autostop=True)
    assert clock.elapsed_s(began_at) < 2 * PROMPTLY_S
    assert '"ask"' in str(caught.value)
    assert isinstance(caught.value.__cause__, ZeroDivisionError)


def test_an_answer_that_takes_too_long_times_out() -> None:
    """`timeout_s` bounds the wait for an answer; the pipeline answers the next request."""
    finish = threading.Event()

    def hesitate(request: str) -> str:
        if request == "slow":
            finish.wait(timeout=10)
        return request.upper()

    class Ask(MapFunction):
        def execute(self, data: str) -> str:
            try:
                answered: str = self.call_service("upper", data)
            except ServiceTimeoutError as error:
                finish.set()
                answered = str(error)
            return answered

    env = LocalEnvironment("serving")
    env.serve("upper", lambda requests: requests.map(hesitate), timeout_s=0.3)
    arrived: list[str] = []
    env.from_batch(["slow", "next"]).map(Ask).sink(arrived.append)
    env.submit(autostop=True)
    assert arrived == ["the pipeline gave no answer within 0.3 s", "NEXT"]


def test_a_served_pipeline_ends_after_the_main_one(backend: Backends, clock: FairClock) -> None:
    """It still answers what the main pipeline asks while it closes, and everything ends promptly."""
    happened: list[str] = []

    class Close(SinkFunction):
        def execute(self, data: int) -> None:
            happened.append(f"record {data}")

        def close(self) -> None:
            happened.append(f"main closed, {self.call_service('tens', 4)}")

    class Serve(MapFunction):
        def execute(self, data: int) -> int:
            return data * 10

        def close(self) -> None:
            happened.append("served closed")

    class Store:
        def cleanup(self) -> None:
            happened.append("store cleaned")

    env = LocalEnvironment("serving", backend=backend)
    env.register_service("store", Store)
    tens = env.serve("tens", lambda requests: requests.map(Serve))
    env.from_batch([1]).map(tens.process).sink(Close)
    began_at = time.monotonic()
    job = env.submit(autostop=True)
    assert clock.elapsed_s(began_at) < 2 * PROMPTLY_S
    assert happened == ["record 10", "main closed, 40", "served closed", "store cleaned"]
    assert not job.is_running
    assert job.report is not None
    assert {task.state for task in job.report.tasks} == {"done"}


def test_a_served_pipeline_is_itself_a_caller(backend: Backends) -> None:
    """Served pipelines may call services and each other."""
    env = LocalEnvironment("serving", backend=backend)
    crowd = env.register_service("crowd", Crowd, 0.0)
    inner = env.serve("inner", lambda requests: requests.map(crowd.process).map(lambda request: request + 1))
    outer = env.serve("outer", lambda requests: requests.map(inner.process).map(lambda request: request * 2))
    arrived: list[int] = []
    env.from_batch([1, 2, 3]).map(outer.process).sink(arrived.append)
    env.submit(autostop=True)
    assert arrived == [4, 6, 8]


def test_an_answer_that_takes_too_long_times_out_on_the_clock_of_the_backend() -> None:
    """The time-out is one of virtual time where time is virtual."""
    backend = StepBackend(1)

    async def hesitate(request: str) -> str:
        await asyncio.sleep(3600 if request == "slow" else 1)
        return request.upper()

    env = LocalEnvironment("serving", backend=lambda: backend)
    upper = env.serve("upper", lambda requests: requests.map_async(hesitate, ordered=False), timeout_s=60)
    arrived: list[str] = []
    letters = env.dead_letters()
    env.from_batch(["slow", "next"]).map(upper, on_error=letters).sink(arrived.append)
    lost: list[str] = []
    letters.map(lambda letter: str(letter.error)).sink(lost.append)
    env.submit(autostop=True)
    assert (arrived, lost) == (["NEXT"], ["the pipeline gave no answer within 60 s"])
    assert backend.now() < 1000 + 3600 + 60


def test_callers_of_a_pipeline_that_calls_another_do_not_wait_for_each_other(backend: Backends) -> None:
    """Whoever has its answer goes on, however many others wait for theirs meanwhile."""
    env = LocalEnvironment("serving", backend=backend)
    inner = env.serve("inner", lambda requests: requests.map(lambda request: request + 1))
    outer = env.serve("outer", lambda requests: requests.map(inner.process).map(lambda request: request * 2))
    arrived: list[int] = []
    source = env.from_batch(range(9))
    source.map(outer.process, parallelism=3).sink(arrived.append)
    source.map(inner.process, parallelism=3).sink(arrived.append)
    env.submit(autostop=True)
    assert sorted(arrived) == sorted([(n + 1) * 2 for n in range(9)] + [n + 1 for n in range(9)])


def test_a_pipeline_that_never_answers_is_told_under_a_seed() -> None:
    """Nobody waits for ever where nothing can go on, and no thread is left of it."""
    env = LocalEnvironment("serving", backend=StepBackend)
    options = ServiceOptions(concurrency=None)
    asked = env.register_service("asked", PipelineService, PipelineBridge(), options=options)
    env.from_batch([1, 2]).map(asked.process).sink(lambda record: None)
    with assert_clean(ignore=["temporary *", "shared memory *"]), pytest.raises(JobError, match="nothing can go on"):
        env.submit(autostop=True)


def test_a_pipeline_that_is_served_alone_needs_a_stop() -> None:
    """Without a main pipeline autostop is refused; the handle answers until `env.stop()`."""
    is_ready = threading.Event()

    class Signal:
        def start(self) -> None:
            is_ready.set()

    env = LocalEnvironment("serving")
    tens = env.serve("tens", answer)
    env.register_service("signal", Signal, options=ServiceOptions(depends_on=["tens"]))
    with pytest.raises(GraphError, match="only serves requests"):
        env.submit(autostop=True)
    job = env.submit()
    assert is_ready.wait(timeout=5)
    assert [tens.process(record) for record in (2, 3)] == [20, None]
    env.stop()
    assert not job.is_running
    with pytest.raises(ServiceUnavailableError, match='"tens"'):
        tens.process(2)


def test_what_is_no_pipeline_cannot_be_served() -> None:
    """A `build` that returns no stream is refused where it is written."""
    env = LocalEnvironment("serving")
    with pytest.raises(GraphError, match=r'serve\("none"\).* is not a stream') as caught:
        env.serve("none", lambda requests: None)  # type: ignore[arg-type, return-value]
    assert "Return the stream of answers" in caught.value.__notes__[0]


class Questions(SourceFunction):
    """A source of a program's own, which hands on the requests themselves."""

    def __init__(self, bridge: PipelineBridge) -> None:
        self.bridge = bridge

    def execute(self) -> Any:
        request = self.bridge.next(timeout=0.05)
        if request is None or isinstance(request, StopSignal):
            return request
        return {"payload": request.payload, "reply": request.response_queue}


class Answers(SinkFunction):
    """A sink of a program's own, which answers."""

    def execute(self, data: dict[str, Any]) -> None:
        data["reply"].put(data["payload"])


class PoliteService(PipelineService):
    """A service of a program's own in front of a pipeline."""

    def process(self, message: Any) -> Any:
        return f"{super().process(message)}, please"


def test_a_pipeline_is_a_service_with_classes_of_its_own() -> None:
    """Subclasses in the style of older programs answer, and the job ends by itself."""

    def shout(record: dict[str, Any]) -> dict[str, Any]:
        return {**record, "payload": record["payload"].upper()}

    bridge = PipelineBridge()
    env = LocalEnvironment("own classes")
    env.register_service("polite", PoliteService, bridge)
    env.from_source(Questions, bridge).map(shout).sink(Answers)
    arrived: list[str] = []
    env.from_batch(["tea", "milk"]).map(Call, "polite").sink(arrived.append)
    env.submit(autostop=True)
    assert arrived == ["TEA, please", "MILK, please"]


def test_an_error_between_classes_of_its_own_reaches_the_caller(clock: FairClock) -> None:
    """With a program's own source and sink, the error still reaches the caller and nothing hangs."""

    def refuse(record: dict[str, Any]) -> dict[str, Any]:
        raise LookupError(f"no {record['payload']} left")

    bridge = PipelineBridge()
    env = LocalEnvironment("own classes")
    env.register_service("polite", PoliteService, bridge)
    env.from_source(Questions, bridge).map(refuse).sink(Answers)
    env.from_batch(["tea"]).map(Call, "polite", name="ask").sink(lambda record: None)
    began_at = time.monotonic()
    with pytest.raises(JobError) as caught:
        env.submit(autostop=True)
    assert clock.elapsed_s(began_at) < 2 * PROMPTLY_S
    assert '"ask"' in str(caught.value)
    assert isinstance(caught.value.__cause__, LookupError)


# --- several environments, and the end of a service ---


def test_two_environments_have_services_of_their_own() -> None:
    """Two jobs run at the same time and call different instances under the same name."""
    meeting = threading.Barrier(2)

    class Meet:
        def __init__(self, label: str) -> None:
            self.label = label

        def process(self, record: int) -> str:
            meeting.wait(timeout=10)
            return f"{self.label}{record}"

    arrived: dict[str, list[str]] = {"left": [], "right": []}
    environments = []
    for label, records in arrived.items():
        env = LocalEnvironment(label)
        env.register_service("meet", Meet, label)
        env.from_batch([1, 2]).map(Call, "meet").sink(records.append)
        environments.append(env)
    jobs = [env.submit() for env in environments]
    for job in jobs:
        job.wait()
    assert arrived == {"left": ["left1", "left2"], "right": ["right1", "right2"]}


def test_a_stopped_service_is_unavailable_at_once(backend: Backends, host: Host, clock: FairClock) -> None:
    """By its handle, by a method taken from it before, and through a function, before and after."""
    functions: list[Call] = []
    methods: list[Callable[[int], int]] = []

    class Keep(Call):
        def open(self) -> None:
            functions.append(self)
            methods.append(self.service("crowd").process)

    env = LocalEnvironment("stopped", backend=backend)
    crowd: Any = env.register_service("crowd", Crowd, 0.0, options=ServiceOptions(host=host))
    arrived: list[int] = []
    env.from_batch([1]).map(Keep, "crowd").sink(arrived.append)
    with pytest.raises(ServiceUnavailableError, match='service "crowd" is not running') as caught:
        crowd.process(1)
    assert "from env.submit() until the job ends" in caught.value.__notes__[0]
    env.submit(autostop=True)
    assert arrived == [1]
    began_at = time.monotonic()
    for call in (
        lambda: crowd.process(1),
        lambda: crowd(1),
        lambda: methods[0](1),
        lambda: functions[0].execute(1),
        lambda: functions[0].call_service("crowd", 1, timeout=5),
        lambda: functions[0].call_service_async("crowd", 1),
    ):
        with pytest.raises(ServiceUnavailableError, match='service "crowd"') as refused:
            call()
        assert refused.value.service == "crowd"
    assert clock.elapsed_s(began_at) < PROMPTLY_S


def test_a_service_refuses_calls_while_it_stops(clock: FairClock) -> None:
    """A call that comes during the cleanup fails at once and does not wait for its end."""
    waits: list[tuple[float, float]] = []

    class Leave(BaseService):
        def process(self, record: int) -> int:
            return record

        def cleanup(self) -> None:
            thread = threading.Thread(target=self.late_call)
            thread.start()
            thread.join(timeout=5)

        def late_call(self) -> None:
            began_at = time.monotonic()
            with pytest.raises(ServiceUnavailableError, match="has stopped and takes no more calls"):
                leave.process(1)
            waits.append((began_at, time.monotonic()))

    env = LocalEnvironment("leaving")
    leave = env.register_service("leave", Leave)
    env.from_batch([1]).map(leave.process).sink(lambda record: None)
    env.submit(autostop=True)
    assert len(waits) == 1
    assert clock.elapsed_s(*waits[0]) < PROMPTLY_S
