"""Rates: calls begin in their order, as fast as the provider allows, and the report shows how long they waited."""

from __future__ import annotations

import threading
import time
from contextlib import ExitStack
from typing import TYPE_CHECKING, Any, Literal

import pytest

from sage import BaseService, GraphError, LocalEnvironment, Outcome, Rate, ServiceOptions
from sage._bucket import LATE_MAX_S, Bucket
from sage.testing import ManualClock, StepBackend

if TYPE_CHECKING:
    from collections.abc import Callable

    from sage._runtime.backend import Backend

FAST = 600_000.0
"""Calls a minute that are so many that a test on real threads does not notice them."""


def bucket(clock: ManualClock, **rate: Any) -> Bucket:
    return Bucket(Rate(**rate), clock)


def begun(bucket: Bucket, clock: ManualClock, calls: int, tokens: int = 0) -> list[float]:
    """Return when so many calls begin that come at once, each of which uses so many tokens; they come in order."""
    start_s, begun_at = clock.now_s, []
    with ExitStack() as stack:
        turns = [stack.enter_context(bucket.turn()) for _ in range(calls)]
        for turn in turns:
            assert all(bucket.pause_s(later) > 0 for later in turns[turns.index(turn) + 1 :])
            while pause_s := bucket.pause_s(turn):
                clock.advance(pause_s)
            begun_at.append(round(clock.now_s - start_s, 1))
            bucket.used(tokens)
    return begun_at


def test_calls_begin_evenly_spread() -> None:
    clock = ManualClock()
    paced = bucket(clock, requests_per_minute=60)
    assert begun(paced, clock, 4) == [0, 1, 2, 3]
    assert (paced.waits_count, round(paced.waited_s)) == (3, 1 + 2 + 3)
    clock.advance(0.5)
    assert begun(paced, clock, 1) == [0.5]
    clock.advance(60)
    assert begun(paced, clock, 2) == [0, 1]


def test_a_burst_begins_at_once_after_a_pause() -> None:
    clock = ManualClock()
    paced = bucket(clock, requests_per_minute=60, burst=3)
    assert begun(paced, clock, 5) == [0, 0, 0, 1, 2]
    clock.advance(2)
    assert begun(paced, clock, 3) == [0, 0, 1]


def test_the_tokens_of_answers_slow_later_calls_down() -> None:
    clock = ManualClock()
    assert begun(bucket(clock, tokens_per_minute=600), clock, 4, tokens=20) == [0, 2, 4, 6]
    assert begun(bucket(clock, requests_per_minute=60, tokens_per_minute=600), clock, 3, tokens=5) == [0, 1, 2]


def test_calls_without_an_answer_yet_count_with_the_usual_tokens() -> None:
    clock = ManualClock()
    paced = bucket(clock, tokens_per_minute=600)
    assert begun(paced, clock, 1, tokens=20) == [0]
    clock.advance(60)
    with paced.turn() as first, paced.turn() as second:
        assert paced.pause_s(first) == 0
        assert paced.pause_s(second) == pytest.approx(2)
        paced.used(50)
        assert paced.pause_s(second) == pytest.approx(5)


def test_a_call_that_is_given_up_takes_no_place() -> None:
    clock = ManualClock()
    paced = bucket(clock, requests_per_minute=60)
    with paced.turn() as first, paced.turn(), paced.turn() as third:
        assert paced.pause_s(first) == 0
        assert 1.9 < paced.pause_s(third) < 2.1
    assert begun(paced, clock, 1) == [1]


class Model(BaseService):
    def __init__(self) -> None:
        self.seen: list[int] = []

    def ask(self, prompt: int) -> int:
        self.ctx.used(prompt_tokens=1)
        self.seen.append(prompt)
        return prompt + 1

    async def await_(self, prompt: int) -> int:
        self.seen.append(prompt)
        return prompt + 1

    def order(self) -> list[int]:
        return self.seen


class Provider(BaseService):
    """Notes when each of its calls begins."""

    def __init__(self) -> None:
        self.begun_at: list[float] = []

    def process(self, call: int) -> int:
        self.begun_at.append(time.monotonic())
        return call

    def begun(self) -> list[float]:
        return sorted(self.begun_at)


class Caller(BaseService):
    """Calls a provider from a process of its own."""

    def __init__(self, provider: Provider) -> None:
        self.provider = provider

    def process(self, calls: int) -> int:
        return sum(self.provider.process(1) for _ in range(calls))


def begun_by_processes(rate: Rate, processes: int, calls: int, host: Literal["inline", "process"]) -> list[float]:
    """Return when calls began that several processes made, each of them one after the other."""
    env = LocalEnvironment("one account")
    options = ServiceOptions(rate=rate, concurrency=processes, host=host)
    provider = env.register_service("provider", Provider, options=options)
    in_process = ServiceOptions(host="process")
    callers = [env.register_service(f"caller{n}", Caller, provider, options=in_process) for n in range(processes)]
    begun: list[float] = []

    def gather(_: int) -> int:
        begun[:] = provider.begun()
        return len(begun)

    stream = env.from_batch(range(processes))
    stream.map(lambda n: callers[n].process(calls), parallelism=processes).map(gather).sink(abs)
    assert env.run().state is Outcome.COMPLETED
    assert len(begun) == processes * calls
    return begun


def test_processes_keep_one_rate_together() -> None:
    rate = Rate(requests_per_minute=6000, burst=10)
    begun = begun_by_processes(rate, 2, 40, "inline")
    assert begun[-1] - begun[0] >= 0.01 * (len(begun) - rate.burst) - LATE_MAX_S


