"""Coroutine methods of services: awaited by coroutines of a job, run to their end for everybody else."""

from __future__ import annotations

import asyncio
import gc
import os
import threading
import time
from collections import Counter
from concurrent.futures import CancelledError
from contextlib import contextmanager
from functools import partial
from typing import TYPE_CHECKING, Any, TypeVarTuple

import pytest
from support.recording_services import Notes, report_of

from sage import (
    BaseService,
    FunctionError,
    GraphError,
    LocalEnvironment,
    MapFunction,
    Outcome,
    Retry,
    ServiceOptions,
    ServiceTimeoutError,
)
from sage._remote.process import ServiceProcess
from sage._runtime.coroutines import CoroutineLoop

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from contextvars import Context
    from pathlib import Path

    from sage import ServiceHandle
    from sage._runtime.backend import Backend

    Backends = Callable[[], Backend]

FOREVER_S = 3600.0

Ts = TypeVarTuple("Ts")


class Model(BaseService):
    """Answers after a while, and knows how many questions it had at once."""

    def __init__(self, factor: int = 2, parties: int = 1) -> None:
        self.factor = factor
        self.parties = parties
        self.inside = 0
        self.most = 0

    async def setup(self) -> None:
        self.lock = asyncio.Lock()
        self.barrier = asyncio.Barrier(self.parties)

    async def generate(self, number: int) -> int:
        self.inside += 1
        self.most = max(self.most, self.inside)
        await asyncio.sleep(0.005)
        await self.barrier.wait()  # which so many have to reach at once
        async with self.lock:  # which belongs to one loop
            self.inside -= 1
        return number * self.factor

    async def process(self, number: int) -> int:
        return await self.generate(number)

    async def never(self, number: int) -> int:
        await asyncio.sleep(FOREVER_S)
        return number

    async def slow(self, number: int) -> int:
        await asyncio.sleep(0.4)
        return number

    def plain(self, number: int) -> int:
        return number + 1

    def peak(self) -> int:
        return self.most


def model_of(env: LocalEnvironment, host: str, target: Any = Model, **options: Any) -> ServiceHandle[Any]:
    return env.register_service("model", target, options=ServiceOptions(host=host, **options))  # type: ignore[arg-type]


def arriving(env: LocalEnvironment, function: Any, count: int = 40, **options: Any) -> list[Any]:
    arrived: list[Any] = []
    env.from_batch(range(count)).map_async(function, **{"concurrency": 20, **options}).sink(arrived.append)
    env.submit(autostop=True)
    return arrived


DOUBLED = [number * 2 for number in range(40)]


class Peak:
    """Asks a service for its peak when everything has gone through."""

    def __init__(self, model: ServiceHandle[Any]) -> None:
        self.seen = 0
        self.model = model

    def __call__(self, _: Any) -> None:
        self.seen = max(self.seen, self.model.peak())


@pytest.mark.parametrize("concurrency", [1, 4, None])
def test_a_call_is_awaited_under_the_limit_of_the_service(
    backend: Backends, host: str, concurrency: int | None
) -> None:
    env = LocalEnvironment("awaited", backend=backend)
    model = model_of(env, host, partial(Model, 2, concurrency or 20), concurrency=concurrency)
    peak = Peak(model)

    async def ask(number: int) -> int:
        answer: int = await model.generate(number)
        return answer

    arrived: list[int] = []
    stream = env.from_batch(range(40)).map_async(ask, concurrency=20)
    stream.sink(arrived.append)
    stream.sink(peak)
    env.submit(autostop=True)
    assert arrived == DOUBLED
    assert peak.seen == (concurrency or 20)


def test_a_method_is_a_function_of_map_async(backend: Backends, host: str) -> None:
    env = LocalEnvironment("method", backend=backend)
    assert arriving(env, model_of(env, host, concurrency=8).generate) == DOUBLED
    env = LocalEnvironment("handle", backend=backend)
    assert arriving(env, model_of(env, host, concurrency=8)) == DOUBLED


def test_outside_of_the_loop_it_is_run_to_its_end(backend: Backends, host: str) -> None:
    env = LocalEnvironment("outside", backend=backend)
    model = model_of(env, host, concurrency=4)
    arrived: list[int] = []
    env.from_batch(range(40)).map(lambda number: model.generate(number)).sink(arrived.append)
    env.submit(autostop=True)
    assert arrived == DOUBLED


