"""The contract of an operator, and the one loop that calls users' functions."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from sage.errors import FunctionError, describe, hint, short
from sage.failure import DeadLetter
from sage.functions import BaseFunction, is_coroutine_function
from sage.observability import OperatorMetrics
from sage.records import Batch
from sage.service import DEFAULT_METHOD, ServiceHandle, ServiceMethod

if TYPE_CHECKING:
    from collections.abc import Coroutine, Iterator

    from sage._operators.fused import Inlined
    from sage._plan.logical import Node
    from sage.functions import TaskContext
    from sage.records import Span


@dataclass(frozen=True, slots=True)
class Surroundings:
    """What an operator gets of the task and the job around it.

    Attributes:
        context: what the user's function sees as `self.ctx`.
        span: where the operator says which list it works through.
        now: the monotonic clock of the backend, in seconds.
        run_coroutine: runs a coroutine on the job's event loop and returns its result.
        post: has the job's event loop call something soon.
        is_alone: whether no other task runs the operator, so that an instance that the user gave serves it as it is.
    """

    context: TaskContext
    span: Span
    now: Callable[[], float]
    run_coroutine: Callable[[Coroutine[Any, Any, Any]], Any]
    post: Callable[[Callable[[], None]], None]
    is_alone: bool = False


Loop = Callable[[Iterable[Any], Callable[..., Any], list[Any]], None]
"""Calls a function with records, one after another, and adds what comes of it to a list."""


def into_list(records: Iterable[Any], function: Callable[..., Any], out: list[Any]) -> None:
    """Add the result for each record."""
    # CPython 3.11 runs a plain loop with append fastest for Python functions, and unlike a comprehension it keeps what
    # was done before an exception.
    for value in records:
        out.append(function(value))


class Operator:
    """Runs one node of the graph in one task, on the thread of that task.

    The task calls `open`, then `process` with batches, then `finish` if the input ended by itself, then `close`. After
    each call it takes what these attributes hold.

    Attributes:
        rest: records that were not processed, because the span was cut or the function is to be tried again.
        more: whether `resume` has to be called before anything else is processed, or `finish` once more.
        wake_at: when a record is to be tried again.
        letters: dead letters to be sent.
        failure: the error that ends the job, once what came before it has gone on.
        metrics: the counts of this operator.
    """

    def __init__(self, node: Node, surroundings: Surroundings) -> None:
        self.node = node
        self.context = surroundings.context
        self.span = surroundings.span
        self.rest: Batch | None = None
        self.more = False
        self.wake_at: float | None = None
        self.letters: list[DeadLetter] = []
        self.failure: BaseException | None = None
        self.metrics = OperatorMetrics(node.name)
        self._surroundings = surroundings
        self._attempts = 0
        self._function: Any = None
        self._sees_keys = False

    def open(self) -> None:
        """Build the user's function and call its `open`."""
        if self.node.function is not None:
            self._function = self._build(self.node.function.target)
            if isinstance(self._function, BaseFunction):
                self._call_now(self._function.open)
        self.prepare()

    def prepare(self) -> None:
        """Bind what `process` calls; the function is open."""

    def process(self, batch: Batch, port: int) -> Batch:
        """Return what goes on, and leave what was not processed in `rest`.

        Args:
            batch: the records; not to be changed.
            port: the input they come from.
        """
        raise NotImplementedError

    def inlined(self, *, has_key: bool) -> Inlined | None:  # noqa: ARG002
        """Return what the operator does with one record, or None if it needs the batch.

        Args:
            has_key: whether records have got a key in the same loop.
        """
        return None

    def resume(self) -> Batch:
        """Return more of what the last record gives; called while `more` is set."""
        raise NotImplementedError

    def finish(self) -> Batch | None:
        """Return what is emitted when all inputs have ended by themselves; called again while `more` is set."""
        return None

    def close(self) -> None:
        """Close the user's function; called once if `open` began."""
        if isinstance(self._function, BaseFunction):
            self._call_now(self._function.close)

    def callable_of(self, method: str = "execute") -> Callable[..., Any]:
        """Return what to call with a record; a coroutine function is called and run to its end."""
        target = self.target_of(method)
        if is_coroutine_function(target):
            run = self._surroundings.run_coroutine
            return lambda *args: run(target(*args))
        return target

    def target_of(self, method: str = "execute") -> Callable[..., Any]:
        """Return what the user wrote to be called with a record: a method of the function, or the function itself."""
        function = self._function
        if isinstance(function, ServiceMethod):
            return function.resolve()
        if isinstance(function, ServiceHandle):
            function = getattr(function, DEFAULT_METHOD)
        target: Callable[..., Any] = getattr(function, method) if hasattr(function, method) else function
        self._sees_keys = isinstance(function, BaseFunction)
        return target

    def apply(
        self,
        batch: Batch,
        loop: Loop,
        function: Callable[..., Any],
        out: list[Any],
    ) -> Batch:
        """Run `loop` over the records and return those that were done.

        It ends early when the span is cut, when a record is to be tried again and when one fails the job; what was not
        done is in `rest` then, and an error in `failure`. Records that failed and were dropped are not returned.

        Args:
            batch: the records.
            loop: calls the function, and adds to `out`. It is called again with what is left after a record that
                failed, for which it must have added nothing.
            function: what the loop calls.
            out: what the loop adds to.
        """
        values, span = batch.values, self.span
        total = len(values)
        begun = 0
        dropped: set[int] = set()
        while True:
            reading = span.begin(values if begun == 0 else values[begun:])
            records = reading
            if self._sees_keys and batch.keys is not None:
                records = _telling_keys(reading, batch.keys[begun:], self.context)
            try:
                loop(records, function, out)
                done = total - len(span.end())
                break
            except BaseException as error:  # every failure of a user's function is owned here
                # The iterator knows the place of the record that failed, for nothing.
                done = total - len(span.end()) - 1
                if not self._goes_on(batch, done, error):
                    break
                dropped.add(done)
                begun = done = done + 1
                if span.is_cut or begun == total:
                    break
        if done and self.wake_at is None:
            self._attempts = 0
        if done < total:
            # The record that fails the job is named by the error; those after it count as undelivered.
            self.rest = batch.slice(done if self.failure is None else done + 1)
            batch = batch.slice(0, done)
        self.metrics.records_in += done
        return batch.select([place not in dropped for place in range(done)]) if dropped else batch

    def _goes_on(self, batch: Batch, place: int, error: BaseException) -> bool:
        """Apply the policy to a failed record and return whether the next one follows at once."""
        # A record that is tried again is the first of its batch: what was counted before this one was another's.
        self._attempts = 1 if place else self._attempts + 1
        pause_s = self.pause_s(error, self._attempts)
        if pause_s is not None:
            self.wake_at = self._surroundings.now() + pause_s
            return False
        attempts, self._attempts = self._attempts, 0
        return self.give_up(batch, place, error, attempts)

    def pause_s(self, error: BaseException, attempts: int) -> float | None:
        """Return after how many seconds a record that failed so often is tried again, or None if it is not."""
        retry = self.node.on_error.retry
        if retry is None or attempts >= retry.attempts_max or not isinstance(error, Exception):
            return None
        return retry.pause_s(attempts)

    def fails_job(self, error: BaseException, request: Any) -> bool:
        """Return whether a record of this request, or of None, fails the job with this error."""
        return not isinstance(error, Exception) or (request is None and self.node.on_error.then == "fail")

    def give_up(self, batch: Batch, place: int, error: BaseException, attempts: int) -> bool:
        """Do what the policy says of a record that is not tried again.

        Returns:
            Whether the next record follows; if not, `failure` is set.
        """
        request = batch.requests[place] if batch.requests is not None else None
        self.metrics.failed += 1
        if request is not None and isinstance(error, Exception):
            request.fail(error)
        if not self.fails_job(error, request):
            if request is None and self.node.on_error.then == "letters":
                letter = DeadLetter(batch.values[place], error, self.node.name, attempts)
                self.letters.append(letter)
            return True
        self.failure = self.blame(error, batch.values[place], attempts)
        return False

    def passed(self, records: int, out: int) -> None:
        """Count records that went through a loop of several operators, and what came of them."""
        self.metrics.records_in += records
        self.metrics.records_out += out
        if records:
            self._attempts = 0

    def fail_alone(self, record: Batch, error: BaseException) -> bool:
        """Apply the policy to the one record that failed in a loop of several operators.

        Returns:
            Whether the next record follows at once.
        """
        goes_on = self._goes_on(record, 0, error)
        if goes_on:
            self.metrics.records_in += 1
        elif self.failure is None:
            self.rest = record
        return goes_on

    def blame(self, error: BaseException, record: Any, attempts: int = 1) -> FunctionError:
        """Return the error that names this operator and the record, with the original as its cause."""
        times = f" after {attempts} attempts" if attempts > 1 else ""
        blamed = FunctionError(
            f'operator "{self.node.name}" failed on record {short(record)}{times}: {describe(error)}',
            operator=self.node.name,
        )
        blamed.record = short(record)
        blamed.__cause__ = error
        return blamed

    def _build(self, target: Any) -> Any:
        spec = self.node.function
        assert spec is not None
        if spec.is_class:
            target = target(*spec.args, **spec.kwargs)
        elif isinstance(target, BaseFunction) and not self._surroundings.is_alone:
            target = _copy(target, self.node.name)
        if isinstance(target, BaseFunction):
            target.ctx = self.context
        return target

    def _call_now(self, method: Callable[[], Any]) -> Any:
        result = method()
        return self._surroundings.run_coroutine(result) if inspect.iscoroutine(result) else result


def _telling_keys(reading: Iterator[Any], keys: list[Any], context: TaskContext) -> Iterator[Any]:
    """Yield what is read, with the key of each in the context."""
    for value, context.key in zip(reading, keys, strict=False):
        yield value


def _copy(function: BaseFunction, operator: str) -> BaseFunction:
    from copy import deepcopy

    try:
        return deepcopy(function)
    except Exception as error:
        name = type(function).__name__
        failed = FunctionError(f'operator "{operator}" cannot copy its {name} for each task: {describe(error)}')
        raise hint(failed, f"Give the class {name} with its arguments, and each task builds its own.") from error
