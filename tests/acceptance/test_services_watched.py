"""Services under watch: what a monitor sees of them, and what follows when their health check fails."""

from __future__ import annotations

import sys
import threading
from typing import TYPE_CHECKING, Literal

import pytest
from support.recording_services import Fragile, Notes, report_of

from sage import (
    BaseService,
    Cleanliness,
    FunctionError,
    Line,
    LocalEnvironment,
    MapFunction,
    Outcome,
    ServiceError,
    ServiceOptions,
    ServiceTimeoutError,
    ServiceUnavailableError,
)

if TYPE_CHECKING:
    from collections.abc import Callable

    from sage._runtime.backend import Backend

    MakeBackend = Callable[[], Backend]
    Host = Literal["inline", "process"]

SOON_S = 10.0
"""Bound of every wait for something that happens at once on an idle machine."""


# --- a monitor --------------------------------------------------------------------------------------------------------


class Monitor:
    """Reads what an environment shows of its job every few milliseconds, as a dashboard would."""

    def __init__(self, env: LocalEnvironment, pause_s: float = 0.005) -> None:
        self.env = env
        self.pause_s = pause_s
        self.seen: list[tuple[bool, int, int]] = []
        self.errors: list[BaseException] = []
        self._is_over = threading.Event()
        self._thread = threading.Thread(target=self._watch)

    def __enter__(self) -> Monitor:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._is_over.set()
        self._thread.join()

    def _watch(self) -> None:
        while not self._is_over.wait(self.pause_s):
            try:
                dispatcher = self.env.jobmanager.jobs[self.env.env_uuid].dispatcher
                # What ends last is read first: whatever has ended then stays ended for the reads that follow.
                self.seen.append((dispatcher.is_running, len(dispatcher.services), len(dispatcher.tasks)))
            except BaseException as error:
                self.errors.append(error)


@pytest.mark.parametrize("pause_s", [0.005, 0.0])
def test_a_monitor_sees_tasks_end_before_services(pause_s: float) -> None:
    """Over several jobs no read fails, and what it shows is true at every moment."""
    env = LocalEnvironment()
    seen_in_cleanup = list[tuple[int, int, bool]]()

    class Slow(BaseService):
        def stop(self) -> None:
            dispatcher = env.jobmanager.jobs[env.env_uuid].dispatcher
            seen_in_cleanup.append((len(dispatcher.tasks), len(dispatcher.services), dispatcher.is_running))
            threading.Event().wait(0.03)

    for name in "abc":
        env.register_service(name, Slow)
    env.from_batch(range(30)).map(lambda data: threading.Event().wait(0.001)).sink(lambda data: None)
    with Monitor(env, pause_s) as monitor:
        for _ in range(5):
            env.submit(autostop=True)
    assert monitor.errors == []
    running = [(services, tasks) for is_running, services, tasks in monitor.seen if is_running]
    assert running
    assert all((services, tasks) == (0, 0) for is_running, services, tasks in monitor.seen if not is_running)
    assert all(tasks == 0 for services, tasks in running if services == 0)
    assert any(services and tasks for services, tasks in running)
    assert any(services and not tasks for services, tasks in running)
    assert seen_in_cleanup == [(0, services, True) for services in (3, 2, 1)] * 5


class Lingering(BaseService):
    """Takes a little to stop."""

    def process(self, data: int) -> int:
        return data

    def stop(self) -> None:
        threading.Event().wait(0.03)


LINGERS = """
import signal, sys, threading
def stop(*_):
    threading.Event().wait(0.03)
    sys.exit(0)
signal.signal(signal.SIGTERM, stop)
print("up", flush=True)
signal.pause()
"""


@pytest.mark.parametrize("host", ["process", "command"])
def test_a_monitor_sees_tasks_end_before_processes(host: str) -> None:
    """The same with services in processes of their own."""
    env = LocalEnvironment()
    for name in "abc":
        if host == "command":
            env.register_command(name, [sys.executable, "-c", LINGERS], ready=Line("up"))
        else:
            env.register_service(name, Lingering, options=ServiceOptions(host="process"))
    env.from_batch(range(30)).map(lambda data: threading.Event().wait(0.001)).sink(lambda data: None)
    with Monitor(env, 0.001) as monitor:
        for _ in range(2):
            env.submit(autostop=True)
    assert monitor.errors == []
    running = [(services, tasks) for is_running, services, tasks in monitor.seen if is_running]
    assert all((services, tasks) == (0, 0) for is_running, services, tasks in monitor.seen if not is_running)
    assert all(tasks == 0 for services, tasks in running if services == 0)
    assert {services for services, tasks in running if tasks} == {3}
    assert {services for services, tasks in running if not tasks} >= {3, 2, 1}


