"""Requests between two processes, and the link that joins them: a socket pair over which connections are handed."""

from __future__ import annotations

import pickle
import socket
import threading
import traceback
from abc import ABC, abstractmethod
from contextlib import suppress
from typing import TYPE_CHECKING, Any

from sage._hosts.wire import Connection, encode
from sage._runtime.inside import carried
from sage.errors import ServiceError, describe, hint

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from sage._hosts.wire import Frame
    from sage.service import ServiceHandle

IDLE_MAX = 32
"""How many connections are kept for later requests."""

SILENT = object()
"""What an answer is that is not sent, as nobody waits for it."""


class LinkClosedError(Exception):
    """The other side is gone."""


class NotSentError(Exception):
    """A request cannot be pickled, for the `reason`."""

    def __init__(self, reason: Exception) -> None:
        super().__init__(reason)
        self.reason = reason


class Connections:
    """The open connections of one side, which all end together."""

    def __init__(self, handles: Mapping[str, ServiceHandle[Any]]) -> None:
        self._handles = handles
        self._lock = threading.Lock()
        self._all: set[Connection] = set()
        self._closed = False

    def shut(self) -> None:
        """Let every request end at once, here and there."""
        with self._lock:
            self._closed = True
            for connection in self._all:
                connection.shut()

    def _add(self, connection: Connection) -> None:
        with self._lock:
            self._all.add(connection)
            if self._closed:
                connection.shut()

    def _drop(self, connection: Connection) -> None:
        with self._lock:
            self._all.discard(connection)
        connection.close()


class Asking(Connections, ABC):
    """Asks the other side. A request is a tuple, and has a connection to itself until it is answered.

    Args:
        handles: what handles of services among the received values stand for.
    """

    def __init__(self, handles: Mapping[str, ServiceHandle[Any]]) -> None:
        Connections.__init__(self, handles)
        self._idle: list[Connection] = []
        self._told: list[Connection] = []

    @abstractmethod
    def connect(self) -> Connection:
        """Open a connection of whose other end the other side knows.

        Raises:
            LinkClosedError: the other side is gone.
        """

    def ask(self, *request: Any, timeout_s: float | None = None) -> Any:
        """Send a request and return its answer, or raise what was raised for it.

        Raises:
            LinkClosedError: the other side is gone, or went before it had answered.
            NotSentError: the request cannot be pickled.
            TimeoutError: no answer came within `timeout_s` seconds.
        """
        try:
            frame = encode(request)
        except Exception as reason:  # whatever the values themselves raise
            raise NotSentError(reason) from reason
        try:
            connection = self._idle.pop()
        except IndexError:
            connection = self.connect()
        try:
            if timeout_s is not None:
                connection.bound(timeout_s)
            connection.send(frame)
            answer = connection.take()
        except TimeoutError:
            self._drop(connection)
            raise
        except (OSError, EOFError):
            self._drop(connection)
            raise LinkClosedError("the other side is gone") from None
        except BaseException:
            self._drop(connection)
            raise
        try:
            value, error, where = connection.decode(*answer)
        except Exception as reason:
            raise _not_sent(reason, "the answer cannot be unpickled here") from reason
        finally:
            self._keep(connection, timeout_s)
        if error is not None:
            raise hint(error, where)
        return value

    def tell(self, *request: Any) -> None:
        """Send a request that has no answer.

        Raises:
            LinkClosedError: the other side is gone.
        """
        # One that is there already has a thread on the other side, which could perhaps not start another one any more.
        try:
            connection = self._idle.pop()
        except IndexError:
            connection = self.connect()
        # Open until the link is closed, as the other side may take the end of a connection for that of the asker.
        self._told.append(connection)
        try:
            connection.send(encode(request))
        except OSError:
            raise LinkClosedError("the other side is gone") from None

    def post(self, *request: Any) -> None:
        """Send a request that has no answer, if the other side is there; what follows may use its connection."""
        with suppress(OSError, LinkClosedError):
            try:
                connection = self._idle.pop()
            except IndexError:
                connection = self.connect()
            try:
                connection.send(encode(request))
            finally:
                self._keep(connection, None)

    def _free(self) -> None:
        """Close the connections that no request has."""
        for connections in (self._idle, self._told):
            while connections:
                self._drop(connections.pop())

    def _keep(self, connection: Connection, timeout_s: float | None) -> None:
        """Put a connection back for the next request, if there may be one."""
        with self._lock:
            if timeout_s is None and not self._closed and len(self._idle) < IDLE_MAX:
                self._idle.append(connection)
                return
        self._drop(connection)


