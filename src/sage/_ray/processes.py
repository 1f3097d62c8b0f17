"""What the job master needs of the cluster: processes for its sites, which it can end by force."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

if TYPE_CHECKING:
    from collections.abc import Callable

    from sage._plan.logical import Place
    from sage._ray.mesh import Address


class Began(NamedTuple):
    """A process that answers.

    Attributes:
        address: where it listens.
        pid: its process id on its machine.
        node: the machine.
    """

    address: Address
    pid: int
    node: str


class SiteProcess(Protocol):
    """One process of the cluster.

    Attributes:
        cookie: what its children carry in their environment.
    """

    cookie: str

    def began(self, timeout_s: float) -> Began:
        """Wait until it answers.

        Raises:
            ServiceUnavailableError: it did not get its place in the cluster in time, or it has ended; it says why.
        """

    def kill(self) -> tuple[str, ...]:
        """End it by force, whatever it does, and what it left behind; return that in words. Does nothing twice.

        Raises:
            ServiceUnavailableError: the cluster cannot end it, or not look at what it left.
        """


class Memory(Protocol):
    """Keeps what the master of a job knows where the master that follows it finds it."""

    def read(self) -> dict[str, Any] | None:
        """Return what was written last, or None."""

    def write(self, known: dict[str, Any]) -> None:
        """Keep what is known, and return when it is kept.

        Raises:
            ServiceUnavailableError: the cluster does not answer.
        """

    def clear(self) -> None:
        """Forget it, if the cluster answers."""


class Cluster(Protocol):
    """Where processes of a job run."""

    def watch(self, on_lost: Callable[[str], None]) -> None:
        """Have `on_lost` called once, with why, when the cluster can neither start nor end processes any more."""

    def start(self, name: str, order: Any, place: Place, *, outlives_master: bool) -> SiteProcess:
        """Begin to start a process for a site and return it at once.

        Args:
            name: the name of the site.
            order: a `SiteOrder`, or what stands for one in the cluster.
            place: what it reserves.
            outlives_master: whether it stays when the master is killed, so that the next one can end it in order.
        """

    def find(self, name: str, cookie: str) -> SiteProcess | None:
        """Return a process that an earlier master started and that outlives it, or None if it is gone.

        Args:
            name: the name of the site.
            cookie: what its children carry in their environment.
        """
