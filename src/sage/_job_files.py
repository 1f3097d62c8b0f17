"""The files of a job: its log, its report, and the records that failed and are kept for `sage replay`."""

from __future__ import annotations

from typing import TYPE_CHECKING

from sage.errors import describe, short
from sage.observability import ReportFile, SessionLogs

if TYPE_CHECKING:
    import os

    from sage._cassette import Cassette
    from sage._runtime.job import Job
    from sage.failure import FailedRecord


def open_files(
    job: Job, log_dir: str | os.PathLike[str] | None, report_file: str | os.PathLike[str] | None, *, must_open: bool
) -> ReportFile | None:
    """Open the files of a job, which are closed when it is sealed, and return the one with its report."""
    session = SessionLogs.open(log_dir) if log_dir else None
    if report_file:
        job._report_file = ReportFile.open(report_file, job.id, job.name, must_open=must_open)
        job.dispatcher.supervisor.listeners.append(job._report_file.note)
    if session is not None:
        handler = session.open_job(job.name, job.id)
        job._when_sealed(lambda _: session.close_job(handler))
    return job._report_file


def keep_failed(job: Job, cassette: Cassette, report: ReportFile) -> None:
    """Keep records that fail beside the recorded calls, if calls are recorded."""
    tape = cassette.tape()
    if tape is None:
        return
    job._when_sealed(lambda _: tape.close())

    def keep(failed: FailedRecord) -> None:
        number = tape.keep(job.id, failed)
        if number is not None:
            record, error = tape.hide(short(failed.value)), tape.hide(describe(failed.error))
            report.fail(failed.operator, record, error, cassette.path, number)

    for task in job.dispatcher.supervisor.tasks.values():
        for operator in task.operators:
            operator.keep_failed = keep
