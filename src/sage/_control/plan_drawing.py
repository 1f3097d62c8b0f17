"""Plans as drawings: a box for each chain with its operators, arrows for channels, and the services below."""

from __future__ import annotations

from collections import defaultdict
from html import escape
from typing import TYPE_CHECKING

from sage._plan.explanation import callers_of
from sage.report import printable

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from sage._plan.logical import LogicalGraph, Node
    from sage._plan.physical import Chain, Edge, PhysicalPlan

Place = tuple[float, float]

MARGIN, TITLE_HEIGHT = 20, 36
BOX_WIDTH, COLUMN_WIDTH = 170, 270
LINE_HEIGHT, PADDING, CAPTION_HEIGHT, GAP = 24, 8, 18, 26
SERVICE_HEIGHT, SERVICE_GAP = 30, 46
NAME_LETTERS_MAX = 22

STYLE = """
text { font: 12px "DejaVu Sans", Verdana, sans-serif; fill: #222; }
.title { font-size: 14px; font-weight: bold; }
.small { font-size: 10px; fill: #555; }
.chain { fill: #f4f7f5; stroke: #4c9f70; }
.operator { fill: #ffffff; stroke: #b8c9bf; }
.service { fill: #eef3f9; stroke: #5b84b1; }
.edge { fill: none; stroke: #444; stroke-width: 1.3; marker-end: url(#end); }
.back { stroke-dasharray: 5 3; }
.call { fill: none; stroke: #5b84b1; stroke-dasharray: 2 3; }
"""
END = '<marker id="end" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="7" markerHeight="7" orient="auto">'


def svg(plans: Sequence[tuple[LogicalGraph, PhysicalPlan]]) -> str:
    """Return the drawings of plans with their services, one below the other, as one SVG document."""
    parts: list[str] = []
    width = height = 0.0
    for graph, plan in plans:
        drawing, right, bottom = _drawing(graph, plan)
        parts.append(f'<g transform="translate(0 {height:.0f})">\n{drawing}\n</g>')
        width, height = max(width, right), height + bottom
    size = f'width="{width:.0f}" height="{height:.0f}" viewBox="0 0 {width:.0f} {height:.0f}"'
    names = ", ".join(plan.name for _, plan in plans)
    head = [f'<svg xmlns="http://www.w3.org/2000/svg" {size} role="img">', f"<style>{STYLE}</style>"]
    head.append(f'<defs>{END}<path d="M0 0 L8 4 L0 8 Z" fill="#444"/></marker></defs>')
    head.append(f'<title>plan of {_text(names)}</title><rect width="100%" height="100%" fill="white"/>')
    return "\n".join([*head, *parts, "</svg>", ""])


def _drawing(graph: LogicalGraph, plan: PhysicalPlan) -> tuple[str, float, float]:
    """Return a plan as SVG, with its width and height."""
    tops = _tops(plan, _columns(plan))
    drawn = [(chain, tops[chain.head]) for chain in plan.chains]
    operators = {node.name: place for chain, top in drawn for node, place in _operators(chain, top)}
    bottom = max((top[1] + _height(chain) for chain, top in drawn), default=TITLE_HEIGHT) + SERVICE_GAP
    places = ((MARGIN + number * (BOX_WIDTH + GAP), bottom) for number in range(len(graph.services)))
    boxes = {service.name: place for service, place in zip(graph.services, places, strict=True)}
    parts = [f'<text class="title" x="{MARGIN}" y="24">{_text(plan.name)}</text>']
    for name, users in callers_of(graph).items():
        parts += [_call(operators[user.name], boxes[name]) for user in users]
    for chain, top in drawn:
        parts += _chain(chain, top)
    parts += [_edge(edge, plan, tops) for edge in plan.between]
    parts += [_service(name, place) for name, place in boxes.items()]
    right = max([float(MARGIN), *(x for x, _ in [*tops.values(), *boxes.values()])]) + BOX_WIDTH + MARGIN
    return "\n".join(parts), right, bottom + (SERVICE_HEIGHT + MARGIN if boxes else 0)


