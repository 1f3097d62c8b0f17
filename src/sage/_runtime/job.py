"""A job: one run of a graph, from submit to the sealed report."""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from collections.abc import Sized
from contextlib import suppress
from typing import TYPE_CHECKING

from sage._current_job import carried, here
from sage._logs import flush, log_of
from sage._plan.logical import Kind, LogicalGraph
from sage._runtime.interrupts import Interrupts
from sage._runtime.lifecycle import FailureKind, StopRequested
from sage._runtime.outcome import accounted, operator_reports, seal, so_far, to_raise
from sage._runtime.states import JobState, StopMode
from sage._standard_streams import CUT_OFF_CODE, has_unread_output, is_of_output, let_go
from sage.errors import InternalError, JobError, describe, hint
from sage.report import Cleanliness

if TYPE_CHECKING:
    from collections.abc import Callable, Generator

    from sage._plan.physical import PhysicalPlan
    from sage._runtime.dispatcher import Dispatcher
    from sage._runtime.durable_run import DurableRun
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
        dispatcher: shows `tasks`, `services` and `is_running`, live.
    """

    def __init__(self, id_: str, graph: LogicalGraph, interrupt_timeout_s: float) -> None:
        self.id = id_
        self.name = graph.name
        self.dispatcher: Dispatcher
        self._report: JobReport | None = None
        self._report_file: ReportFile | None = None
        self._graph = graph
        self._pid = os.getpid()
        self._interrupt_timeout_s = interrupt_timeout_s
        self._started = (time.time(), time.monotonic())
        self._reason = ""
        self._signals: list[int] = []
        self._error: Exception | None = None
        self._is_told = False
        # One logger for all jobs, as loggers are never freed; the file of a job takes the records with its id.
        self._log = log_of("sage.job", {"job": id_})
        self._to_begin: list[Callable[[], None]] = []
        self._to_tell: list[Callable[[Ended], None]] = []
        self._durable: DurableRun | None = None

    def __str__(self) -> str:
        return self.id

    def __repr__(self) -> str:
        return f'<Job "{self.name}" {self.id} {self.state}>'

    @property
    def plan(self) -> PhysicalPlan | None:
        """The physical plan."""
        return self.dispatcher.plan

    @property
    def state(self) -> JobState | Outcome:
        """Where the job is, and how it ended once its report is sealed."""
        return self._report.state if self._report is not None else self.dispatcher.supervisor.state.job

    @property
    def report(self) -> JobReport:
        """The job's report. While the job runs, its state is "running" and the counts are those of this moment."""
        if self._report is None:
            seen = self.dispatcher.supervisor
            live = so_far(self.id, self.name, self._started, seen.state, self.operators(), seen.hosts)
        # It may have been sealed meanwhile, after which the parts of the job are gone.
        return live if self._report is None else self._report

    @property
    def is_running(self) -> bool:
        """Whether anything of it has not ended; a process that was forked from its own has no part in it."""
        return self._report is None and self._pid == os.getpid()

    @property
    def _is_bounded(self) -> bool:
        """Whether all of its sources end by themselves."""
        sources = [node for node in self._graph.nodes.values() if node.kind is Kind.SOURCE]
        return bool(sources) and all(node.settings.get("bounded", False) for node in sources)

    def _begin(self) -> None:
        """Start the job.

        Raises:
            JobError: the system lacks the resources.
        """
        self._begin_here()
        if any(failure.trouble is FailureKind.BEGIN for failure in self.dispatcher.supervisor.state.failures):
            self._finish_up()

    def _begin_here(self) -> None:
        for action in self._to_begin:
            action()
        self._to_begin.clear()
        self.dispatcher.supervisor.begin()

    def _run(self) -> None:
        """Start the job and wait for it as `wait` does; no signal falls between the two."""
        self._wait(None, self._begin_here)

    def _lengths(self) -> dict[str, int]:
        """Return how many records each source has, for those that know."""
        nodes = (node for node in self._graph.nodes.values() if node.kind is Kind.SOURCE and node.function is not None)
        targets = {node.name: node.function.target for node in nodes if node.function and not node.function.is_class}
        return {name: len(target) for name, target in targets.items() if isinstance(target, Sized)}

    def _fills(self) -> dict[str, float]:
        """Return how full the fullest queue in front of each operator is, from 0 to 1, for those that have one."""
        fills: dict[str, float] = {}
        for task in self.dispatcher.supervisor.tasks.values():
            if task.inbox is not None and task.operators:
                name = task.operators[0].node.name
                fills[name] = min(1.0, max(fills.get(name, 0.0), task.inbox.fill))
        return fills

    @property
    def _runs_while_waited_for(self) -> bool:
        """Whether it goes on only while somebody waits for its end."""
        return self.dispatcher.supervisor.backend.runs_while_waited_for

    def _run_to_end(self) -> None:
        """Wait for the end, and raise nothing; `wait` does that afterwards."""
        self.dispatcher.supervisor.backend.wait(self.dispatcher.supervisor, None)

    def events(self) -> tuple[Event, ...]:
        """Return every change of state so far."""
        return tuple(self.dispatcher.supervisor.events)

    def operators(self) -> tuple[OperatorReport, ...]:
        """Return the counts of every operator as they stand."""
        if self._report is not None:
            return self._report.operators
        return operator_reports(self.dispatcher, self._graph)

    def wait(self, timeout_s: float | None = None) -> JobReport:
        """Wait until the job is over and everything it started is cleaned up, and return the report.

        On the main thread, SIGINT and SIGTERM stop the job while this waits: the first as `stop` does, a second Ctrl-C
        cancels, a third gives up on everything that hangs.

        Args:
            timeout_s: how long to wait, in seconds; the job goes on after that.

        Raises:
            TimeoutError: the job is not over after `timeout_s`.
            JobError: the job failed; several errors come as one `JobErrorGroup`. Also where a function or a service of
                the job itself waits for it.
            KeyboardInterrupt: Ctrl-C stopped the job.
            SystemExit: SIGTERM stopped the job; the code is 143. Or nobody reads standard output any more, as behind
                `| head`, so that a function could not print; the code is 141. On the main thread only.
        """
        return self._wait(timeout_s, lambda: None)

    def __await__(self) -> Generator[object, None, JobReport]:
        """Wait as `wait` does on an event loop of the program; where the waiting is cancelled, the job goes on."""
        return self._awaited().__await__()

    async def _awaited(self) -> JobReport:
        import asyncio

        loop = asyncio.get_running_loop()
        future: asyncio.Future[JobReport] = loop.create_future()

        def tell(report: JobReport | None, error: BaseException | None) -> None:
            if future.done():
                return
            if error is not None:
                future.set_exception(error)
            elif report is not None:
                future.set_result(report)

        def work() -> None:
            report: JobReport | None = None
            failed: BaseException | None = None
            try:
                report = self.wait()
            except BaseException as error:  # whoever awaits the job owns it
                failed = error
            with suppress(RuntimeError):  # the program has closed its loop
                loop.call_soon_threadsafe(tell, report, failed)

        threading.Thread(target=carried(work), name="sage-await", daemon=True).start()
        return await future

    def _wait(self, timeout_s: float | None, begin: Callable[[], None]) -> JobReport:
        supervisor = self.dispatcher.supervisor
        if self._pid != os.getpid():
            error = JobError(f'job "{self.name}" runs in process {self._pid}, from which this one was forked')
            raise hint(error, "Only the process that submitted a job can wait for it.")
        if here.job is supervisor:
            error = JobError(f'job "{self.name}" is waited for by one of its own threads', job=self.name)
            raise hint(error, "It cannot end before that thread does; job.stop() returns at once there.")
        if timeout_s is not None:
            timeout_s = min(max(0.0, float(timeout_s)), threading.TIMEOUT_MAX)
        interrupted: BaseException | None = None
        with Interrupts(self._interrupt) as interrupts:
            begin()
            while True:
                try:
                    is_over = supervisor.backend.wait(supervisor, timeout_s)
                    break
                except InternalError:
                    raise  # the backend cannot go on; to wait again would be to wait for ever
                except BaseException as error:  # raised by a handler of the program's own; the job has to end first
                    self._request(
                        StopMode.CANCEL if interrupted else StopMode.STOP, describe(error), self._interrupt_timeout_s
                    )
                    interrupted = error
                    timeout_s = None
        if interrupted is not None:
            raise interrupted
        if is_over and self._report is None:
            raise InternalError(f'job "{self.name}" ended without a report')
        if not is_over or self._report is None:
            raise TimeoutError(f'job "{self.name}" is not over after {timeout_s} s')
        self._is_told = True
        interrupts.raise_for_signal()
        if interrupts.is_entered and self._is_cut_off():
            let_go()
            raise SystemExit(CUT_OFF_CODE)
        if self._error is not None:
            raise self._error
        return self._report

    def _is_cut_off(self) -> bool:
        """Return whether nothing is to be told of the end but that nobody reads standard output any more."""
        if self._report is None or self._report.cleanliness is Cleanliness.DIRTY:
            return False
        errors = self._report.errors
        return all(map(is_of_output, errors)) if errors else has_unread_output()

    def stop(self, drain: bool | None = None, *, timeout_s: float | None = None) -> None:
        """End the job: its sources stop, and the records in flight are processed as far as that costs little.

        No further call of a costly function begins: one of `map_async`, or one whose calls take longer than 10 ms.
        Calls that run end, and their results go on to the sinks. The records that waited for a costly function are
        counted in the report as `undelivered`. All other records in flight are processed.

        It returns after everything was cleaned up, unless a thread of the job itself calls it. A second call does
        nothing.

        Args:
            drain: True processes all records in flight, at any cost, and False drops them.
            timeout_s: how long to wait for the end, in seconds; the job goes on ending after that.

        Raises:
            TimeoutError: the job is not over after `timeout_s`.
            JobError: the job failed, and the error was not raised yet.
        """
        way = StopMode.of(drain)
        self._request(way, "cancel() was called" if way is StopMode.CANCEL else "stop() was called")
        self._finish_up(timeout_s)

    def cancel(self) -> None:
        """End the job and drop the records in flight; see `stop`."""
        self.stop(drain=False)

    def _finish_up(self, timeout_s: float | None = None) -> None:
        """Wait for the end, and raise the error if it was not raised yet."""
        if here.job is self.dispatcher.supervisor or self._pid != os.getpid():
            return
        if not self._is_told:
            self.wait(timeout_s)

    def _request(
        self, way: StopMode, reason: str, budget_s: float | None = None, hook_cap_s: float | None = None
    ) -> None:
        """Ask for the end without waiting for it; any thread may."""
        if self.is_running:
            self._reason = self._reason or reason
            self.dispatcher.supervisor.post(StopRequested(way, budget_s, hook_cap_s))

    def _interrupt(self, signum: int) -> None:
        """Act on a signal; called by the thread that watches for them."""
        self._signals.append(signum)
        name = signal.Signals(signum).name
        # A person who presses Ctrl-C while a job ends because of another signal wants it to end sooner.
        is_second = self._signals[1:].count(signal.SIGINT) == 1
        if len(self._signals) == 1:
            _show_stopping(self._calls_running(), is_ctrl_c=signum == signal.SIGINT)
            self._request(StopMode.STOP, name, self._interrupt_timeout_s)
        elif signum == signal.SIGINT and is_second:
            self._request(StopMode.CANCEL, name, self._interrupt_timeout_s, IMPATIENT_HOOK_S)
        elif signum == signal.SIGINT:
            self._request(StopMode.KILL, name)

    def _calls_running(self) -> int:
        """Return how many calls of costly functions run, as far as this process knows."""
        return sum(task.calls_running for task in self.dispatcher.supervisor.tasks.values())

    def _when_begun(self, action: Callable[[], None]) -> None:
        """Have `action` called right before the job begins; nothing keeps it from its end any more."""
        self._to_begin.append(action)

    def _when_sealed(self, action: Callable[[Ended], None]) -> None:
        """Have `action` called when everything has ended, before anyone who waits is told."""
        self._to_tell.append(action)

    def _seal(self, ended: Ended) -> None:
        """Make the report; called by the supervisor, once, as its last act."""
        notes = () if self._durable is None else self._durable.notes(self.dispatcher.supervisor.tasks.values())
        report = seal(ended, self.dispatcher, self._graph, self.id, self._started, self._reason, notes)
        report = accounted(report, self.dispatcher, self._graph, self._durable)
        self._take(report, to_raise(report, ended.state.failures), ended)

    def _take(self, report: JobReport, error: Exception | None, ended: Ended) -> None:
        """Store the report and the error that waiters get; call it once the job has fully stopped."""
        self._error = error
        for one in report.errors:
            self._log.error("%s", describe(one), exc_info=one)
        self._log.info("sealed state=%s cleanliness=%s why=%r", report.state, report.cleanliness, report.why)
        if self._report_file is not None:
            self._report_file.end(report)  # before the guardian is told that all is over, which else writes one
        flush()
        for action in self._to_tell:
            action(ended)
        self._to_tell.clear()
        self._report = report
        self._durable = None
        self.dispatcher.forget()
        self._graph = LogicalGraph(self.name, {})


def _show_stopping(calls: int, *, is_ctrl_c: bool) -> None:
    """Show on a terminal which calls a stop waits for."""
    if sys.stderr is None or not sys.stderr.isatty():
        return
    running = f": {calls} call{'s run' if calls != 1 else ' runs'}" if calls else ""
    again = f"; Ctrl-C{' again' if is_ctrl_c else ''} to cancel{'' if not calls else ' them' if calls > 1 else ' it'}"
    with suppress(OSError, ValueError):  # the terminal may be gone
        sys.stderr.write(f"\rstopping{running}{again}\n")  # over the ^C that the terminal shows
        sys.stderr.flush()
