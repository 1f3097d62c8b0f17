"""The job master: the supervisor of a job, in a process that outlives the driver long enough to clean up."""

from __future__ import annotations

import os
import threading
import time
from contextlib import suppress
from dataclasses import replace
from typing import TYPE_CHECKING, Any, cast

from sage._backends.threads import ThreadsBackend
from sage._logs import log_of
from sage._ray.errors import PackedError, pack, unpack
from sage._ray.hosts import RemoteHost
from sage._ray.links import SiteLink, in_parallel
from sage._ray.mesh import Listener
from sage._ray.placement import DRIVER, service_place
from sage._runtime.deployment import task_names
from sage._runtime.dispatcher import Dispatcher
from sage._runtime.lifecycle import StopRequested, TaskEnded, TaskFailed
from sage._runtime.outcome import operator_reports, seal, to_raise
from sage._runtime.states import SERVICE_TERMINAL, TASK_TERMINAL, TaskState, Way
from sage.errors import JobError, JobErrorGroup, ServiceUnavailableError, describe, hint
from sage.observability import Event, HookEvent, OperatorMetrics
from sage.records import Span
from sage.report import Cleanliness, Outcome, TaskReport

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from sage._plan.logical import Node, ServiceSpec
    from sage._plan.physical import PhysicalPlan
    from sage._ray.mesh import Address
    from sage._ray.orders import JobOrder, TaskCounts
    from sage._ray.placement import Site
    from sage._ray.processes import Cluster, Memory
    from sage._runtime.backend import Backend, Host
    from sage._runtime.lifecycle import TaskEvent
    from sage._runtime.supervisor import Ended
    from sage._runtime.task import Task
    from sage.report import JobReport, OperatorReport

WHERE_BOUND_S = 0.5
COUNTS_BOUND_S = 2.0

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

    def __init__(self, name: str, nodes: tuple[Node, ...], link: SiteLink) -> None:
        self.name = name
        self.nodes = nodes
        self.operators = tuple(RemoteOperator(node) for node in nodes)
        self.span = Span()
        self.undelivered = 0
        self.link = link

    def where(self) -> str:
        """Return where its thread stands, for a person."""
        try:
            stack: str = self.link.ask("where", self.name, timeout_s=WHERE_BOUND_S)
        except (ServiceUnavailableError, TimeoutError):
            return f"{self.link.name} (process {self.link.pid}) does not say where it stands"
        return stack

    def request_open(self) -> None:
        """Let the task build and open its functions."""
        self.link.tell("task", self.name, "open")

    def request_run(self) -> None:
        """Let records flow."""
        self.link.tell("task", self.name, "run")

    def request_stop(self) -> None:
        """End the source, or a loop that begins here."""
        self.link.tell("task", self.name, "stop")

    def request_cancel(self) -> None:
        """Drop everything and close."""
        self.link.tell("task", self.name, "cancel")

    def take_counts(self, counts: TaskCounts) -> None:
        """Take in the counts of the task."""
        self.undelivered = counts.undelivered
        by_node = {one.node: one for one in counts.operators}
        for operator in self.operators:
            count, metrics = by_node[operator.node.id], operator.metrics
            metrics.records_in, metrics.records_out = count.records_in, count.records_out
            metrics.failed, metrics.busy_s = count.failed, count.busy_s


class MasterBackend(ThreadsBackend):
    """Runs the supervisor; its tasks run in other processes."""

    def start_task(self, supervisor: Any, task: Task) -> None:
        """Do nothing: the process of the task starts it when it is told to open it."""

    def where(self, task: Task) -> str:  # noqa: ARG002
        """Return nothing: the task itself knows."""
        return ""

    def join_tasks(self, tasks: list[Task]) -> None:
        """Do nothing: the processes end."""


