"""`python -m benchmarks`: a table of all cases, with their targets."""

from __future__ import annotations

import argparse
import json
import os
import platform
import sys
from dataclasses import asdict
from importlib.util import find_spec
from typing import TYPE_CHECKING

# Before anything imports numpy: after a product its idle threads spin for some tens of milliseconds, and a side with
# threads of its own would lose a core to what the other side has left behind.
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

from benchmarks.answers import answers, ingest
from benchmarks.durable import durable
from benchmarks.growth import MEASURED, both_ends, growth, large_records
from benchmarks.jobs import importing, latency, low_rate, memory, served, short_jobs, stopping
from benchmarks.measure import FULL, QUICK
from benchmarks.peers import peers
from benchmarks.plot import compare, plot, plot_growth
from benchmarks.processes import process_array, process_call, process_callers, process_stop
from benchmarks.ray import jobs_on_ray
from benchmarks.replicas import recycling, replicas
from benchmarks.stores import stores
from benchmarks.throughput import awaits, batches, chain, flat_map, has_bytewax, service_call, word_count

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from benchmarks.measure import Figure

CASES = {
    "chain": chain,
    "word-count": word_count,
    "batches": batches,
    "flat-map": flat_map,
    "large-records": large_records,
    "service-call": service_call,
    "served": served,
    "async": awaits,
    "short-jobs": short_jobs,
    "stop": stopping,
    "import": importing,
    "memory": memory,
    "latency": latency,
    "low-rate": low_rate,
    "process-call": process_call,
    "process-callers": process_callers,
    "process-array": process_array,
    "process-stop": process_stop,
    "replicas": replicas,
    "recycling": recycling,
    "stores": stores,
    "answers": answers,
    "ingest": ingest,
    "peers": peers,
    "durable": durable,
    "growth": growth,
    "ray": jobs_on_ray,
}


def has_ray() -> bool:
    """Return whether there is a Ray, which has a list of requirements of its own."""
    return find_spec("ray") is not None


MARK, MARK_OF_GROWTH = "<!-- figures -->", "<!-- growth -->"
MARK_END = "<!-- end of figures -->"

ROW = "{:<38} {:>8} {:<36} {:>17} {:>14}  {}"


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, print the table and return 1 if a target is missed, 0 otherwise."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument("cases", nargs="*", metavar="case", help=f"one of {', '.join(CASES)}; all by default")
    parser.add_argument("--quick", action="store_true", help="fewer records and rounds: seconds instead of minutes")
    parser.add_argument("--json", metavar="FILE", help="write the figures to FILE")
    parser.add_argument("--plot", metavar="FILE", help="draw the figures into FILE (.svg or .png); takes matplotlib")
    parser.add_argument("--comparison", metavar="FILE", help="draw the rates beside those of a loop and bytewax")
    parser.add_argument("--page", metavar="FILE", help="put the table into FILE, between the lines that mark it")
    options = parser.parse_args(arguments)
    unknown = set(options.cases) - set(CASES)
    if unknown:
        parser.error(f"unknown case {', '.join(sorted(unknown))}; there are {', '.join(CASES)}")
    if not has_bytewax():
        print("bytewax is not installed: its cases are left out")
    print(ROW.format("case", "median", "unit", "quartiles", "target", "met"), flush=True)
    figures = []
    for name in options.cases or [name for name in CASES if name != "ray" or has_ray()]:
        for figure in CASES[name](QUICK if options.quick else FULL):
            figures.append(figure)
            print(row(figure), flush=True)
    if options.json:
        with open(options.json, "w", encoding="utf-8") as file:
            json.dump(as_json(figures), file, indent=2)
    if options.plot and options.cases == ["growth"]:
        plot_growth(MEASURED, options.plot)
    elif options.plot:
        plot(figures, options.plot)
    if options.comparison:
        compare(figures, options.comparison)
    if options.page and options.cases == ["growth"]:
        put_into(options.page, MARK_OF_GROWTH, both_ends())
    elif options.page:
        put_into(options.page, MARK, rows_of(figures))
    return 0 if all(figure.is_met for figure in figures) else 1


def row(figure: Figure) -> str:
    """Return a figure as a line of the table."""
    quartiles = f"{figure.low:.3g} to {figure.high:.3g}"
    target = f"{figure.bound} {figure.target:g}"
    met = "yes" if figure.is_met else "NO"
    return ROW.format(figure.case, f"{figure.measured:.3g}", figure.unit, quartiles, target, met)


def rows_of(figures: Sequence[Figure]) -> Iterator[str]:
    """Yield the rows of the table of all cases."""
    yield "| case | unit | median | quartiles | target | met |"
    yield "|---|---|---|---|---|---|"
    for figure in figures:
        spread = f"{figure.low:.3g} to {figure.high:.3g}"
        met = "yes" if figure.is_met else "no"
        target = f"{figure.bound} {figure.target:g}"
        yield f"| {figure.case} | {figure.unit} | {figure.measured:.3g} | {spread} | {target} | {met} |"


def put_into(path: str, mark: str, rows: Iterator[str]) -> None:
    """Replace the text between the marks in a Markdown file by the rows of a table."""
    with open(path, encoding="utf-8") as file:
        before, _, rest = file.read().partition(mark)
        _, _, after = rest.partition(MARK_END)
    if not after:
        raise SystemExit(f"{path} has no lines {mark} and {MARK_END}")
    with open(path, "w", encoding="utf-8") as file:
        file.write("\n".join([before + mark, "", *rows, "", MARK_END + after]))


def as_json(figures: Sequence[Figure]) -> dict[str, object]:
    """Return the figures with what one has to know about where they were measured."""
    machine = {"python": platform.python_version(), "system": platform.system(), "cpu_count": os.cpu_count()}
    return {"machine": machine, "figures": [{**asdict(figure), "is_met": figure.is_met} for figure in figures]}


if __name__ == "__main__":
    sys.exit(main())
