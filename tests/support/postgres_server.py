"""A PostgreSQL server of the tests' own, and a schema in it for each folder."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import tempfile
import threading
import time
from contextlib import closing
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from support.running_job import RunningJob

from sage import Line, LocalEnvironment, ServiceOptions

if TYPE_CHECKING:
    from sage import RunningCommand

FOLDERS = sorted(Path("/usr/lib/postgresql").glob("*/bin"), key=lambda path: float(path.parent.name))
INITDB = shutil.which("initdb", path=os.pathsep.join([os.environ["PATH"], *map(str, FOLDERS[-1:])]))
AS_USER = ["setpriv", "--reuid=postgres", "--regid=postgres", "--clear-groups"] if os.getuid() == 0 else []
"""The server refuses to run as root."""
PASSWORD = "open/sesame: 7@8%"
IN_ADDRESS = "open%2Fsesame%3A%207%408%25"
SOON_S = 20.0

needs_postgres = pytest.mark.skipif(
    INITDB is None or find_spec("psycopg") is None, reason="PostgreSQL or the package psycopg is not installed"
)


class PostgresServer:
    """A server that is a command service of a job, which starts it again after a kill."""

    def __init__(self) -> None:
        assert INITDB is not None
        memory = Path("/dev/shm")
        self._folder = tempfile.mkdtemp(prefix="postgres-", dir=memory if memory.is_dir() else "/tmp")
        if AS_USER:
            shutil.chown(self._folder, "postgres", "postgres")
        data = f"{self._folder}/data"
        words = [INITDB, "-D", data, "-U", "postgres", "-A", "trust", "-N", "-E", "UTF8", "--locale=C"]
        subprocess.run([*AS_USER, *words], check=True, stdout=subprocess.DEVNULL, timeout=60, cwd="/")
        rules = Path(data, "pg_hba.conf")
        rules.write_text("host all sage 127.0.0.1/32 scram-sha-256\nhost all postgres 127.0.0.1/32 trust\n")
        self._env = LocalEnvironment("postgres")
        settings = ("listen_addresses=127.0.0.1", "unix_socket_directories=", "fsync=off", "max_connections=50")
        self._command: RunningCommand = self._env.register_command(
            "postgres",
            [
                *(*AS_USER, str(Path(INITDB).with_name("postgres")), "-D", data, "-p", "{port}"),
                *(word for setting in settings for word in ("-c", setting)),
            ],
            ready=Line("database system is ready to accept connections"),
            cwd="/",
            stop_signal=signal.SIGINT,
            options=ServiceOptions(restart="on_failure", restarts_max=1_000, backoff_s=(0.1, 0.2)),
        )
        self._job = RunningJob(self._env)
        self.port = int(self._command.port)
        self._schemas: dict[Path, str] = {}
        self.execute(f"CREATE ROLE sage LOGIN PASSWORD '{PASSWORD}'", database="postgres")
        self.execute("CREATE DATABASE shop OWNER sage", database="postgres")

    def execute(self, command: str, *values: object, database: str = "shop") -> list[tuple[object, ...]]:
        """Run a command as the server's own user."""
        return execute(f"host=127.0.0.1 port={self.port} user=postgres dbname={database}", command, *values)

    def address(self, folder: Path, user: str = f"sage:{IN_ADDRESS}") -> str:
        """Return the address of the folder's schema."""
        if folder not in self._schemas:
            self._schemas[folder] = f"s{len(self._schemas)}"
            self.execute(f"CREATE SCHEMA {self._schemas[folder]} AUTHORIZATION sage")
        schema = self._schemas[folder]
        return f"postgresql://{user}@127.0.0.1:{self.port}/shop?options=-csearch_path%3D{schema}"

    def share(self, folder: Path, other: Path) -> None:
        """Let another folder have the schema of a folder, too."""
        self._schemas[other] = self._schemas[folder]

    def kill(self) -> None:
        """Kill it, as a lack of memory does."""
        os.kill(self._command.pid, signal.SIGKILL)

    def wait(self) -> None:
        """Wait until it can be reached."""
        import psycopg

        due = time.monotonic() + SOON_S
        while True:
            try:
                self.execute("SELECT 1")
            except psycopg.OperationalError:
                assert time.monotonic() < due, "the server did not come back in time"
                threading.Event().wait(0.02)
            else:
                return

    def close(self) -> None:
        """Stop it."""
        self._job.close()
        shutil.rmtree(self._folder)


def execute(address: str, command: str, *values: object) -> list[tuple[object, ...]]:
    """Run a command, and return the rows that it finds."""
    import psycopg

    with closing(psycopg.connect(address, autocommit=True, cursor_factory=psycopg.RawCursor)) as connection:
        found = connection.execute(command.encode(), values)
        return found.fetchall() if found.description else []


_running: list[PostgresServer] = []


def server() -> PostgresServer:
    """Return the server, which is started by the first who asks."""
    if not _running:
        _running.append(PostgresServer())
    return _running[0]


def stop() -> None:
    """Stop the server if anybody has started it."""
    while _running:
        _running.pop().close()
