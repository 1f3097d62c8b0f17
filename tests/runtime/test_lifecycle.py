"""The rules of the lifecycle one by one: every order, failure and time-out, with a clock of numbers."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from sage._runtime.lifecycle import (
    EXIT_NET_S,
    Action,
    ActionKind,
    Begin,
    CleanupDeferred,
    DependencySeen,
    Exit,
    ExtendTimeout,
    Failure,
    FailureKind,
    HookEnded,
    LifecycleEvent,
    Limits,
    RestRequested,
    ServiceDied,
    ServiceFailed,
    ServicePlan,
    StopRequested,
    TaskClosing,
    TaskEnded,
    TaskFailed,
    TaskOpened,
    TaskPlan,
    Tick,
    WakeRequested,
    begin,
)
from sage._runtime.states import JobState, StopMode, TaskState
from sage._runtime.transitions import step
from sage.errors import FunctionError, ServiceUnavailableError
from sage.service import ServiceOptions

ALL = frozenset({"setup", "start", "stop", "cleanup"})
WATCHED = ALL | {"health"}
BORING = (ActionKind.NOTE, ActionKind.ADMIT_CALLS, ActionKind.REFUSE_CALLS)


def service(
    name: str, *requires: str, keep: bool = False, adopted: frozenset[str] | None = None, **options: Any
) -> ServicePlan:
    return ServicePlan(name, requires, ServiceOptions(**options), keep, adopted)


def process(name: str, *requires: str, adopted: frozenset[str] | None = None, **options: Any) -> ServicePlan:
    """Return a service in a process of its own."""
    return ServicePlan(name, requires, ServiceOptions(**options), adopted=adopted, own_hooks=frozenset({"exit"}))


def replicated(name: str, count: int, *requires: str, least: int = 1, **options: Any) -> tuple[ServicePlan, ...]:
    """Return the replicas of a service, and their front."""
    names = [f"{name}[{number}]" for number in range(1, count + 1)]
    own = ServiceOptions(required=False, **options)
    front = ServicePlan(name, tuple(names), ServiceOptions(replicas=count, replicas_min=least))
    return (*(ServicePlan(one, requires, own, front=name) for one in names), front)


class Job:
    """A job on a clock of numbers: tells the lifecycle what happens and keeps what it wants done."""

    def __init__(
        self, *services: ServicePlan, tasks: tuple[TaskPlan, ...] = (TaskPlan("t", takes_stop=True),), **limits: float
    ) -> None:
        self.now = 0.0
        self.state = begin(services, tasks, Limits(**limits))
        self.actions: list[Action] = []
        self.hooks: dict[str, frozenset[str]] = {plan.name: ALL for plan in services}

    def post(self, *events: LifecycleEvent) -> list[str]:
        """Let things happen and return what is to be done, as "verb target hook"."""
        fresh: list[Action] = []
        for event in events:
            self.state, actions = step(self.state, event, self.now)
            fresh += actions
        self.actions += fresh
        return [said(action) for action in fresh if action.do not in BORING]

    def at(self, now: float) -> list[str]:
        """Let time pass up to `now`, with a tick whenever one is due."""
        done: list[str] = []
        while (due := self.state.next_due) is not None and due <= now:
            self.now = max(self.now, due)
            done += self.post(Tick())
        self.now = now
        return done

    def end(self, name: str, hook: str, value: Any = None, error: BaseException | None = None) -> list[str]:
        """Let a hook return or raise."""
        if hook == "build" and error is None:
            value = self.hooks[name]
        if hook == "drain" and value is None:
            value = True
        return self.post(HookEnded(name, self.state.services[name].incarnation, hook, value, error))

    def ready(self, *names: str) -> list[str]:
        """Let services start well."""
        done: list[str] = []
        for name in names:
            done += self.end(name, "build")
            while (hook := self.state.services[name].hook) not in (None, "health-pause"):
                assert hook is not None
                done += self.end(name, hook, True)
        return done

    def gone(self, *names: str) -> list[str]:
        """Let services end well."""
        done: list[str] = []
        for name in names:
            while (hook := self.state.services[name].hook) in ("drain", "stop", "cleanup"):
                assert hook is not None
                done += self.end(name, hook)
        return done

    def run(self) -> Job:
        """Start everything there is, until the job runs."""
        self.post(Begin())
        while any(record.hook == "build" for record in self.state.services.values()):
            self.ready(*(name for name, record in self.state.services.items() if record.hook == "build"))
        for name in self.state.tasks:
            self.post(TaskOpened(name))
        assert self.state.job is JobState.RUNNING
        return self

    def stopping(self) -> Job:
        """Run, and let the tasks end by themselves."""
        self.run()
        for name in self.state.tasks:
            self.post(TaskEnded(name, TaskState.DONE))
        return self

    def service_states(self) -> dict[str, str]:
        return {name: str(record.state) for name, record in self.state.services.items()}

    def seen_failures(self) -> list[tuple[str, str, str]]:
        return [(str(failure.trouble), failure.name, failure.hook) for failure in self.state.failures]

    @property
    def hook_order(self) -> list[str]:
        return [f"{action.target}.{action.hook}" for action in self.actions if action.do is ActionKind.RUN_HOOK]


def said(action: Action) -> str:
    return " ".join(filter(None, (action.do.value, action.target, action.hook)))


# --- start ------------------------------------------------------------------------------------------------------------


def test_services_start_before_tasks_in_order_of_dependency() -> None:
    """What a service depends on is ready first; tasks come last, sinks before sources."""
    job = Job(
        service("a", "b"),
        service("b"),
        tasks=(TaskPlan("source", ("sink",), takes_stop=True), TaskPlan("sink")),
    )
    assert job.post(Begin()) == ["run_hook b build"]
    assert job.end("b", "build") == ["run_hook b setup"]
    assert job.end("b", "setup") == ["run_hook b start"]
    assert job.end("b", "start") == ["run_hook a build"]
    assert job.ready("a") == ["run_hook a setup", "run_hook a start", "open_task sink"]
    assert job.post(TaskOpened("sink")) == ["open_task source"]
    assert job.post(TaskOpened("source")) == ["run_task source", "run_task sink"]
    assert job.state.job is JobState.RUNNING


def test_independent_services_start_side_by_side() -> None:
    """Services that do not depend on each other do not wait for each other."""
    job = Job(service("a"), service("b"))
    assert job.post(Begin()) == ["run_hook a build", "run_hook b build"]


def test_replicas_start_side_by_side_and_their_front_with_those_that_could_be_had() -> None:
    job = Job(service("base"), *replicated("a", 3, "base", least=2), service("user", "a"))
    assert job.post(Begin()) == ["run_hook base build"]
    assert job.ready("base")[-3:] == [f"run_hook a[{number}] build" for number in (1, 2, 3)]
    job.ready("a[2]", "a[1]")
    assert job.end("a[3]", "build", error=OSError("no memory")) == ["run_hook a build"]
    assert job.ready("a")[-1] == "run_hook user build"
    assert job.service_states()["a[3]"] == "failed_start"


@pytest.mark.parametrize("is_running", [False, True])
def test_a_job_fails_when_fewer_replicas_are_left_than_it_needs(is_running: bool) -> None:
    job = Job(*replicated("a", 2, least=2, restart="on_failure", restarts_max=1))
    if is_running:
        job.run()
    else:
        job.post(Begin())
    job.post(ServiceDied("a[1]", 1, "exit code 3"))
    job.at(1.0)
    assert not job.state.is_failed  # it is started once more
    assert ("cancel_task t" in job.post(ServiceDied("a[1]", 2, "exit code 4"))) is is_running
    [(kind, name, _)] = [failure for failure in job.seen_failures() if failure[0] != "died"]
    assert (kind, name, job.state.is_failed) == ("failed", "a", True)
    text = 'as 1 of its 2 replicas are left, and replicas_min is 2; the last one was "a[1]": exit code 4'
    assert [failure.text for failure in job.state.failures if failure.counts] == [text]


def test_the_job_goes_on_without_a_replica_that_it_does_not_need() -> None:
    job = Job(*replicated("a", 2)).run()
    job.post(ServiceDied("a[1]", 1, "exit code 3"))
    assert (job.service_states()["a[1]"], job.state.job, job.state.is_failed) == ("lost", JobState.RUNNING, False)
    job.post(ServiceDied("a[2]", 1, "exit code 3"))
    assert (job.state.job, job.state.is_failed) == (JobState.FAILING, True)


def with_spare(name: str) -> tuple[ServicePlan, ...]:
    """Return a service with one replica and a spare one, in processes of their own."""
    one, two, front = replicated(name, 2)
    one, two = (replace(plan, own_hooks=frozenset({"exit"})) for plan in (one, two))
    return one, replace(two, spare=True), replace(front, options=ServiceOptions(idempotent=True))


def test_a_spare_is_started_when_it_is_asked_for_and_the_other_one_rests() -> None:
    job = Job(*with_spare("a")).run()
    assert job.service_states() == {"a[1]": "ready", "a[2]": "resting", "a": "ready"}
    assert job.post(WakeRequested("a[2]")) == ["run_hook a[2] build"]
    job.ready("a[2]")
    assert job.post(RestRequested("a[1]", 1)) == ["hold_calls a[1]", "run_hook a[1] drain"]
    assert job.gone("a[1]")[-1] == "run_hook a[1] exit"
    job.end("a[1]", "exit", Exit(0))
    assert job.service_states() == {"a[1]": "resting", "a[2]": "ready", "a": "ready"}
    assert job.post(WakeRequested("a[1]")) == ["run_hook a[1] build"]
    job.ready("a[1]")
    job.post(RestRequested("a[2]", 1), TaskEnded("t", TaskState.DONE))
    job.gone("a", "a[2]", "a[1]")
    for name in ("a[1]", "a[2]"):
        job.end(name, "exit", Exit(0))
    assert set(job.service_states().values()) == {"stopped"}
    assert job.hook_order.count("a[1].cleanup") == 2


def test_a_spare_that_was_never_asked_for_is_skipped() -> None:
    job = Job(*with_spare("a")).stopping()
    job.gone("a", "a[1]")
    assert job.end("a[1]", "exit", Exit(0))[-1] == "seal"
    assert job.service_states()["a[2]"] == "skipped"


def test_a_successor_that_cannot_be_started_rests_again() -> None:
    job = Job(*with_spare("a")).run()
    job.post(WakeRequested("a[2]"))
    job.end("a[2]", "build", error=OSError("no memory"))
    job.end("a[2]", "exit", Exit(1))
    assert job.service_states() == {"a[1]": "ready", "a[2]": "resting", "a": "ready"}
    assert (job.state.job, job.state.is_failed) == (JobState.RUNNING, False)
    assert job.post(WakeRequested("a[2]")) == ["run_hook a[2] build"]


def test_a_health_check_that_runs_is_waited_for_before_a_service_rests() -> None:
    job = Job(*with_spare("a"))
    job.hooks["a[1]"] = WATCHED
    job.run().post(WakeRequested("a[2]"))
    job.ready("a[2]")
    job.at(5.0)
    assert job.state.services["a[1]"].hook == "health"
    assert job.post(RestRequested("a[1]", 1)) == []
    assert job.end("a[1]", "health", True) == ["hold_calls a[1]", "run_hook a[1] drain"]


def test_a_replica_that_cannot_be_done_without_does_not_rest() -> None:
    job = Job(*with_spare("a")).run()
    job.post(WakeRequested("a[2]"))
    job.ready("a[2]")
    job.post(ServiceDied("a[2]", 1, "exit code 3"))
    assert job.post(RestRequested("a[1]", 1)) == []
    assert (job.service_states()["a[1]"], job.state.job, job.state.is_failed) == ("ready", JobState.RUNNING, False)


def test_nothing_wakes_or_rests_after_stopping_began() -> None:
    job = Job(*with_spare("a")).stopping()
    assert job.post(WakeRequested("a[2]"), RestRequested("a[1]", 1)) == []


def resting(*services: ServicePlan, **hooks: frozenset[str]) -> Job:
    """Return a job whose first service has gone to rest."""
    job = Job(*services)
    job.hooks |= hooks
    name = services[0].name
    job.run().post(RestRequested(name, 1))
    job.gone(name)
    assert job.service_states()[name] == "resting"
    return job


def calls_of(job: Job) -> list[str]:
    """Return what was done with the calls of services, in order."""
    kinds = (ActionKind.ADMIT_CALLS, ActionKind.HOLD_CALLS, ActionKind.REFUSE_CALLS)
    return [said(action) for action in job.actions if action.do in kinds]


def test_a_service_rests_by_its_usual_hooks_and_is_started_when_it_is_wanted() -> None:
    job = resting(service("a"))
    assert job.post(WakeRequested("a")) == ["run_hook a build"]
    assert job.post(WakeRequested("a")) == []
    job.ready("a")
    job.post(TaskEnded("t", TaskState.DONE))
    job.gone("a")
    assert job.service_states() == {"a": "stopped"}
    once = ["a.build", "a.setup", "a.start", "a.drain", "a.stop", "a.cleanup"]
    assert job.hook_order == once * 2
    assert calls_of(job)[:3] == ["admit_calls a", "hold_calls a", "admit_calls a"]
    record = job.state.services["a"]
    assert (record.restarts, job.state.is_failed) == ((), False)


@pytest.mark.parametrize("moment", ["drain", "stop", "cleanup"])
def test_a_service_that_is_wanted_while_it_ends_is_started_as_soon_as_it_has_ended(moment: str) -> None:
    job = Job(service("a")).run()
    job.post(RestRequested("a", 1))
    while job.state.services["a"].hook != moment:
        job.end("a", str(job.state.services["a"].hook))
    assert job.post(WakeRequested("a")) == []
    assert job.gone("a")[-1] == "run_hook a build"
    job.ready("a")
    assert job.post(RestRequested("a", 2)) == ["hold_calls a", "run_hook a drain"]
    job.gone("a")
    assert job.service_states() == {"a": "resting"}  # nobody wanted it this time


def test_a_service_that_another_one_needs_does_not_rest() -> None:
    """A call in the cleanup of the other one would come after stopping began, when nothing is started any more."""
    job = Job(service("a"), service("b", "a"), service("c")).run()
    assert job.post(RestRequested("a", 1)) == []
    assert job.post(DependencySeen("b", "c"), RestRequested("c", 1)) == []
    assert job.service_states() == {"a": "ready", "b": "ready", "c": "ready"}
    assert job.post(RestRequested("b", 1)) == ["hold_calls b", "run_hook b drain"]
    job.gone("b")
    assert job.post(RestRequested("a", 1)) == []  # it may be started again at any time


def test_a_service_that_another_one_needed_until_it_was_lost_rests() -> None:
    job = Job(service("a"), process("b", "a", required=False)).run()
    job.post(ServiceDied("b", 1, "exit code 3"))
    job.end("b", "exit", Exit(3))
    assert job.service_states()["b"] == "lost"
    assert job.post(RestRequested("a", 1)) == ["hold_calls a", "run_hook a drain"]


def test_a_service_that_comes_to_be_needed_while_its_health_is_checked_does_not_rest() -> None:
    job = Job(service("a"), service("b"))
    job.hooks["a"] = WATCHED
    job.run().at(5.0)
    assert job.post(RestRequested("a", 1), DependencySeen("b", "a")) == []
    assert job.end("a", "health", True) == []
    job.post(ServiceFailed("a", 1, "it is gone"))
    assert (job.service_states()["a"], job.state.is_failed) == ("degraded", True)


def test_a_service_that_fails_before_it_could_rest_is_restarted() -> None:
    job = Job(service("a", restart="on_failure"))
    job.hooks["a"] = WATCHED
    job.run().at(5.0)
    assert job.post(RestRequested("a", 1)) == []
    job.end("a", "health", False)
    job.gone("a")
    assert job.service_states() == {"a": "backoff"}


ENDING = [StopRequested(StopMode.CANCEL), TaskFailed("t", OSError("no disk"))]


@pytest.mark.parametrize("end", ENDING)
def test_the_end_of_a_job_refuses_the_calls_that_wait_for_a_service_that_rests(end: LifecycleEvent) -> None:
    job = resting(service("a"))
    hooks = len(job.hook_order)
    assert job.post(end, WakeRequested("a")) == ["cancel_task t"]
    assert calls_of(job)[-1] == "refuse_calls a"
    job.post(TaskEnded("t", TaskState.DONE))
    assert (job.service_states(), len(job.hook_order)) == ({"a": "stopped"}, hooks)


@pytest.mark.parametrize("end", ENDING)
def test_the_end_of_a_job_refuses_the_calls_that_wait_for_the_start_of_a_service(end: LifecycleEvent) -> None:
    job = resting(service("a"))
    job.post(WakeRequested("a"))
    assert job.end("a", "build") == ["run_hook a setup"]
    job.post(end)
    assert calls_of(job)[-1] == "refuse_calls a"
    job.post(TaskEnded("t", TaskState.DONE))
    assert job.end("a", "setup") == ["run_hook a cleanup"]
    assert job.end("a", "cleanup") == ["seal"]
    assert job.service_states() == {"a": "stopped"}


@pytest.mark.parametrize("end", ENDING)
def test_the_end_of_a_job_ends_a_service_that_is_about_to_rest_although_it_was_wanted(end: LifecycleEvent) -> None:
    job = Job(service("a")).run()
    job.post(RestRequested("a", 1), WakeRequested("a"), end)
    assert calls_of(job)[-1] == "refuse_calls a"
    job.gone("a")
    assert (job.service_states(), job.hook_order.count("a.build")) == ({"a": "stopped"}, 1)


DRAINS = [StopRequested(StopMode.DRAIN), StopRequested(StopMode.STOP)]


@pytest.mark.parametrize("moment", ["rests", "starts", "ends"])
@pytest.mark.parametrize("end", DRAINS)
def test_a_drain_starts_a_service_that_rests_for_the_calls_on_their_way(end: StopRequested, moment: str) -> None:
    job = Job(service("a")).run() if moment == "ends" else resting(service("a"))
    if moment == "ends":
        job.post(RestRequested("a", 1))
    if moment == "starts":
        job.post(WakeRequested("a"))
    job.post(end, WakeRequested("a"))
    if moment == "ends":
        job.gone("a")
    job.ready("a")
    assert calls_of(job)[-1] == "admit_calls a"
    assert job.post(RestRequested("a", 2)) == []  # nothing rests any more
    job.post(TaskEnded("t", TaskState.DONE))
    job.gone("a")
    assert (job.service_states(), job.state.is_failed) == ({"a": "stopped"}, False)
    assert job.post(WakeRequested("a")) == []


def test_a_drain_restarts_no_service_and_refuses_its_calls() -> None:
    job = Job(service("a", restart="on_failure")).run()
    job.post(ServiceFailed("a", 1, "it is gone"))
    job.gone("a")
    assert job.service_states() == {"a": "backoff"}
    job.post(StopRequested(StopMode.DRAIN), WakeRequested("a"))
    assert calls_of(job)[-1] == "refuse_calls a"
    assert job.at(job.now + 1.0) == []


@pytest.mark.parametrize("hangs", ["build", "setup"])
def test_a_start_in_a_drain_ends_with_the_drain(hangs: str) -> None:
    job = resting(service("a", start_timeout_s=1000.0))
    job.post(StopRequested(StopMode.DRAIN), WakeRequested("a"))
    if hangs == "setup":
        job.end("a", "build")
    assert job.at(job.state.drain_due)[0] == "cancel_task t"
    assert calls_of(job)[-1] == "refuse_calls a"
    due = job.state.services["a"].due
    assert due is not None
    assert due < job.state.deadline
    job.post(TaskEnded("t", TaskState.CANCELLED))
    assert job.at(due)[0] == f"abandon_hook a {hangs}"


def test_a_service_that_cannot_be_started_again_fails_the_job() -> None:
    job = resting(service("a"))
    job.post(WakeRequested("a"))
    job.end("a", "build", error=OSError("no memory"))
    assert (job.state.job, job.seen_failures()) == (JobState.FAILING, [("start", "a", "build")])
    assert calls_of(job)[-1] == "refuse_calls a"


def test_a_service_that_cannot_be_started_again_is_restarted_by_its_policy() -> None:
    job = resting(service("a", restart="on_failure"))
    job.post(WakeRequested("a"))
    job.end("a", "build", error=OSError("no memory"))
    assert (job.service_states(), job.state.is_failed) == ({"a": "backoff"}, False)
    assert job.at(job.now + 0.1) == ["run_hook a build"]
    job.ready("a")
    assert calls_of(job)[-1] == "admit_calls a"


def test_the_job_goes_on_without_a_service_that_cannot_be_started_again_if_it_is_not_required() -> None:
    job = resting(service("a", required=False))
    job.post(WakeRequested("a"))
    job.end("a", "build", error=OSError("no memory"))
    assert (job.service_states(), job.state.job) == ({"a": "failed_start"}, JobState.RUNNING)
    assert calls_of(job)[-1] == "refuse_calls a"


def test_a_cleanup_that_fails_before_a_rest_is_a_failure_and_the_service_rests() -> None:
    job = Job(service("a")).run()
    job.post(RestRequested("a", 1))
    job.end("a", "drain")
    job.end("a", "stop")
    job.end("a", "cleanup", error=OSError("disk full"))
    assert (job.service_states(), job.seen_failures()) == ({"a": "resting"}, [("hook", "a", "cleanup")])
    job.post(TaskEnded("t", TaskState.DONE))
    assert job.service_states() == {"a": "cleanup_failed"}


def test_only_hooks_that_a_service_has_are_run() -> None:
    """A class without hooks is ready once it is built, and its end is the drain alone."""
    job = Job(service("a"))
    job.hooks["a"] = frozenset()
    job.post(Begin())
    assert job.end("a", "build") == ["open_task t"]
    job.post(TaskOpened("t"), TaskEnded("t", TaskState.DONE))
    assert job.end("a", "drain") == ["seal"]
    assert job.service_states() == {"a": "stopped"}


def test_ready_is_asked_again_until_it_says_yes() -> None:
    """No task opens before `ready` says yes, and what it says is asked for again after a pause."""
    job = Job(service("a"))
    job.hooks["a"] = frozenset({"ready"})
    job.post(Begin())
    assert job.end("a", "build") == ["run_hook a ready"]
    assert job.end("a", "ready", False) == []
    assert job.at(1.0) == ["run_hook a ready"]
    assert job.end("a", "ready", True) == ["open_task t"]


def test_ready_is_not_asked_again_where_it_has_no_time_to_answer() -> None:
    """A `ready` that is asked just before the bound is no hook that hangs, and is not killed for it."""
    job = Job(service("a", start_timeout_s=2.0))
    job.hooks["a"] = frozenset({"ready", "cleanup"})
    job.post(Begin())
    job.end("a", "build")
    job.at(1.949)
    job.end("a", "ready", False)
    assert job.at(1.9999) == []
    assert job.at(2.0) == ["run_hook a cleanup"]
    assert job.seen_failures() == [("not_ready", "a", "ready")]


def test_a_service_that_never_gets_ready_fails_the_start() -> None:
    """After `start_timeout_s` in all the job fails and what was built is cleaned."""
    job = Job(service("a", start_timeout_s=2.0))
    job.hooks["a"] = frozenset({"ready", "stop", "cleanup"})
    job.post(Begin())
    job.end("a", "build")
    while job.state.job is JobState.STARTING:
        job.end("a", "ready", False)
        assert job.state.next_due is not None
        job.at(job.state.next_due)
    assert 2.0 <= job.now <= 2.1
    assert job.state.services["a"].hook == "cleanup"
    job.end("a", "cleanup")
    assert job.service_states() == {"a": "failed_start"}
    assert job.seen_failures() == [("not_ready", "a", "ready")]
    assert job.state.is_failed
    assert job.state.job is JobState.SEALED


@pytest.mark.parametrize(
    ("hook", "follows"),
    [
        ("build", ["seal"]),
        ("setup", ["run_hook a cleanup", "seal"]),
        ("start", ["run_hook a cleanup", "seal"]),
    ],
)
def test_a_failing_start_ends_the_job(hook: str, follows: list[str]) -> None:
    """What was built is cleaned once, not stopped; a constructor that raised left nothing to clean."""
    error = RuntimeError("no")
    job = Job(service("a"))
    job.post(Begin())
    for earlier in ("build", "setup", "start"):
        if earlier == hook:
            break
        job.end("a", earlier)
    done = job.end("a", hook, error=error)
    done += job.gone("a")
    assert done == follows
    assert job.state.failures == (Failure(FailureKind.START, "a", hook, error),)
    assert job.service_states() == {"a": "failed_start"}
    assert job.state.tasks["t"].state is TaskState.SKIPPED
    assert job.state.is_failed


def test_a_failing_start_unwinds_what_is_up_and_builds_nothing_more() -> None:
    """The others are stopped in reverse, and what waited for the failed one is never built."""
    job = Job(service("a"), service("b", "a"), service("c", "b"))
    job.post(Begin())
    job.ready("a")
    assert job.end("b", "build", error=ValueError("b")) == ["run_hook a drain"]
    assert job.gone("a") == ["run_hook a stop", "run_hook a cleanup", "seal"]
    assert job.service_states() == {"a": "stopped", "b": "failed_start", "c": "skipped"}


def test_a_skipped_service_makes_room_for_one_that_was_registered_after_it() -> None:
    """Dependencies may point forwards; a service that never started holds up none that it needs."""
    job = Job(service("a", "b", "c"), service("b"), service("c"))
    job.post(Begin())
    job.ready("b")
    assert job.end("c", "build", error=ValueError("c")) == ["run_hook b drain"]
    assert job.gone("b")[-1] == "seal"
    assert job.service_states() == {"a": "skipped", "b": "stopped", "c": "failed_start"}


def test_a_start_hook_that_hangs_is_abandoned_and_the_service_cleaned() -> None:
    """The bound of the start holds for all its hooks together."""
    job = Job(service("a", start_timeout_s=3.0))
    job.post(Begin())
    job.now = 2.0
    job.end("a", "build")
    assert job.at(2.9) == []
    assert job.at(3.0) == ["abandon_hook a setup", "run_hook a cleanup"]
    assert job.end("a", "cleanup") == ["seal"]
    assert job.service_states() == {"a": "abandoned"}
    assert job.state.is_failed


def test_a_constructor_that_hangs_leaves_nothing_to_clean() -> None:
    """There is no instance, so there is no hook to call; what it returns later counts for nothing."""
    job = Job(service("a", start_timeout_s=3.0))
    job.post(Begin())
    assert job.at(3.0) == ["abandon_hook a build", "seal"]
    assert job.service_states() == {"a": "abandoned"}
    assert job.end("a", "build") == []


# --- optional services, restarts, health ------------------------------------------------------------------------------


def test_the_job_goes_on_without_an_optional_service() -> None:
    """A service that is not required may fail its start; the job is not failed by it."""
    job = Job(service("a", required=False), service("b", "a"))
    job.post(Begin())
    assert job.end("a", "build", error=ValueError("a")) == ["run_hook b build"]
    assert job.ready("b")[-1] == "open_task t"
    assert job.state.failures[0].counts is False
    assert not job.state.is_failed
    assert job.service_states() == {"a": "failed_start", "b": "ready"}


def test_a_failing_start_is_tried_again_with_growing_pauses_up_to_the_limit() -> None:
    """Pauses double from the first to the longest; over the limit the service fails the job."""
    job = Job(service("a", restart="on_failure", restarts_max=3, backoff_s=(1.0, 3.0)))
    job.post(Begin())
    begun = []
    for _ in range(4):
        begun.append(job.now)
        job.end("a", "build", error=ValueError("a"))
        job.at(job.now + 5.0 if job.state.next_due is None else job.state.next_due)
    assert begun == [0.0, 1.0, 3.0, 6.0]
    assert [failure.counts for failure in job.state.failures] == [False, False, False, True]
    assert job.state.job is JobState.SEALED
    assert job.state.is_failed


def test_restarts_outside_the_window_are_forgotten() -> None:
    """A service that fails once an hour is restarted for ever, and after the first pause."""
    job = Job(service("a", restart="on_failure", restarts_max=1, restart_window_s=60.0, health_interval_s=1.0))
    job.hooks["a"] = frozenset({"health"})
    job.run()
    for hour in range(1, 1200):
        job.now = hour * 3600.0
        assert job.post(Tick()) == ["run_hook a health"]
        job.end("a", "health", False)
        job.end("a", "drain")
        assert job.state.services["a"].due == pytest.approx(job.now + 0.1)
        assert job.at(job.now + 0.2) == ["run_hook a build"]
        job.ready("a")
    assert job.service_states() == {"a": "ready"}


def test_an_unhealthy_service_is_restarted_while_its_calls_wait() -> None:
    """The old incarnation ends with stop and cleanup before the next one is built."""
    job = Job(service("a", restart="on_failure", health_interval_s=5.0, backoff_s=(0.5, 1.0)))
    job.hooks["a"] = WATCHED
    job.run()
    assert job.at(4.9) == []
    assert job.at(5.0) == ["run_hook a health"]
    assert job.end("a", "health", None) == [], "None is as good as True"
    assert job.at(10.0) == ["run_hook a health"]
    assert job.end("a", "health", False) == ["hold_calls a", "run_hook a drain"]
    assert job.gone("a") == ["run_hook a stop", "run_hook a cleanup"]
    assert job.service_states() == {"a": "backoff"}
    assert job.at(10.5) == ["run_hook a build"]
    job.ready("a")
    assert job.state.services["a"].incarnation == 2
    assert job.service_states() == {"a": "ready"}
    assert not job.state.is_failed


def test_an_unhealthy_service_without_restart_fails_the_job() -> None:
    """With restart="never" tasks are cancelled, and the service gets its stop and cleanup last."""
    job = Job(service("a", health_interval_s=5.0))
    job.hooks["a"] = WATCHED
    job.run().at(5.0)
    assert job.end("a", "health", error=OSError("gone")) == ["cancel_task t"]
    assert job.state.job is JobState.FAILING
    assert job.service_states() == {"a": "degraded"}
    assert job.post(TaskEnded("t", TaskState.CANCELLED)) == ["run_hook a drain"]
    assert job.gone("a") == ["run_hook a stop", "run_hook a cleanup", "seal"]
    assert job.state.is_failed


def test_an_unhealthy_service_that_is_not_required_stays_down() -> None:
    """Its calls fail at once and the job goes on."""
    job = Job(service("a", health_interval_s=5.0, required=False))
    job.hooks["a"] = WATCHED
    job.run().at(5.0)
    assert job.end("a", "health", False) == ["run_hook a drain"]
    assert Action(ActionKind.REFUSE_CALLS, "a") in job.actions
    job.gone("a")
    assert job.service_states() == {"a": "failed"}
    assert job.state.job is JobState.RUNNING


def test_health_that_hangs_counts_as_unhealthy() -> None:
    """The check is abandoned after its interval and the service is restarted."""
    job = Job(service("a", health_interval_s=5.0, restart="always"))
    job.hooks["a"] = WATCHED
    job.run().at(5.0)
    assert job.at(10.0) == ["abandon_hook a health", "hold_calls a", "run_hook a drain"]
    assert job.seen_failures() == [("late_health", "a", "health")]


@pytest.mark.parametrize(("is_process", "state"), [(False, "abandoned"), (True, "killed")])
def test_health_that_hangs_leaves_a_thread_or_costs_the_process(is_process: bool, state: str) -> None:
    """The check still runs when the service has been cleaned up, which the report must not hide."""
    job = Job((process if is_process else service)("a", health_interval_s=5.0))
    job.hooks["a"] = WATCHED
    job.run().at(5.0)
    job.at(10.0)
    job.post(TaskEnded("t", TaskState.CANCELLED))
    job.gone("a")
    if is_process:
        job.end("a", "exit", Exit(0))
    assert job.service_states() == {"a": state}
    assert job.state.is_failed


def test_health_that_hangs_while_the_job_stops_is_named_and_does_not_hold_it_up() -> None:
    """A probe from before the stop is bounded like a hook of it, however long its own interval is."""
    job = Job(service("a", health_interval_s=500.0))
    job.hooks["a"] = WATCHED
    job.run().at(500.0)
    assert job.post(TaskEnded("t", TaskState.DONE)) == []
    assert job.at(510.0) == ["abandon_hook a health", "run_hook a drain"]
    job.gone("a")
    assert job.service_states() == {"a": "abandoned"}
    assert job.seen_failures() == [("late_hook", "a", "health")]
    assert not job.state.is_failed


def test_no_restart_begins_after_stopping_began() -> None:
    """A service that waits for its restart stays down, and the calls that wait for it fail at once."""
    job = Job(service("a", restart="on_failure", health_interval_s=5.0))
    job.hooks["a"] = WATCHED
    job.run().at(5.0)
    job.end("a", "health", False)
    job.gone("a")
    before = len(job.actions)
    assert job.post(StopRequested(StopMode.DRAIN)) == ["stop_task t"]
    assert Action(ActionKind.REFUSE_CALLS, "a") in job.actions[before:]
    assert "run_hook a build" not in job.at(8.0)
    assert job.post(TaskEnded("t", TaskState.DONE)) == ["seal"]
    assert job.service_states() == {"a": "stopped"}


def test_ready_is_not_asked_again_after_stopping_began() -> None:
    """The second start of a service is given up when the job stops."""
    job = Job(service("a", restart="on_failure", health_interval_s=5.0))
    job.hooks["a"] = WATCHED | {"ready"}
    job.run().at(5.0)
    job.end("a", "health", False)
    job.gone("a")
    job.at(6.0)
    for hook in ("build", "setup", "start"):
        job.end("a", hook)
    job.end("a", "ready", False)
    job.post(StopRequested(StopMode.CANCEL))
    assert job.at(8.0) == []
    assert job.post(TaskEnded("t", TaskState.DONE)) == ["run_hook a cleanup"]


# --- stop -------------------------------------------------------------------------------------------------------------


def test_the_end_of_the_sources_stops_services_in_strict_reverse() -> None:
    """With no dependencies declared, the last registered ends first, one after the other."""
    job = Job(service("a"), service("b")).stopping()
    assert job.service_states() == {"a": "ready", "b": "draining"}
    assert job.gone("b") == ["run_hook b stop", "run_hook b cleanup", "run_hook a drain"]
    assert job.gone("a") == ["run_hook a stop", "run_hook a cleanup", "seal"]
    assert job.state.ended_by is None
    assert job.state.job is JobState.SEALED


def test_with_dependencies_declared_services_of_one_level_stop_side_by_side() -> None:
    """Ten services that hang cost one bound and not ten; what they need waits for all of them."""
    job = Job(service("base"), service("a", "base"), service("b", "base")).stopping()
    assert job.service_states() == {"base": "ready", "a": "draining", "b": "draining"}
    job.gone("a")
    assert job.service_states()["base"] == "ready"
    assert job.gone("b")[-1] == "run_hook base drain"


def test_replicas_stop_side_by_side_where_other_services_stop_one_after_the_other() -> None:
    job = Job(service("a"), *replicated("b", 2), service("c")).stopping()
    assert job.service_states() == {"a": "ready", "b[1]": "ready", "b[2]": "ready", "b": "ready", "c": "draining"}
    assert job.gone("c")[-1] == "run_hook b drain"
    assert job.gone("b")[-2:] == ["run_hook b[2] drain", "run_hook b[1] drain"]
    assert job.gone("b[1]") == ["run_hook b[1] stop", "run_hook b[1] cleanup"]
    assert job.gone("b[2]")[-1] == "run_hook a drain"
    assert job.gone("a")[-1] == "seal"


def test_a_dependency_that_was_only_seen_counts_at_the_stop() -> None:
    """The service that is called outlives its caller, though it was registered after it."""
    job = Job(service("a"), service("b")).run()
    job.post(DependencySeen("a", "b"), TaskEnded("t", TaskState.DONE))
    assert job.service_states() == {"a": "draining", "b": "ready"}
    assert job.gone("a")[-1] == "run_hook b drain"
    assert job.gone("b")[-1] == "seal"


def test_services_that_call_each_other_do_not_wait_for_each_other() -> None:
    """A circle that is seen only while the job runs does not keep the stop from ending."""
    job = Job(service("a"), service("b", "a")).run()
    job.post(DependencySeen("a", "b"), DependencySeen("a", "a"), TaskEnded("t", TaskState.DONE))
    assert job.gone("b", "a")[-1] == "seal"


@pytest.mark.parametrize("hook", ["stop", "cleanup"])
def test_a_hook_that_raises_keeps_nothing_else_from_being_cleaned(hook: str) -> None:
    """Cleanup follows a stop that raised, the others follow, and the job is not failed by it."""
    error = SystemExit(3)
    job = Job(service("a"), service("b")).stopping()
    for each in ("drain", "stop", "cleanup"):
        job.end("b", each, error=error if each == hook else None)
    assert job.gone("a")[-1] == "seal"
    assert job.hook_order[-6:] == ["b.drain", "b.stop", "b.cleanup", "a.drain", "a.stop", "a.cleanup"]
    assert job.service_states() == {"a": "stopped", "b": "cleanup_failed"}
    assert job.state.failures == (Failure(FailureKind.HOOK, "b", hook, error),)
    assert not job.state.is_failed


@pytest.mark.parametrize("hook", ["stop", "cleanup"])
def test_a_hook_that_hangs_is_abandoned_after_its_bound(hook: str) -> None:
    """The service is named, its cleanup is still tried, and the others are cleaned."""
    job = Job(service("a"), service("b", stop_timeout_s=10.0)).stopping()
    job.end("b", "drain")
    if hook == "cleanup":
        job.end("b", "stop")
    assert job.at(9.9) == []
    assert job.at(10.0)[0] == f"abandon_hook b {hook}"
    job.gone("b")
    assert job.gone("a")[-1] == "seal"
    assert job.service_states() == {"a": "stopped", "b": "abandoned"}
    assert job.seen_failures() == [("late_hook", "b", hook)]


def test_calls_that_outlast_the_drain_are_named_and_stop_follows() -> None:
    """`stop` waits for running calls, but not longer than `drain_timeout_s`."""
    job = Job(service("a", drain_timeout_s=5.0)).stopping()
    assert job.state.services["a"].due == 6.0
    assert job.end("a", "drain", False) == ["run_hook a stop"]
    assert job.seen_failures() == [("late_calls", "a", "drain")]


def test_drain_lets_what_is_in_flight_arrive() -> None:
    """Only sources are told to stop, and pipelines that answer requests end after the others."""
    tasks = (
        TaskPlan("source", ("sink",), takes_stop=True),
        TaskPlan("sink"),
        TaskPlan("requests", takes_stop=True, serving=True),
    )
    job = Job(tasks=tasks).run()
    assert job.post(StopRequested(StopMode.DRAIN)) == ["stop_task source"]
    assert job.post(TaskEnded("source", TaskState.DONE)) == []
    assert job.post(TaskEnded("sink", TaskState.DONE)) == ["stop_task requests"]
    assert job.post(TaskEnded("requests", TaskState.DONE)) == ["seal"]
    assert job.state.ended_by is StopMode.DRAIN


def test_a_drain_that_takes_too_long_becomes_a_cancel_and_then_gives_up() -> None:
    """Draining is bounded, and so is the time that a task has to leave user code."""
    job = Job(service("a")).run()
    job.post(StopRequested(StopMode.DRAIN))
    assert job.state.drain_due == 27.0
    assert job.at(26.9) == []
    assert job.at(27.0) == ["cancel_task t"]
    assert job.at(36.0) == ["abandon_task t", "run_hook a drain"]
    assert job.state.tasks["t"].state is TaskState.ABANDONED
    assert job.seen_failures() == [("late_task", "t", "")]


def test_services_have_their_reserve_of_the_budget() -> None:
    """40 % of the budget and at least 5 s are for services, also when every task hangs."""
    for budget_s, tasks_s in [(60.0, 36.0), (25.0, 15.0), (10.0, 5.0), (3.0, 0.0)]:
        job = Job(service("a")).run()
        job.post(StopRequested(StopMode.CANCEL, budget_s))
        assert (job.state.deadline, job.state.tasks_due) == (budget_s, tasks_s)
    without = Job().run()
    without.post(StopRequested(StopMode.CANCEL))
    assert without.state.tasks_due == 60.0


def test_many_services_that_hang_end_within_the_budget() -> None:
    """Each leaves something to those after it, so that every one gets its stop and its cleanup."""
    job = Job(*(service(f"s{number}") for number in range(8))).run()
    job.post(StopRequested(StopMode.CANCEL, 25.0), TaskEnded("t", TaskState.CANCELLED))
    job.at(100.0)
    assert job.state.job is JobState.SEALED
    assert [hook for hook in job.hook_order if hook.endswith("cleanup")] == [f"s{n}.cleanup" for n in range(7, -1, -1)]
    seals = [action for action in job.actions if action.do is ActionKind.SEAL]
    assert len(seals) == 1


def test_the_deadline_only_moves_forward() -> None:
    """A second request shortens the stop and never lengthens it; a weaker one changes nothing."""
    job = Job(service("a")).run()
    job.post(StopRequested(StopMode.DRAIN, 25.0))
    job.now = 1.0
    job.post(StopRequested(StopMode.CANCEL, 60.0))
    assert job.state.deadline == 25.0
    job.post(StopRequested(StopMode.DRAIN, 1.0))
    assert (job.state.deadline, job.state.ended_by) == (25.0, StopMode.CANCEL)


def test_an_impatient_stop_bounds_every_hook() -> None:
    """After the second Ctrl-C each hook has `hook_cap_s`."""
    job = Job(service("a", stop_timeout_s=50.0)).run()
    job.post(StopRequested(StopMode.CANCEL, hook_cap_s=5.0), TaskEnded("t", TaskState.CANCELLED))
    job.end("a", "drain")
    assert job.at(5.0) == ["abandon_hook a stop", "run_hook a cleanup"]
    assert job.at(10.0) == ["abandon_hook a cleanup", "seal"]


def test_an_impatient_stop_during_the_start_skips_the_tasks_once() -> None:
    """A task that was never opened is not waited for, let alone abandoned later."""
    job = Job(service("a"))
    job.post(Begin())
    job.post(StopRequested(StopMode.CANCEL, hook_cap_s=5.0))
    job.at(100.0)
    assert job.state.tasks["t"].state is TaskState.SKIPPED
    assert job.state.job is JobState.SEALED


def test_kill_gives_up_on_everything_and_still_seals() -> None:
    """The third Ctrl-C waits for nothing; the report names what was abandoned."""
    job = Job(service("a"), service("b")).run()
    done = job.post(StopRequested(StopMode.KILL))
    assert done == ["abandon_task t", "abandon_hook a stop", "abandon_hook b stop", "seal"]
    assert job.service_states() == {"a": "abandoned", "b": "abandoned"}


@pytest.mark.parametrize("way", list(StopMode))
@pytest.mark.parametrize("moment", ["new", "starting", "ready", "opening", "running", "draining", "services", "sealed"])
def test_a_stop_is_right_at_any_moment(moment: str, way: StopMode) -> None:
    """Whenever it comes, the job ends, once, and later events change nothing."""
    job = Job(service("a"), service("b", "a"))
    moments: list[tuple[str, list[LifecycleEvent]]] = [("starting", [Begin()])]
    if moment != "new":
        job.post(*moments[0][1])
    if moment not in ("new", "starting"):
        job.ready("a", "b")
    if moment not in ("new", "starting", "ready"):
        job.post(TaskOpened("t") if moment != "opening" else Tick())
    if moment == "draining":
        job.post(StopRequested(StopMode.DRAIN))
    if moment in ("services", "sealed"):
        job.post(TaskEnded("t", TaskState.DONE))
    if moment == "sealed":
        job.gone("b", "a")
    job.post(StopRequested(way))
    job.post(Begin())
    job.at(200.0)
    assert job.state.job is JobState.SEALED
    assert [action.do for action in job.actions].count(ActionKind.SEAL) == 1
    sealed = job.state
    job.post(StopRequested(StopMode.KILL), Tick(), Begin(), HookEnded("a", 1, "stop"), TaskEnded("t", TaskState.DONE))
    assert job.state is sealed


def test_a_cancel_during_the_start_waits_for_the_hook_and_cleans() -> None:
    """A hook that runs is let end, the next does not begin, and what was built gets its cleanup."""
    job = Job(service("a"), service("b", "a"))
    job.post(Begin())
    job.end("a", "build")
    assert job.post(StopRequested(StopMode.CANCEL)) == []
    assert job.end("a", "setup") == ["run_hook a cleanup"]
    assert job.end("a", "cleanup") == ["seal"]
    assert job.service_states() == {"a": "stopped", "b": "skipped"}


def test_a_start_hook_that_hangs_is_bounded_by_the_stop() -> None:
    """A start that may take an hour does not make the stop take one."""
    job = Job(service("a", start_timeout_s=3600.0, stop_timeout_s=10.0))
    job.post(Begin())
    job.post(StopRequested(StopMode.CANCEL))
    assert job.at(10.0) == ["abandon_hook a build", "seal"]
    assert not job.state.is_failed


# --- tasks ------------------------------------------------------------------------------------------------------------


def test_a_failing_task_cancels_the_others_and_then_services_end() -> None:
    """The first failure cancels, a second one is kept beside it."""
    job = Job(service("a"), tasks=(TaskPlan("t"), TaskPlan("u"))).run()
    assert job.post(TaskFailed("t", ValueError("t"))) == ["cancel_task t", "cancel_task u"]
    assert job.post(TaskFailed("u", KeyError("u")), TaskEnded("t", TaskState.FAILED)) == []
    assert job.post(TaskEnded("u", TaskState.FAILED)) == ["run_hook a drain"]
    assert job.gone("a")[-1] == "seal"
    assert job.seen_failures() == [("task", "t", ""), ("task", "u", "")]


def test_a_close_that_hangs_is_bounded_each() -> None:
    """Each function's `close` has its own bound, also when nothing else ends the job."""
    job = Job(close_timeout_s=10.0).run()
    job.post(TaskClosing("t"))
    job.at(9.0)
    job.post(TaskClosing("t"))
    assert job.at(18.9) == []
    assert job.at(19.0) == ["abandon_task t", "seal"]


