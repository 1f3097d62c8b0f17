"""The logical graph: what the user wrote, as a value."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field, replace
from enum import StrEnum
from typing import TYPE_CHECKING, Any, Literal

from sage._arguments import check_count, check_name
from sage.errors import DuplicateNameError, GraphError, hint
from sage.failure import FAIL, ErrorPolicy
from sage.functions import BaseFunction
from sage.service import ServiceHandle, ServiceMethod

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from sage.command import Command
    from sage.service import ServiceOptions


class Kind(StrEnum):
    """What a node does with records."""

    SOURCE = "source"
    MAP = "map"
    MAP_ASYNC = "map_async"
    MAP_BATCHES = "map_batches"
    FILTER = "filter"
    FLATMAP = "flatmap"
    SINK = "sink"
    KEYBY = "keyby"
    UNION = "union"
    COMAP = "comap"
    JOIN = "join"
    PROCESS = "process"
    REDUCE = "reduce"
    FUTURE = "future"
    LETTERS = "letters"
    REPLY = "reply"


HOLDING = frozenset({Kind.MAP_ASYNC, Kind.MAP_BATCHES})
"""What holds records for longer than a step, so that a task begins with it: nothing before it may keep it waiting."""


class Route(StrEnum):
    """How the records of an edge find their task among parallel ones."""

    FORWARD = "forward"
    HASH = "hash"
    BROADCAST = "broadcast"
    ROUND_ROBIN = "round_robin"


@dataclass(frozen=True, slots=True)
class FunctionSpec:
    """A user's function as it was given.

    Attributes:
        target: a function class, an instance of one, a callable, or, for sources, an iterable or a `Source`.
        is_class: whether each task builds an instance of its own from the arguments.
        args: the constructor's arguments.
        kwargs: the constructor's keyword arguments.
    """

    target: Any
    is_class: bool = False
    args: tuple[Any, ...] = ()
    kwargs: Mapping[str, Any] = field(default_factory=dict)

    @property
    def label(self) -> str | None:
        """The name that a person would give the function, or None for a lambda."""
        target = self.target
        if isinstance(target, BaseFunction):
            return type(target).__name__
        name: str | None = getattr(target, "__name__", None)
        return None if name is None or name.startswith("<") else name


@dataclass(frozen=True, slots=True)
class Place:
    """Where the tasks of an operator run, when a job has more than one process.

    Attributes:
        at: "driver" for the process that submits the job, "cluster" for any other.
        num_cpus: processors that each task reserves; 0 reserves nothing.
        num_gpus: GPUs that each task reserves and sees.
        resources: other resources of the cluster that each task reserves, by name.
    """

    at: Literal["cluster", "driver"] = "cluster"
    num_cpus: float = 0.0
    num_gpus: float = 0.0
    resources: tuple[tuple[str, float], ...] = ()

    @property
    def reserves(self) -> bool:
        """Whether each task has a process to itself, which reserves something."""
        return bool(self.num_cpus or self.num_gpus or self.resources)


ANYWHERE = Place()


@dataclass(frozen=True, slots=True)
class Node:
    """One operator of the logical graph.

    Attributes:
        id: its place in the graph; inputs have lower ones, but for feedback edges.
        kind: what it does.
        name: its identity in reports and logs; given by the user, or made when the graph is frozen.
        inputs: the nodes it reads from, in the order of its ports.
        function: the user's function, or None where there is none.
        parallelism: how many tasks run it.
        on_error: what follows when the function raises.
        route: how its own output is distributed; None leaves that to the planner.
        settings: what only this kind of node has, and the `Place` that the user asked for, as "place".
        place: where it runs; set for a job that has more than one process.
    """

    id: int
    kind: Kind
    name: str
    inputs: tuple[int, ...] = ()
    function: FunctionSpec | None = None
    parallelism: int = 1
    on_error: ErrorPolicy = FAIL
    route: Route | None = None
    settings: Mapping[str, Any] = field(default_factory=dict)
    place: Place = ANYWHERE


@dataclass(frozen=True, slots=True)
class ServiceSpec:
    """A registered service: how to build it, and its options.

    Attributes:
        name: its name.
        target: a class, or a callable that returns the object.
        args: the arguments of `target`.
        kwargs: the keyword arguments of `target`.
        options: see `ServiceOptions`.
        handle: what user code calls it through.
        command: the command that it is, or None for one that is built from `target`.
        requires: names of services it depends on, declared or seen among its arguments.
    """

    name: str
    target: Callable[..., Any]
    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]
    options: ServiceOptions
    handle: ServiceHandle[Any]
    command: Command | None = None

    @property
    def requires(self) -> tuple[str, ...]:
        """The services this one depends on."""
        seen = [
            argument.handle if isinstance(argument, ServiceMethod) else argument
            for argument in (*self.args, *self.kwargs.values())
            if isinstance(argument, ServiceHandle | ServiceMethod)
        ]
        return tuple(dict.fromkeys([*self.options.depends_on, *(handle._name for handle in seen)]))


@dataclass(frozen=True, slots=True)
class LogicalGraph:
    """Everything that was declared in an environment, as one value.

    Attributes:
        name: the environment's name.
        nodes: the operators by id; none at all in an empty graph.
        feedback: pairs of node and future: what leaves the node enters the future.
        services: the services in the order of their registration.
    """

    name: str
    nodes: Mapping[int, Node]
    feedback: tuple[tuple[int, int], ...] = ()
    services: tuple[ServiceSpec, ...] = ()


class GraphBuilder:
    """Collects nodes while a user writes a pipeline. Nothing runs here."""

    def __init__(self) -> None:
        self._nodes: dict[int, tuple[Node, str | None]] = {}
        self._feedback: list[tuple[int, int]] = []

    def __len__(self) -> int:
        return len(self._nodes)

    def add(self, kind: Kind, *, name: str | None = None, **attributes: Any) -> int:
        """Add a node and return its id.

        Raises:
            DuplicateNameError: `name` is given and another node has it.
            GraphError: the parallelism is not a positive number, or `name` cannot be one.
        """
        parallelism = attributes.get("parallelism", 1)
        function: FunctionSpec | None = attributes.get("function")
        if name is not None:
            check_name("an operator", name)
        label = name or (function.label if function else None) or str(kind)
        check_count(f'operator "{label}" has parallelism', parallelism)
        if name is not None and any(name == given for _, given in self._nodes.values()):
            error = DuplicateNameError(f'operator "{name}" is defined twice')
            raise hint(error, "A name is an operator's identity in reports; choose another or leave it out.")
        id_ = len(self._nodes)
        self._nodes[id_] = (Node(id_, kind, label, **attributes), name)
        return id_

    def node(self, id_: int) -> Node:
        """Return a node as it stands."""
        return self._nodes[id_][0]

    def rename(self, id_: int, name: str) -> None:
        """Give a node a name of the user's choice.

        Raises:
            DuplicateNameError: another node was given it.
            GraphError: it cannot be a name.
        """
        check_name("an operator", name)
        if any(name == given for other, (_, given) in self._nodes.items() if other != id_):
            error = DuplicateNameError(f'operator "{name}" is defined twice')
            raise hint(error, "A name is an operator's identity in reports; choose another or leave it out.")
        self._nodes[id_] = (replace(self._nodes[id_][0], name=name), name)

    def set(self, id_: int, **settings: Any) -> None:
        """Add settings to a node."""
        node, name = self._nodes[id_]
        self._nodes[id_] = (replace(node, settings={**node.settings, **settings}), name)

    def fill(self, id_: int, future: int) -> None:
        """Add the feedback edge from a node to a future.

        Raises:
            GraphError: the node is no future, or it is filled already.
        """
        target = self.node(future)
        if target.kind is not Kind.FUTURE:
            error = GraphError(f'operator "{target.name}" is filled, but it is no future')
            raise hint(error, "Only a stream of env.from_future(name) can be filled.")
        if any(future == filled for _, filled in self._feedback):
            raise GraphError(f'future "{target.name}" is filled twice')
        self._feedback.append((id_, future))

    def freeze(self, name: str, services: tuple[ServiceSpec, ...] = ()) -> LogicalGraph:
        """Return the graph as it stands, every node with a name of its own; generated names are stable."""
        taken = {given for _, given in self._nodes.values() if given is not None}
        labels = Counter(node.name for node, given in self._nodes.values() if given is None)
        nodes: dict[int, Node] = {}
        numbers: Counter[str] = Counter()
        for id_, (node, given) in self._nodes.items():
            if given is not None:
                nodes[id_] = node
                continue
            label = node.name
            while label in taken or (label == node.name and labels[label] > 1):
                numbers[node.name] += 1
                label = f"{node.name}-{numbers[node.name]}"
            taken.add(label)
            nodes[id_] = replace(node, name=label)
        return LogicalGraph(name, nodes, tuple(self._feedback), services)
