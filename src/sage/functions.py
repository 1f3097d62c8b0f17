"""The classes that users derive from: one method to write, `execute`."""

from __future__ import annotations

import inspect
from typing import TYPE_CHECKING, Any

from sage.service import ServiceUser, UserContext

if TYPE_CHECKING:
    from collections.abc import Iterable

    from sage.service import ServiceHandle


class StopSignal:
    """What a source returns to say that nothing follows."""

    def __init__(self, message: str = "Stop", source: str | None = None, payload: Any = None) -> None:
        self.message = message
        self.source = source
        self.payload = payload

    @property
    def name(self) -> str:
        """The text of the signal."""
        return self.message

    def __repr__(self) -> str:
        return f"<StopSignal {self.message}>"


class TaskContext(UserContext):
    """What a function may know of the task that runs it.

    Attributes:
        name: the operator's name.
        parallel_index: which of the parallel tasks this is, from 0.
        parallelism: how many parallel tasks the operator has.
        key: the key of the record in hand, on a keyed stream.
    """

    def __init__(
        self, name: str, services: dict[str, ServiceHandle[Any]], parallel_index: int = 0, parallelism: int = 1
    ) -> None:
        super().__init__(name, services)
        self.parallel_index = parallel_index
        self.parallelism = parallelism
        self.key: Any = None

    def get_key(self) -> Any:
        """Return the key of the record in hand, or None on a stream without keys."""
        return self.key


class BaseFunction(ServiceUser):
    """A function with a life: the engine builds one instance for each task and never shares it.

    `open()` is called before the first record and `close()` after the last, on the task's own thread; `close` exactly
    once if `open` began, whatever ends the job. Both are optional, and so is calling `super().__init__()`.

    Attributes:
        ctx: the task's context, set after the constructor and before `open`.
    """

    def open(self) -> None:
        """Acquire what is needed; called once before the first record."""

    def close(self) -> None:
        """Release everything; called once after the last record, also after failure, stop and Ctrl-C."""


class BatchFunction(BaseFunction):
    """A bounded source: `execute()` is called until it returns None or a `StopSignal`; an exception is an error."""

    def execute(self) -> Any:
        """Return the next record, or None at the end."""
        raise NotImplementedError


class SourceFunction(BaseFunction):
    """An unbounded source: `execute()` returns a record, None for nothing now, or a `StopSignal` at the end.

    Set `use_metronome = True` to let one record at a time through the whole job.
    """

    use_metronome: bool = False

    def execute(self) -> Any:
        """Return the next record, None, or a `StopSignal`."""
        raise NotImplementedError


class MapFunction(BaseFunction):
    """One record out for each record in; returning None drops the record."""

    def execute(self, data: Any) -> Any:
        """Return the record that takes the place of `data`."""
        raise NotImplementedError


class FilterFunction(BaseFunction):
    """Keeps the records for which `execute` returns something true."""

    def execute(self, data: Any) -> bool:
        """Return whether `data` goes on."""
        raise NotImplementedError


class FlatMapFunction(BaseFunction):
    """Any number of records out for each record in: what was collected, then what `execute` returns or yields."""

    _collected: list[Any] | None = None

    def collect(self, value: Any) -> None:
        """Emit `value`, before what `execute` returns."""
        if self._collected is None:
            self._collected = []
        self._collected.append(value)

    def execute(self, data: Any) -> Iterable[Any] | None:
        """Return or yield records, or call `collect`, or both."""
        raise NotImplementedError


class ProcessFunction(FlatMapFunction):
    """A flat map that may also emit at the end: `finish()` is called once, when all inputs ended by themselves."""

    def finish(self) -> Iterable[Any] | None:
        """Return or yield the last records, or call `collect`; not called after a failure or a cancel."""
        return None


class SinkFunction(BaseFunction):
    """The end of a stream."""

    def execute(self, data: Any) -> Any:
        """Take in `data`; what is returned is ignored."""
        raise NotImplementedError


class KeyByFunction(BaseFunction):
    """Finds the key of a record."""

    def execute(self, data: Any) -> Any:
        """Return the key of `data`."""
        raise NotImplementedError


class BaseCoMapFunction(BaseFunction):
    """One method for each input of connected streams: `map0`, `map1`, ...; returning None drops the record."""


class BaseJoinFunction(BaseFunction):
    """Joins two keyed streams: `execute` sees each record with its key and the number of its input."""

    def execute(self, payload: Any, key: Any, tag: int) -> Iterable[Any] | None:
        """Return the matches of `payload`.

        Args:
            payload: the record.
            key: its key.
            tag: 0 for the first stream, 1 for the second.
        """
        raise NotImplementedError


class FutureFunction(BaseFunction):
    """Stands for a stream that is filled later; see `Environment.from_future`."""


def is_coroutine_function(target: Any) -> bool:
    """Return whether calling `target` gives a coroutine, also for objects with `__call__`."""
    return inspect.iscoroutinefunction(target) or inspect.iscoroutinefunction(getattr(target, "__call__", None))  # noqa: B004
