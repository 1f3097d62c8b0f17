"""The graph: what it answers, against networkx where there is an oracle, and that it survives."""

from __future__ import annotations

import os
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import networkx
import pytest
from hypothesis import given
from hypothesis import strategies as some
from services.kept import at_once, killed_after, left_clean, notes_of, output_of

from sage import LocalEnvironment, ServiceOptions
from sage.errors import ServiceError, ServiceUnavailableError
from sage.services.stores.graph import Edge, GraphStore, Node

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path


@contextmanager
def opened(path: Path) -> Iterator[GraphStore]:
    """Use a graph without a job, and see that it leaves nothing."""
    store = GraphStore(path)
    with left_clean():
        store.setup()
        try:
            yield store
        finally:
            store.cleanup()
    assert not [name for name in os.listdir(path.parent) if name.startswith(path.name + "-")]


@pytest.fixture
def graph(tmp_path: Path) -> Iterator[GraphStore]:
    with opened(tmp_path / "graph.db") as store:
        yield store


@pytest.fixture
def family(graph: GraphStore) -> GraphStore:
    people = {"ann": 70, "bob": 72, "cid": 40, "dee": 41, "eve": 12}
    graph.put_many(
        [Node(name, {"age": age, "grown": age > 17}) for name, age in people.items()],
        [
            Edge("ann", "cid", "parent", {"since": 1985}),
            Edge("bob", "cid", "parent", {"since": 1985}),
            Edge("cid", "eve", "parent", {"since": 2013}),
            Edge("dee", "eve", "parent", {"since": 2013}),
            Edge("ann", "bob", "married"),
            Edge("cid", "dee", "married", {"since": 2010}),
            Edge("eve", "eve", "knows"),
        ],
    )
    return graph


