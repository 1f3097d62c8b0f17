"""The lifecycle of a job, without I/O: what follows from what happens, as values in and values out.

`step(state, event, now)` returns the next state and the actions to carry out. It knows no thread, no clock and no
service; a supervisor carries out the actions and feeds back the events. So every order, crash point and time-out can be
tested with numbers.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from sage._runtime.lifecycle import (
    STOP_STATES,
    Action,
    Begin,
    Do,
    Failure,
    ServiceDied,
    ServiceFailed,
    ServiceRecord,
    State,
    StopRequested,
    TaskClosing,
    TaskEnded,
    TaskFailed,
    TaskOpened,
    Tick,
    Trouble,
)
from sage._runtime.service_transitions import ServiceDraft
from sage._runtime.states import SERVICE_TERMINAL, TASK_TERMINAL, JobState, ServiceState, TaskState, Way
from sage.errors import ServiceUnavailableError

if TYPE_CHECKING:
    from sage._runtime.lifecycle import LifecycleEvent, TaskEvent


def step(state: State, event: LifecycleEvent, now: float) -> tuple[State, tuple[Action, ...]]:
    """Return what follows from an event at the monotonic time `now`: the next state, and what to do."""
    if state.job is JobState.SEALED:
        return state, ()
    draft = _JobDraft(state, now)
    draft.take(event)
    draft.expire()
    draft.advance()
    return draft.state(), tuple(draft.actions)


class _JobDraft(ServiceDraft):
    """What follows for the job, its tasks, and the order of its services."""

    __slots__ = ()

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
            case ServiceDied() | ServiceFailed() if self.get("job") is JobState.NEW:
                self.changes["early"] = (*self.get("early"), event)
            case TaskOpened() | TaskFailed() | TaskClosing() | TaskEnded():
                if self.tasks[event.task].state not in TASK_TERMINAL:
                    self.take_task(event)
            case Tick():
                pass
            case _:
                self.take_service(event)
        if self.get("early") and self.get("job") is not JobState.NEW:
            deaths, self.changes["early"] = self.get("early"), ()
            for death in deaths:
                self.take_service(death)

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
                if record.hook is not None and self.stopping:
                    self.bring_forward(name, capped)
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
            case TaskFailed() if self.takes_along(event.error):
                pass
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

    def takes_along(self, error: BaseException) -> bool:
        """Return whether a service that died, and failed the job by that, is all that a task failed for; then say so.

        Whether a task still hears of such a death is a matter of moments, and it is no second failure.
        """
        failures: tuple[Failure, ...] = self.get("failures")
        reason: BaseException | None = error
        looked_at: set[int] = set()
        while reason is not None and id(reason) not in looked_at:  # `raise error from error` makes a circle
            looked_at.add(id(reason))
            for place, failure in enumerate(failures):
                is_death = failure.trouble is Trouble.DIED and failure.counts
                if is_death and isinstance(reason, ServiceUnavailableError) and reason.service == failure.name:
                    known = replace(failure, caused=(*failure.caused, error))
                    self.changes["failures"] = (*failures[:place], known, *failures[place + 1 :])
                    return True
            reason = reason.__cause__
        return False

    def kill(self) -> None:
        """Give up on everything that has not ended."""
        if self.get("job") in (JobState.NEW, JobState.STARTING, JobState.RUNNING, JobState.DRAINING):
            self.move_job(JobState.CANCELLING)
        for name, task in list(self.tasks.items()):
            if task.state is TaskState.CREATED:
                self.move_task(name, TaskState.SKIPPED, due=None)
            elif task.state not in TASK_TERMINAL:
                self.abandon_task(name)
        for name in self.services:
            self.kill_service(name)

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

    # --- what is possible now ---

    def advance(self) -> None:
        """Start, run, stop and seal whatever is due, until nothing more follows."""
        if self.get("job") is JobState.STARTING:
            self.advance_start()
        serves_only = all(plan.serving for plan in self.start.task_plans.values())
        job: JobState = self.get("job")
        if job is JobState.DRAINING or (job is JobState.RUNNING and not serves_only):
            self.stop_serving()
        waits = self.start.until_asked and job is JobState.RUNNING
        if (
            self.tasks_over
            and not waits
            and job in (JobState.RUNNING, JobState.DRAINING, JobState.CANCELLING, JobState.FAILING)
        ):
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
