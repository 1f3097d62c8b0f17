"""Served pipelines: streamed answers, second answers, and calls from an event loop of the program."""

from __future__ import annotations

import asyncio
import itertools
import threading
import time
from typing import TYPE_CHECKING, Any

import pytest

from sage import JobError, LocalEnvironment, Outcome, ServiceOptions, ServiceTimeoutError, aio

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from support.fair_clock import FairClock

    from sage import DataStream
    from sage._runtime.backend import Backend

    Backends = Callable[[], Backend]


def served(build: Callable[[DataStream[Any]], DataStream[Any]], **options: Any) -> tuple[LocalEnvironment, Any]:
    env = LocalEnvironment("served")
    handle: Any = env.serve("answers", build, **options)
    env.submit()
    return env, handle


def tokens(question: str) -> Iterator[str]:
    yield from question.split()


def test_a_streamed_answer_comes_piece_by_piece() -> None:
    gates = [threading.Event() for _ in range(3)]

    def generate(question: str) -> Iterator[str]:
        for gate, word in zip(gates, question.split(), strict=True):
            assert gate.wait(30)
            yield word

    env, handle = served(lambda requests: requests.flatmap(generate).map(str.upper), stream=True)
    with env:
        pieces = handle.process("a b c")
        for gate, expected in zip(gates, "ABC", strict=True):
            gate.set()
            assert next(pieces) == expected
        assert list(pieces) == []


def test_streamed_answers_inside_a_job(backend: Backends) -> None:
    env = LocalEnvironment("inside", backend=backend)
    handle: Any = env.serve("answers", lambda requests: requests.flatmap(tokens), stream=True)
    arrived: list[list[str]] = []
    env.from_batch(["a b", "", "c"]).map(lambda question: list(handle.process(question))).sink(arrived.append)
    env.submit(autostop=True)
    assert arrived == [["a", "b"], [], ["c"]]


def test_an_error_in_the_middle_comes_after_the_pieces_before_it() -> None:
    def fails(_: str) -> Iterator[str]:
        yield "one"
        yield "two"
        raise LookupError("gone")

    env, handle = served(lambda requests: requests.flatmap(fails), stream=True)
    with env:
        pieces = handle.process("question")
        assert [next(pieces), next(pieces)] == ["one", "two"]
        with pytest.raises(LookupError, match="gone"):
            next(pieces)


@pytest.mark.parametrize("leave", ["break", "close", "del"])
def test_leaving_a_streamed_answer_ends_the_work(leave: str) -> None:
    closed = threading.Event()

    def endless(_: str) -> Iterator[int]:
        try:
            for number in itertools.count():
                time.sleep(0.001)
                yield number
        finally:
            closed.set()

    env, handle = served(lambda requests: requests.flatmap(endless), stream=True)
    with env:
        pieces = handle.process("question")
        if leave == "break":
            for piece in pieces:
                if piece == 2:
                    break
            del pieces
        elif leave == "close":
            assert next(pieces) == 0
            pieces.close()
            assert list(pieces) is not None
        else:
            assert next(pieces) == 0
            del pieces
        assert closed.wait(30)
        again = handle.process("next")
        assert next(again) == 0
        again.close()


def test_a_piece_that_takes_too_long_is_a_time_out() -> None:
    release = threading.Event()

    def slow(_: str) -> Iterator[str]:
        yield "one"
        release.wait(30)

    env, handle = served(lambda requests: requests.flatmap(slow), stream=True, timeout_s=0.3)
    with env:
        pieces = handle.process("question")
        assert next(pieces) == "one"
        with pytest.raises(ServiceTimeoutError, match=r"no answer within 0\.3 s"):
            next(pieces)
        release.set()
        pieces.close()


def test_a_second_answer_without_stream_is_an_error() -> None:
    env, handle = served(lambda requests: requests.flatmap(tokens))
    with env:
        with pytest.raises(JobError, match="the pipeline gave a second answer to one request") as caught:
            handle.process("a b")
        assert "stream=True" in str(caught.value.__notes__)
        assert handle.process("a") == "a"
        assert handle.process("") is None


