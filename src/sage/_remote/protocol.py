"""The requests between the processes of a job, each as a method of a typed protocol.

Whoever asks names the method itself: `client.ask(ServiceSide.run_hook, "setup", due)`. The arguments are checked by the
type checker, and the name on the wire is that of the method. A server takes requests of its own protocols alone.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

from sage.service import Supervision

if TYPE_CHECKING:
    from collections.abc import Callable

Address = tuple[str, int]


class LogSide(Protocol):
    """Takes in the log of another process."""

    def log(self, values: dict[str, object]) -> None:
        """Take in a record, as plain values."""


class CallSide(Protocol):
    """Reaches services for another process."""

    def attribute(self, service: str, name: str) -> tuple[bool, object]:
        """Return whether an attribute is a method, and its value if it is not, or whether it is a coroutine method."""

    def call(
        self, service: str, name: str, args: tuple[object, ...], kwargs: dict[str, object], timeout_s: float | None
    ) -> object:
        """Call a method."""


class ServiceSide(Protocol):
    """The process of one service, as its driver asks it."""

    def build(
        self,
        target: Callable[..., object],
        args: tuple[object, ...],
        kwargs: dict[str, object],
        incarnation: int,
        level: int,
        is_serial: bool,
    ) -> frozenset[str]:
        """Make the instance and return the names of its hooks.

        Args:
            target: its class, or a function that returns it.
            args: its arguments.
            kwargs: its keyword arguments.
            incarnation: which instance it is.
            level: the level of the driver's log.
            is_serial: whether one call at a time is made.
        """

    def run_hook(self, hook: str, due: float) -> object:
        """Run a hook, if it can begin before `due` on the machine's clock."""

    def attribute(self, name: str) -> tuple[bool, object]:
        """Return whether an attribute is a method, and its value if it is not, or whether it is a coroutine method."""

    def call(self, place: int, name: str, args: tuple[object, ...], kwargs: dict[str, object], number: int) -> object:
        """Call a method; `place` is that of the call in `BegunCalls`, and `number` that for `give_up`, or 0."""

    def give_up(self, number: int) -> None:
        """Cancel the coroutine of a call, which may not have begun yet."""

    def where(self) -> str:
        """Return where the threads of the process stand, but for those that only wait for requests."""

    def exit(self) -> None:
        """End the process."""


class JobSide(CallSide, LogSide, Supervision, Protocol):
    """The driver, as the process of a service asks it."""

    def know(self, service: str) -> None:
        """Refuse an unknown service, and note one that this one depends on."""


def served(*sides: tuple[type, object]) -> dict[str, Callable[..., object]]:
    """Return the methods that a server offers by name: for each pair, those of the protocol, bound to the object.

    A later pair goes before an earlier one.
    """
    return {
        name: getattr(owner, name)
        for protocol, owner in sides
        for name in dir(protocol)
        if not name.startswith("_") and callable(getattr(protocol, name))
    }
