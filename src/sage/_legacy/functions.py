"""The function and service classes of old programs: those of SAGE, with the old ways to reach services and state."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Protocol

from sage import functions, service
from sage.errors import GraphError, hint

if TYPE_CHECKING:
    import logging
    from collections.abc import Callable, Iterator

KINDS: dict[str, type[functions.BaseFunction]] = {}
"""The function classes by the kind of operator that they are for; filled below."""


class CallService:
    """`self.call_service`: call it with a service's name, or look the name up as programs of mid-2025 do."""

    def __init__(self, user: service.ServiceUser) -> None:
        self._user = user

    def __call__(self, name: str, *args: object, **kwargs: Any) -> object:
        """Call a service; see `ServiceUser.call_service`."""
        return service.ServiceUser.call_service(self._user, name, *args, **kwargs)

    def __getitem__(self, name: str) -> object:
        """Return the service, whose methods can be called."""
        return self._user.service(name)


class CallServiceAsync:
    """`self.call_service_async`: as `CallService`, but each call returns a future."""

    def __init__(self, user: service.ServiceUser) -> None:
        self._user = user

    def __call__(self, name: str, *args: object, **kwargs: Any) -> object:
        """Start a call; see `ServiceUser.call_service_async`."""
        return service.ServiceUser.call_service_async(self._user, name, *args, **kwargs)

    def __getitem__(self, name: str) -> object:
        """Return an object whose methods start calls of the service."""
        return FutureMethods(self, name)


class FutureMethods:
    """The methods of one service; each returns a future of its answer."""

    def __init__(self, start: CallServiceAsync, name: str) -> None:
        self._start = start
        self._name = name

    def __getattr__(self, method: str) -> Callable[..., object]:
        def call(*args: object, **kwargs: object) -> object:
            return self._start(self._name, *args, method=method, **kwargs)

        return call


class OldContext:
    """The context of a function or service, with the attributes that old programs read."""

    def __init__(self, context: service.UserContext, user: OldUser) -> None:
        self._context = context
        self._user = user

    def __getattr__(self, name: str) -> Any:
        return getattr(self._context, name)

    @property
    def call_service(self) -> CallService:
        """The same as `call_service` of the function."""
        return CallService(self._user)

    @property
    def call_service_async(self) -> CallServiceAsync:
        """The same as `call_service_async` of the function."""
        return CallServiceAsync(self._user)

    @property
    def logger(self) -> logging.Logger:
        """The function's logger."""
        return self._user.logger

    @property
    def env_name(self) -> str:
        """The name of the environment."""
        return self._user._env_name

    @property
    def env_base_dir(self) -> str | None:
        """The folder of the environment's log files, or None if it writes no logs."""
        return self._user._env_base_dir


class OldUser(service.ServiceUser):
    """The additions to `ServiceUser` for old functions and services.

    Attributes:
        __state_include__: the attributes that `get_state` returns; all of them if this is empty.
        __state_exclude__: the attributes that `get_state` leaves out.
    """

    __state_include__: list[str] = []  # noqa: RUF012  (subclasses assign plain lists)
    __state_exclude__: list[str] = []  # noqa: RUF012

    # The environment sets both on a subclass of the user's class.
    _env_name = ""
    _env_base_dir: str | None = None
    _old_context: OldContext | None = None

    call_service: Any = property(CallService)
    call_service_async: Any = property(CallServiceAsync)

    @property
    def ctx(self) -> Any:
        """The context; None outside of a job."""
        return self._old_context

    @ctx.setter
    def ctx(self, context: service.UserContext | None) -> None:
        self._old_context = None if context is None else OldContext(context, self)

    def get_state(self) -> dict[str, object]:
        """Return the attributes that make up the state of this function."""
        names = self.__state_include__ or vars(self)
        kept = (name for name in names if name not in self.__state_exclude__ and name != "_old_context")
        return {name: getattr(self, name) for name in kept if hasattr(self, name)}

    def restore_state(self, state: dict[str, object]) -> None:
        """Set the attributes of a state that `get_state` returned."""
        vars(self).update(state)


class BaseFunction(OldUser, functions.BaseFunction):
    """A function of any kind."""


class BatchFunction(OldUser, functions.BatchFunction):
    """A bounded source."""


class SourceFunction(OldUser, functions.SourceFunction):
    """An unbounded source."""


class MapFunction(OldUser, functions.MapFunction):
    """One record out for each record in; None drops the record."""


class FilterFunction(OldUser, functions.FilterFunction):
    """Keeps the records for which `execute` returns something true."""


class FlatMapFunction(OldUser, functions.FlatMapFunction):
    """Any number of records out: those that `execute` returns, then those collected."""

    @property
    def out(self) -> FlatMapFunction:
        """The collector: `self.out.collect(x)` is `self.collect(x)`."""
        return self


class SinkFunction(OldUser, functions.SinkFunction):
    """The end of a stream."""


class KeyByFunction(OldUser, functions.KeyByFunction):
    """Finds the key of a record."""


class BaseCoMapFunction(OldUser, functions.BaseCoMapFunction):
    """One method for each input."""


class BaseJoinFunction(OldUser, functions.BaseJoinFunction):
    """Joins two keyed streams."""


class FutureFunction(OldUser, functions.FutureFunction):
    """Stands for a stream that is filled later."""


class BaseService(OldUser, service.BaseService):
    """A service."""


KINDS |= {
    "batch": BatchFunction,
    "source": SourceFunction,
    "map": MapFunction,
    "filter": FilterFunction,
    "flatmap": FlatMapFunction,
    "sink": SinkFunction,
    "keyby": KeyByFunction,
    "comap": BaseCoMapFunction,
    "join": BaseJoinFunction,
    "future": FutureFunction,
}


def wrap_lambda(func: Callable[..., object], func_type: str = "map", *, kind: str | None = None) -> type[Any]:
    """Return a function class whose `execute` is `func`.

    Args:
        func: any callable.
        func_type: "batch", "source", "map", "filter", "flatmap", "sink", "keyby" or "join".
        kind: another name of `func_type`.

    Raises:
        GraphError: the kind does not exist, or its functions do not have `execute`.
    """
    wanted = kind if kind is not None else func_type
    parent = KINDS.get(wanted)
    if parent is None or not hasattr(parent, "execute"):
        known = ", ".join(f'"{name}"' for name, type_ in KINDS.items() if hasattr(type_, "execute"))
        raise hint(GraphError(f"wrap_lambda: kind is {wanted!r}"), f"It is one of {known}.")
    return type(f"Lambda{parent.__name__}", (parent,), {"execute": staticmethod(func)})


class Collecting(Protocol):
    """A flat map, in which `collect` leaves records."""

    _collected: list[object] | None


def one_by_one(function: Callable[[object, object], object]) -> Callable[[Collecting, object], Iterator[object]]:
    """Return an `execute` for a flat map: the records of `function(self, data)` come first, then those collected.

    Old flat maps may return one value or a text, which is one record.
    """

    def execute(self: Collecting, data: object) -> Iterator[object]:
        returned: Any = function(self, data)
        collected, self._collected = getattr(self, "_collected", None), None
        if returned is not None:
            is_one = isinstance(returned, str | bytes | dict) or not hasattr(returned, "__iter__")
            yield from [returned] if is_one else returned
        # A generator collects while it is read.
        more, self._collected = getattr(self, "_collected", None), None
        yield from (*(collected or ()), *(more or ()))

    return execute
