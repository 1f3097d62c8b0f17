"""A graph of nodes and edges with properties: in memory to be walked through, and in a SQLite file to survive."""

from __future__ import annotations

import json
import threading
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

from sage._extras import load
from sage.errors import ServiceUnavailableError, hint, short
from sage.services._shared.sqlite_file import FileService, SqliteFile
from sage.services._shared.validation import checked_text, is_number, json_text

if TYPE_CHECKING:
    import os
    from collections.abc import Callable, Iterable, Iterator, Mapping
    from types import ModuleType

    from networkx import MultiDiGraph as Graph

    FullEdge = tuple[str, str, str, Mapping[str, object]]

Direction = Literal["out", "in", "both"]


@dataclass(frozen=True, slots=True)
class Node:
    """A node.

    Attributes:
        id: its identity.
        properties: values of JSON by name.
    """

    id: str
    properties: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Edge:
    """An edge from one node to another; between two nodes there is one of each relation in each direction.

    Attributes:
        source: the id of the node where it begins.
        target: the id of the node where it ends.
        relation: the kind of edge.
        properties: values of JSON by name.
    """

    source: str
    target: str
    relation: str = ""
    properties: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Subgraph:
    """A part of a graph.

    Attributes:
        nodes: in the order of their distance from where the part was taken, the nearest first.
        edges: all edges between these nodes, in the order of source, target and relation.
        is_cut: whether it would have been larger without a limit.
    """

    nodes: list[Node]
    edges: list[Edge]
    is_cut: bool = False


