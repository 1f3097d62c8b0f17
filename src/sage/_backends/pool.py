"""Tasks that share a thread: one thread steps tasks in turn that neither wait nor need their own.

A thread for each of a thousand tasks spends its time on waking the others. So one thread steps all of them, each until
it has nothing to do. A task that turns out to wait, or to take long for a record, keeps the thread it is on, and the
others get a new one.
"""

from __future__ import annotations

import heapq
import math
import threading
from collections import deque
from contextlib import suppress
from enum import Enum
from itertools import count
from time import monotonic
from typing import TYPE_CHECKING

from sage._current_job import inside
from sage._forks import leave_if_forked, useless_after_fork
from sage._plan.logical import Kind, Node
from sage._runtime.states import Step
from sage.connector import TransactionalSink
from sage.functions import BaseFunction, is_coroutine_function

if TYPE_CHECKING:
    from collections.abc import Sequence

    from sage._current_job import Inside
    from sage._runtime.task import Task

STUCK_S = 0.01
"""A step that takes longer keeps its thread, if other tasks wait for a turn, in seconds. A step aims at 5 ms.

It has to be seen twice: if the machine held up the whole process, the step ends soon after the first time.
"""

TURN_S = 0.001
"""A task makes further steps for so long before the next one has its turn."""

REJOIN_STEPS = 16
REJOIN_GROWTH = 4
"""A task that kept a thread shares one again after so many steps; after so many times more the next time.

Slow steps count too: many threads that wait for the interpreter's lock all seem slow, and would never be fewer.
"""


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


def may_share(nodes: Sequence[Node]) -> bool:
    """Return whether different threads may step a task of these operators, and whether it is likely not to wait.

    A class with a constructor, `open` or `close` may hold something that only one thread may use, such as a connection
    to SQLite, and so may a generator. A function that gets a batch is likely to take long, and a coroutine to wait.
    """
    return all(map(_shares, nodes))


def _shares(node: Node) -> bool:
    if node.kind is Kind.MAP_BATCHES or node.settings.get("bridge") is not None:
        return False
    if node.function is None:
        return True
    target = node.function.target
    if node.kind is Kind.SOURCE:
        return isinstance(target, list | tuple | range)
    targets = target if isinstance(target, tuple) and not node.function.is_class else (target,)
    return all(_is_plain(one, is_class=node.function.is_class) for one in targets)


def _is_plain(target: object, *, is_class: bool) -> bool:
    """Return whether a function has no life of its own, and does not wait by its nature."""
    if isinstance(target, TransactionalSink):
        return False
    type_ = target if is_class else type(target)
    if is_class or isinstance(target, BaseFunction):
        hooks = ("open", "close", "__init__", "__new__") if is_class else ("open", "close")
        return all(getattr(type_, hook, None) is getattr(_Plain, hook) for hook in hooks)
    return not is_coroutine_function(target)


class _Plain(BaseFunction):
    """A function that has no hook of its own."""


class Turn(Enum):
    """How a task stands with the threads."""

    IDLE = "idle"
    QUEUED = "queued"
    RUNNING = "running"
    RUNG = "running, and woken meanwhile"
    ALONE = "on a thread of its own"


class Seat:
    """The place of one task among the threads. All but `ring` is changed under the lock of the pool.

    Attributes:
        may_share: whether different threads may step it.
        turn: how it stands.
        due: when it is to be stepped although nobody wakes it, if that is noted, or None.
        thread: the thread that it is on, or None.
        doorbell: the thread's own doorbell, at which it waits.
        rejoin_steps: how many steps let it share a thread again.
    """

    def __init__(self, task: Task, pool: Pool, *, may_share: bool) -> None:
        self.task = task
        self.may_share = may_share
        self.turn = Turn.QUEUED if may_share else Turn.ALONE
        self.due: float | None = None
        self.thread: threading.Thread | None = None
        self.doorbell = Doorbell()
        self.rejoin_steps = REJOIN_STEPS
        self._pool = pool

    def ring(self) -> None:
        """Have the task stepped; any thread may call it."""
        if self.turn is Turn.ALONE:
            self.doorbell.ring()
        elif self.turn is not Turn.QUEUED:
            self._pool.ring(self)


class Worker:
    """A thread that steps the tasks that share one, until a task keeps it.

    Attributes:
        seat: the one whose task it steps now, or None.
        since: when that step began.
        seen: when that step was first seen to take long, or 0.
        is_shared: whether no task has kept it.
    """

    def __init__(self) -> None:
        self.thread = threading.current_thread()
        self.seat: Seat | None = None
        self.since = self.seen = 0.0
        self.is_shared = True

    def is_stuck(self, now: float) -> bool:
        """Return whether the step takes long, and did when this was asked before."""
        if self.seat is None or now - self.since <= STUCK_S:
            return False
        if self.seen <= self.since:
            self.seen = now
        return now - self.seen > STUCK_S / 2


