"""The contracts of sources and of sinks with transactions: how records enter a job, and leave it exactly once."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import TYPE_CHECKING, Any, Generic

from sage._types import A_contra, T_co

if TYPE_CHECKING:
    from collections.abc import Sequence


class Source(ABC, Generic[T_co]):
    """Where records come from. One object serves one task; all its methods are called on that task's thread.

    The engine calls `open` once, then `read` again and again, then `close` once, also after a failure, a stop or a
    cancel. The implementer returns from `read` soon: a source that waits inside `read` keeps only its own task, but a
    stop waits for it until the time to drain is over.

    Attributes:
        bounded: whether the source ends by itself.
        skipped: how many records it has left out because they could not be read; the report counts them as failed; 0
            before `open`.
        durable: whether the job is durable; set before `open`.
    """

    bounded: bool = True
    durable: bool = False
    skipped: int = 0

    def open(self) -> None:
        """Acquire resources; called once before the first `read`."""

    @abstractmethod
    def read(self, records_max: int) -> Sequence[T_co] | None:
        """Return the next records.

        Args:
            records_max: how many records may be returned at most, at least 1.

        Returns:
            The records; an empty sequence when there is nothing now; None at the end, after which it is not called
            again.

        Raises:
            Exception: any; the operator's `on_error` decides. Records read before it must be returned
                first.
        """

    def position(self) -> object:
        """Return the place of the next record, as a value that can be pickled; durable jobs ask for it between reads.

        A source that has this method takes its position back: its `open(position=None)` begins there after a restart. A
        source without it begins as always, so that records may be lost or come twice.
        """
        raise NotImplementedError

    def committed(self, position: Any) -> None:
        """Take in that a checkpoint is complete which has all records before this position.

        Whoever sent them need not keep them any more. Called between reads, and after the last one, before `close`.
        """

    def close(self) -> None:
        """Release everything; called exactly once if `open` began."""


class TransactionalSink(ABC, Generic[A_contra]):
    """A sink whose records appear all at once, when a checkpoint is complete, and so exactly once over restarts.

    You give an instance to `sink`; each parallel task has a copy. All methods are called on the task's thread. First
    `open`, then, if the last run did not end by itself or by a stop, `commit` for each transaction that the last
    checkpoint knows of, then `begin`. Then `write` is called
    with records, and at each checkpoint `prepare` and `begin`; when the checkpoint is complete, `commit`. In the end
    come `abort` and `close`, also after a failure. In a job that is not durable, all records are one transaction, which
    is committed when the inputs have ended.

    Attributes:
        durable: whether the job is durable, so that a commit may be repeated; set before `open`.
        promise: how often records come over restarts, for the plan that people see.
    """

    durable: bool = True
    promise: str = "each record exactly once"

    def open(self, part: str, checkpoint: int) -> None:
        """Acquire resources, and drop everything of `part` that belongs to a later checkpoint than `checkpoint`.

        That may be something that was prepared before a crash, and, if a damaged checkpoint was left out, also
        something that was committed.

        Args:
            part: names the task; the same after a restart, and different for all other tasks and jobs.
            checkpoint: the checkpoint from which the job goes on; 0 at the first start.
        """

    def begin(self) -> None:
        """Begin a transaction."""

    @abstractmethod
    def write(self, batch: Sequence[A_contra]) -> None:
        """Add records to the transaction; the list is not to be changed."""

    @abstractmethod
    def prepare(self, number: int) -> object:
        """Make the transaction durable, but not visible yet.

        Args:
            number: the number of the checkpoint that it belongs to.

        Returns:
            A token that can be pickled, by which it is committed later, also after a restart; None if it is empty.
        """

    @abstractmethod
    def commit(self, token: Any) -> None:
        """Make a prepared transaction visible. Do nothing if it is: after a crash it is committed again."""

    def abort(self) -> None:
        """Drop the current transaction, which was not prepared."""

    def close(self) -> None:
        """Release everything; called exactly once if `open` began."""