def _columns(plan: PhysicalPlan) -> dict[int, int]:
    """Return the column of each chain by its head: one to the right of the farthest chain that it reads from."""
    owner = {node.id: chain.head for chain in plan.chains for node in chain.nodes}
    sources: defaultdict[int, list[int]] = defaultdict(list)
    for edge in plan.between:
        if not edge.feedback:
            sources[owner[edge.target]].append(owner[edge.source])
    columns: dict[int, int] = {}
    for chain in plan.chains:  # sources come before the chains that read from them
        columns[chain.head] = max((columns.get(head, 0) + 1 for head in sources[chain.head]), default=0)
    return columns


def _tops(plan: PhysicalPlan, columns: Mapping[int, int]) -> dict[int, Place]:
    """Return the upper left corner of each chain by its head."""
    free: defaultdict[int, float] = defaultdict(lambda: float(TITLE_HEIGHT))
    tops: dict[int, Place] = {}
    for chain in plan.chains:
        column = columns[chain.head]
        tops[chain.head] = (MARGIN + column * COLUMN_WIDTH, free[column])
        free[column] += _height(chain) + GAP
    return tops


def _height(chain: Chain) -> float:
    return CAPTION_HEIGHT + LINE_HEIGHT * len(chain.nodes) + PADDING


def _operators(chain: Chain, top: Place) -> list[tuple[Node, Place]]:
    return [(node, (top[0], top[1] + CAPTION_HEIGHT + LINE_HEIGHT * line)) for line, node in enumerate(chain.nodes)]


def _chain(chain: Chain, top: Place) -> list[str]:
    x, y = top
    tasks = "1 task" if chain.parallelism == 1 else f"{chain.parallelism} tasks"
    parts = [
        f'<rect class="chain" x="{x}" y="{y}" width="{BOX_WIDTH}" height="{_height(chain)}" rx="6"/>',
        f'<text class="small" x="{x + PADDING}" y="{y + 13}">{tasks}</text>',
    ]
    for node, (_, line) in _operators(chain, top):
        box = f'x="{x + PADDING}" y="{line}" width="{BOX_WIDTH - 2 * PADDING}" height="{LINE_HEIGHT - 4}" rx="3"'
        parts.append(f'<g><title>{_text(node.name)}</title><rect class="operator" {box}/>')
        parts.append(f'<text x="{x + PADDING + 6}" y="{line + 14}">{_text(_short(node.name))}</text></g>')
    return parts


def _edge(edge: Edge, plan: PhysicalPlan, tops: Mapping[int, Place]) -> str:
    owner = {node.id: chain for chain in plan.chains for node in chain.nodes}
    source, target = owner[edge.source], owner[edge.target]
    line = next(place for node, place in _operators(source, tops[source.head]) if node.id == edge.source)[1]
    x, y = tops[source.head][0] + BOX_WIDTH, line + LINE_HEIGHT / 2
    end_x, end_y = tops[target.head][0], tops[target.head][1] + CAPTION_HEIGHT + LINE_HEIGHT / 2 + 6 * edge.port
    bend = max(30.0, abs(end_x - x) / 2)
    look = "edge back" if edge.feedback or edge.letters else "edge"
    label = "dead letters" if edge.letters else str(edge.route)
    path = f'<path class="{look}" d="M{x} {y} C{x + bend} {y} {end_x - bend} {end_y} {end_x} {end_y}"/>'
    place = f'x="{(x + end_x) / 2}" y="{(y + end_y) / 2 - 5}" text-anchor="middle"'
    return path if label == "forward" else f'{path}<text class="small" {place}>{label}</text>'


def _call(operator: Place, service: Place) -> str:
    x, y = operator[0] + BOX_WIDTH / 2, operator[1] + LINE_HEIGHT - 4
    end_x, end_y = service[0] + BOX_WIDTH / 2, service[1]
    return f'<path class="call" d="M{x} {y} C{x} {y + 40} {end_x} {end_y - 40} {end_x} {end_y}"/>'


def _service(name: str, place: Place) -> str:
    x, y = place
    box = f'x="{x}" y="{y}" width="{BOX_WIDTH}" height="{SERVICE_HEIGHT}" rx="14"'
    text = f'<text x="{x + BOX_WIDTH / 2}" y="{y + 19}" text-anchor="middle">{_text(_short(name))}</text>'
    return f'<g><title>service {_text(name)}</title><rect class="service" {box}/>{text}</g>'


def _short(text: str) -> str:
    return text if len(text) <= NAME_LETTERS_MAX else f"{text[: NAME_LETTERS_MAX - 1]}\u2026"


def _text(text: str) -> str:
    return escape(printable(text))
