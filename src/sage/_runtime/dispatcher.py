"""The dispatcher: deploys one job on a backend, and shows it while it runs."""

from __future__ import annotations

import threading
from collections import deque
from dataclasses import replace
from functools import partial
from types import MappingProxyType
from typing import TYPE_CHECKING

from sage._runtime.backend import HostSurroundings
from sage._runtime.coroutines import CoroutineLoop
from sage._runtime.deployment import deploy, task_plans
from sage._runtime.lifecycle import CleanupDeferred, ExtendTimeout, ServiceDied, ServiceFailed, ServicePlan, begin
from sage._runtime.states import SERVICE_TERMINAL, TASK_TERMINAL
from sage._runtime.supervisor import Supervisor
from sage._runtime.task_restarts import TaskRestarts
from sage.errors import ServiceError, hint
from sage.service import ServiceContext, no_journal

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from sage._guardian.job_journal import JobJournal
    from sage._plan.logical import ServiceSpec
    from sage._plan.physical import PhysicalPlan
    from sage._runtime.backend import Backend, Host
    from sage._runtime.budget import Budget
    from sage._runtime.lifecycle import LifecycleEvent, Limits, TaskEvent
    from sage._runtime.supervisor import Ended
    from sage._runtime.task import Task
    from sage.durable import Restart
    from sage.service import ServiceHandle

    MakeHost = Callable[[ServiceSpec, ServiceContext, HostSurroundings], Host]
    Report = Callable[[TaskEvent], None]
    MakeTasks = Callable[
        [PhysicalPlan, Backend, CoroutineLoop, dict[str, ServiceHandle[object]], Report], dict[str, Task]
    ]


def prepare(
    plan: PhysicalPlan | None,
    services: tuple[ServiceSpec, ...],
    backend: Backend,
    make_host: MakeHost,
    limits: Limits,
    on_sealed: Callable[[Ended], None],
    *,
    make_tasks: MakeTasks = deploy,
    keep: frozenset[str] = frozenset(),
    adopted: Mapping[str, Host] = MappingProxyType({}),
    guard: JobJournal | None = None,
    budget: Budget | None = None,
    until_asked: bool = False,
    restart: Restart | None = None,
) -> Dispatcher:
    """Make everything of a job: its tasks, the hosts of its services, and their supervisor. Nothing runs yet.

    If something cannot be made, the hosts made before are freed, and the adopted ones stay as they were.

    Args:
        plan: the physical plan, or None for a job of services alone.
        services: its services, in the order of registration.
        backend: where its tasks run.
        make_host: makes the host of one service.
        limits: the bounds of its stop.
        on_sealed: called when all of it has ended.
        make_tasks: makes its tasks, as `deploy` does.
        keep: services that are left to the environment.
        adopted: hosts that an earlier job left to it.
        guard: watches over processes and claims.
        budget: what the job may use, or None.
        until_asked: whether a job without tasks goes on until it is asked to end.
        restart: how tasks start again after one has failed, or None.
    """
    job = Dispatcher(plan, services, backend, frozenset(adopted), guard, budget)
    hosts: dict[str, Host] = {}
    try:
        for service in services:
            name = service.name
            hosts[name] = adopted[name] if name in adopted else make_host(service, *job._around(service, backend))
        if plan is not None:
            job.make_tasks = partial(make_tasks, plan, backend, job._loop, job._handles, job._post)
        tasks = job.make_tasks()
    except BaseException:
        for name in hosts.keys() - adopted.keys():
            hosts[name].close()
        raise
    service_plans = tuple(_service_plan(service, hosts[service.name], keep, adopted) for service in services)
    state = begin(service_plans, task_plans(plan) if plan is not None else (), limits, until_asked=until_asked)
    state = replace(state, restarts=TaskRestarts(restart))
    job.supervisor = Supervisor(state, tasks, hosts, backend, job._loop, on_sealed)
    job._dependencies.tell = job._depends
    for service in services:
        if service.name in adopted:
            adopted[service.name].adopt(*job._around(service, backend))
        service.handle._connect(hosts[service.name].calls)
    return job


def _service_plan(service: ServiceSpec, host: Host, keep: frozenset[str], adopted: Mapping[str, Host]) -> ServicePlan:
    return ServicePlan(
        service.name,
        service.requires,
        host.options,
        keep=service.name in keep,
        adopted=host.hooks if service.name in adopted else None,
        own_hooks=host.own_hooks,
        local_hooks=host.local_hooks,
        front=service.front,
        spare=service.spare,
        exit_net_s=host.exit_net_s,
    )


