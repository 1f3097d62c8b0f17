"""The process of a service: builds it, runs its hooks and calls as it is asked to, and outlives its driver in order.

The process runs `main`. One thread answers each request, so the main thread only waits for the end.
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
from typing import TYPE_CHECKING

from sage._calls import function_of
from sage._hosts.call_threads import CallThreads
from sage._hosts.instance import Instance
from sage._processes import leave
from sage._remote.begun import BEGUN, BegunCalls
from sage._remote.calls import RemoteCalls
from sage._remote.protocol import JobSide, LogSide, ServiceSide, served
from sage._remote.rpc import RpcClosedError, SocketPairRpc
from sage._runtime.coroutines import CoroutineLoop
from sage._runtime.interrupts import SIGNALS, mean_nothing
from sage.errors import describe
from sage.service import ServiceContext, ServiceHandle

if TYPE_CHECKING:
    from collections.abc import Callable, Coroutine, Mapping
    from concurrent.futures import Future

    from sage._calls import CallFuture
    from sage._remote.rpc import RpcClient
    from sage._remote.wire import Connection

    CoroutineMethod = Callable[..., Coroutine[object, object, object]]

ORDER_BYTES_MAX = 65_536

PRIVATE = os.path.join(os.path.dirname(os.path.dirname(__file__)), "_")
STANDARD_LIBRARY = os.path.dirname(threading.__file__)
"""How the paths begin of files whose lines say nothing of where a service stands."""

START_HOOKS = frozenset({"setup", "start", "ready"})
"""The hooks that must have succeeded, if the service has them, before `stop` may follow."""

ORDER_BOUND_S = 30.0
"""How long the guardian may take to give its order; it stops its services one after another, within 10 s in all."""

ORPHAN_STOP_S = 10.0
"""How long stop and cleanup may take together when driver and guardian are both gone."""


class ServiceProcess(ServiceSide):
    """One service in a process of its own.

    Args:
        link: leads to the driver.
        guard: the guardian's orders come from here; end-of-file says that driver and guardian are both gone.
        name: the service's name.
        begun: where calls that begin are noted.
    """

    def __init__(self, link: socket.socket, guard: socket.socket, name: str, begun: BegunCalls) -> None:
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
        self._begun_marks = begun.marks
        self._turn: threading.Lock | Busy = self._busy
        self._methods: dict[str, tuple[CoroutineMethod | None, Callable[..., object]]] = {}
        self._running: dict[int, Future[object]] = {}
        self._given_up: set[int] = set()
        self.link = SocketPairRpc(link, served((ServiceSide, self)), self._handles, name, self._over.set)

    def live(self) -> None:
        """Do as the driver says until it says "exit", or until it is gone; then end in order."""
        self.link.begin()
        self._over.wait()
        if not self._is_told:
            self._be_orphan()
        self._loop.close()

    # --- requests of the driver ---

    def build(
        self,
        target: Callable[..., object],
        args: tuple[object, ...],
        kwargs: dict[str, object],
        incarnation: int,
        level: int,
        is_serial: bool,
    ) -> frozenset[str]:
        """Make the instance; see `ServiceSide`, also for the other requests."""
        if is_serial:
            self._turn = threading.Lock()
        logging.getLogger().addHandler(Forward(self.link))
        logging.getLogger().setLevel(level)
        context = ServiceContext(self._name, self._handles, None, self, incarnation)
        with self._busy:
            self._instance.build(target, args, kwargs, context)
        return self._instance.hooks

    def run_hook(self, hook: str, due: float) -> object:
        """Run a hook; of its value, only whether the service is ready or healthy goes back."""
        if time.monotonic() > due:
            raise TimeoutError(f"{hook} could not begin in time")
        self._begun.add(hook)
        with self._busy:
            value = self._instance.run_hook(hook)
        if hook != "ready" or value:
            self._succeeded.add(hook)
        # Hooks may return any value; only these two have an answer.
        return bool(value) if hook == "ready" else value is not False if hook == "health" else None

    def call(self, place: int, name: str, args: tuple[object, ...], kwargs: dict[str, object], number: int) -> object:
        """Call a method of the service, a coroutine method to its end; the driver sees to the time-out."""
        awaited, method = self._methods.get(name) or self._found(name)
        with self._turn:
            if self._over.is_set():  # while it waited for its turn, so that nobody waits for its answer any more
                raise RpcClosedError("the driver is gone")
            self._begun_marks[place] = BEGUN
            if awaited is not None:
                return self._awaited(awaited(*args, **kwargs), number)
            return method(*args, **kwargs)

    def _found(self, name: str) -> tuple[CoroutineMethod | None, Callable[..., object]]:
        awaited = self._instance.coroutine_method(name)
        self._methods[name] = awaited, awaited or function_of(self._instance.attribute(name))
        return self._methods[name]

    def _awaited(self, coroutine: Coroutine[object, object, object], number: int) -> object:
        """Run a coroutine to its end, or until the driver gives up its call; nobody can give up number 0."""
        running = self._loop.start(coroutine)
        if not number:
            return running.result()
        self._running[number] = running
        try:
            if number in self._given_up:
                running.cancel()
            return running.result()
        finally:
            del self._running[number]
            self._given_up.discard(number)

    def give_up(self, number: int) -> None:
        self._given_up.add(number)
        running = self._running.get(number)
        if running is not None:
            running.cancel()

    def attribute(self, name: str) -> tuple[bool, object]:
        attribute = self._instance.attribute(name)
        return (True, self._instance.coroutine_method(name) is not None) if callable(attribute) else (False, attribute)

    def where(self) -> str:
        names = {thread.ident: thread.name for thread in threading.enumerate()}
        stacks = []
        for ident, frame in sys._current_frames().items():
            stack = traceback.extract_stack(frame)
            if ident != threading.get_ident() and any(not _is_ours(entry.filename) for entry in stack):
                own = [entry for entry in stack if not _is_ours(entry.filename)]
                stacks.append(f"thread {names.get(ident, ident)}:\n" + "".join(traceback.format_list(own)))
        return "".join(stacks)

    def exit(self) -> None:
        self._is_told = True
        self._over.set()

    # --- requests of the service to its job: `Supervision` ---

    def deferred(self, service: str, incarnation: int) -> None:
        """Say that the service has something to clean up."""
        self.link.ask(JobSide.deferred, service, incarnation)

    def extend(self, service: str, incarnation: int, seconds: float) -> None:
        self.link.ask(JobSide.extend, service, incarnation, seconds)

    def used(self, service: str, prompt_tokens: int, completion_tokens: int) -> None:
        """Count the tokens of an answer, before it goes to its caller."""
        self.link.ask(JobSide.used, service, prompt_tokens, completion_tokens)

    def claim(self, service: str, entry: dict[str, object]) -> None:
        """Have an entry written into the journal."""
        self.link.ask(JobSide.claim, service, entry)

    def handle(self, name: str) -> ServiceHandle[object]:
        """Return a handle of a service of the job; this service's own leads to the instance here."""
        handle: ServiceHandle[object] = ServiceHandle(name, None)
        handle._connect(OwnCalls(self._instance) if name == self._name else self._driver_calls(name))
        return handle

    def _driver_calls(self, name: str) -> RemoteCalls:
        """Lead calls of another service through the driver, where its host and its gate are."""
        return RemoteCalls(name, None, lambda *_: self.link, "cannot be reached: the driver is gone")

    def ask_for(self, name: str) -> None:
        """Let the driver know that the service depends on another, and hear if it is unknown."""
        if name != self._name:
            self.link.ask(JobSide.know, name)

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
        if not self._wait_over(max(due - time.monotonic(), 0) / 2):
            errors.append("a call or hook was still running")
        hooks = self._instance.hooks
        for hook in ("stop", "cleanup"):
            if hook in hooks and hook not in self._begun and (hook == "cleanup" or self._is_ready_to_stop()):
                self._begun.add(hook)
                try:
                    self._instance.run_hook(hook)
                except BaseException as error:  # nobody is left to hear of it but the guardian
                    errors.append(f"{hook}: {describe(error)}")

    def _wait_over(self, timeout_s: float) -> bool:
        """Wait until no hook and no call runs, and return whether that is so; none begins any more."""
        due = time.monotonic() + timeout_s
        is_over = self._busy.wait_over(timeout_s)
        if isinstance(self._turn, Busy):
            return is_over
        return self._turn.acquire(timeout=max(due - time.monotonic(), 0)) and is_over

    def _is_ready_to_stop(self) -> bool:
        return self._instance.hooks & START_HOOKS <= self._succeeded


