"""Services in their own processes: one that hangs or crashes can be ended without affecting the rest."""

from __future__ import annotations

import logging
import os
import socket
import subprocess
import sys
import threading
import time
from contextlib import ExitStack
from itertools import count
from typing import TYPE_CHECKING, Concatenate, Never, ParamSpec, TypeVar

from sage._calls import current_call
from sage._hosts.child_process import ChildProcess
from sage._hosts.gate import ConcurrentGate
from sage._hosts.gated import GatedHost
from sage._logs import forward, log_of
from sage._remote.begun import BegunCalls, shared_memory
from sage._remote.protocol import JobSide, ServiceSide, served
from sage._remote.rpc import NO_KWARGS, NotSentError, RpcClosedError, SocketPairRpc
from sage._remote.wire import encode
from sage._runtime.backend import HostFacts
from sage.errors import GraphError, ServiceError, ServiceUnavailableError, describe, hint

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from sage._hosts.gate import Gate
    from sage._plan.logical import ServiceSpec
    from sage._runtime.backend import HostSurroundings
    from sage._runtime.lifecycle import Exit
    from sage.service import ServiceContext, ServiceHandle, Supervision

log = log_of("sage.dispatcher")

P = ParamSpec("P")
R = TypeVar("R")

WHERE_BOUND_S = 0.3
"""How long a process may take to say where it hangs; one that holds the interpreter's lock or was stopped cannot."""

BEGIN_LEAST_S = 0.1
"""How long a hook has to begin there at least: where a stop has used up its budget, hooks are late from the start."""

LINK_CLOSE_S = 1.0

BOOT = (
    "import sys; sys.path[:] = {path!r}; "
    "from sage._remote.process import main; main({link}, {guard}, {begun}, {name!r})"
)


