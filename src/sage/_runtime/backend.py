"""What the runtime needs of the places where tasks and services run."""

from __future__ import annotations

from abc import ABC, abstractmethod
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    from asyncio import AbstractEventLoop
    from collections.abc import Callable
    from threading import Condition

    from sage._plan.logical import ServiceSpec
    from sage._runtime.coroutines import CoroutineLoop
    from sage._runtime.supervisor import Supervisor
    from sage._runtime.task import Pace, Task
    from sage.records import Span
    from sage.service import ServiceCalls, ServiceContext, ServiceOptions


class Lane(Protocol):
    """Runs functions one after another, apart from everything else: the hooks of one service."""

    def run(self, function: Callable[[], None]) -> None:
        """Run `function` after those given before."""

    def where(self) -> str:
        """Return where the function that runs now stands, for a person."""

    def close(self, *, wait: bool) -> None:
        """Take nothing more and end; wait for that, unless the lane is abandoned."""


@dataclass(frozen=True, slots=True)
class HostFacts:
    """What a report says of the place where a service ran.

    Attributes:
        host: what kind of place: "inline", "process", "command" or "ray".
        pid: the process of the last incarnation, or None for one that was never started.
        exit_code: how that process ended; negative for a signal, None while it runs or where it is not known.
        output: the last lines that it wrote.
        unready: why its last `ready` said no, in words, where the host knows.
        released: whether the instance lives on, for other environments that share it.
    """

    host: str = "inline"
    pid: int | None = None
    exit_code: int | None = None
    output: tuple[str, ...] = ()
    unready: str = ""
    released: bool = False


class Host(Protocol):
    """Where one service runs.

    It is made as `make_host(spec, context, backend, loop, on_died)`. A host whose service has a process of its own
    calls `on_died(incarnation, text)` when that process ended by itself, which is at any time but while "exit" runs,
    and does so before it says how a hook that was cut off by it ended. Incarnations are counted from 1 by each "build",
    and anew in each job: an instance that is adopted is number 1.
    """

    @property
    def spec(self) -> ServiceSpec:
        """What was registered."""

    @property
    def options(self) -> ServiceOptions:
        """What the lifecycle of this job goes by."""

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
    def is_calling(self) -> bool:
        """Whether a call runs on a thread of the host, which no backend steps."""

    @property
    def own_hooks(self) -> frozenset[str]:
        """The names of the hooks that the host has whatever the service is: "exit", if it has a process to end."""

    @property
    def local_hooks(self) -> frozenset[str]:
        """The names of the hooks that run in this process although the service has one of its own."""

    @property
    def hooks(self) -> frozenset[str]:
        """The names of the hooks of the instance that is there."""

    def adopt(
        self, context: ServiceContext, backend: Backend, loop: CoroutineLoop, on_died: Callable[[int, str], None]
    ) -> None:
        """Let another job run the hooks of an instance that was kept; if it is dead, `on_died` is called now.

        The instance has a context already, which from now on does what `context` does (`ServiceContext.follow`).
        """

    def run(self, hook: str, due: float | None, done: Callable[[Any, BaseException | None], None]) -> None:
        """Run a hook apart from the caller and tell `done` what came of it.

        "build" makes an instance and gives the names of its hooks. "drain" waits until no call runs, then calls the
        service's `drain`, where it has one, and gives whether no call ran by `due`. "cleanup" ends with what the
        service deferred (`ServiceContext.run_deferred`); the lifecycle also asks for it if the class has none, or its
        constructor raised, once something was deferred. "exit" ends the process, by force if it has not ended by `due`,
        makes sure that it and what it left are gone, and gives an `Exit`; it is asked for once for each "build",
        however that ended. The others are methods of the service. No hook but "drain" and "exit" is bounded by the
        host: it runs until it ends, or `abandon` is called.
        """

    def hurry(self, due: float) -> None:
        """Move the `due` of the "exit" that runs forward."""

    def facts(self) -> HostFacts:
        """Return what the report says of the host; also after `close`."""

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

    def event_loop(self) -> AbstractEventLoop:
        """Return a new loop for the coroutines of a job, which is run on a thread of its own."""
        import asyncio

        return asyncio.new_event_loop()

    def wait_for(
        self,
        supervisor: Supervisor,  # noqa: ARG002
        condition: Condition,
        is_over: Callable[[], bool],
        timeout_s: float | None,
    ) -> bool:
        """Wait inside a function or a hook for what other tasks of its job do, and return whether it came in time.

        Args:
            supervisor: that of the job.
            condition: notified when `is_over` may have changed.
            is_over: says whether the waiting is over.
            timeout_s: how long to wait, in seconds; None is without bound.
        """
        with condition:
            return condition.wait_for(is_over, timeout_s)

    def loop_going_on(self) -> AbstractContextManager[None]:
        """Return what keeps the loop going while a thread waits for it."""
        return nullcontext()

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
