"""Wrong programs: the error names the culprit and says what to do, and nothing was started."""

from __future__ import annotations

import threading
from collections.abc import AsyncIterator, Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from sage import (
    BaseService,
    BatchFunction,
    DataStream,
    DuplicateNameError,
    FilterFunction,
    FlatMapFunction,
    GraphError,
    LocalEnvironment,
    MapFunction,
    RemoteEnvironment,
    Retry,
    ServiceOptions,
    SinkFunction,
    SourceFunction,
    UnknownServiceError,
    UnsupportedPlanError,
)
from sage.connectors import JsonLines, JsonLinesFiles
from sage.testing import StepBackend

# What is refused has started nothing, so that there is nothing to wait for either.
pytestmark = pytest.mark.sage_clean(within_s=0.0)


async def later(one: object, other: object) -> object:
    return one, other


def note_of(error: BaseException) -> str:
    notes: list[str] = error.__notes__
    return "\n".join(notes)


class Memory(BaseService):
    """A service that must not be built."""

    def __init__(self) -> None:
        raise AssertionError("it was built")

    def recall(self, query: str) -> str:
        return query


class Plain:
    """A class that is no function."""


class Lower(MapFunction):
    def __init__(self, plus: int) -> None:
        self._plus = plus

    def execute(self, data: int) -> int:
        return data + self._plus


class Twice(MapFunction):
    def execute(self, left: int, right: int) -> int:  # type: ignore[override]
        return left + right


class NoExecute(MapFunction):
    pass


class Even(FilterFunction):
    def execute(self, data: int) -> bool:
        return data % 2 == 0


class Ticks(SourceFunction):
    def execute(self) -> int:
        return 1


class Show(SinkFunction):
    def execute(self, data: Any) -> None:
        pass


Build = Callable[[DataStream], Any]


