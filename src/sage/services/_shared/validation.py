"""Checks of arguments of services before anything is written: strings, JSON, times to live and whole numbers."""

from __future__ import annotations

import json
import math
from numbers import Integral
from typing import TypeGuard

from sage.errors import ServiceError, hint, short

TTL_MAX_S = 3_155_760_000.0
"""A hundred years, in seconds; a longer time to live would be a mistake, and overflow the one of Redis."""


def is_number(value: object, least: float = -math.inf, most: float = math.inf) -> TypeGuard[float]:
    """Return whether a value is a number, which True is not, within bounds that belong to it."""
    return isinstance(value, int | float) and not isinstance(value, bool) and least <= value <= most


def checked_text(name: str, text: str) -> str:
    """Return a text that can be kept."""
    if not isinstance(text, str):
        raise TypeError(f"the {name} {short(text)} is of type {type(text).__name__}, not a string")
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ValueError(f"the {name} {short(text)} cannot be written as UTF-8: {error.reason}") from None
    return text


def checked_ttl(ttl_s: float | None) -> float | None:
    """Return a time to live."""
    if ttl_s is None:
        return None
    if isinstance(ttl_s, bool) or not isinstance(ttl_s, int | float):
        raise TypeError(f"ttl_s is {short(ttl_s)}, not a number of seconds")
    if math.isnan(ttl_s) or ttl_s <= 0:
        error = ValueError(f"ttl_s is {ttl_s}, and a time to live is above 0 seconds")
        raise hint(error, "Leave it out for a value that stays; call delete(key) for one that goes at once.")
    if ttl_s > TTL_MAX_S:
        raise ValueError(f"ttl_s is {ttl_s}, more than a hundred years ({TTL_MAX_S:.0f} seconds)")
    return ttl_s


def json_text(name: str, value: object) -> str:
    """Return a value as JSON."""
    try:
        text = json.dumps(value, allow_nan=False)
        is_same = bool(json.loads(text) == value)
    except (TypeError, ValueError, RecursionError) as error:
        raise _no_json(name, value, str(error)) from None
    if not is_same:
        raise _no_json(name, value, f"it would come back as {short(json.loads(text))}")
    return text


def _no_json(name: str, value: object, reason: str) -> TypeError:
    error = TypeError(f"the value of {short(name)} is {short(value)}, which JSON cannot hold: {reason}")
    return hint(error, "Values are None, booleans, numbers, strings, lists, and dicts with strings as keys.")


def json_value(key: str, text: str) -> object:
    """Return the value that a text stands for."""
    try:
        return json.loads(text)
    except ValueError:
        raise ServiceError(f"the value of {short(key)} is not JSON: {short(text)}", fault="external") from None


def checked_whole(name: str, value: object) -> int:
    """Return a whole number, which may be one of numpy's."""
    if isinstance(value, bool) or not isinstance(value, Integral):
        raise TypeError(f"{name} is {short(value)}, not a whole number")
    return int(value)


def checked_count(what: str, number: object) -> int:
    """Return a whole number from 1 on, which may be one of numpy's."""
    if isinstance(number, bool) or not isinstance(number, Integral) or number < 1:
        raise ValueError(f"{what} is {short(number)}, not a whole number from 1 on")
    return int(number)
