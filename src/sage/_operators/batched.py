"""Functions that are called with many records at once."""

from __future__ import annotations

import importlib
from collections import deque
from itertools import chain, repeat
from operator import countOf
from time import time
from typing import TYPE_CHECKING, Any, TypeVar

from sage._operators.holder import BufferingOperator
from sage.errors import FunctionError, describe, hint, short
from sage.records import Batch

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence

    from sage._operators.operator import OperatorContext
    from sage._plan.logical import Node

X = TypeVar("X")

RUN_S = 0.0025
"""A function is called again in the same step until so many seconds are over: a step costs as much as ten records."""


class MapBatches(BufferingOperator):
    """As many records out as in, from a function that gets them as one list or array.

    Records wait until there are enough of them, the oldest has waited long enough, or the input has ended.
    A batch that is to be tried again stays as it is, before later records.
    """

    def __init__(self, node: Node, surroundings: OperatorContext) -> None:
        super().__init__(node, surroundings)
        self._records_max: int = node.settings["max_records"]
        self._wait_s: float = node.settings["max_wait_s"]
        self._waiting: deque[Batch] = deque()
        self._again: Batch | None = None
        self.concurrency = self._records_max
        self._called_with: int = self._records_max
        self._usual: type = type(None)

    @property
    def record_s(self) -> float:
        """How many seconds pass for each record of a batch."""
        return (self.costs.typical_s or 0.0) / self._called_with

    def prepare(self) -> None:
        """Bind the function and, unless it is a list, the constructor of its argument."""
        self._call = self.callable_of()
        self._pack: Callable[[Sequence[object]], object] | None = None
        if self.node.settings["batch_format"] == "numpy":
            self._pack = importlib.import_module("numpy").asarray

    @property
    def has_room(self) -> bool:
        """Whether fewer records wait than one call takes."""
        return self.held < self._records_max

    def take(self, batch: Batch) -> None:
        if not self.held:
            self.due = self._surroundings.now() + self._wait_s
        self.held += len(batch)
        self._waiting.append(batch)

    def hand_on(self, *, is_all: bool, has_ended: bool) -> Batch | None:
        """Call the function if it is time, and return its results; a fast one is called several times."""
        if self._again is not None and self.due is not None and self._surroundings.now() < self.due:
            return None
        batch = self._again or self._next(is_all=is_all, has_ended=has_ended)
        if batch is None:
            return None
        self._again = None
        size = min(len(batch), self._records_max)
        results: list[object] = []
        came = self._call_with(batch, size, results)
        done = len(results)
        out = batch if done == len(batch) else batch.slice(0, done)
        if done:
            self._count_off(done)
            self.metrics.records_in += done
        beyond = done if came is None else done + size
        if beyond < len(batch):
            self._waiting.appendleft(batch.slice(beyond))
        if came is None:
            return out.replace(results)
        self._attempts += 1
        given = self._settled(batch.slice(done, beyond), came)
        if not done:
            return given
        return joined([out.replace(results), *filter(None, [given])])

    def _call_with(self, batch: Batch, size: int, results: list[object]) -> BaseException | list[object] | None:
        """Call the function with `size` records at a time, for a while, and add the results of calls that succeed.

        Returns:
            The error of the call that failed, or its results if there are errors among them, or None.
        """
        call, pack, span, now = self._call, self._pack, self.span, self._surroundings.now
        values = batch.values if type(batch.values) is list else list(batch.values)
        self.costs.begins()
        began_at = now()
        until = began_at + RUN_S
        came: BaseException | list[object] | None = None
        usual = self._usual
        start = 0
        for start in range(0, len(values), size):
            argument = values[start : start + size]
            if self.keep_failed is not None:
                self.began_at = time()
            try:
                given = call(argument if pack is None else pack(argument))
                if type(given) is not list or len(given) != size:
                    given = self._checked(given, size)
            except BaseException as error:  # the policy of the operator decides
                came = error
                break
            if countOf(map(type, given), usual) != size:  # most results are of one type
                if _has_errors(given):
                    came = given
                    break
                usual = type(given[0])
            results += given
            if span.is_cut or now() >= until:
                break
        self._usual = usual
        self._called_with = size
        self.costs.measured(start // size + 1, now() - began_at)
        return came

    def _settled(self, batch: Batch, came: BaseException | list[object]) -> Batch | None:
        """Apply the policy to the batch of a call that failed, and return the results that it has all the same."""
        if isinstance(came, BaseException):
            return None if self._tries_again(batch, came) else self._given_up(batch, came)
        errors = {place: result for place, result in enumerate(came) if isinstance(result, BaseException)}
        return None if self._tries_again(batch, _gravest(errors)) else self._without(batch, came, errors)

    def _tries_again(self, batch: Batch, error: BaseException) -> bool:
        """Return whether the batch is tried again, which then is its turn next."""
        pause_s = self.pause_s(error, self._attempts)
        if pause_s is None:
            return False
        self._again = batch
        self.due = self._surroundings.now() + pause_s
        return True

    def drop(self) -> int:
        held, self.held = self.held, 0
        self._waiting.clear()
        self._again = self.due = None
        return held

    def give_back(self) -> int:
        """Forget waiting records, or keep them for the next run; between steps, the function is not running."""
        if self.left is not None:
            self.left += [(0, batch) for batch in self._held()]
        dropped = self.drop()
        return dropped if self.left is None else 0

    def _held(self) -> list[Batch]:
        return [*filter(None, [self._again]), *self._waiting]

    def snapshot(self, number: int) -> tuple[object, int]:  # noqa: ARG002
        """Return the records that wait for a call."""
        return self._held() or None, -self.held

    def recover(self) -> None:
        assert self.recovery is not None
        for batch in self.recovery.state or ():
            self.take(batch)

    def _next(self, *, is_all: bool, has_ended: bool) -> Batch | None:
        """Take the records for the next call, if it is time for one."""
        is_late = is_all and self.due is not None and self._surroundings.now() >= self.due
        if not self.held or not (self.held >= self._records_max or is_late or has_ended):
            return None
        whole = len(self._waiting[0]) // self._records_max * self._records_max
        if whole:
            return self._split_off(whole)
        parts: list[Batch] = []
        missing = self._records_max
        while missing and self._waiting:
            parts.append(self._split_off(min(missing, len(self._waiting[0]))))
            missing -= len(parts[-1])
        return parts[0] if len(parts) == 1 else joined(parts)

    def _split_off(self, records: int) -> Batch:
        """Take records from the front of the batch that has waited longest."""
        first = self._waiting.popleft()
        if records == len(first):
            return first
        self._waiting.appendleft(first.slice(records))
        return first.slice(0, records)

    def _count_off(self, records: int) -> None:
        self._attempts = 0
        self.held -= records
        # The remaining records came with the last batch at the earliest, so their waiting time begins now.
        self.due = self._surroundings.now() + self._wait_s if self.held else None

    def _without(self, batch: Batch, results: list[object], errors: dict[int, BaseException]) -> Batch:
        """Return the results, and apply the policy to each record that has an error in the place of one."""
        attempts = self._attempts
        self._count_off(len(batch))
        end = len(batch)
        for place, error in errors.items():
            if not self.give_up(batch, place, error, attempts):
                # As where records are processed alone: those after it count as undelivered.
                self.rest = batch.slice(place + 1)
                end = place
                break
        self.metrics.records_in += end
        return batch.slice(0, end).replace(results[:end]).select([place not in errors for place in range(end)])

    def _given_up(self, batch: Batch, error: BaseException) -> Batch:
        """Apply the policy to every record of a batch that failed."""
        attempts = self._attempts
        self._count_off(len(batch))
        for place in range(len(batch)):
            if not self.give_up(batch, place, error, attempts):
                self.metrics.failed += len(batch) - place - 1
                self.metrics.fatal += len(batch) - place - 1
                self.failure = self._blamed(batch, error, attempts)
                return Batch([])
        self.metrics.records_in += len(batch)
        return Batch([])

    def _blamed(self, batch: Batch, error: BaseException, attempts: int) -> FunctionError:
        times = f" after {attempts} attempts" if attempts > 1 else ""
        count = f"{len(batch)} record" + ("s" if len(batch) > 1 else "")
        first = short(batch.values[0])
        text = f'operator "{self.node.name}" failed on {count} from {first} on{times}: {describe(error)}'
        blamed = FunctionError(text, operator=self.node.name)
        blamed.record = first
        blamed.__cause__ = error
        return blamed

    def _checked(self, results: Any, count: int) -> list[object]:
        """Return the results as a list, if there is one for each record."""
        has_length = getattr(results, "ndim", hasattr(results, "__len__"))  # an array may have no dimension
        if isinstance(results, str | bytes | dict | set | frozenset) or not has_length:
            wrong = TypeError(f"{count} records went in, and a {type(results).__name__} came out")
            raise hint(wrong, "Return a list, a tuple or an array with one result for each record, in their order.")
        if len(results) != count:
            wrong_length = ValueError(f"{count} records went in, and {len(results)} results came out")
            raise hint(wrong_length, "The function returns one result for each record, in their order.")
        return list(results)


def _has_errors(results: list[object]) -> bool:
    """Return whether an error stands in the place of a result."""
    return any(issubclass(kind, BaseException) for kind in set(map(type, results)))


def _gravest(errors: dict[int, BaseException]) -> BaseException:
    """Return the error that decides about another attempt: the end of the interpreter, or else the first one."""
    first = next(iter(errors.values()))
    return next((error for error in errors.values() if not isinstance(error, Exception)), first)


def joined(parts: list[Batch]) -> Batch:
    """Return the records of several batches; where only some have keys or requests, the others have None."""

    def lane(lanes: Iterable[Sequence[X] | None]) -> list[X | None] | None:
        there = list(lanes)
        if all(part is None for part in there):
            return None
        sizes = map(len, parts)
        return list(chain.from_iterable(part or repeat(None, size) for part, size in zip(there, sizes, strict=True)))

    values = list(chain.from_iterable(part.values for part in parts))
    return Batch(values, lane(part.keys for part in parts), lane(part.requests for part in parts))
