"""The supervisor: drives the lifecycle of one job, and is the only one that starts and stops anything in it."""

from __future__ import annotations

import time
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from sage._logs import log_of
from sage._runtime.lifecycle import (
    ActionKind,
    Begin,
    DependencySeen,
    Exit,
    Failure,
    FailureKind,
    HookEnded,
    LifecycleEvent,
    Limits,
    StopRequested,
    TaskEnded,
    TaskFailed,
    TasksRenewed,
    Tick,
    begin,
)
from sage._runtime.states import JobState, ServiceState, StopMode, TaskState
from sage._runtime.transitions import step
from sage.errors import JobError, describe
from sage.observability import Event, HookEvent
from sage.report import HookReport

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping
    from threading import Condition

    from sage._runtime.backend import Backend, Host
    from sage._runtime.checkpoints import CheckpointEvent
    from sage._runtime.coroutines import CoroutineLoop
    from sage._runtime.lifecycle import Action, State
    from sage._runtime.task import Task
    from sage.service import ServiceHandle

CUT_AFTER_S = 0.02
"""How long a task works through one batch before the watch cuts it short."""

log = log_of("sage.dispatcher")


@dataclass(frozen=True, slots=True)
class Ended:
    """The result of the supervisor when a job is sealed; `crash` is a bug of its own, or None.

    Records flowed for `running_s` seconds.
    """

    state: State
    hooks: Mapping[str, tuple[HookReport, ...]]
    stacks: Mapping[str, str]
    crash: BaseException | None = None
    running_s: float = 0.0


NOTHING = begin((), (), Limits())
"""The state of a job without tasks and services, of which those that have ended keep parts."""