@pytest.mark.parametrize(
    ("build", "message", "note"),
    [
        (lambda s: s.map(Plain), "map(Plain): the class Plain is not a function class", "Derive it from MapFunction"),
        (
            lambda s: s.sink(Plain),
            "sink(Plain): the class Plain is not a function class",
            "Derive it from SinkFunction",
        ),
        (lambda s: s.map(Even), "map(Even): Even is a FilterFunction", "map takes MapFunction"),
        (lambda s: s.filter(Lower), "filter(Lower): Lower is a MapFunction", "filter takes FilterFunction"),
        (lambda s: s.flatmap(Show()), "flatmap(Show): Show is a SinkFunction", "flatmap takes FlatMapFunction"),
        (lambda s: s.map(NoExecute), "map(NoExecute): NoExecute does not define execute", "Write a method execute"),
        (lambda s: s.map(Memory), "map(Memory): Memory is a service, not a function", "env.register_service"),
        (lambda s: s.map(7), "map(7): int is not callable", "Give a function class"),
        (lambda s: s.map(None), "map(None): NoneType is not callable", "Give a function class"),
        (lambda s: s.map("upper"), "map('upper'): str is not callable", "Give a function class"),
        (lambda s: s.map([len]), "list is not callable", "Give a function class"),
        (lambda s: s.map(lambda: 1), "has the wrong arity", "map calls it with one record"),
        (lambda s: s.map(lambda a, b: a), "has the wrong arity", "map calls it with one record"),
        (lambda s: s.map(Twice), "Twice.execute", "map calls it with one record"),
        (lambda s: s.filter(Twice()), "Twice", "filter takes FilterFunction"),
        (lambda s: s.sink(lambda: None), "has the wrong arity", "sink calls it with one record"),
        (lambda s: s.keyby(lambda a, b: a), "has the wrong arity", "keyby calls it with one record"),
        (lambda s: s.keyby(lambda x: x).reduce(lambda a: a), "has the wrong arity", "reduce calls it with 2 arguments"),
        (lambda s: s.keyby(lambda x: x, strategy="modulo"), "strategy is 'modulo'", "hash, broadcast, round_robin"),
        (lambda s: s.keyby(lambda x: x).reduce(max, emit="all"), "reduce: emit is 'all'", 'It is "each" or "last"'),
        (lambda s: s.fill_future(s), "is filled, but it is not a future", "env.from_future(name)"),
        (lambda s: s.reduce(max), 'reduce: the stream ("source") has no keys', "Call keyby(...)"),
        (lambda s: s.connect(s).join(lambda *_: []), "has no keys", "Call keyby(...)"),
        (lambda s: s.stateful_map(divmod, 0), 'stateful_map: the stream ("source") has no keys', "Call keyby(...)"),
        (lambda s: s.count(), 'count: the stream ("source") has no keys', "Call keyby(...)"),
        (lambda s: s.aggregate(0, max), 'aggregate: the stream ("source") has no keys', "Call keyby(...)"),
        (lambda s: s.top_k(1), 'top_k: the stream ("source") has no keys', "Call keyby(...)"),
        (lambda s: s.distinct(), 'distinct: the stream ("source") has no keys', "Call keyby(...)"),
        (lambda s: s.changed(), 'changed: the stream ("source") has no keys', "Call keyby(...)"),
        (lambda s: s.keyby(abs).stateful_map(lambda a: a, 0), "has the wrong arity", "calls it with 2 arguments"),
        (lambda s: s.keyby(abs).stateful_map(divmod, list), "stateful_map: initial is <class 'list'>", "such as []"),
        (lambda s: s.keyby(abs).aggregate(lambda: 0, max), "aggregate: initial is <function", "a copy of it"),
        (
            lambda s: s.keyby(abs).aggregate(threading.Lock(), max),
            "cannot be copied: TypeError",
            "begins with a copy of it",
        ),
        (lambda s: s.keyby(abs).aggregate(0, abs), "aggregate: add is abs, which has the wrong arity", "2 arguments"),
        (lambda s: s.keyby(abs).aggregate(0, max, 7), "aggregate: result is 7, which is not callable", "one argument"),
        (lambda s: s.keyby(abs).aggregate(0, later), "add is later, which is a coroutine function", "plain function"),
        (lambda s: s.keyby(abs).count(emit="all"), "count: emit is 'all'", 'It is "each" or "last"'),
        (lambda s: s.keyby(abs).top_k(0), "top_k: k is 0, which is not a positive", "a whole number"),
        (lambda s: s.keyby(abs).top_k(2, by=pow), "top_k: by is pow, which has the wrong arity", "one argument"),
        (
            lambda s: s.keyby(abs).changed(removed=lambda: 0),
            "changed: removed is <lambda>, which has the wrong arity: too many positional arguments",
            "Give a plain function of one argument.",
        ),
        (
            lambda s: s.keyby(abs).changed(fingerprint="id"),
            "fingerprint is 'id', which is not callable",
            "one argument",
        ),
        (lambda s: s.map(len, on_error="retry"), "on_error is 'retry'", 'It is "fail", "skip"'),
    ],
)
def test_a_wrong_function_is_told_while_the_graph_is_built(build: Build, message: str, note: str) -> None:
    env = LocalEnvironment("test")
    stream = env.from_batch([1])
    with pytest.raises(GraphError) as caught:
        build(stream)
    assert message in str(caught.value)
    assert note in note_of(caught.value)


@pytest.mark.parametrize(
    ("build", "message", "note"),
    [
        (lambda s: s.map(Lower), "the constructor of Lower: missing a required argument: 'plus'", "constructor"),
        (lambda s: s.map(Lower, 1, 2), "the constructor of Lower: too many positional arguments", "constructor"),
        (lambda s: s.map(Lower, minus=1), "the constructor of Lower", "constructor"),
        (lambda s: s.map(lambda x: x, 5), "these arguments have no effect", "Only a function class takes arguments"),
        (lambda s: s.map(Lower(1), 5), "these arguments have no effect", "Only a function class takes arguments"),
        (lambda s: s.map(abs, paralelism=2), "paralelism=2", "Only a function class takes arguments"),
        (lambda s: s.sink(print, colour="red"), "colour='red'", "Only a function class takes arguments"),
        (lambda s: s.filter(Even, strict=True), "the constructor of Even", "constructor"),
    ],
)
def test_arguments_without_effect_are_told_while_the_graph_is_built(build: Build, message: str, note: str) -> None:
    env = LocalEnvironment("test")
    stream = env.from_batch([1])
    with pytest.raises(TypeError) as caught:
        build(stream)
    assert message in str(caught.value)
    assert note in note_of(caught.value)


