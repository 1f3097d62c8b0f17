"""The contract of an operator, and the one loop that calls users' functions."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from time import time
from typing import TYPE_CHECKING, Any, ClassVar, TypeVar

from sage._forks import leave_if_forked
from sage._operators.costs import Costs
from sage._standard_streams import is_of_output
from sage.connector import TransactionalSink
from sage.errors import CheckpointError, FunctionError, describe, hint, is_held_back, short
from sage.failure import DeadLetter, FailedRecord
from sage.functions import BaseFunction, is_coroutine_function
from sage.observability import OperatorMetrics
from sage.records import Batch
from sage.service import DEFAULT_METHOD, ServiceHandle, ServiceMethod
from sage.state import NO_KEY, ValuesInMemory

if TYPE_CHECKING:
    from collections.abc import Coroutine, Iterator, Mapping, Sequence

    from sage._operators.keyed_state import Changes, KeyedState
    from sage._plan.logical import FunctionSpec, Node
    from sage.functions import TaskContext
    from sage.records import BatchReading, RecordRequest
    from sage.state import Expiry, KeyState, Values


ENDED_VALUES_FACTOR = 2
"""How many values that may have ended are looked at for each record: more than a record adds to a state."""

Copied = TypeVar("Copied", bound=BaseFunction | TransactionalSink[object])


@dataclass(frozen=True, slots=True)
class InlineCode:
    """The work of an operator on one record, as lines of Python.

    Attributes:
        lines: find the record in `value`, and leave the result there; until a call returns, it stays as it is.
            `{call}`, `{state}` and `{dropped}` stand for the operator's own; the last is counted up before `continue`.
        call: the function to call.
        state: further objects that it needs.
        gives: whether a record goes on after the lines.
        sets_key: whether the lines put a key into `key`.
    """

    lines: tuple[str, ...]
    call: Callable[..., object]
    state: object = None
    gives: bool = True
    sets_key: bool = False


@dataclass(frozen=True, slots=True)
class OperatorContext:
    """The surrounding task and job of an operator.

    Attributes:
        context: the `self.ctx` of the user's function.
        span: where the operator says which list it works through.
        now: the monotonic clock of the backend, in seconds.
        wall: the time of the backend in seconds since the epoch, which may jump.
        running_s: see `Costs`.
        run_coroutine: runs a coroutine on the job's event loop and returns its result.
        run_to_end: does the same for one that closes something, and that a cancel of the job does not end.
        post: has the job's event loop call something soon.
        is_alone: whether no other task runs the operator, so that an instance that the user gave serves it as it is.
    """

    context: TaskContext
    span: BatchReading
    now: Callable[[], float]
    wall: Callable[[], float]
    running_s: Callable[[float], float]
    run_coroutine: Callable[[Coroutine[object, object, object]], object]
    run_to_end: Callable[[Coroutine[object, object, object]], object]
    post: Callable[[Callable[[], None]], None]
    is_alone: bool = False


@dataclass(frozen=True, slots=True)
class Recovery:
    """An operator's part of a durable job, as its last checkpoint has it.

    Attributes:
        part: names the task; the same after a restart, and different for all other tasks and jobs.
        checkpoint: the number of the checkpoint, or 0 without one.
        state: the state that `snapshot` returned, or None.
        left: records that wait for a call that was held back, each batch after the input that it came from.
        function: what the function's own `snapshot` returned, or None.
        since: the number of the first checkpoint with changes, or None.
        changes: what `KeyedState.take` pickled at each checkpoint since then.
        held: how many records of `state` and `left` will be counted as taken.
        is_settled: whether all sinks are known to have committed the checkpoint.
    """

    part: str
    checkpoint: int = 0
    state: Any = None
    left: tuple[tuple[int, Batch], ...] = ()
    function: object = None
    since: int | None = None
    changes: Sequence[Changes] = ()
    held: int = 0
    is_settled: bool = False


LOST_MAX = 20
"""How many records that failed an operator keeps for the report."""

Loop = Callable[[Iterable[object], Callable[..., Any], list[object]], None]
"""Calls a function with records, one after another, and adds the results to a list."""


def into_list(records: Iterable[object], function: Callable[..., object], out: list[object]) -> None:
    """Add the result for each record."""
    # CPython 3.11 runs a plain loop with append fastest for Python functions, and unlike a comprehension it keeps the
    # results before an exception.
    for value in records:
        out.append(function(value))


class Operator:
    """Runs one node of the graph in one task, on the thread of that task.

    The task calls `open`, then `process` with batches, then `finish` if the input ended by itself, then `close`. After
    each call it takes the values of these attributes.

    Attributes:
        rest: records that were not processed, because the span was cut or the function is to be tried again.
        more: whether `resume` has to be called before anything else is processed, or `finish` once more.
        wake_at: when a record is to be tried again.
        letters: dead letters to be sent.
        failure: the error that ends the job, once the results before it have gone on.
        given_back: how many records got no result, as a call that they need was held back; the task sets it to 0.
        metrics: the counts of this operator.
        keeps_records: whether the records that it emits are those that it gets.
        held: how many records were taken in and not handed on; see `BufferingOperator`.
        due: when the first operator of a task has something to do although nobody wakes the task, on the backend's
            clock, or None.
        is_quiet: whether nothing of the user's runs for the operator between steps.
        costs: how long its calls took lately.
        concurrency: how many records it works on at a time.
        wake: makes the task step again; any thread may call that of the first operator of a task.
        now: the monotonic clock of the backend, in seconds.
        shared_s: its part of the time in loops of several operators, in seconds.
        recovery: its part of a durable job, set before `open`; None in any other job.
        left: in a durable job, records whose call was held back, kept for the next run, each batch after the input
            that it came from; None in any other job.
        port: the input of the batch in hand, if the operator has several.
        keyed: in a durable job, the values of its keys; None in any other job, or without any.
        keep_failed: keeps a record that failed, for `sage replay`; None if the calls of the job are not recorded.
        began_at: when the function was called with the record in hand, in seconds since the epoch; 0.0 if nothing
            keeps the record.
    """

    keeps_records: ClassVar[bool] = False
    concurrency: int = 1
    held: int = 0
    due: float | None = None
    is_quiet: bool = True
    recovery: Recovery | None = None
    left: list[tuple[int, Batch]] | None = None
    port: int = 0
    keyed: KeyedState | None = None
    _has_states: bool = False
    _expiries: Sequence[Expiry] = ()
    keep_failed: Callable[[FailedRecord], None] | None = None
    began_at: float = 0.0

    def __init__(self, node: Node, surroundings: OperatorContext) -> None:
        self.node = node
        self.context = surroundings.context
        self.span = surroundings.span
        self.rest: Batch | None = None
        self.more = False
        self.wake_at: float | None = None
        self.letters: list[DeadLetter] = []
        self.failure: BaseException | None = None
        self.given_back = 0
        self.metrics = OperatorMetrics(node.name)
        self.costs = Costs(surroundings.running_s)
        self.wake: Callable[[], None] = lambda: None
        self.now = surroundings.now
        self.shared_s = 0.0
        self._surroundings = surroundings
        self._attempts = 0
        self._function: Any = None
        self._sees_keys = False

    def open(self) -> None:
        """Build the user's function and call its `open`."""
        if self.node.function is not None:
            self._function = self._build(self.node.function)
            if isinstance(self._function, BaseFunction):
                self._bind_states(self.node.function.states)
                self._call_now(self._function.open)
        self.prepare()

    def _bind_states(self, states: Mapping[str, KeyState]) -> None:
        """Give the function its states of keys."""
        if not states:
            return
        values: Values = ValuesInMemory()
        if self.recovery is not None:
            from sage._operators.keyed_state import KeyedState

            values = self.keyed = KeyedState(self.recovery.since, self.recovery.changes)
        self._has_states = True
        self.forget_key()
        now = self._surroundings.now
        # A clock that is set back or forth while the job runs changes nothing.
        began_at = self._surroundings.wall() - now()
        bound = [
            state.bind(self._function, values, self.context, lambda: began_at + now()) for state in states.values()
        ]
        self._expiries = [expiry for expiry in bound if expiry is not None]

    def remove_ended(self, values_max: int) -> None:
        """Remove values of states with `ttl_s` that have ended, at most so many of each state."""
        for expiry in self._expiries:
            expiry.go_on(values_max)

    def forget_key(self) -> None:
        """Let the states of the function be refused, as no record is in hand."""
        if self._has_states:
            self.context.key = NO_KEY

    @property
    def is_costly(self) -> bool:
        """Whether an interrupt keeps the operator from further calls, so that records that wait are not processed."""
        return self.costs.are_high

    @property
    def record_s(self) -> float:
        """How many seconds pass for each record, as many as are worked on at a time; 0 if that is not known."""
        return (self.costs.typical_s or 0.0) / self.concurrency

    def prepare(self) -> None:
        """Bind the callables of `process`; the function is open."""

    def process(self, batch: Batch, port: int) -> Batch:
        """Return the results, and leave unprocessed records in `rest`.

        Args:
            batch: the records; not to be changed.
            port: the input they come from.
        """
        raise NotImplementedError

    def inlined(self, *, has_key: bool) -> InlineCode | None:  # noqa: ARG002
        """Return the operator's work on one record, or None if it needs the batch.

        Args:
            has_key: whether records have got a key in the same loop.
        """
        return None

    def resume(self) -> Batch:
        """Return more results of the last record; called while `more` is set."""
        raise NotImplementedError

    def finish(self) -> Batch | None:
        """Return the records to emit when all inputs have ended by themselves; called again while `more` is set."""
        return None

    def snapshot(self, number: int) -> tuple[object, int]:  # noqa: ARG002
        """Return the state for checkpoint `number`, or None, and how many records are done; negative if they wait."""
        return None, 0

    @property
    def takes_part(self) -> bool:
        """Whether the function has a state of its own in checkpoints."""
        return all(callable(getattr(type(self._function), name, None)) for name in ("snapshot", "restore"))

    def function_state(self) -> object:
        """Return what the function's own `snapshot` returns, or None without one."""
        if not self.takes_part:
            return None
        self.forget_key()
        return self._function.snapshot()

    def restore_function(self) -> None:
        """Give the function the state that it had.

        Raises:
            CheckpointError: it has none any more.
        """
        assert self.recovery is not None
        if self.recovery.since is not None and self.keyed is None:
            text = f'operator "{self.node.name}" has states of keys in the checkpoint, and its function has none'
            raise hint(CheckpointError(text, operator=self.node.name, fault="user"), "Give them back to the function.")
        if self.recovery.function is None:
            return
        if not self.takes_part:
            text = f'the function of operator "{self.node.name}" has a state in the checkpoint, and no restore()'
            raise hint(CheckpointError(text, operator=self.node.name, fault="user"), "Give it back both methods.")
        self._function.restore(self.recovery.function)

    def recover(self) -> None:
        """Take in the records of `recovery`; called on the task's thread before the first record flows."""

    @property
    def may_be_cut(self) -> bool:
        """Whether `snapshot` can give the place in the results of the last record, if `resume` is to be called."""
        return False

    def committed(self, number: int) -> None:
        """Act on the completion of checkpoint `number`."""

    def leave(self, batch: Batch) -> None:
        """Count records whose call was held back, or keep them for the next run."""
        if self.left is None:
            self.given_back += len(batch)
        else:
            self.left.append((self.port, batch))

    def drop(self) -> int:
        """Forget held records, cancel running calls, and return the number of records."""
        return 0

    def hold_back(self) -> None:
        """Begin no further call from now on; any thread may call this."""

    def where(self) -> str:
        """Return where coroutines of the operator stand, for a person."""
        return ""

    @property
    def closes(self) -> bool:
        """Whether `close` has something to do."""
        return isinstance(self._function, BaseFunction) or type(self).close is not Operator.close

    def close(self) -> None:
        """Close the user's function; called once if `open` began."""
        if isinstance(self._function, BaseFunction):
            self.forget_key()
            close: Callable[[], object] = self._function.close
            closing = close()
            if inspect.iscoroutine(closing):
                self._surroundings.run_to_end(closing)

    @property
    def is_function_class(self) -> bool:
        """Whether the function is an instance of a class with `execute`, and not a plain callable."""
        return hasattr(type(self._function), "execute")

    def callable_of(self, method: str = "execute") -> Callable[..., object]:
        """Return the callable for a record; a coroutine function is called and run to its end."""
        target = self.target_of(method)
        if is_coroutine_function(target):
            run = self._surroundings.run_coroutine
            return lambda *args: run(target(*args))
        return target

    def target_of(self, method: str = "execute") -> Callable[..., object]:
        """Return the user's own callable for a record: a method of the function, or the function itself."""
        function = self._function
        if isinstance(function, ServiceMethod):
            resolved: Callable[..., object] = function.resolve()
            return resolved
        if isinstance(function, ServiceHandle):
            function = getattr(function, DEFAULT_METHOD)
        target: Callable[..., object] = getattr(function, method) if hasattr(function, method) else function
        self._sees_keys = isinstance(function, BaseFunction)
        return target

    def apply(
        self,
        batch: Batch,
        loop: Loop,
        function: Callable[..., object],
        out: list[object],
    ) -> Batch:
        """Run `loop` over the records and return those that were done.

        It ends early when the span is cut, when a record is to be tried again and when one fails the job; the remaining
        records are in `rest` then, and an error in `failure`. Records that failed and were dropped are not returned.

        Args:
            batch: the records.
            loop: calls the function, and adds to `out`. It is called again with the records after one that
                failed, for which it must have added nothing.
            function: the function that the loop calls.
            out: the list that the loop adds to.
        """
        values, span = batch.values, self.span
        total = len(values)
        begun = 0
        dropped: set[int] = set()
        if self._expiries:
            self.remove_ended(ENDED_VALUES_FACTOR * total)
        while True:
            reading = span.begin(values if begun == 0 else values[begun:])
            records = reading if self.keep_failed is None else self._timed(reading)
            if self._sees_keys and batch.keys is not None:
                records = _telling_keys(records, batch.keys[begun:], self.context)
            try:
                loop(records, function, out)
                done = total - len(span.end())
                break
            except BaseException as error:  # every failure of a user's function is owned here
                leave_if_forked(error)
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

    def _timed(self, reading: Iterator[object]) -> Iterator[object]:
        """Yield the records, and keep the time at which the function gets each."""
        for value in reading:
            self.began_at = time()
            yield value

    def _goes_on(self, batch: Batch, place: int, error: BaseException) -> bool:
        """Apply the policy to a failed record and return whether the next one follows at once."""
        # A record that is tried again is the first of its batch: earlier counts belong to another record.
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
        if retry is None or attempts >= retry.attempts_max or not isinstance(error, Exception) or is_of_output(error):
            return None
        if is_held_back(error):
            return None
        return retry.pause_s(attempts)

    def fails_job(self, error: BaseException, request: RecordRequest | None) -> bool:
        """Return whether a record of this request, or of None, fails the job with this error.

        If the reader of the job's output has gone, the job ends regardless of the policy: each of its records would
        fail.
        """
        if not isinstance(error, Exception) or (isinstance(error, BrokenPipeError) and is_of_output(error)):
            return True
        return request is None and self.node.on_error.then == "fail" and not is_held_back(error)

    def give_up(self, batch: Batch, place: int, error: BaseException, attempts: int) -> bool:
        """Apply the policy to a record that is not tried again.

        Returns:
            Whether the next record follows; if not, `failure` is set.
        """
        request = batch.requests[place] if batch.requests is not None else None
        if request is not None and isinstance(error, Exception):
            request.fail(error)
        if is_held_back(error):
            self.leave(batch.slice(place, place + 1))
            self.metrics.records_in -= 1  # whoever goes on counts it as taken
            return True
        self.metrics.failed += 1
        if len(self.metrics.lost) < LOST_MAX:
            self.metrics.lost.append((short(batch.values[place]), describe(error)))
        keys = () if batch.keys is None else (batch.keys[place],)
        if self.keep_failed is not None and isinstance(error, Exception):
            failed = FailedRecord(batch.values[place], keys, self.port, self.node.name, error, self.began_at)
            self.keep_failed(failed)
        if not self.fails_job(error, request):
            if request is None and self.node.on_error.then == "letters":
                letter = DeadLetter(batch.values[place], error, self.node.name, attempts, keys, self.port)
                self.letters.append(letter)
            return True
        self.metrics.fatal += 1
        self.failure = self.blame(error, batch.values[place], attempts)
        return False

    def cannot_send(self, record: Batch, error: Exception) -> FunctionError | None:
        """Apply the policy to a record that the operator gave and that cannot be sent to another process.

        The function is not called again for it, even with a `Retry`.

        Returns:
            The error that fails the job, or None if it goes on without the record.
        """
        value = record.values[0]
        text = f'operator "{self.node.name}" gave a record of type {type(value).__name__}, {short(value)}'
        failed = FunctionError(f"{text}, that cannot be sent: {describe(error)}", operator=self.node.name)
        failed.record = short(value)
        failed.__cause__ = error
        hint(failed, "Objects sent to another process are pickled. Send the data it is made from instead.")
        request = record.requests[0] if record.requests is not None else None
        if self.fails_job(failed, request):
            self.metrics.failed += 1
            return failed
        self.give_up(record, 0, failed, 1)
        return None

    def passed(self, records: int, out: int, elapsed_s: float) -> None:
        """Count records that went through a loop of several operators, their outcome, and this one's part of the time.

        A part of 0 s is not known.
        """
        metrics = self.metrics
        metrics.records_in += records
        metrics.records_out += out
        metrics.busy_s += elapsed_s
        self.shared_s += elapsed_s
        if records:
            self._attempts = 0
            if elapsed_s:
                self.costs.measured(records, elapsed_s)

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

    def blame(self, error: BaseException, record: object, attempts: int = 1) -> FunctionError:
        """Return the error that names this operator and the record, with the original as its cause."""
        times = f" after {attempts} attempts" if attempts > 1 else ""
        blamed = FunctionError(
            f'operator "{self.node.name}" failed on record {short(record)}{times}: {describe(error)}',
            operator=self.node.name,
        )
        blamed.record = short(record)
        blamed.__cause__ = error
        return blamed

    def blame_hook(self, what: str, error: BaseException) -> FunctionError:
        """Return the error that names this operator, for a failure outside of any record."""
        name = self.node.name
        blamed = FunctionError(f'operator "{name}" failed to {what}: {describe(error)}', operator=name)
        blamed.__cause__ = error
        return blamed

    def _build(self, spec: FunctionSpec) -> object:
        target = spec.target
        if spec.is_class:
            target = target(*spec.args, **spec.kwargs)
        elif isinstance(target, BaseFunction | TransactionalSink) and not self._surroundings.is_alone:
            target = _copy(target, self.node.name)
        if isinstance(target, BaseFunction):
            target.ctx = self.context
        return target

    def _call_now(self, method: Callable[[], object]) -> object:
        result = method()
        return self._surroundings.run_coroutine(result) if inspect.iscoroutine(result) else result


def _telling_keys(records: Iterator[object], keys: Sequence[object], context: TaskContext) -> Iterator[object]:
    """Yield the records, with the key of each in the context."""
    for value, context.key in zip(records, keys, strict=False):
        yield value


def _copy(function: Copied, operator: str) -> Copied:
    from copy import deepcopy

    try:
        return deepcopy(function)
    except Exception as error:
        name = type(function).__name__
        failed = FunctionError(f'operator "{operator}" cannot copy its {name} for each task: {describe(error)}')
        raise hint(failed, f"Give the class {name} with its arguments, and each task builds its own.") from error