class Pool:
    """The threads that step the tasks of a job.

    One thread at a time serves the tasks that share one, unless all who did were kept at once. Threads are daemons: one
    that hangs in user code cannot be ended.
    """

    def __init__(self, job: Inside | None) -> None:
        self._job = job
        self._lock = threading.Lock()
        self._seats: dict[Task, Seat] = {}
        self._ready: deque[Seat] = deque()
        self._timed: list[tuple[float, int, Seat]] = []
        self._numbers = count()
        self._workers: dict[threading.Thread, Worker] = {}
        self._workers_count = 0  # those that are shared; a thread that is about to begin is one already
        self._sharing_count = 0  # the tasks that share
        self._started_last = 0
        self._is_parked = False
        self._is_closed = False
        self._doorbell = Doorbell()
        useless_after_fork(self)

    def _after_fork_in_child(self) -> None:
        self._lock = threading.Lock()  # a thread that is not in this process may have held it
        self._is_closed = True

    def add(self, task: Task) -> None:
        """Begin to step a task."""
        seat = self._seats[task] = Seat(task, self, may_share=may_share(task.nodes))
        task.wake = seat.ring
        useless_after_fork(task)
        if seat.may_share:
            with self._lock:
                self._sharing_count += 1
                missing = self._queue(seat)
            error = self._start_workers(missing)
            if error is not None:
                self._give_up(seat, error)
        else:
            seat.thread = threading.Thread(target=self._alone, args=(seat,), name=f"sage-{task.name}", daemon=True)
            try:
                seat.thread.start()
            except RuntimeError:
                del self._seats[task]
                raise

    def _give_up(self, seat: Seat, error: RuntimeError) -> None:
        """Refuse a task for which no thread can be started, unless others that are there will come to it."""
        with self._lock:
            if self._workers_count or seat not in self._ready:
                return
            self._ready.remove(seat)
            self._sharing_count -= 1
            del self._seats[seat.task]
        raise error

    def thread_of(self, task: Task) -> threading.Thread | None:
        """Return the thread that a task is on, or None while it waits for its turn."""
        seat = self._seats.get(task)
        return None if seat is None else seat.thread

    def ring(self, seat: Seat) -> None:
        """Queue a task that shares a thread, if it has nothing to do yet."""
        with self._lock:
            if seat.turn is Turn.ALONE:
                seat.doorbell.ring()
            elif seat.turn is Turn.RUNNING:
                seat.turn = Turn.RUNG
            if seat.turn is not Turn.IDLE:
                return
            missing = self._queue(seat)
        self._start_workers(missing)

    def relieve(self) -> None:
        """Give the tasks that wait for a turn another thread, if the step that they wait for takes long.

        Any thread may call it at any time, and the watch does so again and again.
        """
        if self._ready:
            with self._lock:
                missing = self._relieve()
            with suppress(RuntimeError):  # there can be no more threads now; it is tried again
                self._start_workers(missing)

    def give_way(self) -> None:
        """Let the tasks that share the calling thread go on elsewhere, as it is about to wait."""
        worker = self._workers.get(threading.current_thread())
        if worker is None or not worker.is_shared:
            return
        with self._lock:
            self._keep(worker)
            missing = self._missing()
        self._start_workers(missing)

    def join(self, tasks: Sequence[Task]) -> None:
        """Join the threads of tasks that have ended; no other task is stepped any more, unless it has a thread."""
        with self._lock:
            self._is_closed = True
            ended = [self._seats.pop(task) for task in tasks if task in self._seats]
            threads = {seat.thread for seat in ended}
            # The thread that serves all: it may be inside a task that was given up.
            threads |= {worker.thread for worker in self._workers.values() if worker.seat in (None, *ended)}
        self._doorbell.ring()
        for thread in threads:
            if thread is not None and thread is not threading.current_thread():
                thread.join()

    # --- under the lock ---

    def _queue(self, seat: Seat) -> int:
        """Queue a task, and return how many threads to start for those that wait."""
        seat.turn = Turn.QUEUED
        self._ready.append(seat)
        if self._is_parked:
            self._is_parked = False
            self._doorbell.ring()
            return 0
        return self._relieve()

    def _relieve(self) -> int:
        now = monotonic()
        for worker in self._workers.values():
            if worker.is_shared and worker.is_stuck(now):
                self._keep(worker)
        return self._missing()

    def _keep(self, worker: Worker) -> None:
        """Leave a thread to the task that it steps."""
        assert worker.seat is not None
        worker.is_shared = False
        worker.seat.turn = Turn.ALONE
        self._workers_count -= 1
        self._sharing_count -= 1

    def _missing(self) -> int:
        """Return how many threads to start: twice as many each time that all of them are kept soon."""
        if self._workers_count or not self._sharing_count or self._is_closed:
            return 0
        self._started_last = self._workers_count = max(1, min(2 * self._started_last, len(self._ready)))
        return self._workers_count

    def _next(self) -> Seat | float | None:
        """Return whose turn it is, or for how many seconds nobody has one, or None if a thread is not needed."""
        due = self._queue_due()
        if self._ready and not self._is_closed:
            seat = self._ready.popleft()
            seat.turn = Turn.RUNNING
            return seat
        if self._workers_count > 1 or not self._sharing_count or self._is_closed:
            self._workers_count -= 1
            return None
        self._is_parked = True
        self._started_last = 0
        return due - monotonic()

    def _queue_due(self) -> float:
        """Queue the tasks whose time has come, and return when the next one is due."""
        while self._timed:
            due, _, seat = self._timed[0]
            is_noted = seat.due == due
            if is_noted and due > monotonic():
                return due
            heapq.heappop(self._timed)
            if is_noted:
                seat.due = None
                if seat.turn is Turn.IDLE:
                    seat.turn = Turn.QUEUED
                    self._ready.append(seat)
        return math.inf

    def _put_back(self, seat: Seat, came: Step) -> None:
        """Let a task wait for its next turn, or until it is woken."""
        seat.thread = None
        if came is Step.DONE:
            self._sharing_count -= 1
        elif came is Step.PROGRESSED or seat.turn is Turn.RUNG:
            seat.turn = Turn.QUEUED
            self._ready.append(seat)
        else:
            seat.turn = Turn.IDLE
            due = seat.task.wake_at
            if due is not None and due != seat.due:
                heapq.heappush(self._timed, (due, next(self._numbers), seat))
            seat.due = due

    # --- the threads ---

    def _start_workers(self, missing: int) -> RuntimeError | None:
        """Start threads, and return the error if the system has no more; the watch of the job tries again soon."""
        for number in range(missing):
            try:
                threading.Thread(target=self._in_turn, name="sage-tasks", daemon=True).start()
            except RuntimeError as error:
                with self._lock:
                    self._workers_count -= missing - number
                return error
        return None

    def _in_turn(self) -> None:
        """Step the tasks that share a thread, until this one is kept or not needed."""
        worker = Worker()
        with inside(self._job, is_task=True):
            with self._lock:
                self._workers[worker.thread] = worker
            try:
                while worker.is_shared:
                    with self._lock:
                        turn = self._next()
                    if turn is None:
                        return
                    if isinstance(turn, float):
                        self._doorbell.wait(None if turn == math.inf else turn)
                        self._is_parked = False
                        continue
                    self._serve(worker, turn)
            finally:
                with self._lock:
                    del self._workers[worker.thread]

    def _serve(self, worker: Worker, seat: Seat) -> None:
        """Step a task for its turn, or until it has nothing to do; to its end, if it keeps the thread."""
        task = seat.task
        seat.thread = worker.thread
        began_at = worker.since = monotonic()  # before the seat: a step seems short rather than long
        worker.seat = seat
        while True:
            came = task.step()
            worker.since = math.inf  # the step is over: waiting for the lock below must not count as a slow step
            leave_if_forked()
            if came is Step.PROGRESSED and task.is_waiting:
                came = Step.IDLE  # the next step would only find that out
            if came is Step.PROGRESSED and worker.is_shared and not task.is_slow:
                now = monotonic()
                if now - began_at < TURN_S or not (self._ready or self._timed):
                    worker.since = now
                    continue
            missing = 0
            with self._lock:
                if worker.is_shared and task.is_slow and came is not Step.DONE and self._sharing_count > 1:
                    self._keep(worker)
                    missing = self._missing()
                if worker.is_shared:
                    self._put_back(seat, came)
                else:
                    self._started_last = 0  # it did not wait for long: no need to hurry
                worker.seat = None
            self._start_workers(missing)
            break
        if not worker.is_shared and came is not Step.DONE:
            worker.thread.name = f"sage-{task.name}"
            self._step_alone(seat)

    def _alone(self, seat: Seat) -> None:
        with inside(self._job, is_task=True):
            self._step_alone(seat)

    def _step_alone(self, seat: Seat) -> None:
        """Step a task on a thread of its own, until it is done or shares one again."""
        task = seat.task
        steps = 0
        while True:
            came = task.step()
            leave_if_forked()
            if came is Step.DONE:
                return
            if came is Step.PROGRESSED and seat.may_share:
                steps += 1
                if steps >= seat.rejoin_steps:
                    self._rejoin(seat)
                    return
            if came is not Step.PROGRESSED or task.is_waiting:
                wake_at = task.wake_at
                seat.doorbell.wait(None if wake_at is None else wake_at - monotonic())

    def _rejoin(self, seat: Seat) -> None:
        seat.rejoin_steps *= REJOIN_GROWTH
        with self._lock:
            self._sharing_count += 1
            seat.thread = None
            missing = self._queue(seat)
        self._start_workers(missing)