def test_a_failing_close_is_a_failure_of_its_own_kind() -> None:
    """It fails the job and names the operator."""
    job = Job().run()
    job.post(TaskClosing("t"), TaskFailed("t", OSError("disk"), closing="sink"), TaskEnded("t", TaskState.FAILED))
    assert job.seen_failures() == [("close", "t", "sink")]
    assert job.state.is_failed


def test_a_job_without_tasks_or_services_seals_at_once() -> None:
    """Nothing to wait for means not to wait."""
    assert Job(tasks=()).post(Begin()) == ["seal"]


# --- kept and adopted services ----------------------------------------------------------------------------------------


def test_a_kept_service_is_left_as_it_is() -> None:
    """No hook runs at the end of the job; the next job adopts it ready, without a second start."""
    job = Job(service("a", keep=True), service("b"))
    job.stopping()
    assert job.gone("b")[-1] == "seal"
    assert job.service_states() == {"a": "kept", "b": "stopped"}
    next_job = Job(service("a", adopted=ALL))
    assert next_job.post(Begin()) == ["open_task t"]
    next_job.post(TaskOpened("t"), TaskEnded("t", TaskState.DONE))
    assert next_job.gone("a") == ["run_hook a stop", "run_hook a cleanup", "seal"]


def test_an_adopted_service_is_watched_and_restarted_like_others() -> None:
    """Its health is asked for in the new job, and a restart is its second incarnation."""
    job = Job(service("a", adopted=WATCHED, restart="on_failure", health_interval_s=5.0, backoff_s=(0.1, 1.0)))
    job.hooks["a"] = WATCHED
    job.run()
    assert job.at(5.0) == ["run_hook a health"]
    job.end("a", "health", False)
    job.gone("a")
    assert job.at(6.0) == ["run_hook a build"]
    assert job.state.services["a"].incarnation == 2


