"""The rules of planning: functions from plan to plan, and the facts about a graph that they need."""

from __future__ import annotations

from collections import Counter, deque
from dataclasses import replace
from typing import TYPE_CHECKING

from sage._plan.logical import HOLDING, Kind, LogicalGraph, Node, Route
from sage._plan.physical import Chain, Edge, PhysicalPlan

if TYPE_CHECKING:
    from collections.abc import Iterable


def edges_of(graph: LogicalGraph) -> tuple[Edge, ...]:
    """Return all edges of a graph, without routes: inputs, dead letters and feedback."""
    edges = []
    for node in graph.nodes.values():
        edges += [Edge(source, node.id, port) for port, source in enumerate(node.inputs)]
        if node.on_error.letters is not None:
            edges.append(Edge(node.id, node.on_error.letters, letters=True))
    edges += [Edge(source, future, feedback=True) for source, future in graph.feedback]
    return tuple(edges)


Ways = dict[int, list[int]]
"""Where one step leads from each node."""


def ways_of(edges: Iterable[Edge], *, forward: bool = True, backward: bool = False) -> Ways:
    """Return where edges lead from each node, along them, against them, or both."""
    ways: Ways = {}
    for edge in edges:
        if forward:
            ways.setdefault(edge.source, []).append(edge.target)
        if backward:
            ways.setdefault(edge.target, []).append(edge.source)
    return ways


def reach(start: int, ways: Ways) -> frozenset[int]:
    """Return the nodes that can be reached from `start`, itself included."""
    found = {start}
    todo = [start]
    while todo:
        for far in ways.get(todo.pop(), ()):
            if far not in found:
                found.add(far)
                todo.append(far)
    return frozenset(found)


def loops_of(edges: Iterable[Edge]) -> tuple[frozenset[int], ...]:
    """Return the nodes of each feedback loop; loops that share a node are one."""
    edges = tuple(edges)
    loops: list[frozenset[int]] = []
    onward, back = ways_of(edges), ways_of(edges, forward=False, backward=True)
    for edge in edges:
        if edge.feedback:
            loop = reach(edge.target, onward) & reach(edge.source, back)
            for other in [other for other in loops if other & loop]:
                loops.remove(other)
                loop |= other
            loops.append(loop)
    return tuple(loops)


def ordered(graph: LogicalGraph, edges: Iterable[Edge]) -> list[Node] | None:
    """Return the nodes, each after those it reads from but for feedback, or None if dead letters close a circle."""
    waiting = {node.id: 0 for node in graph.nodes.values()}
    forward = [edge for edge in edges if not edge.feedback]
    for edge in forward:
        waiting[edge.target] += 1
    ways = ways_of(forward)
    order: list[Node] = []
    ready = deque(id_ for id_, count in waiting.items() if count == 0)
    while ready:
        here = ready.popleft()
        order.append(graph.nodes[here])
        for target in ways.get(here, ()):
            waiting[target] -= 1
            if waiting[target] == 0:
                ready.append(target)
    return order if len(order) == len(graph.nodes) else None


def serving_nodes(graph: LogicalGraph, edges: Iterable[Edge]) -> frozenset[int]:
    """Return the nodes that only answer requests: everything they are joined with starts at request sources."""
    ways = ways_of(edges, backward=True)
    serving: set[int] = set()
    seen: set[int] = set()
    for node in graph.nodes.values():
        if node.settings.get("bridge") is not None and node.id not in seen:
            island = reach(node.id, ways)
            seen |= island
            sources = [graph.nodes[id_] for id_ in island if graph.nodes[id_].kind is Kind.SOURCE]
            if all(source.settings.get("bridge") is not None for source in sources):
                serving |= island
    return frozenset(serving)


def keyed_nodes(order: Iterable[Node]) -> frozenset[int]:
    """Return the nodes whose output is partitioned by key."""
    keyed: set[int] = set()
    for node in order:
        if node.kind is Kind.KEYBY:
            if node.route is Route.HASH:
                keyed.add(node.id)
        elif node.inputs and node.route is None and all(id_ in keyed for id_ in node.inputs):
            keyed.add(node.id)
    return frozenset(keyed)


def lower(graph: LogicalGraph) -> PhysicalPlan:
    """Return the plan that runs each node in tasks of its own."""
    edges = edges_of(graph)
    order = ordered(graph, edges) or []
    chains = tuple(Chain((node,)) for node in order)
    return PhysicalPlan(graph.name, chains, edges, loops_of(edges), serving_nodes(graph, edges))


def choose_routes(graph: LogicalGraph, plan: PhysicalPlan) -> PhysicalPlan:
    """Decide for each edge how records find their task among the parallel ones of the target."""
    keyed = keyed_nodes([node for chain in plan.chains for node in chain.nodes])

    def route(edge: Edge) -> Route:
        source, target = graph.nodes[edge.source], graph.nodes[edge.target]
        if target.parallelism == 1:
            return Route.FORWARD
        if edge.letters:
            return Route.ROUND_ROBIN
        if source.route is not None:
            return source.route
        if source.parallelism == target.parallelism:
            # A keyed stream is partitioned already, unless it has just got its keys: then the node has a route.
            return Route.FORWARD
        return Route.HASH if edge.source in keyed else Route.ROUND_ROBIN

    return replace(plan, edges=tuple(edge.on(route(edge)) for edge in plan.edges))


def fuse(graph: LogicalGraph, plan: PhysicalPlan) -> PhysicalPlan:
    """Put neighbours into one chain: a forward edge, equal parallelism, one place, no other edge at its ends.

    An operator that holds records begins a chain, and so does one whose queue the user bounds.
    """
    chains = {chain.head: list(chain.nodes) for chain in plan.chains}
    head = {id_: id_ for id_ in graph.nodes}
    outputs = Counter(edge.source for edge in plan.edges if not edge.letters)
    inputs = Counter(edge.target for edge in plan.edges)
    for edge in sorted(plan.edges, key=lambda edge: edge.target):
        alone = not edge.letters and outputs[edge.source] == inputs[edge.target] == 1
        source, target = graph.nodes[edge.source], graph.nodes[edge.target]
        same = source.parallelism == target.parallelism and source.place == target.place
        plain = edge.route is Route.FORWARD and not edge.feedback and target.kind not in HOLDING
        if alone and plain and same and not target.settings.get("capacity"):
            first = head[edge.source]
            joined = chains.pop(edge.target)
            chains[first] += joined
            for node in joined:
                head[node.id] = first
    order = [chain.head for chain in plan.chains]
    return replace(plan, chains=tuple(Chain(tuple(chains[id_])) for id_ in order if id_ in chains))


RULES = (choose_routes, fuse)
"""Applied in this order to the result of `lower`."""
