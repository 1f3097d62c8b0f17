"""From a logical graph to a physical plan: validate, lower, apply the rules."""

from __future__ import annotations

import dis
from functools import lru_cache
from types import CodeType, FunctionType
from typing import TYPE_CHECKING

from sage._plan import durability
from sage._plan.logical import Kind, LogicalGraph, Node, ServiceSpec
from sage._plan.rules import RULES, edges_of, loops_of, lower, ordered
from sage.connector import Source, TransactionalSink
from sage.errors import FutureError, GraphError, UnknownServiceError, hint
from sage.functions import BaseFunction, ProcessFunction, is_coroutine_function
from sage.service import DEFAULT_METHOD, ServiceHandle, ServiceMethod, unknown_service

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from sage._plan.physical import PhysicalPlan


def plan(graph: LogicalGraph, *, fused: bool = True) -> PhysicalPlan:
    """Return the physical plan of a graph.

    Args:
        graph: the graph to run.
        fused: whether operators may share a task; without, each has its own, which only tests want.

    Raises:
        GraphError: the graph cannot run; when there are several problems, it lists them all.
    """
    problems = tuple(validate(graph))
    if len(problems) == 1:
        raise problems[0]
    if problems:
        lines = "".join(f"\n  - {problem}" for problem in problems)
        error = GraphError(f'{len(problems)} problems in "{graph.name}":{lines}', problems)
        for problem in problems:
            for note in getattr(problem, "__notes__", ()):
                hint(error, note)
        raise error
    result = lower(graph)
    for rule in RULES if fused else RULES[:1]:
        result = rule(graph, result)
    return result


def validate(graph: LogicalGraph) -> Iterator[GraphError]:
    """Yield every problem of a graph that can be seen before it runs."""
    if not graph.nodes:
        error = GraphError(f'environment "{graph.name}" has no pipeline')
        yield hint(error, "Begin one with env.from_batch(...) or env.from_source(...).")
        return
    yield from _streams(graph)
    yield from _services(graph.services)
    known = {service.name: service for service in graph.services}
    for node in graph.nodes.values():
        yield from _uses(node, known)
    if graph.is_durable:
        yield from durability.problems(graph)


def _streams(graph: LogicalGraph) -> Iterator[GraphError]:
    filled = {future for _, future in graph.feedback}
    edges = edges_of(graph)
    owners: dict[int, Node] = {}
    for node in graph.nodes.values():
        target = node.function.target if node.function else None
        if (
            isinstance(target, Source | TransactionalSink)
            and (owner := owners.setdefault(id(target), node)) is not node
        ):
            error: GraphError = GraphError(
                f'operators "{owner.name}" and "{node.name}" have one {type(target).__name__}'
            )
            yield hint(error, "It knows how far one of them is. Give each an object of its own.")
        if node.kind is Kind.FUTURE and node.id not in filled:
            error = FutureError(f'future "{node.name}" is never filled')
            yield hint(error, f"Call stream.fill_future({node.name}) with the stream that leads back into it.")
        if node.kind is Kind.SOURCE:
            yield from _source(node)
    if ordered(graph, edges) is None:
        names = ", ".join(f'"{node.name}"' for node in graph.nodes.values() if node.kind is Kind.LETTERS)
        error = GraphError(f"dead letters of {names} are handled by an operator that sends its own there")
        yield hint(error, "Give the operators after the dead letters another on_error.")
    for loop in loops_of(edges):
        for node in (graph.nodes[id_] for id_ in sorted(loop)):
            if _emits_at_the_end(node):
                error = GraphError(f'operator "{node.name}" emits when its input ends, but it is part of a loop')
                yield hint(error, "A loop ends when nothing is left in it; move the operator behind the loop.")


