"""Replays one seed of the simulation: `PYTHONPATH=src python -m tests.simulation --seed N`."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parents[1]))
    from simulation.replay import show

    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seed", type=int, required=True, help="the seed that failed")
    sys.exit(0 if show(parser.parse_args().seed) else 1)