class MasterDispatcher(Dispatcher):
    """Deploys a job whose tasks and services run in other processes."""

    def __init__(self, links: dict[str, SiteLink], sites: dict[str, str], *args: Any, **kwargs: Any) -> None:
        self._links = links
        self._sites = sites
        super().__init__(*args, **kwargs)

    def note_dependency(self, service: str, other: str) -> None:
        """Note that a service asked for another; see `Dependencies`."""
        spec = next(spec for name, spec in self._specs.items() if name == service)
        self._dependencies.noted_by(spec)(other)

    def _tasks(self, plan: PhysicalPlan, backend: Backend) -> dict[str, Task]:  # noqa: ARG002
        tasks = {}
        for chain in plan.chains:
            for name in task_names(chain):
                # What the supervisor does with a task it does with one elsewhere, too.
                tasks[name] = cast("Task", RemoteTask(name, chain.nodes, self._links[self._sites[name]]))
        return tasks


class Master:
    """Starts the processes of a job, drives its lifecycle, ends everything, and tells the driver what came of it.

    Args:
        order: the job.
        cluster: where processes run.
        memory: where the master that follows this one finds what this one knows.
        ip: the address of this machine.
        on_over: called when nothing of the job is left but this process, with whether the driver knows.
        on_followed: called when another master has followed this one, which was taken for dead.
        known: what the master before this one knew, or None for the first.
    """

    def __init__(
        self,
        order: JobOrder,
        cluster: Cluster,
        memory: Memory,
        ip: str,
        on_over: Callable[[bool], None],
        on_followed: Callable[[], None],
        known: dict[str, Any] | None = None,
    ) -> None:
        self._order = order
        self._cluster = cluster
        self._memory = memory
        self._before = known
        self._epoch = 1 if known is None else known["epoch"] + 1
        self._known: dict[str, Any] = {"epoch": self._epoch, "pid": os.getpid(), "services": {}}
        self._writing = threading.Lock()
        self._on_over = on_over
        self._on_followed = on_followed
        self._began_at = time.monotonic()
        self._reason = ""
        self._orders: Mapping[str, Any] = {}
        self._is_driver_there = True
        self.is_cluster_lost = False
        self._has_started = True
        self._own: dict[str, SiteLink] = {}
        self._backend = MasterBackend()
        names = {*order.sites, DRIVER}
        self._links = {name: self._new_link(name) for name in names}
        answers: dict[str, Callable[..., Any]] = {
            "event": self._event,
            "whereis": lambda service, gone: self._host(service).where_is(gone),
            "depends": lambda service, other: self._dispatcher.note_dependency(service, other),
            "deferred": lambda service, number: self._dispatcher.deferred(service, number),
            "extend": lambda service, number, seconds: self._dispatcher.extend(service, number, seconds),
            "stop": self._stop,
            "operators": self._operators,
        }
        self._listener = Listener(ip, order.secret, lambda kind, *request: answers[kind](*request), {}, "master")
        left = None if known is None else known["services"]
        services = order.services if left is None else left_of(order, left)
        self._dispatcher = MasterDispatcher(
            self._links,
            {task: site.name for site in order.sites.values() for task in site.tasks},
            order.plan if left is None else None,
            services,
            self._backend,
            self._host_of,
            order.limits,
            self._sealed,
            adopted={} if left is None else {spec.name: self._host_left(spec, left[spec.name]) for spec in services},
        )
        self._dispatcher.supervisor.listeners.append(self._note)

    @property
    def address(self) -> Address:
        """Where it listens."""
        return self._listener.address

    def begin(self, orders: Mapping[str, Any]) -> None:
        """Start everything, given the order of each site, or what stands for it in the cluster, by its name."""
        self._orders = orders
        self._memory.write(self._known)
        self._cluster.watch(self._cluster_lost)
        self._listener.begin()
        self._dispatcher.supervisor.begin()
        threading.Thread(target=self._start_sites, name="sage-start", daemon=True).start()

    def take_over(self) -> None:
        """End in order what the master before this one has left: the services; the workers have ended with it."""
        assert self._before is not None
        log.error("master lost pid=%s, epoch %d takes over", self._before["pid"], self._epoch)
        self._memory.write({**self._before, "epoch": self._epoch, "pid": os.getpid()})
        self._cluster.watch(self._cluster_lost)
        self._listener.begin()

        def reach(link: SiteLink, address: Address) -> None:
            try:
                link.reach(address)
                link.attach(self.address, self._epoch, {DRIVER: self._order.driver})
            except ServiceUnavailableError as error:
                link.give_up(str(error))

        works: list[Callable[[], None]] = [lambda: reach(self._links[DRIVER], self._order.driver)]
        services = self._before["services"]
        for name, left in services.items():
            link = self._own.get(f"service {name}")
            if link is not None:
                works.append(lambda link=link, left=left: reach(link, tuple(left["address"])))  # type: ignore[misc]
        in_parallel(works)
        self._dispatcher.supervisor.begin()
        for host in (self._host(name) for name in self._dispatcher.supervisor.hosts):
            if host.link is not None and host.link.is_gone:
                host.died(host.link, "its process has ended")

    # --- what the next master has to know ---

    def _note(self, event: Event | HookEvent) -> None:
        """Tell the driver of an event, and keep what the next master would need of it."""
        self._links[DRIVER].tell("notice", event)
        with suppress(ServiceUnavailableError):  # of a cluster that is lost; another master will not come
            if isinstance(event, HookEvent):
                if event.report.hook == "build" and event.report.outcome == "ok":
                    self._keep(event.service, hooks=sorted(self._host(event.service).hooks))
            elif event.subject == "service" and event.after in SERVICE_TERMINAL:
                self._keep(event.name, is_over=True)

    def _keep(self, service: str, *, is_over: bool = False, **facts: Any) -> None:
        if self._before is not None or self.is_cluster_lost:
            return  # what the first one wrote holds for all that follow
        with self._writing:
            services = self._known["services"]
            if is_over:
                services.pop(service, None)
            else:
                services[service] = {**services.get(service, {}), **facts}
            self._memory.write(self._known)

    def _host_left(self, spec: ServiceSpec, left: dict[str, Any]) -> RemoteHost:
        """Return the host of a service that the master before this one started."""
        host = cast("RemoteHost", self._host_of(spec, None, self._backend, None, lambda *_: None))
        link = host.link
        if link is None:
            link = self._own[f"service {spec.name}"] = self._new_link(left["site"])
            link.process = self._cluster.find(left["site"], left["cookie"])
            link.pid = left["pid"]
        host.take_over(link, left.get("incarnation", 1), frozenset(left["hooks"]))
        return host

    # --- processes ---

    def _new_link(self, name: str) -> SiteLink:
        return SiteLink(name, self._order.secret, self._backend.lane(name), self._gone, self._on_followed)

    def _start_sites(self) -> None:
        """Start the processes that run tasks, and let them know each other."""
        order = self._order

        def begin(site: Site) -> None:
            link = self._links[site.name]
            if site.name == DRIVER:
                return
            process = self._cluster.start(site.name, self._orders[site.name], site.place, outlives_master=False)
            link.begin(process, order.start_timeout_s)

        works: list[Callable[[], None]] = [lambda site=site: begin(site) for site in order.sites.values()]  # type: ignore[misc]
        errors = in_parallel([*works, lambda: self._links[DRIVER].reach(order.driver)])
        addresses = {name: link.address for name, link in self._links.items() if link.address is not None}
        links = [link for link in self._links.values() if link.address is not None]
        if not errors:
            errors = in_parallel(
                [lambda link=link: link.attach(self.address, self._epoch, addresses) for link in links]  # type: ignore[misc]
            )
        elif self._links[DRIVER].address is not None:
            errors += in_parallel([lambda: self._links[DRIVER].attach(self.address, self._epoch, addresses)])
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

    def _host_of(self, spec: ServiceSpec, _: Any, backend: Backend, __: Any, died: Callable[[int, str], None]) -> Host:
        sites = self._order.sites.values()
        link = next((self._links[site.name] for site in sites if spec.name in site.services), None)
        return RemoteHost(spec, backend, died, link, self._start_service)

    def _start_service(self, spec: ServiceSpec, incarnation: int) -> SiteLink:
        name = f"service {spec.name}" + (f" {incarnation}" if incarnation > 1 else "")
        link = self._own[name] = self._new_link(name)
        order = self._orders[f"service {spec.name}"]

        def bring_up() -> None:
            process = self._cluster.start(name, order, service_place(spec), outlives_master=True)
            began = link.begin(process, spec.options.start_timeout_s)
            where: dict[str, Any] = {"address": began.address, "pid": began.pid, "cookie": process.cookie}
            self._keep(spec.name, site=name, incarnation=incarnation, hooks=["exit"], **where)
            link.attach(self.address, self._epoch, {})

        link.bring_up = bring_up
        return link

    def _gone(self, link: SiteLink, why: str) -> None:
        """Take in that a process has ended that should not have."""
        log.error("process gone site=%r why=%s", link.name, why)
        supervisor = self._dispatcher.supervisor
        for host in supervisor.hosts.values():
            if isinstance(host, RemoteHost):
                host.died(link, why)
        if link.name == DRIVER:
            self._is_driver_there = False
            if not self._order.continues:
                self._reason = "the driver is gone"
                self._post(StopRequested(Way.CANCEL))
        tasks = [task for task in supervisor.tasks.values() if cast("RemoteTask", task).link is link]
        going = [task for task in tasks if supervisor.state.tasks[task.name].state not in TASK_TERMINAL]
        if going and link.name != DRIVER and self._has_started:
            listed = ", ".join(f'"{task.name}"' for task in going)
            error = JobError(f"{link.name} was lost with {listed}: {why}", fault="external")
            self._post(TaskFailed(going[0].name, hint(error, "What was on its way there is lost with it.")))
        for task in going:
            self._post(TaskEnded(task.name, TaskState.FAILED))

    def _cluster_lost(self, why: str) -> None:
        """End the job while its processes are still there, over the connections of its own."""
        log.error("cluster lost why=%s", why)
        self.is_cluster_lost = True
        text = f'the cluster of job "{self._order.graph.name}" is lost: {why}'
        error = hint(JobError(text, job=self._order.graph.name, fault="external"), "Is its head node up?")
        self._post(TaskFailed(next(iter(self._dispatcher.supervisor.tasks), ""), error))

    # --- what others ask for ---

    def _event(self, event: TaskEvent, error: PackedError | None, counts: TaskCounts | None) -> None:
        task = cast("RemoteTask", self._dispatcher.supervisor.tasks[event.task])
        if counts is not None:
            task.take_counts(counts)
        if isinstance(event, TaskFailed) and error is not None:
            event = TaskFailed(event.task, unpack(error, task.link.name), event.closing)
        self._post(event)

    def _stop(self, way: int, reason: str, budget_s: float | None, hook_cap_s: float | None) -> None:
        self._reason = self._reason or reason
        self._post(StopRequested(Way(way), budget_s, hook_cap_s))

    def _operators(self) -> tuple[OperatorReport, ...]:
        self._gather_counts()
        return operator_reports(self._dispatcher, self._order.graph)

    def _host(self, service: str) -> RemoteHost:
        return cast("RemoteHost", self._dispatcher.supervisor.hosts[service])

    def _post(self, event: Any) -> None:
        self._dispatcher.supervisor.post(event)

    def _gather_counts(self) -> None:
        def gather(link: SiteLink) -> None:
            tasks, services = link.ask("counts", timeout_s=COUNTS_BOUND_S)
            for name, counts in tasks.items():
                cast("RemoteTask", self._dispatcher.supervisor.tasks[name]).take_counts(counts)
            for name, calls in services.items():
                self._host(name).take_counts(calls)

        links = [link for link in self._links.values() if link.address is not None and not link.is_gone]
        in_parallel([lambda link=link: gather(link) for link in links])  # type: ignore[misc]

    # --- the end ---

    def _sealed(self, ended: Ended) -> None:
        """End the processes, make the report, and hand it over; the supervisor's last act."""
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
        sealed = pack_report(report, error)
        threading.Thread(target=self._hand_over, args=(sealed, states), name="sage-over", daemon=True).start()

    def _hand_over(self, sealed: PackedReport, states: dict[str, str]) -> None:
        driver = self._links[DRIVER]
        is_told = False
        if self._is_driver_there:
            try:
                driver.flush()
                driver.ask("sealed", sealed, states, timeout_s=TELL_DRIVER_S)
                is_told = True
            except (ServiceUnavailableError, TimeoutError) as error:
                log.error("driver not told: %s", describe(error))
        self._on_over(is_told)


