"""Describes the processes of a job, found by the cookie in their environment."""

from __future__ import annotations

import os
from contextlib import suppress
from pathlib import Path

from sage._processes import COOKIE_VARIABLE, command_of

PROC = Path("/proc")


def processes_with(cookie: str | None, proc: Path = PROC) -> dict[int, str]:
    """Return the command lines of all processes whose cookie holds the token `cookie`, or any if it is None, by pid.

    A process shows the environment that its program began with: between fork and exec it shows that of its parent, and
    when it has ended it shows none. Processes that vanish meanwhile or that may not be read are left out, and this
    process counts like any other.

    Raises:
        FileNotFoundError: this platform has no /proc.
    """
    found: dict[int, str] = {}
    for name in os.listdir(proc):
        if not name.isdecimal():
            continue
        with suppress(OSError):
            value = variable_of(int(name), COOKIE_VARIABLE, proc)
            if value is not None and (cookie is None or cookie in value.split(":")):
                found[int(name)] = command_of(int(name), proc)
    return found


def variable_of(pid: int, name: str, proc: Path = PROC) -> str | None:
    """Return a variable of the environment that the program of a process began with, or None if it had none.

    Raises:
        OSError: the process has vanished, or may not be read.
    """
    with open(f"{proc}/{pid}/environ", "rb") as file:
        _, begins, rest = (b"\0" + file.read()).partition(f"\0{name}=".encode())
    return os.fsdecode(rest.partition(b"\0")[0]) if begins else None
