"""The dispatcher: deploys one job on a backend, and shows it while it runs."""

from __future__ import annotations

import threading
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, Protocol

from sage._runtime.coroutines import CoroutineLoop
from sage._runtime.deployment import deploy, task_plans
from sage._runtime.lifecycle import CleanupDeferred, ExtendTimeout, ServiceDied, ServiceFailed, ServicePlan, begin
from sage._runtime.states import SERVICE_TERMINAL, TASK_TERMINAL
from sage._runtime.supervisor import Supervisor
from sage.errors import ServiceError, hint
from sage.service import Claims, ServiceContext

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from sage._plan.logical import ServiceSpec
    from sage._plan.physical import PhysicalPlan
    from sage._runtime.backend import Backend, Host
    from sage._runtime.lifecycle import Limits
    from sage._runtime.supervisor import Ended
    from sage._runtime.task import Task
    from sage.service import ServiceHandle


class Ties(Claims, Protocol):
    """Who learns of the claims of a job's services, and of the order in which they have to end."""

    def depends(self, service: str, requires: str) -> None:
        """Note that a service was seen to ask for another."""


class Dispatcher:
    """One job on one backend.

    Attributes:
        supervisor: what starts and stops everything of the job.
        plan: what runs.
        kept: the hosts that the job left to its environment; filled when it is sealed.
    """

    def __init__(
        self,
        plan: PhysicalPlan | None,
        services: tuple[ServiceSpec, ...],
        backend: Backend,
        make_host: Any,
        limits: Limits,
        on_sealed: Callable[[Ended], None],
        *,
        keep: frozenset[str] = frozenset(),
        adopted: Mapping[str, Host] = MappingProxyType({}),
        claims: Ties | None = None,
        until_asked: bool = False,
    ) -> None:
        self.plan = plan
        self._adopted = frozenset(adopted)
        self._claims = claims
        self._loop = CoroutineLoop(plan.name if plan is not None else "sage", backend)
        self._handles: dict[str, ServiceHandle[Any]] = {service.name: service.handle for service in services}
        self._specs = {service.name: service for service in services}
        self._dependencies = Dependencies()
        hosts = self._hosts(services, backend, make_host, adopted)
        tasks = self._tasks(plan, backend) if plan is not None else {}
        service_plans = tuple(
            ServicePlan(
                service.name,
                service.requires,
                hosts[service.name].options,
                keep=service.name in keep,
                adopted=hosts[service.name].hooks if service.name in adopted else None,
                own_hooks=hosts[service.name].own_hooks,
                local_hooks=hosts[service.name].local_hooks,
            )
            for service in services
        )
        state = begin(service_plans, task_plans(plan) if plan is not None else (), limits, until_asked=until_asked)
        self.supervisor = Supervisor(state, tasks, hosts, backend, self._loop, on_sealed)
        self._dependencies.tell = self._depends
        for service in services:
            if service.name in adopted:
                host = adopted[service.name]
                host.adopt(self._context(service), backend, self._loop, self._death_of(service.name))
            service.handle._connect(hosts[service.name].calls)

    def discard(self) -> None:
        """Free what was made for a job that does not begin; what it took over stays as it was."""
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

    def failed(self, service: str, incarnation: int, text: str) -> None:
        """Let the lifecycle know of a service that others supervise; its host calls this."""
        self.supervisor.post(ServiceFailed(service, incarnation, text))

    def extend(self, service: str, incarnation: int, seconds: float) -> None:
        """Give the hook of a service that runs more time; its context calls this."""
        self.supervisor.post(ExtendTimeout(service, incarnation, seconds))

    def forget(self) -> None:
        """Let go of users' functions, services and data; a job that has ended is remembered for long."""
        if self.plan is not None:
            self.plan = self.plan.outline()
        self.supervisor.forget()

    def _tasks(self, plan: PhysicalPlan, backend: Backend) -> dict[str, Task]:
        return deploy(plan, backend, self._loop, self._handles, self._report)

    def _depends(self, service: str, requires: str) -> None:
        self.supervisor.note_dependency(service, requires)
        if self._claims is not None:
            self._claims.depends(service, requires)

    def _report(self, event: Any) -> None:
        self.supervisor.post(event)

    def _hosts(
        self, services: tuple[ServiceSpec, ...], backend: Backend, make_host: Any, adopted: Mapping[str, Host]
    ) -> dict[str, Host]:
        hosts: dict[str, Host] = {}
        for service in services:
            if service.name in adopted:
                hosts[service.name] = adopted[service.name]
                continue
            died = self._death_of(service.name)
            try:
                hosts[service.name] = make_host(service, self._context(service), backend, self._loop, died)
            except BaseException:
                for name in hosts.keys() - adopted.keys():
                    hosts[name].close()
                raise
        return hosts

    def _context(self, service: ServiceSpec) -> ServiceContext:
        noted = self._dependencies.noted_by(service)
        return ServiceContext(service.name, self._handles, noted, self, self._claims)

    def _death_of(self, service: str) -> Callable[[int, str], None]:
        return lambda incarnation, text: self.supervisor.post(ServiceDied(service, incarnation, text))


def _untold(service: str, requires: str) -> None:
    """Stand for the supervisor until there is one; nothing asks for a service before."""


class Dependencies:
    """Which service was seen to ask for which other one, beside those that were declared."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._edges: set[tuple[str, str]] = set()
        self.tell: Callable[[str, str], None] = _untold

    def noted_by(self, service: ServiceSpec) -> Callable[[str], None]:
        """Return what a service's context calls with each service that it asks for."""
        for other in service.requires:
            self._edges.add((service.name, other))

        def note(name: str) -> None:
            edge = (service.name, name)
            if name == service.name or edge in self._edges:
                return
            with self._lock:
                path = self._path(name, service.name)
                if path:
                    text = f"services call each other in a circle: {' -> '.join((service.name, *path))}"
                    error = ServiceError(text, service=service.name)
                    raise hint(
                        error, "Two services that wait for each other can never end; let a third one serve both."
                    )
                self._edges.add(edge)
            self.tell(*edge)

        return note

    def _path(self, start: str, goal: str) -> tuple[str, ...]:
        if start == goal:
            return (start,)
        for a, b in sorted(self._edges):
            if a == start and (rest := self._path(b, goal)):
                return (start, *rest)
        return ()