def test_threads_and_coroutines_share_the_limit(host: str) -> None:
    env = LocalEnvironment("both")
    model = model_of(env, host, concurrency=3)
    peak = Peak(model)
    arrived: list[int] = []
    numbers = env.from_batch(range(40))
    awaited = numbers.map_async(model.generate, concurrency=20, name="awaited")
    waited_for = numbers.map(model.generate, parallelism=4, name="waited for")
    awaited.union(waited_for).sink(arrived.append).sink(peak)
    env.submit(autostop=True)
    assert Counter(arrived) == Counter(DOUBLED * 2)
    assert 1 < peak.seen <= 3


class ByName(MapFunction):
    def __init__(self, **options: Any) -> None:
        self.options = options

    async def execute(self, data: int) -> Any:
        return await self.call_service("model", data, **self.options)


class InAThread(MapFunction):
    """Calls a plain method, which would keep all other coroutines waiting, on another thread."""

    async def execute(self, data: int) -> Any:
        return await self.call_service_async("model", data, method="plain", timeout=60) - 1


@pytest.mark.parametrize("options", [{}, {"method": "generate"}, {"method": "generate", "timeout": 60}])
def test_a_function_class_calls_by_name(backend: Backends, host: str, options: dict[str, Any]) -> None:
    env = LocalEnvironment("by name", backend=backend)
    model_of(env, host, concurrency=8)
    assert _arriving_class(env, ByName, options) == DOUBLED


def test_a_future_of_a_call_may_be_awaited(backend: Backends, host: str) -> None:
    env = LocalEnvironment("future", backend=backend)
    model_of(env, host, concurrency=8)
    assert _arriving_class(env, InAThread, {}) == list(range(40))


def _arriving_class(env: LocalEnvironment, function: type, options: dict[str, Any]) -> list[Any]:
    arrived: list[Any] = []
    env.from_batch(range(40)).map_async(function, concurrency=20, **options).sink(arrived.append)
    env.submit(autostop=True)
    return arrived


def make_model() -> Model:
    return Model(2)


def test_a_callable_may_build_the_service(backend: Backends, host: str) -> None:
    env = LocalEnvironment("callable", backend=backend)
    assert arriving(env, model_of(env, host, make_model, concurrency=8).generate) == DOUBLED


def test_a_shared_service_is_awaited_by_the_jobs_that_share_it(host: str) -> None:
    first, second = LocalEnvironment("first"), LocalEnvironment("second")
    models = [model_of(env, host, concurrency=8, shared=True) for env in (first, second)]
    with first:
        first.from_source(lambda: None).sink(lambda _: None)
        first.submit()

        async def ask(number: int) -> int:
            answer: int = await models[1].generate(number)
            return answer

        assert arriving(second, ask) == DOUBLED


def test_a_plain_method_goes_between_the_coroutines_of_its_service(backend: Backends) -> None:
    """With one place, which a coroutine keeps while it waits, nothing could ever go on otherwise."""
    env = LocalEnvironment("between", backend=backend)
    model = model_of(env, "inline")
    is_inside = 0

    async def ask(number: int) -> int:
        nonlocal is_inside
        asked = asyncio.ensure_future(model.generate(number))
        while not model.peak():
            await asyncio.sleep(0.001)
        is_inside += 1
        answer: int = await asked
        return answer + int(model.plain(number)) - number - 1

    assert arriving(env, ask) == DOUBLED
    assert is_inside == 40


class Reflexive(BaseService):
    """Calls itself, by its own handle, as a coroutine and as a plain method."""

    async def process(self, number: int) -> int:
        answer: int = await self.service("model").deeper(number)
        return answer + 1

    async def deeper(self, number: int) -> int:
        await asyncio.sleep(0)
        return number * 2 - 1

    def plain(self, number: int) -> int:
        return int(self.service("model").deeper(number)) + 1


