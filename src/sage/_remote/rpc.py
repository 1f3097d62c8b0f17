"""Requests between two processes, and the link that joins them: a socket pair over which connections are handed."""

from __future__ import annotations

import socket
import threading
from abc import ABC, abstractmethod
from contextlib import suppress
from functools import partial
from typing import TYPE_CHECKING, Any, Concatenate, Never, ParamSpec, TypeVar

from sage._current_job import carried
from sage._forks import leave_if_forked, useless_after_fork
from sage._logs import log_of
from sage._remote.errors import pack, unpack
from sage._remote.wire import Connection, encode
from sage.errors import ServiceError, describe

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from sage._remote.wire import Frame
    from sage.service import ServiceHandle

IDLE_MAX = 32
"""How many connections are kept for later requests."""

P = ParamSpec("P")
R = TypeVar("R")

NO_KWARGS: dict[str, object] = {}
PLAIN: tuple[dict[str, object], bool, None] = (NO_KWARGS, True, None)
"""What a request has that names nothing more: no keyword arguments, an answer, and no epoch."""

log = log_of("sage.dispatcher")


class RpcClosedError(Exception):
    """The other side is gone."""


class NotReceivedError(RpcClosedError):
    """The other side was gone before it had the whole request, and has done nothing of it."""


class NotSentError(Exception):
    """A request cannot be pickled, for the `reason`."""

    def __init__(self, reason: Exception) -> None:
        super().__init__(reason)
        self.reason = reason


class Connections:
    """The open connections of one side, which all end together.

    Attributes:
        is_forked: whether this process was forked from the one whose connections they are.
    """

    def __init__(self, handles: Mapping[str, ServiceHandle[object]]) -> None:
        self._handles = handles
        self._lock = threading.Lock()
        self._all: set[Connection] = set()
        self._closed = False
        self.is_forked = False

    def shut(self) -> None:
        """Let every request end at once, here and there."""
        with self._lock:
            self._closed = True
            for connection in self._all:
                connection.shut()

    def _after_fork_in_child(self) -> None:
        """Close the copies of the sockets: two processes that read from one would take each other's answers."""
        self._lock = threading.Lock()
        self._closed = self.is_forked = True
        for connection in self._all:
            connection.close()
        self._all = set()

    def _add(self, connection: Connection) -> None:
        with self._lock:
            self._all.add(connection)
            if self._closed:
                connection.shut()

    def _drop(self, connection: Connection) -> None:
        with self._lock:
            self._all.discard(connection)
        connection.close()