def test_an_unhealthy_kept_service_is_cleaned_and_not_kept() -> None:
    """What failed is not handed to the next job."""
    job = Job(service("a", keep=True, health_interval_s=5.0))
    job.hooks["a"] = WATCHED
    job.run().at(5.0)
    job.end("a", "health", False)
    job.post(TaskEnded("t", TaskState.CANCELLED))
    assert job.gone("a") == ["run_hook a stop", "run_hook a cleanup", "seal"]


def test_what_an_abandoned_hook_says_later_counts_for_nothing() -> None:
    """An answer belongs to one hook of one incarnation."""
    job = Job(service("a")).stopping()
    job.end("a", "drain")
    job.at(10.0)
    before = job.state
    assert job.end("a", "stop") == []
    assert job.post(HookEnded("a", 7, "cleanup")) == []
    assert job.state.services == before.services
    assert job.end("a", "cleanup") == ["seal"]


# --- processes --------------------------------------------------------------------------------------------------------


def test_the_process_ends_last() -> None:
    job = Job(process("a")).stopping()
    job.gone("a")
    assert job.hook_order[-4:] == ["a.drain", "a.stop", "a.cleanup", "a.exit"]
    assert job.end("a", "exit", Exit(0)) == ["seal"]
    assert (job.service_states(), job.seen_failures()) == ({"a": "stopped"}, [])


