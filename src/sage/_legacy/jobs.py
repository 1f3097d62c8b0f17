"""Jobs as old programs know them: an id that is a text, a job manager with the old verbs, and a client of it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from sage._runtime import manager
from sage.errors import ServerUnreachableError, hint

if TYPE_CHECKING:
    from collections.abc import Iterator

    from sage._runtime.job import Job
    from sage.environment import Environment


Status = dict[str, object]
"""The state of a job or of a job manager, as old programs print it."""


class Submitted(str):
    """The id of a job, as `submit` returns it; it also has the attributes of the `Job`."""

    _job: Job

    @classmethod
    def of(cls, job: Job) -> Submitted:
        """Return the id of a job."""
        made = cls(job.id)
        made._job = job
        return made

    def __getattr__(self, name: str) -> Any:
        return getattr(vars(self)["_job"], name)

    def __reduce__(self) -> tuple[type[str], tuple[str]]:
        return str, (str(self),)


class JobInfo:
    """One job of the manager; everything else is that of the `Job`.

    Attributes:
        uuid: the job's id.
    """

    def __init__(self, uuid: str, job: Job) -> None:
        self.uuid = uuid
        self._job = job

    def __getattr__(self, name: str) -> Any:
        return getattr(self._job, name)

    @property
    def status(self) -> str:
        """The job's state, as a text."""
        return str(self._job.state)


class Jobs(Mapping[str, JobInfo]):
    """The jobs by id, live."""

    def __getitem__(self, uuid: str) -> JobInfo:
        return JobInfo(str(uuid), manager.JobManager().jobs[str(uuid)])

    def __iter__(self) -> Iterator[str]:
        return iter(manager.JobManager().jobs)

    def __len__(self) -> int:
        return len(manager.JobManager().jobs)


class JobManager:
    """The job manager of this process with the verbs of 2025; `JobManager()` is always the same object."""

    _instance: JobManager | None = None

    def __new__(cls, *_: object, **__: object) -> JobManager:
        """Return the one job manager; the arguments of the old daemon have no effect."""
        if cls._instance is None:
            cls._instance = super().__new__(cls)
        return cls._instance

    def __getattr__(self, name: str) -> Any:
        return getattr(manager.JobManager(), name)

    @property
    def jobs(self) -> Jobs:
        """The jobs by id."""
        return Jobs()

    def submit_job(self, env: Environment, autostop: bool = False) -> object:
        """Submit the pipeline of an environment and return the id of its job."""
        return env.submit(autostop=autostop)

    def get_job_status(self, job_uuid: object) -> Status:
        """Return a job's id, name and state, and its report once it has ended; JobNotFoundError for an unknown id."""
        return {"uuid": str(job_uuid), **manager.JobManager().get_job_status(job_uuid)}

    def continue_job(self, job_uuid: object) -> Status:
        """Return the status of a job: a job that has ended cannot go on; submit its environment again."""
        return self.get_job_status(job_uuid)

    def get_server_info(self) -> Status:
        """Return the kind of this job manager and the jobs it knows."""
        jobs = manager.JobManager().list_jobs()
        return {"status": "running", "daemon_enabled": False, "jobs_count": len(jobs), "jobs": jobs}


class JobManagerClient:
    """Speaks to a job manager: to the one of this process, which is the meaning of the default address here.

    Attributes:
        host: where the job manager is.
        timeout: how long a request waits for the end of a job, in seconds; the job goes on ending after that.
    """

    def __init__(self, host: str = "127.0.0.1", port: int = 19001, timeout: float = 60) -> None:
        self.host = host
        self.port = port
        self.timeout = timeout

    def list_jobs(self) -> list[Status]:
        """Return id, name and state of every job."""
        jobs: list[Status] = self._manager().list_jobs()
        return jobs

    def get_job_status(self, job_uuid: object) -> Status:
        """Return a job's id, name and state, and its report once it has ended; JobNotFoundError for an unknown id."""
        return self._manager().get_job_status(job_uuid)

    def get_server_info(self) -> Status:
        """Return the kind of job manager that answers."""
        return self._manager().get_server_info()

    def continue_job(self, job_uuid: object) -> Status:
        """Return the status of a job; see `JobManager.continue_job`."""
        return self._manager().continue_job(job_uuid)

    def pause_job(self, job_uuid: object) -> Status:
        """Stop a job and return its status.

        Raises:
            TimeoutError: it is not over after `timeout`, as for the methods below.
        """
        status: Status = self._manager().pause_job(job_uuid, timeout_s=self.timeout)
        return status

    def delete_job(self, job_uuid: object, force: bool = False) -> Status:
        """Stop a job, or cancel it with `force`, and return its status."""
        status: Status = self._manager().delete_job(job_uuid, force, timeout_s=self.timeout)
        return status

    def cleanup_all_jobs(self) -> list[Status]:
        """Stop every job that runs and return the status of all."""
        jobs: list[Status] = self._manager().cleanup_all_jobs(timeout_s=self.timeout)
        return jobs

    def health_check(self) -> Status:
        """Return that the job manager answers, and how many jobs it knows."""
        return {"status": "healthy", "jobs": len(self._manager().jobs)}

    def _manager(self) -> JobManager:
        if self.host in ("127.0.0.1", "localhost") and self.port == 19001:
            return JobManager()
        error = ServerUnreachableError(f"no job manager answers at {self.host}:{self.port}")
        raise hint(error, "Leave out host and port to speak to the job manager of this process.")
