"""SAGE: dataflow pipelines with services, in plain Python."""

from sage import _legacy as _legacy
from sage.connector import Source
from sage.environment import LocalEnvironment, RemoteEnvironment
from sage.errors import (
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
from sage.report import Cleanliness, JobReport, Outcome
from sage.service import BaseService, ServiceHandle, ServiceOptions
from sage.stream import ConnectedStreams, DataStream, KeyedStream

__version__ = "0.1.0"

__all__ = [
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
    "InternalError",
    "JobError",
    "JobErrorGroup",
    "JobNotFoundError",
    "JobReport",
    "KeyByFunction",
    "KeyedStream",
    "LocalEnvironment",
    "MapFunction",
    "Outcome",
    "ProcessFunction",
    "RemoteEnvironment",
    "Retry",
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
