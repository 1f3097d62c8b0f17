"""From a physical plan to tasks with channels between them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from sage._operators.operator import Surroundings
from sage._operators.operators import OPERATORS
from sage._plan.logical import Kind, Route
from sage._runtime.channel import Channel, InFlight
from sage._runtime.lifecycle import TaskPlan
from sage._runtime.partition import Partitioner
from sage._runtime.task import Output, Task
from sage.functions import TaskContext

if TYPE_CHECKING:
    from collections.abc import Callable

    from sage._plan.physical import Chain, Edge, PhysicalPlan
    from sage._runtime.backend import Backend
    from sage._runtime.coroutines import CoroutineLoop
    from sage._runtime.lifecycle import TaskEvent
    from sage.service import ServiceHandle


def deploy(
    plan: PhysicalPlan,
    backend: Backend,
    loop: CoroutineLoop,
    services: dict[str, ServiceHandle[Any]],
    report: Callable[[TaskEvent], None],
) -> tuple[dict[str, Task], tuple[TaskPlan, ...]]:
    """Return the tasks of a plan by name, with what the lifecycle has to know of each. Nothing runs yet."""
    groups: dict[int, list[Task]] = {}
    for chain in plan.chains:
        groups[chain.nodes[0].id] = [
            _task(chain, index, backend, loop, services, report) for index in range(chain.parallelism)
        ]
    owner = {node.id: chain for chain in plan.chains for node in chain.nodes}
    for edge in plan.between:
        _connect(edge, owner[edge.source], groups[owner[edge.source].nodes[0].id], groups[edge.target])
    _count_loops(plan, owner, groups)
    _count_lockstep(groups)
    tasks = {task.name: task for group in groups.values() for task in group}
    return tasks, _task_plans(plan, owner, groups)


def _task(
    chain: Chain,
    index: int,
    backend: Backend,
    loop: CoroutineLoop,
    services: dict[str, ServiceHandle[Any]],
    report: Callable[[TaskEvent], None],
) -> Task:
    span = backend.span()
    operators = []
    for node in chain.nodes:
        context = TaskContext(node.name, services, index, chain.parallelism)
        alone = chain.parallelism == 1
        surroundings = Surroundings(context, span, backend.now, loop.run, loop.post, alone)
        operators.append(OPERATORS[node.kind](node, surroundings))
    name = chain.name if chain.parallelism == 1 else f"{chain.name} [{index}]"
    task = Task(name, tuple(operators), span, report, backend.now, backend.pace())
    if not chain.is_source:
        task.inbox = Channel(backend.capacity_records)
        task.inbox.wake_consumer = lambda: task.wake()
    return task


def _connect(edge: Edge, chain: Chain, sources: list[Task], targets: list[Task]) -> None:
    """Join the tasks of two chains, and let each target know how many producers it has."""
    place = next(place for place, node in enumerate(chain.nodes) if node.id == edge.source)
    for index, source in enumerate(sources):
        reached = [targets[index % len(targets)]] if edge.route is Route.FORWARD else targets
        channels = tuple(task.inbox for task in reached if task.inbox is not None)
        partitioner = Partitioner(edge.route, index, len(channels), chain.nodes[place].name)
        output = Output(partitioner, channels, edge.port, feedback=edge.feedback, letters=edge.letters)
        source.outputs[place] = (*source.outputs.get(place, ()), output)
        if not edge.feedback:
            for task in reached:
                task.producers += 1


def _count_loops(plan: PhysicalPlan, owner: dict[int, Chain], groups: dict[int, list[Task]]) -> None:
    """Give the channels of each loop a counter; what has not ended outside of it counts as on its way."""
    for loop in plan.loops:
        heads = {owner[id_].nodes[0].id for id_ in loop}
        inner = [task for id_ in heads for task in groups[id_]]
        inboxes = {task.inbox for task in inner}
        counter = InFlight()
        for group in groups.values():
            for task in group:
                for outputs in task.outputs.values():
                    for output in outputs:
                        entered = [channel for channel in output.channels if channel in inboxes]
                        if entered and task not in inner:
                            output.enters = counter
                            counter.add(len(entered))
        for task in inner:
            assert task.inbox is not None
            task.inbox.counters += (counter,)
            if task.nodes[0].kind is Kind.FUTURE:
                task.loop = counter
                counter.when_zero(lambda task=task: task.wake())  # type: ignore[misc]


def _count_lockstep(groups: dict[int, list[Task]]) -> None:
    """If a source wants lockstep, let it see whether anything of its last record is still on its way."""
    everyone = [task for group in groups.values() for task in group]
    stepping = [task for task in everyone if task.nodes[0].settings.get("lockstep")]
    if not stepping:
        return
    counter = InFlight()
    for task in everyone:
        if task.inbox is not None:
            task.inbox.counters += (counter,)
    for task in stepping:
        task.lockstep = counter
        counter.when_zero(lambda task=task: task.wake())  # type: ignore[misc]


def _task_plans(plan: PhysicalPlan, owner: dict[int, Chain], groups: dict[int, list[Task]]) -> tuple[TaskPlan, ...]:
    downstream: dict[int, set[int]] = {id_: set() for id_ in groups}
    for edge in plan.between:
        if not edge.feedback:
            downstream[owner[edge.source].nodes[0].id].add(edge.target)
    plans = []
    for chain in plan.chains:
        id_ = chain.nodes[0].id
        after = tuple(task.name for target in downstream[id_] for task in groups[target])
        takes_stop = chain.nodes[0].kind in (Kind.SOURCE, Kind.FUTURE)
        serving = id_ in plan.serving
        plans += [TaskPlan(task.name, after, takes_stop, serving) for task in groups[id_]]
    return tuple(plans)
