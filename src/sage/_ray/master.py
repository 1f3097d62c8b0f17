"""The job master: the supervisor of a job, in a process that outlives the driver long enough to clean up."""

from __future__ import annotations

import os
import secrets
import threading
import time
from contextlib import suppress
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Unpack, cast

from sage._backends.threads import ThreadsBackend
from sage._logs import log_of
from sage._ray.hosts import Callers, RemoteFront, RemoteHost, RemoteReplica
from sage._ray.links import SiteClient, in_parallel
from sage._ray.placement import DRIVER, by_task, service_place
from sage._ray.requests import DriverSide, MasterSide, SiteSide
from sage._remote.errors import sendable
from sage._remote.protocol import served
from sage._remote.tcp import TcpRpcServer
from sage._runtime.budget import Budget
from sage._runtime.deployment import task_names
from sage._runtime.dispatcher import prepare
from sage._runtime.lifecycle import StopRequested, TaskEnded, TaskFailed
from sage._runtime.outcome import operator_reports, seal, to_raise
from sage._runtime.states import SERVICE_TERMINAL, TASK_TERMINAL, StopMode, TaskState
from sage.errors import JobError, JobErrorGroup, ServiceUnavailableError, describe, hint
from sage.observability import Event, HookEvent, OperatorMetrics
from sage.records import BatchReading
from sage.report import Cleanliness, Outcome, TaskReport

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Mapping

    from sage._plan.logical import Node, ServiceSpec
    from sage._plan.physical import PhysicalPlan
    from sage._ray.hosts import Counts
    from sage._ray.orders import JobLaunch, TaskCounts
    from sage._ray.placement import SitePlan
    from sage._ray.processes import ClusterMemory, Knowledge, LeftService, RayCluster
    from sage._remote.protocol import Address
    from sage._runtime.backend import Host, HostSurroundings
    from sage._runtime.lifecycle import LifecycleEvent, TaskEvent
    from sage._runtime.supervisor import Ended
    from sage._runtime.task import Task
    from sage.report import JobReport, OperatorReport
    from sage.service import ServiceContext

WHERE_BOUND_S = 0.5
COUNTS_BOUND_S = 2.0

GATHER_S = 0.2
"""How often the counts of all tasks are gathered if the failures of the job are limited."""

LEFT_S = 15.0
"""How long a constructor that was running when a master was lost may take to end."""

TELL_DRIVER_S = 10.0
"""How long the driver may take to hear that the job is over."""

log = log_of("sage.dispatcher")


class RemoteOperator:
    """The counts of an operator in a task of another process, as they were last heard of."""

    def __init__(self, node: Node) -> None:
        self.node = node
        self.metrics = OperatorMetrics(node.name)


class RemoteTask:
    """A task of another process, as the supervisor sees it."""

    inbox = None

    def __init__(self, name: str, nodes: tuple[Node, ...], link: SiteClient) -> None:
        self.name = name
        self.nodes = nodes
        self.operators = tuple(RemoteOperator(node) for node in nodes)
        self.span = BatchReading()
        self.undelivered = 0
        self.waited_s = 0.0
        self.link = link

    def where(self) -> str:
        """Return where its thread stands, for a person."""
        try:
            return self.link.ask_within(WHERE_BOUND_S, SiteSide.where, self.name)
        except (ServiceUnavailableError, TimeoutError):
            return f"{self.link.name} (process {self.link.pid}) does not say where it stands"

    def request_open(self) -> None:
        self.link.tell(SiteSide.open_task, self.name)

    def request_run(self) -> None:
        self.link.tell(SiteSide.run_task, self.name)

    def request_stop(self) -> None:
        """End the source, or a loop that begins here."""
        self.link.tell(SiteSide.stop_task, self.name)

    def request_hold_back(self) -> None:
        """Begin no further call of a costly function."""
        self.link.tell(SiteSide.hold_back_task, self.name)

    @property
    def calls_running(self) -> int:
        return 0

    def request_cancel(self) -> None:
        self.link.tell(SiteSide.cancel_task, self.name)

    def take_counts(self, counts: TaskCounts) -> None:
        self.undelivered, self.waited_s = counts.undelivered, counts.waited_s
        by_node = {one.node: one for one in counts.operators}
        for operator in self.operators:
            count, metrics = by_node[operator.node.id], operator.metrics
            metrics.records_in, metrics.records_out = count.records_in, count.records_out
            metrics.failed, metrics.busy_s, metrics.full_s = count.failed, count.busy_s, count.full_s


