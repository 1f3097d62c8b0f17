"""The orders to the processes of a job when they start, and their messages about tasks."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Mapping

    from sage._plan.logical import LogicalGraph, ServiceSpec
    from sage._plan.physical import PhysicalPlan
    from sage._ray.placement import SitePlan
    from sage._remote.protocol import Address
    from sage._runtime.budget import BudgetLimits
    from sage._runtime.lifecycle import Limits
    from sage.service import ServiceOptions


Pickled = tuple[bytes, tuple[bytes, ...]]
"""A pickle and the buffers beside it."""


@dataclass(frozen=True)
class SitePayload:
    """The code and data of one process: the only thing in an order that needs the program's own modules.

    Attributes:
        plan: the plan with the functions of its own tasks, or None for the process of a service.
        services: the services that live there.
        fronts: the fronts of the job's replicated services, without the code of the replicas.
    """

    plan: PhysicalPlan | None
    services: tuple[ServiceSpec, ...]
    fronts: tuple[ServiceSpec, ...] = ()


@dataclass(frozen=True)
class SiteLaunch:
    """The facts that a process of a job needs before it begins.

    Attributes:
        job: the id of the job.
        name: the name of the process.
        secret: shared by the processes of the job, as proof to each other.
        options: the options of every service of the job, by name.
        sites: the process of each task, by their names.
        part: a pickled `SitePayload`.
        path: where the driver finds modules.
        level: the level of the driver's log.
        driver: where the driver listens.
        budget: what the job may use, or None.
    """

    job: str
    name: str
    secret: bytes
    options: Mapping[str, ServiceOptions]
    sites: Mapping[str, str]
    part: Pickled
    path: tuple[str, ...]
    level: int
    driver: Address
    budget: BudgetLimits | None = None


@dataclass(frozen=True)
class JobLaunch:
    """The facts that the job master needs.

    Attributes:
        job: the id of the job.
        graph: the user's pipeline, without functions and arguments.
        plan: the physical plan, likewise.
        services: the services, likewise.
        limits: the bounds of the stop.
        secret: shared by the processes of the job, as proof to each other.
        sites: the processes that run tasks, by name.
        driver: where the driver listens.
        started: when it was submitted, in seconds since the epoch.
        continues: whether the job goes on when the driver is gone.
        start_timeout_s: how long a process may take to get its place in the cluster.
        level: the level of the driver's log.
        runtime_env: the environment that Ray prepares for each process, or None.
        ends_itself: a file that the master removes when the whole job has ended, or None.
        budget: what the job may use, or None.
    """

    job: str
    graph: LogicalGraph
    plan: PhysicalPlan
    services: tuple[ServiceSpec, ...]
    limits: Limits
    secret: bytes
    sites: Mapping[str, SitePlan]
    driver: Address
    started: float
    continues: bool
    start_timeout_s: float
    level: int = 0
    runtime_env: Mapping[str, object] | None = None
    ends_itself: str | None = None
    budget: BudgetLimits | None = None


class OperatorCounts(NamedTuple):
    """The counts of one operator in one task; see `OperatorMetrics`."""

    node: int
    records_in: int
    records_out: int
    failed: int
    busy_s: float
    full_s: float


class TaskCounts(NamedTuple):
    """The counts of one task; `waited_s` is for how long others waited for room in its queue."""

    undelivered: int
    operators: tuple[OperatorCounts, ...]
    waited_s: float
