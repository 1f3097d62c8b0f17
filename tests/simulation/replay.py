"""Runs seeds and says what is wrong with them."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

from simulation.oracle import complaints
from simulation.running import Simulation
from simulation.scenario import draw

if TYPE_CHECKING:
    from collections.abc import Iterable


def wrong_with(seed: int) -> str:
    """Run one seed and return what is wrong, with the command that shows it again; "" if nothing is."""
    simulation = Simulation(draw(seed))
    try:
        simulation.run()
    except BaseException as error:  # a job that hangs or breaks is a finding of the seed
        found = [f"{type(error).__name__}: {error}"]
    else:
        found = complaints(simulation)
    if not found:
        return ""
    lines = "".join(f"\n  {line}" for line in found)
    return f"seed {seed}:{lines}\n  Replay it: PYTHONPATH=src python -m tests.simulation --seed {seed}"


def wrong_with_all(seeds: Iterable[int]) -> list[str]:
    """Return what is wrong with each seed that fails; errors that jobs log are expected, and slow."""
    logging.disable(logging.CRITICAL)
    try:
        return [text for seed in seeds if (text := wrong_with(seed))]
    finally:
        logging.disable(logging.NOTSET)


def show(seed: int) -> bool:
    """Print the scenario of a seed, everything that happened, and what is wrong; return whether nothing is."""
    simulation = Simulation(draw(seed))
    print(simulation.scenario)
    found: list[str] = []
    try:
        simulation.run()
    except BaseException as error:  # what was done before is the interesting part
        found.append(f"{type(error).__name__}: {error}")
    else:
        found = complaints(simulation)
    for entry in simulation.world.log:
        print(f"  {entry}")
    for run in simulation.runs:
        for event in run.events:
            print(f"  {event}")
        print(run.report)
    print("\n".join(found) or "nothing is wrong")
    return not found
