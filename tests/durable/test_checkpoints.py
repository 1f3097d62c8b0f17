"""When checkpoints are made: the pure core, with numbers for times."""

from __future__ import annotations

from typing import TYPE_CHECKING

from hypothesis import given
from hypothesis import strategies as st

from sage._runtime.checkpoints import (
    Action,
    ActionKind,
    CheckpointEvent,
    Checkpoints,
    Due,
    PartGiven,
    Written,
    step,
)

if TYPE_CHECKING:
    from collections.abc import Iterable

TASKS = frozenset({"in", "map", "out"})
IN = frozenset({"in"})


def play(events: Iterable[tuple[float, CheckpointEvent]], last: int = 0) -> tuple[Checkpoints, list[Action]]:
    state = Checkpoints(5.0, TASKS, IN, last)
    done: list[Action] = []
    for now, event in events:
        state, actions = step(state, event, now)
        done += actions
    return state, done


def test_sources_are_asked_when_the_time_has_come() -> None:
    assert play([(0, Due()), (4.9, Due())])[1] == []
    assert play([(0, Due()), (5, Due()), (6, Due())], last=36)[1] == [Action(ActionKind.ASK, 37, IN)]


def test_it_is_written_when_every_task_has_given_its_part() -> None:
    begun = [(0.0, Due()), (5.0, Due())]
    parts = [(5.0, PartGiven(task, 1)) for task in ("in", "map", "out")]
    assert play([*begun, *parts[:2]])[1] == [Action(ActionKind.ASK, 1, IN)]
    state, actions = play([*begun, *parts, (5.5, Due()), (6.0, Written(1)), (10.9, Due())])
    assert actions[1:] == [Action(ActionKind.WRITE, 1), Action(ActionKind.COMPLETE, 1)]
    assert (state.last, state.is_running) == (1, False)
    assert step(state, Due(), 11.0)[1] == (Action(ActionKind.ASK, 2, IN),)


def test_tasks_that_have_ended_are_covered_by_their_last_part() -> None:
    _, actions = play([(0, Due()), *((1, PartGiven(task, None)) for task in TASKS), (2, Written(1)), (99, Due())])
    assert actions == [Action(ActionKind.WRITE, 1, TASKS), Action(ActionKind.COMPLETE, 1, TASKS)]


def test_a_task_that_ended_after_its_part_is_covered_by_the_next_checkpoint() -> None:
    parts = [(5, PartGiven("in", 1)), (5, PartGiven("in", None)), (5, PartGiven("map", 1)), (5, PartGiven("out", 1))]
    ends = [(6, PartGiven("map", None)), (6, PartGiven("out", None))]
    _, actions = play([(0, Due()), (5, Due()), *parts, *ends, (7, Written(1)), (8, Written(2))])
    assert actions == [
        Action(ActionKind.ASK, 1, IN),
        Action(ActionKind.WRITE, 1),
        Action(ActionKind.COMPLETE, 1),
        Action(ActionKind.WRITE, 2, TASKS),
        Action(ActionKind.COMPLETE, 2, TASKS),
    ]


@given(st.lists(st.sampled_from([*sorted(TASKS), "time", "disk"]), max_size=60))
def test_a_task_is_released_only_by_a_checkpoint_with_its_last_part(turns: list[str]) -> None:
    state, now = Checkpoints(1.0, TASKS, IN), 0.0
    asked: dict[str, int] = {}
    released: set[str] = set()
    writing: Action | None = None
    for turn in [*turns, *["in", "map", "out", "disk"] * 8]:
        now += 0.5
        event: CheckpointEvent = Due()
        if turn == "disk" and writing is not None:
            event, writing = Written(writing.number), None
        elif turn in TASKS and turn not in state.ended and (turn in asked or not asked):
            event = PartGiven(turn, asked.pop(turn, None))  # a barrier on its way reaches a task before the end
        state, actions = step(state, event, now)
        for action in actions:
            if action.do is ActionKind.ASK:
                asked = dict.fromkeys(TASKS - state.ended, action.number)
            elif action.do is ActionKind.WRITE:
                assert writing is None
                assert action.number == state.last + 1
                assert action.tasks <= state.ended - state.given
                writing = action
            else:
                released |= action.tasks
        assert released == state.released <= state.ended
    assert released == TASKS
