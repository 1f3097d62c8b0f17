"""Tools for tests: run a pipeline from list to list, and run jobs one seeded step at a time on a virtual clock."""

from __future__ import annotations

import math
import random
import threading
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import TYPE_CHECKING, overload

from sage._arguments import check_count
from sage._current_job import inside
from sage._plan.signature import builder_of
from sage._runtime.backend import Backend, SupervisedJob
from sage._runtime.states import Step
from sage._testing.leftovers import assert_clean
from sage.environment import LocalEnvironment
from sage.errors import InternalError, hint
from sage.records import BatchReading

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
    from pathlib import Path

    from sage._runtime.checkpoints import CheckpointEvent
    from sage._runtime.lifecycle import LifecycleEvent
    from sage._runtime.task import Task
    from sage._testing.stepped_loop import SteppedLoop
    from sage._types import T, U
    from sage.stream import DataStream

__all__ = ["ManualClock", "StepBackend", "assert_clean", "run", "simulate"]

STEPS_MAX = 5_000_000
"""How many steps one job may take before it counts as one that never ends."""

STEP_S = 0.001
"""How much virtual time a step of a task takes, in seconds: little, but bounds come true while tasks have work."""

OUTSIDE_S = 30.0
"""How long coroutines may wait for something outside of the job, in seconds of real time."""

ANSWER_S = 1.0
"""How long calls on threads of a service may take before virtual time goes on without them, in real seconds."""

LIMITS = (1, 2, 3, 7, 64, 1024)
CAPACITIES = (1, 2, 5, 100, 4096)


def run(
    records: Iterable[T],
    build: Callable[[DataStream[T]], DataStream[U]],
    *,
    services: Mapping[str, object] | None = None,
    backend: Callable[[], Backend] | None = None,
) -> list[U]:
    """Send `records` through the pipeline that `build` adds to a stream, and return the results as a list.

    Args:
        records: the records.
        build: gets the stream of the records, and returns the stream of results.
        services: the services that functions call by name: each a class, a function that builds it, or itself.
        backend: the factory of the job's backend; threads by default.

    Raises:
        JobError: the pipeline failed.
    """
    environment = LocalEnvironment("test", backend=backend)
    for name, service in (services or {}).items():
        environment.register_service(name, builder_of(service))
    arrived: list[U] = []
    build(environment.from_batch(records)).sink(arrived.append)
    environment.submit(autostop=True)
    return arrived


@overload
def simulate(program: Callable[[Callable[[], Backend]], object], *, seeds: Iterable[int] = ...) -> None: ...
@overload
def simulate(
    program: Callable[[Callable[[], Backend], Path], object], *, seeds: Iterable[int] = ..., crashes: int
) -> None: ...
def simulate(program: Callable[..., object], *, seeds: Iterable[int] = range(100), crashes: int = 0) -> None:
    """Run a program once for each seed, each time on another schedule.

    With `crashes`, the program is a durable job and gets a folder, which is empty at first and in which it must keep
    everything: its checkpoints, and what its sinks write. It returns what its sinks hold. For each seed, it runs
    without a kill, then from what a kill at random steps would have left, and then once more after a second kill. Each
    time it must return the same.

    Args:
        program: gets the backend's factory, for `LocalEnvironment(backend=...)`, and raises if the result is wrong;
            with `crashes`, it also gets the folder, and returns the result.
        seeds: the seeds of the schedules.
        crashes: at how many steps each run is killed.

    Raises:
        BaseException: the program's first exception; a note names the seed, and how to run it again.
        AssertionError: with `crashes`, a run after a kill gave something else; the error names the steps.
        TypeError: with `crashes`, the program returns None, so there is nothing to compare.
        GraphError: `crashes` is not a whole number of at least 0.
    """
    check_count("simulate: crashes is", crashes, least=0)
    if crashes:
        from sage._testing.crashes import crash_anywhere
    for seed in seeds:
        try:
            if crashes:
                crash_anywhere(program, WatchedBackend, seed, crashes)
            else:
                program(partial(StepBackend, seed))
        except BaseException as error:  # it goes on to whoever called, with its seed
            again = f"seeds=[{seed}], crashes={crashes}" if crashes else f"seeds=[{seed}]"
            hint(error, f"This came with seed {seed}: simulate(program, {again}) shows it again.")
            raise