class Busy:
    """Counts running user code; each call enters and leaves it, so it must be fast."""

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


class Handles(dict[str, ServiceHandle[object]]):
    """The handles of the job's services by name, made when they are asked for."""

    def __init__(self, child: ServiceProcess) -> None:
        super().__init__()
        self._child = child

    def __missing__(self, name: str) -> ServiceHandle[object]:
        """Ask the driver whether there is such a service."""
        self._child.ask_for(name)
        self[name] = self._child.handle(name)
        return self[name]

    def get(self, name: str, _default: object = None, /) -> ServiceHandle[object]:
        """Return a handle without asking: one that was pickled is known."""
        if name not in self:
            self[name] = self._child.handle(name)
        return self[name]


class OwnCalls:
    """Leads a service's own handle to itself: it is inside its gate already."""

    def __init__(self, instance: Instance) -> None:
        self._instance = instance
        self._threads = CallThreads(instance.name, None)

    def method(self, name: str) -> object:
        """Return an attribute of the instance."""
        return self._instance.attribute(name)

    def call(self, name: str, args: tuple[object, ...], kwargs: dict[str, object], timeout_s: float | None) -> object:
        return self.call_async(name, args, kwargs, timeout_s).result()

    def call_async(
        self, name: str, args: tuple[object, ...], kwargs: dict[str, object], timeout_s: float | None
    ) -> CallFuture:
        """Call a method on another thread."""
        return self._threads.submit(
            name, lambda: function_of(self._instance.attribute(name))(*args, **kwargs), timeout_s
        )

    def is_coroutine(self, name: str) -> bool:
        """Return whether it is a coroutine method."""
        return self._instance.coroutine_method(name) is not None


