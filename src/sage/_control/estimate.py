"""A prediction of the time and the cost of a program, from a sample of its records."""

from __future__ import annotations

import threading
import time
from collections.abc import Sized
from contextlib import contextmanager
from dataclasses import replace
from itertools import pairwise
from math import sqrt
from typing import TYPE_CHECKING, NamedTuple

from sage._control.explanation import changing_graphs
from sage._operators.sources import SourceSample
from sage._plan.logical import Kind
from sage._progress import duration
from sage._runtime.budget import PRICED_TOKENS
from sage.connector import TransactionalSink
from sage.environment import LocalEnvironment
from sage.errors import GraphError, UnsupportedPlanError, hint
from sage.report import Outcome, table
from sage.serving import PipelineService

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from sage._plan.logical import LogicalGraph, Node
    from sage._runtime.job import Job
    from sage.environment import Environment

STUDENT_T = {1: 12.706, 2: 4.303, 3: 3.182, 4: 2.776}
"""The 97.5 % points of Student's t distribution, by degrees of freedom."""

GROUPS = len(STUDENT_T) + 1
"""Into so many groups the sample is cut. With more, intervals are hardly narrower, and fewer records run at a time."""

UNIT_RECORDS = 1_000
"""The predictions are for so many records if their number is not known."""


class Observation(NamedTuple):
    """The counts of a job at a moment at which no record is in flight."""

    at_s: float
    records: int
    calls: tuple[int, ...]
    tokens: tuple[int, int]


class Prediction(NamedTuple):
    """A mean per record, and half the width of its 95 % interval; None if one group tells nothing about it."""

    mean: float
    half: float | None


def prediction(records: Sequence[float], amounts: Sequence[float]) -> Prediction:
    """Return the amount per record, from groups of records that are taken to be independent.

    The ratio estimator with its variance, as in W. G. Cochran, Sampling Techniques, 3rd edition, 1977, chapter 6, with
    Student's t for the number of groups.
    """
    count = len(records)
    mean = sum(amounts) / sum(records)
    if count < 2:
        return Prediction(mean, None)
    squares = sum((amount - mean * size) ** 2 for amount, size in zip(amounts, records, strict=True))
    error = sqrt(squares / (count * (count - 1))) / (sum(records) / count)
    return Prediction(mean, STUDENT_T[count - 1] * error)


