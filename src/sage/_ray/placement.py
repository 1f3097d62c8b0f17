"""Places a job on processes. Its sites are the driver, workers of the cluster, and a process of each service."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field, replace
from queue import LifoQueue, PriorityQueue, Queue, SimpleQueue
from typing import TYPE_CHECKING

from sage._plan.logical import ANYWHERE, Kind, LogicalGraph, Place
from sage._runtime.deployment import task_names
from sage.errors import UnsupportedPlanError, hint
from sage.functions import BaseFunction
from sage.serving import bridge_among

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from sage._plan.logical import FunctionSpec, Node, ServiceSpec
    from sage._plan.physical import Chain, PhysicalPlan

DRIVER = "driver"
SERVING = "serving"

COLLECTIONS = (list, set, dict, deque, bytearray, Queue, LifoQueue, PriorityQueue, SimpleQueue)
"""An object that a sink fills must be in the driver: a copy elsewhere would not be seen."""

AT_DRIVER = Place("driver")


@dataclass
class SitePlan:
    """The part of one process in the job.

    Attributes:
        name: its name in errors and logs.
        place: its reservation; the driver is at the driver.
        tasks: the names of its tasks.
        services: the names of the services that live in it beside its tasks.
    """

    name: str
    place: Place = ANYWHERE
    tasks: list[str] = field(default_factory=list)
    services: list[str] = field(default_factory=list)


def placed(graph: LogicalGraph) -> LogicalGraph:
    """Return the graph with a place for each operator: the requested one, or the driver for its own sinks."""
    nodes = {id_: replace(node, place=_place(node)) for id_, node in graph.nodes.items()}
    return replace(graph, nodes=nodes)


def _place(node: Node) -> Place:
    asked: Place | None = node.settings.get("place")
    if asked is not None:
        return asked
    if node.kind is Kind.SINK and node.function is not None:
        owner = getattr(node.function.target, "__self__", None)
        if isinstance(owner, COLLECTIONS):
            return AT_DRIVER
    return ANYWHERE


def sites_of(plan: PhysicalPlan, services: tuple[ServiceSpec, ...], workers_max: int) -> dict[str, SitePlan]:
    """Return the sites of a job by name, each task and each inline service in one of them.

    Tasks are dealt out in turn to as many workers as the widest operator has tasks, at most `workers_max`. One that
    reserves something has a worker to itself. All tasks of a feedback loop share a worker, and so do those of served
    pipelines with their services, and all tasks of a job in lockstep; if a part of them is at the driver, all are.

    Raises:
        UnsupportedPlanError: something that has to be together is wanted in several places.
    """
    sites: dict[str, SitePlan] = {}
    groups = _together(plan)
    spread = [chain for chain in plan.chains if chain.place == ANYWHERE and chain.head not in groups]
    count = max(1, min(workers_max, max((chain.parallelism for chain in spread), default=1)))
    dealt = 0
    for chain in plan.chains:
        names = task_names(chain)
        for index, task in enumerate(names):
            if chain.head in groups:
                name = groups[chain.head]
                place = AT_DRIVER if name == DRIVER else ANYWHERE
            elif chain.place.at == "driver":
                name, place = DRIVER, AT_DRIVER
            elif chain.place.reserves:
                name, place = f"worker of {task}", chain.place
            else:
                name, place = f"worker {dealt % count}", ANYWHERE
                dealt += 1
            site = sites.setdefault(name, SitePlan(name, place))
            site.tasks.append(names[index])
    for spec in services:
        site_name = inline_site(spec)
        if site_name == SERVING:
            site_name = next((site for site in groups.values() if site in (SERVING, DRIVER)), SERVING)
        if site_name is not None:
            place = AT_DRIVER if site_name == DRIVER else ANYWHERE
            sites.setdefault(site_name, SitePlan(site_name, place)).services.append(spec.name)
    return sites


def inline_site(spec: ServiceSpec) -> str | None:
    """Return the site in which a service lives beside tasks, or None for one that has a process to itself."""
    if bridge_among(spec.target, spec.args, dict(spec.kwargs)) is not None:
        return SERVING
    return DRIVER if spec.options.host == "inline" and spec.command is None else None


def service_place(spec: ServiceSpec) -> Place:
    """Return the reservation of a service's process."""
    options = spec.options
    return Place("cluster", options.num_cpus, options.num_gpus, tuple(options.resources.items()))


def _together(plan: PhysicalPlan) -> dict[int, str]:
    """Return, by the heads of chains that have to share a process with others, the name of that process."""
    groups: dict[int, str] = {}
    owner = {node.id: chain for chain in plan.chains for node in chain.nodes}
    lockstep = [chain for chain in plan.chains if chain.nodes[0].settings.get("lockstep")]
    if lockstep:
        _put(groups, plan.chains, "worker 0", f'what is in lockstep with "{lockstep[0].nodes[0].name}"')
        return groups
    serving = [chain for chain in plan.chains if chain.head in plan.serving or _has_bridge(chain)]
    _put(groups, serving, SERVING, "a served pipeline and its callers by a bridge")
    for number, loop in enumerate(plan.loops):
        heads = {owner[id_].head for id_ in loop}
        chains = [chain for chain in plan.chains if chain.head in heads]
        if not heads & groups.keys():
            _put(groups, chains, f"worker of loop {number}", "a feedback loop")
    return groups


def _put(groups: dict[int, str], chains: Iterable[Chain], site: str, why: str) -> None:
    chains = tuple(chains)
    asked = {chain.place for chain in chains} - {ANYWHERE}
    if len(asked) > 1 or any(place.reserves for place in asked):
        names = ", ".join(f'"{chain.name}"' for chain in chains if chain.place != ANYWHERE)
        error = UnsupportedPlanError(f"{why} has to run in one process, but {names} has a place of its own")
        raise hint(error, "Leave out the places of its operators.")
    groups.update({chain.head: DRIVER if asked else site for chain in chains})


def _has_bridge(chain: Chain) -> bool:
    return any(node.function is not None and _bridge_of(node.function) is not None for node in chain.nodes)


def _bridge_of(spec: FunctionSpec) -> object:
    target = spec.target if isinstance(spec.target, BaseFunction) else None
    return bridge_among(target, spec.args, dict(spec.kwargs))


def own_part(plan: PhysicalPlan, tasks: Iterable[str]) -> PhysicalPlan:
    """Return the plan with the functions and data of some tasks only, for their process."""
    wanted = set(tasks)
    chains = tuple(chain if wanted.intersection(task_names(chain)) else chain.outline() for chain in plan.chains)
    return replace(plan, chains=chains)


def by_task(sites: Mapping[str, SitePlan]) -> dict[str, str]:
    """Return the site of each task, by their names."""
    return {task: site.name for site in sites.values() for task in site.tasks}
