"""Programs that are wrong. Behind each faulty line stands what mypy and what pyright call the mistake."""

from collections.abc import Iterator

from right import Ask, Initial, Long, Memory, Numbers, Plain, Prefix, Question, Scaled, Show, Split, Ticks, slow

from sage import (
    DataStream,
    Http,
    LocalEnvironment,
    MapFunction,
    Retry,
    ServiceHandle,
    ServiceOptions,
    SinkFunction,
    ValueState,
)
from sage.testing import run


def newcomers(env: LocalEnvironment) -> None:
    """The mistakes of the first day."""
    texts = env.from_batch(["a", "b"])
    memory = env.register_service("memory", Memory, "folder")
    lengths: list[int] = []
    texts.map(len).map(str.upper)  # arg-type, reportArgumentType
    texts.map(str.upper, paralelism=2)  # call-overload, reportArgumentType
    texts.map(lambda text: memory.recal(text))  # attr-defined, reportAttributeAccessIssue
    texts.map(lambda text: memory.recall(text, top="3"))  # arg-type, reportArgumentType
    texts.map(str.upper).sink(lengths.append)  # arg-type, reportArgumentType
    texts.filter(lambda one, other: one < other)  # arg-type, reportCallIssue
    print(env.submit(autostop=True).report.operater("map"))  # attr-defined, reportAttributeAccessIssue
    texts.map_async(str.upper)  # arg-type, reportArgumentType


class Shorten(MapFunction[str, str]):
    def execute(self, data: int) -> str:  # override, reportIncompatibleMethodOverride
        return self.ctx.parallel_idx * "a"  # attr-defined, reportAttributeAccessIssue


class Visits(MapFunction[str, int]):
    count = ValueState(0)

    def execute(self, data: str) -> int:
        self.count.value = data  # assignment, reportAttributeAccessIssue
        return self.count.valu  # attr-defined, reportAttributeAccessIssue


class Store(SinkFunction[str]):
    def __init__(self, memory: ServiceHandle[Memory]) -> None:
        self.memory = memory

    def execute(self, data: str) -> None:
        self.memory.store(data)  # attr-defined, reportAttributeAccessIssue


def operators(env: LocalEnvironment) -> None:
    texts = env.from_batch(["a", "b"])
    numbers = env.from_batch([1, 2])
    texts.map(lambda text: text.uper())  # attr-defined, reportAttributeAccessIssue
    texts.map(lambda text: text + 1, name="plus")  # operator, reportOperatorIssue
    texts.map(Prefix, 3)  # call-overload, reportArgumentType
    texts.map(Prefix, "a", paralelism=2)  # call-arg, reportCallIssue
    texts.map(Prefix, "a", time=2)  # call-arg, reportCallIssue
    numbers.map(Prefix, "a")  # call-overload, reportArgumentType
    numbers.map(Prefix("a"))  # arg-type, reportArgumentType
    texts.map(Show)  # arg-type, reportArgumentType
    texts.map(str.upper, parallelism="2")  # call-overload, reportArgumentType
    texts.map(str.upper, on_error="ignore")  # call-overload, reportArgumentType
    texts.map(str.upper, capasity=3)  # call-overload, reportArgumentType
    texts.map(slow).map(str.upper)  # arg-type, reportArgumentType
    texts.filter(Prefix, "a")  # call-overload, reportArgumentType
    numbers.filter(Long(2))  # arg-type, reportArgumentType
    texts.flatmap(len)  # arg-type, reportArgumentType
    numbers.flatmap(Split)  # arg-type, reportArgumentType
    texts.process(Split)  # arg-type, reportArgumentType
    texts.sink(lambda text: text.missing)  # attr-defined, reportAttributeAccessIssue
    texts.sink(Long(2))  # call-overload, reportArgumentType
    texts.sink(print, at="somewhere")  # call-overload, reportArgumentType
    texts.map_async(slow, concurency=4)  # call-overload, reportArgumentType
    texts.map_async(slow, retry=3)  # call-overload, reportArgumentType
    texts.map_async(Prefix("a"))  # call-overload, reportArgumentType
    numbers.map_async(Ask, env)  # call-overload, reportArgumentType
    texts.map_batches(Scaled)  # arg-type, reportArgumentType
    texts.map_batches(lambda batch: len(batch))  # arg-type, reportArgumentType
    numbers.map_batches(lambda batch: [number.upper() for number in batch])  # attr-defined, reportAttributeAccessIssue
    texts.map_batches(lambda batch: batch, max_record=3)  # call-overload, reportCallIssue
    numbers.keyby(Initial)  # arg-type, reportArgumentType
    texts.keyby(len, strategy="hashed")  # call-overload, reportArgumentType
    texts.keyby(len).reduce(lambda one, other: len(one))  # arg-type, reportArgumentType
    texts.keyby(len).stateful_map(lambda total, text: total + len(text), 0)  # arg-type, reportArgumentType
    texts.keyby(len).count().map(str.upper)  # arg-type, reportArgumentType
    texts.keyby(len).top_k(3, by=lambda text: text.missing)  # attr-defined, reportAttributeAccessIssue
    texts.connect(numbers).comap(len, lambda number: number.upper())  # attr-defined, reportAttributeAccessIssue
    numbers.connect(numbers).join(Prefix)  # arg-type, reportArgumentType
    texts.union([1, 2])  # arg-type, reportArgumentType
    texts.mapp(len)  # attr-defined, reportAttributeAccessIssue


