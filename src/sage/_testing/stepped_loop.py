"""An asyncio loop that goes one round when it is told to, on a clock of its own: coroutines under a seeded backend."""

from __future__ import annotations

import asyncio
import selectors
import threading
import time
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING, TypeVarTuple

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from contextvars import Context

Arguments = TypeVarTuple("Arguments")
Events = list[tuple[selectors.SelectorKey, int]]


class RoundSelector(selectors.DefaultSelector):
    """Asks the loop before each round how to wait."""

    def __init__(self) -> None:
        super().__init__()
        self.wait: Callable[[float | None], Events] = super().select

    def select(self, timeout: float | None = None) -> Events:
        """Return the ready events, when the loop lets a round begin."""
        return self.wait(timeout)

    def look(self, timeout_s: float | None) -> Events:
        """Return the ready events, now or within some seconds of real time."""
        return super().select(timeout_s)


class SteppedLoop(asyncio.SelectorEventLoop):
    """Stands still before each round until `go_round`, and while a thread waits for a coroutine goes on by itself.

    Its time is that of `now`, so that a sleep of an hour takes no time, and the order of events depends on who calls
    `go_round` when. Only `going_on` adds real time to it, since nobody moves the clock then.
    """

    def __init__(self, now: Callable[[], float]) -> None:
        self._now = now
        self._changed = threading.Condition()
        self._added_s = 0.0
        self._due_at: float | None = None
        self._has_more = False
        self._may_go = False
        self._stands = False
        self._waiting_count = 0
        self._rounds = RoundSelector()
        super().__init__(self._rounds)
        self._rounds.wait = self._wait_for_round

    def time(self) -> float:
        """Return the time of the clock."""
        return self._now() + self._added_s

    def call_soon_threadsafe(
        self, callback: Callable[[*Arguments], object], *args: *Arguments, context: Context | None = None
    ) -> asyncio.Handle:
        """Have something called in the next round."""
        self._has_more = True
        return super().call_soon_threadsafe(callback, *args, context=context)

    @property
    def is_ready(self) -> bool:
        """Whether a round has something to do now."""
        if self._waiting_count or not self.is_running():
            return self._has_more and self._waiting_count == 0 and not self.is_closed()
        return self._has_more or (self._due_at is not None and self._due_at <= self._now())

    @property
    def due(self) -> float | None:
        """When a round has something to do, on the clock, or None."""
        return self._due_at if self.is_running() else None

    def go_round(self) -> None:
        """Let one round be run, and return when it is over."""
        with self._changed:
            self._changed.wait_for(lambda: self._stands)
            self._may_go = True
            self._changed.notify_all()
            self._changed.wait_for(lambda: self._stands and not self._may_go)

    def waits_outside(self, timeout_s: float) -> bool:
        """Return whether something from outside, such as an answer of another thread, comes within real seconds."""
        if not self.is_running() or not asyncio.all_tasks(self):
            return False
        with self._changed:
            if self._waiting_count or not self._stands:
                return self._changed.wait_for(lambda: self._stands and not self._waiting_count, timeout_s)
        self._has_more = self._has_more or bool(self._rounds.look(timeout_s))
        return self._has_more

    @contextmanager
    def going_on(self) -> Iterator[None]:
        """Let the loop go on by itself, in real time, while this thread waits for it."""
        with self._changed:
            self._waiting_count += 1
            self._changed.notify_all()
        try:
            yield
        finally:
            with self._changed:
                self._waiting_count -= 1
                is_last = self._waiting_count == 0
            if is_last and self.is_running():
                with suppress(RuntimeError):  # it was closed
                    self.call_soon_threadsafe(int)  # it may wait for events
                    self._has_more = False
                    self.go_round()

    def _wait_for_round(self, timeout_s: float | None) -> Events:
        with self._changed:
            # Kept on the clock, which moves to just this moment: if real time were added to it and taken away again, it
            # could stay a rounding error before the moment for ever.
            self._due_at = None if timeout_s is None else self._now() + timeout_s
            self._stands = True
            self._changed.notify_all()
            self._changed.wait_for(lambda: self._may_go or self._waiting_count)
            self._may_go = self._stands = self._has_more = False
            is_free = self._waiting_count > 0
        if not is_free:
            return self._rounds.look(0)
        left_s = None if self._due_at is None else max(self._due_at - self._now(), 0.0)
        began_at = time.monotonic()
        events = self._rounds.look(left_s)
        self._added_s += time.monotonic() - began_at
        return events
