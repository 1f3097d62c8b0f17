"""SAGE: dataflow pipelines with services, in plain Python."""

from importlib import import_module

from sage import _old_paths as _old_paths

# What type checkers read. At run time a name is loaded when it is first asked for, so that importing costs little.
TYPE_CHECKING = False
if TYPE_CHECKING:
    from sage.command import Http, Line, Port, RunningCommand
    from sage.connector import Source
    from sage.environment import LocalEnvironment
    from sage.errors import (
        AuthenticationError,
        CleanupError,
        CleanupTimeoutError,
        ControlError,
        DuplicateNameError,
        FunctionError,
        GraphError,
        InternalError,
        JobError,
        JobErrorGroup,
        JobNotFoundError,
        SageError,
        ServerUnreachableError,
        ServiceError,
        ServiceStartError,
        ServiceTimeoutError,
        ServiceUnavailableError,
        UnknownServiceError,
        UnsupportedPlanError,
    )
    from sage.failure import DeadLetter, Retry
    from sage.functions import (
        BaseCoMapFunction,
        BaseFunction,
        BaseJoinFunction,
        BatchFunction,
        FilterFunction,
        FlatMapFunction,
        FutureFunction,
        KeyByFunction,
        MapFunction,
        ProcessFunction,
        SinkFunction,
        SourceFunction,
        StopSignal,
    )
    from sage.remote import RemoteEnvironment
    from sage.report import Cleanliness, JobReport, Outcome
    from sage.service import BaseService, ServiceHandle, ServiceOptions
    from sage.stream import ConnectedStreams, DataStream, KeyedStream

__version__ = "0.1.0"

__all__ = [
    "AuthenticationError",
    "BaseCoMapFunction",
    "BaseFunction",
    "BaseJoinFunction",
    "BaseService",
    "BatchFunction",
    "Cleanliness",
    "CleanupError",
    "CleanupTimeoutError",
    "ConnectedStreams",
    "ControlError",
    "DataStream",
    "DeadLetter",
    "DuplicateNameError",
    "FilterFunction",
    "FlatMapFunction",
    "FunctionError",
    "FutureFunction",
    "GraphError",
    "Http",
    "InternalError",
    "JobError",
    "JobErrorGroup",
    "JobNotFoundError",
    "JobReport",
    "KeyByFunction",
    "KeyedStream",
    "Line",
    "LocalEnvironment",
    "MapFunction",
    "Outcome",
    "Port",
    "ProcessFunction",
    "RemoteEnvironment",
    "Retry",
    "RunningCommand",
    "SageError",
    "ServerUnreachableError",
    "ServiceError",
    "ServiceHandle",
    "ServiceOptions",
    "ServiceStartError",
    "ServiceTimeoutError",
    "ServiceUnavailableError",
    "SinkFunction",
    "Source",
    "SourceFunction",
    "StopSignal",
    "UnknownServiceError",
    "UnsupportedPlanError",
]

_HOMES = {
    "AuthenticationError": "sage.errors",
    "BaseCoMapFunction": "sage.functions",
    "BaseFunction": "sage.functions",
    "BaseJoinFunction": "sage.functions",
    "BaseService": "sage.service",
    "BatchFunction": "sage.functions",
    "Cleanliness": "sage.report",
    "CleanupError": "sage.errors",
    "CleanupTimeoutError": "sage.errors",
    "ConnectedStreams": "sage.stream",
    "ControlError": "sage.errors",
    "DataStream": "sage.stream",
    "DeadLetter": "sage.failure",
    "DuplicateNameError": "sage.errors",
    "FilterFunction": "sage.functions",
    "FlatMapFunction": "sage.functions",
    "FunctionError": "sage.errors",
    "FutureFunction": "sage.functions",
    "GraphError": "sage.errors",
    "Http": "sage.command",
    "InternalError": "sage.errors",
    "JobError": "sage.errors",
    "JobErrorGroup": "sage.errors",
    "JobNotFoundError": "sage.errors",
    "JobReport": "sage.report",
    "KeyByFunction": "sage.functions",
    "KeyedStream": "sage.stream",
    "Line": "sage.command",
    "LocalEnvironment": "sage.environment",
    "MapFunction": "sage.functions",
    "Outcome": "sage.report",
    "Port": "sage.command",
    "ProcessFunction": "sage.functions",
    "RemoteEnvironment": "sage.remote",
    "Retry": "sage.failure",
    "RunningCommand": "sage.command",
    "SageError": "sage.errors",
    "ServerUnreachableError": "sage.errors",
    "ServiceError": "sage.errors",
    "ServiceHandle": "sage.service",
    "ServiceOptions": "sage.service",
    "ServiceStartError": "sage.errors",
    "ServiceTimeoutError": "sage.errors",
    "ServiceUnavailableError": "sage.errors",
    "SinkFunction": "sage.functions",
    "Source": "sage.connector",
    "SourceFunction": "sage.functions",
    "StopSignal": "sage.functions",
    "UnknownServiceError": "sage.errors",
    "UnsupportedPlanError": "sage.errors",
}


def __getattr__(name: str) -> object:
    """Load a public name from the module that it is at home in."""
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value: object = getattr(import_module(_HOMES[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    """Return the public names."""
    return [*__all__, "__version__"]
