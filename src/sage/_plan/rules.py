"""The rules of planning: functions from plan to plan, and the facts about a graph that they need."""

from __future__ import annotations

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


def reach(start: int, edges: Iterable[Edge], *, backwards: bool = False) -> frozenset[int]:
    """Return the nodes that can be reached from `start`, itself included."""
    edges = tuple(edges)
    found = {start}
    todo = [start]
    while todo:
        here = todo.pop()
        for edge in edges:
            near, far = (edge.target, edge.source) if backwards else (edge.source, edge.target)
            if near == here and far not in found:
                found.add(far)
                todo.append(far)
    return frozenset(found)


def loops_of(edges: Iterable[Edge]) -> tuple[frozenset[int], ...]:
    """Return the nodes of each feedback loop; loops that share a node are one."""
    edges = tuple(edges)
    loops: list[frozenset[int]] = []
    for edge in edges:
        if edge.feedback:
            loop = reach(edge.target, edges) & reach(edge.source, edges, backwards=True)
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
    order: list[Node] = []
    ready = [id_ for id_, count in waiting.items() if count == 0]
    while ready:
        here = ready.pop(0)
        order.append(graph.nodes[here])
        for edge in forward:
            if edge.source == here:
                waiting[edge.target] -= 1
                if waiting[edge.target] == 0:
                    ready.append(edge.target)
    return order if len(order) == len(graph.nodes) else None


def serving_nodes(graph: LogicalGraph, edges: Iterable[Edge]) -> frozenset[int]:
    """Return the nodes that only answer requests: everything they are joined with starts at request sources."""
    edges = tuple(edges)
    both_ways = (*edges, *(replace(edge, source=edge.target, target=edge.source) for edge in edges))
    found: set[int] = set()
    for node in graph.nodes.values():
        if node.settings.get("bridge") is not None and node.id not in found:
            island = reach(node.id, both_ways)
            sources = [graph.nodes[id_] for id_ in island if graph.nodes[id_].kind is Kind.SOURCE]
            if all(source.settings.get("bridge") is not None for source in sources):
                found |= island
    return frozenset(found)


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

    return replace(plan, edges=tuple(replace(edge, route=route(edge)) for edge in plan.edges))


def fuse(graph: LogicalGraph, plan: PhysicalPlan) -> PhysicalPlan:
    """Put neighbours into one chain: a forward edge, equal parallelism, one place, no other edge at its ends.

    What holds records begins a chain.
    """
    chains = {chain.nodes[0].id: chain for chain in plan.chains}
    head = {id_: id_ for id_ in graph.nodes}
    for edge in sorted(plan.edges, key=lambda edge: edge.target):
        alone_out = [other for other in plan.edges if other.source == edge.source and not other.letters] == [edge]
        alone_in = [other for other in plan.edges if other.target == edge.target] == [edge]
        source, target = graph.nodes[edge.source], graph.nodes[edge.target]
        same = source.parallelism == target.parallelism and source.place == target.place
        plain = edge.route is Route.FORWARD and not edge.feedback and not edge.letters
        plain = plain and target.kind not in HOLDING
        if plain and same and alone_out and alone_in:
            first = head[edge.source]
            joined = chains.pop(edge.target)
            chains[first] = Chain((*chains[first].nodes, *joined.nodes))
            for node in joined.nodes:
                head[node.id] = first
    order = [chain.nodes[0].id for chain in plan.chains]
    return replace(plan, chains=tuple(chains[id_] for id_ in order if id_ in chains))


RULES = (choose_routes, fuse)
"""Applied in this order to what `lower` returns."""