class GraphStore(FileService):
    """Nodes and edges with properties, in one SQLite file and in memory.

    A change is in the file when the method returns, and takes effect as a whole or not at all: SIGKILL loses at most
    the change in flight. Questions are answered from memory. The file is exclusive: a second store or program that
    opens it meanwhile is refused, as it would not see the changes. All methods may be called from any number of
    threads; each sees the graph as it is between two changes.

    Args:
        path: the file; it is made if it is not there.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        super().__init__(SqliteFile(path, "graph", 1, SCHEMA, is_exclusive=True))
        self._lock = threading.Lock()
        self._loaded: Graph | None = None
        self._library: ModuleType

    # --- hooks ---

    def setup(self) -> None:
        """Open the file and read the graph.

        Raises:
            MissingExtraError: the package networkx is not installed.
            ServiceError: the file cannot be opened, is not a database, or is in use.
        """
        self._library = load("networkx", "graph")
        self._file.open()
        graph = self._library.MultiDiGraph()
        with self._file.reading() as connection:
            for name, properties in connection.execute("SELECT id, properties FROM graph_nodes ORDER BY rowid"):
                graph.add_node(name, properties=json.loads(properties))
            rows = connection.execute("SELECT source, target, relation, properties FROM graph_edges ORDER BY rowid")
            for source, target, relation, properties in rows:
                graph.add_edge(source, target, relation, properties=json.loads(properties))
        self._loaded = graph

    def cleanup(self) -> None:
        """Close the file and release the memory."""
        with self._lock:
            self._loaded = None
            self._file.close()

    def health(self) -> bool:
        """Return whether the file can be read."""
        with self._lock:  # the file takes no second connection
            return self._loaded is not None and self._file.health()

    def process(self, node: str) -> list[str]:
        """Return the result of `neighbours`."""
        return self.neighbours(node)

    # --- changes ---

    def put_node(self, node: str, properties: Mapping[str, object] | None = None) -> None:
        """Add a node, or give one other properties.

        Raises:
            TypeError: the id is not a string, or a property cannot be stored as JSON.
        """
        self.put_many([Node(node, properties or {})])

    def put_edge(
        self, source: str, target: str, relation: str = "", properties: Mapping[str, object] | None = None
    ) -> None:
        """Add an edge, or give one other properties. Nodes that are not there are added, without properties.

        Raises:
            TypeError: an id is not a string, or a property cannot be stored as JSON.
        """
        self.put_many([], [Edge(source, target, relation, properties or {})])

    def put_many(self, nodes: Iterable[Node] = (), edges: Iterable[Edge] = ()) -> None:
        """Add nodes and edges in one step, or give them other properties; much faster than one by one.

        Raises:
            TypeError: an id is not a string, or a property cannot be stored as JSON; nothing was added then.
        """
        with self.measured("put_many") as call:
            node_rows = [(checked_text("id", node.id), _text(node.id, node.properties)) for node in nodes]
            edge_rows = [_edge_row(edge) for edge in edges]
            call.items = len(node_rows) + len(edge_rows)
            self._put(node_rows, edge_rows)

    def _put(self, node_rows: list[tuple[str, str]], edge_rows: list[tuple[str, str, str, str]]) -> None:
        ends = [(name,) for source, target, _, _ in edge_rows for name in (source, target)]
        with self._graph() as graph:
            with self._file.writing() as connection:
                connection.executemany(PUT_NODE, node_rows)
                connection.executemany("INSERT OR IGNORE INTO graph_nodes (id, properties) VALUES (?, '{}')", ends)
                connection.executemany(PUT_EDGE, edge_rows)
            for name, text in node_rows:
                graph.add_node(name, properties=json.loads(text))
            for (name,) in ends:
                if name not in graph:
                    graph.add_node(name, properties={})
            for source, target, relation, text in edge_rows:
                graph.add_edge(source, target, relation, properties=json.loads(text))

    def delete_node(self, node: str) -> bool:
        """Remove a node and all its edges, and return whether it was there."""
        with self.measured("delete_node"), self._graph() as graph:
            if node not in graph:
                return False
            with self._file.writing() as connection:
                connection.execute("DELETE FROM graph_edges WHERE source = ? OR target = ?", (node, node))
                connection.execute("DELETE FROM graph_nodes WHERE id = ?", (node,))
            graph.remove_node(node)
            return True

    def delete_edge(self, source: str, target: str, relation: str = "") -> bool:
        """Remove an edge, and return whether it was there."""
        with self.measured("delete_edge"), self._graph() as graph:
            if not graph.has_edge(source, target, relation):
                return False
            with self._file.writing() as connection:
                where = "source = ? AND target = ? AND relation = ?"
                connection.execute(f"DELETE FROM graph_edges WHERE {where}", (source, target, relation))
            graph.remove_edge(source, target, relation)
            return True

    def clear(self) -> None:
        """Remove everything."""
        with self.measured("clear"), self._graph() as graph:
            with self._file.writing() as connection:
                connection.execute("DELETE FROM graph_edges")
                connection.execute("DELETE FROM graph_nodes")
            graph.clear()

    # --- questions ---

    def node(self, node: str) -> Node | None:
        """Return a node, or None if it is not there."""
        with self.measured("node"), self._graph() as graph:
            return _node(graph, node) if node in graph else None

    def nodes(self, where: Mapping[str, object] | None = None) -> list[Node]:
        """Return the nodes that have all these properties, with these values, in the order in which they were put."""
        with self.measured("nodes"), self._graph() as graph:
            return [_node(graph, name) for name, data in graph.nodes(data=True) if _has(data["properties"], where)]

    def edges(
        self,
        node: str | None = None,
        *,
        direction: Direction = "both",
        relation: str | None = None,
        where: Mapping[str, object] | None = None,
    ) -> list[Edge]:
        """Return edges, in the order of source, target and relation.

        Args:
            node: only edges of this node; those of all without one.
            direction: "out" for edges that begin at the node, "in" for those that end there, or "both".
            relation: only edges of this relation.
            where: only edges that have all these properties, with these values.

        Raises:
            KeyError: the node is not there.
            ValueError: the direction is not one of these.
        """
        with self.measured("edges"), self._graph() as graph:
            if node is None:
                found: Iterable[FullEdge] = graph.edges(keys=True, data="properties")
            else:
                found = _edges_of(graph, _known(graph, node), direction)
            return _edges(edge for edge in found if relation in (None, edge[2]) and _has(edge[3], where))

    def neighbours(self, node: str, *, direction: Direction = "both", relation: str | None = None) -> list[str]:
        """Return the ids of the nodes that an edge leads to or comes from, each once and in order.

        A node is its own neighbour if it has an edge to itself.

        Args:
            node: where to look.
            direction: "out" for the nodes that its edges lead to, "in" for those they come from, or "both".
            relation: only by edges of this relation.

        Raises:
            KeyError: the node is not there.
            ValueError: the direction is not one of these.
        """
        with self.measured("neighbours"), self._graph() as graph:
            return sorted(_next_to(graph, _known(graph, node), direction, relation))

    def shortest_path(
        self, source: str, target: str, *, weight: str | None = None, direction: Literal["out", "both"] = "out"
    ) -> list[str] | None:
        """Return the ids of the nodes on a shortest path, both ends included, or None without a path.

        Args:
            source: where it begins.
            target: where it ends.
            weight: the property of edges that is their length, 1 where it is missing; without one every edge is 1 long.
            direction: "out" to follow edges only as they point, "both" to follow them backwards too.

        Raises:
            KeyError: one of the nodes is not there.
            ValueError: a length on the way is negative or not a number.
        """
        with self.measured("shortest_path"), self._graph() as graph:
            if direction not in ("out", "both"):
                raise ValueError(f'direction is {short(direction)}, not "out" or "both"')
            _known(graph, source)
            _known(graph, target)
            walked = graph if direction == "out" else graph.to_undirected(as_view=True)
            length = None if weight is None else _lengths(graph, weight, direction)
            try:
                path: list[str] = self._library.shortest_path(walked, source, target, weight=length)
            except self._library.NetworkXNoPath:
                return None
            return path

    def subgraph(self, node: str, *, hops: int = 1, direction: Direction = "both", nodes_max: int = 1_000) -> Subgraph:
        """Return the surroundings of a node, with all edges in between.

        Args:
            node: the middle.
            hops: how many edges away from it.
            direction: which edges to follow, as in `neighbours`.
            nodes_max: the most nodes to return, the nearest ones.

        Raises:
            KeyError: the node is not there.
            ValueError: `hops` is negative, `nodes_max` is below 1, or the direction is not one of the three.
        """
        with self.measured("subgraph"), self._graph() as graph:
            if hops < 0 or nodes_max < 1:
                text = f"subgraph needs hops of at least 0 and nodes_max of at least 1, not {hops}, {nodes_max}"
                raise ValueError(text)
            found = {_known(graph, node): None}  # a dict, as it keeps the order of the distances
            border = [node]
            is_cut = False
            for _ in range(hops):
                around = {name for at in border for name in _next_to(graph, at, direction, None)}
                border = sorted(around - found.keys())
                is_cut = len(found) + len(border) > nodes_max
                border = border[: nodes_max - len(found)]
                found.update(dict.fromkeys(border))
                if is_cut or not border:
                    break
            inside = graph.subgraph(found).edges(keys=True, data="properties")
            return Subgraph([_node(graph, name) for name in found], _edges(inside), is_cut)

    def count(self) -> tuple[int, int]:
        """Return how many nodes and how many edges there are."""
        with self.measured("count"), self._graph() as graph:
            return graph.number_of_nodes(), graph.number_of_edges()

    @contextmanager
    def _graph(self) -> Iterator[Graph]:
        with self._lock:
            if self._loaded is None:
                error = ServiceUnavailableError(f'graph "{self._file.path}" is not open')
                raise hint(error, "Outside a job, call setup() first and cleanup() last.")
            self._file.check_held()
            yield self._loaded


SCHEMA = """
CREATE TABLE IF NOT EXISTS graph_nodes (id TEXT PRIMARY KEY, properties TEXT NOT NULL);
CREATE TABLE IF NOT EXISTS graph_edges (
    source TEXT NOT NULL, target TEXT NOT NULL, relation TEXT NOT NULL, properties TEXT NOT NULL,
    PRIMARY KEY (source, target, relation)
);
CREATE INDEX IF NOT EXISTS graph_edges_target ON graph_edges (target)
"""

# An update keeps the row where it is, and with it the order in which nodes and edges are read again.
PUT_NODE = (
    "INSERT INTO graph_nodes (id, properties) VALUES (?, ?) "
    "ON CONFLICT (id) DO UPDATE SET properties = excluded.properties"
)
PUT_EDGE = (
    "INSERT INTO graph_edges (source, target, relation, properties) VALUES (?, ?, ?, ?) "
    "ON CONFLICT (source, target, relation) DO UPDATE SET properties = excluded.properties"
)


def _text(name: str, properties: Mapping[str, object]) -> str:
    return json_text(name, dict(properties))


def _edge_row(edge: Edge) -> tuple[str, str, str, str]:
    source, target = checked_text("source", edge.source), checked_text("target", edge.target)
    return source, target, checked_text("relation", edge.relation), _text(f"{source} -> {target}", edge.properties)


def _copy(properties: Mapping[str, object]) -> dict[str, object]:
    """Return properties that the caller may change without changing the graph."""
    copy: dict[str, object] = json.loads(json.dumps(properties)) if properties else {}
    return copy


def _node(graph: Graph, name: str) -> Node:
    return Node(name, _copy(graph.nodes[name]["properties"]))


def _edges(found: Iterable[FullEdge]) -> list[Edge]:
    return [
        Edge(source, target, relation, _copy(properties))
        for source, target, relation, properties in sorted(found, key=lambda edge: edge[:3])
    ]


def _known(graph: Graph, node: str) -> str:
    if node not in graph:
        raise KeyError(f"node {short(node)} is not in the graph")
    return node


def _has(properties: Mapping[str, object], where: Mapping[str, object] | None) -> bool:
    return not where or all(name in properties and properties[name] == value for name, value in where.items())


def _edges_of(graph: Graph, node: str, direction: Direction) -> list[FullEdge]:
    if direction not in ("out", "in", "both"):
        raise ValueError(f'direction is {short(direction)}, not "out", "in" or "both"')
    found = list(graph.out_edges(node, keys=True, data="properties")) if direction != "in" else []
    if direction != "out":
        # One that leads back to the node is among those that begin there.
        found += [
            edge for edge in graph.in_edges(node, keys=True, data="properties") if direction == "in" or edge[0] != node
        ]
    return found


def _next_to(graph: Graph, node: str, direction: Direction, relation: str | None) -> set[str]:
    return {
        target if source == node else source
        for source, target, kind, _ in _edges_of(graph, node, direction)
        if relation in (None, kind)
    }


def _lengths(graph: Graph, weight: str, direction: Direction) -> Callable[[str, str, object], float]:
    """Return a function for the length of the shortest edge between two nodes.

    The edges are looked up in the graph itself: its view without directions shows only one of two edges that lead to
    and fro.
    """

    def length(source: str, target: str, _: object) -> float:
        edges = list(graph.get_edge_data(source, target, default={}).values())
        if direction == "both":
            edges += graph.get_edge_data(target, source, default={}).values()
        return min(_length(edge["properties"], weight) for edge in edges)

    return length


def _length(properties: Mapping[str, object], weight: str) -> float:
    length = properties.get(weight, 1)
    if not is_number(length, 0):
        raise ValueError(f"an edge has the length {short(length)} in {short(weight)}; it is a number of at least 0")
    return length
