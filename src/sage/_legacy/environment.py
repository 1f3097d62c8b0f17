"""Environments of the old import paths: those of SAGE, with the arguments, attributes and defaults of 2025."""

from __future__ import annotations

import inspect
import logging
import os
import warnings
from dataclasses import dataclass
from functools import wraps
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sage import environment, functions, remote
from sage._legacy.functions import KINDS, OldUser, one_by_one
from sage._legacy.jobs import JobManager, Submitted
from sage._plan.logical import GraphBuilder, Kind, Node
from sage.failure import FAIL, Retry
from sage.service import ServiceOptions
from sage.stream import ConnectedStreams, DataStream, KeyedStream, error_policy

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from typing import Unpack

    from sage._plan.logical import FunctionSpec, NodeAttributes
    from sage.failure import ErrorPolicy


WITHOUT_EFFECT = {
    "enable_profile": "the report of a job has the time of each operator",
    "batch_size": "a sink gets one record at a time; map_batches(...) gets many",
    "progress_log_interval": "sage run FILE shows how far a job is",
    "total_count": "sage run FILE shows how far a job is",
    "cpu_required": "call .place(num_cpus=...) after the operator",
    "gpu_required": "call .place(num_gpus=...) after the operator",
    "memory_required": "call .place(resources=...) after the operator",
    "scheduler": "Ray places the tasks of a RemoteEnvironment, and one machine has one place",
    "enable_monitoring": "the report of every job has these figures",
    "host": "the job runs from this process; address=... names a Ray cluster",
    "port": "the job runs from this process; address=... names a Ray cluster",
    "checkpoint": "a job begins from the start",
}
"""Arguments of old programs that change nothing here, with the reason. Each is accepted with one warning."""

_warned: set[str] = set()


def accept(name: str) -> None:
    """Warn, once in a process, of an argument that has no effect."""
    if name not in _warned:
        _warned.add(name)
        warnings.warn(f"{name} has no effect here: {WITHOUT_EFFECT[name]}", UserWarning, stacklevel=4)


def takes(target: object, name: str) -> bool:
    """Return whether the constructor of a class takes an argument of this name."""
    if not isinstance(target, type):
        return False
    try:
        parameters = inspect.signature(target).parameters
    except (TypeError, ValueError):
        return False
    return name in parameters


def without_ineffective(target: object, kwargs: Mapping[str, object]) -> dict[str, object]:
    """Return the keyword arguments that have an effect, and warn of the others."""
    kept = dict(kwargs)
    for name in kwargs.keys() & WITHOUT_EFFECT.keys():
        if not takes(target, name):
            accept(name)
            del kept[name]
    return kept


@dataclass(frozen=True)
class Transformation:
    """One step of a pipeline, as `env.pipeline` lists it.

    Attributes:
        basename: the operator's name.
        parallelism: how many tasks run it.
        function_class: the function class, or the callable or collection that was given instead of one.
        function_args: the arguments of the class.
        function_kwargs: its keyword arguments.
    """

    basename: str
    parallelism: int
    function_class: object
    function_args: tuple[object, ...]
    function_kwargs: dict[str, object]

    @classmethod
    def of(cls, node: Node) -> Transformation:
        """Return the view of one node."""
        spec = node.function
        target = None if spec is None else getattr(spec.target, "_old_class", spec.target)
        args, kwargs = ((), {}) if spec is None else (spec.args, dict(spec.kwargs))
        return cls(node.name, node.parallelism, target, args, kwargs)


@dataclass(frozen=True)
class ServiceFactory:
    """One registered service, as `env.service_factories` lists it.

    Attributes:
        service_args: the arguments of the class.
        service_kwargs: its keyword arguments.
    """

    service_name: str
    service_class: Callable[..., object]
    service_args: tuple[object, ...]
    service_kwargs: dict[str, object]

    def create_service(self) -> Any:
        """Build an instance that belongs to no job."""
        return self.service_class(*self.service_args, **self.service_kwargs)


