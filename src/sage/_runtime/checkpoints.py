"""When checkpoints are made, without I/O: events in, next state and actions out.

`step(state, event, now)` is to checkpoints as `transitions.step` is to the lifecycle. One checkpoint is made at a time:
sources are asked for it, each task gives its part, all parts are written, and then sinks commit.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from enum import Enum
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from sage._runtime.accounts import Counts


@dataclass(frozen=True, slots=True)
class Row:
    """The state of one operator in one task, pickled.

    Attributes:
        operator: its name.
        index: which of the parallel tasks.
        records: how many records are done by it; negative if they wait in it.
        body: the state, the records left, and the state of the function, pickled.
        since: the number of the first checkpoint that is needed for the values of its keys, or None without any.
        changes: those of them that this checkpoint writes, pickled; empty if nothing has changed.
        keys: how many keys it has, or None if it keeps nothing by key.
        held: how many records wait in it that it does not count as taken.
        late: returns `since` and `changes`, if these are pickled only when the checkpoint is written.
    """

    operator: str
    index: int
    records: int
    body: bytes
    since: int | None = None
    changes: bytes | None = None
    keys: int | None = None
    held: int = 0
    late: Callable[[], tuple[int, bytes]] | None = None


def without_changes(row: Row) -> Row:
    """Return the row for a later checkpoint, if nothing has changed since the one that wrote it."""
    return row if row.changes is None else replace(row, changes=b"")


def with_changes(row: Row) -> Row:
    """Return the row with the changes of its keys, pickled now if they are not yet; no changes the second time."""
    if row.late is None:
        return row
    since, changes = row.late()
    return replace(row, since=since, changes=changes, late=None)


class CheckpointEvent:
    """Something that happened to checkpoints."""


@dataclass(frozen=True, slots=True)
class Due(CheckpointEvent):
    """A moment has come; also the first one."""


@dataclass(frozen=True, slots=True)
class PartGiven(CheckpointEvent):
    """A task has given its part of checkpoint `number`, or its last one (None), as its inputs have ended.

    Attributes:
        task: its name.
        number: the number of the checkpoint, or None.
        rows: the states of its operators.
        counts: the records of its operators in this run.
    """

    task: str
    number: int | None
    rows: tuple[Row, ...] = ()
    counts: Mapping[str, Counts] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Written(CheckpointEvent):
    """A checkpoint is durable."""

    number: int


@dataclass(frozen=True, slots=True)
class WriteFailed(CheckpointEvent):
    """A checkpoint could not be written."""

    error: Exception


class ActionKind(Enum):
    """The kinds of actions."""

    ASK = "ask the tasks, which are sources, for their part"
    WRITE = "write the parts; those of the tasks are their last ones"
    COMPLETE = "let sinks commit; nothing more is needed of the tasks"


@dataclass(frozen=True, slots=True)
class Action:
    """Something to do about checkpoint `number`."""

    do: ActionKind
    number: int
    tasks: frozenset[str] = frozenset()


NOBODY: frozenset[str] = frozenset()


@dataclass(frozen=True, slots=True)
class Checkpoints:
    """The checkpoints of a job as they stand.

    Attributes:
        interval_s: the time between the end of one checkpoint and the beginning of the next, in seconds.
        tasks: the names of all tasks.
        sources: those that read sources.
        last: the number of the last complete checkpoint.
        due: when the next one begins, or None before the first event.
        is_running: whether one is being made, with the number after `last`.
        is_writing: whether its parts are being written.
        given: the tasks that have given their part of it.
        ended: the tasks that have given their last part.
        covered: those whose last part is in the checkpoint that is being written.
        released: those whose last part is in a complete checkpoint.
    """

    interval_s: float
    tasks: frozenset[str]
    sources: frozenset[str]
    last: int = 0
    due: float | None = None
    is_running: bool = False
    is_writing: bool = False
    given: frozenset[str] = NOBODY
    ended: frozenset[str] = NOBODY
    covered: frozenset[str] = NOBODY
    released: frozenset[str] = NOBODY


def step(state: Checkpoints, event: CheckpointEvent, now: float) -> tuple[Checkpoints, tuple[Action, ...]]:
    """Return what follows from an event at the monotonic time `now`: the next state, and the actions."""
    actions: list[Action] = []
    match event:
        case PartGiven(task, None):
            state = replace(state, ended=state.ended | {task})
        case PartGiven(task, _):
            state = replace(state, given=state.given | {task})
        case Written(number) if state.is_writing:
            actions.append(Action(ActionKind.COMPLETE, number, state.covered))
            state = replace(
                state,
                last=number,
                due=now + state.interval_s,
                is_running=False,
                is_writing=False,
                given=NOBODY,
                released=state.released | state.covered,
            )
    if state.due is None:
        state = replace(state, due=now + state.interval_s)
    have_ended = state.ended == state.tasks
    assert state.due is not None
    if not state.is_running and state.released != state.tasks and (have_ended or now >= state.due):
        state = replace(state, is_running=True)
        asked = state.sources - state.ended
        actions += [Action(ActionKind.ASK, state.last + 1, asked)] if asked else []
    if state.is_running and not state.is_writing and state.given | state.ended == state.tasks:
        # A task that ended after its part has processed records that do not belong to this checkpoint.
        state = replace(state, is_writing=True, covered=state.ended - state.given)
        actions.append(Action(ActionKind.WRITE, state.last + 1, state.covered))
    return state, tuple(actions)
