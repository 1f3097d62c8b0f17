"""Which operator runs which kind of node."""

from __future__ import annotations

from typing import TYPE_CHECKING

from sage._operators.asynchronous import MapAsync
from sage._operators.batched import MapBatches
from sage._operators.keyed import Changed, Join, Reduce, StatefulMap
from sage._operators.per_record import CoMap, Filter, FlatMap, KeyBy, Map, Pass, Process, Reply, Sink
from sage._operators.sources import Reader
from sage._operators.transactions import TransactionSink
from sage._plan.logical import Kind
from sage.connector import TransactionalSink

if TYPE_CHECKING:
    from sage._operators.operator import Operator
    from sage._plan.logical import Node

OPERATORS: dict[Kind, type[Operator]] = {
    Kind.SOURCE: Reader,
    Kind.MAP: Map,
    Kind.MAP_ASYNC: MapAsync,
    Kind.MAP_BATCHES: MapBatches,
    Kind.FILTER: Filter,
    Kind.FLATMAP: FlatMap,
    Kind.SINK: Sink,
    Kind.KEYBY: KeyBy,
    Kind.UNION: Pass,
    Kind.COMAP: CoMap,
    Kind.JOIN: Join,
    Kind.PROCESS: Process,
    Kind.REDUCE: Reduce,
    Kind.STATEFUL_MAP: StatefulMap,
    Kind.FUTURE: Pass,
    Kind.LETTERS: Pass,
    Kind.REPLY: Reply,
}


def operator_class(node: Node) -> type[Operator]:
    """Return the operator that runs a node."""
    if node.function is not None and isinstance(node.function.target, TransactionalSink):
        return TransactionSink
    if node.settings.get("removed") is not None:
        return Changed
    return OPERATORS[node.kind]
