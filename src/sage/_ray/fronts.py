"""Replicas in other processes of a job, and the front that each process has to choose one of them for a call."""

from __future__ import annotations

from typing import TYPE_CHECKING

from sage._calls import function_of
from sage._hosts.gated import NotMadeError
from sage._hosts.replicas import NO_KEY, ReplicasHost
from sage._remote.calls import RemoteCalls
from sage._runtime.partition import stable_hash
from sage.errors import ServiceUnavailableError

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from sage._hosts.replicas import ReplicaHost
    from sage._plan.logical import ServiceSpec
    from sage._remote.protocol import Address
    from sage._remote.rpc import RpcClient
    from sage._runtime.backend import HostSurroundings
    from sage.service import ServiceContext


def _nobody() -> None:
    """Stand for the front."""


class SiteFront(ReplicasHost):
    """The front of a replicated service in one process of a job; it knows of the calls of this process alone."""

    def __init__(
        self,
        spec: ServiceSpec,
        context: ServiceContext,
        surroundings: HostSurroundings,
        replicas: Sequence[ReplicaHost],
    ) -> None:
        super().__init__(spec, context, surroundings, replicas)
        self._build()  # the master starts the front of the lifecycle, and only opens the gate of this one

    def _key(self, args: tuple[object, ...], kwargs: dict[str, object]) -> object:
        """Return a key whose hash is the same in all processes, so that their calls go to the same replica."""
        key = super()._key(args, kwargs)
        return key if key is NO_KEY else stable_hash(key)


class AwayReplica:
    """Stands for a replica in another process; the master says where it takes calls.

    Args:
        name: its name.
        reach: returns the client of the process at an address.
    """

    def __init__(self, name: str, reach: Callable[[Address], RpcClient]) -> None:
        self.on_turned: Callable[[], None] = _nobody
        self._name = name
        self._reach = reach
        self._address: Address | None = None
        self._is_over = False
        self._calls: list[RemoteCalls] = []  # of each incarnation

    @property
    def takes_calls(self) -> bool:
        """Whether it takes calls, as far as this process knows."""
        return self._address is not None

    @property
    def is_refused(self) -> bool:
        """Whether it takes calls no more."""
        return self._is_over

    def is_coroutine(self, name: str) -> bool:
        """Return whether it is known as a coroutine method."""
        return any(calls.is_coroutine(name) for calls in self._calls)

    def attribute(self, name: str) -> object:
        """Return an attribute of the instance."""
        if not self._calls:
            raise self._unavailable()
        return self._calls[-1].method(name)

    def bound(self, name: str) -> Callable[..., object]:
        """Return a method; its gate is in its process."""
        return function_of(self.attribute(name))

    def route(self, address: Address | None, is_over: bool) -> None:
        """Take in where it takes calls from now on, or that it takes none, perhaps for good."""
        if address is not None:
            # Each incarnation has an address of its own, so that its end closes no later one.
            self._calls.append(RemoteCalls(self._name, None, self._finding(address)))
        self._address, self._is_over = address, is_over
        self.on_turned()

    def close(self) -> None:
        """End the threads of its calls, and let those that wait fail."""
        self.route(None, is_over=True)
        for calls in self._calls:
            calls.close()

    def _coroutine_method(self, name: str) -> None:  # noqa: ARG002
        """Return nothing: a thread waits for the answer of another process."""
        return

    def _finding(self, address: Address) -> Callable[[str, RpcClient | None], RpcClient]:
        def find(_: str, gone: RpcClient | None) -> RpcClient:
            if gone is None:
                return self._reach(address)
            # A call has found its process gone. Until the master says where the next one is, calls go elsewhere.
            if self._address == address:
                self._address = None
                self.on_turned()
            raise self._unavailable()

        return find

    def _unavailable(self) -> ServiceUnavailableError:
        return NotMadeError(f'service "{self._name}" takes no calls now', service=self._name)
