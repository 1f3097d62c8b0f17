"""The limits of an account, as the headers of a model server's answers tell them."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

from sage._bucket import MINUTE_S, Limit

if TYPE_CHECKING:
    from collections.abc import Mapping

REFILL_MAX_S = 600.0
"""A limit that comes back more slowly, such as one for a day, is not waited for: its server answers 429 in the end."""

NEAR_MINUTE = 3.0
"""A limit that seems to come back in up to so many minutes, or such a part of one, is taken as one for a minute."""

DURATION = re.compile(r"(?:(\d+)h)?(?:(\d+)m(?!s))?(?:(\d+(?:\.\d+)?)s)?(?:(\d+(?:\.\d+)?)ms)?")
UNITS_S = (3600.0, 60.0, 1.0, 0.001)


def duration_s(text: str) -> float | None:
    """Return a duration such as "6m0s", "20ms" or "1.5", which counts seconds; None if it is something else."""
    text = text.strip()
    try:
        seconds = float(text)
    except ValueError:
        parts = DURATION.fullmatch(text)
        if not text or parts is None:
            return None
        seconds = sum(float(part or 0) * unit_s for part, unit_s in zip(parts.groups(), UNITS_S, strict=True))
    return seconds if 0.0 <= seconds < float("inf") else None


def limit_in(headers: Mapping[str, str], kind: str) -> Limit | None:
    """Return the limit for "requests" or "tokens" in the headers of an answer, or None if they do not tell it."""
    try:
        size, left = (float(headers.get(f"x-ratelimit-{part}-{kind}", "")) for part in ("limit", "remaining"))
    except ValueError:
        return None
    if not (1.0 <= size < float("inf") and 0.0 <= left <= size):
        return None
    refill_s = _refill_s(size, size - left, duration_s(headers.get(f"x-ratelimit-reset-{kind}", "")))
    return Limit(size * MINUTE_S / refill_s, size, left) if 0.0 < refill_s <= REFILL_MAX_S else None


def _refill_s(size: float, missing: float, reset_s: float | None) -> float:
    """Return how long all of a limit takes to come back, if it takes `reset_s` until what is missing is there again."""
    if not reset_s or not missing:
        return MINUTE_S
    refill_s = reset_s * size / missing
    if MINUTE_S / NEAR_MINUTE <= refill_s <= MINUTE_S * NEAR_MINUTE:
        return MINUTE_S
    # One less: what is left is told without its fraction.
    return reset_s * size / (missing - 1) if missing > 1 else float("inf")
