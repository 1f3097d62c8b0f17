"""What the runtime needs of the places where tasks and services run."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    from collections.abc import Callable

    from sage._plan.logical import ServiceSpec
    from sage._runtime.coroutines import CoroutineLoop
    from sage._runtime.supervisor import Supervisor
    from sage._runtime.task import Pace, Task
    from sage.records import Span
    from sage.service import ServiceCalls


class Lane(Protocol):
    """Runs functions one after another, apart from everything else: the hooks of one service."""

    def run(self, function: Callable[[], None]) -> None:
        """Run `function` after those given before."""

    def where(self) -> str:
        """Return where the function that runs now stands, for a person."""

    def close(self, *, wait: bool) -> None:
        """Take nothing more and end; wait for that, unless the lane is abandoned."""


class Host(Protocol):
    """Where one service runs."""

    @property
    def spec(self) -> ServiceSpec:
        """What was registered."""

    @property
    def calls(self) -> ServiceCalls:
        """How callers reach the service."""

    @property
    def call_count(self) -> int:
        """How many calls were admitted."""

    @property
    def error_count(self) -> int:
        """How many of them raised."""

    @property
    def hooks(self) -> frozenset[str]:
        """The names of the hooks of the instance that is there."""

    def adopt(self, backend: Backend, loop: CoroutineLoop) -> None:
        """Let another job run the hooks of an instance that was kept."""

    def run(self, hook: str, due: float | None, done: Callable[[Any, BaseException | None], None]) -> None:
        """Run a hook apart from the caller and tell `done` what came of it.

        "build" makes an instance and gives the names of its hooks; "drain" waits until no call runs and gives whether
        that was so by `due`; the others are methods of the service.
        """

    def admit(self) -> None:
        """Let calls through."""

    def hold(self) -> None:
        """Let calls wait until `admit` or `refuse`."""

    def refuse(self) -> None:
        """Let every further call fail at once."""

    def abandon(self) -> str:
        """Give up on the hook that runs, and return where it stands."""

    def release(self) -> None:
        """Free what belongs to this job; the instance is kept for another."""

    def close(self) -> None:
        """Free everything; no hook follows."""


class Backend(ABC):
    """Where tasks run. A backend only calls `Task.step` again and again, and `Supervisor.handle` with what is posted.

    Attributes:
        capacity_records: the bound of each channel.
    """

    capacity_records: int

    @abstractmethod
    def now(self) -> float:
        """Return the monotonic time in seconds."""

    @abstractmethod
    def pace(self) -> Pace:
        """Return what decides how many records a step of one task takes."""

    @abstractmethod
    def span(self) -> Span:
        """Return the span of one task."""

    @abstractmethod
    def lane(self, name: str) -> Lane:
        """Return a new lane."""

    @abstractmethod
    def start(self, supervisor: Supervisor) -> None:
        """Begin to run a job: handle what is posted until it is sealed."""

    @abstractmethod
    def post(self, supervisor: Supervisor, event: Any) -> None:
        """Have `supervisor.handle(event)` called; any thread may post."""

    @abstractmethod
    def start_task(self, supervisor: Supervisor, task: Task) -> None:
        """Begin to step a task."""

    @abstractmethod
    def where(self, task: Task) -> str:
        """Return where a task's thread stands, for a person."""

    @abstractmethod
    def join_tasks(self, tasks: list[Task]) -> None:
        """Wait until nothing of these tasks, which have ended, runs any more."""

    @abstractmethod
    def wait(self, supervisor: Supervisor, timeout_s: float | None) -> bool:
        """Wait until the job is sealed and nothing of it runs, and return whether that is so."""
