"""`sage report --missing`: the records of a job that did not arrive, and why."""

from __future__ import annotations

from typing import TYPE_CHECKING

from sage.report import printable, table

if TYPE_CHECKING:
    from collections.abc import Iterator

    from sage.report import JobReport, OperatorReport

REASONS = {"skip": "skipped after an error", "letters": "dead letter", "fail": "failed"}
"""The reason for records that failed and did not fail the job, by the policy of their operator."""

ONE_TO_ONE = frozenset({"map", "map_async", "filter"})
"""The kinds of operators that give at most one record for each: all others were dropped by their functions."""

UNREAD = "could not be read"
NEXT_RUN = "waits for the next run"
IN_FLIGHT = "undelivered: in flight at the end"


def missing_text(report: JobReport) -> str:
    """Return a table of the records that did not arrive, and those that failed by name, as far as they were kept."""
    rows = [(name, reason, count) for name, reason, count in _reasons(report) if count > 0]
    total = sum(count for _, _, count in rows)
    if not total:
        return f'job "{report.name}": every record arrived'
    lines = [f'job "{report.name}": {total:,} {"record" if total == 1 else "records"} did not arrive']
    lines += table(("operator", "reason", "records"), [(name, reason, f"{count:,}") for name, reason, count in rows])
    lines += [line for one in report.operators for line in _named(one)]
    if report.is_accounted is False:
        lines.append("records are not accounted for; this is a bug of SAGE, please report it")
    return "\n".join(map(printable, lines))


def _reasons(report: JobReport) -> Iterator[tuple[str, str, int]]:
    """Yield operators, reasons and how many records; a reason may have none."""
    for one in report.operators:
        yield one.name, "failed the job", one.fatal
        yield one.name, UNREAD if one.kind == "source" else REASONS[one.on_error], one.failed - one.fatal
        yield one.name, f"failed in earlier runs{' or before a restart' if report.restarts else ''}", one.earlier_failed
        if one.kind in ONE_TO_ONE:
            yield one.name, "dropped by its function", one.records_in - one.records_out - (one.failed - one.fatal)
        yield one.name, _in_flight(report), one.missing or 0
    if all(one.missing is None for one in report.operators):
        yield "", IN_FLIGHT, report.undelivered
        yield "", NEXT_RUN, report.waiting


def _in_flight(report: JobReport) -> str:
    """Return the reason for records that were sent to an operator and not taken by it."""
    if report.is_accounted is False:
        return "not accounted for"
    return NEXT_RUN if not report.undelivered else IN_FLIGHT if not report.waiting else f"{IN_FLIGHT}, or {NEXT_RUN}"


def _named(one: OperatorReport) -> Iterator[str]:
    for lost in one.lost:
        yield f"{one.name}: {lost.record}: {lost.error}"
    more = one.failed - len(one.lost)
    if more > 0 and one.lost:
        yield f"{one.name}: and {more:,} more that failed"