class TestQuestions:
    def test_nodes(self, family: GraphStore) -> None:
        assert family.count() == (5, 7)
        assert family.node("ann") == Node("ann", {"age": 70, "grown": True})
        assert family.node("zoe") is None
        assert [node.id for node in family.nodes()] == ["ann", "bob", "cid", "dee", "eve"]
        assert [node.id for node in family.nodes({"age": 41})] == ["dee"]
        assert [node.id for node in family.nodes({"grown": True, "age": 70})] == ["ann"]
        assert family.nodes({"age": 1}) == family.nodes({"size": None}) == []

    def test_neighbours(self, family: GraphStore) -> None:
        assert family.neighbours("cid") == ["ann", "bob", "dee", "eve"]
        assert family.neighbours("cid", direction="out") == ["dee", "eve"]
        assert family.neighbours("cid", direction="in") == ["ann", "bob"]
        assert family.neighbours("cid", relation="married") == ["dee"]
        assert family.neighbours("eve", direction="out") == ["eve"]
        assert family.neighbours("eve", direction="in") == ["cid", "dee", "eve"]
        assert family.process("bob") == ["ann", "cid"]

    def test_edges(self, family: GraphStore) -> None:
        assert len(family.edges()) == 7
        assert family.edges("cid", direction="out") == [
            Edge("cid", "dee", "married", {"since": 2010}),
            Edge("cid", "eve", "parent", {"since": 2013}),
        ]
        assert family.edges("eve", relation="knows") == [Edge("eve", "eve", "knows")]
        assert len(family.edges("eve", direction="in")) == 3
        assert [edge.source for edge in family.edges(relation="parent", where={"since": 1985})] == ["ann", "bob"]

    def test_shortest_paths(self, family: GraphStore) -> None:
        assert family.shortest_path("ann", "eve") == ["ann", "cid", "eve"]
        assert family.shortest_path("ann", "ann") == ["ann"]
        assert family.shortest_path("eve", "ann") is None
        assert family.shortest_path("eve", "ann", direction="both") == ["eve", "cid", "ann"]

    def test_lengths_are_a_property(self, graph: GraphStore) -> None:
        graph.put_many(
            edges=[
                Edge("a", "b", "road", {"km": 10}),
                Edge("a", "b", "tunnel", {"km": 3.5}),
                Edge("a", "c", "road", {"km": 1}),
                Edge("c", "b", "road", {"km": 2}),
                Edge("b", "a", "road", {"km": 0.5}),
                Edge("b", "d", "road"),
            ]
        )
        assert graph.shortest_path("a", "b") == ["a", "b"]
        assert graph.shortest_path("a", "b", weight="km") == ["a", "c", "b"]
        assert graph.shortest_path("a", "b", weight="km", direction="both") == ["a", "b"]
        assert graph.shortest_path("a", "d", weight="km") == ["a", "c", "b", "d"]
        graph.put_edge("c", "b", "road", {"km": -1})
        with pytest.raises(ValueError, match="an edge has the length -1 in 'km'"):
            graph.shortest_path("a", "b", weight="km")

    def test_what_is_around_a_node(self, family: GraphStore) -> None:
        alone = family.subgraph("eve", hops=0)
        assert [node.id for node in alone.nodes] == ["eve"]
        assert alone.edges == [Edge("eve", "eve", "knows")]
        near = family.subgraph("eve")
        assert [node.id for node in near.nodes] == ["eve", "cid", "dee"]
        assert [(edge.source, edge.target) for edge in near.edges] == [
            *(("cid", "dee"), ("cid", "eve")),
            *(("dee", "eve"), ("eve", "eve")),
        ]
        assert not near.is_cut
        assert len(family.subgraph("eve", hops=9).nodes) == 5
        assert [node.id for node in family.subgraph("cid", direction="in", hops=9).nodes] == ["cid", "ann", "bob"]
        cut = family.subgraph("eve", hops=2, nodes_max=4)
        assert [node.id for node in cut.nodes] == ["eve", "cid", "dee", "ann"]
        assert cut.is_cut

    def test_what_is_returned_may_be_changed(self, graph: GraphStore) -> None:
        given_properties = {"list": [1]}
        graph.put_node("a", given_properties)
        given_properties["list"].append(2)
        found = graph.node("a")
        assert found is not None
        found.properties["list"].append(3)
        assert graph.node("a") == Node("a", {"list": [1]})

    @given(
        edges=some.lists(
            some.tuples(some.sampled_from("abcdef"), some.sampled_from("abcdef"), some.integers(0, 9)), max_size=15
        )
    )
    def test_paths_are_those_of_networkx(self, edges: list[tuple[str, str, int]], tmp_path_factory: Any) -> None:
        """The oracle has only the shortest of the edges between two nodes."""
        path = tmp_path_factory.mktemp("graphs") / "graph.db"
        oracle = networkx.DiGraph()
        for source, target, km in edges:
            known = oracle.get_edge_data(source, target, {"km": km})["km"]
            oracle.add_edge(source, target, km=min(known, km))
        store = GraphStore(path)
        store.setup()
        store.put_many(edges=[Edge(a, b, str(place), {"km": km}) for place, (a, b, km) in enumerate(edges)])
        for a in oracle:
            for b in oracle:
                path_found = store.shortest_path(a, b, weight="km")
                assert (path_found is not None) == networkx.has_path(oracle, a, b)
                if path_found is not None:
                    length = networkx.path_weight(oracle, path_found, "km")
                    assert length == networkx.shortest_path_length(oracle, a, b, "km")
        store.cleanup()


