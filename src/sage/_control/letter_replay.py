"""Dead letters that are put back in: the program runs with them as its only records."""

from __future__ import annotations

import os
from collections import defaultdict
from dataclasses import replace
from operator import itemgetter
from typing import TYPE_CHECKING

from sage._control.letters import counted
from sage._plan.durability import keeps_state
from sage._plan.logical import FunctionSpec, Kind, LogicalGraph, Node
from sage._plan.rules import edges_of, reach, ways_of
from sage._runtime.manager import JobManager
from sage.connectors.dead_letters import DeadLetterFile, read_letters, take_out
from sage.connectors.json_lines import from_json
from sage.errors import GraphError, hint
from sage.failure import FAIL
from sage.report import Outcome

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from sage.connectors.dead_letters import StoredLetter
    from sage.environment import Environment
    from sage.report import JobReport

    Letter = tuple[object, tuple[object, ...]]
    """A record, and its key if it has one."""

ROOM = 1_000
"""How many ids there are for the operators that are put in before each one."""


class LetterReplay:
    """Puts letters into the graphs of a program, and takes them out of their file afterwards.

    Attributes:
        left: the letters that stay, as no job with them has completed.
    """

    def __init__(self, path: str, letters: Sequence[StoredLetter]) -> None:
        self._path = os.path.realpath(path)
        self.left = list(letters)
        self._before = {letter.id for letter in read_letters(path)[0]}

    def changed(self, _: Environment, graph: LogicalGraph) -> LogicalGraph:
        """Return the graph with letters in the place of its sources; those of a job go into its first graph only."""
        came_before = any(job.name == graph.name for job in JobManager().jobs.values())
        letters = [] if came_before else [one for one in self.left if one.values.get("job") == graph.name]
        return _with_letters(graph, letters, self._path)

    def finish(self, reports: Sequence[JobReport]) -> str:
        """Take the letters of jobs that have completed out of the file, and return a line about all of them."""
        first = {report.name: report for report in reversed(reports)}
        completed = {name for name, report in first.items() if report.state is Outcome.COMPLETED}
        done = [letter for letter in self.left if letter.values.get("job") in completed]
        self.left = [letter for letter in self.left if letter.values.get("job") not in completed]
        again = sum(letter.id not in self._before for letter in read_letters(self._path)[0])
        take_out(self._path, frozenset(letter.id for letter in done))
        line = f"{counted(len(done))} put back in, of which {again:,} failed again"
        if not self.left:
            return line
        jobs = ", ".join(sorted({f'"{letter.values.get("job")}"' for letter in self.left}))
        return f"{line}; {counted(len(self.left))} left, as job {jobs} has not completed"


def _with_letters(graph: LogicalGraph, letters: Sequence[StoredLetter], path: str) -> LogicalGraph:
    """Return a graph in which sources are empty, and letters come before their operators.

    Raises:
        GraphError: an operator is missing, keeps a state, or does not store its dead letters in the file.
        ConnectorError: a record cannot be unpickled.
    """
    by_name = {node.name: node for node in graph.nodes.values()}
    records: dict[tuple[str, int], list[Letter]] = defaultdict(list)
    for letter in letters:
        values = letter.values
        has_key = "key" in values or "key_text" in values
        keys = (from_json("key", values),) if has_key else ()
        records[values["operator"], values.get("input", 0)].append((from_json("record", values), keys))
    for name, _ in records:
        if name not in by_name:
            error = GraphError(f'a dead letter failed in operator "{name}", which job "{graph.name}" does not have')
            raise hint(error, f"Operators are found by name. sage letters drop FILE --operator {name} gives it up.")
        _check(graph, by_name[name], path)
    nodes: dict[int, Node] = {}
    for node in graph.nodes.values():
        inputs = [_moved(id_) for id_ in node.inputs]
        first = _moved(node.id) - ROOM + 1
        for port in range(len(inputs)):
            found = records.get((node.name, port))
            if found:
                for one in _union(f"{node.name} letters {port}", first, inputs[port], found):
                    nodes[one.id] = one
                    inputs[port] = one.id
                first = inputs[port] + 1
        nodes[_moved(node.id)] = _changed_node(node, tuple(inputs))
    feedback = tuple((_moved(source), _moved(future)) for source, future in graph.feedback)
    return replace(graph, nodes=nodes, feedback=feedback, is_durable=False)


def _moved(id_: int) -> int:
    return (id_ + 1) * ROOM


def _union(name: str, first: int, input_: int, records: list[Letter]) -> Iterator[Node]:
    """Yield operators that add records to an input; the last one has them all."""
    inputs = [input_]
    for has_key in (False, True):
        chosen = [(value, keys) for value, keys in records if bool(keys) is has_key]
        if not chosen:
            continue
        source = FunctionSpec([(value, *keys) for value, keys in chosen])
        yield Node(first, Kind.SOURCE, f"{name} {first}", (), source, settings={"bounded": True})
        if has_key:
            first += 1
            yield Node(first, Kind.KEYBY, f"{name} {first}", (first - 1,), FunctionSpec(itemgetter(1)))
        first += 1
        yield Node(first, Kind.MAP, f"{name} {first}", (first - 1,), FunctionSpec(itemgetter(0)))
        inputs.append(first)
        first += 1
    yield Node(first, Kind.UNION, name, tuple(inputs))


def _changed_node(node: Node, inputs: tuple[int, ...]) -> Node:
    policy = node.on_error
    if policy.letters is not None:
        policy = replace(policy, letters=_moved(policy.letters))
    changed = replace(node, id=_moved(node.id), inputs=inputs, on_error=policy)
    if node.kind is Kind.SOURCE and node.settings.get("bridge") is None:
        return replace(changed, function=FunctionSpec([]), settings={"bounded": True}, on_error=FAIL)
    file = _file_of(node)
    return changed if file is None else replace(changed, function=FunctionSpec(file))


def _file_of(node: Node) -> DeadLetterFile | None:
    """Return the file that a node writes dead letters to, or None."""
    target = None if node.function is None else node.function.target
    target = getattr(target, "__self__", target)
    return target if node.kind is Kind.SINK and isinstance(target, DeadLetterFile) else None


def _check(graph: LogicalGraph, node: Node, path: str) -> None:
    files = [
        file.path
        for one in graph.nodes.values()
        if node.on_error.letters in one.inputs and (file := _file_of(one)) is not None
    ]
    if path not in files:
        error = GraphError(f'operator "{node.name}" does not store its dead letters in "{path}"')
        raise hint(error, "Give it on_error=env.dead_letters(store=...), so that a record that fails again is kept.")
    onward = ways_of(edge for edge in edges_of(graph) if not edge.letters)
    for id_ in sorted(reach(node.id, onward)):
        after = graph.nodes[id_]
        if keeps_state(after):
            error = GraphError(f'dead letters of "{node.name}" reach "{after.name}", which keeps a state')
            raise hint(error, "A replay has no state of earlier runs. Give the records to the job by a source instead.")
