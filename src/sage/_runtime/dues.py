"""Moments in order, as a value: a leftist heap, of which the old one stays as it is when something is added."""

from __future__ import annotations

Due = tuple[float, bool, str]
"""A moment, whether it is a task's, and the name of the task or service."""

Dues = tuple[int, Due, "Dues", "Dues"] | None
"""The distance to the next empty place, the first moment, and the growth factor after it."""


def merged(one: Dues, other: Dues) -> Dues:
    """Return the moments of both; it takes steps in the order of the logarithm of their number."""
    if one is None or other is None:
        return one or other
    if other[1] < one[1]:
        one, other = other, one
    near, far = merged(one[3], other), one[2]
    near_depth, far_depth = (near[0] if near is not None else 0), (far[0] if far is not None else 0)
    if far_depth < near_depth:
        return far_depth + 1, one[1], near, far
    return near_depth + 1, one[1], far, near


def with_due(dues: Dues, due: Due) -> Dues:
    """Return the moments with another one."""
    return merged(dues, (1, due, None, None))


def without_first(dues: Dues) -> Dues:
    """Return the moments but for the first one."""
    return None if dues is None else merged(dues[2], dues[3])
