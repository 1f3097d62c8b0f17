"""Services in processes of their own: what hangs or crashes there can be ended, and takes nothing else along."""

from __future__ import annotations

import logging
import socket
import subprocess
import sys
import threading
import time
from itertools import count
from typing import TYPE_CHECKING, Any, cast

from sage._calls import current_call
from sage._hosts.gated import GatedHost
from sage._hosts.link import SILENT, Link, LinkClosedError, NotSentError
from sage._hosts.own_process import OwnProcess
from sage._hosts.wire import encode
from sage._logs import forward, log_of
from sage._runtime.backend import HostFacts
from sage.errors import GraphError, ServiceError, ServiceUnavailableError, describe, hint

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from sage._hosts.own_process import ProcessGuard
    from sage._plan.logical import ServiceSpec
    from sage._runtime.backend import Backend
    from sage._runtime.coroutines import CoroutineLoop
    from sage._runtime.lifecycle import Exit
    from sage.service import ServiceContext, ServiceHandle, Supervision

log = log_of("sage.dispatcher")

WHERE_BOUND_S = 0.3
"""How long a process may take to say where it hangs; one that holds the interpreter's lock or was stopped cannot."""

BEGIN_LEAST_S = 0.1
"""How long a hook has to begin there at least: where a stop has used up its budget, hooks are late from the start."""

LINK_CLOSE_S = 1.0

BOOT = "import sys; sys.path[:] = {path!r}; from sage._hosts.child import main; main({link}, {guard}, {name!r})"


