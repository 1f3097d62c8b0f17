"""The one connection of this process to Ray: to a Ray of its own, or to the cluster that it was given."""

from __future__ import annotations

import atexit
import faulthandler
import logging
import os
import secrets
import signal
import socket
import threading
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from sage._hosts.local_ray import LocalRay, check_ray
from sage._hosts.warm_ray import WARM, warm_ray
from sage._logs import log_of
from sage.errors import AuthenticationError, JobError, ServerUnreachableError, describe, hint
from sage.services.extras import load

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping

log = log_of("sage.cluster")

AUTO = "auto"
"""The word, Ray's own, for the cluster that RAY_ADDRESS names, else the one that runs on this machine."""

REACH_TIMEOUT_S = 5.0
SHUTDOWN_S = 10.0
MODE, TOKEN, TOKEN_PATH = "RAY_AUTH_MODE", "RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"


@dataclass(frozen=True, slots=True)
class Connected:
    """What this process is connected to.

    Attributes:
        address: host and port of the cluster.
        namespace: where names of actors are looked up; of this connection alone, unless the program connected itself.
        folder: where a Ray of this process's own keeps its sockets and logs, or None.
        jobs: a folder for jobs that end themselves on a Ray of this process's own, or None.
    """

    address: str
    namespace: str
    folder: str | None = None
    jobs: str | None = None

    def ends_itself(self, job: str, timeout_s: float) -> str | None:
        """Let the guardian wait for a job before it ends a Ray of this process's own, should this process die.

        Call it before the job's master is made. Whoever has ended the job removes the file.

        Args:
            job: the job's id.
            timeout_s: how long it may take to end itself, in seconds.

        Returns:
            The file, or None if the cluster outlives this process anyway.
        """
        if self.jobs is None:
            return None
        path = os.path.join(self.jobs, job)
        with open(path, "w", encoding="ascii") as file:
            file.write(f"{timeout_s:g}")
        return path


@contextmanager
def cluster(address: str | None = None) -> Iterator[Connected]:
    """Keep this process connected to Ray, with `ray.init` already called, as long as the block runs.

    Blocks of all threads share one connection; the last one that ends closes it, and ends a Ray of its own with
    everything that it started. RAY_ADDRESS leads nowhere unless `address` is "auto".

    Args:
        address: None for a Ray of this process's own, "warm" for the one that `sage cluster up` keeps, "auto", or host
            and port of a cluster.

    Raises:
        MissingExtraError: Ray is not installed, or not in a supported version.
        ServerUnreachableError: no cluster answers there.
        AuthenticationError: the cluster wants a token, and this process has none or a wrong one.
        JobError: this process is connected to another cluster, or its own Ray cannot be started.
    """
    connection = Connection.acquire(address)
    try:
        yield connection.connected
    finally:
        connection.release()


