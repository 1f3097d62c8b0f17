"""Drivers in processes of their own, for the tests of what happens to what they started; see `hosts/guarded.py`."""

from __future__ import annotations

import json
import os
import select
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from sage._processes import Process, is_alive, process, send, watch

PROGRAM = Path(__file__).parents[1] / "hosts" / "guarded.py"
WAIT_S = 30.0

CHAIN = [
    {"name": "c", "kind": "good"},
    {"name": "b", "kind": "good", "requires": ["c"]},
    {"name": "a", "kind": "good", "requires": ["b"]},
]


class Running:
    """A driver that runs in a process of its own."""

    def __init__(self, folder: Path, order: dict[str, Any], environment: dict[str, str]) -> None:
        self.marks = folder / "marks"
        self.marks.touch()
        self.state = Path(environment["SAGE_STATE_DIR"])
        words = [sys.executable, str(PROGRAM), json.dumps({**order, "marks": str(self.marks)})]
        self.program = subprocess.Popen(
            words, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, start_new_session=True
        )
        ready = self.read()
        self.pids: list[int] = ready["pids"]
        self.processes = [one for pid in self.pids if (one := process(pid)) is not None]
        self.guardian = known(ready["guardian"])
        self.folder = Path(ready["folder"])
        assert len(self.processes) == len(self.pids)

    def read(self) -> dict[str, Any]:
        assert self.program.stdout is not None
        answer: dict[str, Any] = json.loads(self.program.stdout.readline())
        return answer

    def ask(self, word: str) -> dict[str, Any]:
        assert self.program.stdin is not None
        self.program.stdin.write(word + "\n")
        self.program.stdin.flush()
        return self.read()

    def kill(self) -> None:
        self.program.kill()
        self.program.wait()

    def kill_and_wait(self) -> float:
        """Kill the driver, and return how long its guardian had to do, in seconds."""
        began_at = time.monotonic()
        self.kill()
        wait_end(self.guardian)
        return time.monotonic() - began_at

    def report(self) -> dict[str, Any]:
        report: dict[str, Any] = json.loads((self.state / "reports" / "job-1.json").read_text())
        return report

    def ends(self) -> dict[str, str]:
        return {service["name"]: service["state"] for service in self.report()["services"]}

    def alive(self) -> list[int]:
        return [one.pid for one in self.processes if is_alive(one)]

    def close(self) -> None:
        self.program.kill()
        self.program.wait()
        for stream in (self.program.stdin, self.program.stdout):
            assert stream is not None
            stream.close()
        wait_end(self.guardian)
        for one in self.processes:
            send(one, signal.SIGKILL)


def known(pid: int) -> Process:
    found = process(pid)
    assert found is not None
    return found


def wait_end(one: Process) -> None:
    descriptor = watch(one)
    if descriptor is not None:
        poll = select.poll()
        poll.register(descriptor, select.POLLIN)
        ended = poll.poll(WAIT_S * 1000)
        os.close(descriptor)
        assert ended, f"process {one.pid} has not ended within {WAIT_S} s"


def stale(running: Running) -> None:
    """Kill driver and guardian at the same moment, as far as that can be done."""
    send(known(running.program.pid), signal.SIGSTOP)
    send(running.guardian, signal.SIGKILL)
    wait_end(running.guardian)
    running.kill()


def wait_gone(path: Path) -> None:
    due = time.monotonic() + WAIT_S
    while path.exists():
        assert time.monotonic() < due, f"{path} is still there"
        time.sleep(0.01)