class ProcessHost(GatedHost):
    """Runs one service in a child process, started anew for each incarnation."""

    def __init__(
        self,
        spec: ServiceSpec,
        context: ServiceContext,
        backend: Backend,
        loop: CoroutineLoop,
        on_died: Callable[[int, str], None],
    ) -> None:
        super().__init__(spec, context, backend, loop, on_died)
        self._process: OwnProcess | None = None
        self._link: Link | None = None
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
        self._answers: dict[str, Callable[..., Any]] = {
            "service": self._know,
            "attribute": self._attribute_of_other,
            "call": self._call_other,
            "log": self._log,
            "claim": lambda entry: self._context._claim(**entry),
            "deferred": lambda: self._supervision.deferred(self.spec.name, self._incarnation),
            "extend": lambda seconds: self._supervision.extend(self.spec.name, self._incarnation, seconds),
        }

    @property
    def hooks(self) -> frozenset[str]:
        """The names of the hooks of the instance, and the end of its process."""
        return self._hooks | self.own_hooks

    @property
    def own_hooks(self) -> frozenset[str]:
        """The end of the process."""
        return frozenset({"exit"})

    def facts(self) -> HostFacts:
        """Return which process it was, and how it ended."""
        if self._process is None:
            return HostFacts("process")
        return HostFacts("process", self._process.pid, self._process.exit_code)

    def adopt(
        self, context: ServiceContext, backend: Backend, loop: CoroutineLoop, on_died: Callable[[int, str], None]
    ) -> None:
        """Let another job run the hooks of an instance that is kept, or tell it at once that its process is gone."""
        with self._lock:
            super().adopt(context, backend, loop, on_died)
            self._is_kept = False
            self._given_up = 0
            if self._death:
                self._on_died(self._incarnation, self._death)

    def release(self) -> None:
        """Free the thread of a service that is kept; its process stays."""
        super().release()
        self._is_kept = True

    def hurry(self, due: float) -> None:
        """Move the `due` of an "exit" that runs forward."""
        if self._process is not None:
            self._process.hurry(self._left(due))

    def abandon(self) -> str:
        """Leave the hook that hangs in the process, and say where it stands there."""
        stack = self._where()
        super().abandon()
        return stack

    def close(self) -> None:
        """Free the threads and the link."""
        super().close()
        if self._link is not None:
            self._link.close(LINK_CLOSE_S)

    # --- what a host adds ---

    @property
    def _is_there(self) -> bool:
        return self._is_built_there

    @property
    def _guard(self) -> ProcessGuard:
        # Whoever keeps the journal of a job also watches over its processes.
        return cast("ProcessGuard", self._context._claims)

    @property
    def _supervision(self) -> Supervision:
        supervision = self._context._supervision
        assert supervision is not None
        return supervision

    def _attribute(self, name: str) -> Any:
        if name not in self._methods:
            is_method, value = self._ask("attribute", name)
            if not is_method:
                return value
            self._methods[name] = value
        link = self._link

        def remote(*args: Any, **kwargs: Any) -> Any:
            return self._asked(link, "call", name, args, kwargs)

        def remote_coroutine(*args: Any, **kwargs: Any) -> Any:
            call, number = current_call(self.spec.name), next(self._numbers)
            if call is not None and link is not None:
                call.when_given_up(lambda: link.post("give up", number))
            return self._asked(link, "await", name, args, kwargs, number)

        return remote_coroutine if self._methods[name] else remote

    def is_coroutine(self, name: str) -> bool:
        """Return whether `name` is a coroutine method, as far as its class or its process has told."""
        return super().is_coroutine(name) or self._methods.get(name, False)

    def _build(self) -> frozenset[str]:
        self._methods = {}
        self._hooks = frozenset()
        self._start()
        spec = self.spec
        level = logging.getLogger("sage").getEffectiveLevel()
        self._hooks = self._ask("build", spec.target, spec.args, dict(spec.kwargs), self._incarnation, level)
        self._is_built_there = True
        return self._hooks

    def _run_hook(self, hook: str, due: float | None) -> Any:
        if hook == "exit":
            return self._exit(due)
        # The clock is that of the machine. Whoever was stopped, and is woken when nobody waits any more, can tell.
        return self._ask("hook", hook, time.monotonic() + max(self._left(due), BEGIN_LEAST_S))

    def _clean_late(self) -> None:
        """Do nothing: the process is ended, with what was built in it."""

    # --- the process ---

    def _start(self) -> None:
        name, incarnation = self.spec.name, self._incarnation
        if self._link is not None:
            self._link.close(LINK_CLOSE_S)
        self._cookie = self._guard.announce(name, incarnation, "process", self.spec.requires)
        path = [place or "." for place in sys.path]
        here, there = socket.socketpair()
        guardians, guarded = socket.socketpair()
        try:
            boot = BOOT.format(path=path, link=there.fileno(), guard=guarded.fileno(), name=name)
            # An "exit" on another thread, if this start was given up, finds either no process or all of it.
            with self._lock:
                self._process = None
                if incarnation <= self._given_up:
                    raise ServiceError(f'service "{name}" was given up before its process was started')
                process = OwnProcess(
                    [sys.executable, "-c", boot],
                    self._cookie,
                    lambda: self._process_ended(process),
                    stdin=subprocess.DEVNULL,
                    pass_fds=[there.fileno(), guarded.fileno()],
                )
                self._is_ending = False
                self._death = ""
                self._process = process
                # Its handles are found by the name that is pickled for them, in the job that asks.
                self._link = Link(here, self._answer, self._context._services, name, lambda: None)
                self._link.begin()
                process.watch()
                self._guard.started(name, incarnation, process.pid, guardians.detach())
        except BaseException:
            if self._process is None:
                here.close()
            guardians.close()
            raise
        finally:
            there.close()
            guarded.close()

    def _process_ended(self, process: OwnProcess) -> None:
        """Tell of a process that ended without being asked to; called by the thread that waits for it."""
        with self._lock:
            if process is not self._process or self._is_ending:
                return
            if self._link is not None:
                self._link.shut()  # what it forked may hold the other ends open, and nobody would answer
            if self._is_kept:
                self._gate.close()  # nobody decides anything before the next job does
            else:
                self.hold()  # until the lifecycle has decided what becomes of the service
            self._death = process.how_it_ended()
            self._on_died(self._incarnation, self._death)

    def _exit(self, due: float | None) -> Exit | None:
        with self._lock:
            self._given_up = self._incarnation
            self._is_ending = True
            process, link = self._process, self._link
        if process is None or link is None:
            return None  # it could not be started
        try:
            exit_ = process.end(lambda: self._ask_to_exit(link), self._guard.left_of, self._left(due))
        finally:
            self._is_built_there = False
            link.shut()
            self._guard.ended(self.spec.name, self._incarnation)
        return exit_

    def _ask_to_exit(self, link: Link) -> None:
        try:
            link.tell("exit")
        except LinkClosedError:
            log.debug("process is gone already service=%r", self.spec.name)

    def _where(self) -> str:
        if self._process is None or self._link is None:
            return ""
        try:
            stack: str = self._link.ask("where", timeout_s=WHERE_BOUND_S)
        except (LinkClosedError, TimeoutError):
            return f"process {self._process.pid} does not say where it stands"
        return stack

    # --- what goes over the link ---

    def _ask(self, *request: Any) -> Any:
        return self._asked(self._link, *request)

    def _asked(self, link: Link | None, *request: Any) -> Any:
        assert link is not None
        try:
            return link.ask(*request)
        except NotSentError as error:
            text = f'the arguments of "{self.spec.name}".{request[1]} cannot be pickled: {describe(error.reason)}'
            raise ServiceError(text, service=self.spec.name) from error.reason
        except LinkClosedError:
            how = ""
            if self._process is not None and self._process.wait_ended():
                how = f": {self._process.how_it_ended()}"
            text = f'service "{self.spec.name}" has no process any more{how}'
            raise ServiceUnavailableError(text, service=self.spec.name) from None

    def _answer(self, kind: str, *request: Any) -> Any:
        return self._answers[kind](*request)

    def _handle(self, name: str) -> ServiceHandle[Any]:
        return self._context.service(name)

    def _know(self, name: str) -> None:
        """Refuse an unknown service, and note one that this one depends on."""
        self._handle(name)

    def _attribute_of_other(self, service: str, name: str) -> tuple[bool, Any]:
        handle = self._handle(service)
        attribute = getattr(handle, name)
        return (True, handle._require().is_coroutine(name)) if callable(attribute) else (False, attribute)

    def _call_other(
        self, service: str, name: str, args: tuple[Any, ...], kwargs: dict[str, Any], timeout_s: float | None
    ) -> Any:
        handle = self._handle(service)
        if timeout_s is None:
            return getattr(handle, name)(*args, **kwargs)
        return handle._require().call(name, args, kwargs, timeout_s)

    def _log(self, values: dict[str, Any]) -> Any:
        forward(values)
        return SILENT


def check_can_be_sent(services: Iterable[ServiceSpec]) -> None:
    """Refuse what cannot be pickled, before anything is started, by the name of its argument.

    Raises:
        GraphError: the class, the function or an argument of one that is to have its own process cannot be sent there.
    """
    for spec in services:
        if spec.options.host == "process":
            _check(spec)


def _check(spec: ServiceSpec) -> None:
    parts = {"the class or function": spec.target}
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


def _error_of(value: Any) -> Exception | None:
    try:
        encode(value)
    except Exception as error:
        return error
    return None