@pytest.mark.parametrize(
    "call",
    [
        lambda env: LocalEnvironment("test", workers=3),  # type: ignore[call-arg]
        lambda env: RemoteEnvironment("test", wrokers=3),  # type: ignore[call-arg]
        lambda env: env.submit(autostopp=True),
        lambda env: env.from_batch([1], paralelism=2),
        lambda env: env.from_source(Ticks, dealy=1.0),
        lambda env: env.from_batch([1]).print(colour="red"),
        lambda env: env.from_batch([1]).keyby(abs).reduce(max, emits="last"),
        lambda env: env.register_service_factory("memory", Memory, option=1),
        lambda env: ServiceOptions(concurency=3),  # type: ignore[call-arg]
    ],
)
def test_an_unknown_keyword_is_a_type_error(call: Callable[[Any], Any]) -> None:
    with pytest.raises(TypeError) as caught:
        call(LocalEnvironment("test"))
    assert any(
        word in str(caught.value)
        for word in (
            "workers",
            "wrokers",
            "autostopp",
            "paralelism",
            "dealy",
            "colour",
            "emits",
            "option",
            "concurency",
        )
    )


@pytest.mark.parametrize("parallelism", [0, -1, 1.5, "2", True])
def test_a_parallelism_that_is_no_positive_number_is_refused(parallelism: Any) -> None:
    env = LocalEnvironment("test")
    with pytest.raises(GraphError) as caught:
        env.from_batch([1]).map(abs, parallelism=parallelism)
    assert str(caught.value) == f'operator "abs" has parallelism {parallelism!r}, which is not a positive number'


@pytest.mark.parametrize(
    ("source", "message"),
    [
        (7, "from_batch(7): int is not a source"),
        (None, "from_batch(None): NoneType is not a source"),
        (Plain, "Plain"),
        (Plain(), "Plain is not a source"),
        (Lower, "source(Lower): Lower is a MapFunction"),
        (Lower(1), "source(Lower): Lower is a MapFunction"),
        (lambda number: [number], "missing a required argument: 'number'"),
        (list, "list"),
    ],
)
def test_a_batch_source_of_the_wrong_kind_is_refused(source: Any, message: str) -> None:
    with pytest.raises(GraphError) as caught:
        LocalEnvironment("test").from_batch(source)
    assert message in str(caught.value)
    assert note_of(caught.value)


@pytest.mark.parametrize("source", [[1, 2], 7, "text", Plain, Even, lambda number: number])
def test_an_unbounded_source_of_the_wrong_kind_is_refused(source: Any) -> None:
    with pytest.raises(GraphError) as caught:
        LocalEnvironment("test").from_source(source)
    assert note_of(caught.value)


def test_arguments_of_a_source_without_effect_are_refused() -> None:
    env = LocalEnvironment("test")
    with pytest.raises(TypeError, match="2 have no effect") as caught:
        env.from_batch([1], 2)  # type: ignore[call-overload]
    assert "Only a class takes arguments" in note_of(caught.value)

    class Feed(BatchFunction):
        def execute(self) -> None:
            return None

    with pytest.raises(TypeError, match="the constructor of Feed"):
        env.from_batch(Feed, "address")  # type: ignore[call-overload]


