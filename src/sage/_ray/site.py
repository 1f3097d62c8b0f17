"""A site: one process of a remote job, either a worker, the process of a service, or the driver."""

from __future__ import annotations

import sys
import threading
import time
from concurrent.futures import Future
from contextlib import suppress
from dataclasses import replace
from functools import partial
from queue import SimpleQueue
from typing import TYPE_CHECKING, Concatenate, Never, ParamSpec, TypeVar

from sage._backends.threads import WATCH_S, ThreadsBackend
from sage._calls import function_of
from sage._hosts.inline import InlineHost
from sage._logs import forward, log_of
from sage._ray.fronts import AwayReplica, SiteFront
from sage._ray.links import FollowedError
from sage._ray.orders import OperatorCounts, TaskCounts
from sage._ray.requests import MasterSide, SiteSide
from sage._ray.streams import Outlet, not_taken_in, take_in
from sage._remote.calls import RemoteCalls
from sage._remote.errors import sendable
from sage._remote.process import START_HOOKS
from sage._remote.protocol import served
from sage._remote.rpc import RpcClosedError, encode_answer
from sage._remote.tcp import Lease, TcpRpcClient, TcpRpcServer
from sage._runtime.backend import HostSurroundings
from sage._runtime.coroutines import CoroutineLoop
from sage._runtime.deployment import deploy
from sage._runtime.lifecycle import TaskEnded, TaskFailed
from sage._runtime.states import StopMode
from sage._runtime.supervisor import cut_late
from sage.errors import ServiceUnavailableError
from sage.service import ServiceContext, ServiceHandle, no_journal

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from sage._current_job import Inside
    from sage._guardian.job_journal import JobJournal
    from sage._hosts.gated import GatedHost
    from sage._plan.logical import ServiceSpec
    from sage._ray.orders import SitePayload
    from sage._ray.parcels import Parcel
    from sage._remote.protocol import Address
    from sage._remote.rpc import RpcClient
    from sage._runtime.backend import CallWaits, HostFacts
    from sage._runtime.budget import BudgetLimits
    from sage._runtime.channel import Channel
    from sage._runtime.lifecycle import TaskEvent
    from sage._runtime.task import Task
    from sage.records import Element
    from sage.service import ServiceOptions

P = ParamSpec("P")
R = TypeVar("R")

JOIN_S = 1.0

log = log_of("sage.dispatcher")


