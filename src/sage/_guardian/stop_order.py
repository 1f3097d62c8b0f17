"""The end of services whose driver died: asked for one after the other, each in its turn, all within one bound."""

from __future__ import annotations

import json
import os
import select
import signal
import socket
import time
from contextlib import suppress
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import TYPE_CHECKING

from sage._processes import Process, descendants, send, watch, with_cookie

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping

    from sage._guardian.journal import ServiceLine

STOP_TIMEOUT_S = 10.0
KILL_BOUND_S = 1.0
ANSWER_BYTES_MAX = 65_536

Key = tuple[str, str, int]
"""Job, service and incarnation."""


def key_of(service: ServiceLine) -> Key:
    return (service.job, service.name, service.incarnation)


@dataclass
class End:
    """How one service ended.

    Attributes:
        state: "stopped", "cleanup_failed", "killed" or "lost".
        duration_s: how long its end took, in seconds, from the order on; 0 if its process could not be asked.
        errors: the errors of its hooks, as text.
    """

    state: str
    duration_s: float = 0.0
    errors: list[str] = field(default_factory=list)


def followers(
    services: Iterable[ServiceLine],
    seen: Iterable[tuple[str, str, str]] = (),
    owners: Mapping[tuple[str, str], str] = MappingProxyType({}),
) -> dict[Key, set[Key]]:
    """Return for each service those that must have ended before it is asked to, as the driver would see to it.

    Within a job that declares dependencies these are its dependents, direct or not. With none declared they
    end one after the other, the last registered first, unless one was seen to ask for another.

    Args:
        services: all of all jobs, in the order of registration.
        seen: job, service and the service that it was seen to ask for.
        owners: by job and service, the job that runs it for others too; there it ends after them all.
    """
    before: dict[Key, set[Key]] = {}
    by_job: dict[str, list[ServiceLine]] = {}
    for service in services:
        by_job.setdefault(service.job, []).append(service)
    for job, members in by_job.items():
        edges = {(service.name, other) for service in members for other in service.requires}
        is_declared = bool(edges)
        edges |= {(one, other) for id_, one, other in seen if id_ == job}
        dependents = {service.name: _dependents(service.name, edges) for service in members}
        for service in members if is_declared else ():
            before[key_of(service)] = {key_of(other) for other in members if other.name in dependents[service.name]}
        if not is_declared:
            ended: list[Key] = []
            for service in _one_by_one(members, dependents):
                before[key_of(service)] = set(ended)
                ended.append(key_of(service))
    for service in (one for members in by_job.values() for one in members):
        for owned in by_job.get(owners.get((service.job, service.name), ""), ()):
            if owned.name == service.name:
                before[key_of(owned)] |= {key_of(service)} | before[key_of(service)]
    return before


def _one_by_one(members: list[ServiceLine], dependents: Mapping[str, set[str]]) -> Iterator[ServiceLine]:
    """Yield the last one, again and again, that nothing which is left depends on."""
    left = list(members)
    while left:
        names = {service.name for service in left}
        free = (service for service in reversed(left) if not dependents[service.name] & names)
        chosen = next(free, left[-1])  # circles occur only in a corrupt journal
        left.remove(chosen)
        yield chosen


def _dependents(name: str, edges: set[tuple[str, str]]) -> set[str]:
    found: set[str] = set()
    todo = [name]
    while todo:
        required = todo.pop()
        for one, other in edges:
            if other == required and one not in found and one != name:
                found.add(one)
                todo.append(one)
    return found


@dataclass
class _Running:
    """A service that was asked to end: its process, its watched descriptors, and when its share is used up."""

    service: ServiceLine
    process: Process
    began_at: float
    due: float
    pidfd: int
    answer: bytes = b""
    is_killed: bool = False


