"""Environments: what a user builds a job in."""

from __future__ import annotations

import os
import signal
import uuid
import warnings
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any, ClassVar

from sage._arguments import STOP_TIMEOUT_VARIABLE, check_name, check_seconds, seconds_in
from sage._kept import Kept
from sage._plan.logical import GraphBuilder, Kind, LogicalGraph, ServiceSpec
from sage._plan.signature import check_service_arguments, source_spec
from sage._runtime.manager import JobManager
from sage.errors import DuplicateNameError, GraphError, hint, short
from sage.functions import BaseFunction
from sage.service import DEFAULT_OPTIONS, ServiceHandle, ServiceOptions
from sage.serving import PipelineBridge, PipelineService, RequestSource, bridge_among
from sage.stream import DataStream, error_policy

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence
    from typing import Never

    from sage._hosts.job_guard import JobGuard
    from sage._plan.physical import PhysicalPlan
    from sage._runtime.backend import Backend
    from sage._runtime.job import Job
    from sage._runtime.supervisor import Ended
    from sage.command import Ready, RunningCommand, Word

CONSOLE_LEVELS = ("DEBUG", "INFO", "WARNING", "ERROR")


class Environment:
    """Holds a graph and services, and runs them as jobs, one at a time.

    Attributes:
        name: the environment's name.
        env_uuid: the id of its latest job, or of the next one before the first submit.
    """

    # A program that wants the plans of other programs, as `sage explain` does, sets this for the whole process.
    _instead_of_running: ClassVar[Callable[[Environment, LogicalGraph, PhysicalPlan], Job] | None] = None

    def __init__(self, name: str, config: dict[str, Any] | None = None) -> None:
        check_name("an environment", name)
        self.name = name
        self.config = dict(config or {})
        self.env_uuid = str(uuid.uuid4())
        self._limits: dict[str, float] = {}
        self.log_dir: str | os.PathLike[str] | None = os.environ.get("SAGE_LOG_DIR")
        self.report_file: str | os.PathLike[str] | None = os.environ.get("SAGE_REPORT_FILE")
        self._builder = GraphBuilder()
        self._services: dict[str, ServiceSpec] = {}
        self._job: Job | None = None
        self._kept = self._new_kept()
        self._guard: JobGuard | None = None
        JobManager().expect(self.env_uuid, self)

    # --- sources ---

    def from_batch(
        self,
        source: Any,
        *args: Any,
        parallelism: int | None = None,
        name: str | None = None,
        on_error: Any = None,
        **kwargs: Any,
    ) -> DataStream:
        """Begin a bounded stream.

        Args:
            source: a `BatchFunction` class (called until `execute()` returns None or a `StopSignal`), a list, a tuple,
                any iterable or generator, a generator function, or a `Source`. The elements of an iterable are data,
                None included.
            *args: arguments of the class or function.
            parallelism: how many tasks read; lists, tuples and ranges are split, a class is built for each.
            name: the operator's name.
            on_error: "fail" or a `Retry`.
            **kwargs: keyword arguments of the class or function.
        """
        return self._source(source, args, kwargs, parallelism, name, on_error, bounded=True)

    from_collection = from_batch

    def from_source(
        self,
        function: Any,
        *args: Any,
        delay: float | None = None,
        lockstep: bool = False,
        parallelism: int | None = None,
        name: str | None = None,
        on_error: Any = None,
        **kwargs: Any,
    ) -> DataStream:
        """Begin an unbounded stream.

        Args:
            function: a `SourceFunction` class, a callable without arguments or a `Source`. It returns a record, None
                for nothing now, or a `StopSignal` at the end. A generator function yields them.
            *args: arguments of the class or function.
            delay: pause between two records, in seconds; without it nothing sleeps.
            lockstep: whether one record at a time goes through the whole job.
            parallelism: how many tasks read.
            name: the operator's name.
            on_error: "fail" or a `Retry`.
            **kwargs: keyword arguments of the class or function.
        """
        return self._source(
            function, args, kwargs, parallelism, name, on_error, bounded=False, delay_s=delay, lockstep=lockstep
        )

    def from_future(self, name: str) -> DataStream:
        """Return a stream that is filled later by `stream.fill_future(...)`: the way to build a loop."""
        return DataStream(self._builder, self._builder.add(Kind.FUTURE, name=name))

    def dead_letters(self, name: str = "dead letters") -> DataStream:
        """Return a stream of the records that fail in operators with `on_error=` this stream, as `DeadLetter`s."""
        return DataStream(self._builder, self._builder.add(Kind.LETTERS, name=name))

    def _source(
        self,
        source: Any,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        parallelism: int | None,
        name: str | None,
        on_error: Any,
        **settings: Any,
    ) -> DataStream:
        if settings.get("delay_s") is not None:
            check_seconds("from_source: delay is", settings["delay_s"])
        spec = source_spec(source, args, kwargs, bounded=settings["bounded"])
        policy = error_policy(self._builder, on_error)
        if policy.then != "fail":
            error = GraphError(f"source {short(source)}: on_error cannot skip, as there is no record yet")
            raise hint(error, "A source takes on_error=Retry(...), which tries again a limited number of times.")
        bridge = bridge_among(source, args, kwargs)
        if bridge is not None:
            settings["bridge"] = bridge
        if getattr(source, "use_metronome", False):
            settings["lockstep"] = True
        id_ = self._builder.add(
            Kind.SOURCE,
            name=name,
            function=spec,
            parallelism=1 if parallelism is None else parallelism,
            on_error=policy,
            settings=settings,
        )
        return DataStream(self._builder, id_)

    # --- services ---

    def register_service(
        self, name: str, cls: Callable[..., Any], *args: Any, options: ServiceOptions | None = None, **kwargs: Any
    ) -> ServiceHandle[Any]:
        """Register a service and return its handle.

        Args:
            name: what functions call it by.
            cls: any class, or any callable that returns an object; built once for each job.
            *args: its arguments.
            options: how it is started, called, watched and stopped.
            **kwargs: its keyword arguments.

        Raises:
            DuplicateNameError: the name is taken and `options.replace` is not set.
            GraphError: `cls` is not callable.
        """
        options = self._checked_name(name, options)
        if not callable(cls):
            error = GraphError(f'service "{name}": {short(cls)} is not callable')
            raise hint(error, "Give the class and its arguments, not an instance, or a function that builds one.")
        if isinstance(cls, type) and issubclass(cls, BaseFunction):
            raise GraphError(f'service "{name}": {cls.__name__} is a function of a stream, not a service')
        check_service_arguments(name, cls, args, kwargs)
        handle: ServiceHandle[Any] = ServiceHandle(name, cls)
        self._services[name] = ServiceSpec(name, cls, args, kwargs, options, handle)
        return handle

    def register_service_factory(
        self, service_name: str, service_factory: Callable[[], Any], *, options: ServiceOptions | None = None
    ) -> ServiceHandle[Any]:
        """Register a service that a callable without arguments builds; see `register_service`."""
        build = getattr(service_factory, "create_service", service_factory)
        return self.register_service(service_name, build, options=options)

    def serve(self, name: str, build: Callable[[DataStream], DataStream], *, timeout_s: float | None = None) -> Any:
        """Let a pipeline answer calls: `build` gets the stream of requests and returns the stream of answers.

        The handle is one like any other service's; `handle.process(request)` returns the first record that arrives at
        the end of the request's way, or None if all of them were dropped. An error in the pipeline reaches the caller
        as that error. The pipeline ends after everything that calls it.

        Args:
            name: the name of the service.
            build: adds the pipeline's operators to the stream of requests.
            timeout_s: how long a call waits for its answer, in seconds; None is without bound.

        Raises:
            GraphError: `build` is no function, or returns no stream.
        """
        if not callable(build):
            error = GraphError(f'serve("{name}"): {short(build)} is not callable')
            raise hint(error, "Give a function of the stream of requests: lambda requests: requests.map(...).")
        bridge = PipelineBridge()
        options = ServiceOptions(concurrency=None)
        handle = self.register_service(name, PipelineService, bridge, timeout_s, options=options)
        answers = build(self.from_source(RequestSource, bridge, name=f"{name} requests"))
        if not isinstance(answers, DataStream):
            error = GraphError(f'serve("{name}"): {short(build)} returned {short(answers)}, which is no stream')
            raise hint(error, "Return the stream of answers: lambda requests: requests.map(...).")
        self._builder.add(Kind.REPLY, name=f"{name} answers", inputs=(answers._id,))
        return handle

    def register_command(
        self,
        name: str,
        argv: Sequence[Word],
        *,
        ready: Ready | None = None,
        health: Ready | None = None,
        env: Mapping[str, Word] | None = None,
        cwd: str | os.PathLike[str] | None = None,
        port: int | None = None,
        url: str | None = None,
        stop_signal: int = signal.SIGTERM,
        exit_codes: Iterable[int] = (0,),
        options: ServiceOptions | None = None,
        **unknown: Never,
    ) -> ServiceHandle[RunningCommand]:
        """Register an external command as a service and return its handle.

        The handle has the attributes of a `RunningCommand`: `url`, `port`, `pid`, `output()` and others. The words,
        values of `env`, `cwd`, `url` and the address of a probe may hold placeholders: `{port}` is a free port,
        `{port:NAME}` another one, `{folder}` a private folder that is removed in the end. A word may be taken of
        another service: `db.url`. No shell reads them.

        Args:
            name: what functions call it by.
            argv: the program and its arguments. It has to stay in the foreground.
            ready: shows that it can be used: `Http(url)`, `Port()`, `Line(pattern)` or a callable that is given the
                `RunningCommand`; without one it can be used as soon as it was started.
            health: the same, asked while it runs, every `health_interval_s`.
            env: variables that are set besides those of this process.
            cwd: the folder that it runs in; that of this process by default.
            port: a fixed port for `{port}`.
            url: what the handle's `url` is; `http://127.0.0.1:{port}` by default.
            stop_signal: what asks it to end.
            exit_codes: how it may exit when it was told to stop, besides by the signal itself.
            options: how it is started, watched and stopped.
            **unknown: refused, and named.

        Raises:
            DuplicateNameError: the name is taken and `options.replace` is not set.
            GraphError: something in it can never work.
            TypeError: a keyword is unknown.
        """
        from sage.command import RunningCommand, command_of, unknown_keyword  # only programs with commands pay for it

        if unknown:
            raise unknown_keyword(name, argv, unknown, Environment.register_command)
        options = self._checked_name(name, options)
        command = command_of(name, argv, ready, health, env, cwd, port, url, stop_signal, exit_codes, options)
        handle: ServiceHandle[RunningCommand] = ServiceHandle(name, RunningCommand)
        self._services[name] = ServiceSpec(name, RunningCommand, command.handles, {}, options, handle, command)
        return handle

    # --- running ---

    @property
    def jobmanager(self) -> JobManager:
        """The job manager of this process."""
        return JobManager()

    def submit(
        self, autostop: bool = False, *, keep_services: bool | Iterable[str] = False, keep_s: float | None = None
    ) -> Job:
        """Run the pipeline and return its job.

        Args:
            autostop: whether to wait until the job is over and everything it started is cleaned up, and to raise what
                failed.
            keep_services: services to leave ready for this environment's next job: True for all, or their names. They
                end with `close()`, at the end of `with env:`, or when the interpreter exits.
            keep_s: how long they are left without a job before they end by themselves, in seconds; None is for ever.
                An error of such an end is logged.

        Raises:
            GraphError: the program is wrong; nothing was started.
            JobError: with `autostop`, what failed; several errors come as one `JobErrorGroup`.
            KeyboardInterrupt: with `autostop` on the main thread, Ctrl-C; everything has been cleaned up.
        """
        if self._job is not None and self._job.is_running:
            error = GraphError(f'environment "{self.name}" already runs job {self._job.id}')
            raise hint(error, "Wait for it with job.wait(), stop it with env.stop(), or use another environment.")
        if keep_s is not None:
            check_seconds("keep_s is", keep_s, may_be_zero=False)
            if not keep_services:
                raise hint(GraphError(f"keep_s is {keep_s}, but no service is kept"), "Add keep_services=True.")
        graph = self._graph()
        keep = self._kept.names(keep_services, self._services)
        plan = self._plan(graph)
        if autostop and len(plan.serving) == len(graph.nodes):
            error = GraphError(f'environment "{self.name}" only serves requests, so nothing would end it')
            raise hint(error, "Call submit() without autostop and env.stop() at the end, or add a pipeline.")
        if Environment._instead_of_running is not None:
            return Environment._instead_of_running(self, graph, plan)
        if keep_services:
            self._kept.keep_s = keep_s
        return self._start(graph, plan, keep, autostop)

    def stop(self) -> None:
        """Stop the running job, draining what is in flight; services that are kept stay. Does nothing twice."""
        if self._job is not None:
            self._job.stop()

    def close(self) -> None:
        """Stop what runs and clean up everything, kept services included. Does nothing twice."""
        try:
            self.stop()
        finally:
            self._kept.close()

    def __enter__(self) -> Any:
        return self

    def __exit__(self, type_: object, error: BaseException | None, traceback: object) -> None:
        if error is None:
            self.close()
            return
        try:
            if self._job is not None:
                self._job.cancel()
        except Exception as another:
            error.add_note(f"While the environment was closed: {another}")
        finally:
            self._kept.close()

    def explain(self, format: str = "text") -> str:
        """Return the physical plan as "text" or as a "mermaid" flowchart; nothing is started.

        Raises:
            GraphError: the program is wrong, or the format is neither.
        """
        if format not in ("text", "mermaid"):
            raise hint(GraphError(f"explain: format is {format!r}"), 'It is "text" or "mermaid".')
        plan = self._plan(self._graph())
        return plan.text() if format == "text" else plan.mermaid()

    def set_console_log_level(self, level: str) -> None:
        """Show the log on standard error from `level` on: DEBUG, INFO, WARNING or ERROR."""
        if str(level).upper() not in CONSOLE_LEVELS:
            raise hint(ValueError(f"console log level is {level!r}"), f"It is one of {', '.join(CONSOLE_LEVELS)}.")
        self._show_log(level.upper())

    # --- what is imported late ---
    # What plans, runs and logs a job takes longer to import than what builds a graph. The methods of this section
    # import it when the first job is submitted, so that `from sage import LocalEnvironment` costs little.

    def _plan(self, graph: LogicalGraph) -> PhysicalPlan:
        from sage._plan.planner import plan

        return plan(graph)

    def _backend(self) -> Backend:
        from sage._backends.threads import ThreadsBackend

        return ThreadsBackend()

    def _new_job(
        self,
        id_: str,
        graph: LogicalGraph,
        plan: PhysicalPlan | None,
        backend: Backend,
        adopted: dict[str, Any],
        keep: frozenset[str] = frozenset(),
    ) -> Job:
        from sage._assembly import assemble

        report = os.path.abspath(self.report_file) if self.report_file else None
        job, guard = assemble(
            id_, graph, plan, backend, self._limits, report=report, keep=keep, adopted=adopted, before=self._guard
        )

        def sealed(_: Ended) -> None:
            self._guard = guard

        job.when_sealed(sealed)
        return job

    def _open_files(self, job: Job, *, must_open: bool = True) -> None:
        log_dir = self.log_dir if must_open else None  # nothing may keep a cleanup from running
        if not log_dir and not self.report_file:
            return
        from sage.observability import ReportFile, SessionLogs

        session = SessionLogs.open(log_dir) if log_dir else None
        if self.report_file:
            job.report_file = ReportFile.open(self.report_file, job.id, job.name, must_open=must_open)
            job.dispatcher.supervisor.listeners.append(job.report_file.note)
        if session is not None:
            handler = session.open_job(self.name, job.id)
            job.when_sealed(lambda _: session.close_job(handler))

    def _show_log(self, level: str) -> None:
        from sage.observability import console_level

        console_level(level)

    # --- behind it ---

    def _limit(
        self,
        stop_timeout_s: float | None,
        drain_timeout_s: float | None,
        close_timeout_s: float | None,
        services_share: float | None,
        services_reserve_s: float | None,
    ) -> None:
        """Set the bounds of a stop that are not the default."""
        if stop_timeout_s is None:
            stop_timeout_s = seconds_in(STOP_TIMEOUT_VARIABLE)
        given = {
            "stop_timeout_s": stop_timeout_s,
            "drain_timeout_s": drain_timeout_s,
            "close_timeout_s": close_timeout_s,
            "services_share": services_share,
            "services_reserve_s": services_reserve_s,
        }
        self._limits = {name: value for name, value in given.items() if value is not None}
        for option, value in self._limits.items():
            check_seconds(f'environment "{self.name}": {option} is', value)
        if self._limits.get("services_share", 0.0) > 1:
            error = GraphError(f'environment "{self.name}": services_share is {services_share}')
            raise hint(error, "Give a part of 1.")

    def _checked_name(self, name: str, options: ServiceOptions | None) -> ServiceOptions:
        check_name("a service", name)
        options = DEFAULT_OPTIONS if options is None else options
        if not isinstance(options, ServiceOptions):
            error = TypeError(f'service "{name}": options is {short(options)}')
            raise hint(error, "Give ServiceOptions(...).")
        if name in self._services and not options.replace:
            error = DuplicateNameError(f'service "{name}" is registered twice')
            raise hint(error, "Choose another name, or set ServiceOptions(replace=True).")
        return options

    def _graph(self) -> LogicalGraph:
        return self._builder.freeze(self.name, tuple(self._services.values()))

    def _spend(self, graph: LogicalGraph) -> None:
        """Remember which sources read an iterator, which can be read only once."""
        for node in graph.nodes.values():
            target = node.function.target if node.function is not None else None
            if node.kind is Kind.SOURCE and hasattr(target, "__next__"):
                self._builder.set(node.id, spent=True)

    def _start(self, graph: LogicalGraph, plan: PhysicalPlan, keep: frozenset[str], autostop: bool) -> Job:
        if self._job is not None:
            next_id = str(uuid.uuid4())
            JobManager().expect(next_id, self)  # before anyone can ask for it
            self.env_uuid = next_id
        commands = [service.command for service in graph.services if service.command is not None]
        if commands:
            from sage.command import refuse

            refuse(self.name, commands)  # only now, as a plan is explained without them
        backend = self._backend()  # refused here if it cannot be had, before anything is opened
        if any(spec.options.host == "process" for spec in graph.services):
            from sage._hosts.process import check_can_be_sent

            check_can_be_sent(graph.services)
        self._kept.hold()
        if any(self._services[name] is not host.spec for name, host in self._kept.hosts.items()):
            self._kept.close()  # one of them was replaced, and nothing would use it any more
        job = self._new_job(self.env_uuid, graph, plan, backend, dict(self._kept.hosts), keep)
        try:
            self._open_files(job)
        except BaseException:
            job.dispatcher.discard()
            self._kept.expire_later()
            raise
        self._spend(graph)

        def sealed(ended: Ended) -> None:
            self._kept.hosts = {}
            for service in graph.services:
                if ended.state.services[service.name].state == "kept":
                    self._kept.hosts[service.name] = job.dispatcher.supervisor.hosts[service.name]
                else:
                    service.handle._connect(None)
            JobManager().hold(self, keeps=bool(self._kept.hosts))
            self._kept.expire_later()

        job.when_sealed(sealed)
        self._job = job
        JobManager().register(job)
        if autostop:
            job.run(job.dispatcher)
        else:
            job.begin(job.dispatcher)
        return job

    def _new_kept(self) -> Kept:
        return Kept(self.name, self._begin_to_close, lambda: self._job is not None and self._job.is_running)

    def _begin_to_close(self, kept: dict[str, Any]) -> Job:
        """Stop services that were kept, by a job without tasks."""
        specs = tuple(host.spec for host in kept.values())
        job = self._new_job(str(uuid.uuid4()), LogicalGraph(self.name, {}, (), specs), None, self._backend(), kept)

        def sealed(_: Ended) -> None:
            for spec in specs:
                spec.handle._connect(None)

        job.when_sealed(sealed)
        self._open_files(job, must_open=False)
        JobManager().hold(self, keeps=False)
        JobManager().register(job)
        job.begin(job.dispatcher)
        return job

    def _after_fork_in_child(self) -> None:
        """Forget the job and the kept services, which belong to the process that this one was forked from."""
        self._job, self._guard, self._kept = None, None, self._new_kept()

    def _close_at_exit(self) -> None:
        if self._kept.hosts:
            names = ", ".join(self._kept.hosts)
            try:
                warnings.warn(
                    f'environment "{self.name}" still keeps {names} at exit; call env.close() or use `with env:`',
                    RuntimeWarning,
                    stacklevel=1,
                )
            finally:  # a program may have made warnings errors
                self._kept.close()


