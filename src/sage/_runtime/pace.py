"""How many records a step takes, and a read of a source asks for: batches are bounded by time."""

from __future__ import annotations

from threading import get_ident
from time import monotonic
from typing import TYPE_CHECKING, Protocol

from sage._processes import processor_wait_s
from sage.records import BATCH_BYTES_MAX, BATCH_RECORDS_MAX

if TYPE_CHECKING:
    from collections.abc import Callable

STEP_FAST_S = 0.0025
STEP_SLOW_S = 0.010
"""A step aims at about 5 ms: below the first bound it takes more records next time, above the second fewer."""

READ_S = 0.00025
"""A source that may wait is asked for as many records as it gives in this time: a record that is there goes on."""

CAREFUL_SHARE = 0.25
CAREFUL_MAX_S = 0.05
"""After a wait in a source, it is not asked for more at once for this share of the wait, and for this long at most.

A source of bursts would otherwise keep the end of a burst until the next one begins. The bound limits the cost for a
source that is fast after a long wait.
"""


SLOW_RECORD_S = 0.0002
SLOW_STEPS = 8
"""A task is slow after so many steps in a row in which a record took longer: to wake a thread for it costs less."""

IDLE_PAUSE_MIN_S = 0.00005
IDLE_PAUSE_MAX_S = 0.05
IDLE_PAUSE_GROWTH = 1.125
"""How long a source that has nothing now is left alone: about an eighth of the time for which it has had nothing."""

GIVES_MIN = 1 / BATCH_RECORDS_MAX
"""A chain that gives less, as a reduction does before its end, may take a full batch into a queue of one record."""

FAILURE_WAIT_MAX_S = 1.0
"""How long a failure waits for earlier records in its task, in seconds."""


class Pace(Protocol):
    """How many records a step takes; tests draw it from a seed.

    Attributes:
        is_slow: whether records take so long that the task should not keep others waiting.
    """

    is_slow: bool

    def limit(self) -> int:
        """Return how many records the next step takes at most, at least 1."""

    def measured(self, records: int, elapsed_s: float) -> None:
        """Say how long a step took."""

    def read_limit(self) -> int:
        """Return how many records the next read of a source that may wait asks for at most, at least 1."""

    def has_read(self, records: int, began_at: float, ended_at: float, size: int | None = None) -> None:
        """Say when such a read began and ended, in seconds of one clock, and how many bytes several records took."""

    def has_emitted(self, records: int, size: int) -> None:
        """Say how many records a step emitted, and how many bytes they take."""

    def running_s(self, elapsed_s: float) -> float:
        """Return the part of a time that has just passed in which this thread was not kept waiting for a processor."""


FRESH_S = 0.001
"""To ask the system for how long a thread has waited costs as much as many cheap calls, so it is not asked sooner."""

_waits: dict[int, tuple[float, float]] = {}
"""For how long each thread had waited for a processor when it was asked last, and when that was."""


class TimedPace:
    """Starts with one record, and follows the measured time up to the size of a full batch.

    Args:
        wait_s: returns how long the calling thread has waited for a processor so far.
    """

    def __init__(self, wait_s: Callable[[], float] = processor_wait_s) -> None:
        self._wait_s = wait_s
        self._limit = 1
        self._read_limit = 1
        self._careful_until = 0.0
        self._fits = self._read_fits = BATCH_RECORDS_MAX
        self._slow_count = 0
        self.is_slow = False

    def limit(self) -> int:
        return self._limit

    def measured(self, records: int, elapsed_s: float) -> None:
        """Adjust to how long a step took."""
        self._slow_count = self._slow_count + 1 if elapsed_s > SLOW_RECORD_S * (records or 1) else 0
        self.is_slow = self._slow_count >= SLOW_STEPS
        if elapsed_s > STEP_SLOW_S:
            self._limit = max(1, self._limit // 2)
        elif elapsed_s < STEP_FAST_S and records >= self._limit:
            growth = next((more for more in (64, 16) if elapsed_s * more <= STEP_FAST_S), 4)
            self._limit = min(self._fits, self._limit * growth)

    def read_limit(self) -> int:
        return min(self._limit, self._read_limit, self._read_fits)

    def has_read(self, records: int, began_at: float, ended_at: float, size: int | None = None) -> None:
        """Adjust to how long a read took, and to the size of its records."""
        if size is not None:
            self._read_fits = _fitting(records, size)
        elif records:
            self._read_fits = min(BATCH_RECORDS_MAX, self._read_fits * 2)  # the next read gives two, which are measured
        elapsed_s = ended_at - began_at
        if elapsed_s > READ_S:
            self._read_limit = max(1, int(records * READ_S / elapsed_s))
            self._careful_until = ended_at + min(elapsed_s * CAREFUL_SHARE, CAREFUL_MAX_S)
        elif ended_at > self._careful_until and records >= self._read_limit:
            self._read_limit = min(BATCH_RECORDS_MAX, self._read_limit * 4)

    def has_emitted(self, records: int, size: int) -> None:
        """Adjust to the size of records: a batch of large ones has fewer of them."""
        self._fits = _fitting(records, size)
        self._limit = min(self._limit, self._fits)

    def running_s(self, elapsed_s: float) -> float:
        """Take off the thread's waits for a processor since it was asked last.

        What it waited before the call is taken off as well, so that a machine without a free processor makes no cheap
        function look costly. Whoever measures a function that took long calls this before it begins, with a time of 0.
        """
        thread, now = get_ident(), monotonic()
        before_s, asked_at = _waits.get(thread, (0.0, 0.0))
        if not elapsed_s and now - asked_at < FRESH_S:
            return 0.0
        waited_s = self._wait_s()
        _waits[thread] = waited_s, now
        # A thread that has ended may have had the same number, and have waited for longer.
        return max(0.0, elapsed_s - max(0.0, waited_s - before_s))


def _fitting(records: int, size: int) -> int:
    """Return how many records of this size a batch has at most."""
    return max(1, min(BATCH_RECORDS_MAX, records * BATCH_BYTES_MAX // max(size, 1)))
