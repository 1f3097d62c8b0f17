"""From a physical plan to tasks with channels between them."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from sage._current_job import wait_for
from sage._operators.operator import OperatorContext
from sage._operators.operators import operator_class
from sage._plan.logical import Kind, Route
from sage._runtime.channel import Channel, InFlight
from sage._runtime.lifecycle import TaskPlan
from sage._runtime.partition import Outlet, Partitioner
from sage._runtime.task import Task
from sage.functions import Stopping, TaskContext

if TYPE_CHECKING:
    from collections.abc import Mapping

    from sage._plan.physical import Chain, Edge, PhysicalPlan
    from sage._runtime.backend import Backend
    from sage._runtime.coroutines import CoroutineLoop
    from sage._runtime.durable_run import DurableRun
    from sage._runtime.lifecycle import TaskEvent
    from sage.service import ServiceHandle


class Absent:
    """A task that another process runs.

    Attributes:
        inbox: the channel to its inbox, or None for a source.
    """

    def __init__(self, name: str, inbox: Channel | None) -> None:
        self.name = name
        self.inbox = inbox


Group = list[Task | Absent]
"""The tasks of one chain, in order."""

LeadingTo = Callable[[str], Channel | None]
"""Returns the channel that leads to a task of another process, by its name, or None for a task of this process."""


def deploy(
    plan: PhysicalPlan,
    backend: Backend,
    loop: CoroutineLoop,
    services: dict[str, ServiceHandle[object]],
    report: Callable[[TaskEvent], None],
    leading_to: LeadingTo = lambda _: None,
    *,
    durable: DurableRun | None = None,
) -> dict[str, Task]:
    """Return the tasks of a plan that this process runs, by name. Nothing runs yet.

    All tasks of a feedback loop have to be of one process, and so has everything that is in step with a source.
    """
    groups: dict[int, Group] = {}
    for chain in plan.chains:
        group: Group = []
        groups[chain.nodes[0].id] = group
        for index, name in enumerate(task_names(chain)):
            channel = leading_to(name)
            if channel is not None:
                channel.resize(chain.nodes[0].settings.get("capacity") or channel.capacity_records)
                group.append(Absent(name, None if chain.is_source else channel))
            else:
                group.append(_task(chain, name, index, backend, loop, services, report, durable))
    owner = {node.id: chain for chain in plan.chains for node in chain.nodes}
    places = {node.id: place for chain in plan.chains for place, node in enumerate(chain.nodes)}
    for edge in plan.between:
        chain = owner[edge.source]
        _connect(edge, chain, places[edge.source], groups[chain.head], groups[edge.target])
    _count_loops(plan, owner, groups)
    _count_lockstep(groups)
    tasks = {task.name: task for task in _present(groups)}
    if durable is not None:
        durable.joined(tasks.values())
    return tasks


def task_names(chain: Chain) -> tuple[str, ...]:
    """Return the names of the tasks that run a chain."""
    if chain.parallelism == 1:
        return (chain.name,)
    return tuple(f"{chain.name} [{index}]" for index in range(chain.parallelism))


def task_plans(plan: PhysicalPlan) -> tuple[TaskPlan, ...]:
    """Return the lifecycle's plans for the tasks of a plan."""
    owner = {node.id: chain for chain in plan.chains for node in chain.nodes}
    heads = plan.heads
    downstream: dict[int, set[int]] = {id_: set() for id_ in heads}
    for edge in plan.between:
        if not edge.feedback:
            downstream[owner[edge.source].nodes[0].id].add(edge.target)
    plans = []
    for id_, chain in heads.items():
        after = tuple(name for target in downstream[id_] for name in task_names(heads[target]))
        takes_stop = chain.nodes[0].kind in (Kind.SOURCE, Kind.FUTURE)
        serving = id_ in plan.serving
        plans += [TaskPlan(name, after, takes_stop, serving) for name in task_names(chain)]
    return tuple(plans)