@pytest.mark.parametrize(
    ("value", "failures"),
    [(Exit(-9, was_killed=True), [("killed", "a", "exit")]), (Exit(0, left=("pid 7",)), [("killed", "a", "exit")])],
)
def test_a_process_that_had_to_be_killed_is_named(value: Exit, failures: list[tuple[str, str, str]]) -> None:
    job = Job(process("a")).stopping()
    job.gone("a")
    job.end("a", "exit", value)
    assert (job.service_states(), job.seen_failures()) == ({"a": "killed"}, failures)


@pytest.mark.parametrize("hook", ["stop", "cleanup"])
def test_a_hook_that_hangs_in_a_process_ends_with_the_process(hook: str) -> None:
    """With a process there is a way out, and nothing is left behind."""
    job = Job(process("a", stop_timeout_s=2.0)).stopping()
    while job.state.services["a"].hook != hook:
        job.end("a", str(job.state.services["a"].hook))
    assert job.at(job.now + 2.0)[0] == f"abandon_hook a {hook}"
    job.gone("a")
    job.end("a", "exit", Exit(-9, was_killed=True))
    assert (job.service_states(), job.seen_failures()) == ({"a": "killed"}, [("late_hook", "a", hook)])


@pytest.mark.parametrize("value", [RuntimeError("no"), None])
def test_an_exit_that_says_nothing_of_the_process_is_given_up(value: RuntimeError | None) -> None:
    job = Job(process("a", kill_grace_s=3.0)).stopping()
    job.gone("a")
    done = job.end("a", "exit", error=value) if value is not None else job.at(job.now + 3.0 + EXIT_NET_S)
    assert done[-1] == "seal"
    assert job.service_states() == {"a": "abandoned"}


