"""Where every record of a job went, found out from what its functions saw."""

from __future__ import annotations

import asyncio
from collections import Counter
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from simulation.scenario import PASSING, RETRIES_MAX
from simulation.world import combine, key_of, matched, outs_of, source_values

from sage import JobError, ServiceUnavailableError

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from simulation.scenario import Node, Scenario
    from simulation.world import Entry

    from sage.report import JobReport

ROUNDS_MAX = 100
"""How often a record may go round a loop; none says more than four times."""

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
        fatal_records: how many records it failed on.
    """

    taken: list[tuple[int, Any]] = field(default_factory=list)
    outs: list[Any] = field(default_factory=list)
    done: int = 0
    dropped: list[tuple[int, Any]] = field(default_factory=list)
    fatal: list[BaseException] = field(default_factory=list)
    fatal_records: int = 0

    def ended(self, node: Node, entry: Entry, values: Iterable[Any]) -> None:
        """Add records that an attempt was the last one for."""
        records = [(entry.port, value) for value in values]
        self.taken += records
        if entry.error is None:
            self.done += len(records)
        elif goes_on_after(node, entry.error):
            self.dropped += records
        else:
            self.fatal.append(entry.error)
            self.fatal_records += len(records)


def is_ordinary(node: Node, error: BaseException) -> bool:
    """Return whether an error concerns the record alone; a coroutine is cancelled when its time is over."""
    return isinstance(error, Exception) or (
        isinstance(error, asyncio.CancelledError) and dict(node.settings).get("timeout_s") is not None
    )


def goes_on_after(node: Node, error: BaseException) -> bool:
    """Return whether a node drops a record that it does not try again; a request is told its error."""
    return is_ordinary(node, error) and (bool(node.served) or not node.policy.endswith("fail"))


def is_tried_again(node: Node, error: BaseException, attempts: int) -> bool:
    """Return whether another attempt follows."""
    return is_ordinary(node, error) and "retry" in node.policy and attempts < RETRIES_MAX


def fates_of(node: Node, entries: Iterable[Entry]) -> Fates:
    """Return what became of the records of a node, by the rules of its policy."""
    if node.kind == "map_async":
        return fates_of_coroutines(node, entries)
    fates = Fates()
    attempts: Counter[tuple[int, Any]] = Counter()
    for entry in entries:
        if entry.hook == "finish":
            fates.outs += entry.outs
        if entry.hook != "call":
            continue
        fates.outs += entry.outs
        record = (entry.instance, entry.value)
        attempts[record] += 1
        if entry.error is None or not is_tried_again(node, entry.error, attempts[record]):
            attempts[record] = 0
            fates.ended(node, entry, entry.value if node.kind == "map_batches" else (entry.value,))
    return fates


def fates_of_coroutines(node: Node, entries: Iterable[Entry]) -> Fates:
    """Return what became of the records of a node that has many in the function at a time."""
    fates = Fates()
    attempts: dict[int, list[Entry]] = {}
    for entry in entries:
        if entry.hook == "call":
            attempts.setdefault(entry.record, []).append(entry)
    done: list[Entry] = []
    for of_one in attempts.values():
        last = of_one[-1]
        is_open = last.ended_at is None or (
            last.error is not None
            and (
                is_tried_again(node, last.error, len(of_one))
                or (isinstance(last.error, asyncio.CancelledError) and not is_ordinary(node, last.error))
            )
        )
        if is_open:  # its job ended before
            fates.taken.append((last.port, last.value))
            continue
        fates.ended(node, last, (last.value,))
        if last.error is None:
            done.append(last)
    if not dict(node.settings).get("ordered", True):
        done.sort(key=lambda entry: entry.end)
    fates.outs = [out for entry in done for out in entry.outs]
    return fates


class Flow:
    """The records of one job: what each operator took and gave, and whether that fits together."""

    def __init__(self, scenario: Scenario, entries: list[Entry], report: JobReport) -> None:
        self._scenario = scenario
        self._report = report
        state = str(report.state)
        cancels = any(request.way == "CANCEL" for request in scenario.requests)
        self.is_whole = state == "completed" or (state == "stopped" and not cancels)
        self._asked = [entry for entry in entries if entry.asked is not None]
        self.fates: dict[str, Fates] = {}
        self._raised = [(entry.name, entry.error) for entry in entries if entry.error is not None]
        self._raised = [(name, error) for name, error in self._raised if scenario.has(name)]
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
            seen = (fates.done + len(fates.dropped), len(fates.outs), len(fates.dropped) + fates.fatal_records)
            reported = (counted.records_in, counted.records_out, counted.failed)
            # What coroutines gave just before their job was cancelled goes nowhere, and is undelivered.
            is_less = node.kind == "map_async" and not self.is_whole and _none_is_more(reported, seen)
            if seen != reported and not is_less:
                yield f"{node.name} saw in, out, failed {seen}, but {reported} are counted"

    def missing(self) -> dict[str, int]:
        """Return for each operator how many records were sent to it that it never took; negative if it took more."""
        found = {}
        for node in self._scenario.nodes:
            if node.kind in ("source", "requests"):
                continue
            sent = sum(self._given(name) * self._copies(name, node) for name in (*node.inputs, node.fed_by) if name)
            if node.kind == "letters":
                sent = len(self._letters(are_sent=True))
            fatal = self._fatal_count(node)
            found[node.name] = sent - self._report.operator(node.name).records_in - fatal
        return found

    def _fatal_count(self, node: Node) -> int:
        """Return how many records failed the job at a node."""
        if node.name not in self.fates:
            return 0
        fates = self.fates[node.name]
        if node.kind != "map_async":
            return fates.fatal_records
        shown = [inner for error in self._report.errors for inner in all_of(error)]
        return sum(any(error is one for one in shown) for error in fates.fatal)

    def _given(self, name: str) -> int:
        return self._report.operator(name).records_out

    def _copies(self, name: str, consumer: Node) -> int:
        return consumer.parallelism if self._scenario.node(name).kind == "broadcast" else 1

    def _letters(self, *, are_sent: bool = False) -> list[Any]:
        """Return the dead letters; those that a coroutine's end made may be more than those that were sent."""
        letters: list[Any] = []
        for node in self._scenario.nodes:
            if node.policy.endswith("letters") and node.name in self.fates:
                dropped = [value for _, value in self.fates[node.name].dropped]
                if are_sent and node.kind == "map_async" and not self.is_whole:
                    failed = self._report.operator(node.name).failed - self._fatal_count(node)
                    dropped = dropped[:failed]
                letters += dropped
        return letters

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
        if node.kind == "requests":
            return [entry.asked for entry in self._asked if self._scenario.service_of(entry.name) == node.served]
        if node.kind not in PASSING:
            return self.fates[name].outs
        together: list[Any] = []
        for other in (*node.inputs, *filter(None, (node.fed_by,))):
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

    # --- what served pipelines answer ---

    def wrong_answers(self) -> Iterator[str]:
        """Yield where a caller of a served pipeline got another answer than its own, or an error of nobody."""
        for entry in self._asked:
            served = self._scenario.service_of(entry.name)
            answers = self._answers(served, entry.asked)
            if entry.error is None and entry.answer != next(iter(answers), None):
                yield f"{entry.name} asked {served} for {entry.asked} and got {entry.answer}"
            if entry.asking is None or (isinstance(entry.asking, ServiceUnavailableError) and not self.is_whole):
                continue
            if len(answers) > 1 and isinstance(entry.asking, JobError) and "a second answer" in str(entry.asking):
                continue
            if not any(entry.asking is error for error in self._errors_of(served)):
                yield f"{entry.name} asked {served} for {entry.asked} and got {entry.asking!r}"

    def _answers(self, served: str, value: Any) -> list[Any]:
        values = [value]
        for node in self._scenario.nodes:
            if node.served == served and node.kind not in PASSING:
                values = [out for one in values for out in outs_of(node, one)]
        return values

    def _errors_of(self, served: str) -> list[BaseException]:
        """Return what the functions of a served pipeline raised."""
        return [error for name, error in self._raised if self._scenario.node(name).served == served]

    # --- the result by plain Python ---

    def wrong_results(self) -> Iterator[str]:
        """Yield where a sink of a job that ended by itself did not get what plain Python computes."""
        computed = self._computed()
        if computed is None:
            yield "plain Python goes round a loop for ever, but the job completed"
            return
        for node in self._scenario.nodes:
            if node.kind != "sink":
                continue
            records = self._arriving(node, computed)
            if records is not None:
                expected = Counter(value for value, _ in records.records or ())
                came = Counter(value for _, value in self.fates[node.name].taken)
                if came != expected:
                    lost, extra = dict(expected - came), dict(came - expected)
                    yield f"{node.name}: plain Python gives what did not come: {lost}; what came besides: {extra}"

    def _computed(self) -> dict[str, Computed] | None:
        """Return what each operator gives; what comes back in a loop is found by going round until nothing is new."""
        futures = {node.name: node.fed_by for node in self._scenario.nodes if node.kind == "future"}
        back = {name: Computed([], ordered=False) for name in futures}
        letters = Computed([(value, None) for value in self._letters()], ordered=False)
        for _ in range(ROUNDS_MAX):
            computed = dict(back)
            for node in self._scenario.nodes:
                if node.kind == "letters":
                    computed[node.name] = letters
            for node in self._scenario.nodes:
                if not node.served and node.kind not in ("letters", "future"):
                    computed[node.name] = self._compute(node, self._arriving(node, computed))
            found = {name: computed[fed_by] for name, fed_by in futures.items()}
            if all(_are_same(found[name], back[name]) for name in futures):
                return computed
            back = {name: Computed(one.records, ordered=False) for name, one in found.items()}
        return None

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
        sizes = [len(one.records or ()) * self._copies(name, node) for name, one in zip(node.inputs, ins, strict=True)]
        ports = tuple(port for port, size in enumerate(sizes) for _ in range(size))
        return Computed(records, len(ins) == 1 and ins[0].ordered, ports)

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
        kept: list[tuple[int, Any, Any]] = []
        for port, (value, key) in zip(arriving.ports, records, strict=True):
            if dropped[port, value]:
                dropped[port, value] -= 1
                continue
            kept.append((port, value, key))
            if node.kind == "join":
                continue
            given = key_of(node, value) if node.kind == "keyby" else key
            outs += [(out, given) for out in outs_of(node, value, port)]
        if node.kind == "process" and node.form == "class":
            outs += [(f"{node.name} end", None)] * node.parallelism
        if node.kind == "join":
            return Computed(all_matches(node, kept), ordered=False)
        return Computed(outs, ordered=ordered and dict(node.settings).get("ordered", True))


