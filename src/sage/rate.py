"""How fast a provider lets the calls of a service begin."""

from __future__ import annotations

from dataclasses import dataclass

from sage._arguments import check_count
from sage.errors import GraphError, hint, short


@dataclass(frozen=True, slots=True)
class Rate:
    """How fast the calls of a service may begin, as the provider behind it allows.

    Attributes:
        requests_per_minute: how many calls begin in a minute, evenly spread; None is without a limit.
        tokens_per_minute: how many tokens they may use in a minute, as the service tells by `ctx.used`.
        burst: how many calls may begin at once after a pause.

    Raises:
        GraphError: a value can never work.
    """

    requests_per_minute: float | None = None
    tokens_per_minute: float | None = None
    burst: int = 1

    def __post_init__(self) -> None:
        """Refuse values that cannot work, naming them."""
        for name in ("requests_per_minute", "tokens_per_minute"):
            value = getattr(self, name)
            is_number = isinstance(value, int | float) and not isinstance(value, bool)
            if value is not None and not (is_number and 0 < value < float("inf")):
                raise hint(GraphError(f"rate: {name} is {short(value)}"), "Give a positive number.")
        check_count("rate: burst is", self.burst)
        if self.requests_per_minute is None and (self.tokens_per_minute is None or self.burst > 1):
            error = GraphError(f"rate: requests_per_minute is missing, and burst is {self.burst}")
            raise hint(error, "Give requests_per_minute, tokens_per_minute, or both; burst belongs to the first.")
