"""Replicas: several instances of one service, and the front that chooses one of them for each call."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any, Protocol

from sage._current_job import wait_for
from sage._hosts.gate import ConcurrentGate
from sage._hosts.gated import GatedHost, NotMadeError
from sage._plan.logical import ServiceSpec
from sage._runtime.backend import HostFacts
from sage.errors import GraphError, ServiceUnavailableError, hint
from sage.service import ServiceHandle

if TYPE_CHECKING:
    import threading
    from collections.abc import Awaitable, Callable, Iterable, Sequence

    from sage._hosts.gate import Gate
    from sage._runtime.backend import HostSurroundings
    from sage.service import ServiceContext

LOSSES_MAX = 2
"""How many replicas may die during one idempotent call before it fails: it may be the call that kills them."""

NO_KEY = object()


def with_replicas(services: Iterable[ServiceSpec]) -> tuple[ServiceSpec, ...]:
    """Return services as the lifecycle sees them: each replica is one, and their front, which needs them, follows."""
    return tuple(part for spec in services for part in (_parts(spec) if spec.options.has_replicas else (spec,)))


def _parts(spec: ServiceSpec) -> tuple[ServiceSpec, ...]:
    names = [f"{spec.name}[{number}]" for number in range(1, spec.options.replicas + spec.options.recycles + 1)]
    # The front decides whether the job fails, bounds calls and keeps the rate for all.
    own = replace(spec.options.of_one(), required=False, call_timeout_s=None, rate=None)
    replicas = [
        replace(
            spec,
            name=name,
            options=own,
            handle=ServiceHandle(name, spec.target),
            command=None if spec.command is None else replace(spec.command, name=name),
            front=spec.name,
            spare=number > spec.options.replicas,
        )
        for number, name in enumerate(names, 1)
    ]
    options = replace(spec.options, depends_on=tuple(names), concurrency=None, restart="never")
    return (*replicas, replace(spec, args=(), kwargs={}, options=options, command=None))


def check_replicas(services: Iterable[ServiceSpec], keep: frozenset[str]) -> None:
    """Refuse replicas that cannot be had, before anything is started.

    Raises:
        GraphError: the service is to be kept, its command has a fixed port, or a replica has the name of a service.
    """
    services = tuple(services)
    names = [spec.name for spec in services]
    for spec in services:
        if not spec.options.has_replicas:
            continue
        if spec.name in keep:
            error = GraphError(f'service "{spec.name}" has replicas, and cannot be kept for the next job')
            raise hint(error, "Leave it out of keep_services, or leave its replicas out.")
        if spec.command is not None and spec.command.port is not None and spec.options.replicas > 1:
            text = f'service "{spec.name}" has {spec.options.replicas} replicas, which cannot share port'
            error = GraphError(f"{text} {spec.command.port}")
            raise hint(error, "Leave port= out, and write {port} in the command: each replica gets a free one.")
        taken = [part.name for part in _parts(spec)[:-1] if part.name in names]
        if taken:
            error = GraphError(f'service "{taken[0]}" has the name of a replica of service "{spec.name}"')
            raise hint(error, "Register it under another name.")


class ReplicaHost(Protocol):
    """The host of a replica, or the stand-in of one in another process, as the front needs it.

    Attributes:
        on_turned: called when calls are let through from now on, or are not.
    """

    on_turned: Callable[[], None]

    @property
    def takes_calls(self) -> bool:
        """Whether calls are let through."""

    @property
    def is_refused(self) -> bool:
        """Whether calls fail, and no later ones will be let through."""

    def is_coroutine(self, name: str) -> bool:
        """Return whether `name` is a coroutine method."""

    def attribute(self, name: str) -> object:
        """Return an attribute of the instance, without a gate before it."""

    def bound(self, name: str) -> Callable[..., Any]:
        """Return a method behind the replica's own gate."""

    def _coroutine_method(self, name: str) -> Callable[..., Awaitable[object]] | None:
        """Return a coroutine method of the instance, or None if threads have to call it."""


class Replica:
    """One replica, as its front sees it.

    Attributes:
        place: its place among the replicas, which decides about its keys; None for a spare one, which gets no calls.
        running: how many calls of the front it makes.
        chosen_at: when it was chosen last, as a number of choices.
        made_count: how many calls its present process has made.
        ready_at: since when that process is ready, by the clock of the backend.
    """

    def __init__(self, name: str, host: ReplicaHost, place: int | None) -> None:
        self.name = name
        self.host = host
        self.place = place
        self.running = 0
        self.chosen_at = 0
        self.made_count = 0
        self.ready_at = 0.0

    @property
    def is_spare(self) -> bool:
        """Whether it gets no calls."""
        return self.place is None


class Recycling(Protocol):
    """The recycling of a front's replicas, as the front sees it.

    Attributes:
        count: how many processes have given their place to new ones.
    """

    count: int

    def starts(self, replica: Replica) -> bool:
        """Return whether a spare replica is on its start, so that calls may wait for it."""

    def returned(self, replica: Replica) -> None:
        """Take in that a call of a replica has returned; the front holds its lock."""


