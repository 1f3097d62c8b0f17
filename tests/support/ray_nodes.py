"""Clusters that the code under test did not start: a head and more nodes, each with a raylet, on this machine."""

from __future__ import annotations

import json
import os
import secrets
import subprocess
import sys
import tempfile
from pathlib import Path
from shutil import rmtree
from typing import Any

from sage._processes import COOKIE_VARIABLE, Process, end_all, in_session, process, with_cookie

START_TIMEOUT_S = 120.0
STARTS_MAX = 3
HEALTH_CHECK = {"initial_delay_ms": "0", "period_ms": "500", "timeout_ms": "1000", "failure_threshold": "3"}


def known(pid: int) -> Process:
    found = process(pid)
    assert found is not None
    return found


class Node:
    """One node, with all its processes in one session."""

    def __init__(self, leader: Process, address: str) -> None:
        self.leader = leader
        self.address = address

    def processes(self) -> set[Process]:
        return in_session(self.leader)

    def process(self, program: str) -> Process:
        """Return the process of this node that runs a program, such as "raylet" or "gcs_server"."""
        named = {one for one in self.processes() if Path(f"/proc/{one.pid}/comm").read_text().strip() == program}
        (found,) = named
        return found


class GivenCluster:
    """A cluster with a token, in a folder that is as short as Ray needs it.

    Args:
        cpus_count: how many processors each node has.
        hosts: the addresses of the nodes.
        inside: for each node, the words that run a command where it is to be.

    Attributes:
        address: host and port of its head.
        token_path: the file of its token.
        nodes: the head, and the nodes that were added, in order.
    """

    def __init__(
        self,
        cpus_count: int = 2,
        hosts: tuple[str, ...] = ("127.0.1.1", "127.0.1.2"),
        inside: tuple[tuple[str, ...], ...] = ((), ()),
    ) -> None:
        self._cpus_count, self._hosts, self._inside = cpus_count, hosts, inside
        self.folder = Path(tempfile.mkdtemp(prefix="sr"))
        self.token = secrets.token_hex(16)
        self.token_path = self.folder / "token"
        self.token_path.touch(0o600)
        self.token_path.write_text(self.token)
        self.nodes: list[Node] = []
        self._cookie = secrets.token_hex(8)
        try:
            self._start("head", "--head", "--port", "0", "--include-dashboard", "false", "--no-monitor")
        except BaseException:
            self.end()
            raise
        self.address = (self.folder / "0" / "ray_current_cluster").read_text().strip()

    @property
    def variables(self) -> dict[str, str]:
        """What a driver has to have in its environment to be let in."""
        return {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": str(self.token_path)}

    def add_node(self) -> Node:
        """Start a second node, which has an address of its own."""
        # One log monitor serves all nodes of a machine.
        return self._start("second", "--address", self.address, "--include-log-monitor", "false")

    def remove(self, node: Node) -> None:
        """End a node that was added."""
        end_all(node.processes, 0.2)
        self.nodes.remove(node)
        rmtree(self.folder / str(len(self.nodes)))

    def processes(self) -> set[Process]:
        found = with_cookie(self._cookie)
        for node in self.nodes:
            found |= node.processes()
        return found

    def end(self) -> None:
        left = end_all(self.processes, 0.2).left
        rmtree(self.folder)
        assert not left

    def _start(self, resource: str, *words: str) -> Node:
        """Start a node, again if it is not up within the 30 s that Ray gives it."""
        for _ in range(STARTS_MAX):
            node, output = self._try("--resources", json.dumps({resource: 8}), *words)
            if output is None:
                self.nodes.append(node)
                return node
            end_all(node.processes, 0.2)
            rmtree(self.folder / str(len(self.nodes)), ignore_errors=True)
        raise AssertionError(output)

    def _try(self, *words: str) -> tuple[Node, str | None]:
        """Run `ray start`, and return the node and, if it failed, the output."""
        host, inside = self._hosts[len(self.nodes)], self._inside[len(self.nodes)]
        command: list[str] = [*inside, sys.executable, "-m", "ray.scripts.scripts", "start"]
        command += ["--node-ip-address", host, *words]
        command += ["--temp-dir", str(self.folder / str(len(self.nodes))), "--num-cpus", str(self._cpus_count)]
        command += ["--min-worker-port", "0", "--max-worker-port", "0", "--object-store-memory", "100000000"]
        command += ["--dashboard-agent-listen-port", "0", "--disable-usage-stats"]
        environment = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
        environment |= {f"RAY_health_check_{name}": value for name, value in HEALTH_CHECK.items()}
        environment |= {**self.variables, COOKIE_VARIABLE: self._cookie}
        pipes: dict[str, Any] = {"stdin": subprocess.DEVNULL, "stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
        with (self.folder / f"log{len(self.nodes)}").open("w+b") as output:
            pipes["stdout"] = output
            starting = subprocess.Popen(command, env=environment, cwd="/", start_new_session=True, **pipes)
            node = Node(known(starting.pid), host)
            try:
                code = starting.wait(START_TIMEOUT_S)
            except subprocess.TimeoutExpired:
                end_all(node.processes, 0.2)
                code = starting.wait()
            output.seek(0)
            return node, output.read().decode() if code else None