class Forward(logging.Handler):
    """Sends log records to the driver, where the program has configured their handling."""

    def __init__(self, link: RpcClient) -> None:
        super().__init__()
        self._link = link
        self._connection: Connection | None = None

    def emit(self, record: logging.LogRecord) -> None:
        """Send a record as plain text; the traceback, too, can then be read everywhere."""
        try:
            values = {**record.__dict__, "msg": record.getMessage(), "args": None, "exc_info": None, "stack_info": None}
            if record.exc_info:
                values["exc_text"] = logging.Formatter().formatException(record.exc_info)
            if self._link.is_forked:
                self._keep_here(record)
                return
            if self._connection is None:
                self._connection = self._link.connect()
            self._connection.send(self._link.request(False, LogSide.log, (_plain(values),), {}))
        except (RpcClosedError, OSError):
            self._connection = None
        except Exception:
            self.handleError(record)

    @staticmethod
    def _keep_here(record: logging.LogRecord) -> None:
        """Write a record of a forked process, which cannot reach the driver, as `logging` does without a handler."""
        if logging.lastResort is not None and record.levelno >= logging.lastResort.level:
            logging.lastResort.handle(record)


def _plain(values: Mapping[str, object]) -> dict[str, object]:
    """Return a form that can be read without the program's code."""
    return {
        name: value if isinstance(value, str | int | float | None) else str(value) for name, value in values.items()
    }


def _is_ours(path: str) -> bool:
    return path.startswith((PRIVATE, STANDARD_LIBRARY)) or path == "<string>"


def main(link: int, guard: int, begun: int, name: str) -> None:
    """Be the process of a service.

    Args:
        link: the descriptor of the link to the driver.
        guard: the descriptor on which the guardian gives its orders.
        begun: the descriptor of the memory for `BegunCalls`.
        name: the service's name.
    """
    # They were handed over by inheritance, which must not go on to the service's own children.
    os.set_inheritable(link, False)
    os.set_inheritable(guard, False)
    begun_calls = BegunCalls(begun)
    os.close(begun)
    # While the driver lives, only it decides when the service ends: a signal to the whole group must not break the
    # order. Its requests come over the link, and the final one as SIGKILL.
    mean_nothing(SIGNALS)
    # Ignored signals are inherited: with SIGCHLD, the service could not know how its own children end.
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    child = ServiceProcess(socket.socket(fileno=link), socket.socket(fileno=guard), name, begun_calls)
    child.live()
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    leave(0)
