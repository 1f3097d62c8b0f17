"""Where every record of a job went, found out from what its functions saw."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from simulation.scenario import PASSING, RETRIES_MAX
from simulation.world import combine, key_of, outs_of, source_values

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from simulation.scenario import Node, Scenario
    from simulation.world import Entry

    from sage.report import JobReport

Keyed = tuple[Any, Any]
"""A record with its key, None where the stream has none."""


@dataclass(slots=True)
class Fates:
    """What became of the records that one operator took.

    Attributes:
        taken: all of them in order, each once, whatever became of it.
        outs: what it gave, in order.
        done: calls that returned.
        dropped: records that the policy gave up, in order, with the input that they came by.
        fatal: what failed the job.
    """

    taken: list[tuple[int, Any]] = field(default_factory=list)
    outs: list[Any] = field(default_factory=list)
    done: int = 0
    dropped: list[tuple[int, Any]] = field(default_factory=list)
    fatal: list[BaseException] = field(default_factory=list)


def fates_of(node: Node, entries: Iterable[Entry]) -> Fates:
    """Return what became of the records of a node, by the rules of its policy."""
    fates = Fates()
    attempts: Counter[tuple[int, Any]] = Counter()
    for entry in entries:
        if entry.hook == "finish":
            fates.outs += entry.outs
        if entry.hook != "call":
            continue
        fates.outs += entry.outs
        record = (entry.instance, entry.value)
        if entry.error is None:
            fates.taken.append((entry.port, entry.value))
            fates.done += 1
            attempts[record] = 0
            continue
        attempts[record] += 1
        is_ordinary = isinstance(entry.error, Exception)
        if is_ordinary and "retry" in node.policy and attempts[record] < RETRIES_MAX:
            continue
        attempts[record] = 0
        fates.taken.append((entry.port, entry.value))
        if is_ordinary and not node.policy.endswith("fail"):
            fates.dropped.append((entry.port, entry.value))
        else:
            fates.fatal.append(entry.error)
    return fates


class Flow:
    """The records of one job: what each operator took and gave, and whether that fits together."""

    def __init__(self, scenario: Scenario, entries: list[Entry], report: JobReport) -> None:
        self._scenario = scenario
        self._report = report
        self.fates: dict[str, Fates] = {}
        by_name: dict[str, list[Entry]] = {}
        for entry in entries:
            by_name.setdefault(entry.name, []).append(entry)
        for node in scenario.nodes:
            if node.kind not in PASSING:
                self.fates[node.name] = fates_of(node, by_name.get(node.name, []))

    # --- what the report counts ---

    def wrong_counts(self) -> Iterator[str]:
        """Yield where the report counts other numbers than the functions saw."""
        for node in self._scenario.nodes:
            counted = self._report.operator(node.name)
            if node.kind in PASSING or node.kind in ("reduce", "last"):
                continue
            fates = self.fates[node.name]
            if node.kind == "source":
                if counted.records_in > node.number or counted.records_in != counted.records_out:
                    yield f"{node.name} read {counted.records_in} and gave {counted.records_out} of {node.number}"
                if node.form != "list" and counted.records_out != len(fates.outs):
                    yield f"{node.name} gave {len(fates.outs)} records, but {counted.records_out} are counted"
                continue
            seen = (fates.done + len(fates.dropped), len(fates.outs), len(fates.dropped) + len(fates.fatal))
            reported = (counted.records_in, counted.records_out, counted.failed)
            if seen != reported:
                yield f"{node.name} saw in, out, failed {seen}, but {reported} are counted"

    def missing(self) -> dict[str, int]:
        """Return for each operator how many records were sent to it that it never took; negative if it took more."""
        found = {}
        for node in self._scenario.nodes:
            if node.kind == "source":
                continue
            sent = sum(self._given(name) * self._copies(name, node) for name in node.inputs)
            if node.kind == "letters":
                sent = len(self._letters())
            fatal = len(self.fates[node.name].fatal) if node.name in self.fates else 0
            found[node.name] = sent - self._report.operator(node.name).records_in - fatal
        return found

    def _given(self, name: str) -> int:
        return self._report.operator(name).records_out

    def _copies(self, name: str, consumer: Node) -> int:
        return consumer.parallelism if self._scenario.node(name).kind == "broadcast" else 1

    def _letters(self) -> list[Any]:
        return [
            value
            for node in self._scenario.nodes
            if node.policy.endswith("letters") and node.name in self.fates
            for _, value in self.fates[node.name].dropped
        ]

    # --- which records they are ---

    def strangers(self) -> Iterator[str]:
        """Yield where an operator took what nobody gave it, or took a record twice."""
        for node in self._scenario.nodes:
            if node.name not in self.fates or node.kind in ("source", "reduce", "last"):
                continue
            available: Counter[Any] = Counter()
            for name in node.inputs:
                given = self._available(name)
                if given is None:
                    break
                for _ in range(self._copies(name, node)):
                    available.update(given)
            else:
                extra = Counter(value for _, value in self.fates[node.name].taken) - available
                if extra:
                    yield f"{node.name} took what nobody gave it, or took it twice: {dict(extra)}"

    def _available(self, name: str) -> list[Any] | None:
        """Return what an operator gave, or None where nobody saw it."""
        node = self._scenario.node(name)
        if node.kind in ("reduce", "last"):
            return None
        if node.kind == "letters":
            return self._letters()
        if node.kind == "source":
            return source_values(node)
        if node.kind not in PASSING:
            return self.fates[name].outs
        together: list[Any] = []
        for other in node.inputs:
            given = self._available(other)
            if given is None:
                return None
            together += given
        return together

    def disorder(self) -> Iterator[str]:
        """Yield where the records of one producer came in another order at one consumer, or with a gap."""
        for node in self._scenario.nodes:
            if node.parallelism > 1 or node.name not in self.fates or node.kind in ("source", "reduce", "last"):
                continue
            for port, name in enumerate(node.inputs):
                producer = self._scenario.node(name)
                if producer.parallelism > 1 or producer.kind in ("reduce", "last", *PASSING):
                    continue
                given = source_values(producer) if producer.kind == "source" else self.fates[name].outs
                came = [value for at, value in self.fates[node.name].taken if at == port]
                if came != given[: len(came)]:
                    yield f"{node.name} took {came} of {name}, which gave {given}"

    # --- the result by plain Python ---

    def wrong_results(self) -> Iterator[str]:
        """Yield where a sink of a job that ended by itself did not get what plain Python computes."""
        computed: dict[str, Computed] = {}
        for node in self._scenario.nodes:
            if node.kind == "letters":
                computed[node.name] = Computed([(value, None) for value in self._letters()], ordered=False)
        for node in self._scenario.nodes:
            if node.kind == "letters":
                continue
            records = self._arriving(node, computed)
            computed[node.name] = self._compute(node, records)
            if node.kind == "sink" and records is not None:
                expected = Counter(value for value, _ in records.records or ())
                came = Counter(value for _, value in self.fates[node.name].taken)
                if came != expected:
                    lost, extra = dict(expected - came), dict(came - expected)
                    yield f"{node.name}: plain Python gives what did not come: {lost}; what came besides: {extra}"

    def _arriving(self, node: Node, computed: dict[str, Computed]) -> Computed | None:
        ins = [computed[name] for name in node.inputs]
        if any(one.records is None for one in ins):
            return None
        records = [
            record
            for name, one in zip(node.inputs, ins, strict=True)
            for record in one.records or ()
            for _ in range(self._copies(name, node))
        ]
        first = len(ins[0].records or ()) * self._copies(node.inputs[0], node) if ins else 0
        return Computed(records, len(ins) == 1 and ins[0].ordered, first)

    def _compute(self, node: Node, arriving: Computed | None) -> Computed:
        if node.kind == "source":
            return Computed([(value, None) for value in source_values(node)], ordered=node.parallelism == 1)
        if arriving is None:
            return Computed(None, ordered=False)
        records, ordered = arriving.records or [], arriving.ordered and node.parallelism == 1
        if node.kind in PASSING:
            return Computed(records, ordered=ordered)
        dropped = Counter(self.fates[node.name].dropped)
        if node.kind in ("reduce", "last"):
            if dropped or (node.kind == "reduce" and not arriving.ordered):
                return Computed(None, ordered=False)
            return Computed(reduced(records, each=node.kind == "reduce"), ordered=ordered)
        outs: list[Keyed] = []
        for place, (value, key) in enumerate(records):
            port = int(place >= arriving.first)
            if dropped[port, value]:
                dropped[port, value] -= 1
                continue
            given = key_of(node, value) if node.kind == "keyby" else key
            outs += [(out, given) for out in outs_of(node, value, port)]
        if node.kind == "process" and node.form == "class":
            outs += [(f"{node.name} end", None)] * node.parallelism
        return Computed(outs, ordered=ordered)


@dataclass(slots=True)
class Computed:
    """The records of a stream by plain Python; None where they depend on the schedule.

    Attributes:
        records: the records with their keys.
        ordered: whether they come in this order on every schedule.
        first: how many of them came by the first input.
    """

    records: list[Keyed] | None
    ordered: bool
    first: int = 0


def reduced(records: list[Keyed], *, each: bool) -> list[Keyed]:
    """Combine the records of each key."""
    combined: dict[Any, Any] = {}
    outs: list[Keyed] = []
    for value, key in records:
        combined[key] = combine(combined[key], value) if key in combined else value
        outs.append((combined[key], key))
    return outs if each else [(value, key) for key, value in combined.items()]