class Builder(GraphBuilder):
    """The graph of an old environment, which its streams find it by.

    Attributes:
        policy: the error policy of operators that do not set one.
    """

    environment: OldManners
    policy: Retry | None = None

    def add(
        self,
        kind: Kind,
        *,
        name: object = None,
        function: FunctionSpec | None = None,
        parallelism: object = None,
        on_error: ErrorPolicy = FAIL,
        **attributes: Unpack[NodeAttributes],
    ) -> int:
        """Add a node, with the environment's policy if it has none of its own."""
        if self.policy is not None and function is not None and on_error == FAIL:
            on_error = error_policy(self, self.policy)
        return super().add(kind, name=name, function=function, parallelism=parallelism, on_error=on_error, **attributes)

    def adapted(self, target: object, kind: Kind) -> object:
        """Return a function class as the operator needs it: of its kind, and knowing its environment."""
        execute = getattr(target, "execute", None)
        if not isinstance(target, type) or not callable(execute):
            return target
        wanted = KINDS.get(str(kind))
        body: dict[str, object] = {"__module__": target.__module__, "__doc__": target.__doc__, "_old_class": target}
        bases: tuple[type, ...] = (target,)
        if issubclass(target, OldUser):
            body |= self.environment._seen_by_functions()
        if wanted is not None and not issubclass(target, wanted.__mro__[2]):  # the class of SAGE of that kind
            bases = (target, wanted)
        if kind is Kind.FLATMAP:
            body["execute"] = one_by_one(execute)
        if len(body) == 3 and len(bases) == 1:
            return target
        made = type(target.__name__, bases, body)
        made.__qualname__ = target.__qualname__
        return made


def _adapting(method: Callable[..., DataStream], kind: Kind) -> Any:
    """Return a method of streams that also takes a function class of another kind, and the keywords of 2025."""

    @wraps(method)
    def adapted(self: OldStream | OldConnectedStreams, function: object, *args: object, **kwargs: object) -> OldStream:
        wanted = self._builder.adapted(function, kind)
        return old_stream(method(self, wanted, *args, **without_ineffective(function, kwargs)))

    return adapted


class OldStream(DataStream):
    """A stream that takes a function class of any kind, and the keywords of 2025."""

    _builder: Builder

    @property
    def transformation(self) -> Transformation:
        """The step behind this stream, as `env.pipeline` lists it."""
        return Transformation.of(self._builder.freeze("").nodes[self._id])

    map = _adapting(DataStream.map, Kind.MAP)
    filter = _adapting(DataStream.filter, Kind.FILTER)
    sink = _adapting(DataStream.sink, Kind.SINK)
    keyby = key_by = _adapting(DataStream.keyby, Kind.KEYBY)
    _flatmap = _adapting(DataStream.flatmap, Kind.FLATMAP)

    def flatmap(self, function: Any, *args: object, **kwargs: object) -> Any:
        """See `DataStream.flatmap`; one value or a text is one record."""
        if not hasattr(function, "execute"):
            call = function
            each = one_by_one(lambda _, value: call(value))
            return self._apply(Kind.FLATMAP, lambda data: each(_Plain(), data), (), kwargs)
        return self._flatmap(function, *args, **kwargs)

    flat_map = flatmap

    def connect(self, other: DataStream | ConnectedStreams) -> Any:
        return OldConnectedStreams(self._builder, super().connect(other)._streams)

    def union(self, *others: DataStream) -> Any:
        return old_stream(super().union(*others))


class _Plain:
    """Stands for the function object around a plain callable, which collects nothing."""

    _collected: list[object] | None = None


class OldKeyedStream(OldStream, KeyedStream):
    """A stream whose records have keys."""


class OldConnectedStreams(ConnectedStreams):
    """Connected streams that take a function class of any kind."""

    _builder: Builder

    comap = _adapting(ConnectedStreams.comap, Kind.COMAP)
    join = _adapting(ConnectedStreams.join, Kind.JOIN)

    def connect(self, other: DataStream | ConnectedStreams) -> Any:
        return OldConnectedStreams(self._builder, super().connect(other)._streams)

    def keyby(self, *functions: Any, **kwargs: Any) -> Any:
        return OldConnectedStreams(self._builder, super().keyby(*functions, **kwargs)._streams)

    key_by = keyby


