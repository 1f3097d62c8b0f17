"""Tasks that start again, as a pure function: when, how often, and what ends it."""

from __future__ import annotations

from dataclasses import replace

import pytest
from runtime.test_lifecycle import Job as PlainJob
from runtime.test_lifecycle import service

from sage._runtime.lifecycle import (
    Begin,
    FailureKind,
    ServiceDied,
    ServicePlan,
    StopRequested,
    TaskClosing,
    TaskEnded,
    TaskFailed,
    TaskOpened,
    TaskPlan,
    TasksRenewed,
)
from sage._runtime.states import JobState, StopMode, TaskState
from sage._runtime.task_restarts import SETBACKS_MAX, TaskRestarts
from sage.durable import Restart

TASKS = (TaskPlan("source", ("sink",), takes_stop=True), TaskPlan("sink"))
MODEL = service("model")
FAULT = ValueError("a fault")


class Job(PlainJob):
    """A job with two tasks that runs, and may start them again twice within 10 s."""

    def __init__(self, model: ServicePlan = MODEL, **limits: float) -> None:
        super().__init__(model, tasks=TASKS, **limits)
        self.state = replace(self.state, restarts=TaskRestarts(Restart(2, 10.0, (1.0, 4.0))))
        self.post(Begin())
        self.ready("model")
        self.open_tasks()

    def open_tasks(self) -> None:
        """Let the tasks open."""
        self.post(TaskOpened("sink"), TaskOpened("source"))
        assert self.state.job is JobState.RUNNING

    def fail(self, name: str = "source", error: BaseException = FAULT) -> list[str]:
        return self.post(TaskFailed(name, error))

    def end_tasks(self) -> list[str]:
        return self.post(TaskEnded("source", TaskState.FAILED), TaskEnded("sink", TaskState.CANCELLED))


def test_all_tasks_end_and_are_made_again_after_a_pause() -> None:
    job = Job()
    assert job.fail() == ["reset_task source", "reset_task sink"]
    assert job.state.job is JobState.RESTARTING
    assert job.state.next_due is not None
    assert job.end_tasks() == []
    assert job.at(0.9) == []
    assert job.at(1.0) == ["renew_tasks"]
    assert job.at(50.0) == []
    assert job.post(TasksRenewed()) == ["open_task sink"]
    assert str(job.state.job) == "starting"
    assert job.post(TaskOpened("sink")) == ["open_task source"]
    assert job.post(TaskOpened("source")) == ["run_task source", "run_task sink"]
    assert job.state.failures == ()
    assert [(one.task, one.number) for one in job.state.restarts.setbacks] == [("source", 1)]


def test_a_pause_that_is_over_before_the_tasks_have_ended_does_not_count_again() -> None:
    job = Job()
    job.fail()
    assert job.at(5.0) == []
    assert job.end_tasks() == ["renew_tasks"]


def restart(job: Job, at: float) -> None:
    job.at(at)
    job.fail()
    job.end_tasks()
    assert job.state.job is JobState.RESTARTING
    assert job.at(at + 4.0) == ["renew_tasks"]
    job.post(TasksRenewed())
    job.open_tasks()


def test_the_third_failure_within_the_window_fails_the_job() -> None:
    job = Job()
    restart(job, 0.0)
    restart(job, 4.0)
    job.at(9.0)
    assert job.fail() == ["cancel_task source", "cancel_task sink"]
    assert job.state.job is JobState.FAILING
    assert [(one.trouble, one.error) for one in job.state.failures] == [(FailureKind.TASK, FAULT)]


def test_a_restart_before_the_window_does_not_count() -> None:
    job = Job()
    for at in (0.0, 4.0, 12.0, 20.0, 30.0):
        restart(job, at)
    assert job.state.restarts.count == 5
    assert len(job.state.restarts.at) == 1  # only those that may still count


def test_the_error_of_a_task_is_let_go_with_the_task() -> None:
    job = Job()
    job.fail()
    assert [task for task, _ in job.state.restarts.causes] == ["source"]
    job.end_tasks()
    job.at(1.0)
    job.post(TasksRenewed())
    assert job.state.restarts.causes == ()


def test_only_the_last_failures_are_kept_for_the_report() -> None:
    job = Job()
    for number in range(SETBACKS_MAX + 2):
        restart(job, number * 20.0)
    assert [one.number for one in job.state.restarts.setbacks] == [*range(3, SETBACKS_MAX + 3)]
    assert job.state.restarts.count == SETBACKS_MAX + 2