def left_of(order: JobOrder, left: Mapping[str, Any]) -> tuple[ServiceSpec, ...]:
    """Return the services that outlived their master, depending on each other only: all but those of workers."""
    at_driver = order.sites[DRIVER].services if DRIVER in order.sites else ()
    specs = [spec for spec in order.services if "address" in left.get(spec.name, ()) or spec.name in at_driver]
    names = {spec.name for spec in specs if spec.name in left}
    return tuple(
        replace(spec, options=replace(spec.options, depends_on=[name for name in spec.requires if name in names]))
        for spec in specs
        if spec.name in names
    )


def after_loss(report: JobReport, pid: int, plan: PhysicalPlan) -> tuple[JobReport, Exception]:
    """Return the report of a job whose master was lost, from that of its end by the next one, and what to raise."""
    text = f'the master of job "{report.name}" was lost: process {pid} ended by itself'
    lost = JobError(text, job=report.name, fault="external")
    hint(lost, "Its tasks ended with it, and its services were stopped by the master that came after it.")
    errors = (lost, *report.errors)
    tasks = tuple(TaskReport(name, "lost") for chain in plan.chains for name in task_names(chain))
    changes = {"state": Outcome.FAILED, "cleanliness": Cleanliness.DIRTY, "why": text}
    report = replace(report, **changes, errors=errors, tasks=tasks)  # type: ignore[arg-type]
    return report, lost if len(errors) == 1 else JobErrorGroup(text, errors, job=report.name)


