"""The driver's end of a remote job: it starts the master, shows the job while it runs, and hears how it ended."""

from __future__ import annotations

import logging
import os
import secrets
import sys
import threading
import time
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from sage._extras import load
from sage._hosts.replicas import with_replicas
from sage._logs import log_of
from sage._ray.actors import MasterActor
from sage._ray.connection import allow_references, is_connected, prepared, starts_own, within
from sage._ray.kept_cluster import WARM
from sage._ray.orders import JobLaunch, Pickled, SiteLaunch, SitePayload
from sage._ray.placement import DRIVER, SitePlan, by_task, service_place, sites_of
from sage._ray.processes import actor_name, named
from sage._ray.requests import DriverSide, MasterSide
from sage._ray.reservations import check_there, nodes_now
from sage._ray.shipping import front_of, outline, outlines, pickled_part, pickled_service
from sage._ray.site import Site
from sage._remote.rpc import RpcClosedError
from sage._remote.tcp import TcpRpcClient
from sage._runtime.job import Job
from sage._runtime.lifecycle import Limits, ServiceRecord, StopRequested, begin
from sage._runtime.states import SERVICE_TERMINAL, TASK_TERMINAL, JobState, ServiceState, StopMode, TaskState
from sage._runtime.supervisor import Ended
from sage.errors import JobError, ServiceUnavailableError, UnsupportedPlanError, describe, hint
from sage.observability import Event
from sage.report import Cleanliness, JobReport, Outcome
from sage.serving import bridge_among

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from contextlib import AbstractContextManager
    from enum import StrEnum

    from sage._plan.logical import LogicalGraph
    from sage._plan.physical import PhysicalPlan
    from sage._ray.connection import Connected
    from sage._remote.protocol import Address
    from sage._runtime.budget import BudgetLimits
    from sage.observability import HookEvent
    from sage.report import OperatorReport
    from sage.service import ServiceHandle

MASTER_START_S = 60.0
"""How long the master may take to get its place in the cluster."""

MASTER_STOP_S = 5.0
"""How long it may take when the job is to stop before it has begun."""

LOOK_S = 0.1

NEXT_MASTER_S = 30.0
"""How long the driver waits for the master that follows one that is gone."""

GONE_S = 10.0
"""How long the master may take to be gone when it was killed."""

COUNTS_BOUND_S = 5.0

log = log_of("sage.dispatcher")


@dataclass(frozen=True)
class RemoteSettings:
    """How a remote environment runs its jobs; see `RemoteEnvironment`."""

    address: str | None = None
    workers: int | None = None
    runtime_env: Mapping[str, object] | None = None
    on_driver_loss: str = "stop"
    start_timeout_s: float = 60.0
    budget: BudgetLimits | None = None


def check_supported(name: str, graph: LogicalGraph) -> None:
    """Refuse pipelines that cannot run on a cluster.

    Raises:
        UnsupportedPlanError: a service is to run in a way that a cluster does not have.
    """
    for spec in graph.services:
        options, what = spec.options, ""
        instead = 'On a cluster a service has its own process, or host="inline", in the driver.'
        bridge = bridge_among(spec.target, spec.args, dict(spec.kwargs))
        if options.shared:
            what = "is shared"
        elif options.recycles:
            what, instead = "is recycled", "Leave the recycle options out, or run the job with a LocalEnvironment."
        elif options.has_replicas and options.rate is not None:
            # Each process of the job has a front of its own, which would keep a rate of its own.
            what, instead = "has replicas and a rate", "Leave one of them out, or run the job with a LocalEnvironment."
        elif options.idle_stop_s is not None:
            what, instead = "has idle_stop_s", "Leave idle_stop_s out, or run the job with a LocalEnvironment."
        elif bridge is not None and bridge.streams:
            what, instead = "answers piece by piece", "Leave stream=True out, or serve it with a LocalEnvironment."
        if what:
            error = UnsupportedPlanError(f'service "{spec.name}" {what}, which environment "{name}" cannot run')
            raise hint(error, instead)


