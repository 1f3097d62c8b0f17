"""The processes of one job: each listens, and asks any other over connections on which both prove that they know it.

Nothing that arrives is unpickled before the other side has proved to hold the job's secret.
"""

from __future__ import annotations

import fcntl
import hmac
import os
import socket
import struct
import termios
import threading
from contextlib import suppress
from functools import partial
from typing import TYPE_CHECKING

from sage._forks import useless_after_fork
from sage._remote.protocol import Address
from sage._remote.rpc import NotReceivedError, RpcClient, RpcServer
from sage._remote.wire import Connection

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from sage.service import ServiceHandle

HELLO = b"sage-job-1"
NONCE_BYTES = 16
PROOF_BYTES = 32

PROVE_S = 5.0
"""How long either side may take to prove itself."""

CONNECT_S = 5.0

SILENCE_S = 10
"""After how many seconds without a sign of the other side's machine a connection counts as broken."""

PROBE_S = 2
PROBES_MAX = 4
BACKLOG = 128

UNCONFIRMED = struct.Struct("=i")
"""How many bytes of a connection were sent, and are not known to have arrived."""


class TcpConnection(Connection):
    """A connection that can tell whether the other side's machine has received everything."""

    def has_missed(self, error: Exception) -> bool:
        """Return whether the other end was gone before it had all that was sent; see `Connection`.

        A machine confirms with the end of a connection how much it has received before.
        """
        if isinstance(error, BrokenPipeError):
            return True
        with suppress(OSError):  # a system that does not tell
            size = fcntl.ioctl(self._socket, termios.TIOCOUTQ, bytes(UNCONFIRMED.size))
            return isinstance(error, EOFError) and UNCONFIRMED.unpack(size)[0] > 0
        return False


class TcpRpcClient(RpcClient):
    """Leads to another process of the job."""

    def __init__(self, address: Address, secret: bytes, handles: Mapping[str, ServiceHandle[object]]) -> None:
        super().__init__(handles)
        self.address = address
        self._secret = secret
        useless_after_fork(self)

    def connect(self) -> Connection:
        """Open a connection to the process.

        Raises:
            NotReceivedError: it is gone, it cannot be reached, or it is not one of this job.
        """
        try:
            end = socket.create_connection(self.address, CONNECT_S)
        except OSError as error:
            raise NotReceivedError(f"nothing answers at {self.address[0]}:{self.address[1]}: {error}") from None
        try:
            _watch_over(end)
            _prove_as_client(end, self._secret)
            end.settimeout(None)
        except (OSError, EOFError) as error:
            end.close()
            raise NotReceivedError(f"the process at {self.address[0]}:{self.address[1]} is not of this job") from error
        connection = TcpConnection(end, self._handles)
        self._add(connection)
        return connection

    def close(self) -> None:
        """Let every request end, and free the connections."""
        self.shut()
        self._free()


class TcpRpcServer(RpcServer):
    """Answers the other processes of the job.

    Attributes:
        address: where it listens.
    """

    def __init__(
        self,
        ip: str,
        secret: bytes,
        methods: Mapping[str, Callable[..., object]],
        handles: Mapping[str, ServiceHandle[object]],
        name: str,
        check: Callable[[int | None], object] | None = None,
    ) -> None:
        super().__init__(methods, handles, name, check)
        self._secret = secret
        self._socket = socket.create_server((ip, 0), backlog=BACKLOG)
        self.address: Address = self._socket.getsockname()[:2]
        useless_after_fork(self)

    def begin(self) -> None:
        """Answer from now on."""
        self._start_thread(self._accept)

    def _after_fork_in_child(self) -> None:
        super()._after_fork_in_child()
        self._socket.close()

    def close(self, timeout_s: float) -> None:
        """Stop answering; threads that still answer after `timeout_s` are left behind."""
        with suppress(OSError):
            self._socket.shutdown(socket.SHUT_RDWR)  # wakes the thread that accepts
        self.shut()
        self._join(timeout_s)

    def _accept(self) -> None:
        while True:
            try:
                end, _ = self._socket.accept()
            except OSError:
                break
            self._start_thread(partial(self._admit, end))
        self._socket.close()

    def _admit(self, end: socket.socket) -> None:
        """Let in whoever proves to be of this job."""
        try:
            end.settimeout(PROVE_S)
            _watch_over(end)
            _prove_as_server(end, self._secret)
            end.settimeout(None)
        except (OSError, EOFError):
            end.close()
            return
        connection = Connection(end, self._handles)
        self._add(connection)
        self._serve(connection)


class Lease:
    """Tells when another process is gone: a connection to it that only ever ends.

    Args:
        peer: leads to the process.
        on_lost: called once, on a thread of its own, when it is gone; not after `end`.
    """

    def __init__(self, peer: TcpRpcClient, on_lost: Callable[[], None]) -> None:
        self._connection = peer.connect()
        self._on_lost = on_lost
        self._is_ended = False
        threading.Thread(target=self._wait, name="sage-lease", daemon=True).start()

    def end(self) -> None:
        """Let go of the process."""
        self._is_ended = True
        self._connection.shut()

    def _wait(self) -> None:
        with suppress(OSError, EOFError):
            self._connection.take()
        self._connection.close()
        if not self._is_ended:
            self._on_lost()


def _watch_over(end: socket.socket) -> None:
    """Let requests go at once, and the connection break when the other side's machine is gone."""
    end.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    end.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for name, value in (
        ("TCP_KEEPIDLE", PROBE_S),
        ("TCP_KEEPINTVL", PROBE_S),
        ("TCP_KEEPCNT", PROBES_MAX),
        ("TCP_USER_TIMEOUT", SILENCE_S * 1000),
    ):
        if hasattr(socket, name):  # these are Linux's names
            end.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)


def _prove_as_client(end: socket.socket, secret: bytes) -> None:
    ours = os.urandom(NONCE_BYTES)
    end.sendall(HELLO + ours)
    theirs = _received(end, NONCE_BYTES)
    if not hmac.compare_digest(_received(end, PROOF_BYTES), _proof(secret, b"server", ours, theirs)):
        raise ConnectionError("the other side does not know the secret")
    end.sendall(_proof(secret, b"client", ours, theirs))


def _prove_as_server(end: socket.socket, secret: bytes) -> None:
    if _received(end, len(HELLO)) != HELLO:
        raise ConnectionError("the other side speaks something else")
    theirs, ours = _received(end, NONCE_BYTES), os.urandom(NONCE_BYTES)
    end.sendall(ours + _proof(secret, b"server", theirs, ours))
    if not hmac.compare_digest(_received(end, PROOF_BYTES), _proof(secret, b"client", theirs, ours)):
        raise ConnectionError("the other side does not know the secret")


def _proof(secret: bytes, side: bytes, *nonces: bytes) -> bytes:
    return hmac.digest(secret, side + b"".join(nonces), "sha256")


def _received(end: socket.socket, size: int) -> bytes:
    data = b""
    while len(data) < size:
        part = end.recv(size - len(data))
        if not part:
            raise EOFError("the other side closed the connection")
        data += part
    return data
