"""Environments: the objects in which you build jobs."""

from __future__ import annotations

import inspect
import os
import signal
import threading
import uuid
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import wraps
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Unpack, cast, overload

from sage._arguments import check_name, check_seconds, stop_limits
from sage._kept import KeptServices
from sage._plan.logical import GraphBuilder, Kind, LogicalGraph, ServiceSpec
from sage._plan.signature import builder_of, check_service_arguments, class_of, source_spec
from sage._runtime.manager import JobManager
from sage.durable import Durable, Restart, begins_as, check_restarts
from sage.errors import DuplicateNameError, GraphError, hint, short
from sage.functions import BaseFunction
from sage.service import DEFAULT_OPTIONS, ServiceHandle, ServiceOptions, unknown_service
from sage.serving import PipelineBridge, PipelineService, RequestSource, bridge_among
from sage.stream import DataStream, SourceOptions, error_policy, options_and_arguments

if TYPE_CHECKING:
    from collections.abc import AsyncIterable, AsyncIterator, Awaitable, Callable, Mapping, Sequence
    from typing import ParamSpec, Self, TypeAlias

    from sage._cassette import Cassette
    from sage._guardian.job_journal import JobJournal
    from sage._plan.physical import PhysicalPlan
    from sage._runtime.backend import Backend, Host
    from sage._runtime.budget import BudgetLimits
    from sage._runtime.job import Job
    from sage._runtime.supervisor import Ended
    from sage._types import T, U
    from sage.command import Ready, RunningCommand, Word
    from sage.connector import Source
    from sage.failure import DeadLetter
    from sage.functions import BatchFunction, SourceFunction, StopSignal
    from sage.observability import ReportFile
    from sage.report import JobReport
    from sage.serving import ServedPipeline
    from sage.stream import OnError

    P = ParamSpec("P")
    Bounded: TypeAlias = BatchFunction[T] | Source[T] | Iterable[T] | AsyncIterable[T]
    Yielded: TypeAlias = Iterator[T | StopSignal | None] | AsyncIterator[T | StopSignal | None]
    Opens: TypeAlias = Bounded[T] | Awaitable[Iterable[T]]
    UnboundedClass: TypeAlias = type[SourceFunction[T]] | type[BatchFunction[T]] | type[Source[T]]
    Unbounded: TypeAlias = SourceFunction[T] | BatchFunction[T] | Source[T]

CONSOLE_LEVELS = ("DEBUG", "INFO", "WARNING", "ERROR")


def _names_unknown_keywords(register: Callable[P, U]) -> Callable[P, U]:
    """Have an unknown keyword of `register_command` refused with a list of the known ones."""
    keywords = [*inspect.signature(register).parameters][3:]

    @wraps(register)
    def checked(*args: P.args, **kwargs: P.kwargs) -> U:
        unknown = [key for key in kwargs if key not in ("name", "argv", *keywords)]
        if unknown:
            from sage.command import unknown_keyword

            given = dict(zip(("self", "name", "argv"), args, strict=False)) | kwargs
            raise unknown_keyword(given.get("name"), given.get("argv"), unknown, keywords)
        return register(*args, **kwargs)

    return checked