class Dispatcher:
    """One job on one backend; `prepare` makes it.

    Attributes:
        supervisor: starts and stops everything of the job.
        plan: the physical plan.
        tokens: how many tokens services have told of: those of prompts, and those of completions.
        make_tasks: makes the tasks of the job, each time new ones.
    """

    supervisor: Supervisor
    make_tasks: Callable[[], dict[str, Task]] = dict

    def __init__(
        self,
        plan: PhysicalPlan | None,
        services: tuple[ServiceSpec, ...],
        backend: Backend,
        adopted: frozenset[str],
        guard: JobJournal | None,
        budget: Budget | None,
    ) -> None:
        self.plan = plan
        self._adopted = adopted
        self._budget = budget
        self._guard = guard
        self._loop = CoroutineLoop(plan.name if plan is not None else "sage", backend)
        self._handles: dict[str, ServiceHandle[object]] = {
            service.name: service.handle for service in services if not service.front
        }
        self._specs = {service.name: service for service in services}
        self._dependencies = Dependencies()
        self.tokens = (0, 0)
        self._lock = threading.Lock()

    def discard(self) -> None:
        """Free everything made for a job that does not begin; hosts that it took over stay as they were."""
        for name, host in self.supervisor.hosts.items():
            if name in self._adopted:
                host.release()
            else:
                host.close()
                host.spec.handle._connect(None)
        self._loop.close()

    @property
    def tasks(self) -> dict[str, str]:
        """The tasks that have not ended, with their states."""
        return {
            name: str(record.state)
            for name, record in self.supervisor.state.tasks.items()
            if record.state not in TASK_TERMINAL
        }

    @property
    def services(self) -> dict[str, str]:
        """The services that have not ended, with their states."""
        return {
            name: str(record.state)
            for name, record in self.supervisor.state.services.items()
            if record.state not in SERVICE_TERMINAL
        }

    @property
    def is_running(self) -> bool:
        """Whether anything of the job has not ended."""
        return not self.supervisor.is_sealed

    def deferred(self, service: str, incarnation: int) -> None:
        """Let the lifecycle know that a service has something to clean up; its context calls this."""
        self.supervisor.post(CleanupDeferred(service, incarnation))

    def extend(self, service: str, incarnation: int, seconds: float) -> None:
        """Give the hook of a service that runs more time; its context calls this."""
        self.supervisor.post(ExtendTimeout(service, incarnation, seconds))

    def used(self, service: str, prompt_tokens: int, completion_tokens: int) -> None:
        """Count the tokens of an answer; the context of a service calls this."""
        service = self._specs[service].front or service
        with self._lock:
            self.tokens = (self.tokens[0] + prompt_tokens, self.tokens[1] + completion_tokens)
        if self._budget is not None:
            self._budget.used(service, prompt_tokens, completion_tokens)
        host = self.supervisor.hosts.get(service)
        if host is not None:
            host.used(prompt_tokens + completion_tokens)

    def claim(self, service: str, entry: dict[str, object]) -> None:
        """Record a thing to reap if the service is lost; its context calls this."""
        if self._guard is None:
            raise no_journal(service, entry)
        self._guard.claim(service, entry)

    def note_dependency(self, service: str, other: str) -> None:
        """Note that a service of another process asked for another; see `Dependencies`."""
        self._dependencies.noted_by(self._specs[service])(other)

    def forget(self) -> None:
        """Let go of users' functions, services and data; a job that has ended is remembered for long."""
        if self.plan is not None:
            self.plan = self.plan.outline()
        self._handles, self._specs, self._guard = {}, {}, None
        self.make_tasks = dict
        self.supervisor.forget()

    def _depends(self, service: str, requires: str) -> None:
        self.supervisor.note_dependency(service, requires)
        if self._guard is not None:
            self._guard.depends(service, requires)

    def _post(self, event: LifecycleEvent) -> None:
        self.supervisor.post(event)

    def _around(self, service: ServiceSpec, backend: Backend) -> tuple[ServiceContext, HostSurroundings]:
        """Return the parts of the job that a service and its host work with."""
        name = service.name
        surroundings = HostSurroundings(
            backend,
            self._loop,
            self._handles,
            self,
            lambda incarnation, text: self.supervisor.post(ServiceDied(name, incarnation, text)),
            lambda incarnation, text: self.supervisor.post(ServiceFailed(name, incarnation, text)),
            self._guard,
            permit=None if self._budget is None else self._budget.permit(name),
        )
        return ServiceContext(name, self._handles, self._dependencies.noted_by(service), self), surroundings


def _untold(service: str, requires: str) -> None:
    """Stand for the supervisor until there is one; nothing asks for a service before."""


class Dependencies:
    """Which service was seen to ask for which other one, beside those that were declared."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._edges: dict[str, set[str]] = {}
        self.tell: Callable[[str, str], None] = _untold

    def noted_by(self, service: ServiceSpec) -> Callable[[str], None]:
        """Return the function that a service's context calls with each service that it uses."""
        near = self._edges.setdefault(service.name, set())
        near.update(service.requires)

        def note(name: str) -> None:
            if name == service.name or name in near:
                return
            with self._lock:
                path = self._path(name, service.name)
                if path:
                    text = f"services call each other in a circle: {' -> '.join((service.name, *path))}"
                    error = ServiceError(text, service=service.name)
                    raise hint(
                        error,
                        "Two services that wait for each other can never end; move the shared part into a third one.",
                    )
                near.add(name)
            self.tell(service.name, name)

        return note

    def _path(self, start: str, goal: str) -> tuple[str, ...]:
        """Return the shortest way from one service to another, or nothing."""
        came_from, todo = {start: ""}, deque([start])
        while todo and goal not in came_from:
            here = todo.popleft()
            for other in sorted(self._edges.get(here, set()) - came_from.keys()):
                came_from[other] = here
                todo.append(other)
        path, here = [], goal if goal in came_from else ""
        while here:
            path.append(here)
            here = came_from[here]
        return tuple(reversed(path))