class Answering(Connections):
    """Answers the other side, the requests of each connection on a thread of its own.

    So requests never wait for one another; which of them may run at once is not decided here.

    Args:
        answer: called with the parts of each request; what it returns or raises goes back.
        handles: what handles of services among the received values stand for.
        name: what the threads are named after.
    """

    def __init__(self, answer: Callable[..., Any], handles: Mapping[str, ServiceHandle[Any]], name: str) -> None:
        Connections.__init__(self, handles)
        self._answer = answer
        self._name = name
        self._threads: set[threading.Thread] = set()

    def _join(self, timeout_s: float) -> None:
        """Wait for the threads; what still answers a request after `timeout_s` is left behind."""
        for thread in tuple(self._threads):
            if thread is not threading.current_thread():
                thread.join(timeout_s)

    def _start_thread(self, work: Callable[[], None]) -> None:
        def run() -> None:
            try:
                work()
            finally:
                self._threads.discard(thread)

        thread = threading.Thread(target=carried(run), name=f"{self._name}-link", daemon=True)
        self._threads.add(thread)
        thread.start()

    def _serve(self, connection: Connection) -> None:
        """Answer the requests of one connection."""
        try:
            while True:
                frame = self._answered(connection)
                if frame is not None:
                    connection.send(frame)
        except (OSError, EOFError):
            return
        finally:
            self._drop(connection)

    def _answered(self, connection: Connection) -> Frame | None:
        received = connection.take()
        try:
            value = self._answer(*connection.decode(*received))
        except BaseException as error:  # whoever asked owns it
            return _error_frame(error)
        if value is SILENT:
            return None
        try:
            return encode((value, None, ""))
        except Exception as error:
            return _error_frame(_not_sent(error, f"an answer of type {type(value).__name__} cannot be pickled"))


class Link(Asking, Answering):
    """Joins two processes by a socket pair.

    Args:
        end: one end of a stream socket pair, which the link owns from now on.
        answer: called with the parts of each request; what it returns or raises goes back.
        handles: what handles of services among the received values stand for.
        name: what the threads are named after.
        on_closed: called when the other side is gone.
    """

    def __init__(
        self,
        end: socket.socket,
        answer: Callable[..., Any],
        handles: Mapping[str, ServiceHandle[Any]],
        name: str,
        on_closed: Callable[[], None],
    ) -> None:
        Asking.__init__(self, handles)
        Answering.__init__(self, answer, handles, name)
        self._socket = end
        self._on_closed = on_closed

    def begin(self) -> None:
        """Answer from now on. What the other side has asked before waits, so that the owner can get ready for it."""
        self._start_thread(self._accept)

    def connect(self) -> Connection:
        """Open a connection and hand its other end over.

        Raises:
            LinkClosedError: the other side is gone.
        """
        here, there = socket.socketpair()
        connection = Connection(here, self._handles)
        try:
            with self._lock:
                if self._closed:
                    raise LinkClosedError("the link is closed")
                self._all.add(connection)
                socket.send_fds(self._socket, [b"c"], [there.fileno()])
        except OSError:
            self._drop(connection)
            raise LinkClosedError("the other side is gone") from None
        except BaseException:
            self._drop(connection)
            raise
        finally:
            there.close()
        return connection

    def shut(self) -> None:
        """Let every request end at once, here and there."""
        with self._lock:
            self._closed = True
            with suppress(OSError):
                self._socket.shutdown(socket.SHUT_RDWR)
        super().shut()

    def close(self, timeout_s: float) -> None:
        """Shut the link and free what it has; what still answers a request after `timeout_s` is left behind."""
        self.shut()
        self._free()
        self._join(timeout_s)

    def _accept(self) -> None:
        """Take connections that the other side hands over, until it is gone."""
        while True:
            try:
                data, descriptors, _, _ = socket.recv_fds(self._socket, 1, 1, socket.MSG_CMSG_CLOEXEC)
            except OSError:
                break
            for descriptor in descriptors:
                connection = Connection(socket.socket(fileno=descriptor), self._handles)
                self._add(connection)
                self._start_thread(lambda connection=connection: self._serve(connection))  # type: ignore[misc]
            if not data:
                break
        with self._lock:
            self._closed = True
            self._socket.close()
        self._on_closed()


def _error_frame(error: BaseException) -> Frame:
    """Return the frame for an error; one that the other side could not rebuild goes as its text."""
    where = f"In the process {threading.current_thread().name.removesuffix('-link')}:\n"
    where += "".join(traceback.format_exception(error)).rstrip()
    try:
        frame = encode((None, error, where))
        _, rebuilt, _ = pickle.loads(frame[0], buffers=frame[1])
        if type(rebuilt) is type(error) and str(rebuilt) == str(error):
            return frame
    except Exception as reason:
        where += f"\nIt came as its text, because it cannot be pickled: {describe(reason)}"
    return encode((None, ServiceError(describe(error), fault="user"), where))


def _not_sent(error: BaseException, text: str) -> ServiceError:
    return ServiceError(f"{text}: {describe(error)}")
