"""The one connection of this process to Ray: to a Ray of its own, or to the cluster that it was given."""

from __future__ import annotations

import atexit
import copyreg
import faulthandler
import logging
import os
import secrets
import signal
import socket
import sys
import threading
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from sage._extras import load
from sage._logs import log_of
from sage._ray.kept_cluster import WARM, kept_cluster
from sage._ray.local_cluster import LocalRay, check_ray
from sage.errors import AuthenticationError, GraphError, JobError, ServerUnreachableError, describe, hint

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping
    from types import ModuleType

log = log_of("sage.cluster")

AUTO = "auto"
"""The word, Ray's own, for the cluster that RAY_ADDRESS names, else the one that runs on this machine."""

SUBMITTED = "RAY_JOB_CONFIG_JSON_ENV_VAR"
"""The variable that `ray job submit` sets for its program, beside RAY_ADDRESS."""

REACH_TIMEOUT_S = 5.0
SHUTDOWN_S = 10.0
MODE, TOKEN, TOKEN_PATH = "RAY_AUTH_MODE", "RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"

PATIENCE = {"RAY_gcs_rpc_server_reconnect_timeout_s": str(24 * 3600)}
"""Ray ends a program at once whose cluster has had no control store (GCS) for a minute, even while it disconnects. The
job master notices that much earlier and ends the job, so the program itself is left alone."""


@dataclass(frozen=True, slots=True)
class Connected:
    """The Ray to which this process is connected.

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
        address: None for the connection that the program made, or the cluster that `ray job submit` started it on, and
            else for a Ray of this process's own; "warm" for the one that `sage cluster up` keeps, "auto", or host
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
        if is_connected():
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
            self._set(PATIENCE)
            self.connected = self._connect(ray, target)
        except BaseException:
            self._close()
            raise

    @classmethod
    def acquire(cls, address: str | None) -> Connection:
        """Return the connection of this process, connecting if necessary; the caller releases it once."""
        check_ray()
        address = AUTO if address is None and _is_submitted() else address
        with cls._lock:
            if cls._current is None:
                cls._current = cls(address)
                atexit.register(cls._close_at_exit)
            else:
                cls._current._check_same(address)
                cls._current._users_count += 1
            return cls._current

    def release(self) -> None:
        """Release a connection from `acquire`; the last one closes the connection, and ends a Ray of its own."""
        with Connection._lock:
            self._users_count -= 1
            if self._users_count or Connection._current is not self:
                return
            Connection._current = None
            atexit.unregister(Connection._close_at_exit)
            self._close()

    # --- behind it ---

    def _check_same(self, address: str | None) -> None:
        if not is_connected():
            raise _cut_off()
        is_own = self._local is not None or not self._is_ours
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

    def _connect(self, ray: ModuleType, target: str) -> Connected:
        namespace = f"sage-{secrets.token_hex(8)}"
        with _own_process_manners():
            try:
                # The log of Ray is left to the program; the output of workers is shown, as on one machine.
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
    warm = kept_cluster()
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


def _adopted(ray: ModuleType, address: str | None) -> Connected:
    """Return the connection that the program made itself, if no other cluster is asked for."""
    context = ray.get_runtime_context()
    found: str = context.gcs_address
    if address not in (None, AUTO) and _target(address)[0] != found:
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


def _refusal(raylet: ModuleType, target: str) -> BaseException | None:
    """Return the error with which a cluster refuses our token, or None."""
    exceptions = load("ray.exceptions", "ray")
    try:
        raylet.GcsClient(address=target)
    except exceptions.AuthenticationError as error:
        found: BaseException = error
        return found
    except exceptions.RpcError as error:
        raise _unreachable(target, error) from error
    return None


def _read_token_again() -> None:
    """Reset the settings that Ray has read from the environment."""
    raylet = load("ray._raylet", "ray")
    raylet.Config.initialize("")
    raylet.AuthenticationTokenLoader.instance().reset_cache()


def _set_variable(name: str, value: str | None) -> None:
    if value is None:
        os.environ.pop(name, None)
    else:
        os.environ[name] = value


def within(bound_s: float, work: Callable[[], object]) -> bool:
    """Ask Ray something, and return whether the call returned in time; if not, it is left alone. Errors are logged."""

    def run() -> None:
        try:
            work()
        except (OSError, RuntimeError, ValueError, load("ray.exceptions", "ray").RayError) as error:
            log.error("Ray has refused to end something: %s", describe(error))

    working = threading.Thread(target=run, name="sage-ray", daemon=True)
    working.start()
    working.join(bound_s)
    return not working.is_alive()


def is_connected() -> bool:
    """Return whether this process is connected to Ray, which it cannot be before it has imported it."""
    ray = sys.modules.get("ray")
    return ray is not None and hasattr(ray, "is_initialized") and bool(ray.is_initialized())


def starts_own(address: str | None) -> bool:
    """Return whether a connection to this address means to start a Ray of this process's own."""
    return address is None and not _is_submitted() and not is_connected()


