"""The requests among master, driver and sites of a remote job; see `sage._remote.protocol`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

from sage._remote.protocol import CallSide, LogSide

if TYPE_CHECKING:
    from collections.abc import Mapping

    from sage._ray.orders import TaskCounts
    from sage._ray.parcels import Parcel
    from sage._remote.protocol import Address
    from sage._runtime.backend import CallWaits, HostFacts
    from sage._runtime.lifecycle import TaskEvent
    from sage.observability import Event, HookEvent
    from sage.records import Element
    from sage.report import JobReport, OperatorReport


class SiteSide(CallSide, LogSide, Protocol):
    """A site, as the master and other sites ask it."""

    def attach(self, master: Address, epoch: int, addresses: Mapping[str, Address]) -> None:
        """Follow this master from now on, and take in where the processes of the other tasks are."""

    def meet(self, addresses: Mapping[str, Address]) -> None:
        """Take in where the processes of the other tasks are; no record flows before."""

    def left(self, service: str) -> tuple[int, frozenset[str]]:
        """Wait for the hook of a service that runs, and return which incarnation is here, or 0, and its hooks."""

    def open_task(self, task: str) -> None:
        """Start a task, which builds and opens its functions."""

    def run_task(self, task: str) -> None:
        """Let records flow."""

    def stop_task(self, task: str) -> None:
        """End the source, or a loop that begins here."""

    def hold_back_task(self, task: str) -> None:
        """Begin no further call of a costly function."""

    def cancel_task(self, task: str) -> None:
        """Drop everything and close."""

    def where(self, task: str) -> str:
        """Return where the thread of a task stands, for a person."""

    def put(self, task: str, port: int, element: Element | Parcel) -> int:
        """Put an element into the inbox of a task, wait for room there, and return its bound."""

    def run_hook(self, service: str, incarnation: int, hook: str, left_s: float | None) -> object:
        """Run a hook of a service to its end, and return its value."""

    def admit(self, service: str) -> None:
        """Let calls of a service through."""

    def hold(self, service: str) -> None:
        """Let calls of a service wait."""

    def hold_back(self, service: str) -> None:
        """Refuse calls of a service that would have to wait for its rate."""

    def refuse(self, service: str) -> None:
        """Let calls of a service fail at once."""

    def route(self, service: str, address: Address | None, is_over: bool) -> None:
        """Take in where a replica takes calls from now on, or that it takes none, perhaps for good."""

    def abandon(self, service: str) -> str:
        """Leave the hook of a service that hangs, and return where it stands."""

    def facts(self, service: str) -> HostFacts:
        """Return the facts about the host of a service for the report."""

    def counts(self) -> tuple[dict[str, TaskCounts], dict[str, tuple[int, int, CallWaits]]]:
        """Return the counts of the tasks, and of each service: its calls, those that raised, and their waits."""

    def close_services(self) -> None:
        """End the threads of the services; a hook that hangs in one of them keeps this from returning."""


class ActorSide(Protocol):
    """The process of a site that is not the driver."""

    def exit(self) -> tuple[str, ...]:
        """End its leftovers, which are described, and soon the process itself, if the cluster cannot."""


class DriverSide(Protocol):
    """The driver's site, as the master asks it."""

    def attach(self, master: Address, epoch: int, addresses: Mapping[str, Address]) -> None:
        """Follow this master, and ask it for everything from now on."""

    def notice(self, event: Event | HookEvent) -> None:
        """Take in a change of state."""

    def sealed(self, ended: tuple[JobReport, Exception | None], services: dict[str, str]) -> bool:
        """Take in how the job and its services ended, and return whether the master is taken away from here.

        Args:
            ended: the report, and the error for a caller who waits, or None.
            services: the state of each service.
        """


class MasterSide(Protocol):
    """The master, as the sites ask it."""

    def task_event(self, event: TaskEvent, counts: TaskCounts | None) -> None:
        """Take in a change of a task, and its last counts."""

    def where_is(self, service: str, gone: Address | None) -> Address:
        """Return where a service is, other than at the address that is gone; wait while it is restarted."""

    def depends(self, service: str, other: str) -> None:
        """Note that a service asked for another.

        Raises:
            ServiceError: they call each other in a circle.
        """

    def service_died(self, service: str, incarnation: int, text: str) -> None:
        """Take in that a command of a site ended by itself."""

    def deferred(self, service: str, incarnation: int) -> None:
        """Note that an instance has something to clean up."""

    def permit(self, service: str) -> None:
        """Count a call that is about to begin.

        Raises:
            HeldBackError: the budget of the job is used up.
        """

    def used(self, service: str, prompt_tokens: int, completion_tokens: int) -> None:
        """Count the tokens of an answer towards the budget of the job."""

    def extend(self, service: str, incarnation: int, seconds: float) -> None:
        """Give the hook that runs more time."""

    def stop(self, way: int, reason: str, budget_s: float | None, hook_cap_s: float | None) -> None:
        """End the job."""

    def operators(self) -> tuple[OperatorReport, ...]:
        """Return the counts of every operator."""