def test_an_exit_that_its_host_bounds_is_given_up_after_the_time_that_the_host_needs() -> None:
    job = Job(replace(process("a", kill_grace_s=3.0), exit_net_s=30.0)).stopping()
    job.gone("a")
    assert job.at(job.now + 3.0 + EXIT_NET_S) == []
    job.end("a", "exit", Exit(0))
    assert job.service_states() == {"a": "stopped"}


@pytest.mark.parametrize("hook", ["build", "setup", "start"])
def test_a_start_that_fails_ends_its_process(hook: str) -> None:
    job = Job(process("a"))
    job.post(Begin())
    for earlier in ("build", "setup", "start"):
        if earlier == hook:
            break
        job.end("a", earlier)
    job.end("a", hook, error=RuntimeError("no"))
    job.gone("a")
    assert job.state.services["a"].hook == "exit"
    job.end("a", "exit", Exit(0))
    assert job.service_states() == {"a": "failed_start"}
    assert [order for order in job.hook_order if "cleanup" in order] == ([] if hook == "build" else ["a.cleanup"])


def test_a_start_that_hangs_in_a_process_is_tried_again() -> None:
    job = Job(process("a", start_timeout_s=1.0, restart="on_failure"))
    job.post(Begin())
    assert job.at(1.0) == ["abandon_hook a build", "run_hook a exit"]
    job.end("a", "exit", Exit(-9, was_killed=True))
    assert job.at(1.1) == ["run_hook a build"]
    assert not job.state.is_failed