# --- services that fail -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("raises", [False, True])
def test_a_sick_service_is_restarted_and_its_callers_wait(host: Host, journal: Notes, raises: bool) -> None:
    """Calls go on with the second instance, and none is lost."""
    answers = list[int]()
    env = LocalEnvironment()
    options = ServiceOptions(host=host, restart="on_failure", backoff_s=(0.05, 0.1), health_interval_s=0.02)
    fragile = env.register_service("memory", Fragile, journal, 1, raises=raises, options=options)

    def take(answer: int) -> None:
        answers.append(answer)
        if answer == 2:
            env.stop()

    env.from_source(lambda: 1, delay=0.001).map(fragile).sink(take)
    report = env.submit().wait(SOON_S)
    assert answers == sorted(answers)
    assert set(answers) == {1, 2}
    assert journal == [f"memory.{hook} {number}" for number in (1, 2) for hook in ("build", "stop", "cleanup")]
    assert (report.state, report.cleanliness) == (Outcome.STOPPED, Cleanliness.CLEAN)
    assert report.service("memory").restarts == 1
    assert report.operator("map").failed == 0
    builds = [(hook.hook, hook.incarnation) for hook in report.service("memory").hooks if hook.hook != "drain"]
    own = () if host == "inline" else ("exit",)
    in_order = [(hook, number) for number in (1, 2) for hook in ("build", "stop", "cleanup", *own)]
    assert [entry for entry in builds if entry[0] != "health"] == in_order


def test_a_call_waits_for_a_restart_only_up_to_its_time_out() -> None:
    """The pause before the restart is longer than the call may take."""
    journal = list[str]()
    env = LocalEnvironment()
    options = ServiceOptions(
        restart="on_failure", backoff_s=(SOON_S, SOON_S), health_interval_s=0.02, call_timeout_s=0.2
    )
    fragile = env.register_service("memory", Fragile, journal, 1, options=options)
    env.from_source(lambda: 1, delay=0.001).map(fragile).sink(lambda answer: None)
    with pytest.raises(FunctionError) as caught:
        env.submit().wait(SOON_S)
    assert isinstance(caught.value.__cause__, ServiceTimeoutError)
    assert caught.value.__cause__.service == "memory"
    assert journal == ["memory.build 1", "memory.stop 1", "memory.cleanup 1"]
    assert report_of(env).state is Outcome.FAILED


def test_a_service_that_fails_again_and_again_fails_the_job(host: Host, journal: Notes) -> None:
    """After as many restarts as are allowed the job ends; every instance was cleaned once."""
    env = LocalEnvironment()
    options = ServiceOptions(
        host=host, restart="on_failure", restarts_max=2, backoff_s=(0.01, 0.01), health_interval_s=0.02
    )
    fragile = env.register_service("memory", Fragile, journal, 99, options=options)
    env.from_source(lambda: 1, delay=0.001).map(fragile).sink(lambda answer: None)
    with pytest.raises(ServiceError, match='service "memory" failed: its health check failed') as caught:
        env.submit().wait(SOON_S)
    assert caught.value.service == "memory"
    assert journal == [f"memory.{hook} {number}" for number in (1, 2, 3) for hook in ("build", "stop", "cleanup")]
    report = report_of(env)
    assert (report.state, report.cleanliness) == (Outcome.FAILED, Cleanliness.CLEAN)
    assert report.service("memory").restarts == 2


def test_calls_of_a_service_that_may_be_absent_fail_at_once() -> None:
    """Nothing restarts it, and the job goes on; each call says that the service is down."""
    journal, failed = list[str](), list[str]()
    env = LocalEnvironment()
    options = ServiceOptions(restart="never", required=False, health_interval_s=0.02)
    env.register_service("memory", Fragile, journal, 1, options=options)

    class Ask(MapFunction):
        def execute(self, data: int) -> int:
            try:
                return int(self.call_service("memory", data))
            except ServiceUnavailableError as error:
                failed.append(str(error))
                env.stop()
                return 0

    env.from_source(lambda: 1, delay=0.001).map(Ask).sink(lambda answer: None)
    report = env.submit().wait(SOON_S)
    assert set(failed) == {'service "memory" has stopped and takes no more calls'}
    assert journal == ["memory.build 1", "memory.stop 1", "memory.cleanup 1"]
    assert report.state is Outcome.STOPPED
    assert report.service("memory").state == "failed"
    assert [str(error) for error in report.errors] == ['service "memory" failed: its health check failed']