class TestChanges:
    def test_a_later_put_takes_the_place_of_an_earlier_one(self, graph: GraphStore) -> None:
        graph.put_node("a", {"x": 1, "y": 2})
        graph.put_edge("a", "b", "likes", {"much": True})
        graph.put_node("a", {"x": 3})
        graph.put_edge("a", "b", "likes")
        assert graph.node("a") == Node("a", {"x": 3})
        assert graph.edges() == [Edge("a", "b", "likes")]
        assert graph.count() == (2, 1)

    def test_an_edge_does_not_change_its_nodes(self, graph: GraphStore) -> None:
        graph.put_node("a", {"x": 1})
        graph.put_edge("a", "b")
        assert graph.nodes() == [Node("a", {"x": 1}), Node("b")]

    def test_deletion(self, family: GraphStore) -> None:
        assert family.delete_edge("ann", "bob", "married")
        assert not family.delete_edge("ann", "bob", "married")
        assert not family.delete_edge("ann", "cid", "married")
        assert family.delete_node("cid")
        assert not family.delete_node("cid")
        assert family.count() == (4, 2)
        assert family.neighbours("ann") == []
        family.clear()
        assert family.count() == (0, 0)

    def test_it_is_the_same_after_a_restart(self, tmp_path: Path) -> None:
        with opened(tmp_path / "graph.db") as store:
            store.put_many([Node("b", {"deep": {"list": [1, None, "é"]}}), Node("a"), Node("z")], [Edge("a", "c", "r")])
            store.put_edge("c", "a", "back", {"n": 1.5})
            store.put_node("a", {"later": True})
            store.delete_node("z")
            before = (store.nodes(), store.edges(), store.subgraph("a"))
        with opened(tmp_path / "graph.db") as store:
            assert (store.nodes(), store.edges(), store.subgraph("a")) == before
            assert [node.id for node in store.nodes()] == ["b", "a", "c"]

    def test_parallel_callers(self, graph: GraphStore) -> None:
        def work(number: int) -> None:
            for turn in range(20):
                graph.put_edge(f"{number}", f"{number}-{turn}", "made")
                graph.put_edge("hub", f"{number}", "knows", {"turn": turn})
                assert f"{number}-{turn}" in graph.neighbours(f"{number}")
                assert graph.shortest_path("hub", f"{number}-{turn}") == ["hub", f"{number}", f"{number}-{turn}"]
                graph.subgraph("hub", hops=2)

        at_once(8, work)
        assert graph.count() == (1 + 8 + 8 * 20, 8 + 8 * 20)

    def test_a_program_that_is_killed_loses_at_most_the_change_in_flight(self, tmp_path: Path) -> None:
        text = """
            import itertools
            from sage.services.stores.graph import GraphStore
            store = GraphStore("graph.db")
            store.setup()
            for number in itertools.count():
                store.put_edge(str(number), str(number + 1), "next", {"number": number})
                print(number, flush=True)
        """
        said = killed_after(200, text, folder=tmp_path)
        with opened(tmp_path / "graph.db") as store:
            nodes, edges = store.count()
            assert len(said) <= edges <= len(said) + 1
            assert nodes == edges + 1
            assert len(store.shortest_path("0", str(edges)) or ()) == nodes


