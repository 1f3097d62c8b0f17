"""The actions of the command `sage cluster` on the warm Ray of this machine."""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypedDict

from sage._extras import load
from sage._guardian.journal import make_private
from sage._guardian.lease import runs_folder
from sage._ray.connection import cluster
from sage._ray.kept_cluster import WARM, kept_cluster
from sage._ray.local_cluster import check_ray
from sage.errors import ControlError, hint

if TYPE_CHECKING:
    from collections.abc import Iterator

    from sage._ray.kept_cluster import KeptCluster

GIB = 2**30


@dataclass(frozen=True, slots=True)
class Facts:
    """The state of the warm Ray: its live nodes, its total and its free resources."""

    warm: KeptCluster
    nodes: tuple[str, ...]
    total: dict[str, float]
    free: dict[str, float]

    def lines(self) -> Iterator[tuple[str, str]]:
        """Yield names and texts for a person."""
        yield "address", self.warm.address
        yield "nodes", f"{len(self.nodes)}: {', '.join(self.nodes)}"
        yield "CPUs", f"{self.total.get('CPU', 0):g}, {self.free.get('CPU', 0):g} free"
        for name, key in (("memory", "memory"), ("objects", "object_store_memory")):
            yield name, f"{self.total.get(key, 0) / GIB:.1f} GiB, {self.free.get(key, 0) / GIB:.1f} GiB free"
        began = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(self.warm.began_at))
        yield "since", f"{began}, kept by process {self.warm.keeper.pid}"
        yield "folder", self.warm.folder


class Answer(TypedDict, total=False):
    """What the process that keeps a Ray says once it is up, or cannot come up."""

    address: str
    error: str
    notes: list[str]


def start_kept_cluster() -> str:
    """Start the process that keeps a Ray, and return the address as soon as it is up."""
    check_ray()
    make_private(runs_folder())
    with tempfile.TemporaryFile() as output:
        keeper = subprocess.Popen(
            [sys.executable, "-m", "sage._ray.kept_cluster"],
            cwd="/",
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=output,
            start_new_session=True,
        )
        assert keeper.stdout is not None
        try:
            with keeper.stdout:
                line = keeper.stdout.readline()
        except BaseException:
            keeper.terminate()  # it ends the Ray that it has started
            keeper.wait()
            raise
        if not line:
            error = ControlError(f"the process that keeps the cluster ended with code {keeper.wait()}")
            output.seek(0)
            raise hint(error, output.read().decode(errors="replace").strip())
    answer: Answer = json.loads(line)
    if "error" in answer:
        keeper.wait()
        failed = ControlError(answer["error"])
        for note in answer["notes"]:
            failed.add_note(note)
        raise failed
    keeper.returncode = 0  # it stays, and is nobody's child from now on
    return answer["address"]


def facts() -> Facts | None:
    """Return the description of the warm Ray, or None if there is not one."""
    warm = kept_cluster()
    if warm is None:
        return None
    with cluster(WARM):
        ray = load("ray", "ray")
        nodes = tuple(node["NodeManagerAddress"] for node in ray.nodes() if node["Alive"])
        return Facts(warm, nodes, ray.cluster_resources(), ray.available_resources())