def _source(node: Node) -> Iterator[GraphError]:
    target = node.function.target if node.function else None
    if node.function is None or node.function.is_class:
        return
    if node.parallelism > 1 and not isinstance(target, list | tuple | range | BaseFunction):
        error = GraphError(f'source "{node.name}" has parallelism {node.parallelism}, but it cannot be split')
        yield hint(error, "Give a list, a tuple, a range or a function class, or leave parallelism out.")
    if node.settings.get("spent"):
        error = GraphError(f'source "{node.name}" reads an iterator that an earlier job has used up')
        yield hint(error, "Give a list or a generator function, which can be read again.")


def _emits_at_the_end(node: Node) -> bool:
    if "emit_each" in node.settings:
        return not node.settings["emit_each"]
    target = node.function.target if node.function else None
    type_ = target if isinstance(target, type) else type(target)
    return node.kind is Kind.PROCESS and getattr(type_, "finish", None) not in (None, ProcessFunction.finish)


def _services(services: tuple[ServiceSpec, ...]) -> Iterator[GraphError]:
    known = {service.name: service for service in services}
    for service in services:
        for name in service.requires:
            if name not in known:
                yield unknown_service(f'service "{service.name}"', name, known)
    yield from _circle(known)


def _circle(known: dict[str, ServiceSpec]) -> Iterator[GraphError]:
    """Yield an error for the first circle of dependencies, with its path."""
    done: set[str] = set()
    for start in known:
        path: dict[str, Iterator[str]] = {}  # from where the walk began to where it is, in order
        here: str | None = start
        while here is not None:
            if here in path:
                names = [*path]
                text = " -> ".join([*names[names.index(here) :], here])
                error = GraphError(f"services depend on each other in a cycle: {text}")
                yield hint(error, "Services start after those they depend on, so remove one of these dependencies.")
                return
            if here in known and here not in done:
                path[here] = iter(known[here].requires)
            here = None
            while path and here is None:
                last = next(reversed(path))
                here = next(path[last], None)
                if here is None:
                    del path[last]
                    done.add(last)


def _uses(node: Node, known: dict[str, ServiceSpec]) -> Iterator[GraphError]:
    """Yield an error for each service or method that a function visibly uses and that is not there."""
    if node.function is None:
        return
    target = node.function.target
    used, names = used_by(node)
    for name in dict.fromkeys(names):
        if name not in known:
            yield unknown_service(f'operator "{node.name}"', name, known)
    for handle, method in dict.fromkeys(used):
        service = known.get(handle._name)
        if service is None or service.handle is not handle:
            if handle._name not in names:
                names.append(handle._name)
                yield unknown_service(f'operator "{node.name}"', handle._name, known)
        elif method is not None and isinstance(service.target, type):
            yield from _method(node, service, method)
    if node.kind is Kind.MAP_ASYNC and isinstance(target, ServiceMethod | ServiceHandle):
        yield from _awaited(node, target, known)


def used_by(node: Node) -> tuple[list[tuple[ServiceHandle, str | None]], list[str]]:
    """Return the services that a function visibly uses: handles, each with a method or None, and names."""
    if node.function is None:
        return [], []
    target = node.function.target
    functions: list[object] = list(target) if isinstance(target, tuple) and node.kind is Kind.COMAP else [target]
    if node.kind is Kind.SOURCE and isinstance(target, Source | list | tuple | range | str):
        functions = []
    used: list[tuple[ServiceHandle, str | None]] = []
    for argument in (*functions, *node.function.args, *node.function.kwargs.values()):
        if isinstance(argument, ServiceMethod):
            used.append((argument.handle, argument.__name__))
        elif isinstance(argument, ServiceHandle):
            used.append((argument, None))
    names: list[str] = []
    for function in functions:
        for code_owner in _code_owners(function):
            used += _handles_in(code_owner)
            names += _names_in(code_owner.__code__)
    return used, names


def _method(node: Node, service: ServiceSpec, method: str) -> Iterator[GraphError]:
    type_ = service.target
    assert isinstance(type_, type)
    if hasattr(type_, method) or hasattr(type_, "__getattr__") or _sets(type_, method):
        return
    methods = ", ".join(name for name in dir(type_) if not name.startswith("_") and callable(getattr(type_, name)))
    error = UnknownServiceError(f'operator "{node.name}" uses "{method}" of service "{service.name}", which it lacks')
    yield hint(error, f"{type_.__name__} has: {methods or 'no methods'}.")


