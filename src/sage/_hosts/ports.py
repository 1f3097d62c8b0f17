"""Ports of this machine for commands."""

from __future__ import annotations

import os
import socket
import threading
from contextlib import suppress
from typing import TYPE_CHECKING

from sage._processes import COOKIE_VARIABLE, described, has_variable, listening, process, targets_of
from sage.command import ADDRESS
from sage.errors import ServiceError, hint

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from sage._processes import Process
    from sage.command import Command

_chosen: set[int] = set()
"""The ports that commands of this process have chosen, and not opened yet."""
_lock = threading.Lock()


def choose_ports(service: str, command: Command, earlier: Mapping[str, int], host: str = ADDRESS) -> dict[str, int]:
    """Return a port for each name; a command that is restarted gets its earlier ones again if they are free.

    No other command of this process gets one of them before `let_go`, which the caller has to call.

    Raises:
        ServiceError: the port that was asked for is in use.
    """
    ports: dict[str, int] = {}
    # All are held until the last is chosen, so that none is given twice.
    held: list[socket.socket] = []
    try:
        for name in command.ports:
            wanted = command.port if name == "" else None
            port = _take(host, wanted or earlier.get(name, 0), held, wanted)
            if port is None and wanted is not None:
                raise _taken(wanted, f'command {command.label} of service "{service}"', service)
            chosen = port if port is not None else _take(host, 0, held)
            assert chosen is not None
            ports[name] = chosen
    except BaseException:
        release(ports)
        raise
    finally:
        for one in held:
            one.close()
    return ports


def _taken(port: int, whose: str, service: str) -> ServiceError:
    """Return the error for a port that somebody else has, with who that is."""
    links = _listening().get(port, set())
    pids = [int(name) for name in os.listdir("/proc") if name.isdecimal()] if links else []
    holders = [one for pid in pids if links & _open_files(pid) and (one := process(pid)) is not None]
    text = f"port {port} is in use, but {whose} needs it"
    if holders:
        text += f"; {described(holders[0])} listens there"
    error = ServiceError(text, service=service, fault="external")
    if holders and has_variable(holders[0].pid, COOKIE_VARIABLE):
        hint(error, "A job of SAGE started that process: `sage gc` ends what dead jobs have left.")
    return hint(error, "Stop what uses it, or leave port= out: a free port is chosen then.")


def release(ports: Mapping[str, int]) -> None:
    """Let other commands of this process have ports that their command has opened, or does not want any more."""
    with _lock:
        _chosen.difference_update(ports.values())


def in_use(host: str, ports: Iterable[int]) -> list[int]:
    """Return those of the ports that somebody has."""
    found = []
    for port in ports:
        held: list[socket.socket] = []
        if _bind(host, port, held) is None:
            found.append(port)
        held[0].close()
    return found


def held_by_others(ports: Iterable[int], own: Iterable[Process]) -> list[int]:
    """Return those of the ports on which another program listens, and none of the `own` processes."""
    links, sockets = _listening(), {link for one in own for link in _open_files(one.pid)}
    return [port for port in ports if port in links and not links[port] & sockets]


def _listening() -> dict[int, set[str]]:
    """Return the sockets that listen, as targets of descriptors, by port."""
    found: dict[int, set[str]] = {}
    for table in ("tcp", "tcp6"):
        for target, _, port in listening(table):
            found.setdefault(port, set()).add(target)
    return found


def _open_files(pid: int) -> set[str]:
    with suppress(OSError):
        return set(targets_of(pid).values())
    return set()


def _take(host: str, port: int, held: list[socket.socket], fixed: int | None = None) -> int | None:
    """Choose a port, or any free one for 0, and return it; None if it is in use or was chosen by another command."""
    while True:
        number = _bind(host, port, held)
        with _lock:
            if number is None or number not in _chosen or number == fixed:
                _chosen.update(() if number is None else (number,))
                return number
        if port:
            return None


def _bind(host: str, port: int, held: list[socket.socket]) -> int | None:
    """Bind a port, or any free one for 0, and return it; None if it is in use."""
    one = socket.socket()
    held.append(one)
    # Connections of an earlier server that only wait for their time to pass do not keep the next one out.
    one.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        one.bind((host, port))
    except OSError:
        return None
    number: int = one.getsockname()[1]
    return number
