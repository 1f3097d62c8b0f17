"""The environment whose jobs run on a Ray cluster."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal

from sage._arguments import stop_limits
from sage._current_job import here
from sage.environment import Environment
from sage.errors import JobError, UnsupportedPlanError, hint

if TYPE_CHECKING:
    import os
    from collections.abc import Mapping

    from sage._plan.logical import LogicalGraph
    from sage._plan.physical import PhysicalPlan
    from sage._runtime.backend import Backend
    from sage._runtime.job import Job
    from sage.durable import Durable


class EnvironmentInside:
    """The environment, as a function on a cluster sees it: a way to end the job."""

    def __init__(self, name: str) -> None:
        self.name = name

    def stop(self, drain: bool | None = None) -> None:
        """Ask for the end of the job without waiting for it.

        Args:
            drain: see `Job.stop`.

        Raises:
            JobError: this is called outside of a job, or from a thread that the program started itself.
        """
        job = here.job
        if job is None:
            raise JobError(f'environment "{self.name}" was sent to a cluster, and this thread is of no job there')
        job.ask_to_stop(drain)

    def close(self) -> None:
        """Ask for the end of the job, as `stop` does."""
        self.stop()


class RemoteEnvironment(Environment):
    """Runs jobs on a Ray cluster: tasks and services in processes there, and sinks that fill the program's lists here.

    Args:
        name: the environment's name, seen in reports and logs.
        config: the environment's own settings, kept for the program.
        address: host and port of a cluster; by default the connection that the program made with `ray.init`, the
            cluster that `ray job submit` started it on, or else a Ray of this program's own on this machine.
        workers: how many processes tasks that reserve nothing are dealt out to; by default as many as the widest
            operator has tasks, at most one for each processor of the cluster.
        runtime_env: the environment that Ray prepares for each process, as described in its documentation:
            `working_dir`, `py_modules`, `pip`.
        on_driver_loss: "stop" ends the job when this process is gone, "continue" lets it go on to its end.
        start_timeout_s: how long a process may take to get its place in the cluster, in seconds.
        log_dir: where log files go; see `LocalEnvironment`.
        report_file: where events and reports of jobs are appended as JSON Lines while they run.
        stop_timeout_s: budget of a whole stop, in seconds.
        drain_timeout_s: how long records in flight may drain in a stop, in seconds.
        close_timeout_s: how long each `close` of a function may take, in seconds.
        services_share: the part of the budget of a stop that is reserved for services; 0.4 by default.
        services_reserve_s: the least that is reserved for them, in seconds; 5 by default.
        durable: refused; only a `LocalEnvironment` has checkpoints.
    """

    def __init__(
        self,
        name: str = "remote_environment",
        config: Mapping[str, Any] | None = None,
        *,
        address: str | None = None,
        workers: int | None = None,
        runtime_env: dict[str, Any] | None = None,
        on_driver_loss: Literal["stop", "continue"] = "stop",
        start_timeout_s: float = 60.0,
        log_dir: str | os.PathLike[str] | None = None,
        report_file: str | os.PathLike[str] | None = None,
        stop_timeout_s: float | None = None,
        drain_timeout_s: float | None = None,
        close_timeout_s: float | None = None,
        services_share: float | None = None,
        services_reserve_s: float | None = None,
        durable: str | os.PathLike[str] | Durable | None = None,
    ) -> None:
        if durable is not None:
            error = UnsupportedPlanError(f'environment "{name}" is durable, which jobs on a cluster cannot be yet')
            raise hint(error, "Leave durable= out, or use LocalEnvironment; nothing was started.")
        super().__init__(name, config)
        self._limits = stop_limits(
            name, stop_timeout_s, drain_timeout_s, close_timeout_s, services_share, services_reserve_s
        )
        if log_dir is not None:
            self.log_dir = log_dir
        if report_file is not None:
            self.report_file = report_file
        if on_driver_loss not in ("stop", "continue"):
            raise hint(ValueError(f"on_driver_loss is {on_driver_loss!r}"), 'It is "stop" or "continue".')
        if workers is not None and workers < 1:
            raise ValueError(f"workers is {workers}, which is not a positive number")
        self._remote: dict[str, Any] = {
            "address": address,
            "workers": workers,
            "runtime_env": runtime_env,
            "on_driver_loss": on_driver_loss,
            "start_timeout_s": start_timeout_s,
        }

    def __reduce__(self) -> tuple[type[EnvironmentInside], tuple[str]]:
        # A function that uses the environment takes along the part that works in another process.
        return EnvironmentInside, (self.name,)

    # A command needs its program on the node that it is started on.
    _starts_commands = False
    _records_calls = False

    def _graph(self) -> LogicalGraph:
        from sage._ray.placement import placed

        return placed(super()._graph())

    def _prepare(self, graph: LogicalGraph, plan: PhysicalPlan, keep: frozenset[str]) -> Job:
        from sage._ray.driver import check_supported

        check_supported(self.name, graph)
        if keep:
            error = UnsupportedPlanError(f'environment "{self.name}" cannot keep services in a cluster')
            raise hint(error, "Leave keep_services out; LocalEnvironment can.")
        return super()._prepare(graph, plan, keep)

    def _new_job(
        self,
        id_: str,
        graph: LogicalGraph,
        plan: PhysicalPlan | None,
        backend: Backend,  # noqa: ARG002
        adopted: dict[str, Any],  # noqa: ARG002
        keep: frozenset[str] = frozenset(),  # noqa: ARG002
    ) -> Job:
        from sage._assembly import interrupt_timeout_s
        from sage._ray.connection import cluster
        from sage._ray.driver import RemoteSettings, remote_job

        assert plan is not None
        settings = RemoteSettings(**self._remote, budget=self._budget)
        return remote_job(id_, graph, plan, self._limits, settings, cluster, interrupt_timeout_s())
