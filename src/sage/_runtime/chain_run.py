"""The way of batches through the operators of a task, and the records and failures that wait on it."""

from __future__ import annotations

from typing import TYPE_CHECKING

from sage._operators.fused import segments_of
from sage._operators.per_record import still_wanted
from sage._runtime.pace import FAILURE_WAIT_MAX_S, GIVES_MIN
from sage.records import Batch

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from sage._operators.fused import FusedLoop
    from sage._operators.operator import Operator
    from sage._runtime.outbox import Outbox
    from sage._runtime.pace import Pace


class ChainRun:
    """Runs the operators of one task over batches.

    Attributes:
        operators: the operators, from source to sink.
        outbox: where the results go.
        stash: what waits: the place of an operator, the batch in front of it (None: the rest of its last record), and
            the port. The last one is the deepest.
        failures: errors that end the task, once only records after the failed ones are stashed.
        retries_at: when a record is to be tried again, or None.
        is_holding_back: whether costly functions get no further call.
        taken: how many records the last push took.
        undelivered: how many records of the task were dropped.
        gives_last: whether operators emit what they still have at the end.
    """

    def __init__(self, operators: tuple[Operator, ...], outbox: Outbox, now: Callable[[], float], pace: Pace) -> None:
        self.operators = operators
        self.outbox = outbox
        self.stash: list[tuple[int, Batch | None, int]] = []
        self.failures: list[BaseException] = []
        self.retries_at: float | None = None
        self.is_holding_back = False
        self.taken = 0
        self.undelivered = 0
        self._now = now
        self._pace = pace
        self._segments: dict[int, FusedLoop] = {}
        self._stashed_after = 0
        self._fails_at = 0.0
        self.gives_last = True
        self._gives = 1.0  # how many records went on for each that the last push took
        self._finished = 0

    def fuse(self) -> None:
        """Put neighbouring operators, which are open, into loops."""
        self._segments = segments_of(self.operators)

    def is_held_back(self, place: int) -> bool:
        """Return whether an operator gets no further record."""
        return self.is_holding_back and self.operators[place].is_costly

    def pauses(self) -> bool:
        """Return whether the pause before the next attempt goes on; nothing else is done meanwhile."""
        if self.retries_at is None or self.failures:
            return False
        if self._now() < self.retries_at and not any(self.is_held_back(place) for place, _, _ in self.stash):
            return True
        self.retries_at = None
        return False

    def limit(self) -> int:
        """Return how many records a step takes at most: limited by its time, and by the queues behind it."""
        outlets = self.outbox.outlets.get(len(self.operators) - 1, ())
        return min([self._pace.limit(), *(int(outlet.portion / self._gives) for outlet in outlets)])

    def push(self, index: int, batch: Batch | None, port: int, failures: Sequence[BaseException] = ()) -> None:
        """Run operators from `index` on over a batch (None: the rest of operator `index`'s last record).

        Records that an operator does not take now are stashed; the deepest comes out first, so the order of records is
        kept. An operator that fails leaves the results before the failing record, which still go on to the end of the
        chain.
        """
        limit = self.limit()
        taken = self.taken = 0 if batch is None else min(limit, len(batch))
        whole = 1.0  # for each record that goes on at once, how many there will be with those behind a sample
        failed = list(failures)
        stashed_after = len(self.stash)
        place = index
        while place < len(self.operators) and (batch is None or batch.values):
            batch = batch if batch is None or batch.requests is None else still_wanted(batch)
            if batch is not None and self.is_held_back(place):
                operator = self.operators[place]
                operator.port = port
                operator.leave(batch)
                self.undelivered += operator.given_back
                operator.given_back = 0
                batch = None
                break
            if batch is not None and len(batch.values) > limit:
                batch, *others = batch.parts(limit)
                self.stash += [(place, part, port) for part in reversed(others)]
            segment = None if batch is None else self._segments.get(place)
            if segment is not None and self.is_holding_back and segment.is_costly:
                segment = None
            if segment is not None and batch is not None:
                alone = segment.alone(batch)
                if 0 < alone < len(batch):
                    self.stash.append((place, batch.slice(alone), port))
                    whole *= len(batch) / alone
                    self.taken = min(self.taken, alone) if place == index else self.taken
                    batch = batch.slice(0, alone)
                segment = None if alone else segment
            if segment is not None and batch is not None:
                out = segment.process(batch)
                beyond = place + len(segment.operators)
                if segment.is_through:  # no operator has failed or has a rest
                    place, port = beyond, 0
            else:
                out = self._run_alone(self.operators[place], batch, port)
                beyond = place + 1
            while place < beyond:
                failure = self.settle(place, port)
                if failure:
                    failed += failure
                    stashed_after = len(self.stash)
                place, port = place + 1, 0
            batch = out
        if batch is not None and batch.values:
            failed += self.outbox.put(len(self.operators) - 1, batch, self._cannot_send, letters=False)
        if taken:
            given = 0 if batch is None else len(batch.values) * whole
            self._gives = min(1.0, max(given / taken, self._gives / 2, GIVES_MIN))
        self._fail_soon(failed, stashed_after)

    @property
    def may_be_cut(self) -> bool:
        """Whether a checkpoint can have everything that waits, since only results of records are still to be read."""
        is_reading = bool(self.stash) and self.stash[-1][1] is None
        return is_reading and all(self.operators[place].may_be_cut for place, batch, _ in self.stash if batch is None)

    def stashed(self, place: int) -> list[tuple[int, Batch]]:
        """Return the batches that wait in front of an operator, the next one first, each after its input."""
        return [(port, batch) for at, batch, port in reversed(self.stash) if at == place and batch is not None]

    def unstash(self) -> None:
        """Continue with the batch that was stashed last."""
        started_at = self._now()
        index, batch, port = self.stash.pop()
        self.push(index, batch, port)
        self._pace.measured(self.taken, self._now() - started_at)

    def finish(self) -> bool:
        """Let the next operator emit what it still has, and return False when all of them have."""
        while self.gives_last and self._finished < len(self.operators):
            place = self._finished
            operator = self.operators[place]
            try:
                last = operator.finish()
            except BaseException as error:
                raise operator.blame_hook("finish", error) from error
            self._finished += not operator.more
            if last is None:
                continue
            if len(last):
                operator.metrics.records_out += len(last)
                self.push(place + 1, last, 0)
            return True
        return False

    def settle(self, place: int, port: int) -> list[BaseException]:
        """Take the rest of an operator's input, and return its failure."""
        operator = self.operators[place]
        self.undelivered += operator.given_back
        operator.given_back = 0
        if operator.rest is not None:
            self.stash.append((place, operator.rest, port))
            operator.rest = None
            if operator.wake_at is not None:
                self.retries_at, operator.wake_at = operator.wake_at, None
        if operator.more:
            self.stash.append((place, None, port))
        self._send_letters(place)
        return [] if operator.failure is None else [operator.failure]

    def raise_failures(self, *, at_once: bool) -> None:
        """Raise the failure, if the results before it have gone on, or take too long."""
        if not self.failures:
            return
        if at_once or len(self.stash) <= self._stashed_after or self._now() >= self._fails_at:
            raise self.failures.pop(0)

    def drop(self) -> list[BaseException]:
        """Count and forget everything that waits, and return the errors that were about to be raised."""
        self.retries_at = None
        self.undelivered += sum(len(batch) for _, batch, _ in self.stash if batch is not None)
        self.stash.clear()
        failures, self.failures = self.failures, []
        return failures

    def _fail_soon(self, failed: list[BaseException], stashed_after: int) -> None:
        """Let failures end the task, once only records after the failed ones are stashed."""
        if failed:
            if not self.failures:
                self._fails_at = self._now() + FAILURE_WAIT_MAX_S
            self.failures += failed
            self._stashed_after = stashed_after
            self.raise_failures(at_once=False)

    def _run_alone(self, operator: Operator, batch: Batch | None, port: int) -> Batch:
        operator.costs.begins()
        metrics, before, began_at = operator.metrics, operator.metrics.records_in, self._now()
        out = operator.resume() if batch is None else operator.process(batch, port)
        elapsed_s = self._now() - began_at
        metrics.busy_s += elapsed_s
        metrics.records_out += len(out.values)
        operator.costs.measured(metrics.records_in - before, elapsed_s)
        return out

    def _send_letters(self, place: int) -> None:
        letters = self.operators[place].letters
        if letters:
            batch = Batch([*letters])
            letters.clear()
            self.outbox.put(place, batch, self._cannot_send, letters=True)

    def _cannot_send(self, place: int, record: Batch, error: Exception) -> BaseException | None:
        """Apply the policy of the operator that made a record that cannot travel, and return an error for the job."""
        while place and self.operators[place].keeps_records:  # an operator in between only hands records on
            place -= 1
        failure = self.operators[place].cannot_send(record, error)
        self._send_letters(place)
        return failure