class TestBadInput:
    @pytest.mark.parametrize("name", [1, None, b"a"])
    def test_ids_that_are_no_strings(self, graph: GraphStore, name: Any) -> None:
        calls: list[Callable[[], object]] = [
            lambda: graph.put_node(name),
            lambda: graph.put_edge(name, "a"),
            lambda: graph.put_edge("a", name),
            lambda: graph.put_edge("a", "b", name),
            lambda: graph.put_many([Node("a"), Node(name)]),
        ]
        for call in calls:
            with pytest.raises(TypeError, match=r"the (id|source|target|relation) .* not a string"):
                call()
        assert graph.count() == (0, 0)
        with pytest.raises(ValueError, match="cannot be written as UTF-8"):
            graph.put_node("\ud800")

    def test_properties_that_are_no_json(self, graph: GraphStore) -> None:
        with pytest.raises(TypeError, match=r"the value of 'a' is .*, which JSON cannot hold"):
            graph.put_node("a", {"x": {1, 2}})
        with pytest.raises(TypeError, match=r"the value of 'a -> b' is .*, which JSON cannot hold"):
            graph.put_many([Node("c")], [Edge("a", "b", "", {"x": float("nan")})])
        assert graph.count() == (0, 0)

    def test_nodes_that_are_not_there(self, family: GraphStore) -> None:
        unknown: Any = ["zoe"]
        calls: list[Callable[[], object]] = [
            lambda: family.neighbours("zoe"),
            lambda: family.neighbours(unknown),
            lambda: family.edges("zoe"),
            lambda: family.subgraph("zoe"),
            lambda: family.shortest_path("zoe", "ann"),
            lambda: family.shortest_path("ann", "zoe"),
        ]
        for call in calls:
            with pytest.raises(KeyError, match=r"node .*zoe.* is not in the graph"):
                call()

    def test_arguments_that_are_none_of_the_allowed(self, family: GraphStore) -> None:
        wrong: Any = "up"
        for call in (family.neighbours, family.edges, family.subgraph):
            with pytest.raises(ValueError, match="direction is 'up'"):
                call("ann", direction=wrong)
        with pytest.raises(ValueError, match="direction is 'up'"):
            family.shortest_path("ann", "eve", direction=wrong)
        with pytest.raises(ValueError, match="hops of at least 0"):
            family.subgraph("ann", hops=-1)
        with pytest.raises(ValueError, match="nodes_max of at least 1"):
            family.subgraph("ann", nodes_max=0)

    def test_a_second_store_on_the_same_file(self, graph: GraphStore, tmp_path: Path) -> None:
        graph.put_node("a")
        with pytest.raises(ServiceError, match=r'graph.db" is in use by another program') as caught:
            GraphStore(tmp_path / "graph.db").setup()
        assert "name another file" in notes_of(caught.value)
        text = """
            from sage.errors import ServiceError
            from sage.services.stores.graph import GraphStore
            try:
                GraphStore("graph.db").setup()
            except ServiceError as error:
                print(error)
        """
        assert "is in use by another program" in output_of(text, folder=tmp_path)[0]
        assert graph.health()

    def test_before_setup_and_after_cleanup(self, tmp_path: Path) -> None:
        store = GraphStore(tmp_path / "graph.db")
        assert not store.health()
        with pytest.raises(ServiceUnavailableError, match="is not open") as caught:
            store.put_node("a")
        assert "setup()" in notes_of(caught.value)
        store.setup()
        store.put_node("a")
        store.cleanup()
        store.cleanup()
        with pytest.raises(ServiceUnavailableError, match="is not open"):
            store.node("a")
        store.setup()
        assert store.count() == (1, 0)
        store.cleanup()


@pytest.mark.parametrize("host", ["inline", "process"])
def test_in_a_job(host: Any, tmp_path: Path) -> None:
    for round_ in (1, 2):
        arrived: list[Any] = []
        with left_clean(), LocalEnvironment("graphs") as env:
            options = ServiceOptions(host=host, concurrency=4)
            graph = env.register_service("graph", GraphStore, tmp_path / "graph.db", options=options)

            def link(number: int, graph: Any = graph, round_: int = round_) -> list[Node]:
                graph.put_edge("hub", f"{round_}-{number}")
                found: list[Node] = graph.subgraph("hub").nodes
                return found

            env.from_batch(range(20)).rebalance().map(link, parallelism=4).sink(arrived.append)
            report = env.submit(autostop=True).wait()
        assert max(map(len, arrived)) == 1 + 20 * round_
        assert report.service("graph").errors == 0
        assert os.listdir(tmp_path) == ["graph.db"]


def test_it_measures_and_describes_itself(family: GraphStore, tmp_path: Path) -> None:
    family.neighbours("ann")
    measures = family.measures()
    assert (measures["put_many"].calls, measures["put_many"].items) == (1, 12)
    assert measures["neighbours"].calls == 1
    assert family.describe() == {"service": "GraphStore", "path": str(tmp_path / "graph.db")}


def test_calls_that_are_refused_are_counted(family: GraphStore) -> None:
    wrong: Any = 5
    with pytest.raises(TypeError, match="the id 5"):
        family.put_node(wrong)
    with pytest.raises(ValueError, match="hops"):
        family.subgraph("ann", hops=-1)
    with pytest.raises(ValueError, match="direction"):
        family.shortest_path("ann", "eve", direction=wrong)
    with pytest.raises(KeyError, match="zoe"):
        family.neighbours("zoe")
    measures = family.measures()
    assert (measures["put_many"].calls, measures["put_many"].errors, measures["put_many"].items) == (2, 1, 13)
    for name in ("subgraph", "shortest_path", "neighbours"):
        assert (measures[name].calls, measures[name].errors) == (1, 1)
