"""The lifecycle of a job, without I/O: what follows from what happens, as values in and values out.

`step(state, event, now)` returns the next state and the actions to carry out. It knows no thread, no clock and no
service; a supervisor carries out the actions and feeds back the events. So every order, crash point and time-out can be
tested with numbers.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from sage._runtime.lifecycle import (
    BEST_GUARD_S,
    DRAIN_NET_S,
    PAUSES,
    READY_PAUSE_S,
    START_HOOKS,
    STOP_STATES,
    Action,
    Begin,
    DependencySeen,
    Do,
    Failure,
    HookEnded,
    ServiceRecord,
    State,
    StopRequested,
    TaskClosing,
    TaskEnded,
    TaskFailed,
    TaskOpened,
    TaskRecord,
    Tick,
    Trouble,
)
from sage._runtime.states import (
    JOB_NEXT,
    SERVICE_NEXT,
    SERVICE_TERMINAL,
    TASK_NEXT,
    TASK_TERMINAL,
    JobState,
    ServiceState,
    TaskState,
    Way,
)

if TYPE_CHECKING:
    from collections.abc import Callable

    from sage._runtime.lifecycle import LifecycleEvent, TaskEvent, TaskPlan


def step(state: State, event: LifecycleEvent, now: float) -> tuple[State, tuple[Action, ...]]:
    """Return what follows from an event at the monotonic time `now`: the next state, and what to do."""
    if state.job is JobState.SEALED:
        return state, ()
    draft = _Draft(state, now)
    draft.take(event)
    draft.expire()
    draft.advance()
    return draft.state(), tuple(draft.actions)


@dataclass(slots=True)
class _Draft:
    """A state while it changes. Nothing outside `step` sees one."""

    start: State
    now: float
    actions: list[Action] = field(default_factory=list)
    services: dict[str, ServiceRecord] = field(init=False)
    tasks: dict[str, TaskRecord] = field(init=False)
    changes: dict[str, Any] = field(init=False)

    def __post_init__(self) -> None:
        self.services = dict(self.start.services)
        self.tasks = dict(self.start.tasks)
        self.changes = {}

    def state(self) -> State:
        return replace(self.start, services=self.services, tasks=self.tasks, **self.changes)

    def get(self, name: str) -> Any:
        return self.changes.get(name, getattr(self.start, name))

    # --- moves: the only places where a state changes ---

    def move_job(self, after: JobState) -> None:
        before: JobState = self.get("job")
        if before is after:
            return
        assert after in JOB_NEXT[before], f"job: {before} -> {after}"
        self.changes["job"] = after
        self.do(Do.NOTE, hook="job", before=before, after=after)

    def move_task(self, name: str, after: TaskState, **changes: Any) -> None:
        before = self.tasks[name].state
        self.tasks[name] = replace(self.tasks[name], state=after, **changes)
        if before is not after:
            assert after in TASK_NEXT[before], f"task {name}: {before} -> {after}"
            self.do(Do.NOTE, name, hook="task", before=before, after=after)

    def move_service(self, name: str, after: ServiceState, **changes: Any) -> None:
        before = self.services[name].state
        self.services[name] = replace(self.services[name], state=after, **changes)
        if before is not after:
            assert after in SERVICE_NEXT[before], f"service {name}: {before} -> {after}"
            self.do(Do.NOTE, name, hook="service", before=before, after=after)

    def do(self, do: Do, target: str = "", **details: Any) -> None:
        self.actions.append(Action(do, target, **details))

    def fail(
        self, trouble: Trouble, name: str, hook: str = "", error: BaseException | None = None, **more: Any
    ) -> None:
        self.changes["failures"] = (*self.get("failures"), Failure(trouble, name, hook, error, **more))

    # --- questions ---

    @property
    def stopping(self) -> bool:
        return self.get("job") not in (JobState.NEW, JobState.STARTING, JobState.RUNNING)

    @property
    def tasks_over(self) -> bool:
        return all(record.state in TASK_TERMINAL for record in self.tasks.values())

    def requires(self, name: str) -> set[str]:
        return {*self.start.service_plans[name].requires, *(b for a, b in self.get("seen") if a == name)}

    def needs(self, name: str, other: str) -> bool:
        """Return whether a service depends on another, or is it; there are no circles."""
        return name == other or any(self.needs(near, other) for near in self.requires(name))

    def dependents_over(self, name: str) -> bool:
        return all(
            record.state in SERVICE_TERMINAL
            for other, record in self.services.items()
            if other != name and name in self.requires(other)
        )

    # --- events ---

    def take(self, event: LifecycleEvent) -> None:
        match event:
            case Begin():
                if self.get("job") is JobState.NEW:  # it may have been stopped before
                    self.move_job(JobState.STARTING)
                    for name in self.services:
                        self.watch(name)
            case StopRequested():
                self.take_stop(event)
            case HookEnded():
                record = self.services[event.service]
                if record.hook == event.hook and record.incarnation == event.incarnation:
                    self.take_hook(event)
            case DependencySeen():
                # Two services may call each other; were each to wait for the other's end, none would come.
                if not self.needs(event.requires, event.service):
                    self.changes["seen"] = self.get("seen") | {(event.service, event.requires)}
            case TaskOpened() | TaskFailed() | TaskClosing() | TaskEnded():
                if self.tasks[event.task].state not in TASK_TERMINAL:
                    self.take_task(event)
            case Tick():
                pass

    def take_stop(self, event: StopRequested) -> None:
        way: Way | None = self.get("way")
        if way is not None and event.way <= way:
            return
        self.changes["way"] = event.way
        self.arm(event.budget_s)
        if event.hook_cap_s is not None:
            self.changes["hook_cap_s"] = event.hook_cap_s
            capped = self.now + event.hook_cap_s
            self.changes["tasks_due"] = min(self.get("tasks_due"), capped)
            for name, record in self.services.items():
                if record.hook is not None and record.due is not None and self.stopping:
                    self.services[name] = replace(record, due=min(record.due, capped))
            self.tighten_tasks()
        job: JobState = self.get("job")
        if job in (JobState.NEW, JobState.STARTING, JobState.RUNNING, JobState.DRAINING, JobState.CANCELLING):
            self.changes["ended_by"] = event.way
        if event.way is Way.KILL:
            self.kill()
        elif event.way is Way.DRAIN and job is JobState.RUNNING:
            self.move_job(JobState.DRAINING)
            self.stop_sources(lambda plan: not plan.serving)
        elif job in (JobState.NEW, JobState.STARTING, JobState.RUNNING, JobState.DRAINING):
            self.move_job(JobState.CANCELLING)
            self.cancel_tasks()

    def take_task(self, event: TaskEvent) -> None:
        name = event.task
        match event:
            case TaskOpened():
                self.tasks[name] = replace(self.tasks[name], opened=True)
            case TaskFailed():
                trouble = Trouble.CLOSE if event.closing else Trouble.TASK
                self.fail(trouble, name, event.closing, event.error)
                self.fail_job()
            case TaskClosing():
                due = self.now + self.start.limits.close_timeout_s
                tasks_due = self.get("tasks_due")
                self.move_task(name, TaskState.CLOSING, due=due if tasks_due is None else min(due, tasks_due))
            case TaskEnded():
                self.move_task(name, event.state, due=None)

    def take_hook(self, event: HookEnded) -> None:
        name, record = event.service, self.services[event.service]
        self.services[name] = record = replace(record, hook=None, due=None)
        if record.state is ServiceState.STARTING:
            if event.hook == "build" and event.error is None:
                self.services[name] = record = replace(record, hooks=event.value)
            if event.error is not None:
                self.start_failed(name, Trouble.START, event.hook, event.error)
            elif self.stopping:
                pass  # advance() tears it down in its turn
            elif event.hook == "ready" and not event.value:
                self.services[name] = replace(record, hook="ready-pause", due=self.now + READY_PAUSE_S)
            else:
                self.next_start_hook(name, event.hook)
        elif event.hook == "health":
            if (event.error is not None or event.value is False) and not self.stopping:
                self.service_failed(name, Trouble.UNHEALTHY, "health", event.error)
            else:
                self.watch(name)
        elif record.state is ServiceState.BACKOFF:
            pass
        else:
            if event.hook == "drain" and event.value is False:
                self.fail(Trouble.LATE_CALLS, name, "drain")
            elif event.error is not None:
                self.fail(Trouble.HOOK, name, event.hook, event.error)
                if record.goal is ServiceState.STOPPED:
                    self.services[name] = replace(record, goal=ServiceState.CLEANUP_FAILED)
            self.next_stop_hook(name, event.hook)

    # --- services ---

    def next_start_hook(self, name: str, last: str) -> None:
        record = self.services[name]
        later = START_HOOKS[START_HOOKS.index(last) + 1 :] if last else START_HOOKS
        hook = next((hook for hook in later if hook == "build" or hook in record.hooks), None)
        if hook is None:
            self.move_service(name, ServiceState.READY, hook=None, due=None)
            self.do(Do.ADMIT_CALLS, name)
            self.watch(name)
        else:
            self.run_hook(name, hook, record.start_due)

    def run_hook(self, name: str, hook: str, due: float) -> None:
        record = self.services[name] = replace(self.services[name], hook=hook, due=due)
        self.do(Do.RUN_HOOK, name, hook=hook, incarnation=record.incarnation, due=due)

    def watch(self, name: str) -> None:
        """Plan the next call of `health`."""
        record = self.services[name]
        if record.state is ServiceState.READY and "health" in record.hooks and not self.stopping:
            interval_s = self.start.service_plans[name].options.health_interval_s
            self.services[name] = replace(record, hook="health-pause", due=self.now + interval_s)

    def start_service(self, name: str) -> None:
        record = self.services[name]
        due = self.now + self.start.service_plans[name].options.start_timeout_s
        self.move_service(
            name, ServiceState.STARTING, incarnation=record.incarnation + 1, start_due=due, hooks=frozenset(), hook=None
        )
        self.next_start_hook(name, "")

    def may_restart(self, name: str) -> bool:
        options = self.start.service_plans[name].options
        in_limit = len(self.recent_restarts(name)) < options.restarts_max
        return options.restart != "never" and in_limit and not self.stopping

    def recent_restarts(self, name: str) -> tuple[float, ...]:
        since = self.now - self.start.service_plans[name].options.restart_window_s
        return tuple(at for at in self.services[name].restarts if at > since)

    def start_failed(self, name: str, trouble: Trouble, hook: str, error: BaseException | None) -> None:
        again = self.may_restart(name)
        required = self.start.service_plans[name].options.required
        self.fail(trouble, name, hook, error, counts=required and not again)
        goal = ServiceState.BACKOFF if again else ServiceState.FAILED_START
        self.services[name] = replace(self.services[name], goal=goal)
        if required and not again:
            self.fail_job()
        # What was built gets its cleanup, and no stop, since it never ran.
        self.next_stop_hook(name, "build" if hook == "build" else "stop")

    def service_failed(self, name: str, trouble: Trouble, hook: str, error: BaseException | None) -> None:
        """A service that was ready has failed: restart it, or do without, or fail the job."""
        again = self.may_restart(name)
        required = self.start.service_plans[name].options.required
        self.fail(trouble, name, hook, error, counts=required and not again)
        if required and not again:
            self.move_service(name, ServiceState.DEGRADED)
            self.fail_job()
            return
        self.services[name] = replace(self.services[name], goal=ServiceState.BACKOFF if again else ServiceState.FAILED)
        self.do(Do.HOLD_CALLS if again else Do.REFUSE_CALLS, name)
        self.drain_service(name)

    def drain_service(self, name: str) -> None:
        due = self.hook_due(name, self.start.service_plans[name].options.drain_timeout_s)
        self.move_service(name, ServiceState.DRAINING)
        self.run_hook(name, "drain", due)
        # The host ends a drain in time by itself; this is the net under it.
        self.services[name] = replace(self.services[name], due=due + DRAIN_NET_S)

    def stop_service(self, name: str) -> None:
        """Begin the end of a service that is ready, half started, or waits for a restart."""
        record = self.services[name]
        if record.state is ServiceState.REGISTERED:
            self.move_service(name, ServiceState.SKIPPED)
        elif record.state is ServiceState.BACKOFF:
            self.move_service(name, ServiceState.STOPPED, hook=None, due=None)
        elif record.state is ServiceState.STARTING:
            if record.hook in (None, "ready-pause"):
                # Built, but not ready: whatever of it has begun gets its cleanup, and no stop.
                self.next_stop_hook(name, "stop")
        elif self.start.service_plans[name].keep and record.state is ServiceState.READY and self.idle(record):
            self.move_service(name, ServiceState.KEPT, hook=None, due=None)
        elif record.state in (ServiceState.READY, ServiceState.DEGRADED) and self.idle(record):
            self.do(Do.REFUSE_CALLS, name)
            self.drain_service(name)

    @staticmethod
    def idle(record: ServiceRecord) -> bool:
        return record.hook in (None, "health-pause")

    def next_stop_hook(self, name: str, last: str) -> None:
        record = self.services[name]
        timeout_s = self.start.service_plans[name].options.stop_timeout_s
        if last == "drain" and "stop" in record.hooks:
            self.move_service(name, ServiceState.STOPPING)
            self.run_hook(name, "stop", self.hook_due(name, timeout_s))
        elif last in ("drain", "stop") and "cleanup" in record.hooks:
            self.move_service(name, ServiceState.CLEANING)
            self.run_hook(name, "cleanup", self.hook_due(name, timeout_s))
        else:
            self.end_service(name, record.goal)

    def end_service(self, name: str, goal: ServiceState) -> None:
        if goal is ServiceState.BACKOFF and not self.stopping:
            first, longest = self.start.service_plans[name].options.backoff_s
            recent = self.recent_restarts(name)
            pause_s = min(first * 2.0 ** min(len(recent), 64), longest)
            restarts = (*recent, self.now)
            self.move_service(
                name, goal, hook="backoff", due=self.now + pause_s, goal=ServiceState.STOPPED, restarts=restarts
            )
            return
        if goal is ServiceState.BACKOFF:
            goal = ServiceState.STOPPED
        self.move_service(name, goal, hook=None, due=None)
        self.do(Do.REFUSE_CALLS, name)
        if not self.stopping and self.start.service_plans[name].options.required:
            # It was to be restarted, and its end did not come out well enough for that.
            self.fail(Trouble.UNHEALTHY, name, "restart")
            self.fail_job()

    def hook_due(self, name: str, timeout_s: float) -> float:
        """Return when a hook is late: its own bound, what is left of the budget, and something for those after it."""
        due = self.now + timeout_s
        if self.get("hook_cap_s") is not None:
            due = min(due, self.now + self.get("hook_cap_s"))
        deadline = self.get("deadline")
        if deadline is not None:
            after = sum(
                1 for other, record in self.services.items() if other != name and record.state not in SERVICE_TERMINAL
            )
            left = max(deadline - self.now, 0.0)
            guard = min(BEST_GUARD_S, left / (after + 1))
            due = min(due, deadline - after * guard)
        return max(due, self.now)

    # --- the job ---

    def arm(self, budget_s: float | None = None) -> None:
        """Set the one deadline of the stop; later requests may only bring it forward."""
        limits = self.start.limits
        budget = limits.stop_timeout_s if budget_s is None else min(budget_s, limits.stop_timeout_s)
        deadline = self.now + budget
        if self.get("deadline") is not None and self.get("deadline") <= deadline:
            return
        reserve = min(max(limits.services_share * budget, limits.services_reserve_s), budget)
        tasks_s = budget - reserve if self.services else budget
        drain_s = min(limits.drain_timeout_s, tasks_s - min(limits.close_timeout_s, tasks_s / 4))
        self.changes["deadline"] = deadline
        self.changes["tasks_due"] = self.now + tasks_s
        self.changes["drain_due"] = self.now + drain_s
        for name, record in self.services.items():
            if record.due is not None:
                late = self.now + self.start.service_plans[name].options.stop_timeout_s
                bound = deadline if record.state in STOP_STATES else min(late, deadline)
                self.services[name] = replace(record, due=min(record.due, bound))
            if record.state in (ServiceState.STARTING, ServiceState.BACKOFF) or record.goal is ServiceState.BACKOFF:
                # No restart begins any more, so a call that waits for one would keep its task from ending.
                self.do(Do.REFUSE_CALLS, name)
        for name, task in self.tasks.items():
            if task.due is not None:
                self.tasks[name] = replace(task, due=min(task.due, self.get("tasks_due")))

    def fail_job(self) -> None:
        if self.get("job") in (JobState.STARTING, JobState.RUNNING, JobState.DRAINING):
            self.arm()
            self.move_job(JobState.FAILING)
            self.cancel_tasks()

    def stop_sources(self, which: Callable[[TaskPlan], bool]) -> None:
        for name, record in self.tasks.items():
            plan = self.start.task_plans[name]
            if plan.takes_stop and which(plan) and record.state not in TASK_TERMINAL:
                self.do(Do.STOP_TASK, name)

    def cancel_tasks(self) -> None:
        for name, record in list(self.tasks.items()):
            if record.state is TaskState.CREATED:
                self.move_task(name, TaskState.SKIPPED, due=None)
            elif record.state not in TASK_TERMINAL:
                self.do(Do.CANCEL_TASK, name)
        self.tighten_tasks()

    def tighten_tasks(self) -> None:
        """Give every task that still runs its time to leave user code."""
        late = min(self.get("tasks_due"), self.now + self.start.limits.drain_timeout_s)
        for name, record in list(self.tasks.items()):
            if record.state not in TASK_TERMINAL:
                due = late if record.due is None else min(record.due, self.get("tasks_due"))
                self.tasks[name] = replace(record, due=due)

    def kill(self) -> None:
        """Give up on everything that has not ended."""
        if self.get("job") in (JobState.NEW, JobState.STARTING, JobState.RUNNING, JobState.DRAINING):
            self.move_job(JobState.CANCELLING)
        for name, task in list(self.tasks.items()):
            if task.state is TaskState.CREATED:
                self.move_task(name, TaskState.SKIPPED, due=None)
            elif task.state not in TASK_TERMINAL:
                self.abandon_task(name)
        for name, record in list(self.services.items()):
            if record.state is ServiceState.REGISTERED:
                self.move_service(name, ServiceState.SKIPPED)
            elif record.state not in SERVICE_TERMINAL:
                hook = "stop" if record.hook in (None, *PAUSES) else record.hook
                self.fail(Trouble.LATE_HOOK, name, hook)
                self.do(Do.REFUSE_CALLS, name)
                self.do(Do.ABANDON_HOOK, name, hook=hook)
                self.move_service(name, ServiceState.ABANDONED, hook=None, due=None)

    def abandon_task(self, name: str) -> None:
        self.fail(Trouble.LATE_TASK, name)
        self.do(Do.ABANDON_TASK, name)
        self.move_task(name, TaskState.ABANDONED, due=None)

    # --- time ---

    def expire(self) -> None:
        """Act on everything whose time has come."""
        if self.get("job") is JobState.DRAINING and self.now >= self.get("drain_due"):
            self.move_job(JobState.CANCELLING)
            self.cancel_tasks()
        for name, task in list(self.tasks.items()):
            if task.due is not None and self.now >= task.due:
                self.abandon_task(name)
        for name, record in list(self.services.items()):
            if record.due is not None and self.now >= record.due:
                self.expire_service(name, record)

    def expire_service(self, name: str, record: ServiceRecord) -> None:
        hook = record.hook
        self.services[name] = replace(record, hook=None, due=None)
        if hook == "backoff":
            if not self.stopping:
                self.start_service(name)
        elif hook == "health-pause":
            if not self.stopping:
                interval_s = self.start.service_plans[name].options.health_interval_s
                self.run_hook(name, "health", self.now + max(interval_s, 1.0))
        elif hook == "ready-pause":
            if self.stopping:
                pass  # advance() tears it down in its turn
            elif self.now >= record.start_due:
                self.start_failed(name, Trouble.NOT_READY, "ready", None)
            else:
                self.run_hook(name, "ready", record.start_due)
        elif hook is not None:
            self.late_hook(name, hook, record)

    def late_hook(self, name: str, hook: str, record: ServiceRecord) -> None:
        self.do(Do.ABANDON_HOOK, name, hook=hook)
        if record.state is ServiceState.STARTING:
            required = self.start.service_plans[name].options.required
            self.fail(Trouble.NOT_READY, name, hook, counts=required and not self.stopping)
            if required:
                self.fail_job()
            self.services[name] = replace(self.services[name], goal=ServiceState.ABANDONED)
            self.next_stop_hook(name, "build" if hook == "build" else "stop")
        elif hook == "health" and self.stopping:
            self.fail(Trouble.LATE_HOOK, name, hook)
            self.services[name] = replace(self.services[name], goal=ServiceState.ABANDONED)
        elif hook == "health":
            self.service_failed(name, Trouble.UNHEALTHY, hook, None)
        elif hook == "drain":
            self.fail(Trouble.LATE_CALLS, name, hook)
            self.next_stop_hook(name, hook)
        else:
            self.fail(Trouble.LATE_HOOK, name, hook)
            self.services[name] = replace(self.services[name], goal=ServiceState.ABANDONED)
            self.next_stop_hook(name, hook)

    # --- what is possible now ---

    def advance(self) -> None:
        """Start, run, stop and seal whatever is due, until nothing more follows."""
        if self.get("job") is JobState.STARTING:
            self.advance_start()
        serves_only = all(plan.serving for plan in self.start.task_plans.values())
        job: JobState = self.get("job")
        if job is JobState.DRAINING or (job is JobState.RUNNING and not serves_only):
            self.stop_serving()
        if self.tasks_over and job in (JobState.RUNNING, JobState.DRAINING, JobState.CANCELLING, JobState.FAILING):
            self.arm()
            self.move_job(JobState.STOPPING_SERVICES)
        if self.get("job") is JobState.STOPPING_SERVICES:
            self.advance_stop()

    def advance_start(self) -> None:
        for name in self.start.service_plans:
            record = self.services[name]
            if record.state is ServiceState.REGISTERED and all(
                self.services[other].state is ServiceState.READY or self.done_without(other)
                for other in self.requires(name)
            ):
                self.start_service(name)
        if not all(
            record.state is ServiceState.READY or self.done_without(name) for name, record in self.services.items()
        ):
            return
        for name, plan in self.start.task_plans.items():
            ready = all(self.tasks[other].opened for other in plan.downstream)
            if ready and self.tasks[name].state is TaskState.CREATED:
                self.move_task(name, TaskState.OPENING)
                self.do(Do.OPEN_TASK, name)
        if all(record.opened for record in self.tasks.values()):
            self.move_job(JobState.RUNNING)
            for name in self.tasks:
                self.move_task(name, TaskState.RUNNING)
                self.do(Do.RUN_TASK, name)

    def done_without(self, name: str) -> bool:
        """Return whether a service is down for good and the job goes on without it."""
        return self.services[name].state in SERVICE_TERMINAL and not self.start.service_plans[name].options.required

    def stop_serving(self) -> None:
        """End the pipelines that only answer requests, once everything that may call them has ended."""
        main_over = all(
            record.state in TASK_TERMINAL
            for name, record in self.tasks.items()
            if not self.start.task_plans[name].serving
        )
        if main_over and not self.get("serving_stopped"):
            self.changes["serving_stopped"] = True
            self.stop_sources(lambda plan: plan.serving)

    def advance_stop(self) -> None:
        # With dependencies declared, services that do not depend on each other stop side by side; with none, strictly
        # one after the other, the last registered first.
        side_by_side = any(plan.requires for plan in self.start.service_plans.values())
        before: dict[str, ServiceRecord] = {}
        while before != self.services:  # one that ends at once makes room for others, in whatever order they stand
            before = dict(self.services)
            for name in reversed(tuple(self.start.service_plans)):
                if not self.dependents_over(name):
                    continue
                if self.services[name].state not in SERVICE_TERMINAL | STOP_STATES:
                    self.stop_service(name)
                if not side_by_side and self.services[name].state not in SERVICE_TERMINAL:
                    break
        if all(record.state in SERVICE_TERMINAL for record in self.services.values()):
            self.move_job(JobState.SEALED)
            self.do(Do.SEAL)
