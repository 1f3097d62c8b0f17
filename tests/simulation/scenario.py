"""Random jobs as values: from one seed a graph, services, faults, and requests to end."""

from __future__ import annotations

import random
from dataclasses import dataclass, field, replace
from typing import Any, Literal

Policy = Literal["fail", "skip", "letters", "retry fail", "retry skip", "retry letters"]
Form = Literal["plain", "class"]

RETRIES_MAX = 3
SOURCE_FORMS = ("list", "generator", "batch", "stream")
ONE_INPUT = (
    *("map", "map", "filter", "flatmap", "generator", "collect", "process", "keyby", "rebalance", "broadcast"),
    *("map_async", "map_batches"),
)
IN_LOOPS = ("map", "map", "flatmap", "map_async", "map_batches")
SERVED = ("map", "map", "filter", "flatmap", "map_async", "map_batches")
PASSING = frozenset({"union", "rebalance", "broadcast", "letters", "future", "requests", "reply"})
HOLDING = frozenset({"map_async", "map_batches"})
POLICIES: tuple[Policy, ...] = ("fail", "fail", "skip", "letters", "retry fail", "retry skip", "retry letters")
ERRORS = ("ValueError", "ValueError", "ValueError", "SystemExit", "KeyboardInterrupt")


@dataclass(frozen=True, slots=True)
class Node:
    """One operator.

    Attributes:
        name: its name.
        kind: "source", a method of a stream, "generator" or "collect" for kinds of flat maps, "again" for the filter at
            the end of a loop, "future", "letters", or "requests" and "reply" for the ends of a served pipeline.
        inputs: the operators whose streams it takes.
        parallelism: how many tasks run it.
        form: whether its function is a class or a plain callable; for a source, what it reads from.
        policy: what follows when it raises on a record.
        number: how many records a source has; a modulus, or how many records go out for one, for others.
        service: the service or served pipeline that its function calls, or "".
        settings: further keyword arguments of the method.
        fed_by: for a future, the operator that fills it.
        served: the served pipeline that it belongs to, or "".
        pair: for a key of connected streams, the operator that is made with it for the other stream.
    """

    name: str
    kind: str
    inputs: tuple[str, ...] = ()
    parallelism: int = 1
    form: str = "class"
    policy: Policy = "fail"
    number: int = 1
    service: str = ""
    settings: tuple[tuple[str, Any], ...] = ()
    fed_by: str = ""
    served: str = ""
    pair: str = ""


@dataclass(frozen=True, slots=True)
class Service:
    """One service; `requires` are declared, as an option or by a handle; `calls` are found out while it runs."""

    name: str
    hooks: tuple[str, ...]
    requires: tuple[str, ...] = ()
    by_handle: bool = False
    calls: str = ""
    concurrency: int | None = 1
    required: bool = True
    restart: Literal["never", "on_failure"] = "never"


@dataclass(frozen=True, slots=True)
class Fault:
    """What raises: the calls of one place from number `at` on, `times` of them."""

    place: str
    at: int
    times: int
    error: str


@dataclass(frozen=True, slots=True)
class Request:
    """Who asks for an end: the world at a turn of the backend, or a function at the n-th call of a place."""

    way: str
    at: int
    place: str = ""


@dataclass(frozen=True, slots=True)
class Scenario:
    """One job, or two of them where services are kept."""

    seed: int
    nodes: tuple[Node, ...]
    services: tuple[Service, ...] = ()
    faults: tuple[Fault, ...] = ()
    requests: tuple[Request, ...] = ()
    keep: tuple[str, ...] = ()
    jobs: int = 1
    drain_timeout_s: float = 30.0

    def node(self, name: str) -> Node:
        return next(node for node in self.nodes if node.name == name)

    def has(self, name: str) -> bool:
        """Whether an operator has this name."""
        return any(node.name == name for node in self.nodes)

    def service_of(self, name: str) -> str:
        """Return the service that an operator calls; "" if it calls none, or is none."""
        return next((node.service for node in self.nodes if node.name == name), "")

    @property
    def served(self) -> tuple[str, ...]:
        """The names of the served pipelines."""
        return tuple(node.served for node in self.nodes if node.kind == "requests")

    def __str__(self) -> str:
        lines = [f"seed {self.seed}: {self.jobs} job(s), keep {self.keep}, drain_timeout_s={self.drain_timeout_s}"]
        for part in (self.nodes, self.services, self.faults, self.requests):
            lines += [f"  {one}" for one in part]
        return "\n".join(lines)


