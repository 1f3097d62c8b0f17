"""Checks of arguments: a wrong value is refused where it is passed, with its name and a hint."""

from __future__ import annotations

import inspect
import os
from collections.abc import Iterable
from copy import deepcopy
from typing import TypeGuard, TypeVar

from sage.errors import GraphError, describe, hint, short

T = TypeVar("T")

STOP_TIMEOUT_VARIABLE = "SAGE_STOP_TIMEOUT_S"
"""The environment variable with the budget of a whole stop."""


def check_name(kind: str, name: object) -> str:
    """Return a name, or raise GraphError if it cannot be shown in a report, a plan or a log; `kind` says which."""
    if not isinstance(name, str) or not name or not name.isprintable():
        raise hint(GraphError(f"the name of {kind} is {short(name)}"), "Give a string of printable characters.")
    return name


def check_text(label: str, value: object, advice: str) -> None:
    """Raise GraphError, with `label` and `advice`, for a value that is not a string, or is an empty one."""
    if not isinstance(value, str) or not value:
        raise hint(GraphError(f"{label} is {short(value)}"), advice)


def names_of(label: str, given: object, advice: str) -> tuple[str, ...]:
    """Return one name or several as a tuple; GraphError, with `label` and `advice`, if one cannot be a name."""
    names = tuple(given) if isinstance(given, Iterable) and not isinstance(given, str) else (given,)
    for name in names:
        check_text(label, name, advice)
    return names


def path_of(label: str, value: object, advice: str) -> str:
    """Return a path as a string; GraphError, with `label` and `advice`, if it is empty or not a path."""
    path = os.fspath(value) if isinstance(value, os.PathLike) else value
    check_text(label, path, advice)
    return str(path)


def check_count(label: str, value: object, *, least: int = 1) -> int:
    """Return a whole number of at least `least`, or raise GraphError, with `label`, for any other value."""
    if not isinstance(value, int) or isinstance(value, bool) or value < least:
        wanted = "a positive number" if least == 1 else f"a number of at least {least}"
        raise hint(GraphError(f"{label} {short(value)}, which is not {wanted}"), "Give a whole number.")
    return value


def is_number(value: object) -> TypeGuard[int | float]:
    """Return whether a value is a number, and not a boolean."""
    return isinstance(value, int | float) and not isinstance(value, bool)


def check_seconds(label: str, value: object, *, may_be_zero: bool = True) -> float:
    """Return a finite number of seconds, or raise GraphError, with `label`, for any other value."""
    if not is_number(value) or not (0 <= value < float("inf")) or (value == 0 and not may_be_zero):
        least = "0 or more" if may_be_zero else "more than 0"
        raise hint(GraphError(f"{label} {short(value)}"), f"Give a finite number of seconds, {least}.")
    return value


def check_backoff(label: str, value: object) -> None:
    """Raise GraphError, with `label`, for a value that is not a pair of first and longest pause."""
    if not isinstance(value, tuple | list) or len(value) != 2:
        raise hint(GraphError(f"{label} {short(value)}"), "Give the first and the longest pause: (0.1, 10.0).")
    for pause_s in value:
        check_seconds(f"{label} {short(value)}, with the pause", pause_s)


def seconds_in(variable: str) -> float | None:
    """Return the seconds in an environment variable, None if it is not set; GraphError if it holds something else."""
    text = os.environ.get(variable)
    if text is None:
        return None
    try:
        value: float | str = float(text)
    except ValueError:
        value = text
    return check_seconds(f"the environment variable {variable} is", value)


def copy_of_initial(label: str, initial: T) -> T:
    """Return a copy of the value with which each key begins.

    Raises:
        GraphError: it cannot be copied, or it is a class or a function; `label` names it.
    """
    if isinstance(initial, type) or inspect.isroutine(initial):
        error = GraphError(f"{label} is {short(initial)}, which is not a state")
        raise hint(error, "Give the state itself, such as [] for list; each key begins with a copy of it.")
    try:
        return deepcopy(initial)
    except Exception as failed:
        error = GraphError(f"{label} is {short(initial)}, which cannot be copied: {describe(failed)}")
        raise hint(
            error, "Each key begins with a copy of it. Give None, and make the object in the function."
        ) from failed


def stop_limits(
    environment: str,
    stop_timeout_s: float | None,
    drain_timeout_s: float | None,
    close_timeout_s: float | None,
    services_share: float | None,
    services_reserve_s: float | None,
) -> dict[str, float]:
    """Return the bounds of a stop that are not the default, or raise GraphError for one that cannot work."""
    given = {
        "stop_timeout_s": seconds_in(STOP_TIMEOUT_VARIABLE) if stop_timeout_s is None else stop_timeout_s,
        "drain_timeout_s": drain_timeout_s,
        "close_timeout_s": close_timeout_s,
        "services_share": services_share,
        "services_reserve_s": services_reserve_s,
    }
    limits = {name: value for name, value in given.items() if value is not None}
    for option, value in limits.items():
        check_seconds(f'environment "{environment}": {option} is', value)
    if limits.get("services_share", 0.0) > 1:
        error = GraphError(f'environment "{environment}": services_share is {services_share}')
        raise hint(error, "Give a fraction between 0 and 1.")
    return limits
