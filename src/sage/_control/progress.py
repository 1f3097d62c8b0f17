"""How far the running jobs are, as a table that is drawn again and again on a terminal."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

from rich.table import Table

from sage._progress import Rates, part_done, time_left

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from sage._runtime.job import Job

BAR_CELLS = 8


class Progress:
    """Counts, rates and queues of the jobs that run; each drawing compares with the one before."""

    def __init__(self, jobs: Callable[[], Sequence[Job]], clock: Callable[[], float] = time.monotonic) -> None:
        self._jobs = jobs
        self._rates = Rates(clock)

    def table(self) -> Table:
        """Return the text to draw now."""
        table = Table.grid(padding=(0, 2))
        table.add_column(max_width=40, no_wrap=True)
        for _ in range(3):
            table.add_column(justify="right", no_wrap=True)
        table.add_column(no_wrap=True)
        for _ in range(2):
            table.add_column(justify="right", no_wrap=True)
        for job in self._jobs():
            if not job.is_running:
                continue
            table.add_row(
                f"[bold]{_plain(job.name)}[/bold] {job.state}", "records", "rate", "failed", "queue", "read", "left"
            )
            fills, lengths = job._fills(), job._lengths()
            for operator in job.operators():
                rate = self._rates.rate((job.id, operator.name), operator.records_in)
                fill = fills.get(operator.name)
                length = lengths.get(operator.name)
                part = part_done(operator.records_in, length)
                table.add_row(
                    f"  {_plain(operator.name)}",
                    f"{operator.records_in:,}",
                    f"{rate:,.0f}/s",
                    f"{operator.failed:,}",
                    "" if fill is None else _bar(fill),
                    "" if part is None else f"{part:.0%}",
                    time_left(operator.records_in, length, rate),
                )
        return table


def _bar(fill: float) -> str:
    fill = min(fill, 1.0)  # an operator may give more records than there is room for, and they all wait
    full = round(fill * BAR_CELLS)
    return "█" * full + "░" * (BAR_CELLS - full) + f" {min(fill, 1.0):4.0%}"


def _plain(text: str) -> str:
    return text.replace("[", "\\[")