class LocalEnvironment(Environment):
    """Runs jobs in this process, each task on a thread.

    Args:
        name: the environment's name, seen in reports and logs.
        config: the environment's own settings, kept for the program.
        log_dir: where log files go; none are written without it or `SAGE_LOG_DIR`.
        report_file: where events and reports of jobs are appended as JSON Lines while they run; nowhere without it or
            `SAGE_REPORT_FILE`.
        stop_timeout_s: budget of a whole stop, in seconds.
        drain_timeout_s: how long a stop lets what is in flight drain, in seconds.
        close_timeout_s: how long each `close` of a function may take, in seconds.
        services_share: the part of the budget of a stop that is reserved for services; 0.4 by default.
        services_reserve_s: the least that is reserved for them, in seconds; 5 by default.
        backend: where tasks run; `sage.testing.StepBackend` runs them one step at a time, from a seed.
    """

    def __init__(
        self,
        name: str = "localenvironment",
        config: dict[str, Any] | None = None,
        *,
        log_dir: str | os.PathLike[str] | None = None,
        report_file: str | os.PathLike[str] | None = None,
        stop_timeout_s: float | None = None,
        drain_timeout_s: float | None = None,
        close_timeout_s: float | None = None,
        services_share: float | None = None,
        services_reserve_s: float | None = None,
        backend: Callable[[], Backend] | None = None,
    ) -> None:
        super().__init__(name, config)
        self._limit(stop_timeout_s, drain_timeout_s, close_timeout_s, services_share, services_reserve_s)
        if backend is not None and not callable(backend):
            error = TypeError(f'environment "{name}": backend is {short(backend)}')
            raise hint(error, "Give what makes one for each job: the class, or lambda: StepBackend(seed).")
        if log_dir is not None:
            self.log_dir = log_dir
        if report_file is not None:
            self.report_file = report_file
        self._make_backend = backend

    def _backend(self) -> Backend:
        return super()._backend() if self._make_backend is None else self._make_backend()
