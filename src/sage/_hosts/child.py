"""The process of a service: builds it, runs its hooks and calls as it is asked to, and outlives its driver in order.

`main` is what the process runs. One thread answers each request, so the main thread only waits for the end.
"""

from __future__ import annotations

import json
import logging
import os
import signal
import socket
import sys
import threading
import time
import traceback
from contextlib import suppress
from typing import TYPE_CHECKING, Any

from sage._hosts.call_threads import CallThreads
from sage._hosts.instance import Instance
from sage._hosts.link import SILENT, Link, LinkClosedError, NotSentError
from sage._hosts.wire import encode
from sage._runtime.coroutines import CoroutineLoop, is_on_loop
from sage.errors import ServiceError, ServiceUnavailableError, describe
from sage.service import ServiceContext, ServiceHandle

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from concurrent.futures import Future

    from sage._calls import CallFuture
    from sage._hosts.link import Asking
    from sage._hosts.wire import Connection

ORDER_BYTES_MAX = 65_536

START_HOOKS = frozenset({"setup", "start", "ready"})
"""What has to have succeeded, as far as the service has it, before `stop` may follow."""

ORDER_BOUND_S = 30.0
"""How long the guardian may take to give its order; it stops its services one after another, within 10 s in all."""

ORPHAN_STOP_S = 10.0
"""How long stop and cleanup may take together when driver and guardian are both gone."""


