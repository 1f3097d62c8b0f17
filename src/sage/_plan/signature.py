"""Turns a user's function into a `FunctionSpec`, or raises an error that explains the problem."""

from __future__ import annotations

import inspect
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any, TypeVar, get_origin

from sage import functions
from sage._arguments import check_count
from sage._iterables import why_not_records
from sage._plan.logical import FunctionSpec, Kind, Place
from sage.connector import Source, TransactionalSink
from sage.errors import GraphError, hint, short
from sage.service import BaseService, ServiceHandle, ServiceMethod, ServiceUser

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

F = TypeVar("F")

# Which function classes an operator takes, and how many records its function is called with.
ACCEPTED: dict[Kind, tuple[tuple[type, ...], int]] = {
    Kind.SOURCE: ((functions.BatchFunction, functions.SourceFunction), 0),
    Kind.MAP: ((functions.MapFunction,), 1),
    Kind.MAP_ASYNC: ((functions.MapFunction,), 1),
    Kind.MAP_BATCHES: ((functions.MapFunction,), 1),
    Kind.FILTER: ((functions.FilterFunction,), 1),
    Kind.FLATMAP: ((functions.FlatMapFunction,), 1),
    Kind.PROCESS: ((functions.ProcessFunction,), 1),
    Kind.SINK: ((functions.SinkFunction,), 1),
    Kind.KEYBY: ((functions.KeyByFunction,), 1),
    Kind.REDUCE: ((), 2),
    Kind.STATEFUL_MAP: ((), 2),
    Kind.COMAP: ((functions.BaseCoMapFunction,), 1),
    Kind.JOIN: ((functions.BaseJoinFunction,), 3),
}

WITH_STATES = frozenset({Kind.MAP, Kind.FILTER, Kind.FLATMAP, Kind.PROCESS, Kind.SINK, Kind.JOIN})
"""The kinds that call their function with one record after another, so that it may have states of keys; comap, too."""

KINDS_OF_FUNCTION = tuple(type_ for types, _ in ACCEPTED.values() for type_ in types)


def place_of(
    at: object,
    num_cpus: float = 0.0,
    num_gpus: float = 0.0,
    resources: Mapping[str, float] | None = None,
) -> Place:
    """Check a user's place and return it.

    Raises:
        GraphError: the place does not exist, or resources cannot be reserved there.
    """
    if at not in ("cluster", "driver"):
        raise hint(GraphError(f"a place is at {at!r}"), 'It is at the "cluster" or at the "driver".')
    wanted: dict[str, object] = {"num_cpus": num_cpus, "num_gpus": num_gpus, **(resources or {})}
    for name, amount in wanted.items():
        if not isinstance(amount, int | float) or isinstance(amount, bool) or amount < 0:
            raise GraphError(f"a place reserves {name}={short(amount)}, which is not an amount")
    if at == "driver" and any(wanted.values()):
        reserved = ", ".join(name for name, amount in wanted.items() if amount)
        error = GraphError(f"a place at the driver reserves {reserved}")
        raise hint(error, "Only processes of the cluster reserve something; the driver runs already.")
    return Place("driver" if at == "driver" else "cluster", num_cpus, num_gpus, tuple((resources or {}).items()))


def class_of(target: object) -> object:
    """Return the class where `target` is one with type arguments, such as `Tag[int]`; else `target` itself."""
    origin = get_origin(target)
    return origin if isinstance(origin, type) else target


def function_spec(kind: Kind, target: object, args: tuple[object, ...], kwargs: dict[str, object]) -> FunctionSpec:
    """Check `target` and return it as a spec, with the operator's `capacity` if that is among the keywords.

    Raises:
        GraphError: it is not a function, a function of another kind, or takes another number of records.
        TypeError: its constructor does not take these arguments, or it takes none.
    """
    target = class_of(target)
    kwargs, capacity = _capacity(kind, target, kwargs)
    spec = replace(_function_spec(kind, target, args, kwargs), capacity=capacity)
    if kind not in WITH_STATES and spec.states:
        label = f"{spec.label}.{next(iter(spec.states))} is a state of each key"
        error = GraphError(f"{label}, and {kind} does not call its function with one record of a key after another")
        raise hint(error, f"Use one of {', '.join(sorted(WITH_STATES))}.")
    return spec


