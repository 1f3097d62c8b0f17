"""The bucket of a rate: calls of one service begin in the order in which they came, no faster than it fills."""

from __future__ import annotations

import threading
from collections import deque
from contextlib import contextmanager
from dataclasses import dataclass
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

LATE_MAX_S = 0.05
"""How late a call that waited may begin without those behind it beginning later, too: threads wake up late."""

NEWEST_SHARE = 0.1
"""How much the latest answer counts in the number of tokens that a call is taken to use."""


@dataclass(frozen=True, slots=True)
class Limit:
    """A limit as a provider tells it.

    Attributes:
        per_minute: how much of it comes back in a minute.
        size: how much there may be.
        left: how much there is.
    """

    per_minute: float
    size: float
    left: float


class Meter:
    """How much is left of one limit: what was taken comes back evenly, up to the size. It has no limit at first."""

    def __init__(self) -> None:
        self.unit_s = 0.0
        self._size = 0.0
        self._full_at = 0.0  # when all of it is there again, if nobody takes more

    def set(self, limit: Limit, now_s: float, uncounted: float = 0.0) -> None:
        """Take in a limit; others may have taken of it, but what was taken here is not given back.

        Args:
            limit: the limit.
            now_s: the time.
            uncounted: how much may be on its way to the provider that was taken before there was a limit.
        """
        missing = limit.size - limit.left
        if self.unit_s:
            missing = max(missing, (self._full_at - now_s) / self.unit_s)
        else:
            missing += uncounted
        self.unit_s, self._size = MINUTE_S / limit.per_minute, limit.size
        self._full_at = now_s + missing * self.unit_s

    def left_s(self, amount: float, now_s: float) -> float:
        """Return how long it takes until so much is there, or all that can be; not above 0 if it is there."""
        return self._full_at - max(self._size - amount, 0.0) * self.unit_s - now_s

    def take(self, amount: float, now_s: float) -> None:
        """Take so much, which need not be there yet; a negative amount is given back."""
        self._full_at = max(self._full_at, now_s) + amount * self.unit_s


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
        rate: the rate, or None as long as only the provider knows it.
        now: the clock, in seconds.
    """

    def __init__(self, rate: Rate | None, now: Callable[[], float]) -> None:
        self._now = now
        self._lock = threading.Lock()
        self._numbers = count()
        self._turns: dict[Turn, None] = {}  # in order; any of them may leave, and there may be thousands
        self._calls, self._tokens = Meter(), Meter()
        if rate is not None and rate.requests_per_minute is not None:
            self._calls.set(Limit(rate.requests_per_minute, rate.burst, rate.burst), now())
        if rate is not None and rate.tokens_per_minute is not None:
            self._tokens.set(Limit(rate.tokens_per_minute, 0, 0), now())
        self._usual_tokens = 0.0
        self._unanswered = 0  # calls that began, of those whose answers `learn` is told
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
            usual = self._usual_tokens
            left_s = max(self._calls.left_s(1, now_s), self._tokens.left_s(usual, now_s))
            if before or left_s > 0:
                turn.has_waited = True
                each_s = max(self._calls.unit_s, usual * self._tokens.unit_s)
                return max(max(left_s, 0.0) + before * each_s, PAUSE_LEAST_S)
            del self._turns[turn]
            due_s = now_s + max(left_s, -LATE_MAX_S) if turn.has_waited else now_s
            self._calls.take(1, due_s)
            self._tokens.take(usual, due_s)
            self._reserved.append(self._usual_tokens)
            self._unanswered += 1
            if turn.has_waited:
                self.waits_count += 1
                self.waited_s += now_s - turn.came_at
            return 0.0

    def learn(self, calls: Limit | None, tokens: Limit | None) -> None:
        """Take in the limits as the answer of a call tells them, which may be none."""
        with self._lock:
            self._unanswered = max(self._unanswered - 1, 0)
            for meter, limit, each in ((self._calls, calls, 1.0), (self._tokens, tokens, self._usual_tokens)):
                if limit is not None:
                    meter.set(limit, self._now(), self._unanswered * each)

    def used(self, tokens: int) -> None:
        """Count the tokens of an answer in the place of those that its call was taken to use."""
        with self._lock:
            reserved = self._reserved.popleft() if self._reserved else 0.0
            self._tokens.take(tokens - reserved, self._now())
            share = NEWEST_SHARE if self._usual_tokens else 1.0
            self._usual_tokens += share * (tokens - self._usual_tokens)
