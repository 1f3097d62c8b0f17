"""The accounts of records: what each operator took and gave, and what was sent to it and not taken."""

from __future__ import annotations

from collections import Counter, defaultdict
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

from sage._plan.logical import Route
from sage._plan.rules import edges_of

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from sage._operators.operator import Operator
    from sage._plan.logical import LogicalGraph


class Counts(NamedTuple):
    """Counts of records of one operator.

    Attributes:
        taken: those that its function was called with, or that a source read.
        given: those that went on.
        failed: those that failed after the last attempt.
        fatal: those of them that failed the job.
        lost: those that were sent to it in earlier runs, and that it neither took nor had waiting at the checkpoint
            that the job went on from; negative if it took too many.
    """

    taken: int = 0
    given: int = 0
    failed: int = 0
    fatal: int = 0
    lost: int = 0

    def plus(self, other: Counts) -> Counts:
        """Return the sums."""
        return Counts(*map(int.__add__, self, other))


@dataclass(frozen=True, slots=True)
class Way:
    """A way of records from one operator to another.

    Attributes:
        source: the name of the operator that gives them.
        target: the name of the one that takes them.
        letters: whether they are dead letters.
        copies: how many tasks of the target get each record.
    """

    source: str
    target: str
    letters: bool
    copies: int


def ways_of_records(graph: LogicalGraph) -> tuple[Way, ...]:
    """Return the ways of records in a graph, without those that only route."""
    ways = []
    for edge in edges_of(graph):
        source, target = graph.nodes[edge.source], graph.nodes[edge.target]
        copies = target.parallelism if source.route is Route.BROADCAST and not edge.letters else 1
        ways.append(Way(source.name, target.name, edge.letters, copies))
    return tuple(ways)


def counted(operators: Iterable[Operator]) -> dict[str, Counts]:
    """Return the counts of operators by name, over all tasks that have one."""
    metrics = [operator.metrics for operator in operators]
    return total({one.operator: Counts(one.records_in, one.records_out, one.failed, one.fatal)} for one in metrics)


def total(counts: Iterable[Mapping[str, Counts]]) -> dict[str, Counts]:
    """Return the sums by name."""
    sums: defaultdict[str, Counts] = defaultdict(Counts)
    for some in counts:
        for name, one in some.items():
            sums[name] = sums[name].plus(one)
    return dict(sums)


def not_taken(ways: Iterable[Way], counts: Mapping[str, Counts], waiting: Mapping[str, int]) -> Counter[str]:
    """Return how many records each operator did not take, by its name.

    Args:
        ways: the ways of records.
        counts: the counts of all operators.
        waiting: how many records waited in each when the counts began.
    """
    missing = Counter(waiting)
    sent_to = set()
    for way in ways:
        source = counts[way.source]
        missing[way.target] += source.failed - source.fatal if way.letters else source.given * way.copies
        sent_to.add(way.target)
    missing.subtract({name: counts[name].taken + counts[name].fatal for name in sent_to})
    return missing
