"""A driver with services for the tests of the guardian: plain processes that speak its protocol, and strange ones.

Run as a program, it starts what its first argument (JSON) lists, says "ready" with all process ids, and obeys lines on
its standard input: "guardian", "claim <json>", "fork", "end".
"""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import textwrap
import threading
from contextlib import suppress
from typing import Any

from sage._guardian.job_journal import JobJournal
from sage._guardian.lease import GuardianLease
from sage._processes import COOKIE_VARIABLE
from sage.observability import Event

# What a service does: "good" obeys, the others are the ways in which a process can be hard to end.
CHILDREN = {
    "good": """
        import json, os, socket, sys
        line = socket.socket(fileno=int(sys.argv[1]))
        print("up", flush=True)
        data = line.recv(1000)
        with open(sys.argv[2], "a") as file:
            file.write(sys.argv[3] + (" stop" if data and json.loads(data)["stop"] > 0 else " alone") + chr(10))
        if data:
            line.send(json.dumps({"stopped": True, "errors": []}).encode() + b"\\n")
    """,
    "meets": """
        import json, os, socket, sys
        line = socket.socket(fileno=int(sys.argv[1]))
        print("up", flush=True)
        line.recv(1000)
        # Opening a pipe by name waits for the other one, which must have been asked to stop too.
        with open(sys.argv[2] + ".pipe", "w" if sys.argv[3] == "writer" else "r"):
            pass
        line.send(json.dumps({"stopped": True, "errors": []}).encode() + b"\\n")
    """,
    "raises": """
        import json, os, socket, sys
        line = socket.socket(fileno=int(sys.argv[1]))
        print("up", flush=True)
        line.recv(1000)
        line.send(json.dumps({"stopped": False, "errors": ["OSError: disk full"]}).encode() + b"\\n")
    """,
    "hangs": """
        import signal
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        print("up", flush=True)
        while True:
            signal.pause()
    """,
    "stopped": """
        import json, os, signal, socket, sys
        line = socket.socket(fileno=int(sys.argv[1]))
        print("up", flush=True)
        os.kill(os.getpid(), signal.SIGSTOP)
        line.recv(1000)
        line.send(json.dumps({"stopped": True, "errors": []}).encode() + b"\\n")
    """,
    "family": """
        import json, os, signal, socket, subprocess, sys, time
        line = socket.socket(fileno=int(sys.argv[1]))
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        sleeper = [sys.executable, "-c", "import signal; signal.pause()"]
        own_session = subprocess.Popen(sleeper, start_new_session=True)  # ignores SIGTERM by inheritance
        stopped = subprocess.Popen(sleeper)
        os.kill(stopped.pid, signal.SIGSTOP)
        read, write = os.pipe()
        if os.fork() == 0:
            os.setsid()
            if os.fork() == 0:
                os.write(write, str(os.getpid()).encode())
                while True:
                    signal.pause()
            os._exit(0)
        os.wait()
        orphan = int(os.read(read, 20))
        print("up", own_session.pid, stopped.pid, orphan, flush=True)
        line.recv(1000)
        line.send(json.dumps({"stopped": True, "errors": []}).encode() + b"\\n")
        os._exit(0)
    """,
    "cleared": """
        import json, os, socket, subprocess, sys
        line = socket.socket(fileno=int(sys.argv[1]))
        # What threw its environment away is known by its parent only, as is what that started.
        sleeper = [sys.executable, "-c", "import signal; signal.pause()"]
        starts = "import subprocess, sys; print(subprocess.Popen(sys.argv[1:]).pid, flush=True); sys.stdin.read()"
        cleared = subprocess.Popen(
            [sys.executable, "-c", starts, *sleeper],
            env={}, start_new_session=True, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
        )
        print("up", cleared.pid, cleared.stdout.readline().strip(), flush=True)
        line.recv(1000)
        line.send(json.dumps({"stopped": True, "errors": []}).encode() + b"\\n")
        os._exit(0)
    """,
}


class Doom:
    """Kills this process as the step of the given number is reached, counted from 1; 0 stands for never.

    With `guard`, its guardian is killed first.
    """

    def __init__(self, step: int, guard: GuardianLease | None) -> None:
        self.left = step
        self.guard = guard

    def step(self) -> None:
        self.left -= 1
        if self.left == 0:
            if self.guard is not None:
                os.kill(self.guard.guardian_pid, signal.SIGKILL)
            os.kill(os.getpid(), signal.SIGKILL)


def start_service(
    job: JobJournal, spec: dict[str, Any], marks: str, doom: Doom
) -> tuple[subprocess.Popen[str], list[int]]:
    """Start one service as its host would, and return it with the process ids that it tells of."""
    cookie = job.announce(spec["name"], 1, "process", spec.get("requires", []))
    doom.step()
    own, theirs = socket.socketpair()
    program = textwrap.dedent(CHILDREN[spec["kind"]])
    child = subprocess.Popen(
        [sys.executable, "-c", program, str(theirs.fileno()), marks, spec["name"]],
        env={**os.environ, COOKIE_VARIABLE: cookie},
        pass_fds=[theirs.fileno()],
        start_new_session=True,
        stdout=subprocess.PIPE,
        text=True,
    )
    theirs.close()
    doom.step()
    job.started(spec["name"], 1, child.pid, own.detach())
    doom.step()
    assert child.stdout is not None
    return child, [int(word) for word in child.stdout.readline().split()[1:]]


def fill(path: str) -> None:
    """Leave no byte of room on the disk of `path`."""
    with open(path, "wb", buffering=0) as file, suppress(OSError):
        while True:
            file.write(b"x")


def main() -> None:
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    order = json.loads(sys.argv[1])
    job = JobJournal("job-1", "demo", order.get("report"), ())
    guard = GuardianLease.acquire()
    doom = Doom(order.get("dies_at", 0), guard if order.get("with_guardian") else None)
    if doom.left:
        print(json.dumps({"cookie": guard.cookie, "folder": guard.folder}), flush=True)
    doom.step()
    pids, children = [], []
    for spec in order["services"]:
        if spec["kind"] == "full":
            fill(spec["path"])
            for _ in range(10):  # the journal's last page on the disk has room
                guard.note({"entry": "sealed", "job": "another", "padding": "x" * 500})
            continue
        child, others = start_service(job, spec, order["marks"], doom)
        children.append(child)
        pids += [child.pid, *others]
        job.note(Event(0.0, "service", spec["name"], "starting", "ready"))
    for service, claim in order.get("claims", []):
        job.claim(service, {key: pids[-1] if value == "last pid" else value for key, value in claim.items()})
    print(json.dumps({"pids": pids, "guardian": guard.guardian_pid, "folder": guard.folder}), flush=True)
    for line in sys.stdin:
        word = line.strip()
        if word == "guardian":
            print(json.dumps({"guardian": guard.guardian_pid}), flush=True)
        elif word.startswith("claim "):
            service, claim = json.loads(word.removeprefix("claim "))
            job.claim(service, claim)
            print(json.dumps({"claimed": service}), flush=True)
        elif word == "fork":
            read, write = os.pipe()
            pid = os.fork()
            if pid == 0:
                os.close(read)
                os.write(write, b"x")
                threading.Event().wait()
            os.read(read, 1)
            print(json.dumps({"fork": pid}), flush=True)
        elif word == "end":
            for child in children:
                child.kill()
                child.wait()
                assert child.stdout is not None
                child.stdout.close()
                job.ended(order["services"][children.index(child)]["name"], 1)
            job.sealed()
            guard.release()
            print(json.dumps({"ended": threading.active_count()}), flush=True)


if __name__ == "__main__":
    main()