class RpcClient(Connections, ABC):
    """Asks the other side. A request has a connection to itself until it is answered.

    A request names the method of a protocol: `ask(ServiceSide.run_hook, "setup", due)`.

    Args:
        handles: resolves handles of services among the received values.

    Attributes:
        epoch: goes along with each request, for a server that checks who asks; see `RpcServer`.
    """

    epoch: int | None = None

    def __init__(self, handles: Mapping[str, ServiceHandle[object]]) -> None:
        Connections.__init__(self, handles)
        self._idle: list[Connection] = []
        self._told: list[Connection] = []

    def _after_fork_in_child(self) -> None:
        super()._after_fork_in_child()
        self._idle, self._told = [], []

    @abstractmethod
    def connect(self) -> Connection:
        """Open a connection of whose other end the other side knows.

        Raises:
            RpcClosedError: the other side is gone.
        """

    def ask(self, method: Callable[Concatenate[Never, P], R], *args: P.args, **kwargs: P.kwargs) -> R:
        """Send a request and return its answer, or raise its error; see `ask_within`."""
        result: R = self.asked(None, method, args, kwargs)
        return result

    def ask_within(
        self, timeout_s: float | None, method: Callable[Concatenate[Never, P], R], *args: P.args, **kwargs: P.kwargs
    ) -> R:
        """Send a request and return its answer, or raise its error.

        Raises:
            RpcClosedError: the other side is gone, or went before it had answered; see `NotReceivedError`.
            NotSentError: the request cannot be pickled.
            TimeoutError: no answer came within `timeout_s` seconds.
        """
        result: R = self.asked(timeout_s, method, args, kwargs)
        return result

    def asked(
        self,
        timeout_s: float | None,
        method: Callable[..., object],
        args: tuple[object, ...],
        kwargs: dict[str, object],
    ) -> Any:
        """Send a request and return its answer, or raise its error; see `ask_within`."""
        # The hot path of calls between processes. Of the time of a call, half is the system's, so each Python function
        # that it need not call counts: the form of most requests is made here, and most answers are one value.
        try:
            if kwargs or self.epoch is not None:
                frame = self.request(True, method, args, kwargs)
            else:
                frame = encode((method.__name__, args))
        except Exception as reason:  # an error of the values' own code
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
        except (OSError, EOFError) as error:
            # A shutdown of this side looks like the end of the other one, which may receive the request nevertheless.
            is_missed = not self._closed and connection.has_missed(error)
            self._drop(connection)
            raise (NotReceivedError if is_missed else RpcClosedError)("the other side is gone") from None
        except BaseException:
            self._drop(connection)
            raise
        try:
            result = connection.decode(*answer)
        except Exception as reason:
            raise _not_sent(reason, "the answer cannot be unpickled here") from reason
        finally:
            self._keep(connection, timeout_s)
        if len(result) > 1:
            raise unpack(result[1])
        return result[0]

    def tell(self, method: Callable[Concatenate[Never, P], None], *args: P.args, **kwargs: P.kwargs) -> None:
        """Send a request that has no answer; RpcClosedError if the other side is gone."""
        # One that is there already has a thread on the other side, which could perhaps not start another one any more.
        try:
            connection = self._idle.pop()
        except IndexError:
            connection = self.connect()
        # Open until the link is closed, as the other side may take the end of a connection for that of the asker.
        self._told.append(connection)
        try:
            connection.send(self.request(False, method, args, kwargs))
        except OSError:
            raise RpcClosedError("the other side is gone") from None

    def post(self, method: Callable[Concatenate[Never, P], None], *args: P.args, **kwargs: P.kwargs) -> None:
        """Send a request that has no answer, if the other side is there; the next one may use its connection."""
        with suppress(OSError, RpcClosedError):
            try:
                connection = self._idle.pop()
            except IndexError:
                connection = self.connect()
            try:
                connection.send(self.request(False, method, args, kwargs))
            finally:
                self._keep(connection, None)

    def request(
        self, is_asked: bool, method: Callable[..., object], args: tuple[object, ...], kwargs: Mapping[str, object]
    ) -> Frame:
        """Return the frame of a request; without `is_asked`, one that has no answer."""
        return encode((method.__name__, args, kwargs, is_asked, self.epoch))

    def _free(self) -> None:
        """Close the connections that no request has."""
        for connections in (self._idle, self._told):
            while connections:
                self._drop(connections.pop())

    def _keep(self, connection: Connection, timeout_s: float | None) -> None:
        """Put a connection back for the next request, if there may be one."""
        if timeout_s is None and not self._closed and len(self._idle) < IDLE_MAX:
            self._idle.append(connection)
            if self._closed:
                self._free()  # `close` may have looked before
            return
        self._drop(connection)


