"""An object store of the tests' own, which speaks the protocol of S3, with a folder in it for each of theirs."""

from __future__ import annotations

import os
import sys
import urllib.request
from importlib.util import find_spec
from typing import TYPE_CHECKING

import pytest
from support.running_job import RunningJob

from sage import LocalEnvironment, Port

if TYPE_CHECKING:
    from pathlib import Path

BUCKET = "s3://tests"
SECRET = "open/sesame-7@8"

needs_objects = pytest.mark.skipif(
    find_spec("obstore") is None or find_spec("moto") is None, reason="obstore or moto is not installed"
)


class ObjectServer:
    """A server, which the environment variables of this process lead to."""

    def __init__(self) -> None:
        env = LocalEnvironment("objects")
        words = [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", "{port}"]
        command = env.register_command("objects", words, ready=Port())
        self._job = RunningJob(env)
        self.address = f"http://127.0.0.1:{command.port}"
        self.variables = {
            "AWS_ENDPOINT_URL": self.address,
            "AWS_REGION": "us-east-1",
            "AWS_ACCESS_KEY_ID": "tests",
            "AWS_SECRET_ACCESS_KEY": SECRET,
        }
        os.environ.update(self.variables)
        self._folders: dict[Path, str] = {}
        bucket = urllib.request.Request(f"{self.address}/tests", data=b"", method="PUT")
        with urllib.request.urlopen(bucket) as answer:
            answer.read()

    def url(self, folder: Path) -> str:
        """Return the address of the folder's objects."""
        return f"{BUCKET}/{self._folders.setdefault(folder, str(len(self._folders)))}"

    def copy(self, folder: Path, other: Path) -> None:
        """Let another folder have the same objects."""
        from obstore.store import from_url

        store = from_url(BUCKET, client_options={"allow_http": True})
        old, new = (self.url(given).removeprefix(f"{BUCKET}/") for given in (folder, other))
        for page in store.list(old):
            for entry in page:
                store.copy(entry["path"], entry["path"].replace(old, new, 1))

    def close(self) -> None:
        """Stop it."""
        for name in self.variables:
            del os.environ[name]
        self._job.close()


_running: list[ObjectServer] = []


def objects() -> ObjectServer:
    """Return the server, which is started by the first who asks."""
    if not _running:
        _running.append(ObjectServer())
    return _running[0]


def stop() -> None:
    """Stop the server if anybody has started it."""
    while _running:
        _running.pop().close()
