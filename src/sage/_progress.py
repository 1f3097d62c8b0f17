"""How far a job is: the measurements, and the line that shows them while it runs."""

from __future__ import annotations

import sys
import threading
import time
from contextlib import suppress
from typing import TYPE_CHECKING, ClassVar, TextIO

from sage.report import seconds

if TYPE_CHECKING:
    from collections.abc import Callable

    from sage._runtime.job import Job

TERMINAL_PERIOD_S = 0.25
FILE_PERIOD_S = 5.0
"""Pauses between two lines: on a terminal each takes the place of the one before, in a file they add up."""

JOIN_S = 1.0
"""How long the end of a job waits for its last line; a terminal may be held by the person before it."""


class Rates:
    """Records in a second, smoothed; each asking compares a count with the one before."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._before: dict[object, tuple[float, int, float]] = {}

    def rate(self, key: object, count: int) -> float:
        """Return the rate of the counter `key`."""
        now = self._clock()
        at, before, rate = self._before.get(key, (now, 0, 0.0))
        if now > at:
            newest = (count - before) / (now - at)
            rate = newest if rate == 0.0 else 0.5 * rate + 0.5 * newest
        self._before[key] = (now, count, rate)
        return rate


def part_done(count: int, length: int | None) -> float | None:
    """Return which part of a source was read, at most 1, or None if its length is not known."""
    return None if length is None else min(1.0, count / length) if length else 1.0


def time_left(count: int, length: int | None, rate: float) -> str:
    """Return in how much time a source will have been read at this rate, or "" if nobody knows."""
    if length is None or rate <= 0 or count >= length:
        return ""
    return duration((length - count) / rate)


def duration(value_s: float) -> str:
    """Return a time that may be long, in words."""
    if value_s >= 60:
        hours, minutes = divmod(round(value_s / 60), 60)
        return f"{hours} h {minutes} min" if hours else f"{minutes} min"
    return f"{value_s:.0f} s" if value_s >= 1 else seconds(value_s)


class ProgressLine:
    """Writes one line about a job again and again, on a thread of its own.

    Args:
        output: where to write; standard error by default.

    Attributes:
        is_muted: whether something else shows the progress of all jobs of this process.
    """

    is_muted: ClassVar[bool] = False

    def __init__(self, job: Job, output: TextIO | None = None) -> None:
        self._job = job
        self._output = sys.stderr if output is None else output
        self._rates = Rates()
        self._is_over = threading.Event()
        self._width = 0
        self._thread = threading.Thread(target=self._draw, name=f"sage-progress {job.name}", daemon=True)

    def start(self) -> None:
        """Begin to draw, and end with the job."""
        if self.is_muted or self._output is None:
            return
        with suppress(RuntimeError):  # no thread can be had, and the job needs none for itself
            self._thread.start()
            self._job._when_sealed(self._end)

    def text(self) -> str:
        """Return the line as things stand."""
        operators, lengths = self._job.operators(), self._job._lengths()
        sources = [operator for operator in operators if operator.kind == "source"]
        count = sum(source.records_in for source in sources)
        known = [lengths.get(source.name) for source in sources]
        length = sum(one for one in known if one is not None) if None not in known else None
        rate = self._rates.rate("", count)
        part = part_done(count, length)
        of = "" if part is None else f" of {length:,} records ({part:.0%})"
        state = "over" if self._is_over.is_set() else str(self._job.state)
        parts = [f"{self._job.name}: {state}, {count:,}{of or ' records'}", f"{rate:,.0f}/s"]
        left = time_left(count, length, rate)
        parts += [f"{left} left"] if left else []
        fills = self._job._fills()
        parts += [f"fullest queue {max(fills.values()):.0%}"] if fills else []
        failed = sum(operator.failed for operator in operators)
        parts += [f"{failed:,} failed"] if failed else []
        return ", ".join(parts)

    def _draw(self) -> None:
        with suppress(OSError, ValueError):  # nobody reads it any more
            is_terminal = self._output.isatty()
            period_s = TERMINAL_PERIOD_S if is_terminal else FILE_PERIOD_S
            while not self._is_over.wait(period_s):
                self._write(self.text(), is_terminal)
            self._write(self.text(), is_terminal)
            if is_terminal:
                self._output.write("\n")
                self._output.flush()

    def _write(self, line: str, is_terminal: bool) -> None:
        self._output.write(f"\r{line.ljust(self._width)}" if is_terminal else f"{line}\n")
        self._output.flush()
        self._width = len(line)

    def _end(self, _: object) -> None:
        self._is_over.set()
        self._thread.join(JOIN_S)
