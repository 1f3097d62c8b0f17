"""The figures as a picture."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence

    from benchmarks.measure import Figure

MET = "#2f7d5b"
MISSED = "#b3442e"


def plot(figures: Sequence[Figure], path: str) -> None:
    """Draw each figure as a part of its target, so that all bars have one axis; longer is better."""
    from matplotlib.figure import Figure as Canvas

    # A figure that should be small is turned over: a bar beyond the line keeps its target in every case.
    lengths = [min(_margin(figure), 4.0) for figure in figures]
    canvas = Canvas(figsize=(10, 0.4 * len(figures) + 1.2), layout="constrained")
    axes = canvas.add_subplot()
    places = range(len(figures))
    axes.barh(places, lengths, color=[MET if figure.is_met else MISSED for figure in figures])
    axes.set_yticks(places, [figure.case for figure in figures])
    for place, figure in enumerate(figures):
        axes.text(lengths[place] + 0.03, place, f"{figure.measured:.3g} {figure.unit}", va="center", fontsize=8)
    axes.axvline(1, color="black", linewidth=1)
    axes.set_xlim(0, 5.2)
    axes.set_xlabel("margin to the target (1 = just met, bars end at 4)")
    axes.invert_yaxis()
    canvas.savefig(path)


def _margin(figure: Figure) -> float:
    if figure.bound == "at least":
        return figure.measured / figure.target
    return figure.target / max(figure.measured, figure.target / 4)