def sources(env: LocalEnvironment) -> None:
    env.from_batch(3)  # call-overload, reportArgumentType
    env.from_batch(["a"], name=3)  # call-overload, reportArgumentType
    env.from_batch(["a"], paralelism=2)  # call-overload, reportArgumentType
    env.from_batch(Numbers, "many")  # call-overload, reportArgumentType
    env.from_batch(Numbers).map(str.upper)  # arg-type, reportArgumentType
    env.from_source(Ticks).map(str.upper)  # arg-type, reportArgumentType
    env.from_source(lambda: "a", dely=1.0)  # call-overload, reportCallIssue

    def numbers() -> Iterator[int]:
        yield 1

    env.from_batch(numbers).map(str.upper)  # arg-type, reportArgumentType
    env.dead_letters().map(lambda letter: letter.record)  # attr-defined, reportAttributeAccessIssue
    run([1], lambda stream: stream.map(str.upper))  # arg-type, reportArgumentType


def services(env: LocalEnvironment) -> None:
    env.register_service("memory", Memory, 3)  # call-overload, reportArgumentType
    memory = env.register_service("memory", Memory, "folder")
    env.register_service("also", Memory, "folder", sise=3)  # call-arg, reportCallIssue
    env.register_service("more", Memory, "folder", options={"concurrency": 3})  # call-arg, reportCallIssue
    env.register_service("less", Memory("folder"))  # call-overload, reportArgumentType
    env.register_service("fast", Memory, "folder", options=ServiceOptions(concurency=3))  # call-arg, reportCallIssue
    plain = env.register_service("plain", Plain)
    texts = env.from_batch(["a"])
    texts.map(plain.prise)  # attr-defined, reportAttributeAccessIssue
    env.from_batch([1]).map(plain.price)  # arg-type, reportArgumentType
    texts.map(plain.price).map(lambda price: price + 1)  # arg-type, reportOptionalOperand
    texts.map(memory.recall).map(lambda found: found.upper())  # attr-defined, reportAttributeAccessIssue
    ask = env.serve("ask", lambda requests: requests.map(Question))
    texts.map(lambda text: ask.proces(text))  # attr-defined, reportAttributeAccessIssue
    texts.map(lambda text: ask.process(text).txt)  # union-attr, reportAttributeAccessIssue
    env.serve("none", lambda requests: len(requests))  # arg-type, reportArgumentType
    env.register_command("server", ["server"], redy=Http("/"))  # call-arg, reportCallIssue
    server = env.register_command("server", ["server"])
    print(server.ulr)  # attr-defined, reportAttributeAccessIssue


def jobs(env: LocalEnvironment) -> None:
    env.submit(autostopp=True)  # call-arg, reportCallIssue
    job = env.submit()
    job.begin()  # attr-defined, reportAttributeAccessIssue
    print(job.report.errrors, job.report.service("memory").call)  # attr-defined, reportAttributeAccessIssue
    LocalEnvironment("a", stop_timeout=3.0)  # call-arg, reportCallIssue
    Retry(attempts=3)  # call-arg, reportCallIssue


def results(env: LocalEnvironment) -> None:
    texts = env.from_batch(["a"])
    print(texts.collect()[0].uper())  # attr-defined, reportAttributeAccessIssue
    env.run(progres=True)  # call-arg, reportCallIssue
    print(env.run().reports)  # attr-defined, reportAttributeAccessIssue
    texts.branch(long=lambda text: text.long)  # attr-defined, reportAttributeAccessIssue
    texts.limit("3")  # arg-type, reportArgumentType
    texts.tap(abs)  # arg-type, reportArgumentType
    for text in texts.iterate():
        print(text + 1)  # operator, reportOperatorIssue


def build(stream: DataStream[str]) -> DataStream[str]:
    return stream.map(len)  # arg-type, reportReturnType
