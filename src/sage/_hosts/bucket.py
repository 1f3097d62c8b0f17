"""The bucket of a rate: calls of one service begin in the order in which they came, no faster than it fills."""

from __future__ import annotations

import threading
from collections import deque
from contextlib import contextmanager
from itertools import count
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from sage.rate import Rate

MINUTE_S = 60.0

LOOK_S = 0.25
"""How often a coroutine that waits for its turn looks whether the job ends."""

PAUSE_LEAST_S = 0.001
"""How long a call waits at least, such as for another one that is before it and may begin now."""

RESERVED_MAX = 4096
"""How many calls without an answer are remembered with their tokens; those that failed are among them."""

NEWEST_SHARE = 0.1
"""How much the latest answer counts in the number of tokens that a call is taken to use."""


class Turn:
    """The place of one call in the queue, and since when it waits."""

    __slots__ = ("came_at", "has_waited", "number")

    def __init__(self, number: int, came_at: float) -> None:
        self.number = number
        self.came_at = came_at
        self.has_waited = False


class Bucket:
    """Says when each call of a service may begin; any thread may use it.

    A call asks `pause_s` for the time until its turn, waits for that long, and asks again until it is 0. The tokens of
    a call are known only when its answer is there; until then, it counts with those of a usual call.

    Args:
        now: the clock, in seconds.
    """

    def __init__(self, rate: Rate, now: Callable[[], float]) -> None:
        self._now = now
        self._lock = threading.Lock()
        self._numbers = count()
        self._turns: dict[Turn, None] = {}  # in order; any of them may leave, and there may be thousands
        self._call_s = MINUTE_S / rate.requests_per_minute if rate.requests_per_minute is not None else 0.0
        self._token_s = MINUTE_S / rate.tokens_per_minute if rate.tokens_per_minute is not None else 0.0
        self._ahead_s = (rate.burst - 1) * self._call_s
        self._calls_at = self._tokens_at = 0.0  # when the calls and tokens so far are paid off
        self._usual_tokens = 0.0
        self._reserved: deque[float] = deque(maxlen=RESERVED_MAX)
        self.clear()

    def clear(self) -> None:
        """Measure anew, as another job uses the service from now on."""
        self.waits_count, self.waited_s = 0, 0.0

    @contextmanager
    def turn(self) -> Iterator[Turn]:
        """Put a call at the end of the queue, until it begins or the block ends."""
        with self._lock:
            turn = Turn(next(self._numbers), self._now())
            self._turns[turn] = None
        try:
            yield turn
        finally:
            with self._lock:
                self._turns.pop(turn, None)

    async def wait(self, check: Callable[[], None]) -> None:
        """Wait in a coroutine until it is its turn; `check` raises if that does not come."""
        import asyncio

        with self.turn() as turn:
            while pause_s := self.pause_s(turn):
                check()
                await asyncio.sleep(min(pause_s, LOOK_S))

    @property
    def is_waited_for(self) -> bool:
        """Whether a call waits for its turn."""
        return bool(self._turns)

    def pause_s(self, turn: Turn) -> float:
        """Return how long a call has to wait before it asks again, in seconds; with 0 it begins."""
        with self._lock:
            now_s, before = self._now(), turn.number - next(iter(self._turns)).number
            usual_s = self._usual_tokens * self._token_s
            left_s = max(self._calls_at - self._ahead_s, self._tokens_at) - now_s
            if before or left_s > 0:
                turn.has_waited = True
                return max(max(left_s, 0.0) + before * max(self._call_s, usual_s), PAUSE_LEAST_S)
            del self._turns[turn]
            self._calls_at = max(self._calls_at, now_s) + self._call_s
            self._tokens_at = max(self._tokens_at, now_s) + usual_s
            self._reserved.append(self._usual_tokens)
            if turn.has_waited:
                self.waits_count += 1
                self.waited_s += now_s - turn.came_at
            return 0.0

    def used(self, tokens: int) -> None:
        """Count the tokens of an answer in the place of those that its call was taken to use."""
        with self._lock:
            reserved = self._reserved.popleft() if self._reserved else 0.0
            self._tokens_at = max(self._tokens_at, self._now()) + (tokens - reserved) * self._token_s
            share = NEWEST_SHARE if self._usual_tokens else 1.0
            self._usual_tokens += share * (tokens - self._usual_tokens)
