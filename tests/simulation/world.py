"""The functions and services of a simulated job: they do and fail what it says, and note it."""

from __future__ import annotations

import asyncio
import builtins
import re
import zlib
from collections import Counter
from contextvars import ContextVar
from dataclasses import dataclass, field
from functools import cache
from typing import TYPE_CHECKING, Any

from sage import (
    BaseCoMapFunction,
    BaseJoinFunction,
    BaseService,
    BatchFunction,
    FilterFunction,
    FlatMapFunction,
    KeyByFunction,
    MapFunction,
    ProcessFunction,
    SinkFunction,
    SourceFunction,
    StopSignal,
)
from sage._runtime.states import StopMode

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from simulation.scenario import Node, Scenario, Service

    from sage._runtime.job import Job


PAUSES_S = (0.0, 0.0, 0.0005, 0.003, 0.02)
"""How long coroutines wait; the last one is longer than their time-out, where they have one."""


@dataclass(slots=True)
class Entry:
    """One call of anything.

    Attributes:
        name: the operator or service.
        hook: "call", or the name of a hook.
        instance: which instance of it, from 1; 0 for a plain callable.
        value: the record.
        port: the input it came from.
        job: in which job of the scenario, from 0.
        outs: what came of it, for functions.
        error: what it raised, or None.
        within: the calls of services that were running when it began.
        at: its place in the log.
        record: for coroutines, which record it is for, the same number at each attempt.
        pause_s: for coroutines, how long it waits.
        ended_at: for coroutines, how long the log was when it ended.
        end: for coroutines, how many had ended then.
        key: for joins, the key.
        asked: what a served pipeline was asked, or None.
        answer: what it answered.
        asking: what it raised.
    """

    name: str
    hook: str
    instance: int
    value: Any = None
    port: int = 0
    job: int = 0
    outs: list[Any] = field(default_factory=list)
    error: BaseException | None = None
    within: tuple[tuple[str, int], ...] = ()
    at: int = 0
    record: int = 0
    pause_s: float = 0.0
    ended_at: int | None = None
    end: int = 0
    key: Any = None
    asked: str | None = None
    answer: Any = None
    asking: BaseException | None = None

    def __str__(self) -> str:
        value = "" if self.value is None else f" {self.value}"
        raised = f" raised {self.error!r}" if self.error is not None else ""
        return f"[{self.job}] {self.name} #{self.instance} {self.hook}{value} -> {self.outs}{raised}"


def digest(value: str) -> int:
    return zlib.crc32(value.encode())


def source_values(node: Node) -> list[str]:
    return [f"{node.name}.{number}" for number in range(node.number)]


def combine(so_far: str, value: str) -> str:
    """Combine records whatever their order."""
    return "+".join(sorted([*so_far.split("+"), *value.split("+")]))


def outs_of(node: Node, value: str, port: int = 0) -> list[Any]:
    """Return what goes on for one record, as plain Python has it."""
    match node.kind:
        case "filter":
            return [value] if digest(value) % (node.number + 1) else []
        case "again":
            return [value] if goes_round_again(node, value) else []
        case "flatmap" | "generator" | "collect" | "process":
            return [f"{value}>{node.name}.{number}" for number in range(digest(value) % (node.number + 1))]
        case "comap":
            return [f"{value}>{node.name}:{port}"]
        case "keyby":
            return [value]
        case "sink":
            return []
    return [f"{value}>{node.name}"]


def goes_round_again(node: Node, value: str) -> bool:
    """Return whether a record has not gone round its loop as often as it says."""
    rounds = len(re.findall(rf">{node.inputs[0]}\b", value))
    return node.number == 0 or rounds <= digest(value.partition(">")[0]) % (node.number + 1)


def matched(node: Node, first: str, second: str) -> str:
    """Return what a join makes of two records."""
    return f"({first}&{second})>{node.name}"


def pause_s(value: str, attempt: int) -> float:
    """Return how long a coroutine waits at an attempt."""
    return PAUSES_S[digest(f"{value} {attempt}") % len(PAUSES_S)]