class ProcessHost(GatedHost):
    """Runs one service in a child process, started anew for each incarnation."""

    def __init__(self, spec: ServiceSpec, context: ServiceContext, surroundings: HostSurroundings) -> None:
        super().__init__(spec, context, surroundings)
        self._process: ChildProcess | None = None
        self._link: SocketPairRpc | None = None
        self._begun: BegunCalls | None = None
        self._cookie = ""
        self._hooks: frozenset[str] = frozenset()
        self._numbers = count(1)  # of calls
        self._methods: dict[str, bool] = {}  # whether each is a coroutine method
        self._is_built_there = False
        self._is_ending = False
        self._is_kept = False
        self._death = ""
        self._given_up = 0  # the last incarnation that must not be started any more
        self._lock = threading.Lock()

    @property
    def hooks(self) -> frozenset[str]:
        """The names of the hooks of the instance, and the end of its process."""
        return self._hooks | self.own_hooks

    @property
    def own_hooks(self) -> frozenset[str]:
        return frozenset({"exit"})

    def facts(self) -> HostFacts:
        """Return which process it was, and how it ended."""
        if self._process is None:
            return HostFacts("process")
        return HostFacts("process", self._process.pid, self._process.exit_code)

    def adopt(self, context: ServiceContext, surroundings: HostSurroundings) -> None:
        """Let another job run the hooks of an instance that is kept, or tell it at once that its process is gone."""
        with self._lock:
            super().adopt(context, surroundings)
            self._is_kept = False
            self._given_up = 0
            if self._death:
                self._around.on_died(self._incarnation, self._death)

    def release(self) -> None:
        super().release()
        self._is_kept = True

    def hurry(self, due: float) -> None:
        if self._process is not None:
            self._process.hurry(self._left(due))

    def abandon(self) -> str:
        """Leave the hook that hangs in the process, and say where it stands there."""
        stack = self._where()
        super().abandon()
        return stack

    def close(self) -> None:
        super().close()
        self._close_link()

    # --- the part of each host ---

    @property
    def _is_there(self) -> bool:
        return self._is_built_there

    def _attribute(self, name: str) -> object:
        if name not in self._methods:
            is_method, value = self._ask(name, ServiceSide.attribute, name)
            if not is_method:
                return value
            self._methods[name] = bool(value)
        link, begun, is_coroutine = self._link, self._begun, self._methods[name]
        assert link is not None
        assert begun is not None
        asked = link.asked

        def remote(*args: object, **kwargs: object) -> object:
            number = self._number_of_call(link) if is_coroutine else 0
            place = begun.take()
            try:
                return asked(None, ServiceSide.call, (place, name, args, kwargs, number), NO_KWARGS)
            except (NotSentError, RpcClosedError) as error:
                return self._call_unanswered(error, begun.has_begun(place), name, args, kwargs)
            finally:
                begun.free(place)

        return remote

    def _number_of_call(self, link: SocketPairRpc) -> int:
        """Return the number by which the process gives a call up when its caller does, or 0 where the caller cannot."""
        call = current_call(self.spec.front or self.spec.name)
        if call is None:
            return 0
        number = next(self._numbers)
        call.when_given_up(lambda: link.post(ServiceSide.give_up, number))
        return number

    def _new_gate(self) -> Gate:
        # A process makes one call at a time by itself: to wait there takes no thread here that hands the turn on.
        concurrency = self.spec.options.concurrency
        return ConcurrentGate(None if concurrency == 1 else concurrency, waits=self._waits)

    def _call_unanswered(
        self, error: Exception, has_begun: bool, name: str, args: tuple[object, ...], kwargs: dict[str, object]
    ) -> object:
        """Raise why a call has no answer; one that the process had not begun when it ended is made by the next one."""
        assert self._process is not None
        gate = self._gate
        if has_begun or isinstance(error, NotSentError) or not self._process.wait_ended():
            raise self._unanswered(error, name) from getattr(error, "reason", None)
        gate.take_back()
        if self.spec.front:
            gate.error_count -= 1  # the gate has counted the call, and counts the error next
            raise self._unavailable()
        return self._later(name, *args, **kwargs)

    def is_coroutine(self, name: str) -> bool:
        """Return whether `name` is a coroutine method, as far as its class or its process has told."""
        return super().is_coroutine(name) or self._methods.get(name, False)

    def _build(self) -> frozenset[str]:
        self._methods = {}
        self._hooks = frozenset()
        self._start()
        spec = self.spec
        level = logging.getLogger("sage").getEffectiveLevel()
        self._hooks = self._ask(
            "__init__",
            ServiceSide.build,
            spec.target,
            spec.args,
            dict(spec.kwargs),
            self._incarnation,
            level,
            spec.options.concurrency == 1,
        )
        self._is_built_there = True
        return self._hooks

    def _run_hook(self, hook: str, due: float | None) -> object:
        if hook == "exit":
            return self._exit(due)
        # The clock is that of the machine. Whoever was stopped, and is woken when nobody waits any more, can tell.
        return self._ask(hook, ServiceSide.run_hook, hook, time.monotonic() + max(self._left(due), BEGIN_LEAST_S))

    def _clean_late(self) -> None:
        """Do nothing: the process is ended, with the instance in it."""

    # --- requests of the process ---

    @property
    def supervision(self) -> Supervision:
        """The supervision of the present job."""
        return self._around.supervision

    def handle(self, name: str) -> ServiceHandle[object]:
        """Return the handle of another service, and note that this one depends on it.

        Raises:
            UnknownServiceError: the job has no service of this name.
        """
        return self._context.service(name)

    # --- the process ---

    def _close_link(self) -> None:
        if self._link is not None:
            self._link.close(LINK_CLOSE_S)
        if self._begun is not None:
            self._begun.close()

    def _start(self) -> None:
        name, incarnation = self.spec.name, self._incarnation
        self._close_link()
        self._cookie = self._around.process_guard.announce(name, incarnation, "process", self.spec.requires)
        path = [place or "." for place in sys.path]
        link: SocketPairRpc | None = None
        with ExitStack() as undone:
            here, there = socket.socketpair()
            undone.callback(here.close)
            undone.callback(there.close)
            guardians, guarded = socket.socketpair()
            undone.callback(guardians.close)
            undone.callback(guarded.close)
            begun = shared_memory()
            undone.pop_all()
        try:
            boot = BOOT.format(path=path, link=there.fileno(), guard=guarded.fileno(), begun=begun, name=name)
            # An "exit" on another thread, if this start was given up, finds either no process or all of it.
            with self._lock:
                self._process = None
                if incarnation <= self._given_up:
                    raise ServiceError(f'service "{name}" was given up before its process was started')
                # Its handles are found by the name that is pickled for them, in the job that asks.
                self._begun = BegunCalls(begun)
                requests = served((JobSide, ServiceRequests(self)))
                link = SocketPairRpc(here, requests, self._around.handles, name, lambda: None)
                link.begin()
                process = ChildProcess(
                    [sys.executable, "-c", boot],
                    self._cookie,
                    lambda: self._process_ended(process),
                    stdin=subprocess.DEVNULL,
                    pass_fds=[there.fileno(), guarded.fileno(), begun],
                )
                self._is_ending = False
                self._death = ""
                self._process, self._link = process, link
                process.watch()
                self._around.process_guard.started(name, incarnation, process.pid, guardians.detach())
        except BaseException:
            if self._process is None:
                if self._begun is not None:
                    self._begun.close()
                if link is not None:
                    link.close(LINK_CLOSE_S)
                here.close()
            guardians.close()
            raise
        finally:
            there.close()
            guarded.close()
            os.close(begun)

    def _process_ended(self, process: ChildProcess) -> None:
        """Tell of a process that ended without being asked to; called by the thread that waits for it."""
        with self._lock:
            if process is not self._process or self._is_ending:
                return
            if self._link is not None:
                self._link.shut()  # its forked children may hold the other ends open, and nobody would answer
            if self._is_kept:
                self._gate.close()  # nobody decides anything before the next job does
            else:
                self.hold()  # until the lifecycle has decided about the service
            self._death = process.how_it_ended()
            self._around.on_died(self._incarnation, self._death)

    def _exit(self, due: float | None) -> Exit | None:
        with self._lock:
            self._given_up = self._incarnation
            self._is_ending = True
            process, link = self._process, self._link
        if process is None or link is None:
            return None  # it could not be started
        try:
            exit_ = process.end(
                lambda: self._ask_to_exit(link), self._around.process_guard.left_of, self._left(due), self._where
            )
        finally:
            self._is_built_there = False
            link.shut()
            self._around.process_guard.ended(self.spec.name, self._incarnation)
        return exit_

    def _ask_to_exit(self, link: SocketPairRpc) -> None:
        try:
            link.tell(ServiceSide.exit)
        except RpcClosedError:
            log.debug("process is gone already service=%r", self.spec.name)

    def _where(self) -> str:
        if self._process is None or self._link is None:
            return ""
        try:
            return self._link.ask_within(WHERE_BOUND_S, ServiceSide.where)
        except (RpcClosedError, TimeoutError):
            return f"process {self._process.pid} does not say where it stands"

    # --- requests to the process ---

    def _ask(self, name: str, method: Callable[Concatenate[Never, P], R], *args: P.args, **kwargs: P.kwargs) -> R:
        """Ask the process, and describe an error by the `name` of the service's method."""
        assert self._link is not None
        try:
            return self._link.ask(method, *args, **kwargs)
        except (NotSentError, RpcClosedError) as error:
            raise self._unanswered(error, name) from getattr(error, "reason", None)

    def _unanswered(self, error: Exception, name: str) -> ServiceError:
        """Return the error for a request that was not sent, or whose process is gone."""
        service = self.spec.name
        if isinstance(error, NotSentError):
            text = f'the arguments of "{service}".{name} cannot be pickled: {describe(error.reason)}'
            return ServiceError(text, service=service)
        how = ""
        if self._process is not None and self._process.wait_ended():
            how = f": {self._process.how_it_ended()}"
        return ServiceUnavailableError(f'service "{service}" has no process any more{how}', service=service)