def test_a_serial_service_may_call_itself(backend: Backends, host: str) -> None:
    env = LocalEnvironment("itself", backend=backend)
    model = model_of(env, host, Reflexive)
    arrived: list[int] = []
    numbers = env.from_batch(range(40))
    numbers.map_async(model, concurrency=20).sink(arrived.append)
    numbers.map(model.plain).sink(arrived.append)
    env.submit(autostop=True)
    assert Counter(arrived) == Counter(DOUBLED * 2)


class Answers(BaseService):
    def __init__(self, model: Any) -> None:
        self.model = model

    async def process(self, number: int) -> int:
        answer: int = await self.model.generate(number)
        return answer


def test_a_coroutine_of_a_service_awaits_another_service(backend: Backends, host: str) -> None:
    env = LocalEnvironment("two services", backend=backend)
    model = model_of(env, host, concurrency=8)
    options = ServiceOptions(host=host, concurrency=8)  # type: ignore[arg-type]
    answers = env.register_service("answers", Answers, model, options=options)
    assert arriving(env, answers) == DOUBLED


@pytest.mark.parametrize("where", ["option", "call"])
def test_a_call_that_takes_too_long_fails(backend: Backends, host: str, where: str) -> None:
    env = LocalEnvironment("late", backend=backend)
    model = model_of(env, host, concurrency=8, call_timeout_s=0.1 if where == "option" else None, drain_timeout_s=0.1)

    class Ask(MapFunction):
        async def execute(self, data: int) -> Any:
            if where == "option":
                return await model.never(data)
            return await self.call_service("model", data, method="never", timeout=0.1)

    env.from_batch([1]).map_async(Ask, name="ask").sink(lambda _: None)
    job = env.submit()
    with pytest.raises(BaseException) as caught:  # noqa: PT011  (in a process of its own, the call outlasts its drain)
        job.wait()
    assert job.report is not None
    first = job.report.errors[0]
    assert isinstance(first, FunctionError), caught.value
    assert 'service "model" did not answer never within 0.1 s' in str(first)
    assert isinstance(first.__cause__, ServiceTimeoutError)


def test_a_cancel_ends_calls_that_run_and_calls_that_wait_for_their_place(backend: Backends, host: str) -> None:
    env = LocalEnvironment("cancelled", backend=backend)
    model = model_of(env, host, concurrency=2)
    begun: list[int] = []

    async def ask(number: int) -> int:
        begun.append(number)
        if len(begun) == 20:
            env.jobmanager.jobs[env.env_uuid].cancel()
        answer: int = await model.never(number)
        return answer

    env.from_batch(range(20)).map_async(ask, concurrency=20).sink(lambda _: None)
    report = env.submit().wait()
    assert (report.state, str(report.cleanliness), report.undelivered) == (Outcome.CANCELLED, "clean", 20)


def test_a_call_whose_time_is_over_is_ended_where_it_runs(backend: Backends, host: str) -> None:
    """Its place is free for the next call, although it would never have answered."""
    env = LocalEnvironment("late", backend=backend)
    model = model_of(env, host, concurrency=1, call_timeout_s=0.2)

    async def ask(number: int) -> int:
        with pytest.raises(ServiceTimeoutError):
            await model.never(number)
        answer: int = await model.generate(number)
        return answer

    arrived: list[int] = []
    env.from_batch([1, 2, 3]).map_async(ask, concurrency=1).sink(arrived.append)
    env.submit(autostop=True)
    assert arrived == [2, 4, 6]
    assert report_of(env).cleanliness == "clean"


class Asking(BaseService):
    """Asks another service, and tells what came of it, also when nobody waits for that any more."""

    def __init__(self, notes: Notes) -> None:
        self.notes = notes

    def process(self, number: int) -> None:
        try:
            self.notes.append(f"answered {self.call_service('model', number, method='slow')}")
        except BaseException as error:
            self.notes.append(type(error).__name__)
            raise


def test_what_a_call_asks_of_others_goes_on_when_it_is_given_up(journal: Notes) -> None:
    env = LocalEnvironment("given up")
    model_of(env, "process", concurrency=2)
    asking = env.register_service("asking", Asking, journal, options=ServiceOptions(call_timeout_s=0.1))
    env.from_batch([1]).map(asking.process, on_error="skip").sink(lambda _: None)
    env.submit(autostop=True)
    assert journal == ["answered 1"]