def _capacity(kind: Kind, target: object, kwargs: dict[str, object]) -> tuple[dict[str, object], int | None]:
    """Take the operator's `capacity` out of the keywords; a class with an argument of that name gets it itself."""
    if "capacity" not in kwargs or (
        isinstance(target, type) and _is_function_class(target) and _takes_capacity(target)
    ):
        return kwargs, None
    rest = {name: value for name, value in kwargs.items() if name != "capacity"}
    return rest, None if kwargs["capacity"] is None else check_count(f"{kind}: capacity is", kwargs["capacity"])


def _takes_capacity(target: type) -> bool:
    try:
        parameters = inspect.signature(target.__init__).parameters  # type: ignore[misc]
    except (TypeError, ValueError):
        return False
    takes_all = any(one.kind is inspect.Parameter.VAR_KEYWORD for one in parameters.values())
    return "capacity" in parameters or (takes_all and target.__init__ is not ServiceUser.__init__)  # type: ignore[misc]


def _function_spec(kind: Kind, target: object, args: tuple[object, ...], kwargs: dict[str, object]) -> FunctionSpec:
    if kind is Kind.SINK and isinstance(target, TransactionalSink) and not (args or kwargs):
        return FunctionSpec(target)
    if isinstance(target, type) and (_is_function_class(target) or issubclass(target, BaseService)):
        _check_kind(kind, target)
        _check_constructor(kind, target, args, kwargs)
        _check_records(kind, target, "execute", bound=False)
        return FunctionSpec(target, True, args, kwargs)
    if args or kwargs:
        given = ", ".join([*map(short, args), *(f"{key}={short(value)}" for key, value in kwargs.items())])
        useless = TypeError(f"{kind}({_label(target)}, {given}): these arguments have no effect")
        raise hint(useless, "Only a function class takes arguments; bind them with functools.partial or a lambda.")
    if isinstance(target, functions.BaseFunction) or (
        hasattr(target, "execute") and not isinstance(target, type | ServiceHandle)
    ):
        _check_kind(kind, type(target))
        _check_records(kind, target, "execute", bound=True)
        return FunctionSpec(target)
    if isinstance(target, type) and target.__module__ != "builtins":
        error = GraphError(f"{kind}({target.__name__}): the class {target.__name__} is not a function class")
        wanted = " or ".join(type_.__name__ for type_ in ACCEPTED[kind][0]) or "a plain function"
        note = (
            f"Derive it from {wanted} and write execute(), or call it for each record: lambda x: {target.__name__}(x)."
        )
        raise hint(error, note)
    if not callable(target):
        error = GraphError(f"{kind}({short(target)}): {type(target).__name__} is not callable")
        raise hint(error, "Give a function class, an instance of one, or a callable.")
    _check_records(kind, target, None, bound=True)
    return FunctionSpec(target)


def async_spec(target: object, args: tuple[object, ...], kwargs: dict[str, object]) -> FunctionSpec:
    """Check a function of `map_async`, which has to be a coroutine function, and return it as a spec.

    Raises:
        GraphError: it is not a function, or `function_spec` refuses it.
        TypeError: its constructor does not take these arguments, or it takes none.
    """
    target = class_of(target)
    spec = function_spec(Kind.MAP_ASYNC, target, args, kwargs)
    if isinstance(target, ServiceMethod | ServiceHandle):
        return spec  # the class of the service, if there is one, is looked at with the whole graph
    method = getattr(target, "execute", None)
    if not functions.is_coroutine_function(target if method is None else method):
        label = _label(target) if method is None else f"{_label(target)}.execute"
        error = GraphError(f"map_async({_label(target)}): {label} is not a coroutine function")
        raise hint(
            error, "Write async def instead of a lambda that returns a coroutine; use map(...) for plain functions."
        )
    return spec


def _is_function_class(target: type) -> bool:
    return issubclass(target, functions.BaseFunction) or callable(getattr(target, "execute", None))


def _label(target: object) -> str:
    return getattr(target, "__name__", None) or type(target).__name__


