"""A task of a durable job: it takes its part in checkpoints, and ends when its last part is in one."""

from __future__ import annotations

import pickle
from dataclasses import replace
from typing import TYPE_CHECKING

from sage._runtime.accounts import counted
from sage._runtime.aligning_channel import AligningChannel
from sage._runtime.checkpoints import CheckpointEvent, PartGiven, Row
from sage._runtime.states import Phase, Step
from sage._runtime.task import Task
from sage.errors import FunctionError, describe, hint
from sage.records import Barrier

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from sage._operators.operator import Operator
    from sage._runtime.task import TaskParts
    from sage.records import Batch


ENDED_VALUES_MAX = 10_000
"""How many values of states with `ttl_s` a checkpoint looks at, so that they end although no records come."""


class DurableTask(Task):
    """A task that passes barriers on, gives its part at each, and tells its operators when a checkpoint is complete.

    Args:
        *args: see `Task`.
        tell: called with each part.
        number: the number of the checkpoint that the job goes on from, or 0.
        is_stopping: says whether somebody has stopped the job.
    """

    def __init__(
        self,
        *args: *TaskParts,
        tell: Callable[[CheckpointEvent], None],
        number: int,
        is_stopping: Callable[[], bool],
    ) -> None:
        super().__init__(*args)
        self._tell_part = tell
        self._is_stopping = is_stopping
        self._knows_end = False
        self._number = self._committed = number
        # In one attribute: a task that saw its release, and not the checkpoint that led to it, would end uncommitted.
        self._complete: tuple[int, bool] = (number, False)
        self._asked: int | None = None
        self._has_given_last = False
        self._recovered = 0
        self._cut: PartGiven | None = None

    @property
    def waiting(self) -> int:
        """How many records wait here for the next run."""
        never_taken_in = sum(
            operator.recovery.held for operator in self.operators[self._recovered :] if operator.recovery
        )
        return never_taken_in + sum(len(batch) for operator in self.operators for _, batch in operator.left or ())

    @property
    def is_waiting(self) -> bool:
        """Whether a step would find nothing to do; records of the last run may be the only ones that a loop has."""
        return not self.input.unsettled and super().is_waiting

    def request_part(self, number: int) -> None:
        """Ask a source, or the beginning of a loop, for its part of a checkpoint; any thread may call this."""
        self._asked = number
        self.wake()

    def request_commit(self, number: int, *, is_last: bool) -> None:
        """Say that a checkpoint is complete, and whether the last part of the task is in it; any thread may."""
        self._complete = (number, is_last or self._complete[1])
        self.wake()

    def step(self) -> Step:
        """Do all work that is possible now; after a stop, what operators give at the end waits for the next run."""
        if self.phase is Phase.FINISHING and not self._knows_end:
            self._knows_end = True
            self.chain.gives_last = not self._is_stopping()
        return super().step()

    def _run(self) -> Step:
        if not self._recovered:
            self._recover()
        if self._complete[0] > self._committed:
            self._commit(self._complete[0])
        if self._cut is not None:
            return self._wait_for_return(self._cut)
        if self._may_take_part():
            number = self._next_barrier()
            if number is not None:
                part = PartGiven(self.name, number, self._rows(number), counted(self.operators))
                self.outbox.send(Barrier(number))
                if self.input.loop is None:
                    self._tell_part(part)
                else:
                    self._cut = part
                return Step.PROGRESSED
        return super()._run()

    def _may_take_part(self) -> bool:
        """Return whether everything that waits in the task has gone on, or can be written down.

        The results of a record that take long are cut in the middle: after a restart, the function is called again and
        gives those that have gone on once more. Those of other records are waited for, so that they may differ then.
        """
        if not self.chain.stash:
            return not self.chain.failures
        return self.chain.may_be_cut and not self.chain.failures and self._is_asked and self._can_be_pickled()

    def _can_be_pickled(self) -> bool:
        """Return whether the records that wait can be; those that cannot are waited for."""
        states = [operator.snapshot(self._number) for operator in self.operators if operator.may_be_cut]
        try:
            pickle.dumps((states, [batch for _, batch, _ in self.chain.stash]), pickle.HIGHEST_PROTOCOL)
        except Exception:
            return False
        return True

    def _wait_for_return(self, part: PartGiven) -> Step:
        """Take nothing in until the barrier has come round the loop; the records before it belong to the checkpoint.

        They stay in the inbox, and are processed after that.
        """
        assert isinstance(self.inbox, AligningChannel)
        before = self.inbox.take_barrier_from_behind()
        if before is None:
            return Step.IDLE if self._has_flushed() else Step.BLOCKED
        self._cut = None
        assert part.number is not None
        first = self._row(self.operators[0], part.number, before)
        others = [row for row in part.rows if row.operator != self.operators[0].node.name]
        self._tell_part(replace(part, rows=tuple(filter(None, [first, *others]))))
        return Step.PROGRESSED

    def _conclude(self) -> Step:
        """Wait until the last part is in a checkpoint that is complete."""
        if not self._has_given_last:
            self._has_given_last = True
            self._tell_part(PartGiven(self.name, None, self._rows(self._number + 1), counted(self.operators)))
        number, is_released = self._complete
        if number > self._committed:
            self._commit(number)
        return super()._conclude() if is_released else Step.IDLE

    @property
    def _is_asked(self) -> bool:
        """Whether it is the turn of a checkpoint."""
        if isinstance(self.inbox, AligningChannel) and self.input.loop is None:
            return self.inbox.has_barrier
        return self._asked is not None

    def _next_barrier(self) -> int | None:
        """Return the number of the checkpoint whose turn it is, or None."""
        if isinstance(self.inbox, AligningChannel) and self.input.loop is None:
            return self.inbox.take_barrier()
        number = self._asked
        if number is not None:
            self._asked = None  # and not otherwise: it may have been asked for just now
        return number

    def _recover(self) -> None:
        """Take in the records that were in flight at the checkpoint; the deepest are stashed last."""
        for place, operator in enumerate(self.operators):
            self._recovered += 1
            assert operator.recovery is not None
            operator.restore_function()
            operator.recover()
            left = operator.recovery.left
            if place == 0 and self.input.holder is not None:
                for _, batch in left:
                    self.input.holder.take(batch)
            else:
                self.chain.stash += [(place, batch, port) for port, batch in reversed(left)]
            if operator.more:
                self.chain.stash.append((place, None, 0))

    def _commit(self, number: int) -> None:
        self._committed = number
        for operator in self.operators:
            try:
                operator.committed(number)
            except Exception as error:
                raise operator.blame_hook(f"commit checkpoint {number}", error) from error

    def _rows(self, number: int) -> tuple[Row, ...]:
        """Return the states of the operators that have one."""
        self._number = number
        return tuple(filter(None, [self._row(operator, number) for operator in self.operators]))

    def _row(self, operator: Operator, number: int, before: Sequence[tuple[int, Batch]] = ()) -> Row | None:
        """Return the state of an operator, and the records that wait in front of it."""
        try:
            operator.remove_ended(ENDED_VALUES_MAX)
            state, records = operator.snapshot(number)
            function = operator.function_state()
        except Exception as error:
            raise operator.blame_hook(f"prepare checkpoint {number}", error) from error
        stashed = self.chain.stashed(self.operators.index(operator))
        left = (*stashed, *(operator.left or ()), *before)
        if state is None and function is None and not left and operator.keyed is None:
            return None
        waiting = sum(len(batch) for _, batch in left)
        records -= waiting
        late, keys = None, None
        try:
            # At once: the functions behind this operator may change the records.
            body = pickle.dumps((state, left, function), pickle.HIGHEST_PROTOCOL)
            if operator.keyed is not None:
                late = operator.keyed.take(number).take
                keys = len(operator.keyed)
        except Exception as error:
            holds = "holds a record" if function is None and operator.keyed is None else "has a state"
            raise cannot_be_pickled(operator.node.name, holds, error) from error
        held = waiting + operator.held
        return Row(operator.node.name, operator.context.parallel_index, records, body, None, None, keys, held, late)


def cannot_be_pickled(operator: str, holds: str, error: Exception) -> FunctionError:
    """Return the error for a state or a record that a checkpoint cannot have."""
    failed = FunctionError(f'operator "{operator}" {holds} that cannot be pickled: {describe(error)}')
    hint(failed, "A durable job writes them down. Keep the data that the object is made from instead.")
    return failed
