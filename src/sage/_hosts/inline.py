"""Services in this process: a call is a plain method call, a hook runs on the service's own thread."""

from __future__ import annotations

import inspect
import logging
import threading
from typing import TYPE_CHECKING, Any

from sage._hosts.call_threads import CallThreads
from sage._hosts.gate import SerialGate, SharedGate
from sage.errors import ServiceTimeoutError, ServiceUnavailableError, UnknownServiceError, hint
from sage.service import ServiceUser

if TYPE_CHECKING:
    from collections.abc import Callable
    from concurrent.futures import Future

    from sage._hosts.gate import Gate
    from sage._plan.logical import ServiceSpec
    from sage._runtime.backend import Backend, Lane
    from sage._runtime.coroutines import CoroutineLoop
    from sage.service import ServiceContext

log = logging.getLogger("sage.dispatcher")

HOOKS = ("setup", "start", "ready", "health", "stop", "cleanup")
STAND_INS = ("close", "shutdown")
"""What is called instead of `cleanup` on a class that has none; leaving a context comes last."""


class InlineHost:
    """Runs one service in this process."""

    def __init__(self, spec: ServiceSpec, context: ServiceContext, backend: Backend, loop: CoroutineLoop) -> None:
        self.spec = spec
        self._context = context
        self._backend = backend
        self._loop = loop
        self._lane: Lane = backend.lane(spec.name)
        self._threads: CallThreads | None = None
        self._instance: Any = None
        self._hooks: dict[str, Callable[[], Any]] = {}
        self._gate: Gate = self._new_gate()
        self._earlier: list[Gate] = []
        self._is_building = False
        self._is_built = False
        self._held = True  # a call that comes before the service is ready waits for it
        self._refused = False
        self._changed = threading.Condition()

    @property
    def calls(self) -> InlineHost:
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
    def hooks(self) -> frozenset[str]:
        """The names of the hooks that the instance has."""
        return frozenset(self._hooks)

    def adopt(self, backend: Backend, loop: CoroutineLoop) -> None:
        """Let another job run the hooks of an instance that is kept."""
        self._backend = backend
        self._loop = loop
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
                    value: Any = self._build()
                    with self._changed:
                        self._is_built = self._lane is lane
                    if not self._is_built:
                        self._clean_late()
                        return
                elif hook == "drain":
                    value = self._drain(due)
                else:
                    value = self._settled(self._hooks[hook]())
            except BaseException as error:  # the lifecycle of a service owns what its hooks raise
                done(None, error)
            else:
                done(value, None)

        self._lane.run(work)

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
        instance = self._instance
        if instance is None:
            return lambda *args, **kwargs: self._later(name, args, kwargs)
        try:
            attribute = getattr(instance, name)
        except AttributeError:
            raise self._unknown(name) from None
        if not callable(attribute):
            return attribute
        if inspect.iscoroutinefunction(attribute):
            coroutine, run = attribute, self._loop

            def attribute(*args: Any, **kwargs: Any) -> Any:
                return run.run(coroutine(*args, **kwargs))

        options = self.spec.options
        if options.call_timeout_s is not None:
            return lambda *args, **kwargs: self.call(name, args, kwargs, options.call_timeout_s)
        return self._gate.bind(attribute, lambda *args, **kwargs: self._later(name, args, kwargs))

    def call(self, name: str, args: tuple[Any, ...], kwargs: dict[str, Any], timeout_s: float | None) -> Any:
        """Call a method, with a time-out on the service's own threads."""
        return self.call_async(name, args, kwargs, timeout_s).result()

    def call_async(
        self, name: str, args: tuple[Any, ...], kwargs: dict[str, Any], timeout_s: float | None
    ) -> Future[Any]:
        """Start a call on the service's own threads."""
        if timeout_s is None:
            timeout_s = self.spec.options.call_timeout_s
        with self._changed:
            if self._refused:
                raise self._unavailable()
            if self._threads is None:
                self._threads = CallThreads(self.spec.name, self.spec.options.concurrency)
        if self._instance is not None and not hasattr(self._instance, name):
            raise self._unknown(name)
        return self._threads.submit(name, lambda: self._admitted(name, args, kwargs), timeout_s)

    # --- behind it ---

    def _admitted(self, name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Make a call that was taken in while the service ran; the drain waits for it, so the gate may be closed."""
        if self._instance is None:
            return self._later(name, args, kwargs)
        attribute = getattr(self._instance, name)

        def call() -> Any:
            if inspect.iscoroutinefunction(attribute):
                return self._loop.run(attribute(*args, **kwargs))
            return attribute(*args, **kwargs)

        def late() -> Any:
            if self._refused and self._instance is not None:
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

    def _unknown(self, name: str) -> UnknownServiceError:
        known = [other for other in dir(self._instance) if not other.startswith("_")]
        listed = ", ".join(other for other in known if callable(getattr(self._instance, other, None)))
        error = UnknownServiceError(f'service "{self.spec.name}" has no method "{name}"')
        return hint(error, f"{type(self._instance).__name__} has: {listed or 'no methods'}.")

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

    def _settled(self, result: Any) -> Any:
        return self._loop.run(result) if inspect.iscoroutine(result) else result

    def _build(self) -> frozenset[str]:
        """Make an instance and return the names of the hooks it has."""
        target, args, kwargs = self.spec.target, self.spec.args, self.spec.kwargs
        self._earlier.append(self._gate)
        self._gate = self._new_gate()
        if isinstance(target, type) and issubclass(target, ServiceUser):
            # The context is there before the constructor runs, whether or not that calls its base's.
            instance: Any = target.__new__(target, *args, **kwargs)
            instance.ctx = self._context
            instance.__init__(*args, **kwargs)
        else:
            instance = target(*args, **kwargs)
            if isinstance(instance, ServiceUser):
                instance.ctx = self._context
        self._instance = instance
        self._hooks = {hook: method for hook in HOOKS if (method := _hook(instance, hook)) is not None}
        if "cleanup" not in self._hooks:
            stand_in = next((method for name in STAND_INS if (method := _hook(instance, name)) is not None), None)
            if stand_in is not None:
                self._hooks["cleanup"] = stand_in
            elif _has(instance, "__enter__") and _has(instance, "__exit__"):
                self._enter_at_setup(instance)
        return self.hooks

    def _clean_late(self) -> None:
        """Clean up an instance whose constructor returned after it had been given up; nobody else will."""
        log.error("constructor returned after its bound, cleaning up service=%r", self.spec.name)
        try:
            if "cleanup" in self._hooks:
                self._settled(self._hooks["cleanup"]())
        except BaseException as error:  # the job may be over, so the log is the only place left for it
            log.error("cleanup failed service=%r", self.spec.name, exc_info=error)

    def _enter_at_setup(self, manager: Any) -> None:
        """Use what a context manager gives, from `setup` on, and leave it as the cleanup."""
        setup = self._hooks.get("setup")

        def enter() -> None:
            if setup is not None:
                setup()
            entered = manager.__enter__()
            self._hooks["cleanup"] = lambda: manager.__exit__(None, None, None)
            if entered is not None:
                self._instance = entered

        self._hooks["setup"] = enter
        self._hooks["cleanup"] = lambda: None


def _has(instance: Any, name: str) -> bool:
    # A class that answers to every name, such as a remote proxy, has no hooks because of that.
    return inspect.getattr_static(instance, name, None) is not None


def _hook(instance: Any, name: str) -> Callable[[], Any] | None:
    if not _has(instance, name):
        return None
    method = getattr(instance, name)
    if not callable(method):
        return None
    try:
        inspect.signature(method).bind()
    except TypeError:
        if isinstance(instance, ServiceUser):
            raise hint(
                TypeError(f"{type(instance).__name__}.{name} must take no arguments"), "The engine calls hooks without."
            ) from None
        return None  # A method of the class's own that only happens to have this name.
    except ValueError:
        pass  # Some methods written in C do not tell their signature.
    hook: Callable[[], Any] = method
    return hook
