"""A job's lifecycle while one step changes it: the moves, and their consequences for the whole job."""

from __future__ import annotations

from copy import copy
from dataclasses import replace
from typing import TYPE_CHECKING, TypedDict, Unpack

from sage._runtime.dues import with_due, without_first
from sage._runtime.lifecycle import (
    EXIT_NET_S,
    STOP_STATES,
    Action,
    ActionKind,
    Failure,
    FailureKind,
    ServiceDied,
    ServiceFailed,
    ServiceRecord,
    State,
    TaskRecord,
)
from sage._runtime.states import (
    JOB_NEXT,
    SERVICE_NEXT,
    SERVICE_TERMINAL,
    TASK_NEXT,
    TASK_TERMINAL,
    JobState,
    ServiceState,
    StopMode,
    TaskState,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from sage._runtime.dues import Due
    from sage._runtime.lifecycle import Tally, TaskPlan
    from sage._runtime.task_restarts import TaskRestarts


class ServiceChanges(TypedDict, total=False):
    """Fields of `ServiceRecord` that change together."""

    hooks: frozenset[str]
    incarnation: int
    hook: str | None
    due: float | None
    start_due: float
    restarts: tuple[float, ...]
    again: bool
    goal: ServiceState
    extended_s: float
    has_died: bool
    rests: bool
    wanted: bool


CARRIED = (
    "services",
    "tasks",
    "early",
    "job",
    "way",
    "ended_by",
    "seen",
    "failures",
    "serving_stopped",
    "deadline",
    "drain_due",
    "tasks_due",
    "hook_cap_s",
    "restarts",
)
"""The fields of a state that a step may change; `tally` is copied."""


class Transition:
    """A state while one step changes it, with the fields of `State` that may change. Nothing outside `step` sees one.

    Attributes:
        start: the state before the step.
        now: the moment of the step.
        actions: the actions to carry out.
        touched: services that have changed.
        startable: services whose declared needs are met since this step.
        stoppable: services that nothing needs any more since this step.
        openable: tasks that may be opened since this step.
        stays: which services may be kept, as far as this step has asked.
    """

    services: Mapping[str, ServiceRecord]
    tasks: Mapping[str, TaskRecord]
    early: tuple[ServiceDied | ServiceFailed, ...]
    job: JobState
    way: StopMode | None
    ended_by: StopMode | None
    seen: frozenset[tuple[str, str]]
    failures: tuple[Failure, ...]
    serving_stopped: bool
    deadline: float
    drain_due: float
    tasks_due: float
    hook_cap_s: float
    restarts: TaskRestarts

    def __init__(self, start: State, now: float) -> None:
        self.start = start
        self.now = now
        for name in CARRIED:
            setattr(self, name, getattr(start, name))
        self.tally: Tally = copy(start.tally)
        self.actions: list[Action] = []
        self.touched: set[str] = set()
        self.startable: set[str] = set()
        self.stoppable: list[str] = []
        self.openable: set[str] = set()
        self.stays: dict[str, bool] = {}

    def state(self) -> State:
        while self.tally.dues is not None and not self.is_due(self.tally.dues[1]):
            self.tally.dues = without_first(self.tally.dues)
        return replace(self.start, tally=self.tally, **{name: getattr(self, name) for name in CARRIED})

    # --- the counts ---

    def is_due(self, due: Due) -> bool:
        """Return whether a moment still counts."""
        at, is_task, name = due
        return (self.tasks[name] if is_task else self.services[name]).due == at

    def put_service(self, name: str, record: ServiceRecord) -> None:
        before = self.services[name]
        if self.services is self.start.services:
            self.services = dict(self.services)
        self.services[name] = record  # type: ignore[index]
        self.touched.add(name)
        if record.due is not None and record.due != before.due:
            self.tally.dues = with_due(self.tally.dues, (record.due, False, name))
        if record.state is not before.state:
            self._count_service(name, before.state, record.state)

    def _count_service(self, name: str, before: ServiceState, after: ServiceState) -> None:
        required = self.start.service_plans[name].options.required
        if after in SERVICE_TERMINAL:
            self.tally.services_left -= 1
            for other in self.requires(name):
                if self.need(other, -1) == 0:
                    self.stoppable.append(other)
        was_fine, is_fine = (
            state in (ServiceState.READY, ServiceState.RESTING) or (state in SERVICE_TERMINAL and not required)
            for state in (before, after)
        )
        if is_fine is not was_fine:
            self.tally.services_unready += -1 if is_fine else 1
            if self.tally.unmet is self.start.tally.unmet:
                self.tally.unmet = dict(self.tally.unmet)
            for other in self.start.shape.needed_by[name]:
                self.tally.unmet[other] += -1 if is_fine else 1
                if self.tally.unmet[other] == 0:
                    self.startable.add(other)

    def need(self, name: str, number: int) -> int:
        """Count one more or one less that needs a service, and return how many do."""
        if self.tally.needed is self.start.tally.needed:
            self.tally.needed = dict(self.tally.needed)
        self.tally.needed[name] += number
        return self.tally.needed[name]

    def put_task(self, name: str, record: TaskRecord) -> None:
        before = self.tasks[name]
        if self.tasks is self.start.tasks:
            self.tasks = dict(self.tasks)
        self.tasks[name] = record  # type: ignore[index]
        if record.due is not None and record.due != before.due:
            self.tally.dues = with_due(self.tally.dues, (record.due, True, name))
        if record.state in TASK_TERMINAL and before.state not in TASK_TERMINAL:
            self.tally.tasks_left -= 1
            if not self.start.task_plans[name].serving:
                self.tally.main_left -= 1
        if record.opened and not before.opened:
            self.tally.tasks_unopened -= 1
            if self.tally.unopened is self.start.tally.unopened:
                self.tally.unopened = dict(self.tally.unopened)
            for other in self.start.shape.opened_before[name]:
                self.tally.unopened[other] -= 1
                if self.tally.unopened[other] == 0:
                    self.openable.add(other)

    # --- moves: the only places where a state changes ---

    def move_job(self, after: JobState) -> None:
        before = self.job
        if before is after:
            return
        assert after in JOB_NEXT[before], f"job: {before} -> {after}"
        self.job = after
        self.note("job", "", before, after)
        if self.stopping and after is not JobState.SEALED:
            self.end_starts()

    def move_task(self, name: str, after: TaskState, due: float | None = None) -> None:
        """Change the state of a task, which is late at `due`."""
        before = self.tasks[name].state
        self.put_task(name, TaskRecord(after, due, self.tasks[name].opened))
        if before is not after:
            assert after in TASK_NEXT[before], f"task {name}: {before} -> {after}"
            self.note("task", name, before, after)

    def move_service(self, name: str, after: ServiceState, **changes: Unpack[ServiceChanges]) -> None:
        before = self.services[name].state
        self.put_service(name, replace(self.services[name], state=after, **changes))
        if before is not after:
            assert after in SERVICE_NEXT[before], f"service {name}: {before} -> {after}"
            self.note("service", name, before, after)

    def do(
        self, do: ActionKind, target: str = "", *, hook: str = "", incarnation: int = 0, due: float | None = None
    ) -> None:
        self.actions.append(Action(do, target, hook, incarnation, due))

    def note(self, subject: str, name: str, before: str, after: str) -> None:
        self.actions.append(Action(ActionKind.NOTE, name, subject=subject, before=before, after=after))

    def fail(
        self,
        trouble: FailureKind,
        name: str,
        hook: str = "",
        error: BaseException | None = None,
        *,
        counts: bool = True,
        text: str = "",
    ) -> None:
        incarnation = self.services[name].incarnation if name in self.services else 0
        self.failures += (Failure(trouble, name, hook, error, counts, text, incarnation=incarnation),)

    # --- questions ---

    @property
    def stopping(self) -> bool:
        return self.job not in (JobState.NEW, JobState.STARTING, JobState.RUNNING, JobState.RESTARTING)

    @property
    def starting_ends(self) -> bool:
        """Whether no start goes on: calls on their way in a drain may wait for one."""
        return self.stopping and self.job is not JobState.DRAINING

    def may_wake(self, name: str) -> bool:
        """Return whether a service that rests may be started; in a drain only for calls, and not to take a place."""
        return not self.stopping or (self.job is JobState.DRAINING and not self.start.service_plans[name].front)

    @property
    def tasks_over(self) -> bool:
        return self.tally.tasks_left == 0

    def requires(self, name: str) -> set[str]:
        return {*self.start.service_plans[name].requires, *self.tally.seen_by.get(name, ())}

    def needs(self, name: str, other: str) -> bool:
        """Return whether a service depends on another, or is it."""
        found, todo = {name}, [name]
        while todo and other not in found:
            new = self.requires(todo.pop()) - found
            found |= new
            todo += new
        return other in found

    def see(self, name: str, other: str) -> None:
        """Note that a service was seen to call another, which has to end after it."""
        if other not in self.requires(name) and self.services[name].state not in SERVICE_TERMINAL:
            self.need(other, 1)
        seen_by = self.tally.seen_by
        self.tally.seen_by = {**seen_by, name: (*seen_by.get(name, ()), other)}
        self.seen = self.seen | {(name, other)}

    def dependents_over(self, name: str) -> bool:
        return self.tally.needed[name] == 0

    # --- the job as a whole ---

    def arm(self, budget_s: float | None = None) -> None:
        """Set the one deadline of the stop; later requests may only bring it forward."""
        limits = self.start.limits
        budget = limits.stop_timeout_s if budget_s is None else min(budget_s, limits.stop_timeout_s)
        deadline = self.now + budget
        if self.deadline <= deadline:
            return
        reserve = min(max(limits.services_share * budget, limits.services_reserve_s), budget)
        tasks_s = budget - reserve if self.services else budget
        drain_s = min(limits.drain_timeout_s, tasks_s - min(limits.close_timeout_s, tasks_s / 4))
        self.deadline = deadline
        self.tasks_due = self.now + tasks_s
        self.drain_due = self.now + drain_s
        for name, record in self.services.items():
            late = self.now + self.start.service_plans[name].options.stop_timeout_s
            has_begun = record.state in STOP_STATES or record.state is ServiceState.STARTING
            self.bring_forward(name, deadline if has_begun else min(late, deadline))
        for name, task in self.tasks.items():
            if task.due is not None:
                self.put_task(name, replace(task, due=min(task.due, self.tasks_due)))

    def end_starts(self) -> None:
        """Refuse the calls of services that do not come back, as they would keep their tasks from ending."""
        for name, record in self.services.items():
            starts = record.state is ServiceState.STARTING
            rests = record.state is ServiceState.RESTING or (record.rests and record.state in STOP_STATES)
            restarts = record.again or record.state is ServiceState.BACKOFF
            if restarts or (starts and self.starting_ends) or (rests and not self.may_wake(name)):
                self.do(ActionKind.REFUSE_CALLS, name)
            if starts and self.starting_ends:
                late = self.now + self.start.service_plans[name].options.stop_timeout_s
                self.bring_forward(name, min(late, self.deadline))

    def bring_forward(self, name: str, due: float) -> None:
        """Bring the deadline of the service's current hook or pause forward to `due`."""
        record = self.services[name]
        net_s = EXIT_NET_S if record.hook == "exit" else 0.0
        if record.due is None or record.due <= due + net_s:
            return
        self.put_service(name, replace(record, due=due + net_s))
        if record.hook == "exit":
            self.do(ActionKind.HURRY_EXIT, name, hook="exit", incarnation=record.incarnation, due=due)

    def fail_job(self) -> None:
        if self.job is JobState.RESTARTING:  # which was in vain
            causes = (Failure(FailureKind.TASK, task, error=error) for task, error in self.restarts.causes)
            self.failures = (*causes, *self.failures)
        if self.job in (JobState.STARTING, JobState.RUNNING, JobState.RESTARTING, JobState.DRAINING):
            self.arm()
            self.move_job(JobState.FAILING)
            self.cancel_tasks()

    def stop_sources(self, which: Callable[[TaskPlan], bool]) -> None:
        for name, record in self.tasks.items():
            plan = self.start.task_plans[name]
            if plan.takes_stop and which(plan) and record.state not in TASK_TERMINAL:
                self.do(ActionKind.STOP_TASK, name)

    def hold_back(self) -> None:
        """Let no further call of a costly function begin, but for the answers that functions which run may wait for."""
        for name, record in self.tasks.items():
            if not self.start.task_plans[name].serving and record.state not in TASK_TERMINAL:
                self.do(ActionKind.HOLD_BACK_TASK, name)

    def cancel_tasks(self, do: ActionKind = ActionKind.CANCEL_TASK) -> None:
        for name, record in list(self.tasks.items()):
            if record.state is TaskState.CREATED:
                self.move_task(name, TaskState.SKIPPED)
            elif record.state not in TASK_TERMINAL:
                self.do(do, name)
        self.tighten_tasks()

    # --- a restart of the tasks ---

    def may_restart(self, error: BaseException) -> bool:
        """Return whether the tasks start again, or do so anyway, after one has failed with an error."""
        if self.job in (JobState.STARTING, JobState.RUNNING) and not self.restarts.allows(self.now):
            return False
        return not self.stopping and self.restarts.covers(error)

    def restart_tasks(self, name: str, error: BaseException) -> None:
        """End all tasks so that they can be made again, unless that is under way; `name` is that of the failed one."""
        if self.job is not JobState.RESTARTING:
            self.restarts = self.restarts.begun(self.now)
            self.move_job(JobState.RESTARTING)
            self.cancel_tasks(ActionKind.RESET_TASK)
        self.restarts = self.restarts.after(name, error)

    def renew_tasks(self) -> None:
        """Begin with new tasks; the services are there."""
        plans = self.start.task_plans
        self.restarts = self.restarts.done()
        self.tasks = {name: TaskRecord() for name in plans}
        self.tally.tasks_left = self.tally.tasks_unopened = len(plans)
        self.tally.main_left = sum(not plan.serving for plan in plans.values())
        self.tally.unopened = {name: len({*plan.downstream}) for name, plan in plans.items()}
        self.move_job(JobState.STARTING)
        self.openable.update(plans)

    def tighten_tasks(self) -> None:
        """Give every task that still runs its time to leave user code."""
        late = min(self.tasks_due, self.now + self.start.limits.drain_timeout_s)
        for name, record in list(self.tasks.items()):
            if record.state not in TASK_TERMINAL:
                due = late if record.due is None else min(record.due, self.tasks_due)
                self.put_task(name, replace(record, due=due))

    def begin_bounds_anew(self) -> None:
        """Give every task that ends for a restart its whole time from now on."""
        limits = self.start.limits
        for name, record in list(self.tasks.items()):
            if record.state not in TASK_TERMINAL:
                is_closing = record.state is TaskState.CLOSING
                bound_s = limits.close_timeout_s if is_closing else limits.drain_timeout_s
                self.put_task(name, replace(record, due=self.now + bound_s))

    def abandon_task(self, name: str) -> None:
        self.fail(FailureKind.LATE_TASK, name)
        self.do(ActionKind.ABANDON_TASK, name)
        self.move_task(name, TaskState.ABANDONED)