class PackedReport:
    """A report as data, with its errors, and which of them a waiting caller gets."""

    def __init__(self, report: JobReport, errors: tuple[PackedError, ...], text: str, raised: tuple[int, ...]) -> None:
        self.report = report
        self.errors = errors
        self.text = text
        self.raised = raised

    def unpack(self) -> tuple[JobReport, Exception | None]:
        """Return the report, and what a waiting caller gets."""
        errors = tuple(cast("Exception", unpack(error)) for error in self.errors)
        report = replace(self.report, errors=errors)
        chosen = [errors[place] for place in self.raised]
        if not chosen:
            return report, None
        if not self.text:
            return report, chosen[0]
        return report, JobErrorGroup(self.text, chosen, job=report.name)


def pack_report(report: JobReport, error: Exception | None) -> PackedReport:
    """Return a report and what a waiting caller gets as data."""
    chosen: tuple[Exception, ...] = ()
    text = ""
    if isinstance(error, JobErrorGroup) and error not in report.errors:
        chosen, text = error.exceptions, error.message
    elif error is not None:
        chosen = (error,)
    raised = tuple(next(place for place, one in enumerate(report.errors) if one is wanted) for wanted in chosen)
    return PackedReport(replace(report, errors=()), tuple(pack(one) for one in report.errors), text, raised)
