"""The sites of a job as its master sees them: processes that it starts, directs and ends."""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING, Concatenate, Never, ParamSpec, TypeVar

from sage._logs import log_of
from sage._ray.requests import ActorSide, SiteSide
from sage._remote.rpc import RpcClosedError
from sage._remote.tcp import Lease, TcpRpcClient
from sage.errors import ServiceUnavailableError, describe

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from sage._backends.threads import ThreadLane
    from sage._ray.processes import ActorProcess, Began
    from sage._remote.protocol import Address

P = ParamSpec("P")
R = TypeVar("R")

KILL_SEEN_S = 5.0
"""How long a killed process may take to be gone."""

log = log_of("sage.dispatcher")


class FollowedError(ServiceUnavailableError):
    """The master that asks was taken for dead, and another one has followed it."""


class SiteClient:
    """Leads to one site.

    Args:
        secret: shared by the processes of the job, as proof to each other.
        lane: runs the requests to the site, in order.
        on_gone: called when its process has ended that should not have, with why.
        on_followed: called when the site follows another master, and does nothing for this one any more.

    Attributes:
        pid: its process id, once it is known.
        peer: leads to its process, once that answers.
        bring_up: starts its process, within some seconds, and lets it follow the master.
    """

    bring_up: Callable[[float], None]

    def __init__(
        self,
        name: str,
        secret: bytes,
        lane: ThreadLane,
        on_gone: Callable[[SiteClient, str], None],
        on_followed: Callable[[], None],
    ) -> None:
        self.name = name
        self.pid: int | None = None
        self.peer: TcpRpcClient | None = None
        self.process: ActorProcess | None = None
        self._secret = secret
        self._lane = lane
        self._on_gone = on_gone
        self._on_followed = on_followed
        self._lease: Lease | None = None
        self._is_up = threading.Event()
        self._is_gone = threading.Event()
        self._is_ending = False
        self._why = ""
        self._lock = threading.Lock()

    @property
    def address(self) -> Address | None:
        """Where the site listens, or None."""
        return None if self.peer is None else self.peer.address

    @property
    def is_gone(self) -> bool:
        """Whether the process has ended."""
        return self._is_gone.is_set()

    def begin(self, process: ActorProcess, timeout_s: float) -> Began:
        """Wait until the process answers, watch it, and return where it is; ServiceUnavailableError otherwise."""
        with self._lock:
            self.process = process
            is_given_up = self._is_ending
        if is_given_up:
            process.kill()  # `end` came too early to do it
            raise ServiceUnavailableError(f"{self.name} was given up before it was there")
        began = process.began(timeout_s)
        self.pid = began.pid
        self.reach(began.address)
        return began

    def reach(self, address: Address) -> None:
        """Watch the process at an address from now on; ServiceUnavailableError if it is not there."""
        peer = TcpRpcClient(address, self._secret, {})
        try:
            self._lease = Lease(peer, self._lost)
        except RpcClosedError as error:
            raise ServiceUnavailableError(f"{self.name} cannot be reached: {error}") from None
        self.peer = peer

    def attach(self, master: Address, epoch: int, addresses: dict[str, Address]) -> None:
        """Let the site follow this master; from then on it takes requests."""
        self.ask(SiteSide.attach, master, epoch, addresses)
        assert self.peer is not None
        self.peer.epoch = epoch
        self._is_up.set()

    def give_up(self, why: str) -> None:
        """Let everyone who waits for the site know that it does not come."""
        self._lost(why)

    def ask(self, method: Callable[Concatenate[Never, P], R], *args: P.args, **kwargs: P.kwargs) -> R:
        """Ask the site; see `ask_within`."""
        return self.ask_within(None, method, *args, **kwargs)

    def ask_within(
        self, timeout_s: float | None, method: Callable[Concatenate[Never, P], R], *args: P.args, **kwargs: P.kwargs
    ) -> R:
        """Ask the site; ServiceUnavailableError if its process is gone."""
        if self.peer is None:
            raise ServiceUnavailableError(f"{self.name} is not there{self._reason()}")
        try:
            return self.peer.ask_within(timeout_s, method, *args, **kwargs)
        except FollowedError:
            self._on_followed()
            raise
        except RpcClosedError:
            self._lost()  # whoever follows the site hears of it before the one who asked does
            raise ServiceUnavailableError(f"{self.name} is gone{self._reason()}") from None

    def tell(self, method: Callable[Concatenate[Never, P], object], *args: P.args, **kwargs: P.kwargs) -> None:
        """Ask the site for something when it is up, after earlier requests; errors are logged."""

        def work() -> None:
            self.wait_up()
            try:
                self.ask(method, *args, **kwargs)
            except ServiceUnavailableError:
                log.debug("nobody to tell site=%r request=%s", self.name, method.__name__)
            except Exception as error:
                log.error("site failed site=%r request=%s", self.name, method.__name__, exc_info=error)

        self._lane.run(work)

    def after(self, work: Callable[[], None]) -> None:
        """Run a function when everything was asked for that was told before."""
        self._lane.run(work)

    def flush(self) -> None:
        """Wait until everything was asked for that was told before."""
        done = threading.Event()
        self.after(done.set)
        done.wait()

    def wait_up(self) -> None:
        """Wait until the site follows this master, or does not come."""
        self._is_up.wait()

    def end(self) -> tuple[str, ...]:
        """End the process by force, and describe its leftovers and the processes that do not end.

        One that the cluster cannot end, as it takes its node for dead or is lost itself, is asked to end itself.
        """
        with self._lock:
            self._is_ending = True
            process = self.process
        if self._lease is None:
            self._is_gone.set()
        left: tuple[str, ...] = ()
        unseen: tuple[str, ...] = ()
        try:
            left = process.kill() if process is not None else ()
            self._is_gone.wait(KILL_SEEN_S)
        except ServiceUnavailableError as error:
            unseen = (str(error),)
        if unseen or not self._is_gone.is_set():
            try:
                left = self.ask_within(KILL_SEEN_S, ActorSide.exit)
            except (ServiceUnavailableError, TimeoutError):
                left = unseen
        if not self._is_gone.wait(KILL_SEEN_S):
            left = (*left, f"process {self.pid} of {self.name} does not end")
        self._is_up.set()
        self._lane.close(wait=False)
        if self.peer is not None:
            self.peer.close()
        return left

    def _reason(self) -> str:
        return f": {self._why}" if self._why else ""

    def _lost(self, why: str = "") -> None:
        with self._lock:
            if self._is_gone.is_set():
                return
            self._why = why or f"process {self.pid} ended by itself"
            is_expected = self._is_ending
            self._is_gone.set()
        if self.peer is not None:
            self.peer.shut()
        if not is_expected:
            self._on_gone(self, self._why)
        self._is_up.set()


def in_parallel(works: Sequence[Callable[[], object]]) -> list[BaseException]:
    """Run functions side by side and return their errors."""
    errors: list[BaseException] = []

    def run(work: Callable[[], object]) -> None:
        try:
            work()
        except BaseException as error:  # whoever started them owns it
            errors.append(error)
            log.debug("failed: %s", describe(error))

    threads = [threading.Thread(target=run, args=(work,), daemon=True) for work in works]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return errors
