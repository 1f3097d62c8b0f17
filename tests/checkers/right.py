"""Programs that are right: no type checker may find fault with them."""

import asyncio
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

from sage import (
    BaseCoMapFunction,
    BaseJoinFunction,
    BaseService,
    BatchFunction,
    DataStream,
    FilterFunction,
    FlatMapFunction,
    JobReport,
    KeyByFunction,
    KeyedStream,
    ListState,
    LocalEnvironment,
    MapFunction,
    MapState,
    ProcessFunction,
    Retry,
    ServiceHandle,
    ServiceOptions,
    SinkFunction,
    Source,
    SourceFunction,
    StopSignal,
    ValueState,
)
from sage.testing import run


@dataclass
class Question:
    text: str


class Memory(BaseService):
    def __init__(self, folder: str, size: int = 10) -> None:
        self.folder = folder
        self.size = size

    def recall(self, query: str, top: int = 3) -> list[str]:
        return [query] * top

    async def generate(self, prompt: str) -> str:
        return prompt

    def process(self, text: str) -> int:
        return len(text)


class Plain:
    def price(self, fruit: str) -> float | None:
        return 1.0 if fruit else None


class Numbers(BatchFunction[int]):
    def __init__(self, count: int = 3) -> None:
        self.count = count

    def execute(self) -> int | None:
        self.count -= 1
        return self.count if self.count >= 0 else None


class Ticks(SourceFunction[float]):
    def execute(self) -> float | StopSignal | None:
        return StopSignal()


class Words(Source[str]):
    def __init__(self, words: list[str]) -> None:
        self.words = words

    def read(self, records_max: int) -> list[str] | None:
        words, self.words = self.words[:records_max], self.words[records_max:]
        return words or None


class Prefix(MapFunction[str, str]):
    def __init__(self, prefix: str, times: int = 1) -> None:
        self.prefix = prefix * times

    def open(self) -> None:
        self.logger.info("task %s of %s", self.ctx.parallel_index, self.ctx.parallelism)

    def execute(self, data: str) -> str:
        return self.prefix + data


class Ask(MapFunction[str, str]):
    def __init__(self, model: ServiceHandle[Memory]) -> None:
        self.model = model

    async def execute(self, data: str) -> str:
        return await self.model.generate(data)


class Old(MapFunction):
    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)

    def execute(self, data: Any) -> Any:
        return data


class Long(FilterFunction[str]):
    def __init__(self, least: int) -> None:
        self.least = least

    def execute(self, text: str) -> bool:
        return len(text) >= self.least


class Split(FlatMapFunction[str, str]):
    def execute(self, data: str) -> Iterable[str]:
        self.collect(data)
        return data.split()


class Total(ProcessFunction[int, int]):
    total = 0

    def execute(self, data: int) -> None:
        self.total += data

    def finish(self) -> list[int]:
        return [self.total]


class Session(ProcessFunction[str, tuple[str, int]]):
    count = ValueState(0)
    last = ValueState[str | None](None)
    seen = ListState[str]()
    by_name = MapState[str, int]()

    def execute(self, data: str) -> list[tuple[str, int]]:
        self.count.value += len(data)
        self.seen.append(data.upper())
        self.seen += [data]
        self.by_name[data] = self.by_name.get(data, 0) + 1
        before, self.last.value = self.last.value, data
        return [((before or data) + self.seen[-1], self.count.value)]


class Show(SinkFunction[object]):
    def execute(self, data: object) -> None:
        print(data)


class Initial(KeyByFunction[str, str]):
    def execute(self, data: str) -> str:
        return data[:1]


class Both(BaseCoMapFunction):
    def map0(self, data: str) -> int:
        return len(data)

    def map1(self, data: int) -> float:
        return data / 2


class Match(BaseJoinFunction[str | int, str, tuple[str, str | int]]):
    def execute(self, payload: str | int, key: str, tag: int) -> list[tuple[str, str | int]]:
        return [(key, payload)] if tag else []


class Scaled(MapFunction[list[int], list[int]]):
    def execute(self, data: list[int]) -> list[int]:
        return [number * 2 for number in data]


async def slow(text: str) -> int:
    await asyncio.sleep(0)
    return len(text)


def lines(path: str, count: int = 2) -> Iterator[str]:
    yield from [path] * count


def shout(text: str) -> str:
    return text.upper()


