"""How the handles of a process lead to services in other processes of the job."""

from __future__ import annotations

from typing import TYPE_CHECKING, Concatenate, Never, ParamSpec, TypeVar

from sage._calls import not_in_time
from sage._forks import refusal
from sage._hosts.call_threads import CallThreads
from sage._remote.protocol import CallSide
from sage._remote.rpc import NotReceivedError, NotSentError, RpcClosedError
from sage._runtime.coroutines import is_on_loop
from sage.errors import ServiceError, ServiceUnavailableError, describe

if TYPE_CHECKING:
    from collections.abc import Callable

    from sage._calls import CallFuture
    from sage._remote.rpc import RpcClient

P = ParamSpec("P")
R = TypeVar("R")

LATE_ANSWER_S = 0.5
"""How much longer than its bound an answer is waited for: the process of the service tells of the time-out itself."""


class RemoteCalls:
    """Leads calls of one service to the process in which it lives, which has its gate.

    Args:
        service: its name.
        timeout_s: bound of a call that names none, or None.
        find: returns the client of the process, and waits while the service is being restarted; it is given the
            one that has turned out to be gone.
        lost: the end of the message for a call whose process is gone.
    """

    def __init__(
        self,
        service: str,
        timeout_s: float | None,
        find: Callable[[str, RpcClient | None], RpcClient],
        lost: str = "has no process any more",
    ) -> None:
        self._service = service
        self._timeout_s = timeout_s
        self._find = find
        self._lost = lost
        self._client: RpcClient | None = None
        self._gone: RpcClient | None = None
        self._threads = CallThreads(service, None)
        self._methods: dict[str, bool] = {}  # whether each is a coroutine method

    def method(self, name: str) -> object:
        """Return an attribute of the service."""
        if name not in self._methods:
            is_method, value = self._attribute(name)
            if not is_method:
                return value
            self._methods[name] = bool(value)
        return lambda *args, **kwargs: self.call(name, args, kwargs, None)

    def _attribute(self, name: str) -> tuple[bool, object]:
        try:
            return self._ask(None, CallSide.attribute, self._service, name)
        except ServiceUnavailableError:
            if self._client is not None:
                raise
            # Its process went before it answered. Nothing was called yet, so the one that follows is asked.
            return self._ask(None, CallSide.attribute, self._service, name)

    def is_coroutine(self, name: str) -> bool:
        """Return whether it is known as a coroutine method."""
        return self._methods.get(name, False)

    def call(self, name: str, args: tuple[object, ...], kwargs: dict[str, object], timeout_s: float | None) -> object:
        """Call a method; the process of the service sees to the time-out."""
        if is_on_loop() and self.is_coroutine(name):
            return self.call_async(name, args, kwargs, timeout_s)
        return self._called(name, args, kwargs, timeout_s)

    def call_async(
        self, name: str, args: tuple[object, ...], kwargs: dict[str, object], timeout_s: float | None
    ) -> CallFuture:
        """Start a call; a thread waits for its answer."""
        return self._threads.submit(name, lambda: self._called(name, args, kwargs, timeout_s), None)

    def close(self) -> None:
        """End the threads."""
        self._threads.close()

    def _called(
        self, name: str, args: tuple[object, ...], kwargs: dict[str, object], timeout_s: float | None
    ) -> object:
        if timeout_s is None:
            timeout_s = self._timeout_s
        if timeout_s is None:
            return self._ask(None, CallSide.call, self._service, name, args, kwargs, None)
        try:
            bound_s = timeout_s + LATE_ANSWER_S
            return self._ask(bound_s, CallSide.call, self._service, name, args, kwargs, timeout_s)
        except TimeoutError as error:
            if isinstance(error, ServiceError) or getattr(error, "__notes__", None):
                raise  # it was raised there
            raise not_in_time(self._service, name, timeout_s) from None  # its process does not answer at all

    def _ask(
        self,
        bound_s: float | None,
        method: Callable[Concatenate[Never, str, str, P], R],
        service: str,
        name: str,
        *args: P.args,
        **kwargs: P.kwargs,
    ) -> R:
        while True:
            client = self._client
            if client is None:
                client = self._client = self._find(service, self._gone)
            try:
                return client.ask_within(bound_s, method, service, name, *args, **kwargs)
            except NotSentError as error:
                text = f'the arguments of "{service}".{name} cannot be pickled: {describe(error.reason)}'
                raise ServiceError(text, service=service) from error.reason
            except RpcClosedError as error:
                if client.is_forked:
                    raise refusal(service) from None
                self._client, self._gone = None, client
                if not isinstance(error, NotReceivedError):
                    # The call may have been made, so it is not made again; the next one finds the process that follows.
                    raise ServiceUnavailableError(f'service "{service}" {self._lost}', service=service) from None
