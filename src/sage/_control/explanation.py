"""The plans of a program, shown without running a job."""

from __future__ import annotations

import time
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from sage._runtime.job import Job
from sage._runtime.manager import NoDispatcher
from sage.environment import Environment
from sage.report import Cleanliness, JobReport, OperatorReport, Outcome

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from sage._plan.logical import LogicalGraph
    from sage._plan.physical import PhysicalPlan
    from sage.observability import Event


class PlannedJob(Job):
    """A job that is over before it began: it lets a program go on after its submit was explained."""

    def __init__(self, id_: str, graph: LogicalGraph, plan: PhysicalPlan) -> None:
        super().__init__(id_, graph, 0.0)
        self._plan = plan
        now = time.time()
        operators = tuple(
            OperatorReport(node.name, str(node.kind), node.parallelism, 0, 0, 0, 0.0) for node in graph.nodes.values()
        )
        self._report = JobReport(
            id_, graph.name, Outcome.COMPLETED, Cleanliness.CLEAN, "explained, not run", now, now, 0.0, operators
        )
        self.dispatcher: Any = NoDispatcher()

    @property
    def plan(self) -> PhysicalPlan:
        return self._plan

    def events(self) -> tuple[Event, ...]:
        """Return nothing: no state ever changed."""
        return ()

    def operators(self) -> tuple[OperatorReport, ...]:
        """Return counts of nothing."""
        return self.report.operators

    def wait(self, timeout_s: float | None = None) -> JobReport:  # noqa: ARG002
        return self.report

    def _finish_up(self, timeout_s: float | None = None) -> None:
        """Do nothing."""


@contextmanager
def explaining(show: Callable[[LogicalGraph, PhysicalPlan], None]) -> Iterator[set[Environment]]:
    """Show the plan of every environment that is submitted, in any thread, instead of running it."""
    shown: set[Environment] = set()

    def explain(environment: Environment, graph: LogicalGraph, plan: PhysicalPlan) -> Job:
        shown.add(environment)
        show(graph, plan)
        return PlannedJob(environment.env_uuid, graph, plan)

    Environment._instead_of_running = explain
    try:
        yield shown
    finally:
        Environment._instead_of_running = None


@contextmanager
def changing_graphs(change: Callable[[Environment, LogicalGraph], LogicalGraph]) -> Iterator[None]:
    """Change the graph of every environment that is submitted, in any thread, before it is run."""
    before, Environment._changed = Environment._changed, change
    try:
        yield
    finally:
        Environment._changed = before
