"""Functions that are called with many records at once."""

from __future__ import annotations

import importlib
from collections import deque
from itertools import chain
from typing import TYPE_CHECKING, Any

from sage._operators.holder import Holder
from sage.errors import FunctionError, describe, hint, short
from sage.records import Batch

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence

    from sage._operators.operator import Surroundings
    from sage._plan.logical import Node


class MapBatches(Holder):
    """As many records out as in, from a function that gets them as one list or array.

    What was taken in waits until there are enough records, the oldest has waited long enough, or the input has ended.
    A batch that is to be tried again stays as it is, in front of what came after it.
    """

    def __init__(self, node: Node, surroundings: Surroundings) -> None:
        super().__init__(node, surroundings)
        self._records_max: int = node.settings["max_records"]
        self._wait_s: float = node.settings["max_wait_s"]
        self._waiting: deque[Batch] = deque()
        self._again: Batch | None = None

    def prepare(self) -> None:
        """Bind the function, and what makes its argument."""
        self._call = self.callable_of()
        self._pack: Callable[[Sequence[Any]], Any] = list
        if self.node.settings["batch_format"] == "numpy":
            self._pack = importlib.import_module("numpy").asarray

    @property
    def has_room(self) -> bool:
        """Whether fewer records wait than one call takes."""
        return self.held < self._records_max

    def take(self, batch: Batch) -> None:
        """Put records behind those that wait."""
        if not self.held:
            self.due = self._surroundings.now() + self._wait_s
        self.held += len(batch)
        # In parts at once: a rest that is cut again for each call would be copied as often.
        for start in range(0, len(batch), self._records_max):
            self._waiting.append(batch.slice(start, start + self._records_max))

    def hand_on(self, *, is_all: bool, has_ended: bool) -> Batch | None:
        """Call the function if it is time, and return its results."""
        batch = self._again or self._next(is_all=is_all, has_ended=has_ended)
        if batch is None or (self._again is not None and self.due is not None and self._surroundings.now() < self.due):
            return None
        self._again = None
        self._attempts += 1
        try:
            results = self._checked(self._call(self._pack(batch.values)), len(batch))
        except BaseException as error:  # the policy of the operator decides
            return None if self._tries_again(batch, error) else self._given_up(batch, error)
        errors = _errors_in(results)
        if errors:
            return None if self._tries_again(batch, _gravest(errors)) else self._without(batch, results, errors)
        self._count_off(len(batch))
        self.metrics.records_in += len(batch)
        return batch.replace(results)

    def _tries_again(self, batch: Batch, error: BaseException) -> bool:
        """Return whether the batch is tried again, which then is its turn next."""
        pause_s = self.pause_s(error, self._attempts)
        if pause_s is None:
            return False
        self._again = batch
        self.due = self._surroundings.now() + pause_s
        return True

    def drop(self) -> int:
        """Forget what waits."""
        held, self.held = self.held, 0
        self._waiting.clear()
        self._again = self.due = None
        return held

    def _next(self, *, is_all: bool, has_ended: bool) -> Batch | None:
        """Take the records for the next call, if it is time for one."""
        is_late = is_all and self.due is not None and self._surroundings.now() >= self.due
        if not self.held or not (self.held >= self._records_max or is_late or has_ended):
            return None
        parts: list[Batch] = []
        missing = self._records_max
        while missing and self._waiting:
            part = self._waiting.popleft()
            if len(part) > missing:
                self._waiting.appendleft(part.slice(missing))
                part = part.slice(0, missing)
            parts.append(part)
            missing -= len(part)
        return parts[0] if len(parts) == 1 else joined(parts)

    def _count_off(self, records: int) -> None:
        self._attempts = 0
        self.held -= records
        # What is left came with the last batch at the earliest, so it waits from now on.
        self.due = self._surroundings.now() + self._wait_s if self.held else None

    def _without(self, batch: Batch, results: list[Any], errors: dict[int, BaseException]) -> Batch:
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

    def _checked(self, results: Any, count: int) -> list[Any]:
        """Return the results as a list, if there is one for each record."""
        has_length = getattr(results, "ndim", hasattr(results, "__len__"))  # an array may have no dimension
        if isinstance(results, str | bytes | dict | set | frozenset) or not has_length:
            wrong = TypeError(f"{count} records went in, and a {type(results).__name__} came out")
            raise hint(wrong, "Return a list, a tuple or an array with one result for each record, in their order.")
        if len(results) != count:
            wrong_length = ValueError(f"{count} records went in, and {len(results)} results came out")
            raise hint(wrong_length, "The function returns one result for each record, in their order.")
        return list(results)


def _errors_in(results: list[Any]) -> dict[int, BaseException]:
    """Return the errors that stand in the place of results, by their places."""
    if not any(issubclass(kind, BaseException) for kind in set(map(type, results))):
        return {}
    return {place: result for place, result in enumerate(results) if isinstance(result, BaseException)}


def _gravest(errors: dict[int, BaseException]) -> BaseException:
    """Return the error that decides about another attempt: the end of the interpreter, or else the first one."""
    first = next(iter(errors.values()))
    return next((error for error in errors.values() if not isinstance(error, Exception)), first)


def joined(parts: list[Batch]) -> Batch:
    """Return the records of several batches; where only some have keys or requests, the others have None."""

    def lane(lanes: Iterable[list[Any] | None]) -> list[Any] | None:
        there = list(lanes)
        if all(part is None for part in there):
            return None
        sizes = map(len, parts)
        return list(chain.from_iterable(part or [None] * size for part, size in zip(there, sizes, strict=True)))

    values = list(chain.from_iterable(part.values for part in parts))
    return Batch(values, lane(part.keys for part in parts), lane(part.requests for part in parts))
