"""Gates: how many calls of one instance of a service may run at once, and whether any may at all."""

from __future__ import annotations

import threading
import time
from abc import ABC, abstractmethod
from collections import deque
from contextlib import nullcontext
from typing import TYPE_CHECKING, Any, TypeVar

from sage._current_job import gates_here
from sage._hosts.waits import Crowd, Waits
from sage._runtime.coroutines import is_on_loop
from sage.service import ABSENT

if TYPE_CHECKING:
    from asyncio import Future
    from collections.abc import Awaitable, Callable, Coroutine
    from contextlib import AbstractContextManager

    from sage._hosts.waits import Wait

T = TypeVar("T")


class Gate(ABC):
    """Lets calls through to one instance of a service until it is closed.

    Attributes:
        is_open: whether calls are let through.
        call_count: how many calls were let through.
        error_count: how many of them raised.
    """

    def __init__(self, waits: Waits) -> None:
        self.is_open = False
        self.call_count = 0
        self.error_count = 0
        self._waits = waits

    @property
    @abstractmethod
    def is_idle(self) -> bool:
        """Whether no call runs or waits; a moment later, that may be otherwise."""

    @abstractmethod
    def bind(
        self, method: Callable[..., T], otherwise: Callable[..., T], *, passes_closed: bool = False
    ) -> Callable[..., T]:
        """Return `method` behind the gate; a call that finds it closed goes to `otherwise`, unless it may pass."""

    @abstractmethod
    def close(self) -> None:
        """Let nothing more through."""

    @abstractmethod
    def close_if_idle(self) -> bool:
        """Let nothing more through unless a call runs or waits, and return whether that is so; never wait."""

    @abstractmethod
    def take_back(self) -> None:
        """Count a call less that was let through and not made."""

    @abstractmethod
    def drain(self, timeout_s: float) -> bool:
        """Wait until no call runs and return whether that is so."""

    @abstractmethod
    def shut_after_fork(self) -> None:
        """Let nothing through, and wait for none of the threads that a forked process does not have."""


class SerialGate(Gate):
    """One call at a time. A service that calls itself gets through, as the lock is reentrant.

    Args:
        waits: takes in how long calls wait; by default nobody reads it.
    """

    def __init__(self, waits: Waits | None = None) -> None:
        super().__init__(waits or Waits(time.monotonic, is_serial=True))
        self._lock = threading.RLock()

    def bind(
        self, method: Callable[..., T], otherwise: Callable[..., T], *, passes_closed: bool = False
    ) -> Callable[..., T]:
        # The hot path of services: one lock, one test and a plain call, about as long as the call itself. Handing on a
        # tuple and a dictionary would cost as much again, and most calls have one argument. Only calls that have to
        # wait are measured.
        acquire, release = self._lock.acquire, self._lock.release

        def call(first: object = ABSENT, /, *args: object, **kwargs: object) -> T:
            if first is ABSENT:
                return call_with((), kwargs)
            if args or kwargs:
                return call_with((first, *args), kwargs)
            if not acquire(False):
                return call_with((first,), kwargs)
            try:
                if self.is_open or passes_closed:
                    self.call_count += 1
                    try:
                        return method(first)
                    except BaseException:
                        self.error_count += 1
                        raise
            finally:
                release()
            return otherwise(first)

        def call_with(args: tuple[object, ...], kwargs: dict[str, object]) -> T:
            wait = None if acquire(False) else self._waits.begin()
            if wait is not None:
                acquire()
                wait.found()
            try:
                if self.is_open or passes_closed:
                    self.call_count += 1
                    try:
                        return method(*args, **kwargs)
                    except BaseException:
                        self.error_count += 1
                        raise
            finally:
                release()
                if wait is not None:
                    wait.end()
            return otherwise(*args, **kwargs)

        return call

    def close(self) -> None:
        """Stop letting calls through; calls that wait for the lock find the gate closed."""
        self.is_open = False

    @property
    def is_idle(self) -> bool:
        is_free = self._lock.acquire(blocking=False)
        if is_free:
            self._lock.release()
        return is_free

    def close_if_idle(self) -> bool:
        if not self._lock.acquire(blocking=False):
            return False
        self.is_open = False
        self._lock.release()
        return True

    def take_back(self) -> None:
        """Count a call less; the caller is let through just now."""
        self.call_count -= 1

    def drain(self, timeout_s: float) -> bool:
        if not self._lock.acquire(timeout=max(timeout_s, 0)):
            return False
        self._lock.release()
        return True

    def shut_after_fork(self) -> None:
        """Let nothing through; another thread of the parent may hold the lock."""
        self.is_open = False
        lock: Any = self._lock
        if not lock._is_owned():
            lock._at_fork_reinit()


