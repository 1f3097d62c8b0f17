"""The names that programs of 2025 import: one table of their old places, and what is there no other way."""

from __future__ import annotations

import logging
import os
import threading
from typing import TYPE_CHECKING, Any

from sage import functions
from sage._runtime.dispatcher import Dispatcher
from sage._runtime.manager import JobManager
from sage.environment import LocalEnvironment
from sage.errors import GraphError, ServerUnreachableError, hint
from sage.functions import SinkFunction, SourceFunction, StopSignal
from sage.observability import LOG_FORMAT
from sage.remote import RemoteEnvironment
from sage.service import BaseService
from sage.serving import PipelineBridge, PipelineRequest, PipelineService
from sage.stream import ConnectedStreams, DataStream

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

# --- functions around callables ---

KINDS: dict[str, type[functions.BaseFunction]] = {
    "batch": functions.BatchFunction,
    "source": functions.SourceFunction,
    "map": functions.MapFunction,
    "filter": functions.FilterFunction,
    "flatmap": functions.FlatMapFunction,
    "sink": functions.SinkFunction,
    "keyby": functions.KeyByFunction,
    "comap": functions.BaseCoMapFunction,
    "join": functions.BaseJoinFunction,
    "future": functions.FutureFunction,
}


def wrap_lambda(func: Callable[..., Any], kind: str = "map") -> type[functions.BaseFunction]:
    """Return a function class whose `execute` is `func`.

    Args:
        func: any callable.
        kind: "batch", "source", "map", "filter", "flatmap", "sink", "keyby" or "join".

    Raises:
        GraphError: there is no such kind, or its functions have no `execute`.
    """
    parent = KINDS.get(kind)
    if parent is None or not hasattr(parent, "execute"):
        known = ", ".join(f'"{name}"' for name, type_ in KINDS.items() if hasattr(type_, "execute"))
        raise hint(GraphError(f"wrap_lambda: kind is {kind!r}"), f"It is one of {known}.")
    return type(f"Lambda{parent.__name__}", (parent,), {"execute": staticmethod(func)})


# --- lockstep ---


class Metronome:
    """A gate that one waiting thread passes for each release.

    Sources with `use_metronome = True` need none: the engine lets one record at a time through the job. It is for
    threads of the program that keep the same pace.

    Attributes:
        name: what it is called.
    """

    def __init__(self, name: str) -> None:
        self.name = name
        self._condition = threading.Condition()
        self._released = False
        self._stays_open = False

    def wait_for_release(self, timeout: float | None = None) -> bool:
        """Wait for a release and use it up; return whether there was one within `timeout` seconds."""
        with self._condition:
            if not self._condition.wait_for(lambda: self._released, timeout):
                return False
            self._released = self._stays_open
            return True

    def release_once(self) -> None:
        """Let one thread pass; a release that nobody has used yet is not counted twice."""
        with self._condition:
            self._released = True
            self._condition.notify()

    def force_release(self) -> None:
        """Let every thread pass until `reset`."""
        with self._condition:
            self._released = self._stays_open = True
            self._condition.notify_all()

    def reset(self) -> None:
        """Let nobody pass until the next release."""
        with self._condition:
            self._released = self._stays_open = False


_metronome = Metronome("global")


def create_metronome(name: str) -> Metronome:
    """Return a new metronome, which nobody passes yet."""
    return Metronome(name)


def get_global_metronome() -> Metronome:
    """Return the one metronome that the whole program shares."""
    return _metronome


# --- logging ---


class CustomLogger(logging.LoggerAdapter[logging.Logger]):
    """A logger of the standard library, `sage.user.<name>`, that writes to the outputs it is given.

    Args:
        outputs: pairs of "console" or a file, and the level from which on it is written to.
        name: the logger's name; two with the same name share their outputs.
        log_base_folder: where files with a relative path go.
    """

    _shows_console = True

    def __init__(
        self,
        outputs: Iterable[tuple[str, str | int]] = (("console", "INFO"),),
        name: str = "Logger",
        log_base_folder: str | os.PathLike[str] | None = None,
    ) -> None:
        super().__init__(logging.getLogger(f"sage.user.{name}"), {})
        for target, level in outputs:
            handler = self._output(target, log_base_folder)
            handler.setLevel(level.upper() if isinstance(level, str) else level)
            if self.logger.level == logging.NOTSET or self.logger.level > handler.level:
                self.logger.setLevel(handler.level)

    @classmethod
    def disable_global_console_debug(cls) -> None:
        """Let no `CustomLogger` write to the console."""
        CustomLogger._shows_console = False

    @classmethod
    def enable_global_console_debug(cls) -> None:
        """Let every `CustomLogger` write to the console again."""
        CustomLogger._shows_console = True

    def _output(self, target: str, folder: str | os.PathLike[str] | None) -> logging.Handler:
        path = os.path.abspath(os.path.join(folder or "", target))
        name = f"{self.logger.name} to {target if target == 'console' else path}"
        for handler in self.logger.handlers:
            if handler.name == name:
                return handler
        if target == "console":
            handler = logging.StreamHandler()
            handler.addFilter(lambda _: CustomLogger._shows_console)
        else:
            os.makedirs(os.path.dirname(path), exist_ok=True)
            handler = logging.FileHandler(path, delay=True, encoding="utf-8")
        handler.name = name
        handler.setFormatter(logging.Formatter(LOG_FORMAT))
        self.logger.addHandler(handler)
        return handler


# --- pipelines that answer calls ---

RESPONSE_QUEUE = "_response_queue"
"""Where a request's record has the queue for the answer."""


