"""The input of a task: its source or its inbox, and an operator that keeps records for a while."""

from __future__ import annotations

from typing import TYPE_CHECKING

from sage._operators.holder import BufferingOperator
from sage._operators.sources import Reader
from sage._runtime.channel import ends
from sage._runtime.pace import IDLE_PAUSE_GROWTH, IDLE_PAUSE_MAX_S, IDLE_PAUSE_MIN_S
from sage.records import Batch

if TYPE_CHECKING:
    from collections.abc import Callable

    from sage._runtime.chain_run import ChainRun
    from sage._runtime.channel import Channel, InFlight
    from sage._runtime.pace import Pace


class Input:
    """Takes the next records of a task and pushes them into its chain.

    Attributes:
        take: processes the next records, and returns how many, or None if nothing is there now.
        reader: the chain's first operator, if it is a source.
        holder: the chain's first operator, if it keeps records.
        inbox: the channel in front of the task, or None for a source.
        producers: how many of its producers have not ended.
        loop: the counter of a feedback loop that begins here, or None.
        lockstep: the counter of a job that is in step with this source, or None.
        is_stopping: whether the source or the loop is to end.
        has_ended: whether nothing follows.
        unsettled: how many elements were taken that the counters of the inbox still count.
    """

    def __init__(self, chain: ChainRun, inbox: Channel | None, now: Callable[[], float], pace: Pace) -> None:
        first = chain.operators[0]
        self.reader = first if isinstance(first, Reader) else None
        self.holder = first if isinstance(first, BufferingOperator) else None
        self.take = self._read if self.reader is not None else self._get if self.holder is None else self._hold
        self.inbox = inbox
        self.producers = 0
        self.loop: InFlight | None = None
        self.lockstep: InFlight | None = None
        self.is_stopping = self.has_ended = False
        self.unsettled = 0
        self._chain = chain
        self._now = now
        self._pace = pace
        self._idle_pause_s = IDLE_PAUSE_MIN_S

    @property
    def only_copies(self) -> bool:
        """Whether the task only hands on parts of a sequence.

        Its steps take as long for one record as for many: what takes time is to put them into the channels of all that
        read the stream.
        """
        return self.reader is not None and not self.reader.may_wait and len(self._chain.operators) == 1

    def hand_on(self, *, is_all: bool) -> int | None:
        """Push the results of an operator that keeps records, and return how many there were, or None."""
        holder, chain = self.holder, self._chain
        assert holder is not None
        self._give_back(holder)
        started_at = self._now()
        out = holder.hand_on(is_all=is_all, has_ended=self.has_ended)
        holder.metrics.busy_s += self._now() - started_at
        if out is None:
            return None
        holder.metrics.records_out += len(out)
        chain.push(1, out, 0, chain.settle(0, 0))
        return len(out)

    def settle(self) -> None:
        """Take the elements off the counters, if all of their records have gone on."""
        if self.inbox is not None and not self._chain.stash and not self._chain.operators[0].held:
            count, self.unsettled = self.unsettled, 0
            for counter in self.inbox.counters:
                counter.add(-count)

    def close(self) -> int:
        """Take nothing more in, and return how many records waited."""
        return 0 if self.inbox is None else self.inbox.close()

    def _get(self) -> int | None:
        """Take the next element of the inbox."""
        assert self.inbox is not None
        taken = self.inbox.get_nowait()
        if taken is None:
            if self.loop is not None and self.loop.is_zero:
                self.has_ended = True
                return 0
            return None
        port, element = taken
        if self.inbox.counters:
            self.unsettled += 1
        if ends(element):
            self.producers -= 1
            if self.producers == 0:
                self.has_ended = True
        elif isinstance(element, Batch) and self.loop is not None and self.is_stopping:
            first = self._chain.operators[0]
            first.leave(element)
            self._chain.undelivered += first.given_back
            first.given_back = 0
        elif isinstance(element, Batch) and self.holder is not None:
            self.holder.take(element)
            self._give_back(self.holder)
        elif isinstance(element, Batch):
            self._chain.push(0, element, port)
            return self._chain.taken
        return len(element)

    def _hold(self) -> int | None:
        """Let an operator that keeps records take some in, and hand on results."""
        assert self.holder is not None
        if self._chain.is_holding_back:
            self._give_back(self.holder)  # before it is asked for room: nothing else may ever make any
        taken = self._get() if self.holder.has_room else None
        handed_on = self.hand_on(is_all=taken is None)
        return handed_on if taken is None else taken + (handed_on or 0)

    def _give_back(self, holder: BufferingOperator) -> None:
        """Count and forget records that wait for a call that is held back."""
        if self._chain.is_held_back(0):
            self._chain.undelivered += holder.give_back()

    def _read(self) -> int | None:
        """Read the source."""
        reader, chain = self.reader, self._chain
        assert reader is not None
        if self.is_stopping and reader.stop():
            overtaken = reader.overtaken()
            if overtaken is not None:
                raise overtaken
            self.has_ended = True
            return 0
        if reader.due is not None:
            if self._now() < reader.due:
                return None
            reader.due = None
        is_in_group = reader.sample is not None and reader.sample.left > 0
        if self.lockstep is not None and not is_in_group and not self.lockstep.is_zero:
            return None
        single = (self.lockstep is not None and reader.sample is None) or reader.delay_s is not None
        started_at = self._now()
        limit = chain.limit() if not reader.may_wait else min(self._pace.read_limit(), chain.limit())
        batch = reader.read(1 if single else limit)
        ended_at = self._now()
        reader.metrics.busy_s += ended_at - started_at
        if reader.may_wait:
            self._pace.has_read(len(batch), started_at, ended_at, batch.bytes_count if len(batch) > 1 else None)
        if reader.failure is not None:
            raise reader.failure
        if reader.ended:
            self.has_ended = True
            return 0
        if len(batch):
            self._idle_pause_s = IDLE_PAUSE_MIN_S
            if reader.delay_s:
                reader.due = self._now() + reader.delay_s
            chain.push(1, batch, 0)
            return len(batch)
        if reader.wake_at is not None:
            reader.due, reader.wake_at = reader.wake_at, None
        elif not reader.span.is_cut and not reader.is_told:
            reader.due = self._now() + (reader.delay_s or self._idle_pause_s)
            self._idle_pause_s = min(self._idle_pause_s * IDLE_PAUSE_GROWTH, IDLE_PAUSE_MAX_S)
        return None if reader.is_told or reader.due is not None else 0