class Counting(Model):
    """Knows how many calls its process still has in mind."""

    def dawdle(self, number: int) -> int:
        time.sleep(0.1)
        return number

    def remembered(self, _: int) -> int:
        (child,) = (one for one in gc.get_objects() if isinstance(one, ServiceProcess))
        return len(child._given_up) + len(child._running)


class Impatient(MapFunction):
    """Gives up a call of each kind."""

    def execute(self, data: int) -> int:
        for method in (Counting.dawdle, Counting.never):
            with pytest.raises(ServiceTimeoutError):
                self.call_service("model", data, method=method.__name__, timeout=0.05)
        return data


def test_a_process_remembers_no_call_that_was_given_up() -> None:
    env = LocalEnvironment("forgotten")
    model = model_of(env, "process", Counting, concurrency=4)
    arrived: list[int] = []
    env.from_batch(range(5)).map(Impatient).map(model.remembered).sink(arrived.append)
    env.submit(autostop=True)
    assert arrived[-1] <= 2  # the coroutine of the last one may be about to end


class Mortal(BaseService):
    """Takes its process with it, once."""

    def __init__(self, mark: str) -> None:
        self.mark = mark

    async def process(self, number: int) -> int:
        if number == 5 and not os.path.exists(self.mark):
            with open(self.mark, "w"):
                os._exit(1)
        return number * 2


def test_calls_wait_for_a_service_that_is_restarted(tmp_path: Path) -> None:
    env = LocalEnvironment("mortal")
    options = ServiceOptions(host="process", concurrency=8, restart="on_failure", backoff_s=(0.01, 0.01))
    model = env.register_service("model", Mortal, str(tmp_path / "mark"), options=options)
    assert arriving(env, model, retry=Retry(5, (0.01, 0.05))) == DOUBLED


def test_a_call_on_another_thread_keeps_no_coroutine_waiting() -> None:
    may_answer = threading.Event()

    class Slow:
        def process(self, number: int) -> int:
            assert may_answer.wait(20)
            return number

    class Ask(MapFunction):
        async def execute(self, data: int) -> Any:
            if data == 0:
                return await self.call_service_async("slow", data)
            may_answer.set()
            return data

    env = LocalEnvironment("threads")
    env.register_service("slow", Slow)
    arrived: list[int] = []
    env.from_batch([0, 1]).map_async(Ask).sink(arrived.append)
    env.submit(autostop=True)
    assert arrived == [0, 1]


@pytest.mark.parametrize("give", [lambda model: model.plain, lambda model: model], ids=["method", "handle"])
def test_a_plain_method_cannot_be_awaited(give: Any) -> None:
    class Plain:
        def process(self, number: int) -> int:
            return number

        plain = process

    env = LocalEnvironment("plain")
    model = env.register_service("model", Plain)
    env.from_batch([1]).map_async(give(model), name="ask").sink(lambda _: None)
    with pytest.raises(
        GraphError, match=r'operator "ask" awaits ".*" of service "model", which is not a coroutine'
    ) as caught:
        env.submit()
    assert "Write async def, or use map" in caught.value.__notes__[0]


class Eager(asyncio.SelectorEventLoop):
    """Runs the first step of a coroutine before its caller knows that it was started."""

    def __init__(self, has_begun: threading.Event) -> None:
        super().__init__()
        self._has_begun = has_begun

    def call_soon_threadsafe(
        self, callback: Callable[[*Ts], object], *args: *Ts, context: Context | None = None
    ) -> asyncio.Handle:
        handle = super().call_soon_threadsafe(callback, *args, context=context)
        assert self._has_begun.wait(30)
        return handle


def test_a_cancel_before_the_caller_knows_that_its_coroutine_was_started_is_not_missed() -> None:
    has_begun = threading.Event()

    class Begins:
        def event_loop(self) -> asyncio.AbstractEventLoop:
            return Eager(has_begun)

        @contextmanager
        def loop_going_on(self) -> Iterator[None]:
            yield

    async def wait() -> None:
        loop.cancel()
        has_begun.set()
        await asyncio.sleep(FOREVER_S)

    loop = CoroutineLoop("test", Begins())
    try:
        with pytest.raises(CancelledError):
            loop.run(wait())
    finally:
        assert loop.close() == ()