class PipelineServiceSource(SourceFunction):
    """Reads the requests of a bridge: each is a copy of its payload, with the queue for the answer in it."""

    def __init__(self, bridge: PipelineBridge, poll_interval: float = 0.1) -> None:
        self._bridge = bridge
        self._poll_interval = poll_interval

    def execute(self) -> Any:
        """Return the next request, None if there is none within the poll interval, or the signal of the end."""
        request = self._bridge.next(timeout=self._poll_interval)
        if request is None or isinstance(request, StopSignal):
            return request
        payload = request.payload if isinstance(request.payload, dict) else {"data": request.payload}
        return {**payload, RESPONSE_QUEUE: request.response_queue}


class PipelineServiceSink(SinkFunction):
    """Answers each request with what arrives, without the queue."""

    def execute(self, data: Any) -> None:
        """Put the rest of the record into the queue that is in it; a record without one answers nobody."""
        if isinstance(data, dict):
            answer: Any = {key: value for key, value in data.items() if key != RESPONSE_QUEUE}
            queue = data.get(RESPONSE_QUEUE)
        else:
            answer, queue = data, getattr(data, "response_queue", None)
        if queue is not None:
            queue.put(answer)


# --- job manager ---


class JobManagerClient:
    """Speaks to a job manager: to the one of this process, which is what the default address means here.

    Attributes:
        host: where the job manager is.
        port: its port.
        timeout: how long a request waits for the end of a job, in seconds; the job goes on ending after that.
    """

    def __init__(self, host: str = "127.0.0.1", port: int = 19001, timeout: float = 60) -> None:
        self.host = host
        self.port = port
        self.timeout = timeout

    def list_jobs(self) -> list[dict[str, Any]]:
        """Return id, name and state of every job."""
        return self._manager().list_jobs()

    def get_job_status(self, job_uuid: object) -> dict[str, Any]:
        """Return a job's id, name and state, and its report once it has ended.

        Raises:
            JobNotFoundError: no job has the id.
        """
        return self._manager().get_job_status(job_uuid)

    def pause_job(self, job_uuid: object) -> dict[str, Any]:
        """Stop a job and return its status.

        Raises:
            TimeoutError: it is not over after `timeout`, as for the methods below.
        """
        return self._manager().pause_job(job_uuid, timeout_s=self.timeout)

    def delete_job(self, job_uuid: object, force: bool = False) -> dict[str, Any]:
        """Stop a job, or cancel it with `force`, and return its status."""
        return self._manager().delete_job(job_uuid, force, timeout_s=self.timeout)

    def cleanup_all_jobs(self) -> list[dict[str, Any]]:
        """Stop every job that runs and return the status of all."""
        return self._manager().cleanup_all_jobs(timeout_s=self.timeout)

    def health_check(self) -> dict[str, Any]:
        """Return that the job manager answers, and how many jobs it knows."""
        return {"status": "healthy", "jobs": len(self._manager().jobs)}

    def _manager(self) -> JobManager:
        if self.host in ("127.0.0.1", "localhost") and self.port == 19001:
            return JobManager()
        error = ServerUnreachableError(f"no job manager answers at {self.host}:{self.port}")
        raise hint(error, "Leave out host and port to speak to the job manager of this process.")


# --- the table ---


def _names(*values: Any) -> dict[str, Any]:
    return {value.__name__: value for value in values}


FUNCTIONS = _names(functions.BaseFunction, *KINDS.values(), StopSignal, wrap_lambda)
SERVING = _names(PipelineBridge, PipelineService, PipelineServiceSource, PipelineServiceSink)
METRONOME = _names(Metronome, create_metronome, get_global_metronome)

OLD_PATHS: dict[str, dict[str, Any]] = {
    "sage.runtime": _names(LocalEnvironment),
    "sage.foundation": FUNCTIONS,
    "sage.common.core": FUNCTIONS,
    "sage.common.core.functions": FUNCTIONS,
    "sage.common.service": _names(BaseService),
    "sage.common.utils.logging.custom_logger": _names(CustomLogger),
    "sage.platform.service": _names(BaseService),
    "sage.kernel": _names(JobManagerClient),
    "sage.kernel.api.service": _names(BaseService),
    "sage.kernel.api.service.pipeline_service": {**SERVING, "PipelineRequest": PipelineRequest},
    "sage.kernel.runtime.communication.packet": _names(StopSignal),
    "sage.kernel.runtime.communication.router.packet": _names(StopSignal),
    "sage.kernel.runtime.communication.metronome": METRONOME,
    "sage.kernel.runtime.dispatcher": _names(Dispatcher),
    "sage.kernel.runtime.job_manager": _names(JobManager),
    "sage.kernel.runtime.jobmanager_client": _names(JobManagerClient),
    "sage.core.communication.metronome": METRONOME,
}
for _api in ("sage.core.api", "sage.kernel.api"):
    OLD_PATHS |= {
        f"{_api}.local_environment": _names(LocalEnvironment),
        f"{_api}.remote_environment": _names(RemoteEnvironment),
        f"{_api}.service.base_service": _names(BaseService),
        f"{_api}.datastream": _names(DataStream),
        f"{_api}.connected_streams": _names(ConnectedStreams),
    }
for _folder in ("sage.core.api.function", "sage.kernel.api.function", "sage.common.core.functions"):
    OLD_PATHS |= {f"{_folder}.{_kind}_function": FUNCTIONS for _kind in (*KINDS, "base", "lambda")}

PACKAGES = {path.rsplit(".", count)[0] for path in OLD_PATHS for count in range(1, path.count("."))}
"""Every folder of the old paths."""
