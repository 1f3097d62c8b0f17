"""Checks of what users give: what cannot work is refused where it is given, with its name and a hint."""

from __future__ import annotations

import os
from typing import Any

from sage.errors import GraphError, hint, short

STOP_TIMEOUT_VARIABLE = "SAGE_STOP_TIMEOUT_S"
"""The environment variable with the budget of a whole stop."""


def check_name(kind: str, name: Any) -> None:
    """Refuse what cannot stand as a name in a report, a plan or a line of a log.

    Raises:
        GraphError: `kind` says of what it is to be the name.
    """
    if not isinstance(name, str) or not name or not name.isprintable():
        raise hint(GraphError(f"the name of {kind} is {short(name)}"), "Give a string of printable characters.")


def check_count(label: str, value: Any, *, least: int = 1) -> None:
    """Refuse what is no whole number of at least `least`.

    Raises:
        GraphError: `label` says what it is.
    """
    if not isinstance(value, int) or isinstance(value, bool) or value < least:
        wanted = "a positive number" if least == 1 else f"a number of at least {least}"
        raise hint(GraphError(f"{label} {short(value)}, which is not {wanted}"), "Give a whole number.")


def check_seconds(label: str, value: Any, *, may_be_zero: bool = True) -> None:
    """Refuse what is no finite number of seconds.

    Raises:
        GraphError: `label` says what it is.
    """
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    if not is_number or not (0 <= value < float("inf")) or (value == 0 and not may_be_zero):
        least = "0 or more" if may_be_zero else "more than 0"
        raise hint(GraphError(f"{label} {short(value)}"), f"Give a finite number of seconds, {least}.")


def check_backoff(label: str, value: Any) -> None:
    """Refuse what is no first and longest pause.

    Raises:
        GraphError: `label` says what it is.
    """
    if not isinstance(value, tuple | list) or len(value) != 2:
        raise hint(GraphError(f"{label} {short(value)}"), "Give the first and the longest pause: (0.1, 10.0).")
    for pause_s in value:
        check_seconds(f"{label} {short(value)}, with the pause", pause_s)


def seconds_in(variable: str) -> float | None:
    """Return the number of seconds in an environment variable, or None if there is none.

    Raises:
        GraphError: it holds something else.
    """
    text = os.environ.get(variable)
    if text is None:
        return None
    try:
        value: Any = float(text)
    except ValueError:
        value = text
    check_seconds(f"the environment variable {variable} is", value)
    return float(value)