class Supervisor:
    """Passes events to the lifecycle and carries out its actions.

    `handle` is called by the backend, by one thread at a time, with each posted event.

    Attributes:
        state: the lifecycle as it stands.
        events: every change of state so far.
        is_sealed: whether everything has ended and the report is made.
        listeners: called with every event and hook as they come, by the supervisor's thread; they must not raise.
        handle_checkpoint: called with each event of a durable job's checkpoints, or None.
        renew_tasks: called to make the tasks of a durable job again; `begin_again` follows.
    """

    def __init__(
        self,
        state: State,
        tasks: dict[str, Task],
        hosts: dict[str, Host],
        backend: Backend,
        loop: CoroutineLoop,
        on_sealed: Callable[[Ended], None],
    ) -> None:
        self.state = state
        self.tasks = tasks
        self.hosts = hosts
        self.backend = backend
        self.events: list[Event] = []
        self.is_sealed = False
        self.listeners: list[Callable[[Event | HookEvent], None]] = []
        self.handle_checkpoint: Callable[[CheckpointEvent], None] | None = None
        self.renew_tasks: Callable[[], None] | None = None
        self._loop = loop
        self._on_sealed = on_sealed
        self._hooks: dict[str, list[HookReport]] = {name: [] for name in hosts}
        self._hook_began: dict[str, tuple[str, int, float]] = {}
        self._stacks: dict[str, str] = {}
        self._abandoned: set[str] = set()
        self._alarms: list[tuple[float, Callable[[], None]]] = []
        self._holds_back = False
        self._ran_from: float | None = None
        self._ran_until: float | None = None

    def begin(self) -> None:
        """Start the job."""
        self.backend.start(self)
        self.post(Begin())

    def post(self, event: LifecycleEvent | CheckpointEvent) -> None:
        """Post an event; any thread may."""
        self.backend.post(self, event)

    def begin_again(self, tasks: dict[str, Task]) -> None:
        """Go on with new tasks in the place of those that have ended."""
        self.tasks = tasks
        self.handle(TasksRenewed())

    def note_dependency(self, service: str, requires: str) -> None:
        """Say that a service was seen to ask for another, which therefore has to outlive it."""
        self.post(DependencySeen(service, requires))

    def call_at(self, due: float, action: Callable[[], None]) -> None:
        """Have `action` called at a moment of the backend's clock; the supervisor's thread may call this."""
        self._alarms.append((due, action))

    @property
    def next_due(self) -> float | None:
        """When `tick` is due next, by the backend's clock."""
        dues = [self.state.next_due, *(due for due, _ in self._alarms)]
        return min((due for due in dues if due is not None), default=None)

    def tick(self) -> None:
        """Let time-outs take effect."""
        now_s = self.backend.now()
        ringing = [alarm for alarm in self._alarms if alarm[0] <= now_s]
        for alarm in ringing:
            self._alarms.remove(alarm)
            alarm[1]()
        self.handle(Tick())

    def handle(self, event: LifecycleEvent | CheckpointEvent, happened_at: float | None = None) -> None:
        """Take one step of the lifecycle and carry out its actions; `happened_at` is when a waiting event came."""
        if self.is_sealed:
            return
        if not isinstance(event, LifecycleEvent):
            if self.handle_checkpoint is not None:
                self.handle_checkpoint(event)
            return
        if isinstance(event, HookEnded):
            self._hook_ended(event)
        self.state, actions = step(self.state, event, self.backend.now(), happened_at)
        for action in actions:
            self._carry_out(action)

    def handle_of(self, service: str) -> ServiceHandle[object] | None:
        host = self.hosts.get(service)
        return None if host is None else host.spec.handle

    def ask_to_stop(self, drain: bool | None) -> None:
        """Ask for the end of the job, as `Job.stop` does."""
        self.post(StopRequested(StopMode.of(drain)))

    def wait_for(self, condition: Condition, is_over: Callable[[], bool], timeout_s: float | None) -> bool:
        """Wait for a condition as the backend has its threads wait."""
        return self.backend.wait_for(self, condition, is_over, timeout_s)

    def crash(self, error: BaseException) -> None:
        """Give up after a bug in the supervision itself: whoever waits must be told, and not wait for ever."""
        log.critical("supervisor crashed", exc_info=error)
        self.is_sealed = True
        for task in self.tasks.values():
            task.request_cancel()
        for host in self.hosts.values():
            host.refuse()
        hooks = {name: tuple(reports) for name, reports in self._hooks.items()}
        self._on_sealed(Ended(self.state, hooks, self._stacks, error))

    def watch(self) -> None:
        """Interrupt slow batches so that their finished records can move on."""
        cut_late(self.tasks.values())

    def forget(self) -> None:
        """Let go of tasks and hosts, and of everything that users gave for them."""
        self.tasks = {}
        self.hosts = {}
        self._hooks = {}
        self.listeners = []
        self.handle_checkpoint = self.renew_tasks = None
        self.state = replace(
            self.state,
            service_plans={},
            task_plans={},
            failures=(),
            restarts=NOTHING.restarts,
            shape=NOTHING.shape,
            tally=NOTHING.tally,
        )

    def _carry_out(self, action: Action) -> None:
        target = action.target
        match action.do:
            case ActionKind.NOTE:
                self._note(action)
            case ActionKind.RUN_HOOK:
                self._run_hook(action)
            case ActionKind.ABANDON_HOOK:
                self._abandon_hook(action)
            case ActionKind.LOSE_HOOK:
                self._lose_hook(action)
            case ActionKind.HURRY_EXIT:
                assert action.due is not None
                self.hosts[target].hurry(action.due)
            case ActionKind.ADMIT_CALLS:
                self.hosts[target].admit()
            case ActionKind.HOLD_CALLS:
                self.hosts[target].hold()
            case ActionKind.REFUSE_CALLS:
                self.hosts[target].refuse()
            case ActionKind.OPEN_TASK:
                self._open_task(target)
            case ActionKind.RUN_TASK:
                self.tasks[target].request_run()
            case ActionKind.STOP_TASK:
                self.tasks[target].request_stop()
            case ActionKind.HOLD_BACK_TASK:
                self.tasks[target].request_hold_back()
                self._hold_back_calls()
            case ActionKind.CANCEL_TASK:
                self.tasks[target].request_cancel()
                self._hold_back_calls()
                self._loop.cancel()
            case ActionKind.RESET_TASK:
                self.tasks[target].request_cancel()
                self._loop.cancel(only_of_tasks=True)  # services stay up, with their hooks and their own calls
            case ActionKind.RENEW_TASKS:
                self.backend.join_tasks([*self.tasks.values()])
                assert self.renew_tasks is not None
                self.renew_tasks()
            case ActionKind.ABANDON_TASK:
                self._abandoned.add(target)
                task = self.tasks[target]
                self._stacks[target] = task.where() or self.backend.where(task)
                self.tasks[target].request_cancel()
                log.error("task abandoned task=%r", target)
            case ActionKind.SEAL:
                self._seal()

    def _hold_back_calls(self) -> None:
        if not self._holds_back:
            self._holds_back = True
            for host in self.hosts.values():
                if host.options.rate is not None:
                    host.hold_back()

    def _open_task(self, name: str) -> None:
        try:
            self.backend.start_task(self, self.tasks[name])
        except RuntimeError as error:  # the system has no more threads; nothing of the task has run
            failure = JobError(f'task "{name}" cannot be started: {error}', fault="external")
            failure.__cause__ = error
            self.post(TaskFailed(name, failure))
            self.post(TaskEnded(name, TaskState.FAILED))
        else:
            self.tasks[name].request_open()

    @property
    def running_s(self) -> float:
        """For how long records have flowed, in seconds."""
        until = self.backend.now() if self._ran_until is None else self._ran_until
        return 0.0 if self._ran_from is None else until - self._ran_from

    def _note(self, action: Action) -> None:
        if action.subject == "job" and action.after == JobState.RUNNING:
            self._ran_from = self.backend.now() if self._ran_from is None else self._ran_from
        elif action.subject == "job" and action.after == JobState.STOPPING_SERVICES:
            self._ran_until = self.backend.now()
        event = Event(time.time(), action.subject, action.target, action.before, action.after)
        self.events.append(event)
        for listener in self.listeners:
            listener(event)
        log.info("%s", event)

    def _run_hook(self, action: Action) -> None:
        name, hook, incarnation = action.target, action.hook, action.incarnation
        self._hook_began[name] = (hook, incarnation, self.backend.now())

        def done(value: object, error: BaseException | None) -> None:
            self.post(HookEnded(name, incarnation, hook, value, error))

        self.hosts[name].run(hook, action.due, done)

    def _hook_ended(self, event: HookEnded) -> None:
        began = self._hook_began.get(event.service)
        if began is None or began[:2] != (event.hook, event.incarnation):
            return  # It was abandoned before; that is in the report already.
        del self._hook_began[event.service]
        late = event.hook == "drain" and event.value is False
        outcome = "error" if event.error is not None else "abandoned" if late else "ok"
        if isinstance(event.value, Exit) and event.value.was_killed:
            outcome = "killed"
            if event.value.where:
                self._stacks.setdefault(event.service, event.value.where)  # a hook that was late before says more
        if event.hook in ("health", "ready") and outcome == "ok":
            return  # Polled: only their consequences are worth a line.
        text = describe(event.error) if event.error is not None else None
        self._add_hook(event.service, event.hook, event.incarnation, began[2], outcome, text)

    def _add_hook(
        self, name: str, hook: str, incarnation: int, began_at: float, outcome: str, text: str | None = None
    ) -> None:
        duration_s = self.backend.now() - began_at
        report = HookReport(hook, incarnation, outcome, duration_s, text)
        self._hooks[name].append(report)
        for listener in self.listeners:
            listener(HookEvent(time.time(), name, report))
        if outcome != "ok":
            log.error("hook failed service=%r hook=%s outcome=%s error=%s", name, hook, outcome, text)

    def _abandon_hook(self, action: Action) -> None:
        name = action.target
        began = self._hook_began.pop(name, None)
        if began is None:
            return
        hook, incarnation, began_at = began
        self._stacks[name] = self.hosts[name].abandon()
        self._add_hook(name, hook, incarnation, began_at, "abandoned")

    def _lose_hook(self, action: Action) -> None:
        """Note that the process of a service died while a hook ran; nothing of the hook is waited for."""
        began = self._hook_began.pop(action.target, None)
        self.hosts[action.target].abandon()
        if began is not None:
            hook, incarnation, began_at = began
            self._add_hook(action.target, hook, incarnation, began_at, "lost")

    def _seal(self) -> None:
        """Free the remaining threads, and hand over the result."""
        self.backend.join_tasks([task for name, task in self.tasks.items() if name not in self._abandoned])
        for name, host in self.hosts.items():
            if self.state.services[name].state is ServiceState.KEPT:
                host.release()
            else:
                host.close()
        left = (*self._loop.close(), *((text, "") for text in self.backend.left_behind()))
        for number, (text, stack) in enumerate(left):
            name = f"left {number}"
            self._stacks[name] = stack
            failures = (*self.state.failures, Failure(FailureKind.LEFT, name, text=text))
            self.state = replace(self.state, failures=failures)
        hooks = {name: tuple(reports) for name, reports in self._hooks.items()}
        ended = Ended(self.state, hooks, self._stacks, running_s=self.running_s)
        self.is_sealed = True
        self._on_sealed(ended)


def cut_late(tasks: Iterable[Task]) -> None:
    """Interrupt slow batches in tasks of this process; the watch calls this again and again."""
    now = time.perf_counter()
    for task in tasks:
        started_at = task.span.started_at
        if started_at is not None and now - started_at > CUT_AFTER_S:
            task.span.cut()