class ManualClock:
    """A clock that stands still until it is told otherwise.

    Attributes:
        now_s: the time, in seconds.
    """

    def __init__(self, now_s: float = 1000.0) -> None:
        self.now_s = now_s

    def __call__(self) -> float:
        """Return the time."""
        return self.now_s

    def advance(self, seconds: float) -> None:
        """Move the time on."""
        self.now_s += seconds


class SeededPace:
    """Draws how many records a step takes."""

    is_slow = False

    def __init__(self, random_: random.Random) -> None:
        self._random = random_

    def limit(self) -> int:
        """Return how many records the next step takes at most."""
        return self._random.choice(LIMITS)

    def measured(self, records: int, elapsed_s: float) -> None:
        """Take no notice: real time must not change the effect of a seed."""

    def read_limit(self) -> int:
        """Return how many records the next read of a source asks for at most."""
        return self.limit()

    def has_read(self, records: int, began_at: float, ended_at: float, size: int | None = None) -> None:
        """Take no notice, as of a step."""

    def has_emitted(self, records: int, size: int) -> None:
        """Take no notice: an estimate must not change the effect of a seed."""

    def running_s(self, elapsed_s: float) -> float:
        """Return all of it: the clock of this backend stands still while the thread waits."""
        return elapsed_s


class SeededSpan(BatchReading):
    """Is cut at places drawn from the seed, as the watch would cut it at others on each run."""

    __slots__ = ("_random",)

    def __init__(self, random_: random.Random) -> None:
        super().__init__()
        self._random = random_

    def begin(self, values: Sequence[object]) -> Iterator[object]:
        """Shorten the list at a place drawn from the seed, but leave something to do."""
        reading = super().begin(values)
        if len(values) > 1 and self._random.random() < 0.2 and not self.is_cut:
            place = self._random.randrange(1, len(values))
            reading = iter(values[:place])
            self._work = (reading, [*values[place:]])
            self.is_cut = True
        return reading


class StepLane:
    """Keeps the hooks of one service until the backend comes to run them."""

    def __init__(self) -> None:
        self.waiting: list[Callable[[], None]] = []
        self._is_busy = False

    @property
    def is_ready(self) -> bool:
        """Whether a hook can be run now."""
        return bool(self.waiting) and not self._is_busy

    def run_next(self) -> None:
        """Run the next hook; others wait while it waits for something."""
        self._is_busy = True
        try:
            self.waiting.pop(0)()
        finally:
            self._is_busy = False

    def run(self, function: Callable[[], None]) -> None:
        """Keep `function` for its turn."""
        self.waiting.append(function)

    def where(self) -> str:
        """Return nothing: a hook cannot hang here without hanging the test."""
        return ""

    def close(self, *, wait: bool) -> None:  # noqa: ARG002
        """Drop waiting functions."""
        self.waiting.clear()


class Waiter:
    """A thread that has no turn: a function on it waits, or it waits for the end of the job.

    Attributes:
        is_over: says whether its wait is over.
        due: until when it waits, on the virtual clock.
    """

    def __init__(self, is_over: Callable[[], bool], due: float = math.inf) -> None:
        self.is_over = is_over
        self.due = due
        self._given = threading.Event()
        self._error: BaseException | None = None

    def give(self, error: BaseException | None = None) -> None:
        """Give it the turn, or an error to raise."""
        self._error = error
        self._given.set()

    def wait(self) -> None:
        """Wait for the turn."""
        self._given.wait()
        if self._error is not None:
            raise self._error


