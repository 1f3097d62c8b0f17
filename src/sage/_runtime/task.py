"""A task: one parallel instance of a chain. It is a step; whoever calls the step again and again is a backend."""

from __future__ import annotations

from collections import deque
from enum import Enum
from time import perf_counter
from typing import TYPE_CHECKING, ClassVar, Protocol

from sage._operators.fused import segments_of
from sage._operators.holder import Holder
from sage._operators.sources import Reader
from sage._runtime.channel import ends
from sage._runtime.lifecycle import TaskClosing, TaskEnded, TaskFailed, TaskOpened
from sage._runtime.states import TaskState
from sage.errors import FunctionError, ServiceUnavailableError, describe
from sage.records import BATCH_RECORDS_MAX, END_OF_STREAM, Batch, Span

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from sage._operators.fused import Segment
    from sage._operators.operator import Operator
    from sage._plan.logical import Node
    from sage._runtime.channel import Channel, InFlight
    from sage._runtime.lifecycle import TaskEvent
    from sage._runtime.partition import Partitioner
    from sage.records import Element
    from sage.serving import PipelineBridge

STEP_FAST_S = 0.0025
STEP_SLOW_S = 0.010
"""A step aims at about 5 ms: below the first bound it takes more records next time, above the second fewer."""

FAILURE_WAIT_MAX_S = 1.0
"""How long a failure that is known waits for what came before it in its task, in seconds."""

IDLE_PAUSE_MIN_S = 0.001
IDLE_PAUSE_MAX_S = 0.05
"""How long a source that has nothing now is left alone; it doubles while there is nothing."""


class Step(Enum):
    """What came of a step."""

    PROGRESSED = "progressed"
    IDLE = "idle"
    BLOCKED = "blocked"
    DONE = "done"


class Phase(Enum):
    """Where a task is in its life."""

    CREATED = "created"
    OPENED = "opened"
    RUNNING = "running"
    FINISHING = "finishing"
    CLOSING = "closing"
    DONE = "done"


class Pace(Protocol):
    """How many records a step takes; tests draw it from a seed."""

    def limit(self) -> int:
        """Return how many records the next step takes at most, at least 1."""

    def measured(self, records: int, elapsed_s: float) -> None:
        """Say how long a step took."""


