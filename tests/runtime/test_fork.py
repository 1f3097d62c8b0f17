"""A program that forks while a job runs: the child has no part in the job."""

from __future__ import annotations

import subprocess
import sys
import textwrap
import time

PROGRAM = """
    import os, sys, threading
    from sage import JobError, LocalEnvironment

    class Store:
        def __init__(self, name):
            self.name = name

        def cleanup(self):
            print(f"{self.name} cleaned in {'child' if os.getpid() != parent else 'parent'}", flush=True)

    parent = os.getpid()
    go_on = threading.Event()
    keeping = LocalEnvironment("keeping")
    keeping.register_service("kept", Store, "kept")
    keeping.from_batch([1]).sink(lambda _: None)
    keeping.submit(autostop=True, keep_services=True)
    env = LocalEnvironment("forked")
    env.register_service("store", Store, "store")
    env.from_batch([1]).sink(lambda _: go_on.wait())
    job = env.submit()
    pid = os.fork()
    if pid == 0:
        print("running" if job.is_running else "not running", len(env.jobmanager.jobs), flush=True)
        env.stop()
        env.close()
        keeping.close()
        try:
            job.wait()
        except JobError as error:
            print(error, *error.__notes__, flush=True)
        sys.exit(0)
    print("child", os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), flush=True)
    go_on.set()
    print(job.wait().state, flush=True)
    keeping.close()
"""


def test_a_forked_child_does_not_own_the_job() -> None:
    began_at = time.monotonic()
    command = [sys.executable, "-W", "ignore:This process:DeprecationWarning", "-c", textwrap.dedent(PROGRAM)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=50)
    lines = done.stdout.splitlines()
    assert lines[0] == "not running 0", done.stderr
    assert lines[1].startswith('job "forked" runs in process ')
    assert lines[1].endswith("Only the process that submitted a job can wait for it.")
    assert lines[2:] == ["child 0", "store cleaned in parent", "completed", "kept cleaned in parent"]
    assert done.stderr == ""
    assert time.monotonic() - began_at < 20