class SampledJob:
    """One job of the program, of which a sample was run."""

    def __init__(self, environment: Environment, graph: LogicalGraph, records_max: int) -> None:
        self.graph = graph
        self._environment = environment
        self._records_max = records_max
        self._groups = min(GROUPS, records_max)
        self._observations: list[Observation] = []
        self._job: Job | None = None
        self._lock = threading.Lock()
        self._services = [spec.name for spec in graph.services if spec.target is not PipelineService]
        self._sources = [node for node in graph.nodes.values() if _is_sampled(node)]

    def sampled(self) -> LogicalGraph:
        """Return the graph with sources that give the first records, one group after the other."""
        groups = self._groups
        longest = None if self._length() is None else max(self._sources, key=lambda node: _length_of(node) or 0)
        nodes = dict(self.graph.nodes)
        for node in self._sources:
            count = self._records_max
            if longest is not None:  # the sources have the same shares in the sample as in the whole
                share = (_length_of(node) or 0) / (_length_of(longest) or 1)
                count = max(1, round(share * count))
            sizes = [count // groups + (place < count % groups) for place in range(groups)]
            # The groups are those of the longest source; one in several tasks would have groups of its own.
            observer = self._observer(sees_groups=node is (longest or self._sources[0]))
            settings = {**node.settings, "lockstep": True, "sample": SourceSample(sizes, observer)}
            nodes[node.id] = replace(node, parallelism=1, settings=settings)
        return replace(self.graph, nodes=nodes, is_durable=False)

    def text(self, records: int | None, price: tuple[float, float] | None) -> str:
        """Return the predictions as a table, with their assumptions."""
        self._end()
        seen = self._observations
        ran = seen[-1].records - seen[0].records if len(seen) > 1 else 0
        title = f'job "{self.graph.name}": '
        if not ran:
            return f"{title}the sample did not get through, so nothing can be predicted"
        known = records or self._length()
        scope = "an unknown number" if known is None else f"{known:,}"
        groups = "1 group" if len(seen) == 2 else f"{len(seen) - 1} groups"
        lines = [f"{title}a sample of {ran:,} records in {groups}, of {scope}"]
        count = known or UNIT_RECORDS
        pairs = [pair for pair in pairwise(seen) if pair[1].records > pair[0].records]
        sizes = [after.records - before.records for before, after in pairs]
        rows = []
        for name, show, amount in self._amounts(price):
            found = prediction(sizes, [amount(after) - amount(before) for before, after in pairs])
            whole, half = found.mean * count, None if found.half is None else found.half * count
            bounds = ("", "") if half is None else (show(max(0.0, whole - half)), show(whole + half))
            rows.append((name, show(whole), *bounds))
        lines += table(("", f"for {count:,} records", "from", "to"), rows)
        return "\n".join([*lines, *self._notes(max(sizes))])

    def _amounts(
        self, price: tuple[float, float] | None
    ) -> Iterator[tuple[str, Callable[[float], str], Callable[[Observation], float]]]:
        """Yield each quantity: its name, how it is shown, and how it is taken from an observation."""
        budget = self._environment._budget
        if price is None and budget is not None and budget.cost is not None:
            price = budget.cost[:2]
        yield "time, at most", duration, lambda one: one.at_s
        for place, service in enumerate(self._services):
            yield f'calls of "{service}"', _number, lambda one, place=place: one.calls[place]  # type: ignore[misc]
        if any(self._observations[-1].tokens):
            yield "prompt tokens", _number, lambda one: one.tokens[0]
            yield "completion tokens", _number, lambda one: one.tokens[1]
            if price is not None:
                prompt, completion = price
                yield (
                    "cost",
                    lambda value: f"{value:,.2f}",
                    lambda one: (one.tokens[0] * prompt + one.tokens[1] * completion) / PRICED_TOKENS,
                )

    def _notes(self, group: int) -> Iterator[str]:
        yield "from, to: 95 % intervals, by the spread between the groups; the first records stand for all"
        yield "at most: at the end of each group fewer records run at a time than in the whole"
        sinks = ", ".join(f'"{node.name}"' for node in self.graph.nodes.values() if node.kind is Kind.SINK)
        if sinks:
            yield f"sinks ran, and the results of the sample are where they write: {sinks}"
        for node in self.graph.nodes.values():
            settings = node.settings
            at_once = node.parallelism * settings.get("concurrency", settings.get("max_records", 1))
            if at_once > group:
                least = at_once * GROUPS
                text = f'operator "{node.name}" may work on {at_once} records at once, and a group has {group}'
                yield f"{text}: all may take much less time, and fewer calls; --sample {least} comes nearer"

    def _observer(self, *, sees_groups: bool) -> Callable[[], None]:
        """Return the function that a source calls before each group; the first source to begin calls the first."""
        has_begun = False

        def observe() -> None:
            nonlocal has_begun
            with self._lock:  # a source that begins at the same time must not read before the counts are taken
                if (sees_groups and has_begun) or not self._observations:
                    self._observe()
            has_begun = True

        return observe

    def _observe(self) -> None:
        job = self._job = self._environment._job
        assert job is not None
        supervisor = job.dispatcher.supervisor
        if any(task.undelivered for task in supervisor.tasks.values()):
            return  # a stop held calls back, so that this group is not complete
        calls = tuple(supervisor.hosts[service].call_count for service in self._services)
        self._observations.append(Observation(time.monotonic(), self._records(job), calls, job.dispatcher.tokens))

    def _end(self) -> None:
        """Add what came within a group, or after the last one, if the job was completed.

        A source may have ended there, or have read a record whose call was not over.
        """
        job, seen = self._job, self._observations
        if job is None or job.is_running or job.report.state is not Outcome.COMPLETED:
            return
        records = self._records(job)
        calls = tuple(job.report.service(service).calls for service in self._services)
        if (records, calls) != (seen[-1].records, seen[-1].calls):
            at_s = seen[0].at_s + job.report.running_s
            if len(seen) > self._groups or (len(seen) > 1 and records == seen[-1].records):
                seen.pop()
            seen.append(Observation(at_s, records, calls, job.dispatcher.tokens))

    def _records(self, job: Job) -> int:
        names = {node.name for node in self._sources}
        return sum(one.records_in for one in job.operators() if one.name in names)

    def _length(self) -> int | None:
        """Return how many records all sources have, or None if one of them does not know."""
        lengths = [_length_of(node) for node in self._sources]
        known = [length for length in lengths if length is not None]
        return sum(known) if len(known) == len(lengths) else None


@contextmanager
def sampling(records_max: int) -> Iterator[list[SampledJob]]:
    """Let every environment that is submitted, in any thread, run a sample of so many records of each source."""
    jobs: list[SampledJob] = []

    def sample(environment: Environment, graph: LogicalGraph) -> LogicalGraph:
        _refuse(environment, graph)
        environment._durable = None  # the job itself begins where it would have without a sample
        job = SampledJob(environment, graph, records_max)
        jobs.append(job)
        return job.sampled()

    with changing_graphs(sample):
        yield jobs


def _refuse(environment: Environment, graph: LogicalGraph) -> None:
    """Raise GraphError for a job of which no sample can be run."""
    if not isinstance(environment, LocalEnvironment):
        raise UnsupportedPlanError(f'environment "{graph.name}" runs on a cluster, where no sample can be taken')
    for node in graph.nodes.values():
        if node.function is not None and isinstance(node.function.target, TransactionalSink):
            error = GraphError(f'sink "{node.name}" is transactional, and would keep the results of the sample')
            raise hint(error, "Give the program an option that writes elsewhere, and use it: sage estimate FILE -- ...")


def _is_sampled(node: Node) -> bool:
    """Return whether a node is a source that does not wait for requests of a served pipeline."""
    return node.kind is Kind.SOURCE and node.settings.get("bridge") is None


def _length_of(node: Node) -> int | None:
    target = None if node.function is None or node.function.is_class else node.function.target
    return len(target) if isinstance(target, Sized) else None


def _number(value: float) -> str:
    return f"{value:,.0f}"
