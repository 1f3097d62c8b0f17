"""A site: what one process of a remote job does, be it a worker, the process of a service, or the driver."""

from __future__ import annotations

import sys
import threading
import time
from concurrent.futures import Future
from queue import SimpleQueue
from typing import TYPE_CHECKING, Any

from sage._backends.threads import WATCH_S, ThreadsBackend
from sage._hosts.inline import InlineHost
from sage._hosts.link import SILENT, LinkClosedError
from sage._logs import forward, log_of
from sage._ray.calls import RemoteCalls
from sage._ray.errors import pack
from sage._ray.links import FollowedError
from sage._ray.mesh import Lease, Listener, Peer
from sage._ray.orders import OperatorCounts, TaskCounts
from sage._ray.streams import Outlet, take_in
from sage._runtime.coroutines import CoroutineLoop
from sage._runtime.deployment import deploy
from sage._runtime.lifecycle import TaskEnded, TaskFailed
from sage._runtime.states import Way
from sage._runtime.supervisor import cut_late
from sage.errors import ServiceUnavailableError
from sage.service import ServiceContext, ServiceHandle

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from sage._ray.mesh import Address
    from sage._ray.orders import Part
    from sage._runtime.channel import Channel
    from sage._runtime.inside import Inside
    from sage._runtime.lifecycle import TaskEvent
    from sage._runtime.task import Task
    from sage.service import ServiceOptions

JOIN_S = 1.0

log = log_of("sage.dispatcher")