def test_a_source_cannot_skip_its_failures() -> None:
    with pytest.raises(GraphError, match="on_error cannot skip") as caught:
        LocalEnvironment("test").from_source(Ticks, on_error="skip")
    assert "on_error=Retry(...)" in note_of(caught.value)


def test_a_source_that_cannot_be_split_is_refused_at_submit() -> None:
    env = LocalEnvironment("test")
    env.from_batch(iter([1, 2]), name="once", parallelism=2).sink(Show)
    with pytest.raises(GraphError, match='source "once" has parallelism 2, but it cannot be split') as caught:
        env.submit(autostop=True)
    assert "Give a list" in note_of(caught.value)


def test_a_source_or_a_sink_serves_one_operator(tmp_path: Path) -> None:
    (tmp_path / "in").write_text("1\n")
    source, sink = JsonLines(tmp_path / "in"), JsonLinesFiles(tmp_path / "out")
    env = LocalEnvironment("job")
    for name in ("a", "b"):
        env.from_source(source, name=f"from {name}").sink(sink, name=f"to {name}")
    with pytest.raises(GraphError) as caught:
        env.submit()
    assert [str(problem) for problem in caught.value.problems] == [
        'operators "from a" and "from b" have one JsonLines',
        'operators "to a" and "to b" have one JsonLinesFiles',
    ]
    assert not (tmp_path / "out").exists()


def test_an_empty_graph_is_refused() -> None:
    env = LocalEnvironment("nothing")
    for autostop in (False, True):
        with pytest.raises(GraphError, match='environment "nothing" has no pipeline') as caught:
            env.submit(autostop=autostop)
        assert "env.from_batch" in note_of(caught.value)


def test_an_operator_name_twice_is_refused() -> None:
    env = LocalEnvironment("test")
    stream = env.from_batch([1], name="same")
    with pytest.raises(DuplicateNameError, match='operator "same" is defined twice') as caught:
        stream.map(abs, name="same")
    assert "choose another" in note_of(caught.value)
    with pytest.raises(DuplicateNameError, match='operator "same" is defined twice') as caught:
        stream.map(abs).name("same")
    assert "choose another" in note_of(caught.value)


def test_a_service_name_twice_is_refused() -> None:
    env = LocalEnvironment("test")
    env.register_service("memory", Memory)
    with pytest.raises(DuplicateNameError, match='service "memory" is registered twice') as caught:
        env.register_service("memory", Memory)
    assert "replace=True" in note_of(caught.value)
    env.register_service("memory", Memory, options=ServiceOptions(replace=True))


def test_an_instance_is_no_service() -> None:
    env = LocalEnvironment("test")
    with pytest.raises(GraphError, match=r'service "memory": .* is not callable') as caught:
        env.register_service("memory", Plain())  # type: ignore[call-overload]
    assert "Give the class and its arguments" in note_of(caught.value)
    with pytest.raises(GraphError, match="Lower is a function of a stream, not a service"):
        env.register_service("lower", Lower)  # type: ignore[call-overload]


def test_an_unknown_service_is_refused_at_submit() -> None:
    class Ask(MapFunction):
        def execute(self, data: str) -> Any:
            return self.service("memry").recall(data)

    env = LocalEnvironment("test")
    env.register_service("memory", Memory)
    env.from_batch(["tea"]).map(Ask).sink(Show)
    for autostop in (False, True):
        with pytest.raises(UnknownServiceError, match='operator "Ask" uses service "memry"') as caught:
            env.submit(autostop=autostop)
        assert 'Registered: "memory".' in note_of(caught.value)


def test_a_handle_of_another_environment_is_refused_at_submit() -> None:
    memory = LocalEnvironment("other").register_service("memory", Memory)
    env = LocalEnvironment("test")
    env.from_batch(["tea"]).map(lambda query: memory.recall(query), name="ask").sink(Show)
    with pytest.raises(UnknownServiceError, match='operator "ask" uses service "memory", which is not registered'):
        env.submit(autostop=True)


