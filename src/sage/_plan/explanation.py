"""A job in words: its plan, the callers of its services, and the promises for its records."""

from __future__ import annotations

from typing import TYPE_CHECKING

from sage._plan import durability
from sage._plan.logical import Kind
from sage._plan.physical import quoted
from sage._plan.planner import used_by
from sage._plan.rules import reach, ways_of

if TYPE_CHECKING:
    from collections.abc import Iterator

    from sage._plan.logical import LogicalGraph, Node, ServiceSpec
    from sage._plan.physical import PhysicalPlan

ENDS = (Kind.SINK, Kind.REPLY)


def explanation(graph: LogicalGraph, plan: PhysicalPlan, form: str) -> str:
    """Describe a job as "text" or as a "mermaid" flowchart."""
    if form == "mermaid":
        return "\n".join([plan.mermaid(), *_drawn(graph)])
    return "\n".join([plan.text(), *_services(graph), *_promises(graph, plan)])


def callers_of(graph: LogicalGraph) -> dict[str, list[Node]]:
    """Return the operators that can be seen to call each service."""
    callers: dict[str, list[Node]] = {service.name: [] for service in graph.services}
    for node in graph.nodes.values():
        handles, names = used_by(node)
        for name in dict.fromkeys([*(handle._name for handle, _ in handles), *names]):
            if name in callers:
                callers[name].append(node)
    return callers


def _services(graph: LogicalGraph) -> Iterator[str]:
    if not graph.services:
        return
    callers = callers_of(graph)
    needed_by: dict[str, list[str]] = {}
    for service in graph.services:
        for name in service.requires:
            needed_by.setdefault(name, []).append(service.name)
    yield "services"
    for service in graph.services:
        by = [f'"{node.name}"' for node in callers[service.name]]
        by += [f'service "{other}"' for other in needed_by.get(service.name, ())]
        yield f"  {service.name}  ({_kind(service)}): called by {', '.join(by) or 'no operator that can be seen'}"


def _kind(service: ServiceSpec) -> str:
    options = service.options
    host = "command" if service.command is not None else options.host or "inline"
    calls = "any number of calls at once" if options.concurrency is None else f"{options.concurrency} at once"
    calls = "one call at a time" if options.concurrency == 1 else calls
    many = f"{options.replicas} replicas, each " if options.replicas > 1 else ""
    return ", ".join([host, *(["shared"] if options.shared else []), many + calls])


def _promises(graph: LogicalGraph, plan: PhysicalPlan) -> Iterator[str]:
    yield "promises"
    back = ways_of((edge for edge in plan.edges if not edge.letters), forward=False, backward=True)
    for end in graph.nodes.values():
        if end.kind in ENDS:
            nodes = [graph.nodes[id_] for id_ in sorted(reach(end.id, back))]
            for number, promise in enumerate(_of_path(graph, nodes, end.kind)):
                yield f"  {end.name}: {promise}" if number == 0 else f"    {promise}"
    if graph.is_durable:
        yield from (f"  {line}" for line in durability.promises(graph))
    else:
        yield "  after a restart: nothing; sources are read from their beginning"


def _of_path(graph: LogicalGraph, nodes: list[Node], end: Kind) -> Iterator[str]:
    """Yield the promises for the records that arrive after the nodes."""
    dropping = [node for node in nodes if node.on_error.then != "fail"]
    if end is Kind.REPLY:
        yield "each request gets one answer or one error"
    else:
        yield "each record at most once" if dropping else "each record once, or the job fails"
    for node in dropping:
        letters = node.on_error.letters
        to = (
            "drops records that fail"
            if letters is None
            else f'sends records that fail to "{graph.nodes[letters].name}"'
        )
        yield f'"{node.name}" {to}'
    for node in nodes:
        if node.on_error.retry is not None:
            yield f'"{node.name}" may be called up to {node.on_error.retry.attempts_max} times for a record'


def _drawn(graph: LogicalGraph) -> Iterator[str]:
    """Yield a box for each service, and an arrow from each that calls it."""
    numbers = {service.name: number for number, service in enumerate(graph.services)}
    for service in graph.services:
        yield f'  s{numbers[service.name]}[("{quoted(service.name)}")]'
    for name, nodes in callers_of(graph).items():
        for node in nodes:
            yield f"  n{node.id} -.->|calls| s{numbers[name]}"
    for service in graph.services:
        for other in service.requires:
            yield f"  s{numbers[service.name]} -.->|calls| s{numbers[other]}"
