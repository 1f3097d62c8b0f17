"""Measures what the runtime costs, as ratios to plain Python: `make bench`."""