def test_an_unknown_dependency_is_refused_at_submit() -> None:
    env = LocalEnvironment("test")
    env.register_service("memory", Memory, options=ServiceOptions(depends_on=["disk"]))
    env.from_batch([1]).sink(Show)
    with pytest.raises(UnknownServiceError, match='service "memory" uses service "disk", which is not registered'):
        env.submit(autostop=True)


def test_a_circle_of_dependencies_is_refused_with_its_path() -> None:
    env = LocalEnvironment("test")
    for name, other in (("a", "b"), ("b", "c"), ("c", "a")):
        env.register_service(name, Memory, options=ServiceOptions(depends_on=[other]))
    env.from_batch([1]).sink(Show)
    with pytest.raises(GraphError, match="services depend on each other in a cycle: a -> b -> c -> a") as caught:
        env.submit(autostop=True)
    assert note_of(caught.value)


def test_several_problems_are_told_at_once() -> None:
    class Ask(MapFunction):
        def execute(self, data: str) -> Any:
            return self.call_service("memry", data)

    env = LocalEnvironment("test")
    env.register_service("memory", Memory, options=ServiceOptions(depends_on=["disk"]))
    stream = env.from_batch(["tea"])
    stream.map(Ask, name="ask").sink(Show)
    stream.union(env.from_future("later"))
    with pytest.raises(GraphError) as caught:
        env.submit(autostop=True)
    assert str(caught.value).startswith('3 problems in "test":')
    texts = [str(problem) for problem in caught.value.problems]
    assert len(texts) == 3
    for text in (
        'future "later" is never filled',
        'service "memory" uses service "disk", which is not registered',
        'operator "ask" uses service "memry", which is not registered',
    ):
        assert text in texts
        assert f"\n  - {text}" in str(caught.value)
    assert len(caught.value.__notes__) == 3


def test_one_problem_is_raised_as_itself() -> None:
    env = LocalEnvironment("test")
    env.from_batch([1]).union(env.from_future("later"))
    with pytest.raises(GraphError) as caught:
        env.submit()
    assert caught.value.problems == (caught.value,)


def test_kept_services_that_are_unknown_are_refused() -> None:
    env = LocalEnvironment("test")
    env.register_service("memory", Memory)
    env.from_batch([1]).sink(Show)
    with pytest.raises(GraphError, match="keep_services names memry, which is not registered") as caught:
        env.submit(autostop=True, keep_services=["memry"])
    assert "Registered: memory" in note_of(caught.value)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"depends_on": "disk"}, "depends_on is the string 'disk'"),
        ({"restart": "sometimes"}, "restart is 'sometimes'"),
        ({"concurrency": 0}, "concurrency is 0"),
        ({"concurrency": "4"}, "concurrency is '4', which is not a positive number"),
        ({"concurrency": 2.5}, "concurrency is 2.5"),
        ({"restarts_max": -1}, "restarts_max is -1, which is not a number of at least 0"),
        ({"stop_timeout_s": -1}, "stop_timeout_s is -1"),
        ({"stop_timeout_s": float("nan")}, "stop_timeout_s is nan"),
        ({"start_timeout_s": "1"}, "start_timeout_s is '1'"),
        ({"start_timeout_s": None}, "start_timeout_s is None"),
        ({"call_timeout_s": "x"}, "call_timeout_s is 'x'"),
        ({"health_interval_s": None}, "health_interval_s is None"),
        ({"kill_grace_s": float("inf")}, "kill_grace_s is inf"),
        ({"backoff_s": 1}, "backoff_s is 1"),
        ({"backoff_s": (1, -1)}, "backoff_s is (1, -1), with the pause -1"),
        ({"depends_on": [5]}, "depends_on is [5]"),
        ({"depends_on": None}, "depends_on is None"),
    ],
)
def test_service_options_that_cannot_work_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(GraphError) as caught:
        ServiceOptions(**options)
    assert f"service option {message}" in str(caught.value)
    assert caught.value.__notes__


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"stop_timeout_s": "60"}, "stop_timeout_s is '60'"),
        ({"stop_timeout_s": -1}, "stop_timeout_s is -1"),
        ({"drain_timeout_s": True}, "drain_timeout_s is True"),
        ({"close_timeout_s": float("nan")}, "close_timeout_s is nan"),
        ({"services_share": 2}, "services_share is 2"),
        ({"services_reserve_s": [5]}, "services_reserve_s is [5]"),
    ],
)
def test_bounds_of_an_environment_that_cannot_work_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(GraphError) as caught:
        LocalEnvironment("test", **settings)
    assert str(caught.value) == f'environment "test": {message}'
    assert "Give a" in note_of(caught.value)


