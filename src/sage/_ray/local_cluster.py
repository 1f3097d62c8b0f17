"""A Ray of the driver's own: one node that is started beside it, guarded, and ended with all that it started."""

from __future__ import annotations

import importlib.util
import itertools
import os
import secrets
import shutil
import socket
import subprocess
import sys
from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING

from sage._extras import MissingExtraError
from sage._guardian.journal import Run, entry
from sage._guardian.lease import GuardianLease
from sage._logs import log_of
from sage._processes import COOKIE_VARIABLE, end_all, in_session, process, with_cookie, with_descendants
from sage.errors import CleanupError, JobError, hint

if TYPE_CHECKING:
    from sage._processes import Process

log = log_of("sage.cluster")

RAY_MIN, RAY_BELOW = (2, 52), (3, 0)
"""The versions that are supported; earlier ones have no token, and let in whoever reaches the machine."""

NODE_ADDRESS = "127.0.0.2"
"""Ray takes any address but 127.0.0.1, which it replaces by the machine's own: others can reach that one, and it
changes when the machine changes its network."""

START_TIMEOUT_S = 120.0
"""It takes ten seconds on an idle machine of two cores."""

STARTS_MAX = 3
"""Ray itself gives its raylet 30 s, which is not enough on a machine that others keep busy just then."""

END_GRACE_S = 0.5
"""The jobs are over, and of Ray itself the GCS waits for as long as it is let for the raylet, which has gone."""

SOCKET_PATH_BYTES_MAX = 107
SOCKET_PATH = "session_2000-01-01_00-00-00_000000_0000000/sockets/plasma_store"
"""The suffix that Ray adds to its folder for the longest of its sockets."""

INNER = "t"
SHORT_ROOTS = ("/tmp", "/var/tmp")

OUTPUT_CHARS_MAX = 2_000

HEALTH_CHECK = {"initial_delay_ms": "0", "period_ms": "500", "timeout_ms": "1000", "failure_threshold": "3"}
"""With Ray's own values a node that hangs is noticed after a minute, with these after four seconds."""

FOREIGN = ("RAY_ADDRESS", "RAY_AUTH_TOKEN", "RAY_REDIS_ADDRESS", "RAY_START_HOOK")
"""Variables that would lead a new cluster to another one, or let it have another token."""

_numbers = itertools.count(1)


def check_ray() -> str:
    """Return the version of Ray that is installed, without importing it.

    Raises:
        MissingExtraError: Ray is not installed, or another version is needed.
    """
    try:
        found = version("ray")
    except PackageNotFoundError:
        error = MissingExtraError('module "ray" is not installed', fault="user")
        raise hint(error, 'Install it with: pip install "sage-dataflow[ray]"') from None
    if not RAY_MIN <= tuple(int(part) for part in found.split(".")[:2]) < RAY_BELOW:
        needed = f"{'.'.join(map(str, RAY_MIN))} or later, before {RAY_BELOW[0]}"
        error = MissingExtraError(f'module "ray" has version {found}, needed is {needed}', fault="user")
        raise hint(error, 'Install it with: pip install "sage-dataflow[ray]"')
    return found


