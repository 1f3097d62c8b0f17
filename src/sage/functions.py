"""The classes that users derive from: one method to write, `execute`."""

from __future__ import annotations

import inspect
import threading
from types import BuiltinFunctionType, FunctionType
from typing import TYPE_CHECKING, Any, Generic

from sage._arguments import check_seconds
from sage._types import A_contra, B_contra, K_co, T, T_co, U_co
from sage.service import ServiceUser, UserContext

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Coroutine, Iterable, Mapping
    from typing import TypeGuard

    from sage.service import ServiceHandle


class StopSignal:
    """A source returns this to say that it has ended."""

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


class Stopping:
    """Whether a task is to end soon, for functions that look, and for those that wait.

    Args:
        wait_for: waits for a condition, as a thread of the job has to.
    """

    def __init__(self, wait_for: Callable[[threading.Condition, Callable[[], bool], float], bool]) -> None:
        self.is_set = False
        self._wait_for = wait_for
        self._condition = threading.Condition()

    def set(self) -> None:
        """Wake everyone who waits."""
        with self._condition:
            self.is_set = True
            self._condition.notify_all()

    def wait(self, seconds: float) -> bool:
        """Wait for some time, and return whether it is over."""
        return not self._wait_for(self._condition, lambda: self.is_set, seconds)


class TaskContext(UserContext):
    """The task that runs a function, as the function sees it.

    Attributes:
        name: the operator's name.
        parallel_index: which of the parallel tasks this is, from 0.
        parallelism: how many parallel tasks the operator has.
        key: the key of the record in hand, on a keyed stream.
    """

    def __init__(
        self,
        name: str,
        services: Mapping[str, ServiceHandle],
        parallel_index: int,
        parallelism: int,
        stopping: Stopping,
    ) -> None:
        super().__init__(name, services)
        self._stopping = stopping
        self.parallel_index = parallel_index
        self.parallelism = parallelism
        self.key: Any = None

    @property
    def is_stopping(self) -> bool:
        """Whether the function should end soon: a source was told to stop, or the job ends without a full drain."""
        return self._stopping.is_set

    def wait(self, seconds: float) -> bool:
        """Wait as `time.sleep` does, but not beyond a stop; False says that the job is stopping.

        In coroutines, `await asyncio.sleep(...)` does the same, since a stop cancels a source where it awaits.
        """
        check_seconds("ctx.wait: seconds is", seconds)
        return self._stopping.wait(seconds)

    def get_key(self) -> Any:
        """Return the key of the record in hand, or None on a stream without keys."""
        return self.key


class BaseFunction(ServiceUser):
    """A function with a life: the engine builds one instance for each task and never shares it.

    `open()` is called before the first record and `close()` after the last, on the task's own thread; `close` exactly
    once if `open` began, however the job ends. Both are optional, and so is calling `super().__init__()`.

    Attributes:
        ctx: the task's context, set after the constructor and before `open`.
    """

    ctx: TaskContext

    def open(self) -> None:
        """Acquire resources; called once before the first record."""

    def close(self) -> None:
        """Release everything; called once after the last record, also after failure, stop and Ctrl-C."""


class BatchFunction(BaseFunction, Generic[T_co]):
    """A bounded source: `execute()` is called until it returns None or a `StopSignal`; an exception is an error."""

    def execute(self) -> T_co | StopSignal | Awaitable[T_co | StopSignal | None] | None:
        """Return the next record, or None at the end."""
        raise NotImplementedError


class SourceFunction(BaseFunction, Generic[T_co]):
    """An unbounded source: `execute()` returns a record, None for nothing now, or a `StopSignal` at the end.

    Set `use_metronome = True` to let one record at a time through the whole job.
    """

    use_metronome: bool = False

    def execute(self) -> T_co | StopSignal | Awaitable[T_co | StopSignal | None] | None:
        """Return the next record, None, or a `StopSignal`."""
        raise NotImplementedError


class MapFunction(BaseFunction, Generic[A_contra, U_co]):
    """One record out for each record in; returning None drops the record."""

    def execute(self, data: A_contra, /) -> U_co | Awaitable[U_co] | None:
        """Return the record that takes the place of `data`."""
        raise NotImplementedError


class FilterFunction(BaseFunction, Generic[A_contra]):
    """Keeps the records for which `execute` returns something true."""

    def execute(self, data: A_contra, /) -> bool | Awaitable[bool]:
        """Return whether `data` goes on."""
        raise NotImplementedError


class FlatMapFunction(BaseFunction, Generic[A_contra, T]):
    """Any number of records out for each record in: those collected, then those that `execute` returns or yields."""

    _collected: list[T] | None = None

    def collect(self, value: T) -> None:
        """Emit `value`, before the records that `execute` returns."""
        if self._collected is None:
            self._collected = []
        self._collected.append(value)

    def execute(self, data: A_contra, /) -> Iterable[T] | Awaitable[Iterable[T] | None] | None:
        """Return or yield records, or call `collect`, or both."""
        raise NotImplementedError


class ProcessFunction(FlatMapFunction[A_contra, T]):
    """A flat map that may also emit at the end: `finish()` is called once, when all inputs ended by themselves."""

    def finish(self) -> Iterable[T] | None:
        """Return or yield the last records, or call `collect`; not called after a failure or a cancel."""
        return None


class SinkFunction(BaseFunction, Generic[A_contra]):
    """The end of a stream."""

    def execute(self, data: A_contra, /) -> object:
        """Take in `data`; the return value is ignored."""
        raise NotImplementedError


class KeyByFunction(BaseFunction, Generic[A_contra, K_co]):
    """Finds the key of a record."""

    def execute(self, data: A_contra, /) -> K_co | Awaitable[K_co]:
        """Return the key of `data`."""
        raise NotImplementedError


class BaseCoMapFunction(BaseFunction):
    """One method for each input of connected streams: `map0`, `map1`, ...; returning None drops the record."""


class BaseJoinFunction(BaseFunction, Generic[A_contra, B_contra, T_co]):
    """Joins two keyed streams: `execute` sees each record with its key and the number of its input."""

    def execute(
        self, payload: A_contra, key: B_contra, tag: int
    ) -> Iterable[T_co] | Awaitable[Iterable[T_co] | None] | None:
        """Return the matches of `payload`.

        Args:
            payload: the record.
            key: its key.
            tag: 0 for the first stream, 1 for the second.
        """
        raise NotImplementedError


class FutureFunction(BaseFunction):
    """Stands for a stream that is filled later; see `Environment.from_future`."""


def is_coroutine_function(target: object) -> TypeGuard[Callable[..., Coroutine[object, object, object]]]:
    """Return whether calling `target` gives a coroutine, also for objects with `__call__`."""
    if isinstance(target, FunctionType) and not target.__dict__:  # as most are: nothing is wrapped or marked
        return bool(target.__code__.co_flags & inspect.CO_COROUTINE)
    if isinstance(target, BuiltinFunctionType):
        return False
    return inspect.iscoroutinefunction(target) or inspect.iscoroutinefunction(getattr(target, "__call__", None))  # noqa: B004