class Child:
    """One service in a process of its own.

    Args:
        link: leads to the driver.
        guard: the guardian's orders come from here; end-of-file says that driver and guardian are both gone.
        name: the service's name.
    """

    def __init__(self, link: socket.socket, guard: socket.socket, name: str) -> None:
        self._name = name
        self._guard = guard
        self._loop = CoroutineLoop(name)
        self._instance = Instance(name, self._loop)
        self._handles = Handles(self)
        self._over = threading.Event()
        self._is_told = False
        self._succeeded: set[str] = set()
        self._begun: set[str] = set()
        self._busy = Busy()
        self._methods: dict[str, Callable[..., Any]] = {}
        self._running: dict[int, Future[Any]] = {}
        self._given_up: set[int] = set()
        self._answers: dict[str, Callable[..., Any]] = {
            "build": self._build,
            "hook": self._hook,
            "call": self._call,
            "await": self._await,
            "give up": self._give_up,
            "attribute": self._attribute,
            "where": self._where,
            "exit": self._exit,
        }
        self.link = Link(link, self._answer, self._handles, name, self._over.set)

    def live(self) -> None:
        """Do as the driver says until it says "exit", or until it is gone; then end in order."""
        self.link.begin()
        self._over.wait()
        if not self._is_told:
            self._be_orphan()
        self._loop.close()

    # --- what the driver asks for ---

    def _answer(self, kind: str, *request: Any) -> Any:
        return self._answers[kind](*request)

    def _build(
        self, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any], incarnation: int, level: int
    ) -> frozenset[str]:
        logging.getLogger().addHandler(Forward(self.link))
        logging.getLogger().setLevel(level)
        context = ServiceContext(self._name, self._handles, None, self, self, incarnation)
        with self._busy:
            self._instance.build(target, args, kwargs, context)
        return self._instance.hooks

    def _hook(self, hook: str, due: float) -> Any:
        if time.monotonic() > due:
            raise TimeoutError(f"{hook} could not begin in time")
        self._begun.add(hook)
        with self._busy:
            value = self._instance.run_hook(hook)
        if hook != "ready" or value:
            self._succeeded.add(hook)
        # Hooks may return whatever they like; only these two are asked for an answer.
        return bool(value) if hook == "ready" else value is not False if hook == "health" else None

    def _call(self, name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        method = self._methods.get(name)
        if method is None:
            method = self._methods[name] = self._instance.attribute(name)
        with self._busy:
            return method(*args, **kwargs)

    def _await(self, name: str, args: tuple[Any, ...], kwargs: dict[str, Any], call: int) -> Any:
        """Run a coroutine method to its end, or until the driver gives up the call."""
        method = self._instance.coroutine_method(name)
        assert method is not None
        with self._busy:
            running = self._running[call] = self._loop.start(method(*args, **kwargs))
            try:
                if call in self._given_up:
                    running.cancel()
                return running.result()
            finally:
                del self._running[call]
                self._given_up.discard(call)

    def _give_up(self, call: int) -> Any:
        """Cancel the coroutine of a call, which may not have begun yet."""
        self._given_up.add(call)
        running = self._running.get(call)
        if running is not None:
            running.cancel()
        return SILENT

    def _attribute(self, name: str) -> tuple[bool, Any]:
        """Return whether an attribute is a method, and its value if it is not, or whether it is a coroutine method."""
        attribute = self._instance.attribute(name)
        return (True, self._instance.coroutine_method(name) is not None) if callable(attribute) else (False, attribute)

    def _where(self) -> str:
        """Return where the threads of this process stand, but for those that only wait for requests."""
        names = {thread.ident: thread.name for thread in threading.enumerate()}
        stacks = []
        for ident, frame in sys._current_frames().items():
            stack = traceback.extract_stack(frame)
            if ident != threading.get_ident() and any(not _is_ours(entry.filename) for entry in stack):
                own = [entry for entry in stack if not _is_ours(entry.filename)]
                stacks.append(f"thread {names.get(ident, ident)}:\n" + "".join(traceback.format_list(own)))
        return "".join(stacks)

    def _exit(self) -> Any:
        self._is_told = True
        self._over.set()
        return SILENT

    # --- what the service asks of its job: `Supervision` and `Claims` ---

    def deferred(self, service: str, incarnation: int) -> None:  # noqa: ARG002
        """Say that the service has something to clean up."""
        self.link.ask("deferred")

    def extend(self, service: str, incarnation: int, seconds: float) -> None:  # noqa: ARG002
        """Ask for more time for the hook that runs."""
        self.link.ask("extend", seconds)

    def claim(self, service: str, entry: dict[str, Any]) -> None:  # noqa: ARG002
        """Have an entry written into the journal."""
        self.link.ask("claim", entry)

    def handle(self, name: str) -> ServiceHandle[Any]:
        """Return a handle of a service of the job; this service's own leads to the instance here."""
        handle: ServiceHandle[Any] = ServiceHandle(name, None)
        handle._connect(OwnCalls(self._instance) if name == self._name else DriverCalls(self.link, name))
        return handle

    def ask_for(self, name: str) -> None:
        """Let the driver know that the service depends on another, and hear if it is unknown."""
        if name != self._name:
            self.link.ask("service", name)

    # --- the end without a driver ---

    def _be_orphan(self) -> None:
        """Stop and clean up when the guardian says so, or at once if it is gone too."""
        self._guard.settimeout(ORDER_BOUND_S)
        try:
            order = self._guard.recv(ORDER_BYTES_MAX)
        except OSError:  # a guardian that hangs counts as gone
            order = b""
        due = time.monotonic() + (float(json.loads(order)["stop"]) if order else ORPHAN_STOP_S)
        errors: list[str] = []
        ending = threading.Thread(target=self._end, args=(due, errors), name=f"{self._name}-end", daemon=True)
        ending.start()
        ending.join(max(due - time.monotonic(), 0))
        if ending.is_alive():
            errors.append("stop and cleanup did not end in time")
        if order:
            answer = {"stopped": not errors, "errors": errors}
            with suppress(OSError):
                self._guard.sendall(json.dumps(answer).encode() + b"\n")
        if ending.is_alive():
            os._exit(1)

    def _end(self, due: float, errors: list[str]) -> None:
        if not self._busy.wait_over(max(due - time.monotonic(), 0) / 2):
            errors.append("a call or hook was still running")
        hooks = self._instance.hooks
        for hook in ("stop", "cleanup"):
            if hook in hooks and hook not in self._begun and (hook == "cleanup" or self._is_ready_to_stop()):
                self._begun.add(hook)
                try:
                    self._instance.run_hook(hook)
                except BaseException as error:  # nobody is left to hear of it but the guardian
                    errors.append(f"{hook}: {describe(error)}")

    def _is_ready_to_stop(self) -> bool:
        return self._instance.hooks & START_HOOKS <= self._succeeded


class Busy:
    """Counts what runs of the user's; each call enters and leaves it, so it does little."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._over = threading.Condition(self._lock)
        self._running = 0

    def __enter__(self) -> None:
        with self._lock:
            self._running += 1

    def __exit__(self, *_: object) -> None:
        with self._lock:
            self._running -= 1
            if not self._running:
                self._over.notify_all()

    def wait_over(self, timeout_s: float) -> bool:
        """Wait until nothing runs, and return whether that is so."""
        with self._lock:
            return self._over.wait_for(lambda: not self._running, timeout_s)


class Handles(dict[str, ServiceHandle[Any]]):
    """The handles of the job's services by name, made when they are asked for."""

    def __init__(self, child: Child) -> None:
        super().__init__()
        self._child = child

    def __missing__(self, name: str) -> ServiceHandle[Any]:
        """Ask the driver whether there is such a service."""
        self._child.ask_for(name)
        self[name] = self._child.handle(name)
        return self[name]

    def get(self, name: str, _default: Any = None, /) -> Any:
        """Return a handle without asking: one that was pickled is known."""
        if name not in self:
            self[name] = self._child.handle(name)
        return self[name]


class OwnCalls:
    """Leads a service's own handle to itself: it is inside its gate already."""

    def __init__(self, instance: Instance) -> None:
        self._instance = instance
        self._threads = CallThreads(instance.name, None)

    def method(self, name: str) -> Any:
        """Return an attribute of the instance."""
        return self._instance.attribute(name)

    def call(self, name: str, args: tuple[Any, ...], kwargs: dict[str, Any], timeout_s: float | None) -> Any:
        """Call a method."""
        return self.call_async(name, args, kwargs, timeout_s).result()

    def call_async(
        self, name: str, args: tuple[Any, ...], kwargs: dict[str, Any], timeout_s: float | None
    ) -> CallFuture:
        """Call a method on another thread."""
        return self._threads.submit(name, lambda: self._instance.attribute(name)(*args, **kwargs), timeout_s)

    def is_coroutine(self, name: str) -> bool:
        """Return whether it is a coroutine method."""
        return self._instance.coroutine_method(name) is not None


class DriverCalls:
    """Leads calls of another service through the driver, where its host and its gate are."""

    def __init__(self, link: Link, service: str) -> None:
        self._link = link
        self._service = service
        self._coroutines: set[str] = set()
        self._threads = CallThreads(service, None)

    def method(self, name: str) -> Any:
        """Return an attribute of the service."""
        is_method, value = self._ask("attribute", name)
        if not is_method:
            return value
        if value:
            self._coroutines.add(name)
        return lambda *args, **kwargs: self.call(name, args, kwargs, None)

    def is_coroutine(self, name: str) -> bool:
        """Return whether it is known as a coroutine method."""
        return name in self._coroutines

    def call(self, name: str, args: tuple[Any, ...], kwargs: dict[str, Any], timeout_s: float | None) -> Any:
        """Call a method; the driver sees to the time-out."""
        if is_on_loop() and self.is_coroutine(name):
            return self.call_async(name, args, kwargs, timeout_s)
        return self._ask("call", name, args, kwargs, timeout_s)

    def call_async(
        self, name: str, args: tuple[Any, ...], kwargs: dict[str, Any], timeout_s: float | None
    ) -> CallFuture:
        """Start a call; a thread waits for its answer."""
        return self._threads.submit(name, lambda: self._ask("call", name, args, kwargs, timeout_s), None)

    def _ask(self, kind: str, *request: Any) -> Any:
        try:
            return self._link.ask(kind, self._service, *request)
        except NotSentError as error:
            text = f'the arguments of "{self._service}".{request[0]} cannot be pickled: {describe(error.reason)}'
            raise ServiceError(text, service=self._service) from error.reason
        except LinkClosedError:
            text = f'service "{self._service}" cannot be reached: the driver is gone'
            raise ServiceUnavailableError(text, service=self._service) from None


class Forward(logging.Handler):
    """Sends log records to the driver, where the program has said what becomes of them."""

    def __init__(self, link: Asking) -> None:
        super().__init__()
        self._link = link
        self._connection: Connection | None = None

    def emit(self, record: logging.LogRecord) -> None:
        """Send a record as plain text; the traceback, too, can then be read everywhere."""
        try:
            values = {**record.__dict__, "msg": record.getMessage(), "args": None, "exc_info": None, "stack_info": None}
            if record.exc_info:
                values["exc_text"] = logging.Formatter().formatException(record.exc_info)
            if self._connection is None:
                self._connection = self._link.connect()
            self._connection.send(encode(("log", _plain(values))))
        except (LinkClosedError, OSError):
            self._connection = None
        except Exception:
            self.handleError(record)


def _plain(values: Mapping[str, Any]) -> dict[str, Any]:
    """Return what needs no code of the program's to be read."""
    return {
        name: value if isinstance(value, str | int | float | None) else str(value) for name, value in values.items()
    }


def _is_ours(path: str) -> bool:
    return path.startswith((os.path.dirname(__file__), os.path.dirname(threading.__file__))) or path == "<string>"


def main(link: int, guard: int, name: str) -> None:
    """Be the process of a service.

    Args:
        link: the descriptor of the link to the driver.
        guard: the descriptor on which the guardian gives its orders.
        name: the service's name.
    """
    # While the driver lives, only it decides when the service ends: a signal to the whole group must not break the
    # order. What it asks for comes over the link, and what it has to enforce comes as SIGKILL.
    for signum in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT):
        signal.signal(signum, lambda *_: None)  # unlike SIG_IGN, this is not passed on to what the service starts
    child = Child(socket.socket(fileno=link), socket.socket(fileno=guard), name)
    child.live()
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
