"""Tasks as threads of this process: the backend of `LocalEnvironment`."""

from __future__ import annotations

import sys
import threading
import time
import traceback
from contextlib import suppress
from queue import Empty, SimpleQueue
from typing import TYPE_CHECKING

from sage._backends.pool import Pool
from sage._current_job import inside
from sage._logs import log_of
from sage._processes import zombies_of_init
from sage._runtime.backend import Backend, SupervisedJob
from sage._runtime.channel import CHANNEL_RECORDS_MAX
from sage._runtime.lifecycle import CannotBegin, TaskEvent, TaskEvents
from sage._runtime.pace import TimedPace
from sage.errors import ServiceError
from sage.records import BatchReading

if TYPE_CHECKING:
    from collections.abc import Callable
    from contextlib import AbstractContextManager
    from threading import Condition

    from sage._current_job import Inside
    from sage._processes import Process
    from sage._runtime.checkpoints import CheckpointEvent
    from sage._runtime.lifecycle import LifecycleEvent
    from sage._runtime.pace import Pace
    from sage._runtime.task import Task

BOOTSTRAP = frozenset({"_bootstrap", "_bootstrap_inner", "run"})

log = log_of("sage.dispatcher")

WATCH_S = 0.02
"""How often the watch looks whether a batch takes long, while a job runs."""

WAKES_MAX = 16
"""How many lanes are woken at once. A thread that waits for the interpreter looks for it again every 5 ms, so that a
thousand of them take more time from a job of as many services than their hooks do."""

WAKE_BOUND_S = 0.05
"""How long a lane waits for those woken before it, as a function may hold the interpreter for long."""


class ThreadsBackend(Backend):
    """Runs tasks on threads (`Pool`), and the supervisor on one of its own.

    All threads are daemons: one that hangs in user code cannot be ended in Python, and must not keep the interpreter
    from its exit. Everything else is joined before a job is sealed.
    """

    def __init__(self, capacity_records: int = CHANNEL_RECORDS_MAX) -> None:
        self.capacity_records = capacity_records
        self._pool: Pool | None = None
        self._queue: SimpleQueue[tuple[LifecycleEvent | CheckpointEvent, float]] = SimpleQueue()
        self._behind: tuple[LifecycleEvent | CheckpointEvent, float] | None = None  # taken from the queue already
        self._supervisor_thread: threading.Thread | None = None
        self._sealed = threading.Event()
        self.supervisor: Inside | None = None
        self._zombies_before: set[Process] = set()
        self.wakes: SimpleQueue[None] = SimpleQueue()
        """As many as lanes may be woken now."""
        for _ in range(WAKES_MAX):
            self.wakes.put(None)

    now = staticmethod(time.monotonic)

    def pace(self) -> Pace:
        """Return a pace that follows the measured time."""
        return TimedPace()

    def span(self) -> BatchReading:
        """Return a span that the watch may cut."""
        return BatchReading()

    def lane(self, name: str, *, must_start: bool = True) -> ThreadLane:
        """Return a thread for the hooks of one service."""
        return ThreadLane(name, self, must_start=must_start)

    def start(self, supervisor: SupervisedJob) -> None:
        self.supervisor = supervisor
        self._zombies_before = zombies_of_init()
        thread = threading.Thread(target=self._supervise, args=(supervisor,), name="sage-supervisor", daemon=True)
        try:
            thread.start()
        except RuntimeError as error:
            self.post(supervisor, CannotBegin(error))
            self._supervise(supervisor)  # services that the job has taken over must not be left, so it ends here
            return
        self._supervisor_thread = thread

    def post(self, supervisor: SupervisedJob, event: LifecycleEvent | CheckpointEvent) -> None:  # noqa: ARG002
        """Put an event into the supervisor's queue."""
        self._queue.put((event, time.monotonic()))

    def start_task(self, supervisor: Inside, task: Task) -> None:
        """Begin to step a task, on a thread of its own or on one that it shares."""
        if self._pool is None:
            self._pool = Pool(supervisor)
        self._pool.add(task)

    def relieve(self) -> None:
        """Give tasks that wait for a turn another thread, if the step that they wait for takes long."""
        if self._pool is not None:
            self._pool.relieve()

    def wait_for(
        self, supervisor: SupervisedJob, condition: Condition, is_over: Callable[[], bool], timeout_s: float | None
    ) -> bool:
        """Wait inside a function or a hook for other tasks of its job."""
        if self._pool is not None:
            self._pool.give_way()
        return super().wait_for(supervisor, condition, is_over, timeout_s)

    def loop_going_on(self) -> AbstractContextManager[None]:
        """Let other tasks go on while this thread waits for the event loop."""
        if self._pool is not None:
            self._pool.give_way()
        return super().loop_going_on()

    def where(self, task: Task) -> str:
        """Return the stack of the thread that a task is on."""
        return stack_of(None if self._pool is None else self._pool.thread_of(task))

    def join_tasks(self, tasks: list[Task]) -> None:
        """Join the threads of tasks that have ended."""
        pool, self._pool = self._pool, None  # a job that has ended is remembered with its backend
        if pool is not None:
            pool.join(tasks)

    def left_behind(self) -> tuple[str, ...]:
        """Name the processes that nobody waits for, if this one has to: it is the first of a container."""
        return tuple(
            f"process {one.pid} has ended and nobody waited for it; as process 1, this program is the parent of all "
            "that lose theirs, so start it under an init (docker run --init)"
            for one in sorted(zombies_of_init() - self._zombies_before)
        )

    def wait(self, supervisor: SupervisedJob, timeout_s: float | None) -> bool:
        """Wait for the one event that says that a job is sealed, then for the supervisor's thread."""
        if not self._sealed.wait(timeout_s):
            return False
        thread = self._supervisor_thread
        if thread is not None:
            thread.join()
            self._supervisor_thread = None
        return supervisor.is_sealed

    def _supervise(self, supervisor: SupervisedJob) -> None:
        try:
            self._handle_events(supervisor)
        except BaseException as error:  # a bug of ours, which must not leave anyone waiting
            supervisor.crash(error)
        finally:
            self._pool = None  # a job that has ended is remembered for long
            self._sealed.set()

    def _handle_events(self, supervisor: SupervisedJob) -> None:
        with inside(supervisor):
            while not supervisor.is_sealed:
                due = supervisor.next_due
                timeout_s = WATCH_S if due is None else max(0.0, min(WATCH_S, due - time.monotonic()))
                try:
                    event, happened_at = self._next_event(timeout_s)
                except Empty:
                    supervisor.watch()
                    self.relieve()
                    if due is not None and due <= time.monotonic():
                        supervisor.tick()
                else:
                    supervisor.handle(event, happened_at)

    def _next_event(self, timeout_s: float) -> tuple[LifecycleEvent | CheckpointEvent, float]:
        """Return the next event and when it came; with an event of a task come those of tasks that wait behind it."""
        event, happened_at = self._behind or self._queue.get(timeout=timeout_s)
        self._behind = None
        if isinstance(event, TaskEvent):
            events = [event]
            with suppress(Empty):
                while isinstance((behind := self._queue.get_nowait())[0], TaskEvent):
                    events.append(behind[0])
                self._behind = behind
            event = TaskEvents(tuple(events))
        return event, happened_at