class Site(SiteSide):
    """Runs tasks and services of a job in this process, as its master says.

    Args:
        secret: shared by the processes of the job, as proof to each other.
        ip: the address of this machine.
        options: the options of every service of the job, by name.
        sites: the process of each task, by their names.
        load: returns the parts that run here; called when the master says so, when the handles of services are there.
        on_master_lost: called when the master is gone.
        further: further protocols that it serves, and whoever does.
        handles: the handles of the services that code of this process holds, where it holds some already.
        stands_for: the job that the threads of this process belong to; the site itself by default.
        budget: what the job may use, which its master counts, or None.
    """

    def __init__(
        self,
        name: str,
        secret: bytes,
        ip: str,
        options: Mapping[str, ServiceOptions],
        sites: Mapping[str, str],
        load: Callable[[Mapping[str, ServiceHandle[object]]], SitePayload],
        on_master_lost: Callable[[], None],
        *,
        further: tuple[tuple[type, object], ...] = (),
        handles: Mapping[str, ServiceHandle[object]] | None = None,
        stands_for: Inside | None = None,
        budget: BudgetLimits | None = None,
    ) -> None:
        self.name = name
        self.handles: dict[str, ServiceHandle[object]] = dict(handles or {})
        self.tasks: dict[str, Task] = {}
        self.hosts: dict[str, GatedHost] = {}
        self._secret = secret
        self._options = options
        self._sites = sites
        self._load = load
        self._on_master_lost = on_master_lost
        self._inside: Inside = stands_for or self
        self._epoch = 0
        self._ip = ip
        self._budget = budget
        self._journal: JobJournal | None = None
        self._master: TcpRpcClient | None = None
        self._lease: Lease | None = None
        self._addresses: dict[str, Address] = {}
        self._peers: dict[Address, TcpRpcClient] = {}
        self._outlets: dict[str, Outlet] = {}
        self._remote: list[RemoteCalls] = []
        self._away: dict[str, AwayReplica] = {}
        self._once: dict[tuple[str, int, str], Future[object]] = {}
        self._lock = threading.Lock()
        self._attached = threading.Condition()
        self._over = threading.Event()
        self._events: SimpleQueue[TaskEvent | None] = SimpleQueue()
        self._loop = CoroutineLoop(name)
        self._backend = ThreadsBackend()
        self._backend.supervisor = self._inside
        methods = served((SiteSide, self), *further)
        self.listener = TcpRpcServer(ip, secret, methods, self.handles, name, self._check)
        self.listener.begin()

    def handle_of(self, service: str) -> ServiceHandle[object] | None:
        return self.handles.get(service)

    def wait_for(self, condition: threading.Condition, is_over: Callable[[], bool], timeout_s: float | None) -> bool:
        """Wait for a condition; nothing else has to go on meanwhile."""
        with condition:
            return condition.wait_for(is_over, timeout_s)

    def ask_to_stop(self, drain: bool | None) -> None:
        """Ask for the end of the job, as `Job.stop` does."""
        self._ask_master(MasterSide.stop, int(StopMode.of(drain)), "stop() was called", None, None)

    @property
    def epoch(self) -> int:
        """How many masters the job had, as far as this process has heard; 0 before the first."""
        return self._epoch

    def wait_attached(self, epoch: int, timeout_s: float) -> bool:
        """Wait for the master that follows the one of an epoch, and return whether it came."""
        with self._attached:
            return self._attached.wait_for(lambda: self._epoch > epoch, timeout_s)

    def cancel(self) -> None:
        """Let every task end."""
        for task in self.tasks.values():
            task.request_cancel()

    def end_services(self, timeout_s: float) -> None:
        """Stop and clean up the services here, when no master is left to request it."""
        due = time.monotonic() + timeout_s
        for name, host in reversed(self.hosts.items()):
            host.refuse()
            for hook in ("drain", "stop", "cleanup", "exit"):
                if hook == "drain" or (hook in host.hooks and self._is_left(host, hook)):
                    ended: Future[object] = Future()
                    host.run(hook, due, _set(ended))
                    try:
                        ended.result(max(due - time.monotonic(), 0.0))
                    except Exception as error:
                        log.error("hook failed service=%r hook=%s", name, hook, exc_info=error)

    def _is_left(self, host: GatedHost, hook: str) -> bool:
        """Return whether a hook is to run that no master asks for: `stop` only after a successful start."""
        place = host.spec.name, host.incarnation
        if hook == "stop" and not all(
            _has_succeeded(self._once.get((*place, one)), one) for one in host.hooks & START_HOOKS
        ):
            return False
        return hook == "exit" or (*place, hook) not in self._once

    def let_master_go(self) -> None:
        """Follow the master no longer, which is about to end."""
        with self._lock:
            lease, self._lease = self._lease, None
        if lease is not None:
            lease.end()

    def close_services(self) -> None:
        for host in self.hosts.values():
            host.close()
        self._loop.close()
        if self._journal is not None:
            self._journal.sealed()

    def close(self) -> None:
        """End every thread that can be ended; nothing of the job runs any more."""
        self._over.set()
        self._events.put(None)
        if self._lease is not None:
            self._lease.end()
        for host in self.hosts.values():
            host.refuse()
            host.close()
        for calls in self._remote:
            calls.close()
        for replica in self._away.values():
            replica.close()
        self._loop.close()
        self._backend.join_tasks([task for task in self.tasks.values() if task.phase.value == "done"])
        self.listener.close(JOIN_S)
        for peer in (*self._peers.values(), *([self._master] if self._master is not None else ())):
            peer.close()

    # --- requests of others ---

    def _check(self, epoch: int | None) -> None:
        """Refuse a request of a master that another one has followed."""
        if epoch is not None and epoch < self._epoch:
            raise FollowedError(f'site "{self.name}" follows the master of epoch {self._epoch}')

    def attach(self, master: Address, epoch: int, addresses: Mapping[str, Address]) -> None:
        """Do as this master says from now on; one that was taken for dead has an older epoch, and is refused."""
        with self._lock:
            if epoch <= self._epoch:
                raise FollowedError(f'site "{self.name}" follows the master of epoch {self._epoch}')
            is_first = self._epoch == 0
            self._epoch = epoch
            before, self._lease = self._lease, None
            if before is not None:
                before.end()
            if self._master is not None:
                self._master.close()
            self._master = TcpRpcClient(master, self._secret, self.handles)
            self._lease = Lease(self._master, self._on_master_lost)
            self._addresses = dict(addresses)
            if is_first:
                self._build()
        with self._attached:
            self._attached.notify_all()

    def meet(self, addresses: Mapping[str, Address]) -> None:
        self._addresses = dict(addresses)

    def left(self, service: str) -> tuple[int, frozenset[str]]:
        host = self.hosts[service]
        host.wait_idle()
        return host.incarnation, host.hooks

    def open_task(self, task: str) -> None:
        """Start a task; see `SiteSide`, also for the other requests."""
        self._backend.start_task(self._inside, self.tasks[task])
        self.tasks[task].request_open()

    def run_task(self, task: str) -> None:
        self.tasks[task].request_run()

    def stop_task(self, task: str) -> None:
        self.tasks[task].request_stop()

    def hold_back_task(self, task: str) -> None:
        self.tasks[task].request_hold_back()

    def cancel_task(self, task: str) -> None:
        self.tasks[task].request_cancel()

    def where(self, task: str) -> str:
        return self._backend.where(self.tasks[task])

    def put(self, task: str, port: int, element: Element | Parcel) -> int:
        """Put an element into the inbox of a task."""
        return take_in(self.tasks[task], port, element)

    def admit(self, service: str) -> None:
        self.hosts[service].admit()

    def hold(self, service: str) -> None:
        self.hosts[service].hold()

    def hold_back(self, service: str) -> None:
        self.hosts[service].hold_back()

    def refuse(self, service: str) -> None:
        self.hosts[service].refuse()

    def route(self, service: str, address: Address | None, is_over: bool) -> None:
        """Take in where a replica takes calls; one that is here needs nobody to say so."""
        if service in self._away:
            self._away[service].route(address, is_over)

    def abandon(self, service: str) -> str:
        """Leave the hook of a service that hangs."""
        return self.hosts[service].abandon()

    def run_hook(self, service: str, incarnation: int, hook: str, left_s: float | None) -> object:
        """Run a hook of a service to its end; "stop" and "cleanup" run once, whoever asks."""
        host = self.hosts[service]
        if hook == "build":
            host.begin_at(incarnation)
        with self._lock:
            # A master that follows another one does not know which hooks have run, or run, for that one.
            once = self._once.get((service, incarnation, hook)) if hook in ("stop", "cleanup") else None
            ended = self._once[service, incarnation, hook] = once or Future()
        if once is None:
            host.run(hook, None if left_s is None else self._backend.now() + left_s, _set(ended))
        value = ended.result()
        # Hooks may return any value; only these have an answer.
        if hook in ("ready", "health"):
            return _truth(hook, value)
        return value if hook in ("build", "drain", "exit") else None

    def call(
        self, service: str, name: str, args: tuple[object, ...], kwargs: dict[str, object], timeout_s: float | None
    ) -> object:
        """Call a method of a service that lives here."""
        host = self.hosts[service]
        if timeout_s is not None:
            return host.call(name, args, kwargs, timeout_s)
        return function_of(host.method(name))(*args, **kwargs)

    def attribute(self, service: str, name: str) -> tuple[bool, object]:
        host = self.hosts[service]
        host.wait_there()  # a value is not one to call later, as a method is
        attribute = host.method(name)
        if callable(attribute):
            return True, host.is_coroutine(name)
        encode_answer(attribute)  # alone, so that an error names its type
        return False, attribute

    def facts(self, service: str) -> HostFacts:
        return self.hosts[service].facts()

    def counts(self) -> tuple[dict[str, TaskCounts], dict[str, tuple[int, int, CallWaits]]]:
        sys.stdout.flush()  # it may be the last that is asked for before the end
        tasks = {name: _counts_of(task) for name, task in self.tasks.items()}
        return tasks, {name: (host.call_count, host.error_count, host.waits) for name, host in self.hosts.items()}

    def log(self, values: dict[str, object]) -> None:
        """Take in a log record of another process."""
        forward(values)

    # --- requests to its master: `Supervision`, and more ---

    def deferred(self, service: str, incarnation: int) -> None:
        """Let the lifecycle know that a service has something to clean up."""
        self._ask_master(MasterSide.deferred, service, incarnation)

    def extend(self, service: str, incarnation: int, seconds: float) -> None:
        self._ask_master(MasterSide.extend, service, incarnation, seconds)

    def used(self, service: str, prompt_tokens: int, completion_tokens: int) -> None:
        """Count the tokens of an answer towards the budget of the job and the rate of its service."""
        if self._budget is not None and self._budget.counts_tokens:
            self._ask_master(MasterSide.used, service, prompt_tokens, completion_tokens)
        self.hosts[service].used(prompt_tokens + completion_tokens)

    def claim(self, service: str, entry: dict[str, object]) -> None:
        """Refuse a claim: nobody keeps a journal."""
        raise no_journal(service, entry)

    def _ask_master(self, method: Callable[Concatenate[Never, P], R], *args: P.args, **kwargs: P.kwargs) -> R:
        master = self._master
        if master is None:
            raise ServiceUnavailableError(f'site "{self.name}" has no master')
        try:
            return master.ask(method, *args, **kwargs)
        except RpcClosedError:
            raise ServiceUnavailableError(f'site "{self.name}" has lost its master') from None

    def _tell_events(self) -> None:
        """Report changes of tasks to the master, one after another."""
        while (event := self._events.get()) is not None:
            counts = _counts_of(self.tasks[event.task]) if isinstance(event, TaskEnded) else None
            try:
                self._ask_master(MasterSide.task_event, sendable(event, self.name), counts)
            except ServiceUnavailableError:
                log.error("nobody to tell of %r", event)

    # --- behind it ---

    def _build(self) -> None:
        """Make the handles, the hosts of services and the tasks; nothing of them runs yet."""
        for name, options in self._options.items():
            handle = self.handles.setdefault(name, ServiceHandle(name, None))
            calls = RemoteCalls(name, options.call_timeout_s, self._find_service)
            self._remote.append(calls)
            handle._connect(calls)
        part = self._load(self.handles)
        for spec in (*part.services, *part.fronts):
            context = ServiceContext(spec.name, self.handles, self._noted_by(spec.name), self)
            self.hosts[spec.name] = self._host_of(spec, context)
            spec.handle._connect(self.hosts[spec.name])
        if part.plan is not None:
            self.tasks = deploy(part.plan, self._backend, self._loop, self.handles, self._events.put, self._leading_to)
        for work in (self._tell_events, self._watch):
            threading.Thread(target=work, name=f"sage-{work.__name__.strip('_')}", daemon=True).start()

    def _host_of(self, spec: ServiceSpec, context: ServiceContext) -> GatedHost:
        is_bounded = self._budget is not None and self._budget.bounds(spec.name)
        permit = partial(self._ask_master, MasterSide.permit, spec.name) if is_bounded else None
        surroundings = HostSurroundings(self._backend, self._loop, self.handles, self, _untold, _untold, permit=permit)
        if spec.options.has_replicas:
            return SiteFront(spec, context, surroundings, [self._replica(name) for name in spec.requires])
        if spec.command is None:
            return InlineHost(spec, context, surroundings)
        from sage._guardian.job_journal import JobJournal
        from sage._hosts.command import CommandHost

        # A guardian on this machine ends the command if this process is killed.
        self._journal = JobJournal(self.name, self.name, None, (spec,))

        def died(incarnation: int, text: str) -> None:
            with suppress(ServiceUnavailableError):  # without a master, nobody decides about it
                self._ask_master(MasterSide.service_died, spec.name, incarnation, text)

        return CommandHost(spec, context, replace(surroundings, on_died=died, guard=self._journal, address=self._ip))

    def _replica(self, name: str) -> GatedHost | AwayReplica:
        if name in self.hosts:
            return self.hosts[name]
        replica = self._away[name] = AwayReplica(name, self._peer)
        return replica

    def _noted_by(self, service: str) -> Callable[[str], None]:
        def note(name: str) -> None:
            if name != service:
                self._ask_master(MasterSide.depends, service, name)

        return note

    def _watch(self) -> None:
        while self.tasks and not self._over.wait(WATCH_S):
            cut_late(self.tasks.values())
            self._backend.relieve()

    def _leading_to(self, task: str) -> Channel | None:
        site = self._sites[task]
        if site == self.name:
            return None
        outlet = self._outlets.get(task)
        if outlet is None:

            def failed(error: Exception) -> None:
                # Whichever of the producers it was, none of them can go on, and none has ended.
                for producer in self.tasks.values():
                    for place, outlets in producer.outbox.outlets.items():
                        if any(outlet in one.channels for one in outlets):
                            failure = not_taken_in(producer.operators[place].node.name, task, error)
                            self._events.put(TaskFailed(producer.name, failure))
                            return

            outlet = self._outlets[task] = Outlet(
                task, lambda: self._peer(self._addresses[site]), self._backend.capacity_records, failed
            )
        return outlet

    def _find_service(self, service: str, gone: RpcClient | None) -> TcpRpcClient:
        address = gone.address if isinstance(gone, TcpRpcClient) else None
        return self._peer(self._ask_master(MasterSide.where_is, service, address))

    def _peer(self, address: Address) -> TcpRpcClient:
        with self._lock:
            if address not in self._peers:
                self._peers[address] = TcpRpcClient(address, self._secret, self.handles)
            return self._peers[address]


def _untold(incarnation: int, text: str) -> None:
    """Do nothing: a service without a process of its own does not end by itself."""


def _set(ended: Future[object]) -> Callable[[object, BaseException | None], None]:
    def done(value: object, error: BaseException | None) -> None:
        if error is not None:
            ended.set_exception(error)
        else:
            ended.set_result(value)

    return done


def _has_succeeded(run: Future[object] | None, hook: str) -> bool:
    return run is not None and run.done() and run.exception() is None and (hook != "ready" or bool(run.result()))


def _truth(hook: str, value: object) -> bool:
    return bool(value) if hook == "ready" else value is not False


def _counts_of(task: Task) -> TaskCounts:
    undelivered = task.undelivered + (task.inbox.undelivered if task.inbox is not None else 0)
    operators = []
    for operator in task.operators:
        metrics = operator.metrics
        counts = (metrics.records_in, metrics.records_out, metrics.failed, metrics.busy_s, metrics.full_s)
        operators.append(OperatorCounts(operator.node.id, *counts))
    return TaskCounts(undelivered, tuple(operators), task.waited_s)