def test_a_variable_that_holds_no_number_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SAGE_STOP_TIMEOUT_S", "soon")
    with pytest.raises(GraphError, match="the environment variable SAGE_STOP_TIMEOUT_S is 'soon'"):
        LocalEnvironment("test")


def test_a_backend_is_made_for_each_job() -> None:
    with pytest.raises(TypeError, match=r'environment "test": backend is <sage\.testing\.StepBackend') as caught:
        LocalEnvironment("test", backend=StepBackend(1))  # type: ignore[arg-type]
    assert "lambda: StepBackend(seed)" in note_of(caught.value)


@pytest.mark.parametrize("name", [5, "", None, ["a"], "two\nlines", "\x00"])
def test_what_cannot_be_a_name_is_refused(name: Any) -> None:
    """It would break the lines of reports, plans and logs, or fail where nobody knows where it came from."""
    env = LocalEnvironment("test")
    stream = env.from_batch([1])
    calls: list[tuple[str, Callable[[], Any]]] = [
        ("an environment", lambda: LocalEnvironment(name)),
        ("an operator", lambda: stream.name(name)),
        ("a service", lambda: env.register_service(name, Memory)),
    ]
    if name is not None:
        calls += [
            ("an operator", lambda: stream.map(str, name=name)),
            ("an operator", lambda: env.from_batch([1], name=name)),
            ("an operator", lambda: env.dead_letters(name)),
        ]
    for kind, call in calls:
        with pytest.raises(GraphError, match=f"the name of {kind} is ") as caught:
            call()
        assert "Give a string of printable characters" in note_of(caught.value)
    stream.sink(Show)
    assert len(env.explain().partition("\npromises")[0].splitlines()) == 2


@pytest.mark.parametrize("delay", [-1, "1", float("nan"), float("inf")])
def test_a_delay_that_is_no_time_is_refused(delay: Any) -> None:
    env = LocalEnvironment("test")
    with pytest.raises(GraphError, match=f"from_source: delay is {delay!r}"):
        env.from_source(Ticks, delay=delay)


def test_options_of_a_service_are_service_options() -> None:
    env = LocalEnvironment("test")
    with pytest.raises(TypeError, match=r"service \"memory\": options is {'concurrency': 2}") as caught:
        env.register_service("memory", Memory, options={"concurrency": 2})  # type: ignore[call-overload]
    assert "ServiceOptions(...)" in note_of(caught.value)


def test_names_of_kept_services_can_be_read() -> None:
    env = LocalEnvironment("test")
    env.from_batch([1]).sink(Show)
    with pytest.raises(TypeError, match="keep_services is None") as caught:
        env.submit(autostop=True, keep_services=None)  # type: ignore[arg-type]
    assert "True, False or names" in note_of(caught.value)


async def each(record: int) -> AsyncIterator[int]:
    yield record


class EachOf(FlatMapFunction):
    async def execute(self, data: int) -> AsyncIterator[int]:  # type: ignore[override]
        yield data


@pytest.mark.parametrize(
    ("build", "label"),
    [
        (lambda env: env.from_batch([1]).flatmap(each), "flatmap(each): each"),
        (lambda env: env.from_batch([1]).flatmap(EachOf), "flatmap(EachOf): execute"),
        (lambda env: env.from_batch([1]).map(partial(each)), "map(partial): partial"),
    ],
)
def test_asynchronous_generator_functions_are_refused(build: Callable[[LocalEnvironment], Any], label: str) -> None:
    with pytest.raises(GraphError) as caught:
        build(LocalEnvironment("test"))
    assert str(caught.value) == f"{label} is an asynchronous generator function"
    assert "returns a list" in note_of(caught.value)


