"""What one job tells the guardian."""

from __future__ import annotations

import os
import threading
import time
from typing import TYPE_CHECKING

from sage._runtime.processes import COOKIE_VARIABLE, carriers, is_alive, process, with_descendants
from sage.errors import ServiceError
from sage.observability import Event

if TYPE_CHECKING:
    from collections.abc import Iterable

    from sage._hosts.guard import Guard
    from sage._plan.logical import ServiceSpec
    from sage._runtime.journal import Entry
    from sage._runtime.processes import Process
    from sage.observability import HookEvent


class JobGuard:
    """Tells the guardian of one job; nothing, and there is none, until the job has a process or a claim.

    Args:
        id_: the job's id.
        name: its name.
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
        before: JobGuard | None = None,
    ) -> None:
        self._id = id_
        self._name = name
        self._report = report
        self._services = services
        self._began_at = time.time()
        self._guard: Guard | None = None
        self._states: dict[str, str] = {}
        self._incarnations: dict[str, int] = {}
        self._ties: list[Entry] = []
        self._is_over = False
        self._lock = threading.Lock()
        if before is not None and before._guard is not None:
            self._take_over(before, before._guard)

    # --- what services ask for ---

    def claim(self, service: str, entry: Entry) -> None:
        """Write down what a service is about to make, or to let go.

        Raises:
            ValueError: it cannot be carried out, or would take away what belongs to others.
            ServiceError: the run's folder cannot be made, or is not safe from others.
        """
        from sage._hosts.reaping import checked

        self._guarded().note({"entry": "claim", "job": self._id, "service": service, **checked(entry)})

    def depends(self, service: str, requires: str) -> None:
        """Note that a service was seen to ask for another, which has to end after it whoever ends them."""
        self._tie({"entry": "seen", "job": self._id, "service": service, "requires": requires})

    # --- what hosts ask for ---

    def shares(self, service: str, owner: str) -> None:
        """Note that the job `owner` runs a service for all who share it, and has to end it after this job's part."""
        self._tie({"entry": "shared", "job": self._id, "service": service, "owner": owner})

    def announce(self, service: str, incarnation: int, host: str, requires: Iterable[str]) -> str:
        """Write down that a process will be started, and return the cookie that its environment has to carry.

        Raises:
            ServiceError: the run's folder cannot be made, or is not safe from others.
        """
        guard = self._guarded()
        token = guard.new_token()
        self._incarnations[service] = incarnation
        entry = self._entry("service", service, incarnation)
        guard.note({**entry, "host": host, "requires": list(requires), "token": token})
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
            entry = self._entry("process", service, incarnation)
            guard.note({**entry, **found._asdict(), "stop_signal": stop_signal})
        if descriptor is not None:
            guard.give((self._id, service, incarnation), descriptor)

    def ended(self, service: str, incarnation: int) -> None:
        """Let go of a process that has ended. Does nothing twice."""
        guard = self._guard
        if guard is not None:
            guard.take_back((self._id, service, incarnation))

    @property
    def folder(self) -> str:
        """The run's folder: what is put there is removed in the end, whoever is killed before."""
        return self._guarded().folder

    def left_of(self, cookie: str, known: Iterable[Process] = ()) -> set[Process]:
        """Return what runs of a service whose cookie `announce` returned, without what was released.

        Args:
            cookie: carried by what is looked for.
            known: what belongs to it as well, if it still runs.
        """
        guard = self._guarded()
        found = carriers(cookie.rpartition(":")[2]) | {one for one in known if is_alive(one)}
        return found - with_descendants(guard.released(), found)

    def reap(self, service: str) -> list[str]:
        """Act on the claims of a service that was lost or killed, and return what went wrong; it may take long."""
        guard = self._guard
        return [] if guard is None else guard.reap(self._id, service)

    # --- what the job asks for ---

    def note(self, event: Event | HookEvent) -> None:
        """Take in a change of state; the supervisor tells everything."""
        if isinstance(event, Event) and event.subject == "service":
            with self._lock:
                self._states[event.name] = event.after
                if self._guard is not None:
                    self._guard.note(self._state(event.name, event.after))

    def sealed(self) -> None:
        """End it: what is due of claims is done, and nothing of the job is the guardian's matter any more.

        Services that are kept stay its matter until the next job takes them over.
        """
        self._services = ()
        guard = self._guard
        if guard is None:
            self._is_over = True
            return
        guard.reap(self._id)
        guard.note({"entry": "sealed", "job": self._id})
        with self._lock:
            self._is_over = True
            if "kept" not in self._states.values():
                self._guard = None
                guard.release()

    # --- behind it ---

    def _tie(self, entry: Entry) -> None:
        with self._lock:
            self._ties.append(entry)
            if self._guard is not None:
                self._guard.note(entry)

    def _guarded(self) -> Guard:
        with self._lock:
            if self._guard is None:
                if self._is_over:
                    raise ServiceError(f'job "{self._name}" is over', job=self._name)
                # Most jobs never need it, and it imports what starts processes.
                from sage._hosts.guard import Guard

                self._guard = Guard.acquire()
                self._introduce(self._guard)
            return self._guard

    def _introduce(self, guard: Guard) -> None:
        names = {"name": self._name, "report": self._report, "began_at": self._began_at}
        guard.note({"entry": "job", "job": self._id, **names})
        for spec in self._services:
            entry = self._entry("service", spec.name, 1)
            guard.note({**entry, "host": "inline", "requires": list(spec.requires), "token": None})
        for tie in self._ties:
            guard.note(tie)
        for name, state in self._states.items():
            guard.note(self._state(name, state))

    def _take_over(self, before: JobGuard, guard: Guard) -> None:
        self._guard, before._guard = guard, None  # with what it had acquired
        self._introduce(guard)
        for name in [name for name, state in before._states.items() if state == "kept"]:
            guard.note({"entry": "adopted", "job": self._id, "from": before._id, "service": name})
            guard.rename((before._id, name, before._incarnations.get(name, 1)), (self._id, name, 1))
            self._states[name] = "ready"

    def _entry(self, entry: str, service: str, incarnation: int) -> Entry:
        return {"entry": entry, "job": self._id, "service": service, "incarnation": incarnation}

    def _state(self, name: str, state: str) -> Entry:
        return {"entry": "state", "job": self._id, "service": name, "state": str(state)}