class World:
    """Everything that the functions and services of one scenario share."""

    def __init__(self, scenario: Scenario) -> None:
        self.log: list[Entry] = []
        self.job_number = 0
        self.job: Job | None = None
        self.running: list[tuple[str, int]] = []
        self.served = frozenset(scenario.served)
        self.coroutine_count = 0
        self.ended_count = 0
        self._counts: Counter[str] = Counter()
        self._instances: Counter[str] = Counter()
        self._faults = {fault.place: fault for fault in scenario.faults}
        self._requests = {request.place: request for request in scenario.requests if request.place}

    def instance(self, name: str) -> int:
        self._instances[name] += 1
        return self._instances[name]

    def enter(self, name: str, hook: str, instance: int, value: Any = None, port: int = 0) -> Entry:
        """Note a call, and raise what is to be raised there."""
        entry = Entry(name, hook, instance, value, port, self.job_number, within=tuple(self.running), at=len(self.log))
        self.log.append(entry)
        place = f"{name}.{hook}"
        self._counts[place] += 1
        count = self._counts[place]
        request = self._requests.get(place)
        if request is not None and count == request.at and self.job is not None:
            self.job._request(StopMode[request.way], f"asked for by {place}")
        fault = self._faults.get(place)
        if fault is not None and fault.at <= count < fault.at + fault.times:
            kind: type[BaseException] = getattr(builtins, fault.error)
            entry.error = kind(f"{place} at {count}")
            raise entry.error
        return entry

    def call(self, node: Node, entry: Entry, service: Any) -> None:
        """Call the service of a node."""
        value = "+".join(entry.value) if isinstance(entry.value, tuple) else entry.value
        if node.service in self.served:
            entry.asked = value
        try:
            answer = service.process(value)
        except BaseException as error:
            entry.error = error
            if entry.asked is not None:
                entry.asking = error
            raise
        if entry.asked is not None:
            entry.answer = answer


class Function:
    """What all functions of a graph do; the kinds differ in what the engine calls."""

    ctx: Any

    def __init__(self, world: World, node: Node) -> None:
        self.world, self.node = world, node
        self.number = world.instance(node.name)
        self.produced = 0
        world.enter(node.name, "build", self.number)

    def open(self) -> None:
        self.world.enter(self.node.name, "open", self.number)

    def close(self) -> None:
        self.world.enter(self.node.name, "close", self.number)

    def taken(self, value: str, port: int = 0) -> Entry:
        entry = self.world.enter(self.node.name, "call", self.number, value, port)
        if self.node.service:
            self.world.call(self.node, entry, self.ctx.service(self.node.service))
        return entry

    def worked(self, value: str, port: int = 0) -> list[Any]:
        entry = self.taken(value, port)
        entry.outs = outs_of(self.node, value, port)
        return entry.outs

    def next_value(self) -> Any:
        entry = self.world.enter(self.node.name, "call", self.number)
        if self.produced == self.node.number:
            return None
        entry.outs = [f"{self.node.name}.{self.produced}"]
        self.produced += 1
        return entry.outs[0]


class Batch(Function, BatchFunction):
    def execute(self) -> Any:
        return self.next_value()


class Stream(Function, SourceFunction):
    """Has nothing at every third call, and a signal at the end."""

    calls = 0

    def execute(self) -> Any:
        self.calls += 1
        if self.calls % 3 == 0:
            return None
        value = self.next_value()
        return StopSignal() if value is None else value


class Map(Function, MapFunction):
    def execute(self, data: str) -> Any:
        return self.worked(data)[0]


class Filter(Function, FilterFunction):
    def execute(self, data: str) -> bool:
        return bool(self.worked(data))


class FlatMap(Function, FlatMapFunction):
    def execute(self, data: str) -> Any:
        return self.worked(data)


class Collect(Function, FlatMapFunction):
    def execute(self, data: str) -> Any:
        values = self.worked(data)
        for value in values[1:]:
            self.collect(value)
        values.append(values.pop(0)) if values else None
        return values[-1:]


class Generator(Function, FlatMapFunction):
    def execute(self, data: str) -> Any:
        return generated(self.node, self.taken(data))


class Process(Function, ProcessFunction):
    def execute(self, data: str) -> Any:
        return self.worked(data)

    def finish(self) -> Any:
        entry = self.world.enter(self.node.name, "finish", self.number)
        entry.outs = [f"{self.node.name} end"]
        return entry.outs


class KeyBy(Function, KeyByFunction):
    def execute(self, data: str) -> Any:
        self.worked(data)
        return key_of(self.node, data)


class CoMap(Function, BaseCoMapFunction):
    def map0(self, data: str) -> Any:
        return self.worked(data, 0)[0]

    def map1(self, data: str) -> Any:
        return self.worked(data, 1)[0]

    def map2(self, data: str) -> Any:
        return self.worked(data, 2)[0]


class Join(Function, BaseJoinFunction):
    """Matches each record with those of its key that came by the other input before it."""

    def __init__(self, world: World, node: Node) -> None:
        super().__init__(world, node)
        self.seen: tuple[dict[Any, list[str]], dict[Any, list[str]]] = ({}, {})

    def execute(self, payload: str, key: Any, tag: int) -> list[Any]:
        entry = self.taken(payload, tag)
        entry.key = key
        self.seen[tag].setdefault(key, []).append(payload)
        others = self.seen[1 - tag].get(key, [])
        entry.outs = [matched(self.node, *((other, payload) if tag else (payload, other))) for other in others]
        return entry.outs


