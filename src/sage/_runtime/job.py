"""A job: one run of a graph, from submit to the sealed report."""

from __future__ import annotations

import os
import signal
import threading
import time
from typing import TYPE_CHECKING, Any

from sage._logs import flush, log_of
from sage._plan.logical import LogicalGraph
from sage._runtime.inside import is_inside
from sage._runtime.interrupts import Interrupts
from sage._runtime.lifecycle import StopRequested
from sage._runtime.outcome import operator_reports, seal, to_raise
from sage._runtime.states import JobState, Way
from sage.errors import InternalError, JobError, describe, hint

if TYPE_CHECKING:
    from collections.abc import Callable

    from sage._runtime.dispatcher import Dispatcher
    from sage._runtime.supervisor import Ended
    from sage.observability import Event, ReportFile
    from sage.report import JobReport, OperatorReport, Outcome

IMPATIENT_HOOK_S = 5.0
"""Bound of each hook after a second Ctrl-C, in seconds."""


class Job:
    """One run of a pipeline. `str(job)` is its id.

    Attributes:
        id: the job's id.
        name: the environment's name.
        plan: the physical plan, whose `text()` and `mermaid()` show it.
        report: what happened; None until everything has ended.
        report_file: where its events and its report are written, or None.
    """

    def __init__(self, id_: str, graph: LogicalGraph, interrupt_timeout_s: float) -> None:
        self.id = id_
        self.name = graph.name
        self.report: JobReport | None = None
        self.report_file: ReportFile | None = None
        self.dispatcher: Dispatcher
        self._graph = graph
        self._pid = os.getpid()
        self._interrupt_timeout_s = interrupt_timeout_s
        self._started = (time.time(), time.monotonic())
        self._reason = ""
        self._signals: list[int] = []
        self._error: Exception | None = None
        self._is_told = False
        # One logger for all jobs, as loggers are never freed; the file of a job takes in what bears its id.
        self._log = log_of("sage.job", {"job": id_})
        self._when_sealed: list[Callable[[Ended], None]] = []

    def __str__(self) -> str:
        return self.id

    def __repr__(self) -> str:
        return f'<Job "{self.name}" {self.id} {self.state}>'

    @property
    def plan(self) -> Any:
        """The physical plan."""
        return self.dispatcher.plan

    @property
    def state(self) -> JobState | Outcome:
        """Where the job is, and how it ended once its report is sealed."""
        return self.report.state if self.report is not None else self.dispatcher.supervisor.state.job

    @property
    def is_running(self) -> bool:
        """Whether anything of it has not ended; a process that was forked from its own has no part in it."""
        return self.report is None and self._pid == os.getpid()

    def begin(self, dispatcher: Dispatcher) -> None:
        """Start the job on a dispatcher."""
        self.dispatcher = dispatcher
        dispatcher.supervisor.begin()

    def run(self, dispatcher: Dispatcher) -> None:
        """Start the job and wait for it as `wait` does; no signal falls between the two."""
        self.dispatcher = dispatcher
        self._wait(None, dispatcher.supervisor.begin)

    def events(self) -> tuple[Event, ...]:
        """Return every change of state so far."""
        return tuple(self.dispatcher.supervisor.events)

    def operators(self) -> tuple[OperatorReport, ...]:
        """Return the counts of every operator as they stand."""
        if self.report is not None:
            return self.report.operators
        return operator_reports(self.dispatcher, self._graph)

    def wait(self, timeout_s: float | None = None) -> JobReport:
        """Wait until the job is over and everything it started is cleaned up, and return the report.

        On the main thread, SIGINT and SIGTERM stop the job while this waits: the first drains, a second Ctrl-C cancels,
        a third gives up on what hangs.

        Args:
            timeout_s: how long to wait, in seconds; the job goes on after that.

        Raises:
            TimeoutError: the job is not over after `timeout_s`.
            JobError: what failed; several errors come as one `JobErrorGroup`. Also where a function or a service of
                the job itself waits for it.
            KeyboardInterrupt: Ctrl-C stopped the job.
            SystemExit: SIGTERM stopped the job; the code is 143.
        """
        return self._wait(timeout_s, lambda: None)

    def _wait(self, timeout_s: float | None, begin: Callable[[], None]) -> JobReport:
        supervisor = self.dispatcher.supervisor
        if self._pid != os.getpid():
            error = JobError(f'job "{self.name}" runs in process {self._pid}, from which this one was forked')
            raise hint(error, "Only the process that submitted a job can wait for it.")
        if is_inside(supervisor):
            error = JobError(f'job "{self.name}" is waited for by one of its own threads', job=self.name)
            raise hint(error, "It cannot end before that thread does; job.stop() returns at once there.")
        if timeout_s is not None:
            timeout_s = min(max(0.0, float(timeout_s)), threading.TIMEOUT_MAX)
        interrupted: BaseException | None = None
        with Interrupts(self.interrupt) as interrupts:
            begin()
            while True:
                try:
                    is_over = supervisor.backend.wait(supervisor, timeout_s)
                    break
                except InternalError:
                    raise  # the backend cannot go on; to wait again would be to wait for ever
                except BaseException as error:  # raised by a handler of the program's own; the job has to end first
                    self.request(Way.CANCEL if interrupted else Way.DRAIN, describe(error), self._interrupt_timeout_s)
                    interrupted = error
                    timeout_s = None
        if interrupted is not None:
            raise interrupted
        if is_over and self.report is None:
            raise InternalError(f'job "{self.name}" ended without a report')
        if not is_over or self.report is None:
            raise TimeoutError(f'job "{self.name}" is not over after {timeout_s} s')
        self._is_told = True
        interrupts.raise_for_signal()
        if self._error is not None:
            raise self._error
        return self.report

    def stop(self, drain: bool = True, *, timeout_s: float | None = None) -> None:
        """End the job: sources are told to stop, and what is in flight drains, or is dropped without `drain`.

        It returns after everything was cleaned up, unless a thread of the job itself calls it. A second call does
        nothing.

        Args:
            drain: whether what is in flight is processed.
            timeout_s: how long to wait for the end, in seconds; the job goes on ending after that.

        Raises:
            TimeoutError: the job is not over after `timeout_s`.
            JobError: what failed, if nobody was told yet.
        """
        self.request(Way.DRAIN if drain else Way.CANCEL, "stop() was called" if drain else "cancel() was called")
        self.finish_up(timeout_s)

    def cancel(self) -> None:
        """End the job and drop what is in flight; see `stop`."""
        self.stop(drain=False)

    def finish_up(self, timeout_s: float | None = None) -> None:
        """Wait for the end, and raise what failed if nobody was told yet."""
        if is_inside(self.dispatcher.supervisor) or self._pid != os.getpid():
            return
        if not self._is_told:
            self.wait(timeout_s)

    def request(self, way: Way, reason: str, budget_s: float | None = None, hook_cap_s: float | None = None) -> None:
        """Ask for the end without waiting for it; any thread may."""
        if self.is_running:
            self._reason = self._reason or reason
            self.dispatcher.supervisor.post(StopRequested(way, budget_s, hook_cap_s))

    def interrupt(self, signum: int) -> None:
        """Act on a signal; called by the thread that watches for them."""
        self._signals.append(signum)
        name = signal.Signals(signum).name
        count = self._signals.count(signal.SIGINT)
        if len(self._signals) == 1:
            self.request(Way.DRAIN, name, self._interrupt_timeout_s)
        elif signum == signal.SIGINT and count == 2:
            self.request(Way.CANCEL, name, self._interrupt_timeout_s, IMPATIENT_HOOK_S)
        elif signum == signal.SIGINT and count > 2:
            self.request(Way.KILL, name)

    def when_sealed(self, action: Callable[[Ended], None]) -> None:
        """Have `action` called when everything has ended, before anyone who waits is told."""
        self._when_sealed.append(action)

    def seal(self, ended: Ended) -> None:
        """Make the report; called by the supervisor, once, as its last act."""
        report = seal(ended, self.dispatcher, self._graph, self.id, self._started, self._reason)
        self._take(report, to_raise(report, ended.state.failures), ended)

    def _take(self, report: JobReport, error: Exception | None, ended: Ended) -> None:
        """Have a report, and what whoever waits gets; nothing of the job runs any more."""
        self._error = error
        for one in report.errors:
            self._log.error("%s", describe(one), exc_info=one)
        self._log.info("sealed state=%s cleanliness=%s why=%r", report.state, report.cleanliness, report.why)
        if self.report_file is not None:
            self.report_file.end(report)  # before the guardian is told that all is over, which else writes one
        flush()
        for action in self._when_sealed:
            action(ended)
        self._when_sealed.clear()
        self.report = report
        self.dispatcher.forget()
        self._graph = LogicalGraph(self.name, {})
