"""Plans as text: what `explain` says of typical graphs, which operators share a task, and what is refused.

A changed plan shows as a changed file under golden/, which a reviewer reads.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from sage import BaseCoMapFunction, BaseJoinFunction, LocalEnvironment, MapFunction, Retry, ServiceOptions
from sage._plan.planner import plan
from sage.errors import GraphError

if TYPE_CHECKING:
    from collections.abc import Callable

    from sage.stream import DataStream

GOLDEN = Path(__file__).parent / "golden"


def double(record: int) -> int:
    return record * 2


def is_even(record: int) -> bool:
    return record % 2 == 0


def words(record: str) -> list[str]:
    return record.split()


def remainder(record: int) -> int:
    return record % 3


def add(one: int, other: int) -> int:
    return one + other


def show(record: Any) -> None:
    """Takes a record in, as a sink does."""


class Both(BaseCoMapFunction):
    def map0(self, record: Any) -> Any:
        return record

    def map1(self, record: Any) -> Any:
        return -record


class Match(BaseJoinFunction):
    def execute(self, payload: Any, key: Any, tag: int) -> list[Any]:
        return [payload]


def linear(env: LocalEnvironment) -> None:
    env.from_batch([1, 2, 3]).map(double).filter(is_even).sink(show)


def fan_out(env: LocalEnvironment) -> None:
    numbers = env.from_batch([1, 2, 3], name="numbers")
    numbers.map(double, name="left").sink(show)
    numbers.map(double, name="right").filter(is_even).sink(show)


def keyed(env: LocalEnvironment) -> None:
    totals = env.from_batch(range(9), parallelism=2).keyby(remainder, parallelism=2).reduce(add, parallelism=3)
    totals.map(double, parallelism=3).sink(show)


def comap(env: LocalEnvironment) -> None:
    fast, slow = env.from_batch([1], name="fast"), env.from_batch([2], name="slow")
    fast.connect(slow).comap(Both).sink(show)


def join(env: LocalEnvironment) -> None:
    left = env.from_batch([1], name="left").keyby(remainder, name="left key")
    right = env.from_batch([2], name="right").keyby(remainder, name="right key")
    left.connect(right).join(Match, parallelism=2).sink(show)


def loop(env: LocalEnvironment) -> None:
    again = env.from_future("again")
    merged = env.from_batch([8]).union(again)
    halves = merged.map(double, name="step")
    halves.filter(is_even).fill_future(again)
    halves.sink(show)


def dead_letters(env: LocalEnvironment) -> None:
    letters = env.dead_letters("failed records")
    env.from_batch([1]).map(double, on_error=letters).sink(show)
    letters.sink(show, name="letter box")


def served(env: LocalEnvironment) -> None:
    handle = env.serve("answers", lambda requests: requests.map(double, name="answer"))
    env.from_batch([1]).map(handle.process).sink(show)


async def fetch(record: int) -> int:
    return record


def batched(records: list[int]) -> list[int]:
    return records


def holding(env: LocalEnvironment) -> None:
    fetched = env.from_batch(range(9)).map(double).map_async(fetch, parallelism=2).filter(is_even, parallelism=2)
    fetched.map_batches(batched).map(double, name="again").sink(show)


GRAPHS: dict[str, Callable[[LocalEnvironment], None]] = {
    "linear": linear,
    "fan_out": fan_out,
    "keyed": keyed,
    "comap": comap,
    "join": join,
    "loop": loop,
    "dead_letters": dead_letters,
    "served": served,
    "holding": holding,
}


@pytest.mark.parametrize("name", GRAPHS)
@pytest.mark.parametrize("format_", ["text", "mermaid"])
def test_explain_says_what_it_said(name: str, format_: str) -> None:
    """Explaining starts nothing, and says the same on every run."""
    env = LocalEnvironment(name)
    GRAPHS[name](env)
    golden = (GOLDEN / f"{name}.{'txt' if format_ == 'text' else 'mmd'}").read_text(encoding="utf-8")
    assert env.explain(format_) + "\n" == golden
    assert env.explain(format_) + "\n" == golden


def test_explain_knows_two_formats() -> None:
    """An unknown format is refused by name."""
    env = LocalEnvironment()
    linear(env)
    with pytest.raises(GraphError, match="explain: format is 'yaml'"):
        env.explain("yaml")


# --- fusion -----------------------------------------------------------------------------------------------------------


def chains(build: Callable[[LocalEnvironment], None], *, fused: bool = True) -> list[str]:
    env = LocalEnvironment()
    build(env)
    return [chain.name for chain in plan(env._graph(), fused=fused).chains]


def test_neighbours_of_equal_parallelism_share_a_task() -> None:
    """Between operators of one chain there is no channel."""
    assert chains(linear) == ["source -> double -> is_even -> show"]


def test_without_fusion_every_operator_has_tasks_of_its_own() -> None:
    """What runs is the same; only tests plan so."""
    assert chains(linear, fused=False) == ["source", "double", "is_even", "show"]


@pytest.mark.parametrize(
    ("build", "expected"),
    [
        pytest.param(
            lambda env: env.from_batch([1]).map(double, parallelism=2).sink(show, parallelism=2),
            ["source", "double -> show"],
            id="another parallelism begins a chain",
        ),
        pytest.param(
            lambda env: env.from_batch([1]).map(double).rebalance().map(double, name="second").sink(show),
            ["source -> double -> union -> second -> show"],
            id="a route to a single task is no reason",
        ),
        pytest.param(
            lambda env: (
                env.from_batch([1], parallelism=2)
                .keyby(remainder, parallelism=2)
                .map(double, parallelism=2)
                .sink(show, parallelism=2)
            ),
            ["source -> remainder", "double -> show"],
            id="keys are exchanged once",
        ),
        pytest.param(
            lambda env: env.from_batch([1], name="a").union(env.from_batch([2], name="b")).sink(show),
            ["a", "b", "union -> show"],
            id="several inputs begin a chain",
        ),
        pytest.param(
            fan_out, ["numbers", "left -> show-1", "right -> is_even -> show-2"], id="several outputs end one"
        ),
        pytest.param(
            lambda env: env.from_batch([1]).map(double).map_async(fetch).map_batches(batched).sink(show),
            ["source -> double", "fetch", "batched -> show"],
            id="what holds records begins a chain",
        ),
        pytest.param(
            dead_letters,
            ["source -> double -> show", "failed records -> letter box"],
            id="dead letters leave a chain in its middle",
        ),
    ],
)
def test_what_ends_a_chain(build: Callable[[LocalEnvironment], DataStream | None], expected: list[str]) -> None:
    """Only where order and distribution are kept anyway do operators share a task."""
    env = LocalEnvironment()
    build(env)
    assert sorted(chain.name for chain in plan(env._graph()).chains) == sorted(expected)


# --- validation -------------------------------------------------------------------------------------------------------


def test_all_problems_are_listed_at_once() -> None:
    """Unknown services, circles and unfilled futures come in one error, nothing was started."""
    env = LocalEnvironment("broken")
    env.register_service("a", dict, options=ServiceOptions(depends_on=["b"]))
    env.register_service("b", dict, options=ServiceOptions(depends_on=["a", "nobody"]))
    again = env.from_future("again")
    env.from_batch((number for number in [1]), parallelism=2, name="numbers").union(again).sink(show)
    with pytest.raises(GraphError) as caught:
        env.submit(autostop=True)
    assert str(caught.value).splitlines() == [
        '4 problems in "broken":',
        '  - future "again" is never filled',
        '  - source "numbers" has parallelism 2, but it cannot be split',
        '  - service "b" uses service "nobody", which is not registered',
        "  - services depend on each other in a cycle: a -> b -> a",
    ]
    assert "Call stream.fill_future(again) with the stream that leads back into it." in caught.value.__notes__
    assert len(caught.value.__notes__) == 4


def test_a_single_problem_is_raised_as_it_is() -> None:
    """An environment without a pipeline fails clearly."""
    with pytest.raises(GraphError, match='environment "empty" has no pipeline') as caught:
        LocalEnvironment("empty").submit(autostop=True)
    assert caught.value.__notes__ == ["Begin one with env.from_batch(...) or env.from_source(...)."]


def test_an_operator_that_emits_at_the_end_cannot_be_part_of_a_loop() -> None:
    """A loop ends when nothing is left in it, so nothing in it can wait for the end."""
    env = LocalEnvironment()
    again = env.from_future("again")
    totals = env.from_batch([1]).union(again).keyby(remainder).reduce(add, emit="last", name="total")
    totals.fill_future(again)
    with pytest.raises(GraphError, match='operator "total" emits when its input ends, but it is part of a loop'):
        env.explain()


def test_dead_letters_of_what_handles_dead_letters_are_refused() -> None:
    """A letter that fails may not come back as a letter for ever."""
    env = LocalEnvironment()
    letters = env.dead_letters()
    letters.map(double, on_error=letters).sink(show)  # type: ignore[arg-type]
    env.from_batch([1]).map(double, on_error=letters).sink(show)
    with pytest.raises(
        GraphError, match='dead letters of "dead letters" are handled by an operator that sends its own'
    ):
        env.explain()


class Memory:
    def recall(self, text: str) -> str:
        return text


class Ask(MapFunction[str, str]):
    def execute(self, data: str) -> str:
        return str(self.call_service("agent", data))


def explained() -> LocalEnvironment:
    env = LocalEnvironment("explained")
    memory = env.register_service("memory", Memory)
    env.register_service("agent", lambda memory: memory, memory, options=ServiceOptions(concurrency=None))
    env.register_service("idle", Memory, options=ServiceOptions(host="process", concurrency=2))
    letters = env.dead_letters()
    letters.sink(show, name="failed")
    asked = env.from_batch(["tea"], name="questions").map(memory.recall, name="recall")
    asked.map(Ask, name="ask", on_error=Retry(2, then=letters)).sink(show, name="answers")
    asked.map(lambda text: memory.recall(text), name="again", on_error="skip").sink(show, name="kept")
    asked.sink(show, name="all")
    return env


def test_the_explanation_tells_of_services_and_promises() -> None:
    text = explained().explain()
    assert text.startswith("physical plan of explained\n")
    assert text[text.index("services") :].splitlines() == [
        "services",
        '  memory  (inline, one call at a time): called by "recall", "again", service "agent"',
        '  agent  (inline, any number of calls at once): called by "ask"',
        "  idle  (process, 2 at once): called by no operator that can be seen",
        "promises",
        "  failed: each record once, or the job fails",
        "  answers: each record at most once",
        '    "ask" sends records that fail to "dead letters"',
        '    "ask" may be called up to 2 times for a record',
        "  kept: each record at most once",
        '    "again" drops records that fail',
        "  all: each record once, or the job fails",
        "  after a restart: nothing; sources are read from their beginning",
    ]


def test_the_flowchart_shows_who_calls_which_service() -> None:
    lines = explained().explain("mermaid").splitlines()
    assert lines[0] == "flowchart LR"
    assert '  s0[("memory")]' in lines
    assert [line for line in lines if "calls" in line] == [
        "  n3 -.->|calls| s0",
        "  n6 -.->|calls| s0",
        "  n4 -.->|calls| s1",
        "  s1 -.->|calls| s0",
    ]