def old_stream(stream: DataStream) -> OldStream:
    """Return a stream as one of an old environment."""
    if isinstance(stream, OldStream):
        return stream
    kind = OldKeyedStream if isinstance(stream, KeyedStream) else OldStream
    return kind(stream._builder, stream._id)


def default_log_dir() -> str:
    """Return where old programs look for logs: `.sage/logs` of this folder, or of the home folder."""
    given = os.environ.get("SAGE_OUTPUT_DIR")
    if given:
        return os.path.join(given, "logs")
    here = Path.cwd() if os.access(Path.cwd(), os.W_OK) else Path.home()
    return str(here / ".sage" / "logs")


def retry_of(config: Mapping[str, Any]) -> Retry | None:
    """Return the restart strategy of `config["fault_tolerance"]` as a `Retry`; checkpoints have no effect yet."""
    wanted = config.get("fault_tolerance") or {}
    if wanted.get("strategy") == "checkpoint":
        accept("checkpoint")
    if wanted.get("strategy") != "restart":
        return None
    settings = {**wanted, **(wanted.get("restart_config") or {}), **(wanted.get("config") or {})}
    first = float(settings.get("initial_delay", settings.get("delay", 0.1)))
    longest = max(first, float(settings.get("max_delay", first)))
    attempts = int(settings.get("max_attempts", settings.get("max_failures_per_interval", 3)))
    return Retry(attempts_max=max(1, attempts), backoff_s=(first, longest))


class OldManners(environment.Environment):
    """The additions to `Environment` for environments of the old import paths.

    They write log files to `.sage/logs`, take function classes of any kind, and `submit` returns the id of the job as
    a text.

    Attributes:
        platform: "local" or "remote".
    """

    platform = "local"
    console_log_level = "INFO"
    _builder: Builder

    def _old(self, ineffective: Mapping[str, object]) -> None:
        """Take on the old manners; constructors call this at their end."""
        for name, value in ineffective.items():
            if value:
                accept(name)
        builder = Builder(self)
        builder.policy = retry_of(self.config)
        self._builder = builder
        if self.log_dir is None:
            self.log_dir = default_log_dir()

    # --- sources ---

    def from_batch(  # type: ignore[override]
        self, source: object, *args: object, delay: float | None = None, **kwargs: object
    ) -> OldStream:
        """See `Environment.from_batch`; the characters of a text are its records, with `delay` seconds between."""
        if isinstance(source, str | bytes):
            source = list(source)
        if delay is not None and takes(source, "delay"):
            kwargs["delay"], delay = delay, None
        if isinstance(source, type) and not issubclass(source, functions.BatchFunction | functions.SourceFunction):
            source = self._builder.adapted(source, Kind.SOURCE) if self._is_other_kind(source) else source
        kept = without_ineffective(source, kwargs)
        return old_stream(self._source(source, args, kept, bounded=True, delay_s=delay))

    from_collection = from_batch  # type: ignore[assignment]

    def from_source(self, function: object, *args: object, **kwargs: object) -> Any:
        begin: Callable[..., DataStream] = super().from_source
        return old_stream(begin(function, *args, **without_ineffective(function, kwargs)))

    def from_future(self, name: str) -> OldStream:
        return old_stream(super().from_future(name))

    # --- services ---

    def register_service(  # type: ignore[override]
        self, name: Any = None, cls: Any = None, *args: object, options: ServiceOptions | None = None, **kwargs: Any
    ) -> Any:
        """Register a service; a second one of the same name replaces the first.

        `start_running` and `terminate` of a class stand for `start` and `stop` where it has them.
        """
        options = options or ServiceOptions(replace=True)
        name = kwargs.pop("service_name") if name is None else name
        cls = kwargs.pop("service_class") if cls is None else cls
        return super().register_service(name, self._service_class(cls), *args, options=options, **kwargs)

    def register_service_factory(
        self, service_name: str, service_factory: Any, *, options: ServiceOptions | None = None
    ) -> Any:
        """Register a service that a factory builds; a second one of the same name replaces the first."""
        options = options or ServiceOptions(replace=True)
        return super().register_service_factory(service_name, service_factory, options=options)

    @property
    def service_factories(self) -> dict[str, ServiceFactory]:
        """The registered services by name."""
        return {
            name: ServiceFactory(name, getattr(spec.target, "_old_class", spec.target), spec.args, dict(spec.kwargs))
            for name, spec in self._services.items()
        }

    def _service_class(self, target: Any) -> Any:
        if not isinstance(target, type):
            return target
        body: dict[str, object] = {}
        for old, hook in (("start_running", "start"), ("terminate", "stop")):
            method = getattr(target, old, None)
            if callable(method):
                body[hook] = method
        if issubclass(target, OldUser):
            body |= self._seen_by_functions()
        if not body:
            return target
        body |= {"__module__": target.__module__, "__doc__": target.__doc__, "_old_class": target}
        made = type(target.__name__, (target,), body)
        made.__qualname__ = target.__qualname__
        return made

    # --- running ---

    def submit(self, autostop: bool = False, **options: Any) -> Any:
        """Run the pipeline and return the id of its job, a text that also has the attributes of a `Job`."""
        return Submitted.of(super().submit(autostop, **options))

    def set_console_log_level(self, level: str) -> None:
        super().set_console_log_level(level)
        self.console_log_level = level.upper()

    @property
    def jobmanager(self) -> Any:
        """The job manager of this process, as old programs know it."""
        return JobManager()

    @property
    def pipeline(self) -> list[Transformation]:
        """The steps that were added so far, in their order."""
        nodes = self._builder.freeze(self.name).nodes.values()
        return [Transformation.of(node) for node in nodes if node.function is not None or node.kind is Kind.FUTURE]

    @property
    def logger(self) -> logging.Logger:
        """A logger of the standard library, named after the environment."""
        return logging.getLogger(f"sage.user.{self.name}")

    @property
    def uuid(self) -> str:
        """The id of the latest job."""
        return self.env_uuid

    @property
    def env_base_dir(self) -> str | None:
        """The folder of the log files."""
        return None if self.log_dir is None else os.fspath(self.log_dir)

    @staticmethod
    def _is_other_kind(source: type) -> bool:
        return callable(getattr(source, "execute", None))

    def _seen_by_functions(self) -> dict[str, object]:
        return {"_env_name": self.name, "_env_base_dir": self.env_base_dir}


