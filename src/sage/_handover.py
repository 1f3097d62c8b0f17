"""From a job to the program that runs it: records are handed over one by one, by a thread of the job."""

from __future__ import annotations

import threading
from collections import deque
from contextlib import nullcontext, suppress
from typing import TYPE_CHECKING, Generic, Protocol

from sage._types import T
from sage.errors import JobError

if TYPE_CHECKING:
    from collections.abc import Callable, Generator, Iterator

RECORDS_MAX = 256
"""How many records wait for the program at most; the sink waits when there are as many."""


class RunningJob(Protocol):
    """The part of a job that a stream needs to hand its records to the program."""

    @property
    def is_running(self) -> bool:
        """Whether something of it still runs."""

    @property
    def _runs_while_waited_for(self) -> bool: ...

    def _run_to_end(self) -> None: ...

    def cancel(self) -> None:
        """End it at once."""

    def wait(self) -> object:
        """Wait for its end, and raise its errors."""


class JobRunner(Protocol):
    """The part of an environment that a stream needs to run its graph."""

    def submit(self, autostop: bool = False) -> RunningJob:
        """Run the graph."""

    def _submit_for(self, over: Callable[[object], None]) -> RunningJob: ...


class Handover(Generic[T]):
    """A bounded queue whose both ends may leave.

    Attributes:
        records_max: how many records wait at most, or None if the program takes them only when the job has ended.
    """

    def __init__(self) -> None:
        self.records_max: int | None = RECORDS_MAX
        self._records: deque[T] = deque()
        self._changed = threading.Condition()
        self._is_ended = False
        self._is_left = False

    def put(self, record: T) -> None:
        """Add a record, as soon as there is room; nothing happens when the program has left."""
        with self._changed:
            self._changed.wait_for(lambda: self._is_left or self._has_room())
            if not self._is_left:
                self._records.append(record)
                self._changed.notify_all()

    def end(self, _: object = None) -> None:
        """Say that no record follows."""
        with self._changed:
            self._is_ended = True
            self._changed.notify_all()

    def leave(self) -> None:
        """Say that nobody takes the records any more."""
        with self._changed:
            self._is_left = True
            self._records.clear()
            self._changed.notify_all()

    def __iter__(self) -> Iterator[T]:
        """Yield the records until the end."""
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._records or self._is_ended)
                taken = list(self._records)
                self._records.clear()
                self._changed.notify_all()
            if not taken:
                return
            yield from taken

    def results_of(self, runner: JobRunner) -> Generator[T]:
        """Run a graph, one of whose sinks puts records here, and yield them until it is over or the loop is left."""
        job = runner._submit_for(self.end)
        if not job.is_running:
            self.end()
        elif job._runs_while_waited_for:
            self.records_max = None
            job._run_to_end()
        try:
            yield from self
        except BaseException as error:
            self.leave()
            with suppress(JobError) if isinstance(error, GeneratorExit) else nullcontext():
                job.cancel()  # nobody hears of an error when a loop is left; it is in the log and in the report
            raise
        job.wait()

    def _has_room(self) -> bool:
        return self.records_max is None or len(self._records) < self.records_max
