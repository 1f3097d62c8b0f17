"""The policies of `on_error`: how a job continues after a user's function raises on a record."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from sage._arguments import check_backoff, check_count
from sage.errors import GraphError, hint

POLICIES = ("fail", "skip")


@dataclass(frozen=True, slots=True)
class DeadLetter:
    """A record that failed, as it arrives on a stream of `Environment.dead_letters`.

    Attributes:
        value: the record, unchanged.
        error: the function's exception.
        operator: the name of the operator.
        attempts: how many times the function was called with the record.
        keys: its key, or nothing in a stream without keys.
        port: the input of the operator that it came from.
    """

    value: Any
    error: BaseException
    operator: str
    attempts: int
    keys: tuple[Any, ...] = ()
    port: int = 0


@dataclass(frozen=True, slots=True)
class FailedRecord:
    """A record that failed, as a cassette keeps it.

    Attributes:
        value: the record as it came to the operator.
        keys: its key, or nothing in a stream without keys.
        port: the input of the operator that it came from.
        operator: the name of the operator.
        error: the function's exception.
        began_at: when the function was last called with it, in seconds since the epoch.
    """

    value: object
    keys: tuple[object, ...]
    port: int
    operator: str
    error: BaseException
    began_at: float


@dataclass(frozen=True, slots=True)
class Retry:
    """Call the function again for the same record, with pauses that double.

    Attributes:
        attempts_max: how many calls in all, the first one included.
        backoff_s: first and longest pause before another call, in seconds.
        then: the policy after the last attempt has failed: "fail", "skip", or a stream of dead letters.
    """

    attempts_max: int = 3
    backoff_s: tuple[float, float] = (0.1, 10.0)
    then: object = "fail"

    def __post_init__(self) -> None:
        """Refuse values that cannot work."""
        check_count("Retry: attempts_max is", self.attempts_max)
        check_backoff("Retry: backoff_s is", self.backoff_s)
        if isinstance(self.then, Retry):
            raise hint(GraphError("Retry has another Retry as `then`"), 'It is "fail", "skip" or dead letters.')

    def pause_s(self, attempt: int) -> float:
        """Return the pause after the failed `attempt`, counted from 1, in seconds."""
        first, longest = self.backoff_s
        return min(first * 2.0 ** min(attempt - 1, 64), longest)  # a larger power overflows


@dataclass(frozen=True, slots=True)
class ErrorPolicy:
    """The policy of an operator for failed records, as the graph holds it.

    Attributes:
        then: "fail", "skip" or "letters".
        letters: the node that gets the dead letters, where `then` is "letters".
        retry: how often to try before that.
    """

    then: str = "fail"
    letters: int | None = None
    retry: Retry | None = None


FAIL = ErrorPolicy()
