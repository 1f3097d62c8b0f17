"""The common part of all hosts: which calls get through, the threads of hooks, and time-outs."""

from __future__ import annotations

import inspect
import threading
from abc import ABC, abstractmethod
from functools import partial
from typing import TYPE_CHECKING

from sage._bucket import Bucket
from sage._calls import current_call, function_of, not_in_time, refuse_on_foreign_loop
from sage._current_job import wait_for
from sage._forks import leave_if_forked, refusal, useless_after_fork
from sage._hosts.call_threads import CallThreads
from sage._hosts.gate import ConcurrentGate, SerialGate
from sage._hosts.uses import Uses
from sage._hosts.waits import Waits
from sage._runtime.backend import CallWaits, HostFacts
from sage._runtime.coroutines import AIO_HINT, is_on_loop
from sage._runtime.lifecycle import EXIT_NET_S
from sage.errors import HeldBackError, ServiceError, ServiceTimeoutError, ServiceUnavailableError, hint

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Coroutine

    from sage._calls import CallFuture
    from sage._hosts.gate import Gate
    from sage._plan.logical import ServiceSpec
    from sage._runtime.backend import HostSurroundings, Lane
    from sage.service import ServiceContext, ServiceOptions


CLOSED = object()
"""Stands for the answer of a call that found its gate closed."""


class NotMadeError(ServiceUnavailableError):
    """A call found that its replica takes none, or the replica died before it had begun; another one can make it."""


def _nobody() -> None:
    """Stand for the front of a service that is not a replica."""


async def _closed(*_: object, **__: object) -> object:
    return CLOSED