class Environment:
    """Holds a graph and services, and runs them as jobs, one at a time.

    Attributes:
        name: the environment's name.
        env_uuid: the id of its latest job, or of the next one before the first submit.
    """

    # A program that wants the plans of other programs, as `sage explain` does, sets this for the whole process.
    _instead_of_running: ClassVar[Callable[[Environment, LogicalGraph, PhysicalPlan], Job] | None] = None
    # Changes the graphs that a program submits, as `sage estimate` and `sage letters replay` do.
    _changed: ClassVar[Callable[[Environment, LogicalGraph], LogicalGraph]] = lambda _, graph: graph
    _starts_commands = True
    _records_calls = True

    def __init__(self, name: str, config: Mapping[str, Any] | None = None) -> None:
        check_name("an environment", name)
        self.name = name
        self.config = dict(config or {})
        self.env_uuid = str(uuid.uuid4())
        self._limits: dict[str, float] = {}
        self._budget: BudgetLimits | None = None
        self._durable: Durable | None = None
        self._resume: str = "auto"
        self._drop_state: tuple[str, ...] = ()
        self._restarts: Restart | None = None
        self.log_dir: str | os.PathLike[str] | None = os.environ.get("SAGE_LOG_DIR")
        self.report_file: str | os.PathLike[str] | None = os.environ.get("SAGE_REPORT_FILE")
        self._builder = GraphBuilder(self)
        self._services: dict[str, ServiceSpec] = {}
        self._cassette: Cassette | None = None
        if record := os.environ.get("SAGE_RECORD_FILE"):
            self._use_cassette(record, "record", is_of_program=True)
        elif replay := os.environ.get("SAGE_REPLAY_FILE"):
            self._use_cassette(replay, "replay", is_of_program=True)
        self._job: Job | None = None
        self._when_over: Callable[[Ended], None] | None = None
        self._shows_progress = False
        self._lock = threading.Lock()
        self._is_submitting = False
        self._kept = self._new_kept()
        self._guard: JobJournal | None = None
        JobManager().expect(self.env_uuid, self)

    # --- sources ---

    @overload
    def from_batch(
        self, source: Callable[..., Opens[T]], *args: object, parallelism: int | None, **kwargs: object
    ) -> DataStream[T]: ...
    @overload
    def from_batch(
        self, source: Callable[..., Opens[T]], *args: object, name: str | None, **kwargs: object
    ) -> DataStream[T]: ...
    @overload
    def from_batch(
        self, source: Callable[..., Opens[T]], *args: object, on_error: OnError, **kwargs: object
    ) -> DataStream[T]: ...
    @overload
    def from_batch(self, source: Callable[P, Opens[T]], *args: P.args, **kwargs: P.kwargs) -> DataStream[T]: ...
    @overload
    def from_batch(self, source: Bounded[T], **options: Unpack[SourceOptions]) -> DataStream[T]: ...
    def from_batch(self, source: object, *args: object, **options: object) -> object:
        """Begin a bounded stream.

        Args:
            source: a `BatchFunction` class (called until `execute()` returns None or a `StopSignal`), a list, a tuple,
                any iterable or generator, a generator function, or a `Source`. The elements of an iterable are data,
                None included.
            *args: arguments of the class or function.
            **options: keyword arguments of the class or function, and `parallelism` (how many tasks read; lists, tuples
                and ranges are split, a class is built for each), `name`, and `on_error` ("fail" or a `Retry`).
        """
        return self._source(source, args, options, bounded=True)

    from_collection = from_batch

    @overload
    def from_source(
        self, function: UnboundedClass[T], *args: object, parallelism: int | None, **options: object
    ) -> DataStream[T]: ...
    @overload
    def from_source(
        self, function: UnboundedClass[T], *args: object, name: str | None, **options: object
    ) -> DataStream[T]: ...
    @overload
    def from_source(
        self, function: UnboundedClass[T], *args: object, on_error: OnError, **options: object
    ) -> DataStream[T]: ...
    @overload
    def from_source(
        self, function: UnboundedClass[T], *args: object, delay: float | None, **options: object
    ) -> DataStream[T]: ...
    @overload
    def from_source(
        self, function: UnboundedClass[T], *args: object, lockstep: bool, **options: object
    ) -> DataStream[T]: ...
    @overload
    def from_source(
        self, function: Callable[P, Unbounded[T] | Yielded[T]], *args: P.args, **kwargs: P.kwargs
    ) -> DataStream[T]: ...
    @overload
    def from_source(
        self,
        function: Unbounded[T] | Callable[..., Yielded[T]],
        *args: object,
        delay: float | None = None,
        lockstep: bool = False,
        **options: Unpack[SourceOptions],
    ) -> DataStream[T]: ...
    @overload
    def from_source(
        self,
        function: Callable[..., T | StopSignal | None],
        *args: object,
        delay: float | None = None,
        lockstep: bool = False,
        **options: Unpack[SourceOptions],
    ) -> DataStream[T]: ...
    @overload
    def from_source(
        self, function: Callable[P, T | StopSignal | None], *args: P.args, **kwargs: P.kwargs
    ) -> DataStream[T]: ...
    def from_source(
        self, function: object, *args: object, delay: object = None, lockstep: object = False, **options: object
    ) -> object:
        """Begin an unbounded stream.

        Args:
            function: a `SourceFunction` class, a callable without arguments or a `Source`. It returns a record, None
                for nothing now, or a `StopSignal` at the end. A generator function yields them. So do an asynchronous
                generator function and `async def execute`, which a stop cancels where they await.
            *args: arguments of the class or function.
            delay: pause between two records, in seconds; without it nothing sleeps.
            lockstep: whether one record at a time goes through the whole job.
            **options: keyword arguments of the class or function, and `parallelism` (how many tasks read), `name`, and
                `on_error` ("fail" or a `Retry`).
        """
        return self._source(function, args, options, bounded=False, delay_s=delay, lockstep=lockstep)

    def from_future(self, name: str) -> DataStream:
        """Return a stream that is filled later by `stream.fill_future(...)`: the way to build a loop."""
        return DataStream(self._builder, self._builder.add(Kind.FUTURE, name=name))

    def dead_letters(
        self, name: str = "dead letters", *, store: str | os.PathLike[str] | None = None
    ) -> DataStream[DeadLetter]:
        """Return a stream of the records that fail in operators with `on_error=` this stream, as `DeadLetter`s.

        Args:
            name: the name of the stream.
            store: a file to which they are appended as JSON Lines, with the checkpoints if the job is durable and
                otherwise immediately. `sage letters` shows them and puts them back in.
        """
        target: DeadLetterFile | Callable[[DeadLetter], None] | None = None
        if store is not None:
            from sage.connectors.dead_letters import DeadLetterFile

            file = DeadLetterFile(store, self.name)
            target = file.append if self._durable is None else file
        letters: DataStream[DeadLetter] = DataStream(self._builder, self._builder.add(Kind.LETTERS, name=name))
        if target is not None:
            letters.sink(target, name=f"{name} store", at="driver")
        return letters

    def _source(
        self, source: object, args: tuple[object, ...], options: dict[str, object], *, bounded: bool, **settings: object
    ) -> DataStream[object]:
        common, kwargs = options_and_arguments(options)
        settings["bounded"] = bounded
        if settings.get("delay_s") is not None:
            check_seconds("from_source: delay is", settings["delay_s"])
        spec = source_spec(source, args, kwargs, bounded=bounded)
        policy = error_policy(self._builder, common.get("on_error"))
        if policy.then != "fail":
            error = GraphError(f"source {short(source)}: on_error cannot skip, because it does not have a record yet")
            raise hint(error, "A source takes on_error=Retry(...), which tries again a limited number of times.")
        bridge = bridge_among(source, args, kwargs)
        if bridge is not None:
            settings["bridge"] = bridge
        if getattr(source, "use_metronome", False):
            settings["lockstep"] = True
        id_ = self._builder.add(
            Kind.SOURCE,
            name=common.get("name"),
            function=spec,
            parallelism=common.get("parallelism"),
            on_error=policy,
            settings=settings,
        )
        return DataStream(self._builder, id_)

    # --- services ---

    @overload
    def register_service(
        self, name: str, cls: Callable[..., T], *args: object, options: ServiceOptions | None, **kwargs: object
    ) -> T: ...
    @overload
    def register_service(self, name: str, cls: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T: ...
    def register_service(
        self, name: str, cls: object, *args: object, options: object = None, **kwargs: object
    ) -> object:
        """Register a service and return its handle, which type checkers take for the service itself.

        Args:
            name: the name that functions call it by.
            cls: any class, or any callable that returns an object; built once for each job.
            *args: its arguments.
            options: how it is started, called, watched and stopped.
            **kwargs: its keyword arguments.

        Raises:
            DuplicateNameError: the name is taken and `options.replace` is not set.
            GraphError: `cls` is not callable.
        """
        checked = self._checked_name(name, options)
        cls = class_of(cls)
        if not callable(cls):
            error = GraphError(f'service "{name}": {short(cls)} is not callable')
            raise hint(error, "Give the class and its arguments, not an instance, or a function that builds one.")
        if isinstance(cls, type) and issubclass(cls, BaseFunction):
            raise GraphError(f'service "{name}": {cls.__name__} is a function of a stream, not a service')
        check_service_arguments(name, cls, args, kwargs)
        handle = self._handle(name, cls)
        self._add_service(ServiceSpec(name, cls, args, kwargs, checked, handle))
        return handle

    def use(self, name: str, other: object, *args: object, **kwargs: object) -> Any:
        """Put another service in the place of a registered one, as a test does; handles given out lead to the other.

        Args:
            name: the name of the registered service.
            other: a class or function that builds the other service, or the service itself.
            *args: arguments of the class or function.
            **kwargs: its keyword arguments.
        """
        if name not in self._services:
            raise unknown_service(f'use("{name}", ...)', name, self._services)
        return self.register_service(name, builder_of(other), *args, options=ServiceOptions(replace=True), **kwargs)

    def register_service_factory(
        self, service_name: str, service_factory: Callable[[], T], *, options: ServiceOptions | None = None
    ) -> T:
        """Register a service that a callable without arguments builds; see `register_service`."""
        build: Callable[[], T] = getattr(service_factory, "create_service", service_factory)
        return self.register_service(service_name, build, options=options)

    def serve(
        self,
        name: str,
        build: Callable[[DataStream], DataStream[U]],
        *,
        timeout_s: float | None = None,
        stream: bool = False,
    ) -> ServedPipeline[U]:
        """Let a pipeline answer calls: `build` gets the stream of requests and returns the stream of answers.

        The handle is one like any other service's; `handle.process(request)` returns the record that arrives at the end
        of the request's way, or None if all of them were dropped; a second one is an error. With `stream`, it returns
        an iterator of all records of the request, each as soon as it arrives; leaving it early ends the work for them.
        An error in the pipeline reaches the caller as that error. The pipeline ends after everything that calls it.

        Args:
            name: the name of the service.
            build: adds the pipeline's operators to the stream of requests.
            timeout_s: how long a call waits for its answer, or for each piece of it, in seconds; None is without bound.
            stream: whether a call is answered piece by piece.

        Raises:
            GraphError: `build` is not a function, or does not return a stream.
        """
        if not callable(build):
            error = GraphError(f'serve("{name}"): {short(build)} is not callable')
            raise hint(error, "Give a function of the stream of requests: lambda requests: requests.map(...).")
        bridge = PipelineBridge(stream)
        options = ServiceOptions(concurrency=None)
        handle = self.register_service(name, PipelineService, bridge, timeout_s, options=options)
        answers = build(self.from_source(RequestSource, bridge, name=f"{name} requests"))
        if not isinstance(answers, DataStream):
            error = GraphError(f'serve("{name}"): {short(build)} returned {short(answers)}, which is not a stream')
            raise hint(error, "Return the stream of answers: lambda requests: requests.map(...).")
        self._builder.add(Kind.REPLY, name=f"{name} answers", inputs=(answers._id,))
        return cast("ServedPipeline[U]", handle)

    @_names_unknown_keywords
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
    ) -> RunningCommand:
        """Register an external command as a service and return its handle.

        The handle has the attributes of a `RunningCommand`: `url`, `port`, `pid`, `output()` and others. The words,
        values of `env`, `cwd`, `url` and the address of a probe may hold placeholders: `{port}` is a free port,
        `{port:NAME}` another one, `{host}` the address to listen at (127.0.0.1, or that of its node on Ray),
        `{folder}` a private folder that is removed in the end. A word may be taken of another service: `db.url`. No
        shell reads them.

        Args:
            name: the name that functions call it by.
            argv: the program and its arguments. It has to stay in the foreground.
            ready: shows that it can be used: `Http(url)`, `Port()`, `Line(pattern)` or a callable that is given the
                `RunningCommand`; without one it can be used as soon as it was started.
            health: the same, asked while it runs, every `health_interval_s`.
            env: variables that are set besides those of this process.
            cwd: the folder in which it runs; by default that of this process.
            port: a fixed port for `{port}`.
            url: the `url` of the handle; `http://127.0.0.1:{port}` by default.
            stop_signal: the signal that asks it to end.
            exit_codes: the exit codes that are fine after a stop, besides ending by the signal itself.
            options: how it is started, watched and stopped.

        Raises:
            DuplicateNameError: the name is taken and `options.replace` is not set.
            GraphError: something in it can never work.
            TypeError: a keyword is unknown.
        """
        from sage.command import RunningCommand, command_of  # only programs with commands pay for it

        options = self._checked_name(name, options)
        command = command_of(name, argv, ready, health, env, cwd, port, url, stop_signal, exit_codes, options)
        handle = self._handle(name, RunningCommand)
        self._add_service(ServiceSpec(name, RunningCommand, command.handles, {}, options, handle, command))
        return cast("RunningCommand", handle)

    # --- running ---

    def limit(
        self,
        *,
        wall_s: float | None = None,
        calls: Mapping[str, int] | None = None,
        tokens: int | None = None,
        cost: tuple[float, float, float] | None = None,
        failures: float | None = None,
    ) -> None:
        """Limit what each job of this environment may use. A call replaces the limits of an earlier one.

        At 80 % of a limit the log of the job has a warning. At 100 % the job ends as by `stop()`: it is drained and
        cleaned, its state is STOPPED, its `why` begins with "budget:", and `sage run` exits with 3. Calls that run are
        waited for, and they alone can go beyond the limit. A call of a limited service that would begin later raises
        `HeldBackError`, and its record counts as undelivered.

        Args:
            wall_s: how long the job may take, in seconds, its start included.
            calls: how many calls each of these services may be given, by the name of the service.
            tokens: how many tokens the models may use, prompts and answers together.
            cost: the price of a million tokens of prompts, that of a million tokens of answers, and the limit, all in
                one currency.
            failures: the fraction of the records of any operator that may fail after the last attempt; an operator with
                fewer than 100 records is taken to have 100.

        Raises:
            GraphError: a value can never work.
        """
        from sage._runtime.budget import BudgetLimits

        given = BudgetLimits(wall_s, {} if calls is None else calls, tokens, cost, failures)
        self._budget = None if given == BudgetLimits() else given

    @property
    def jobmanager(self) -> JobManager:
        """The job manager of this process."""
        return JobManager()

    def submit(
        self,
        autostop: bool = False,
        *,
        keep_services: bool | Iterable[str] = False,
        keep_s: float | None = None,
        progress: bool = False,
        resume: Literal["auto", "never", "must"] = "auto",
        drop_state: Iterable[str] = (),
        restarts: Restart | None = None,
    ) -> Job:
        """Run the pipeline and return its job.

        Args:
            autostop: whether to wait until the job is over and everything it started is cleaned up, and to raise its
                errors.
            keep_services: services to leave ready for this environment's next job: True for all, or their names. They
                end with `close()`, at the end of `with env:`, or when the interpreter exits.
            keep_s: how long they are left without a job before they end by themselves, in seconds; None is for ever.
                An error of such an end is logged.
            progress: whether a line on standard error says how far the job is: records, percent and time left where all
                sources know their length, rate, fullest queue, failures.
            resume: how a durable job begins: "auto" goes on from the last checkpoint if there is one, "must" raises if
                not, and "never" deletes the checkpoints and begins anew.
            drop_state: names of operators whose state a durable job does not take from its last checkpoint; a source
                begins anew. Leave it out again after that run, as it drops the state each time.
            restarts: lets the tasks of a durable job start again if one fails, with copies of instances that you gave.

        Raises:
            GraphError: the program is wrong; nothing was started.
            CheckpointError: the job is durable and cannot use its folder or its checkpoint; nothing was started.
            JobError: with `autostop`, the job failed; several errors come as one `JobErrorGroup`.
            KeyboardInterrupt: with `autostop` on the main thread, Ctrl-C; everything has been cleaned up.
        """
        if keep_s is not None:
            check_seconds("keep_s is", keep_s, may_be_zero=False)
            if not keep_services:
                raise hint(GraphError(f"keep_s is {keep_s}, but no service is kept"), "Add keep_services=True.")
        asked = begins_as(self.name, resume, drop_state, is_durable=self._durable is not None)
        check_restarts(self.name, restarts, is_durable=self._durable is not None)
        with self._alone():
            self._resume, self._drop_state, self._restarts = *asked, restarts
            graph = Environment._changed(self, self._graph())
            keep = self._kept.names(keep_services, self._services)
            plan = self._plan(graph)
            self._check_run(graph, keep)
            if autostop and len(plan.serving) == len(graph.nodes):
                error = GraphError(f'environment "{self.name}" only serves requests, so nothing would end it')
                raise hint(error, "Call submit() without autostop and env.stop() at the end, or add a pipeline.")
            if Environment._instead_of_running is not None:
                return Environment._instead_of_running(self, graph, plan)
            if keep_services:
                self._kept.keep_s = keep_s
            self._shows_progress = progress
            job = self._prepare(graph, plan, keep)
        if autostop:
            job._run()
        else:
            job._begin()
        return job

    def run(
        self,
        *,
        keep_services: bool | Iterable[str] = False,
        keep_s: float | None = None,
        progress: bool = False,
        resume: Literal["auto", "never", "must"] = "auto",
        drop_state: Iterable[str] = (),
        restarts: Restart | None = None,
    ) -> JobReport:
        """Run the pipeline, wait for its end, and return the report; see `submit`, which this calls with `autostop`.

        Raises:
            GraphError: the program is wrong; nothing was started.
            JobError: the job failed; several errors come as one `JobErrorGroup`.
            KeyboardInterrupt: on the main thread, Ctrl-C; everything has been cleaned up.
        """
        return self.submit(
            autostop=True,
            keep_services=keep_services,
            keep_s=keep_s,
            progress=progress,
            resume=resume,
            drop_state=drop_state,
            restarts=restarts,
        ).report

    def _submit_for(self, over: Callable[[object], None]) -> Job:
        """Run the pipeline, and call `over` when its job is over."""
        self._when_over = over
        try:
            return self.submit()
        finally:
            self._when_over = None

    def stop(self, drain: bool | None = None) -> None:
        """Stop the running job; services that are kept stay. Does nothing twice.

        Args:
            drain: see `Job.stop`. By default, records in flight are processed unless they wait for a costly function.
        """
        if self._job is not None:
            self._job.stop(drain)

    def close(self) -> None:
        """Stop a running job and clean up everything, including kept services. You can call it twice."""
        try:
            self.stop()
        finally:
            self._kept.close()

    def __enter__(self) -> Self:
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
        """Return the plan of the job, as "text" or as a "mermaid" flowchart, without starting anything.

        It shows the physical plan and the callers of each service, as far as they can be seen. The text also shows the
        delivery promise for the records of each sink.

        Raises:
            GraphError: the program is wrong, or the format is neither.
        """
        if format not in ("text", "mermaid"):
            raise hint(GraphError(f"explain: format is {format!r}"), 'It is "text" or "mermaid".')
        from sage._plan.explanation import explanation

        graph = self._graph()
        return explanation(graph, self._plan(graph), format)

    def set_console_log_level(self, level: str) -> None:
        """Show the log on standard error from `level` on: DEBUG, INFO, WARNING or ERROR."""
        if str(level).upper() not in CONSOLE_LEVELS:
            raise hint(ValueError(f"console log level is {level!r}"), f"It is one of {', '.join(CONSOLE_LEVELS)}.")
        self._show_log(level.upper())

    def record_calls(self, path: str | os.PathLike[str]) -> None:
        """Write all calls of services to a cassette, an SQLite file, with their answers and errors.

        If the file exists, calls are added to it. Values of environment variables whose names end in KEY, TOKEN,
        SECRET or PASSWORD are replaced by asterisks. Answers are pickled. What cannot be pickled or written is left
        out, and the log says so. See `replay_calls`.

        Raises:
            GraphError: the file cannot be written, or is something else.
        """
        self._use_cassette(path, "record")

    def replay_calls(self, path: str | os.PathLike[str]) -> None:
        """Let the calls of all services be answered from a cassette, so that no service is started.

        A call is found by its service, its method and its arguments. Equal calls get their answers in the order in
        which these were recorded. Read only files that you trust: answers are unpickled.

        Raises:
            GraphError: the file is missing, or something else.
            ReplayError: when the job runs, by a call that is not on the cassette; its note shows the nearest one.
        """
        self._use_cassette(path, "replay")

    # --- late imports --- The modules that plan, run and log a job take longer to import than those that build a graph.
    # The methods of this section import them when the first job is submitted, so that `from sage import
    # LocalEnvironment` costs little.

    def _use_cassette(
        self, path: str | os.PathLike[str], way: Literal["record", "replay"], *, is_of_program: bool = False
    ) -> None:
        from sage._cassette import Cassette, of_program

        if not self._records_calls:
            raise GraphError(f'environment "{self.name}" runs on a cluster, where calls cannot be recorded or replayed')
        self._cassette = (of_program if is_of_program else Cassette)(os.path.abspath(path), way)
        self._services = {name: self._cassette.of(spec) for name, spec in self._services.items()}

    def _plan(self, graph: LogicalGraph) -> PhysicalPlan:
        from sage._plan.planner import plan

        return plan(graph)

    def _check_run(self, graph: LogicalGraph, keep: frozenset[str]) -> None:
        if any(spec.options.has_replicas for spec in graph.services):
            from sage._hosts.replicas import check_replicas

            check_replicas(graph.services, keep)
        if self._restarts is not None:
            from sage._plan.durability import check_sources_again

            check_sources_again(graph)

    def _backend(self) -> Backend:
        from sage._backends.threads import ThreadsBackend

        return ThreadsBackend()

    def _new_job(
        self,
        id_: str,
        graph: LogicalGraph,
        plan: PhysicalPlan | None,
        backend: Backend,
        adopted: dict[str, Host],
        keep: frozenset[str] = frozenset(),
    ) -> Job:
        from sage._assembly import assemble

        report = os.path.abspath(self.report_file) if self.report_file else None
        durable = None
        if self._durable is not None and graph.is_durable and plan is not None:
            from sage._runtime.durable_run import DurableRun

            durable = DurableRun(self._durable, graph, self._resume, self._drop_state, self._restarts)
        try:
            job, guard = assemble(
                id_,
                graph,
                plan,
                backend,
                self._limits,
                report=report,
                keep=keep,
                adopted=adopted,
                before=self._guard,
                budget=None if plan is None else self._budget,
                durable=durable,
            )
        except BaseException:
            if durable is not None:
                durable.close()
            raise

        def sealed(_: Ended) -> None:
            self._guard = guard

        job._when_sealed(sealed)
        return job

    def _open_files(self, job: Job, *, must_open: bool = True) -> ReportFile | None:
        log_dir = self.log_dir if must_open else None  # nothing may keep a cleanup from running
        if not log_dir and not self.report_file:
            return None
        from sage._job_files import open_files

        return open_files(job, log_dir, self.report_file, must_open=must_open)

    def _show_log(self, level: str) -> None:
        from sage.observability import console_level

        console_level(level)

    # --- behind it ---

    def _checked_name(self, name: str, options: object) -> ServiceOptions:
        check_name("a service", name)
        options = DEFAULT_OPTIONS if options is None else options
        if not isinstance(options, ServiceOptions):
            error = TypeError(f'service "{name}": options is {short(options)}')
            raise hint(error, "Give ServiceOptions(...).")
        if name in self._services and not options.replace:
            raise _registered_twice(name)
        return options

    def _handle(self, name: str, target: object) -> ServiceHandle:
        """Return the handle of a name: the one that was given out for an earlier service, if there is one."""
        handle = self._services[name].handle if name in self._services else ServiceHandle(name, target)
        handle._target = target
        return handle

    def _add_service(self, spec: ServiceSpec) -> None:
        spec = spec if self._cassette is None else self._cassette.of(spec)
        if spec.options.replace:
            self._services[spec.name] = spec
        elif self._services.setdefault(spec.name, spec) is not spec:  # by another thread, just now
            raise _registered_twice(spec.name)

    def _graph(self) -> LogicalGraph:
        graph = self._builder.freeze(self.name, tuple(self._services.values()))
        return graph if self._durable is None else replace(graph, is_durable=True)

    @contextmanager
    def _alone(self) -> Iterator[None]:
        """Keep other threads from submitting meanwhile, and refuse to where a job runs."""
        error: GraphError | None = None
        with self._lock:
            if self._is_submitting:
                error = GraphError(f'environment "{self.name}" is being submitted by another thread')
            elif self._job is not None and self._job.is_running:
                error = GraphError(f'environment "{self.name}" already runs job {self._job.id}')
            else:
                self._is_submitting = True
        if error is not None:
            raise hint(error, "Wait for it with job.wait(), stop it with env.stop(), or use another environment.")
        try:
            yield
        finally:
            self._is_submitting = False

    def _prepare(self, graph: LogicalGraph, plan: PhysicalPlan, keep: frozenset[str]) -> Job:
        """Return the environment's next job, which only has to begin."""
        if self._job is not None:
            next_id = str(uuid.uuid4())
            JobManager().expect(next_id, self)  # before anyone can ask for it
            self.env_uuid = next_id
        commands = [service.command for service in graph.services if service.command is not None]
        if commands and self._starts_commands:
            from sage.command import refuse

            refuse(self.name, commands)  # only now, as a plan is explained without them
        if self._budget is not None:
            self._budget.check(self.name, graph)
        backend = self._backend()  # refused here if it cannot be had, before anything is opened
        if any(spec.options.host == "process" for spec in graph.services):
            from sage._hosts.process import check_can_be_sent

            check_can_be_sent(graph.services)
        self._kept.hold()
        if any(self._services[name] is not host.spec for name, host in self._kept.hosts.items()):
            self._kept.close()  # one of them was replaced, and nothing would use it any more
        with self._kept.in_use():
            job: Job | None = None
            try:
                job = self._new_job(self.env_uuid, graph, plan, backend, dict(self._kept.hosts), keep)
                report = self._open_files(job)
                if self._cassette is not None and report is not None:
                    from sage._job_files import keep_failed

                    keep_failed(job, self._cassette, report)
            except BaseException:
                if job is not None:
                    job.dispatcher.discard()
                    if job._durable is not None:
                        job._durable.close()
                self._kept.expire_later()
                raise
            self._builder.spend(graph)
            job._when_sealed(lambda ended: self._take_back(job, graph, ended))
            if self._when_over is not None:
                job._when_sealed(self._when_over)
            if self._shows_progress:
                from sage._progress import ProgressLine

                ProgressLine(job).start()
            self._job = job
        JobManager().register(job)
        return job

    def _take_back(self, job: Job, graph: LogicalGraph, ended: Ended) -> None:
        """Keep the services that a job has left, and release the rest."""
        self._kept.hosts = {}
        for service in graph.services:
            if ended.state.services[service.name].state == "kept":
                self._kept.hosts[service.name] = job.dispatcher.supervisor.hosts[service.name]
            else:
                service.handle._connect(None)
        JobManager().hold(self, keeps=bool(self._kept.hosts))
        self._kept.expire_later()

    def _new_kept(self) -> KeptServices:
        return KeptServices(self.name, self._begin_to_close, lambda: self._job is not None and self._job.is_running)

    def _begin_to_close(self, kept: dict[str, Host]) -> Job:
        """Stop services that were kept, by a job without tasks."""
        specs = tuple(host.spec for host in kept.values())
        job = self._new_job(str(uuid.uuid4()), LogicalGraph(self.name, {}, (), specs), None, self._backend(), kept)

        def sealed(_: Ended) -> None:
            for spec in specs:
                spec.handle._connect(None)

        job._when_sealed(sealed)
        self._open_files(job, must_open=False)
        JobManager().hold(self, keeps=False)
        JobManager().register(job)
        job._begin()
        return job

    def _after_fork_in_child(self) -> None:
        """Forget the job and the kept services, which belong to the process that this one was forked from."""
        self._job, self._guard, self._kept = None, None, self._new_kept()
        self._lock, self._is_submitting = threading.Lock(), False

    def _close_at_exit(self) -> None:
        self._kept.close_at_exit()