class StepBackend(Backend):
    """Runs a whole job on the calling thread: one step of a task, a hook, or one event at a time, drawn from a seed.

    Coroutines run on a thread of their own, one round of their loop at a time, while everything else stands still.
    Time is virtual: each step of a task takes `STEP_S`, and when there is nothing to do, time moves to the next moment
    that somebody waits for. Sizes of batches, cuts and capacities are drawn too, so thousands of seeds see thousands of
    schedules, and each seed sees the same one every time. The job runs while somebody waits for it: in
    `submit(autostop=True)`, `job.wait()`, `env.stop()` or `env.close()`. While a function waits for the answer of a
    served pipeline, another thread takes the turns.

    Args:
        seed: the seed of all random choices.
    """

    runs_while_waited_for = True

    def __init__(self, seed: int = 0) -> None:
        self.seed = seed
        self.clock = ManualClock()
        self._random = random.Random(seed)
        self.capacity_records = self._random.choice(CAPACITIES)
        self._events: list[LifecycleEvent | CheckpointEvent] = []
        self._tasks: list[Task] = []
        self._lanes: list[StepLane] = []
        self._ready: set[Task] = set()
        self._loops: list[SteppedLoop] = []
        # Only one thread has the turn. The others are in the middle of a step or a hook, but for the owner: it asked
        # for the job to be run, and may have nothing left to do but to wait for the end.
        self._thread_id = 0
        self._turns = 0
        self._stepping: set[Task] = set()
        self._waiting: list[Waiter] = []
        self._next: Waiter | None = None
        self._owner: Waiter | None = None
        self._stand_ins: list[threading.Thread] = []

    def now(self) -> float:
        """Return the virtual time."""
        return self.clock()

    def wall(self) -> float:
        """Return the virtual time, counted from the epoch."""
        return self.now()

    def pace(self) -> SeededPace:
        """Return a pace drawn from the seed."""
        return SeededPace(self._random)

    def span(self) -> SeededSpan:
        """Return a span that is cut at places drawn from the seed."""
        return SeededSpan(self._random)

    def lane(self, name: str, *, must_start: bool = True) -> StepLane:  # noqa: ARG002
        """Return a lane."""
        lane = StepLane()
        self._lanes.append(lane)
        return lane

    def event_loop(self) -> SteppedLoop:
        """Return a loop that goes one round at its turn, on the virtual time."""
        from sage._testing.stepped_loop import SteppedLoop  # importing asyncio takes longer than a small job

        loop = SteppedLoop(self.now)
        self._loops.append(loop)
        return loop

    @contextmanager
    def loop_going_on(self) -> Iterator[None]:
        """Let the loop go on by itself while a function waits for a coroutine."""
        with ExitStack() as stack:
            for loop in self._loops:
                stack.enter_context(loop.going_on())
            yield

    def start(self, supervisor: SupervisedJob) -> None:
        """Do nothing: the job runs while somebody waits for it."""

    def post(self, supervisor: SupervisedJob, event: LifecycleEvent | CheckpointEvent) -> None:  # noqa: ARG002
        """Keep an event for its turn; events keep their order."""
        self._events.append(event)

    def start_task(self, supervisor: SupervisedJob, task: Task) -> None:  # noqa: ARG002
        """Take a task into the round."""
        task.wake = lambda: self._ready.add(task)
        self._tasks.append(task)
        self._ready.add(task)

    def where(self, task: Task) -> str:  # noqa: ARG002
        """Return nothing: a task cannot hang here without hanging the test."""
        return ""

    def join_tasks(self, tasks: list[Task]) -> None:
        """Do nothing: this backend does not use threads."""

    def wait(self, supervisor: SupervisedJob, timeout_s: float | None) -> bool:  # noqa: ARG002
        """Run the job to its end.

        Raises:
            InternalError: nothing can go on, or it never ends: a bug that the seed shows again.
        """
        with inside(supervisor):
            while not supervisor.is_sealed or self._waiting:
                self._go_on(supervisor)
                if self._next is not None:
                    self._owner = Waiter(lambda: supervisor.is_sealed)
                    self._hand_over()
                    try:
                        self._owner.wait()
                    finally:
                        self._owner = None
        for thread in self._stand_ins:
            thread.join()
        return True

    def wait_for(
        self,
        supervisor: SupervisedJob,
        condition: threading.Condition,
        is_over: Callable[[], bool],
        timeout_s: float | None,
    ) -> bool:
        """Let another thread take the turns until the wait of a function or hook is over, or its time is."""
        if threading.get_ident() != self._thread_id:
            return super().wait_for(supervisor, condition, is_over, timeout_s)
        waiter = Waiter(is_over, math.inf if timeout_s is None else self.now() + timeout_s)
        self._waiting.append(waiter)
        thread = threading.Thread(target=self._stand_in, args=(supervisor,), name="sage-stand-in", daemon=True)
        self._stand_ins.append(thread)
        thread.start()
        waiter.wait()
        self._thread_id = threading.get_ident()
        return is_over()

    def _stand_in(self, supervisor: SupervisedJob) -> None:
        """Take turns until it is that of a thread that waits."""
        with inside(supervisor):
            try:
                while self._next is None and not (supervisor.is_sealed and self._owner is not None):
                    self._go_on(supervisor)
            except BaseException as error:  # the owner of the job hears of it, where it waits or in its function
                waiter = self._owner or self._waiting.pop(0)
                waiter.give(error)
                return
        if self._next is not None:
            self._hand_over()
        elif self._owner is not None:
            self._owner.give()

    def _hand_over(self) -> None:
        waiter, self._next = self._next, None
        assert waiter is not None
        waiter.give()

    def _go_on(self, supervisor: SupervisedJob) -> None:
        """Take a turn; when the job is sealed, those who still wait for something of it get theirs."""
        self._thread_id = threading.get_ident()
        self._turns += 1
        if self._turns > STEPS_MAX:
            raise InternalError(f"seed {self.seed}: the job did not end within {STEPS_MAX} steps")
        if supervisor.is_sealed:
            self._next = self._waiting.pop(0)
        else:
            self.turn(supervisor)

    @property
    def pending(self) -> int:
        """How many events wait for their turn."""
        return len(self._events)

    def turn(self, supervisor: SupervisedJob) -> None:
        """Do one thing: a step of a task, a round of coroutines, a hook, or one event.

        A subclass may do something before it.

        Raises:
            InternalError: nothing can go on.
        """
        lanes = [lane for lane in self._lanes if lane.is_ready]
        tasks = [task for task in self._tasks if task in self._ready and task not in self._stepping]
        choices: list[StepLane | Waiter | Callable[[], None] | None] = [*lanes]
        choices += [partial(self._step, task) for task in tasks]
        if self._events:
            choices.append(None)
        choices += [loop.go_round for loop in self._loops if loop.is_ready]
        choices += [waiter for waiter in self._waiting if waiter.is_over() or waiter.due <= self.now()]
        if not choices:
            self._pass_time(supervisor)
            return
        chosen = self._random.choice(choices)
        if chosen is None:
            supervisor.handle(self._events.pop(0))
        elif isinstance(chosen, Waiter):
            self._waiting.remove(chosen)
            self._next = chosen
        elif isinstance(chosen, StepLane):
            chosen.run_next()
        else:
            chosen()
            self.clock.advance(STEP_S)
            self._ring(supervisor)

    def _step(self, task: Task) -> None:
        self._ready.discard(task)
        self._stepping.add(task)
        came = task.step()
        self._stepping.discard(task)
        if came is Step.PROGRESSED:
            self._ready.add(task)
        elif came is Step.DONE:
            self._tasks.remove(task)

    def _pass_time(self, supervisor: SupervisedJob) -> None:
        resting = [task for task in self._tasks if task not in self._stepping]
        dues = [task.wake_at for task in resting if task.wake_at is not None]
        dues += [waiter.due for waiter in self._waiting if waiter.due < math.inf]
        if supervisor.next_due is not None:
            dues.append(supervisor.next_due)
        dues += [loop.due for loop in self._loops if loop.due is not None]
        # A moment on the virtual clock, such as a time-out, must not come before an answer that is on its way.
        is_calling = any(host.is_calling for host in supervisor.hosts.values())
        wait_s = OUTSIDE_S if not dues else ANSWER_S if is_calling else 0.0
        if any(loop.waits_outside(wait_s) for loop in self._loops):
            return
        if not dues:
            states = {task.name: task.phase for task in self._tasks}
            raise InternalError(f"seed {self.seed}: nothing can go on; {supervisor.state.job}, {states}")
        self.clock.now_s = max(self.clock.now_s, min(dues))
        self._ring(supervisor)

    def _ring(self, supervisor: SupervisedJob) -> None:
        """Wake everybody whose moment has come."""
        now_s = self.now()
        self._ready.update(task for task in self._tasks if (due := task.wake_at) is not None and due <= now_s)
        due = supervisor.next_due
        if due is not None and due <= now_s:
            supervisor.tick()


class WatchedBackend(StepBackend):
    """Calls a function before each step."""

    def __init__(self, seed: int, before_step: Callable[[], None]) -> None:
        super().__init__(seed)
        self._before_step = before_step

    def turn(self, supervisor: SupervisedJob) -> None:
        """Call it, and take the turn."""
        self._before_step()
        super().turn(supervisor)