def _awaited(node: Node, target: ServiceMethod | ServiceHandle, known: dict[str, ServiceSpec]) -> Iterator[GraphError]:
    """Yield an error if `map_async` was given a method of a service that cannot be awaited."""
    name, method = (
        (target.handle._name, target.__name__) if isinstance(target, ServiceMethod) else (target._name, DEFAULT_METHOD)
    )
    type_ = known[name].target if name in known else None
    function = getattr(type_, method, None) if isinstance(type_, type) else None
    if function is not None and not is_coroutine_function(function):
        error = GraphError(
            f'operator "{node.name}" awaits "{method}" of service "{name}", which is not a coroutine method'
        )
        yield hint(error, "Write async def, or use map(...), which calls it for one record at a time.")


def _sets(type_: type, name: str) -> bool:
    """Return whether a method of the class sets the attribute `name`, as a constructor does."""
    functions = (value for class_ in type_.__mro__ for value in vars(class_).values())
    return any(
        instruction.opname == "STORE_ATTR" and instruction.argval == name
        for function in functions
        if isinstance(function, FunctionType)
        for instruction in dis.get_instructions(function)
    )


def _code_owners(function: object) -> Iterable[FunctionType]:
    if isinstance(function, FunctionType):
        return (function,)
    type_ = function if isinstance(function, type) else type(function)
    if not issubclass(type_, BaseFunction):
        return ()
    return tuple(
        value
        for class_ in type_.__mro__
        if issubclass(class_, BaseFunction) and class_.__module__ != BaseFunction.__module__
        for value in vars(class_).values()
        if isinstance(value, FunctionType)
    )


def _handles_in(function: FunctionType) -> list[tuple[ServiceHandle, str | None]]:
    """Return the handles that a function reaches by name, each with the method that it takes of it."""
    reachable: dict[str, object] = {
        name: function.__globals__[name] for name in function.__code__.co_names if name in function.__globals__
    }
    for name, cell in zip(function.__code__.co_freevars, function.__closure__ or (), strict=True):
        try:
            reachable[name] = cell.cell_contents
        except ValueError:
            continue  # The variable is assigned later.
    handles = {name: value for name, value in reachable.items() if isinstance(value, ServiceHandle | ServiceMethod)}
    if not handles:
        return []
    found: list[tuple[ServiceHandle, str | None]] = []
    before: dis.Instruction | None = None
    for instruction in _instructions(function.__code__):
        value = handles.get(before.argval) if before is not None and isinstance(before.argval, str) else None
        if isinstance(value, ServiceHandle) and instruction.opname in ("LOAD_ATTR", "LOAD_METHOD"):
            found.append((value, instruction.argval))
        before = instruction
    found += [(value, None) for value in handles.values() if isinstance(value, ServiceHandle)]
    found += [(value.handle, value.__name__) for value in handles.values() if isinstance(value, ServiceMethod)]
    return found


@lru_cache(maxsize=1024)
def _instructions(code: CodeType) -> tuple[dis.Instruction, ...]:
    """Return the bytecode of a function; a program that submits the same graph often reads it once."""
    return tuple(dis.get_instructions(code))


def _names_in(code: CodeType) -> Iterator[str]:
    """Yield the names of services that code calls by a constant: `self.call_service("memory", ...)`."""
    instructions = _instructions(code)
    for subject, method, argument in zip(instructions, instructions[1:], instructions[2:], strict=False):
        if (
            (subject.opname, subject.argval) == ("LOAD_FAST", "self")
            and method.argval in ("call_service", "call_service_async", "service")
            and argument.opname == "LOAD_CONST"
            and isinstance(argument.argval, str)
        ):
            yield argument.argval
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield from _names_in(constant)