@dataclass(slots=True)
class Computed:
    """The records of a stream by plain Python; None where they depend on the schedule.

    Attributes:
        records: the records with their keys.
        ordered: whether they come in this order on every schedule.
        ports: by which input each of them came.
    """

    records: list[Keyed] | None
    ordered: bool
    ports: tuple[int, ...] = ()


def all_matches(node: Node, records: list[tuple[int, Any, Any]]) -> list[Keyed]:
    """Return every pair of records of the two inputs that have the same key."""
    by_key: dict[Any, tuple[list[Any], list[Any]]] = {}
    for port, value, key in records:
        by_key.setdefault(key, ([], []))[port].append(value)
    return [
        (matched(node, first, second), key)
        for key, (firsts, seconds) in by_key.items()
        for first in firsts
        for second in seconds
    ]


def all_of(error: BaseException) -> Iterator[BaseException]:
    """Yield an error, its causes, and what is in it if it is a group."""
    yield error
    if isinstance(error, BaseExceptionGroup):
        for inner in error.exceptions:
            yield from all_of(inner)
    if error.__cause__ is not None:
        yield from all_of(error.__cause__)


def _none_is_more(few: tuple[int, ...], many: tuple[int, ...]) -> bool:
    return all(one <= other for one, other in zip(few, many, strict=True))


def _are_same(one: Computed, other: Computed) -> bool:
    if one.records is None or other.records is None:
        return one.records is other.records
    return Counter(one.records) == Counter(other.records)


def reduced(records: list[Keyed], *, each: bool) -> list[Keyed]:
    """Combine the records of each key."""
    combined: dict[Any, Any] = {}
    outs: list[Keyed] = []
    for value, key in records:
        combined[key] = combine(combined[key], value) if key in combined else value
        outs.append((combined[key], key))
    return outs if each else [(value, key) for key, value in combined.items()]
