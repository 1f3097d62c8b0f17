"""Removes the things that a lost service had declared."""

from __future__ import annotations

import json
import os
import shutil
import stat
import subprocess
from typing import TYPE_CHECKING

from sage._processes import COOKIE_VARIABLE, GUARDIAN_VARIABLE, Process, end_all, is_alive, process

if TYPE_CHECKING:
    from collections.abc import Iterable

    from sage._guardian.journal import Claim, Entry, Run, ServiceLine

ON_LOST_TIMEOUT_S = 10.0
OUTPUT_CHARS_MAX = 2_000

SHARED = ("/var/tmp", "/dev/shm", "/run")
"""Like the user's home and the folder of temporary files, these and all above them belong to no service."""

# The fresh process finds modules where the driver found them; its own path would be that of an isolated interpreter.
ON_LOST = """\
import importlib, json, sys
order = json.loads(sys.argv[1])
sys.path[:] = order["path"]
module, _, name = order["function"].partition(":")
target = importlib.import_module(module)
for part in name.split("."):
    target = getattr(target, part)
target(*order["args"])
"""


def checked(entry: Entry) -> Entry:
    """Return a claim as it is written: complete, and safe to act upon after the process that made it has gone.

    Raises:
        ValueError: it could never be carried out, or would remove things of others.
    """
    match entry["claim"]:
        case "path":
            path = os.path.abspath(os.fspath(entry["path"]))
            path = os.path.join(os.path.realpath(os.path.dirname(path)), os.path.basename(path))
            _refuse_wide(path)
            return {**entry, "path": path}
        case "process" | "release":
            if entry["pid"] in (1, os.getpid(), os.getppid()):
                raise ValueError(f"process {entry['pid']} is not one that a service started")
            found = process(entry["pid"])
            if found is None:
                raise ValueError(f"process {entry['pid']} does not exist, so it can be neither owned nor released")
            return {**entry, "started": found.started}
        case "call":
            return {**entry, "args": _checked_args(entry["function"], entry["args"])}
        case other:
            raise ValueError(f"a claim is a path, process, call or release, not {other!r}")


def reap(run: Run, service: str, claims: Iterable[Claim]) -> list[str]:
    """Act on the claims of a service, in this order, and return the failures.

    It may run again for the same claims after whoever ran it was killed.
    """
    errors = []
    for claim in claims:
        problem = _carry_out(run, claim)
        if problem is not None:
            errors.append(f'service "{service}": {claim.claim}: {problem}')
    return errors


def owned_processes(services: Iterable[ServiceLine]) -> set[Process]:
    """Return the processes that services own by a claim that is due, and that still run."""
    claims = (claim for service in services for claim in service.claims_due() if claim.claim == "process")
    owned = {Process(claim.pid, claim.started) for claim in claims}
    return {one for one in owned if is_alive(one)}


def remove(path: str) -> None:
    """Remove a file, a link or a whole folder; a link is removed and never followed.

    Raises:
        OSError: it could not be removed, or the way to it leads through a link that was not there before.
        ValueError: no single service can own it.
    """
    _refuse_wide(path)
    parent = os.path.dirname(path)
    if os.path.realpath(parent) != parent:
        raise PermissionError(f"{parent} has become a link since {path} was claimed")
    try:
        found = os.lstat(path)
    except FileNotFoundError:
        return
    if stat.S_ISDIR(found.st_mode):
        shutil.rmtree(path)
    else:
        os.unlink(path)


def run_on_lost(run: Run, function: str, args: object) -> None:
    """Call a function in a fresh process.

    Raises:
        OSError: it could not be started, or failed; the end of its output is the text.
        subprocess.TimeoutExpired: it took longer than `ON_LOST_TIMEOUT_S`; it was killed.
    """
    order = json.dumps({"function": function, "args": args, "path": list(run.path)})
    environment = {**os.environ, COOKIE_VARIABLE: run.cookie}
    environment.pop(GUARDIAN_VARIABLE, None)
    folder = run.folder if os.path.isdir(run.folder) else "/"
    # Output goes to memory that needs no disk; through a pipe, a child of its own that lives on would be waited for.
    with open(os.memfd_create("on_lost"), "w+b") as output:
        done = subprocess.run(
            [run.python, "-c", ON_LOST, order],
            env=environment,
            cwd=folder,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
            timeout=ON_LOST_TIMEOUT_S,
            start_new_session=True,
        )
        if done.returncode:
            output.seek(0)
            text = output.read().decode(errors="replace")[-OUTPUT_CHARS_MAX:].strip()
            raise OSError(f"{function} ended with {done.returncode}: {text}")


def _carry_out(run: Run, claim: Claim) -> str | None:
    try:
        match claim.claim:
            case "path":
                remove(claim.path)
            case "process":
                one = Process(claim.pid, claim.started)
                if end_all(lambda: {one} if is_alive(one) else set()).left:
                    return f"process {one.pid} cannot be ended"
            case "call":
                run_on_lost(run, claim.function, claim.args)
    except (OSError, ValueError, subprocess.TimeoutExpired) as error:
        return f"{type(error).__name__}: {error}"
    return None


def _refuse_wide(path: str) -> None:
    shared = [os.path.realpath(other) for other in (os.path.expanduser("~"), os.environ.get("TMPDIR", "/tmp"), *SHARED)]
    is_wide = any(os.path.commonpath([path, other]) == path for other in shared)
    if is_wide or os.path.dirname(path) == "/":
        error = ValueError(f"path {path!r} cannot belong to one service")
        error.add_note("It would be removed with everything in it; name what the service itself makes.")
        raise error


def _checked_args(function: str, args: object) -> object:
    module, colon, name = function.partition(":")
    if not (module and colon and name):
        raise ValueError(f'on_lost is given "module:function", not {function!r}')
    if module == "__main__":
        error = ValueError(f"on_lost cannot call {name} of the program that is run, which no other process can import")
        error.add_note("Put the function into a module of its own.")
        raise error
    if not isinstance(args, list | tuple):
        raise ValueError(f"the arguments for {function} are a list, not {type(args).__name__}")
    try:
        return json.loads(json.dumps(args))
    except TypeError as error:
        raise ValueError(f"the arguments for {function} have to be ready for JSON: {error}") from None
