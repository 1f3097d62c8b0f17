"""A job's lifecycle while one step changes it: the moves, and what follows from one for the job as a whole."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from sage._runtime.lifecycle import (
    EXIT_NET_S,
    STOP_STATES,
    Action,
    Do,
    Failure,
    ServiceRecord,
    State,
    TaskRecord,
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
)

if TYPE_CHECKING:
    from collections.abc import Callable

    from sage._runtime.lifecycle import TaskPlan


@dataclass(slots=True)
class Draft:
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

    # --- the job as a whole ---

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
            late = self.now + self.start.service_plans[name].options.stop_timeout_s
            self.bring_forward(name, deadline if record.state in STOP_STATES else min(late, deadline))
            if record.state in (ServiceState.STARTING, ServiceState.BACKOFF) or record.again:
                # No restart begins any more, so a call that waits for one would keep its task from ending.
                self.do(Do.REFUSE_CALLS, name)
        for name, task in self.tasks.items():
            if task.due is not None:
                self.tasks[name] = replace(task, due=min(task.due, self.get("tasks_due")))

    def bring_forward(self, name: str, due: float) -> None:
        """Let what runs of a service, or waits, be late at `due` at the latest."""
        record = self.services[name]
        net_s = EXIT_NET_S if record.hook == "exit" else 0.0
        if record.due is None or record.due <= due + net_s:
            return
        self.services[name] = replace(record, due=due + net_s)
        if record.hook == "exit":
            self.do(Do.HURRY_EXIT, name, hook="exit", incarnation=record.incarnation, due=due)

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

    def abandon_task(self, name: str) -> None:
        self.fail(Trouble.LATE_TASK, name)
        self.do(Do.ABANDON_TASK, name)
        self.move_task(name, TaskState.ABANDONED, due=None)