def test_dead_letters_belong_to_the_environment_that_handles_them() -> None:
    """Otherwise they would go to whatever has the same number in the other graph."""
    other = LocalEnvironment("other")
    letters = other.dead_letters()
    env = LocalEnvironment("test")
    with pytest.raises(GraphError, match="on_error: the streams belong to two environments"):
        env.from_batch([1], on_error=letters)
    stream = env.from_batch([1])
    with pytest.raises(GraphError, match="on_error: the streams belong to two environments"):
        stream.map(str, on_error=Retry(then=letters))


def test_what_serves_is_a_function() -> None:
    env = LocalEnvironment("test")
    with pytest.raises(GraphError, match=r'serve\("answers"\): None is not callable') as caught:
        env.serve("answers", None)  # type: ignore[arg-type]
    assert "lambda requests" in note_of(caught.value)
    env.serve("answers", lambda requests: requests.map(str))


def test_a_remote_environment_refuses_what_a_cluster_does_not_have() -> None:
    env = RemoteEnvironment("far away")
    env.register_service("memory", Memory, options=ServiceOptions(shared=True))
    env.from_batch([1]).sink(Show)
    with pytest.raises(UnsupportedPlanError, match='service "memory" is shared') as caught:
        env.submit(autostop=True)
    assert 'host="inline"' in note_of(caught.value)


def test_a_remote_environment_keeps_no_services() -> None:
    env = RemoteEnvironment("far away")
    env.register_service("memory", Memory)
    env.from_batch([1]).sink(Show)
    with pytest.raises(UnsupportedPlanError, match='environment "far away" cannot keep services in a cluster'):
        env.submit(autostop=True, keep_services=True)


def test_what_cannot_be_sent_to_a_cluster_is_named() -> None:
    lock = threading.Lock()
    env = RemoteEnvironment("far away")
    env.from_batch([1]).map(lambda record: (record, lock), name="locked").sink(Show)
    with pytest.raises(GraphError, match='operator "locked" cannot be sent to the cluster: variable "lock"'):
        env.submit(autostop=True)


@pytest.mark.parametrize(
    ("place", "message"),
    [
        ({"at": "moon"}, "a place is at 'moon'"),
        ({"num_gpus": -1}, "a place reserves num_gpus=-1, which is not an amount"),
        ({"at": "driver", "num_cpus": 1}, "a place at the driver reserves num_cpus"),
    ],
)
def test_a_place_that_cannot_be_is_refused(place: dict[str, Any], message: str) -> None:
    env = LocalEnvironment("test")
    with pytest.raises(GraphError, match=message):
        env.from_batch([1]).place(**place)


def test_a_loop_that_is_torn_apart_by_places_is_refused() -> None:
    env = RemoteEnvironment("far away")
    loop = env.from_future("loop")
    around = env.from_batch([3]).union(loop).map(lambda n: n - 1).place(num_cpus=1).filter(lambda n: n > 0)
    around.fill_future(loop)
    with pytest.raises(UnsupportedPlanError, match="a feedback loop has to run in one process"):
        env.submit(autostop=True)


def test_values_in_messages_are_short_and_their_repr_may_raise() -> None:
    class Opaque:
        def __repr__(self) -> str:
            raise RuntimeError("no")

    env = LocalEnvironment("test")
    with pytest.raises(GraphError, match="its repr raised RuntimeError"):
        env.from_batch([1]).map(Opaque())  # type: ignore[call-overload]
    with pytest.raises(GraphError) as caught:
        env.from_batch([1]).map("x" * 10_000)  # type: ignore[call-overload]
    assert len(str(caught.value)) < 300