class RemoteJob(Job):
    """A job whose master runs in the cluster."""

    _remote: DriverSupervisor

    def operators(self) -> tuple[OperatorReport, ...]:
        """Return the counts of every operator as they stand; those of a moment ago if the master does not answer."""
        if self._report is not None:
            return self._report.operators
        return self._remote.operators()

    def _request(
        self, way: StopMode, reason: str, budget_s: float | None = None, hook_cap_s: float | None = None
    ) -> None:
        if self.is_running:
            self._reason = self._reason or reason
            self._remote.stop(way, reason, budget_s, hook_cap_s)

    def _fills(self) -> dict[str, float]:
        """Return nothing: the queues are elsewhere."""
        return {}

    def _calls_running(self) -> int:
        """Return nothing: the calls run elsewhere, and a signal waits for nobody."""
        return 0

    def _take_sealed(self, report: JobReport, error: Exception | None, ended: Ended) -> None:
        """Have the report that the master made."""
        self._take(replace(report, started_at=self._started[0]), error, ended)


@dataclass
class Seen:
    """Where something of the job is, as far as the driver has heard."""

    state: StrEnum


@dataclass
class SeenJob:
    """Where the job is, as far as the driver has heard; failures arrive with its end."""

    job: JobState = JobState.NEW
    failures: tuple[()] = ()
    tasks: dict[str, Seen] = field(default_factory=dict)
    services: dict[str, Seen] = field(default_factory=dict)


class RemoteDispatcher:
    """Shows a remote job while it runs, and leads to its supervisor's stand-in here."""

    def __init__(self, plan: PhysicalPlan, supervisor: DriverSupervisor) -> None:
        self.plan = plan
        self.supervisor = supervisor

    @property
    def tasks(self) -> dict[str, str]:
        """The tasks that have not ended, with their states."""
        tasks = self.supervisor.state.tasks
        return {name: str(one.state) for name, one in tuple(tasks.items()) if one.state not in TASK_TERMINAL}

    @property
    def services(self) -> dict[str, str]:
        """The services that have not ended, with their states."""
        services = self.supervisor.state.services
        return {name: str(one.state) for name, one in tuple(services.items()) if one.state not in SERVICE_TERMINAL}

    @property
    def is_running(self) -> bool:
        """Whether anything of the job has not ended."""
        return not self.supervisor.is_sealed

    def forget(self) -> None:
        """Let go of users' functions, services and data."""
        self.plan = self.plan.outline()