@pytest.mark.parametrize("hook", ["build", "setup", "start"])
def test_a_death_during_the_start_is_a_failing_start(hook: str) -> None:
    job = Job(process("a"))
    job.post(Begin())
    for earlier in ("build", "setup", "start"):
        if earlier == hook:
            break
        job.end("a", earlier)
    assert job.post(ServiceDied("a", 1, "exit code 3"))[:2] == [f"lose_hook a {hook}", "run_hook a exit"]
    job.end("a", "exit", Exit(3))
    assert (job.service_states(), job.seen_failures()) == ({"a": "lost"}, [("died", "a", "")])
    assert job.state.is_failed


def test_a_death_fails_the_job_and_no_hook_but_exit_runs() -> None:
    job = Job(process("a")).run()
    assert job.post(ServiceDied("a", 1, "exit code 3")) == ["cancel_task t"]
    assert job.post(TaskEnded("t", TaskState.CANCELLED)) == ["run_hook a exit"]
    assert job.end("a", "exit", Exit(3)) == ["seal"]
    assert job.service_states() == {"a": "lost"}


def test_a_task_that_failed_by_the_death_of_a_service_is_no_second_failure() -> None:
    job = Job(process("a")).run()
    job.post(ServiceDied("a", 1, "exit code 3"))
    gone = ServiceUnavailableError("gone", service="a")
    failed = FunctionError("the function failed")
    failed.__cause__ = gone
    job.post(TaskFailed("t", failed))
    assert job.seen_failures() == [("died", "a", "")]
    assert job.state.failures[0].caused == (failed,)
    other = FunctionError("the function failed")
    other.__cause__ = ServiceUnavailableError("stopped", service="b")
    job.post(TaskFailed("t", other))
    assert job.seen_failures()[1:] == [("task", "t", "")]