@pytest.mark.proof
@pytest.mark.timeout(200)
@pytest.mark.parametrize("host", ["inline", "process"])
@pytest.mark.parametrize("burst", [1, 40])
def test_eight_processes_hold_a_rate_within_2_percent_over_a_minute(
    burst: int, host: Literal["inline", "process"]
) -> None:
    """A span of time has no more calls than the provider allows, but for what they took to reach it."""
    begun = begun_by_processes(Rate(requests_per_minute=600, burst=burst), 8, 75 + burst // 8, host)
    took_s, least_s = begun[-1] - begun[0], (len(begun) - burst) * 0.1
    print(f"{len(begun)} calls, burst {burst}, {host}: {took_s:.2f} s, {took_s / least_s - 1:+.2%}")
    assert 0.98 * least_s <= took_s <= 1.02 * least_s
    for first, first_at in enumerate(begun):
        for place in range(first + burst + 10, len(begun)):
            spanned_s = (place - first - burst + 1) * 0.1
            assert begun[place] - first_at >= 0.9 * spanned_s


def test_calls_that_begin_late_do_not_slow_down_those_behind_them() -> None:
    clock = ManualClock()
    paced, start_s, begun_at = bucket(clock, requests_per_minute=60), clock.now_s, []
    with ExitStack() as stack:
        turns = [stack.enter_context(paced.turn()) for _ in range(5)]
        for late_s, turn in zip([0.0, 0.01, 0.04, 10.0, 0.0], turns, strict=True):
            if pause_s := paced.pause_s(turn):
                clock.advance(pause_s + late_s)
                assert paced.pause_s(turn) == 0.0
            begun_at.append(round(clock.now_s - start_s, 2))
    assert begun_at == [0.0, 1.01, 2.04, 13.0, 13.95]  # of a long delay, 50 ms are made good


WAYS: dict[str, Callable[[Any, Any], Any]] = {
    "map": lambda stream, model: stream.map(model.ask),
    "a coroutine method in map": lambda stream, model: stream.map(model.await_),
    "map_async": lambda stream, model: stream.map_async(model.await_, concurrency=4),
}


@pytest.mark.parametrize("way", WAYS)
def test_records_take_as_long_as_the_rate_says(way: str) -> None:
    env = LocalEnvironment("paced", backend=lambda: StepBackend(4))
    model = env.register_service("llm", Model, options=ServiceOptions(rate=Rate(requests_per_minute=60)))
    arrived: list[int] = []
    WAYS[way](env.from_batch(range(8)), model).sink(arrived.append)
    report = env.run()
    assert arrived == list(range(1, 9))
    service = report.service("llm")
    assert 7 <= report.running_s < 8
    assert service.rate_waits == 7
    assert f'service "llm": 7 calls waited {service.rate_waited_s:.1f} s in all for its rate' in str(report)
    assert report.bottleneck is not None
    assert report.bottleneck.endswith("for its rate (set ServiceOptions(rate=...) if the provider allows more)")


def test_calls_of_all_hosts_wait_in_order(backend: Callable[[], Backend], host: Literal["inline", "process"]) -> None:
    env = LocalEnvironment("paced", backend=backend)
    options = ServiceOptions(host=host, rate=Rate(FAST, FAST))
    model = env.register_service("llm", Model, options=options)
    arrived: list[int] = []
    env.from_batch(range(50)).map(model.ask).map(lambda n: (n, model.order())).sink(
        lambda pair: arrived.append(pair[0])
    )
    report = env.run()
    assert arrived == list(range(1, 51))
    assert report.service("llm").calls == 100


def test_calls_with_a_time_out_and_asynchronous_ones_are_paced() -> None:
    env = LocalEnvironment("paced")
    options = ServiceOptions(concurrency=4, rate=Rate(requests_per_minute=1200), call_timeout_s=60)
    model = env.register_service("llm", Model, options=options)
    arrived: list[int] = []
    env.from_batch(range(6)).map(model.ask).sink(arrived.append)
    report = env.run()
    assert arrived == list(range(1, 7))
    assert report.service("llm").rate_waits >= 4
    assert report.running_s >= 5 * 0.05 - 0.01


@pytest.mark.parametrize("way", ["map", "map_async"])
def test_a_stop_does_not_wait_for_the_rate(way: str) -> None:
    env = LocalEnvironment("stopped")
    model = env.register_service("llm", Model, options=ServiceOptions(rate=Rate(requests_per_minute=1)))
    arrived: list[int] = []
    has_begun = threading.Event()

    def take(number: int) -> None:
        arrived.append(number)
        has_begun.set()

    WAYS[way](env.from_batch(range(8)), model).sink(take)
    job = env.submit()
    assert has_begun.wait(10)
    env.stop()
    assert arrived == [1]
    assert (job.report.state, job.report.errors) == (Outcome.STOPPED, ())
    assert job.report.duration_s < 20
    assert job.report.undelivered == job.report.operator("source").records_out - 1


@pytest.mark.parametrize(
    ("rate", "text"),
    [
        ({"requests_per_minute": 0}, "rate: requests_per_minute is 0"),
        ({"tokens_per_minute": -1}, "rate: tokens_per_minute is -1"),
        ({"requests_per_minute": "60"}, "rate: requests_per_minute is '60'"),
        ({"requests_per_minute": 60, "burst": 0}, "rate: burst is 0, which is not a positive number"),
        ({}, "rate: requests_per_minute is missing, and burst is 1"),
        ({"tokens_per_minute": 60, "burst": 2}, "rate: requests_per_minute is missing, and burst is 2"),
    ],
)
def test_rates_that_cannot_work_are_refused(rate: dict[str, Any], text: str) -> None:
    with pytest.raises(GraphError, match=text):
        Rate(**rate)


def test_a_rate_that_is_a_number_is_refused() -> None:
    with pytest.raises(GraphError, match="service option rate is 60"):
        ServiceOptions(rate=60)  # type: ignore[arg-type]