class DriverSupervisor(DriverSide):
    """Stands for the supervisor of a remote job in the driver: requests to it go to the master.

    Attributes:
        state: where everything is, as far as the driver has heard.
        events: every change of state so far.
        is_sealed: whether the job is over.
        listeners: called with every event as it is heard.
    """

    def __init__(self, job: RemoteJob, graph: LogicalGraph, launch: Launch) -> None:
        self.state = SeenJob()
        self.events: list[Event] = []
        self.is_sealed = False
        self.listeners: list[Callable[[Event | HookEvent], None]] = []
        self.hosts: dict[str, object] = {}
        self.backend = self
        self.runs_while_waited_for = False
        self._job = job
        self._launch = launch
        self._graph = graph
        self._handles: dict[str, ServiceHandle[object]] = {spec.name: spec.handle for spec in graph.services}
        self._actor: Any = None
        self._master: TcpRpcClient | None = None
        self._over = threading.Event()
        self._sealed: tuple[tuple[JobReport, Exception | None], dict[str, str]] | None = None
        self._is_ending = threading.Lock()
        self._pending: list[tuple[StopMode, str, float | None, float | None]] = []
        self._lock = threading.Lock()
        self.site = Site(
            DRIVER,
            launch.secret,
            launch.ip,
            launch.options,
            launch.by_task,
            lambda _: launch.driver_part,
            self._master_lost,
            further=((DriverSide, self),),
            handles=self._handles,
            stands_for=self,
            budget=launch.budget,
        )

    def handle_of(self, service: str) -> ServiceHandle[object] | None:
        return self._handles.get(service)

    def wait_for(self, condition: threading.Condition, is_over: Callable[[], bool], timeout_s: float | None) -> bool:
        """Wait for a condition; nothing else has to go on meanwhile."""
        with condition:
            return condition.wait_for(is_over, timeout_s)

    def ask_to_stop(self, drain: bool | None) -> None:
        """Ask for the end of the job, as `Job.stop` does."""
        self.stop(StopMode.of(drain), "stop() was called", None, None)

    def begin(self) -> None:
        """Start the master, which starts everything else."""
        try:
            self._actor, beginning = self._launch.start_master(self.site.listener.address)
            self._launch.wait_for_master(beginning, lambda: bool(self._pending))
        except BaseException as error:
            if self._sealed is None:
                # It is not killed, as it may just have begun: it ends by itself, with everything it has started, when
                # it finds that nobody listens here any more.
                self._actor = None
                self._end_without_report(error)

    def stop(self, way: StopMode, reason: str, budget_s: float | None, hook_cap_s: float | None) -> None:
        """Let the master end the job; if it is lost before it hears, the next one hears."""
        request = (way, reason, budget_s, hook_cap_s)
        with self._lock:
            master = self._master
            if master is None:
                self._pending.append(request)
                return
        try:
            master.ask(MasterSide.stop, int(way), reason, budget_s, hook_cap_s)
        except RpcClosedError:
            with self._lock:
                self._master = None if self._master is master else self._master
                self._pending.append(request)

    def post(self, event: StopRequested) -> None:
        """Let the master end the job."""
        self.stop(event.way, "", event.budget_s, event.hook_cap_s)

    def wait(self, _: object, timeout_s: float | None) -> bool:
        """Wait until the job is sealed and nothing of it runs, and return whether that is so."""
        return self._over.wait(timeout_s)

    def operators(self) -> tuple[OperatorReport, ...]:
        """Return the counts of every operator."""
        master = self._master
        try:
            if master is None:
                return ()
            return master.ask_within(COUNTS_BOUND_S, MasterSide.operators)
        except (RpcClosedError, TimeoutError):
            return ()

    # --- messages of the master ---

    def attach(self, master: Address, epoch: int, addresses: Mapping[str, Address]) -> None:
        self.site.attach(master, epoch, addresses)
        with self._lock:
            before, self._master = self._master, TcpRpcClient(master, self._launch.secret, {})
            pending, self._pending = self._pending, []
        if before is not None:
            before.close()
        for request in pending:
            self.stop(*request)

    def notice(self, event: Event | HookEvent) -> None:
        if isinstance(event, Event):
            self.events.append(event)
            match event.subject:
                case "job":
                    self.state.job = JobState(event.after)
                case "task":
                    self.state.tasks[event.name] = Seen(TaskState(event.after))
                case "service":
                    self.state.services[event.name] = Seen(ServiceState(event.after))
        for listener in self.listeners:
            listener(event)

    def sealed(self, ended: tuple[JobReport, Exception | None], services: dict[str, str]) -> bool:
        """Take in how the job ended, and return whether the master is taken away from here."""
        self._sealed = (ended, services)
        # Not on the thread of the request, whose answer the master waits for.
        threading.Thread(target=self._end, name="sage-remote-end", daemon=True).start()
        return is_connected()  # the program may have ended the connection

    def _master_lost(self) -> None:
        """Wait for the master that follows, within bounds."""
        if self._sealed is not None:
            return
        with self._lock:
            before, self._master = self._master, None
        if before is not None:
            before.close()
        self.site.cancel()
        epoch = self.site.epoch
        if self.site.wait_attached(epoch, NEXT_MASTER_S) or self._sealed is not None:
            return
        text = f'the master of job "{self._graph.name}" was lost, and none came after it'
        self._end_without_report(JobError(text, job=self._graph.name, fault="external"))

    # --- the end ---

    def _end(self) -> None:
        """Take the master away, close the connections here, and make it known that the job is over."""
        assert self._sealed is not None
        (report, error), services = self._sealed
        self._take_away()
        # One that followed another knows only of the services that were left.
        self._seal(report, error, {**dict.fromkeys(self._handles, "lost"), **services})

    def _end_without_report(self, error: BaseException) -> None:
        self._take_away()
        if not isinstance(error, JobError):
            text = f'the job "{self._graph.name}" could not be started in the cluster: {describe(error)}'
            failed = JobError(text, job=self._graph.name, fault="external")
            failed.__cause__ = error
            error = failed
        states = dict.fromkeys(self._handles, "lost")
        now = time.time()
        report = JobReport(
            self._job.id,
            self._graph.name,
            Outcome.FAILED,
            Cleanliness.DIRTY,
            str(error),
            now,
            now,
            0.0,
            errors=(error,),
        )
        self._seal(report, error, states)

    def _seal(self, report: JobReport, error: Exception | None, services: dict[str, str]) -> None:
        with self._is_ending:
            if self.is_sealed:
                return
            self.site.close()
            if self._master is not None:
                self._master.close()
            self._launch.close()
            self.is_sealed = True
        records = {name: ServiceRecord(ServiceState(state)) for name, state in services.items()}
        state = replace(begin((), (), Limits()), services=records)
        try:
            self._job._take_sealed(report, error, Ended(state, {}, {}))
        finally:
            self._over.set()

    def _take_away(self) -> None:
        """Kill the master, which has nothing left to do, and see that it is gone."""
        if self._actor is None:
            return
        self.site.let_master_go()
        self._launch.kill_master(self._actor)


