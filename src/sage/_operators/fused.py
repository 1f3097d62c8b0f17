"""Neighbouring operators in one loop: no list between them, and a call that the interpreter specializes for each.

The loop is put together from the lines that each operator gives for itself. It handles the plain case: cuts, errors,
keys and requests stay with operators that run alone, and a failure here continues there.
"""

from __future__ import annotations

from functools import lru_cache
from types import CodeType, FunctionType
from typing import TYPE_CHECKING

from sage._forks import leave_if_forked
from sage.records import Batch

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from types import TracebackType

    from sage._operators.operator import InlineCode, Operator

SAMPLE_EVERY = 32
SAMPLE_RECORDS = 128
"""Of one batch of so many, at first of more, these are run operator by operator, to measure how the time is shared."""


class FusedLoop:
    """Operators that follow one another in a task and run in one loop.

    `process` does the work of the operators one after another, but record by record: the rest is in
    `rest` of the first of them, and of the one that failed.

    Attributes:
        is_through: whether all records of the last batch were done, and none failed.
    """

    def __init__(self, operators: Sequence[Operator], inlined: Sequence[InlineCode]) -> None:
        self.operators = operators
        self._inlined = inlined
        self._calls = [given for one in inlined for given in (one.call, one.state)]
        self._run: Callable[..., None] | None = None
        self._places: list[int] = []
        self._seen = 0
        self._shares: list[float] = []
        self._has_keys = any(one.sets_key for one in inlined)
        self.is_through = True

    @property
    def is_costly(self) -> bool:
        """Whether an interrupt keeps one of the operators from further calls."""
        return any(operator.is_costly for operator in self.operators)

    def alone(self, batch: Batch) -> int:
        """Return how many of the next records run operator by operator, or 0 if the batch runs in the loop."""
        if batch.keys is not None or batch.requests is not None:
            return len(batch)
        self._seen += 1
        is_early = self._seen & (self._seen - 1) == 0  # the first, the second, the fourth, ...
        if self._seen % SAMPLE_EVERY == 0 or is_early:
            self._shares = []
            return min(SAMPLE_RECORDS, len(batch))
        return 0

    def process(self, batch: Batch) -> Batch:
        """Return the results, and count it for each of the operators."""
        first = self.operators[0]
        values, span, now = batch.values, first.span, first.now
        total = len(values)
        begun = 0
        self.is_through = True
        out: list[object] = []
        keys: list[object] = []
        run = self._run = self._run or self._assemble()
        for operator in self.operators:
            operator.costs.begins()
        while True:
            reading = span.begin(values if begun == 0 else values[begun:])
            dropped = [0] * len(self.operators)
            began_at = now()
            try:
                run(reading, out, keys, dropped, *self._calls)
            except BaseException as error:  # every failure of a user's function is owned here
                leave_if_forked(error)
                done = total - len(span.end())
                self._count(done - 1 - begun, dropped, now() - began_at)
                self.is_through = False
                begun = done
                if not self._goes_on(error) or span.is_cut or begun == total:
                    break
            else:
                done = total - len(span.end())
                self._count(done - begun, dropped, now() - began_at)
                break
        if done < total:
            again = [] if first.rest is None else first.rest.values
            first.rest = Batch([*again, *values[done:]])
            self.is_through = False
        return Batch(out, keys if self._has_keys else None)

    def _goes_on(self, error: BaseException) -> bool:
        """Let the operator that failed apply its policy, and return whether the next record follows at once."""
        place, seen = self._where(error.__traceback__)
        for passed in self.operators[:place]:
            passed.passed(1, 1, 0.0)
        has_key = any(one.sets_key for one in self._inlined[:place])
        failed = Batch([seen.get("value")], [seen["key"]] if has_key else None)
        return self.operators[place].fail_alone(failed, error)

    def _where(self, traceback: TracebackType | None) -> tuple[int, dict[str, object]]:
        """Return the place of the operator at whose line the loop ended, and the values of the loop's variables."""
        assert self._run is not None
        while traceback is not None:
            if traceback.tb_frame.f_code is self._run.__code__:
                return self._places[traceback.tb_lineno], traceback.tb_frame.f_locals
            traceback = traceback.tb_next
        return 0, {}  # an interrupt that came before the loop began

    def _count(self, records: int, dropped: list[int], elapsed_s: float) -> None:
        """Count the records, and share the time in the way in which the operators took theirs when they ran alone."""
        if not self._shares:
            alone_s = [operator.metrics.busy_s - operator.shared_s for operator in self.operators]
            whole_s = sum(alone_s) or 1.0
            self._shares = [one_s / whole_s for one_s in alone_s]
        for operator, inlined, less, share in zip(self.operators, self._inlined, dropped, self._shares, strict=True):
            out = records - less if inlined.gives else 0
            operator.passed(records, out, elapsed_s * share)
            records = out

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
        self._places = places + [0] * (len(lines) + 1 - len(places))
        # Code of its own: the interpreter specializes its calls for the functions of this segment.
        return FunctionType(_compiled("\n".join(lines)).replace(co_filename=title), {})


@lru_cache(maxsize=256)
def _compiled(text: str) -> CodeType:
    """Return the code of a loop; many branches have the same."""
    space: dict[str, object] = {}
    exec(compile(text, "", "exec"), space)
    run = space["run"]
    assert isinstance(run, FunctionType)
    return run.__code__


def segments_of(operators: Sequence[Operator]) -> dict[int, FusedLoop]:
    """Return the operators that can run in one loop, by the place of the first operator; never a single one."""
    segments: dict[int, FusedLoop] = {}
    parts: list[InlineCode] = []
    for place, operator in enumerate([*operators, None]):
        has_key = any(part.sets_key for part in parts)
        is_alone = operator is None or operator.keep_failed is not None  # it takes the time of each record
        inlined = None if operator is None or is_alone else operator.inlined(has_key=has_key)
        if inlined is not None:
            parts.append(inlined)
            if inlined.gives:
                continue
            place += 1
        start = place - len(parts)
        if len(parts) > 1:
            segments[start] = FusedLoop(operators[start:place], parts)
        parts = []
    return segments
