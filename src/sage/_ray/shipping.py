"""Sends parts of a program to the processes of a job, as pickles, and names those that cannot be sent."""

from __future__ import annotations

import pickle
from dataclasses import replace
from typing import TYPE_CHECKING

from sage._ray.orders import Pickled, SitePayload
from sage._ray.placement import own_part
from sage._remote.wire import by_value
from sage.command import Command
from sage.errors import GraphError, describe, hint
from sage.service import ServiceHandle, resolve_handles

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from sage._plan.logical import FunctionSpec, LogicalGraph, ServiceSpec
    from sage._plan.physical import PhysicalPlan
    from sage._ray.placement import SitePlan

HINT = 'Make it in open() or setup(), which run where it is used, or keep the operator in the driver: at="driver".'


def pickled_part(
    plan: PhysicalPlan, site: SitePlan, services: Mapping[str, ServiceSpec], fronts: tuple[ServiceSpec, ...]
) -> Pickled:
    """Return the code and data of a site that runs tasks.

    Raises:
        GraphError: something of it cannot be pickled; operator or service and attribute are named.
    """
    own = own_part(plan, site.tasks)
    part = SitePayload(own, tuple(services[name] for name in site.services), fronts)
    return _pickled(part)


def pickled_service(spec: ServiceSpec, fronts: tuple[ServiceSpec, ...]) -> Pickled:
    """Return the code and data of a service.

    Raises:
        GraphError: something of it cannot be pickled; the attribute is named.
    """
    return _pickled(SitePayload(None, (spec,), fronts))


def front_of(spec: ServiceSpec) -> ServiceSpec:
    """Return a front as each process has it, which chooses a replica and builds none."""
    return replace(spec, target=_nothing)


def outline(graph: LogicalGraph) -> LogicalGraph:
    """Return a graph without functions, data and arguments: the form for the master of a job."""
    nodes = {}
    for id_, node in graph.nodes.items():
        shown = {name: value for name, value in node.settings.items() if name == "concurrency"}  # in the report
        nodes[id_] = replace(node, function=None, settings=shown)
    return replace(graph, nodes=nodes, services=outlines(graph.services))


def outlines(services: tuple[ServiceSpec, ...]) -> tuple[ServiceSpec, ...]:
    """Return services without code and arguments."""
    return tuple(map(_outline, services))


def _outline(spec: ServiceSpec) -> ServiceSpec:
    options = replace(spec.options, depends_on=spec.requires, affinity=None)
    command = None if spec.command is None else Command(spec.name, ())
    handle: ServiceHandle[object] = ServiceHandle(spec.name, None)
    return replace(spec, target=_nothing, args=(), kwargs={}, options=options, handle=handle, command=command)


def _nothing() -> None:
    """Stand for the class of a service, which only its own process has."""


def _pickled(part: SitePayload) -> Pickled:
    try:
        # By value where that is needed: modules of the program's own may be registered so.
        data, buffers = by_value(part)
    except Exception as error:
        for named in _named(part):
            raise named from error
        raise GraphError(f"the program cannot be sent to the cluster: {describe(error)}") from error
    return data, tuple(bytes(buffer) for buffer in buffers)


def unpickled(part: Pickled, handles: Mapping[str, ServiceHandle[object]]) -> SitePayload:
    """Return the objects pickled for a site, with the handles of this process in it.

    Raises:
        Exception: it cannot be unpickled here; the type depends on it.
    """
    resolve_handles(handles)
    loaded: SitePayload = pickle.loads(part[0], buffers=part[1])
    return loaded


def _named(part: SitePayload) -> Iterator[GraphError]:
    """Yield an error for each object that cannot be pickled, by its operator or service."""
    for chain in part.plan.chains if part.plan is not None else ():
        for node in chain.nodes:
            if node.function is not None and _error_of(node.function) is not None:
                yield _refused(f'operator "{node.name}"', _parts(node.function))
    for spec in part.services:
        if _error_of((spec.target, spec.args, dict(spec.kwargs))) is not None:
            yield _refused(f'service "{spec.front or spec.name}"', _parts(spec))
    for front in part.fronts:
        if _error_of(front.options.affinity) is not None:
            yield _refused(f'service "{front.name}"', {"its affinity": front.options.affinity})


def _parts(spec: FunctionSpec | ServiceSpec) -> dict[str, object]:
    parts = {"its function": spec.target}
    parts |= {f"argument {place}": value for place, value in enumerate(spec.args)}
    return parts | {f'argument "{name}"': value for name, value in spec.kwargs.items()}


def _refused(who: str, parts: dict[str, object]) -> GraphError:
    for part, value in parts.items():
        error = _error_of(value)
        if error is not None:
            where = _inside(value)
            text = f"{who} cannot be sent to the cluster: {where}{part}: {describe(error)}"
            return hint(GraphError(text), HINT)
    return hint(GraphError(f"{who} cannot be sent to the cluster"), HINT)


def _inside(value: object) -> str:
    """Return which attribute, or which variable that a function uses, cannot be pickled."""
    owner = getattr(value, "__self__", None)
    if owner is not None and not isinstance(owner, type):
        value = owner
    attributes = {} if isinstance(value, type) else getattr(value, "__dict__", {})
    for name, attribute in attributes.items():
        if _error_of(attribute) is not None:
            return f'attribute "{name}" of '
    code = getattr(value, "__code__", None)
    reached: dict[str, object] = {}
    if code is not None:
        cells = zip(code.co_freevars, getattr(value, "__closure__", None) or (), strict=True)
        outside = getattr(value, "__globals__", {})
        reached = {name: cell.cell_contents for name, cell in cells}
        reached |= {name: outside[name] for name in code.co_names if name in outside}
    for name, used in reached.items():
        if _error_of(used) is not None:
            return f'variable "{name}" of '
    return ""


def _error_of(value: object) -> Exception | None:
    try:
        by_value(value)
    except Exception as error:
        return error
    return None