class Launch:
    """Everything that a job needs to be started, made before anything is started.

    Args:
        graph: the user's pipeline, with places.
        plan: the physical plan.
        limits: the bounds of the stop that are not the default.
        settings: how the environment runs its jobs.
        connect: returns the connection of this process to a cluster, given an address or None.
    """

    def __init__(
        self,
        id_: str,
        graph: LogicalGraph,
        plan: PhysicalPlan,
        limits: Mapping[str, float],
        settings: RemoteSettings,
        connect: Callable[[str | None], AbstractContextManager[Connected]],
    ) -> None:
        self.id = id_
        self.secret = secrets.token_bytes(32)
        self.budget = settings.budget
        self._graph = graph
        self._plan = plan
        self._services = with_replicas(graph.services)
        self.options = {spec.name: spec.options for spec in outlines(graph.services)}
        self._limits = Limits(**limits)
        self._settings = settings
        self._stack = ExitStack()
        try:
            self._prepare(connect)
        except BaseException:
            self._stack.close()
            raise

    def close(self) -> None:
        """Let the connection to the cluster go."""
        self._stack.close()

    def start_master(self, driver: tuple[str, int]) -> tuple[Any, Any]:
        """Start the master, and return its actor and a reference to its answer that it has begun."""
        ray = load("ray", "ray")
        ends_itself = self._connected.ends_itself(self.id, self._limits.stop_timeout_s)
        order = JobLaunch(
            job=self.id,
            graph=outline(self._graph),
            plan=self._plan.outline(),
            services=outlines(self._services),
            limits=self._limits,
            secret=self.secret,
            sites=self._sites,
            driver=driver,
            started=time.time(),
            continues=self._settings.on_driver_loss == "continue",
            start_timeout_s=self._settings.start_timeout_s,
            level=_level(),
            runtime_env=self._runtime_env,
            ends_itself=ends_itself,
            budget=self.budget,
        )
        orders = {name: ray.put(self._site_order(name, part, driver)) for name, part in self._parts.items()}
        name = actor_name(self.id, "master")
        options = named(self.id, "master") | {"num_cpus": 0, "max_restarts": -1, "max_task_retries": -1}
        options["runtime_env"] = self._runtime_env
        # Beside the driver, so that the job depends on no machine more; one that follows it is started elsewhere.
        node, strategies = ray.get_runtime_context().get_node_id(), load("ray.util.scheduling_strategies", "ray")
        options["scheduling_strategy"] = strategies.NodeAffinitySchedulingStrategy(node, soft=True)
        actor = ray.remote(MasterActor).options(**options).remote(order, name)
        return actor, actor.begin.remote(orders)

    def wait_for_master(self, beginning: object, is_stopping: Callable[[], bool]) -> None:
        """Wait until the master has begun, not for long if the job is to stop anyway.

        Raises:
            ServiceUnavailableError: it did not come.
        """
        ray = load("ray", "ray")
        due = time.monotonic() + MASTER_START_S
        while not ray.wait([beginning], timeout=LOOK_S)[0]:
            if is_stopping():
                due = min(due, time.monotonic() + MASTER_STOP_S)
            if time.monotonic() > due:
                raise ServiceUnavailableError("the job master was not started in time")
        try:
            ray.get(beginning)
        except load("ray.exceptions", "ray").RayError as error:
            raise ServiceUnavailableError(f"the job master was not started: {describe(error)}") from error

    def kill_master(self, actor: object) -> None:
        """Take the master away; Ray starts no other. A cluster that is lost does not answer, and is not waited for."""
        if is_connected():  # or else a new Ray would be started for it
            within(GONE_S, lambda: load("ray", "ray").kill(actor, no_restart=True))

    # --- behind it ---

    def _prepare(self, connect: Callable[[str | None], AbstractContextManager[Connected]]) -> None:
        settings = self._settings
        fronts = tuple(front_of(spec) for spec in self._services if spec.options.has_replicas)
        instances = tuple(spec for spec in self._services if not spec.options.has_replicas)
        services = {spec.name: spec for spec in instances}
        workers_max = settings.workers or os.cpu_count() or 1
        is_own = starts_own(settings.address)
        if not is_own:
            self._connect(connect)
            allow_references()
            if settings.workers is None:
                workers_max = int(load("ray", "ray").cluster_resources().get("CPU", 1))
        self._sites: dict[str, SitePlan] = sites_of(self._plan, instances, workers_max)
        self.by_task = by_task(self._sites)
        # Everything is pickled before a cluster of its own is started, which takes seconds.
        self._parts = {
            name: pickled_part(self._plan, site, services, fronts)
            for name, site in self._sites.items()
            if name != DRIVER
        }
        beside = {name for site in self._sites.values() for name in site.services}
        self._parts |= {
            f"service {spec.name}": pickled_service(spec, fronts) for spec in instances if spec.name not in beside
        }
        at_driver = self._sites.get(DRIVER, SitePlan(DRIVER))
        self.driver_part = SitePayload(self._plan, tuple(services[name] for name in at_driver.services), fronts)
        if is_own:
            self._connect(connect)
        if is_own or settings.address == WARM:  # another one may grow
            places = {site.name: site.place for site in self._sites.values()}
            own = {
                f'service "{spec.name}"': service_place(spec) for spec in services.values() if spec.name not in beside
            }
            check_there(places | own, nodes_now())
        self._runtime_env = prepared(settings.runtime_env)
        allow_references()
        self.ip: str = load("ray.util", "ray").get_node_ip_address()

    def _connect(self, connect: Callable[[str | None], AbstractContextManager[Connected]]) -> None:
        self._connected: Connected = self._stack.enter_context(connect(self._settings.address))

    def _site_order(self, name: str, part: Pickled, driver: tuple[str, int]) -> SiteLaunch:
        path = tuple(os.path.abspath(place) for place in sys.path)
        secret, by_task, budget = self.secret, self.by_task, self.budget
        return SiteLaunch(self.id, name, secret, self.options, by_task, part, path, _level(), driver, budget)


def _level() -> int:
    return logging.getLogger("sage").getEffectiveLevel()


def remote_job(
    id_: str,
    graph: LogicalGraph,
    plan: PhysicalPlan,
    limits: Mapping[str, float],
    settings: RemoteSettings,
    connect: Callable[[str | None], AbstractContextManager[Connected]],
    interrupt_timeout_s: float,
) -> RemoteJob:
    """Return a job that nothing runs of yet but the connection to the cluster.

    Raises:
        GraphError: something of it cannot be sent to the cluster.
    """
    launch = Launch(id_, graph, plan, limits, settings, connect)
    job = RemoteJob(id_, graph, interrupt_timeout_s)
    job._remote = DriverSupervisor(job, graph, launch)
    # A job uses only those methods of its dispatcher that this one has, too.
    job.dispatcher = RemoteDispatcher(plan, job._remote)  # type: ignore[assignment]
    return job
