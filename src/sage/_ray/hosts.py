"""Services in other processes of a job, as the supervisor of its master sees them."""

from __future__ import annotations

import threading
import time
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, NoReturn

from sage._ray.links import KILL_SEEN_S, in_parallel
from sage._ray.processes import LEAVE_S
from sage._ray.requests import SiteSide
from sage._remote.calls import RemoteCalls
from sage._runtime.backend import CallWaits, HostFacts
from sage._runtime.lifecycle import Exit
from sage.errors import ServiceTimeoutError, ServiceUnavailableError, hint

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from sage._plan.logical import ServiceSpec
    from sage._ray.links import SiteClient
    from sage._remote.protocol import Address
    from sage._runtime.backend import Backend, HostSurroundings
    from sage.service import ServiceContext, ServiceOptions

WHERE_BOUND_S = 0.5
"""How long a process may take to say where a hook hangs."""

COUNT_BOUND_S = 1.0

COMMAND_SHARE = 0.8
"""The share of the time for an exit in which a command has to be gone; the rest is for its site."""

PLACE_MARGIN_S = 1.0
"""How long before the end of the start a process without a place in the cluster is given up."""


Counts = tuple[int, int, CallWaits]
"""How many calls of a service there were, how many raised, and how long they waited."""


class Callers:
    """The processes of a job, each with a front of its own for each replicated service, which follows the master's."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._links: list[SiteClient] = []
        self._last: dict[str, Callable[[SiteClient], None]] = {}

    def add(self, link: SiteClient) -> None:
        """Tell a process all that the others were told last, as soon as it is up."""
        with self._lock:
            self._links.append(link)
            for tell in self._last.values():
                tell(link)

    def tell(self, service: str, tell: Callable[[SiteClient], None]) -> None:
        """Tell all processes about a service, in the same order, and do not wait for them."""
        with self._lock:
            self._last[service] = tell
            self._links = [link for link in self._links if not link.is_gone]
            for link in self._links:
                tell(link)

    def drain(self, front: str, left_s: float | None) -> bool:
        """Wait until no front lets calls through or has one running, and return whether they came to that in time."""
        ended: list[bool] = []

        def drain(link: SiteClient) -> None:
            link.ask(SiteSide.refuse, front)  # it may not have heard of that yet
            ended.append(bool(link.ask(SiteSide.run_hook, front, 1, "drain", left_s)))

        with self._lock:
            links = [link for link in self._links if link.address is not None and not link.is_gone]
        in_parallel([partial(drain, link) for link in links])
        return all(ended)


class RemoteHost:
    """Runs one service in a process of its own, a new one for each incarnation, or in a site beside tasks.

    Args:
        spec: the registration, without its code.
        backend: gives the thread that waits for hooks.
        on_died: told when the process of an incarnation ended by itself.
        site: where it lives beside tasks, or None.
        start: starts the process of an incarnation otherwise.
        callers: the processes that call it if it has replicas or is one.
        on_counts: told the counts of all services in the process, before that ends.
    """

    def __init__(
        self,
        spec: ServiceSpec,
        backend: Backend,
        on_died: Callable[[int, str], None],
        site: SiteClient | None,
        start: Callable[[ServiceSpec, int], SiteClient],
        callers: Callers,
        on_counts: Callable[[SiteClient, Mapping[str, Counts]], None],
    ) -> None:
        self.spec = spec
        self.calls = RemoteCalls(spec.name, spec.options.call_timeout_s, _nowhere)
        self._backend = backend
        self._on_died = on_died
        self._site = site
        self._start = start
        self._callers = callers
        self._on_counts = on_counts
        self._link: SiteClient | None = site
        self._lane = backend.lane(spec.name)
        self._incarnation = 0
        self._hooks: frozenset[str] = frozenset()
        self._counts: dict[str, Counts] = {}  # by the names of processes
        self._facts: HostFacts | None = None  # of a command
        self._is_exiting = False
        self._died = 0  # the last incarnation whose process ended by itself
        self._refused = False
        self._changed = threading.Condition()

    @property
    def link(self) -> SiteClient | None:
        """The connection to the process, or None before it exists."""
        return self._link

    @property
    def options(self) -> ServiceOptions:
        return self.spec.options

    @property
    def call_count(self) -> int:
        """How many calls were let through, over all instances whose process could be asked."""
        return sum(calls for calls, _, _ in self._counts.values())

    @property
    def error_count(self) -> int:
        """How many calls raised, over all instances whose process could be asked."""
        return sum(errors for _, errors, _ in self._counts.values())

    @property
    def waits(self) -> CallWaits:
        """How long calls waited for their turn, over all instances whose process could be asked."""
        each = [waits for _, _, waits in self._counts.values()] or [CallWaits()]
        return CallWaits(*map(sum, zip(*each, strict=True)))

    @property
    def is_calling(self) -> bool:
        """Whether a call runs on a thread of this host: never, as they run elsewhere."""
        return False

    @property
    def own_hooks(self) -> frozenset[str]:
        """The end of the process, if it has one to itself."""
        return frozenset({"exit"}) if self._site is None else frozenset()

    @property
    def local_hooks(self) -> frozenset[str]:
        """The hooks that run here: none, as the others end with their process."""
        return frozenset()

    @property
    def exit_net_s(self) -> float:
        """As long as the cluster may take to end a process, and to start one on its node that looks for leftovers."""
        return LEAVE_S + 2 * KILL_SEEN_S

    @property
    def hooks(self) -> frozenset[str]:
        return self._hooks | self.own_hooks

    def adopt(self, _: ServiceContext, surroundings: HostSurroundings) -> None:
        """Let the master that takes over run the hooks of an instance that another one started."""
        self._on_died = surroundings.on_died

    def take_over(self, link: SiteClient, incarnation: int, hooks: frozenset[str]) -> None:
        """Have the process and the instance that another master started."""
        self._link, self._incarnation, self._hooks = link, incarnation, hooks

    # --- requests of the supervisor ---

    def run(self, hook: str, due: float | None, done: Callable[[object, BaseException | None], None]) -> None:
        """Run a hook there, and pass its outcome to `done`."""
        if hook == "build":
            with self._changed:
                self._incarnation += 1
                self._is_exiting = False
                self._hooks = frozenset()

        def work() -> None:
            try:
                value = self._run(hook, due)
            except BaseException as error:  # the lifecycle of a service owns the errors of its hooks
                done(None, error)
            else:
                done(value, None)

        self._lane.run(work)

    def hurry(self, due: float) -> None:
        """Move the `due` of an "exit" that runs forward: it ends by force as soon as the process was asked once."""

    def facts(self) -> HostFacts:
        if self._facts is not None:
            return self._facts
        kind = "ray" if self._site is None else "inline"
        return HostFacts(kind, self._link.pid if self._link is not None else None)

    def admit(self) -> None:
        self._tell_gate(SiteSide.admit)

    def hold(self) -> None:
        self._tell_gate(SiteSide.hold)

    def hold_back(self) -> None:
        self._tell_gate(SiteSide.hold_back)

    def used(self, tokens: int) -> None:
        """Do nothing: the process of the service counts them."""

    def refuse(self) -> None:
        with self._changed:
            self._refused = True
            self._changed.notify_all()
        self._tell_gate(SiteSide.refuse)

    def abandon(self) -> str:
        """Leave the hook that hangs in its process, and say where it stands there."""
        stack = ""
        link = self._link
        if link is not None and not link.is_gone:
            try:
                stack = link.ask_within(WHERE_BOUND_S, SiteSide.abandon, self.spec.name)
            except (ServiceUnavailableError, TimeoutError):
                stack = f"process {link.pid} does not say where it stands"
            except KeyError:
                stack = f"process {link.pid} has not loaded it"
        self._lane.close(wait=False)
        self._lane = self._backend.lane(self.spec.name, must_start=False)
        return stack

    def release(self) -> None:
        self._lane.close(wait=True)

    def close(self) -> None:
        """Free the thread; the site of a service beside tasks is ended with those."""
        self._lane.close(wait=True)

    # --- requests of others ---

    def command_died(self, incarnation: int, text: str) -> None:
        """Take in that the command in a site ended by itself."""
        if incarnation == self._incarnation and self._link is not None:
            self.died(self._link, text)

    def died(self, link: SiteClient, text: str) -> None:
        """Take in that a process is gone."""
        with self._changed:
            if link is not self._link or self._is_exiting or self._died >= self._incarnation:
                return
            self._died = self._incarnation
            self._changed.notify_all()
        self._on_died(self._incarnation, text)

    def where_is(self, gone: Address | None) -> Address:
        """Return the address of the process, and wait while the service is being restarted.

        Raises:
            ServiceUnavailableError: the service takes no more calls.
            ServiceTimeoutError: it was not back in time.
        """
        timeout_s = self.spec.options.call_timeout_s
        with self._changed:
            if not self._changed.wait_for(lambda: self._refused or self._reachable(gone), timeout_s):
                text = f'service "{self.spec.name}" was not back within {timeout_s:g} s'
                raise ServiceTimeoutError(text, service=self.spec.name, fault="external")
            address = self._link.address if self._link is not None else None
            if self._refused or address is None:
                text = f'service "{self.spec.name}" has stopped and takes no more calls'
                error = ServiceUnavailableError(text, service=self.spec.name)
                raise hint(error, "A service is stopped when what depends on it has ended, or when it failed.")
            return address

    def take_counts(self, site: str, counts: Counts) -> None:
        """Take in how many calls there were in a process, how many raised, and how long they waited."""
        self._counts[site] = counts

    # --- behind it ---

    def _reachable(self, gone: Address | None) -> bool:
        link = self._link
        return link is not None and not link.is_gone and link.address is not None and link.address != gone

    def _run(self, hook: str, due: float | None) -> object:
        if hook == "exit":
            return self._exit(due)
        if hook == "build":
            self._bring_up(due)
        link = self._link
        if link is None:
            raise ServiceUnavailableError(f'service "{self.spec.name}" has no process')
        left_s = None if due is None else max(due - self._backend.now(), 0.0)
        value = link.ask(SiteSide.run_hook, self.spec.name, self._incarnation, hook, left_s)
        if hook == "build":
            assert isinstance(value, frozenset)
            self._hooks = value
        return value

    def _bring_up(self, due: float | None) -> None:
        if self._site is not None:
            self._site.wait_up()
            return
        link = self._start(self.spec, self._incarnation)
        with self._changed:
            self._link = link
        try:
            left_s = self.spec.options.start_timeout_s if due is None else due - self._backend.now()
            # Before the lifecycle gives the start up, which does not know why the process waits.
            link.bring_up(max(left_s - PLACE_MARGIN_S, left_s / 2))
        finally:
            with self._changed:
                self._changed.notify_all()

    def _exit(self, due: float | None) -> Exit | None:
        with self._changed:
            self._is_exiting = True
            link = self._link
        if link is None:
            return None
        was_killed = False
        command = Exit(None)
        if not link.is_gone and link.address is not None:
            left_s = COUNT_BOUND_S if due is None else max(due - self._backend.now(), 0.1)
            began_at = time.monotonic()
            try:
                _, services = link.ask_within(min(COUNT_BOUND_S, left_s), SiteSide.counts)
                self._on_counts(link, services)
                if self.spec.command is not None:
                    command = self._exit_command(link, left_s - (time.monotonic() - began_at))
                link.ask_within(max(left_s - (time.monotonic() - began_at), 0.1), SiteSide.close_services)
            except (ServiceUnavailableError, TimeoutError):
                was_killed = not link.is_gone
        left = link.end()
        return replace(command, was_killed=command.was_killed or was_killed, left=(*command.left, *left))

    def _exit_command(self, link: SiteClient, left_s: float) -> Exit:
        """End the command in its site, which knows how it went."""
        hook_s = max(left_s * COMMAND_SHARE, 0.1)
        name = self.spec.name
        try:
            ended = link.ask_within(max(left_s, 0.2), SiteSide.run_hook, name, self._incarnation, "exit", hook_s)
        finally:
            self._facts = link.ask_within(COUNT_BOUND_S, SiteSide.facts, name)
        return ended if isinstance(ended, Exit) else Exit(None)

    def _tell_gate(self, request: Callable[[SiteSide, str], None]) -> None:
        link = self._link
        if link is not None and not link.is_gone and link.address is not None:
            link.tell(request, self.spec.name)


class RemoteReplica(RemoteHost):
    """A replica: the front in each process has to know where it takes calls."""

    _opened: SiteClient | None = None

    def admit(self) -> None:
        """Let calls through, and then send them there."""
        super().admit()
        link = self._link
        with self._changed:
            self._opened = link
        if link is not None:
            link.after(partial(self._open, link))

    def hold(self) -> None:
        """Send calls elsewhere."""
        self._shut(is_over=False)
        super().hold()

    def refuse(self) -> None:
        """Send calls elsewhere for good."""
        self._shut(is_over=True)
        super().refuse()

    def _open(self, link: SiteClient) -> None:
        with self._changed:
            if self._opened is link and not link.is_gone:
                self._route(link.address, is_over=False)

    def _shut(self, *, is_over: bool) -> None:
        with self._changed:
            self._opened = None
            self._route(None, is_over=is_over)

    def _route(self, address: Address | None, *, is_over: bool) -> None:
        name = self.spec.name
        self._callers.tell(name, lambda link: link.tell(SiteSide.route, name, address, is_over))


class RemoteFront(RemoteHost):
    """The front of a replicated service in the lifecycle. It has no process; the fronts of all processes follow it."""

    @property
    def own_hooks(self) -> frozenset[str]:
        """None: it has nothing to end."""
        return frozenset()

    def facts(self) -> HostFacts:
        """Return that it is a front."""
        return HostFacts("replicas")

    def hold_back(self) -> None:
        """Do nothing: a rate is refused."""

    def _run(self, hook: str, due: float | None) -> object:
        if hook == "drain":
            return self._callers.drain(self.spec.name, None if due is None else max(due - self._backend.now(), 0.0))
        return frozenset()

    def _tell_gate(self, request: Callable[[SiteSide, str], None]) -> None:
        name = self.spec.name
        self._callers.tell(name, lambda link: link.tell(request, name))


def _nowhere(service: str, _: object) -> NoReturn:
    raise ServiceUnavailableError(f'the job master does not call service "{service}"')