class Batches(Function, MapFunction):
    def execute(self, data: list[str]) -> Any:
        entry = self.taken(tuple(data))  # type: ignore[arg-type]
        entry.outs = [out for value in data for out in outs_of(self.node, value)]
        return entry.outs


class Coroutines(Function, MapFunction):
    """Waits before it answers, at each attempt as long as that says."""

    async def execute(self, data: str) -> Any:
        world, (number, attempt) = self.world, _attempt.get()
        if not attempt:
            world.coroutine_count = number = world.coroutine_count + 1
        _attempt.set((number, attempt + 1))
        entry: Entry | None = None
        try:
            entry = self.taken(data)
            entry.pause_s = pause_s(data, attempt)
            if entry.pause_s:
                await asyncio.sleep(entry.pause_s)
            entry.outs = outs_of(self.node, data)
            return entry.outs[0]
        except BaseException as error:
            entry = entry or next(
                one for one in reversed(world.log) if one.error is error and one.name == self.node.name
            )
            entry.error = error
            raise
        finally:
            assert entry is not None
            entry.record, entry.ended_at = number, len(world.log)
            world.ended_count = entry.end = world.ended_count + 1


_attempt: ContextVar[tuple[int, int]] = ContextVar("attempt", default=(0, 0))
"""The number of the record that the current coroutine is for, and how often it was tried before."""


class Sink(Function, SinkFunction):
    def execute(self, data: Any) -> None:
        self.worked(getattr(data, "value", data))


CLASSES: dict[str, Any] = {
    "batch": Batch,
    "stream": Stream,
    "map": Map,
    "filter": Filter,
    "again": Filter,
    "join": Join,
    "map_async": Coroutines,
    "map_batches": Batches,
    "flatmap": FlatMap,
    "collect": Collect,
    "generator": Generator,
    "process": Process,
    "keyby": KeyBy,
    "comap": CoMap,
    "sink": Sink,
}


def key_of(node: Node, value: str) -> int:
    return digest(value) % node.number


def generated(node: Node, entry: Entry) -> Iterator[Any]:
    """Yield the records one by one, and note each that was asked for."""
    for value in outs_of(node, entry.value):
        entry.outs.append(value)
        yield value


def plain(world: World, node: Node, handles: dict[str, Any]) -> Callable[..., Any]:
    """Return a callable without a life for a node."""

    def taken(value: Any) -> Entry:
        entry = world.enter(node.name, "call", 0, value)
        if node.service:
            world.call(node, entry, handles[node.service])
        return entry

    def worked(data: Any) -> Any:
        value = getattr(data, "value", data)
        entry = taken(value)
        if node.kind == "generator":
            return generated(node, entry)
        entry.outs = outs_of(node, value)
        if node.kind in ("filter", "again"):
            return bool(entry.outs)
        if node.kind == "keyby":
            return key_of(node, value)
        return entry.outs if node.kind in ("flatmap", "process") else (entry.outs or [None])[0]

    def combined(so_far: str, value: str) -> str:
        entry = world.enter(node.name, "call", 0, value)
        together = combine(so_far, value)
        entry.outs = [together]
        return together

    def values() -> Iterator[Any]:
        for value in source_values(node):
            entry = world.enter(node.name, "call", 0)
            entry.outs = [value]
            yield value

    return values if node.kind == "source" else combined if node.kind in ("reduce", "last") else worked


class Simulated(BaseService):
    """Notes its hooks and calls; the hooks themselves are added by `service_class`."""

    def __init__(self, world: World, service: Service, *handles: Any) -> None:
        self.world, self.spec = world, service
        self.number = world.instance(service.name)
        self.ctx.defer(self.deferred)
        world.enter(service.name, "build", self.number)

    def note(self, hook: str) -> None:
        self.world.enter(self.spec.name, hook, self.number)

    def deferred(self) -> None:
        self.note("defer")

    def process(self, value: Any) -> Any:
        me = (self.spec.name, self.number)
        entry = self.world.enter(*me[:1], "call", self.number, value)
        self.world.running.append(me)
        try:
            if self.spec.calls:
                self.service(self.spec.calls).process(value)
        except BaseException as error:
            entry.error = error
            raise
        finally:
            self.world.running.pop()
        return value


@cache
def service_class(hooks: tuple[str, ...]) -> type[Simulated]:
    """Return a service class that has these hooks."""

    def noted(hook: str) -> Callable[[Simulated], Any]:
        def run(self: Simulated) -> bool:
            self.note(hook)
            return True

        return run

    return type("Service", (Simulated,), {hook: noted(hook) for hook in hooks})
