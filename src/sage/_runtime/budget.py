"""Budgets: what a job may use, and its end when that is used up."""

from __future__ import annotations

import threading
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from sage._arguments import check_count, check_seconds
from sage.errors import GraphError, HeldBackError, UnsupportedPlanError, hint, short
from sage.service import unknown_service

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from sage._plan.logical import LogicalGraph
    from sage._runtime.supervisor import Supervisor

WARNED_SHARE = 0.8

RECORDS_LEAST = 100
"""The failures of an operator are looked at as if it had had at least so many records: the first one proves little."""

LOOK_S = 0.1
"""How often failures are counted."""

PRICED_TOKENS = 1_000_000
"""The prices are those of so many tokens."""


@dataclass(frozen=True, slots=True)
class BudgetLimits:
    """The limits of a job; see `Environment.limit`."""

    wall_s: float | None = None
    calls: Mapping[str, int] = field(default_factory=dict)
    tokens: int | None = None
    cost: tuple[float, float, float] | None = None
    failures: float | None = None

    def __post_init__(self) -> None:
        """Refuse values that cannot work, naming the limit."""
        if self.wall_s is not None:
            check_seconds("limit: wall_s is", self.wall_s, may_be_zero=False)
        calls: object = self.calls
        if not isinstance(calls, dict):
            raise hint(GraphError(f"limit: calls is {short(calls)}"), 'Give them by service: calls={"llm": 10_000}.')
        for service, count in calls.items():
            check_count(f"limit: calls of {short(service)} are", count)
        if self.tokens is not None:
            check_count("limit: tokens is", self.tokens)
        cost: object = self.cost
        if cost is not None and not (
            isinstance(cost, tuple | list) and len(cost) == 3 and all(map(_is_amount, cost)) and cost[2] > 0
        ):
            error = GraphError(f"limit: cost is {short(cost)}")
            raise hint(error, "Give the prices of a million prompt and completion tokens, and the limit: (3, 15, 20).")
        if self.failures is not None and not (_is_amount(self.failures) and 0 < self.failures < 1):
            raise hint(GraphError(f"limit: failures is {short(self.failures)}"), "Give a fraction: 0.05 for 5 %.")

    @property
    def counts_tokens(self) -> bool:
        """Whether services have to tell of the tokens that they used."""
        return self.tokens is not None or self.cost is not None

    def bounds(self, service: str) -> bool:
        """Return whether calls of a service need a permit."""
        return service in self.calls or self.counts_tokens

    def check(self, environment: str, graph: LogicalGraph) -> None:
        """Refuse limits that a job cannot hold.

        Raises:
            UnknownServiceError: the calls of a service are limited that is not registered.
            UnsupportedPlanError: the tokens of a shared service cannot be told apart by environment.
        """
        names = [spec.name for spec in graph.services]
        for service in self.calls:
            if service not in names:
                raise unknown_service(f'limit of environment "{environment}"', service, names)
        shared = [spec.name for spec in graph.services if spec.options.shared]
        if shared and self.counts_tokens:
            text = f'environment "{environment}" limits tokens, which service "{shared[0]}" uses for others too'
            raise hint(UnsupportedPlanError(text), "Leave shared=True out, or limit the calls.")


class Budget:
    """Counts the use of one job against its limits; any thread may call it.

    Args:
        stop: asks for the end of the job, for a reason, without waiting for it.
        warn: writes a line to the log of the job.
    """

    def __init__(self, limits: BudgetLimits, stop: Callable[[str], None], warn: Callable[[str], None]) -> None:
        self._limits = limits
        self._stop = stop
        self._warn = warn
        self._lock = threading.Lock()
        self._used: dict[str, float] = {}
        self._warned: set[str] = set()
        self._tellers: set[str] = set()  # services that told of tokens
        self._reached = ""

    def begin(self, supervisor: Supervisor, used_s: float = 0.0) -> None:
        """Watch the time and the failures of a job that is about to begin, `used_s` seconds after it was submitted."""
        wall_s = self._limits.wall_s
        if wall_s is not None:
            began_s = supervisor.backend.now() - used_s
            supervisor.call_at(
                began_s + WARNED_SHARE * wall_s, lambda: self._take("wall_s", WARNED_SHARE * wall_s, wall_s)
            )
            supervisor.call_at(began_s + wall_s, lambda: self._take("wall_s", wall_s, wall_s))
        if self._limits.failures is not None:
            self._look(supervisor)

    def permit(self, service: str) -> Callable[[], None] | None:
        """Return the function that each call of a service calls as it begins, or None if nothing limits the service.

        It raises `HeldBackError` for a call that may not begin.
        """
        return (lambda: self._begin_call(service)) if self._limits.bounds(service) else None

    def used(self, service: str, prompt_tokens: int, completion_tokens: int) -> None:
        """Count the tokens of an answer."""
        self._tellers.add(service)
        if self._limits.tokens is not None:
            tokens = self._add("tokens", prompt_tokens + completion_tokens)
            self._take("tokens", tokens, self._limits.tokens)
        if self._limits.cost is not None:
            prompt_price, completion_price, limit = self._limits.cost
            cost = (prompt_tokens * prompt_price + completion_tokens * completion_price) / PRICED_TOKENS
            self._take("cost", self._add("cost", cost), limit)

    def _begin_call(self, service: str) -> None:
        limit = self._limits.calls.get(service)
        if limit is not None and not self._reached:
            name = f'calls of "{service}"'
            count = self._add(name, 1)
            if count <= limit:
                self._warn_of(name, count, limit)
                return
            self._reach(name, limit, limit)
        if self._reached and (limit is not None or service in self._tellers):
            error = HeldBackError(f'service "{service}" was not called: the budget is used up', service=service)
            raise hint(error, f"The job ends, as env.limit(...) bounds its {self._reached}.")

    def _look(self, supervisor: Supervisor) -> None:
        """Compare the failures of each operator with its records, now and again and again."""
        assert self._limits.failures is not None
        counts: dict[str, list[int]] = {}
        for task in supervisor.tasks.values():
            for operator in task.operators:
                count = counts.setdefault(operator.node.name, [0, 0])
                count[0] += operator.metrics.failed
                count[1] += operator.metrics.records_in
        for name, (failed, records) in counts.items():
            if failed > 1:
                self._take(f'failures of "{name}"', failed / max(records, RECORDS_LEAST), self._limits.failures)
        supervisor.call_at(supervisor.backend.now() + LOOK_S, lambda: self._look(supervisor))

    def _add(self, name: str, amount: float) -> float:
        with self._lock:
            used = self._used[name] = self._used.get(name, 0) + amount
        return used

    def _take(self, name: str, used: float, limit: float) -> None:
        """End the job if a limit is reached, and warn if it nearly is."""
        if used >= limit:
            self._reach(name, used, limit)
        else:
            self._warn_of(name, used, limit)

    def _warn_of(self, name: str, used: float, limit: float) -> None:
        if used < WARNED_SHARE * limit:
            return
        with self._lock:
            is_first = name not in self._warned
            self._warned.add(name)
        if is_first:
            self._warn(f"{WARNED_SHARE:.0%} of the budget is used: {name}, {used:,.6g} of {limit:,.6g}")

    def _reach(self, name: str, used: float, limit: float) -> None:
        with self._lock:
            is_first, self._reached = not self._reached, self._reached or name
        if is_first:
            self._stop(f"budget: {name}, {used:,.6g} of {limit:,.6g}")


def _is_amount(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and 0 <= value < float("inf")
