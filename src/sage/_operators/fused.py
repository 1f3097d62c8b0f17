"""Neighbouring operators in one loop: no list between them, and a call that the interpreter specializes for each.

The loop is put together from the lines that each operator gives for itself. It handles what is plain: cuts, errors,
keys and requests stay where they are for operators that run alone, and what fails here goes on there.
"""

from __future__ import annotations

from dataclasses import dataclass
from time import perf_counter
from typing import TYPE_CHECKING, Any

from sage.records import Batch

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from types import TracebackType

    from sage._operators.operator import Operator

SAMPLE_EVERY = 32
"""One batch of so many is run operator by operator, to measure how the time is shared among them; at first more are."""


@dataclass(frozen=True, slots=True)
class Inlined:
    """What an operator does with one record, as lines of Python.

    Attributes:
        lines: find the record in `value`, and leave there what goes on; until a call returns, it stays as it is.
            `{call}`, `{state}` and `{dropped}` stand for the operator's own; the last is counted up before `continue`.
        call: the function to call.
        state: what else it needs.
        gives: whether a record goes on after the lines.
        sets_key: whether the lines put a key into `key`.
    """

    lines: tuple[str, ...]
    call: Callable[..., Any]
    state: Any = None
    gives: bool = True
    sets_key: bool = False


class Segment:
    """Operators that follow one another in a task and run in one loop.

    `process` does what the operators would do one after another, but record by record: what it leaves undone is in
    `rest` of the first of them, and of the one that failed.
    """

    def __init__(self, operators: Sequence[Operator], inlined: Sequence[Inlined]) -> None:
        self.operators = operators
        self._inlined = inlined
        self._calls = [given for one in inlined for given in (one.call, one.state)]
        self._run: Callable[..., None] | None = None
        self._places: list[int] = []
        self._seen = 0
        self._parts_s = [0.0] * len(operators)
        self._shares: list[float] = []
        self._has_keys = any(one.sets_key for one in inlined)

    def takes(self, batch: Batch) -> bool:
        """Return whether this batch runs in the loop."""
        if batch.keys is not None or batch.requests is not None:
            return False
        self._seen += 1
        is_early = self._seen & (self._seen - 1) == 0  # the first, the second, the fourth, ...
        if self._seen % SAMPLE_EVERY == 0 or is_early:
            self._shares = []
            return False
        return True

    def process(self, batch: Batch) -> Batch:
        """Return what goes on, and count it for each of the operators."""
        started_at = perf_counter()
        first = self.operators[0]
        values, span = batch.values, first.span
        total = len(values)
        begun = 0
        out: list[Any] = []
        keys: list[Any] = []
        run = self._run = self._run or self._assemble()
        while True:
            reading = span.begin(values if begun == 0 else values[begun:])
            dropped = [0] * len(self.operators)
            try:
                run(reading, out, keys, dropped, *self._calls)
            except BaseException as error:  # every failure of a user's function is owned here
                done = total - len(span.end())
                self._count(done - 1 - begun, dropped)
                begun = done
                if not self._goes_on(error) or span.is_cut or begun == total:
                    break
            else:
                done = total - len(span.end())
                self._count(done - begun, dropped)
                break
        if done < total:
            again = [] if first.rest is None else first.rest.values
            first.rest = Batch([*again, *values[done:]])
        self._share(perf_counter() - started_at)
        return Batch(out, keys if self._has_keys else None)

    def _goes_on(self, error: BaseException) -> bool:
        """Let the operator that failed apply its policy, and return whether the next record follows at once."""
        place, seen = self._where(error.__traceback__)
        for passed in self.operators[:place]:
            passed.passed(1, 1)
        has_key = any(one.sets_key for one in self._inlined[:place])
        failed = Batch([seen.get("value")], [seen["key"]] if has_key else None)
        return self.operators[place].fail_alone(failed, error)

    def _where(self, traceback: TracebackType | None) -> tuple[int, dict[str, Any]]:
        """Return the place of the operator at whose line the loop ended, and what the loop had in its variables."""
        assert self._run is not None
        while traceback is not None:
            if traceback.tb_frame.f_code is self._run.__code__:
                return self._places[traceback.tb_lineno], traceback.tb_frame.f_locals
            traceback = traceback.tb_next
        return 0, {}  # an interrupt that came before the loop began

    def _count(self, records: int, dropped: list[int]) -> None:
        for operator, inlined, less in zip(self.operators, self._inlined, dropped, strict=True):
            out = records - less if inlined.gives else 0
            operator.passed(records, out)
            records = out

    def _share(self, elapsed_s: float) -> None:
        """Share the time in the way in which the operators took theirs when they ran alone."""
        if not self._shares:
            alone_s = [
                operator.metrics.busy_s - part_s for operator, part_s in zip(self.operators, self._parts_s, strict=True)
            ]
            whole_s = sum(alone_s)
            self._shares = [one_s / whole_s for one_s in alone_s]
        for place, share in enumerate(self._shares):
            part_s = elapsed_s * share
            self._parts_s[place] += part_s
            self.operators[place].metrics.busy_s += part_s

    def _assemble(self) -> Callable[..., None]:
        """Put the loop together."""
        numbers = range(len(self.operators))
        given = "".join(f", call{number}, state{number}" for number in numbers)
        lines = [
            f"def run(records, out, keys, dropped{given}):",
            f"    {' = '.join(f'dropped{number}' for number in numbers)} = 0",
            "    try:",
            "        for value in records:",
        ]
        places = [0] * (len(lines) + 1)  # lines are counted from 1
        for number, inlined in enumerate(self._inlined):
            names = {name: f"{name}{number}" for name in ("call", "state", "dropped")}
            lines += [" " * 12 + line.format(**names) for line in inlined.lines]
            places += [number] * len(inlined.lines)
        if self._inlined[-1].gives:
            lines.append("            out.append(value)")
        if self._inlined[-1].gives and self._has_keys:
            lines.append("            keys.append(key)")
        lines += ["    finally:", f"        dropped[:] = [{', '.join(f'dropped{number}' for number in numbers)}]"]
        title = f"<{', '.join(ascii(operator.node.name) for operator in self.operators)}>"
        space: dict[str, Any] = {}
        exec(compile("\n".join(lines), title, "exec"), space)
        self._places = places + [0] * (len(lines) + 1 - len(places))
        run: Callable[..., None] = space["run"]
        return run


def segments_of(operators: Sequence[Operator]) -> dict[int, Segment]:
    """Return what can run in one loop, by the place of the first operator; a single one is no segment."""
    segments: dict[int, Segment] = {}
    parts: list[Inlined] = []
    for place, operator in enumerate([*operators, None]):
        has_key = any(part.sets_key for part in parts)
        inlined = None if operator is None else operator.inlined(has_key=has_key)
        if inlined is not None:
            parts.append(inlined)
            if inlined.gives:
                continue
            place += 1
        start = place - len(parts)
        if len(parts) > 1:
            segments[start] = Segment(operators[start:place], parts)
        parts = []
    return segments
