"""The process of a service whose driver is gone: when it stops, in which order, and what it tells the guardian."""

from __future__ import annotations

import json
import logging
import os
import socket
import subprocess
import sys
import threading
import time
from contextlib import suppress
from typing import TYPE_CHECKING, Any

import pytest

from sage import BaseService, ServiceHandle, ServiceOptions
from sage._hosts.process import BOOT
from sage._plan.logical import ServiceSpec
from sage._ray.orders import SitePayload
from sage._ray.site import Site
from sage._remote.begun import shared_memory
from sage._remote.protocol import ServiceSide
from sage._remote.rpc import RpcClosedError, SocketPairRpc
from sage._remote.tcp import TcpRpcServer

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from support.recording_services import Notes

SOON_S = 10.0


class Noting(BaseService):
    """Writes down each hook; a call reads from the pipe that it is given until somebody closes the other end."""

    def __init__(self, notes: Notes) -> None:
        self.notes = notes

    def setup(self) -> None:
        self.notes.append("setup")

    def process(self, data: str) -> None:
        with open(data) as pipe:
            pipe.read()
        self.notes.append("call")

    def stop(self) -> None:
        self.notes.append("stop")

    def cleanup(self) -> None:
        self.notes.append("cleanup")


class Driven:
    """The process of a service, with its driver and its guardian here."""

    def __init__(self, notes: Notes, folder: Path) -> None:
        self.folder = folder
        here, there = socket.socketpair()
        self.guardian, guarded = socket.socketpair()
        self.guardian.settimeout(SOON_S)
        begun = shared_memory()
        boot = BOOT.format(path=sys.path, link=there.fileno(), guard=guarded.fileno(), begun=begun, name="noting")
        self.process = subprocess.Popen(
            [sys.executable, "-c", boot], pass_fds=[there.fileno(), guarded.fileno(), begun], start_new_session=True
        )
        there.close()
        guarded.close()
        os.close(begun)
        self.link = SocketPairRpc(here, {}, {}, "driver", lambda: None)
        self.link.begin()
        self.link.ask(ServiceSide.build, Noting, (notes,), {}, 1, logging.WARNING, False)

    def hook(self, name: str) -> None:
        self.link.ask(ServiceSide.run_hook, name, time.monotonic() + SOON_S)

    def call(self) -> int:
        """Begin a call, and return the open end of the pipe that it reads from."""
        pipe = str(self.folder / f"pipe {len(os.listdir(self.folder))}")
        os.mkfifo(pipe)

        def ask() -> None:
            with suppress(RpcClosedError):
                self.link.ask(ServiceSide.call, 0, "process", (pipe,), {}, 0)

        threading.Thread(target=ask, daemon=True).start()
        return os.open(pipe, os.O_WRONLY)  # waits for the other side

    def lose_driver(self, stop_s: float | None, meanwhile: Callable[[], Any] = tuple) -> dict[str, Any] | None:
        """Let the driver be gone and the guardian too, or let that ask for an end and return the answer."""
        self.link.close(SOON_S)
        if stop_s is None:
            self.guardian.close()
            return None
        self.guardian.sendall(json.dumps({"stop": stop_s}).encode())
        meanwhile()
        answer: dict[str, Any] = json.loads(self.guardian.recv(10_000))
        return answer

    def close(self) -> None:
        self.process.kill()
        self.process.wait()
        self.guardian.close()
        self.link.close(SOON_S)


def close(*descriptors: int) -> None:
    for descriptor in descriptors:
        os.close(descriptor)


@pytest.fixture
def driven(journal: Notes, tmp_path: Path) -> Iterator[Driven]:
    started = Driven(journal, tmp_path)
    yield started
    started.close()


def test_an_orphan_stops_and_cleans_up_when_the_guardian_says_so(driven: Driven, journal: Notes) -> None:
    driven.hook("setup")
    assert driven.lose_driver(SOON_S) == {"stopped": True, "errors": []}
    assert driven.process.wait(SOON_S) == 0
    assert journal == ["setup", "stop", "cleanup"]


def test_an_orphan_stops_by_itself_when_the_guardian_is_gone_too(driven: Driven, journal: Notes) -> None:
    driven.hook("setup")
    driven.lose_driver(None)
    assert driven.process.wait(SOON_S) == 0
    assert journal == ["setup", "stop", "cleanup"]


def test_an_orphan_waits_for_a_call_that_runs_before_its_stop(driven: Driven, journal: Notes) -> None:
    driven.hook("setup")
    end = driven.call()
    began_at = time.monotonic()
    answer = driven.lose_driver(2.0)
    assert time.monotonic() - began_at >= 1.0, "half of the time is for what runs"
    assert answer == {"stopped": False, "errors": ["a call or hook was still running"]}
    assert journal == ["setup", "stop", "cleanup"]
    os.close(end)


def test_the_stop_of_an_orphan_follows_the_end_of_its_last_call(driven: Driven, journal: Notes) -> None:
    driven.hook("setup")
    ends = [driven.call(), driven.call()]
    assert driven.lose_driver(600.0, lambda: close(*ends)) == {"stopped": True, "errors": []}
    assert journal == ["setup", "call", "call", "stop", "cleanup"]


def test_an_orphan_that_was_not_set_up_is_cleaned_and_not_stopped(driven: Driven, journal: Notes) -> None:
    assert driven.lose_driver(SOON_S) == {"stopped": True, "errors": []}
    assert journal == ["cleanup"]


def test_an_orphan_repeats_no_hook_that_the_driver_has_begun(driven: Driven, journal: Notes) -> None:
    driven.hook("setup")
    driven.hook("stop")
    assert driven.lose_driver(SOON_S) == {"stopped": True, "errors": []}
    assert journal == ["setup", "stop", "cleanup"]


def test_no_hook_begins_that_nobody_waits_for_any_more(driven: Driven, journal: Notes) -> None:
    """A process that was stopped and is woken late finds the hook that it was asked for, and another one behind it."""
    with pytest.raises(TimeoutError, match="setup could not begin in time"):
        driven.link.ask(ServiceSide.run_hook, "setup", time.monotonic() - 1.0)
    assert journal == []


# --- a process of a job on Ray whose masters are gone -----------------------------------------------------------------


@pytest.fixture
def site(journal: Notes) -> Iterator[Site]:
    """Return a process with a service that was built, and its master here."""
    options, secret = ServiceOptions(), b"secret"
    spec = ServiceSpec("noting", Noting, (journal,), {}, options, ServiceHandle("noting", None))
    master = TcpRpcServer("127.0.0.1", secret, {}, {}, "master")
    master.begin()
    made = Site(
        "site", secret, "127.0.0.1", {"noting": options}, {}, lambda _: SitePayload(None, (spec,)), lambda: None
    )
    made.attach(master.address, 1, {})
    made.run_hook("noting", 1, "build", None)
    yield made
    made.close()
    master.close(SOON_S)


def test_a_site_that_has_no_master_any_more_stops_and_cleans_up(site: Site, journal: Notes) -> None:
    site.run_hook("noting", 1, "setup", None)
    site.end_services(SOON_S)
    assert journal == ["setup", "stop", "cleanup"]


def test_a_site_that_was_not_set_up_is_cleaned_and_not_stopped(site: Site, journal: Notes) -> None:
    site.end_services(SOON_S)
    assert journal == ["cleanup"]


def test_a_site_repeats_no_hook_that_its_master_has_begun(site: Site, journal: Notes) -> None:
    site.run_hook("noting", 1, "setup", None)
    site.run_hook("noting", 1, "stop", None)
    site.end_services(SOON_S)
    assert journal == ["setup", "stop", "cleanup"]