def test_an_error_that_is_its_own_cause_is_looked_at_once() -> None:
    job = Job(process("a")).run()
    job.post(ServiceDied("a", 1, "exit code 3"))
    failed = FunctionError("raised from itself")
    failed.__cause__ = failed
    job.post(TaskFailed("t", failed))
    assert job.seen_failures()[1:] == [("task", "t", "")]


@pytest.mark.parametrize("options", [{"restart": "on_failure"}, {"required": False}])
def test_a_task_that_fails_by_a_death_which_does_not_fail_the_job_does(options: dict[str, Any]) -> None:
    job = Job(process("a", **options)).run()
    job.post(ServiceDied("a", 1, "exit code 3"))
    job.post(TaskFailed("t", ServiceUnavailableError("gone", service="a")))
    assert job.seen_failures() == [("died", "a", ""), ("task", "t", "")]
    assert job.state.job is JobState.FAILING


def test_no_further_ready_begins_that_could_not_end_in_time() -> None:
    """One that ran at the very end would count as one that hangs."""
    job = Job(process("a", start_timeout_s=2.0))
    job.hooks["a"] = frozenset({"ready"})
    job.post(Begin())
    job.end("a", "build")
    job.now = 1.74
    job.end("a", "ready", False)
    assert job.at(1.8) == ["run_hook a ready"]
    job.end("a", "ready", False)
    assert job.at(1.99) == []
    assert job.at(2.0) == ["run_hook a exit"]
    assert job.seen_failures() == [("not_ready", "a", "ready")]
    job.end("a", "exit", Exit(0))
    assert job.service_states() == {"a": "failed_start"}


@pytest.mark.parametrize("hook", ["ready", "health"])
def test_what_hangs_here_beside_a_process_is_not_ended_with_it(hook: str) -> None:
    """The probe of a command runs on a thread of the driver, which is left behind."""
    plan = replace(process("a", start_timeout_s=1.0, health_interval_s=1.0), local_hooks=frozenset({hook}))
    job = Job(plan)
    job.hooks["a"] = frozenset({"ready", "health"})
    job.post(Begin())
    job.end("a", "build")
    if hook == "health":
        job.end("a", "ready", True)
        job.post(TaskOpened("t"))
        assert job.at(2.0) == ["run_hook a health", "abandon_hook a health", "cancel_task t"]
        job.post(TaskEnded("t", TaskState.CANCELLED))
        job.end("a", "drain")
    else:
        assert job.at(1.0) == ["abandon_hook a ready", "run_hook a exit"]
    job.end("a", "exit", Exit(0))
    assert job.service_states() == {"a": "abandoned"}


def test_a_service_that_died_is_restarted_while_its_calls_wait() -> None:
    job = Job(process("a", restart="on_failure")).run()
    assert job.post(ServiceDied("a", 1, "exit code 3")) == ["hold_calls a", "run_hook a exit"]
    job.end("a", "exit", Exit(3))
    assert job.at(0.1) == ["run_hook a build"]
    job.ready("a")
    assert job.post(ServiceDied("a", 1, "said twice")) == []
    assert (job.service_states(), job.state.is_failed) == ({"a": "ready"}, False)


def test_the_job_goes_on_without_an_optional_service_that_died() -> None:
    job = Job(process("a", required=False)).run()
    job.post(ServiceDied("a", 1, "exit code 3"))
    job.end("a", "exit", Exit(3))
    assert (job.service_states(), job.state.job) == ({"a": "lost"}, JobState.RUNNING)


@pytest.mark.parametrize("hook", ["drain", "stop", "cleanup"])
def test_a_death_while_it_is_stopped_does_not_fail_the_job(hook: str) -> None:
    job = Job(process("a")).stopping()
    while job.state.services["a"].hook != hook:
        job.end("a", str(job.state.services["a"].hook))
    assert job.post(ServiceDied("a", 1, "signal 9")) == [f"lose_hook a {hook}", "run_hook a exit"]
    job.end("a", "exit", Exit(-9))
    assert (job.service_states(), job.seen_failures()) == ({"a": "lost"}, [("lost", "a", "")])
    assert not job.state.is_failed


def test_no_hook_runs_after_a_death_whatever_was_known_of_the_service_before() -> None:
    job = Job(service("a", health_interval_s=1.0))
    job.hooks["a"] = WATCHED
    job.run()
    assert job.at(1.0) == ["run_hook a health"]
    job.post(StopRequested(StopMode.DRAIN))
    assert job.at(2.0) == ["abandon_hook a health"]
    job.post(ServiceDied("a", 1, "exit code 3"))
    assert [line for line in job.post(TaskEnded("t", TaskState.DONE)) if line.startswith("run_hook")] == []
    assert job.state.job is JobState.SEALED


def test_a_needed_service_that_dies_while_the_job_drains_fails_it() -> None:
    job = Job(process("a")).run()
    job.post(StopRequested(StopMode.DRAIN))
    assert job.post(ServiceDied("a", 1, "exit code 3")) == ["cancel_task t"]
    assert job.state.job is JobState.FAILING


def test_an_instance_that_died_before_the_job_took_it_over_is_known_at_its_begin() -> None:
    job = Job(process("a", adopted=ALL | {"exit"}, restart="on_failure"))
    assert job.post(ServiceDied("a", 1, "exit code 3")) == []
    assert job.post(Begin()) == ["hold_calls a", "run_hook a exit"]
    job.end("a", "exit", Exit(3))
    assert job.at(0.1) == ["run_hook a build"]


def test_kill_ends_processes_at_once_and_waits_for_them() -> None:
    """The third Ctrl-C leaves no process behind."""
    job = Job(process("a"), service("b")).run()
    done = job.post(StopRequested(StopMode.KILL))
    assert done == ["abandon_task t", "abandon_hook a stop", "run_hook a exit", "abandon_hook b stop"]
    assert job.actions[-1].do is not ActionKind.SEAL
    assert next(action.due for action in job.actions if action.hook == "exit") == job.now + 2.0
    assert job.end("a", "exit", Exit(-9, was_killed=True)) == ["seal"]
    assert job.service_states() == {"a": "killed", "b": "abandoned"}


