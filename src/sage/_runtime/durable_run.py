"""One run of a durable job: loads the last checkpoint, and carries out the actions of `checkpoints.step`."""

from __future__ import annotations

import hashlib
import os
import sys
from collections import Counter
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any
from urllib.parse import quote

from sage._logs import log_of
from sage._operators.keyed import Changed
from sage._operators.keyed_state import each_pickle
from sage._operators.operator import Recovery
from sage._plan.durability import before_changed, promises
from sage._plan.logical import Kind
from sage._runtime.accounts import Counts, not_taken, total, ways_of_records
from sage._runtime.aligning_channel import AligningChannel
from sage._runtime.checkpoint_store import FRESH_HINT, Checkpoint, CheckpointStore
from sage._runtime.checkpoints import (
    ActionKind,
    CheckpointEvent,
    Checkpoints,
    Due,
    PartGiven,
    WriteFailed,
    Written,
    step,
    with_changes,
    without_changes,
)
from sage._runtime.durable_task import DurableTask, cannot_be_pickled
from sage._runtime.lifecycle import TaskFailed, TasksRenewed
from sage._runtime.states import TASK_TERMINAL, JobState, TaskState
from sage.errors import CheckpointError, JobError, describe, hint

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping, Sequence

    from sage._plan.logical import LogicalGraph, Node
    from sage._runtime.backend import Lane
    from sage._runtime.checkpoints import Action, Row
    from sage._runtime.supervisor import Ended, Supervisor
    from sage._runtime.task import Task, TaskParts
    from sage.durable import Durable, Restart

log = log_of("sage.checkpoints")

NAME_LENGTH_MAX = 150


@dataclass(frozen=True, slots=True)
class Restored:
    """A checkpoint for new tasks, which take their parts out.

    Attributes:
        checkpoint: the checkpoint.
        rows: the row of each operator and task, with what was pickled in it.
        changes: the changes of the keys of each, the oldest first.
    """

    checkpoint: Checkpoint
    rows: dict[tuple[str, int], tuple[Row, Any]]
    changes: dict[tuple[str, int], list[Any]]


@dataclass(frozen=True, slots=True)
class Reloaded(CheckpointEvent):
    """The last checkpoint was loaded again, as all tasks have ended after a failure, or there is an error."""

    restored: Restored | None = None
    error: Exception | None = None