class ConcurrentGate(Gate):
    """Several calls at a time, up to a limit or without one: of threads, and of coroutines, which do not block.

    A plain method that is called on an event loop runs between the awaits of the coroutines there, so it does not wait
    for them: they could not go on.

    Args:
        calls_max: the limit.
        going_on: keeps the loop of the coroutines going while a thread waits for its place.
        waits: takes in how long calls wait; by default nobody reads it. Without `calls_max`, calls of a service that
            makes one at a time wait for each other behind this gate.
    """

    def __init__(
        self,
        calls_max: int | None,
        going_on: Callable[[], AbstractContextManager[None]] = nullcontext,
        waits: Waits | None = None,
    ) -> None:
        super().__init__(waits or Waits(time.monotonic, is_serial=calls_max == 1))
        self._calls_max = calls_max
        self._going_on = going_on
        self._running: dict[object, int] = {}  # by the identity of a thread, or an object for the call of a coroutine
        self._coroutines = 0
        self._awaiting: deque[Future[None]] = deque()
        self._waiting = 0
        self._lock = threading.Lock()
        self._changed = threading.Condition(self._lock)
        self._waits_behind = calls_max is None and self._waits.is_serial
        self._late: dict[object, Wait] = {}  # of the calls of a serial service that had to wait
        self._crowd = Crowd(self._waits)

    def bind(
        self, method: Callable[..., T], otherwise: Callable[..., T], *, passes_closed: bool = False
    ) -> Callable[..., T]:

        def call(*args: object, **kwargs: object) -> T:
            me = threading.get_ident()
            if not self._enter(me, passes_closed):
                return otherwise(*args, **kwargs)
            try:
                return method(*args, **kwargs)
            except BaseException:
                self.error_count += 1
                raise
            finally:
                with self._lock:
                    self._leave(me)

        # The hot path of a service in a process of its own. Its caller has just slept, so that the processor's caches
        # are cold, and each line takes three times as long as in a loop: nothing is called but the method.
        acquire, release, running, crowd = self._lock.acquire, self._lock.release, self._running, self._crowd

        def call_unbounded(*args: object, **kwargs: object) -> T:
            me = object()
            acquire()
            try:
                if has_place := self.is_open or passes_closed:
                    running[me] = 1
                    self.call_count += 1
                    if self._waits_behind and len(running) > 1:
                        crowd.changed(len(running) - 1, has_come=True)
            finally:
                release()
            if not has_place:
                return otherwise(*args, **kwargs)
            try:
                return method(*args, **kwargs)
            except BaseException:
                self.error_count += 1
                raise
            finally:
                acquire()
                try:
                    if crowd.is_there or self._waiting:
                        self._leave(me)
                    else:
                        del running[me]
                finally:
                    release()

        return call_unbounded if self._calls_max is None else call

    def bind_coroutine(
        self,
        method: Callable[..., Awaitable[T]],
        otherwise: Callable[..., Awaitable[T]],
        *,
        passes_closed: bool = False,
    ) -> Callable[..., Coroutine[object, object, T]]:
        """Return a coroutine method behind the limit; like `bind`, for calls that are awaited."""

        def call(*args: object, **kwargs: object) -> Coroutine[object, object, T]:
            # Seen by the caller's thread: a service that calls itself needs no second place.
            return enter(self in gates_here.get() or threading.get_ident() in self._running, args, kwargs)

        async def enter(is_inside: bool, args: tuple[object, ...], kwargs: dict[str, object]) -> T:
            me = object()
            if not await self._enter_awaiting(me, is_inside, passes_closed):
                return await otherwise(*args, **kwargs)
            before = gates_here.set(gates_here.get() | {self})
            try:
                return await method(*args, **kwargs)
            except BaseException:
                self.error_count += 1
                raise
            finally:
                gates_here.reset(before)
                with self._lock:
                    self._coroutines -= 1
                    self._leave(me)

        return call

    def close(self) -> None:
        """Stop letting calls through, and send waiting ones away."""
        with self._lock:
            self.is_open = False
            self._changed.notify_all()
            while self._awaiting:
                self._wake_one()

    @property
    def is_idle(self) -> bool:
        return not (self._running or self._waiting or self._awaiting)

    def close_if_idle(self) -> bool:
        with self._lock:
            is_idle = self.is_idle
            self.is_open = self.is_open and not is_idle
            return is_idle

    def take_back(self) -> None:
        with self._lock:
            self.call_count -= 1

    def drain(self, timeout_s: float) -> bool:
        with self._lock:
            self._waiting += 1
            try:
                return self._changed.wait_for(lambda: not self._running, max(timeout_s, 0))
            finally:
                self._waiting -= 1

    def shut_after_fork(self) -> None:
        """Let nothing through; another thread of the parent may hold the lock."""
        self.is_open = False
        lock: Any = self._lock
        lock._at_fork_reinit()

    def _enter(self, me: int, passes_closed: bool) -> bool:
        with self._lock:
            if not self._has_to_wait(me, passes_closed):
                return self._take_place(me, passes_closed)
        wait = self._waits.begin()
        with self._going_on(), self._lock:
            while self._has_to_wait(me, passes_closed):
                self._waiting += 1
                self._changed.wait()
                self._waiting -= 1
            return self._waited(me, wait, has_place=self._take_place(me, passes_closed))

    def _waited(self, me: object, wait: Wait, *, has_place: bool) -> bool:
        """Measure the wait of a call, and return whether the call has its place; the lock is held."""
        if has_place:
            wait.found()
            self._late[me] = wait
        else:
            wait.end()
        return has_place

    def _has_to_wait(self, me: int, passes_closed: bool) -> bool:
        # A thread that is inside already, because the service calls itself, needs no place of its own.
        if self._calls_max is None or me in self._running:
            return False
        return (self.is_open or passes_closed) and self._is_full_for_thread(self._calls_max)

    def _take_place(self, me: int, passes_closed: bool) -> bool:
        if not self.is_open and not passes_closed:
            return False
        self._running[me] = self._running.get(me, 0) + 1
        self.call_count += 1
        return True

    def _is_full_for_thread(self, calls_max: int) -> bool:
        if len(self._running) < calls_max:
            return False
        beside = self._coroutines if is_on_loop() else 0
        return len(self._running) - beside >= calls_max and self not in gates_here.get()

    async def _enter_awaiting(self, me: object, is_inside: bool, passes_closed: bool) -> bool:
        import asyncio

        wait: Wait | None = None
        while True:
            with self._lock:
                is_away = not self.is_open and not passes_closed
                if is_away or is_inside or self._calls_max is None or len(self._running) < self._calls_max:
                    if not is_away:
                        self._running[me] = 1
                        self._coroutines += 1
                        self.call_count += 1
                    return not is_away if wait is None else self._waited(me, wait, has_place=not is_away)
                place: Future[None] = asyncio.get_running_loop().create_future()
                self._awaiting.append(place)
            wait = wait or self._waits.begin()
            try:
                await place
            except asyncio.CancelledError:
                with self._lock:
                    wait.end()
                    if place in self._awaiting:
                        self._awaiting.remove(place)
                    elif self._awaiting:
                        self._wake_one()  # it was its turn, and it does not come
                raise

    def _leave(self, me: object) -> None:
        """Give a place back, and tell whoever waits; the lock is held."""
        depth = self._running[me] - 1
        if depth:
            self._running[me] = depth
            return
        if self._crowd.is_there:
            self._crowd.changed(len(self._running), has_come=False)
        del self._running[me]
        if self._late and (wait := self._late.pop(me, None)) is not None:
            wait.end()
        if self._waiting:
            self._changed.notify_all()
        if self._awaiting:
            self._wake_one()

    def _wake_one(self) -> None:
        """Let the coroutine that has waited longest try again; the lock is held."""
        place = self._awaiting.popleft()
        place.get_loop().call_soon_threadsafe(_set, place)


def _set(place: Future[None]) -> None:
    if not place.done():
        place.set_result(None)