def _check_kind(kind: Kind, target: type) -> None:
    accepted = ACCEPTED[kind][0]
    if issubclass(target, BaseService):
        error = GraphError(f"{kind}({target.__name__}): {target.__name__} is a service, not a function")
        raise hint(error, f'Register it: env.register_service("name", {target.__name__}).')
    if issubclass(target, KINDS_OF_FUNCTION) and not issubclass(target, accepted):
        other = next(type_ for type_ in KINDS_OF_FUNCTION if issubclass(target, type_)).__name__
        wanted = " or ".join(type_.__name__ for type_ in accepted) or "a plain function"
        error = GraphError(f"{kind}({target.__name__}): {target.__name__} is a {other}")
        raise hint(error, f"{kind} takes {wanted}.")
    execute = getattr(target, "execute", None)
    if execute is None or execute in [type_.__dict__.get("execute") for type_ in KINDS_OF_FUNCTION]:
        error = GraphError(f"{kind}({target.__name__}): {target.__name__} does not define execute")
        raise hint(error, "Write a method execute; it is called with the records.")


def _constructor(target: Any) -> inspect.Signature:
    """Return the arguments of a class or callable."""
    is_user = isinstance(target, type) and issubclass(target, ServiceUser)
    if is_user and target.__init__ is ServiceUser.__init__:
        # It takes anything for the sake of constructors that hand their arguments up, and here it does not have one.
        following = super(ServiceUser, target).__init__
        return inspect.Signature() if following is object.__init__ else inspect.signature(partial(following, None))
    return inspect.signature(target)


def _check_constructor(kind: Kind, target: type, args: tuple[object, ...], kwargs: dict[str, object]) -> None:
    try:
        _constructor(target).bind(*args, **kwargs)
    except TypeError as error:
        mended = TypeError(f"{kind}({target.__name__}, ...): the constructor of {target.__name__}: {error}")
        raise hint(mended, f"What follows {target.__name__} in {kind}(...) goes to its constructor.") from None
    except ValueError:
        return  # A class written in C may not tell its signature.


def _check_records(kind: Kind, target: Any, method: str | None, *, bound: bool) -> None:
    count = ACCEPTED[kind][1]
    function = getattr(target, method) if method else target
    if isinstance(function, ServiceMethod | ServiceHandle):
        return
    _refuse_asynchronous_generator(kind, target, function)
    if method and not bound and not isinstance(inspect.getattr_static(target, method), staticmethod | classmethod):
        function = partial(function, None)
    try:
        signature = inspect.signature(function)
    except (TypeError, ValueError):
        return  # Some callables written in C do not tell their signature.
    try:
        signature.bind(*[None] * count)
    except TypeError as error:
        label = f"{_label(target)}.{method}" if method else _label(target)
        records = {0: "no arguments", 1: "one record"}.get(count, f"{count} arguments")
        mended = GraphError(
            f"{kind}({_label(target)}): {label}{inspect.signature(function)} has the wrong arity: {error}"
        )
        raise hint(mended, f"{kind} calls it with {records}.") from None


def _refuse_asynchronous_generator(kind: Kind | str, target: object, function: object) -> None:
    if inspect.isasyncgenfunction(function):
        error = GraphError(f"{kind}({_label(target)}): {_label(function)} is an asynchronous generator function")
        raise hint(error, "Write a coroutine function that returns a list, or a generator function without async.")


def plain_function(label: str, function: F, count: int) -> F:
    """Check that a function can be called with so many arguments and is not a coroutine function, and return it.

    Raises:
        GraphError: it is not such a function.
    """
    found = ""
    if not callable(function):
        found = "is not callable"
    elif functions.is_coroutine_function(function):
        found = "is a coroutine function"
    else:
        try:
            inspect.signature(function).bind(*[None] * count)
        except TypeError as refused:
            found = f"has the wrong arity: {refused}"
        except ValueError:
            pass  # Some callables written in C do not tell their signature.
    if found:
        name = getattr(function, "__name__", None) or short(function)
        error = GraphError(f"{label} is {name}, which {found}")
        raise hint(error, f"Give a plain function of {'one argument' if count == 1 else f'{count} arguments'}.")
    return function