def sources(env: LocalEnvironment) -> None:
    numbers: DataStream[int] = env.from_batch([1, 2, 3])
    numbers = env.from_batch(range(3), parallelism=2)
    numbers = env.from_batch(Numbers)
    numbers = env.from_batch(Numbers, 4, name="numbers")
    numbers = env.from_batch(Numbers(4))
    texts: DataStream[str] = env.from_batch(lines, "a", count=3)
    texts = env.from_batch(lines("a"))
    texts = env.from_batch(lines, "a", count=3, name="lines")
    texts = env.from_batch(Words, ["a"])
    texts = env.from_batch(Words(["a"]), on_error=Retry(2))
    texts = env.from_collection({"a", "b"})
    texts = env.from_batch(line for line in ["a"])
    ticks: DataStream[float] = env.from_source(Ticks, delay=0.1)
    ticks = env.from_source(Ticks())
    ticks = env.from_source(lambda: 1.0, delay=0.5)
    texts = env.from_source(Words, ["a"], name="words")
    texts.union(env.from_future("later")).map(shout)
    print(numbers, texts, ticks)


def maps(env: LocalEnvironment) -> None:
    texts = env.from_batch(["a", "b"])
    lengths: DataStream[int] = texts.map(len)
    lengths = texts.map(lambda text: len(text) + 1)
    lengths = texts.map(lambda text: len(text.upper()), parallelism=2, name="lengths", on_error="skip")
    lengths = texts.map(slow)
    lengths = texts.map(slow, parallelism=2, name="slow", on_error="skip")
    lengths = texts.map_async(slow)
    lengths = texts.map_async(slow, concurrency=4, ordered=False, timeout_s=1.0, retry=Retry(3))
    lengths = texts.map_async(lambda text: slow(text), name="slow")
    more: DataStream[str] = texts.map(Prefix, "a")
    more = texts.map(Prefix, "a", times=2)
    more = texts.map(Prefix, "a", times=2, parallelism=2, name="prefix", on_error=env.dead_letters())
    more = texts.map(Prefix, "a", times=2, capacity=4).filter(len, capacity=3).map(str.upper, capacity=2)
    more = texts.map(Prefix("a"))
    more = texts.map(Prefix, prefix="a", name="prefix")
    more = texts.map(str.upper).map(shout).filter(bool).name("shouted")
    more = texts.filter(Long, 2).filter(Long(3), parallelism=2).filter(lambda text: text != "b")
    more = texts.flatmap(Split).flatmap(str.split).flatmap(lambda text: [text, text]).flat_map(lines)
    lengths = texts.process(lambda text: [len(text)]).process(Total, name="total")
    lengths = texts.map(len).map_batches(Scaled).map_batches(Scaled(), max_records=8)
    lengths = texts.map_batches(lambda batch: [len(text) for text in batch], max_wait_s=0.1)
    anything: DataStream[Any] = texts.map(Old, 1, 2, x=3).map(Old()).map(len)
    anything = texts.map_batches(lambda batch: batch, batch_format="numpy")
    maybe: DataStream[str | None] = texts.map(lambda text: text or None)
    joined: DataStream[str | int] = texts.union(lengths)
    partial_: DataStream[int] = texts.map(partial(int, base=10))
    print(lengths, more, anything, maybe, joined, partial_)


