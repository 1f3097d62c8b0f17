"""The restarts of a job's tasks as values: whether another one is allowed, and when."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, NamedTuple

from sage._standard_streams import is_of_output

if TYPE_CHECKING:
    from sage.durable import Restart


class Setback(NamedTuple):
    """A failure of a task after which all tasks were started again.

    Attributes:
        number: the number of the restart.
        task: the task that failed.
        error: its error.
    """

    number: int
    task: str
    error: BaseException


@dataclass(frozen=True, slots=True)
class TaskRestarts:
    """The restarts of a job's tasks so far.

    Attributes:
        policy: how many are allowed, or None for none.
        at: when each began.
        due: when tasks that have all ended are made again; infinite while nobody waits for that.
        setbacks: the failures before them, in order. Several tasks may fail before one restart.
    """

    policy: Restart | None = None
    at: tuple[float, ...] = ()
    due: float = math.inf
    setbacks: tuple[Setback, ...] = ()

    @property
    def causes(self) -> tuple[Setback, ...]:
        """The failures before the last restart."""
        return tuple(one for one in self.setbacks if one.number == len(self.at))

    def allows(self, now: float) -> bool:
        """Return whether another one may begin."""
        return self.policy is not None and self._recent_count(now) < self.policy.restarts_max

    def covers(self, error: BaseException) -> bool:
        """Return whether a restart may help after an error: not an interrupt, and not if nobody reads the output."""
        return self.policy is not None and isinstance(error, Exception) and not is_of_output(error)

    def begun(self, now: float) -> TaskRestarts:
        """Return the restarts with another one, which begins."""
        assert self.policy is not None
        return replace(self, at=(*self.at, now), due=now + self.policy.pause_s(self._recent_count(now)))

    def after(self, task: str, error: BaseException) -> TaskRestarts:
        """Return the restarts with another failure before the last one."""
        return replace(self, setbacks=(*self.setbacks, Setback(len(self.at), task, error)))

    def _recent_count(self, now: float) -> int:
        assert self.policy is not None
        since = now - self.policy.restart_window_s
        return sum(at > since for at in self.at)


NO_RESTARTS = TaskRestarts()