def test_two_branches_of_a_request_give_one_answer() -> None:
    seen: list[str] = []

    def build(requests: DataStream[Any]) -> DataStream[Any]:
        requests.sink(seen.append)
        return requests.map(str.upper)

    env, handle = served(build)
    with env:
        assert [handle.process(word) for word in ("a", "b")] == ["A", "B"]
    assert seen == ["a", "b"]


async def wait(number: int) -> int:
    await asyncio.sleep(0.1)
    return number


def test_200_awaited_calls_of_a_served_pipeline_go_on_side_by_side(clock: FairClock) -> None:
    env, handle = served(lambda requests: requests.map_async(wait, concurrency=200))

    async def main() -> Any:
        return await asyncio.gather(*(aio(handle).process(number) for number in range(200)))

    with env:
        began_at = time.monotonic()
        assert asyncio.run(main()) == list(range(200))
        assert clock.elapsed_s(began_at) < 3


def test_awaited_streams_side_by_side() -> None:
    env, handle = served(lambda requests: requests.flatmap(tokens), stream=True)

    async def ask(question: str) -> list[str]:
        return [piece async for piece in await aio(handle)(question)]

    async def main() -> list[list[str]]:
        return await asyncio.gather(*(ask(f"a b {number}") for number in range(20)))

    with env:
        assert asyncio.run(main()) == [["a", "b", str(number)] for number in range(20)]


class Answers:
    def process(self, number: int) -> int:
        return -number

    async def later(self, number: int) -> int:
        await asyncio.sleep(0.01)
        return number


def test_awaited_calls_of_services() -> None:
    env = LocalEnvironment("services")
    plain: Any = env.register_service("plain", Answers, options=ServiceOptions(concurrency=8))
    env.from_source(lambda: None).sink(lambda _: None)
    env.submit()

    async def main() -> Any:
        return await asyncio.gather(aio(plain).process(1), aio(plain).later(2), aio(plain)(3))

    with env:
        assert asyncio.run(main()) == [-1, 2, -3]


def test_a_call_that_would_block_a_loop_of_the_program_is_refused() -> None:
    env = LocalEnvironment("blocks")
    served_one: Any = env.serve("served", lambda requests: requests.map(lambda number: number))
    slow: Any = env.register_service("slow", Answers, options=ServiceOptions(call_timeout_s=5))
    env.submit()

    async def main() -> None:
        for call in (served_one.process, served_one, slow.process, slow.later):
            with pytest.raises(RuntimeError, match="is waited for on a running event loop") as caught:
                call(1)
            assert "await aio(handle)" in str(caught.value.__notes__)

    with env:
        asyncio.run(main())
        assert served_one.process(2) == 2
        assert slow.process(2) == -2


def test_a_job_can_be_awaited() -> None:
    arrived: list[int] = []
    env = LocalEnvironment("awaited")
    env.from_batch(range(5)).map_async(wait).sink(arrived.append)

    async def main() -> Any:
        ticks = 0

        async def tick() -> None:
            nonlocal ticks
            while True:
                await asyncio.sleep(0.005)
                ticks += 1

        ticking = asyncio.create_task(tick())
        report = await env.submit()
        ticking.cancel()
        assert ticks > 2
        return report

    assert asyncio.run(main()).state is Outcome.COMPLETED
    assert arrived == list(range(5))


def test_an_awaited_job_raises_what_failed() -> None:
    env = LocalEnvironment("fails")
    env.from_batch([0]).map(lambda number: 1 // number).sink(lambda _: None)

    async def main() -> None:
        await env.submit()

    with pytest.raises(JobError, match="ZeroDivisionError"):
        asyncio.run(main())


def test_aio_takes_handles_only() -> None:
    with pytest.raises(TypeError, match="int is not the handle of a service"):
        aio(5)
