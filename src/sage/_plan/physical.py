"""The physical plan: which operators run together in one task, and how records travel between tasks."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from sage._plan.logical import Kind, Node, Route

if TYPE_CHECKING:
    from collections.abc import Mapping

    from sage._plan.logical import Place


@dataclass(frozen=True, slots=True)
class Edge:
    """Records of one node on their way to another.

    Attributes:
        source: the node that emits.
        target: the node that takes in.
        port: which input of the target.
        route: how records find their task.
        feedback: whether the edge closes a loop.
        letters: whether it carries dead letters instead of records.
    """

    source: int
    target: int
    port: int = 0
    route: Route = Route.FORWARD
    feedback: bool = False
    letters: bool = False

    def on(self, route: Route) -> Edge:
        """Return the edge with a route; there are as many as operators, and `replace` takes ten times as long."""
        return Edge(self.source, self.target, self.port, route, self.feedback, self.letters)


@dataclass(frozen=True, slots=True)
class Chain:
    """Operators that run in one task, one after the other, without a channel between them."""

    nodes: tuple[Node, ...]

    @property
    def name(self) -> str:
        """The names of the operators, in order."""
        return " -> ".join(node.name for node in self.nodes)

    @property
    def parallelism(self) -> int:
        """How many tasks run the chain."""
        return self.nodes[0].parallelism

    @property
    def head(self) -> int:
        """The id of the first node."""
        return self.nodes[0].id

    @property
    def place(self) -> Place:
        """Where its tasks run."""
        return self.nodes[0].place

    @property
    def is_source(self) -> bool:
        """Whether records enter the job here."""
        return self.nodes[0].kind is Kind.SOURCE

    def outline(self) -> Chain:
        """Return the chain without the users' functions and data."""
        return Chain(tuple(replace(node, function=None, settings={}) for node in self.nodes))


@dataclass(frozen=True, slots=True)
class PhysicalPlan:
    """The input of a backend.

    Attributes:
        name: the name of the environment.
        chains: the chains, sources before their consumers.
        edges: every edge, also those inside a chain.
        loops: the nodes of each feedback loop.
        serving: the nodes that only answer requests; they end when everything else has ended.
    """

    name: str
    chains: tuple[Chain, ...]
    edges: tuple[Edge, ...]
    loops: tuple[frozenset[int], ...] = ()
    serving: frozenset[int] = frozenset()

    @property
    def heads(self) -> Mapping[int, Chain]:
        """The chains by the id of their first node."""
        return {chain.nodes[0].id: chain for chain in self.chains}

    @property
    def between(self) -> tuple[Edge, ...]:
        """The edges that lead from one chain to another, through channels."""
        heads = self.heads
        return tuple(edge for edge in self.edges if edge.target in heads)

    def outline(self) -> PhysicalPlan:
        """Return the plan without the users' functions and data, which a job that has ended must not keep."""
        return replace(self, chains=tuple(chain.outline() for chain in self.chains))

    def text(self) -> str:
        """Return the plan as indented text."""
        lines = [f"physical plan of {self.name}"]
        owner = {node.id: number for number, chain in enumerate(self.chains) for node in chain.nodes}
        names = {node.id: node.name for chain in self.chains for node in chain.nodes}
        leading: dict[int, list[Edge]] = {}
        for edge in self.between:
            leading.setdefault(owner[edge.source], []).append(edge)
        for number, chain in enumerate(self.chains):
            tasks = f"{chain.parallelism} task" + ("s" if chain.parallelism > 1 else "")
            lines.append(f"  chain {number}: {chain.name}  ({tasks})")
            for edge in leading.get(number, ()):
                what = "dead letters of " if edge.letters else ""
                loop = ", feedback" if edge.feedback else ""
                port = f" input {edge.port}" if edge.port else ""
                target = owner[edge.target]
                lines.append(f"    {what}{names[edge.source]} -> chain {target}{port}  ({edge.route}{loop})")
        return "\n".join(lines)

    def mermaid(self) -> str:
        """Return the plan as a Mermaid flowchart: a box for each chain, a label for each channel."""
        lines = ["flowchart LR"]
        for number, chain in enumerate(self.chains):
            lines.append(f'  subgraph c{number}["{chain.parallelism} x"]')
            for node in chain.nodes:
                lines.append(f'    n{node.id}["{quoted(node.name)}"]')
            lines.append("  end")
        heads = self.heads
        for edge in self.edges:
            arrow = "-.->" if edge.feedback or edge.letters else "-->"
            label = f"|{'dead letters' if edge.letters else edge.route}|" if edge.target in heads else ""
            lines.append(f"  n{edge.source} {arrow}{label} n{edge.target}")
        return "\n".join(lines)


def quoted(text: str) -> str:
    """Return a text as it stands in a label of Mermaid."""
    return text.replace("#", "#35;").replace('"', "#quot;")
