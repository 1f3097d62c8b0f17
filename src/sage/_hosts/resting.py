"""Rests: a service that nobody calls is stopped, and started again by the next call."""

from __future__ import annotations

from typing import TYPE_CHECKING

from sage._hosts.gated import GatedHost
from sage._hosts.inline import InlineHost
from sage._logs import log_of
from sage._runtime.lifecycle import RestRequested, WakeRequested
from sage._runtime.states import JobState, ServiceState
from sage.observability import Event

if TYPE_CHECKING:
    from sage._runtime.supervisor import Supervisor
    from sage.observability import HookEvent

log = log_of("sage.dispatcher")

LOOKS = 4
"""How many looks within the idle time must find no use of a service. It rests later by one of them at most."""


class IdleWatch:
    """Lets one service rest when nobody has used it for its idle time, and wakes it for a caller who waits.

    It compares counts of calls now and again, so that a call takes no longer because of it. All of it but the wish of a
    caller runs on the supervisor's thread.
    """

    def __init__(self, host: GatedHost, supervisor: Supervisor, idle_stop_s: float) -> None:
        self._host = host
        self._supervisor = supervisor
        self._idle_stop_s = idle_stop_s
        self._name = host.spec.name
        self._use_count: int | None = None
        self._quiet_looks = 0

    def begin(self) -> None:
        """Watch the service in a job that is about to begin."""
        self._host.on_waiting = lambda: self._supervisor.post(WakeRequested(self._name))
        self._supervisor.listeners.append(self._note)
        self._look()

    def _note(self, event: Event | HookEvent) -> None:
        """Free the memory of an instance that has no process of its own."""
        if not isinstance(event, Event) or (event.subject, event.name) != ("service", self._name):
            return
        if event.after == ServiceState.RESTING and isinstance(self._host, InlineHost):
            self._host.forget_instance()

    def _look(self) -> None:
        use_count = self._host.use_count if self._is_up() else None
        is_quiet = use_count is not None and use_count == self._use_count
        self._quiet_looks = self._quiet_looks + 1 if is_quiet else 0
        self._use_count = use_count
        is_checked = self._supervisor.state.services[self._name].hook == "health"
        if use_count is not None and self._quiet_looks >= LOOKS and not is_checked:
            self._rest(use_count)
        self._supervisor.call_at(self._supervisor.backend.now() + self._idle_stop_s / LOOKS, self._look)

    def _is_up(self) -> bool:
        state = self._supervisor.state
        return state.job is JobState.RUNNING and state.services[self._name].state is ServiceState.READY

    def _rest(self, use_count: int) -> None:
        """Hold calls back, and let the service rest; if another service needs it, it goes on."""
        if not self._host.hold_unused(use_count):
            return
        self._supervisor.handle(RestRequested(self._name, self._host.incarnation))
        if self._supervisor.state.services[self._name].state is ServiceState.READY:
            self._host.admit()
        else:
            log.info("resting service=%r idle_s=%g", self._name, self._idle_stop_s)


def begin_resting(supervisor: Supervisor) -> None:
    """Watch each service of a job that is to rest when nobody calls it."""
    for host in supervisor.hosts.values():
        if isinstance(host, GatedHost) and host.options.idle_stop_s is not None:
            IdleWatch(host, supervisor, host.options.idle_stop_s).begin()