class DurableRun:
    """Makes the checkpoints of a job; `handle` is called by the supervisor's thread.

    Attributes:
        number: the number of the checkpoint that the job goes on from, or 0.
        before: the records of each operator up to there, by its name, over all runs.
        waiting: how many records wait there in each operator, with those that were lost before.
        restart: how tasks start again after one has failed, or None.

    Raises:
        CheckpointError: the folder cannot be used, or its checkpoint does not fit the graph or cannot be read; with
            `resume="must"`, also if it has no checkpoint.
    """

    channel_kind = AligningChannel

    def __init__(
        self,
        settings: Durable,
        graph: LogicalGraph,
        resume: str,
        drop_state: Sequence[str] = (),
        restart: Restart | None = None,
    ) -> None:
        folder = os.path.abspath(settings.folder)
        self.restart = restart
        self._settings = settings
        self._drop_state = drop_state
        self._graph = {node.name: (str(node.kind), node.parallelism) for node in graph.nodes.values()}
        self._promises = tuple(promises(graph))
        self._store = CheckpointStore(folder)
        self._lane: Lane | None = None
        self._tasks: dict[str, DurableTask] = {}
        self._parts: dict[str, PartGiven] = {}
        self._last_parts: dict[str, PartGiven] = {}
        self._ways = ways_of_records(graph)
        self._before_changed = {name: {node.name for node in nodes} for name, nodes in before_changed(graph).items()}
        try:
            if resume == "never":
                self._store.clear()
            found = self._store.load()
            if found is None and resume == "must":
                error = CheckpointError(f'folder "{folder}" has no checkpoint to resume from', fault="user")
                raise hint(error, 'resume="auto" begins anew without one.')
            self._resumed = found
            loaded, self._dropped = _without(drop_state, found or Checkpoint(0, {}, ()))
            self._check(loaded)
            self._go_on_from(_restored(loaded))
        except BaseException:
            self._store.close()
            raise

    def _go_on_from(self, restored: Restored) -> None:
        loaded = restored.checkpoint
        self._restored = restored
        self.number = loaded.number
        self.before = loaded.accounts
        self.waiting = _held(row for row in loaded.rows if not self._drops(row.operator))
        self.waiting.update({name: one.lost for name, one in self.before.items()})

    def _check(self, found: Checkpoint) -> None:
        """Refuse a checkpoint with a state for which the graph has no place."""
        problems: dict[str, None] = {}
        names: dict[str, None] = {}
        for row in found.rows:
            before, now = found.graph[row.operator], self._graph.get(row.operator)
            if now is None:
                problem = f'{before[0]} "{row.operator}" is not there any more'
            elif now[0] != before[0]:
                problem = f'"{row.operator}" was a {before[0]} and is a {now[0]}'
            elif now[1] != before[1]:
                problem = f'"{row.operator}" had parallelism {before[1]} and has {now[1]}'
            else:
                continue
            problems[problem] = names[row.operator] = None
        if problems:
            lines = "".join(f"\n  - {problem}" for problem in problems)
            text = f"the graph does not fit checkpoint {found.number}:{lines}"
            error = CheckpointError(text, fault="user")
            hint(error, "Operators are found by name: give them back with name=.")
            raise hint(error, f"submit(drop_state={[*names]}) goes on without these states. {FRESH_HINT}")

    def recovery(self, node: Node, index: int) -> Recovery:
        """Return the part of one operator in one task."""
        part = f"{self._store.key}-{_in_file_names(node.name)}-{index}"
        is_read_anew = any(node.name in names for names in self._before_changed.values())
        if (node.name, index) not in self._restored.rows or is_read_anew:
            return Recovery(part, self.number)
        row, (state, left, function) = self._restored.rows.pop((node.name, index))
        changes = self._restored.changes.pop((node.name, index), [])
        if node.name in self._before_changed:
            return Recovery(part, self.number, state, (), function, row.since, changes)
        is_settled = self._store.is_settled(self.number)
        return Recovery(part, self.number, state, left, function, row.since, changes, row.held, is_settled)

    def _drops(self, operator: str) -> bool:
        """Return whether an operator does not keep the records that wait in it.

        All of them come again before a `changed(removed=)`, if they are still there, and may differ then.
        """
        return operator in self._before_changed or any(operator in names for names in self._before_changed.values())

    def task(self, *parts: *TaskParts) -> DurableTask:
        """Return a task of the job; `parts` are the arguments of `Task`."""
        return DurableTask(*parts, tell=self.tell, number=self.number, is_stopping=lambda: self._is_stopping)

    @property
    def _is_stopping(self) -> bool:
        return self._supervisor.state.way is not None

    def joined(self, tasks: Iterable[Task]) -> None:
        """Let the channels know how many streams lead to each; the tasks have been joined.

        A task in a loop counts as busy until it has taken in what was in flight there when the last run ended.
        """
        for task in tasks:
            if isinstance(task, DurableTask):
                self._tasks[task.name] = task
            if isinstance(task.inbox, AligningChannel):
                task.inbox.producers += task.input.producers
                task.input.unsettled += 1
                for counter in task.inbox.counters:
                    counter.add(1)
            fed_back = [outlet for outlets in task.outbox.outlets.values() for outlet in outlets if outlet.feedback]
            for channel in [channel for outlet in fed_back for channel in outlet.channels]:
                assert isinstance(channel, AligningChannel)
                channel.producers += 1
        operators = [operator for task in self._tasks.values() for operator in task.operators]
        for operator in operators:
            if isinstance(operator, Changed):
                names = self._before_changed[operator.node.name]
                operator.before = [one.metrics for one in operators if one.node.name in names]

    def tell(self, event: CheckpointEvent) -> None:
        """Take in the part of a task; any thread may call this."""
        self._supervisor.post(event)

    def begin(self, supervisor: Supervisor, make_tasks: Callable[[], dict[str, Task]]) -> None:
        """Begin to make checkpoints; the job begins.

        Args:
            supervisor: the supervisor of the job.
            make_tasks: makes the tasks again, after one has failed.
        """
        self._supervisor = supervisor
        self._make_tasks = make_tasks
        self._state = self._first_state(supervisor.tasks)
        self._lane = lane = supervisor.backend.lane("checkpoints")
        supervisor.handle_checkpoint = self.handle
        supervisor.renew_tasks = lambda: lane.run(self._reload)
        for line in self._promises:
            log.info("%s", line)
        for note in self._beginning():
            log.info("%s", note)
            _show(note)
        supervisor.call_at(supervisor.backend.now(), lambda: self.handle(Due()))

    def _first_state(self, tasks: Mapping[str, Task]) -> Checkpoints:
        sources = frozenset(name for name, task in tasks.items() if task.nodes[0].kind in (Kind.SOURCE, Kind.FUTURE))
        return Checkpoints(self._settings.interval_s, frozenset(tasks), sources, self.number)

    def _reload(self) -> None:
        """Load the last checkpoint again, on the thread that has written it; `handle` goes on."""
        try:
            found = self._store.load() or Checkpoint(0, {}, ())
            was_dropped = self._resumed is None or found.number > self._resumed.number
            loaded = found if was_dropped else _without(self._drop_state, found)[0]
            self._supervisor.post(Reloaded(_restored(loaded)))
        except JobError as error:
            self._supervisor.post(Reloaded(error=error))

    def _begin_again(self, event: Reloaded) -> None:
        """Make the tasks of the job again, from the checkpoint that was loaded."""
        supervisor = self._supervisor
        if supervisor.state.job is not JobState.RESTARTING:
            return  # it was stopped meanwhile
        if event.restored is None:
            supervisor.handle(TasksRenewed(event.error))
            return
        self._go_on_from(event.restored)
        self._tasks, self._parts, self._last_parts = {}, {}, {}
        tasks = self._make_tasks()
        self._state = self._first_state(tasks)
        log.warning("tasks start again checkpoint=%d", self.number)
        supervisor.begin_again(tasks)
        self.handle(Due())

    def _beginning(self) -> list[str]:
        numbers = dict.fromkeys(self._store.skipped)
        skipped = [f"checkpoint {number} is damaged and was left out" for number in numbers]
        if self._resumed is None:
            return skipped
        resumed = f"resumed from checkpoint {self._resumed.number} ({self._resumed.records:,} records done)"
        return [*skipped, resumed, *self._dropped]

    def notes(self, tasks: Iterable[Task]) -> tuple[str, ...]:
        """Return lines for the report of the job with these tasks."""
        sources = [task.operators[0] for task in tasks if task.nodes[0].kind is Kind.SOURCE]
        has_read = any(operator.metrics.records_in for operator in sources)
        is_last = self._resumed is not None and self.number == self._resumed.number
        nothing = ["nothing new: the sources have no further records"] if is_last and not has_read else []
        failed = {
            operator.node.name: operator.unseen_failed
            for task in tasks
            for operator in task.operators
            if isinstance(operator, Changed) and operator.unseen_failed
        }
        unseen = [
            f'"{name}" calls no key removed, because records before it failed: {count:,}'
            for name, count in failed.items()
        ]
        return (*self._beginning(), *nothing, *unseen)

    def handle(self, event: CheckpointEvent) -> None:
        """Take one step, and carry out its actions."""
        match event:
            case PartGiven(task, number):
                (self._last_parts if number is None else self._parts)[task] = event
            case WriteFailed(error):
                self._fail(error)
                return
            case Reloaded():
                self._begin_again(event)
                return
        before = self._state.due
        self._state, actions = step(self._state, event, self._supervisor.backend.now())
        if self._state.due is not None and self._state.due != before:
            self._supervisor.call_at(self._state.due, lambda: self.handle(Due()))
        for action in actions:
            self._carry_out(action)

    def _carry_out(self, action: Action) -> None:
        match action.do:
            case ActionKind.ASK:
                for name in action.tasks:
                    self._tasks[name].request_part(action.number)
            case ActionKind.WRITE:
                parts = self._parts | {name: self._last_parts[name] for name in action.tasks}
                self._parts = {}
                rows = tuple(row for name in sorted(parts) for row in parts[name].rows)
                made = Checkpoint(action.number, self._graph, rows, accounts=self._accounts(parts.values(), rows))
                for name in action.tasks:  # later checkpoints need no more of a task that has ended
                    without = tuple(map(without_changes, parts[name].rows))
                    self._last_parts[name] = replace(parts[name], rows=without)
                assert self._lane is not None
                self._lane.run(lambda: self._write(made))
            case ActionKind.COMPLETE:
                log.debug("checkpoint complete number=%d", action.number)
                for name, task in self._tasks.items():
                    task.request_commit(action.number, is_last=name in action.tasks)

    def _accounts(self, parts: Iterable[PartGiven], rows: Iterable[Row]) -> dict[str, Counts]:
        """Return the records of all operators up to a checkpoint, and those that it would lose."""
        counts = total(part.counts for part in parts)
        lost = not_taken(self._ways, counts, self.waiting)
        lost.subtract(_held(rows))
        sums = {name: one.plus(self.before.get(name, Counts())) for name, one in counts.items()}
        return {name: one._replace(lost=lost[name]) for name, one in sums.items()}

    def _write(self, made: Checkpoint) -> None:
        """Write a checkpoint, on a thread that nothing else waits for."""
        try:
            self._store.write(replace(made, rows=tuple(map(_complete, made.rows))), self._settings.keep)
        except JobError as error:
            self._supervisor.post(WriteFailed(error))
        else:
            self._supervisor.post(Written(made.number))

    def _fail(self, error: Exception) -> None:
        """Fail the job. All of its tasks that have not ended depend on the checkpoint, so any of them may say it."""
        for name, record in self._supervisor.state.tasks.items():
            if record.state not in TASK_TERMINAL:
                self._supervisor.handle(TaskFailed(name, error))
                return

    def close(self, ended: Ended | None = None) -> None:
        """Leave the folder; nothing of the job runs any more. Tasks that are done have committed all they prepared."""
        if self._lane is not None:
            self._lane.close(wait=True)
            if ended is not None and all(task.state is TaskState.DONE for task in ended.state.tasks.values()):
                self._store.settle()
        self._store.close()