class MasterBackend(ThreadsBackend):
    """Runs the supervisor; its tasks run in other processes."""

    def start_task(self, supervisor: object, task: Task) -> None:
        """Do nothing: the process of the task starts it when it is told to open it."""

    def where(self, task: Task) -> str:  # noqa: ARG002
        """Return nothing: the task itself knows."""
        return ""

    def join_tasks(self, tasks: list[Task]) -> None:
        """Do nothing: the processes end."""


class Master(MasterSide):
    """Starts the processes of a job, drives its lifecycle, ends everything, and reports the outcome to the driver.

    Args:
        order: the job.
        cluster: where processes run.
        memory: where the next master finds this one's knowledge.
        ip: the address of this machine.
        on_over: called when only this process of the job is left, with whether the driver takes that away.
        on_followed: called when another master has followed this one, which was considered dead.
        known: the knowledge of the previous master, or None for the first.
    """

    def __init__(
        self,
        order: JobLaunch,
        cluster: RayCluster,
        memory: ClusterMemory,
        ip: str,
        on_over: Callable[[bool], None],
        on_followed: Callable[[], None],
        known: Knowledge | None = None,
    ) -> None:
        self._order = order
        self._cluster = cluster
        self._memory = memory
        self._before = known
        self._epoch = 1 if known is None else known["epoch"] + 1
        self._known: Knowledge = {"epoch": self._epoch, "pid": os.getpid(), "services": {}}
        self._writing = threading.Lock()
        self._on_over = on_over
        self._on_followed = on_followed
        self._began_at = time.monotonic()
        self._reason = ""
        self._orders: Mapping[str, object] = {}
        self._is_driver_there = True
        self.is_cluster_lost = False
        self._has_started = True
        self._beginning = threading.Lock()
        self._has_begun = known is not None
        self._is_given_up = False
        self._own: dict[str, SiteClient] = {}
        self._backend = MasterBackend()
        self._callers = Callers()
        names = {*order.sites, DRIVER}
        self._links = {name: self._new_link(name) for name in names}
        self._is_ready = threading.Event()
        self._gathering = threading.Lock()
        self._is_sealing = threading.Event()
        # One that follows another has no tasks, whose calls it could count.
        self._budget: Budget | None = None
        if order.budget is not None and known is None:
            warn = log_of("sage.job", {"job": order.job}).warning
            self._budget = Budget(order.budget, lambda why: self.stop(StopMode.STOP, why, None, None), warn)

        self._listener = TcpRpcServer(
            ip, order.secret, served((MasterSide, self)), {}, "master", lambda _: self._is_ready.wait()
        )
        adopted = {} if known is None else self._adopt(known["services"])
        self._dispatcher = prepare(
            order.plan if known is None else None,
            order.services if known is None else left_of(order.services, adopted),
            self._backend,
            self._host_of,
            order.limits,
            self._sealed,
            make_tasks=self._tasks_of,
            adopted=adopted,
            budget=self._budget,
        )
        self._dispatcher.supervisor.listeners.append(self._note)
        self._is_ready.set()

    def _tasks_of(self, plan: PhysicalPlan, *_: object) -> dict[str, Task]:
        sites = by_task(self._order.sites)
        # The supervisor treats a task elsewhere like a local one.
        return {
            name: cast("Task", RemoteTask(name, chain.nodes, self._links[sites[name]]))
            for chain in plan.chains
            for name in task_names(chain)
        }

    @property
    def address(self) -> Address:
        """Where it listens."""
        return self._listener.address

    def wait_for_begin(self) -> None:
        """Watch the driver from now on; `begin` does nothing, and this process goes, if it is gone before."""
        try:
            self._links[DRIVER].reach(self._order.driver)
        except ServiceUnavailableError as error:
            self._links[DRIVER].give_up(str(error))

    def begin(self, orders: Mapping[str, object]) -> None:
        """Start everything, given the order of each site, or its reference in the cluster, by its name.

        Raises:
            ServiceUnavailableError: the driver is gone.
        """
        with self._beginning:
            if self._is_given_up:
                raise ServiceUnavailableError("the driver is gone")
            self._has_begun = True
        self._orders = orders
        self._memory.write(self._known)
        self._cluster.watch(self._cluster_lost)
        self._listener.begin()
        threading.Thread(target=self._start, name="sage-start", daemon=True).start()

    def take_over(self) -> None:
        """End in order the services that the previous master has left; the workers have ended with it."""
        assert self._before is not None
        log.error("master lost pid=%s, epoch %d takes over", self._before["pid"], self._epoch)
        self._memory.write({"epoch": self._epoch, "pid": os.getpid(), "services": self._before["services"]})
        self._cluster.watch(self._cluster_lost)
        self._dispatcher.supervisor.begin()
        for host in (self._host(name) for name in self._dispatcher.supervisor.hosts):
            if host.link is not None and host.link.is_gone:
                host.died(host.link, "its process has ended")

    def _adopt(self, left: Mapping[str, LeftService]) -> dict[str, Host]:
        """Follow the master that was lost: return the hosts of services of which there may be an instance.

        A process that was never told to build one is ended at once.
        """
        self._listener.begin()
        driver = self._links[DRIVER]
        self._reach(driver, self._order.driver, {DRIVER: self._order.driver})
        at_driver = self._order.sites[DRIVER].services if DRIVER in self._order.sites else ()
        adopted: dict[str, Host] = {}

        def adopt(spec: ServiceSpec) -> None:
            known: LeftService = left.get(spec.name, {})
            link = driver
            if spec.name not in at_driver:
                process = self._cluster.find(known["site"], known["cookie"])
                address = known["address"]
                if address is None:
                    if process is not None:
                        process.kill()
                    return
                link = self._own[f"service {spec.name}"] = self._new_link(known["site"])
                link.process, link.pid = process, known["pid"]
                self._reach(link, (address[0], address[1]), {})  # a list, as JSON has no tuples
            incarnation, hooks = known.get("incarnation", 1), frozenset(known.get("hooks", ()))
            with suppress(ServiceUnavailableError, TimeoutError):  # it is gone, or its constructor hangs
                incarnation, hooks = link.ask_within(LEFT_S, SiteSide.left, spec.name)
            if incarnation:
                host = self._new_host(spec, lambda *_: None)
                host.take_over(link, incarnation, hooks)
                adopted[spec.name] = host

        specs = [spec for spec in self._order.services if "site" in left.get(spec.name, ()) or spec.name in at_driver]
        for error in in_parallel([partial(adopt, spec) for spec in specs]):
            log.error("service not taken over: %s", describe(error))
        return adopted

    def _reach(self, link: SiteClient, address: Address, addresses: dict[str, Address]) -> None:
        try:
            link.reach(address)
            link.attach(self.address, self._epoch, addresses)
        except ServiceUnavailableError as error:
            link.give_up(str(error))

    # --- the knowledge for the next master ---

    def _note(self, event: Event | HookEvent) -> None:
        """Tell the driver of an event, and store the part that the next master would need."""
        self._links[DRIVER].tell(DriverSide.notice, event)
        with suppress(ServiceUnavailableError):  # of a cluster that is lost; another master will not come
            if isinstance(event, HookEvent):
                if event.report.hook == "build" and event.report.outcome == "ok":
                    self._keep(event.service, hooks=sorted(self._host(event.service).hooks))
            elif event.subject == "service" and event.after in SERVICE_TERMINAL:
                self._keep(event.name, is_over=True)

    def _keep(self, service: str, *, is_over: bool = False, **facts: Unpack[LeftService]) -> None:
        if self._before is not None or self.is_cluster_lost:
            return  # the first one's entry is valid for all later ones
        with self._writing:
            services = self._known["services"]
            if is_over:
                services.pop(service, None)
            else:
                services.setdefault(service, {}).update(facts)
            self._memory.write(self._known)

    # --- processes ---

    def _new_link(self, name: str) -> SiteClient:
        link = SiteClient(name, self._order.secret, self._backend.lane(name), self._gone, self._on_followed)
        self._callers.add(link)
        return link

    def _start(self) -> None:
        """Let the driver and this process watch each other; not before that is anything started."""
        errors = in_parallel([lambda: self._links[DRIVER].attach(self.address, self._epoch, {})])
        if self._budget is not None:
            self._budget.begin(self._dispatcher.supervisor, max(0.0, time.time() - self._order.started))
        self._dispatcher.supervisor.begin()
        if self._order.budget is not None and self._order.budget.failures is not None:
            threading.Thread(target=self._gather_often, name="sage-counts", daemon=True).start()
        if errors:
            self._start_failed(errors)
        else:
            self._start_sites()

    def _start_sites(self) -> None:
        """Start the processes that run tasks, and let them know each other."""
        order = self._order

        def begin(site: SitePlan) -> None:
            link = self._links[site.name]
            if site.name == DRIVER:
                return
            process = self._cluster.start(
                site.name, self._orders[site.name], site.place, secrets.token_hex(8), outlives_master=False
            )
            link.begin(process, order.start_timeout_s)

        errors = in_parallel([partial(begin, site) for site in order.sites.values()])
        addresses = {name: link.address for name, link in self._links.items() if link.address is not None}
        if not errors:
            # The driver first: as soon as all others are there, records flow.
            errors = in_parallel([lambda: self._links[DRIVER].ask(SiteSide.meet, addresses)])
        if not errors:
            links = [link for link in self._links.values() if link.name != DRIVER]
            errors = in_parallel([partial(link.attach, self.address, self._epoch, addresses) for link in links])
        if errors:
            self._start_failed(errors)

    def _start_failed(self, errors: list[BaseException]) -> None:
        self._has_started = False
        for error in errors:
            failed = JobError(f"a process of the job could not be started: {describe(error)}", fault="external")
            failed.__cause__ = error
            first = next(iter(self._dispatcher.supervisor.tasks))
            self._post(TaskFailed(first, failed))
        for name, link in self._links.items():
            if name != DRIVER:
                link.give_up("it could not be started")

    def _host_of(self, spec: ServiceSpec, _: ServiceContext, surroundings: HostSurroundings) -> Host:
        return self._new_host(spec, surroundings.on_died)

    def _new_host(self, spec: ServiceSpec, on_died: Callable[[int, str], None]) -> RemoteHost:
        sites = self._order.sites.values()
        link = next((self._links[site.name] for site in sites if spec.name in site.services), None)
        kind = RemoteFront if spec.options.has_replicas else RemoteReplica if spec.front else RemoteHost
        return kind(spec, self._backend, on_died, link, self._start_service, self._callers, self._take_counts)

    def _start_service(self, spec: ServiceSpec, incarnation: int) -> SiteClient:
        name = f"service {spec.name}" + (f" {incarnation}" if incarnation > 1 else "")
        link = self._own[name] = self._new_link(name)
        order = self._orders[f"service {spec.name}"]

        def bring_up(timeout_s: float) -> None:
            # Known before it is made, so that a master that follows finds it whenever this one ends.
            cookie = secrets.token_hex(8)
            self._keep(spec.name, site=name, cookie=cookie, incarnation=incarnation, address=None, hooks=[])
            process = self._cluster.start(name, order, service_place(spec), cookie, outlives_master=True)
            began = link.begin(process, timeout_s)
            self._keep(spec.name, address=began.address, pid=began.pid, hooks=["exit"])
            link.attach(self.address, self._epoch, {})

        link.bring_up = bring_up
        return link

    def _gone(self, link: SiteClient, why: str) -> None:
        """Take in that a process has ended that should not have."""
        if link.name == DRIVER and self._is_sealing.is_set():  # it has heard of the end, or `_hand_over` finds out
            self._is_driver_there = False
            return
        log.error("process gone site=%r why=%s", link.name, why)
        if not self._is_ready.is_set():  # `take_over` sees it
            self._is_driver_there = self._is_driver_there and link.name != DRIVER
            return
        supervisor = self._dispatcher.supervisor
        for host in supervisor.hosts.values():
            if isinstance(host, RemoteHost):
                host.died(link, why)
        if link.name == DRIVER:
            self._is_driver_there = False
            with self._beginning:
                self._is_given_up = not self._has_begun
            if self._is_given_up:
                threading.Thread(target=self._on_over, args=(False,), name="sage-over", daemon=True).start()
                return
            if not self._order.continues:
                self._reason = "the driver is gone"
                self._post(StopRequested(StopMode.CANCEL))
        tasks = [task for task in supervisor.tasks.values() if cast("RemoteTask", task).link is link]
        going = [task for task in tasks if supervisor.state.tasks[task.name].state not in TASK_TERMINAL]
        if going and link.name != DRIVER and self._has_started:
            listed = ", ".join(f'"{task.name}"' for task in going)
            error = JobError(f"{link.name} was lost with {listed}: {why}", fault="external")
            self._post(TaskFailed(going[0].name, hint(error, "Records on their way there are lost with it.")))
        for task in going:
            self._post(TaskEnded(task.name, TaskState.FAILED))

    def _cluster_lost(self, why: str) -> None:
        """End the job while its processes are still there, over the connections of its own."""
        log.error("cluster lost why=%s", why)
        self.is_cluster_lost = True
        text = f'the cluster of job "{self._order.graph.name}" is lost: {why}'
        error = hint(JobError(text, job=self._order.graph.name, fault="external"), "Is its head node up?")
        self._post(TaskFailed(next(iter(self._dispatcher.supervisor.tasks), ""), error))

    # --- requests of others ---

    def where_is(self, service: str, gone: Address | None) -> Address:
        """Return where a service is; see `MasterSide`, also for the other requests."""
        return self._host(service).where_is(gone)

    def depends(self, service: str, other: str) -> None:
        """Note that a service asked for another."""
        self._dispatcher.note_dependency(service, other)

    def service_died(self, service: str, incarnation: int, text: str) -> None:
        self._host(service).command_died(incarnation, text)

    def deferred(self, service: str, incarnation: int) -> None:
        self._dispatcher.deferred(service, incarnation)

    def permit(self, service: str) -> None:
        """Count a call that is about to begin."""
        permit = None if self._budget is None else self._budget.permit(service)
        if permit is not None:
            permit()

    def used(self, service: str, prompt_tokens: int, completion_tokens: int) -> None:
        if self._budget is not None:
            self._budget.used(self._host(service).spec.front or service, prompt_tokens, completion_tokens)

    def extend(self, service: str, incarnation: int, seconds: float) -> None:
        self._dispatcher.extend(service, incarnation, seconds)

    def task_event(self, event: TaskEvent, counts: TaskCounts | None) -> None:
        """Take in a change of a task."""
        if event.task not in self._dispatcher.supervisor.tasks:
            return  # of a master before this one
        task = cast("RemoteTask", self._dispatcher.supervisor.tasks[event.task])
        if counts is not None:
            task.take_counts(counts)
        self._post(event)

    def stop(self, way: int, reason: str, budget_s: float | None, hook_cap_s: float | None) -> None:
        self._reason = self._reason or reason
        self._post(StopRequested(StopMode(way), budget_s, hook_cap_s))

    def operators(self) -> tuple[OperatorReport, ...]:
        self._gather_counts()
        return operator_reports(self._dispatcher, self._order.graph)

    def _host(self, service: str) -> RemoteHost:
        return cast("RemoteHost", self._dispatcher.supervisor.hosts[service])

    def _post(self, event: LifecycleEvent) -> None:
        self._dispatcher.supervisor.post(event)

    def _gather_counts(self) -> None:
        def gather(link: SiteClient) -> None:
            tasks, services = link.ask_within(COUNTS_BOUND_S, SiteSide.counts)
            for name, counts in tasks.items():
                cast("RemoteTask", self._dispatcher.supervisor.tasks[name]).take_counts(counts)
            self._take_counts(link, services)

        links = [link for link in self._links.values() if link.address is not None and not link.is_gone]
        with self._gathering:  # so that no older counts arrive after newer ones
            in_parallel([partial(gather, link) for link in links])

    def _take_counts(self, link: SiteClient, services: Mapping[str, Counts]) -> None:
        for name, counts in services.items():
            if name in self._dispatcher.supervisor.hosts:  # a master that follows another one has no fronts
                self._host(name).take_counts(link.name, counts)

    def _gather_often(self) -> None:
        """Have recent counts for the budget, which compares failures with records."""
        while not self._is_sealing.wait(GATHER_S):
            self._gather_counts()

    # --- the end ---

    def _sealed(self, ended: Ended) -> None:
        """End the processes, make the report, and hand it over; the supervisor's last act."""
        self._is_sealing.set()
        self._gather_counts()
        workers = [link for name, link in self._links.items() if name != DRIVER]
        in_parallel([link.end for link in (*workers, *self._own.values())])
        started = (self._order.started, self._began_at)
        report = seal(ended, self._dispatcher, self._order.graph, self._order.job, started, self._reason)
        error = to_raise(report, ended.state.failures)
        if self._before is not None:
            report, error = after_loss(report, self._before["pid"], self._order.plan)
        if not self.is_cluster_lost:
            self._memory.clear()
        states = {name: str(record.state) for name, record in ended.state.services.items()}
        sealed = sendable((report, error))
        threading.Thread(target=self._hand_over, args=(sealed, states), name="sage-over", daemon=True).start()

    def _hand_over(self, sealed: tuple[JobReport, Exception | None], states: dict[str, str]) -> None:
        driver = self._links[DRIVER]
        is_taken_away = False
        if self._is_driver_there:
            try:
                driver.flush()
                is_taken_away = driver.ask_within(TELL_DRIVER_S, DriverSide.sealed, sealed, states)
            except (ServiceUnavailableError, TimeoutError) as error:
                log.error("driver not told: %s", describe(error))
        self._on_over(is_taken_away)


def left_of(services: tuple[ServiceSpec, ...], names: Collection[str]) -> tuple[ServiceSpec, ...]:
    """Return the services of these names, depending on each other only."""
    return tuple(
        replace(
            spec, options=replace(spec.options, depends_on=[name for name in spec.requires if name in names]), front=""
        )
        for spec in services
        if spec.name in names
    )


def after_loss(report: JobReport, pid: int, plan: PhysicalPlan) -> tuple[JobReport, Exception]:
    """Return the report of a job whose master was lost, from the next master's report, and the error to raise."""
    text = f'the master of job "{report.name}" was lost: process {pid} ended by itself'
    lost = JobError(text, job=report.name, fault="external")
    hint(lost, "Its tasks ended with it, and the next master stopped its services.")
    errors = (lost, *report.errors)
    tasks = tuple(TaskReport(name, "lost") for chain in plan.chains for name in task_names(chain))
    dirty = Cleanliness.DIRTY
    report = replace(report, state=Outcome.FAILED, cleanliness=dirty, why=text, errors=errors, tasks=tasks)
    return report, lost if len(errors) == 1 else JobErrorGroup(text, errors, job=report.name)
