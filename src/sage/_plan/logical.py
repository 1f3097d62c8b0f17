"""The logical graph: the user's pipeline as a value."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field, replace
from enum import StrEnum
from itertools import count
from typing import TYPE_CHECKING, Any, Literal, TypedDict

from sage._arguments import check_count, check_name
from sage.errors import DuplicateNameError, FutureError, GraphError, hint
from sage.failure import FAIL, ErrorPolicy
from sage.functions import BaseFunction
from sage.service import ServiceHandle, ServiceMethod
from sage.state import states_of

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from typing import Unpack

    from sage._handover import JobRunner
    from sage.command import Command
    from sage.service import ServiceOptions
    from sage.state import KeyState


class Kind(StrEnum):
    """The kind of a node."""

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
    STATEFUL_MAP = "stateful_map"
    FUTURE = "future"
    LETTERS = "letters"
    REPLY = "reply"


HOLDING = frozenset({Kind.MAP_ASYNC, Kind.MAP_BATCHES})
"""The kinds that hold records for longer than a step: a task begins with them, so that they never wait for others."""


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
        capacity: how many records may wait for it, or None where nobody said.
    """

    target: Any
    is_class: bool = False
    args: tuple[object, ...] = ()
    kwargs: Mapping[str, object] = field(default_factory=dict)
    capacity: int | None = None

    @property
    def owner(self) -> type:
        """The class of the function."""
        return self.target if self.is_class else type(self.target)

    @property
    def states(self) -> Mapping[str, KeyState]:
        """The states of keys that a function class declares."""
        return states_of(self.owner) if issubclass(self.owner, BaseFunction) else {}

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
        id: its place in the graph; inputs have lower ones, except feedback edges.
        kind: the kind of operator.
        name: its identity in reports and logs; given by the user, or made when the graph is frozen.
        inputs: the nodes it reads from, in the order of its ports.
        function: the user's function, or None without one.
        parallelism: how many tasks run it.
        on_error: the policy if the function raises.
        route: how its own output is distributed; None leaves that to the planner.
        settings: the settings of this kind of node, and the `Place` that the user asked for, as "place".
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
        target: a class, or a callable that returns the object.
        args: the arguments of `target`.
        kwargs: the keyword arguments of `target`.
        options: see `ServiceOptions`.
        handle: the handle through which user code calls it.
        command: the command that it is, or None for one that is built from `target`.
        front: the service that it is a replica of, or "".
        spare: whether it is a replica that is started when another one is recycled.
        requires: names of services it depends on, declared or seen among its arguments.
    """

    name: str
    target: Callable[..., object]
    args: tuple[object, ...]
    kwargs: Mapping[str, object]
    options: ServiceOptions
    handle: ServiceHandle
    command: Command | None = None
    front: str = ""
    spare: bool = False

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
        feedback: pairs of node and future: the node's output enters the future.
        services: the services in the order of their registration.
        is_durable: whether its jobs go on after a restart.
    """

    name: str
    nodes: Mapping[int, Node]
    feedback: tuple[tuple[int, int], ...] = ()
    services: tuple[ServiceSpec, ...] = ()
    is_durable: bool = False


class NodeAttributes(TypedDict, total=False):
    """The attributes of a `Node` that not every kind has."""

    inputs: tuple[int, ...]
    route: Route | None
    settings: Mapping[str, object]


class GraphBuilder:
    """Collects nodes while a user writes a pipeline. Nothing runs here.

    Several threads may write at once: each takes an id and its names by one step that no other thread can divide.

    Attributes:
        environment: whom a stream asks to run the graph.
    """

    def __init__(self, environment: JobRunner) -> None:
        self.environment = environment
        self._nodes: dict[int, tuple[Node, str | None]] = {}
        self._names: dict[str, int] = {}  # those that the user gave
        self._feedback: list[tuple[int, int]] = []
        self._filled: dict[int, int] = {}
        self._ids = count()

    def __len__(self) -> int:
        return len(self._nodes)

    def add(
        self,
        kind: Kind,
        *,
        name: object = None,
        function: FunctionSpec | None = None,
        parallelism: object = None,
        on_error: ErrorPolicy = FAIL,
        **attributes: Unpack[NodeAttributes],
    ) -> int:
        """Add a node and return its id.

        Raises:
            DuplicateNameError: `name` is given and another node has it.
            GraphError: the parallelism is not a positive number, or `name` cannot be one.
        """
        given = None if name is None else check_name("an operator", name)
        label = given or (function.label if function else None) or str(kind)
        tasks = 1 if parallelism is None else check_count(f'operator "{label}" has parallelism', parallelism)
        id_ = next(self._ids)
        node = Node(id_, kind, label, function=function, parallelism=tasks, on_error=on_error, **attributes)
        self._take_name(id_, given)
        self._nodes[id_] = (node, given)
        return id_

    def _take_name(self, id_: int, name: str | None) -> None:
        if name is not None and self._names.setdefault(name, id_) != id_:
            error = DuplicateNameError(f'operator "{name}" is defined twice')
            raise hint(error, "A name is an operator's identity in reports; choose another or leave it out.")

    def remove(self, id_: int) -> None:
        """Take out a node that nothing reads from."""
        del self._nodes[id_]

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
        node, given = self._nodes[id_]
        self._take_name(id_, name)
        if given is not None and given != name:
            del self._names[given]
        self._nodes[id_] = (replace(node, name=name), name)

    def set(self, id_: int, **settings: object) -> None:
        """Add settings to a node."""
        node, name = self._nodes[id_]
        self._nodes[id_] = (replace(node, settings={**node.settings, **settings}), name)

    def spend(self, graph: LogicalGraph) -> None:
        """Remember which sources of a graph that runs read an iterator, which can be read only once."""
        for node in graph.nodes.values():
            target = node.function.target if node.function is not None else None
            if node.kind is Kind.SOURCE and (hasattr(target, "__next__") or hasattr(target, "__anext__")):
                self.set(node.id, spent=True)

    def fill(self, id_: int, future: int) -> None:
        """Add the feedback edge from a node to a future.

        Raises:
            GraphError: the node is not a future, or it is filled already.
        """
        target = self.node(future)
        if target.kind is not Kind.FUTURE:
            error = GraphError(f'operator "{target.name}" is filled, but it is not a future')
            raise hint(error, "Only a stream of env.from_future(name) can be filled.")
        if future in self._filled or self._filled.setdefault(future, id_) != id_:
            raise FutureError(f'future "{target.name}" is filled twice')
        self._feedback.append((id_, future))

    def freeze(self, name: str, services: tuple[ServiceSpec, ...] = ()) -> LogicalGraph:
        """Return the graph as it stands, every node with a name of its own; generated names are stable."""
        written, feedback = dict(sorted(self._nodes.copy().items())), tuple(self._feedback)
        taken = {given for _, given in written.values() if given is not None}
        labels = Counter(node.name for node, given in written.values() if given is None)
        nodes: dict[int, Node] = {}
        numbers: Counter[str] = Counter()
        for id_, (node, given) in written.items():
            if given is not None:
                nodes[id_] = node
                continue
            label = node.name
            while label in taken or (label == node.name and labels[label] > 1):
                numbers[node.name] += 1
                label = f"{node.name}-{numbers[node.name]}"
            taken.add(label)
            nodes[id_] = replace(node, name=label)
        return LogicalGraph(name, nodes, feedback, services)
