"""A task: one parallel instance of a chain. It is a step; whoever calls the step again and again is a backend."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

from sage._runtime.chain_run import ChainRun
from sage._runtime.coroutines import is_cancellation
from sage._runtime.input import Input
from sage._runtime.lifecycle import TaskClosing, TaskEnded, TaskFailed, TaskOpened
from sage._runtime.outbox import Outbox
from sage._runtime.states import Phase, Step, TaskState

if TYPE_CHECKING:
    from collections.abc import Callable

    from sage._operators.operator import Operator
    from sage._runtime.channel import Channel
    from sage._runtime.lifecycle import TaskEvent
    from sage._runtime.pace import Pace
    from sage.records import BatchReading
    from sage.serving import PipelineBridge

    TaskParts = tuple[
        str,
        tuple[Operator, ...],
        BatchReading,
        Callable[[TaskEvent], None],
        Callable[[], float],
        Pace,
        Channel | None,
    ]
    """The arguments of `Task`."""


class Task:
    """Takes one parallel instance of a chain through its phases, step by step.

    `step` may be called by one thread at a time. The `request_...` methods may be called by any thread at any time;
    they set a flag and wake the task. Changes of the task are passed to `report`.

    Attributes:
        name: the names of its operators, and its number where there are several.
        wake: called by whoever has something for the task; the backend sets it.
        span: the list it works through, for the watch.
        inbox: the channel in front of it, or None for a source.
        input: takes the records in.
        nodes: the operators of the graph that the task runs.
        chain: runs the operators.
        outbox: puts the results into the channels behind it.
    """

    def __init__(
        self,
        name: str,
        operators: tuple[Operator, ...],
        span: BatchReading,
        report: Callable[[TaskEvent], None],
        now: Callable[[], float],
        pace: Pace,
        inbox: Channel | None,
    ) -> None:
        self.name = name
        self.operators = operators
        self.nodes = tuple([operator.node for operator in operators])
        self.span = span
        self.wake: Callable[[], None] = lambda: None
        self.inbox = inbox
        self.outbox = Outbox(pace)
        self.chain = ChainRun(operators, self.outbox, now, pace)
        self.input = Input(self.chain, inbox, now, pace)
        self.phase = Phase.CREATED
        self._report = report
        self._now = now
        self._pace = pace
        operators[0].wake = self.rouse
        if inbox is not None:
            inbox.wake_consumer = self.rouse
        self._bridge: PipelineBridge | None = self.nodes[0].settings.get("bridge")
        if self._bridge is not None:
            self._bridge.when_changed(self.rouse)
        self._may_open = self._may_run = self._failed = False
        self._told = operators[0].context._stopping  # all functions of the task share it
        self._opened = self._closed = 0

    def _after_fork_in_child(self) -> None:
        self.span.cut()  # the record that the process was forked in is the last that its copy sees

    def rouse(self) -> None:
        """Wake the task; for those who learn whom to wake before the backend has set `wake`."""
        self.wake()

    @property
    def undelivered(self) -> int:
        """How many records were dropped here by a stop, a cancel or a failure."""
        return self.chain.undelivered

    @property
    def waiting(self) -> int:
        """How many records wait here for the next run of a durable job."""
        return 0

    @property
    def wake_at(self) -> float | None:
        """When to step again although nobody wakes it, in seconds of the backend's clock, or None."""
        if self.chain.retries_at is not None or self.outbox.queue:
            return self.chain.retries_at
        return self.operators[0].due

    @property
    def is_slow(self) -> bool:
        """Whether a record takes so long that the task should not keep others waiting."""
        return self._pace.is_slow

    @property
    def is_waiting(self) -> bool:
        """Whether a step would only find that the inbox is empty, or that no request has come."""
        source = self.input
        if source.holder is not None or source.loop is not None or self.phase is not Phase.RUNNING:
            return False
        has_none = self.inbox is not None and self.inbox.is_empty if source.reader is None else source.reader.is_idle
        return has_none and not (self.chain.stash or self.outbox.queue or self.chain.failures or self.span.cancelled)

    @property
    def waited_s(self) -> float:
        """For how long others waited for room in its queue, in seconds."""
        return 0.0 if self.inbox is None else self.inbox.waited_s

    def where(self) -> str:
        """Return where the coroutines of the task stand, for a person; the backend knows where its thread stands."""
        return self.operators[0].where()

    def request_open(self) -> None:
        """Let the task build and open its functions."""
        self._may_open = True
        self.wake()

    def request_run(self) -> None:
        """Let records flow."""
        self._may_run = True
        self.wake()

    def request_stop(self) -> None:
        """End the source, or a loop that begins here; records in flight go on."""
        if self._bridge is not None:
            self._bridge.close()  # earlier requests are still answered
            return
        self.input.is_stopping = True
        self._told.set()
        self.span.cut()
        self.wake()

    def request_hold_back(self) -> None:
        """Begin no further call of a costly function; the records that wait for one are counted and forgotten."""
        self.chain.is_holding_back = True
        self._told.set()
        self.operators[0].hold_back()
        self.span.cut()
        self.wake()

    @property
    def calls_running(self) -> int:
        """How many calls of costly functions run here."""
        if self.input.holder is not None:
            return self.input.holder.calls_running
        return int(self.span.started_at is not None and any(operator.is_costly for operator in self.operators))

    def request_cancel(self) -> None:
        """Drop everything and close."""
        if self._bridge is not None:
            self._bridge.abort()
        self.span.cancelled = True
        self.span.cut()  # before the function can know: its call is the last one
        self._told.set()
        self.wake()

    def step(self) -> Step:
        """Do all work that is possible now without waiting."""
        if self.phase is Phase.DONE:
            return Step.DONE
        if self.chain.retries_at is not None and not self.span.cancelled and self.chain.pauses():
            return Step.IDLE
        if self.span.cancelled and self.phase is not Phase.CLOSING:
            self._drop()
            self.phase = Phase.CLOSING
        try:
            return self._run() if self.phase is Phase.RUNNING else self._PHASES[self.phase](self)
        except BaseException as error:  # a task owns the errors of its operators
            self._tell(error)
            if self.phase is not Phase.CLOSING:
                self._drop()
                self.phase = Phase.CLOSING
            return Step.PROGRESSED

    def _tell(self, error: BaseException) -> None:
        """Report a failure, but for one that only says that the task was cancelled."""
        if not (self.span.cancelled and is_cancellation(error)):
            self._failed = True
            self._report(TaskFailed(self.name, error))

    def _drop(self) -> None:
        """Count and forget everything that waits here, and tell the errors that were about to be raised."""
        overtaken = self.input.reader.overtaken() if self.input.reader is not None else None
        for error in (*self.chain.drop(), overtaken):
            if error is not None:
                self._tell(error)
        self.chain.undelivered += self.outbox.drop(self.wake) + self.operators[0].drop() + self.input.close()

    def _open(self) -> Step:
        if not self._may_open:
            return Step.IDLE
        # Sinks first, as between tasks: when a source opens, everything behind it is there.
        for operator in reversed(self.operators):
            self._opened += 1
            try:
                operator.open()
            except BaseException as error:  # a task owns the errors of its operators
                raise operator.blame_hook("open", error) from error
        self.chain.fuse()
        self.phase = Phase.OPENED
        self._report(TaskOpened(self.name))
        return Step.PROGRESSED

    def _wait_to_run(self) -> Step:
        if not self._may_run:
            return Step.IDLE
        # Dead letters that no operator sends have nobody who could say that they ended.
        is_fed = self.inbox is None or self.input.producers > 0 or self.input.loop is not None
        self.phase = Phase.RUNNING if is_fed else Phase.FINISHING
        return Step.PROGRESSED

    def _run(self) -> Step:
        chain, source = self.chain, self.input
        if (self.outbox.queue or source.unsettled or chain.failures) and not self._has_flushed():
            return Step.BLOCKED
        if chain.stash:
            chain.unstash()
        else:
            started_at = self._now()
            records = source.take()
            if records is None:
                return Step.IDLE
            if source.has_ended:
                self.phase = Phase.FINISHING
            self._pace.measured(records, 0.0 if source.only_copies else self._now() - started_at)
        if self.inbox is not None and self.inbox.follows_work:
            self.inbox.follow(self.operators)
        if (not self.outbox.queue or self.outbox.flush(self.wake)) and source.unsettled:
            source.settle()
        return Step.PROGRESSED

    def _has_flushed(self) -> bool:
        """Return whether all that is queued went, so that more can be processed."""
        has_flushed = self.outbox.flush(self.wake)
        if has_flushed and self.input.unsettled:
            self.input.settle()
        # When the job fails, another task drops its unread records, so waiting for it would be in vain; and
        # nothing waits for a record that is to be tried again after a pause.
        self.chain.raise_failures(at_once=not has_flushed or self.chain.retries_at is not None)
        return has_flushed

    def _finish(self) -> Step:
        if not self._has_flushed():
            return Step.BLOCKED
        if self.chain.stash:
            self.chain.unstash()
            return Step.PROGRESSED
        if self.operators[0].held:
            return Step.IDLE if self.input.hand_on(is_all=True) is None else Step.PROGRESSED
        if self.chain.finish():
            return Step.PROGRESSED
        self.outbox.end()
        if not self._has_flushed() or not self.outbox.is_delivered(self.wake):
            return Step.IDLE
        return self._conclude()

    def _conclude(self) -> Step:
        """Begin to close; everything has reached the consumers."""
        self._release_all()
        self.phase = Phase.CLOSING
        return Step.PROGRESSED

    def _release_all(self) -> None:
        self.chain.undelivered += self.input.close()
        self.input.settle()

    def _close(self) -> Step:
        """Close one function, from source to sink; a failing one does not keep the others from it."""
        if not self.operators[0].is_quiet:
            return Step.IDLE
        for operator in self.operators[len(self.operators) - self._opened + self._closed :]:
            self._closed += 1
            if not operator.closes:
                continue
            self._report(TaskClosing(self.name))
            try:
                operator.close()
            except BaseException as error:  # a task owns the errors of its operators
                self._failed = True
                blamed = operator.blame_hook("close", error)
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
        Phase.FINISHING: _finish,
        Phase.CLOSING: _close,
    }
