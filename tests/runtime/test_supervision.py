"""What follows when the supervision itself fails, and when a call comes before its service is ready."""

from __future__ import annotations

import threading

import pytest

import sage
from sage._backends.threads import ThreadsBackend
from sage._runtime.manager import JobManager


class FaultyBackend(ThreadsBackend):
    """A backend whose clock breaks once a job runs, as a bug of ours would."""

    def __init__(self, broken: threading.Event) -> None:
        super().__init__()
        self._broken = broken

    def now(self) -> float:
        """Return the time, or fail."""
        if self._broken.is_set() and threading.current_thread().name == "sage-supervisor":
            raise RuntimeError("the clock is broken")
        return super().now()


def test_a_bug_in_the_supervision_is_raised_and_nobody_waits_for_ever() -> None:
    broken = threading.Event()
    env = sage.LocalEnvironment("crashed", backend=lambda: FaultyBackend(broken))
    env.from_batch([1]).sink(lambda _: broken.set())
    with pytest.raises(sage.JobErrorGroup, match="the supervision of job") as caught:
        env.submit(autostop=True)
    assert isinstance(caught.value.exceptions[0], sage.InternalError)
    assert "Please report it" in caught.value.exceptions[0].__notes__[0]


def test_a_call_before_the_service_is_ready_waits_for_it() -> None:
    may_start = threading.Event()

    class Slow:
        def setup(self) -> None:
            assert may_start.wait(10)

        def process(self, value: int) -> int:
            return value + 1

    with sage.LocalEnvironment("early") as env:
        handle = env.register_service("slow", Slow)
        env.from_source(lambda: None).sink(lambda _: None)
        env.submit()
        answers: list[int] = []
        caller = threading.Thread(target=lambda: answers.append(handle.process(1)))
        caller.start()
        may_start.set()
        caller.join(10)
        assert answers == [2]


def test_an_asynchronous_call_before_the_service_is_ready_waits_for_it() -> None:
    may_build = threading.Event()
    asked = threading.Event()
    answers: list[int] = []

    class Late:
        def __init__(self) -> None:
            assert may_build.wait(10)

        def process(self, value: int) -> int:
            return value + 1

    class Early(sage.BaseService):
        def setup(self) -> None:
            answer = self.call_service_async("late", 1)
            asked.set()
            may_build.set()
            answers.append(answer.result(10))

    env = sage.LocalEnvironment("early")
    env.register_service("late", Late)
    env.register_service("early", Early)
    env.from_batch([1]).sink(lambda _: None)
    env.submit(autostop=True)
    assert asked.is_set()
    assert answers == [2]


def test_a_constructor_that_returns_too_late_is_cleaned_up_after() -> None:
    """Whatever was built is cleaned exactly once."""
    may_return, cleaned = threading.Event(), threading.Semaphore(0)

    class Late:
        def __init__(self) -> None:
            assert may_return.wait(10)

        def cleanup(self) -> None:
            cleaned.release()
            raise RuntimeError("only the log hears of this")

    env = sage.LocalEnvironment("late")
    env.register_service("late", Late, options=sage.ServiceOptions(start_timeout_s=0.05))
    env.from_batch([1]).sink(lambda _: None)
    with pytest.raises(sage.JobErrorGroup, match="did not end its build in time"):
        env.submit(autostop=True)
    may_return.set()
    assert cleaned.acquire(timeout=10)
    assert not cleaned.acquire(blocking=False)


class KeptByTheLast(sage.MapFunction):
    """Drops every copy of a record but that of the last parallel task."""

    def execute(self, data: int) -> int | None:
        """Return the record in the last task only."""
        return data + 1 if self.ctx.parallel_index == 2 else None


def test_a_request_that_is_broadcast_is_answered_by_the_copy_that_is_left() -> None:
    """Each copy of a record counts, so that those that are dropped first do not answer."""
    env = sage.LocalEnvironment("copies")
    handle = env.serve("copied", lambda requests: requests.broadcast().map(KeptByTheLast, parallelism=3))
    answers: list[int] = []
    env.from_batch(range(50)).map(handle.process).sink(answers.append)
    env.submit(autostop=True)
    assert answers == list(range(1, 51))


def test_a_refused_environment_leaves_an_iterator_as_it_was() -> None:
    env = sage.RemoteEnvironment("elsewhere")
    env.from_batch(iter([1, 2])).sink(lambda _: None)
    env.register_service("kept", lambda: object())
    for _ in range(2):
        with pytest.raises(sage.UnsupportedPlanError, match="cannot keep services"):
            env.submit(keep_services=True)


def test_an_environment_that_was_not_submitted_is_new_and_its_job_can_be_stopped() -> None:
    manager, env = JobManager(), sage.LocalEnvironment("later")
    expected = {"job_id": env.env_uuid, "name": "", "status": "new"}
    assert manager.get_job_status(env.env_uuid) == expected
    assert manager.pause_job(env.env_uuid) == expected
    assert manager.delete_job(env.env_uuid, force=True) == expected
