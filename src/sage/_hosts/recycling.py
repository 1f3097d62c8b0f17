"""Recycling: a new process takes the place of a replica's, and is ready before the old one ends."""

from __future__ import annotations

from typing import TYPE_CHECKING

from sage._hosts.replicas import ReplicasHost
from sage._logs import log_of
from sage._processes import resident_bytes
from sage._runtime.lifecycle import RestRequested, WakeRequested
from sage._runtime.states import SERVICE_TERMINAL
from sage.observability import Event

if TYPE_CHECKING:
    from sage._hosts.replicas import Replica
    from sage._runtime.supervisor import Supervisor
    from sage.observability import HookEvent

log = log_of("sage.dispatcher")

LOOK_S = 0.25
"""How often the age and the memory of processes are looked at."""

BYTES_PER_MB = 1_000_000


class Recycler:
    """Recycles the replicas of one front, one after the other, by the spare one.

    The spare starts while the old replica goes on. When it is ready, it gets the place of the old one, and so its keys.
    The old one gets no more calls, and rests when its last one has returned: no bound cuts a call off. It is the spare
    then.

    Callers' threads and the supervisor's call it; the lock is that of the front.
    """

    def __init__(self, front: ReplicasHost, supervisor: Supervisor) -> None:
        self._front = front
        self._supervisor = supervisor
        self._by_name = {replica.name: replica for replica in front.replicas}
        self._old: Replica | None = None
        self._new: Replica | None = None  # until it is ready
        self._failures = 0
        self._next_at = 0.0
        self.count = 0

    def begin(self) -> None:
        """Watch the replicas of a job that is about to begin."""
        self._supervisor.listeners.append(self._note)
        self._look()

    def starts(self, replica: Replica) -> bool:
        """Return whether a spare replica is on its start, so that calls may wait for it."""
        return replica is self._new

    def returned(self, replica: Replica) -> None:
        """Take in that a call of a replica has returned; the front holds its lock."""
        calls_max = self._front.options.recycle_calls
        if replica is self._old:
            self._let_rest()
        elif calls_max is not None and replica.made_count >= calls_max:
            self._recycle(replica)

    def _look(self) -> None:
        """Recycle a replica that is due for it, now and again and again; the supervisor's thread calls this."""
        with self._front.lock:
            for replica in self._front.replicas:
                if self._is_due(replica):
                    self._recycle(replica)
        self._supervisor.call_at(self._supervisor.backend.now() + LOOK_S, self._look)

    def _is_due(self, replica: Replica) -> bool:
        if self._old is not None or replica.is_spare or not replica.host.takes_calls:
            return False
        options, age_s = self._front.options, self._supervisor.backend.now() - replica.ready_at
        if options.recycle_calls is not None and replica.made_count >= options.recycle_calls:
            return True
        if options.recycle_age_s is not None and age_s >= options.recycle_age_s:
            return True
        pid = None if options.recycle_rss_mb is None else self._supervisor.hosts[replica.name].facts().pid
        return pid is not None and resident_bytes(pid) >= (options.recycle_rss_mb or 0) * BYTES_PER_MB

    def _recycle(self, replica: Replica) -> None:
        spare = next((one for one in self._front.replicas if one.is_spare and not one.host.is_refused), None)
        if self._old is not None or spare is None or self._supervisor.backend.now() < self._next_at:
            return
        self._old, self._new = replica, spare
        log.info("recycling service=%r by=%r calls=%d", replica.name, spare.name, replica.made_count)
        self._supervisor.post(WakeRequested(spare.name))

    def _let_rest(self) -> None:
        old = self._old
        if old is not None and old.is_spare and old.running == 0:
            self._supervisor.post(RestRequested(old.name, self._supervisor.state.services[old.name].incarnation))

    def _note(self, event: Event | HookEvent) -> None:
        """Take in a change of state; called by the supervisor."""
        if not isinstance(event, Event) or event.subject != "service":
            return
        replica = self._by_name.get(event.name)
        if replica is not None:
            with self._front.lock:
                self._has_changed(replica, event.after)

    def _has_changed(self, replica: Replica, state: str) -> None:
        is_over = state == "resting" or state in SERVICE_TERMINAL
        if state == "resting":
            replica.place = None
        if state == "ready":
            replica.made_count, replica.ready_at = 0, self._supervisor.backend.now()
            if replica is self._new and self._old is not None:
                replica.place, self._old.place = self._old.place, None
                self._new = None
                self.count += 1
                self._failures = 0
                if self._old.host.is_refused:
                    self._old = None  # it has died meanwhile, for good
            self._let_rest()
        elif replica is self._new and is_over:
            self._old = self._new = None
            first_s, longest_s = self._front.options.backoff_s
            pause_s = min(first_s * 2.0 ** min(self._failures, 64), longest_s)
            self._failures += 1
            self._next_at = self._supervisor.backend.now() + pause_s
            log.warning("successor did not start, trying again service=%r in_s=%g", replica.name, pause_s)
        elif replica is self._old and self._new is None and is_over:
            self._old = None
        elif is_over and self._old is not None and self._new is None and self._old.host.takes_calls:
            # The successor is lost, and the old one still there; it stays.
            self._old.place, replica.place = replica.place, None
            self._old = None


def begin_recycling(supervisor: Supervisor) -> None:
    """Recycle the replicas of each service of a job that asks for it."""
    for host in supervisor.hosts.values():
        if isinstance(host, ReplicasHost) and host.options.recycles:
            host.recycler = Recycler(host, supervisor)
            host.recycler.begin()