class Connection:
    """The connection of this process, counted."""

    _lock: ClassVar[threading.Lock] = threading.Lock()
    _current: ClassVar[Connection | None] = None

    def __init__(self, address: str | None) -> None:
        self._users_count = 1
        self._local: LocalRay | None = None
        self._variables: dict[str, str | None] = {}
        self._is_ours = True
        ray = load("ray", "ray")
        if ray.is_initialized():
            self.connected = _adopted(ray, address)
            self._is_ours = False
            return
        try:
            token_path: str | None
            if address is None:
                self._local = LocalRay()
                target, token_path = self._local.address, self._local.token_path
            else:
                target, token_path = _target(address)
            self._set({} if token_path is None else {MODE: "token", TOKEN_PATH: token_path, TOKEN: None})
            self._open_door(target)
            self.connected = self._connect(ray, target)
        except BaseException:
            self._close()
            raise

    @classmethod
    def acquire(cls, address: str | None) -> Connection:
        """Return the connection of this process, a new one if there is none; the caller releases it once."""
        check_ray()
        with cls._lock:
            if cls._current is None:
                cls._current = cls(address)
                atexit.register(cls._close_at_exit)
            else:
                cls._current._check_same(address)
                cls._current._users_count += 1
            return cls._current

    def release(self) -> None:
        """Give back what `acquire` gave; the last one closes the connection, and ends a Ray of its own."""
        with Connection._lock:
            self._users_count -= 1
            if self._users_count or Connection._current is not self:
                return
            Connection._current = None
            atexit.unregister(Connection._close_at_exit)
            self._close()

    # --- behind it ---

    def _check_same(self, address: str | None) -> None:
        is_own = self._local is not None
        same = is_own if address is None else _target(address)[0] == self.connected.address
        if not same:
            raise _connected_elsewhere(self.connected.address, address)

    def _set(self, variables: Mapping[str, str | None]) -> None:
        """Change the environment until the connection is closed, and let Ray read there which token it has."""
        for name, value in variables.items():
            self._variables.setdefault(name, os.environ.get(name))
            _set_variable(name, value)
        _read_token_again()

    def _open_door(self, target: str) -> None:
        """See that the cluster answers, and that it takes our token: Ray tries for 20 s and then blames a crash.

        Raises:
            ServerUnreachableError: nothing answers there.
            AuthenticationError: it does not take our token.
        """
        host, _, port = target.rpartition(":")
        try:
            socket.create_connection((host.strip("[]"), int(port)), REACH_TIMEOUT_S).close()
        except (OSError, ValueError) as error:
            raise _unreachable(target, error) from error
        raylet = load("ray._raylet", "ray")
        has_token = _has_token()
        is_on = os.environ.get(MODE, "").lower() == "token"
        if is_on and not has_token:
            raise _refused(target, "this process has none")
        refused = _refusal(raylet, target)
        if refused is not None and has_token and MODE not in os.environ:
            # Ray uses a token that it finds to start a cluster, but not to connect to it.
            self._set({MODE: "token"})
            is_on, refused = True, _refusal(raylet, target)
        if refused is not None:
            why = "its token is a wrong one" if has_token and is_on else "this process shows none"
            raise _refused(target, why) from refused

    def _connect(self, ray: Any, target: str) -> Connected:
        namespace = f"sage-{secrets.token_hex(8)}"
        with _own_process_manners():
            try:
                # The log of Ray is left to the program; what workers print is shown, as on one machine.
                ray.init(address=target, namespace=namespace, configure_logging=False)
            except (ConnectionError, RuntimeError) as error:
                raise _unreachable(target, error) from error
        log.info("cluster connected address=%s namespace=%s", target, namespace)
        if self._local is None:
            return Connected(target, namespace)
        return Connected(target, namespace, self._local.temporary_folder, self._local.jobs)

    def _close(self) -> None:
        try:
            if self._is_ours:
                worker = load("ray._private.worker", "ray")
                with _own_process_manners():
                    if not within(SHUTDOWN_S, worker.shutdown):
                        log.error("Ray does not let this process go, as the node that it is connected to stands still")
                        atexit.unregister(worker.shutdown)  # which would keep the process from its exit
        finally:
            local, self._local = self._local, None
            try:
                if local is not None:
                    local.end()
            finally:
                for name, value in self._variables.items():
                    _set_variable(name, value)
                _read_token_again()

    @classmethod
    def _close_at_exit(cls) -> None:
        current, cls._current = cls._current, None
        if current is not None:
            current._close()

    @classmethod
    def _after_fork_in_child(cls) -> None:
        """Forget the connection: Ray cannot be used in a forked child, and the cluster is the parent's."""
        cls._lock = threading.Lock()
        cls._current = None
        atexit.unregister(cls._close_at_exit)


os.register_at_fork(after_in_child=Connection._after_fork_in_child)