class TimedPace:
    """Starts with one record, and follows the measured time up to the size of a full batch."""

    def __init__(self) -> None:
        self._limit = 1

    def limit(self) -> int:
        """Return how many records the next step takes at most."""
        return self._limit

    def measured(self, records: int, elapsed_s: float) -> None:
        """Adjust to how long a step took."""
        if elapsed_s > STEP_SLOW_S:
            self._limit = max(1, self._limit // 2)
        elif elapsed_s < STEP_FAST_S and records >= self._limit:
            self._limit = min(BATCH_RECORDS_MAX, self._limit * 4)


class Output:
    """Where the records of one operator go: the channels of one consumer.

    Attributes:
        partitioner: splits batches over the channels.
        channels: one for each task of the consumer that can be reached from here.
        port: the input of the consumer.
        feedback: whether the channels close a loop, and so take in whatever comes.
        letters: whether dead letters travel here instead of records.
        enters: the counter of the loop that is entered here from outside; the end of the stream is counted off it.
    """

    def __init__(
        self, partitioner: Partitioner, channels: tuple[Channel, ...], port: int, *, feedback: bool, letters: bool
    ) -> None:
        self.partitioner = partitioner
        self.channels = channels
        self.port = port
        self.feedback = feedback
        self.letters = letters
        self.enters: InFlight | None = None


class Task:
    """Runs one parallel instance of a chain, step by step.

    `step` may be called by one thread at a time. The `request_...` methods may be called by any thread at any time;
    they set a flag and wake the task. What happens to the task is told to `report`.

    Attributes:
        name: the names of its operators, and its number where there are several.
        wake: called by whoever has something for the task; the backend sets it.
        span: the list it works through, for the watch.
        undelivered: how many records were dropped here by a stop, a cancel or a failure.
    """

    def __init__(
        self,
        name: str,
        operators: tuple[Operator, ...],
        span: Span,
        report: Callable[[TaskEvent], None],
        now: Callable[[], float],
        pace: Pace,
    ) -> None:
        self.name = name
        self.operators = operators
        self.span = span
        self.wake: Callable[[], None] = lambda: None
        self.inbox: Channel | None = None
        self.outputs: dict[int, tuple[Output, ...]] = {}
        self.producers = 0
        self.loop: InFlight | None = None
        self.lockstep: InFlight | None = None
        self.undelivered = 0
        self.phase = Phase.CREATED
        self._report = report
        self._now = now
        self._pace = pace
        self._reader = operators[0] if isinstance(operators[0], Reader) else None
        self._holder = operators[0] if isinstance(operators[0], Holder) else None
        if self._holder is not None:
            self._holder.wake = lambda: self.wake()
        self._bridge: PipelineBridge | None = self.nodes[0].settings.get("bridge")
        if self._bridge is not None:
            self._bridge.when_changed(lambda: self.wake())
        self._reads_at: float | None = None
        self._retries_at: float | None = None
        self._segments: dict[int, Segment] = {}
        self._stash: list[tuple[int, Batch | None, int]] = []
        # Failures that end the task, once no more is stashed than what came after the records that failed.
        self._failures: list[BaseException] = []
        self._stashed_after = 0
        self._fails_at = 0.0
        self._outgoing: deque[tuple[Output, int, Element]] = deque()
        self._held = 0
        self._idle_pause_s = IDLE_PAUSE_MIN_S
        self._may_open = False
        self._may_run = False
        self._stopping = False
        self._failed = False
        self._opened = 0
        self._closed = 0
        self._finished = 0
        self._last_said = False

    @property
    def nodes(self) -> tuple[Node, ...]:
        """The operators of the graph that the task runs."""
        return tuple(operator.node for operator in self.operators)

    @property
    def wake_at(self) -> float | None:
        """When to step again although nobody wakes it, in seconds of the backend's clock, or None."""
        if self._retries_at is not None or self._outgoing:
            return self._retries_at
        return self._reads_at if self._holder is None else self._holder.due

    def where(self) -> str:
        """Return where the coroutines of the task stand, for a person; what its thread does the backend knows."""
        return "" if self._holder is None else self._holder.where()

    def request_open(self) -> None:
        """Let the task build and open its functions."""
        self._may_open = True
        self.wake()

    def request_run(self) -> None:
        """Let records flow."""
        self._may_run = True
        self.wake()

    def request_stop(self) -> None:
        """End the source, or a loop that begins here; what is in flight goes on."""
        if self._bridge is not None:
            self._bridge.close()  # what was asked before is still answered
            return
        self._stopping = True
        self.span.cut()
        self.wake()

    def request_cancel(self) -> None:
        """Drop everything and close."""
        if self._bridge is not None:
            self._bridge.abort()
        self.span.cancelled = True
        self.span.cut()
        self.wake()

    def step(self) -> Step:
        """Do what can be done now without waiting."""
        if self.phase is Phase.DONE:
            return Step.DONE
        if self._retries_at is not None and not self.span.cancelled and not self._failures:
            if self._now() < self._retries_at:
                return Step.IDLE
            self._retries_at = None
        if self.span.cancelled and self.phase is not Phase.CLOSING:
            self._drop()
            self.phase = Phase.CLOSING
        try:
            return self._PHASES[self.phase](self)
        except BaseException as error:  # a task owns whatever its operators raise
            self._tell(error)
            if self.phase is not Phase.CLOSING:
                self._drop()
                self.phase = Phase.CLOSING
            return Step.PROGRESSED

    def _tell(self, error: BaseException) -> None:
        """Report a failure, but for one that only says that the task was cancelled."""
        if not (self.span.cancelled and _is_cancellation(error)):
            self._failed = True
            self._report(TaskFailed(self.name, error))

    def _drop(self) -> None:
        """Count and forget everything that waits here, and tell the errors that were about to be raised."""
        self._retries_at = None
        overtaken = self._reader.overtaken() if self._reader is not None else None
        for error in self._failures if overtaken is None else (*self._failures, overtaken):
            self._tell(error)
        self._failures.clear()
        self.undelivered += sum(len(batch) for _, batch, _ in self._stash if batch is not None)
        self.undelivered += sum(len(element) for _, _, element in self._outgoing)
        self._stash.clear()
        self._outgoing.clear()
        if self._holder is not None:
            self.undelivered += self._holder.drop()
        if self.inbox is not None:
            self.undelivered += self.inbox.close()

    def _open(self) -> Step:
        if not self._may_open:
            return Step.IDLE
        # Sinks first, as between tasks: when a source opens, everything behind it is there.
        for operator in reversed(self.operators):
            self._opened += 1
            try:
                operator.open()
            except BaseException as error:  # a task owns whatever its operators raise
                raise _blamed(operator, "open", error) from error
        self._segments = segments_of(self.operators)
        self.phase = Phase.OPENED
        self._report(TaskOpened(self.name))
        return Step.PROGRESSED

    def _wait_to_run(self) -> Step:
        if not self._may_run:
            return Step.IDLE
        # Dead letters that no operator sends have nobody who could say that they ended.
        is_fed = self.inbox is None or self.producers > 0 or self.loop is not None
        self.phase = Phase.RUNNING if is_fed else Phase.FINISHING
        return Step.PROGRESSED

    def _run(self) -> Step:
        if not self._has_flushed():
            return Step.BLOCKED
        if self._stash:
            self._unstash()
        else:
            started_at = perf_counter()
            if self._reader is not None:
                records = self._read(self._reader)
            else:
                records = self._take() if self._holder is None else self._hold(self._holder)
            if records is None:
                return Step.IDLE
            self._pace.measured(records, perf_counter() - started_at)
        self._flush()
        return Step.PROGRESSED

    def _unstash(self) -> None:
        """Go on with what was put aside last."""
        started_at = perf_counter()
        index, batch, port = self._stash.pop()
        self._push(index, batch, port)
        self._pace.measured(0 if batch is None else len(batch), perf_counter() - started_at)

    def _take(self) -> int | None:
        """Process the next element of the inbox and return its number of records, or None if there was none."""
        assert self.inbox is not None
        taken = self.inbox.get_nowait()
        if taken is None:
            if self.loop is not None and self.loop.is_zero:
                self.phase = Phase.FINISHING
                return 0
            return None
        port, element = taken
        if self.inbox.counters:
            self._held += 1
        if ends(element):
            self.producers -= 1
            if self.producers == 0:
                self.phase = Phase.FINISHING
        elif self.loop is not None and self._stopping:
            self.undelivered += len(element)
        elif isinstance(element, Batch) and self._holder is not None:
            self._holder.take(element)
        elif isinstance(element, Batch):
            self._push(0, element, port)
        return len(element)

    def _hold(self, holder: Holder) -> int | None:
        """Let an operator take in what it has room for, and hand on what it has; None if there was neither."""
        taken = self._take() if holder.has_room else None
        handed_on = self._hand_on(holder, is_all=taken is None)
        return handed_on if taken is None else taken + (handed_on or 0)

    def _hand_on(self, holder: Holder, *, is_all: bool) -> int | None:
        """Push the results of an operator that holds records, and return how many there were, or None."""
        started_at = perf_counter()
        out = holder.hand_on(is_all=is_all, has_ended=self.phase is Phase.FINISHING)
        holder.metrics.busy_s += perf_counter() - started_at
        if out is None:
            return None
        holder.metrics.records_out += len(out)
        self._push(1, out, 0, self._settle(0, 0))
        return len(out)

    def _read(self, reader: Reader) -> int | None:
        """Read and process the next records of the source; None when there are none now."""
        if self._stopping:
            overtaken = reader.overtaken()
            if overtaken is not None:
                raise overtaken
            self.phase = Phase.FINISHING
            return 0
        if self._reads_at is not None:
            if self._now() < self._reads_at:
                return None
            self._reads_at = None
        if self.lockstep is not None and not self.lockstep.is_zero:
            return None
        single = self.lockstep is not None or reader.delay_s is not None
        started_at = perf_counter()
        batch = reader.read(1 if single else self._pace.limit())
        reader.metrics.busy_s += perf_counter() - started_at
        if reader.failure is not None:
            raise reader.failure
        if reader.ended:
            self.phase = Phase.FINISHING
            return 0
        if len(batch):
            self._idle_pause_s = IDLE_PAUSE_MIN_S
            if reader.delay_s:
                self._reads_at = self._now() + reader.delay_s
            self._push(1, batch, 0)
            return len(batch)
        if reader.wake_at is not None:
            self._reads_at, reader.wake_at = reader.wake_at, None
        elif not reader.span.is_cut and not reader.is_told:
            self._reads_at = self._now() + (reader.delay_s or self._idle_pause_s)
            self._idle_pause_s = min(self._idle_pause_s * 2, IDLE_PAUSE_MAX_S)
        return None if reader.is_told or self._reads_at is not None else 0

    def _push(self, index: int, batch: Batch | None, port: int, failures: Sequence[BaseException] = ()) -> None:
        """Run operators from `index` on over a batch (None: what operator `index` still has of the last record).

        What an operator does not take now is stashed; the deepest comes out first, so the order of records is kept. An
        operator that fails leaves what came before the failing record, which still goes on to the end of the chain.
        """
        limit = self._pace.limit()
        failed = list(failures)
        stashed_after = len(self._stash)
        place = index
        while place < len(self.operators) and (batch is None or batch.values):
            if batch is not None and len(batch.values) > limit:
                # In parts at once: a rest that is cut again at each step would be copied as often.
                for start in range(limit * ((len(batch) - 1) // limit), 0, -limit):
                    self._stash.append((place, batch.slice(start, start + limit), port))
                batch = batch.slice(0, limit)
            segment = self._segments.get(place)
            if segment is not None and batch is not None and segment.takes(batch):
                out = segment.process(batch)
                beyond = place + len(segment.operators)
            else:
                out = self._run_alone(self.operators[place], batch, port)
                beyond = place + 1
            while place < beyond:
                failure = self._settle(place, port)
                if failure:
                    failed += failure
                    stashed_after = len(self._stash)
                place, port = place + 1, 0
            batch = out
        if batch is not None and batch.values:
            self._emit(len(self.operators) - 1, batch, letters=False)
        if failed:
            if not self._failures:
                self._fails_at = self._now() + FAILURE_WAIT_MAX_S
            self._failures += failed
            self._stashed_after = stashed_after
            self._raise_failures()

    def _raise_failures(self, *, at_once: bool = False) -> None:
        """Raise what failed, if what came before it has gone on, or takes too long."""
        if not self._failures:
            return
        if at_once or len(self._stash) <= self._stashed_after or self._now() >= self._fails_at:
            raise self._failures.pop(0)

    def _run_alone(self, operator: Operator, batch: Batch | None, port: int) -> Batch:
        started_at = perf_counter()
        out = operator.resume() if batch is None else operator.process(batch, port)
        operator.metrics.busy_s += perf_counter() - started_at
        operator.metrics.records_out += len(out.values)
        return out

    def _settle(self, place: int, port: int) -> list[BaseException]:
        """Take from an operator what it left, and return its failure."""
        operator = self.operators[place]
        if operator.rest is not None:
            self._stash.append((place, operator.rest, port))
            operator.rest = None
            if operator.wake_at is not None:
                self._retries_at, operator.wake_at = operator.wake_at, None
        if operator.more:
            self._stash.append((place, None, port))
        if operator.letters:
            self._emit(place, Batch([*operator.letters]), letters=True)
            operator.letters.clear()
        return [] if operator.failure is None else [operator.failure]

    def _emit(self, place: int, batch: Batch, *, letters: bool) -> None:
        """Queue a batch for the consumers of the operator at `place`."""
        outputs = [output for output in self.outputs.get(place, ()) if output.letters is letters]
        if batch.requests is not None:
            copies = sum(output.partitioner.copies for output in outputs)
            for request in filter(None, batch.requests if copies != 1 else ()):
                request.add(copies)
                request.drop()
        for output in outputs:
            for target, part in output.partitioner.split(batch):
                self._outgoing.append((output, target, part))

    def _has_flushed(self) -> bool:
        """Return whether all that is queued went, so that more can be processed."""
        has_flushed = self._flush()
        # Another task drops what it has not read when the job fails, so that waiting for it would be in vain; and
        # nothing waits for a record that is to be tried again after a pause.
        self._raise_failures(at_once=not has_flushed or self._retries_at is not None)
        return has_flushed

    def _flush(self) -> bool:
        """Put what is queued into the channels and return whether all of it went."""
        outgoing = self._outgoing
        while outgoing:
            output, target, element = outgoing[0]
            channel = output.channels[target]
            if not channel.put_nowait(output.port, element, self.wake, force=output.feedback):
                return False
            outgoing.popleft()
            if output.enters is not None and ends(element):
                output.enters.add(-1)
        if self._held and not self._stash and (self._holder is None or not self._holder.held):
            self._release()
        return True

    def _release(self) -> None:
        """Take off the counters what was processed to its end."""
        assert self.inbox is not None
        held, self._held = self._held, 0
        for counter in self.inbox.counters:
            counter.add(-held)

    def _finish(self) -> Step:
        if not self._has_flushed():
            return Step.BLOCKED
        if self._stash:
            self._unstash()
            return Step.PROGRESSED
        if self._holder is not None and self._holder.held:
            return Step.IDLE if self._hand_on(self._holder, is_all=True) is None else Step.PROGRESSED
        if self._finished < len(self.operators):
            place = self._finished
            try:
                last = self.operators[place].finish()
            except BaseException as error:  # a task owns whatever its operators raise
                raise _blamed(self.operators[place], "finish", error) from error
            self._finished += not self.operators[place].more
            if last is not None and len(last):
                self.operators[place].metrics.records_out += len(last)
                if place + 1 < len(self.operators):
                    self._push(place + 1, last, 0)
                else:
                    self._emit(place, last, letters=False)
            return Step.PROGRESSED
        if not self._last_said:
            self._last_said = True
            for outputs in self.outputs.values():
                for output in outputs:
                    for target in range(len(output.channels)):
                        self._outgoing.append((output, target, END_OF_STREAM))
            return Step.PROGRESSED
        self._release_all()
        self.phase = Phase.CLOSING
        return Step.PROGRESSED

    def _release_all(self) -> None:
        if self.inbox is not None:
            self.undelivered += self.inbox.close()
            self._release()

    def _close(self) -> Step:
        """Close one function, from source to sink; a failing one does not keep the others from it."""
        if self._holder is not None and not self._holder.is_quiet:
            return Step.IDLE
        unopened = len(self.operators) - self._opened
        place = unopened + self._closed
        if place < len(self.operators):
            self._closed += 1
            operator = self.operators[place]
            self._report(TaskClosing(self.name))
            try:
                operator.close()
            except BaseException as error:  # a task owns whatever its operators raise
                self._failed = True
                blamed = _blamed(operator, "close", error)
                blamed.__cause__ = error
                self._report(TaskFailed(self.name, blamed, closing=operator.node.name))
            return Step.PROGRESSED
        self._release_all()
        self.phase = Phase.DONE
        state = TaskState.FAILED if self._failed else TaskState.CANCELLED if self.span.cancelled else TaskState.DONE
        self._report(TaskEnded(self.name, state))
        return Step.DONE

    _PHASES: ClassVar[dict[Phase, Callable[[Task], Step]]] = {
        Phase.CREATED: _open,
        Phase.OPENED: _wait_to_run,
        Phase.RUNNING: _run,
        Phase.FINISHING: _finish,
        Phase.CLOSING: _close,
    }


def _blamed(operator: Operator, what: str, error: BaseException) -> FunctionError:
    name = operator.node.name
    return FunctionError(f'operator "{name}" failed to {what}: {describe(error)}', operator=name)


def _is_cancellation(error: BaseException) -> bool:
    """Return whether an error only says that a coroutine or a served pipeline was cancelled with its job."""
    cause = error.__cause__ or error
    return isinstance(cause, ServiceUnavailableError) or type(cause).__name__ == "CancelledError"