def draw(seed: int) -> Scenario:
    """Return the scenario of a seed, the same one every time."""
    return Draw(seed).scenario()


@dataclass(slots=True)
class Draw:
    """Makes one scenario."""

    seed: int
    random: random.Random = field(init=False)
    nodes: list[Node] = field(default_factory=list)
    services: list[Service] = field(default_factory=list)
    keyed: set[str] = field(default_factory=set)
    has_broadcast: bool = False
    lonely: set[str] = field(default_factory=set)
    served: list[str] = field(default_factory=list)
    is_endless: bool = False

    def __post_init__(self) -> None:
        self.random = random.Random(f"scenario {self.seed}")

    def chance(self, share: float) -> bool:
        return self.random.random() < share

    def scenario(self) -> Scenario:
        choice = self.random.choice
        for _ in range(choice((0, 0, 1, 1, 2, 3))):
            self.add_service()
        for _ in range(choice((0, 0, 0, 0, 0, 0, 1, 1, 2))):
            self.add_served()
        for number in range(choice((1, 1, 1, 2))):
            size = choice((0, 1, 2, 5, 9, 20))
            form = choice(SOURCE_FORMS)
            parallelism = choice((1, 1, 2)) if form == "list" else 1
            self.nodes.append(Node(f"source{number}", "source", (), parallelism, form, "fail", size))
        for _ in range(choice((0, 1, 2, 3, 4))):
            self.add_something()
        if any("letters" in node.policy for node in self.nodes) or self.chance(0.2):
            self.nodes.append(Node("letters", "letters"))
        self.add_sinks()
        faults = self.faults()
        requests = self.requests()
        names = [service.name for service in self.services]
        keep = tuple(names) if names and self.chance(0.2) else ()
        jobs = 2 if keep and self.chance(0.7) and not (self.is_endless or self.served) else 1
        is_patient = bool(self.served) or not requests or not self.chance(0.1)
        drain_timeout_s = 30.0 if is_patient else choice((0.0, 0.003))
        return Scenario(
            self.seed,
            tuple(self.nodes),
            tuple(self.services),
            faults,
            requests,
            keep,
            jobs,
            drain_timeout_s,
        )

    def add_service(self) -> None:
        choice = self.random.choice
        name = f"service{len(self.services)}"
        hooks = tuple(
            hook for hook in ("setup", "start", "ready", "health", "drain", "stop", "cleanup") if self.chance(0.6)
        )
        others = [service.name for service in self.services if service.name not in self.lonely]
        requires: tuple[str, ...] = ()
        calls = ""
        if others and self.chance(0.4):
            requires = (choice(others),)
            calls = choice(("", requires[0]))
        elif others and self.chance(0.3):
            calls = choice(others)
        restart: Literal["never", "on_failure"] = choice(("never", "never", "on_failure"))
        if restart != "never" and "health" in hooks:
            # A call would wait for its restart, and with it the only thread that there is.
            self.lonely.add(name)
        self.services.append(
            Service(name, hooks, requires, self.chance(0.5), calls, choice((1, 2, None)), self.chance(0.7), restart)
        )
        if self.chance(0.3):
            self.random.shuffle(self.services)

    @property
    def inner(self) -> list[str]:
        """The operators that others may read from."""
        return [node.name for node in self.nodes if not node.served and node.kind != "future"]

    def add_something(self) -> None:
        if self.chance(0.1):
            self.add_loop()
        elif self.chance(0.12) and len(self.inner) > 1:
            self.add_join()
        else:
            self.add_operator()

    def add_served(self) -> None:
        """Add a pipeline that answers; several records of one request only where they cannot overtake each other."""
        name = f"served{len(self.served)}"
        self.nodes.append(Node(f"{name} requests", "requests", served=name))
        kinds = [self.random.choice(SERVED) for _ in range(self.random.choice((1, 1, 2)))]
        for kind in kinds:
            drawn = self.operator(f"{kind}{len(self.nodes)}", kind, (self.nodes[-1].name,))
            policy: Policy = self.random.choice(("fail", "fail", "skip", "retry fail"))
            settings = tuple(one for one in drawn.settings if one[0] not in ("ordered", "timeout_s"))
            parallelism = 1 if "flatmap" in kinds else drawn.parallelism
            self.nodes.append(replace(drawn, policy=policy, served=name, settings=settings, parallelism=parallelism))
        self.nodes.append(Node(f"{name} answers", "reply", (self.nodes[-1].name,), served=name))
        self.served.append(name)

    def add_loop(self) -> None:
        """Add a loop: records go round as often as they say themselves, or for ever."""
        number = len(self.nodes)
        kind = self.random.choice(IN_LOOPS)
        future, body, again = f"future{number}", f"{kind}{number + 2}", f"again{number + 3}"
        self.nodes.append(Node(future, "future", fed_by=again))
        self.nodes.append(Node(f"union{number + 1}", "union", (self.random.choice(self.inner), future)))
        self.nodes.append(self.operator(body, kind, (f"union{number + 1}",)))
        turns = self.random.choice((1, 2, 3))
        if kind not in ("flatmap", "generator") and self.chance(0.1):
            turns, self.is_endless = 0, True
        self.nodes.append(replace(self.operator(again, "again", (body,)), number=turns))

    def add_join(self) -> None:
        """Add a join of two streams, with their keys."""
        inputs = tuple(self.random.sample(self.inner, 2))
        parallelism, modulus = self.random.choice((1, 1, 2, 3)), self.random.choice((1, 2, 3, 5))
        are_connected = not self.has_broadcast and self.chance(0.5)
        names = tuple(f"keyby{len(self.nodes) + place}" for place in range(2))
        for name, other, given in zip(names, (names[1], ""), inputs, strict=True):
            if are_connected:
                pair = other or names[0]
                drawn = Node(name, "keyby", (given,), parallelism, "plain", "fail", modulus, pair=pair)
            else:
                drawn = replace(self.operator(name, "keyby", (given,)), number=modulus)
            self.nodes.append(drawn)
            self.keyed.add(name)
        name = f"join{len(self.nodes)}"
        self.keyed.add(name)
        self.nodes.append(self.operator(name, "join", names))

    def add_operator(self) -> None:
        choice = self.random.choice
        inner = self.inner
        name = f"{len(self.nodes)}"
        if len(inner) > 1 and self.chance(0.25):
            inputs = tuple(self.random.sample(inner, 3 if len(inner) > 2 and self.chance(0.3) else 2))
            kind = "comap" if len(inputs) > 2 else choice(("union", "comap"))
            if all(one in self.keyed for one in inputs) and len(inputs) == 2 and self.chance(0.5):
                kind = "join"
        else:
            unused = [one for one in inner if not any(one in node.inputs for node in self.nodes)]
            inputs = (choice(unused) if unused and self.chance(0.7) else choice(inner),)
            keyed = inputs[0] in self.keyed
            kind = choice(("reduce", "last", "map")) if keyed and self.chance(0.7) else choice(ONE_INPUT)
            if kind == "map_async" and self.has_broadcast:
                kind = "map"
        if kind == "broadcast":
            self.has_broadcast = True
        name = f"{kind}{name}"
        if kind == "keyby" or (kind not in ("rebalance", "broadcast") and all(one in self.keyed for one in inputs)):
            self.keyed.add(name)
        self.nodes.append(self.operator(name, kind, inputs))

    def operator(self, name: str, kind: str, inputs: tuple[str, ...]) -> Node:
        choice = self.random.choice
        if kind in PASSING:
            return Node(name, kind, inputs)
        parallelism = choice((1, 1, 1, 2, 3))
        plain = self.chance(0.4) and kind not in ("collect", "comap", "join", *HOLDING)
        plain = plain and not (parallelism > 1 and self.has_broadcast)
        callable_ = [service.name for service in self.services if service.name not in self.lonely]
        if kind != "map_async":  # nobody goes on with the job while the loop itself waits
            callable_ += self.served * 2
        service = choice(callable_) if callable_ and kind not in ("reduce", "last") and self.chance(0.4) else ""
        form: Form = "plain" if plain or kind in ("reduce", "last") else "class"
        policy = choice(POLICIES)
        number = choice((1, 2, 3, 5))
        return Node(name, kind, inputs, parallelism, form, policy, number, service, self.settings(kind))

    def settings(self, kind: str) -> tuple[tuple[str, Any], ...]:
        choice = self.random.choice
        if kind == "map_async":
            timeout_s = choice((None, None, 0.008))
            return (("concurrency", choice((1, 2, 3, 16))), ("ordered", self.chance(0.6)), ("timeout_s", timeout_s))
        if kind == "map_batches":
            return (("max_records", choice((1, 2, 3, 64))), ("max_wait_s", choice((0.0, 0.0, 0.004, 0.05))))
        return ()

    def add_sinks(self) -> None:
        for node in tuple(self.nodes):
            used = any(node.name in other.inputs for other in self.nodes)
            if not node.served and (not used or self.chance(0.15)):
                drawn = self.operator(f"sink{len(self.nodes)}", "sink", (node.name,))
                if node.kind == "letters" and "letters" in drawn.policy:
                    drawn = Node(drawn.name, "sink", drawn.inputs, drawn.parallelism, drawn.form, "skip")
                self.nodes.append(drawn)
        if any("letters" in node.policy for node in self.nodes) and all(node.kind != "letters" for node in self.nodes):
            self.nodes.append(Node("letters", "letters"))
            self.nodes.append(Node(f"sink{len(self.nodes)}", "sink", ("letters",)))

    def places(self) -> list[str]:
        found = []
        for node in self.nodes:
            if node.kind in PASSING:
                continue
            found += [f"{node.name}.call"] * 4 if node.form != "list" else []
            if node.form == "class":
                found += [f"{node.name}.{hook}" for hook in ("build", "open", "close")]
            if node.form == "class" and node.kind == "process":
                found.append(f"{node.name}.finish")
        for service in self.services:
            found += [f"{service.name}.{hook}" for hook in ("build", "defer", *service.hooks)]
            found += [f"{service.name}.call"] * 2 if service.name not in self.lonely else []
        return found

    def faults(self) -> tuple[Fault, ...]:
        choice = self.random.choice
        count = choice((0, 0, 1, 1, 2, 3))
        return tuple(
            Fault(place, choice((1, 1, 2, 3, 7)), choice((1, 1, 3, 4)), choice(ERRORS))
            for place in sorted({choice(self.places()) for _ in range(count)})
        )

    def requests(self) -> tuple[Request, ...]:
        choice = self.random.choice
        made = []
        for number in range(max(choice((0, 0, 0, 1, 1, 2)), self.is_endless)):
            way = choice(("DRAIN", "DRAIN", "DRAIN", "CANCEL", "CANCEL", "CANCEL" if self.served else "KILL"))
            if self.chance(0.3) and not (number == 0 and self.is_endless):
                made.append(Request(way, choice((1, 2, 5)), choice(self.places())))
            else:
                made.append(Request(way, 1 + int(self.random.expovariate(1 / 30.0))))
        return tuple(made)
