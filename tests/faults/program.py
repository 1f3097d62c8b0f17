"""A program that something goes wrong in, for services that are commands: `python -m faults.program ...`.

It listens on a port and answers each connection, which sends the name of the place that it asks for. It knows nothing
of SAGE, as such programs do, and imports little, so that it is up soon.
"""

from __future__ import annotations

import signal
import socket
import sys
from typing import Any

from support.fault_injection import go_wrong, mark

WORD_BYTES_MAX = 64


class Program:
    """Marks what it comes to in a file, and has a fault in one place, the first time that it gets there."""

    def __init__(self, marks: str, place: str, fault: str) -> None:
        self.marks, self.place, self.fault = marks, place, fault
        self.seen: set[str] = set()

    def pass_by(self, place: str) -> None:
        if place in self.seen or (place in ("call", "health") and place != self.place):
            return
        self.seen.add(place)
        mark(self.marks, f"faulty.{place}")
        if place == self.place:
            go_wrong(self.fault)

    def stop(self, *_: Any) -> None:
        # What is ended in the middle of its end does not begin another one.
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        signal.sigwait([signal.SIGCONT])  # which follows at once, and would wake it if it stopped itself before
        self.pass_by("stop")
        sys.exit(0)

    def live(self, port: int) -> None:
        signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGCONT])  # it wakes a stopped process all the same
        signal.signal(signal.SIGTERM, self.stop)
        self.pass_by("start")
        with socket.create_server(("127.0.0.1", port)) as server:
            while True:
                connection, _ = server.accept()
                with connection:
                    place = connection.recv(WORD_BYTES_MAX).decode().strip()
                    if place:
                        self.pass_by(place)
                    connection.sendall(b"yes")


def ask(port: int, place: str = "", timeout_s: float | None = None) -> None:
    """Have the program come to a place, or, without one, only see that it answers.

    Raises:
        OSError: it does not answer, or not within `timeout_s` seconds.
    """
    with socket.create_connection(("127.0.0.1", port), timeout_s) as connection:
        connection.sendall(f"{place}\n".encode())
        if not connection.recv(WORD_BYTES_MAX):
            raise ConnectionError("the program went away")


if __name__ == "__main__":
    Program(*sys.argv[1:4]).live(int(sys.argv[4]))
