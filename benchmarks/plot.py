"""The figures as a picture."""

from __future__ import annotations

from typing import TYPE_CHECKING

from benchmarks.growth import GROWTH, exponent

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from benchmarks.growth import Pair
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


SIDES = ["hand-written loop", "SAGE", "bytewax, batches of 1,000", "bytewax, default"]
COLOURS = ["#8a8a8a", "#2f7d5b", "#d9a441", "#b3442e"]


def compare(figures: Sequence[Figure], path: str) -> None:
    """Draw the rates of SAGE and of bytewax as fractions of the rate of a hand-written loop."""
    from matplotlib.figure import Figure as Canvas

    measured = {(figure.case, figure.unit): figure.measured for figure in figures}
    cases = [case for case, unit in measured if unit == "of the loop" and (case, "times bytewax") in measured]
    canvas = Canvas(figsize=(8, 4), layout="constrained")
    axes = canvas.add_subplot()
    for number, case in enumerate(cases):
        ours = measured[case, "of the loop"]
        peers = [ours / measured[case, f"times bytewax{mode}"] for mode in (" in batches", "")]
        for place, (side, rate) in enumerate(zip(SIDES, [1.0, ours, *peers], strict=True)):
            bar = axes.bar(number + 0.2 * place, rate, 0.18, color=COLOURS[place], label=None if number else side)
            axes.bar_label(bar, [f"{rate:.2f}"], fontsize=9)
    axes.set_xticks([number + 0.3 for number in range(len(cases))], cases)
    axes.set_ylabel("fraction of the loop's records per second")
    axes.set_ylim(0, 1.15)
    axes.set_title("One million records, one core: longer is faster")
    axes.legend(loc="upper right", fontsize=9)
    canvas.savefig(path)


def plot_growth(measured: Mapping[str, Sequence[Pair]], path: str) -> None:
    """Draw the time of each case over its size, with the exponent that it grows with in the legend."""
    from matplotlib.figure import Figure as Canvas

    groups: dict[str, list[str]] = {}
    for name in measured:
        groups.setdefault(GROWTH[name].unit, []).append(name)
    columns = 3
    rows = -(-len(groups) // columns)
    canvas = Canvas(figsize=(5 * columns, 3.8 * rows + 0.8), layout="constrained")
    canvas.suptitle("How the time of a job grows with its size: an exponent of 1 means in proportion")
    for place, (unit, names) in enumerate(groups.items(), start=1):
        axes = canvas.add_subplot(rows, columns, place)
        for number, name in enumerate(names):
            sizes = [ours.size for ours, _ in measured[name]]
            seconds = [ours.seconds for ours, _ in measured[name]]
            label = f"{name}: {exponent(sizes, seconds):.3f}"
            axes.plot(sizes, seconds, marker="os^Dv"[number % 5], markersize=4, label=label)
        axes.set_xscale("log")
        axes.set_yscale("log")
        axes.set_xlabel(f"{unit} of a record" if unit == "bytes" else f"number of {unit}")
        axes.set_ylabel("seconds")
        axes.grid(alpha=0.3)
        axes.legend(title="exponent", fontsize=8, title_fontsize=8)
    canvas.savefig(path)


def _margin(figure: Figure) -> float:
    if figure.bound == "at least":
        return figure.measured / figure.target
    return figure.target / max(figure.measured, figure.target / 4)
