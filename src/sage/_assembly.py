"""Puts a job together: where each of its services runs, who watches over them, and the bounds of its stop."""

from __future__ import annotations

import uuid
from functools import partial
from types import MappingProxyType
from typing import TYPE_CHECKING

from sage._arguments import STOP_TIMEOUT_VARIABLE, seconds_in
from sage._backends.threads import ThreadsBackend
from sage._guardian.job_journal import JobJournal
from sage._plan.logical import LogicalGraph
from sage._runtime.budget import Budget
from sage._runtime.deployment import deploy
from sage._runtime.dispatcher import prepare
from sage._runtime.job import Job
from sage._runtime.lifecycle import Limits
from sage._runtime.states import StopMode

if TYPE_CHECKING:
    from collections.abc import Mapping

    from sage._hosts.gated import GatedHost
    from sage._plan.logical import ServiceSpec
    from sage._plan.physical import PhysicalPlan
    from sage._runtime.backend import Backend, Host, HostSurroundings
    from sage._runtime.budget import BudgetLimits
    from sage._runtime.durable_run import DurableRun
    from sage._runtime.supervisor import Supervisor
    from sage.service import ServiceContext

INTERRUPT_TIMEOUT_S = 25.0
"""Budget of a stop that a signal asked for: orchestrators often kill programs after 30 s."""

NOTHING_ADOPTED: Mapping[str, Host] = MappingProxyType({})


def interrupt_timeout_s() -> float:
    """Return the budget of a stop that a signal asked for."""
    asked_s = seconds_in(STOP_TIMEOUT_VARIABLE)
    return INTERRUPT_TIMEOUT_S if asked_s is None else asked_s


def assemble(
    id_: str,
    graph: LogicalGraph,
    plan: PhysicalPlan | None,
    backend: Backend,
    limits: Mapping[str, float],
    *,
    report: str | None = None,
    keep: frozenset[str] = frozenset(),
    adopted: Mapping[str, Host] = NOTHING_ADOPTED,
    before: JobJournal | None = None,
    budget: BudgetLimits | None = None,
    durable: DurableRun | None = None,
    until_asked: bool = False,
) -> tuple[Job, JobJournal]:
    """Return a job that has not begun, and the object that reports it to the guardian.

    Args:
        id_: the job's id.
        graph: the user's pipeline.
        plan: the physical plan, or None for a job of services alone.
        backend: where its tasks run.
        limits: the bounds of its stop that are not the default, in seconds.
        report: the file of its report, or None.
        keep: services that are left to the environment.
        adopted: hosts that an earlier job left to it.
        before: that job's guard.
        budget: what the job may use, or None.
        durable: makes its checkpoints, or None; closed with the job.
        until_asked: whether a job without tasks goes on until it is asked to end.
    """
    job = Job(id_, graph, interrupt_timeout_s())
    services = _with_replicas(graph.services)
    guard = JobJournal(id_, graph.name, report, services, before=before)
    counted = None
    if budget is not None:
        counted = Budget(budget, lambda why: job._request(StopMode.STOP, why), job._log.warning)
    job.dispatcher = prepare(
        plan,
        services,
        backend,
        partial(_host_of, limits, {}),
        Limits(**limits),
        job._seal,
        make_tasks=deploy if durable is None else partial(deploy, durable=durable),
        keep=keep,
        adopted=adopted,
        guard=guard,
        budget=counted,
        until_asked=until_asked,
        restart=None if durable is None else durable.restart,
    )
    _join(job, guard, counted, durable)
    job._when_begun(lambda: _begin_recycling(services, job.dispatcher.supervisor))
    job._when_begun(lambda: _begin_resting(services, job.dispatcher.supervisor))
    return job, guard


def _join(job: Job, guard: JobJournal, budget: Budget | None, durable: DurableRun | None) -> None:
    """Let the guard, the budget and the checkpoints of a job begin and end with it."""
    supervisor = job.dispatcher.supervisor
    if budget is not None:
        job._when_begun(partial(budget.begin, supervisor))
    if durable is not None:
        job._durable = durable
        job._when_begun(partial(durable.begin, supervisor, job.dispatcher.make_tasks))
        job._when_sealed(durable.close)
    supervisor.listeners.append(guard.note)
    job._when_begun(guard.begin)
    job._when_sealed(lambda _: guard.sealed())


def _with_replicas(services: tuple[ServiceSpec, ...]) -> tuple[ServiceSpec, ...]:
    if not any(spec.options.has_replicas for spec in services):
        return services
    from sage._hosts.replicas import with_replicas

    return with_replicas(services)


def _begin_recycling(services: tuple[ServiceSpec, ...], supervisor: Supervisor) -> None:
    if any(spec.options.recycles for spec in services):
        from sage._hosts.recycling import begin_recycling

        begin_recycling(supervisor)


def _begin_resting(services: tuple[ServiceSpec, ...], supervisor: Supervisor) -> None:
    if any(spec.options.idle_stop_s is not None for spec in services):
        from sage._hosts.resting import begin_resting

        begin_resting(supervisor)


def _host_of(
    limits: Mapping[str, float],
    replicas: dict[str, list[GatedHost]],
    spec: ServiceSpec,
    context: ServiceContext,
    surroundings: HostSurroundings,
) -> Host:
    """Return the host of a service; `replicas` holds those of each front, which comes after them."""
    if spec.options.has_replicas:
        from sage._hosts.replicas import ReplicasHost

        return ReplicasHost(spec, context, surroundings, replicas[spec.name])
    host = _host_of_one(limits, spec, context, surroundings)
    if spec.front:
        replicas.setdefault(spec.front, []).append(host)
    return host


def _host_of_one(
    limits: Mapping[str, float], spec: ServiceSpec, context: ServiceContext, surroundings: HostSurroundings
) -> GatedHost:
    """Return the host of a service. Each kind is imported by the programs that use it."""
    if spec.options.shared:
        from sage._hosts.shared import SharedHost

        return SharedHost(spec, context, surroundings, make_job=partial(_shared_job, limits))
    if spec.command is not None:
        from sage._hosts.command import CommandHost

        return CommandHost(spec, context, surroundings)
    if spec.options.host == "process":
        from sage._hosts.process import ProcessHost

        return ProcessHost(spec, context, surroundings)
    from sage._hosts.inline import InlineHost

    return InlineHost(spec, context, surroundings)


def _shared_job(limits: Mapping[str, float], spec: ServiceSpec) -> Job:
    """Return a job that owns one service, for all environments that share it, and runs until it is asked to end."""
    graph = LogicalGraph(f"shared {spec.name}", {}, (), (spec,))
    job, _ = assemble(str(uuid.uuid4()), graph, None, ThreadsBackend(), limits, until_asked=True)
    return job
