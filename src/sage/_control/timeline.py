"""Jobs as drawings and pages: the states over time, as self-contained SVG and HTML."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from html import escape
from typing import TYPE_CHECKING

from sage.report import printable, seconds

if TYPE_CHECKING:
    from sage._control.saved import Saved, SavedJob
    from sage.observability import HookEvent

LABEL_WIDTH, PLOT_WIDTH, END_WIDTH = 250, 760, 130
WIDTH = LABEL_WIDTH + PLOT_WIDTH + END_WIDTH
TITLE_HEIGHT, LEGEND_LINE, AXIS_HEIGHT = 30, 20, 24
ROW_HEIGHT, HOOKS_HEIGHT, BAR_HEIGHT = 24, 16, 14
NAME_LETTERS_MAX = 36
LETTER_WIDTH = 6.2
TICKS_COUNT = 8

COLOURS = {
    **dict.fromkeys(("new", "created", "registered", "resting"), "#d9d9d9"),
    **dict.fromkeys(("starting", "opening"), "#f2c14e"),
    **dict.fromkeys(("running", "ready"), "#4c9f70"),
    "degraded": "#e07b39",
    "backoff": "#c98bb9",
    "draining": "#7fb7be",
    **dict.fromkeys(("cancelling", "failing"), "#e07b39"),
    **dict.fromkeys(("stopping_services", "stopping", "closing"), "#5b84b1"),
    "cleaning": "#8e7cc3",
}
OTHER_COLOUR = "#999999"
FAILURE_COLOUR = "#c1121f"
FAILURES = frozenset({"failed", "abandoned", "cleanup_failed", "failed_start", "killed", "lost"})
ENDS = FAILURES | {"done", "cancelled", "skipped", "stopped", "kept", "sealed", "completed"}

STYLE = """
text { font: 11px "DejaVu Sans", Verdana, sans-serif; fill: #222; }
.title { font-size: 14px; font-weight: bold; }
.small { font-size: 9px; }
.bad { fill: #c1121f; }
.cross { stroke: #c1121f; stroke-width: 2; }
.grid { stroke: #ddd; }
"""

PAGE_STYLE = """
body { font: 14px "DejaVu Sans", Verdana, sans-serif; color: #222; background: #fff; margin: 24px; }
pre { font: 13px "DejaVu Sans Mono", monospace; background: #f5f5f5; padding: 12px; overflow-x: auto; }
svg { max-width: 100%; height: auto; }
"""


@dataclass
class Row:
    """The history of one task or service: its states with their beginnings, and its hooks."""

    label: str
    states: list[tuple[float, str]] = field(default_factory=list)
    hooks: list[HookEvent] = field(default_factory=list)

    @property
    def height(self) -> int:
        """Its height in the drawing; the durations of hooks stand in a line below the bar."""
        return ROW_HEIGHT + (HOOKS_HEIGHT if self.hooks else 0)


def page(saved: Saved) -> str:
    """Return an HTML page with the table and the timeline of every job; it needs no other file and runs no script."""
    parts = [
        "<!DOCTYPE html>",
        '<html lang="en"><head><meta charset="utf-8">',
        "<meta http-equiv=\"Content-Security-Policy\" content=\"default-src 'none'; style-src 'unsafe-inline'\">",
        f"<title>{_text(', '.join(job.name for job in saved.jobs))}</title>",
        f"<style>{PAGE_STYLE}</style></head><body>",
    ]
    for job in saved.jobs:
        parts += [f"<h1>{_text(job.name)}</h1>", f"<pre>{escape(job.text())}</pre>"]
        parts.append(svg((job,)) if job.events else "<p>The file has no events of this job.</p>")
    return "\n".join([*parts, "</body></html>", ""])


def svg(jobs: tuple[SavedJob, ...]) -> str:
    """Return the timelines of jobs, one below the other, as one SVG document."""
    parts: list[str] = []
    top = 0
    for job in jobs:
        drawing, height = _drawing(job)
        parts.append(f'<g transform="translate(0 {top})">\n{drawing}\n</g>')
        top += height
    size = f'width="{WIDTH}" height="{top}" viewBox="0 0 {WIDTH} {top}"'
    return "\n".join(
        [
            f'<svg xmlns="http://www.w3.org/2000/svg" {size} role="img">',
            f"<style>{STYLE}</style>",
            f'<rect width="{WIDTH}" height="{top}" fill="white"/>',
            *parts,
            "</svg>",
            "",
        ]
    )


def rows_of(job: SavedJob) -> list[Row]:
    """Return the job's own row, then those of its services and its tasks, each in the order of their first event."""
    rows: dict[tuple[str, str], Row] = {}
    for subject in ("job", "service", "task"):
        for event in job.events:
            if event.subject != subject:
                continue
            row = rows.setdefault((subject, event.name), Row(f"{subject} {event.name}".strip()))
            # The clock of the machine may be set back, but a state does not end before it begins.
            at = max(event.at, row.states[-1][0]) if row.states else event.at
            if not row.states and subject == "job":
                row.states.append((job.began_at, event.before))
            row.states.append((at, event.after))
    for hook in job.hooks:
        rows.setdefault(("service", hook.service), Row(f"service {hook.service}")).hooks.append(hook)
    return list(rows.values())


def _drawing(job: SavedJob) -> tuple[str, int]:
    rows = rows_of(job)
    scale = Scale(job.began_at, max(job.ended_at, job.began_at))
    status = f"{job.report.state} and {job.report.cleanliness}" if job.report is not None else "the run did not end"
    title = f"{job.name}: {status}, {seconds(scale.length_s)}"
    parts = [f'<text class="title" x="10" y="20">{_text(_short(title, 120))}</text>']
    legend, top = _legend(rows, TITLE_HEIGHT)
    parts += legend
    first = top + AXIS_HEIGHT
    last = first + sum(row.height for row in rows)
    parts += _axis(scale, first, last)
    y = first
    for row in rows:
        parts += _row(row, y, scale, has_ended=job.has_ended)
        y += row.height
    return "\n".join(parts), last + AXIS_HEIGHT + 10


@dataclass(frozen=True)
class Scale:
    """From seconds since the epoch to places on the paper."""

    began_at: float
    ended_at: float

    @property
    def length_s(self) -> float:
        """How long it all took, in seconds; never nothing."""
        return max(self.ended_at - self.began_at, 1e-6)

    def x(self, at: float) -> float:
        """Return the place of a moment; one outside is moved to the edge."""
        share = min(1.0, max(0.0, (at - self.began_at) / self.length_s))
        return LABEL_WIDTH + PLOT_WIDTH * share


def _legend(rows: list[Row], top: int) -> tuple[list[str], int]:
    """Return the legend, in as many lines as it needs, and where it ends."""
    used = {state for row in rows for _, state in row.states} - ENDS
    by_colour: dict[str, list[str]] = {}
    for state in [*(known for known in COLOURS if known in used), *sorted(used - COLOURS.keys())]:
        by_colour.setdefault(COLOURS.get(state, OTHER_COLOUR), []).append(state)
    keys = [(_box(0, 0, 12, colour), " / ".join(states)) for colour, states in by_colour.items()]
    keys.append(('<path d="M0 11 L5 0 L10 11 Z" fill="#222"/>', "end of a hook"))
    keys.append((_cross(5, 6), "failure"))
    parts, x = [], 10.0
    for symbol, text in keys:
        width = 30 + len(text) * (LETTER_WIDTH + 0.6)
        if x + width > WIDTH:
            x, top = 10.0, top + LEGEND_LINE
        parts.append(f'<g transform="translate({x:.0f} {top})">{symbol}<text x="17" y="11">{_text(text)}</text></g>')
        x += width
    return parts, top + LEGEND_LINE


def _axis(scale: Scale, top: int, bottom: int) -> list[str]:
    """Return lines and numbers of the time axis, above and below the rows."""
    step_s = _tick(scale.length_s)
    decimals = max(0, -math.floor(math.log10(step_s) + 1e-9))
    parts = []
    for number in range(int(scale.length_s / step_s + 1e-9) + 1):
        x = scale.x(scale.began_at + number * step_s)
        text = f"{number * step_s:.{decimals}f} s"
        parts.append(f'<line class="grid" x1="{x:.1f}" y1="{top - 4}" x2="{x:.1f}" y2="{bottom + 4}"/>')
        parts += [f'<text x="{x:.1f}" y="{y}" text-anchor="middle">{text}</text>' for y in (top - 8, bottom + 16)]
    return parts


def _tick(length_s: float) -> float:
    """Return the distance of two numbers on the axis: 1, 2 or 5 times a power of ten."""
    power = 10.0 ** math.floor(math.log10(length_s / TICKS_COUNT))
    return next(factor * power for factor in (1, 2, 5, 10) if length_s / (factor * power) <= TICKS_COUNT)


def _row(row: Row, top: int, scale: Scale, *, has_ended: bool) -> list[str]:
    middle = top + 5 + BAR_HEIGHT / 2
    parts = [
        f"<g><title>{_text(row.label)}</title>"
        f'<text x="10" y="{middle + 4}">{_text(_short(row.label, NAME_LETTERS_MAX))}</text></g>'
    ]
    ends = [at for at, _ in row.states[1:]] + [scale.ended_at]
    for (began_at, state), ended_at in zip(row.states, ends, strict=True):
        if state in ENDS:
            continue
        x, colour = scale.x(began_at), COLOURS.get(state, OTHER_COLOUR)
        tip = f"{state} for {seconds(ended_at - began_at)}, from {began_at - scale.began_at:.3f} s"
        parts.append(_box(x, top + 5, max(1.0, scale.x(ended_at) - x), colour, tip))
    if row.states:
        at, state = row.states[-1]
        is_bad = state in FAILURES or (not has_ended and state not in ENDS)
        text = state if state in ENDS else f"{state}..."
        x = scale.x(at) if state in ENDS else LABEL_WIDTH + PLOT_WIDTH
        if state in FAILURES:
            parts.append(_cross(x, middle))
        place = f'x="{LABEL_WIDTH + PLOT_WIDTH + 12}" y="{middle + 4}"'
        parts.append(f"<text {place}{_bad(is_bad)}>{_text(_short(text, 22))}</text>")
    return parts + _hooks(row, top + 5 + BAR_HEIGHT, scale)


def _hooks(row: Row, top: int, scale: Scale) -> list[str]:
    """Return a mark for the end of each hook, and its duration where there is room beside the one before."""
    parts, free = [], float(LABEL_WIDTH)
    for event in row.hooks:
        hook = event.report
        if hook.hook == "drain" and hook.outcome == "ok":
            continue
        x, began = scale.x(event.at), scale.x(event.at - hook.duration_s)
        is_bad = hook.outcome != "ok"
        colour = FAILURE_COLOUR if is_bad else "#222"
        outcome = f" {hook.outcome.upper()}" if is_bad else ""
        text = f"{hook.hook} {seconds(hook.duration_s)}{outcome}"
        tip = f"{text}, instance {hook.incarnation}" + (f": {hook.error}" if hook.error else "")
        parts.append(
            f"<g><title>{_text(tip)}</title>"
            f'<rect x="{began:.1f}" y="{top + 1}" width="{max(0.5, x - began):.1f}" height="2" fill="{colour}"/>'
            f'<path d="M{x - 3.5:.1f} {top + 8} L{x:.1f} {top + 1} L{x + 3.5:.1f} {top + 8} Z" fill="{colour}"/></g>'
        )
        width = len(text) * LETTER_WIDTH * 0.9
        place = min(max(free, x - width / 2), LABEL_WIDTH + PLOT_WIDTH + END_WIDTH - width)
        if free <= place <= x + 40:
            parts.append(
                f'<text class="small{" bad" if is_bad else ""}" x="{place:.1f}" y="{top + 17}">{_text(text)}</text>'
            )
            free = place + width + 8
    return parts


def _box(x: float, y: float, width: float, colour: str, tip: str = "") -> str:
    title = f"<title>{_text(tip)}</title>" if tip else ""
    return f'<rect x="{x:.1f}" y="{y}" width="{width:.1f}" height="{BAR_HEIGHT}" fill="{colour}">{title}</rect>'


def _cross(x: float, y: float) -> str:
    return (
        f'<path class="cross" d="M{x - 5:.1f} {y - 5} L{x + 5:.1f} {y + 5} M{x - 5:.1f} {y + 5} L{x + 5:.1f} {y - 5}"/>'
    )


def _bad(is_bad: bool) -> str:
    return ' class="bad"' if is_bad else ""


def _short(text: str, letters_max: int) -> str:
    """Leave out the middle of a long text: names often differ only at their end."""
    if len(text) <= letters_max:
        return text
    half = (letters_max - 3) // 2
    return f"{text[:half]}...{text[-half:]}"


def _text(text: str) -> str:
    """Return `text` as it may stand in SVG and HTML, which know no control characters."""
    return escape(printable(text))