class Site:
    """Runs tasks and services of a job in this process, as its master says.

    Args:
        name: its name.
        secret: what the processes of the job prove to each other.
        ip: the address of this machine.
        options: the options of every service of the job, by name.
        sites: the process of each task, by their names.
        load: returns what runs here; called when the master says so, when the handles of services are there.
        on_master_lost: called when the master is gone.
        answers: what else it is asked for, by name.
        handles: the handles of the services that code of this process holds, where it holds some already.
        stands_for: what the threads of this process belong to; the site itself by default.
    """

    def __init__(
        self,
        name: str,
        secret: bytes,
        ip: str,
        options: Mapping[str, ServiceOptions],
        sites: Mapping[str, str],
        load: Callable[[Mapping[str, ServiceHandle[Any]]], Part],
        on_master_lost: Callable[[], None],
        *,
        answers: Mapping[str, Callable[..., Any]] | None = None,
        handles: Mapping[str, ServiceHandle[Any]] | None = None,
        stands_for: Inside | None = None,
    ) -> None:
        self.name = name
        self.handles: dict[str, ServiceHandle[Any]] = dict(handles or {})
        self.tasks: dict[str, Task] = {}
        self.hosts: dict[str, InlineHost] = {}
        self._secret = secret
        self._options = options
        self._sites = sites
        self._load = load
        self._on_master_lost = on_master_lost
        self._inside: Inside = stands_for or self
        self._epoch = 0
        self._master: Peer | None = None
        self._lease: Lease | None = None
        self._addresses: dict[str, Address] = {}
        self._peers: dict[Address, Peer] = {}
        self._outlets: dict[str, Outlet] = {}
        self._remote: list[RemoteCalls] = []
        self._once: dict[tuple[str, int, str], Future[Any]] = {}
        self._lock = threading.Lock()
        self._attached = threading.Condition()
        self._over = threading.Event()
        self._events: SimpleQueue[TaskEvent | None] = SimpleQueue()
        self._loop = CoroutineLoop(name)
        self._backend = ThreadsBackend()
        self._backend.supervisor = self._inside
        self._answers: dict[str, Callable[..., Any]] = {
            "from": self._answer_master,
            "attach": self.attach,
            "task": self._task,
            "where": lambda task: self._backend.where(self.tasks[task]),
            "put": lambda task, port, element: take_in(self.tasks[task], port, element),
            "hook": self._hook,
            "gate": lambda service, what: getattr(self.hosts[service], what)(),
            "abandon": lambda service: self.hosts[service].abandon(),
            "call": self._call,
            "attribute": self._attribute,
            "counts": self._counts,
            "log": self._log,
            "close": self.close_services,
            **(answers or {}),
        }
        self.listener = Listener(ip, secret, self._answer, self.handles, name)
        self.listener.begin()

    def handle_of(self, service: str) -> ServiceHandle[Any] | None:
        """Return the handle of a service of the job, or None."""
        return self.handles.get(service)

    def wait_for(self, condition: threading.Condition, is_over: Callable[[], bool], timeout_s: float | None) -> bool:
        """Wait for a condition; nothing else has to go on meanwhile."""
        with condition:
            return condition.wait_for(is_over, timeout_s)

    def ask_to_stop(self) -> None:
        """Ask for the end of the job, draining what is in flight."""
        self._ask_master("stop", int(Way.DRAIN), "stop() was called", None, None)

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
        """Stop and clean up what lives here, when nobody is left who could say so."""
        due = time.monotonic() + timeout_s
        for name, host in reversed(self.hosts.items()):
            host.refuse()
            for hook in ("drain", "stop", "cleanup"):
                if hook == "drain" or hook in host.hooks:
                    ended: Future[Any] = Future()
                    host.run(hook, due, _set(ended))
                    try:
                        ended.result(max(due - time.monotonic(), 0.0))
                    except Exception as error:
                        log.error("hook failed service=%r hook=%s", name, hook, exc_info=error)

    def let_master_go(self) -> None:
        """Follow the master no longer, which is about to end."""
        with self._lock:
            lease, self._lease = self._lease, None
        if lease is not None:
            lease.end()

    def close_services(self) -> None:
        """End the threads of the services; what hangs in one of them keeps this from returning."""
        for host in self.hosts.values():
            host.close()
        self._loop.close()

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
        self._loop.close()
        self._backend.join_tasks([task for task in self.tasks.values() if task.phase.value == "done"])
        self.listener.close(JOIN_S)
        for peer in (*self._peers.values(), *([self._master] if self._master is not None else ())):
            peer.close()

    # --- what others ask for ---

    def _answer(self, kind: str, *request: Any) -> Any:
        return self._answers[kind](*request)

    def _answer_master(self, epoch: int, kind: str, *request: Any) -> Any:
        if epoch < self._epoch:
            raise FollowedError(f'site "{self.name}" follows the master of epoch {self._epoch}')
        return self._answer(kind, *request)

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
            self._master = Peer(master, self._secret, self.handles)
            self._lease = Lease(self._master, self._on_master_lost)
            self._addresses = dict(addresses)
            if is_first:
                self._build()
        with self._attached:
            self._attached.notify_all()

    def _task(self, name: str, request: str) -> None:
        task = self.tasks[name]
        if request == "open":
            self._backend.start_task(self._inside, task)
        getattr(task, f"request_{request}")()

    def _hook(self, service: str, incarnation: int, hook: str, left_s: float | None) -> Any:
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
        # Hooks may return whatever they like; only these are asked for an answer.
        return value if hook in ("build", "drain") else None if hook not in ("ready", "health") else _truth(hook, value)

    def _call(
        self, service: str, name: str, args: tuple[Any, ...], kwargs: dict[str, Any], timeout_s: float | None
    ) -> Any:
        host = self.hosts[service]
        if timeout_s is not None:
            return host.call(name, args, kwargs, timeout_s)
        return host.method(name)(*args, **kwargs)

    def _attribute(self, service: str, name: str) -> tuple[bool, Any]:
        """Return whether an attribute is a method, and its value if it is not, or whether it is a coroutine method."""
        host = self.hosts[service]
        attribute = host.method(name)
        return (True, host.is_coroutine(name)) if callable(attribute) else (False, attribute)

    def _counts(self) -> tuple[dict[str, TaskCounts], dict[str, tuple[int, int]]]:
        sys.stdout.flush()  # it may be the last that is asked for before the end
        tasks = {name: _counts_of(task) for name, task in self.tasks.items()}
        return tasks, {name: (host.call_count, host.error_count) for name, host in self.hosts.items()}

    def _log(self, values: dict[str, Any]) -> Any:
        forward(values)
        return SILENT

    # --- what it asks of its master: `Supervision`, and more ---

    def deferred(self, service: str, incarnation: int) -> None:
        """Let the lifecycle know that a service has something to clean up."""
        self._ask_master("deferred", service, incarnation)

    def extend(self, service: str, incarnation: int, seconds: float) -> None:
        """Ask for more time for the hook that runs."""
        self._ask_master("extend", service, incarnation, seconds)

    def _ask_master(self, *request: Any) -> Any:
        master = self._master
        if master is None:
            raise ServiceUnavailableError(f'site "{self.name}" has no master')
        try:
            return master.ask(*request)
        except LinkClosedError:
            raise ServiceUnavailableError(f'site "{self.name}" has lost its master') from None

    def _tell_events(self) -> None:
        """Tell the master what becomes of tasks, one after another."""
        while (event := self._events.get()) is not None:
            counts = _counts_of(self.tasks[event.task]) if isinstance(event, TaskEnded) else None
            error = pack(event.error) if isinstance(event, TaskFailed) else None
            if isinstance(event, TaskFailed):
                event = TaskFailed(event.task, None, event.closing)  # type: ignore[arg-type]
            try:
                self._ask_master("event", event, error, counts)
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
        for spec in part.services:
            name = spec.name
            note = self._noted_by(name)
            context = ServiceContext(name, self.handles, note, self)
            self.hosts[name] = InlineHost(spec, context, self._backend, self._loop, lambda *_: None)
            self.handles[name]._connect(self.hosts[name])
        if part.plan is not None:
            self.tasks = deploy(part.plan, self._backend, self._loop, self.handles, self._events.put, self._leading_to)
        for work in (self._tell_events, self._watch):
            threading.Thread(target=work, name=f"sage-{work.__name__.strip('_')}", daemon=True).start()

    def _noted_by(self, service: str) -> Callable[[str], None]:
        def note(name: str) -> None:
            if name != service:
                self._ask_master("depends", service, name)

        return note

    def _watch(self) -> None:
        while self.tasks and not self._over.wait(WATCH_S):
            cut_late(self.tasks.values())

    def _leading_to(self, task: str) -> Channel | None:
        site = self._sites[task]
        if site == self.name:
            return None
        outlet = self._outlets.get(task)
        if outlet is None:

            def failed(error: Exception) -> None:
                # Whichever of the producers it was, none of them can go on.
                for name, one in self.tasks.items():
                    if any(outlet in output.channels for outputs in one.outputs.values() for output in outputs):
                        self._events.put(TaskFailed(name, error))
                        break

            outlet = self._outlets[task] = Outlet(
                task, lambda: self._peer(self._addresses[site]), self._backend.capacity_records, failed
            )
        return outlet

    def _find_service(self, service: str, gone: Address | None) -> Peer:
        return self._peer(tuple(self._ask_master("whereis", service, gone)))

    def _peer(self, address: Address) -> Peer:
        with self._lock:
            if address not in self._peers:
                self._peers[address] = Peer(address, self._secret, self.handles)
            return self._peers[address]


def _set(ended: Future[Any]) -> Callable[[Any, BaseException | None], None]:
    def done(value: Any, error: BaseException | None) -> None:
        if error is not None:
            ended.set_exception(error)
        else:
            ended.set_result(value)

    return done


def _truth(hook: str, value: Any) -> bool:
    return bool(value) if hook == "ready" else value is not False


def _counts_of(task: Task) -> TaskCounts:
    undelivered = task.undelivered + (task.inbox.undelivered if task.inbox is not None else 0)
    operators = []
    for operator in task.operators:
        metrics = operator.metrics
        counts = (metrics.records_in, metrics.records_out, metrics.failed, metrics.busy_s)
        operators.append(OperatorCounts(operator.node.id, *counts))
    return TaskCounts(undelivered, tuple(operators))