def comap_spec(target: object, args: tuple[object, ...], kwargs: dict[str, object], inputs: int) -> FunctionSpec:
    """Check a co-map function: a class or instance with `map0` to `map<n>`, or a list of callables.

    Raises:
        GraphError: a method is missing, or the number of callables is not that of the inputs.
        TypeError: its constructor does not take these arguments.
    """
    target = class_of(target)
    kwargs, capacity = _capacity(Kind.COMAP, target, kwargs)
    if isinstance(target, list | tuple) or (callable(target) and not isinstance(target, type) and args):
        callables = [*target, *args] if isinstance(target, list | tuple) else [target, *args]
        if kwargs:
            raise TypeError(f"comap: {', '.join(kwargs)} given beside callables have no effect")
        if len(callables) != inputs:
            raise GraphError(f"comap: {len(callables)} callables for {inputs} inputs")
        for function in callables:
            function_spec(Kind.COMAP, function, (), {})
        return FunctionSpec(tuple(callables), capacity=capacity)
    missing = [f"map{port}" for port in range(inputs) if not callable(getattr(target, f"map{port}", None))]
    if missing:
        error = GraphError(f"comap({_label(target)}): {_label(target)} has no {', '.join(missing)}")
        raise hint(error, f"Give a class with map0 to map{inputs - 1}, or a list of {inputs} callables.")
    for port in range(inputs):
        _check_records(Kind.COMAP, target, f"map{port}", bound=not isinstance(target, type))
    if isinstance(target, type):
        _check_constructor(Kind.COMAP, target, args, kwargs)
        return FunctionSpec(target, True, args, kwargs, capacity)
    return FunctionSpec(target, capacity=capacity)


def check_service_arguments(name: str, target: object, args: tuple[object, ...], kwargs: dict[str, object]) -> None:
    """Raise TypeError if the constructor of a service does not take the arguments it was registered with."""
    try:
        _constructor(target).bind(*args, **kwargs)
    except TypeError as error:
        mended = TypeError(f'service "{name}": {_label(target)}: {error}')
        raise hint(mended, f"What follows {_label(target)} in register_service(...) goes to it.") from None
    except ValueError:
        return  # Code written in C may not have a signature.


def source_spec(target: object, args: tuple[object, ...], kwargs: dict[str, object], *, bounded: bool) -> FunctionSpec:
    """Check the input of a source: a function class or instance, a `Source`, an iterable, or a callable.

    Raises:
        GraphError: it is not one of these, or it would be taken apart into something other than records, such as
            letters.
        TypeError: arguments are given that have no effect.
    """
    method = "from_batch" if bounded else "from_source"
    target = class_of(target)
    if isinstance(target, functions.BaseFunction) or (isinstance(target, type) and _is_function_class(target)):
        return function_spec(Kind.SOURCE, target, args, kwargs)
    if isinstance(target, type) and issubclass(target, Source):
        _check_constructor(Kind.SOURCE, target, args, kwargs)
        return FunctionSpec(target, True, args, kwargs)
    if callable(target) and not isinstance(target, type):
        try:
            inspect.signature(target).bind(*args, **kwargs)
        except TypeError as refused:
            wrong = TypeError if args or kwargs else GraphError
            mended = wrong(f"{method}({_label(target)}): {refused}")
            raise hint(mended, "A source calls its function without a record.") from None
        except ValueError:
            pass
        return FunctionSpec(partial(target, *args, **kwargs) if args or kwargs else target)
    if args or kwargs:
        names = ", ".join([*map(short, args), *kwargs])
        raise hint(
            TypeError(f"{method}({_label(target)}, ...): {names} have no effect"), "Only a class takes arguments."
        )
    found = why_not_records(target) if bounded else None
    if found is not None:
        what, note = found
        raise hint(GraphError(f"{method}({short(target)}): {what} is not a collection of records"), note)
    is_read = hasattr(target, "__aiter__") or (bounded and hasattr(target, "__iter__"))
    if isinstance(target, Source) or (is_read and not isinstance(target, type)):
        return FunctionSpec(target)
    error = GraphError(f"{method}({short(target)}): {type(target).__name__} is not a source")
    wanted = (
        "a BatchFunction class, a list or any iterable, a generator function or a Source"
        if bounded
        else "a SourceFunction class, a callable without arguments, a generator function or a Source"
    )
    raise hint(error, f"Give {wanted}.")


def builder_of(service: object) -> Callable[..., object]:
    """Return a class or a function as it is, and for any other object a function that returns it."""
    if isinstance(service, type | partial) or inspect.isroutine(service):
        builder: Callable[..., object] = service
        return builder
    return lambda: service