def keys(env: LocalEnvironment) -> None:
    texts = env.from_batch(["a", "b"])
    counts = env.from_batch([1, 2])
    keyed: KeyedStream[str, str] = texts.keyby(Initial)
    keyed = texts.keyby(lambda text: text[0], strategy="hash", parallelism=2)
    keyed = texts.keyby(lambda text: text.upper(), name="upper", on_error="skip")
    keyed = texts.key_by(Initial(), name="initial").filter(lambda text: text != "b")
    keyed.reduce(lambda one, other: one + other, emit="last").sink(print)
    lengths: DataStream[int] = keyed.stateful_map(lambda total, text: (total + len(text), total), 0, name="lengths")
    lengths = keyed.map(len).stateful_map(divmod, 1, parallelism=2)
    counted: DataStream[tuple[Any, int]] = keyed.count().keyby(lambda pair: pair[0]).distinct()
    counted = keyed.count(emit="last", name="counted")
    counted = keyed.aggregate(0, lambda total, text: total + len(text), emit="last")
    means: DataStream[tuple[Any, float]] = keyed.aggregate(
        (0, 1), lambda s, text: (len(text), s[1]), lambda s: s[0] / s[1]
    )
    best: DataStream[tuple[Any, list[str]]] = keyed.top_k(3, by=len)
    keyed.distinct(name="once").changed().changed(fingerprint=len).map(str.upper).sink(print)
    either: DataStream[str | int] = keyed.changed(removed=len, name="either")
    either = keyed.changed(fingerprint=len, removed=lambda key: len(key))
    either.map(str).sink(print)
    keyed.process(Session, parallelism=2).map(lambda pair: pair[0].upper()).sink(print)
    print(lengths, counted, means, best)
    numbers: DataStream[float] = texts.connect(counts).comap(Both)
    numbers = texts.connect(counts).comap(Both, name="both")
    numbers = texts.connect(counts).comap(len, lambda count: count / 2)
    three: DataStream[Any] = texts.connect(counts).connect(texts).comap([len, abs, len])
    keyed.connect(counts.keyby(str)).join(Match, name="match").map(lambda pair: pair[0].upper()).sink(print)
    texts.connect(counts).keyby(lambda text: text, str).join(Match)
    print(numbers, three)


def sinks(env: LocalEnvironment) -> None:
    arrived: list[str] = []
    texts = env.from_batch(["a"])
    texts.sink(arrived.append).sink(Show).sink(Show(), name="show", at="driver").print("text").map(len)
    texts.sink(print, parallelism=2)


def services(env: LocalEnvironment) -> None:
    memory = env.register_service("memory", Memory, "folder", size=3)
    also = env.register_service("also", Memory, "folder", options=ServiceOptions(concurrency=4))
    plain = env.register_service("plain", Plain)
    built = env.register_service("built", lambda: Memory("folder"))
    made = env.register_service_factory("made", Plain)
    texts = env.from_batch(["tea"])
    recalled: DataStream[list[str]] = texts.map(lambda text: memory.recall(text, top=2))
    recalled = texts.map(also.recall)
    print(recalled)
    texts.map(memory).map(lambda length: length + 1).sink(print)
    texts.map_async(memory.generate).map(str.upper).sink(print)
    texts.map_async(Ask, memory).map(str.upper).sink(print)
    texts.map_async(Ask, memory, concurrency=2).map(str.upper).sink(print)
    texts.map(plain.price).map(lambda price: price or 0.0).sink(print)
    texts.map(built.recall).map(len).sink(print)
    texts.map(made.price).sink(print)
    ask = env.serve("ask", lambda requests: requests.map(lambda text: Question(text)), timeout_s=1.0)
    texts.map(lambda text: ask.process(text).text.upper()).sink(print)
    texts.map(lambda text: ask(text) or "nothing").sink(print)

    def answer(questions: DataStream[Question]) -> DataStream[str]:
        return questions.map(lambda question: question.text)

    served = env.serve("served", answer)
    texts.map(Question).map(served.process).map(lambda text: text.upper()).sink(print)
    database = env.register_command("database", ["server", "--port", "{port}"])
    env.register_command("client", ["client", database.url, str(database.port)], url=database.url)


def jobs(env: LocalEnvironment) -> None:
    report: JobReport = env.submit(autostop=True).report
    print(report.operator("map").records_in, report.service("memory").calls, report.state.value)
    job = env.submit()
    job.stop()
    print(job.wait(1.0).errors, job.id, job.state, job.plan, job.events())
    with LocalEnvironment("inside", stop_timeout_s=3.0) as inside:
        inside.from_batch([1]).sink(print)
    words: list[str] = run(["a b"], lambda stream: stream.flatmap(str.split))
    print(words)


def results(env: LocalEnvironment) -> None:
    texts = env.from_batch(["a"])
    found: list[int] = texts.tap(print).limit(3).map(len).collect()
    for number in texts.sample(0.5, seed=1).map(len).iterate():
        found.append(number + 1)
    parts: dict[str, DataStream[str]] = texts.branch(long=lambda text: len(text) > 3, short=lambda text: text == "a")
    parts["long"].map(str.upper).sink(print)
    report: JobReport = env.run(keep_services=True, progress=True)
    print(report.why)


def old(stream: DataStream) -> DataStream:
    return stream.map(Old).filter(lambda data: data).keyby(lambda data: data)
