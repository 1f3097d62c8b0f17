"""What is sent to the processes of a job when they start, and what they tell of their tasks."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Mapping

    from sage._plan.logical import LogicalGraph, ServiceSpec
    from sage._plan.physical import PhysicalPlan
    from sage._ray.mesh import Address
    from sage._ray.placement import Site
    from sage._runtime.lifecycle import Limits
    from sage.service import ServiceOptions


Pickled = tuple[bytes, tuple[bytes, ...]]
"""A pickle and the buffers beside it."""


@dataclass(frozen=True)
class Part:
    """The code and data of one process: the only thing in an order that needs the program's own modules.

    Attributes:
        plan: the plan with the functions of its own tasks, or None for the process of a service.
        services: the services that live there.
    """

    plan: PhysicalPlan | None
    services: tuple[ServiceSpec, ...]


@dataclass(frozen=True)
class SiteOrder:
    """What a process of a job has to know before it is told to begin.

    Attributes:
        job: the id of the job.
        name: the name of the process.
        secret: what the processes of the job prove to each other.
        options: the options of every service of the job, by name.
        sites: the process of each task, by their names.
        part: a pickled `Part`.
        path: where the driver finds modules.
        level: the level of the driver's log.
        driver: where the driver listens.
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


@dataclass(frozen=True)
class JobOrder:
    """What the job master has to know.

    Attributes:
        job: the id of the job.
        graph: what the user wrote, without functions and arguments.
        plan: the physical plan, likewise.
        services: the services, likewise.
        limits: the bounds of the stop.
        secret: what the processes of the job prove to each other.
        sites: the processes that run tasks, by name.
        driver: where the driver listens.
        started: when it was submitted, in seconds since the epoch.
        continues: whether the job goes on when the driver is gone.
        start_timeout_s: how long a process may take to get its place in the cluster.
        level: the level of the driver's log.
        runtime_env: what Ray prepares for each process, or None.
        ends_itself: a file that the master removes when nothing of the job is left, or None.
    """

    job: str
    graph: LogicalGraph
    plan: PhysicalPlan
    services: tuple[ServiceSpec, ...]
    limits: Limits
    secret: bytes
    sites: Mapping[str, Site]
    driver: Address
    started: float
    continues: bool
    start_timeout_s: float
    level: int = 0
    runtime_env: Mapping[str, Any] | None = None
    ends_itself: str | None = None


class OperatorCounts(NamedTuple):
    """The counts of one operator in one task; see `OperatorMetrics`."""

    node: int
    records_in: int
    records_out: int
    failed: int
    busy_s: float


class TaskCounts(NamedTuple):
    """The counts of one task."""

    undelivered: int
    operators: tuple[OperatorCounts, ...]