def test_an_exit_that_runs_is_hurried_by_a_kill_and_never_by_more_than_the_budget() -> None:
    job = Job(process("a", kill_grace_s=30.0)).stopping()
    job.gone("a")
    assert job.post(StopRequested(StopMode.KILL)) == ["hurry_exit a exit"]
    assert job.actions[-1].due == job.now + 2.0
    assert job.at(job.now + 2.0 + EXIT_NET_S) == ["abandon_hook a exit", "seal"]


def test_late_hooks_leave_the_exit_its_part_of_the_budget() -> None:
    job = Job(process("a", stop_timeout_s=100.0), process("b", stop_timeout_s=100.0), stop_timeout_s=10.0).run()
    job.post(StopRequested(StopMode.CANCEL))
    job.post(TaskEnded("t", TaskState.CANCELLED))
    for name in ("b", "a"):
        job.end(name, "drain")
        while job.state.services[name].hook != "exit":
            assert job.state.next_due is not None
            job.at(job.state.next_due)
        due = next(action.due for action in reversed(job.actions) if action.hook == "exit")
        assert due is not None
        assert job.now < due <= 10.0
        job.now = due  # a host ends the process in time
        job.end(name, "exit", Exit(-9, was_killed=True))
    assert job.state.job is JobState.SEALED


def test_a_hook_may_take_longer_if_it_asks_up_to_a_limit() -> None:
    job = Job(service("a", start_timeout_s=10.0))
    job.post(Begin())
    job.post(*[ExtendTimeout("a", 1, 50.0)] * 3)
    assert job.state.services["a"].due == 70.0
    job.now = 65.0
    job.end("a", "build")
    assert job.state.services["a"].due == 70.0
    assert job.at(70.0)[0] == "abandon_hook a setup"


def test_more_time_for_a_hook_is_never_more_than_the_budget() -> None:
    job = Job(service("a"), stop_timeout_s=20.0).stopping()
    job.end("a", "drain")
    job.post(ExtendTimeout("a", 1, 60.0), ExtendTimeout("a", 2, 60.0))
    assert job.state.services["a"].due == 20.0


def test_what_was_deferred_is_a_cleanup_of_a_service_that_was_not_built() -> None:
    job = Job(service("a"))
    job.post(Begin())
    job.post(CleanupDeferred("a", 1))
    assert job.end("a", "build", error=RuntimeError("half way")) == ["run_hook a cleanup"]


def test_a_drain_of_the_service_that_hangs_is_abandoned() -> None:
    job = Job(service("a", drain_timeout_s=2.0))
    job.hooks["a"] = ALL | {"drain"}
    job.stopping()
    assert job.at(3.0) == ["abandon_hook a drain", "run_hook a stop"]
    job.gone("a")
    assert (job.service_states(), job.seen_failures()) == ({"a": "abandoned"}, [("late_hook", "a", "drain")])


def test_a_job_without_tasks_goes_on_until_it_is_asked_to_end() -> None:
    job = Job(service("a"), tasks=())
    job.state = begin((service("a"),), (), Limits(), until_asked=True)
    job.run()
    assert job.post(StopRequested(StopMode.DRAIN)) == ["run_hook a drain"]


def test_a_death_during_the_exit_is_the_exit() -> None:
    """The process that is asked to end does so: its death is no failure, and the answer of "exit" says how it ended."""
    job = Job(process("a")).stopping()
    job.gone("a")
    assert job.state.services["a"].hook == "exit"
    assert job.post(ServiceDied("a", 1, "exit code 0")) == []
    assert job.end("a", "exit", Exit(0)) == ["seal"]
    assert (job.service_states(), job.seen_failures()) == ({"a": "stopped"}, [])


def test_the_last_service_leaves_its_own_exit_some_time() -> None:
    job = Job(process("a", stop_timeout_s=100.0), stop_timeout_s=10.0).run()
    job.post(StopRequested(StopMode.CANCEL), TaskEnded("t", TaskState.CANCELLED))
    job.end("a", "drain")
    job.end("a", "stop")
    assert job.state.services["a"].hook == "cleanup"
    assert job.state.services["a"].due == 9.0


# --- services that fail without a process, as those of another job do ------------------------------------------------


def test_a_service_that_fails_while_it_starts_fails_the_start() -> None:
    job = Job(service("a"))
    job.post(Begin())
    assert job.post(ServiceFailed("a", 1, "its owner gave up")) == ["seal"]
    assert (job.service_states(), job.seen_failures()) == ({"a": "failed_start"}, [("failed", "a", "")])
    assert job.state.failures[0].text == "its owner gave up"


def test_calls_of_a_service_that_failed_are_refused_and_those_of_an_unhealthy_one_are_not() -> None:
    """One that is unhealthy still answers, and tasks that are cancelled may need it to end."""
    failed = Job(service("a")).run()
    assert failed.post(ServiceFailed("a", 1, "its owner gave up")) == ["cancel_task t"]
    assert Action(ActionKind.REFUSE_CALLS, "a") in failed.actions
    unhealthy = Job(service("a", health_interval_s=5.0))
    unhealthy.hooks["a"] = WATCHED
    unhealthy.run().at(5.0)
    assert unhealthy.end("a", "health", False) == ["cancel_task t"]
    assert Action(ActionKind.REFUSE_CALLS, "a") not in unhealthy.actions


def test_a_failure_while_the_service_ends_changes_nothing() -> None:
    job = Job(service("a")).stopping()
    assert job.post(ServiceFailed("a", 1, "its owner gave up")) == []
    assert job.gone("a")[-1] == "seal"
    assert (job.service_states(), job.seen_failures()) == ({"a": "stopped"}, [])


def test_a_task_that_fails_because_of_an_unhealthy_service_is_a_second_failure() -> None:
    job = Job(service("a", health_interval_s=5.0))
    job.hooks["a"] = WATCHED
    job.run().at(5.0)
    job.end("a", "health", False)
    job.post(TaskFailed("t", ServiceUnavailableError("gone", service="a")))
    assert job.seen_failures() == [("unhealthy", "a", "health"), ("task", "t", "")]


def test_a_start_that_hangs_on_a_thread_is_not_tried_again_and_fails_the_job_at_once() -> None:
    """A second instance would stand beside the first, of which the thread is still inside."""
    job = Job(service("a", start_timeout_s=3.0, restart="on_failure"))
    job.post(Begin())
    job.end("a", "build")
    assert job.at(3.0) == ["abandon_hook a setup", "run_hook a cleanup"]
    assert job.state.job is JobState.STOPPING_SERVICES
    assert job.end("a", "cleanup") == ["seal"]
    assert job.seen_failures() == [("not_ready", "a", "setup")]


def test_a_process_that_was_ended_for_its_late_start_is_told_once() -> None:
    job = Job(process("a", start_timeout_s=1.0, restart="on_failure"))
    job.post(Begin())
    job.at(1.0)
    job.end("a", "exit", Exit(-9, was_killed=True))
    assert job.seen_failures() == [("not_ready", "a", "build")]


def test_what_a_process_left_behind_is_told_beside_the_hook_that_was_late() -> None:
    job = Job(process("a", stop_timeout_s=2.0)).stopping()
    job.end("a", "drain")
    job.at(2.0)
    job.gone("a")
    job.end("a", "exit", Exit(-9, was_killed=True, left=("process 7 cannot be ended",)))
    assert job.seen_failures() == [("late_hook", "a", "stop"), ("killed", "a", "exit")]
    assert job.state.failures[1].text == "process 7 cannot be ended"


def test_an_end_that_nobody_could_see_is_a_failure_of_the_cleanup() -> None:
    job = Job(process("a")).stopping()
    job.gone("a")
    job.end("a", "exit", Exit(None, unknown="nobody knows"))
    assert (job.service_states(), job.seen_failures()) == ({"a": "cleanup_failed"}, [("hook", "a", "exit")])


@pytest.mark.parametrize(("keeps", "state"), [(True, "kept"), (False, "stopped")])
def test_a_service_is_kept_only_with_those_that_it_needs(keeps: bool, state: str) -> None:
    job = Job(service("a", keep=keeps), service("b", "a", keep=True)).stopping()
    job.gone("b", "a")
    assert job.service_states() == {"a": state, "b": state}


def test_a_dependency_that_is_seen_while_a_probe_holds_up_the_stop_makes_room_for_the_caller() -> None:
    job = Job(service("a"), service("b", health_interval_s=5.0))
    job.hooks["b"] = WATCHED
    job.run().at(5.0)
    assert job.post(TaskEnded("t", TaskState.DONE)) == []
    assert job.post(DependencySeen("a", "b")) == ["run_hook a drain"]