def _registered_twice(name: str) -> DuplicateNameError:
    error = DuplicateNameError(f'service "{name}" is registered twice')
    return hint(error, "Choose another name, or set ServiceOptions(replace=True).")


class LocalEnvironment(Environment):
    """Runs jobs in this process, each task on a thread.

    Args:
        name: the environment's name, seen in reports and logs.
        config: the environment's own settings, kept for the program.
        log_dir: where log files go; none are written without it or `SAGE_LOG_DIR`.
        report_file: where events and reports of jobs are appended as JSON Lines while they run; nowhere without it or
            `SAGE_REPORT_FILE`.
        stop_timeout_s: budget of a whole stop, in seconds.
        drain_timeout_s: how long records in flight may drain in a stop, in seconds.
        close_timeout_s: how long each `close` of a function may take, in seconds.
        services_share: the part of the budget of a stop that is reserved for services; 0.4 by default.
        services_reserve_s: the least that is reserved for them, in seconds; 5 by default.
        backend: where tasks run; `sage.testing.StepBackend` runs them one step at a time, from a seed.
        durable: the folder of its checkpoints, or a `Durable`. A job that was killed goes on from the last one when the
            program runs again.
    """

    def __init__(
        self,
        name: str = "localenvironment",
        config: Mapping[str, Any] | None = None,
        *,
        log_dir: str | os.PathLike[str] | None = None,
        report_file: str | os.PathLike[str] | None = None,
        stop_timeout_s: float | None = None,
        drain_timeout_s: float | None = None,
        close_timeout_s: float | None = None,
        services_share: float | None = None,
        services_reserve_s: float | None = None,
        backend: Callable[[], Backend] | None = None,
        durable: str | os.PathLike[str] | Durable | None = None,
    ) -> None:
        super().__init__(name, config)
        self._durable = durable if durable is None or isinstance(durable, Durable) else Durable(durable)
        self._limits = stop_limits(
            name, stop_timeout_s, drain_timeout_s, close_timeout_s, services_share, services_reserve_s
        )
        if backend is not None and not callable(backend):
            error = TypeError(f'environment "{name}": backend is {short(backend)}')
            raise hint(error, "Give a factory that makes one for each job: the class, or lambda: StepBackend(seed).")
        if log_dir is not None:
            self.log_dir = log_dir
        if report_file is not None:
            self.report_file = report_file
        self._make_backend = backend

    def _backend(self) -> Backend:
        return super()._backend() if self._make_backend is None else self._make_backend()