class RpcServer(Connections):
    """Answers the other side, the requests of each connection on a thread of its own.

    So requests never wait for one another; which of them may run at once is not decided here.

    Args:
        methods: the methods that can be asked for, by name (`protocol.served`); a result or error goes back.
        handles: resolves handles of services among the received values.
        name: the name of the threads.
        check: called with the epoch of each request before it is answered, and raises to refuse it.
    """

    def __init__(
        self,
        methods: Mapping[str, Callable[..., object]],
        handles: Mapping[str, ServiceHandle[object]],
        name: str,
        check: Callable[[int | None], object] | None = None,
    ) -> None:
        Connections.__init__(self, handles)
        self._methods = methods
        self._name = name
        self._check = check
        self._threads: set[threading.Thread] = set()

    def _join(self, timeout_s: float) -> None:
        """Wait for the threads; those that still answer a request after `timeout_s` are left behind."""
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
        try:
            thread.start()
        except BaseException:
            self._threads.discard(thread)
            raise

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
        is_asked = True
        try:
            request = connection.decode(*received)
            name, args, kwargs, is_asked, epoch = request if len(request) > 2 else (*request, *PLAIN)
            if self._check is not None:
                self._check(epoch)
            value = self._methods[name](*args, **kwargs)
        except BaseException as error:  # whoever asked owns it
            leave_if_forked(error)
            if not is_asked:
                log.error("request failed name=%s request=%s", self._name, name, exc_info=error)
                return None
            return self._error_frame(error)
        leave_if_forked()
        if not is_asked:
            return None
        try:
            return encode_answer(value)
        except ServiceError as error:
            return self._error_frame(error)

    def _error_frame(self, error: BaseException) -> Frame:
        return encode((None, pack(error, self._name, ServiceError)))


def encode_answer(value: object) -> Frame:
    """Return the frame of an answer; ServiceError if it cannot be pickled."""
    try:
        return encode((value,))
    except Exception as error:
        raise _not_sent(error, f"an answer of type {type(value).__name__} cannot be pickled") from error


class SocketPairRpc(RpcClient, RpcServer):
    """Joins two processes by a socket pair.

    Args:
        end: one end of a stream socket pair, which the link owns from now on.
        methods: the methods that the other side can ask for, by name.
        handles: resolves handles of services among the received values.
        name: the name of the threads.
        on_closed: called when the other side is gone.
    """

    def __init__(
        self,
        end: socket.socket,
        methods: Mapping[str, Callable[..., object]],
        handles: Mapping[str, ServiceHandle[object]],
        name: str,
        on_closed: Callable[[], None],
    ) -> None:
        RpcClient.__init__(self, handles)
        RpcServer.__init__(self, methods, handles, name)
        self._socket = end
        self._on_closed = on_closed
        useless_after_fork(self)

    def _after_fork_in_child(self) -> None:
        super()._after_fork_in_child()
        self._socket.close()

    def begin(self) -> None:
        """Answer from now on. Earlier requests of the other side wait, so that the owner can get ready for it."""
        self._start_thread(self._accept)

    def connect(self) -> Connection:
        """Open a connection and hand its other end over.

        Raises:
            RpcClosedError: the other side is gone.
        """
        here, there = socket.socketpair()
        connection = Connection(here, self._handles)
        try:
            with self._lock:
                if self._closed:
                    owner = "is closed" if not self.is_forked else "is one of the process that this one was forked from"
                    raise RpcClosedError(f"the link {owner}")
                self._all.add(connection)
                socket.send_fds(self._socket, [b"c"], [there.fileno()])
        except OSError:
            self._drop(connection)
            raise RpcClosedError("the other side is gone") from None
        except BaseException:
            self._drop(connection)
            raise
        finally:
            there.close()
        return connection

    def shut(self) -> None:
        with self._lock:
            self._closed = True
            with suppress(OSError):
                self._socket.shutdown(socket.SHUT_RDWR)
        super().shut()

    def close(self, timeout_s: float) -> None:
        """Shut the link and free it; threads that still answer a request after `timeout_s` are left behind."""
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
                try:
                    self._start_thread(partial(self._serve, connection))
                except (
                    RuntimeError
                ) as error:  # the system has no more threads: whoever asks is told that nobody is there
                    log.error("request cannot be answered name=%s error=%s", self._name, error)
                    self._drop(connection)
            if not data:
                break
        with self._lock, suppress(OSError):  # the program may have closed every descriptor that it found
            self._closed = True
            self._socket.close()
        self._on_closed()


def _not_sent(error: BaseException, text: str) -> ServiceError:
    return ServiceError(f"{text}: {describe(error)}")
