"""The restarts of a job's tasks as values: whether another one is allowed, and when."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, NamedTuple

from sage._standard_streams import is_of_output
from sage.errors import JobError, describe

if TYPE_CHECKING:
    from sage.durable import Restart


SETBACKS_MAX = 100
"""How many failures are kept for the report, the last ones: a stream that never ends may have any number."""


class Setback(NamedTuple):
    """A failure of a task after which all tasks were started again.

    Attributes:
        number: the number of the restart.
        task: the task that failed.
        text: its error in a line. The error itself would keep everything that the task had.
    """

    number: int
    task: str
    text: str


@dataclass(frozen=True, slots=True)
class TaskRestarts:
    """The restarts of a job's tasks so far.

    Attributes:
        policy: how many are allowed, or None for none.
        count: how many there were.
        at: when those of them began that may still count towards the limit.
        due: when tasks that have all ended are made again; infinite while nobody waits for that.
        setbacks: the last failures before them, in order. Several tasks may fail before one restart.
        causes: the failures before the last restart, until its tasks are there: each task with its error.
    """

    policy: Restart | None = None
    count: int = 0
    at: tuple[float, ...] = ()
    due: float = math.inf
    setbacks: tuple[Setback, ...] = ()
    causes: tuple[tuple[str, BaseException], ...] = ()

    def allows(self, now: float) -> bool:
        """Return whether another one may begin."""
        return self.policy is not None and len(self._recent(now)) < self.policy.restarts_max

    def covers(self, error: BaseException) -> bool:
        """Return whether a restart may help after an error: not an interrupt, and not if nobody reads the output."""
        return self.policy is not None and isinstance(error, Exception) and not is_of_output(error)

    def begun(self, now: float) -> TaskRestarts:
        """Return the restarts with another one, which begins."""
        assert self.policy is not None
        recent = self._recent(now)
        return replace(self, count=self.count + 1, at=(*recent, now), due=now + self.policy.pause_s(len(recent)))

    def after(self, task: str, error: BaseException) -> TaskRestarts:
        """Return the restarts with another failure before the last one."""
        text = str(error) if isinstance(error, JobError) else f'task "{task}" failed: {describe(error)}'
        setback = Setback(self.count, task, text.partition("\n")[0])
        setbacks = (*self.setbacks, setback)[-SETBACKS_MAX:]
        return replace(self, setbacks=setbacks, causes=(*self.causes, (task, error)))

    def done(self) -> TaskRestarts:
        """Return the restarts once the tasks of the last one are there."""
        return replace(self, causes=())

    def _recent(self, now: float) -> tuple[float, ...]:
        assert self.policy is not None
        since = now - self.policy.restart_window_s
        return tuple(at for at in self.at if at > since)


NO_RESTARTS = TaskRestarts()
