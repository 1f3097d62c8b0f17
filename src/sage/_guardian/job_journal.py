"""The messages of one job to the guardian."""

from __future__ import annotations

import os
import threading
import time
from typing import TYPE_CHECKING

from sage._forks import useless_after_fork
from sage._guardian.journal import Run, entry
from sage._processes import COOKIE_VARIABLE, is_alive, process, with_cookie, with_descendants
from sage.errors import ServiceError
from sage.observability import Event

if TYPE_CHECKING:
    from collections.abc import Iterable

    from sage._guardian.journal import Entry
    from sage._guardian.lease import GuardianLease
    from sage._plan.logical import ServiceSpec
    from sage._processes import Process
    from sage.observability import HookEvent


class JobJournal:
    """Reports one job to the guardian, which is started when the job has its first process or claim.

    Args:
        report: the file of its report, or None.
        services: its services, in the order of registration.
        before: the job of the same environment whose kept services this one takes over.
    """

    def __init__(
        self,
        id_: str,
        name: str,
        report: str | None,
        services: tuple[ServiceSpec, ...],
        before: JobJournal | None = None,
    ) -> None:
        self._id = id_
        self._name = name
        self._report = report
        self._services = services
        self._began_at = time.time()
        self._guard: GuardianLease | None = None
        self._states: dict[str, str] = {}
        self._incarnations: dict[str, int] = {}
        self._ties: list[Entry] = []
        self._is_over = self._is_forked = False
        self._lock = threading.Lock()
        self._before = before
        useless_after_fork(self)

    # --- requests of services ---

    def claim(self, service: str, claim: dict[str, object]) -> None:
        """Write down things that a service is about to make or to release.

        Raises:
            ValueError: it cannot be carried out, or would remove things of others.
            ServiceError: the run's folder cannot be made, or is not safe from others.
        """
        from sage._guardian.claims import checked

        self._guarded().note(entry(Run.take_claim, self._id, service, **checked(claim)))

    def depends(self, service: str, requires: str) -> None:
        """Note that a service was seen to ask for another, which has to end after it whoever ends them."""
        self._tie(entry(Run.take_seen, self._id, service, requires))

    # --- requests of hosts ---

    def shares(self, service: str, owner: str) -> None:
        """Note that the job `owner` runs a service for all who share it, and has to end it after this job's part."""
        self._tie(entry(Run.take_shared, self._id, service, owner))

    def announce(self, service: str, incarnation: int, host: str, requires: Iterable[str]) -> str:
        """Write down that a process will be started, and return the cookie that its environment has to carry.

        Raises:
            ServiceError: the run's folder cannot be made, or is not safe from others.
        """
        guard = self._guarded()
        token = guard.new_token()
        self._incarnations[service] = incarnation
        guard.note(entry(Run.take_service, self._id, service, incarnation, host, list(requires), token))
        return ":".join(filter(None, [os.environ.get(COOKIE_VARIABLE), guard.cookie, token]))

    def started(
        self, service: str, incarnation: int, pid: int, descriptor: int | None = None, stop_signal: int | None = None
    ) -> None:
        """Write down the process right after it was started.

        Args:
            service: the service's name.
            incarnation: which instance of it.
            pid: its process id.
            descriptor: the guardian's end of the socket pair over which it can be asked to stop; closed by `ended`.
            stop_signal: the number of the signal that asks it to stop instead, for a command.
        """
        guard = self._guarded()
        found = process(pid)
        if found is not None:
            guard.note(entry(Run.take_process, self._id, service, incarnation, *found, stop_signal))
        if descriptor is not None:
            guard.give((self._id, service, incarnation), descriptor)

    def ended(self, service: str, incarnation: int) -> None:
        """Let go of a process that has ended. Does nothing twice."""
        guard = self._guard
        if guard is not None:
            guard.take_back((self._id, service, incarnation))

    @property
    def folder(self) -> str:
        """The run's folder: its files are removed at the end, even if processes are killed before."""
        return self._guarded().folder

    def left_of(self, cookie: str, known: Iterable[Process] = ()) -> set[Process]:
        """Return the running processes of a service whose cookie `announce` returned, without released ones.

        Args:
            cookie: carried by the processes.
            known: further processes of it, if they still run.
        """
        guard = self._guarded()
        found = with_cookie(cookie.rpartition(":")[2]) | {one for one in known if is_alive(one)}
        return found - with_descendants(guard.released(), found)

    def reap(self, service: str) -> list[str]:
        guard = self._guard
        return [] if guard is None else guard.reap(self._id, service)

    # --- requests of the job ---

    def begin(self) -> None:
        """Take over the services of the previous job; the job begins now, even if it fails."""
        before, self._before = self._before, None
        if before is not None and before._guard is not None:
            self._take_over(before, before._guard)

    def note(self, event: Event | HookEvent) -> None:
        """Take in a change of state; the supervisor tells everything."""
        if isinstance(event, Event) and event.subject == "service":
            with self._lock:
                self._states[event.name] = event.after
                if self._guard is not None:
                    self._guard.note(entry(Run.take_state, self._id, event.name, str(event.after)))

    def sealed(self) -> None:
        """End it: claims that are due are carried out, and the guardian no longer watches the job.

        Services that are kept stay its matter until the next job takes them over.
        """
        self._services = ()
        guard = self._guard
        if guard is None:
            self._is_over = True
            return
        guard.reap(self._id)
        guard.note(entry(Run.take_sealed, self._id))
        with self._lock:
            self._is_over = True
            if "kept" not in self._states.values():
                self._guard = None
                guard.release()

    # --- behind it ---

    def _after_fork_in_child(self) -> None:
        """Claim nothing in a process that was forked: the journal is its parent's."""
        self._lock = threading.Lock()
        self._guard = None
        self._is_forked = True

    def _tie(self, tie: Entry) -> None:
        with self._lock:
            self._ties.append(tie)
            if self._guard is not None:
                self._guard.note(tie)

    def _guarded(self) -> GuardianLease:
        with self._lock:
            if self._guard is None:
                if self._is_forked:
                    raise ServiceError(f'job "{self._name}" is not one of this process, which was forked from its own')
                if self._is_over:
                    raise ServiceError(f'job "{self._name}" is over', job=self._name)
                # Most jobs never need it, and it imports the code that starts processes.
                from sage._guardian.lease import GuardianLease

                self._guard = GuardianLease.acquire()
                self._introduce(self._guard)
            return self._guard

    def _introduce(self, guard: GuardianLease) -> None:
        guard.note(entry(Run.take_job, self._id, self._name, self._report, self._began_at))
        for spec in self._services:
            guard.note(entry(Run.take_service, self._id, spec.name, 1, "inline", list(spec.requires), None))
        for tie in self._ties:
            guard.note(tie)
        for name, state in self._states.items():
            guard.note(entry(Run.take_state, self._id, name, str(state)))

    def _take_over(self, before: JobJournal, guard: GuardianLease) -> None:
        self._guard, before._guard = guard, None  # with the resources it had acquired
        self._introduce(guard)
        for name in [name for name, state in before._states.items() if state == "kept"]:
            guard.note(entry(Run.take_adopted, self._id, before._id, name))
            guard.rename((before._id, name, before._incarnations.get(name, 1)), (self._id, name, 1))
            self._states[name] = "ready"
