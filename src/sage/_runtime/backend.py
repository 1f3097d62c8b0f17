"""The contracts of the places where tasks and services run."""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple, Protocol

from sage._current_job import Inside

if TYPE_CHECKING:
    from asyncio import AbstractEventLoop
    from collections.abc import Callable, Mapping
    from threading import Condition

    from sage._guardian.job_journal import JobJournal
    from sage._plan.logical import ServiceSpec
    from sage._runtime.checkpoints import CheckpointEvent
    from sage._runtime.coroutines import CoroutineLoop
    from sage._runtime.lifecycle import LifecycleEvent, State
    from sage._runtime.pace import Pace
    from sage._runtime.task import Task
    from sage.records import BatchReading
    from sage.service import ServiceCalls, ServiceContext, ServiceHandle, ServiceOptions, Supervision


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
    """The facts about a service's host for the report.

    Attributes:
        host: the kind of host: "inline", "process", "command" or "ray".
        pid: the process of the last incarnation, or None for one that was never started.
        exit_code: how that process ended; negative for a signal, None while it runs or where it is not known.
        output: the last lines that it wrote.
        unready: why its last `ready` said no, in words, where the host knows.
        released: whether the instance lives on, for other environments that share it.
        recycled: how many of its processes have given their place to new ones.
    """

    host: str = "inline"
    pid: int | None = None
    exit_code: int | None = None
    output: tuple[str, ...] = ()
    unready: str = ""
    released: bool = False
    recycled: int = 0


class CallWaits(NamedTuple):
    """How long calls of a service waited for their turn.

    Attributes:
        calls: how many calls waited.
        waited_s: for how long, in seconds, all together.
        busy_s: how long the service kept any of them waiting, in seconds.
        rate_waits: how many calls waited for the rate of the service.
        rate_waited_s: for how long, in seconds, all together.
    """

    calls: int = 0
    waited_s: float = 0.0
    busy_s: float = 0.0
    rate_waits: int = 0
    rate_waited_s: float = 0.0


@dataclass(frozen=True, slots=True)
class HostSurroundings:
    """The parts of a job that the host of one of its services works with.

    Attributes:
        backend: where the tasks of the job run; it gives the threads of hooks.
        loop: runs the coroutines of the job.
        handles: the handles of the job's services, by name.
        supervision: takes in requests of the service to its lifecycle, and its claims.
        on_died: called with the incarnation and a reason when its process ended by itself.
        on_failed: called likewise when whoever supervises it elsewhere has given it up and cleaned it up.
        guard: watches over processes, or None if nobody does.
        address: where a command listens that asks for its `{host}`.
        permit: called by each call as it begins, or None; it raises `HeldBackError` for one that may not begin.
    """

    backend: Backend
    loop: CoroutineLoop
    handles: dict[str, ServiceHandle[object]]
    supervision: Supervision
    on_died: Callable[[int, str], None]
    on_failed: Callable[[int, str], None]
    guard: JobJournal | None = None
    address: str = "127.0.0.1"
    permit: Callable[[], None] | None = None

    @property
    def process_guard(self) -> JobJournal:
        """The guard, for a host that starts a process."""
        assert self.guard is not None
        return self.guard


class Host(Protocol):
    """Where one service runs.

    It is made as `make_host(spec, context, surroundings)`. A host whose service has a process of its own
    calls `on_died(incarnation, text)` when that process ended by itself, which is at any time but while "exit" runs,
    and does so before it says how a hook that was cut off by it ended. Incarnations are counted from 1 by each "build",
    and anew in each job: an instance that is adopted is number 1.
    """

    @property
    def spec(self) -> ServiceSpec:
        """The registered service."""

    @property
    def options(self) -> ServiceOptions:
        """The options that the lifecycle of this job uses."""

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
    def waits(self) -> CallWaits:
        """How long calls of this job waited for their turn."""

    @property
    def is_calling(self) -> bool:
        """Whether a call runs on a thread of the host, which no backend steps."""

    @property
    def own_hooks(self) -> frozenset[str]:
        """The hooks of the host itself: "exit", if it has a process to end."""

    @property
    def local_hooks(self) -> frozenset[str]:
        """The names of the hooks that run in this process although the service has one of its own."""

    @property
    def exit_net_s(self) -> float:
        """How long after its bound its exit is given up, which it bounds by itself."""

    @property
    def hooks(self) -> frozenset[str]:
        """The names of the hooks of the instance that is there."""

    def adopt(self, context: ServiceContext, surroundings: HostSurroundings) -> None:
        """Let another job run the hooks of an instance that was kept; if it is dead, `on_died` is called now.

        The instance has a context already, which from now on acts like `context` (`ServiceContext.follow`).
        """

    def run(self, hook: str, due: float | None, done: Callable[[object, BaseException | None], None]) -> None:
        """Run a hook on another thread and pass its outcome to `done`.

        "build" makes an instance and gives the names of its hooks. "drain" waits until no call runs, then calls the
        service's `drain`, if it has one, and gives whether no call ran by `due`. "cleanup" ends with the deferred
        callbacks (`ServiceContext.run_deferred`); the lifecycle also asks for it if the class has none, or its
        constructor raised, once something was deferred. "exit" ends the process, by force if it has not ended by `due`,
        makes sure that it and its leftovers are gone, and gives an `Exit`; it is asked for once for each "build",
        however that ended. The others are methods of the service. No hook but "drain" and "exit" is bounded by the
        host: it runs until it ends, or `abandon` is called.
        """

    def hurry(self, due: float) -> None:
        """Move the `due` of the "exit" that runs forward."""

    def facts(self) -> HostFacts:
        """Return the facts about the host for the report; also after `close`."""

    def admit(self) -> None:
        """Let calls through."""

    def hold_back(self) -> None:
        """Refuse calls that would have to wait for the rate of the service, as the job ends."""

    def used(self, tokens: int) -> None:
        """Count the tokens of an answer towards the rate of the service."""

    def hold(self) -> None:
        """Let calls wait until `admit` or `refuse`."""

    def refuse(self) -> None:
        """Let every further call fail at once."""

    def abandon(self) -> str:
        """Give up on the hook that runs, and return where it stands."""

    def release(self) -> None:
        """Free the resources of this job; the instance is kept for another."""

    def close(self) -> None:
        """Free everything; no hook follows."""