class ReplicasHost(GatedHost):
    """The front of a replicated service: it has no instance, and gives each call to one of the replicas.

    The lifecycle starts it after its replicas and ends it before them. Rate, budget and time-outs of calls are kept
    here, hooks and concurrency by each replica.
    """

    def __init__(
        self,
        spec: ServiceSpec,
        context: ServiceContext,
        surroundings: HostSurroundings,
        replicas: Sequence[ReplicaHost],
    ) -> None:
        super().__init__(spec, context, surroundings)
        self.replicas = [
            Replica(name, host, place if place < spec.options.replicas else None)
            for place, (name, host) in enumerate(zip(spec.requires, replicas, strict=True))
        ]
        self.recycler: Recycling | None = None
        self._choices = 0
        self._is_up = False
        for host in replicas:
            host.on_turned = self._turned

    @property
    def lock(self) -> threading.Condition:
        """Guards the replicas."""
        return self._changed

    @property
    def hooks(self) -> frozenset[str]:
        """None of its own: those of the replicas are theirs."""
        return frozenset()

    def facts(self) -> HostFacts:
        return HostFacts("replicas", recycled=0 if self.recycler is None else self.recycler.count)

    def is_coroutine(self, name: str) -> bool:
        """Return whether `name` is a coroutine method of the replicas."""
        return any(replica.host.is_coroutine(name) for replica in self.replicas)

    # --- the part of each host ---

    @property
    def _is_there(self) -> bool:
        return self._is_up

    def _new_gate(self) -> Gate:
        return ConcurrentGate(None, waits=self._waits)

    def _build(self) -> frozenset[str]:
        self._is_up = True
        return self.hooks

    def _run_hook(self, hook: str, due: float | None) -> object:
        """Do nothing: it has no hooks."""

    def _clean_late(self) -> None:
        """Do nothing: it has no instance."""

    def _attribute(self, name: str) -> object:
        while True:
            replica = self._enter(NO_KEY)
            try:
                attribute = replica.host.attribute(name)
            except NotMadeError as error:
                self._losses(replica, error, 0)
            else:
                return self._routed(name) if callable(attribute) else attribute
            finally:
                self._leave(replica, calls=0)

    def _coroutine_method(self, name: str) -> Callable[..., Awaitable[object]] | None:
        if all(replica.host._coroutine_method(name) is None for replica in self.replicas):
            return None

        async def call(*args: object, **kwargs: object) -> object:
            key, losses = self._key(args, kwargs), 0
            while True:
                replica = self._entered(key)
                if replica is None:
                    await self._own_threads().submit(name, self._wait_open, None)
                    continue
                try:
                    return await replica.host.bound(name)(*args, **kwargs)
                except ServiceUnavailableError as error:
                    losses = self._losses(replica, error, losses)
                finally:
                    self._leave(replica)

        return call

    def _routed(self, name: str) -> Callable[..., object]:
        """Return a method that each call makes on a replica of its own choice."""

        def call(*args: object, **kwargs: object) -> object:
            key, losses = self._key(args, kwargs), 0
            while True:
                replica = self._enter(key)
                try:
                    return replica.host.bound(name)(*args, **kwargs)
                except ServiceUnavailableError as error:
                    losses = self._losses(replica, error, losses)
                finally:
                    self._leave(replica)

        return call

    # --- the choice ---

    def _key(self, args: tuple[object, ...], kwargs: dict[str, object]) -> object:
        affinity = self.spec.options.affinity
        return NO_KEY if affinity is None else affinity(*args, **kwargs)

    def _enter(self, key: object) -> Replica:
        """Return the replica for a call, which counts there from now on; wait while all of them are restarted."""
        while (replica := self._entered(key)) is None:
            self._wait_open()
        return replica

    def _entered(self, key: object) -> Replica | None:
        with self._changed:
            candidates = [replica for replica in self.replicas if replica.host.takes_calls]
            if self.recycler is not None:  # an old one gets a call only if there is nobody else
                candidates = [replica for replica in candidates if not replica.is_spare] or candidates
            if not candidates:
                if self._is_hopeless():
                    raise self._unavailable()
                return None
            if key is NO_KEY:
                chosen = min(candidates, key=lambda replica: (replica.running, replica.chosen_at))
            else:
                # Each key ranks the replicas in an order of its own, so only the keys of a lost one move.
                chosen = max(candidates, key=lambda replica: hash((key, replica.place)))
            self._choices += 1
            chosen.chosen_at = self._choices
            chosen.running += 1
            return chosen

    def _leave(self, replica: Replica, calls: int = 1) -> None:
        with self._changed:
            replica.running -= 1
            replica.made_count += calls
            if self.recycler is not None:
                self.recycler.returned(replica)

    def _losses(self, replica: Replica, error: ServiceUnavailableError, losses: int) -> int:
        """Return how many replicas have died during a call that another one shall make, or raise why it fails."""
        if isinstance(error, NotMadeError) and error.service == replica.name:
            return losses  # its replica had not begun it, and takes no calls now
        if error.service != replica.name or not self.spec.options.idempotent or losses == LOSSES_MAX:
            raise error
        return losses + 1

    def _is_hopeless(self) -> bool:
        """Whether no replica takes calls, and none comes back."""
        return not any(self._may_come_back(replica) for replica in self.replicas)

    def _may_come_back(self, replica: Replica) -> bool:
        if replica.host.is_refused:
            return False
        return not replica.is_spare or (self.recycler is not None and self.recycler.starts(replica))

    def _wait_open(self) -> None:
        def is_over() -> bool:
            return any(replica.host.takes_calls for replica in self.replicas) or self._is_hopeless()

        wait_for(self._changed, is_over, None)

    def _turned(self) -> None:
        """Let waiting calls look again, as a replica takes calls from now on, or takes none."""
        with self._changed:
            self._changed.notify_all()