class LocalRay:
    """A running Ray of one node, which nobody else finds or can enter. Whoever started it calls `end` once.

    If this process dies before, its guardian ends it, after the jobs that have a file in the folder `jobs`.

    Attributes:
        address: where a driver connects.
        run_folder: the folder of this process's run.
        folder: its private folder, removed in the end; in that of the run, unless that has too long a name.
        token_path: the file of its token, in that folder.
        jobs: the folder, in that one, for files of jobs that end themselves when this process dies.
        cookie: carried by its processes, except those that overwrite their environment.
    """

    address: str

    def __init__(self) -> None:
        """Start it, which takes seconds.

        Raises:
            MissingExtraError: Ray is not installed, or not in a supported version.
            JobError: it cannot be started.
            ServiceError: the run's folder cannot be made, or is not safe from others.
        """
        check_ray()
        self._guard = GuardianLease.acquire()
        self._leader: Process | None = None
        self._token = self._guard.new_token()
        self.cookie = ":".join(filter(None, [os.environ.get(COOKIE_VARIABLE), self._guard.cookie, self._token]))
        self.run_folder = self._guard.folder
        self.folder = _short(os.path.join(self.run_folder, f"r{next(_numbers)}"))
        self.token_path = os.path.join(self.folder, "token")
        self.jobs = os.path.join(self.folder, "jobs")
        try:
            self._guard.note(entry(Run.take_cluster, self._token, self.jobs))
            self._make_folder()
            self._start()
            with open(os.path.join(self.temporary_folder, "ray_current_cluster"), encoding="ascii") as file:
                self.address = file.read().strip()
        except BaseException:
            self.end()
            raise
        log.info("cluster started address=%s folder=%s", self.address, self.folder)

    @property
    def temporary_folder(self) -> str:
        """Where Ray keeps its sockets and logs: below the private folder, as Ray opens its own to everybody."""
        return os.path.join(self.folder, INNER)

    def processes(self) -> set[Process]:
        """Return the processes that come from it, without those that were released."""
        found = with_cookie(self._token)
        if self._leader is not None:
            # Ray's agents overwrite their environment, where the cookie is, but stay in the session.
            found |= in_session(self._leader)
        return found - with_descendants(self._guard.released(), found)

    def end(self) -> None:
        """End it with everything that it started, and remove its folder.

        Raises:
            CleanupError: something is still there; it is left to the guardian and to `sage gc`.
        """
        try:
            left = end_all(self.processes, END_GRACE_S).left
            shutil.rmtree(self.folder, ignore_errors=True)
            if left:
                pids = ", ".join(str(one.pid) for one in sorted(left))
                raise CleanupError(f"processes {pids} of the local Ray cannot be ended", fault="external")
            self._guard.note(entry(Run.take_cluster_ended, self._token))
        finally:
            self._guard.release()

    # --- behind it ---

    def _make_folder(self) -> None:
        try:
            os.mkdir(self.folder, 0o700)
        except OSError as error:
            refused = JobError(f"the folder of the local Ray cannot be made: {error}", fault="external")
            raise hint(refused, "Let TMPDIR name another folder for temporary files, with a short name.") from error
        os.mkdir(self.jobs, 0o700)
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW
        with open(os.open(self.token_path, flags, 0o600), "w", encoding="ascii") as file:
            file.write(secrets.token_hex(32))

    def _command(self) -> list[str]:
        command = [sys.executable, "-m", "ray.scripts.scripts", "start", "--head"]
        command += ["--node-ip-address", NODE_ADDRESS, "--port", "0", "--temp-dir", self.temporary_folder]
        command += ["--num-cpus", str(os.cpu_count() or 1)]
        # Ports from a fixed range would be those of another Ray on this machine; 0 stands for any that is free.
        command += ["--min-worker-port", "0", "--max-worker-port", "0", "--dashboard-agent-listen-port", "0"]
        command += ["--include-dashboard", "false", "--disable-usage-stats", "--no-monitor", "--log-style", "record"]
        if importlib.util.find_spec("grpc") is not None:
            # Where it can, Ray starts a server for clients that want a port of their own, and takes 0 for an error.
            command += ["--ray-client-server-port", str(_free_port())]
        return command

    def _environment(self) -> dict[str, str]:
        environment = {f"RAY_health_check_{name}": value for name, value in HEALTH_CHECK.items()}
        environment |= {name: value for name, value in os.environ.items() if name not in FOREIGN}
        environment |= {
            "RAY_AUTH_MODE": "token",
            "RAY_AUTH_TOKEN_PATH": self.token_path,
            "RAY_USAGE_STATS_ENABLED": "0",
        }
        return environment | {COOKIE_VARIABLE: self.cookie}

    def _start(self) -> None:
        """Run `ray start`, again if it fails.

        Raises:
            JobError: it failed each time, or took too long.
        """
        path = os.path.join(self.folder, "start.log")
        for tries_left in reversed(range(STARTS_MAX)):
            code = self._run(self._command(), self._environment(), path)
            if code == 0:
                return
            why = f"was not up after {START_TIMEOUT_S:g} s" if code is None else f"exited with code {code}"
            error = JobError(f"the local Ray cannot be started: ray start {why}", fault="external")
            if code is None or not tries_left or end_all(self.processes, END_GRACE_S).left:
                raise hint(error, _last(path))
            log.warning("cluster not started, trying again error=%s", error)
            shutil.rmtree(self.temporary_folder, ignore_errors=True)

    def _run(self, command: list[str], environment: dict[str, str], path: str) -> int | None:
        """Run `ray start`, which leaves the cluster behind in a session of its own when it is up.

        Returns:
            The exit code, or None if it took too long.
        """
        with open(path, "w+b") as output:
            try:
                starting = subprocess.Popen(
                    command,
                    env=environment,
                    cwd="/",
                    stdin=subprocess.DEVNULL,
                    stdout=output,
                    stderr=output,
                    start_new_session=True,
                )
            except OSError as error:
                raise JobError(f"the local Ray cannot be started: {error}", fault="external") from error
        # Nobody waits for it yet, so that the pid is its own even if it has ended already.
        self._leader = process(starting.pid)
        try:
            if self._leader is not None:
                self._guard.note(entry(Run.take_cluster_started, self._token, *self._leader))
            return starting.wait(START_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            return None
        finally:
            if starting.returncode is None:
                starting.kill()
                starting.wait()


def _short(folder: str) -> str:
    """Return a folder, or one of this run's own elsewhere if its name is too long for the sockets of Ray."""
    if len(os.fsencode(os.path.join(folder, INNER, SOCKET_PATH))) <= SOCKET_PATH_BYTES_MAX:
        return folder
    root = next((root for root in SHORT_ROOTS if os.access(root, os.W_OK | os.X_OK)), SHORT_ROOTS[0])
    return os.path.join(root, f"sage-ray-{secrets.token_hex(6)}")


def _free_port() -> int:
    with socket.socket() as one:
        one.bind((NODE_ADDRESS, 0))
        port: int = one.getsockname()[1]
        return port


def _last(path: str) -> str:
    with open(path, encoding="utf-8", errors="replace") as file:
        return f"The end of its output:\n{file.read()[-OUTPUT_CHARS_MAX:].strip()}"
