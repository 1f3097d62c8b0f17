"""Which graphs can be durable, and what such a job promises over a restart."""

from __future__ import annotations

from collections import deque
from typing import TYPE_CHECKING

from sage._handover import Handover
from sage._operators.sources import goes_on
from sage._plan.logical import Kind
from sage._plan.rules import edges_of, reach, ways_of
from sage.connector import TransactionalSink
from sage.errors import GraphError, UnsupportedPlanError, hint

if TYPE_CHECKING:
    from collections.abc import Iterator

    from sage._plan.logical import FunctionSpec, LogicalGraph, Node

COVERED = frozenset(
    {
        Kind.SOURCE,
        Kind.MAP,
        Kind.MAP_ASYNC,
        Kind.MAP_BATCHES,
        Kind.FILTER,
        Kind.FLATMAP,
        Kind.KEYBY,
        Kind.UNION,
        Kind.COMAP,
        Kind.JOIN,
        Kind.PROCESS,
        Kind.REDUCE,
        Kind.STATEFUL_MAP,
        Kind.FUTURE,
        Kind.LETTERS,
        Kind.SINK,
    }
)
"""The kinds of operators whose state a checkpoint has. A function has one if it has `snapshot` and `restore`."""

STATEFUL = frozenset({Kind.REDUCE, Kind.STATEFUL_MAP, Kind.JOIN})
"""The kinds whose function gets values of earlier records too."""

IN_MEMORY = (list, set, dict, deque, Handover)


def problems(graph: LogicalGraph) -> Iterator[UnsupportedPlanError]:
    """Yield an error for each operator that a durable job cannot bring back after a restart."""
    for node in graph.nodes.values():
        kind = _uncovered(node)
        if kind:
            error = UnsupportedPlanError(f'operator "{node.name}" is {kind}, which a durable job does not cover yet')
            yield hint(error, "Leave durable= out, or do this part in a second job that reads the output of the first.")
    for changed, before in before_changed(graph).items():
        for node in before:
            if keeps_state(node):
                text = f'operator "{node.name}" keeps a state, and stands before "{changed}", which has removed='
                error = UnsupportedPlanError(f"{text}: it would see all records again in each run")
                yield hint(error, "Put it after changed(removed=...), or leave removed= out.")


def before_changed(graph: LogicalGraph) -> dict[str, list[Node]]:
    """Return for each operator that looks for removed keys, by its name, the operators before it.

    It has to see every record in each run, so sources among them are read from the beginning.
    """
    back = ways_of(edges_of(graph), forward=False, backward=True)
    return {
        node.name: [graph.nodes[id_] for id_ in sorted(reach(node.id, back)) if id_ != node.id]
        for node in graph.nodes.values()
        if node.settings.get("removed") is not None
    }


def _uncovered(node: Node) -> str:
    if node.settings.get("bridge") is not None or node.kind is Kind.REPLY:
        return "part of a served pipeline"
    if node.kind is Kind.MAP_ASYNC and node.function is not None and has_state(node.function):
        return "a map_async whose function has snapshot() and restore(), which would see calls that run"
    return "" if node.kind in COVERED else f"of kind {node.kind}"


def check_sources_again(graph: LogicalGraph) -> None:
    """Refuse sources that cannot be read a second time in one run.

    Raises:
        GraphError: a source is an iterator.
    """
    for node in graph.nodes.values():
        target = None if node.function is None or node.function.is_class else node.function.target
        if node.kind is Kind.SOURCE and (hasattr(target, "__next__") or hasattr(target, "__anext__")):
            error = GraphError(f'source "{node.name}" is an iterator, which cannot be read again after a restart')
            raise hint(error, "Give the function that makes it, or leave restarts= out.")


def has_state(function: FunctionSpec) -> bool:
    """Return whether a function takes part in checkpoints."""
    return all(callable(getattr(function.owner, name, None)) for name in ("snapshot", "restore"))


def keeps_state(node: Node) -> bool:
    """Return whether an operator works with earlier records too."""
    function = node.function
    return node.kind in STATEFUL or (function is not None and (has_state(function) or bool(function.states)))


def promises(graph: LogicalGraph) -> Iterator[str]:
    """Yield for each sink a line that says how often its records come over restarts."""
    looking = before_changed(graph)
    again = {node.name for before in looking.values() for node in before}
    edges = [edge for edge in edges_of(graph) if graph.nodes[edge.target].name not in looking]
    back = ways_of(edges, forward=False, backward=True)  # behind changed(removed=...), a record comes once
    for sink in graph.nodes.values():
        if sink.kind is not Kind.SINK:
            continue
        before = [graph.nodes[id_] for id_ in sorted(reach(sink.id, back))]
        sources = [node for node in before if node.kind is Kind.SOURCE]
        anew = [f'"{node.name}"' for node in sources if node.name in again]
        lost = [f'"{node.name}"' for node in sources if node.name not in again and not goes_on(node)]
        then = f"; records of {', '.join(lost)} at most once, or again: a source without a position" if lost else ""
        then += f"; records of {', '.join(anew)} again in each run: it is read for changed(removed=...)" if anew else ""
        yield f'over a restart, "{sink.name}" gets {_times(sink)}{then}'


def _times(sink: Node) -> str:
    assert sink.function is not None
    target = sink.function.target
    if isinstance(target, TransactionalSink):
        return target.promise
    if isinstance(getattr(target, "__self__", None), IN_MEMORY):
        return "nothing of earlier runs: its records are in memory"
    return "each record at least once"
