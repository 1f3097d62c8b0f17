"""How far the running jobs are, as a table that is drawn again and again on a terminal."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

from rich.table import Table

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from sage._runtime.job import Job

BAR_CELLS = 8


class Progress:
    """Counts, rates and queues of the jobs that run; each drawing compares with the one before."""

    def __init__(self, jobs: Callable[[], Sequence[Job]], clock: Callable[[], float] = time.monotonic) -> None:
        self._jobs = jobs
        self._clock = clock
        self._before: dict[tuple[str, str], tuple[float, int, float]] = {}

    def table(self) -> Table:
        """Return what to draw now."""
        table = Table.grid(padding=(0, 2))
        table.add_column(max_width=40, no_wrap=True)
        for _ in range(3):
            table.add_column(justify="right", no_wrap=True)
        table.add_column(no_wrap=True)
        for job in self._jobs():
            if not job.is_running:
                continue
            table.add_row(f"[bold]{_plain(job.name)}[/bold] {job.state}", "records", "rate", "failed", "queue")
            fills = _fills(job)
            for operator in job.operators():
                rate = self._rate((job.id, operator.name), operator.records_in)
                fill = fills.get(operator.name)
                table.add_row(
                    f"  {_plain(operator.name)}",
                    f"{operator.records_in:,}",
                    f"{rate:,.0f}/s",
                    f"{operator.failed:,}",
                    "" if fill is None else _bar(fill),
                )
        return table

    def _rate(self, key: tuple[str, str], count: int) -> float:
        now = self._clock()
        at, before, rate = self._before.get(key, (now, 0, 0.0))
        if now > at:
            newest = (count - before) / (now - at)
            rate = newest if rate == 0.0 else 0.5 * rate + 0.5 * newest
        self._before[key] = (now, count, rate)
        return rate


def _fills(job: Job) -> dict[str, float]:
    """Return how full the fullest queue in front of each operator is, for those that have one."""
    fills: dict[str, float] = {}
    for task in job.dispatcher.supervisor.tasks.values():
        if task.inbox is not None and task.operators:
            name = task.operators[0].node.name
            fills[name] = max(fills.get(name, 0.0), task.inbox.fill)
    return fills


def _bar(fill: float) -> str:
    full = round(min(fill, 1.0) * BAR_CELLS)
    return "█" * full + "░" * (BAR_CELLS - full) + f" {fill:4.0%}"


def _plain(text: str) -> str:
    return text.replace("[", "\\[")
