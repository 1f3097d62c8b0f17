"""The job manager of this process: knows every job, also those that have ended."""

from __future__ import annotations

import atexit
import os
import threading
import time
import warnings
import weakref
from collections.abc import Iterator, Mapping
from functools import partial
from itertools import islice
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, Protocol

from sage._logs import log_of
from sage._runtime.states import StopMode
from sage.errors import JobNotFoundError, SageError, describe, hint

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from sage._runtime.job import Job

JOBS_MAX = 100
"""How many ended jobs are remembered; the oldest are forgotten first."""

EXIT_GRACE_S = 5.0
"""How much longer than the budget of its stop the interpreter's exit waits for a job, in seconds."""

FINISH_SHARE = 0.6
"""The fraction of the budget of a stop in which a job with bounded sources may finish at exit, before it is stopped."""

log = log_of("sage.manager")


class NoDispatcher:
    """An environment that has not been submitted, as a monitor sees it."""

    tasks: Mapping[str, str] = MappingProxyType({})
    services: Mapping[str, str] = MappingProxyType({})
    is_running = False


class NewJob:
    """The job of an environment that has not been submitted."""

    name = ""
    state = "new"
    report = _report = None
    dispatcher = NoDispatcher()

    def stop(self, *, drain: bool = True, timeout_s: float | None = None) -> None:
        """Do nothing: nothing runs."""


class KeepsServices(Protocol):
    """An environment, as the job manager knows it."""

    def _close_at_exit(self) -> None: ...

    def _after_fork_in_child(self) -> None: ...


"""Where a job is; the report is there once the job has ended."""


class Jobs(Mapping[str, Any]):
    """The jobs by id, live."""

    def __init__(self, manager: JobManager) -> None:
        self._manager = manager

    def __getitem__(self, id_: str) -> Any:
        return self._manager._find(str(id_))

    def __iter__(self) -> Iterator[str]:
        return iter(tuple(self._manager._jobs))

    def __len__(self) -> int:
        return len(self._manager._jobs)


class JobManager:
    """Submits, lists, waits for and stops the jobs of this process. `JobManager()` is always the same object."""

    _instance: JobManager | None = None
    _lock = threading.Lock()

    def __new__(cls) -> JobManager:
        """Return the one job manager of this process."""
        with cls._lock:
            if cls._instance is None:
                cls._instance = super().__new__(cls)
                cls._instance._jobs = {}
                cls._instance._keeping = set()
                cls._instance._environments = weakref.WeakValueDictionary()
                _at_exit(cls._instance._end)
            return cls._instance

    _jobs: dict[str, Job]
    _environments: weakref.WeakValueDictionary[str, KeepsServices]
    _keeping: set[KeepsServices]

    @property
    def jobs(self) -> Jobs:
        """The jobs by id: `jobs[env.env_uuid].dispatcher` shows `tasks`, `services` and `is_running`, live."""
        return Jobs(self)

    def register(self, job: Job) -> None:
        """Take in a job that is about to start."""
        self._jobs[job.id] = job
        if len(self._jobs) > JOBS_MAX:
            ended = (id_ for id_, other in tuple(self._jobs.items()) if not other.is_running)
            for id_ in islice(ended, len(self._jobs) - JOBS_MAX):
                self._jobs.pop(id_, None)
        log.info("job registered id=%s name=%r", job.id, job.name)

    def expect(self, id_: str, environment: KeepsServices) -> None:
        """Know the id that an environment's next job will have, and the environment, to close it at exit."""
        self._environments[id_] = environment

    def hold(self, environment: KeepsServices, *, keeps: bool) -> None:
        """Know an environment as long as it keeps services, which have to be cleaned at exit at the latest."""
        if keeps:
            self._keeping.add(environment)
        else:
            self._keeping.discard(environment)

    def get_job_status(self, id_: object) -> dict[str, Any]:
        """Return a job's id, name and state, and its report once it has ended.

        Raises:
            JobNotFoundError: no job of this process has the id.
        """
        job = self._find(str(id_))
        status: dict[str, Any] = {"job_id": str(id_), "name": job.name, "status": str(job.state)}
        if job._report is not None:
            status["report"] = job._report.to_dict()
        return status

    def list_jobs(self) -> list[dict[str, Any]]:
        """Return id, name and state of every job."""
        return [{"job_id": job.id, "name": job.name, "status": str(job.state)} for job in tuple(self._jobs.values())]

    def pause_job(self, id_: object, *, timeout_s: float | None = None) -> dict[str, Any]:
        """Stop a job within `timeout_s` seconds and return its status; old programs call this name."""
        self._find(str(id_)).stop(timeout_s=timeout_s)
        return self.get_job_status(id_)

    def delete_job(self, id_: object, force: bool = False, *, timeout_s: float | None = None) -> dict[str, Any]:
        """Stop a job, or cancel it with `force`, and return its status; it stays known.

        Raises:
            TimeoutError: it is not over after `timeout_s` seconds, as for the methods beside this one.
        """
        self._find(str(id_)).stop(drain=not force, timeout_s=timeout_s)
        return self.get_job_status(id_)

    def cleanup_all_jobs(self, *, timeout_s: float | None = None) -> list[dict[str, Any]]:
        """Stop every job that runs, all of them within `timeout_s` seconds, and return the status of all."""
        due = None if timeout_s is None else time.monotonic() + timeout_s
        for job in tuple(self._jobs.values()):
            if job.is_running:
                job.stop(timeout_s=None if due is None else max(0.0, due - time.monotonic()))
        return self.list_jobs()

    @classmethod
    def _after_fork_in_child(cls) -> None:
        """Forget everything: the jobs belong to the process that this one was forked from, with all their threads."""
        cls._lock = threading.Lock()
        if cls._instance is not None:
            cls._instance._jobs.clear()
            cls._instance._keeping.clear()
            for environment in tuple(cls._instance._environments.values()):
                environment._after_fork_in_child()

    def _find(self, id_: str) -> Job | NewJob:
        job = self._jobs.get(id_)
        if job is not None:
            return job
        if id_ in self._environments:
            return NewJob()
        raise hint(
            JobNotFoundError(f'job "{id_}" is not known here'), "A job is known in the process that submitted it."
        )

    def _end(self) -> None:
        """End the jobs that still run at exit: bounded ones may finish first, the others are stopped."""
        running = [job for job in self._jobs.values() if job.is_running]
        _stop_at_exit(job for job in running if not job._is_bounded)
        _call_all(self._endings(running))

    def _endings(self, running: list[Job]) -> Iterator[Callable[[], None]]:
        """Yield the steps of the exit in their order: jobs first, then the environments that keep services."""
        began_at = time.monotonic()
        bounded = [job for job in running if job._is_bounded]
        yield from (partial(_let_finish, job, began_at) for job in bounded)
        stopped = [job for job in running if job.is_running or job not in bounded]
        _stop_at_exit(job for job in stopped if job in bounded)
        yield from (partial(_warn_of, job) for job in stopped)
        yield from (partial(_wait_at_exit, job) for job in stopped)
        yield from (environment._close_at_exit for environment in tuple(self._keeping))


