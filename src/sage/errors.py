"""The exceptions of SAGE.

    SageError
      GraphError              the program is wrong; raised before anything runs
        DuplicateNameError, UnknownServiceError, UnsupportedPlanError
      JobError                carries job, operator or service, and whose fault: user | external | internal
        FunctionError         user code raised; __cause__ is the original
        ServiceError          ServiceStartError, ServiceTimeoutError, ServiceUnavailableError, HeldBackError
        CleanupError          CleanupTimeoutError
        CheckpointError       checkpoints of a durable job cannot be used, read or written
        ConnectorError        files or servers behind a source or a sink
        JobErrorGroup         several of them, the first cause first
      ControlError            JobNotFoundError, ServerUnreachableError, AuthenticationError
      InternalError           a bug of ours: says so, asks for a report

Primary messages are lower case without a full stop and name the culprit; a note (`__notes__`) says how to fix it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, TypeVar

if TYPE_CHECKING:
    from collections.abc import Sequence


class SageError(Exception):
    """Any error that SAGE raises of its own."""


class GraphError(SageError, ValueError, TypeError):
    """The program is wrong; nothing was started.

    It is a `ValueError` and a `TypeError` too, so that programs that catch those for a bad argument go on to work.

    Attributes:
        problems: every problem that was found, this error itself when there is only one.
    """

    def __init__(self, message: str, problems: Sequence[GraphError] = ()) -> None:
        super().__init__(message)
        self.problems: tuple[GraphError, ...] = tuple(problems) or (self,)


class FutureError(GraphError, RuntimeError):
    """A future stream is never filled, or is filled twice."""


class DuplicateNameError(GraphError):
    """Two operators or two services have the same name."""


class UnknownServiceError(GraphError):
    """A service or a method of one is used that is not there; the message lists the known ones."""


class UnsupportedPlanError(GraphError):
    """The backend cannot run this graph."""


class JobError(SageError):
    """A job, or a part of one, failed.

    Attributes:
        job: the job's name, or None where it is not known.
        operator: the name of the operator that failed, or None.
        service: the name of the service that failed, or None.
        fault: whose fault it is: "user", "external" or "internal".
    """

    def __init__(
        self,
        message: str,
        *,
        job: str | None = None,
        operator: str | None = None,
        service: str | None = None,
        fault: str = "user",
    ) -> None:
        super().__init__(message)
        self.job = job
        self.operator = operator
        self.service = service
        self.fault = fault


class FunctionError(JobError):
    """A user's function raised; the original is `__cause__`.

    Attributes:
        record: the record it failed on, shortened, or None outside of one.
    """

    record: str | None = None


class ServiceError(JobError):
    """Something about a service went wrong."""


class ServiceStartError(ServiceError):
    """A service could not be built, set up or started, or never got ready; the original is `__cause__`."""


class ServiceTimeoutError(ServiceError, TimeoutError):
    """A call of a service took longer than its time-out; its late answer is dropped."""


class ServiceUnavailableError(ServiceError):
    """The service is not running: not yet, no more, or it failed."""


class HeldBackError(ServiceUnavailableError):
    """A call of a service was not begun, because the job ends; its record counts as undelivered, not as failed."""


class ReplayError(ServiceError):
    """A call of a service was to be answered from a cassette, which does not have it."""


class CleanupError(JobError):
    """A `stop`, `cleanup` or `close` raised; everything else was cleaned all the same."""


class CleanupTimeoutError(CleanupError, TimeoutError):
    """A task or a hook of a service did not end within its bound and was abandoned; a note shows where it stands."""


class CheckpointError(JobError):
    """The checkpoints of a durable job cannot be used, read or written, or do not fit its graph."""


class ConnectorError(JobError):
    """Files or servers behind a source or a sink cannot be used."""


class JobErrorGroup(ExceptionGroup[Exception], JobError):
    """Several errors of one job, the first cause first. Both `except JobError` and `except*` catch it."""

    def __new__(cls, message: str, errors: Sequence[Exception], **_: str | None) -> JobErrorGroup:
        """Build the group; `ExceptionGroup` reads its arguments here."""
        return super().__new__(cls, message, errors)

    def __init__(self, message: str, errors: Sequence[Exception], *, job: str | None = None) -> None:
        JobError.__init__(self, message, job=job)
        self.args = (message, errors)

    def derive(self, excs: Sequence[Exception]) -> JobErrorGroup:  # type: ignore[override]
        """Return a group of some of the errors, as `except*` needs it."""
        return JobErrorGroup(self.message, excs, job=self.job)


class ControlError(SageError):
    """A request to a job manager or to a cluster failed."""


class JobNotFoundError(ControlError, KeyError):
    """No job has this id."""

    def __str__(self) -> str:
        return str(self.args[0])


class ServerUnreachableError(ControlError):
    """Nothing answers at the address of the job manager or of the cluster."""


class AuthenticationError(ControlError):
    """The job manager or the cluster requires a token, and it is missing or wrong."""


class InternalError(SageError):
    """A bug of SAGE itself. Please report it with the traceback."""


def is_held_back(error: BaseException) -> bool:
    """Return whether an error came of a `HeldBackError`, also one that user code replaced by its own."""
    seen: set[int] = set()
    todo = [error]
    while todo:
        one = todo.pop()
        if isinstance(one, HeldBackError):
            return True
        if id(one) not in seen:
            seen.add(id(one))
            parts = one.exceptions if isinstance(one, BaseExceptionGroup) else ()
            todo += filter(None, (one.__cause__, one.__context__, *parts))
    return False


E = TypeVar("E", bound=BaseException)


def hint(error: E, note: str) -> E:
    """Add a note to `error` that says how to fix it, and return `error`."""
    error.add_note(note)
    return error


def short(value: object, length_max: int = 120) -> str:
    """Return a representation of `value` that is safe to put into a message: bounded, and never raising."""
    try:
        text = repr(value)
    except Exception as error:
        text = f"<{type(value).__name__}, its repr raised {type(error).__name__}>"
    return text if len(text) <= length_max else text[: length_max - 3] + "..."


def describe(error: BaseException) -> str:
    """Return type and text of `error`, also when its `__str__` is broken."""
    try:
        text = str(error)
    except Exception as broken:
        text = f"<its str raised {type(broken).__name__}>"
    return f"{type(error).__name__}: {text}" if text else type(error).__name__
