"""What every host does alike: which calls get through, on which thread hooks run, and what time-outs do."""

from __future__ import annotations

import inspect
import threading
from abc import ABC, abstractmethod
from typing import TYPE_CHECKING, Any

from sage._calls import not_in_time
from sage._hosts.call_threads import CallThreads
from sage._hosts.gate import SerialGate, SharedGate
from sage._runtime.backend import HostFacts
from sage._runtime.coroutines import is_on_loop
from sage.errors import ServiceTimeoutError, ServiceUnavailableError, hint

if TYPE_CHECKING:
    from collections.abc import Callable, Coroutine

    from sage._calls import CallFuture
    from sage._hosts.gate import Gate
    from sage._plan.logical import ServiceSpec
    from sage._runtime.backend import Backend, Lane
    from sage._runtime.coroutines import CoroutineLoop
    from sage.service import ServiceContext, ServiceOptions


CLOSED = object()
"""What stands for the answer of a call that found its gate closed."""


async def _closed(*_: Any, **__: Any) -> object:
    return CLOSED


class GatedHost(ABC):
    """Runs one service: gates in front of its methods, hooks one after another on a thread of their own.

    A host that is derived from it says how an instance is built, how its hooks run and how its attributes are reached.
    """

    def __init__(
        self,
        spec: ServiceSpec,
        context: ServiceContext,
        backend: Backend,
        loop: CoroutineLoop,
        on_died: Callable[[int, str], None],
    ) -> None:
        self.spec = spec
        self._context = context
        self._incarnation = 0
        self._on_died = on_died
        self._backend = backend
        self._loop = loop
        self._lane: Lane = backend.lane(spec.name)
        self._threads: CallThreads | None = None
        self._gate: Gate = self._new_gate()
        self._earlier: list[Gate] = []
        self._is_building = False
        self._is_built = False
        self._held = True  # a call that comes before the service is ready waits for it
        self._refused = False
        self._changed = threading.Condition()

    @property
    def options(self) -> ServiceOptions:
        """What the lifecycle of this job goes by."""
        return self.spec.options

    @property
    def calls(self) -> GatedHost:
        """How callers reach the service: the host itself."""
        return self

    @property
    def call_count(self) -> int:
        """How many calls were let through, over all instances."""
        return sum(gate.call_count for gate in (*self._earlier, self._gate))

    @property
    def error_count(self) -> int:
        """How many calls raised, over all instances."""
        return sum(gate.error_count for gate in (*self._earlier, self._gate))

    @property
    def is_calling(self) -> bool:
        """Whether a call runs on the service's own threads."""
        return self._threads is not None and self._threads.is_busy

    @property
    @abstractmethod
    def hooks(self) -> frozenset[str]:
        """The names of the hooks that the instance has."""

    @property
    def own_hooks(self) -> frozenset[str]:
        """The names of the hooks that the host has whatever the service is."""
        return frozenset()

    @property
    def local_hooks(self) -> frozenset[str]:
        """The names of the hooks that run in this process although the service has one of its own."""
        return frozenset()

    def adopt(
        self, context: ServiceContext, backend: Backend, loop: CoroutineLoop, on_died: Callable[[int, str], None]
    ) -> None:
        """Let another job run the hooks of an instance that is kept."""
        self._backend = backend
        self._loop = loop
        self._on_died = on_died
        self._incarnation = 1
        self._context.follow(context)
        self._lane = backend.lane(self.spec.name)

    # --- what the supervisor asks for ---

    def run(self, hook: str, due: float | None, done: Callable[[Any, BaseException | None], None]) -> None:
        """Run a hook on the service's own thread and tell `done` what came of it."""
        lane = self._lane
        self._is_building = hook == "build"
        self._is_built = False

        def work() -> None:
            try:
                if hook == "build":
                    self._incarnation += 1
                    self._context = self._context.fresh(self._incarnation)
                    self._earlier.append(self._gate)
                    self._gate = self._new_gate()
                    value: Any = self._build()
                    with self._changed:
                        self._is_built = self._lane is lane
                    if not self._is_built:
                        self._clean_late()
                        return
                elif hook == "drain":
                    value = self._drain(due)
                    if "drain" in self.hooks:
                        self._run_hook(hook, due)
                else:
                    value = self._run_hook(hook, due)
            except BaseException as error:  # the lifecycle of a service owns what its hooks raise
                done(None, error)
            else:
                done(value, None)

        self._lane.run(work)

    def begin_at(self, incarnation: int) -> None:
        """Let the next "build" make this incarnation, where others have counted those before."""
        self._incarnation = incarnation - 1

    def hurry(self, due: float) -> None:
        """Move the `due` of an "exit" that runs forward."""
        raise NotImplementedError("a host without a process of its own has no exit")

    def facts(self) -> HostFacts:
        """Return what the report says of the host."""
        return HostFacts()

    def admit(self) -> None:
        """Let calls through."""
        with self._changed:
            self._gate.is_open = True
            self._held = False
            self._changed.notify_all()

    def hold(self) -> None:
        """Let calls wait."""
        with self._changed:
            self._held = True
            self._gate.close()

    def refuse(self) -> None:
        """Let calls fail at once."""
        with self._changed:
            self._held = False
            self._refused = True
            self._gate.close()
            self._changed.notify_all()

    def abandon(self) -> str:
        """Leave the thread that hangs behind, and go on with a new one."""
        stack = self._lane.where()
        self._lane.close(wait=False)
        with self._changed:
            self._lane = self._backend.lane(self.spec.name)
            came_back = self._is_building and self._is_built
        if came_back:
            # The constructor returned, but too late for anyone to have heard of it.
            self._lane.run(self._clean_late)
        return stack

    def release(self) -> None:
        """Free the thread of a service that is kept; the instance stays."""
        self._lane.close(wait=True)

    def close(self) -> None:
        """Free the threads."""
        if self._threads is not None:
            self._threads.close()
        self._lane.close(wait=True)

    # --- what callers ask for ---

    def method(self, name: str) -> Any:
        """Return a method behind the gate, or another attribute as it is."""
        if self.is_coroutine(name):
            return lambda *args, **kwargs: self._run_or_await(name, args, kwargs)
        if not self._is_there:
            return lambda *args, **kwargs: self._later(name, args, kwargs)
        attribute = self._attribute(name)
        if not callable(attribute):
            return attribute
        if self.is_coroutine(name):  # which only the instance could tell
            return lambda *args, **kwargs: self._run_or_await(name, args, kwargs)
        options = self.spec.options
        if options.call_timeout_s is not None:
            return lambda *args, **kwargs: self.call(name, args, kwargs, options.call_timeout_s)
        return self._gate.bind(attribute, lambda *args, **kwargs: self._later(name, args, kwargs))

    def is_coroutine(self, name: str) -> bool:
        """Return whether `name` is a coroutine method; of a callable's object, once it is there."""
        target = self.spec.target
        if isinstance(target, type):
            return inspect.iscoroutinefunction(getattr(target, name, None))
        return self._coroutine_method(name) is not None

    def call(self, name: str, args: tuple[Any, ...], kwargs: dict[str, Any], timeout_s: float | None) -> Any:
        """Call a method, with a time-out on the service's own threads."""
        if is_on_loop() and self.is_coroutine(name):
            return self._awaitable(name, args, kwargs, timeout_s)
        return self.call_async(name, args, kwargs, timeout_s).result()

    def call_async(
        self, name: str, args: tuple[Any, ...], kwargs: dict[str, Any], timeout_s: float | None
    ) -> CallFuture:
        """Start a call on the service's own threads."""
        if timeout_s is None:
            timeout_s = self.spec.options.call_timeout_s
        with self._changed:
            if self._refused:
                raise self._unavailable()
            if self._threads is None:
                self._threads = CallThreads(self.spec.name, self.spec.options.concurrency)
        if self._is_there:
            self._attribute(name)  # an unknown one is known at once
        return self._threads.submit(name, lambda: self._admitted(name, args, kwargs), timeout_s)

    # --- what a host adds ---

    @property
    @abstractmethod
    def _is_there(self) -> bool:
        """Whether there is an instance that attributes can be asked of."""

    @abstractmethod
    def _attribute(self, name: str) -> Any:
        """Return an attribute of the instance; a method is returned as a plain function, coroutine functions too.

        Raises:
            UnknownServiceError: there is none of this name.
        """

    def _coroutine_method(self, name: str) -> Callable[..., Any] | None:  # noqa: ARG002
        """Return what the job's loop can await for a coroutine method, or None if a thread has to wait for it."""
        return None

    @abstractmethod
    def _build(self) -> frozenset[str]:
        """Make an instance and return the names of the hooks it has."""

    @abstractmethod
    def _run_hook(self, hook: str, due: float | None) -> Any:
        """Run one of the instance's hooks to its end and return its value."""

    @abstractmethod
    def _clean_late(self) -> None:
        """Clean up an instance whose constructor returned after it had been given up; nobody else will."""

    # --- behind it ---

    def _run_or_await(self, name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Call a coroutine method: run it to its end for a thread, and let a coroutine await it."""
        timeout_s = self.spec.options.call_timeout_s
        if is_on_loop():
            return self._awaitable(name, args, kwargs, timeout_s)
        if timeout_s is not None:
            return self.call(name, args, kwargs, timeout_s)
        if not self._is_there:
            return self._later(name, args, kwargs)
        gated = self._gated(name)
        if gated is None:
            attribute = self._attribute(name)
            return self._gate.bind(attribute, lambda *args, **kwargs: self._later(name, args, kwargs))(*args, **kwargs)
        return self._loop.run(gated(*args, **kwargs))

    def _awaitable(self, name: str, args: tuple[Any, ...], kwargs: dict[str, Any], timeout_s: float | None) -> Any:
        gated = self._gated(name)
        if gated is None:
            return self.call_async(name, args, kwargs, timeout_s)
        coroutine = gated(*args, **kwargs)
        return self._loop.answer(coroutine if timeout_s is None else self._in_time(name, coroutine, timeout_s))

    def _gated(self, name: str) -> Callable[..., Coroutine[Any, Any, Any]] | None:
        """Return a coroutine method behind the gate, or None where threads have to call it."""
        method = self._coroutine_method(name)
        if method is None or not isinstance(self._gate, SharedGate):
            return None
        return self._gate.bind_coroutine(method, lambda *args, **kwargs: self.call_async(name, args, kwargs, None))

    async def _in_time(self, name: str, coroutine: Coroutine[Any, Any, Any], timeout_s: float) -> Any:
        import asyncio

        bound = asyncio.timeout(timeout_s)
        try:
            async with bound:
                return await coroutine
        except TimeoutError:
            if not bound.expired():
                raise
            raise not_in_time(self.spec.name, name, timeout_s) from None

    def _admitted(self, name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Make a call that was taken in while the service ran; the drain waits for it, so the gate may be closed."""
        if not self._is_there:
            return self._later(name, args, kwargs)
        method = self._coroutine_method(name)
        if method is not None and isinstance(self._gate, SharedGate):
            # It takes its place on the loop: a thread that kept one meanwhile would keep others from going on there.
            gated = self._gate.bind_coroutine(method, _closed, passes_closed=self._refused)
            answer = self._loop.run(gated(*args, **kwargs))
            return self._later(name, args, kwargs) if answer is CLOSED else answer
        attribute = self._attribute(name)

        def call() -> Any:
            return attribute(*args, **kwargs)

        def late() -> Any:
            if self._refused and self._is_there:
                return self._gate.bind(call, call, passes_closed=True)()
            return self._later(name, args, kwargs)

        return self._gate.bind(call, late)()

    def _later(self, name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Make a call that found the gate closed: wait while the service is restarted, or fail."""
        timeout_s = self.spec.options.call_timeout_s
        with self._changed:
            if not self._changed.wait_for(lambda: self._refused or not self._held, timeout_s):
                text = f'service "{self.spec.name}" was not back within {timeout_s:g} s'
                raise ServiceTimeoutError(text, service=self.spec.name, fault="external")
            if self._refused or not self._gate.is_open:
                raise self._unavailable()
        return self.method(name)(*args, **kwargs)

    def _unavailable(self) -> ServiceUnavailableError:
        error = ServiceUnavailableError(
            f'service "{self.spec.name}" has stopped and takes no more calls', service=self.spec.name
        )
        return hint(error, "A service is stopped when everything that depends on it has ended, or when it failed.")

    def _new_gate(self) -> Gate:
        concurrency = self.spec.options.concurrency
        return SerialGate() if concurrency == 1 else SharedGate(concurrency)

    def _drain(self, due: float | None) -> bool:
        threads_done = self._threads is None or self._threads.drain(self._left(due))
        if not threads_done and self._refused and self._threads is not None:
            self._threads.cancel_waiting()
        return self._gate.drain(self._left(due)) and threads_done

    def _left(self, due: float | None) -> float:
        return 0.0 if due is None else max(due - self._backend.now(), 0.0)