def _restored(loaded: Checkpoint) -> Restored:
    rows = {(row.operator, row.index): (row, _unpickled(row.operator, row.body)[0]) for row in loaded.rows}
    changes = {
        key: [one for body in bodies for one in _unpickled(key[0], body)] for key, bodies in loaded.changes.items()
    }
    return Restored(loaded, rows, changes)


def _complete(row: Row) -> Row:
    try:
        return with_changes(row)
    except Exception as error:
        raise cannot_be_pickled(row.operator, "has a state", error) from error


def _held(rows: Iterable[Row]) -> Counter[str]:
    held: Counter[str] = Counter()
    for row in rows:
        held[row.operator] += row.held
    return held


def _without(names: Sequence[str], found: Checkpoint) -> tuple[Checkpoint, list[str]]:
    """Return a checkpoint without the states of these operators, and a line for each of them."""
    had = {row.operator for row in found.rows}
    rows = tuple(row for row in found.rows if row.operator not in names)
    changes = {key: bodies for key, bodies in found.changes.items() if key[0] not in names}
    lines = [
        f'the state of "{name}" was dropped' if name in had else f'"{name}" had no state to drop' for name in names
    ]
    return replace(found, rows=rows, changes=changes), lines


def _in_file_names(name: str) -> str:
    """Return the name of an operator for names of files, which may have 255 bytes."""
    quoted = quote(name, safe="")
    return quoted if len(quoted) <= NAME_LENGTH_MAX else hashlib.sha256(name.encode()).hexdigest()


def _unpickled(operator: str, body: bytes) -> list[Any]:
    try:
        return each_pickle(body)
    except Exception as error:
        text = f'state of operator "{operator}" cannot be unpickled: {describe(error)}'
        failed = CheckpointError(text, operator=operator)
        hint(failed, f"A class of its records may have been moved or renamed. {FRESH_HINT}")
        raise failed from error


def _show(note: str) -> None:
    """Show a line on a terminal."""
    if sys.stderr is not None and sys.stderr.isatty():
        with suppress(OSError, ValueError):  # the terminal may be gone
            sys.stderr.write(f"{note}\n")
            sys.stderr.flush()
