"""How the handles of a process lead to services in other processes of the job."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from sage._calls import not_in_time
from sage._hosts.call_threads import CallThreads
from sage._hosts.link import LinkClosedError, NotSentError
from sage._runtime.coroutines import is_on_loop
from sage.errors import ServiceError, ServiceUnavailableError, describe

if TYPE_CHECKING:
    from collections.abc import Callable

    from sage._calls import CallFuture
    from sage._ray.mesh import Address, Peer

LATE_ANSWER_S = 0.5
"""How much longer than its bound an answer is waited for: the process of the service tells of the time-out itself."""


class RemoteCalls:
    """Leads calls of one service to the process in which it lives, which has its gate.

    Args:
        service: its name.
        timeout_s: bound of a call that names none, or None.
        find: returns the process, and waits while there is none because the service is restarted; it is given the
            address of one that has turned out to be gone.
    """

    def __init__(self, service: str, timeout_s: float | None, find: Callable[[str, Address | None], Peer]) -> None:
        self._service = service
        self._timeout_s = timeout_s
        self._find = find
        self._peer: Peer | None = None
        self._gone: Address | None = None
        self._threads = CallThreads(service, None)
        self._methods: dict[str, bool] = {}  # whether each is a coroutine method

    def method(self, name: str) -> Any:
        """Return an attribute of the service."""
        is_method, value = self._ask("attribute", name)
        if not is_method:
            return value
        self._methods[name] = value
        return lambda *args, **kwargs: self.call(name, args, kwargs, None)

    def is_coroutine(self, name: str) -> bool:
        """Return whether it is known as a coroutine method."""
        return self._methods.get(name, False)

    def call(self, name: str, args: tuple[Any, ...], kwargs: dict[str, Any], timeout_s: float | None) -> Any:
        """Call a method; the process of the service sees to the time-out."""
        if is_on_loop() and self.is_coroutine(name):
            return self.call_async(name, args, kwargs, timeout_s)
        return self._called(name, args, kwargs, timeout_s)

    def call_async(
        self, name: str, args: tuple[Any, ...], kwargs: dict[str, Any], timeout_s: float | None
    ) -> CallFuture:
        """Start a call; a thread waits for its answer."""
        return self._threads.submit(name, lambda: self._called(name, args, kwargs, timeout_s), None)

    def close(self) -> None:
        """End the threads."""
        self._threads.close()

    def _called(self, name: str, args: tuple[Any, ...], kwargs: dict[str, Any], timeout_s: float | None) -> Any:
        if timeout_s is None:
            timeout_s = self._timeout_s
        if timeout_s is None:
            return self._ask("call", name, args, kwargs, None)
        try:
            return self._ask("call", name, args, kwargs, timeout_s, bound_s=timeout_s + LATE_ANSWER_S)
        except TimeoutError as error:
            if isinstance(error, ServiceError) or getattr(error, "__notes__", None):
                raise  # it was raised there
            raise not_in_time(self._service, name, timeout_s) from None  # its process does not answer at all

    def _ask(self, kind: str, name: str, *request: Any, bound_s: float | None = None) -> Any:
        peer = self._peer
        if peer is None:
            peer = self._peer = self._find(self._service, self._gone)
        try:
            return peer.ask(kind, self._service, name, *request, timeout_s=bound_s)
        except NotSentError as error:
            text = f'the arguments of "{self._service}".{name} cannot be pickled: {describe(error.reason)}'
            raise ServiceError(text, service=self._service) from error.reason
        except LinkClosedError:
            pass
        # The call may have been made, so it is not made again; the next one finds the process that follows.
        self._peer, self._gone = None, peer.address
        text = f'service "{self._service}" has no process any more'
        raise ServiceUnavailableError(text, service=self._service)