class ServiceRequests(JobSide):
    """Answers the requests of a service's process."""

    def __init__(self, host: ProcessHost) -> None:
        self._host = host

    def know(self, service: str) -> None:
        self._host.handle(service)

    def attribute(self, service: str, name: str) -> tuple[bool, object]:
        """Return whether an attribute of another service is a method, and its value or kind."""
        handle = self._host.handle(service)
        attribute = getattr(handle, name)
        return (True, handle._require().is_coroutine(name)) if callable(attribute) else (False, attribute)

    def call(
        self, service: str, name: str, args: tuple[object, ...], kwargs: dict[str, object], timeout_s: float | None
    ) -> object:
        handle = self._host.handle(service)
        if timeout_s is None:
            return getattr(handle, name)(*args, **kwargs)
        return handle._require().call(name, args, kwargs, timeout_s)

    def log(self, values: dict[str, object]) -> None:
        forward(values)

    # A kept service counts its incarnations in its first job, the host in the present one.

    def deferred(self, service: str, incarnation: int) -> None:  # noqa: ARG002
        """Say that the service has something to clean up."""
        self._host.supervision.deferred(service, self._host.incarnation)

    def extend(self, service: str, incarnation: int, seconds: float) -> None:  # noqa: ARG002
        """Give the hook that runs more time."""
        self._host.supervision.extend(service, self._host.incarnation, seconds)

    def used(self, service: str, prompt_tokens: int, completion_tokens: int) -> None:
        self._host.supervision.used(service, prompt_tokens, completion_tokens)

    def claim(self, service: str, entry: dict[str, object]) -> None:
        """Record a thing to reap if the service is lost."""
        self._host.supervision.claim(service, entry)


def check_can_be_sent(services: Iterable[ServiceSpec]) -> None:
    """Refuse values that cannot be pickled, before anything is started, and name the argument.

    Raises:
        GraphError: the class, the function or an argument of one that is to have its own process cannot be sent there.
    """
    for spec in services:
        if spec.options.host == "process":
            _check(spec)


def _check(spec: ServiceSpec) -> None:
    parts: dict[str, object] = {"the class or function": spec.target}
    parts |= {f"argument {place}": value for place, value in enumerate(spec.args)}
    parts |= {f'argument "{name}"': value for name, value in spec.kwargs.items()}
    for part, value in parts.items():
        error = _error_of(value)
        if error is None:
            continue
        for name, attribute in getattr(value, "__dict__", {}).items() if not isinstance(value, type) else ():
            if _error_of(attribute) is not None:
                part = f'attribute "{name}" of {part}'
                break
        text = f'service "{spec.name}" cannot be sent to a process of its own: {part}: {describe(error)}'
        raise hint(GraphError(text), "Make it in the constructor or in setup(), which run in that process.") from error


def _error_of(value: object) -> Exception | None:
    try:
        encode(value)
    except Exception as error:
        return error
    return None