def _target(address: str) -> tuple[str, str | None]:
    """Return host and port of the cluster that an address means, and the file of its token if we keep it."""
    warm = warm_ray()
    if address == WARM:
        if warm is None:
            raise hint(ServerUnreachableError("no cluster is kept warm on this machine"), "Start one: sage cluster up")
        return warm.address, warm.token_path
    if "://" in address or (address != AUTO and ":" not in address):
        error = JobError(f'address "{address}" is not one of a cluster', fault="user")
        raise hint(error, f'It is host and port of the head, such as "10.0.0.5:6379", "{AUTO}", "{WARM}", or None.')
    try:
        target: str = load("ray._private.services", "ray").canonicalize_bootstrap_address_or_die(address)
    except (ConnectionError, ValueError, OSError) as error:
        raise _unreachable(address, error) from error
    return target, warm.token_path if warm is not None and warm.address == target else None


def _adopted(ray: Any, address: str | None) -> Connected:
    """Return the connection that the program made itself, if it is the one that is asked for."""
    context = ray.get_runtime_context()
    found: str = context.gcs_address
    if address != AUTO and (address is None or _target(address)[0] != found):
        raise _connected_elsewhere(found, address)
    return Connected(found, context.namespace)


def _has_token() -> bool:
    """Return whether Ray would find a token; where it would not, it aborts the process when it needs one."""
    if os.environ.get(TOKEN):
        return True
    path = os.environ.get(TOKEN_PATH) or os.path.expanduser("~/.ray/auth_token")
    try:
        with open(path, encoding="utf-8") as file:
            return bool(file.read().strip())
    except OSError:
        return False


def _refusal(raylet: Any, target: str) -> BaseException | None:
    """Return the error with which a cluster refuses our token, or None."""
    exceptions: Any = load("ray.exceptions", "ray")
    try:
        raylet.GcsClient(address=target)
    except exceptions.AuthenticationError as error:
        found: BaseException = error
        return found
    except exceptions.RpcError as error:
        raise _unreachable(target, error) from error
    return None


def _read_token_again() -> None:
    """Let Ray forget what it read of the environment before."""
    raylet = load("ray._raylet", "ray")
    raylet.Config.initialize("")
    raylet.AuthenticationTokenLoader.instance().reset_cache()


def _set_variable(name: str, value: str | None) -> None:
    if value is None:
        os.environ.pop(name, None)
    else:
        os.environ[name] = value


def within(bound_s: float, work: Callable[[], object]) -> bool:
    """Call what asks Ray, and return whether it came back in time; it is left alone then. What it raises is logged."""

    def run() -> None:
        try:
            work()
        except (OSError, RuntimeError, ValueError, load("ray.exceptions", "ray").RayError) as error:
            log.error("Ray has refused to end something: %s", describe(error))

    working = threading.Thread(target=run, name="sage-ray", daemon=True)
    working.start()
    working.join(bound_s)
    return not working.is_alive()


@contextmanager
def _own_process_manners() -> Iterator[None]:
    """Put back what Ray changes in this process, its handler of SIGTERM and the dump of stacks, and keep it silent."""
    handler, dumps = signal.getsignal(signal.SIGTERM), faulthandler.is_enabled()
    ray_log = logging.getLogger("ray")
    level = ray_log.level
    ray_log.setLevel(logging.ERROR)
    try:
        yield
    finally:
        ray_log.setLevel(level)
        if handler is not None and signal.getsignal(signal.SIGTERM) is not handler:
            with suppress(ValueError):  # on another thread Ray has not changed it
                signal.signal(signal.SIGTERM, handler)
        if not dumps:
            faulthandler.disable()


def _connected_elsewhere(found: str, address: str | None) -> JobError:
    wanted = "start a Ray of its own" if address is None else f'connect to "{address}"'
    error = JobError(f"this process is connected to Ray at {found}, so it cannot {wanted}", fault="user")
    return hint(error, "A process has one connection to Ray; give the same address to all, or end the other first.")


def _unreachable(target: str, error: BaseException) -> ServerUnreachableError:
    return hint(
        ServerUnreachableError(f"no Ray cluster answers at {target}: {error}"),
        "With no address, a Ray of this program's own is started.",
    )


def _refused(target: str, why: str) -> AuthenticationError:
    error = AuthenticationError(f"the Ray cluster at {target} wants a token, and {why}")
    return hint(error, f"Let {TOKEN_PATH} name the file with the token of that cluster, and set {MODE}=token.")
