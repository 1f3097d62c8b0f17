"""The process of a service as its host sees it: how its end is awaited, asked for, hurried and enforced."""

from __future__ import annotations

import secrets
import sys
import threading
import time
from typing import TYPE_CHECKING

from sage._hosts.child_process import ChildProcess
from sage._processes import Process, is_alive, with_cookie
from sage._runtime.lifecycle import Exit

if TYPE_CHECKING:
    from collections.abc import Callable

SOON_S = 10.0
FOREVER_S = 3600.0

READS = "import sys; sys.stdin.read(); sys.exit(3)"
STUBBORN = """
import signal
signal.signal(signal.SIGTERM, signal.SIG_IGN)
print("up", flush=True)
while True:
    signal.pause()
"""


def nothing() -> None:
    """Stand for whoever need not hear of the end."""


def started(program: str, on_end: Callable[[], None] = nothing) -> ChildProcess:
    own = ChildProcess([sys.executable, "-c", program], secrets.token_hex(8), on_end, stdin=-1, stdout=-1)
    own.watch()
    return own


def close_input(own: ChildProcess) -> None:
    assert own._popen is not None
    assert own._popen.stdin is not None
    own._popen.stdin.close()


def first_line(own: ChildProcess) -> bytes:
    assert own._popen is not None
    assert own._popen.stdout is not None
    line: bytes = own._popen.stdout.readline()
    return line


def left_of(cookie: str, known: set[Process]) -> set[Process]:
    return with_cookie(cookie) | {one for one in known if is_alive(one)}


def free(own: ChildProcess) -> None:
    close_input(own)
    assert own._popen is not None
    assert own._popen.stdout is not None
    own._popen.stdout.close()


def test_whoever_waits_for_the_end_goes_on_when_it_was_told() -> None:
    """A caller says how the process ended, which its host has to know by then."""
    is_told, go_on = threading.Event(), threading.Event()

    def on_end() -> None:
        is_told.set()
        assert go_on.wait(SOON_S)

    own = started(READS, on_end)
    assert own.how_it_ended() == f"its process {own.pid} runs"
    close_input(own)
    assert is_told.wait(SOON_S)
    assert not own.wait_ended(0)
    go_on.set()
    assert own.wait_ended(SOON_S)
    assert own.how_it_ended() == f"its process {own.pid} exited with code 3"
    free(own)


def test_a_process_that_ends_when_it_is_asked_is_not_killed() -> None:
    own = started(READS)
    exit_ = own.end(lambda: close_input(own), left_of, FOREVER_S, lambda: "somewhere")
    assert exit_ == Exit(3, was_killed=False, where="")
    free(own)


def test_a_process_that_has_ended_is_not_asked() -> None:
    own = started(READS)
    close_input(own)
    assert own.wait_ended(SOON_S)
    asked: list[str] = []
    assert own.end(lambda: asked.append("end"), left_of, FOREVER_S) == Exit(3)
    assert asked == []
    free(own)


def test_a_process_that_does_not_end_says_where_it_stands_and_is_killed() -> None:
    own = started(STUBBORN)
    assert first_line(own) == b"up\n"
    began_at = time.monotonic()
    exit_ = own.end(nothing, left_of, 1.0, lambda: "in a loop")
    assert exit_ == Exit(-9, was_killed=True, where="in a loop")
    assert time.monotonic() - began_at >= 0.5, "half of the time is for an end by itself"
    free(own)


def test_an_end_that_runs_can_be_hurried_and_not_delayed() -> None:
    own = started(STUBBORN)
    assert first_line(own) == b"up\n"
    is_asked = threading.Event()
    exits: list[Exit] = []
    ending = threading.Thread(target=lambda: exits.append(own.end(is_asked.set, left_of, FOREVER_S)), daemon=True)
    ending.start()
    assert is_asked.wait(SOON_S)
    own.hurry(0.2)
    own.hurry(FOREVER_S)
    ending.join(SOON_S)
    assert exits == [Exit(-9, was_killed=True)]
    free(own)