def _call_all(actions: Iterable[Callable[[], None]]) -> None:
    """Call every action, even if one raises, and raise their errors."""
    errors: list[BaseException] = []
    for action in actions:
        try:
            action()
        except BaseException as error:  # it is raised when the others have had their turn
            errors.append(error)
    if len(errors) == 1:
        raise errors[0]
    if errors:
        # The interpreter prints the text of an exception raised here, and nothing of the errors in a group.
        raise BaseExceptionGroup("; ".join(map(describe, errors)), errors)


def _stop_at_exit(jobs: Iterable[Job]) -> None:
    for job in jobs:
        job._request(StopMode.STOP, "the interpreter exits", job._interrupt_timeout_s)


def _let_finish(job: Job, began_at: float) -> None:
    """Wait for a job whose sources all end by themselves, as a program may end with `env.submit()`."""
    try:
        job.wait(max(0.0, began_at + FINISH_SHARE * job._interrupt_timeout_s - time.monotonic()))
    except TimeoutError:
        pass  # it is stopped next
    except SageError as error:
        log.error("job failed at exit name=%r", job.name, exc_info=error)


def _warn_of(job: Job) -> None:
    warnings.warn(
        f'job "{job.name}" still runs at exit and is stopped; call env.close() or submit(autostop=True)',
        RuntimeWarning,
        stacklevel=1,
    )


def _wait_at_exit(job: Job) -> None:
    try:
        job.wait(job._interrupt_timeout_s + EXIT_GRACE_S)
    except (SageError, TimeoutError) as error:
        log.error("job failed at exit name=%r", job.name, exc_info=error)


os.register_at_fork(after_in_child=JobManager._after_fork_in_child)


def _at_exit(end: Callable[[], None]) -> None:
    # The interpreter's own hook for threads runs before it waits for them, and while new ones may still be started;
    # atexit comes too late for that from Python 3.12 on. It has no public name, so atexit takes over where it is gone.
    register = getattr(threading, "_register_atexit", None) or atexit.register
    register(end)