def _task(
    chain: Chain,
    name: str,
    index: int,
    backend: Backend,
    loop: CoroutineLoop,
    services: dict[str, ServiceHandle[object]],
    report: Callable[[TaskEvent], None],
    durable: DurableRun | None,
) -> Task:
    span, pace = backend.span(), backend.pace()
    operators = []
    stopping = Stopping(wait_for)
    for node in chain.nodes:
        context = TaskContext(node.name, services, index, chain.parallelism, stopping)
        # Tasks that are made again must not find the user's instance as the first ones have left it.
        alone = chain.parallelism == 1 and (durable is None or durable.restart is None)
        surroundings = OperatorContext(
            context, span, backend.now, backend.wall, pace.running_s, loop.run, loop.run_to_end, loop.post, alone
        )
        operator = operator_class(node)(node, surroundings)
        if durable is not None:
            operator.recovery, operator.left = durable.recovery(node, index), []
        operators.append(operator)
    inbox = None
    if not chain.is_source:
        capacity = chain.nodes[0].settings.get("capacity")
        kind = Channel if durable is None else durable.channel_kind
        inbox = kind(backend.capacity_records if capacity is None else capacity, now=backend.now)
        inbox.follows_work = capacity is None
        inbox.follow(operators)
    parts = (name, tuple(operators), span, report, backend.now, pace, inbox)
    return Task(*parts) if durable is None else durable.task(*parts)


def _connect(edge: Edge, chain: Chain, place: int, sources: Group, targets: Group) -> None:
    """Join the tasks of two chains, and let each target know how many producers it has."""
    for index, source in enumerate(sources):
        reached = _reached(edge, index, targets)
        if isinstance(source, Task):
            channels = tuple(task.inbox for task in reached if task.inbox is not None)
            partitioner = Partitioner(edge.route, index, len(channels), chain.nodes[place].name)
            outlet = Outlet(partitioner, channels, edge.port, feedback=edge.feedback, letters=edge.letters)
            outlets = source.outbox.outlets
            outlets[place] = (*outlets.get(place, ()), outlet)
        if not edge.feedback:
            for task in reached:
                if isinstance(task, Task):
                    task.input.producers += 1


def _reached(edge: Edge, index: int, targets: Group) -> Group:
    return [targets[index % len(targets)]] if edge.route is Route.FORWARD else targets


def _count_loops(plan: PhysicalPlan, owner: dict[int, Chain], groups: dict[int, Group]) -> None:
    """Give the channels of each loop a counter; inputs outside it that have not ended count as in flight."""
    for loop in plan.loops:
        heads = {owner[id_].nodes[0].id for id_ in loop}
        inner = _present({id_: groups[id_] for id_ in heads})
        if not inner:
            continue
        inboxes = {task.inbox for task in inner}
        counter = InFlight()
        for task in _present(groups):
            for outlets in task.outbox.outlets.values():
                for outlet in outlets:
                    entered = [channel for channel in outlet.channels if channel in inboxes]
                    if entered and task not in inner:
                        outlet.enters = counter
                        counter.add(len(entered))
        for edge in plan.between:
            _count_absent(edge, groups[owner[edge.source].nodes[0].id], groups[edge.target], inner, counter)
        for task in inner:
            assert task.inbox is not None
            task.inbox.counters += (counter,)
            if task.nodes[0].kind is Kind.FUTURE:
                task.input.loop = counter
                counter.when_zero(task.rouse)


def _count_absent(edge: Edge, sources: Group, targets: Group, inner: list[Task], counter: InFlight) -> None:
    """Count inputs of a loop from other processes; the inbox counts them off at the end of each producer there."""
    for index, source in enumerate(sources):
        for task in _reached(edge, index, targets) if isinstance(source, Absent) else ():
            if task in inner:
                assert task.inbox is not None
                task.inbox.enters = counter
                counter.add(1)


def _count_lockstep(groups: dict[int, Group]) -> None:
    """If a source wants lockstep, let it see whether anything of its last record is still on its way."""
    everyone = _present(groups)
    stepping = [task for task in everyone if task.nodes[0].settings.get("lockstep")]
    if not stepping:
        return
    counter = InFlight()
    for task in everyone:
        if task.inbox is not None:
            task.inbox.counters += (counter,)
    for task in stepping:
        task.input.lockstep = counter
        counter.when_zero(task.rouse)


def _present(groups: Mapping[int, Group]) -> list[Task]:
    return [task for group in groups.values() for task in group if isinstance(task, Task)]