class StopOrder:
    """Ends services gracefully, in order.

    Attributes:
        ends: how each one ended that has.
        descendants: the descendants of their processes when their turn came.

    Args:
        services: those to end, in the order of registration, and with them those that are over or were in the driver.
        lines: the socket to each process-hosted service that has one.
        timeout_s: bound of everything together, in seconds. Each service gets an equal share of the time left for it
            and for those that wait for it, so that one that hangs does not take their time away; then it is killed, as
            no other may be stopped before it has gone.
        seen: as `followers` takes it.
        owners: likewise.
    """

    def __init__(
        self,
        services: list[ServiceLine],
        lines: Mapping[Key, socket.socket],
        timeout_s: float = STOP_TIMEOUT_S,
        seen: Iterable[tuple[str, str, str]] = (),
        owners: Mapping[tuple[str, str], str] = MappingProxyType({}),
    ) -> None:
        self.ends: dict[Key, End] = {}
        self.descendants: set[Process] = set()
        self._before = followers(services, seen, owners)
        self._lines = lines
        self._due = time.monotonic() + timeout_s
        self._poll = select.poll()
        self._running: dict[Key, _Running] = {}
        self._by_descriptor: dict[int, Key] = {}
        self._waiting = {key_of(service): service for service in services if not service.is_over}
        self._depths = self._chains()

    def run(self) -> dict[Key, End]:
        """End them all and return how each one ended."""
        while self._waiting or self._running:
            self._begin_those_that_may()
            if self._running:
                self._wait()
        return self.ends

    def _begin_those_that_may(self) -> None:
        while ready := [key for key in self._waiting if not self._before[key] & {*self._waiting, *self._running}]:
            for key in reversed(ready):
                self._begin(key, self._waiting.pop(key))
        if self._waiting and not self._running:
            # Only a journal that lies can hold a circle; it must not keep anything alive.
            for key in reversed(tuple(self._waiting)):
                self._begin(key, self._waiting.pop(key))

    def _begin(self, key: Key, service: ServiceLine) -> None:
        process = self._process(service)
        pidfd = None if process is None else watch(process)
        if process is None or pidfd is None:
            self.ends[key] = End("lost")
            return
        self.descendants |= descendants(process)  # when it has gone, nobody can tell any more
        now = time.monotonic()
        share_s = max(self._due - now, 0.0) / max(self._depths[key], 1)
        self._running[key] = _Running(service, process, now, now + share_s, pidfd)
        self._watch(pidfd, key)
        # A stopped process would never read its order.
        send(process, *([service.stop_signal] if service.stop_signal is not None else []), signal.SIGCONT)
        line = self._lines.get(key)
        if line is not None:
            with suppress(OSError):
                line.setblocking(False)
                line.send(json.dumps({"stop": share_s}).encode() + b"\n")
                self._watch(line.fileno(), key)

    def _watch(self, descriptor: int, key: Key) -> None:
        self._by_descriptor[descriptor] = key
        self._poll.register(descriptor, select.POLLIN)

    def _process(self, service: ServiceLine) -> Process | None:
        """Return the process of a service; the driver may have died between its start and its line in the journal."""
        if service.process is not None or service.token is None:
            return service.process
        return min(with_cookie(service.token), key=lambda one: one.started, default=None)

    def _chains(self) -> dict[Key, int]:
        """Return how many processes have their turn one after the other, from each service on."""
        depths: dict[Key, int] = {}
        for key in sorted(self._waiting, key=lambda one: len(self._before[one]), reverse=True):
            own = int(self._waiting[key].host != "inline")
            depths[key] = own + max((depth for other, depth in depths.items() if key in self._before[other]), default=0)
        return depths

    def _wait(self) -> None:
        nearest = min(running.due for running in self._running.values())
        for descriptor, _ in self._poll.poll(max(nearest - time.monotonic(), 0.0) * 1000):
            key = self._by_descriptor.get(descriptor)
            if key is None:
                continue  # An event of the same moment was the end of its service.
            running = self._running[key]
            if descriptor == running.pidfd:
                self._over(key, running)
            else:
                self._read(key, running, descriptor)
        now = time.monotonic()
        for key, running in list(self._running.items()):
            if now < running.due:
                continue
            if running.is_killed:
                self._over(key, running)
            else:
                running.is_killed = True
                running.due = now + KILL_BOUND_S
                send(running.process, signal.SIGKILL)

    def _read(self, key: Key, running: _Running, descriptor: int) -> None:
        try:
            data = self._lines[key].recv(ANSWER_BYTES_MAX)
        except BlockingIOError:
            return
        except OSError:
            data = b""
        if not data or len(running.answer) > ANSWER_BYTES_MAX:
            self._poll.unregister(descriptor)
            del self._by_descriptor[descriptor]
        running.answer += data

    def _over(self, key: Key, running: _Running) -> None:
        line = self._lines.get(key)
        if line is not None and line.fileno() in self._by_descriptor:
            self._read(key, running, line.fileno())
            if line.fileno() in self._by_descriptor:
                self._poll.unregister(line.fileno())
                del self._by_descriptor[line.fileno()]
        self._poll.unregister(running.pidfd)
        del self._by_descriptor[running.pidfd]
        os.close(running.pidfd)
        del self._running[key]
        end = _answered(running)
        if running.is_killed:
            end.state = "killed"
        end.duration_s = time.monotonic() - running.began_at
        self.ends[key] = end


def _answered(running: _Running) -> End:
    try:
        answer = json.loads(running.answer)
        errors = [str(error) for error in answer["errors"]]
        return End("stopped" if answer["stopped"] and not errors else "cleanup_failed", errors=errors)
    except (ValueError, KeyError, TypeError):
        # A command answers by ending when it is told to; a service that ends without a word has died.
        return End("lost" if running.service.stop_signal is None else "stopped")