def _is_submitted() -> bool:
    """Return whether `ray job submit` started this program, on a cluster that it was given thereby."""
    return SUBMITTED in os.environ and "RAY_ADDRESS" in os.environ


def allow_references() -> None:
    """Let references to objects of Ray be pickled as Ray itself does it, with their owner, wherever they are met.

    By a plain pickle the owner is lost, and whoever asks for the object waits forever.
    """
    ray = load("ray", "ray")
    copyreg.pickle(ray.ObjectRef, _reduced_reference)


def _reduced_reference(reference: object) -> tuple[Callable[..., object], tuple[object, ...]]:
    if not is_connected():
        raise TypeError("a reference to an object of Ray cannot be sent by a process that is not connected to it")
    reduced: tuple[Callable[..., object], tuple[object, ...]]
    reduced = load("ray.cloudpickle", "ray").CloudPickler.dispatch[type(reference)](reference)
    return reduced


def prepared(runtime_env: Mapping[str, object] | None) -> dict[str, object] | None:
    """Return the runtime environment for processes of a job, with local folders uploaded to the cluster.

    Ray itself does that for the environment of a whole connection only, which all jobs of this process share.

    Raises:
        GraphError: a folder or module that it names cannot be uploaded.
    """
    if not runtime_env:
        return None
    worker = load("ray._private.worker", "ray")
    known: dict[str, object] = dict(runtime_env)
    for name in ("working_dir", "py_modules"):
        place = known.get(name)
        if isinstance(place, os.PathLike):
            known[name] = os.fspath(place)
    folder = worker.global_worker.node.get_runtime_env_dir_path()
    has_gitignore = os.environ.get("RAY_RUNTIME_ENV_IGNORE_GITIGNORE", "0") != "1"
    try:
        for module, upload in (
            ("ray._private.runtime_env.py_modules", "upload_py_modules_if_needed"),
            ("ray._private.runtime_env.working_dir", "upload_working_dir_if_needed"),
        ):
            known = getattr(load(module, "ray"), upload)(known, include_gitignore=has_gitignore, scratch_dir=folder)
        known = worker.upload_worker_process_setup_hook_if_needed(known, worker.global_worker)
    except (OSError, RuntimeError, TypeError, ValueError) as error:
        raise GraphError(f"runtime_env cannot be prepared: {error}") from error
    known.pop("excludes", None)
    return known


@contextmanager
def _own_process_manners() -> Iterator[None]:
    """Undo Ray's changes to this process, its handler of SIGTERM and the dump of stacks, and keep it silent."""
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


def _cut_off() -> JobError:
    error = JobError("the program has ended the connection to Ray that a job still uses", fault="user")
    return hint(
        error, "Leave ray.shutdown() out, or call it when no job runs: a connection of SAGE's own ends by itself."
    )


def _unreachable(target: str, error: BaseException) -> ServerUnreachableError:
    return hint(
        ServerUnreachableError(f"no Ray cluster answers at {target}: {error}"),
        "Without an address, the program starts its own Ray.",
    )


def _refused(target: str, why: str) -> AuthenticationError:
    error = AuthenticationError(f"the Ray cluster at {target} wants a token, and {why}")
    return hint(error, f"Let {TOKEN_PATH} name the file with the token of that cluster, and set {MODE}=token.")