class LocalEnvironment(OldManners, environment.LocalEnvironment):
    """Runs jobs in this process; see `sage.LocalEnvironment`."""

    def __init__(
        self,
        name: str = "localenvironment",
        config: Mapping[str, object] | None = None,
        scheduler: object = None,
        enable_monitoring: bool = False,
        **options: Any,
    ) -> None:
        super().__init__(name, config, **options)
        self._old({"scheduler": scheduler, "enable_monitoring": enable_monitoring})


class RemoteEnvironment(OldManners, remote.RemoteEnvironment):
    """Runs jobs on a Ray cluster; see `sage.RemoteEnvironment`."""

    platform = "remote"

    def __init__(
        self,
        name: str = "remote_environment",
        config: Mapping[str, object] | None = None,
        host: str = "127.0.0.1",
        port: int = 19001,
        scheduler: object = None,
        extra_python_paths: list[str] | None = None,
        enable_monitoring: bool = False,
        **options: Any,
    ) -> None:
        if extra_python_paths:
            runtime_env = dict(options.get("runtime_env") or {})
            variables = dict(runtime_env.get("env_vars") or {})
            paths = [*map(os.path.abspath, extra_python_paths), variables.get("PYTHONPATH", "")]
            variables["PYTHONPATH"] = os.pathsep.join(filter(None, paths))
            options["runtime_env"] = {**runtime_env, "env_vars": variables}
        super().__init__(name, config, **options)
        self._old(
            {
                "host": host != "127.0.0.1",
                "port": port != 19001,
                "scheduler": scheduler,
                "enable_monitoring": enable_monitoring,
            }
        )


class FlowNetEnvironment(RemoteEnvironment):
    """Runs jobs on a Ray cluster, under the name of SAGE of 2026."""
