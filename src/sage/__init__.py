"""SAGE: dataflow pipelines with services, in plain Python."""

from sage import _old_paths as _old_paths
from sage._lazy import lazy

# Type checkers read these imports. At run time a name is loaded when it is first asked for, so that importing costs
# little.
TYPE_CHECKING = False
if TYPE_CHECKING:
    from sage._awaited_calls import aio as aio
    from sage._supervised import supervised as supervised

    # A handle is used like the service it stands for, and type checkers take it for that.
    from sage._types import ServiceHandle as ServiceHandle
    from sage.command import Http as Http
    from sage.command import Line as Line
    from sage.command import Port as Port
    from sage.command import RunningCommand as RunningCommand
    from sage.connector import Source as Source
    from sage.connector import TransactionalSink as TransactionalSink
    from sage.durable import Durable as Durable
    from sage.durable import Restart as Restart
    from sage.environment import LocalEnvironment as LocalEnvironment
    from sage.errors import AuthenticationError as AuthenticationError
    from sage.errors import CheckpointError as CheckpointError
    from sage.errors import CleanupError as CleanupError
    from sage.errors import CleanupTimeoutError as CleanupTimeoutError
    from sage.errors import ConnectorError as ConnectorError
    from sage.errors import ControlError as ControlError
    from sage.errors import DuplicateNameError as DuplicateNameError
    from sage.errors import FunctionError as FunctionError
    from sage.errors import GraphError as GraphError
    from sage.errors import HeldBackError as HeldBackError
    from sage.errors import InternalError as InternalError
    from sage.errors import JobError as JobError
    from sage.errors import JobErrorGroup as JobErrorGroup
    from sage.errors import JobNotFoundError as JobNotFoundError
    from sage.errors import ReplayError as ReplayError
    from sage.errors import SageError as SageError
    from sage.errors import ServerUnreachableError as ServerUnreachableError
    from sage.errors import ServiceError as ServiceError
    from sage.errors import ServiceStartError as ServiceStartError
    from sage.errors import ServiceTimeoutError as ServiceTimeoutError
    from sage.errors import ServiceUnavailableError as ServiceUnavailableError
    from sage.errors import UnknownServiceError as UnknownServiceError
    from sage.errors import UnsupportedPlanError as UnsupportedPlanError
    from sage.failure import DeadLetter as DeadLetter
    from sage.failure import Retry as Retry
    from sage.functions import BaseCoMapFunction as BaseCoMapFunction
    from sage.functions import BaseFunction as BaseFunction
    from sage.functions import BaseJoinFunction as BaseJoinFunction
    from sage.functions import BatchFunction as BatchFunction
    from sage.functions import FilterFunction as FilterFunction
    from sage.functions import FlatMapFunction as FlatMapFunction
    from sage.functions import FutureFunction as FutureFunction
    from sage.functions import KeyByFunction as KeyByFunction
    from sage.functions import MapFunction as MapFunction
    from sage.functions import ProcessFunction as ProcessFunction
    from sage.functions import SinkFunction as SinkFunction
    from sage.functions import SourceFunction as SourceFunction
    from sage.functions import StopSignal as StopSignal
    from sage.rate import Rate as Rate
    from sage.remote import RemoteEnvironment as RemoteEnvironment
    from sage.report import Cleanliness as Cleanliness
    from sage.report import JobReport as JobReport
    from sage.report import Outcome as Outcome
    from sage.service import BaseService as BaseService
    from sage.service import ServiceOptions as ServiceOptions
    from sage.state import ListState as ListState
    from sage.state import MapState as MapState
    from sage.state import ValueState as ValueState
    from sage.stream import ConnectedStreams as ConnectedStreams
    from sage.stream import DataStream as DataStream
    from sage.stream import KeyedStream as KeyedStream

__version__ = "0.1.0"

__getattr__ = lazy(
    __name__,
    globals(),
    {
        "_awaited_calls": "aio",
        "_supervised": "supervised",
        "command": "Http Line Port RunningCommand",
        "connector": "Source TransactionalSink",
        "durable": "Durable Restart",
        "environment": "LocalEnvironment",
        "errors": "AuthenticationError CheckpointError CleanupError CleanupTimeoutError ConnectorError ControlError "
        "DuplicateNameError "
        "FunctionError GraphError HeldBackError InternalError JobError JobErrorGroup JobNotFoundError ReplayError "
        "SageError "
        "ServerUnreachableError ServiceError ServiceStartError ServiceTimeoutError "
        "ServiceUnavailableError UnknownServiceError UnsupportedPlanError",
        "failure": "DeadLetter Retry",
        "functions": "BaseCoMapFunction BaseFunction BaseJoinFunction BatchFunction FilterFunction "
        "FlatMapFunction FutureFunction KeyByFunction MapFunction ProcessFunction SinkFunction "
        "SourceFunction StopSignal",
        "rate": "Rate",
        "remote": "RemoteEnvironment",
        "report": "Cleanliness JobReport Outcome",
        "service": "BaseService ServiceHandle ServiceOptions",
        "state": "ListState MapState ValueState",
        "stream": "ConnectedStreams DataStream KeyedStream",
    },
)
