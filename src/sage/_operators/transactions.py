"""The operator of a sink with transactions: records are written in batches, and appear with the checkpoint."""

from __future__ import annotations

import uuid
from typing import TYPE_CHECKING

from sage._operators.operator import Recovery
from sage._operators.per_record import NOTHING, Sink, drop_requests
from sage.errors import describe, short

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from sage._operators.operator import InlineCode
    from sage.connector import TransactionalSink
    from sage.errors import FunctionError
    from sage.records import Batch


def writing(records: Iterable[object], function: Callable[..., object], out: list[object]) -> None:  # noqa: ARG001
    """Call the function with all records at once."""
    batch = list(records)
    if batch:
        function(batch)


class TransactionSink(Sink):
    """Writes records into transactions; in a job that is not durable, all of them into one."""

    _sink: TransactionalSink[object] | None = None

    def prepare(self) -> None:
        """Open the sink, and commit the transactions of the last checkpoint."""
        self._prepared: dict[int, object] = {}
        recovery = self.recovery or Recovery(uuid.uuid4().hex)
        sink = self._sink = self._function
        sink.durable = self.recovery is not None
        sink.open(recovery.part, recovery.checkpoint)
        # Not needlessly: the other side may have forgotten by now that it has them.
        for token in () if recovery.is_settled else recovery.state or ():
            sink.commit(token)
        sink.begin()
        self._call = sink.write

    def process(self, batch: Batch, port: int) -> Batch:  # noqa: ARG002
        batch = self.apply(batch, writing, self._call, [])
        if batch.requests is not None:
            drop_requests(batch.requests)
        return NOTHING

    def inlined(self, *, has_key: bool) -> InlineCode | None:  # noqa: ARG002
        """Return None: a batch is written as a whole."""
        return None

    def blame(self, error: BaseException, record: object, attempts: int = 1) -> FunctionError:
        """Return the error that names this operator and the batch; `record` is its last one."""
        blamed = super().blame(error, record, attempts)
        name = self.node.name
        blamed.args = (f'operator "{name}" failed on a batch up to record {short(record)}: {describe(error)}',)
        return blamed

    def snapshot(self, number: int) -> tuple[object, int]:
        """Prepare the transaction, begin the next one, and return the tokens of those that are not committed."""
        assert self._sink is not None
        token = self._sink.prepare(number)
        if token is not None:
            self._prepared[number] = token
        self._sink.begin()
        return list(self._prepared.values()) or None, 0

    def committed(self, number: int) -> None:
        """Commit the transactions of a checkpoint, and of any earlier one."""
        assert self._sink is not None
        for earlier in [one for one in self._prepared if one <= number]:
            self._sink.commit(self._prepared.pop(earlier))

    def finish(self) -> Batch | None:
        """Commit everything, if the job is not durable."""
        if self.recovery is None:
            self.snapshot(1)
            self.committed(1)
        return None

    def close(self) -> None:
        """Drop the records that were not prepared, and close the sink."""
        if self._sink is not None:
            try:
                self._sink.abort()
            finally:
                self._sink.close()
