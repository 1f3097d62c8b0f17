"""Messages of brokers: values as JSON, text or bytes, and sinks that keep them until their checkpoint is complete."""

from __future__ import annotations

import json
import logging
from abc import abstractmethod
from collections import deque
from typing import TYPE_CHECKING, Generic, TypeVar

from sage.connector import Source, TransactionalSink
from sage.errors import ConnectorError, GraphError, describe, hint, short

if TYPE_CHECKING:
    from collections.abc import Collection, Iterable, Sequence

logger = logging.getLogger(__name__)

M = TypeVar("M")
R = TypeVar("R")

FORMATS = ("json", "text", "bytes")
LOST = ("fail", "earliest", "latest")
POLL_S = 0.1
"""How long a read waits for messages at most, so that a stop is prompt."""


def check_choice(label: str, value: object, choices: Collection[str]) -> None:
    """Raise GraphError for a value that is not one of the choices."""
    if value not in choices:
        raise hint(GraphError(f"{label} is {short(value)}"), f"Give one of: {', '.join(choices)}.")


def decode(format: str, raw: bytes) -> object:
    """Return a value in a format; ValueError if it is not in it."""
    if format == "bytes":
        return raw
    try:
        return raw.decode() if format == "text" else json.loads(raw)
    except (ValueError, RecursionError) as error:
        raise ValueError("is not text in UTF-8" if format == "text" else "is not JSON") from error


def encode(format: str, value: object, record: object) -> bytes:
    """Return a value as bytes; ConnectorError, which names its record, if the format does not have it."""
    try:
        if format == "json":
            return json.dumps(value, ensure_ascii=False).encode()
        if isinstance(value, str):
            return value.encode()
        if isinstance(value, bytes) and format == "bytes":
            return value
        raise TypeError(f"it is of type {type(value).__name__}")
    except (TypeError, ValueError, RecursionError) as error:
        refused = ConnectorError(f"record {short(record)} cannot be written as {format}: {describe(error)}")
        raise hint(refused, f"Map it before the sink, or give another format: {', '.join(FORMATS)}.") from error


class BrokerSource(Source[R], Generic[M, R]):
    """Reads messages, and fails at a value that is not in its format, or counts and leaves it out.

    Args:
        follow: whether it goes on after the messages that were there when it was opened.
        begin: where it begins without a position: "earliest" or "latest".
        lost: where it goes on if the position is gone: "earliest", "latest", or "fail".
        bad_values: "fail" or "skip".
    """

    def __init__(self, *, follow: bool, begin: str, lost: str, bad_values: str) -> None:
        owner = type(self).__name__
        check_choice(f"{owner}: begin", begin, LOST[1:])
        check_choice(f"{owner}: lost", lost, LOST)
        check_choice(f"{owner}: bad_values", bad_values, ("fail", "skip"))
        self._follows = follow
        self.bounded = not follow
        self._begin = begin
        self._lost = lost
        self._skips = bad_values == "skip"
        self._left: deque[M] = deque()

    def read(self, records_max: int) -> list[R] | None:
        """Return the next records."""
        records: list[R] = []
        for _ in range(records_max):
            if not self._left:
                found = None if records else self._fetch(records_max)
                if not found:
                    return records if records or found is not None else None
                self._left.extend(found)
            message = self._left[0]
            try:
                records += self._records(message)
            except ValueError as error:
                if records and not self._skips:
                    break  # those before it go on first
                self._bad(message, error)
            self._pass(message)
            self._left.popleft()
        return records

    @abstractmethod
    def _fetch(self, records_max: int) -> Sequence[M] | None:
        """Return the next messages after waiting at most `POLL_S`; None at the end."""

    @abstractmethod
    def _records(self, message: M) -> Iterable[R]:
        """Return the record of a message, or none; ValueError if its value is not in the format."""

    @abstractmethod
    def _pass(self, message: M) -> None:
        """Let the position be behind a message."""

    @abstractmethod
    def _place(self, message: M) -> str:
        """Return where a message is, for people."""

    def _bad(self, message: M, error: ValueError) -> None:
        text = f"{self._place(message)}: the value {error}"
        if not self._skips:
            failed = ConnectorError(text, fault="external")
            raise hint(failed, 'Leave such values out with bad_values="skip", or take them with another format.')
        self.skipped += 1
        if self.skipped == 1:
            logger.warning("skipped: %s; the report counts all such values", text)

    def _gone(self, text: str) -> ConnectorError:
        note = 'Begin at the first one that is there with lost="earliest", or at new ones with lost="latest".'
        return hint(ConnectorError(text, fault="external"), note)


class BrokerSink(TransactionalSink[object], Generic[M]):
    """Keeps messages in memory and in the checkpoint, until they are written with its number."""

    def __init__(self) -> None:
        self._kept: list[M] = []

    def write(self, batch: Sequence[object]) -> None:
        """Keep the messages.

        Raises:
            ConnectorError: a record cannot be written.
        """
        self._kept += map(self._raw, batch)

    @abstractmethod
    def _raw(self, record: object) -> M:
        """Return a record as it is written; ConnectorError if it cannot be."""

    def prepare(self, number: int) -> tuple[int, list[M]] | None:
        """Return the messages with the number of their checkpoint."""
        kept, self._kept = self._kept, []
        return (number, kept) if kept else None

    def abort(self) -> None:
        """Forget the messages that were not prepared."""
        self._kept = []

    def _later(self, place: str, committed: int, checkpoint: int) -> ConnectorError:
        text = f"{place} has records of checkpoint {committed}, and the job goes on from checkpoint {checkpoint}"
        note = (
            'A damaged checkpoint was left out, so that records would come twice. submit(resume="never") begins anew.'
        )
        return hint(ConnectorError(text, fault="external"), note)