class ThreadLane:
    """Runs the hooks of one service on one thread.

    The thread is started when the service is, so that stopping it needs no new thread at a time when there may be none.
    A service that is there already, whose thread hangs or was given up with an earlier job, is ended on the thread of
    the supervisor if the system has no other.
    """

    def __init__(self, name: str, backend: ThreadsBackend, *, must_start: bool) -> None:
        self._backend = backend
        self._queue: SimpleQueue[tuple[Callable[[], None], bool] | None] = SimpleQueue()
        self._is_idle = True
        self._name = name
        self._thread = self._begin(must_start=must_start)

    def run(self, function: Callable[[], None]) -> None:
        if self._thread is None:
            self._thread = self._begin(must_start=False)
        if self._thread is None:
            function()
        else:
            self._queue.put((function, self._may_wake()))

    def where(self) -> str:
        """Return the stack of the thread."""
        return stack_of(self._thread)

    def close(self, *, wait: bool) -> None:
        """End the thread after its current function."""
        self._queue.put(None)
        if wait and self._thread is not None and self._thread is not threading.current_thread():
            self._thread.join()

    def _may_wake(self) -> bool:
        """Wait until few other lanes have been woken without having begun; return whether this one counts as one."""
        if not self._is_idle:
            return False
        self._is_idle = False
        try:
            self._backend.wakes.get(timeout=WAKE_BOUND_S)
        except Empty:
            return False
        return True

    def _begin(self, *, must_start: bool) -> threading.Thread | None:
        thread = threading.Thread(target=self._work, name=f"sage-service-{self._name}", daemon=True)
        try:
            thread.start()
        except RuntimeError as error:
            if must_start:
                text = f'service "{self._name}" cannot have a thread of its own: {error}'
                raise ServiceError(text, service=self._name, fault="external") from error
            log.warning("no thread for the hooks of service=%r error=%s", self._name, error)
            return None
        return thread

    def _work(self) -> None:
        while (item := self._queue.get()) is not None:
            function, is_woken = item
            if is_woken:
                self._backend.wakes.put(None)
            with inside(self._backend.supervisor):
                function()
            self._is_idle = True


def stack_of(thread: threading.Thread | None) -> str:
    """Return where a thread stands, without the frames of the standard library that started it."""
    frame = sys._current_frames().get(thread.ident) if thread is not None and thread.ident is not None else None
    if frame is None:
        return ""
    stack = [entry for entry in traceback.extract_stack(frame) if entry.name not in BOOTSTRAP]
    return "".join(traceback.format_list(stack)).rstrip()