class GatedHost(ABC):
    """Runs one service: gates in front of its methods, hooks one after another on a thread of their own.

    A host that is derived from it says how an instance is built, how its hooks run and how its attributes are reached.
    """

    def __init__(self, spec: ServiceSpec, context: ServiceContext, surroundings: HostSurroundings) -> None:
        self.spec = spec
        self._context = context
        self._incarnation = 0
        self._around = surroundings
        self._lane: Lane = surroundings.backend.lane(spec.name)
        self._threads: CallThreads | None = None
        self._waits = Waits(lambda: self._around.backend.now(), is_serial=spec.options.concurrency == 1)
        self._bucket = None if spec.options.rate is None else Bucket(spec.options.rate, self._waits.now)
        self._is_held_back = False
        self._gate: Gate = self._new_gate()
        self._earlier: list[Gate] = []
        self._is_building = False
        self._is_built = False
        self._held = True  # a call that comes before the service is ready waits for it
        self._may_rest = spec.options.idle_stop_s is not None
        self._is_resting = False  # from the begin of a rest until the next instance is ready
        self._refused = False
        self._finishes_calls = False  # whether calls taken in pass the closed gate, as the drain waits for them
        self._is_forked = False
        self._changed = threading.Condition()
        self._uses = Uses(self._changed)
        self.on_turned: Callable[[], None] = _nobody  # called when calls are let through from now on, or are not
        self.on_waiting: Callable[[], None] = _nobody  # called by a caller who waits until the service is there
        useless_after_fork(self)

    @property
    def options(self) -> ServiceOptions:
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
    def waits(self) -> CallWaits:
        bucket, total = self._bucket, self._waits.total()
        return total if bucket is None else CallWaits(*total[:3], bucket.waits_count, bucket.waited_s)

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
        """The names of the hooks of the host itself."""
        return frozenset()

    @property
    def local_hooks(self) -> frozenset[str]:
        return frozenset()

    @property
    def exit_net_s(self) -> float:
        return EXIT_NET_S

    def adopt(self, context: ServiceContext, surroundings: HostSurroundings) -> None:
        """Let another job run the hooks of an instance that is kept."""
        self._around = surroundings
        self._waits.clear()
        self._is_held_back = False
        if self._bucket is not None:
            self._bucket.clear()
        self._incarnation = 1
        self._context.follow(context)
        self._lane = surroundings.backend.lane(self.spec.name, must_start=False)

    # --- requests of the supervisor ---

    def run(self, hook: str, due: float | None, done: Callable[[object, BaseException | None], None]) -> None:
        """Run a hook on the service's own thread and pass its outcome to `done`."""
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
                    value: object = self._build()
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
            except BaseException as error:  # the lifecycle of a service owns the errors of its hooks
                leave_if_forked(error)
                done(None, error)
            else:
                leave_if_forked()
                done(value, None)

        self._lane.run(work)

    def begin_at(self, incarnation: int) -> None:
        """Let the next "build" make this incarnation, where others have counted those before."""
        self._incarnation = incarnation - 1

    @property
    def incarnation(self) -> int:
        """Which instance was built last, or is being built; 0 before the first."""
        return self._incarnation

    def wait_idle(self) -> None:
        """Wait until no hook runs."""
        is_idle = threading.Event()
        self._lane.run(is_idle.set)
        is_idle.wait()

    def hurry(self, due: float) -> None:
        raise NotImplementedError("a host without a process of its own has no exit")

    def facts(self) -> HostFacts:
        return HostFacts()

    def admit(self) -> None:
        with self._changed:
            self._gate.is_open = True
            self._held = self._is_resting = False
            self._changed.notify_all()
        if self.spec.front:
            self.spec.handle._connect(self)  # which forgets the methods of an earlier instance
        self.on_turned()

    def hold(self) -> None:
        with self._changed:
            self._held = True
            self._gate.close()
        self.on_turned()

    @property
    def use_count(self) -> int | None:
        """How often the service was used so far, or None while a call or the reader of an attribute runs or waits."""
        is_queued = self._bucket is not None and self._bucket.is_waited_for
        is_used = self._uses.running or self.is_calling or is_queued or not self._gate.is_idle
        return None if is_used else self.call_count + self._uses.count

    def hold_unused(self, use_count: int) -> bool:
        """Let calls wait if the service was used so often and is not in use, and return whether that is so."""
        with self._changed:
            if self._held or self.use_count != use_count or not self._gate.close_if_idle():
                return False
            # A call may have come and gone before the gate was closed.
            self._held = self._is_resting = self.use_count == use_count
            self._gate.is_open = not self._held
            return self._held

    def hold_back(self) -> None:
        with self._changed:
            self._is_held_back = True
            self._changed.notify_all()

    def used(self, tokens: int) -> None:
        if self._bucket is not None:
            self._bucket.used(tokens)

    def refuse(self) -> None:
        with self._changed:
            self._finishes_calls = self._finishes_calls or not (self._refused or self._held)
            self._held = False
            self._refused = True
            self._gate.close()
            self._changed.notify_all()
        self.on_turned()

    @property
    def takes_calls(self) -> bool:
        """Whether calls are let through."""
        return self._gate.is_open

    @property
    def is_refused(self) -> bool:
        """Whether calls fail, and no later ones will be let through."""
        return self._refused

    def attribute(self, name: str) -> object:
        """Return an attribute of the instance, without a gate before it."""
        return self._attribute(name)

    def bound(self, name: str) -> Callable[..., object]:
        """Return a method behind the gate, which is looked up once for each instance of a replica."""
        bound: Callable[..., object] = getattr(self.spec.handle, name)
        return bound

    def abandon(self) -> str:
        """Leave the thread that hangs behind, and go on with a new one."""
        stack = self._lane.where()
        self._lane.close(wait=False)
        with self._changed:
            self._lane = self._around.backend.lane(self.spec.name, must_start=False)
            came_back = self._is_building and self._is_built
        if came_back:
            # The constructor returned, but too late for anyone to have heard of it.
            self._lane.run(self._clean_late)
        return stack

    def release(self) -> None:
        """Free the thread of a service that is kept; the instance stays."""
        self._lane.close(wait=True)

    def close(self) -> None:
        if self._threads is not None:
            self._threads.close()
        self._lane.close(wait=True)

    # --- requests of callers ---

    def method(self, name: str) -> object:
        """Return a method behind the gate, or another attribute as it is."""
        if self.is_coroutine(name):
            return lambda *args, **kwargs: self._run_or_await(name, args, kwargs)
        if not self._is_there and not self._is_resting:
            return partial(self._later, name)
        attribute = self._permitted(self._attribute_of_resting(name) if self._may_rest else self._attribute(name))
        if not callable(attribute):
            return attribute
        if self.is_coroutine(name):  # which only the instance could tell
            return lambda *args, **kwargs: self._run_or_await(name, args, kwargs)
        options = self.spec.options
        if options.call_timeout_s is not None:
            return lambda *args, **kwargs: self.call(name, args, kwargs, options.call_timeout_s)
        # Whoever keeps the method of a service that may rest must not keep the instance.
        later = partial(self._later, name)
        bound = partial(self._call_found, name) if self._may_rest else self._gate.bind(attribute, later)
        return bound if self._bucket is None else self._paced(bound)

    def wait_there(self) -> None:
        """Wait until there is an instance whose attributes can be read, or the service has ended."""
        with self._changed:
            self._changed.wait_for(lambda: self._is_there or self._refused or not self._held)

    def is_coroutine(self, name: str) -> bool:
        """Return whether `name` is a coroutine method; of a callable's object, once it is there."""
        target = self.spec.target
        if isinstance(target, type):
            return inspect.iscoroutinefunction(getattr(target, name, None))
        return self._coroutine_method(name) is not None

    def call(self, name: str, args: tuple[object, ...], kwargs: dict[str, object], timeout_s: float | None) -> object:
        """Call a method, with a time-out on the service's own threads."""
        if is_on_loop() and self.is_coroutine(name):
            return self._awaitable(name, args, kwargs, timeout_s)
        refuse_on_foreign_loop("the answer of a service", AIO_HINT)
        if self._is_resting:
            timeout_s = self._left_after_start(name, timeout_s)
        return self.call_async(name, args, kwargs, timeout_s).result()

    def call_async(
        self, name: str, args: tuple[object, ...], kwargs: dict[str, object], timeout_s: float | None
    ) -> CallFuture:
        """Start a call on the service's own threads."""
        if timeout_s is None:
            timeout_s = self.spec.options.call_timeout_s
        threads = self._own_threads()
        if self._is_there and not self._may_rest:
            self._attribute(name)  # an unknown one is known at once
        future = threads.submit(name, lambda: self._admitted(name, args, kwargs), timeout_s)
        if self._is_resting:
            future.before_wait = self._wait_back
        return future

    # --- the part of each host ---

    @property
    @abstractmethod
    def _is_there(self) -> bool:
        """Whether there is an instance that attributes can be asked of."""

    @abstractmethod
    def _attribute(self, name: str) -> object:
        """Return an attribute of the instance; a method is returned as a plain function, coroutine functions too.

        Raises:
            UnknownServiceError: the method does not exist.
        """

    def _coroutine_method(self, name: str) -> Callable[..., Awaitable[object]] | None:  # noqa: ARG002
        """Return an awaitable call of a coroutine method for the job's loop, or None if a thread has to wait for it."""
        return None

    @abstractmethod
    def _build(self) -> frozenset[str]:
        """Make an instance and return the names of the hooks it has."""

    @abstractmethod
    def _run_hook(self, hook: str, due: float | None) -> object:
        """Run one of the instance's hooks to its end and return its value."""

    @abstractmethod
    def _clean_late(self) -> None:
        """Clean up an instance whose constructor returned after it had been given up; nobody else will."""

    # --- behind it ---

    def _own_threads(self) -> CallThreads:
        with self._changed:
            if self._refused:
                raise self._unavailable()
            if self._threads is None:
                self._threads = CallThreads(self.spec.name, self.spec.options.concurrency, self._waits)
            return self._threads

    def _after_fork_in_child(self) -> None:
        self._is_forked = self._refused = True
        self._changed = threading.Condition()
        self._uses, self.on_waiting = Uses(self._changed), _nobody
        for gate in (*self._earlier, self._gate):
            gate.shut_after_fork()

    def _run_or_await(self, name: str, args: tuple[object, ...], kwargs: dict[str, object]) -> object:
        """Call a coroutine method: run it to its end for a thread, and let a coroutine await it."""
        if self._is_forked:
            raise self._unavailable()
        timeout_s = self.spec.options.call_timeout_s
        if is_on_loop():
            return self._awaitable(name, args, kwargs, timeout_s)
        if timeout_s is not None:
            return self.call(name, args, kwargs, timeout_s)
        if not self._is_there:
            return self._later(name, *args, **kwargs)
        self._wait_turn()
        gated = self._gated(name)
        if gated is None:
            return self._call_found(name, *args, **kwargs)
        return self._around.loop.run(gated(*args, **kwargs))

    def _awaitable(
        self, name: str, args: tuple[object, ...], kwargs: dict[str, object], timeout_s: float | None
    ) -> object:
        gated = self._gated(name)
        if gated is None:
            return self.call_async(name, args, kwargs, timeout_s)
        if self._bucket is not None:
            gated = self._paced_coroutine(self._bucket, gated)
        coroutine = gated(*args, **kwargs)
        return self._around.loop.answer(coroutine if timeout_s is None else self._in_time(name, coroutine, timeout_s))

    def _gated(self, name: str) -> Callable[..., Coroutine[object, object, object]] | None:
        """Return a coroutine method behind the gate, or None where threads have to call it."""
        gate = self._gate  # before the method: one that is open later lets calls through to this same instance
        method = self._coroutine_method(name)
        if method is None or self._held or not isinstance(gate, ConcurrentGate):
            return None
        method = self._permitted_coroutine(method)
        return gate.bind_coroutine(method, lambda *args, **kwargs: self.call_async(name, args, kwargs, None))

    async def _in_time(self, name: str, coroutine: Coroutine[object, object, object], timeout_s: float) -> object:
        import asyncio

        bound = asyncio.timeout(timeout_s)
        try:
            async with bound:
                return await coroutine
        except TimeoutError:
            if not bound.expired():
                raise
            raise not_in_time(self.spec.name, name, timeout_s) from None

    def _admitted(self, name: str, args: tuple[object, ...], kwargs: dict[str, object]) -> object:
        """Make a call that was taken in while the service ran; the drain waits for it, so the gate may be closed."""
        if not self._is_there:
            return self._later(name, *args, **kwargs)
        self._wait_turn()
        gate = self._gate
        method = self._coroutine_method(name)
        if method is not None and isinstance(gate, ConcurrentGate):
            # It takes its place on the loop: a thread that kept one meanwhile would keep others from going on there.
            gated = gate.bind_coroutine(self._permitted_coroutine(method), _closed, passes_closed=self._finishes_calls)
            answer = self._around.loop.run(gated(*args, **kwargs))
            return self._later(name, *args, **kwargs) if answer is CLOSED else answer
        call = partial(self._found(name), *args, **kwargs)

        def late() -> object:
            if self._finishes_calls and self._is_there:
                return self._gate.bind(call, call, passes_closed=True)()
            return self._later(name, *args, **kwargs)

        return gate.bind(call, late)()

    def _found(self, name: str) -> Callable[..., object]:
        """Return a method, looked up behind the gate if a rest may end the instance before a call is let through."""
        if self._may_rest:
            return lambda *args, **kwargs: function_of(self._permitted(self._attribute(name)))(*args, **kwargs)
        return function_of(self._permitted(self._attribute(name)))

    def _call_found(self, name: str, /, *args: object, **kwargs: object) -> object:
        gate, method = self._gate, self._found(name)
        return gate.bind(method, partial(self._later, name))(*args, **kwargs)

    def _attribute_of_resting(self, name: str) -> object:
        """Return an attribute of a service that may rest; wait until it is there."""
        with self._uses.one():
            while self._is_resting:
                if self._refused:
                    raise self._unavailable()
                self._wait_back(None)
            return self._attribute(name)

    def _left_after_start(self, name: str, timeout_s: float | None) -> float | None:
        """Wait for the start of a service that rests, on the caller's own thread, and return the rest of its time."""
        timeout_s = self.spec.options.call_timeout_s if timeout_s is None else timeout_s
        began_at = self._waits.now()
        if not self._wait_back(timeout_s):
            raise not_in_time(self.spec.name, name, timeout_s)
        return None if timeout_s is None else max(timeout_s - (self._waits.now() - began_at), 0.0)

    def _wait_back(self, timeout_s: float | None) -> bool:
        """Wait until the service is back, or takes no calls any more, and return whether that is so."""
        with self._uses.one():  # or it might rest again before this caller has seen that it is back
            self.on_waiting()
            if self._is_resting and self._held and is_on_loop():
                text = f'service "{self.spec.name}" rests, and a coroutine must not block the event loop for its start'
                error = ServiceError(text, service=self.spec.name)
                raise hint(error, f"{AIO_HINT} Read attributes in a plain function.")
            return wait_for(self._changed, lambda: self._refused or not self._held, timeout_s)

    def _paced(self, bound: Callable[..., object]) -> Callable[..., object]:
        """Return a method whose calls wait for the rate before they wait for a place."""

        def call(*args: object, **kwargs: object) -> object:
            self._wait_turn()
            return bound(*args, **kwargs)

        return call

    def _paced_coroutine(
        self, bucket: Bucket, gated: Callable[..., Awaitable[object]]
    ) -> Callable[..., Coroutine[object, object, object]]:
        async def call(*args: object, **kwargs: object) -> object:
            await bucket.wait(self._check_held_back)
            return await gated(*args, **kwargs)

        return call

    def _wait_turn(self) -> None:
        """Wait on a thread for the rate of the service, if it has one."""
        if self._bucket is None:
            return
        if self._held:  # or the call would need a second turn when the service is back
            self._wait_back(self.spec.options.call_timeout_s)
        with self._bucket.turn() as turn:
            while pause_s := self._bucket.pause_s(turn):
                self._check_held_back()
                wait_for(self._changed, lambda: self._is_held_back or self._refused, pause_s)

    def _check_held_back(self) -> None:
        if self._refused:
            raise self._unavailable()
        if self._is_held_back:
            text = f'service "{self.spec.name}" was not called: its rate has no place left before the job ends'
            raise HeldBackError(text, service=self.spec.name)

    def _permitted(self, attribute: object) -> object:
        """Return a method whose calls begin within the budget of the job; any other attribute as it is."""
        permit = self._around.permit
        if permit is None or not callable(attribute):
            return attribute

        def call(*args: object, **kwargs: object) -> object:
            self._let_begin(permit)
            return attribute(*args, **kwargs)

        return call

    def _permitted_coroutine(self, method: Callable[..., Awaitable[object]]) -> Callable[..., Awaitable[object]]:
        permit = self._around.permit
        if permit is None:
            return method

        async def call(*args: object, **kwargs: object) -> object:
            self._let_begin(permit)
            return await method(*args, **kwargs)

        return call

    def _let_begin(self, permit: Callable[[], None]) -> None:
        try:
            permit()
        except HeldBackError:
            # The gate has counted the call, and counts the error next.
            self._gate.take_back()
            self._gate.error_count -= 1
            raise

    def _later(self, name: str, /, *args: object, **kwargs: object) -> object:
        """Make a call that found the gate closed: wait while the service is restarted, or fail."""
        timeout_s = self.spec.options.call_timeout_s
        if self.spec.front and not self._gate.is_open:
            raise self._unavailable()  # the front knows another one
        if not self._wait_back(timeout_s):
            text = f'service "{self.spec.name}" was not back within {timeout_s:g} s'
            raise ServiceTimeoutError(text, service=self.spec.name, fault="external")
        with self._changed:
            if self._refused or not (self._gate.is_open or self._held):  # it may be away again
                raise self._unavailable()
        if current_call(self.spec.name) is not None:  # another thread may not be free for it
            return self._admitted(name, args, kwargs)
        return function_of(self.method(name))(*args, **kwargs)

    def _unavailable(self) -> ServiceUnavailableError:
        if self._is_forked:
            return refusal(self.spec.name)
        kind = NotMadeError if self.spec.front else ServiceUnavailableError
        error = kind(f'service "{self.spec.name}" has stopped and takes no more calls', service=self.spec.name)
        return hint(error, "A service is stopped when everything that depends on it has ended, or when it failed.")

    def _new_gate(self) -> Gate:
        concurrency = self.spec.options.concurrency
        return SerialGate(self._waits) if concurrency == 1 else ConcurrentGate(concurrency, waits=self._waits)

    def _drain(self, due: float | None) -> bool:
        # A call that the gate has not let through waits for the next instance.
        threads_done = self._held or self._threads is None or self._threads.drain(self._left(due))
        if not threads_done and self._refused and self._threads is not None:
            self._threads.cancel_waiting()
        return self._gate.drain(self._left(due)) and threads_done

    def _left(self, due: float | None) -> float:
        return 0.0 if due is None else max(due - self._around.backend.now(), 0.0)
