"""Tasks as threads of this process: the backend of `LocalEnvironment`."""

from __future__ import annotations

import sys
import threading
import time
import traceback
from queue import Empty, SimpleQueue
from typing import TYPE_CHECKING, Any

from sage._runtime.backend import Backend
from sage._runtime.channel import CHANNEL_RECORDS_MAX
from sage._runtime.inside import inside
from sage._runtime.task import Step, TimedPace
from sage.records import Span

if TYPE_CHECKING:
    from collections.abc import Callable

    from sage._runtime.inside import Inside
    from sage._runtime.supervisor import Supervisor
    from sage._runtime.task import Pace, Task

BOOTSTRAP = frozenset({"_bootstrap", "_bootstrap_inner", "run"})

WATCH_S = 0.02
"""How often the watch looks whether a batch takes long, while a job runs."""


class ThreadsBackend(Backend):
    """Runs each task on a thread, and the supervisor on one of its own.

    All threads are daemons: one that hangs in user code cannot be ended in Python, and must not keep the interpreter
    from its exit. Everything else is joined before a job is sealed.
    """

    def __init__(self, capacity_records: int = CHANNEL_RECORDS_MAX) -> None:
        self.capacity_records = capacity_records
        self._threads: dict[Task, threading.Thread] = {}
        self._queue: SimpleQueue[Any] = SimpleQueue()
        self._supervisor_thread: threading.Thread | None = None
        self._sealed = threading.Event()
        self.supervisor: Inside | None = None

    def now(self) -> float:
        """Return the monotonic time."""
        return time.monotonic()

    def pace(self) -> Pace:
        """Return a pace that follows the measured time."""
        return TimedPace()

    def span(self) -> Span:
        """Return a span that the watch may cut."""
        return Span()

    def lane(self, name: str) -> ThreadLane:
        """Return a thread for the hooks of one service."""
        return ThreadLane(name, self)

    def start(self, supervisor: Supervisor) -> None:
        """Start the supervisor's thread."""
        self.supervisor = supervisor
        thread = threading.Thread(target=self._supervise, args=(supervisor,), name="sage-supervisor", daemon=True)
        self._supervisor_thread = thread
        thread.start()

    def post(self, supervisor: Supervisor, event: Any) -> None:  # noqa: ARG002
        """Put an event into the supervisor's queue."""
        self._queue.put(event)

    def start_task(self, supervisor: Inside, task: Task) -> None:
        """Start a task's thread."""
        doorbell = Doorbell()
        task.wake = doorbell.ring
        thread = threading.Thread(
            target=self._run_task, args=(supervisor, task, doorbell), name=f"sage-{task.name}", daemon=True
        )
        self._threads[task] = thread
        thread.start()

    def where(self, task: Task) -> str:
        """Return the stack of a task's thread."""
        return stack_of(self._threads.get(task))

    def join_tasks(self, tasks: list[Task]) -> None:
        """Join the threads of tasks that have ended."""
        for task in tasks:
            if task in self._threads:
                self._threads.pop(task).join()

    def wait(self, supervisor: Supervisor, timeout_s: float | None) -> bool:
        """Wait for the one event that says that a job is sealed, then for the supervisor's thread."""
        if not self._sealed.wait(timeout_s):
            return False
        thread = self._supervisor_thread
        if thread is not None:
            thread.join()
            self._supervisor_thread = None
        return supervisor.is_sealed

    def _supervise(self, supervisor: Supervisor) -> None:
        try:
            self._handle_events(supervisor)
        except BaseException as error:  # a bug of ours, which must not leave anyone waiting
            supervisor.crash(error)
        finally:
            self._sealed.set()

    def _handle_events(self, supervisor: Supervisor) -> None:
        with inside(supervisor):
            while not supervisor.is_sealed:
                due = supervisor.next_due
                timeout_s = WATCH_S if due is None else max(0.0, min(WATCH_S, due - time.monotonic()))
                try:
                    event = self._queue.get(timeout=timeout_s)
                except Empty:
                    supervisor.watch()
                    if due is not None and due <= time.monotonic():
                        supervisor.tick()
                else:
                    supervisor.handle(event)

    def _run_task(self, supervisor: Inside, task: Task, doorbell: Doorbell) -> None:
        with inside(supervisor):
            while True:
                came = task.step()
                if came is Step.DONE:
                    return
                if came is not Step.PROGRESSED:
                    wake_at = task.wake_at
                    doorbell.wait(None if wake_at is None else wake_at - time.monotonic())


class Doorbell:
    """Wakes one thread. A ring while nobody waits is remembered, so that none is missed."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._lock.acquire()

    def ring(self) -> None:
        """Wake the thread, now or when it waits next."""
        try:
            self._lock.release()
        except RuntimeError:
            return  # It was rung already, and nobody has come yet.

    def wait(self, timeout_s: float | None) -> None:
        """Wait until it rings or the time is over."""
        if timeout_s is None:
            self._lock.acquire()
        elif timeout_s > 0:
            self._lock.acquire(timeout=timeout_s)


class ThreadLane:
    """Runs the hooks of one service on one thread.

    The thread is started when the service is, so that stopping it needs no new thread at a time when there may be none.
    """

    def __init__(self, name: str, backend: ThreadsBackend) -> None:
        self._backend = backend
        self._queue: SimpleQueue[Callable[[], None] | None] = SimpleQueue()
        self._name = name
        self._thread = threading.Thread(target=self._work, name=f"sage-service-{name}", daemon=True)
        self._thread.start()

    def run(self, function: Callable[[], None]) -> None:
        """Run `function` after those given before."""
        self._queue.put(function)

    def where(self) -> str:
        """Return the stack of the thread."""
        return stack_of(self._thread)

    def close(self, *, wait: bool) -> None:
        """End the thread after what it runs now."""
        self._queue.put(None)
        if wait and self._thread is not threading.current_thread():
            self._thread.join()

    def _work(self) -> None:
        while (function := self._queue.get()) is not None:
            with inside(self._backend.supervisor):
                function()


def stack_of(thread: threading.Thread | None) -> str:
    """Return where a thread stands, without the frames of the standard library that started it."""
    frame = sys._current_frames().get(thread.ident) if thread is not None and thread.ident is not None else None
    if frame is None:
        return ""
    stack = [entry for entry in traceback.extract_stack(frame) if entry.name not in BOOTSTRAP]
    return "".join(traceback.format_list(stack)).rstrip()