def test_the_pause_doubles_with_those_that_count() -> None:
    job = Job()
    restart(job, 0.0)
    job.at(5.0)
    job.fail()
    job.end_tasks()
    assert job.at(6.9) == []
    assert job.at(7.0) == ["renew_tasks"]


def test_another_failure_of_the_same_tasks_belongs_to_the_same_restart() -> None:
    job = Job()
    job.fail()
    assert job.fail("sink") == []
    assert [(one.task, one.number) for one in job.state.restarts.setbacks] == [("source", 1), ("sink", 1)]
    assert job.state.restarts.count == 1


def test_a_task_that_does_not_open_starts_again_too() -> None:
    job = Job()
    restart(job, 0.0)
    job.fail()
    job.end_tasks()
    job.at(20.0)
    job.post(TasksRenewed())
    assert job.fail("sink") == ["reset_task sink"]
    assert job.state.tasks["source"].state is TaskState.SKIPPED
    assert job.state.job is JobState.RESTARTING


@pytest.mark.parametrize("error", [KeyboardInterrupt(), SystemExit(1)])
def test_an_interrupt_is_not_tried_again(error: BaseException) -> None:
    job = Job()
    job.fail(error=error)
    assert job.state.job is JobState.FAILING


def test_a_close_that_fails_leaves_something_behind_so_the_job_fails_with_both_errors() -> None:
    job = Job()
    job.fail()
    job.post(TaskFailed("sink", OSError(), closing="sink"))
    assert job.state.job is JobState.FAILING
    assert [one.trouble for one in job.state.failures] == [FailureKind.TASK, FailureKind.CLOSE]
    assert all(one.counts for one in job.state.failures)


def test_a_task_that_does_not_end_might_still_write() -> None:
    job = Job(drain_timeout_s=3.0)
    job.fail()
    job.post(TaskEnded("source", TaskState.FAILED))
    assert job.at(3.0)[0] == "abandon_task sink"
    assert job.state.job is JobState.STOPPING_SERVICES
    assert [one.trouble for one in job.state.failures] == [FailureKind.TASK, FailureKind.LATE_TASK]


def test_a_task_whose_call_waits_for_a_service_has_its_time_once_the_service_is_there() -> None:
    job = Job(service("model", restart="on_failure"), drain_timeout_s=3.0)
    job.post(ServiceDied("model", 1, "it was killed"))
    job.fail()
    job.post(TaskEnded("source", TaskState.FAILED))
    assert job.at(0.1) == ["run_hook model build"]
    assert job.at(50.0) == []
    job.ready("model")
    assert job.at(52.9) == []
    assert job.at(53.0)[0] == "abandon_task sink"


def test_a_close_that_calls_a_service_has_its_time_once_the_service_is_there() -> None:
    job = Job(service("model", restart="on_failure"), close_timeout_s=2.0)
    job.post(ServiceDied("model", 1, "it was killed"))
    job.fail()
    job.post(TaskEnded("source", TaskState.FAILED), TaskClosing("sink"))
    job.at(50.0)
    job.ready("model")
    assert job.at(51.9) == []
    assert job.at(52.0)[0] == "abandon_task sink"


def test_a_checkpoint_that_cannot_be_loaded_fails_the_job() -> None:
    job = Job()
    job.fail()
    job.end_tasks()
    job.at(1.0)
    job.post(TasksRenewed(OSError("gone")))
    assert [str(one.error) for one in job.state.failures] == ["a fault", "gone"]
    assert job.state.job is JobState.STOPPING_SERVICES


@pytest.mark.parametrize("way", StopMode)
@pytest.mark.parametrize("has_ended", [False, True])
def test_a_stop_ends_the_restart(way: StopMode, has_ended: bool) -> None:
    job = Job()
    job.fail()
    if has_ended:
        job.end_tasks()
    job.post(StopRequested(way))
    if not has_ended and way is not StopMode.KILL:
        assert job.state.job is JobState.CANCELLING
        job.end_tasks()
    assert job.post(TasksRenewed()) == []
    assert job.state.job in (JobState.STOPPING_SERVICES, JobState.SEALED)
    assert job.state.ended_by is way
    assert not job.state.is_failed


def test_a_job_that_is_being_stopped_does_not_start_again() -> None:
    job = Job()
    job.post(StopRequested(StopMode.STOP))
    job.fail()
    assert job.state.job is JobState.FAILING


def test_a_service_that_is_lost_meanwhile_fails_the_job() -> None:
    job = Job()
    job.fail()
    job.post(ServiceDied("model", 1, "it was killed"))
    assert job.state.job is JobState.FAILING
    assert [one.trouble for one in job.state.failures] == [FailureKind.TASK, FailureKind.DIED]