class SupervisedJob(Inside, Protocol):
    """A job as its backend sees it: the job's supervisor."""

    @property
    def state(self) -> State:
        """The lifecycle as it stands."""

    @property
    def hosts(self) -> Mapping[str, Host]:
        """The hosts of the job's services, by name."""

    @property
    def is_sealed(self) -> bool:
        """Whether everything has ended and the report is made."""

    @property
    def next_due(self) -> float | None:
        """When `tick` is due next, by the backend's clock."""

    def handle(self, event: LifecycleEvent | CheckpointEvent, happened_at: float | None = None) -> None:
        """Take a posted event in; `happened_at` is when a waiting one came. One thread at a time may call this."""

    def tick(self) -> None:
        """Let time-outs take effect."""

    def watch(self) -> None:
        """Interrupt slow batches so that their finished records can move on."""

    def crash(self, error: BaseException) -> None:
        """Give up after a bug in the supervision itself."""


class Backend(ABC):
    """Where tasks run. A backend only calls `Task.step` repeatedly, and `SupervisedJob.handle` with each posted event.

    Attributes:
        capacity_records: the bound of each channel.
        runs_while_waited_for: whether a job goes on only while somebody waits for its end.
    """

    capacity_records: int
    runs_while_waited_for: bool = False

    @abstractmethod
    def now(self) -> float:
        """Return the monotonic time in seconds."""

    def wall(self) -> float:
        """Return the time in seconds since the epoch; unlike `now`, it goes on between two runs, and may jump."""
        return time.time()

    @abstractmethod
    def pace(self) -> Pace:
        """Return the pace that decides how many records a step of one task takes."""

    @abstractmethod
    def span(self) -> BatchReading:
        """Return the span of one task."""

    @abstractmethod
    def lane(self, name: str, *, must_start: bool = True) -> Lane:
        """Return a new lane.

        Without `must_start` there always is one, as it is for a service that is there and has to be ended.

        Raises:
            ServiceError: it must start, and the system has no more threads.
        """

    def event_loop(self) -> AbstractEventLoop:
        """Return a new loop for the coroutines of a job, which is run on a thread of its own."""
        import asyncio

        return asyncio.new_event_loop()

    def wait_for(
        self,
        supervisor: SupervisedJob,  # noqa: ARG002
        condition: Condition,
        is_over: Callable[[], bool],
        timeout_s: float | None,
    ) -> bool:
        """Wait inside a function or a hook for other tasks of its job, and return whether it happened in time.

        Args:
            supervisor: that of the job.
            condition: notified when `is_over` may have changed.
            is_over: says whether the waiting is over.
            timeout_s: how long to wait, in seconds; None is without bound.
        """
        with condition:
            return condition.wait_for(is_over, timeout_s)

    def loop_going_on(self) -> AbstractContextManager[None]:
        """Return a context that keeps the loop going while a thread waits for it."""
        return nullcontext()

    @abstractmethod
    def start(self, supervisor: SupervisedJob) -> None:
        """Begin to run a job: handle posted events until it is sealed."""

    @abstractmethod
    def post(self, supervisor: SupervisedJob, event: LifecycleEvent | CheckpointEvent) -> None:
        """Have `supervisor.handle(event)` called; any thread may post."""

    @abstractmethod
    def start_task(self, supervisor: SupervisedJob, task: Task) -> None:
        """Begin to step a task."""

    @abstractmethod
    def where(self, task: Task) -> str:
        """Return where a task's thread stands, for a person."""

    @abstractmethod
    def join_tasks(self, tasks: list[Task]) -> None:
        """Wait until nothing of these tasks, which have ended, runs any more."""

    def left_behind(self) -> tuple[str, ...]:
        """Describe the job's leftovers in this process that have no owner."""
        return ()

    @abstractmethod
    def wait(self, supervisor: SupervisedJob, timeout_s: float | None) -> bool:
        """Wait until the job is sealed and nothing of it runs, and return whether that is so."""
